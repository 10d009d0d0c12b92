"""The flags that programs share, in groups: their types, their defaults, what is checked first.

    parser = Parser(prog="train.py")                of show.py
    add_flags(parser, "model", MODEL, TOKENIZER)    a group of flags; see there
    add_model_flags(parser)                         the LM, and what is trained around it
    add_data_flags(parser)                          the questions and their scores
    add_training_flags(parser)                      how to train
    add_recursion_flags, add_open_book_flags        of single methods
    add_run_flags(parser)                           where, and on what device

Needs runs.py.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from show import COUNT, SEED, number_type

import torch

import parallel
from runs import Run, find, names_file, read_record


def add_flags(parser, title: str, *rows) -> None:
    """Add a group of flags. A row is (flag, type or choices, default, help); bool is a switch."""
    group = parser.add_argument_group(title)
    for flag, kind, default, text in rows:
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text)
        elif isinstance(kind, list):
            group.add_argument(flag, choices=kind, default=default, help=text)
        else:
            group.add_argument(flag, type=kind, default=default, help=text)


MODEL = ("--model", str, None, "checkpoint folder or hub id; the embedded LM if not given")
TOKENIZER = ("--tokenizer", str, None, "tokenizer.json or its folder, if not the model's own")
KERNELS = "fused: the kernels of attention.py, the default for a --model on CUDA with triton"
ATTENTION = ("--attention", ["plain", "fused"], None, KERNELS)
BASE_DTYPE = ("--base-dtype", ["int8"], None, "of the frozen LM's matrices; --dtype if not given")
BELOW_1 = number_type(float, 0, 0.999999)
CORES = number_type(int, 1, 1024)  # torch crashes with 100,000 threads
THREADS = ("--threads", CORES, None, "of the CPU; if not given OMP_NUM_THREADS, else one a core")
WORLD = ("--world-seed", int, 1, "another seed, another world; the embedded LM knows world 1")
PROMPT = ("--prompt-length", COUNT, 20, "P of a prompt (papers: 100 to 400)")
PASSES = ("--passes", number_type(int, 2, 10_000), 2, "passes of a neural recursion (paper: 2)")
CONNECTORS = ("--connectors", ["shared", "each"], "shared", "one for all gaps, or one in each gap")
PAUSE = ("--pause", number_type(int, 0), 0, "k, how often --pause-text follows every question")
PAUSE_TEXT = ("--pause-text", str, r"\nA:", "what --pause repeats (\\n: a newline)")
VECTORS = "train a vector in place of each token of that text; it starts as the token's embedding"
PAUSE_TRAINED = ("--pause-trained", bool, False, VECTORS)
ANSWERS = (
    ("--max-new-tokens", COUNT, 16, "longest answer"),
    ("--stop", str, None, "ends an answer; a newline for questions if not given, '' for none"),
    ("--eval-limit", COUNT, 240, "dev questions scored along training; the end scores all"),
    ("--eval-tokens", COUNT, 8192, "tokens in a batch of evaluation, options included"),
    ("--rank-by", ["sum", "mean"], "sum", "of an answer choice's log-probabilities"),
)
SIZE = number_type(int, 1, 10_000)  # of what is made piece by piece
CONNECTOR = ("--connector-layers", SIZE, 2, "layers of a Connector (paper: 1 and 2)")


def add_model_flags(parser) -> None:
    """The LM, what is trained around it, and where that starts."""
    init = (
        "folder of a trained adapter to start from, or random; if neither this nor --model is "
        "given, the Connector of this method and size in assets/, if any; prompts: also "
        "vocab:SIZE (embeddings sampled among the first SIZE tokens; the default, with 5000), "
        "labels (of training answers), text:WORDS"
    )
    residual = "on: a Connector's output is added to what it would replace (paper: off)"
    shard = "of n processes each keeps 1/n of the frozen LM: torchrun --nproc-per-node n train.py"
    add_flags(
        parser,
        "model",
        MODEL,
        TOKENIZER,
        ("--init", str, None, init),
        PROMPT,
        ("--placement", ["before_bos", "after_bos"], "before_bos", "of prompt_tuning's prompt"),
        ("--reparam-dim", COUNT, None, "deep_prompt: width of an MLP in training (paper: 512)"),
        ("--encoder", str, None, "id_pt: a T5 encoder; open book: a BERT; else that of assets/"),
        ("--encoder-prompt", SIZE, 20, "id_pt: the encoder's own prompt (paper: about 430)"),
        CONNECTOR,
        ("--residual", ["on", "off"], "on", residual),
        BASE_DTYPE,
        ATTENTION,
        PASSES,
        CONNECTORS,
        ("--shard", bool, False, shard),
    )


def add_data_flags(parser) -> None:
    """The questions of each split, how they are mixed, and how their answers are scored."""
    files = (
        "JSONL of questions, a folder of TASK-train.jsonl, or the word suite for the embedded "
        "suite of prompted tasks; the questions of the embedded world if not given"
    )
    cap = (
        "mix tasks as T0: an epoch has the examples of a template, or if they are more than this, "
        "this over the number of templates (T0: 500,000; suite: 500; no mixing if not given)"
    )
    each = "train a prompt for each task of --train, all in the same batches; they lie in OUT/TASK"
    add_flags(
        parser,
        "data",
        ("--train", str, None, files),
        ("--mixture-cap", COUNT, None, cap),
        ("--dev", str, None, "questions that choose the best parameters"),
        ("--test", str, None, "questions that are scored once, at the end"),
        WORLD,
        PAUSE,
        PAUSE_TEXT,
        PAUSE_TRAINED,
        *ANSWERS,
        ("--per-task", bool, False, each),
    )


def add_recursion_flags(parser) -> None:
    """How often and how the LM reads its own output."""
    whole = "sample for training questions with a prompt that has seen them (the paper's way); "
    whole += "reader: re-rank them with a re-ranker that has seen them (the paper cross-fits)"
    add_flags(
        parser,
        "textual recursion",
        ("--candidates", COUNT, 16, "answers sampled for each question (paper: 1 to 64)"),
        ("--rounds", COUNT, 1, "of sampling; a later one reads the candidates of the one before"),
        ("--stages-from", str, None, "a run with the same p1, to be copied and not trained again"),
        ("--no-cross-fit", bool, False, whole),
    )
    keep = "GB of memory for the first pass's states, which are the same in every epoch; 0 for "
    keep += "none. If not given: 1, and with --pause-trained 0, since they change"
    add_flags(parser, "recursion", ("--cache-first-pass", number_type(float, 0), None, keep))


def add_training_flags(parser) -> None:
    """--batch-size, --seed, and the fields of a Recipe but device and dtype."""
    optimizers = ["adamw", "adafactor", "muon"]
    about = "muon: on linear layers, adamw on the rest; papers: adafactor for prompts"
    rate = "peak (papers: 1e-5 to 4e-4; prompts: 0.03 to 0.5). If not given: for a soft prompt a "
    rate += "quarter of the standard deviation of the LM's token embeddings, for a deep prompt 1 "
    rate += "over the square of its number of layers"
    add_flags(
        parser,
        "training",
        ("--steps", COUNT, None, "optimiser steps (LM recursion: up to 100,000)"),
        ("--batch-size", COUNT, 32, "questions or windows of all processes (prompt tuning: 32)"),
        ("--grad-accum", COUNT, 1, "batches in a step"),
        ("--lr", number_type(float, 0), None, rate),
        ("--schedule", ["linear", "constant"], "linear", "after warm-up: down to zero, or level"),
        ("--warmup", number_type(float, 0, 1), 0.005, "fraction of the steps (paper: 0.005)"),
        ("--optimizer", optimizers, "adamw", about),
        ("--weight-decay", number_type(float, 0), 0.1, "of matrices; norms and biases have none"),
        ("--beta2", BELOW_1, 0.95, "of adamw (paper: 0.95; prompt tuning: 0.999)"),
        ("--clip", number_type(float, 1e-12), 1.0, "largest gradient norm"),
        ("--eval-every", COUNT, 200, "steps between dev scores; each writes a checkpoint"),
        ("--log-every", COUNT, 10, "steps between lines of metrics.jsonl"),
        ("--seed", SEED, 0, "of initialisation and batch order"),
    )


def add_open_book_flags(parser) -> None:
    """What a reader reads, how its passages are found and sorted, and how encoders learn."""
    whole, pools = number_type(int, 0), ["cls", "mean"]
    rate = "reader: of re-rankers (paper: 1e-5); if not given 2e-3, with --encoder 1e-4"
    twice = "compute each block twice in training, to save memory"
    order = "reader: by the re-ranker's score (paper), or by it and the search's, weighted on dev"
    add_flags(
        parser,
        "open book: retriever, reranker, reader",
        ("--passages", str, None, "psgs_w100.tsv, JSON lines of passages, or a retrieval result"),
        ("--search", ["bm25", "dense", "hybrid"], "bm25", "how passages are found"),
        ("--retriever", str, None, "dense, hybrid: run of --method retriever, or a published BERT"),
        ("--pooling", pools, "cls", "vector of a dual encoder (DPR: cls; published MiniLM: mean)"),
        ("--top", whole, 100, "passages found for a question (paper: 100); 0: closed book"),
        ("--reranker", str, None, "reader: a trained cross-encoder; if not given, it trains them"),
        ("--encoder-steps", COUNT, 1500, "reader: steps of each re-ranker (paper: 30,000)"),
        ("--encoder-lr", number_type(float, 0), None, rate),
        ("--encoder-len", number_type(int, 8), 256, "tokens an encoder reads (DPR: 256, 350)"),
        ("--group-size", number_type(int, 2), 8, "M, passages of a question (paper: 24)"),
        ("--hard-negatives", whole, 1, "retriever: in a batch for each question (DPR: 1)"),
        ("--context", COUNT, None, "positions that the LM reads, if not its whole context"),
        ("--max-packed", COUNT, None, "most passages that the LM reads; if not given all that fit"),
        ("--tune", ["prompt", "lm"], "prompt", "reader: what learns; lm: the whole LM"),
        ("--shared-encoder", bool, False, "retriever: one BERT for questions and passages"),
        ("--no-rerank", bool, False, "reader: leave the passages in the order of the search"),
        ("--sort-by", ["reranker", "both"], "reranker", order),
        ("--checkpoint-activations", bool, False, twice),
    )


def add_run_flags(parser) -> None:
    """Where a run lies, how it continues, and on what it computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "arithmetic and frozen weights; on CUDA bfloat16, else float32, if not given; auto: "
    dtype += "bfloat16 if it is faster here"
    compiles = "compile the LM's layers (torch.compile) for training steps, but not the reading of "
    compiles += "a prompt: a minute for faster steps"
    resume = "continue from the last checkpoint in --out, on a CPU with as many threads bit for "
    resume += "bit; with torchrun, --shard and the number of processes may be others now"
    add_flags(
        parser,
        "run",
        ("--out", str, None, "the run's folder; if not given, that of the method in runs/"),
        ("--device", ["cpu", "cuda"], device, "where to compute"),
        ("--dtype", ["float32", "bfloat16", "auto"], None, dtype),
        THREADS,
        ("--compile", bool, False, compiles),
        ("--resume", bool, False, resume),
    )


def add_late_defaults(args, program: str, argv: list[str]) -> argparse.Namespace:
    """Fill in the defaults that depend on other flags, and remember the command line."""
    args.program, args.argv = program, argv
    args.out = args.out or f"runs/{args.method}"
    if args.dtype == "auto":
        args.dtype = started(args, "dtype") or fastest_dtype(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if "cache_first_pass" in args and args.cache_first_pass is None:
        args.cache_first_pass = 0.0 if args.pause_trained else 1.0
    if "attention" in args:
        default = default_attention(args.device, getattr(args, "model", None))
        args.attention = args.attention or started(args, "attention") or default
    return args


def default_attention(device: str, model: str | None) -> str:
    """fused, if the device can run Triton's kernels, else plain. Without --model the LM is so small
    that they take longer to launch than to compute, and plain attention is faster."""
    return "fused" if model and device == "cuda" and find_spec("triton") else "plain"


def started(args: argparse.Namespace, key: str) -> str | None:
    """An argument of the run that --resume continues, or None if there is none. A choice that was
    left to the program stays as it was, even if another one is faster now, on a busy machine."""
    if not (getattr(args, "resume", False) and (Path(args.out) / "run.json").is_file()):
        return None
    return read_record(args.out)["arguments"].get(key)


def fastest_dtype(device: str) -> str:
    """bfloat16 if the device multiplies such matrices at least 1.2 times as fast, else float32.

    This is measured: not every processor with instructions for bfloat16 gains by them.
    """
    seconds = {dtype: matmul_seconds(dtype, device) for dtype in ("float32", "bfloat16")}
    return "bfloat16" if 1.2 * seconds["bfloat16"] < seconds["float32"] else "float32"


def matmul_seconds(dtype: str, device: str) -> float:
    """How long the product of two matrices of 512 x 512 takes, the median of about 0.2 seconds."""
    from torch.utils.benchmark import Timer

    x = torch.randn(512, 512).to(device, getattr(torch, dtype))
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2).median


def check_and_seed(args: argparse.Namespace) -> None:
    """Refuse a device or a folder that cannot be used, and seed the random numbers."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if parallel.launched() > 1:
        start_processes(args)
    if getattr(args, "init", None) == "text:":
        raise ValueError(f"--init {args.init!r} names nothing to start from")
    run = Run.from_args(args)
    run.check()
    record = (run.record() if run.resume else None) or {}
    for key, value in list(vars(args).items()):
        if names_file(key, value):
            setattr(args, key, find(value, run.folder, record))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def start_processes(args: argparse.Namespace) -> None:
    """Connect the processes that torchrun started. ValueError if they cannot share the work."""
    count = parallel.launched()
    if args.program not in ("train.py", "pretrain.py"):
        raise ValueError(f"{count} processes: {args.program} does not share its work among them")
    if args.batch_size < count:
        raise ValueError(f"--batch-size {args.batch_size}: fewer rows than the {count} processes")
    parallel.start(args.device)
    args.dtype = parallel.divide(lambda _: [args.dtype], [0])[0]  # auto: the first's choice
