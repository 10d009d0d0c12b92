"""Soft prompts and Connectors: what is trained around a frozen LM, its initial values, its files.

    SoftPrompt   P trained vectors in front of the text (Lester et al. 2021, "The Power of Scale for
                 Parameter-Efficient Prompt Tuning"):  lm(lm.embed(ids), prefix=lm.read(prompt()))
    Connector    a few causal layers before, after or between passes through the LM (Levine et al.
                 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 4.2):
                 lm(connector(lm(lm.embed(ids)))) is one of the compositions in recurse.py
    Connectors   what stands between more than two passes: one for all the gaps, or one for each
    Pause        filler after every question, a text or trained vectors: positions at which the
                 layers can work before the answer begins

An adapter is stored as a folder of two files, adapter_config.json and adapter_model.safetensors. A
soft prompt is stored in PEFT's format. The config holds the fingerprint of the LM that the adapter
was trained on; loading checks it.

Needs torch and tokenizers. The caller passes the LM and its layers. Saving and loading need
checkpoints.py and families.py beside this file. Dimensions as in model.py.

    python adapters.py runs/prompt_tuning      prints what an adapter folder holds
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch import Tensor


class SoftPrompt(nn.Module):
    """P trained vectors that the LM reads before the text, like token embeddings: (P, C)."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        if vectors.dim() != 2:
            raise ValueError(f"prompt vectors have shape {tuple(vectors.shape)}, expected (P, C)")
        self.vectors = nn.Parameter(vectors.detach().clone().float())

    def forward(self) -> Tensor:
        return self.vectors


# Initialisers: plain functions that return (P, C). `table` is the LM's embedding table (V, C).
# from_vocab and from_text start at the scale of real tokens. Lester et al. (section 3.2) find that
# sampled vocabulary and class labels beat random vectors.


def random(length: int, table: Tensor, scale: float = 0.5, generator=None) -> Tensor:
    """Uniform in [-scale, scale], as in the paper. (Its released code draws from [0, scale).)

    The default of 0.5 fits T5's large embeddings. train.py keeps it.
    """
    return (torch.rand(length, table.shape[1], generator=generator) * 2 - 1) * scale


def from_vocab(length: int, table: Tensor, population: int = 5000, generator=None) -> Tensor:
    """Embeddings of `length` tokens, sampled without replacement from the first `population` ids.

    Those are the common tokens if the vocabulary is ordered by frequency (SentencePiece) or by
    merges (byte-level BPE). Tokens repeat only if length exceeds the population.
    """
    population = min(population, table.shape[0])
    ids = torch.empty(0, dtype=torch.long)
    while len(ids) < length:
        ids = torch.cat([ids, torch.randperm(population, generator=generator)])
    return table[ids[:length].to(table.device)].detach().float().cpu()


def from_labels(length: int, table: Tensor, tokenizer: Tokenizer, labels, generator=None) -> Tensor:
    """One vector per class label: the mean of its tokens' embeddings.

    Sampled vocabulary fills the rest. Labels beyond `length` are dropped with a warning.
    """
    if len(labels) > length:
        dropped = len(labels) - length
        warnings.warn(
            f"{len(labels)} labels for a prompt of {length}: the last {dropped} are left out",
            stacklevel=2,
        )
    means = []
    for label in labels[:length]:
        ids = token_ids(tokenizer, label, len(table))
        means.append(table[ids].detach().float().mean(0, keepdim=True).cpu())
    rest = from_vocab(length - len(means), table, generator=generator)
    return torch.cat([*means, rest])


def from_text(length: int, table: Tensor, tokenizer: Tokenizer, text, generator=None) -> Tensor:
    """Vector i is the embedding of token i of the text. A longer text is cut, and sampled
    vocabulary follows a shorter one."""
    ids = token_ids(tokenizer, text, len(table))[:length]
    rest = from_vocab(length - len(ids), table, generator=generator)
    return torch.cat([table[ids].detach().float().cpu(), rest])


def from_file(length: int, table: Tensor, path: str | Path) -> Tensor:
    """The vectors of the soft prompt in folder `path`. Their shape must be (length, C)."""
    from checkpoints import read_tensors

    tensors = read_tensors(Path(path) / "adapter_model.safetensors")
    if set(tensors) != {"prompt_embeddings"}:
        names = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path}: not a soft prompt (its tensors: {names})")
    if (Path(path) / "adapter_config.json").is_file():  # another kind may have vectors that fit
        check_kind(path, read_adapter_config(path), ("PROMPT_TUNING", "P_TUNING"))
    vectors = tensors["prompt_embeddings"]
    if tuple(vectors.shape) != (length, table.shape[1]):
        raise ValueError(
            f"{path}: the prompt is {tuple(vectors.shape)}, not {(length, table.shape[1])}"
        )
    return vectors.float()


def token_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """The text's tokens without BOS or EOS. ValueError if there are none or they do not fit."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens")
    if max(ids) >= vocab_size:
        token = tokenizer.id_to_token(max(ids))
        raise ValueError(
            f"the text {text!r} has the token {token!r} with the id {max(ids)}, outside the LM's "
            f"vocabulary of {vocab_size}"
        )
    return ids


class Connector(nn.Module):
    """n layers of the LM's own kind (`lm.new_layers(n)`), then an RMSNorm.

    connector(x, prefix=None, keep=False) is called like the LM: (B, T, C) -> (B, T, C), and with
    keep also its Prefix. The norm's gain starts at `scale`, so that at first the output has the
    root mean square of the vectors that it replaces. Token embeddings are 10 to 100 times smaller
    than hidden states; the frozen LM was not trained on larger inputs.
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


class Connectors(nn.ModuleList):
    """The Connectors between more than two passes: a shared one, or one for each gap."""

    def __init__(self, connectors: list[Connector], passes: int):
        super().__init__(connectors)
        self.passes = passes

    def gaps(self) -> list[Connector]:
        """The Connector of each gap, in order."""
        return [self[i % len(self)] for i in range(self.passes - 1)]


class Pause(nn.Module):
    """k positions of filler after every question: a text, or k trained vectors (k, C).

    recurse.Paused lets a model read them. With more than one pass, what the first pass knows only
    at the question's end can then be used by the second at positions of its own.
    """

    def __init__(self, text: str = "", vectors: Tensor | None = None):
        super().__init__()
        self.text = text  # appended to the question before it is tokenised
        self.vectors = None if vectors is None else nn.Parameter(vectors.detach().clone().float())


def pause_parts(count: int, text: str) -> tuple[str, int]:
    """What --pause and --pause-text mean: (the text, the number of trained vectors) that follow
    every question. The two letters \\n in `text` stand for a newline."""
    return ("", count) if text == "trained" else (text.replace("\\n", "\n") * count, 0)


def rms(vectors: Tensor) -> float:
    """Root mean square over all entries."""
    return vectors.detach().float().square().mean().sqrt().item()


# Files


def save_adapter(folder: str | Path, adapter: nn.Module, lm, **info) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `info` is added to the config."""
    from checkpoints import write_json, write_tensors

    folder = Path(folder)
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter.named_parameters()}
    config = {"base_model_name_or_path": None, "fingerprint": lm.fingerprint()} | info
    if isinstance(adapter, SoftPrompt):
        tensors = {"prompt_embeddings": tensors["vectors"]}
        config |= {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": len(adapter.vectors),
            "placement": "before_bos",
            "num_transformer_submodules": 1,
            "num_attention_heads": lm.config.n_heads,
            "num_layers": lm.config.n_layers,
        }
    elif isinstance(adapter, Connector):
        config |= {"peft_type": "CONNECTOR", "connector_layers": len(adapter.layers)}
    elif isinstance(adapter, Connectors):
        config |= {"peft_type": "CONNECTOR", "connector_layers": len(adapter[0].layers)}
        config |= {"passes": adapter.passes, "connectors": len(adapter)}
    else:
        raise TypeError(f"a {type(adapter).__name__} is not an adapter of this file")
    config |= {"token_dim": lm.config.dim}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


def save_pause(folder: str | Path, pause: Pause | None) -> None:
    """Writes trained vectors to pause.safetensors. A text is in the arguments of the run."""
    from checkpoints import write_tensors

    if pause is not None and pause.vectors is not None:
        vectors = pause.vectors.detach().cpu().contiguous()
        write_tensors(Path(folder) / "pause.safetensors", {"vectors": vectors})


def load_pause(folder: str | Path, count: int, text: str, lm) -> Pause | None:
    """The Pause of the flags --pause and --pause-text, its vectors from `folder`; None without."""
    from checkpoints import check_tensors, read_tensors

    text, k = pause_parts(count, text)
    if k == 0:
        return Pause(text) if text else None
    tensors = read_tensors(Path(folder) / "pause.safetensors")
    check_tensors(tensors, {"vectors": (k, lm.config.dim)}, folder)
    return Pause(vectors=tensors["vectors"]).to(lm.embed_tokens.weight.device)


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json as a dict. FileNotFoundError or ValueError names the file."""
    from checkpoints import read_json

    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter_config.json, so there is no trained adapter in this folder"
        )
    config = read_json(path)
    if "peft_type" not in config:
        raise ValueError(f"{path}: has no key peft_type")
    return config


def load_adapter(folder: str | Path, lm) -> nn.Module:
    """The adapter in `folder`, on the LM's device, trainable.

    ValueError if it was trained on another base or its tensors do not fit. An adapter without a
    fingerprint (PEFT's own) loads with a warning.
    """
    config = read_adapter_config(folder)
    # The kind comes first: the widths of another kind, such as prefix tuning, mean something else.
    check_kind(folder, config, ("PROMPT_TUNING", "CONNECTOR"))
    check_base(folder, config, lm)
    if config["peft_type"] == "CONNECTOR":
        adapter = load_connector(folder, config, lm)
    else:
        adapter = load_soft_prompt(folder, config, lm)
    return adapter.to(lm.embed_tokens.weight.device)


def check_kind(folder: str | Path, config: dict, supported: tuple[str, ...]) -> None:
    """ValueError unless peft_type is one of `supported`."""
    kind = config["peft_type"]
    if kind not in supported:
        raise ValueError(
            f"{folder}: peft_type {kind!r} is not supported; supported: {', '.join(supported)}"
        )


def check_base(folder: str | Path, config: dict, lm) -> None:
    """ValueError if fingerprint or width differ from the LM's; no fingerprint is a warning."""
    stored, dim = config.get("fingerprint"), config.get("token_dim", lm.config.dim)
    if stored is None:
        warnings.warn(
            f"{folder}: carries no fingerprint, so whether it belongs to this LM is not checked",
            stacklevel=3,
        )
    elif stored != lm.fingerprint():
        raise ValueError(
            f"{folder}: was trained on another base "
            f"(fingerprint {str(stored)[:12]}..., this LM's is {lm.fingerprint()[:12]}...)"
        )
    if dim != lm.config.dim:
        raise ValueError(f"{folder}: made for an LM of width {dim}, this one's is {lm.config.dim}")


def load_soft_prompt(folder: str | Path, config: dict, lm) -> SoftPrompt:
    """The prompt that `save_adapter` or PEFT wrote."""
    placement = config.get("placement", "before_bos")
    if placement != "before_bos":
        raise ValueError(f"{folder}: placement {placement!r} is not supported (only 'before_bos')")
    length = config.get("num_virtual_tokens", 0)
    return SoftPrompt(from_file(length, lm.embed_tokens.weight, folder))


def load_connector(folder: str | Path, config: dict, lm) -> Connector | Connectors:
    """What `save_adapter` wrote. ValueError unless its tensors fit this LM."""
    from checkpoints import check_tensors, read_tensors

    n, passes, count = (config.get(k) for k in ("connector_layers", "passes", "connectors"))
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{folder}: connector_layers is {n!r}, not a number of layers")
    if passes is None:
        connector = Connector(lm.new_layers(n))
    else:
        if not isinstance(passes, int) or passes < 3 or count not in (1, passes - 1):
            raise ValueError(f"{folder}: passes is {passes!r} and connectors is {count!r}")
        connector = Connectors([Connector(lm.new_layers(n)) for _ in range(count)], passes)
    found = read_tensors(Path(folder) / "adapter_model.safetensors")
    expected = {name: p.shape for name, p in connector.named_parameters()}
    check_tensors(found, expected, folder)
    connector.load_state_dict(found)
    return connector


def main(argv: list[str] | None = None) -> dict:
    """Prints an adapter folder. Returns its config."""
    parser = argparse.ArgumentParser(description="Print what an adapter folder holds.")
    parser.add_argument("folder")
    parser.error = lambda message: parser.exit(2, f"adapters.py: {message}\n")
    args = parser.parse_args(argv)

    from checkpoints import read_tensors

    config = read_adapter_config(args.folder)
    tensors = read_tensors(Path(args.folder) / "adapter_model.safetensors")
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
