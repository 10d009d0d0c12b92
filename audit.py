"""What a recursion does: hard questions, when a second pass pays, and what a pass hands over.

    hard     questions whose answer is not among n samples of a tuned prompt, and how other runs do
             on them (the analysis of Levine et al. 2022, section 4)
    passes   exact match against the average number of passes, if a question takes a second pass
             only where the first is not sure of its answer (recurse.route); beside it a random
             choice of as many questions, and the oracle's
    bridge   two-hop questions of the embedded world: whether the bridge, the answer to the first
             hop, can be read from what the first pass hands over, and whether the answer follows
             if that is replaced by what another question hands over, or by the mean

Each command asks the questions in the run's predictions.jsonl again. Scores are from 0 to 1.

    python audit.py hard runs/prompt_tuning --samples 64 --out hard.jsonl --runs runs/mine
    python audit.py passes runs/neural_recursion --out audit/passes
    python audit.py bridge runs/neural_recursion --out audit/bridge
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from show import Parser, only_shows, picture, run_program, show

import numpy as np

import cli
import data
import eval as metrics
import recurse
import world
from checkpoints import write_json, write_lines
from handover import hand_over, holders, intervene, is_right, nearest, read_bridges, two_hop
from questions import prepare
from runs import load_run, read_predictions


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate (Wilson 1927). It stays within 0 and 1 at any n >= 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no rate")
    z, rate = 1.96, successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rate(what: str, hits: Sequence[bool]) -> dict:
    """A row of a table: {"what", "n", "rate", "low", "high"}; without cases the last are None."""
    if not hits:
        return {"what": what, "n": 0, "rate": None, "low": None, "high": None}
    low, high = wilson(sum(hits), len(hits))
    return {"what": what, "n": len(hits), "rate": sum(hits) / len(hits), "low": low, "high": high}


def show_rates(rows: list[dict]) -> None:
    """Print rates in percent with their intervals."""
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        text = "no cases"
        if row["n"]:
            low, high = 100 * row["low"], 100 * row["high"]
            text = f"{100 * row['rate']:5.1f}  [{low:5.1f}, {high:5.1f}]  of {row['n']}"
        show(f"{row['what']:{width}}  {text}")


def asked_questions(folder: str | Path) -> tuple[list[data.Example], list[dict]]:
    """The questions of a run's predictions.jsonl as examples, and its lines."""
    rows, examples = read_predictions(folder, ("input", "answers", "prediction", "em")), []
    if not rows:
        raise ValueError(f"{folder}/predictions.jsonl: no predictions")
    for number, row in enumerate(rows, 1):
        answers, source = tuple(row["answers"]), f"{folder}/predictions.jsonl:{number}"
        key = (row["task"], str(row["id"]))
        examples.append(data.Example(row["input"], answers[0], answers, *key, source))
    return examples, rows


def ask_again(args: argparse.Namespace) -> tuple:
    """Load a run and its questions: (the arguments of predict, examples, predictions, record)."""
    loaded = load_run(args.run, model=args.model)
    examples, rows = asked_questions(args.run)
    return arguments(loaded, examples), examples, rows, loaded[-1]


def arguments(loaded: tuple, examples: list[data.Example]) -> tuple:
    """The arguments of `predict` with which a run answers examples. `loaded` is of load_run."""
    model, prefix, tokenizer, record = loaded
    new = record["arguments"].get("max_new_tokens", 16)
    stops = metrics.stops(examples, record["arguments"].get("stop"))
    ids, options, prefix = prepare(model, tokenizer, examples, prefix, new, stops=stops)
    return model, tokenizer, ids, prefix, new, options, stops


# The hard subset


def hard_subset(examples: Sequence, ranked: list[list[recurse.Candidate]]) -> list:
    """The examples without a right answer among their candidates."""
    hard = []
    for e, row in zip(examples, ranked, strict=True):
        texts = [candidate.text for candidate in row]
        if not any(score["em"] for score in metrics.score([e] * len(texts), texts)):
            hard.append(e)
    return hard


def scores_on(examples: Sequence, folders: Sequence[str | Path]) -> list[dict]:
    """Exact match of runs on some of the examples that they were tested on.

    Rows {"what": folder, "n", "rate", "low", "high"}; from the second run on also "difference",
    "p": to the first run, by a paired bootstrap. ValueError if a run was not tested on an example.
    """
    rows, first = [], None
    for folder in folders:
        scores = {(r["task"], str(r["id"])): r["em"] for r in read_predictions(folder, ("em",))}
        missing = [e for e in examples if (e.task, e.id) not in scores]
        if missing:
            raise ValueError(f"{folder}: was not tested on id {missing[0].id!r}")
        em = [scores[e.task, e.id] for e in examples]
        row = rate(str(folder), [value == 1 for value in em])
        if first is not None and em:
            row["difference"], _, _, row["p"] = metrics.paired_bootstrap(em, first)
        first = em if first is None else first
        rows.append(row)
    return rows


def hard_command(args: argparse.Namespace) -> dict:
    """Write the hard questions of a run. Returns {"questions", "hard", "runs"}."""
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists; choose another --out")
    (model, tokenizer, ids, prefix, new, _, stops), examples, *_ = ask_again(args)
    scores_on(examples[:0], args.runs)  # refuses a folder without predictions before the work
    rest = (prefix, tokenizer, new, stops, args.seed)
    ranked = recurse.candidates(model, ids, args.samples, *rest)
    hard = hard_subset(examples, ranked)
    keys = ("id", "task", "input", "target", "answers")
    write_lines(args.out, [{key: getattr(e, key) for key in keys} for e in hard])
    rows = scores_on(hard, args.runs)
    show(f"{args.out}: {len(hard)} of {len(examples)} questions have no right answer")
    show(f"among {args.samples} samples of {args.run}")
    if rows:
        show_rates(rows)
    return {"questions": len(examples), "hard": len(hard), "runs": rows}


# Passes by difficulty


def operations(model, T: int, A: int) -> int:
    """Multiplications and additions for an answer of A tokens to a question of T tokens.

    Two for each parameter of a layer and token read, in every part of a Stack, and two for each
    entry of the vocabulary's table and new token. Attention scores are left out.
    """
    parts = model.parts if isinstance(model, recurse.Stack) else [model]
    layers = sum(p.numel() for part in parts for p in part.layers.parameters())
    c = model.config
    return 2 * layers * (T + A - 1) + 2 * c.vocab_size * c.dim * A  # the last token is never read


def routing_curve(first, second, confidence, first_cost, second_cost) -> list[dict]:
    """Exact match against the average number of passes, for every threshold that differs.

    first, second            (N,) the scores of each question after one pass, after two
    confidence               (N,) log-probability of the first pass's answer
    first_cost, second_cost  (N,) operations of either answer; a question that takes the second
                             pass pays for both answers

    Rows {"threshold", "passes", "operations", "em", "random", "oracle"}, from one pass for all to
    two for all. Below the threshold, or if it is None, a question takes both passes. random is the
    expectation for as many questions, drawn at random. oracle takes those that gain most.
    """
    columns = [np.asarray(c, dtype=np.float64) for c in (first, second, confidence)]
    costs = [np.asarray(c, dtype=np.float64) for c in (first_cost, second_cost)]
    if len({c.shape for c in columns + costs}) != 1 or columns[0].ndim != 1 or not columns[0].size:
        raise ValueError("the scores, confidences and costs are not of the same questions")
    first, second, confidence = columns
    N, order = len(first), np.argsort(confidence, kind="stable")
    zero = np.zeros(1)  # sums over the first k questions, from k = 0
    gains = np.concatenate([zero, (second - first)[order].cumsum()])
    best = np.concatenate([zero, -np.sort(first - second).cumsum()])
    more = np.concatenate([zero, costs[1][order].cumsum()])
    rows = []
    for k in range(N + 1):  # so many take the second pass
        if 0 < k < N and confidence[order[k - 1]] == confidence[order[k]]:
            continue  # no threshold is between them
        row = {"threshold": confidence[order[k]].item() if k < N else None}
        row |= {"passes": 1 + k / N, "operations": (costs[0].sum() + more[k]) / N}
        row |= {"em": (first.sum() + gains[k]) / N}
        row |= {"random": first.mean() + k / N * (second.mean() - first.mean())}
        row |= {"oracle": (first.sum() + best[k]) / N}
        rows.append({key: v if v is None else float(v) for key, v in row.items()})
    return rows


def passes_command(args: argparse.Namespace) -> dict:
    """Draw the curve of a neural recursion. Returns {"curve", "beside", "at"}."""
    out = new_folder(args.out)
    asked, examples, rows, _ = ask_again(args)
    recurse.check_stack(asked[0])
    stack, tokenizer, ids = asked[:3]
    beside = [(folder, *scores_on(examples, [folder])) for folder in args.runs]
    pairs = recurse.predict_first_pass(*asked)
    answers, confidence = [a for a, _ in pairs], [logprob for _, logprob in pairs]
    first, second = metrics.score(examples, answers), [row["em"] for row in rows]
    costs = []
    for model, texts in ((stack.lm, answers), (stack, [row["prediction"] for row in rows])):
        lengths = [len(t) for t in data.encode_prompts(tokenizer, [f" {t}" for t in texts])]
        costs.append([operations(model, len(row), A) for row, A in zip(ids, lengths)])
    curve = routing_curve([r["em"] for r in first], second, confidence, *costs)
    result = {"curve": curve, "two_passes_operations": float(np.mean(costs[1]))}
    result["beside"] = [{"run": str(folder), "em": row["rate"]} for folder, row in beside]
    if args.threshold is not None:
        both = zip(first, rows, confidence)
        result["at"] = metrics.summary([b if c < args.threshold else a for a, b, c in both])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "passes.json", result)
    show_curve(result, args.threshold)
    with only_shows("passes.png"), picture(out / "passes.png", 9, 4) as figure:
        draw_passes(figure, result)
    return result


def show_curve(result: dict, threshold: float | None) -> None:
    """Print eleven rows of the curve, and the scores at a threshold."""
    show("passes  operations  threshold      EM  random  oracle")
    curve = result["curve"]
    for i in sorted({round(k / 10 * (len(curve) - 1)) for k in range(11)}):
        row = curve[i]
        scores = "".join(f"{100 * row[key]:8.1f}" for key in ("em", "random", "oracle"))
        limit = "none" if row["threshold"] is None else f"{row['threshold']:.4f}"
        show(f"{row['passes']:6.2f}  {row['operations']:10.3g}  {limit:>9}{scores}")
    show(f"two passes for all, without asking the first: {result['two_passes_operations']:.3g}")
    for row in result["beside"]:
        show(f"{row['run']}: EM {100 * row['em']:.1f}")
    if "at" in result:
        for task, row in {"all": result["at"], **result["at"]["tasks"]}.items():
            show(f"at {threshold}: {task:12} EM {100 * row['em']:5.1f}   ({row['n']} questions)")


# What is handed over


def bridge_rates(read: list[dict], alone: list[str], answers: list[dict]) -> list[dict]:
    """The rows of the audit's table. `alone` are the answers of the frozen LM's single pass."""
    own = [is_right(q, [a["own"]]) for q, a in zip(read, answers)]
    pairs = [(i, a["donor"]) for i, a in enumerate(answers) if a["donor"] is not None]
    both = [(i, j) for i, j in pairs if own[i] and own[j]]
    right = [(i, i) for i in range(len(read)) if own[i]]

    def gives(cases, key):  # whether answer i is right for question j
        return [is_right(read[j], [answers[i][key]]) for i, j in cases]

    matches = [metrics.exact_match(a, [q["bridge"]]) == 1 for q, a in zip(read, alone)]
    rows, counts = [rate("the LM alone answers with the bridge", matches)], holders(read)
    paused = len(counts) > 1
    for i, count in enumerate(counts):
        if i > 0 and count == 0:  # most positions of long filler hold nothing
            continue
        where = f", position {i}" if paused else ""
        first, given = ([q[key][i] == q["token"] for q in read] for key in ("first", "given"))
        rows.append(rate(f"first pass reads the bridge's first token{where}", first))
        rows.append(rate(f"Connector's output is nearest to it{where}", given))
    if paused:
        hits = [q["token"] in (*q["first"], *q["given"]) for q in read]
        rows.append(rate("one of these at any position", hits))
    rows.append(rate("answer right", own))
    places = {"": ", all positions", "_one": f", position {counts.index(max(counts))}"}
    for key, where in places.items() if paused else [("", "")]:
        what, other, mean = f"other hand-over{where}", f"other{key}", f"mean{key}"
        still = [(i, i) for i, _ in pairs], [(i, i) for i, _ in both]
        rows += [
            rate(f"{what}: the other's answer", gives(pairs, other)),
            rate(f"{what}: still the own answer", gives(still[0], other)),
            rate(f"both right, {what}: the other's answer", gives(both, other)),
            rate(f"both right, {what}: still the own", gives(still[1], other)),
            rate(f"right, mean hand-over{where}: still the own answer", gives(right, mean)),
        ]
    return rows


def bridge_command(args: argparse.Namespace) -> dict:
    """Audit the two-hop questions of a neural recursion. Returns {"rates", "held", "questions"}.

    held: how many questions' bridges each position holds. Position 0 is the question's last one,
    and the others are those of the filler.
    """
    out = new_folder(args.out)
    asked, examples, _, record = ask_again(args)
    recurse.check_stack(asked[0])
    made = world.make(record["arguments"].get("world_seed", 1))
    questions = two_hop(examples, made)[: args.limit]
    if not questions:
        raise ValueError(f"{args.run}/predictions.jsonl: no two-hop question")
    model, tokenizer, ids, prefix, new, options, stops = asked
    rows = [q["row"] for q in questions]
    ids, options, stops = ([part[row] for row in rows] for part in (ids, options, stops))
    alone = recurse.predict_first_pass(model, tokenizer, ids, prefix, new, options, stops)
    read = read_bridges(model, tokenizer, questions, ids)
    answers = intervene(model, tokenizer, read, ids, new, stops, args.seed)
    rates, held = bridge_rates(read, [a for a, _ in alone], answers), holders(read)
    lines = []
    for q, a, (text, _) in zip(read, answers, alone):
        line = {"id": q["example"].id, "input": q["example"].input, "path": q["path"]}
        line |= {"bridge": q["bridge"], "answers": list(q["example"].answers), "alone": text} | a
        names = {k: [tokenizer.decode([t]) for t in q[k]] for k in ("first", "given")}
        lines.append(line | names | {"token": tokenizer.decode([q["token"]])})
    out.mkdir(parents=True, exist_ok=True)
    result = {"rates": rates, "held": held, "questions": lines}
    write_json(out / "bridge.json", result)
    show_rates(rates)
    if len(held) > 1:
        best = held.index(max(held))
        show(f"position {best} of 0 to {len(held) - 1} holds the bridge most often: {max(held)}")
    shown = next((i for i, q in enumerate(read) if is_right(q, [answers[i]["own"]])), 0)
    height = max(4, 0.24 * max(len(ids[shown]), len(rates)))
    with only_shows("bridge.png"), picture(out / "bridge.png", 13, height) as figure:
        draw_bridge(figure, model, tokenizer, ids[shown], read[shown]["bridge"], rates)
    return result


# Pictures


def draw_passes(figure, result: dict) -> None:
    """Draw the curve, over the average passes and over the operations."""
    curve = result["curve"]
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("passes", "operations")):
        x = [row[key] for row in curve]
        for name, label in (("oracle", "oracle"), ("em", "by confidence"), ("random", "at random")):
            axes.plot(x, [100 * row[name] for row in curve], label=label)
        if key == "operations":
            end = result["two_passes_operations"], 100 * curve[-1]["em"]
            axes.plot(*end, "o", label="always two passes")
        for row in result["beside"]:
            axes.axhline(100 * row["em"], linestyle=":", color="gray", label=row["run"])
        axes.set(xlabel=f"{key} per question", ylabel="EM")
    axes.legend(fontsize=7)


def draw_bridge(figure, model, tokenizer, ids: list[int], bridge: str, rates: list[dict]) -> None:
    """Draw what is read at every position of one question, and the rates."""
    h, given = hand_over(model, ids)
    columns = [ids, model.logits(h).argmax(-1).tolist(), nearest(model.lm, given)]
    cells = [[repr(tokenizer.decode([t])) for t in row] for row in zip(*columns)]
    left, right = figure.subplots(1, 2)
    left.axis("off")
    names = ["token", "first pass reads", "nearest to the Connector"]
    left.table(cells, colLabels=names, loc="center", cellLoc="left")
    left.set_title(f"bridge: {bridge}", parse_math=False)
    rows = [row for row in rates if row["n"]][::-1]
    low, middle, high = (np.array([100 * r[key] for r in rows]) for key in ("low", "rate", "high"))
    right.errorbar(middle, range(len(rows)), xerr=[middle - low, high - middle], fmt="o")
    right.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=7)
    right.set(xlim=(0, 100), xlabel="% of questions")


# Command line


def new_folder(out: str) -> Path:
    """The folder --out, which must be new or empty."""
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another --out")
    return Path(out)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. A bad one exits with status 2."""
    parser = Parser(prog="audit.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    moved = ("--model", str, None, "the LM's checkpoint, if it has moved")
    seed = ("--seed", cli.SEED, 0, "of samples and of the choice of other questions")
    number, text = cli.number_type(float, -math.inf), "also show the scores at this log-probability"
    threshold = ("--threshold", number, None, text)
    limit = ("--limit", cli.COUNT, None, "the first so many two-hop questions; all if not given")
    for name, function, text, *flags in (
        ("hard", hard_command, "run of prompt tuning", ("--samples", cli.COUNT, 64, "answers")),
        ("passes", passes_command, "run of neural recursion", threshold),
        ("bridge", bridge_command, "run of neural recursion on the embedded world", limit),
    ):
        command = commands.add_parser(name, help=function.__doc__.split(".")[0])
        command.set_defaults(function=function)
        command.add_argument("run", help=text)
        cli.add_flags(command, "audit", *flags, moved, seed)
        out = "the file" if name == "hard" else "a new folder for the table and the picture"
        command.add_argument("--out", required=True, help=out)
        if name != "bridge":
            command.add_argument("--runs", nargs="*", default=[], help="of the same questions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run a command and return its result."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return args.function(args)


if __name__ == "__main__":
    run_program("audit.py", main)
