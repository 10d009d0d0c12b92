"""Files in the published formats, written and read again."""

import csv
import json
from dataclasses import replace

import pytest

import convert
import data
from passages import Passage, Question, read_passages, read_questions

BOOK = [
    Passage("Emma", "Emma is a novel by Jane Austen.", "1"),
    Passage('The "Times"', '"The Times" is a "paper"', "2"),
    Passage("", '"alone"', "x-3"),
    Passage("Emma", "Jane wrote it.", "4"),
]
ASKED = [
    Question("who wrote Emma", ["Austen", "Jane"], BOOK[:1], BOOK[1:2], BOOK[2:3], id="q1"),
    Question("who wrote it", ["Jane"], [BOOK[1], BOOK[3]], id="q2"),
    Question("what is it", ["novel"], found=BOOK[:2], scores=[1.5, -0.25], id="q3"),
]
BARE = {"id": "", "source": ""}


def read(path):
    """The questions of a file without what says where they come from."""
    return [replace(q, **BARE) for q in read_questions(path)]


def test_passages_are_written_as_dprs_and_read_again(tmp_path):
    convert.write_passages(tmp_path / "passages.jsonl", BOOK)
    line = [str(tmp_path / "passages.jsonl"), str(tmp_path / "psgs.tsv"), "--to", "passages"]
    convert.main(line)
    assert (
        read_passages(tmp_path / "passages.jsonl") == read_passages(tmp_path / "psgs.tsv") == BOOK
    )
    with open(tmp_path / "psgs.tsv", newline="", encoding="utf-8") as file:  # as DPR reads it
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [["id", "text", "title"], *([p.id, p.text, p.title] for p in BOOK)]
    before = (tmp_path / "psgs.tsv").read_bytes()
    with pytest.raises(FileExistsError, match="psgs.tsv exists"):
        convert.main(line)
    assert before == (tmp_path / "psgs.tsv").read_bytes()
    convert.write_passages(tmp_path / "lines.tsv", [Passage("a\tb", "c\nd\r\ne", "1")])
    assert read_passages(tmp_path / "lines.tsv") == [Passage("a b", "c d  e", "1")]


def test_dprs_files_are_written_and_read_again(tmp_path):
    convert.write_questions(tmp_path / "training.json", ASKED, "training")
    assert read(tmp_path / "training.json") == [
        replace(q, found=[], scores=[], **BARE) for q in ASKED
    ]
    convert.write_questions(tmp_path / "results.json", ASKED, "results")
    lists = {"positives": [], "hard_negatives": [], "negatives": []}
    assert read(tmp_path / "results.json") == [replace(q, **lists, **BARE) for q in ASKED]
    found = json.loads((tmp_path / "results.json").read_text())[2]["ctxs"]
    assert [ctx["has_answer"] for ctx in found] == [True, False] and found[0]["score"] == "1.5"


def test_nq_open_and_squad_are_written_and_read_again(tmp_path, capsys):
    convert.write_questions(tmp_path / "nq.jsonl", ASKED, "nq-open")
    first = json.loads((tmp_path / "nq.jsonl").read_text().splitlines()[0])
    assert first == {"question": "who wrote Emma", "answer": ["Austen", "Jane"]}
    convert.write_questions(tmp_path / "training.json", ASKED, "training")
    line = [str(tmp_path / "training.json"), str(tmp_path / "squad.json"), "--to", "squad"]
    assert convert.main(line) == 1  # the third has no positive
    assert "2 questions, 1 left out" in capsys.readouterr().out
    (article,) = json.loads((tmp_path / "squad.json").read_text())["data"]
    assert article["title"] == "Emma" and len(article["paragraphs"]) == 2
    for paragraph, q in zip(article["paragraphs"], ASKED):
        (qa,) = paragraph["qas"]
        assert qa["question"] == q.question and [a["text"] for a in qa["answers"]] == q.answers
        for answer in qa["answers"]:
            start = answer["answer_start"]
            assert paragraph["context"][start:].startswith(answer["text"])
    one, two = read_questions(tmp_path / "squad.json")
    assert one.positives[0][:2] == BOOK[0][:2] and two.positives[0][:2] == BOOK[3][:2]


def test_ids_stand_for_passages_and_a_bad_file_leaves_nothing(tmp_path):
    convert.write_passages(tmp_path / "book.tsv", BOOK)
    record = {"question": "q", "answers": ["a"], "ctxs": [{"id": "4", "score": 1}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    line = [str(tmp_path / "q.jsonl"), str(tmp_path / "out.json"), "--to", "results"]
    with pytest.raises(ValueError, match="q.jsonl:1: ctxs: the passage '4' has no text"):
        convert.main(line)
    assert not (tmp_path / "out.json").exists()
    convert.main([*line, "--passages", str(tmp_path / "book.tsv")])
    assert read(tmp_path / "out.json")[0].found == BOOK[3:]


def test_labelled_texts_become_examples_of_a_prompted_task(tmp_path):
    """Words stand for labels, also for several; they may come from the record, and so may fewer."""
    reviews = [
        {"text": "Fine {film}.", "label": 1},
        {"text": "Dull.", "label": 0},
        {"text": "So so.", "label": -1},
    ]
    asked = [
        {"q": "Which burns?", "choices": ["wood", "stone", "sand"], "answer": 0},
        {"q": "Is it so?", "choices": ["no", "yes"], "answer": 1},
    ]
    for name, rows in (("reviews", reviews), ("asked", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reviews, asked = (str(tmp_path / f"{name}.jsonl") for name in ("reviews", "asked"))
    line = [reviews, str(tmp_path / "out.jsonl"), "--to", "prompted", "--label", "label"]
    line += ["--template", r"Review: {text}\nSentiment:", "--choices=-1=bad | 0=bad | 1=good"]
    convert.main(line)
    examples = data.read(tmp_path / "out.jsonl")
    assert [e.target for e in examples] == ["good", "bad", "bad"]
    assert examples[0].input == "Review: Fine {film}.\nSentiment:"
    assert {e.options for e in examples} == {("bad", "good")}
    words = " | ".join(f"{i}={{choices[{i}]}}" for i in range(3))
    found = convert.prompted(asked, "{q}", "answer", words)
    assert [row["target"] for row in found] == ["wood", "yes"]
    assert [row["options"] for row in found] == [["wood", "stone", "sand"], ["no", "yes"]]
    assert convert.prompted(asked, "{q}", "q")[0] == {
        "input": "Which burns?",
        "target": "Which burns?",
    }
    words = convert.prompted(reviews, "{text}", "label", "-1=a | 0.0=b{label}\\n | 1.0=c")
    assert [row["target"] for row in words] == ["c", "b0\n", "a"]
    assert convert.fill("{a[b]}: {c", {"a": {"b": True}}, "") == "true: {c"
    for choices, problem in (("1=a|1.0=b", "taken"), ("1=a|0=a|-1=a", "one option, a")):
        with pytest.raises(ValueError, match=problem):
            convert.prompted(reviews, "{text}", "label", choices)
    with pytest.raises(ValueError, match="asked.jsonl:1: answer is 0, which --choices has no"):
        convert.prompted(asked, "{q}", "answer", "0={choices[8]} | 1={choices[9]}")
    with pytest.raises(ValueError, match="reviews.jsonl:3: label is -1, which --choices has no"):
        convert.prompted(reviews, "{text}", "label", "1=a|0=b")
    with pytest.raises(ValueError, match="asked.jsonl:2: a list is too short for --template"):
        convert.prompted(asked, "{choices[2]}", "q")
    (tmp_path / "p3.jsonl").write_text(
        '{"inputs_pretokenized": "a", "targets_pretokenized": "b"}\n'
    )
    pretokenized = "{inputs_pretokenized}", "targets_pretokenized"
    assert convert.prompted(tmp_path / "p3.jsonl", *pretokenized) == [{"input": "a", "target": "b"}]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: holds no examples"):
        convert.prompted(str(tmp_path / "empty.jsonl"), "{q}", "q")
