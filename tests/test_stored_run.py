"""A run that is stored with the project gives its results again, and each week another method does.

The stored run was made in the project's folder, with OMP_NUM_THREADS=1, by

    python train.py --method prompt_tuning --prompt-length 4 --lr 0.005 --steps 24 --eval-every 12 \
        --log-every 4 --batch-size 8 --max-new-tokens 8 --train tests/stored/train.jsonl \
        --test tests/stored/test.jsonl --device cpu --out tests/stored/run

The folder in its run.json is then called /shoulders. Another embedded LM needs another stored run.
"""

import datetime
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import METHODS, command, contents, run, same_runs

import train
from verify import same_tensor, unlike_lines, verify

STORED = Path(__file__).parent / "stored"


@pytest.fixture
def copy(tmp_path):
    """The stored run beside its questions, in another folder."""
    shutil.copytree(STORED, tmp_path / "stored")
    return tmp_path / "stored" / "run"


def edit(folder, change) -> None:
    """Change run.json in place."""
    path = folder / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_the_stored_run_gives_its_answers_and_its_last_steps_again(copy, capsys):
    """Bit by bit on the processor and versions that made it, else to a tolerance."""
    assert verify(copy) == {}, capsys.readouterr().out
    print(capsys.readouterr().out)


def test_numbers_need_not_be_equal_with_other_versions_but_answers_must(copy, capsys, monkeypatch):
    def repeat(folder, record, other):  # as the stored run, without training
        shutil.copytree(STORED / "run", other, dirs_exist_ok=True)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr("verify.repeat", repeat)
    path, rows = copy / "adapter_model.safetensors", copy / "predictions.jsonl"
    ((name, prompt),) = load_file(path).items()
    save_file({name: prompt * (1 + 1e-6)}, path)
    assert verify(copy).keys() == {path.name}  # in the same place, a bit counts
    edit(copy, lambda record: record["versions"].update(torch="1.0"))
    capsys.readouterr()
    assert verify(copy) == {}
    stored = json.loads((STORED / "run" / "run.json").read_text())["versions"]["torch"]
    shown = capsys.readouterr().out
    assert f"torch {stored} instead of 1.0" in shown and "numbers to 0.1 %" in shown
    save_file({name: prompt * 1.01}, path)
    rows.write_text(rows.read_text().replace('"prediction": "', '"prediction": "x', 2))
    edit(copy, lambda record: record["results"]["test"].update(em=0.5))
    assert verify(copy) == {
        path.name: f"1 of 1 tensors differ: {name}",
        rows.name: "2 lines differ",
        "run.json": "other scores",
    }
    assert "torch" in capsys.readouterr().out.splitlines()[-1]


def test_a_tolerance_is_for_numbers_alone(tmp_path):
    a, few = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 2e-3])
    assert same_tensor(a, a.clone()) and not same_tensor(a, a + few)
    assert same_tensor(a, a + few, 1e-3) and not same_tensor(a, a + 2 * few, 1e-3)
    assert not same_tensor(a, a[None], 1e-3) and not same_tensor(a, a.double(), 1e-3)
    assert not same_tensor(a.int(), a.int() + 1, 1.0) and not same_tensor(a, a * torch.nan, 1e-3)
    lines = ['{"a": [1.0, "x"]}', '{"a": [1.0001, "x"]}', '{"a": [1.0, "y"]}', '{"b": [1.0, "x"]}']
    files = [tmp_path / str(i) for i in range(6)]
    for file, line in zip(files, [*lines, "no JSON", f"{lines[0]}\n{lines[0]}\n"]):
        file.write_text(line)
    assert [unlike_lines(files[0], file) for file in files] == [0, 1, 1, 1, 1, 2]
    assert [unlike_lines(files[0], file, 1e-3) for file in files] == [0, 0, 1, 1, 1, 1]


def test_another_method_is_verified_each_week(place, tmp_path, capsys):
    method = METHODS[datetime.date.today().isocalendar().week % len(METHODS)]
    run(command(place, method, tmp_path / "run"))
    assert verify(tmp_path / "run") == {}, method
    assert "no bit differs" in capsys.readouterr().out


def test_two_runs_with_two_threads_have_the_same_bits(tmp_path):
    """On the embedded LM, whose tensors are large enough that two threads share their sums."""
    line = f"--method neural_recursion --train {STORED}/train.jsonl --test {STORED}/test.jsonl"
    line += " --steps 3 --eval-every 3 --device cpu --threads 2 --max-new-tokens 8 --out"
    try:
        for name in "ab":
            assert train.main([*line.split(), str(tmp_path / name)])["hardware"]["threads"] == 2
    finally:
        torch.set_num_threads(1)  # as conftest.py
    assert contents(tmp_path / "a").keys() >= {"adapter_model.safetensors", "predictions.jsonl"}
    same_runs(tmp_path / "a", tmp_path / "b")
