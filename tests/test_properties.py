"""Properties that hold for whatever hypothesis draws: readers, tokens, batches, packing, metrics.

The examples are the same in every run. This draws more of them, and prints how many:

    HYPOTHESIS_EXAMPLES=1000 python -m pytest -q -s tests/test_properties.py
"""

import json
import os
from collections import Counter
from functools import wraps

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from eval import exact_match, paired_bootstrap, token_f1
from rerank import pack

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 40))
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=EXAMPLES
)
settings.load_profile("fixed")

RAN = Counter()  # examples of each property


def holds(*strategies):
    """`given`, with a count of the examples that run."""

    def decorate(test):
        @wraps(test)
        def counted(*args, **drawn):
            RAN[test.__name__] += 1
            test(*args, **drawn)

        return given(*strategies)(counted)

    return decorate


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
short = st.text("ab the,. \u00e9\u4e2d", max_size=12)
rows = st.fixed_dictionaries(
    {"question": words, "answer": st.lists(words, min_size=1, max_size=3)},
    optional={"task": words, "note": st.none() | st.integers() | words},
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["question", "input", "target", "answer", "answers", "options", "id"])
sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=40)
TOKENIZER = data.train_tokenizer(["the cat sat on the mat, and then the rat"], 280)


# Readers


@holds(st.lists(rows, min_size=1, max_size=5), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, records, ascii):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    lines = [json.dumps(record, ensure_ascii=ascii) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    examples = data.read(path)
    assert [e.input for e in examples] == [data.question_text(r["question"]) for r in records]
    assert [list(e.answers) for e in examples] == [[*map(str.strip, r["answer"])] for r in records]
    assert [e.source for e in examples] == [f"rows.jsonl:{i + 1}" for i in range(len(records))]


@holds(st.lists(st.dictionaries(keys, values), max_size=4))
def test_a_record_is_read_or_refused_by_its_line(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        assert len(data.read(path)) == len(records)
    except ValueError as error:
        assert "any.jsonl:" in str(error)


@holds(st.binary(max_size=60) | st.text('{}[]":,\\ \n\r\u2028a0').map(str.encode))
def test_bytes_are_read_or_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(content)
    for read in (data.read, data.read_texts):
        try:
            assert read(path)
        except ValueError as error:
            assert "bytes.jsonl:" in str(error)


# Tokens and batches


@holds(st.text(st.characters(codec="utf-8"), max_size=40))
def test_tokens_decode_to_their_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def examples_of(lengths):
    return [data.TokenizedExample([1] * a, [2] * b) for a, b in lengths]


@holds(sizes, st.integers(1, 9), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_has_every_example_once_and_its_batches_come_from_its_numbers(
    lengths, size, seed, epoch
):
    examples, steps = examples_of(lengths), -(-len(lengths) // size)
    numbers = range(epoch * steps, (epoch + 1) * steps)
    epochs = [data.batches(examples, size, seed, number) for number in numbers]
    rows = [row for batch in epochs for row in batch.rows]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(batch.rows) == size for batch in epochs[:-1])
    for number in reversed(numbers):  # a resumed run asks for the later ones only
        data.epoch_order.cache_clear()
        again, batch = data.batches(examples, size, seed, number), epochs[number - numbers[0]]
        assert again.rows == batch.rows and torch.equal(again.ids, batch.ids)
        targets = (batch.targets != data.IGNORE_INDEX).sum(1).tolist()
        assert targets == [lengths[row][1] for row in batch.rows]
        assert batch.lengths.tolist() == [sum(lengths[row]) - 1 for row in batch.rows]


@holds(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 9),
    st.integers(0, 5),
)
def test_a_window_predicts_the_stream_of_documents_token_by_token(sizes, size, length, seed, step):
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    corpus = data.Corpus(torch.arange(starts[-1]).numpy(), torch.tensor(starts).numpy())
    if starts[-1] <= length:
        return
    batch = data.windows(corpus, size, length, seed, step)
    after = {stop - 1 for stop in starts[1:]}  # behind these tokens comes another document
    for token, target in zip(batch.ids.flatten().tolist(), batch.targets.flatten().tolist()):
        assert target == token + 1 or token in after and target in starts
    assert len(set(batch.ids.flatten().tolist())) == batch.ids.numel()


# Packing and metrics


@holds(st.lists(st.tuples(st.integers(1, 20), st.integers(-3, 3)), max_size=9), st.integers(0, 40))
def test_packing_takes_the_best_that_fit(drawn, budget):
    passages, scores = [(i, n) for i, (n, _) in enumerate(drawn)], [score for _, score in drawn]
    packed, dropped = pack(passages, scores, budget, lambda passage: passage[1])
    assert len(packed) + dropped == len(passages)
    order = sorted(passages, key=lambda passage: -scores[passage[0]])  # stable
    left = budget
    for passage in order:
        assert (passage in packed) == (passage[1] <= left)
        left -= passage[1] * (passage in packed)
    assert packed == [passage for passage in order if passage in packed]


@holds(short, st.lists(short, min_size=1, max_size=3))
def test_f1_is_between_exact_match_and_one(prediction, answers):
    em, f1 = exact_match(prediction, answers), token_f1(prediction, answers)
    assert 0 <= em <= f1 <= 1 and em == float(any(exact_match(prediction, [a]) for a in answers))
    assert f1 == max(token_f1(a, [prediction]) for a in answers)
    assert exact_match(answers[0], answers) == token_f1(answers[0], answers) == 1


@holds(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=1, max_size=12))
def test_a_bootstrap_says_of_two_systems_the_opposite_of_their_exchange(pairs):
    a, b = zip(*pairs)
    one, two = paired_bootstrap(a, b, 200), paired_bootstrap(b, a, 200)
    expected = [-two[0], -two[2], -two[1], two[3]]
    torch.testing.assert_close(torch.tensor(one), torch.tensor(expected), atol=1e-12, rtol=0)
    assert one[1] - 1e-12 <= one[0] <= one[2] + 1e-12 or len(pairs) < 5
    if Counter(a) == Counter(b) == Counter([a[0]] * len(a)):
        assert one[:3] == (0, 0, 0) and one[3] == 1


def test_every_property_is_tried_on_all_its_examples():
    print(f"{len(RAN)} properties, {sum(RAN.values()):,} examples")
    assert all(count >= EXAMPLES for count in RAN.values()), RAN
