"""Frozen means frozen, trained means trained, and a stored adapter returns only to its own LM."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import QUESTIONS, close, randomise, seeded, vectors, words_tokenizer
from safetensors.torch import load_file, save_file

import adapters
from adapters import (
    Connector,
    DeepPrompt,
    PromptGenerator,
    SoftPrompt,
    from_labels,
    from_text,
    from_vocab,
    load_adapter,
    save_adapter,
)
from generate import stack_prefixes
from model import LM
from recurse import COMPOSITIONS, Stack, new_connector
from t5 import T5Config, T5Encoder

IDS = torch.tensor([QUESTIONS[3], QUESTIONS[3][::-1]])
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
Q = "layers.1.self_attn.q_proj.weight"


def setting(method, lm):
    """(what is trained, a function from ids (B, T) to their loss)."""
    torch.manual_seed(0)
    if method == "fine_tuning":
        adapter, trained = None, lm.requires_grad_(True)
    elif method in ("prompt_tuning", "textual_recursion", "reader"):
        adapter = trained = SoftPrompt(from_vocab(8, lm.embed_tokens.weight))
    elif method == "deep_prompt":
        adapter = trained = DeepPrompt(lm.read(from_vocab(8, lm.embed_tokens.weight)), hidden=64)
    elif method == "id_pt":
        encoder = T5Encoder(T5Config(lm.config.vocab_size, 16, 1, 2, 8, 24)).requires_grad_(False)
        start = from_vocab(3, encoder.embed_tokens.weight)
        adapter = trained = PromptGenerator(encoder, start, torch.randn(4, lm.config.dim))
        for block in (trained.cross, *trained.layers):  # nothing below a layer of zeros would move
            torch.nn.init.normal_(block.attention.out_proj.weight, std=0.1)
            torch.nn.init.normal_(block.mlp[-1].weight, std=0.1)
    else:
        adapter = trained = new_connector(lm, method, 2)

    def loss(ids):
        model, prefix = COMPOSITIONS[method](lm, adapter)
        prefix = stack_prefixes(prefix, ids[:, :3].tolist())
        h = model(model.embed(ids[:, :-1]), prefix)
        return F.cross_entropy(model.logits(h).flatten(0, 1), ids[:, 1:].flatten())

    return trained, loss


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def copies(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def unmoved(module, earlier):
    return [n for n, p in module.named_parameters() if torch.equal(p, earlier[n])]


@pytest.mark.parametrize("method", [name for name in COMPOSITIONS if name != "training_free"])
def test_frozen_means_frozen_and_trained_means_trained(lm, method):
    trained, loss = setting(method, lm)
    with torch.no_grad():  # must leave nothing behind that later replaces a trained tensor
        untrained = loss(IDS).item()
    base = copies(lm)
    rate = {"deep_prompt": 2e-4, "id_pt": 2e-5}.get(method, 0.05)
    optimizer, losses = torch.optim.SGD(trained.parameters(), lr=rate), []
    for _ in range(2):
        earlier = copies(trained)
        losses.append(step(optimizer, loss(IDS)))
        assert unmoved(trained, earlier) == []
    assert losses[0] == pytest.approx(untrained) and loss(IDS) < losses[1] < losses[0]
    if trained is not lm:
        assert unmoved(lm, base) == list(base) and all(p.grad is None for p in lm.parameters())


def saved_tensors(function):
    """The number of tensors that autograd keeps for the backward pass of `function`."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        function()
    return len(kept)


def test_the_frozen_first_pass_records_no_graph(lm):
    x = lm.embed(IDS)
    assert saved_tensors(lambda: lm(x)) == 0 and not lm(x).requires_grad
    connector = new_connector(lm, "neural_recursion", 1)
    alone = saved_tensors(lambda: lm(connector(x)))
    assert saved_tensors(lambda: Stack(lm, [connector])(x)) == alone > 0


@pytest.mark.parametrize("method, rate", [("prompt_tuning", 0.03), ("neural_recursion", 0.01)])
def test_overfits_one_batch_in_100_steps(make_lm, method, rate):
    """Four random texts, which the LM knows nothing of. Chance is log V = 4.2 nats."""
    lm = make_lm()
    lm.norm.weight.mul_(4)  # as it is, it cannot put more than 95 % on any token
    trained, loss = setting(method, lm)
    ids = torch.randint(67, (4, 4), generator=seeded())
    ids[:, 0] = torch.arange(10, 14)  # the first tokens tell the texts apart
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    losses = [step(optimizer, loss(ids)) for _ in range(100)]
    assert losses[0] > 4 and loss(ids) < 0.05


@pytest.mark.parametrize("config", ["tied", "windows", "learned"])
def test_new_layers_are_fresh_trainable_and_not_the_lms(make_lm, config):
    lm, new = make_lm(config), LM(make_lm(config).config)
    before, layers = lm.fingerprint(), lm.new_layers(2)
    windows = list(lm.config.windows) or [None] * 3
    for stack, depth in ((layers, 2), (new.layers, 3)):  # an LM that is new starts alike
        assert [block.self_attn.window for block in stack] == windows[:depth]
        for name, p in stack.named_parameters():
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * depth) ** 0.5
            found = p.std().item() if p.dim() == 2 else p.unique().item()
            expected = std if p.dim() == 2 else float("weight" in name)
            assert found == pytest.approx(expected, rel=0.15) and p.requires_grad, name
    randomise(layers)
    assert lm.fingerprint() == before
    assert {p.dtype for p in lm.bfloat16().new_layers(1).parameters()} == {torch.float32}


def test_initialisers_do_not_alias_the_lm(lm):
    before, drawn = lm.embed_tokens.weight.clone(), from_vocab(4, lm.embed_tokens.weight)
    prompt = SoftPrompt(drawn.bfloat16())
    assert prompt.vectors.requires_grad and prompt.vectors.dtype == torch.float32
    for part in (drawn, SoftPrompt(lm.embed_tokens.weight).vectors.data):
        part.add_(1.0)
    assert torch.equal(lm.embed_tokens.weight, before)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(P, C\)"):
        SoftPrompt(torch.zeros(4))


@pytest.mark.parametrize("token", ["<pad>", " x", "<extra_id_0>"])
def test_text_with_a_token_that_has_no_embedding_is_refused(lm, token):
    table = lm.embed_tokens.weight
    tokenizer = words_tokenizer(len(table))
    tokenizer.add_tokens([token])
    message = f"the token '{token}' with the id {len(table)}, outside the LM's vocabulary of"
    for start, text in ((from_text, f"w3 {token}"), (from_labels, ["w3", token])):
        with pytest.raises(ValueError, match=message):
            start(4, table, tokenizer, text)
    assert torch.equal(from_text(2, table, tokenizer, "w3 w5"), table[[3, 5]])


# Files


def stored(kind, lm, folder, **info):
    """An adapter that is no initial state, also written to the folder."""
    adapter = SoftPrompt(vectors(lm, 5)) if kind == "prompt" else Connector(lm.new_layers(2), 0.3)
    randomise(adapter)
    save_adapter(folder, adapter, lm, **info)
    return adapter


def edit(folder, changes):
    """Changes keys of the config, or tensors of the file. None removes one."""
    path, tensors = folder / CONFIG, load_file(folder / FILE)
    config = json.loads(path.read_text())
    for name, value in changes.items():
        held = config if name in config else tensors
        held[name] = value
        if value is None:
            del held[name]
    path.write_text(json.dumps(config))
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize("kind", ["prompt", "connector"])
def test_stored_adapter_comes_back_and_is_printed(lm, tmp_path, capsys, kind):
    adapter = stored(kind, lm, tmp_path, method="a_method", base_model_name_or_path="base")
    with warnings.catch_warnings(action="error"):
        again = load_adapter(tmp_path, lm)
    assert type(again) is type(adapter) and all(p.requires_grad for p in again.parameters())
    close(copies(again), copies(adapter), 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, FILE]
    expected = dict(method="a_method", base_model_name_or_path="base", token_dim=lm.config.dim)
    if kind == "prompt":
        expected |= dict(num_virtual_tokens=5, placement="before_bos", peft_type="PROMPT_TUNING")
        assert load_file(tmp_path / FILE).keys() == {"prompt_embeddings"}
    else:
        expected |= dict(connector_layers=2, peft_type="CONNECTOR", fingerprint=lm.fingerprint())
        close(again(lm.embed(IDS)), adapter(lm.embed(IDS)), 0.0)
    config = adapters.main([str(tmp_path)])
    assert expected.items() <= config.items() == json.loads((tmp_path / CONFIG).read_text()).items()
    printed, weight = capsys.readouterr().out, next(adapter.parameters())
    assert f"{tuple(weight.shape)}, root mean square {adapters.rms(weight):.4f}" in printed
    assert all(str(value) in printed for value in expected.values())


@pytest.mark.parametrize("kind", ["prompt", "connector"])
def test_adapter_of_another_base_is_refused(make_lm, tmp_path, kind):
    lm, other = make_lm(), make_lm(seed=1)
    lm.save(tmp_path / "lm")
    stored(kind, lm, tmp_path)
    half = LM.from_pretrained(tmp_path / "lm", dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in half.parameters()) and not half.training
    half.norm.weight.data += 1  # the fingerprint is the checkpoint's, whatever became of a copy
    assert {p.dtype for p in load_adapter(tmp_path, half).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="was trained on another base") as error:
        load_adapter(tmp_path, other)
    for part in (lm, other):
        assert part.fingerprint()[:12] in str(error.value) and "\n" not in str(error.value)
    lm.layers[1].self_attn.v_proj.weight.data[0, 0] += 1e-3  # was never loaded: counts as it is
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(tmp_path, lm)


def test_adapter_without_fingerprint_loads_with_a_warning(make_lm, tmp_path):
    adapter = stored("prompt", make_lm(), tmp_path)
    edit(tmp_path, {"fingerprint": None})
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        assert torch.equal(load_adapter(tmp_path, make_lm()).vectors, adapter.vectors)
        with pytest.raises(ValueError, match="made for an LM of width 32, this one's is 24"):
            load_adapter(tmp_path, make_lm("untied"))


@pytest.mark.parametrize(
    "kind, changes, named",
    [
        ("prompt", {"peft_type": "LORA"}, "'LORA' is not supported; PROMPT_TUNING, PREFIX"),
        ("prompt", {"peft_type": "PREFIX_TUNING"}, "made for an LM of width 32, this one's is 24"),
        (
            "prompt",
            {"peft_type": "PREFIX_TUNING", "token_dim": 24},
            r"is \(5, 32\), not \(5, 144\)",
        ),
        # Another kind is refused by its name, before its width or its base.
        ("prompt", {"peft_type": "P_TUNING", "token_dim": 8}, "'P_TUNING' is not supported"),
        ("connector", {"peft_type": "IA3", "fingerprint": "another"}, "'IA3' is not supported"),
        ("prompt", {"placement": "behind"}, "placement 'behind' is neither before_bos nor"),
        ("prompt", {"num_virtual_tokens": 4}, r"the prompt is \(5, 32\), not \(4, 32\)"),
        ("prompt", {"prompt_embeddings": torch.zeros(4, 32)}, r"is \(4, 32\), not \(5, 32\)"),
        ("prompt", {"other": torch.zeros(2)}, "not a prompt"),
        ("connector", {"peft_type": "PROMPT_TUNING"}, "not a prompt"),
        ("connector", {"connector_layers": 0}, "connector_layers is 0, not a number of layers"),
        ("connector", {"connector_layers": "2"}, "connector_layers is '2', not a number"),
        ("connector", {"connector_layers": 3}, "missing: layers.2.*"),
        ("connector", {"connector_layers": 1}, "unexpected: layers.1.*"),
        ("connector", {Q: None}, f"missing: {Q}"),
        ("connector", {Q: torch.zeros(9, 9)}, rf"misshapen: {Q} is \(9, 9\), not \(48, 32\)"),
        ("connector", {Q: torch.zeros(48, 32).char()}, f"{Q} is stored as int8; quantised"),
        ("connector", {Q + "x": torch.zeros(48, 32)}, f"unexpected: {Q}x"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(make_lm, tmp_path, kind, changes, named):
    stored(kind, make_lm(), tmp_path)
    edit(tmp_path, changes)
    with pytest.raises(ValueError, match=named):
        load_adapter(tmp_path, make_lm())


def test_adapter_files_that_cannot_be_used_are_named(lm, tmp_path):
    stored("prompt", lm, tmp_path / "p")
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG}"):
        load_adapter(tmp_path, lm)
    with pytest.raises(TypeError, match="a Linear is not an adapter"):
        save_adapter(tmp_path / "new", torch.nn.Linear(2, 2), lm)
    assert not (tmp_path / "new").exists()
    whole = (tmp_path / "p" / FILE).read_bytes()
    (tmp_path / "p" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {FILE}"):
        load_adapter(tmp_path / "p", lm)
    (tmp_path / "p" / FILE).write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{FILE}: truncated or corrupt"):
        load_adapter(tmp_path / "p", lm)
    for text, named in {"{": "not valid JSON", "[]": "a list", "{}": "no key peft_type"}.items():
        (tmp_path / "p" / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=f"{CONFIG}: .*{named}"):
            load_adapter(tmp_path / "p", lm)
