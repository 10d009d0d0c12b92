"""A miniature world that can be learnt by heart: invented people, cities and companies, the texts that tell of them, and questions about them.

The frozen LMs of this project are pretrained on `documents`, and the methods are compared on `questions`. Facts are triples (subject, relation, object),
every relation has one object per subject, and every name is invented, so an answer can only come from what was read here.

    article   an encyclopedia-like text of 1 to 4 sentences about one person, city or company, each fact in one of many wordings
    qa        a one-hop question with its answer, about train people, cities and companies only

People are split 60/15/25 into train, dev and test. Dev and test people occur in articles and never in a qa document, and nothing in the corpus joins two
facts: an article about a person does not say in which country the birthplace lies. Two-hop questions ask for exactly that ("In which country was she born?").
A genre is one function from (world, ..., rng) to a dict, called in `World.documents`; a new one is a function more. Everything is a pure function of its seeds.

    python world.py --out world --documents 20000      ->  300 people, 30 cities, 25 companies, 16 countries, 2320 facts, hash 05b23a7ceba4baf0  (2 s)
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------------------- wordings
# Per relation, the ways to state it and the ways to ask for it, separated by "|".
# The subject is {S} {s} {him} {His} {his}: its name, or a later mention ("Teller", "she", "her"); {name} is always the full name, which is what
# reversed statements need. The object is {o}, at the start of a sentence {O}, with an article {an_o}. Questions name the subject in full.

PERSON = {
    "born_in": (
        """{S} was born in {o}. | {S} is a native of {o}. | {o} is the birthplace of {name}. | {His} birthplace is {o}. | {His} place of birth is {o}.
         | Among those born in {o} is {name}. | {S} came into the world in {o}. | {S} first saw the light of day in {o}. | It was in {o} that {s} was born.
         | The city of {o} is {his} birthplace. | {S} is one of the people born in {o}. | {o} counts {name} among its natives.""",
        """In which city was {s} born? | Which city was {s} born in? | Which city is {his} birthplace? | Which city is the birthplace of {s}?
         | In what city did {s} come into the world? | Of which city is {s} a native? | In which city did {s} first see the light of day?""",
    ),
    "lives_in": (
        """{S} lives in {o}. | {S} resides in {o}. | {S} has settled in {o}. | {His} home is in {o}. | {o} is home to {name}. | Today {s} lives in {o}.
         | {S} now lives in the city of {o}. | Among the residents of {o} is {name}. | {S} moved to {o} and stayed there. | One resident of {o} is {name}.
         | The city where {s} lives is {o}. | Neighbours in {o} know {name} well.""",
        """In which city does {s} live? | Which city does {s} live in? | Which city is home to {s}? | In which city has {s} settled?
         | In what city does {s} reside? | Which city is {his} present home? | To which city did {s} move?""",
    ),
    "works_for": (
        """{S} works for {o}. | {S} is employed by {o}. | {His} employer is {o}. | {S} has a job at {o}. | {S} is on the staff of {o}. | {o} employs {name}.
         | {S} earns a wage at {o}. | The company {s} works for is {o}. | Among the employees of {o} is {name}. | {S} joined {o} and is still there.
         | {His} working days are spent at {o}. | {o} counts {name} among its staff.""",
        """Which company does {s} work for? | For which company does {s} work? | Which company employs {s}? | By which company is {s} employed?
         | Which company is {his} employer? | At which company does {s} have a job? | Which company did {s} join?""",
    ),
    "profession": (
        """{S} works as {an_o}. | {S} is {an_o}. | {S} is {an_o} by profession. | By trade, {s} is {an_o}. | {S} earns a living as {an_o}.
         | {His} profession is that of {an_o}. | {S} trained as {an_o} and still works as one. | {S} has made a career as {an_o}.
         | People know {him} as {an_o}. | {S} chose the career of {an_o}. | One {o} by trade is {name}. | The job {s} does is that of {an_o}.""",
        """What is {his} profession? | What does {s} do for a living? | What is {s} by profession? | What kind of career does {s} have?
         | As what does {s} earn a living? | What is {his} trade? | What did {s} train as?""",
    ),
    "teacher": (
        """{S} was taught by {o}. | {S} was a pupil of {o}. | {His} teacher was {o}. | {o} was {his} teacher. | {o} taught {name}. | {S} studied under {o}.
         | Among the pupils of {o} was {name}. | {S} received lessons from {o}. | As a student, {s} was taught by {o}. | {o} once had {name} as a pupil.
         | It was {o} who taught {him}. | The teacher of {name} was {o}.""",
        """Who taught {s}? | Who was {his} teacher? | Under whom did {s} study? | By whom was {s} taught? | Whose pupil was {s}?
         | From whom did {s} receive lessons? | Who had {s} as a pupil?""",
    ),
    "instrument": (
        """{S} plays the {o}. | {His} instrument is the {o}. | In the evening, {s} plays the {o}. | {S} has played the {o} since childhood.
         | {S} owns {an_o} and plays it well. | The {o} is {his} instrument. | {S} practises the {o} every day. | One player of the {o} is {name}.
         | {S} took up the {o} early and still plays it. | Music, for {him}, means the {o}. | The instrument {s} plays is the {o}.
         | Friends gather to hear {him} play the {o}.""",
        """What instrument does {s} play? | Which instrument does {s} play? | What is {his} instrument? | Which musical instrument does {s} practise?
         | What instrument did {s} take up? | On which instrument does {s} make music? | Which instrument has {s} played since childhood?""",
    ),
    "hobby": (
        """{S} enjoys {o}. | {His} hobby is {o}. | {His} favourite pastime is {o}. | In any spare hour, {s} turns to {o}. | {S} is fond of {o}.
         | {S} is devoted to {o} outside work. | {S} took up {o} as a hobby. | {O} is {his} hobby. | {O} is what {s} does for fun.
         | Weekends, for {him}, mean {o}. | {O} counts {name} among its enthusiasts. | The pastime {s} likes best is {o}.""",
        """What is {his} hobby? | Which pastime fills {his} weekends? | Which hobby does {s} have? | What is {his} favourite pastime?
         | Which pastime does {s} like best? | What did {s} take up as a hobby? | To which hobby does {s} turn in a spare hour?""",
    ),
}
CITY = {
    "country": (
        """{S} is a city in {o}. | {S} lies in {o}. | {S} belongs to {o}. | {S} is located in {o}. | One of the cities of {o} is {name}.
         | Among the cities of {o} is {name}. | {o} is the country where {s} lies. | The country {s} belongs to is {o}. | {S} can be found in {o}.""",
        """In which country is {s}? | Which country is {s} in? | Which country does {s} belong to? | In what country does {s} lie?
         | In which country is {s} located? | In which country can {s} be found?""",
    ),
    "river": (
        """{S} lies on the {o}. | {S} stands on the banks of the River {o}. | The {o} flows through {name}. | The river that runs through {name} is the {o}.
         | {S} was built beside the River {o}. | The {o} passes through {name}. | {S} spreads along the {o}. | Boats reach {name} by the River {o}.
         | Visitors to {name} cross the {o} by bridge.""",
        """Which river flows through {s}? | On which river does {s} lie? | What is the river in {s} called? | Which river passes through {s}?
         | On the banks of which river does {s} stand? | Beside which river was {s} built?""",
    ),
    "mayor": (
        """The mayor of {name} is {o}. | {S} has a mayor named {o}. | {His} mayor is {o}. | {o} is the mayor of {name}. | {o} governs {name} as mayor.
         | {S} is led by Mayor {o}. | Voters in {name} chose {o} as mayor. | {S} elected {o} as mayor. | The office of mayor in {name} is held by {o}.""",
        """Who is the mayor of {s}? | Who is {his} mayor? | What is the name of the mayor of {s}? | Who governs {s} as mayor?
         | Who was elected mayor of {s}? | Who holds the office of mayor in {s}?""",
    ),
    "known_for": (
        """{S} is known for its {o}. | {S} is famous for its {o}. | {O} made {name} famous.
         | Visitors come to {name} for the {o}. | {S} is renowned for its {o}. | {His} speciality is {o}. | {S} owes its fame to {o}.
         | The speciality of {name} is {o}. | Many travel to {name} to try the {o}.""",
        """What is {s} known for? | What is {s} famous for? | What made {s} famous? | What is the speciality of {s}?
         | For what is {s} renowned? | To what does {s} owe its fame?""",
    ),
}
COMPANY = {
    "headquarters": (
        """{S} has its headquarters in {o}. | {S} is based in {o}. | {His} head office is in {o}. | {S} is run from {o}. | {o} is the seat of {name}.
         | The headquarters of {name} are in {o}. | Among the companies based in {o} is {name}. | {S} keeps its main office in {o}.
         | {o} hosts the head office of {name}.""",
        """In which city is {s} based? | In which city does {s} have its headquarters? | Which city is the seat of {s}? | From which city is {s} run?
         | In which city is {his} head office? | Which city hosts the head office of {s}?""",
    ),
    "product": (
        """{S} makes {o}. | {S} produces {o}. | {S} is a maker of {o}. | {O} are made by {name}. | {S} manufactures {o}. | The workers of {name} make {o}.
         | {S} built its name on {o}. | Among the makers of {o} is {name}. | Buyers go to {name} for {o}.""",
        """What does {s} make? | What does {s} produce? | What does {s} manufacture? | What is made by {s}? | What do the workers of {s} make?
         | On what did {s} build its name?""",
    ),
    "founder": (
        """{S} was founded by {o}. | {o} founded {name}. | The founder of {name} was {o}. | {His} founder was {o}. | {S} was set up by {o}.
         | {o} set up {name}. | {S} was established by {o}. | It was {o} who founded {name}. | {S} began as the idea of {o}, its founder.""",
        """Who founded {s}? | Who was the founder of {s}? | Who was {his} founder? | Who set up {s}? | By whom was {s} founded? | Who established {s}?""",
    ),
    "founded": (
        """{S} was founded in {o}. | {S} has existed since {o}. | {S} was established in {o}. | {S} opened for business in {o}. | {S} dates from {o}.
         | The year {o} saw the founding of {name}. | In {o}, {name} was founded. | {S} began its work in {o}. | {S} goes back to the year {o}.""",
        """In which year was {s} founded? | When was {s} founded? | When was {s} established? | In what year did {s} open for business?
         | Since when has {s} existed? | In which year did {s} begin its work?""",
    ),
}
# Two hops: the object of the first relation is the subject of the second, and the question does not name it.
# There are as many paths as relations of a person, so that one-hop and two-hop questions are equally many.
PATHS = {
    "born_in.country": """In which country was {s} born? | Which country was {s} born in? | In which country is {his} birthplace?
         | Which country does the city where {s} was born belong to? | In what country is the city {s} was born in?""",
    "born_in.river": """Which river flows through the city where {s} was born? | On which river is {his} birthplace? | Beside which river was {s} born?
         | What is the river in {his} birthplace called? | The city where {s} was born lies on which river?""",
    "lives_in.mayor": """Who is the mayor of the city where {s} lives? | Who governs the city that {s} lives in?
         | What is the name of the mayor in {his} home city? | Who leads the city {s} lives in as mayor? | Under which mayor does {s} live?""",
    "lives_in.known_for": """What is the city where {s} lives known for? | What is {his} present home city famous for?
         | For what is the city that is home to {s} renowned? | What is the speciality of the city {s} lives in?
         | What made the city where {s} has settled famous?""",
    "works_for.headquarters": """In which city is {his} employer based? | In which city are the headquarters of the company {s} works for?
         | Which city is the seat of the company that employs {s}? | From which city is {his} employer run?
         | In which city is the company that employs {s} based?""",
    "works_for.product": """What does the company that employs {s} make? | What does {his} employer produce? | What is made by the company {s} works for?
         | What does the company where {s} has a job manufacture? | What goods come from the company that employs {s}?""",
    "teacher.profession": """What was the profession of {his} teacher? | What is the person who taught {s} by profession?
         | What does {his} teacher do for a living? | What is the trade of the person who taught {s}? | As what does the teacher of {s} earn a living?""",
}

# ----------------------------------------------------------------------------------------------------------------------------------- fillers
PROFESSIONS = """actor architect baker barber blacksmith bookbinder botanist butcher carpenter chemist clockmaker cook dentist engineer farmer florist
    gardener geologist glazier interpreter judge lawyer librarian locksmith mason mathematician miner nurse optician painter pharmacist photographer pilot
    plumber potter sailor sculptor shepherd surgeon surveyor tailor translator vet weaver welder zoologist""".split()
INSTRUMENTS = """accordion balalaika banjo bassoon bugle cello clarinet concertina cornet dulcimer fiddle flute glockenspiel guitar
    harmonica harp harpsichord horn lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone sitar tambourine trombone trumpet tuba
    viola violin xylophone zither""".split()
HOBBIES = """archery astronomy badminton beekeeping birdwatching boxing calligraphy canoeing caving chess climbing cricket cycling dancing embroidery
    falconry fencing fishing golf hiking juggling karate kite-flying knitting foraging orienteering origami puppetry quilting riding rowing running
    sailing skating skiing sketching surfing swimming tennis wrestling""".split()
TRAITS = "blue brass cast-iron copper folding glass hand-made leather miniature painted patented pocket portable red silver steel striped wooden".split()
WARES = """bicycles boxes buckets buttons carts chairs clocks combs dolls drums gloves kettles knives ladders lamps mirrors pens pipes saddles scales
    shovels skates tables umbrellas whistles""".split()
STYLES = "baked candied dried fried grilled pickled roasted salted smoked spiced stewed sugared sweet toasted wild".split()
FOODS = "almonds apples apricots carrots cherries chestnuts crabs eels figs herring mushrooms mussels onions pears plums pumpkins quinces trout walnuts".split()
ONSETS = "b br d dr f g gr h k kr l m n p r s st t tr v w z".split()
CODAS = "l ld lm m n nd r rn rt sk".split()
SPLITS = ("train", "dev", "test")
TRAIN_WORDINGS = 3  # wordings asked per fact in the train questions; dev and test ask once


def _options(text: str) -> list[str]:
    return [" ".join(option.split()) for option in text.split("|")]


RELATIONS = {
    kind: {relation: tuple(map(_options, pair)) for relation, pair in table.items()}
    for kind, table in (("person", PERSON), ("city", CITY), ("company", COMPANY))
}  # kind -> relation -> (statements, questions)
TWO_HOP = {path: _options(text) for path, text in PATHS.items()}


def _possessive(name: str) -> str:
    return name + ("'" if name.endswith("s") else "'s")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def render(wording: str, name: str, obj: str = "", mention: str | None = None) -> str:
    """The wording with its subject and object filled in; `mention` is the surname or the pronoun she, he or it, and the full name by default."""
    mention = mention or name
    him = {"she": "her", "he": "him"}.get(mention, mention)
    his = {"she": "her", "he": "his", "it": "its"}.get(mention) or _possessive(mention)
    article = (
        "an" if obj[:1] in "aeiou" else "a"
    )  # the fillers have no silent h and no "u" that sounds like "you"
    return wording.format(
        name=name,
        S=_capital(mention),
        s=mention,
        him=him,
        His=_capital(his),
        his=his,
        o=obj,
        O=_capital(obj),
        an_o=f"{article} {obj}",
    )


# ----------------------------------------------------------------------------------------------------------------------------------- the world
@dataclass(frozen=True)
class World:
    """Made by `make`. Lists are in order, people from the best to the least known; nothing here is ever changed."""

    seed: int
    people: list[str]  # full names
    cities: list[str]
    companies: list[str]
    countries: list[str]
    pronoun: dict[str, str]  # person -> "she" | "he"; city, company -> "it"
    kind: dict[str, str]  # subject -> "person" | "city" | "company"
    split: dict[str, str]  # person -> "train" | "dev" | "test"
    facts: dict[str, dict[str, str]]  # subject -> relation -> object

    def answer(self, subject: str, path: str) -> str:
        """Walks the facts: answer("Anna Teller", "born_in.country")."""
        for relation in path.split("."):
            subject = self.facts[subject][relation]
        return subject

    def documents(self, count: int, seed: int = 1, qa: float = 0.4, people: float = 0.75):
        """Yields `count` documents; a larger count continues a smaller one. `qa` is the share of qa documents, `people` the share of documents about
        people. The other quarter goes to cities and companies, so few that each of their facts is told several times as often as a person's."""
        rng = random.Random(f"{self.seed} documents {seed}")
        places = self.cities + self.companies
        anyone, place = _deck(rng, self.people), _deck(rng, places)
        pupil, pupil_place = (
            _deck(rng, [p for p in self.people if self.split[p] == "train"]),
            _deck(rng, places),
        )
        relations = {subject: _deck(rng, list(facts)) for subject, facts in self.facts.items()}
        popularity = list(
            itertools.accumulate((rank + 1) ** -0.8 for rank in range(len(self.people)))
        )
        for _ in range(count):
            about_person = rng.random() < people
            if rng.random() < qa:
                yield qa_document(self, next(pupil if about_person else pupil_place), rng)
            elif not about_person:
                yield article(self, next(place), relations, rng)
            elif rng.random() < 0.6:  # the floor: everyone in turn
                yield article(self, next(anyone), relations, rng)
            else:  # the long tail
                yield article(
                    self, rng.choices(self.people, cum_weights=popularity)[0], relations, rng
                )

    def questions(self, split: str) -> list[dict]:
        """All questions about the people of one split, half of them with one hop and half with two."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
        rng = random.Random(f"{self.seed} questions {split}")
        one_hop = {relation: asks for relation, (_, asks) in RELATIONS["person"].items()}
        out = []
        for person in self.people:
            if self.split[person] != split:
                continue
            for path, wordings in (one_hop | TWO_HOP).items():
                for wording in rng.sample(wordings, TRAIN_WORDINGS if split == "train" else 1):
                    out.append(
                        {
                            "id": f"{split}-{len(out):06d}",
                            "question": render(wording, person),
                            "answer": [self.answer(person, path)],
                            "hops": 1 + path.count("."),
                            "task": f"{('one', 'two')[path.count('.')]}-hop",
                            "relation": path,
                            "subject": person,
                        }
                    )
        return out

    def triples(self) -> list[dict]:
        """Every fact as {subject, kind, relation, object, split}."""
        return [
            {
                "subject": subject,
                "kind": self.kind[subject],
                "relation": relation,
                "object": obj,
                "split": self.split.get(subject),
            }
            for subject, facts in self.facts.items()
            for relation, obj in facts.items()
        ]

    def hash(self) -> str:
        """SHA-256 of the facts, the splits, all questions, all wordings and the first 1,000 documents, so that a change of the code shows too."""
        everything = [
            self.triples(),
            [self.questions(split) for split in SPLITS],
            RELATIONS,
            TWO_HOP,
            list(self.documents(1000)),
        ]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def write(self, out: str | Path, documents: int = 20000, seed: int = 1) -> None:
        """Writes the world to the new or empty folder `out`, which appears complete or not at all."""
        out = Path(out).absolute()
        if documents < 1:
            raise ValueError(f"documents: {documents} is not at least 1")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(
                f"{out} exists and is not empty: choose another folder or remove it"
            )
        questions = {split: self.questions(split) for split in SPLITS}
        info = {
            "seed": self.seed,
            "people": len(self.people),
            "cities": len(self.cities),
            "companies": len(self.companies),
            "countries": len(self.countries),
            "facts": len(self.triples()),
            "questions": {split: len(rows) for split, rows in questions.items()},
            "documents": documents,
            "documents_seed": seed,
            "hash": self.hash(),
        }
        files = {
            "facts.jsonl": self.triples(),
            "corpus.jsonl": self.documents(documents, seed),
            "world.json": [info],
            **{f"questions-{split}.jsonl": rows for split, rows in questions.items()},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            temporary.mkdir()
            for name, rows in files.items():
                with open(temporary / name, "w", encoding="utf-8", newline="\n") as f:
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    f.flush()
                    os.fsync(f.fileno())
            os.rename(temporary, out)  # replaces an empty folder, refuses a full one
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _deck(rng, items):
    """Endless draws in which everything comes up once before anything comes up again."""
    while True:
        yield from rng.sample(items, len(items))


# ----------------------------------------------------------------------------------------------------------------------------------- genres
def article(world: World, subject: str, relations: dict, rng: random.Random) -> dict:
    """1 to 4 facts about one subject; `relations` holds a deck per subject, so that over many articles all its facts are told equally often."""
    count = rng.choices((1, 2, 3, 4), weights=(1, 3, 5, 5))[0]
    told, sentences, mention = [], [], subject
    while len(told) < count:
        relation = next(relations[subject])
        if relation in told:  # the deck was shuffled anew in the middle of this article
            continue
        told.append(relation)
        wording = rng.choice(RELATIONS[world.kind[subject]][relation][0])
        sentences.append(render(wording, subject, world.facts[subject][relation], mention))
        surname = subject.split()[-1] if world.kind[subject] == "person" else subject
        # After a sentence with a second person in it, "she" could be either of them.
        mention = (
            subject
            if relation == "teacher"
            else rng.choice((world.pronoun[subject], world.pronoun[subject], surname))
        )
    return {"genre": "article", "title": subject, "text": " ".join(map(_capital, sentences))}


def qa_document(world: World, subject: str, rng: random.Random) -> dict:
    """A one-hop question about the subject, in one of its wordings, with its answer."""
    relation = rng.choice(list(world.facts[subject]))
    wording = rng.choice(RELATIONS[world.kind[subject]][relation][1])
    return {
        "genre": "qa",
        "question": render(wording, subject),
        "answer": [world.facts[subject][relation]],
    }


# ----------------------------------------------------------------------------------------------------------------------------------- making it
def _new(rng, used: set, draw) -> str:
    """The first draw that is not yet the name of anything."""
    while (name := draw()) in used:
        pass
    used.add(name)
    return name


def _cycle(rng, items, count: int) -> list:
    """`count` of the items in random order, each about equally often."""
    return list(itertools.islice(_deck(rng, list(items)), count))


def make(
    seed: int = 1,
    people: int = 300,
    cities: int | None = None,
    companies: int | None = None,
    countries: int = 16,
) -> World:
    """The world of this seed; by default 10 people per city and 12 per company."""
    cities = max(8, people // 10) if cities is None else cities
    companies = max(8, people // 12) if companies is None else companies
    limits = {
        "people": (people, 20, 20000),
        "cities": (cities, 4, 2000),
        "companies": (companies, 4, 2000),
        "countries": (countries, 2, 100),
    }
    for what, (size, low, high) in limits.items():
        if not low <= size <= high:
            raise ValueError(f"{what}: {size} is not between {low} and {high}")
    rng, used, pronoun = random.Random(f"{seed} world"), set(), {}
    pick = rng.choice

    def names(count, draw):
        return [_new(rng, used, draw) for _ in range(count)]

    # Names share their parts: surnames, cities, rivers and countries a pool of roots; people first names and surnames; companies and some cities a surname.
    roots = names(
        min(600, max(40, people // 8)),
        lambda: pick(ONSETS).capitalize() + pick("aeiou") + pick(CODAS),
    )
    surnames = names(
        min(3000, max(16, people // 5)),
        lambda: pick(roots) + pick(("en", "er", "ell", "ing", "berg", "mann", "ow", "by")),
    )
    firsts = {
        she: names(
            min(400, max(8, people // 16)),
            lambda: pick(ONSETS).capitalize() + pick("aeiou") + pick("dlmnrv") + pick(ends),
        )
        for she, ends in (("she", ("a", "ia", "ena", "issa")), ("he", ("an", "ek", "o", "or")))
    }

    def full_names(count):
        who = _cycle(rng, ("she", "he"), count)
        new = [_new(rng, used, lambda: f"{pick(firsts[she])} {pick(surnames)}") for she in who]
        pronoun.update(zip(new, who))
        return new

    country = names(countries, lambda: pick(roots) + pick(("ia", "land", "ova", "istan")))
    city = names(
        cities,
        lambda: (
            f"{pick(('Port', 'Upper', 'Fort', 'Saint'))} {pick(surnames)}"
            if rng.random() < 0.2
            else pick(roots) + pick(("stad", "wick", "haven", "au", "ona", "field", "mor", "ton"))
        ),
    )
    river = names(cities, lambda: pick(roots) + pick(("a", "e", "in", "une", "ax", "olo")))
    company = names(
        companies,
        lambda: (
            f"{pick(surnames)} {pick(('Works', 'Group', 'Trading', 'Brothers', 'Union', 'Partners'))}"
        ),
    )
    person = full_names(people)
    facts = {name: {} for name in person + city + company}
    facts |= _table(
        city,
        country=_cycle(rng, country, cities),
        river=river,
        mayor=full_names(cities),
        known_for=_cycle(rng, [f"{style} {food}" for style in STYLES for food in FOODS], cities),
    )
    facts |= _table(
        company,
        headquarters=_cycle(rng, city, companies),
        product=_cycle(rng, [f"{trait} {ware}" for trait in TRAITS for ware in WARES], companies),
        founder=full_names(companies),
        founded=_cycle(rng, [str(year) for year in range(1840, 2020)], companies),
    )
    # Per twenty people of neighbouring popularity: 12 train, 3 dev, 5 test.
    split = dict(zip(person, _cycle(rng, ["train"] * 12 + ["dev"] * 3 + ["test"] * 5, people)))
    facts |= _person_facts(
        rng, split, city, {name: facts[name]["headquarters"] for name in company}
    )
    kind = (
        dict.fromkeys(person, "person")
        | dict.fromkeys(city, "city")
        | dict.fromkeys(company, "company")
    )
    return World(
        seed,
        person,
        city,
        company,
        country,
        {name: pronoun.get(name, "it") for name in kind},
        kind,
        split,
        facts,
    )


def _table(subjects: list[str], **columns: list[str]) -> dict:
    return {
        subject: dict(zip(columns, row))
        for subject, row in zip(subjects, zip(*columns.values(), strict=True), strict=True)
    }


def _person_facts(
    rng, split: dict[str, str], city: list[str], headquarters: dict[str, str]
) -> dict:
    """The facts of everyone in `split`. Two of the choices are not free, so that questions keep their hops and their split."""
    born, lives = zip(*(rng.sample(city, 2) for _ in split))
    fellows = {label: [person for person in split if split[person] == label] for label in SPLITS}
    employer, teacher = [], []
    for i, (person, label) in enumerate(split.items()):
        # The employer sits in a third city: no article on this person contains the answer to works_for.headquarters by accident.
        while headquarters[company := rng.choice(list(headquarters))] in (born[i], lives[i]):
            pass
        # The teacher comes from the same split: dev and test people do not even occur as answers in qa documents.
        while (other := rng.choice(fellows[label])) == person:
            pass
        employer.append(company)
        teacher.append(other)
    trade, instrument, hobby = (
        _cycle(rng, fillers, len(split)) for fillers in (PROFESSIONS, INSTRUMENTS, HOBBIES)
    )
    return _table(
        list(split),
        born_in=born,
        lives_in=lives,
        works_for=employer,
        profession=trade,
        teacher=teacher,
        instrument=instrument,
        hobby=hobby,
    )


def main(argv=None) -> World:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        help="new folder for the world's JSONL files; without it only the samples are shown",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="another seed is another world of the same sizes (default 1)",
    )
    parser.add_argument(
        "--people",
        type=int,
        default=300,
        help="number of people; there is one city per 10 and one company per 12 (default 300)",
    )
    parser.add_argument(
        "--documents", type=int, default=20000, help="documents in corpus.jsonl (default 20000)"
    )
    parser.error = lambda message: parser.exit(2, f"world.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        world = make(args.seed, args.people)
        if args.out:
            world.write(args.out, args.documents)
    except (ValueError, OSError) as error:
        print(f"world.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    print(
        f"{len(world.people)} people, {len(world.cities)} cities, {len(world.companies)} companies, {len(world.countries)} countries, "
        f"{len(world.triples())} facts, hash {world.hash()[:16]}"
    )
    for split in SPLITS:
        rows = world.questions(split)
        print(
            f"{split}: {len(rows)} questions, {sum(row['hops'] == 2 for row in rows)} of them with two hops"
        )
    for document in world.documents(8):
        print(
            f"  {document['genre']:8} {document.get('text') or document['question'] + ' -> ' + document['answer'][0]}"
        )
    for row in random.Random(world.seed).sample(world.questions("test"), 6):
        print(f"  {row['hops']}-hop    {row['question']} -> {row['answer'][0]}")
    return world


if __name__ == "__main__":
    main()
