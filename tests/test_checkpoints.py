"""Folders: what is written, what loads and what is refused. test_parity.py has transformers'."""

import json
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import QUESTIONS, TINY, whole, words_tokenizer
from safetensors.torch import load_file, save_file
from test_encoders import make_bert, make_t5
from tokenizers.processors import TemplateProcessing

import checkpoints
from checkpoints import hash_checkpoint, load_tokenizer, read_config, resolve
from model import LM


@pytest.fixture
def save(make_lm, tmp_path):
    """save(name in TINY, "bert" or "t5") -> the model, its folder, and the path of its tensors."""

    def save(config="tied"):
        encoders = {"bert": make_bert, "t5": make_t5}
        model, folder = encoders.get(config, partial(make_lm, config))(), tmp_path / config
        model.save(folder)
        return model, folder, folder / "model.safetensors"

    return save


def edit_config(folder, file="config.json", /, **changes):
    """Changes keys of a JSON file; "absent" removes one."""
    path = folder / file
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def equal(a, b):
    """All parameters of two models are the same, in name and value."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(error, message, call, *arguments):
    """The error's one line matches `message`."""
    with pytest.raises(error, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["tied", "untied"])
def test_saved_and_loaded_is_the_same_lm(make_lm, tmp_path, config):
    lm, folder = make_lm(config), tmp_path / config
    lm.save(folder, tokenizer=words_tokenizer(lm.config.vocab_size))
    again = LM.from_pretrained(folder)
    assert again.config == lm.config and again.folder == folder and equal(again, lm)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(whole(lm, QUESTIONS[0]), whole(again, QUESTIONS[0]))
    for path in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(path).encode("w3 w5").ids == [3, 5]
    assert list(tmp_path.iterdir()) == [folder]  # nothing unfinished
    for p in again.parameters():  # they are views of the file, which stays as it is
        p.add_(1.0)
    assert torch.equal(again.norm.weight, lm.norm.weight + 1)
    assert equal(LM.from_pretrained(folder), lm)


def test_save_refuses_existing_folder_unless_told_to_replace_it(save, make_lm):
    (one, folder, _), two = save(), make_lm(seed=1)
    refused(FileExistsError, "tied exists; choose another folder", two.save, folder)
    assert hash_checkpoint(folder) == one.fingerprint() != two.fingerprint()
    two.save(folder, replace=True)
    assert hash_checkpoint(folder) == two.fingerprint() and [*folder.parent.iterdir()] == [folder]


def test_dtype_is_kept_or_converted_as_asked_and_the_fingerprint_is_the_files(make_lm, tmp_path):
    lm, folder = make_lm(), tmp_path / "half"
    lm.save(folder, dtype=torch.float16)
    for dtype in (None, torch.bfloat16, torch.float32):
        loaded, held = LM.from_pretrained(folder, dtype=dtype), dtype or torch.float16
        assert {(p.dtype, p.is_meta) for p in loaded.parameters()} == {(held, False)}
        assert torch.equal(loaded.norm.weight, lm.norm.weight.half().to(held))
        assert whole(loaded, [3, 4]).dtype == torch.float32
        assert loaded.fingerprint() == hash_checkpoint(folder) != lm.fingerprint()
    lm.save(tmp_path / "single")
    before = lm.fingerprint()
    assert before == hash_checkpoint(tmp_path / "single")
    lm.layers[1].self_attn.v_proj.weight.data[0, 0] += 1e-3
    assert lm.fingerprint() != before


def test_loading_imports_no_compiler(save):
    """It would take longer than everything else that a short command does."""
    folders = [str(save(config)[1]) for config in ("untied", "learned", "parallel")]
    code = f"""import sys
from model import LM
for lm in map(LM.from_pretrained, {folders}):
    lm(lm.embed_tokens.weight[None, :4])
print("torch._dynamo" in sys.modules)"""
    folder = Path(checkpoints.__file__).parent
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True).stdout
    assert printed == b"False\n"


@pytest.mark.parametrize("factor", [1, 2])
def test_stored_tables_decide_whether_an_lm_is_tied(save, factor):
    """Some files hold a tied table twice. Two different ones are not tied, whatever config.json
    says; without them, nothing else is known."""
    lm, folder, file = save()
    save_file(load_file(file) | {"lm_head.weight": factor * lm.embed_tokens.weight}, file)
    again = LM.from_pretrained(folder)
    assert again.config.tied == (factor == 1)
    assert torch.equal(whole(again, [3, 4]), factor * whole(lm, [3, 4]))
    file.unlink()
    assert read_config(folder)["tied"]


def test_keys_left_out_of_config_json_have_their_published_meaning(save):
    lm, folder, _ = save()
    rope = {"rope_type": "default", "rope_theta": 777.0}
    edit_config(folder, rope_theta="absent", rope_parameters=rope)
    assert read_config(folder)["rope_theta"] == 777.0
    left_out = "num_key_value_heads head_dim rms_norm_eps tie_word_embeddings rope_parameters"
    edit_config(folder, **dict.fromkeys([*left_out.split(), "bos_token_id"], "absent"))
    fields = read_config(folder)
    assert (fields["n_kv_heads"], fields["head_dim"], fields["bos"]) == (4, 32 // 4, None)
    assert (fields["norm_eps"], fields["tied"], fields["rope_theta"]) == (1e-6, False, 10_000.0)
    for eos, stored in (((), None), ((2,), 2), ((2, 5), [2, 5])):
        written = checkpoints.config_to_hf(vars(lm.config) | {"eos": eos}, torch.float32)
        assert written["eos_token_id"] == stored
        edit_config(folder, eos_token_id=stored)
        assert read_config(folder)["eos"] == eos


HEADS = [  # a tied LM, and the published names of its table and its head
    (TINY["tied"], "model.embed_tokens", "lm_head"),
    (TINY["learned"], "transformer.wte", "lm_head"),
    (replace(TINY["parallel"], tied=True), "gpt_neox.embed_in", "embed_out"),
    (replace(TINY["parallel"], tied=True), "gpt_neox.embed_in", "lm_head"),
    (replace(TINY["post_norm"], tied=True), "model.embed_tokens", "lm_head"),
]


@pytest.mark.parametrize("config, table, head", HEADS)
def test_tied_table_may_be_stored_as_the_head_alone(make_lm, tmp_path, config, table, head):
    lm, folder = make_lm(config), tmp_path / "lm"
    lm.save(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{head}.weight"] = tensors.pop(f"{table}.weight")
    save_file(tensors, folder / "model.safetensors")
    again = LM.from_pretrained(folder)
    assert again.config.tied and equal(again, lm) and again.lm_head is None
    assert again.fingerprint() == hash_checkpoint(folder)
    edit_config(folder, tie_word_embeddings=False)  # the embeddings are then really missing
    refused(ValueError, f"missing: {table}.weight", LM.from_pretrained, folder)


# eos_token_id of config.json and of generation_config.json, and what then ends a text
ENDS = [
    (2, [2, 25], (2, 25)),
    (25, [2, 7, 25], (25, 2, 7)),
    ([5, 3], [3, 9, 5, 9], (5, 3, 9)),
    (2, 7, (7,)),
    ("absent", 7, (7,)),
    (None, [7], (7,)),
    (-1, [2, 7], (2, 7)),
    ("absent", [66, 0], (66, 0)),
    ("absent", "absent", (2,)),
    ("absent", None, (2,)),
    (5, None, (5,)),
    ([5, 5], "absent", (5,)),
    (None, "absent", ()),
]


@pytest.mark.parametrize("config, generation, ends", ENDS)
def test_end_tokens_are_read_where_the_reference_reads_them(save, config, generation, ends):
    _, folder, _ = save()
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    edit_config(folder, "generation_config.json", eos_token_id=generation)
    edit_config(folder, eos_token_id=config)
    assert read_config(folder)["eos"] == ends


@pytest.mark.parametrize("eos", [-1, 67, [2, 50256], [2, None], "2", 2.0, True])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_token_outside_the_vocabulary_is_named_with_its_file(save, eos, file):
    _, folder, _ = save()
    (folder / "generation_config.json").write_text("{}")
    edit_config(folder, file, eos_token_id=eos)
    bad = eos[-1] if isinstance(eos, list) else eos
    message = f"/{file}: eos_token_id is {bad!r}, not an id from 0 to 66"
    refused(ValueError, message, LM.from_pretrained, folder)


def test_shards_load_and_their_index_is_checked(save, tmp_path):
    lm, folder, file = save("untied")
    tensors, index = load_file(file), folder / "model.safetensors.index.json"
    shards = {name: "ab"[i % 2] for i, name in enumerate(sorted(tensors))}
    first = min(shards)

    def write_index(**changes):
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards | changes}))

    write_index()
    file.unlink()
    for shard in "ab":
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    again = LM.from_pretrained(folder)
    assert equal(again, lm) and again.fingerprint() == lm.fingerprint()
    (folder / "a").rename(tmp_path / "a")
    (folder / "a").symlink_to(tmp_path / "a")  # the hub's cache holds links to files elsewhere
    assert hash_checkpoint(folder) == lm.fingerprint()
    places = [("b", ValueError, f"b: lacks {first}")]
    for path in ("c", "../a", "x/../../a", str(tmp_path / "a")):  # a is there
        places.append((path, FileNotFoundError, f"names {path[-1]}, which is not in its folder"))
    for shard, error, message in places:
        write_index(**{first: shard})
        refused(error, message, hash_checkpoint, folder)
    for text in ("{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        refused(ValueError, "not a safetensors index", hash_checkpoint, folder)


def test_atomic_write_keeps_the_old_file_if_the_writer_fails(tmp_path):
    for before, after in (([], ["new"]), (["new"], ["newer"])):
        with pytest.raises(RuntimeError), checkpoints.atomic_write(tmp_path / "file") as path:
            path.write_text("half")
            raise RuntimeError("the disk is full")
        assert [p.read_text() for p in tmp_path.iterdir()] == before
        with checkpoints.atomic_write(tmp_path / "file") as path:
            path.write_text(after[0])
            assert [p.read_text() for p in tmp_path.glob("file")] == before
        assert [p.read_text() for p in tmp_path.iterdir()] == after
    nowhere, tensors = tmp_path / "nowhere" / "file", {"x": torch.zeros(2)}
    refused(OSError, "nowhere/file: cannot be written", checkpoints.write_tensors, nowhere, tensors)


def test_tokenizer_neither_pads_nor_cuts_whatever_its_file_says(tmp_path):
    tokenizer = words_tokenizer(2)
    tokenizer.enable_padding(length=4)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, vocab_size=2)
    assert loaded.encode("w1").ids == [1] and loaded.encode("w1 " * 6).ids == [1] * 6


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("names", [["<pad>"], ["<pad>", "<mask>", "<extra_id_0>"], ["[PAD]", "w9"]])
def test_tokenizer_of_another_lm_is_refused_but_unused_added_tokens_are_not(
    tmp_path, names, special
):
    """Many published LMs have a <pad> for which nobody added a row to the table."""
    tokenizer, message = words_tokenizer(9), "ids go up to {}, .* {} rows: it belongs to another LM"
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add(names)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    last = 8 + len(names)
    for size in range(9, last + 2):
        assert load_tokenizer(tmp_path, size).encode(f"w1 {names[-1]}").ids == [1, last]
    for size in (8, 1):
        refused(ValueError, message.format(8, size), load_tokenizer, tmp_path, size)
    single = TemplateProcessing(single=f"{names[-1]} $A", special_tokens=[(names[-1], last)])
    tokenizer.post_processor = single  # every text has the token, as Llama 3's have their BOS
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    refused(ValueError, message.format(last, last), load_tokenizer, tmp_path, last)
    assert load_tokenizer(tmp_path, last + 1).encode("w1").ids == [last, 1]


END_TOKENS = ["w3", {"content": "w3", "__type": "AddedToken"}, "<end>", {"content": "<end>"}]


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("named", [*END_TOKENS, None, "<nowhere>"])
def test_end_token_that_the_settings_name_is_not_part_of_an_answer(tmp_path, named, added):
    tokenizer = words_tokenizer(5)
    tokenizer.add_tokens(["w3", "<end>"] if added else ["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    loaded = load_tokenizer(tmp_path, 6)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = named["content"] if isinstance(named, dict) else named
    kept = [token for token in ("w1", "w3", "<end>") if token != text]
    assert loaded.decode([1, 3, 5]) == " ".join(kept)


# Refusals

# the model | what changes in its config.json | the message, a regular expression
BAD_CONFIGS = r"""
tied | "model_type": "mamba" | model_type 'mamba' is not supported; supported: llama
tied | "model_type": ["llama"] | model_type \['llama'\] is not supported
tied | "model_type": "gpt2" | the key 'n_embd' is missing
tied | "hidden_size": "absent" | the key 'hidden_size' is missing
tied | "hidden_size": "192" | hidden_size is '192', not a positive whole number
tied | "max_position_embeddings": "absent" | the key 'max_position_embeddings' is missing
tied | "vocab_size": 0 | vocab_size is 0
tied | "num_hidden_layers": 2.0 | num_hidden_layers is 2.0
tied | "head_dim": -8 | head_dim is -8
tied | "head_dim": 7 | of a head's 7 channels 7 would be rotated
tied | "num_key_value_heads": 3 | 4 heads of width .* share 3
tied | "eos_token_id": "</s>" | eos_token_id
tied | "rms_norm_eps": "small" | rms_norm_eps is 'small', not a number
tied | "attention_bias": "false" | attention_bias is 'false', not true or false
tied | "hidden_act": "quick_gelu" | hidden_act 'quick_gelu' is not supported; supported: silu, gelu
tied | "quantization_config": {"bits": 4} | quantization_config .* is not supported
tied | "rope_theta": "far" | rope_theta is 'far', not a positive number
tied | "rope_scaling": [1] | rope_scaling \[1\] is not an object
tied | "rope_scaling": {"type": "linear"} | factor is None, not a positive number
tied | "rope_scaling": {"type": "linear", "factor": 0} | factor is 0, not a positive number
tied | "rope_scaling": {"rope_type": "llama3", "factor": 8} | low_freq_factor is None, not a
tied | "rope_scaling": {"type": "dynamic"} | 'dynamic' is not supported; supported: default, lin
tied | "rope_parameters": {"rope_type": "yarn"} | rope type 'yarn' is not supported
tied | "rope_parameters": {"full": {"rope_type": "default"}} | their own for full are not supported
tied | "partial_rotary_factor": 0.5 | partial_rotary_factor 0.5 is not supported for llama
parallel | "rotary_pct": 1.5 | partial_rotary_factor 1.5 is not supported
parallel | "rotary_pct": 0.01 | of a head's 8 channels 0 would be rotated
learned | "eos_token_id": 50256 | eos_token_id is 50256, not an id from 0 to 66
learned | "scale_attn_weights": false | scale_attn_weights False is not supported
tied | "model_type": "mistral", "sliding_window": 0 | sliding_window is 0, not a positive
windows | "layer_types": ["full_attention", "full_attention", "chunked"] | layer_types .* is not sup
windows | "layer_types": ["full_attention"] | is not supported for 3 layers of qwen2
windows | "layer_types": 3 | layer_types 3 is not supported for 3 layers of qwen2
windows | "layer_types": [[], [], []] | layer_types .* is not supported
windows | "layer_types": null, "max_window_layers": "all" | max_window_layers is 'all', not a whole
windows | "use_sliding_window": false | layer_types names sliding_attention, but
bert | "model_type": "t5" | model_type is neither bert nor dpr
bert | "quantization_config": {"bits": 8} | quantization_config .* is not supported
bert | "compression_config": {} | compression_config {} is not supported
bert | "hidden_size": 0 | hidden_size is 0
bert | "num_attention_heads": 3 | not a multiple
bert | "hidden_act": "relu" | 'relu' is not supported
t5 | "model_type": "bert" | model_type is neither t5 nor mt5
t5 | "quantization_config": {"quant_method": "gptq"} | quantization_config .* is not supported
t5 | "d_kv": null | d_kv is None
t5 | "feed_forward_proj": "swish" | 'swish' is not supported
"""


@pytest.mark.parametrize("row", BAD_CONFIGS.strip().splitlines())
def test_config_that_is_not_supported_is_named(save, row):
    config, changes, message = row.split(" | ")
    model, folder, _ = save(config)
    edit_config(folder, **json.loads("{" + changes + "}"))
    refused(ValueError, f"config.json: .*{message}", type(model).from_pretrained, folder)


# the model | a tensor | its new shape, null: those with this in their names are removed | message
BAD_TENSORS = r"""
untied | model.norm.weight | null | missing: NAME
untied | layers.1 | null | missing: model.layers.1.\S+, \S+, \S+ and 6 more
untied | model.layers.1.x | [3] | unexpected: NAME
untied | model.layers.1.self_attn.q_proj.weight | [39, 24] | NAME is \(39, 24\), not \(40, 24\)
learned | transformer.h.2.attn.c_attn.weight | [96, 32] | NAME is \(96, 32\), not \(32, 96\)
parallel | gpt_neox.layers.1.attention.query_key_value.bias | [95] | misshapen: NAME is \(95,\)
bert | encoder.layer.1 | null | missing: NAME
bert | encoder.x | [1] | unexpected: NAME
bert | encoder.layer.0.attention.self.query.weight | [9, 16] | misshapen: NAME is \(9, 16\)
t5 | encoder.block.1 | null | missing: NAME
t5 | encoder.x | [1] | unexpected: NAME
t5 | encoder.block.0.layer.0.SelfAttention.q.weight | [9, 16] | misshapen: NAME is \(9, 16\)
"""


@pytest.mark.parametrize("row", BAD_TENSORS.strip().splitlines())
def test_tensors_that_do_not_fit_are_named_as_published(save, row):
    config, name, shape, message = row.split(" | ")
    model, folder, file = save(config)
    tensors = load_file(file)
    if shape == "null":
        tensors = {n: t for n, t in tensors.items() if name not in n}
    else:
        tensors[name] = torch.zeros(json.loads(shape))
    save_file(tensors, file)
    refused(ValueError, message.replace("NAME", name), type(model).from_pretrained, folder)


QUANTISED = [
    ("untied", "model.layers.1.self_attn.q_proj.weight"),
    ("parallel", "gpt_neox.layers.0.attention.query_key_value.bias"),
    ("bert", "encoder.layer.1.intermediate.dense.weight"),
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
]


@pytest.mark.parametrize("config, name", QUANTISED)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "int32"])
def test_quantised_weights_are_refused_and_not_cast(save, config, name, dtype):
    model, folder, file = save(config)
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(getattr(torch, dtype))}, file)
    message = f"{name} is stored as {dtype}; quantised checkpoints are not supported"
    refused(ValueError, message, type(model).from_pretrained, folder)


def test_files_that_cannot_be_read_are_named(save, tmp_path, monkeypatch):
    _, folder, file = save()
    for end in (-100, 20, 0):
        file.write_bytes(file.read_bytes()[:end])
        refused(ValueError, "model.safetensors: truncated or corrupt", LM.from_pretrained, folder)
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [b"{}", json.dumps({"a": whole, "b": whole | {"data_offsets": [4, 12]}}).encode()]
    for header, length in zip(headers, (2**62, len(headers[1]))):  # a huge one; overlapping tensors
        file.write_bytes(length.to_bytes(8, "little") + header + bytes(12))
        refused(ValueError, "model.safetensors: truncated or corrupt", LM.from_pretrained, folder)
    file.unlink()
    refused(FileNotFoundError, "no model.safetensors there", LM.from_pretrained, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(FileNotFoundError, "only .bin weights", LM.from_pretrained, folder)
    for text, message in (("[1]", "holds a list"), ("{", "not valid JSON")):
        (folder / "config.json").write_text(text)
        refused(ValueError, f"config.json: {message}", LM.from_pretrained, folder)
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "no config.json", LM.from_pretrained, folder)
    monkeypatch.chdir(tmp_path)  # tied/nowhere could be a hub id, but the folder tied exists
    for path in ("./nowhere", "./no/where", "../no/where", folder / "nowhere", "tied/nowhere"):
        refused(FileNotFoundError, "no such checkpoint folder", LM.from_pretrained, path)


NO_FILE, QWEN = FileNotFoundError, '{"tokenizer_class": "Qwen2Tokenizer"}'
BPE = {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": ""}
BAD_TOKENIZERS = [
    ({}, NO_FILE, "tokenizer.json: no such tokenizer file"),
    ({"tokenizer.model": ""}, NO_FILE, "a SentencePiece tokenizer.model is not read"),
    ({"tokenizer.json": "{}"}, ValueError, "not a tokenizer.json"),
    ({"vocab.json": "{}"}, NO_FILE, "merges.txt: missing"),
    (BPE | {"vocab.json": "{"}, ValueError, "not a vocab.json"),
    (BPE | {"tokenizer_config.json": QWEN}, ValueError, "a Qwen2Tokenizer is read from its token"),
    (BPE, ValueError, "vocab.json: the tokenizer's ids go up to 1, the LM's .* has 1 rows: it bel"),
    ({"vocab.txt": "a\nb\n"}, ValueError, "vocab.txt: not BERT's vocabulary"),
]


@pytest.mark.parametrize("files, error, message", BAD_TOKENIZERS)
def test_tokenizer_files_that_cannot_be_used_are_named(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    refused(error, message, load_tokenizer, tmp_path, 1)


# The hub


def test_hub_id_downloads_config_tokenizer_and_safetensors_only(save, monkeypatch):
    _, folder, file = save()
    wanted = "model-00001-of-00002.safetensors tokenizer.json config.json merges.txt vocab.json "
    wanted += "model.safetensors.index.json vocab.txt model.safetensors "
    wanted = [*wanted.split(), "generation_config.json", "tokenizer_config.json"]
    unwanted = "pytorch_model.bin consolidated.safetensors tf_model.h5 README.md modeling.py"
    files, requests = [*wanted, *unwanted.split(), "onnx/config.json"], []

    def snapshot_download(name, revision, allow_patterns):
        requests.append((name, revision))
        assert [f for f in files if any(fnmatch(f, p) for p in allow_patterns)] == wanted
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert LM.from_pretrained("somebody/tiny").folder == folder == resolve("somebody/tiny@step1000")
    assert requests == [("somebody/tiny", None), ("somebody/tiny", "step1000")]
    file.unlink()
    refused(FileNotFoundError, "repository has no model.safetensors", resolve, "somebody/tiny")


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise RuntimeError("401\n\nlog in")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = "^somebody/tiny@v9: no such folder; the download failed: RuntimeError 401 log in"
    refused(FileNotFoundError, expected, resolve, "somebody/tiny@v9")
