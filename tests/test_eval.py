"""eval.py: metrics by hand and against a second implementation, the bootstrap's known behaviour, and the comparison of two run folders."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FILE = Path(__file__).resolve().parent.parent / "eval.py"
# By path: the name must resolve to this file whatever the working directory is.
spec = importlib.util.spec_from_file_location("shoulders_eval", FILE)
E = importlib.util.module_from_spec(spec)
spec.loader.exec_module(E)


# ---------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Beatles!", "beatles"),
        ("U.S.A.", "usa"),  # punctuation is deleted, not replaced by a space
        ("a-the", "athe"),  # punctuation goes first, so no article is left
        ("Theatre of an Ant", "theatre of ant"),  # articles as words only
        ("the a an", ""),
        ("\tÉmile\u00a0 Zola\n", "émile zola"),  # accents stay, every white space is one
        ("«quoted» – dash", "«quoted» – dash"),  # only ASCII punctuation goes
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert E.normalise(text) == expected


@pytest.mark.parametrize(
    "prediction, answers, em, f1",
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["London", "Paris"], 0.0, 2 / 3),  # maximum over answers: P 1/2, R 1
        ("paris", ["London", "PARIS!"], 1.0, 1.0),
        (
            "b b c",
            ["b d"],
            0.0,
            0.4,
        ),  # a repeated word counts as often as both have it: P 1/3, R 1/2
        ("b b", ["b b b"], 0.0, 0.8),  # P 1, R 2/3
        ("tower eiffel", ["eiffel tower"], 0.0, 1.0),  # a bag has no order
        ("Beyoncé", ["Beyonce"], 0.0, 0.0),  # no Unicode folding
        ("ÉMILE", ["émile"], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
        ("Paris", ["the"], 0.0, 0.0),
        ("the", ["a", "Paris"], 1.0, 1.0),  # both empty after normalisation
    ],
)
def test_known_scores(prediction, answers, em, f1):
    assert E.exact_match(prediction, answers) == em
    assert E.token_f1(prediction, answers) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize("answers", [[], "Paris"])
def test_no_answers_is_an_error(answers):
    for metric in (E.exact_match, E.token_f1):
        with pytest.raises(ValueError, match="answers must be a list"):
            metric("Paris", answers)


def test_f1_against_precision_and_recall_by_crossing_out():
    def slow_f1(predicted, gold):
        left, hits = list(gold), 0
        for word in predicted:
            if word in left:
                left.remove(word)
                hits += 1
        if hits == 0:
            return float(predicted == gold == [])
        precision, recall = hits / len(predicted), hits / len(gold)
        return 2 * precision * recall / (precision + recall)

    rng = random.Random(0)
    for _ in range(500):
        bags = [[rng.choice("bcdef") for _ in range(rng.randrange(7))] for _ in range(3)]
        expected = max(slow_f1(bags[0], gold) for gold in bags[1:])
        f1 = E.token_f1(" ".join(bags[0]), [" ".join(gold) for gold in bags[1:]])
        assert f1 == pytest.approx(expected, abs=1e-12)
        assert f1 >= E.exact_match(" ".join(bags[0]), [" ".join(gold) for gold in bags[1:]])


# ----------------------------------------------------------------------------------------------------------- significance


def test_identical_systems():
    scores = np.random.default_rng(0).random(50)
    assert E.paired_bootstrap(scores, scores) == (0.0, 0.0, 0.0, 1.0)


def test_better_on_every_example():
    rng = np.random.default_rng(0)
    b = rng.random(50)
    a = b + 0.1 + 0.1 * rng.random(50)
    difference, low, high, p = E.paired_bootstrap(a, b, iters=999)
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert 0.1 < low < difference < high < 0.2
    assert p == 2 / 1000
    assert E.paired_bootstrap(b, a, iters=999)[3] == p


def test_p_of_one_example_pair_by_hand():
    # Differences +1 and -1: the resampled mean is -1, 0, 0 or 1 with equal chance, so each side with its ties has 3/4 and p is capped.
    assert E.paired_bootstrap([1, 0], [0, 1], iters=4000) == (0.0, -1.0, 1.0, 1.0)
    # Differences +1 and 0: never below 0, a tie at 0 in one quarter of the draws: p = 2/4.
    assert E.paired_bootstrap([1, 0], [0, 0], iters=40_000)[3] == pytest.approx(0.5, abs=0.02)


def test_ties_survive_rounding():
    # 0.1 + 0.2 - 0.3 is 6e-17 in floats: without rounding such a draw is no tie and p is smaller than for the same scores times ten.
    tenths, whole = [0.1, 0.2, 0.4, -0.3], [1, 2, 4, -3]
    assert E.paired_bootstrap(tenths, [0] * 4)[3] == E.paired_bootstrap(whole, [0] * 4)[3]


def test_interval_agrees_with_the_normal_one():
    d = np.random.default_rng(1).normal(0.02, 1, 500)
    difference, low, high, _ = E.paired_bootstrap(d, np.zeros(500))
    half = 1.96 * d.std() / 500**0.5
    assert [low, high] == pytest.approx([difference - half, difference + half], abs=0.05 * half)


def test_coverage_of_the_interval_and_level_of_p():
    rng, covered, rejected, trials = np.random.default_rng(2), 0, 0, 300
    for trial in range(trials):
        shared = rng.normal(
            size=60
        )  # what makes an example hard for both systems: pairing must remove it
        a, b = 5 * shared + rng.normal(size=60), 5 * shared + rng.normal(size=60)
        _, low, high, p = E.paired_bootstrap(a, b, iters=400, seed=trial)
        covered += low <= 0 <= high
        rejected += p < 0.05
        assert high - low < 1.6  # unpaired, about 3.6
    assert 0.90 <= covered / trials <= 0.98  # three standard errors around the nominal level
    assert 0.02 <= rejected / trials <= 0.10


def test_deterministic_and_seeded():
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)
    assert E.paired_bootstrap(a, b, 500, 1) == E.paired_bootstrap(a, b, 500, 1)
    assert E.paired_bootstrap(a, b, 500, 1)[1:] != E.paired_bootstrap(a, b, 500, 2)[1:]


def test_many_examples_take_several_chunks():
    d = np.random.default_rng(4).normal(
        size=300_000
    )  # three iterations per chunk, and the last chunk is smaller
    difference, low, high, _ = E.paired_bootstrap(d, np.zeros_like(d), iters=10)
    assert (
        abs(low - difference) < 5 / 300_000**0.5
        and abs(high - difference) < 5 / 300_000**0.5
        and low < high
    )


def test_seeds_and_examples_together():
    rng = np.random.default_rng(5)
    a, b = rng.random(80), rng.random(80)
    assert E.paired_bootstrap(a[None], b[None]) == E.paired_bootstrap(
        a, b
    )  # one seed adds no spread
    # Runs that differ in level only: all the spread is between seeds, and the variance of the mean of 4 resampled runs is var / 4.
    levels = np.array([0.0, 0.1, 0.2, 0.3])
    difference, low, high, p = E.paired_bootstrap(
        np.repeat(levels[:, None], 80, 1), np.zeros((2, 80)), iters=20_000
    )
    assert difference == pytest.approx(0.15)
    assert (high - low) / 2 == pytest.approx(1.96 * levels.std() / 2, rel=0.1)
    # Equal runs under both names: seeds are drawn for each system on its own, so the interval has width though the difference is 0.
    difference, low, high, p = E.paired_bootstrap(
        np.repeat(levels[:, None], 80, 1), np.repeat(levels[:, None], 80, 1)
    )
    assert difference == 0 and low < -0.05 and high > 0.05 and p > 0.9
    # Examples that differ in difficulty only are the same columns for both systems: they cancel.
    assert E.paired_bootstrap(np.tile(a, (3, 1)) + 0.25, np.tile(a, (3, 1)))[:3] == pytest.approx(
        (0.25, 0.25, 0.25)
    )


@pytest.mark.parametrize(
    "a, b, iters, message",
    [
        ([1, 2], [1], 10, "shapes"),
        ([], [], 10, "shapes"),
        ([[1, 2]], [1, 2], 10, "shapes"),
        ([[1, 2]], [[1]], 10, "shapes"),
        ([1.0, float("nan")], [0, 0], 10, "finite"),
        ([1], [1], 0, "iters"),
    ],
)
def test_bootstrap_refusals(a, b, iters, message):
    with pytest.raises(ValueError, match=message):
        E.paired_bootstrap(a, b, iters)


# ------------------------------------------------------------------------------------------------------------------- runs


def example(id, task="nq", answers=("Paris",)):
    return SimpleNamespace(id=id, task=task, input=f"question {id}", answers=list(answers))


def write_run(folder, records):
    folder.mkdir()
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return folder


def command(*args):
    return subprocess.run(
        [sys.executable, str(FILE), *map(str, args)], capture_output=True, text=True
    )


def test_score_and_summary():
    examples = [example("0"), example("1"), example("0", task="quiz", answers=["b d"])]
    records = E.score(examples, ["paris.", "in Paris", "b b c"])
    assert records[0] == {
        "id": "0",
        "task": "nq",
        "input": "question 0",
        "prediction": "paris.",
        "answers": ["Paris"],
        "em": 1.0,
        "f1": 1.0,
    }
    result = E.summary(records)
    assert (result["n"], result["em"], result["f1"]) == (
        3,
        pytest.approx(1 / 3),
        pytest.approx((1 + 2 / 3 + 0.4) / 3),
    )
    assert list(result["tasks"]) == ["nq", "quiz"]
    assert result["tasks"]["nq"] == {"em": 0.5, "f1": pytest.approx(5 / 6), "n": 2}
    assert result["tasks"]["quiz"] == {"em": 0.0, "f1": pytest.approx(0.4), "n": 1}
    with pytest.raises(ValueError, match="3 examples but 1 predictions"):
        E.score(examples, ["x"])
    with pytest.raises(ValueError, match="example '9' of task 'nq': answers"):
        E.score([example("9", answers=[])], ["x"])
    with pytest.raises(ValueError, match="no records"):
        E.summary([])


def test_read_predictions_returns_what_score_made(tmp_path):
    records = E.score(
        [example("0", answers=["Zoë\u2028x"]), example(1)], ["Zoë", "paris"]
    )  # U+2028 ends no line
    assert E.read_predictions(write_run(tmp_path / "run", records)) == records


GOOD = json.dumps(E.score([example("0")], ["paris"])[0])


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "Expecting value"),
        ('{"id": "1"', "Expecting"),
        ("[1]", "JSON object"),
        (GOOD, "already on line 1"),
        ('{"id": "1"}', "'task' is missing"),
        (GOOD.replace('"em": 1.0', '"em": true'), "'em' must be int or float, got True"),
        (GOOD.replace('"em": 1.0', '"em": NaN'), "'em' must be from 0 to 1"),
        (GOOD.replace('["Paris"]', "[]"), "'answers'"),
        (GOOD.replace('["Paris"]', "[3]"), "'answers'"),
        (GOOD.replace("paris", "\udcff"), "utf-8"),
    ],
)
def test_read_predictions_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(f"{GOOD}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        E.read_predictions(tmp_path)
    assert (
        str(caught.value).startswith(f"{path}:2: ")
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


def two_runs(tmp_path):
    # Task nq: of 200 questions a alone answers 45 and b alone 20; task quiz: the same answers.
    examples = [example(str(i), answers=["Paris"]) for i in range(200)] + [
        example(str(i), task="quiz") for i in range(100)
    ]
    right_a = [i < 125 for i in range(200)] + [i < 50 for i in range(100)]
    right_b = [i < 80 or i >= 180 for i in range(200)] + [i < 50 for i in range(100)]
    runs = [
        E.score(examples, ["Paris" if right else "London" for right in rights])
        for rights in (right_a, right_b)
    ]
    return write_run(tmp_path / "a", runs[0]), write_run(
        tmp_path / "b", runs[1][::-1]
    )  # the order of lines must not matter


def test_compare_prints_what_the_docstring_promises(tmp_path, capsys):
    rows = E.compare(*two_runs(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [line.removeprefix("    ") for line in E.__doc__.splitlines()[-4:]]
    assert [(r["metric"], r["task"], r["n"]) for r in rows] == [
        (m, t, n) for m in ("em", "f1") for t, n in ((None, 300), ("nq", 200), ("quiz", 100))
    ]
    assert len(printed) == 1 + len(rows)
    assert rows[1]["a"] == 0.625 and rows[1]["b"] == 0.5
    nq_a, nq_b = [1] * 125 + [0] * 75, [1] * 80 + [0] * 100 + [1] * 20
    assert tuple(rows[1][key] for key in ("difference", "low", "high", "p")) == E.paired_bootstrap(
        nq_a, nq_b
    )
    assert (rows[2]["difference"], rows[2]["p"]) == (0, 1)


def test_command_line(tmp_path, capsys):
    a, b = two_runs(tmp_path)
    result = command("compare", a, b, "--iters", 500, "--seed", 3)
    E.main(["compare", str(a), str(b), "--iters", "500", "--seed", "3"])
    assert (result.returncode, result.stderr, result.stdout) == (0, "", capsys.readouterr().out)


def test_one_task_has_no_second_table(tmp_path):
    run = write_run(tmp_path / "a", E.score([example("0")], ["Paris"]))
    assert [row["task"] for row in E.compare(run, run, iters=10)] == [None, None]


def test_compare_refuses_on_the_command_line(tmp_path):
    a = write_run(tmp_path / "a", E.score([example("0"), example("1")], ["x", "y"]))
    result = command("compare", a, tmp_path / "nowhere")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert (
        str(tmp_path / "nowhere" / "predictions.jsonl") in result.stderr
        and "Traceback" not in result.stderr
    )


@pytest.mark.parametrize(
    "others, message",
    [
        ([example("0")], "id '1' of task 'nq' is in {a} but not in {b}"),
        (
            [example("0"), example("1"), example("2")],
            "id '2' of task 'nq' is in {b} but not in {a}",
        ),
        ([example("0"), example("1", task="quiz")], "id '1' of task 'nq' is in {a} but not in {b}"),
        (
            [example("0"), example("1", answers=["Rome"])],
            "different answers for id '1' of task 'nq': ['Paris'] in {a}, ['Rome'] in {b}",
        ),
    ],
)
def test_compare_refuses_other_examples(tmp_path, capsys, others, message):
    a = write_run(tmp_path / "a", E.score([example("0"), example("1")], ["x", "y"]))
    b = write_run(tmp_path / "b", E.score(others, ["x"] * len(others)))
    with pytest.raises(SystemExit) as caught:
        E.main(["compare", str(a), str(b)])
    out, err = capsys.readouterr()
    assert (
        caught.value.code == 2
        and out == ""
        and err.count("\n") == 1
        and message.format(a=a, b=b) in err
    )


@pytest.mark.parametrize("args", [[], ["contrast"], ["compare", "x"]])
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as caught:
        E.main(args)
    assert caught.value.code == 2 and capsys.readouterr().out == ""


def test_runs_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "eval.py").write_bytes(FILE.read_bytes())
    result = subprocess.run(
        [sys.executable, "-I", "eval.py", "compare", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "--iters" in result.stdout
