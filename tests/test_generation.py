"""Generation and scoring equal the naive loop: one pass over the whole text for every new token.
LMs and compositions decode alike. (A composition's pass over a text: test_alignment.py.)"""

import math

import pytest
import torch
from conftest import PREFIXES, QUESTIONS, before, close, naive_greedy, naive_score, seeded, vectors

from generate import Sample, generate, main, option_scores, predict, sample_next_token

OPTIONS = [[[4], [5, 6, 7], [8, 9]], [[10, 11]], [[12], [13]], [[1, 2, 3, 4, 5], [6], [7], [8]]]


@pytest.fixture
def lm(model):
    return model


def tokens(samples):
    """The token ids of generate's samples: per question one list a sample."""
    return [[sample.ids for sample in row] for row in samples]


def check_options(lm, questions, options, prefix, prompts, **how):
    """Scores equal the naive sums, or means."""
    scores = option_scores(lm, questions, options, prefix, **how)
    assert [(len(row), row.dtype) for row in scores] == [(len(o), torch.float32) for o in options]
    for ids, choices, prompt, row in zip(questions, options, prompts, scores):
        naive = [naive_score(lm, ids, option, prompt) for option in choices]
        lengths = [len(option) if how.get("mean") else 1 for option in choices]
        close(row, torch.tensor(naive) / torch.tensor(lengths), 1e-4)


@pytest.mark.parametrize("kind", [*PREFIXES, "list"])
def test_greedy_and_option_scores_equal_the_naive_loop_batched_and_one_by_one(lm, kind):
    prefix, prompts = before(kind, lm)
    for questions in (QUESTIONS, [ids[:1] for ids in QUESTIONS]):  # one token needs no prefill
        expected = [[naive_greedy(lm, ids, prompt)] for ids, prompt in zip(questions, prompts)]
        assert len({tuple(row) for (row,) in expected}) > 2  # a mix-up of rows would show
        assert tokens(generate(lm, questions, prefix, 6)) == expected
        assert tokens(generate(lm, questions, prefix, 6, n=2)) == [row * 2 for row in expected]
        for mean in (False, True):
            check_options(lm, questions, OPTIONS, prefix, prompts, mean=mean)
        for b, ids in enumerate(questions):
            row = prefix
            if prefix is not None:
                row = prefix[b] if kind == "list" else prefix.select(torch.tensor([b]))
            assert tokens(generate(lm, [ids], row, 6)) == [expected[b]]


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
    samples = generate(lm, QUESTIONS, lm.read(prompt), 6, generator=seeded(2), **how)
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


def test_sampling_without_randomness_left_is_greedy(lm):
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(1000, 3)
    half = sample_next_token(logits, 1.0, None, 0.5, seeded())  # exactly what the first token has
    assert half.eq(1).all()
    greedy = tokens(generate(lm, QUESTIONS, None, 6))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 9, "top_p": 1e-6}):
        assert tokens(generate(lm, QUESTIONS, None, 6, temperature=4.0, **only)) == greedy
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


def test_predict_keeps_the_order_of_the_questions_and_takes_the_likeliest_option(lm, tokenizer):
    prompt = vectors(lm, 3)
    prefix, ids = lm.read(prompt), [list(range(4, 4 + n)) for n in (9, 1, 5, 5, 2)]
    free = [words(generate(lm, [row], prefix, 5, eos=lm.config.eos)[0][0].ids) for row in ids]
    assert predict(lm, tokenizer, ids, prefix, 5, batch_size=2) == free and len(set(free)) > 1
    options, expected = [[], [[11], [12, 13], [14]], [], [[15, 16], [17]], []], list(free)
    for b in (1, 3):
        naive = [naive_score(lm, ids[b], option, prompt) for option in options[b]]
        expected[b] = words(options[b][naive.index(max(naive))])
    assert predict(lm, tokenizer, ids, prefix, 5, options, batch_size=4) == expected != free
    with pytest.raises(ValueError, match="question 1: "):  # as given, not as sorted by length
        predict(lm, tokenizer, [[3], [3] * lm.config.max_len, [3, 4]], None, 4, batch_size=1)


def test_command_line_continues_a_text_and_prints_its_cost(make_lm, tokenizer, tmp_path, capsys):
    lm = make_lm()
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    for flags, how in (("", {}), ("--temperature 2 --seed 3", dict(temperature=2.0))):
        argv = [str(tmp_path / "lm"), "w5 w9 w11", "--max-new-tokens", "4", *flags.split()]
        result, eos = main(argv), lm.config.eos
        sample = generate(lm, [[5, 9, 11]], None, 4, eos=eos, generator=seeded(3), **how)[0][0]
        nats = -naive_score(lm, [5], [9, 11]) / 2
        assert result == {"ids": sample.ids, "nats": pytest.approx(nats, abs=1e-4)}
        text, cost = f"w5 w9 w11 {words(sample.ids)}\n", f"[{result['nats']:.4f} nats a token"
        assert capsys.readouterr().out.startswith(text + cost)
