"""Against the reference implementations, on tiny random weights: transformers' Llama, tokenizers, T5 encoder and BERT, and PEFT's prompt tuning."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from adapters import SoftPrompt, T5Encoder, load_adapter, save_adapter
from model import LM, generate, load_tokenizer, pad, published_config
from rerank import Bert, segments

QUESTIONS = [[5, 9, 11, 4, 30, 8], [7, 9], [6, 3, 44, 20], [12, 13, 14, 15, 16, 17, 18, 19]]

CASES = {  # what differs from the reference's defaults, in its own words
    "grouped heads, head_dim explicit, tied": dict(
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "grouped heads, untied, far theta": dict(
        num_key_value_heads=2, tie_word_embeddings=False, rope_theta=500_000.0
    ),
    "one key head, head_dim explicit, untied": dict(
        num_key_value_heads=1, head_dim=6, tie_word_embeddings=False
    ),
    "as many key heads, tied": dict(
        num_key_value_heads=4, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
}


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def pair(folder, case):
    """A reference model with random weights, and the LM that reads the folder it saved."""
    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(**shape | CASES[case], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.normal_(0, 0.25).add_(1.0 if p.dim() == 1 else 0.0)
    reference.save_pretrained(folder)
    return reference, LM.from_pretrained(folder)


@pytest.fixture(params=CASES)
def both(request, tmp_path):
    return pair(tmp_path / "reference", request.param)


@torch.no_grad()
def test_logits_equal_the_references(both):
    reference, lm = both
    tokens = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(1))
    theirs = reference(tokens)
    close(lm.logits(lm(lm.embed(tokens))), theirs.logits)
    assert theirs.logits.std() > 0.3
    cached = lm(lm.embed(tokens[:, 25:]), lm.read(lm.embed(tokens[:, :25])))
    close(lm.logits(cached), theirs.logits[:, 25:])


@torch.no_grad()
def test_greedy_tokens_equal_the_references(both):
    reference, lm = both
    alone = [
        reference.generate(
            torch.tensor([ids]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in QUESTIONS
    ]
    T = max(map(len, QUESTIONS))
    left = torch.tensor(
        [[0] * (T - len(ids)) + ids for ids in QUESTIONS]
    )  # the reference wants its padding on the left, and a mask
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in QUESTIONS])
    batched = reference.generate(
        left,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, T:].tolist()
    assert [row[0].ids for row in generate(lm, QUESTIONS, None, 20)] == alone == batched
    assert len(set(map(tuple, alone))) == len(alone)


@torch.no_grad()
def test_folder_that_we_save_loads_in_the_reference(both, tmp_path):
    reference, lm = both
    lm.save(tmp_path / "ours")
    again, problems = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(
        problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    tokens = torch.tensor([QUESTIONS[3]])
    assert torch.equal(again(tokens).logits, reference(tokens).logits)
    assert again.config.eos_token_id == 2 and again.config.max_position_embeddings == 64
    several = published_config(replace(lm.config, eos=(2, 5)), torch.float32)
    assert several["eos_token_id"] == [2, 5]


# --- Tokenizers ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "The hats' owner, José, can't (or won't) pay  $12.50!",
    " leading, trailing ",
    "",
    "\n\nnew\tlines 新しい naïve ☺",
    "<|endoftext|>x <|endoftext|>",
    "[MASK] [SEP]he",
]


def byte_level_bpe(folder, **settings):
    """A folder with vocab.json and merges.txt, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder.mkdir()
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"} | settings)
    )
    return folder


def word_pieces(folder, **settings):
    """A folder with vocab.txt, as BERT's."""
    folder.mkdir()
    pieces = [*"abcdefghijklmnopqrstuvwxyzJThe0125.,!$'()新し", "the", "hat", "own", "Jo", "na"]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *dict.fromkeys(pieces),
        *(f"##{p}" for p in dict.fromkeys(pieces)),
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"} | settings)
    )
    return folder


@pytest.mark.parametrize(
    "make, reference, settings",
    [
        (byte_level_bpe, GPT2Tokenizer, {}),
        (byte_level_bpe, GPT2Tokenizer, {"add_prefix_space": True, "bos_token": "<|endoftext|>"}),
        (
            byte_level_bpe,
            GPT2Tokenizer,
            {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}},
        ),
        (word_pieces, BertTokenizer, {}),
        (word_pieces, BertTokenizer, {"do_lower_case": False}),
    ],
)
def test_tokenizers_of_several_files_equal_the_references(tmp_path, make, reference, settings):
    folder = make(tmp_path / "tokenizer", **settings)
    theirs, ours = reference.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, clean_up_tokenization_spaces=False
        )
    assert ours.get_vocab() == theirs.get_vocab()


def test_bos_in_front_where_the_settings_ask_for_it(tmp_path):
    bos = load_tokenizer(byte_level_bpe(tmp_path / "a")).token_to_id("<|endoftext|>")
    tokenizer = load_tokenizer(byte_level_bpe(tmp_path / "b", add_bos_token=True))
    assert tokenizer.encode("the hat").ids == [
        bos,
        *tokenizer.encode("the hat", add_special_tokens=False).ids,
    ]


def test_tokenizer_files_that_do_not_do_are_named(tmp_path):
    folder = byte_level_bpe(tmp_path / "a", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(
        ValueError,
        match="tokenizer_config.json: a Qwen2Tokenizer is read from its tokenizer.json only",
    ):
        load_tokenizer(folder)
    folder = byte_level_bpe(tmp_path / "b")
    with pytest.raises(
        ValueError,
        match="vocab.json: the tokenizer's ids go up to .*, the LM's embedding table has 100 rows",
    ):
        load_tokenizer(folder, vocab_size=100)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt: missing"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text("{")
    (folder / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="not a vocab.json"):
        load_tokenizer(folder)
    folder = word_pieces(tmp_path / "c")
    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="vocab.txt: not BERT's vocabulary"):
        load_tokenizer(folder)
    (folder / "vocab.txt").rename(folder / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="a SentencePiece tokenizer.model is not read"):
        load_tokenizer(folder)


# --- Encoders ------------------------------------------------------------------------------------------------------------


def saved(reference, folder, scale=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, scale)
    reference.eval().save_pretrained(folder)
    return reference


def texts(size):
    """Token ids (3, 40) of different lengths, the lengths, and the mask."""
    lengths = torch.tensor([40, 17, 1])
    return (
        torch.randint(size, (3, 40), generator=torch.Generator().manual_seed(1)),
        lengths,
        torch.arange(40) < lengths[:, None],
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [T5EncoderModel, T5ForConditionalGeneration])
@pytest.mark.parametrize("mlp", ["relu", "gated-gelu"])
def test_t5_encoder_equals_the_reference_and_goes_back(tmp_path, kind, mlp):
    shape = dict(
        vocab_size=50,
        d_model=24,
        d_kv=10,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj=mlp,
    )
    config = T5Config(
        **shape,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        tie_word_embeddings=mlp == "relu",
    )
    reference = saved(kind(config), tmp_path / "reference", 0.15)
    ids, lengths, mask = texts(50)
    encoder = T5Encoder.from_pretrained(tmp_path / "reference")
    theirs, ours = (
        reference.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state,
        encoder(encoder.embed(ids), lengths),
    )
    close(ours[mask], theirs[mask], 1e-5)
    vectors = torch.randn(3, 40, 24) * 0.3  # such as a prompt in front
    close(
        encoder(vectors, lengths)[mask],
        reference.get_encoder()(
            inputs_embeds=vectors, attention_mask=mask.long()
        ).last_hidden_state[mask],
        1e-5,
    )
    encoder.save(tmp_path / "ours")
    again, problems = T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(
        problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    close(
        again(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask], theirs[mask], 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_bert_equals_the_reference_and_goes_back(tmp_path, kind):
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=60,
    )
    reference = saved(kind(config), tmp_path / "reference")
    reference = getattr(reference, "bert", reference)
    ids, lengths, mask = texts(50)
    ids[:, 9] = 49
    types = segments(ids, 49)
    bert = Bert.from_pretrained(tmp_path / "reference")
    theirs = reference(
        input_ids=ids, attention_mask=mask.long(), token_type_ids=types
    ).last_hidden_state
    close(bert(ids, lengths, types)[mask], theirs[mask], 1e-5)
    assert (bert(ids, lengths) - bert(ids, lengths, types))[mask].abs().max() > 0.1
    bert.save(tmp_path / "ours")
    again = BertModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    close(
        again(input_ids=ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state[
            mask
        ],
        theirs[mask],
        1e-5,
    )


# --- PEFT ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompted(tmp_path):
    """PEFT's prompt-tuned model, our LM on the same weights, and the prompt's vectors (P, C)."""
    reference, lm = pair(tmp_path / "reference", "grouped heads, head_dim explicit, tied")
    model = get_peft_model(
        copy.deepcopy(reference), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    )
    vectors = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)) * 0.25
    model.prompt_encoder["default"].embedding.weight.data.copy_(vectors)
    return reference, model.eval(), lm, vectors


def ragged():
    """Tokens (B, T) padded on the right, their mask, and labels with -100 where nothing is predicted (padding)."""
    tokens, lengths = pad(QUESTIONS)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens, mask, tokens.masked_fill(~mask, -100)


def test_loss_and_prompt_gradient_equal_pefts(prompted):
    _, model, lm, vectors = prompted
    tokens, mask, labels = ragged()
    theirs = model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    theirs.backward()
    prompt = SoftPrompt(vectors)
    z = lm.logits(lm(lm.embed(tokens), lm.read(prompt())))
    # PEFT labels its P slots -100 and shifts the rest by one, so that the last slot predicts nothing but the first
    # token does: the logits of slot P - 1 have token 0 as their target.
    last = lm.logits(lm(prompt()[None]))[:, -1:].expand(len(tokens), -1, -1)
    ours = torch.nn.functional.cross_entropy(
        torch.cat([last, z[:, :-1]], 1).flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    ours.backward()
    close(ours, theirs, 1e-5)
    close(prompt.vectors.grad, model.prompt_encoder["default"].embedding.weight.grad, 1e-5)
    assert prompt.vectors.grad.abs().amax(1).min() > 1e-3


@torch.no_grad()
def test_prompt_that_we_save_loads_in_peft(prompted, tmp_path):
    reference, _, lm, vectors = prompted
    tokens, mask, _ = ragged()
    bare = reference(tokens, attention_mask=mask.long()).logits
    save_adapter(tmp_path / "prompt", SoftPrompt(vectors), lm, method="prompt_tuning")
    model = PeftModel.from_pretrained(reference, tmp_path / "prompt").eval()
    theirs, ours = (
        model(input_ids=tokens, attention_mask=mask.long()).logits[:, 7:],
        lm.logits(lm(lm.embed(tokens), lm.read(vectors))),
    )
    close(ours[mask], theirs[mask])
    assert (ours - bare)[mask].abs().max() > 0.1


@torch.no_grad()
def test_prompt_that_peft_saves_loads_here(prompted, tmp_path):
    _, model, lm, vectors = prompted
    model.save_pretrained(tmp_path / "prompt")
    assert "fingerprint" not in json.loads(
        (tmp_path / "prompt" / "adapter_config.json").read_text()
    )
    with pytest.warns(UserWarning, match="carries no fingerprint"):
        prompt = load_adapter(tmp_path / "prompt", lm)
    assert torch.equal(prompt.vectors, vectors)
