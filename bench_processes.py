"""Workloads of bench.py that are whole processes: loading, the start, a busy machine, long text.

loading  `LM.from_pretrained` and a first token against transformers, on an LM of 1.1 GB that is
         stored in float32 and in bf16: seconds, and the peak of the memory beyond that of Python
         and the libraries, over the size of float32 weights
startup  `train.py --help` against the import of transformers and PEFT
busy     40 steps of neural recursion, with their loading and 64 answers. The columns of a peer have
         the time beside one busy process for each core; and, alone, with threads that wait in a
         busy loop for as long as OpenMP lets them
step     a step of neural recursion, and the share of its time that is not forward and backward
text     10 MB and 100 MB of text turned into the file of tokens that pretrain.py reads: seconds,
         and the peak of the memory
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch

import contest
import fit
import genres
import train
import world
from checkpoints import load_tokenizer, write_lines
from contest import Setting, decoding, llama, peer_step
from corpus import token_file
from model import LM
from runs import ASSETS

LLAMA_1GB = llama(32_000, 1024, 16, 16, 2816, max_len=1024, tied=False)
TRAIN = Path(__file__).parent / "train.py"
SPINS = "300000"  # what GNU's OpenMP takes if nothing is set; show.py sets 4,000

# Loading


def loading(setting: Setting) -> Iterator[dict]:
    """A checkpoint stored in float32, and one stored in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        lm = LM(contest.TINY if setting.tiny else LLAMA_1GB)
        size = 4 * sum(p.numel() for p in lm.parameters())
        whos = ("ours", "peer") if find_spec("transformers") else ("ours",)
        for dtype in (torch.float32, torch.bfloat16):
            path = Path(folder) / str(dtype)
            lm.save(path, dtype)
            rounds = [
                {who: alone(who, path, setting.device) for who in whos}
                for _ in range(setting.runs + 1)
            ][1:]  # the first fills the page cache
            stored = str(dtype).removeprefix("torch.")
            loaded = f"load {size / 1e9:.2f} GB of float32, stored in {stored}, and a first token"
            row = {"workload": loaded}
            row |= row_of(rounds, "transformers")
            for who in whos:
                row[f"{who}_peak_over_weights"] = max(r[who]["peak"] for r in rounds) / size
            yield row


def alone(who: str, folder: Path, device: str) -> dict:
    """Load in a fresh process. Returns {"seconds", "peak"}; peak is in bytes, beyond what the
    process held before."""
    code = (
        f"import bench_processes; bench_processes.load_alone({who!r}, {str(folder)!r}, {device!r})"
    )
    return json.loads(contest.in_new_process(code))


def load_alone(who: str, folder: str, device: str) -> None:
    """What `alone` starts: prints its result."""
    ids = torch.tensor([[1]], device=device)  # a GPU has started before the time is taken
    if who == "peer":  # so that this import counts neither as time nor as memory
        import transformers.models.llama.modeling_llama  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

    def step() -> None:
        if who == "ours":
            decoding(LM.from_pretrained(folder, device), ids, 1)()
        else:
            peer_step(contest.load_peer(folder, device=device), ids, 1)()

    before = contest.memory("VmRSS")
    contest.reset_peak()
    seconds = contest.timed(step, device)
    print(json.dumps({"seconds": seconds, "peak": contest.memory("VmHWM") - before}))


def startup(setting: Setting) -> Iterator[dict]:
    """The seconds until `train.py --help` has ended."""
    peers = [name for name in ("transformers", "peft") if find_spec(name)]
    code = {"peft": "import peft", "transformers": "from transformers import AutoModelForCausalLM"}
    commands = {"ours": [TRAIN, "--help"]}
    if peers:
        commands["peer"] = ["-c", "; ".join(code[name] for name in peers)]

    rounds = [
        {who: {"seconds": start(arguments)} for who, arguments in commands.items()}
        for _ in range(setting.runs + 1)
    ][1:]
    yield {"workload": "start of train.py --help"} | row_of(rounds, f"import {' and '.join(peers)}")


# A busy machine


def busy(setting: Setting) -> Iterator[dict]:
    """The seconds of a short training, alone and beside a busy process for each core."""
    cores, number = len(os.sched_getaffinity(0)), count()
    with tempfile.TemporaryDirectory() as folder:
        few = str(Path(folder) / "few.jsonl")
        write_lines(few, world.make(1).questions("dev")[:32])
        steps = 2 if setting.tiny else 40
        flags = ["--device", setting.device, "--dev", few, "--test", few]
        flags += ["--train", few] if setting.tiny else []

        def run(**environment: str) -> float:
            out = f"{folder}/run-{next(number)}"
            command = [TRAIN, "--method", "neural_recursion", "--steps", str(steps), *flags]
            return start([*command, "--out", out], **environment)

        times = [
            (run(), beside(cores, run), run(GOMP_SPINCOUNT=SPINS)) for _ in range(setting.runs)
        ]
    whats = {f"{cores} busy processes": "", "threads that spin longer": ", alone"}
    for place, (what, more) in enumerate(whats.items(), 1):
        rounds = [{"ours": {"seconds": t[0]}, "peer": {"seconds": t[place]}} for t in times]
        yield {"workload": f"{steps} steps of train.py{more}"} | row_of(rounds, what)


def beside(processes: int, run: Callable):
    """What run() returns while so many other processes compute without a pause."""
    endless, others = [sys.executable, "-c", "while True: pass"], []
    try:
        for _ in range(processes):
            others.append(subprocess.Popen(endless))
        return run()
    finally:
        for other in others:
            other.kill()
            other.wait()


def step(setting: Setting) -> Iterator[dict]:
    """The share of a training step that is not forward and backward, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        few = str(Path(folder) / "few.jsonl")
        write_lines(few, world.make(1).questions("dev")[:16])
        line = f"--method neural_recursion --dev {few} --test {few} --out {folder}/run "
        line += f"--train {few} --steps 7" if setting.tiny else "--steps 40"
        arguments = [*line.split(), "--device", setting.device]
        code = f"import bench_processes; bench_processes.step_alone({arguments!r})"
        found = json.loads(contest.in_new_process(code))
    yield {"workload": "a step of train.py"} | found


def step_alone(arguments: list[str]) -> None:
    """What `step` starts: prints {"seconds", "outside"}, of the steps after the fifth."""
    times = {"take_step": [], "mean_gradient": []}

    def timed(name: str) -> Callable:
        original = getattr(fit, name)

        def call(*given):
            began = time.perf_counter()
            result = original(*given)
            times[name].append(time.perf_counter() - began)
            return result

        return call

    fit.take_step, fit.mean_gradient = timed("take_step"), timed("mean_gradient")
    with redirect_stdout(sys.stderr):
        train.main(arguments)
    whole, inside = (seconds[5:] for seconds in times.values())
    share = 1 - sum(inside) / sum(whole)
    print(json.dumps({"seconds": statistics.median(whole), "outside": share}))


# Text


def text(setting: Setting) -> Iterator[dict]:
    """Tokens of text files, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        for size in (10_000,) if setting.tiny else (10_000_000, 100_000_000):
            path = Path(folder) / f"{size}.txt"
            write_text(path, size)
            arguments = f"{str(path)!r}, {f'{folder}/tokens-{size}'!r}"
            code = f"import bench_processes; bench_processes.tokenise_alone({arguments})"
            found = json.loads(contest.in_new_process(code))
            yield {"workload": f"tokenise {size / 1e6:g} MB of text"} | found


def write_text(path: Path, size: int) -> None:
    """Write `size` letters: 3,000 documents of the world, about 1 MB, over and over."""
    documents = genres.documents(world.make(1), 3000)
    text = "".join(f"{document['text']}\n\n" for document in documents)
    path.write_text((text * (size // len(text) + 1))[:size], encoding="utf-8")


def tokenise_alone(path: str, folder: str) -> None:
    """What `text` starts: prints {"seconds", "peak"}."""
    tokenizer = load_tokenizer(ASSETS / "lm")
    before = contest.memory("VmRSS")
    contest.reset_peak()
    seconds = contest.timed(lambda: token_file(path, tokenizer, None, folder))
    print(json.dumps({"seconds": seconds, "peak": contest.memory("VmHWM") - before}))


# What they share


def start(arguments: list, **environment: str) -> float:
    """Seconds until a Python process has ended."""
    command, env = [sys.executable, *arguments], os.environ | environment
    return contest.timed(lambda: subprocess.run(command, check=True, capture_output=True, env=env))


def row_of(rounds: list[dict], peer: str) -> dict:
    """The times of rounds of fresh processes, as in the rows of contest.py."""
    if "peer" not in rounds[0]:
        ours = [r["ours"]["seconds"] for r in rounds]
        return {"seconds": statistics.median(ours), "missing": ["transformers"]}
    pairs = [(r["ours"]["seconds"], r["peer"]["seconds"]) for r in rounds]
    return {"peer": peer} | contest.compare(pairs)


WORKLOADS = {f.__name__: f for f in (loading, startup, busy, step, text)}
