"""Textual recursion around a frozen LM: the stages between the first prompt and the last.

Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 4. With a
prompt p1 the LM samples n answers to every question, and with another prompt it reads the question
with these candidates. Stages lie below the folder of the run:

    p1                     a run of prompt tuning on all training questions
    p1-a, p1-b             the same on either half of them
    candidates/1-dev       what p1 samples for dev, in files of 128 questions; 1-test likewise
    candidates/1a-train    what p1-a samples for the other half of the training questions
    p2, ...                with --rounds 2, the same again on the questions with their candidates

The run itself is the last prompt, trained on the questions with the candidates of the last round.

The prompt p1 has seen the training questions, so its candidates for them are better than those for
new questions, and the last prompt would learn to rely on them. Cross-fitting takes them from a
prompt of the other half. The paper does not say that it does so; --no-cross-fit does without.

Needs recurse.py, data.py, runs.py and checkpoints.py. train.py passes its Task and trains.

    python train.py --method textual_recursion
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data
import recurse
from checkpoints import atomic_write
from runs import show

QUESTIONS_IN_FILE = 128  # a kill costs at most the candidates of so many questions


def sample_rounds(task, train_prompt: Callable) -> tuple:
    """Train and sample in as many rounds as --rounds says.

    train_prompt(task, name, before) -> SoftPrompt trains a prompt in the folder `name` of the run,
    from the prompt `before` it or None, or loads it if it is trained already. Returns (the task
    whose questions hold their candidates, the last prompt, how good the candidates of each round
    are).
    """
    asked, prompts, rounds = task, {}, []
    for number in range(1, task.args.rounds + 1):
        ranked = sample_round(task, asked, number, prompts, train_prompt)
        asked, scores = read_candidates(task, ranked)
        rounds.append(scores)
    return asked, prompts[""], rounds


def sample_round(task, asked, number: int, prompts: dict, train_prompt) -> dict[str, list]:
    """Train the prompts of one round on `asked`, and sample candidates for every question.

    `prompts` holds those of the round before, and then of this one. Returns {split: ranked
    candidates}.
    """
    everything = range(len(asked.tokens["train"]))
    parts = {"": (everything, everything)}  # name of a prompt: the rows it learns, those it answers
    if not task.args.no_cross_fit:
        a, b = halves(task.examples["train"], task.args.seed)
        parts |= {"a": (a, b), "b": (b, a)}
    ranked = {"train": [[] for _ in everything]}
    for name, (learns, answers) in parts.items():
        part = half_of(asked, learns) if name else asked
        folder = f"p{number}-{name}" if name else f"p{number}"
        prompts[name] = train_prompt(part, folder, prompts.get(name))
        if name or len(parts) == 1:
            found = sample_split(task, asked, f"{number}{name}", prompts[name], "train", answers)
            for row, candidates in zip(answers, found):
                ranked["train"][row] = candidates
    for split in ("dev", "test"):
        rows = range(len(task.examples[split]))
        ranked[split] = sample_split(task, asked, str(number), prompts[""], split, rows)
    return ranked


def halves(examples: list[data.Example], seed: int) -> tuple[list[int], list[int]]:
    """Draw the rows of two halves of the questions, for cross-fitting.

    Examples with the same input stay together. So do up to 8 neighbours with the same answers: they
    may be one question in several wordings. ValueError if there is only one such group.
    """
    group, first_with, start = list(range(len(examples))), {}, 0  # row -> an earlier row, or itself
    for row, e in enumerate(examples):
        if e.answers != examples[start].answers or row - start == 8:
            start = row
        rows = {root(group, start), root(group, first_with.setdefault(e.input, row)), row}
        for other in rows:
            group[other] = min(rows)
    roots = [root(group, row) for row in group]
    order = sorted(set(roots))
    random.Random(f"{seed} halves").shuffle(order)
    first = set(order[: len(order) // 2])
    if not first:
        raise ValueError("one question cannot be cut into halves; --no-cross-fit does without")
    sides = [], []
    for row, name in enumerate(roots):
        sides[name in first].append(row)
    return sides


def root(group: list[int], row: int) -> int:
    """The row that stands for the group of `row`."""
    while group[row] != row:
        row = group[row]
    return row


def half_of(task, rows: list[int]):
    """The task with some of its training questions and no test."""
    parts = []
    for part in (task.examples, task.tokens):
        parts.append(part | {"train": [part["train"][row] for row in rows], "test": []})
    return replace(task, examples=parts[0], tokens=parts[1])


@torch.no_grad()
def sample_split(task, asked, name: str, prompt, split: str, rows) -> list[list]:
    """Sample candidates for some questions of a split. Complete files of them are read instead."""
    args, examples = task.args, task.examples[split]
    folder, ranked = Path(args.out) / "candidates" / f"{name}-{split}", []
    folder.mkdir(parents=True, exist_ok=True)
    new, stop = args.max_new_tokens, args.stop
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        prefix = task.lm.read(prompt())
        recursion = recurse.TextualRecursion(
            task.lm, task.tokenizer, [prefix], args.candidates, new, stop, args.seed
        )
        for start in progress(range(0, len(rows), QUESTIONS_IN_FILE), split):
            path, part = folder / f"{start:06d}.jsonl", rows[start : start + QUESTIONS_IN_FILE]
            if not path.is_file():
                ids = [asked.tokens[split][row].input for row in part]
                found = recursion.sample([examples[row] for row in part], ids, prefix)
                write_candidates(path, [examples[row] for row in part], found)
            for _, line in data.json_lines(path):
                ranked.append([recurse.Candidate(**c) for c in line["candidates"]])
    return ranked


def progress(starts: range, split: str):
    """The range, with a bar on a terminal."""
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(starts, f"candidates of {split}", unit="file", disable=not on_terminal)


def write_candidates(path: Path, examples: list[data.Example], ranked: list[list]) -> None:
    """Write a line {"id", "task", "input", "answers", "candidates"} for each question."""
    with atomic_write(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for e, row in zip(examples, ranked):
            line = {"id": e.id, "task": e.task, "input": e.input, "answers": e.answers}
            file.write(json.dumps(line | {"candidates": list(map(asdict, row))}) + "\n")


def read_candidates(task, ranked: dict[str, list]) -> tuple:
    """The task whose questions hold their candidates, and how good these are in each split."""
    args, config = task.args, task.lm.config
    left = config.max_len - args.prompt_length
    eos, tokens, scores = config.eos[0] if config.eos else None, {}, {}
    for split, examples in task.examples.items():
        longer, left_out = recurse.with_candidates(
            task.tokenizer, examples, ranked[split], left, args.max_new_tokens
        )
        tokens[split] = data.tokenize(longer, task.tokenizer, eos, left, config.vocab_size)
        if examples:
            scores[split] = recurse.score_candidates(examples, ranked[split], args.candidates)
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
