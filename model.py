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
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one decoder, whose differences are fields here; a family is a row of FAMILIES.

ACTIVATIONS = {  # by their published names; GPT-2's is the tanh approximation, Pythia's the exact one
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Config:
    """The shape of a decoder. Field names are ours; `read_config` and `published_config` translate. The defaults are Llama's."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K; each serves H / K query heads
    head_dim: int  # D; H * D need not equal C
    hidden_dim: int  # width of the MLP
    max_len: int  # positions the LM was trained for, prefix included
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding table
    bos: int | None = None
    eos: tuple[int, ...] = ()  # any of these ends a text
    family: str = "llama"
    # What families and their checkpoints differ in:
    parallel: bool = False  # attention and MLP read the same x and are added together, instead of one after the other
    post_norm: bool = False  # norms stand behind attention and MLP, x + norm(f(x)), instead of before them, x + f(norm(x))
    layer_norm: bool = False  # LayerNorm, with mean and bias, instead of RMSNorm
    gated: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = (
        None  # RMSNorm of queries and keys before they are turned: each "head" by itself, or the "width" of all of them
    )
    learned_positions: bool = (
        False  # a table of positions added to what comes in, and nothing is turned
    )
    rotary_dim: int | None = (
        None  # channels of a head that are turned by its position, all of them where None
    )
    rope_scaling: tuple[
        float, ...
    ] = ()  # (factor,) is "linear", (factor, low, high, original length) is "llama3": see `frequencies`
    windows: tuple[
        int | None, ...
    ] = ()  # layer by layer, how many positions it sees, its own included; () or None: all of them
    divide_by_depth: bool = (
        False  # attention scores of the first layer are divided by 1, of the second by 2, ...
    )


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint holds the weight and bias of one of our modules, if it is not simply a module of another name."""

    name: str
    transposed: bool = (
        False  # GPT-2's Conv1D is (inputs, outputs) where nn.Linear is (outputs, inputs)
    )
    part: int | None = (
        None  # 0, 1, 2: the module is the q, k or v of a tensor that holds all three ...
    )
    by_head: bool = False  # ... as q, k, v of the first head, then of the second, ... and not all of q, then all of k, then all of v

    def shape(self, ours: torch.Size) -> torch.Size:
        """The published tensor's shape, from our parameter's."""
        whole = ours if self.part is None else torch.Size([3 * ours[0], *ours[1:]])
        return torch.Size(reversed(whole)) if self.transposed else whole

    def view(self, theirs: Tensor, n_heads: int) -> Tensor:
        """Our parameter's place in the published tensor, as a view: copied from it to load, to it to save. Heads may come apart, (H, D, ...)."""
        theirs = theirs.t() if self.transposed else theirs  # t() leaves a bias as it is
        if self.part is None:
            return theirs
        return (
            theirs.unflatten(0, (n_heads, 3, -1))[:, self.part]
            if self.by_head
            else theirs.chunk(3)[self.part]
        )


# Our modules -> the published ones, for layer {i}; those that a Config does not have are not looked for.
LLAMA = {
    "embedding": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
OLMO2 = LLAMA | {
    "layers.{i}.attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_feedforward_layernorm",
}
GPT_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "layers.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    "layers.{i}.q": Stored("gpt_neox.layers.{i}.attention.query_key_value", part=0, by_head=True),
    "layers.{i}.k": Stored("gpt_neox.layers.{i}.attention.query_key_value", part=1, by_head=True),
    "layers.{i}.v": Stored("gpt_neox.layers.{i}.attention.query_key_value", part=2, by_head=True),
    "layers.{i}.o": "gpt_neox.layers.{i}.attention.dense",
    "layers.{i}.mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "layers.{i}.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "layers.{i}.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
GPT2 = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
    "layers.{i}.q": Stored("transformer.h.{i}.attn.c_attn", transposed=True, part=0),
    "layers.{i}.k": Stored("transformer.h.{i}.attn.c_attn", transposed=True, part=1),
    "layers.{i}.v": Stored("transformer.h.{i}.attn.c_attn", transposed=True, part=2),
    "layers.{i}.o": Stored("transformer.h.{i}.attn.c_proj", transposed=True),
    "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    "layers.{i}.up": Stored("transformer.h.{i}.mlp.c_fc", transposed=True),
    "layers.{i}.down": Stored("transformer.h.{i}.mlp.c_proj", transposed=True),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

# Our fields -> the keys of config.json that every checkpoint has.
KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
}
GPT2_KEYS = {
    "dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "hidden_dim": "n_inner",
    "max_len": "n_positions",
}


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model_type say what a Config says."""

    architecture: str  # as config.json names it
    names: dict[str, str | Stored]
    always: dict  # fields in which all of them differ from Llama
    options: (
        dict  # the other keys of config.json that are read, each with what it means to leave it out
    )
    keys: dict[str, str] = field(default_factory=lambda: KEYS)


COMMON = dict(
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
    num_key_value_heads=None,
    head_dim=None,
)
SLIDING = dict(
    use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None
)
FAMILIES = {
    # RMSNorm, gated MLP, all channels turned, grouped heads; biases where config.json asks for them
    "llama": Family(
        "LlamaForCausalLM", LLAMA, dict(), COMMON | dict(attention_bias=False, mlp_bias=False)
    ),
    # Llama whose layers see a window
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        dict(),
        COMMON | dict(num_key_value_heads=8, sliding_window=4096, layer_types=None),
    ),
    # Llama with biases on q, k and v; some layers may see a window
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA,
        dict(qkv_bias=True),
        COMMON | SLIDING | dict(num_key_value_heads=32),
    ),
    # Llama with each head's q and k normed; some layers may see a window
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA,
        dict(qk_norm="head"),
        COMMON | SLIDING | dict(num_key_value_heads=32, head_dim=128, attention_bias=False),
    ),
    # Llama with norms behind attention and MLP instead of before them, and q and k normed over all heads
    "olmo2": Family(
        "Olmo2ForCausalLM",
        OLMO2,
        dict(qk_norm="width", post_norm=True),
        COMMON | dict(rms_norm_eps=1e-5, attention_bias=False),
    ),
    # LayerNorm, plain MLP, biases, a part of each head's channels turned, attention and MLP side by side (Pythia is one)
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        GPT_NEOX,
        dict(layer_norm=True, gated=False, mlp_bias=True),
        dict(
            layer_norm_eps=1e-5,
            hidden_act="gelu",
            tie_word_embeddings=False,
            attention_bias=True,
            use_parallel_residual=True,
            rotary_pct=0.25,
        ),
        KEYS | {"norm_eps": "layer_norm_eps"},
    ),
    # LayerNorm, plain MLP, biases, positions from a table
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2,
        dict(
            layer_norm=True,
            gated=False,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            learned_positions=True,
        ),
        dict(
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            tie_word_embeddings=True,
            n_inner=None,
            scale_attn_by_inverse_layer_idx=False,
        ),
        KEYS | GPT2_KEYS | {"norm_eps": "layer_norm_epsilon", "activation": "activation_function"},
    ),
}
# Options that are switches -> the fields they switch.
SWITCHES = {
    "attention_bias": ("qkv_bias", "o_bias"),
    "mlp_bias": ("mlp_bias",),
    "use_parallel_residual": ("parallel",),
    "scale_attn_by_inverse_layer_idx": ("divide_by_depth",),
}
# Keys with one value that is supported; any other changes what the LM computes, or how its weights are stored.
ONLY = {
    "quantization_config": None,
    "compression_config": None,
    "scale_attn_weights": True,
    "add_cross_attention": False,
}


def read_config(folder: str | Path) -> Config:
    """The Config in a published folder's config.json. ValueError names the key that is missing or not supported."""
    path = Path(folder) / "config.json"
    raw, family = read_raw(path)
    check_values(raw, family, path)
    fields = {ours: raw[theirs] for ours, theirs in family.keys.items()}
    heads, eos = fields["n_heads"], raw.get("eos_token_id")
    kv_heads, head_dim = (
        raw.get("num_key_value_heads") or heads,
        raw.get("head_dim") or fields["dim"] // heads,
    )
    if heads % kv_heads or not head_dim:
        raise ValueError(
            f"{path}: {heads} heads of width {head_dim} that share {kv_heads} keys and values do not fit together"
        )
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in eos):
        raise ValueError(f"{path}: eos_token_id {eos!r} is not a token id")
    fields |= {
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "bos": raw.get("bos_token_id"),
        "eos": tuple(eos),
        "family": raw["model_type"],
    }
    fields |= family.always | {
        ours: raw[key] for key, switched in SWITCHES.items() if key in raw for ours in switched
    }
    if not fields.get("learned_positions"):
        fields |= read_rope(raw, head_dim, path)
        if (
            len(fields["rope_scaling"]) == 1
        ):  # "linear" leaves the length before it was stretched in max_position_embeddings
            fields["max_len"] = int(fields["max_len"] * fields["rope_scaling"][0])
    return Config(**fields, windows=read_windows(raw, fields["n_layers"], path))


def read_raw(path: Path) -> tuple[dict, Family]:
    """config.json as it is, with what its family means by the keys left out and without the ones it does not know; and the family."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent}: no config.json, so this is not a checkpoint folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__} where an object is expected")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    options = FAMILIES[kind].options
    foreign = {key for family in FAMILIES.values() for key in family.options} - options.keys()
    raw = options | {key: value for key, value in raw.items() if key not in foreign}
    if kind == "gpt2" and raw["n_inner"] is None and type(raw.get("n_embd")) is int:
        raw["n_inner"] = 4 * raw["n_embd"]
    return raw, FAMILIES[kind]


def check_values(raw: dict, family: Family, path: Path) -> None:
    """ValueError names the first key whose value is missing, of the wrong kind or not supported."""
    sizes = [
        family.keys[ours]
        for ours in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_len")
    ]
    for key in sizes + ["num_key_value_heads", "head_dim"]:
        if (raw.get(key) is not None or key in sizes) and not (
            type(raw.get(key)) is int and raw[key] > 0
        ):
            raise ValueError(
                f"{path}: {key} is {raw[key]!r}, not a positive whole number"
                if key in raw
                else f"{path}: the key {key!r} is missing"
            )
    for key, default in family.options.items():
        if isinstance(default, bool) and not isinstance(raw[key], bool):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, not true or false")
    for key, value in ONLY.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported (only {value!r})")
    eps, activation = family.keys["norm_eps"], family.keys["activation"]
    if type(raw[eps]) not in (int, float):
        raise ValueError(f"{path}: {eps} is {raw[eps]!r}, not a number")
    if raw[activation] not in ACTIVATIONS:
        raise ValueError(
            f"{path}: {activation} {raw[activation]!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )


def read_rope(raw: dict, head_dim: int, path: Path) -> dict:
    """The fields that say how positions turn queries and keys: in rope_parameters, or in the older rope_theta and rope_scaling
    (rotary_emb_base and rotary_pct in GPT-NeoX)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling {rope!r} is not an object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"{path}: rope_parameters of their own for {', '.join(rope)} are not supported"
        )
    rope = {
        "rope_theta": raw.get("rotary_emb_base") or raw.get("rope_theta") or 10_000.0,
        "rope_type": rope.get("type", "default"),
    } | rope
    numbers = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if rope["rope_type"] not in numbers:
        raise ValueError(
            f"{path}: rope type {rope['rope_type']!r} is not supported; supported: {', '.join(numbers)}"
        )
    original = (
        raw.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or raw["max_position_embeddings"]
    )
    rope |= {"original_max_position_embeddings": original}
    for key in ("rope_theta", *numbers[rope["rope_type"]]):
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < math.inf:
            raise ValueError(f"{path}: {key} is {rope.get(key)!r}, not a positive number")
    share = rope.get(
        "partial_rotary_factor", raw.get("rotary_pct", raw.get("partial_rotary_factor", 1.0))
    )
    if type(share) not in (int, float) or not (
        0 < share <= 1 if "rotary_pct" in raw else share == 1
    ):
        raise ValueError(
            f"{path}: partial_rotary_factor {share!r} is not supported for {raw['model_type']}"
        )
    turned = int(head_dim * share)
    if turned % 2 or not turned:
        raise ValueError(
            f"{path}: of a head's {head_dim} channels {turned} would be turned by its position, and they turn in pairs"
        )
    scaling = tuple(rope[key] for key in numbers[rope["rope_type"]])
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "rotary_dim": None if turned == head_dim else turned,
    }


def read_windows(raw: dict, n_layers: int, path: Path) -> tuple[int | None, ...]:
    """How far each layer sees: a window for all layers, for those from max_window_layers on, or for those that layer_types names."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if window is not None and not (type(window) is int and window > 0):
        raise ValueError(f"{path}: sliding_window is {window!r}, not a positive whole number")
    first = raw.get("max_window_layers", 0)
    implied = [
        "full_attention" if window is None or i < first else "sliding_attention"
        for i in range(n_layers)
    ]
    kinds = raw.get("layer_types") or implied
    if len(kinds) != n_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{path}: layer_types {kinds!r} is not supported for {n_layers} layers of {raw['model_type']}"
        )
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            f"{path}: layer_types names sliding_attention, but sliding_window and use_sliding_window set no window"
        )
    return (
        tuple(window if kind == "sliding_attention" else None for kind in kinds)
        if "sliding_attention" in kinds
        else ()
    )


def published_config(config: Config, dtype: torch.dtype) -> dict:
    """What config.json holds in the published format, the inverse of `read_config`."""
    family, windows = FAMILIES[config.family], [w for w in config.windows if w is not None]
    stretch = config.rope_scaling[0] if len(config.rope_scaling) == 1 else 1
    options = {key: getattr(config, switched[0]) for key, switched in SWITCHES.items()} | {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rotary_pct": (config.rotary_dim or config.head_dim) / config.head_dim,
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": [
            f"{'full' if w is None else 'sliding'}_attention"
            for w in config.windows or [None] * config.n_layers
        ],
    }
    published = {"architectures": [family.architecture], "model_type": config.family}
    published |= {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    if config.family == "mistral" and len(set(config.windows)) < 2:
        del options[
            "layer_types"
        ]  # a Mistral that has them counts as another model in transformers
    published |= {key: value for key, value in options.items() if key in family.options}
    if not config.learned_positions:
        published[family.keys["max_len"]] = round(config.max_len / stretch)
        published["rotary_emb_base" if "rotary_pct" in family.options else "rope_theta"] = (
            config.rope_theta
        )
    if config.rope_scaling:
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        published["rope_scaling"] = {
            "rope_type": "linear" if len(config.rope_scaling) == 1 else "llama3"
        } | dict(zip(names, config.rope_scaling))
    return published | {
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos)
        if len(config.eos) > 1
        else config.eos[0]
        if config.eos
        else None,
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
            homes = {
                folder / shard: {n for n, s in weight_map.items() if s == shard}
                for shard in weight_map.values()
            }
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
        if (
            path.parent.resolve() != folder.resolve()
        ):  # its own name may be a link elsewhere, as in the hub's cache
            raise ValueError(f"{index}: names {path}, which lies outside the folder")
        if not path.is_file():
            raise FileNotFoundError(f"{index}: names {path.name}, which is missing")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = set(file.keys())
            if names is not None and names - stored:
                raise ValueError(
                    f"{path}: lacks {min(names - stored)}, which {index.name} places there"
                )
            for name in sorted(stored if names is None else names):
                with safe_open(
                    path, framework="pt", device="cpu"
                ) as file:  # a mapping for each tensor: who drops it gives its pages back
                    tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or corrupt ({error})") from None
    return tensors


def place_of(config: Config, module: str) -> Stored:
    """Where a checkpoint of this family holds one of our modules."""
    place = FAMILIES[config.family].names[re.sub(r"^layers\.\d+", "layers.{i}", module)]
    index = re.findall(r"\d+", module)
    place = place if isinstance(place, Stored) else Stored(place)
    return replace(place, name=place.name.format(i=index[0])) if index else place


# Not weights: causal masks and rotary frequencies, which older files hold and which are computed here.
BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


def read_weights(folder: str | Path, config: Config) -> dict[str, Tensor]:
    """A checkpoint's weights under the names of FAMILIES, whichever of the names in use the file has."""
    tensors = {
        name: tensor for name, tensor in read_tensors(folder).items() if not name.endswith(BUFFERS)
    }
    for name in list(tensors):
        if config.family == "gpt2" and not name.startswith(
            ("transformer.", "lm_head.")
        ):  # the first GPT-2 files were saved without the head
            tensors["transformer." + name] = tensors.pop(name)
        if config.family == "gpt_neox" and name == "lm_head.weight":  # the newer name
            tensors["embed_out.weight"] = tensors.pop(name)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; quantised checkpoints are not supported"
            )
    return tensors


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, torch.Size], where: str | Path
) -> None:
    """Raises ValueError unless `found` has exactly the names and shapes `expected`; names the first few that differ."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [
        f"{n} is {tuple(found[n].shape)}, not {tuple(expected[n])}"
        for n in expected
        if n in found and found[n].shape != expected[n]
    ]
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
        digest.update(
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode()
        )
        if tensor.numel():
            digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
HUB_FILES += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt"]


def locate(path_or_hub_id: str | Path, files: list[str] = HUB_FILES) -> Path:
    """The local folder of a checkpoint. A hub id, `owner/name` or `owner/name@revision`, is downloaded first: config, tokenizer and
    safetensors only, never a pickle; what the local cache holds serves without a network. FileNotFoundError says in one line what failed."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if (
        len(path.parts) != 2
        or path.is_absolute()
        or path.parts[0] in (".", "..")
        or path.parent.exists()
    ):
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    from huggingface_hub import errors, snapshot_download

    name, _, revision = path.as_posix().partition("@")
    reasons = {  # the first that fits: a gated repository counts as a missing one too
        errors.GatedRepoError: f"it is gated: accept its terms at huggingface.co/{name}, then log in (hf auth login)",
        errors.RepositoryNotFoundError: "the hub has no such repository, or it is private and you are not logged in",
        errors.RevisionNotFoundError: f"it has no revision {revision!r}",
        errors.LocalEntryNotFoundError: "the hub does not answer, and the local cache does not have it",
    }
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's own errors, and its HTTP client's, share no base class
        reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None)
        reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{path}: no such folder, and not to be had from the hub either: {reason}"
        ) from None
    if files == HUB_FILES and not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{path}: the repository has no model.safetensors, and pickled weights (.bin) can run code and are never read here"
        )
    return folder


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of one of its files.

    In a folder the first of these counts: tokenizer.json; vocab.json with merges.txt, GPT-2's byte-level BPE; vocab.txt, BERT's
    WordPiece. Special tokens are those of the published tokenizer, found in a text as well, and `encode(text)` adds what it adds:
    what the post-processor of tokenizer.json says (Llama and Mistral: BOS in front; GPT-NeoX, Qwen and OLMo-2: nothing), nothing
    for GPT-2 (BOS in front where tokenizer_config.json has add_bos_token), [CLS] and [SEP] around it for BERT; with
    add_special_tokens=False never anything. ValueError if it has ids beyond an embedding table of `vocab_size` rows, which means that
    it belongs to another LM.
    """
    path, readers = Path(path), {"vocab.json": gpt2_tokenizer, "vocab.txt": bert_tokenizer}
    if path.is_dir():
        path = next(
            (path / name for name in ("tokenizer.json", *readers) if (path / name).is_file()),
            path / "tokenizer.json",
        )
    if not path.is_file():
        pieces = " (a SentencePiece tokenizer.model is not read; transformers saves it as tokenizer.json)"
        raise FileNotFoundError(
            f"{path}: no such tokenizer file{pieces if (path.parent / 'tokenizer.model').is_file() else ''}"
        )
    try:
        tokenizer = (
            readers[path.name](path) if path.name in readers else Tokenizer.from_file(str(path))
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{path}: not a {path.name if path.name in readers else 'tokenizer.json'} ({error})"
        ) from None
    tokenizer.no_padding()  # some files carry the settings of a training script, which would cut long texts without a word
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's ids go up to {largest}, the LM's embedding table has {vocab_size} rows: it belongs to another LM"
        )
    return tokenizer


def tokenizer_settings(folder: Path, kind: str) -> dict:
    """tokenizer_config.json, if there is one. ValueError if it names another class than `kind`, whose files these then are not."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = settings.get("tokenizer_class") or kind
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizer's settings ({error})") from None
    if name.removesuffix("Fast") != kind:
        raise ValueError(f"{path}: a {name} is read from its tokenizer.json only, which is missing")
    return settings


def gpt2_tokenizer(path: Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its vocab.json, with merges.txt beside it."""
    settings, merges = (
        tokenizer_settings(path.parent, "GPT2Tokenizer"),
        path.with_name("merges.txt"),
    )
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: missing; {path} is of no use without it")
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    tokenizer.decoder = decoders.ByteLevel()
    content = lambda token: (
        token["content"] if isinstance(token, dict) else token
    )  # both spellings are in use
    special = {
        name: content(settings.get(name) or "<|endoftext|>")
        for name in ("bos_token", "eos_token", "unk_token")
    }
    tokenizer.add_special_tokens(
        [
            token
            for token in dict.fromkeys(special.values())
            if tokenizer.token_to_id(token) is not None
        ]
    )
    for _, token in sorted(
        settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])
    ):
        added = AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
    if settings.get("add_bos_token"):
        bos = special["bos_token"]
        known = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=known
        )
    return tokenizer


def bert_tokenizer(path: Path) -> Tokenizer:
    """BERT's WordPiece from its vocab.txt, one token a line."""
    settings, special = (
        tokenizer_settings(path.parent, "BertTokenizer"),
        ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"],
    )
    vocab = {
        token: i
        for i, token in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    }
    if not vocab.keys() >= set(special):
        raise ValueError(f"{path}: not BERT's vocabulary, which has {', '.join(special)}")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Prefix


@dataclass
class Prefix:
    """What text can attend to before its own first token: per layer the keys (after norm and rotation) and the values.

    layers   n_layers pairs (k, v), each (1, K, P, D) for one prefix shared by every row or (B, K, P, D) for one a row
    lengths  None where every row has all P positions, else (1 | B,): row b has the LAST lengths[b] of the P, so that
             every row's text begins right after index P - 1 and extending a ragged prefix is still one concatenation
    room     see `with_room`
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor | None = None
    room: list[tuple[Tensor, Tensor]] | None = None

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
        lengths = None if self.lengths is None else self.lengths[index]
        if self.room is None:
            return Prefix([(k[index], v[index]) for k, v in self.layers], lengths)
        room = [(k[index], v[index]) for k, v in self.room]
        return Prefix(
            [(k[:, :, : self.size], v[:, :, : self.size]) for k, v in room], lengths, room
        )

    def with_room(self, index: Tensor, more: int) -> "Prefix":
        """The rows `index` (R,), one each of a prefix of one row too, with room for `more` positions, which who extends it fills in place.

        That is what decoding wants: each prefix has one continuation there, and the next token need not copy all keys and values.
        """
        P, room = self.size, []
        for pair in self.layers:
            room.append(
                tuple(t.new_empty(len(index), t.shape[1], P + more, t.shape[3]) for t in pair)
            )
            for whole, part in zip(room[-1], pair):
                whole[:, :, :P] = part if part.shape[0] == 1 else part[index]
        lengths = (
            None
            if self.lengths is None
            else self.lengths.expand(len(index))
            if len(self.lengths) == 1
            else self.lengths[index]
        )
        return Prefix([(k[:, :, :P], v[:, :, :P]) for k, v in room], lengths, room)

    def trim(self, padding: Tensor) -> "Prefix":
        """Forgets the last padding[b] positions of row b: the right padding of a batch of texts."""
        if not padding.any():
            return self
        rows, lengths = torch.arange(len(padding), device=padding.device), self.lengths
        source = (
            torch.arange(self.size, device=padding.device) - padding[:, None]
        )  # position j is filled from j - padding
        # Positions before a row's first (clamped to 0) hold a copy of something; lengths says that nobody sees them.
        pick = lambda t: t.transpose(1, 2)[rows[:, None], source.clamp(min=0)].transpose(1, 2)
        return Prefix(
            [(pick(k), pick(v)) for k, v in self.layers],
            (self.size if lengths is None else lengths) - padding,
        )

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
    return (
        tuple(map(function, *prefixes)) if isinstance(prefixes[0], tuple) else function(*prefixes)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


def join(past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1 | B, K, P, D) followed by those of T more positions (B, K, T, D): each (B, K, P + T, D)."""
    return tuple(
        torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=2)
        for old, new in zip(past, (k, v))
    )


def fill(room: tuple[Tensor, Tensor], P: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `join` in a prefix with room: the T more positions are written behind its P."""
    for whole, new in zip(room, (k, v)):
        whole[:, :, P : P + new.shape[2]] = new
    return tuple(whole[:, :, : P + k.shape[2]] for whole in room)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of T positions to themselves and to P before them; the fused scaled_dot_product_attention does the work.

    q (B, H, T, D). Keys and values of the P positions come apart, past (k, v) each (1 | B, K, P, D) beside k, v (B, K, T, D), or
    already joined, k, v (B, K, P + T, D). lengths (B,) as in Prefix. Returns (B, H, T, D).
    Query t sees earlier positions j >= P - lengths[b] and text positions up to t; of these the last `window`, its own included.
    """
    H, T = q.shape[1:3]
    if past is not None:
        k, v = join(past, k, v)
    if window is not None:  # what lies before the window of the first query no other sees either
        k, v = (t[:, :, max(0, t.shape[2] - T + 1 - window) :] for t in (k, v))
    P = k.shape[2] - T
    mask = None  # none is needed without a past, nor by a lone query that sees everything
    if lengths is not None:
        mask = (torch.arange(P + T, device=q.device) >= P - lengths[:, None])[
            :, None, None
        ]  # (B, 1, 1, P + T)
    if T > 1 and (P or lengths is not None or window is not None and window < T):
        causal = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(
            P
        )  # text position t is key P + t
        causal = causal if window is None else causal.triu(P + 1 - window)
        mask = causal if mask is None else mask & causal
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=H != k.shape[1]
    )


def frequencies(config: Config, device=None) -> Tensor:
    """How many radians each pair of channels turns from one position to the next, (rotary_dim / 2,)."""
    n = config.rotary_dim or config.head_dim
    turn = 1.0 / config.rope_theta ** (torch.arange(0, n, 2, device=device).float() / n)
    if (
        len(config.rope_scaling) == 1
    ):  # "linear": all positions move together, so that `factor` times as many lie where the LM knows them
        return turn / config.rope_scaling[0]
    if config.rope_scaling:  # "llama3": so do the slow pairs; those that turn often within the original length stay; the others lie between
        factor, low, high, original = config.rope_scaling
        turns = original / (2 * math.pi / turn)
        stay = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - stay) * turn / factor + stay * turn
    return turn


def rotation(config: Config, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and signed sines of rotary position embeddings (Su et al. 2021), each (..., 1, T, rotary_dim) for positions (..., T)."""
    if config.learned_positions:
        return None
    angles = positions[..., None, :, None].float() * frequencies(config, positions.device)
    return torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """x (B, heads, T, D), or its first rotary_dim channels, turned by its positions. Published weights pair channel d with d + rotary_dim/2,
    hence the roll."""
    if turn is None:
        return x
    cos, sin = turn
    n = cos.shape[-1]
    if n < x.shape[-1]:
        return torch.cat([rotate(x[..., :n], turn), x[..., n:]], -1)
    return (x * cos + x.roll(n // 2, -1) * sin).to(x.dtype)


class Layer(nn.Module):
    """One block: attention, then an MLP. Split at the attention, so that reading a prefix can stop there."""

    def __init__(self, config: Config, index: int = 0):
        super().__init__()
        c = self.config = config
        self.depth = index + 1
        self.window = c.windows[index % len(c.windows)] if c.windows else None
        norm = lambda width: (nn.LayerNorm if c.layer_norm else nn.RMSNorm)(width, c.norm_eps)
        query, key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.attention_norm = norm(c.dim)
        self.q, self.o = nn.Linear(c.dim, query, c.qkv_bias), nn.Linear(query, c.dim, c.o_bias)
        self.k, self.v = nn.Linear(c.dim, key, c.qkv_bias), nn.Linear(c.dim, key, c.qkv_bias)
        self.mlp_norm = norm(c.dim)
        self.gate = nn.Linear(c.dim, c.hidden_dim, c.mlp_bias) if c.gated else None
        self.up, self.down = (
            nn.Linear(c.dim, c.hidden_dim, c.mlp_bias),
            nn.Linear(c.hidden_dim, c.dim, c.mlp_bias),
        )
        if c.qk_norm:
            self.q_norm, self.k_norm = (
                norm(c.head_dim if c.qk_norm == "head" else width) for width in (query, key)
            )

    def project(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), q and k turned by their positions."""
        c = self.config
        x = x if c.post_norm else self.attention_norm(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.divide_by_depth:
            q = q / self.depth
        return rotate(q, turn), rotate(k, turn), v

    def mlp(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        act = ACTIVATIONS[self.config.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, T, C) and what its heads attended to (B, H, T, D) -> the block's output (B, T, C)."""
        y = self.o(attended.transpose(1, 2).flatten(2))
        if self.config.post_norm:
            x = x + self.attention_norm(y)
            return x + self.mlp_norm(self.mlp(x))
        if self.config.parallel:
            return x + y + self.mlp(self.mlp_norm(x))
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


def text_positions(config: Config, x: Tensor, prefix: Prefix | None) -> Tensor:
    """The positions of a text x (B, T, C): (T,), or (B, T) behind a ragged prefix. ValueError if shapes or the LM's context do not allow it."""
    if x.dim() != 3 or x.shape[-1] != config.dim:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, {config.dim})")
    if prefix is not None and prefix.layers[0][0].shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"the prefix has {prefix.layers[0][0].shape[0]} rows, the text {x.shape[0]}"
        )
    P, lengths = (0, None) if prefix is None else (prefix.size, prefix.lengths)
    if lengths is None and P + x.shape[1] > config.max_len:
        raise ValueError(
            f"{x.shape[1]} positions after a prefix of {P} exceed the LM's context of {config.max_len}"
        )
    return torch.arange(x.shape[1], device=x.device) + (P if lengths is None else lengths[:, None])


class Layers(nn.ModuleList):
    """n layers run in a row, with a prefix. The LM is one of these between embedding and final norm; a Connector is another."""

    def __init__(self, config: Config, n: int, attend=attend):
        super().__init__(Layer(config, i) for i in range(n))
        self.config, self.attend = config, attend

    def forward(self, x: Tensor, prefix: Prefix | None = None, keep: bool = False):
        """x (B, T, C) -> (B, T, C); with keep, also the prefix extended by x."""
        x, extended = self.run(x, prefix, keep)
        return (x, extended) if keep else x

    def read(self, x: Tensor, prefix: Prefix | None = None) -> Prefix:
        """The prefix extended by x."""
        return self.run(x, prefix, keep=True, keys_only=True)[1]

    def run(
        self, x: Tensor, prefix: Prefix | None, keep: bool, keys_only: bool = False
    ) -> tuple[Tensor, Prefix | None]:
        """The output of the last layer and, with keep, the prefix extended by x; with keys_only the output is not computed to its end."""
        turn, kept, lengths = (
            rotation(self.config, text_positions(self.config, x, prefix)),
            [],
            prefix and prefix.lengths,
        )
        for i, layer in enumerate(self):
            q, k, v = layer.project(x, turn)
            past = prefix.layers[i] if prefix else None
            if keep:  # the joined keys and values are wanted anyway, so attention gets them and need not join them again
                if past is not None:
                    k, v = (
                        join(past, k, v)
                        if prefix.room is None
                        else fill(prefix.room[i], past[0].shape[2], k, v)
                    )
                past = None
                kept.append((k, v))
            if keys_only and i == len(self) - 1:  # nothing attends to the last layer's output
                break
            window = (
                {} if layer.window is None else {"window": layer.window}
            )  # an attend that knows no windows serves the LMs without
            x = layer.finish(x, self.attend(q, k, v, past, lengths, **window))
        lengths = None if lengths is None else lengths.expand(x.shape[0]) + x.shape[1]
        return x, Prefix(kept, lengths, prefix and prefix.room) if keep else None


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
        self.positions = (
            nn.Embedding(config.max_len, config.dim) if config.learned_positions else None
        )
        self.layers = Layers(config, config.n_layers, attend)
        self.norm = (nn.LayerNorm if config.layer_norm else nn.RMSNorm)(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        initialise(self.layers, config.n_layers)
        for table in (self.positions, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        attend=None,
    ) -> "LM":
        """A published checkpoint of one of FAMILIES, frozen: eval mode, nothing requires a gradient. dtype None keeps that of the file.

        Built without memory of its own, then filled tensor by tensor. What needs no conversion stays a view of the memory-mapped
        file, so that nothing is copied and processes that use one checkpoint share it; of the rest one tensor at a time is held twice.
        """
        folder = locate(path_or_hub_id)
        config = read_config(folder)
        tensors = read_weights(folder, config)
        head, table = (
            place_of(config, module).name + ".weight" for module in ("head", "embedding")
        )
        if (
            config.tied and head in tensors
        ):  # some files hold a tied table twice; two different ones are not tied, whatever the config says
            config = (
                replace(config, tied=torch.equal(tensors[head], tensors[table]))
                if table in tensors
                else config
            )
            if config.tied:
                del tensors[head]
        with torch.device("meta"), Uninitialised():
            lm = cls(config, attend or globals()["attend"])
        check_tensors(tensors, lm.published_shapes(), folder)
        state = {}
        for name, parts in lm.published_parts().items():
            theirs = tensors.pop(name)  # and with the last reference its pages go
            for ours, place in parts:
                state[ours] = (
                    place.view(theirs, config.n_heads)
                    .reshape(lm.get_parameter(ours).shape)
                    .to(device, dtype)
                    .contiguous()
                )
        lm.load_state_dict(state, assign=True)
        lm.folder = folder
        return lm.requires_grad_(False).eval()

    def save(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        tokenizer: Tokenizer | None = None,
        replace: bool = False,
    ) -> None:
        """Writes config.json, model.safetensors and tokenizer.json in the published format; the folder appears whole or not at all.

        A folder that exists is a FileExistsError, or with `replace` makes way once the new one is written.
        """
        folder, dtype = Path(folder), dtype or self.embedding.weight.dtype
        if folder.exists() and not replace:
            raise FileExistsError(f"{folder} exists; choose another folder")
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # what a kill left
        unfinished.mkdir(parents=True)
        (unfinished / "config.json").write_text(
            json.dumps(published_config(self.config, dtype), indent=1) + "\n", encoding="utf-8"
        )
        tensors = {
            name: tensor.to(dtype).contiguous() for name, tensor in self.published_tensors().items()
        }
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(str(unfinished / "tokenizer.json"))
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    def published_parts(self) -> dict[str, list[tuple[str, Stored]]]:
        """{published tensor name: [(name of a parameter, its place in that tensor)]} for every parameter."""
        parts = {}
        for ours, _ in self.named_parameters():
            module, kind = ours.rsplit(".", 1)
            place = place_of(self.config, module)
            parts.setdefault(f"{place.name}.{kind}", []).append((ours, place))
        return parts

    def published_shapes(self) -> dict[str, torch.Size]:
        """{published tensor name: its shape}."""
        return {
            name: place.shape(self.get_parameter(ours).shape)
            for name, [(ours, place), *_] in self.published_parts().items()
        }

    def published_tensors(self) -> dict[str, Tensor]:
        """The parameters under their published names and in their published layout."""
        tensors = {}
        for name, parts in self.published_parts().items():
            parameters = [self.get_parameter(ours).detach() for ours, _ in parts]
            if parts[0][1] == Stored(parts[0][1].name):
                tensors[name] = parameters[0]
                continue
            tensors[name] = parameters[0].new_empty(parts[0][1].shape(parameters[0].shape))
            for parameter, (_, place) in zip(parameters, parts):
                view = place.view(tensors[name], self.config.n_heads)
                view.copy_(parameter.view_as(view))
        return tensors

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
        out = self.layers(self.add_positions(x, prefix), prefix, keep)
        return (self.norm(out[0]), out[1]) if keep else self.norm(out)

    def add_positions(self, x: Tensor, prefix: Prefix | None) -> Tensor:
        """x (B, T, C) with learned position embeddings, in an LM that has them: here, not in `embed`, so that every pass of a recursion has them."""
        if self.positions is None:
            return x
        return x + self.positions(
            text_positions(self.config, x, prefix).clamp(max=self.config.max_len - 1)
        )  # beyond the table lies padding only

    def read(
        self, x: Tensor, prefix: Prefix | None = None, lengths: Tensor | None = None
    ) -> Prefix:
        """What later positions will attend to after x (P, C) or (B, P, C), which may itself follow a prefix.

        lengths (B,): how many positions of each right-padded row of x are real. Differentiable with respect to x.
        """
        x = x[None] if x.dim() == 2 else x
        kept = self.layers.read(self.add_positions(x, prefix), prefix)
        return kept if lengths is None else kept.trim(x.shape[1] - lengths.to(x.device))

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        return F.linear(h, self.embedding.weight if self.head is None else self.head.weight).float()

    def new_layers(self, n: int) -> Layers:
        """n layers of this LM's own kind, freshly initialised, float32 and trainable, for a Connector; call them as one (see Layers).

        Layer i has the window of the LM's layer i. Learned positions are the LM's and not its layers': these see the ones in x.
        """
        layers = Layers(self.config, n, self.layers.attend).to(self.embedding.weight.device)
        initialise(layers, n)
        return layers


def initialise(layers: Layers, depth: int) -> None:
    """GPT-2's scheme: normal(0, 0.02), and 1/sqrt(2 depth) of that where a layer adds to the residual stream; biases 0."""
    for name, parameter in layers.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(
                parameter,
                std=0.02 / math.sqrt(2 * depth) if name.split(".")[-2] in ("o", "down") else 0.02,
            )
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)


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
    return torch.tensor([row + [0] * (T - len(row)) for row in ids], device=device), torch.tensor(
        list(map(len, ids)), device=device
    )


def check_room(lm, ids: list[list[int]], prefix, new_tokens: list[int]) -> None:
    """ValueError names the first question whose prefix, tokens and new tokens exceed the LM's context."""
    first = prefix[0] if isinstance(prefix, tuple) else prefix
    if first is not None and first.layers[0][0].shape[0] not in (1, len(ids)):
        raise ValueError(
            f"the prefix has {first.layers[0][0].shape[0]} rows for {len(ids)} questions"
        )
    for b, P in enumerate([0] * len(ids) if first is None else first.row_lengths(len(ids))):
        if (
            P + len(ids[b]) + new_tokens[b] - 1 > lm.config.max_len
        ):  # the last new token is never fed back
            raise ValueError(
                f"question {b}: a prefix of {P}, {len(ids[b])} tokens and {new_tokens[b]} new ones exceed the LM's context of {lm.config.max_len}"
            )


def read_questions(lm, ids: list[list[int]], prefix, new_tokens: list[int]):
    """Reads all but the last token of each question behind its prefix. Returns (those last tokens (B, 1), the prefix so far)."""
    if not ids or not all(ids):
        raise ValueError(
            "no questions"
            if not ids
            else f"question {[bool(row) for row in ids].index(False)} is empty; it needs at least one token"
        )
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
            raise ValueError(
                f"question {b} has the token id {min(row) if min(row) < 0 else max(row)}, outside the vocabulary of {lm.config.vocab_size}"
            )
    check_room(lm, ids, prefix, new_tokens)
    tokens, lengths = pad(ids, next(lm.parameters()).device)
    last = tokens.gather(1, lengths[:, None] - 1)
    if tokens.shape[1] > 1:
        prefix = lm.read(lm.embed(tokens[:, :-1]), prefix, lengths - 1)
    return last, prefix


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator
) -> Tensor:
    """One token id for each row of logits (R, V): the most likely at temperature 0, else drawn from the k likeliest or the nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf
        )
    if (
        top_p is not None
    ):  # keep the smallest set that reaches top_p: a token stays if what is likelier than it falls short
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
    The cache holds 2 * K * D * n_layers values, of the weights' dtype, for every position of every live row: prefix, question and new
    tokens, as many as may be written, in layers with a window too; and that twice for the moment in which finished rows leave it.
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
    stops = torch.tensor(
        [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        dtype=torch.long,
        device=device,
    )
    rows = torch.arange(len(ids), device=device).repeat_interleave(
        n
    )  # the question of each live row
    live = torch.arange(len(ids) * n, device=device)  # and the sample it is writing
    written = torch.full((len(ids) * n, max_new_tokens), -1, device=device)
    logprob = torch.zeros(len(ids) * n, device=device)
    for step in range(max_new_tokens):
        h, cache = lm(lm.embed(token), cache, keep=True)
        logits = lm.logits(h[:, -1])
        if step == 0:  # up to here the samples of a question are one row
            logits = logits[rows]
            cache = each_pass(lambda p: p.with_room(rows, max_new_tokens - 1), cache)
        token = choose(logits, temperature, top_k, top_p, generator)[:, None]
        written[live, step] = token[:, 0]
        logprob[live] += (logits.gather(1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]
        going = ~torch.isin(token[:, 0], stops)
        if len(stops) and not going.all():
            live, token, index = live[going], token[going], going.nonzero()[:, 0]
            if not len(live):
                break
            cache = each_pass(lambda p: p.rows(index), cache)
    samples = [
        Sample([t for t in row if t >= 0], value)
        for row, value in zip(written.tolist(), logprob.tolist())
    ]
    return [samples[b * n : (b + 1) * n] for b in range(len(ids))]


@torch.no_grad()
def option_scores(
    lm, ids: list[list[int]], options: list[list[list[int]]], prefix=None, mean: bool = False
) -> list[Tensor]:
    """Log-probabilities of answer choices: for each of B questions a float32 tensor (number of its options,).

    options[b] is a list of non-empty lists of token ids; a score is the sum over an option's tokens, or their mean.
    Each question is read once and shared by its options, which form one batch.
    """
    if len(options) != len(ids) or not all(choices and all(choices) for choices in options):
        raise ValueError(
            f"{len(ids)} questions need as many lists of options, none of them or of their options empty"
        )
    last, cache = read_questions(lm, ids, prefix, [max(map(len, choices)) for choices in options])
    rows = torch.tensor(
        [b for b, choices in enumerate(options) for _ in choices], device=last.device
    )
    flat = [option for choices in options for option in choices]
    targets, lengths = pad(flat, last.device)
    if cache is not None:
        cache = each_pass(lambda p: p.rows(rows), cache)
    fed = torch.cat([last[rows], targets[:, :-1]], dim=1)  # position t predicts target t
    logprobs = (
        lm.logits(lm(lm.embed(fed), cache)).log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    )
    real = torch.arange(targets.shape[1], device=last.device) < lengths[:, None]
    scores = (logprobs * real).sum(1) / (lengths if mean else 1)
    return list(scores.split([len(choices) for choices in options]))


def answer(
    lm,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    prefix=None,
    max_new_tokens: int = 16,
    options=None,
    batch_size: int = 128,
) -> list[str]:
    """Each question's answer as text, in batches of similar lengths; prefix: None or one for all.

    The answer is the greedy continuation, or where options[b] holds token ids to choose from, the likeliest of these (the
    sum over its tokens, as T0 ranks them).
    """
    options = options or [[]] * len(ids)
    check_room(
        lm,
        ids,
        prefix,
        [max(map(len, choices)) if choices else max_new_tokens for choices in options],
    )
    answers: list[list[int]] = [[]] * len(ids)
    free, bound = (
        [
            b
            for b in sorted(range(len(ids)), key=lambda b: len(ids[b]))
            if bool(options[b]) == choice
        ]
        for choice in (False, True)
    )
    for start in range(0, len(free), batch_size):
        chosen = free[start : start + batch_size]
        for b, samples in zip(
            chosen,
            generate(lm, [ids[b] for b in chosen], prefix, max_new_tokens, eos=lm.config.eos),
        ):
            answers[b] = samples[0].ids
    few = max(1, batch_size // 4)  # every option is a row of its own
    for start in range(0, len(bound), few):
        chosen = bound[start : start + few]
        for b, scores in zip(
            chosen,
            option_scores(lm, [ids[b] for b in chosen], [options[b] for b in chosen], prefix),
        ):
            answers[b] = options[b][scores.argmax()]
    return [
        tokenizer.decode(tokens).strip() for tokens in answers
    ]  # without special tokens, so without the eos


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description="Continue a text with a published checkpoint, and say what the text costs it."
    )
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
    sample = generate(
        lm,
        [ids],
        None,
        args.max_new_tokens,
        args.temperature,
        eos=lm.config.eos,
        generator=generator,
    )[0][0]
    nats = (
        -option_scores(lm, [ids[:1]], [[ids[1:]]], mean=True)[0].item()
        if len(ids) > 1
        else math.nan
    )
    print(args.text + tokenizer.decode(ids + sample.ids)[len(tokenizer.decode(ids)) :])
    print(
        f"[{nats:.4f} nats a token for the text, {-sample.logprob / len(sample.ids):.4f} for the {len(sample.ids)} new tokens]"
    )
    return {"ids": sample.ids, "nats": nats}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
