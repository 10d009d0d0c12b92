"""Recursion: each composition against its formula written out, cached decoding against whole passes, and who learns."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from adapters import Connector, SoftPrompt, from_vocab, rms, save_adapter
from model import Prefix, generate, option_scores, pad
from recurse import COMPOSITIONS, Stack, compose, load_run, new_connector

QUESTIONS = [[5, 9, 11, 4, 30], [7], [6, 3, 44], [12, 13, 14, 15, 16, 17]]
KINDS = [*COMPOSITIONS, "three passes"]


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def lively(connector, seed=0):
    """Weights large enough that every layer of the Connector matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in connector.layers.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.25 + (1.0 if p.dim() == 1 else 0.0)
            )
    return connector


def build(kind, lm):
    """The composition, and the same written out as a function of x."""
    if kind == "three passes":
        a, b = (
            lively(new_connector(lm, "neural_recursion", 1), 1),
            lively(new_connector(lm, "neural_recursion", 2), 2),
        )
        return Stack(lm, [a, b]), lambda x: lm(b(lm(a(lm(x)))))
    c = lively(new_connector(lm, kind, 2))
    formula = {
        "neural_recursion": lambda x: lm(c(lm(x))),
        "lm_connector": lambda x: c(lm(x)),
        "connector_lm": lambda x: lm(c(x)),
    }
    return COMPOSITIONS[kind](lm, c), formula[kind]


def naive_greedy(lm, formula, ids, new):
    text = list(ids)
    with torch.no_grad():
        for _ in range(new):
            text.append(lm.logits(formula(lm.embed(torch.tensor([text]))))[0, -1].argmax().item())
    return text[len(ids) :]


class Embeddings(nn.Module):
    """A Connector that has seen the text: whatever it is given, it puts out the embeddings of the tokens at these positions."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, x, prefix=None, keep=False):
        start = prefix.size if prefix else 0
        out = self.x[:, start : start + x.shape[1]]
        kept = Prefix(
            [(torch.zeros(len(x), 1, start + x.shape[1], 2),) * 2]
        )  # it only has to remember how far it is
        return (out, kept) if keep else out


def test_connector_that_outputs_the_embeddings_gives_the_bare_lm(lm):
    x = lm.embed(torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1]]))
    stack = Stack(lm, [Embeddings(x)])
    assert torch.equal(stack(x), lm(x))
    first, cache = stack(x[:, :4], keep=True)
    second, cache = stack(x[:, 4:], cache, keep=True)
    close(torch.cat([first, second], 1), lm(x))
    close(
        lm(x[:, 2:], cache[2]), lm(x[:, 2:], lm.read(x))
    )  # the last pass has kept what the LM itself would have


def test_stack_without_connectors_is_the_lm(lm):
    stack = Stack(lm)
    assert generate(stack, QUESTIONS, None, 5) == generate(lm, QUESTIONS, None, 5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_composition_is_its_formula_whole_and_token_by_token(lm, kind):
    stack, formula = build(kind, lm)
    x = stack.embed(torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1]]))
    whole = formula(x)
    assert torch.equal(stack(x), whole) and torch.equal(stack.logits(whole), lm.logits(whole))
    assert (whole - lm(x)).abs().max() > 0.05  # the Connector does something
    for chunks in ([1] * 6, [2, 1, 3]):
        cache, parts = None, []
        for part in x.split(chunks, dim=1):
            h, cache = stack(part, cache, keep=True)
            parts.append(h)
        close(
            torch.cat(parts, 1), whole, 1e-4
        )  # each pass amplifies the rounding of the one before
    assert len(cache) == len(stack.passes) and {p.size for p in cache} == {6}
    for ours, theirs in zip(stack.read(x), cache):
        for (k, v), (k_cached, v_cached) in zip(ours.layers, theirs.layers):
            close(k, k_cached, 1e-4)
            close(v, v_cached, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_the_naive_loop_batched_and_one_by_one(lm, kind):
    stack, formula = build(kind, lm)
    expected = [[naive_greedy(lm, formula, ids, 6)] for ids in QUESTIONS]
    assert [[s.ids for s in row] for row in generate(stack, QUESTIONS, None, 6)] == expected
    assert [[s.ids for s in generate(stack, [ids], None, 6)[0]] for ids in QUESTIONS] == expected
    eos = expected[0][0][1]
    for (long,), (sample,) in zip(
        expected, generate(stack, QUESTIONS, None, 6, eos=eos)
    ):  # rows leave every pass's cache
        assert sample.ids == (long[: long.index(eos) + 1] if eos in long else long)
    samples = [
        generate(stack, ids, None, 4, 1.0, n=n, generator=torch.Generator().manual_seed(3))
        for ids, n in ((QUESTIONS, 2), ([q for q in QUESTIONS for _ in "12"], 1))
    ]
    assert [s.ids for row in samples[0] for s in row] == [s.ids for row in samples[1] for s in row]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefixes_stand_before_every_pass(lm, kind):
    """Questions behind a shared text, or behind one each, equal the two texts in one; so do the scores of options."""
    stack, formula = build(kind, lm)
    shots = [[21, 22, 23], None, [24], [25, 26, 27, 28, 29]]
    each = [None if s is None else stack.read(stack.embed(torch.tensor([s]))) for s in shots]
    options = [[4, 5], [6]]
    for prefix, before in ((each[0], [shots[0]] * 4), (each, [s or [] for s in shots])):
        joined = [s + q for s, q in zip(before, QUESTIONS)]
        got = generate(stack, QUESTIONS, prefix, 4)
        assert [row[0].ids for row in got] == [naive_greedy(lm, formula, ids, 4) for ids in joined]
        for ids, scores in zip(joined, option_scores(stack, QUESTIONS, [options] * 4, prefix)):
            for option, score in zip(options, scores):
                logprobs = lm.logits(formula(lm.embed(torch.tensor([ids + option]))))[
                    0
                ].log_softmax(-1)
                close(
                    score,
                    sum(logprobs[len(ids) - 1 + t, token] for t, token in enumerate(option)),
                    1e-4,
                )


def test_new_connector_speaks_at_the_scale_of_what_it_replaces(lm):
    lm.norm.weight.data.fill_(3.0)
    x = lm.embed(pad(QUESTIONS)[0])
    for kind in COMPOSITIONS:
        replaced = lm(x) if kind == "lm_connector" else lm.embedding.weight
        connector = new_connector(lm, kind, 2)
        assert len(connector.layers) == 2
        for given in (x, lm(x)):
            assert rms(connector(given)) == pytest.approx(rms(replaced), rel=1e-2)
        assert rms(Connector(lm.new_layers(2))(x)) == pytest.approx(
            1.0, rel=1e-2
        )  # what it would be otherwise


# --- Training: the adapter learns, the LM stays --------------------------------------------------------------------------


def setting(method, lm):
    """(the adapter, a function that gives the model's hidden states of ids as train time does)."""
    torch.manual_seed(0)
    if method == "prompt_tuning":
        adapter = SoftPrompt(from_vocab(8, lm.embedding.weight))
        return adapter, lambda ids: lm(lm.embed(ids), compose(method, lm, adapter)[1])
    adapter = new_connector(lm, method, 2)
    model, prefix = compose(method, lm, adapter)
    assert prefix is None
    return adapter, lambda ids: model(model.embed(ids))


def loss_of(lm, run, ids):
    return F.cross_entropy(lm.logits(run(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("method", ["prompt_tuning", *COMPOSITIONS])
def test_frozen_means_frozen_and_trained_means_trained(lm, method):
    adapter, run = setting(method, lm)
    ids = torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1]])
    with torch.no_grad():
        untrained = run(
            ids
        )  # a pass without a graph must leave nothing behind that later stands in for a trained tensor
    base = {n: p.clone() for n, p in lm.named_parameters()}
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        moving = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        optimiser.zero_grad()
        loss = loss_of(lm, run, ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        assert [n for n, p in adapter.named_parameters() if torch.equal(p, moving[n])] == []
    assert losses[1] < losses[0] and not torch.equal(run(ids), untrained)
    assert [n for n, p in adapter.named_parameters() if torch.equal(p, before[n])] == []
    assert [
        n for n, p in lm.named_parameters() if not torch.equal(p, base[n]) or p.grad is not None
    ] == []


def saved_tensors(function):
    count = 0

    def pack(tensor):
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return count


def test_the_frozen_first_pass_records_no_graph(lm):
    x = lm.embed(torch.tensor([QUESTIONS[3]]))
    assert saved_tensors(lambda: lm(x)) == 0 and not lm(x).requires_grad
    connector = new_connector(lm, "neural_recursion", 1)
    alone = saved_tensors(lambda: lm(connector(x)))
    assert (
        saved_tensors(lambda: Stack(lm, [connector])(x)) == alone > 0
    )  # the first pass adds nothing to keep


@pytest.mark.parametrize(
    "method, steps, rate", [("prompt_tuning", 100, 0.03), ("neural_recursion", 100, 0.01)]
)
def test_overfits_one_batch(make_lm, method, steps, rate):
    """Four random texts, which the LM knows nothing of; all but their first token predicted. Chance is log V = 4.2 nats."""
    lm = make_lm()
    lm.norm.weight.mul_(
        4
    )  # a random LM of this width cannot put more than 95 % on any token; now it can
    adapter, run = setting(method, lm)
    ids = torch.randint(67, (4, 4), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = torch.arange(10, 14)  # the first tokens differ, so that the texts can be told apart
    optimiser = torch.optim.Adam(adapter.parameters(), lr=rate)
    first = loss_of(lm, run, ids).item()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(lm, run, ids)
        loss.backward()
        optimiser.step()
    assert first > 4 and loss_of(lm, run, ids).item() < 0.05


# --- What a run trained, ready to use ------------------------------------------------------------------------------------


def test_compose_gives_what_was_trained(lm):
    prompt = SoftPrompt(from_vocab(4, lm.embedding.weight))
    model, prefix = compose("prompt_tuning", lm, prompt)
    assert model is lm and prefix.size == 4 and compose("fine_tuning", lm, None) == (lm, None)
    connector = new_connector(lm, "lm_connector", 1)
    x = lm.embed(torch.tensor([[4, 5]]))
    assert torch.equal(compose("lm_connector", lm, connector)[0](x), connector(lm(x)))


def test_load_run(lm, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    ids = torch.tensor([[4, 5, 6]])

    def record(folder, **arguments):
        (folder / "run.json").write_text(
            json.dumps(
                {"arguments": {"model": str(tmp_path / "lm"), "tokenizer": None} | arguments}
            )
        )

    connector = lively(new_connector(lm, "neural_recursion", 1))
    save_adapter(tmp_path / "run", connector, lm)
    for method in (
        {"method": "neural_recursion"},
        {"method": "pretrain_connector", "composition": "neural_recursion"},
    ):
        record(tmp_path / "run", **method)
        model, prefix, again, what = load_run(tmp_path / "run")
        assert (
            prefix is None
            and again.token_to_id("w7") == 7
            and what["arguments"]["method"] == method["method"]
        )
        assert torch.equal(model(model.embed(ids)), lm(connector(lm(lm.embed(ids)))))
        assert not any(p.requires_grad for p in model.parameters())

    other = tmp_path / "tuned"
    other.mkdir()
    lm.embedding.weight.data.mul_(1.1)
    lm.save(other / "model", tokenizer=tokenizer)
    record(other, method="fine_tuning", model="a base that is no longer there")
    model, prefix, *_ = load_run(other)
    assert prefix is None and torch.equal(model(model.embed(ids)), lm(lm.embed(ids)))

    with pytest.raises(FileNotFoundError, match="no run.json"):
        load_run(tmp_path)
    for text in ("{", "[]", "{}", '{"arguments": {}}'):
        (other / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json: not a run record"):
            load_run(other)
