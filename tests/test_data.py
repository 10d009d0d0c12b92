"""Files, tokens and batches: what they hold, in which order, and how bad files are refused."""

import json

import numpy as np
import pytest
import torch

import data
from data import NO_TARGET, Encoded

TEXTS = ["Q: where was Anna born?\nA: Velmor", "Anna lives in Kranstad.", "Boris makes red clocks."] * 30


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 300)


def write(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()) + b"\n" for line in lines))
    return path


def test_both_forms_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"], "task": "books"}, "", {"input": "1+1=", "target": "2", "id": 7})
    first, second = data.read(path)
    assert (first.input, first.target, first.answers, first.task, first.id) == ("Q: who wrote emma?\nA:", "Jane Austen", ("Jane Austen", "Austen"), "books", "a.jsonl:1")
    assert (second.input, second.target, second.answers, second.id, second.where) == ("1+1=", "2", ("2",), "7", "a.jsonl:3")


@pytest.mark.parametrize("bad", ["{", "[1]", '"text"', "null", {"question": "a"}, {"question": 1, "answer": ["b"]}, {"question": " ", "answer": ["b"]}, {"question": "a", "answer": []},
                                 {"question": "a", "answer": [1]}, {"question": "a", "answer": [""]}, {"input": "a"}, {"target": "a"}, {"input": "a", "target": 3},
                                 {"input": "a", "target": "b", "answers": "b"}, b'{"input": "\xff", "target": "b"}', {}])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, bad):
    path = write(tmp_path / "x.jsonl", {"input": "a", "target": "b"}, bad)
    with pytest.raises(ValueError, match=r"^x\.jsonl:2: ") as caught:
        data.read(path)
    assert "\n" not in str(caught.value)


def test_empty_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl: holds no examples"):
        data.read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        data.read(tmp_path / "none.jsonl")


def test_texts_from_three_kinds_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\n two \n")
    assert data.read_texts(tmp_path / "a.txt") == ["one\nstill one", "two"]
    assert data.read_texts(write(tmp_path / "b.jsonl", {"text": "one"}, {"text": "two"})) == ["one", "two"]
    assert data.read_texts(write(tmp_path / "c.jsonl", {"question": "why", "answer": ["so"]})) == ["Q: why?\nA: so"]
    with pytest.raises(ValueError, match="d.jsonl:1"):
        data.read_texts(write(tmp_path / "d.jsonl", {"text": 3}))


def test_one_question_mark():
    assert {data.question_text(q) for q in ("who", "who?", " who ? ", "who??")} == {"Q: who?\nA:"}


@pytest.mark.parametrize("text", ["plain", "  two  spaces ", "naïve café ☕ 漢字", "tab\tand\nline", "\x00\x7f"])
def test_the_tokenizer_writes_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and tokenizer.decode(ids) == text


def test_targets_are_what_running_text_has(tokenizer):
    example = data.Example("Q: where was Anna born?\nA:", "Velmor", ("Velmor",))
    (encoded,) = data.encode([example], tokenizer, 0, 100)
    assert encoded.input + encoded.target == tokenizer.encode("Q: where was Anna born?\nA: Velmor").ids + [0]
    assert data.encode([example], tokenizer, None, 100)[0].target == encoded.target[:-1]
    n = len(encoded.input) + len(encoded.target) - 1
    data.encode([example], tokenizer, 0, n)
    with pytest.raises(ValueError, match="exceed"):
        data.encode([example], tokenizer, 0, n - 1)


def test_a_token_across_the_boundary_leaves_the_input_as_asked(tokenizer):
    """The input ends with a space, which running text would join to the next word."""
    example = data.Example("Anna lives in ", "Kranstad", ("Kranstad",))
    (encoded,) = data.encode([example], tokenizer, 0, 100)
    assert encoded.input == tokenizer.encode("Anna lives in ").ids
    assert tokenizer.decode(encoded.target) == " Kranstad"


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(tokenizer):
    data.check_tokenizer(tokenizer, tokenizer.get_vocab_size(), "here")
    with pytest.raises(ValueError, match="belongs to another LM"):
        data.check_tokenizer(tokenizer, tokenizer.get_vocab_size() - 1, "here")


def examples(n, seed=0):
    draw = np.random.default_rng(seed)
    return [Encoded(draw.integers(1, 50, draw.integers(1, 40)).tolist(), draw.integers(50, 99, draw.integers(1, 4)).tolist()) for _ in range(n)]


@pytest.mark.parametrize("n, size", [(64, 8), (61, 8), (5, 8), (8, 1), (1000, 16)])
def test_an_epoch_holds_every_example_once(n, size):
    some, steps = examples(n), -(-n // size)
    for epoch in (0, 3):
        rows = [row for step in range(steps) for row in data.batches(some, size, 5, epoch * steps + step).rows]
        assert sorted(rows) == list(range(n))


def test_batches_are_a_pure_function_of_seed_and_step():
    some = examples(100)
    first = data.batches(some, 8, 1, 17)
    for step in (3, 40, 0):
        data.batches(some, 8, 2, step)
    data.epoch_order.cache_clear()
    again = data.batches(some, 8, 1, 17)
    assert torch.equal(first.ids, again.ids) and first.rows == again.rows
    orders = {tuple(r for s in range(13) for r in data.batches(some, 8, seed, epoch * 13 + s).rows) for seed, epoch in ((1, 0), (1, 1), (2, 0))}
    assert len(orders) == 3


def test_positions_predict_the_next_token_of_the_target_only():
    some = examples(20)
    batch = data.batches(some, 20, 0, 0)
    for b, row in enumerate(batch.rows):
        whole, n = some[row].input + some[row].target, int(batch.lengths[b])
        assert batch.ids[b, :n].tolist() == whole[:-1] and n == len(whole) - 1
        expected = [NO_TARGET] * (len(some[row].input) - 1) + some[row].target
        assert batch.targets[b, :n].tolist() == expected and (batch.targets[b, n:] == NO_TARGET).all()


def test_similar_lengths_share_a_batch():
    some = examples(2000)
    share = lambda batches: 1 - sum(float(b.lengths.sum()) for b in batches) / sum(b.ids.numel() for b in batches)
    bucketed = share([data.batches(some, 16, 0, s) for s in range(125)])
    random = share([data.collate(some[i : i + 16], []) for i in range(0, 2000, 16)])
    assert bucketed < 0.05 < 0.3 < random


@pytest.mark.parametrize("size, length", [(1, 7), (4, 16), (3, 50)])
def test_windows_cut_the_stream_of_an_epoch(tokenizer, size, length):
    corpus = data.encode_texts(TEXTS, tokenizer)
    documents = [tokenizer.encode(text).ids for text in TEXTS]
    per_epoch = (sum(map(len, documents)) - 1) // length
    steps = per_epoch // size
    for epoch in (0, 1):
        order = np.random.default_rng([9, epoch]).permutation(len(documents))
        stream = [token for d in order for token in documents[d]]
        for step in range(steps):
            batch = data.windows(corpus, size, length, 9, epoch * steps + step)
            for row, ids, targets in zip(batch.rows, batch.ids, batch.targets):
                assert ids.tolist() == stream[row * length : (row + 1) * length]
                assert targets.tolist() == stream[row * length + 1 : (row + 1) * length + 1]
            assert batch.rows == list(range(step * size, (step + 1) * size))


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="too few"):
        data.windows(data.encode_texts(["Anna"], tokenizer), 1, 100, 0, 0)
