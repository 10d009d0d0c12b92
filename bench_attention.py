"""Time and memory of attention to a shared prefix on a GPU: attention.py beside PyTorch's kernels.

    python bench.py attention --device cuda
    python bench.py attention --device cuda --batch 32 --prefix 100 400      these B and P only

Three contestants get the same queries, keys and values in bf16, with 32 heads of width 128:

attention.py      the shared prefix as it is
sdpa, expanded    scaled_dot_product_attention in its causal flash kernel, behind a copy of the
                  prefix before every row: the copy, and the sum of its gradients, count
flex_attention    FlexAttention, compiled, on the batch as one long text behind the prefix, under a
                  block mask. Joining prefix and text counts; the mask is made before

Copying and joining are the LM's own `append_kv`, a torch.cat of transposed tensors, which runs far
below the bandwidth of a GPU. Without it the other two would be closer, above all for short texts.

The time is the GPU's: the median of up to 20 runs that are enqueued before the first one begins.
"launch" is the time in which Python enqueues one run. If it is the longer one, as for tiny shapes,
a program that does nothing else waits for Python. Memory is the peak beyond what was held before.
The share of the ceiling is the least time that the arithmetic or the memory traffic needs at the
speeds measured first, whichever is longer, divided by the time. The error is the largest relative
one of the output and the gradients, where B <= 8. The first rows are steps of prompt tuning with an
LM of Llama 3.2 1B's shape, where model.attend is the LM's own attention. A step has more launches
than a GPU's queue holds, so its time is that of a CUDA graph, whose kernels are launched at once.
"""

import itertools
import statistics
import time
from functools import cache, partial

from show import Parser, show, show_row

import torch
import torch.nn.functional as F

import cli
from contest import captured
from model import LM, Config, append_kv
from model import attend as plain

HEADS, WIDTH = 32, 128  # H and D
BLOCK = 128  # of FlexAttention's mask
COLUMNS = ["shape", "pass", "contestant", "ms", "launch ms", "MB", "of ceiling", "error"]


def measure(device: str, batch: list[int], prefix: list[int], text: list[int], minutes: float):
    """Print and return the rows for all B, P and T. After so many minutes the other shapes are
    named as missing. ValueError without a GPU."""
    if device != "cuda":
        raise ValueError("attention: these kernels need --device cuda")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    deadline, rows, missing = time.perf_counter() + 60 * minutes, [], []
    torch._dynamo.config.recompile_limit = 64  # FlexAttention, if it compiles anew for a shape
    ceilings = measure_ceilings()
    show_row(COLUMNS, result=True)
    show_row(["---"] * len(COLUMNS), result=True)

    def add(row: dict, run, exact=(), replayed=False):
        try:
            row |= cost(run)
            if replayed:
                row["seconds"] = cost(captured(run))["seconds"]
            if exact:
                row["error"] = max(map(error, run(), exact))
        except Exception as e:  # one contestant's failure, such as no memory, is a row too
            row["failed"] = f"{type(e).__name__}: {e}".split("\n")[0][:80]
        if "seconds" in row and "T" in row:
            least = least_seconds(row["B"], row["P"], row["T"], row["backward"], *ceilings)
            row["share"] = least / row["seconds"]
        rows.append(row)
        show_row(cells(row), result=True)

    lm, prompt_step = prompt_tuning()
    for who, attend in {**CONTESTANTS, "model.attend": plain}.items():
        lm.layers.attend = attend
        row = {"shape": "prompt tuning, 1B, B32 P100 T63", "backward": True, "who": who}
        add(row, prompt_step, replayed=True)
    del lm, prompt_step
    # Long prefixes and short texts come first: what prompts are.
    order = sorted(itertools.product(batch, prefix, text), key=lambda s: (s[1] < 100, s[2], s[1]))
    for B, P, T in order:
        shape = f"B{B} P{P} T{T}"
        if time.perf_counter() > deadline:
            missing.append(shape)
            continue
        torch.cuda.empty_cache()
        tensors = draw(B, P, T, device)
        exact = exact_step(tensors) if B <= 8 else ()
        for backward, (who, attend) in itertools.product((False, True), CONTESTANTS.items()):
            row = {"shape": shape, "B": B, "P": P, "T": T, "backward": backward, "who": who}
            run = partial(step, attend, tensors, backward)
            add(row, run, exact)
        del tensors, exact, run
    show_summary(rows, missing)
    return rows


def cells(row: dict) -> list[str]:
    """The columns of a row."""
    name = [row["shape"], "both" if row["backward"] else "forward", row["who"]]
    if "failed" in row:
        return [*name, row["failed"]]
    share = f"{row['share']:.0%}" if "share" in row else ""
    wrong = f"{row['error']:.1e}" if "error" in row else ""
    times = [f"{1e3 * row[key]:.3f}" for key in ("seconds", "launch")]
    return [*name, *times, f"{row['peak'] / 1e6:.0f}", share, wrong]


def show_summary(rows: list[dict], missing: list[str]) -> None:
    """Print where attention.py is not the fastest or takes more memory, and what is missing."""
    found = {who: {} for who in CONTESTANTS}
    for row in rows:
        if "seconds" in row and "T" in row:
            found[row["who"]][row["shape"], row["backward"]] = row
    ours = found.pop("attention.py")
    for other, theirs in found.items():
        pairs = [(a, theirs[key]) for key, a in ours.items() if key in theirs]
        for backward in (False, True):
            ratios = {
                a["shape"]: b["seconds"] / a["seconds"]
                for a, b in pairs
                if a["backward"] == backward
            }
            if not ratios:
                continue
            slower = [f"{shape} {ratio:.2f}" for shape, ratio in ratios.items() if ratio < 1]
            name = "forward and backward" if backward else "forward"
            show(
                f"{other} / attention.py, {name}: {min(ratios.values()):.2f} to "
                f"{max(ratios.values()):.2f}, median {statistics.median(ratios.values()):.2f} of "
                f"{len(ratios)} shapes; attention.py is slower at: {', '.join(slower) or 'none'}",
                result=True,
            )
        more = [a["shape"] for a, b in pairs if a["peak"] > b["peak"]]
        show(f"attention.py takes more memory than {other} at: {', '.join(more) or 'none'}")
    show(f"not reached: {', '.join(missing) or 'none'}", result=True)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to that of the exact tensor."""
    return ((x.float() - exact).norm() / exact.norm()).item()


def measure_ceilings() -> tuple[float, float]:
    """Print and return the operations and the bytes that the GPU manages in a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    flops = 2 * 8192**3 / cost(lambda: a @ b)["seconds"]
    bandwidth = 4 * a.numel() / cost(a.clone)["seconds"]
    name = torch.cuda.get_device_name()
    show(f"{name}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s", result=True)
    return flops, bandwidth


def cost(run) -> dict:
    """The median seconds of run() on the GPU, those of its launch, and the peak of its memory."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    launch = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    events = [torch.cuda.Event(enable_timing=True) for _ in range(max(3, min(20, int(0.2 / once))))]
    # The GPU sleeps, for cycles of under 1 ns, until all runs are enqueued.
    torch.cuda._sleep(int(3e9 * launch * len(events)))
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return {"seconds": statistics.median(seconds), "launch": launch, "peak": peak}


def draw(B: int, P: int, T: int, device: str, H: int = HEADS, D: int = WIDTH) -> list:
    """q, k, v (B, H, T, D) in the layout of an LM, the keys and values of the prefix, and the
    gradient of the output."""
    shapes = [(B, T, H, D)] * 3 + [(1, P, H, D)] * 2 + [(B, T, H, D)]
    tensors = [torch.randn(s, device=device, dtype=torch.bfloat16).transpose(1, 2) for s in shapes]
    return [*(x.requires_grad_() for x in tensors[:5]), tensors[5]]


def fused(q, k, v, past=None, lengths=None, window=None):
    """attention.attend. Arguments and result of the three contestants are model.attend's."""
    import attention

    return attention.attend(q, k, v, past, lengths, window)


def expanded(q, k, v, past=None, lengths=None, window=None):
    """PyTorch's flash attention, with a copy of the prefix before every row."""
    from torch.nn.attention.bias import causal_lower_right

    k, v = append_kv(past, k, v)
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=q.shape[1] != k.shape[1])


def one_text(q, k, v, past=None, lengths=None, window=None):
    """FlexAttention of all rows as one text, whose queries see the prefix and their own row."""
    if past is None:
        return plain(q, k, v)
    B, _, T, _ = q.shape
    mask = rows_mask(B, past[0].shape[2], T, q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = flex(q.is_cuda)(q, *append_kv(past, k, v), block_mask=mask, enable_gqa=grouped)
    return y[0].transpose(0, 1).unflatten(0, (B, T)).transpose(1, 2)


CONTESTANTS = {"attention.py": fused, "sdpa, expanded": expanded, "flex_attention": one_text}


@cache
def flex(compiled: bool):
    """FlexAttention. torch.compile makes a kernel for the first shape and one for all others."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@cache
def rows_mask(B: int, P: int, T: int, device):
    """The BlockMask of B rows of T positions as one text behind P shared positions, as
    create_block_mask would make it, but without a look at each of (B T)^2 pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    position = torch.arange(P + B * T, device=device) - P  # of each key in the text
    start = torch.arange(B * T, device=device) // T * T  # of each query's row

    def visible(_b, _h, i, j):
        return (position[j] < 0) | ((start[i] <= position[j]) & (position[j] <= i))

    first = torch.arange(0, B * T, BLOCK, device=device)[:, None]  # query of a block
    last = (first + BLOCK - 1).clamp(max=B * T - 1)
    low = position[::BLOCK]  # first key of a block, and the last one
    high = (low + BLOCK - 1).clamp(max=B * T - 1)
    some = (low < 0) | ((low <= last) & (start[first] <= high))
    full = (high < 0) | ((high <= first) & (start[last] <= low.clamp(min=0)))
    full &= (high - low == BLOCK - 1) & (last - first == BLOCK - 1)

    def ordered(blocks):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    lengths = B * T, P + B * T
    blocks = *ordered(some & ~full), *ordered(full)
    return BlockMask.from_kv_blocks(*blocks, BLOCK, visible, seq_lengths=lengths)


def step(attend, tensors, backward: bool) -> list[torch.Tensor]:
    """The output and, if `backward`, the gradients of q, k, v and the prefix."""
    *leaves, gradient = tensors
    with torch.set_grad_enabled(backward):
        y = attend(*leaves[:3], tuple(leaves[3:]))
    return [y.detach(), *(torch.autograd.grad(y, leaves, gradient) if backward else ())]


def exact_step(tensors) -> list[torch.Tensor]:
    """What `step` should return, computed row by row in float32."""
    q, k, v, *prefix, gradient = (x.detach().float() for x in tensors)
    parts = []
    for row in zip(*(x.split(1) for x in (q, k, v))):
        leaves = [x.requires_grad_() for x in (*row, *(x.detach() for x in prefix))]
        part = (*leaves, gradient[len(parts) : len(parts) + 1])
        parts.append(step(plain, part, True))
    *rows, k, v = zip(*parts)
    return [*map(torch.cat, rows), sum(k), sum(v)]


def least_seconds(B: int, P: int, T: int, backward: bool, flops: float, bandwidth: float) -> float:
    """Seconds of the products that are needed, or of reading and writing every tensor once."""
    products, texts, prefixes = (7, 12, 6) if backward else (2, 4, 2)
    operations = 2 * products * B * HEADS * WIDTH * T * (P + (T + 1) / 2)
    moved = 2 * HEADS * WIDTH * (texts * B * T + prefixes * P)
    return max(operations / flops, moved / bandwidth)


def prompt_tuning():
    """A random LM of Llama 3.2 1B's shape, and a step of prompt tuning with it."""
    config = Config(128_256, 2048, 16, 32, 8, 64, 8192, 8192, rope_theta=500_000.0)
    with torch.device("cuda"):
        lm = LM(config).to(torch.bfloat16).requires_grad_(False)
        prompt, ids = torch.randn(100, 2048) * 0.02, torch.randint(config.vocab_size, (32, 64))
    prompt.requires_grad_()

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            h = lm(lm.embed(ids[:, :-1]), prefix=lm.read(prompt))
            loss = F.cross_entropy(lm.logits(h[:, -8:]).flatten(0, 1), ids[:, -8:].flatten())
        return torch.autograd.grad(loss, prompt)

    return lm, run


def main(argv: list[str]) -> list[dict]:
    """Parse the flags of `bench.py attention`, measure, and return the rows."""
    parser = Parser(prog="bench.py attention", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="a GPU")
    for flag, sizes, text in (
        ("--batch", [8, 32, 256], "B, the rows"),
        ("--prefix", [20, 100, 400, 4096], "P, the positions of the shared prefix"),
        ("--text", [64, 512, 1648], "T, the positions of a row"),
    ):
        parser.add_argument(flag, type=cli.COUNT, nargs="+", default=sizes, help=text)
    text = "measure no further shape after so many minutes"
    parser.add_argument("--minutes", type=cli.number_type(float, 0), default=60.0, help=text)
    args = parser.parse_args(argv)
    return measure(args.device, args.batch, args.prefix, args.text, args.minutes)
