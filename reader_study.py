"""The frozen reader: every run of the study, its cost, and which orderings hold.

Counterparts of tables 2 and 3 of Levine et al. 2022, "Standing on the Shoulders of Giant Frozen
Language Models", on the embedded world, and the controls that the paper leaves out. GROUPS lists
the runs, the most important first. study.py makes them, in runs/reader. Rows that differ only in
the prompt or the LM read the same ranked passages, those of one run's seed 0. So deviations over
seeds and intervals are those of training the prompt, not of the choice of halves or of training
re-rankers. New questions to such a run are searched and not re-ranked.

    python reproduce.py reader --plan       the cost sheet
    python reproduce.py reader              all runs, or what is missing of them, and the tables

Two processes can share the work: start the second command twice, each with OMP_NUM_THREADS=1. On a
GPU, add --flags="--device cuda --dtype float32 --attention plain".
"""

from pathlib import Path

from show import show, show_table

import train
from cost import conduct
from passages import Question, answer_hits, read_passages, read_questions
from runs import read_predictions
from study import Job, Row, Study, cell, show_orderings
from world import SPLITS

# The runs

READER, CLOSED = "train.py --method reader", "train.py --method reader --top 0"
SEARCH = f"{READER} --retriever {{out}}/retriever-0 --search"
DENSE, HYBRID = f"{SEARCH} dense", f"{SEARCH} hybrid"
SEARCHED = {  # runs that search: command. --sort-by reranker is the default
    "bm25-reranked": READER,
    "bm25": f"{READER} --no-rerank",
    "hybrid-reranked": HYBRID,
    "dense-reranked": DENSE,
    "hybrid": f"{HYBRID} --no-rerank",
    "dense": f"{DENSE} --no-rerank",
    "not-cross-fitted": f"{READER} --reranker {{out}}/bm25-reranked-0/reranker",
}
MIXED = {f"{kind}-mixed": f"{kind}-reranked" for kind in ("bm25", "dense", "hybrid")}
PLACES = 5  # show_places has a column for each of the first 5 places
LARGER, TUNED, SHORT = "--model {pretrained}/lm2", "--tune lm", "--context {short}"


def searched(name: str, seeds: int = 1) -> Row:
    """A row of SEARCHED."""
    return Row(name, SEARCHED[name], seeds)


def ranking(name: str) -> tuple[str, str]:
    """The run that has ranked the passages of a row of SEARCHED or MIXED, and its folder."""
    if name in MIXED:  # as --sort-by both would read them
        return f"{MIXED[name]}-0", "mixed"
    return f"{name}-0", "retrieved" if "--no-rerank" in SEARCHED[name] else "ranked"


def reads(name: str, row: str, flags: str = "", seeds: int = 1) -> Row:
    """A row that reads the passages of another one as it does."""
    run, folder = ranking(row)
    files = " ".join(f"--{split} {{out}}/{run}/{folder}/{split}.jsonl" for split in SPLITS)
    command = f"{READER} --no-rerank --passages {{out}}/{run}/passages.jsonl {files} {flags}"
    return Row(name, command, seeds)


GROUPS = {
    "search and re-ranking, as in table 2": [
        Row("retriever", "train.py --method retriever --steps {encoder_steps}"),
        searched("bm25-reranked", 3),
        searched("bm25", 3),
        searched("hybrid-reranked"),
        searched("dense-reranked"),
        searched("hybrid"),
        searched("dense"),
    ],
    "the scores of re-ranker and search, added": [
        reads("bm25-mixed", "bm25-mixed", seeds=3),
        reads("hybrid-mixed", "hybrid-mixed"),
        reads("dense-mixed", "dense-mixed"),
        reads("short-bm25-mixed", "bm25-mixed", SHORT, 3),
        reads("short-hybrid-mixed", "hybrid-mixed", SHORT),
        reads("short-hybrid", "hybrid", SHORT),
    ],
    "without cross-fitting": [searched("not-cross-fitted", 3)],
    "half the context": [
        reads("short-bm25-reranked", "bm25-reranked", SHORT, 3),
        reads("short-bm25", "bm25", SHORT, 3),
        reads("short-not-cross-fitted", "not-cross-fitted", SHORT, 3),
    ],
    "both LMs, frozen and fine-tuned, as in table 3": [
        Row("closed-book", CLOSED, 3),
        reads("larger-bm25-reranked", "bm25-reranked", LARGER, 3),
        reads("larger-bm25", "bm25", LARGER, 3),
        Row("larger-closed-book", f"{CLOSED} {LARGER}"),
        reads("tuned-bm25-reranked", "bm25-reranked", TUNED),
        reads("tuned-bm25", "bm25", TUNED),
        Row("tuned-closed-book", f"{CLOSED} {TUNED}"),
        reads("larger-tuned-bm25-reranked", "bm25-reranked", f"{LARGER} {TUNED}"),
        reads("larger-tuned-bm25", "bm25", f"{LARGER} {TUNED}"),
    ],
}
ORDERINGS = [  # the claim is that the first row has the higher EM
    ("BM25: re-ranked > as found", "bm25-reranked", "bm25"),
    ("dense: re-ranked > as found", "dense-reranked", "dense"),
    ("hybrid: re-ranked > as found", "hybrid-reranked", "hybrid"),
    ("BM25: both scores > as found", "bm25-mixed", "bm25"),
    ("BM25: both scores > re-ranker's alone", "bm25-mixed", "bm25-reranked"),
    ("dense: both scores > as found", "dense-mixed", "dense"),
    ("hybrid: both scores > as found", "hybrid-mixed", "hybrid"),
    ("half the context: both scores > as found", "short-bm25-mixed", "short-bm25"),
    ("the same, hybrid", "short-hybrid-mixed", "short-hybrid"),
    ("hybrid > BM25", "hybrid", "bm25"),
    ("hybrid > BM25, both re-ranked", "hybrid-reranked", "bm25-reranked"),
    ("cross-fitted > not", "bm25-reranked", "not-cross-fitted"),
    ("half the context: re-ranked > as found", "short-bm25-reranked", "short-bm25"),
    ("half the context: cross-fitted > not", "short-bm25-reranked", "short-not-cross-fitted"),
    ("half the context, re-ranked > all of it", "short-bm25-reranked", "bm25-reranked"),
    ("open > closed book", "bm25", "closed-book"),
    ("larger LM: re-ranked > as found", "larger-bm25-reranked", "larger-bm25"),
    ("larger > smaller LM, both re-ranked", "larger-bm25-reranked", "bm25-reranked"),
    ("smaller LM, re-ranked > larger LM, as found", "bm25-reranked", "larger-bm25"),
    ("within 3 points of fine-tuning", "bm25-reranked", "tuned-bm25-reranked", 0.03),
    ("larger LM: the same", "larger-bm25-reranked", "larger-tuned-bm25-reranked", 0.03),
    ("larger LM, frozen > smaller, tuned", "larger-bm25-reranked", "tuned-bm25-reranked"),
]


class ReaderStudy(Study):
    """A study whose runs read the open book of the embedded world."""

    def jobs(self, row: Row) -> list[Job]:
        """A row with each of its seeds. All of them read what the first one has ranked."""
        first, *others = super().jobs(row)
        again = reads(row.name, row.name) if row.name in SEARCHED else row
        return [first, *(Job(again, job.seed, job.folder) for job in others)]

    def line(self, job: Job) -> list[str]:
        """The arguments of a job's program."""
        args = self.args
        names = {"out": self.folder, "pretrained": args.pretrained}
        names |= {"encoder_steps": args.encoder_steps, "short": args.context // 2}
        line = ["--steps", args.steps, "--encoder-steps", args.encoder_steps, "--top", args.top]
        line += ["--context", args.context, "--world-seed", args.world_seed, *args.flags.split()]
        line += ["--model", args.model] if args.model else []
        line += ["--encoder", args.encoder] if args.encoder else []
        line += [word.format_map(names) for word in job.row.command.split()[1:]]
        line += ["--seed", job.seed, "--out", job.folder, "--resume"]
        return [str(word) for word in line]


def make_study(args, folder: Path) -> ReaderStudy:
    """The study in a folder, with flags of reproduce.py. Nothing is written."""
    args.grid = False
    more = {"tokens": 26, "asked": lambda job: 420 + 700, "sampled": 5040}
    return ReaderStudy(args, folder, GROUPS, {}, {"train.py": train}, **more)


def readers(args) -> dict:
    """The frozen reader: what it reads and answers, by search, re-ranking, LM and what is tuned."""
    study = make_study(args, Path(args.out) / "reader")
    return conduct(study, lambda: None, report)  # the world's questions need no files


# What came out


def report(study: Study) -> dict:
    """Print all tables. Returns what results/reader.json holds."""
    results = {"search": show_search(study), "runs": show_readers(study)}
    results["orderings"] = show_orderings(study, ORDERINGS)
    return results | show_reranker(study) | show_places(study) | show_titles(study)


def show_search(study: Study) -> dict:
    """Print how often the first 1, 5, 20 ... passages hold an answer, as found or re-ranked."""
    results, table = {}, []
    for name in (*SEARCHED, *MIXED):
        for job in study.finished(name)[:1]:
            found = job.record()["passages"]
            results[name] = {split: found[split] for split in ("dev", "test")}
            cells = []
            for part in results[name].values():
                order = part.get("re-ranked", part["retrieved"])["answer"]
                cells.append(", ".join(f"@{k} {100 * share:.1f}" for k, share in order.items()))
            table.append([name, *cells])
    if table:
        show_table("an answer in the first passages, in percent", ["", "dev", "test"], table)
    return results


def show_readers(study: Study) -> dict[str, list[dict]]:
    """Print what reaches the LM, and EM, of every row. Returns {row: its records, without more}."""
    keys, results = ("command", "lr", "seconds", "results", "seconds_per_question"), {}
    for title, rows in study.groups.items():
        table = []
        for row in rows:
            records = [job.record() for job in study.finished(row.name)]
            if not records:
                continue
            results[row.name] = [{k: r[k] for k in keys if k in r} for r in records]
            if "passages" in records[0]:
                inputs = {split: records[0]["passages"][split]["input"] for split in SPLITS}
                results[row.name][0]["input"] = inputs
                read = inputs["test"]
                cells = [f"{100 * read['answer']:.1f}", f"{read['passages']:.1f}"]
                table.append([row.name, len(records), *cells, cell(records, "all")])
        if table:
            columns = ["", "seeds", "an answer there", "passages", "EM dev / test"]
            show_table(f"{title}: what the LM reads of test, and EM, in percent", columns, table)
    return results


def show_reranker(study: Study) -> dict:
    """Print how a re-ranker sorts the half it was trained on and the other, and its time."""
    results = {}
    for job in study.finished("bm25-reranked")[:1]:
        record = job.record()
        results["cross-fitting"] = halves = record["passages"]["cross-fitting"]
        table = []
        for half in ("own half", "held-out half"):
            shares = [f"{100 * share:.1f}" for share in halves[half]["answer"].values()]
            table.append([half, *shares])
        columns = ["trained on", *(f"@{k}" for k in halves["own half"]["answer"])]
        title = f"an answer in the first passages of {halves['n']} training questions, in percent"
        show_table(title, columns, table)
        results["seconds per question"] = spent = record["seconds_per_question"]
        parts = [f"{name} {1000 * value:.1f} ms" for name, value in spent.items()]
        share = 100 * spent["share of re-ranking"]
        show(f"\na question takes {', '.join(parts[:-1])}; re-ranking is {share:.0f} % of it")
    return results


def ranked_test(name: str, job: Job) -> list[Question]:
    """The test questions of a row, each with its passages as the LM gets them."""
    run, folder = ranking(name)
    place = job.folder.parent / run
    return read_questions(place / folder / "test.jsonl", read_passages(place / "passages.jsonl"))


def show_places(study: Study) -> dict:
    """Print test EM of seed 0 by the place of the first passage with an answer, in the ranking.

    If the passages before it mislead the LM, EM falls with the place. (A hard question may do both,
    and the LM reads what fits of the ranking.)
    """
    results, table = {}, []
    for name in ("bm25", "bm25-reranked", "bm25-mixed"):
        for job in study.finished(name)[:1]:
            places = {}
            for q in ranked_test(name, job):
                hits = answer_hits(q)[:PLACES]
                places[q.id] = hits.index(True) if any(hits) else PLACES
            scores = [[] for _ in range(PLACES + 1)]
            for row in read_predictions(job.folder):
                scores[places[row["id"]]].append(row["em"])
            results[name] = [
                [round(100 * sum(s) / len(s), 1) if s else None, len(s)] for s in scores
            ]
            table.append([name, *("-" if n == 0 else f"{em} ({n})" for em, n in results[name])])
    if table:
        title = "EM by the place of the first passage with an answer (test questions)"
        columns = ["", *map(str, range(1, PLACES + 1)), "later, or none"]
        show_table(title, columns, table)
    return {"places": results}


def show_titles(study: Study) -> dict:
    """Print how many of the first passages are about the person of the question, for seed 0.

    These have the title of a passage with the answer. It also counts the wrong answers to questions
    whose right one is in the first 5 passages, and how many of these wrong ones stand in passages
    about other people alone.
    """
    results, table = {}, []
    for name in (*SEARCHED, *MIXED):
        for job in study.finished(name)[:1]:
            answers = {row["id"]: row for row in read_predictions(job.folder)}
            own, first, wrong, others = [], [], 0, 0
            for q in ranked_test(name, job):
                titles, found = {p.title for p in q.positives}, q.found[:PLACES]
                hits = [passage.title in titles for passage in found]
                own, first = own + hits, first + hits[:1]
                answer = answers[q.id]
                if answer["em"] == 0 and any(answer_hits(q)[:PLACES]):
                    wrong += 1
                    said = [h for h, p in zip(hits, found) if answer["prediction"] in p.text]
                    others += bool(said) and not any(said)
            shares = [round(100 * sum(hits) / len(hits), 1) for hits in (first, own)]
            results[name] = [*shares, wrong, others]
            table.append([name, *shares, wrong, others])
    if table:
        columns = ["", "the first, %", f"of the first {PLACES}, %", "wrong", "only of others"]
        show_table("passages about the person of the question, and wrong answers", columns, table)
    return {"titles": results}
