"""Workloads of bench.py: search and re-ranking of passages.

search  BM25's index, and the 100 best passages of each question, against bm25s (numpy, and numba if
        it is installed) and rank_bm25, on the passages of the world. All get the same words. bm25s
        has the same formula, so its lists must be the same ("identical"). rank_bm25 has another one
        (Okapi), and scores every passage in Python.
rerank  passages of many lengths against CrossEncoder of sentence-transformers, with the same
        weights, of a random BERT in MiniLM's shape

    pip install -r requirements-dev.txt sentence-transformers numba
    python bench.py --only search --only rerank

Tokens a second are questions a second, or passages. Memory is the peak beyond what the process held
before, each in a process of its own.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import genres
import world
from checkpoints import write_json
from contest import Setting, compare, in_new_process, memory, reset_peak, timed
from rerank import Bert, BertConfig, CrossEncoder
from retrieve import BM25, split_words

MINILM = dict(dim=384, n_layers=6, n_heads=12, hidden_dim=1536, max_len=512)
TINY = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_len=128)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOP = 100


# BM25


def index_ours(texts: list[str]) -> Callable:
    """Index texts. Returns a function: questions -> [(row, score)], the best of each."""
    bm25 = BM25(texts)
    return lambda questions: [bm25.search(q, TOP) for q in questions]


def index_bm25s(texts: list[str], backend: str = "numpy") -> Callable:
    """The same with bm25s; the function returns rows and scores apart."""
    import bm25s

    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend=backend)
    peer.index([split_words(text) for text in texts], show_progress=False)
    k = min(TOP, len(texts))

    def search(questions: list[str]) -> tuple[list, list]:
        words = [split_words(question) for question in questions]
        rows, scores = peer.retrieve(words, k=k, show_progress=False)
        return rows.tolist(), scores.tolist()

    return search


def index_rank_bm25(texts: list[str]) -> Callable:
    """The same with rank_bm25, which has another formula."""
    import rank_bm25

    peer = rank_bm25.BM25Okapi([split_words(text) for text in texts], k1=0.9, b=0.4)

    def search(questions: list[str]) -> tuple[list, list]:
        scores = [peer.get_scores(split_words(question)) for question in questions]
        best = [np.argsort(-row)[:TOP] for row in scores]
        return [b.tolist() for b in best], [row[b].tolist() for b, row in zip(best, scores)]

    return search


PEERS = {  # name: (packages, index function, whether its formula is ours)
    "bm25s numpy": (["bm25s"], index_bm25s, True),
    "bm25s numba": (["bm25s", "numba"], lambda texts: index_bm25s(texts, "numba"), True),
    "rank_bm25": (["rank_bm25"], index_rank_bm25, False),
}


def search(setting: Setting) -> Iterator[dict]:
    """Rows of the index and of the search for each peer."""
    texts, questions = passages(setting)
    ours_peak = peak("ours", texts, questions)
    for name, (packages, index, same_formula) in PEERS.items():
        if missing := [package for package in packages if find_spec(package) is None]:
            yield {"workload": f"BM25 against {name}", "missing": missing}
            continue
        index(texts)(questions[:1])  # numba compiles
        indexing, searching = [], []
        for _ in range(setting.runs):
            (ours, expected), (theirs, found) = (
                measure(make, texts, questions) for make in (index_ours, index)
            )
            indexing.append((ours[0], theirs[0]))
            searching.append((ours[1], theirs[1]))
        row = {"workload": f"BM25 index of {len(texts):,} passages", "peer": name}
        yield row | compare(indexing)
        row = {"workload": f"BM25, {len(questions):,} questions", "peer": name} | compare(searching)
        row["tokens_per_second"] = len(questions) / row["seconds"]
        row["peer_tokens_per_second"] = len(questions) / row["peer_seconds"]
        row["peak"], row["peer_peak"] = ours_peak, peak(name, texts, questions)
        if same_formula:
            row["identical"] = sum(map(same_list, expected, *found)) / len(questions)
        yield row


def passages(setting: Setting) -> tuple[list[str], list[str]]:
    """The passages of the world as texts, and the test questions about them."""
    book, questions = genres.library(world.make(1))
    texts = [f"{passage['title']} {passage['text']}" for passage in book]
    asked = [question["question"] for question in questions["test"]]
    return (texts[:200], asked[:3]) if setting.tiny else (texts, asked)


def measure(make: Callable, texts: list[str], questions: list[str]) -> tuple[list[float], object]:
    """The seconds of an index and of its search, and what it finds."""
    start = time.perf_counter()
    ask = make(texts)
    middle = time.perf_counter()
    found = ask(questions)
    return [middle - start, time.perf_counter() - middle], found


def same_list(ours: list, rows: list[int], scores: list[float]) -> bool:
    """Whether a peer has the same passages with the same scores, to rounding.

    It fills its list with passages of score 0, and may choose others that tie for the last place.
    """
    theirs = {row: score for row, score in zip(rows, scores) if score > 0}
    last = ours[-1][1] + 1e-4 if len(ours) == TOP else 0.0
    sure = [(row, score) for row, score in ours if score > last]
    near = all(abs(theirs.get(row, np.inf) - score) < 1e-4 for row, score in sure)
    return len(ours) == len(theirs) and near


def peak(name: str, texts: list[str] | str, asked: list) -> int:
    """Bytes at the peak of indexing and searching, or of one of SCORERS, in a fresh process."""
    code = "import bench_retrieval; bench_retrieval.measure_peak()"
    return int(in_new_process(code, json.dumps([name, texts, asked])))


def measure_peak() -> None:
    """What `peak` starts: reads its task from stdin, prints the bytes."""
    name, texts, asked = json.loads(sys.stdin.read())
    if name in SCORERS:
        score = SCORERS[name](texts)  # the folder of the weights, which do not count
        score(asked[:1])
        before = memory("VmRSS")
        reset_peak()
        score(asked)
    else:
        index = index_ours if name == "ours" else PEERS[name][1]
        index(texts[:10])(asked[:1])  # imports and compiled code do not count
        before = memory("VmRSS")
        reset_peak()
        index(texts)(asked)
    print(memory("VmHWM") - before)


# Re-ranking


def write_random_encoder(folder: Path, texts: list[str], shape: dict) -> None:
    """A random cross-encoder with a WordPiece tokenizer of the texts, as a published folder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=8000, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    bert = Bert(BertConfig(tokenizer.get_vocab_size(), **shape))
    CrossEncoder(bert, tokenizer, "classifier").save(folder)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {"tokenizer_class": "BertTokenizerFast", "model_max_length": shape["max_len"]}
    write_json(folder / "tokenizer_config.json", config | dict(zip(names, SPECIAL)))


def scores_ours(folder: str) -> Callable:
    """Load a cross-encoder. Returns a function: [(question, passages)] -> all scores."""
    encoder = CrossEncoder.from_pretrained(folder)
    return lambda asked: torch.cat(encoder.score_all(*zip(*asked))).numpy()


def scores_of_peer(folder: str) -> Callable:
    """The same with sentence-transformers."""
    from sentence_transformers import CrossEncoder as Peer

    peer = Peer(folder, device="cpu")

    def score(asked: list) -> np.ndarray:
        pairs = [(question, text) for question, passages in asked for text in passages]
        return peer.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)

    return score


SCORERS = {"re-rank": scores_ours, "re-rank, peer": scores_of_peer}


def rerank(setting: Setting) -> Iterator[dict]:
    """The row of the cross-encoder."""
    if find_spec("sentence_transformers") is None:
        yield {"workload": "re-ranking", "missing": ["sentence_transformers"]}
        return
    texts, questions = passages(setting)
    rng, asked = np.random.default_rng(0), []
    for question in questions[: 2 if setting.tiny else 8]:
        lengths = rng.integers(1, 9, 10 if setting.tiny else 50)  # texts joined: ragged
        asked.append((question, [" ".join(rng.choice(texts, length)) for length in lengths]))
    with tempfile.TemporaryDirectory() as folder:
        write_random_encoder(Path(folder), texts, TINY if setting.tiny else MINILM)
        sides = [score_with(folder) for score_with in SCORERS.values()]
        peaks = [peak(name, folder, asked) for name in SCORERS]
    scores, theirs = (side(asked) for side in sides)  # this is also the warm-up
    seconds = [tuple(timed(lambda s=s: s(asked)) for s in sides) for _ in range(setting.runs)]
    row = {"workload": f"re-rank {len(scores)} passages", "peer": "sentence-transformers"}
    row |= compare(seconds)
    row["score_difference"] = (np.abs(scores - theirs).max() / scores.std()).item()  # in deviations
    row["tokens_per_second"] = len(scores) / row["seconds"]
    row["peer_tokens_per_second"] = len(scores) / row["peer_seconds"]
    row["peak"], row["peer_peak"] = peaks
    yield row


WORKLOADS = {f.__name__: f for f in (search, rerank)}
