"""eval.py: metrics by hand and against a second implementation, the bootstrap, comparing runs.
(The commands that answer questions: test_answers.)"""

import json
import random
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

import data
import eval as evaluation  # not the built-in function
from checkpoints import write_lines
from eval import (
    average_relative_gain,
    compare,
    exact_match,
    has_answer,
    normalise,
    paired_bootstrap,
    recall_at,
    rouge,
    score,
    stops,
    summary,
    token_f1,
)
from runs import read_predictions


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Beatles!", "beatles"),
        ("U.S.A.", "usa"),  # punctuation is deleted, not replaced by a space
        ("a-the", "athe"),  # punctuation is deleted first, so no article is left
        ("Theatre of an Ant", "theatre of ant"),  # articles are whole words
        ("the a an", ""),
        ("\tÉmile\u00a0 Zola\n", "émile zola"),  # accents stay; every white space is one space
        ("«quoted» – dash", "«quoted» – dash"),  # only ASCII punctuation is deleted
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "prediction, answers, em, f1",
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["London", "Paris"], 0.0, 2 / 3),  # the best answer: P 1/2, R 1
        ("paris", ["London", "PARIS!"], 1.0, 1.0),
        ("b b c", ["b d"], 0.0, 0.4),  # a repeated word counts as often as both have it
        ("b b", ["b b b"], 0.0, 0.8),  # P 1, R 2/3
        ("tower eiffel", ["eiffel tower"], 0.0, 1.0),  # F1 ignores the order
        ("Beyoncé", ["Beyonce"], 0.0, 0.0),  # no Unicode folding
        ("ÉMILE", ["émile"], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
        ("Paris", ["the"], 0.0, 0.0),
        ("the", ["a", "Paris"], 1.0, 1.0),  # both empty after normalisation
    ],
)
def test_scores_worked_out_by_hand(prediction, answers, em, f1):
    assert exact_match(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    "composed",
    ["Beyoncé", "Dvořák", "São Paulo", "Việt Nam", "한국", "ガンダム", "Ελλάδα", "Å (unit)"],
)
def test_questions_are_scored_after_nfd_and_inputs_are_not(composed):
    """Natural Questions open's own scorer normalises so; SQuAD's does not."""
    apart = unicodedata.normalize("NFD", composed)
    assert apart != composed
    for prediction, answer in ((composed, apart), (apart, composed)):
        for text, expected in ((data.question_text("who"), 1.0), ("who", 0.0)):
            e = SimpleNamespace(id="0", task="", input=text, answers=[answer])
            (record,) = score([e], [prediction])
            assert (record["em"], record["prediction"]) == (expected, prediction)
            assert record["f1"] >= record["em"]
    plain = "".join(letter for letter in apart if not unicodedata.combining(letter))
    question = SimpleNamespace(id="0", task="", input=data.question_text("who"), answers=[composed])
    if plain != apart:
        assert score([question], [plain])[0]["em"] == 0.0  # an accent still counts


@pytest.mark.parametrize(
    "options",
    [
        ("-5", "5"),
        (":)", ":("),
        ("C", "C++", "C#"),
        ("the who", "who", "The Who"),
        ("3.5", "35"),
        ("yes", "Yes", "YES!"),
        ("(a)", "a", "an"),
        ("U.S.", "us"),
        ("x = y", "x != y"),
        ("Å", "A\u030a"),
    ],
)
@pytest.mark.parametrize("text", ["The right choice is", data.question_text("which")])
def test_a_choice_is_right_if_its_index_is_the_targets(options, text):
    for right in options:
        e = data.Example(text, right, (right,), id="0", options=options)
        for chosen, option in enumerate(options):
            (record,) = score([e], [chosen])
            assert record["prediction"] == option
            assert record["em"] == record["f1"] == float(option == right)
    both = data.Example(text, options[0], options[:2], id="0", options=options)
    assert [score([both], [i])[0]["em"] for i in (0, 1)] == [1.0, 1.0]  # two accepted answers
    shared = data.Example(text, "New York", ("New York",), options=("New York", "New Jersey"))
    assert score([shared], [1])[0]["f1"] == 0.0  # no credit for a word of another choice


@pytest.mark.parametrize("metric", [exact_match, token_f1])
@pytest.mark.parametrize("answers", [[], "Paris"])
def test_answers_that_are_no_list_raise(metric, answers):
    with pytest.raises(ValueError, match="answers must be a list"):
        metric("Paris", answers)


def slow_f1(predicted, gold):
    """F1 from precision and recall, with the shared words crossed out one by one."""
    left, hits = list(gold), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            hits += 1
    if hits == 0:
        return float(predicted == gold == [])
    precision, recall = hits / len(predicted), hits / len(gold)
    return 2 * precision * recall / (precision + recall)


def test_f1_equals_a_second_implementation_and_is_never_below_exact_match():
    rng = random.Random(0)
    for _ in range(500):
        bags = [[rng.choice("bcdef") for _ in range(rng.randrange(7))] for _ in range(3)]
        prediction, *answers = (" ".join(bag) for bag in bags)
        f1 = token_f1(prediction, answers)
        assert f1 == pytest.approx(max(slow_f1(bags[0], gold) for gold in bags[1:]), abs=1e-12)
        assert f1 >= exact_match(prediction, answers)


def test_rouge_l_by_hand():
    """The longest common subsequence of words, whatever stands between them."""
    assert rouge("The cat sat, on the mat.", ["the mat"]) == pytest.approx(2 * 2 / 8)
    assert rouge("b x a", ["a b"]) == pytest.approx(2 * 1 / 5)  # in another order
    assert rouge("a b c d", ["x", "a c d"]) == pytest.approx(2 * 3 / 7)  # the better answer
    assert rouge("", ["a"]) == rouge("a", ["!"]) == rouge("?", ["!"]) == 0


HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940"  # its vowel signs are marks of the word


@pytest.mark.parametrize(
    "answer, text, expected",
    [
        ("Jane Austen", "It was JANE  austen.", True),
        ("Austen Jane", "It was Jane Austen.", False),
        ("art", "a party of arts", False),
        ("1,500", "about 1,500 people", True),
        ("1500", "about 1,500 people", False),
        ("U.S.", "the U . S . army", True),
        ("Bront\u00eb", "Charlotte Bronte\u0308 wrote", True),  # composed, decomposed
        ("Bronte", "Charlotte Bront\u00eb wrote", False),  # the accent is a mark of the word
        (HINDI, f"{HINDI} is spoken", True),
        (HINDI[0], f"{HINDI} is spoken", False),
        ("5 %", "5\u00a0% of", True),
        ("", "anything", False),
        ("\u200b", "any\u200bthing", False),  # a control character is no token
        ("a\nb", "a b", True),
    ],
)
def test_has_answer_is_dprs(answer, text, expected):
    assert has_answer(["xyzzy", answer], text) is expected


def test_recall_counts_questions_with_a_hit_among_the_first_k():
    hits = [[False, True], [True], [], [False, False, True]]
    assert [recall_at(hits, k) for k in (1, 2, 3)] == [0.25, 0.5, 0.75]


def test_average_relative_gain_is_a_mean_over_datasets_of_means_over_templates():
    def part(accuracy, chance):
        return {"accuracy": accuracy, "chance": chance}

    many = {"1": part(0.5, 0.25), "2": part(0.25, 0.25), "3": part(0.25, 0.25)}
    one = {"1": part(0.75, 0.5)}
    assert average_relative_gain({"a": many, "b": one}) == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_bootstrap_of_identical_systems_and_of_one_better_on_every_example():
    rng = np.random.default_rng(0)
    b = rng.random(50)
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0, 1.0)
    a = b + 0.1 + 0.1 * rng.random(50)
    difference, low, high, p = paired_bootstrap(a, b, iters=999)
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert 0.1 < low < difference < high < 0.2
    assert p == paired_bootstrap(b, a, iters=999)[3] == 2 / 1000


def test_p_of_two_examples_by_hand():
    # Differences +1 and -1: the resampled mean is -1, 0, 0 or 1 with equal probability. Each side
    # with its ties has 3/4, and p is capped at 1.
    assert paired_bootstrap([1, 0], [0, 1], iters=4000) == (0.0, -1.0, 1.0, 1.0)
    # Differences +1 and 0: never below 0, and a tie at 0 in one draw of four. p = 2/4.
    assert paired_bootstrap([1, 0], [0, 0], iters=40_000)[3] == pytest.approx(0.5, abs=0.02)


def test_ties_survive_rounding():
    # 0.1 + 0.2 - 0.3 is 6e-17 in floats. Without rounding it is no tie, and p is smaller.
    tenths, whole = [0.1, 0.2, 0.4, -0.3], [1, 2, 4, -3]
    assert paired_bootstrap(tenths, [0] * 4)[3] == paired_bootstrap(whole, [0] * 4)[3]


def test_interval_agrees_with_the_normal_approximation():
    d = np.random.default_rng(1).normal(0.02, 1, 500)
    difference, low, high, _ = paired_bootstrap(d, np.zeros(500))
    half = 1.96 * d.std() / 500**0.5
    assert [low, high] == pytest.approx([difference - half, difference + half], abs=0.05 * half)


def test_interval_covers_and_p_rejects_at_the_nominal_rates():
    rng, covered, rejected, trials = np.random.default_rng(2), 0, 0, 300
    for trial in range(trials):
        difficulty = 5 * rng.normal(size=60)  # shared by both systems: pairing must remove it
        a, b = difficulty + rng.normal(size=60), difficulty + rng.normal(size=60)
        _, low, high, p = paired_bootstrap(a, b, iters=400, seed=trial)
        covered += low <= 0 <= high
        rejected += p < 0.05
        assert high - low < 1.6  # unpaired, about 3.6
    assert 0.90 <= covered / trials <= 0.98  # three standard errors around the nominal level
    assert 0.02 <= rejected / trials <= 0.10


def test_bootstrap_depends_on_scores_and_seed_alone():
    a, b = np.random.default_rng(3).random((2, 40))
    assert paired_bootstrap(a, b, 500, 1) == paired_bootstrap(a, b, 500, 1)
    assert paired_bootstrap(a, b, 500, 1)[1:] != paired_bootstrap(a, b, 500, 2)[1:]


def test_many_examples_take_several_chunks():
    d = np.random.default_rng(4).normal(size=300_000)  # chunks of 3, 3, 3 and 1 iterations
    difference, low, high, _ = paired_bootstrap(d, np.zeros_like(d), iters=10)
    error = 5 / 300_000**0.5
    assert abs(low - difference) < error and abs(high - difference) < error and low < high


def test_seeds_and_examples_are_resampled_together():
    a, b = np.random.default_rng(5).random((2, 80))
    assert paired_bootstrap(a[None], b[None]) == paired_bootstrap(a, b)  # one seed adds no spread
    # Runs that differ in level only: all the spread is between seeds. The variance of the mean of
    # 4 resampled runs is var / 4.
    levels = np.array([0.0, 0.1, 0.2, 0.3])
    runs = np.repeat(levels[:, None], 80, 1)
    difference, low, high, p = paired_bootstrap(runs, np.zeros((2, 80)), iters=20_000)
    assert difference == pytest.approx(0.15)
    assert (high - low) / 2 == pytest.approx(1.96 * levels.std() / 2, rel=0.1)
    # The seeds of each system are drawn separately, so equal runs have an interval with width.
    difference, low, high, p = paired_bootstrap(runs, runs)
    assert difference == 0 and low < -0.05 and high > 0.05 and p > 0.9
    # Examples that differ in difficulty only are the same columns for both systems: they cancel.
    same = np.tile(a, (3, 1))
    assert paired_bootstrap(same + 0.25, same)[:3] == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_refuses_scores_that_do_not_pair_and_nan_and_no_iterations():
    for a, b in (([1, 2], [1]), ([], []), ([[1, 2]], [1, 2]), ([[1, 2]], [[1]])):
        with pytest.raises(ValueError, match="shapes"):
            paired_bootstrap(a, b, 10)
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap([1.0, float("nan")], [0, 0], 10)
    with pytest.raises(ValueError, match="iters"):
        paired_bootstrap([1], [1], 0)


def example(id, task="nq", answers=("Paris",)):
    return SimpleNamespace(id=id, task=task, input=f"question {id}", answers=list(answers))


def write_run(folder, records):
    folder.mkdir()
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_score_and_summary():
    examples = [example("0"), example("1"), example("0", task="quiz", answers=["b d"])]
    records = score(examples, ["paris.", "in Paris", "b b c"])
    first = {"id": "0", "task": "nq", "input": "question 0", "prediction": "paris."}
    assert records[0] == first | {"answers": ["Paris"], "em": 1.0, "f1": 1.0}
    result = summary(records)
    assert (result["n"], result["em"]) == (3, pytest.approx(1 / 3))
    assert result["f1"] == pytest.approx((1 + 2 / 3 + 0.4) / 3)
    assert list(result["tasks"]) == ["nq", "quiz"]
    assert result["tasks"]["nq"] == {"em": 0.5, "f1": pytest.approx(5 / 6), "n": 2}
    assert result["tasks"]["quiz"] == {"em": 0.0, "f1": pytest.approx(0.4), "n": 1}
    with pytest.raises(ValueError, match="3 examples but 1 predictions"):
        score(examples, ["x"])
    with pytest.raises(ValueError, match="example '9' of task 'nq': answers"):
        score([example("9", answers=[])], ["x"])
    with pytest.raises(ValueError, match="no records"):
        summary([])


def test_predictions_are_read_as_they_were_scored(tmp_path):
    examples = [example("0", answers=["Zoë\u2028x"]), example(1)]  # U+2028 does not end a line
    records = score(examples, ["Zoë", "paris"])
    assert read_predictions(write_run(tmp_path / "run", records)) == records


GOOD = json.dumps(score([example("0")], ["paris"])[0])


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "Expecting value"),
        ('{"id": "1"', "Expecting"),
        ("[1]", "not a prediction"),
        (GOOD, "is on line 1 too"),
        ('{"id": "1"}', "'task'"),
        (GOOD.replace("paris", "\udcff"), "utf-8"),
    ],
)
def test_bad_prediction_error_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        read_predictions(tmp_path)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def two_runs(tmp_path):
    """Task nq: a alone is right on 45 of 200 questions, b alone on 20. Task quiz: no difference."""
    examples = [example(str(i)) for i in range(200)]
    examples += [example(str(i), task="quiz") for i in range(100)]
    right_a = [*range(125), *range(200, 250)]
    right_b = [*range(80), *range(180, 200), *range(200, 250)]
    a, b = (
        score(examples, ["Paris" if i in right else "London" for i in range(300)])
        for right in (right_a, right_b)
    )
    return write_run(tmp_path / "a", a), write_run(tmp_path / "b", b[::-1])  # in any order


def test_compare_prints_the_table_of_the_docstring(tmp_path, capsys):
    a, b = two_runs(tmp_path)
    rows = compare(a, b)
    printed = capsys.readouterr().out.splitlines()
    documented = evaluation.__doc__.splitlines()[-4:]
    assert printed[:4] == [line[4:] for line in documented] and len(printed) == 1 + len(rows)
    parts = [(None, 300), ("nq", 200), ("quiz", 100)]
    expected = [(metric, *part) for metric in ("em", "f1") for part in parts]
    assert [(row["metric"], row["task"], row["n"]) for row in rows] == expected
    nq_a, nq_b = [1] * 125 + [0] * 75, [1] * 80 + [0] * 100 + [1] * 20
    values = ("a", "b", "difference", "low", "high", "p")
    assert [rows[1][v] for v in values] == [0.625, 0.5, *paired_bootstrap(nq_a, nq_b)]
    assert (rows[2]["difference"], rows[2]["p"]) == (0, 1)
    argv = ["compare", str(a), str(b), "--iters", "500", "--seed", "3"]
    assert evaluation.main(argv) == compare(a, b, 500, 3) != rows


def test_one_task_is_not_listed_twice(tmp_path):
    run = write_run(tmp_path / "a", score([example("0")], ["Paris"]))
    assert [row["task"] for row in compare(run, run, iters=10)] == [None, None]
    write_lines(tmp_path / "predictions.jsonl", [{"task": "", "id": "7", "input": "q", "em": 1.0}])
    with pytest.raises(ValueError, match="predictions.jsonl:1: .* 'answers' is missing"):
        compare(run, tmp_path)


def test_a_question_is_one_also_with_spaces_behind_it():
    questions = [data.question_text(text) for text in ("who", "who?", " who ? ")]
    for text in (*questions, *(f"{question} " for question in questions)):
        assert evaluation.is_question(text)
        assert stops([data.Example(text, "a", ("a",))]) == ["\n"]
        e = SimpleNamespace(id="0", task="", input=text, answers=["e\u0301"])
        assert score([e], ["\xe9"])[0]["em"] == 1.0
    for text in ("Review: dull.\nVerdict:", "Q: who?\nA: so", "Q: who?\nA: so \n", "who?\nA:"):
        assert not evaluation.is_question(text)


def test_stops_are_a_newline_for_questions_unless_something_else_is_asked_for():
    question, lines = data.question_text("who"), ("one\ntwo", "three")
    examples = [data.Example(question, "a", ("a",)), data.Example("It is", "a", ("a",))]
    examples.append(data.Example(question, "one\ntwo", lines))  # `ask` does not know its answer
    examples.append(data.Example(question, "", ()))
    assert stops(examples) == ["\n", "", "\n", "\n"]
    for stop, expected in (("", ""), (".", "."), ("\\n", "\n"), ("\n\n", "\n\n"), ("Q:", "Q:")):
        assert stops(examples, stop) == [expected] * 4


def with_settings(run, name="run.json", **arguments):
    record = {"arguments": {"method": "fine_tuning"} | arguments, "results": {}}
    (run / name).write_text(json.dumps(record))


SAME = {"stop": None, "shots": None, "max_new_tokens": 16}


@pytest.mark.parametrize(
    "a, b, note",
    [
        ({}, {}, None),
        ({"stop": "."}, {"stop": "."}, None),
        ({"stop": "."}, {}, "--stop '.' and None"),
        ({"stop": ""}, {"stop": "."}, "--stop '' and '.'"),
        ({"shots": 5}, {}, "--shots 5 and None"),
        ({"max_new_tokens": 4}, {}, "--max-new-tokens 4 and 16"),
        ({"stop": ".", "shots": 2}, {"shots": 3}, "--stop '.' and None, --shots 2 and 3"),
        ({"rank_by": "mean"}, {"rank_by": "sum"}, "--rank-by 'mean' and 'sum'"),
        (
            {"shots": 2, "shots_from": "x"},
            {"shots": 2, "shots_from": "y"},
            "--shots-from 'x' and 'y'",
        ),
    ],
)
@pytest.mark.parametrize("names", [("score.json",) * 2, ("run.json", "score.json")])
def test_compare_says_in_a_line_what_was_asked_in_another_way(tmp_path, capsys, a, b, note, names):
    runs = [write_run(tmp_path / n, score([example("0")], [p])) for n, p in zip("ab", "xy")]
    for run, name, settings in zip(runs, names, (a, b)):
        with_settings(run, name, **SAME | settings)
    compare(*runs, iters=5)
    lines = capsys.readouterr().out.splitlines()[3:]
    assert lines == ([f"a and b were not asked in the same way: {note}"] if note else [])


def test_compare_says_if_a_is_b(tmp_path, capsys):
    records = score([example("0"), example("1")], ["Paris", "x"])
    a, copy = write_run(tmp_path / "a", records), write_run(tmp_path / "copy", records[::-1])
    other = write_run(tmp_path / "other", score([example("0"), example("1")], ["Paris", "y"]))
    for b in (a, copy):
        compare(a, b, iters=5)
        assert capsys.readouterr().out.splitlines()[3:] == ["a and b hold the same predictions"]
    compare(a, other, iters=5)  # the same scores
    assert capsys.readouterr().out.splitlines()[3:] == []


@pytest.mark.parametrize("empty", ["a", "b", "ab"])
def test_a_run_without_predictions_is_named_in_one_line(tmp_path, empty):
    for name in "ab":
        write_run(tmp_path / name, [] if name in empty else score([example("0")], ["Paris"]))
    named = tmp_path / empty[0]
    with pytest.raises(ValueError, match=f"^{named}/predictions.jsonl: no predictions$"):
        compare(tmp_path / "a", tmp_path / "b")


def moved(id, input):
    e = example(id)
    e.input = input
    return e


@pytest.mark.parametrize(
    "others, message",
    [
        ([example("0")], "id '1' of task 'nq' is in {a} but not in {b}"),
        ([example(i) for i in "012"], "id '2' of task 'nq' is in {b} but not in {a}"),
        ([example("0"), example("1", "quiz")], "id '1' of task 'nq' is in {a} but not in {b}"),
        ([example("0"), example("1", answers=["X"])], "task 'nq': ['Paris'] in {a}, ['X'] in {b}"),
        ([example(i) for i in "123"], "2 in {a}, 3 in {b}, and 1 are in both"),
        ([example("0"), moved("1", "who")], "input for id '1' of task 'nq': 'question 1' in {a}"),
        ([example("0"), moved("1", "why " * 999)], "in {a}, 'why why"),
    ],
)
def test_runs_with_other_examples_are_not_compared(tmp_path, others, message):
    a = write_run(tmp_path / "a", score([example("0"), example("1")], ["x", "y"]))
    b = write_run(tmp_path / "b", score(others, ["x"] * len(others)))
    with pytest.raises(ValueError) as caught:
        compare(a, b)
    assert message.format(a=a, b=b) in str(caught.value) and "\n" not in str(caught.value)
    assert str(b) in str(caught.value) and len(str(caught.value)) < 700
