"""The LM and its prefixes against the plainest equivalent: one forward pass over the whole sequence, no prefix, no padding, no cache."""

import fnmatch
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from model import (
    LM,
    Prefix,
    Sample,
    answer,
    attend,
    choose,
    each_pass,
    generate,
    join,
    load_tokenizer,
    locate,
    main,
    option_scores,
    pad,
    read_config,
    read_tensors,
)

QUESTIONS = [
    [5, 9, 11, 4, 30, 8],
    [7],
    [6, 3, 44, 20],
    [12, 13, 14, 15, 16, 17, 18, 19],
]  # of any lengths, one token among them


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def vectors(lm, length, seed=1):
    """A soft prompt that is no tokens' embeddings, at their scale."""
    return torch.randn(length, lm.config.dim, generator=torch.Generator().manual_seed(seed)) * 0.25


def whole(lm, ids, prompt=None):
    """The reference: logits (len(ids), V) of one text, its prompt's vectors (P, C) simply put in front."""
    x = lm.embed(torch.tensor([ids]))[0]
    x = x if prompt is None else torch.cat([prompt, x])
    return lm.logits(lm(x[None]))[0, -len(ids) :]


def naive_greedy(lm, ids, prompt=None, new=6):
    text = list(ids)
    for _ in range(new):
        text.append(whole(lm, text, prompt)[-1].argmax().item())
    return text[len(ids) :]


def naive_logprob(lm, ids, option, prompt=None):
    logprobs = whole(lm, (ids + option)[:-1], prompt).log_softmax(
        -1
    )  # nothing reads the last token
    return sum(logprobs[len(ids) - 1 + t, token].item() for t, token in enumerate(option))


def four_prefixes(lm):
    """A prefix or None for each of QUESTIONS, all of different lengths; and the vectors they were read from."""
    prompts = [vectors(lm, 3, 1), None, vectors(lm, 7, 2), vectors(lm, 1, 3)]
    return [None if p is None else lm.read(p) for p in prompts], prompts


def tokens_of(samples):
    return [[sample.ids for sample in row] for row in samples]


# --- Alignment: a prefix is what stands before the text, and nothing else ------------------------------------------------


def test_prompt_made_of_real_tokens_gives_those_tokens_logits(lm):
    ids = QUESTIONS[3] + QUESTIONS[0]
    for cut in (1, 8, 13):
        prompt = lm.embed(torch.tensor(ids[:cut]))
        h = lm(lm.embed(torch.tensor([ids[cut:]])), prefix=lm.read(prompt))
        close(lm.logits(h)[0], whole(lm, ids)[cut:])


def test_prompt_of_length_0_is_the_bare_lm(lm):
    empty = lm.read(torch.zeros(0, lm.config.dim))
    assert empty.size == 0
    x = lm.embed(pad(QUESTIONS)[0])
    close(lm(x, empty), lm(x))
    assert tokens_of(generate(lm, QUESTIONS, empty, 5)) == tokens_of(
        generate(lm, QUESTIONS, None, 5)
    )
    stacked = Prefix.stack([empty, lm.read(vectors(lm, 2)), None, empty])
    assert (
        tokens_of(generate(lm, QUESTIONS, stacked, 5))[0]
        == tokens_of(generate(lm, QUESTIONS, None, 5))[0]
    )


def test_the_prompt_matters_and_so_does_the_order_of_the_text(lm):
    """Guards the tests around it: on these weights, a wrong position or a dropped prefix is far above every tolerance used."""
    ids, prompt = QUESTIONS[3], vectors(lm, 4)
    assert (whole(lm, ids, prompt) - whole(lm, ids)).abs().max() > 0.05
    assert (whole(lm, ids)[-1] - whole(lm, ids[1::-1] + ids[2:])[-1]).abs().max() > 0.05
    assert (whole(lm, ids, prompt) - whole(lm, ids, prompt.flip(0))).abs().max() > 0.05


def test_right_padding_changes_nothing(lm):
    tokens, lengths = pad(QUESTIONS)
    assert lengths.tolist() == [6, 1, 4, 8]
    for prompt in (None, vectors(lm, 5)):
        z = lm.logits(lm(lm.embed(tokens), None if prompt is None else lm.read(prompt)))
        for b, ids in enumerate(QUESTIONS):
            close(z[b, : len(ids)], whole(lm, ids, prompt))


def test_shared_prefix_equals_one_per_row_and_so_does_its_gradient(lm):
    tokens = torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1], QUESTIONS[0] + [1, 1]])
    targets, B = tokens.roll(-1, 1), len(tokens)

    def shared(p):
        return lm(lm.embed(tokens), lm.read(p))

    def per_row(p):
        return lm(lm.embed(tokens), lm.read(p.expand(B, -1, -1)))

    def concatenated(p):
        return lm(torch.cat([p.expand(B, -1, -1), lm.embed(tokens)], 1))[:, len(p) :]

    results = []
    for compute in (shared, per_row, concatenated):
        p = vectors(lm, 5).requires_grad_()
        z = lm.logits(compute(p))
        loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten())
        results.append((z.detach(), *torch.autograd.grad(loss, p)))
    assert results[0][1].abs().min(1).values.max() > 0  # every slot gets a gradient
    for z, gradient in results[:2]:
        close(z, results[2][0])
        close(gradient, results[2][1], 1e-6)


# --- Ragged prefixes -----------------------------------------------------------------------------------------------------


def test_stack_of_different_lengths_equals_each_alone(lm):
    prefixes, prompts = four_prefixes(lm)
    stacked = Prefix.stack(prefixes)
    assert stacked.lengths.tolist() == stacked.row_lengths(4) == [3, 0, 7, 1] and stacked.size == 7
    h, kept = lm(lm.embed(pad(QUESTIONS)[0]), stacked, keep=True)
    close(h, lm(lm.embed(pad(QUESTIONS)[0]), stacked))
    z = lm.logits(h)
    for b, ids in enumerate(QUESTIONS):
        close(z[b, : len(ids)], whole(lm, ids, prompts[b]))
    kept = kept.trim(torch.tensor([8 - len(ids) for ids in QUESTIONS]))
    assert kept.lengths.tolist() == [9, 1, 11, 9]
    z = lm.logits(lm(lm.embed(torch.tensor([[21, 22]] * 4)), kept))
    for b, ids in enumerate(QUESTIONS):
        close(z[b], whole(lm, ids + [21, 22], prompts[b])[-2:])


def test_stack_of_equal_lengths_is_not_ragged_and_of_none_is_none(lm):
    a, b = lm.read(vectors(lm, 4, 1)), lm.read(vectors(lm, 4, 2))
    both = Prefix.stack([a, b])
    assert both.lengths is None and torch.equal(
        both.layers[1][0], torch.cat([a.layers[1][0], b.layers[1][0]])
    )
    assert Prefix.stack([None, None]) is None
    with pytest.raises(ValueError, match="one row each"):
        Prefix.stack([both, a])


def test_stack_restacks_ragged_rows_and_carries_gradients(lm):
    first, second = vectors(lm, 5, 1).requires_grad_(), vectors(lm, 2, 2).requires_grad_()
    x = lm.embed(torch.tensor([QUESTIONS[0], QUESTIONS[0]]))
    lm.logits(lm(x, Prefix.stack([lm.read(first), lm.read(second)]))).square().mean().backward()
    for b, p in enumerate((first, second)):
        alone = p.detach().clone().requires_grad_()
        (lm.logits(lm(x[:1], lm.read(alone))).square().mean() / 2).backward()
        close(p.grad, alone.grad, 1e-6)
    ragged = Prefix.stack([lm.read(first), lm.read(second)])
    again = Prefix.stack([ragged.rows(torch.tensor([1])), None, ragged.rows(torch.tensor([0]))])
    assert again.lengths.tolist() == [2, 0, 5]
    for b, alone in enumerate((lm.read(second), None, lm.read(first))):
        close(lm(x[:1].expand(3, -1, -1), again)[b], lm(x[:1], alone)[0])


def test_generate_and_option_scores_take_a_list_of_prefixes(lm):
    prefixes, prompts = four_prefixes(lm)
    for given in (prefixes, Prefix.stack(prefixes)):
        got = generate(lm, QUESTIONS, given, 6)
        assert tokens_of(got) == [[naive_greedy(lm, ids, p)] for ids, p in zip(QUESTIONS, prompts)]
        scores = option_scores(lm, QUESTIONS, [[[4, 5], [6]]] * 4, given)
        for ids, p, row in zip(QUESTIONS, prompts, scores):
            close(
                row,
                torch.tensor([naive_logprob(lm, ids, [4, 5], p), naive_logprob(lm, ids, [6], p)]),
            )
    with pytest.raises(ValueError, match="3 prefixes for 4 questions"):
        generate(lm, QUESTIONS, prefixes[:3], 2)


@pytest.mark.parametrize("rows", [2, 3])
def test_prefix_of_another_number_of_rows_is_refused(lm, rows):
    for prompts in ([2] * rows, range(1, rows + 1)):  # as many positions in each row, or ragged
        prefix = Prefix.stack([lm.read(vectors(lm, n)) for n in prompts])
        for ids in ([[3]] * 4, [[3]], [[3, 4]] * 4, [[3, 4]]):
            with pytest.raises(ValueError, match=f"{rows} rows"):
                generate(lm, ids, prefix, 2, n=2)
            with pytest.raises(ValueError, match=f"{rows} rows"):
                option_scores(lm, ids, [[[3], [4]]] * len(ids), prefix)
        with pytest.raises(ValueError, match=f"{rows} rows"):
            lm(lm.embed(torch.tensor([[3]] * 4)), prefix)


def test_one_padded_row_can_be_shared(lm):
    """A prefix of one row counts for any number of texts, also when it was read with padding behind it."""
    prompt = vectors(lm, 5)
    shared = lm.read(
        torch.cat([prompt, torch.ones(3, lm.config.dim)])[None], lengths=torch.tensor([5])
    )
    assert shared.row_lengths(4) == [5] * 4
    for ids in (QUESTIONS, [[7], [8]]):
        expected = [[naive_greedy(lm, row, prompt, 3)] * 2 for row in ids]
        assert tokens_of(generate(lm, ids, shared, 3, n=2)) == expected
        _, kept = lm(lm.embed(torch.tensor([[7]] * 4)), shared, keep=True)
        assert kept.row_lengths(4) == [6] * 4 and kept.rows(torch.tensor([3, 1])).row_lengths(
            2
        ) == [6, 6]
        for row, scores in zip(ids, option_scores(lm, ids, [[[4], [5, 6]]] * len(ids), shared)):
            close(
                scores,
                torch.tensor([naive_logprob(lm, row, option, prompt) for option in ([4], [5, 6])]),
            )


# --- The prefix as a cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[3, 1, 4], [1] * 8, [8]])
@pytest.mark.parametrize("before", ["nothing", "shared", "ragged"])
def test_reading_in_chunks_equals_reading_at_once(lm, chunks, before):
    tokens = torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1], QUESTIONS[0] + [1, 1], [9] * 8])
    prefixes, prompts = four_prefixes(lm)
    if before == "nothing":
        cache, prompts = None, [None] * 4
    elif before == "shared":
        cache, prompts = prefixes[2], [prompts[2]] * 4
    else:
        cache = Prefix.stack(prefixes)
    start, parts = cache, []
    for x in lm.embed(tokens).split(chunks, dim=1):
        h, cache = lm(x, cache, keep=True)
        parts.append(h)
    z = lm.logits(torch.cat(parts, 1))
    for b in range(4):
        close(z[b], whole(lm, tokens[b].tolist(), prompts[b]))
    at_once = lm.read(lm.embed(tokens), start)
    assert (
        cache.row_lengths(4)
        == at_once.row_lengths(4)
        == [8 + (0 if p is None else len(p)) for p in prompts]
    )
    for (k, v), (k_once, v_once) in zip(cache.layers, at_once.layers):
        for b, n in enumerate(cache.row_lengths(4)):
            close(k[b, :, -n:], k_once[b, :, -n:])
            close(v[b, :, -n:], v_once[b, :, -n:])


def test_read_with_lengths_forgets_the_padding(lm):
    tokens, lengths = pad(QUESTIONS)
    prefixes, prompts = four_prefixes(lm)
    for before, vectors_before in (
        (None, [None] * 4),
        (prefixes[2], [prompts[2]] * 4),
        (Prefix.stack(prefixes), prompts),
    ):
        prefix = lm.read(lm.embed(tokens), before, lengths)
        garbage = lm.embed(tokens).clone()
        for b, n in enumerate(lengths):
            garbage[b, n:] = 100.0
        same = lm.read(garbage, before, lengths)
        z = [lm.logits(lm(lm.embed(torch.tensor([[21, 22, 23]] * 4)), p)) for p in (prefix, same)]
        close(z[0], z[1])
        for b, ids in enumerate(QUESTIONS):
            P = 0 if vectors_before[b] is None else len(vectors_before[b])
            assert prefix.row_lengths(4)[b] == P + len(ids)
            close(z[0][b], whole(lm, ids + [21, 22, 23], vectors_before[b])[-3:])
    unpadded = lm.read(lm.embed(tokens), lengths=torch.full((4,), 8))
    assert unpadded.lengths is None and unpadded.size == 8


def test_rows_repeats_and_drops(lm):
    prefixes, prompts = four_prefixes(lm)
    stacked, index = Prefix.stack(prefixes), torch.tensor([2, 2, 0])
    chosen = stacked.rows(index)
    assert chosen.lengths.tolist() == [7, 7, 3]
    z = lm.logits(lm(lm.embed(torch.tensor([QUESTIONS[0]] * 3)), chosen))
    for b, i in enumerate(index):
        close(z[b], whole(lm, QUESTIONS[0], prompts[i]))
    assert prefixes[2].rows(index) is prefixes[2]  # a shared prefix is never copied out
    assert each_pass(lambda p: p.size, prefixes[0]) == 3 and each_pass(
        lambda p: p.size, (prefixes[0], prefixes[2])
    ) == (3, 7)


def test_read_skips_the_last_layer_and_the_batch(lm, make_lm):
    calls, attend = [], lm.layers.attend

    def spy(q, *rest):
        calls.append(tuple(q.shape))
        return attend(q, *rest)

    lm.layers.attend = spy
    prompt = vectors(lm, 5)
    prefix = lm.read(prompt)
    assert [shape[0] for shape in calls] == [1] * (lm.config.n_layers - 1)
    _, kept = lm(prompt[None], keep=True)
    assert (
        len(calls) == 2 * lm.config.n_layers - 1
        and len(kept.layers) == len(prefix.layers) == lm.config.n_layers
    )
    for ours, theirs in zip(prefix.layers, kept.layers):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    calls.clear()
    generate(
        lm,
        [QUESTIONS[0], QUESTIONS[2]],
        prefix,
        2,
        temperature=1.0,
        n=3,
        generator=torch.Generator().manual_seed(0),
    )
    layers = lm.config.n_layers
    assert [shape[0] for shape in calls] == [2] * (layers - 1) + [2] * layers + [
        6
    ] * layers  # read; first new token; second


# --- Generation ----------------------------------------------------------------------------------------------------------


def test_greedy_equals_the_naive_loop_one_by_one_and_batched(lm):
    for prompt in (None, vectors(lm, 6)):
        prefix = None if prompt is None else lm.read(prompt)
        expected = [[naive_greedy(lm, ids, prompt, 9)] for ids in QUESTIONS]
        assert len({tuple(row[0]) for row in expected}) == len(QUESTIONS)
        assert tokens_of(generate(lm, QUESTIONS, prefix, 9)) == expected
        assert [tokens_of(generate(lm, [ids], prefix, 9))[0] for ids in QUESTIONS] == expected


def test_n_samples_equal_the_question_asked_n_times(lm):
    options = dict(max_new_tokens=7, temperature=1.3, top_k=9, top_p=0.95, eos=[3, 4, 5, 6])
    prefix = lm.read(vectors(lm, 3))
    shared = generate(
        lm, QUESTIONS, prefix, n=3, generator=torch.Generator().manual_seed(5), **options
    )
    repeated = generate(
        lm,
        [ids for ids in QUESTIONS for _ in range(3)],
        prefix,
        generator=torch.Generator().manual_seed(5),
        **options,
    )
    assert tokens_of(shared) == [[repeated[3 * b + i][0].ids for i in range(3)] for b in range(4)]
    assert len({tuple(s.ids) for row in shared for s in row}) > 6  # they are samples, not copies
    again = generate(
        lm, QUESTIONS, prefix, n=3, generator=torch.Generator().manual_seed(5), **options
    )
    assert shared == again
    greedy = generate(lm, QUESTIONS, prefix, 4, n=2)
    assert all(a.ids == b.ids for a, b in greedy) and len(greedy) == 4


def test_logprob_is_the_whole_vocabulary_at_temperature_1(lm):
    prompt = vectors(lm, 3)
    samples = generate(
        lm,
        QUESTIONS,
        lm.read(prompt),
        6,
        temperature=0.7,
        top_k=5,
        n=4,
        eos=list(range(0, 60, 5)),
        generator=torch.Generator().manual_seed(2),
    )
    lengths = set()
    for ids, row in zip(QUESTIONS, samples):
        for sample in row:
            assert isinstance(sample, Sample) and sample.logprob == pytest.approx(
                naive_logprob(lm, ids, sample.ids, prompt), abs=1e-4
            )
            lengths.add(len(sample.ids))
    assert 6 in lengths and len(lengths) > 1  # some ended early (their eos counts), some did not


def test_eos_ends_its_row_and_leaves_the_others_alone(lm):
    free = tokens_of(generate(lm, QUESTIONS, None, 8))
    for eos in sorted({row[0][2] for row in free}):  # each of them ends at least one row early
        stopped = generate(lm, QUESTIONS, None, 8, eos=eos)
        for (long,), (sample,) in zip(free, stopped):
            assert sample.ids == long[: long.index(eos) + 1] if eos in long else sample.ids == long
    firsts = [row[0][0] for row in free]
    assert tokens_of(generate(lm, QUESTIONS, None, 8, eos=firsts)) == [
        [[t]] for t in firsts
    ]  # all end at once
    assert tokens_of(generate(lm, QUESTIONS, None, 8, eos=())) == free


def test_finished_rows_leave_the_batch(lm):
    free = tokens_of(generate(lm, QUESTIONS, None, 4))
    seen, forward = [], lm.forward
    lm.forward = lambda x, *rest, **more: seen.append(len(x)) or forward(x, *rest, **more)
    firsts = {row[0][0] for row in free}
    eos = next(t for t in firsts if sum(t in row[0] for row in free) < 4)
    generate(lm, QUESTIONS, None, 4, eos=eos)
    alive = [sum(eos not in row[0][:step] for row in free) for step in range(4)]
    assert seen == alive and alive[-1] < 4


def test_sampling_without_randomness_left_is_greedy(lm):
    greedy = tokens_of(generate(lm, QUESTIONS, None, 6))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 9, "top_p": 1e-6}):
        assert tokens_of(generate(lm, QUESTIONS, None, 6, temperature=4.0, **only)) == greedy
    hot = tokens_of(
        generate(
            lm, QUESTIONS, None, 6, temperature=4.0, generator=torch.Generator().manual_seed(0)
        )
    )
    assert hot != greedy


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [p * p / 0.365 for p in (0.5, 0.3, 0.15, 0.05)]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.45}, [1, 0, 0, 0]),
        (
            {"temperature": 1.0, "top_p": 0.55},
            [0.625, 0.375, 0, 0],
        ),  # the smallest set that reaches it
        ({"temperature": 1.0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.81}, [p / 0.95 for p in (0.5, 0.3, 0.15)] + [0]),
        (
            {"temperature": 1.0, "top_k": 3, "top_p": 0.83},
            [0.625, 0.375, 0, 0],
        ),  # the nucleus is taken of what the k leave
    ],
)
def test_frequencies_of_sampling(options, expected):
    draws, order = 20_000, torch.tensor([2, 0, 3, 1])  # the likeliest token is not the first id
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log() + 3.0
    full = {"top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)} | options
    counts = torch.bincount(choose(logits.expand(draws, 4), **full), minlength=4)[order]
    for count, p in zip(counts.tolist(), expected):
        assert abs(count / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0"),
        ({"temperature": -0.1}, "temperature cannot be -0.1"),
        ({"temperature": math.inf}, "temperature cannot be inf"),
        ({"temperature": math.nan}, "temperature cannot be nan"),
        ({"top_k": 0}, "top_k cannot be 0"),
        ({"top_p": 0.0}, "top_p cannot be 0.0"),
        ({"top_p": 1.5}, "top_p cannot be 1.5"),
        ({"n": 0}, "n cannot be 0"),
        ({"ids": []}, "no questions"),
        ({"ids": [[4], [], [5]]}, "question 1 is empty"),
    ],
)
def test_impossible_arguments_are_named(lm, arguments, named):
    with pytest.raises(ValueError, match=named):
        generate(lm, **({"ids": [[4]], "max_new_tokens": 2} | arguments))


def test_the_context_is_used_to_the_last_position_and_no_further(lm):
    most = lm.config.max_len
    prompt = vectors(lm, 5)
    short, long = (
        [3, 4],
        list(range(4, 24)),
    )  # 5 + 20 + new - 1 <= 40, the last new token is never read
    for prefix, P in (
        (lm.read(prompt), 5),
        (None, 0),
        (Prefix.stack([None, lm.read(prompt)]), 5),
        ([lm.read(prompt), None], 0),
    ):
        new = most - P - len(long) + 1
        got = generate(lm, [short, long], prefix, new)
        assert [len(row[0].ids) for row in got] == [new, new]
        assert got[1][0].ids == naive_greedy(lm, long, prompt if P else None, new)
        with pytest.raises(
            ValueError,
            match=f"question 1: a prefix of {P}, 20 tokens and {new + 1} new ones exceed the LM's context of {most}",
        ):
            generate(lm, [short, long], prefix, new + 1)
    fits = [[6] * 16, [7]]
    close(
        option_scores(lm, [long], [fits], lm.read(prompt))[0][0],
        torch.tensor(naive_logprob(lm, long, fits[0], prompt)),
    )
    with pytest.raises(ValueError, match="question 0: .* 17 new ones exceed"):
        option_scores(lm, [long], [[[6] * 17, [7]]], lm.read(prompt))


def test_forward_refuses_what_does_not_fit(lm):
    C, most = lm.config.dim, lm.config.max_len
    assert lm(torch.zeros(1, most, C)).shape == (1, most, C)
    with pytest.raises(
        ValueError,
        match=f"{most + 1} positions after a prefix of 0 exceed the LM's context of {most}",
    ):
        lm(torch.zeros(1, most + 1, C))
    with pytest.raises(ValueError, match=f"{most - 3} positions after a prefix of 4"):
        lm(torch.zeros(1, most - 3, C), lm.read(vectors(lm, 4)))
    for x in (torch.zeros(1, 3, C + 1), torch.zeros(3, C)):
        with pytest.raises(ValueError, match=rf"expected \(B, T, {C}\)"):
            lm(x)


def test_option_scores_equal_the_naive_sums_and_means(lm):
    options = [[[4], [5, 6, 7], [8, 9]], [[10, 11]], [[12], [13]], [[1, 2, 3, 4, 5], [6], [7], [8]]]
    prompt = vectors(lm, 4)
    for given, p in ((None, None), (lm.read(prompt), prompt)):
        for mean in (False, True):
            scores = option_scores(lm, QUESTIONS, options, given, mean=mean)
            assert [len(row) for row in scores] == [3, 1, 2, 4] and scores[0].dtype == torch.float32
            for ids, choices, row in zip(QUESTIONS, options, scores):
                close(
                    row,
                    torch.tensor(
                        [naive_logprob(lm, ids, o, p) / (len(o) if mean else 1) for o in choices]
                    ),
                    1e-4,
                )
    close(
        option_scores(lm, [[7]], [[[3], [4]]])[0],
        torch.tensor([naive_logprob(lm, [7], [t]) for t in (3, 4)]),
    )  # nothing to read first


@pytest.mark.parametrize("options", [[], [[]], [[[1], []]], [[[1]], [[2]]]])
def test_option_scores_refuse_empty_options(lm, options):
    with pytest.raises(ValueError, match="1 questions need as many lists of options"):
        option_scores(lm, [[5]], options)


def words_tokenizer(size):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_answer_keeps_the_order_of_the_questions(lm):
    tokenizer, prefix = words_tokenizer(lm.config.vocab_size), lm.read(vectors(lm, 3))
    questions = [list(range(4, 4 + n)) for n in (9, 1, 5, 5, 2)]
    expected = [
        " ".join(f"w{t}" for t in generate(lm, [ids], prefix, 5, eos=lm.config.eos)[0][0].ids)
        for ids in questions
    ]
    assert (
        answer(lm, tokenizer, questions, prefix, 5, batch_size=2) == expected
        and len(set(expected)) > 1
    )


def test_answer_chooses_the_likeliest_option_where_there_are_some(lm):
    tokenizer, prompt = words_tokenizer(lm.config.vocab_size), vectors(lm, 3)
    prefix = lm.read(prompt)
    questions, options = (
        [[4, 5], [6], [7, 8, 9], [10]],
        [[], [[11], [12, 13], [14]], [], [[15, 16], [17]]],
    )
    expected = answer(lm, tokenizer, questions, prefix, 4)
    for b in (1, 3):
        best = max(options[b], key=lambda option: naive_logprob(lm, questions[b], option, prompt))
        expected[b] = " ".join(f"w{t}" for t in best)
    assert answer(lm, tokenizer, questions, prefix, 4, options, batch_size=4) == expected
    assert expected[1] != answer(lm, tokenizer, questions, prefix, 4)[1]


# --- Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(lm, tmp_path):
    lm.save(tmp_path / "lm", tokenizer=words_tokenizer(lm.config.vocab_size))
    return tmp_path / "lm"


def test_saved_and_loaded_is_the_same_lm(lm, folder):
    again = LM.from_pretrained(folder)
    assert again.config == lm.config == read_config(folder)
    ours, theirs = dict(lm.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(
        lm(lm.embed(torch.tensor([QUESTIONS[0]]))), again(again.embed(torch.tensor([QUESTIONS[0]])))
    )
    assert (
        load_tokenizer(folder).encode("w3 w5").ids
        == load_tokenizer(folder / "tokenizer.json").encode("w3 w5").ids
        == [3, 5]
    )
    with pytest.raises(FileExistsError, match="choose another folder"):
        lm.save(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["lm"]  # and no unfinished one


def test_fingerprint_is_the_checkpoints_not_the_copys(lm, folder, tmp_path):
    half = LM.from_pretrained(folder, dtype=torch.bfloat16)
    assert (
        half.embedding.weight.dtype == torch.bfloat16
        and half.logits(half(half.embed(torch.tensor([[3, 4]])))).dtype == torch.float32
    )
    assert lm.fingerprint() == LM.from_pretrained(folder).fingerprint() == half.fingerprint()
    lm.save(tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert LM.from_pretrained(tmp_path / "half").fingerprint() != lm.fingerprint()
    before = lm.fingerprint()
    lm.layers[1].v.weight.data[0, 0] += 1e-3
    assert lm.fingerprint() != before


def test_new_layers_are_fresh_trainable_and_not_the_lms(lm):
    before = lm.fingerprint()
    layers = lm.new_layers(2)
    assert len(layers) == 2 and all(
        p.requires_grad and p.dtype == torch.float32 for p in layers.parameters()
    )
    assert not {p.data_ptr() for p in layers.parameters()} & {p.data_ptr() for p in lm.parameters()}
    assert layers[0].q.weight.std().item() == pytest.approx(0.02, rel=0.15) and layers[
        0
    ].down.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert lm.fingerprint() == before


def test_loading_imports_no_compiler(make_lm, tmp_path):
    """Which would take longer than all else that a short command does."""
    make_lm("untied").save(tmp_path / "lm")
    call = f"import sys; from model import LM; lm = LM.from_pretrained({str(tmp_path / 'lm')!r}); lm(lm.embedding.weight[None, :4]); print('torch._dynamo' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", call],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        ).stdout
        == "False\n"
    )


def test_checkpoint_that_stores_its_rotation_loads(make_lm, tmp_path):
    lm = make_lm("tied")
    lm.save(tmp_path / "lm")
    tensors = load_file(tmp_path / "lm" / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        tmp_path / "lm" / "model.safetensors",
    )
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(LM.from_pretrained(tmp_path / "lm")(lm.embed(ids)), lm(lm.embed(ids)))


@pytest.mark.parametrize("token", [-1, 67])
def test_a_token_outside_the_vocabulary_is_named(make_lm, token):
    with pytest.raises(
        ValueError, match=f"question 1 has the token id {token}, outside the vocabulary of 67"
    ):
        generate(make_lm("tied"), [[1], [2, token, 3]])


def test_tied_checkpoint_that_stores_its_embedding_twice_loads(make_lm, tmp_path):
    lm = make_lm("tied")
    lm.save(tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert torch.equal(whole(LM.from_pretrained(tmp_path / "lm"), [3, 4]), whole(lm, [3, 4]))


def test_two_different_tables_are_not_tied_whatever_the_config_says(make_lm, tmp_path):
    lm = make_lm("tied")
    lm.save(tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, file)
    again = LM.from_pretrained(tmp_path / "lm")
    assert not again.config.tied and torch.equal(whole(again, [3, 4]), 2 * whole(lm, [3, 4]))


def test_quantised_weights_are_refused(make_lm, tmp_path):
    make_lm("untied").save(tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    save_file(
        {name: t.to(torch.int8) if "q_proj" in name else t for name, t in load_file(file).items()},
        file,
    )
    with pytest.raises(
        ValueError,
        match=r"model.layers.0.self_attn.q_proj.weight is stored as int8; quantised checkpoints are not supported",
    ):
        LM.from_pretrained(tmp_path / "lm")


def test_each_dtype_is_kept_or_converted_as_asked(make_lm, tmp_path):
    lm = make_lm("tied")
    lm.save(tmp_path / "half", dtype=torch.float16)
    for dtype, held in (
        (None, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        loaded = LM.from_pretrained(tmp_path / "half", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {held} and not any(
            p.is_meta for p in loaded.parameters()
        )
        assert torch.equal(loaded.layers[1].down.weight, lm.layers[1].down.weight.half().to(held))


def test_an_lm_on_the_mapped_file_can_be_changed_and_the_file_stays(make_lm, tmp_path):
    lm = make_lm("tied")
    lm.save(tmp_path / "lm")
    loaded = LM.from_pretrained(tmp_path / "lm")
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1.0)
    assert torch.equal(loaded.norm.weight, lm.norm.weight + 1)
    assert torch.equal(LM.from_pretrained(tmp_path / "lm").norm.weight, lm.norm.weight)


def test_a_hub_id_downloads_config_tokenizer_and_safetensors_only(make_lm, tmp_path, monkeypatch):
    make_lm("tied").save(tmp_path / "lm", tokenizer=words_tokenizer(67))
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        wanted = ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json", "merges.txt"]
        unwanted = [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "tf_model.h5",
            "README.md",
            "onnx/config.json",
            "modeling.py",
        ]
        assert all(any(fnmatch.fnmatch(file, p) for p in allow_patterns) for file in wanted)
        assert not any(fnmatch.fnmatch(file, p) for p in allow_patterns for file in unwanted)
        return str(tmp_path / "lm")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert (
        LM.from_pretrained("somebody/tiny").folder
        == locate("somebody/tiny@step1000")
        == tmp_path / "lm"
    )
    assert asked == [("somebody/tiny", None), ("somebody/tiny", "step1000")]
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="somebody/tiny: the repository has no model.safetensors"
    ):
        locate("somebody/tiny")


@pytest.mark.parametrize(
    "kind, named",
    [
        (
            "GatedRepoError",
            "it is gated: accept its terms at huggingface.co/somebody/tiny, then log in",
        ),
        ("RepositoryNotFoundError", "the hub has no such repository"),
        ("RevisionNotFoundError", "it has no revision 'v9'"),
        (
            "LocalEntryNotFoundError",
            "the hub does not answer, and the local cache does not have it",
        ),
        ("OfflineModeIsEnabled", "OfflineModeIsEnabled"),
    ],
)
def test_what_the_hub_refuses_is_one_line(kind, named, monkeypatch):
    def snapshot_download(*_, **__):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        FileNotFoundError,
        match=f"^somebody/tiny@v9: no such folder, and not to be had from the hub either: {named}",
    ) as caught:
        locate("somebody/tiny@v9")
    assert "\n" not in str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"hidden_size": "absent"}, "the key 'hidden_size' is missing"),
        ({"max_position_embeddings": "absent"}, "the key 'max_position_embeddings' is missing"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        (
            {"hidden_act": "quick_gelu"},
            "hidden_act 'quick_gelu' is not supported; supported: silu, gelu",
        ),
        ({"attention_bias": "false"}, "attention_bias is 'false', not true or false"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor is None, not a positive number",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, not a positive number"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported: default, linear, llama3",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope type 'yarn' is not supported",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters of their own for full_attention are not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for llama"),
        ({"rope_theta": "far"}, "rope_theta is 'far', not a positive number"),
        ({"head_dim": 7}, "of a head's 7 channels 7 would be turned"),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window is 0, not a positive whole number",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3},
            "layer_types .* is not supported",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            "layer_types .* is not supported for . layers of qwen3",
        ),
        ({"model_type": "gpt2"}, "the key 'n_embd' is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"rope_scaling": [1]}, r"rope_scaling \[1\] is not an object"),
        ({"hidden_size": "192"}, "hidden_size is '192', not a positive whole number"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"num_key_value_heads": 3}, "4 heads of width .* share 3"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a number"),
    ],
)
def test_config_that_is_not_supported_is_named(folder, changes, named):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json: {named}"):
        LM.from_pretrained(folder)


def test_config_spellings(folder):
    edit_config(
        folder,
        rope_theta="absent",
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        eos_token_id=None,
        bos_token_id="absent",
    )
    config = read_config(folder)
    assert config.rope_theta == 777.0 and config.eos == () and config.bos is None
    edit_config(
        folder,
        num_key_value_heads="absent",
        head_dim="absent",
        rms_norm_eps="absent",
        tie_word_embeddings="absent",
        rope_parameters="absent",
    )
    config = read_config(folder)  # what the published format leaves out means
    assert (
        config.n_kv_heads,
        config.head_dim,
        config.norm_eps,
        config.tied,
        config.rope_theta,
    ) == (4, config.dim // 4, 1e-6, False, 10_000.0)
    for text, named in (("[1]", "holds a list"), ("{", "not valid JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {named}"):
            read_config(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm, q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
    for changed, named in (
        ({k: v for k, v in tensors.items() if k != norm}, f"missing: {norm}"),
        (
            tensors | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(3)},
            r"unexpected: model.layers.1.self_attn.q_proj.bias",
        ),
        (tensors | {q: tensors[q][:-1].clone()}, rf"misshapen: {q} is \({len(tensors[q]) - 1}, "),
        (
            {k: v for k, v in tensors.items() if "layers.1" not in k},
            r"missing: model.layers.1.\S+, \S+, \S+ and 6 more",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=named):
            LM.from_pretrained(folder)


def test_files_that_cannot_be_read_are_named(lm, folder, tmp_path):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-100], content[:20], b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors: truncated or corrupt"):
            LM.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors there"):
        LM.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match="only .bin weights"):
        LM.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        LM.from_pretrained(folder)
    for absent in (tmp_path / "nowhere", "./nowhere", "../no/where", tmp_path / "lm" / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
            LM.from_pretrained(absent)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_tokenizer(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(folder)


def test_sharded_checkpoint(lm, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), folder / "model.safetensors.index.json"
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for shard, inside in shards.items():
        save_file({n: tensors[n] for n in inside}, folder / shard)
    weight_map = {n: shard for shard, inside in shards.items() for n in inside}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    again = LM.from_pretrained(folder)
    assert (
        all(torch.equal(p, q) for p, q in zip(lm.parameters(), again.parameters()))
        and again.fingerprint() == lm.fingerprint()
    )

    shutil.copy(folder / "a.safetensors", tmp_path / "a.safetensors")
    for outside in ("../a.safetensors", str(tmp_path / "a.safetensors")):
        index.write_text(json.dumps({"weight_map": weight_map | {names[0]: outside}}))
        with pytest.raises(ValueError, match="outside the folder"):
            read_tensors(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "b.safetensors"}}))
    with pytest.raises(ValueError, match=f"b.safetensors: lacks {names[0]}"):
        read_tensors(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="names c.safetensors, which is missing"):
        read_tensors(folder)
    for text in ("{", "[]", '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="not a safetensors index"):
            read_tensors(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    target = tmp_path / "blobs"
    target.mkdir()
    (folder / "a.safetensors").rename(
        target / "a"
    )  # the hub's cache stores files as links to blobs elsewhere
    (folder / "a.safetensors").symlink_to(target / "a")
    assert read_tensors(folder).keys() == tensors.keys()


def test_command_line(lm, folder, capsys):
    result = main([str(folder), "w5 w9 w11", "--max-new-tokens", "4"])
    sample = generate(lm, [[5, 9, 11]], None, 4, eos=lm.config.eos)[0][0]
    assert result["ids"] == sample.ids and result["nats"] == pytest.approx(
        -naive_logprob(lm, [5], [9, 11]) / 2, abs=1e-4
    )
    assert capsys.readouterr().out.startswith("w5 w9 w11 " + " ".join(f"w{t}" for t in sample.ids))


def test_a_tokenizer_neither_pads_nor_cuts_whatever_its_file_says(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=4)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, vocab_size=2)
    assert loaded.encode("b").ids == [1] and loaded.encode("b b b b b b").ids == [1] * 6
    with pytest.raises(
        ValueError, match="tokenizer.json: .* go up to 1, .* 1 rows: it belongs to another LM"
    ):
        load_tokenizer(tmp_path, vocab_size=1)


def test_a_saved_folder_makes_way_only_where_told(make_lm, tmp_path):
    one, two = make_lm("tied"), make_lm("tied")
    with torch.no_grad():
        two.norm.weight += 1
    one.save(tmp_path / "lm")
    with pytest.raises(FileExistsError, match="exists"):
        two.save(tmp_path / "lm")
    assert LM.from_pretrained(tmp_path / "lm").fingerprint() == one.fingerprint()
    two.save(tmp_path / "lm", replace=True)
    assert (
        LM.from_pretrained(tmp_path / "lm").fingerprint() == two.fingerprint() != one.fingerprint()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]


def test_answer_names_the_question_that_is_too_long(lm):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    questions = [[3], [3] * lm.config.max_len, [3, 4]]
    with pytest.raises(
        ValueError, match="question 1: "
    ):  # counted in the order given, not in that of lengths
        answer(lm, tokenizer, questions, None, 4, batch_size=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_takes_the_past_apart_or_joined(rows):
    q, k, v = (torch.randn(2, heads, 3, 8) for heads in (4, 2, 2))
    past = torch.randn(rows, 2, 5, 8), torch.randn(rows, 2, 5, 8)
    for lengths in (None, torch.tensor([5, 2])):
        apart = attend(q, k, v, past, lengths)
        assert torch.equal(apart, attend(q, *join(past, k, v), None, lengths))
