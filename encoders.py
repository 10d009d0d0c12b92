"""Train the two encoders of an open book: the dual encoder that finds passages, and the re-ranker.

The retriever is DPR's dual encoder (Karpukhin et al. 2020), the re-ranker the cross-encoder of
Levine et al. (2022, section 3.1). Both start from the BERT of --encoder, and both learn from the
passages that were retrieved for the training questions. The trained weights are in OUT/model.

Needs openbook.py, reader.py, fit.py and what these need. train.py has the command line.

    python train.py --method retriever
    python train.py --method reranker
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from show import show

import numpy as np
import torch
from torch import Tensor

import data
import parallel
import passages as books
from fit import Recipe, fit
from openbook import (
    Book,
    base_encoder,
    cut_found,
    hash_encoders,
    load_book,
    needs_search,
    recalls,
    rerank_found,
    retrieve,
)
from passages import Passage, Question, with_found
from questions import hash_tokenizer
from reader import check
from rerank import CrossEncoder, reranker_loss
from retrieve import DenseIndex, DualEncoder, retriever_loss
from runs import Run, finish_record, finished, start_record

COSINE_SCALE = 20.0  # vectors of length 1 are scaled so for the loss; sentence-transformers' value
RERANKER = {"steps": 1500, "warmup": 0.1, "weight_decay": 0.0, "batch_size": 16}
RETRIEVER = RERANKER | {"batch_size": 32}
STAGE = {"schedule": "linear", "optimizer": "adamw", "grad_accum": 1, "clip": 1.0}


def default_lr(args) -> float:
    """The rate if --lr is not given: 1e-4 with --encoder, else 2e-3, for the BERT of assets/bert.

    The papers' 1e-5 is for a BERT of 110M parameters. In 240 steps of 8 questions with 4 passages
    the mean reciprocal rank of the small one on dev, at random 0.52, reached 0.68 with 3e-4, 0.72
    with 1e-3 and 0.77 with 3e-3. On 4,300 real questions, in steps of 16 with 8 passages, a
    re-ranker from a MiniLM of 22.7M reached 0.892 with 2e-5, 0.902 with 5e-5 and 0.920 with 1e-4 in
    400 steps, and 0.916 with 5e-5 and 0.928 with 1e-4 in 800. A retriever was not measured.
    """
    return 1e-4 if args.encoder else 2e-3


def train_encoder(args, book: Book | None = None, scored=True) -> dict:
    """Train one of ENCODERS. Returns the record, which run.json holds too.

    book: None is that of the flags. With `scored` the encoder is tested on the dev and test
    questions at the end. ValueError if no training question can be learnt from. No folder is left
    then: --resume with the same questions would only end here again.
    """
    book = load_book(args) if book is None else book
    torch.manual_seed(args.seed)  # new heads are random, whatever ran before
    encoders = check(args, book)
    training, run = ENCODERS[args.method](args), Run.from_args(args)
    recipe = Recipe.from_args(args)
    if recipe.lr is None:
        recipe = replace(recipe, lr=default_lr(args))
    hashes = dict.fromkeys(("fingerprint", "init_hash", "eos")) | {"data_hash": book.hash()}
    hashes |= {"encoder_hash": hash_encoders(encoders), "tokens_hash": hashes["data_hash"]}
    hashes["tokenizer_hash"] = hash_tokenizer(training.encoder.tokenizer)
    new = not run.folder.exists()
    asked = cut_found(book.questions["train"], args.top)
    searches = args.top > 0 and any(needs_search(args, book, q) for q in asked)
    skipped = None if searches else training.use(asked)
    with run:
        record = start_record(run, training.trained, None, hashes) | {"lr": recipe.lr}
        found = retrieve(args, book, run.folder)
        if searches:  # only now is it known what can be learnt
            try:
                skipped = training.use(found.questions["train"])
            except ValueError:
                if new and parallel.first():
                    shutil.rmtree(run.folder, ignore_errors=True)
                parallel.wait()  # torchrun ends all processes when the first one ends
                raise
        training.dev = dev_groups(args, found.questions["dev"])
        record["skipped"] = skipped
        for reason, count in skipped.items():
            show(f"{count} training questions are skipped: {reason}")
        record |= fit(
            run,
            recipe,
            training.trained,
            training.batch_at,
            training.loss_of,
            training.evaluate if training.dev else lambda: None,
            lambda: training.encoder.save(run.folder / "model"),
        )
        return finish_record(run, record, None, training.results(found) if scored else {})


def stage(args, name: str, book: Book) -> CrossEncoder:
    """Train a re-ranker in the folder `name` below --out, or load it if it is trained already."""
    folder = Path(args.out) / name
    flags = vars(args) | RERANKER | STAGE | {"method": "reranker"}
    flags |= {"out": str(folder), "steps": args.encoder_steps, "lr": args.encoder_lr}
    if not finished(folder):
        show(f"{folder}: {len(book.questions['train'])} training questions")
        train_encoder(Namespace(**flags), book, scored=False)
    return CrossEncoder.from_pretrained(folder / "model", args.device, args.encoder_len)


class RetrieverTraining:
    """What `fit` needs to train a dual encoder (Karpukhin et al. 2020). Dev score: MRR.

    The reciprocal rank is that of a question's positive among the positives and hard negatives of
    all questions of the dev sample.
    """

    def __init__(self, args):
        self.args, folder = args, base_encoder(args)
        second = None if args.shared_encoder else folder
        self.encoder = DualEncoder.from_pretrained(folder, second, args.pooling, args.device)
        self.encoder.max_len = min(self.encoder.max_len, args.encoder_len)
        self.scale = COSINE_SCALE if args.pooling == "mean" else 1.0
        # A shared encoder is named once, so that its state is stored once.
        self.trained = self.encoder.question if args.shared_encoder else self.encoder
        self.dev = []  # what `dev_groups` returns

    def use(self, questions: Sequence[Question]) -> dict:
        """Take the training questions with their passages. Returns how many have no positive."""
        self.questions, skipped = books.retriever_questions(questions)
        self.encoder.train()
        last = len(self.questions) % self.args.batch_size  # all processes embed its passages
        if 0 < last < parallel.count():
            raise ValueError(
                f"--batch-size {self.args.batch_size}: the last batch of the "
                f"{len(self.questions)} questions has fewer than the {parallel.count()} processes"
            )
        return check_samples(self.questions, {"no positive passage": skipped} if skipped else {})

    def batch_at(self, number: int):
        """The batch of a step."""
        args = self.args
        return books.retriever_batch(
            self.questions, self.encoder, args.batch_size, args.hard_negatives, args.seed, number
        )

    def loss_of(self, batch) -> Tensor:
        """The loss, summed over questions. Each of several processes embeds its share of the
        batch's passages, and all of them get all vectors."""
        dual, rows = self.encoder, len(batch.passage_ids)
        asked = dual(dual.question, batch.ids, batch.lengths)
        own = list(parallel.share(range(rows)))
        passages = dual(dual.passage, batch.passage_ids[own], batch.passage_lengths[own])
        passages = parallel.AllRows.apply(passages, own, rows)
        return retriever_loss(self.scale * asked, passages, batch.targets, batch.known)

    def evaluate(self) -> float:
        """The mean reciprocal rank on the dev sample."""
        pool = list(dict.fromkeys(passage for _, group in self.dev for passage in group))
        row_of = {passage: row for row, passage in enumerate(pool)}
        asked = divide(self.encoder.encode_questions, [q.question for q, _ in self.dev])
        scores = asked @ divide(self.encoder.encode_passages, pool).T
        ranks = []
        for values, (q, group) in zip(scores, self.dev):
            wrong = np.ones(len(pool), bool)
            wrong[[row_of[p] for p in (*q.positives, group[0]) if p in row_of]] = False
            ranks.append(1 + (values[wrong] >= values[row_of[group[0]]]).sum())
        return float(np.mean([1 / rank for rank in ranks]))

    def results(self, book: Book) -> dict:
        """Recall on dev and test of what --search found and of what the dual encoder finds."""
        index = DenseIndex(divide(self.encoder.encode_passages, book.passages))
        splits = {}
        for split in ("dev", "test"):
            if part := book.questions[split]:
                vectors = divide(self.encoder.encode_questions, [q.question for q in part])
                found = [index.search(vector, max(self.args.top, 1)) for vector in vectors]
                dense = [with_found(q, book.passages, f) for q, f in zip(part, found)]
                given = {"retrieved": part} if any(q.found for q in part) else {}
                splits[split] = given | {"dual encoder": dense}
        return recall_tables(splits)


class RerankerTraining:
    """What `fit` needs to train a cross-encoder (Levine et al. 2022, section 3.1). Dev score: MRR.

    The reciprocal rank is that of a positive among M - 1 negatives of its question, drawn once.
    """

    def __init__(self, args):
        self.args, folder = args, base_encoder(args)
        self.encoder = CrossEncoder.from_pretrained(folder, args.device, args.encoder_len, True)
        self.trained = self.encoder
        self.dev = []  # what `dev_groups` returns

    def use(self, questions: Sequence[Question]) -> dict:
        """Take the training questions with their passages. Returns how many are skipped, why."""
        self.samples, skipped = books.reranker_samples(questions, self.encoder)
        self.encoder.train()
        return check_samples(self.samples, skipped)

    def batch_at(self, number: int):
        """The batch of a step."""
        args = self.args
        return books.reranker_batch(
            self.samples, self.encoder, args.batch_size, args.group_size, args.seed, number
        )

    def loss_of(self, batch) -> Tensor:
        """The loss, summed over questions."""
        return reranker_loss(self.encoder, batch.ids, batch.lengths, batch.groups, batch.spans)

    def evaluate(self) -> float:
        """The mean reciprocal rank on the dev sample."""

        def score(part: list) -> list[Tensor]:
            return self.encoder.score_all([q.question for q, _ in part], [g for _, g in part])

        scores = parallel.divide(score, self.dev)
        return float(np.mean([1 / (1 + int((s[1:] >= s[0]).sum())) for s in scores]))

    def results(self, book: Book) -> dict:
        """Recall on dev and test, before and after re-ranking."""
        splits = {}
        for split in ("dev", "test"):
            part = book.questions[split]
            if any(q.found for q in part):
                sorted_part = rerank_found(part, self.encoder)
                splits[split] = {"retrieved": part, "re-ranked": sorted_part}
        return recall_tables(splits)


ENCODERS = {"retriever": RetrieverTraining, "reranker": RerankerTraining}


def divide(encode: Callable, texts: Sequence) -> np.ndarray:
    """The vectors (B, C) of texts. Each process encodes its share of them."""
    return np.stack(parallel.divide(encode, texts))


def dev_groups(args, questions: Sequence[Question]) -> list[tuple[Question, list[Passage]]]:
    """Dev questions, at most --eval-limit, each with a positive and M - 1 of its negatives. They
    are drawn at random, as in training: the first ones of a good search differ in other ways."""
    groups, rng = [], np.random.default_rng(args.seed)
    for row in data.sample(len(questions), args.eval_limit, args.seed):
        positives, negatives = books.choose_passages(questions[row])
        if positives and negatives:
            count = min(args.group_size - 1, len(negatives))
            wrong = [negatives[i] for i in rng.choice(len(negatives), count, False)]
            groups.append((questions[row], [positives[0], *wrong]))
    return groups


def check_samples(samples: Sequence, skipped: dict) -> dict:
    """Return {reason: questions skipped}. ValueError if nothing is left to learn from."""
    if not samples:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
        raise ValueError(f"no training question can be learnt from: {reasons}")
    return dict(skipped)


def recall_tables(splits: dict[str, dict[str, list[Question]]]) -> dict:
    """{split: {"n": questions, "recall": {"name, answer": {"1": ...}, "name, gold": {...}}}}."""
    tables = {}
    for split, orders in splits.items():
        rows = {name: recalls(part) for name, part in orders.items()}
        flat = {f"{name}, {hit}": row for name, both in rows.items() for hit, row in both.items()}
        tables[split] = {"n": len(next(iter(orders.values()))), "recall": flat}
    return tables
