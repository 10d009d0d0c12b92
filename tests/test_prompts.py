"""Deep prompts, generated prompts, placements, and batches in which each example has its own."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import QUESTIONS, close, naive_greedy, naive_score, randomise, seeded, vectors, whole
from safetensors.torch import load_file, save_file
from tiny_runs import command, run
from tokenizers import processors

from adapters import (
    DeepPrompt,
    PromptGenerator,
    SoftPrompt,
    bos_vector,
    from_text,
    from_vocab,
    load_adapter,
    random_like,
    save_adapter,
)
from checkpoints import load_tokenizer
from data import Example, encode_prompts
from generate import generate, option_scores, pad, predict
from model import LM, Prefix
from questions import prepare
from recurse import (
    COMPOSITIONS,
    load_trained,
    new_connector,
    prompt_embeddings,
    prompt_prefix,
    without_bos,
)
from runs import load_run, read_predictions
from t5 import T5Config, T5Encoder
from train import default_prompt_lr

KINDS = ["tied", "untied", "windows", "qk_norm", "post_norm", "parallel", "learned"]


def logits(lm, prefix, ids=QUESTIONS[3]):
    return lm.logits(lm(lm.embed(torch.tensor([ids])), prefix))[0]


def greedy(lm, prefix, ids=QUESTIONS):
    return [row[0].ids for row in generate(lm, ids, prefix, 6)]


# Deep prompts


@torch.no_grad()
@pytest.mark.parametrize("kind, hidden", [*((kind, None) for kind in KINDS), ("windows", 16)])
def test_deep_prompt_starts_as_what_the_lm_reads(make_lm, kind, hidden):
    lm = make_lm(kind)
    prompt = vectors(lm, 6)
    torch.manual_seed(0)
    deep = DeepPrompt(lm.read(prompt), hidden)
    close(logits(lm, deep()), whole(lm, QUESTIONS[3], prompt), 1e-4)
    assert greedy(lm, deep()) == [naive_greedy(lm, ids, prompt) for ids in QUESTIONS]


def test_deep_prompt_starts_as_a_text_or_as_noise(lm, tokenizer):
    text = lm.read(from_text(3, lm.embed_tokens.weight, tokenizer, "w5 w9 w11"))
    close(logits(lm, DeepPrompt(text)()), whole(lm, [5, 9, 11, *QUESTIONS[3]])[3:])
    noise = random_like(lm.read(vectors(lm, 200 // lm.config.dim)), 0.5, seeded(1))
    assert noise.rows == 1 and noise.size == 200 // lm.config.dim
    drawn = DeepPrompt(noise).keys_values.detach()
    assert drawn.std() == pytest.approx(0.5, rel=0.15) and drawn.mean().abs() < 0.1
    again = DeepPrompt(random_like(noise, 0.5, seeded(1)))
    assert torch.equal(again.keys_values, drawn)


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


def test_the_rate_of_a_deep_prompt_behind_an_mlp_is_a_tenth(lm):
    start = lm.read(vectors(lm, 4))
    plain, mlp = (default_prompt_lr(lm, DeepPrompt(start, hidden)) for hidden in (None, 8))
    assert plain == pytest.approx(10 * mlp) == lm.config.n_layers**-2


def test_a_start_that_no_deep_prompt_can_have_is_refused(lm):
    rows = lm.read(torch.stack([vectors(lm, 4), vectors(lm, 4)]))
    ragged = lm.read(vectors(lm, 4)[None], lengths=torch.tensor([3]))
    for start in (rows, ragged):
        with pytest.raises(ValueError, match="one row that is not ragged"):
            DeepPrompt(start)
    with pytest.raises(ValueError, match="--reparam-dim 3 cannot make 4 positions"):
        DeepPrompt(lm.read(vectors(lm, 4)), hidden=3)


# Input-dependent prompts


@pytest.fixture(scope="module")
def encoder():
    encoder = T5Encoder(T5Config(67, 16, 2, 2, 8, 24))
    randomise(encoder, 5)
    return encoder.requires_grad_(False)


def make_generator(lm, encoder, length=5, seed=0):
    torch.manual_seed(seed)
    start = from_vocab(3, encoder.embed_tokens.weight)
    generator = PromptGenerator(encoder, start, torch.randn(length, lm.config.dim))
    for p in generator.parameters():  # at its start the text changes nothing
        if p.dim() > 1 and p is not generator.queries:
            p.data.add_(torch.randn(p.shape) * 0.3)
    return generator


def test_generator_has_the_papers_parameters():
    """330K + 7M + 2 x 7M + 3M, about 25M in all. Prompt tuning of 400 vectors has 1.6M."""

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        base = T5Encoder(T5Config(32128, 768, 12, 12, 64, 3072, gated=False))
        generator = PromptGenerator(base, torch.empty(430, 768), prompt=torch.empty(400, 4096))
        prompt = SoftPrompt(torch.empty(400, 4096))
    assert count(base) == pytest.approx(110e6, rel=0.01)
    assert generator.start.numel() == pytest.approx(330e3, rel=0.01)
    for block in (generator.cross, *generator.layers):
        assert count(block) == pytest.approx(7e6, rel=0.02)
    assert len(generator.layers) == 2
    assert count(generator.project) == pytest.approx(3e6, rel=0.06)
    assert count(generator) == pytest.approx(25e6, rel=0.01)
    assert count(prompt) == pytest.approx(1.6e6, rel=0.03)


def test_generated_prompt_depends_on_all_of_its_text_and_on_nothing_else(lm, encoder):
    generator = make_generator(lm, encoder)
    ids, lengths = pad(QUESTIONS)
    together = generator(ids, lengths)
    assert together.shape == (4, 5, lm.config.dim)
    close(generator.prompts(QUESTIONS), together, 0.0)
    for row, expected in zip(QUESTIONS, together):
        close(generator(torch.tensor([row]), torch.tensor([len(row)]))[0], expected)
        for t in range(len(row)):
            other = [*row[:t], 50, *row[t + 1 :]]
            assert (generator.prompts([other])[0] - expected).abs().max() > 1e-3
    ids[1, 1:] = 60  # what padding holds is not read
    close(generator(ids, lengths), together)


@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_a_generator_starts_as_the_prompt_that_it_is_given(lm, encoder, scale):
    torch.manual_seed(0)
    start = from_vocab(3, encoder.embed_tokens.weight)
    prompt = scale * torch.randn(5, lm.config.dim)
    generator = PromptGenerator(encoder, start, prompt)
    for row in generator.prompts(QUESTIONS):
        close(row, prompt, 1e-4 * scale)
    rank = torch.linalg.matrix_rank(generator.project.weight)
    assert rank == min(generator.project.weight.shape)  # 5 vectors do not bound what it can learn


def test_a_generator_learns_to_depend_on_its_text(lm, encoder):
    torch.manual_seed(0)
    start = from_vocab(3, encoder.embed_tokens.weight)
    generator = PromptGenerator(encoder, start, from_vocab(5, lm.embed_tokens.weight))
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    goal = torch.randn(4, 1, lm.config.dim) * generator.scale
    before = (generator.prompts(QUESTIONS) - goal).square().mean()
    for _ in range(60):
        loss = (generator.prompts(QUESTIONS) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * before


def test_with_a_constant_encoder_the_generator_is_prompt_tuning(lm, encoder):
    class Constant(torch.nn.Module):
        embed = encoder.embed

        def forward(self, x, lengths):
            return torch.ones_like(x)

    generator = make_generator(lm, encoder)
    generator.encoder = [Constant()]
    prompts = generator.prompts(QUESTIONS)
    for prompt in prompts:
        close(prompt, prompts[0])
    _, prefix = COMPOSITIONS["id_pt"](lm, generator)
    soft = SoftPrompt(prompts[0])
    assert greedy(lm, prefix) == greedy(lm, lm.read(soft()))


@torch.no_grad()
def test_stored_generator_needs_its_encoder(lm, encoder, tmp_path):
    generator = make_generator(lm, encoder)
    save_adapter(tmp_path, generator, lm, method="id_pt")
    again = load_adapter(tmp_path, lm, encoder)
    close(again.prompts(QUESTIONS), generator.prompts(QUESTIONS), 0.0)
    other = randomise(T5Encoder(encoder.config), 6)
    for given, message in ((None, "no encoder is given"), (other, "encoder is another one")):
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, lm, given)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["start"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing: start"):
        load_adapter(tmp_path, lm, encoder)


@torch.no_grad()
def test_a_generator_reads_the_encoders_own_tokens(lm, encoder):
    generator = make_generator(lm, encoder)
    plain = generator.prompts([[4, 5, 9]])
    generator.recode = lambda ids: [i - 1 for i in ids]
    close(generator.prompts([[5, 6, 10]]), plain, 0.0)


# Before and after BOS


def with_bos(tokenizer):
    """The tokenizer, which puts w1, the LM's BOS, before every text."""
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    return tokenizer


@torch.no_grad()
def test_a_prompt_after_bos_stands_between_bos_and_the_text(make_lm, tokenizer, tmp_path):
    lm, tokenizer = make_lm(), with_bos(tokenizer)
    prompt = SoftPrompt(vectors(lm, 4), bos_vector(lm))
    assert [name for name, _ in prompt.named_parameters()] == ["vectors"]
    (before,) = encode_prompts(tokenizer, ["w5 w9"])
    (after,) = encode_prompts(without_bos(tokenizer), ["w5 w9"])
    assert (before, after) == ([1, 5, 9], [5, 9])
    x = torch.cat([lm.embed(torch.tensor([1])), vectors(lm, 4), lm.embed(torch.tensor(after))])
    close(logits(lm, lm.read(prompt()), after), lm.logits(lm(x[None]))[0, 5:])
    save_adapter(tmp_path, prompt, lm)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (5, 32)
    again = load_adapter(tmp_path, lm)
    close(again(), prompt(), 0.0)
    close(again.vectors, prompt.vectors, 0.0)


def test_an_lm_without_bos_has_no_place_after_it(make_lm):
    with pytest.raises(ValueError, match="has no BOS"):
        bos_vector(make_lm("untied"))


# Each example its own prompt


def make_mixed(lm, encoder):
    """(prefixes of four kinds, lengths and origins, the adapters that they come from)"""
    soft, deep = SoftPrompt(vectors(lm, 7, 2)), DeepPrompt(lm.read(vectors(lm, 3, 1)))
    deep.keys_values.data.add_(torch.randn(deep.keys_values.shape, generator=seeded(4)) * 0.3)
    generator = make_generator(lm, encoder)
    prefixes = [None, lm.read(soft()), deep(), COMPOSITIONS["id_pt"](lm, generator)[1]]
    return prefixes, (soft, deep, generator)


@pytest.fixture
def mixed(lm, encoder):
    return make_mixed(lm, encoder)


@torch.no_grad()
def test_mixed_tasks_in_a_batch_equal_each_alone(lm, mixed, tokenizer):
    prefixes, _ = mixed
    for order in (prefixes, prefixes[::-1], [prefixes[3]] * 4, [prefixes[1], None] * 2):
        alone = [greedy(lm, p, [ids])[0] for p, ids in zip(order, QUESTIONS)]
        assert greedy(lm, list(order)) == alone
        options = [[[4, 5], [6]], [[7]], [[8, 9, 10], [11], [12, 3]], [[5], [6]]]
        scores = option_scores(lm, QUESTIONS, options, list(order))
        for b, p in enumerate(order):
            close(scores[b], option_scores(lm, [QUESTIONS[b]], [options[b]], p)[0])
        expected = [predict(lm, tokenizer, [q], p, 4)[0] for q, p in zip(QUESTIONS, order)]
        for batch_size in (1, 3, 128):
            answers = predict(lm, tokenizer, QUESTIONS, list(order), 4, batch_size=batch_size)
            assert answers == expected
        choices = [row if b % 2 else [] for b, row in enumerate(options)]
        answers = predict(lm, tokenizer, QUESTIONS, list(order), 4, choices)
        for b, p in enumerate(order):
            assert [answers[b]] == predict(lm, tokenizer, [QUESTIONS[b]], p, 4, [choices[b]])
    assert greedy(lm, prefixes)[1] == naive_greedy(lm, QUESTIONS[1], vectors(lm, 7, 2))
    score = option_scores(lm, QUESTIONS[1:2], [[[4, 5]]], prefixes[1:2])[0]
    assert score.item() == pytest.approx(naive_score(lm, QUESTIONS[1], [4, 5], vectors(lm, 7, 2)))


def test_mixed_prefixes_that_do_not_fit_are_refused(lm, mixed, tokenizer):
    prefixes, _ = mixed
    with pytest.raises(ValueError, match="2 prefixes for 4 questions"):
        predict(lm, tokenizer, QUESTIONS, prefixes[:2])
    with pytest.raises(ValueError, match="question 3: a prefix of 5, 8 tokens and 30 new ones"):
        predict(lm, tokenizer, QUESTIONS, prefixes, 30)


# Files and other uses


@torch.no_grad()
def test_a_prefix_is_stored_and_belongs_to_its_lm(make_lm, lm, tmp_path):
    ragged = lm.read(lm.embed(torch.tensor([[5, 9, 11], [4, 7, 0]])), lengths=torch.tensor([3, 2]))
    shared, folder = lm.read(vectors(lm, 4)), tmp_path / "a" / "b"
    for prefix, ids in ((shared, QUESTIONS), (ragged, QUESTIONS[:2])):
        prefix.save(folder, lm)  # the second in place of the first
        again = Prefix.load(folder, lm)
        assert greedy(lm, again, ids) == greedy(lm, prefix, ids)
        for pair, other in zip(prefix.layers, again.layers, strict=True):
            close(pair, other, 0.0)
    half = make_lm("tied").bfloat16()
    half.stored_hash, half.folder = lm.fingerprint(), "unused"
    assert Prefix.load(folder, half).layers[0][0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="prefix.safetensors: belongs to another LM"):
        Prefix.load(folder, make_lm("tied", seed=9))
    save_file({"keys": torch.zeros(1)}, tmp_path / "prefix.safetensors")
    with pytest.raises(ValueError, match="prefix.safetensors: belongs to another LM, or to none"):
        Prefix.load(tmp_path, lm)


@torch.no_grad()
def test_prompts_of_all_kinds_are_loaded_as_prefixes(lm, encoder, mixed, tokenizer, tmp_path):
    (prefixes, adapters), folder = mixed, tmp_path / "t5"
    encoder.save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    for i, (prefix, adapter) in enumerate(zip(prefixes[1:], adapters)):
        save_adapter(tmp_path / str(i), adapter, lm)
        again, _ = load_trained(tmp_path / str(i), lm, tokenizer, folder if i == 2 else None)
        assert greedy(lm, prompt_prefix(again, lm)) == greedy(lm, prefix)
    with pytest.raises(ValueError, match="c: holds a Connector, which is no prompt"):
        prompt_prefix(new_connector(lm, "neural_recursion", 1), lm, "c")


@torch.no_grad()
def test_prompt_embeddings_are_all_that_an_engine_needs(lm, mixed):
    _, (soft, deep, generator) = mixed
    for method, adapter in (("prompt_tuning", soft), ("id_pt", generator)):
        x = prompt_embeddings(adapter, lm, QUESTIONS[2])
        expected = greedy(lm, COMPOSITIONS[method](lm, adapter)[1], QUESTIONS[2:3])
        assert lm.logits(lm(x[None]))[0, -1].argmax() == expected[0][0]
        prefix = lm.read(x[:-1])
        assert greedy(lm, prefix, [QUESTIONS[2][-1:]]) == expected
    with pytest.raises(ValueError, match="deep prompt is keys and values"):
        prompt_embeddings(deep, lm, QUESTIONS[2])


@torch.no_grad()
def test_examples_before_a_question_follow_its_own_prompt(lm, mixed, tokenizer):
    """With one prompt for each question, nothing can be read for all of them."""
    prefixes, shot = mixed[0], Example("w20 w21", "w22", ("w22",))
    asked = [Example(f"w{i} w{i + 1}", "w9", ("w9",)) for i in range(3, 7)]
    ids, _, given = prepare(lm, tokenizer, asked, prefixes, 2, [shot])
    assert given is prefixes and ids[0] == [20, 21, 22, 3, 4]
    with pytest.raises(ValueError, match="exceed the 33 that the LM"):
        prepare(lm, tokenizer, asked, prefixes, 40)


# Runs


STILL = "--lr 0 --steps 1"


def rows_of(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_the_default_rate_of_a_prompt_follows_the_embeddings(place, tmp_path, capsys):
    record = run(command(place, "prompt_tuning", tmp_path / "run"))
    std = LM.from_pretrained(place / "lm" / "model").embed_tokens.weight.std().item()
    assert record["lr"] == pytest.approx(std / 4) and record["arguments"]["lr"] is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lr"] == record["lr"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["lr"] == record["lr"]
    first = capsys.readouterr().out.splitlines()[:2]
    assert "parameters trained" in first[0] and f"learning rate {std / 4:.3g}" in first[1]
    again = run(command(place, "prompt_tuning", tmp_path / "run", "--resume"))
    assert again["lr"] == record["lr"]
    capsys.readouterr()
    assert run(command(place, "prompt_tuning", tmp_path / "given", STILL))["lr"] == 0
    assert "learning rate" not in capsys.readouterr().out


def test_a_deep_prompt_starts_from_a_text_a_prompt_or_noise(place, tmp_path):
    lm = LM.from_pretrained(place / "lm" / "model")
    soft, deep = tmp_path / "soft", tmp_path / "deep"
    run(command(place, "prompt_tuning", soft))
    run(command(place, "deep_prompt", deep, f"{STILL} --init text:Velmor,Kranstad --reparam-dim 8"))
    text = load_tokenizer(place / "lm" / "model").encode(
        "Velmor,Kranstad", add_special_tokens=False
    )
    expected = DeepPrompt(lm.read(lm.embed(torch.tensor(text.ids[:4])))).keys_values
    close(rows_of(deep), expected.detach(), 1e-4)
    starts = {"soft": DeepPrompt(lm.read(rows_of(soft))).keys_values.detach(), "deep": expected}
    for name, keys_values in starts.items():
        out = tmp_path / f"from_{name}"
        run(command(place, "deep_prompt", out, f"{STILL} --init {tmp_path / name}"))
        close(rows_of(out), keys_values.detach(), 1e-4)
    run(command(place, "deep_prompt", tmp_path / "noise", f"{STILL} --init random"))
    assert rows_of(tmp_path / "noise").std() == pytest.approx(1.0, rel=0.15)
    with pytest.raises(ValueError, match="holds a DeepPrompt, which prompt_tuning does not train"):
        run(command(place, "prompt_tuning", tmp_path / "new", f"--init {deep}"))


def test_a_run_with_its_prompt_after_bos_is_used_without_another_bos(place, tmp_path):
    out = tmp_path / "run"
    run(command(place, "prompt_tuning", out, "--placement after_bos --eval-limit 3"))
    lm = LM.from_pretrained(place / "lm" / "model")
    close(rows_of(out)[0], bos_vector(lm), 0.0)
    assert len(rows_of(out)) == 5
    model, prefix, tokenizer, _ = load_run(out)
    assert prefix.size == 5 and lm.config.bos not in tokenizer.encode("where was Anna born").ids
    rows = read_predictions(out)
    ids = [tokenizer.encode(row["input"]).ids for row in rows]
    assert predict(model, tokenizer, ids, prefix, 4) == [row["prediction"] for row in rows]
    before = run(command(place, "prompt_tuning", tmp_path / "b", f"{STILL} --init {out}"))
    assert before["results"] and len(rows_of(tmp_path / "b")) == 4
    with pytest.raises(ValueError, match="--placement after_bos: deep_prompt"):
        run(command(place, "deep_prompt", tmp_path / "c", "--placement after_bos"))


def test_a_run_of_id_pt_needs_an_encoder_and_remembers_it(place, tmp_path):
    with pytest.raises(ValueError, match="holds no T5 encoder; `python pretrain.py encoder`"):
        run(command(place, "id_pt", tmp_path / "a", f"--encoder {tmp_path}"))
    narrow = tmp_path / "narrow"
    config = T5Encoder.from_pretrained(place / "t5" / "model").config
    T5Encoder(replace(config, dim=12)).save(narrow)
    shutil.copy(place / "t5" / "model" / "tokenizer.json", narrow)
    with pytest.raises(ValueError, match="--encoder .*narrow: its width 12 is not a multiple of 8"):
        run(command(place, "id_pt", tmp_path / "a", f"--encoder {narrow}"))
    out, moved = tmp_path / "x" / "run", tmp_path / "y"
    shutil.copytree(place / "t5", tmp_path / "x" / "t5")
    encoder = f"--encoder {tmp_path}/x/t5/model"
    record = run(command(place, "id_pt", out, encoder))
    expected = [row["prediction"] for row in read_predictions(out)]
    (tmp_path / "x").rename(moved)  # the encoder moves together with the run
    model, prefix, tokenizer, _ = load_run(moved / "run")
    ids = [tokenizer.encode(row["input"]).ids for row in read_predictions(moved / "run")]
    assert predict(model, tokenizer, ids, prefix, 4) == expected
    flags = f"{STILL} --init {moved}/run --encoder {moved}/t5/model"
    run(command(place, "id_pt", tmp_path / "again", flags))
    with pytest.raises(ValueError, match="a prompt of 3; say so with --encoder-prompt 3"):
        run(command(place, "id_pt", tmp_path / "no", f"{flags} --encoder-prompt 4"))
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (moved / "run", tmp_path / "again")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record["encoder_hash"]
    shutil.rmtree(moved / "t5")
    with pytest.raises(FileNotFoundError, match=f"run: its encoder, --encoder {tmp_path}/x/t5/m"):
        load_run(moved / "run")
