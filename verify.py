"""Does a run give its own results again? `python runs.py verify RUN` says so.

The run is copied, and the copy goes back to the checkpoint before the last one. The command of
run.json then trains the last interval again, in a process of its own, and answers the questions
again. Every tensor and file of the copy is compared with the run's:

    same processor, versions and number of threads   every bit is equal
    another of these, or a GPU                       hashes of the data and of the frozen LM, shapes
                                                     and answers are equal, and numbers to 0.1 %

The message says which. A run that has no earlier checkpoint is trained again from its start. Needs
runs.py, checkpoints.py and the program that made the run.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from show import Parser, show

import torch
from safetensors.torch import load_file

from checkpoints import read_json
from families import COUNT, check_keys
from runs import RECORD, find, names_file, read_record

ROOT = Path(__file__).parent
STATE, BEFORE = "state.safetensors", "state.before.safetensors"
OWN = {"run.json", "curve.png", "lock", BEFORE}  # they say where and when a run ran
TOLERANCE = 1e-3  # of a tensor's root mean square, or of a number, where bits may differ


def verify(folder: str | Path) -> dict[str, str]:
    """Repeat the end of a run, and print and return what differs: {file: how}.

    ValueError if the run is not finished, or if its command fails now.
    """
    folder, record = Path(folder), read_record(folder)
    check_record(folder / "run.json", record)
    whole = folder.resolve().parent
    if any((whole / name).is_file() for name in ("run.json", "shots.json")):
        raise ValueError(f"{folder}: is one of the parts of {whole}, which one command makes")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.resolve().name
        shutil.copytree(folder, copy)
        (copy / STATE).unlink(missing_ok=True)
        if (copy / BEFORE).is_file():
            (copy / BEFORE).rename(copy / STATE)
        result = repeat(folder, record, copy)
        if result.returncode:
            raise ValueError(f"{folder}: its command fails now: {result.stderr.strip()}")
        again = read_record(copy)
        other = changes(record, again)
        tolerance = TOLERANCE if other else 0.0
        differs = differences(folder, copy, tolerance)
        if not all(close(record[k], again[k], tolerance) for k in ("results", "step", "score")):
            differs["run.json"] = "other scores"
    for name, how in differs.items():
        show(f"{folder}/{name}: {how}", result=True)
    where = f" ({'; '.join(other)})" if other else ""
    if not differs:
        equal = "the answers are equal, and numbers to 0.1 %" if other else "no bit differs"
        show(f"{folder}: trained and answered again{where}: {equal}", result=True)
    elif other:
        show(f"{folder}: trained and answered again{where}: numbers were compared to 0.1 %")
    return differs


def check_record(path: Path, record: dict) -> None:
    """ValueError unless a run.json has what is repeated and compared here."""
    check_keys(path, record, {}, ("command", "versions", "hardware"))
    if "results" not in record:
        raise ValueError(f"{path.parent}: is not finished; {record['command']} --resume goes on")
    if not record["command"].startswith("python "):
        raise ValueError(f"{path}: command is {record['command']!r}, not python PROGRAM ...")
    try:
        shlex.split(record["command"])
    except ValueError as error:
        raise ValueError(f"{path}: command {record['command']!r}: {error}") from None
    check_keys(path, record, {}, ("step", "score"))
    check_keys(path, record["arguments"], {}, ["device"])
    for part in (record, *record.get("resumed", [])):
        check_keys(path, part, RECORD, ("versions", "hardware"))
        check_keys(path, part["hardware"], {"threads": COUNT, "processes": COUNT}, ["threads"])


def repeat(folder: Path, record: dict, copy: Path) -> subprocess.CompletedProcess:
    """Resume the copy by the run's own command, with as many threads and processes as the run had
    in the end."""
    hardware = record.get("resumed", [record])[-1]["hardware"]
    program, *words = shlex.split(record["command"])[1:]
    for key, value in record["arguments"].items():
        if value and names_file(key, value):  # the command may have named it from another folder
            value = find(value, folder, record)
            words += [f"--{key.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    count = str(hardware.get("processes", 1))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    start = [] if count == "1" else start
    call = [sys.executable, *start, ROOT / program, *words, "--out", copy, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": str(hardware["threads"])}
    return subprocess.run(call, env=environment, capture_output=True, text=True)


def changes(record: dict, again: dict) -> list[str]:
    """How versions and hardware of two runs differ, as texts. On a GPU the list is never empty."""
    then, now = (
        {**latest["versions"], **latest["hardware"]}
        for latest in (r.get("resumed", [r])[-1] for r in (record, again))
    )
    changed = [key for key in then | now if now.get(key) != then.get(key)]
    found = [f"{key} {now.get(key)} instead of {then.get(key)}" for key in changed]
    return found or (["a GPU"] if record["arguments"]["device"] == "cuda" else [])


def differences(a: Path, b: Path, tolerance: float = 0.0) -> dict[str, str]:
    """How the files of run `a` differ in run `b`, by name. A run needs no checkpoint."""
    found, sides = {}, [(side, path) for side in (a, b) for path in side.rglob("*")]
    for name in sorted({str(path.relative_to(side)) for side, path in sides if path.is_file()}):
        path, other = a / name, b / name
        if path.name in OWN or path.name == STATE and not path.is_file():
            continue
        if not other.is_file():
            found[name] = "missing"
        elif not path.is_file():
            found[name] = "the repeated run alone has it"
        elif path.suffix == ".safetensors":
            ours, theirs = load_file(path), load_file(other)
            common = ours.keys() & theirs.keys()
            equal = {key for key in common if same_tensor(ours[key], theirs[key], tolerance)}
            if changed := sorted((ours.keys() | theirs.keys()) - equal):
                found[name] = f"{len(changed)} of {len(ours)} tensors differ: {', '.join(changed)}"
        elif path.suffix == ".json":  # the order of its keys is no result
            if not close(read_json(path), read_json(other), tolerance):
                found[name] = "differs"
        elif path.read_bytes() != other.read_bytes():
            if path.suffix != ".jsonl":
                found[name] = "differs"
            elif count := unlike_lines(path, other, tolerance):
                found[name] = f"{count} lines differ"
    return found


def same_tensor(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.0) -> bool:
    """Whether two tensors have the same type, shape and bytes.

    With a tolerance, entries of floating-point tensors may differ by that share of the root mean
    square of `a`.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if tolerance and a.is_floating_point():
        scale = a.double().square().mean().sqrt()
        return bool(((a.double() - b.double()).abs() <= tolerance * scale).all())
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def unlike_lines(a: Path, b: Path, tolerance: float = 0.0) -> int:
    """The number of lines in which two files of JSON lines differ."""

    def unlike(x: bytes, y: bytes) -> bool:
        if tolerance and x and y:
            with suppress(ValueError):  # it is no JSON
                return not close(json.loads(x), json.loads(y), tolerance)
        return x != y

    ours, theirs = (path.read_bytes().splitlines(keepends=True) for path in (a, b))
    return sum(unlike(x, y) for x, y in zip_longest(ours, theirs, fillvalue=b""))


def close(a, b, tolerance: float) -> bool:
    """Whether two values of JSON are equal, floating-point numbers to a relative tolerance."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance)
    return a == b


def main(argv: list[str] | None = None) -> None:
    """The command line of runs.py. Exits with status 1 if something differs."""
    parser = Parser(prog="runs.py", description="Look after the folders of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "train the end of a finished run again, and compare every bit"
    command = commands.add_parser("verify", help=text)
    command.add_argument("folder", help="the run's folder, which stays as it is")
    if verify(parser.parse_args(sys.argv[1:] if argv is None else argv).folder):
        sys.exit(1)
