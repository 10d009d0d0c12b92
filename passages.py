"""The files of open-book question answering, and the training examples made of them.

    psgs_w100.tsv          id, text and title, with tabs between and a line of these names on top
    passages.jsonl         {"id": "p1", "title": "Emma", "text": "Emma is a novel by ..."}
    DPR's training files   [{"question": ..., "answers": [...], "positive_ctxs": [passage, ...],
                             "hard_negative_ctxs": [...], "negative_ctxs": [...]}, ...]
    DPR's results          [{"question": ..., "answers": [...], "ctxs": [passage with score, ...]}]
    SQuAD                  {"data": [{"title": ..., "paragraphs": [...]}]}, in one line

A file of questions may be a JSON array or have one record a line. "answer" is read for "answers",
and "positives" may be a list of ids. A passage of a record may be an id alone: {"passage_id": "7"}.

    passages = read_passages("psgs_w100.tsv")
    questions = read_questions("nq-dev.json", passages)
    samples, skipped = reranker_samples(questions, encoder)
    batch = reranker_batch(samples, encoder, size=16, passages=24, seed=0, step=0)

Needs rerank.py, data.py, torch, numpy and tokenizers.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import BOM, decode_utf8, json_lines, question_text
from eval import has_answer
from rerank import CrossEncoder, loss_parts, pad, tokenise

# Files


class Passage(NamedTuple):
    """A passage of the book that is searched."""

    title: str
    text: str
    id: str = ""


@dataclass(frozen=True)
class Question:
    """A question with its answers, and the passages that are known or were retrieved for it."""

    question: str
    answers: list[str]  # any of them is right; empty if none is known
    positives: list[Passage] = field(default_factory=list)  # known to hold the answer
    hard_negatives: list[Passage] = field(default_factory=list)
    negatives: list[Passage] = field(default_factory=list)
    found: list[Passage] = field(default_factory=list)  # by a search, best first
    scores: list[float] = field(default_factory=list)  # of `found`
    source: str = ""  # file:line, for error messages
    task: str = ""
    id: str = ""  # equal to `source` if the record has none


def read_passages(path: str | Path) -> list[Passage]:
    """Read psgs_w100.tsv, or JSON lines if the name ends so, in file order.

    FileNotFoundError if there is no file. ValueError, which names file and line, if a line is
    malformed, a text is empty or an id occurs twice.
    """
    reader = _json_passages if Path(path).suffix.lower() == ".jsonl" else _tsv_passages
    passages, source_of = [], {}
    for source, passage in reader(Path(path)):
        if not passage.text.strip():
            raise ValueError(f"{source}: the passage {passage.id!r} is empty")
        first = source_of.setdefault(passage.id, source)
        if first != source:
            raise ValueError(f"{source}: the id {passage.id!r} is taken by {first}")
        passages.append(passage)
    if not passages:
        raise ValueError(f"{path}: holds no passages")
    return passages


def _json_passages(path: Path) -> Iterator[tuple[str, Passage]]:
    for source, record in json_lines(path):
        title, text = record.get("title", ""), record.get("text", "")
        if "id" not in record or not (isinstance(title, str) and isinstance(text, str)):
            raise ValueError(f"{source}: a passage needs an id and texts under title and text")
        yield source, Passage(title, text, str(record["id"]))


def _tsv_passages(path: Path) -> Iterator[tuple[str, Passage]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    names = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path.name}:{number}"
            try:
                fields = line.decode("utf-8").removeprefix(BOM).rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}: not UTF-8 text ({error})") from None
            if names is None:
                names = fields
                if not {"id", "text", "title"} <= set(names):
                    raise ValueError(f"{source}: the first line must name id, text and title")
            elif len(fields) != len(names):
                raise ValueError(f"{source}: {len(fields)} columns, not {len(names)}")
            else:
                row = dict(zip(names, map(_unquote, fields)))
                yield source, Passage(row["title"], row["text"], row["id"])


def _unquote(value: str) -> str:
    # A field in quotes, as psgs_w100.tsv has them. Other quotes belong to the text: a passage may
    # begin with a quotation, which a CSV reader would take for a quoted field.
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', value)
    return quoted[1].replace('""', '"') if quoted else value


def json_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", record) of a JSON array or of JSON lines; the line is the record's first.
    If two records begin in one line, the number of the second follows. A key whose value is null is
    absent, in passages and paragraphs too.

    FileNotFoundError if there is no file. ValueError, with file and line, if it is neither.
    """
    path = Path(path)
    if not (path.is_file() and _begins_with_bracket(path)):
        for source, record in json_lines(path):
            yield source, _without_nulls(record)
        return
    text = decode_utf8(path.read_bytes(), path)
    space, decoder = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()
    position = space.match(text, text.index("[") + 1).end()
    line, counted, number, before = 1, 0, 0, None
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
            if "\\ud" in text[position:end].lower():  # half a surrogate pair, as in data.json_lines
                json.dumps(record, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}:{line}: not a record of JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}:{line}: a JSON object is expected")
        number += 1
        again = f" record {number}" if line == before else ""  # a whole array may stand in one line
        yield f"{path.name}:{line}{again}", _without_nulls(record)
        before = line
        position = space.match(text, end).end()
        if text.startswith(",", position):
            position = space.match(text, position + 1).end()
        elif not text.startswith("]", position):
            raise ValueError(f"{path.name}:{line}: no comma and no bracket behind this record")
    if text[position + 1 :].strip():
        raise ValueError(f"{path.name}: more text behind the array")


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value


def _begins_with_bracket(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(100).removeprefix(BOM.encode()).lstrip().startswith(b"[")


def bare_question(text: str) -> str:
    """A question as it is searched for: with one "?", in the format of `question_text` or not."""
    bare = text.removeprefix("Q: ").removesuffix("\nA:")
    return question_text(bare).removeprefix("Q: ").removesuffix("\nA:")


def read_questions(path: str | Path, passages: Sequence[Passage] = ()) -> list[Question]:
    """Read questions in any of the forms above. `passages` are those that ids stand for.

    FileNotFoundError if there is no file. ValueError, which names file and line, if a record is
    malformed, a passage is empty or an id is not among `passages`.
    """
    by_id, questions = {passage.id: passage for passage in passages}, []
    for source, record in json_records(path):
        if "question" not in record and isinstance(record.get("data"), list):
            questions += _squad(record["data"], source)
        else:
            questions.append(parse_question(record, by_id, source))
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def parse_question(record: dict, by_id: dict, source: str) -> Question:
    """Make a Question of a record. `by_id` {id: Passage} are those that ids stand for."""
    text, answers = record.get("question"), record.get("answers", record.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not _is_text(text):
        raise ValueError(f"{source}: needs a text under the key question")
    known = answers or record.get("positives") or record.get("positive_ctxs")
    if not isinstance(answers, list) or not known or not all(map(_is_text, answers)):
        raise ValueError(f"{source}: needs a list of texts under the key answers or answer")
    if "positives" in record:
        if not isinstance(record["positives"], list):
            raise ValueError(f"{source}: positives must be a list of ids")
        record = record | {"positive_ctxs": [{"id": id} for id in record["positives"]]}
    lists = []
    for key in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs", "ctxs"):
        listed = record.get(key) or []
        if not isinstance(listed, list):
            raise ValueError(f"{source}: {key} must be a list of passages")
        lists.append([_parse_passage(passage, by_id, f"{source}: {key}") for passage in listed])
    try:  # DPR writes scores as texts
        scores = [float(passage.get("score", 0.0)) for passage in record.get("ctxs") or []]
        finite = all(map(math.isfinite, scores))
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{source}: ctxs: a score is not a finite number")
    task, id = str(record.get("task", "")), str(record.get("id", source))
    return Question(text, answers, *lists, scores, source, task, id)


def _parse_passage(passage, by_id: dict, source: str) -> Passage:
    if not isinstance(passage, dict):
        raise ValueError(f"{source}: a passage must be a JSON object")
    id = next((str(passage[k]) for k in ("id", "passage_id", "psg_id") if k in passage), "")
    if "text" not in passage:
        if id not in by_id:
            raise ValueError(f"{source}: the passage {id!r} has no text and is not in the book")
        return by_id[id]
    if not _is_text(passage["text"]):
        raise ValueError(f"{source}: the passage {id!r} is empty")
    return Passage(str(passage.get("title") or ""), passage["text"], id)


def _squad(articles: list, source: str) -> list[Question]:
    questions = []
    try:
        for article in articles:
            for number, paragraph in enumerate(article["paragraphs"]):
                title, text = str(article.get("title", "")), paragraph["context"]
                where = f"{source}: {title!r}, paragraph {number}"
                if not _is_text(text):
                    raise ValueError(f"{where}: the context is empty or no text")
                passage = Passage(title, text, f"{title}:{number}")
                for qa in paragraph["qas"]:
                    answers = list(dict.fromkeys(a["text"] for a in qa["answers"]))
                    if not all(map(_is_text, [qa["question"], *answers])):
                        raise ValueError(f"{where}: a question or an answer is empty or no text")
                    positives = [passage] if answers else []
                    id = str(qa.get("id", f"{source}:{len(questions)}"))
                    questions.append(
                        Question(qa["question"], answers, positives, source=where, id=id)
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not a SQuAD file ({error!r})") from None
    return questions


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


# What was found


def answer_hits(question: Question) -> list[bool]:
    """Whether each found passage holds an answer."""
    return [has_answer(question.answers, passage.text) for passage in question.found]


def gold_hits(question: Question) -> list[bool]:
    """Whether each found passage is a known positive. Files number passages in their own ways, so
    ids do not count."""
    gold = {passage[:2] for passage in question.positives}
    return [passage[:2] in gold for passage in question.found]


def with_found(question: Question, passages: Sequence[Passage], found: list) -> Question:
    """Return the question with what a search found: [(row of the passage, score)]."""
    rows, scores = [row for row, _ in found], [score for _, score in found]
    return replace(question, found=[passages[row] for row in rows], scores=scores)


def reader_line(passage: Passage) -> str:
    """A passage as the frozen reader reads it."""
    return f"{passage[0]}: {passage[1]}" if passage[0] else passage[1]


def reader_text(question: str, passages: Sequence[Passage]) -> str:
    """What the frozen reader reads: a line for each passage, and the question behind them."""
    return "\n".join([*map(reader_line, passages), question_text(question)])


# Training examples


@dataclass(frozen=True)
class RerankerSample:
    """A question as the re-ranker learns from it. spans: first and last token in the input."""

    question: list[int]
    positives: list[Passage]
    spans: list[list[tuple[int, int]]]  # of each positive; some may be empty, not all
    negatives: list[Passage]


def choose_passages(question: Question) -> tuple[list[Passage], list[Passage]]:
    """Return (positives, negatives) as DPR chooses them for its reader.

    Positives: the found passages with an answer that have the title of a known positive; if there
    are none, the first 20 with an answer among the first 200 found. (Two passages without a title
    do not have the same title.) Negatives: found passages without an answer, at most min(max(10 *
    positives, 50), 150) of them. If nothing was searched, the question's own lists are used.
    Without answers: the known positives, and the first 50 of what else was found.
    """
    if not question.found:
        return question.positives, [*question.hard_negatives, *question.negatives]
    if not question.answers:
        others = [p for p, gold in zip(question.found, gold_hits(question)) if not gold]
        return question.positives, others[:50]
    hits, titles = answer_hits(question), {p.title.lower() for p in question.positives if p.title}
    right = [p for p, hit in zip(question.found, hits) if hit]
    positives = [p for p in right if p.title.lower() in titles]
    if not positives:
        positives = [p for p, hit in zip(question.found[:200], hits) if hit][:20]
    wrong = [p for p, hit in zip(question.found, hits) if not hit]
    return positives, wrong[: min(max(10 * len(positives), 50), 150)]


def reranker_samples(
    questions: Sequence[Question], encoder: CrossEncoder
) -> tuple[list[RerankerSample], Counter]:
    """Return the samples, and how many questions were skipped for which reason.

    A question is skipped if it has no positive, no negative, or no positive in which an answer's
    tokens stand before the input is cut.
    """
    samples, skipped = [], Counter()
    for question in questions:
        positives, negatives = choose_passages(question)
        if not positives or not negatives:
            skipped["no positive passage" if not positives else "no negative passage"] += 1
            continue
        (asked,) = encoder.tokens([question.question])
        answers = encoder.tokens(question.answers)
        answers += tokenise(encoder.tokenizer, question.answers, "")  # behind quotation marks
        spans = [find_spans(encoder, asked, passage, answers) for passage in positives]
        if question.answers and not any(spans):
            skipped["no answer tokens in a positive passage"] += 1
            continue
        samples.append(RerankerSample(asked, positives, spans, negatives))
    return samples, skipped


def find_spans(encoder: CrossEncoder, question: list[int], passage: Passage, answers, limit=10):
    """Return (first, last) of each place in the input where the passage has an answer's tokens.

    At most `limit` are returned. Answers that the cut at max_len leaves out are not found.
    """
    title, text = encoder.tokens([passage.title, passage.text])
    start = len(encoder.layout(question, title, [])) - encoder.format.last_separator
    text = text[: encoder.max_len - encoder.format.last_separator - start]
    spans = {}
    for answer in answers:
        for i in range(len(text) - len(answer) + 1):
            if answer and text[i : i + len(answer)] == answer:
                spans[start + i, start + i + len(answer) - 1] = None
    return list(spans)[:limit]


class OnDevice:
    """What the two kinds of batches have in common."""

    def to(self, device):
        """Return a copy with the tensors on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass
class RerankerBatch(OnDevice):
    """The tensors of one step; `rerank.reranker_loss` describes them.

    targets (B,) are zeros: the positive is the first of its group. rows: each question's sample.
    """

    ids: Tensor
    lengths: Tensor
    groups: Tensor
    spans: Tensor
    targets: Tensor
    rows: list[int]

    @property
    def positions(self) -> int:
        """How many positions the loss computes, with padding."""
        parts = loss_parts(self.lengths, self.groups)
        return sum(len(part) * int(self.lengths[part].max()) for part in parts)

    def part(self, rows: Sequence[int]) -> "RerankerBatch":
        """Return some questions of it, with the inputs of their passages."""
        groups, spans, targets = self.groups[rows], self.spans[rows], self.targets[rows]
        used = groups[groups >= 0]  # their inputs, which are now numbered anew
        groups = groups.masked_scatter(groups >= 0, torch.arange(len(used), device=groups.device))
        lengths = self.lengths[used]
        ids, kept = self.ids[used, : int(lengths.max())], [self.rows[row] for row in rows]
        return RerankerBatch(ids, lengths, groups, spans, targets, kept)


@dataclass
class RetrieverBatch(OnDevice):
    """The tensors of one step of the dual encoder.

    ids, lengths                  (B, L), (B,)  the questions
    passage_ids, passage_lengths  (R, L), (R,)  a positive of each question, then hard negatives
    targets, known                (B,), (B, R)  as `retrieve.retriever_loss` takes them
    rows                                        the index of each question
    """

    ids: Tensor
    lengths: Tensor
    passage_ids: Tensor
    passage_lengths: Tensor
    targets: Tensor
    known: Tensor
    rows: list[int]

    def part(self, rows: Sequence[int]) -> "RetrieverBatch":
        """Return some questions of it, with all passages, which all of them choose from."""
        kept = [self.rows[row] for row in rows]
        of_questions = {k: getattr(self, k)[rows] for k in ("ids", "lengths", "targets", "known")}
        return replace(self, **of_questions, rows=kept)


def _epoch_rows(count: int, size: int, seed: int, step: int) -> list[int]:
    """The examples of a step. Each epoch has its own order, and its last batch may be smaller."""
    epoch, index = divmod(step, -(-count // size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[index * size : (index + 1) * size].tolist()


def reranker_batch(
    samples: Sequence[RerankerSample],
    encoder: CrossEncoder,
    size: int,
    passages: int,
    seed: int,
    step: int,
) -> RerankerBatch:
    """Return the batch of a step, a pure function of the arguments.

    Each question comes with one positive, drawn anew each time (the first with an answer, if the
    drawn one has none), and up to `passages` - 1 of its negatives, drawn anew too. DPR: 24.
    """
    rows = _epoch_rows(len(samples), size, seed, step)
    rng, inputs, groups, spans = np.random.default_rng([seed, step, 1]), [], [], []
    for sample in (samples[row] for row in rows):
        drawn = int(rng.integers(len(sample.positives)))
        if any(sample.spans) and not sample.spans[drawn]:
            drawn = next(i for i, some in enumerate(sample.spans) if some)
        count = min(passages - 1, len(sample.negatives))
        wrong = [sample.negatives[i] for i in rng.choice(len(sample.negatives), count, False)]
        chosen = [sample.positives[drawn], *wrong]
        titles, texts = (encoder.tokens([p[i] for p in chosen]) for i in (0, 1))
        groups.append(torch.arange(len(inputs), len(inputs) + len(chosen)))
        spans.append(torch.tensor(sample.spans[drawn], dtype=torch.long).view(-1, 2))
        inputs += [encoder.layout(sample.question, *pair) for pair in zip(titles, texts)]
    groups, spans = (
        torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-1)
        for some in (groups, spans)
    )
    return RerankerBatch(*pad(inputs), groups, spans, torch.zeros(len(rows), dtype=int), rows)


def retriever_questions(questions: Sequence[Question]) -> tuple[list[Question], int]:
    """Return the questions that have a positive, with the passages that the dual encoder learns
    from, and how many have none. The lists of a question are used before what was found for it."""
    kept = []
    for q in questions:
        right, wrong = choose_passages(q)
        if right := q.positives or right:
            wrong = q.hard_negatives or wrong
            kept.append(replace(q, positives=right, hard_negatives=wrong))
    return kept, len(questions) - len(kept)


def retriever_batch(
    questions: Sequence[Question], dual, size: int, hard_negatives: int, seed: int, step: int
) -> RetrieverBatch:
    """Return the batch of a step, a pure function of the arguments. `dual` is a DualEncoder.

    Each question of `retriever_questions` comes with one of its positives and with `hard_negatives`
    of its hard negatives, drawn anew each time. DPR: batches of 128 with one hard negative.
    """
    rows, rng = _epoch_rows(len(questions), size, seed, step), np.random.default_rng([seed, step])
    positives, wrong = [], []
    for question in (questions[row] for row in rows):
        right, hard = question.positives, question.hard_negatives
        positives.append(right[rng.integers(len(right))])
        drawn = rng.choice(len(hard), min(hard_negatives, len(hard)), False) if hard else []
        wrong += [hard[i] for i in drawn]
    passages = [*positives, *wrong]
    known = torch.zeros(len(rows), len(passages), dtype=torch.bool)
    for i, row in enumerate(rows):
        right = {p[:2] for p in questions[row].positives}
        known[i] = torch.tensor([passage[:2] in right for passage in passages])
    asked = pad(dual.question_inputs([questions[row].question for row in rows]))
    targets = torch.arange(len(rows))
    return RetrieverBatch(*asked, *pad(dual.passage_inputs(passages)), targets, known, rows)
