"""Load the passages and questions that train.py's flags name, and search the passages.

    book = load_book(args)                       --passages, --train, --dev, --test, or the world's
    book = retrieve(args, book, folder)          every question with the passages that were found
    recalls(book.questions["dev"])               how often an answer is among the first 1, 5, 20

Needs retrieve.py, passages.py, questions.py, genres.py and what these need.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import eval as metrics
import genres
import parallel
import passages as books
import world
from checkpoints import read_json, read_tensors, resolve, write_json, write_lines
from families import OBJECT, bert_from_hf, check_keys
from passages import Passage, Question, with_found
from questions import check_unique
from rerank import CrossEncoder, find_format
from retrieve import (
    BM25,
    POOLINGS,
    DenseIndex,
    DualEncoder,
    Found,
    hash_passages,
    hybrid,
    tune_weight,
)
from world import SPLITS

RECALL_AT = (1, 5, 20, 100)
TUNED_AT = 5  # the weight of a hybrid search has the best recall@5 on dev

# The passages and the questions


@dataclass
class Book:
    """The passages, with unique ids, and the questions of each split."""

    passages: list[Passage]
    questions: dict[str, list[Question]]
    path: str | None = None  # the file of the passages, if it is one

    def hash(self) -> str:
        """What identifies the passages and the questions with all that is known of them."""
        known = hash_passages(self.passages) if self.passages else ""
        digest = hashlib.sha256(known.encode())
        for split in SPLITS:
            for q in self.questions[split]:
                text = repr((split, replace(q, source="")))
                digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def load_book(args) -> Book:
    """Read --passages, --train, --dev and --test, or make the open book of the embedded world.

    --passages is a book (psgs_w100.tsv or JSON lines of passages) or a retrieval result, which is
    a book of what was found. Without --train, its questions are cut into train, dev and test.
    Questions without an answer train re-rankers, and no reader. FileNotFoundError or ValueError if
    a file is missing or malformed, or if two questions of a file have one id.
    """
    found, listed, questions = None, [], dict.fromkeys(SPLITS, ())
    if args.passages and holds_questions(args.passages):
        found = books.read_questions(args.passages)
    elif args.passages:
        listed = books.read_passages(args.passages)
    elif not args.train:
        listed, records = genres.library(world.make(args.world_seed))
        listed = [Passage(p["title"], p["text"], p["id"]) for p in listed]
        by_id = {passage.id: passage for passage in listed}
        for split in SPLITS:
            rows = enumerate(records[split])
            parsed = [books.parse_question(r, by_id, f"world {split}:{i}") for i, r in rows]
            questions[split] = parsed
    for split in SPLITS:
        if path := getattr(args, split):
            named = listed or [passage for q in found or () for passage in q.found]
            questions[split] = books.read_questions(path, named)
    if found and not args.train:
        if args.dev or args.test:
            problem = "is cut into train, dev and test; --dev and --test need --train"
            raise ValueError(f"--passages {args.passages} {problem}")
        if len(found) < 3:
            problem = f"{len(found)} questions are too few to cut into train, dev and test"
            raise ValueError(f"--passages {args.passages}: {problem}; --train names others")
        questions |= split_questions(found, args.seed)
    if not questions["train"]:
        raise ValueError(f"--passages {args.passages} is a book: --train names the questions")
    for split in SPLITS:
        reads = args.method == "reader" and not (split == "train" and trains_rerankers(args))
        questions[split] = check_questions(questions[split], reads)
    if found and args.train:
        results = {books.bare_question(q.question): q for q in found}
        for split in SPLITS:
            questions[split] = [take_results(q, results, args.passages) for q in questions[split]]
    book = Book(listed, questions, args.passages if listed and args.passages else None)
    return book if book.path else collect(book)


def trains_rerankers(args) -> bool:
    """Whether a reader trains its own re-rankers."""
    return args.top > 0 and not args.no_rerank and not args.reranker


def holds_questions(path: str) -> bool:
    """Whether the first record of a file is a question."""
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        return False
    _, record = next(books.json_records(path), ("", {}))
    return "question" in record


def split_questions(questions: list[Question], seed: int) -> dict[str, list[Question]]:
    """Cut a retrieval result into train, dev and test, 8 to 1 to 1."""
    order = list(questions)
    random.Random(seed).shuffle(order)
    tenth = max(1, len(order) // 10)
    return {"dev": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}


def check_questions(questions: Sequence[Question], answered: bool) -> list[Question]:
    """Return the questions, spelt by books.bare_question. ValueError if an id occurs twice.

    answered: leave out questions without an answer, which a reader cannot be scored on.
    """
    check_unique(questions)
    kept = [q for q in questions if q.answers or not answered]
    return [replace(q, question=books.bare_question(q.question)) for q in kept]


def take_results(question: Question, results: dict[str, Question], path: str) -> Question:
    """The question with what was found for it in the file `path`."""
    if question.question not in results:
        raise ValueError(f"{question.source}: {path} has no results for {question.question!r}")
    result = results[question.question]
    known = question.positives or result.positives
    return replace(question, found=result.found, scores=result.scores, positives=known)


def collect(book: Book) -> Book:
    """The book with all passages of its questions. Equal passages become one, with an id."""
    known, ids = {}, set()

    def adopt(passage: Passage) -> Passage:
        if passage[:2] not in known:
            taken = not passage.id or passage.id in ids
            new = passage._replace(id=f"passage-{len(known)}") if taken else passage
            known[passage[:2]] = new
            ids.add(new.id)
        return known[passage[:2]]

    for passage in book.passages:
        adopt(passage)
    lists = ("positives", "hard_negatives", "negatives", "found")
    questions = {
        split: [replace(q, **{k: list(map(adopt, getattr(q, k))) for k in lists}) for q in part]
        for split, part in book.questions.items()
    }
    return Book(list(known.values()), questions)


def write_book(path: Path, passages: Sequence[Passage]) -> None:
    """Write passages as JSON lines, which read_passages reads without a change."""
    write_lines(path, [{"id": p.id, "title": p.title, "text": p.text} for p in passages])


def write_found(path: Path, questions: Sequence[Question]) -> None:
    """Write questions with what was found, a DPR result a line. What was found is named by its id;
    positives stand there in full, because the book may lack them."""
    lines = []
    for q in questions:
        hits = zip(q.found, q.scores, books.answer_hits(q))
        ctxs = [{"id": p.id, "score": score, "has_answer": hit} for p, score, hit in hits]
        line = {"id": q.id, "task": q.task, "question": q.question, "answers": q.answers}
        lines.append(line | {"positive_ctxs": [p._asdict() for p in q.positives], "ctxs": ctxs})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, lines)


# Search


def encoder_folder(path: str | Path) -> Path:
    """The folder of a checkpoint: the model/ of a run, the folder itself, or of a hub id."""
    folder = resolve(path)
    return folder / "model" if (folder / "model").is_dir() else folder


def find_dual(args) -> tuple[Path, Path | None, str]:
    """The parts of --retriever: the BERT of questions, that of passages if it is another, pooling.

    --retriever is a run of --method retriever, a folder with question/ and maybe passage/, such as
    DPR's two encoders, or a published BERT for both sides. A run's own record says which pooling
    it was trained with; for anything else --pooling says it. FileNotFoundError or ValueError if it
    is none of them.
    """
    folder = encoder_folder(args.retriever)
    record, pooling = folder.parent / "run.json", args.pooling
    if not (folder / "question").is_dir():
        return check_bert(folder), None, pooling
    if folder.name == "model" and record.is_file():
        known = read_json(record)
        check_keys(record, known, {"arguments": OBJECT}, ["arguments"])
        check_keys(record, known["arguments"], {"pooling": POOLINGS}, ["pooling"])
        pooling = known["arguments"]["pooling"]
    second = check_bert(folder / "passage") if (folder / "passage").is_dir() else None
    return check_bert(folder / "question"), second, pooling


def load_dual(args) -> DualEncoder:
    """Load the dual encoder of --retriever, which reads --encoder-len tokens at most."""
    dual = DualEncoder.from_pretrained(*find_dual(args), args.device)
    dual.max_len = min(dual.max_len, args.encoder_len)
    return dual


class Search:
    """Finds passages as --search says: by BM25, by a dual encoder, or by both.

    The indexes lie in `folder`. They are made if they are missing. ValueError if they are of other
    passages. `dev`: questions that choose the weight of a hybrid search, once.
    """

    def __init__(self, args, passages: Sequence[Passage], folder: Path, dev=()):
        self.passages, self.kind, self.weight = passages, args.search, None
        self.bm25 = self.dual = None
        if args.search != "dense":
            if not (folder / "bm25").is_dir():
                BM25(passages).save(folder / "bm25")
            self.bm25 = BM25.load(folder / "bm25", passages)
        if args.search != "bm25":
            self.dual = load_dual(args)
            if not (folder / "vectors").is_dir():
                vectors = self.dual.encode_passages(passages)
                DenseIndex(vectors).save(folder / "vectors", passages)
            self.index = DenseIndex.load(folder / "vectors", passages)
        if args.search == "hybrid":
            path = folder / "hybrid.json"
            if not path.is_file():
                write_json(path, self.choose_weight(dev))
            self.weight = read_json(path)["weight"]

    def find(self, questions: Sequence[str], k: int) -> list[Found]:
        """The k best passages of each question: [(row of the passage, score)]."""
        if self.kind == "bm25":
            return [self.bm25.search(question, k) for question in questions]
        if self.kind == "dense":
            return self.dense(questions, k)
        both = zip(*self.both(questions, k))
        return [hybrid(first, second, self.weight)[:k] for first, second in both]

    def dense(self, questions: Sequence[str], k: int) -> list[Found]:
        """What the dual encoder finds."""
        return [self.index.search(vector, k) for vector in self.dual.encode_questions(questions)]

    def both(self, questions: Sequence[str], k: int) -> tuple[list[Found], list[Found]]:
        """What either search finds, at least 1000 passages (Ram et al. 2022)."""
        depth = max(k, 1000)
        return self.dense(questions, depth), [self.bm25.search(q, depth) for q in questions]

    def choose_weight(self, dev: Sequence[Question]) -> dict:
        """Choose the factor of BM25's scores on dev. (Spider: 1 to 9, by recall@100.)"""
        if not dev:
            raise ValueError("--search hybrid: there are no dev questions to tune its weight on")
        both = self.both([q.question for q in dev], TUNED_AT)
        return choose_weight(dev, [self.passages] * len(dev), *both)


def choose_weight(dev: Sequence[Question], passages: Sequence, firsts, seconds) -> dict:
    """Choose the factor of the second scores by recall@5 on dev, among powers of two times
    std(first scores) / std(second scores). passages[i] are those that the rows in both lists of
    question i number. If a question has 5 or fewer, recall@1 decides. Second scores that are all
    equal get no weight."""

    def deviation(lists: list[Found]) -> float:
        return float(np.std([score for found in lists for _, score in found] or [0.0]))

    k = TUNED_AT if max(map(len, firsts)) > TUNED_AT else 1

    def hits(row: int, found: Found) -> bool:
        return any(books.answer_hits(with_found(dev[row], passages[row], found[:k])))

    spread = deviation(seconds)
    unit = deviation(firsts) / spread if spread else 0.0
    weights = [unit * 2.0**power for power in (0, -1, 1, -2, 2, -3, 3)]
    weight, share = tune_weight(firsts, seconds, hits, weights)
    return {"weight": weight, "spread": unit, f"recall@{k} on dev": share}


def retrieve(args, book: Book, folder: Path) -> Book:
    """Search for the questions without passages. Complete files of `folder`/retrieved are read."""
    questions, search = dict(book.questions), None
    for split, part in questions.items():
        missing = [row for row, q in enumerate(part) if needs_search(args, book, q)]
        if not missing or args.top == 0:
            continue
        path = folder / "retrieved" / f"{split}.jsonl"
        if parallel.first() and not path.is_file():
            search = search or Search(args, book.passages, folder, questions["dev"])
            results = search.find([part[row].question for row in missing], args.top)
            new = [with_found(part[r], book.passages, f) for r, f in zip(missing, results)]
            write_found(path, new)
        parallel.wait()
        questions[split] = list(part)
        for row, q in zip(missing, books.read_questions(path, book.passages), strict=True):
            questions[split][row] = replace(part[row], found=q.found, scores=q.scores)
    return replace(book, questions={s: cut_found(q, args.top) for s, q in questions.items()})


def cut_found(questions: Sequence[Question], top: int) -> list[Question]:
    """The questions with the first `top` passages that were found for each."""
    return [replace(q, found=q.found[:top], scores=q.scores[:top]) for q in questions]


def sort_found(questions: Sequence[Question], scores: Sequence, weight=0.0) -> list[Question]:
    """The questions with their found passages in descending score, which is the given one plus
    `weight` times that of the search."""
    ranked = []
    for q, values in zip(questions, scores, strict=True):
        total = np.array(values) + weight * np.array(q.scores)
        order = np.argsort(-total, kind="stable").tolist()
        ranked.append(with_found(q, q.found, [(row, float(total[row])) for row in order]))
    return ranked


def rerank_found(questions: Sequence[Question], encoder: CrossEncoder, weight=0.0):
    """The questions with their found passages sorted by the re-ranker, as in `sort_found`."""
    scores = encoder.score_all([q.question for q in questions], [q.found for q in questions])
    return sort_found(questions, [values.tolist() for values in scores], weight)


def choose_mixture(dev: Sequence[Question], scores: Sequence[list[float]]) -> dict:
    """Choose the weight of `sort_found` on dev questions, with the scores of a re-ranker."""
    lists = [(list(enumerate(new)), list(enumerate(q.scores))) for q, new in zip(dev, scores)]
    return choose_weight(dev, [q.found for q in dev], *zip(*lists))


def needs_search(args, book: Book, question: Question) -> bool:
    """Whether a question needs a search. Retriever and re-ranker use the lists of a DPR file if no
    --passages is given."""
    if question.found:
        return False
    uses_own = args.train and not book.path and args.method != "reader"
    return not (uses_own and (question.hard_negatives or question.negatives))


def recalls(questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """{"answer": {"1": ..., "5": ...}, "gold": {...}}: the questions with a hit among the first k.

    A hit is a passage that holds an answer (DPR), or one that is known to be a positive.
    """
    depth = max(len(q.found) for q in questions)
    sizes = [k for k in RECALL_AT if k <= depth] or [1]
    answered = [q for q in questions if q.answers]
    hits = {"answer": [books.answer_hits(q) for q in answered]} if answered else {}
    known = [q for q in questions if q.positives]
    if known:
        hits["gold"] = [books.gold_hits(q) for q in known]
    return {name: {str(k): metrics.recall_at(h, k) for k in sizes} for name, h in hits.items()}


# Encoders


def base_encoder(args) -> Path:
    """The folder that an encoder is trained from: --encoder, or assets/bert."""
    from runs import ASSETS

    if args.encoder:
        return check_bert(encoder_folder(args.encoder))
    if not (ASSETS / "bert" / "config.json").is_file():
        raise ValueError(
            f"{ASSETS / 'bert'}: holds no BERT; `python pretrain.py bert` makes one, and --encoder "
            "names its folder"
        )
    return ASSETS / "bert"


def check_bert(folder: Path) -> Path:
    """Return the folder. FileNotFoundError or ValueError if its config.json is not of a BERT."""
    bert_from_hf(folder / "config.json")
    return folder


def check_reranker(folder: Path) -> None:
    """FileNotFoundError or ValueError if a folder holds no BERT, or one without a rank head."""
    if find_format(read_tensors(check_bert(folder) / "model.safetensors")) is None:
        raise ValueError(
            f"--reranker {folder}: an encoder alone; --encoder trains a re-ranker of it"
        )


def hash_encoders(paths: Iterable[str | Path]) -> str:
    """What identifies the weights of encoders: a hash of their files."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(encoder_folder(path).rglob("model.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
