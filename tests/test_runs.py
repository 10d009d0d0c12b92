"""What a run owes when things around it go wrong: outputs, disks, names, moved folders."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

from show import run_program

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import ROOT, command, die_at_5, make_place, read_lines, run, same_runs, write_lines

import eval as metrics
from checkpoints import load_tokenizer
from model import LM
from runs import Run, arguments, load_run

# What only shows

FILES_OF_A_RUN = {"adapter_config.json", "adapter_model.safetensors", "predictions.jsonl", "lock"}
FILES_OF_A_RUN |= {"run.json", "metrics.jsonl", "curve.png"}
FILES_OF_A_RUN |= {"state.safetensors", "state.before.safetensors"}


@pytest.fixture(scope="module")
def accents(tmp_path_factory):
    """A folder with questions that ASCII, and Latin-1, cannot write."""
    place = make_place(tmp_path_factory.mktemp("accents"))
    lines = [{"question": f"who is Beyoncé 碧 {i}", "answer": ["Zoë"]} for i in range(4)]
    write_lines(place / "train.jsonl", lines)
    write_lines(place / "dev.jsonl", lines)
    return place


def is_whole(run):
    return {path.name for path in run.iterdir()} == FILES_OF_A_RUN and "results" in json.loads(
        (run / "run.json").read_text()
    )


class Gone(io.StringIO):
    """A stream whose reader has left, like that of `| head -1`, or a full disk."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def letters(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding)


STREAMS = {
    "ascii": ("stdout", lambda: letters("ascii")),
    "latin-1": ("stdout", lambda: letters("latin-1")),
    "left": ("stdout", lambda: Gone(BrokenPipeError(32, "Broken pipe"))),
    "full": ("stdout", lambda: Gone(OSError(28, "No space left on device"))),
    "closed": ("stdout", closed),
    "no output": ("stdout", lambda: None),
    "no errors": ("stderr", lambda: None),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_cannot_be_written_costs_no_result(accents, tmp_path, monkeypatch, case):
    name, make = STREAMS[case]
    monkeypatch.setattr(sys, name, make())
    run(command(accents, "neural_recursion", tmp_path / "run"))
    assert is_whole(tmp_path / "run")


def test_a_name_that_reads_like_a_formula_costs_no_result(accents, tmp_path):
    for name in ("costs $5 碧", r"$x$ and $\frac$ 50% {a} _b_ ^c^"):
        run([*command(accents, "prompt_tuning", tmp_path), "--out", str(tmp_path / name)])
        assert is_whole(tmp_path / name)


def test_an_answer_that_cannot_be_shown_costs_no_result(accents, tmp_path, monkeypatch, capsys):
    """A question that fills the context leaves the bare LM no place for its own answer."""
    tokenizer = load_tokenizer(accents / "lm" / "model")
    fits = (text for n in range(96) if len(tokenizer.encode(text := "why " * n).ids) > 82)
    file = write_lines(tmp_path / "full.jsonl", [{"question": next(fits), "answer": ["so"]}])
    flags = f"--train {file} --dev {file} --max-new-tokens 1"
    run(command(accents, "neural_recursion", tmp_path / "run", flags))
    assert is_whole(tmp_path / "run") and "no examples: " in capsys.readouterr().out


def test_a_picture_that_cannot_be_drawn_costs_no_result(accents, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    assert run(command(accents, "prompt_tuning", tmp_path / "run"))["results"]
    assert "no curve.png: no fonts\n" in capsys.readouterr().out


SHELL = [  # how a shell calls it, variables of the environment, lines of standard error at most
    ("{} | head -1", {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, 1),
    ("{} >&- 2>&- <&-", {"MPLBACKEND": "nonsense"}, 0),
    ("{} > /dev/full", {"PYTHONIOENCODING": "ascii"}, 1),
    ("{} 2> /dev/full", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0),
]


@pytest.mark.parametrize("shell, variables, lines", SHELL)
def test_the_same_in_a_shell(accents, tmp_path, shell, variables, lines):
    line = command(accents, "neural_recursion", tmp_path / "run")
    call = shell.format(shlex.join([sys.executable, str(ROOT / line[0]), *line[1:]]))
    environment = os.environ | variables
    bash = ["bash", "-o", "pipefail", "-c", call]
    result = subprocess.run(bash, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stderr.splitlines()) <= lines, result.stderr
    assert is_whole(tmp_path / "run")


SHOWN = ["data.py {}/train.jsonl", "generate.py {}/lm/model Beyonc\u00e9 --max-new-tokens 1"]
SHOWN += ["adapters.py {}/adapter"]


@pytest.mark.parametrize("line", SHOWN)
def test_programs_that_only_show_escape_what_ascii_lacks(accents, line):
    (accents / "adapter").mkdir(exist_ok=True)
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "Beyonc\u00e9"}
    (accents / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    vectors = {"prompt_embeddings": torch.zeros(1, 32)}
    save_file(vectors, accents / "adapter" / "adapter_model.safetensors")
    call = [sys.executable, *line.format(accents).split()]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "\\xe9" in result.stdout, result.stderr


# What is written, and what is named


FULL = "I/O error: No space left on device (os error 28)"
FULL_DISKS = [  # what cannot write, how often it could before, what it raises
    ("runs.save_file", 1, SafetensorError(FULL)),
    ("runs.save_file", 2, OSError(28, FULL)),
    ("runs.save_file", 0, SafetensorError(FULL)),
    ("checkpoints.save_file", 1, SafetensorError(FULL)),
    ("checkpoints.save_file", 0, OSError(28, FULL)),
    ("runs.Run.log", 4, OSError(28, FULL)),
]


@pytest.mark.parametrize("writer, number, error", FULL_DISKS)
def test_a_full_disk_is_one_line_and_costs_the_steps_since_the_last_checkpoint(
    place, tmp_path, monkeypatch, capsys, writer, error, number
):
    line = command(place, "neural_recursion", tmp_path / "run")
    state, kept, real = tmp_path / "run" / "state.safetensors", [], resolve_name(writer)

    def full(*given, **more):
        kept.append(state.read_bytes() if state.is_file() else None)
        if len(kept) <= number:
            return real(*given, **more)
        if writer != "runs.Run.log":
            Path(given[1]).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(SystemExit) as stop:
            run_program("train.py", lambda: run(line))
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and len(shown.splitlines()) == 1
    assert all(word in shown for word in ("No space left", str(tmp_path / "run"), "--resume"))
    assert shown.count("cannot be written") <= 1 and "Errno" not in shown
    assert not list((tmp_path / "run").glob("*unfinished"))
    assert (state.read_bytes() if state.is_file() else None) == kept[-1]
    run([*line, "--resume"])
    run(command(place, "neural_recursion", tmp_path / "whole"))
    same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_default_that_only_readers_read_stops_no_other_run(tmp_path):
    for method in ("id_pt", "reader"):
        arguments = {"method": method, "encoder_lr": 3e-4}
        (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments}))
        again = Run(tmp_path, arguments | {"encoder_lr": None}, resume=True)
        if method == "id_pt":
            again.check()
    with pytest.raises(ValueError, match="started with --encoder-lr 0.0003, not None"):
        again.check()


def test_a_finished_run_that_is_resumed_keeps_its_speed(place, tmp_path):
    """Also if its state is of a program that did not count tokens."""
    line = command(place, "connector_lm", tmp_path / "run")
    speed, path = run(line)["tokens_per_second"], tmp_path / "run" / "state.safetensors"
    assert run([*line, "--resume"])["tokens_per_second"] == speed > 0
    with safe_open(path, "pt") as file:
        counts = json.loads(file.metadata()["json"])
    del counts["tokens"], counts["step_seconds"]
    save_file(load_file(path), path, {"json": json.dumps(counts)})
    assert run([*line, "--resume"])["tokens_per_second"] == speed


def test_a_resumed_run_records_the_threads_of_its_start_and_of_later(place, tmp_path, monkeypatch):
    line = command(place, "connector_lm", tmp_path / "run")
    first, records = run(line), []
    for threads in (1, 3, 3, 2):
        monkeypatch.setattr("torch.get_num_threads", partial(int, threads))
        records.append(run([*line, "--resume"]))
    later = [[r["hardware"]["threads"] for r in record.get("resumed", [])] for record in records]
    assert later == [[], [3], [3], [3, 2]]
    assert all(record["hardware"] == first["hardware"] for record in records)
    assert first["hardware"]["threads"] == 1 and records[-1]["versions"] == first["versions"]


@pytest.mark.parametrize("key", ["train", "dev", "test"])
def test_the_word_suite_is_not_looked_up_as_a_path(tmp_path, monkeypatch, key):
    (tmp_path / "suite").mkdir()
    monkeypatch.chdir(tmp_path)
    assert arguments(Namespace(**{key: "suite"})) == {key: "suite"}
    assert arguments(Namespace(**{key: "./suite"})) == {key: str(tmp_path / "suite")}


@pytest.mark.parametrize("word", ["random", "vocab", "labels", "text:run", f"text:{'so ' * 99}"])
def test_a_word_of_init_is_not_looked_up_as_a_path(place, tmp_path, monkeypatch, word):
    """Not in a folder that holds a file or a folder of that name, and however long it is."""
    line = command(place, "prompt_tuning", tmp_path / "a", "--lr 0 --steps 1 --init")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    record = run([*line, word])
    monkeypatch.chdir(tmp_path)
    for name in ("random", "text:run"):
        (tmp_path / name).write_text("a file")
    run(command(place, "prompt_tuning", tmp_path / "vocab"))
    run(command(place, "prompt_tuning", tmp_path / "labels"))
    line[line.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    again = run([*line, word])
    assert again["arguments"]["init"] == record["arguments"]["init"] == word
    prompts = [
        load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"]
        for name in "ab"
    ]
    assert torch.equal(*prompts) and run([*line, word, "--resume"])["step"] == 1
    if word in ("random", "vocab"):  # a Connector knows the first, and "./" makes the other a path
        start = "random" if word == "random" else "./labels"
        kind = "connector_lm" if word == "random" else "prompt_tuning"
        run(command(place, kind, tmp_path / "c", f"--steps 1 --init {start}"))


# Runs that were moved

MOVED = [("prompt_tuning", "--init {}/prompt --tokenizer {}/lm/model/tokenizer.json")]
MOVED += [("neural_recursion", ""), ("fine_tuning", ""), ("pretrain_bert", "")]


@pytest.mark.parametrize("method, flags", MOVED)
@pytest.mark.parametrize("typed", ["here", "there"])
def test_a_run_moved_together_with_what_it_reads_is_resumed(
    place, tmp_path, monkeypatch, method, flags, typed
):
    """The command may still name the earlier paths."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(place, here)
    run(command(here, "prompt_tuning", here / "prompt", "--steps 1"))
    die_at_5(monkeypatch, command(here, method, here / "runs" / "a", flags.format(here, here)))
    here.rename(there)
    flags = flags.format(*[tmp_path / typed] * 2)
    run(command(tmp_path / typed, method, there / "runs" / "a", f"{flags} --resume"))
    flags = flags.replace("here/", "there/").replace("tthere/", "there/")
    run(command(there, method, tmp_path / "whole", flags))
    same_runs(there / "runs" / "a", tmp_path / "whole")


def test_a_moved_run_finds_its_lm_by_the_fingerprint(place, tmp_path):
    """Where it was, then relative to the run, then where `model` says."""
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "there" / "runs" / "a"
    shutil.copytree(place, here)
    words = here / "words.json"
    shutil.copy(here / "lm" / "model" / "tokenizer.json", words)
    flags = f"--tokenizer {words}"
    run(command(here, "connector_lm", here / "runs" / "a", flags))
    answer = read_lines(here / "runs" / "a" / "predictions.jsonl")[0]["prediction"]
    here.rename(there)
    asks = ["ask", "--max-new-tokens", "4", "where was Anna born", "--run"]
    assert metrics.main([*asks, str(out)]) == [answer]
    tokenizer = load_run(out)[2]
    other = LM(LM.from_pretrained(there / "lm" / "model").config)
    other.save(here / "lm" / "model", tokenizer=tokenizer)  # another LM where its own was
    assert metrics.main([*asks, str(out)]) == [answer]
    with pytest.raises(ValueError, match="another LM than .*--model"):
        load_run(out, model=here / "lm" / "model")
    shutil.rmtree(here)
    alone = out.rename(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="its LM is not at .*here.*--model"):
        load_run(alone)
    assert metrics.main([*asks, str(alone), "--model", str(there / "lm" / "model")]) == [answer]


def test_a_run_that_trained_its_own_lm_takes_no_other(place, tmp_path):
    run(command(place, "fine_tuning", tmp_path / "here", "--steps 1"))
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert load_run(moved)[0].folder == moved / "model"
    with pytest.raises(ValueError, match="trained an LM of its own"):
        load_run(moved, model=place / "lm" / "model")


def with_end_tokens(folder, eos, name="generation_config.json"):
    path = folder / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": eos}))


@pytest.mark.parametrize(
    "method, name",
    [
        ("connector_lm", "config.json"),
        ("fine_tuning", "generation_config.json"),
        ("pretrain_prompt", "generation_config.json"),
    ],
)
def test_a_run_ends_answers_with_its_own_end_tokens(place, tmp_path, method, name, capsys):
    """Whatever the LM's files say now. A line says so. --resume does not continue with others."""
    shutil.copytree(place, tmp_path / "here")
    line = command(tmp_path / "here", method, tmp_path / "run", "--steps 1")
    record = run(line)
    assert record["eos"] == [0]
    folder = tmp_path / "here" / "lm" / "model"
    model, _, tokenizer, _ = load_run(tmp_path / "run")
    assert model.config.eos == (0,)
    with_end_tokens(tmp_path / "run" / "model" if method == "fine_tuning" else folder, [0, 7], name)
    with pytest.warns(UserWarning, match=r"its own tokens \[0\], not .* \[0, 7\]"):
        model = load_run(tmp_path / "run")[0]
    assert model.config.eos == (0,) and getattr(model, "lm", model).config.eos == (0,)
    with_end_tokens(folder, [0, 7], name)
    with pytest.raises(ValueError, match=f"{tmp_path}/run was started with other end tokens"):
        run([*line, "--resume"])
    with_end_tokens(folder, [0], name)
    run([*line, "--resume"])


def test_a_run_takes_no_other_tokenizer(place, tmp_path):
    """The LM's weights are the same. A copy of the run's own, where --tokenizer said, is taken."""
    here, out = tmp_path / "here", tmp_path / "run"
    shutil.copytree(place, here)
    own = here / "lm" / "model" / "tokenizer.json"
    text = json.loads(own.read_text())
    run(command(here, "connector_lm", out, "--steps 1"))
    after_bos = command(here, "prompt_tuning", tmp_path / "after", "--steps 1")
    run([*after_bos, "--placement", "after_bos"])
    for folder in (out, tmp_path / "after"):
        load_run(folder)
    changes = []
    for key, value in (
        ("normalizer", {"type": "Lowercase"}),
        ("post_processor", None),  # without BOS
        ("model", text["model"] | {"merges": text["model"]["merges"][:3]}),
        ("decoder", None),
    ):
        own.write_text(json.dumps(text | {key: value}))
        for folder in (out, tmp_path / "after"):
            try:
                load_run(folder)
            except ValueError as error:
                assert str(error).startswith(f"{folder}: was trained with another tokenizer")
                changes.append((key, folder.name))
    keys = ("normalizer", "post_processor", "model", "decoder")
    both = [(key, name) for key in keys for name in ("run", "after")]
    both.remove(("post_processor", "after"))  # a prompt behind BOS puts it there itself
    assert changes == both
    own.write_text(json.dumps(text, indent=3) + "\n")  # the same tokenizer, written otherwise
    load_run(out)
    record = json.loads((out / "run.json").read_text())
    for key in ("tokenizer_hash", "eos"):  # an early run's
        del record[key]
    (out / "run.json").write_text(json.dumps(record))
    own.write_text(json.dumps(text | {"decoder": None}))
    load_run(out)
