"""The frozen LM: a decoder-only transformer that reads published checkpoints, and generation from it.

Everything in this project is a composition around three functions of a language model that never changes:

    x = lm.embed(ids)            (B, T) -> (B, T, C)      what the first layer gets
    h = lm(x, prefix=None)       (B, T, C) -> (B, T, C)   all layers and the final norm, "before the vocabulary"
    z = lm.logits(h)             (..., C) -> (..., V)

and one object, the Prefix: the keys and values, layer by layer, of positions that stand before the text. `lm.read(x)`
makes one. A task's soft prompt, the few-shot text of a designed prompt, the question shared by n samples and the
decoding cache are all prefixes; the LM is causal, so a prefix does not depend on what follows it and is read once for
a whole batch instead of once per example.

Dimensions, here and in every file:  B batch, T text tokens, P prompt tokens, C model width, V vocabulary, H query heads,
K key/value heads, D head width, N candidates or passages per question, L passage tokens.

Needs torch, tokenizers and safetensors, and no other file of the project (huggingface_hub only to download).

    python model.py assets/lm "Once upon a time"      continues the text, and says what it costs in nats a token
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass for every family; a family is a reader of its config.json and a table of tensor names.


@dataclass(frozen=True)
class Config:
    """The shape of a decoder. Field names are ours; `read_config` and `published_config` translate."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K; each serves H / K query heads
    head_dim: int  # D; H * D need not equal C
    hidden_dim: int  # width of the gated MLP
    max_len: int  # positions the LM was trained for, prefix included
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding table
    bos: int | None = None
    eos: tuple[int, ...] = ()  # any of these ends a text
    family: str = "llama"


# Our parameter names -> the published ones, for layer {i}. Saving uses the same table backwards.
NAMES = {
    "llama": {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.o.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.up.weight": "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.down.weight": "model.layers.{i}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
}


def published_names(config: Config) -> dict[str, str]:
    """{our parameter name: the published tensor name} for every parameter of an LM of this shape."""
    names = {}
    for ours, theirs in NAMES[config.family].items():
        if ours == "head.weight" and config.tied:
            continue
        for i in range(config.n_layers) if "{i}" in ours else [0]:
            names[ours.format(i=i)] = theirs.format(i=i)
    return names


def read_config(folder: str | Path) -> Config:
    """The Config in a published folder's config.json. ValueError names the key that is missing or not supported."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__} where an object is expected")
    if raw.get("model_type") not in NAMES:
        raise ValueError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(NAMES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the new spelling holds rope_theta as well
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling {rope!r} is not an object")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    for key in sizes + ("num_key_value_heads", "head_dim"):
        if (raw.get(key) is not None or key in sizes) and not (type(raw.get(key)) is int and raw[key] > 0):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, not a positive whole number" if key in raw else f"{path}: the key {key!r} is missing")
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    found = {key: raw.get(key, value) for key, value in only.items()} | {"rope type": rope.get("rope_type", rope.get("type", "default"))}
    for key, value in (only | {"rope type": "default"}).items():
        if found[key] != value:
            raise ValueError(f"{path}: {key} {found[key]!r} is not supported (only {value!r})")
    heads, width, eos = raw["num_attention_heads"], raw["hidden_size"], raw.get("eos_token_id")
    kv_heads, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim") or width // heads
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise ValueError(f"{path}: {heads} heads of width {head_dim} that share {kv_heads} keys and values do not fit together")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in eos):
        raise ValueError(f"{path}: eos_token_id {eos!r} is not a token id")
    try:
        theta, eps = float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0), float(raw.get("rms_norm_eps", 1e-6))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: rope_theta or rms_norm_eps is not a number") from None
    return Config(
        vocab_size=raw["vocab_size"],
        dim=width,
        n_layers=raw["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=raw["intermediate_size"],
        max_len=raw["max_position_embeddings"],
        rope_theta=theta,
        norm_eps=eps,
        tied=bool(raw.get("tie_word_embeddings", False)),
        bos=raw.get("bos_token_id"),
        eos=tuple(eos),
        family=raw["model_type"],
    )


def published_config(config: Config, dtype: torch.dtype) -> dict:
    """What config.json holds in the published format, the inverse of `read_config`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if len(config.eos) > 1 else config.eos[0] if config.eos else None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_tensors(folder: str | Path, stem: str = "model") -> dict[str, Tensor]:
    """Every tensor in `folder`/`stem`.safetensors, or in the shards that `stem`.safetensors.index.json names, memory-mapped.

    Returns {name: tensor} on the CPU. FileNotFoundError or ValueError, one line, names the file at fault: nothing to
    read, only pickled weights, a shard that is missing, lies outside the folder or lacks its tensors, a corrupt file.
    """
    folder = Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if single.is_file():
        homes = {single: None}
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            homes = {folder / shard: {n for n, s in weight_map.items() if s == shard} for shard in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
    elif sorted(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder}: holds only .bin weights, which are pickles that can run code and are never read here; "
            "convert them once with safetensors.torch.save_file"
        )
    else:
        raise FileNotFoundError(f"{folder}: no {single.name} there")
    tensors = {}
    for path, names in homes.items():
        if path.parent.resolve() != folder.resolve():  # its own name may be a link elsewhere, as in the hub's cache
            raise ValueError(f"{index}: names {path}, which lies outside the folder")
        if not path.is_file():
            raise FileNotFoundError(f"{index}: names {path.name}, which is missing")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = set(file.keys())
                if names is not None and names - stored:
                    raise ValueError(f"{path}: lacks {min(names - stored)}, which {index.name} places there")
                tensors |= {name: file.get_tensor(name) for name in sorted(stored if names is None else names)}
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or corrupt ({error})") from None
    return tensors


def check_tensors(found: dict[str, Tensor], expected: dict[str, torch.Size], where: str | Path) -> None:
    """Raises ValueError unless `found` has exactly the names and shapes `expected`; names the first few that differ."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [f"{n} is {tuple(found[n].shape)}, not {tuple(expected[n])}" for n in expected if n in found and found[n].shape != expected[n]]
    problems = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the config; " + "; ".join(problems))


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 over (name, dtype, shape, bytes) of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def locate(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id such as `EleutherAI/pythia-160m` is downloaded (no pickles) first."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", "..") or path.parent.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path.as_posix(), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub's own errors, and its HTTP client's, share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{path}: no such folder, and not to be had from the hub either ({reason})") from None


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder (its tokenizer.json), or of a tokenizer.json itself.

    Special tokens and BOS are as published: `encode(text)` adds what the file's post-processor adds. ValueError if it has
    ids beyond an embedding table of `vocab_size` rows, which means that it belongs to another LM.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
    tokenizer.no_padding()  # some files carry the settings of a training script, which would cut long texts without a word
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"{path}: the tokenizer's ids go up to {largest}, the LM's embedding table has {vocab_size} rows: it belongs to another LM")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Prefix


@dataclass
class Prefix:
    """What text can attend to before its own first token: per layer the keys (after norm and rotation) and the values.

    layers   n_layers pairs (k, v), each (1, K, P, D) for one prefix shared by every row or (B, K, P, D) for one a row
    lengths  None where every row has all P positions, else (1 | B,): row b has the LAST lengths[b] of the P, so that
             every row's text begins right after index P - 1 and extending a ragged prefix is still one concatenation
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor | None = None

    @property
    def size(self) -> int:
        """P, the longest row's length."""
        return self.layers[0][0].shape[2]

    def row_lengths(self, rows: int) -> list[int]:
        """How many positions each of `rows` rows of text finds before it."""
        return [self.size] * rows if self.lengths is None else self.lengths.expand(rows).tolist()

    def rows(self, index: Tensor) -> "Prefix":
        """The rows `index` (R,) in that order: repeats them for samples, drops them where finished; a prefix of one row serves any and stays one."""
        if self.layers[0][0].shape[0] == 1:
            return self
        return Prefix([(k[index], v[index]) for k, v in self.layers], None if self.lengths is None else self.lengths[index])

    def trim(self, padding: Tensor) -> "Prefix":
        """Forgets the last padding[b] positions of row b: the right padding of a batch of texts."""
        if not padding.any():
            return self
        rows, lengths = torch.arange(len(padding), device=padding.device), self.lengths
        source = torch.arange(self.size, device=padding.device) - padding[:, None]  # position j is filled from j - padding
        # Positions before a row's first (clamped to 0) hold a copy of something; lengths says that nobody sees them.
        pick = lambda t: t.transpose(1, 2)[rows[:, None], source.clamp(min=0)].transpose(1, 2)
        return Prefix([(pick(k), pick(v)) for k, v in self.layers], (self.size if lengths is None else lengths) - padding)

    @staticmethod
    def stack(prefixes: list["Prefix | None"]) -> "Prefix | None":
        """One ragged prefix from one prefix (of one row) or None for each example; all None gives None."""
        some = [p for p in prefixes if p is not None]
        if not some:
            return None
        if any(p.layers[0][0].shape[0] != 1 for p in some):
            raise ValueError("Prefix.stack takes prefixes of one row each, one for every example")
        lengths = [0 if p is None else p.row_lengths(1)[0] for p in prefixes]
        P, layers = max(lengths), []
        for i, pair in enumerate(some[0].layers):
            stacked = tuple(t.new_zeros(len(prefixes), t.shape[1], P, t.shape[3]) for t in pair)
            for b, (p, n) in enumerate(zip(prefixes, lengths)):
                for whole, part in zip(stacked, () if n == 0 else p.layers[i]):
                    whole[b, :, P - n :] = part[0, :, part.shape[2] - n :]
            layers.append(stacked)
        same = all(n == P for n in lengths)
        return Prefix(layers, None if same else torch.tensor(lengths, device=layers[0][0].device))


def each_pass(function, *prefixes):
    """`function` of one prefix, or entry by entry of the tuples that a recursion over several passes keeps."""
    return tuple(map(function, *prefixes)) if isinstance(prefixes[0], tuple) else function(*prefixes)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


def join(past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1 | B, K, P, D) followed by those of T more positions (B, K, T, D): each (B, K, P + T, D)."""
    return tuple(torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=2) for old, new in zip(past, (k, v)))


def attend(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None) -> Tensor:
    """Causal attention of T positions to themselves and to P before them; the fused scaled_dot_product_attention does the work.

    q (B, H, T, D). Keys and values of the P positions come apart, past (k, v) each (1 | B, K, P, D) beside k, v (B, K, T, D), or
    already joined, k, v (B, K, P + T, D). lengths (B,) as in Prefix. Returns (B, H, T, D).
    Query t sees earlier positions j >= P - lengths[b] and text positions up to t.
    """
    H, T = q.shape[1:3]
    if past is not None:
        k, v = join(past, k, v)
    P = k.shape[2] - T
    mask = None  # none is needed without a past, nor by a lone query that sees everything
    if lengths is not None:
        mask = (torch.arange(P + T, device=q.device) >= P - lengths[:, None])[:, None, None]  # (B, 1, 1, P + T)
    if T > 1 and (P or lengths is not None):
        causal = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)  # text position t is key P + t
        mask = causal if mask is None else mask & causal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=H != k.shape[1])


def rotation(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary position embeddings (Su et al. 2021), each (..., 1, T, D) for positions (..., T)."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim)
    angles = positions[..., None, :, None].float() * frequencies
    return torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D) turned by its positions. Published Llama weights pair channel d with d + D/2, hence the roll."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Layer(nn.Module):
    """One pre-norm block: attention, then a gated MLP. Split at the attention, so that reading a prefix can stop there."""

    def __init__(self, config: Config):
        super().__init__()
        c, self.head_dim = config, config.head_dim
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.attention_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.q, self.o = linear(c.dim, c.n_heads * c.head_dim), linear(c.n_heads * c.head_dim, c.dim)
        self.k, self.v = linear(c.dim, c.n_kv_heads * c.head_dim), linear(c.dim, c.n_kv_heads * c.head_dim)
        self.mlp_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.gate, self.up, self.down = linear(c.dim, c.hidden_dim), linear(c.dim, c.hidden_dim), linear(c.hidden_dim, c.dim)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), rotated."""
        x = self.attention_norm(x)
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, T, C) and what its heads attended to (B, H, T, D) -> the block's output (B, T, C)."""
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Layers(nn.ModuleList):
    """n layers run in a row, with a prefix. The LM is one of these between embedding and final norm; a Connector is another."""

    def __init__(self, config: Config, n: int, attend=attend):
        super().__init__(Layer(config) for _ in range(n))
        self.config, self.attend = config, attend

    def forward(self, x: Tensor, prefix: Prefix | None = None, keep: bool = False):
        """x (B, T, C) -> (B, T, C); with keep, also the prefix extended by x."""
        x, extended = self.run(x, prefix, keep)
        return (x, extended) if keep else x

    def read(self, x: Tensor, prefix: Prefix | None = None) -> Prefix:
        """The prefix extended by x."""
        return self.run(x, prefix, keep=True, keys_only=True)[1]

    def run(self, x: Tensor, prefix: Prefix | None, keep: bool, keys_only: bool = False) -> tuple[Tensor, Prefix | None]:
        """The output of the last layer and, with keep, the prefix extended by x; with keys_only the output is not computed to its end."""
        if x.dim() != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, {self.config.dim})")
        if prefix is not None and prefix.layers[0][0].shape[0] not in (1, x.shape[0]):
            raise ValueError(f"the prefix has {prefix.layers[0][0].shape[0]} rows, the text {x.shape[0]}")
        P, lengths = (0, None) if prefix is None else (prefix.size, prefix.lengths)
        if lengths is None and P + x.shape[1] > self.config.max_len:
            raise ValueError(f"{x.shape[1]} positions after a prefix of {P} exceed the LM's context of {self.config.max_len}")
        positions = torch.arange(x.shape[1], device=x.device) + (P if lengths is None else lengths[:, None])
        (cos, sin), kept = rotation(self.config, positions), []
        for i, layer in enumerate(self):
            q, k, v = layer.project(x, cos, sin)
            past = prefix.layers[i] if prefix else None
            if keep:  # the joined keys and values are wanted anyway, so attention gets them and need not join them again
                if past is not None:
                    k, v = join(past, k, v)
                past = None
                kept.append((k, v))
            if keys_only and i == len(self) - 1:  # nothing attends to the last layer's output
                break
            x = layer.finish(x, self.attend(q, k, v, past, lengths))
        return x, Prefix(kept, None if lengths is None else lengths.expand(x.shape[0]) + x.shape[1]) if keep else None


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Inside it torch.nn.init does nothing: what a checkpoint fills needs no random numbers, and on the meta device drawing
    them would first import torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class LM(nn.Module):
    """A decoder-only language model. `LM.from_pretrained(folder)` is frozen, `LM(config)` is freshly initialised and trainable."""

    def __init__(self, config: Config, attend=attend):
        super().__init__()
        self.config, self.folder, self.stored_hash = config, None, None
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = Layers(config, config.n_layers, attend)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        initialise(self.layers, config.n_layers)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, attend=None) -> "LM":
        """A published checkpoint, frozen: eval mode, nothing requires a gradient. Built without memory of its own, then filled."""
        folder = locate(path_or_hub_id)
        config = read_config(folder)
        with torch.device("meta"), Uninitialised():
            lm = cls(config, attend or globals()["attend"])
        names = published_names(config)
        tensors = {name: t for name, t in read_tensors(folder).items() if not name.endswith(".rotary_emb.inv_freq")}  # computed here; older files store it
        if config.tied:
            tensors.pop("lm_head.weight", None)  # some tied checkpoints store the embedding twice
        check_tensors(tensors, {names[ours]: p.shape for ours, p in lm.named_parameters()}, folder)
        lm.load_state_dict({ours: tensors[theirs].to(device, dtype) for ours, theirs in names.items()}, assign=True)
        lm.folder = folder
        return lm.requires_grad_(False).eval()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, tokenizer: Tokenizer | None = None, replace: bool = False) -> None:
        """Writes config.json, model.safetensors and tokenizer.json in the published format; the folder appears whole or not at all.

        A folder that exists is a FileExistsError, or with `replace` makes way once the new one is written.
        """
        folder, dtype = Path(folder), dtype or self.embedding.weight.dtype
        if folder.exists() and not replace:
            raise FileExistsError(f"{folder} exists; choose another folder")
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # what a kill left
        unfinished.mkdir(parents=True)
        (unfinished / "config.json").write_text(json.dumps(published_config(self.config, dtype), indent=1) + "\n", encoding="utf-8")
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in self.published_tensors().items()}
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(str(unfinished / "tokenizer.json"))
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    def published_tensors(self) -> dict[str, Tensor]:
        """The parameters under their published names."""
        state = dict(self.named_parameters())
        return {theirs: state[ours].detach() for ours, theirs in published_names(self.config).items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 of the checkpoint as stored (`hash_tensors`), so the same on every device and in every dtype.

        An LM that was never loaded has none stored; its parameters as they are now take that place. Of a loaded one it is
        the file's, whatever became of the parameters since: what was trained on a changed LM needs that LM saved first.
        """
        if self.folder is None:
            return hash_tensors(self.published_tensors())
        self.stored_hash = self.stored_hash or hash_tensors(read_tensors(self.folder))
        return self.stored_hash

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C), what the first layer gets (absolute positions, if any, are added later, in the call)."""
        return self.embedding(ids)

    def forward(self, x: Tensor, prefix: Prefix | None = None, keep: bool = False):
        """x (B, T, C) -> h (B, T, C), or (h, Prefix) with keep: the prefix extended by x.

        Texts of different lengths are padded on the right, which needs no mask: in a causal LM what comes later is not
        seen. Positions count from the prefix's length. Works for any x of width C: embeddings, or a Connector's output.
        ValueError beyond the LM's context; behind a ragged prefix that is the caller's to check, who knows each row's own
        length (x may be padded past the context where a row with a short prefix needs it; see check_room).
        """
        out = self.layers(x, prefix, keep)
        return (self.norm(out[0]), out[1]) if keep else self.norm(out)

    def read(self, x: Tensor, prefix: Prefix | None = None, lengths: Tensor | None = None) -> Prefix:
        """What later positions will attend to after x (P, C) or (B, P, C), which may itself follow a prefix.

        lengths (B,): how many positions of each right-padded row of x are real. Differentiable with respect to x.
        """
        x = x[None] if x.dim() == 2 else x
        kept = self.layers.read(x, prefix)
        return kept if lengths is None else kept.trim(x.shape[1] - lengths.to(x.device))

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        return F.linear(h, self.embedding.weight if self.head is None else self.head.weight).float()

    def new_layers(self, n: int) -> Layers:
        """n layers of this LM's own kind, freshly initialised, float32 and trainable, for a Connector; call them as one (see Layers)."""
        layers = Layers(self.config, n, self.layers.attend).to(self.embedding.weight.device)
        initialise(layers, n)
        return layers


def initialise(layers: Layers, depth: int) -> None:
    """GPT-2's scheme: normal(0, 0.02), and 1/sqrt(2 depth) of that where a layer adds to the residual stream."""
    for name, parameter in layers.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if name.split(".")[-2] in ("o", "down") else 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Generation and scoring. `lm` is an LM or anything with its interface, such as recurse.Stack, whose prefixes are tuples.


@dataclass
class Sample:
    """One continuation: its new token ids (an eos that ended it included) and their log-probability under the LM in nats,
    at temperature 1 and over the whole vocabulary however it was sampled."""

    ids: list[int]
    logprob: float


def pad(ids: list[list[int]], device=None) -> tuple[Tensor, Tensor]:
    """Lists of token ids -> (B, T) padded on the right with zeros, and their lengths (B,)."""
    T = max(map(len, ids))
    return torch.tensor([row + [0] * (T - len(row)) for row in ids], device=device), torch.tensor(list(map(len, ids)), device=device)


def check_room(lm, ids: list[list[int]], prefix, new_tokens: list[int]) -> None:
    """ValueError names the first question whose prefix, tokens and new tokens exceed the LM's context."""
    first = prefix[0] if isinstance(prefix, tuple) else prefix
    if first is not None and first.layers[0][0].shape[0] not in (1, len(ids)):
        raise ValueError(f"the prefix has {first.layers[0][0].shape[0]} rows for {len(ids)} questions")
    for b, P in enumerate([0] * len(ids) if first is None else first.row_lengths(len(ids))):
        if P + len(ids[b]) + new_tokens[b] - 1 > lm.config.max_len:  # the last new token is never fed back
            raise ValueError(f"question {b}: a prefix of {P}, {len(ids[b])} tokens and {new_tokens[b]} new ones exceed the LM's context of {lm.config.max_len}")


def read_questions(lm, ids: list[list[int]], prefix, new_tokens: list[int]):
    """Reads all but the last token of each question behind its prefix. Returns (those last tokens (B, 1), the prefix so far)."""
    if not ids or not all(ids):
        raise ValueError("no questions" if not ids else f"question {[bool(row) for row in ids].index(False)} is empty; it needs at least one token")
    if isinstance(prefix, list):
        if len(prefix) != len(ids):
            raise ValueError(f"{len(prefix)} prefixes for {len(ids)} questions")
        some = [p for p in prefix if p is not None]
        if some and isinstance(some[0], tuple):
            prefix = tuple(Prefix.stack([p and p[i] for p in prefix]) for i in range(len(some[0])))
        else:
            prefix = Prefix.stack(prefix)
    for b, row in enumerate(ids):
        if not 0 <= min(row) <= max(row) < lm.config.vocab_size:
            raise ValueError(f"question {b} has the token id {min(row) if min(row) < 0 else max(row)}, outside the vocabulary of {lm.config.vocab_size}")
    check_room(lm, ids, prefix, new_tokens)
    tokens, lengths = pad(ids, next(lm.parameters()).device)
    last = tokens.gather(1, lengths[:, None] - 1)
    if tokens.shape[1] > 1:
        prefix = lm.read(lm.embed(tokens[:, :-1]), prefix, lengths - 1)
    return last, prefix


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """One token id for each row of logits (R, V): the most likely at temperature 0, else drawn from the k likeliest or the nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p is not None:  # keep the smallest set that reaches top_p: a token stays if what is likelier than it falls short
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    lm,
    ids: list[list[int]],
    prefix=None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n: int = 1,
    eos: int | list[int] | tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[Sample]]:
    """Continues each of B questions n times; returns B lists of n Samples (new tokens only).

    ids     B non-empty lists of token ids, of any lengths
    prefix  None, one for all, or a list with a prefix or None for each question
    eos     id or ids that end a continuation; finished rows leave the batch. None never stops early.
    Each question is read once, however many samples are drawn from it. ValueError where an argument or a length is impossible.
    The cache holds 2 * K * D * n_layers values for every position of every live row: question, prompt and what was generated.
    """
    for name, value, fine in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < math.inf),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
        ("n", n, n >= 1),
    ):
        if not fine:
            raise ValueError(f"{name} cannot be {value}")
    token, cache = read_questions(lm, ids, prefix, [max_new_tokens] * len(ids))
    device = token.device
    stops = torch.tensor([] if eos is None else [eos] if isinstance(eos, int) else list(eos), dtype=torch.long, device=device)
    rows = torch.arange(len(ids), device=device).repeat_interleave(n)  # the question of each live row
    live = torch.arange(len(ids) * n, device=device)  # and the sample it is writing
    written = torch.full((len(ids) * n, max_new_tokens), -1, device=device)
    logprob = torch.zeros(len(ids) * n, device=device)
    for step in range(max_new_tokens):
        h, cache = lm(lm.embed(token), cache, keep=True)
        logits = lm.logits(h[:, -1])
        if step == 0 and n > 1:  # up to here the samples of a question are one row
            logits, cache = logits[rows], each_pass(lambda p: p.rows(rows), cache)
        token = choose(logits, temperature, top_k, top_p, generator)[:, None]
        written[live, step] = token[:, 0]
        logprob[live] += (logits.gather(1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]
        going = ~torch.isin(token[:, 0], stops)
        if len(stops) and not going.all():
            live, token, index = live[going], token[going], going.nonzero()[:, 0]
            if not len(live):
                break
            cache = each_pass(lambda p: p.rows(index), cache)
    samples = [Sample([t for t in row if t >= 0], value) for row, value in zip(written.tolist(), logprob.tolist())]
    return [samples[b * n : (b + 1) * n] for b in range(len(ids))]


@torch.no_grad()
def option_scores(lm, ids: list[list[int]], options: list[list[list[int]]], prefix=None, mean: bool = False) -> list[Tensor]:
    """Log-probabilities of answer choices: for each of B questions a float32 tensor (number of its options,).

    options[b] is a list of non-empty lists of token ids; a score is the sum over an option's tokens, or their mean.
    Each question is read once and shared by its options, which form one batch.
    """
    if len(options) != len(ids) or not all(choices and all(choices) for choices in options):
        raise ValueError(f"{len(ids)} questions need as many lists of options, none of them or of their options empty")
    last, cache = read_questions(lm, ids, prefix, [max(map(len, choices)) for choices in options])
    rows = torch.tensor([b for b, choices in enumerate(options) for _ in choices], device=last.device)
    flat = [option for choices in options for option in choices]
    targets, lengths = pad(flat, last.device)
    if cache is not None:
        cache = each_pass(lambda p: p.rows(rows), cache)
    fed = torch.cat([last[rows], targets[:, :-1]], dim=1)  # position t predicts target t
    logprobs = lm.logits(lm(lm.embed(fed), cache)).log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    real = torch.arange(targets.shape[1], device=last.device) < lengths[:, None]
    scores = (logprobs * real).sum(1) / (lengths if mean else 1)
    return list(scores.split([len(choices) for choices in options]))


def answer(lm, tokenizer: Tokenizer, ids: list[list[int]], prefix=None, max_new_tokens: int = 16, options=None, batch_size: int = 128) -> list[str]:
    """Each question's answer as text, in batches of similar lengths; prefix: None or one for all.

    The answer is the greedy continuation, or where options[b] holds token ids to choose from, the likeliest of these (the
    sum over its tokens, as T0 ranks them).
    """
    options = options or [[]] * len(ids)
    check_room(lm, ids, prefix, [max(map(len, choices)) if choices else max_new_tokens for choices in options])
    answers: list[list[int]] = [[]] * len(ids)
    free, bound = ([b for b in sorted(range(len(ids)), key=lambda b: len(ids[b])) if bool(options[b]) == choice] for choice in (False, True))
    for start in range(0, len(free), batch_size):
        chosen = free[start : start + batch_size]
        for b, samples in zip(chosen, generate(lm, [ids[b] for b in chosen], prefix, max_new_tokens, eos=lm.config.eos)):
            answers[b] = samples[0].ids
    few = max(1, batch_size // 4)  # every option is a row of its own
    for start in range(0, len(bound), few):
        chosen = bound[start : start + few]
        for b, scores in zip(chosen, option_scores(lm, [ids[b] for b in chosen], [options[b] for b in chosen], prefix)):
            answers[b] = options[b][scores.argmax()]
    return [tokenizer.decode(tokens).strip() for tokens in answers]  # without special tokens, so without the eos


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Continue a text with a published checkpoint, and say what the text costs it.")
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = lambda message: parser.exit(2, f"model.py: {message}\n")
    args = parser.parse_args(argv)
    lm = LM.from_pretrained(args.model)
    tokenizer = load_tokenizer(lm.folder, lm.config.vocab_size)
    ids = tokenizer.encode(args.text).ids
    generator = torch.Generator().manual_seed(args.seed)
    sample = generate(lm, [ids], None, args.max_new_tokens, args.temperature, eos=lm.config.eos, generator=generator)[0][0]
    nats = -option_scores(lm, [ids[:1]], [[ids[1:]]], mean=True)[0].item() if len(ids) > 1 else math.nan
    print(args.text + tokenizer.decode(ids + sample.ids)[len(tokenizer.decode(ids)) :])
    print(f"[{nats:.4f} nats a token for the text, {-sample.logprob / len(sample.ids):.4f} for the {len(sample.ids)} new tokens]")
    return {"ids": sample.ids, "nats": nats}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
