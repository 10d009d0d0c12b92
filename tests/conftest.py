"""What the tests share: tiny LMs on which every mistake shows, and the plainest reference for them.

The reference is one forward pass over the whole text: no prefix, no padding, no cache.
"""

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent))  # a bare `pytest` finds the files too

from adapters import Connectors  # noqa: E402
from model import LM, Config  # noqa: E402
from recurse import COMPOSITIONS, CONNECTOR_METHODS, new_connector  # noqa: E402

# In CI a missing reference library is a failure. Elsewhere the test is left out.
PEERS = {
    "test_parity.py": ("transformers", "peft", "bm25s", "regex"),
    "test_attention.py": ("triton",),
    "test_bench_rows.py": ("transformers", "peft"),
    "test_properties.py": ("hypothesis",),
}
if not os.environ.get("CI"):
    collect_ignore = [f for f, needed in PEERS.items() if not all(map(find_spec, needed))]


def pytest_addoption(parser):
    text = "kill a run of each method so often, at random moments (tests/test_faults.py)"
    parser.addoption("--kills", type=int, default=2, help=text)


torch.set_num_threads(1)  # for tensors this small, waking a second thread costs more than it saves

# V, C, layers, H, K, D, MLP, context. Two query heads share a key head, and D is not C / H.
TIED = Config(67, 32, 3, 4, 2, 12, 48, 40, rope_theta=500.0, bos=1, eos=(2,))
UNTIED = Config(53, 24, 2, 4, 2, 10, 40, 40, norm_eps=1e-6, tied=False, eos=(2, 3))
UNGATED = replace(TIED, n_kv_heads=4, head_dim=8, layer_norm=True, gated=False, activation="gelu")
BIASED = replace(UNGATED, qkv_bias=True, o_bias=True, mlp_bias=True)
TINY = {
    "tied": TIED,
    "untied": UNTIED,
    "windows": replace(TIED, family="qwen2", qkv_bias=True, windows=(5, None, 3)),
    "qk_norm": replace(TIED, family="qwen3", qk_norm="head", rope_scaling=(4.0, 1.0, 4.0, 16.0)),
    "post_norm": replace(TIED, family="olmo2", post_norm=True, qk_norm="width", tied=False),
    "parallel": replace(BIASED, family="gpt_neox", parallel=True, rotary_dim=4, tied=False),
    "learned": replace(BIASED, family="gpt2", learned_positions=True, divide_by_depth=True),
}
QUESTIONS = [[5, 9, 11, 4, 30, 8], [7], [6, 3, 44, 20], [12, 13, 14, 15, 16, 17, 18, 19]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def randomise(module, seed=0):
    """Weights at which positions, masks and norms matter. At GPT-2's initial scale, 0.02, a wrong
    mask would hide in the rounding."""
    rng = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.25 + (1.0 if p.dim() == 1 else 0.0))
    return module


@pytest.fixture
def make_lm():
    """make_lm(name in TINY or a Config, seed) -> a frozen LM."""

    def make(config="tied", seed=0):
        lm = LM(TINY[config] if isinstance(config, str) else config)
        return randomise(lm, seed).requires_grad_(False).eval()

    return make


@pytest.fixture(params=["tied", "untied"])
def lm(request, make_lm):
    return make_lm(request.param)


STACKS = (*CONNECTOR_METHODS, "training_free", "three_passes")
STACKS += tuple(f"residual {kind}" for kind in (*CONNECTOR_METHODS, "three_passes"))


@pytest.fixture(params=["tied", "untied", *STACKS])
def model(request, make_lm):
    """An LM, or a composition around one."""
    if request.param in TINY:
        return make_lm(request.param)
    return build(request.param, make_lm("untied"))[0].requires_grad_(False)


def build(kind, lm):
    """One of STACKS, with Connectors that matter, and the same written out as a function of x."""
    what = kind.removeprefix("residual ")
    method = "neural_recursion" if what == "three_passes" else what
    a, b = (new_connector(lm, method, n) for n in (2, 1))
    for seed, connector in enumerate((a, b)):
        randomise(connector.layers, seed)
        connector.residual = what != kind
    adapter = Connectors([a, b], 3) if what == "three_passes" else a
    stack, _ = COMPOSITIONS[method](lm, adapter)
    scale = lm.embed_tokens.weight.square().mean().sqrt()

    def rescale(h):
        return scale * h / (h.square().mean(-1, keepdim=True) + 1e-7).sqrt()

    formulas = {
        "neural_recursion": lambda x: lm(a(lm(x))),
        "lm_connector": lambda x: a(lm(x)),
        "connector_lm": lambda x: lm(a(x)),
        "training_free": lambda x: lm(rescale(lm(x))),
        "three_passes": lambda x: lm(b(lm(a(lm(x))))),
        "residual neural_recursion": lambda x: lm(x + a(lm(x))),
        "residual lm_connector": lambda x: lm(x) + a(lm(x)),
        "residual connector_lm": lambda x: lm(x + a(x)),
        "residual three_passes": lambda x: lm(x + b(lm(x + a(lm(x))))),
    }
    return stack, formulas[kind]


def words_tokenizer(size: int) -> Tokenizer:
    """Token i is the word w{i}."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture
def tokenizer():
    return words_tokenizer(67)


def vectors(lm, length, seed=1):
    """A soft prompt (P, C) that is no tokens' embeddings, at their scale."""
    return torch.randn(length, lm.config.dim, generator=seeded(seed)) * 0.25


PREFIXES = ("none", "empty", "shared", "padded", "rows", "ragged")


def before(kind, lm):
    """A prefix for the four QUESTIONS, and the prompt (P, C) or None that stands before each."""
    if kind in ("none", "empty"):
        return (None if kind == "none" else lm.read(vectors(lm, 0))), [None] * 4
    prompts = [vectors(lm, 3, 1), None, vectors(lm, 7, 2), vectors(lm, 1, 3)]
    if kind == "shared":
        return lm.read(prompts[2]), [prompts[2]] * 4
    if kind == "padded":  # one row for all, read with padding behind it
        padded = torch.cat([prompts[2], torch.ones(3, lm.config.dim)])[None]
        return lm.read(padded, lengths=torch.tensor([7])), [prompts[2]] * 4
    if kind == "rows":  # one for each, of one length
        prompts = [vectors(lm, 4, seed) for seed in range(4)]
        return lm.read(torch.stack(prompts)), prompts
    each = [None if p is None else lm.read(p) for p in prompts]
    return (each if kind == "list" else each[0].stack(each)), prompts


@torch.no_grad()
def whole(lm, ids, prompt=None):
    """The reference: logits (T, V) of one text, its prompt put in front of its embeddings."""
    x = lm.embed(torch.tensor([ids]))[0]
    x = x if prompt is None else torch.cat([prompt, x])
    return lm.logits(lm(x[None]))[0, -len(ids) :]


def naive_greedy(lm, ids, prompt=None, new=6):
    text = list(ids)
    for _ in range(new):
        text.append(whole(lm, text, prompt)[-1].argmax().item())
    return text[len(ids) :]


def naive_score(lm, ids, option, prompt=None):
    """The sum over the option's tokens. Nothing reads the last of them."""
    logprobs = whole(lm, (ids + option)[:-1], prompt).log_softmax(-1)
    return sum(logprobs[len(ids) - 1 + t, token].item() for t, token in enumerate(option))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of tiny models and files that `tiny_runs.make_place` makes."""
    from tiny_runs import make_place

    return make_place(tmp_path_factory.mktemp("place"))
