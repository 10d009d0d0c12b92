"""A study: many runs of one question, made once, and compared.

A Row is a command for a number of seeds. Its runs lie in a folder of their own, below that of the
study. A finished run is not made again, and a stopped one goes on where it was. Several processes
may make the runs of one study: a run that is locked by another process is left to it.

    study = Study(args, folder, groups, rates, {"train.py": train})
    study.make()
    tables = show_runs(study)

reproduce.py has the flags that `args` must have. Needs runs.py, world.py, data.py and eval.py, and
the programs of the rows.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from show import show, show_table

from safetensors import SafetensorError

import data
import eval as metrics
import world
from checkpoints import read_json, write_json, write_lines
from runs import Run, read_predictions, read_record

SLICES = ("all", "one-hop", "two-hop", "two-hop-person")
WAIT = 5.0  # seconds between two looks at what another process makes

# The runs


class Row(NamedTuple):
    """A command, which is run once for every seed."""

    name: str  # with the seed, the run's folder
    # {out}: the study's folder; {pretrained}; {seed}; {other}: another seed; {dev}, {test}: files;
    # {long}: steps; and the study's names
    command: str
    seeds: int = 1
    rates: str = ""  # the row whose learning rates it takes; "" for the command's default


TRAIN = ("train.py", "pretrain.py", "transfer.py source", "transfer.py continue")


@dataclass(frozen=True)
class Job:
    """One seed of a row. It is a run of a program that trains, or an analysis of finished runs."""

    row: Row
    seed: int
    folder: Path

    @property
    def command(self) -> str:
        """The row's command for this seed."""
        other = 0 if self.seed else 1
        return self.row.command.replace("{seed}", f"{self.seed}").replace("{other}", f"{other}")

    @property
    def program(self) -> str:
        """The first word of the command."""
        return self.command.split()[0]

    @property
    def trains(self) -> bool:
        """Whether the program leaves a run's folder, with run.json."""
        return self.command.startswith(TRAIN)

    @property
    def short(self) -> bool:
        """Whether it only compares learning rates."""
        return self.row.name.startswith("grid-")

    @property
    def answers(self) -> Path:
        """Where predictions.jsonl is, if the program writes it. Else what an analysis wrote."""
        return self.folder if self.trains else self.folder / "out"

    def record(self) -> dict | None:
        """run.json of a finished run or result.json of a finished analysis, else None.

        result.json has the keys command, seconds and results.
        """
        path = self.folder / ("run.json" if self.trains else "result.json")
        if not path.is_file():
            return None
        record = read_record(self.folder) if self.trains else read_json(path)
        return record if "results" in record else None

    def failed(self) -> bool:
        """Whether the run ended with an error, which failed.json holds."""
        return (self.folder / "failed.json").is_file()


@dataclass
class Study:
    """All rows of a study. The first group and the first row of a group matter most."""

    args: argparse.Namespace  # of reproduce.py
    folder: Path
    groups: dict[str, list[Row]]
    rates: dict[str, tuple[str, ...]]  # row: learning rates; the first needs no grid
    programs: dict  # name: what has a function main(arguments), which returns a dict
    names: dict[str, object] = field(default_factory=dict)  # what else {name} stands for in a row
    share: int = 4  # a run that compares learning rates takes 1 / share of the steps
    metric: str = "em"  # what orderings compare
    score: Callable[[dict], float] = itemgetter("em")  # of results["dev"]; chooses learning rates
    tokens: int = 0  # of an example
    asked: Callable[[Job], int] = lambda job: 0  # dev and test questions that a job answers
    sampled: int = 0  # training questions with candidates or passages
    there: set[Path] = field(default_factory=set)  # folders that `ready` has found finished

    @property
    def rows(self) -> dict[str, Row]:
        """Every row by its name."""
        return {row.name: row for rows in self.groups.values() for row in rows}

    def jobs(self, row: Row) -> list[Job]:
        """A row with each of its seeds."""
        seeds = range(min(row.seeds, self.args.seeds))
        return [Job(row, seed, self.folder / f"{row.name}-{seed}") for seed in seeds]

    def finished(self, name: str) -> list[Job]:
        """The finished jobs of a row; none if there is no such row."""
        row = self.rows.get(name)
        return [job for job in self.jobs(row) if job.record()] if row else []

    def grid(self, name: str) -> list[Job]:
        """A row with each of its learning rates, for a part of the steps, without test. If there is
        only one, none."""
        jobs, rates = [], self.rates.get(name, ())
        for rate in rates if len(rates) > 1 else ():
            command = f"{self.rows[name].command} --lr {rate}"
            jobs += self.jobs(Row(f"grid-{name}-{rate}", command))
        return jobs

    def plan(self) -> list[Job]:
        """All jobs in the order of their importance, each behind the grid of its learning rate."""
        jobs, chosen = [], set()
        for row, title in [(row, title) for title, rows in self.groups.items() for row in rows]:
            if self.args.only not in f"{title}: {row.name}":
                continue
            if self.args.grid and row.rates not in chosen:
                chosen.add(row.rates)
                jobs += self.grid(row.rates)
            jobs += self.jobs(row)
        return jobs

    def best_rate(self, name: str) -> str:
        """The learning rate with the best dev score in the grid; the first if a run is missing."""
        records = [job.record() for job in self.grid(name) if not job.failed()]
        if not records or None in records:
            return self.rates[name][0]
        best = max(records, key=lambda record: self.score(record["results"]["dev"]))
        return f"{best['arguments']['lr']:g}"

    def ready(self, job: Job) -> bool:
        """Whether everything that a job starts from is there."""
        grid = self.grid(job.row.rates) if self.args.grid else []
        if any(not j.record() and not j.failed() for j in grid):
            return False
        for place, name in re.findall(r"\{(out|pretrained)\}/([\w-]+)", job.command):
            folder = Path(self.args.pretrained if place == "pretrained" else self.folder) / name
            if folder in self.there:
                continue
            if (folder / "run.json").is_file():
                there = "results" in read_record(folder)
            elif place == "pretrained":  # an asset is no run
                there = folder.is_dir()
            else:  # an analysis
                there = (folder / "result.json").is_file()
            if not there:
                return False
            self.there.add(folder)
        return True

    def line(self, job: Job) -> list[str]:
        """The arguments of a job's program."""
        args, steps = self.args, self.args.steps
        files = {split: str(self.folder / f"{split}.jsonl") for split in world.SPLITS}
        names = files | {"out": self.folder, "pretrained": args.pretrained, "long": 3 * steps}
        names |= self.names
        line, model = [word.format(**names) for word in job.command.split()[1:]], []
        if args.model and "--model" not in line:
            model = ["--model", args.model]
        if not job.trains:
            knows = "{out}/" in job.command  # a run, which says what its LM is
            return [*line, *([] if knows else model), "--out", str(job.answers)]
        line += [*model, "--world-seed", args.world_seed, "--seed", job.seed, *args.flags.split()]
        if job.program == "train.py":
            if job.short:
                line += ["--steps", max(1, steps // self.share)]
            elif "--steps" not in line:
                line += ["--steps", steps]
            line += ["--lr", self.best_rate(job.row.rates)] if job.row.rates else []
            for split in world.SPLITS:
                line += [] if f"--{split}" in line else [f"--{split}", files[split]]
            if job.short:
                del line[line.index("--test") : line.index("--test") + 2]
        return [str(word) for word in [*line, "--out", job.folder, "--resume"]]

    # Making them

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context that one process at a time is in."""
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(Run(self.folder, {}))
                    break
                except FileExistsError:
                    time.sleep(0.2)
            yield

    def write_questions(self) -> None:
        """Write the world's questions. ValueError if the folder holds others."""
        place = world.make(self.args.world_seed)
        for split in world.SPLITS:
            rows = place.questions(split)
            chosen = [rows[i] for i in data.sample(len(rows), self.args.count, 0)]
            write_rows(self.folder / f"{split}.jsonl", chosen)

    def make(self) -> None:
        """Make all that is missing, the most important first, and wait for other processes."""
        minutes = math.inf if self.args.minutes is None else self.args.minutes
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            left = [job for job in self.plan() if not job.record() and not job.failed()]
            ready = [job for job in left if self.ready(job)]
            if not ready:
                break
            if not any(self.attempt(job) for job in ready):  # any: the first one that is free
                time.sleep(WAIT)

    def attempt(self, job: Job) -> bool:
        """Make a run. False if another process makes it. If it fails, failed.json says why."""
        if job.folder.is_dir() and in_use(job.folder):
            return False
        if job.record():  # another process has just made it
            return True
        line = self.line(job)
        show(f"\n{job.folder.name}: python {job.program} {shlex.join(line)}\n")
        try:
            self.execute(job, line)
        except (ValueError, OSError, SafetensorError, SystemExit) as error:
            if in_use(job.folder):  # another process was a moment faster
                return False
            reason = "see above" if isinstance(error, SystemExit) else str(error)
            write_json(job.folder / "failed.json", {"error": reason})
            show(f"{job.folder}: {reason}; delete its failed.json to try again", "stderr")
        return True

    def execute(self, job: Job, line: list[str]) -> None:
        """Run the program in this process. What an analysis returns becomes result.json."""
        if job.trains:
            self.programs[job.program].main(line)
            return
        with Run(job.folder, {}):
            start = time.perf_counter()
            if job.answers.is_file():  # of an analysis that was stopped
                job.answers.unlink()
            if "--resume" not in line:
                shutil.rmtree(job.answers, ignore_errors=True)
            result = self.programs[job.program].main(line)
            record = {"command": shlex.join(["python", job.program, *line])}
            record["seconds"] = round(time.perf_counter() - start, 1)
            record["results"] = {"test": result} if "tasks" in result else result
            write_json(job.folder / "result.json", record)

    def missing(self) -> dict[str, str]:
        """What was not made, and why."""
        reasons = {}
        for job in self.plan():
            if job.failed():
                reasons[job.folder.name] = read_json(job.folder / "failed.json")["error"]
            elif not job.record():
                ready = self.ready(job)
                reasons[job.folder.name] = "no time" if ready else "what it starts from is missing"
        return reasons


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines. ValueError if the file is there and holds others."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{file}: holds other questions than --world-seed and --count say; choose another --out"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, rows)


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder, which is made if it is missing."""
    try:
        with Run(folder, {}):
            return False
    except FileExistsError:
        return True


# What came out


def show_runs(study: Study) -> dict[str, list[dict]]:
    """Print EM of every finished run. Returns {row: its records, without what is elsewhere}."""
    keys, results = ("command", "lr", "seconds", "results", "candidates"), {}
    for title, rows in study.groups.items():
        table = []
        for row in rows:
            records = [job.record() for job in study.finished(row.name)]
            if records and "test" in records[0]["results"]:
                results[row.name] = [{k: r[k] for k in keys if k in r} for r in records]
                cells = [cell(records, part) for part in SLICES]
                table.append([row.name, len(records), records[0].get("lr", ""), *cells])
        if table:
            show_table(f"{title}: EM dev / test", ["", "seeds", "rate", *SLICES], table)
    return results


def show_grid(study: Study) -> dict[str, dict]:
    """Print the dev score of every learning rate that was tried. Returns {row: {rate: percent}}."""
    results = {}
    for name, rates in study.rates.items():
        pairs = zip(rates, (job.record() for job in study.grid(name)))
        tried = {r: 100 * study.score(record["results"]["dev"]) for r, record in pairs if record}
        if tried:
            results[name] = tried
    table = []
    for name, tried in results.items():
        texts = [f"{rate}: {value:.1f}" for rate, value in tried.items()]
        table.append([name, ", ".join(texts), study.best_rate(name)])
    if table:
        show_table("learning rates: dev scores", ["", "tried", "chosen"], table)
    return results


def spread(values: list[float]) -> str:
    """The mean in percent, and after ± the deviation over seeds if there are several."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def cell(records: list[dict], part: str) -> str:
    """Mean dev and test EM of some runs in percent; after ± the deviation of test over seeds."""
    dev = [score for r in records if (score := em(r, "dev", part)) is not None]
    test = [score for r in records if (score := em(r, "test", part)) is not None]
    mean = f"{100 * statistics.mean(dev):.1f}" if dev else "-"
    return f"{mean} / {spread(test) if test else '-'}"


def em(record: dict, split: str, part: str) -> float | None:
    """EM of a run on one of SLICES, or None if it was asked no such question."""
    result = record["results"].get(split, {"tasks": {}})
    return (result if part == "all" else result["tasks"].get(part, {})).get("em")


def curve(study: Study, name: str) -> list[list[float]]:
    """Steps and dev score along the training of the first seed that is finished."""
    points = []
    for job in study.finished(name)[:1]:
        records = [record for _, record in data.json_lines(job.folder / "metrics.jsonl")]
        points = [[r["step"], r["score"]] for r in records if r.get("score") is not None]
    return points


def show_orderings(study: Study, orderings: list[tuple], slices=SLICES) -> list[dict]:
    """Print whether the claims (claim, row with the higher score, other row) hold, for each slice.

    A fourth element is a margin from 0 to 1: the first row's is less than that below the other's.
    Returns what is printed. A claim about a row without a finished run is left out.
    """
    read, results = cache(partial(test_scores, study)), []
    for claim, first, second, *margin in orderings:
        for part in slices:
            compared = compare(read(first), read(second), part, *margin)
            if compared:
                row = {"claim": claim, "rows": [first, second], "slice": part}
                results.append(row | compared)
    show_differences(f"orderings, test {study.metric.upper()}", results)
    return results


def show_differences(title: str, results: list[dict]) -> None:
    """Print claims with their seeds, difference, low, high, p, verdict and, if there is one, slice.

    The seeds are those of either row. With one, the interval knows nothing of other trainings.
    """
    columns = [key for key in ("claim", "slice", "seeds") if results and key in results[0]]
    table = []
    for r in results:
        difference, low, high = (f"{100 * r[key]:+.1f}" for key in ("difference", "low", "high"))
        named = [", ".join(map(str, r[k])) if k == "seeds" else r[k] for k in columns]
        table.append([*named, difference, f"[{low}, {high}]", f"{r['p']:.4f}", r["verdict"]])
    if table:
        show_table(title, [*columns, "difference", "95 % interval", "p", "the claim"], table)


def test_scores(study: Study, name: str) -> list[dict]:
    """The score of every test question, by slice, task and id, for each finished seed of a row.

    The slice is the cluster of the task, or the task if it has none.
    """
    files = [read_predictions(job.answers) for job in study.finished(name)]
    return [
        {(r.get("cluster", r["task"]), r["task"], r["id"]): r[study.metric] for r in rows}
        for rows in files
    ]


def compare(a: list[dict], b: list[dict], part: str, margin: float = 0.0) -> dict | None:
    """Compare two rows, given as `test_scores`, on one slice; "all" is all of it.

    Returns {"n", "seeds"} and `significance`. None if a row has no finished run or no question is
    of the slice.
    """
    keys = [key for key in (a[0] if a and b else ()) if part in ("all", key[0])]
    if not keys:
        return None
    scores = [[[seed[key] for key in keys] for seed in row] for row in (a, b)]
    return {"n": len(keys), "seeds": [len(a), len(b)]} | significance(*scores, margin)


def significance(a, b, margin: float = 0.0) -> dict:
    """What scores (seeds, examples) say of the claim that a's are higher: {"difference", "low",
    "high", "p", "verdict"} by `paired_bootstrap`. Below p = 0.05 it holds or does not. With a
    margin it holds if all of the interval is above -margin."""
    difference, low, high, p = metrics.paired_bootstrap(a, b, iters=2000)
    holds = low > -margin if margin else difference > 0
    undecided = low <= -margin <= high if margin else p >= 0.05
    says = "undecided" if undecided else "holds" if holds else "does not hold"
    return {"difference": difference, "low": low, "high": high, "p": p, "verdict": says}
