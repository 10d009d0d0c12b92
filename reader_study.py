"""The runs behind the tables of the frozen reader: Levine et al. 2022, section 3, tables 2 and 3.

    python reproduce.py reader

trains, in runs/reader, a dual encoder, and for each search the re-rankers and readers of RUNS. A
run that is complete is not done again, and one that was stopped goes on. Runs that differ in their
prompt alone share their passages: they start from the ranked passages of another run.
"""

from pathlib import Path

from show import show, show_table

import train
from runs import read_record

RUNS = {  # name: (flags, the run whose ranked passages it reads); the first runs are table 2
    "bm25": ("--no-rerank", None),
    "bm25-reranked": ("", None),
    "dense": ("--search dense --no-rerank", None),
    "dense-reranked": ("--search dense", None),
    "hybrid": ("--search hybrid --no-rerank", None),
    "hybrid-reranked": ("--search hybrid", None),
    "not-cross-fitted": ("--reranker {bm25-reranked}/reranker", None),
    "closed-book": ("--top 0", None),
    "fine-tuned-bm25": ("--tune lm --lr 3e-4 --no-rerank", "bm25"),
    "fine-tuned-reranked": ("--tune lm --lr 3e-4 --no-rerank", "bm25-reranked"),
    "fine-tuned-closed-book": ("--tune lm --lr 3e-4 --top 0", None),
}
REPEATED = ("bm25", "bm25-reranked", "not-cross-fitted")  # with other seeds of the prompt


def readers(args) -> dict:
    """Recall at the LM's input and EM, by search, re-ranking, cross-fitting and what is tuned."""
    folder = Path(args.out) / "reader"
    dual = folder / "retriever"
    encoder = ["--encoder", args.encoder] if args.encoder else []
    shared = ["--world-seed", str(args.world_seed), *encoder]
    flags = ["--method", "retriever", "--steps", str(args.encoder_steps)]
    retriever = trained(dual, [*flags, *shared])
    shared += ["--top", str(args.top), "--context", str(args.context), "--steps", str(args.steps)]
    shared += ["--encoder-steps", str(args.encoder_steps), "--retriever", str(dual)]
    shared += ["--model", args.model] if args.model else []
    results = {"retriever": retriever["results"]}
    for name, (own, source) in RUNS.items():
        for seed in range(args.seeds if name in REPEATED else 1):
            out = folder / (name if seed == 0 else f"{name}-{seed}")
            read_from = source or (name if seed else None)
            places = {run: folder / run for run in RUNS}
            flags = [word.format_map(places) for word in own.split()]
            if seed:
                flags = ["--no-rerank"]
            if read_from:
                flags += ranked_files(folder / read_from, folder / "bm25" / "passages.jsonl")
            record = trained(out, ["--method", "reader", *shared, *flags, "--seed", str(seed)])
            results[out.name] = row(record)
    scored = {name: part for name, part in results.items() if "dev EM" in part}
    columns = list(dict.fromkeys(key for part in scored.values() for key in part))
    table = [[name, *(part.get(key, "") for key in columns)] for name, part in scored.items()]
    show_table("what the LM reads, and its answers", ["", *columns], table)
    compared = read_record(folder / "bm25-reranked")
    results["cross-fitting"] = compared["passages"]["cross-fitting"]
    results["seconds per question"] = compared["seconds_per_question"]
    for key in ("cross-fitting", "seconds per question"):
        show(f"{key}: {results[key]}")
    return results


def ranked_files(run: Path, book: Path) -> list[str]:
    """The flags that start from what another run retrieved and ranked."""
    place = run / ("ranked" if (run / "ranked").is_dir() else "retrieved")
    flags = ["--passages", str(book)]
    for split in ("train", "dev", "test"):
        flags += [f"--{split}", str(place / f"{split}.jsonl")]
    return flags


def trained(out: Path, flags: list[str]) -> dict:
    """The record of a run of train.py, made if it is missing."""
    record = read_record(out) if (out / "run.json").is_file() else {}
    whole = "results" in record and (
        "--top 0" in " ".join(flags) or "retriever" in flags or "seconds_per_question" in record
    )
    return record if whole else train.main([*flags, "--out", str(out), "--resume"])


def row(record: dict) -> dict:
    """The columns of one run, in percent: of dev, and the EM of test."""
    table = {}
    for split in ("dev", "test"):
        read = record.get("passages", {}).get(split, {}).get("input", {})
        for key in ("answer", "gold"):
            if key in read and read["passages"]:
                table[f"{split} {key} at the input"] = round(100 * read[key], 1)
        if read:
            table[f"{split} passages"] = round(read["passages"], 1)
        table[f"{split} EM"] = round(100 * record["results"][split]["em"], 1)
    return table
