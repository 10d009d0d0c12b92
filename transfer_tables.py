"""The tables and the picture of soft prompt transfer.

Counterparts of figure 1, figure 3, figure 4 and table 3 of Vu et al. 2022, "SPoT: Better Frozen
Model Adaptation through Soft Prompt Transfer". transfer_study.py makes the runs. A run METHOD-to-T
is a method on the target T, and SOURCE-to-T a prompt that started from the source's. Scores are F1,
which is accuracy where an example has options. A star marks a target that not even tuning of the LM
learns (suite.AT_CHANCE).

The best of several sources is chosen on PARTS - 1 of PARTS parts of the test examples and scored on
the other: chosen by what is scored, the best of 14 sources without any effect would seem to gain 5
to 10 points. Luck of a training remains, so the best of three seeds from scratch stands beside it.
"""

from functools import partial

from show import show, show_table

import numpy as np

import suite
import transfer
from model import LM
from runs import ASSETS, read_predictions
from study import Study, show_differences, significance

PARTS = 5
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
        near, toward = similarities(study, tasks)
        pairs = {t: {s: float(v.mean()) for s, v in part.items()} for t, part in scores.items()}
        results |= {"pairs": pairs, "tasks": tasks}
        results["leaf order"] = show_clusters(near["average_tokens"], tasks)
        results["similarities"] = {kind: near[kind].round(4).tolist() for kind in near}
        results["of search"] = {kind: toward[kind].round(4).tolist() for kind in toward}
        results |= show_search(study, scores, toward, tasks)
        results["nearest"] = show_nearest(study, scores, toward, tasks)
        if not study.given:
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
            own = row["id"].removesuffix(f"-{row.get('template', '')}")
            scores.setdefault(own, []).append(row["f1"])
        found.append({example: float(np.mean(scores[example])) for example in sorted(scores)})
    return found


def method_scores(study: Study, method: str) -> dict[str, np.ndarray]:
    """{target: (seeds, examples)} of a method. Every target has as many seeds."""
    found = {t: test_scores(study, f"{method}-to-{t}") for t in targets_of(study)}
    seeds = min(map(len, found.values()))
    return {t: np.array([list(s.values()) for s in p[:seeds]]) for t, p in found.items() if seeds}


def show_methods(study: Study) -> dict:
    """Print the score of every method and target in percent, and standard deviations over seeds."""
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
        names = map(suite.starred, targets)
        columns = ["", "seeds", "mean", "its sd", "mean sd of a target", *names]
        show_table("score of the targets, in percent", columns, table)
    return results


def show_claims(study: Study) -> list[dict]:
    """Print which claims hold, by a bootstrap over the test examples of the targets and seeds."""
    results = []
    for claim, *pair in CLAIMS:
        for part, left_out in (("all targets", ()), ("those that can be learnt", suite.AT_CHANCE)):
            found = [method_scores(study, method) for method in pair]
            kept = [[v for t, v in scores.items() if t not in left_out] for scores in found]
            if not all(kept):
                continue
            a, b = (np.concatenate(values, 1) for values in kept)
            line = {"claim": claim, "rows": pair, "slice": part, "seeds": [len(a), len(b)]}
            results.append(line | significance(a, b))
    show_differences("score of the targets", results)
    return results


def pair_scores(study: Study) -> dict[str, dict[str, np.ndarray]]:
    """{target: {source: scores (examples,)}} of the sources that are finished for every target."""
    sources = [row.name.removeprefix("source-") for row in study.groups["sources"]]
    found = {}
    for t in targets_of(study):
        runs = {s: test_scores(study, f"{s}-to-{t}") for s in sources}
        found[t] = {s: np.array([*run[0].values()]) for s, run in runs.items() if run}
    whole = [s for s in sources if all(s in part for part in found.values())]
    enough = whole and method_scores(study, "scratch")
    return {t: {s: part[s] for s in whole} for t, part in found.items()} if enough else {}


def in_parts(scores: np.ndarray) -> list[float]:
    """The mean scores of PARTS parts of the examples (examples,), or of each if they are fewer."""
    return [float(np.mean(scores[i::PARTS])) for i in range(min(PARTS, len(scores)))]


def similarities(study: Study, tasks: list[str]) -> tuple[dict, dict]:
    """Similarities of tasks by kind, means over pairs of different seeds: prompts of one seed start
    from the same vectors.

    Returns {kind: (tasks, tasks)}, and the same of each task with seed 0 of the other alone, which
    is the prompt that a transfer starts from.
    """
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

    def matrix(kind: str, prompts: list, seeds: int | None) -> np.ndarray:
        return np.array([[mean(kind, a, b[:seeds]) for b in prompts] for a in prompts])

    def matrices(seeds: int | None) -> dict:
        return {
            "per_token": matrix("per_token", found, seeds),
            "average_tokens": matrix("average_tokens", found, seeds),
            "neurons": matrix("average_tokens", neurons, seeds),  # their overlap is a cosine, too
        }

    return matrices(None), matrices(1)


def show_search(study: Study, scores: dict, toward: dict, tasks: list[str]) -> dict:
    """Print what a search of the k nearest sources keeps, and how similarity predicts transfer.

    scores: see `pair_scores`. toward: {kind: (tasks, tasks)}, rows with the embeddings of targets.
    """
    targets, sources = list(scores), list(next(iter(scores.values())))
    n, scratch = len(sources), method_scores(study, "scratch")
    base = {t: float(scratch[t].mean()) for t in targets}
    parts = {t: {s: in_parts(scores[t][s]) for s in sources} for t in targets}
    means = {t: [float(scores[t][s].mean()) for s in sources] for t in targets}
    gains = np.array([means[t] for t in targets]).T - [base[t] for t in targets]
    rows = [[s, *(f"{100 * gain:+.1f}" for gain in row)] for s, row in zip(sources, gains)]
    names = map(suite.starred, targets)
    show_table("score minus that from scratch, in points", ["source", *names], rows)
    rankings, correlation = show_similarities(means, toward, tasks, sources)
    if len(targets) > 1:
        rankings["others' scores"] = {
            t: ranked(sources, np.mean([means[u] for u in targets if u != t], 0)) for t in targets
        }
    ks = range(1, n + 1)
    search = {kind: transfer.search_table(parts, base, r, ks) for kind, r in rankings.items()}
    random = random_searches(parts, base, sources)
    for rows in search.values():
        for i, row in enumerate(rows[:-1]):  # the last one has all sources, in any order
            as_good = sum(table[i]["score"] >= row["score"] for table in random)
            row["p"] = (1 + as_good) / (1 + len(random))
    search["random"] = [mean_row(rows) for rows in zip(*random)]
    table = []
    for kind, rows in search.items():
        for k in sorted({k for k in (1, 3, 6, 9, 12, n) if k <= n}):
            table.append([kind, "oracle" if k == n else k, *search_cells(rows[k - 1])])
    seeds = {t: {str(i): in_parts(row) for i, row in enumerate(scratch[t])} for t in targets}
    most = min(map(len, seeds.values()))
    orders = {t: [(name, 0.0) for name in seeds[t]] for t in targets}
    (row,) = transfer.search_table(seeds, base, orders, [most])
    table.append(["seeds from scratch", most, *search_cells(row)[:2], "", "", ""])
    for method in TARGETED:
        if found := method_scores(study, method):
            score = [found[t].mean() for t in targets]
            gone = [transfer.relative_error_reduction(*pair) for pair in zip(score, base.values())]
            name, k = method.rsplit("-", 1)
            table.append([name, k, *(f"{100 * np.mean(v):.1f}" for v in (score, gone)), "", "", ""])
    columns = ["ranked by", "k", "best of k", "error reduction", "eliminated", "gain kept", "p"]
    title = f"search for a source, in percent; p: of {len(random)} random orders"
    show_table(title, columns, table)
    for kind, rows in search.items():
        if rows[-1]["gain_kept"] is None:  # no source helps
            continue
        for share in (0.8, 0.9):
            k = next((row["k"] for row in rows if row["gain_kept"] >= share), n)
            show(f"{kind}: {100 * share:.0f} % of the gain needs {k:.0f} of {n} sources")
    return {"baseline": base, "search": search, "seeds": row, "correlation": correlation}


def show_similarities(means: dict, toward: dict, tasks: list[str], sources: list[str]) -> tuple:
    """Print the similarities of sources and targets, and how they predict the score.

    means: {target: score of each source}. Returns {kind: {target: ranked sources}} and {kind:
    {target, or "mean": (r, p)}}.
    """
    rankings, correlation, lines, targets = {}, {}, [], list(means)
    names = [*map(suite.starred, targets)]
    for kind, matrix in toward.items():
        values = {t: [matrix[tasks.index(t), tasks.index(s)] for s in sources] for t in targets}
        rows = [[s, *(f"{values[t][i]:+.3f}" for t in targets)] for i, s in enumerate(sources)]
        show_table(f"similarity, {kind}", ["source", *names], rows)
        rankings[kind] = {t: ranked(sources, values[t]) for t in targets}
        found = {t: transfer.pearson(values[t], means[t], 2000) for t in targets}
        found["mean"] = mean_correlation(*([part[t] for t in targets] for part in (values, means)))
        correlation[kind] = found
        lines.append([kind, *(f"{r:+.2f} ({p:.3f})" for r, p in found.values())])
    title = "Pearson's r of similarity and score, and p"
    show_table(title, ["similarity", *names, "mean"], lines)
    return rankings, correlation


def ranked(sources: list[str], values) -> list[tuple[str, float]]:
    """[(source, value)], the highest value first."""
    return sorted(zip(sources, values), key=lambda pair: -pair[1])


def search_cells(row: dict) -> list[str]:
    """A row of `transfer.search_table` in percent, and its p."""
    values = (row[key] for key in ("score", "error_reduction", "eliminated", "gain_kept"))
    cells = ["-" if v is None else f"{100 * v:.1f}" for v in values]
    return [*cells, f"{row['p']:.3f}" if "p" in row else ""]


def random_searches(parts: dict, base: dict, sources: list[str], orders: int = 200) -> list:
    """`transfer.search_table` of random rankings."""
    rng, tables = np.random.default_rng(0), []
    for _ in range(orders):
        order = {t: [(s, 0.0) for s in rng.permutation(sources)] for t in parts}
        tables.append(transfer.search_table(parts, base, order, range(1, len(sources) + 1)))
    return tables


def mean_row(rows: list[dict]) -> dict:
    """The mean of rows of several tables; None if a value is None."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {k: None if None in values else float(np.mean(values)) for k, values in columns.items()}


def mean_correlation(x: list[list[float]], y: list[list[float]]) -> tuple[float, float]:
    """Pearson's r of x and y (targets, sources), its mean over targets, and p. All targets get the
    same random orders of the sources, so they need not be independent. A constant counts 0."""

    def standard(values) -> np.ndarray:
        centred = np.asarray(values) - np.mean(values, 1, keepdims=True)
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    x, y = standard(x), standard(y)

    def r(order: np.ndarray) -> float:
        return float((x * y[:, order]).sum(1).mean())

    order = np.arange(x.shape[1])
    return r(order), transfer.permutation_test(lambda o: abs(r(o)), order, 2000)[1]


def show_nearest(study: Study, scores: dict, toward: dict, tasks: list[str]) -> list[dict]:
    """Print whether the most similar source is a better start than none, and than a random one.

    scores, toward: see `show_search`. A random source scores the mean of all of them, the nearest
    included. All test examples count alike, whatever their target. A pair is one training, and the
    interval does not know how trainings differ.
    """
    scratch, results = method_scores(study, "scratch"), []
    means = [np.mean([*by_source.values()], 0) for by_source in scores.values()]
    others = {
        "from scratch": np.concatenate([scratch[t] for t in scores], 1),
        "a random source": np.concatenate(means)[None],
    }
    for kind, matrix in toward.items():
        found = []
        for target, by_source in scores.items():
            to = matrix[tasks.index(target)]
            found.append(by_source[max(by_source, key=lambda s: to[tasks.index(s)])])
        nearest = np.concatenate(found)[None]
        for name, other in others.items():
            line = {"claim": f"nearest, {kind} > {name}", "seeds": [1, len(other)]}
            results.append(line | significance(nearest, other))
    show_differences("score of the targets, from the most similar source", results)
    return results


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


def show_clusters(near: np.ndarray, tasks: list[str]) -> list[str]:
    """Print the similarity of all tasks in percent, neighbours of a dendrogram side by side, as in
    figure 4. Returns the tasks in this order."""
    order = leaf_order(near)
    rows = []
    for n, i in enumerate(order, 1):
        rows.append([f"{n} {tasks[i]}", *(f"{100 * value:.0f}" for value in near[i, order])])
    columns = ["", *range(1, len(order) + 1)]
    show_table("similarity, average tokens, clustered, in percent", columns, rows)
    return [tasks[i] for i in order]


def draw(figure, results: dict) -> None:
    """Draw the heatmaps of transfer and of similarity, and below one against the other."""
    scores, base, tasks = results["pairs"], results["baseline"], results["tasks"]
    near = np.array(results["of search"]["per_token"])
    average = np.array(results["similarities"]["average_tokens"])
    targets, sources = list(scores), list(next(iter(scores.values())))
    above, below = figure.subfigures(2, 1)
    gain, similar = above.subplots(1, 2)
    names, clustered = results["leaf order"], "similarity, average tokens, clustered"
    order = [tasks.index(name) for name in names]
    change = np.array([[100 * (scores[t][s] - base[t]) for s in sources] for t in targets])
    largest = max(np.abs(change).max(), 1e-9)
    for axes, matrix, x, y, title, limits in (
        (gain, change, sources, targets, "score minus that from scratch", (-largest, largest)),
        (similar, average[np.ix_(order, order)], names, names, clustered, (None, None)),
    ):
        colours = "RdBu" if axes is gain else "viridis"
        image = axes.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        axes.set_xticks(range(len(x)), x, rotation=90, fontsize=7)
        axes.set_yticks(range(len(y)), y, fontsize=7)
        axes.set_title(title)
        above.colorbar(image, ax=axes)
    below.supxlabel("similarity, per token")
    below.supylabel("score")
    grid = [*below.subplots(2, -(-len(targets) // 2), squeeze=False).flat]
    for axes in grid[len(targets) :]:
        axes.set_visible(False)
    for axes, t in zip(grid, targets):
        x = [near[tasks.index(t), tasks.index(s)] for s in sources]
        y = [100 * scores[t][s] for s in sources]
        axes.plot(x, y, "o", markersize=3)
        axes.axhline(100 * base[t], linestyle=":", color="gray")
        r, p = results["correlation"]["per_token"][t]
        axes.set_title(f"{t}: r = {r:.2f}, p = {p:.3f}", fontsize=8)
