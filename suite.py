"""The prompted suite: many small tasks over the world of world.py, in the manner of P3.

P3 (Bach et al. 2022; Sanh et al. 2022) asks each example of a dataset in several templates. The
suite has the ten clusters of P3 that Levine et al. (2022, "Standing on the shoulders of giant
frozen language models") report in table 1, and their coreference and word sense clusters.

A task is one function from a `Cast` to the fields of an example. Its templates stand in
assets/world/templates.txt. Answers follow from the text, or from facts that the LM has read. Labels
come equally often, so no answer can be read off a template.

Large tasks have 4,000 training examples and serve as sources; low-resource tasks have 200 and serve
as targets. A training example is asked in one template, a dev or test example in every one. A task
about the world's own people or places has fewer examples in a small world: all that there are.

    python world.py --out world        writes world/suite/TASK-{train,dev,test}.jsonl
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import genres
from genres import SENSES, TEXTS, TOPICS, Cast, passage, passage_text, record_table, strangers
from world import ASSETS, MAX_DRAWS, RELATIONS, SPLITS, World, read_sections, render

LARGE, LOW = 4000, 200  # training examples
SIZES = {"dev": 60, "test": 150}  # examples
TYPES = {  # relation of a person: what kind of thing its object is
    "born_in": 0,
    "lives_in": 0,
    "works_for": 1,
    "teacher": 2,
    "profession": 3,
    "instrument": 4,
    "hobby": 5,
}

# Parts of examples


def any_person(cast: Cast) -> str:
    """A person of the cast, each as often as another."""
    return cast.rng.choice(cast.world.people)


def some_relations(cast: Cast, subject: str, count: int) -> list[str]:
    """Different relations of the subject."""
    return cast.rng.sample(list(cast.world.facts[subject]), count)


def summary(cast: Cast, subject: str, relations: list[str]) -> str:
    """The facts in their plainest wording, the first with the full name, the others by pronoun."""
    facts, pronoun = cast.world.facts[subject], cast.world.pronoun[subject]
    return " ".join(
        render(RELATIONS["person"][relation][0][0], subject, facts[relation], mention)
        for relation, mention in zip(relations, [subject] + [pronoun] * len(relations))
    )


def choice(cast: Cast, answer: str, wrong: list[str]) -> dict:
    """The fields of an example whose answer is one of several options."""
    options = [answer, *wrong]
    cast.rng.shuffle(options)
    return {"answer": answer, "choices": options}


# Tasks: sentiment, topics, paraphrases, inference


def goods_reviews(cast: Cast) -> dict:
    """Bad or good goods?"""
    return reviewed(cast, "goods")


def food_reviews(cast: Cast) -> dict:
    """Bad or good food?"""
    return reviewed(cast, "food")


def staff_reviews(cast: Cast) -> dict:
    """A bad or a good place to work?"""
    return reviewed(cast, "work")


def reviewed(cast: Cast, about: str) -> dict:
    """Bad or good?"""
    review = genres.review(cast, about)
    return {"text": review["text"], "label": ("bad", "good").index(review["verdict"])}


def news_topic(cast: Cast) -> dict:
    """Which section of the newspaper?"""
    news = genres.news(cast)
    return {"text": news["body"], "label": list(TOPICS).index(news["topic"])}


def question_type(cast: Cast) -> dict:
    """What kind of thing does the question ask for?"""
    relation = cast.rng.choice(list(TYPES))
    return {"text": cast.ask(any_person(cast), relation), "label": TYPES[relation]}


def subject_type(cast: Cast) -> dict:
    """A person, a city or a company?"""
    label = cast.rng.randrange(3)
    subject = cast.of_kind(("person", "city", "company")[label])
    return {"text": cast.tell(subject, some_relations(cast, subject, 2)), "label": label}


def question_pairs(cast: Cast) -> dict:
    """Do two questions ask the same?"""
    pair = genres.question_pair(cast)
    return {"first": pair["first"], "second": pair["second"], "label": int(pair["same"])}


def sentence_pairs(cast: Cast) -> dict:
    """Do two reports say the same?"""
    pair = genres.sentence_pair(cast)
    return {"first": pair["first"], "second": pair["second"], "label": int(pair["same"])}


def sentence_nli(cast: Cast) -> dict:
    """Does the claim follow from two facts?"""
    label, person = cast.rng.randrange(2), any_person(cast)
    relations = some_relations(cast, person, 2)
    hypothesis = cast.claim(person, relations[0], true=label == 1)
    cast.rng.shuffle(relations)
    return {"premise": cast.tell(person, relations), "hypothesis": hypothesis, "label": label}


def three_way_nli(cast: Cast) -> dict:
    """False, unknown or true: an unknown claim is about a relation that the text leaves out."""
    label, person = cast.rng.randrange(3), any_person(cast)
    *relations, left_out = some_relations(cast, person, 3)
    about = left_out if label == 1 else relations[0]
    hypothesis = cast.claim(person, about, true=label > 0)
    cast.rng.shuffle(relations)
    return {"premise": cast.tell(person, relations), "hypothesis": hypothesis, "label": label}


def record_nli(cast: Cast) -> dict:
    """Does the claim agree with a record?"""
    label, person = cast.rng.randrange(2), any_person(cast)
    relations = some_relations(cast, person, 3)
    record = record_table(person, cast.world.facts[person], relations)
    hypothesis = cast.claim(person, cast.rng.choice(relations), true=label == 1)
    return {"premise": record, "hypothesis": hypothesis, "label": label}


# Tasks: summaries, and records as text


def gist(cast: Cast) -> dict:
    """One fact among asides."""
    person = any_person(cast)
    relations = some_relations(cast, person, 1)
    text = passage_text(passage(cast, person, relations, asides=2))
    return {"text": text, "answer": summary(cast, person, relations)}


def profile(cast: Cast) -> dict:
    """A text about one person as name, job and home."""
    person = any_person(cast)
    facts = cast.world.facts[person]
    relations = ["profession", "lives_in", cast.rng.choice(("hobby", "instrument", "born_in"))]
    cast.rng.shuffle(relations)
    answer = f"{person}, {facts['profession']}, {facts['lives_in']}"
    return {"text": cast.tell(person, relations), "answer": answer}


def minutes(cast: Cast) -> dict:
    """What a dialogue tells, in sentences."""
    talk = genres.dialogue(cast)
    return {"text": talk["text"], "answer": summary(cast, talk["subject"], talk["relations"])}


def record_to_text(cast: Cast) -> dict:
    """A record as sentences."""
    person = any_person(cast)
    relations = some_relations(cast, person, 3)
    record = record_table(person, cast.world.facts[person], relations)
    return {"record": record, "answer": summary(cast, person, relations)}


def triple_to_text(cast: Cast) -> dict:
    """A fact as a sentence."""
    person = any_person(cast)
    (relation,) = some_relations(cast, person, 1)
    answer = summary(cast, person, [relation])
    obj, relation = cast.world.facts[person][relation], relation.replace("_", " ")
    return {"subject": person, "relation": relation, "object": obj, "answer": answer}


# Tasks: questions, with and without a text, with and without options


def people_trivia(cast: Cast) -> dict:
    """Nothing to read: the LM has read of these people. The splits are those of the world."""
    person = any_person(cast)
    return asked(cast, person) | {"split": cast.world.split[person]}


def place_trivia(cast: Cast) -> dict:
    """The same about cities and companies."""
    place = cast.of_kind("place")
    return asked(cast, place) | {"split": split_of(place)}


def asked(cast: Cast, subject: str, relation: str = "") -> dict:
    """A question about one fact of the subject, and its answer."""
    relation = relation or some_relations(cast, subject, 1)[0]
    answer = cast.world.facts[subject][relation]
    return {"question": cast.ask(subject, relation), "answer": answer}


def passage_qa(cast: Cast) -> dict:
    """A question about one passage."""
    person = any_person(cast)
    relations = some_relations(cast, person, 2)
    text = passage_text(passage(cast, person, relations, asides=1))
    return {"passage": text} | asked(cast, person, relations[0])


def two_passage_qa(cast: Cast) -> dict:
    """Both passages state the relation that is asked for, each for its own person."""
    person, other = cast.rng.sample(cast.world.people, 2)
    relation, *more = some_relations(cast, person, 3)
    passages = [passage(cast, p, [relation, r]) for p, r in zip((person, other), more)]
    cast.rng.shuffle(passages)
    return {"passages": "\n".join(map(passage_text, passages))} | asked(cast, person, relation)


def record_qa(cast: Cast) -> dict:
    """A question about a record."""
    person = any_person(cast)
    relations = some_relations(cast, person, 4)
    record = record_table(person, cast.world.facts[person], relations)
    return {"record": record} | asked(cast, person, cast.rng.choice(relations))


def passage_choice(cast: Cast) -> dict:
    """The wrong options are objects of the same relation."""
    person = any_person(cast)
    relations = some_relations(cast, person, 2)
    text = passage_text(passage(cast, person, relations))
    return {"passage": text} | asked_with_options(cast, person, relations[0])


def people_choice(cast: Cast) -> dict:
    """Nothing to read, and two options. The splits are those of the world."""
    person = any_person(cast)
    (relation,) = some_relations(cast, person, 1)
    example = asked_with_options(cast, person, relation, wrong=1)
    return example | {"split": cast.world.split[person]}


def asked_with_options(cast: Cast, subject: str, relation: str, wrong: int = 3) -> dict:
    """A question, its answer, and other objects of the same relation."""
    example = asked(cast, subject, relation)
    return example | choice(cast, example["answer"], cast.another(subject, relation, wrong))


# Tasks: what comes next, who is meant, which sense


def story_end(cast: Cast) -> dict:
    """One end names a person of the story, the other a stranger with the same pronoun."""
    story, end = genres.long_story(cast), cast.rng.choice(TEXTS["story.last"])
    letter, pronoun = ("a", "x") if "{a}" in end else ("b", "y")
    namesakes = [n for n in cast.first_names[story[pronoun]] if n != story[letter]]
    wrong = story | {letter: cast.rng.choice(namesakes)}
    example = choice(cast, end.format(**story), [end.format(**wrong)])
    return {"text": " ".join(story["sentences"][:-1])} | example


def fact_completion(cast: Cast) -> dict:
    """A sentence without its last words. One option is of the right kind."""
    person = any_person(cast)
    relation = cast.rng.choice(list(TYPES))
    wordings = RELATIONS["person"][relation][0]
    wording = cast.rng.choice([w for w in wordings if w.endswith((" {o}.", " {an_o}."))])
    start, gap = wording.removesuffix(".").rsplit(" ", 1)
    kinds = {TYPES[r]: r for r in some_relations(cast, person, 7) if TYPES[r] != TYPES[relation]}
    wrong = cast.rng.sample(list(kinds.values()), 3)
    answer, *wrong = (render(gap, person, cast.world.facts[person][r]) for r in (relation, *wrong))
    return {"text": render(start, person)} | choice(cast, answer, wrong)


def pronoun_reference(cast: Cast) -> dict:
    """Who is she, or he?"""
    case = genres.pronoun_case(cast)
    example = choice(cast, case["who"], [case["other"]])
    return {"text": case["text"], "deed": case["deed"]} | example


def possessive_reference(cast: Cast) -> dict:
    """Who is the owner?"""
    case = genres.possessive_case(cast)
    example = choice(cast, case["who"], [case["other"]])
    return {"text": case["text"], "thing": case["thing"]} | example


def word_meaning(cast: Cast) -> dict:
    """Test sentences are not among the training sentences."""
    word, meaning = cast.rng.choice(SENSES)
    (wrong,) = (m for w, m in SENSES if w == word and m != meaning)
    number, text = sense_sentence(cast, word, meaning)
    example = {"text": text, "word": word, "split": SENTENCE_SPLITS[number]}
    return example | choice(cast, meaning, [wrong])


def same_sense(cast: Cast) -> dict:
    """A sentence of one split beside a training sentence."""
    label, (word, meaning) = cast.rng.randrange(2), cast.rng.choice(SENSES)
    (wrong,) = (m for w, m in SENSES if w == word and m != meaning)
    number, first = sense_sentence(cast, word, meaning)
    others = [n for n, split in enumerate(SENTENCE_SPLITS) if split == "train" and n != number]
    _, second = sense_sentence(cast, word, meaning if label else wrong, others)
    split = SENTENCE_SPLITS[number]
    return {"first": first, "second": second, "word": word, "label": label, "split": split}


SENTENCE_SPLITS = ("train", "train", "train", "dev", "test")  # of the five sentences of a sense


def sense_sentence(cast: Cast, word: str, meaning: str, numbers=range(5)) -> tuple[int, str]:
    """(number, sentence) of one of the sentences of a sense."""
    number = cast.rng.choice(numbers)
    return number, TEXTS[f"sense.{word}.{meaning}"][number].format(**cast.scene())


# The suite


@dataclass(frozen=True)
class Task:
    """One dataset: its cluster, its training examples, and whether it is about the LM's world."""

    cluster: str
    size: int
    make: Callable[[Cast], dict]
    own: bool = False  # else about strangers, of whom no document tells


TASKS = {
    task.make.__name__: task
    for task in (
        Task("sentiment", LARGE, goods_reviews),
        Task("sentiment", LARGE, food_reviews),
        Task("sentiment", LOW, staff_reviews),
        Task("topic classification", LARGE, news_topic),
        Task("topic classification", LOW, question_type),
        Task("topic classification", LARGE, subject_type),
        Task("paraphrase identification", LARGE, question_pairs),
        Task("paraphrase identification", LARGE, sentence_pairs),
        Task("natural language inference", LARGE, sentence_nli),
        Task("natural language inference", LARGE, three_way_nli),
        Task("natural language inference", LOW, record_nli),
        Task("summarization", LOW, gist),
        Task("summarization", LARGE, profile),
        Task("summarization", LOW, minutes),
        Task("structure to text", LARGE, record_to_text),
        Task("structure to text", LOW, triple_to_text),
        Task("closed-book QA", LARGE, people_trivia, own=True),
        Task("closed-book QA", LOW, place_trivia, own=True),
        Task("extractive QA", LARGE, passage_qa),
        Task("extractive QA", LARGE, two_passage_qa),
        Task("extractive QA", LOW, record_qa),
        Task("multiple-choice QA", LARGE, passage_choice),
        Task("multiple-choice QA", LARGE, people_choice, own=True),
        Task("sentence completion", LARGE, story_end),
        Task("sentence completion", LOW, fact_completion),
        Task("coreference resolution", LARGE, pronoun_reference),
        Task("coreference resolution", LOW, possessive_reference),
        Task("word sense disambiguation", LARGE, word_meaning),
        Task("word sense disambiguation", LOW, same_sense),
    )
}
# Less than 10 points above chance even if the LM is tuned: `python reproduce.py headroom`.
AT_CHANCE = (
    "question_pairs sentence_pairs three_way_nli record_nli pronoun_reference possessive_reference "
    "same_sense"
).split()


def starred(task: str) -> str:
    """The name of a task in a table: with a star if it is one of AT_CHANCE."""
    return task + " *" * (task in AT_CHANCE)


def read_templates(path: str | Path) -> dict[str, list[tuple[str, list[str], str]]]:
    """task -> [(template name, choices, input)]."""
    templates = {}
    for task, lines in read_sections(path).items():
        templates[task] = []
        for line in lines:
            if line.count(" | ") < 2:
                raise ValueError(f"{path}: [{task}]: a template is name | choices | input: {line}")
            name, choices, text = line.split(" | ", 2)
            choices = [] if choices == "-" else choices.split(", ")
            templates[task].append((name, choices, text.replace("\\n", "\n")))
    return templates


TEMPLATES = read_templates(ASSETS / "templates.txt")


def split_of(text: str) -> str:
    """The split of a text: 80 % are train, 10 % dev and 10 % test, and equal texts agree."""
    number = zlib.crc32(text.encode()) % 10
    return {8: "dev", 9: "test"}.get(number, "train")


def listing(options: list[str]) -> str:
    """a, b or c."""
    return " or ".join([", ".join(options[:-1]), options[-1]])


def examples(world: World, name: str, split: str, count: int = 0) -> list[dict]:
    """The fields of a task's examples, all or `count`; each label equally often, no text twice.

    A small world has fewer texts about its own people and places. The examples are then fewer, or
    none: they end when `MAX_DRAWS` texts in a row are not new.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    task, rng = TASKS[name], random.Random(f"{world.seed} suite {name} {split}")
    _, choices, template = TEMPLATES[name][0]
    count = count or (task.size if split == "train" else SIZES[split])
    casts = strangers(world, f"suite {name} {split}", rng, times=30)
    own, found = Cast(world, rng), {}
    labels, in_vain = Counter(), 0
    while len(found) < count and in_vain < MAX_DRAWS:
        in_vain += 1
        fields = task.make(own if task.own else next(casts))
        if "choices" in fields:
            fields["options"] = listing(fields["choices"])
        text = template.format(**fields)
        if text in found or fields.get("split", split_of(text)) != split:
            continue
        if "label" in fields and labels[fields["label"]] * len(choices) >= count:
            continue
        labels[fields.get("label")] += 1
        found[text], in_vain = fields, 0
    return list(found.values())


def rows(world: World, name: str, split: str, count: int = 0) -> list[dict]:
    """A task in P3's format, all its examples or `count`. Train examples take turns through the
    templates, others have all."""
    out, templates = [], TEMPLATES[name]
    for number, fields in enumerate(examples(world, name, split, count)):
        turn = number % len(templates)
        for template, choices, text in [templates[turn]] if split == "train" else templates:
            row = {
                "id": f"{split}-{number:05d}-{template}",
                "task": name,
                "cluster": TASKS[name].cluster,
                "template": template,
                "inputs_pretokenized": text.format(**fields),
                "targets_pretokenized": choices[fields["label"]] if choices else fields["answer"],
            }
            if choices or "choices" in fields:
                row["answer_choices"] = choices or fields["choices"]
            out.append(row)
    return out


def contents(world: World) -> list:
    """What the hash of the world covers beside its facts, questions and documents."""
    dev = [rows(world, name, "dev") for name in TASKS]
    return [TEXTS, TEMPLATES, genres.library(world), dev]


def files(world: World, seed: int) -> dict[str, list[dict]]:
    """The files of the world beside its facts, questions and documents: {name: rows}.

    A split of a task without examples has no file.
    """
    passages, book = genres.library(world)
    out = {"passages.jsonl": passages}
    out["held-out.jsonl"] = list(genres.documents(world, 2000, seed + 1))
    for split in SPLITS:
        out[f"open-book-{split}.jsonl"] = book[split]
        for name in TASKS:
            if found := rows(world, name, split):
                out[f"suite/{name}-{split}.jsonl"] = found
    return out
