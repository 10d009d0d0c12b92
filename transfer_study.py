"""Soft prompt transfer, and continued pretraining: `reproduce.py transfer`.

Counterparts of figure 1, table 3 and the transfer study of Vu et al. 2022, "SPoT: Better Frozen
Model Adaptation through Soft Prompt Transfer": prompts of the large tasks of suite.py start those
of low-resource tasks, all pairs. promptability_study.py has the rows of continued pretraining.
study.py makes all of them, in runs/transfer, the most important first.

    python reproduce.py transfer --plan        the cost sheet
    python reproduce.py transfer               all runs, or what is missing of them, and the tables
    python reproduce.py transfer --data FOLDER --model HuggingFaceTB/SmolLM2-135M

The last command does it with tasks that are given. FOLDER holds a file TASK-train.jsonl of each. A
task with a TASK-test.jsonl is a target, the others are sources. It trains on 2,000 random lines of
a source and on --examples of a target, and tests on --count. These prompts are deep, too. Their
rate is the default of the LM, unless --flags names another.

Several processes can share the work: start the second command once for each core, each time with
OMP_NUM_THREADS=1. On a GPU, add --flags="--dtype float32". Rows of the larger LM need it in
assets/lm2.

Prompts are deep: they have keys and values in every layer. Prompts before the first layer only, as
in the paper, learn little on this small LM in so few steps (rows `shallow`). The similarity of deep
prompts compares the keys and values of all layers of a position, unscaled and after rope; the paper
compares input vectors. The optimiser is AdamW (paper: Adafactor), there is no dropout (paper: 0.1),
prompts from scratch start from vocabulary (paper: class labels), a source's prompt is its last, and
a pair has one transfer run (paper: three). No rate is swept here: 0.03 is the default of deep
prompts, 0.1 lies between the default of shallow ones and their best in whole runs, and 1e-3 is the
best of three for tuning the LM (prompt_study.py). A source is a run of its own, so that processes
can share them; `transfer.py source --each` trains all in one process.

A target has 64 training examples, the same for all seeds, and no dev examples. Its prompt is scored
once, after its last step, on 75 examples in four templates each. Scores are F1, which is accuracy
where an example has options. A task embedding is the prompt after KEEP steps. Two embeddings that
are compared come from different seeds, because those of one seed start from the same vectors: seed
0 of a source, whose prompt the transfer starts from, meets seeds 1 and 2 of a target. The average
and the mixture of the nearest sources are made anew for each seed, from the sources of that seed.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from show import only_shows, picture

import data
import eval as metrics
import genres
import promptability_study
import suite
import train
import transfer
import transfer_tables
import world
from checkpoints import read_json, write_json, write_lines
from cost import conduct
from study import Job, Row, Study

# The runs

SOURCES = (
    "food_reviews news_topic subject_type question_pairs sentence_pairs sentence_nli profile "
    "record_to_text people_trivia passage_qa two_passage_qa passage_choice pronoun_reference "
    "word_meaning"
).split()
TARGETS = (
    "staff_reviews question_type record_nli triple_to_text place_trivia record_qa "
    "fact_completion possessive_reference same_sense"
).split()
SOURCE_EXAMPLES = 2000
LIMIT = 512  # examples of a task that a mixture has at most (paper: 2^19)
KEEP = 50  # the step of the task embedding (paper: 10,000 of 262,144)
PROMPT = "transfer.py source --prompt-length 10 --batch-size 16 --eval-every 100000"
DEEP_LR = " --lr 0.03"
DEEP, SHALLOW = f"{PROMPT} --deep{DEEP_LR}", f"{PROMPT} --lr 0.1"
STEPS = "--keep-at {keep} --steps"
SOURCE, TARGET = f"{DEEP} {STEPS} {{source_steps}}", f"{DEEP} {STEPS} {{target_steps}}"
MIXTURE = f"{SOURCE} --train {{suite}} --limit {LIMIT}"
TUNE = "train.py --method fine_tuning --lr 1e-3 --batch-size 16 --eval-every 100000 --steps"
LARGER = "--model {pretrained}/lm2"


def file_flags(target: str) -> str:
    """The flags with a target's files."""
    return f"--train {{few}}/{target}-train.jsonl --test {{few}}/{target}-test.jsonl"


def groups(sources=SOURCES, targets=TARGETS, continued=promptability_study.GROUPS) -> dict:
    """The rows by group. A run that starts from X is X-to-TARGET."""
    return {
        "sources": [
            Row(f"source-{s}", f"{SOURCE} --train {{suite}}/{s}-train.jsonl", 3) for s in sources
        ],
        "targets": [Row(f"scratch-to-{t}", f"{TARGET} {file_flags(t)}", 3) for t in targets],
        "pairs": [
            Row(f"{s}-to-{t}", f"{TARGET} {file_flags(t)} --init {{out}}/source-{s}-0")
            for s in sources
            for t in targets
        ],
        "generic sources": [
            Row("mixture", MIXTURE, 3),
            Row("text", f"{SOURCE} --train {{suite}}/documents.jsonl"),
        ],
        "generic transfer": [
            Row(f"{name}-to-{t}", f"{TARGET} {file_flags(t)} --init {{out}}/{name}-{{seed}}", seeds)
            for name, seeds in (("mixture", 3), ("text", 1))
            for t in targets
        ],
        "targeted transfer": targeted_transfer(sources, targets),
        "baselines": baselines(targets, "", ""),
        **continued,
        "shallow prompts": shallow(targets),
        "figure 1: the larger LM": larger(targets),
    }


def read_given(folder: str | Path) -> dict[str, dict[str, list[dict]]]:
    """{task: {split: its lines}} of --data; only a target has a split "test". ValueError if a line
    is no example, if there is no source or target, or if a task's name cannot be part of a run's.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--data {folder}: no such folder")
    given = {}
    for split in ("train", "test"):
        for path in sorted(Path(folder).glob(f"*-{split}.jsonl")):
            name = path.name.removesuffix(f"-{split}.jsonl")
            taken = name in transfer_tables.METHODS or "-to-" in name
            if taken or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{path}: {name!r} cannot be a task's name here")
            data.read(path)  # so that every line is an example
            given.setdefault(name, {})[split] = [record for _, record in data.records(path)]
            if "train" not in given[name]:
                raise ValueError(f"{path}: there is no {name}-train.jsonl beside it")
    targets = sum("test" in files for files in given.values())
    if not 0 < targets < len(given):
        raise ValueError(
            f"--data {folder}: needs a source, which is a TASK-train.jsonl alone, and a target, "
            "which has a TASK-test.jsonl, too"
        )
    return given


def given_groups(given: dict) -> dict[str, list[Row]]:
    """The rows of --data: sources in one seed, targets from scratch, all pairs. So two sources are
    compared by prompts of one seed, which look more alike than a source and a target."""
    targets = [name for name in given if "test" in given[name]]
    made = groups([name for name in given if name not in targets], targets, {})
    kept = {title: made[title] for title in ("sources", "targets", "pairs")}
    kept["sources"] = [row._replace(seeds=1) for row in kept["sources"]]
    return {
        title: [row._replace(command=row.command.replace(DEEP_LR, "")) for row in rows]
        for title, rows in kept.items()
    }


def targeted_transfer(sources: list[str], targets: list[str]) -> list[Row]:
    """What is made of the sources nearest to each target, and the prompts that start from it."""
    library = " ".join(f"{{out}}/source-{s}-{{seed}}" for s in sources)
    made, transferred = [], []
    for t in targets:
        mixture = f"--file {{few}}/{t}-train.jsonl --seed {{seed}} --flags {{flags}}"
        for name, more in (("average", ""), ("top-mixture", mixture)):
            for k in transfer_tables.NEAREST:
                seeds = 3 if k == transfer_tables.NEAREST[0] else 1
                command = f"{name} {k} {{out}}/scratch-to-{t}-{{other}} {library} {more}"
                made.append(Row(f"{name}-{k}-for-{t}", command, seeds))
                command = f"{TARGET} {file_flags(t)} --init {{out}}/{name}-{k}-for-{t}-{{seed}}/out"
                transferred.append(Row(f"{name}-{k}-to-{t}", command, seeds))
    return made + transferred


def baselines(targets: list[str], end: str, model: str) -> list[Row]:
    """Prompt tuning as long as source and target together, and tuning of the LM."""
    start = f"--model {{out}}/multitask{end}-0/model"
    rows = [Row(f"multitask{end}", f"{TUNE} {{source_steps}} --train {{suite}} {model}")]
    longer = f"{DEEP} {STEPS} {{both_steps}} {model}"
    for t in targets:
        rows += [
            Row(f"longer{end}-to-{t}", f"{longer} {file_flags(t)}", 1 if end else 3),
            Row(f"tuned{end}-to-{t}", f"{TUNE} {{target_steps}} {file_flags(t)} {model}"),
            Row(f"multitask{end}-to-{t}", f"{TUNE} {{target_steps}} {file_flags(t)} {start}"),
        ]
    return rows


def shallow(targets: list[str]) -> list[Row]:
    """From scratch and from a mixture, with prompts before the first layer alone."""
    start, init = f"{SHALLOW} {STEPS} {{target_steps}}", "--init {out}/mixture-shallow-0"
    rows = [Row("mixture-shallow", MIXTURE.replace(DEEP, SHALLOW))]
    for t in targets:
        rows.append(Row(f"scratch-shallow-to-{t}", f"{start} {file_flags(t)}"))
        rows.append(Row(f"mixture-shallow-to-{t}", f"{start} {file_flags(t)} {init}"))
    return rows


def larger(targets: list[str]) -> list[Row]:
    """The rows of figure 1 on the larger LM."""
    rows, init = [Row("mixture-larger", f"{MIXTURE} {LARGER}")], "--init {out}/mixture-larger-0"
    for t in targets:
        rows.append(Row(f"scratch-larger-to-{t}", f"{TARGET} {file_flags(t)} {LARGER}"))
        rows.append(Row(f"mixture-larger-to-{t}", f"{TARGET} {file_flags(t)} {LARGER} {init}"))
    return rows + baselines(targets, "-larger", LARGER)


GROUPS = groups()


@dataclass
class TransferStudy(Study):
    """A study whose commands name their own files. `given` is what read_given returns, or {}."""

    given: dict = field(default_factory=dict)

    def line(self, job: Job) -> list[str]:
        """The arguments of a job's program."""
        line = [word.format(**self.names) for word in job.command.split()[1:]]
        if self.args.model and job.program.endswith(".py") and not {"--model", "--run"} & set(line):
            line += ["--model", self.args.model]
        if job.program in ("train.py", "transfer.py"):
            line += [*self.args.flags.split(), "--resume"]
        if not job.trains:
            return [*line, "--out", str(job.answers)]
        return [*line, "--seed", str(job.seed), "--out", str(job.folder)]

    def write_files(self) -> None:
        """Write the tasks' files. ValueError if the folder is that of other flags or tasks."""
        args, stamp = self.args, self.folder / "files.json"
        keys = ("world_seed", "examples", "count", "model", "source_steps", "target_steps")
        said = {key: getattr(args, key) for key in keys}
        if self.given:
            said["data"] = hashlib.sha256(json.dumps(self.given).encode()).hexdigest()
        if stamp.is_file():
            before = read_json(stamp)
            for key in (*before, "data"):
                if said.get(key) != before.get(key):
                    flag = key.replace("_", "-")
                    raise ValueError(f"{stamp}: made with another --{flag}; choose another --out")
            return
        place, sets = world.make(args.world_seed), {}

        def rows(name: str, split: str, count: int) -> list[dict]:
            if not self.given:
                return suite.rows(place, name, split)[:count]
            found = self.given[name][split]
            return [found[i] for i in data.sample(len(found), count, 0)]

        for row in self.groups["sources"]:
            name = row.name.removeprefix("source-")
            sets[f"suite/{name}-train.jsonl"] = rows(name, "train", SOURCE_EXAMPLES)
        for name in transfer_tables.targets_of(self):
            for split, count in (("train", args.examples), ("test", args.count)):
                sets[f"few/{name}-{split}.jsonl"] = rows(name, split, count)
        if not self.given:
            texts = genres.documents(place, 2000, args.world_seed + 1)
            sets["suite/documents.jsonl"] = [{"text": d["text"]} for d in texts]
            for name, held_out in promptability_study.held_out_files(place).items():
                sets[f"held-out/{name}"] = held_out
        for name, found in sets.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_lines(self.folder / name, found)
        write_json(stamp, said)


def average(line: list[str]) -> dict:
    """Write the average of the prompts of the k sources that are most similar to a target.

    `line` is [k, the target's run, the sources' runs, "--out", folder].
    """
    k, target, *sources, _, out = line
    best = nearest(int(k), target, sources)
    transfer.write_average(out, Path(target).parent, [(Path(run).name, s) for run, s in best])
    return {"best": best}


def top_mixture(line: list[str]) -> dict:
    """Train a prompt on the target's examples and those of the k sources most similar to it.

    `line` is [k, the target's run, the sources' runs, "--file", the target's training examples,
    "--seed", the mixture's, "--flags", more for the training, "--out", folder].
    """
    k, target, *sources, _, file, _, seed, _, more, _, out = line
    best = nearest(int(k), target, sources)
    flags = [read_json(Path(run) / "run.json")["arguments"] for run, _ in best]
    first, files = flags[0], [path for one in flags for path in one["train"]]
    words = [*DEEP.split()[1:], "--steps", first["steps"], "--keep-at", 0]
    words += ["--train", *files, file, "--limit", LIMIT, "--seed", seed, "--out", out]
    words += ["--model", first["model"]] if first["model"] else []
    transfer.main([str(word) for word in [*words, *more.split()]])
    return {"best": best}


def nearest(k: int, target: str, sources: list[str]) -> list[tuple[str, float]]:
    """[(run, similarity)] of the k sources' runs whose embeddings are most similar."""
    library = {run: transfer.read_embedding(run)[0] for run in sources}
    return transfer.search(target, library)[:k]


def tested(args, name: str) -> int:
    """How many test examples a row answers."""
    if name.endswith(("-zero", "-few")):
        return 9 * promptability_study.TEMPLATES * promptability_study.TEST
    return args.count if "-to-" in name else 0


def make_study(args, folder: Path) -> TransferStudy:
    """The study in a folder, with flags of reproduce.py. Nothing is written."""
    programs = {"train.py": train, "transfer.py": transfer, "eval.py": metrics}
    programs["average"] = SimpleNamespace(main=average)
    programs["top-mixture"] = SimpleNamespace(main=top_mixture)
    names = {
        "out": folder,
        "flags": args.flags,
        "pretrained": args.pretrained,
        "suite": folder / "suite",
        "few": folder / "few",
        "held": folder / "held-out",
        "zero": folder / "held-out" / "all.jsonl",
        "source_steps": args.source_steps,
        "target_steps": args.target_steps,
        "both_steps": args.source_steps + args.target_steps,
        "keep": min(KEEP, args.source_steps, args.target_steps),
        "steps": args.steps,
        "long": 3 * args.steps,
    }
    args.grid = False
    given = {} if args.data is None else read_given(args.data)
    if given and args.seeds == 1:
        raise ValueError("--seeds 1: prompts of one seed are too alike to compare with --data")
    rows = given_groups(given) if given else GROUPS
    more = {"names": names, "tokens": 55, "asked": lambda job: tested(args, job.row.name)}
    if given:
        lines = [line for files in given.values() for lines in files.values() for line in lines]
        more["tokens"] = sum(len(str(line)) for line in lines) // len(lines) // 4
    return TransferStudy(args, folder, rows, {}, programs, given=given, **more)


def soft_transfer(args) -> dict:
    """Soft prompt transfer and continued pretraining: what they gain, and what predicts it."""
    study = make_study(args, Path(args.out) / "transfer")
    return conduct(study, study.write_files, report)


# What came out


def report(study: TransferStudy) -> dict:
    """Print all tables and draw the picture. Returns what results/transfer.json holds."""
    results = transfer_tables.tables(study)
    if not study.given:
        held_out = study.folder / "held-out" / "all.jsonl"
        results |= promptability_study.promptability(study, held_out)
    if "pairs" in results:
        with only_shows("picture"), picture(study.args.picture, 15, 15) as figure:
            transfer_tables.draw(figure, results)
    return results
