"""Every command of the tutorial and of README's first screen, in this process, with a few steps."""

import importlib
import re
import shlex
import subprocess

import documents

TRAIN = "--device cpu --steps 2 --eval-every 2 --eval-limit 2 --batch-size 2 --max-new-tokens 4"
FLAGS = {  # of a program, and of its command; the last ones count
    "train.py": TRAIN,
    "train.py reader": "--encoder-steps 2 --top 8",
    "transfer.py": TRAIN,
    "transfer.py source": "--keep-at 2",
    "transfer.py continue": "--inner-steps 1 --grad-accum 1 --limit 8",
    "transfer.py few-shot": "--shots 2",
    "transfer.py search": None,
    "world.py": "--people 60 --documents 5",
    "eval.py ask": "--max-new-tokens 2",
    "eval.py mixed": "--max-new-tokens 2",
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
