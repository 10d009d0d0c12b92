r"""Files of passages, questions and labelled texts, written in other formats.

    python convert.py passages.jsonl psgs.tsv --to passages
    python convert.py dev.jsonl dpr-results.json --to results --passages passages.jsonl
    python convert.py reviews.jsonl train.jsonl --to prompted --label label \
        --template "Review: {text}\nSentiment:" --choices "0=negative | 1=positive"

The first file is in any form that passages.py reads, --passages is the book that its ids stand for.
With `--to prompted` it holds JSON lines with any keys.

    passages   psgs_w100.tsv, quoted as DPR's own; JSON lines if the name ends in .jsonl
    results    DPR's retrieval results: what was found for each question
    training   DPR's training file: positives, hard negatives and negatives
    nq-open    the questions and answers alone, in JSON lines
    squad      SQuAD 1.1. Each question stands with the first positive that spells one of its
               answers, letter by letter; questions without one are counted and left out
    prompted   examples of a task: {"input", "target", "options"}; see `prompted`

Needs passages.py, checkpoints.py and show.py, and what these need.
"""

import csv
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from show import Parser, run_program, show

from checkpoints import atomic_write, write_lines
from data import P3_KEYS, json_lines, parse_record
from passages import Passage, Question, answer_hits, read_passages, read_questions


def write_passages(path: str | Path, passages: Sequence[Passage]) -> None:
    """Write psgs_w100.tsv, or JSON lines if the name ends so; read_passages reads both.

    A line break or a tab inside a text becomes a space in psgs_w100.tsv, where each ends something.
    """
    if Path(path).suffix.lower() == ".jsonl":
        write_lines(path, [p._asdict() for p in passages])
        return
    blanks = str.maketrans("\t\r\n", "   ")
    with atomic_write(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "text", "title"])
        for p in passages:
            writer.writerow([field.translate(blanks) for field in (p.id, p.text, p.title)])


def results(questions: Sequence[Question]) -> list[dict]:
    """What DPR's dense_retriever.py writes: {"question", "answers", "ctxs": [...]} of each."""
    records = []
    for q in questions:
        found = zip(q.found, q.scores, answer_hits(q))
        ctxs = [
            {"id": p.id, "title": p.title, "text": p.text, "score": str(score), "has_answer": hit}
            for p, score, hit in found
        ]
        records.append({"question": q.question, "answers": q.answers, "ctxs": ctxs})
    return records


def training(questions: Sequence[Question]) -> list[dict]:
    """What DPR's encoders train on: the three lists of passages of each question."""

    def ctxs(passages: Sequence[Passage]) -> list[dict]:
        return [{"title": p.title, "text": p.text, "passage_id": p.id} for p in passages]

    records = []
    for q in questions:
        lists = {"positive_ctxs": ctxs(q.positives), "negative_ctxs": ctxs(q.negatives)}
        lists["hard_negative_ctxs"] = ctxs(q.hard_negatives)
        records.append({"question": q.question, "answers": q.answers} | lists)
    return records


def squad(questions: Sequence[Question]) -> tuple[dict, int]:
    """Return SQuAD 1.1's object and the number of questions that are left out."""
    articles, left_out = {}, 0
    for number, q in enumerate(questions):
        starts = {}
        for passage in q.positives:
            places = {answer: passage.text.find(answer) for answer in q.answers}
            starts = {answer: start for answer, start in places.items() if start >= 0}
            if starts:
                break
        if not starts:
            left_out += 1
            continue
        answers = [{"text": answer, "answer_start": start} for answer, start in starts.items()]
        id = q.id if q.id != q.source else str(number)
        paragraphs = articles.setdefault(passage.title, {})
        asked = {"id": id, "question": q.question, "answers": answers}
        paragraphs.setdefault(passage.text, []).append(asked)
    data = [
        {
            "title": title,
            "paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs.items()],
        }
        for title, paragraphs in articles.items()
    ]
    return {"version": "1.1", "data": data}, left_out


PLACE = re.compile(r"\{([^{}\[\]]+)(?:\[(\w+)\])?\}")  # {KEY}, {KEY[0]}


def prompted(path: str | Path, template: str, label: str, choices: str = "") -> list[dict]:
    """Records of any keys as examples of a prompted task, {"input", "target", "options"}.

    template  the input. {KEY} stands for what a record has there, {KEY[0]} for an element of its
              list or object, and \\n for a line break.
    label     the key of the target
    choices   "VALUE=WORDS | VALUE=WORDS": the words for each value of the label, as JSON writes it.
              They are the options, and may have {KEY}, too. If a record's list is too short for
              one, the record has an option less. Without choices the target is the value, and there
              are no options.

    ValueError, which names file and line, if a record lacks a key or has another value.
    """
    words_of, rows = read_choices(choices), []
    for source, record in json_lines(path):
        value, options = as_text(record.get(P3_KEYS.get(label, label)), f"{source}: {label}"), {}
        try:
            text = fill(template, record, source)
        except IndexError:
            raise ValueError(f"{source}: a list is too short for --template") from None
        for of, words in words_of.items():
            with suppress(IndexError):
                options[of] = fill(words, record, source)
        if words_of and number_or_text(value) not in options:
            raise ValueError(f"{source}: {label} is {value}, which --choices has no words for")
        row = {"input": text, "target": options.get(number_or_text(value), value)}
        if words_of:
            row["options"] = [*dict.fromkeys(options.values())]
            if len(row["options"]) < 2:
                raise ValueError(f"{source}: --choices gives one option, {row['target']}")
        parse_record(row, source)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no examples")
    return rows


def read_choices(choices: str) -> dict:
    """{value: words} of --choices. ValueError if a value has no words, or twice some."""
    words_of = {}
    for choice in choices.split("|") if choices else []:
        value, _, words = choice.partition("=")
        value = number_or_text(value.strip())
        if not words.strip() or value in words_of:
            raise ValueError(f"--choices: {choice.strip()!r} is not VALUE=WORDS, or VALUE is taken")
        words_of[value] = words.strip()
    return words_of


def number_or_text(value: str) -> float | str:
    """A number if it is written like one: 1 and 1.0 are the same label."""
    return float(value) if re.fullmatch(r"-?\d+(\.\d+)?", value) else value


def fill(template: str, record: dict, source: str) -> str:
    """The template with what the record has at each PLACE. IndexError if a list is too short."""

    def found(match: re.Match) -> str:
        key, part = match.groups()
        value, name = record.get(P3_KEYS.get(key, key)), f"{source}: {match[0]}"
        if part is not None and isinstance(value, list) and part.isdecimal():
            value = value[int(part)]
        elif part is not None:
            value = value.get(part) if isinstance(value, dict) else None
        return as_text(value, name)

    return PLACE.sub(found, template.replace("\\n", "\n"))


def as_text(value, name: str) -> str:
    """A text, number or truth value as a text. ValueError if it is something else, or None."""
    if value is None or isinstance(value, (list, dict)):
        raise ValueError(f"{name}: there is no text or number, but {json.dumps(value)}")
    return value if isinstance(value, str) else json.dumps(value)


def write_questions(path: str | Path, questions: Sequence[Question], form: str) -> int:
    """Write questions as `form`, one of FORMS. Returns how many of them are left out."""
    if form == "nq-open":
        write_lines(path, [{"question": q.question, "answer": q.answers} for q in questions])
        return 0
    record, left_out = squad(questions) if form == "squad" else (FORMS[form](questions), 0)
    indent = None if form == "squad" else 1  # SQuAD's files have one line
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    return left_out


FORMS = {"results": results, "training": training, "nq-open": None, "squad": squad}


def main(argv: list[str] | None = None) -> int:
    """Convert a file. Returns how many questions are left out. FileExistsError if OUT exists."""
    parser = Parser(prog="convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="passages, questions, or JSON lines with labels")
    parser.add_argument("out", help="the file to write")
    forms = ["passages", *FORMS, "prompted"]
    parser.add_argument("--to", required=True, choices=forms, help="its format")
    parser.add_argument("--passages", help="the passages that ids in the questions stand for")
    parser.add_argument("--template", help="of a prompted task: its input, with {KEY}")
    parser.add_argument("--label", help="of a prompted task: the key of the target")
    words = 'the words for its labels: --choices="VALUE=WORDS | VALUE=WORDS"'
    parser.add_argument("--choices", default="", help=words)
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists; choose another file")
    needed, given = (args.template, args.label), (args.template, args.label, args.choices)
    if not all(needed) if args.to == "prompted" else any(given):
        parser.error("--to prompted needs --template and --label, other formats have no such flags")
    if args.to == "prompted" and not PLACE.search(args.template):
        parser.error("--template has no {KEY}, so all inputs would be the same")
    if args.to == "prompted":
        rows = prompted(args.file, args.template, args.label, args.choices)
        write_lines(args.out, rows)
        show(f"{args.out}: {len(rows)} examples", result=True)
        return 0
    if args.to == "passages":
        passages = read_passages(args.file)
        write_passages(args.out, passages)
        show(f"{args.out}: {len(passages)} passages", result=True)
        return 0
    book = read_passages(args.passages) if args.passages else ()
    questions = read_questions(args.file, book)
    left_out = write_questions(args.out, questions, args.to)
    show(f"{args.out}: {len(questions) - left_out} questions, {left_out} left out", result=True)
    return left_out


if __name__ == "__main__":
    run_program("convert.py", main)
