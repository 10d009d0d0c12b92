"""Retrieval: the passages that may answer a question, by its words, by its meaning, or by both.

    bm25 = BM25(passages)                                    words            Robertson 2009
    index = DenseIndex(dual.encode_passages(passages))       inner product    Karpukhin et al. 2020
    found = hybrid(index.search(v, 1000), bm25.search(question, 1000), weight)   Ram et al. 2022

A search returns [(row of the passage, score)], best first. A passage is a pair (title, text), a
dict with these keys, or a text. Indexes are saved with a hash of their passages and are
memory-mapped when they are loaded.

Needs rerank.py, torch, numpy and tqdm; checkpoints.py and families.py to load and save encoders.
"""

import hashlib
import json
import os
import re
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rerank import Bert, as_pair, length_batches, pad, progress, tokenise

Found = list[tuple[int, float]]  # (row of the passage, score), best first
POOLINGS = ("cls", "mean")  # of a dual encoder

# BM25

STOP_WORDS = frozenset(  # Lucene's, and the s of a possessive
    "a an and are as at be but by for if in into is it no not of on or s such that the their then "
    "there these they this to was will with".split()
)


BLOCK = 2**17  # passages whose words are sorted at once


def split_words(text: str) -> list[str]:
    """The lower-case words of a text without stop words. There is no stemming."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]


class BM25:
    """Retrieval by the words that a question shares with passages (Robertson and Zaragoza 2009).

    A word of the question adds to the score of a passage that holds it tf times

        ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))

    where df of the N passages hold the word. It is Lucene's formula, and k1 and b are Anserini's.
    The summands do not depend on the question and are computed once. Those of word v lie in
    rows[starts[v] : starts[v + 1]], the passages, and in the same places of scores.

    Beside the passages and the vocabulary, an index takes 8 bytes for each different word of a
    passage, and 20 while it is made from many blocks. For the 21 million passages of DPR's
    Wikipedia that is about 9 and 24 GB.

    ValueError if there are no passages or one is empty. `tokenize` splits a text into words.
    """

    def __init__(
        self,
        passages: Sequence,
        k1: float = 0.9,
        b: float = 0.4,
        tokenize: Callable[[str], list[str]] = split_words,
    ):
        self.hash, self.count, self.tokenize = hash_passages(passages), len(passages), tokenize
        numbers = defaultdict()
        numbers.default_factory = numbers.__len__  # a new word gets the next number
        blocks, lengths, left = [], np.empty(self.count), iter(progress(passages, "passages"))
        for first in range(0, self.count, BLOCK):
            ids, sizes = array("q"), []
            for passage in islice(left, BLOCK):
                words = tokenize(" ".join(as_pair(passage)))
                ids.extend(map(numbers.__getitem__, words))
                sizes.append(len(words))
            lengths[first : first + BLOCK], n = sizes, len(sizes)
            pairs = np.array(ids, np.int64) * n + np.repeat(np.arange(n), sizes)
            pairs, tf = np.unique(pairs, return_counts=True)  # by word, then by passage
            word, row = np.divmod(pairs, n)
            blocks.append([part.astype(np.int32) for part in (word, first + row, tf)])
        df = sum(np.bincount(word, minlength=len(numbers)) for word, _, _ in blocks)
        if not len(df):
            raise ValueError("the passages hold no words to search for")
        idf = np.log1p((self.count - df + 0.5) / (df + 0.5))
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        self.words, self.starts = dict(numbers), np.concatenate([[0], df.cumsum()])
        self.rows = np.empty(self.starts[-1], np.int32)
        self.scores = np.empty(self.starts[-1], np.float32)
        free = self.starts[:-1].copy()  # where the next passage with a word goes
        while blocks:
            word, row, tf = blocks.pop(0)
            held = np.bincount(word, minlength=len(df))
            place = (free - held.cumsum() + held)[word] + np.arange(len(word))
            self.rows[place], self.scores[place] = row, idf[word] * tf / (tf + norm[row])
            free += held

    def search(self, question: str, k: int = 100) -> Found:
        """Return [(row of the passage, score)], the k best, best first, equal scores by row.

        Passages without a word of the question are left out. ValueError if k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        counts = Counter(self.words[w] for w in self.tokenize(question) if w in self.words)
        total, touched = np.zeros(self.count, np.float32), [np.empty(0, np.int32)]
        for word, times in counts.items():
            span = slice(self.starts[word], self.starts[word + 1])
            total[self.rows[span]] += self.scores[span] * np.float32(times)
            touched.append(self.rows[span])
        rows = np.concatenate(touched)
        # A passage occurs at most once per word, so the k best are among the k * words highest.
        if (limit := k * len(counts)) < len(rows):
            found = total[rows]
            rows = rows[found >= np.partition(found, -limit)[-limit]]
        rows = np.unique(rows)
        rows = rows[np.argsort(-total[rows], kind="stable")[:k]]
        return list(zip(rows.tolist(), total[rows].tolist()))

    def save(self, folder: str | Path) -> None:
        """Write the index. FileExistsError if the folder exists."""
        arrays = {"starts": self.starts, "rows": self.rows, "scores": self.scores}
        save_index(folder, self.hash, arrays, {"words": list(self.words)})

    @classmethod
    def load(cls, folder: str | Path, passages, tokenize=split_words) -> "BM25":
        """Load a saved index, memory-mapped. `tokenize` must be the function it was made with.

        FileNotFoundError or ValueError if a file is missing, corrupt, or of other passages.
        """
        bm25 = cls.__new__(cls)
        bm25.hash, bm25.count, bm25.tokenize = hash_passages(passages), len(passages), tokenize
        info, arrays = load_index(folder, bm25.hash, ("starts", "rows", "scores"))
        bm25.words = {word: number for number, word in enumerate(info["words"])}
        vars(bm25).update(arrays)
        return bm25


def hash_passages(passages: Sequence) -> str:
    """Return the SHA-256 of titles and texts. ValueError if there are none or one is empty."""
    digest = hashlib.sha256()
    for row, (title, text) in enumerate(map(as_pair, passages)):
        if not text.strip():
            raise ValueError(f"passage {row} (counted from 0), titled {title!r}, is empty")
        digest.update(f"{len(title)} {len(text)} {title}{text}".encode("utf-8", "surrogatepass"))
    if not passages:
        raise ValueError("there are no passages")
    return digest.hexdigest()


def save_index(folder: str | Path, hash: str, arrays: dict, info: dict) -> None:
    """Write {name: array} as .npy files, and index.json, into a new folder. It appears complete."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    unfinished.mkdir(parents=True)
    for name, values in arrays.items():
        np.save(unfinished / f"{name}.npy", values, allow_pickle=False)
    text = json.dumps({"passages": hash} | info)
    (unfinished / "index.json").write_text(text, encoding="utf-8")
    os.replace(unfinished, folder)


def load_index(folder: str | Path, hash: str, names: Iterable[str]) -> tuple[dict, dict]:
    """Return (index.json, {name: memory-mapped array}). ValueError if `hash` is another."""
    path, arrays = Path(folder) / "index.json", {}
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no index.json, so this is not an index")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["passages"] != hash:
            raise ValueError("an index of other passages; make it again")
        for name in names:
            path = Path(folder) / f"{name}.npy"
            arrays[name] = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except (ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return info, arrays


# Dense


class DualEncoder(nn.Module):
    """DPR (Karpukhin et al. 2020): one vector for a question, one for a passage; two BERTs.

    The score is their inner product. The input is [CLS] question [SEP], or [CLS] title [SEP] text
    [SEP]; an empty title is left out with its [SEP]. All token types are 0, as in DPR. `passage`
    may be the same module as `question`. pooling "cls" takes the state of [CLS], as DPR does.
    "mean" averages the states of all tokens and scales the result to length 1, as published MiniLMs
    do.
    ValueError if `tokenizer` has no [CLS] or [SEP], or pooling is neither.
    """

    def __init__(self, question: Bert, passage: Bert, tokenizer, pooling="cls", max_len: int = 256):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is cls or mean, not {pooling!r}")
        self.question, self.passage = question, passage
        self.tokenizer, self.pooling = tokenizer, pooling
        self.max_len = min(max_len, question.config.max_len, passage.config.max_len)
        self.cls, self.sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        if self.cls is None or self.sep is None:
            raise ValueError("the tokenizer of a dual encoder needs the tokens [CLS] and [SEP]")

    def forward(self, bert: Bert, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, L), lengths (B,) -> vectors (B, C). `bert` is self.question or self.passage."""
        h = bert(ids, lengths, only_first=self.pooling == "cls")
        if self.pooling == "cls":
            return h[:, 0]
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        # The sum has the direction of the mean.
        return F.normalize((h * real[..., None]).sum(1), dim=-1)

    def question_inputs(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each question's input."""
        return [self.layout([], text) for text in tokenise(self.tokenizer, questions)]

    def passage_inputs(self, passages: Sequence) -> list[list[int]]:
        """Return the tokens of each passage's input."""
        titles, texts = (tokenise(self.tokenizer, part) for part in zip(*map(as_pair, passages)))
        return list(map(self.layout, titles, texts))

    def layout(self, title: list[int], text: list[int]) -> list[int]:
        """Return the tokens of an input, at most max_len."""
        ids = [self.cls, *title, self.sep, *text] if title else [self.cls, *text]
        return ids[: self.max_len - 1] + [self.sep]

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Return the vectors of questions, (B, C) float32."""
        return self.encode(self.question, self.question_inputs(questions))

    def encode_passages(self, passages: Sequence) -> np.ndarray:
        """Return the vectors of passages, (N, C) float32."""
        return self.encode(self.passage, self.passage_inputs(passages))

    @torch.no_grad()
    def encode(self, bert: Bert, inputs: list[list[int]]) -> np.ndarray:
        """Encode inputs in batches of similar lengths. Dropout is off meanwhile."""
        vectors = np.empty((len(inputs), bert.config.dim), np.float32)
        device, training = bert.word_embeddings.weight.device, self.training
        size = 4096 * (16 if device.type == "cuda" else 1)  # tokens
        self.eval()
        for rows in progress(length_batches(inputs, size), "batches"):
            ids, lengths = (t.to(device) for t in pad([inputs[row] for row in rows]))
            vectors[rows] = self(bert, ids, lengths).float().cpu().numpy()
        self.train(training)
        return vectors

    @classmethod
    def from_pretrained(cls, question, passage=None, pooling="cls", device="cpu") -> "DualEncoder":
        """Load two published BERTs or DPR encoders, from folders or hub ids; in eval mode.

        Without `passage` one BERT encodes both. FileNotFoundError or ValueError as in
        Bert.from_pretrained.
        """
        from checkpoints import load_tokenizer, resolve

        folder = resolve(question)
        first = Bert.from_pretrained(folder, device)
        second = first if passage is None else Bert.from_pretrained(resolve(passage), device)
        return cls(first, second, load_tokenizer(folder, first.config.vocab_size), pooling).eval()

    def save(self, folder: str | Path) -> None:
        """Write each BERT in the published format: question/ and, if it is another, passage/."""
        from checkpoints import atomic_write

        for name in ("question", "passage") if self.passage is not self.question else ["question"]:
            getattr(self, name).save(Path(folder) / name)
            with atomic_write(Path(folder) / name / "tokenizer.json") as path:
                self.tokenizer.save(str(path))


def retriever_loss(questions: Tensor, passages: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """DPR's loss, summed over questions: minus the log-likelihood of choosing the positive.

    questions (B, C). passages (R, C): the positives and hard negatives of all questions; those of
    the other questions serve as negatives too. targets (B,): the row of each question's positive.
    known (B, R) is True at passages that are known to answer the question, so they are no negatives
    (in DPR they are, if they come with another question).
    """
    with torch.autocast(questions.device.type, enabled=False):  # bf16 is too coarse for a product
        scores = questions.float() @ passages.float().T  # (B, R)
    known = known.scatter(1, targets[:, None], False)
    return F.cross_entropy(scores.masked_fill(known, -torch.inf), targets, reduction="sum")


class DenseIndex:
    """Vectors of passages (N, C), and exact search by inner product."""

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    def search(self, question: np.ndarray, k: int = 100, rows_at_once: int = 1 << 20) -> Found:
        """question (C,) -> the k passages of the largest inner product, equal ones by row.

        ValueError if k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best, scores = np.empty(0, int), np.empty(0, np.float32)
        for start in range(0, len(self.vectors), rows_at_once):
            part = self.vectors[start : start + rows_at_once] @ question
            best = np.concatenate([best, np.arange(start, start + len(part))])
            scores = np.concatenate([scores, part])
            if k < len(scores):
                kept = scores >= np.partition(scores, -k)[-k]
                best, scores = best[kept], scores[kept]
        order = np.argsort(-scores, kind="stable")[:k]
        return list(zip(best[order].tolist(), scores[order].tolist()))

    def save(self, folder: str | Path, passages: Sequence) -> None:
        """Write the index of these passages. FileExistsError if the folder exists."""
        save_index(folder, hash_passages(passages), {"vectors": self.vectors}, {})

    @classmethod
    def load(cls, folder: str | Path, passages: Sequence) -> "DenseIndex":
        """Load a saved index, memory-mapped. Errors as in BM25.load."""
        return cls(load_index(folder, hash_passages(passages), ["vectors"])[1]["vectors"])


# Hybrid


def hybrid(first: Found, second: Found, weight: float) -> Found:
    """Join two searches (Ram et al. 2022): first score + weight * second score, best first.

    A passage that only one search found gets the lowest score of the other. Equal scores are
    sorted by row.
    """
    a, b = dict(first), dict(second)
    low_a, low_b = (min(scores.values(), default=0.0) for scores in (a, b))
    joined = [(row, a.get(row, low_a) + weight * b.get(row, low_b)) for row in a | b]
    return sorted(joined, key=lambda found: (-found[1], found[0]))


def tune_weight(
    firsts: Sequence[Found],
    seconds: Sequence[Found],
    hits: Callable[[int, Found], bool],
    weights: Iterable[float] = range(1, 10),
) -> tuple[float, float]:
    """Choose the weight of `hybrid` on the dev questions. Returns (weight, share of hits).

    hits(i, found) says whether the joined list of question i counts as found, such as when an
    answer is among the first 100. Of equally good weights the first is chosen. Spider's weights
    are 1 to 9. Tune on dev only: the test score of a weight tuned on test means nothing.
    """
    shares = {}
    for weight in weights:
        joined = [hybrid(first, second, weight) for first, second in zip(firsts, seconds)]
        shares[weight] = sum(hits(i, found) for i, found in enumerate(joined)) / len(joined)
    best = max(shares, key=shares.get)  # of equal ones the first
    return best, shares[best]
