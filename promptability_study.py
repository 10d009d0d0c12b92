"""Continued pretraining on the embedded LM: the runs, and the counterpart of table 1 of Wu et al.

Wu et al. 2022, "Continued Pretraining for Better Zero- and Few-Shot Promptability". The LM, a
prompt or both are trained on the source tasks of transfer_study.py, but not on sentence completion,
natural language inference, coreference and word sense. The nine tasks of these clusters are the
test: zero-shot behind natural-language templates, and with a prompt tuned on 16 examples of a
template, the same for all seeds. The rows are part of `python reproduce.py transfer`.

A step of most variants reads 64 examples (paper: 4,096), four batches of one task each. FOMAML and
Reptile split a task's batch into eight parts of 8: seven inner steps and the query. So their steps
read 256, four times as many, like the paper's Reptile. `reptile-small` reads one task a step.
`mtl-long` and `t0-long` take three times the steps: about FOMAML's time, and two thirds of
Reptile's. The optimiser is Adafactor, as in the paper. A prompt alone has the rate of the few-shot
prompts, 0.1. Where the LM is trained it is 3e-4 (paper: 1e-3), the best of 1e-4, 3e-4 and 1e-3 for
T0, in one seed, by the zero-shot gain on dev examples of the nine tasks.

A star marks a task that not even tuning of the LM learns (suite.AT_CHANCE).
"""

from show import show, show_table

import numpy as np

import data
import suite
from promptability import HELD_OUT
from runs import read_predictions
from study import Row, Study, show_differences, significance, spread

CONTINUE = "transfer.py continue --train {suite} --limit 300 --prompt-length 10 --eval-every 100000"
PLAIN, META = "--batch-size 16 --grad-accum 4", "--batch-size 64 --grad-accum"
SHORT, LONG = "--steps {steps}", "--steps {long}"
VARIANTS = {
    "t0": f"--variant t0 {PLAIN} --lr 3e-4 {SHORT}",
    "ppt": f"--variant ppt {PLAIN} --lr 0.1 {SHORT}",
    "mtl": f"--variant mtl {PLAIN} --lr 3e-4 {SHORT}",
    "reptile": f"--variant reptile {META} 4 --lr 3e-4 {SHORT}",
    "fomaml": f"--variant fomaml {META} 4 --lr 3e-4 {SHORT}",
    "reptile-small": f"--variant reptile {META} 1 --lr 3e-4 {SHORT}",
    "t0-long": f"--variant t0 {PLAIN} --lr 3e-4 {LONG}",
    "mtl-long": f"--variant mtl {PLAIN} --lr 3e-4 {LONG}",
}
SHOTS = "transfer.py few-shot --train {held} --test {held} --prompt-length 10 --seed {seed}"
SHALLOW_LR, DEEP_LR = "--lr 0.1", "--deep --lr 0.03"  # of the few-shot prompts
DEEP = ("mtl", "ppt", "reptile", "fomaml", "reptile-small", "mtl-long")
TEMPLATES, TEST = 2, 50  # of each held-out task; test examples of each template


def rows(name: str, seeds: int = 1, deep: bool = False) -> list[Row]:
    """The training of a variant, and its scores: NAME, NAME-zero and NAME-few."""
    kind, flags, rate = name.split("-")[0], VARIANTS[name], SHALLOW_LR
    if deep:
        name, rate = f"{name}-deep", DEEP_LR
        flags += f" {DEEP_LR}" if kind == "ppt" else " --deep"
    run = f"{{out}}/{name}-{{seed}}"
    lm, prompt = f"--model {run}/model", f"--init {run}"
    start = {"t0": lm, "ppt": prompt}.get(kind, f"{lm} {prompt}")  # what the variant trains
    return [
        Row(name, f"{CONTINUE} {flags}", seeds),
        Row(f"{name}-zero", f"eval.py score {{zero}} --run {run}", seeds),
        Row(f"{name}-few", f"{SHOTS} {start} {rate}", seeds),
    ]


GROUPS = {
    "continued pretraining": [
        Row("none-zero", "eval.py score {zero}"),
        Row("none-few", f"{SHOTS} {SHALLOW_LR}", 3),
        *(row for name in ("t0", "ppt", "mtl", "reptile") for row in rows(name, 3)),
    ],
    "its other variants": [
        *rows("fomaml", 3),
        *(row for name in ("reptile-small", "t0-long", "mtl-long") for row in rows(name)),
    ],
    "deep prompts": [
        Row("none-deep-few", f"{SHOTS} {DEEP_LR}"),
        Row("t0-deep-few", f"{SHOTS} --model {{out}}/t0-{{seed}}/model {DEEP_LR}"),
        *(row for name in DEEP for row in rows(name, deep=True)),
    ],
}


def deep_claims(shots: str, part: str) -> list[tuple[str, str, str]]:
    """The claims on multi-task training of an LM and a deep prompt, for one kind of score."""
    rows = {  # the claim, without what it is on: its rows
        " > prompt alone": ("mtl", "ppt"),
        " > Reptile": ("mtl", "reptile"),
        " > FOMAML": ("mtl", "fomaml"),
        ", 3x the steps > Reptile": ("mtl-long", "reptile"),
        " > Reptile, equal examples": ("mtl", "reptile-small"),
        ", 3x the steps > FOMAML": ("mtl-long", "fomaml"),
    }
    start, end = f"{shots}, deep: LM and prompt", f"-deep-{part}"
    return [(f"{start}{claim}", f"{a}{end}", f"{b}{end}") for claim, (a, b) in rows.items()]


CLAIMS = [  # the claim is that the first row has the higher average relative gain
    ("zero-shot: T0 > none", "t0-zero", "none-zero"),
    ("zero-shot: LM and prompt > none", "mtl-zero", "none-zero"),
    ("zero-shot: FOMAML > none", "fomaml-zero", "none-zero"),
    ("zero-shot: LM and prompt > T0", "mtl-zero", "t0-zero"),
    ("zero-shot: LM and prompt > prompt alone", "mtl-zero", "ppt-zero"),
    ("zero-shot: prompt alone > none", "ppt-zero", "none-zero"),
    ("zero-shot: LM and prompt > Reptile", "mtl-zero", "reptile-zero"),
    ("zero-shot: LM and prompt, 3x the steps > Reptile", "mtl-long-zero", "reptile-zero"),
    ("zero-shot: LM and prompt > Reptile, equal examples", "mtl-zero", "reptile-small-zero"),
    ("zero-shot: LM and prompt > FOMAML, equal steps", "mtl-zero", "fomaml-zero"),
    ("zero-shot: LM and prompt, 3x the steps > FOMAML", "mtl-long-zero", "fomaml-zero"),
    ("zero-shot: LM and prompt > T0, both 3x the steps", "mtl-long-zero", "t0-long-zero"),
    ("16-shot: T0 > none", "t0-few", "none-few"),
    ("16-shot: LM and prompt > T0", "mtl-few", "t0-few"),
    ("16-shot: LM and prompt > prompt alone", "mtl-few", "ppt-few"),
    ("16-shot: LM and prompt > none", "mtl-few", "none-few"),
    ("16-shot: FOMAML > none", "fomaml-few", "none-few"),
    ("16-shot: prompt alone > none", "ppt-few", "none-few"),
    ("16-shot: LM and prompt > Reptile, equal steps", "mtl-few", "reptile-few"),
    ("16-shot: LM and prompt, 3x the steps > Reptile", "mtl-long-few", "reptile-few"),
    ("16-shot: LM and prompt > Reptile, equal examples", "mtl-few", "reptile-small-few"),
    ("16-shot: LM and prompt > FOMAML, equal steps", "mtl-few", "fomaml-few"),
    ("16-shot: LM and prompt, 3x the steps > FOMAML", "mtl-long-few", "fomaml-few"),
    ("16-shot: LM and prompt > T0, both 3x the steps", "mtl-long-few", "t0-long-few"),
    ("16-shot > zero-shot, LM and prompt", "mtl-few", "mtl-zero"),
    ("16-shot > zero-shot, the LM as it is", "none-few", "none-zero"),
    ("zero-shot > 16-shot, T0", "t0-zero", "t0-few"),
    ("zero-shot: shallow > deep, LM and prompt", "mtl-zero", "mtl-deep-zero"),
    ("16-shot: deep > shallow, LM and prompt", "mtl-deep-few", "mtl-few"),
    ("16-shot: deep > shallow, the LM as it is", "none-deep-few", "none-few"),
    *deep_claims("zero-shot", "zero"),
    ("16-shot, deep: LM and prompt > none", "mtl-deep-few", "none-deep-few"),
    ("16-shot, deep: LM and prompt > T0", "mtl-deep-few", "t0-deep-few"),
    *deep_claims("16-shot", "few"),
]


def held_out_files(place) -> dict[str, list[dict]]:
    """{file name: rows}: --train and --test of the nine tasks, in their first templates, and all
    their test examples."""
    files, everything = {}, []
    for name in held_out_tasks():
        kept = [template for template, _, _ in suite.TEMPLATES[name][:TEMPLATES]]
        for split, count in (("train", suite.LOW // 4), ("test", TEST)):
            by_template = {template: [] for template in kept}
            for row in suite.rows(place, name, split):
                if row["template"] in kept and len(by_template[row["template"]]) < count:
                    by_template[row["template"]].append(row)
            files[f"{name}-{split}.jsonl"] = sum(by_template.values(), [])
        everything += files[f"{name}-test.jsonl"]
    return files | {"all.jsonl": everything}


def held_out_tasks() -> list[str]:
    """The tasks of the four clusters."""
    return [name for name, task in suite.TASKS.items() if task.cluster in HELD_OUT]


# What came out


def promptability(study: Study, file: str) -> dict:
    """Print the tables. `file` holds all test examples. Returns what results/transfer.json holds.

    {} if nothing is finished.
    """
    chance = {(e.task, e.id): 1 / len(e.options) for e in data.read(file)}
    names = [name for name in study.rows if name.endswith(("-zero", "-few"))]
    found = {name: runs for name in names if (runs := test_rows(study, name))}
    if not found:
        return {}
    results = {name: summary(runs, chance) for name, runs in found.items()}
    variants = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in found))
    table, details = [], []
    for name in variants:
        gains = [results.get(f"{name}-{part}", {}).get("gain") for part in ("zero", "few")]
        cells = ["-" if gain is None else spread(gain) for gain in gains]
        seconds = [job.record()["seconds"] for job in study.finished(name)]  # of its training
        table.append([name, f"{np.mean(seconds):.0f}" if seconds else "", *cells])
        for part in ("zero", "few"):
            if one := results.get(f"{name}-{part}"):
                values = [f"{100 * value:.0f}" for value in one["datasets"].values()]
                details.append([name, "0" if part == "zero" else "16", *values])
    columns = ["", "seconds", "0-shot", "16-shot"]
    show_table("average relative gain over chance, in percent", columns, table)
    datasets = list(next(iter(results.values()))["datasets"])
    names = map(suite.starred, datasets)
    levels = [
        f"{100 * np.mean([c for (t, _), c in chance.items() if t == d]):.0f}" for d in datasets
    ]
    details.append(["chance", "", *levels])
    show_table("accuracy by dataset, in percent", ["", "shots", *names], details)
    floor = at_the_floor(found, chance)
    show(f"\ngain over chance not significantly above 0: {', '.join(floor) or 'none'}")
    return {"gains": results, "floor": floor, "promptability": show_claims(found, chance)}


def test_rows(study: Study, name: str) -> list[dict]:
    """{(task, id): line of predictions.jsonl} of every finished seed of a row."""
    files = [read_predictions(job.answers) for job in study.finished(name)]
    return [{(r["task"], r["id"]): r for r in rows} for rows in files]


def summary(runs: list[dict], chance: dict) -> dict:
    """{"gain": one for each seed, "datasets": {task: mean accuracy over its templates}}."""
    found = {}
    for (task, _), row in (item for run in runs for item in run.items()):
        found.setdefault(task, {}).setdefault(row["template"], []).append(row["em"])
    means = {t: float(np.mean([np.mean(found[t][k]) for k in found[t]])) for t in sorted(found)}
    return {"gain": relative_gains(runs, chance).mean(1).tolist(), "datasets": means}


def relative_gains(runs: list[dict], chance: dict, left_out=()) -> np.ndarray:
    """(seeds, examples): each example's part of the average relative gain, which is their mean.

    An example counts once, in all its templates. They are in the same order for every row. Data
    sets in left_out do not count.
    """
    keys = sorted(key for key in runs[0] if key[0] not in left_out)
    place = [(task, runs[0][task, id]["template"]) for task, id in keys]
    templates = {pair: place.count(pair) for pair in set(place)}  # examples of each
    datasets = {task: sum(t == task for t, _ in templates) for task, _ in templates}
    weight = np.array([1 / (templates[p] * datasets[p[0]] * len(datasets)) for p in place])
    level = np.array([chance[key] for key in keys])
    right = np.array([[run[key]["em"] for key in keys] for run in runs])
    own = [(task, id.removesuffix(f"-{t}")) for (task, id), (_, t) in zip(keys, place)]
    number = {example: i for i, example in enumerate(dict.fromkeys(own))}
    parts = np.zeros((len(runs), len(number)))
    np.add.at(parts, (slice(None), [number[e] for e in own]), weight * (right - level) / level)
    return len(number) * parts


def at_the_floor(found: dict[str, list[dict]], chance: dict) -> list[str]:
    """The rows whose gain may well be zero: the bootstrap's 95 % interval reaches it."""
    gains = {name: relative_gains(runs, chance) for name, runs in found.items()}
    zero = {name: np.zeros_like(part) for name, part in gains.items()}
    return [n for n in found if significance(gains[n], zero[n])["low"] <= 0]


def show_claims(found: dict[str, list[dict]], chance: dict) -> list[dict]:
    """Print which claims hold, by a bootstrap that pairs the predictions on each example."""
    results = []
    for claim, *pair in CLAIMS:
        if not all(name in found for name in pair):
            continue
        for part, left_out in (("all tasks", ()), ("those that can be learnt", suite.AT_CHANCE)):
            a, b = (relative_gains(found[name], chance, left_out) for name in pair)
            if a.size:
                line = {"claim": claim, "rows": pair, "slice": part, "seeds": [len(a), len(b)]}
                results.append(line | significance(a, b))
    show_differences("average relative gain", results)
    return results
