"""What the tests share: tiny LMs whose weights are large enough that attention, positions and norms all matter."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that a bare `pytest` finds the files too

from model import LM, Config  # noqa: E402

if not os.environ.get("CI") and not all(
    map(importlib.util.find_spec, ("transformers", "peft"))
):  # in CI a missing one is a failure
    collect_ignore = ["test_parity.py", "test_adafactor_parity.py"]

torch.set_num_threads(1)  # tensors this small lose more to waking a second thread than it computes

TINY = {  # four query heads share two key heads, and no head_dim is dim / heads
    "tied": Config(
        vocab_size=67,
        dim=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=12,
        hidden_dim=48,
        max_len=40,
        rope_theta=500.0,
        bos=1,
        eos=(2,),
    ),
    "untied": Config(
        vocab_size=53,
        dim=24,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=10,
        hidden_dim=40,
        max_len=40,
        norm_eps=1e-6,
        tied=False,
        eos=(2, 3),
    ),
}


@pytest.fixture
def make_lm():
    """make_lm(name of TINY or a Config, seed) -> a frozen LM. (At GPT-2's initial scale, a wrong mask would hide in the rounding.)"""

    def make(config="tied", seed=0):
        lm, generator = (
            LM(TINY.get(config, config) if isinstance(config, str) else config),
            torch.Generator().manual_seed(seed),
        )
        with torch.no_grad():
            for p in lm.parameters():
                p.copy_(
                    torch.randn(p.shape, generator=generator) * 0.25
                    + (1.0 if p.dim() == 1 else 0.0)
                )
        return lm.requires_grad_(False).eval()

    return make


@pytest.fixture(params=sorted(TINY))
def lm(request, make_lm):
    return make_lm(request.param)
