"""The world: the same bytes from the same seed, true answers, and splits that share no one."""

import collections
import json
import os
import random
import re
import string
import subprocess
import sys

import pytest

import data
import genres
import suite
import world as world_module
from world import (
    RELATIONS,
    SPLITS,
    TRAIN_WORDINGS,
    TWO_HOP,
    make,
    read_relations,
    read_sections,
    render,
    write_folder,
)


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture(scope="module")
def hash_(world):
    return world.hash()


FEW = """
import suite, sys, world
rows = suite.rows
suite.rows = lambda place, name, split: rows(place, name, split, 4)
world.main(["--out", sys.argv[1], "--documents", "50", "--people", "60"])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The empty folder that the command filled, in a process with another order of sets."""
    folder = tmp_path_factory.mktemp("place") / "w"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", FEW, folder],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        cwd=os.path.dirname(world_module.__file__),
    )
    return folder


def contains(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_the_same_world_in_another_process(written, monkeypatch):
    small, all_rows = make(people=60), suite.rows
    monkeypatch.setattr(suite, "rows", lambda *task: all_rows(*task, 4))
    (info,) = rows_of(written / "world.json")
    assert info["hash"] == small.hash() and info["facts"] == len(small.triples())
    assert rows_of(written / "facts.jsonl") == small.triples()
    for split in SPLITS:
        assert rows_of(written / f"questions-{split}.jsonl") == small.questions(split)
    assert rows_of(written / "corpus.jsonl") == list(genres.documents(small, 50))
    task = rows_of(written / "suite" / "triple_to_text-train.jsonl")
    assert task == suite.rows(small, "triple_to_text", "train")


def test_the_command_writes_every_file_and_leaves_no_temporary_folder(written):
    names = {"world.json", "facts.jsonl", "corpus.jsonl", "held-out.jsonl", "passages.jsonl"}
    names |= {f"{kind}-{split}.jsonl" for kind in ("questions", "open-book") for split in SPLITS}
    names |= {f"suite/{task}-{split}.jsonl" for task in suite.TASKS for split in SPLITS}
    files = (path for path in written.rglob("*") if path.is_file())
    assert {str(path.relative_to(written)) for path in files} == names
    assert [path.name for path in written.parent.iterdir()] == ["w"]
    corpus, held_out = (
        list(data.read_texts(written / f"{k}.jsonl")) for k in ("corpus", "held-out")
    )
    assert len(corpus) == 50 and len(held_out) == 2000 and corpus != held_out[:50]
    for name in ("questions-dev", "open-book-dev", "suite/gist-dev"):
        assert data.read(written / f"{name}.jsonl")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def rows():
        yield {"text": "a"}
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_folder(tmp_path / "new" / "w", {"a.jsonl": [{}], "b.jsonl": rows()})
    assert not list((tmp_path / "new").iterdir())


def test_the_embedded_lm_has_read_this_world(hash_):
    """After a change of the world: pretrain the LM again, then write the new hash there."""
    assert f"hash {hash_[:16]} " in world_module.__doc__


def test_another_seed_gives_another_world_of_the_same_sizes(world, hash_):
    other = make(seed=2)
    assert hash_ != other.hash()
    assert len(set(world.people) & set(other.people)) < 10
    for group in ("people", "cities", "companies", "countries"):
        assert len(getattr(world, group)) == len(getattr(other, group))
    for split in SPLITS:
        rows = (w.questions(split) for w in (world, other))
        tasks, others = (collections.Counter(row["task"] for row in r) for r in rows)
        assert tasks == others


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
    assert (len(train), len(dev), len(test)) == (384, 96, 160)
    assert not train & dev and not train & test and not dev & test
    for start in range(0, len(world.people), 20):
        count = collections.Counter(world.split[name] for name in world.people[start : start + 20])
        assert count == {"train": 12, "dev": 3, "test": 5}


def test_answers_are_found_by_walking_the_written_facts(written):
    rows = rows_of(written / "facts.jsonl")
    facts = {(row["subject"], row["relation"]): row["object"] for row in rows}
    assert len(facts) == len(rows)
    for split in SPLITS:
        for row in rows_of(written / f"questions-{split}.jsonl"):
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


def test_each_split_has_enough_two_hop_questions_and_person_bridges_apart(world):
    for split in ("dev", "test"):
        tasks = collections.Counter(row["task"] for row in world.questions(split))
        assert tasks["two-hop"] >= 500 and tasks["one-hop"] >= 500, split
        assert tasks["two-hop-person"] == sum(s == split for s in world.split.values())
    rows = [row for row in world.questions("test") if row["task"] == "two-hop-person"]
    assert {row["relation"] for row in rows} == {"teacher.profession"}


@pytest.mark.parametrize("split, limit", [("dev", 0.13), ("test", 0.1)])
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


def test_wordings_are_filled_in_grammatically():
    assert render("{S} is {an_o}.", "Anna Teller", "engineer", "she") == "She is an engineer."
    assert render("Who was {his} founder?", "Teller Works") == "Who was Teller Works' founder?"
    wording = "{His} job pays {him}; {name} likes {his} job."
    assert render(wording, "Max Low", "", "he") == "His job pays him; Max Low likes his job."


SUBJECT = {"name", "S", "s", "him", "His", "his"}
SCENE = {"a", "b", "x", "y", "X", "Y", "p", "day", "season", "food", "ware", "city", "company"}
SCENE |= {"person", "a_worker", "o", "an_o", "claim", "first", "second"}
FIELDS = {  # what a wording may be filled with
    "relations": SUBJECT | {"o", "O", "an_o"},
    "two_hop": SUBJECT,
    "words": set(),
    "genres": SUBJECT | SCENE | {relation for kind in RELATIONS.values() for relation in kind},
    "templates": set(
        """text first second premise hypothesis record subject relation object question passage
    passages options deed thing word""".split()
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_wording_is_well_formed_and_stands_once(name):
    path = world_module.ASSETS / f"{name}.txt"
    names = re.findall(r"^\[(.+)\]$", path.read_text(), re.MULTILINE)
    sections = read_sections(path)
    assert list(sections) == names and all(sections.values())
    for lines in sections.values():
        assert len(set(lines)) == len(lines)
        for line in lines:
            fields = {field for _, field, _, _ in string.Formatter().parse(line)} - {None}
            assert fields <= FIELDS[name], line


def test_a_relation_without_a_kind_is_refused(tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_text("[born_in]\n{S} was born in {o}.\n")
    with pytest.raises(ValueError, match=r"wordings.txt: the section \[born_in\] is not named"):
        read_relations(path)


def test_sections_keep_their_order_and_skip_comments(tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_text("# note\n\n[b.x]\n  {s} is here. \n\n# note\nWhere is {s}?\n[a]\nword\n")
    sections = read_sections(path)
    assert list(sections.items()) == [("b.x", ["{s} is here.", "Where is {s}?"]), ("a", ["word"])]


@pytest.mark.parametrize(
    "sizes",
    [dict(people=20), dict(people=21, cities=4, companies=4), dict(people=1500)],
)
def test_worlds_of_other_sizes_have_teachers_of_the_same_split(sizes):
    world = make(seed=3, **sizes)
    assert len(world.people) == sizes["people"] and all(map(world.questions, SPLITS))
    for person in world.people:
        teacher = world.facts[person]["teacher"]
        assert teacher != person and world.split[teacher] == world.split[person]


def test_samples_that_nobody_can_read_are_one_line_and_status_2():
    with open("/dev/full", "w") as full:
        command = [sys.executable, world_module.__file__]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("world.py: standard output")


@pytest.mark.parametrize("people", ["20", "40", "99"])
def test_the_command_ends_for_a_small_world(capsys, people):
    assert len(world_module.main(["--people", people]).people) == int(people)
    assert capsys.readouterr().out.startswith(f"{people} people")


def test_the_default_of_the_cities_suits_every_number_of_people():
    assert len(make(people=20_000).cities) == 2000


@pytest.mark.parametrize("size", ["cities", "companies"])
def test_more_names_than_there_are_is_an_error(size):
    with pytest.raises(ValueError, match="people: the parts of the names of 20 people"):
        make(people=20, **{size: 2000})


def test_whatever_is_drawn_until_it_is_new_ends(world, monkeypatch):
    rng = random.Random(1)
    with pytest.raises(ValueError, match="companies: none of the 2 can be drawn"):
        world_module.draw_other(rng, ["a", "b"], {"a", "b", "c"}, "companies")
    assert {world_module.draw_other(rng, list("abc"), {"b"}, "") for _ in range(99)} == {"a", "c"}
    with pytest.raises(ValueError, match="nothing can be drawn"):
        next(world_module.deck(rng, []))
    person = world.people[0]
    with pytest.raises(ValueError, match=f"{person}: 8 relations are asked for, and there are 7"):
        list(genres.Cast(world, rng).next_relations(person, 8))
    monkeypatch.setattr(genres, "make", lambda *_, **__: world)
    with pytest.raises(ValueError, match="reading: all names of strangers are in use"):
        next(genres.strangers(world, "reading", rng))
