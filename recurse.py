"""LM recursion: compositions of passes through one frozen LM, with the LM's own interface.

Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 4.2 (neural
recursion). The last hidden states of a first pass, "before translation into the vocabulary", go
through a small trained Connector. The Connector's output enters the first layer of a second pass
in place of the embeddings.

    neural recursion   lm(connector(lm(lm.embed(ids))))
    LM-Connector       connector(lm(lm.embed(ids)))      one pass; the Connector comes after it
    Connector-LM       lm(connector(lm.embed(ids)))      one pass; the Connector comes before it
    training-free      lm(rescale(lm(lm.embed(ids))))    no Connector; the second pass reads the
                                                         first one's output at the embeddings' scale

Every composition can end its questions with a Pause: Paused(model, pause).

A Stack generates like an LM: every new token runs through all its parts, and every part has its own
KV cache. Needs adapters.py and generate.py; the caller passes the LM.

    python train.py --method neural_recursion      trains one on the embedded world
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from adapters import Connector, Connectors, Pause, rms
from generate import pad


@dataclass
class StackPrefix:
    """The prefixes of all parts of a Stack, with those methods of Prefix that generate.py calls."""

    parts: list  # one Prefix per part, all of the same lengths

    @property
    def size(self) -> int:
        """P, the same in every part."""
        return self.parts[0].size

    @property
    def rows(self) -> int:
        """1 if shared by all rows of the batch, otherwise B."""
        return self.parts[0].rows

    def row_lengths(self, B: int) -> list[int]:
        """The number of prefix positions before each of B rows of text."""
        return self.parts[0].row_lengths(B)

    def select(self, index: Tensor) -> "StackPrefix":
        """Rows `index` (R,) of every part."""
        return StackPrefix([p.select(index) for p in self.parts])

    def preallocate(self, index: Tensor, more: int) -> "StackPrefix":
        """Rows `index` (R,) of every part, in buffers with space for `more` positions."""
        return StackPrefix([p.preallocate(index, more) for p in self.parts])

    def drop_padding(self, padding: Tensor) -> "StackPrefix":
        """Removes the last padding[b] positions of row b in every part."""
        return StackPrefix([p.drop_padding(padding) for p in self.parts])

    @staticmethod
    def stack(prefixes: list["StackPrefix | None"]) -> "StackPrefix | None":
        """Joins prefixes of one row each, one per example. None is an empty prefix."""
        present = [p for p in prefixes if p is not None]
        if not present:
            return None
        stacked = []
        for i, part in enumerate(present[0].parts):
            rows = [None if p is None else p.parts[i] for p in prefixes]
            stacked.append(part.stack(rows))
        return StackPrefix(stacked)


class Stack(nn.Module):
    """Parts in a row, each the LM or a Connector, with the LM's interface.

    Stack(lm, [c]) is LM-Connector-LM and Stack(lm, [c1, c2]) runs the LM three times; `parts` gives
    any other order. If the first part is the frozen LM, autograd records nothing for it, because
    nothing trained comes before it.
    """

    def __init__(self, lm, connectors=(), parts: list[nn.Module] | None = None):
        super().__init__()
        self.config = lm.config
        self.lm = lm
        if parts is None:
            parts = [lm]
            for connector in connectors:
                parts += [connector, lm]
        self.parts = nn.ModuleList(parts)

    def after_first(self) -> "Stack":
        """The parts after the first, which read its output instead of embeddings."""
        return Stack(self.lm, parts=list(self.parts)[1:])

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C), what the first part reads."""
        return self.lm.embed(ids)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        return self.lm.logits(h)

    def forward(self, x: Tensor, prefix: StackPrefix | None = None, keep: bool = False):
        """x (B, T, C) -> (B, T, C) through every part.

        With keep it returns (output, every part's prefix extended by what that part read).
        """
        extended = []
        for i, part in enumerate(self.parts):
            x = part(x, None if prefix is None else prefix.parts[i], keep)
            if keep:
                x, part_prefix = x
                extended.append(part_prefix)
        return (x, StackPrefix(extended)) if keep else x

    def read(self, x: Tensor, prefix: StackPrefix | None = None, lengths: Tensor | None = None):
        """The StackPrefix after x (T, C) or (B, T, C); lengths (B,) as in LM.read."""
        x = x[None] if x.dim() == 2 else x
        _, extended = self(x, prefix, keep=True)
        if lengths is None:
            return extended
        return extended.drop_padding(x.shape[1] - lengths.to(x.device))


class Paused(nn.Module):
    """A model, with the LM's interface, whose questions end with a Pause.

    generate.prepare appends `pause_text` to a question and `pause_ids` to its tokens. These ids lie
    beyond the vocabulary: they are read as the pause's trained vectors, and never predicted.
    """

    def __init__(self, model, pause: Pause):
        super().__init__()
        self.model, self.pause, self.pause_text = model, pause, pause.text
        V, k = model.config.vocab_size, 0 if pause.vectors is None else len(pause.vectors)
        self.pause_ids = list(range(V, V + k))
        self.config = replace(model.config, vocab_size=V + k)  # of what can be read

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        V, vectors = self.model.config.vocab_size, self.pause.vectors
        if vectors is None:
            return self.model.embed(ids)
        x = self.model.embed(ids.clamp(max=V - 1))
        return torch.where((ids >= V)[..., None], vectors[(ids - V).clamp(min=0)].to(x.dtype), x)

    def forward(self, x: Tensor, prefix=None, keep: bool = False):
        """As the model's."""
        return self.model(x, prefix, keep)

    def read(self, x: Tensor, prefix=None, lengths: Tensor | None = None):
        """As the model's."""
        return self.model.read(x, prefix, lengths)

    def logits(self, h: Tensor) -> Tensor:
        """As the model's: (..., C) -> (..., V), without the pause's ids."""
        return self.model.logits(h)


class Reread(nn.Module):
    """A pass over hidden states at the embeddings' root mean square: the loop without training."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.scale = lm, rms(lm.embed_tokens.weight)

    def forward(self, h: Tensor, prefix=None, keep: bool = False):
        """h (B, T, C) -> (B, T, C), and with keep the extended Prefix, as in LM.forward."""
        return self.lm(self.scale * F.rms_norm(h, h.shape[-1:]), prefix, keep)


class FirstPass:
    """The frozen LM's last hidden states of the training texts, computed once and kept.

    A first pass reads the same tokens in every epoch and nothing trained comes before it. The texts
    are read in batches that depend on the texts alone, so a resumed run gets the same bits. Other
    batches would pad and round differently: the states are those of a first pass inside the step
    to float32 rounding.
    """

    def __init__(self, lm, texts: list[list[int]], batch_size: int = 32):
        self.lm, self.texts, self.batch_size = lm, texts, batch_size
        lengths = torch.tensor([len(text) for text in texts])
        self.starts = lengths.cumsum(0) - lengths  # of each text in `states`
        self.positions = int(lengths.sum())
        self.states = None  # (positions, C)

    @torch.no_grad()
    def compute(self) -> None:
        """Read every text, the shortest first."""
        device = self.lm.embed_tokens.weight.device
        order = sorted(range(len(self.texts)), key=lambda row: len(self.texts[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids, lengths = pad([self.texts[row] for row in rows], device)
            h = self.lm(self.lm.embed(ids))
            if self.states is None:
                self.states = h.new_empty(self.positions, h.shape[-1])
            for row, states, length in zip(rows, h, lengths.tolist()):
                first = self.starts[row]
                self.states[first : first + length] = states[:length]
        self.starts = self.starts.to(device)

    def __call__(self, rows: list[int], T: int) -> Tensor:
        """The states of the texts `rows` as (B, T, C). Beyond a text's end they are of others."""
        if self.states is None:
            self.compute()
        index = self.starts[rows][:, None] + torch.arange(T, device=self.starts.device)
        return self.states[index.clamp(max=self.positions - 1)]


# method: a function (lm, adapter) -> (model with the LM's interface, prefix of every text or None)
COMPOSITIONS = {
    "fine_tuning": lambda lm, _: (lm, None),
    "prompt_tuning": lambda lm, prompt: (lm, lm.read(prompt())),
    "neural_recursion": lambda lm, connector: (Stack(lm, gaps(connector)), None),
    "lm_connector": lambda lm, connector: (Stack(lm, parts=[lm, connector]), None),
    "connector_lm": lambda lm, connector: (Stack(lm, parts=[connector, lm]), None),
    "training_free": lambda lm, _: (Stack(lm, parts=[lm, Reread(lm)]), None),
}
CONNECTOR_METHODS = ("neural_recursion", "lm_connector", "connector_lm")


def compose(method: str, lm, adapter, pause: Pause | None = None):
    """(model, prefix) of COMPOSITIONS, whose questions end with the pause, if there is one."""
    model, prefix = COMPOSITIONS[method](lm, adapter)
    return (model if pause is None else Paused(model, pause)), prefix


def gaps(connector: Connector | Connectors) -> list[Connector]:
    """The Connector of each gap between the passes of a neural recursion."""
    return connector.gaps() if isinstance(connector, Connectors) else [connector]


def between_passes(
    passes: int, shared: bool, start: Callable[[], Connector]
) -> Connector | Connectors:
    """What stands between `passes` passes: a shared Connector, or one for each gap.

    start() returns a new Connector. Two passes have one gap, and get a plain Connector.
    """
    if passes == 2:
        return start()
    count = 1 if shared else passes - 1
    return Connectors([start() for _ in range(count)], passes)


def new_connector(lm, method: str, layers: int) -> Connector:
    """A freshly initialised Connector for one of CONNECTOR_METHODS.

    Its output replaces token embeddings, so it starts at their root mean square. In LM-Connector it
    replaces the LM's final hidden states, whose root mean square is about the final norm's gain.
    """
    reference = lm.norm.weight if method == "lm_connector" else lm.embed_tokens.weight
    return Connector(lm.new_layers(layers), rms(reference))
