"""Several passes: more than two, without training, a first pass that is computed only
once, and filler after the question."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import QUESTIONS, build, close
from safetensors.torch import save_file
from tiny_runs import command, read_lines, run, same_runs, stored, write_lines

import adapters
import data
import recurse
import start
import train
from checkpoints import skip_init
from data import TokenizedExample, collate
from fit import target_loss
from generate import predict
from model import LM, Config
from questions import prepare
from runs import load_run, read_predictions


def answers(folder):
    """(predictions of the run, the same questions answered by what load_run returns)."""
    rows, (model, prefix, tokenizer, _) = read_predictions(folder), load_run(folder)
    ids = [tokenizer.encode(row["input"]).ids for row in rows]
    return [row["prediction"] for row in rows], predict(model, tokenizer, ids, prefix, 4)


# Connectors


@pytest.mark.parametrize("layers, millions", [(1, 200), (2, 400)])
def test_connectors_of_the_papers_7b_lm_have_200m_parameters_a_layer(layers, millions):
    """J1-Large: 32 layers of width 4096 (Levine et al. 2022, section 4.2)."""
    shape = dict(gated=False, layer_norm=True, activation="gelu", learned_positions=True)
    with torch.device("meta"), skip_init():
        lm = LM(Config(256_000, 4096, 32, 32, 32, 128, 4 * 4096, 2048, **shape))
        connector = adapters.Connector(lm.new_layers(layers))
    count = sum(p.numel() for p in connector.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)
    assert sum(p.numel() for p in lm.layers.parameters()) == pytest.approx(6.4e9, rel=0.01)


@pytest.mark.parametrize("between, copies", [("shared", 1), ("each", 3)])
def test_more_passes_are_trained_stored_and_loaded(place, tmp_path, between, copies):
    flags = f"--passes 4 --connectors {between}"
    record = run(command(place, "neural_recursion", tmp_path / "run", flags))
    one = run(command(place, "neural_recursion", tmp_path / "one", "--steps 1"))
    assert record["trained_parameters"] == copies * one["trained_parameters"]
    saved, answered = answers(tmp_path / "run")
    assert saved == answered
    still = f"{flags} --lr 0 --steps 1 --init {tmp_path}/run"
    run(command(place, "neural_recursion", tmp_path / "again", still))
    before, after = stored(tmp_path / "run"), stored(tmp_path / "again")
    assert before.keys() == after.keys() and len(before) == copies * len(stored(tmp_path / "one"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_connector_of_two_passes_starts_every_gap_of_more(place, tmp_path):
    run(command(place, "neural_recursion", tmp_path / "two"))
    flags = f"--init {tmp_path}/two --passes 3 --connectors each --lr 0 --steps 1"
    run(command(place, "neural_recursion", tmp_path / "three", flags))
    two, three = stored(tmp_path / "two"), stored(tmp_path / "three")
    assert three.keys() == {f"{gap}.{name}" for gap in "01" for name in two}
    assert all(torch.equal(tensor, two[name[2:]]) for name, tensor in three.items())


def test_random_connectors_of_several_gaps_differ_and_are_pretrained(place, tmp_path):
    flags = "--passes 3 --connectors each --lr 0 --steps 1"
    run(command(place, "pretrain_connector", tmp_path / "run", flags))
    weights = stored(tmp_path / "run")
    names = [name for name, tensor in weights.items() if name[0] == "0" and tensor.dim() == 2]
    assert names and not any(torch.equal(weights[n], weights[f"1{n[1:]}"]) for n in names)


def test_a_connector_may_have_more_layers_than_the_lm(place, tmp_path):
    """The control of equal compute: one pass, with as many trained layers as a second pass."""
    record = run(command(place, "connector_lm", tmp_path / "run", "--connector-layers 3"))
    one = run(command(place, "connector_lm", tmp_path / "one", "--connector-layers 1 --steps 1"))
    norm = 32  # of the Connector's output
    assert record["trained_parameters"] - norm == 3 * (one["trained_parameters"] - norm)
    saved, answered = answers(tmp_path / "run")
    assert saved == answered


@pytest.mark.parametrize("method", recurse.CONNECTOR_METHODS)
def test_a_residual_connector_starts_beside_the_lm_and_is_loaded_again(place, tmp_path, method):
    """With no gain it adds nothing to the LM. A Connector that is not residual can start it."""
    run(command(place, method, tmp_path / "start", "--init random --steps 1 --lr 0"))
    tensors = stored(tmp_path / "start")
    tensors["norm.weight"] = torch.zeros_like(tensors["norm.weight"])
    save_file(tensors, tmp_path / "start" / "adapter_model.safetensors")
    flags = f"--init {tmp_path}/start --residual on --eval-every 12"
    run(command(place, method, tmp_path / "none", f"{flags} --steps 1 --lr 0"))
    stack, _, tokenizer, _ = load_run(tmp_path / "none")
    rows = read_predictions(tmp_path / "none")
    ids = [tokenizer.encode(row["input"]).ids for row in rows]
    assert predict(stack.lm, tokenizer, ids, None, 4) == [row["prediction"] for row in rows]
    run(command(place, method, tmp_path / "run", f"{flags} --steps 12 --lr 0.1"))
    saved, answered = answers(tmp_path / "run")
    assert saved == answered != [row["prediction"] for row in rows]
    config = adapters.read_adapter_config(tmp_path / "run")
    assert config["residual"] is True


def test_an_adapter_config_with_impossible_passes_is_refused(make_lm, tmp_path):
    lm = make_lm()
    connectors = [recurse.new_connector(lm, "neural_recursion", 1) for _ in "ab"]
    adapters.save_adapter(tmp_path, adapters.Connectors(connectors, 3), lm)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"passes": 2}, {"passes": "3"}, {"connectors": 3}, {"connectors": None}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"{tmp_path}: passes is .* and connectors is"):
            adapters.load_adapter(tmp_path, lm)


# Without training


def test_the_training_free_loop_is_only_scored(place, tmp_path):
    record = run(command(place, "training_free", tmp_path / "run"))
    assert record["trained_parameters"] == record["step"] == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "predictions.jsonl", "lock"}
    saved, answered = answers(tmp_path / "run")
    assert saved == answered and len(saved) == record["results"]["dev"]["n"]


# A prompt with the Connectors' pretraining


def test_a_prompt_is_pretrained_on_text_and_starts_prompt_tuning(place, tmp_path):
    flags = "--steps 30 --lr 0.05 --eval-every 30"
    record = run(command(place, "pretrain_prompt", tmp_path / "text", flags))
    first = run(command(place, "pretrain_prompt", tmp_path / "start", "--steps 1 --lr 0"))
    loss, before = (r["results"]["dev"]["loss"] for r in (record, first))
    assert loss < before - 0.01
    flags = f"--init {tmp_path}/text --lr 0 --steps 1"
    run(command(place, "prompt_tuning", tmp_path / "run", flags))
    assert torch.equal(*(stored(tmp_path / k)["prompt_embeddings"] for k in ("text", "run")))


# The first pass, kept

TEXTS = [TokenizedExample(ids, [ids[0] + i, 3]) for i, ids in enumerate(QUESTIONS[::-1])]


kept = ["neural_recursion", "lm_connector", "three_passes"]
kept += [f"residual {kind}" for kind in kept]


@pytest.mark.parametrize("method", kept)
def test_the_kept_first_pass_gives_the_loss_and_gradient_of_one_inside_the_step(make_lm, method):
    lm = make_lm("learned")
    stack, _ = build(method, lm)
    cache = recurse.FirstPass(lm, [(e.input + e.target)[:-1] for e in TEXTS], batch_size=3)
    for rows in ([2, 0], [1], [3, 1, 0, 2]):
        batch = collate([TEXTS[row] for row in rows], rows)
        x = cache(batch.rows, batch.ids.shape[1])
        second = stack.after_first(lm.embed(batch.ids))
        loss = target_loss(stack, None, batch), target_loss(second, None, batch, x)
        trained = [p for p in stack.parameters() if p.requires_grad]
        gradients = [torch.autograd.grad(part, trained) for part in loss]
        close(*loss, 1e-5)
        for a, b in zip(*gradients):
            close(a, b, 1e-4)
    assert not cache.states.requires_grad


def test_a_run_reads_its_texts_once_and_learns_the_same(place, tmp_path, monkeypatch, capsys):
    """Six steps of three are more than one epoch of eight questions. Losses agree to rounding."""
    computed, compute = [], recurse.FirstPass.compute
    monkeypatch.setattr(
        recurse.FirstPass, "compute", lambda cache: (computed.append(cache), compute(cache))
    )
    losses = {}
    for size in ("1", "0", "1e-9"):
        flags = f"--cache-first-pass {size}"
        run(command(place, "neural_recursion", tmp_path / size, flags))
        losses[size] = [r["loss"] for r in read_lines(tmp_path / size / "metrics.jsonl")]
        shown = capsys.readouterr().out
        assert ("computed once and kept" in shown) == (size == "1")
        assert ("more than --cache-first-pass" in shown) == (size != "1")
    assert len(computed) == 1 and losses["0"] == losses["1e-9"]
    assert losses["1"] == pytest.approx(losses["0"], rel=1e-4)
    flags = "--cache-first-pass 1 --steps 2"  # fewer questions than an epoch has
    run(command(place, "neural_recursion", tmp_path / "short", flags))
    assert len(computed) == 1


# Filler after the question


def test_without_filler_nothing_changes(place, tmp_path):
    run(command(place, "neural_recursion", tmp_path / "a"))
    run(command(place, "neural_recursion", tmp_path / "b", "--pause 0 --pause-text so"))
    same_runs(tmp_path / "a", tmp_path / "b")


def test_a_text_as_filler_equals_questions_that_end_with_it(place, tmp_path):
    """Token for token, in training and when the run is asked, and bit for bit in what is learnt."""
    flags = ["--pause", "2", "--pause-text", r"\nso:"]
    examples = data.read(place / "train.jsonl")
    longer = [replace(e, input=e.input + "\nso:\nso:") for e in examples]
    rows = [{"id": e.id, "input": e.input, "target": e.target, "task": e.task} for e in longer]
    file = write_lines(tmp_path / "longer.jsonl", rows)
    files = ["--train", str(file), "--dev", str(file), "--stop", ""]
    own = ["--dev", str(place / "train.jsonl"), "--stop", ""]
    run([*command(place, "neural_recursion", tmp_path / "filled"), *own, *flags])
    run([*command(place, "neural_recursion", tmp_path / "longer"), *files])
    a, b = stored(tmp_path / "filled"), stored(tmp_path / "longer")
    assert all(torch.equal(a[name], b[name]) for name in a)
    tokens = []
    for more in ([*own, *flags], files):
        args = train.parse([*command(place, "neural_recursion", tmp_path / "new"), *more][1:])
        tokens.append(start.load_task(args, *start.load_lm(args)).tokens)
    assert tokens[0] == tokens[1]
    model, prefix, tokenizer, _ = load_run(tmp_path / "filled")
    ids, *_ = prepare(model, tokenizer, examples, prefix, 4)  # as `eval.py ask --run` asks
    assert ids == [e.input for e in tokens[0]["train"]]
    predictions = [read_predictions(tmp_path / name) for name in ("filled", "longer")]
    assert len({tuple(row["prediction"] for row in rows) for rows in predictions}) == 1
    assert [row["input"] for row in predictions[0]] == [e.input for e in examples]
    config = adapters.read_adapter_config(tmp_path / "filled")
    assert (config["pause"], config["pause_text"]) == (2, r"\nso:")
    (tmp_path / "filled" / "pause.safetensors").touch()  # of an earlier program
    with pytest.raises(ValueError, match="filled: its questions end with trained filler"):
        load_run(tmp_path / "filled")
