"""What the runs of a study cost: seconds of a core, expected before any of them is made.

    conduct(study, write_files, report)   what every study does, in order
    show_cost(study)                      the sheet, a line for each group of rows
    seconds(study, job)                   of one job
    passes(run)                           how much of the LM a step and an answer of a method read

The unit is a token that the 6 layers of the embedded LM read once, forward, on one core of the
machine of RESULTS.md. Another LM costs as much more as its layers have more weights. Backward costs
as much as forward, and in trained layers twice as much. These are rough figures. Once trainings are
finished, their time corrects what is expected of others.

Needs study.py.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from show import show, show_table

from checkpoints import read_config, resolve
from model import Config
from runs import ASSETS
from study import Job, Study

TOKEN = 0.06e-3  # seconds
LOAD = 2.0  # seconds to load, to tokenise and to write
ANSWER = 10  # tokens of an answer and what decoding one by one costs
SAMPLE = (80, 4.4)  # tokens: a question of textual recursion, and each sample of its answer
FEW_SHOT = 18  # prompts of a row of few-shot tuning
ANALYSIS = 25.0  # seconds of what does not train
RANK, LEARN = 0.0009, 0.0036  # seconds: a question and a passage, scored, and learnt from
RETRIEVE = 0.3  # seconds: a step of the dual encoder


def conduct(study: Study, write_files: Callable[[], None], report: Callable[[Study], dict]) -> dict:
    """Print what the study costs and, without --plan, make what is missing of it. Returns what
    report(study) returns, the cost, and what was not made; with --plan nothing."""
    if not study.plan():
        raise ValueError(f"--only {study.args.only}: no row or table is called like this")
    cost = show_cost(study)
    if study.args.plan:
        return {}
    with study.alone():
        write_files()
    study.make()
    study.args.picture.parent.mkdir(exist_ok=True)
    with study.alone():
        results = report(study) | {"cost": cost, "missing": study.missing()}
    for reason in sorted(set(results["missing"].values())):
        names = [name for name, r in results["missing"].items() if r == reason]
        show(f"\n{len(names)} not made, {reason}: {', '.join(names[:9])}")
    return results


def passes(run) -> tuple[float, float]:
    """What a training step and an answer cost, in passes through the LM's layers.

    `run` has the flags of a program. A first pass that is kept costs nothing in a step. With
    trained filler it is not kept, and the backward pass goes through it.
    """
    variant = getattr(run, "variant", None)  # of continued pretraining
    if variant in ("fomaml", "reptile"):
        return (run.inner_steps * 2.4 + 3) / (run.inner_steps + 1), 1
    if variant in ("mtl", "t0") or getattr(run, "tune", None) == "lm":
        return 3, 1
    c, more = getattr(run, "connector_layers", 0) / 6, getattr(run, "passes", 2) - 1
    first = 2 if getattr(run, "pause_trained", False) else 0
    return {
        "neural_recursion": (first + more * (2 + 3 * c), 1 + more + more * c),
        "lm_connector": (first + 3 * c, 1 + c),
        "connector_lm": (2 + 3 * c, 1 + c),
        "fine_tuning": (3, 1),
        "training_free": (0, 2),
        "id_pt": (4, 2),  # the encoder reads the question, too
    }.get(run.method, (2.4, 1))  # every question attends to the prompt, too


def tokens(study: Study, run) -> float:
    """The tokens of an example, with filler, candidates or passages."""
    if run.method.startswith("pretrain_"):
        return run.seq_len
    if run.method == "reader" and run.top > 0:
        return run.context
    more = 3 * getattr(run, "pause", 0)
    if run.method == "textual_recursion":
        more += 3 + 6 * run.candidates**0.5  # about so many differ
    return study.tokens + more


def training_tokens(study: Study, run) -> float:
    """Tokens that the steps of a run read, and the dev scores along them."""
    step, answer = passes(run)
    examples = run.steps * run.batch_size * run.grad_accum
    has_dev = run.dev or not run.train  # then the questions are the world's
    scored = getattr(run, "eval_limit", 0) * (run.steps // run.eval_every) if has_dev else 0
    return tokens(study, run) * examples * step + (tokens(study, run) + ANSWER) * scored * answer


def encoder_seconds(study: Study, job: Job, run) -> float:
    """What the encoders of an open book take: the retriever, or the re-rankers of a reader."""
    if run.method == "retriever":
        return run.steps * RETRIEVE
    if run.method != "reader" or run.top == 0 or run.no_rerank:
        return 0.0
    learnt, scored = 0, study.sampled + study.asked(job)
    if not run.reranker:
        learnt = 3 * run.encoder_steps * 16 * run.group_size
        scored += run.eval_limit  # by the re-ranker of their own half
    return learnt * LEARN + scored * run.top * RANK


def seconds(study: Study, job: Job) -> float:
    """Expected seconds of a core for a job."""
    factor = TOKEN * size_of_lm(study, study.line(job))
    if job.program == "eval.py":
        return LOAD + factor * study.asked(job) * (study.tokens + ANSWER)
    if not job.trains and job.program != "transfer.py":
        return ANALYSIS
    run = flags(study, job)
    encoders = encoder_seconds(study, job, run)
    if run.method == "retriever":
        return encoders
    trainings = FEW_SHOT if getattr(run, "command", "") == "few-shot" else 1
    read = trainings * training_tokens(study, run)
    read += study.asked(job) * (tokens(study, run) + ANSWER) * passes(run)[1]
    if run.method == "textual_recursion":
        question, sample = SAMPLE
        read += (study.sampled + study.asked(job)) * (question + run.candidates * sample)
        if not run.stages_from:
            run.method = "prompt_tuning"
            read += (1 if run.no_cross_fit else 3) * training_tokens(study, run)
    return LOAD + encoders + factor * read


def size_of_lm(study: Study, line: list[str]) -> float:
    """How many times as many weights as those of the embedded LM the layers of a job's LM have."""
    args = study.args
    named = line[line.index("--model") + 1] if "--model" in line else ""
    larger = named == f"{args.pretrained}/lm2" or named.endswith("larger-0/model")
    folder = ASSETS / "lm2" if larger else args.model or ASSETS / "lm"
    return layer_weights(folder) / layer_weights(ASSETS / "lm")


@cache
def layer_weights(folder: str | Path) -> int:
    """The number of weights of an LM's layers."""
    c = Config(**read_config(resolve(folder, ["config.json"])))
    attention = 2 * c.head_dim * (c.n_heads + c.n_kv_heads)
    return c.n_layers * c.dim * (attention + (3 if c.gated else 2) * c.hidden_dim)


def flags(study: Study, job: Job):
    """The flags of a job that trains."""
    return study.programs[job.program].parse(study.line(job))


def recorded_seconds(study: Study, job: Job) -> float | None:
    """Expected seconds of that part of a job which its record counts: the steps. None if its stages
    count, too, or if it trains nothing."""
    if not job.trains:
        return None
    run = flags(study, job)
    if run.method in ("textual_recursion", "retriever"):
        return None
    return size_of_lm(study, study.line(job)) * TOKEN * training_tokens(study, run)


def show_cost(study: Study) -> dict:
    """Print the cost sheet. Returns {"seconds", "left"} of a core, and "factor": finished trainings
    took so many times as long as expected."""
    jobs, took, expected = study.plan(), 0.0, 0.0
    title_of = {row.name: title for title, rows in study.groups.items() for row in rows}
    sheet = {}  # group: [jobs, seconds, seconds to come]
    for job in jobs:
        cost, record = seconds(study, job), job.record()
        line = sheet.setdefault(title_of.get(job.row.name, "learning rates"), [0, 0.0, 0.0])
        line[0] += 1
        line[1] += cost
        line[2] += 0.0 if record or job.failed() else cost
        if record and (training := recorded_seconds(study, job)):
            took += record["seconds"]
            expected += training
    factor = took / expected if expected else 1.0
    rows = [[t, n, round(factor * a), round(factor * b)] for t, (n, a, b) in sheet.items()]
    show_table("cost", ["", "runs", "seconds of a core", "to come"], rows)
    total, left = (factor * sum(line[i] for line in sheet.values()) for i in (1, 2))
    show(f"\n{len(jobs)} runs: {total:.0f} seconds of a core, {left:.0f} of them to come.")
    show(f"Two processes on two quiet cores take {left / 7200:.1f} hours for these.")
    if expected:
        show(f"Finished trainings took {factor:.2f} times as long as expected.")
    return {"seconds": round(total), "left": round(left), "factor": factor}
