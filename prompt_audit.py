"""What a text prompt answers, and what trained prompts are, cost and leave intact.

few_shot     answers behind text prompts, which are examples with their answers
distances    between generated prompts: of one template, of one dataset, of different datasets
speed        parameters, and the time of an answer
forgetting   the loss on text: of the LM alone, behind a prompt, and once it is tuned

Each takes the words of a row of prompt_study.py, then "--out" and a folder. Needs runs.py.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval as metrics
from checkpoints import load_tokenizer, write_lines
from fit import target_loss
from generate import predict, stack_prefixes
from model import LM
from questions import SHOT_END, prepare
from runs import ASSETS, load_run


def few_shot(line: list[str]) -> dict:
    """Answer NAME-test.jsonl behind SHOTS examples of NAME-train.jsonl, of the same template.

    The line is NAME SHOTS [--model LM]. Writes predictions.jsonl. Returns a summary of scores.
    """
    name, shots, *rest, _, out = line
    lm = LM.from_pretrained(rest[-1] if rest else ASSETS / "lm")
    tokenizer = load_tokenizer(lm.folder, lm.config.vocab_size)
    training, records = data.read(f"{name}-train.jsonl"), []
    groups = {}
    for example in data.read(f"{name}-test.jsonl"):
        groups.setdefault((example.task, example.template), []).append(example)
    for key, examples in groups.items():
        pool = [e for e in training if (e.task, e.template) == key]
        rows = data.sample(len(pool), int(shots), 0) if int(shots) else []
        before = [pool[row] for row in rows]
        stops = [SHOT_END if before else ""] * len(examples)
        ids, options, prefix = prepare(lm, tokenizer, examples, None, 16, before, stops)
        answers = predict(lm, tokenizer, ids, prefix, 16, options, stops)
        records += metrics.score(examples, answers)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_lines(Path(out) / "predictions.jsonl", records)
    return metrics.summary(records)


def distances(line: list[str]) -> dict:
    """Mean cosine distance between the prompts that a generator computes (table 8).

    The pairs have the same template, or the same dataset and another template, or other datasets.
    The distance of two prompts is the mean over their rows.
    """
    file, run, *_ = line
    _, prefix, tokenizer, _ = load_run(run)
    examples = data.read(file)
    examples = [examples[row] for row in data.sample(len(examples), 1000, 0)]
    ids = data.encode_prompts(tokenizer, [example.input for example in examples])
    with torch.no_grad():
        parts = [prefix.generator.prompts(ids[i : i + 50]) for i in range(0, len(ids), 50)]
    found = mean_distances(torch.cat(parts), [(e.task, e.template) for e in examples])
    return found | {"between the rows of a prompt": row_distance(torch.cat(parts))}


def mean_distances(drawn: Tensor, keys: list[tuple[str, str]]) -> dict[str, float]:
    """The distances of prompts (N, P, C) from examples with the keys (task, template)."""
    unit = F.normalize(drawn.float(), dim=-1).flatten(1)
    distance = 1 - unit @ unit.T / drawn.shape[1]
    same_task = torch.tensor([[a[0] == b[0] for b in keys] for a in keys])
    same = torch.tensor([[a == b for b in keys] for a in keys])
    other = ~torch.eye(len(keys), dtype=torch.bool)
    kinds = {"same template": same & other, "other template": same_task & ~same}
    kinds["other dataset"] = ~same_task
    return {kind: distance[pairs].mean().item() for kind, pairs in kinds.items() if pairs.any()}


def row_distance(drawn: Tensor) -> float:
    """The mean cosine distance between two rows of one prompt, of prompts (N, P, C)."""
    unit, P = F.normalize(drawn.float(), dim=-1), drawn.shape[1]
    mean_cosine = (unit.sum(1).square().sum(-1) - P) / max(1, P * (P - 1))
    return 1 - mean_cosine.mean().item()


def speed(line: list[str]) -> dict:
    """Trained parameters of runs, and milliseconds of a core for an answer: the best of three."""
    file, *runs, _, _ = line
    examples, result = data.read(file)[:400], {}
    for run in runs:
        model, prefix, tokenizer, record = load_run(run)
        ids, options, prefix = prepare(model, tokenizer, examples, prefix, 32)
        times = []
        for _ in range(3):
            start = time.process_time()
            predict(model, tokenizer, ids, prefix, 32, options)
            times.append(time.process_time() - start)
        own = {"trained": record["trained_parameters"]}
        own["milliseconds"] = round(1000 * min(times) / len(examples), 2)
        result[Path(run).name] = own
    return result


READ, WINDOW = 64, 256  # tokens of a window before those that count, and in all


@torch.no_grad()
def forgetting(line: list[str]) -> dict:
    """Loss on text that no LM has read, in nats a token: the LM alone and with what runs trained.

    A prompt stands before a window of text, and a generated one is computed from its first tokens,
    whose own loss does not count. "again" is the LM alone afterwards, without the prompt.
    """
    file, *runs, _, _ = line
    result = {}
    for run in runs:
        model, prefix, tokenizer, record = load_run(run)
        corpus = data.encode_texts(data.read_texts(file), tokenizer)
        steps = max(1, min(8, (len(corpus.tokens) - 1) // (16 * WINDOW)))
        batches = [data.windows(corpus, 16, WINDOW, 0, step) for step in range(steps)]
        name = Path(run).name
        if prefix is None:
            result[name] = {"tuned": text_loss(model, None, batches)}
            continue
        before, attached, again = (text_loss(model, p, batches) for p in (None, prefix, None))
        result[name] = {"alone": before, "attached": attached, "again": again}
        result[name]["weights are the same"] = record["weights_after"] == record["weights_before"]
    return result


def text_loss(model, prefix, batches: list[data.Batch]) -> float:
    """The mean loss of the tokens from READ on."""
    total, count = 0.0, 0
    for batch in batches:
        targets = batch.targets.clone()  # `windows` keeps ids and targets in the same memory
        targets[:, :READ] = data.IGNORE_INDEX
        before = stack_prefixes(prefix, [row[:READ] for row in batch.ids.tolist()])
        total += target_loss(model, before, replace(batch, targets=targets)).item()
        count += int((targets != data.IGNORE_INDEX).sum())
    return total / count
