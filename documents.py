"""Runs the commands of README.md and TUTORIAL.md as they stand: `python reproduce.py docs`.

Each command, and each block of Python, is a process in one temporary folder, which has the programs
and assets/ as links. The tutorial comes first, and README.md goes on with its files. Commands that
install, test or need vLLM are left out. `make_stand_ins` makes what README.md takes for granted:
questions, passages, text, trained prompts and published checkpoints. Its long trainings get the
flags of `SHORTER`, unless --full is given.

What follows a ```sh block after the word "prints", as `text` or as a block of lines, must be in its
output. Only seconds may differ. Needs show.py, checkpoints.py, families.py and rerank.py.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from show import show, show_table

from checkpoints import load_tokenizer
from rerank import Bert, CrossEncoder

ROOT = Path(__file__).parent
PAGES = ("TUTORIAL.md", "README.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.S | re.M)
COMMAND = re.compile(r"^for [\s\S]*?done$|^(?:.*\\\n)*.+$", re.M)
RUNS = re.compile(r"(?:python|torchrun) .*\b\w+\.py\b")

SHORTER = {  # the start of a command of README.md: flags for a few steps
    "python train.py --method reader": "--top 4 --encoder-steps 20 --steps 20 --eval-limit 100",
    "python transfer.py source --each": "--steps 20 --keep-at 20 --eval-limit 100",
    "python transfer.py continue": "--steps 2",
    "python train.py --method deep_prompt --per-task": "--steps 40 --eval-limit 100",
    "python train.py --method id_pt --train suite": "--steps 20 --eval-limit 58",
    "python train.py --method prompt_tuning --train suite": "--steps 20 --eval-limit 58",
    "torchrun --nproc-per-node 2 train.py": "--steps 40 --eval-limit 100",
    "torchrun --nproc-per-node 8 train.py": "--steps 20 --eval-limit 100",
}
LMS = ("HuggingFaceTB/SmolLM2-135M", "EleutherAI/pythia-1b", "FOLDER")
CROSS_ENCODER = "cross-encoder/ms-marco-MiniLM-L6-v2"


class Block(NamedTuple):
    """Commands that stand together, and what their text quotes of their output."""

    language: str  # sh, py or none
    commands: dict[str, str]  # file:line of each
    quoted: list[str]


def read_blocks(path: Path) -> list[Block]:
    """The blocks of a Markdown file that run a program, without `pip install`, or Python."""
    text, found = path.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        language, script = match.groups()
        number = text.count("\n", 0, match.start()) + 2
        if language == "py" and "vllm" not in script:
            found.append(Block(language, {f"{path.name}:{number}": script}, []))
        if language not in ("sh", ""):
            continue
        commands = {}
        for part in COMMAND.finditer(script):
            if not part[0].startswith("pip "):
                line = number + script.count("\n", 0, part.start())
                commands[f"{path.name}:{line}"] = part[0]
        if any(map(RUNS.match, commands.values())):
            after = re.split(r"^```sh$|^#", text[match.end() :], maxsplit=1, flags=re.M)[0]
            found.append(Block(language, commands, quotes(after) if language == "sh" else []))
    return found


def quotes(text: str) -> list[str]:
    """What a text says that a command prints."""
    quoted = re.findall(r"\bprints `([^`]+)`", text)
    for block in re.findall(r"\bprints:\n\n```\n(.*?)^```", text, re.S | re.M):
        quoted += [line for line in block.splitlines() if line != "..."]
    return quoted


def missing(quoted: list[str], output: str) -> list[str]:
    """What is quoted and not in the output. Seconds count as equal."""

    def without_seconds(text: str) -> str:
        return re.sub(r"\d+ s\b", "N s", text)

    return [line for line in quoted if without_seconds(line) not in without_seconds(output)]


def out_folder(command: str) -> str | None:
    """The new folder that a command makes, or None."""
    if out := re.search(r"--out (\S+)", command):
        return out[1]
    method = re.search(r"\btrain\.py .*--method (\w+)", command)
    return f"runs/{method[1]}" if method else None


def make_stand_ins(place: Path, count: int = 1000) -> None:
    """Make in a folder what README.md takes for granted.

    It comes from place/world, which world.py made, and from place/runs/prompt, a trained prompt.
    At most `count` lines of a file are used.
    """

    def read(name: str, count: int = count) -> list[str]:
        return (place / "world" / name).read_text(encoding="utf-8").splitlines()[:count]

    def write(name: str, lines: list[str]) -> None:
        (place / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    write("train.jsonl", read("questions-train.jsonl"))
    for split in ("dev", "test"):
        write(f"{split}.jsonl", read(f"questions-{split}.jsonl", 60))
    write("new-train.jsonl", read("suite/staff_reviews-train.jsonl"))
    asked = [{"question": "who", **more} for more in ({"prompt": "a"}, {"task": "gist"}, {})]
    write("questions.jsonl", map(json.dumps, asked))
    write("text.txt", [f"{json.loads(line)['text']}\n" for line in read("corpus.jsonl")])
    book = list(map(json.loads, read("passages.jsonl")))
    rows = [f"{p['id']}\t{p['text']}\t{p['title']}" for p in book]
    write("psgs_w100.tsv", ["id\ttext\ttitle", *rows])
    contexts = [{"passage_id": p["id"], "title": p["title"], "text": p["text"]} for p in book]
    questions = list(map(json.loads, read("open-book-train.jsonl", min(200, len(book) - 2))))
    forms = {"nq-train": "positive_ctxs", "nq-dev": "positive_ctxs", "dpr-results": "ctxs"}
    for name, key in forms.items():  # the format is DPR's, the passages are any
        records = [
            {"question": q["question"], "answers": q["answer"], key: contexts[i : i + 3]}
            for i, q in enumerate(questions)
        ]
        write(f"{name}.json", [json.dumps(records)])
    for name in ("mine", "a", "b", "c"):
        shutil.copytree(place / "runs/prompt", place / "runs" / name)
    for name in LMS:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(ROOT / "assets/lm")
    bert = ROOT / "assets/bert"
    CrossEncoder(Bert.from_pretrained(bert), load_tokenizer(bert)).save(place / CROSS_ENCODER)


def run_command(command: list[str], place: Path) -> tuple[dict, str]:
    """Run a command in a folder. Returns its times in seconds, and status, and its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=place, env=os.environ | {"PATH": path}, **pipes)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    row = {"seconds": round(time.perf_counter() - start), "cpu": round(cpu)}
    return row | {"status": done.returncode}, done.stdout


def run_block(block: Block, place: Path, shorter: dict[str, str]) -> Iterator[tuple[str, dict]]:
    """Run the commands of a block. Yields file:line of each and what it did."""
    printed, lines = "", list(block.commands)
    for line, command in block.commands.items():
        call = [sys.executable, "-c", command]
        if block.language != "py":
            command = re.sub(r"\s*\\\n\s*", " ", command)
            more = [flags for start, flags in shorter.items() if command.startswith(start)]
            command = " ".join([command, *more])
            call = ["bash", "-euo", "pipefail", "-c", command]
            if folder := out_folder(command):  # a page may show two commands with the same
                shutil.rmtree(place / folder, ignore_errors=True)
        row, output = run_command(call, place)
        printed += output
        row["missing"] = missing(block.quoted, printed) if line == lines[-1] else []
        row["command"] = " ".join(command.split())[:120]
        show(f"{line}: {row['seconds']} s, {row['cpu']} s of processors: {row['command']}")
        for text in [*row["missing"], *(output.splitlines()[-3:] if row["status"] else [])]:
            show(f"    {text}")
        yield line, row


def run_pages(full: bool = False) -> dict[str, dict]:
    """Run the commands of both pages: {file:line: what it did}. A failure does not end it."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for file in (*ROOT.glob("*.py"), ROOT / "assets"):
            (place / file.name).symlink_to(file)
        for page in PAGES:
            if page == "README.md":
                make_stand_ins(place)
            shorter = SHORTER if page == "README.md" and not full else {}
            for block in read_blocks(ROOT / page):
                results |= run_block(block, place, shorter)
    return results


def documents(args) -> None:
    """The commands of README.md and TUTORIAL.md: seconds, and whether the quoted output holds.

    ValueError if one failed, or did not print what its page quotes. It leaves no file.
    """
    results = run_pages(args.full)
    columns = ["command", "s", "processors", "status", "quoted, not printed", ""]
    rows = [[line, *row.values()] for line, row in results.items()]
    show_table("commands of the documents", columns, rows)
    failed = [line for line, row in results.items() if row["status"] or row["missing"]]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} commands failed: {', '.join(failed)}")
