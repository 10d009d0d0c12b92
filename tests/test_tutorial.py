"""Every command of TUTORIAL.md and README.md, in this process, with a few steps.

Those of torchrun are in tests/test_parallel.py.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import small_world

import documents
import genres
import suite

TRAIN = "--device cpu --steps 2 --eval-every 2 --eval-limit 2 --batch-size 2 --max-new-tokens 4"
FLAGS = {  # of a program, and of its command; the last ones count
    "train.py": TRAIN,
    "pretrain.py": "--device cpu --steps 2 --eval-every 2 --batch-size 2 --seq-len 16",
    "train.py reader": "--encoder-steps 2 --top 4",
    "transfer.py": TRAIN,
    "transfer.py source": "--keep-at 2",
    "transfer.py continue": "--inner-steps 1 --grad-accum 1 --limit 8",
    "transfer.py few-shot": "--shots 2",
    "transfer.py search": None,
    "world.py": "--people 60 --documents 5",
    "eval.py ask": "--max-new-tokens 2",
    "eval.py mixed": "--max-new-tokens 2",
    "eval.py score": "--max-new-tokens 2",
}
README = "--train small.jsonl --dev dev.jsonl --test test.jsonl --out runs/readme"


def commands(block) -> list[str]:
    """The commands of a block, with fewer lines of the files that they cut."""
    scripts = [re.sub(r"\\\n\s*", " ", command) for command in block.commands.values()]
    few = {"400": 24}  # enough for a re-ranker; of other files 6 lines
    return [
        re.sub(r"(head|tail) -(\d+)", lambda cut: f"{cut[1]} -{few.get(cut[2], 6)}", script)
        for script in scripts
    ]


def run_short(command: str, more: str) -> None:
    _, program, *words = shlex.split(command)
    kinds = [program, f"{program} {words[0]}", *(f"{program} {word}" for word in words[1:2])]
    flags = [FLAGS.get(kind, "") for kind in kinds]
    flags = [] if None in flags else " ".join([*flags, more]).split()
    importlib.import_module(program.removesuffix(".py")).main([*words, *flags])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, of commands that know of a small suite and of a small open book."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(documents.ROOT / "assets")
    monkeypatch.setattr(genres, "library", lambda place: small_world())
    names, rows = ("food_reviews", "goods_reviews", "news_topic", "staff_reviews"), suite.rows
    tasks = {name: suite.TASKS[name] for name in (*names, "gist", "record_nli")}
    monkeypatch.setattr(suite, "TASKS", tasks)
    sizes = {"train": 8, "dev": 2, "test": 2}

    def few(place, name, split):
        return rows(place, name, split, sizes[split])

    monkeypatch.setattr(suite, "rows", few)
    return tmp_path


def test_the_commands_of_the_documents_run(place, capsys):
    """In the order of the pages. The tutorial comes first: it makes the files."""
    ran = 0
    for name in ("TUTORIAL.md", "README.md"):
        for block in documents.read_blocks(documents.ROOT / name):
            if block.language != "sh":
                continue
            capsys.readouterr()
            for command in commands(block):
                if command.startswith("python "):
                    run_short(command, README if name == "README.md" else "")
                    ran += 1
                else:
                    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
            if "generate.py" in command:  # nothing is left out here
                assert block.quoted and not documents.missing(block.quoted, capsys.readouterr().out)
    assert ran > 15


README_COMMANDS = [
    command
    for block in documents.read_blocks(documents.ROOT / "README.md")
    if not block.language
    for command in commands(block)
    if command.startswith("python ")
]


def make_files(place: Path) -> None:
    """The files and runs that README's commands start from."""
    run_short("python world.py --out world", "")
    files = "--train world/questions-train.jsonl --dev world/questions-dev.jsonl --out runs"
    run_short("python train.py --method neural_recursion", f"{files}/neural_recursion")
    run_short("python train.py --method prompt_tuning", f"{files}/prompt")
    documents.make_stand_ins(place, count=8)


@pytest.mark.filterwarnings("ignore:.* cannot be scored as right")
def test_the_other_commands_of_the_readme_run(place, capsys):
    """In the order of the page. What it takes for granted has a small stand-in."""
    make_files(place)
    for command in README_COMMANDS:
        if folder := documents.out_folder(command):  # of the same command with other flags
            shutil.rmtree(folder, ignore_errors=True)
        run_short(command, "")
        assert capsys.readouterr().out.strip(), command
    assert len(README_COMMANDS) > 20


def test_the_lines_that_the_tutorial_quotes_stand_in_the_files():
    blocks = re.findall(
        r"```\n# ([^\n]*\.py[^\n]*)\n(.*?)```", (documents.ROOT / "TUTORIAL.md").read_text(), re.S
    )
    assert len(blocks) >= 6
    for title, text in blocks:
        names = re.findall(r"\w+\.py", title)
        lines = {
            line for name in names for line in (documents.ROOT / name).read_text().splitlines()
        }
        assert [line for line in text.splitlines() if line and line not in lines] == [], title
