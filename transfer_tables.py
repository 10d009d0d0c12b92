"""The tables and the picture of soft prompt transfer on the embedded suite.

Counterparts of figure 1, figure 3, figure 4 and table 3 of Vu et al. 2022, "SPoT: Better Frozen
Model Adaptation through Soft Prompt Transfer". transfer_study.py makes the runs. A run METHOD-to-T
is a method on the target T, and SOURCE-to-T a prompt that started from the source's. Scores are F1,
which is accuracy where an example has options.
"""

from functools import partial

from show import show, show_table

import numpy as np

import suite
import transfer
from model import LM
from runs import ASSETS, read_predictions
from study import Study, show_differences, significance

NEAREST = (3, 9)  # sources whose prompts are averaged, or whose tasks are mixed
TARGETED = [f"{name}-{k}" for name in ("average", "top-mixture") for k in NEAREST]
METHODS = [
    *"scratch longer tuned multitask text mixture".split(),
    *TARGETED,
    *"scratch-shallow mixture-shallow scratch-larger longer-larger tuned-larger".split(),
    *"multitask-larger mixture-larger".split(),
]
CLAIMS = [  # the claim is that the first method has the higher score
    ("transfer from a mixture > from scratch", "mixture", "scratch"),
    ("transfer from text > from scratch", "text", "scratch"),
    ("longer prompt tuning > from scratch", "longer", "scratch"),
    ("transfer from a mixture > longer prompt tuning", "mixture", "longer"),
    ("transfer from a mixture > tuning of the LM", "mixture", "tuned"),
    ("transfer from a mixture > multi-task tuning of the LM", "mixture", "multitask"),
    *[(f"{name} > from scratch", name, "scratch") for name in TARGETED],
    ("shallow: transfer from a mixture > from scratch", "mixture-shallow", "scratch-shallow"),
    ("from scratch: deep > shallow", "scratch", "scratch-shallow"),
    ("larger LM: transfer from a mixture > from scratch", "mixture-larger", "scratch-larger"),
    ("larger LM: transfer > tuning of the LM", "mixture-larger", "tuned-larger"),
]


def tables(study: Study) -> dict:
    """Print all tables. Returns what results/transfer.json holds of them."""
    results = {"methods": show_methods(study), "claims": show_claims(study)}
    scores = pair_scores(study)
    if scores:
        tasks = [*next(iter(scores.values())), *scores]
        near = similarities(study, tasks)
        results |= {"pairs": scores, "tasks": tasks}
        results["similarities"] = {kind: near[kind].round(4).tolist() for kind in near}
        results |= show_search(study, scores, near, tasks)
        results["families"] = show_families(near, tasks)
    return results


def targets_of(study: Study) -> list[str]:
    """The target tasks of a study."""
    return [row.name.removeprefix("scratch-to-") for row in study.groups["targets"]]


def test_scores(study: Study, name: str) -> list[dict]:
    """{example: its mean F1 over templates} for every finished seed of a row."""
    found = []
    for job in study.finished(name):
        scores = {}
        for row in read_predictions(job.answers):
            scores.setdefault(row["id"].removesuffix(f"-{row['template']}"), []).append(row["f1"])
        found.append({example: float(np.mean(scores[example])) for example in sorted(scores)})
    return found


def method_scores(study: Study, method: str) -> dict[str, np.ndarray]:
    """{target: (seeds, examples)} of a method. Every target has as many seeds and examples."""
    found = {t: test_scores(study, f"{method}-to-{t}") for t in targets_of(study)}
    seeds = min(map(len, found.values()))
    return {t: np.array([list(s.values()) for s in p[:seeds]]) for t, p in found.items() if seeds}


def show_methods(study: Study) -> dict:
    """Print the score of every method and target in percent; ± is the deviation over seeds."""
    results, table, targets = {}, [], targets_of(study)
    for method in METHODS:
        found = method_scores(study, method)
        if found:
            by_seed = np.array([found[t].mean(1) for t in targets])  # (targets, seeds)
            results[method] = {t: by_seed[i].tolist() for i, t in enumerate(targets)}
            mean = 100 * by_seed.mean(0)
            cells, spread = [f"{100 * row.mean():.1f}" for row in by_seed], ["", ""]
            if len(mean) > 1:
                each = 100 * by_seed.std(1, ddof=1).mean()  # of one target
                spread = [f"{mean.std(ddof=1):.1f}", f"{each:.1f}"]
            table.append([method, len(mean), f"{mean.mean():.1f}", *spread, *cells])
    if table:
        columns = ["", "seeds", "mean", "± of it", "± of a target", *targets]
        show_table("score of the targets, in percent", columns, table)
    return results


def show_claims(study: Study) -> list[dict]:
    """Print which claims hold, by a bootstrap over the test examples of all targets and seeds."""
    results = []
    for claim, *pair in CLAIMS:
        a, b = (method_scores(study, method) for method in pair)
        if not a or not b:
            continue
        both = (np.concatenate(list(part.values()), 1) for part in (a, b))
        results.append({"claim": claim, "rows": pair} | significance(*both))
    show_differences("score over all targets", results)
    return results


def pair_scores(study: Study) -> dict[str, dict[str, float]]:
    """{target: {source: score}} of the sources that are finished for every target."""
    sources = [row.name.removeprefix("source-") for row in study.groups["sources"]]
    found = {}
    for t in targets_of(study):
        runs = {s: test_scores(study, f"{s}-to-{t}") for s in sources}
        found[t] = {s: float(np.mean(list(run[0].values()))) for s, run in runs.items() if run}
    whole = [s for s in sources if all(s in part for part in found.values())]
    enough = len(whole) > 1 and method_scores(study, "scratch")
    return {t: {s: part[s] for s in whole} for t, part in found.items()} if enough else {}


def similarities(study: Study, tasks: list[str]) -> dict[str, np.ndarray]:
    """{kind: (tasks, tasks)}: the mean similarity of two tasks over pairs of different seeds:
    prompts of one seed start from the same vectors."""
    lm = LM.from_pretrained(study.args.model or ASSETS / "lm")
    found, neurons = [], []
    for name in tasks:
        row = f"scratch-to-{name}" if name in targets_of(study) else f"source-{name}"
        runs = study.finished(row)
        found.append([transfer.read_embedding(job.folder)[0] for job in runs])
        prompts = [transfer.read_embedding(job.folder, lm)[0] for job in runs]
        neurons.append([transfer.activated_neurons(lm, prompt)[None] for prompt in prompts])

    def mean(kind: str, a: list, b: list) -> float:
        pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i != j]
        return float(np.mean([transfer.similarity(*p, kind) for p in pairs or [(a[0], b[0])]]))

    def matrix(kind: str, prompts: list) -> np.ndarray:
        return np.array([[mean(kind, a, b) for b in prompts] for a in prompts])

    near = {kind: matrix(kind, found) for kind in ("per_token", "average_tokens")}
    return near | {"neurons": matrix("average_tokens", neurons)}  # their overlap is a cosine, too


def show_search(study: Study, scores: dict, near: dict, tasks: list[str]) -> dict:
    """Print what a search of the k nearest sources keeps, and how similarity predicts transfer."""
    targets, sources = list(scores), list(next(iter(scores.values())))
    n, base = len(sources), method_scores(study, "scratch")
    base = {t: float(base[t].mean()) for t in targets}
    rows = [[s, *(f"{100 * (scores[t][s] - base[t]):+.1f}" for t in targets)] for s in sources]
    show_table("score minus that from scratch, in points", ["source", *targets], rows)
    search, correlation = {}, {}
    table, lines = [], []
    for kind, matrix in near.items():
        values = {t: [matrix[tasks.index(t), tasks.index(s)] for s in sources] for t in targets}
        rows = [[s, *(f"{values[t][i]:+.2f}" for t in targets)] for i, s in enumerate(sources)]
        show_table(f"similarity, {kind}", ["source", *targets], rows)
        ranked = {t: sorted(zip(sources, values[t]), key=lambda pair: -pair[1]) for t in targets}
        search[kind] = transfer.search_table(scores, base, ranked, range(1, n + 1))
        correlation[kind] = {
            t: transfer.pearson(values[t], [scores[t][s] for s in sources], 2000) for t in targets
        }
        lines.append([kind, *(f"{r:+.2f} ({p:.3f})" for r, p in correlation[kind].values())])
    search["random"] = random_search(scores, base, sources)
    for kind, part in search.items():
        for k in sorted({k for k in (1, 3, 6, 9, 12, n) if k <= n}):
            row = part[k - 1]
            values = (row[key] for key in ("score", "error_reduction", "eliminated", "gain_kept"))
            cells = ("-" if v is None else f"{100 * v:.1f}" for v in values)
            table.append([kind, "oracle" if k == n else k, *cells])
    for method in TARGETED:
        if found := method_scores(study, method):
            mean = [found[t].mean() for t in targets]
            gone = [transfer.relative_error_reduction(*pair) for pair in zip(mean, base.values())]
            name, k = method.rsplit("-", 1)
            table.append([name, k, *(f"{100 * np.mean(v):.1f}" for v in (mean, gone)), "", ""])
    columns = ["similarity", "k", "best of k", "error reduction", "eliminated", "gain kept"]
    show_table("search for a source, in percent", columns, table)
    for kind, part in search.items():
        if part[-1]["gain_kept"] is None:  # no source helps
            continue
        for share in (0.8, 0.9):
            k = next((row["k"] for row in part if row["gain_kept"] >= share), n)
            show(f"{kind}: {100 * share:.0f} % of the gain needs {k} of {n} sources")
    show_table("Pearson's r of similarity and score, and p", ["similarity", *targets], lines)
    return {"baseline": base, "search": search, "correlation": correlation}


def random_search(scores: dict, base: dict, sources: list[str], orders: int = 200) -> list[dict]:
    """The mean of `search_table` over random rankings."""
    rng, tables = np.random.default_rng(0), []
    for _ in range(orders):
        ranked = {t: [(s, 0.0) for s in rng.permutation(sources)] for t in scores}
        tables.append(transfer.search_table(scores, base, ranked, range(1, len(sources) + 1)))

    def mean(values: list) -> float | None:
        return None if None in values else float(np.mean(values))

    return [{key: mean([r[key] for r in rows]) for key in rows[0]} for rows in zip(*tables)]


def show_families(near: dict, tasks: list[str]) -> dict:
    """Print whether tasks of one cluster of the suite are near each other."""
    labels, results = [suite.TASKS[name].cluster for name in tasks], {}
    for kind, matrix in near.items():
        value, p = transfer.permutation_test(partial(transfer.silhouette, matrix), labels, 2000)
        results[kind] = {"silhouette": value, "p": p}
        show(f"{kind}: silhouette of the families {value:+.3f}, p = {p:.4f}")
    return results


def leaf_order(near: np.ndarray) -> list[int]:
    """The order of tasks in a dendrogram: the two nearest groups are joined first, by their mean
    similarity (average linkage)."""
    groups = [[i] for i in range(len(near))]
    while len(groups) > 1:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = max(pairs, key=lambda ij: near[np.ix_(groups[ij[0]], groups[ij[1]])].mean())
        groups[j] += groups.pop(i)
    return groups[0]


def draw(figure, results: dict) -> None:
    """Draw the heatmaps of transfer and of similarity, and below one against the other."""
    scores, base, tasks = results["pairs"], results["baseline"], results["tasks"]
    near, average = (np.array(results["similarities"][kind]) for kind in transfer.KINDS[:2])
    targets, sources = list(scores), list(next(iter(scores.values())))
    above, below = figure.subfigures(2, 1)
    gain, similar = above.subplots(1, 2)
    order = leaf_order(average)  # as in figure 4
    names = [tasks[i] for i in order]
    change = np.array([[100 * (scores[t][s] - base[t]) for s in sources] for t in targets])
    largest = max(np.abs(change).max(), 1e-9)
    for axes, matrix, x, y, title, limits in (
        (gain, change, sources, targets, "score minus that from scratch", (-largest, largest)),
        (similar, average[np.ix_(order, order)], names, names, "similarity", (None, None)),
    ):
        colours = "RdBu" if axes is gain else "viridis"
        image = axes.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        axes.set_xticks(range(len(x)), x, rotation=90, fontsize=7)
        axes.set_yticks(range(len(y)), y, fontsize=7)
        axes.set_title(title)
        above.colorbar(image, ax=axes)
    below.supxlabel("similarity, per token")
    below.supylabel("score")
    grid = below.subplots(2, -(-len(targets) // 2), squeeze=False).flat
    for axes, t in zip(grid, targets):
        x = [near[tasks.index(t), tasks.index(s)] for s in sources]
        y = [100 * scores[t][s] for s in sources]
        axes.plot(x, y, "o", markersize=3)
        axes.axhline(100 * base[t], linestyle=":", color="gray")
        r, p = results["correlation"]["per_token"][t]
        axes.set_title(f"{t}: r = {r:.2f}, p = {p:.3f}", fontsize=8)
