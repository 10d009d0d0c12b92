"""What a recursion does: the hard subset, routing between one pass and two, and the hand-over."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import QUESTIONS, build, close, naive_score, words_tokenizer
from tiny_runs import command, make_place, run, write_lines

import audit
import data
import eval as metrics
import handover
import recurse
import world
from generate import generate, predict
from generate import main as generate_main
from questions import prepare
from recurse import Candidate, route
from runs import load_run, read_predictions

PAUSES = {"neural": "", "filler": "--pause 2 --residual off"}  # name of a run: its flags


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of prompt tuning and of neural recursion, on the same questions."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    run(command(folder, "prompt_tuning", folder / "prompt"))
    for name, flags in PAUSES.items():
        flags = f"--steps 20 --lr 0.03 {flags}"
        run(command(folder, "neural_recursion", folder / name, flags))
    return folder


@pytest.fixture
def stack(make_lm):
    return build("neural_recursion", make_lm("untied"))[0].requires_grad_(False)


def test_wilson_interval():
    """The values of Brown, Cai and DasGupta's formula, worked out by hand."""
    for (successes, n), expected in {
        (0, 10): (0.0, 0.27754),
        (5, 10): (0.23659, 0.76341),
        (10, 10): (0.72246, 1.0),
        (1, 1): (0.20654, 1.0),
    }.items():
        assert np.allclose(audit.wilson(successes, n), expected, atol=1e-4)
    for wrong in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no rate"):
            audit.wilson(*wrong)
    assert audit.rate("nothing", [])["rate"] is None


# The hard subset


def test_hard_are_the_questions_without_a_right_candidate():
    examples = [data.Example(data.question_text(str(i)), "Velmor", ("Velmor",)) for i in range(3)]
    wrong, right = Candidate("Delmau", -1.0, 9, 0), Candidate("the velmor", -9.0, 1, 9)
    assert audit.hard_subset(examples, [[wrong], [wrong, right], []]) == [examples[0], examples[2]]


def test_scores_of_runs_on_some_questions(tmp_path):
    def predictions(name, ems, task="t"):
        rows = [
            {"id": i, "task": task, "input": f"q{i}", "prediction": "x"} for i in range(len(ems))
        ]
        rows = [row | {"answers": ["a"], "em": em, "f1": em} for row, em in zip(rows, ems)]
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "predictions.jsonl", rows)
        return tmp_path / name

    a, b = predictions("a", [1, 0, 0, 0, 1, 1]), predictions("b", [0, 1, 1, 0, 0, 0])
    examples, _ = audit.asked_questions(a)
    rows = audit.scores_on(examples[1:4], [a, b])
    assert [(row["n"], row["rate"]) for row in rows] == [(3, 0.0), (3, 2 / 3)]
    assert "difference" not in rows[0] and math.isclose(rows[1]["difference"], 2 / 3)
    with pytest.raises(ValueError, match="c: was not tested on id '5'"):
        audit.scores_on(examples, [a, predictions("c", [1] * 5)])


def test_hard_writes_a_file_of_examples(place, tmp_path, capsys):
    out, runs = tmp_path / "hard.jsonl", [str(place / "neural"), str(place / "prompt")]
    line = ["hard", str(place / "prompt"), "--samples", "4", "--out", str(out), "--runs", *runs]
    result = audit.main(line)
    assert 0 < result["hard"] <= result["questions"] == 5
    hard = data.read(out)
    model, prefix, tokenizer, _ = load_run(place / "prompt")
    rows = read_predictions(place / "prompt")
    ids = data.encode_prompts(tokenizer, [row["input"] for row in rows])
    stops = ["\n"] * len(rows)
    ranked = recurse.candidates(model, ids, 4, prefix, tokenizer, 4, stops)
    easy = set()
    for row, found in zip(rows, ranked):
        if any(metrics.exact_match(c.text, row["answers"]) for c in found):
            easy.add(row["id"])
    assert {e.id for e in hard} == {row["id"] for row in rows} - easy
    assert {e.answers for e in hard} <= {tuple(row["answers"]) for row in rows}
    assert [row["what"] for row in result["runs"]] == runs and runs[0] in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        audit.main(line)


# Passes by difficulty


def test_the_curve_is_what_each_threshold_gives():
    rng = np.random.default_rng(0)
    N = 9
    first, second = (rng.integers(0, 2, N).astype(float).tolist() for _ in range(2))
    confidence = [-0.5, -2.0, -1.0, -2.0, -3.0, -0.1, -0.7, -5.0, -4.0]  # two are equal
    costs = rng.integers(1, 9, (2, N)).astype(float)
    curve = audit.routing_curve(first, second, confidence, *costs.tolist())
    thresholds = [row["threshold"] for row in curve]
    assert thresholds == [*sorted(set(confidence)), None]
    for row in curve:
        more = [row["threshold"] is None or c < row["threshold"] for c in confidence]
        chosen = [b if m else a for a, b, m in zip(first, second, more)]
        assert math.isclose(row["em"], np.mean(chosen))
        assert math.isclose(row["passes"], 1 + np.mean(more))
        assert math.isclose(row["operations"], np.mean(costs[0] + costs[1] * more))
        k, ems = sum(more), []
        for rows in itertools.combinations(range(N), k):
            ems.append(np.mean([second[b] if b in rows else first[b] for b in range(N)]))
        assert math.isclose(row["oracle"], max(ems)) and math.isclose(row["random"], np.mean(ems))
    with pytest.raises(ValueError, match="not of the same questions"):
        audit.routing_curve(first[1:], second, confidence, *costs)


def test_operations_count_every_parameter_of_a_layer_once_per_pass(make_lm, stack):
    lm = stack.lm
    layers = sum(p.numel() for p in lm.layers.parameters())
    c = lm.config
    table = 2 * c.vocab_size * c.dim
    assert audit.operations(lm, 5, 1) == 2 * layers * 5 + table
    connector = sum(p.numel() for p in stack.parts[1].layers.parameters())
    assert audit.operations(stack, 5, 3) == 2 * (2 * layers + connector) * 7 + 3 * table


@pytest.mark.parametrize("shots", [False, True])
def test_a_question_takes_all_passes_if_the_first_is_not_sure(stack, shots):
    """Its confidence is the log-probability of the whole answer, end included."""
    tokenizer, lm, prefix = words_tokenizer(53), stack.lm, None
    text = [4, 8, 15] if shots else []
    if shots:
        prefix = stack.read(stack.embed(torch.tensor([text])))
    rest = (6, None, ["w7", "", "", ""])  # new tokens, options, stops
    alone = predict(lm, tokenizer, QUESTIONS, stack.prefix_of(0, prefix), *rest)
    whole = predict(stack, tokenizer, QUESTIONS, prefix, *rest)
    pairs = recurse.predict_first_pass(stack, tokenizer, QUESTIONS, prefix, *rest)
    assert [a for a, _ in pairs] == alone != whole
    logprobs = [logprob for _, logprob in pairs]
    answer = tokenizer.encode(pairs[3][0]).ids
    answer += [] if len(answer) == 6 else [2]
    exact = [naive_score(lm, text + QUESTIONS[3], answer[:-1] + [e]) for e in (answer[-1], 3)]
    assert any(math.isclose(logprobs[3], value, abs_tol=1e-3) for value in exact)
    for threshold in (-math.inf, sorted(logprobs)[2], math.inf):
        answers, unsure = route(threshold, stack, tokenizer, QUESTIONS, prefix, *rest)
        assert unsure == [logprob < threshold for logprob in logprobs]
        assert answers == [b if more else a for a, b, more in zip(alone, whole, unsure)]
    assert route(None, stack, tokenizer, QUESTIONS, prefix, *rest)[0] == whole


def test_only_a_neural_recursion_has_a_first_pass(make_lm):
    for model in (
        make_lm(),
        build("lm_connector", make_lm())[0],
        build("connector_lm", make_lm())[0],
    ):
        with pytest.raises(ValueError, match="neural_recursion"):
            route(0.0, model, words_tokenizer(67), QUESTIONS)
        with pytest.raises(ValueError, match="neural_recursion"):
            recurse.check_stack(model)
        assert len(route(None, model, words_tokenizer(67), QUESTIONS)[0]) == 4


def test_ask_and_score_take_the_threshold(place):
    file, flags = (
        str(place / "dev.jsonl"),
        ["--run", str(place / "neural"), "--max-new-tokens", "4"],
    )
    low, high = (metrics.main(["score", file, *flags, "--threshold", t]) for t in ("-999", "999"))
    bare = ["--model", str(place / "lm" / "model"), "--max-new-tokens", "4"]
    assert low == metrics.main(["score", file, *bare])
    assert high == metrics.main(["score", file, *flags])
    stack, prefix, tokenizer, _ = load_run(place / "neural")
    ids, options, prefix = prepare(stack, tokenizer, data.read(file), prefix, 4)
    stops = ["\n"] * 5
    pairs = recurse.predict_first_pass(stack, tokenizer, ids, prefix, 4, options, stops)
    middle = sorted(logprob for _, logprob in pairs)[2]
    names = [e.input[3:-4] for e in data.read(file)]
    answers = metrics.main(["ask", *flags, f"--threshold={middle}", *names])
    assert answers == route(middle, stack, tokenizer, ids, prefix, 4, options, stops)[0]
    with pytest.raises(SystemExit):
        metrics.main(["score", file, "--run", str(place / "prompt"), "--threshold", "0"])


def test_a_text_goes_on_with_a_run_and_with_its_first_pass(place):
    """As `ask` answers, filler and prompt included; --threshold chooses the pass."""
    text, new = data.read(place / "dev.jsonl")[0].input, ["--max-new-tokens", "4"]
    for name in ("neural", "filler", "prompt"):
        folder = str(place / name)
        model, prefix, tokenizer, _ = load_run(folder)
        ids = [tokenizer.encode(text + model.filler).ids]
        eos = model.config.eos
        (whole,) = generate(model, ids, prefix, 4, eos=eos)[0]
        assert generate_main([folder, text, *new])["ids"] == whole.ids
        if name == "prompt":
            continue
        (first,) = generate(model.lm, ids, None, 4, eos=eos)[0]
        assert first.ids != whole.ids
        for more, ids_of in ((-0.01, first.ids), (0.01, whole.ids)):
            limit = f"--threshold={first.logprob + more}"
            assert generate_main([folder, text, *new, limit])["ids"] == ids_of


def test_passes_of_a_run(place, tmp_path, capsys):
    """The ends of the curve are the LM alone and the run; a threshold on it is what route gives."""
    out, beside = tmp_path / "passes", str(place / "prompt")
    flags = ["--out", str(out), "--runs", beside, "--threshold"]
    result = audit.main(["passes", str(place / "neural"), *flags, "-1.5"])
    assert json.loads((out / "passes.json").read_text()) == result
    assert (out / "passes.png").stat().st_size > 10_000
    score = ["score", str(place / "dev.jsonl"), "--max-new-tokens", "4"]
    alone = metrics.main([*score, "--model", str(place / "lm" / "model")])
    whole = metrics.main([*score, "--run", str(place / "neural")])
    assert math.isclose(result["curve"][0]["em"], alone["em"])
    assert math.isclose(result["curve"][-1]["em"], whole["em"])
    routed = metrics.main([*score, "--run", str(place / "neural"), "--threshold", "-1.5"])
    assert result["at"] == routed
    assert result["beside"][0]["run"] == beside
    with pytest.raises(FileExistsError):
        audit.main(["passes", str(place / "neural"), *flags, "0"])
    with pytest.raises(ValueError, match="neural_recursion"):
        audit.main(["passes", beside, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_passes_of_a_run_with_filler(place, tmp_path):
    """The first pass answers behind the filler, too, and its operations count the filler."""
    folder = str(place / "filler")
    flags = ["--out", str(tmp_path / "passes"), "--threshold", "-1.5"]
    result = audit.main(["passes", folder, *flags])
    score = ["score", str(place / "dev.jsonl"), "--max-new-tokens", "4", "--run", folder]
    routed = [metrics.main([*score, "--threshold", t]) for t in ("-999", "-1.5", "999")]
    assert result["at"] == routed[1]
    for row, scores in zip((result["curve"][0], result["curve"][-1]), routed[::2]):
        assert math.isclose(row["em"], scores["em"])
    model, prefix, tokenizer, _ = load_run(folder)
    ids, options, prefix = prepare(model, tokenizer, data.read(place / "dev.jsonl"), prefix, 4)
    rest = (prefix, 4, options, ["\n"] * 5)
    answers = [a for a, _ in recurse.predict_first_pass(model, tokenizer, ids, *rest)]
    lengths = [len(data.encode_prompts(tokenizer, [f" {text}"])[0]) for text in answers]
    costs = [audit.operations(model.lm, len(row), A) for row, A in zip(ids, lengths)]
    assert math.isclose(result["curve"][0]["operations"], np.mean(costs))
    out = ["--out", str(tmp_path / "scores")]
    assert metrics.main([*score, *out]) == routed[2]  # and the LM's fingerprint is stored


# What is handed over


KINDS = ["neural_recursion", "three_passes"]
KINDS += [f"residual {kind}" for kind in KINDS]


@pytest.fixture(params=KINDS)
def any_stack(request, make_lm):
    return build(request.param, make_lm("untied"))[0].requires_grad_(False)


def test_the_hand_over_is_the_connectors_output(any_stack):
    lm, connector = any_stack.lm, any_stack.parts[1]
    x = lm.embed(torch.tensor([QUESTIONS[0]]))
    h, given = handover.hand_over(any_stack, QUESTIONS[0])
    close(h, lm(x)[0])
    close(given, connector(lm(x))[0])
    table = lm.embed_tokens.weight
    assert handover.nearest(lm, table[[7, 30, 2]] * 5) == [7, 30, 2]


def test_a_replaced_hand_over_changes_its_positions_and_no_other(any_stack):
    """Against one pass over the whole text for each token. The own vectors change nothing."""
    tokenizer, lm = words_tokenizer(53), any_stack.lm
    model, asked = any_stack, [row + [9, 4] for row in QUESTIONS]
    own = [handover.hand_over(model, ids)[1] for ids in asked]
    others = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(3))
    places = [(-1,), (-2,), (-3, -1)]

    def naive(ids, at, vectors):
        text, connector = list(ids), any_stack.parts[1]
        for _ in range(5):
            x = model.embed(torch.tensor([text]))
            c = connector(lm(x))
            for i, position in enumerate(at):
                c[0, len(ids) + position] = vectors[i]
            x = (x + c) if connector.residual else c
            for part in any_stack.parts[2:-1]:
                x = model.embed(torch.tensor([text])) * getattr(part, "residual", 0) + part(x)
            text.append(lm.logits(lm(x))[0, -1].argmax().item())
            if text[-1] in lm.config.eos:
                return tokenizer.decode(text[len(ids) : -1])
        return tokenizer.decode(text[len(ids) :])

    def answers(at, vectors, stops=("", "", "", "")):
        return handover.answers_with(model, tokenizer, asked, at, vectors, 5, stops)

    for at in places:
        mine = torch.stack([rows[list(at)] for rows in own])
        assert answers(at, mine) == predict(model, tokenizer, asked, max_new_tokens=5)
        vectors = others[:, : len(at)]
        found = answers(at, vectors)
        assert found == [naive(*case) for case in zip(asked, [at] * 4, vectors)]
        stops = [text.split()[-1] if text else "" for text in found]
        cut = [text.split(stop)[0].strip() if stop else "" for text, stop in zip(found, stops)]
        assert answers(at, vectors, stops) == cut


def test_interventions_replace_every_position_or_the_one_that_holds_the_bridge(stack, monkeypatch):
    """The mean is that of each position. Without a pause there is one position."""
    read = []
    for number, name in enumerate(("Anna", "Boris", "Clara")):
        vectors = torch.full((3, 2), float(number)) + torch.arange(3)[:, None]
        q = example(f"town {name}", path="a.b", bridge=name, token=5, vectors=vectors)
        read.append(q | {"first": [5 * (number == 0), 5, 1], "given": [1, 5, 5]})
    assert handover.holders(read) == [1, 3, 3]
    calls = []

    def note(model, tokenizer, ids, at, vectors, new, stops):
        calls.append((list(at), vectors[:, :, 0].tolist()))
        return ["x"] * 3

    monkeypatch.setattr(handover, "answers_with", note)
    monkeypatch.setattr(handover, "donors", lambda *_: [1, 2, None])
    rows = handover.intervene(stack, None, read, [[1]] * 3, 4, [""] * 3, 0)
    every = [-3, -2, -1]
    assert calls == [
        (every, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]),
        (every, [[1, 2, 3], [2, 3, 4], [2, 3, 4]]),
        (every, [[1, 2, 3]] * 3),
        ([-2], [[2], [3], [3]]),
        ([-2], [[2]] * 3),
    ]
    assert [row["other"] for row in rows] == [row["other_one"] for row in rows] == ["x", "x", None]
    assert all(row["own"] == row["mean"] == row["mean_one"] == "x" for row in rows)
    calls.clear()
    bare = [q | {"first": [5], "given": [1], "vectors": q["vectors"][:1]} for q in read]
    rows = handover.intervene(stack, None, bare, [[1]] * 3, 4, [""] * 3, 0)
    assert [at for at, _ in calls] == [[-1]] * 3 and "mean_one" not in rows[0]


def example(answer, **more):
    return {"example": data.Example(data.question_text("x"), answer, (answer,))} | more


def test_a_donor_has_the_same_path_and_another_bridge_and_answer():
    questions = [
        example("Velmor", path="a.b", bridge="Anna"),
        example("Velmor", path="a.b", bridge="Boris"),  # another bridge with the same answer
        example("Delmau", path="a.b", bridge="Anna"),  # the same bridge
        example("Delmau", path="a.c", bridge="Boris"),  # another path
        example("Kran", path="a.b", bridge="Clara"),
    ]
    for seed in range(20):
        chosen = handover.donors(questions, seed)
        assert chosen[0] == 4 and chosen[1] in (2, 4) and chosen[3] is None
        assert chosen[2] in (1, 4) and chosen[4] in (0, 1, 2)
        assert handover.donors(questions, seed) == chosen
    assert len({handover.donors(questions, seed)[4] for seed in range(20)}) == 3


def test_rates_of_an_audit():
    read = [
        example("Velmor", bridge="Anna", first=[1], given=[1], token=1),
        example("Delmau", bridge="Boris", first=[1], given=[2], token=2),
        example("Kran", bridge="Clara", first=[5], given=[4], token=3),
    ]
    answers = [
        {"own": "Velmor", "other": "Delmau", "mean": "Velmor", "donor": 1},  # it follows
        {"own": "Delmau", "other": "Delmau", "mean": "x", "donor": 2},  # it stays
        {"own": "wrong", "other": None, "mean": "x", "donor": None},
    ]
    rates = audit.bridge_rates(read, ["Anna", "x", "the clara"], answers)
    values = [(round(row["rate"] * row["n"]), row["n"]) for row in rates]
    assert values == [(2, 3), (1, 3), (2, 3), (2, 3), (1, 2), (1, 2), (1, 1), (0, 1), (1, 2)]
    # With a pause of one position, which holds two bridges, as position 0 does.
    for q, first in zip(read, ([1, 0], [0, 2], [0, 3])):
        q |= {"first": first, "given": [0, 0]}
    for a in answers:
        a |= {"other_one": a["donor"] and "Kran", "mean_one": a["own"]}
    rates = audit.bridge_rates(read, ["Anna", "x", "the clara"], answers)
    rows = {row["what"]: row["rate"] for row in rates}
    assert rows["first pass reads the bridge's first token, position 0"] == 1 / 3
    assert rows["first pass reads the bridge's first token, position 1"] == 2 / 3
    assert rows["Connector's output is nearest to it, position 1"] == 0
    assert rows["one of these at any position"] == 1
    assert rows["other hand-over, all positions: the other's answer"] == 1 / 2
    assert rows["other hand-over, position 1: the other's answer"] == 1 / 2
    assert rows["other hand-over, position 1: still the own answer"] == 0
    assert rows["right, mean hand-over, position 1: still the own answer"] == 1
    assert rows["right, mean hand-over, all positions: still the own answer"] == 1 / 2


@pytest.mark.parametrize("name", PAUSES)
def test_the_bridge_of_a_question_is_the_answer_to_its_first_hop(place, tmp_path, capsys, name):
    """Of the embedded world's questions, found by id and text. The audit of a run says the same."""
    made, rows = world.make(1), []
    for row in made.questions("test")[:28]:
        text = data.question_text(row["question"])
        record = {"id": row["id"], "task": row["task"], "input": text, "prediction": "x"}
        rows.append(record | {"answers": row["answer"], "em": 0.0, "f1": 0.0})
    for file in ("run.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((place / name / file).read_bytes())
    write_lines(tmp_path / "predictions.jsonl", rows)
    found = handover.two_hop(audit.asked_questions(tmp_path)[0], made)
    facts = {row["id"]: row for row in made.questions("test")}
    assert len(found) == sum(facts[row["id"]]["hops"] == 2 for row in rows) > 5
    for q in found:
        fact = facts[q["example"].id]
        first, second = fact["relation"].split(".")
        assert q["bridge"] == made.facts[fact["subject"]][first] and q["path"] == fact["relation"]
        assert q["example"].answers == (made.facts[q["bridge"]][second],)
    out = tmp_path / "audit"
    result = audit.main(["bridge", str(tmp_path), "--out", str(out), "--limit", "6"])
    assert len(result["questions"]) == 6 and (out / "bridge.png").stat().st_size > 10_000
    assert json.loads((out / "bridge.json").read_text()) == result
    stack, prefix, tokenizer, _ = load_run(tmp_path)
    asked = [q["example"] for q in found[:6]]
    ids, _, _ = prepare(stack, tokenizer, asked, prefix, 4)
    own = predict(stack, tokenizer, ids, None, 4, stops=["\n"] * 6)
    assert [line["own"] for line in result["questions"]] == own
    shown, held = capsys.readouterr().out, result["held"]
    assert "Connector's output" in shown
    bare = data.encode_prompts(tokenizer, [e.input for e in asked])
    count = 1 + len(ids[0]) - len(bare[0])  # positions
    assert len(held) == count and (count > 2) == (name != "neural")
    assert ("holds the bridge most often" in shown) == (name != "neural")
    for line, row in zip(result["questions"], ids):
        h, _ = handover.hand_over(stack, row)
        first = stack.logits(h[-count:]).argmax(-1).tolist()
        assert line["first"] == [tokenizer.decode([token]) for token in first]
        assert f" {line['bridge']}".startswith(line["token"])
    rows[0]["input"] = "Q: who?\nA:"
    write_lines(tmp_path / "predictions.jsonl", rows)
    with pytest.raises(ValueError, match="predictions.jsonl:1: is no question of the world 1"):
        audit.main(["bridge", str(tmp_path), "--out", str(tmp_path / "new")])
