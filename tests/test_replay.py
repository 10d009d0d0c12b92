"""Decoding as a CUDA graph gives the answers of the plain loop. Without a GPU its steps run one by
one, in the memory that a graph would have recorded."""

import pytest
import torch
from conftest import PREFIXES, QUESTIONS, before, build, close, naive_greedy, seeded, vectors
from torch.utils._python_dispatch import TorchDispatchMode

import generate as generation  # not its function of that name
import replay
from adapters import DeepPrompt
from generate import generate

LMS = ("tied", "qk_norm", "post_norm", "parallel", "learned")


def memory(replayed):
    """The tensors that a graph reads and writes from step to step."""
    cache = replayed.cache
    return [replayed.token, cache.lengths, *(t for pair in cache.layers for t in pair)]


@pytest.fixture
def recorded(monkeypatch):
    """What was decoded as a graph, in order. record(step) gives the step itself."""
    calls = []

    def record(step):
        calls.append(step.__self__)
        kept = memory(step.__self__)

        def launch():
            step()
            assert all(a is b for a, b in zip(kept, memory(step.__self__), strict=True))

        return launch

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(generation, "GRAPH_DEVICES", ("cpu",))
    return calls


@pytest.fixture(params=[*LMS, "neural_recursion", "residual three_passes"])
def lm(request, make_lm):
    lm = make_lm(request.param if request.param in LMS else "untied")
    return lm if request.param in LMS else build(request.param, lm)[0].requires_grad_(False)


def plain(monkeypatch, *arguments, **options):
    """`generate` without a graph."""
    with monkeypatch.context() as patch:
        patch.setattr(generation, "GRAPH_DEVICES", ())
        return generate(*arguments, **options)


@pytest.mark.parametrize("kind", [*PREFIXES, "list"])
def test_greedy_answers_equal_the_naive_loop(lm, kind, recorded):
    prefix, prompts = before(kind, lm)
    for questions in (QUESTIONS, [ids[:1] for ids in QUESTIONS]):
        expected = [naive_greedy(lm, ids, prompt) for ids, prompt in zip(questions, prompts)]
        answers = generate(lm, questions, prefix, 6)
        assert [sample.ids for (sample,) in answers] == expected
    assert len(recorded) == 2


@pytest.mark.parametrize("n, eos", [(1, range(0, 53, 7)), (4, None), (4, range(0, 53, 7))])
def test_samples_and_rows_that_end_early_equal_the_plain_loop(lm, n, eos, recorded, monkeypatch):
    ends = None if eos is None else list(eos)

    def sampled(decode):
        more = {"temperature": 1.0, "n": n, "eos": ends, "generator": seeded()}
        return decode(lm, QUESTIONS, None, 9, **more)

    expected, found = sampled(lambda *a, **kw: plain(monkeypatch, *a, **kw)), sampled(generate)
    assert len(recorded) == 1
    for one, other in zip(sum(expected, []), sum(found, []), strict=True):
        assert one.ids == other.ids
        close(one.logprob, other.logprob, 1e-4)
    if eos is not None:
        assert len({len(sample.ids) for sample in sum(found, [])}) > 1  # not all of them to the end


def test_a_row_keeps_its_slot_when_others_leave(make_lm, recorded):
    lm = make_lm("tied")
    token, cache = generation.prefill(lm, QUESTIONS[:1] + QUESTIONS[2:], None, [5] * 3)
    h, cache = lm(lm.embed(token), cache, keep=True)
    replayed = replay.Replayed(lm, cache, torch.arange(3), 3)
    whole = [replayed(torch.tensor([[4], [5], [6]]))]
    replayed.keep(torch.tensor([2, 0]))
    whole += [replayed(torch.tensor([[8], [9]])), replayed(torch.tensor([[10], [11]]))]
    for row, slot, ids in ((0, 2, [6, 8, 10]), (1, 0, [4, 9, 11])):
        alone = lm(lm.embed(torch.tensor([ids])), cache.select(torch.tensor([slot])))
        close(lm.logits(alone)[0, 1], whole[1][row])
        close(lm.logits(alone)[0, 2], whole[2][row])
    with pytest.raises(ValueError, match="no space"):
        replayed(torch.tensor([[1], [2]]))


@pytest.mark.parametrize("name, new, times", [("tied", 5, 1), ("tied", 4, 0), ("windows", 5, 0)])
def test_no_graph_where_keys_need_their_order_or_few_tokens_follow(
    make_lm, recorded, monkeypatch, name, new, times
):
    lm = make_lm(name)
    found = generate(lm, QUESTIONS, None, new)
    assert len(recorded) == times
    assert [s.ids for s in sum(found, [])] == [
        s.ids for s in sum(plain(monkeypatch, lm, QUESTIONS, None, new), [])
    ]


class NoWaiting(TorchDispatchMode):
    """Refuses what makes Python wait for a GPU: a step that did could not be recorded."""

    REFUSED = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_gpu(lm):
    x = lm.embed(torch.tensor(QUESTIONS[:1]))
    replayed = replay.Replayed(lm, lm.read(x), torch.tensor([0, 0]), 3)
    with torch.no_grad(), NoWaiting():
        replayed.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        replayed.token.sum().item()


def test_a_deep_prompt_in_float32_continues_in_bf16(make_lm, recorded, monkeypatch):
    lm = make_lm("tied")
    prefix = DeepPrompt(lm.read(vectors(lm, 4)))()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(monkeypatch, lm, QUESTIONS, prefix, 6)
        found = generate(lm, QUESTIONS, prefix, 6)
    assert len(recorded) == 1
    assert [s.ids for s in sum(found, [])] == [s.ids for s in sum(expected, [])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_replays_what_it_computes_step_by_step(lm, monkeypatch):
    lm = lm.to("cuda")
    with torch.no_grad():
        prefix = lm.read(lm.embed(torch.tensor([[4, 9, 11]], device="cuda")))
    for before_text in (None, prefix):
        for n in (1, 4):
            found = []
            for decode in (generate, lambda *a, **kw: plain(monkeypatch, *a, **kw)):
                rng = torch.Generator("cuda").manual_seed(0)
                how = {"temperature": float(n > 1), "n": n, "generator": rng}
                how["eos"] = list(range(0, 53, 7))
                found.append(sum(decode(lm, QUESTIONS, before_text, 9, **how), []))
            assert [sample.ids for sample in found[0]] == [sample.ids for sample in found[1]]
