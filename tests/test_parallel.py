"""Several processes: the data, losses and answers of one, a part of the LM each, death, resume."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from forks import ROOT, forks
from tiny_runs import (
    METHODS,
    OBJECTIVES,
    command,
    die_at_5,
    make_shelf,
    open_book_command,
    read_lines,
    run,
    stored,
    write_lines,
)

import parallel
import train
from eval import main as score
from runs import read_predictions, read_record
from verify import changes, repeat

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def shelf(place):
    """A place with a BERT that has no dropout: each process would draw other masks."""
    make_shelf(place)
    config = place / "bert/model/config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"hidden_dropout_prob": 0.0}))
    return place


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """two(line) runs a command in two processes, and returns the status and the errors of each."""
    with ExitStack() as stack:
        folders = [tmp_path_factory.mktemp("forks") for _ in range(2)]
        servers = [stack.enter_context(forks(folder)) for folder in folders]

        def call(line):
            started = []
            port = free_port()
            for rank, server in enumerate(servers):
                started.append(server.start(line, environment=environment(rank, port)))
            return [process.end() for process in started]

        yield call


def watch_divide(monkeypatch) -> dict[str, set]:
    """{function: the numbers of items that `parallel.divide` gets with it} in this process."""
    calls, divide = defaultdict(set), parallel.divide

    def watched(function, items):
        calls[function.__qualname__.replace("<locals>.", "")].add(len(items))
        return divide(function, items)

    monkeypatch.setattr(parallel, "divide", watched)
    return calls


@pytest.fixture(scope="module")
def one(shelf, tmp_path_factory):
    """one(method, flags) -> (the run of one process, what it divides). Equal runs are made once."""

    @cache
    def make(method, flags):
        folder = tmp_path_factory.mktemp("one") / "run"
        with pytest.MonkeyPatch.context() as patch:
            divided = watch_divide(patch)
            run(line_of(shelf, method, folder, flags))
        return folder, divided

    return make


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


def line_of(shelf, method, out, flags=""):
    make = open_book_command if method in train.OPEN_BOOK else command
    return make(shelf, method, out, f"--seed 1 {flags}")


def history(folder: Path) -> dict[str, list]:
    """The losses and the dev scores of a run."""
    lines = read_lines(folder / "metrics.jsonl")
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "score")}


def assert_same_training(one: Path, other: Path, rel: float = 2e-4) -> None:
    """The same losses, scores, answers and parameters, to rounding."""
    a, b = history(one), history(other)
    assert len(a["loss"]) == 6 and a["loss"] == pytest.approx(b["loss"], rel=rel)
    assert a["score"] == pytest.approx(b["score"], rel=rel)
    if (one / "predictions.jsonl").is_file():
        assert read_predictions(one) == read_predictions(other)
    if (one / "adapter_model.safetensors").is_file():
        a, b = stored(one), stored(other)
        assert all(torch.allclose(a[name], b[name], rtol=0.02, atol=2e-3) for name in a)


# Of 8 questions in batches of 7 the last batch has one row, and one process has none.
UNEVEN = ("prompt_tuning", "id_pt", "textual_recursion", "neural_recursion")
UNEVEN = dict.fromkeys(UNEVEN, "--batch-size 7")
ANSWER, SCORE = "predict_split.answer", "RerankerTraining.evaluate.score"
DIVIDED = {  # what processes divide besides the rows of a batch, and of how many items
    **dict.fromkeys(METHODS, {ANSWER: {5}}),
    **dict.fromkeys(OBJECTIVES, {"train_on_text.evaluate.<lambda>": {36}}),
    "textual_recursion": {ANSWER: {5}, "sample_split.compute": {4, 5}},
    "retriever": {"DualEncoder.encode_questions": {4}, "DualEncoder.encode_passages": {12, 16}},
    "reranker": {SCORE: {4}},
    "reader": {SCORE: {4}, "score_split.score": {4, 5}, ANSWER: {4}},
}


@pytest.mark.parametrize("method", [*METHODS, *train.OPEN_BOOK])
def test_two_processes_train_as_one(shelf, tmp_path, one, two, method):
    alone, divided = one(method, UNEVEN.get(method, ""))
    assert divided == DIVIDED[method]
    ends = two(line_of(shelf, method, tmp_path / "two", UNEVEN.get(method, "")))
    assert ends == [(0, ""), (0, "")], ends
    rel = 0.02 if method == "pretrain_bert" else 2e-4  # its dropout draws other masks
    assert_same_training(alone, tmp_path / "two", rel)
    assert read_record(tmp_path / "two")["hardware"]["processes"] == 2
    assert "processes" not in read_record(alone)["hardware"]


def test_prompts_of_tasks_that_one_process_has_not_seen(shelf, tmp_path, two):
    """The gradient of a prompt may come from one process. AdamW moves no prompt without one."""
    flags = "--per-task --batch-size 2"
    run(line_of(shelf, "prompt_tuning", tmp_path / "one", flags))
    assert two(line_of(shelf, "prompt_tuning", tmp_path / "two", flags)) == [(0, "")] * 2
    for task in "ab":
        a, b = (stored(tmp_path / name / task)["prompt_embeddings"] for name in ("one", "two"))
        assert torch.allclose(a, b, rtol=0.02, atol=2e-3)
    assert history(tmp_path / "one")["loss"] == pytest.approx(history(tmp_path / "two")["loss"])


SHARDED = {  # flags of the run, and of the sharded one alone
    "deep_prompt": ("", ""),
    "id_pt": (UNEVEN["id_pt"], ""),
    "textual_recursion": (UNEVEN["textual_recursion"], ""),
    "neural_recursion": ("--passes 3 --cache-first-pass 0", ""),
    "reader": ("", "--checkpoint-activations"),
}


@pytest.mark.parametrize("method", SHARDED)
def test_a_sharded_lm_trains_as_a_whole_one(shelf, tmp_path, one, two, method):
    flags, more = SHARDED[method]
    alone, _ = one(method, flags)
    ends = two(line_of(shelf, method, tmp_path / "two", f"{flags} {more} --shard"))
    assert ends == [(0, ""), (0, "")], ends
    assert_same_training(alone, tmp_path / "two")
    record, other = read_record(alone), read_record(tmp_path / "two")
    assert record["weights_before"] == other["weights_before"] == other["weights_after"]


PROBE = """
import json, os, sys
import torch
import parallel
from model import LM
parallel.start("cpu")
def ten_times(part):
    own.extend(part)
    return [10 * i for i in part]
for n in range(5):
    items, own = list(range(n)), []
    assert parallel.divide(ten_times, items) == [10 * i for i in items]
    assert own == items[parallel.rank() :: 2]
assert parallel.any_of(parallel.rank() == 1) and not parallel.any_of(False)
lm = LM.from_pretrained(sys.argv[1])
whole = sum(p.numel() * p.element_size() for p in lm.parameters())
ids = torch.arange(12).view(2, 6)
def held():
    local = [p.to_local() if hasattr(p, "to_local") else p for p in lm.parameters()]
    return sum(p.numel() * p.element_size() for p in local)
parts = [parallel.shard(lm, "cpu")]
for _ in range(2):
    x = torch.zeros(3, lm.config.dim, requires_grad=True)
    lm.logits(lm(lm.embed(ids), lm.read(x))).logsumexp(-1).sum().backward()
    parts.append(held())
assert x.grad.abs().max() > 0
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump([whole, *parts], file)
"""


def test_each_process_computes_and_holds_half_and_results_keep_their_order(shelf, tmp_path, two):
    """Half of the items, and half of an LM, also after a step has gathered all of it."""
    (tmp_path / "probe.py").write_text(PROBE)
    line = [tmp_path / "probe.py", shelf / "lm/model", tmp_path / "held"]
    assert two(line) == [(0, ""), (0, "")]
    for rank in "01":
        whole, *parts = json.loads((tmp_path / f"held{rank}").read_text())
        assert all(part == pytest.approx(whole / 2, rel=0.02) for part in parts)


def test_a_run_of_one_process_resumes_with_two(shelf, tmp_path, one, two, monkeypatch):
    line = line_of(shelf, "lm_connector", tmp_path / "run")
    die_at_5(monkeypatch, line)
    assert two([*line, "--resume"]) == [(0, "")] * 2
    assert_same_training(one("lm_connector", "")[0], tmp_path / "run")
    (now,) = read_record(tmp_path / "run")["resumed"]
    assert now["hardware"]["processes"] == 2


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_ended_ends_the_other_and_one_process_resumes(shelf, tmp_path, sent):
    """Of two that torchrun started. The one process repeats the steps since the checkpoint. At a
    constant rate, the first 40 steps of 300 are those of a run of 40."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = "--steps 300 --eval-every 20 --eval-limit 2 --schedule constant --warmup 0"
    line = line_of(shelf, "lm_connector", killed, long)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    call += ["--nproc-per-node", "2", *line]
    with open(tmp_path / "output.txt", "w") as output:
        launcher = subprocess.Popen(call, cwd=ROOT, stdout=output, stderr=output)
    wait_for((killed / "state.safetensors").is_file, 300)
    workers = children(launcher.pid)
    assert len(workers) == 2
    os.kill(workers[1], sent)
    assert launcher.wait(60) != 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5)
    assert "results" not in read_record(killed)
    assert run([*line, "--resume"])["results"]["dev"]["n"] == 5
    run(line_of(shelf, "lm_connector", whole, f"{long} --steps 40"))
    a, b = history(whole)["loss"], history(killed)["loss"]
    assert len(b) == 300 and len(a) == 40 and a == pytest.approx(b[:40], rel=1e-2)


def test_two_processes_score_a_file_as_one(shelf, tmp_path, one, two, monkeypatch):
    alone, _ = one("textual_recursion", UNEVEN["textual_recursion"])
    line = f"eval.py score {shelf}/train.jsonl --run {alone} --out {tmp_path}"
    divided = watch_divide(monkeypatch)
    score(f"{line}/one".split()[1:])
    assert divided["answer.answer_part"] == {8}
    assert two(f"{line}/two".split()) == [(0, "")] * 2
    assert read_predictions(tmp_path / "one") == read_predictions(tmp_path / "two")


def test_two_processes_warn_once_and_of_all_questions(shelf, tmp_path, two):
    rows = [{"question": f"who {i}", "answer": ["who was it who"]} for i in range(5)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    line = f"eval.py score {path} --model {shelf}/lm/model --max-new-tokens 1"
    (status, errors), other = two(line.split())
    assert status == 0 and other == (0, "")
    assert errors.startswith("eval.py score: 5 of 5 questions cannot be scored as right: ")
    assert errors.count("\n") == 1


def test_the_torchrun_commands_of_the_readme_run(shelf, tmp_path, two):
    """With a few steps, and as torchrun reads them. The last one scores as one process does."""
    lines = [line.split()[1:] for line in README.splitlines() if line.startswith("torchrun --")]
    read = map(torchrun.parse_args, lines)
    *trains, words = [[line.training_script, *line.training_script_args] for line in read]
    for train_line, out in zip(trains, ("recursion", "mine"), strict=True):
        flags = command(shelf, train_line[2], tmp_path / "runs" / out)[3:]
        assert two([*train_line, *flags]) == [(0, "")] * 2
    paths = {name: str(tmp_path / name) for name in ("runs/mine", "scores/mine")}
    paths["test.jsonl"] = str(shelf / "train.jsonl")
    words = [paths.get(word, word) for word in words]
    assert two(words) == [(0, "")] * 2
    scores = tmp_path / "scores"
    assert json.loads((scores / "mine/score.json").read_text())["hardware"]["processes"] == 2
    score([*words[1:], "--out", str(scores / "one")])
    assert read_predictions(scores / "mine") == read_predictions(scores / "one")


REFUSED = {
    "train.py --method lm_connector --batch-size 1": "--batch-size 1: fewer rows than the 2 proc",
    "transfer.py source --train {shelf}/train.jsonl": "2 processes: transfer.py does not share",
    "train.py --method fine_tuning --shard": "--shard: for one adapter around a frozen LM",
    "train.py --method prompt_tuning --shard --per-task": "--shard: for one adapter",
    "train.py --method prompt_tuning --shard --base-dtype int8": "--shard: for one adapter",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_several_processes_cannot_do_is_refused(shelf, tmp_path, monkeypatch, line):
    for name, value in environment(0, 1).items():
        monkeypatch.setenv(name, value)
    words = f"{line.format(shelf=shelf)} --model {shelf}/lm/model --out {tmp_path}/out".split()
    with pytest.raises(ValueError, match=REFUSED[line]):
        run(words)
    assert not (tmp_path / "out").exists() and parallel.count() == 1


def test_a_refusal_is_one_line_and_status_2(shelf, tmp_path, two):
    (tmp_path / "out").mkdir()
    status, errors = two(line_of(shelf, "lm_connector", tmp_path / "out"))[0]
    assert status == 2 and errors.startswith("train.py: ") and errors.count("\n") == 1
    with pytest.raises(ValueError, match="--shard: needs processes: torchrun"):
        run(line_of(shelf, "lm_connector", tmp_path / "new", "--shard"))


def test_verify_repeats_a_run_with_as_many_processes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda call, **_: calls.append(list(map(str, call))))
    for count in (1, 2):
        hardware = {"threads": 1} | ({"processes": count} if count > 1 else {})
        record = {"command": "python train.py --seed 1", "arguments": {}, "hardware": hardware}
        repeat(tmp_path, record, tmp_path / "copy")
    record["resumed"] = [{"hardware": {"threads": 1}}]  # with one process in the end
    repeat(tmp_path, record, tmp_path / "copy")
    alone, both, last = (call[1:] for call in calls)
    assert last == alone
    assert alone[0].endswith("train.py") and both[-len(alone) :] == alone
    assert both[:2] == ["-m", "torch.distributed.run"] and both[3:5] == ["--nproc-per-node", "2"]


def test_verify_says_that_the_number_of_processes_changed():
    one = {"versions": {"torch": "2"}, "hardware": {"threads": 1}, "arguments": {"device": "cpu"}}
    two = one | {"hardware": {"threads": 1, "processes": 2}}
    assert changes(one, one) == [] and changes(two, two) == []
    assert changes(one, two) == ["processes 2 instead of None"]
    assert changes(two, one) == ["processes None instead of 2"]
    assert changes(two | {"resumed": [one]}, one) == []


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
