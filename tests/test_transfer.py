"""Soft prompt transfer: similarities, search, statistics, and the prompts of source tasks."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import seeded, vectors
from tiny_runs import contents, die_at_5, make_suite, run, same_runs

import adapters
import data
import fit
import promptability
import recurse
import transfer
from checkpoints import write_lines
from model import LM
from runs import load_run
from transfer import search, silhouette, similarity, weighted_average
from verify import verify

FLAGS = "--prompt-length 4 --batch-size 4 --device cpu --max-new-tokens 3 --log-every 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "draw_curve", lambda run, history: None)
        yield make_suite(tmp_path_factory.mktemp("suite"))


def source(place, out, files="suite/car-train.jsonl", flags=""):
    paths = " ".join(f"{place}/{name}" for name in files.split())
    short = f"{FLAGS} --steps 6 --eval-every 3 --keep-at 2 --model {place}/lm/model"
    return f"transfer.py source --train {paths} --out {out} {short} {flags}".split()


@pytest.fixture(scope="module")
def library(place):
    """Prompts of the three tasks, each with its embedding. The LM is loaded once for all."""
    out, load, loaded = place / "library", transfer.start.load_lm, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer.start, "load_lm", lambda args: loaded.append(args) or load(args))
        run(source(place, out, "suite", f"--each --dev {place}/suite"))
    assert len(loaded) == 1
    return out


# Similarity and search


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_both_cosines_are_the_papers_formulas(make_lm):
    a, b = vectors(make_lm(), 3, 1), vectors(make_lm(), 3, 2) + 0.1
    every = np.mean([cosine(x, y) for x in a for y in b])
    assert similarity(a, b, "per_token") == pytest.approx(every, abs=1e-6)
    means = cosine(a.mean(0), b.mean(0))
    assert similarity(a, b, "average_tokens") == pytest.approx(means, abs=1e-6)
    assert similarity(a, a, "average_tokens") == pytest.approx(1)
    assert similarity(a, -a, "average_tokens") == pytest.approx(-1)


def active_neurons(lm, prompt):
    """{(layer, neuron)}: one pass over the prompt and the token together, without a prefix."""
    first = lm.config.bos if lm.config.bos is not None else lm.config.eos[0]
    seen = {}
    for number, block in enumerate(lm.layers):
        linear = block.mlp.gate_proj if lm.config.gated else block.mlp.up_proj
        linear.register_forward_hook(lambda _, __, out, n=number: seen.update({n: out[0, -1] > 0}))
    with torch.no_grad():
        lm(torch.cat([prompt, lm.embed(torch.tensor([first]))])[None])
    return {(n, i) for n, row in seen.items() for i in row.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("name", ["tied", "parallel"])
def test_neurons_are_those_of_the_token_after_the_prompt(make_lm, name):
    lm = make_lm(name)
    prompts = [vectors(lm, 4, seed) for seed in (1, 2)]
    a, b = (active_neurons(make_lm(name), prompt) for prompt in prompts)
    assert 0 < len(a & b) < len(a)
    overlap = len(a & b) / math.sqrt(len(a) * len(b))
    assert similarity(*prompts, "neurons", lm) == pytest.approx(overlap, abs=1e-6)
    prefixes = [lm.read(prompt) for prompt in prompts]  # as deep prompts give
    assert similarity(*prefixes, "neurons", lm) == pytest.approx(overlap, abs=1e-6)
    assert not any(module._forward_hooks for module in lm.modules())


def test_search_ranks_by_similarity():
    task = torch.randn(5, 8, generator=seeded(1))
    noise = torch.randn(5, 8, generator=seeded(2))
    found = {"far": -task, "near": task + 0.1 * noise, "middle": task + 2 * noise}
    for kind in ("per_token", "average_tokens"):
        assert [name for name, _ in search(task, found, kind)] == ["near", "middle", "far"]


def test_search_reads_embeddings_and_leaves_the_task_out(library):
    ranking = search(library / "car", library)
    embedding = adapters.read_prompt(library / "car" / "embedding")
    assert {name for name, _ in ranking} == {"hat", "end"}
    for name, value in ranking:
        other = adapters.read_prompt(library / name / "embedding")
        assert value == pytest.approx(similarity(embedding, other))
    assert ranking == sorted(ranking, key=lambda pair: -pair[1])


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_the_search_command_writes_an_average_that_a_run_starts_from(
    place, library, tmp_path, kind
):
    out, flags = tmp_path / "average", f"--kind {kind} --model {place}/lm/model --top-k 2"
    line = f"transfer.py search --library {library} --task {library}/car --average {out}/ {flags}"
    ranking = run(line.split())
    prompts = [transfer.read_prompt(library / name) for name, _ in ranking]
    expected = weighted_average(prompts, [value for _, value in ranking])
    assert torch.equal(transfer.read_prompt(out), expected)
    assert not torch.equal(expected, prompts[0])
    adapter = adapters.load_adapter(out, LM.from_pretrained(place / "lm" / "model"))
    assert torch.equal(adapter(), expected)
    record = run(source(place, tmp_path / "target", flags=f"--init {out}"))
    assert record["init_hash"] is not None


def test_search_for_a_file_trains_its_prompt_like_the_library(place, library, tmp_path, capsys):
    """The same embedding, to the bit, as a source of this file and the next seed. The vectors that
    prompts of one seed start from would make them alike. It is trained once."""
    line = f"transfer.py search --library {library} --task {place}/suite/car-train.jsonl"
    ranking = run(f"{line} --kind average_tokens".split())
    assert {name for name, _ in ranking} == {"car", "hat", "end"}
    run(source(place, tmp_path / "car", flags="--seed 1"))
    assert contents(place / "car/embedding") == contents(tmp_path / "car/embedding")
    assert contents(place / "car/embedding") != contents(library / "car/embedding")
    assert verify(place / "car") == {}
    assert "step     6 of 6" in capsys.readouterr().out
    assert run(f"{line} --kind average_tokens".split()) == ranking
    assert "step     6 of 6" not in capsys.readouterr().out
    before = contents(place)  # another file with the same folder, or with that of the library
    for name, problem in (("car", "started on other data"), ("library", "not a run's folder")):
        other = shutil.copy(place / "suite/hat-train.jsonl", tmp_path / f"{name}-train.jsonl")
        line = f"transfer.py search --library {library} --task {other}"
        with pytest.raises((ValueError, OSError), match=f"{name} .*{problem}.*; choose .*--out"):
            run(line.split())
    moved = shutil.copytree(place / "lm" / "model", tmp_path / "moved")
    ranking = run(f"{line} --out {tmp_path}/own --model {moved}".split())
    assert ranking == search(tmp_path / "own", library) and contents(place) == before
    record = json.loads((tmp_path / "own" / "run.json").read_text())
    assert record["arguments"]["model"] == str(moved)
    assert f"--model {moved}" in record["command"]


def test_the_weighted_average_of_one_source_is_that_source():
    prompt = torch.randn(3, 4, generator=seeded(1))
    assert torch.equal(weighted_average([prompt], [0.3]), prompt)


def test_weights_are_similarities_over_their_sum_and_none_is_negative():
    prompts = [torch.full((2, 3), float(value)) for value in (1, 2, 100)]
    average = weighted_average(prompts, [0.1, 0.3, -0.2])
    torch.testing.assert_close(average, torch.full((2, 3), (0.1 * 1 + 0.3 * 2) / 0.4))


# Statistics


def test_search_table_on_figures_worked_out_by_hand():
    scores = {"x": {"a": 0.6, "b": 0.8, "c": 0.7, "d": 0.5}, "y": dict(a=0.5, b=0.4, c=0.9, d=0.6)}
    rankings = {"x": [(n, 0.0) for n in "abcd"], "y": [(n, 0.0) for n in "dabc"]}
    first, second, last = transfer.search_table(scores, {"x": 0.5, "y": 0.5}, rankings, [1, 2, 4])
    assert first["score"] == pytest.approx(0.6) and second["score"] == pytest.approx(0.7)
    assert second["error_reduction"] == pytest.approx((0.3 / 0.5 + 0.1 / 0.5) / 2)
    assert second["eliminated"] == pytest.approx(0.5)
    assert second["gain_kept"] == pytest.approx(0.2 / 0.35)
    assert transfer.relative_error_reduction(0.7, 0.6) == pytest.approx(1 / 4)
    assert last["gain_kept"] == 1 and last["eliminated"] == 0
    (row,) = transfer.search_table(scores, {"x": 1.0, "y": 1.0}, rankings, [1])
    assert row["error_reduction"] == 0 and row["gain_kept"] is None, "there is no gain"
    parts = {"x": {"a": [0.9, 0.2, 0.4], "b": [0.3, 0.6, 0.5]}}
    (row,) = transfer.search_table(parts, {"x": 0.5}, {"x": rankings["x"][:2]}, [2])
    expected = (0.3 + 0.2 + 0.4) / 3  # by the other parts, b is best for the first, then a twice
    assert row["score"] == pytest.approx(expected)


def test_the_best_of_many_without_an_effect_gains_nothing_if_it_is_scored_on_other_examples():
    rng, names = np.random.default_rng(0), [str(i) for i in range(14)]
    scores = {str(t): {n: rng.random(5) for n in names} for t in range(300)}
    rankings, base = {t: [(n, 0.0) for n in names] for t in scores}, dict.fromkeys(scores, 0.5)
    (row,) = transfer.search_table(scores, base, rankings, [14])
    assert abs(row["score"] - 0.5) < 0.02
    whole = {t: {n: part[n].mean() for n in names} for t, part in scores.items()}
    assert transfer.search_table(whole, base, rankings, [14])[0]["score"] > 0.65


def naive_silhouette(distance, labels):
    values = []
    for i, label in enumerate(labels):
        by_label = {}
        for j, other in enumerate(labels):
            if j != i:
                by_label.setdefault(other, []).append(distance[i][j])
        means = {other: sum(part) / len(part) for other, part in by_label.items()}
        a, b = means.pop(label, None), min(means.values())
        values.append(0 if a is None else (b - a) / max(a, b))
    return sum(values) / len(values)


def test_silhouette_and_its_permutation_test():
    rng, labels = np.random.default_rng(0), [0, 1, 1, 0, 2, 1, 0, 3, 2]
    points = rng.normal(size=(9, 4)) + 3 * np.eye(4)[labels]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    near = points @ points.T
    assert silhouette(near, labels) == pytest.approx(naive_silhouette(1 - near, labels))
    with pytest.raises(ValueError, match="two groups or more"):
        silhouette(near, ["a"] * len(near))
    assert silhouette(np.ones((4, 4)), [0, 0, 1, 1]) == 0
    value, p = transfer.permutation_test(partial(silhouette, near), labels, iters=400)
    assert value == pytest.approx(silhouette(near, labels)) and p < 0.02
    random = np.corrcoef(rng.normal(size=(9, 20)))
    _, p = transfer.permutation_test(partial(silhouette, random), labels, iters=400)
    assert p > 0.05


def test_p_counts_every_permutation_of_three():
    """Of the six orders, two have |r| as large: the one seen and its mirror image."""
    r, p = transfer.pearson([1, 2, 3], [1, 2, 9], iters=3000)
    assert r == pytest.approx(np.corrcoef([1, 2, 3], [1, 2, 9])[0, 1])
    assert p == pytest.approx(1 / 3, abs=0.03)
    assert transfer.pearson([1, 2, 3], [9, 2, 1], iters=10)[0] < 0
    assert transfer.pearson(range(9), range(9), iters=9)[1] == 1 / 10, "the one seen counts too"
    assert transfer.pearson([1, 2, 3], [4, 4, 4], iters=10) == (0.0, 1.0)


# Source prompts


def tokenized(task, count):
    return [data.TokenizedExample([task, i], [i + 1]) for i in range(count)]


def test_an_epoch_of_a_mixture_holds_each_task_up_to_the_limit():
    tasks, drawn = [tokenized(1, 30), tokenized(2, 4), tokenized(3, 9)], []
    for epoch in range(2):
        batches = [transfer.mixture_batch(tasks, 8, 5, 0, 4 * epoch + i) for i in range(4)]
        ids = [tuple(row[:2]) for batch in batches for row in batch.ids.tolist()]
        assert len(set(ids)) == len(ids) == 20
        assert [sum(task == t for t, _ in ids) for task in (1, 2, 3)] == [8, 4, 8]
        drawn.append(sorted(ids))
    assert drawn[0] != drawn[1], "the same 8 of 30 in every epoch"


def test_a_mixture_of_one_task_is_that_task():
    task = tokenized(1, 13)
    for step in range(8):
        mixed = transfer.mixture_batch([task], None, 5, 3, step)
        plain = data.batches(task, 5, 3, step)
        assert torch.equal(mixed.ids, plain.ids) and torch.equal(mixed.targets, plain.targets)


def test_source_on_one_file_is_prompt_tuning_on_it(place, tmp_path):
    """The same prompt, to the bit, as train.py's; and the embedding is a shorter run's prompt."""
    flags = "--schedule constant --warmup 0"
    run(source(place, tmp_path / "a", flags=flags))
    line = f"train.py --method prompt_tuning --train {place}/suite/car-train.jsonl {FLAGS} {flags}"
    run(f"{line} --model {place}/lm/model --steps 6 --eval-every 3 --out {tmp_path}/b".split())
    run(source(place, tmp_path / "c", flags=f"--steps 2 {flags}"))
    prompts = [transfer.read_prompt(tmp_path / name) for name in ("a", "b", "a/embedding", "c")]
    assert torch.equal(prompts[0], prompts[1]) and torch.equal(prompts[2], prompts[3])
    assert not torch.equal(prompts[0], prompts[2])


def test_each_file_gets_the_prompt_that_a_run_of_its_own_gives(place, library, tmp_path):
    assert sorted(path.name for path in library.iterdir()) == ["car", "end", "hat"]
    dev = f"--dev {place}/suite/hat-dev.jsonl"
    run(source(place, tmp_path / "hat", "suite/hat-train.jsonl", dev))
    assert contents(tmp_path / "hat") == contents(library / "hat")
    assert verify(library / "hat") == {}  # by a command of its own


def test_the_files_of_a_task_have_its_name_in_whatever_order_they_are_given(place, tmp_path):
    files = [f"{place}/suite/{task}-dev.jsonl" for task in ("hat", "car", "end")]
    args = transfer.parse(source(place, tmp_path, "suite", f"--each --dev {' '.join(files)}")[1:])
    args.train = promptability.expand(args.train, "train")
    for task, one in transfer.one_run_per_file(args).items():
        assert (*one.train, *one.dev) == tuple(
            f"{place}/suite/{task}-{split}.jsonl" for split in ("train", "dev")
        )
    args.dev[0] = f"{place}/suite/hat-test.jsonl"
    with pytest.raises(ValueError, match="--dev has no file of the task hat, as .*hat-train.jsonl"):
        transfer.one_run_per_file(args)


def test_text_is_learned_as_prefix_lm(place, tmp_path):
    """Every window is cut once. What it learns is the text after the cut, and nothing is lost."""
    run(source(place, tmp_path / "text", "text.txt", "--seq-len 8"))
    model, _, tokenizer, _ = load_run(tmp_path / "text")
    args = transfer.parse(source(place, "out", "text.txt", "--seq-len 8")[1:])
    task = type("Task", (), {"args": args, "lm": model, "tokenizer": tokenizer})
    windows = transfer.text_windows(str(place / "text.txt"), task)
    stream = data.encode_texts(data.read_texts(place / "text.txt"), tokenizer).tokens.tolist()
    joined = [token for w in windows for token in w.input + w.target]
    assert joined == stream[: len(joined)] and len(stream) - len(joined) < 8
    assert all(w.input and w.target for w in windows)
    assert len({len(w.input) for w in windows}) > 3


def test_text_and_tasks_mix(place, tmp_path):
    files = "suite/car-train.jsonl text.txt"
    a = run(source(place, tmp_path / "a", files, "--limit 10"))
    b = run(source(place, tmp_path / "b", "suite/car-train.jsonl", "--limit 10"))
    assert a["tokens_hash"] != b["tokens_hash"]
    prompts = [transfer.read_prompt(tmp_path / name) for name in "ab"]
    assert not torch.equal(*prompts)
    assert transfer.is_text(place / "text.txt") and not transfer.is_text(place / files.split()[0])
    lines = ['{"text": "so"}', '{"text": "so", "input": "is it", "target": "so"}']
    for line, kind in zip(lines, (True, False)):  # examples may keep the text that they come from
        (tmp_path / "lines.jsonl").write_text(f"{line}\n{line}\n")
        assert transfer.is_text(tmp_path / "lines.jsonl") == kind


def test_a_killed_source_run_resumes_to_the_bit(place, tmp_path, monkeypatch):
    flags = "--seq-len 8 --limit 7 --keep-at 4"
    lines = [source(place, tmp_path / n, "suite/car-train.jsonl text.txt", flags) for n in "ab"]
    run(lines[0])
    die_at_5(monkeypatch, lines[1])
    run([*lines[1], "--resume"])
    assert "trained.vectors" in same_runs(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "a/embedding/adapter_config.json").read_text())["step"] == 4


# What is refused


def test_bad_input_is_refused_by_name(place, library, tmp_path, monkeypatch):
    lm = LM.from_pretrained(place / "lm" / "model")
    prompt, longer_prompt = (adapters.SoftPrompt(torch.ones(n, 32)) for n in (4, 5))
    other, longer, late, deep = (tmp_path / name for name in ("other", "longer", "late", "deep"))
    adapters.save_adapter(deep / "x", adapters.DeepPrompt(lm.read(torch.ones(4, 32))), lm, step=2)
    connector = recurse.new_connector(lm, "neural_recursion", 1)
    adapters.save_adapter(tmp_path / "connectors" / "x", connector, lm, step=2)
    adapters.save_adapter(other / "x", prompt, LM(lm.config), step=2)
    adapters.save_adapter(longer / "x", longer_prompt, lm, step=2)
    adapters.save_adapter(late / "x", prompt, lm, step=9)
    before = {path for path in tmp_path.rglob("*")}
    task, neurons = f"--task {library}/car", f"--kind neurons --model {place}/lm/model"
    for line, error in {
        f"search --library {library} --task {tmp_path}/no": "--task .*/no: no such file or folder",
        f"search --library {library} --task {place}/suite": "suite: no adapter_config.json",
        f"search --library {other} {task}": "x: its base LM is",
        f"search --library {longer} {task}": r"x: the prompt is \(5, 32\)",
        f"search --library {late} {task}": "x: its step is 9, that of .*car is 2",
        f"search --library {deep} {task} {neurons}": r"x: the prompt is \(4, 128\)",
        f"search --library {tmp_path}/connectors {task} {neurons}": "x: not a prompt",
        f"search --library {library} --task {place}/text.txt --kind neurons": "on another base",
        f"search --library {library} {task} --average {library}": "library exists",
        f"search --library {library} {task} --average {tmp_path}/new --top-k 3": (
            "--top-k 3 exceeds the 2 of .*library"
        ),
        f"search --library {library} --task {place}/text.txt --average {tmp_path}/new --top-k 4": (
            "--top-k 4 exceeds the 3 of .*library"  # before a prompt is trained on the text
        ),
        f"search --library {other} --task {place}/text.txt": "other: holds no run of",
    }.items():
        with pytest.raises((ValueError, OSError), match=error):
            transfer.main(line.split())
    out, bad = tmp_path / "new", place / "bad-train.jsonl"
    bad.write_text('{"input": "is it", "target": "so"}\n{"input": 1}\n')
    for name in ("one", "two"):
        write_lines(place / f"{name}.jsonl", [{"input": "is it", "target": name, "id": 7}])
    for files, flags, error in (
        ("text.txt", "--seq-len 400", "--seq-len 400"),
        ("suite", f"--each --dev {place}/suite/car-dev.jsonl", "--dev needs as many files as"),
        ("suite/car-train.jsonl bad-train.jsonl", "--each", "bad-train.jsonl:2"),
        (
            "suite/car-train.jsonl",
            f"--test {place}/one.jsonl {place}/two.jsonl",
            "two.jsonl:1: the id",
        ),
        ("lm", "", f"--train {place}/lm: holds no file TASK-train.jsonl"),
        ("suite/car-train.jsonl suite/car-train.jsonl", "--each", "another file has the name car"),
        ("suite/car-train.jsonl", f"--out {library}/car", "car exists"),
        ("suite/car-train.jsonl", f"--init {longer}/x", "--prompt-length 5"),
    ):
        with pytest.raises((ValueError, OSError), match=error):
            run(source(place, out, files, flags))
    assert {path for path in tmp_path.rglob("*")} == before
    with pytest.raises(ValueError, match=r"\(3, 4\), \(2, 4\)"):
        weighted_average([torch.ones(3, 4), torch.ones(2, 4)], [1, 1])
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        similarity(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="no source prompt has a positive"):
        weighted_average([torch.ones(3, 4)], [-0.1])
    with pytest.raises(ValueError, match="no source prompts"):
        search(torch.ones(3, 4), {})
    with pytest.raises(ValueError, match="magic"):
        similarity(torch.ones(3, 4), torch.ones(3, 4), "magic")
    with pytest.raises(ValueError, match="needs an LM"):
        similarity(torch.ones(3, 4), torch.ones(3, 4), "neurons")


def test_a_resumed_source_run_must_have_the_same_files(place, tmp_path, monkeypatch):
    line = source(place, tmp_path / "run", "suite/car-train.jsonl")
    die_at_5(monkeypatch, line)
    other = source(place, tmp_path / "run", "suite/hat-train.jsonl")
    with pytest.raises(ValueError, match="on other data"):
        run([*other, "--resume"])
