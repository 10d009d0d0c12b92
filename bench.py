"""Speed and memory beside the peers, measured in one run.

    pip install -r requirements-dev.txt
    python bench.py                     every workload; PEFT and transformers are used if installed
    python bench.py --only prompt       one workload; --tiny runs every row in seconds
    python bench.py --device cuda       the same on a GPU, in bf16
    python bench.py --model HuggingFaceTB/SmolLM2-135M --only prompt --only generation
                                        this LM in place of those of the table

    python bench.py plan --method neural_recursion --model EleutherAI/pythia-1b
                                        what this command of train.py would need: see plan.py
    python bench.py attention --device cuda
                                        attention.py beside PyTorch's attention, shape by shape

bench_train.py, bench_generate.py, bench_processes.py and bench_retrieval.py describe the workloads,
contest.py the columns: "by operations" is its operations_ratio, and "of rate" its share.
"""

import argparse
import json
import sys
import warnings

from show import Parser, run_program, show, show_row

import torch

import bench_attention
import bench_generate
import bench_processes
import bench_retrieval
import bench_train
import cli
import plan
import start
from contest import Contest, Setting, measure

WORKLOADS = bench_train.WORKLOADS | bench_generate.WORKLOADS | bench_processes.WORKLOADS
WORKLOADS |= bench_retrieval.WORKLOADS
COMMANDS = {"plan": plan, "attention": bench_attention}
COLUMNS = ["workload", "ours", "peer", "ratio", "by operations", "floor", "of rate", "tokens/s"]
COLUMNS += ["peer's", "memory", "peer's memory", "notes"]


def main(argv: list[str] | None = None):
    """Measure, print and return the rows, or run another command of this program."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in COMMANDS:
        return COMMANDS[argv[0]].main(argv[1:])
    args = parse(argv)
    warnings.simplefilter("ignore")  # the peers' about versions to come
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    attend = start.choose_attention(args)
    setting = Setting(args.runs, args.tiny, args.device, getattr(torch, dtype), args.model, attend)
    rows, missing = [], set()
    if not args.json:
        show_row(COLUMNS, result=True)
        show_row(["---"] * len(COLUMNS), result=True)
    for workload in args.only or WORKLOADS:
        for found in WORKLOADS[workload](setting):
            for row in measure(found) if isinstance(found, Contest) else [found]:
                missing |= set(row.pop("missing", ()))
                rows.append(row)
                if args.json:
                    show(json.dumps(row), result=True)
                else:
                    show_row(cells(row), result=True)
    if missing:
        text = f"not installed: {', '.join(sorted(missing))} (pip install -r requirements-dev.txt "
        text += "sentence-transformers numba)"
        show(text, "stderr")
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. A bad flag exits with status 2, a missing GPU is a ValueError."""
    description = "Speed and memory beside the peers, in one run. `bench.py plan` with flags of "
    description += "train.py estimates the memory and the operations of a run instead."
    parser = Parser(prog="bench.py", description=description)
    text = "the rows of this workload; may be given several times; all if not given"
    parser.add_argument("--only", choices=WORKLOADS, action="append", help=text)
    dtype = ("--dtype", ["float32", "bfloat16"], None, "bfloat16 on CUDA, else float32")
    tiny = "tiny shapes, which show that every row runs and measure nothing"
    cli.add_flags(
        parser,
        "measurement",
        ("--runs", cli.COUNT, 5, "rounds, in each of which every contestant takes a step"),
        (
            "--model",
            str,
            None,
            "LM of training steps and generation; if not given, the embedded one and others",
        ),
        ("--device", ["cpu", "cuda"], "cpu", "where to compute"),
        dtype,
        cli.THREADS,
        cli.ATTENTION,
        ("--tiny", bool, False, tiny),
        ("--json", bool, False, "print JSON lines instead of a table"),
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    args.attention = args.attention or cli.default_attention(args.device, args.model)
    return args


def cells(row: dict) -> list[str]:
    """The columns of a row. What was not measured is empty."""

    def cell(key: str, pattern: str, scale: float = 1.0, unit: str = "") -> str:
        return "" if row.get(key) is None else format(scale * row[key], pattern) + unit

    ratio = cell("ratio", ".2f")
    if ratio:
        low, high = row["spread"]
        ratio += f" ({low:.2f} to {high:.2f})"
    peer = f"{row['peer']}: {cell('peer_seconds', ',.0f', 1e3, ' ms')}" if "peer" in row else ""
    notes = [
        f"{name} {cell(key, pattern)}"
        for key, name, pattern in (
            ("loss_difference", "losses differ by", ".0e"),
            ("identical", "identical:", ".0%"),
            ("ours_peak_over_weights", "peak over weights", ".2f"),
            ("peer_peak_over_weights", "the peer's", ".2f"),
            ("score_difference", "scores differ by", ".0e"),
            ("outside", "not forward and backward", ".1%"),
        )
        if key in row
    ]
    return [
        row["workload"],
        cell("seconds", ",.0f", 1e3, " ms"),
        peer,
        ratio,
        cell("operations_ratio", ".2f"),
        cell("floor", ",.1f", 1e3, " ms"),
        cell("share", ".0%"),
        cell("tokens_per_second", ",.0f"),
        cell("peer_tokens_per_second", ",.0f"),
        cell("peak", ",.0f", 1e-6, " MB"),
        cell("peer_peak", ",.0f", 1e-6, " MB"),
        ", ".join(notes),
    ]


if __name__ == "__main__":
    run_program("bench.py", main)
