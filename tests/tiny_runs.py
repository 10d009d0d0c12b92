"""Short runs on a tiny LM, for the tests that run whole commands."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

import openbook
import pretrain
import train
import transfer
from passages import Passage
from runs import Run

ROOT = Path(train.__file__).parent
PEOPLE = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Fedor", "Galina", "Hugo"]
TOWNS = ["Velmor", "Kranstad", "Pornwick", "Delmau"]
HOMES = [(name, TOWNS[i % 4]) for i, name in enumerate(PEOPLE)]
OBJECTIVES = [f"pretrain_{name}" for name in pretrain.OBJECTIVES]
TRAINED = [m for m in train.METHODS if m not in ("training_free", *train.OPEN_BOOK)]
METHODS = [*TRAINED, *OBJECTIVES]
SHORT = "--steps 6 --eval-every 2 --log-every 1 --batch-size 3 --device cpu"
SHAPE = "--dim 16 --layers 1 --heads 2 --seq-len 16"
OWN_FLAGS = {
    "pretrain_lm": f"{SHAPE} --context 96 --vocab-size 300",
    "pretrain_encoder": SHAPE,
    "pretrain_bert": f"{SHAPE} --context 32",
    "pretrain_connector": "--connector-layers 1 --seq-len 16",
    "pretrain_prompt": "--prompt-length 4 --seq-len 16",
    "textual_recursion": "--max-new-tokens 4 --prompt-length 4 --candidates 3",
}


def write_lines(path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def template() -> TemporaryDirectory:
    """A place that is made once, and deleted when the tests end."""
    temporary = TemporaryDirectory()
    train_place(Path(temporary.name))
    return temporary


def make_place(folder: Path) -> Path:
    """A folder with questions, text, and a tiny LM that pretrain.py trained on the text."""
    return shutil.copytree(template().name, folder, dirs_exist_ok=True)


def train_place(folder: Path) -> None:
    questions = [
        {"id": f"q{i}", "task": "ba"[i % 2], "question": f"where was {name} born"}
        | {"answer": [town, "nowhere"]}
        for i, (name, town) in enumerate(HOMES)
    ]
    write_lines(folder / "train.jsonl", questions)
    write_lines(folder / "dev.jsonl", questions[:5])
    lives = [f"{name} was born in {town}. {name} lives in {town}." for name, town in HOMES]
    write_lines(folder / "text.jsonl", [{"text": text} for text in lives * 12])
    flags = "--dim 32 --layers 2 --steps 12 --eval-every 6 --batch-size 4 --lr 0.01"
    run(command(folder, "pretrain_lm", folder / "lm", flags))
    run(command(folder, "pretrain_encoder", folder / "t5", "--steps 1"))


BOOK = [
    *(Passage(who, f"{who} was born in {town}.", f"b{i}") for i, (who, town) in enumerate(HOMES)),
    *(Passage(who, f"{who} likes the sea.", f"s{i}") for i, (who, _) in enumerate(HOMES)),
]
ASKED = [
    {"id": f"q{i}", "task": "ba"[i % 2], "question": f"where was {name} born"}
    | {"answer": [town], "positives": [f"b{i}"]}
    for i, (name, town) in enumerate(HOMES)
]


def make_shelf(place: Path) -> Path:
    """A place with a book, questions about it, and a BERT."""
    openbook.write_book(place / "book.jsonl", BOOK)
    write_lines(place / "ask.jsonl", [*ASKED, {"question": "who likes it", "answer": ["nobody"]}])
    write_lines(place / "ask-dev.jsonl", ASKED[:4])
    plain = [{key: q[key] for key in ("id", "task", "question", "answer")} for q in ASKED]
    write_lines(place / "plain.jsonl", plain)
    flags = "--steps 1 --context 64 --seq-len 30"
    run(command(place, "pretrain_bert", place / "bert", flags))
    return place


def small_world() -> tuple[list[dict], dict[str, list[dict]]]:
    """What genres.library returns, of eight people."""
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in BOOK]
    return passages, {"train": ASKED, "dev": ASKED[:3], "test": ASKED[3:6]}


COLOURS = ["red", "blue", "green"]


def suite_rows(task, count, split, cluster):
    """Examples of two templates, with options."""
    out = []
    for i in range(count):
        template, answer = ("is", "paint")[i % 2], COLOURS[i % len(COLOURS)]
        text = f"{task} {i} {template} the {answer} one"
        row = {"task": task, "template": template, "cluster": cluster, "id": f"{split}-{i}"}
        row |= {"input": text, "target": answer, "options": COLOURS}
        out.append(row)
    return out


def make_suite(place):
    """A place with a tiny LM, and three tasks of which one is of a held-out cluster."""
    make_place(place)
    write_suite(place)
    return place


def write_suite(place):
    (place / "suite").mkdir()
    for name, cluster in (("car", "a"), ("hat", "b"), ("end", "sentence completion")):
        for split, count in (("train", 24), ("dev", 6), ("test", 6)):
            rows = suite_rows(name, count, split, cluster)
            write_lines(place / "suite" / f"{name}-{split}.jsonl", rows)
    (place / "text.txt").write_text("\n\n".join(f"The {c} door is {c}. " * 6 for c in COLOURS))


def command(place: Path, method: str, out: Path, flags: str = "") -> list[str]:
    """The program and arguments of a short run. `flags` come last, so they override the others."""
    start, files = f"train.py --method {method}", (place / "train.jsonl", place / "dev.jsonl")
    if method in OBJECTIVES:
        start = f"pretrain.py {method.removeprefix('pretrain_')}"
        files = (place / "text.jsonl", place / "text.jsonl")
    model = "" if method == "pretrain_lm" else f"--model {place}/lm/model"
    own = "--max-new-tokens 4 --prompt-length 4 --connector-layers 1"
    own += f" --encoder {place}/t5/model --encoder-prompt 3" if method == "id_pt" else ""
    own = OWN_FLAGS.get(method, own)
    line = f"{start} {model} --train {files[0]} --dev {files[1]} --out {out} {SHORT} {own} {flags}"
    return line.split()


def open_book_command(shelf: Path, method: str, out: Path, flags: str = "") -> list[str]:
    """The same for a method that reads passages. `shelf` is what make_shelf made."""
    files = f"--train {shelf}/ask.jsonl --dev {shelf}/ask-dev.jsonl --passages {shelf}/book.jsonl"
    read = "--max-new-tokens 4 --prompt-length 4 --encoder-steps 6 --encoder-lr 0.01"
    own = f"--model {shelf}/lm/model {read}" if method == "reader" else "--lr 0.01"
    start = f"train.py --method {method} {files} --encoder {shelf}/bert --out {out}"
    return f"{start} {SHORT} {own} {flags}".split()


def transfer_command(place: Path, command: str, out: Path, flags: str = "") -> list[str]:
    """The same for a command of transfer.py: source, few-shot, or a variant of continue. `place` is
    a suite's."""
    suite = place / "suite"
    own = {
        "source": f"source --each --train {suite}/car-train.jsonl {place}/text.txt --keep-at 2",
        "few-shot": f"few-shot --train {suite}/car-train.jsonl --test {suite}/car-test.jsonl",
    }
    own["source"] += " --seq-len 16"
    own["few-shot"] += " --shots 5"
    more = f"continue --variant {command} --train {suite} --dev {suite}/car-dev.jsonl"
    more += " --grad-accum 2 --inner-steps 2"
    start = f"transfer.py {own.get(command, more)} --model {place}/lm/model --out {out} {SHORT}"
    return f"{start} --prompt-length 4 --max-new-tokens 3 {flags}".split()


def run(arguments: list[str]) -> dict:
    """Run a command in this process. Returns what its main returns."""
    program = {"train.py": train, "pretrain.py": pretrain, "transfer.py": transfer}[arguments[0]]
    return program.main(arguments[1:])


def contents(folder: Path) -> dict[str, bytes]:
    """The files that two equal runs share. The others say when and where they ran."""
    own = ("run.json", "curve.png", "lock", "state.safetensors", "state.before.safetensors")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in own]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stored(folder: Path) -> dict:
    """The tensors of a run's adapter."""
    return load_file(folder / "adapter_model.safetensors")


def same_runs(a, b):
    """Assert that two runs, or two folders of runs, left the same bits. Returns a checkpoint."""
    files, others = contents(a), contents(b)
    differ = [name for name in files.keys() | others.keys() if files.get(name) != others.get(name)]
    assert not differ, differ
    states = [
        {path.relative_to(folder): load_file(path) for path in folder.rglob("state.safetensors")}
        for folder in (a, b)
    ]
    assert states[0].keys() == states[1].keys() != set()
    for path, state in states[0].items():
        other = states[1][path]
        assert state.keys() == other.keys(), path
        assert all(torch.equal(state[name], other[name]) for name in state), path
    return states[0][min(states[0], key=lambda path: len(path.parts))]


class Dead(Exception):
    """Stands for a process that ends without warning."""


def die_at_5(monkeypatch, line: list[str]) -> None:
    """Run a command until it logs its fifth step."""
    log = Run.log

    def dies(run, record):
        if record["step"] == 5:
            raise Dead
        log(run, record)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", dies)
        with pytest.raises(Dead):
            run(line)
