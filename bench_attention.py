"""Time and memory of attention to a shared prefix on a GPU: attention.py beside PyTorch's kernels.

    python bench.py attention --device cuda
    python bench.py attention --device cuda --batch 32 --prefix 100 400      these B and P only

Three contestants get the same queries, keys and values in bf16, with 32 heads of width 128:

attention.py      the shared prefix as it is
sdpa, expanded    scaled_dot_product_attention, with a copy of the prefix before every row
flex_attention    FlexAttention on the batch as one long text behind the prefix, under a block mask

A row has the median of 10 runs, the peak of the memory beyond what was held before, the largest
relative error of the output and the gradients, and the share of the ceiling: the least time that
the arithmetic or the memory traffic needs at the speeds measured first, whichever is longer,
divided by the time. The last rows are steps of prompt tuning with an LM of Llama 3.2 1B's shape.
"""

import itertools
import json
import statistics
import time
from functools import partial

from show import Parser

import torch
import torch.nn.functional as F

import cli
from model import LM, Config, append_kv
from model import attend as plain

HEADS, WIDTH = 32, 128  # H and D


def measure(device: str, batch: list[int], prefix: list[int], text: list[int]) -> list[dict]:
    """Print and return the rows for all B, P and T. ValueError without a GPU."""
    if device != "cuda" or not torch.cuda.is_available():
        raise ValueError("attention: these kernels need a GPU (--device cuda), and there is none")
    rows, ceilings = [], measure_ceilings()
    for B, P, T in itertools.product(batch, prefix, text):
        tensors, contestants = contest(B, P, T, device)
        exact = exact_step(tensors) if B <= 32 else ()  # more would not fit beside the rest
        for backward, (who, attend) in itertools.product((False, True), contestants.items()):
            row = {"B": B, "P": P, "T": T, "backward": backward, "who": who}
            run = partial(step, attend, tensors, backward)
            try:
                row["error"] = max((error(x, y) for x, y in zip(run(), exact)), default=None)
                row["seconds"], row["peak"] = cost(run)
                row["share"] = least_seconds(B, P, T, backward, *ceilings) / row["seconds"]
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            rows.append(row)
            print(json.dumps(row), flush=True)
    for who in ("model.attend", "attention.attend"):
        row = {"who": who, "step": "prompt tuning, 1B, B=32 P=100 T=64"}
        row["seconds"], row["peak"] = cost(prompt_step(who))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to that of the exact tensor."""
    return ((x.float() - exact).norm() / exact.norm()).item()


def measure_ceilings() -> tuple[float, float]:
    """Print and return the operations and the bytes that the GPU manages in a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    flops, bandwidth = 2 * 8192**3 / cost(lambda: a @ b)[0], 4 * a.numel() / cost(a.clone)[0]
    print(
        f"{torch.cuda.get_device_name()}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s"
    )
    return flops, bandwidth


def cost(run, runs: int = 10) -> tuple[float, int]:
    """The median seconds of run(), and the bytes it holds beyond what was held before."""
    for _ in range(3):
        run()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - before


def contest(B: int, P: int, T: int, device: str, H: int = HEADS, D: int = WIDTH):
    """Return q, k, v, the prefix's keys and values, the gradient of the output, and functions of
    the first five. q, k and v are (B, H, T, D) in the layout of an LM."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import attention

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v, gradient = (draw(B, T, H, D) for _ in range(4))
    prefix = [draw(1, P, H, D) for _ in "kv"]
    leaves = [x.requires_grad_() for x in (q, k, v, *prefix)]

    def expanded(q, k, v, *prefix):
        return F.scaled_dot_product_attention(
            q, *append_kv(prefix, k, v), causal_lower_right(T, P + T)
        )

    def visible(_b, _h, i, j):  # query i of the long text is at position i % T of row i // T
        return (j < P) | (((j - P) // T == i // T) & (j - P <= i))

    cuda = device == "cuda"
    torch._dynamo.reset()  # otherwise it stops compiling after 8 shapes
    flex = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
    mask = create_block_mask(visible, None, None, B * T, P + B * T, device, _compile=cuda)

    def one_text(q, k, v, *prefix):
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        y = flex(q, *append_kv(prefix, k, v), block_mask=mask)
        return y[0].transpose(0, 1).unflatten(0, (B, T)).transpose(1, 2)

    def fused(q, k, v, *prefix):
        return attention.attend(q, k, v, prefix)

    contestants = {"attention.py": fused, "sdpa, expanded": expanded, "flex_attention": one_text}
    return (*leaves, gradient), contestants


def step(attend, tensors, backward: bool) -> list[torch.Tensor]:
    """The output and, if `backward`, the gradients of q, k, v and the prefix."""
    *leaves, gradient = tensors
    with torch.set_grad_enabled(backward):
        y = attend(*leaves)
    return [y.detach(), *(torch.autograd.grad(y, leaves, gradient) if backward else ())]


def exact_step(tensors) -> list[torch.Tensor]:
    """What `step` should return, computed row by row in float32."""
    q, k, v, *prefix, gradient = (x.detach().float() for x in tensors)
    parts = []
    for row in zip(*(x.split(1) for x in (q, k, v))):
        leaves = [x.requires_grad_() for x in (*row, *(x.detach() for x in prefix))]
        part = (*leaves, gradient[len(parts) : len(parts) + 1])
        parts.append(step(lambda q, k, v, *p: plain(q, k, v, p), part, True))
    *rows, k, v = zip(*parts)
    return [*map(torch.cat, rows), sum(k), sum(v)]


def least_seconds(B: int, P: int, T: int, backward: bool, flops: float, bandwidth: float) -> float:
    """Seconds of the products that are needed, or of reading and writing every tensor once."""
    products, texts, prefixes = (7, 12, 6) if backward else (2, 4, 2)
    operations = 2 * products * B * HEADS * WIDTH * T * (P + (T + 1) / 2)
    moved = 2 * HEADS * WIDTH * (texts * B * T + prefixes * P)
    return max(operations / flops, moved / bandwidth)


def prompt_step(who: str):
    """A step of prompt tuning with a random LM of Llama 3.2 1B's shape."""
    import attention

    config = Config(128_256, 2048, 16, 32, 8, 64, 8192, 8192, rope_theta=500_000.0)
    attend = plain if who == "model.attend" else attention.attend
    with torch.device("cuda"):
        lm = LM(config, attend).to(torch.bfloat16).requires_grad_(False)
        prompt, ids = torch.randn(100, 2048) * 0.02, torch.randint(config.vocab_size, (32, 64))
    prompt.requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            h = lm(lm.embed(ids[:, :-1]), prefix=lm.read(prompt))
            loss = F.cross_entropy(lm.logits(h[:, -8:]).flatten(0, 1), ids[:, -8:].flatten())
        return torch.autograd.grad(loss, prompt)

    return step


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
    args = parser.parse_args(argv)
    return measure(args.device, args.batch, args.prefix, args.text)
