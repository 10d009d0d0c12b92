"""The prompted suite: enough tasks and templates, true answers, none revealed by a template."""

import collections
import json
import math
import re

import pytest

import data
import suite
from genres import SENSES, TEXTS
from suite import LARGE, LOW, TASKS, TEMPLATES
from world import RELATIONS, SPLITS, capital, make, render

LABELLED = [name for name in TASKS if TEMPLATES[name][0][1]]
SPLIT_SIZES = {"dev": 60, "test": 150}
SHOWN = SPLIT_SIZES | {"train": 400}


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture(scope="module")
def examples(world):
    """task -> split -> the fields of each example; of the training sets the first 400."""
    return {
        name: {split: suite.examples(world, name, split, SHOWN[split]) for split in SPLITS}
        for name in TASKS
    }


def contains(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def every(examples, *names):
    return [fields for name in names for part in examples[name].values() for fields in part]


def objects_of(text):
    """(name, relation, object) of a sentence in the plainest wording of a relation, or None."""
    for relation, (statements, _) in RELATIONS["person"].items():
        wording = re.escape(statements[0].removesuffix("."))
        wording = wording.replace(r"\{S\}", "([A-Z][a-z]+ [A-Z][a-z]+)")
        match = re.fullmatch(re.sub(r"\\\{(an_)?o\\\}", "(?:an? )?(.+)", wording), text)
        if match:
            return match[1], relation, match[2]


def test_suite_has_the_clusters_tasks_and_templates_of_its_experiments():
    assert len(TASKS) >= 24 and len({task.cluster for task in TASKS.values()}) == 12
    assert sum(task.size == LARGE for task in TASKS.values()) >= 12
    assert sum(task.size == LOW for task in TASKS.values()) >= 8
    paraphrase = [name for name, t in TASKS.items() if t.cluster == "paraphrase identification"]
    assert len(paraphrase) == 2
    assert TEMPLATES.keys() == TASKS.keys()
    for name, templates in TEMPLATES.items():
        assert len({template for template, _, _ in templates}) == len(templates) >= 4, name
        assert len({text for _, _, text in templates}) == len(templates), name


def test_train_examples_take_turns_through_the_templates_and_others_have_all(world):
    rows = suite.rows(world, "record_qa", "train")
    assert len(rows) == LOW and len(suite.rows(world, "record_nli", "test")) == 150 * 4
    count = collections.Counter(row["template"] for row in rows)
    assert set(count.values()) == {LOW // len(TEMPLATES["record_qa"])}
    rows = suite.rows(world, "record_qa", "dev")
    targets = collections.defaultdict(list)
    for row in rows:
        targets[row["template"]].append(row["targets_pretokenized"])
    assert len(rows) == SPLIT_SIZES["dev"] * len(targets) == SPLIT_SIZES["dev"] * 4
    assert len(set(map(tuple, targets.values()))) == 1


def test_examples_depend_on_the_seed_alone(world):
    again = suite.rows(make(), "passage_choice", "dev")
    assert again == suite.rows(world, "passage_choice", "dev")
    assert again != suite.rows(make(seed=2), "passage_choice", "dev")


def test_splits_have_their_sizes_and_share_no_text(examples):
    for name, parts in examples.items():
        texts = {}
        for split, fields in parts.items():
            assert len(fields) == SHOWN[split]
            texts[split] = {TEMPLATES[name][0][2].format(**example) for example in fields}
            assert len(texts[split]) == len(fields), name
        assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"], name
        assert not texts["dev"] & texts["test"], name


def test_closed_book_questions_keep_to_the_splits_of_the_world(world, examples):
    for name in ("people_trivia", "people_choice"):
        for split, part in examples[name].items():
            for fields in part:
                (person,) = (p for p in world.people if p in fields["question"])
                assert world.split[person] == split
                assert fields["answer"] in world.facts[person].values()
    for fields in every(examples, "place_trivia"):
        places = [p for p in world.cities + world.companies if p in fields["question"]]
        assert any(fields["answer"] in world.facts[place].values() for place in places)


def test_rows_are_read_as_p3_files(world, tmp_path):
    for name in ("news_topic", "passage_choice", "gist"):
        rows = suite.rows(world, name, "dev")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = data.read(path)
        assert len(read) == len(rows) == SPLIT_SIZES["dev"] * len(TEMPLATES[name])
        for row, example in zip(rows, read):
            assert example.input == row["inputs_pretokenized"]
            assert example.target == row["targets_pretokenized"] and example.task == name
            assert list(example.options) == row.get("answer_choices", [])


@pytest.mark.parametrize("name", LABELLED)
def test_labels_come_equally_often_in_every_template(examples, name):
    count = len(TEMPLATES[name][0][1])
    assert all(len(set(choices)) == len(choices) == count for _, choices, _ in TEMPLATES[name])
    for split, part in examples[name].items():
        labels = collections.Counter(fields["label"] for fields in part)
        assert len(labels) == count and max(labels.values()) <= math.ceil(len(part) / count), split


def test_a_template_names_all_of_its_choices_or_none():
    for name, templates in TEMPLATES.items():
        for template, choices, text in templates:
            plain = re.sub(r"\{\w+\}", "", text).lower()
            named = [re.search(rf"\b{choice}\b", plain) is not None for choice in choices]
            assert all(named) or not any(named), (name, template)


def test_the_answer_stands_anywhere_among_its_options(examples):
    for name, parts in examples.items():
        part = parts["test"]
        if "choices" not in part[0]:
            continue
        places = collections.Counter(fields["choices"].index(fields["answer"]) for fields in part)
        options = len(part[0]["choices"])
        assert len(places) == options, name
        assert max(places.values()) / len(part) < 1 / options + 0.12, name
        for fields in part:
            assert len(set(fields["choices"])) == options, fields


def test_no_free_answer_is_a_good_guess(examples):
    for name, parts in examples.items():
        if name not in LABELLED and "choices" not in parts["test"][0]:
            count = collections.Counter(fields["answer"] for fields in parts["test"])
            assert max(count.values()) / len(parts["test"]) <= 0.1, name


def test_extracted_answers_stand_in_the_text(examples):
    for name, key in (
        ("passage_qa", "passage"),
        ("two_passage_qa", "passages"),
        ("record_qa", "record"),
        ("passage_choice", "passage"),
    ):
        for fields in every(examples, name):
            assert fields["answer"].lower() in fields[key].lower(), fields
    for fields in every(examples, "two_passage_qa"):
        passages = dict(line.split(": ", 1) for line in fields["passages"].splitlines())
        (title,) = (title for title in passages if title in fields["question"])
        assert fields["answer"].lower() in passages[title].lower(), fields


def test_inferences_follow_from_their_premise(examples):
    for name in ("sentence_nli", "record_nli", "three_way_nli"):
        for fields in every(examples, name):
            person, relation, obj = objects_of(fields["hypothesis"])
            premise = fields["premise"]
            stated = contains(premise, obj) or contains(premise, capital(obj))
            true = fields["label"] == (2 if name == "three_way_nli" else 1)
            # A city may stand in the premise under the other of two relations.
            assert stated == true or (stated and relation in ("born_in", "lives_in")), fields
            assert person in premise


def test_paraphrases_ask_or_say_the_same(examples):
    relation_of = {}
    for relation, (_, questions) in RELATIONS["person"].items():
        for question in questions:
            pattern = re.sub(
                r"\\\{(s|his)\\\}", "([A-Z][a-z]+ [A-Z][a-z]+)(?:'s?)?", re.escape(question)
            )
            relation_of[pattern] = relation

    def meaning(question):
        for pattern, relation in relation_of.items():
            match = re.fullmatch(pattern, question)
            if match:
                return relation, match[1]

    for fields in every(examples, "question_pairs"):
        first, second = meaning(fields["first"]), meaning(fields["second"])
        assert first and second and (first == second) == fields["label"], fields
        assert fields["first"] != fields["second"]


def test_summaries_and_sentences_say_what_the_text_says(examples):
    for name, key in (("gist", "text"), ("record_to_text", "record"), ("triple_to_text", "object")):
        for fields in every(examples, name):
            first = fields["answer"].split(". ")[0].removesuffix(".")
            obj = objects_of(first)[2]
            assert obj.lower() in fields[key].lower(), fields
    for fields in every(examples, "profile"):
        for part in fields["answer"].split(", "):
            assert part in fields["text"], fields


def test_story_ends_name_a_person_of_the_story(examples):
    for fields in every(examples, "story_end"):
        names = {
            option: set(re.findall(r"\b[A-Z]\w+", option)) - {"She", "He"}
            for option in fields["choices"]
        }
        days = set.intersection(*names.values())
        for option in fields["choices"]:
            (name,) = names[option] - days
            assert contains(fields["text"], name) == (option == fields["answer"]), fields


def test_references_agree_with_the_pronoun(examples):
    for name, marks in (
        ("pronoun_reference", {"she": "she", "he": "he"}),
        ("possessive_reference", {"her": "she", "his": "he"}),
    ):
        for fields in every(examples, name):
            (mark,) = set(re.findall(r"\w+", fields["text"])) & set(marks)
            is_she = fields["answer"].endswith("a")  # invented women's first names end with an a
            assert is_she == (marks[mark] == "she") and fields["answer"] in fields["choices"]


def test_senses_of_test_sentences_are_not_seen_in_training(examples):
    def wording(text):
        for word, meaning in SENSES:
            for number, sentence in enumerate(TEXTS[f"sense.{word}.{meaning}"]):
                if re.fullmatch(re.sub(r"\\\{[ab]\\\}", r"\\w+", re.escape(sentence)), text):
                    return meaning, number

    numbers = {"train": {0, 1, 2}, "dev": {3}, "test": {4}}
    for split in SPLITS:
        for fields in examples["word_meaning"][split]:
            meaning, number = wording(fields["text"])
            assert meaning == fields["answer"] and number in numbers[split]
        for fields in examples["same_sense"][split]:
            (first, number), (second, other) = wording(fields["first"]), wording(fields["second"])
            assert (first == second) == fields["label"]
            assert number in numbers[split] and other in numbers["train"]


def test_a_wrong_split_or_template_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        suite.examples(world, "gist", "valid")
    path = tmp_path / "templates.txt"
    path.write_text("[gist]\nshort: {text}\n")
    with pytest.raises(ValueError, match=r"\[gist\]: a template is name \| choices \| input"):
        suite.read_templates(path)


@pytest.mark.parametrize(
    "sizes", [dict(people=20), dict(people=40), dict(people=20, cities=4, companies=4)]
)
@pytest.mark.parametrize("seed", [1, 5])
def test_a_small_world_has_all_examples_that_there_are(sizes, seed):
    """Each of its tasks ends: with every question about its people of the split."""
    small = make(seed, **sizes)
    people = [p for p in small.people if small.split[p] == "train"]
    asked = {fields["question"] for fields in suite.examples(small, "people_trivia", "train")}
    wordings = [q for _, questions in RELATIONS["person"].values() for q in questions]
    assert asked == {render(q, person) for q in wordings for person in people}
    places = {split: suite.examples(small, "place_trivia", split) for split in SPLITS}
    named = {
        split: sum(suite.split_of(p) == split for p in small.cities + small.companies)
        for split in SPLITS
    }
    for split, size in (SPLIT_SIZES | {"train": LOW}).items():
        assert len(places[split]) == min(size, 24 * named[split])


def test_a_split_without_examples_has_no_file(monkeypatch):
    seed = next(
        n
        for n in range(99)
        for small in [make(n, 20)]
        if "dev" not in map(suite.split_of, small.cities + small.companies)
    )
    monkeypatch.setattr(suite, "TASKS", {"place_trivia": TASKS["place_trivia"]})
    files = {name for name in suite.files(make(seed, 20), 1) if name.startswith("suite/")}
    assert "suite/place_trivia-train.jsonl" in files
    assert "suite/place_trivia-dev.jsonl" not in files
