"""The re-ranker: its input, scores, loss, files; cross-fitting and packing. Parity: test_parity."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import close, randomise, seeded
from tokenizers import Tokenizer, models, pre_tokenizers

import rerank
from checkpoints import load_tokenizer
from passages import Passage, Question, RerankerBatch, find_spans, reranker_batch, reranker_samples
from rerank import CrossEncoder, cross_fit, pack, reranker_loss
from runs import ASSETS

WORDS = ["[PAD]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]


def bert_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="z"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    return tokenizer


def make_encoder(format="reader", max_len=20, labels=1, dropout=0.0):
    sizes = dict(dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_len=20, dropout=dropout)
    bert = rerank.Bert(rerank.BertConfig(len(WORDS), **sizes))
    encoder = randomise(CrossEncoder(bert, bert_tokenizer(), format, max_len, labels)).eval()
    with torch.no_grad():  # weights at which the scores of different passages differ
        for name, parameter in encoder.named_parameters():
            if parameter.dim() == 2:
                parameter *= 2
            elif name.endswith("bias"):
                parameter -= 1
    return encoder


def test_a_name_has_the_same_tokens_at_the_start_of_a_title_and_within_a_question():
    tokenizer = load_tokenizer(ASSETS / "bert")
    for name in ("Nevissa", "Temia Girnberg", "Tralvo"):
        title, text, question, empty = rerank.tokenise(
            tokenizer, [name, f"{name} lives here.", f"Where does {name} live?", ""]
        )
        assert empty == [] and text[: len(title)] == title
        assert title in [question[i : i + len(title)] for i in range(len(question))]


def spelt(encoder, question, passage):
    words = [WORDS[i] for i in encoder.layout(*encoder.tokens([question, *passage]))]
    return "".join(words).replace("[CLS]", "<").replace("[SEP]", "|")


PASSAGES = [
    ("a b", "c d e f g h"),
    ("", "b"),
    ("i", "j k l m n o p q r s t u v w x y"),
    ("c", "d e"),
]


# Input and scores


def test_the_input_is_cut_and_ends_as_its_format_says():
    reader, classifier = make_encoder(), make_encoder("classifier")
    assert spelt(reader, "q r", ("t", "a b")) == "<qr|t|ab"
    assert spelt(classifier, "q r", ("t", "a b")) == "<qr|t|ab|"
    assert spelt(reader, "q", ("", "a b")) == "<q||ab"
    assert spelt(classifier, "q", ("", "a b")) == "<q|ab|"
    long = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert spelt(reader, "q", ("t", long)) == "<q|t|abcdefghijklmno"
    assert spelt(classifier, "q", ("t", long)) == "<q|t|abcdefghijklmn|"
    assert CrossEncoder(reader.bert, reader.tokenizer, max_len=99).max_len == 20


@torch.no_grad()
@pytest.mark.parametrize("format", rerank.FORMATS)
@pytest.mark.parametrize("batch_tokens", [1, 25, 4096])
def test_a_score_does_not_depend_on_the_passages_beside_it(format, batch_tokens):
    encoder = make_encoder(format, dropout=0.5).train()
    questions, lists = ["a q", "b", "c d e"], [PASSAGES, [], PASSAGES[::-1]]
    together = encoder.score_all(questions, lists, batch_tokens)
    assert encoder.training and [len(scores) for scores in together] == [4, 0, 4]
    encoder.eval()
    for question, passages, scores in zip(questions, lists, together):
        for passage, score in zip(passages, scores):
            ids, lengths = rerank.pad([encoder.layout(*encoder.tokens([question, *passage]))])
            alone, _ = encoder(ids, lengths, spans="span" in encoder.heads)  # all states computed
            close(score, alone[0], 1e-5)
            close(encoder.score(question, [passage]), alone, 1e-5)
    assert torch.cat(together).std() > 0.1


def test_scores_in_bf16_keep_more_digits_than_bf16():
    """It has 8 bits: two passages would often get the same score."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = make_encoder().score("q", PASSAGES)
    assert (scores != scores.bfloat16().float()).any()


def test_a_passage_may_be_a_pair_a_dict_or_a_text():
    encoder = make_encoder()
    record = {"title": "a b", "text": "c d", "id": "7"}
    pair, same, named = encoder.score("q", [("a b", "c d"), record, Passage("a b", "c d", "7")])
    assert pair == same == named
    untitled, text = encoder.score("q", [("", "c d"), "c d"])
    assert untitled == text != pair


def test_two_labels_score_the_second_against_the_first():
    encoder = make_encoder("classifier", labels=2)
    ids, lengths = rerank.pad([encoder.layout([5], [6], [7])])
    h = encoder.bert(ids, lengths, rerank.token_type_ids(ids, 2))
    logits = encoder.heads["rank"](encoder.heads["pooler"](h[:, 0]).tanh())
    close(encoder(ids, lengths)[0], logits[:, 1] - logits[:, 0])


def test_a_tokenizer_without_separator_is_refused():
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match=r"needs the tokens \[CLS\] and \[SEP\]"):
        CrossEncoder(make_encoder().bert, plain)


@pytest.mark.parametrize("format", rerank.FORMATS)
@pytest.mark.parametrize("labels", [1, 2])
def test_a_saved_encoder_comes_back_and_main_reports_its_input(tmp_path, capsys, format, labels):
    encoder = make_encoder(format, labels=labels)
    encoder.save(tmp_path)
    again = CrossEncoder.from_pretrained(tmp_path)
    assert again.format == encoder.format and not again.training
    assert torch.equal(again.score("q", PASSAGES), encoder.score("q", PASSAGES))
    rerank.main([str(tmp_path)])
    end = " [SEP]" if format == "classifier" else ""
    printed = capsys.readouterr().out
    assert f"reads [CLS] question [SEP] title [SEP] passage{end}\n" in printed


def test_a_bare_bert_gets_new_heads_and_three_labels_are_refused(tmp_path, capsys):
    encoder = make_encoder()
    encoder.bert.save(tmp_path)
    encoder.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match="an encoder alone; its new heads are random"):
        again = CrossEncoder.from_pretrained(tmp_path)
    assert again.format is rerank.FORMATS["reader"] and again.heads["rank"].weight.std() < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CrossEncoder.from_pretrained(tmp_path, new_heads=True)
    rerank.main([str(tmp_path)])
    assert "an encoder alone, without heads" in capsys.readouterr().out
    make_encoder("classifier", labels=3).save(tmp_path / "three")
    with pytest.raises(ValueError, match="one label or two, not 3"):
        CrossEncoder.from_pretrained(tmp_path / "three")


# Training


GOLD = Question(
    "a q",
    ["c d", "e"],
    [Passage("t", "b c d e c d", "1"), Passage("t", "z z z", "2")],
    [Passage("", "f g", "3"), Passage("u", "h i j k", "4"), Passage("u", "l", "5")],
)


def naive_loss(encoder, sample_rows, groups, spans):
    """Equations 3 to 5 with one passage at a time."""
    total = 0.0
    for group, places in zip(groups, spans):
        ranks, probability = [], 0.0
        for m, ids in enumerate(sample_rows[i] for i in group):
            row, lengths = rerank.pad([ids])
            rank, logits = encoder(row, lengths, spans=True)
            ranks.append(rank[0])
            if m == 0:
                start, end = logits[0].softmax(0).unbind(1)
                probability = sum(start[first] * end[last] for first, last in places)
        total = total - torch.stack(ranks).log_softmax(0)[0] - probability.log()
    return total


def test_the_loss_is_that_of_the_paper_with_padding_and_unequal_groups():
    encoder = make_encoder()
    inputs = [
        [1, 5, 2, 6, 2, 7, 8, 9],
        [1, 5, 2, 2, 4],
        [1, 5, 2, 9, 2, 9, 9],
        [1, 8, 2, 3, 2, 4, 4],
    ]
    inputs += [[1, 8, 2, 2, 11, 12, 13, 14, 15, 16]]
    groups, spans = [[0, 1, 2], [3, 4]], [[(5, 6), (7, 7)], [(5, 5)]]
    padded = torch.tensor([[0, 1, 2], [3, 4, -1]])
    places = torch.tensor([[[5, 6], [7, 7]], [[5, 5], [-1, -1]]])
    loss = reranker_loss(encoder, *rerank.pad(inputs), padded, places)
    expected = naive_loss(encoder, inputs, groups, spans)
    close(loss, expected, 1e-5)
    without = torch.full_like(places, -1)
    rank_only = reranker_loss(encoder, *rerank.pad(inputs), padded, without)
    assert 0 < rank_only < loss
    mixed = torch.stack([places[0], without[1]])
    part = reranker_loss(encoder, *rerank.pad(inputs), padded, mixed)
    last = naive_loss(encoder, inputs, groups[1:], spans[1:])
    first_only = reranker_loss(encoder, *rerank.pad(inputs), padded[1:], without[1:])
    close(loss - part, last - first_only, 1e-5)


def test_other_passages_are_read_in_parts_of_similar_length():
    """The same loss and gradient as one passage at a time, with less padding."""
    encoder, rng = make_encoder(), np.random.default_rng(0)
    lengths = [9, *range(1, 18), *range(1, 18), 8, *range(1, 18)]  # of two questions' passages
    inputs = [[1, 5, 2, *rng.integers(3, 12, length).tolist()] for length in lengths]
    groups, spans = [list(range(35)), list(range(35, 53))], [[(5, 6)], [(7, 7)]]
    padded = torch.tensor([groups[0], groups[1] + [-1] * 17])
    ids, real = rerank.pad(inputs)
    parts = rerank.loss_parts(real, padded)
    assert parts[0].tolist() == [0, 35] and sorted(torch.cat(parts).tolist()) == list(range(53))
    loss = reranker_loss(encoder, ids, real, padded, torch.tensor([[[5, 6]], [[7, 7]]]))
    loss.backward()
    gradient = encoder.bert.word_embeddings.weight.grad.clone()
    encoder.zero_grad()
    expected = naive_loss(encoder, inputs, groups, spans)
    expected.backward()
    close(loss, expected, 1e-4)
    close(gradient, encoder.bert.word_embeddings.weight.grad, 1e-4)
    batch = RerankerBatch(ids, real, padded, torch.tensor([[[5, 6]], [[7, 7]]]), None, [0, 1])
    assert real.sum() < batch.positions < 0.85 * ids.numel()


def test_a_classifier_learns_by_its_ranks_alone():
    encoder = make_encoder("classifier")
    samples, _ = reranker_samples([GOLD], encoder)
    batch = reranker_batch(samples, encoder, 1, 3, seed=0, step=0)
    rank, _ = encoder(batch.ids, batch.lengths)
    loss = reranker_loss(encoder, batch.ids, batch.lengths, batch.groups, batch.spans)
    close(loss, -rank.log_softmax(0)[0])


def test_spans_are_where_the_answers_tokens_stand_in_the_input():
    encoder = make_encoder()
    (question,), answers = encoder.tokens(["a q"]), encoder.tokens(["c d", "e", ""])
    spans = find_spans(encoder, question, GOLD.positives[0], answers)
    ids = encoder.layout(question, *encoder.tokens(["t", "b c d e c d"]))
    assert ["".join(WORDS[i] for i in ids[a : b + 1]) for a, b in spans] == ["cd", "cd", "e"]
    assert find_spans(encoder, question, GOLD.positives[0], answers, limit=1) == spans[:1]
    for format, expected in (("reader", [(7, 8)]), ("classifier", [])):
        short = make_encoder(format, max_len=9)  # the last position is a classifier's [SEP]
        assert find_spans(short, question, GOLD.positives[0], answers)[:1] == expected


def test_batches_hold_a_positive_with_its_spans_and_drawn_negatives():
    encoder = make_encoder()
    other = Question("b", ["x"], [Passage("", "w x", "6")], [Passage("", "y", "7")])
    no_positive = Question("c", ["x"], [], [Passage("", "y", "7")])
    no_negative = Question("c", ["x"], [Passage("", "x", "8")])
    no_tokens = Question("c", ["v"], [Passage("", "x", "8")], [Passage("", "y", "7")])
    everything = [GOLD, other, no_positive, no_negative, no_tokens]
    samples, skipped = reranker_samples(everything, encoder)
    assert len(samples) == 2 and sorted(skipped.values()) == [1, 1, 1]
    seen = set()
    for step in range(20):
        batch = reranker_batch(samples, encoder, 2, 3, seed=5, step=step)
        assert sorted(batch.rows) == [0, 1] and batch.targets.tolist() == [0, 0]
        gold, small = batch.rows.index(0), batch.rows.index(1)
        assert batch.groups[small, 2] == -1 and batch.groups[gold].min() >= 0
        assert batch.spans[small].tolist() == [[5, 5]] + [[-1, -1]] * 2
        ids = batch.ids[batch.groups[gold, 0]]  # the positive without an answer never comes
        cut = [ids[first : last + 1].tolist() for first, last in batch.spans[gold]]
        assert cut == encoder.tokens(["c d", "c d", "e"])
        seen.add(tuple(map(tuple, batch.ids[batch.groups[gold, 1:]].tolist())))
        again = reranker_batch(samples, encoder, 2, 3, seed=5, step=step)
        assert torch.equal(batch.ids, again.ids) and batch.rows == again.rows
    assert len(seen) > 3  # negatives are drawn anew
    orders = [reranker_batch(samples, encoder, 1, 3, 5, step).rows for step in range(12)]
    assert all(sorted(orders[i] + orders[i + 1]) == [0, 1] for i in range(0, 12, 2))


def test_a_few_steps_put_the_positive_first():
    torch.manual_seed(0)
    encoder = make_encoder(dropout=0.1)
    questions = []
    for a, b in zip("abcd", "efgh"):
        wrong = [Passage("", f"{c} {b}", a + c) for c in "ijk"]
        questions.append(Question(f"{a} q", [b], [Passage("", f"m {b}", a)], wrong))
    samples, _ = reranker_samples(questions, encoder)
    optimizer = torch.optim.Adam(encoder.train().parameters(), 3e-3)
    for step in range(60):
        batch = reranker_batch(samples, encoder, 4, 4, 0, step)
        loss = reranker_loss(encoder, batch.ids, batch.lengths, batch.groups, batch.spans)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for question in questions:
        scores = encoder.score(question.question, [*question.positives, *question.hard_negatives])
        assert scores.argmax() == 0


# Cross-fitting and packing


def test_each_half_is_scored_by_the_model_that_never_saw_it():
    items = [f"q{i}" for i in range(9)] + ["q0", "q3"]  # repeated questions stay together
    trained = []

    def train(part):
        trained.append(part)
        return set(part)

    def score(model, part):
        assert not model & set(part)
        return [f"{item} by {len(trained)}" for item in part]

    scores, halves, model = cross_fit(items, train, score, seed=1)
    a, b = ([i for i, h in zip(items, halves) if h == half] for half in "AB")
    assert trained == [a, b, items] and model == set(items)
    assert len(set(a)) == 5 and len(set(b)) == 4 and not set(a) & set(b)
    assert [text.split()[0] for text in scores] == items
    assert halves == cross_fit(items, train, score, seed=1)[1]
    assert any(halves != cross_fit(items, set, lambda m, p: p, seed=s)[1] for s in (2, 3))


def test_cross_fitting_needs_two_questions_and_all_scores():
    with pytest.raises(ValueError, match="at least two questions, got 1"):
        cross_fit(["a", "a"], set, lambda model, part: part, 0)
    with pytest.raises(ValueError, match="1 items of half A got 0 scores"):
        cross_fit(["a", "b"], set, lambda model, part: [], 0)


def test_packing_goes_by_score_and_counts_what_is_dropped():
    lengths = {"a": 5, "b": 9, "c": 3, "d": 2}

    def pack_all(budget, scores=(1, 4, 3, 3)):
        return pack("abcd", scores, budget, lengths.get)

    assert pack_all(19) == (["b", "c", "d", "a"], 0)
    assert pack_all(18) == (["b", "c", "d"], 1)
    assert pack_all(8) == (["c", "d"], 2)  # the best is longer than the context
    assert pack_all(1) == ([], 4)
    assert pack_all(19, torch.tensor([1.0, 4, 3, 3]))[0] == ["b", "c", "d", "a"]
    for wrong in ([1, 2, 3], [1, 2, 3, math.nan]):
        with pytest.raises(ValueError, match="as many finite scores"):
            pack_all(9, wrong)


def test_bm25_is_found_here_too():
    from retrieve import BM25

    assert rerank.BM25 is BM25
    with pytest.raises(AttributeError):
        rerank.BM26  # noqa: B018


@torch.no_grad()
def test_the_state_of_the_first_token_alone_is_the_same():
    bert = make_encoder().bert
    ids, lengths = torch.randint(29, (4, 12), generator=seeded()), torch.tensor([12, 5, 1, 9])
    close(bert(ids, lengths, only_first=True), bert(ids, lengths)[:, :1], 1e-6)
