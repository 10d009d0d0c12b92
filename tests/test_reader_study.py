"""The study of the frozen reader: what is shared, what waits for what, what is reported."""

import argparse
import json
import re

import pytest
from tiny_runs import make_shelf, small_world

import cost
import openbook
import reader_study
import reproduce
import train
from checkpoints import write_lines
from passages import read_passages, read_questions
from reader_study import GROUPS, ORDERINGS, SEARCHED, ReaderStudy, reads, searched
from study import Row

KEPT = [
    searched("bm25-reranked", 2),
    searched("not-cross-fitted"),
    reads("larger-bm25-reranked", "bm25-reranked", reader_study.LARGER),
    reads("tuned-bm25-reranked", "bm25-reranked", reader_study.TUNED),
    reads("bm25-mixed", "bm25-mixed"),
    Row("closed-book", reader_study.CLOSED),
]


@pytest.fixture(scope="module")
def shelf(place):
    return make_shelf(place)


@pytest.fixture
def reproduces(shelf, tmp_path, monkeypatch):
    """reproduces(flags) -> (results, names of the runs that were made, in order)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openbook.genres, "library", lambda world: small_world())
    monkeypatch.setattr(reader_study, "GROUPS", {"rows": KEPT})
    made, original = [], train.main

    def counted(line):
        made.append(line[line.index("--out") + 1].split("/")[-1])
        return original(line)

    monkeypatch.setattr(train, "main", counted)

    def call(flags=""):
        made.clear()
        line = f"reader --model {shelf}/lm/model --encoder {shelf}/bert --context 96 --steps 1"
        line += f" --encoder-steps 1 --pretrained {tmp_path} {flags}"
        short = "--flags=--prompt-length 4 --max-new-tokens 4 --device cpu"
        return reproduce.main([*line.split(), short]), list(made)

    return call


def test_runs_share_passages_and_none_is_made_twice(reproduces, tmp_path):
    """An absent LM leaves its row out. Both seeds and the tuned LM read the same passages."""
    results, made = reproduces()
    own = ["bm25-reranked-0", "bm25-reranked-1", "not-cross-fitted-0", "tuned-bm25-reranked-0"]
    assert sorted(made) == sorted([*own, "closed-book-0", "bm25-mixed-0"])
    assert results["missing"] == {"larger-bm25-reranked-0": "what it starts from is missing"}
    records = {n: json.loads((tmp_path / "runs/reader" / n / "run.json").read_text()) for n in own}
    first, second, whole, tuned = (records[name] for name in own)
    assert "halves" in first["passages"] and "halves" not in whole["passages"]
    assert second["arguments"]["seed"] == 1 and tuned["arguments"]["tune"] == "lm"
    for other in (second, tuned):
        assert other["passages"]["train"]["retrieved"] == first["passages"]["train"]["re-ranked"]
        assert other["arguments"]["no_rerank"] and "cross-fitting" not in other["passages"]
    stored = json.loads((tmp_path / "results/reader-model-part.json").read_text())["results"]
    assert stored == results and len(stored["runs"]["bm25-reranked"]) == 2
    assert stored["runs"]["closed-book"][0]["results"] != {}
    assert stored["cross-fitting"]["held-out half"]["answer"].keys() == {"1", "5"}
    found = {row["claim"]: row["seeds"] for row in results["orderings"]}
    both = {"BM25: both scores > re-ranker's alone": [1, 2]}
    assert found == both | {"cross-fitted > not": [2, 1], "within 3 points of fine-tuning": [2, 1]}
    mixed, place = results["search"]["bm25-mixed"]["test"], tmp_path / "runs/reader/bm25-reranked-0"
    order = read_questions(place / "mixed/test.jsonl", read_passages(place / "passages.jsonl"))
    assert mixed["retrieved"] == openbook.recalls(order)
    (tmp_path / "lm2").symlink_to(first["arguments"]["model"])
    again, made = reproduces("--only larger")
    assert made == ["larger-bm25-reranked-0"] and again["missing"] == {}


def test_a_row_waits_for_the_passages_it_reads(reproduces, tmp_path):
    results, made = reproduces("--only tuned")
    assert made == [] and set(results["missing"].values()) == {"what it starts from is missing"}
    assert reproduces("--plan") == ({}, [])
    names = ["bm25-reranked-0", "bm25-reranked-1"]
    results, made = reproduces("--only bm25-reranked --minutes 0")
    assert made == [] and results["missing"][names[0]] == "no time"


def test_em_counts_by_the_place_of_the_first_answer(tmp_path):
    book = [{"id": "0", "text": "no"}, {"id": "1", "text": "yes"}]
    hits = {"a": [0, 1, 1], "b": [1, 0], "c": [0, 0, 0, 0, 0, 1], "d": [], "e": [0, 1]}
    rows = [
        {"id": q, "question": q, "answers": ["yes"], "ctxs": [{"id": h} for h in hits[q]]}
        for q in hits
    ]
    answers = [{"id": q, "task": "", "em": float(q in "ac")} for q in hits]
    run = tmp_path / "bm25-0"
    (run / "retrieved").mkdir(parents=True)
    write_lines(run / "retrieved/test.jsonl", rows)
    write_lines(run / "predictions.jsonl", answers)
    write_lines(run / "passages.jsonl", book)
    jobs = {"bm25": [argparse.Namespace(folder=run)]}
    study = argparse.Namespace(finished=lambda name: jobs.get(name, []))
    found = reader_study.show_places(study)["places"]
    assert found == {"bm25": [[0, 1], [50, 2], *[[None, 0]] * 3, [50, 2]]}


def test_passages_about_the_person_and_answers_that_stand_in_those_about_others(tmp_path):
    """Anna works at Acme and Boris at Bolt. Questions a to d are about Anna."""
    texts = {"p0": ("Anna", "works at Acme"), "p1": ("Anna", "likes tea"), "p2": ("Boris", "Bolt")}
    book = [{"id": key, "title": title, "text": text} for key, (title, text) in texts.items()]
    ranked = {"a": ["p2", "p0"], "b": ["p0", "p1"], "c": ["p2", "p0", "p1"], "d": ["p2", "p1"]}
    said = {"a": "Bolt", "b": "Acme", "c": "tea", "d": "Bolt"}  # only b is right
    rows = [
        {"id": q, "question": q, "answers": ["Acme"], "positives": ["p0"]}
        | {"ctxs": [{"id": p} for p in order]}
        for q, order in ranked.items()
    ]
    answers = [{"id": q, "task": "", "prediction": said[q], "em": float(q == "b")} for q in said]
    run = tmp_path / "bm25-0"
    (run / "retrieved").mkdir(parents=True)
    write_lines(run / "retrieved/test.jsonl", rows)
    write_lines(run / "predictions.jsonl", answers)
    write_lines(run / "passages.jsonl", book)
    study = argparse.Namespace(
        finished=lambda name: [argparse.Namespace(folder=run)] if name == "bm25" else []
    )
    # first: b; of 9 passages 6; wrong with the answer there: a and c, of which a is about Boris
    assert reader_study.show_titles(study)["titles"] == {"bm25": [25.0, 66.7, 2, 1]}


def whole_study(tmp_path, flags="") -> ReaderStudy:
    line = f"reader --pretrained assets --encoder-steps 400 --top 50 {flags}"
    return reader_study.make_study(reproduce.parser().parse_args(line.split()), tmp_path)


def test_every_row_is_a_command_and_every_name_is_one_row(tmp_path):
    study = whole_study(tmp_path, "--flags=--batch-size=7")
    assert len(study.rows) == sum(map(len, GROUPS.values()))
    assert {name for _, *pair in ORDERINGS for name in pair[:2]} <= study.rows.keys()
    for job in study.plan():
        run = train.parse(study.line(job))
        assert run.seed == job.seed and run.out == str(job.folder) and run.batch_size == 7
        assert run.steps == (400 if run.method == "retriever" else 300)
        first = job.seed == 0 and job.row.name in SEARCHED
        assert bool(run.passages) != (first or run.top == 0 or run.method == "retriever")
        assert (run.model == "assets/lm2") == ("larger" in job.row.name)
        assert run.context == (128 if "short" in job.row.name else 256)
        if run.passages:
            source = re.sub("^(larger-|short-)?(tuned-)?", "", job.row.name)
            orders = {"mixed": "mixed", "reranked": "ranked", "fitted": "ranked"}
            order = orders.get(source.split("-")[-1], "retrieved")
            run_of = source.replace("mixed", "reranked")
            assert run.passages == f"{tmp_path}/{run_of}-0/passages.jsonl"
            assert run.test == f"{tmp_path}/{run_of}-0/{order}/test.jsonl"


def test_costs_are_of_the_stages_that_a_run_has(tmp_path):
    study = whole_study(tmp_path)
    costs = {job.folder.name: cost.seconds(study, job) for job in study.plan()}
    rankers = 3 * 400 * 16 * 8 * cost.LEARN
    assert costs["bm25-reranked-0"] > costs["bm25-0"] + rankers
    assert costs["bm25-0"] < costs["not-cross-fitted-0"] < costs["bm25-reranked-0"] - rankers
    assert costs["bm25-0"] == costs["bm25-1"] == costs["bm25-reranked-1"]
    assert costs["larger-bm25-0"] > 2 * costs["bm25-0"] - cost.LOAD > 4 * costs["closed-book-0"]
