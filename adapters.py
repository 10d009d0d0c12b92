"""What is trained around the frozen LM: soft prompts and Connectors, their initialisation, and their files.

    SoftPrompt   P trained vectors in front of the text (Lester et al. 2021, "The Power of Scale for Parameter-Efficient
                 Prompt Tuning"); used as  lm(lm.embed(ids), prefix=lm.read(prompt()))
    Connector    a few causal layers between two passes through the LM (Levine et al. 2022, "Standing on the Shoulders of
                 Giant Frozen Language Models", section 4.2); used as  lm(connector(lm(lm.embed(ids))))

An adapter is stored as a folder of two files, adapter_config.json and adapter_model.safetensors; a soft prompt's are the
ones that PEFT reads and writes. The config holds the fingerprint of the LM it was trained on, and loading checks it.

Needs torch, tokenizers and safetensors, and no other file of the project: the LM and its layers are handed in.
Dimensions as in model.py: B batch, T text tokens, P prompt tokens, C model width, V vocabulary.

    python adapters.py runs/prompt_tuning      prints what an adapter folder holds
"""

import argparse
import json
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
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


def random(length: int, table: Tensor, scale: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [-scale, scale], as in the paper (its released code draws from [0, scale)). A default of 0.5 fits T5's large embeddings."""
    return (torch.rand(length, table.shape[1], generator=generator) * 2 - 1) * scale


def from_vocab(length: int, table: Tensor, population: int = 5000, generator: torch.Generator | None = None) -> Tensor:
    """Embeddings of `length` different tokens among the first `population` ids, which are the common ones where the
    vocabulary is ordered by frequency (SentencePiece) or by merges (byte-level BPE). With repeats only if too few."""
    population = min(population, table.shape[0])
    draws = -(-length // population)  # whole permutations needed
    ids = torch.cat([torch.randperm(population, generator=generator) for _ in range(draws)] or [torch.empty(0, dtype=torch.long)])
    return table[ids[:length].to(table.device)].detach().float().cpu()


def from_labels(length: int, table: Tensor, tokenizer: Tokenizer, labels: list[str], generator: torch.Generator | None = None) -> Tensor:
    """One vector for each class label, the mean of its tokens' embeddings; sampled vocabulary fills the rest, extra labels are dropped."""
    if len(labels) > length:
        warnings.warn(f"{len(labels)} labels for a prompt of {length}: the last {len(labels) - length} are left out")
    rows = [table[token_ids(tokenizer, label)].detach().float().mean(0).cpu() for label in labels[:length]]
    return torch.cat([torch.stack(rows), from_vocab(length - len(rows), table, generator=generator)]) if rows else from_vocab(length, table, generator=generator)


def from_text(length: int, table: Tensor, tokenizer: Tokenizer, text: str, generator: torch.Generator | None = None) -> Tensor:
    """Token i of the text in slot i; sampled vocabulary fills the rest, a longer text is cut."""
    ids = token_ids(tokenizer, text)[:length]
    return torch.cat([table[ids].detach().float().cpu(), from_vocab(length - len(ids), table, generator=generator)])


def from_file(length: int, table: Tensor, path: str | Path) -> Tensor:
    """The vectors of a stored soft prompt's folder; their shape must be (length, C)."""
    tensors = read_tensors(path, "adapter_model")
    if set(tensors) != {"prompt_embeddings"}:
        raise ValueError(f"{path}: not a soft prompt (its tensors: {', '.join(sorted(tensors)[:3])})")
    vectors = tensors["prompt_embeddings"]
    if tuple(vectors.shape) != (length, table.shape[1]):
        raise ValueError(f"{path}: the prompt is {tuple(vectors.shape)}, not {(length, table.shape[1])}")
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
    folder, tensors = Path(folder), {name: p.detach().cpu().contiguous() for name, p in adapter.named_parameters()}
    config = {"base_model_name_or_path": None, "fingerprint": lm.fingerprint()} | info
    if isinstance(adapter, SoftPrompt):
        tensors = {"prompt_embeddings": tensors["vectors"]}
        config |= {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": len(adapter.vectors), "placement": "before_bos"}
        config |= {"num_transformer_submodules": 1, "num_attention_heads": lm.config.n_heads, "num_layers": lm.config.n_layers}
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
        raise FileNotFoundError(f"{folder}: no adapter_config.json, so there is no trained adapter in this folder")
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
        warnings.warn(f"{folder}: carries no fingerprint, so whether it belongs to this LM is not checked")
    elif stored != lm.fingerprint():
        raise ValueError(f"{folder}: was trained on another base (fingerprint {str(stored)[:12]}..., this LM's is {lm.fingerprint()[:12]}...)")
    if config.get("token_dim", lm.config.dim) != lm.config.dim:
        raise ValueError(f"{folder}: made for an LM of width {config['token_dim']}, this one's is {lm.config.dim}")
    if config["peft_type"] == "PROMPT_TUNING":
        if config.get("placement", "before_bos") != "before_bos":
            raise ValueError(f"{folder}: placement {config['placement']!r} is not supported (only 'before_bos')")
        adapter = SoftPrompt(from_file(config.get("num_virtual_tokens", 0), lm.embedding.weight, folder))
    elif config["peft_type"] == "CONNECTOR":
        layers = config.get("connector_layers")
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"{folder}: connector_layers is {layers!r}, not a number of layers")
        adapter = Connector(lm.new_layers(layers))
        expected = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        wrong = [n for n in expected.keys() | tensors.keys() if n not in expected or n not in tensors or tuple(tensors[n].shape) != expected[n]]
        if wrong:
            raise ValueError(f"{folder}: the tensor {min(wrong)} is missing, unexpected or misshapen for this LM")
        adapter.load_state_dict(tensors)
    else:
        raise ValueError(f"{folder}: peft_type {config['peft_type']!r} is not supported; supported: PROMPT_TUNING, CONNECTOR")
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
