"""What each method trains and leaves, whole runs from the command line, and what is embedded."""

import hashlib
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from conftest import randomise, words_tokenizer
from safetensors.torch import load_file
from tiny_runs import (
    HOMES,
    METHODS,
    OBJECTIVES,
    PEOPLE,
    TOWNS,
    command,
    read_lines,
    run,
    stored,
    write_lines,
)
from tokenizers import processors

import adapters
import data
import eval as metrics
import pretrain
import recurse
import start
import train
from checkpoints import load_tokenizer
from fit import target_loss
from generate import option_scores, predict
from model import LM, Config
from questions import prepare
from rerank import Bert
from runs import ASSETS, finished, load_run, read_predictions
from t5 import T5Encoder


def arguments(place, method, flags=""):
    """The parsed flags of a short run."""
    program = pretrain if method in OBJECTIVES else train
    return program.parse(command(place, method, place / "unused", flags)[1:])


# What a run trains and leaves


def test_target_loss_is_the_naive_sum_over_targets():
    torch.manual_seed(0)
    lm = randomise(LM(Config(40, 16, 2, 2, 1, 8, 24, 32)))
    examples = [data.TokenizedExample([1 + i, 2], [3 + i] * (1 + i % 4)) for i in range(5)]
    batch, prompt = data.collate(examples, list(range(5))), torch.randn(3, 16)
    for prefix, P in ((None, 0), (lm.read(prompt), 3)):
        losses = []
        for e in examples:  # one by one, the prompt as if it were tokens
            x = torch.cat([prompt[:P], lm.embed(torch.tensor([e.input + e.target]))[0]])[None]
            logprobs = lm.logits(lm(x)).log_softmax(-1)[0, P + len(e.input) - 1 :]
            losses.append(-sum(logprobs[i, token] for i, token in enumerate(e.target)))
        for without in range(6):  # the first rows have no targets
            targets = batch.targets.clone()
            targets[:without] = data.IGNORE_INDEX
            loss = target_loss(lm, prefix, replace(batch, targets=targets))
            torch.testing.assert_close(loss, sum(losses[without:], torch.tensor(0.0)))


def test_the_last_layer_computes_the_columns_from_the_first_target_on():
    lm, widths = randomise(LM(Config(40, 16, 2, 2, 1, 8, 24, 32))), []
    for block in lm.layers:
        block.mlp.register_forward_hook(lambda _, given, y: widths.append(y.shape[1]))
    examples = [data.TokenizedExample([1] * n, [2, 3]) for n in (5, 9)]
    target_loss(lm, None, data.collate(examples, [0, 1]))
    assert widths == [10, 6]  # of 10 columns the fifth has the first target


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_a_complete_folder_and_the_frozen_lm_as_it_was(place, tmp_path, method):
    """And every trained tensor has moved."""
    file, out = place / "lm" / "model" / "model.safetensors", tmp_path / "run"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    record = run(command(place, method, out))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    alone = method in ("fine_tuning", "pretrain_lm", "pretrain_encoder", "pretrain_bert")
    assert record["weights_before"] == record["weights_after"]
    assert (record["weights_before"] is None) == alone
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names if "unfinished" in name]
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    whole = {"run.json", "metrics.jsonl", "curve.png", "lock"}
    whole |= {"state.safetensors", "state.before.safetensors"}
    whole |= {"model"} if alone else adapter
    if method == "textual_recursion":
        whole |= {"p1", "p1-a", "p1-b", "candidates"}
    assert names == whole | ({"predictions.jsonl"} if method in train.METHODS else set())
    assert json.loads((out / "run.json").read_text())["results"] == record["results"]
    assert record["arguments"]["method"] == method
    if method in train.METHODS:
        rows = read_predictions(out)
        assert metrics.summary(rows) == record["results"]["dev"]
        assert [row["id"] for row in rows] == [f"q{i}" for i in range(5)]
        model, prefix, tokenizer, _ = load_run(out)
        ids, _, prefix = prepare(model, tokenizer, data.read(place / "dev.jsonl"), prefix, 4)
        assert predict(model, tokenizer, ids, prefix, 4) == [row["prediction"] for row in rows]
    run(command(place, method, tmp_path / "still", "--lr 0 --steps 1"))
    first, last = (load_file(tmp_path / k / "state.safetensors") for k in ("still", "run"))
    trained = [name for name in first if name.startswith("trained.")]
    assert trained and not [name for name in trained if torch.equal(first[name], last[name])]


def test_fine_tuning_learns_its_questions_and_dev_chooses_the_best(place, tmp_path):
    flags = "--steps 200 --eval-every 50 --batch-size 8 --lr 0.01"
    record = run(command(place, "fine_tuning", tmp_path / "run", flags))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    scores = {line["step"]: line["score"] for line in lines if "score" in line}
    assert record["results"]["dev"]["em"] == max(scores.values()) == 1.0
    assert record["step"] == min(step for step, score in scores.items() if score == 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_runs_through_with_frozen_weights_in_bf16(place, tmp_path, monkeypatch, method):
    flags, norm, mixed = "--dtype bfloat16 --steps 2", torch.nn.functional.rms_norm, []

    def rms_norm(x, shape, weight=None, eps=None):
        mixed.extend([] if weight is None or weight.dtype == x.dtype else [x.dtype])
        return norm(x, shape, weight, eps)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", rms_norm)
    record = run(command(place, method, tmp_path / "run", flags))
    assert not mixed  # PyTorch has no fused kernel for two dtypes
    assert record["weights_before"] == record["weights_after"] and record["seconds"] > 0
    if method in train.METHODS:  # what is trained is float32
        lm, _ = start.load_lm(arguments(place, method, flags))
        whole = torch.float32 if method == "fine_tuning" else torch.bfloat16
        assert lm.embed_tokens.weight.dtype == whole


@pytest.mark.parametrize("method", ["connector_lm", "textual_recursion"])
def test_compiled_layers_take_training_steps_and_nothing_else(place, tmp_path, monkeypatch, method):
    passes = []

    def compiled(forward, dynamic):
        def run_it(x, *rest):
            passes.append(torch.is_grad_enabled())
            return forward(x, *rest)

        assert dynamic and forward.__self__.config.n_layers == len(forward.__self__)
        return run_it

    monkeypatch.setattr(torch, "compile", compiled)
    plain = run(command(place, method, tmp_path / "plain"))
    assert not passes
    record = run(command(place, method, tmp_path / "compiled", "--compile"))
    assert all(passes) and len(passes) >= 6  # steps
    assert (record["score"], record["results"]) == (plain["score"], plain["results"])


def test_a_frozen_lm_that_changes_is_reported(place, tmp_path, monkeypatch):
    lm, tokenizer = start.load_lm(arguments(place, "connector_lm"))
    real = train.fit

    def careless(*given, **more):
        lm.embed_tokens.weight.data[0] += 1
        return real(*given, **more)

    monkeypatch.setattr(start, "load_lm", lambda args: (lm, tokenizer))
    monkeypatch.setattr(train, "fit", careless)
    with pytest.raises(ValueError, match="weights changed"):
        run(command(place, "connector_lm", tmp_path / "run"))
    assert finished(tmp_path / "run") is None


@pytest.mark.parametrize("limit, seed", [(1, 0), (3, 1), (99, 0)])
def test_dev_scores_along_training_are_of_a_sample(place, tmp_path, monkeypatch, limit, seed):
    """Of exactly so many questions, the same each time. At the end all are asked."""
    asked, score = [], metrics.score

    def note(examples, answers):
        asked.append([example.id for example in examples])
        return score(examples, answers)

    monkeypatch.setattr(metrics, "score", note)
    flags = f"--eval-limit {limit} --seed {seed}"
    run(command(place, "prompt_tuning", tmp_path / "run", flags))
    rows = [f"q{i}" for i in data.sample(5, limit, seed)]
    assert len(rows) == min(limit, 5) and rows == sorted(rows)
    assert asked == [rows] * 3 + [[f"q{i}" for i in range(5)]]


STOPS = [("question", "", "\n"), ("input", "", ""), ("question", "--stop ;", ";")]
STOPS += [("input", "--stop B:", "B:"), ("question", "--stop=", "")]


@pytest.mark.parametrize("form, flag, stop", STOPS)
def test_an_answer_ends_at_the_stop(place, tmp_path, monkeypatch, form, flag, stop):
    """By default at a newline, if the inputs are questions. --eval-tokens is passed on too."""
    seen = []

    def note(model, tokenizer, ids, prefix, new, options, stops, max_tokens, mean):
        seen.append((set(stops), max_tokens))
        return ["right"] * len(ids)

    keys = ("question", "answer") if form == "question" else ("input", "target")
    rows = [dict(zip(keys, (f"who is {name}", "right"))) for name in PEOPLE]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(train, "predict", note)
    flags = f"--train {file} --dev {file} --eval-tokens 77 --steps 2 {flag}"
    record = run(command(place, "connector_lm", tmp_path / "run", flags))
    assert seen == [({stop}, 77)] * 2 and record["results"]["dev"]["em"] == 1.0


# Using what a run trained


def test_a_run_is_asked_and_resumed_from_any_folder(place, tmp_path, monkeypatch):
    """Relative paths mean the folder where the run began, and inputs are asked as in training."""
    (tmp_path / "begin").mkdir()
    monkeypatch.chdir(tmp_path / "begin")
    pairs = [{"input": f"Name: {name}\nTown:", "target": town} for name, town in HOMES]
    write_lines(tmp_path / "begin" / "pairs.jsonl", pairs)
    flags = f"--train pairs.jsonl --dev pairs.jsonl --model {os.path.relpath(place)}/lm/model"
    run(command(place, "connector_lm", tmp_path / "run", flags))
    monkeypatch.chdir(tmp_path)
    answer = read_predictions("run")[0]["prediction"]
    ask = ["ask", "--run", "run", "--max-new-tokens", "4"]
    assert metrics.main([*ask, pairs[0]["input"]]) == [answer]
    flags = "--train begin/pairs.jsonl --dev begin/pairs.jsonl --out run --resume"
    assert run(command(place, "connector_lm", tmp_path / "run", flags))["step"] <= 6


def test_a_run_remembers_a_tokenizer_of_its_own(place, tmp_path, capsys):
    """A base without tokenizer.json is trained with --tokenizer, and asked with the same."""
    model, base = place / "lm" / "model", tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((model / name).read_bytes())
    (tmp_path / "words.json").write_bytes((model / "tokenizer.json").read_bytes())
    flags = f"--model {base} --tokenizer {tmp_path}/words.json"
    run(command(place, "connector_lm", tmp_path / "run", flags))
    answer = read_predictions(tmp_path / "run")[0]["prediction"]
    ask = ["ask", "--run", str(tmp_path / "run"), "--max-new-tokens", "4", "where was Anna born"]
    capsys.readouterr()
    assert metrics.main(ask) == [answer] and capsys.readouterr().out.strip("\n") == answer


def test_if_there_are_options_one_of_them_is_the_answer(place, tmp_path, capsys):
    """Of P3's form: in training, in `eval.py score` of the bare LM, and in that of a run."""
    keys = ("inputs_pretokenized", "targets_pretokenized", "answer_choices", "task")
    rows = [(f"Where does {name} live?", town, TOWNS, "homes") for name, town in HOMES]
    homes = write_lines(tmp_path / "homes.jsonl", [dict(zip(keys, row)) for row in rows])
    flags, out = f"--train {homes} --dev {homes}", tmp_path / "run"
    record = run(command(place, "prompt_tuning", out, flags))
    predictions = [row["prediction"] for row in read_predictions(out)]
    right = sum(answer == town for answer, (_, town) in zip(predictions, HOMES))
    assert set(predictions) <= set(TOWNS)
    assert record["results"]["dev"]["em"] == right / len(PEOPLE)
    scores = metrics.main(["score", str(homes), "--run", str(out)])
    assert scores == record["results"]["dev"] and "homes" in capsys.readouterr().out
    lm, tokenizer = start.load_lm(arguments(place, "prompt_tuning"))
    tokens = data.tokenize(data.read(homes), tokenizer, lm.config.eos[0], 90)
    scores = option_scores(lm, [t.input for t in tokens], [t.options for t in tokens])
    right = sum(TOWNS[row.argmax()] == town for row, (_, town) in zip(scores, HOMES))
    bare = ["score", str(homes), "--model", str(place / "lm" / "model")]
    assert metrics.main(bare)["em"] == right / len(PEOPLE)
    assert metrics.main([*bare, "--limit", "4"])["n"] == 4


def test_load_run_gives_the_composition_of_each_method(make_lm, tmp_path):
    """Also of a record with the earlier names, and of an LM that was trained itself."""
    lm, ids, out = make_lm(), torch.tensor([[4, 5, 6]]), tmp_path / "run"
    lm.save(tmp_path / "lm", tokenizer=words_tokenizer(40))

    def record(folder, **more):
        flags = {"model": str(tmp_path / "lm"), "tokenizer": None} | more
        (folder / "run.json").write_text(json.dumps({"arguments": flags}))

    connector = recurse.new_connector(lm, "lm_connector", 1)
    randomise(connector.layers)
    adapters.save_adapter(out, connector, lm)
    pretrained = {"method": "pretrain_connector", "composition": "lm_connector"}
    for flags in ({"method": "lm_connector"}, pretrained):
        record(out, **flags)
        model, prefix, tokenizer, again = load_run(out)
        assert prefix is None and tokenizer.token_to_id("w7") == 7
        assert again["arguments"]["method"] == flags["method"]
        assert torch.equal(model(model.embed(ids)), connector(lm(lm.embed(ids))))
        assert not any(p.requires_grad for p in model.parameters())
    adapters.save_adapter(tmp_path / "tuned", adapters.SoftPrompt(torch.ones(3, 32)), lm)
    record(tmp_path / "tuned", method="prompt_tuning")
    assert load_run(tmp_path / "tuned")[1].size == 3
    lm.embed_tokens.weight.data.mul_(1.1)
    lm.save(tmp_path / "tuned" / "model", tokenizer=words_tokenizer(40))
    record(tmp_path / "tuned", method="fine_tuning", model="a base that is no longer there")
    model, prefix, *_ = load_run(tmp_path / "tuned")
    assert prefix is None and torch.equal(model(model.embed(ids)), lm(lm.embed(ids)))
    for text in ("{", "[]", "{}", '{"arguments": {}}'):
        (out / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json: not a run record"):
            load_run(out)


# Where training starts


def test_what_a_prompt_starts_from(place, tmp_path):
    """Embeddings of the most frequent answers or of a text, or a stored prompt. A rate of 0 keeps
    the start."""
    lm, tokenizer = start.load_lm(arguments(place, "prompt_tuning"))
    table = lm.embed_tokens.weight

    def rows(text):
        return table[tokenizer.encode(text, add_special_tokens=False).ids]

    wanted = {"labels": torch.stack([rows(town).mean(0) for town in TOWNS])}
    wanted["text:Velmor,Kranstad"] = rows("Velmor,Kranstad")[:4]
    run(command(place, "prompt_tuning", tmp_path / "trained"))
    wanted[str(tmp_path / "trained")] = stored(tmp_path / "trained")["prompt_embeddings"]
    for i, (init, vectors) in enumerate(wanted.items()):
        flags = f"--init {init} --lr 0 --steps 1"
        run(command(place, "prompt_tuning", tmp_path / str(i), flags))
        prompt = stored(tmp_path / str(i))["prompt_embeddings"]
        assert prompt.shape == (4, 32)
        torch.testing.assert_close(prompt[: len(vectors)], vectors)


# Pretraining


def test_held_out_text_is_not_trained_on(tmp_path):
    tokenizer = data.train_tokenizer(["document number 0123456789."], 300)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"document number {i}." for i in range(100)))
    args = pretrain.parse(["lm", "--train", str(file), "--out", str(tmp_path / "run")])
    text = pretrain.tokenize_corpus(args, tokenizer, 300)
    corpora = (text.train, text.held_out)
    trained, held_out = (tokenizer.decode(corpus.tokens.tolist()) for corpus in corpora)
    assert "number 97." in trained and "number 98." not in trained
    assert held_out == "document number 98.document number 99."


ENCODERS = {
    "pretrain_encoder": (T5Encoder, ["<extra_id_0>", "<extra_id_31>"], 60),
    "pretrain_bert": (Bert, ["[CLS]", "[SEP]", "[MASK]"], 120),
}


@pytest.mark.parametrize("method", ENCODERS)
def test_encoders_learn_and_leave_published_folders(place, tmp_path, method):
    """One sentence with six names, twice in every window: little to guess. The tokenizer is the
    LM's and more."""
    kind, names, steps = ENCODERS[method]
    lines = [{"text": f"{name} was born in Velmor."} for name in PEOPLE[:6] * 10]
    text = write_lines(tmp_path / "text.jsonl", lines)
    flags = f"--train {text} --dev {text} --lr 0.02 --batch-size 12 --dim 32 --seq-len 14 --steps"
    run(command(place, "pretrain_lm", tmp_path / "lm", f"{flags} 1"))
    flags = f"{flags} {steps} --eval-every 30 --model {tmp_path}/lm/model"
    record = run(command(place, method, tmp_path / "run", flags))
    words, tokenizer = (load_tokenizer(f / "model") for f in (tmp_path / "lm", tmp_path / "run"))
    size = kind.from_pretrained(tmp_path / "run" / "model").config.vocab_size
    assert size == tokenizer.get_vocab_size()
    assert all(words.get_vocab_size() <= tokenizer.token_to_id(name) < size for name in names)
    assert tokenizer.encode("Anna was born").ids == words.encode("Anna was born").ids
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [-line["score"] for line in lines if "score" in line]
    assert len(losses) == steps // 30
    assert record["results"]["dev"]["loss"] == min(losses) < 1.2  # by frequency it would be 2.2


def test_an_lm_for_another_tokenizer_ends_as_its_texts_do(place, tmp_path):
    """BOS and EOS are what the tokenizer puts around a text, not ids 0."""
    tokenizer = load_tokenizer(place / "lm" / "model")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    marks = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    both = (marks[0][1], (marks[1][1],))
    for name, template, expected in (("both", "<s> $A </s>", both), ("none", "$A", (None, ()))):
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=marks)
        tokenizer.save(str(tmp_path / f"{name}.json"))
        flags = f"--tokenizer {tmp_path}/{name}.json --steps 1"
        run(command(place, "pretrain_lm", tmp_path / name, flags))
        config = LM.from_pretrained(tmp_path / name / "model").config
        assert (config.bos, config.eos) == expected


def test_a_loss_too_large_for_a_perplexity_is_still_a_result(place, tmp_path):
    record = run(command(place, "pretrain_lm", tmp_path, "--lr 100 --warmup 0 --steps 2 --resume"))
    assert record["results"]["dev"]["loss"] > 710
    assert math.isfinite(record["results"]["dev"]["perplexity"])


# The embedded models


def test_embedded_connectors_belong_to_the_embedded_lm_and_are_where_training_starts():
    lm = LM.from_pretrained(ASSETS / "lm")
    folders = [path.parent for path in ASSETS.glob("*/adapter_config.json")]
    assert ASSETS / "neural_recursion_2" in folders  # the main job's
    for folder in folders:
        method, layers = folder.name.rsplit("_", 1)
        args = train.parse(["--method", method, "--connector-layers", layers])
        started = start.start_connector(start.Task(args, lm, None, {}, {}, None))
        connector = adapters.load_adapter(folder, lm)
        assert adapters.read_adapter_config(folder)["method"] == method
        assert len(connector.layers) == int(layers)
        pairs = zip(started.parameters(), connector.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_assets_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 32 * 2**20
