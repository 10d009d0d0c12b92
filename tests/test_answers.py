"""eval.py's commands that answer questions, `ask` and `score`, on a tiny LM."""

import hashlib
import io
import json
import subprocess
import sys
import warnings

import pytest
from conftest import randomise
from tiny_runs import ROOT, write_lines

import data
import eval as evaluation  # not the built-in function
import generate
import recurse
import runs
from checkpoints import load_tokenizer
from eval import summary
from model import LM, Config
from runs import read_predictions

LETTERS = "abcdefghijklmnopqrstuvwxyz ABC:?.'5-"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny LM with a byte-level tokenizer of 300 tokens, in the folder `lm`."""
    place, text = tmp_path_factory.mktemp("eval"), "who was where " * 9 + LETTERS
    tokenizer = data.train_tokenizer([text], 300)
    lm = LM(Config(300, 32, 2, 4, 2, 12, 48, 300, bos=0, eos=(0,)))
    randomise(lm, 3).save(place / "lm", tokenizer=tokenizer)
    records = [{"id": f"{i}", "question": f"who was {i}", "answer": ["a"]} for i in range(100)]
    write_lines(place / "nq.jsonl", records)
    return place


def command(place, line, *more):
    """Run a command of eval.py on the bare LM."""
    name, *flags = line.split()
    return evaluation.main([name, *more, "--model", str(place / "lm"), *flags])


@pytest.mark.parametrize(
    "right, wrong",
    [("-5", "5"), (":)", ":("), ("Boris", "boris!"), ("a", "the"), ("<b>", "b"), ("C#", "C++")],
)
def test_one_of_two_mirrored_choices_is_right(place, tmp_path, right, wrong):
    """Whatever the LM chooses, it chooses the same text in both."""
    rows = [("which is it", right, [right, wrong]), ("which is it", wrong, [wrong, right])]
    keys = ("input", "target", "options")
    path = write_lines(tmp_path / "choices.jsonl", [dict(zip(keys, row)) for row in rows])
    result = command(place, f"score {path}")
    assert (result["em"], result["f1"]) == (0.5, 0.5)
    command(place, f"score {path} --out {tmp_path}/out")
    first, second = read_predictions(tmp_path / "out")
    assert first["prediction"] == second["prediction"] in (right, wrong)


@pytest.mark.parametrize("options", [["<|endoftext|>", "b"], ["a  b", "c   d"], ["été", "日本"]])
def test_the_prediction_is_the_option_as_the_file_has_it(place, tmp_path, options):
    """Also where it has the text of a special token, which decoding drops."""
    rows = [{"input": "it is", "target": o, "options": options} for o in options]
    path = write_lines(tmp_path / "choices.jsonl", rows)
    command(place, f"score {path} --out {tmp_path}/out")
    assert {row["prediction"] for row in read_predictions(tmp_path / "out")} <= set(options)
    answers = command(place, f"ask --input {path}")
    assert answers[0] in options and answers[0] == answers[1]


@pytest.mark.parametrize("limit, n", [(7, 7), (100, 100), (5000, 100)])
def test_limit_scores_exactly_that_many(place, limit, n, tmp_path):
    flags = f"score {place}/nq.jsonl --max-new-tokens 1 --limit {limit}"
    assert command(place, flags)["n"] == n
    command(place, f"{flags} --out {tmp_path}/a")
    command(place, f"{flags} --out {tmp_path}/b")
    command(place, f"{flags} --seed 1 --out {tmp_path}/c")
    a, b, c = ([row["id"] for row in read_predictions(tmp_path / name)] for name in "abc")
    assert a == b and (a == c) == (n == 100)


def answering(monkeypatch, *texts):
    """Replace the LM's continuations by these texts, and record what predict was called with."""
    calls = []

    def predict(lm, tokenizer, ids, prefix, new, options, stops, budget, mean):
        calls.append((ids, prefix, new, options, stops, budget, mean))
        return [texts[b % len(texts)] for b in range(len(ids))]

    monkeypatch.setattr(recurse, "predict", predict)
    return calls


BREAKS = ["\u2028", "\x85", "\x0c", "\r"]


@pytest.mark.parametrize("break_", BREAKS)
def test_ask_reads_a_question_a_line_and_writes_an_answer_a_line(
    place, tmp_path, monkeypatch, capsys, break_
):
    path = tmp_path / "questions.txt"
    path.write_bytes(f"\ufeffwho{break_}was it\r\n\nwho was\tB\n".encode())
    answers = [f"one{break_}two", "one\n\ntwo\tthree"]
    calls = answering(monkeypatch, *answers)
    assert command(place, f"ask --input {path}") == answers
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["who was it\tone two", "who was B\tone  two three"]
    tokenizer = own_tokenizer(place)
    asked = [data.question_text(text) for text in (f"who{break_}was it", "who was\tB")]
    assert calls[0][0] == data.encode_prompts(tokenizer, asked) and calls[0][4] == ["\n"] * 2


def own_tokenizer(place):
    return load_tokenizer(place / "lm")


def test_one_question_prints_its_answer_in_one_line(place, monkeypatch, capsys):
    answering(monkeypatch, "one\ntwo")
    assert command(place, "ask", "who\nwas it") == ["one\ntwo"]
    assert capsys.readouterr().out == "one two\n"


def test_ask_answers_examples_without_labels(place, tmp_path, monkeypatch, capsys):
    records = [
        {"question": "who was it"},
        {"question": "who was it?", "answer": []},
        {"input": "It was", "target": None, "answers": []},
        {"inputs_pretokenized": "It is ", "answer_choices": ["a", "b"]},
        {"question": "which", "options": ["b", "a"], "answer": "c"},
    ]
    path = write_lines(tmp_path / "unlabelled.jsonl", records)
    calls = answering(monkeypatch, "A", "B", "C", 1, 0)
    assert command(place, f"ask --input {path}") == ["A", "B", "C", "b", "b"]
    shown = ["who was it", "who was it?", "It was", "It is", "which"]
    lines = [f"{text}\t{answer}" for text, answer in zip(shown, "ABCbb")]
    assert capsys.readouterr().out.splitlines() == lines
    ids, _, _, options, ends, *_ = calls[0]
    question = data.question_text
    texts = [question(shown[0]), question(shown[1]), "It was", "It is", question("which")]
    assert ids == data.encode_prompts(own_tokenizer(place), texts)
    assert [len(choices) for choices in options] == [0, 0, 0, 2, 2]
    assert ends == ["\n", "\n", "", "", "\n"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"answer": "a"}, "question, input"),
        ({"question": 3}, "question, input"),
        ({"question": "a", "options": "ab"}, "options"),
        ({"question": "a", "options": [3]}, "options"),
        ({"question": "a", "options": {"a": 1}}, "options"),
        ({"question": "a", "options": ["b", "b"]}, "twice"),
        ({"question": "why " * 400}, "context"),
    ],
)
def test_a_bad_record_to_answer_is_named(place, tmp_path, record, message, capsys):
    path = write_lines(tmp_path / "bad.jsonl", [{"question": "a"}, record])
    with pytest.raises(SystemExit):
        command(place, f"ask --input {path}")
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "bad.jsonl:2" in error and message in error


@pytest.mark.parametrize("shots, seed", [(1, 0), (3, 0), (3, 5)])
def test_shots_stand_before_every_question(place, tmp_path, shots, seed):
    """They are sampled from the file's examples that are not asked themselves."""
    pool = [{"question": f"where was {c}", "answer": [c]} for c in "abcde"]
    pool.append({"question": "who was 7", "answer": ["seven"]})  # asked, so no example
    path = write_lines(tmp_path / "shots.jsonl", pool)
    flags = f"--shots {shots} --shots-from {path} --seed {seed} --stop \\n"
    tokenizer, out = own_tokenizer(place), tmp_path / "out"
    command(place, f"score {place}/nq.jsonl --out {out} {flags} --max-new-tokens 5")
    rows = data.sample(5, shots, seed)
    text = "".join(f"Q: where was {'abcde'[i]}?\nA: {'abcde'[i]}\n\n" for i in rows)
    lm = LM.from_pretrained(place / "lm")
    for record in read_predictions(out)[5:8]:
        ids = data.encode_prompts(tokenizer, [text + record["input"]])
        assert generate.predict(lm, tokenizer, ids, None, 5, stops=["\n"]) == [record["prediction"]]
        assert record["input"].startswith("Q: who was ")  # the record has no examples in it


def test_inputs_after_shots_end_where_the_next_example_would_begin(place, tmp_path, monkeypatch):
    pool = write_lines(tmp_path / "pool.jsonl", [{"input": "It was", "target": "a"}])
    asked = write_lines(tmp_path / "asked.jsonl", [{"input": "It is", "target": "a"}])
    calls = answering(monkeypatch, "a")
    for flags, stop in ((f"--shots 1 --shots-from {pool}", "\n\n"), ("", "")):
        command(place, f"score {asked} {flags}")
        assert calls.pop()[4] == [stop]


def test_score_writes_predictions_that_compare_reads(place, tmp_path, capsys):
    out, flags = tmp_path / "new" / "bare", "--max-new-tokens 2 --limit 20"
    result = command(place, f"score {place}/nq.jsonl --out {out} {flags}")
    printed = capsys.readouterr().out
    records = read_predictions(out)
    assert summary(records) == result and len(records) == 20
    shown = [f"{' '.join(r['input'].split())} {' '.join(r['prediction'].split())}" for r in records]
    assert all(line.strip() in " ".join(printed.split()) for line in shown[:2])
    assert "(accepted: a)" in printed
    assert command(place, f"score {place}/nq.jsonl {flags}") == result
    other = tmp_path / "other"
    command(place, f"score {place}/nq.jsonl --out {other} {flags} --stop .")
    rows = evaluation.main(["compare", str(out), str(other), "--iters", "10"])
    assert rows[0]["n"] == 20 and rows[0]["a"] == result["em"]


def test_score_records_what_its_scores_are_of(place, tmp_path):
    asked, shots = place / "nq.jsonl", tmp_path / "shots.jsonl"
    write_lines(shots, [{"question": f"where was {c}", "answer": [c]} for c in "abc"])
    flags = f"score {asked} --max-new-tokens 2 --limit 9 --seed 4 --stop ."
    flags += f" --shots 2 --shots-from {shots}"
    result = command(place, f"{flags} --out {tmp_path}/out")
    record = json.loads((tmp_path / "out" / "score.json").read_text())
    assert record["arguments"] == {
        **{"file": str(asked), "run": None, "model": str(place / "lm"), "limit": 9, "seed": 4},
        **{"threshold": None, "rank_by": "sum"},
        **{"shots": 2, "shots_from": str(shots), "stop": ".", "max_new_tokens": 2},
    }
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (asked, shots)]
    assert [record["file_hash"], record["shots_hash"]] == hashes
    assert record["fingerprint"] == LM.from_pretrained(place / "lm").fingerprint()
    assert record["adapter_hash"] is None and record["results"] == result
    assert record["eos"] == [0]
    assert record["tokenizer_hash"] == runs.hash_tokenizer(own_tokenizer(place))
    start = f"python eval.py score --model {place}/lm {flags.removeprefix('score ')}"
    assert record["command"] == f"{start} --out {tmp_path}/out"
    assert record["versions"] and record["hardware"]["threads"] == 1


class Broken(io.StringIO):
    """A standard output that cannot be written."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("line", ["ask", "score", "score --out", "compare"])
@pytest.mark.parametrize("case", ["full", "closed", "left"])
def test_a_result_that_is_only_printed_must_be_printed(
    place, tmp_path, monkeypatch, capsys, line, case
):
    argv = ["score", f"{place}/nq.jsonl", "--limit", "2", "--out", f"{tmp_path}/out"]
    argv += ["--model", f"{place}/lm", "--max-new-tokens", "1"]
    if line == "compare":
        evaluation.main(argv)
        argv = ["compare", f"{tmp_path}/out", f"{tmp_path}/out", "--iters", "5"]
    elif line == "ask":
        argv = ["ask", "who was it", "--model", f"{place}/lm"]
    elif line == "score":
        argv[4:6] = []
    capsys.readouterr()
    errors = {"full": OSError(28, "No space left on device"), "left": BrokenPipeError(32, "Gone")}
    monkeypatch.setattr(sys, "stdout", Broken(errors[case]) if case in errors else None)
    if case == "left" or line == "score --out":
        assert evaluation.main(argv)
    else:
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1
        assert error.startswith(f"eval.py {line}: standard output: "), error


def test_the_same_in_a_shell(place):
    call = [sys.executable, ROOT / "eval.py", "ask", "who", "--model", place / "lm"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr == "eval.py ask: standard output: No space left on device\n"


def test_eval_tokens_change_no_answer(place, tmp_path, monkeypatch):
    flags = f"score {place}/nq.jsonl --limit 20 --max-new-tokens 3"
    for budget in (1, 200, 100_000):
        command(place, f"{flags} --out {tmp_path}/{budget} --eval-tokens {budget}")
    rows = [read_predictions(tmp_path / str(budget)) for budget in (1, 200, 100_000)]
    assert rows[0] == rows[1] == rows[2]
    calls = answering(monkeypatch, "a")
    command(place, f"{flags} --eval-tokens 77")
    assert calls[0][2] == 3 and calls[0][5] == 77


@pytest.mark.parametrize("line", ["score nq.jsonl --limit 2", "ask"])
def test_model_says_where_the_lm_of_a_run_is(place, monkeypatch, line, capsys):
    """And warnings are one line, without the file and line that raised them."""
    seen, lm = [], LM.from_pretrained(place / "lm")

    def load_run(folder, device="cpu", model=None):
        seen.append((folder, model))
        warnings.warn("the run is old", stacklevel=1)
        return lm, None, own_tokenizer(place), {"question_format": False}

    monkeypatch.setattr(runs, "load_run", load_run)
    monkeypatch.chdir(place)
    question = ["who was it"] if line == "ask" else []
    evaluation.main([*line.split(), *question, "--run", "run", "--model", "moved"])
    assert seen == [("run", "moved")]
    assert capsys.readouterr().err == f"eval.py {line.split()[0]}: the run is old\n"


RUN = {"stop": "k", "max_new_tokens": 3, "rank_by": "mean"}


@pytest.mark.parametrize(
    "flags, stop, new, rank",
    [
        ("", "k", 3, "mean"),
        ("--stop .", ".", 3, "mean"),
        ("--max-new-tokens 7", "k", 7, "mean"),
        ("--stop=", "", 3, "mean"),
        ("--rank-by sum", "k", 3, "sum"),
        ("--rank-by mean", "k", 3, "mean"),
    ],
)
@pytest.mark.parametrize("line", ["score short.jsonl --out {}", "ask"])
def test_a_run_is_asked_as_it_was_scored(
    place, tmp_path, monkeypatch, line, flags, stop, new, rank
):
    """Where answers end, and how choices are ranked, is as in the run if no flag says another."""
    lm, tokenizer = LM.from_pretrained(place / "lm"), own_tokenizer(place)
    loaded = lm, None, tokenizer, {"arguments": RUN}
    monkeypatch.setattr(runs, "load_run", lambda *_, **__: loaded)
    write_lines(place / "short.jsonl", [{"question": "who was 1", "answer": ["a"]}])
    calls = answering(monkeypatch, "a")
    monkeypatch.chdir(place)
    question = ["who was 1"] if line == "ask" else []
    argv = [*line.format(tmp_path / "out").split(), *question, "--run", "run", *flags.split()]
    evaluation.main(argv)
    assert calls[0][4] == [stop] and calls[0][2] == new and calls[0][6] == (rank == "mean")
    if line != "ask":
        arguments = json.loads((tmp_path / "out" / "score.json").read_text())["arguments"]
        assert arguments | {"stop": stop, "max_new_tokens": new, "rank_by": rank} == arguments


def test_answers_do_not_decide_where_an_answer_ends(place, tmp_path, monkeypatch):
    """`ask` and `score` see the same inputs, and `ask` no answers."""
    rows = [
        {"question": "who", "answer": ["one\ntwo", "a"]},
        {"input": "It is", "target": "one\ntwo"},
        {"input": "Q: who?\nA:", "target": "a"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    calls = answering(monkeypatch, "a")
    command(place, f"score {path}")
    command(place, f"ask --input {path}")
    assert calls[0][0] == calls[1][0] and calls[0][4] == calls[1][4] == ["\n", "", "\n"]


def test_score_warns_once_of_answers_that_are_too_long(place, tmp_path, capsys):
    answers = ["a", "was it who was it who", "was", "who was it who was it"]
    rows = [{"question": f"who {i}", "answer": [text]} for i, text in enumerate(answers)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    command(place, f"score {path} --max-new-tokens 4")
    error = capsys.readouterr().err
    start = "eval.py score: 2 of 4 questions cannot be scored as right: their answers have more th"
    assert error.startswith(start) and error.endswith("(first: rows.jsonl:2)\n")
    assert len(error.splitlines()) == 1
    command(place, f"ask --input {path} --max-new-tokens 4")
    command(place, f"score {path} --max-new-tokens 40")
    assert capsys.readouterr().err == ""
