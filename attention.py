"""Fused attention over a shared prefix, forward and backward, in Triton. This is flash attention
(Dao et al. 2022; Dao 2023) for many short texts behind one prompt.

Plain attention writes the score of every query and key to the memory of the GPU and reads it again.
Moving the scores takes longer than computing them. These kernels keep them in registers:

tiling          A program holds BLOCK_M queries and visits the keys in tiles of BLOCK_N. No more
                than BLOCK_M * BLOCK_N scores exist at a time: see `forward_kernel`.
online softmax  A softmax needs the largest score and the sum of all terms. The program keeps both
                for the keys so far, and rescales when a larger score comes: see `absorb`.
recomputation   The backward pass computes the softmax weights again, from the queries, the keys and
                one number per query: see `weights`.

A shared prefix is not copied for the rows of the batch: its batch stride is 0. (Model.py copies it
in the last layer of a training step, where the first positions have keys and no query.) The
programs of one head run one after another, so its prefix stays in the cache of the GPU. The
gradient of a shared prefix is summed over the batch inside `backward_kv_kernel`.

    lm = LM.from_pretrained("assets/lm", "cuda", torch.bfloat16, attend=attention.attend)

Dimensions are model.py's, and G = H / K, the query heads of one key head. The G queries of one
position read the same keys, so they are rows of the same tile: row m of a key head is its query
head m % G at position m // G. Keys are numbered from the start of the prefix: text position t is
key P + t. Needs torch and triton, and model.py for what the kernels do not take. TRITON_INTERPRET=1
runs the kernels on a CPU, slowly, for tests.
"""

import math
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = tl.constexpr(math.log(2))
# The score of a key that a query must not see. A power of two: HIDDEN * scale is then exact, and
# s * scale - larger is 0 even as one multiply-add.
HIDDEN = tl.constexpr(-(2.0**100))
PROGRAMS = 512  # to keep a large GPU busy; an H100 has 132 processors
# By kernel: BLOCK_M, BLOCK_N and stages, the tiles in flight from memory. Four warps (128 threads)
# feed the tensor cores 64 rows at a time: BLOCK_M in the first two kernels, BLOCK_N in the last.
# Eight warps with more rows read less, but spill registers, and short texts leave them idle.
TILES = {"forward": (64, 32, 3), "backward_q": (64, 64, 2), "backward_kv": (64, 64, 2)}
FLOAT32_TILES = 32, 32, 2
ON_CPU = bool(triton.knobs.runtime.interpret)  # Triton's interpreter takes tensors on the CPU

# A tensor (B, heads, positions, D) as kernels get it: its data and strides. That of D is 1.
Strided = namedtuple("Strided", "data batch head position")
# The N keys and values of the prefix or of the text. The first of them is key `first`.
Source = namedtuple("Source", "k v first N")
# BLOCK_M queries: of row b, key head `head` and query heads q_head, at positions t, with `index`
# into lse. Row b sees no key before `start`.
Queries = namedtuple("Queries", "b head q_head t index start")
# What the kernels share. They use powers of 2, for which a GPU has an instruction, instead of e:
# scale is log2(e) / sqrt(D). lengths is (B,) or None. BLOCK_D is the power of two from D on.
Sizes = namedtuple("Sizes", "B K T P scale window lengths G D BLOCK_D BLOCK_M BLOCK_N")

# Parts of kernels. Triton compiles them into the kernels that call them.


@triton.jit
def dot(a, b):
    """a @ b, summed in float32. Without "ieee", float32 factors would be rounded to 10 bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load(x, b, head, position, end, S):
    """x at positions (R,) -> (R, BLOCK_D). Tiles have powers of two as sizes: zeros stand at
    positions from `end` on and in channels from D on. `head` is a number or (R,)."""
    d = tl.arange(0, S.BLOCK_D)
    row = x.data + b.to(tl.int64) * x.batch + head * x.head + position * x.position
    mask = (position < end)[:, None] & (d < S.D)[None, :]
    return tl.load(row[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store(x, b, head, position, end, tile, S):
    """Write what `load` would read."""
    d = tl.arange(0, S.BLOCK_D)
    row = x.data + b.to(tl.int64) * x.batch + head * x.head + position * x.position
    mask = (position < end)[:, None] & (d < S.D)[None, :]
    tl.store(row[:, None] + d[None, :], tile.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def pick(b, head, m, S):
    """Queries m of a key head in row b of the batch. A ragged prefix is aligned to the right."""
    start = 0
    if S.lengths is not None:
        start = S.P - tl.load(S.lengths + b)
    index = (b * S.K + head) * S.T * S.G + m
    return Queries(b, head, head * S.G + m % S.G, m // S.G, index, start)


@triton.jit
def program_queries(S):
    """The Queries of this program. The number of the tile changes fastest, then the row of the
    batch, then the head. The last tile sees the most keys and comes first."""
    tiles = tl.cdiv(S.T * S.G, S.BLOCK_M)
    tile, row = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return pick(row % S.B, row // S.B, tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M), S)


@triton.jit
def visible(source, n, t, start, S):
    """Whether the query at position t sees the n-th key of a source."""
    key = source.first + n
    seen = (n < source.N) & (key <= S.P + t) & (key >= start)
    if S.window is not None:
        seen = seen & (key > S.P + t - S.window)
    return seen


@triton.jit
def key_range(source, queries, S):
    """The keys of a source that a tile of queries visits, (low, full, high). Those from low to full
    are seen by all its queries and need no mask. Those from full to high need one. With a window,
    or with padding in the first tile of keys, all need one, and full is low."""
    oldest, t = queries.start, tl.min(queries.t)
    if S.window is not None:
        oldest = tl.maximum(oldest, S.P + t + 1 - S.window)
    low = tl.maximum(oldest - source.first, 0) // S.BLOCK_N * S.BLOCK_N
    full = low
    if S.window is None:
        seen = tl.minimum(source.N, S.P + t + 1 - source.first) // S.BLOCK_N * S.BLOCK_N
        full = tl.where(source.first + low >= oldest, seen, low)
    return low, full, tl.minimum(source.N, S.P + tl.max(queries.t) + 1 - source.first)


@triton.jit
def absorb(state, q, queries, source, low, high, S, MASKED: tl.constexpr):
    """Take keys low to high into the softmax average of a tile of queries: the online softmax.

    After any number of keys with scores s, the state is
        acc = sum 2^(s - largest) v,    total = sum 2^(s - largest),    largest = max s
    and acc / total is the attention to these keys. When a larger score comes, every earlier term is
    too large by the same factor, so acc and total are multiplied by 2^(old - new largest).
    """
    acc, total, largest = state
    for low_n in range(low, high, S.BLOCK_N):
        n = low_n + tl.arange(0, S.BLOCK_N)
        keys = load(source.k, queries.b, queries.head, n, source.N, S)
        s = dot(q, tl.trans(keys))
        if MASKED:
            seen = visible(source, n[None, :], queries.t[:, None], queries.start, S)
            s = tl.where(seen, s, HIDDEN)
        # Until a query meets its first visible key, every hidden key adds 2^0. That key's rescale
        # is 0 and removes them. HIDDEN is finite because inf - inf is not a number.
        larger = tl.maximum(largest, tl.max(s, 1) * S.scale)
        rescale = tl.exp2(largest - larger)
        p = tl.exp2(s * S.scale - larger[:, None])  # one multiply-add and one power
        values = load(source.v, queries.b, queries.head, n, source.N, S)
        acc = acc * rescale[:, None] + dot(p.to(values.dtype), values)
        total = total * rescale + tl.sum(p, 1)
        largest = larger
    return acc, total, largest


@triton.jit(do_not_specialize=["S"])
def forward_kernel(q, prefix, text, o, lse, S):
    """Attention of one tile of queries: o, and lse (B, K, T * G), the log2 of the sum of 2^score.
    lse is the one number per query that the backward pass needs."""
    queries = program_queries(S)
    q_tile = load(q, queries.b, queries.q_head, queries.t, S.T, S)
    total = tl.zeros((S.BLOCK_M,), tl.float32)
    state = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32), total, total + HIDDEN
    low, full, high = key_range(prefix, queries, S)
    state = absorb(state, q_tile, queries, prefix, low, full, S, False)
    state = absorb(state, q_tile, queries, prefix, full, high, S, True)
    low, full, high = key_range(text, queries, S)
    state = absorb(state, q_tile, queries, text, low, full, S, False)
    acc, total, largest = absorb(state, q_tile, queries, text, full, high, S, True)
    store(o, queries.b, queries.q_head, queries.t, S.T, acc / total[:, None], S)
    tl.store(lse + queries.index, largest + tl.log2(total), mask=queries.t < S.T)


# The backward pass. With weights p = softmax(s) and o = p v:
#     dv = p^T do,    dp = do v^T,    ds = p * (dp - delta),    dq = ds k,    dk = ds^T q
# where delta, the sum of p * dp over the keys, equals the sum of o * do over the channels.


@triton.jit
def weights(a, b, lse, S):
    """Softmax weights, in the layout of a @ b^T. lse is largest + log2(total) of the forward pass,
    so 2^(s - lse) = 2^(s - largest) / total."""
    return tl.exp2(dot(a, tl.trans(b)) * S.scale - lse)


@triton.jit
def add_dq(dq, q, do, lse, delta, queries, source, low, high, S, MASKED: tl.constexpr):
    """Add the part of the keys low to high of a source to dq."""
    for low_n in range(low, high, S.BLOCK_N):
        n = low_n + tl.arange(0, S.BLOCK_N)
        keys = load(source.k, queries.b, queries.head, n, source.N, S)
        values = load(source.v, queries.b, queries.head, n, source.N, S)
        p = weights(q, keys, lse[:, None], S)
        if MASKED:
            seen = visible(source, n[None, :], queries.t[:, None], queries.start, S)
            p = tl.where(seen, p, 0.0)
        ds = p * (dot(do, tl.trans(values)) - delta[:, None])
        dq += dot(ds.to(keys.dtype), keys)
    return dq


@triton.jit(do_not_specialize=["S"])
def backward_q_kernel(q, prefix, text, o, do, lse, delta, dq, S):
    """dq of one tile of queries, and its delta, which `backward_kv_kernel` reads."""
    queries = program_queries(S)
    q_tile = load(q, queries.b, queries.q_head, queries.t, S.T, S)
    o_tile = load(o, queries.b, queries.q_head, queries.t, S.T, S)
    do_tile = load(do, queries.b, queries.q_head, queries.t, S.T, S)
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + queries.index, delta_tile, mask=queries.t < S.T)
    lse_tile = tl.load(lse + queries.index, mask=queries.t < S.T, other=0.0)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    low, full, high = key_range(prefix, queries, S)
    acc = add_dq(acc, q_tile, do_tile, lse_tile, delta_tile, queries, prefix, low, full, S, False)
    acc = add_dq(acc, q_tile, do_tile, lse_tile, delta_tile, queries, prefix, full, high, S, True)
    low, full, high = key_range(text, queries, S)
    acc = add_dq(acc, q_tile, do_tile, lse_tile, delta_tile, queries, text, low, full, S, False)
    acc = add_dq(acc, q_tile, do_tile, lse_tile, delta_tile, queries, text, full, high, S, True)
    # A score counts in units of log2(e), hence scale * ln(2), which is 1 / sqrt(D).
    store(dq, queries.b, queries.q_head, queries.t, S.T, acc * (S.scale * LN2), S)


@triton.jit
def add_dkv(
    state, tensors, source, keys, values, n, head, row, rows, low, high, S, MASKED: tl.constexpr
):
    """Add the parts of queries low to high of each row to dk and dv of a tile of keys."""
    dk, dv = state
    q, do, lse, delta = tensors
    blocks = tl.cdiv(tl.maximum(high - low, 0), S.BLOCK_M)
    for i in range(0, rows * blocks):  # all blocks of all rows: row i // blocks, block i % blocks
        m = low + i % blocks * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
        queries = pick(row + i // blocks, head, m, S)
        q_tile = load(q, queries.b, queries.q_head, queries.t, S.T, S)
        do_tile = load(do, queries.b, queries.q_head, queries.t, S.T, S)
        lse_tile = tl.load(lse + queries.index, mask=queries.t < S.T, other=0.0)
        delta_tile = tl.load(delta + queries.index, mask=queries.t < S.T, other=0.0)
        p = weights(keys, q_tile, lse_tile[None, :], S)  # (BLOCK_N, BLOCK_M), transposed
        if MASKED:
            seen = visible(source, n[:, None], queries.t[None, :], queries.start, S)
            p = tl.where(seen, p, 0.0)
        dv += dot(p.to(do_tile.dtype), do_tile)
        ds = p * (dot(values, tl.trans(do_tile)) - delta_tile[None, :])
        dk += dot(ds.to(q_tile.dtype), q_tile)
    return dk, dv


@triton.jit(do_not_specialize=["S", "rows"])
def backward_kv_kernel(q, source, do, lse, delta, dk, dv, S, rows):
    """dk and dv of one tile of keys, summed over `rows` rows of the batch: 1, or more if the source
    is a shared prefix. The tile stays, and all queries of these rows that see it pass by."""
    tiles, program = tl.cdiv(source.N, S.BLOCK_N), tl.program_id(0)
    tile, head, part = program % tiles, program // tiles % S.K, program // tiles // S.K
    n, key = tile * S.BLOCK_N + tl.arange(0, S.BLOCK_N), source.first + tile * S.BLOCK_N
    row = part * rows
    keys = load(source.k, row, head, n, source.N, S)
    values = load(source.v, row, head, n, source.N, S)
    # Queries from low to masked_end need a mask: some do not see all keys of the tile. Queries
    # past the text are zeros and add nothing, and the gradients of keys past N are not stored.
    low, high = tl.maximum(key - S.P, 0) * S.G, S.T * S.G
    last = tl.minimum(key + S.BLOCK_N, source.first + source.N) - 1
    masked_end = low + tl.cdiv(tl.maximum(last - S.P, 0) * S.G - low, S.BLOCK_M) * S.BLOCK_M
    masked_end = tl.minimum(masked_end, high)
    if S.window is not None:
        high = tl.minimum(high, (key + S.BLOCK_N - 1 - S.P + S.window) * S.G)
        masked_end = high
    if S.lengths is not None:  # no query sees the padding of its row
        hidden = (rows == 1) & (key + S.BLOCK_N <= S.P - tl.load(S.lengths + row))
        high = tl.where(hidden, low, high)
        masked_end = high
    zeros = tl.zeros((S.BLOCK_N, S.BLOCK_D), tl.float32)
    tensors = q, do, lse, delta
    rows = tl.minimum(rows, S.B - row)
    key_tile = source, keys, values, n, head, row, rows
    state = add_dkv((zeros, zeros), tensors, *key_tile, low, masked_end, S, True)
    dk_acc, dv_acc = add_dkv(state, tensors, *key_tile, masked_end, high, S, False)
    store(dk, part, head, n, source.N, dk_acc * (S.scale * LN2), S)
    store(dv, part, head, n, source.N, dv_acc, S)


# Around the kernels


def strided(x: Tensor) -> Strided:
    """x (B, heads, positions, D) with its strides."""
    return Strided(x, *x.stride()[:3])


def kernel_inputs(q, k, v, prefix_k, prefix_v, lengths, window):
    """The prefix and the text as Sources, and Sizes without tiles. A prefix of batch 1 becomes one
    of B with stride 0."""
    (B, H, T, D), K = q.shape, k.shape[1]
    P = 0 if prefix_k is None else prefix_k.shape[2]
    text = Source(strided(k), strided(v), first=P, N=T)
    prefix = text._replace(first=0, N=0)  # of no keys: its tensors are not read
    if prefix_k is not None:
        prefix = Source(*(strided(x.expand(B, -1, -1, -1)) for x in (prefix_k, prefix_v)), 0, P)
    compiled = map(tl.constexpr, (H // K, D, max(16, triton.next_power_of_2(D)), 0, 0))
    S = Sizes(B, K, T, P, math.log2(math.e) / math.sqrt(D), window, lengths, *compiled)
    return prefix, text, S


def tiled(kernel: str, dtype: torch.dtype, S: Sizes, keys: int):
    """Sizes with the tiles of a kernel that visits `keys` keys, the number of programs for
    queries, and options of Triton."""
    M, N, stages = FLOAT32_TILES if dtype == torch.float32 else TILES[kernel]
    if S.D.value > 128:
        N = N // 2
    M = min(M, max(16, triton.next_power_of_2(S.T * S.G.value)))
    N = min(N, max(16, triton.next_power_of_2(keys)))
    S = S._replace(BLOCK_M=tl.constexpr(M), BLOCK_N=tl.constexpr(N))
    grid = (triton.cdiv(S.T * S.G.value, M) * S.B * S.K,)
    return S, grid, {"num_warps": 4, "num_stages": stages}


class FusedAttention(torch.autograd.Function):
    """The kernels and their gradients. `attend` prepares the arguments."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, lengths, window):
        """q (B, H, T, D), k and v (B, K, T, D), prefix (1 | B, K, P, D), lengths (B,) or None."""
        given = q, k, v, prefix_k, prefix_v, lengths
        prefix, text, sizes = kernel_inputs(*given, window)
        B, H, T, D = q.shape
        S, grid, options = tiled("forward", q.dtype, sizes, max(prefix.N, T))
        o = q.new_empty(B, T, H, D).transpose(1, 2)  # the layout that o_proj reads
        lse = q.new_empty(B, S.K, T * H // S.K, dtype=torch.float32)
        forward_kernel[grid](strided(q), prefix, text, strided(o), lse, S, **options)
        ctx.save_for_backward(*given, o, lse)
        ctx.window = window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        """do (B, H, T, D) -> the gradients of q, k, v and the prefix."""
        *given, o, lse = ctx.saved_tensors
        q, k, v, prefix_k, prefix_v, _ = given
        prefix, text, sizes = kernel_inputs(*given, ctx.window)
        S, grid, options = tiled("backward_q", q.dtype, sizes, max(prefix.N, text.N))
        do = do if do.stride(3) == 1 else do.contiguous()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        tensors = strided(q), prefix, text, strided(o), strided(do), lse, delta, strided(dq)
        backward_q_kernel[grid](*tensors, S, **options)

        def kv_gradients(source: Source, k: Tensor, v: Tensor, needed):
            if not any(needed):
                return None, None
            S, _, options = tiled("backward_kv", q.dtype, sizes, source.N)
            tiles, parts, dtype = triton.cdiv(source.N, S.BLOCK_N.value) * S.K, S.B, k.dtype
            shared = len(k) < S.B
            if shared:  # divide the batch only as far as the GPU needs programs
                parts, dtype = min(S.B, triton.cdiv(PROGRAMS, max(1, tiles))), torch.float32
            rows = triton.cdiv(S.B, parts)
            shape = triton.cdiv(S.B, rows), source.N, S.K, k.shape[3]
            dk, dv = (k.new_empty(shape, dtype=dtype).transpose(1, 2) for _ in "kv")
            tensors = strided(q), source, strided(do), lse, delta, strided(dk), strided(dv)
            backward_kv_kernel[(tiles * len(dk),)](*tensors, S, rows, **options)
            if shared:
                dk, dv = dk.sum(0, True).to(k.dtype), dv.sum(0, True).to(k.dtype)
            return dk, dv

        dk, dv = kv_gradients(text, k, v, ctx.needs_input_grad[1:3])
        prefix_grads = kv_gradients(prefix, prefix_k, prefix_v, ctx.needs_input_grad[3:5])
        return dq, dk, dv, *prefix_grads, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, past=None, lengths=None, window=None) -> Tensor:
    """Causal attention of a text to itself and to a prefix. model.attend explains the arguments.

    q (B, H, T, D), k and v (B, K, T, D), past None or a pair (1 | B, K, P, D); without past, k and
    v may be (B, K, P + T, D). lengths (1 | B,). Returns (B, H, T, D). The kernels take tensors of
    one type (float32, bfloat16, float16) on a GPU, with D up to 256, or 128 if a gradient is
    needed. model.attend does the rest.
    """
    given = [q, k, v, *(past or ())]
    if torch.is_autocast_enabled(q.device.type):
        given = [x.to(torch.get_autocast_dtype(q.device.type)) for x in given]
    widest = 128 if torch.is_grad_enabled() and any(x.requires_grad for x in given) else 256
    types = {x.dtype for x in given}
    supported = len(types) == 1 and types <= {torch.float32, torch.bfloat16, torch.float16}
    if not supported or q.shape[3] > widest or q.numel() == 0 or not (q.is_cuda or ON_CPU):
        from model import attend as plain

        return plain(q, k, v, past, lengths, window)
    q, k, v, *past = (x if x.stride(3) == 1 else x.contiguous() for x in given)
    P = k.shape[2] - q.shape[2]
    if P > 0:
        past, k, v = (k[:, :, :P], v[:, :, :P]), k[:, :, P:], v[:, :, P:]
    if lengths is not None:
        lengths = lengths.expand(len(q)).to(torch.int32).contiguous()
    with torch.cuda.device_of(q):
        return FusedAttention.apply(q, k, v, *(past or (None, None)), lengths, window)
