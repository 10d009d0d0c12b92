"""One contest of bench.py: our step and its peers' in turn, on the same weights and batch.

    setting = Setting(runs=5)
    lm, peer = setting.pair(config)                    our LM and transformers', of the same weights
    for row in measure(Contest(setting, "a title", lm, ours, {"PEFT": theirs}, 2048, 2048)): ...

There is a row for each peer. Times are medians of `runs` rounds. In each of them every contestant
takes one step; they take turns in being the first. The ratio is the peer's time over ours: its
median over the rounds, with the smallest and the largest.

- The operations of a step are those of its products of matrices, counted while it runs. Attention
  counts as if it had no causal mask.
- The matrix rate is how many of them a second the machine does at the LM's own shapes. It is
  measured in the same rounds.
- floor = our operations / matrix rate; share = floor / our time. operations_ratio = the peer's
  operations / ours, which is the ratio of the times if both ran at the same share.
- The peak is the memory that a step holds beyond what was held before it: weights and prompt do
  not count.
"""

import ctypes
import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import generate
from model import LM, Config
from model import attend as plain_attention
from replay import record


@dataclass
class Setting:
    """What the flags of bench.py say."""

    runs: int = 5
    tiny: bool = False  # shapes that measure nothing
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    model: str | None = None  # takes the place of the LMs of the table
    attend: Callable | None = None  # of our LM; None: model.attend

    def pair(self, source: Config | str | Path, dtype: torch.dtype | None = None):
        """Our LM and transformers', both frozen, with the same weights: those of a folder, or
        random ones in the shape of a Config. The second is None if transformers is missing."""
        dtype = dtype or self.dtype
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(source, Config):
                LM(source).save(Path(folder) / "lm")
                source = Path(folder) / "lm"
            lm = LM.from_pretrained(source, self.device, dtype, self.attend)
            peer = load_peer(lm.folder, dtype, self.device) if find_spec("transformers") else None
        return lm, peer

    def sources(self, *of_the_table: Config | Path) -> tuple:
        """The LMs of a workload: --model, or a tiny one, or those of the table."""
        if self.model:
            return (self.model,)
        return (TINY,) if self.tiny else of_the_table

    def autocast(self):
        """The context in which train.py computes a loss."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def random_ids(self, lm: LM, *shape: int, below: int | None = None) -> torch.Tensor:
        """Random token ids of the LM, or below a smaller bound."""
        V = min(lm.config.vocab_size, below or lm.config.vocab_size)
        return torch.randint(V, shape).to(self.device)


def llama(vocab_size: int, dim: int, n_layers: int, n_heads: int, hidden: int, **more) -> Config:
    """The shape of a Llama without grouped heads."""
    return Config(vocab_size, dim, n_layers, n_heads, n_heads, dim // n_heads, hidden, **more)


TINY = llama(300, 32, 2, 2, 64, max_len=64)


@dataclass
class Contest:
    """Our step and its peers', which return the same: a loss, or lists of tokens.

    lm      whose matrices give the matrix rate
    peers   name: step, or None if it is not installed
    tokens  how many a step reads or writes
    rows    how many positions go through a matrix of the LM at once
    same    whether ours and the peers' results should be the same
    """

    setting: Setting
    workload: str
    lm: LM
    ours: Callable
    peers: dict[str, Callable | None]
    tokens: int
    rows: int
    same: bool = True


def measure(contest: Contest) -> list[dict]:
    """Run a contest. Returns a row for each peer, or one without a peer if none is installed."""
    device = contest.setting.device
    peers = {name: step for name, step in contest.peers.items() if step is not None}
    steps = {"ours": contest.ours} | peers
    results, operations, peaks = {}, {}, {}
    for name, step in steps.items():
        results[name] = step()  # this is also the warm-up
        operations[name] = count_operations(step, contest.lm)
        peaks[name] = peak_memory(step, device)
    multiply, products = layer_products(contest.lm, contest.rows, contest.setting.dtype)
    rounds, names = [], list(steps)
    for i in range(contest.setting.runs):
        first = i % len(names)
        order = names[first:] + names[:first]
        seconds = {name: timed(steps[name], device) for name in order}
        rounds.append(seconds | {"products": timed(multiply, device)})
    rate = products / statistics.median(seconds["products"] for seconds in rounds)
    row = {"workload": contest.workload}
    row["seconds"] = statistics.median(seconds["ours"] for seconds in rounds)
    row["tokens_per_second"] = contest.tokens / row["seconds"]
    row |= {"peak": peaks["ours"], "operations": operations["ours"], "matrix_rate": rate}
    row["floor"] = operations["ours"] / rate
    row["share"] = row["floor"] / row["seconds"]
    missing = [name for name in contest.peers if name not in peers]
    if not peers:
        return [row | {"missing": missing}]
    rows = []
    for name in peers:
        beside = row | {"peer": name} | compare([(s["ours"], s[name]) for s in rounds])
        beside["peer_tokens_per_second"] = contest.tokens / beside["peer_seconds"]
        beside["peer_peak"], beside["peer_operations"] = peaks[name], operations[name]
        beside["operations_ratio"] = operations[name] / operations["ours"]
        if contest.same:
            beside |= difference(results["ours"], results[name])
        rows.append(beside | {"missing": missing})
    return rows


def compare(seconds: list[tuple[float, float]]) -> dict:
    """From pairs (our seconds, the peer's): the medians, and the median ratio with its spread."""
    ratios = sorted(peer / ours for ours, peer in seconds)
    ours, peer = (statistics.median(side) for side in zip(*seconds))
    ratio = {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}
    return {"seconds": ours, "peer_seconds": peer} | ratio


def decoding(model, ids: torch.Tensor, new: int, n: int = 1, prefix=None) -> Callable:
    """n samples of each question (B, T) at temperature 1, or its greedy continuation if n is 1."""

    def step() -> list[list[int]]:
        samples = generate.generate(model, ids.tolist(), prefix, new, temperature=float(n > 1), n=n)
        return [sample.ids for row in samples for sample in row]

    return step


def peer_step(peer, ids: torch.Tensor, new: int, n: int = 1, **inputs: torch.Tensor) -> Callable:
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


def difference(ours, theirs) -> dict:
    """How far two losses are apart, or the share of lists of tokens that are identical."""
    if isinstance(ours, float):
        return {"loss_difference": abs(ours - theirs)}
    return {"identical": sum(a == b for a, b in zip(ours, theirs)) / len(ours)}


def load_peer(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """transformers' model of a checkpoint folder, frozen."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def in_new_process(code: str, input: str = "") -> str:
    """The last line that Python code prints in a process of its own."""
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(
        command, input=input, check=True, capture_output=True, text=True, cwd=here
    )
    return done.stdout.splitlines()[-1]


def timed(step: Callable, device: str = "cpu") -> float:
    """Seconds that step() takes, until a GPU has finished it."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    step()
    return now() - start


FORMULAS = flop_registry  # of operations. It lacks attention on a CPU, which counts the same
for end in ("", "_backward"):
    FORMULAS.setdefault(
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}"),
        FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")],
    )


def count_operations(step: Callable, lm: LM) -> int:
    """Floating-point operations of all products of matrices in step().

    Neither kernels of attention.py nor a replayed graph can be counted, so the LM attends and
    decodes without them meanwhile.
    """
    attend, lm.layers.attend = lm.layers.attend, plain_attention
    graphs, generate.GRAPH_DEVICES = generate.GRAPH_DEVICES, ()
    try:
        with torch.compiler.set_stance("force_eager"):  # nor can compiled code be counted
            with FlopCounterMode(display=False) as counter:
                step()
    finally:
        lm.layers.attend, generate.GRAPH_DEVICES = attend, graphs
    return counter.get_total_flops()


def layer_products(lm: LM, rows: int, dtype: torch.dtype) -> tuple[Callable, int]:
    """A function that multiplies `rows` vectors by every matrix of the LM's layers, in a dtype, and
    how many operations that takes. On a GPU Python does not launch the products one by one."""
    matrices = [p for p in lm.layers.parameters() if p.dim() == 2 and p.is_floating_point()]
    weights = [p.detach().to(dtype) for p in matrices]
    inputs = {w.shape[1]: w.new_empty(rows, w.shape[1]).normal_() for w in weights}
    times = 20 if weights[0].is_cuda else 1

    def multiply() -> None:
        for weight in times * weights:
            F.linear(inputs[weight.shape[1]], weight)

    multiply()
    products = 2 * rows * times * sum(weight.numel() for weight in weights)
    return captured(multiply) if times > 1 else multiply, products


def captured(run: Callable) -> Callable:
    """A function that launches the kernels of run() on a GPU again, all of them at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    return record(run)


def peak_memory(step: Callable, device: str = "cpu") -> int | None:
    """Bytes that step() holds at most, beyond what was held before. None if it cannot be known:
    on a CPU it takes Linux and the GNU C library."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    trim(0)  # what earlier steps freed goes back to the system, so that it counts again
    reset_peak()
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def memory(mark: str) -> int:
    """Bytes of memory in use: VmRSS now, VmHWM at the peak. Linux."""
    return 1024 * int(re.search(rf"{mark}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak() -> None:
    """Let VmHWM start again from the memory in use. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
