"""Filler after every question: positions at which the layers can work before the answer begins.

    Pause     k positions, a text or trained vectors
    Paused    a model, with the LM's interface, whose questions end with a Pause

It is not in the paper. Needs torch and data.py; the caller passes the model. Saving and loading
need checkpoints.py.

    python train.py --method neural_recursion --pause 4 --pause-text trained
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import data


class Pause(nn.Module):
    """k positions of filler after every question: a text, or k trained vectors (k, C).

    Paused lets a model read them. With more than one pass, what the first pass knows only at the
    question's end can then be used by the second at positions of its own.
    """

    def __init__(self, text: str = "", vectors: Tensor | None = None):
        super().__init__()
        self.text = text  # appended to the question before it is tokenised
        self.vectors = None if vectors is None else nn.Parameter(vectors.detach().clone().float())


class Paused(nn.Module):
    """A model, with the LM's interface, whose questions end with a Pause.

    questions.prepare appends `pause_text` to a question and `pause_ids` to its tokens. These ids
    lie beyond the vocabulary: they are read as the pause's trained vectors, and never predicted.
    """

    def __init__(self, model, pause: Pause):
        super().__init__()
        self.model, self.pause, self.pause_text = model, pause, pause.text
        V, k = model.config.vocab_size, 0 if pause.vectors is None else len(pause.vectors)
        self.pause_ids = list(range(V, V + k))
        self.config = replace(model.config, vocab_size=V + k)  # of what can be read

    @property
    def lm(self):
        """The LM that the model is, or that it is built around."""
        return getattr(self.model, "lm", self.model)

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


def with_pause(model, pause: Pause | None):
    """The model, whose questions end with the pause if there is one."""
    return model if pause is None else Paused(model, pause)


def without_pause(model):
    """The model whose questions a Paused ends, or the model itself if it is none."""
    return model.model if isinstance(model, Paused) else model


def tokenize_paused(examples, tokenizer, config, left: int, text: str, k: int) -> list:
    """data.tokenize of questions that end with a pause, as `pause_parts` returns it.

    left  positions that the prompt and the k trained vectors leave of the context
    """
    eos, V = config.eos[0] if config.eos else None, config.vocab_size
    paused = [replace(e, input=e.input + text) for e in examples]
    rows = data.tokenize(paused, tokenizer, eos, left, V)
    return [replace(row, input=row.input + list(range(V, V + k))) for row in rows]


def pause_parts(count: int, text: str) -> tuple[str, int]:
    """What --pause and --pause-text mean: (the text, the number of trained vectors) that follow
    every question. The two letters \\n in `text` stand for a newline."""
    return ("", count) if text == "trained" else (text.replace("\\n", "\n") * count, 0)


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
