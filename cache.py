"""KV caches of decoding, extended in place, and what the samples of a question share.

    Buffered     has space for the tokens that follow, so that a step copies no earlier ones
    SampleCache  also keeps and reads the keys and values of a question once for all its samples
    Steps        the steps of decoding behind such a cache
    inverse_cdf  draws their tokens; samples that agree so far share one softmax

n samples of a question attend to the same P positions and to t new ones each. With a cache of its
own for each sample a step reads n (P + t) keys, and here P + n t. The scores of the question's keys
are one product of matrices for all of its samples. (Bifurcated attention, Athiwaratkun et al. 2024;
Hydragen, Juravsky et al. 2024.)

    steps = Steps(lm, cache, index, more, n)    row i continues row index[i] of a model.Prefix
    logits = steps(token)                       (R, 1) -> (R, V)
    steps.keep(index)                           row i now continues what row index[i] was

generate.decode uses it, or on a GPU replay.py, which has the same calls. Needs torch and model.py.
Dimensions as in model.py; Q questions, and R rows that continue them.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model import KV, Prefix


@dataclass
class Buffered(Prefix):
    """A KV cache whose `layers` are the first rows and positions of larger tensors, `buffer`."""

    buffer: list[KV] = field(default_factory=list)

    @classmethod
    def of(cls, cache: Prefix) -> "Buffered":
        """The same cache, as yet without a buffer: `preallocate` makes it."""
        return cls(cache.layers, cache.lengths)

    def joined(self, i: int, k: Tensor, v: Tensor) -> KV:
        """Writes k, v (R, K, T, D) behind layer i. Returns all of its positions."""
        R, P, T, pair = len(k), self.layers[i][0].shape[2], k.shape[2], self.buffer[i]
        if R != self.rows or P + T > pair[0].shape[2]:  # slices would not say so
            raise ValueError(f"{R} rows of {P} + {T} positions do not fit the cache's buffer")
        for whole, new in zip(pair, (k, v)):
            whole[:R, :, P : P + T] = new
        return tuple(whole[:R, :, : P + T] for whole in pair)

    def preallocate(self, index: Tensor, more: int = 0, rows: int = 0) -> "Buffered":
        """Rows `index` (R,) in a buffer of `rows` rows with `more` free positions. If there is a
        buffer already, only rows that move are copied. What is written into it replaces what
        another continuation of the same cache wrote there."""
        _, K, P, D = self.layers[0][0].shape
        R, moved = len(index), slice(len(index))
        if self.buffer:
            moved = (index != torch.arange(R, device=index.device)).nonzero()[:, 0]
        buffer = self.buffer or [
            tuple(t.new_empty(rows, K, P + more, D) for t in kv) for kv in self.layers
        ]
        for pair, old in zip(buffer, self.layers):
            for whole, t in zip(pair, old):
                whole[moved, :, :P] = t[index[moved] % len(t)]
        lengths = None if self.lengths is None else self.lengths[index % len(self.lengths)]
        layers = [(k[:R, :, :P], v[:R, :, :P]) for k, v in buffer]
        return replace(self, layers=layers, lengths=lengths, buffer=buffer)


@dataclass
class SampleCache(Buffered):
    """A KV cache whose rows share the keys and values of their questions. `layers` hold what each
    row has of its own, and `lengths` counts both. It takes one token of each row at a time.

    questions  per layer the keys and values of Q questions, each (Q, K, P, D)
    width      the number of rows of the question that has most
    place      (R,): the rows of question q have places from q * width on. A question with fewer
               rows leaves places free, and its keys meet queries of zeros there.
    """

    questions: list[KV] = field(default_factory=list)
    place: Tensor | None = None
    width: int = 1

    def refuse(self, *_):
        """ValueError: the method of Prefix would forget the questions."""
        raise ValueError("the rows of a SampleCache cannot be selected, moved or saved")

    select = drop_padding = save = refuse

    @classmethod
    def of(cls, cache: Prefix) -> "SampleCache":
        """Every row of a cache as a question, and as the one row that continues it so far."""
        empty = [tuple(t[:, :, :0] for t in pair) for pair in cache.layers]
        place = torch.arange(cache.rows, device=cache.layers[0][0].device)
        return cls(empty, cache.lengths, questions=cache.layers, place=place)

    @property
    def size(self) -> int:
        """P + t."""
        return self.questions[0][0].shape[2] + self.layers[0][0].shape[2]

    def preallocate(self, index: Tensor, more: int = 0, rows: int = 0) -> "SampleCache":
        """As in Buffered. If at least half of the questions have no row left, these are dropped."""
        question, questions = self.place[index] // self.width, self.questions
        continued = question.unique()
        if 2 * len(continued) <= len(questions[0][0]):
            questions = [tuple(t[continued] for t in pair) for pair in questions]
            question = torch.searchsorted(continued, question)
        place, width = side_by_side(question, len(questions[0][0]))
        moved = super().preallocate(index, more, rows)
        return replace(moved, questions=questions, place=place, width=width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: KV, lengths=None, window=None):
        """model.attend for one token of each row, in place of the LM's own. q (R, H, 1, D), k and v
        (R, K, t, D) of the rows, past (Q, K, P, D) of the questions. Returns (R, H, 1, D). The
        scores have the dtype of the keys: in bf16 they are rounded before their softmax."""
        (R, H, T, D), K, (Q, _, P, _) = q.shape, k.shape[1], past[0].shape
        if T != 1:
            raise ValueError(f"a SampleCache takes one token of each row, not {T}")

        def by_question(x: Tensor) -> Tensor:  # (R, K, G, W) -> (Q, K, width * G, W)
            places = x.new_zeros(Q * self.width, *x.shape[1:])
            places[self.place] = x
            return places.unflatten(0, (Q, self.width)).transpose(1, 2).flatten(2, 3)

        def by_row(x: Tensor) -> Tensor:  # and back
            return x.unflatten(2, (self.width, H // K)).transpose(1, 2).flatten(0, 1)[self.place]

        q = (q * D**-0.5).view(R, K, H // K, D)  # the G = H / K queries of a key head side by side
        scores = torch.cat([by_row(by_question(q) @ past[0].mT), q @ k.mT], -1)  # (R, K, G, P + t)
        age = torch.arange(scores.shape[-1] - 1, -1, -1, device=q.device)  # of a key: 0 is the last
        if lengths is not None:
            scores = scores.masked_fill((age > lengths[:, None])[:, None, None], -torch.inf)
        if window is not None:
            scores = scores.masked_fill(age >= window, -torch.inf)
        weights = scores.softmax(-1).to(v.dtype)
        y = by_row(by_question(weights[..., :P]) @ past[1]) + weights[..., P:] @ v
        return y.reshape(R, H, 1, D)


class Steps:
    """The steps of decoding behind rows `index` (R,) of a cache, for at most `more` tokens. A row
    of the cache is a question, and at most n rows continue it."""

    def __init__(self, lm, cache: Prefix, index: Tensor, more: int, n: int = 1):
        self.lm, rows = lm, n * cache.rows
        cache = SampleCache.of(cache) if n > 1 else Buffered.of(cache)
        self.cache = cache.preallocate(index, more, rows)

    def keep(self, index: Tensor) -> None:
        """Row i now continues what row index[i] was."""
        if not torch.equal(index, torch.arange(self.cache.rows, device=index.device)):
            self.cache = self.cache.preallocate(index)

    def __call__(self, token: Tensor) -> Tensor:
        """token (R, 1) -> logits (R, V)."""
        h, self.cache = self.lm(self.lm.embed(token), self.cache, keep=True)
        return self.lm.logits(h[:, -1])


def side_by_side(group: Tensor, count: int) -> tuple[Tensor, int]:
    """The places (R,) of rows in a grid with a line for each of `count` groups, and its width: the
    rows of the largest group. group (R,): the group of each row."""
    counts = group.bincount(minlength=count)
    order = group.argsort(stable=True)
    column = torch.empty_like(group)
    column[order] = torch.arange(len(group), device=group.device)
    column -= (counts.cumsum(0) - counts)[group]
    width = int(counts.max())
    return group * width + column, width


def inverse_cdf(logits: Tensor, row: Tensor, u: Tensor) -> Tensor:
    """The token (S,) at which the cumulative probability of logits[row] passes u (S,) in [0, 1).

    logits is (R, V); row (S,) says which of its rows each number belongs to. ValueError if logits
    are not finite.
    """
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    if not total.isfinite().all():
        raise ValueError("logits that are not finite")
    place, width = side_by_side(row, len(cdf))
    numbers = u.new_zeros(len(cdf) * width)
    numbers[place] = u
    found = torch.searchsorted(cdf, numbers.view(-1, width) * total, right=True)
    return found.flatten()[place]
