"""Textual recursion: candidates, how they are merged and read back, and its stages."""

import math

import pytest
import torch
from conftest import QUESTIONS, before, naive_score, words_tokenizer
from tiny_runs import HOMES, Dead, command, contents, read_lines, run, write_lines

import adapters
import data
import eval as metrics
import textual
import train
from generate import Sample, predict, sample_answers
from questions import prepare
from recurse import Candidate, candidates, merge_samples, text_with
from runs import load_run, read_predictions, read_record
from textual import sample_candidates, with_candidates

FLAGS = "--candidates 3"


@pytest.fixture(scope="module")
def whole(place):
    run(command(place, "textual_recursion", place / "whole", FLAGS))
    return place / "whole"


# Candidates


def test_candidates_are_ordered_by_the_models_own_probability(make_lm):
    """Of the whole answer with its end, after the prompt. Every sample is counted once."""
    lm = make_lm()
    prefix, prompts = before("shared", lm)
    for ids, prompt, row in zip(QUESTIONS, prompts, candidates(lm, QUESTIONS, 40, prefix, seed=3)):
        assert sum(c.count for c in row) <= 40 and len({c.text for c in row}) == len(row) > 1
        assert [c.logprob for c in row] == sorted((c.logprob for c in row), reverse=True)
        for c in row[:3]:
            answer = list(map(int, c.text.split()))
            answer += [] if len(answer) == 16 else [2]
            expected = naive_score(lm, ids, answer, prompt)
            assert math.isclose(c.logprob, expected, abs_tol=1e-3)


def test_candidates_of_a_question_depend_on_it_and_the_seed_alone(make_lm):
    lm = make_lm()
    ranked = candidates(lm, QUESTIONS, 5, seed=1)
    assert candidates(lm, QUESTIONS, 5, seed=1) == ranked
    assert candidates(lm, QUESTIONS, 5, seed=2) != ranked
    blank = make_lm()  # every token is as likely after any text
    for p in blank.parameters():
        p.zero_()
    a, b = candidates(blank, [[5], [6]], 5)
    assert {c.text for c in a} != {c.text for c in b}  # questions do not share random numbers
    many = candidates(lm, QUESTIONS, 40, seed=1)
    shares = [c.first < 5 for row in many for c in row]
    assert any(shares) and not all(shares)


def alike(some, others):
    """The same candidates, whose log-probabilities differ by rounding at most."""
    for a, b in zip(some, others, strict=True):
        assert [(c.text, c.count, c.first) for c in a] == [(c.text, c.count, c.first) for c in b]
        assert [c.logprob for c in a] == pytest.approx([c.logprob for c in b], abs=1e-3)


@pytest.mark.parametrize("kind", ["none", "shared"])
def test_candidates_do_not_depend_on_the_batch(make_lm, kind):
    """Each question alone, two at a time, all in the other order, or all at once."""
    lm, tokenizer = make_lm("untied"), words_tokenizer(53)
    prefix, asked = before(kind, lm)[0], [*QUESTIONS, [8, 4], [9, 9]]
    stops = ["", "w5", "w7", "", "w9", "w5"]

    def found(rows, **budget):
        ids, ends = [asked[b] for b in rows], [stops[b] for b in rows]
        return candidates(lm, ids, 40, prefix, tokenizer, 2, ends, seed=3, **budget)

    whole = found(range(6))
    assert any(c.count > 1 for row in whole for c in row)
    alike(whole, [found([b])[0] for b in range(6)])
    alike(whole, found([5, 4, 3, 2, 1, 0])[::-1])
    for budget in (1, 2 * 40 * (before("shared", lm)[0].size + 10), 10**6):
        alike(whole, found(range(6), max_tokens=budget))


class Counting(torch.nn.Module):
    """An LM that notes the shape of everything it reads."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config, self.read, self.logits = lm, lm.config, lm.read, lm.logits
        self.shapes = []

    def embed(self, ids):
        self.shapes.append(tuple(ids.shape))
        return self.lm.embed(ids)

    def forward(self, *rest, **more):
        return self.lm(*rest, **more)


def test_samples_that_agree_so_far_are_read_once(make_lm):
    """A row for each different text. Sample i is the same however many there are."""
    lm = Counting(make_lm())
    found = sample_answers(lm, QUESTIONS, 60, [3, 4, 5, 6], None, 4)
    texts = [[s.ids for s in row] for row in found]
    assert lm.shapes[:2] == [(4, 7), (4, 1)]
    for step, shape in enumerate(lm.shapes[2:], 1):
        different = sum(len({tuple(ids[:step]) for ids in row}) for row in texts)
        assert shape == (different, 1) and different < 240
    assert len(lm.shapes) == 5 and all(len(ids) == 4 for row in texts for ids in row)
    with pytest.raises(ValueError, match="3 seeds for 4 questions"):
        sample_answers(lm, QUESTIONS, 60, [3, 4, 5], None, 4)
    few = sample_answers(lm, QUESTIONS[1:], 5, [4, 5, 6], None, 4)
    assert [[s.ids for s in row] for row in few] == [row[:5] for row in texts[1:]]


def test_a_batch_of_samples_stays_within_its_tokens(make_lm):
    lm = Counting(make_lm())
    candidates(lm, QUESTIONS * 5, 8, None, max_new_tokens=4, max_tokens=300)
    batches = [shape for shape in lm.shapes if shape[1] > 1]  # of all tokens but the last
    assert max(rows for rows, _ in batches) > 1
    assert all(rows * 8 * (width + 1 + 4) <= 300 for rows, width in batches)


@pytest.mark.parametrize("eos", [(), (2, 3)])
def test_a_sample_is_the_token_at_its_number_of_the_distribution(make_lm, eos):
    """Against the plainest way: one sample and one whole text at a time, with the same numbers."""
    lm, n, new = make_lm("untied"), 7, 5
    found = sample_answers(lm, QUESTIONS, n, [1, 2, 3, 4], None, new, eos)
    for ids, seed, row in zip(QUESTIONS, (1, 2, 3, 4), found):
        draws = torch.rand(n, new, generator=torch.Generator().manual_seed(seed)).double()
        for sample, numbers in zip(row, draws, strict=True):
            text = []
            for u in numbers:
                h = lm(lm.embed(torch.tensor([ids + text])))[0, -1]
                text.append(int((lm.logits(h).double().softmax(-1).cumsum(-1) <= u).sum()))
                if text[-1] in eos:
                    break
            assert sample.ids == text
            assert sample.logprob == pytest.approx(naive_score(lm, ids, text), abs=1e-3)


def test_samples_are_drawn_at_temperature_1(make_lm):
    """The shares of the first tokens are the model's probabilities."""
    lm, ids = make_lm(), [5, 9]
    (row,) = candidates(lm, [ids], 4000, max_new_tokens=1)
    probabilities = lm.logits(lm(lm.embed(torch.tensor([ids]))))[0, -1].softmax(-1)
    for c in row:
        if c.count > 100:
            token = int(c.text)
            p = probabilities[token].item()
            assert abs(c.count / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
            assert math.isclose(c.logprob, math.log(p), abs_tol=1e-4)


def test_equal_texts_are_one_candidate_as_likely_as_its_likeliest_tokens():
    """The text ends at the stop or the eos, without white space around it. Empty ones go."""
    tokenizer = words_tokenizer(20)
    samples = [
        Sample([4, 5, 2], -3.0),
        Sample([6, 2], -2.5),
        Sample([4, 5, 9, 7], -2.0),  # w9 is the stop
        Sample([9, 4], -0.1),  # empty
        Sample([6], -4.0),
        Sample([7, 2], -2.0),
    ]
    ranked = merge_samples(samples, 2, tokenizer, "w9")
    assert ranked == [
        Candidate("w4 w5", -2.0, 2, 0),
        Candidate("w7", -2.0, 1, 5),
        Candidate("w6", -2.5, 2, 1),
    ]
    letters = data.train_tokenizer([], 257)
    spaced = [Sample(letters.encode(text).ids[1:], -1.0) for text in ("  a b", " a", "b ")]
    assert [(c.text, c.count) for c in merge_samples(spaced, 0, letters, " ")] == [
        ("a", 2),
        ("b", 1),
    ]


def test_candidates_stand_in_a_line_before_the_text():
    question = data.question_text("where was Anna born")
    two = [Candidate("New Velmor", -1.0, 1, 0), Candidate("Delmau", -2.0, 1, 1)]
    text = "Candidates: New Velmor; Delmau\nQ: where was Anna born?\nA:"
    assert text_with(question, two) == text_with(question, ["New Velmor", "Delmau"]) == text
    assert text_with("Is it so?", ["no"]) == "Candidates: no\nIs it so?"
    assert text_with(question, []) == question


def test_candidates_that_do_not_fit_are_left_out_from_the_end(tokenizer):
    """The longest text that fits is taken, beside the answer that may follow."""
    e = data.Example("w4 w5\nw6", "w7", ("w7",))
    texts = [f"w{i}" for i in range(10, 20)]

    def length(k):
        return len(data.encode_prompts(tokenizer, [text_with(e.input, texts[:k])])[0])

    for k in (0, 1, 4, 10):
        for spare in (0, 1):
            left = length(k) + 7 + spare  # 8 new tokens, the last is never read
            (longer,), out = with_candidates(tokenizer, [e], [texts], left, 8)
            assert (longer.input, out) == (text_with(e.input, texts[:k]), 10 - k)
    many = data.Example("w4\nw6", "w7", ("w7",), options=("w7", " ".join(["w8"] * 30)))
    (longer,), out = with_candidates(tokenizer, [many], [texts], length(10) + 15, 8)
    assert 0 < out < 10
    (tokens,) = data.tokenize([longer], tokenizer, 2, length(10) + 15)
    assert len(tokens.options[1]) == 31


def test_scores_of_candidates():
    """By the samples that were drawn first, by the rank and by the count."""
    es = [data.Example(data.question_text(str(i)), "a1", ("a1",), "ab"[i % 2]) for i in range(4)]
    ranked = [
        [Candidate("A1", -1, 1, 8), Candidate("b", -2, 9, 0)],  # likeliest right, sampled late
        [Candidate("b", -1, 4, 0), Candidate("a1", -2, 6, 1)],  # most frequent right
        [Candidate("b", -1, 5, 0), Candidate("a1", -2, 5, 5)],  # a tie is the likeliest's
        [],
    ]
    scores = textual.score_candidates(es, ranked, 10)
    assert scores["recall"] == {"1": 0.0, "8": 0.5, "10": 0.75}
    assert (scores["n"], scores["best"], scores["majority"]) == (4, 0.25, 0.25)
    assert scores["distinct"] == 1.5
    assert scores["tasks"]["a"]["recall"]["10"] == 1.0 and scores["tasks"]["b"]["best"] == 0.0
    assert list(textual.score_candidates(es, ranked, 64)["recall"]) == ["1", "8", "16", "64"]


# Cross-fitting


def test_wordings_of_a_question_stay_in_one_half():
    examples = []
    for fact in range(60):
        for wording in range(3):
            examples.append(data.Example(f"{fact} in {wording}", f"a{fact}", (f"a{fact}",)))
    examples += [data.Example("0 in 1", "a0", ("a0",)), data.Example("new", "a", ("a",))]
    groups = textual.group_questions(examples)
    facts = [example.input.split()[0] for example in examples]
    assert len(set(groups)) == len(set(facts)) == len(set(zip(facts, groups))) == 61
    same = [data.Example(f"q{i}", "yes", ("yes",)) for i in range(100)]
    assert len(set(textual.group_questions(same))) == 13  # of 8 neighbours each
    with pytest.raises(ValueError, match="--no-cross-fit"):
        textual.group_questions(examples[:3])


def test_candidates_for_training_come_from_a_prompt_of_the_other_half(whole):
    """They are those that this prompt samples, and each question is in one file only."""
    model, _, tokenizer, _ = load_run(whole)
    sampled = {}
    for name, other in (("a", "b"), ("b", "a")):
        lines = read_lines(whole / "candidates" / f"1{name}-train" / "000000.jsonl")
        learnt = read_lines(whole / "candidates" / f"1{other}-train" / "000000.jsonl")
        sampled[name] = {line["id"] for line in lines}
        assert read_record(whole / f"p1-{name}")["arguments"]["method"] == "prompt_tuning"
        prompt = adapters.load_adapter(whole / f"p1-{name}", model.lm)
        examples = [data.Example(x["input"], "", tuple(x["answers"])) for x in lines]
        ids = data.encode_prompts(tokenizer, [e.input for e in examples])
        stage = model.lm, model.lm.read(prompt())
        found = sample_candidates(model.args, tokenizer, examples, ids, stage)
        texts = [[c["text"] for c in line["candidates"]] for line in lines]
        assert [[c.text for c in row] for row in found] == texts
        assert not {line["id"] for line in learnt} & sampled[name]
    assert sampled["a"] | sampled["b"] == {f"q{i}" for i in range(8)}
    halves = read_record(whole)["halves"]  # of q0, q1, ...
    for name, other in (("a", "B"), ("b", "A")):
        assert sampled[name] == {f"q{i}" for i, half in enumerate(halves) if half == other}


def test_a_prompt_of_other_halves_is_refused(place, tmp_path, monkeypatch):
    """An unfinished run of a program that cut the questions in another way."""
    line = command(place, "textual_recursion", tmp_path / "run", FLAGS)
    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(textual, "write_candidates", lambda *_: (_ for _ in ()).throw(Dead))
        run(line)
    monkeypatch.setattr(textual, "group_questions", lambda examples: [0, 0, 1, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="p1-a was trained on other questions"):
        run([*line, "--resume"])


def test_a_half_trains_on_its_questions_only(place, tmp_path, monkeypatch):
    seen = {}
    real = textual.half_of

    def note(task, rows):
        part = real(task, rows)
        seen[len(seen)] = ({e.id for e in part.examples["train"]}, part.examples["test"])
        assert len(part.tokens["train"]) == len(rows)
        return part

    monkeypatch.setattr(textual, "half_of", note)
    run(command(place, "textual_recursion", tmp_path / "run", FLAGS))
    for number, name in ((0, "a"), (1, "b")):
        lines = read_lines(tmp_path / "run" / "candidates" / f"1{name}-train" / "000000.jsonl")
        assert not seen[number][0] & {line["id"] for line in lines} and not seen[number][1]


# Whole runs


def test_a_run_records_its_candidates_and_is_asked_with_both_stages(place, whole, capsys):
    record, rows = read_record(whole), read_predictions(whole)
    assert metrics.summary(rows) == record["results"]["dev"]
    assert record["weights_before"] == record["weights_after"]
    (scores,) = record["candidates"]
    assert set(scores) == {"train", "dev"} and set(scores["dev"]["recall"]) == {"1", "3"}
    assert [row["input"] for row in rows] == [f"Q: where was {n} born?\nA:" for n, _ in HOMES[:5]]
    file = str(place / "dev.jsonl")
    flags = ["--run", str(whole), "--max-new-tokens", "4"]
    assert metrics.main(["score", file, *flags]) == record["results"]["dev"]
    answers = [row["prediction"] for row in rows]
    assert metrics.main(["ask", *flags, *(f"where was {n} born" for n, _ in HOMES[:5])]) == answers
    # The last prompt has read the candidates that stand in the files.
    model, prefix, tokenizer, _ = load_run(whole)
    lines = read_lines(whole / "candidates" / "1-dev" / "000000.jsonl")
    texts = [text_with(x["input"], [c["text"] for c in x["candidates"]]) for x in lines]
    ids, _, prefix = prepare(model, tokenizer, data.read(file), prefix, 4)
    assert ids == data.encode_prompts(tokenizer, texts)
    stops = ["\n"] * 5
    assert predict(model, tokenizer, ids, prefix, 4, stops=stops) == answers


def test_the_last_prompt_starts_from_the_first_unless_init_says(place, tmp_path):
    def prompts(flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run(command(place, "textual_recursion", out, f"{FLAGS} --steps 1 --lr 0 {flags}"))
        return [adapters.read_prompt(out / name) for name in ("p1", ".")]

    start, same = prompts("")
    assert torch.equal(start, same)
    given = adapters.SoftPrompt(torch.randn(4, 32))
    lm = load_run(place / "lm")[0]
    adapters.save_adapter(tmp_path / "given", given, lm)
    for vectors in prompts(f"--init {tmp_path}/given"):
        assert torch.equal(vectors, given.vectors)


def test_without_cross_fitting_and_with_two_rounds(place, tmp_path):
    """Each round samples after reading the candidates of the round before."""
    flags = f"{FLAGS} --no-cross-fit --rounds 2"
    record = run(command(place, "textual_recursion", tmp_path / "run", flags))
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert folders == {"p1", "p2", "candidates"} and len(record["candidates"]) == 2
    answers = [row["prediction"] for row in read_predictions(tmp_path / "run")]
    ask = ["ask", "--run", str(tmp_path / "run"), "--max-new-tokens", "4"]
    assert metrics.main([*ask, *(f"where was {n} born" for n, _ in HOMES[:5])]) == answers


def test_candidates_leave_what_the_context_of_a_run_leaves(place, tmp_path, monkeypatch):
    """--context bounds the questions with their candidates, in training and when asked later."""
    longest, tokenize = [], data.tokenize

    def counted(*args, **more):
        rows = tokenize(*args, **more)
        longest.append(max((len(row.input) for row in rows), default=0))
        return rows

    monkeypatch.setattr(data, "tokenize", counted)
    flags = f"{FLAGS} --no-cross-fit --candidates 8 --max-new-tokens 4 --prompt-length 2"
    record = run(command(place, "textual_recursion", tmp_path / "run", f"{flags} --context 30"))
    assert record["candidates"][0]["dev"]["left_out"] > 0 and max(longest) <= 28
    model, _, tokenizer, _ = load_run(tmp_path / "run")
    asked = model.read_back(data.read(place / "dev.jsonl"))
    lengths = list(map(len, data.encode_prompts(tokenizer, [e.input for e in asked])))
    assert 16 < max(lengths) <= 28


@pytest.mark.parametrize("dies", ["p1-a", "sampling", "second file", "last prompt"])
def test_a_killed_run_resumes_to_the_same_files(place, tmp_path, monkeypatch, whole, dies):
    """What is finished is not done again: neither a prompt nor a file of candidates."""
    out = tmp_path / "killed"
    line = command(place, "textual_recursion", out, FLAGS)
    fitted, written = [], []
    fit, write = textual_fit(monkeypatch, fitted), textual.write_candidates
    limit = {"sampling": 1, "second file": 2}.get(dies)

    def dying(path, *rest):
        if len(written) == limit:
            raise Dead
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(textual, "write_candidates", dying)
    fit["die"] = {"p1-a": 1, "last prompt": 4}.get(dies)
    with pytest.raises(Dead):
        run(line)
    done = {*written, *(fitted if limit else fitted[:-1])}
    fitted.clear()
    written.clear()
    fit["die"] = limit = None
    run([*line, "--resume"])
    assert done.isdisjoint([*fitted, *written])
    assert contents(whole) == contents(out)


def textual_fit(monkeypatch, fitted):
    """Notes the folder of each training; the one of number "die" stops after its fifth step."""
    from runs import Run

    state, real, log = {"die": None}, train.fit, Run.log

    def fit(run_, *rest, **more):
        fitted.append(run_.folder)
        return real(run_, *rest, **more)

    def dies(run_, record):
        if len(fitted) == state["die"] and record["step"] == 5:
            raise Dead
        log(run_, record)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(Run, "log", dies)
    return state


# Stages of another run


@pytest.mark.parametrize("flags", ["", "--no-cross-fit"])
def test_prompts_of_another_run_are_copied_and_not_trained_again(
    place, tmp_path, monkeypatch, whole, flags
):
    """The run ends with the same bits as one that trains them itself."""
    fitted, out = [], tmp_path / "run"
    textual_fit(monkeypatch, fitted)
    line = command(place, "textual_recursion", out, f"{FLAGS} {flags} --stages-from {whole}")
    run(line)
    assert fitted == [out]
    assert contents(out / "p1") == contents(whole / "p1")
    if not flags:
        assert contents(out) == contents(whole)
    run([*line[:-2], "--resume"])  # it knows them, and needs the other run no more


def test_a_stage_that_differs_is_refused_before_anything_is_written(place, tmp_path, whole):
    """Other flags of the last prompt are no difference."""
    differences = {"--steps 4": "--steps 6, not 4", "--pause 1": "--pause 0, not 1"}
    differences["--init labels"] = "--init"  # test_refusals has others
    for flag, words in differences.items():
        flags = f"{FLAGS} --stages-from {whole} {flag}"
        with pytest.raises(ValueError, match=f"p1 was .*{words}"):
            run(command(place, "textual_recursion", tmp_path / "run", flags))
    assert not list(tmp_path.iterdir())


# A pause


def test_a_pause_follows_the_question_in_every_stage(place, tmp_path, monkeypatch):
    """Behind the candidates' question too, and nowhere else."""
    read, sampled = [], textual.candidates
    monkeypatch.setattr(
        textual, "candidates", lambda lm, ids, *rest: (read.extend(ids), sampled(lm, ids, *rest))[1]
    )
    line = command(place, "textual_recursion", tmp_path / "run", f"{FLAGS} --rounds 2 --pause 2")
    record = run([*line, "--pause-text", r"\nso:"])
    model, prefix, tokenizer, _ = load_run(tmp_path / "run")
    texts = [tokenizer.decode(row) for row in read]
    assert len(texts) == 2 * (8 + 5) and all(text.count("\nso:") == 2 for text in texts)
    assert all(text.endswith("born?\nA:\nso:\nso:") for text in texts)
    assert sum(text.startswith("Candidates: ") for text in texts) >= 8 + 5 - 3
    file, trained = str(place / "dev.jsonl"), [tuple(row) for row in read]
    read.clear()
    ids, _, prefix = prepare(model, tokenizer, data.read(file), prefix, 4)
    asked = [tuple(row) for row in read]  # of both rounds: what was sampled for dev
    assert len(asked) == 10 and set(asked[:5]) <= set(trained[:13])
    assert set(asked[5:]) <= set(trained[13:])
    lines = read_lines(tmp_path / "run" / "candidates" / "2-dev" / "000000.jsonl")
    asked = [text_with(x["input"], [c["text"] for c in x["candidates"]]) for x in lines]
    assert [tokenizer.decode(row) for row in ids] == [f"{text}\nso:\nso:" for text in asked]
    score = ["score", file, "--run", str(tmp_path / "run"), "--max-new-tokens", "4"]
    assert metrics.main([*score, "--out", str(tmp_path / "out")]) == record["results"]["dev"]


def test_candidates_leave_positions_for_a_pause(tokenizer):
    e, texts = data.Example("w4 w5\nw6", "w7", ("w7",)), [f"w{i}" for i in range(10, 20)]
    (row,) = data.encode_prompts(tokenizer, [text_with(e.input, texts)])
    left = len(row) + 7  # 8 new tokens, the last is never read
    assert with_candidates(tokenizer, [e], [texts], left, 8)[1] == 0
    (longer,), out = with_candidates(tokenizer, [e], [texts], left, 8, " w1 w2")
    assert out > 0 and longer.input == text_with(e.input, texts[:-out])


def test_options_and_a_single_question(place, tmp_path):
    towns = sorted({town for _, town in HOMES})
    rows = [{"input": f"{n} is from", "target": t, "options": towns} for n, t in HOMES]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    flags = f"{FLAGS} --train {file} --dev {file}"
    record = run(command(place, "textual_recursion", tmp_path / "run", flags))
    predictions = [row["prediction"] for row in read_predictions(tmp_path / "run")]
    assert set(predictions) <= set(towns)
    score = ["score", str(file), "--run", str(tmp_path / "run"), "--max-new-tokens", "4"]
    assert metrics.main(score) == record["results"]["dev"]
    one = write_lines(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(ValueError, match="--no-cross-fit"):
        run(command(place, "textual_recursion", tmp_path / "one", f"--train {one}"))
    assert not (tmp_path / "one").exists()
