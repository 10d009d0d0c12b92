"""Retrieval and re-ranking beside the peers, in one run: BM25 and the cross-encoder.

bm25    indexing, and the 100 best passages of each question, against bm25s (numpy, and numba if it
        is installed) and rank_bm25. All get the same words. bm25s has the same formula, so its
        lists must be the same. rank_bm25 has another one (Okapi), and scores every passage in
        Python.
rerank  passages a second against CrossEncoder of sentence-transformers, with the same weights, of
        a random BERT in MiniLM's shape, on passages of many lengths

pip install -r requirements-dev.txt sentence-transformers numba
python bench.py retrieval                      on the passages of the embedded world
python bench.py retrieval --passages psgs_w100.tsv --questions nq-dev.jsonl

Each row is our time, the peer's, and how many times ours it is. Memory is the peak beyond what the
process held before, each in a process of its own.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from show import Parser, show

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import cli
from checkpoints import write_json
from contest import in_new_process, memory, reset_peak
from openbook import load_book
from rerank import Bert, BertConfig, CrossEncoder
from retrieve import BM25, split_words

MINILM = dict(dim=384, n_layers=6, n_heads=12, hidden_dim=1536, max_len=512)
TINY = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_len=128)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOP = 100


def timed(function: Callable, argument) -> tuple[float, object]:
    """Seconds that function(argument) takes, and what it returns."""
    start = time.perf_counter()
    result = function(argument)
    return time.perf_counter() - start, result


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


def bm25_rows(texts: list[str], questions: list[str], runs: int):
    """Yield a row for each peer."""
    ours_peak = peak("ours", texts, questions)
    for name, (packages, index, same_formula) in PEERS.items():
        if missing := [package for package in packages if find_spec(package) is None]:
            show(f"bm25 against {name}: {', '.join(missing)} is not installed")
            continue
        seconds = {key: [] for key in ("index", "peer index", "search", "peer search")}
        index(texts)(questions[:1])  # numba compiles
        for _ in range(runs):
            for who, make in (("", index_ours), ("peer ", index)):
                spent, search = timed(make, texts)
                seconds[f"{who}index"].append(spent)
                spent, found = timed(search, questions)
                seconds[f"{who}search"].append(spent)
                if not who:
                    expected = found
        row = {"workload": f"bm25, {len(texts):,} passages, against {name}"}
        row |= {key: statistics.median(values) for key, values in seconds.items()}
        row["index ratio"] = row["peer index"] / row["index"]
        row["search ratio"] = row["peer search"] / row["search"]
        row["queries per second"] = len(questions) / row["search"]
        row["peak"], row["peer peak"] = ours_peak, peak(name, texts, questions)
        if same_formula:
            row["equal lists"] = sum(map(same_list, expected, *found)) / len(questions)
        yield row


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


def rerank_rows(texts: list[str], questions: list[str], runs: int, tiny: bool):
    """Yield the row of the cross-encoder."""
    if find_spec("sentence_transformers") is None:
        show("rerank: sentence-transformers is not installed")
        return
    rng, asked = np.random.default_rng(0), []
    for question in questions[: 2 if tiny else 8]:
        lengths = rng.integers(1, 9, 10 if tiny else 50)  # texts joined: ragged, as passages are
        asked.append((question, [" ".join(rng.choice(texts, length)) for length in lengths]))
    with tempfile.TemporaryDirectory() as folder:
        write_random_encoder(Path(folder), texts, TINY if tiny else MINILM)
        sides = [score_with(folder) for score_with in SCORERS.values()]
        peaks = [peak(name, folder, asked) for name in SCORERS]
    scores, theirs = (side(asked) for side in sides)  # this is also the warm-up
    seconds = [[timed(side, asked)[0] for side in sides] for _ in range(runs)]
    row = {"workload": f"rerank {len(scores)} passages"}
    row["score difference"] = (np.abs(scores - theirs).max() / scores.std()).item()  # in deviations
    row["score"], row["peer score"] = (statistics.median(side) for side in zip(*seconds))
    row["ratio"] = statistics.median(b / a for a, b in seconds)
    row["passages per second"] = len(scores) / row["score"]
    row["peak"], row["peer peak"] = peaks
    yield row


def main(argv: list[str]) -> list[dict]:
    """Measure, print and return the rows."""
    parser = Parser(prog="bench.py retrieval", description=__doc__.split("\n")[0])
    cli.add_flags(
        parser,
        "retrieval",
        ("--passages", str, None, "passages to search; those of the embedded world if not given"),
        ("--questions", str, None, "the questions to ask, if passages are given"),
        ("--runs", cli.COUNT, 5, "timed pairs of a row"),
        cli.WORLD,
        ("--tiny", bool, False, "a small part, which measures nothing"),
    )
    args = parser.parse_args(argv)
    args.train, args.seed = args.questions, 0
    args.dev = args.test = None
    args.method = "retriever"  # which questions load_book keeps
    torch.manual_seed(0)
    book = load_book(args)
    texts = [f"{p.title} {p.text}" for p in book.passages]
    asked = book.questions["test"] or book.questions["train"]
    questions = [q.question for q in asked][: 3 if args.tiny else 1000]
    texts = texts[:200] if args.tiny else texts
    rows = []
    found = bm25_rows(texts, questions, args.runs)
    for row in chain(found, rerank_rows(texts, questions, args.runs, args.tiny)):
        rows.append(row)
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        show(json.dumps(values), result=True)
    return rows
