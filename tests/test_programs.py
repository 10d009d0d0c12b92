"""What every program shares: its threads, its memory, and on which numbers it computes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import show

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
        assert at_torch(program, arguments) == "torch: 4000\n"


@pytest.mark.parametrize("program", ["train.py", "generate.py"])
def test_what_the_user_says_of_threads_counts(program):
    assert at_torch(program, "--help", GOMP_SPINCOUNT="7") == "torch: 7\n"
    assert at_torch(program, "--help", OMP_WAIT_POLICY="ACTIVE") == "torch: None\n"


# Prints how many pages the kernel clears for 64 MiB that were freed just before.
PAGES = """
import show, resource
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""


def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    def pages(**environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        call = dict(cwd=ROOT, env=kept | environment, capture_output=True, text=True)
        return int(subprocess.run([sys.executable, "-c", PAGES], **call).stdout)

    glibc = platform.libc_ver()[0] == "glibc"  # others are left as they are
    assert 10 * pages() < pages(MALLOC_ARENA_MAX="8") or not glibc


def test_only_a_program_that_can_resume_advises_it(capsys):
    def stop():
        raise KeyboardInterrupt

    for program, resumes in (("train.py", True), ("world.py", False)):
        with pytest.raises(SystemExit):
            show.run_program(program, stop, resumes)
        assert ("--resume" in capsys.readouterr().err) == resumes
        call = f'run_program("{program}", main, resumes=True)'
        assert (call in (ROOT / program).read_text()) == resumes


@pytest.mark.parametrize("ratio, expected", [(0.5, "bfloat16"), (0.9, "float32"), (2, "float32")])
def test_auto_takes_what_multiplies_faster(monkeypatch, ratio, expected):
    seconds = {"float32": 1.0, "bfloat16": ratio}
    monkeypatch.setattr(cli, "matmul_seconds", lambda dtype, device: seconds[dtype])
    programs = (train, "--method id_pt"), (pretrain, "lm"), (transfer, "source --train text.txt")
    for program, rest in programs:
        rest = rest.split()
        assert program.parse([*rest, "--device", "cpu", "--dtype", "auto"]).dtype == expected
        assert program.parse([*rest, "--device", "cpu"]).dtype == "float32"


def test_the_measured_time_is_of_this_arithmetic():
    for dtype in ("float32", "bfloat16"):
        assert 1e-5 < cli.matmul_seconds(dtype, "cpu") < 1


def test_a_record_names_the_arithmetic_that_auto_chose(place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "fastest_dtype", lambda device: "bfloat16")
    line = command(place, "prompt_tuning", tmp_path / "run", "--steps 2 --dtype auto")
    assert run(line)["arguments"]["dtype"] == "bfloat16"
    monkeypatch.setattr(cli, "fastest_dtype", lambda device: "float32")  # another machine, or load
    assert run([*line, "--resume"])["arguments"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("triton", [True, False])
def test_the_kernels_are_the_default_on_a_gpu_that_can_run_them(monkeypatch, triton):
    monkeypatch.setattr(cli, "find_spec", lambda name: triton or None)

    def chosen(flags):
        return train.parse(f"--method prompt_tuning {flags}".split()).attention

    assert chosen("--device cuda --model big") == ("fused" if triton else "plain")
    assert chosen("--device cuda") == "plain"  # the embedded LM is too small
    assert chosen("--device cuda --model big --attention plain") == "plain"
    assert chosen("--device cpu --model big") == "plain"


def test_a_processor_is_named_by_its_features(monkeypatch):
    core = "model name\t: Fast CPU\nflags\t\t: avx2\nbogomips\t: 1\n"
    texts = [core, core.replace("avx2", "avx"), core.replace(": 1", ": 2"), "processor\t: 0\n"]
    names = []
    for text in texts:
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: f"{text}\n\n{text}")
        names.append(show.processor())
    code = torch.backends.cpu.get_cpu_capability()
    assert names[0].startswith(f"Fast CPU, {code}, ") and names[0] == names[2] != names[1]
    assert names[3].startswith(f"{platform.machine()}, {code}, ")
    monkeypatch.setattr(Path, "read_text", lambda path: open("/nowhere"))
    assert show.processor() == names[3]  # as on a system without /proc
