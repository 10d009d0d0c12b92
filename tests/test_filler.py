"""Filler of trained vectors: it starts as the text, is trained and stored with the adapter, and is
read again wherever the run is used."""

import pytest
import torch
from conftest import close, words_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import command, die_at_5, read_lines, run, same_runs

import data
import eval as metrics
import fit
import generate
import plan
import train
from data import encode_prompts
from filler import FILE, Filler
from generate import predict
from questions import prepare
from runs import load_run, read_predictions

TEXT = r"--pause 2 --pause-text \nA:"
FLAGS = f"{TEXT} --pause-trained"
METHODS = [m for m in train.METHODS if m not in ("training_free", *train.OPEN_BOOK)]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(fit, "draw_curve", lambda run, history: None)


def vectors(folder):
    return load_file(folder / FILE)["vectors"]


def answers(folder, file):
    """What the loaded run answers to the questions of a file."""
    model, prefix, tokenizer, _ = load_run(folder)
    examples = data.read(file)
    stops = metrics.stops(examples, None)
    ids, options, prefix = prepare(model, tokenizer, examples, prefix, 4, stops=stops)
    return predict(model, tokenizer, ids, prefix, 4, options, stops)


def made(lm, count: int = 2, words: int = 40) -> Filler:
    arguments = {"pause": count, "pause_text": " w3 w4", "pause_trained": True}
    return Filler.of(arguments, lm, words_tokenizer(words))


# The vectors


def test_filler_tokens_stand_behind_a_text_and_begin_as_its_tokens(make_lm):
    """The table of the LM has 67 rows and the tokenizer 40 words: the others are no filler."""
    lm = make_lm()
    filler = made(lm)
    (ids,) = encode_prompts(filler.tokenizer, ["w5 w6" + filler.text])
    assert ids == [5, 6, 40, 41, 42, 43] and filler.tokenizer.decode(ids) == "w5 w6"
    model = filler.around(lm)
    same = torch.tensor([[5, 6, 3, 4, 3, 4]])
    assert torch.equal(model.embed(torch.tensor([ids])), lm.embed(same))
    filler.vectors.data += 1.0
    x, own = model.embed(torch.tensor([[41, 44, 66]]))[0], lm.embed(torch.tensor([[4, 44, 66]]))[0]
    close(x[0], own[0] + 1)
    assert torch.equal(x[1:], own[1:]) and model.config.vocab_size == 67
    model.embed(torch.tensor([ids[:3]])).sum().backward()
    assert filler.vectors.grad.sum(1).tolist() == [lm.config.dim, 0, 0, 0]
    assert model.logits(x).shape[-1] == 67 and model.fingerprint() == lm.fingerprint()


def test_more_tokens_than_the_table_has_rows(make_lm):
    model = made(make_lm(), words=67).around(make_lm())
    assert model.config.vocab_size == 71
    predict(model, words_tokenizer(67), [[5, 67, 70]], None, 3)  # and no id is refused


def test_a_text_or_a_tokenizer_that_cannot_be_filler_is_refused(make_lm):
    arguments = {"pause": 1, "pause_text": " ", "pause_trained": True}
    with pytest.raises(ValueError, match="--pause-text ' ' has no tokens"):
        Filler.of(arguments, make_lm(), words_tokenizer(40))
    with pytest.raises(ValueError, match="has the token 40 already"):
        twice = made(make_lm()).tokenizer
        Filler.of(arguments | {"pause_text": "w3"}, make_lm(), twice)


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_with_the_text_and_trains_the_vectors(place, tmp_path, method):
    first, records = {}, {}
    for name, flags in (("text", TEXT), ("new", FLAGS)):
        line = command(place, method, tmp_path / name, f"{flags} --no-cross-fit --steps 1 --lr 0")
        records[name] = run(line)
        one = tmp_path / name / ("p1" if method == "textual_recursion" else "")
        predictions = [row["prediction"] for row in read_predictions(one)]
        first[name] = [row["loss"] for row in read_lines(one / "metrics.jsonl")], predictions
    assert first["text"][0] == pytest.approx(first["new"][0], rel=1e-6)
    assert first["text"][1] == first["new"][1]
    start = vectors(tmp_path / "new")
    more = records["new"]["trained_parameters"] - records["text"]["trained_parameters"]
    assert more == start.numel() > 0

    more = f"{FLAGS} --no-cross-fit --steps 3 --lr 0.05"
    record = run(command(place, method, tmp_path / "run", more))
    assert not (vectors(tmp_path / "run") == start).all(1).any()
    assert record["weights_before"] == record["weights_after"]
    assert (record["weights_before"] is None) == (method == "fine_tuning")
    saved = [row["prediction"] for row in read_predictions(tmp_path / "run")]
    assert answers(tmp_path / "run", place / "dev.jsonl") == saved
    model, _, tokenizer, _ = load_run(tmp_path / "run")
    (ids,) = encode_prompts(tokenizer, [model.filler])
    assert torch.equal(model.embed(torch.tensor(ids[-len(start) :])), vectors(tmp_path / "run"))
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert {"trained.filler.vectors", "best.filler.vectors"} <= state.keys()


@pytest.mark.parametrize("method", ["neural_recursion", "fine_tuning"])
def test_a_killed_run_ends_with_the_same_bits(place, tmp_path, monkeypatch, method):
    run(command(place, method, tmp_path / "whole", FLAGS))
    line = command(place, method, tmp_path / "killed", FLAGS)
    die_at_5(monkeypatch, line)
    run([*line, "--resume"])
    same_runs(tmp_path / "whole", tmp_path / "killed")


def test_every_stage_has_vectors_of_its_own_and_starts_from_the_one_before(place, tmp_path):
    flags = f"{FLAGS} --rounds 2 --no-cross-fit --steps 1"
    run(command(place, "textual_recursion", tmp_path / "run", f"{flags} --lr 0.05"))
    p1, p2, last = (vectors(tmp_path / "run" / name) for name in ("p1", "p2", ""))
    assert not torch.equal(p1, p2) and not torch.equal(p2, last)
    model, *_ = load_run(tmp_path / "run")
    assert [torch.equal(lm.vectors, v) for (lm, _), v in zip(model.stages, (p1, p2))] == [True] * 2
    run(command(place, "textual_recursion", tmp_path / "still", f"{flags} --lr 0"))
    a, b, c = (vectors(tmp_path / "still" / name) for name in ("p1", "p2", ""))
    assert torch.equal(a, b) and torch.equal(b, c)
    flags = f"{FLAGS} --steps 1 --lr 0.05"  # those of the halves leave no trace in p1
    run(command(place, "textual_recursion", tmp_path / "halves", flags))
    assert torch.equal(vectors(tmp_path / "halves" / "p1"), p1)


def test_a_run_with_trained_filler_starts_another(place, tmp_path):
    run(command(place, "connector_lm", tmp_path / "a", f"{FLAGS} --lr 0.05"))
    line = command(place, "connector_lm", tmp_path / "b", f"{FLAGS} --init {tmp_path}/a --lr 0")
    run(line)
    assert torch.equal(vectors(tmp_path / "a"), vectors(tmp_path / "b"))
    for flags, words in {
        "--pause 2": "a: its questions end with trained filler: --pause-trained",
        "--pause 3 --pause-trained": "misshapen: vectors is",
    }.items():
        more = f"--init {tmp_path}/a {flags}"
        with pytest.raises(ValueError, match=words):
            run(command(place, "connector_lm", tmp_path / "c", more))
        assert not (tmp_path / "c").exists()
    whole = load_file(tmp_path / "a" / FILE)
    save_file({"vectors": whole["vectors"]}, tmp_path / "a" / FILE)  # without a fingerprint
    with pytest.raises(ValueError, match=f"{FILE}: belongs to another LM, or to none"):
        load_run(tmp_path / "a")
    (tmp_path / "a" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {FILE} there"):
        load_run(tmp_path / "a")
    with pytest.raises(ValueError, match="from another adapter"):
        run([*line, "--resume"])


def test_a_run_is_used_and_planned(place, tmp_path, capsys):
    record = run(command(place, "neural_recursion", tmp_path / "run", FLAGS))
    line = ["score", str(place / "dev.jsonl"), "--run", str(tmp_path / "run"), "--threshold", "-9"]
    assert metrics.main(line)["n"] == 5
    text = data.read(place / "dev.jsonl")[0].input
    result = generate.main([str(tmp_path / "run"), text, "--max-new-tokens", "3"])
    model, prefix, tokenizer, _ = load_run(tmp_path / "run")
    ids = tokenizer.encode(text).ids
    nats = -generate.option_scores(model, [ids[:1]], [[ids[1:]]], prefix, mean=True)[0].item()
    assert result["nats"] == pytest.approx(nats)  # of the text alone
    assert text in capsys.readouterr().out
    line = command(place, "neural_recursion", tmp_path / "plan", FLAGS)[1:]
    table, operations, shown = plan.estimate(plan.parse(line))
    assert f" {record['trained_parameters']:,} parameters trained" in shown
    fixed = [word for word in line if word != "--pause-trained"]
    bare, fewer, _ = plan.estimate(plan.parse([*fixed, "--cache-first-pass", "0"]))
    assert table["activations"] > bare["activations"]
    assert operations["a step"] > fewer["a step"]  # there is a backward pass through the first pass


REFUSED = r"""
neural_recursion --pause-trained                               | --pause-trained: needs --pause
training_free --pause 1 --pause-trained                        | training_free trains nothing
lm_connector --pause 1 --pause-trained --cache-first-pass 1    | --cache-first-pass: not with
reader --pause 1 --pause-trained                               | --pause 1: not for reader
prompt_tuning --pause 1 --pause-trained --per-task             | --per-task: not for
fine_tuning --pause 1 --pause-trained --checkpoint-activations | --checkpoint-activations: not for
"""


@pytest.mark.parametrize("row", REFUSED.strip().split("\n"))
def test_flags_that_do_not_fit_are_refused(row):
    line, words = row.split(" | ")
    with pytest.raises(ValueError, match=words):
        train.check_flags(train.parse(["--method", *line.split()]))
    assert train.parse(["--method", "id_pt", *FLAGS.split()]).cache_first_pass == 0
    assert train.parse(["--method", "id_pt"]).cache_first_pass == 1
