"""The frozen reader: an LM answers from the passages that a search found, and only a prompt learns.

Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models", section 3. Its
stages lie below the folder of the run, and --resume goes on in the one that was interrupted:

    bm25, vectors             indexes of the passages; passages.jsonl, if they come from no file
    retrieved/SPLIT.jsonl     the passages that the search found for each question, best first
    reranker-a, reranker-b    runs of --method reranker on either half of the training questions
    reranker                  the same on all of them, for dev, test and new questions
    scores/a-train            how the re-ranker of half A scores the passages of half B
    scores/a-own              and how it scores those of half A, for comparison
    ranked/SPLIT.jsonl        the passages sorted by these scores
    mixed/SPLIT.jsonl         sorted by these scores plus the search's times the weight that dev
                              chose, which is in mixed.json; the order of --sort-by both

The run itself is a prompt (or with --tune lm an LM), trained on the questions behind the passages
that fit the LM's context. A re-ranker sorts the passages of its own training questions better than
those of new ones. Cross-fitting gives the prompt training data that looks like the test's. Training
questions that name a passage and no answer train the re-rankers alone.

Needs openbook.py, model.py and what these need. train.py trains.

    python train.py --method reader
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from show import show

import torch
from torch import Tensor

import data
import eval as metrics
import parallel
import passages as books
import recurse
import rerank
from checkpoints import read_json, write_json
from generate import predict
from openbook import (
    Book,
    Search,
    base_encoder,
    check_reranker,
    choose_mixture,
    encoder_folder,
    find_dual,
    recalls,
    rerank_found,
    retrieve,
    sort_found,
    write_book,
    write_found,
)
from passages import Question, with_found
from rerank import CrossEncoder, cross_fit, pack

QUESTIONS_IN_FILE = 128  # a kill costs at most the scores of so many questions

# Re-ranking


def rerank_splits(args, book: Book, folder: Path, train: Callable) -> tuple[Book, dict]:
    """Sort the passages of every question by a re-ranker, alone and with the search. Returns the
    book, in the order that --sort-by names, and what is recorded.

    train(name, questions of each split) -> CrossEncoder trains one in the folder `name`, or loads
    it if it is trained already. --reranker names one for all questions. Otherwise the training
    questions are cross-fitted, unless --no-cross-fit is given: then the re-ranker of all scores
    the questions that it was trained on.
    """
    questions, models, info = book.questions, {}, {}
    training = questions["train"]
    names = iter(["all"] if args.no_cross_fit else ["a", "b", "all"])  # as cross_fit trains them

    def train_fn(part: list[Question]) -> str:
        name = next(names)
        own = "reranker" if name == "all" else f"reranker-{name}"
        models[name] = train(own, questions | {"train": part, "test": []})
        return name

    def score_fn(name: str, part: list[Question], split="train") -> list[list[float]]:
        return score_split(args, models[name], part, folder / "scores" / f"{name}-{split}")

    if args.reranker:
        path = encoder_folder(args.reranker)
        models["all"] = CrossEncoder.from_pretrained(path, args.device, args.encoder_len)
        scores = score_fn("all", training)
    elif args.no_cross_fit:
        scores = score_fn(train_fn(training), training)
    else:
        scores, halves, _ = cross_fit(training, train_fn, score_fn, args.seed, key=half_key)
        info["halves"] = "".join(halves)
        info["cross-fitting"] = compare_halves(args, training, scores, halves, score_fn)
    scores = {"train": scores}
    for split in ("dev", "test"):
        scores[split] = score_fn("all", questions[split], split)
    weights = {"ranked": 0.0}
    if questions["dev"]:
        info["mixture"] = choose_mixture(questions["dev"], scores["dev"])
        weights["mixed"] = info["mixture"]["weight"]
    orders = {
        name: {split: sort_found(questions[split], scores[split], weight) for split in scores}
        for name, weight in weights.items()
    }
    if parallel.first():
        for name, order in orders.items():
            for split, part in order.items():
                write_found(folder / name / f"{split}.jsonl", part)
        if questions["dev"]:
            write_json(folder / "mixed.json", info["mixture"])
    info["format"] = str(models["all"].format)
    show(f"re-ranker: {info['format']}")
    return replace(book, questions=orders["mixed" if args.sort_by == "both" else "ranked"]), info


def half_key(question: Question) -> str:
    """Questions with the same key lie in the same half: the same answers in the same passage."""
    return repr((question.answers, question.positives[:1] or question.question))


def score_split(args, encoder: CrossEncoder, questions, folder: Path) -> list[list[float]]:
    """Score what was found for the questions. Complete files of them are read instead."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = []

    def score(part: list[Question]) -> list[Tensor]:
        return encoder.score_all([q.question for q in part], [q.found for q in part])

    for start in rerank.progress(range(0, len(questions), QUESTIONS_IN_FILE), "files"):
        path, part = folder / f"{start:06d}.json", questions[start : start + QUESTIONS_IN_FILE]
        if not path.is_file():
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                new = parallel.divide(score, part)
            if parallel.first():
                write_json(path, {"scores": [values.tolist() for values in new]})
        parallel.wait()
        scores += read_json(path)["scores"]
    return scores


def compare_halves(args, training, scores, halves: list[str], score_fn: Callable) -> dict:
    """Recall on training questions, at most --eval-limit, sorted by the re-ranker that was trained
    on them and by the one of the other half.

    `scores` are those of the latter; score_fn(name of a re-ranker, questions, name of the scores)
    -> scores.
    """
    rows = data.sample(len(training), args.eval_limit, args.seed)
    questions, own = [training[row] for row in rows], {}
    for half in "AB":
        part = [row for row in rows if halves[row] == half]
        own |= zip(part, score_fn(half.lower(), [training[row] for row in part], "own"))
    by_own = recalls(sort_found(questions, [own[row] for row in rows]))
    by_other = recalls(sort_found(questions, [scores[row] for row in rows]))
    return {"n": len(rows), "own half": by_own, "held-out half": by_other}


# Packing and reading


def pack_inputs(args, tokenizer, left: int, questions: Sequence[Question], targets=()) -> tuple:
    """Put the passages that fit before each question. Returns (texts, packed passages, dropped).

    left     positions of the LM's context that the prompt leaves
    targets  the answers that training teaches, which need a place too
    `dropped` counts the passages that did not fit. Those beyond --max-packed are not counted.
    """
    lines = list(dict.fromkeys(p for q in questions for p in q.found))
    joined = [f"{books.reader_line(p)}\n" for p in lines]
    rows = tokenizer.encode_batch(joined, add_special_tokens=False)
    lengths = {p: len(row.ids) for p, row in zip(lines, rows)}
    asked = data.encode_prompts(tokenizer, [data.question_text(q.question) for q in questions])
    answers = data.encode_prompts(tokenizer, [f" {target}" for target in targets])
    texts, packed, dropped = [], [], 0
    for row, q in enumerate(questions):
        # A target takes its tokens, one more if it is split in another way behind the text, and
        # EOS. The last of them is predicted but never read. (A BOS is counted once too often.)
        answer = len(answers[row]) + 1 if targets else 0
        limit = left - max(args.max_new_tokens - 1, answer)
        budget = max(0, limit - len(asked[row]))
        kept, out = pack(q.found, q.scores, budget, lengths.get)
        kept = kept[: args.max_packed]
        text = books.reader_text(q.question, kept)
        while kept and len(data.encode_prompts(tokenizer, [text])[0]) > limit:
            kept, out = kept[:-1], out + 1  # some tokenizers split joined lines otherwise
            text = books.reader_text(q.question, kept)
        texts.append(text)
        packed.append(kept)
        dropped += out
    return texts, packed, dropped


def answered(questions: Sequence[Question]) -> list[Question]:
    """The questions with an answer. The others train re-rankers alone."""
    return [q for q in questions if q.answers]


def examples(book: Book) -> dict[str, list[data.Example]]:
    """The answered questions of each split as the LM's examples, without passages."""
    made = {}
    for split, part in book.questions.items():
        made[split] = []
        for q in answered(part):
            text, answers = data.question_text(q.question), tuple(map(str.strip, q.answers))
            example = data.Example(text, answers[0], answers, q.task, q.id, q.source)
            made[split].append(example)
    return made


def check(args, book: Book) -> list[str | Path]:
    """Refuse what cannot be done, before anything is written. Returns the encoders in use."""
    reads, encoders = args.method == "reader", []
    if reads and not answered(book.questions["train"]):
        raise ValueError(f"{args.train or args.passages}: no training question has an answer")
    if reads and args.top == 0:
        return encoders
    if reads and not book.passages:
        file = f"--passages {args.passages}" if args.passages else f"--train {args.train}"
        raise ValueError(f"{file}: holds no passages; --passages names a file that does")
    if args.search != "bm25" and not args.retriever:
        raise ValueError(f"--search {args.search} needs --retriever, the folder of a dual encoder")
    found = all(q.found for part in book.questions.values() for q in part)
    searches = reads or not found  # a reader searches for later questions, too
    if args.search == "hybrid" and searches and not book.questions["dev"]:
        raise ValueError("--search hybrid: there are no dev questions to tune its weight on")
    if args.search != "bm25":
        find_dual(args)
        encoders.append(args.retriever)
    if not reads:
        return [*encoders, base_encoder(args)]
    if args.no_rerank:
        if args.sort_by == "both":
            raise ValueError("--sort-by both: with --no-rerank there is one score")
        return encoders
    if args.sort_by == "both" and not book.questions["dev"]:
        raise ValueError("--sort-by both: there are no dev questions to tune its weight on")
    if args.sort_by == "both" and any(q.found for part in book.questions.values() for q in part):
        raise ValueError("--sort-by both: the scores of a given result are of another search")
    if args.reranker:
        check_reranker(encoder_folder(args.reranker))
    keys = set(map(half_key, book.questions["train"]))
    if len(keys) < 2 and not (args.reranker or args.no_cross_fit):
        raise ValueError("one question cannot be cut into halves; --no-cross-fit does without")
    return [*encoders, args.reranker or base_encoder(args)]


def prepare(task, book: Book, folder: Path, train: Callable) -> tuple:
    """Retrieve, re-rank and pack. Returns (the task, its questions behind passages; a record).

    `task` is start.Task, with the questions of `book`. train: see `rerank_splits`.
    """
    args, info = task.args, {}
    if not book.path and parallel.first():
        write_book(folder / "passages.jsonl", book.passages)
    found = ranked = retrieve(args, book, folder)
    reranks = not args.no_rerank and args.top > 0
    if reranks:
        ranked, info = rerank_splits(args, found, folder, train)
    tokens, left = {}, recurse.positions_left(vars(args), task.lm.config, args.prompt_length)
    for split, part in ranked.questions.items():
        part = answered(part)
        if not part:
            tokens[split] = []
            continue
        training = split == "train"
        targets = [e.target for e in task.examples[split]] if training else ()
        texts, packed, dropped = pack_inputs(args, task.tokenizer, left, part, targets)
        table = {"n": len(part), "retrieved": recalls(answered(found.questions[split]))}
        table |= {"re-ranked": recalls(part)} if reranks else {}
        table["input"] = recall_at_input(part, packed, dropped)
        info[split] = table
        show_passages(split, table)
        if training:
            asked = [replace(e, input=t) for e, t in zip(task.examples[split], texts)]
            config = task.lm.config
            eos = config.eos[0] if config.eos else None
            tokens[split] = data.tokenize(asked, task.tokenizer, eos, left, config.vocab_size)
        else:
            rows = data.encode_prompts(task.tokenizer, texts)
            tokens[split] = [data.TokenizedExample(ids, []) for ids in rows]
    return replace(task, tokens=tokens), info


def show_passages(split: str, table: dict) -> None:
    """Print recall of a split at each stage, and what reaches the LM."""
    for stage in ("retrieved", "re-ranked"):
        for hit, row in table.get(stage, {}).items():
            shares = "  ".join(f"@{k} {100 * share:5.1f}" for k, share in row.items())
            show(f"{split:5} {stage:9} {hit:6} recall {shares}   ({table['n']} questions)")
    row = table["input"]
    shares = ", ".join(f"{hit} {100 * row[hit]:.1f}" for hit in ("answer", "gold") if hit in row)
    read = f"{row['passages']:.1f} passages a question, {row['dropped']} do not fit"
    show(f"{split:5} the LM reads {read}; recall there: {shares}")


def recall_at_input(questions: Sequence[Question], packed: list, dropped: int) -> dict:
    """What reaches the LM: recall as in `recalls`, passages a question, and the dropped ones."""
    read = [replace(q, found=kept) for q, kept in zip(questions, packed)]
    n, known = len(read), [q for q in read if q.positives]
    table = {"answer": sum(any(books.answer_hits(q)) for q in read) / n}
    if known:
        table["gold"] = sum(any(books.gold_hits(q)) for q in known) / len(known)
    return table | {"passages": sum(map(len, packed)) / n, "dropped": dropped}


class Reader(recurse.Around):
    """An LM, with the LM's interface, whose questions get their passages first.

    `questions.prepare` calls `read_back` on its examples. The passages and the encoders are loaded
    when the first question is asked.
    """

    def __init__(self, lm, tokenizer, args: Namespace, folder: Path):
        super().__init__(lm)
        self.tokenizer, self.args, self.folder = tokenizer, args, folder
        self.search, self.encoder, self.weight = None, None, 0.0  # weight: of the search's scores

    @classmethod
    def load(cls, folder: Path, lm, tokenizer, record: dict, device: str) -> "Reader":
        """What a run of train.py left in `folder`. `record` is its run.json."""
        from runs import PATHS, find

        args = dict(record["arguments"], device=device)
        for key in PATHS.keys() - {"model"}:
            if args.get(key):
                args[key] = find(args[key], folder, record)
        return cls(lm, tokenizer, Namespace(**args), folder)

    def open_book(self, dev=()) -> None:
        """Load passages, indexes and the re-ranker. ValueError if the passages are others now.

        `dev`: questions for the weight of a hybrid search that no stage has needed before.
        """
        args = self.args
        own = self.folder / "passages.jsonl"
        passages = books.read_passages(own if own.is_file() else args.passages)
        self.search = Search(args, passages, self.folder, dev)
        if not args.no_rerank:
            path = encoder_folder(args.reranker or self.folder / "reranker")
            self.encoder = CrossEncoder.from_pretrained(path, args.device, args.encoder_len)
            if getattr(args, "sort_by", "reranker") == "both":  # earlier runs have no such flag
                self.weight = read_json(self.folder / "mixed.json")["weight"]

    def retrieved(self, questions: list[Question]) -> list[Question]:
        """The questions with what the search finds."""
        results = self.search.find([q.question for q in questions], self.args.top)
        return [with_found(q, self.search.passages, f) for q, f in zip(questions, results)]

    def ranked(self, questions: list[Question]) -> list[Question]:
        """The questions with their passages in the re-ranker's order."""
        if self.encoder is None:
            return questions
        return rerank_found(questions, self.encoder, self.weight)

    def packed(self, questions: list[Question]) -> list[str]:
        """What the LM reads of the questions."""
        args = self.args
        left = recurse.positions_left(vars(args), self.lm.config, args.prompt_length)
        return pack_inputs(args, self.tokenizer, left, questions)[0]

    def read_back(self, examples: list) -> list:
        """Put the passages before the questions of examples of data.py."""
        questions = [Question(books.bare_question(e.input), list(e.answers)) for e in examples]
        if self.args.top > 0:
            if self.search is None:
                self.open_book()
            questions = self.ranked(self.retrieved(questions))
        return [replace(e, input=text) for e, text in zip(examples, self.packed(questions))]


@torch.no_grad()
def time_reader(task, adapter, book: Book) -> dict[str, float]:
    """Seconds per question of each stage, and the share of re-ranking, over a few questions."""
    args, questions = task.args, book.questions["test"] or book.questions["dev"]
    rows = data.sample(len(questions), 32, args.seed)
    if not rows:
        return {}
    model, prefix = recurse.COMPOSITIONS[args.method](task.lm, adapter)
    stops = metrics.stops([task.examples["train"][0]] * len(rows), args.stop)

    def answer(texts: list[str]) -> list:
        ids = data.encode_prompts(task.tokenizer, texts)
        new, budget = args.max_new_tokens, args.eval_tokens
        return predict(model, task.tokenizer, ids, prefix, new, None, stops, max_tokens=budget)

    chain = Reader(model, task.tokenizer, args, Path(args.out))
    chain.open_book(book.questions["dev"])
    stages = {"search": chain.retrieved, "re-rank": chain.ranked, "pack": chain.packed}
    stages["read"] = answer
    seconds, value = {}, [questions[row] for row in rows]
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        for name, stage in stages.items():
            begin = time.perf_counter()
            value = stage(value)
            seconds[name] = (time.perf_counter() - begin) / len(rows)
    share = seconds["re-rank"] / sum(seconds.values())
    times = ", ".join(f"{name} {1000 * value:.1f}" for name, value in seconds.items())
    show(f"milliseconds a question: {times}; re-ranking takes {100 * share:.0f} %")
    return seconds | {"share of re-ranking": share}
