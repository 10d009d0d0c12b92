"""Runs the commands of README.md and TUTORIAL.md as they stand: `python reproduce.py docs`.

Each ```sh block runs in one temporary folder, which has the programs and assets/ as links. What
follows a block after the word "prints", as `text` or as a block of lines, must be in its output.
Only seconds may differ. Blocks that install or test are left out. Needs show.py.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from show import show, show_table

ROOT = Path(__file__).parent
BLOCK = re.compile(r"^```sh\n(.*?)^```\n(.*?)(?=^```sh\n|^#|\Z)", re.S | re.M)


class Block(NamedTuple):
    """Commands that stand together, and what their text quotes of their output."""

    source: str  # file:line
    script: str
    quoted: list[str]


def read_blocks(path: Path) -> list[Block]:
    """The sh blocks of a Markdown file that run a program, without `pip install`."""
    text, found = path.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        lines = [line for line in match[1].splitlines() if not line.startswith("pip ")]
        quoted = re.findall(r"\bprints `([^`]+)`", match[2])
        for block in re.findall(r"\bprints:\n\n```\n(.*?)^```", match[2], re.S | re.M):
            quoted += [line for line in block.splitlines() if line != "..."]
        if any(re.match(r"python \w+\.py", line) for line in lines):
            number = text.count("\n", 0, match.start()) + 2
            found.append(Block(f"{path.name}:{number}", "\n".join(lines), quoted))
    return found


def missing(quoted: list[str], output: str) -> list[str]:
    """What is quoted and not in the output. Seconds count as equal."""

    def without_seconds(text: str) -> str:
        return re.sub(r"\d+ s\b", "N s", text)

    return [line for line in quoted if without_seconds(line) not in without_seconds(output)]


def documents(args=None) -> dict:
    """The commands of README.md and TUTORIAL.md: seconds, and whether the quoted output holds."""
    results = {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as place:
        for file in (*ROOT.glob("*.py"), ROOT / "assets"):
            (Path(place) / file.name).symlink_to(file)
        for block in [b for name in ("README.md", "TUTORIAL.md") for b in read_blocks(ROOT / name)]:
            call, start = ["bash", "-euo", "pipefail", "-c", block.script], time.perf_counter()
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            done = subprocess.run(call, cwd=place, env=os.environ | {"PATH": path}, **pipes)
            row = {"seconds": round(time.perf_counter() - start), "status": done.returncode}
            row["missing"] = missing(block.quoted, done.stdout)
            results[block.source] = row
            last = done.stdout.strip().splitlines()[-1:] if done.returncode else []
            show("\n".join([f"{block.source}: {row['seconds']} s", *row["missing"], *last]))
    rows = [[source, *row.values()] for source, row in results.items()]
    show_table("commands of the documents", ["block", "s", "status", "quoted, not printed"], rows)
    return results
