"""LM recursion: several passes through one frozen LM, composed so that the result has the LM's own interface.

Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 4.2 (neural recursion): the last
hidden states of a first pass, "before translation into the vocabulary", go through a small trained Connector and into
the first layer of a second pass, past the embedding:

    neural recursion   lm(connector(lm(lm.embed(ids))))
    LM-Connector       connector(lm(lm.embed(ids)))        the same trained layers, one pass: a taller LM
    Connector-LM       lm(connector(lm.embed(ids)))        the same trained layers, one pass: a deeper embedding

A composition decodes token by token like an LM: each new token runs through all passes, each of which has its own cache.
Everything here takes the LM and the Connectors as arguments.

    python train.py --method neural_recursion      trains one on the embedded world
"""

import json
from pathlib import Path

import torch.nn as nn
from torch import Tensor

from adapters import Connector, load_adapter, rms
from model import LM, Prefix, load_tokenizer


class Stack(nn.Module):
    """Passes in a row, with the LM's interface: config, embed, call, read, logits. Its prefix is a tuple, one entry per pass.

    Stack(lm, [c]) is LM-Connector-LM, Stack(lm, [c1, c2]) runs the LM three times; `passes` spells out any other order.
    The frozen first pass receives no trained input, so autograd records nothing for it.
    """

    def __init__(self, lm, connectors: list[nn.Module] = (), passes: list[nn.Module] | None = None):
        super().__init__()
        self.config = lm.config
        self.lm = lm
        self.passes = nn.ModuleList(
            passes or [lm] + [part for connector in connectors for part in (connector, lm)]
        )

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C), what the first pass gets."""
        return self.lm.embed(ids)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        return self.lm.logits(h)

    def forward(self, x: Tensor, prefix: tuple[Prefix, ...] | None = None, keep: bool = False):
        """x (B, T, C) -> (B, T, C) through every pass; with keep, also each pass's prefix extended by what it was given."""
        kept = []
        for i, step in enumerate(self.passes):
            x = step(x, prefix[i] if prefix else None, keep)
            if keep:
                x, extended = x
                kept.append(extended)
        return (x, tuple(kept)) if keep else x

    def read(
        self, x: Tensor, prefix: tuple[Prefix, ...] | None = None, lengths: Tensor | None = None
    ) -> tuple[Prefix, ...]:
        """The prefixes, one per pass, after x (P, C) or (B, P, C); lengths (B,) as in LM.read."""
        x = x[None] if x.dim() == 2 else x
        _, kept = self(x, prefix, keep=True)
        return (
            kept
            if lengths is None
            else tuple(p.trim(x.shape[1] - lengths.to(x.device)) for p in kept)
        )


# Each relative is one line: which passes, in which order. The keys are the methods' names on the command line.
COMPOSITIONS = {
    "neural_recursion": lambda lm, connector: Stack(lm, [connector]),
    "lm_connector": lambda lm, connector: Stack(lm, passes=[lm, connector]),
    "connector_lm": lambda lm, connector: Stack(lm, passes=[connector, lm]),
}


def new_connector(lm, method: str, layers: int) -> Connector:
    """A freshly initialised Connector for one of COMPOSITIONS, its output at the scale of what it replaces:
    token embeddings where the LM reads it, the LM's own last hidden states (whose scale is its final norm's gain) where the vocabulary does."""
    replaced = lm.norm.weight if method == "lm_connector" else lm.embedding.weight
    return Connector(lm.new_layers(layers), rms(replaced))


def compose(method: str, lm, adapter: nn.Module | None):
    """What was trained by `method`, ready to use: (a model with the LM's interface, the prefix that its texts stand behind or None)."""
    if method in COMPOSITIONS:
        return COMPOSITIONS[method](lm, adapter), None
    return lm, None if adapter is None else lm.read(adapter())


def load_run(folder: str | Path, device: str = "cpu"):
    """What a run trained, ready to use: (a model with the LM's interface, its prefix or None, the tokenizer, run.json's record)."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run.json, so this is not a run's folder")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        arguments = record["arguments"]
        method, base, tokenizer = (arguments[key] for key in ("method", "model", "tokenizer"))
        base = Path(base or Path(__file__).parent / "assets" / "lm")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a run record ({error!r})") from None
    if (Path(folder) / "model").is_dir():  # the LM itself was trained
        lm, adapter = LM.from_pretrained(Path(folder) / "model", device), None
        tokenizer = Path(folder) / "model"
    else:
        lm = LM.from_pretrained(base, device)
        adapter = load_adapter(folder, lm).requires_grad_(False)
        tokenizer = tokenizer or lm.folder
        if method == "pretrain_connector":
            method = arguments["composition"]
    return *compose(method, lm, adapter), load_tokenizer(tokenizer, lm.config.vocab_size), record
