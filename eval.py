"""Metrics of short answers and of passages, and their significance: the paired bootstrap.

Exact match and F1 are those of SQuAD v1.1 (Rajpurkar et al. 2016). Questions in the project's
format are compared after NFD, as the scorer of Natural Questions open does. A choice among options
is right or wrong as a whole. The significance test is the paired bootstrap (Koehn 2004). Functions
and files hold scores from 0 to 1; printed scores are in percent.

The metrics need nothing from the other files. Their examples are any objects with the attributes
id, task, input, answers and, where there is a choice, options. A run is a folder whose
predictions.jsonl has one line per test example:

    {"id": "7", "task": "nq", "input": "who wrote it?", "prediction": "the bard",
     "answers": ["Bard"], "em": 1.0, "f1": 1.0}

    python eval.py compare runs/a runs/b

takes under a second for 300 examples of two tasks and prints these rows, and then the same of F1:

    metric  task      n       a       b    a - b  [95 % interval]       p
    EM      all     300   58.33   50.00    +8.33  [ +3.00, +13.67]  0.0018
    EM      nq      200   62.50   50.00   +12.50  [ +4.50, +20.00]  0.0020
    EM      quiz    100   50.00   50.00    +0.00  [ +0.00,  +0.00]  1.0000
"""

import argparse
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

METRICS = ("em", "f1")

# Metrics


def normalise(text: str, form: str | None = None) -> str:
    """Normalise an answer as SQuAD v1.1's script does.

    Lower-case, delete ASCII punctuation, delete the articles a, an and the, and collapse white
    space, in this order. Punctuation is deleted and not replaced by a space: "U.S.A." becomes
    "usa", and "a-the" becomes the word "athe". Accents and other punctuation stay. `form` is a
    Unicode normal form that comes first: None in SQuAD, "NFD" in Natural Questions open, where an
    accented letter equals the letter followed by the accent.
    """
    if form is not None:
        text = unicodedata.normalize(form, text)
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str], form: str | None = None) -> float:
    """Return 1.0 if the normalised prediction equals a normalised answer, else 0.0 (SQuAD v1.1).

    ValueError if `answers` is empty or a bare string.
    """
    _check_answers(answers)
    return float(normalise(prediction, form) in [normalise(answer, form) for answer in answers])


def token_f1(prediction: str, answers: Sequence[str], form: str | None = None) -> float:
    """Return the F1 of the bags of normalised words, the maximum over the answers (SQuAD v1.1).

    If prediction and answer are both empty after normalisation ("The" and "a"), the score is 1.0,
    so F1 is never below exact match. (There v1.1's script returns 0, and v2.0's returns 1.)
    ValueError if `answers` is empty or a bare string.
    """
    _check_answers(answers)
    predicted = normalise(prediction, form).split()
    return max(_f1(predicted, normalise(answer, form).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted and not gold:
        return 1.0
    overlap = sum((Counter(predicted) & Counter(gold)).values())
    # F1 = 2PR / (P + R) with P = overlap / |predicted| and R = overlap / |gold|.
    return 2 * overlap / (len(predicted) + len(gold))


def _check_answers(answers: Sequence[str]) -> None:
    # A bare string would pass for a list of one-letter answers, and nearly every score would be 0.
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list with at least one answer, got {answers!r}")


def rouge(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, maximum over answers."""
    best, a = 0.0, re.findall("[a-z0-9]+", prediction.lower())
    for answer in answers:
        b = re.findall("[a-z0-9]+", answer.lower())
        row = [0] * (len(b) + 1)  # row[j]: the longest of the words so far and of b[:j]
        for x in a:
            diagonal = 0
            for j, y in enumerate(b, 1):
                diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
        best = max(best, 2 * row[-1] / max(1, len(a) + len(b)))
    return best


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether an answer's words stand in the text one after the other, as in DPR.

    Both are NFD-normalised, cut into runs of letters, digits and marks and into other single
    characters, and lower-cased. `text` is the passage without its title.
    """
    passage, found = _joined_tokens(text), map(_joined_tokens, answers)
    return any(len(answer) > 1 and answer in passage for answer in found)


@lru_cache(maxsize=50_000)
def _joined_tokens(text: str) -> str:
    tokens = _answer_tokens().findall(unicodedata.normalize("NFD", text))
    return "\n".join(["", *tokens, ""]).lower()


@lru_cache(maxsize=1)
def _answer_tokens() -> re.Pattern:
    """DPR's [\\p{L}\\p{N}\\p{M}]+|[^\\p{Z}\\p{C}] for Python's re, which has no Unicode classes."""
    classes = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    ranges = {}
    for name, category in (("word", "[LNM]+"), ("blank", "[ZC]+")):
        spans = ((m.start(), m.end() - 1) for m in re.finditer(category, classes))
        ranges[name] = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in spans)
    return re.compile(f"[{ranges['word']}]+|[^{ranges['blank']}]")


def recall_at(hits: Sequence[Sequence[bool]], k: int) -> float:
    """The share of questions with a hit among the first k passages. hits: a row per question."""
    return sum(any(row[:k]) for row in hits) / len(hits)


def average_relative_gain(datasets: dict[str, dict[str, dict]]) -> float:
    """Mean over datasets of the mean over templates of (accuracy - chance) / chance.

    The two-level mean of the code of Wu et al. 2022. {dataset: {template: {"accuracy", "chance"}}}
    """
    means = []
    for templates in datasets.values():
        gains = [(t["accuracy"] - t["chance"]) / t["chance"] for t in templates.values()]
        means.append(np.mean(gains))
    return float(np.mean(means))


# Significance


def paired_bootstrap(a, b, iters: int = 10_000, seed: int = 0) -> tuple[float, float, float, float]:
    """Estimate the difference of two systems, and whether chance explains it.

    Returns (difference, low, high, p).

    a, b        scores on the same examples in the same order, (examples,), or (seeds, examples)
                for several training runs of each system; the numbers of seeds may differ
    difference  mean(a) - mean(b)
    low, high   its 95 % percentile interval over `iters` resampled data sets
    p           two-sided: two times the smaller of two fractions, and at most 1. These are the
                fractions of resampled differences <= 0 and >= 0, each (count + 1) / (iters + 1)

    Each resampling draws the same examples for both systems: this is the pairing. It draws the
    seeds of each system separately, because run 0 of a and run 0 of b have nothing in common. With
    few seeds the variance between seeds is underestimated by the factor (seeds - 1) / seeds.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 15; Koehn,
    Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004). ValueError if
    the shapes do not pair, the scores are empty or not finite, or iters < 1.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    _check_scores(a, b, iters)
    a, b = np.atleast_2d(a), np.atleast_2d(b)  # (seeds, examples)
    rng, examples = np.random.default_rng(seed), a.shape[1]
    # The iterations are computed in chunks, so that no array is much larger than 8 MiB.
    chunk = max(1, 2**20 // max(examples, len(a), len(b)))
    resampled = []
    for start in range(0, iters, chunk):
        size = min(chunk, iters - start)
        gap = _resample_seeds(a, size, rng) - _resample_seeds(b, size, rng)  # (size, examples)
        columns = rng.integers(examples, size=(size, examples))
        resampled.append(np.take_along_axis(gap, columns, axis=1).mean(axis=1))
    # 0.1 + 0.2 - 0.3 is 6e-17 in floats. Rounding keeps such a tie on both sides of the count.
    resampled = np.round(np.concatenate(resampled), 12)
    low, high = np.percentile(resampled, [2.5, 97.5])
    fewer = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (fewer + 1) / (iters + 1))
    return float(a.mean() - b.mean()), float(low), float(high), float(p)


def _check_scores(a: np.ndarray, b: np.ndarray, iters: int) -> None:
    pair = a.ndim == b.ndim and a.ndim in (1, 2) and a.shape[-1] == b.shape[-1]
    if not pair or not a.size or not b.size:
        raise ValueError(
            "a and b must be (examples,) or (seeds, examples) over the same examples, "
            f"got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite numbers")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters}")


def _resample_seeds(scores: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    # A mean of drawn rows is a product with the number of times that each row was drawn. Gathering
    # the rows would need an array of (size, seeds, examples).
    seeds = len(scores)
    counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)  # (size, seeds)
    return counts @ scores / seeds  # (size, examples)


# Predictions


def score(examples: Sequence, predictions: Sequence[str | int]) -> list[dict]:
    """Return a record for each example, in order: the lines of predictions.jsonl.

    A prediction is a text, or the index of the chosen one of the example's options. A record is
    {"id", "task", "input", "prediction": text, "answers", "em", "f1"}, in a suite with "template"
    and "cluster". ValueError if the numbers of examples and predictions differ, or an example has
    no answers.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(examples)} examples but {len(predictions)} predictions")
    records = []
    for e, prediction in zip(examples, predictions):
        try:
            text, em, f1 = _score_one(e, prediction)
        except ValueError as error:
            raise ValueError(f"example {e.id!r} of task {e.task!r}: {error}") from None
        record = {"id": e.id, "task": e.task, "input": e.input, "prediction": text}
        suite = {k: getattr(e, k, "") for k in ("template", "cluster") if getattr(e, k, "")}
        records.append(record | {"answers": list(e.answers), "em": em, "f1": f1} | suite)
    return records


def _score_one(e, prediction: str | int) -> tuple[str, float, float]:
    """Return the prediction as a text, its exact match and its F1."""
    if isinstance(prediction, str):
        form = "NFD" if is_question(e.input) else None  # see `normalise`
        em = exact_match(prediction, e.answers, form)
        return prediction, em, token_f1(prediction, e.answers, form)
    # Options may differ only in what `normalise` deletes: "-5" and "5". Words that a wrong option
    # shares with the answer are not the model's, so they earn no F1.
    _check_answers(e.answers)
    chosen = e.options[prediction]
    right = float(chosen in e.answers)
    return chosen, right, right


def is_question(text: str) -> bool:
    """Return whether a text has the format of data.question_text. Spaces may follow it."""
    return text.startswith("Q: ") and text.rstrip(" ").endswith("?\nA:")


def stops(examples: Sequence, stop: str | None = None) -> list[str]:
    """Return the text that ends the answer to each example; "" is none.

    It is `stop` for all of them. If `stop` is None, it is a newline for questions in the project's
    format, and "" for other inputs, whatever the accepted answers are: they are not always known.
    The two letters \\n in `stop` stand for a newline, which is hard to type.
    """
    if stop is not None:
        return [stop.replace("\\n", "\n")] * len(examples)
    return ["\n" if is_question(e.input) else "" for e in examples]


def summary(records: list[dict]) -> dict:
    """Return {"em": mean, "f1": mean, "n": count, "tasks": {task: {"em", "f1", "n"}}}.

    The overall means are over examples, so a large task weighs more than a small one. Tasks come
    in the order of their first record. ValueError if the list is empty.
    """
    if not records:
        raise ValueError("no records to summarise")
    tasks = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    return _means(records) | {"tasks": {task: _means(group) for task, group in tasks.items()}}


def _means(records: list[dict]) -> dict:
    means = {metric: sum(r[metric] for r in records) / len(records) for metric in METRICS}
    return means | {"n": len(records)}


def compare(run_a, run_b, iters: int = 10_000, seed: int = 0) -> list[dict]:
    """Compare the predictions of two run folders. Prints a table and returns its rows.

    There is a row for each metric over all examples and, if there are several tasks, over each
    task: {"metric", "task" (None for all), "n", "a", "b", "difference", "low", "high", "p"}, with
    scores from 0 to 1 (see `paired_bootstrap`). Examples are paired by task and id. ValueError if
    a run has no predictions, or if the runs have different examples, inputs or answers.
    """
    from runs import read_predictions

    needed = ("input", "answers", *METRICS)
    records_a, records_b = (read_predictions(run, needed) for run in (run_a, run_b))
    if not records_a or not records_b:
        raise ValueError(f"{run_b if records_a else run_a}/predictions.jsonl: no predictions")
    pairs = _pair(records_a, records_b, run_a, run_b)
    tasks = {}
    for pair in pairs:
        tasks.setdefault(pair[0]["task"], []).append(pair)
    parts = {None: pairs} | (tasks if len(tasks) > 1 else {})
    rows = []
    for metric in METRICS:
        for task, part in parts.items():
            a, b = np.array([[x[metric], y[metric]] for x, y in part], dtype=np.float64).T
            difference, low, high, p = paired_bootstrap(a, b, iters, seed)
            row = {"metric": metric, "task": task, "n": len(part)}
            row |= {"a": float(a.mean()), "b": float(b.mean())}
            rows.append(row | {"difference": difference, "low": low, "high": high, "p": p})
    _print_rows(rows, _notes(run_a, run_b, pairs))
    return rows


def _notes(run_a, run_b, pairs: list[tuple[dict, dict]]) -> list[str]:
    """Return what the table does not say: that a is b, or that they were asked in other ways."""
    notes = ["a and b hold the same predictions"] if all(x == y for x, y in pairs) else []
    a, b = (_arguments(run) for run in (run_a, run_b))
    keys = ("stop", "shots", "shots_from", "max_new_tokens", "rank_by") if a and b else ()
    differences = [
        f"--{key.replace('_', '-')} {a.get(key)!r} and {b.get(key)!r}"
        for key in keys
        if a.get(key) != b.get(key)
    ]
    if differences:
        notes.append(f"a and b were not asked in the same way: {', '.join(differences)}")
    return notes


def _arguments(run) -> dict:
    """Return the arguments in score.json or run.json, {} if there is neither."""
    from families import OBJECT, check_keys, read_json

    for path in (Path(run) / "score.json", Path(run) / "run.json"):
        if path.is_file():
            check_keys(path, record := read_json(path), {"arguments": OBJECT}, ["arguments"])
            return record["arguments"]
    return {}


def _pair(records_a: list[dict], records_b: list[dict], run_a, run_b) -> list[tuple[dict, dict]]:
    a, b = ({(r["task"], r["id"]): r for r in part} for part in (records_a, records_b))
    alone = [key for key in [*a, *b] if key not in a or key not in b]
    if alone:
        (task, id), both = alone[0], len(a.keys() & b.keys())
        here, there = (run_a, run_b) if alone[0] in a else (run_b, run_a)
        raise ValueError(
            f"the runs hold different examples: {len(a)} in {run_a}, {len(b)} in {run_b}, and "
            f"{both} are in both; id {id!r} of task {task!r} is in {here} but not in {there}"
        )
    for task, id in a:
        for key in ("input", "answers"):
            here, there = a[task, id][key], b[task, id][key]
            if here != there:
                raise ValueError(
                    f"the runs have different {key} for id {id!r} of task {task!r}: "
                    f"{here!r:.90} in {run_a}, {there!r:.90} in {run_b}"
                )
    return [(a[key], b[key]) for key in a]


def _print_rows(rows: list[dict], notes: list[str]) -> None:
    from show import show

    width = max(len(row["task"] or "all") for row in rows)
    header = f"metric  {'task':<{width}}  {'n':>5}  {'a':>6}  {'b':>6}"
    show(f"{header}  {'a - b':>7}  [95 % interval]       p", result=True)
    for row in rows:
        a, b, gap, low, high = (100 * row[c] for c in ("a", "b", "difference", "low", "high"))
        line = f"{row['metric'].upper():<6}  {row['task'] or 'all':<{width}}  {row['n']:>5}"
        line += f"  {a:6.2f}  {b:6.2f}  {gap:+7.2f}"
        show(f"{line}  [{low:+6.2f}, {high:+6.2f}]  {row['p']:.4f}", result=True)
    for note in notes:
        show(note, result=True)


# Command line


def ask_command(args: argparse.Namespace) -> list[str]:
    """Answer questions with a run or the bare LM; print and return the answers."""
    from show import show

    import questions

    model, prefix, tokenizer, record = questions.load_model(args)
    # False if the inputs that the run was trained on had another format.
    form = record.get("question_format", True)
    examples = [questions.plain_question(text, form) for text in args.question]
    if args.input:
        examples += questions.read_questions(args.input, form)
    if not examples or not all(e.id.strip() for e in examples):
        how = "give one in quotation marks, or a file of questions with --input"
        raise ValueError(f"no question, or an empty one: {how}")
    answers = []
    for e, answer in zip(examples, questions.answer(args, model, prefix, tokenizer, examples)):
        answers.append(answer if isinstance(answer, str) else e.options[answer])
        line = one_line(answers[-1])
        show(line if len(examples) == 1 else f"{one_line(e.id)}\t{line}", result=True)
    return answers


def score_command(args: argparse.Namespace) -> dict:
    """Answer a file of examples; print and return the summary of the scores."""
    from show import show

    import data
    import questions

    questions.check_out(args.out)
    model, prefix, tokenizer, _ = questions.load_model(args)
    examples = data.read(args.file)
    examples = [examples[row] for row in data.sample(len(examples), args.limit, args.seed)]
    records = score(examples, questions.answer(args, model, prefix, tokenizer, examples))
    for record in records[:3]:
        shown = f"{one_line(record['input'])[-200:]} {one_line(record['prediction'])}"
        answers = one_line(", ".join(record["answers"]))
        show(f"{shown}   (accepted: {answers})", result=not args.out)
    return questions.finish_scores(args, model, tokenizer, records)


def one_line(text: str) -> str:
    """Return a text without line ends and tabs, which would end a line or a column of output."""
    return " ".join(line.strip() for line in text.expandtabs(1).splitlines())


def _parser() -> argparse.ArgumentParser:
    from show import COUNT, SEED, Parser  # before torch

    from prompts import add_commands  # the flags of mixed, explain and templates

    parser = Parser(prog="eval.py", description="Compare runs, and use what they trained.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("compare", help="paired bootstrap between two runs")
    command.set_defaults(function=lambda a: compare(a.run_a, a.run_b, a.iters, a.seed))
    command.add_argument("run_a", help="run folder of system a, or --out of score")
    command.add_argument("run_b", help="run folder of system b, or --out of score")
    command.add_argument("--iters", type=COUNT, default=10_000, help="resamples")
    command.add_argument("--seed", type=SEED, default=0, help="of the resampling")

    command = commands.add_parser("ask", help="answer questions with a run or the bare LM")
    command.set_defaults(function=ask_command)
    questions = "each in quotation marks; used as it is if the run was trained on inputs"
    command.add_argument("question", nargs="*", help=questions)
    file = "a file of questions, one a line, or JSONL of examples, whose answers are not needed"
    command.add_argument("--input", help=file)
    _add_run_flags(command)

    command = commands.add_parser("score", help="score a run or the bare LM on a file of examples")
    command.set_defaults(function=score_command)
    command.add_argument("file", help="examples; of options, the likeliest is the answer")
    command.add_argument("--limit", type=COUNT, help="score that many, sampled with --seed")
    command.add_argument("--out", help="folder for predictions.jsonl and score.json")
    _add_run_flags(command)
    add_commands(commands)
    return parser


def add_answer_flags(command: argparse.ArgumentParser) -> None:
    """How questions are answered. What is not given is the run's own."""
    from show import COUNT

    model = "the LM's checkpoint, if a run's has moved; the embedded LM if neither is given"
    command.add_argument("--model", help=model)
    stop = "text that ends an answer, '' for none; if not given, the run's, a newline for questions"
    command.add_argument("--stop", help=stop)
    new = "tokens of an answer; if not given, as many as the run's, or 16"
    command.add_argument("--max-new-tokens", type=COUNT, help=new)
    rank = "of an answer choice's log-probabilities; if not given, the run's, or sum"
    command.add_argument("--rank-by", choices=["sum", "mean"], help=rank)
    budget = "tokens in a batch, options included"
    command.add_argument("--eval-tokens", type=COUNT, default=8192, help=budget)


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    """The flags that `ask` and `score` share."""
    from show import COUNT, SEED

    command.add_argument("--run", help="run folder; the bare LM if not given")
    add_answer_flags(command)
    command.add_argument("--shots", type=COUNT, help="examples that stand before every question")
    command.add_argument("--shots-from", help="the file that they are sampled from")
    command.add_argument("--seed", type=SEED, default=0, help="of samples of examples")
    one = "neural_recursion: one pass answers if its log-probability is at least this"
    command.add_argument("--threshold", type=float, help=one)


def main(argv: list[str] | None = None):
    """Run a command and return its result. Bad input ends with one line and exit status 2."""
    from show import run_program

    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = argv
    return run_program(f"eval.py {args.command}", lambda: args.function(args))


if __name__ == "__main__":
    main()
