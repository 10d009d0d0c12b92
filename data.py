"""Examples, the files that hold them, their tokens, and the batch of each training step.

A file of examples has one JSON object a line, in one of three forms:

    {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]}                  NQ-open
    {"input": "Is it so?", "target": "no", "options": ["yes", "no"]}                     ours
    {"inputs_pretokenized": ..., "targets_pretokenized": ..., "answer_choices": [...]}   P3

- A question is put into the format of `question_text`. An input is used as it is.
- If an example has options, they all differ. Its target and all its answers are among them, and its
  target is among its answers. So several options may be right.
- A JSON array of questions (DPR) and SQuAD's JSON are read without their passages. This needs
  passages.py and what it needs.
- Every form may have "options" or "answer_choices", "task", "id", "template" and "cluster".
- White space around targets, answers and options is dropped. A key whose value is null is absent.

A file of text has lines of {"text": "..."}, or of examples, or it is a .txt file with blank lines
between documents. Only a newline ends a line. A byte order mark is dropped.

A batch is a pure function of (examples, size, seed, step), where `step` is the number of the batch.
So a resumed run gets the same batches, and no position in the data is saved.

Needs torch, numpy and tokenizers. Only the command's --tokenizer needs checkpoints.py.

    python data.py questions.jsonl --tokenizer assets/lm

prints the number of examples, their tasks, and the first example with its tokens.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

IGNORE_INDEX = -100  # a target without loss, as in torch's cross_entropy

# ----------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One input and the target that training teaches. Evaluation accepts any of `answers`."""

    input: str
    target: str
    answers: tuple[str, ...]
    task: str = ""
    id: str = ""  # unique within task and file; equal to `source` if the record has no id
    source: str = ""  # file:line, for error messages
    options: tuple[str, ...] = ()  # the answer choices; empty if the answer is free text
    template: str = field(default="", repr=False)  # how the task asks, in a suite of prompted tasks
    cluster: str = field(default="", repr=False)  # of similar tasks


P3_KEYS = dict(inputs_pretokenized="input", targets_pretokenized="target", answer_choices="options")
BOM = "\ufeff"  # byte order mark
LETTERS = 2**15  # a longer document counts as several: tokenizers need a hundred bytes a letter
PIECE = re.compile(rf"[\s\S]{{1,{LETTERS}}}(?=\s|\Z)|[\s\S]{{1,{LETTERS}}}")
ONE_VALUE = re.compile(rb'(\xef\xbb\xbf)?\s*(\[|\{\s*("version"[^,]*,\s*)?"data"\s*:\s*\[)')


def question_text(question: str) -> str:
    """Put a question into the one format that this project uses. The answer follows a space."""
    return f"Q: {question.strip().rstrip('?').rstrip()}?\nA:"


def read(path: str | Path) -> list[Example]:
    """Read a file of examples: JSON lines, or the questions of DPR's and SQuAD's JSON.

    FileNotFoundError if there is no such file. ValueError, which names file and line, if a line is
    no example or a pair of task and id occurs twice.
    """
    examples = [parse_record(record, source) for source, record in records(path)]
    if not examples:
        raise ValueError(f"{path}: holds no examples")
    sources = {}  # two runs are compared example by example, found by task and id
    for e in examples:
        if (e.task, e.id) in sources:
            raise ValueError(f"{e.source}: the id {e.id} is taken by {sources[e.task, e.id]}")
        sources[e.task, e.id] = e.source
    return examples


def records(path: str | Path) -> Iterable[tuple[str, dict]]:
    """("file:line", record) of each example. An array (DPR) and SQuAD begin like ONE_VALUE."""
    start = np.fromfile(path, np.uint8, 100).tobytes() if Path(path).is_file() else b""
    if not ONE_VALUE.match(start):
        return json_lines(path)
    from passages import read_questions

    asked = read_questions(path)
    return [(q.source, {"question": q.question, "answer": q.answers, "id": q.id}) for q in asked]


def sample(count: int, limit: int | None, seed: int | list[int]) -> list[int]:
    """Draw `limit` of `count` rows, or all if there are fewer. Returns indices in ascending order.
    None is no limit. A smaller limit draws a part of the same rows. ValueError if it is below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, got {limit}")
    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def parse_record(record: dict, source: str) -> Example:
    """Make an Example of a record in any of the three forms. Error messages begin with `source`."""
    record = _clean(record)
    if "question" in record:
        text, answers = record["question"], record.get("answer", record.get("answers"))
        answers = [answers] if isinstance(answers, str) else answers
        target = answers[0] if isinstance(answers, list) and answers else None
    else:
        text, target = record.get("input"), record.get("target")
        answers = record.get("answers", [target])
    if not _is_text(text):
        keys = "question, input or inputs_pretokenized"
        raise ValueError(f"{source}: needs a text under the key {keys}")
    if not isinstance(answers, list) or not all(map(_is_text, [target, *answers])):
        keys = "answer, or a text under target or targets_pretokenized"
        hint = "(eval.py ask --input needs none)"
        raise ValueError(f"{source}: needs a list of texts under the key {keys} {hint}")
    target, answers = target.strip(), [answer.strip() for answer in answers]
    options = _parse_options(record, source)
    if options:
        _check_among(target, options, f"{source}: the target", "options")
        for answer in answers:
            _check_among(answer, options, f"{source}: the answer", "options")
        _check_among(target, answers or [target], f"{source}: the target", "answers")
    if "question" in record:
        text = question_text(text)
    if target not in answers:
        answers = [target, *answers]
    task, *suite = (str(record.get(key, "")) for key in ("task", "template", "cluster"))
    id = str(record.get("id", source))
    return Example(text, target, tuple(answers), task, id, source, options, *suite)


def _parse_options(record: dict, source: str) -> tuple[str, ...]:
    options = record.get("options") or []
    if not isinstance(options, list) or not all(map(_is_text, options)):
        raise ValueError(f"{source}: needs a list of texts under the key options or answer_choices")
    options = tuple(option.strip() for option in options)
    twice = [option for option in options if options.count(option) > 1]
    if twice:
        raise ValueError(f"{source}: the option {twice[0]!r} occurs twice")
    return options


def _check_among(text: str, others: Sequence[str], what: str, name: str) -> None:
    if text not in others:
        raise ValueError(f"{what} {text!r} is not among the {name} {', '.join(others)}")


def _clean(record: dict) -> dict:
    """Drop the keys that are absent, and rename those of P3."""
    cleaned = {}
    for key, value in record.items():
        if key in P3_KEYS and isinstance(value, str):
            value = value.strip()  # P3's texts have white space at both ends
        if value is not None and value == value:  # tables have NaN too, which equals nothing
            cleaned[P3_KEYS.get(key, key)] = value
    return cleaned


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def read_texts(path: str | Path) -> Iterator[str]:
    """Yield the documents of a .txt file (between blank lines) or a JSONL file, long ones in parts.

    If the first line of a JSONL file is an example, all must be, and a document is the input, a
    space and the target. FileNotFoundError if there is no such file, ValueError if it has no text.
    """
    parse = _paragraphs if Path(path).suffix.lower() == ".txt" else _json_texts
    document = None
    for document in parse(path):
        yield from PIECE.findall(document)
    if document is None:
        raise ValueError(f"{path}: holds no text")


def _paragraphs(path: str | Path) -> Iterator[str]:
    lines, letters = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(chain(file, [b""]), 1):  # the end is like a blank line
            line = decode_utf8(line, f"{path}:{number}")
            if lines and (not line.strip() or letters + len(line) > LETTERS):
                yield "".join(lines).strip()
                lines, letters = [], 0
            if line.strip():
                lines.append(line)
                letters += len(line)


def _json_texts(path: str | Path) -> Iterator[str]:
    plain = None  # whether the lines are texts, not examples
    for source, record in json_lines(path):
        plain = "text" in record if plain is None else plain
        if not plain:
            example = parse_record(record, source)
            record = {"text": f"{example.input} {example.target}"}
        if not _is_text(record.get("text")):
            raise ValueError(f"{source}: the key text holds no text")
        yield record["text"]


def decode_utf8(content: bytes, path: str | Path) -> str:
    """Decode text of a file, without byte order marks. ValueError if it is not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    # str.splitlines would also split at U+2028 and form feeds. Joined files have several marks.
    return re.sub(f"^{BOM}", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)


def json_lines(path: str | Path, content: bytes | None = None) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", record without absent keys) for each line that is not blank. `content` is
    what the file holds, if that was read already."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {problem}")
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM.encode())
            if not line.strip():
                continue
            source = f"{path.name}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
                if b"\\ud" in line.lower():  # JSON can escape half a surrogate pair: not a text
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:  # recursion: brackets nested too deep
                raise ValueError(f"{source}: not a line of JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{source}: a JSON object is expected")
            yield source, _clean(record)


# ------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of an example. The target ends with the EOS token, if the model has one."""

    input: list[int]
    target: list[int]
    options: list[list[int]] = field(default_factory=list)  # each tokenised like the target


def tokenize(
    examples: list[Example], tokenizer: Tokenizer, eos: int | None, max_len: int, vocab_size=None
) -> list[TokenizedExample]:
    """Tokenise examples, and append `eos` to their targets and options.

    The target's tokens are those of `input + " " + target` after the input's own, so the boundary
    is tokenised as in running text. `max_len` is the number of positions that the soft prompt
    leaves in the LM's context. ValueError, which names the example, if it does not fit, no tokens
    after the input's spell the target, two options have the same tokens, or an id is not below
    `vocab_size`.
    """
    inputs = encode_prompts(tokenizer, [e.input for e in examples])
    texts = [f"{e.input} {text}" for e in examples for text in (e.target, *e.options)]
    wholes = iter(encode_prompts(tokenizer, texts))
    tokenized, ending = [], [] if eos is None else [eos]
    for example, input in zip(examples, inputs):
        try:
            targets = []
            for text in (example.target, *example.options):
                targets.append(_target_tokens(tokenizer, input, text, next(wholes)) + ending)
            _check_tokens(input, targets, example.options, max_len)
            check_vocabulary(sum(targets, input), tokenizer, vocab_size)
        except ValueError as error:
            raise ValueError(f"{example.source}: {error}") from None
        tokenized.append(TokenizedExample(input, targets[0], targets[1:]))
    return tokenized


def _target_tokens(tokenizer, input: list[int], text: str, whole: list[int]) -> list[int]:
    """Return the tokens of `text` after the input's. `whole` are those of both as running text."""
    n = len(input)
    if whole[:n] == input and whole[n:]:
        return whole[n:]
    # A token spans the boundary, so the target's tokens cannot be cut out of `whole`. Tokenise the
    # target after a colon, which is how a question ends, or alone. Some tokenizers add the space.
    colon, after_colon = encode_prompts(tokenizer, [":", f": {text}"])
    alone = [e.ids for e in tokenizer.encode_batch([f" {text}", text], add_special_tokens=False)]
    both, start, end = tokenizer.decode_batch([whole, input, alone[1]], skip_special_tokens=False)
    for target in (after_colon[len(colon) :], *alone):
        spelt = tokenizer.decode(input + target, skip_special_tokens=False)
        if target and spelt in (both, f"{start} {end.removeprefix(' ')}"):
            return target
    raise ValueError(f"no tokens after those of the input spell the answer {text!r}")


def _check_tokens(input: list[int], targets: list, options: Sequence[str], max_len: int) -> None:
    n, seen = len(input), {}
    for m in map(len, targets):
        if n + m - 1 > max_len:  # the last target token is predicted, never read
            left = f"the {max_len} that the LM's context leaves"
            raise ValueError(f"{n} tokens and {m} of the answer exceed {left}")
    for option, target in zip(options, targets[1:]):
        other = seen.setdefault(tuple(target), option)
        if other != option:
            raise ValueError(f"the options {other!r} and {option!r} have the same tokens")


def check_vocabulary(ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """ValueError if an id is not below `vocab_size`: a tokenizer may add tokens of its own."""
    last = int(np.max(ids, initial=0))
    if vocab_size is not None and last >= vocab_size:
        token = f"the token {tokenizer.id_to_token(last)!r} has the id {last}"
        raise ValueError(f"{token}, outside the LM's vocabulary of {vocab_size}")


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts that a model will continue: with the leading BOS, without a trailing EOS."""
    rows = []
    for text in tokenizer.encode_batch(list(texts)):
        n = len(text.ids)
        while n > 1 and text.special_tokens_mask[n - 1]:
            n -= 1
        rows.append(text.ids[:n])
    return rows


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer. Its one special token, id 0, is both BOS and EOS."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so every text has tokens
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{end} $A", special_tokens=[(end, 0)])
    return tokenizer


# ------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """The tensors of one step.

    ids      (B, T) the tokens that the model reads, padded on the right
    lengths  (B,) the number of tokens of each row without padding
    targets  (B, T) the token to predict at each position, or IGNORE_INDEX; from `corrupt_spans`
             the tokens of another text, (B, S)
    rows     the index of each row's example
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    rows: list[int]

    def to(self, device) -> "Batch":
        """Return a copy with the tensors on `device`."""
        return Batch(*(t.to(device) for t in (self.ids, self.lengths, self.targets)), self.rows)

    def part(self, rows: Sequence[int]) -> "Batch":
        """Return some rows of it, without the padding that only others need."""
        lengths, targets = self.lengths[rows], self.targets[rows]
        T = int(lengths.max())
        targets = targets[:, :T] if self.targets.shape == self.ids.shape else targets
        return Batch(self.ids[rows, :T], lengths, targets, [self.rows[row] for row in rows])


def batches(examples: Sequence[TokenizedExample], size: int, seed: int, step: int) -> Batch:
    """Return the batch of a step, a pure function of the arguments.

    An epoch holds every example once. The rows of a batch have similar lengths. The last batch of
    an epoch may be smaller.
    """
    lengths = np.array([len(e.input) + len(e.target) - 1 for e in examples])
    epoch, index = divmod(step, -(-len(examples) // size))
    rows = epoch_order(lengths.tobytes(), size, seed, epoch)[index]
    return collate([examples[row] for row in rows], list(rows))


@lru_cache(maxsize=4)
def epoch_order(lengths: bytes, size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Return the rows of each batch of an epoch.

    Shuffle the examples, sort each pool of 32 batches by length, cut the result into batches, and
    shuffle these. So batches have little padding and come in random order. A smaller batch comes
    last. `lengths` are the bytes of an int64 array: a cached function needs hashable arguments.
    """
    lengths = np.frombuffer(lengths, dtype=int)
    rng = np.random.default_rng([seed, epoch])
    order, pool = rng.permutation(len(lengths)), 32 * size
    pools = np.split(order, range(pool, len(order), pool))
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools]).tolist()
    full = len(order) // size
    rows = [tuple(order[i * size : (i + 1) * size]) for i in rng.permutation(full)]
    if len(order) > full * size:
        rows.append(tuple(order[full * size :]))
    return rows


def collate(examples: Sequence[TokenizedExample], rows: list[int]) -> Batch:
    """Pad examples into a batch. Position t reads token t and predicts token t + 1.

    Only the target's tokens are predicted, the first of them at the input's last position.
    """
    lengths = [len(e.input) + len(e.target) - 1 for e in examples]
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    targets = torch.full(ids.shape, IGNORE_INDEX)
    for b, (e, length) in enumerate(zip(examples, lengths)):
        ids[b, :length] = torch.tensor((e.input + e.target)[:-1])
        targets[b, len(e.input) - 1 : length] = torch.tensor(e.target)
    return Batch(ids, torch.tensor(lengths), targets, rows)


# ------------------------------------------------------------------------------ running text


@dataclass(eq=False)  # `stream_order` is cached by the object
class Corpus:
    """The tokens of documents, end to end. Document d is tokens[starts[d] : starts[d + 1]]."""

    tokens: np.ndarray
    starts: np.ndarray  # (documents + 1,)


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer, vocab_size=None) -> Corpus:
    """Tokenise documents, with the special tokens that the tokenizer adds (usually a BOS).
    ValueError if a token is outside the LM's vocabulary of `vocab_size`."""
    parts = list(encode_parts(texts, tokenizer, vocab_size))
    tokens = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in parts)])
    return Corpus(tokens, np.cumsum([0, *chain(*(lengths for _, lengths in parts))]))


def encode_parts(texts: Iterable[str], tokenizer: Tokenizer, vocab_size=None):
    """Yield the tokens of 32 documents at a time, end to end, and a list of their lengths."""
    texts = iter(texts)
    while part := list(islice(texts, 32)):
        documents = [e.ids for e in tokenizer.encode_batch_fast(part)]
        tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int32)
        check_vocabulary(tokens, tokenizer, vocab_size)
        yield tokens, [len(d) for d in documents]


@lru_cache(maxsize=4)
def stream_order(corpus: Corpus, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents of an epoch's stream in their order, and where each of them ends in it."""
    order = np.random.default_rng([seed, epoch]).permutation(len(corpus.starts) - 1)
    return order, np.cumsum(np.diff(corpus.starts)[order])


def windows(corpus: Corpus, size: int, seq_len: int, seed: int, step: int) -> Batch:
    """Return the language-modelling batch of a step, a pure function of the arguments.

    An epoch is one stream of all documents in a new order, cut into windows of `seq_len` tokens.
    Each position predicts the next token of the stream, across documents too. Windows that do not
    fill a last batch are left out. ValueError if the text is shorter than one window.
    """
    n = len(corpus.tokens)
    per_epoch = (n - 1) // seq_len
    if per_epoch < 1:
        raise ValueError(f"the text has {n} tokens, too few for one window of {seq_len}")
    size = min(size, per_epoch)
    epoch, first = divmod(step * size, per_epoch // size * size)
    order, ends = stream_order(corpus, seed, epoch)
    start, stop = first * seq_len, (first + size) * seq_len + 1  # one more, the last target
    low = np.searchsorted(ends, start, "right")  # documents low to high - 1 have the tokens
    high = np.searchsorted(ends, stop, "left") + 1
    documents = [corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]] for d in order[low:high]]
    skip = start - (ends[low - 1] if low else 0)
    stream = np.concatenate(documents)[skip : skip + stop - start]
    stream = torch.from_numpy(stream.astype(np.int64))
    ids, targets = stream[:-1].view(size, seq_len), stream[1:].view(size, seq_len)
    return Batch(ids, torch.full((size,), seq_len), targets, list(range(first, first + size)))


def main(argv: list[str] | None = None) -> list[Example]:
    """Print what a file of examples holds, and return the examples."""
    parser = argparse.ArgumentParser(description="Print what a file of examples holds.")
    parser.add_argument("path", help="a JSONL file of examples")
    parser.add_argument("--tokenizer", help="a checkpoint folder; shows the first example's tokens")
    cut = partial(re.sub, "(?s)(.{300}).{100,}(.{200})", r"\1 ... \2")
    parser.error = lambda error: parser.exit(2, cut(f"data.py: {error}") + "\n")
    args = parser.parse_args(argv)
    try:
        examples = read(args.path)
        first, tasks = examples[0], sorted({e.task for e in examples} - {""})
        print(f"{len(examples)} examples, tasks: {', '.join(tasks) or 'not named'}")
        print(f"first: {first.input!r} -> {first.target!r}  (accepted: {', '.join(first.answers)})")
        if args.tokenizer:
            from checkpoints import load_tokenizer

            tokenizer = load_tokenizer(args.tokenizer)
            (tokens,) = tokenize(examples[:1], tokenizer, None, sys.maxsize)
            print("tokens:", *map(tokenizer.id_to_token, tokens.input), end=" -> ")
            print(*map(tokenizer.id_to_token, tokens.target))
    except (ValueError, OSError) as error:
        parser.error(error)
    return examples


if __name__ == "__main__":
    if sys.stdout is not None:  # it may be able to write ASCII only
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
