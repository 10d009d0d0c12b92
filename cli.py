"""The command line that the programs share: parser, kinds of values, groups of flags, errors.

    parser = Parser(prog="train.py")
    add_flags(parser, "model", MODEL, TOKENIZER)    rows of (flag, type or choices, default, help)
    add_training_flags(parser)                      how to train
    add_run_flags(parser)                           where, and on what device
    run_program("train.py", main)                   bad input prints one line and exits with 2

Needs runs.py.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from runs import Run, find, names_file
from show import show


class Parser(argparse.ArgumentParser):
    """A parser whose help shows the defaults and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(
            **options,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse_known_args(self, args: list[str], namespace=None):
        """Parse the flags. An argument that is not UTF-8 is an error."""
        for text in args:
            if any(
                "\ud800" <= letter <= "\udfff" for letter in text
            ):  # how Python reads such bytes
                self.error(f"the argument {text!a} is not UTF-8 text")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Print the message after the program's name, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def number_type(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite number from `low` to `high`, both included."""

    def convert(text: str):
        value = kind(text)
        if low <= value <= high and math.isfinite(value):
            return value
        if high < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")

    convert.__name__ = kind.__name__  # argparse puts it into its messages
    return convert


def add_flags(parser, title: str, *rows):
    """Add and return a group of flags. A row is (flag, type or choices, default, help)."""
    group = parser.add_argument_group(title)
    for flag, kind, default, text in rows:
        if isinstance(kind, list):
            group.add_argument(flag, choices=kind, default=default, help=text)
        else:
            group.add_argument(flag, type=kind, default=default, help=text)
    return group


COUNT = number_type(int, 1)
MODEL = ("--model", str, None, "checkpoint folder or hub id; the embedded LM if not given")
TOKENIZER = ("--tokenizer", str, None, "tokenizer.json or its folder, if not the model's own")
ATTENTION = ("--attention", ["plain", "fused"], "plain", "fused: attention.py, needs CUDA, triton")
WORLD = ("--world-seed", int, 1, "another seed, another world; the embedded LM knows world 1")
PROMPT = ("--prompt-length", COUNT, 20, "P of a prompt (papers: 100 to 400)")
PASSES = ("--passes", number_type(int, 2), 2, "passes of a neural recursion (paper: 2)")
CONNECTORS = ("--connectors", ["shared", "each"], "shared", "one for all gaps, or one in each gap")
PAUSE = ("--pause", number_type(int, 0), 0, "k, filler positions after every question")
filler = "text repeated k times (\\n: a newline), or `trained` for k trained vectors"
PAUSE_TEXT = ("--pause-text", str, r"\nA:", filler)
CONNECTOR = ("--connector-layers", COUNT, 2, "layers of a Connector (paper: 1 and 2)")


def add_training_flags(parser) -> None:
    """The fields of a Recipe except device and dtype, --batch-size and --seed."""
    optimizers = ["adamw", "adafactor", "muon"]
    about = "muon: on linear layers, adamw on the rest; papers: adafactor for prompts"
    add_flags(
        parser,
        "training",
        ("--steps", COUNT, None, "optimiser steps (paper: up to 100,000)"),
        ("--batch-size", COUNT, 32, "questions, or windows of text, in a batch (paper: 32)"),
        ("--grad-accum", COUNT, 1, "batches in a step"),
        ("--lr", number_type(float, 0), None, "peak (papers: 1e-5 to 4e-4; prompts: 0.03 to 0.5)"),
        ("--schedule", ["linear", "constant"], "linear", "after warm-up: down to zero, or level"),
        ("--warmup", number_type(float, 0, 1), 0.005, "fraction of the steps (paper: 0.005)"),
        ("--optimizer", optimizers, "adamw", about),
        ("--weight-decay", number_type(float, 0), 0.1, "of matrices; norms and biases have none"),
        ("--clip", number_type(float, 1e-12), 1.0, "largest gradient norm"),
        ("--eval-every", COUNT, 200, "steps between dev scores; each writes a checkpoint"),
        ("--log-every", COUNT, 10, "steps between lines of metrics.jsonl"),
        ("--seed", number_type(int, 0, 2**63 - 1), 0, "of initialisation and batch order"),
    )


def add_open_book_flags(parser) -> None:
    """The flags of OPEN_BOOK."""
    whole, pools = number_type(int, 0), ["cls", "mean"]
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
        ("--encoder-lr", number_type(float, 0), 3e-4, "reader: of re-rankers (paper: 1e-5)"),
        ("--encoder-len", number_type(int, 8), 256, "tokens an encoder reads (DPR: 256, 350)"),
        ("--group-size", number_type(int, 2), 8, "M, passages of a question (paper: 24)"),
        ("--hard-negatives", whole, 1, "retriever: in a batch for each question (DPR: 1)"),
        ("--context", COUNT, None, "positions that the LM reads, if not its whole context"),
        ("--max-packed", COUNT, None, "most passages that the LM reads; all that fit"),
        ("--tune", ["prompt", "lm"], "prompt", "reader: what learns; lm: the whole LM"),
    )
    group = add_flags(parser, "open book: switches")
    for flag, text in (
        ("--shared-encoder", "retriever: one BERT for questions and passages"),
        ("--no-rerank", "reader: leave the passages in the order of the search"),
        ("--checkpoint-activations", "compute each block twice in training, to save memory"),
    ):
        group.add_argument(flag, action="store_true", help=text)


def add_run_flags(parser) -> None:
    """Where a run lies, how it continues, and on what it computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group = add_flags(
        parser,
        "run",
        ("--out", str, None, "the run's folder; runs/METHOD if not given"),
        ("--device", ["cpu", "cuda"], device, "where to compute"),
        ("--dtype", ["float32", "bfloat16"], None, "arithmetic, frozen weights; CUDA: bfloat16"),
    )
    text = "continue from the last checkpoint in --out, bit for bit on a CPU"
    group.add_argument("--resume", action="store_true", help=text)


def add_late_defaults(
    args: argparse.Namespace, program: str, argv: list[str]
) -> argparse.Namespace:
    """Fill in the defaults that depend on other flags, and remember the command line."""
    args.program, args.argv = program, argv
    args.out = args.out or f"runs/{args.method}"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def check_and_seed(args: argparse.Namespace) -> None:
    """Refuse a device or a folder that cannot be used, and seed the random numbers."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    run = Run.from_args(args)
    run.check()
    record = (run.record() if run.resume else None) or {}
    for key, value in list(vars(args).items()):
        if names_file(key, value):
            setattr(args, key, find(value, run.folder, record))
    torch.manual_seed(args.seed)


def run_program(program: str, main: Callable[[], object]) -> None:
    """Run `main`. Bad input prints one line and exits with 2; SIGINT or SIGTERM, with 130."""

    def show_warning(message, *_, **__):
        show(f"{program}: {message}", "stderr")

    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, and no file of the run may get its number
            setattr(sys, name, open(os.devnull, "w"))
    warnings.showwarning = show_warning  # without the file and line that raised it
    try:
        main()
    except KeyboardInterrupt:
        text = "stopped; the same command with --resume goes on from the last checkpoint"
        show(f"{program}: {text}", "stderr")
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        show(f"{program}: {' '.join(str(error).splitlines())}", "stderr")
        sys.exit(2)
