"""The open book: training of its two encoders, and the frozen reader with its stages."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from conftest import TINY, close, vectors
from safetensors.torch import load_file
from tiny_runs import (
    ASKED,
    BOOK,
    Dead,
    command,
    die_at_5,
    make_shelf,
    read_lines,
    run,
    same_runs,
    small_world,
    write_lines,
)
from tiny_runs import open_book_command as line

import bench
import bench_retrieval
import data
import encoders
import eval as metrics
import openbook
import passages as books
import reader
import train
from checkpoints import read_json
from fit import target_loss
from generate import predict
from passages import Passage, read_questions
from questions import prepare
from recurse import Checkpointed
from rerank import CrossEncoder
from retrieve import BM25, DenseIndex
from runs import load_run, read_predictions, read_record


@pytest.fixture(scope="module")
def shelf(place):
    return make_shelf(place)


@pytest.fixture(scope="module")
def whole(shelf):
    run(line(shelf, "reader", shelf / "whole"))
    return shelf / "whole"


@pytest.fixture(scope="module")
def dual(shelf):
    run(line(shelf, "retriever", shelf / "dual", "--pooling mean --shared-encoder"))
    return shelf / "dual"


# The encoders


LEARNS = [("reranker", ""), ("retriever", "--pooling mean --shared-encoder")]


@pytest.mark.parametrize("method, flags", LEARNS)
def test_an_encoder_learns_its_questions_and_dev_chooses_the_best(shelf, tmp_path, method, flags):
    flags += " --steps 60 --eval-every 10 --batch-size 8 --lr 0.02"
    record = run(line(shelf, method, tmp_path / "run", flags))
    log = read_lines(tmp_path / "run" / "metrics.jsonl")
    scores = {entry["step"]: entry["score"] for entry in log if "score" in entry}
    assert record["score"] == max(scores.values()) > 0.5
    assert record["step"] == min(step for step, s in scores.items() if s == record["score"])
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    rates = [entry["lr"] for entry in log]  # a tenth of the steps is warm-up
    assert rates[:7] == pytest.approx([0.02 * n / 6 for n in (1, 2, 3, 4, 5, 6, 6)])
    assert rates[-1] == pytest.approx(0.02 / 54)
    assert record["skipped"] == {"no positive passage": 1}
    after = "re-ranked" if method == "reranker" else "dual encoder"
    recall = record["results"]["dev"]["recall"]
    assert recall[f"{after}, answer"]["5"] == 1.0 == recall["retrieved, gold"]["1"]


@pytest.mark.parametrize("method", ["reranker", "retriever"])
def test_dropout_acts_in_training_and_not_on_dev(shelf, tmp_path, method):
    args = train.parse(line(shelf, method, tmp_path)[1:])
    training = encoders.ENCODERS[method](args)
    questions = [books.replace(q, found=BOOK) for q in read_questions(shelf / "ask.jsonl", BOOK)]
    training.use(questions)
    training.dev, batch = encoders.dev_groups(args, questions), training.batch_at(0)
    scores, losses = zip(*((training.evaluate(), training.loss_of(batch).item()) for _ in range(3)))
    assert len({*scores}) == 1 and len({*losses}) == 3


@pytest.mark.parametrize("method, flags", [*LEARNS, ("retriever", "")])
def test_an_encoder_resumes_to_the_same_bits(shelf, tmp_path, monkeypatch, method, flags):
    run(line(shelf, method, tmp_path / "whole", flags))
    die_at_5(monkeypatch, line(shelf, method, tmp_path / "killed", flags))
    run(line(shelf, method, tmp_path / "killed", f"{flags} --resume"))
    state = same_runs(tmp_path / "whole", tmp_path / "killed")
    two = any(name.startswith("trained.passage") for name in state)
    assert two == (method == "retriever" and "--shared" not in flags)


def write_dpr(path, questions, keys):
    """Write DPR's format, whose keys are named by the lists of a Question."""
    records = []
    for q in questions:
        record = {"question": q.question, "answers": q.answers}
        record |= {k: [p._asdict() for p in vars(q)[n]] for n, k in keys.items()}
        for passage, score in zip(record.get("ctxs", []), q.scores):
            passage["score"] = score
        records.append(record)
    path.write_text(json.dumps(records))


def test_without_a_book_an_encoder_learns_from_the_lists_of_dprs_training_files(shelf, tmp_path):
    questions = read_questions(shelf / "ask-dev.jsonl", BOOK)
    listed = [books.replace(q, hard_negatives=[BOOK[8 + i]]) for i, q in enumerate(questions)]
    keys = {"positives": "positive_ctxs", "hard_negatives": "hard_negative_ctxs"}
    write_dpr(tmp_path / "nq.json", listed, keys)
    for method in ("reranker", "retriever"):
        words = line(shelf, method, tmp_path / method, f"--train {tmp_path}/nq.json")
        i = words.index("--passages")
        run([*words[:i], *words[i + 2 :], "--dev", str(tmp_path / "nq.json")])
        assert not (tmp_path / method / "retrieved" / "train.jsonl").exists()


# The stages of the reader


def test_each_half_is_scored_by_the_re_ranker_that_never_saw_it(shelf, whole):
    """And dev by the re-ranker of all. The record holds the split and both recalls."""
    info = read_record(whole)["passages"]
    training = read_questions(whole / "ranked" / "train.jsonl", BOOK)
    halves = info["halves"]
    assert len(halves) == len(training) == 9 and {*halves} == {"A", "B"}
    models = {
        name: CrossEncoder.from_pretrained(whole / folder / "model")
        for name, folder in (("A", "reranker-b"), ("B", "reranker-a"), ("all", "reranker"))
    }
    dev = read_questions(whole / "ranked" / "dev.jsonl", BOOK)
    different, sorted_by_own = 0, []
    for q, name in [*zip(training, halves), *((q, "all") for q in dev)]:
        scores = models[name].score(q.question, q.found)
        close(scores, torch.tensor(q.scores), 1e-4)
        assert q.scores == sorted(q.scores, reverse=True)
        if name != "all":
            own = models["B" if name == "A" else "A"].score(q.question, q.found)
            different += len(q.found) > 1 and not torch.allclose(own, scores, atol=1e-4)
            sorted_by_own += reader.sort_found([q], [own.tolist()])
    assert different > 4  # the two halves have different models
    compared = info["cross-fitting"]
    assert compared["n"] == 9 and {"own half", "held-out half"} < compared.keys()
    assert compared["held-out half"] == info["train"]["re-ranked"]
    assert compared["own half"] == openbook.recalls(sorted_by_own)
    for folder in ("reranker-a", "reranker-b", "reranker"):  # the reader's rate is constant
        log = read_lines(whole / folder / "metrics.jsonl")
        rates = [0.01, 0.01, 0.008, 0.006, 0.004, 0.002]
        assert [entry["lr"] for entry in log] == pytest.approx(rates)


def test_the_record_compares_a_re_ranker_on_its_own_half_and_on_the_other(shelf, tmp_path):
    """Here a re-ranker knows its training questions by heart, and is wrong on others. Both columns
    come from the same arithmetic, that of --dtype, and from whole batches."""
    args = train.parse(line(shelf, "reader", tmp_path, "--dtype bfloat16")[1:])
    questions = read_questions(shelf / "ask.jsonl", BOOK)[:8]
    bm25, calls = BM25(BOOK), []
    found = [books.with_found(q, BOOK, bm25.search(q.question)) for q in questions]

    class ByHeart:
        format = "by heart"

        def __init__(self, known):
            self.known = {q.question: q.positives[0] for q in known["train"]}

        def score(self, question, passage):
            if passage == self.known.get(question):
                return 1.0
            return 0.5 if passage.id.startswith("s") else -0.5

        def score_all(self, asked, lists):
            calls.append((len(asked), torch.is_autocast_enabled("cpu")))
            return [torch.tensor([self.score(q, p) for p in ps]) for q, ps in zip(asked, lists)]

    book = openbook.Book(BOOK, {"train": found, "dev": found[:2], "test": []})
    ranked, info = reader.rerank_splits(args, book, tmp_path, lambda name, known: ByHeart(known))
    compared = info["cross-fitting"]
    assert calls[:4] == [(4, True)] * 4  # either half by its re-ranker, and by the other
    assert compared["own half"]["gold"]["1"] == 1.0 and compared["held-out half"]["gold"]["1"] == 0
    assert openbook.recalls(ranked.questions["train"])["gold"]["1"] == 0  # what the prompt reads
    assert openbook.recalls(ranked.questions["dev"])["gold"]["1"] == 1.0  # the re-ranker of all
    assert read_json(tmp_path / "mixed.json") == info["mixture"]
    args.no_cross_fit = True
    ranked, info = reader.rerank_splits(
        args, book, tmp_path / "b", lambda name, known: ByHeart(known)
    )
    assert openbook.recalls(ranked.questions["train"])["gold"]["1"] == 1.0 and "halves" not in info


@pytest.mark.parametrize("search", [1.0, 0.0])
def test_scores_of_search_and_re_ranker_are_added(shelf, make_lm, tmp_path, search):
    """The search knows the person, the re-ranker the kind of fact. Only with four times the weight
    that the spread says are the answers in the first five. Equal scores of a search have none. On
    the training questions the other weight would be best."""
    names = ["Boris", "Anna"]
    book = [Passage(n, f"{n} {k}{i}", f"{n}{k}{i}") for n in names for k in "xy" for i in range(6)]

    def ask(name, search):  # the lists differ: rows of one are not those of the other
        found = [*book[6:], *book[:6]] if name == "Anna" else book
        scores = [search * (1 if p.title == name else -9 * (p.text[-2] == "y")) for p in found]
        positive = next(p for p in book if p.text == f"{name} x5")
        question = books.Question(f"where was {name} born", [f"{name} x5"], [positive])
        return books.replace(question, found=found, scores=scores)

    class Kind:
        """Knows the kind x, and in it likes the wrong person's passages a little more."""

        format = "kind"

        def score_all(self, asked, lists):
            return [
                torch.tensor([4.0 * (p.text[-2] == "x") + (p.title not in q) for p in ps])
                + torch.tensor([0.01 * (p.text[-1] == "5") for p in ps])
                for q, ps in zip(asked, lists)
            ]

    args = train.parse(line(shelf, "reader", tmp_path, "--no-cross-fit --sort-by both")[1:])
    asked, others = ([ask(name, s) for name in names] for s in (search, 1 - search))
    parts = {"train": others, "dev": asked, "test": asked}
    ranked, info = reader.rerank_splits(
        args, openbook.Book(book, parts), tmp_path, lambda *_: Kind()
    )
    chosen, first = info["mixture"], [q.found[0] for q in ranked.questions["test"]]
    assert [q.positives[0] == p for q, p in zip(asked, first)] == [bool(search)] * 2
    alone, mixed = (read_questions(tmp_path / n / "test.jsonl", book) for n in ("ranked", "mixed"))
    assert not any(q.positives[0] in q.found[:5] for q in alone)
    assert [q.found for q in mixed] == [q.found for q in ranked.questions["test"]]
    assert chosen["recall@5 on dev"] == search
    assert (
        chosen["weight"] == pytest.approx(4 * chosen["spread"]) and (chosen["weight"] > 0) == search
    )
    chain = reader.Reader(make_lm(), None, args, tmp_path)
    chain.encoder, chain.weight = Kind(), chosen["weight"]
    assert [q.found for q in chain.ranked(asked)] == [q.found for q in mixed]


def test_a_reader_of_both_scores_answers_as_it_did(shelf, tmp_path):
    folder = tmp_path / "run"
    record = run(line(shelf, "reader", folder, "--sort-by both --no-cross-fit"))
    mixed = read_questions(folder / "mixed" / "dev.jsonl", BOOK)
    assert openbook.recalls(mixed) == record["passages"]["dev"]["re-ranked"]
    asked = [books.bare_question(e.input) for e in data.read(shelf / "ask-dev.jsonl")]
    answers = [row["prediction"] for row in read_predictions(folder)]
    ask = ["ask", "--run", str(folder), "--max-new-tokens", "4", *asked]
    assert metrics.main(ask) == answers


def answered(question, passages):
    return any(question.answers[0] in passage.text for passage in passages)


def test_the_passages_that_the_lm_reads_fit_and_are_counted(shelf, whole):
    table = read_record(whole)["passages"]["dev"]
    questions = read_questions(whole / "ranked" / "dev.jsonl", BOOK)
    args = train.parse(line(shelf, "reader", whole)[1:])
    lm_tokenizer = load_run(whole)[2]
    left = 96 - 4
    texts, packed, dropped = reader.pack_inputs(args, lm_tokenizer, left, questions)
    lengths = [len(ids) for ids in data.encode_prompts(lm_tokenizer, texts)]
    assert max(lengths) <= left - 3  # of 4 new tokens the last is never read
    for q, text, kept in zip(questions, texts, packed):
        assert kept == [p for p in q.found if p in kept] and kept[0] == q.found[0]
        assert text == books.reader_text(q.question, kept)
        rest = [p for p in q.found if p not in kept]
        more = [books.reader_text(q.question, [*kept, p]) for p in rest]
        assert all(len(data.encode_prompts(lm_tokenizer, [m])[0]) > left - 3 for m in more)
    read = sum(map(len, packed))
    assert dropped == table["input"]["dropped"] == sum(len(q.found) for q in questions) - read
    assert table["input"]["passages"] == read / 4
    hits = [answered(q, kept) for q, kept in zip(questions, packed)]
    assert table["input"]["answer"] == sum(hits) / 4 and table["n"] == 4
    fewer = reader.pack_inputs(args, lm_tokenizer, left, questions, ["Velmor " * 12] * 4)[1]
    assert sum(map(len, fewer)) < read  # a long answer takes their place
    args.max_packed = 1
    packed = reader.pack_inputs(args, lm_tokenizer, left, questions)[1]
    assert all(len(kept) == 1 for kept in packed)


def test_a_run_answers_as_it_did_from_any_folder(shelf, whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, prefix, tokenizer, _ = load_run(whole)
    examples = data.read(shelf / "ask-dev.jsonl")
    ids, _, prefix = prepare(model, tokenizer, examples, prefix, 4)
    assert tokenizer.decode(ids[0]).count(".") > 1  # passages stand before the question
    rows = read_predictions(whole)
    stops = metrics.stops(examples)
    assert predict(model, tokenizer, ids, prefix, 4, None, stops) == [r["prediction"] for r in rows]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    assert [row["input"] for row in rows] == [e.input for e in examples]
    asked = ["ask", "--run", str(whole), "--max-new-tokens", "4", "where was Anna born?"]
    assert metrics.main(asked) == [rows[0]["prediction"]]


def test_a_killed_reader_resumes_in_its_stage_and_does_no_stage_twice(
    shelf, whole, tmp_path, monkeypatch
):
    killed = tmp_path / "killed"
    die_at_5(monkeypatch, line(shelf, "reader", killed))
    assert (killed / "reranker-a" / "state.safetensors").is_file()
    assert not (killed / "reranker-b").exists()
    real = CrossEncoder.score_all

    def dies(encoder, *given):
        if (killed / "scores" / "b-train").exists():
            raise Dead
        return real(encoder, *given)

    again = line(shelf, "reader", killed, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "score_all", dies)
        with pytest.raises(Dead):
            run(again)
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "train_encoder", lambda *_, **__: pytest.fail("trained again"))
        run(again)
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}
    same_runs(whole, killed)


def test_a_run_from_ranked_passages_trains_the_same_prompt(shelf, whole, tmp_path):
    files = f"--train {whole}/ranked/train.jsonl --dev {whole}/ranked/dev.jsonl --no-rerank"
    record = run(line(shelf, "reader", tmp_path / "again", files))
    assert not (tmp_path / "again" / "retrieved").exists()
    for name in ("adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()
    assert record["passages"]["dev"]["input"] == read_record(whole)["passages"]["dev"]["input"]
    assert "re-ranked" not in record["passages"]["dev"]


def test_a_reader_starts_from_any_dpr_result(shelf, dual, tmp_path):
    """The questions are those of the flags, or else those of the file, cut into three parts. A
    hybrid search for later questions gets its weight, though none of these is searched for."""
    questions = read_questions(shelf / "ask.jsonl", BOOK)
    bm25 = BM25(BOOK)
    rows = [books.with_found(q, BOOK, bm25.search(q.question, 4)) for q in questions]
    write_dpr(tmp_path / "NQ.JSON", rows, {"found": "ctxs"})
    result = f"--passages {tmp_path}/NQ.JSON --no-rerank --steps 1"
    files = f"--train {shelf}/plain.jsonl --dev {shelf}/plain.jsonl"
    record = run(line(shelf, "reader", tmp_path / "run", f"{result} {files}"))
    assert record["passages"]["train"]["n"] == 8 and not (tmp_path / "run" / "retrieved").exists()
    for top in (1, 0):  # those of a file are cut, too
        out = tmp_path / f"top-{top}"
        record = run(line(shelf, "reader", out, f"{result} {files} --top {top}"))
        assert record["passages"]["dev"]["input"]["passages"] == top
    hybrid = f"--search hybrid --retriever {dual}"
    words = line(shelf, "reader", tmp_path / "cut", f"{result} {hybrid}")
    words = [w for i, w in enumerate(words) if not {words[i - 1], w} & {"--train", "--dev"}]
    record = run(words)
    assert [record["passages"][split]["n"] for split in openbook.SPLITS] == [7, 1, 1]
    assert (tmp_path / "cut" / "hybrid.json").is_file() and record["seconds_per_question"]
    model, prefix, tokenizer, _ = load_run(tmp_path / "cut")  # its book is what was found
    ids, _, _ = prepare(model, tokenizer, data.read(shelf / "ask-dev.jsonl"), prefix, 4)
    assert "likes the sea" in tokenizer.decode(ids[0])


def test_a_closed_book_is_prompt_tuning(shelf, tmp_path):
    run(line(shelf, "reader", tmp_path / "closed", "--top 0"))
    flags = f"--train {shelf}/ask.jsonl --dev {shelf}/ask-dev.jsonl --batch-size 3"
    run(command(shelf, "prompt_tuning", tmp_path / "prompt", flags))
    for name in ("adapter_model.safetensors", "predictions.jsonl"):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in ("closed", "prompt"))
        assert a == b
    rows = metrics.compare(tmp_path / "closed", shelf / "whole", iters=10)
    assert rows[0]["n"] == 4  # the questions of readers and of other methods pair


def test_a_reader_may_be_the_whole_lm(shelf, tmp_path):
    record = run(line(shelf, "reader", tmp_path / "run", "--tune lm --no-rerank --lr 0.01"))
    assert record["weights_before"] is None and record["arguments"]["prompt_length"] == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    model, prefix, tokenizer, _ = load_run(tmp_path / "run")
    assert prefix is None
    examples = data.read(shelf / "ask-dev.jsonl")
    ids, _, _ = prepare(model, tokenizer, examples, prefix, 4)
    answers = predict(model, tokenizer, ids, prefix, 4, None, metrics.stops(examples))
    assert answers == [row["prediction"] for row in read_predictions(tmp_path / "run")]
    run(line(shelf, "reader", tmp_path / "run", "--tune lm --no-rerank --lr 0.01 --resume"))


# Search


@pytest.mark.parametrize("search", ["dense", "hybrid"])
def test_a_reader_searches_with_a_trained_dual_encoder(shelf, dual, tmp_path, monkeypatch, search):
    """The weight of a hybrid search is tuned on dev once, and stored."""
    flags = f"--search {search} --retriever {dual} --no-rerank --steps 1 --top 3"
    run(line(shelf, "reader", tmp_path / "run", flags))
    args = train.parse(line(shelf, "reader", tmp_path, f"--search dense --retriever {dual}")[1:])
    encoder = openbook.load_dual(args)
    assert encoder.pooling == "mean" and encoder.passage is encoder.question
    questions = read_questions(tmp_path / "run" / "retrieved" / "train.jsonl", BOOK)
    index = DenseIndex(encoder.encode_passages(BOOK))
    asked = encoder.encode_questions([q.question for q in questions])
    dense = [index.search(vector, len(BOOK)) for vector in asked]
    if search == "hybrid":
        weight = json.loads((tmp_path / "run" / "hybrid.json").read_text())["weight"]
        bm25 = BM25(BOOK)
        sparse = [bm25.search(q.question, 1000) for q in questions]
        dense = [openbook.hybrid(a, b, weight) for a, b in zip(dense, sparse)]
        dev = read_questions(tmp_path / "run" / "retrieved" / "dev.jsonl", BOOK)
        tuned = openbook.Search(args, BOOK, tmp_path / "other")
        tuned.bm25 = bm25
        chosen = tuned.choose_weight(dev)
        assert json.loads((tmp_path / "run" / "hybrid.json").read_text()) == chosen
        monkeypatch.setattr(openbook, "TUNED_AT", 1)
        other = tuned.choose_weight([books.replace(q, answers=["sea"]) for q in dev])
        assert other["recall@1 on dev"] < 1 == chosen["recall@5 on dev"] and weight > 0
    for q, found in zip(questions, dense):
        assert q.found == [BOOK[row] for row, _ in found[:3]]
    args.retriever = str(shutil.copytree(dual, tmp_path / "dual"))
    (tmp_path / "dual/run.json").write_text(json.dumps({"arguments": {"pooling": ["mean"]}}))
    with pytest.raises(ValueError, match="run.json: pooling .*mean.* is not supported"):
        openbook.load_dual(args)


def test_an_index_of_other_passages_is_refused(shelf, whole, tmp_path):
    args = train.parse(line(shelf, "reader", tmp_path)[1:])
    with pytest.raises(ValueError, match="an index of other passages"):
        openbook.Search(args, BOOK[:-1], whole)


# Memory


@pytest.mark.parametrize("config", TINY)
def test_checkpointed_blocks_give_the_same_gradient(make_lm, config):
    """Each block keeps its input alone: no other tensor of the graph is that large."""
    lm, saved = make_lm(config), {}
    examples = [data.TokenizedExample([5, 9, 11, 4], [3, 2]), data.TokenizedExample([7, 8], [4])]
    batch, results = data.collate(examples, [0, 1]), []
    for name, model in (("plain", lm), ("checkpointed", Checkpointed(lm))):
        prompt, sizes = vectors(lm, 3).requires_grad_(True), []

        def keep(t, sizes=sizes):
            sizes.append(t.numel() if t.requires_grad else 0)
            return t

        prefix = lm.read(prompt)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = target_loss(model, prefix, batch)
        loss.backward()
        results.append((loss.detach(), prompt.grad))
        saved[name] = sum(sizes)
    close(results[0][0], results[1][0], 1e-6)
    close(results[0][1], results[1][1], 1e-6)
    assert results[1][1].abs().max() > 1e-3 and saved["checkpointed"] < 0.5 * saved["plain"]


def test_a_run_with_checkpointed_blocks_trains_the_same_prompt(shelf, whole, tmp_path):
    files = f"--train {whole}/ranked/train.jsonl --dev {whole}/ranked/dev.jsonl --no-rerank"
    run(line(shelf, "reader", tmp_path / "run", f"{files} --checkpoint-activations"))
    a, b = (load_file(f / "adapter_model.safetensors") for f in (whole, tmp_path / "run"))
    for name in a:
        close(a[name], b[name], 1e-5)


# Bad input

READS = "train.py --method reader"
TABLE = r"""
READS --search dense                      | --search dense needs --retriever
READS --search dense --retriever {}/lm/model | model_type is neither bert nor dpr
READS --reranker {}/bert                  | bert/model: an encoder alone
READS --reranker {}/lm/model              | model_type is neither bert nor dpr
OWN --passages {}/result.json             | result.json: 1 questions are too few to cut
READS --no-rerank --sort-by both          | --sort-by both: with --no-rerank
OWN --passages {}/result.json --train {}/a.jsonl --dev {}/a.jsonl --sort-by both | a given result
OWN --passages {}/book.jsonl --train {}/one.jsonl --sort-by both | there are no dev questions
OWN --passages {}/bare.json               | bare.json: holds no passages
OWN --passages {}/bare.json --test {}/one.jsonl | bare.json is cut | --test need
OWN --passages {}/book.jsonl              | book.jsonl is a book: --train names the questions
READS --passages {}/none.tsv              | none.tsv: no such file
READS --passages {}/twice.jsonl           | twice.jsonl:2: the id 'a' is taken by twice.jsonl:1
READS --passages {}/broken.json           | broken.json:1: not a record of JSON
READS --train {}/same.jsonl               | same.jsonl:2: the id 7 is taken by same.jsonl:1
READS --train {}/stranger.jsonl --dev {}/plain.jsonl --passages {}/result.json | has no results
READS --train {}/one.jsonl                | one question cannot be cut into halves
READS --train {}/mute.jsonl               | mute.jsonl: no training question has an answer
READS --encoder nowhere                   | nowhere
READS --encoder {}/lm/model               | model_type
READS --retriever nowhere --search hybrid | nowhere
READS --context 4                         | --prompt-length 4 leaves 0
READS --pause 2                           | --pause 2: not for reader
READS --tune lm --init vocab              | --tune lm
READS --placement after_bos               | --placement after_bos
READS --group-size 1                      | --group-size
READS --out {}/whole                      | whole exists | --resume
READS --out {}/whole --resume --top 5     | --top | 100
RANKS --init vocab                        | --init: reranker
RANKS --train {}/lost.jsonl               | no training question can be learnt from: 1
RANKS --checkpoint-activations            | --checkpoint-activations: not for reranker
"""
FILES = {
    "twice.jsonl": '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
    "broken.json": "[{]",
    "same.jsonl": '{"id": 7, "question": "a", "answer": ["b"]}\n' * 2,
    "stranger.jsonl": '{"question": "zed", "answer": ["b"]}\n',
    "one.jsonl": '{"question": "where was Anna born", "answer": ["Velmor"]}\n',
    "mute.jsonl": '{"question": "q", "answer": [], "positive_ctxs": [{"text": "x"}]}\n',
    "a.jsonl": '{"question": "a", "answer": ["b"]}\n',
    "lost.jsonl": '{"question": "where was Anna born", "answer": ["nowhere"]}\n',
    "result.json": '[{"question": "a", "answers": ["b"], "ctxs": [{"text": "c", "score": "1"}]}]',
    "bare.json": json.dumps([{"question": f"q{i}", "answers": ["b"]} for i in range(5)]),
}


@pytest.mark.parametrize("row", [row for row in TABLE.strip().splitlines()], ids=str)
def test_bad_input_is_one_line(shelf, whole, tmp_path, row):
    for name, text in FILES.items():
        (shelf / name).write_text(text)
    flags, *words = (part.strip() for part in row.split(" | "))
    name, _, flags = flags.replace("{}", str(shelf)).partition(" ")
    method, out = "reranker" if name == "RANKS" else "reader", tmp_path / "new"
    command_line = line(shelf, method, out, flags)
    if name == "OWN":  # of the files those that its flags name alone
        del command_line[3:9]
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run(command_line)
    message = str(error.value)
    if error.type is not SystemExit:  # argparse prints its own line
        assert len(message.splitlines()) == 1 and all(word in message for word in words), message
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert not out.exists()


@pytest.mark.parametrize("method", ["reranker", "retriever"])
def test_nothing_is_begun_if_the_file_itself_says_that_there_is_nothing_to_learn(
    shelf, tmp_path, monkeypatch, method
):
    """Here the passages are given. Where only a search can tell, its folder is removed again."""
    (tmp_path / "wrong.json").write_text(
        '[{"question": "a", "answers": ["b"], "ctxs": [{"text": "c", "score": 1}]}]'
    )
    monkeypatch.setattr(encoders, "start_record", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match="no training question can be learnt from: 1 with no pos"):
        run(line(shelf, method, tmp_path / "new", f"--train {tmp_path}/wrong.json"))
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_there_before_is_not_removed(shelf, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (shelf / "lost.jsonl").write_text(FILES["lost.jsonl"])
    with pytest.raises(ValueError, match="no training question can be learnt from"):
        run(line(shelf, "reranker", tmp_path / "run", f"--train {shelf}/lost.jsonl --resume"))
    assert (tmp_path / "run" / "retrieved").is_dir()


def test_encoders_learn_from_questions_without_answers_and_a_reader_leaves_them_out(
    shelf, tmp_path
):
    """The re-ranker learns which passage is right, and nothing of where the answer stands."""
    write_lines(tmp_path / "mixed.jsonl", [ASKED[0], *({**q, "answer": []} for q in ASKED[1:])])
    files = f"--train {tmp_path}/mixed.jsonl --steps 2 --batch-size 4"
    for method in ("reranker", "retriever"):
        record = run(line(shelf, method, tmp_path / method, files))
        assert record["skipped"] == {} and record["results"]["dev"]["n"] == 4
    words = line(shelf, "reader", tmp_path / "reader", f"{files} --no-rerank --steps 1")
    assert run(words)["passages"]["train"]["n"] == 1
    words = line(shelf, "reader", tmp_path / "both", f"{files} --steps 1 --encoder-steps 2")
    found = run(words)["passages"]
    assert found["train"]["n"] == 1 and len(found["halves"]) == len(ASKED)
    ranked = read_lines(tmp_path / "both" / "ranked" / "train.jsonl")
    assert len(ranked) == len(ASKED) and all(q["ctxs"] for q in ranked)


def test_positives_need_not_be_in_the_book(shelf, tmp_path):
    """They are no hits then. A passage of the book with the same title and text is one."""
    context = {"title": "Paris", "text": "Anna was never here"}
    asked = [{**ASKED[0], "positive_ctxs": [context]}, *ASKED[1:4]]
    del asked[0]["positives"]
    write_lines(tmp_path / "asked.jsonl", asked)
    files = " ".join(f"--{split} {tmp_path}/asked.jsonl" for split in ("train", "dev", "test"))
    words = line(shelf, "reader", tmp_path / "run", f"{files} --no-rerank --steps 1 --top 4")
    table = run(words)["passages"]["test"]
    assert table["retrieved"]["gold"] == {"1": 0.75}
    known = books.Question("q", ["x"], [BOOK[3]._replace(id="another")], found=BOOK[2:5])
    assert books.gold_hits(known) == [False, True, False]
    unanswered = books.replace(known, answers=[])
    assert books.choose_passages(unanswered)[1] == [BOOK[2], BOOK[4]]


def test_two_encoders_in_a_folder_are_a_dual_encoder_and_read_encoder_len_tokens(shelf, tmp_path):
    for name in ("question", "passage"):
        shutil.copytree(shelf / "bert" / "model", tmp_path / "dpr" / name)
    flags = f"--search dense --retriever {tmp_path}/dpr --pooling mean --encoder-len 9"
    dual = openbook.load_dual(train.parse(line(shelf, "reader", tmp_path, flags)[1:]))
    assert dual.question is not dual.passage and (dual.pooling, dual.max_len) == ("mean", 9)
    (tmp_path / "dpr" / "passage" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="passage: no config.json"):
        run(line(shelf, "reader", tmp_path / "run", flags))
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_encoder_answers_nothing(dual):
    with pytest.raises(ValueError, match="retriever trains nothing that answers"):
        load_run(dual)


def test_a_passage_longer_than_the_context_is_dropped_and_counted(shelf, whole):
    args = train.parse(line(shelf, "reader", whole)[1:])
    tokenizer = load_run(whole)[2]
    long = Passage("Anna", "word " * 300, "l")
    q = books.Question("where was Anna born?", ["Velmor"], found=[long, BOOK[0]], scores=[2.0, 1.0])
    _, packed, dropped = reader.pack_inputs(args, tokenizer, 92, [q])
    assert packed == [[BOOK[0]]] and dropped == 1


def test_the_world_has_a_book_of_its_own():
    args = train.parse("--method reader".split())
    book = openbook.load_book(args)
    assert len(book.passages) > 5000 and book.path is None
    for split, count in (("train", 5040), ("dev", 420), ("test", 700)):
        assert len(book.questions[split]) == count
    q = book.questions["dev"][0]
    assert q.positives and all(books.has_answer(q.answers, p.text) for p in q.positives)
    assert q.question.endswith("?") and q.task


# The experiments and the benchmark


FULL = [(row, 9.0 - row / 20) for row in range(100)]
LISTS = [  # ours, a peer's, whether they agree
    ([(3, 2.0), (1, 1.0)], [(3, 2.0), (1, 1.0), (0, 0.0)], True),
    ([(3, 2.0), (1, 2.0)], [(1, 2.0), (3, 2.0)], True),
    ([(3, 2.0), (1, 1.0)], [(3, 2.0), (2, 1.0)], False),
    ([(3, 2.0), (1, 1.0)], [(3, 2.0), (1, 1.1)], False),
    ([(3, 2.0)], [(3, 2.0), (1, 1.0)], False),
    (FULL, [*FULL[:-1], (100, FULL[-1][1])], True),
    (FULL, [*FULL[:-2], (100, FULL[-2][1]), FULL[-1]], False),
]


def test_the_rows_of_the_benchmark_agree_with_the_peers(monkeypatch, shelf, capsys):
    monkeypatch.setattr(bench_retrieval.genres, "library", lambda world: small_world())
    assert bench_retrieval.peak("ours", [p.text for p in BOOK], ["Anna"]) > 0
    monkeypatch.setattr(bench_retrieval, "peak", lambda *_: 1)  # a process each
    rows = bench.main("--tiny --runs 1 --only search --only rerank".split())
    assert all(row["identical"] == 1 for row in rows if "identical" in row)
    # In deviations of the scores: rounding. Another input would make it about 1.
    assert all(row["score_difference"] < 5e-3 for row in rows if "score_difference" in row)
    assert all(row["peer_peak"] == row["peak"] == 1 for row in rows if "peak" in row)
    for ours, theirs, same in LISTS:
        assert bench_retrieval.same_list(ours, *zip(*theirs)) == same, (ours, theirs)
    given = {name: packages for name, (packages, *_) in bench_retrieval.PEERS.items()}
    peers = [name for name, packages in given.items() if all(map(find_spec, packages))]
    indexed = [row["peer"] for row in rows if "index" in row["workload"]]
    assert len(peers) > 1 and indexed == peers
