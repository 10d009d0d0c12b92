"""A decoder-only transformer that loads published checkpoints, and its KV cache.

Every method around a language model (LM; train.py lists them) uses it through these calls:

    x = lm.embed(ids)            (B, T) -> (B, T, C)      token embeddings
    p = lm.read(x)               (B, T, C) -> Prefix      the KV cache of x, for what follows it
    h = lm(x, prefix=None)       (B, T, C) -> (B, T, C)   all layers and the final norm
    z = lm.logits(h)             (..., C) -> (..., V)

A Prefix is a KV cache: the keys and values, layer by layer, of positions before the text. A soft
prompt, a few-shot prompt, the question shared by n samples and the decoding cache are prefixes.
The LM is causal, so a prefix does not depend on the text after it: one reading serves many texts.

Dimensions, here and in every file: B batch, T text tokens, P prompt tokens, C model width,
V vocabulary, H query heads, K key/value heads, D head width, N candidates or passages per question,
L passage tokens. (1 | B, ...) means one row for all, or one per row of the batch.

Needs torch. Loading and saving a published folder needs checkpoints.py and families.py beside it.

    lm = LM.from_pretrained("assets/lm")
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

KV = tuple[Tensor, Tensor]  # keys and values
ALL = slice(None)  # positions


@dataclass(frozen=True)
class Config:
    """The shape of a decoder. The defaults make a Llama-like LM with a tied output layer.
    `checkpoints.read_config` makes these fields from a published config.json."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K; each key/value head serves H / K query heads
    head_dim: int  # D; H * D need not equal C
    hidden_dim: int  # width of the MLP
    max_len: int  # longest context, prefix included
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding table
    bos: int | None = None
    eos: tuple[int, ...] = ()  # any of these ends a text
    family: str = "llama"
    parallel: bool = False  # GPT-NeoX: x + attention(norm1(x)) + mlp(norm2(x))
    post_norm: bool = False  # OLMo-2: x + norm(f(x)) instead of x + f(norm(x))
    layer_norm: bool = False  # LayerNorm, with mean and bias, instead of RMSNorm
    gated: bool = True  # down(act(gate(x)) * up(x)); otherwise down(act(up(x)))
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # norm of queries and keys: per "head", or over the full "width"
    learned_positions: bool = False  # GPT-2: a table of position embeddings instead of rope
    rotary_dim: int | None = None  # channels of a head that rope rotates; None: all D
    rope_scaling: tuple[float, ...] = ()  # see `rope_inv_freq`
    windows: tuple[int | None, ...] = ()  # per layer: how many positions a query sees; None: all
    divide_by_depth: bool = False  # layer i divides its attention scores by i + 1


def append_kv(past: KV | None, k: Tensor, v: Tensor) -> KV:
    """Joins past (1 | B, K, P, D) and k, v (B, K, T, D): each becomes (B, K, P + T, D)."""
    if past is None:
        return k, v
    past_k, past_v = (t.expand(len(k), -1, -1, -1) for t in past)
    return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, past: KV | None = None, lengths=None, window=None):
    """Causal attention of T text positions to themselves and to the P positions of a prefix.

    q (B, H, T, D); past (1 | B, K, P, D) of the prefix; k, v (B, K, T, D) of the text. Without
    `past`, k and v (B, K, P + T, D) hold prefix and text. attention.attend has the same arguments,
    and reads a shared past without a copy per row. lengths (1 | B,): see Prefix.
    Query t sees text positions up to t and prefix positions j >= P - lengths[b]; with a window it
    sees the last `window` of these. Returns (B, H, T, D).
    """
    k, v = append_kv(past, k, v)
    T = q.shape[2]
    if window is not None:  # no query sees a key older than the first query's window
        oldest = max(0, k.shape[2] - T + 1 - window)
        k, v = k[:, :, oldest:], v[:, :, oldest:]
    P = k.shape[2] - T  # the prefix positions kept
    mask = None
    if lengths is not None:
        mask = (torch.arange(P + T, device=q.device) >= P - lengths[:, None])[:, None, None]
    needs_mask = P > 0 or lengths is not None or (window is not None and window < T)
    if T > 1 and needs_mask:  # T = 1: no later keys; otherwise is_causal is enough
        visible = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)  # keys 0 to P + t
        if window is not None:
            visible = visible.triu(P + 1 - window)
        mask = visible if mask is None else mask & visible
    is_causal = mask is None and T > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


def rope_inv_freq(config: Config, device=None) -> Tensor:
    """Radians per position by which each pair of channels is rotated, (rotary_dim / 2,).

    rope_scaling (factor,) divides every frequency. Llama 3.1's (factor, low, high, original_len)
    divides those that make fewer than `low` turns in original_len positions, keeps those that make
    more than `high`, and interpolates between.
    """
    n = config.rotary_dim or config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, n, 2, device=device).float() / n)
    if not config.rope_scaling:
        return inv_freq
    if len(config.rope_scaling) == 1:
        return inv_freq / config.rope_scaling[0]
    factor, low, high, original_len = config.rope_scaling
    turns = original_len / (2 * math.pi / inv_freq)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq


def rope_cos_sin(config: Config, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin of rotary position embeddings (Su et al. 2021) for positions (..., T), each
    (..., 1, T, rotary_dim), the first half of sin negated. None if positions are learned."""
    if config.learned_positions:
        return None
    angles = positions[..., None, :, None].float() * rope_inv_freq(config, positions.device)
    return torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()


def apply_rope(x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotates the first rotary_dim channels of x (B, heads, T, D). Channel d is paired with channel
    d + rotary_dim / 2, as in published weights; x.roll exchanges the two halves."""
    if cos_sin is None:
        return x
    cos, sin = cos_sin
    n = cos.shape[-1]
    if n < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :n], cos_sin), x[..., n:]], -1)
    return torch.addcmul(x * cos, x.roll(n // 2, -1), sin).to(x.dtype)


def make_norm(config: Config, width: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last `width` channels."""
    return (nn.LayerNorm if config.layer_norm else nn.RMSNorm)(width, config.norm_eps)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads. `attend` does the arithmetic."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        c = self.config = config
        self.index = index
        # A Connector may have more layers than the LM, hence the modulo.
        self.window = c.windows[index % len(c.windows)] if c.windows else None
        q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, q_width, c.qkv_bias)
        self.o_proj = nn.Linear(q_width, c.dim, c.o_bias)
        self.k_proj = nn.Linear(c.dim, kv_width, c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, kv_width, c.qkv_bias)
        if c.qk_norm is not None:
            per_head = c.qk_norm == "head"
            self.q_norm = make_norm(c, c.head_dim if per_head else q_width)
            self.k_norm = make_norm(c, c.head_dim if per_head else kv_width)

    def qkv(self, x: Tensor, cos_sin, at=ALL) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, S, D) of the S positions `at`, k and v (B, K, T, D) of all; q and
        k after norm and rope."""
        c = self.config
        queried = x[:, at].contiguous()  # a slice would take longer
        q, k, v = self.q_proj(queried), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.divide_by_depth:
            q = q / (self.index + 1)
        at_cos_sin = None if cos_sin is None else tuple(t[..., at, :] for t in cos_sin)
        return apply_rope(q, at_cos_sin), apply_rope(k, cos_sin), v

    def forward(self, x: Tensor, cos_sin, prefix: "Prefix | None", keep: bool, attend, at=ALL):
        """x (B, T, C) -> (B, T, C) at the positions `at`, and (k, v): with keep those that extend
        the prefix."""
        q, k, v = self.qkv(x, cos_sin, at)
        before = k.shape[2] - q.shape[2]  # text positions without a query are as good as a prefix
        past, lengths = None, None
        if prefix is not None:
            past, lengths = prefix.layers[self.index], prefix.lengths
            if keep or before or prefix.questions:  # attention reads the joined keys and values
                k, v = prefix.joined(self.index, k, v) if keep else append_kv(past, k, v)
                past = None
            if prefix.questions:
                past, attend = prefix.questions[self.index], prefix.attend
            lengths = lengths if lengths is None else lengths + before
        y = attend(q, k, v, past, lengths, self.window)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)


gelu_tanh = partial(F.gelu, approximate="tanh")  # GPT-2's; Pythia's gelu is the exact one
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}  # by their published names
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or the plain down(act(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.act = ACTIVATIONS[c.activation]
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, c.mlp_bias) if c.gated else None
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, c.mlp_bias)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP. post_attention_layernorm (the published name) is the norm before the MLP,
    or with post_norm the one behind attention."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        c = self.config = config
        self.input_layernorm = nn.Identity() if c.post_norm else make_norm(c, c.dim)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = make_norm(c, c.dim)
        self.mlp = MLP(c)
        if c.post_norm:
            self.post_feedforward_layernorm = make_norm(c, c.dim)

    def keys_values(self, x: Tensor, cos_sin) -> KV:
        """Keys and values of x (B, T, C). A sharded block gathers its weights for this call."""
        return self.self_attn.qkv(self.input_layernorm(x), cos_sin)[1:]

    def forward(self, x: Tensor, cos_sin, prefix: "Prefix | None", keep: bool, attend, at=ALL):
        """x (B, T, C) -> (B, T, C) at the positions `at`, and Attention's (k, v)."""
        y, kv = self.self_attn(self.input_layernorm(x), cos_sin, prefix, keep, attend, at)
        x = x[:, at]
        if self.config.post_norm:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(x)), kv
        if self.config.parallel:
            return x + y + self.mlp(self.post_attention_layernorm(x)), kv
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


@dataclass
class Prefix:
    """A KV cache: what text can attend to before its own first token.

    layers   per layer the keys, after norm and rope, and the values. Each is (1, K, P, D) for a
             prefix shared by every row of the batch, or (B, K, P, D) for one per row.
    lengths  None if every row has all P positions. Otherwise (1 | B,), and the prefix is ragged:
             row b has only the LAST lengths[b] positions, so that all rows end together.
    """

    layers: list[KV]
    lengths: Tensor | None = None
    questions = ()  # keys and values that several rows have in common, in cache.SampleCache

    @property
    def size(self) -> int:
        """P, the number of stored positions. No row is longer."""
        return self.layers[0][0].shape[2]

    @property
    def rows(self) -> int:
        """1 if shared, otherwise B."""
        return self.layers[0][0].shape[0]

    def row_lengths(self, B: int) -> list[int]:
        """The number of prefix positions before each of B rows of text."""
        return [self.size] * B if self.lengths is None else self.lengths.expand(B).tolist()

    def joined(self, i: int, k: Tensor, v: Tensor) -> KV:
        """Layer i's keys and values, followed by k and v of the text."""
        return append_kv(self.layers[i], k, v)

    def select(self, index: Tensor) -> "Prefix":
        """Rows `index` (R,) in that order. A shared prefix serves any rows and stays as it is."""
        if self.rows == 1:
            return self
        lengths = None if self.lengths is None else self.lengths[index % len(self.lengths)]
        return Prefix([(k[index], v[index]) for k, v in self.layers], lengths)

    def drop_padding(self, T: int, lengths: Tensor | None) -> "Prefix":
        """Removes the right padding of the last T positions, of which the first lengths[b] are real
        in row b (None: all T). Each row moves right by its padding, so that all end together."""
        if lengths is None or (lengths == T).all():
            return self
        device = self.layers[0][0].device
        padding = T - lengths.to(device)  # (B,)
        rows = torch.arange(len(padding), device=device)[:, None]
        # Position j gets j - padding. The first ones repeat position 0; `lengths` hides them.
        source = (torch.arange(self.size, device=device) - padding[:, None]).clamp(min=0)
        # t[rows, :, source] is (B, P, K, D): what two indices select comes first.
        moved = [tuple(t[rows, :, source].transpose(1, 2) for t in pair) for pair in self.layers]
        return Prefix(moved, (self.size if self.lengths is None else self.lengths) - padding)

    @staticmethod
    def stack(prefixes: list["Prefix | None"]) -> "Prefix | None":
        """Joins prefixes of one row each, one per example, into one. None is an empty prefix."""
        present = [p for p in prefixes if p is not None]
        if not present:
            return None
        if any(p.rows != 1 for p in present):
            raise ValueError("Prefix.stack takes prefixes of one row each, one for every example")
        lengths = [0 if p is None else p.row_lengths(1)[0] for p in prefixes]
        P, layers = max(lengths), []
        for i, pair in enumerate(present[0].layers):
            stacked = tuple(t.new_zeros(len(prefixes), t.shape[1], P, t.shape[3]) for t in pair)
            for b, (prefix, n) in enumerate(zip(prefixes, lengths)):
                if n > 0:
                    for whole, part in zip(stacked, prefix.layers[i]):
                        whole[b, :, P - n :] = part[0, :, part.shape[2] - n :]
            layers.append(stacked)
        ragged = torch.tensor(lengths, device=layers[0][0].device)
        return Prefix(layers, None if min(lengths) == P else ragged)

    def save(self, folder, lm) -> None:
        """Writes prefix.safetensors, with the fingerprint of `lm`, the LM that has read it."""
        from checkpoints import write_prefix

        write_prefix(folder, self.layers, self.lengths, lm.fingerprint())

    @classmethod
    def load(cls, folder, lm) -> "Prefix":
        """What `save` wrote, on the LM's device. ValueError if another LM has read it."""
        from checkpoints import read_prefix

        return cls(*read_prefix(folder, lm.fingerprint(), lm.embed_tokens.weight))


def text_positions(layers: "Layers", x: Tensor, prefix: Prefix | None) -> Tensor:
    """The positions of text x (B, T, C): (T,), or (1 | B, T) after a ragged prefix. ValueError if a
    shape or the prefix's number of layers is wrong or, unless it is ragged, the text too long."""
    if x.dim() != 3 or x.shape[-1] != layers.config.dim:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, {layers.config.dim})")
    if prefix is not None and len(prefix.layers) != len(layers):  # a Stack's has those of all parts
        raise ValueError(f"the prefix has {len(prefix.layers)} layers, expected {len(layers)}")
    T, P = x.shape[1], 0 if prefix is None else prefix.size
    if prefix is not None and prefix.rows not in (1, x.shape[0]):
        raise ValueError(f"the prefix has {prefix.rows} rows, the text {x.shape[0]}")
    if prefix is not None and prefix.lengths is not None:
        return torch.arange(T, device=x.device) + prefix.lengths[:, None]
    if P + T > layers.config.max_len:
        raise ValueError(f"{P} + {T} positions exceed the LM's context of {layers.config.max_len}")
    return torch.arange(T, device=x.device) + P


class Layers(nn.ModuleList):
    """n blocks in a row, called with a prefix. The LM holds one of these, a Connector another."""

    def __init__(self, config: Config, n: int, attend=attend):
        super().__init__(Block(config, i) for i in range(n))
        self.config, self.attend = config, attend

    def forward(self, x: Tensor, prefix: Prefix | None = None, keep: bool = False, last=None):
        """x (B, T, C) -> (B, T, C), or with keep (output, the extended prefix); last as in LM."""
        cos_sin = rope_cos_sin(self.config, text_positions(self, x, prefix))
        y, kvs = x, []
        for block, at in zip(self, self.positions(last)):
            y, kv = block(y, cos_sin, prefix, keep, self.attend, at)
            kvs.append(kv)
        return (y, self.extended(prefix, kvs, x)) if keep else y

    def read(self, x: Tensor, prefix: Prefix | None = None) -> Prefix:
        """The prefix extended by x. The last block stops at keys and values: the rest is unused."""
        cos_sin = rope_cos_sin(self.config, text_positions(self, x, prefix))
        *blocks, final = self
        kvs = []
        for block in blocks:
            x, kv = block(x, cos_sin, prefix, True, self.attend)
            kvs.append(kv)
        k, v = final.keys_values(x, cos_sin)
        kvs.append((k, v) if prefix is None else prefix.joined(len(blocks), k, v))
        return self.extended(prefix, kvs, x)

    def positions(self, last: int | None) -> list[slice]:
        """What each block computes: all positions, the last block only the last `last` ones."""
        return [ALL] * (len(self) - 1) + [ALL if last is None else slice(-last, None)]

    @staticmethod
    def extended(prefix: Prefix | None, kvs: list[KV], x: Tensor) -> Prefix:
        """The prefix extended by x (B, T, C); `kvs` holds the keys and values of both."""
        if prefix is None:
            return Prefix(kvs)
        lengths = prefix.lengths
        lengths = None if lengths is None else lengths.expand(len(x)) + x.shape[1]
        return replace(prefix, layers=kvs, lengths=lengths)


class LM(nn.Module):
    """A decoder-only LM. LM(config) is new and trainable, LM.from_pretrained(folder) is frozen."""

    def __init__(self, config: Config, attend=attend):
        super().__init__()
        c = self.config = config
        self.folder, self.stored_hash = None, None  # of the checkpoint it was loaded from
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.embed_positions = nn.Embedding(c.max_len, c.dim) if c.learned_positions else None
        self.layers = Layers(c, c.n_layers, attend)
        self.norm = make_norm(c, c.dim)
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab_size, bias=False)
        init_weights(self, c.n_layers)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, device="cpu", dtype=torch.float32, attend=None):
        """Loads a published checkpoint, frozen: eval mode, no parameter requires a gradient.

        With dtype None every tensor keeps its stored dtype. A tensor that needs no conversion
        stays a view of the memory-mapped file. Errors are one line that names the file and key.
        """
        from checkpoints import read_config, read_weights, resolve, skip_init

        folder = resolve(path_or_hub_id)
        fields = read_config(folder)
        with torch.device("meta"), skip_init():
            lm = cls(Config(**fields)) if attend is None else cls(Config(**fields), attend)
        weights = read_weights(folder, fields, {n: p.shape for n, p in lm.state_dict().items()})
        lm.load_state_dict({n: t.to(device, dtype).contiguous() for n, t in weights}, assign=True)
        lm.folder = folder
        return lm.requires_grad_(False).eval()

    def save(self, folder, dtype=None, tokenizer=None, replace: bool = False) -> None:
        """Writes config.json, model.safetensors and, if given, tokenizer.json in the published
        format, whole or not at all. FileExistsError if the folder exists, unless `replace` is set:
        then it is removed before the new one takes its name."""
        from checkpoints import write_checkpoint

        dtype = dtype or self.embed_tokens.weight.dtype
        write_checkpoint(folder, vars(self.config), self.state_dict(), dtype, tokenizer, replace)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the checkpoint it was loaded from, the same on every device and dtype,
        whatever its parameters are now. If it was never loaded: of its current parameters."""
        from checkpoints import hash_checkpoint, hash_tensors, to_hf

        if self.folder is None:
            return hash_tensors(to_hf(self.state_dict(), vars(self.config)))
        self.stored_hash = self.stored_hash or hash_checkpoint(self.folder)
        return self.stored_hash

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C). `forward` and `read` add learned positions, if there are any."""
        return self.embed_tokens(ids)

    def forward(self, x: Tensor, prefix: Prefix | None = None, keep: bool = False, last=None):
        """x (B, T, C) -> h (B, T, C), or with keep (h, the prefix extended by x).

        x may be embeddings or a Connector's output. Texts of different lengths are padded on the
        right, which needs no mask in a causal LM. With `last`, from 1 to T, h is (B, last, C), of
        the last positions only, and the last layer computes no others. ValueError if the text
        exceeds the context, which is not checked behind a ragged prefix.
        """
        out = self.layers(self.add_positions(x, prefix), prefix, keep, last)
        return (self.norm(out[0]), out[1]) if keep else self.norm(out)

    def add_positions(self, x: Tensor, prefix: Prefix | None) -> Tensor:
        """x (B, T, C) in the LM's dtype, with learned positions, if any, added in every pass."""
        x = x.to(self.norm.weight.dtype)  # a trained prompt is float32
        if self.embed_positions is None:
            return x
        positions = text_positions(self.layers, x, prefix)  # padding may lie beyond the table
        return x + self.embed_positions(positions.clamp(max=self.config.max_len - 1))

    def read(self, x: Tensor, prefix: Prefix | None = None, lengths: Tensor | None = None):
        """The prefix extended by x (T, C) or (B, T, C), without the layers' output. lengths (B,):
        the number of real positions in each right-padded row. Gradients flow to x."""
        x = x[None] if x.dim() == 2 else x
        extended = self.layers.read(self.add_positions(x, prefix), prefix)
        return extended.drop_padding(x.shape[1], lengths)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(h.contiguous(), table.weight).float()  # a slice would take twice as long

    def new_layers(self, n: int) -> Layers:
        """n new blocks of the LM's kind for a Connector: trainable, float32, no position table."""
        layers = Layers(self.config, n, self.layers.attend).to(self.embed_tokens.weight.device)
        init_weights(layers, n)
        return layers


def init_weights(module: nn.Module, n: int) -> None:
    """GPT-2's scheme for n layers: normal(0, 0.02), times 1 / sqrt(2 n) in o_proj and down_proj."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n) if residual else 0.02)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)


def load_tokenizer(path, vocab_size: int | None = None):
    """The tokenizer of a checkpoint folder; see checkpoints.py."""
    import checkpoints

    return checkpoints.load_tokenizer(path, vocab_size)
