"""Soft prompts and Connectors: what they start from, and that a stored one comes back only to the LM it belongs to."""

import inspect
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import adapters
import model
import rerank
from adapters import (
    Connector,
    SoftPrompt,
    T5Config,
    T5Encoder,
    from_file,
    from_labels,
    from_text,
    from_vocab,
    load_adapter,
    random,
    replacing,
    rms,
    save_adapter,
)

TABLE = torch.arange(40, dtype=torch.float32)[:, None] * torch.tensor(
    [1.0, 10.0, -1.0]
)  # token i is (i, 10 i, -i)


@pytest.fixture
def tokenizer():
    """Words w0 ... w39, and a BOS that `encode` adds unless told not to."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w1 $A", special_tokens=[("w1", 1)]
    )
    return tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(vectors):
    """The token ids whose embeddings these rows of TABLE are."""
    assert vectors.dtype == torch.float32 and torch.equal(vectors, TABLE[vectors[:, 0].long()])
    return vectors[:, 0].long().tolist()


# --- Initialisers --------------------------------------------------------------------------------------------------------


def test_random_fills_its_interval_from_both_sides():
    vectors = random(2000, TABLE, scale=0.3, generator=seeded())
    assert vectors.shape == (2000, 3) and vectors.abs().max() <= 0.3
    assert (
        vectors.min() < -0.29 and vectors.max() > 0.29 and abs(vectors.mean()) < 0.01
    )  # uniform, around 0
    assert random(2000, TABLE, generator=seeded()).abs().max() > 0.49
    assert torch.equal(vectors, random(2000, TABLE, scale=0.3, generator=seeded()))


def test_from_vocab_draws_without_repeats_from_the_population():
    ids = tokens(from_vocab(10, TABLE, population=10, generator=seeded()))
    assert sorted(ids) == list(range(10)) != ids
    assert max(tokens(from_vocab(9, TABLE, population=10, generator=seeded()))) < 10
    assert sorted(tokens(from_vocab(40, TABLE, generator=seeded()))) == list(
        range(40)
    )  # 5000 is more than there are
    assert tokens(from_vocab(10, TABLE, generator=seeded(1))) != tokens(
        from_vocab(10, TABLE, generator=seeded(2))
    )
    assert from_vocab(0, TABLE).shape == (0, 3)


def test_from_vocab_repeats_only_when_too_few():
    ids = tokens(from_vocab(25, TABLE, population=10, generator=seeded()))
    assert sorted(map(ids.count, range(10))) == [2] * 5 + [3] * 5


def test_from_text_puts_token_i_in_slot_i(tokenizer):
    assert tokens(from_text(3, TABLE, tokenizer, "w7 w5 w7 w9")) == [7, 5, 7]  # cut, and no BOS
    filled = tokens(from_text(6, TABLE, tokenizer, "w7 w5", generator=seeded()))
    assert filled[:2] == [7, 5] and filled[2:] == tokens(from_vocab(4, TABLE, generator=seeded()))
    with pytest.raises(ValueError, match="'' has no tokens"):
        from_text(3, TABLE, tokenizer, "")


def test_from_labels_takes_the_mean_of_each_labels_tokens(tokenizer):
    vectors = from_labels(4, TABLE, tokenizer, ["w4", "w2 w3 w10"], generator=seeded())
    assert torch.equal(vectors[0], TABLE[4]) and torch.equal(
        vectors[1], torch.tensor([5.0, 50.0, -5.0])
    )  # (2 + 3 + 10) / 3
    assert tokens(vectors[2:]) == tokens(from_vocab(2, TABLE, generator=seeded()))
    with pytest.warns(UserWarning, match="3 labels for a prompt of 2: the last 1 are left out"):
        assert tokens(from_labels(2, TABLE, tokenizer, ["w4", "w2", "w9"])) == [4, 2]
    assert tokens(from_labels(3, TABLE, tokenizer, [], generator=seeded())) == tokens(
        from_vocab(3, TABLE, generator=seeded())
    )


def test_from_file_checks_the_shape(lm, tmp_path):
    C, table = lm.config.dim, lm.embedding.weight
    vectors = torch.randn(5, C, generator=seeded())
    save_adapter(tmp_path / "prompt", SoftPrompt(vectors), lm)
    assert torch.equal(from_file(5, table, tmp_path / "prompt"), vectors)
    with pytest.raises(ValueError, match=rf"the prompt is \(5, {C}\), not \(6, {C}\)"):
        from_file(6, table, tmp_path / "prompt")
    with pytest.raises(ValueError, match=rf"the prompt is \(5, {C}\), not \(5, 3\)"):
        from_file(5, TABLE, tmp_path / "prompt")
    save_adapter(tmp_path / "connector", Connector(lm.new_layers(1)), lm)
    with pytest.raises(ValueError, match="not a soft prompt"):
        from_file(5, table, tmp_path / "connector")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        from_file(5, table, tmp_path)


def test_initialisers_do_not_alias_the_lm(lm):
    before = lm.embedding.weight.clone()
    prompt = SoftPrompt(from_vocab(4, lm.embedding.weight, generator=seeded()))
    prompt.vectors.data.add_(1.0)
    assert torch.equal(lm.embedding.weight, before) and prompt.vectors.requires_grad
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(P, C\)"):
        SoftPrompt(torch.zeros(4))


# --- The Connector -------------------------------------------------------------------------------------------------------


def test_connector_is_causal_and_keeps_like_the_lm(lm):
    connector = Connector(lm.new_layers(2), scale=0.1)
    with torch.no_grad():
        for p in connector.layers.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(len(p))) * 0.3)
        x = torch.randn(2, 7, lm.config.dim, generator=seeded())
        whole = connector(x)
        first, cache = connector(x[:, :4], keep=True)
        second, cache = connector(x[:, 4:], cache, keep=True)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
        assert cache.size == 7
        changed = x.clone()
        changed[:, 5] += 1
        assert torch.equal(connector(changed)[:, :5], whole[:, :5]) and not torch.equal(
            connector(changed)[:, 5:], whole[:, 5:]
        )
        assert rms(whole) == pytest.approx(0.1, rel=1e-3)


def test_rms_of_known_vectors():
    assert rms(torch.tensor([[3.0, 4.0], [0.0, 5.0]])) == pytest.approx((50 / 4) ** 0.5)


# --- Files ---------------------------------------------------------------------------------------------------------------


def make_adapter(kind, lm):
    adapter = (
        SoftPrompt(torch.zeros(5, lm.config.dim))
        if kind == "prompt"
        else Connector(lm.new_layers(2), scale=0.3)
    )
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(i)))
    return adapter


@pytest.mark.parametrize("kind", ["prompt", "connector"])
def test_stored_adapter_comes_back(lm, tmp_path, kind):
    adapter = make_adapter(kind, lm)
    save_adapter(tmp_path / "a", adapter, lm, method="some_method", base_model_name_or_path="base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_adapter(tmp_path / "a", lm)
    ours, theirs = dict(adapter.named_parameters()), dict(again.named_parameters())
    assert type(again) is type(adapter) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and theirs[n].requires_grad for n in ours)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["method"] == "some_method" and config["base_model_name_or_path"] == "base"
    assert config["fingerprint"] == lm.fingerprint() and config["token_dim"] == lm.config.dim
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    if kind == "prompt":
        assert config["num_virtual_tokens"] == 5 and config["placement"] == "before_bos"
        assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {
            "prompt_embeddings"
        }
    else:
        x = torch.randn(2, 6, lm.config.dim, generator=seeded())
        assert torch.equal(adapter(x), again(x))


@pytest.mark.parametrize("kind", ["prompt", "connector"])
def test_adapter_of_another_base_is_refused(make_lm, tmp_path, kind):
    lm, other = make_lm(seed=0), make_lm(seed=1)
    save_adapter(tmp_path, make_adapter(kind, lm), lm)
    with pytest.raises(ValueError, match="was trained on another base") as error:
        load_adapter(tmp_path, other)
    assert (
        "\n" not in str(error.value)
        and lm.fingerprint()[:12] in str(error.value)
        and other.fingerprint()[:12] in str(error.value)
    )


def test_adapter_follows_its_lm_into_another_dtype(make_lm, tmp_path):
    lm = make_lm()
    lm.save(tmp_path / "lm")
    save_adapter(tmp_path / "a", make_adapter("prompt", lm), lm)
    half = model.LM.from_pretrained(tmp_path / "lm", dtype=torch.bfloat16)
    assert load_adapter(tmp_path / "a", half).vectors.dtype == torch.float32


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def test_adapter_without_fingerprint_loads_with_a_warning(lm, make_lm, tmp_path):
    adapter = make_adapter("prompt", lm)
    save_adapter(tmp_path, adapter, lm)
    edit_config(tmp_path, fingerprint="absent")
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        assert torch.equal(load_adapter(tmp_path, lm).vectors, adapter.vectors)
    other = make_lm("untied" if lm.config.tied else "tied")
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            ValueError,
            match=f"made for an LM of width {lm.config.dim}, this one's is {other.config.dim}",
        ),
    ):
        load_adapter(tmp_path, other)


def test_tensors_that_do_not_fit_are_refused(lm, tmp_path):
    C = lm.config.dim
    save_adapter(tmp_path / "p", make_adapter("prompt", lm), lm)
    save_file(
        {"prompt_embeddings": torch.zeros(4, C)}, tmp_path / "p" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=rf"the prompt is \(4, {C}\), not \(5, {C}\)"):
        load_adapter(tmp_path / "p", lm)
    save_adapter(tmp_path / "c", make_adapter("connector", lm), lm)
    file = tmp_path / "c" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "layers.1.q.weight"
    for changed in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: tensors[name].T.contiguous()},
        {n.replace(name, name + "x"): t for n, t in tensors.items()},
    ):
        save_file(changed, file)
        with pytest.raises(
            ValueError, match=f"the tensor {name}.* is missing, unexpected or misshapen"
        ):
            load_adapter(tmp_path / "c", lm)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="adapter_model.safetensors: truncated or corrupt"):
        load_adapter(tmp_path / "c", lm)


def test_configs_that_cannot_be_used_are_named(lm, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_adapter(tmp_path, lm)
    save_adapter(tmp_path, make_adapter("prompt", lm), lm)
    edit_config(tmp_path, peft_type="LORA")
    with pytest.raises(
        ValueError, match="peft_type 'LORA' is not supported; supported: PROMPT_TUNING, CONNECTOR"
    ):
        load_adapter(tmp_path, lm)
    save_adapter(tmp_path, make_adapter("prompt", lm), lm)
    edit_config(tmp_path, placement="after_bos")
    with pytest.raises(ValueError, match="placement 'after_bos' is not supported"):
        load_adapter(tmp_path, lm)
    for text, named in (
        ("{", "not valid JSON"),
        ("[]", "has no key peft_type"),
        ("{}", "has no key peft_type"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json: {named}"):
            load_adapter(tmp_path, lm)
    with pytest.raises(TypeError, match="a Linear is no adapter"):
        save_adapter(tmp_path / "new", torch.nn.Linear(2, 2), lm)
    assert not (tmp_path / "new").exists()


def test_replacing_keeps_the_old_file_if_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(RuntimeError, match="the disk is full"):
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("the disk is full")
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "copied, files",
    [
        ("read_tensors", (model, adapters, rerank)),
        ("Uninitialised", (model, adapters, rerank)),
        ("replacing", (adapters, rerank)),
    ],
)
def test_the_copies_of_a_helper_are_one_text(copied, files):
    assert len({inspect.getsource(getattr(file, copied)) for file in files}) == 1


# --- T5Encoder: parity with the reference is in test_parity.py -----------------------------------------------------------


def t5(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = T5Encoder(
        T5Config(
            **dict(
                vocab_size=30,
                dim=16,
                n_layers=2,
                n_heads=2,
                head_dim=6,
                hidden_dim=24,
                buckets=8,
                max_distance=12,
            )
            | changes
        )
    )
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def test_encoded_texts_do_not_see_their_padding_nor_their_neighbours():
    encoder, ids, lengths = (
        t5(),
        torch.randint(30, (3, 20), generator=seeded()),
        torch.tensor([20, 7, 1]),
    )
    together = encoder(encoder.embed(ids), lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            together[row, :n],
            encoder(encoder.embed(ids[row : row + 1, :n]))[0],
            atol=1e-5,
            rtol=1e-5,
        )


@torch.no_grad()
def test_the_encoder_reads_any_vectors_and_both_directions():
    """A trained prompt in front is read like tokens would be, and changes every position behind it; the last token changes the first position."""
    encoder, ids = t5(), torch.randint(30, (1, 9), generator=seeded())
    prompt = encoder.embed(torch.tensor([[3, 4]]))
    whole = encoder(torch.cat([prompt, encoder.embed(ids)], 1))
    assert torch.equal(whole, encoder(encoder.embed(torch.cat([torch.tensor([[3, 4]]), ids], 1))))
    assert (whole[:, 2:] - encoder(encoder.embed(ids))).abs().amax(2).min() > 1e-3
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 30
    assert (encoder(encoder.embed(changed)) - encoder(encoder.embed(ids)))[0, 0].abs().max() > 1e-3


def test_near_distances_have_a_bucket_each_and_far_ones_share():
    config = t5(buckets=32, max_distance=128).config
    buckets = adapters.distance_bucket(
        torch.tensor([-500, -128, -64, -8, -7, -1, 0, 1, 7, 8, 64, 128, 500]), config
    ).tolist()
    assert buckets == [15, 15, 14, 8, 7, 1, 0, 17, 23, 24, 30, 31, 31]


@pytest.mark.parametrize("gated", [True, False])
def test_a_stored_encoder_comes_back_frozen(tmp_path, gated):
    encoder = t5(gated=gated)
    encoder.save(tmp_path)
    again = T5Encoder.from_pretrained(tmp_path)
    assert (
        again.config == encoder.config
        and not any(p.requires_grad for p in again.parameters())
        and not again.training
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters()))


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="bert"), "model_type is not t5"),
        (dict(d_kv=None), "d_kv is None"),
        (dict(num_heads=3), "the tensor encoder.block.0"),
        (dict(feed_forward_proj="swish"), "'swish' is not supported"),
        (dict(num_layers=1), "the tensor encoder.block.1"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, change, named):
    t5().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        T5Encoder.from_pretrained(tmp_path)


def test_command_line(lm, tmp_path, capsys):
    save_adapter(
        tmp_path, SoftPrompt(torch.full((5, lm.config.dim), -0.25)), lm, method="prompt_tuning"
    )
    assert adapters.main([str(tmp_path)])["method"] == "prompt_tuning"
    printed = capsys.readouterr().out
    assert (
        f"(5, {lm.config.dim}), root mean square 0.2500" in printed and lm.fingerprint() in printed
    )
