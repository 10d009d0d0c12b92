"""Every command of TUTORIAL.md and README.md, in this process, with a few steps.

Those of torchrun are in tests/test_parallel.py.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import BOOK, HOMES, small_world, write_lines

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


def commands(script: str) -> list[str]:
    """The commands of a script, one each, with fewer lines of the files that they cut."""
    script = re.sub(r"\\\n\s*", " ", script)
    script = re.sub(r"(head|tail) -\d+", r"\1 -6", script)
    script = re.sub(r"echo \d+", "echo 24", script)
    return re.findall(r"^for [\s\S]*?done$|^.+$", script, re.M)


def run_short(command: str, more: str) -> None:
    _, program, *words = shlex.split(command)
    kinds = [program, f"{program} {words[0]}", *(f"{program} {word}" for word in words[1:2])]
    flags = [FLAGS.get(kind, "") for kind in kinds]
    flags = [] if None in flags else " ".join([*flags, more]).split()
    importlib.import_module(program.removesuffix(".py")).main([*words, *flags])


def test_the_commands_of_the_documents_run(tmp_path, monkeypatch, capsys):
    """In the order of the pages. The tutorial comes first: it makes the files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(documents.ROOT / "assets")
    ran = 0
    for name in ("TUTORIAL.md", "README.md"):
        for block in documents.read_blocks(documents.ROOT / name):
            capsys.readouterr()
            for command in commands(block.script):
                if command.startswith("python "):
                    run_short(command, README if name == "README.md" else "")
                    ran += 1
                else:
                    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
            if "generate.py" in block.script:  # nothing is left out here
                assert block.quoted and not documents.missing(block.quoted, capsys.readouterr().out)
    assert ran > 15


STAND_INS = {  # of what this page names and does not make
    "HuggingFaceTB/SmolLM2-135M": "assets/lm",
    "EleutherAI/pythia-1b": "assets/lm",
    "FOLDER": "assets/t5",
}
README_TEXT = (documents.ROOT / "README.md").read_text()
README_COMMANDS = [
    command
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README_TEXT, re.S | re.M)
    if not language
    for command in commands(block)
    if command.startswith("python ")
]


def make_files(monkeypatch) -> None:
    """The files and runs in the current folder that README's commands start from."""
    monkeypatch.setattr(genres, "library", lambda place: small_world())
    names, rows = ("food_reviews", "gist", "record_nli"), suite.rows
    monkeypatch.setattr(suite, "TASKS", {name: suite.TASKS[name] for name in names})
    monkeypatch.setattr(suite, "rows", lambda place, name, split: rows(place, name, split, 8))
    for name, verb in {"train": "born", "new-train": "born", "dev": "bred", "test": "met"}.items():
        asked = [{"question": f"where was {who} {verb}", "answer": [town]} for who, town in HOMES]
        write_lines(Path(f"{name}.jsonl"), asked)
    questions = [{"question": "who", **more} for more in ({"prompt": "mine"}, {"task": "gist"}, {})]
    write_lines(Path("questions.jsonl"), questions)
    Path("text.txt").write_text("\n\n".join([" ".join(p.text for p in BOOK)] * 2))
    lines = ["id\ttext\ttitle", *(f"{p.id}\t{p.text}\t{p.title}" for p in BOOK)]
    Path("psgs_w100.tsv").write_text("\n".join(lines))
    passages = [{"title": p.title, "text": p.text, "passage_id": p.id} for p in BOOK]
    keys = {"nq-train": "positive_ctxs", "nq-dev": "positive_ctxs", "dpr-results": "ctxs"}
    for name, key in keys.items():
        records = [
            {"question": f"where was {who} born", "answers": [town], key: passages[i : i + 3]}
            for i, (who, town) in enumerate(HOMES)
        ]
        Path(f"{name}.json").write_text(json.dumps(records))
    files = "--train train.jsonl --dev dev.jsonl --out runs"
    run_short("python train.py --method neural_recursion", f"{files}/neural_recursion")
    run_short("python train.py --method prompt_tuning", f"{files}/mine")
    for name in "abc":
        shutil.copytree("runs/mine", f"runs/{name}")


@pytest.mark.filterwarnings("ignore:.* cannot be scored as right")
def test_the_other_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """In the order of the page. What it names and does not make has a small stand-in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(documents.ROOT / "assets")
    make_files(monkeypatch)
    for command in README_COMMANDS:
        for name, other in STAND_INS.items():
            command = command.replace(name, other)
        out = re.search(r"--out (\S+)", command) or re.search(r"--method (\w+)", command)
        folder = Path(out[1] if "--out" in out[0] else f"runs/{out[1]}") if out else None
        if folder and folder.is_dir():  # of the same command with other flags
            shutil.rmtree(folder)
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
