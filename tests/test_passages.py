"""The files of open-book question answering, and which passages are positives and negatives."""

import csv
import json

import pytest
from test_rerank import make_encoder

import genres
import world
from eval import recall_at
from openbook import cut_found, rerank_found
from passages import (
    Passage,
    Question,
    answer_hits,
    choose_passages,
    json_records,
    read_passages,
    read_questions,
    reader_text,
    reranker_samples,
    with_found,
)
from retrieve import BM25

BOOK = [
    Passage("Emma", "Emma is a novel.", "1"),
    Passage('The "Times"', '"The Times" is a "paper"', "2"),
    Passage("", "Glory, it is said", "x-3"),
    Passage("Quote", '"alone"', "4"),
]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# Passages


def test_passages_are_read_as_csv_writes_them(tmp_path):
    path = tmp_path / "psgs_w100.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:  # as DPR writes it
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([["id", "text", "title"], *([p.id, p.text, p.title] for p in BOOK)])
    assert read_passages(path) == BOOK


def test_a_text_that_begins_with_a_quotation_keeps_it(tmp_path):
    lines = 'id\ttext\ttitle\tsource\n1\t"Glory" is a song\tGlory\tx\n2\t"A ""b"" c"\t"D"\ty\n'
    path = write(tmp_path / "psgs.tsv", lines)
    assert read_passages(path) == [
        Passage("Glory", '"Glory" is a song', "1"),
        Passage("D", 'A "b" c', "2"),
    ]


def test_passages_are_read_from_json_lines(tmp_path):
    record = {"id": 7, "title": "Emma", "text": "Emma is a novel."}
    path = write(tmp_path / "passages.jsonl", json.dumps(record))
    assert read_passages(path) == [Passage("Emma", "Emma is a novel.", "7")]


HEAD = "id\ttext\ttitle\n"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", HEAD + "1\ta b\tT\n1\tc\tU\n", r"a.tsv:3: the id '1' is taken by a.tsv:2"),
        ("a.tsv", HEAD + "1\ta b\tT\n2\t \tU\n", "a.tsv:3: the passage '2' is empty"),
        ("a.tsv", HEAD + "1\ta b\n", "a.tsv:2: 2 columns, not 3"),
        ("a.tsv", "1\ta b\tT\n", "a.tsv:1: the first line must name id, text and title"),
        ("a.tsv", HEAD, "holds no passages"),
        ("a.jsonl", '{"id": 1, "title": "T", "text": "a"}\n{"title": "T"}', "a.jsonl:2: a passage"),
        ("a.jsonl", '{"id": 1, "title": "T", "text": ""}', "a.jsonl:1: the passage '1' is empty"),
    ],
)
def test_bad_passages_are_refused_with_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_passages(write(tmp_path / name, text))


def test_a_line_that_is_no_utf8_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_bytes(HEAD.encode() + b"1\t\xff\tT\n")
    with pytest.raises(ValueError, match="a.tsv:2: not UTF-8"):
        read_passages(tmp_path / "a.tsv")
    for read in (read_passages, read_questions):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(tmp_path / "b.tsv")


# Questions


def context(passage, **more):
    return {"title": passage.title, "text": passage.text, "passage_id": passage.id} | more


def test_dprs_training_format_is_read(tmp_path):
    parts = {"positive_ctxs": BOOK[:1], "hard_negative_ctxs": BOOK[1:3], "negative_ctxs": BOOK[3:]}
    record = {"question": "who?", "answers": ["Emma", "J"]}
    record |= {key: [context(p) for p in part] for key, part in parts.items()}
    lines = [json.dumps(r) for r in (record, {"question": "where?", "answers": ["here"]})]
    write(tmp_path / "a.json", "[\n{}\n]\n".format(",\n".join(lines)))
    first, second = read_questions(tmp_path / "a.json")
    lists = first.positives, first.hard_negatives, first.negatives
    assert lists == (BOOK[:1], BOOK[1:3], BOOK[3:])
    assert first.answers == ["Emma", "J"] and second.positives == [] == second.found
    assert (first.source, second.source) == ("a.json:2", "a.json:3")


def test_dprs_results_are_read(tmp_path):
    ctxs = [context(BOOK[2], score=3.5), context(BOOK[0], score=1.25)]
    record = {"question": "who?", "answers": ["emma"], "ctxs": ctxs}
    write(tmp_path / "a.json", json.dumps([record]))
    (again,) = read_questions(tmp_path / "a.json")
    assert again.found == [BOOK[2], BOOK[0]] and again.scores == [3.5, 1.25]
    assert answer_hits(again) == [False, True]
    record["ctxs"][0]["score"] = "3.5"  # DPR writes texts
    write(tmp_path / "b.json", json.dumps([record], indent=4))
    assert read_questions(tmp_path / "b.json")[0].scores == [3.5, 1.25]


def test_ids_stand_for_passages_of_the_book(tmp_path):
    lines = [
        {"question": "a", "answers": ["x"], "positive_ctxs": [{"passage_id": "x-3"}]},
        {"question": "b", "answer": "y", "positives": ["1", "4"]},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    first, second = read_questions(path, BOOK)
    assert first.positives == [BOOK[2]] and second.positives == [BOOK[0], BOOK[3]]
    assert second.answers == ["y"]
    with pytest.raises(ValueError, match="a.jsonl:1: positive_ctxs: the passage 'x-3' has no text"):
        read_questions(path, BOOK[:2])


def test_squad_is_read_and_its_unanswerable_questions_have_no_positive(tmp_path):
    qas = [{"id": "1", "question": "who", "answers": [{"text": "Jane"}, {"text": "Jane"}]}]
    qas += [{"id": "2", "question": "why", "answers": [], "is_impossible": True}]
    article = {"title": "Emma", "paragraphs": [{"context": "Jane wrote it.", "qas": qas}]}
    path = write(tmp_path / "train-v2.0.json", json.dumps({"version": "v2.0", "data": [article]}))
    who, why = read_questions(path)
    assert who.answers == ["Jane"] and who.positives[0][:2] == ("Emma", "Jane wrote it.")
    assert why.answers == [] == why.positives
    samples, skipped = reranker_samples([who, why], make_encoder())
    assert not samples and skipped == {"no negative passage": 1, "no positive passage": 1}


def squad(context, question, answer) -> str:
    qas = [{"id": "1", "question": question, "answers": [{"text": answer}]}]
    article = {"title": "Emma", "paragraphs": [{"context": context, "qas": qas}]}
    return json.dumps({"data": [article]})


ASKED = '{"question": "q", "answers": ["a"]'
NO_NUMBER = "a.json:1: ctxs: a score is not a finite number"
NO_ANSWER = "a.json:1: needs a list of texts under the key answers"
NO_QA = "a.json:1: 'Emma', paragraph 0: a question or an answer is empty"


@pytest.mark.parametrize(
    "text, message",
    [
        (f"[\n{ASKED}}},\n\n{ASKED}\n]", "a.json:4: not a record of JSON"),
        (f"[\n{ASKED}}}\n{ASKED}}}\n]", "a.json:2: no comma"),
        (f"[{ASKED}}}", "a.json:1: no comma and no bracket"),
        (f"[{ASKED}}}]\nx", "a.json: more text behind the array"),
        (f"[{ASKED}}},\n3]", "a.json:2: a JSON object is expected"),
        ("[]", "holds no questions"),
        ('{"answers": ["a"]}', "a.json:1: needs a text under the key question"),
        ('{"question": "q", "answers": []}', NO_ANSWER),
        ('{"question": "q", "answers": ["a", 3]}', NO_ANSWER),
        (ASKED + ', "ctxs": 3}', "a.json:1: ctxs must be a list"),
        (ASKED + ', "ctxs": ["a"]}', "a.json:1: ctxs: a passage must be a JSON object"),
        (
            ASKED + ', "ctxs": [{"id": "1", "text": " "}]}',
            "a.json:1: ctxs: the passage '1' is empty",
        ),
        (ASKED + ', "ctxs": [{"text": "a", "score": "b"}]}', NO_NUMBER),
        (ASKED + ', "ctxs": [{"text": "a", "score": "nan"}]}', NO_NUMBER),
        (ASKED + ', "positives": 5}', "a.json:1: positives must be a list of ids"),
        ('[{"question": "q\\ud800", "answers": ["a"]}]', "a.json:1: not a record of JSON"),
        (squad("", "who", "Jane"), r"a.json:1: 'Emma', paragraph 0: the context is empty"),
        (squad("It is.", " ", "Jane"), NO_QA),
        (squad("It is.", "who", ""), NO_QA),
        ('{"data": [{"title": "a"}]}', "a.json:1: not a SQuAD file"),
    ],
)
def test_bad_questions_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "a.json", text))


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_key_without_a_value_is_absent_at_every_depth(tmp_path, name):
    found = {"id": "1", "title": None, "text": None, "score": None}
    record = {"question": "who wrote it", "answers": None, "answer": ["Jane"], "positives": None}
    record |= {"positive_ctxs": [{"title": None, "text": "By Jane.", "passage_id": None}]}
    record |= {"negative_ctxs": None, "ctxs": [found]}
    text = json.dumps([record] if name.endswith("json") else record)
    (question,) = read_questions(write(tmp_path / name, text), BOOK)
    assert (question.answers, question.scores) == (["Jane"], [0.0])
    assert question.positives == [Passage("", "By Jane.", "")] and question.found == BOOK[:1]


def test_records_of_an_array_know_their_lines(tmp_path):
    path = write(tmp_path / "a.json", '\ufeff[\n {"a": 1}, {"b":\n 2},\n\n{"c": 3}]\n')
    assert list(json_records(path)) == [
        ("a.json:2", {"a": 1}),
        ("a.json:2 record 2", {"b": 2}),
        ("a.json:5", {"c": 3}),
    ]


# Positives and negatives


def found(count, right, title="t"):
    """`count` passages; those at the places `right` hold the answer x."""
    return [Passage(title, f"w{i} x" if i in right else f"w{i}", str(i)) for i in range(count)]


def test_positives_and_negatives_are_chosen_as_dpr_does():
    asked = Question("q", ["x"])
    positives, negatives = choose_passages(with_found(asked, found(300, range(5, 35)), rank(300)))
    assert [p.id for p in positives] == [str(i) for i in range(5, 25)]  # the first 20
    assert [p.id for p in negatives] == [*map(str, range(5)), *map(str, range(35, 180))]  # 150
    positives, negatives = choose_passages(with_found(asked, found(300, [3]), rank(300)))
    assert [p.id for p in positives] == ["3"] and len(negatives) == 50
    positives, _ = choose_passages(with_found(asked, found(300, [250]), rank(300)))
    assert not positives  # beyond the first 200
    gold = Question("q", ["x"], [Passage("GOLD", "x")])
    book = [*found(260, range(5)), *found(30, range(25), "Gold")]
    positives, _ = choose_passages(with_found(gold, book, rank(290)))
    assert len(positives) == 25 and {p.title for p in positives} == {"Gold"}  # of the gold page
    positives, _ = choose_passages(with_found(gold, book[:260], rank(260)))
    assert len(positives) == 5  # none is of the gold page
    untitled = Question("q", ["x"], [Passage("", "x")])
    positives, _ = choose_passages(with_found(untitled, found(60, range(30), ""), rank(60)))
    assert len(positives) == 20  # no title is no page
    titled = with_found(asked, [Passage("x", "w"), Passage("w", "x")], rank(2))
    assert answer_hits(titled) == [False, True]  # a title is not searched for answers


def rank(count):
    return [(row, 1.0 - row) for row in range(count)]


def test_the_re_ranker_sorts_what_was_found():
    encoder, asked = make_encoder(), Question("q", ["x"])
    lists = found(9, [4]), found(3, [0])
    questions = [with_found(asked, some, rank(len(some))) for some in lists]
    best, other = rerank_found(cut_found(questions, 6), encoder)
    scores = encoder.score("q", questions[0].found[:6])
    assert best.scores == sorted(scores.tolist(), reverse=True) and len(other.found) == 3
    order = scores.argsort(descending=True, stable=True)
    assert best.found == [questions[0].found[i] for i in order]


def test_the_reader_reads_the_passages_and_then_the_question():
    assert reader_text("who", BOOK[::2]) == "Emma: Emma is a novel.\nGlory, it is said\nQ: who?\nA:"


def test_the_open_book_of_the_world_is_searched(tmp_path):
    records, book = genres.library(world.make(0))
    path = write(tmp_path / "passages.jsonl", "\n".join(map(json.dumps, records)))
    passages = read_passages(path)
    lines = "\n".join(map(json.dumps, book["test"]))
    questions = read_questions(write(tmp_path / "test.jsonl", lines), passages)
    bm25 = BM25(passages)
    questions = [with_found(q, passages, bm25.search(q.question, 20)) for q in questions]
    assert all(answer_hits(Question("", q.answers, found=q.positives)) for q in questions)
    recall = [recall_at([answer_hits(q) for q in questions], k) for k in (1, 20)]
    assert recall[0] < 0.6 < 0.8 < recall[1]
