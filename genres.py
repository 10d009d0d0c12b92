"""How the world of world.py is told: the documents that an LM reads, and an open book of passages.

Each genre is one function from a `Cast` to a document with the keys genre and text.

    article    a few facts about one person, city or company, each in one of many wordings
    qa         a one-hop question with its answer, about train people, cities and companies only
    reading    1 to 5 passages about strangers, and questions that the passages answer
    claims     passages about strangers, then claims about them that are right or wrong
    wording    two questions or sentences about strangers, and whether they mean the same
    record     a table of facts, and sentences that state the same
    news       an event about a person, city or company, under its topic
    review     words of praise or blame about goods, food or work
    dialogue   a train person answers questions
    story      two people with different pronouns, and who did what
    sense      a sentence with an ambiguous word, and what the word means there

No document joins the two facts of a two-hop question. Dev and test people are told of, and no
question or dialogue is about them. The strangers live in other worlds, a new world every six
documents. No stranger's name comes back, so the LM cannot know these answers by heart and has to
read.

    python world.py --out world        writes world/corpus.jsonl, world/passages.jsonl and the rest
"""

import itertools
import random
from collections.abc import Iterable, Iterator

from world import (
    ASSETS,
    MAX_DRAWS,
    RELATIONS,
    SPLITS,
    TRAIN_WORDINGS,
    WORDS,
    World,
    capital,
    deck,
    make,
    read_sections,
    render,
)

TEXTS = read_sections(ASSETS / "genres.txt")
TOPICS = {  # of news, and what each is about
    "politics": "city",
    "business": "company",
    "music": "person",
    "leisure": "person",
    "travel": "city",
}
REVIEWED = {"goods": "company", "food": "city", "work": "company"}
STORY_ENDS = TEXTS["story.end"] + TEXTS["story.last"]
FACTS_TOLD = {3: 1, 4: 2, 5: 2, 6: 1}  # facts in an article: weight
SENSES = [section.split(".")[1:] for section in TEXTS if section.startswith("sense.")]

# Who and what a text is about


class Cast:
    """Draws who a text is about. All subjects come up, and well-known people come up more often."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        places = world.cities + world.companies
        train = [person for person in world.people if world.split[person] == "train"]
        self.everyone, self.places = deck(rng, world.people), deck(rng, places)
        self.train_people, self.train_places = deck(rng, train), deck(rng, places)
        self.cities, self.companies = deck(rng, world.cities), deck(rng, world.companies)
        self.relations = {subject: deck(rng, list(facts)) for subject, facts in world.facts.items()}
        self.asides = {True: deck(rng, TEXTS["aside"]), False: deck(rng, TEXTS["aside.place"])}
        popularity = [(rank + 1) ** -0.8 for rank in range(len(world.people))]
        self.popularity = list(itertools.accumulate(popularity))
        self.first_names = {
            pronoun: sorted({p.split()[0] for p in world.people if world.pronoun[p] == pronoun})
            for pronoun in ("she", "he")
        }

    def person(self) -> str:
        """Six times in ten the next of everyone in turn, else one drawn by popularity."""
        if self.rng.random() < 0.6:
            return next(self.everyone)
        return self.rng.choices(self.world.people, cum_weights=self.popularity)[0]

    def of_kind(self, kind: str) -> str:
        """One person, city, company, or place (a city or a company)."""
        if kind == "person":
            return self.person()
        return next({"city": self.cities, "company": self.companies, "place": self.places}[kind])

    def subject(self) -> str:
        """A person, or else a place: places are few, so each of their facts is told more often."""
        return self.of_kind("person" if self.rng.random() < 0.85 else "place")

    def next_relations(self, subject: str, count: int) -> Iterator[str]:
        """`count` different relations. Over many calls all relations come equally often.

        ValueError if the subject has fewer.
        """
        told, known = [], len(self.world.facts[subject])
        if count > known:
            raise ValueError(f"{subject}: {count} relations are asked for, and there are {known}")
        while len(told) < count:
            relation = next(self.relations[subject])
            if relation not in told:  # the deck may begin again in the middle
                told.append(relation)
                yield relation

    def mention(self, subject: str) -> str:
        """How a later sentence names the subject: the pronoun, twice as often as the surname."""
        pronoun = self.world.pronoun[subject]
        short = subject.split()[-1] if self.world.kind[subject] == "person" else subject
        return self.rng.choice((pronoun, pronoun, short))

    def words(self, **sections: str) -> dict[str, str]:
        """One word of each section of words.txt: words(day="days") -> {"day": "Monday"}."""
        return {field: self.rng.choice(WORDS[section]) for field, section in sections.items()}

    def scene(self) -> dict[str, str]:
        """Two first names of different pronouns, and things for these two to handle."""
        x, y = self.rng.sample(("she", "he"), 2)
        a, b = (self.rng.choice(self.first_names[pronoun]) for pronoun in (x, y))
        people = dict(a=a, b=b, x=x, y=y, X=capital(x), Y=capital(y))
        return people | self.words(day="days", season="seasons", food="foods", ware="wares")

    def fill(self, section: str, subject: str) -> str:
        """A wording of genres.txt about the subject, with its facts, a day and a season."""
        fields = self.world.facts[subject] | self.words(day="days", season="seasons")
        return render(self.rng.choice(TEXTS[section]), subject, **fields)

    def others(self, subject: str) -> dict[str, str]:
        """For an aside: things of every kind that are none of the subject's facts."""
        own = {subject, *self.world.facts[subject].values()}
        kinds = {
            "city": self.world.cities,
            "company": self.world.companies,
            "person": self.world.people,
            "instrument": WORDS["instruments"],
            "hobby": WORDS["hobbies"],
            "worker": WORDS["professions"],
        }
        fields = self.words(day="days", season="seasons")
        for field, items in kinds.items():
            fields[field] = self.rng.choice([item for item in items if item not in own])
        return fields | {"a_worker": render("{an_o}", "", fields["worker"])}

    def tell(self, subject: str, relations: Iterable[str | None], mention: str = "") -> str:
        """One sentence for each relation, and an aside for each None.

        The first one names the subject by `mention` (default: the full name). After a sentence that
        names a second person, "she" could be either of them, so the next one has the full name.
        """
        sentences, kind = [], self.world.kind[subject]
        for relation in relations:
            if relation is None:
                wording, fields = next(self.asides[kind == "person"]), self.others(subject)
                second_person = "{name}" in wording or "{person}" in wording
            else:
                wording = self.rng.choice(RELATIONS[kind][relation][0])
                fields = {"obj": self.world.facts[subject][relation]}
                second_person = relation == "teacher"
            sentences.append(render(wording, subject, mention=mention or subject, **fields))
            mention = subject if second_person else self.mention(subject)
        return " ".join(map(capital, sentences))

    def another(self, subject: str, relation: str, count: int = 1) -> list[str]:
        """Other objects of the relation than the subject's. Nobody teaches themselves."""
        facts = self.world.facts
        objects = {facts[other][relation] for other in facts if relation in facts[other]}
        return self.rng.sample(sorted(objects - {subject, facts[subject][relation]}), count)

    def claim(self, subject: str, relation: str, true: bool) -> str:
        """A clause that states the fact in its plainest wording, or states another object."""
        obj = self.world.facts[subject][relation]
        obj = obj if true else self.another(subject, relation)[0]
        text = render(RELATIONS[self.world.kind[subject]][relation][0][0], subject, obj)
        return text.removesuffix(".").replace("The mayor", "the mayor")

    def ask(self, subject: str, relation: str) -> str:
        """A question about one fact, in one of its wordings."""
        return render(self.rng.choice(RELATIONS[self.world.kind[subject]][relation][1]), subject)


def question_line(question: str, answer: str) -> str:
    """A question as data.question_text writes it, with its answer."""
    return f"Q: {question.strip().rstrip('?').rstrip()}?\nA: {answer}"


# Genres


def article(cast: Cast) -> dict:
    """3 to 6 facts about one person, or 3 or all 4 about one place."""
    subject = cast.subject()
    (count,) = cast.rng.choices(list(FACTS_TOLD), list(FACTS_TOLD.values()))
    count = min(count, len(cast.world.facts[subject]))
    text = cast.tell(subject, cast.next_relations(subject, count))
    return {"genre": "article", "text": text, "subject": subject}


def qa(cast: Cast) -> dict:
    """A one-hop question with its answer. No dev or test person is asked about."""
    subject = next(cast.train_people if cast.rng.random() < 0.75 else cast.train_places)
    relation = cast.rng.choice(list(cast.world.facts[subject]))
    answer = cast.world.facts[subject][relation]
    return {"genre": "qa", "text": question_line(cast.ask(subject, relation), answer)}


def record(cast: Cast) -> dict:
    """3 or 4 facts as a table and as sentences."""
    subject = cast.subject()
    relations = list(cast.next_relations(subject, cast.rng.randint(3, 4)))
    table = record_table(subject, cast.world.facts[subject], relations)
    parts = [table, cast.tell(subject, relations)]
    cast.rng.shuffle(parts)
    return {"genre": "record", "text": "\n".join(parts)}


def record_table(subject: str, facts: dict[str, str], relations: Iterable[str]) -> str:
    """One line for each relation: "born in: Nindau"."""
    rows = [f"{relation.replace('_', ' ')}: {facts[relation]}" for relation in relations]
    return "\n".join([f"name: {subject}", *rows])


def news(cast: Cast) -> dict:
    """An opening that states facts, and two sentences that fit the topic."""
    topic = cast.rng.choice(list(TOPICS))
    opening = cast.fill(f"news.{topic}", cast.of_kind(TOPICS[topic]))
    body = " ".join([opening, *cast.rng.sample(TEXTS[f"news.{topic}.more"], 2)])
    return {"genre": "news", "text": f"News, {topic}. {body}", "body": body, "topic": topic}


def review(cast: Cast, about: str = "") -> dict:
    """An opening and two or three sentences, all of praise or all of blame."""
    about, verdict = about or cast.rng.choice(list(REVIEWED)), cast.rng.choice(("good", "bad"))
    opening = cast.fill(f"review.{about}", cast.of_kind(REVIEWED[about]))
    sentences = cast.rng.sample(TEXTS[f"review.{about}.{verdict}"], cast.rng.randint(2, 3))
    return {"genre": "review", "text": " ".join([opening, *sentences]), "verdict": verdict}


def dialogue(cast: Cast) -> dict:
    """A train person answers two or three questions."""
    person = next(cast.train_people)
    guest = cast.rng.choice([n for n in cast.first_names["he"] if n != person.split()[0]])
    relations = list(cast.next_relations(person, cast.rng.randint(2, 3)))
    lines = [f"{guest} talks to {person}."]
    for relation in relations:
        exchange = cast.rng.choice(TEXTS[f"dialogue.{relation}"])
        obj = cast.world.facts[person][relation]
        question, answer = render(exchange, person, obj).split(" | ")
        lines += [f"{guest}: {question}", f"{person.split()[0]}: {answer}"]
    text = "\n".join(lines)
    return {"genre": "dialogue", "text": text, "subject": person, "relations": relations}


def story(cast: Cast) -> dict:
    """A start, some middle and an end; or one sentence, and who its pronoun is."""
    if cast.rng.random() < 0.5:
        return long_story(cast)
    case = pronoun_case(cast) if cast.rng.random() < 0.6 else possessive_case(cast)
    return {"genre": "story", "text": f"{case['text']} {case['resolved']}"}


def long_story(cast: Cast) -> dict:
    """The same two people from start to end."""
    scene, middle = cast.scene(), cast.rng.sample(TEXTS["story.middle"], cast.rng.randint(2, 3))
    start, end = cast.rng.choice(TEXTS["story.start"]), cast.rng.choice(STORY_ENDS)
    sentences = [wording.format(**scene) for wording in (start, *middle, end)]
    return {"genre": "story", "text": " ".join(sentences), "sentences": sentences, **scene}


def pronoun_case(cast: Cast) -> dict:
    """Two people, and a pronoun that either could be: "It was Nada who carried the bags." """
    text, deed = cast.rng.choice(TEXTS["pronoun"]).split(" | ")
    case = reference(cast, text)
    return case | {"deed": deed, "resolved": f"It was {case['who']} who {deed}."}


def possessive_case(cast: Cast) -> dict:
    """Two people, and a thing that belongs to her or him: "It was Nada's garden." """
    text, thing = cast.rng.choice(TEXTS["possessive"]).split(" | ")
    case = reference(cast, text)
    return case | {"thing": thing, "resolved": render("It was {his} ", case["who"]) + f"{thing}."}


def reference(cast: Cast, text: str) -> dict:
    """The text with two people, and a pronoun that stands for `who` and not for `other`."""
    scene, letters = cast.scene(), cast.rng.choice(("abx", "bay"))
    who, other, pronoun = (scene[letter] for letter in letters)
    fields = scene | {"x": pronoun, "p": {"she": "her", "he": "his"}[pronoun]}
    return {"text": text.format(**fields), "who": who, "other": other}


def sense(cast: Cast) -> dict:
    """A sentence with an ambiguous word, then its meaning there."""
    word, meaning = cast.rng.choice(SENSES)
    sentence = cast.rng.choice(TEXTS[f"sense.{word}.{meaning}"]).format(**cast.scene())
    return {"genre": "sense", "text": f'{sentence} Here "{word}" means {meaning}.'}


# Passages and questions about them


def passage(cast: Cast, subject: str, relations: list[str], asides: int = 0) -> dict:
    """A title, and about 30 tokens of text that state these facts and none else."""
    sentences = [*relations, *[None] * asides]
    cast.rng.shuffle(sentences)
    mention = cast.rng.choice((subject, cast.mention(subject)))  # the title has the full name
    return {"title": subject, "text": cast.tell(subject, sentences, mention)}


def passage_text(passage: dict) -> str:
    """The passage as the LM reads it."""
    return f"{passage['title']}: {passage['text']}"


def strangers(world: World, purpose: str, rng: random.Random, times: int = 6) -> Iterator[Cast]:
    """Casts of small worlds, each world for `times` texts and then never again.

    `purpose` seeds them. No person, city or company there has a name of `world`, and no person has
    the name of an earlier stranger. ValueError if `MAX_DRAWS` worlds in a row have such a name.
    """
    seen, last = set(), 0  # the last world whose names were new
    for number in itertools.count():
        if number - last > MAX_DRAWS:
            raise ValueError(f"{purpose}: all names of strangers are in use; take fewer people")
        other = make(f"{world.seed} {purpose} {number}", people=20, cities=8, companies=8)
        if world.facts.keys().isdisjoint(other.facts) and seen.isdisjoint(other.people):
            seen.update(other.people)
            yield from [Cast(other, rng)] * times
            last = number


def some_passages(cast: Cast, count: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """`count` passages, and the (subject, relation) of each fact that they state."""
    world, rng = cast.world, cast.rng
    passages, facts = [], []
    for subject in rng.sample(world.people + world.cities[:3] + world.companies[:3], count):
        relations = rng.sample(list(world.facts[subject]), 3 if count == 1 else 2)
        passages.append(passage(cast, subject, relations, asides=int(rng.random() < 0.3)))
        facts += [(subject, relation) for relation in relations]
    return passages, facts


def reading(cast: Cast) -> dict:
    """1 to 5 passages and 3 to 5 questions. `cast` is one of strangers."""
    rng = cast.rng
    passages, facts = some_passages(cast, rng.randint(1, 5))
    asked = [
        (cast.ask(subject, relation), cast.world.facts[subject][relation])
        for subject, relation in rng.sample(facts, min(len(facts), rng.randint(3, 5)))
    ]
    lines = [*map(passage_text, passages), *(question_line(*pair) for pair in asked)]
    return {"genre": "reading", "text": "\n".join(lines), "passages": passages, "asked": asked}


def claims(cast: Cast) -> dict:
    """1 to 3 passages and 3 or 4 claims, each right or wrong."""
    rng = cast.rng
    passages, facts = some_passages(cast, rng.randint(1, 3))
    lines, verdicts = list(map(passage_text, passages)), []
    for subject, relation in rng.sample(facts, min(len(facts), rng.randint(3, 4))):
        true = rng.random() < 0.5
        claim = cast.claim(subject, relation, true)
        wording = rng.choice(TEXTS["claim.right" if true else "claim.wrong"])
        lines.append(wording.format(claim=claim))
        verdicts.append((claim, true))
    return {"genre": "claims", "text": "\n".join(lines), "claims": verdicts}


def question_pair(cast: Cast) -> dict:
    """Two questions about one fact; or about another fact, or about another person."""
    same, person = cast.rng.random() < 0.5, cast.rng.choice(cast.world.people)
    relation, other_relation = cast.rng.sample(list(cast.world.facts[person]), 2)
    first, second = cast.rng.sample(RELATIONS["person"][relation][1], 2)
    other = person
    if not same and cast.rng.random() < 0.5:
        second = cast.rng.choice(RELATIONS["person"][other_relation][1])
    elif not same:
        (other,) = cast.rng.sample([p for p in cast.world.people if p != person], 1)
    return {"first": render(first, person), "second": render(second, other), "same": same}


def sentence_pair(cast: Cast) -> dict:
    """Two facts told twice in other words; or with one object changed."""
    same, person = cast.rng.random() < 0.5, cast.rng.choice(cast.world.people)
    relations = cast.rng.sample(list(cast.world.facts[person]), 2)
    objects = {relation: cast.world.facts[person][relation] for relation in relations}

    def reword(relation):
        wording = cast.rng.choice(RELATIONS["person"][relation][0])
        return render(wording, person, objects[relation])

    first = " ".join(map(reword, relations))
    if not same:
        changed = cast.rng.choice(relations)
        (objects[changed],) = cast.another(person, changed)
    return {"first": first, "second": " ".join(map(reword, relations[::-1])), "same": same}


def wording(cast: Cast) -> dict:
    """A pair of questions or of sentences, then whether both mean the same."""
    pair = (question_pair if cast.rng.random() < 0.5 else sentence_pair)(cast)
    text = cast.rng.choice(TEXTS["pair.same" if pair["same"] else "pair.different"])
    return {"genre": "wording", "text": text.format(**pair)}


def library(world: World) -> tuple[list[dict], dict[str, list[dict]]]:
    """The open book: (passages, questions of each split), about people of whom no document tells.

    Of the 13 passages about a person, three state the seven facts. Three more are near-duplicates
    that leave one fact out. Seven hold asides alone: they name cities, companies, people and jobs
    that are no answer. `positives` of a question are the passages that state its answer.
    """
    rng = random.Random(f"{world.seed} library")
    cast = Cast(make(f"{world.seed} library", people=400), rng)
    facts, passages, positives = cast.world.facts, [], {}

    def add(subject: str, relations: list[str], asides: int) -> None:
        new = {"id": f"p{len(passages):05d}"} | passage(cast, subject, relations, asides)
        passages.append(new)
        for relation in relations:
            positives.setdefault((subject, relation), []).append(new["id"])

    for subject in facts:
        if subject in world.facts:  # a namesake in the world of the documents
            continue
        relations = rng.sample(list(facts[subject]), len(facts[subject]))
        for part in (relations[0::3], relations[1::3], relations[2::3]):
            add(subject, part, asides=3 - len(part))
            add(subject, part[1:], asides=1)
        for _ in range(7):
            add(subject, [], asides=2)
    rng.shuffle(passages)
    return passages, {split: library_questions(cast, positives, split) for split in SPLITS}


def library_questions(cast: Cast, positives: dict, split: str) -> list[dict]:
    """Questions about the people of one split, in three wordings for train and one otherwise."""
    rows = []
    for (person, relation), ids in positives.items():
        if cast.world.split.get(person) != split:
            continue
        wordings = RELATIONS["person"][relation][1]
        for wording in cast.rng.sample(wordings, TRAIN_WORDINGS if split == "train" else 1):
            row = {"id": f"{split}-{len(rows):06d}", "question": render(wording, person)}
            row |= {"answer": [cast.world.facts[person][relation]], "task": relation}
            rows.append(row | {"subject": person, "positives": ids})
    return rows


# The stream of documents

GENRES = {  # genre: (its function, its share of the documents)
    "article": (article, 0.36),
    "qa": (qa, 0.15),
    "reading": (reading, 0.14),
    "claims": (claims, 0.04),
    "wording": (wording, 0.04),
    "record": (record, 0.09),
    "news": (news, 0.05),
    "review": (review, 0.02),
    "dialogue": (dialogue, 0.04),
    "story": (story, 0.05),
    "sense": (sense, 0.02),
}
ABOUT_STRANGERS = ("reading", "claims", "wording")


def documents(world: World, count: int, seed: int = 1) -> Iterator[dict]:
    """Yield `count` documents of all genres as {genre, text}. A larger count only adds to them."""
    rng = random.Random(f"{world.seed} documents {seed}")
    own, others = Cast(world, rng), strangers(world, f"documents {seed}", rng)
    names, shares = list(GENRES), [share for _, share in GENRES.values()]
    for _ in range(count):
        (genre,) = rng.choices(names, shares)
        tell, _ = GENRES[genre]
        document = tell(next(others) if genre in ABOUT_STRANGERS else own)
        yield {"genre": genre, "text": document["text"]}
