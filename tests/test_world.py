"""The world: the same bytes from the same seed, every fact told, and no second hop leaked."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

import genres
import world as world_module
from world import (
    RELATIONS,
    SPLITS,
    TRAIN_WORDINGS,
    TWO_HOP,
    main,
    make,
    read_relations,
    read_sections,
    render,
)

OTHER_PRONOUNS = {
    "she": {"he", "him", "his"},
    "he": {"she", "her"},
    "it": {"he", "him", "his", "she", "her"},
}


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture(scope="module")
def documents(world):
    return list(genres.documents(world, 20000))


@pytest.fixture(scope="module")
def articles(documents):
    return [document for document in documents if document["genre"] == "article"]


@pytest.fixture(scope="module")
def qa_documents(documents):
    return [document for document in documents if document["genre"] == "qa"]


def contains(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_writes_the_same_bytes_in_every_process(tmp_path):
    options = ["--people", "60", "--documents", "500"]
    for name in ("0", "12345"):
        subprocess.run(
            [sys.executable, world_module.__file__, "--out", tmp_path / name, *options],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": name},
            cwd=tmp_path,
        )
    first, second = (
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).iterdir()
        }
        for name in ("0", "12345")
    )
    assert first == second
    assert first.keys() == {"corpus.jsonl", "facts.jsonl", "world.json"} | {
        f"questions-{split}.jsonl" for split in SPLITS
    }
    assert {path.name for path in tmp_path.iterdir()} == {"0", "12345"}  # no temporary folder


def test_another_seed_gives_another_world_of_the_same_sizes(world):
    other = make(seed=2)
    assert world.hash() == make().hash() != other.hash()
    assert len(set(world.people) & set(other.people)) < 10
    for group in ("people", "cities", "companies", "countries"):
        assert len(getattr(world, group)) == len(getattr(other, group))
    for split in SPLITS:
        assert len(world.questions(split)) == len(other.questions(split))


def test_the_embedded_lm_has_read_this_world(world):
    """After a change of the world: pretrain the LM again, then write the new hash there."""
    assert f"hash {world.hash()[:16]} " in world_module.__doc__


def test_documents_depend_on_their_seed_and_a_larger_count_continues(world):
    few, many = list(genres.documents(world, 50)), list(genres.documents(world, 200))
    assert few == many[:50] != list(genres.documents(world, 50, seed=2))


def test_names_are_unique_and_share_parts(world):
    others = [
        facts[relation]
        for facts in world.facts.values()
        for relation in ("river", "mayor", "founder")
        if relation in facts
    ]
    names = world.people + world.cities + world.companies + world.countries + others
    assert len(names) == len(set(names))
    for part in (0, 1):
        count = collections.Counter(name.split()[part] for name in world.people)
        assert sum(n for n in count.values() if n > 1) > 0.9 * len(world.people)
    surnames = {name.split()[-1] for name in world.people}
    assert any(name.split()[0] in surnames for name in world.companies)
    assert any(name.split()[-1] in surnames for name in world.cities)


def test_splits_are_disjoint_and_each_has_known_and_unknown_people(world):
    train, dev, test = ({row["subject"] for row in world.questions(split)} for split in SPLITS)
    assert (len(train), len(dev), len(test)) == (180, 45, 75)
    assert not train & dev and not train & test and not dev & test
    for start in range(0, len(world.people), 20):
        count = collections.Counter(world.split[name] for name in world.people[start : start + 20])
        assert count == {"train": 12, "dev": 3, "test": 5}


def test_no_qa_document_names_a_dev_or_test_person(world, qa_documents):
    held_out = {person for person in world.people if world.split[person] != "train"}
    two_words = re.compile(r"(?=([A-Z][a-z]+ [A-Z][a-z]+))")
    for document in qa_documents:
        text = f"{document['question']} {document['answer'][0]}"
        assert not held_out & set(two_words.findall(text)), text


def test_qa_documents_ask_for_one_fact_and_answer_it(world, documents, qa_documents):
    known = {
        render(question, subject): obj
        for subject, facts in world.facts.items()
        for relation, obj in facts.items()
        for question in RELATIONS[world.kind[subject]][relation][1]
    }
    rows = [row for split in SPLITS for row in world.questions(split)]
    two_hop = {row["question"] for row in rows if row["hops"] == 2}
    for document in qa_documents:
        assert document["answer"] == [known[document["question"]]]
        assert document["question"] not in two_hop
    assert 0.38 < len(qa_documents) / len(documents) < 0.42


def test_no_article_about_a_person_contains_a_second_hop(world, articles):
    paths = [path for path in TWO_HOP if path != "teacher.profession"]  # a pupil may share that one
    for article in articles:
        if world.kind[article["title"]] == "person":
            for path in paths:
                assert not contains(article["text"], world.answer(article["title"], path)), path


def test_articles_about_places_name_no_person_and_join_nothing(world, articles):
    people = re.compile("|".join(map(re.escape, world.people)))
    for article in articles:
        title, text = article["title"], article["text"]
        if world.kind[title] != "person":
            assert not people.search(text), article
        if world.kind[title] == "company":
            city = world.facts[world.facts[title]["headquarters"]]
            assert not any(contains(text, obj) for obj in city.values()), article


def test_every_fact_is_told_and_facts_of_places_and_known_people_more_often(world, articles):
    told = collections.Counter()
    for article in articles:
        assert contains(article["text"], article["title"])
        for relation, obj in world.facts[article["title"]].items():
            told[article["title"], relation] += obj.lower() in article["text"].lower()
    counts = collections.defaultdict(list)
    for subject, facts in world.facts.items():
        counts[world.kind[subject]] += [told[subject, relation] for relation in facts]
    mean = {kind: sum(n) / len(n) for kind, n in counts.items()}
    assert min(counts["person"]) >= 3
    assert min(mean["city"], mean["company"]) > 2 * mean["person"]
    best_known = sum(told[person, "born_in"] for person in world.people[:20])
    assert best_known > 2 * sum(told[person, "born_in"] for person in world.people[200:220])


def test_answers_are_found_by_walking_the_written_facts(world, tmp_path):
    world.write(tmp_path / "w", documents=10)
    rows = rows_of(tmp_path / "w" / "facts.jsonl")
    facts = {(row["subject"], row["relation"]): row["object"] for row in rows}
    assert len(facts) == len(rows)
    for split in SPLITS:
        for row in rows_of(tmp_path / "w" / f"questions-{split}.jsonl"):
            answer = row["subject"]
            for relation in row["relation"].split("."):
                answer = facts[answer, relation]
            assert row["answer"] == [answer] and row["hops"] == 1 + row["relation"].count(".")
            assert len(answer.split()) <= 3 and not contains(row["question"], answer)
            assert row["question"].endswith("?") and row["subject"] in row["question"]


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_unique_and_half_of_them_have_two_hops(world, split):
    rows = world.questions(split)
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert sum(row["hops"] == 2 for row in rows) * 2 == len(rows)
    per_fact = collections.Counter((row["subject"], row["relation"]) for row in rows)
    assert set(per_fact.values()) == {TRAIN_WORDINGS if split == "train" else 1}


@pytest.mark.parametrize("split, limit", [("dev", 0.16), ("test", 0.12)])
def test_the_most_frequent_answer_is_a_poor_guess(world, split, limit):
    answers = collections.defaultdict(collections.Counter)
    for row in world.questions(split):
        answers[row["relation"]][row["answer"][0]] += 1
    for relation, count in answers.items():
        assert max(count.values()) / sum(count.values()) <= limit, relation


def test_each_relation_has_many_wordings_and_no_question_fits_two():
    every_question = [question for questions in TWO_HOP.values() for question in questions]
    for kind, table in RELATIONS.items():
        for relation, (statements, questions) in table.items():
            assert len(statements) >= (10 if kind == "person" else 8), relation
            assert len(questions) >= 6, relation
            assert all(re.search(r"\{(o|O|an_o)\}.*\.$", text) for text in statements), relation
            every_question += questions
    assert len(every_question) == len(set(every_question))
    assert all(question.endswith("?") for question in every_question)
    assert all(len(questions) >= 4 for questions in TWO_HOP.values())


def test_wordings_are_filled_in_grammatically(documents):
    assert render("{S} is {an_o}.", "Anna Teller", "engineer", "she") == "She is an engineer."
    assert render("Who was {his} founder?", "Teller Works") == "Who was Teller Works' founder?"
    wording = "{His} job pays {him}; {name} likes {his} job."
    assert render(wording, "Max Low", "", "he") == "His job pays him; Max Low likes his job."
    wrong = re.compile(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}|]|  |s's")
    for document in documents:
        text = document.get("text") or document["question"]
        assert not wrong.search(text) and text[0].isupper(), text


def test_pronouns_agree_with_the_subject(world, articles):
    for article in articles:
        words = set(re.findall(r"[a-z]+", article["text"].lower()))
        assert not words & OTHER_PRONOUNS[world.pronoun[article["title"]]], article


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("first\n[a]\nx", 1, "a line before the first [section]"),
        ("# note\n\n[a\nx", 3, "a section is written [name]"),
        ("[]\nx", 1, "a section is written [name]"),
        ("[a]\nx\n[a]\ny", 3, "the section [a] stands above already"),
        ("[a]\nx\ny\nx", 4, "this line stands twice in the section [a]"),
        ("[a]\nthe {city}", 2, "unknown field {city}"),
        ("[a]\nthe {s", 2, "expected '}'"),
        ("[a]\nx\n[b]\n# y\n[c]\nz", 3, "the section [b] is empty"),
    ],
)
def test_a_malformed_wording_is_refused_with_file_and_line(tmp_path, text, line, message):
    path = tmp_path / "wordings.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"wordings.txt:{line}: {message}")):
        read_sections(path, {"s"})


def test_a_relation_without_a_kind_is_refused(tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_text("[born_in]\n{S} was born in {o}.\n")
    with pytest.raises(ValueError, match=r"wordings.txt: the section \[born_in\] is not named"):
        read_relations(path)


def test_sections_keep_their_order_and_skip_comments(tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_text("# note\n\n[b.x]\n  {s} is here. \n\n# note\nWhere is {s}?\n[a]\nword\n")
    sections = read_sections(path, {"s"})
    assert list(sections.items()) == [("b.x", ["{s} is here.", "Where is {s}?"]), ("a", ["word"])]


def test_bad_arguments_are_refused_and_nothing_is_touched(world, tmp_path, capsys):
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for argv, message in (
        (["--out", str(full)], "exists and is not empty"),
        (["--people", "3"], "people: 3 is not between"),
        (["--people", "60", "--final"], "--people: the final world has its own sizes"),
        (["--out", str(tmp_path / "new"), "--documents", "0"], "documents: 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    empty.mkdir()
    world.write(empty, documents=10)  # an empty folder is accepted
    assert len(rows_of(empty / "corpus.jsonl")) == 10


@pytest.mark.parametrize(
    "sizes",
    [dict(people=20), dict(people=21, cities=4, companies=4, countries=2), dict(people=1500)],
)
def test_worlds_of_other_sizes_have_teachers_of_the_same_split(sizes):
    world = make(seed=3, **sizes)
    assert len(world.people) == sizes["people"] and all(map(world.questions, SPLITS))
    for person in world.people:
        teacher = world.facts[person]["teacher"]
        assert teacher != person and world.split[teacher] == world.split[person]
