"""What a run survives: kills at any moment, signals, a full disk, a read-only folder, bad files.

Every process here is a real one. `pytest tests/test_faults.py --kills 20` kills more of them.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import time

import pytest
from forks import forks
from tiny_runs import (
    METHODS,
    command,
    contents,
    die_at_5,
    make_shelf,
    open_book_command,
    run,
    same_runs,
    transfer_command,
    write_suite,
)

import train
from promptability import VARIANTS
from runs import finished
from verify import differences, verify

WRITES = 6  # of a short run: three checkpoints, and what is trained as often
TRANSFER = ["transfer_source", *(f"transfer_{name}" for name in VARIANTS), "transfer_few-shot"]
INNER = {"transfer_source": "car", "transfer_few-shot": "car.is"}  # their first run of several


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="module")
def shelf(place):
    write_suite(place)
    return make_shelf(place)


def line_of(place, method, out, flags=""):
    make = open_book_command if method in train.OPEN_BOOK else command
    if method in TRANSFER:
        make, method = transfer_command, method.removeprefix("transfer_")
    return make(place, method, out, f"--seed 1 {flags}")


def scores(record):
    """What a command returns, without what says when and where it ran."""
    if "step" in record:
        return record["results"], record["step"]
    return {k: scores(v) if isinstance(v, dict) else v for k, v in record.items()}


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


TRAININGS = [*METHODS, *train.OPEN_BOOK, *TRANSFER]


@pytest.mark.parametrize("method", TRAININGS)
def test_a_killed_run_resumes_to_the_same_bits(request, shelf, tmp_path, processes, method):
    """By turns inside the write of a checkpoint, and at a random moment, where the signals take
    turns too: each method begins with another one. One folder is killed again and again; if it is
    finished, it starts anew."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(method)
    started = time.monotonic()
    record = run(line_of(shelf, method, whole))
    seconds = time.monotonic() - started
    kills, again = request.config.getoption("kills"), line_of(shelf, method, killed, "--resume")
    survived = {True: [], False: []}  # the signals inside a write, and at a random moment
    for _ in range(20 * kills):
        if sum(map(len, survived.values())) == kills:
            break
        inside = len(survived[True]) <= len(survived[False])
        turn = TRAININGS.index(method) + len(survived[False])
        sent = signal.SIGKILL if inside else SIGNALS[turn % len(SIGNALS)]
        process = processes.start(again, dies_in=rng.randrange(WRITES) if inside else None)
        deadline = time.monotonic() + rng.random() * seconds
        while not inside and time.monotonic() < deadline and process.running():
            time.sleep(0.002)
        if not inside and process.running():
            os.kill(process.pid, sent)
        status, errors = process.end()
        assert status in (0, -sent) or (status == 130 and sent != signal.SIGKILL), errors
        assert status != 130 or len(errors.splitlines()) == 1, errors
        if status != 0:
            survived[inside].append(sent.name)
        else:
            same_runs(whole, killed)
            shutil.rmtree(killed)
    inside, random_moment = survived.values()
    assert (len(inside), len(random_moment)) == ((kills + 1) // 2, kills // 2)
    assert len(set(random_moment)) == min(len(random_moment), len(SIGNALS))
    first = killed / INNER.get(method, "")
    if (first / "metrics.jsonl").is_file() and not finished(first):  # one is, if killed late
        with open(first / "metrics.jsonl", "a") as file:
            file.write('{"step": 5, "lo')  # a line that a kill cut short
    if method != "transfer_few-shot" or first.is_dir():  # which makes no run before its shots.json
        first.mkdir(parents=True, exist_ok=True)
        if (first / "run.json").is_file():  # which is written first
            (first / ".tmpaB3xY9").write_text("what a kill inside safetensors leaves")
        with open(first / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(FileExistsError, match="in use by another process"):
                run(again)
    assert scores(run(again)) == scores(record)
    same_runs(whole, killed)
    kinds = f"{len(inside)} inside a write, {' '.join(random_moment)} at a random moment"
    print(f"{method}: {kills} of {kills} kills survived ({kinds}), 0 bits differ")


STOPS = [("SIGTERM", "prompt_tuning", "adafactor"), ("SIGINT", "neural_recursion", "muon")]


@pytest.mark.parametrize("name, method, optimizer", STOPS)
def test_a_signal_ends_a_run_after_its_step_with_one_line(
    place, tmp_path, processes, name, method, optimizer
):
    out, flags = tmp_path / "stopped", f"--steps 80 --eval-every 4 --optimizer {optimizer}"
    run(command(place, method, tmp_path / "whole", flags))
    process = processes.start(command(place, method, out, flags))
    while not (out / "state.safetensors").exists() and process.running():
        time.sleep(0.002)
    os.kill(process.pid, getattr(signal, name))
    status, errors = process.end()
    assert status == 130 and "--resume" in errors and len(errors.splitlines()) == 1
    run(command(place, method, out, f"{flags} --resume"))
    same_runs(tmp_path / "whole", out)


def test_two_processes_on_one_folder(place, tmp_path, processes):
    out, flags = tmp_path / "run", "--steps 80 --eval-every 4"
    process = processes.start(command(place, "prompt_tuning", out, flags))
    while not (out / "run.json").exists() and process.running():
        time.sleep(0.002)
    with pytest.raises(FileExistsError, match="in use by another process"):
        run(command(place, "prompt_tuning", out, f"{flags} --resume"))
    assert process.end()[0] == 0
    run(command(place, "prompt_tuning", tmp_path / "whole", flags))
    same_runs(tmp_path / "whole", out)


FULL = {"bytes": 30_000}
FAULTS = {
    "a full disk": ("neural_recursion", FULL, "the one before it is kept, and --resume goes on"),
    "a disk full from the start": ("fine_tuning", FULL, "there is none before it, and --resume"),
    "a read-only folder": ("neural_recursion", {"unprivileged": True}, "Permission denied"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_written_is_one_line_and_the_last_checkpoint_stays(
    place, tmp_path, monkeypatch, processes, fault
):
    out, (method, limits, message) = tmp_path / "run", FAULTS[fault]
    state, line = out / "state.safetensors", command(place, method, out, "--resume")
    if fault != "a disk full from the start":
        die_at_5(monkeypatch, command(place, method, out))
        assert state.stat().st_size > FULL["bytes"]
    before = state.read_bytes() if state.is_file() else None
    if fault == "a read-only folder":
        out.chmod(0o555)
    status, errors = processes.start(line, **limits).end()
    out.chmod(0o755)
    assert status == 2 and len(errors.splitlines()) == 1 and str(out) in errors, errors
    assert message in errors, errors
    assert (state.read_bytes() if state.is_file() else None) == before
    assert not list(out.glob("*.unfinished"))
    run(line)
    run(command(place, method, tmp_path / "whole"))
    same_runs(tmp_path / "whole", out)


def truncate(data: bytes, rng) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def reword(data: bytes, rng) -> bytes:
    """Another step in the text beside the tensors."""
    assert data.count(b'\\"step\\": 4') == 1
    return data.replace(b'\\"step\\": 4', b'\\"step\\": %d' % rng.randrange(4))


@pytest.mark.parametrize("broken", [truncate, flip, reword])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_goes_on(
    place, tmp_path, monkeypatch, broken
):
    out, rng = tmp_path / "run", random.Random(0)
    state, before = out / "state.safetensors", out / "state.before.safetensors"
    die_at_5(monkeypatch, command(place, "prompt_tuning", out))
    good, again = state.read_bytes(), command(place, "prompt_tuning", out, "--resume")
    for _ in range(12):
        state.write_bytes(broken(good, rng))
        kept = contents(out), state.read_bytes()
        with pytest.raises(ValueError, match="state.safetensors: corrupt"):
            run(again)
        assert (contents(out), state.read_bytes()) == kept
    before.replace(state)
    run(again)
    run(command(place, "prompt_tuning", tmp_path / "whole"))
    same_runs(tmp_path / "whole", out)


# Verify


def test_files_in_folders_and_on_one_side_differ_too(tmp_path):
    for side in "ab":
        (tmp_path / side / "p1").mkdir(parents=True)
        (tmp_path / side / "p1" / "rows.jsonl").write_text(side)
        (tmp_path / side / f"{side}.json").write_text("{}")
    found = differences(tmp_path / "a", tmp_path / "b")
    alone = {"a.json": "missing", "b.json": "the repeated run alone has it"}
    assert found == {"p1/rows.jsonl": "1 lines differ"} | alone


def test_a_run_that_is_verified_gives_its_own_bits_again(place, tmp_path, capsys):
    """One of pretrain.py. The next test has one of train.py."""
    out = tmp_path / "run"
    run(command(place, "pretrain_connector", out))
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert verify(out) == {} and "no bit differs" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_verify_names_what_differs_and_retrains_a_run_without_checkpoints(place, tmp_path, capsys):
    out = tmp_path / "run"
    record = run(command(place, "neural_recursion", out))
    adapter, rows = out / "adapter_model.safetensors", out / "predictions.jsonl"
    data = adapter.read_bytes()
    adapter.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # one bit
    rows.write_text(rows.read_text().replace('"prediction": "', '"prediction": "x', 1))
    record["results"]["dev"]["em"] += 0.1
    (out / "run.json").write_text(json.dumps(record))
    for name in ("state.safetensors", "state.before.safetensors"):
        (out / name).unlink()
    differs = verify(out)
    assert differs.keys() == {adapter.name, rows.name, "run.json"}
    assert differs[adapter.name].startswith("1 of ")
    assert f"{adapter}: 1 of " in capsys.readouterr().out
