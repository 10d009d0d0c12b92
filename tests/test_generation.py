"""Generation and scoring equal the naive loop: one pass over the whole text for every new token.
LMs and compositions decode alike. (A composition's pass over a text: test_alignment.py.)"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    PREFIXES,
    QUESTIONS,
    before,
    close,
    naive_greedy,
    naive_score,
    seeded,
    vectors,
    whole,
)
from torch.profiler import ProfilerActivity, profile

import data
import generate as generation  # not its function of that name
from generate import (
    Sample,
    generate,
    main,
    option_scores,
    predict,
    sample_next_token,
    stack_prefixes,
)
from model import LM, Config
from questions import prepare

OPTIONS = [[[4], [5, 6, 7], [8, 9]], [[10, 11]], [[12], [13]], [[1, 2, 3, 4, 5], [6], [7], [8]]]


@pytest.fixture
def lm(model):
    return model


def tokens(samples):
    """The token ids of generate's samples: per question one list a sample."""
    return [[sample.ids for sample in row] for row in samples]


def check_options(lm, questions, options, prefix, prompts):
    """Scores equal the naive sums, and means."""
    sums, means = (option_scores(lm, questions, options, prefix, mean=m) for m in (False, True))
    for b, (ids, choices, prompt) in enumerate(zip(questions, options, prompts)):
        naive = torch.tensor([naive_score(lm, ids, option, prompt) for option in choices])
        close(sums[b], naive, 1e-4)
        close(means[b], naive / torch.tensor([len(option) for option in choices]), 1e-4)


@pytest.mark.parametrize("kind", [*PREFIXES, "list"])
def test_greedy_and_option_scores_equal_the_naive_loop_batched_and_one_by_one(lm, kind):
    prefix, prompts = before(kind, lm)
    for questions in (QUESTIONS, [ids[:1] for ids in QUESTIONS]):  # one token needs no prefill
        expected = [[naive_greedy(lm, ids, prompt, 4)] for ids, prompt in zip(questions, prompts)]
        assert len({tuple(row) for (row,) in expected}) > 2  # a mix-up of rows would show
        assert tokens(generate(lm, questions, prefix, 4)) == expected
        assert tokens(generate(lm, questions, prefix, 4, n=2)) == [row * 2 for row in expected]
        check_options(lm, questions, OPTIONS, prefix, prompts)
        for b, ids in enumerate(questions):
            row = prefix
            if prefix is not None:
                row = prefix[b] if kind == "list" else prefix.select(torch.tensor([b]))
            assert tokens(generate(lm, [ids], row, 4)) == [expected[b]]


def test_the_context_is_used_to_the_last_position_and_no_further(lm):
    most, prompt, ids = lm.config.max_len, vectors(lm, 5), [[3, 4], list(range(4, 24))]
    five = lm.read(prompt)
    for prefix, P in ((five, 5), (None, 0), (five.stack([None, five]), 5), ([five, None], 0)):
        new = most - P - 20 + 1  # the last new token is never read
        got = generate(lm, ids, prefix, new)
        assert [len(row[0].ids) for row in got] == [new, new]
        assert got[1][0].ids == naive_greedy(lm, ids[1], prompt if P else None, new)
        message = f"question 1: a prefix of {P}, 20 tokens and {new + 1} new ones exceed the LM's"
        with pytest.raises(ValueError, match=f"{message} context of {most}"):
            generate(lm, ids, prefix, new + 1)
    check_options(lm, ids[1:], [[[6] * 16, [7]]], five, [prompt])
    with pytest.raises(ValueError, match="question 0: .* 17 new ones exceed"):
        option_scores(lm, ids[1:], [[[6] * 17, [7]]], five)


@pytest.mark.parametrize("config", ["tied", "learned", "windows"])
def test_padding_may_pass_the_context_where_no_text_does(make_lm, config):
    lm, ids = make_lm(config), [[3, 4], list(range(4, 42))]
    prompt = vectors(lm, 9)
    expected = [[naive_greedy(lm, ids[0], prompt, 2)], [naive_greedy(lm, ids[1], None, 2)]]
    assert tokens(generate(lm, ids, [lm.read(prompt), None], 2)) == expected


def test_n_samples_equal_the_question_repeated_n_times(lm):
    how = dict(max_new_tokens=7, temperature=1.3, top_k=9, top_p=0.95, eos=[3, 4, 5, 6])
    prefix = lm.read(vectors(lm, 3))
    shared = generate(lm, QUESTIONS, prefix, n=3, generator=seeded(5), **how)
    repeated = [ids for ids in QUESTIONS for _ in range(3)]
    alone = sum(tokens(generate(lm, repeated, prefix, generator=seeded(5), **how)), [])
    assert tokens(shared) == [alone[3 * b : 3 * b + 3] for b in range(4)]
    assert len(set(map(tuple, alone))) > 6  # they are samples, not copies
    assert shared == generate(lm, QUESTIONS, prefix, n=3, generator=seeded(5), **how)


def test_logprob_is_at_temperature_1_and_over_the_whole_vocabulary(lm):
    prompt, how = vectors(lm, 3), dict(temperature=0.7, top_k=5, n=4, eos=list(range(0, 60, 5)))
    samples = generate(lm, QUESTIONS, lm.read(prompt), 6, generator=seeded(4), **how)
    for ids, row in zip(QUESTIONS, samples):
        for sample in row:
            expected = naive_score(lm, ids, sample.ids, prompt)  # the eos that ended it counts
            assert sample == Sample(sample.ids, pytest.approx(expected, abs=1e-4))
    lengths = {len(sample.ids) for row in samples for sample in row}
    assert 6 in lengths and len(lengths) > 1  # some ended early, some did not


def test_eos_ends_its_row_and_leaves_the_others_alone(lm):
    free = [row[0].ids for row in generate(lm, QUESTIONS, None, 8)]
    for eos in {row[2] for row in free}:  # each of them ends at least one row early
        expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
        assert tokens(generate(lm, QUESTIONS, None, 8, eos=eos)) == [[row] for row in expected]
    firsts = [row[0] for row in free]  # all end at once
    assert tokens(generate(lm, QUESTIONS, None, 8, eos=firsts)) == [[[t]] for t in firsts]
    assert tokens(generate(lm, QUESTIONS, None, 8, eos=())) == [[row] for row in free]


def test_finished_rows_leave_the_batch(lm):
    free = [row[0].ids for row in generate(lm, QUESTIONS, None, 4)]
    eos = next(t for t in sum(free, []) if 0 < sum(t in row[:3] for row in free) < 4)
    active = [sum(eos not in row[:step] for row in free) for step in range(4)]
    seen, forward = [], lm.forward

    def spy(x, *rest, **more):
        seen.append(len(x))
        return forward(x, *rest, **more)

    lm.forward = spy
    generate(lm, QUESTIONS, None, 4, eos=eos)
    assert seen[-4:] == active and active[-1] < 4


@pytest.mark.parametrize(
    "parents, order",
    [
        ([0, 1, 2], [0, 1, 2]),
        ([0, 0, 2], [0, 1, 2]),  # the second child of row 0 takes the place of row 1
        ([1, 1, 3], [1, 0, 2]),  # row 1 stays, its second child and row 3 fill 0 and 2
        ([2], [0]),
        ([2, 0, 0], [1, 2, 0]),  # in any order: row 0 stays, its second child fills 1
    ],
)
def test_rows_stay_where_their_parents_stood(parents, order):
    assert generation.order_in_place(torch.tensor(parents)).tolist() == order


def test_sampling_without_randomness_left_is_greedy(lm):
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(1000, 3)
    half = sample_next_token(logits, 1.0, None, 0.5, seeded())  # exactly what the first token has
    assert half.eq(1).all()
    greedy = tokens(generate(lm, QUESTIONS, None, 6))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 9, "top_p": 1e-6}):
        assert tokens(generate(lm, QUESTIONS, None, 6, temperature=4.0, **only)) == greedy
    for tiny in (1e-20, 1e-30, 1e-38, 1e-39, 1e-45, 5e-324):  # to float32 the last three are 0
        for only in ({}, {"top_k": 5}, {"top_p": 0.9}):
            assert tokens(generate(lm, QUESTIONS, None, 6, temperature=tiny, **only)) == greedy
    assert tokens(generate(lm, QUESTIONS, None, 6, 1e-38, n=2)) == [row * 2 for row in greedy]
    assert tokens(generate(lm, QUESTIONS, None, 6, 4.0, generator=seeded())) != greedy


@pytest.mark.parametrize(
    "temperature, top_k, top_p, expected",
    [
        (1.0, None, None, [0.5, 0.3, 0.15, 0.05]),
        (0.5, None, None, [p * p / 0.365 for p in (0.5, 0.3, 0.15, 0.05)]),
        (1.0, 2, None, [0.625, 0.375, 0, 0]),
        (1.0, 100, None, [0.5, 0.3, 0.15, 0.05]),
        (1.0, None, 0.45, [1, 0, 0, 0]),
        (1.0, None, 0.55, [0.625, 0.375, 0, 0]),  # the smallest set that reaches top_p
        (1.0, None, 0.79, [0.625, 0.375, 0, 0]),
        (1.0, None, 0.81, [p / 0.95 for p in (0.5, 0.3, 0.15)] + [0]),
        (1.0, 3, 0.83, [0.625, 0.375, 0, 0]),  # the nucleus of what top_k leaves
        (2.0, None, 0.65, [0.5635, 0.4365, 0, 0]),  # the nucleus at that temperature
    ],
)
def test_frequencies_of_sampling(temperature, top_k, top_p, expected):
    draws, order = 20_000, torch.tensor([2, 0, 3, 1])  # the likeliest token is not the first id
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log() + 3.0
    chosen = sample_next_token(logits.expand(draws, 4), temperature, top_k, top_p, seeded())
    counts = torch.bincount(chosen, minlength=4)[order]
    for count, p in zip(counts.tolist(), expected):
        assert abs(count / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_logits_that_are_not_finite_are_refused(make_lm, temperature, n):
    lm = make_lm()
    lm.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(lm, QUESTIONS, None, 3, temperature=temperature, n=n)


def test_impossible_arguments_are_named(make_lm):
    lm = make_lm()
    out_of_range = dict(max_new_tokens=[0], temperature=[-0.1, math.inf, math.nan])
    out_of_range |= dict(top_k=[0], top_p=[0.0, 1.5], n=[0])
    for name, values in out_of_range.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} cannot be {value}"):
                generate(lm, [[4]], **{name: value})
    for ids, prefix, named in (
        ([], None, "no questions"),
        ([[4], [], [5]], None, "question 1 is empty"),
        ([[1], [2, -1, 3]], None, "question 1 has the token id -1, outside the vocabulary of 67"),
        ([[1], [2, 67, 3]], None, "question 1 has the token id 67, outside the vocabulary of 67"),
        ([[1]], [None, None, None], "3 prefixes for 1 questions"),
    ):
        with pytest.raises(ValueError, match=named):
            generate(lm, ids, prefix)
    for options in ([], [[]], [[[1], []]], [[[1]], [[2]]]):
        with pytest.raises(ValueError, match="1 questions need as many .*lists of options"):
            option_scores(lm, [[5]], options)


def words(ids):
    return " ".join(f"w{t}" for t in ids)


def continued(lm, ids, prefix=None, new=6, eos=None):
    """The greedy continuation of one question, up to and without an end token."""
    eos = lm.config.eos if eos is None else eos
    new = generate(lm, [ids], prefix, new, eos=eos)[0][0].ids
    return new[:-1] if new[-1] in eos else new


def test_predict_keeps_the_order_of_the_questions_and_takes_the_likeliest_option(lm, tokenizer):
    prompt = vectors(lm, 3)
    prefix, ids = lm.read(prompt), [list(range(4, 4 + n)) for n in (9, 1, 5, 5, 2)]
    free = [words(continued(lm, row, prefix, 5)) for row in ids]
    assert predict(lm, tokenizer, ids, prefix, 5, batch_size=2) == free and len(set(free)) > 1
    options, expected = [[], [[11], [12, 13], [14]], [], [[15, 16], [17]], []], list(free)
    for b in (1, 3):
        naive = [naive_score(lm, ids[b], option, prompt) for option in options[b]]
        expected[b] = naive.index(max(naive))
    assert predict(lm, tokenizer, ids, prefix, 5, options, batch_size=4) == expected != free
    assert predict(lm, tokenizer, [], None, 5) == []
    several = lm.read(lm.embed(torch.tensor([[3], [4]])))
    with pytest.raises(ValueError, match="prefix of several rows"):  # it would be in another order
        predict(lm, tokenizer, [[3, 4, 5], [3]], several, 5)
    with pytest.raises(ValueError, match="question 1: "):  # as given, not as sorted by length
        predict(lm, tokenizer, [[3], [3] * lm.config.max_len, [3, 4]], None, 4, batch_size=1)


@pytest.mark.parametrize("position", [0, 2, 5])
@pytest.mark.parametrize("others", [(), (66,)])
def test_the_end_token_is_no_part_of_an_answer_whatever_the_tokenizer(
    make_lm, tokenizer, position, others
):
    """No token of this tokenizer is special. The answer may be empty."""
    lm, free = make_lm(), continued(make_lm(), [5, 9], new=6, eos=())
    end = free[position]
    cut = free[: free.index(end)]
    lm.config = replace(lm.config, eos=(*others, end))
    assert predict(lm, tokenizer, [[5, 9]], None, 6) == [words(cut)]
    lm.config = replace(lm.config, eos=())  # no end token: nothing is dropped
    assert predict(lm, tokenizer, [[5, 9]], None, 6) == [words(free)]


@pytest.mark.parametrize("stop", ["{}", " {}", "{} ", "{1}", "{0} {1}"])
def test_a_stop_ends_the_answer_and_its_row(make_lm, tokenizer, stop):
    """It may be a part of a token, or span several."""
    lm = make_lm()
    lm.config = replace(lm.config, eos=())
    free = [words(continued(lm, ids, new=8)) for ids in QUESTIONS]
    second, third = free[0].split()[1:3]
    stop = stop.format(second, third)
    expected = [text.split(stop)[0].strip() for text in free]
    assert expected[0] != free[0]
    steps, forward = [], lm.forward

    def spy(x, *rest, **more):
        steps.append(len(x))
        return forward(x, *rest, **more)

    lm.forward = spy
    assert predict(lm, tokenizer, QUESTIONS, None, 8, stops=[stop] * 4) == expected
    assert sum(steps) < 8 * 4
    mixed = predict(lm, tokenizer, QUESTIONS, None, 8, stops=[stop, "", "w", ""])
    assert mixed == [expected[0], free[1], "", free[3]]


def rows_and_positions(lm, monkeypatch):
    """Records (rows, positions in the cache after it) of every call of the LM."""
    seen, forward = [], LM.forward

    def spy(self, x, prefix=None, keep=False):
        seen.append((len(x), x.shape[1] + (0 if prefix is None else prefix.size)))
        return forward(self, x, prefix, keep)

    monkeypatch.setattr(LM, "forward", spy)
    return seen


@pytest.mark.parametrize(
    "text, stop, answer",
    [
        (" Paris is it", " ", "Paris"),  # an answer begins after a space
        ("Paris is it", " ", "Paris"),
        ("   a  b c", "  ", "a"),
        (" a b  c", "  ", "a b"),
        (" Q: who", " Q:", ""),  # the stop reaches beyond the space
        (" b Q: who", " Q:", "b"),
        (" Q: who", "Q: ", ""),
        (" \nParis", "\n", ""),  # an empty answer
        (" Paris\n is", "\n", "Paris"),
        (" a \n b", " \n", "a"),
        (" \n b", " \n", ""),
        ("\n\nQ: who", "\n\n", ""),
        (" a b", "", "a b"),
        ("  ", " ", ""),
    ],
)
def test_spaces_before_an_answer_do_not_end_it(make_lm, monkeypatch, text, stop, answer):
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    def generated(lm, ids, prefix, new, eos, ended):
        tokens = list(map(ord, text))
        ends = [n for n in range(1, len(tokens)) if ended and ended(0, tokens[:n])]
        return [[Sample(tokens[: [*ends, len(tokens)][0]], 0.0)]]

    monkeypatch.setattr(generation, "generate", generated)
    assert generation.continue_texts(make_lm(), Letters(), [[1]], None, 99, stop) == [(answer, 0.0)]


@pytest.mark.parametrize("budget", [60, 100, 250])
@pytest.mark.parametrize("P", [0, 7])
def test_batches_keep_a_budget_of_tokens_options_included(
    make_lm, tokenizer, monkeypatch, budget, P
):
    """Many questions, one with many options, long options, and a prefix that every row copies."""
    lm = make_lm()
    prefix = lm.read(vectors(lm, P)) if P else None
    ids = [list(range(4, 4 + n)) for n in (3, 9, 1, 5, 2, 7, 3, 3, 8, 1, 6, 4)]
    options = [[] for _ in ids]
    options[1] = [[t] for t in range(30, 60)]
    options[4] = [[t, t + 1, t + 2] for t in range(30, 37)]
    options[7] = [[41], [42] * 9]
    whole_batch = predict(lm, tokenizer, ids, prefix, 5, options, max_tokens=10**6)
    seen = rows_and_positions(lm, monkeypatch)
    assert predict(lm, tokenizer, ids, prefix, 5, options, max_tokens=budget) == whole_batch
    assert max(rows * positions for rows, positions in seen) <= budget
    assert max(rows for rows, _ in seen) > 1
    seen.clear()
    predict(lm, tokenizer, ids, prefix, 5, options, max_tokens=1)  # a single row exceeds it
    assert {rows for rows, _ in seen} == {1}


def test_a_batch_is_as_wide_as_its_longest_parts(make_lm, tokenizer, monkeypatch):
    """Long prefixes before short questions, and none before long ones, as wide in sum."""
    lm = make_lm()
    ids, prefix = [[5] * 2, [6] * 22] * 3, [lm.read(vectors(lm, 20)), None] * 3
    for options in (None, [[[7]], [[8] * 9]] * 3):
        seen = rows_and_positions(lm, monkeypatch)
        predict(lm, tokenizer, ids, prefix, 4, options, max_tokens=150)
        assert max(rows * positions for rows, positions in seen) <= 150
        assert max(rows for rows, _ in seen) > 1


def test_options_are_scored_in_parts_alike(lm):
    prefix = lm.read(vectors(lm, 3))
    for max_rows in (1, 2, 3, 100):
        rows = option_scores(lm, QUESTIONS, OPTIONS, prefix, max_rows=max_rows)
        for part, all_at_once in zip(rows, option_scores(lm, QUESTIONS, OPTIONS, prefix)):
            close(part, all_at_once, 1e-5)


def peak_memory(function):
    """The largest sum of bytes that torch's allocator holds for `function` on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return held.cumsum(0).max().item()


def position_bytes(lm):
    """Keys and values of one position of the cache, in float32."""
    c = lm.config
    return 2 * c.n_kv_heads * c.head_dim * c.n_layers * 4


@pytest.mark.parametrize("case", ["equal", "ragged", "prefix", "prefixes", "samples", "ends"])
def test_the_cache_peaks_at_twice_its_size(case):
    lm = LM(Config(61, 16, 8, 4, 4, 16, 16, 200, eos=(2,))).requires_grad_(False).eval()
    B, T, new, P, n = 8, 90, 10, 0, 1
    ids, prefix, eos = [[3] * T for _ in range(B)], None, None
    if case == "ragged":
        ids = [[3] * (T - b) for b in range(B)]
    if case in ("prefix", "prefixes"):
        P, T, ids = 80, 5, [[3] * 5 for _ in range(B)]
        prefix = lm.read(vectors(lm, P))
    if case == "prefixes":  # they are made before the measurement
        prefix = [lm.read(vectors(lm, P - b)) for b in range(B)]
    if case == "samples":
        n = 3
    if case == "ends":  # about a tenth of the rows end in every step
        eos = list(range(6))
    how = {"n": n, "eos": eos, "temperature": 9.0, "generator": seeded()}
    peak = peak_memory(lambda: generate(lm, ids, prefix, new, **how))
    own = n * new  # samples share what their question has
    size = B * (P + T + own) * position_bytes(lm)
    assert 0.9 * size < peak < 2.1 * size  # activations come on top


@pytest.mark.parametrize("choices", [False, True])
def test_memory_of_predict_follows_the_budget(tokenizer, choices):
    lm = LM(Config(67, 16, 8, 4, 4, 16, 16, 200, eos=(2,))).requires_grad_(False).eval()
    ids = [[3] * 90 for _ in range(24)]
    options = [[[4], [5, 6], [7]] for _ in ids] if choices else None
    small = peak_memory(lambda: predict(lm, tokenizer, ids, None, 6, options, max_tokens=500))
    large = peak_memory(lambda: predict(lm, tokenizer, ids, None, 6, options, max_tokens=2000))
    assert small < 2.1 * 500 * position_bytes(lm) and large < 2.1 * 2000 * position_bytes(lm)
    assert large > 2 * small


LETTERS = "abcdefghijklmnopqrstuvwxyz QA:?.'"


@pytest.fixture(scope="module")
def letters():
    """A byte-level tokenizer without merges, and a tiny LM of its vocabulary."""
    tokenizer = data.train_tokenizer([LETTERS], 257)
    torch.manual_seed(0)
    lm = LM(Config(257, 32, 3, 4, 2, 12, 48, 400, bos=0, eos=(0,)))
    return lm.requires_grad_(False).eval(), tokenizer


def questions(count, options=()):
    for i in range(count):
        text = data.question_text("who is " + LETTERS[i : 2 * i + 3])
        yield data.Example(text, LETTERS[i], (LETTERS[i],), source=f"q:{i}", options=options)


@pytest.mark.parametrize("shots", [1, 2, 4])
@pytest.mark.parametrize("P", [0, 6])
def test_examples_before_a_question_are_read_once(letters, shots, P, monkeypatch):
    """The answers are those to the whole text, with options and without."""
    lm, tokenizer = letters
    prompt = vectors(lm, P) if P else None
    prefix = lm.read(prompt) if P else None
    examples = [*questions(4), *questions(3, ("a", "bc", "d"))][:6]
    before_it = [e for e in questions(9)][9 - shots :]
    text = "".join(f"{e.input} {e.target}\n\n" for e in before_it)
    read, counted = LM.read, []

    def spy(self, x, *rest):
        counted.append(x.shape[-2] * (x.shape[0] if x.dim() == 3 else 1))
        return read(self, x, *rest)

    monkeypatch.setattr(LM, "read", spy)
    ids, options, extended = prepare(lm, tokenizer, examples, prefix, 8, before_it)
    assert extended.size == P + sum(counted) and sum(counted) > len(text)  # and BOS, and "Q: "
    answers = predict(lm, tokenizer, ids, extended, 8, options)
    for e, answer in zip(examples, answers):
        (naive,) = data.encode_prompts(tokenizer, [text + e.input])
        if not e.options:
            expected = tokenizer.decode(naive_greedy(lm, naive, prompt, 8)).split("<|end")[0]
            assert answer == expected.strip()
            continue
        spelt = [tokenizer.encode(" " + o, add_special_tokens=False).ids + [0] for o in e.options]
        scores = [naive_score(lm, naive, option, prompt) for option in spelt]
        assert answer == scores.index(max(scores))


def test_one_question_alone_keeps_a_token(letters):
    lm, tokenizer = letters
    (example,), before_it = list(questions(1)), list(questions(4))[1:]
    ids, _, prefix = prepare(lm, tokenizer, [example, example], None, 4, before_it)
    assert [len(row) for row in ids] == [1, 1] and prefix.rows == 1
    text = "".join(f"{e.input} {e.target}\n\n" for e in before_it) + example.input
    logits = lm.logits(lm(lm.embed(torch.tensor(ids)), prefix))[0, -1]
    close(logits, whole(lm, data.encode_prompts(tokenizer, [text])[0])[-1])


def test_examples_that_do_not_fit_are_named(letters):
    lm, tokenizer = letters
    for options in ((), ("a", "b" * 200)):
        examples = [*questions(2), *questions(1, options), data.Example("why " * 60, "a", ("a",))]
        long = replace(examples[-1], source="file:4", options=options)
        with pytest.raises(ValueError, match="^file:4: .* exceed the 394 "):
            prefix = lm.read(vectors(lm, 6))
            prepare(lm, tokenizer, [*examples[:2], long], prefix, 200)


def test_command_line_continues_a_text_and_prints_its_cost(make_lm, tokenizer, tmp_path, capsys):
    lm = make_lm()
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    for flags, how in (("", {}), ("--temperature 2 --seed 4", dict(temperature=2.0))):
        argv = [str(tmp_path / "lm"), "w5 w9 w11", "--max-new-tokens", "4", *flags.split()]
        result, eos = main(argv), lm.config.eos
        sample = generate(lm, [[5, 9, 11]], None, 4, eos=eos, generator=seeded(4), **how)[0][0]
        nats = -naive_score(lm, [5], [9, 11]) / 2
        assert result == {"ids": sample.ids, "nats": pytest.approx(nats, abs=1e-4)}
        text, cost = f"w5 w9 w11 {words(sample.ids)}\n", f"[{result['nats']:.4f} nats a token"
        assert capsys.readouterr().out.startswith(text + cost)


def test_command_line_prints_no_end_token(make_lm, tokenizer, tmp_path, capsys):
    lm, free = make_lm(), continued(make_lm(), [5, 9, 11], new=6, eos=())
    lm.config = replace(lm.config, eos=(free[2],))
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    shown = words(free[: free.index(free[2])])
    assert main([str(tmp_path / "lm"), "w5 w9 w11", "--max-new-tokens", "6"])["ids"][-1] == free[2]
    assert capsys.readouterr().out.splitlines()[0] == f"w5 w9 w11 {shown}".strip()


@torch.no_grad()
def test_in_a_list_a_computed_prefix_reads_all_of_its_own_questions_at_once(make_lm):
    lm, asked = make_lm("tied"), []

    def computed(questions):
        asked.append(questions)
        return lm.read(torch.stack([vectors(lm, 3, ids[0]) for ids in questions]))

    given = [computed, None, computed, lm.read(vectors(lm, 5))]
    stacked = stack_prefixes(given, QUESTIONS)
    assert asked == [[QUESTIONS[0], QUESTIONS[2]]] and stacked.row_lengths(4) == [3, 0, 3, 5]
    for b in (0, 2):
        alone = lm.read(vectors(lm, 3, QUESTIONS[b][0]))
        for pair, own in zip(stacked.layers, alone.layers):
            close([t[b, :, -3:] for t in pair], [t[0] for t in own])
