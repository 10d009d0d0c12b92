"""Adafactor against the reference implementation: the same parameters after five steps, in every combination of its choices."""

import pytest
import torch
from transformers.optimization import Adafactor as Reference

import train


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_five_steps_are_the_references(factored, scale_parameter, clip, decay):
    """The reference factors every parameter of two dimensions or more; given vectors, it never does."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 9), (2, 3, 4), (7,)] if factored else [(54,), (7,)]
    start = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    start[-1] *= 1e-4  # below the smallest scale that a parameter counts with
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = dict(lr=0.05, weight_decay=decay, scale_parameter=scale_parameter)
    mine = train.Adafactor(ours, clip=clip, factored=factored, **options)
    reference = Reference(
        theirs, clip_threshold=clip, relative_step=False, warmup_init=False, **options
    )
    for step in range(5):
        for a, b in zip(ours, theirs):
            a.grad = (
                torch.randn(a.shape, generator=generator) * 10.0**-step
            )  # so that the second moment's memory matters
            b.grad = a.grad.clone()
        mine.step(), reference.step()
    for a, b, before in zip(ours, theirs, start):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert not torch.equal(a, before)


def test_an_unfactored_matrix_is_its_entries_in_a_row():
    """What the reference cannot do: a full second moment for a matrix, which is the prompt-tuning papers' choice."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 9, generator=generator)
    matrix, row = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().flatten())
    mine = train.Adafactor([matrix], lr=0.3, factored=False)
    reference = Reference(
        [row], lr=0.3, relative_step=False, warmup_init=False, scale_parameter=False
    )
    for _ in range(5):
        matrix.grad = torch.randn(6, 9, generator=generator) * torch.arange(1, 10)
        row.grad = matrix.grad.flatten().clone()
        mine.step(), reference.step()
    torch.testing.assert_close(matrix.flatten(), row, atol=1e-6, rtol=1e-6)
