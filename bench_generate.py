"""Workloads of bench.py that use an LM: generation, loading, and the start of a program.

generation  16 samples of 16 new tokens for each of 32 questions of 24 tokens, and greedy
            continuations of 32, 8 and 1 questions, against transformers' generate. Samples share
            the reading of their question: 24 + 16 * 16 positions instead of 16 * (24 + 16), 2.3
            times as many. Then 32 questions with prompts of four lengths in one batch; transformers
            gets them as embeddings, padded on the left. Then a neural recursion, which no peer
            generates with: transformers reads with its LM twice. On a GPU also without the graph of
            replay.py.
loading     `LM.from_pretrained` and a first token against transformers, on a checkpoint of 1.1 GB,
            each time in a fresh process: seconds, and the peak of the memory beyond that of Python
            and the libraries, divided by the size of the weights.
startup     `train.py --help` against the import of transformers and PEFT
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import contest
import generate
from contest import Contest, Setting, decoding, llama
from model import LM
from recurse import Stack, new_connector
from runs import ASSETS

LLAMA_100M = llama(32_000, 768, 12, 12, 1792, max_len=1024)
LLAMA_1GB = llama(32_000, 1024, 16, 16, 2816, max_len=1024, tied=False)

# Generation


def generation(setting: Setting) -> Iterator[Contest]:
    """Samples, greedy decoding, prompts mixed in a batch, and a recursion."""
    questions, tokens, new, n = (3, 5, 4, 2) if setting.tiny else (32, 24, 16, 16)
    for source in setting.sources(ASSETS / "lm", LLAMA_100M):
        lm, peer = setting.pair(source)
        ids = setting.random_ids(lm, questions, tokens)
        prompts = mixed_prompts(setting, lm, questions)
        stack = Stack(lm, [new_connector(lm, "neural_recursion", 2).to(lm.embed_tokens.weight)])
        size = sum(p.numel() for p in lm.parameters()) / 1e6
        greedy = [
            ("greedy", decoding(lm, ids[:B], new), peer_step(peer, ids[:B], new), B)
            for B in (questions, *((2, 1) if setting.tiny else (8, 1)))
        ]
        for how, ours, theirs, rows in (
            (f"n={n}", decoding(lm, ids, new, n), peer_step(peer, ids, new, n), n * questions),
            *greedy,
            ("mixed prompts", *mixed_steps(lm, peer, ids, new, prompts), questions),
            ("recursion", decoding(stack, ids, new), twice(peer_step(peer, ids, new)), questions),
        ):
            B = min(rows, questions)
            title = f"generate, LM of {size:.0f}M, {B} questions of {tokens}, {how}"
            name = "transformers, twice" if how == "recursion" else "transformers"
            peers = {name: None if peer is None else theirs}
            if setting.device == "cuda":
                peers["ours, without a graph"] = without_graph(ours)
            same = how in ("greedy", "mixed prompts")  # not samples, nor the LM without Connector
            yield Contest(setting, title, lm, ours, peers, rows * new, rows, same)


def peer_step(peer, ids: Tensor, new: int, n: int = 1, **inputs: Tensor) -> Callable:
    """`decoding` by transformers. Neither stops at an eos or narrows what it samples from."""
    options = {"do_sample": False}
    if n > 1:
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        options["num_return_sequences"] = n
    options |= {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    inputs = inputs or {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def step() -> list[list[int]]:
        return peer.generate(**inputs, **options)[:, -new:].tolist()

    return step


def without_graph(step: Callable) -> Callable:
    """The same decoding, with every kernel launched by Python."""

    def run():
        graphs, generate.GRAPHS = generate.GRAPHS, ()
        try:
            return step()
        finally:
            generate.GRAPHS = graphs

    return run


def twice(step: Callable) -> Callable:
    """A function that takes the step two times."""

    def both() -> None:
        step()
        step()

    return both


@torch.no_grad()
def mixed_prompts(setting: Setting, lm: LM, count: int) -> list[Tensor]:
    """The vectors of `count` prompts, of four lengths in turn."""
    lengths = (1, 2, 3, 4) if setting.tiny else (5, 10, 20, 40)
    prompts = [lm.embed(setting.random_ids(lm, P)) for P in lengths]
    return [prompts[b % 4] for b in range(count)]


@torch.no_grad()
def mixed_steps(lm: LM, peer, ids: Tensor, new: int, prompts: list[Tensor]):
    """Our greedy continuation of questions behind prompts of their own, and the peer's."""

    @torch.no_grad()
    def ours() -> list[list[int]]:
        prefixes = [lm.read(prompt) for prompt in prompts[:4]]  # they come back in turn
        return decoding(lm, ids, new, prefix=[prefixes[b % 4] for b in range(len(ids))])()

    rows = [torch.cat([prompt, row]) for prompt, row in zip(prompts, lm.embed(ids))]
    T = max(map(len, rows))
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(T) >= T - len(row) for row in rows]).to(ids)
    return ours, peer_step(peer, ids, new, inputs_embeds=x, attention_mask=mask)


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
            row = {"workload": f"load {size / 1e9:.2f} GB stored in {stored}, and a first token"}
            row |= row_of(rounds, "transformers")
            for who in whos:
                row[f"{who}_peak_over_weights"] = max(r[who]["peak"] for r in rounds) / size
            yield row


def alone(who: str, folder: Path, device: str) -> dict:
    """Load in a fresh process. Returns {"seconds", "peak"}; peak is in bytes, beyond what the
    process held before."""
    code = f"import bench_generate; bench_generate.load_alone({who!r}, {str(folder)!r}, {device!r})"
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
    commands = {"ours": [Path(__file__).parent / "train.py", "--help"]}
    if peers:
        commands["peer"] = ["-c", "; ".join(code[name] for name in peers)]

    def start(arguments: list) -> float:
        command = [sys.executable, *arguments]
        return contest.timed(lambda: subprocess.run(command, check=True, capture_output=True))

    rounds = [
        {who: {"seconds": start(arguments)} for who, arguments in commands.items()}
        for _ in range(setting.runs + 1)
    ][1:]
    yield {"workload": "start of train.py --help"} | row_of(rounds, f"import {' and '.join(peers)}")


def row_of(rounds: list[dict], peer: str) -> dict:
    """The times of rounds of fresh processes, as in the rows of contest.py."""
    if "peer" not in rounds[0]:
        ours = [r["ours"]["seconds"] for r in rounds]
        return {"seconds": statistics.median(ours), "missing": ["transformers"]}
    pairs = [(r["ours"]["seconds"], r["peer"]["seconds"]) for r in rounds]
    return {"peer": peer} | contest.compare(pairs)


WORKLOADS = {f.__name__: f for f in (generation, loading, startup)}
