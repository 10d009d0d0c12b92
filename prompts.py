"""Several prompts beside each other, what a prompt says, and the protocol of many prompted tasks.

    python eval.py mixed --prompts runs/a runs/b --input FILE         one batch, many prompts
    python eval.py mixed --prompts runs/a runs/b --input FILE --vote  the answer that most give
    python eval.py explain runs/a                                     nearest tokens of its rows
    python eval.py templates runs/id_pt                               medians over templates
    python train.py --method prompt_tuning --per-task --train suite   a prompt for each task

A frozen LM serves many tasks at once, because a prefix stands before each example of a batch and
not before the batch (Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt
Tuning", figure 2). The prompts may be shallow, deep or generated, of any lengths, or absent.

The multi-task protocol is that of Levine et al. 2022, "Standing on the Shoulders of Giant Frozen
Language Models", section 2.2: tasks are mixed as for T0 (Sanh et al. 2022), the best checkpoint is
that of the highest mean dev score, and the score of a dataset is the median over its templates.

Needs the files below runs.py. eval.py registers the commands, train.py calls the rest.
"""

import argparse
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from show import COUNT, show, show_table

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import data
import eval as metrics
from adapters import DeepPrompt, PromptGenerator, SoftPrompt, read_adapter_config, save_adapter
from checkpoints import load_tokenizer
from generate import predict
from model import LM
from questions import check_out, finish_scores, parse_question, prepare, take_flags
from recurse import load_trained, prompt_prefix

# Prompts of one LM


@dataclass
class Prompt:
    """A trained prompt of any kind, ready to stand before questions."""

    folder: Path
    adapter: nn.Module
    prefix: object  # a Prefix, or recurse.GeneratedPrefix
    tokenizer: Tokenizer  # adds no BOS if the prompt stands after it
    arguments: dict = field(default_factory=dict)  # of its run, if it has one


def load_prompts(paths: Sequence[str | Path], model=None):
    """Load one frozen LM and several prompts of it. Returns (lm, tokenizer, {name: Prompt}).

    A path is the folder of a run or of a stored prompt, PEFT's too, or NAME=FOLDER. Without NAME, a
    prompt is called like its folder. The LM is `model`, or that of the first prompt. ValueError if
    two prompts have one name, if one belongs to another LM, or if a run trained more than a prompt.
    """
    folders = {}
    for path in map(str, paths):
        name, equals, folder = path.partition("=")
        if not equals or os.path.isdir(path):
            name, folder = Path(os.path.abspath(path)).name, path
        if not name or not folder:
            raise ValueError(f"--prompts {path}: a name or a folder is missing")
        if name in folders:
            raise ValueError(f"--prompts: two are called {name!r}; NAME=FOLDER gives other names")
        folders[name] = Path(folder)
    lm, tokenizer = load_lm(next(iter(folders.values())), model)
    return lm, tokenizer, {n: load_prompt(folder, lm, tokenizer) for n, folder in folders.items()}


def run_of(folder: Path) -> tuple[Path, dict]:
    """Return (folder, record) of a prompt's run. Without a run: (folder, {}).

    The run is the folder itself, or with --per-task the folder above it. ValueError if questions of
    the run get more than a prompt.
    """
    from runs import read_record

    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            record = read_record(place)
            args = record["arguments"]
            method = args.get("composition", args["method"])
            if method not in ("prompt_tuning", "deep_prompt", "id_pt"):
                raise ValueError(f"{folder}: {args['method']} trains more than a prompt, or none")
            if args.get("pause"):
                raise ValueError(f"{folder}: its questions end with --pause, not only its prompt")
            return place, record
    return folder, {}


def load_lm(folder: Path, model=None):
    """Return (lm, tokenizer) that the prompt in a folder belongs to: `model` if it is given."""
    from runs import ASSETS, load_base

    place, record = run_of(folder)
    if record:
        return load_base(place, record, model=model)
    base = read_adapter_config(folder).get("base_model_name_or_path")
    lm = LM.from_pretrained(model or base or ASSETS / "lm")
    return lm, load_tokenizer(lm.folder, lm.config.vocab_size)


def load_prompt(folder: Path, lm: LM, tokenizer) -> Prompt:
    """Load one prompt. ValueError if it belongs to another LM."""
    from runs import find_encoder

    place, record = run_of(folder)
    generates = read_adapter_config(folder)["peft_type"] == "PROMPT_GENERATOR"
    encoder = find_encoder(place, record) if generates else None
    adapter, own = load_trained(folder, lm, tokenizer, encoder)
    prefix = prompt_prefix(adapter, lm, folder)
    return Prompt(folder, adapter, prefix, own, record.get("arguments", {}))


# Mixed tasks


def answer_mixed(
    lm,
    tokenizer,
    examples: Sequence[data.Example],
    chosen: Sequence[Prompt | None],
    max_new_tokens: int = 16,
    stops: list[str] | None = None,
    out: str | None = None,
    **limits,
) -> list[str | int]:
    """Answer each example with its own prompt, or with the LM alone for None, in shared batches.

    The answers are those of `predict` for each prompt alone. `limits` are its keywords. The folder
    `out` is made after the checks and before the work, which would be lost if it cannot be made.
    """
    if len(examples) != len(chosen):
        raise ValueError(f"{len(chosen)} prompts for {len(examples)} examples")
    ids, options = [None] * len(examples), [None] * len(examples)
    for prompt in {id(p): p for p in chosen}.values():
        rows = [b for b, p in enumerate(chosen) if p is prompt]
        own, prefix = (tokenizer, None) if prompt is None else (prompt.tokenizer, prompt.prefix)
        part, ends = [examples[b] for b in rows], stops and [stops[b] for b in rows]
        own_ids, own_options, _ = prepare(lm, own, part, prefix, max_new_tokens, stops=ends)
        for b, question, choices in zip(rows, own_ids, own_options):
            ids[b], options[b] = question, choices
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    prefixes = [None if p is None else p.prefix for p in chosen]
    return predict(lm, tokenizer, ids, prefixes, max_new_tokens, options, stops, **limits)


def answer_by_vote(lm, tokenizer, examples, voters: Sequence[Prompt], new=16, stops=None, **limits):
    """Answer each example with every prompt, in shared batches: the most frequent answer of each.

    Lester et al. 2021, section 6. Returns (answers, how many prompts gave each of them). Of equally
    frequent answers, that of the earliest prompt wins.
    """
    B, N = len(examples), len(voters)
    chosen = [prompt for prompt in voters for _ in examples]
    given = answer_mixed(lm, tokenizer, [*examples] * N, chosen, new, stops and stops * N, **limits)
    # given[b::B] are the answers of all voters to example b.
    return zip(*(Counter(given[b::B]).most_common(1)[0] for b in range(B)))


def read_mixed(path: str, labelled: bool) -> list[tuple[data.Example, dict]]:
    """Read (example, record) of each line. Answers are needed if `labelled`, or else dropped."""
    lines = list(data.records(path))
    if not lines:
        raise ValueError(f"{path}: holds no examples")
    examples = data.read(path) if labelled else [parse_question(r, source) for source, r in lines]
    return [(example, record) for example, (_, record) in zip(examples, lines)]


def prompt_of(example: data.Example, record: dict, prompts: dict) -> Prompt | None:
    """Return the prompt that the record's "prompt" names, or else the one called like its task.

    None is the LM alone: for "none", or a task without a prompt. ValueError for another name.
    """
    if "prompt" not in record:
        return prompts.get(example.task)
    name = str(record["prompt"])
    if name not in prompts and name != "none":
        known = ", ".join([*prompts, "none"])
        raise ValueError(f"{example.source}: the prompt {name!r} is not one of {known}")
    return prompts.get(name)


def mixed_command(args: argparse.Namespace) -> list[str] | dict:
    """Answer examples, each with its own prompt. Returns the answers, or with --out the scores."""
    check_out(args.out)
    lines = read_mixed(args.input, bool(args.out))
    examples, args.file = [example for example, _ in lines], args.input
    lm, tokenizer, prompts = load_prompts(args.prompts, args.model)
    take_flags(args, [p.arguments for p in prompts.values() if p.arguments])
    ends, new = metrics.stops(examples, args.stop), args.max_new_tokens
    limits = {"max_tokens": args.eval_tokens, "mean": args.rank_by == "mean", "out": args.out}
    if args.vote:
        voters = list(prompts.values())
        answers, votes = answer_by_vote(lm, tokenizer, examples, voters, new, ends, **limits)
        used = [f"{len(voters)} prompts vote"] * len(examples)
        more = [{"votes": count} for count in votes]
    else:
        chosen = [prompt_of(example, record, prompts) for example, record in lines]
        names = {id(prompt): name for name, prompt in prompts.items()}
        used = [names.get(id(prompt), "none") for prompt in chosen]
        answers = answer_mixed(lm, tokenizer, examples, chosen, new, ends, **limits)
        more = [{"prompt": name} for name in used]
    counts = ", ".join(f"{name} {count}" for name, count in Counter(used).items())
    show(f"examples of each prompt: {counts}", "stderr")
    if args.out:
        records = [r | m for r, m in zip(metrics.score(examples, answers), more)]
        files = {n: p.folder / "adapter_model.safetensors" for n, p in prompts.items()}
        hashes = {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()}
        return finish_scores(args, lm, tokenizer, records, adapter_hash=hashes)
    texts = [a if isinstance(a, str) else e.options[a] for e, a in zip(examples, answers)]
    for e, text in zip(examples, texts):
        show(f"{metrics.one_line(e.id)}\t{metrics.one_line(text)}", result=True)
    return texts


# A prompt for each task, trained in shared batches


class TaskPrompts(nn.Module):
    """A prompt for each task. In a batch of several tasks each example has its own task's prompt.

    The gradient of a prompt is that of a batch of its own rows alone.
    """

    def __init__(self, prompts: dict[str, nn.Module]):
        super().__init__()
        self.tasks = list(prompts)
        self.prompts = nn.ModuleList(prompts.values())

    def prefixes(self, lm, tasks: Sequence[str]) -> list:
        """The prefix of each example, given its task. A prompt is read once for all of them."""
        known = dict(zip(self.tasks, self.prompts))
        read = {task: prompt_prefix(known[task], lm) for task in dict.fromkeys(tasks)}
        return [read[task] for task in tasks]


def save(folder: str | Path, adapter: nn.Module, lm, **info) -> None:
    """Store an adapter, or each of TaskPrompts in a folder that is called like its task."""
    if not isinstance(adapter, TaskPrompts):
        return save_adapter(folder, adapter, lm, **info)
    for task, prompt in zip(adapter.tasks, adapter.prompts):
        save_adapter(Path(folder) / folder_name(task), prompt, lm, task=task, **info)


def folder_name(task: str) -> str:
    """The name of a task as that of a folder."""
    return re.sub(r"[^\w.-]", "_", task)


def tasks_of(splits: dict[str, list[data.Example]]) -> list[str]:
    """The tasks of the training examples. ValueError if one is not named, if another split has
    another one, or if the folders of two have the same name."""
    tasks = list(dict.fromkeys(example.task for example in splits["train"]))
    for example in [e for part in splits.values() for e in part]:
        if example.task not in tasks or not example.task:
            raise ValueError(f"{example.source}: --per-task has no prompt for {example.task!r}")
    folders = Counter(map(folder_name, tasks))
    same = [task for task in tasks if folders[folder_name(task)] > 1]
    if same:
        raise ValueError(f"--per-task: the tasks {same[0]!r} and {same[1]!r} have the same folder")
    return tasks


# What a prompt says


def nearest_tokens(vectors: Tensor, table, k: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """The k tokens nearest to each vector (P, C), by cosine and by Euclidean distance.

    Returns {"cosine": (values (P, k), ids (P, k)), "distance": the same}, the nearest first. table:
    (V, C), or an iterator of its parts in order. Lester et al. 2021, section 7, read a prompt so.
    """
    vectors, first, best = vectors.detach().float(), 0, {}
    for part in table.split(4096) if isinstance(table, Tensor) else table:
        part = part.detach().float()
        # The default way of cdist cancels the digits of near vectors.
        distances = torch.cdist(vectors, part, compute_mode="donot_use_mm_for_euclid_dist")
        cosines = F.normalize(vectors) @ F.normalize(part).T
        found = {"cosine": cosines, "distance": -distances}  # the nearest are the largest
        for name, scores in found.items():
            ids = torch.arange(first, first + len(part), device=part.device).expand_as(scores)
            if name in best:
                scores, ids = (torch.cat(pair, 1) for pair in zip(best[name], (scores, ids)))
            values, index = scores.topk(min(k, scores.shape[1]))
            best[name] = values, ids.gather(1, index)
        first += len(part)
    distances, ids = best["distance"]
    return best | {"distance": (-distances, ids)}


@torch.no_grad()
def token_values(lm, size: int = 1024) -> Iterator[Tensor]:
    """What the LM stores as values when it reads a token alone: parts of (V, layers * K * D)."""
    for ids in torch.arange(lm.config.vocab_size, device=lm.embed_tokens.weight.device).split(size):
        yield values_of(lm.read(lm.embed(ids[:, None])))[:, 0]


def values_of(prefix) -> Tensor:
    """The values of all layers at each position of a Prefix, (B, P, layers * K * D)."""
    values = torch.stack([v for _, v in prefix.layers], 1)  # (B, layers, K, P, D)
    return values.permute(0, 3, 1, 2, 4).flatten(2)


@torch.no_grad()
def explain(prompt: Prompt, lm, k: int = 5, questions: Sequence[str] = ()) -> list[dict]:
    """Describe each row of a prompt by the tokens nearest to it.

    A row is {"row", "norm", "cosine": [(token, value)], "distance": [(token, value)]}, where tokens
    are texts. What is compared depends on the kind of prompt:

    shallow    its vectors, with the token embeddings
    deep       its values in all layers together, with those that the LM stores of a token alone.
               Its keys are rotated by their position, so no token has keys to compare them with.
    generated  the mean of its vectors over `questions`, with the token embeddings. "varies" is the
               mean cosine distance between two questions' vectors (Levine et al. 2022, table 8).
    """
    table, more, adapter = lm.embed_tokens.weight, None, prompt.adapter
    if isinstance(adapter, DeepPrompt):
        vectors, table = values_of(adapter())[0], token_values(lm)
    elif isinstance(adapter, SoftPrompt):
        vectors = adapter.vectors
    else:
        drawn = adapter.prompts(data.encode_prompts(prompt.tokenizer, questions)).float()
        vectors, n = drawn.mean(0), len(drawn)
        # Of n unit vectors the squared norm of their sum is n + the cosines of all ordered pairs.
        cosines = (F.normalize(drawn, dim=-1).sum(0).square().sum(-1) - n) / max(1, n * (n - 1))
        more = [1 - c for c in cosines.tolist()] if n > 1 else [0.0] * len(vectors)
    rows, found = [], nearest_tokens(vectors, table, k)
    for i, norm in enumerate(vectors.float().norm(dim=-1).tolist()):
        row = {"row": i, "norm": norm} | ({} if more is None else {"varies": more[i]})
        for name, (values, ids) in found.items():
            tokens = [[token] for token in ids[i].tolist()]
            texts = prompt.tokenizer.decode_batch(tokens, skip_special_tokens=False)
            row[name] = list(zip(texts, values[i].tolist()))
        rows.append(row)
    return rows


def explain_command(args: argparse.Namespace) -> list[dict]:
    """Print and return the tokens nearest to the rows of a prompt."""
    lm, _, prompts = load_prompts([args.run], args.model)
    (prompt,) = prompts.values()
    questions = []
    if isinstance(prompt.adapter, PromptGenerator):
        questions = explained_questions(args, prompt.folder)
    rows = explain(prompt, lm, args.top, questions)
    deep = isinstance(prompt.adapter, DeepPrompt)
    parts = token_values(lm) if deep else [lm.embed_tokens.weight]
    norms = torch.cat([part.float().norm(dim=-1) for part in parts])
    low, high = norms.quantile(torch.tensor([0.01, 0.99], device=norms.device)).tolist()
    what = "values of single tokens, all layers" if deep else "token embeddings"
    middle = f"{norms.mean().item():.3f} on average, {low:.3f} to {high:.3f} for 98 % of them"
    show(f"norm of the {what}: {middle}", result=True)
    table, columns = [], ["row", "norm", "nearest by cosine", "by distance"]
    if questions:
        columns.insert(2, f"varies over {len(questions)} questions")
    for row in rows:
        near = "  ".join(f"{token!r} {value:.2f}" for token, value in row["cosine"])
        close = "  ".join(f"{token!r} {value:.3f}" for token, value in row["distance"])
        varies = [f"{row['varies']:.3f}"] if questions else []
        table.append([row["row"], f"{row['norm']:.3f}", *varies, near, close])
    show_table("the rows of the prompt, and the tokens nearest to them", columns, table, True)
    return rows


def explained_questions(args: argparse.Namespace, folder: Path) -> list[str]:
    """The questions whose generated prompts are explained: at most 32 of --input or of the run."""
    from runs import read_predictions

    if args.input:
        return [example.input for example, _ in read_mixed(args.input, False)][:32]
    if not (folder / "predictions.jsonl").is_file():
        raise ValueError(f"{folder}: its prompt depends on the question; --input is a file of some")
    return [record["input"] for record in read_predictions(folder, ("input",))][:32]


# The multi-task protocol

MEDIANS = (*metrics.METRICS, "rouge")


def mean_over_tasks(records: Sequence[dict]) -> float:
    """The mean over tasks of their F1: the dev score that chooses the checkpoint."""
    return mean(task["f1"] for task in metrics.summary(records)["tasks"].values())


def template_medians(records: Sequence[dict]) -> dict:
    """Scores of a suite of prompted tasks from the lines of predictions.jsonl.

    A dataset's score is the median over its templates, a cluster's and the overall one are means
    over datasets (Levine et al. 2022, table 1). Returns {"f1", "em", "rouge", "datasets",
    "clusters"}. The last two are {name: scores}; datasets have "cluster", "templates" and "n" too.
    """
    groups = {}
    for record in records:
        templates = groups.setdefault(record["task"], {})
        rouge = metrics.rouge(record["prediction"], record["answers"])
        templates.setdefault(record.get("template", ""), []).append(record | {"rouge": rouge})
    datasets = {}
    for task, templates in groups.items():
        parts = list(templates.values())
        row = {m: median(mean(r[m] for r in part) for part in parts) for m in MEDIANS}
        cluster, n = parts[0][0].get("cluster", ""), sum(map(len, parts))
        datasets[task] = row | {"cluster": cluster, "templates": len(templates), "n": n}
    clusters = {}
    for row in datasets.values():
        clusters.setdefault(row["cluster"], []).append(row)
    result = {"datasets": datasets, "clusters": {c: means(rows) for c, rows in clusters.items()}}
    return means(list(datasets.values())) | result


def means(rows: Sequence[dict]) -> dict:
    """The mean of each metric over rows."""
    return {metric: mean(row[metric] for row in rows) for metric in MEDIANS}


def show_medians(medians: dict, result: bool = False) -> None:
    """Print the scores of `template_medians`, the datasets of a cluster below it."""
    lines = []
    for cluster, row in medians["clusters"].items():
        lines.append((cluster or "other tasks", row))
        for task, part in medians["datasets"].items():
            if part["cluster"] == cluster:
                lines.append((f"  {task or 'other'}", part))
    show(f"{'median over templates':<28}     F1     EM  ROUGE", result=result)
    for name, row in [*lines, ("overall", medians)]:
        line = " ".join([f"{name:<28}", *(f"{100 * row[m]:6.1f}" for m in ("f1", "em", "rouge"))])
        if "n" in row:
            line += f"   ({row['templates']} templates, {row['n']} examples)"
        show(line, result=result)


def templates_command(args: argparse.Namespace) -> dict:
    """Print and return the medians over templates of the predictions in a folder."""
    from runs import read_predictions

    records = read_predictions(args.run, ("prediction", "answers", *metrics.METRICS))
    if not records:
        raise ValueError(f"{args.run}/predictions.jsonl: no predictions")
    medians = template_medians(records)
    show_medians(medians, result=True)
    return medians


# The command line of eval.py


def add_commands(commands) -> None:
    """Add mixed, explain and templates to the sub-commands of eval.py."""
    summary = "answer examples in shared batches, each with its own prompt"
    command = commands.add_parser("mixed", help=summary, description=summary)
    command.set_defaults(function=mixed_command, seed=0, run=None, shots_from=None)
    folders = "runs or folders of prompts, FOLDER or NAME=FOLDER"
    command.add_argument("--prompts", nargs="+", required=True, help=folders)
    file = 'examples; "prompt" or else "task" names the prompt of each, "none" is the LM alone'
    command.add_argument("--input", required=True, help=file)
    vote = "every prompt answers every example, and the most frequent answer counts"
    command.add_argument("--vote", action="store_true", help=vote)
    command.add_argument("--out", help="folder for predictions.jsonl and score.json")
    metrics.add_answer_flags(command)

    summary = "the vocabulary tokens nearest to each row of a prompt"
    command = commands.add_parser("explain", help=summary, description=summary)
    command.set_defaults(function=explain_command)
    command.add_argument("run", help="run, or folder of a prompt")
    command.add_argument("--top", type=COUNT, default=5, help="tokens of a row")
    command.add_argument("--input", help="questions of a prompt that depends on them")
    command.add_argument("--model", help="the LM's checkpoint; the prompt's own if not given")

    summary = "median over templates of each dataset, and means over clusters"
    command = commands.add_parser("templates", help=summary, description=summary)
    command.set_defaults(function=templates_command)
    command.add_argument("run", help="run folder, or --out of score or mixed")
