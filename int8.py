"""A frozen LM whose matrices are stored as int8: a quarter of float32's memory, half of bf16's.

Every row of a matrix, which makes one output channel, has one scale: its largest absolute value
over 127. Activations are not quantised ("weight-only"), nor are the embedding table, the output
layer and what is trained. A product first turns its matrix into the dtype of the activations, and
the backward pass does so again, so nothing but int8 is kept. (The scales are the row-wise ones of
Dettmers et al. 2022, "LLM.int8()", section 2, who quantise activations, too.)

    lm = quantize(LM.from_pretrained("assets/lm"))
    python train.py --method prompt_tuning --base-dtype int8

`python reproduce.py lm --base-dtype int8` measures what the LM loses. Needs torch.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def quantize(lm):
    """Replace every linear layer inside the LM's blocks, in place. Returns the frozen LM.

    Layers with gradients are a ValueError: int8 cannot be trained.
    """
    for name, linear in list(lm.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            if linear.weight.requires_grad:
                raise ValueError(f"layers.{name} is trained, and int8 has no gradient")
            parent, _, child = name.rpartition(".")
            setattr(lm.layers.get_submodule(parent), child, Int8Linear(linear))
    return lm


class Int8Linear(nn.Module):
    """A frozen nn.Linear with weight (out, in) in int8 and scale (out,) in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x, or that of autocast."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # meta: bench.py plan
            x = x.to(torch.get_autocast_dtype(device))
        y = Int8Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Product(torch.autograd.Function):
    """x @ (scale * weight).T, with the gradient of x. Autograd keeps no matrix in float."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None
