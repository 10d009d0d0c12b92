"""The study of prompts on a tiny LM: its rows, its files, its analyses and its tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import read_lines

import data
import prompt_audit
import prompt_study
import prompts
import reproduce
import suite
import train
from checkpoints import load_tokenizer, read_json
from model import LM
from runs import ASSETS, read_predictions
from study import Study

TASKS = ("passage_qa", "record_qa", "people_choice", "gist")
ROWS = """id-pt-20 prompt-20 fine-tuning zero-shot deep-20 distances speed forgetting
    shallow-text-low shallow-vocab-high tuned-passage_qa design-1 larger-shallow
    shift-prompt-passage_qa shift-tuned-passage_qa added-prompt added-tuned
    old-tasks-after-it""".split()
SHORT = "--device cpu --batch-size 4"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(results, folder) of the whole study with few rows, few tasks and few steps."""
    folder = tmp_path_factory.mktemp("prompts")
    config = replace(LM.from_pretrained(ASSETS / "lm").config, dim=16, n_layers=1, n_heads=2)
    config = replace(config, n_kv_heads=2, head_dim=8, hidden_dim=16)
    torch.manual_seed(0)
    LM(config).save(folder / "lm", tokenizer=load_tokenizer(ASSETS / "lm"))
    (folder / "assets").mkdir()
    (folder / "assets/t5").symlink_to(ASSETS / "t5")  # and no lm2
    groups = {}
    for title, rows in prompt_study.GROUPS.items():
        rows = [row for row in rows if row.name in ROWS]
        groups[title] = [
            row._replace(seeds=1, command=f"{row.command} {SHORT}")
            if row.command.startswith("train.py")
            else row
            for row in rows
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(suite, "TASKS", {name: suite.TASKS[name] for name in TASKS})
        patch.setattr(prompt_study, "GROUPS", groups)
        rates = {name: rates for name, rates in prompt_study.RATES.items() if name in ROWS}
        patch.setattr(prompt_study, "RATES", rates)
        line = f"prompts --model {folder}/lm --pretrained {folder}/assets --count 2 --steps 3"
        return reproduce.main(line.split()), folder


def test_every_row_is_made_but_those_of_an_lm_that_is_not_there(made):
    results, folder = made
    assert results["missing"] == {"larger-shallow-0": "what it starts from is missing"}
    stored = read_json(folder / "results/prompts-lm-part.json")["results"]
    assert stored.keys() == results.keys() and (folder / "results/prompts-lm-part.png").is_file()
    assert stored["suite"].keys() == set(ROWS[:5]) | {"old-tasks-after-it"}
    assert [step for step, _ in results["curves"]["id-pt-20"]] == [1, 2, 3]


def test_the_suite_s_scores_are_the_medians_of_the_predictions(made):
    results, folder = made
    row, place = results["suite"]["prompt-20"], folder / "runs/prompts/prompt-20-0"
    rows = read_predictions(place)
    medians = prompts.template_medians(rows)
    assert len(rows) == 2 * 4 * len(TASKS) and row["f1"] == [medians["f1"]]
    assert row["clusters"] == medians["clusters"] and row["rouge"] == medians["rouge"]
    zero = read_predictions(folder / "runs/prompts/zero-shot-0/out")
    claims = {(r["claim"], r["slice"]): r for r in results["table 1"]}
    for part in ("all", "extractive QA"):
        f1 = [
            [r["f1"] for r in part_rows if part in ("all", r["cluster"])]
            for part_rows in (rows, zero)
        ]
        expected = sum(f1[0]) / len(f1[0]) - sum(f1[1]) / len(f1[1])
        claim = claims["prompt tuning > zero-shot", part]
        assert claim["difference"] == pytest.approx(expected) and claim["n"] == len(f1[0])


def test_a_prompt_forgets_nothing_and_a_tuned_lm_does(made):
    results, _ = made
    losses = results["forgetting"]
    for name in ("prompt-20-0", "deep-20-0", "id-pt-20-0"):
        assert losses[name]["alone"] == losses[name]["again"] != losses[name]["attached"]
        assert losses[name]["weights are the same"]
    assert results["added-prompt"] == {"weights are the same": True}
    assert losses["fine-tuning-0"]["tuned"] != losses["prompt-20-0"]["alone"]
    trained = {name: row["trained"] for name, row in results["speed"].items()}
    assert trained["prompt-20-0"] == 20 * 16 < trained["id-pt-20-0"]


@torch.no_grad()
def test_loss_on_text_is_of_the_tokens_behind_those_that_a_prompt_is_made_of(made):
    lm, seen = LM.from_pretrained(made[1] / "lm"), []
    batch = data.windows(data.Corpus(np.arange(300), np.array([0, 300])), 2, 96, 0, 0)

    def computed(texts):
        seen.extend(texts)
        return lm.read(lm.embed(torch.tensor([[9, 8]] * len(texts))))

    x, read = lm.embed(batch.ids), prompt_audit.READ
    for prefix, h in ((None, lm(x)), (computed, lm(x, lm.read(lm.embed(torch.tensor([9, 8])))))):
        nats = -lm.logits(h).log_softmax(-1).gather(2, batch.targets[..., None])[:, read:]
        loss = prompt_audit.text_loss(lm, prefix, [batch])
        assert loss == pytest.approx(nats.mean().item(), rel=1e-5)
    assert seen == batch.ids[:, :read].tolist()


def test_a_task_is_answered_with_the_prompt_of_the_other(made):
    results, folder = made
    runs = folder / "runs/prompts"
    rows = read_predictions(runs / "shift-prompt-passage_qa-0/out")
    assert {(row["task"], row["prompt"]) for row in rows} == {("record_qa",) * 2}
    command = read_json(runs / "shift-prompt-passage_qa-0/result.json")["command"]
    assert "record_qa=runs/prompts/shallow-vocab-high-0/passage_qa" in command
    assert results["single"]["shift-tuned-passage_qa"].keys() == {"record_qa"}
    started = read_json(runs / "shallow-text-low-0/run.json")["arguments"]["init"]
    assert started == prompt_study.INSTRUCTION
    first = read_json(runs / "added-tuned-0/run.json")["fingerprint"]
    assert first == LM.from_pretrained(runs / "fine-tuning-0/model").fingerprint()


def test_few_shots_are_of_the_same_template(made, tmp_path, monkeypatch):
    _, folder = made
    asked, prepare = [], prompt_audit.prepare

    def seen(lm, tokenizer, examples, prefix, new, shots, stops):
        asked.append((examples, shots, stops))
        return prepare(lm, tokenizer, examples, prefix, new, shots, stops)

    monkeypatch.setattr(prompt_audit, "prepare", seen)
    name = str(folder / "runs/prompts/single")
    line = [name, "2", "--model", str(folder / "lm"), "--out", str(tmp_path / "out")]
    result = prompt_audit.few_shot(line)
    assert result["n"] == len(read_lines(tmp_path / "out/predictions.jsonl")) == 3 * 4 * 4
    assert len(asked) == 3 * 4
    for examples, shots, stops in asked:
        assert len({(e.task, e.template) for e in [*examples, *shots]}) == 1 and len(shots) == 2
        assert set(stops) == {"\n\n"}


def test_distances_by_hand():
    """Two prompts of a template at right angles in one row of two, and two opposite ones."""
    a, b, c = [[1.0, 0], [1, 0]], [[3.0, 0], [0, 2]], [[-1.0, 0], [-1, 0]]
    keys = [("t", "p"), ("t", "p"), ("t", "q"), ("u", "p")]
    found = prompt_audit.mean_distances(torch.tensor([a, b, c, a]), keys)
    assert found["same template"] == pytest.approx(0.5)
    assert found["other template"] == pytest.approx((2 + 1.5) / 2)
    assert found["other dataset"] == pytest.approx((0 + 0.5 + 2) / 3)
    rows = prompt_audit.row_distance(torch.tensor([a, b]))
    assert rows == pytest.approx((0 + 1) / 2)


def whole_study(folder) -> Study:
    flags = "prompts --grid --pretrained assets"
    return prompt_study.make_study(reproduce.parser().parse_args(flags.split()), folder)


def test_every_row_is_a_command_and_every_name_is_one_row(tmp_path):
    whole = whole_study(tmp_path)
    assert len(whole.rows) == sum(map(len, whole.groups.values()))
    named = {row.rates for row in whole.rows.values()} | whole.rates.keys()
    named |= {n for _, *pair in prompt_study.TABLE_1 + prompt_study.ORDERINGS for n in pair}
    assert named - {""} <= whole.rows.keys()
    runs = {}
    for job in whole.plan():
        line = whole.line(job)
        if job.trains:
            runs[job.row.name] = run = train.parse(line)
            assert run.seed == job.seed and (run.test is None) == job.short
    assert runs["id-pt-40"].prompt_length == 40 and runs["grid-id-pt-20-3e-3"].lr == 3e-3
    steps = {
        name: runs[name].steps for name in ("prompt-5", "deep-text-low", "grid-prompt-20-0.072")
    }
    assert list(steps.values()) == [800, 160, 800]
    assert runs["larger-shallow"].model == "assets/lm2"
    for name in prompt_study.SINGLE:  # as many examples of a task as its own prompt sees
        one, each = runs[f"tuned-{name}"], runs["shallow-vocab-high"]
        assert one.steps == each.steps and 3 * one.batch_size == each.batch_size


def test_the_plan_takes_at_most_two_and_a_half_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["prompts", "--plan", "--grid"]) == {}
    text = capsys.readouterr().out
    assert 1 < float(text.split("quiet cores take ")[1].split()[0]) <= 2.5
    assert not list(tmp_path.iterdir())
