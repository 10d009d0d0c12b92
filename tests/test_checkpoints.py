"""Folders: what is written, what loads, and what is refused with which message.

That the reference implementations read the same in them is in test_parity.py.
"""

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import QUESTIONS, whole, words_tokenizer
from safetensors.torch import load_file, save_file
from test_encoders import make_bert, make_t5

from checkpoints import (
    atomic_write,
    config_to_hf,
    hash_checkpoint,
    load_tokenizer,
    read_config,
    resolve,
)
from model import LM

ROOT = Path(__file__).parent.parent


@pytest.fixture
def save(make_lm, tmp_path):
    """save(name in TINY, "bert" or "t5") -> the model, its folder, and the path of its tensors."""

    def save(config="tied"):
        folder = tmp_path / config
        if config in ("bert", "t5"):
            model = make_bert() if config == "bert" else make_t5()
            model.save(folder)
        else:
            model = make_lm(config)
            model.save(folder, tokenizer=words_tokenizer(model.config.vocab_size))
        return model, folder, folder / "model.safetensors"

    return save


def edit_config(folder, **changes):
    """Changes keys of config.json; "absent" removes one."""
    path = folder / "config.json"
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


# Reading and writing


@pytest.mark.parametrize("config", ["tied", "untied"])
def test_saved_and_loaded_is_the_same_lm(save, config):
    lm, folder, _ = save(config)
    again = LM.from_pretrained(folder)
    assert again.config == lm.config and again.folder == folder and equal(again, lm)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(whole(lm, QUESTIONS[0]), whole(again, QUESTIONS[0]))
    for path in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(path).encode("w3 w5").ids == [3, 5]
    assert [p.name for p in folder.parent.iterdir()] == [config]  # nothing unfinished
    for p in again.parameters():  # they are views of the file, which stays as it is
        p.add_(1.0)
    assert torch.equal(again.norm.weight, lm.norm.weight + 1)
    assert equal(LM.from_pretrained(folder), lm)


def test_save_refuses_existing_folder_unless_told_to_replace_it(make_lm, tmp_path):
    folder, one, two = tmp_path / "lm", make_lm(seed=0), make_lm(seed=1)
    one.save(folder)
    refused(FileExistsError, "lm exists; choose another folder", two.save, folder)
    assert hash_checkpoint(folder) == one.fingerprint() != two.fingerprint()
    two.save(folder, replace=True)
    assert hash_checkpoint(folder) == two.fingerprint() and list(tmp_path.iterdir()) == [folder]


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
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("factor", [1, 2])
def test_stored_tables_decide_whether_an_lm_is_tied(save, factor):
    """Some files hold a tied table twice. Two different ones are not tied, whatever config.json
    says; without them, nothing else is known."""
    lm, folder, file = save()
    tensors = load_file(file)
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    again = LM.from_pretrained(folder)
    assert again.config.tied == (factor == 1)
    assert torch.equal(whole(again, [3, 4]), factor * whole(lm, [3, 4]))
    file.unlink()
    assert read_config(folder)["tied"]


def test_keys_left_out_of_config_json_have_their_published_meaning(save):
    lm, folder, _ = save()
    rope = {"rope_type": "default", "rope_theta": 777.0}
    edit_config(folder, rope_theta="absent", rope_parameters=rope)
    fields = read_config(folder)
    assert (fields["rope_theta"], fields["bos"]) == (777.0, 1)
    left_out = "num_key_value_heads head_dim rms_norm_eps tie_word_embeddings rope_parameters"
    edit_config(folder, **dict.fromkeys([*left_out.split(), "bos_token_id"], "absent"))
    fields = read_config(folder)
    assert (fields["n_kv_heads"], fields["head_dim"], fields["bos"]) == (4, 32 // 4, None)
    assert (fields["norm_eps"], fields["tied"], fields["rope_theta"]) == (1e-6, False, 10_000.0)
    for eos, stored in (((), None), ((2,), 2), ((2, 5), [2, 5])):
        written = config_to_hf(vars(lm.config) | {"eos": eos}, torch.float32)
        assert written["eos_token_id"] == stored
        edit_config(folder, eos_token_id=stored)
        assert read_config(folder)["eos"] == eos


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
    outside = "outside the folder"
    places = [("../a", ValueError, outside), (str(tmp_path / "a"), ValueError, outside)]
    places += [("b", ValueError, f"b: lacks {first}"), ("c", FileNotFoundError, "names c, which")]
    for shard, error, message in places:
        write_index(**{first: shard})
        refused(error, message, hash_checkpoint, folder)
    for text in ("{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        refused(ValueError, "not a safetensors index", hash_checkpoint, folder)


def test_atomic_write_keeps_the_old_file_if_the_writer_fails(tmp_path):
    for before, after in (([], ["new"]), (["new"], ["newer"])):
        with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as path:
            path.write_text("half")
            raise RuntimeError("the disk is full")
        assert [p.read_text() for p in tmp_path.iterdir()] == before
        with atomic_write(tmp_path / "file") as path:
            path.write_text(after[0])
            assert [p.read_text() for p in tmp_path.glob("file")] == before
        assert [p.read_text() for p in tmp_path.iterdir()] == after


def test_tokenizer_neither_pads_nor_cuts_whatever_its_file_says(tmp_path):
    tokenizer = words_tokenizer(2)
    tokenizer.enable_padding(length=4)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, vocab_size=2)
    assert loaded.encode("w1").ids == [1] and loaded.encode("w1 " * 6).ids == [1] * 6
    message = "ids go up to 1, .* 1 rows: it belongs to another LM"
    refused(ValueError, message, load_tokenizer, tmp_path, 1)


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
learned | "scale_attn_weights": false | scale_attn_weights False is not supported
tied | "model_type": "mistral", "sliding_window": 0 | sliding_window is 0, not a positive
windows | "layer_types": ["full_attention", "full_attention", "chunked"] | layer_types .* is not sup
windows | "layer_types": ["full_attention"] | is not supported for 3 layers of qwen2
windows | "use_sliding_window": false | layer_types names sliding_attention, but
bert | "model_type": "t5" | model_type is not bert
bert | "hidden_size": 0 | hidden_size is 0
bert | "num_attention_heads": 3 | not a multiple
bert | "hidden_act": "relu" | 'relu' is not supported
t5 | "model_type": "bert" | model_type is neither t5 nor mt5
t5 | "d_kv": null | d_kv is None
t5 | "feed_forward_proj": "swish" | 'swish' is not supported
"""


@pytest.mark.parametrize("row", BAD_CONFIGS.strip().splitlines())
def test_config_that_is_not_supported_is_named(save, row):
    config, changes, message = row.split(" | ")
    model, folder, _ = save(config)
    edit_config(folder, **json.loads("{" + changes + "}"))
    refused(ValueError, f"config.json: .*{message}", type(model).from_pretrained, folder)


NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
C_ATTN = "transformer.h.2.attn.c_attn.weight"
QKV = "gpt_neox.layers.1.attention.query_key_value.bias"
BERT_Q = "encoder.layer.0.attention.self.query.weight"
T5_Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
BAD_TENSORS = [
    ("untied", NORM, None, f"missing: {NORM}"),
    ("untied", "layers.1", None, r"missing: model.layers.1.\S+, \S+, \S+ and 6 more"),
    ("untied", f"{Q}x", torch.zeros(3), f"unexpected: {Q}x"),
    ("untied", Q, torch.zeros(39, 24), rf"misshapen: {Q} is \(39, 24\), not \(40, 24\)"),
    ("untied", Q, torch.zeros(40, 24).to(torch.int8), f"{Q} is stored as int8; quantised"),
    ("learned", C_ATTN, torch.zeros(96, 32), r"misshapen: \S+ is \(96, 32\), not \(32, 96\)"),
    ("parallel", QKV, torch.zeros(95), rf"misshapen: {QKV} is \(95,\), not \(96,\)"),
    ("bert", "encoder.layer.1", None, "missing: encoder.layer.1"),
    ("bert", "encoder.x", torch.zeros(1), "unexpected: encoder.x"),
    ("bert", BERT_Q, torch.zeros(9, 16), f"misshapen: {BERT_Q}"),
    ("t5", "encoder.block.1", None, "missing: encoder.block.1"),
    ("t5", "encoder.x", torch.zeros(1), "unexpected: encoder.x"),
    ("t5", T5_Q, torch.zeros(9, 16), f"misshapen: {T5_Q}"),
]


@pytest.mark.parametrize("config, name, change, message", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named_as_published(save, config, name, change, message):
    """`change` replaces the tensor; None removes all whose names contain `name`."""
    model, folder, file = save(config)
    tensors = load_file(file)
    if change is None:
        tensors = {n: t for n, t in tensors.items() if name not in n}
    else:
        tensors[name] = change
    save_file(tensors, file)
    refused(ValueError, message, type(model).from_pretrained, folder)


def test_files_that_cannot_be_read_are_named(save, tmp_path):
    def lm_refused(error, message, path=None):
        refused(error, message, LM.from_pretrained, path or folder)

    _, folder, file = save()
    for end in (-100, 20, 0):
        file.write_bytes(file.read_bytes()[:end])
        lm_refused(ValueError, "model.safetensors: truncated or corrupt")
    file.unlink()
    lm_refused(FileNotFoundError, "no model.safetensors there")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    lm_refused(FileNotFoundError, "only .bin weights")
    for text, message in (("[1]", "holds a list"), ("{", "not valid JSON")):
        (folder / "config.json").write_text(text)
        lm_refused(ValueError, f"config.json: {message}")
    (folder / "config.json").unlink()
    lm_refused(FileNotFoundError, "no config.json")
    for path in (tmp_path / "nowhere", "./nowhere", "../no/where", folder / "nowhere"):
        lm_refused(FileNotFoundError, "no such checkpoint folder", path)
    refused(FileNotFoundError, "no such tokenizer file", load_tokenizer, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    refused(ValueError, "not a tokenizer.json", load_tokenizer, folder)


# The hub


def test_hub_id_downloads_config_tokenizer_and_safetensors_only(save, monkeypatch):
    _, folder, file = save()
    wanted = "model-00001-of-00002.safetensors tokenizer.json config.json merges.txt".split()
    unwanted = "pytorch_model.bin consolidated.safetensors tf_model.h5 README.md modeling.py"
    files, requests = [*wanted, *unwanted.split(), "onnx/config.json"], []

    def snapshot_download(name, revision, allow_patterns):
        requests.append((name, revision))
        assert [f for f in files if any(fnmatch(f, p) for p in allow_patterns)] == wanted
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert LM.from_pretrained("somebody/tiny").folder == folder
    assert resolve("somebody/tiny@step1000") == folder
    assert requests == [("somebody/tiny", None), ("somebody/tiny", "step1000")]
    file.unlink()
    message = "somebody/tiny: the repository has no model.safetensors"
    refused(FileNotFoundError, message, resolve, "somebody/tiny")


HUB_ERRORS = {
    "GatedRepoError": "it is gated: accept its terms at huggingface.co/somebody/tiny, then",
    "RepositoryNotFoundError": "the hub has no such repository",
    "RevisionNotFoundError": "it has no revision 'v9'",
    "LocalEntryNotFoundError": "the hub does not answer, and the local cache does not have",
    "OfflineModeIsEnabled": "OfflineModeIsEnabled",
}


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_what_the_hub_refuses_is_one_line(name, monkeypatch):
    def snapshot_download(*_, **__):
        error = getattr(huggingface_hub.errors, name)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = f"^somebody/tiny@v9: no such folder, and the download failed: {HUB_ERRORS[name]}"
    refused(FileNotFoundError, expected, resolve, "somebody/tiny@v9")
