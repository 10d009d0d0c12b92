"""Prompts beside each other and beside fine-tuning: every run of the study, its cost, its tables.

Counterparts of tables 1, 8 and 9 and figure 3 of Levine et al. 2022, "Standing on the Shoulders of
Giant Frozen Language Models" (input-dependent prompt tuning, ID-PT), and of what Lester, Al-Rfou
and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", compare: initial
values, few-shot text prompts, prompt tuning and model tuning at two sizes of the LM, and transfer
to another domain. All of it on the 29 prompted tasks of suite.py. GROUPS lists the runs, the most
important first. study.py makes them, in runs/prompts.

    python reproduce.py prompts --plan       the cost sheet
    python reproduce.py prompts --grid       all runs, or what is missing of them, and the tables

--grid compares learning rates in whole runs. After a tenth of the steps, where Levine et al. do so,
the rates of ID-PT can hardly be told apart here.

Several processes can share the work: start the second command as often, each with
OMP_NUM_THREADS=1.
"""

from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

from show import only_shows, picture, show, show_table

import data
import eval as metrics
import genres
import prompts
import suite
import train
import world
from cost import conduct
from prompt_audit import distances, few_shot, forgetting, speed
from runs import read_predictions
from study import Job, Row, Study, curve, show_grid, show_orderings, spread, write_rows

# The runs

LENGTHS = (5, 10, 40)  # of prompts, beside 20
SHOTS = (0, 1, 4)
SINGLE = ("passage_qa", "record_qa", "people_choice")  # tasks with a prompt of their own
# Parts of commands. Study.line fills what stands in braces, such as {suite} (see `make_study`).
SUITE = "--train {suite}-train.jsonl --dev {suite}-dev.jsonl --test {suite}-test.jsonl"
MULTI = f"{SUITE} --mixture-cap 500 --max-new-tokens 32 --eval-every {{every}} --eval-limit 580"
ALONE = "--train {0}-train.jsonl --dev {0}-dev.jsonl --test {0}-test.jsonl --steps {{short}}"
EACH = f"{ALONE.format('{single}')} --per-task --batch-size 36 --eval-every {{short}}"
ID_PT = "train.py --method id_pt --encoder {pretrained}/t5"
PROMPT = "train.py --method prompt_tuning --beta2 0.999"
DEEP, TUNED = "train.py --method deep_prompt", "train.py --method fine_tuning"
ALONE_PROMPT = "shallow-vocab-high"  # the row with a prompt for each of SINGLE
LARGER, LARGER_PROMPT = "--model {pretrained}/lm2", "larger-shallow"
TRAINED = "{out}/prompt-20-0 {out}/deep-20-0 {out}/id-pt-20-0 {out}/fine-tuning-0"
ADDED, MANY = ALONE.format("{files}/world"), "{out}/fine-tuning-0/model"
OLD = "eval.py score {suite}-test.jsonl --max-new-tokens 32"


def tuned(task: str) -> str:
    """The command that tunes the LM for one task, on as many examples as EACH has for one."""
    return f"{TUNED} {ALONE.format(f'{{files}}/{task}')} --batch-size 12 --eval-every {{short}}"


def shift(trained: str, method: str) -> str:
    """The command that answers one of two reading tasks with what is trained on the other."""
    other = next(task for task in SINGLE[:2] if task != trained)
    test = f"{{files}}/{other}-test.jsonl"
    if method == "tuned":
        return f"eval.py score {test} --run {{out}}/tuned-{trained}-0"
    return f"eval.py mixed --input {test} --prompts {other}={{out}}/{ALONE_PROMPT}-0/{trained}"


START = {"vocab": "vocab", "text": "{instruction}", "labels": "labels", "random": "random"}
INSTRUCTION = "text:Read the text and answer the question about it:"
RATES = {  # row: learning rates; the first is used where --grid has chosen none
    "id-pt-20": ("3e-3", "1e-3", "1e-2", "3e-2"),
    "prompt-20": ("0.216", "0.024", "0.072", "0.648"),
    "fine-tuning": ("1e-3",),  # of 3e-4, 1e-3 and 3e-3 the best after 80 steps
}
SIZES = {  # learning rates that each initial value is tried with, in whole runs
    "shallow": {"low": "0.024", "middle": "0.072", "high": "0.216"},
    "deep": {"low": "0.03", "middle": "0.1", "high": "0.3"},
}
GROUPS = {
    "the suite, as in table 1": [
        Row("id-pt-20", f"{ID_PT} {MULTI} --prompt-length 20", 3, rates="id-pt-20"),
        Row("prompt-20", f"{PROMPT} {MULTI} --prompt-length 20", 3, rates="prompt-20"),
        Row("fine-tuning", f"{TUNED} {MULTI}", 3, rates="fine-tuning"),
        Row("zero-shot", OLD),
    ],
    "the suite by the prompt's length, as in table 9": [
        Row(f"{name}-{P}", f"{command} {MULTI} --prompt-length {P}", rates=f"{name}-20")
        for P in LENGTHS
        for name, command in (("id-pt", ID_PT), ("prompt", PROMPT))
    ],
    "what prompts do": [
        Row("deep-20", f"{DEEP} {MULTI}", 3),
        Row("distances", "distances {suite}-test.jsonl {out}/id-pt-20-0"),
        Row("speed", "speed {suite}-dev.jsonl {out}/prompt-20-0 {out}/id-pt-20-0"),
        Row("forgetting", f"forgetting {{files}}/held-out.jsonl {TRAINED}"),
    ],
    "initial values": [
        Row(f"{kind}-{init}-{size}", f"{method} {EACH} --init {start} --lr {rate}")
        for kind, method in (("shallow", PROMPT), ("deep", DEEP))
        for init, start in START.items()
        for size, rate in SIZES[kind].items()
    ],
    "prompt design and model tuning": [
        *[Row(f"design-{k}", f"few-shot {{single}} {k}") for k in SHOTS],
        *[Row(f"tuned-{task}", tuned(task), rates="fine-tuning") for task in SINGLE],
    ],
    "the same with the larger LM": [
        *[Row(f"larger-design-{k}", f"few-shot {{single}} {k} {LARGER}") for k in SHOTS],
        Row(LARGER_PROMPT, f"{PROMPT} {EACH} --lr {SIZES['shallow']['high']} {LARGER}"),
        *[
            Row(f"larger-tuned-{task}", f"{tuned(task)} {LARGER}", rates="fine-tuning")
            for task in SINGLE
        ],
    ],
    "another domain": [
        Row(f"shift-{method}-{task}", shift(task, method))
        for task in SINGLE[:2]
        for method in ("prompt", "tuned")
    ],
    "one more task": [
        Row("added-prompt", f"{PROMPT} {ADDED}", rates="prompt-20"),
        Row("added-tuned", f"{TUNED} {ADDED} --model {MANY}", rates="fine-tuning"),
        Row("old-tasks-after-it", f"{OLD} --run {{out}}/added-tuned-0"),
    ],
}
TABLE_1 = [  # the claim is that the first row has the higher F1
    ("ID-PT > prompt tuning", "id-pt-20", "prompt-20"),
    ("ID-PT > fine-tuning", "id-pt-20", "fine-tuning"),
    ("prompt tuning > zero-shot", "prompt-20", "zero-shot"),
]
ORDERINGS = [
    *[(f"length {P}: ID-PT > prompt tuning", f"id-pt-{P}", f"prompt-{P}") for P in LENGTHS],
    ("ID-PT, length 40 > 5", "id-pt-40", "id-pt-5"),
    ("prompt tuning, length 40 > 5", "prompt-40", "prompt-5"),
    ("deep > shallow, on the suite", "deep-20", "prompt-20"),
    *[
        (f"{kind}, {size} rate: {a} > {b}", f"{kind}-{a}-{size}", f"{kind}-{b}-{size}")
        for kind, size in (("shallow", "low"), ("shallow", "high"), ("deep", "middle"))
        for a, b in (("text", "random"), ("vocab", "random"), ("labels", "vocab"))
    ],
    ("deep from text > shallow from text", "deep-text-middle", "shallow-text-high"),
    ("4 shots > 1", "design-4", "design-1"),
    ("prompt tuning > 4 shots", ALONE_PROMPT, "design-4"),
    ("larger LM: prompt tuning > 4 shots", LARGER_PROMPT, "larger-design-4"),
    ("prompt tuning: larger LM > smaller", LARGER_PROMPT, ALONE_PROMPT),
    *[(f"{task}: model tuning > prompt tuning", f"tuned-{task}", ALONE_PROMPT) for task in SINGLE],
    *[
        (f"{task}, larger LM: model tuning > prompt tuning", f"larger-tuned-{task}", LARGER_PROMPT)
        for task in SINGLE
    ],
    *[
        (f"from {task}: prompt > tuned LM", f"shift-prompt-{task}", f"shift-tuned-{task}")
        for task in SINGLE[:2]
    ],
    ("fine-tuning > the same after one more task", "fine-tuning", "old-tasks-after-it"),
]
CLUSTERS = tuple(dict.fromkeys(task.cluster for task in suite.TASKS.values()))
OPEN = ("summarization", "structure to text")  # ROUGE-L stands beside F1


def prompt_study(args) -> dict:
    """Prompts of all kinds, ID-PT and fine-tuning: what they answer, cost and leave intact."""
    study = make_study(args, Path(args.out) / "prompts")
    return conduct(study, partial(write_files, study), report)


def make_study(args, folder: Path) -> Study:
    """The study in a folder, with flags of reproduce.py. Nothing is written."""
    functions = {"few-shot": few_shot, "distances": distances, "speed": speed}
    functions["forgetting"] = forgetting
    programs = {name: SimpleNamespace(main=function) for name, function in functions.items()}
    programs |= {"train.py": train, "eval.py": metrics}
    names = {"files": folder, "suite": folder / "suite", "single": folder / "single"}
    names |= {"instruction": INSTRUCTION, "short": max(1, args.steps // 5)}
    names |= {"every": max(1, args.steps // 8)}
    more = {"names": names, "share": 1, "metric": "f1", "tokens": 74}

    def asked(job: Job) -> int:  # of all tasks or of SINGLE, in four templates, of dev and test
        return args.count * (154 if "{suite}" in job.row.command else 48)

    def score(result: dict) -> float:
        return mean(task["f1"] for task in result["tasks"].values())

    return Study(args, folder, GROUPS, RATES, programs, **more, score=score, asked=asked)


def sizes(count: int) -> dict[str, int]:
    """Examples of a task in the files of the suite. Those of dev and test have four templates."""
    return {"train": 25 * count, "dev": max(1, count // 3), "test": count}


def write_files(study: Study) -> None:
    """Write the suite, the tasks of SINGLE, the world's questions and text that no LM has read."""
    count, place = study.args.count, world.make(study.args.world_seed)
    for split, size in sizes(count).items():
        whole = []
        for name, task in suite.TASKS.items():
            whole += suite.rows(place, name, split, min(size, task.size))
        write_rows(study.folder / f"suite-{split}.jsonl", whole)
        more = size if split == "train" else 2 * count
        single = {name: suite.rows(place, name, split, more) for name in SINGLE}
        single["single"] = [row for rows in single.values() for row in rows]
        questions = place.questions(split)
        chosen = data.sample(len(questions), 25 * count if split == "train" else 10 * count, 0)
        single["world"] = [questions[row] for row in chosen]
        for name, rows in single.items():
            write_rows(study.folder / f"{name}-{split}.jsonl", rows)
    write_rows(study.folder / "held-out.jsonl", list(genres.documents(place, 10 * count, seed=2)))


def report(study: Study) -> dict:
    """Print all tables and draw the picture. Returns what results/prompts.json holds."""
    results = {"rates": show_grid(study), "suite": show_suite(study), "single": show_single(study)}
    results["table 1"] = show_orderings(study, TABLE_1, ("all", *CLUSTERS))
    results["orderings"] = show_orderings(study, ORDERINGS, ("all",))
    for name in ("distances", "speed", "forgetting"):
        for job in study.finished(name):
            results[name] = job.record()["results"]
    for job in study.finished("added-prompt"):  # what the old tasks lose by it
        before, after = (job.record()[f"weights_{when}"] for when in ("before", "after"))
        results["added-prompt"] = {"weights are the same": before == after}
    for name in ("distances", "speed", "forgetting", "added-prompt"):
        for key, value in results.get(name, {}).items():
            show(f"{name}: {key}: {value}")
    drawn = ("id-pt-20", "prompt-20", "fine-tuning")
    results["curves"] = {name: curve(study, name) for name in drawn}
    with only_shows("picture"), picture(study.args.picture, 8, 3.5) as figure:
        draw(figure, results)
    return results


# Tables


def show_suite(study: Study) -> dict[str, dict]:
    """Print the medians over templates: of each row, and of those of TABLE_1 by cluster and task.

    Returns {row: {"seeds", "lr", "f1", "em", "rouge", "clusters", "datasets", ...}}, where f1 is a
    list of one for each seed, and other scores are means over seeds.
    """
    results, table = {}, []
    for row, jobs in answered(study, on_suite=True):
        runs = [prompts.template_medians(read_predictions(job.answers)) for job in jobs]
        f1, record = [run["f1"] for run in runs], jobs[0].record()
        result = {"seeds": len(runs), "f1": f1}
        result |= {key: mean(run[key] for run in runs) for key in ("em", "rouge")}
        for part in ("clusters", "datasets"):
            result[part] = {
                name: {key: mean(run[part][name][key] for run in runs) for key in prompts.MEDIANS}
                for name in runs[0][part]
            }
        kept = ("lr", "trained_parameters", "seconds", "step", "command")
        results[row.name] = result | {key: record[key] for key in kept if key in record}
        cells = [len(runs), *(record.get(key, "") for key in kept[:4])]
        table.append([row.name, *cells, spread(f1), f"{100 * result['em']:.1f}"])
    columns = ["", "seeds", "rate", "trained", "seconds", "best step", "F1", "accuracy"]
    if table:
        show_table("the suite: median over templates, mean over datasets, test", columns, table)
    names = dict.fromkeys(name for _, *pair in TABLE_1 for name in pair if name in results)
    lines = []
    for part in ("clusters", "datasets") if names else ():
        for name in results[next(iter(names))][part]:
            lines.append([name, *(scores(results[row][part], name) for row in names)])
    if lines:
        show_table("F1 / accuracy (/ ROUGE-L) by cluster and dataset", ["", *names], lines)
    return results


def answered(study: Study, on_suite: bool) -> list[tuple[Row, list[Job]]]:
    """The rows with finished runs that answered test questions, of the whole suite or not."""
    pairs = []
    for row in study.rows.values():
        jobs = [j for j in study.finished(row.name) if (j.answers / "predictions.jsonl").is_file()]
        if jobs and on_suite == ("{suite}" in row.command):
            pairs.append((row, jobs))
    return pairs


def scores(part: dict, name: str) -> str:
    """F1 and accuracy of a cluster or dataset in percent, and ROUGE-L if its answers are texts."""
    cluster = suite.TASKS[name].cluster if name in suite.TASKS else name
    keys = prompts.MEDIANS if cluster in OPEN else metrics.METRICS
    values = {key: f"{100 * part[name][key]:.1f}" for key in keys}
    return " / ".join([values["f1"], values["em"], *list(values.values())[2:]])


def show_single(study: Study) -> dict[str, dict]:
    """Print F1 of each task for the rows about few tasks. Returns {row: {task: F1}}."""
    results, rates = {}, {}
    for row, jobs in answered(study, on_suite=False):
        tasks = metrics.summary(read_predictions(jobs[0].answers))["tasks"]
        results[row.name] = {task: scored["f1"] for task, scored in tasks.items()}
        rates[row.name] = jobs[0].record().get("lr", "")
    columns = list(dict.fromkeys(task for row in results.values() for task in row))
    table = []
    for name, row in results.items():
        cells = [f"{100 * row[task]:.1f}" if task in row else "" for task in columns]
        table.append([name, rates[name], *cells])
    if table:
        show_table("single tasks: F1, test", ["", "rate", *columns], table)
    return results


def draw(figure, results: dict) -> None:
    """Draw dev scores along training (figure 3) and test F1 against the length (table 9)."""
    steps, lengths = figure.subplots(1, 2)
    for name, points in results["curves"].items():
        found = [(step, 100 * score) for step, score in points]
        steps.plot(*zip(*found) if found else ((), ()), marker="o", label=name)
    for name in ("id-pt", "prompt"):
        found = {P: results["suite"].get(f"{name}-{P}") for P in sorted((20, *LENGTHS))}
        found = {P: 100 * mean(row["f1"]) for P, row in found.items() if row}
        lengths.plot(list(found), list(found.values()), marker="o", label=name)
    steps.set(xlabel="steps", ylabel="mean dev F1")
    lengths.set(xlabel="prompt length", ylabel="test F1, median over templates")
    for axes in (steps, lengths):
        axes.legend(fontsize=7)
