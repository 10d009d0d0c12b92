"""LM recursion beside its relatives: every run of the study, its cost, and which orderings hold.

Counterparts of figure 6 and of tables 4, 5 and 6 of Levine et al. 2022, "Standing on the Shoulders
of Giant Frozen Language Models", on the embedded world, and the controls that the paper leaves out.
GROUPS lists the runs, the most important first. study.py makes them, in runs/recursion.

    python reproduce.py recursion --plan       the cost sheet
    python reproduce.py recursion --grid       all runs, or what is missing of them, and the tables

Two processes can share the work: start the second command twice, each with OMP_NUM_THREADS=1.
"""

import shutil
import statistics
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from show import only_shows, picture, show, show_table

import torch

import audit
import data
import eval as metrics
import pretrain
import recurse
import train
from checkpoints import read_config
from cost import conduct, passes
from generate import predict
from model import LM, Config
from runs import ASSETS, load_run
from study import SLICES, Job, Row, Study, curve, em, show_grid, show_orderings, show_runs

# The runs

NEURAL, AFTER, BEFORE = (
    f"train.py --method {method} --residual off"  # the paper's form
    for method in ("neural_recursion", "lm_connector", "connector_lm")
)
PROMPT, TEXTUAL, TUNED = (
    f"train.py --method {method}"
    for method in ("prompt_tuning", "textual_recursion", "fine_tuning")
)
STORED, RANDOM, ONE = "--init {pretrained}", "--init random", "--connector-layers 1"
NEURAL_1 = f"{NEURAL} {ONE} {STORED}/neural_recursion_1"
NEURAL_2 = f"{NEURAL} {STORED}/neural_recursion_2"
AFTER_2, BEFORE_2 = f"{AFTER} {STORED}/lm_connector_2", f"{BEFORE} {STORED}/connector_lm_2"
LARGE = "{pretrained}/lm2"
BEST = "neural-2-muon-pause-3"
BRIDGES = "bridge", "bridge-pause", "bridge-trained"
THREE, SEVEN = "neural-2-residual-pause-3-trained", "neural-2-residual-pause-7-trained"
CLOCKED = ("prompt", "neural-2", BEST, "prompt-large")
QUESTION = 18  # its tokens
MORE = f"{TEXTUAL} --stages-from {{out}}/textual-16-0"  # the prompts before the last are the same


def residual(command: str) -> str:
    """The command with Connectors whose output is added to what it replaces in the paper."""
    return command.replace("--residual off", "--residual on")


RATES = {  # row: learning rates; the first is used where --grid has chosen none
    "neural-2": ("1e-3", "3e-4", "3e-3"),
    "neural-2-residual": ("1e-3", "3e-3"),
    "neural-2-residual-pause-3": ("1e-3", "3e-3"),
    "neural-2-random": ("1e-3", "3e-4", "3e-3"),
    "before-2": ("1e-3", "3e-4", "3e-3"),
    "before-2-random": ("1e-3", "3e-4", "3e-3"),
    "after-2": ("1e-3", "3e-4", "3e-3"),
    "after-2-random": ("1e-3", "3e-4", "3e-3"),
    "prompt": ("0.024", "0.008", "0.072"),  # a quarter of the embeddings' standard deviation
    "prompt-large": ("0.024", "0.008", "0.072"),
    "fine-tuning": ("3e-4", "1e-4", "1e-3"),
}
FILLER, MUON = "--pause 3", "--optimizer muon --lr 2e-3"
FILLED = {  # the rows that get filler: (the row of their learning rates, command)
    "before-2-muon": ("", f"{residual(BEFORE_2)} {MUON}"),
    "after-2-muon": ("", f"{residual(AFTER_2)} {MUON}"),
    "after-2-random": ("after-2-random", f"{AFTER} {RANDOM}"),
    "textual-16": ("prompt", f"{TEXTUAL} --candidates 16"),
    "prompt": ("prompt", PROMPT),
    "fine-tuning": ("fine-tuning", TUNED),
    "neural-2-residual": ("neural-2-residual-pause-3", residual(NEURAL_2)),
}


def filled(name: str, k: int, trained: bool = False, seeds: int = 1) -> Row:
    """The row of a method with k times filler."""
    rates, command = FILLED[name]
    end, flag = ("-trained", " --pause-trained") if trained else ("", "")
    return Row(f"{name}-pause-{k}{end}", f"{command} --pause {k}{flag}", seeds, rates)


# neural: LM-Connector-LM; before: Connector-LM; after: LM-Connector; then the Connector's layers.
# Connectors and prompts of the rows with "random" are not pretrained, nor are those of "prompt".
GROUPS = {
    "headline, as in table 4": [
        Row("neural-2", NEURAL_2, 3, rates="neural-2"),
        Row("neural-2-residual", residual(NEURAL_2), 3, rates="neural-2-residual"),
        Row("prompt", PROMPT, 3, rates="prompt"),
        Row(BEST, f"{residual(NEURAL_2)} {FILLER} {MUON}", 3),
        Row("before-2", BEFORE_2, 3, rates="before-2"),
        Row("textual-16", f"{TEXTUAL} --candidates 16", 3, rates="prompt"),
    ],
    "Connectors, as in table 6": [
        Row("neural-2-random", f"{NEURAL} {RANDOM}", rates="neural-2-random"),
        Row("before-2-random", f"{BEFORE} {RANDOM}", rates="before-2-random"),
        Row("neural-1", NEURAL_1, rates="neural-2"),
        Row("neural-1-random", f"{NEURAL} {ONE} {RANDOM}", rates="neural-2-random"),
        Row("neural-3-random", f"{NEURAL} {RANDOM} --connector-layers 3", rates="neural-2-random"),
        Row("after-2", AFTER_2, rates="after-2"),
        Row("after-2-random", f"{AFTER} {RANDOM}", 3, rates="after-2-random"),
        Row("text-prompt", "pretrain.py prompt --steps 700 --documents 60000"),
        Row("prompt-pretrained", f"{PROMPT} --init {{out}}/text-prompt-0", rates="prompt"),
    ],
    "controls": [
        Row("lm-alone", "eval.py score {test}"),
        Row("training-free", "train.py --method training_free"),
        Row("before-8-random", f"{BEFORE} {RANDOM} --connector-layers 8", rates="before-2-random"),
        Row("after-8-random", f"{AFTER} {RANDOM} --connector-layers 8", rates="after-2-random"),
        Row("fine-tuning", TUNED, rates="fine-tuning"),
        Row("prompt-long", f"{PROMPT} --steps {{long}}", rates="prompt"),
        Row("neural-2-passes-3", f"{NEURAL_2} --passes 3", rates="neural-2"),
        Row("neural-2-passes-3-each", f"{NEURAL_2} --passes 3 --connectors each", rates="neural-2"),
    ],
    "residual Connectors and filler after the question, which are not in the paper": [
        Row("neural-2-pause-3", f"{NEURAL_2} {FILLER}", rates="neural-2"),
        Row(f"{BEST}-long", f"{residual(NEURAL_2)} {FILLER} {MUON} --steps {{long}}"),
        *(filled(name, k) for k in (3, 1, 7) for name in FILLED),
        filled("neural-2-residual", 3, trained=True),
        filled("prompt", 3, trained=True),
        filled("before-2-muon", 3, trained=True),
        filled("neural-2-residual", 7, trained=True, seeds=3),
    ],
    "what a recursion does": [
        Row("hard", "audit.py hard {out}/prompt-long-0 --samples 64"),
        Row("passes", f"audit.py passes {{out}}/{BEST}-0"),
        Row("passes-paper", "audit.py passes {out}/neural-2-0"),
        Row("neural-2-paper-routed", "route {out}/neural-2-0 {dev} {test}"),
        Row("neural-2-routed", f"route {{out}}/{BEST}-0 {{dev}} {{test}}"),
        Row("bridge", "audit.py bridge {out}/neural-2-0 --limit 300"),
        Row("bridge-pause", f"audit.py bridge {{out}}/{BEST}-0 --limit 300"),
        Row("bridge-trained", f"audit.py bridge {{out}}/{SEVEN}-0 --limit 300"),
    ],
    "a larger LM": [
        Row("prompt-large", f"{PROMPT} --model {LARGE}", rates="prompt-large"),
        Row("lm-alone-large", f"eval.py score {{test}} --model {LARGE}"),
        Row("seconds", " ".join(["clock {test}", *(f"{{out}}/{name}-0" for name in CLOCKED)])),
    ],
    "textual recursion, as in table 5": [
        Row("textual-1", f"{MORE} --candidates 1", rates="prompt"),
        Row("textual-8", f"{MORE} --candidates 8", rates="prompt"),
        Row("textual-64", f"{MORE} --candidates 64", rates="prompt"),
        Row("textual-16-whole", f"{MORE} --candidates 16 --no-cross-fit", rates="prompt"),
    ],
}
ORDERINGS = [  # the claim is that the first row has the higher EM
    ("neural > textual", "neural-2", "textual-16"),
    ("textual > prompt tuning", "textual-16", "prompt"),
    ("neural > prompt tuning", "neural-2", "prompt"),
    ("pretrained > random, 2 layers", "neural-2", "neural-2-random"),
    ("pretrained > random, 1 layer", "neural-1", "neural-1-random"),
    ("two layers > one", "neural-2", "neural-1"),
    ("three layers > two, both random", "neural-3-random", "neural-2-random"),
    ("LM-Connector-LM > Connector-LM", "neural-2", "before-2"),
    ("Connector-LM > LM-Connector", "before-2", "after-2"),
    ("LM-Connector-LM > LM-Connector", "neural-2", "after-2"),
    ("16 candidates > 1", "textual-16", "textual-1"),
    ("64 candidates > 16", "textual-64", "textual-16"),
    # not in the paper
    ("residual > not residual", "neural-2-residual", "neural-2"),
    ("residual: filler 1 > 0", "neural-2-residual-pause-1", "neural-2-residual"),
    ("residual: filler 3 > 0", "neural-2-residual-pause-3", "neural-2-residual"),
    ("residual: filler 7 > 3", "neural-2-residual-pause-7", "neural-2-residual-pause-3"),
    ("residual: trained filler 3 > text", THREE, "neural-2-residual-pause-3"),
    ("prompt tuning: trained filler 3 > text", "prompt-pause-3-trained", "prompt-pause-3"),
    ("residual: trained filler 7 > 3", SEVEN, THREE),
    ("residual: trained filler 7 > text", SEVEN, "neural-2-residual-pause-7"),
    ("residual, trained filler 7 > all three", SEVEN, BEST),
    ("residual, trained filler 7 > prompt tuning", SEVEN, "prompt"),
    ("residual, trained filler 7 > fine-tuning with filler 7", SEVEN, "fine-tuning-pause-7"),
    ("residual, trained filler 7 > Connector-LM with all three", SEVEN, "before-2-muon-pause-3"),
    ("residual, trained filler 7 > LM-Connector, not pretrained", SEVEN, "after-2-random"),
    ("residual, trained filler 7 > the same with filler 7", SEVEN, "after-2-random-pause-7"),
    ("residual, trained filler 7 > LM-Connector of 8 layers", SEVEN, "after-8-random"),
    ("residual, filler 3: Muon > AdamW", BEST, "neural-2-residual-pause-3"),
    ("all three: 3 times the steps", f"{BEST}-long", BEST),
    ("textual: filler 3 > 0", "textual-16-pause-3", "textual-16"),
    ("all three > prompt tuning", BEST, "prompt"),
    ("all three > prompt tuning with filler", BEST, "prompt-pause-3"),
    ("all three > Connector-LM with all three", BEST, "before-2-muon-pause-3"),
    ("all three > LM-Connector with all three", BEST, "after-2-muon-pause-3"),
    ("all three > LM-Connector", BEST, "after-2"),
    ("all three > LM-Connector, not pretrained", BEST, "after-2-random"),
    ("residual > LM-Connector, not pretrained", "neural-2-residual", "after-2-random"),
    ("LM-Connector, not pretrained: filler 3 > 0", "after-2-random-pause-3", "after-2-random"),
    ("LM-Connector, not pretrained: filler 7 > 0", "after-2-random-pause-7", "after-2-random"),
    ("all three > the same with filler 3", BEST, "after-2-random-pause-3"),
    ("residual, filler 7 > the same", "neural-2-residual-pause-7", "after-2-random"),
    ("not residual: filler 3 > 0", "neural-2-pause-3", "neural-2"),
    ("LM-Connector of 8 layers > of 2", "after-8-random", "after-2-random"),
    ("all three > LM-Connector of 8 layers", BEST, "after-8-random"),
    ("all three > textual", BEST, "textual-16"),
    ("all three > fine-tuning with filler", BEST, "fine-tuning-pause-3"),
    ("all three > prompt tuning of the larger LM", BEST, "prompt-large"),
    ("all three: within 3 points of prompt tuning", BEST, "prompt", 0.03),
    ("all three: within 3 points of Connector-LM", BEST, "before-2-muon-pause-3", 0.03),
    ("two passes > equal compute in one", "neural-2", "before-8-random"),
    ("the same, both random", "neural-2-random", "before-8-random"),
    ("trained > training-free loop", "neural-2", "training-free"),
    ("textual > prompt of three times the steps", "textual-16", "prompt-long"),
    ("cross-fitting > the paper's way", "textual-16", "textual-16-whole"),
    ("three passes > two", "neural-2-passes-3", "neural-2"),
    ("the same, two Connectors", "neural-2-passes-3-each", "neural-2"),
    ("passes by difficulty > two for all", "neural-2-routed", BEST),
    ("the same, not residual", "neural-2-paper-routed", "neural-2"),
]


def recursion(args) -> dict:
    """LM recursion and its relatives: what they answer, what they cost, which orderings hold."""
    study = make_study(args, Path(args.out) / "recursion")
    return conduct(study, study.write_questions, report)


def make_study(args, folder: Path) -> Study:
    """The study in a folder, with flags of reproduce.py. Nothing is written."""
    programs = {"train.py": train, "pretrain.py": pretrain, "audit.py": audit, "eval.py": metrics}
    programs["route"] = SimpleNamespace(main=answer_by_difficulty)
    programs["clock"] = SimpleNamespace(main=time_answers)
    dev, test, training = (min(n, args.count or n) for n in (1344, 2240, 16128))
    more = {"tokens": QUESTION, "asked": lambda job: dev + test, "sampled": training}
    return Study(args, folder, GROUPS, RATES, programs, **more)


def report(study: Study) -> dict:
    """Print all tables and draw the picture. Returns what results/recursion.json holds."""
    results = {"rates": show_grid(study), "runs": show_runs(study)}
    results["orderings"] = show_orderings(study, ORDERINGS)
    results["sizes"] = show_sizes(study)
    results["candidates"] = show_candidates(study)
    results |= show_analyses(study)
    results["saturation"] = curve(study, "prompt-long")
    with only_shows("picture"), picture(study.args.picture, 10, 7) as figure:
        draw(figure, results)
    return results


def answer_by_difficulty(line: list[str]) -> dict:
    """Answer test questions with one pass or two, at the threshold that is best on dev.

    `line` is [a run of neural recursion, dev file, test file, "--out", folder].
    """
    run, dev, test, *out = line
    threshold = best_threshold(run, data.read(dev))
    return metrics.main(["score", test, "--run", run, f"--threshold={threshold}", *out])


def best_threshold(run: str, examples: list[data.Example]) -> float:
    """The threshold of `recurse.route` with the highest EM; of equal ones the lowest."""
    asked = audit.arguments(load_run(run), examples)
    pairs = recurse.predict_first_pass(*asked)
    answers, confidence = [answer for answer, _ in pairs], [logprob for _, logprob in pairs]
    scored = (metrics.score(examples, texts) for texts in (answers, predict(*asked)))
    first, second = ([row["em"] for row in rows] for rows in scored)
    costs = [1.0] * len(examples)
    routing = audit.routing_curve(first, second, confidence, costs, costs)
    threshold = max(routing, key=lambda row: row["em"])["threshold"]
    return 1.0 if threshold is None else threshold  # a log-probability is 0 at most


def time_answers(line: list[str]) -> dict[str, float]:
    """Seconds per answer of several runs, which answer the same 320 test questions in turn.

    `line` is [test file, run, ..., "--out", folder]. Returns {run: median of 5 rounds}. The time of
    loading does not count.
    """
    file, *runs = line[:-2]
    examples = data.read(file)
    examples = [examples[i] for i in data.sample(len(examples), 320, 0)]
    asked = {Path(run).name: audit.arguments(load_run(run), examples) for run in runs}
    seconds = {name: [] for name in asked}
    for _ in range(5):
        for name in asked:
            start = time.perf_counter()
            predict(*asked[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) / len(examples) for name, taken in seconds.items()}


# What only some rows have


@cache
def shape(model: str | None) -> LM:
    """An LM without values. None is the embedded LM, and so is an LM that is not there."""
    folder = Path(model or ASSETS / "lm")
    with torch.device("meta"):
        return LM(Config(**read_config(folder if folder.is_dir() else ASSETS / "lm")))


def parameters(model: str | None) -> tuple[int, int]:
    """The parameters of an LM, and those of its layers alone."""
    lm = shape(model)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (lm, lm.layers))


def size(model: str | None) -> float:
    """Operations of an LM's layers, relative to those of the embedded LM."""
    return parameters(model)[1] / parameters(None)[1]


def answer_operations(run) -> float:
    """Operations of an answer, relative to one pass through the embedded LM without filler."""
    return passes(run)[1] * (1 + 3 * run.pause / QUESTION) * size(run.model)  # a filler has 3


def textual_operations(samples: dict, reads: bool) -> float:
    """Operations to sample the candidates of a question and, if `reads`, to answer behind them.

    A question has 18 tokens and an answer 4, the one between two candidates included. Samples that
    agree are decoded once.
    """
    T, A, lm = QUESTION, 4, shape(None)
    sampled = samples["distinct"] * A
    more = audit.operations(lm, T + sampled, A) if reads else 0
    return audit.operations(lm, T, sampled) + more


def show_sizes(study: Study) -> dict:
    """Print two passes through the embedded LM beside one through the larger LM.

    Returns {"rows": EM, parameters and cost of an answer, "gap": what the larger LM gains with
    prompt tuning, by slice, "share": {row: the share of it that two passes close, or None where it
    is less than a point}}.
    """
    rows = {}
    clocked = [job.record()["results"] for job in study.finished("seconds")]
    for name in ("lm-alone", "prompt", "neural-2", BEST, "lm-alone-large", "prompt-large"):
        jobs = study.finished(name)
        if jobs:
            seconds = clocked[0][f"{name}-0"] if clocked and name in CLOCKED else None
            rows[name] = size_row(study, jobs) | {"seconds": seconds}
    table = [[name, row["seeds"], *size_cells(row)] for name, row in rows.items()]
    if table:
        costs = ["frozen", "trained", "operations", "ms"]
        title = "two sizes: test EM, parameters, and the cost of an answer beside the LM alone"
        show_table(title, ["", "seeds", *SLICES, *costs], table)
    if not {"prompt", "prompt-large"} <= rows.keys():
        return {"rows": rows, "gap": {}, "share": {}}
    small, large = rows["prompt"]["em"], rows["prompt-large"]["em"]
    gap = {part: large[part] - small[part] for part in small if part in large}
    share = {}
    for name in [name for name in ("neural-2", BEST) if name in rows]:
        gains = {part: rows[name]["em"][part] - small[part] for part in gap}
        share[name] = {k: gains[k] / gap[k] if gap[k] >= 0.01 else None for k in gap}
    table = [["the gap, in points", *(f"{100 * value:+.1f}" for value in gap.values())]]
    for name, shares in share.items():
        table.append([name, *("-" if x is None else f"{100 * x:.0f} %" for x in shares.values())])
    title = "the share of the gap between prompt and prompt-large that two passes close"
    show_table(f"{title}; it means nothing (-) below a point", ["", *gap], table)
    return {"rows": rows, "gap": gap, "share": share}


def size_row(study: Study, jobs: list[Job]) -> dict:
    """Mean test EM by slice of the seeds of a row, its parameters, and operations of an answer."""
    records, line = [job.record() for job in jobs], study.line(jobs[0])
    trained = 0
    if jobs[0].trains:
        run = train.parse(line)
        model, operations = run.model, answer_operations(run)
        trained = records[0]["trained_parameters"]
    else:
        model = line[line.index("--model") + 1] if "--model" in line else None
        operations = size(model)
    scores = {part: [em(record, "test", part) for record in records] for part in SLICES}
    means = {part: statistics.mean(x) for part, x in scores.items() if None not in x}
    row = {"seeds": len(jobs), "em": means, "frozen": parameters(model)[0], "trained": trained}
    return row | {"operations": operations}


def size_cells(row: dict) -> list[str]:
    """What a table shows of a row: EM in percent, parameters, operations and milliseconds."""
    cells = [f"{100 * row['em'][part]:.1f}" if part in row["em"] else "-" for part in SLICES]
    cells += [f"{row['frozen']:,}", f"{row['trained']:,}", f"{row['operations']:.2f}"]
    return [*cells, "-" if row["seconds"] is None else f"{1000 * row['seconds']:.2f}"]


def show_candidates(study: Study) -> list[dict]:
    """Print how good the candidates of test questions are, and EM after reading them."""
    results = []
    for row in study.rows.values():
        finished = study.finished(row.name) if row.command.startswith(TEXTUAL) else []
        for record in [job.record() for job in finished[:1]]:
            scores, n = record["candidates"][0]["test"], record["arguments"]["candidates"]
            for part, one in {"all": scores, **scores["tasks"]}.items():
                kept = {key: one[key] for key in ("recall", "best", "majority", "distinct")}
                result = {"row": row.name, "samples": n, "slice": part, **kept}
                results.append(result | {"em": em(record, "test", part)})
    results.sort(key=lambda r: (r["slice"], r["samples"], r["row"]))
    table = []
    for r in results:
        values = [r["recall"][str(r["samples"])], r["best"], r["majority"], r["em"]]
        percents = [f"{100 * value:.1f}" for value in values]
        table.append([r["row"], r["slice"], *percents, f"{r['distinct']:.1f}"])
    columns = ["", "slice", "recall@n", "likeliest", "most frequent", "EM", "different ones"]
    if table:
        show_table("candidates, and what reading them gives: test, in percent", columns, table)
    return results


def show_analyses(study: Study) -> dict:
    """Print EM on the hard questions and the rates of the audit. Returns both, and the curve."""
    names = ("hard", "passes", "passes-paper", *BRIDGES)
    found = {name: study.finished(name)[:1] for name in names}
    results = {}
    for job in found["hard"]:
        lines = data.json_lines(job.answers)
        hard = [data.parse_record(record, source) for source, record in lines]
        tested = [one for name in study.rows for one in study.finished(name)]
        tested = [one for one in tested if (one.answers / "predictions.jsonl").is_file()]
        results["hard"] = audit.scores_on(hard, [one.answers for one in tested])
        for row, one in zip(results["hard"], tested):
            row["what"] = one.folder.name
        show(f"\nEM on the {len(hard)} questions without a right answer among 64 samples\n")
        audit.show_rates(results["hard"])
    for job in found["passes"] + found["passes-paper"]:
        result = results[job.row.name] = job.record()["results"]
        rows = sorted({round(k / 40 * (len(result["curve"]) - 1)) for k in range(41)})
        result["curve"] = [result["curve"][row] for row in rows]
        show(f"\none pass or two: {audited(job)}\n")
        audit.show_curve(result, None)
    for job in (job for name in BRIDGES for job in found[name]):
        results[job.row.name] = job.record()["results"]["rates"]
        copy = study.args.picture.with_stem(f"{study.args.picture.stem}-{job.row.name}")
        with suppress(FileNotFoundError):  # nothing could draw it
            shutil.copyfile(job.answers / "bridge.png", copy)
        show(f"\ntwo-hop questions: what the first pass of {audited(job)} hands over\n")
        audit.show_rates(results[job.row.name])
    return results


def audited(job: Job) -> str:
    """The run that an analysis is about."""
    return job.row.command.split("/")[1].split()[0]


def draw(figure, results: dict) -> None:
    """Draw test EM against candidates, average passes and operations, and the prompt's curve."""
    (candidates, steps), below = figure.subplots(2, 2)
    rows = [r for r in results["candidates"] if r["slice"] == "all" and "whole" not in r["row"]]
    rows = [r for r in rows if "pause" not in r["row"]]
    read, majority = ([100 * r[key] for r in rows] for key in ("em", "majority"))
    n = [r["samples"] for r in rows]
    recall = [100 * r["recall"][str(r["samples"])] for r in rows]
    candidates.plot(n, recall, marker="o", label="a right one among them")
    candidates.plot(n, read, marker="o", label="EM after reading them")
    candidates.plot(n, majority, marker="o", label="the most frequent one")
    candidates.set(xlabel="candidates", ylabel="test EM", xscale="log")
    routing = results.get("passes", {"curve": []})["curve"]
    for axes, x in zip(below, ("passes", "operations")):
        for key, label in (("oracle", "oracle"), ("em", "by confidence"), ("random", "at random")):
            axes.plot([r[x] for r in routing], [100 * r[key] for r in routing], label=label)
        axes.set(xlabel=f"{x} for a question", ylabel="test EM")
    by_passes, by_operations = below
    for values, style, label, reads in (
        (read, ":", "textual", True),
        (majority, "--", "most frequent", False),
    ):
        for y in [y for r, y in zip(rows, values) if r["samples"] == 16]:
            by_passes.axhline(y, linestyle=style, color="gray", label=f"{label}, 16 samples")
        costs = [textual_operations(r, reads) for r in rows]
        by_operations.plot(costs, values, style, marker="o", color="gray", label=label)
    for axes in (candidates, *below):
        axes.legend(fontsize=7)
    x, y = zip(*results["saturation"]) if results["saturation"] else ((), ())
    steps.plot(x, [100 * score for score in y], marker="o")
    steps.set(xlabel="steps of prompt tuning", ylabel="dev EM")
