"""The rows of bench.py, in tiny shapes: ours and the peers' steps compute the same, and operations,
matrix rate and memory are what they are called."""

import json
import subprocess

import pytest
import torch

import bench
import bench_processes
import contest
import train
from contest import TINY, Contest, Setting
from model import LM

V, C, LAYERS, HIDDEN = TINY.vocab_size, TINY.dim, TINY.n_layers, TINY.hidden_dim


def rows_of(capsys, workload, *flags):
    """The rows of a tiny workload as they were printed."""
    rows = bench.main(["--tiny", "--runs", "2", "--json", "--only", workload, *flags])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    return rows


@pytest.mark.parametrize("workload", ["prompt", "deep_prompt", "id_pt", "reader", "fine_tuning"])
def test_a_training_step_has_the_loss_of_its_peers(capsys, workload):
    rows = rows_of(capsys, workload)
    whole, trimmed = (row["peer"] for row in rows)
    assert trimmed == f"{whole}, trimmed"
    assert (whole == "PEFT") == (workload in ("prompt", "deep_prompt", "reader"))
    assert all(row["loss_difference"] < 2e-6 for row in rows)
    ratios = [row["operations_ratio"] for row in rows]
    assert ratios[0] > ratios[1] >= 1  # the peer with all its logits computes more


def test_generation_writes_the_tokens_of_its_peer(capsys):
    samples, *greedy, mixed, recursion = rows_of(capsys, "generation")
    assert [row["identical"] for row in (*greedy, mixed)] == [1, 1, 1, 1]
    assert "identical" not in samples and "identical" not in recursion
    assert samples["operations_ratio"] > greedy[0]["operations_ratio"]
    assert samples["tokens_per_second"] == pytest.approx(3 * 2 * 4 / samples["seconds"])


def test_a_kept_first_pass_changes_operations_and_no_loss(capsys):
    """Two Connector layers on two of the LM: the operations are about those of the layers. Both
    sides of a step compute logits, too. Reading a question ends with the keys of the last layer, of
    the last pass only."""
    step, decoding = rows_of(capsys, "recursion")
    assert step["loss_difference"] < 2e-6 and step["peer"] == "computed again"
    assert "layers alone: 1.20" in step["workload"] and 1.1 < step["operations_ratio"] < 1.2
    assert "layers alone: 0.33" in decoding["workload"] and decoding["peer"] == "one pass"
    assert 0.25 < decoding["operations_ratio"] < 0.33 and "identical" not in decoding
    assert decoding["tokens_per_second"] == pytest.approx(2 * 4 / decoding["seconds"])
    one = decoding["peer_tokens_per_second"]
    assert one == pytest.approx(2 * 4 / decoding["peer_seconds"])


@pytest.mark.parametrize("workload", ["prompt", "deep_prompt"])
def test_peft_computes_the_same_loss_in_bf16(capsys, workload):
    rows = rows_of(capsys, workload, "--dtype", "bfloat16")
    assert [row["peer"] for row in rows] == ["PEFT", "PEFT, trimmed"]
    assert all(row["loss_difference"] < 5e-2 for row in rows)


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(contest, "find_spec", lambda _: None)
    (row,) = bench.main("--tiny --runs 1 --only prompt".split())
    assert "peer" not in row and row["seconds"] > 0
    assert "not installed: PEFT" in capsys.readouterr().err


def test_the_operations_of_a_step_are_those_of_its_products():
    """Two positions before one, by hand: every matrix, scores and values, and the logits."""
    lm = LM(TINY).requires_grad_(False)
    ids = torch.randint(V, (5, 3))

    def step():
        with torch.no_grad():
            lm.logits(lm(lm.embed(ids))[:, -1])

    matrices = 4 * C * C + 3 * C * HIDDEN
    by_hand = LAYERS * (2 * 15 * matrices + 4 * 5 * 3 * 3 * C) + 2 * 5 * C * V
    assert contest.count_operations(step, lm) == by_hand
    multiply, products = contest.layer_products(lm, 15, torch.float32)
    assert products == LAYERS * 2 * 15 * matrices
    assert contest.count_operations(multiply, lm) == products


def test_memory_is_the_peak_of_what_a_step_holds():
    held = 80_000_000
    peaks = [contest.peak_memory(lambda: torch.ones(held // 4).sum()) for _ in range(2)]
    assert all(0.9 * held < peak < 1.2 * held for peak in peaks)  # the second one, too


def test_a_ratio_is_that_of_its_rounds():
    row = contest.compare([(1.0, 2.0), (2.0, 8.0), (4.0, 12.0)])
    assert row == {"seconds": 2.0, "peer_seconds": 8.0, "ratio": 3.0, "spread": [2.0, 4.0]}


def test_every_contestant_steps_once_in_each_round():
    order, lm = [], LM(TINY).requires_grad_(False)

    def step(name):
        def take():
            order.append(name)
            return lm(lm.embed(torch.tensor([[1]]))).sum().item()

        return take

    setting = Setting(runs=3, tiny=True)
    peers = {"a": step("a"), "b": step("b"), "c": None}
    rows = contest.measure(Contest(setting, "", lm, step("ours"), peers, 1, 1))
    rounds = [*"ours a b".split(), *"a b ours".split(), *"b ours a".split()]
    assert order == [name for name in ("ours", "a", "b") for _ in range(3)] + rounds
    assert [(row["peer"], row["missing"]) for row in rows] == [("a", ["c"]), ("b", ["c"])]


def test_loading_and_the_start_are_measured_in_processes_of_their_own(monkeypatch, capsys):
    alone = {"ours": {"seconds": 1.0, "peak": 6e6}, "peer": {"seconds": 3.0, "peak": 9e6}}
    monkeypatch.setattr(bench_processes, "alone", lambda who, *_: alone[who])
    for row in rows_of(capsys, "loading"):
        assert row["ratio"] == 3.0
        assert row["peer_peak_over_weights"] == 1.5 * row["ours_peak_over_weights"]


def test_a_training_beside_busy_processes_and_text_are_measured(monkeypatch, capsys):
    original, others = subprocess.Popen, []

    def popen(command):
        others.append(original(command))
        return others[-1]

    def start(arguments, **environment):
        assert train.parse(list(map(str, arguments[1:]))).steps == 2
        spins = 4.0 * ("GOMP_SPINCOUNT" in environment)
        return 1.0 + spins + sum(other.poll() is None for other in others)

    monkeypatch.setattr(bench_processes.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench_processes.subprocess, "Popen", popen)
    monkeypatch.setattr(bench_processes, "start", start)
    row, alone = rows_of(capsys, "busy")
    assert (row["peer"], row["seconds"], row["peer_seconds"]) == ("2 busy processes", 1.0, 3.0)
    assert (alone["seconds"], alone["peer_seconds"]) == (1.0, 5.0)
    assert len(others) == 4 and all(other.poll() is not None for other in others)
    monkeypatch.undo()
    (row,) = rows_of(capsys, "step")
    assert row["seconds"] > 0 and 0 < row["outside"] < 1
    for row in rows_of(capsys, "text"):
        assert row["seconds"] > 0 and row["peak"] >= 0


def test_a_table_has_a_cell_for_each_column(capsys):
    bench.main("--tiny --runs 1 --only prompt".split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(bench.COLUMNS) + 1}
