"""Deep prompts, generated prompts, placements, and batches in which each example has its own."""

import pytest
import torch
from conftest import QUESTIONS, close, naive_greedy, seeded, vectors, whole

from adapters import (
    DeepPrompt,
    from_text,
    load_adapter,
    random_like,
    save_adapter,
)
from generate import generate

KINDS = ["tied", "untied", "windows", "qk_norm", "post_norm", "parallel", "learned"]


def logits(lm, prefix, ids=QUESTIONS[3]):
    return lm.logits(lm(lm.embed(torch.tensor([ids])), prefix))[0]


# Deep prompts


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_deep_prompt_starts_as_what_the_lm_reads(make_lm, kind, hidden):
    lm = make_lm(kind)
    prompt = vectors(lm, 6)
    torch.manual_seed(0)
    deep = DeepPrompt(lm.read(prompt), hidden)
    close(logits(lm, deep()), whole(lm, QUESTIONS[3], prompt), 1e-4)
    new = [row[0].ids for row in generate(lm, QUESTIONS, deep(), 6)]
    assert new == [naive_greedy(lm, ids, prompt) for ids in QUESTIONS]


def test_deep_prompt_starts_as_a_text_or_as_noise(lm, tokenizer):
    text = lm.read(from_text(3, lm.embed_tokens.weight, tokenizer, "w5 w9 w11"))
    close(logits(lm, DeepPrompt(text)()), whole(lm, [5, 9, 11, *QUESTIONS[3]])[3:])
    noise = random_like(lm.read(vectors(lm, 200 // lm.config.dim)), 0.5, seeded(1))
    assert noise.rows == 1 and noise.size == 200 // lm.config.dim
    drawn = DeepPrompt(noise).keys_values.detach()
    assert drawn.std() == pytest.approx(0.5, rel=0.15) and drawn.mean().abs() < 0.1
    again = DeepPrompt(random_like(noise, 0.5, seeded(1)))
    assert torch.equal(again.keys_values, drawn)


@pytest.mark.parametrize("hidden", [None, 8])
def test_all_of_a_deep_prompt_trains_and_nothing_of_the_lm(lm, hidden):
    deep = DeepPrompt(lm.read(vectors(lm, 5)), hidden)
    before = [p.detach().clone() for p in deep.parameters()]
    optimizer, losses = torch.optim.Adam(deep.parameters(), lr=0.01), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -logits(lm, deep()).log_softmax(-1)[:, 7].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert not any(torch.equal(p, b) for p, b in zip(deep.parameters(), before))
    assert all(p.grad is None for p in lm.parameters())


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("kind", ["tied", "untied", "learned"])
def test_deep_prompt_is_stored_without_its_mlp(make_lm, tmp_path, kind, hidden):
    lm = make_lm(kind)
    deep = DeepPrompt(lm.read(vectors(lm, 5)), hidden)
    for p in deep.parameters():
        p.add_(torch.randn(p.shape, generator=seeded(2)) * 0.1)
    save_adapter(tmp_path, deep, lm, method="deep_prompt")
    again = load_adapter(tmp_path, lm)
    assert [name for name, _ in again.named_parameters()] == ["keys_values"]
    close(logits(lm, again()), logits(lm, deep()), 0.0)
    half = make_lm(kind).bfloat16()  # weights in bfloat16 attend to keys in bfloat16
    half.stored_hash, half.folder = lm.fingerprint(), "unused"
    assert load_adapter(tmp_path, half)().layers[0][0].dtype == torch.bfloat16


def test_a_start_that_no_deep_prompt_can_have_is_refused(lm):
    rows = lm.read(torch.stack([vectors(lm, 4), vectors(lm, 4)]))
    ragged = lm.read(vectors(lm, 4)[None], lengths=torch.tensor([3]))
    for start in (rows, ragged):
        with pytest.raises(ValueError, match="one row that is not ragged"):
            DeepPrompt(start)
    with pytest.raises(ValueError, match="width 3 cannot make 4 positions"):
        DeepPrompt(lm.read(vectors(lm, 4)), hidden=3)
