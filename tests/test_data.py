"""data.py: what files, tokens and batches hold, in which order, and which files are refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import data
import pretrain
import prompts
import questions
from data import IGNORE_INDEX, Example, TokenizedExample

SPECIAL = {"[CLS]": 90_000, "[SEP]": 90_001, "[MASK]": 90_002}
SENTINELS = [90_000 + i for i in range(32)]
TEXTS = ["Q: where was Anna born?\nA: Velmor", "Anna lives in Kranstad.", "Boris makes clocks."]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS * 30, 300)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return data.encode_texts(TEXTS * 30, tokenizer)


def write(path, *lines):
    """Write a file of lines: text as it is (bytes that are not UTF-8 as "\\udcXX"), or records."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in lines), "utf-8", "surrogateescape")
    return path


def test_a_line_of_100_megabytes_is_refused_in_one_short_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "who", "answer": ["x"]}, "x" * 10**8)
    with pytest.raises(ValueError, match=r"a.jsonl:2: not a line of JSON .{,60}$"):
        data.read(path)


def test_questions_and_inputs_are_read(tmp_path):
    question = {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"], "task": "books"}
    other = {"input": "1+1=", "target": "2", "id": 7}
    first, second = data.read(write(tmp_path / "a.jsonl", question, "", other))
    text, answers = "Q: who wrote emma?\nA:", ("Jane Austen", "Austen")
    assert first == Example(text, "Jane Austen", answers, "books", "a.jsonl:1", "a.jsonl:1")
    assert second == Example("1+1=", "2", ("2",), "", "7", "a.jsonl:3")


BAD_LINES = r"""
{
[1]
"text"
null
{}
{"question": "a"}
{"question": 1, "answer": ["b"]}
{"question": " ", "answer": ["b"]}
{"question": "a", "answer": []}
{"question": "a", "answer": [1]}
{"question": "a", "answer": [""]}
{"question": "a", "answer": {"b": 1}}
{"input": "a"}
{"target": "a"}
{"input": "a", "target": 3}
{"input": ["a"], "target": "b"}
{"input": "a", "target": "b", "answers": "b"}
{"inputs_pretokenized": "a", "targets_pretokenized": " "}
{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": "b"}
{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": ["c"]}
{"input": "half a pair: \uD83D", "target": "b"}
{"input": null, "target": "b"}
{"input": "a", "target": NaN, "answers": ["b"]}
{"question": "a", "answer": null, "target": "b"}
{"question": "a", "answer": ["b"], "answer_choices": ["c"]}
{"question": "a", "answer": ["b"], "answer_choices": "b"}
{"input": "a", "target": "b", "options": ["b", "c", "c"]}
{"input": "a", "target": "b", "options": [" b", "c", "b "]}
{"input": "a", "target": "b", "options": ["b", null]}
{"question": "a", "answer": ["b"], "options": ["b", "b\n"]}
{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": ["c", "b", "c\u2028"]}
{"input": "a", "target": "b", "answers": ["c"], "options": ["b", "c"]}
{"input": "a", "target": "b", "answers": ["b", "d"], "options": ["b", "c"]}
{"input": "a", "target": "d", "answers": ["b"], "options": ["b", "c"]}
{"question": "a", "answer": ["b", "B"], "options": ["b", "c"]}
{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answers": ["B"], "answer_choices": ["b"]}
"""
NOT_UTF8, NESTED = '{"input": "\udcff", "target": "b"}', "[" * 100_000


@pytest.mark.parametrize("bad", [*BAD_LINES.strip().splitlines(), NOT_UTF8, NESTED])
def test_bad_line_error_names_file_and_line(tmp_path, bad):
    path = write(tmp_path / "x.jsonl", {"input": "a", "target": "b"}, bad)
    with pytest.raises(ValueError, match=r"^x\.jsonl:2: ") as caught:
        data.read(path)
    assert "\n" not in str(caught.value)


def test_unusual_but_valid_lines_are_read(tmp_path):
    """CRLF, no newline at the end, a character written as two escapes, an answer not in a list."""
    text = b'{"question": "a", "answer": "b"}\r\n\r\n{"input": "\\ud83d\\ude00", "target": "c"}'
    (tmp_path / "a.jsonl").write_bytes(text)
    first, second = data.read(tmp_path / "a.jsonl")
    assert first.answers == ("b",) and second.input == "\U0001f600" and second.source == "a.jsonl:3"


FORMS = (
    {"question": "is it", "answer": ["bad"]},
    {"input": "Is it?", "target": "bad"},
    {"inputs_pretokenized": "Is it?", "targets_pretokenized": "bad"},
)
OTHER_KEYS = ("text", "task", "id", "answers", "options", "answer_choices")


@pytest.mark.parametrize("absent", ["null", "NaN"])
@pytest.mark.parametrize("form", FORMS)
def test_key_without_a_value_is_absent(tmp_path, form, absent):
    """A table as JSON lines: every record has every column."""
    columns = dict.fromkeys((key for each in FORMS for key in each), json.loads(absent))
    columns |= dict.fromkeys(OTHER_KEYS, json.loads(absent))
    table = data.read(write(tmp_path / "a.jsonl", columns | form, columns | form))
    assert table == data.read(write(tmp_path / "a.jsonl", form, form))
    assert table[0].task == "" and table[1].id == "a.jsonl:2" and table[0].options == ()
    choices = form | {"options": ["bad", "good"]}
    path = write(tmp_path / "a.jsonl", choices, choices | {"answer_choices": None})
    assert [e.options for e in data.read(path)] == [("bad", "good")] * 2
    assert data.parse_record(columns | form, "a.jsonl:1") == table[0]  # without a file
    texts = list(data.read_texts(write(tmp_path / "b.jsonl", columns | form)))
    assert texts == list(data.read_texts(write(tmp_path / "b.jsonl", form)))
    assert list(data.read_texts(write(tmp_path / "c.jsonl", columns | {"text": "a"}))) == ["a"]


@pytest.mark.parametrize("key", ["options", "answer_choices"])
@pytest.mark.parametrize("form", FORMS)
def test_targets_answers_and_options_are_stripped_alike(tmp_path, form, key):
    target = list(form)[1]
    for text in ("bad", " bad", "bad ", "\nbad\t", "\u3000bad\r\n"):
        record = form | {target: text, "answers": [f"{text} ", " fair"]}
        if target == "answer":
            record = form | {"answer": [text, " fair"]}
        choices = record | {key: [" bad", "good\n", "\u00a0fair"]}
        free, chosen = data.read(write(tmp_path / "a.jsonl", record, choices))
        assert free.target == chosen.target == "bad" and free.answers == chosen.answers
        assert free.answers == ("bad", "fair")
        assert free.options == () and chosen.options == ("bad", "good", "fair")


def read_lines(path):
    return [e.id for e in questions.read_questions(path)]


LINES = "who\u2028wrote emma\x0c?\nwhat\x85is\rit\u2029so\x1dfar\x0b?".split("\n")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_a_newline_ends_a_line_and_byte_order_marks_are_dropped(tmp_path, mark, end):
    def file(name, *lines):  # two files in one, as a script may have joined them
        part = mark + "".join(line + end for line in lines)
        (tmp_path / name).write_bytes((part + part).encode())
        return tmp_path / name

    assert read_lines(file("q.txt", "", *LINES, " ")) == LINES * 2
    assert list(data.read_texts(file("a.txt", *LINES, ""))) == ["\n".join(LINES)] * 2
    record = {"input": LINES[0], "target": LINES[1]}
    one, two = data.read(file("a.jsonl", json.dumps(record, ensure_ascii=False), ""))
    assert (one.input, one.target, two.source) == (*LINES, "a.jsonl:3")
    assert list(data.read_texts(file("b.jsonl", json.dumps({"text": LINES[0]})))) == LINES[:1] * 2


def test_sample_draws_exactly_as_many_rows_as_the_limit():
    for count, limit in ((100, 40), (12, 7), (100, 99), (5, 1), (3, 3), (3, 9), (0, 4), (7, None)):
        rows = data.sample(count, limit, 0)
        assert len(rows) == min(count if limit is None else limit, count)
        assert rows == sorted(set(rows)) == data.sample(count, limit, 0)
        assert set(rows) <= set(range(count)) and set(rows) <= set(data.sample(count, None, 1))
    assert set(data.sample(100, 10, 3)) <= set(data.sample(100, 40, 3))
    assert data.sample(100, 40, 0) != data.sample(100, 40, 1)
    for period in (2, 3, 4, 5):  # classes in turn: each gets about its part
        drawn = np.bincount(np.array(data.sample(1200, 400, 0)) % period)
        assert (abs(drawn - 400 / period) < 50).all()
    for limit in (0, -1, -3):
        with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
            data.sample(10, limit, 0)


def test_target_is_among_the_answers(tmp_path):
    for given, expected in ((["c"], ("b", "c")), (["c", "b"], ("c", "b"))):
        record = {"input": "a", "target": "b", "answers": given}
        assert data.read(write(tmp_path / "a.jsonl", record))[0].answers == expected


def test_id_is_unique_within_a_task(tmp_path):
    record = {"input": "a", "target": "b", "id": 1}
    path = write(tmp_path / "a.jsonl", record, record | {"task": "t"}, record | {"id": 2})
    assert [(e.task, e.id) for e in data.read(path)] == [("", "1"), ("t", "1"), ("", "2")]
    with pytest.raises(ValueError, match=r"^b\.jsonl:3: .* b\.jsonl:1$"):
        data.read(write(tmp_path / "b.jsonl", record, "", record | {"input": "c"}))


def test_p3_records_are_read(tmp_path):
    record = {"inputs_pretokenized": "Good? ", "targets_pretokenized": "\nyes\n", "task": "t"}
    (e,) = data.read(write(tmp_path / "p3.jsonl", record | {"answer_choices": ["no", " yes"]}))
    assert e == Example("Good?", "yes", ("yes",), "t", "p3.jsonl:1", "p3.jsonl:1", ("no", "yes"))


def test_the_json_of_dpr_and_squad_is_read_as_questions(tmp_path):
    emma = {"id": "7", "question": "Who wrote Emma", "answers": [{"text": "Jane Austen"}] * 2}
    articles = [{"title": "Emma", "paragraphs": [{"context": "By Jane Austen.", "qas": [emma]}]}]
    dpr = [
        {"question": "who wrote emma?", "answers": ["Jane Austen", "Austen"], "positive_ctxs": []}
    ]
    found = []
    for value in ({"version": "1.1", "data": articles}, {"data": articles}, dpr):
        for indent in (None, 1) if value is dpr else (None,):
            (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
            found += data.read(tmp_path / "a.json")
    assert {e.input for e in found} == {"Q: Who wrote Emma?\nA:", "Q: who wrote emma?\nA:"}
    assert [e.id for e in found] == ["7", "7", "a.json:1", "a.json:2"]
    assert [e.answers for e in found[::2]] == [("Jane Austen",), ("Jane Austen", "Austen")]
    (tmp_path / "a.json").write_text(json.dumps({"data": articles * 2}).replace("7", "8", 1))
    mixed = prompts.read_mixed(tmp_path / "a.json", True)  # all questions of the one line
    assert [example.id for example, _ in mixed] == ["8", "7"]
    (tmp_path / "a.json").write_text('[{"question": "who", "answers": [3]}]')
    with pytest.raises(ValueError, match="a.json:1: needs a list of texts under the key answers"):
        data.read(tmp_path / "a.json")


def test_texts_are_read_from_three_kinds_of_file(tmp_path):
    lines = write(tmp_path / "a.txt", "one", "still one", "", " \t", " two ")
    assert list(data.read_texts(lines)) == ["one\nstill one", "two"]
    records = write(tmp_path / "b.jsonl", {"text": "one"}, {"text": "two"})
    assert list(data.read_texts(records)) == ["one", "two"]
    examples = write(tmp_path / "c.jsonl", {"question": "why", "answer": ["so"]})
    assert list(data.read_texts(examples)) == ["Q: why?\nA: so"]


def test_a_long_document_becomes_several_at_the_ends_of_words(tmp_path):
    for word in ("some words", "x" * data.LETTERS):
        text = f" {word}" * 9000 if " " in word else f"{word}{word} y"
        parts = list(data.read_texts(write(tmp_path / "a.jsonl", {"text": text})))
        assert "".join(parts) == text and max(map(len, parts)) <= data.LETTERS
        assert len(parts) == -(-len(text) // data.LETTERS)
        assert "x" in text or all(part.startswith((" some", " words")) for part in parts)


def test_bad_text_files_raise(tmp_path):
    for name, lines, message in (
        ("a.jsonl", [{"text": 3}], "^a.jsonl:1: "),
        ("a.jsonl", [{"input": "a", "target": "b"}, {"text": "no example"}], "^a.jsonl:2: "),
        ("a.txt", ["", " "], "a.txt: holds no text"),
        ("a.txt", ["\udcff\udcfe"], "a.txt:1: not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            list(data.read_texts(write(tmp_path / name, *lines)))


@pytest.mark.parametrize("read", [data.read, data.read_texts])
def test_empty_and_missing_files_are_named(tmp_path, read):
    with pytest.raises(ValueError, match="empty.jsonl: holds no"):
        list(read(write(tmp_path / "empty.jsonl")))
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            list(read(tmp_path / name))


def test_question_ends_with_one_question_mark():
    texts = {data.question_text(q) for q in ("who", "who?", " who ? ", "who??")}
    assert texts == {"Q: who?\nA:"}


def test_command_prints_first_example_and_its_tokens(tmp_path, tokenizer, capsys):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "a.jsonl", {"input": "?", "target": "Anna", "task": "t"})
    data.main([str(path), "--tokenizer", str(tmp_path)])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "1 examples, tasks: t" and second == "first: '?' -> 'Anna'  (accepted: Anna)"
    assert third == "tokens: <|endoftext|> ? -> ĠAnna"


def test_tokenizer_writes_any_unicode_text(tokenizer):
    rng, ranges = random.Random(0), [(0, 0x250), (0, 0xD800), (0xE000, 0x110000)]
    texts = ["plain", "  two  spaces ", "naïve café ☕ 漢字", "tab\tand\nline", "\x00\x7f"]
    for _ in range(200):
        texts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20)))
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0 and tokenizer.decode(ids) == text


def test_target_and_option_tokens_are_those_of_running_text(tokenizer):
    text, options = "Q: where was Anna born?\nA:", ("Kranstad", "Velmor")
    example = Example(text, "Velmor", ("Velmor",), options=options)
    (tokens,) = data.tokenize([example], tokenizer, 0, 100)
    for option, ids in zip(options, tokens.options):
        assert tokens.input + ids == tokenizer.encode(f"{text} {option}").ids + [0]
    assert tokens.target == tokens.options[1] and tokens.target.count(0) == 1
    assert tokens.input[0] == 0 and tokens.input.count(0) == 1
    assert data.tokenize([example], tokenizer, None, 100)[0].target == tokens.target[:-1]


def test_example_longer_than_the_context_raises(tokenizer):
    example = Example("Is it so?", "no", ("no",), source="a.jsonl:1")
    (tokens,) = data.tokenize([example], tokenizer, 0, 100)
    n = len(tokens.input) + len(tokens.target) - 1
    data.tokenize([example], tokenizer, 0, n)
    for bad, max_len in ((example, n - 1), (replace(example, options=("no", "perhaps")), n)):
        with pytest.raises(ValueError, match="a.jsonl:1: .*exceed"):
            data.tokenize([bad], tokenizer, 0, max_len)


def test_token_across_the_boundary_leaves_the_input_unchanged(tokenizer):
    """The input ends with a space, which running text would join to the next word."""
    example = Example("Anna lives in ", "Kranstad", ("Kranstad",))
    (tokens,) = data.tokenize([example], tokenizer, 0, 100)
    assert tokens.input == tokenizer.encode("Anna lives in ").ids
    assert tokenizer.decode(tokens.target) == " Kranstad"


@pytest.mark.parametrize("text", ["A:", "A: "])
def test_eos_that_the_tokenizer_appends_does_not_end_the_input(text):
    """SentencePiece tokenizers put a space in front of a text and may put an EOS behind it."""
    scores = {"<s>": 0.0, "</s>": 0.0, "▁": -3.0} | dict.fromkeys("QA:?abn", -4.0) | {"▁ban": -2.0}
    pieces = Tokenizer(models.Unigram(list(scores.items())))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 0), ("</s>", 1)]
    pieces.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    assert pieces.encode("A:").tokens == ["<s>", "▁", "A", ":", "</s>"]
    (tokens,) = data.tokenize([Example(text, "ban", ("ban",))], pieces, 1, 100)
    assert [pieces.id_to_token(i) for i in tokens.input][:4] == ["<s>", "▁", "A", ":"]
    target = [pieces.id_to_token(i) for i in tokens.target]
    assert 1 not in tokens.input and target == ["▁ban", "</s>"]


def spanning(kind):
    """A tokenizer with tokens that hold the end of an input and the beginning of an answer."""
    model, trainer = {
        "metaspace": (models.Unigram(), trainers.UnigramTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
    }.get(kind, (models.BPE(), trainers.BpeTrainer))
    tokenizer = Tokenizer(model)
    if kind == "byte-level":  # of a model that does not split texts into words before merging
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        tokenizer.decoder = decoders.Metaspace(split=False)
    elif kind == "llama":  # Llama 2's: the normaliser adds the first space
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
        marks = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(marks)
    else:
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    texts = [f"{input} {target}" for input in JOINS for target in TARGETS] * 20
    special = ["<unk>", "<s>"]
    trainer = trainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([": C", "is -5", "A: no", "is !"])
    return tokenizer


JOINS = ("The right choice is:", "What is", "Q: who?\nA:", "so it is", "Answer: ")
TARGETS = ("A", "C", "D", "-5", "5", "no", "nobody", "C A", "is: C", "!")


@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace", "wordpiece"])
def test_input_and_target_spell_the_text_when_a_token_spans_both(kind):
    tokenizer, spans = spanning(kind), 0
    for input in JOINS:
        example = Example(input, TARGETS[1], TARGETS[1:2], options=TARGETS)
        (tokens,) = data.tokenize([example], tokenizer, 1, 100)
        assert tokens.target == tokens.options[1] and len(set(map(tuple, tokens.options))) == 10
        for text, ids in zip(TARGETS, tokens.options):
            spelt, wanted = tokenizer.decode(tokens.input + ids[:-1]), f"{input} {text}"
            if kind == "wordpiece":  # its tokens have neither case nor spaces
                spelt, wanted = ("".join(t.lower().split()) for t in (spelt, wanted))
            assert spelt == wanted and ids[-1] == 1
            spans += tokenizer.encode(f"{input} {text}").ids[: len(tokens.input)] != tokens.input
    assert spans >= 4


def test_choices_that_the_tokens_do_not_tell_apart_raise():
    for options, message in (  # case, accents, unknown letters; characters that are dropped
        (("US", "us"), "the options 'US' and 'us' have the same tokens"),
        (("no", "ano", "año"), "the options 'ano' and 'año' have the same tokens"),
        (("☃", "☄"), "the options '☃' and '☄' have the same tokens"),
        (("no", "\u200b"), r"no tokens .* spell the answer '\\u200b'"),
        (("\ufffd",), "no tokens .* spell the answer"),
        (("an\u0303o", "a\xf1o"), "have the same tokens$"),
    ):
        example = Example("What is", options[0], options[:1], source="a.jsonl:7", options=options)
        with pytest.raises(ValueError, match=f"^a.jsonl:7: .*{message}"):
            data.tokenize([example], spanning("wordpiece"), 1, 100)


def test_token_outside_the_vocabulary_of_the_lm_raises():
    tokenizer = data.train_tokenizer(TEXTS * 30, 300)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<pad>"])
    good = Example("Anna", "lives", ("lives",), source="a.jsonl:1", options=("lives", "makes"))
    message = f"the token '<pad>' has the id {size}, outside the LM's vocabulary of {size}"
    for change in ({"input": "A <pad>"}, {"target": "<pad>"}, {"options": ("lives", "a <pad>")}):
        bad = replace(good, source="a.jsonl:2", **change)
        with pytest.raises(ValueError, match=f"^a.jsonl:2: {message}"):
            data.tokenize([good, bad], tokenizer, 0, 100, size)
        data.tokenize([good, bad], tokenizer, 0, 100, size + 1)
    assert len(data.encode_texts(TEXTS, tokenizer, size).starts) == 4
    with pytest.raises(ValueError, match=f"^{message}"):
        data.encode_texts([*TEXTS, "a <pad>"], tokenizer, size)


def examples(n):
    """Examples of random lengths; the tokens of inputs are below 50, those of targets above."""
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(1, 40), rng.integers(1, 4)) for _ in range(n)]
    draw = [(rng.integers(1, 50, i).tolist(), rng.integers(50, 99, t).tolist()) for i, t in lengths]
    return [TokenizedExample(input, target) for input, target in draw]


def test_positions_predict_the_next_token_of_the_target_only():
    some = examples(20)
    batch = data.batches(some, 20, 0, 0)
    for ids, targets, n, row in zip(batch.ids, batch.targets, batch.lengths, batch.rows):
        input, target = some[row].input, some[row].target
        assert ids[:n].tolist() == (input + target)[:-1] and n == len(input + target) - 1
        assert targets[:n].tolist() == [IGNORE_INDEX] * (len(input) - 1) + target
        assert (targets[n:] == IGNORE_INDEX).all()


def test_similar_lengths_share_a_batch():
    some = examples(2000)  # none of their tokens is 0, the padding
    bucketed = [data.batches(some, 16, 0, step).ids.flatten() for step in range(125)]
    unsorted = [data.collate(some[i : i + 16], []).ids.flatten() for i in range(0, 2000, 16)]
    assert (torch.cat(bucketed) == 0).float().mean() < 0.05
    assert (torch.cat(unsorted) == 0).float().mean() > 0.3


@pytest.mark.parametrize("size, seq_len", [(1, 7), (4, 16), (3, 50)])
def test_windows_cut_the_stream_of_an_epoch(tokenizer, corpus, size, seq_len):
    documents = [tokenizer.encode(text).ids for text in TEXTS * 30]
    steps = (sum(map(len, documents)) - 1) // seq_len // size
    for epoch in (0, 1):
        order = np.random.default_rng([9, epoch]).permutation(len(documents))
        stream = [token for d in order for token in documents[d]]
        for step in range(steps):
            batch = data.windows(corpus, size, seq_len, 9, epoch * steps + step)
            start, n = step * size * seq_len, size * seq_len
            assert batch.ids.flatten().tolist() == stream[start : start + n]
            assert batch.targets.flatten().tolist() == stream[start + 1 : start + n + 1]
            assert batch.rows == list(range(step * size, (step + 1) * size))
            assert batch.lengths.tolist() == [seq_len] * size


def test_text_smaller_than_a_batch_is_one_batch():
    corpus = data.Corpus(np.arange(1, 17, dtype=np.int32), np.array([0, 4, 9, 16]))
    steps = [data.windows(corpus, 4, 5, 0, step) for step in range(12)]  # three windows each
    assert all(batch.rows == [0, 1, 2] for batch in steps)
    assert len({tuple(batch.ids.flatten().tolist()) for batch in steps}) > 3
    with pytest.raises(ValueError, match="16 tokens, too few for one window of 16"):
        data.windows(corpus, 4, 16, 0, 0)


def numbered(T=100, rows=40):
    """Windows of text in which every token occurs once."""
    ids = torch.arange(rows * T).view(rows, T) + 10
    return data.Batch(ids, torch.full((rows,), T), torch.zeros_like(ids), list(range(rows)))


@pytest.mark.parametrize("kind", ["batches", "windows", "mask_tokens", "corrupt_spans"])
def test_batch_depends_on_seed_and_step_alone(corpus, kind):
    make, *arguments = {
        "batches": (data.batches, examples(100), 8),  # an epoch of 13 steps
        "windows": (data.windows, corpus, 4, 16),
        "mask_tokens": (pretrain.mask_tokens, numbered(), SPECIAL, 80_000),
        "corrupt_spans": (pretrain.corrupt_spans, numbered(), SENTINELS),
    }[kind]
    first = make(*arguments, 1, 9)
    for other in ((1, 8), (2, 9), (1, 10), (1, 22)):
        assert not torch.equal(first.ids, make(*arguments, *other).ids)
    data.epoch_order.cache_clear()
    again = make(*arguments, 1, 9)
    assert torch.equal(first.ids, again.ids) and first.rows == again.rows


def test_masking_changes_nothing_but_fifteen_percent():
    batch = pretrain.mask_tokens(numbered(), SPECIAL, 80_000, 0, 0)
    assert batch.ids.shape == (40, 102) and batch.lengths.tolist() == [102] * 40
    masked = batch.targets != IGNORE_INDEX
    whole = torch.where(masked, batch.targets, batch.ids)
    assert (whole[:, 0] == 90_000).all()
    cuts = (whole == 90_001).nonzero()  # one [SEP] a row, not at an end, at varying places
    assert cuts[:, 0].tolist() == list(range(40)) and len(set(cuts[:, 1].tolist())) > 20
    assert 1 < cuts[:, 1].min() and cuts[:, 1].max() < 101
    assert torch.equal(whole[whole < 90_000].view(40, 100), numbered().ids)
    shown, targets = batch.ids[masked], batch.targets[masked]
    assert 0.13 < masked.float().mean() < 0.17 and targets.max() < 90_000
    assert 0.75 < (shown == 90_002).float().mean() < 0.85
    assert 0.06 < (shown == targets).float().mean() < 0.14


def restore(ids, targets):
    """Put the spans of `targets` back in the place of their sentinels: (text, spans)."""
    spans = {}
    for token in targets.tolist():
        if token >= 90_000:
            last = spans[token] = []
        else:
            last.append(token)
    return [t for token in ids.tolist() for t in spans.get(token, [token])], spans


def test_corrupted_spans_put_back_give_the_text():
    batch, lengths = pretrain.corrupt_spans(numbered(), SENTINELS, 0, 0), []
    assert batch.ids.shape == (40, 100 - 15 + 5) and batch.targets.shape == (40, 15 + 5 + 1)
    assert batch.lengths.tolist() == [90] * 40
    for ids, targets, text in zip(batch.ids, batch.targets, numbered().ids):
        restored, spans = restore(ids, targets)
        assert restored == text.tolist() and ids[0] < 90_000
        assert list(spans) == SENTINELS[:6] and spans[SENTINELS[5]] == []
        lengths += [len(spans[sentinel]) for sentinel in SENTINELS[:5]]
    assert set(range(1, 8)) <= set(lengths) and sum(lengths) / len(lengths) == 3
    for T in (2, 3, 5, 20):  # the shortest windows lose a span too
        batch = pretrain.corrupt_spans(numbered(T, 3), SENTINELS, 0, 0)
        restored, spans = restore(batch.ids[0], batch.targets[0])
        assert restored == numbered(T, 3).ids[0].tolist() and any(spans.values())
