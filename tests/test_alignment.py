"""A prefix is what stands before the text, and nothing else. Every way to read a text (behind a
prefix, padded, in chunks, row by row, in several passes) equals one pass over the whole text."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import PREFIXES, QUESTIONS, STACKS, TINY, before, build, close, seeded, vectors, whole
from tokenizers import processors
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import Connector, from_labels, from_text, from_vocab, random, rms
from cache import Buffered, SampleCache
from generate import generate, option_scores, pad, prefill
from model import Prefix, append_kv, attend
from recurse import CONNECTOR_METHODS, Checkpointed, Stack, new_connector

FOUR = torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1], QUESTIONS[0] + [1, 1], [9] * 8])


@pytest.fixture(params=TINY)
def lm(request, make_lm):
    return make_lm(request.param)


def attend_written_out(q, k, v, lengths, window):
    """Softmax attention, one query at a time, over exactly the keys that it may see."""
    (B, H, T, D), P, y = q.shape, k.shape[2] - q.shape[2], torch.zeros_like(q)
    for b, h, t in product(range(B), range(H), range(T)):
        oldest = 0 if lengths is None else P - lengths.expand(B)[b]
        if window is not None:
            oldest = max(oldest, P + t + 1 - window)
        keys, values = (x[b, h * k.shape[1] // H, oldest : P + t + 1] for x in (k, v))
        y[b, h, t] = (keys @ q[b, h, t] / D**0.5).softmax(0) @ values
    return y


@pytest.mark.parametrize("window", [None, 1, 3, 4, 7, 50])
@pytest.mark.parametrize("P, rows", [(0, 1), (6, 1), (6, 3)])
def test_attention_equals_softmax_written_out(P, rows, window):
    past = tuple(torch.randn(rows, 2, P, 8, generator=seeded(i)) for i in (3, 4))
    for T, lengths in product((1, 4), (None, torch.tensor([P, P // 3, 0]), torch.tensor([P // 2]))):
        q = torch.randn(3, 4, T, 8, generator=seeded())
        k, v = (torch.randn(3, 2, T, 8, generator=seeded(i)) for i in (1, 2))
        joined = append_kv(past, k, v)
        y = attend(q, k, v, past, lengths, window)
        close(y, attend_written_out(q, *joined, lengths, window), 1e-6)
        assert torch.equal(y, attend(q, *joined, None, lengths, window))


# Prompts and padding


def check(lm, h, texts, prompts):
    """Row b of h (B, T, C) is what the LM makes of the end of text b behind its prompt, but for
    right padding."""
    for row, ids, prompt in zip(h, texts, prompts, strict=True):
        n = min(len(row), len(ids))
        close(lm.logits(row[:n]), whole(lm, ids, prompt)[-n:])


def test_prompt_made_of_real_tokens_gives_those_tokens_logits(lm):
    ids = QUESTIONS[3] + QUESTIONS[0]
    for cut in (0, 1, 8, 13):
        prefix = lm.read(lm.embed(torch.tensor(ids[:cut], dtype=torch.long)))
        check(lm, lm(lm.embed(torch.tensor([ids[cut:]])), prefix=prefix), [ids], [None])


def test_prompt_order_and_position_matter(lm):
    """With these weights a wrong position or a dropped prefix is far above every tolerance."""
    ids, prompt = QUESTIONS[3], vectors(lm, 4)
    assert (whole(lm, ids, prompt) - whole(lm, ids)).abs().max() > 0.05
    assert (whole(lm, ids)[-1] - whole(lm, ids[1::-1] + ids[2:])[-1]).abs().max() > 0.05
    assert (whole(lm, ids, prompt) - whole(lm, ids, prompt.flip(0))).abs().max() > 0.05


@pytest.mark.parametrize("kind", PREFIXES)
def test_batched_with_padding_equals_one_by_one_and_the_padding_is_forgotten(lm, kind):
    tokens, lengths = pad(QUESTIONS)
    prefix, prompts = before(kind, lm)
    x, more = lm.embed(tokens), lm.embed(torch.tensor([[21, 22, 23]] * 4))
    garbage = x.masked_fill((torch.arange(8) >= lengths[:, None])[:, :, None], 100.0)
    h, kept = lm(x, prefix, keep=True)
    close(h, lm(x, prefix))
    check(lm, h, QUESTIONS, prompts)
    expected = [len(ids) + (0 if p is None else len(p)) for ids, p in zip(QUESTIONS, prompts)]
    caches = (kept.drop_padding(8, lengths), *(lm.read(y, prefix, lengths) for y in (x, garbage)))
    for cache in caches:
        assert cache.row_lengths(4) == expected
        check(lm, lm(more, cache), [ids + [21, 22, 23] for ids in QUESTIONS], prompts)
    assert lm.read(x, lengths=torch.full((4,), 8)).lengths is None  # no padding, not ragged


def test_prefixes_and_their_gradients_equal_prompts_put_in_front_of_each_text(lm):
    x, all_5, ragged = lm.embed(FOUR), [slice(5)] * 4, [slice(5), slice(2), slice(0), slice(3, 5)]
    ways = (
        (all_5, lambda p: lm.read(p)),
        (all_5, lambda p: lm.read(p.expand(4, -1, -1))),
        (all_5, lambda p: Prefix.stack([lm.read(p)] * 4)),
        (ragged, lambda p: Prefix.stack([lm.read(p[part]) for part in ragged])),
    )
    for parts, read in ways:
        p, q = (vectors(lm, 5).requires_grad_() for _ in "pq")
        in_front = [lm(torch.cat([q[part], row])[None])[:, -8:] for part, row in zip(parts, x)]
        h = lm(x, read(p)), torch.cat(in_front)
        loss = [F.cross_entropy(lm.logits(y).mT, FOUR.roll(-1, 1)) for y in h]
        gradients = [torch.autograd.grad(y, r)[0] for y, r in zip(loss, (p, q))]
        close(*h)
        close(*gradients, 1e-6)
        assert gradients[0].abs().amax(1).min() > 0  # every slot gets one


# Prefixes of different lengths, and their rows


def test_rows_of_a_stacked_prefix_stack_again(lm):
    for kind, lengths in (("ragged", [7, 0, 0, 3]), ("rows", None)):
        prefix, prompts = before(kind, lm)
        rows = [prefix.select(torch.tensor([b])) for b in (2, 1, 3, 0)]
        prompts = [prompts[b] for b in (2, 1, 3, 0)]
        if kind == "ragged":
            rows[2], prompts[2] = None, None
        again = Prefix.stack(rows)
        assert again.lengths is lengths or again.lengths.tolist() == lengths
        check(lm, lm(lm.embed(FOUR), again), FOUR.tolist(), prompts)
    assert Prefix.stack([None, None]) is None
    with pytest.raises(ValueError, match="one row each"):
        Prefix.stack([again, rows[0]])


@pytest.mark.parametrize("kind", PREFIXES[1:])
@pytest.mark.parametrize("index", [[2, 2, 0, 1], [1]])
def test_selected_rows_continue_as_if_alone_and_preallocated_ones_in_place(lm, kind, index):
    (prefix, prompts), rows, n = before(kind, lm), torch.tensor(index), len(index)
    x, texts, prompts = lm.embed(FOUR[:n]), FOUR[:n].tolist(), [prompts[i] for i in index]
    selected, buffered = prefix.select(rows), Buffered.of(prefix).preallocate(rows, 8, len(rows))
    assert (selected is prefix) == (kind in ("empty", "shared", "padded"))  # one row serves any
    check(lm, lm(x, selected), texts, prompts)
    _, cache = lm(x[:, :5], buffered, keep=True)
    for buffer, kept in zip(buffered.buffer, cache.layers):
        assert [t.data_ptr() for t in buffer] == [t.data_ptr() for t in kept]
    last = cache.select(torch.tensor([n - 1]))
    check(lm, lm(x[:, 5:], cache), texts, prompts)
    other = x.flip(1)  # what is read without `keep` is not written
    close(lm(other[:, :5], buffered, last=2), lm(other[:, :5], selected, last=2))
    check(lm, lm(x[:, 5:], cache), texts, prompts)
    _, full = lm(x[:, 5:8], cache, keep=True)
    with pytest.raises(ValueError, match="do not fit the cache's buffer"):
        lm(x[:, :1], full, keep=True)
    check(lm, lm(x[-1:, 5:], last), texts[-1:], prompts[-1:])


class Written(TorchDispatchMode):
    """Counts the rows that assignments with an index write."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "index_put_":
            self.rows += len(args[2])
        return func(*args, **(kwargs or {}))


def test_only_rows_that_move_are_copied(make_lm):
    lm = make_lm("tied")
    cache = Buffered.of(lm.read(vectors(lm, 4)[None].expand(3, -1, -1)))
    cache = cache.preallocate(torch.arange(3), 5, 6)
    whole, layers = cache.buffer[0][0], lm.config.n_layers
    whole[:3, :, :4] = torch.arange(3.0)[:, None, None, None]  # a row's number
    whole[:, :, 4:] = -1
    with Written() as written:
        moved = cache.preallocate(torch.tensor([0, 2, 2, 1]), 5, 6)
    assert written.rows == 2 * layers * 2  # keys and values; rows 0 and 2 stay
    assert moved.buffer is cache.buffer and moved.rows == 4 and moved.size == 4
    assert moved.layers[0][0][:, 0, 0, 0].tolist() == [0, 2, 2, 1]
    assert (whole[:, :, 4:] == -1).all()


def test_what_does_not_fit_is_refused(lm):
    C, most, x = lm.config.dim, lm.config.max_len, vectors(lm, lm.config.max_len)[None]
    close(lm(x)[:, :9], lm(x[:, :9]))
    message = rf"0 \+ {most + 1} positions exceed the LM's context of {most}"
    with pytest.raises(ValueError, match=message):
        lm(torch.zeros(1, most + 1, C))
    with pytest.raises(ValueError, match=rf"4 \+ {most - 3} positions exceed"):
        lm(x[:, 3:], lm.read(vectors(lm, 4)))
    for wrong in (torch.zeros(1, 3, C + 1), torch.zeros(3, C)):
        with pytest.raises(ValueError, match=rf"expected \(B, T, {C}\)"):
            lm(wrong)
    for lengths in ([2, 2], [2, 2, 2], [1, 2], [1, 2, 3]):  # a prefix of another number of rows
        prefix = Prefix.stack([lm.read(vectors(lm, n)) for n in lengths])
        refused = partial(pytest.raises, ValueError, match=f"{len(lengths)} rows")
        with refused():
            lm(lm.embed(FOUR), prefix)
        for ids in ([[3]] * 4, [[3]], [[3, 4]] * 4, [[3, 4]]):
            with refused():
                generate(lm, ids, prefix, 2, n=2)
            with refused():
                option_scores(lm, ids, [[[3], [4]]] * len(ids), prefix)


# The prefix as a cache


def in_chunks(lm, x, chunks, cache=None):
    """What the LM makes of x (B, T, C), read part by part, and the prefix after it."""
    parts = []
    for part in x.split(chunks, dim=1):
        h, cache = lm(part, cache, keep=True)
        parts.append(h)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("chunks", [[3, 1, 4], [1] * 8])
@pytest.mark.parametrize("kind", PREFIXES)
def test_reading_in_chunks_equals_reading_at_once(lm, chunks, kind):
    prefix, prompts = before(kind, lm)
    h, cache = in_chunks(lm, lm.embed(FOUR), chunks, prefix)
    check(lm, h, FOUR.tolist(), prompts)
    at_once = lm.read(lm.embed(FOUR), prefix)
    lengths = [8 + (0 if p is None else len(p)) for p in prompts]
    assert cache.row_lengths(4) == at_once.row_lengths(4) == lengths
    assert cache.select(torch.tensor([3, 1])).row_lengths(2) == [lengths[3], lengths[1]]
    for ours, theirs in zip(cache.layers, at_once.layers):
        for b, n in enumerate(lengths):
            close([t[b, :, -n:] for t in ours], [t[b, :, -n:] for t in theirs])


def test_read_skips_the_last_layer_and_the_batch(lm, monkeypatch):
    shapes, plain, n = [], lm.layers.attend, lm.config.n_layers
    shared = SampleCache.attend

    def spy(q, *rest):
        shapes.append(len(q))
        return plain(q, *rest)

    def shared_spy(self, q, *rest):
        shapes.append(len(q))
        return shared(self, q, *rest)

    lm.layers.attend = spy
    monkeypatch.setattr(SampleCache, "attend", shared_spy)
    assert lm.new_layers(1).attend is spy
    prefix = lm.read(vectors(lm, 5))
    assert shapes == [1] * (n - 1)
    _, kept = lm(vectors(lm, 5)[None], keep=True)
    close(prefix.layers, kept.layers, 0.0)
    shapes.clear()
    drawn = generate(lm, QUESTIONS[::2], prefix, 2, temperature=1.0, n=3, generator=seeded())
    rows = len({(b, sample.ids[0]) for b, some in enumerate(drawn) for sample in some})
    # Reading the questions, the first new token, the second: samples that agree are one row.
    assert shapes == [2] * (n - 1) + [2] * n + [rows] * n and 2 < rows <= 6


@pytest.mark.parametrize("kind", PREFIXES)
def test_rows_that_share_their_questions_continue_as_with_caches_of_their_own(lm, kind):
    _, cache = prefill(lm, QUESTIONS, before(kind, lm)[0], [9] * 4)
    shared, questions = SampleCache.of(cache), cache.layers[0][0]
    for index, kept in (([2, 0, 2, 3, 2], 4), ([3, 2, 1], 4), ([2, 2, 1], 2), ([1], 1)):
        rows, layers = torch.tensor(index), shared.questions
        shared, cache = shared.preallocate(rows, 8, 6), cache.select(rows)
        assert len(shared.questions[0][0]) == kept  # without rows they go, once they are half
        assert shared.questions is layers or kept < len(layers[0][0])
        assert shared.size == cache.size and len(shared.buffer[0][0]) == 6
        for ids in torch.arange(4, 4 + 2 * len(index)).view(2, -1, 1):
            h, shared = lm(lm.embed(ids), shared, keep=True)
            expected, cache = lm(lm.embed(ids), cache, keep=True)
            close(h, expected)
    assert shared.questions[0][0].untyped_storage().nbytes() <= questions.numel() * 4 / 2
    close(lm(lm.embed(torch.tensor([[9]])), shared), lm(lm.embed(torch.tensor([[9]])), cache))
    with pytest.raises(ValueError, match="one token of each row, not 2"):
        lm(lm.embed(torch.tensor([[9, 9]])), shared)
    for method in (shared.select, shared.drop_padding, shared.save):
        with pytest.raises(ValueError, match="cannot be selected"):
            method(torch.tensor([0]), None)


@pytest.mark.parametrize("window", [None, 9])
def test_rows_that_share_their_questions_in_bf16_are_nearly_as_exact(window):
    """Scores are rounded once more than in model.attend, which keeps them in float32."""
    kv = [torch.randn(2, 2, 30, 16, generator=seeded(i)) for i in (1, 2)]
    own = [torch.randn(6, 2, 4, 16, generator=seeded(i)) for i in (3, 4)]
    q, rows = 2 * torch.randn(6, 4, 1, 16, generator=seeded()), torch.tensor([0, 1, 1, 0, 0, 1])

    def errors(dtype):
        cache = SampleCache.of(Prefix([tuple(t.to(dtype) for t in kv)])).preallocate(rows, 4, 6)
        given = [t.to(dtype) for t in (q, *own)]
        shared = cache.attend(*given, cache.questions[0], None, window)
        past = tuple(t[rows].to(dtype) for t in kv)
        plain = attend(*given, past, None, window)
        exact = attend(*(t.double() for t in given), tuple(t.double() for t in past), None, window)
        return [(y - exact).abs().mean().item() for y in (shared, plain)]

    assert max(errors(torch.float32)) < 1e-6
    shared, plain = errors(torch.bfloat16)
    assert plain < shared * 1.1 and shared < 3 * plain


@pytest.mark.parametrize("kind", PREFIXES)
def test_the_last_positions_are_computed_alone(lm, kind):
    """With `last` the last layer computes no others, and every position is in the prefix."""
    (prefix, _), x, computed = before(kind, lm), lm.embed(FOUR), []
    whole, kept = lm(x, prefix, keep=True)
    for block in lm.layers:
        block.mlp.register_forward_hook(lambda _, given, y: computed.append(y.shape[1]))
    for last in (1, 3, 8):
        close(lm(x, prefix, last=last), whole[:, -last:])
        h, cache = lm(x, prefix, keep=True, last=last)
        close(h, whole[:, -last:])
        close(cache.layers, kept.layers)
        assert cache.row_lengths(4) == kept.row_lengths(4)
        close(Checkpointed(lm)(x.clone().requires_grad_(), prefix, last=last), h)
    widths = [w for last in (1, 3, 8) for w in 3 * ([8] * (lm.config.n_layers - 1) + [last])]
    assert computed == widths
    x = x.clone().requires_grad_()
    some = [y.square().sum() for y in (lm(x, prefix, last=3), lm(x, prefix)[:, -3:])]
    close(*(torch.autograd.grad(y, x)[0] for y in some), 1e-4)


# Connectors and compositions


def test_connector_reads_earlier_positions_and_no_later_one(lm):
    connector = build("lm_connector", lm)[0].parts[1]
    x = torch.randn(2, 7, lm.config.dim, generator=seeded())
    h = connector(x)
    x[:, 5] += torch.randn(lm.config.dim, generator=seeded(1))
    changed = (connector(x) - h).abs().amax((0, 2))
    assert not changed[:5].any() and changed[5:].min() > 1e-3


class Embeddings(nn.Module):
    """A Connector that knows the text: it puts out the embeddings self.x of its positions."""

    layers = [None]

    def forward(self, x, prefix=None, keep=False, last=None):
        start = prefix.size if prefix else 0
        end = start + x.shape[1]
        kept = Prefix([(torch.zeros(len(x), 1, end, 2),) * 2])  # remembers how far it is
        return (self.x[:, start:end], kept) if keep else self.x[:, start:end]


def test_connector_that_outputs_the_embeddings_gives_the_bare_lm(lm):
    x, connector = lm.embed(FOUR), Embeddings()
    stack, connector.x = Stack(lm, [connector]), x
    assert torch.equal(stack(x), lm(x))
    h, cache = in_chunks(stack, x, [4, 4])
    close(h, lm(x))
    last = stack.prefix_of(2, cache)  # the last pass's own cache
    close(lm(x[:, 2:], last), lm(x[:, 2:], lm.read(x)))
    assert generate(Stack(lm), QUESTIONS, None, 5) == generate(lm, QUESTIONS, None, 5)


@pytest.mark.parametrize("kind", CONNECTOR_METHODS)
def test_an_lm_refuses_the_prefix_of_a_composition_and_the_reverse(lm, kind):
    """A prefix of more layers would be read as one of the first of them."""
    stack, _ = build(kind, lm)
    for model, other in ((lm, stack), (stack, lm)):
        prefix = other.read(vectors(lm, 3))
        for call in (model, model.read):
            with pytest.raises(ValueError, match=r"the prefix has \d layers, expected \d"):
                call(lm.embed(FOUR), prefix)


@pytest.mark.parametrize("kind", STACKS)
def test_composition_is_its_formula_at_once_and_in_chunks(lm, kind):
    stack, formula = build(kind, lm)
    x = stack.embed(FOUR[:2, :6])
    h = formula(x)
    close(stack(x), h, 1e-5 if kind == "training_free" else 0.0)  # its norm is written out here
    close(stack(x, last=2), h[:, -2:], 1e-4)
    assert torch.equal(stack.logits(h), lm.logits(h))
    assert (h - lm(x)).abs().max() > 0.05  # the Connector does something
    for chunks in ([1] * 6, [2, 1, 3]):
        again, cache = in_chunks(stack, x, chunks)
        close(again, h, 1e-4)  # each pass amplifies the rounding of the one before
    assert {k.shape[2] for k, _ in cache.layers} == {6}
    assert len(cache.layers) == sum(len(part.layers) for part in stack.parts)
    close(stack.read(x).layers, cache.layers, 1e-4)


def test_new_connector_starts_at_the_scale_of_what_it_replaces(lm):
    lm.norm.weight.data.fill_(3.0)
    x = lm.embed(pad(QUESTIONS)[0])
    for method in CONNECTOR_METHODS:
        replaced = 3.0 if method == "lm_connector" else rms(lm.embed_tokens.weight)
        connector = new_connector(lm, method, 2)
        for given in (x, lm(x)):
            assert rms(connector(given)) == pytest.approx(replaced, rel=1e-2)
            assert rms(Connector(lm.new_layers(2))(given)) == pytest.approx(1.0, rel=1e-2)
        assert len(connector.layers) == 2
    assert rms(torch.tensor([[3.0, 4.0], [0.0, 5.0]])) == pytest.approx((50 / 4) ** 0.5)


# How soft prompts start: which tokens stand in which slot

TABLE = torch.arange(40.0)[:, None] * torch.tensor([1.0, 10.0, -1.0])  # token i is (i, 10 i, -i)


@pytest.fixture
def tokenizer(tokenizer):
    """Its `encode` adds a BOS, w1, unless told not to."""
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    return tokenizer


def tokens(rows):
    """The token ids whose embeddings these rows of TABLE are."""
    assert rows.dtype == torch.float32 and torch.equal(rows, TABLE[rows[:, 0].long()])
    return rows[:, 0].long().tolist()


def sampled(length, seed=0, **more):
    return tokens(from_vocab(length, TABLE, generator=seeded(seed), **more))


def test_random_fills_its_interval_from_both_sides():
    drawn = random(2000, TABLE, scale=0.3, generator=seeded())
    assert drawn.shape == (2000, 3) and abs(drawn.mean()) < 0.01
    assert -0.3 <= drawn.min() < -0.29 and 0.29 < drawn.max() <= 0.3
    assert 0.49 < random(2000, TABLE, generator=seeded()).abs().max() <= 0.5
    assert torch.equal(drawn, random(2000, TABLE, scale=0.3, generator=seeded()))


def test_from_vocab_samples_the_population_and_repeats_only_when_it_is_too_small():
    assert sorted(sampled(10, population=10)) == list(range(10)) != sampled(10, population=10)
    assert max(sampled(9, population=10)) < 10 and sampled(10, seed=1) != sampled(10, seed=2)
    assert sorted(sampled(40)) == list(range(40))  # the table has fewer than 5000 rows
    assert sorted(map(sampled(25, population=10).count, range(10))) == [2] * 5 + [3] * 5
    assert from_vocab(0, TABLE).shape == (0, 3)


def test_from_text_puts_token_i_in_slot_i(tokenizer):
    assert tokens(from_text(3, TABLE, tokenizer, "w7 w5 w7 w9")) == [7, 5, 7]  # cut, and no BOS
    filled = from_text(6, TABLE, tokenizer, "w7 w5", generator=seeded())
    assert tokens(filled) == [7, 5, *sampled(4)]
    with pytest.raises(ValueError, match="'' has no tokens"):
        from_text(3, TABLE, tokenizer, "")


def test_from_labels_takes_the_mean_of_each_labels_tokens(tokenizer):
    prompt = from_labels(4, TABLE, tokenizer, ["w4", "w2 w3 w10"], generator=seeded())
    assert torch.equal(prompt[:2], torch.tensor([[4.0, 40.0, -4.0], [5.0, 50.0, -5.0]]))
    assert tokens(prompt[2:]) == sampled(2)
    with pytest.warns(UserWarning, match="3 labels for a prompt of 2: the last 1 are left out"):
        assert tokens(from_labels(2, TABLE, tokenizer, ["w4", "w2", "w9"])) == [4, 2]
    assert tokens(from_labels(3, TABLE, tokenizer, [], generator=seeded())) == sampled(3)
