"""Many tasks around one LM: mixed in a batch, in votes and in training; prompts read as tokens; the
multi-task protocol. (The prompts themselves: test_prompts.)"""

import json
import shutil
from argparse import Namespace
from collections import Counter

import pytest
import torch
from conftest import close, randomise, seeded, vectors
from safetensors.torch import load_file
from test_prompts import make_mixed, with_bos
from tiny_runs import TOWNS, command, read_lines, run, suite_rows, write_lines

import data
import eval as evaluation  # not the built-in function
import start
import suite
from adapters import DeepPrompt, SoftPrompt, bos_vector, from_labels, from_vocab, save_adapter
from checkpoints import load_tokenizer
from fit import Recipe, make_optimizer, target_loss
from generate import predict, stack_prefixes
from model import LM
from prompts import (
    Prompt,
    TaskPrompts,
    answer_by_vote,
    answer_mixed,
    explain,
    mean_over_tasks,
    nearest_tokens,
    template_medians,
)
from questions import prepare
from recurse import new_connector, prompt_prefix, without_bos
from runs import load_run, read_predictions
from t5 import T5Config, T5Encoder


def make_prompt(adapter, lm, tokenizer, folder=None):
    after = isinstance(adapter, SoftPrompt) and adapter.bos is not None
    own = without_bos(tokenizer) if after else tokenizer
    return Prompt(folder, adapter, prompt_prefix(adapter, lm), own)


@pytest.fixture
def mixed(make_lm, tokenizer):
    """(lm, tokenizer, prompts of every kind and of different lengths)"""
    lm, tokenizer = make_lm("tied"), with_bos(tokenizer)
    encoder = randomise(T5Encoder(T5Config(67, 16, 2, 2, 8, 24)), 5).requires_grad_(False)
    _, adapters = make_mixed(lm, encoder)
    adapters = [*adapters, SoftPrompt(vectors(lm, 2, 3), bos_vector(lm))]
    prompts = [make_prompt(a.requires_grad_(False), lm, tokenizer) for a in adapters]
    return lm, tokenizer, [None, *prompts]


def examples(count, options=()):
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(1 + i % 5)) for i in range(count)]
    return [data.Example(text, "w4", ("w4",), options=options) for text in texts]


def alone(lm, tokenizer, example, prompt, new=4, mean=False):
    own, prefix = (tokenizer, None) if prompt is None else (prompt.tokenizer, prompt.prefix)
    ids, options, _ = prepare(lm, own, [example], None, new)
    return predict(lm, own, ids, prefix, new, options, mean=mean)[0]


def test_each_example_gets_the_answer_that_its_own_prompt_gives_alone(mixed):
    lm, tokenizer, prompts = mixed
    asked = examples(15) + examples(10, ("w4", "w9 w8", "w30"))
    chosen = [prompts[b % len(prompts)] for b in range(len(asked))]
    for mean in (False, True):
        expected = [alone(lm, tokenizer, e, p, 4, mean) for e, p in zip(asked, chosen)]
        for limits in ({}, {"batch_size": 2}):
            assert answer_mixed(lm, tokenizer, asked, chosen, 4, mean=mean, **limits) == expected
    others = [prompts[(b + 1) % len(prompts)] for b in range(len(asked))]
    assert answer_mixed(lm, tokenizer, asked, others, 4) != expected  # it matters which one
    with pytest.raises(ValueError, match="2 prompts for 25 examples"):
        answer_mixed(lm, tokenizer, asked, chosen[:2])


def test_the_answer_that_most_prompts_give_wins_and_of_equals_the_first(mixed):
    lm, tokenizer, prompts = mixed
    asked = examples(12, ("w4", "w9", "w30", "w12"))
    votes = [[alone(lm, tokenizer, e, p) for p in prompts[1:]] for e in asked]
    answers, counts = answer_by_vote(lm, tokenizer, asked, prompts[1:], 4, [""] * len(asked))
    for row, answer, count in zip(votes, answers, counts):
        assert count == row.count(answer) == max(map(row.count, row))
        assert answer == next(a for a in row if row.count(a) == count)
    assert len(set(counts)) > 1


# In training


def test_gradients_of_a_mixed_batch_are_those_of_each_prompt_on_its_own_rows(mixed):
    lm, _, (_, soft, deep, generated, after) = mixed
    own = {"a": soft, "b": deep, "c": generated, "d": after}
    prompts = TaskPrompts(
        {task: prompt.adapter.requires_grad_(True) for task, prompt in own.items()}
    )
    tasks = ["b", "a", "c", "a", "d", "b", "c"]
    tokens = [
        data.TokenizedExample(list(range(3 + i, 6 + 2 * i)), [7 + i, 2][: 1 + i % 2])
        for i in range(len(tasks))
    ]

    def gradients(rows):
        prompts.zero_grad()
        prefixes = prompts.prefixes(lm, [tasks[row] for row in rows])
        given = stack_prefixes(prefixes, [tokens[row].input for row in rows])
        loss = target_loss(lm, given, data.collate([tokens[row] for row in rows], rows))
        loss.backward()
        found = [None if p.grad is None else p.grad.clone() for p in prompts.parameters()]
        return loss.item(), found

    total, together = gradients(list(range(len(tasks))))
    parts = {task: gradients([r for r, t in enumerate(tasks) if t == task]) for task in own}
    assert total == pytest.approx(sum(loss for loss, _ in parts.values()), rel=1e-4)
    for i, gradient in enumerate(together):
        (expected,) = [part[i] for _, part in parts.values() if part[i] is not None]
        assert expected.abs().max() > 1e-3
        close(gradient, expected, 1e-4)


def test_a_prompt_for_each_task_is_trained_in_shared_batches_and_used_again(
    place, model, tmp_path, capsys
):
    """Each task has towns of its own, and its prompt learns to choose them."""
    asked = [row | {"options": [*TOWNS, "nowhere"]} for row in read_lines(place / "train.jsonl")]
    out, file = tmp_path / "both", write_lines(tmp_path / "asked.jsonl", asked)
    flags = f"--per-task --train {file} --test {file} --lr 0.1 --batch-size 8"
    flags += f" --model {model} --steps 12 --eval-every 12"
    record = run(command(place, "prompt_tuning", out, flags))
    rows = [load_file(out / t / "adapter_model.safetensors")["prompt_embeddings"] for t in "ab"]
    assert (rows[0] - rows[1]).abs().max() > 0.05  # they started alike
    assert record["trained_parameters"] == sum(row.numel() for row in rows)
    capsys.readouterr()
    line = ["mixed", "--prompts", str(out / "a"), str(out / "b"), "--input", str(file)]
    line += ["--max-new-tokens", "4"]
    evaluation.main([*line, "--out", str(tmp_path / "scores")])
    mixed, trained = read_predictions(tmp_path / "scores"), read_predictions(out)
    assert [r["prediction"] for r in mixed] == [r["prediction"] for r in trained]
    assert [r["prompt"] for r in mixed] == [r["task"] for r in mixed]
    assert len({r["prediction"] for r in mixed}) > 1
    with pytest.raises(ValueError, match="has a prompt for each task; `eval.py mixed`"):
        load_run(out)
    assert "examples of each prompt: b 4, a 4" in capsys.readouterr().err
    swapped = [f"b={out / 'a'}", f"a={out / 'b'}"]
    evaluation.main(["mixed", "--prompts", *swapped, *line[4:], "--out", str(tmp_path / "swapped")])
    assert [r["prediction"] for r in read_predictions(tmp_path / "swapped")] != [
        r["prediction"] for r in mixed
    ]


@pytest.mark.parametrize("method", ["prompt_tuning", "deep_prompt", "id_pt"])
def test_one_prompt_per_task_is_plain_training_if_there_is_one_task(place, tmp_path, method):
    asked = [row | {"task": "one"} for row in read_lines(place / "train.jsonl")]
    files = [write_lines(tmp_path / f"{split}.jsonl", asked) for split in ("train", "dev")]
    flags = f"--train {files[0]} --dev {files[1]} --steps 2"
    run(command(place, method, tmp_path / "plain", flags))
    run(command(place, method, tmp_path / "each", f"{flags} --per-task"))
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    each = load_file(tmp_path / "each" / "one" / "adapter_model.safetensors")
    assert plain.keys() == each.keys()
    for name in plain:
        close(plain[name], each[name], 1e-3)


def test_a_task_without_a_prompt_of_its_own_is_refused_before_training(place, tmp_path):
    asked = read_lines(place / "train.jsonl")
    cases = {
        "has no prompt for ''": ([r | {"task": ""} for r in asked], asked),
        "has no prompt for 'c'": (asked, [r | {"task": "c"} for r in asked]),
        "the tasks 'x y' and 'x/y' have the same folder": (
            [r | {"task": "x/y" if r["task"] == "a" else "x y"} for r in asked],
            [r | {"task": "x/y"} for r in asked],
        ),
    }
    for words, parts in cases.items():
        files = [write_lines(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(parts)]
        flags = f"--per-task --train {files[0]} --dev {files[1]}"
        with pytest.raises(ValueError, match=words):
            run(command(place, "prompt_tuning", tmp_path / "out", flags))
    for method, more in (("neural_recursion", ""), ("prompt_tuning", "--pause 2")):
        with pytest.raises(ValueError, match="--per-task: not for"):
            run(command(place, method, tmp_path / "out", f"--per-task {more}"))
    assert not (tmp_path / "out").exists()


# The command


@pytest.fixture(scope="module")
def model(place, tmp_path_factory):
    """The folder of an LM whose answers differ: the tiny one with large random weights."""
    lm = LM.from_pretrained(place / "lm" / "model")
    folder = tmp_path_factory.mktemp("random") / "lm"
    tokenizer = load_tokenizer(lm.folder)
    randomise(lm, 3).save(folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def library(place, model, tmp_path_factory):
    """Runs of three methods, a prompt and a Connector without a run."""
    folder, base = tmp_path_factory.mktemp("library"), f"--model {model} --lr 0.1"
    run(command(place, "prompt_tuning", folder / "soft", f"{base} --placement after_bos"))
    run(command(place, "deep_prompt", folder / "deep", f"{base} --prompt-length 2"))
    run(command(place, "id_pt", folder / "generated", base))
    lm = LM.from_pretrained(model)
    prompt = SoftPrompt(torch.randn(6, lm.config.dim, generator=seeded(7)))
    save_adapter(folder / "stored", prompt, lm, base_model_name_or_path=str(model))
    save_adapter(folder / "connector", new_connector(lm, "neural_recursion", 1), lm)
    return folder


NAMES = ("soft", "deep", "generated", "stored", "none")


def ask_mixed(library, file, *flags):
    line = ["mixed", "--prompts", *(str(library / name) for name in NAMES[:4])]
    return evaluation.main([*line, "--input", str(file), *flags])  # 4 new tokens, as the runs


def test_mixed_answers_as_ask_answers_with_each_run(place, model, library, tmp_path, capsys):
    asked = [row["question"] for row in read_lines(place / "train.jsonl")]
    names = [NAMES[i % 5] for i in range(len(asked))]
    records = [{"question": q, "prompt": n} for q, n in zip(asked, names)]
    records += [{"question": asked[0], "task": "deep"}, {"question": asked[0], "task": "unknown"}]
    records += [{"input": "It is", "options": ["Velmor", "here"], "prompt": "generated"}]
    file = write_lines(tmp_path / "asked.jsonl", records)
    answers = ask_mixed(library, file)
    out = capsys.readouterr().out.splitlines()
    asked = [record.get("question", "It is") for record in records]
    assert out == [f"{q}\t{evaluation.one_line(a)}" for q, a in zip(asked, answers)]
    lm, tokenizer = LM.from_pretrained(model), load_tokenizer(model)
    stored = SoftPrompt(torch.randn(6, lm.config.dim, generator=seeded(7)))
    models = {"none": (lm, None, tokenizer), "stored": (lm, lm.read(stored()), tokenizer)}
    models |= {name: load_run(library / name)[:3] for name in NAMES[:3]}
    assert len(set(answers)) > 3
    for record, answer in zip(records, answers):
        name = record.get("prompt", record.get("task"))
        lm, prefix, own = models[name if name in models else "none"]
        options = tuple(record.get("options", ()))
        text = record["input"] if options else data.question_text(record["question"])
        e = data.Example(text, "x", (), options=options)
        ids, choices, _ = prepare(lm, own, [e], None, 4)
        expected = predict(lm, own, ids, prefix, 4, choices, evaluation.stops([e]))[0]
        assert answer == (options[expected] if options else expected), record


def test_a_vote_writes_predictions_that_compare_reads(place, library, tmp_path, capsys):
    file = place / "train.jsonl"
    result = ask_mixed(library, file, "--vote", "--out", str(tmp_path / "vote"))
    each = []
    for name in NAMES[:4]:
        flags = ["--prompts", f"{name}={library / name}", "--input", str(file), "--vote"]
        evaluation.main(["mixed", *flags, "--max-new-tokens", "4", "--out", str(tmp_path / name)])
        each.append([row["prediction"] for row in read_predictions(tmp_path / name)])
    for row, given in zip(read_predictions(tmp_path / "vote"), zip(*each)):
        answer, count = Counter(given).most_common(1)[0]
        assert (row["prediction"], row["votes"]) == (answer, count)
    record = json.loads((tmp_path / "vote" / "score.json").read_text())
    assert record["results"] == result and record["adapter_hash"].keys() == set(NAMES[:4])
    assert record["arguments"]["vote"] and record["file_hash"]
    evaluation.compare(tmp_path / "vote", tmp_path / "soft")
    assert "EM" in capsys.readouterr().out


def test_bad_input_of_mixed_is_one_line(place, library, tmp_path, capsys):
    question = {"question": "where was Anna born"}
    file = write_lines(tmp_path / "q.jsonl", [question, question | {"prompt": "sof"}])
    long = write_lines(tmp_path / "l.jsonl", [{"question": "where " * 99, "answer": "x"}])
    good, soft, connector = place / "train.jsonl", library / "soft", library / "connector"
    other = shutil.copytree(soft, tmp_path / "other")
    text = (soft / "run.json").read_text().replace('"max_new_tokens": 4', '"max_new_tokens": 9')
    (other / "run.json").write_text(text)
    for flags, words in (
        (f"--prompts {soft} --input {file}", "q.jsonl:2: the prompt 'sof' is not one of soft"),
        (f"--prompts {soft} {other} --input {good}", "--max-new-tokens is needed: the runs of"),
        (f"--prompts {soft} {soft} --input {good}", "two are called 'soft'; NAME=FOLDER"),
        (f"--prompts {soft} {connector} --input {good}", "holds a Connector, which is no prompt"),
        (f"--prompts {soft} {tmp_path} --input {good}", "no adapter_config.json"),
        (f"--prompts {soft} --input {file} --out {tmp_path / 'o'}", "q.jsonl:1: needs a list"),
        (f"--prompts {soft} --input {long} --out {tmp_path / 'o'}", "l.jsonl:1: "),
        (f"--prompts {place / 'lm'} --input {good}", "trains more than a prompt, or none"),
        (f"--prompts {soft} --input {tmp_path / 'x'}", "no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["mixed", *flags.split()])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "o").exists()


# What a prompt says


def test_nearest_tokens_by_cosine_and_by_distance(make_lm):
    table = make_lm("tied").embed_tokens.weight
    found = nearest_tokens(torch.stack([3 * table[5], table[9] + 1e-4]), table, k=4)
    (cosines, ids), (distances, near) = found["cosine"], found["distance"]
    assert ids[:, 0].tolist() == [5, 9] and cosines[:, 0].min() > 0.9999
    assert near[1, 0] == 9 and distances[1, 0] == pytest.approx(1e-4 * 32**0.5, rel=1e-2)
    expected = (3 * table[5] - table).norm(dim=1).sort()
    assert near[0].tolist() == expected.indices[:4].tolist()
    close(distances[0], expected.values[:4])
    assert (cosines.diff(dim=1) <= 0).all() and (distances.diff(dim=1) >= 0).all()
    for name, pair in nearest_tokens(2 * table[:9], iter(table.split(10)), 7).items():
        for a, b in zip(pair, nearest_tokens(2 * table[:9], table, 7)[name]):
            close(a, b)


@torch.no_grad()
def test_each_kind_of_prompt_is_explained_by_what_it_can_be_compared_with(mixed):
    lm, tokenizer, (_, _, _, generated, _) = mixed
    table = lm.embed_tokens.weight
    shallow = make_prompt(SoftPrompt(table[[8, 20]] * 2, bos_vector(lm)), lm, tokenizer)
    rows = explain(shallow, lm, 3)
    assert [row["cosine"][0][0] for row in rows] == ["w8", "w20"] and len(rows[0]["distance"]) == 3
    assert rows[1]["norm"] == pytest.approx(2 * table[20].norm().item(), rel=1e-5)
    one = make_prompt(DeepPrompt(lm.read(lm.embed(torch.tensor([[20]])))), lm, tokenizer)
    (row,) = explain(one, lm, 2)  # what the LM stores of a token alone
    assert row["cosine"][0][0] == row["distance"][0][0] == "w20"
    assert row["distance"][0][1] < 1e-3 < row["distance"][1][1]
    texts = ["w5 w9", "w30", "w12 w13 w14"]
    rows = explain(generated, lm, 2, texts)
    drawn = generated.adapter.prompts(data.encode_prompts(tokenizer, texts))
    for i, row in enumerate(rows):
        a, b, c = torch.nn.functional.normalize(drawn[:, i], dim=-1)
        assert row["varies"] == pytest.approx(1 - (a @ b + a @ c + b @ c).item() / 3, abs=1e-5)
        assert row["norm"] == pytest.approx(drawn[:, i].mean(0).norm().item(), rel=1e-4)
    assert explain(generated, lm, 2, texts[:1])[0]["varies"] == 0.0


def test_explain_prints_one_table(library, capsys):
    for name in NAMES[:4]:
        rows = evaluation.main(["explain", str(library / name), "--top", "2"])
        lines = capsys.readouterr().out.splitlines()
        table = lines[-len(rows) :]
        assert len(rows) == {"soft": 4, "deep": 2, "generated": 4, "stored": 6}[name]
        assert lines[0].startswith("norm of the ") and "nearest by cosine" in lines[-len(rows) - 2]
        for row, line in zip(rows, table):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert cells[:2] == [str(row["row"]), f"{row['norm']:.3f}"]
            (token, value), _ = row["distance"]
            assert cells[-1].startswith(f"{token!r} {value:.3f}")
    (library / "generated" / "predictions.jsonl").rename(library / "kept")
    with pytest.raises(SystemExit):
        evaluation.main(["explain", str(library / "generated")])
    assert "--input is a file of some" in capsys.readouterr().err
    (library / "kept").rename(library / "generated" / "predictions.jsonl")


# Where deep prompts start


def test_a_deep_prompt_starts_from_labels_or_from_the_first_tokens(place, tmp_path):
    lm = LM.from_pretrained(place / "lm" / "model")
    table, tokenizer = lm.embed_tokens.weight, load_tokenizer(lm.folder)
    labels = ["Velmor", "Kranstad", "Pornwick", "Delmau"]
    starts = {
        "labels": from_labels(4, table, tokenizer, labels),
        "vocab:3": from_vocab(4, table, 3, seeded(0)),
        "vocab": from_vocab(4, table, 5000, seeded(0)),
    }
    assert not torch.equal(starts["vocab:3"], starts["vocab"])
    for init, expected in starts.items():
        for method in ("deep_prompt", "prompt_tuning"):
            out = tmp_path / f"{method}-{init}".replace(":", "-")
            run(command(place, method, out, f"--lr 0 --steps 1 --init {init}"))
            rows = load_file(out / "adapter_model.safetensors")["prompt_embeddings"]
            deep = method == "deep_prompt"
            close(rows, DeepPrompt(lm.read(expected)).keys_values.detach() if deep else expected)
    for word in ("vocab:0", "vocab:many"):
        with pytest.raises(ValueError, match="vocab:SIZE samples the first SIZE"):
            run(command(place, "deep_prompt", tmp_path / "bad", f"--init {word}"))


# The multi-task protocol


def of_task(task, template, count):
    texts = [f"{task} {template} {i}" for i in range(count)]
    return [data.Example(text, "t", ("t",), task, template=template) for text in texts]


def test_rates_are_those_of_t0():
    """Not above the cap: all examples of a template. Above: the cap over the task's templates."""
    groups = [of_task("big", t, n) for t, n in (("x", 60), ("y", 50), ("z", 30), ("w", 51))]
    groups += [of_task("small", t, 7) for t in "xy"]
    whole = sum(groups, [])
    rows, counts = start.template_rates(whole, 50)
    assert counts == [12, 50, 30, 12, 7, 7]
    assert [[whole[row] for row in part] for part in rows] == groups
    tokens = [data.TokenizedExample([row], [1]) for row in range(len(whole))]
    steps = -(-sum(counts) // 10)
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = start.mixture_batch(tokens, rows, counts, 10, 3, step)
            assert batch.ids[:, 0].tolist() == batch.rows  # rows are those of the tokens
            seen += batch.rows
        assert [sum(row in part for row in seen) for part in rows] == counts
        assert len(set(seen)) == len(seen)
        epochs.append(set(seen))
    assert epochs[0] != epochs[1]


def test_medians_over_templates_by_hand(tmp_path, capsys):
    def record(task, cluster, template, i, f1, em=0.0):
        row = {"task": task, "template": template, "cluster": cluster, "id": f"{template}{i}"}
        return row | {"input": "x", "prediction": "y", "answers": ["z"], "f1": f1, "em": em}

    scores = {"p": [0.1, 0.3], "q": [0.5, 0.7], "r": [0.7, 0.7]}  # means 0.2, 0.6, 0.7
    rows = [record("a", "one", t, i, f) for t, part in scores.items() for i, f in enumerate(part)]
    rows += [record("b", "one", "p", 0, 0.4, 1.0), record("c", "two", "p", 0, 0.0)]
    medians = template_medians(rows)
    assert medians["datasets"]["a"] == {
        "f1": pytest.approx(0.6),
        "em": 0.0,
        "rouge": 0.0,
        "cluster": "one",
        "templates": 3,
        "n": 6,
    }
    assert medians["clusters"]["one"] == {"f1": pytest.approx(0.5), "em": 0.5, "rouge": 0}
    assert (medians["f1"], medians["em"]) == (pytest.approx(1.0 / 3), pytest.approx(1.0 / 3))
    assert mean_over_tasks(rows) == pytest.approx((0.5 + 0.4 + 0.0) / 3)
    write_lines(tmp_path / "predictions.jsonl", rows)
    assert evaluation.main(["templates", str(tmp_path)]) == medians
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one", "50.0", "50.0", "0.0"]
    assert lines[2].split()[:3] == ["a", "60.0", "0.0"] and "3 templates, 6 examples" in lines[2]
    assert lines[-1].split() == ["overall", "33.3", "33.3", "0.0"]


@pytest.mark.parametrize("method", ["id_pt", "prompt_tuning"])
def test_a_run_on_a_folder_of_tasks_follows_the_protocol(place, tmp_path, capsys, method):
    folder = tmp_path / "suite"
    folder.mkdir()
    for name, cluster in (("car", "a"), ("hat", "b")):
        for split, count in (("train", 16), ("dev", 6), ("test", 6)):
            write_lines(folder / f"{name}-{split}.jsonl", suite_rows(name, count, split, cluster))
    flags = f"--train {folder} --dev {folder} --test {folder} --mixture-cap 5 --rank-by mean"
    record = run(command(place, method, tmp_path / "run", f"{flags} --steps 4"))
    rows = read_predictions(tmp_path / "run")
    assert len(rows) == 12 and {r["template"] for r in rows} == {"is", "paint"}
    assert record["medians"] == template_medians(rows)
    assert list(record["medians"]["clusters"]) == ["a", "b"]
    dev = record["results"]["dev"]["tasks"]  # all dev questions are scored along training
    assert record["score"] == pytest.approx((dev["car"]["f1"] + dev["hat"]["f1"]) / 2)
    out = capsys.readouterr().out
    assert "ranked by the mean of their log-probabilities" in out and "overall" in out
    with pytest.raises(ValueError, match="holds no file TASK-dev.jsonl"):
        run(command(place, method, tmp_path / "no", f"--train {folder} --dev {place}"))
    for name in ("a", "b"):  # a run's predictions would have the id twice
        write_lines(folder / f"{name}-test.jsonl", [{"input": "x", "target": "y", "id": "1"}])
    with pytest.raises(ValueError, match="b-test.jsonl:1: the id 1 is taken by .*a-test.jsonl:1"):
        run(command(place, method, tmp_path / "no", f"--train {folder} --test {folder}"))


def test_a_mixture_goes_on_with_the_same_templates_only(place, tmp_path):
    """Without a mixture the templates change no run."""
    rows, lines = suite_rows("car", 4, "train", "a"), {}
    for name, flags in (("mixed", "--mixture-cap 3"), ("plain", "")):
        file = write_lines(tmp_path / "rows.jsonl", rows)
        flags = f"--train {file} --dev {file} --steps 1 {flags}"
        lines[name] = [*command(place, "prompt_tuning", tmp_path / name, flags), "--resume"]
        run(lines[name])
    write_lines(tmp_path / "rows.jsonl", [row | {"template": "is"} for row in rows])
    run(lines["plain"])
    with pytest.raises(ValueError, match="started with other templates"):
        run(lines["mixed"])
    path = tmp_path / "mixed" / "run.json"
    record = json.loads(path.read_text())
    del record["templates_hash"]  # a run of an earlier program
    path.write_text(json.dumps(record))
    run(lines["mixed"])


def test_the_word_suite_stands_for_the_embedded_tasks(monkeypatch):
    from train import parse

    args = parse("--method id_pt --train suite".split())
    assert (args.mixture_cap, args.max_new_tokens, args.dev) == (500, 32, None)
    assert parse("--method id_pt --train suite --mixture-cap 9".split()).mixture_cap == 9
    assert parse("--method id_pt".split()).mixture_cap is None
    monkeypatch.setattr(suite, "TASKS", {"record_nli": suite.TASKS["record_nli"]})
    given = {"train": "suite", "dev": None, "test": None, "world_seed": 1}
    parts = {s: start.load_split(Namespace(**given), s) for s in ("train", "dev", "test")}
    assert [len(part) for part in parts.values()] == [200, 240, 600]
    first = parts["dev"][0]
    assert first.cluster == "natural language inference" and first.template and first.options


def test_beta2_is_that_of_the_recipe():
    module = torch.nn.Linear(2, 2)
    for optimizer in ("adamw", "muon"):
        recipe = Recipe(steps=1, lr=0.1, optimizer=optimizer, beta2=0.999)
        made = make_optimizer(module, recipe)
        adam = made.parts[-1] if optimizer == "muon" else made
        assert {group["betas"] for group in adam.param_groups} == {(0.9, 0.999)}
    assert make_optimizer(module, Recipe(1, 0.1)).param_groups[0]["betas"] == (0.9, 0.95)


def test_template_and_cluster_change_no_run():
    """Data are identified by the repr of their examples, and old runs must go on."""
    a, b = of_task("a", "x", 1)[0], data.Example("a x 0", "t", ("t",), "a")
    assert repr(a) == repr(b)
