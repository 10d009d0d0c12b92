"""Every family of published checkpoints against transformers, on tiny random weights: logits, greedy tokens, prefixes, layers, files."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters import Connector
from model import FAMILIES, LM, Prefix, generate, published_config, read_config
from recurse import Stack

ONE = [[5, 9, 11, 4, 30, 8]]
FIVE = ONE + [
    [7],
    [6, 3, 44, 20],
    list(range(12, 45)),
    [12, 13, 14, 15, 16, 17, 18, 19],
]  # ragged; the longest is beyond every window and every original length
MOST = 64  # positions; 33 + 20 new tokens fit

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SLIDING = dict(use_sliding_window=True, sliding_window=7)
CASES = {  # (model_type, what differs from the reference's defaults, in its own words)
    "gpt2": ("gpt2", dict()),
    "gpt2, untied, exact gelu, own MLP width": (
        "gpt2",
        dict(
            tie_word_embeddings=False,
            activation_function="gelu",
            n_inner=40,
            layer_norm_epsilon=1e-3,
        ),
    ),
    "gpt2, scores divided by depth": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    "gpt_neox": ("gpt_neox", dict()),
    "gpt_neox, sequential, half turned, tied": (
        "gpt_neox",
        dict(
            use_parallel_residual=False,
            rotary_pct=0.5,
            rotary_emb_base=500,
            tie_word_embeddings=True,
        ),
    ),
    "gpt_neox, no attention bias, all turned, relu": (
        "gpt_neox",
        dict(attention_bias=False, rotary_pct=1.0, hidden_act="relu", layer_norm_eps=1e-3),
    ),
    "gpt_neox, linear": (
        "gpt_neox",
        dict(
            rope_parameters=dict(
                rope_type="linear", factor=4.0, rope_theta=500.0, partial_rotary_factor=0.5
            )
        ),
    ),
    "llama": ("llama", dict(num_key_value_heads=2, head_dim=12)),
    "llama, biases, tied": (
        "llama",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3, num_key_value_heads=1)),
    "llama, linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=7, num_key_value_heads=2, head_dim=12)),
    "mistral, no window": ("mistral", dict(sliding_window=None, num_key_value_heads=2)),
    "mistral, narrow window": ("mistral", dict(sliding_window=2, num_key_value_heads=4)),
    "qwen2": ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2, upper layers slide": (
        "qwen2",
        dict(num_key_value_heads=2, max_window_layers=1, **SLIDING),
    ),
    "qwen3": ("qwen3", dict(num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)),
    "qwen3, layer types, bias": (
        "qwen3",
        dict(
            num_key_value_heads=2,
            head_dim=8,
            attention_bias=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            **SLIDING,
        ),
    ),
    "olmo2": ("olmo2", dict(num_key_value_heads=2)),
    "olmo2, bias, llama3": ("olmo2", dict(attention_bias=True, rope_parameters=LLAMA3)),
}
worst = {}  # {family: the largest logit difference seen}


def make(case):
    """A reference model with random weights, large enough that positions, masks, norms and biases all matter."""
    family, changes = CASES[case]
    keys = FAMILIES[family].keys
    shape = {
        keys["vocab_size"]: 61,
        keys["dim"]: 32,
        keys["n_layers"]: 3,
        keys["n_heads"]: 4,
        keys["hidden_dim"]: 48,
        keys["max_len"]: MOST,
    }
    if changes.get("rope_parameters", {}).get("rope_type") == "linear":
        shape[keys["max_len"]] = MOST // 4
    config = transformers.AutoConfig.for_model(
        family, **shape | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | changes
    )
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            is_norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2 + is_norm)
    return reference


@pytest.fixture(params=CASES, scope="module")
def both(request, tmp_path_factory):
    """(the case, the reference, the LM that reads the folder it saved, that folder)"""
    folder = tmp_path_factory.mktemp("checkpoint") / "reference"
    reference = make(request.param)
    reference.save_pretrained(folder)
    return request.param, reference, LM.from_pretrained(folder), folder


def check(case, ours, theirs):
    difference = (ours - theirs).abs().max().item()
    family = CASES[case][0]
    worst[family] = max(worst.get(family, 0.0), difference)
    assert difference < 1e-4
    assert theirs.std() > 0.3  # what is compared is no constant


def logits(lm, ids, prefix=None):
    return lm.logits(lm(lm.embed(torch.tensor(ids)), prefix))


@torch.no_grad()
def test_logits_equal_the_references(both):
    case, reference, lm, _ = both
    assert lm.config.family == CASES[case][0] and lm.config.max_len == MOST
    tokens = torch.randint(61, (5, 60), generator=torch.Generator().manual_seed(1)).tolist()
    for ids in (tokens[:1], tokens):
        theirs = reference(torch.tensor(ids)).logits
        check(case, logits(lm, ids), theirs)
    for cut in (1, 20, 59):  # behind a prefix that was read
        check(
            case,
            logits(
                lm,
                [row[cut:] for row in tokens],
                lm.read(lm.embed(torch.tensor([row[:cut] for row in tokens]))),
            ),
            theirs[:, cut:],
        )
    cuts = (
        3,
        30,
        0,
        8,
        17,
    )  # behind a ragged one, as long as every row's text after its own prefix
    stacked = Prefix.stack(
        [
            lm.read(lm.embed(torch.tensor([row[:cut]]))) if cut else None
            for row, cut in zip(tokens, cuts)
        ]
    )
    z = logits(lm, [row[cut : cut + 30] for row, cut in zip(tokens, cuts)], stacked)
    for b, cut in enumerate(cuts):
        check(case, z[b], theirs[b, cut : cut + 30])


@torch.no_grad()
def test_greedy_tokens_equal_the_references(both):
    _, reference, lm, _ = both
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = reference.generate(torch.tensor(ONE), **options)[0, len(ONE[0]) :].tolist()
    assert generate(lm, ONE, None, 20)[0][0].ids == alone
    T = max(map(len, FIVE))
    left = torch.tensor(
        [[0] * (T - len(ids)) + ids for ids in FIVE]
    )  # the reference wants its padding on the left, and a mask
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in FIVE])
    batched = reference.generate(left, attention_mask=mask, **options)[:, T:].tolist()
    assert [row[0].ids for row in generate(lm, FIVE, None, 20)] == batched and batched[0] == alone
    assert len(set(map(tuple, batched))) > 2
    shared = lm.read(
        lm.embed(torch.tensor(FIVE[3][:20])[None])
    )  # few-shot text read once, samples of what follows it
    assert [s.ids for s in generate(lm, [FIVE[3][20:]], shared, 20, n=3)[0]] == [batched[3]] * 3
    some = [None, None, lm.read(lm.embed(torch.tensor([FIVE[2][:3]]))), shared, None]
    asked = [FIVE[0], FIVE[1], FIVE[2][3:], FIVE[3][20:], FIVE[4]]
    assert [row[0].ids for row in generate(lm, asked, some, 20)] == batched


@torch.no_grad()
def test_new_layers_are_the_familys(both):
    case, reference, lm, _ = both
    layers = lm.new_layers(3)
    layers.load_state_dict(lm.layers.state_dict())
    tokens = torch.tensor([FIVE[3], FIVE[3][::-1]])
    check(
        case,
        lm.logits(lm.norm(layers(lm.add_positions(lm.embed(tokens), None)))),
        reference(tokens).logits,
    )
    connector = Connector(lm.new_layers(2))
    for p in connector.parameters():
        p.copy_(
            torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.2 + (p.dim() == 1)
        )
    stack = Stack(lm, [connector])
    naive = []
    for ids in FIVE:
        text = list(ids)
        for _ in range(6):
            text.append(
                stack.logits(stack(stack.embed(torch.tensor([text]))))[0, -1].argmax().item()
            )
        naive.append(text[len(ids) :])
    assert [row[0].ids for row in generate(stack, FIVE, None, 6)] == naive


def test_new_layers_train(both):
    _, _, lm, _ = both
    connector, x = Connector(lm.new_layers(2)), lm.embed(torch.tensor(FIVE[3:4]))
    assert all(p.requires_grad for p in connector.parameters())
    assert all(bool((p == 0).all()) for n, p in connector.named_parameters() if n.endswith("bias"))
    lm.logits(lm(connector(lm(x)))).square().mean().backward()
    dead = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(n.endswith("k.bias") for n in dead)  # which shifts all scores of a query alike


@torch.no_grad()
def test_what_we_save_loads_in_the_reference_and_here(both, tmp_path):
    case, reference, lm, _ = both
    lm.save(tmp_path / "ours")
    again, problems = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(
        problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    tokens = torch.tensor([FIVE[3]])
    assert torch.equal(again(tokens).logits, reference(tokens).logits)
    loaded = LM.from_pretrained(tmp_path / "ours")
    assert loaded.config == lm.config and torch.equal(
        loaded(loaded.embed(tokens)), lm(lm.embed(tokens))
    )
    assert (
        loaded.fingerprint()
        == LM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).fingerprint()
    )


def test_old_and_new_spellings_mean_the_same(both, tmp_path):
    """What the reference writes today is read above; its files of some years ago say the same in other words, as ours still do."""
    case, reference, lm, folder = both
    assert read_config(folder) == lm.config
    (tmp_path / "config.json").write_text(json.dumps(published_config(lm.config, torch.float32)))
    assert read_config(tmp_path) == lm.config
    old, new = (json.loads((f / "config.json").read_text()) for f in (tmp_path, folder))
    if not lm.config.learned_positions:
        assert "rope_parameters" in new and "rope_parameters" not in old
    if old.get("rope_scaling"):
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")  # the oldest
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert read_config(tmp_path) == lm.config


@pytest.mark.parametrize(
    "family, buffers",
    [
        (
            "gpt2",
            {"h.1.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        ),
        (
            "gpt_neox",
            {
                "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
            },
        ),
    ],
)
def test_files_of_other_years_load(tmp_path, family, buffers):
    """OpenAI's GPT-2 was stored without its head, so without the prefix; masks and frequencies are stored as if they were weights; names change."""
    make(family).save_pretrained(tmp_path)
    lm = LM.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    rename = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
    tensors = {rename.get(n, n).removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(tensors | buffers, file)
    again = LM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(lm.parameters(), again.parameters(), strict=True))


def test_misshapen_published_tensors_are_named_with_their_published_shapes(tmp_path):
    for family, name, shape, wrong in (
        (
            "gpt2",
            "transformer.h.2.attn.c_attn.weight",
            r"\(96, 32\), not \(32, 96\)",
            lambda t: t.T.contiguous(),
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.1.attention.query_key_value.bias",
            r"\(95,\), not \(96,\)",
            lambda t: t[1:].clone(),
        ),
    ):
        make(family).save_pretrained(tmp_path / family)
        file = tmp_path / family / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {name: wrong(tensors[name])}, file)
        with pytest.raises(ValueError, match=f"misshapen: {name} is {shape}"):
            LM.from_pretrained(tmp_path / family)


def test_options_that_no_family_has_here_are_refused_by_name(tmp_path):
    for family, changes, named in (
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor 1.5 is not supported"),
        ("gpt_neox", {"rotary_pct": 0.01}, "of a head's 8 channels 0 would be turned"),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
            "layer_types names sliding_attention, but",
        ),
        (
            "qwen3",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config .* is not supported",
        ),
    ):
        config = make(family).config.to_dict()
        config.pop("rope_parameters", None)
        (tmp_path / "config.json").write_text(json.dumps(config | changes, default=str))
        with pytest.raises(ValueError, match=f"config.json: {named}"):
            read_config(tmp_path)


def test_every_family_is_checked():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
    print(
        "\nlargest logit difference:",
        ", ".join(f"{family} {value:.1e}" for family, value in sorted(worst.items())),
    )
