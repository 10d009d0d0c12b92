"""Does a run give its own bits again? `python runs.py verify RUN` says so.

The run is copied, and the copy goes back to the checkpoint before the last one. The command of
run.json then trains the last interval again, in a process of its own, and answers the questions
again. Every tensor and file of the copy is compared with the run's. On the same machine, with the
same number of threads, no bit differs. A run that has no earlier checkpoint is trained again from
its start. Needs runs.py, checkpoints.py and the program that made the run.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from show import Parser, show

import torch
from safetensors.torch import load_file

from runs import find, names_file, read_record

ROOT = Path(__file__).parent
STATE, BEFORE = "state.safetensors", "state.before.safetensors"
OWN = {"run.json", "curve.png", "lock", BEFORE}  # they say where and when a run ran


def verify(folder: str | Path) -> dict[str, str]:
    """Repeat the end of a run, and print and return what differs: {file: how}.

    ValueError if the run is not finished, or if its command fails now.
    """
    folder, record = Path(folder), read_record(folder)
    if "results" not in record:
        raise ValueError(f"{folder}: is not finished; {record['command']} --resume goes on")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.resolve().name
        shutil.copytree(folder, copy)
        (copy / STATE).unlink(missing_ok=True)
        if (copy / BEFORE).is_file():
            (copy / BEFORE).rename(copy / STATE)
        result = repeat(folder, record, copy)
        if result.returncode:
            raise ValueError(f"{folder}: its command fails now: {result.stderr.strip()}")
        differs = differences(folder, copy)
        if read_record(copy)["results"] != record["results"]:
            differs["run.json"] = "other scores"
    for name, how in differs.items():
        show(f"{folder}/{name}: {how}", result=True)
    if not differs:
        show(f"{folder}: trained and answered again, and no bit differs", result=True)
    return differs


def repeat(folder: Path, record: dict, copy: Path) -> subprocess.CompletedProcess:
    """Resume the copy by the run's own command, with as many threads as the run had."""
    program, *words = shlex.split(record["command"])[1:]
    for key, value in record["arguments"].items():
        if names_file(key, value):  # the command may have named it from another folder
            value = find(value, folder, record)
            words += [f"--{key.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    count = str(record["hardware"].get("processes", 1))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    start = [] if count == "1" else start
    call = [sys.executable, *start, ROOT / program, *words, "--out", copy, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": str(record["hardware"]["threads"])}
    return subprocess.run(call, env=environment, capture_output=True, text=True)


def differences(a: Path, b: Path) -> dict[str, str]:
    """How the files of run `a` differ in run `b`, by name."""
    found = {}
    for path in sorted(a.rglob("*")):
        name, other = str(path.relative_to(a)), b / path.relative_to(a)
        if not path.is_file() or path.name in OWN:
            continue
        if not other.is_file():
            found[name] = "missing"
        elif path.suffix == ".safetensors":
            ours, theirs = load_file(path), load_file(other)
            changed = [
                key
                for key in sorted(ours.keys() | theirs.keys())
                if key not in ours or key not in theirs or not same_bits(ours[key], theirs[key])
            ]
            if changed:
                found[name] = f"{len(changed)} of {len(ours)} tensors differ: {', '.join(changed)}"
        elif path.read_bytes() != other.read_bytes():
            found[name] = "differs"
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def main(argv: list[str] | None = None) -> None:
    """The command line of runs.py. Exits with status 1 if a bit differs."""
    parser = Parser(prog="runs.py", description="Look after the folders of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "train the end of a finished run again, and compare every bit"
    command = commands.add_parser("verify", help=text)
    command.add_argument("folder", help="the run's folder, which stays as it is")
    if verify(parser.parse_args(sys.argv[1:] if argv is None else argv).folder):
        sys.exit(1)
