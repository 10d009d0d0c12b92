"""Parity with transformers and PEFT on tiny random weights."""

import copy
import json
import unicodedata
from itertools import product

import bm25s
import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
import transformers
from conftest import close, randomise, seeded
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file, save_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from adapters import (
    Connector,
    DeepPrompt,
    SoftPrompt,
    bos_vector,
    load_adapter,
    save_adapter,
)
from checkpoints import load_tokenizer, read_config
from eval import _answer_tokens
from families import FAMILIES
from fit import Adafactor
from generate import generate, pad
from model import LM, Prefix
from recurse import Stack, prompt_embeddings
from rerank import Bert, CrossEncoder, token_type_ids
from rerank import pad as pad_inputs
from retrieve import BM25, DualEncoder, split_words
from t5 import T5Encoder

MAX_LEN = 64
ONE = [[5, 9, 11, 4, 30, 8]]
# Ragged. The longest goes beyond every window and every original length of rope scaling.
FIVE = [*ONE, [7], [6, 3, 44, 20], list(range(12, 45)), list(range(12, 20))]
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=500.0)
TIED, TWO_KEY_HEADS = dict(tie_word_embeddings=True), dict(num_key_value_heads=2)
WIDE = TWO_KEY_HEADS | dict(head_dim=12)
SLIDING = TWO_KEY_HEADS | dict(use_sliding_window=True, sliding_window=7)
MIXED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
EXACT_GELU = dict(activation_function="gelu", tie_word_embeddings=False)
SEQUENTIAL = dict(use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=500)
NO_BIAS = dict(attention_bias=False, rotary_pct=1.0, hidden_act="relu", layer_norm_eps=1e-3)
CASES = {  # model_type and a description: what differs from transformers' defaults, in its words
    "gpt2": {},
    "gpt2, untied, own width": EXACT_GELU | dict(n_inner=40, layer_norm_epsilon=1e-3),
    "gpt2, scores divided by depth": dict(scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": {},
    "gpt_neox, sequential, half rotated, tied": SEQUENTIAL | TIED,
    "gpt_neox, no bias, all rotated, relu": NO_BIAS,
    "gpt_neox, linear": dict(rope_parameters=LINEAR | dict(partial_rotary_factor=0.5)),
    "llama": WIDE,
    "llama, grouped, tied": WIDE | TIED | dict(rms_norm_eps=1e-5),
    "llama, one key head, far theta": dict(num_key_value_heads=1, rope_theta=500_000.0),
    "llama, biases, tied": TIED | dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama, llama3": dict(rope_parameters=LLAMA3, num_key_value_heads=1, head_dim=6),
    "llama, linear": dict(rope_parameters=LINEAR),
    "mistral": WIDE | dict(sliding_window=7),
    "mistral, no window": TWO_KEY_HEADS | dict(sliding_window=None),
    "mistral, narrow window": dict(sliding_window=2, num_key_value_heads=4),
    "qwen2": TWO_KEY_HEADS | TIED,
    "qwen2, upper layers slide": SLIDING | dict(max_window_layers=1),
    "qwen3": WIDE | TIED,
    "qwen3, layer types, bias": SLIDING | MIXED | dict(head_dim=8, attention_bias=True),
    "olmo2": TWO_KEY_HEADS,
    "olmo2, bias, llama3": dict(attention_bias=True, rope_parameters=LLAMA3),
}
TIED_CASES = ["gpt2", "llama, grouped, tied", "llama, biases, tied", "qwen2", "qwen3"]
FILE = "model.safetensors"
differences = {}  # the largest logit differences of each family


def make_reference(case):
    """A reference LM whose random weights make positions, masks, norms and biases matter."""
    kind, changes = case.split(",")[0], CASES[case]
    linear = changes.get("rope_parameters", {}).get("rope_type") == "linear"
    sizes = dict(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=32)
    sizes |= dict(num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    sizes |= dict(max_position_embeddings=MAX_LEN // 4 if linear else MAX_LEN)
    config = transformers.AutoConfig.for_model(kind, **sizes | changes)
    reference, rng = transformers.AutoModelForCausalLM.from_config(config).eval(), seeded(0)
    for name, p in reference.named_parameters():
        is_norm = p.dim() == 1 and name.endswith("weight")
        p.data.copy_(torch.randn(p.shape, generator=rng) * 0.2 + is_norm)
    return reference


def make_both(case, folder):
    """The reference, and the LM that loads the folder it saved."""
    reference = make_reference(case)
    reference.save_pretrained(folder)
    return reference, LM.from_pretrained(folder)


@pytest.fixture(params=CASES, scope="module")
def both(request, tmp_path_factory):
    """The reference, its LM, and the folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "reference"
    return *make_both(request.param, folder), folder


def check(lm, ours, theirs):
    close(ours, theirs)
    assert theirs.std() > 0.3  # the logits are not constant
    differences.setdefault(lm.config.family, []).append((ours - theirs).abs().max().item())


def logits(lm, ids):
    return lm.logits(lm(lm.embed(torch.tensor(ids))))


def greedy(lm, *arguments, n=1):
    return [[sample.ids for sample in row] for row in generate(lm, *arguments, n=n)]


@torch.no_grad()
def test_logits_equal_the_references(both):
    reference, lm, _ = both
    assert lm.config.family == reference.config.model_type and lm.config.max_len == MAX_LEN
    tokens = torch.randint(61, (5, 60), generator=seeded(1))
    theirs, x = reference(tokens).logits, lm.embed(tokens)
    check(lm, lm.logits(lm(x[:1])), theirs[:1])
    for cut in (0, 1, 20, 59):
        prefix = lm.read(x[:, :cut]) if cut else None
        check(lm, lm.logits(lm(x[:, cut:], prefix)), theirs[:, cut:])
    cuts = (3, 30, 0, 8, 17)
    prefixes = Prefix.stack([lm.read(x[b, :cut]) if cut else None for b, cut in enumerate(cuts)])
    texts = torch.stack([x[b, cut : cut + 30] for b, cut in enumerate(cuts)])
    for b, ours in enumerate(lm.logits(lm(texts, prefixes))):
        check(lm, ours, theirs[b, cuts[b] : cuts[b] + 30])


@torch.no_grad()
def test_greedy_tokens_equal_the_references(both):
    reference, lm, _ = both
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    T = max(map(len, FIVE))  # the reference needs left padding and a mask
    left = torch.tensor([[0] * (T - len(ids)) + ids for ids in FIVE])
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in FIVE])
    batched = reference.generate(left, attention_mask=mask, **options)[:, None, T:].tolist()
    alone = reference.generate(left[:1, T - len(ONE[0]) :], **options)[:, None, len(ONE[0]) :]
    assert greedy(lm, ONE, None, 20) == alone.tolist() == batched[:1]
    assert greedy(lm, FIVE, None, 20) == batched and len({tuple(ids) for (ids,) in batched}) > 2
    prefixes = [lm.read(lm.embed(torch.tensor(FIVE[b][:cut]))) for b, cut in ((2, 3), (3, 20))]
    prefixes, rests = [None, None, *prefixes, None], [*FIVE[:2], FIVE[2][3:], FIVE[3][20:], FIVE[4]]
    assert greedy(lm, rests, prefixes, 20, n=3) == [row * 3 for row in batched]


def test_new_layers_are_the_familys_and_train(both):
    reference, lm, _ = both
    layers = lm.new_layers(3)
    layers.load_state_dict(lm.layers.state_dict())
    tokens = torch.tensor([FIVE[3], FIVE[3][::-1]])
    x = lm.add_positions(lm.embed(tokens), None)
    check(lm, lm.logits(lm.norm(layers(x))), reference(tokens).logits)
    connector = Connector(lm.new_layers(2))
    stack, parameters = Stack(lm, [connector]), dict(connector.named_parameters())
    assert not any(p.any() for name, p in parameters.items() if name.endswith("bias"))
    logits(stack, FIVE[3:4]).square().mean().backward()
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert all(name.endswith("k_proj.bias") for name in without)  # shifts a query's scores alike
    randomise(connector, 3)
    for ids, (new,) in zip(FIVE, greedy(stack, FIVE, None, 6)):
        for t, token in enumerate(new):
            assert logits(stack, [ids + new[:t]])[0, -1].argmax() == token


def load_completely(kind, folder):
    """The reference's model from a folder that must hold exactly its tensors."""
    model, problems = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(problems[p] for p in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.no_grad()
def test_saved_folder_loads_in_the_reference_and_here(both, tmp_path):
    """The reference writes rope_parameters; it used to write rope_theta, as we still do."""
    reference, lm, folder = both
    lm.save(tmp_path, replace=True)
    again = load_completely(transformers.AutoModelForCausalLM, tmp_path)
    ids, tokens = FIVE[3:4], torch.tensor(FIVE[3:4])
    assert torch.equal(again(tokens).logits, reference(tokens).logits)
    assert again.config.eos_token_id == 2
    loaded = LM.from_pretrained(tmp_path)
    assert loaded.config == lm.config and torch.equal(logits(loaded, ids), logits(lm, ids))
    assert loaded.fingerprint() == LM.from_pretrained(tmp_path, dtype=torch.bfloat16).fingerprint()
    new, old = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert "rope_parameters" not in old and ("rope_parameters" in new or "n_positions" in new)
    if "rope_scaling" in old:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")  # older still
    if new.get("max_window_layers") == 1:
        del new["layer_types"]  # older files have none
    for config in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path) == read_config(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_files_of_other_years_load(tmp_path, family):
    """Some hold masks and frequencies. GPT-2's was saved without its head, so without a prefix.
    The name of GPT-NeoX's head differs between versions of the reference."""
    (_, lm), file = make_both(family, tmp_path), tmp_path / FILE
    tensors, mask = load_file(file), torch.ones(1, 1, 64, 64)
    if family == "llama":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if family == "gpt2":
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        tensors |= {"h.1.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}
    if family == "gpt_neox":
        names = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
        tensors = {names.get(name, name): t for name, t in tensors.items()}
        tensors["gpt_neox.layers.0.attention.bias"] = mask.bool()
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, file)
    again = LM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(lm.parameters(), again.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("case", TIED_CASES)
def test_tied_table_may_be_stored_under_the_heads_name_alone(tmp_path, case):
    """As safetensors' save_model leaves it, which keeps the first of the names by the alphabet."""
    (reference, before), tokens = make_both(case, tmp_path), torch.tensor([FIVE[3]])
    save_model(reference, tmp_path / FILE)
    assert not any("embed_" in name or "wte" in name for name in load_file(tmp_path / FILE))
    lm = LM.from_pretrained(tmp_path)
    assert lm.config == before.config and lm.config.tied
    check(lm, logits(lm, FIVE[3:4]), reference(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_token_that_no_file_names_is_the_references_default(tmp_path, family):
    """It is dropped from a smaller vocabulary. null means that nothing ends a text."""
    config = transformers.AutoConfig.for_model(family)
    config.save_pretrained(tmp_path)
    stored, path = json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json"
    stored.pop("eos_token_id", None)
    default = () if config.eos_token_id is None else (config.eos_token_id,)
    for changes, eos in (({}, default), ({"vocab_size": 2}, ()), ({"eos_token_id": None}, ())):
        path.write_text(json.dumps(stored | changes))
        assert read_config(tmp_path)["eos"] == eos


ENDS = [(2, [2, 25]), (25, [2, 7, 25]), (2, 7), (None, [7, 3]), (None, None), (5, "no file")]


@pytest.mark.parametrize("config, generation", ENDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_texts_end_where_the_references_end(tmp_path, family, config, generation):
    make_reference(family).save_pretrained(tmp_path)
    path, settings = tmp_path / "config.json", tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    settings.write_text(json.dumps({"eos_token_id": generation}))
    if generation == "no file":
        settings.unlink()
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = reference.generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    assert sorted(read_config(tmp_path)["eos"]) == sorted(t for t in theirs if t is not None)


def test_every_family_is_checked():
    assert {case.split(",")[0] for case in CASES} == set(FAMILIES)
    print("\nlargest logit difference:", {k: f"{max(d):.1e}" for k, d in differences.items()})


# Tokenizers

TEXTS = ["The hats' owner, José, can't (or won't) pay  $12.50!", " leading, trailing ", ""]
TEXTS += ["\n\nnew\tlines 新しい naïve ☺", "<|endoftext|>x <|endoftext|>", "[MASK] [SEP]he"]
END = "<|endoftext|>"


def tokenizer_folder(folder, kind, **settings):
    """A folder with GPT-2's vocab.json and merges.txt, or with BERT's vocab.txt."""
    folder.mkdir()
    if kind == "GPT2Tokenizer":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options = dict(special_tokens=[END], initial_alphabet=tokenizer.pre_tokenizer.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, **options)
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
        tokenizer.model.save(str(folder))
    else:
        pieces = [*"abcdefghijklmnopqrstuvwxyzJT0125.,!$'()新し", "the", "hat", "own", "Jo", "na"]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{p}" for p in pieces)]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": kind} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


BPE = [{}, {"add_bos_token": True}, {"add_prefix_space": True, "bos_token": END}]
BPE += [{"eos_token": {"__type": "AddedToken", "content": END}}]
SETTINGS = [("GPT2Tokenizer", settings) for settings in BPE]
SETTINGS += [("BertTokenizer", {}), ("BertTokenizer", {"do_lower_case": False})]


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_tokenizers_of_several_files_equal_the_references(tmp_path, kind, settings):
    folder = tokenizer_folder(tmp_path / "tokenizer", kind, **settings)
    theirs, ours = getattr(transformers, kind).from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special).ids == ids
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=False) == decoded
    assert ours.get_vocab() == theirs.get_vocab()
    has_bos = ours.encode("the").ids[0] == ours.token_to_id(END)
    assert has_bos == bool(settings.get("add_bos_token"))


# Encoders

T5_SIZES = dict(vocab_size=50, d_model=24, d_kv=10, d_ff=40, num_layers=3, num_heads=4)
T5_SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20)
BERT_SIZES = dict(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4)
BERT_SIZES |= dict(intermediate_size=40, max_position_embeddings=60)
RAGGED, LENGTHS = torch.randint(49, (3, 40), generator=seeded(1)), torch.tensor([40, 17, 1])
REAL = torch.arange(40) < LENGTHS[:, None]


def states(reference, **inputs):
    """What the reference makes of the real tokens."""
    return reference(attention_mask=REAL.long(), **inputs).last_hidden_state[REAL]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("mlp", ["relu", "gated-gelu"])
def test_t5_encoder_equals_the_reference_and_goes_back(tmp_path, kind, mlp):
    changes = dict(feed_forward_proj=mlp, tie_word_embeddings=mlp == "relu", num_decoder_layers=1)
    reference = getattr(transformers, kind)(transformers.T5Config(**T5_SIZES | changes)).eval()
    randomise(reference).save_pretrained(tmp_path / "reference")
    encoder, theirs = T5Encoder.from_pretrained(tmp_path / "reference"), reference.get_encoder()
    expected = states(theirs, input_ids=RAGGED)
    close(encoder(encoder.embed(RAGGED), LENGTHS)[REAL], expected, 1e-5)
    x = torch.randn(3, 40, 24) * 0.3  # no tokens' embeddings, such as a trained prompt
    close(encoder(x, LENGTHS)[REAL], states(theirs, inputs_embeds=x), 1e-5)
    encoder.save(tmp_path / "ours")
    again = load_completely(transformers.T5EncoderModel, tmp_path / "ours")
    close(states(again, input_ids=RAGGED), expected, 1e-5)


T5_TABLES = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]


@torch.no_grad()
@pytest.mark.parametrize("name", T5_TABLES)
def test_t5s_table_may_be_stored_under_any_of_its_names(tmp_path, name):
    config, file = transformers.T5Config(**T5_SIZES), tmp_path / FILE
    reference = randomise(transformers.T5ForConditionalGeneration(config)).eval()
    reference.save_pretrained(tmp_path)
    save_model(reference, file)
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors.pop("decoder.embed_tokens.weight")
    assert len([n for n in tensors if n.removesuffix(".weight") in T5_TABLES]) == 1
    save_file(tensors, file)
    encoder = T5Encoder.from_pretrained(tmp_path)
    theirs = states(reference.get_encoder(), input_ids=RAGGED)
    close(encoder(encoder.embed(RAGGED), LENGTHS)[REAL], theirs, 1e-5)


@pytest.mark.parametrize("table", T5_TABLES)
def test_t5s_table_is_not_the_head_that_stands_beside_it(tmp_path, table):
    """T5 1.1 and Flan have a head of their own."""
    config, file = transformers.T5Config(**T5_SIZES), tmp_path / FILE
    randomise(transformers.T5EncoderModel(config)).save_pretrained(tmp_path)
    tensors = load_file(file)
    embeddings = tensors.pop("shared.weight")
    save_file(tensors | {"lm_head.weight": 2 * embeddings, f"{table}.weight": embeddings}, file)
    assert torch.equal(T5Encoder.from_pretrained(tmp_path).embed_tokens.weight, embeddings)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification"]
)
@pytest.mark.parametrize("renamed", ["", "embeddings", "layer.0", "output.LayerNorm"])
def test_bert_whose_norms_have_gamma_and_beta_loads(tmp_path, kind, renamed):
    """bert-base-uncased is such a file. Here all norms have the names, or some."""
    reference = getattr(transformers, kind)(transformers.BertConfig(**BERT_SIZES))
    randomise(reference).save_pretrained(tmp_path)
    file, tensors = tmp_path / FILE, {}
    for name, tensor in load_file(file).items():
        if "LayerNorm" in name and renamed in name:
            name = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[name] = tensor
    assert any(name.endswith("LayerNorm.gamma") for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    theirs = transformers.BertModel.from_pretrained(tmp_path).eval()
    bert = Bert.from_pretrained(tmp_path)
    close(bert(RAGGED, LENGTHS)[REAL], states(theirs, input_ids=RAGGED), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_bert_equals_the_reference_and_goes_back(tmp_path, kind):
    reference = getattr(transformers, kind)(transformers.BertConfig(**BERT_SIZES)).eval()
    randomise(reference).save_pretrained(tmp_path / "reference")
    bert, ids = Bert.from_pretrained(tmp_path / "reference"), RAGGED.clone()
    ids[:, 9] = 49
    types = token_type_ids(ids, 49)
    expected = states(reference.base_model, input_ids=ids, token_type_ids=types)
    close(bert(ids, LENGTHS, types)[REAL], expected, 1e-5)
    assert (bert(ids, LENGTHS)[REAL] - expected).abs().max() > 0.1
    bert.save(tmp_path / "ours")
    again = transformers.BertModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    close(states(again.eval(), input_ids=ids, token_type_ids=types), expected, 1e-5)


# Retrieval and re-ranking

QUESTION = "Who wrote Emma?"
PAIRS = [
    ("Emma", "Emma is a novel."),
    ("", "Jane."),
    ("A long title", "wrote " * 90),
    ("Jane", "It"),
]


def published(folder, reference):
    """Save the reference with the tokenizer of BERT's vocabulary. Returns transformers' own."""
    randomise(reference).save_pretrained(folder)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] emma jane wrote who is a novel . ? long title it ##e"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 2])
def test_cross_encoder_scores_are_the_references(tmp_path, labels):
    """Question and passage as transformers pairs them; a title goes before another [SEP]."""
    config = transformers.BertConfig(**BERT_SIZES, num_labels=labels)
    reference = transformers.BertForSequenceClassification(config).eval()
    theirs = published(tmp_path, reference)
    encoder = CrossEncoder.from_pretrained(tmp_path)
    assert "passage [SEP]" in str(encoder.format) and encoder.max_len == 60
    for passages in (PAIRS, [("", text) for _, text in PAIRS]):
        texts = [f"{title}[SEP]{text}" if title else text for title, text in passages]
        inputs = theirs([QUESTION] * len(texts), texts, truncation="only_second", max_length=60)
        inputs = theirs.pad(inputs, return_tensors="pt")
        logits = reference(**inputs).logits
        expected = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
        close(encoder.score(QUESTION, passages), expected, 1e-5)
        assert expected.std() > 1e-3
    encoder.save(tmp_path / "ours")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**inputs).logits, logits)


@torch.no_grad()
def test_dpr_readers_logits_are_the_references(tmp_path):
    reference = transformers.DPRReader(transformers.DPRConfig(**BERT_SIZES)).eval()
    published(tmp_path, reference)
    theirs = transformers.DPRReaderTokenizer(str(tmp_path / "vocab.txt"))
    encoder = CrossEncoder.from_pretrained(tmp_path)
    assert str(encoder.format).endswith("passage")
    options = dict(padding=True, max_length=60, truncation=True, return_tensors="pt")
    titles, texts = zip(*PAIRS)
    inputs = theirs([QUESTION] * len(PAIRS), list(titles), list(texts), **options)
    expected = reference(**inputs)
    close(encoder.score(QUESTION, PAIRS), expected.relevance_logits, 1e-5)
    parts = (encoder.tokens(some) for some in ([QUESTION] * len(PAIRS), titles, texts))
    ids, lengths = pad_inputs(list(map(encoder.layout, *parts)))
    assert torch.equal(ids, inputs["input_ids"])
    rank, spans = encoder(ids, lengths, spans=True)
    real = inputs["attention_mask"].bool()
    close(rank, expected.relevance_logits, 1e-5)
    close(spans[..., 0][real], expected.start_logits[real], 1e-5)
    close(spans[..., 1][real], expected.end_logits[real], 1e-5)
    encoder.save(tmp_path / "ours")
    again = transformers.DPRReader.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**inputs).relevance_logits, expected.relevance_logits)


@torch.no_grad()
def test_dpr_encoders_vectors_are_the_references(tmp_path):
    references, folders = [], [tmp_path / "question", tmp_path / "passage"]
    for kind, folder in zip(("DPRQuestionEncoder", "DPRContextEncoder"), folders):
        folder.mkdir()
        references.append(getattr(transformers, kind)(transformers.DPRConfig(**BERT_SIZES)).eval())
        theirs = published(folder, references[-1])
    dual = DualEncoder.from_pretrained(*folders)
    expected = references[0](**theirs([QUESTION], return_tensors="pt")).pooler_output
    close(torch.tensor(dual.encode_questions([QUESTION])), expected, 1e-5)
    title, text = PAIRS[0]
    ids = theirs(title, text, return_tensors="pt")["input_ids"]  # DPR's own token types are all 0
    close(torch.tensor(dual.encode_passages(PAIRS))[:1], references[1](ids).pooler_output, 1e-5)


def test_bm25_finds_what_bm25s_finds():
    rng, words = np.random.default_rng(0), np.array([f"w{i}" for i in range(400)])
    weights = 1 / np.arange(1, 401)
    draw = lambda n: " ".join(rng.choice(words, n, p=weights / weights.sum()))  # noqa: E731
    book = [("", draw(rng.integers(5, 60))) for _ in range(1000)]
    questions = [" ".join(dict.fromkeys(draw(8).split())) for _ in range(50)]
    theirs = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend="numpy")
    theirs.index([split_words(text) for _, text in book], show_progress=False)
    ours = BM25(book)
    for question in questions:
        scores = theirs.get_scores(split_words(question))
        found = ours.search(question, 100)
        rows = [row for row, _ in found]
        best = np.sort(scores)[::-1][:100]
        np.testing.assert_allclose([score for _, score in found], best, atol=2e-5)
        np.testing.assert_allclose(scores[rows], best, atol=2e-5)  # the same list, up to ties


def test_the_classes_of_has_answer_are_those_of_unicode():
    assigned = (chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs"))
    text = "".join(assigned)
    expected = regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", text)
    assert _answer_tokens().findall(text) == expected


# Prompt tuning and Adafactor


def test_prompt_has_pefts_loss_and_gradient_and_goes_there_and_back(tmp_path):
    reference, lm = make_both("llama, grouped, tied", tmp_path / "reference")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    peft = get_peft_model(copy.deepcopy(reference), config).eval()
    vectors = torch.randn(7, 32, generator=seeded(2)) * 0.25
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    prompt, (tokens, lengths) = SoftPrompt(vectors), pad(FIVE)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    inputs = dict(input_ids=tokens, attention_mask=real.long())
    labels = tokens.masked_fill(~real, -100)
    theirs = peft(**inputs, labels=labels)
    theirs.loss.backward()
    z = lm.logits(lm(lm.embed(tokens), lm.read(prompt())))
    # PEFT labels its P slots -100 and shifts by one. So the logits of slot P - 1 predict token 0.
    last = lm.logits(lm(prompt()[None]))[:, -1:].expand(len(tokens), -1, -1)
    shifted = torch.cat([last, z[:, :-1]], dim=1)
    ours = F.cross_entropy(shifted.flatten(0, 1), labels.flatten(), ignore_index=-100)
    ours.backward()
    close(ours, theirs.loss, 1e-5)
    close(prompt.vectors.grad, weight.grad, 1e-5)
    assert prompt.vectors.grad.abs().amax(1).min() > 1e-3
    peft.save_pretrained(tmp_path / "theirs")
    assert "fingerprint" not in (tmp_path / "theirs" / "adapter_config.json").read_text()
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        assert torch.equal(load_adapter(tmp_path / "theirs", lm).vectors, vectors)
    assert (z - reference(**inputs).logits)[real].abs().max() > 0.1
    save_adapter(tmp_path / "ours", prompt, lm, method="prompt_tuning")
    loaded = PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    close(z[real], loaded(**inputs).logits[:, 7:][real])


@torch.no_grad()
def test_prompt_after_bos_is_pefts_with_one_row_more_and_has_embeddings(tmp_path):
    """transformers continues its embeddings as we continue the text."""
    reference, lm = make_both("llama, grouped, tied", tmp_path / "reference")
    prompt = SoftPrompt(torch.randn(4, 32, generator=seeded(2)) * 0.25, bos_vector(lm))
    ours = logits_after(lm, prompt)
    save_adapter(tmp_path / "ours", prompt, lm)
    peft = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    close(ours, peft(torch.tensor(ONE)).logits[:, 5:], 1e-4)
    assert (ours - logits_after(lm, SoftPrompt(prompt.vectors))).abs().max() > 0.1
    x, options = prompt_embeddings(prompt, lm, ONE[0]), dict(do_sample=False, eos_token_id=None)
    theirs = reference.generate(inputs_embeds=x[None], max_new_tokens=8, pad_token_id=0, **options)
    assert greedy(lm, ONE, lm.read(prompt()), 8) == theirs[:, None].tolist()


def logits_after(lm, prompt):
    return lm.logits(lm(lm.embed(torch.tensor(ONE)), lm.read(prompt())))


PREFIXES = ["gpt2", "gpt_neox", "llama, grouped, tied", "llama, one key head, far theta"]
PREFIXES += ["qwen3, layer types, bias", "olmo2"]


@pytest.mark.parametrize("case", PREFIXES)
def test_deep_prompt_is_pefts_prefix_tuning_and_goes_there_and_back(tmp_path, case):
    """With keys that no text has: attention reads them as they are, in PEFT and here."""
    reference, lm = make_both(case, tmp_path / "reference")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft = get_peft_model(copy.deepcopy(reference), config)
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data.copy_(torch.randn(weight.shape, generator=seeded(3)))
    tokens, lengths = pad(FIVE)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    inputs = dict(input_ids=tokens, attention_mask=real.long())
    theirs = peft(**inputs).logits
    theirs[real].logsumexp(-1).sum().backward()
    peft.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        deep = load_adapter(tmp_path / "theirs", lm)
    assert type(deep) is DeepPrompt and torch.equal(deep.keys_values, weight)
    ours = lm.logits(lm(lm.embed(tokens), deep()))
    ours[real].logsumexp(-1).sum().backward()
    close(ours[real], theirs[real], 1e-4)
    assert (ours - lm.logits(lm(lm.embed(tokens))))[real].abs().max() > 0.1
    largest = weight.grad.abs().max().item()
    close(deep.keys_values.grad / largest, weight.grad / largest, 1e-4)
    save_adapter(tmp_path / "ours", DeepPrompt(deep(), hidden=8), lm)
    loaded = PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    close(loaded(**inputs).logits[real], theirs[real], 1e-4)


def test_pefts_prefix_tuning_with_an_mlp_is_what_the_mlp_computed(tmp_path):
    reference, lm = make_both("llama, grouped, tied", tmp_path / "reference")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=9
    )
    peft = get_peft_model(copy.deepcopy(reference), config)
    peft.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        deep = load_adapter(tmp_path / "theirs", lm)
    tokens = torch.tensor(ONE)
    close(lm.logits(lm(lm.embed(tokens), deep())), peft(tokens).logits, 1e-4)


@pytest.mark.parametrize("clip, decay", [*product([1.0, 0.3], [0.0, 0.1])])
def test_five_steps_of_adafactor_are_the_references(clip, decay):
    """The reference factors every parameter that is no vector. So its unfactored second moment of
    a matrix is that of the matrix's entries in a row."""
    rng = seeded(0)
    start = [torch.randn(shape, generator=rng) * 0.1 for shape in [(6, 9), (2, 3, 4), (7,)]]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.flatten().clone()) for p in start]
    options = dict(lr=0.05, weight_decay=decay)
    mine = Adafactor(ours, clip=clip, **options)
    options |= dict(clip_threshold=clip, relative_step=False, scale_parameter=False)
    reference = transformers.Adafactor(theirs, **options)
    for step in range(5):
        for a, b in zip(ours, theirs):  # gradients that shrink, so that the second moment matters
            a.grad = torch.randn(a.shape, generator=rng) * 10.0**-step
            b.grad = a.grad.view_as(b).clone()
        mine.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start):
        close(a, b.view_as(a), 1e-6)
        assert not torch.equal(a, before)
