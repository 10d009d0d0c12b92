"""Text of any size: its tokens in a file, found again, in little memory."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import ROOT

import corpus
import data
import pretrain
from corpus import hash_tokens, split, token_file

TEXTS = [f"Document {i} is about {'towns ' * (i % 7)}and people." for i in range(1000)]
TOKENIZER = data.train_tokenizer(TEXTS, 400)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return file


def equal(a, b):
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts)


def test_a_file_has_the_tokens_of_its_documents(tmp_path, text):
    expected = data.encode_texts(TEXTS, TOKENIZER)
    assert [len(e.ids) for e in map(TOKENIZER.encode, TEXTS)] == np.diff(expected.starts).tolist()
    stored = token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    assert isinstance(stored.tokens, np.memmap) and stored.tokens.dtype == np.uint16
    assert equal(stored, expected)
    for step in (0, 3):
        batches = [data.windows(c, 4, 16, 7, step) for c in (stored, expected)]
        assert batches[0].ids.equal(batches[1].ids)
    assert hash_tokens([stored]) == hash_tokens([expected])  # however they are stored


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_a_large_vocabulary_takes_four_bytes(tmp_path, text, monkeypatch, size, dtype):
    def encode(texts):
        return [SimpleNamespace(ids=[0, size - 1]) for _ in texts]

    tokenizer = SimpleNamespace(get_vocab=lambda: {"x": size - 1}, encode_batch_fast=encode)
    monkeypatch.setattr(corpus, "hash_tokenizer", lambda _: "")
    stored = token_file(text, tokenizer, None, tmp_path / "tokens")
    assert stored.tokens.dtype == dtype and stored.tokens.tolist() == [0, size - 1] * len(TEXTS)


def test_the_same_text_is_tokenised_once(tmp_path, text, monkeypatch):
    first = token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    copy = tmp_path / "copy.jsonl"  # the content counts, not the name
    copy.write_bytes(text.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_texts", None)
        assert equal(token_file(copy, TOKENIZER, 400, tmp_path / "tokens"), first)
    others = [(data.train_tokenizer(TEXTS, 300), 400), (TOKENIZER, 500)]
    for tokenizer, vocab_size in others:
        token_file(text, tokenizer, vocab_size, tmp_path / "tokens")
    with monkeypatch.context() as patch:
        patch.setattr(data, "LETTERS", 20)  # where long documents are cut counts too
        token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    text.write_text(text.read_text() + json.dumps({"text": "one more"}))
    assert len(token_file(text, TOKENIZER, 400, tmp_path / "tokens").starts) == len(TEXTS) + 2
    assert len(list((tmp_path / "tokens").iterdir())) == 2 * 5


def test_a_bad_text_leaves_nothing(tmp_path, text):
    text.write_text(text.read_text() + '{"text": 3}\n')
    with pytest.raises(ValueError, match="text.jsonl:1001"):
        token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    with pytest.raises(ValueError, match="outside the LM's vocabulary of 300"):
        list(data.encode_parts(TEXTS, TOKENIZER, 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]


def test_a_stopped_tokenisation_is_begun_again(tmp_path, text, monkeypatch):
    encode_parts = data.encode_parts

    def dies(*_):
        yield from encode_parts(TEXTS[:500], TOKENIZER)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_parts", dies)
        with pytest.raises(KeyboardInterrupt):
            token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    stored = token_file(text, TOKENIZER, 400, tmp_path / "tokens")
    assert len(stored.starts) == len(TEXTS) + 1


def test_a_split_is_the_last_documents():
    whole = data.encode_texts(TEXTS, TOKENIZER)
    parts = split(whole, 20)
    for part, texts in zip(parts, (TEXTS[:-20], TEXTS[-20:])):
        assert equal(part, data.encode_texts(texts, TOKENIZER))


MEASURE = """
import resource, sys
import corpus, data
from tokenizers import Tokenizer
def peak():  # in kilobytes
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
folder, tokenizer = sys.argv[1], Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
tokenizer.encode_batch_fast(["a text"] * 100)
before = peak()
text = corpus.token_file(folder + "/text.txt", tokenizer, None, folder + "/tokens")
for step in range(200):
    data.windows(text, 4, 64, 0, step)
print(len(text.tokens), peak() - before)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """3 MB of text: at once, they would take more than 300 MB while they are tokenised. The last
    third is one line, and the third before it is one document."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    with open(tmp_path / "text.txt", "w") as file:
        for i, end in enumerate(("\n\n", "\n", " ")):
            file.write(end.join(f"{i} {j} {text}" for j, text in enumerate(TEXTS * 25)) + "\n\n")
    assert (tmp_path / "text.txt").stat().st_size > 3e6
    command = [sys.executable, "-c", MEASURE, tmp_path]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tokens, kilobytes = map(int, out.splitlines()[-1].split())
    assert tokens > 8e5 and kilobytes < 30_000


def test_pretraining_keeps_the_tokens_beside_its_runs(tmp_path, text, capsys):
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:30]))
    flags = f"connector --train {text} --dev {text} --connector-layers 1 --seq-len 16"
    flags += " --batch-size 2 --steps 1 --device cpu --out"
    for name in ("a", "b"):
        pretrain.main([*flags.split(), str(tmp_path / "runs" / name)])
    out = capsys.readouterr().out
    assert out.count("tokenising") == 1 and out.count("its tokens are in") == 3
    assert len(list((tmp_path / "runs" / "tokens").iterdir())) == 2
