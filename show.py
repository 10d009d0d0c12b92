"""What every program begins and ends with: threads, memory, parser, what it prints, its errors.

    show("step 10")                                  a line, or nothing if nobody can read it
    show(answer, result=True)                        OSError if it cannot be written
    show_table(title, columns, rows)                 Markdown
    show_result("test", result)                      the scores of a run on a split
    with only_shows("curve.png"): draw(...)          if it fails, one line says why
    with picture("curve.png", 7, 4) as figure:       draws with matplotlib
    Parser(prog="train.py")                          a bad flag is one line and status 2
    processor()                                      the CPU, as run.json names it
    COUNT, SEED, number_type(float, 0)               types of flags
    run_program("train.py", main)                    bad input is one line and status 2, too

A closed terminal, a pipe without a reader or a full disk never ends a run. Only if the line is the
result that was asked for is it an error.
"""

import argparse
import ctypes
import hashlib
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# At the end of every parallel loop, OpenMP's threads wait for each other in a busy loop. On a
# machine that other processes share, a thread that waits takes the core from the one it waits for:
# beside two busy processes on two cores, 40 steps of the default command take 400 s instead of 17.
# If they sleep after 4,000 rounds it is 38 s, and still 17 on a quiet machine. After 1,000 it is a
# fifth more there, and after 10,000 it is 58 s beside the others. GNU's OpenMP reads this when
# torch is loaded, so programs import this file first (ruff.toml sorts it there). What the user has
# set counts. OMP_WAIT_POLICY would be overruled, so it is respected too.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# glibc gives the memory of large tensors back to the kernel as soon as they are freed, and the
# kernel clears every page of the next ones. If it is kept, training takes 0.97 of the time, with a
# vocabulary of 32,000 0.86, and sampling 0.74. Again, what the user has set counts.
if not any(name.startswith("MALLOC_") for name in os.environ):
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: up to 1 GiB. Alone, the next would do harm
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def show(text: str, stream: str = "stdout", result: bool = False) -> None:
    """Print a line to sys.stdout or sys.stderr. A line that cannot be printed never ends a run.

    Letters that the stream cannot write are escaped. A stream that is closed or full is silent
    from then on. But OSError if the line is the `result` of a command, unless its reader has left.
    On stderr, "[Errno n]" and the middle of a very long line are left out.
    """
    out = getattr(sys, stream)
    if out is None and result:
        raise OSError("standard output: it is closed")
    if out is None:  # it was closed before Python began
        return
    if stream == "stderr":
        text = re.sub(r"\[Errno \d+\] ", "", text)
        text = text if len(text) <= 600 else f"{text[:300]} ... {text[-200:]}"
    try:
        encoding = getattr(out, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)
    except (OSError, ValueError) as error:
        silent = open(os.devnull, "w")
        with suppress(OSError, ValueError):  # what is still in the buffer would fail at exit
            os.dup2(silent.fileno(), out.fileno())
        setattr(sys, stream, silent)
        if result and not isinstance(error, BrokenPipeError):
            raise OSError(f"standard output: {error}") from None
        if stream == "stdout" and not result:
            show(f"standard output: {error}; the run goes on without it", "stderr")


def show_error(program: str, message: str) -> None:
    """Print why a program ends, in one line on stderr.

    Processes that torchrun started mostly fail with the same error. The first one prints it, and
    the others wait: torchrun ends them. One that is still there then has an error of its own.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    show(f"{program}: {' '.join(message.splitlines())}", "stderr")


@contextmanager
def only_shows(what: str) -> Iterator[None]:
    """A context for code that only shows something. If it fails, one line says why."""
    try:
        yield
    except Exception as error:  # from any library, and no result may be lost by it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        show(f"no {what}: {reason}")


@contextmanager
def picture(path, width: float, height: float):
    """A context with a matplotlib figure, which needs no display and is written at the end."""
    from checkpoints import atomic_write

    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's may be missing here; none is needed
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def show_row(cells: list, result: bool = False) -> None:
    """Print a row of a Markdown table."""
    show(f"| {' | '.join(map(str, cells))} |", result=result)


def show_table(title: str, columns: list[str], rows: list[list], result: bool = False) -> None:
    """Print a Markdown table."""
    show(f"\n{title}\n", result=result)
    for row in [columns, ["---"] * len(columns), *rows]:
        show_row(row, result)


def show_result(split: str, result: dict, asked: bool = False) -> None:
    """Print the loss of a text, recall, or the scores of all questions and of each task.

    asked: they are the result that the user asked for.
    """
    if "recall" in result:
        for name, row in result["recall"].items():
            shares = "  ".join(f"@{k} {100 * share:5.1f}" for k, share in row.items())
            show(f"{split:5} {name:20} recall {shares}   ({result['n']} questions)")
        return
    if "em" not in result:
        loss, perplexity = result["loss"], result["perplexity"]
        show(f"{split:5} loss {loss:.4f} nats a token, perplexity {perplexity:.2f}")
        return
    for task, row in {"all": result, **result["tasks"]}.items():
        if task:
            scores = f"EM {100 * row['em']:5.1f}   F1 {100 * row['f1']:5.1f}"
            show(f"{split:5} {task:12} {scores}   ({row['n']} questions)", result=asked)


def processor() -> str:
    """The CPU: its name, the vector instructions that PyTorch uses, and a hash of its features.

    Equal texts mean the same rounding. Where there is no /proc/cpuinfo, the name is that of the
    architecture.
    """
    import torch

    name, features = platform.machine(), []
    with suppress(OSError):
        core = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        name = (re.findall(r"^model name\s*: (.*)", core, re.M) or [name])[0]
        kinds = "vendor_id|cpu family|model|stepping|cache size|flags|CPU |Features"
        features = re.findall(f"^(?:{kinds}).*", core, re.M)
    code = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {code}"


# The largest number of a flag that sets no smaller one. The product of two such floats, and ten
# times that, are numbers of float32: Adam's first step divides rates by 0.1.
LARGEST = {int: 2**31 - 1, float: 1e15}


def number_type(kind: type, low: float, high: float | None = None):
    """An argparse type: a number from `low` to `high`, both included."""
    last = LARGEST[kind] if high is None else high

    def convert(text: str):
        value = kind(text)
        if low <= value <= last:
            return value
        if high is None and not value > last:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {last}")

    convert.__name__ = kind.__name__  # argparse puts it into its messages
    return convert


COUNT = number_type(int, 1)
SEED = number_type(int, 0, 2**63 - 1)
# Arguments that may be empty texts. Any other is a mistake, such as --model "$UNSET".
MAY_BE_EMPTY = {"stop", "pause_text", "choices", "only", "flags", "question", "text"}


class Parser(argparse.ArgumentParser):
    """A parser whose help shows the defaults and whose errors are one line."""

    def __init__(self, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

    def parse_known_args(self, args: list[str] | None = None, namespace=None):
        """Parse the flags. One that is not UTF-8 is an error, or one that must not be empty."""
        args = sys.argv[1:] if args is None else args
        for text in args:
            # Python reads bytes that are not UTF-8 as these letters.
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                self.error(f"the argument {text!a} is not UTF-8 text")
        found, unknown = super().parse_known_args(args, namespace)
        for key, value in vars(found).items():
            empty = value == "" or isinstance(value, list) and "" in value
            if empty and key not in MAY_BE_EMPTY:
                flag = f"--{key.replace('_', '-')}"
                given = any(text.partition("=")[0] == flag for text in args)
                self.error(f"argument {flag if given else key}: an empty text")
        return found, unknown

    def error(self, message: str):
        """Print the message after the program's name, and exit with status 2."""
        show_error(self.prog, message)
        self.exit(2)


def run_program(program: str, main: Callable[[], object], resumes: bool = False):
    """Run `main` and return its result. Bad input, or too little memory, is one line and status 2.

    SIGINT exits with 130. So does SIGTERM in a training, where fit.py turns it into SIGINT's
    exception. resumes: the program has the flag --resume.
    """
    from safetensors import SafetensorError

    def show_warning(message, *_, **__):
        if os.environ.get("RANK", "0") == "0":  # processes that torchrun started warn alike
            show(f"{program}: {message}", "stderr")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # without the file and line that raised it
            return main()
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on from the last checkpoint"
        show_error(program, f"stopped{advice if resumes else ''}")
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        memory = memory or type(error).__name__ == "OutOfMemoryError"  # of torch, on a GPU
        if isinstance(error, RuntimeError) and not memory:
            raise
        show_error(program, f"out of memory: {error}" if memory else str(error))
        sys.exit(2)
