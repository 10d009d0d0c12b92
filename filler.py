"""Filler behind every question: a text, or trained vectors in place of its tokens.

Goyal et al. 2024, "Think before you speak: Training Language Models With Pause Tokens", put trained
pause tokens behind the question. There the LM is pretrained and tuned with them; here it may be
frozen. `--pause k` puts a text there, k times, and `--pause-trained` as many vectors as this text
has tokens. They start as the embeddings of these tokens, so that a run starts as with the text.

The vectors belong to new tokens in a copy of the tokenizer. So "<filler 0><filler 1>..." is a text
like any other, and whatever reads texts reads it. The LM's logits do not have these tokens, so no
answer has them. The encoder of ID-PT does not read them.

Needs recurse.py, data.py, checkpoints.py and parallel.py.

    filler = Filler.of({"pause": 3, "pause_text": "so", "pause_trained": True}, lm, tokenizer)
    model, prefix = COMPOSITIONS["prompt_tuning"](filler.around(lm), prompt)
    trained = filler.beside(prompt)
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

import parallel
from checkpoints import check_tensors, hash_checkpoint, read_tensors, write_tensors
from data import encode_prompts
from recurse import Around

FILE = "pause.safetensors"  # the vectors, beside an adapter or the folder of a tuned LM


class Filler(nn.Module):
    """What stands behind every question.

    text       the text of it
    tokenizer  turns questions and `text` into tokens
    vectors    (N, C), what the LM reads of the tokens first, first + 1, ..., N of them; None if the
               text is read as any other
    """

    def __init__(self, text: str, tokenizer, vectors: Tensor | None = None, first: int = 0):
        super().__init__()
        self.text, self.tokenizer, self.first = text, tokenizer, first
        self.vectors = None if vectors is None else nn.Parameter(vectors.detach().clone().float())

    @classmethod
    def of(cls, args: dict, lm, tokenizer: Tokenizer) -> "Filler":
        """What the arguments of a run say, with vectors that are not trained yet. \\n in pause_text
        is a newline. ValueError if the text has no tokens, or if none can be added."""
        text = args.get("pause_text", "").replace("\\n", "\n") * args.get("pause", 0)
        if not args.get("pause_trained"):
            return cls(text, tokenizer)
        colon, whole = encode_prompts(tokenizer, [":", f":{text}"])  # a question ends with a colon
        ids = whole[len(colon) :]
        if not ids:
            raise ValueError(f"--pause-trained: --pause-text {text!r} has no tokens")
        names = [f"<filler {i}>" for i in range(len(ids))]
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        last = max(tokenizer.get_vocab().values())
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        first = tokenizer.token_to_id(names[0])
        if first <= last:
            raise ValueError(f"--pause-trained: the tokenizer has the token {first} already")
        table = parallel.whole(lm.embed_tokens.weight)
        return cls("".join(names), tokenizer, table[ids], first)

    def copy(self) -> "Filler":
        """The same filler, with vectors of its own."""
        return Filler(self.text, self.tokenizer, self.vectors, self.first)

    def around(self, lm):
        """The LM as it reads this filler."""
        return lm if self.vectors is None else WithFiller(lm, self)

    def beside(self, trained: nn.Module) -> nn.Module:
        """The adapter or LM `trained`, together with the vectors, if there are any."""
        if self.vectors is None:
            return trained
        return nn.ModuleDict({"adapter": trained, "filler": self})

    def save(self, folder: str | Path, lm) -> None:
        """Write the vectors, if there are any, with the fingerprint of the LM: of folder/model, if
        the run trains the LM itself, or else of `lm`."""
        if self.vectors is not None:
            own = Path(folder) / "model"
            fingerprint = hash_checkpoint(own) if own.is_dir() else lm.fingerprint()
            tensors = {"vectors": self.vectors.detach().cpu()}
            write_tensors(Path(folder) / FILE, tensors, fingerprint=fingerprint)

    def load(self, folder: str | Path, lm) -> "Filler":
        """The same filler with the vectors that `save` wrote.

        FileNotFoundError or ValueError if they are missing, of another number, or of another LM, or
        if there are some and this filler is a text.
        """
        path = Path(folder) / FILE
        if self.vectors is None:
            if path.is_file():
                raise ValueError(
                    f"{folder}: its questions end with trained filler: --pause-trained"
                )
            return self
        found = read_tensors(path, lm.fingerprint())
        check_tensors(found, {"vectors": self.vectors.shape}, path)
        vectors = found["vectors"].to(self.vectors.device)
        return Filler(self.text, self.tokenizer, vectors, self.first)


class WithFiller(Around):
    """An LM that reads trained vectors in place of the embeddings of a Filler's tokens."""

    def __init__(self, lm, filler: Filler):
        super().__init__(lm)
        self.vectors, self.first_filler = filler.vectors, filler.first
        size = max(lm.config.vocab_size, filler.first + len(filler.vectors))
        self.config = replace(lm.config, vocab_size=size)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        index, last = ids - self.first_filler, len(self.vectors) - 1
        own = (index >= 0) & (index <= last)
        x = self.lm.embed(ids.masked_fill(own, 0))
        # F.embedding, because the gradient of an indexed tensor is summed in no fixed order.
        vectors = F.embedding(index.clamp(0, last), self.vectors).to(x.dtype)
        return torch.where(own[..., None], vectors, x)
