"""What every program shares: how its threads wait, and on which numbers it computes."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, command, run

import cli
import pretrain
import train
import transfer

# data.py, copied into another project, is a program by itself, and computes nothing with torch.
PROGRAMS = [
    path.name
    for path in sorted(ROOT.glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text() and path.name != "data.py"
]
ARGUMENTS = {"eval.py": ["ask who", "score none.jsonl", "compare a b"]}  # imports torch when asked
# Says what is set when torch is about to be loaded, and ends there.
WATCH = """
import os, runpy, sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch:", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def at_torch(program, arguments, **environment):
    """What the program has set when it loads torch, or its whole output if it never does."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    call = [sys.executable, "-c", WATCH, ROOT / program, *arguments.split()]
    result = subprocess.run(call, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "program, arguments",
    [(name, line) for name in PROGRAMS for line in ARGUMENTS.get(name, ["--help"])],
)
def test_waiting_threads_sleep_before_torch_is_loaded(program, arguments):
    if program == "world.py":  # needs no torch
        assert at_torch(program, arguments).startswith("usage: world.py")
    else:
        assert at_torch(program, arguments) == "torch: 1000\n"


@pytest.mark.parametrize("program", ["train.py", "generate.py"])
def test_what_the_user_says_of_threads_counts(program):
    assert at_torch(program, "--help", GOMP_SPINCOUNT="7") == "torch: 7\n"
    assert at_torch(program, "--help", OMP_WAIT_POLICY="ACTIVE") == "torch: None\n"


# A Ryzen 7950X, a Xeon of the fourth generation, a Neoverse V1, and two without such units.
@pytest.mark.parametrize(
    "line, expected",
    [
        ("flags\t\t: fpu sse2 avx512bw avx512_bf16 avx512_vbmi2", "bfloat16"),
        ("flags\t\t: fpu amx_bf16 avx512_fp16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd i8mm bf16 dgh", "bfloat16"),
        ("flags\t\t: fpu sse2 avx2 avx512bw", "float32"),
        (None, "float32"),
    ],
)
def test_auto_asks_the_processor(tmp_path, monkeypatch, line, expected):
    about = tmp_path / "cpuinfo"
    if line is not None:
        about.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(cli, "CPUINFO", about)
    programs = (train, "--method id_pt"), (pretrain, "lm"), (transfer, "source --train text.txt")
    for program, rest in programs:
        rest = rest.split()
        assert program.parse([*rest, "--device", "cpu", "--dtype", "auto"]).dtype == expected
        assert program.parse([*rest, "--device", "cpu"]).dtype == "float32"


@pytest.mark.parametrize("able, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_asks_the_gpu(monkeypatch, able, expected):
    """A card that only emulates such numbers does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or able,
    )
    args = ["--method", "id_pt", "--device", "cuda", "--dtype"]
    assert train.parse([*args, "auto"]).dtype == expected


def test_a_record_names_the_arithmetic_that_auto_chose(place, tmp_path, monkeypatch):
    about = tmp_path / "cpuinfo"
    monkeypatch.setattr(cli, "CPUINFO", about)
    about.write_text("flags : amx_bf16")
    line = command(place, "prompt_tuning", tmp_path / "run", "--steps 2 --dtype auto")
    assert run(line)["arguments"]["dtype"] == "bfloat16"
    about.write_text("flags : sse2")  # another machine
    with pytest.raises(ValueError, match="--dtype bfloat16, not float32"):
        run([*line, "--resume"])
