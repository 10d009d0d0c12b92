"""A small world that a language model can learn by heart: its facts, and questions about them.

A fact is a triple (subject, relation, object). Each relation has one object per subject. People,
cities and companies have invented names, so an answer can only come from what was read here.
genres.py tells the facts as documents, on which the embedded LM is pretrained. The methods are
compared on `World.questions`, on the passages of genres.py and on the tasks of suite.py.

People are split 60/15/25 into train, dev and test. One-hop questions ask for one fact. Two-hop
questions join two facts ("In which country was she born?"), and no document joins these two.

The wordings and the words that names are made of stand in assets/world/*.txt. Everything is a pure
function of its seeds.

    python world.py --out world

prints 640 people, 80 cities, 64 companies, 16 countries, 5056 facts, hash 928da88449a03e27  (14 s)

and writes facts, questions, 20,000 documents, passages and the prompted tasks to world/.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from show import Parser, run_program, show

# Wordings and words

ASSETS = Path(__file__).parent / "assets" / "world"


def read_sections(path: str | Path) -> dict[str, list[str]]:
    """The sections of a text file, in order: {"person.born_in": ["{S} was born in {o}.", ...]}.

    A line `[person.born_in]` starts a section, and each line after it is one entry. Blank lines and
    lines that start with # are skipped.
    """
    sections, name = {}, ""
    for line in map(str.strip, Path(path).read_text(encoding="utf-8").splitlines()):
        if line.startswith("["):
            name = line.removeprefix("[").removesuffix("]")
            sections[name] = []
        elif line and not line.startswith("#"):
            sections[name].append(line)
    return sections


def read_relations(path: str | Path) -> dict[str, dict[str, tuple[list[str], list[str]]]]:
    """kind -> relation -> (statements, questions); questions are the lines that end with "?"."""
    relations = {}
    for section, wordings in read_sections(path).items():
        if section.count(".") != 1:
            raise ValueError(f"{path}: the section [{section}] is not named kind.relation")
        kind, relation = section.split(".")
        statements = [wording for wording in wordings if not wording.endswith("?")]
        questions = [wording for wording in wordings if wording.endswith("?")]
        relations.setdefault(kind, {})[relation] = (statements, questions)
    return relations


RELATIONS = read_relations(ASSETS / "relations.txt")
TWO_HOP = read_sections(ASSETS / "two_hop.txt")  # "born_in.country" -> questions
WORDS = read_sections(ASSETS / "words.txt")
SPLITS = ("train", "dev", "test")
COUNTRIES = 16
MAX_DRAWS = 10_000  # give up after so many draws in a row without a new one
TRAIN_WORDINGS = 3  # train questions ask each fact in three wordings; dev and test ask once


def possessive(name: str) -> str:
    """Teller's, Teller Works'."""
    return name + ("'" if name.endswith("s") else "'s")


def capital(text: str) -> str:
    """The text with its first letter in upper case and the others unchanged."""
    return text[:1].upper() + text[1:]


def render(
    wording: str, name: str, obj: str = "", mention: str | None = None, **others: str
) -> str:
    """Fill in a wording. `mention` is the full name (default), the surname, or she, he or it.

    `others` fill further fields, under their own names.
    """
    mention = mention or name
    him = {"she": "her", "he": "him"}.get(mention, mention)
    his = {"she": "her", "he": "his", "it": "its"}.get(mention) or possessive(mention)
    article = "an" if obj[:1] in "aeiou" else "a"
    subject = dict(name=name, s=mention, S=capital(mention), him=him, his=his, His=capital(his))
    object_ = dict(o=obj, O=capital(obj), an_o=f"{article} {obj}")
    return wording.format(**subject, **object_, **others)


def task(path: str) -> str:
    """The name under which scores on questions about a path of relations are reported.

    The path whose first answer is a person is reported apart: people share their first names, so
    the first token does not say who is meant.
    """
    if path == "teacher.profession":
        return "two-hop-person"
    return "two-hop" if "." in path else "one-hop"


# The world


@dataclass(frozen=True)
class World:
    """What `make` returns. People are in order of popularity, the best known first."""

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
        """Follow a path of relations: answer("Anna Teller", "born_in.country")."""
        for relation in path.split("."):
            subject = self.facts[subject][relation]
        return subject

    def questions(self, split: str) -> list[dict]:
        """All questions about the people of one split. Half have one hop, half have two."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
        rng = random.Random(f"{self.seed} questions {split}")
        one_hop = {relation: questions for relation, (_, questions) in RELATIONS["person"].items()}
        rows = []
        for person in self.people:
            if self.split[person] != split:
                continue
            for path, wordings in (one_hop | TWO_HOP).items():
                hops = 1 + path.count(".")
                for wording in rng.sample(wordings, TRAIN_WORDINGS if split == "train" else 1):
                    row = {"id": f"{split}-{len(rows):06d}", "question": render(wording, person)}
                    row |= {"answer": [self.answer(person, path)], "hops": hops}
                    row |= {"task": task(path), "relation": path, "subject": person}
                    rows.append(row)
        return rows

    def triples(self) -> list[dict]:
        """Every fact as {subject, kind, relation, object, split}."""
        return [
            dict(subject=s, kind=self.kind[s], relation=r, object=o, split=self.split.get(s))
            for s, facts in self.facts.items()
            for r, o in facts.items()
        ]

    def hash(self) -> str:
        """SHA-256 of the facts, splits, questions, wordings, passages and tasks of the world.

        1,000 documents and the dev examples make a change of genres.py or suite.py visible too.
        """
        import genres
        import suite

        everything = [
            self.triples(),
            [self.questions(split) for split in SPLITS],
            RELATIONS,
            TWO_HOP,
            list(genres.documents(self, 1000)),
            *suite.contents(self),
        ]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def write(self, out: str | Path, documents: int = 20000, seed: int = 1) -> None:
        """Write the world to the new or empty folder `out`. It appears complete or not at all."""
        import genres
        import suite

        out = Path(out)
        if documents < 1:
            raise ValueError(f"documents: {documents} is not at least 1")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(
                f"{out} exists and is not empty: choose another folder or remove it"
            )
        questions = {split: self.questions(split) for split in SPLITS}
        info = {"seed": self.seed}
        for group in ("people", "cities", "companies", "countries"):
            info[group] = len(getattr(self, group))
        info |= {
            "facts": len(self.triples()),
            "questions": {split: len(rows) for split, rows in questions.items()},
            "documents": documents,
            "documents_seed": seed,
            "hash": self.hash(),
        }
        files = {f"questions-{split}.jsonl": rows for split, rows in questions.items()}
        files |= {"world.json": [info], "facts.jsonl": self.triples()}
        files["corpus.jsonl"] = genres.documents(self, documents, seed)
        files |= suite.files(self, seed)
        write_folder(out.absolute(), files)


def write_folder(out: Path, files: dict) -> None:
    """Write {name: rows} as JSON lines to a temporary folder, then rename it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        for name, rows in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            with open(temporary / name, "w", encoding="utf-8", newline="\n") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                f.flush()
                os.fsync(f.fileno())
        os.rename(temporary, out)  # replaces an empty folder, refuses a full one
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Making a world


def deck(rng: random.Random, items: list):
    """Draw without end. Every item comes up once before any item comes up again."""
    if not items:
        raise ValueError("nothing can be drawn: there are no items")
    while True:
        yield from rng.sample(items, len(items))


def deal(rng: random.Random, items, count: int) -> list:
    """`count` of the items in random order, each about equally often."""
    return list(itertools.islice(deck(rng, list(items)), count))


def draw_other(rng: random.Random, items: list, excluded: set, what: str):
    """One item that is not excluded. ValueError, which begins with `what`, if there is none."""
    if all(item in excluded for item in items):
        raise ValueError(f"{what}: none of the {len(items)} can be drawn")
    while (item := rng.choice(items)) in excluded:
        pass
    return item


def table(subjects: list[str], **columns: list[str]) -> dict[str, dict[str, str]]:
    """Columns to rows: subject -> relation -> object."""
    rows = zip(*columns.values(), strict=True)
    return {subject: dict(zip(columns, row)) for subject, row in zip(subjects, rows, strict=True)}


class Names:
    """Invents names. No name is given twice, and many names share their parts."""

    def __init__(self, rng: random.Random, people: int):
        self.rng, self.count = rng, people
        self.used, self.pronoun = set(), {}
        self.roots = self.new(min(600, max(40, people // 8)), "onsets", "vowels", "codas")
        self.surnames = self.new(min(3000, max(16, people // 5)), self.roots, "surname_ends")
        self.firsts = {
            pronoun: self.new(
                min(400, max(8, people // 16)), "onsets", "vowels", "middles", f"{pronoun}_ends"
            )
            for pronoun in ("she", "he")
        }

    def join(self, *parts, sep: str = "") -> str:
        """One word from each part; a part is a list, or the name of a section of words.txt."""
        return sep.join(self.rng.choice(WORDS[p] if isinstance(p, str) else p) for p in parts)

    def unused(self, draw) -> str:
        """The first draw that is no name yet. ValueError if `MAX_DRAWS` are names already."""
        for _ in range(MAX_DRAWS):
            if (name := draw()) not in self.used:
                self.used.add(name)
                return name
        raise ValueError(
            f"people: the parts of the names of {self.count} people make too few names for so many "
            "cities or companies"
        )

    def new(self, count: int, *parts, sep: str = "") -> list[str]:
        return [self.unused(lambda: self.join(*parts, sep=sep)) for _ in range(count)]

    def city(self) -> str:
        if self.rng.random() < 0.2:
            return self.join("city_starts", self.surnames, sep=" ")
        return self.join(self.roots, "city_ends")

    def people(self, count: int) -> list[str]:
        """Full names. Half of the people are "she" and half are "he"."""
        names = []
        for pronoun in deal(self.rng, ("she", "he"), count):
            names += self.new(1, self.firsts[pronoun], self.surnames, sep=" ")
            self.pronoun[names[-1]] = pronoun
        return names


def make(
    seed: int = 1, people: int = 640, cities: int | None = None, companies: int | None = None
) -> World:
    """The world of this seed. By default there is one city per 8 people, one company per 10.

    ValueError if the people are too few or too many, or if the parts of their names make too few
    names for so many cities or companies.
    """
    if not 20 <= people <= 20_000:
        raise ValueError(f"people: {people} is not between 20 and 20000")
    cities = cities or min(2000, max(8, people // 8))
    companies = companies or max(8, people // 10)
    rng = random.Random(f"{seed} world")
    names = Names(rng, people)
    country = names.new(COUNTRIES, names.roots, "country_ends")
    city = [names.unused(names.city) for _ in range(cities)]
    river = names.new(cities, names.roots, "river_ends")
    company = names.new(companies, names.surnames, "company_ends", sep=" ")
    person = names.people(people)
    facts = {name: {} for name in person + city + company}  # fixes the order of the subjects
    facts |= table(
        city,
        country=deal(rng, country, cities),
        river=river,
        mayor=names.people(cities),
        known_for=deal(rng, pairs("styles", "foods"), cities),
    )
    facts |= table(
        company,
        headquarters=deal(rng, city, companies),
        product=deal(rng, pairs("traits", "wares"), companies),
        founder=names.people(companies),
        founded=deal(rng, [str(year) for year in range(1840, 2020)], companies),
    )
    # Of twenty people of neighbouring popularity, 12 are train, 3 dev and 5 test.
    split = dict(zip(person, deal(rng, ["train"] * 12 + ["dev"] * 3 + ["test"] * 5, people)))
    headquarters = {name: facts[name]["headquarters"] for name in company}
    facts |= person_facts(rng, split, city, headquarters)
    kind = {name: "person" for name in person}
    kind |= {name: "city" for name in city} | {name: "company" for name in company}
    pronoun = {name: names.pronoun.get(name, "it") for name in kind}
    return World(seed, person, city, company, country, pronoun, kind, split, facts)


def pairs(first: str, second: str) -> list[str]:
    """Two words for each object: "smoked eels", "brass lamps"."""
    return [f"{a} {b}" for a in WORDS[first] for b in WORDS[second]]


def person_facts(
    rng: random.Random, split: dict[str, str], cities: list[str], headquarters: dict[str, str]
) -> dict[str, dict[str, str]]:
    """The facts of everyone in `split`. Two choices are restricted, to keep questions clean."""
    born_in, lives_in = zip(*(rng.sample(cities, 2) for _ in split))
    fellows = {label: [name for name in split if split[name] == label] for label in SPLITS}
    companies, seated_in = list(headquarters), {city: set() for city in cities}
    for company, city in headquarters.items():
        seated_in[city].add(company)
    works_for, teacher = [], []
    for i, (person, label) in enumerate(split.items()):
        # The employer's seat is a third city. Otherwise an article that names the birthplace or
        # the home would name the answer to works_for.headquarters by accident.
        at_home = seated_in[born_in[i]] | seated_in[lives_in[i]]
        works_for.append(draw_other(rng, companies, at_home, "companies"))
        # The teacher is of the same split. Otherwise a dev or test person would be the answer of a
        # train question.
        teacher.append(draw_other(rng, fellows[label], {person}, "people"))
    return table(
        list(split),
        born_in=born_in,
        lives_in=lives_in,
        works_for=works_for,
        profession=deal(rng, WORDS["professions"], len(split)),
        teacher=teacher,
        instrument=deal(rng, WORDS["instruments"], len(split)),
        hobby=deal(rng, WORDS["hobbies"], len(split)),
    )


def main(argv=None) -> World:
    parser = Parser(prog="world.py", description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--out", help="new folder for the world's files; without it only samples are printed")
    option("--seed", type=int, default=1, help="another seed, another world")
    people = "with a city per 8, a company per 10; in small worlds, some tasks have fewer examples"
    option("--people", type=int, default=640, help=people)
    option("--documents", type=int, default=20000, help="documents in corpus.jsonl")
    args = parser.parse_args(argv)
    world = make(args.seed, args.people)
    if args.out:
        world.write(args.out, args.documents)
    print_samples(world)
    return world


def print_samples(world: World) -> None:
    """The world's sizes, a few documents, and a few test questions."""
    import genres

    show(
        f"{len(world.people)} people, {len(world.cities)} cities, "
        f"{len(world.companies)} companies, {len(world.countries)} countries, "
        f"{len(world.triples())} facts, hash {world.hash()[:16]}",
        result=True,
    )
    for split in SPLITS:
        rows = world.questions(split)
        two_hop = sum(row["hops"] == 2 for row in rows)
        show(f"{split}: {len(rows)} questions, {two_hop} of them with two hops", result=True)
    for row in genres.documents(world, 8):
        indented = row["text"].replace("\n", "\n           ")
        show(f"  {row['genre']:8} {indented}", result=True)
    for row in random.Random(world.seed).sample(world.questions("test"), 6):
        show(f"  {row['hops']}-hop    {row['question']} -> {row['answer'][0]}", result=True)


if __name__ == "__main__":
    run_program("world.py", main)
