"""Metrics and significance for short-answer tasks: exact match, token F1, paired bootstrap, and the comparison of two runs.

The metrics are those of SQuAD v1.1 (Rajpurkar et al. 2016) as Natural Questions open uses them; the significance test is the paired
bootstrap (Koehn 2004). Scores are fractions from 0 to 1 in every function and file; only what is printed is in percent.

Needs nothing from its neighbours: examples are any objects with the attributes id, task, input and answers. A run is a folder whose
predictions.jsonl holds one line per test example:

    {"id": "7", "task": "nq", "input": "who wrote it?", "prediction": "the bard", "answers": ["Bard"], "em": 1.0, "f1": 1.0}

    python eval.py compare runs/a runs/b

For two runs over 300 examples of two tasks this takes under a second and prints, with the interval and p of the difference a - b:

    metric  task      n       a       b    a - b  [95 % interval]       p
    EM      all     300   58.33   50.00    +8.33  [ +3.00, +13.67]  0.0018
    EM      nq      200   62.50   50.00   +12.50  [ +4.50, +20.00]  0.0020
    EM      quiz    100   50.00   50.00    +0.00  [ +0.00,  +0.00]  1.0000
"""

import argparse
import json
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------- metrics


def normalise(text: str) -> str:
    """Lower-case, delete ASCII punctuation, delete the articles a, an, the, collapse whitespace, in this order (SQuAD v1.1's evaluate).

    The order matters: "U.S.A." becomes "usa" because punctuation is deleted, not turned into a space, and "a-the" becomes the word "athe",
    which is no article. Other scripts' punctuation and accents stay: there is no Unicode normalisation, as in the published scores.
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 if the normalised prediction equals any normalised accepted answer, else 0.0 (SQuAD v1.1). ValueError if there is no answer."""
    return max(float(normalise(prediction) == normalise(answer)) for answer in _accepted(answers))


def token_f1(prediction: str, answers: list[str]) -> float:
    """Harmonic mean of the precision and recall of the bag of normalised words, from 0 to 1, maximum over the answers (SQuAD v1.1).

    If prediction and answer are both empty after normalisation ("The" against "a") the score is 1.0, so that F1 is never below exact
    match; SQuAD v1.1's script divides by zero overlap there and says 0, v2.0's says 1. ValueError if there is no answer.
    """
    return max(
        _f1(normalise(prediction).split(), normalise(answer).split())
        for answer in _accepted(answers)
    )


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted and not gold:
        return 1.0
    overlap = sum((Counter(predicted) & Counter(gold)).values())
    return (
        2 * overlap / (len(predicted) + len(gold))
    )  # = 2PR / (P + R) with P = overlap / |predicted|, R = overlap / |gold|


def _accepted(answers: list[str]) -> list[str]:
    # A bare string would be read as a list of one-letter answers, and nearly every score would silently be 0.
    if isinstance(answers, str) or not answers:
        raise ValueError(
            f"answers must be a list with at least one accepted answer, got {answers!r}"
        )
    return answers


# ----------------------------------------------------------------------------------------------------------- significance


def paired_bootstrap(a, b, iters: int = 10_000, seed: int = 0) -> tuple[float, float, float, float]:
    """Is system a better than system b on these examples? -> (difference, low, high, p), the first three in the unit of the scores.

    a, b: scores of the two systems on the same examples in the same order, (examples,), or (seeds, examples) for several training runs
    of each. difference = mean(a) - mean(b); low and high are its 95 % percentile interval over resampled data; p is two-sided,
    min(1, 2 min(share of resampled differences <= 0, share >= 0)), each share (count + 1) / (iters + 1), so p is at least 2 / (iters + 1).

    Examples are resampled with the same indices for both systems: that is the pairing. Seeds are resampled together with them but for
    each system on its own, because run 0 of a and run 0 of b share nothing; the numbers of seeds may differ. With few seeds the spread
    between seeds is underestimated (its variance by the factor (seeds - 1) / seeds); one seed is the one-dimensional test.

    Sources: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 15; Koehn, Statistical Significance Tests for
    Machine Translation Evaluation (EMNLP 2004). ValueError if shapes do not pair, data are empty or not finite, or iters < 1.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if (
        a.ndim not in (1, 2)
        or a.ndim != b.ndim
        or a.shape[-1] != b.shape[-1]
        or not a.size
        or not b.size
    ):
        raise ValueError(
            f"a and b must be (examples,) or (seeds, examples) over the same examples, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite numbers")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters}")
    a, b = np.atleast_2d(a), np.atleast_2d(b)  # (seeds, examples)
    rng, examples = np.random.default_rng(seed), a.shape[1]
    chunk = max(
        1, 2**20 // max(examples, len(a), len(b))
    )  # iterations at a time: no array below exceeds 8 MiB by more than one row
    resampled = []
    for start in range(0, iters, chunk):
        size = min(chunk, iters - start)
        gap = _resampled_seeds(a, size, rng) - _resampled_seeds(b, size, rng)  # (size, examples)
        columns = rng.integers(examples, size=(size, examples))
        resampled.append(np.take_along_axis(gap, columns, axis=1).mean(axis=1))
    # 0.1 + 0.2 - 0.3 is 6e-17; rounding keeps such a tie on both sides of the count below.
    resampled = np.round(np.concatenate(resampled), 12)
    low, high = np.percentile(resampled, [2.5, 97.5])
    fewer_side = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (fewer_side + 1) / (iters + 1))
    return float(a.mean() - b.mean()), float(low), float(high), float(p)


def _resampled_seeds(scores: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    # The mean over drawn rows as a product with how often each was drawn: gathering the rows would cost (size, seeds, examples).
    seeds = len(scores)
    counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)  # (size, seeds)
    return counts @ scores / seeds  # (size, examples)


# ------------------------------------------------------------------------------------------------------------------- runs

METRICS = ("em", "f1")
KINDS = {
    "id": (str, int),
    "task": (str,),
    "input": (str,),
    "prediction": (str,),
    "answers": (list,),
    "em": (int, float),
    "f1": (int, float),
}


def score(examples, predictions: list[str]) -> list[dict]:
    """One record per example, in order: {"id", "task", "input", "prediction", "answers", "em", "f1"}, the lines of predictions.jsonl.

    examples: objects with the attributes id, task, input and answers (a list of strings); predictions: as many strings. ValueError if the
    numbers differ or an example has no answer.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(examples)} examples but {len(predictions)} predictions")
    records = []
    for example, prediction in zip(examples, predictions):
        try:
            em, f1 = exact_match(prediction, example.answers), token_f1(prediction, example.answers)
        except ValueError as error:
            raise ValueError(f"example {example.id!r} of task {example.task!r}: {error}") from None
        records.append(
            {
                "id": example.id,
                "task": example.task,
                "input": example.input,
                "prediction": prediction,
                "answers": list(example.answers),
                "em": em,
                "f1": f1,
            }
        )
    return records


def summary(records: list[dict]) -> dict:
    """{"em": mean, "f1": mean, "n": count, "tasks": {task: {"em", "f1", "n"}}}, means from 0 to 1. ValueError if there are no records.

    The overall mean is over examples, so that a large task weighs more than a small one; tasks come in the order of their first record.
    """
    if not records:
        raise ValueError("no records to summarise")
    return {
        **_means(records),
        "tasks": {task: _means(group) for task, group in _by_task(records).items()},
    }


def _means(records: list[dict]) -> dict:
    return {
        **{metric: sum(r[metric] for r in records) / len(records) for metric in METRICS},
        "n": len(records),
    }


def _by_task(records: list[dict]) -> dict[str, list[dict]]:
    groups = {}
    for record in records:
        groups.setdefault(record["task"], []).append(record)
    return groups


def read_predictions(run_dir) -> list[dict]:
    """The records (see `score`) in run_dir/predictions.jsonl, in file order; a pair of task and id occurs once.

    FileNotFoundError if there is no such file; ValueError, one line that names file and line, for anything that is not such a record.
    """
    path = Path(run_dir) / "predictions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run writes it when it has been tested")
    records, line_of = [], {}
    # Bytes, split at "\n" only: a text file's own decoding errors name no line.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            record = _checked(json.loads(line.decode("utf-8")))
            first = line_of.setdefault((record["task"], record["id"]), number)
            if first != number:
                raise ValueError(
                    f"id {record['id']!r} of task {record['task']!r} is already on line {first}"
                )
        except ValueError as error:  # also what json and decode raise
            raise ValueError(f"{path}:{number}: {error}") from None
        records.append(record)
    return records


def _checked(record) -> dict:
    if not isinstance(record, dict):
        raise ValueError("a line must be a JSON object")
    for key, kinds in KINDS.items():
        if key not in record:
            raise ValueError(f"key {key!r} is missing")
        if type(record[key]) not in kinds:  # not isinstance: true and false are ints to Python
            raise ValueError(
                f"key {key!r} must be {' or '.join(kind.__name__ for kind in kinds)}, got {record[key]!r}"
            )
    if not record["answers"] or not all(isinstance(answer, str) for answer in record["answers"]):
        raise ValueError(
            f"key 'answers' must be a list with at least one string, got {record['answers']!r}"
        )
    for metric in METRICS:
        if not 0 <= record[metric] <= 1:  # NaN is refused too
            raise ValueError(f"key {metric!r} must be from 0 to 1, got {record[metric]!r}")
    return record


def compare(run_a, run_b, iters: int = 10_000, seed: int = 0) -> list[dict]:
    """Print, and return as rows, the paired comparison of two run folders: EM and F1, over all examples and (if several) per task.

    A row is {"metric", "task" (None for all), "n", "a", "b", "difference", "low", "high", "p"}, scores from 0 to 1; see `paired_bootstrap`
    for iters, seed and the last four. Examples are paired by task and id, whatever their order. ValueError if the runs do not hold the
    same examples with the same answers; inputs may differ, since methods prepare them differently.
    """
    pairs = _paired(read_predictions(run_a), read_predictions(run_b), run_a, run_b)
    groups = {}
    for a, b in pairs:
        groups.setdefault(a["task"], []).append((a, b))
    parts = [(None, pairs)] + (list(groups.items()) if len(groups) > 1 else [])
    rows = []
    for metric in METRICS:
        for task, part in parts:
            a, b = np.array([[x[metric], y[metric]] for x, y in part], dtype=np.float64).T
            difference, low, high, p = paired_bootstrap(a, b, iters, seed)
            rows.append(
                {
                    "metric": metric,
                    "task": task,
                    "n": len(part),
                    "a": float(a.mean()),
                    "b": float(b.mean()),
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "p": p,
                }
            )
    _print_rows(rows)
    return rows


def _paired(records_a: list[dict], records_b: list[dict], run_a, run_b) -> list[tuple[dict, dict]]:
    by_key_a, by_key_b = (
        {(r["task"], r["id"]): r for r in records} for records in (records_a, records_b)
    )
    for here, there, run_here, run_there in (
        (by_key_a, by_key_b, run_a, run_b),
        (by_key_b, by_key_a, run_b, run_a),
    ):
        for task, id in here:
            if (task, id) not in there:
                raise ValueError(
                    f"the runs hold different examples: id {id!r} of task {task!r} is in {run_here} but not in {run_there}"
                )
    for (task, id), a in by_key_a.items():
        if a["answers"] != (answers := by_key_b[task, id]["answers"]):
            raise ValueError(
                f"the runs have different answers for id {id!r} of task {task!r}: {a['answers']} in {run_a}, {answers} in {run_b}"
            )
    return [(a, by_key_b[key]) for key, a in by_key_a.items()]


def _print_rows(rows: list[dict]) -> None:
    width = max(len(row["task"] or "all") for row in rows)
    print(
        f"metric  {'task':<{width}}  {'n':>5}  {'a':>6}  {'b':>6}  {'a - b':>7}  [95 % interval]       p"
    )
    for row in rows:
        a, b, difference, low, high = (
            100 * row[key] for key in ("a", "b", "difference", "low", "high")
        )
        print(
            f"{row['metric'].upper():<6}  {row['task'] or 'all':<{width}}  {row['n']:>5}  {a:6.2f}  {b:6.2f}  {difference:+7.2f}"
            f"  [{low:+6.2f}, {high:+6.2f}]  {row['p']:.4f}"
        )


# ----------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage; also for the sub-commands, which are parsers of their own."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None):
    """Run one sub-command and return its result. Bad input: one line on stderr and exit status 2."""
    parser = Parser(prog="eval.py", description="Compare runs, and use what they trained.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "compare", help="paired bootstrap between the test predictions of two runs"
    )
    command.add_argument("run_a", help="run folder of system a")
    command.add_argument("run_b", help="run folder of system b")
    command.add_argument(
        "--iters",
        type=int,
        default=10_000,
        help="bootstrap resamples (default 10000; Koehn 2004 has 1000)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the resampling (default 0)")
    command = commands.add_parser("ask", help="answer questions with what a run trained")
    command.add_argument(
        "question",
        nargs="*",
        help="one or more, each in quotation marks; inputs as they stand where the run was trained on inputs and targets",
    )
    command.add_argument("--run", required=True, help="run folder")
    command.add_argument("--input", help="a file of questions, one a line")
    command.add_argument(
        "--max-new-tokens", type=int, default=16, help="longest answer (default 16)"
    )
    command = commands.add_parser(
        "score",
        help="answer a file of examples with the bare frozen LM, or with what a run trained",
    )
    command.add_argument(
        "file",
        help="examples as train.py reads them; where they have options, the likeliest is the answer",
    )
    command.add_argument("--run", help="run folder; without it the bare LM")
    command.add_argument(
        "--model", help="checkpoint folder of the bare LM; the embedded one if not given"
    )
    command.add_argument(
        "--limit", type=int, help="examples, evenly spaced in the file; all if not given"
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=16, help="longest answer (default 16)"
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "compare":
            return compare(args.run_a, args.run_b, args.iters, args.seed)
        if args.command == "score":
            import data
            from model import LM, answer, load_tokenizer, locate
            from recurse import load_run

            if args.run:
                model, prefix, tokenizer, _ = load_run(args.run)
            else:
                model, prefix = (
                    LM.from_pretrained(
                        locate(args.model or Path(__file__).parent / "assets" / "lm")
                    ),
                    None,
                )
                tokenizer = load_tokenizer(model.folder, model.config.vocab_size)
            examples = data.read(args.file)
            examples = examples[:: -(-len(examples) // args.limit) if args.limit else 1]
            tokens = data.encode(
                examples,
                tokenizer,
                model.config.eos[0] if model.config.eos else None,
                model.config.max_len,
            )
            rows = score(
                examples,
                answer(
                    model,
                    tokenizer,
                    [t.input for t in tokens],
                    prefix,
                    args.max_new_tokens,
                    [t.options for t in tokens],
                ),
            )
            result = summary(rows)
            for task, row in [("all", result), *result["tasks"].items()]:
                print(
                    f"{task:20} EM {100 * row['em']:5.1f}   F1 {100 * row['f1']:5.1f}   ({row['n']} examples)"
                ) if task else None
            return result
        if args.command == "ask":
            from data import open_ended, question_text
            from model import answer
            from recurse import load_run

            lines = Path(args.input).read_text(encoding="utf-8").splitlines() if args.input else []
            questions = args.question + [line.strip() for line in lines if line.strip()]
            if not questions or not all(map(str.strip, questions)):
                raise ValueError(
                    "no question, or an empty one: give one in quotation marks, or a file with --input"
                )
            model, prefix, tokenizer, record = load_run(args.run)
            ids = open_ended(
                tokenizer,
                [question_text(q) if record.get("question_format", True) else q for q in questions],
            )
            answers = answer(model, tokenizer, ids, prefix, args.max_new_tokens)
            for question, text in zip(questions, answers):
                print(text if len(questions) == 1 else f"{question}\t{text}")
            return answers
    except (ValueError, OSError) as error:
        parser.exit(2, f"eval.py {args.command}: {error}\n")


if __name__ == "__main__":
    main()
