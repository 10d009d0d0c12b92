"""`python reproduce.py docs`: the commands of the documents, run as they stand."""

import documents

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

```
python hello.py --name nobody
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
import sys
print("hello", sys.argv[2])
print("loading")
print("hello again; 3 s")
"""
FILES = ("README.md", "TUTORIAL.md")


def test_commands_run_as_they_stand_and_their_quoted_output_must_hold(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    for name, text in zip((*FILES, "hello.py"), (README, TUTORIAL, HELLO)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    before = sorted(tmp_path.iterdir())
    results = documents.documents()
    assert list(results) == ["README.md:3", "TUTORIAL.md:3", "TUTORIAL.md:12"]
    first, second, third = results.values()
    assert first["status"] == second["status"] == 0 and third["status"] == 1
    assert first["missing"] == third["missing"] == [] and second["missing"] == ["hello you"]
    assert sorted(tmp_path.iterdir()) == before  # they ran elsewhere


def test_the_documents_have_commands_and_quotes():
    blocks = {name: documents.read_blocks(documents.ROOT / name) for name in FILES}
    assert len(blocks["TUTORIAL.md"]) > 8 and len(blocks["README.md"]) >= 1
    quoted = [line for part in blocks.values() for block in part for line in block.quoted]
    assert "A: Sonen Trading" in quoted and any(line.startswith("test ") for line in quoted)
