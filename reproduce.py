"""The experiments behind RESULTS.md. Each prints its tables and writes results/NAME.json.

    python reproduce.py lm            what an LM knows of the world, and how well it reads
    python reproduce.py headroom      what each task of the suite leaves to be learnt
    python reproduce.py recursion     LM recursion, its relatives and its controls
    python reproduce.py reader        the frozen reader: retrieval, re-ranking, cross-fitting
    python reproduce.py prompts       prompts of all kinds, ID-PT and fine-tuning
    python reproduce.py transfer      soft prompt transfer, and continued pretraining
    python reproduce.py docs          every command of README.md and TUTORIAL.md (about an hour)

All but the first and the last train, in runs/NAME. If one is stopped, the same command goes on.
With --model the file is results/NAME-MODEL.json. Flags that make less than all of it (--only,
--count, --steps, --seeds and the like) write results/NAME-part.json. The last one leaves no file.
"""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from show import Parser, run_program, show, show_table

import torch

import cli
import data
import eval as metrics
import genres
import suite
import train
import world
from checkpoints import load_tokenizer, write_json
from documents import documents
from fit import target_loss
from generate import predict
from int8 import quantize
from model import LM
from prompt_study import prompt_study
from questions import prepare
from reader_study import readers
from recursion_study import recursion
from runs import ASSETS, arguments, finished
from study import write_rows
from transfer_study import soft_transfer

# What an LM knows

POPULARITY = {"the best known tenth": (0.0, 0.1), "the middle": (0.1, 0.5), "the rest": (0.5, 1.0)}
PASSAGES = (1, 3, 5)


def lm_checks(args) -> dict:
    """Closed-book questions, cloze by popularity, reading, and perplexity by genre."""
    lm = LM.from_pretrained(args.model or ASSETS / "lm")
    if args.base_dtype == "int8":
        quantize(lm)
    tokenizer = load_tokenizer(lm.folder, lm.config.vocab_size)
    place = world.make(args.world_seed)
    questions = [data.parse_record(row, "test") for row in place.questions("test")]
    results = {"closed book": exact_matches(lm, tokenizer, questions)}
    results["cloze"] = exact_matches(lm, tokenizer, cloze(place), stop=".")
    results["reading"] = exact_matches(lm, tokenizer, reading(place, args.count), stop="\n")
    results["perplexity"] = perplexities(lm, tokenizer, place, args.count)
    for title, table in results.items():
        unit = "nats a token" if title == "perplexity" else "EM"
        show_table(f"{title}, {unit}", ["", unit, "n"], [[k, *row] for k, row in table.items()])
    return results


def exact_matches(lm: LM, tokenizer, examples: list, stop: str | None = None, new=16) -> dict:
    """EM in percent and the number of examples of each task. The LM answers greedily."""
    stops = metrics.stops(examples, stop)
    ids, options, _ = prepare(lm, tokenizer, examples, None, new, stops=stops)
    answers = predict(lm, tokenizer, ids, None, new, options, stops)
    tasks = metrics.summary(metrics.score(examples, answers))["tasks"]
    return {task: [round(100 * row["em"], 1), row["n"]] for task, row in tasks.items()}


def cloze(place: world.World) -> list[data.Example]:
    """Every fact about a person in its plainest wording, cut off before the object."""
    out, count = [], len(place.people)
    for label, (low, high) in POPULARITY.items():
        for person in place.people[int(low * count) : int(high * count)]:
            for relation, object in place.facts[person].items():
                wordings = world.RELATIONS["person"][relation][0]
                wording = next(w for w in wordings if w.endswith((" {o}.", " {an_o}.")))
                text = world.render(wording[: wording.rindex(" {")], person)
                out.append(data.Example(text, object, (object,), task=label))
    return out


def reading(place: world.World, count: int) -> list[data.Example]:
    """Questions about strangers behind 1, 3 or 5 passages, one of which has the answer."""
    rng, out = random.Random("reading"), []
    casts = genres.strangers(place, "reproduce reading", rng)
    for passages in PASSAGES:
        for _ in range(count):
            cast = next(casts)
            texts, facts = genres.some_passages(cast, passages)
            subject, relation = rng.choice(facts)
            question = data.question_text(cast.ask(subject, relation))
            text = "\n".join([*map(genres.passage_text, texts), question])
            answer = cast.world.facts[subject][relation]
            task = f"{passages} passage{'s' * (passages > 1)}"
            out.append(data.Example(text, answer, (answer,), task=task))
    return out


@torch.no_grad()
def perplexities(lm: LM, tokenizer, place: world.World, count: int) -> dict:
    """The mean loss of a token by genre, over documents that the LM has not read."""
    losses, tokens = Counter(), Counter()
    for document in genres.documents(place, 10 * count, seed=2):
        corpus = data.encode_texts([document["text"]], tokenizer)
        length = min(len(corpus.tokens) - 1, lm.config.max_len)
        batch = data.windows(corpus, 1, length, 0, 0)
        losses[document["genre"]] += target_loss(lm, None, batch).item()
        tokens[document["genre"]] += length
    return {genre: [round(losses[genre] / tokens[genre], 3), tokens[genre]] for genre in losses}


# What the tasks leave to be learnt

HEADROOM = {  # method: flags; the same number of steps and batch size
    "prompt_tuning": ["--lr", "0.03", "--prompt-length", "10"],
    "fine_tuning": ["--lr", "1e-3"],
}


def headroom(args) -> dict:
    """Of every task of the suite: chance, zero-shot, prompt tuning and fine-tuning, as EM."""
    lm = LM.from_pretrained(args.model or ASSETS / "lm")
    tokenizer, place = load_tokenizer(lm.folder, lm.config.vocab_size), world.make(args.world_seed)
    folder, results = Path(args.out) / "headroom", {}
    for name, task in suite.TASKS.items():
        files = {split: folder / f"{name}-{split}.jsonl" for split in ("train", "test")}
        for split, file in files.items():
            write_rows(file, suite.rows(place, name, split)[: args.count])
        test = data.read(files["test"])
        row = {"cluster": task.cluster, "chance": chance(data.read(files["train"]), test)}
        new = max(16, 1 + max(len(tokenizer.encode(e.target).ids) for e in test))
        row["zero-shot"] = next(iter(exact_matches(lm, tokenizer, test, new=new).values()))[0]
        for method, flags in HEADROOM.items():
            flags = flags + (["--max-new-tokens", new] if new > 16 else [])
            row[method] = trained(args, method, flags, files, folder / f"{name}-{method}")
        results[name] = row
        show(f"{name}: {json.dumps(row)}")
    rows = [[name, *row.values()] for name, row in results.items()]
    columns = ["task", "cluster", "chance", "zero-shot", "prompt tuning", "fine-tuning"]
    show_table(f"headroom, EM after {args.steps} steps", columns, rows)
    above = sum(row["fine_tuning"] >= row["chance"] + 20 for row in results.values())
    show(f"fine-tuning is at least 20 points above chance on {above} of {len(results)} tasks")
    return results


def chance(training: list, test: list) -> float:
    """EM in percent of the most frequent training answer, or of a random option if higher."""
    (majority, _), *_ = Counter(e.target for e in training).most_common(1)
    most = sum(majority in e.answers for e in test) / len(test)
    random_option = sum(1 / len(e.options) if e.options else 0 for e in test) / len(test)
    return round(100 * max(most, random_option), 1)


def trained(args, method: str, flags: list[str], files: dict, out: Path) -> float:
    """EM in percent on the test file after a small training run. It may be finished already.

    ValueError if the run in the folder was made with other flags.
    """
    line = ["--method", method, "--train", files["train"], "--test", files["test"], *flags]
    line += ["--steps", args.steps, "--batch-size", 16, "--out", out, "--resume"]
    line += ["--model", args.model] if args.model else []
    line, record = [str(word) for word in line], finished(out)
    said = arguments(train.parse(line))  # paths as run.json has them
    keys = ("model", "steps", "batch_size", "lr", "prompt_length", "max_new_tokens")
    if not record or any(record["arguments"][key] != said[key] for key in keys):
        record = train.main(line)
    return round(100 * record["results"]["test"]["em"], 1)


# The command line

EXPERIMENTS = {
    "lm": lm_checks,
    "headroom": headroom,
    "recursion": recursion,
    "reader": readers,
    "prompts": prompt_study,
    "transfer": soft_transfer,
    "docs": documents,
}
PRETRAINED = "folder of Connectors, METHOD_LAYERS, of t5, and of a larger LM, lm2"
STUDY = [
    ("--pretrained", str, str(ASSETS), PRETRAINED),
    ("--minutes", cli.number_type(float, 0), None, "start nothing after so many"),
    ("--seeds", cli.COUNT, 3, "at most so many seeds of a row"),
    ("--only", str, "", "only rows with this text in their name or their table's title"),
    ("--plan", bool, False, "print the cost sheet and end"),
    ("--flags", str, "", "more flags for every training run, as one argument"),
]
GRID = ("--grid", bool, False, "choose learning rates by runs of seed 0, first")
FLAGS = {
    "docs": [("--full", bool, False, "trainings that take hours, too")],
    "lm": [
        ("--count", cli.COUNT, 300, "reading questions of each kind; 10 documents for each"),
        cli.BASE_DTYPE,
    ],
    "headroom": [
        ("--count", cli.COUNT, 300, "examples of each file"),
        ("--steps", cli.COUNT, 200, "steps of each training run"),
    ],
    "recursion": [
        ("--count", cli.COUNT, None, "questions of each split; all if not given"),
        ("--steps", cli.COUNT, 1200, "steps of a training run; of a few, three times as many"),
        *STUDY,
        GRID,
    ],
    "prompts": [
        ("--count", cli.COUNT, 40, "test examples of a task, each in four templates"),
        ("--steps", cli.COUNT, 800, "steps of a run on the suite; of other runs a fifth"),
        *STUDY,
        GRID,
    ],
    "reader": [
        ("--encoder", str, None, "folder of the BERT; assets/bert if not given"),
        ("--steps", cli.COUNT, 300, "steps of each prompt and LM"),
        ("--encoder-steps", cli.COUNT, 1500, "steps of each re-ranker and of the retriever"),
        ("--top", cli.COUNT, 20, "passages found for a question"),
        ("--context", cli.COUNT, 256, "positions that the LM reads"),
        *STUDY,
    ],
    "transfer": [
        ("--data", str, None, "folder of TASK-train.jsonl, and of targets TASK-test.jsonl"),
        ("--source-steps", cli.COUNT, 300, "steps of a source prompt (paper: 262,144)"),
        ("--target-steps", cli.COUNT, 80, "steps of a target's prompt (paper: 100,000)"),
        ("--examples", cli.COUNT, 64, "training examples of a target"),
        ("--count", cli.COUNT, 300, "test rows of a target; an example is one in each template"),
        ("--steps", cli.COUNT, 100, "steps of continued pretraining; of some, thrice as many"),
        *STUDY,
    ],
}


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog="reproduce.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="experiment", required=True)
    shared = [cli.MODEL, cli.WORLD, ("--out", str, "runs", "folder for the runs that it needs")]
    for name, experiment in EXPERIMENTS.items():
        summary = experiment.__doc__.split("\n")[0]
        command = commands.add_parser(name, help=summary)
        cli.add_flags(command, name, *([] if name == "docs" else shared), *FLAGS[name])
    return parser


def is_part(args) -> bool:
    """Whether flags make less of an experiment than the record in results/ holds."""
    defaults = {row[0][2:].replace("-", "_"): row[2] for row in FLAGS[args.experiment]}
    flags = ("only", "count", "steps", "seeds", "encoder_steps", "top", "context")
    flags += ("source_steps", "target_steps", "examples")
    return any(getattr(args, f, None) != defaults.get(f) for f in flags)


def main(argv: list[str] | None = None) -> dict:
    """Run one experiment. Returns what results/NAME.json holds."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    name, given = args.experiment, vars(args).get
    if given("pretrained") and not Path(args.pretrained).is_dir():
        raise ValueError(f"--pretrained {args.pretrained}: no such folder")
    name += "" if given("world_seed", 1) == 1 else f"-world-{args.world_seed}"
    name += f"-{Path(args.model).name}" if given("model") else ""
    name += f"-{Path(args.data).resolve().name}" if given("data") else ""
    name += "-int8" if given("base_dtype") else ""
    name += "-part" if is_part(args) else ""
    file = Path("results") / f"{name}.json"
    start, record = time.perf_counter(), {"arguments": vars(args).copy()}
    args.picture = file.with_suffix(".png")
    if results := EXPERIMENTS[args.experiment](args):
        record["seconds"] = round(time.perf_counter() - start)
        file.parent.mkdir(exist_ok=True)
        write_json(file, record | {"results": results})
    return results


if __name__ == "__main__":
    run_program("reproduce.py", main)
