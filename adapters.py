"""What is trained around the frozen LM: soft prompts and Connectors, their initialisation, and their files.

    SoftPrompt   P trained vectors in front of the text (Lester et al. 2021, "The Power of Scale for Parameter-Efficient
                 Prompt Tuning"); used as  lm(lm.embed(ids), prefix=lm.read(prompt()))
    Connector    a few causal layers between two passes through the LM (Levine et al. 2022, "Standing on the Shoulders of
                 Giant Frozen Language Models", section 4.2); used as  lm(connector(lm(lm.embed(ids))))
    T5Encoder    the frozen reader of the input that input-dependent prompts are made from (section 2 there)

An adapter is stored as a folder of two files, adapter_config.json and adapter_model.safetensors; a soft prompt's are the
ones that PEFT reads and writes. The config holds the fingerprint of the LM it was trained on, and loading checks it.

Needs torch, tokenizers and safetensors, and no other file of the project: the LM and its layers are handed in.
Dimensions as in model.py: B batch, T text tokens, P prompt tokens, C model width, V vocabulary.

    python adapters.py runs/prompt_tuning      prints what an adapter folder holds
"""

import argparse
import json
import math
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


class SoftPrompt(nn.Module):
    """P vectors trained in the place of token embeddings. `prompt()` gives them, (P, C); `lm.read(prompt())` makes the prefix."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        if vectors.dim() != 2:
            raise ValueError(f"prompt vectors have shape {tuple(vectors.shape)}, expected (P, C)")
        self.vectors = nn.Parameter(vectors.detach().clone().float())

    def forward(self) -> Tensor:
        return self.vectors


# ---------------------------------------------------------------------------------------------------------------------
# What a prompt starts from: plain functions that return (P, C). `table` is the LM's embedding table (V, C), so the prompt
# starts at the scale of real tokens; Lester et al. (section 3.2) find vocabulary and labels better than noise.


def random(
    length: int, table: Tensor, scale: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform in [-scale, scale], as in the paper (its released code draws from [0, scale)). A default of 0.5 fits T5's large embeddings."""
    return (torch.rand(length, table.shape[1], generator=generator) * 2 - 1) * scale


def from_vocab(
    length: int, table: Tensor, population: int = 5000, generator: torch.Generator | None = None
) -> Tensor:
    """Embeddings of `length` different tokens among the first `population` ids, which are the common ones where the
    vocabulary is ordered by frequency (SentencePiece) or by merges (byte-level BPE). With repeats only if too few."""
    population = min(population, table.shape[0])
    draws = -(-length // population)  # whole permutations needed
    ids = torch.cat(
        [torch.randperm(population, generator=generator) for _ in range(draws)]
        or [torch.empty(0, dtype=torch.long)]
    )
    return table[ids[:length].to(table.device)].detach().float().cpu()


def from_labels(
    length: int,
    table: Tensor,
    tokenizer: Tokenizer,
    labels: list[str],
    generator: torch.Generator | None = None,
) -> Tensor:
    """One vector for each class label, the mean of its tokens' embeddings; sampled vocabulary fills the rest, extra labels are dropped."""
    if len(labels) > length:
        warnings.warn(
            f"{len(labels)} labels for a prompt of {length}: the last {len(labels) - length} are left out"
        )
    rows = [
        table[token_ids(tokenizer, label)].detach().float().mean(0).cpu()
        for label in labels[:length]
    ]
    return (
        torch.cat([torch.stack(rows), from_vocab(length - len(rows), table, generator=generator)])
        if rows
        else from_vocab(length, table, generator=generator)
    )


def from_text(
    length: int,
    table: Tensor,
    tokenizer: Tokenizer,
    text: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token i of the text in slot i; sampled vocabulary fills the rest, a longer text is cut."""
    ids = token_ids(tokenizer, text)[:length]
    return torch.cat(
        [
            table[ids].detach().float().cpu(),
            from_vocab(length - len(ids), table, generator=generator),
        ]
    )


def from_file(length: int, table: Tensor, path: str | Path) -> Tensor:
    """The vectors of a stored soft prompt's folder; their shape must be (length, C)."""
    tensors = read_tensors(path, "adapter_model")
    if set(tensors) != {"prompt_embeddings"}:
        raise ValueError(
            f"{path}: not a soft prompt (its tensors: {', '.join(sorted(tensors)[:3])})"
        )
    vectors = tensors["prompt_embeddings"]
    if tuple(vectors.shape) != (length, table.shape[1]):
        raise ValueError(
            f"{path}: the prompt is {tuple(vectors.shape)}, not {(length, table.shape[1])}"
        )
    return vectors.float()


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens without BOS or EOS. ValueError for a text that has none."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens")
    return ids


# ---------------------------------------------------------------------------------------------------------------------


class Connector(nn.Module):
    """n layers of the LM's own kind (`lm.new_layers(n)`), then a norm that brings their output to the scale it should have.

    connector(x, prefix=None, keep=False) has the LM's own contract: (B, T, C) -> (B, T, C), with keep also its Prefix.
    The final norm's gain starts at `scale`: what comes out replaces token embeddings, whose entries are one to two
    orders of magnitude smaller than those of the hidden states that go in (see `rms`), and its second reader, the
    frozen first layer, knows only that scale.
    """

    def __init__(self, layers: nn.ModuleList, scale: float = 1.0):
        super().__init__()
        self.layers = layers
        self.norm = nn.RMSNorm(layers.config.dim, layers.config.norm_eps)
        nn.init.constant_(self.norm.weight, scale)
        self.to(next(layers.parameters()).device)

    def forward(self, x: Tensor, prefix=None, keep: bool = False):
        out = self.layers(x, prefix, keep)
        return (self.norm(out[0]), out[1]) if keep else self.norm(out)


def rms(vectors: Tensor) -> float:
    """Root mean square over all entries: the scale for a Connector whose output stands in for such vectors."""
    return vectors.detach().float().square().mean().sqrt().item()


# ---------------------------------------------------------------------------------------------------------------------
# The frozen encoder of input-dependent prompts


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5 encoder; `read_t5_config` translates from a published config.json, `T5Encoder.save` back."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    head_dim: int  # D; H * D need not equal C
    hidden_dim: int  # width of the MLP
    gated: bool = True  # T5 1.1 and Flan: gelu(x W0) * (x W1); the first T5: relu(x W)
    buckets: int = 32  # distances that have a bias of their own, half of them for each direction
    max_distance: int = 128  # beyond which all share the last bucket
    norm_eps: float = 1e-6


def read_t5_config(folder: str | Path) -> T5Config:
    """The T5Config in a published folder's config.json. ValueError names the key that is missing or not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a checkpoint folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is not t5")
    sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")
    for key in sizes:
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise ValueError(f"{path}: {key} is {raw.get(key)!r}, not a positive whole number")
    mlp = raw.get("feed_forward_proj", "relu")
    if mlp not in ("relu", "gated-gelu"):
        raise ValueError(
            f"{path}: feed_forward_proj {mlp!r} is not supported (only 'relu' and 'gated-gelu')"
        )
    rest = (
        raw.get("relative_attention_num_buckets", 32),
        raw.get("relative_attention_max_distance", 128),
        raw.get("layer_norm_epsilon", 1e-6),
    )
    return T5Config(*(raw[key] for key in sizes), mlp == "gated-gelu", *rest)


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Inside it torch.nn.init does nothing: what a checkpoint fills needs no random numbers, and on the meta device drawing
    them would first import torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class T5Layer(nn.Module):
    """One pre-norm block. T5 does not divide attention scores by sqrt(D): its initialisation has that in it."""

    def __init__(self, c: T5Config):
        super().__init__()
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.head_dim = c.head_dim
        self.attention_norm, self.mlp_norm = (
            nn.RMSNorm(c.dim, c.norm_eps),
            nn.RMSNorm(c.dim, c.norm_eps),
        )
        self.q, self.k, self.v = (linear(c.dim, c.n_heads * c.head_dim) for _ in range(3))
        self.o = linear(c.n_heads * c.head_dim, c.dim)
        self.gate = linear(c.dim, c.hidden_dim) if c.gated else None
        self.up, self.down = linear(c.dim, c.hidden_dim), linear(c.hidden_dim, c.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, C), bias (1 | B, H, L, L) added to the scores -> (B, L, C)."""
        y = self.attention_norm(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        x = x + self.o(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            .transpose(1, 2)
            .flatten(2)
        )
        y = self.mlp_norm(x)
        return x + self.down(
            F.relu(self.up(y))
            if self.gate is None
            else F.gelu(self.gate(y), approximate="tanh") * self.up(y)
        )


class T5Encoder(nn.Module):
    """The encoder half of T5 (Raffel et al. 2020). encoder(encoder.embed(ids), lengths) -> (B, L, C), final norm included.

    Works for any x of width C, such as a trained prompt in front of the embeddings. `T5Encoder.from_pretrained` is frozen.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.distance_bias = nn.Embedding(c.buckets, c.n_heads)  # one table for all layers
        self.layers = nn.ModuleList(T5Layer(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        for (
            name,
            p,
        ) in self.named_parameters():  # T5's scheme: 1 / sqrt(fan-in), and once more 1 / sqrt(D) for q in place of scaled scores
            if p.dim() == 2:
                fan_in = (
                    1.0
                    if name == "embedding.weight"
                    else c.dim
                    if name == "distance_bias.weight"
                    else p.shape[1]
                )
                nn.init.normal_(
                    p, std=(fan_in * (c.head_dim if name.endswith(".q.weight") else 1)) ** -0.5
                )

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, C)."""
        return self.embedding(ids)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, L, C) -> (B, L, C); lengths (B,) says how much of each right-padded row is real."""
        position = torch.arange(x.shape[1], device=x.device)
        bias = self.distance_bias(
            distance_bucket(position[None] - position[:, None], self.config)
        ).permute(2, 0, 1)[None]  # (1, H, L, L)
        if lengths is not None:
            bias = bias.masked_fill(
                position >= lengths[:, None, None, None], torch.finfo(bias.dtype).min
            )
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    def published_names(self) -> dict[str, str]:
        """{our parameter name: the published tensor name}."""
        names = {
            "embedding.weight": "shared.weight",
            "norm.weight": "encoder.final_layer_norm.weight",
            "distance_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        }
        for i in range(self.config.n_layers):
            ours, attention, mlp = (
                f"layers.{i}",
                f"encoder.block.{i}.layer.0",
                f"encoder.block.{i}.layer.1",
            )
            names |= {
                f"{ours}.{ours_}.weight": f"{attention}.SelfAttention.{ours_}.weight"
                for ours_ in "qkvo"
            }
            names |= {
                f"{ours}.attention_norm.weight": f"{attention}.layer_norm.weight",
                f"{ours}.mlp_norm.weight": f"{mlp}.layer_norm.weight",
            }
            names |= {
                f"{ours}.{a}.weight": f"{mlp}.DenseReluDense.{b}.weight"
                for a, b in (
                    ("gate", "wi_0"),
                    ("up", "wi_1" if self.config.gated else "wi"),
                    ("down", "wo"),
                )
            }
        return {
            ours: theirs for ours, theirs in names.items() if ours in dict(self.named_parameters())
        }

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "T5Encoder":
        """The encoder of a published T5 checkpoint, frozen: eval mode, nothing requires a gradient. A decoder beside it is left unread."""
        tensors = read_tensors(folder)
        with torch.device("meta"), Uninitialised():
            encoder = cls(read_t5_config(folder))
        if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
            tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"]
        names, shapes = (
            encoder.published_names(),
            {n: p.shape for n, p in encoder.named_parameters()},
        )
        known = set(names.values()) | {"encoder.embed_tokens.weight"}
        wrong = [
            n for ours, n in names.items() if n not in tensors or tensors[n].shape != shapes[ours]
        ] + [n for n in tensors if n.startswith("encoder.") and n not in known]
        if wrong:
            raise ValueError(
                f"{folder}: the tensor {min(wrong)} is missing, unexpected or misshapen for its config"
            )
        encoder.load_state_dict(
            {ours: tensors[theirs].to(device, dtype) for ours, theirs in names.items()}, assign=True
        )
        return encoder.requires_grad_(False).eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors in the published format into a folder, which may exist."""
        c, folder, state = self.config, Path(folder), dict(self.named_parameters())
        config = {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": c.vocab_size,
            "d_model": c.dim,
            "num_layers": c.n_layers,
            "num_heads": c.n_heads,
            "d_kv": c.head_dim,
            "d_ff": c.hidden_dim,
            "feed_forward_proj": "gated-gelu" if c.gated else "relu",
            "relative_attention_num_buckets": c.buckets,
            "relative_attention_max_distance": c.max_distance,
            "layer_norm_epsilon": c.norm_eps,
            "is_encoder_decoder": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as path:
            save_file(
                {
                    theirs: state[ours].detach().cpu().to(dtype).contiguous()
                    for ours, theirs in self.published_names().items()
                },
                path,
                metadata={"format": "pt"},
            )
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def distance_bucket(distance: Tensor, config: T5Config) -> Tensor:
    """The bucket of key position minus query position. Half the buckets look back, half ahead; in each half the near distances
    have one bucket each, and the far ones share buckets that widen logarithmically up to max_distance."""
    half = config.buckets // 2
    near, away = half // 2, distance.abs()
    far = near + (away.clamp(min=1).float() / near).log() / math.log(config.max_distance / near) * (
        half - near
    )
    return (distance > 0) * half + torch.where(away < near, away, far.long().clamp(max=half - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path: str | Path):
    """Yields a temporary path to write; then syncs it and renames it to `path`, so that `path` is always whole, old or new."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_adapter(folder: str | Path, adapter: nn.Module, lm, **info) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `info` goes into the config (the method, the base's name)."""
    folder, tensors = (
        Path(folder),
        {name: p.detach().cpu().contiguous() for name, p in adapter.named_parameters()},
    )
    config = {"base_model_name_or_path": None, "fingerprint": lm.fingerprint()} | info
    if isinstance(adapter, SoftPrompt):
        tensors = {"prompt_embeddings": tensors["vectors"]}
        config |= {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": len(adapter.vectors),
            "placement": "before_bos",
        }
        config |= {
            "num_transformer_submodules": 1,
            "num_attention_heads": lm.config.n_heads,
            "num_layers": lm.config.n_layers,
        }
    elif isinstance(adapter, Connector):
        config |= {"peft_type": "CONNECTOR", "connector_layers": len(adapter.layers)}
    else:
        raise TypeError(f"a {type(adapter).__name__} is no adapter of this file")
    config |= {"token_dim": lm.config.dim}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with replacing(folder / "adapter_config.json") as path:
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json as a dict. FileNotFoundError or ValueError names the file."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter_config.json, so there is no trained adapter in this folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{path}: has no key peft_type")
    return config


def load_adapter(folder: str | Path, lm) -> nn.Module:
    """The adapter in `folder`, on the LM's device, trainable. ValueError if it was trained on another base or its tensors do not fit."""
    config, tensors = read_adapter_config(folder), read_tensors(folder, "adapter_model")
    stored = config.get("fingerprint")
    if stored is None:
        warnings.warn(
            f"{folder}: carries no fingerprint, so whether it belongs to this LM is not checked"
        )
    elif stored != lm.fingerprint():
        raise ValueError(
            f"{folder}: was trained on another base (fingerprint {str(stored)[:12]}..., this LM's is {lm.fingerprint()[:12]}...)"
        )
    if config.get("token_dim", lm.config.dim) != lm.config.dim:
        raise ValueError(
            f"{folder}: made for an LM of width {config['token_dim']}, this one's is {lm.config.dim}"
        )
    if config["peft_type"] == "PROMPT_TUNING":
        if config.get("placement", "before_bos") != "before_bos":
            raise ValueError(
                f"{folder}: placement {config['placement']!r} is not supported (only 'before_bos')"
            )
        adapter = SoftPrompt(
            from_file(config.get("num_virtual_tokens", 0), lm.embedding.weight, folder)
        )
    elif config["peft_type"] == "CONNECTOR":
        layers = config.get("connector_layers")
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"{folder}: connector_layers is {layers!r}, not a number of layers")
        adapter = Connector(lm.new_layers(layers))
        expected = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        wrong = [
            n
            for n in expected.keys() | tensors.keys()
            if n not in expected or n not in tensors or tuple(tensors[n].shape) != expected[n]
        ]
        if wrong:
            raise ValueError(
                f"{folder}: the tensor {min(wrong)} is missing, unexpected or misshapen for this LM"
            )
        adapter.load_state_dict(tensors)
    else:
        raise ValueError(
            f"{folder}: peft_type {config['peft_type']!r} is not supported; supported: PROMPT_TUNING, CONNECTOR"
        )
    return adapter.to(lm.embedding.weight.device)


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


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Print what an adapter folder holds.")
    parser.add_argument("folder")
    parser.error = lambda message: parser.exit(2, f"adapters.py: {message}\n")
    args = parser.parse_args(argv)
    config, tensors = read_adapter_config(args.folder), read_tensors(args.folder, "adapter_model")
    for key, value in config.items():
        print(f"{key:28} {value}")
    for name, tensor in tensors.items():
        print(f"{name:28} {tuple(tensor.shape)}, root mean square {rms(tensor):.4f}")
    return config


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"adapters.py: {error}", file=sys.stderr)
        sys.exit(2)
