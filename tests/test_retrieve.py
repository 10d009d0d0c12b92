"""Retrieval: BM25, dense and hybrid. Equality with bm25s: test_parity."""

import math

import numpy as np
import pytest
import torch
from conftest import close, randomise
from test_rerank import WORDS, bert_tokenizer

import rerank
import retrieve
from passages import Passage, Question, retriever_batch, retriever_questions
from retrieve import (
    BM25,
    DenseIndex,
    DualEncoder,
    hybrid,
    retriever_loss,
    split_words,
    tune_weight,
)

BOOK = [
    ("Emma", "Emma is a novel by Jane Austen. Emma was printed in 1815."),
    ("", "Jane Austen wrote novels, and the novels are read today."),
    ("Printing", "The printing of a novel takes a printer."),
    ("Frogs", "Frogs live in ponds."),
    ("The", "It was they."),
]


def formula(book, question, row, k1=0.9, b=0.4):
    """Lucene's BM25, written out for one passage."""
    texts = [split_words(" ".join(pair)) for pair in book]
    mean = sum(map(len, texts)) / len(texts)
    score = 0.0
    for word in split_words(question):
        df = sum(word in text for text in texts)
        tf, length = texts[row].count(word), len(texts[row])
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        score += idf * tf / (tf + k1 * (1 - b + b * length / mean))
    return score


# BM25


@pytest.mark.parametrize("settings", [{}, {"k1": 1.5, "b": 0.75}, {"b": 0.0}])
def test_bm25_is_lucenes_formula(settings):
    bm25 = BM25(BOOK, **settings)
    for question in ("Who wrote the novel Emma?", "emma EMMA novel", "printing ponds frogs austen"):
        scores = [formula(BOOK, question, row, **settings) for row in range(len(BOOK))]
        rows = [row for row, score in enumerate(scores) if score > 0]
        found = bm25.search(question, 10)
        assert [row for row, _ in found] == sorted(rows, key=lambda row: -scores[row])
        for row, score in found:
            assert score == pytest.approx(scores[row], rel=1e-6, abs=1e-6)


def test_the_k_best_are_those_of_a_full_sort_and_ties_go_by_row():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    weights = 1 / np.arange(1, 41)
    book = [
        ("", " ".join(rng.choice(vocabulary, rng.integers(1, 12), p=weights / weights.sum())))
        for _ in range(300)
    ]
    book += book[:50]  # equal scores
    bm25 = BM25(book)
    for _ in range(40):
        question = " ".join(rng.choice(vocabulary, rng.integers(1, 7)))
        everything = bm25.search(question, len(book))
        assert everything == sorted(everything, key=lambda found: (-found[1], found[0]))
        for k in (1, 2, 5, 20, 100):
            assert bm25.search(question, k) == everything[:k]


def test_an_index_made_of_many_blocks_is_that_of_one(monkeypatch):
    """Also if a block has no words, brings new ones, or is smaller than the others."""
    book = [*BOOK, ("", "the it was"), ("", "it is"), ("", "a new emma"), *BOOK[:2]]
    whole = BM25(book)
    for size in (1, 2, 5):
        monkeypatch.setattr(retrieve, "BLOCK", size)
        parts = BM25(book)
        assert parts.words == whole.words
        for name in ("starts", "rows", "scores"):
            a, b = getattr(whole, name), getattr(parts, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)


def test_questions_without_a_known_word_find_nothing():
    assert BM25(BOOK).search("the it was", 5) == BM25(BOOK).search("xyzzy", 5) == []


def test_texts_and_dicts_are_passages_too():
    texts = [" ".join(pair).strip() for pair in BOOK]
    dicts = [{"title": title, "text": text} for title, text in BOOK]
    found, *same = (BM25(book).search("jane austen novel") for book in (BOOK, texts, dicts))
    assert same == [found, found]


def test_a_saved_index_is_memory_mapped_and_refuses_other_passages(tmp_path):
    bm25 = BM25(BOOK)
    bm25.save(tmp_path / "index")
    again = BM25.load(tmp_path / "index", BOOK)
    assert again.search("emma novel frogs") == bm25.search("emma novel frogs")
    assert isinstance(again.scores, np.memmap) and not again.scores.flags.writeable
    for other in (BOOK[:-1], BOOK[::-1], [("Emm", "a" + BOOK[0][1]), *BOOK[1:]]):
        with pytest.raises(ValueError, match="index of other passages"):
            BM25.load(tmp_path / "index", other)
    with pytest.raises(FileExistsError, match="exists"):
        bm25.save(tmp_path / "index")
    whole = (tmp_path / "index" / "rows.npy").read_bytes()
    (tmp_path / "index" / "rows.npy").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="rows.npy"):
        BM25.load(tmp_path / "index", BOOK)
    (tmp_path / "index" / "index.json").write_text('{"passages": 3')
    with pytest.raises(ValueError, match="index.json"):
        BM25.load(tmp_path / "index", BOOK)
    with pytest.raises(FileNotFoundError, match="not an index"):
        BM25.load(tmp_path, BOOK)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


@pytest.mark.parametrize(
    "book, message",
    [([], "there are no passages"), ([*BOOK, ("t", " ")], "passage 5 .* empty")]
    + [([("", "the")], "no words to search")],
)
def test_a_book_that_cannot_be_searched_is_refused(book, message):
    with pytest.raises(ValueError, match=message):
        BM25(book)


def test_k_below_one_is_refused():
    for search in (BM25(BOOK).search, DenseIndex(np.eye(3)).search):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            search("emma" if search.__self__.__class__ is BM25 else np.ones(3), 0)


# Dense


def make_dual(pooling="cls", shared=False, max_len=12):
    config = rerank.BertConfig(len(WORDS), 16, 2, 4, 24, 20, dropout=0.0)
    question, passage = (randomise(rerank.Bert(config), seed) for seed in (0, 1))
    question = passage if shared else question
    return DualEncoder(question, passage, bert_tokenizer(), pooling, max_len).eval()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_do_not_depend_on_the_texts_beside_them(pooling):
    dual = make_dual(pooling)
    passages = [("a b", "c d e f g h i j k l m n"), ("", "b"), ("c", "d e")]
    vectors = dual.encode_passages(passages)
    inputs = [[1, 3, 4, 2, 5, 6, 7, 8, 9, 10, 11, 2], [1, 4, 2], [1, 5, 2, 6, 7, 2]]
    assert dual.passage_inputs(passages) == inputs
    assert dual.question_inputs(["b a"]) == [[1, 4, 3, 2]]
    for vector, ids in zip(vectors, inputs):
        h = dual.passage(torch.tensor([ids]))[0]
        expected = h[0] if pooling == "cls" else h.mean(0) / h.mean(0).norm()
        close(torch.tensor(vector), expected, 1e-5)
    asked = dual.encode_questions(["b"])
    assert np.abs(asked - dual.encode_passages(["b"])).max() > 0.01  # two encoders


def test_dense_search_is_exact_and_saved_with_its_passages(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    question, book = vectors[7] * 2, [("", f"text {i}") for i in range(50)]
    index = DenseIndex(vectors)
    scores = vectors @ question
    expected = np.argsort(-scores)
    for k, at_once in ((1, 7), (10, 7), (10, 1000), (80, 20)):
        found = index.search(question, k, at_once)
        assert [row for row, _ in found] == expected[:k].tolist()
        np.testing.assert_allclose([s for _, s in found], scores[expected[:k]], rtol=1e-5)
    tied = DenseIndex(np.ones((30, 2), np.float32)).search(np.ones(2, np.float32), 4, 7)
    assert tied == [(row, 2.0) for row in range(4)]  # by row, wherever the parts end
    index.save(tmp_path / "index", book)
    again = DenseIndex.load(tmp_path / "index", book)
    assert isinstance(again.vectors, np.memmap) and again.search(question) == index.search(question)
    with pytest.raises(ValueError, match="index of other passages"):
        DenseIndex.load(tmp_path / "index", book[:-1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_saved_dual_encoder_comes_back(tmp_path, shared):
    dual = make_dual(shared=shared)
    dual.save(tmp_path)
    folders = [tmp_path / name for name in ("question", "passage") if (tmp_path / name).is_dir()]
    assert len(folders) == 2 - shared
    again = DualEncoder.from_pretrained(*folders)
    for parameter in again.parameters():  # on some processors sums depend on the memory's alignment
        parameter.data = parameter.data.clone()
    assert np.array_equal(again.encode_passages(["a b"]), dual.encode_passages(["a b"]))
    assert np.array_equal(again.encode_questions(["a b"]), dual.encode_questions(["a b"]))


def test_the_retriever_learns_from_the_positives_and_negatives_of_the_batch():
    questions, passages = torch.randn(2, 3), torch.randn(4, 3)
    known = torch.zeros(2, 4, dtype=torch.bool)
    loss = retriever_loss(questions, passages, torch.arange(2), known)
    scores = questions @ passages.T
    close(loss, -(scores[0].log_softmax(0)[0] + scores[1].log_softmax(0)[1]))
    known[0, 0] = known[0, 1] = True  # its own positive stays
    loss = retriever_loss(questions, passages, torch.arange(2), known)
    close(loss, -(scores[0, [0, 2, 3]].log_softmax(0)[0] + scores[1].log_softmax(0)[1]))
    with torch.autocast("cpu", torch.bfloat16):  # the products stay float32
        close(retriever_loss(questions, passages, torch.arange(2), known), loss)


def test_retriever_batches_know_which_passages_are_no_negatives():
    shared = Passage("t", "a b", "1")
    asked = [
        Question("a", ["b"], [shared, Passage("t", "a c", "2")], [Passage("", "d", "3")]),
        Question("b", ["b"], [shared], [Passage("", "e", "4"), Passage("", "f", "5")]),
        Question("c", ["x"], [], [Passage("", "g", "6")]),
    ]
    kept, skipped = retriever_questions(asked)
    assert kept == asked[:2] and skipped == 1
    dual = make_dual()
    for step in range(8):
        batch = retriever_batch(kept, dual, 2, 2, seed=0, step=step)
        assert len(batch.passage_ids) == 2 + 3 and batch.targets.tolist() == [0, 1]
        first = batch.rows.index(0)
        other = 1 - first
        assert batch.known[first].tolist() == [True, True, False, False, False]
        same = torch.equal(batch.passage_ids[0], batch.passage_ids[1])
        assert batch.known[other, first] == same and batch.known[other, other]
        again = retriever_batch(kept, dual, 2, 2, seed=0, step=step)
        assert torch.equal(batch.passage_ids, again.passage_ids)
    vectors = dual(dual.passage, batch.passage_ids, batch.passage_lengths)
    loss = retriever_loss(
        dual(dual.question, batch.ids, batch.lengths), vectors, batch.targets, batch.known
    )
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in dual.question.layers.parameters() if p.dim() == 2)


# Hybrid


def test_hybrid_fills_a_missing_score_with_the_lists_minimum():
    first, second = [(3, 9.0), (1, 4.0), (7, 2.0)], [(1, 1.0), (5, 0.5)]
    joined = hybrid(first, second, 2.0)
    assert joined == [(3, 10.0), (1, 6.0), (5, 3.0), (7, 3.0)]
    assert hybrid(first, [], 2.0) == first


def test_the_weight_is_the_first_best_one_on_dev():
    firsts = [[(0, 1.0), (1, 0.0)], [(0, 1.0), (1, 0.0)]]
    seconds = [[(1, 0.3), (0, 0.0)], [(1, 0.2), (0, 0.0)]]
    hit = lambda i, found: found[0][0] == 1  # noqa: E731
    assert tune_weight(firsts, seconds, hit) == (6, 1.0)
    assert tune_weight(firsts, seconds, hit, (1, 4, 5)) == (4, 0.5)
