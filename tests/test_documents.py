"""`python reproduce.py docs`: the commands of the documents, run as they stand."""

from argparse import Namespace

import pytest

import documents
import reproduce

README = """
```sh
pip install nothing
python hello.py --name you
```

greets. After a while it prints:

```
hello you
...
hello again; 12 s
```

```sh
pip install -r requirements-dev.txt
python -m pytest -q
```

# Next

Data:

```json
{"hello": "you"}
```

```
x = hello(you)
```

```
python hello.py --name nobody --out runs/nobody
python hello.py \\
    --name nobody --out runs/nobody
```

```py
import hello

print("done", hello.sys.path[0] == "")
```
"""
TUTORIAL = """
```sh
echo me > name.txt
python hello.py --name "$(cat name.txt)" \\
    --loud
python hello.py --name twice
```

prints `hello me` and then prints `hello you` too.

```sh
python hello.py
```

fails.
"""
HELLO = """
import os, sys
if __name__ == "__main__":
    print("hello", sys.argv[2])
    if "--out" in sys.argv:
        os.makedirs(sys.argv[sys.argv.index("--out") + 1])  # it must be new
    if "--steps" not in sys.argv and "nobody" in sys.argv:
        raise SystemExit("too long")
print("loading")
print("hello again; 3 s")
"""
SHORTER = {"python hello.py --name": "--steps 2"}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder with two pages and their program."""
    (tmp_path / "assets").mkdir()
    for name, text in {"README.md": README, "TUTORIAL.md": TUTORIAL, "hello.py": HELLO}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(documents, "SHORTER", SHORTER)
    monkeypatch.setattr(documents, "make_stand_ins", lambda place: None)
    return tmp_path


def test_commands_run_as_they_stand_and_their_quoted_output_must_hold(pages, monkeypatch, capsys):
    monkeypatch.chdir(pages)
    before = sorted(pages.iterdir())
    with pytest.raises(ValueError, match="2 of 8 commands failed: TUTORIAL.md:6, TUTORIAL.md:12"):
        reproduce.main(["docs"])
    assert sorted(pages.iterdir()) == before  # they ran elsewhere
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[0] for row in rows] == [
        *(f"TUTORIAL.md:{line}" for line in (3, 4, 6, 12)),
        *(f"README.md:{line}" for line in (4, 33, 34, 39)),
    ]
    assert [row[3] for row in rows] == ["0", "0", "0", "1", "0", "0", "0", "0"]
    assert [row[4] for row in rows] == ["[]", "[]", "['hello you']", *["[]"] * 5]
    shorter = [row[5].endswith("--steps 2") for row in rows]
    assert shorter == [False] * 4 + [True, True, True, False]  # of README.md alone


def test_full_leaves_the_flags_out(pages, capsys):
    with pytest.raises(ValueError, match="4 of 8"):
        documents.documents(Namespace(full=True))
    assert "too long" in capsys.readouterr().out


def test_the_documents_have_commands_and_quotes():
    blocks = {name: documents.read_blocks(documents.ROOT / name) for name in documents.PAGES}
    for name, languages in {"TUTORIAL.md": {"sh"}, "README.md": {"sh", "py", ""}}.items():
        assert {block.language for block in blocks[name]} == languages
        assert sum(len(block.commands) for block in blocks[name]) > 20
    quoted = [line for part in blocks.values() for block in part for line in block.quoted]
    assert "A: Sonen Trading" in quoted and any(line.startswith("test ") for line in quoted)
    known = [c for block in blocks["README.md"] for c in block.commands.values()]
    for start in documents.SHORTER:
        assert any(command.startswith(start) for command in known), start
