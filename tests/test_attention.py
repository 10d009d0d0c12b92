"""The fused kernels, in Triton's interpreter on the CPU, against plain attention in float64."""

import os
import random
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when attention.py defines its kernels

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import QUESTIONS, TINY, before, build, close, randomise, seeded  # noqa: E402
from test_promises import ROOT  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import attention  # noqa: E402
import bench  # noqa: E402
import bench_attention  # noqa: E402
import model  # noqa: E402
from adapters import SoftPrompt  # noqa: E402
from data import TokenizedExample, batches  # noqa: E402
from fit import target_loss  # noqa: E402
from recurse import COMPOSITIONS  # noqa: E402


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 queries and 16 keys, and few programs: short rows have several tiles, and a
    program sums the gradient of a shared prefix over several rows."""
    monkeypatch.setattr(attention, "TILES", dict.fromkeys(attention.TILES, (16, 16, 2)))
    monkeypatch.setattr(attention, "FLOAT32_TILES", (16, 16, 2))
    monkeypatch.setattr(attention, "PROGRAMS", 8)


def inputs(B, H, K, T, P, D, rows, dtype=torch.float32):
    """q, k and v in the layout of Attention.qkv, and the prefix's keys and values if rows > 0."""
    shapes = [(B, T, heads, D) for heads in (H, K, K)] + [(rows, P, K, D)] * (2 if rows else 0)
    tensors = [torch.randn(s, generator=seeded(i), dtype=dtype) for i, s in enumerate(shapes)]
    return [t.transpose(1, 2).requires_grad_() for t in tensors]


def with_gradients(attend, tensors, lengths, window, dtype):
    """The output for tensors q, k, v and a prefix, and the gradient of each of them."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = attend(*leaves[:3], tuple(leaves[3:]) or None, lengths, window)
    weight = torch.randn(y.shape, generator=seeded(9)).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def error(ours, exact):
    """The largest difference, relative to the largest value."""
    if not exact.numel():
        return 0.0
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=0.1)).item()


def check(shape, lengths=None, window=None):
    tensors = inputs(*shape)
    lengths = None if lengths is None else torch.tensor(lengths)
    ours = with_gradients(attention.attend, tensors, lengths, window, torch.float32)
    exact = with_gradients(model.attend, tensors, lengths, window, torch.float64)
    for name, a, b in zip(("o", "dq", "dk", "dv", "prefix dk", "prefix dv"), ours, exact):
        assert a.shape == b.shape and error(a, b) < 1e-5, name


SHAPES = {  # (B, H, K, T, P, D, rows of the prefix), lengths, window
    "one token": ((2, 2, 2, 1, 0, 16, 0), None, None),
    "one token behind a prefix": ((2, 2, 1, 1, 20, 16, 1), None, None),
    "no prefix, several tiles": ((2, 1, 1, 35, 0, 16, 0), None, None),
    "an empty prefix": ((2, 2, 2, 5, 0, 16, 1), None, None),
    "shared": ((3, 1, 1, 18, 21, 16, 1), None, None),
    "shared, grouped, as long as a tile": ((5, 4, 1, 9, 16, 12, 1), None, None),
    "shared, several rows in a program": ((5, 1, 1, 9, 33, 16, 1), None, None),
    "one for each row": ((3, 2, 1, 18, 5, 20, 3), None, None),
    "ragged": ((3, 4, 2, 10, 40, 16, 3), [40, 0, 7], None),
    "ragged, padding within a tile": ((3, 1, 1, 10, 48, 16, 3), [48, 0, 20], None),
    "shared and ragged": ((3, 1, 1, 10, 20, 16, 1), [20, 0, 1], None),
    "shared with padding": ((2, 2, 2, 10, 20, 16, 1), [3], None),
    "window": ((2, 2, 1, 40, 20, 16, 1), None, 7),
    "window from the last key of a tile": ((2, 1, 1, 18, 20, 16, 1), None, 6),
    "window of one": ((2, 2, 2, 18, 3, 16, 1), None, 1),
    "window, ragged": ((2, 1, 1, 18, 40, 16, 2), [40, 5], 20),
}


@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_equal_plain_attention(small_tiles, name):
    check(*SHAPES[name])


@pytest.mark.parametrize("tile", [(32, 16, 2), (16, 32, 2)], ids=str)
@pytest.mark.parametrize("name", ["shared", "ragged", "window"])
def test_tiles_may_have_more_queries_or_more_keys(small_tiles, monkeypatch, name, tile):
    monkeypatch.setattr(attention, "FLOAT32_TILES", tile)
    check(*SHAPES[name])


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(small_tiles, seed):
    rng = random.Random(seed)
    K, D = rng.choice([1, 2]), rng.choice([16, 24, 40])
    P, T = rng.randint(0, 40), rng.randint(1, 30)
    B, rows = rng.randint(1, 4), rng.choice([1, 0])
    rows = rows or B
    lengths = rng.choice([None, [rng.randint(0, P) for _ in range(B)]])
    check((B, K * rng.choice([1, 3]), K, T, P, D, rows), lengths, rng.choice([None, None, 5, 25]))


def test_a_wide_head_in_the_tiles_of_float32():
    check((2, 2, 1, 40, 70, 128, 1))


def test_the_gradient_of_a_sum_has_no_strides(small_tiles):
    tensors = inputs(2, 2, 2, 5, 3, 16, 1)
    ours, plain = (
        torch.autograd.grad(attend(*tensors[:3], tensors[3:]).sum(), tensors)
        for attend in (attention.attend, model.attend)
    )
    for a, b in zip(ours, plain):
        close(a, b, 1e-5)


def test_prefix_and_text_joined_equal_both_apart(small_tiles):
    """As in decoding, where k and v hold the prefix too."""
    q, k, v, *past = inputs(2, 4, 2, 5, 20, 16, 2)
    for lengths in (None, torch.tensor([20, 3])):
        ours = attention.attend(q, *model.append_kv(past, k, v), None, lengths, 18)
        close(ours, attention.attend(q, k, v, past, lengths, 18), 0.0)
        close(ours, model.attend(q, k, v, past, lengths, 18), 1e-5)


def dot_of_bf16(self, a, b, total, *_):
    """The interpreter's dot product, which takes the bits of a bf16 number for an integer."""
    values = [
        (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar.is_bf16() else x.data
        for x in (a, b)
    ]
    return interpreter.TensorHandle(np.matmul(*values) + total.data, total.dtype.scalar)


# The interpreter truncates a number to bf16, which doubles the error. A GPU rounds it.
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 3.0), (torch.float16, 1.5)])
def test_half_precision_is_as_exact_as_plain_attention(small_tiles, monkeypatch, dtype, most):
    if dtype == torch.bfloat16:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bf16)
    tensors = inputs(2, 4, 2, 20, 30, 32, 1, dtype)
    exact = with_gradients(model.attend, tensors, None, None, torch.float64)
    ours, plain = (
        with_gradients(attend, tensors, None, None, dtype)
        for attend in (attention.attend, model.attend)
    )
    for a, b, c in zip(ours, plain, exact):
        assert a.dtype == dtype and error(a, c) < most * error(b, c) < 0.1


def test_what_the_kernels_do_not_take_goes_to_plain_attention(monkeypatch):
    def refuse(*_):
        raise AssertionError("a kernel was called")

    wide = inputs(1, 1, 1, 2, 2, 256, 1)
    with torch.no_grad():
        close(attention.attend(*wide[:3], wide[3:]), model.attend(*wide[:3], wide[3:]), 1e-5)
    monkeypatch.setattr(attention.FusedAttention, "apply", refuse)
    with pytest.raises(AssertionError, match="a kernel"):
        attention.attend(*inputs(1, 1, 1, 2, 0, 128, 0))
    none = inputs(1, 1, 1, 0, 2, 16, 1)
    for given in (wide, inputs(1, 1, 1, 2, 2, 16, 1, torch.float64), none):
        ours, plain = (f(*given[:3], given[3:]) for f in (attention.attend, model.attend))
        assert torch.equal(ours, plain)


# Whole models


@pytest.mark.parametrize("kind", ["shared", "ragged"])
def test_lm_behind_a_prefix(make_lm, kind):
    plain, fused = (make_lm("windows") for _ in "ab")
    fused.layers.attend = attention.attend
    ids = torch.tensor([row[:2] * 4 for row in (*QUESTIONS[2:], QUESTIONS[0], QUESTIONS[0][::-1])])
    for keep in (False, True):
        h = [lm(lm.embed(ids), before(kind, lm)[0], keep) for lm in (plain, fused)]
        close(*(out[0] if keep else out for out in h))


def trained_step(method, attend):
    """The loss on a batch of questions, its gradient, and the adapter's parameters after a step."""
    lm = randomise(model.LM(TINY["tied"], attend)).requires_grad_(False).eval()
    if method == "prompt_tuning":
        adapter = SoftPrompt(torch.randn(5, 32, generator=seeded()))
    else:
        adapter = build(method, lm)[0].parts[1]
    examples = [TokenizedExample(ids, ids[::-1][:3]) for ids in QUESTIONS[::2]]
    stack, prefix = COMPOSITIONS[method](lm, adapter)
    loss = target_loss(stack, prefix, batches(examples, 2, 0, 0))
    loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=1e-2).step()
    return [loss.detach(), *(p.grad for p in adapter.parameters()), *adapter.parameters()]


@pytest.mark.parametrize("method", ["prompt_tuning", "neural_recursion"])
def test_a_training_step_equals_the_plain_one(method):
    close(trained_step(method, attention.attend), trained_step(method, model.attend), 1e-4)


# The benchmark


def test_the_contestants_compute_the_same(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bf16)
    tensors = bench_attention.draw(3, 5, 7, "cpu", H=2, D=16)
    exact = bench_attention.exact_step(tensors)
    for who, attend in bench_attention.CONTESTANTS.items():
        backward = who != "flex_attention"  # it has no backward pass on a CPU
        given = tensors if backward else [x.detach() for x in tensors]
        ours = bench_attention.step(attend, given, backward)
        assert max(map(bench_attention.error, ours, exact)) < 0.01


@pytest.mark.parametrize("B, P, T", [(3, 5, 7), (5, 150, 60), (2, 300, 200), (3, 128, 128)])
def test_the_block_mask_of_flex_attention(B, P, T):
    mask = bench_attention.rows_mask(B, P, T, torch.device("cpu"))
    exact = create_block_mask(mask.mask_mod, None, None, B * T, P + B * T, "cpu")
    assert torch.equal(mask.to_dense(), exact.to_dense()) and mask.seq_lengths == exact.seq_lengths
    assert torch.equal(mask.full_kv_num_blocks, exact.full_kv_num_blocks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu():
    for device, problem in (("cpu", "need --device cuda"), ("cuda", "no CUDA device")):
        with pytest.raises(ValueError, match=problem):
            bench.main(["attention", "--device", device])


# The interpreter shows that the kernels are right, but not that they compile.
COMPILE = """
import torch, triton, attention
from triton.backends.compiler import GPUTarget

class Driver:  # of a GPU that is not there
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
q = torch.empty(4, 4, 100, 128, dtype=torch.bfloat16)
k, prefix, lse = q[:, :2], q[:1, :2], torch.empty(4, 2, 200)
given = (q, k, k, prefix, prefix, torch.zeros(4, dtype=torch.int32), 30)
x, y = attention.strided(q), attention.strided(k)
*sources, sizes = attention.kernel_inputs(*given)

def compile(kernel, *arguments, rows=()):
    S, grid, options = attention.tiled(kernel, q.dtype, sizes, 100)
    compiled = getattr(attention, kernel + "_kernel").warmup(
        *arguments, S, *rows, grid=grid, **options
    )
    # Tensor cores are used, and the tiles fit consumer GPUs too.
    assert "wgmma" in compiled.asm["ptx"] and compiled.metadata.shared <= 99 * 1024

compile("forward", x, *sources, x, lse)
compile("backward_q", x, *sources, x, x, lse, lse, x)
compile("backward_kv", x, sources[0], x, lse, lse, y, y, rows=(4,))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
