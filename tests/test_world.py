"""The miniature world: determinism, splits, and above all that the corpus tells every fact and leaks no second hop."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import world as world_module
from world import RELATIONS, SPLITS, TRAIN_WORDINGS, TWO_HOP, main, make, render

FILE = Path(world_module.__file__)


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture(scope="module")
def documents(world):
    return list(world.documents(20000))


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
    }


def contains(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def test_same_bytes_in_processes_with_different_hash_seeds(tmp_path):
    for name in ("0", "12345"):
        subprocess.run(
            [
                sys.executable,
                FILE,
                "--out",
                tmp_path / name,
                "--people",
                "60",
                "--documents",
                "500",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": name},
            cwd=tmp_path,
        )
    assert digests(tmp_path / "0") == digests(tmp_path / "12345")
    assert sorted(digests(tmp_path / "0")) == [
        "corpus.jsonl",
        "facts.jsonl",
        "questions-dev.jsonl",
        "questions-test.jsonl",
        "questions-train.jsonl",
        "world.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0",
        "12345",
    ]  # no temporary folder is left


def test_another_seed_is_another_world_of_the_same_sizes(world):
    other = make(seed=2)
    assert world.hash() == make().hash() != other.hash()
    for group in ("people", "cities", "companies", "countries"):
        assert len(getattr(world, group)) == len(getattr(other, group))
    assert len(set(world.people) & set(other.people)) < 10
    assert [len(world.questions(split)) for split in SPLITS] == [
        len(other.questions(split)) for split in SPLITS
    ]


def test_this_is_the_world_that_the_embedded_lm_has_read(world):
    """A changed wording or fact makes the pretrained LM a stranger here: pretrain anew, then write the new hash into the docstring."""
    assert f"hash {world.hash()[:16]} " in world_module.__doc__


def test_documents_depend_on_their_seed_and_a_larger_count_continues(world):
    assert (
        list(world.documents(50))
        == list(world.documents(200))[:50]
        != list(world.documents(50, seed=2))
    )


def test_names_are_unique_and_share_parts(world):
    answers = [
        obj
        for facts in world.facts.values()
        for relation, obj in facts.items()
        if relation in ("river", "mayor", "founder")
    ]
    names = world.people + world.cities + world.companies + world.countries + answers
    assert len(names) == len(set(names))
    for part in (0, 1):
        count = collections.Counter(name.split()[part] for name in world.people)
        assert sum(n for n in count.values() if n > 1) > 0.9 * len(world.people)
    surnames = {name.split()[-1] for name in world.people}
    assert any(name.split()[0] in surnames for name in world.companies) and any(
        name.split()[-1] in surnames for name in world.cities
    )


def test_splits_are_disjoint_and_balanced_over_popularity(world):
    subjects = {split: {row["subject"] for row in world.questions(split)} for split in SPLITS}
    assert [len(subjects[split]) for split in SPLITS] == [180, 45, 75]
    assert (
        not subjects["train"] & subjects["dev"]
        and not (subjects["train"] | subjects["dev"]) & subjects["test"]
    )
    for start in range(0, len(world.people), 20):
        assert collections.Counter(
            world.split[person] for person in world.people[start : start + 20]
        ) == {"train": 12, "dev": 3, "test": 5}


def test_no_qa_document_names_a_dev_or_test_person(world, documents):
    held_out = {person for person in world.people if world.split[person] != "train"}
    first_last = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")
    for document in documents:
        if document["genre"] == "qa":
            text = document["question"] + " " + " ".join(document["answer"])
            assert not held_out & {
                name
                for start in range(len(text))
                if (m := first_last.match(text, start))
                for name in [m.group()]
            }, text


def test_qa_documents_are_one_hop_and_true(world, documents):
    known = {
        render(ask, subject): obj
        for subject, facts in world.facts.items()
        for relation, obj in facts.items()
        for ask in RELATIONS[world.kind[subject]][relation][1]
    }
    qa = [document for document in documents if document["genre"] == "qa"]
    assert all(document["answer"] == [known[document["question"]]] for document in qa)
    assert 0.38 < len(qa) / len(documents) < 0.42
    two_hop = {
        row["question"] for split in SPLITS for row in world.questions(split) if row["hops"] == 2
    }
    assert not two_hop & {document["question"] for document in qa}


def test_articles_about_people_never_contain_the_second_hop(world, documents):
    paths = [
        path for path in TWO_HOP if path != "teacher.profession"
    ]  # a pupil may have the teacher's profession
    for document in documents:
        if document["genre"] == "article" and world.kind[document["title"]] == "person":
            for path in paths:
                assert not contains(document["text"], world.answer(document["title"], path)), (
                    path,
                    document,
                )


def test_articles_about_places_name_no_person_and_join_nothing(world, documents):
    people = re.compile("|".join(map(re.escape, world.people)))
    for document in documents:
        if document["genre"] == "article" and world.kind[document["title"]] != "person":
            assert not people.search(document["text"]), document
            if world.kind[document["title"]] == "company":
                home = world.facts[world.facts[document["title"]]["headquarters"]]
                assert not any(contains(document["text"], home[relation]) for relation in home), (
                    document
                )


def test_every_fact_is_told_often_enough_and_places_more_often(world, documents):
    told = collections.Counter()
    for document in documents:
        if document["genre"] == "article":
            text = document["text"].lower()
            assert contains(document["text"], document["title"])
            told.update(
                (document["title"], relation)
                for relation, obj in world.facts[document["title"]].items()
                if obj.lower() in text
            )
    counts = {
        kind: [
            told[subject, relation]
            for subject, facts in world.facts.items()
            if world.kind[subject] == kind
            for relation in facts
        ]
        for kind in RELATIONS
    }
    mean = {kind: sum(n) / len(n) for kind, n in counts.items()}
    assert min(counts["person"]) >= 3, min(counts["person"])
    assert min(mean["city"], mean["company"]) > 2 * mean["person"]
    best, middle = (
        sum(told[person, "born_in"] for person in people)
        for people in (world.people[:20], world.people[200:220])
    )
    assert best > 2 * middle  # the long tail


def test_answers_are_found_by_walking_the_facts_as_written(world, tmp_path):
    world.write(tmp_path / "w", documents=10)
    facts = {}
    for line in (tmp_path / "w" / "facts.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["subject"], row["relation"]) not in facts
        facts[row["subject"], row["relation"]] = row["object"]
    for split in SPLITS:
        rows = [
            json.loads(line)
            for line in (tmp_path / "w" / f"questions-{split}.jsonl").read_text().splitlines()
        ]
        for row in rows:
            place = row["subject"]
            for relation in row["relation"].split("."):
                place = facts[place, relation]
            assert row["answer"] == [place] and row["hops"] == 1 + row["relation"].count(".")
            assert len(place.split()) <= 3 and not contains(row["question"], place)
            assert row["question"].endswith("?") and row["subject"] in row["question"]


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_unique_and_half_of_them_have_two_hops(world, split):
    rows = world.questions(split)
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert sum(row["hops"] == 2 for row in rows) * 2 == len(rows)
    per_fact = collections.Counter((row["subject"], row["relation"]) for row in rows)
    assert set(per_fact.values()) == {TRAIN_WORDINGS if split == "train" else 1}


def test_the_most_frequent_answer_is_a_poor_guess(world):
    for split, limit in (("dev", 0.16), ("test", 0.12)):
        answers = collections.defaultdict(collections.Counter)
        for row in world.questions(split):
            answers[row["relation"]][row["answer"][0]] += 1
        for relation, count in answers.items():
            assert max(count.values()) / sum(count.values()) <= limit, (split, relation)


def test_wordings_are_many_distinct_and_grammatical(world, documents):
    asked = [ask for table in RELATIONS.values() for _, asks in table.values() for ask in asks] + [
        ask for asks in TWO_HOP.values() for ask in asks
    ]
    assert len(asked) == len(set(asked)) and all(
        ask.endswith("?") for ask in asked
    )  # no wording fits two relations
    for kind, table in RELATIONS.items():
        for relation, (statements, asks) in table.items():
            assert (
                len(set(statements)) == len(statements) >= (10 if kind == "person" else 8)
                and len(asks) >= 6
            ), relation
            assert all(
                text.endswith(".") and "{o}" in text.lower().replace("an_o", "o")
                for text in statements
            ), relation
    assert all(len(asks) >= 4 for asks in TWO_HOP.values())
    assert render("{S} is {an_o}.", "Anna Teller", "engineer", "she") == "She is an engineer."
    assert (
        render("{His} job pays {him}; {name} likes {his} job.", "Max Low", "", "he")
        == "His job pays him; Max Low likes his job."
    )
    assert render("Who was {his} founder?", "Teller Works") == "Who was Teller Works' founder?"
    for document in documents:
        text = document.get("text") or document["question"]
        assert (
            not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}|]|  |s's", text)
            and text[0].isupper()
        ), text


def test_pronouns_agree_with_the_person(world, documents):
    for document in documents:
        if document["genre"] == "article":
            words = set(re.findall(r"[a-z]+", document["text"].lower()))
            wrong = {
                "she": {"he", "him", "his"},
                "he": {"she", "her"},
                "it": {"he", "him", "his", "she", "her"},
            }[world.pronoun[document["title"]]]
            assert not words & wrong, document


def test_full_folder_is_refused_and_left_alone(world, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for argv, message in (
        (["--out", str(tmp_path / "full")], "exists and is not empty"),
        (["--people", "3"], "people: 3 is not between"),
        (["--out", str(tmp_path / "new"), "--documents", "0"], "documents: 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    world.write(tmp_path / "empty", documents=10)  # an empty folder is fine
    assert len((tmp_path / "empty" / "corpus.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "sizes",
    [dict(people=20), dict(people=21, cities=4, companies=4, countries=2), dict(people=1500)],
)
def test_other_sizes(sizes):
    world = make(seed=3, **sizes)
    assert len(world.people) == sizes["people"] and all(world.questions(split) for split in SPLITS)
    assert all(
        world.split[facts["teacher"]] == world.split[person] and facts["teacher"] != person
        for person, facts in world.facts.items()
        if world.kind[person] == "person"
    )
