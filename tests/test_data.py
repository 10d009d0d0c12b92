"""Files, tokens and batches: what they hold, in which order, and how bad files are refused."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import NO_TARGET, Encoded

TEXTS = [
    "Q: where was Anna born?\nA: Velmor",
    "Anna lives in Kranstad.",
    "Boris makes red clocks.",
] * 30


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 300)


def write(path, *lines):
    path.write_bytes(
        b"".join(
            (
                line
                if isinstance(line, bytes)
                else (line if isinstance(line, str) else json.dumps(line)).encode()
            )
            + b"\n"
            for line in lines
        )
    )
    return path


def test_both_forms_are_read(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"], "task": "books"},
        "",
        {"input": "1+1=", "target": "2", "id": 7},
    )
    first, second = data.read(path)
    assert (first.input, first.target, first.answers, first.task, first.id) == (
        "Q: who wrote emma?\nA:",
        "Jane Austen",
        ("Jane Austen", "Austen"),
        "books",
        "a.jsonl:1",
    )
    assert (second.input, second.target, second.answers, second.id, second.where) == (
        "1+1=",
        "2",
        ("2",),
        "7",
        "a.jsonl:3",
    )


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        '"text"',
        "null",
        {"question": "a"},
        {"question": 1, "answer": ["b"]},
        {"question": " ", "answer": ["b"]},
        {"question": "a", "answer": []},
        {"question": "a", "answer": [1]},
        {"question": "a", "answer": [""]},
        {"input": "a"},
        {"target": "a"},
        {"input": "a", "target": 3},
        {"input": "a", "target": "b", "answers": "b"},
        b'{"input": "\xff", "target": "b"}',
        {},
        {"question": "a", "answer": {"b": 1}},
        {"input": ["a"], "target": "b"},
        '{"input": "half a pair: \\uD83D", "target": "b"}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    path = write(tmp_path / "x.jsonl", {"input": "a", "target": "b"}, bad)
    with pytest.raises(ValueError, match=r"^x\.jsonl:2: ") as caught:
        data.read(path)
    assert "\n" not in str(caught.value)


def test_what_only_looks_bad_is_read(tmp_path):
    """Windows line ends, a last line without one, a character written as two escapes, and an answer that is not a list."""
    (tmp_path / "a.jsonl").write_bytes(
        b'{"question": "a", "answer": "b"}\r\n\r\n{"input": "\\ud83d\\ude00", "target": "c", "task": "t"}'
    )
    first, second = data.read(tmp_path / "a.jsonl")
    assert first.answers == ("b",) and (second.input, second.task, second.where) == (
        "\U0001f600",
        "t",
        "a.jsonl:3",
    )


def test_the_target_is_among_the_answers(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"input": "a", "target": "b", "answers": ["c"]}\n{"input": "a", "target": "b", "answers": ["c", "b"]}\n'
    )
    assert [e.answers for e in data.read(tmp_path / "a.jsonl")] == [("b", "c"), ("c", "b")]


def test_an_id_is_taken_once_in_a_task(tmp_path):
    record = {"input": "a", "target": "b", "id": 1}
    path = write(tmp_path / "a.jsonl", record, {**record, "task": "t"}, {**record, "id": 2})
    assert [(e.task, e.id) for e in data.read(path)] == [("", "1"), ("t", "1"), ("", "2")]
    with pytest.raises(ValueError, match=r"^b\.jsonl:3: .* b\.jsonl:1$"):
        data.read(write(tmp_path / "b.jsonl", record, "", {**record, "input": "c"}))


def test_the_command_line_ends_with_one_line(tmp_path):
    write(tmp_path / "a.jsonl", "{")
    result = subprocess.run(
        [sys.executable, data.__file__, "a.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        result.returncode == 2
        and result.stderr.startswith("data.py: a.jsonl:1: ")
        and result.stderr.count("\n") == 1
    )


def test_empty_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl: holds no examples"):
        data.read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        data.read(tmp_path / "none.jsonl")


def test_texts_from_three_kinds_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n \t\n two \n")
    assert data.read_texts(tmp_path / "a.txt") == ["one\nstill one", "two"]
    assert data.read_texts(write(tmp_path / "b.jsonl", {"text": "one"}, {"text": "two"})) == [
        "one",
        "two",
    ]
    assert data.read_texts(write(tmp_path / "c.jsonl", {"question": "why", "answer": ["so"]})) == [
        "Q: why?\nA: so"
    ]
    with pytest.raises(ValueError, match="d.jsonl:1"):
        data.read_texts(write(tmp_path / "d.jsonl", {"text": 3}))
    with pytest.raises(ValueError, match="e.jsonl:2"):
        data.read_texts(
            write(tmp_path / "e.jsonl", {"input": "a", "target": "b"}, {"text": "neither form"})
        )
    for name, content, message in (
        ("f.txt", b" \n\n ", "no text"),
        ("g.txt", b"\xff\xfe", "UTF-8"),
        ("h.jsonl", b"", "no text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            data.read_texts(tmp_path / name)
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            data.read_texts(tmp_path / name)


def test_one_question_mark():
    assert {data.question_text(q) for q in ("who", "who?", " who ? ", "who??")} == {"Q: who?\nA:"}
    assert data.is_question(data.question_text("who")) and not data.is_question(
        "Review: dull.\nVerdict:"
    )


@pytest.mark.parametrize(
    "text", ["plain", "  two  spaces ", "naïve café ☕ 漢字", "tab\tand\nline", "\x00\x7f"]
)
def test_the_tokenizer_writes_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and tokenizer.decode(ids) == text


def test_the_tokenizer_writes_whatever_unicode_holds(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(
                draw.choice(
                    (
                        draw.randrange(0x250),
                        draw.randrange(0xD800),
                        draw.randrange(0xE000, 0x110000),
                    )
                )
            )
            for _ in range(20)
        )
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_targets_are_what_running_text_has(tokenizer):
    example = data.Example("Q: where was Anna born?\nA:", "Velmor", ("Velmor",))
    (encoded,) = data.encode([example], tokenizer, 0, 100)
    assert encoded.input + encoded.target == tokenizer.encode(
        "Q: where was Anna born?\nA: Velmor"
    ).ids + [0]
    assert data.encode([example], tokenizer, None, 100)[0].target == encoded.target[:-1]
    assert (
        encoded.input.count(0) == 1 and encoded.input[0] == 0 and encoded.target.count(0) == 1
    )  # one BOS, in front of the input
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


def test_p3s_keys_are_read(tmp_path):
    record = {
        "inputs_pretokenized": "Is it good? ",
        "targets_pretokenized": "\nyes\n",
        "answer_choices": ["no", " yes"],
        "task": "review",
    }
    (e,) = data.read(write(tmp_path / "p3.jsonl", record))
    assert (e.input, e.target, e.answers, e.task, e.options) == (
        "Is it good?",
        "yes",
        ("yes",),
        "review",
        ("no", "yes"),
    )
    for change, word in (
        ({"answer_choices": ["no"]}, "'yes' is not among the options no"),
        ({"answer_choices": "yes"}, "answer_choices"),
        ({"targets_pretokenized": " "}, "target"),
    ):
        with pytest.raises(ValueError, match=f"p3.jsonl:1: .*{word}"):
            data.read(write(tmp_path / "p3.jsonl", record | change))


def test_an_eos_that_the_tokenizer_appends_does_not_end_the_question(tokenizer):
    """SentencePiece files put a space in front and may put an EOS behind: neither comes between question and answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = Tokenizer(
        models.Unigram(
            [
                ("<s>", 0.0),
                ("</s>", 0.0),
                ("▁", -3.0),
                *((c, -4.0) for c in "QA:?abn"),
                ("▁ban", -2.0),
            ]
        )
    )
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["<s>", "</s>"])
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert pieces.encode("A:").tokens == ["<s>", "▁", "A", ":", "</s>"]
    for text in ("A:", "A: "):  # in running text the trailing space belongs to the next word
        (encoded,) = data.encode([data.Example(text, "ban", ("ban",))], pieces, 1, 100)
        assert [pieces.id_to_token(i) for i in encoded.input][:4] == [
            "<s>",
            "▁",
            "A",
            ":",
        ] and 1 not in encoded.input
        assert [pieces.id_to_token(i) for i in encoded.target] == ["▁ban", "</s>"]


def examples(n, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Encoded(
            draw.integers(1, 50, draw.integers(1, 40)).tolist(),
            draw.integers(50, 99, draw.integers(1, 4)).tolist(),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("n, size", [(64, 8), (61, 8), (5, 8), (8, 1), (1000, 16)])
def test_an_epoch_holds_every_example_once(n, size):
    some, steps = examples(n), -(-n // size)
    for epoch in (0, 3):
        rows = [
            row
            for step in range(steps)
            for row in data.batches(some, size, 5, epoch * steps + step).rows
        ]
        assert sorted(rows) == list(range(n))
        sizes = [
            len(data.batches(some, size, 5, epoch * steps + step).rows) for step in range(steps)
        ]
        assert sizes[:-1] == [size] * (steps - 1) and sizes[-1] == n - size * (steps - 1)


def test_batches_are_a_pure_function_of_seed_and_step():
    some = examples(100)
    first = data.batches(some, 8, 1, 17)
    for step in (3, 40, 0):
        data.batches(some, 8, 2, step)
    data.epoch_order.cache_clear()
    again = data.batches(some, 8, 1, 17)
    assert torch.equal(first.ids, again.ids) and first.rows == again.rows
    orders = {
        tuple(r for s in range(13) for r in data.batches(some, 8, seed, epoch * 13 + s).rows)
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    }
    assert len(orders) == 3


def test_positions_predict_the_next_token_of_the_target_only():
    some = examples(20)
    batch = data.batches(some, 20, 0, 0)
    for b, row in enumerate(batch.rows):
        whole, n = some[row].input + some[row].target, int(batch.lengths[b])
        assert batch.ids[b, :n].tolist() == whole[:-1] and n == len(whole) - 1
        expected = [NO_TARGET] * (len(some[row].input) - 1) + some[row].target
        assert (
            batch.targets[b, :n].tolist() == expected and (batch.targets[b, n:] == NO_TARGET).all()
        )


def test_similar_lengths_share_a_batch():
    some = examples(2000)
    share = lambda batches: (
        1 - sum(float(b.lengths.sum()) for b in batches) / sum(b.ids.numel() for b in batches)
    )
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
            assert (
                batch.rows == list(range(step * size, (step + 1) * size))
                and batch.lengths.tolist() == [length] * size
            )


def test_text_smaller_than_a_batch_is_a_batch():
    """Three windows for a batch of four: every step is an epoch, and holds all of them."""
    corpus = data.Corpus(np.arange(1, 17, dtype=np.int32), np.array([0, 4, 9, 16]))
    assert all(data.windows(corpus, 4, 5, 0, step).rows == [0, 1, 2] for step in range(6))
    assert (
        len(
            {
                tuple(data.windows(corpus, 4, 5, 0, step).ids.flatten().tolist())
                for step in range(12)
            }
        )
        > 3
    )


def test_windows_are_a_pure_function_of_seed_and_step(tokenizer):
    corpus = data.encode_texts(TEXTS, tokenizer)
    first = data.windows(corpus, 4, 16, 1, 9).ids
    others = [
        data.windows(corpus, 4, 16, seed, step).ids for seed, step in ((1, 8), (2, 9), (1, 10))
    ]
    assert torch.equal(first, data.windows(corpus, 4, 16, 1, 9).ids) and not any(
        torch.equal(first, other) for other in others
    )


def test_an_epochs_windows_hold_each_token_as_often_as_the_text(tokenizer):
    """But for the few that the last, incomplete window of the epoch would have held."""
    corpus = data.encode_texts(TEXTS, tokenizer)
    read = Counter(
        t
        for step in range((len(corpus.tokens) - 1) // 8)
        for t in data.windows(corpus, 1, 8, 3, step).ids.flatten().tolist()
    )
    left = Counter(corpus.tokens.tolist()) - read
    assert not read - Counter(corpus.tokens.tolist()) and sum(left.values()) <= 8


def test_options_are_tokens_as_the_target_is(tokenizer):
    example = data.Example("Is Anna in Velmor?", "yes", ("yes",), options=("no", "yes"))
    (encoded,) = data.encode([example], tokenizer, 0, 100)
    assert encoded.options[1] == encoded.target and encoded.input + encoded.options[
        0
    ] == tokenizer.encode("Is Anna in Velmor? no").ids + [0]
    with pytest.raises(ValueError, match="exceed"):
        data.encode(
            [data.Example("Is it?", "no", ("no",), options=("no", "perhaps " * 20))],
            tokenizer,
            0,
            12,
        )


def stream(T=100, rows=40):
    """Windows whose every token tells its place."""
    return data.Batch(
        torch.arange(rows * T).view(rows, T) + 10,
        torch.full((rows,), T),
        torch.zeros(rows, T, dtype=torch.long),
        list(range(rows)),
    )


def test_masked_words_are_the_text_but_for_fifteen_percent():
    special, V = {"[CLS]": 90_000, "[SEP]": 90_001, "[MASK]": 90_002}, 80_000
    batch, T = data.mask_words(stream(), special, V, 0, 0), 100
    assert batch.ids.shape == (40, T + 2) and batch.lengths.tolist() == [T + 2] * 40
    asked = batch.targets != data.NO_TARGET
    whole = torch.where(asked, batch.targets, batch.ids)
    assert (
        (whole[:, 0] == 90_000).all()
        and ((whole == 90_001).sum(1) == 1).all()
        and (whole[:, 1] != 90_001).all()
        and (whole[:, -1] != 90_001).all()
    )
    assert torch.equal(
        whole[(whole < 90_000)].view(40, T), stream().ids
    )  # nothing else is lost, moved or changed
    shown = batch.ids[asked]
    masked, same = (shown == 90_002).float().mean(), (shown == batch.targets[asked]).float().mean()
    assert (
        0.13 < asked.float().mean() < 0.17
        and 0.75 < masked < 0.85
        and 0.06 < same < 0.14
        and batch.targets[asked].max() < 90_000
    )
    assert len({(row == 90_001).nonzero().item() for row in whole}) > 20


def test_corrupted_spans_put_back_give_the_text():
    sentinels = [90_000 + i for i in range(32)]
    batch = data.corrupt_spans(stream(), sentinels, 0, 0)
    assert (
        batch.ids.shape == (40, 100 - 15 + 5)
        and batch.targets.shape == (40, 15 + 5 + 1)
        and batch.lengths.tolist() == [90] * 40
    )
    spans = []
    for ids, targets, text in zip(
        batch.ids.tolist(), batch.targets.tolist(), stream().ids.tolist()
    ):
        lost = {}
        for token in targets:
            if token >= 90_000:
                lost[token], last = [], token
            else:
                lost[last].append(token)
        assert list(lost) == sentinels[:6] and lost[sentinels[5]] == []
        assert [t for token in ids for t in lost.get(token, [token])] == text and ids[0] < 90_000
        spans += [len(span) for span in lost.values()][:5]
    assert set(range(1, 8)) <= set(spans) and sum(spans) / len(spans) == 3


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda *at: data.mask_words(
            stream(), {"[CLS]": 5000, "[SEP]": 5001, "[MASK]": 5002}, 5000, *at
        ),
        lambda *at: data.corrupt_spans(stream(), list(range(5000, 5032)), *at),
    ],
)
def test_corruption_is_a_pure_function_of_seed_and_step(corrupt):
    first = corrupt(1, 9).ids
    assert torch.equal(first, corrupt(1, 9).ids) and not any(
        torch.equal(first, corrupt(*at).ids) for at in ((1, 8), (2, 9))
    )


@pytest.mark.parametrize("T", [2, 3, 5, 20])
def test_short_windows_lose_a_span_too(T):
    batch = data.corrupt_spans(stream(T, 3), list(range(900, 932)), 0, 0)
    assert (
        sorted(t for t in batch.ids[0].tolist() + batch.targets[0].tolist() if t < 900)
        == stream(T, 3).ids[0].tolist()
    )


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="too few"):
        data.windows(data.encode_texts(["Anna"], tokenizer), 1, 100, 0, 0)
