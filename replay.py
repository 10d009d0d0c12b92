"""Decoding on a GPU as a CUDA graph: one launch for each token instead of one for every kernel.

A step of decoding runs hundreds of kernels, each of which takes less time than Python needs to
launch it. A CUDA graph records them once and launches all of them together. It reads and writes the
same memory in every step. So the KV cache has its full size from the start, and every row keeps its
place in the batch until all rows are done.

    replayed = Replayed(lm, cache, index, more)     cache: a model.Prefix
    logits = replayed(token)                        (R, 1) -> (R, V)
    replayed.keep(index)                            these rows go on

generate.decode uses it on a GPU, and otherwise cache.Steps. Needs torch and model.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KV, Prefix

RECORDING = 4  # recording a graph takes longer than it saves in so many tokens


def can_replay(lm, new: int) -> bool:
    """Whether a graph can decode `new` tokens, and pays. A window needs keys in order. A sharded LM
    gathers its weights from other processes, which cannot be recorded."""
    sharded = any(hasattr(p, "to_local") for p in lm.parameters())
    return new > RECORDING and not sharded and not any(lm.config.windows)


class SlotPrefix(Prefix):
    """A KV cache of a fixed size for texts of one token, which it takes in place.

    As in every ragged prefix, a row has the last lengths[b] positions. A new one goes before the
    first of them: attention does not mind the order of its keys, unless it has a window.
    """

    @classmethod
    def copy(cls, prefix: Prefix, index: Tensor, more: int) -> "SlotPrefix":
        """Rows `index` (R,) of a prefix, with space for `more` positions."""
        lengths = prefix.lengths
        if lengths is None:
            lengths = torch.full((1,), prefix.size, device=index.device)
        layers = [
            tuple(F.pad(t[index % len(t)], (0, 0, more, 0)) for t in pair) for pair in prefix.layers
        ]
        return cls(layers, lengths[index % len(lengths)])

    def joined(self, i: int, k: Tensor, v: Tensor) -> KV:
        """Writes k, v (R, K, 1, D) into layer i. Returns all of its positions."""
        row = torch.arange(len(k), device=k.device)
        for whole, new in zip(self.layers[i], (k, v)):
            whole[row, :, self.size - 1 - self.lengths] = new[:, :, 0].to(whole.dtype)
        return self.layers[i]


class Replayed:
    """The steps of decoding behind rows `index` (R,) of a cache, for at most `more` tokens.

    lm  model.LM, or recurse.Stack
    """

    def __init__(self, lm, cache: Prefix, index: Tensor, more: int):
        self.lm, self.more, self.calls = lm, more, 0
        self.cache = SlotPrefix.copy(cache, index, more)
        self.slots = torch.arange(len(index), device=index.device)  # of the rows that go on
        self.token = torch.zeros_like(index)[:, None]
        self.logits, self.launch = None, self.step

    def keep(self, index: Tensor) -> None:
        """Only rows `index` go on, in that order. Each at most once."""
        self.slots = self.slots[index]

    def __call__(self, token: Tensor) -> Tensor:
        """token (R, 1) of the rows that go on -> logits (R, V)."""
        if self.calls == self.more:
            raise ValueError("no space is left in the cache for another token")
        if self.calls == 1:  # the first call has compiled all kernels
            self.launch = record(self.step)
        self.token[self.slots] = token
        self.launch()
        self.calls += 1
        return self.logits[self.slots]

    def step(self) -> None:
        """Reads self.token of every slot, and sets self.logits."""
        h, _ = self.lm(self.lm.embed(self.token), self.cache, keep=True)
        self.cache.lengths += 1
        self.logits = self.lm.logits(h[:, -1])


def record(run: Callable) -> Callable:
    """A function that launches the kernels of run() again, all of them at once. Run it once before:
    a first run may compile kernels, which cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
