"""README.md: its figures are measured ones, its examples run, and copied files run alone."""

import json
import re
import shlex
import shutil

import pytest
from forks import run_in_folders

import bench
import data
import eval as metrics
import train
from checkpoints import load_tokenizer
from documents import ROOT
from rerank import Bert, CrossEncoder

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
HUB_ID = "cross-encoder/ms-marco-MiniLM-L6-v2"
FIGURE = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(?![\w.])")


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.S | re.M)[1]


def measured(text: str) -> bool:
    """Whether one section of RESULTS.md has all figures of a text."""
    parts = re.split(r"^##+ ", RESULTS, flags=re.M)
    return any(set(FIGURE.findall(text)) <= set(FIGURE.findall(part)) for part in parts)


def test_every_figure_of_the_claims_is_a_measured_one():
    """The figures of a claim stand in one section, or those between two semicolons do."""
    rows = [line for line in section("What holds here").splitlines() if line.startswith("|")][2:]
    assert len(rows) > 6 and all(FIGURE.search(row) for row in rows)
    parts = [part for row in rows for part in row.split("|")[2].split(";")]
    parts += [line for line in section("Troubleshooting").splitlines() if line.startswith("|")]
    assert [part for part in parts if not measured(part)] == []
    assert not measured("two-hop +13.3 [+10.9, +99.9]") and not measured("18.1 and 74.3")


def test_an_interval_in_the_claims_stands_in_the_results():
    intervals = re.findall(r"[+-]\d+\.\d \[[^]]+\]", section("What holds here"))
    assert len(intervals) > 8 and all(interval in RESULTS for interval in intervals)


def test_the_example_of_an_own_model_and_own_data_runs(place, tmp_path, monkeypatch, capsys):
    """With a tiny folder in place of the hub id, a few steps, and one file for all splits."""
    text = section("Your own model and data")
    (lines,) = re.findall(r"^```json\n(.*?)^```", text, re.S | re.M)
    (commands,) = re.findall(
        r"^```\n(python bench.py plan --method prompt_tuning.*?)^```", text, re.S | re.M
    )
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    first, second = data.read(tmp_path / "train.jsonl")
    assert first.input == "Q: Who wrote Emma?\nA:" and first.answers == ("Jane Austen", "Austen")
    assert second.target == "Lima"
    monkeypatch.chdir(tmp_path)
    commands = re.sub(r"--model \S+/\S+", f"--model {place}/lm/model", commands)
    plan, trains, asks = re.sub(r"\\\n", " ", commands).splitlines()
    bench.main([*shlex.split(plan)[2:], "--prompt-length", "4"])
    assert "in all" in capsys.readouterr().out
    short = "--steps 2 --prompt-length 4 --max-new-tokens 4 --device cpu"
    train.main([*shlex.split(trains)[2:], *short.split()])
    assert len(metrics.main(shlex.split(asks)[2:])) == 1
    assert (tmp_path / "runs" / "mine" / "predictions.jsonl").is_file()


PYTHIA_1B = {  # the shape of EleutherAI/pythia-1b
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 50304,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
}


def test_the_plan_on_the_page_is_what_its_command_prints(tmp_path, capsys):
    """But for the lines of this process."""
    text = section("Your own model and data")
    (command,) = re.findall(
        r"^(python bench.py plan --method neural.*?)\npython", text, re.S | re.M
    )
    (page,) = re.findall(r"^```\n(neural_recursion: .*?)^```", text, re.S | re.M)
    (tmp_path / "config.json").write_text(json.dumps(PYTHIA_1B))
    line = command.replace("\\\n", " ").replace("EleutherAI/pythia-1b", str(tmp_path))
    bench.main([*shlex.split(line)[2:], "--device", "cpu"])
    first, *printed = capsys.readouterr().out.splitlines()
    expected, *rows = page.splitlines()
    assert first.startswith(expected.removesuffix(" ...")) and len(printed) == len(rows) == 14
    for row, found in zip(rows, printed):
        if not row.startswith(("Python and libraries", "in all")):
            assert found.split() == row.split()


SECTION = section("Copy a file")


def copies() -> list[tuple[list[str], str]]:
    """(files, code) of each example. Its files stand in the text before it: from a.py and b.py."""
    found, blocks = [], re.split(r"^```(?:py)?\n", SECTION, flags=re.M)  # text, code, text, ...
    for text, code in zip(blocks[::2], blocks[1::2]):
        named = re.findall(r"\bfrom ((?:\w+\.py(?:, | and )?)+)", text)
        found.append((re.findall(r"\w+\.py", named[-1]), code))
    return found


CHECKS = {  # what must hold after the code of each
    "model.py": "assert h.shape == (1, 1, lm.config.dim) and not h.requires_grad",
    "adapters.py": "assert x.shape == (2, 23, 64) and len(list(prompt.parameters())) == 1",
    "rerank.py": "assert encoder.score('who wrote emma', passages).shape == (2,)",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """{first file: (status, output)} of the examples, each beside its files alone."""
    bert, codes = ROOT / "assets" / "bert", {}
    for files, code in copies():
        folder = tmp_path_factory.mktemp(files[0].removesuffix(".py"))
        for file in files:
            shutil.copy(ROOT / file, folder)
        (folder / "assets").symlink_to(ROOT / "assets")
        if HUB_ID in code:  # stands for the published one
            encoder = CrossEncoder(Bert.from_pretrained(bert), load_tokenizer(bert))
            encoder.save(folder / HUB_ID)
        codes[folder] = f"{code}\n{CHECKS[files[0]]}"
    done = run_in_folders(codes)
    return {files[0]: done[folder] for (files, _), folder in zip(copies(), codes)}


@pytest.mark.parametrize("name", CHECKS)
def test_a_copied_file_does_what_the_readme_shows(copied, name):
    status, output = copied[name]
    assert status == 0, output
    if name == "model.py":
        assert output.strip() and output.strip() in "Sonen Trading"


def test_every_example_of_copied_files_is_run():
    assert [files for files, _ in copies()] == [
        ["model.py", "checkpoints.py", "families.py"],
        ["adapters.py"],
        ["rerank.py", "checkpoints.py", "families.py"],
    ]
    assert SECTION.count("```py\n") == len(copies())
