"""Textual recursion around a frozen LM: the stages between the first prompt and the last.

Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 4.1. With a
prompt p1 the LM samples n answers to every question, and with another prompt it reads the question
with these candidates. Stages lie below the folder of the run:

    p1-a, p1-b             runs of prompt tuning on either half of the training questions
    p1                     the same on all of them
    candidates/1-dev       what p1 samples for dev, in files of 128 questions; 1-test likewise
    candidates/1a-train    what p1-a samples for the other half of the training questions
    p2, ...                with --rounds 2, the same again on the questions with their candidates

The run itself is the last prompt, trained on the questions with the candidates of the last round.

A p1 that was trained on a question samples better candidates for it than for new questions, and the
last prompt would learn to rely on them. So each half of the training questions gets its candidates
from the prompt that was trained on the other one (rerank.cross_fit); run.json says in which half
each question lies. The paper does not mention this; --no-cross-fit leaves it out. And in the paper
the candidates follow the question; here they come before it (recurse.text_with).

The prompts of the first round do not depend on the number of candidates, so a run can copy those of
another run (--stages-from). With --pause the filler stands behind the question in every stage, and
with --pause-trained each stage has vectors of its own.

Needs filler.py, recurse.py, rerank.py, adapters.py, data.py, eval.py, checkpoints.py, parallel.py
and show.py. train.py passes its Task and trains.

    python train.py --method textual_recursion
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from show import show

import torch

import data
import eval as metrics
import parallel
from adapters import load_adapter
from checkpoints import write_lines
from data import encode_prompts
from filler import Filler
from recurse import Around, Candidate, candidates, positions_left, text_with
from rerank import cross_fit, progress

QUESTIONS_IN_FILE = 128  # a kill costs at most the candidates of so many questions


def with_candidates(tokenizer, examples, ranked, left: int, max_new_tokens: int, after: str = ""):
    """Puts its candidates into each example of data.py. Returns (examples, number left out).

    left   positions of the context that the prompt leaves
    after  the filler that will follow every example
    Of candidates that do not fit beside the answer, the last ones are left out.
    """

    def length(text: str) -> int:
        return len(encode_prompts(tokenizer, [text])[0])

    longer, left_out = [], 0
    for e, kept in zip(examples, ranked, strict=True):
        answers = encode_prompts(tokenizer, [f" {text}" for text in (e.target, *e.options)])
        # + 1 for another split after the input, + 1 for EOS, - 1: the last token is not read. If
        # the tokenizer adds BOS, it is counted here again, and one position stays free.
        limit = left - max(max_new_tokens - 1, *(len(ids) + 1 for ids in answers))
        kept = list(kept)
        while kept and length(text_with(e.input, kept) + after) > limit:
            kept.pop()
            left_out += 1
        longer.append(replace(e, input=text_with(e.input, kept)))
    return longer, left_out


class TextualRecursion(Around):
    """An LM, with the LM's interface, whose questions get the candidates of earlier prompts first.

    `questions.prepare` calls `read_back` on its examples. The last prompt, which is no part of this
    object, reads the texts that come out.
    """

    def __init__(self, lm, filler: Filler, stages: list, args: dict):
        super().__init__(lm)
        self.tokenizer, self.filler = filler.tokenizer, filler.text
        self.stages = stages  # (LM, prefix) of p1, p2, ..., one for each round
        self.args = args  # candidates, context, max_new_tokens, stop, seed, eval_tokens

    @classmethod
    def load(cls, folder: Path, lm, filler: Filler, args: dict) -> "TextualRecursion":
        """What a run of train.py left in `folder`. `args` are the arguments of its record, and
        `filler` is that of its last prompt."""
        stages = []
        for place in [folder / f"p{i + 1}" for i in range(args["rounds"])]:
            with torch.no_grad():
                prefix = lm.read(load_adapter(place, lm)())
            stages.append((filler.load(place, lm).around(lm).requires_grad_(False), prefix))
        return cls(filler.around(lm), filler, stages, args)

    def read_back(self, examples: list) -> list:
        """Puts the last stage's candidates into examples of data.py. Each stage reads the examples
        with the candidates of the one before."""
        asked, after, new = examples, self.filler, self.args["max_new_tokens"]
        for stage in self.stages:
            ids = encode_prompts(self.tokenizer, [e.input + after for e in asked])
            ranked = sample_candidates(self.args, self.tokenizer, examples, ids, stage)
            left = positions_left(self.args, self.config, stage[1].size)
            asked, _ = with_candidates(self.tokenizer, examples, ranked, left, new, after)
        return asked


def sample_candidates(args: dict, tokenizer, examples, ids: list[list[int]], stage) -> list[list]:
    """The ranked candidates of each example. A stage is (LM, prefix). `ids` are what this LM reads
    behind this prefix."""
    lm, prefix = stage
    stops = metrics.stops(examples, args["stop"])
    rest = (args["max_new_tokens"], stops, args["seed"], args.get("eval_tokens", 8192))
    return candidates(lm, ids, args["candidates"], prefix, tokenizer, *rest)


def score_candidates(examples, ranked: list[list[Candidate]], n: int) -> dict:
    """How good the candidates are, over all examples and for each task.

    {"n": examples, "recall": {"1": ..., "8": ..., ...}, "best", "majority", "distinct",
    "tasks": {task: the same}}. recall[k] is the share of examples with a right answer among the
    first k samples. best and majority are the exact match of the candidate that is ranked first and
    of the one sampled most often (ties: ranked first). distinct is the mean number of candidates.
    """
    sizes = sorted({k for k in (1, 8, 16, 64) if k < n} | {n})
    tasks, everything = {}, []
    for e, row in zip(examples, ranked, strict=True):
        texts = [candidate.text for candidate in row]
        right = [score["em"] for score in metrics.score([e] * len(texts), texts)]
        most = max(range(len(row)), key=lambda i: row[i].count, default=None)
        firsts = [c.first for c, em in zip(row, right) if em]
        values = [float(any(first < k for first in firsts)) for k in sizes]
        values += [right[0] if row else 0.0, 0.0 if most is None else right[most], len(row)]
        everything.append(values)
        tasks.setdefault(e.task, []).append(values)

    def means(rows: list) -> dict:
        *recall, best, majority, distinct = (sum(column) / len(rows) for column in zip(*rows))
        result = {"n": len(rows), "recall": {str(k): r for k, r in zip(sizes, recall)}}
        return result | {"best": best, "majority": majority, "distinct": distinct}

    return means(everything) | {"tasks": {task: means(rows) for task, rows in tasks.items()}}


def sample_rounds(task, train_stage: Callable) -> tuple:
    """Train and sample in as many rounds as --rounds says.

    train_stage(task, name, before) -> (SoftPrompt, its Filler) trains them in the folder `name` of
    the run, or loads them if they are trained already; they start as those of `before`, if there
    are any. Returns (the task with candidates in its questions, the last such pair, the scores of
    each round, the half "A" or "B" of each training question or None).
    """
    asked, prompts, rounds = task, {}, []
    for number in range(1, task.args.rounds + 1):
        ranked, halves = sample_round(task, asked, number, prompts, train_stage)
        asked, scores = add_candidates(task, ranked)
        rounds.append(scores)
    return asked, prompts[""], rounds, halves


def sample_round(task, asked, number: int, prompts: dict, train_stage: Callable) -> tuple:
    """Train the prompts of one round on `asked`, and sample candidates for every question.

    `prompts` holds those of the round before, which this round replaces: under "a" and "b" the
    prompts of the halves, under "" that of all questions. Returns ({split: ranked candidates}, the
    half of each training question, or None without cross-fitting).
    """
    names = iter([""] if task.args.no_cross_fit else ["a", "b", ""])  # as cross_fit trains them

    def train(rows) -> str:
        name = next(names)
        part = half_of(asked, rows) if name else asked
        folder = f"p{number}-{name}" if name else f"p{number}"
        prompts[name] = train_stage(part, folder, prompts.get(name))
        return name

    def sample(name: str, rows, split: str = "train") -> list[list]:
        return sample_split(task, asked, f"{number}{name}", prompts[name], split, rows)

    rows, halves = range(len(asked.tokens["train"])), None
    if task.args.no_cross_fit:
        ranked = {"train": sample(train(rows), rows)}
    else:
        group = group_questions(task.examples["train"]).__getitem__
        found, halves, _ = cross_fit(rows, train, sample, task.args.seed, group)
        ranked = {"train": found}
    for split in ("dev", "test"):
        ranked[split] = sample("", range(len(task.examples[split])), split)
    return ranked, halves


def group_questions(examples: list[data.Example]) -> list[int]:
    """The group of each question, as the number of one of its rows. A group lies in one half.

    Examples with the same input stay together. So do up to 8 neighbours with the same answers: they
    may be one question in several wordings. ValueError if there is only one such group.
    """
    # Union-find: `group` leads from a row to an earlier one of its group, or to itself.
    group, first_with, start = list(range(len(examples))), {}, 0
    for row, e in enumerate(examples):
        if e.answers != examples[start].answers or row - start == 8:
            start = row
        rows = {root(group, start), root(group, first_with.setdefault(e.input, row)), row}
        for other in rows:
            group[other] = min(rows)
    group = [root(group, row) for row in group]
    if len(set(group)) < 2:
        raise ValueError("one question cannot be cut into halves; --no-cross-fit does without")
    return group


def root(group: list[int], row: int) -> int:
    """The first row of the group of `row`."""
    while group[row] != row:
        row = group[row]
    return row


def half_of(task, rows: list[int]):
    """The task with the training questions `rows` and no test."""

    def half(part: dict) -> dict:
        return part | {"train": [part["train"][row] for row in rows], "test": []}

    return replace(task, examples=half(task.examples), tokens=half(task.tokens))


@torch.no_grad()
def sample_split(task, asked, name: str, stage: tuple, split: str, rows) -> list[list]:
    """Sample candidates for the questions `rows` of a split, or read them from files that exist."""
    args, examples = task.args, task.examples[split]
    folder, ranked = Path(args.out) / "candidates" / f"{name}-{split}", []
    folder.mkdir(parents=True, exist_ok=True)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        prompt, filler = stage
        reader = filler.around(task.lm), task.lm.read(prompt())

        def compute(part: list[int]) -> list[list[Candidate]]:
            ids = [asked.tokens[split][row].input for row in part]
            some = [examples[row] for row in part]
            return sample_candidates(vars(args), filler.tokenizer, some, ids, reader)

        for start in progress(range(0, len(rows), QUESTIONS_IN_FILE), f"files of {split}"):
            path, part = folder / f"{start:06d}.jsonl", rows[start : start + QUESTIONS_IN_FILE]
            if not path.is_file():
                found = compute(part) if args.shard else parallel.divide(compute, part)
                if parallel.first():
                    write_candidates(path, [examples[row] for row in part], found)
            parallel.wait()
            for _, line in data.json_lines(path):
                ranked.append([Candidate(**c) for c in line["candidates"]])
    return ranked


def write_candidates(path: Path, examples: list[data.Example], ranked: list[list]) -> None:
    """Write a line {"id", "task", "input", "answers", "candidates"} for each question."""
    lines = []
    for e, row in zip(examples, ranked):
        line = {"id": e.id, "task": e.task, "input": e.input, "answers": e.answers}
        lines.append(line | {"candidates": list(map(asdict, row))})
    write_lines(path, lines)


def add_candidates(task, ranked: dict[str, list]) -> tuple:
    """Returns (the task with the candidates in its questions, how good these are in each split).
    Prints how good they are."""
    args, filler, config = task.args, task.filler, task.filler.around(task.lm).config
    eos = config.eos[0] if config.eos else None
    left, tokens, scores = positions_left(vars(args), config, args.prompt_length), {}, {}
    for split, examples in task.examples.items():
        longer, left_out = with_candidates(
            filler.tokenizer, examples, ranked[split], left, args.max_new_tokens, filler.text
        )
        longer = [replace(e, input=e.input + filler.text) for e in longer]
        tokens[split] = data.tokenize(longer, filler.tokenizer, eos, left, config.vocab_size)
        if examples:
            scores[split] = score_candidates(examples, ranked[split], args.candidates)
            scores[split]["left_out"] = left_out
            show_candidates(split, scores[split])
    return replace(task, tokens=tokens), scores


def show_candidates(split: str, scores: dict) -> None:
    """Print how good the candidates of a split are, for all its questions and for each task."""
    for task, row in {"all": scores, **scores["tasks"]}.items():
        recall = "  ".join(f"@{k} {100 * value:5.1f}" for k, value in row["recall"].items())
        first, most = 100 * row["best"], 100 * row["majority"]
        text = f"recall {recall}   EM likeliest {first:5.1f}, most frequent {most:5.1f}"
        show(f"{split:5} {task or 'other':12} {text}   ({row['n']} questions)")
    if scores["left_out"]:
        show(f"{split:5} {scores['left_out']} candidates did not fit the context and are left out")
