"""Examples, the files they come from, their tokens, and the batches of a step.

A task's data are examples of an input text and a target text. Files are JSON lines of either form:

    {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]}      NQ-open's format; a question format is put around it
    {"input": "Review: dull.\\nVerdict:", "target": "bad"}                    used as it stands
    {"inputs_pretokenized": ..., "targets_pretokenized": "bad", "answer_choices": ["good", "bad"]}       P3's names for the same

and may carry "task" (figures are given per task) and "id". With answer_choices, or "options" in the second form, the answer is one of these. Text to model is lines of {"text": "..."}, or of the two forms
above, or a plain .txt file with a blank line between documents.

A batch is a pure function of (examples, size, seed, step): nothing is drawn from a stream that a resumed run would have
to replay. Needs torch, numpy and tokenizers, and no other file of the project.

    python data.py questions.jsonl --tokenizer assets/lm      prints what a file holds, and its first example in tokens
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

NO_TARGET = -100  # cross_entropy's ignore_index

# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True)
class Example:
    """One input and the target that training teaches; `answers` are all that evaluation accepts."""

    input: str
    target: str
    answers: tuple[str, ...]
    task: str = ""
    id: str = ""  # unique within its task and file; file:line where the file gives none
    where: str = ""  # file:line, for messages
    options: tuple[
        str, ...
    ] = ()  # what there is to choose from; empty where any text may be the answer


P3_KEYS = {
    "inputs_pretokenized": "input",
    "targets_pretokenized": "target",
    "answer_choices": "options",
}


def question_text(question: str) -> str:
    """The one format in which this project asks a question; the answer follows after a space."""
    return f"Q: {question.strip().rstrip('?').rstrip()}?\nA:"


def is_question(text: str) -> bool:
    """Whether the text is in that format."""
    return text.startswith("Q: ") and text.endswith("?\nA:")


def read(path: str | Path) -> list[Example]:
    """The examples of a JSONL file in one of the forms above. ValueError names file and line; FileNotFoundError the file."""
    examples, first = [example(record, where) for where, record in json_lines(path)], {}
    if not examples:
        raise ValueError(f"{path}: holds no examples")
    for e in examples:  # figures and comparisons find an example by its task and id
        if first.setdefault((e.task, e.id), e) is not e:
            raise ValueError(f"{e.where}: the id {e.id} is taken by {first[e.task, e.id].where}")
    return examples


def example(record: dict, where: str) -> Example:
    """One record in one of the forms above; ValueError begins with `where` it stands."""
    if "question" in record:
        text, answers = record["question"], record.get("answer")
        answers = [answers] if isinstance(answers, str) else answers
        target = answers[0] if isinstance(answers, list) and answers else None
    else:
        record = {
            P3_KEYS.get(key, key): value.strip()
            if key in P3_KEYS and isinstance(value, str)
            else value
            for key, value in record.items()
        }
        text, target = record.get("input"), record.get("target")
        answers = record.get("answers", [target])
    options = record.get("options") or []
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where}: needs a text under the key question, input or inputs_pretokenized"
        )
    if not isinstance(answers, list) or not all(
        isinstance(a, str) and a.strip() for a in [target, *answers]
    ):
        raise ValueError(
            f"{where}: needs a list of texts under the key answer, or a text under target or targets_pretokenized"
        )
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"{where}: needs a list of texts under the key options or answer_choices")
    options = tuple(o.strip() for o in options)
    if options and target not in options:
        raise ValueError(
            f"{where}: the target {target!r} is not among the options {', '.join(options)}"
        )
    text = question_text(text) if "question" in record else text
    answers = answers if target in answers else [target, *answers]
    return Example(
        text,
        target,
        tuple(answers),
        str(record.get("task", "")),
        str(record.get("id", where)),
        where,
        options,
    )


def read_texts(path: str | Path) -> list[str]:
    """The documents of a .txt file (blank lines between them) or of JSON lines with the key text; examples become input and target."""
    if Path(path).suffix == ".txt":
        try:
            documents = [
                d.strip()
                for d in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8"))
                if d.strip()
            ]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    elif all("text" in record for _, record in json_lines(path)):
        documents = []
        for where, record in json_lines(path):
            if not isinstance(record["text"], str) or not record["text"].strip():
                raise ValueError(f"{where}: the key text holds no text")
            documents.append(record["text"])
    else:
        documents = [f"{example.input} {example.target}" for example in read(path)]
    if not documents:
        raise ValueError(f"{path}: holds no text")
    return documents


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", record) for each line of a JSONL file; blank lines are skipped."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: " + ("is a folder, not a file" if path.is_dir() else "no such file")
        )
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                if (
                    b"\\ud" in line.lower()
                ):  # JSON can escape half of a surrogate pair, which is no text
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except (
                ValueError,
                RecursionError,
            ) as error:  # decoding, JSON, encoding; brackets nested too deep
                raise ValueError(f"{path.name}:{number}: not a line of JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path.name}:{number}: a JSON object is expected")
            yield f"{path.name}:{number}", record


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: the LM reads `input` and learns to say `target`, which ends with the end-of-text token if there is one."""

    input: list[int]
    target: list[int]
    options: list[list[int]] = field(
        default_factory=list
    )  # what it may be asked to choose from, each as the target would be


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, eos: int | None, max_len: int
) -> list[Encoded]:
    """Tokens of each example. BOS is in front where the published tokenizer puts it.

    The target's tokens are those that input + " " + target has beyond the input's own, so the boundary is tokenised as it
    would be in running text. ValueError names the example whose tokens exceed `max_len`, the room that a prompt leaves.
    """
    inputs, ends = open_ended(tokenizer, [e.input for e in examples]), [] if eos is None else [eos]
    wholes = iter(
        open_ended(
            tokenizer, [f"{e.input} {text}" for e in examples for text in (e.target, *e.options)]
        )
    )
    encoded = []
    for example, input in zip(examples, inputs):
        n, targets = len(input), []
        for text in (example.target, *example.options):
            whole = next(wholes)
            if whole[:n] == input:
                targets.append(whole[n:] + ends)
            else:  # a token spans the boundary: keep the input as it will be asked, and take the target's tokens from behind another text
                alone, whole = open_ended(tokenizer, [":", f": {text}"])
                targets.append(whole[len(alone) :] + ends)
            if n + len(targets[-1]) - 1 > max_len:  # the last target token is predicted, never read
                raise ValueError(
                    f"{example.where}: {n} tokens and {len(targets[-1])} of the answer exceed the {max_len} that the LM's context leaves"
                )
        encoded.append(Encoded(input, targets[0], targets[1:]))
    return encoded


def open_ended(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts that are to be continued: with the BOS that a tokenizer puts in front, without the EOS that some put behind."""
    rows = []
    for text in tokenizer.encode_batch(list(texts)):
        n = len(text.ids)
        while n > 1 and text.special_tokens_mask[n - 1]:
            n -= 1
        rows.append(text.ids[:n])
    return rows


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer. Its one special token, id 0, stands before every text and ends every answer."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so any text can be written
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, 0)]
    )
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Batch:
    """What one step computes on.

    ids      (B, T) what the LM reads, padded on the right
    lengths  (B,) how much of each row is real
    targets  (B, T) the token that position t is to predict, NO_TARGET where nothing is asked
    rows     the index of each row's example
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    rows: list[int]

    def to(self, device) -> "Batch":
        return Batch(
            self.ids.to(device), self.lengths.to(device), self.targets.to(device), self.rows
        )


def batches(examples: Sequence[Encoded], size: int, seed: int, step: int) -> Batch:
    """The batch of a step: a pure function of its arguments. Every epoch holds every example once, and rows of a batch
    are of similar lengths (the last batch of an epoch may be smaller)."""
    per_epoch = -(-len(examples) // size)
    lengths = np.array([len(e.input) + len(e.target) - 1 for e in examples])
    rows = epoch_order(lengths.tobytes(), size, seed, step // per_epoch)[step % per_epoch]
    return collate([examples[row] for row in rows], list(rows))


@lru_cache(maxsize=4)
def epoch_order(lengths: bytes, size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The rows of each batch of an epoch: shuffle, sort by length within pools of 32 batches, cut, shuffle the batches.

    Sorting within pools keeps padding low and batches random; the short batch, if any, comes last. `lengths` are the
    bytes of an int64 array, because what a cache remembers results for must be hashable.
    """
    lengths, draw = np.frombuffer(lengths, dtype=int), np.random.default_rng([seed, epoch])
    order, pool = draw.permutation(len(lengths)), 32 * size
    order = np.concatenate(
        [
            p[np.argsort(lengths[p], kind="stable")]
            for p in np.split(order, range(pool, len(order), pool))
        ]
    )
    full = len(order) // size
    cut = [tuple(order[i * size : (i + 1) * size].tolist()) for i in draw.permutation(full)]
    return cut + ([tuple(order[full * size :].tolist())] if len(order) > full * size else [])


def collate(examples: Sequence[Encoded], rows: list[int]) -> Batch:
    """Right-padded tensors for teacher forcing: position t reads token t and predicts token t + 1 where that is a target."""
    T = max(len(e.input) + len(e.target) - 1 for e in examples)
    ids, targets = (
        torch.zeros(len(examples), T, dtype=torch.long),
        torch.full((len(examples), T), NO_TARGET),
    )
    for b, e in enumerate(examples):
        n, whole = len(e.input), e.input + e.target
        ids[b, : len(whole) - 1] = torch.tensor(whole[:-1])
        targets[b, n - 1 : len(whole) - 1] = torch.tensor(e.target)
    return Batch(
        ids, torch.tensor([len(e.input) + len(e.target) - 1 for e in examples]), targets, rows
    )


@dataclass
class Corpus:
    """Documents in tokens, end to end: document d is tokens[starts[d] : starts[d + 1]]."""

    tokens: np.ndarray
    starts: np.ndarray  # (documents + 1,)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """The documents' tokens, each with what the published tokenizer puts in front of a text."""
    documents = [e.ids for e in tokenizer.encode_batch_fast(list(texts))]
    tokens = np.fromiter((t for d in documents for t in d), dtype=np.int32)
    return Corpus(tokens, np.cumsum([0] + [len(d) for d in documents]))


def windows(corpus: Corpus, size: int, length: int, seed: int, step: int) -> Batch:
    """The language-modelling batch of a step, as pure a function as `batches`: an epoch is one stream of all documents in
    a new order, cut into windows of `length` tokens, each of which predicts the next token, across documents too."""
    per_epoch = (len(corpus.tokens) - 1) // length
    if per_epoch < 1:
        raise ValueError(
            f"the text has {len(corpus.tokens)} tokens, too few for one window of {length}"
        )
    size = min(size, per_epoch)
    epoch, first = divmod(
        step * size, per_epoch // size * size
    )  # the remainder of an epoch waits for another order
    rows = list(range(first, first + size))
    order = np.random.default_rng([seed, epoch]).permutation(len(corpus.starts) - 1)
    ends = np.cumsum(
        np.diff(corpus.starts)[order]
    )  # where each document ends in this epoch's stream
    begin, stop = first * length, (rows[-1] + 1) * length + 1
    low, high = (
        np.searchsorted(ends, begin, "right"),
        np.searchsorted(ends, stop, "left") + 1,
    )  # the documents that hold begin to stop
    stream = np.concatenate(
        [corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]] for d in order[low:high]]
    )
    skip = begin - (ends[low - 1] if low else 0)
    stream = torch.from_numpy(stream[skip : skip + stop - begin].astype(np.int64))
    ids, targets = (stream[i : i + len(rows) * length].view(len(rows), length) for i in (0, 1))
    return Batch(ids, torch.full((len(rows),), length), targets, rows)


def mask_words(
    batch: Batch,
    special: dict[str, int],
    vocab_size: int,
    seed: int,
    step: int,
    share: float = 0.15,
) -> Batch:
    """BERT's task on windows of text (Devlin et al. 2019): [CLS] one part [SEP] the rest, and `share` of the words to be told
    from the others. Of these, 80 % are shown as [MASK], 10 % as another word and 10 % as they are.

    special   the ids of "[CLS]", "[SEP]" and "[MASK]"; random words are drawn from the ids below vocab_size
    """
    draw, (B, T) = np.random.default_rng([seed, step]), batch.ids.shape
    words, cuts = batch.ids.numpy(), draw.integers(1, T, B)
    whole = np.stack(
        [
            np.concatenate([[special["[CLS]"]], row[:cut], [special["[SEP]"]], row[cut:]])
            for row, cut in zip(words, cuts)
        ]
    )
    fate = np.where(
        np.isin(whole, list(special.values())), 1.0, draw.random(whole.shape) / share
    )  # below 1: to be told
    shown = np.where(
        fate < 0.8,
        special["[MASK]"],
        np.where(fate < 0.9, draw.integers(0, vocab_size, whole.shape), whole),
    )
    targets = np.where(fate < 1, whole, NO_TARGET)
    return Batch(
        torch.from_numpy(shown), torch.full((B,), T + 2), torch.from_numpy(targets), batch.rows
    )


def corrupt_spans(
    batch: Batch, sentinels: list[int], seed: int, step: int, share: float = 0.15, mean: float = 3.0
) -> Batch:
    """T5's task on windows of text (Raffel et al. 2020, section 3.1.4): spans of `mean` tokens on average, `share` of all, are
    each replaced by a sentinel; the targets, a text of their own, are sentinel, span, sentinel, span, ... and a last sentinel."""
    draw, (B, T) = np.random.default_rng([seed, step]), batch.ids.shape
    lost = max(1, round(T * share))
    count = min(max(1, round(lost / mean)), T - lost, len(sentinels) - 1)

    def lengths(total: int) -> np.ndarray:
        """`count` whole numbers from 1 up that sum to total, all such ways equally likely."""
        ends = np.sort(draw.choice(total - 1, count - 1, replace=False)) + 1
        return np.diff(ends, prepend=0, append=total)

    inputs, targets = [], []
    for row in batch.ids.numpy():
        ends = np.cumsum(
            np.stack([lengths(T - lost), lengths(lost)], 1).ravel()
        )  # kept, lost, kept, lost, ...
        parts = np.split(row, ends[:-1])
        inputs.append(
            np.concatenate(
                [x for kept, sentinel in zip(parts[::2], sentinels) for x in (kept, [sentinel])]
            )
        )
        targets.append(
            np.concatenate(
                [x for sentinel, span in zip(sentinels, parts[1::2]) for x in ([sentinel], span)]
                + [[sentinels[count]]]
            )
        )
    inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in (inputs, targets))
    return Batch(inputs, torch.full((B,), inputs.shape[1]), targets, batch.rows)


def main(argv: list[str] | None = None) -> list[Example]:
    parser = argparse.ArgumentParser(description="Print what a file of examples holds.")
    parser.add_argument("path")
    parser.add_argument(
        "--tokenizer",
        help="a checkpoint folder or tokenizer.json: show the first example in tokens too",
    )
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    args = parser.parse_args(argv)
    examples = read(args.path)
    print(
        f"{len(examples)} examples, tasks: {', '.join(sorted({e.task for e in examples} - {''})) or 'not named'}"
    )
    print(
        f"first: {examples[0].input!r} -> {examples[0].target!r}  (accepted: {', '.join(examples[0].answers)})"
    )
    if args.tokenizer:
        from model import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
        tokens = encode(examples[:1], tokenizer, None, sys.maxsize)[0]
        print(
            "tokens:",
            *[tokenizer.id_to_token(i) for i in tokens.input],
            "->",
            *[tokenizer.id_to_token(i) for i in tokens.target],
        )
    return examples


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
