"""BERT from scratch (Devlin et al. 2019), the encoder under the re-ranker.

    bert(ids, lengths) -> (B, L, C)     the last hidden states; the first is that of [CLS]

Published checkpoints load and are written. Needs torch, tokenizers and safetensors, and no other file of the project.
Dimensions as in model.py: B batch, L tokens of a text, C model width, H heads, D head width.

    python rerank.py assets/bert        prints what a checkpoint holds
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# The encoder


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT; `read_bert_config` translates from a published config.json, `Bert.save` back."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    hidden_dim: int  # width of the MLP
    max_len: int  # positions
    types: int = 2  # kinds of segment
    norm_eps: float = 1e-12
    dropout: float = 0.1  # in training


PUBLISHED_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_len": "max_position_embeddings",
    "types": "type_vocab_size",
}


def read_bert_config(folder: str | Path) -> BertConfig:
    """The BertConfig in a published folder's config.json. ValueError names the key that is missing or not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a checkpoint folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "bert":
        raise ValueError(f"{path}: model_type is not bert")
    for key in PUBLISHED_SIZES.values():
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise ValueError(f"{path}: {key} is {raw.get(key)!r}, not a positive whole number")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise ValueError(
            f"{path}: hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads {raw['num_attention_heads']}"
        )
    for key, value in {"hidden_act": "gelu", "position_embedding_type": "absolute"}.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported (only {value!r})")
    sizes = {ours: raw[theirs] for ours, theirs in PUBLISHED_SIZES.items()}
    return BertConfig(
        **sizes,
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        dropout=raw.get("hidden_dropout_prob", 0.1),
    )


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Inside it torch.nn.init does nothing: what a checkpoint fills needs no random numbers, and on the meta device drawing
    them would first import torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class BertLayer(nn.Module):
    """One post-norm block: each half is added to its input, and the sum is normed."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.up, self.down = nn.Linear(c.dim, c.hidden_dim), nn.Linear(c.hidden_dim, c.dim)
        self.attention_norm, self.mlp_norm = (
            nn.LayerNorm(c.dim, c.norm_eps),
            nn.LayerNorm(c.dim, c.norm_eps),
        )

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """x (B, L, C), seen (B, 1, 1, L) true where there is a token to attend to -> (B, L, C)."""
        q, k, v = (
            f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=self.dropout if self.training else 0.0
        )
        x = self.attention_norm(
            x + F.dropout(self.o(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        )
        return self.mlp_norm(
            x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)
        )


class Bert(nn.Module):
    """bert(ids, lengths, types) -> (B, L, C). `Bert(config)` is freshly initialised, `Bert.from_pretrained(folder)` a published checkpoint, in eval mode."""

    def __init__(self, config: BertConfig):
        super().__init__()
        c = self.config = config
        self.words, self.positions, self.types = (
            nn.Embedding(c.vocab_size, c.dim),
            nn.Embedding(c.max_len, c.dim),
            nn.Embedding(c.types, c.dim),
        )
        self.norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c.n_layers))
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.dim() == 2 else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor:
        """ids (B, L) -> (B, L, C). lengths (B,): how much of each right-padded row is real; types (B, L): the segment of each token, 0 if not given."""
        if ids.shape[1] > self.config.max_len:
            raise ValueError(
                f"texts of {ids.shape[1]} tokens exceed the {self.config.max_len} positions of this BERT"
            )
        position = torch.arange(ids.shape[1], device=ids.device)
        x = (
            self.words(ids)
            + self.positions(position)
            + self.types(torch.zeros_like(ids) if types is None else types)
        )
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        seen = None if lengths is None else (position < lengths[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, seen)
        return x

    def published_names(self) -> dict[str, str]:
        """{our parameter name: the published tensor name}."""
        inner = {
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "o": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "mlp_norm": "output.LayerNorm",
        }
        outer = {
            "words": "word_embeddings",
            "positions": "position_embeddings",
            "types": "token_type_embeddings",
            "norm": "LayerNorm",
        }
        names = {}
        for name, _ in self.named_parameters():
            *path, kind = name.split(".")
            stem = (
                f"encoder.layer.{path[1]}.{inner[path[2]]}"
                if path[0] == "layers"
                else f"embeddings.{outer[path[0]]}"
            )
            names[name] = f"{stem}.{kind}"
        return names

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Bert":
        """The encoder of a published checkpoint, float32, in eval mode; heads beside it are left unread."""
        tensors = {
            name.removeprefix("bert."): tensor for name, tensor in read_tensors(folder).items()
        }
        with torch.device("meta"), Uninitialised():
            bert = cls(read_bert_config(folder))
        names, shapes = bert.published_names(), {n: p.shape for n, p in bert.named_parameters()}
        known = set(names.values()) | {"embeddings.position_ids"}
        wrong = [
            n for ours, n in names.items() if n not in tensors or tensors[n].shape != shapes[ours]
        ]
        wrong += [
            n for n in tensors if n.startswith(("encoder.", "embeddings.")) and n not in known
        ]
        if wrong:
            raise ValueError(
                f"{folder}: the tensor {min(wrong)} is missing, unexpected or misshapen for its config"
            )
        bert.load_state_dict(
            {ours: tensors[theirs].to(device, torch.float32) for ours, theirs in names.items()},
            assign=True,
        )
        return bert.eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors in the published format into a folder, which may exist."""
        c, folder, state = self.config, Path(folder), dict(self.named_parameters())
        config = {
            "architectures": ["BertModel"],
            "model_type": "bert",
            **{theirs: getattr(c, ours) for ours, theirs in PUBLISHED_SIZES.items()},
            "hidden_act": "gelu",
            "layer_norm_eps": c.norm_eps,
            "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout,
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


def segments(ids: Tensor, separator: int) -> Tensor:
    """The types of [CLS] question [SEP] title [SEP] passage: 0 up to and including the first separator, 1 from there on. (B, L) -> (B, L)."""
    separators = (ids == separator).long()
    return ((separators.cumsum(1) - separators) > 0).long()


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


def main(argv: list[str] | None = None) -> BertConfig:
    parser = argparse.ArgumentParser(description="Print what a BERT checkpoint holds.")
    parser.add_argument("folder")
    parser.error = lambda message: parser.exit(2, f"rerank.py: {message}\n")
    bert = Bert.from_pretrained(parser.parse_args(argv).folder)
    print(f"{bert.config}, {sum(p.numel() for p in bert.parameters()):,} parameters")
    return bert.config


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"rerank.py: {error}", file=sys.stderr)
        sys.exit(2)
