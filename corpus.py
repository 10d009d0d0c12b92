"""Text of any size as a file of tokens, which is read from the disk as it is needed.

    corpus = token_file("text.jsonl", tokenizer, vocab_size, "runs/tokens")

The text is read, tokenised and written in parts of 32 documents, so 1 GB of it takes no more
memory than 1 MB. (A line must fit in memory a few times.) The file's name is a hash of the text,
the tokenizer and the vocabulary: the next run that reads the same finds it. Delete the folder to
have its space back.

    HASH.tokens   the tokens, end to end: two bytes each if the vocabulary allows it, else four
    HASH.starts   eight bytes each: where every document starts, and the end

pretrain.py reads --train and --dev in this way. Needs data.py, questions.py, checkpoints.py,
parallel.py and show.py.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from show import show

import numpy as np
from tokenizers import Tokenizer

import data
import parallel
from checkpoints import atomic_write
from questions import hash_tokenizer


def token_file(
    path: str | Path, tokenizer: Tokenizer, vocab_size: int | None, folder: str | Path
) -> data.Corpus:
    """The tokens of a file of text, from `folder` if they are there already, else written to it.

    Errors are those of data.read_texts and data.encode_texts, and nothing is left then.
    """
    name = cache_name(path, tokenizer, vocab_size)
    tokens, starts = (Path(folder) / f"{name}.{what}" for what in ("tokens", "starts"))
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.int32)
    if tokens.is_file() and starts.is_file() and is_whole(tokens, starts, dtype):
        show(f"{path}: its tokens are in {tokens}")
    elif parallel.first():
        write_tokens(path, tokenizer, vocab_size, tokens, starts, dtype)
    parallel.wait()
    stored = np.memmap(tokens, dtype, mode="r")
    return data.Corpus(stored, np.fromfile(starts, np.int64))


def is_whole(tokens: Path, starts: Path, dtype) -> bool:
    """Whether the tokens are as many as the starts say. An earlier program chose other types."""
    return tokens.stat().st_size == dtype.itemsize * np.fromfile(starts, np.int64)[-1]


def cache_name(path: str | Path, tokenizer: Tokenizer, vocab_size: int | None) -> str:
    """Hex SHA-256 of what the tokens depend on."""
    with open(path, "rb") as file:
        text = hashlib.file_digest(file, "sha256").hexdigest()
    is_txt = Path(path).suffix.lower() == ".txt"
    known = [text, is_txt, data.LETTERS, hash_tokenizer(tokenizer), vocab_size]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def write_tokens(path, tokenizer, vocab_size, tokens: Path, starts: Path, dtype) -> None:
    """Tokenise a file of text into the two files. Both appear when they are complete."""
    from tqdm import tqdm

    size, end = Path(path).stat().st_size, 0
    show(f"{path}: tokenising {size / 1e6:,.1f} MB into {tokens}")
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def texts() -> Iterator[str]:
        for text in data.read_texts(path):
            bar.update(len(text))  # letters, of which some have several bytes
            yield text

    tokens.parent.mkdir(parents=True, exist_ok=True)
    try:
        with bar, atomic_write(tokens) as first, atomic_write(starts) as second:
            with open(first, "wb") as ids, open(second, "wb") as ends:
                np.zeros(1, np.int64).tofile(ends)
                for part, lengths in data.encode_parts(texts(), tokenizer, vocab_size):
                    part.astype(dtype).tofile(ids)
                    (end + np.cumsum(lengths)).tofile(ends)
                    end += len(part)
    finally:
        with suppress(OSError):  # a refused text leaves no empty folder
            tokens.parent.rmdir()


def split(corpus: data.Corpus, count: int) -> tuple[data.Corpus, data.Corpus]:
    """All documents but the last `count`, and these. The tokens are not copied."""
    cut = len(corpus.starts) - 1 - count
    middle = corpus.starts[cut]
    last = data.Corpus(corpus.tokens[middle:], corpus.starts[cut:] - middle)
    return data.Corpus(corpus.tokens[:middle], corpus.starts[: cut + 1]), last


def hash_tokens(corpora: Iterable[data.Corpus]) -> str:
    """Hex SHA-256 of all tokens as four bytes each, however they are stored."""
    digest = hashlib.sha256()
    for corpus in corpora:
        for start in range(0, len(corpus.tokens), 2**20):
            digest.update(corpus.tokens[start : start + 2**20].astype(np.int32).tobytes())
    return digest.hexdigest()
