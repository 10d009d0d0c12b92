"""questions.py: files of questions, answers that a tokenizer and the limits let an LM give, shots.
(The commands that use them: test_answers.)"""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from conftest import TINY
from tiny_runs import ROOT, write_lines
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

import data
from questions import check_answers, check_targets, prepare, read_questions, read_shots

UNKNOWING = {
    "word": lambda: models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"),
    "wordpiece": lambda: models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>"),
    "bpe": lambda: models.BPE({"<unk>": 0, "a": 1, "\u2581": 2}, [], unk_token="<unk>"),
    "unigram": lambda: models.Unigram([("<unk>", 0.0), ("a", -1.0), ("\u2581", -1.0)], 0),
    "dropping": lambda: models.BPE({"<unk>": 0, "a": 1}, []),
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", UNKNOWING)
def test_a_target_that_no_answer_can_equal_is_named(kind, special):
    tokenizer = Tokenizer(UNKNOWING[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind in ("bpe", "unigram"):  # the space before a word is a token of its own
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    if special:
        tokenizer.add_special_tokens(["<unk>"])
    known = [data.Example("q", "a", ("a",)), data.Example("q", "b", ())]  # one without answers
    known.append(data.Example("q", "b", ("b",), options=("b", "a")))
    check_targets(tokenizer, known)
    for target in ("\u65e5", "\u65e5 \u672c", "a \u65e5", "\u65e5 a"):
        bad = data.Example("q", target, (target,), source="a.jsonl:7")
        message = f"^a.jsonl:7: the tokenizer has no tokens for the answer '{target}'"
        with pytest.raises(ValueError, match=message):
            check_targets(tokenizer, [*known, bad])
        with pytest.raises(ValueError, match=message):
            check_answers(tokenizer, [*known, bad], (), [""] * 4, 9)
        either = data.Example("q", target, (target, "a"), source="a.jsonl:8")
        check_answers(tokenizer, [either], (), [""], 9)  # one accepted answer can be given


TEXTS = [
    "Paris",
    "New York, the U.S.",
    "\u00c9mile Zola's caf\u00e9",
    "3.5 km/h (-5)",
    "don't a-b",
    "x  y",
]
TEXTS += [
    "e\u0301",
    "\ufb01ne \u00bd \u2460",
    "\u65e5\u672c",
    "one\ntwo\tthree",
    "\uff21\uff22",
    "\U0001f600 so",
    "#@&*",
]


def llama():
    """BPE in the manner of Llama 2 and stories260K: letters without a token become bytes."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [AddedToken(f"<0x{i:02X}>", normalized=False) for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["Paris in the U.S. and x y one two"] * 9, trainer)
    stored = json.loads(tokenizer.to_str())
    vocabulary = stored["model"]["vocab"]
    for token in bytes_:
        vocabulary[token.content] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(stored))


def unigram(form):
    letters = sorted({c for text in TEXTS for c in form.normalize_str(text)} - {" "})
    model = models.Unigram([("<unk>", 0.0), ("\u2581", -1.0)] + [(c, -2.0) for c in letters], 0)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = form, pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


SPELLING = {
    "bytes": lambda: data.train_tokenizer(["Paris"], 260),
    "llama": llama,
    "nfc": lambda: unigram(normalizers.NFC()),
    "nfkc": lambda: unigram(normalizers.NFKC()),
}


def examples(*texts, input="q"):
    rows = enumerate(texts, 1)
    return [data.Example(input, t, (t,), source=f"a.jsonl:{i}") for i, t in rows]


def warned(tokenizer, asked, stop="", limit=99, eos=()) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_answers(tokenizer, asked, eos, [stop] * len(asked), limit)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kind", SPELLING)
def test_what_a_tokenizer_normalises_is_not_refused(kind):
    tokenizer = SPELLING[kind]()
    check_targets(tokenizer, examples(*TEXTS))
    assert warned(tokenizer, examples(*TEXTS)) == []
    for accepted in (TEXTS, [*TEXTS, "Paris"]):  # one that can be given is enough
        e = data.Example("q", TEXTS[0], tuple(accepted[::-1]))
        assert warned(tokenizer, [e]) == []


@pytest.mark.parametrize("kind", ["bytes", "llama"])
@pytest.mark.parametrize("target", ["x{}y", "{}", "Paris {} Rome", "Paris {}"])
def test_a_target_with_a_special_token_is_named(kind, target):
    tokenizer = SPELLING[kind]()
    token = {"bytes": "<|endoftext|>", "llama": "</s>"}[kind]
    bad = examples("Paris", target.format(token))
    for check in (check_targets, warned):
        with pytest.raises(ValueError, match="^a.jsonl:2: the tokenizer has no tokens for the"):
            check(tokenizer, bad)


def test_a_target_with_an_end_token_is_named():
    """generation_config.json may name tokens that are no special ones."""
    tokenizer = data.train_tokenizer(["Paris"], 260)
    eos = (0, tokenizer.token_to_id("."))
    assert warned(tokenizer, examples("Paris", "Paris."), eos=eos) == []  # scores forgive the dot
    for check in (check_targets, lambda *rest: warned(*rest[:2], eos=rest[2])):
        with pytest.raises(ValueError, match="^a.jsonl:2: the tokenizer has no tokens for"):
            check(tokenizer, examples("Paris", "U.S."), eos)


@pytest.mark.parametrize(
    "target, stop, refused",
    [
        ("one\ntwo", "\n", True),
        ("one\ntwo", "", False),
        ("Q: a", "Q:", True),
        ("U.S. Army", ".", True),
        ("Paris.", ".", False),  # cut to Paris, which the scores accept
        ("a ### b", "###", True),
        ("Paris", "Paris", True),
        ("the", "e", True),
        ("one two", " ", True),
        ("one", " ", False),  # the space before it is no stop
    ],
)
def test_an_answer_that_holds_the_stop_is_named(target, stop, refused):
    tokenizer = data.train_tokenizer(["Paris one two"], 280)
    asked = examples("ok", target, input=data.question_text("who"))
    check_targets(tokenizer, asked)  # it may be taught: nothing is cut there
    if refused:
        with pytest.raises(ValueError, match="^a.jsonl:2: the answer .*; --stop sets another end"):
            warned(tokenizer, asked, stop)
    else:
        assert warned(tokenizer, asked, stop) == []
    either = data.Example("q", target, (target, "ok"))
    choice = data.Example("q", target, (target,), options=(target, "ok"))
    assert warned(tokenizer, [either, choice], stop) == []


def test_answers_longer_than_the_limit_are_counted():
    tokenizer, texts = data.train_tokenizer(["x"], 257), ["abc", "abcde", "abcd.", "abcdef"]
    for limit, count, first in ((9, 0, 0), (5, 1, 4), (4, 2, 2), (3, 3, 2), (2, 4, 1)):
        lines = warned(tokenizer, examples(*texts), limit=limit)
        expected = f"{count} of 4 questions cannot be scored as right: their answers have more than"
        expected += f" --max-new-tokens {limit} tokens (first: a.jsonl:{first})"
        assert lines == ([expected] if count else []), (limit, lines)


@pytest.mark.parametrize("text", ["a <pad>", "word", "<pad>"])
def test_a_question_with_an_added_token_that_the_lm_lacks_is_named(make_lm, text):
    tokenizer = data.train_tokenizer(["Paris"], 257)
    lm = make_lm(replace(TINY["tied"], vocab_size=tokenizer.get_vocab_size()))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.add_tokens(["word"])
    (good,) = examples("a", input="who")
    prepare(lm, tokenizer, [good], max_new_tokens=2)
    for options in ((), ("a", "b")):
        bad = replace(good, input=text, source="a.jsonl:2", options=options)
        with pytest.raises(ValueError, match="^a.jsonl:2: the token .*, outside the LM's vocab"):
            prepare(lm, tokenizer, [good, bad], max_new_tokens=2)


# Files

JSON = '{"question": "who"}\n{"input": "It is"}\n'


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize(
    "name", ["q.jsonl", "q.JSONL", "q.Json", "q.NDJSON", "q", "q.txt", "q.TXT"]
)
def test_a_file_of_questions_is_json_by_its_name_or_its_first_line(tmp_path, name, mark):
    (tmp_path / name).write_text(mark + JSON, encoding="utf-8")
    inputs = [e.input for e in read_questions(tmp_path / name)]
    as_json = [data.question_text("who"), "It is"]
    as_text = [data.question_text(line) for line in JSON.splitlines()]
    assert inputs == (as_text if name.lower().endswith("txt") else as_json)


@pytest.mark.parametrize("line", ["who", "{x} is what", "[1]", "{", "3", '"who"', "{}}"])
def test_a_nameless_file_whose_first_line_is_no_json_object_is_text(tmp_path, line):
    (tmp_path / "q").write_text(f"{line}\nwho\n")
    assert [e.id for e in read_questions(tmp_path / "q", False)] == [line, "who"]


@pytest.mark.parametrize("text", [JSON, "who\nIt is\n"])
def test_questions_come_from_standard_input(text):
    code = "import questions; print([e.id for e in questions.read_questions('/dev/stdin')])"
    call = [sys.executable, "-c", code]
    result = subprocess.run(call, input=text, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "['who', 'It is']\n", result.stderr


@pytest.mark.parametrize(
    "asked, shot",
    [
        ("It was", "It was "),
        ("It was", "it  WAS"),
        ("It\nwas", "It was"),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01ne", "fine"),
        (data.question_text("who"), data.question_text("Who ??")),
    ],
)
def test_an_example_is_no_shot_before_itself(tmp_path, asked, shot):
    rows = [{"input": text, "target": "a"} for text in (asked, shot, "1+1=", "11")]
    path = write_lines(tmp_path / "shots.jsonl", rows)
    for text in (asked, shot):
        found = read_shots(path, 2, 0, examples("a", input=text))
        assert [e.input for e in found] == ["1+1=", "11"]
        with pytest.raises(ValueError, match="2 examples that are not asked, fewer than 3"):
            read_shots(path, 3, 0, examples("a", input=text))
    assert len(read_shots(path, 3, 0, examples("a", input="1+1="))) == 3
