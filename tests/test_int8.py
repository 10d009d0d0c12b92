"""A frozen LM in int8: its values, its gradients, its memory, and runs that are trained on it."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import TINY, seeded
from tiny_runs import command, run

import train
from checkpoints import hash_tensors
from int8 import Int8Linear, quantize
from model import LM
from runs import load_run


def rounded(lm):
    """The LM with float matrices that have the values which int8 stores."""
    lm = copy.deepcopy(lm)
    for module in lm.layers.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            module.weight.copy_((module.weight / scale).round() * scale)
    return lm


def step(lm, prompt):
    """Logits of two texts behind a prompt, and the gradient of the prompt."""
    x = prompt.clone().requires_grad_()
    z = lm.logits(lm(lm.embed(torch.tensor([[5, 9, 11], [7, 4, 2]])), lm.read(x)))
    (z.float().square().mean()).backward()
    return z.detach(), x.grad


@pytest.mark.parametrize("name", TINY)
def test_int8_computes_as_its_rounded_values_in_float(make_lm, name):
    """Forward and backward, in every family: biases, grouped heads, parallel blocks."""
    lm = make_lm(name)
    prompt = torch.randn(4, lm.config.dim, generator=seeded())
    expected, ours = step(rounded(lm), prompt), step(quantize(lm), prompt)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)
    linear = [m for m in lm.layers.modules() if isinstance(m, Int8Linear)]
    assert linear and not any(isinstance(m, nn.Linear) for m in lm.layers.modules())
    assert all(m.weight.dtype == torch.int8 for m in linear)


def test_each_row_has_its_own_scale():
    """One huge row must not cost the others their digits."""
    linear = nn.Linear(16, 2).requires_grad_(False)
    linear.weight[1] *= 1000
    x = torch.randn(5, 16)
    exact = linear(x)
    error = (Int8Linear(linear)(x) - exact).abs() / exact.abs().amax(0)
    assert error.max() < 0.02
    assert (Int8Linear(linear).weight.abs().amax(1) == 127).all()


def test_the_backward_pass_keeps_no_matrix_in_float():
    linear, kept = Int8Linear(nn.Linear(64, 128).requires_grad_(False)), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x)
    y.sum().backward()
    assert max(t.numel() * t.element_size() for t in kept) == 64 * 128
    assert x.grad.abs().sum() > 0 and linear.weight.grad is None


def test_autocast_computes_in_bf16():
    linear = Int8Linear(nn.Linear(16, 8).requires_grad_(False))
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_what_is_trained_cannot_be_int8(place):
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj is trained"):
        quantize(LM(TINY["tied"]))
    flags = command(place, "fine_tuning", place / "refused", "--base-dtype int8")[1:]
    with pytest.raises(ValueError, match="--base-dtype int8"):
        train.main(flags)
    assert not (place / "refused").exists()


@pytest.mark.parametrize("method", ["prompt_tuning", "neural_recursion"])
def test_a_run_on_an_int8_lm_is_loaded_with_it(place, method):
    out = place / method
    run(command(place, method, out, "--base-dtype int8 --threads 1"))
    model, _, _, record = load_run(out)
    lm = getattr(model, "lm", model)
    assert record["arguments"]["base_dtype"] == "int8"
    assert hash_tensors(lm.state_dict()) == record["weights_before"] == record["weights_after"]
