"""How the world of world.py is told: the documents that the embedded LM is pretrained on.

    article   1 to 4 facts about one person, city or company, each in one of many wordings
    qa        a one-hop question with its answer, about train people, cities and companies only

Articles tell of everyone. No document joins two facts: an article about a person does not say in
which country the birthplace lies. So the answer to a two-hop question is never read in one place.

A genre is one function from (world, ..., rng) to a dict. `documents` draws from the genres and is a
pure function of the world and a seed.

    python world.py --out world --documents 20000      writes corpus.jsonl (2 s)
"""

import itertools
import random
from collections.abc import Iterator

from world import RELATIONS, World, capital, deck, render


def documents(
    world: World, count: int, seed: int = 1, qa: float = 0.4, people: float = 0.75
) -> Iterator[dict]:
    """Yield `count` documents. A larger count continues a smaller one.

    `qa` is the share of qa documents and `people` the share of documents about people. The rest is
    about cities and companies. They are so few that each of their facts is told several times as
    often as a fact of a person.
    """
    rng = random.Random(f"{world.seed} documents {seed}")
    places = world.cities + world.companies
    train_people = [person for person in world.people if world.split[person] == "train"]
    article_person, article_place = deck(rng, world.people), deck(rng, places)
    qa_person, qa_place = deck(rng, train_people), deck(rng, places)
    relations = {subject: deck(rng, list(facts)) for subject, facts in world.facts.items()}
    popularity = [(rank + 1) ** -0.8 for rank in range(len(world.people))]
    popularity = list(itertools.accumulate(popularity))
    for _ in range(count):
        about_person = rng.random() < people
        if rng.random() < qa:
            yield qa_document(world, next(qa_person if about_person else qa_place), rng)
        elif not about_person:
            yield article(world, next(article_place), relations, rng)
        elif rng.random() < 0.6:  # everyone in turn, so that the least known are told too
            yield article(world, next(article_person), relations, rng)
        else:  # the long tail
            (person,) = rng.choices(world.people, cum_weights=popularity)
            yield article(world, person, relations, rng)


def article(world: World, subject: str, relations: dict, rng: random.Random) -> dict:
    """1 to 4 facts about one subject.

    `relations` holds a deck per subject, so that over many articles all its facts are told equally
    often.
    """
    (count,) = rng.choices((1, 2, 3, 4), weights=(1, 3, 5, 5))
    pronoun = world.pronoun[subject]
    short = subject.split()[-1] if world.kind[subject] == "person" else subject
    told, sentences, mention = [], [], subject
    while len(told) < count:
        relation = next(relations[subject])
        if relation in told:  # the deck began again in the middle of this article
            continue
        told.append(relation)
        wording = rng.choice(RELATIONS[world.kind[subject]][relation][0])
        sentences.append(render(wording, subject, world.facts[subject][relation], mention))
        # After a sentence that names a second person, "she" could be either of them.
        mention = subject if relation == "teacher" else rng.choice((pronoun, pronoun, short))
    return {"genre": "article", "title": subject, "text": " ".join(map(capital, sentences))}


def qa_document(world: World, subject: str, rng: random.Random) -> dict:
    """A one-hop question about the subject, in one of its wordings, with its answer."""
    relation = rng.choice(list(world.facts[subject]))
    wording = rng.choice(RELATIONS[world.kind[subject]][relation][1])
    return {
        "genre": "qa",
        "question": render(wording, subject),
        "answer": [world.facts[subject][relation]],
    }
