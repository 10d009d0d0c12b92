"""Continued pretraining: its gradients against formulas, its runs, and few-shot prompts."""

import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import seeded
from safetensors.torch import load_file
from tiny_runs import (
    COLOURS,
    contents,
    die_at_5,
    make_suite,
    read_lines,
    run,
    same_runs,
    suite_rows,
    write_lines,
)

import adapters
import data
import eval as metrics
import fit
import promptability as pt
import questions
import transfer
from fit import Recipe
from model import LM
from promptability import VARIANTS, Learner, add_gradient, fomaml, mtl, reptile
from runs import load_run
from verify import verify

RECIPE = Recipe(steps=1, lr=1.0)
A = 0.3  # inner learning rate


class Toy(nn.Module):
    """An LM of one table (V, C) and a prompt (C,) that is added to every embedding."""

    def __init__(self, seed=1):
        super().__init__()
        rng = seeded(seed)
        self.lm, self.prompt = nn.Module(), nn.Module()
        self.lm.table = nn.Parameter(torch.randn(12, 5, generator=rng, dtype=torch.float64))
        self.prompt.vector = nn.Parameter(torch.randn(5, generator=rng, dtype=torch.float64))

    def loss(self, batch, theta=None):
        """Summed over targets, at `theta` (table, vector)."""
        table, vector = theta or (self.lm.table, self.prompt.vector)
        mask = batch.targets != data.IGNORE_INDEX
        logits = (table[batch.ids[mask]] + vector).tanh() @ table.T
        return F.cross_entropy(logits, batch.targets[mask], reduction="sum")

    def learner(self, variant, **options):
        options = {"inner_optimizer": "sgd", "inner_lr": A} | options
        return Learner(self.lm, self.prompt, variant, **options)

    def slope(self, batch, theta):
        """The gradient of the mean loss at theta: [by the table, by the vector]."""
        theta = [t.detach().requires_grad_() for t in theta]
        count = (batch.targets != data.IGNORE_INDEX).sum()
        return torch.autograd.grad(self.loss(batch, theta) / count, theta)


def batch_of(size, seed=0):
    """Rows with different numbers of targets, so that means over rows and targets differ."""
    rng = np.random.default_rng(seed)
    examples = [
        data.TokenizedExample(rng.integers(12, size=2).tolist(), rng.integers(12, size=n).tolist())
        for n in rng.integers(1, 4, size)
    ]
    return data.collate(examples, list(range(size)))


def gradients(toy, variant, batches, **options):
    learner = toy.learner(variant, **options)
    loss = add_gradient(learner, RECIPE, toy.loss, batches)
    return [toy.lm.table.grad, toy.prompt.vector.grad], loss


def thetas(toy):
    return [toy.lm.table.detach().clone(), toy.prompt.vector.detach().clone()]


# The gradients


def test_multi_task_learning_is_the_mean_gradient_over_tasks():
    toy, batches = Toy(), [batch_of(3, 1), batch_of(5, 2)]
    found, loss = gradients(toy, mtl, batches)
    slopes = [toy.slope(batch, thetas(toy)) for batch in batches]
    for g, parts in zip(found, zip(*slopes)):
        torch.testing.assert_close(g, sum(parts) / 2)
    counts = [(batch.targets != data.IGNORE_INDEX).sum() for batch in batches]
    assert loss == pytest.approx(sum(toy.loss(b) / n for b, n in zip(batches, counts)).item() / 2)


def adapted(toy, parts):
    """(theta after one prompt step per part, the sum of the gradients by the prompt)."""
    table, vector = thetas(toy)
    way = torch.zeros_like(vector)
    for part in parts:
        _, g = toy.slope(part, [table, vector])
        vector, way = vector - A * g, way + g
    return [table, vector], way


def thirds(batch):
    return [batch.part(range(i, i + 3)) for i in (0, 3, 6)]


def test_fomaml_is_the_gradient_after_the_prompt_has_adapted():
    toy, batches = Toy(), [batch_of(9, 1), batch_of(9, 2)]
    found, _ = gradients(toy, fomaml, batches, inner_steps=2)
    slopes = []
    for batch in batches:
        first, second, query = thirds(batch)
        phi, _ = adapted(toy, [first, second])
        slopes.append(toy.slope(query, phi))
    for g, parts in zip(found, zip(*slopes)):
        torch.testing.assert_close(g, sum(parts) / 2)


def test_reptile_is_the_way_from_the_start_to_the_end():
    toy, batch = Toy(), batch_of(9, 1)
    found, _ = gradients(toy, reptile, [batch], inner_steps=2)
    first, second, query = thirds(batch)
    phi, way = adapted(toy, [first, second])
    table, vector = toy.slope(query, phi)
    torch.testing.assert_close(found[0], A * table)
    torch.testing.assert_close(found[1], A * (way + vector))


def test_the_same_support_is_the_first_half_of_the_batch():
    """Without inner steps there is no support, and the query is the whole batch."""
    toy, batch = Toy(), batch_of(8, 1)
    found, _ = gradients(toy, fomaml, [batch], inner_steps=3, support="same")
    support, query = batch.part(range(4)), batch.part(range(4, 8))
    phi, _ = adapted(toy, [support] * 3)
    whole, _ = gradients(Toy(), fomaml, [batch], inner_steps=0, support="same")
    expected = [*toy.slope(query, phi), *toy.slope(batch, thetas(toy))]
    for g, part in zip([*found, *whole], expected):
        torch.testing.assert_close(g, part)


def test_reptile_with_one_inner_step_is_scaled_sgd():
    batch, ways = batch_of(6, 1), {}
    for variant in (mtl, reptile):
        toy = Toy()
        gradients(toy, variant, [batch], inner_steps=0)
        before = torch.cat([t.flatten() for t in thetas(toy)])
        torch.optim.SGD(toy.parameters(), lr=0.7).step()
        ways[variant] = torch.cat([t.flatten() for t in thetas(toy)]) - before
    assert ways[mtl].abs().max() > 0.01
    torch.testing.assert_close(ways[reptile], A * ways[mtl])


@pytest.mark.parametrize("variant", [fomaml, reptile])
@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_every_task_starts_from_the_same_parameters(variant, optimizer):
    """The mean over two tasks is that of each alone, and nothing has moved afterwards."""
    options = {"inner_steps": 2, "inner_optimizer": optimizer, "inner_state": "reset"}
    batches, alone = [batch_of(9, 1), batch_of(9, 2)], []
    for batch in batches:
        alone.append(gradients(Toy(), variant, [batch], **options)[0])
    toy = Toy()
    before = thetas(toy)
    together, _ = gradients(toy, variant, batches, **options)
    for g, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(g, sum(parts) / 2)
    assert all(torch.equal(a, b) for a, b in zip(before, thetas(toy)))


def test_carried_moments_count_every_inner_step_and_reset_ones_those_of_a_task():
    """Reptile takes two steps of the prompt and one of everything in each of two tasks."""
    steps = {}
    for state in ("carried", "reset"):
        toy, options = Toy(), {"inner_steps": 2, "inner_optimizer": "adafactor"}
        learner = toy.learner(reptile, inner_state=state, **options)
        add_gradient(learner, RECIPE, toy.loss, [batch_of(9, 1), batch_of(9, 2)])
        steps[state] = [m.item() for m in learner.moments if m.dim() == 0]
    assert steps == {"carried": [2, 6], "reset": [1, 3]}


# The batches


def test_a_batch_is_of_one_task_and_an_epoch_holds_all_full_batches():
    tasks = [[data.TokenizedExample([t, i], [1]) for i in range(n)] for t, n in ((1, 9), (2, 22))]
    found = []
    for epoch in range(2):
        batches = [pt.task_batch(tasks, 4, 0, 7 * epoch + i).ids.tolist() for i in range(7)]
        assert all(len({row[0] for row in batch}) == 1 for batch in batches)
        assert sorted(batch[0][0] for batch in batches) == [1, 1, 2, 2, 2, 2, 2]
        rows = [tuple(row) for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == 28
        found.append({frozenset(map(tuple, batch)) for batch in batches})
    assert found[0] != found[1], "the same batches in every epoch"
    order = [pt.task_batch(tasks, 4, 0, i).ids[0, 0].item() for i in range(14)]
    assert order[:7] != order[7:]


def test_support_and_query_have_the_same_lengths_on_average():
    """The rows of a batch are sorted by length at first; then the query would be the longest."""
    task = [data.TokenizedExample([1] * (1 + i % 40), [2]) for i in range(320)]
    lengths = [pt.task_batch([task], 8, 0, step).lengths.tolist() for step in range(80)]
    gaps = [np.mean(row[:4]) - np.mean(row[4:]) for row in lengths]
    assert abs(np.mean(gaps)) < 2 * np.std(gaps) / len(gaps) ** 0.5


# The runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "draw_curve", lambda run, history: None)
        yield make_suite(tmp_path_factory.mktemp("suite"))


def line(place, variant, out, flags=""):
    short = f"--model {place}/lm/model --steps 6 --grad-accum 2 --batch-size 6 --inner-steps 2"
    short += " --prompt-length 4 --eval-every 2 --log-every 1 --device cpu --max-new-tokens 3"
    start = f"transfer.py continue --variant {variant} --train {place}/suite --out {out}"
    return f"{start} {short} {flags}".split()


@pytest.fixture(scope="module")
def runs(place):
    """A run of each variant."""
    for variant in VARIANTS:
        run(line(place, variant, place / variant, f"--dev {place}/suite"))
    return place


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_variant_trains_moves_and_the_rest_stays(runs, variant):
    """Of every trained tensor some number has moved, and a frozen LM is the same to the bit."""
    trains, _ = VARIANTS[variant]
    state = load_file(runs / variant / "state.safetensors")
    before = LM.from_pretrained(runs / "lm" / "model").state_dict()
    lm = {k.removeprefix("trained.lm."): v for k, v in state.items() if "trained.lm." in k}
    assert lm.keys() == (before.keys() if "T" in trains else set())
    assert not [name for name, tensor in lm.items() if torch.equal(tensor, before[name])]
    assert ("trained.prompt.vectors" in state) == ("P" in trains)
    record = json.loads((runs / variant / "run.json").read_text())
    if "T" not in trains:
        assert record["weights_before"] == record["weights_after"] is not None
    if "P" in trains:
        table = before["embed_tokens.weight"]
        start = adapters.from_vocab(4, table, generator=seeded(0))
        assert (state["trained.prompt.vectors"] != start).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_loads_as_it_was_scored(runs, variant):
    """load_run answers with the trained LM and prompt, like the run itself did."""
    trains, _ = VARIANTS[variant]
    assert (runs / variant / "model").is_dir() == ("T" in trains)
    assert (runs / variant / "adapter_config.json").is_file() == ("P" in trains)
    _, prefix, _, _ = load_run(runs / variant)
    assert (prefix is not None) == ("P" in trains)
    own = read_lines(runs / variant / "predictions.jsonl")
    out, again = runs / "scores" / variant, []
    for name in ("car", "end", "hat"):
        score = f"score {runs}/suite/{name}-dev.jsonl --run {runs}/{variant} --out {out}/{name}"
        metrics.main(score.split())
        again += read_lines(out / name / "predictions.jsonl")
    assert again == own


def test_a_prompt_trained_with_the_lm_starts_prompt_tuning_on_that_lm_only(runs, tmp_path):
    flags = "--steps 2 --batch-size 4 --prompt-length 4 --device cpu"
    start = f"train.py --method prompt_tuning --train {runs}/suite/end-train.jsonl {flags}"
    start += f" --init {runs}/reptile"
    run(f"{start} --model {runs}/reptile/model --out {tmp_path}/a".split())
    with pytest.raises(ValueError, match="another base"):
        run(f"{start} --model {runs}/lm/model --out {tmp_path}/b".split())


@pytest.mark.parametrize("variant", ["ppt", "mtl", "reptile"])
def test_a_deep_prompt_trains_and_starts_few_shot_prompts(runs, tmp_path, variant):
    """Its keys and values all move, and a tuned prompt starts from them."""
    run(line(runs, variant, tmp_path / "run", "--deep"))
    trained = adapters.load_adapter(tmp_path / "run", base_of(runs, tmp_path / "run"))
    assert isinstance(trained, adapters.DeepPrompt)
    _, prefix, _, _ = load_run(tmp_path / "run")
    assert torch.equal(prefix.layers[0][0], trained().layers[0][0])
    lm = LM.from_pretrained(runs / "lm" / "model")
    vectors = adapters.from_vocab(4, lm.embed_tokens.weight, generator=seeded(0))
    start = adapters.DeepPrompt(lm.read(vectors)).table()
    assert (trained.table() != start).all()
    flags = f"--deep --lr 0 --model {base_of(runs, tmp_path / 'run').folder} --init {tmp_path}/run"
    run(few_shot(runs, tmp_path / "few", flags))
    with pytest.raises(ValueError, match="run holds a deep prompt, which needs --deep"):
        run(few_shot(runs, tmp_path / "new", flags.removeprefix("--deep")))
    tuned = load_file(tmp_path / "few" / "car.is" / "adapter_model.safetensors")
    assert torch.equal(tuned["prompt_embeddings"], trained.table())


def base_of(runs, folder):
    """The LM that a run of continued pretraining belongs to."""
    own = folder / "model"
    return LM.from_pretrained(own if own.is_dir() else runs / "lm" / "model")


def test_fomaml_without_inner_steps_is_multi_task_learning(runs, tmp_path):
    run(line(runs, "fomaml", tmp_path / "run", f"--inner-steps 0 --dev {runs}/suite"))
    a, b = contents(tmp_path / "run"), contents(runs / "mtl")
    assert a == b and a != contents(runs / "fomaml")


@pytest.mark.parametrize("variant", ["t0", "fomaml", "reptile"])
def test_a_killed_run_resumes_to_the_bit(runs, tmp_path, monkeypatch, variant):
    """With the moments of the inner loop, which go on from step to step."""
    arguments = line(runs, variant, tmp_path / "run", f"--dev {runs}/suite")
    die_at_5(monkeypatch, arguments)
    run([*arguments, "--resume"])
    state = same_runs(tmp_path / "run", runs / variant)
    moments = [name for name in state if name.startswith("trained.moments.")]
    assert bool(moments) == (variant != "t0")


def test_held_out_clusters_are_not_trained_on(place, tmp_path, capsys):
    def tasks(flags, folder=place):
        args = transfer.parse(line(folder, "mtl", "out", flags)[1:])
        args.train = pt.expand(args.train, "train")
        return [group[0].task for group in pt.read_tasks(args)]

    names = "sentence completion,natural language inference,coreference resolution"
    assert {*pt.HELD_OUT} == {*names.split(","), "word sense disambiguation"}
    assert tasks("") == ["car", "car", "hat", "hat"]  # two templates each
    assert tasks("--hold-out b") == ["car", "car", "end", "end"]
    assert len(tasks("--hold-out")) == 6
    with pytest.raises(ValueError, match="--hold-out: no file of --train has the cluster 'c'"):
        tasks("--hold-out b c")
    assert "has a cluster" not in capsys.readouterr().out
    (tmp_path / "suite").mkdir()
    rows = [{k: row[k] for k in row if k != "cluster"} for row in suite_rows("x", 24, "train", "a")]
    write_lines(tmp_path / "suite" / "x-train.jsonl", rows)
    assert tasks("", tmp_path) == ["x", "x"]
    assert "no example of --train has a cluster" in capsys.readouterr().out


def test_an_eos_ends_every_input_if_asked_for(place, tmp_path):
    args = transfer.parse(line(place, "mtl", "out", "--input-eos")[1:])
    lm, tokenizer = pt.start.load_lm(args)
    examples = data.read(place / "suite" / "car-train.jsonl")
    splits = {"train": examples, "dev": [], "test": []}
    longer = pt.load_task(args, lm, tokenizer, splits).tokens["train"]
    args.input_eos = False
    plain = pt.load_task(args, lm, tokenizer, splits).tokens["train"]
    assert [t.input for t in longer] == [[*t.input, lm.config.eos[0]] for t in plain]
    assert [t.target for t in longer] == [t.target for t in plain]
    run(line(place, "mtl", tmp_path / "run", "--input-eos"))
    model, _, tokenizer, _ = load_run(tmp_path / "run")
    ids, _, _ = questions.prepare(model, tokenizer, examples, max_new_tokens=1)
    assert ids == [t.input for t in longer]  # also when it is asked later


# Few-shot prompts


def few_shot(place, out, flags=""):
    car, end = f"{place}/suite/car", f"{place}/suite/end"
    start = f"transfer.py few-shot --train {car}-train.jsonl {end}-train.jsonl"
    start += f" --test {car}-test.jsonl {end}-test.jsonl"
    short = f"--model {place}/reptile/model --init {place}/reptile --prompt-length 4 --device cpu"
    return f"{start} {short} --out {out} --shots 5 --steps 3 --max-new-tokens 3 {flags}".split()


def test_few_shot_tunes_on_stored_examples_and_pools_the_predictions(runs, tmp_path):
    result = run(few_shot(runs, tmp_path / "a"))
    templates = {name: set(part) for name, part in result["datasets"].items()}
    assert templates == {"car": {"is", "paint"}, "end": {"is", "paint"}}
    shots = json.loads((tmp_path / "a" / "shots.json").read_text())
    assert all(len(set(ids)) == 5 for ids in shots.values())
    assert {int(id.split("-")[1]) % 2 for id in shots["car.paint"]} == {1}  # of this template
    assert max(int(id.split("-")[1]) for id in shots["car.paint"]) > 9, "the first five"
    other = transfer.parse(few_shot(runs, tmp_path, "--shots-seed 5")[1:])
    _, _, chosen, _ = next(pt.few_shot_splits(other))
    assert {example.id for example in chosen} != set(shots["car.is"])
    rows = read_lines(tmp_path / "a" / "predictions.jsonl")
    assert len(rows) == 12 and all(row["prediction"] in COLOURS for row in rows)
    gains = []
    for task in ("car", "end"):
        accuracies = [  # even ids are of one template, odd ones of the other
            np.mean([r["em"] for r in rows if r["task"] == task and int(r["id"][5:]) % 2 == odd])
            for odd in (0, 1)
        ]
        gains.append(np.mean([(accuracy - 1 / 3) * 3 for accuracy in accuracies]))
    assert result["average_relative_gain"] == pytest.approx(np.mean(gains))
    with pytest.raises(ValueError, match="is one of the parts of .*a, which one command makes"):
        verify(tmp_path / "a" / "car.paint")
    records = [json.loads(p.read_text()) for p in (tmp_path / "a").glob("*/run.json")]
    assert len(records) == 4 and all(r["step"] == 3 and r["score"] is None for r in records)
    run(few_shot(runs, tmp_path / "b", "--seed 1"))
    assert json.loads((tmp_path / "b" / "shots.json").read_text()) == shots
    assert metrics.compare(tmp_path / "a", tmp_path / "b")  # pairs the examples


def test_few_shot_resumes(runs, tmp_path, monkeypatch):
    run(few_shot(runs, tmp_path / "a"))
    done = []
    tune = pt.train.train_adapter

    def dies(task, prompt):
        if done:
            raise KeyboardInterrupt
        done.append(tune(task, prompt))
        return done[0]

    with monkeypatch.context() as patch:
        patch.setattr(pt.train, "train_adapter", dies)
        with pytest.raises(KeyboardInterrupt):
            run(few_shot(runs, tmp_path / "b"))
    assert not (tmp_path / "b" / "predictions.jsonl").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        run(few_shot(runs, tmp_path / "b"))
    before = contents(tmp_path / "b")
    others = f"--train {runs}/suite/hat-train.jsonl --test {runs}/suite/hat-test.jsonl"
    for flags, error in {
        "--shots-seed 5": "car.is was started with --shots-seed 100, not 5",
        others: "b was started with other files",
    }.items():
        with pytest.raises(ValueError, match=error):
            run(few_shot(runs, tmp_path / "b", f"--resume {flags}"))
    assert contents(tmp_path / "b") == before
    run([*few_shot(runs, tmp_path / "b"), "--resume"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_few_shot_goes_on_in_a_folder_that_it_had_only_made(runs, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "shots.json.unfinished").write_text("{")
    run([*few_shot(runs, tmp_path / "new"), "--resume"])
    run(few_shot(runs, tmp_path / "whole"))
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other is not a folder of few-shot"):
        run([*few_shot(runs, tmp_path / "other"), "--resume"])


def test_bad_input_is_refused_by_name(runs, tmp_path):
    free = tmp_path / "free.jsonl"
    free.write_text('{"input": "a", "target": "b"}\n')
    cases = {
        "--batch-size 7": "--batch-size: 7 rows cannot be split into 3 parts",
        "--batch-size 99": "12 examples of the template 'is', fewer than --batch-size 99",
        f"--init {runs}/t0": "no adapter_config.json",
        "--limit 3": "3 examples of the template 'is', fewer than --batch-size 6",
        f"--train {runs}/suite/end-train.jsonl": "--hold-out leaves no task",
    }
    for flags, error in cases.items():
        with pytest.raises((ValueError, OSError), match=error):
            run(line(runs, "reptile", tmp_path / "new", flags))
    with pytest.raises(ValueError, match="--deep: t0 trains no prompt"):
        run(line(runs, "t0", tmp_path / "new", "--deep"))
    with pytest.raises(ValueError, match="--init: t0 trains no prompt"):
        run(line(runs, "t0", tmp_path / "new", "--init vocab"))
    with pytest.raises(ValueError, match="was started with --inner-lr"):
        run(line(runs, "reptile", runs / "reptile", "--resume --inner-lr 0.5"))
    with pytest.raises(ValueError, match="other data"):
        flags = f"--resume --train {runs}/suite/car-train.jsonl"
        run(line(runs, "reptile", runs / "reptile", flags))
    same = tmp_path / "same.jsonl"
    write_lines(same, suite_rows("x", 24, "train", "a") + suite_rows("y", 24, "train", "a"))
    same.write_text(same.read_text().replace('"paint"', '"a b"').replace('"is"', '"a_b"'))
    for flags, error in {
        f"--train {same} --test {same}": "another template has the folder .*same.a_b",
        "--shots 13": "the template 'is' has 12 examples, not 13",
        f"--test {free}": "--test needs as many files as --train",
        f"--train {free} --test {free}": "'all' has no examples, or some without options",
        "--prompt-length 5": "--prompt-length 4",
    }.items():
        with pytest.raises(ValueError, match=error):
            run(few_shot(runs, tmp_path / "new", flags))
    with pytest.raises(SystemExit):  # it has no dev examples
        run(few_shot(runs, tmp_path / "new", f"--dev {free}"))
    assert {path.name for path in tmp_path.iterdir()} == {"free.jsonl", "same.jsonl"}
