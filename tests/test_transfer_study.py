"""The study of soft prompt transfer and of continued pretraining, from its files to its tables."""

import io
import json
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_runs import make_place, read_lines, suite_rows, write_lines

import fit
import promptability_study
import reproduce
import suite
import transfer
import transfer_study
import transfer_tables
from checkpoints import read_json
from promptability import HELD_OUT
from transfer_study import TransferStudy

SOURCES, TARGETS = ["food_reviews", "news_topic"], ["staff_reviews", "record_nli"]
HELD = ["same_sense", "record_nli"]  # as in suite.TASKS, not in the order of the alphabet
VARIANTS = ("none", "ppt", "reptile")
FLAGS = "--source-steps 3 --target-steps 2 --examples 8 --count 6 --steps 1"


def kept(rows):
    """The rows of VARIANTS; those of few-shot tuning with few steps and shots."""
    rows = [row for row in rows if row.name.split("-")[0] in VARIANTS and "small" not in row.name]
    short = " --steps 2 --shots 4"
    return [r._replace(command=r.command + short * ("few-shot" in r.command)) for r in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, results) of a tiny study."""
    folder = tmp_path_factory.mktemp("study")
    place = make_place(folder)
    counts = {"train": 130, "dev": 6, "test": 8}

    def rows(_, name, split):
        return suite_rows(name, counts[split], split, suite.TASKS[name].cluster)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "draw_curve", lambda run, history: None)
        patch.setattr(suite, "rows", rows)
        patch.setattr(suite, "TEMPLATES", {t: [("is", 0, 0), ("paint", 0, 0)] for t in HELD})
        patch.setattr(promptability_study, "held_out_tasks", lambda: HELD)
        texts = [{"text": "The red door is blue. " * 9}] * 9
        patch.setattr(transfer_study.genres, "documents", lambda *rest: texts)
        continued = {title: kept(rows) for title, rows in promptability_study.GROUPS.items()}
        groups = transfer_study.groups(SOURCES, TARGETS, continued)
        title = "targeted transfer"
        groups[title] = [row for row in groups[title] if "-9-" not in row.name]
        patch.setattr(transfer_study, "GROUPS", groups)
        patch.chdir(folder)
        line = f"transfer --model {place}/lm/model --pretrained {place} {FLAGS}"
        with redirect_stdout(io.StringIO()) as printed:
            results = reproduce.main(line.split())
        (folder / "printed.txt").write_text(printed.getvalue())
    return folder, results


def predictions(done, name):
    folder = done[0] / "runs/transfer" / name
    return read_lines(
        (folder if (folder / "run.json").is_file() else folder / "out") / "predictions.jsonl"
    )


def test_every_row_is_made_but_those_of_an_absent_lm(done):
    missing = done[1]["missing"]
    assert missing and set(missing.values()) == {"what it starts from is missing"}
    assert all("larger" in name for name in missing)


def test_a_targets_prompt_starts_from_its_sources(done):
    """Before its first step, each prompt is what its row names."""
    runs = done[0] / "runs/transfer"
    for name, start in (
        ("food_reviews-to-record_nli-0", "source-food_reviews-0"),
        ("mixture-to-record_nli-2", "mixture-2"),
        ("average-3-to-record_nli-0", "average-3-for-record_nli-0/out"),
        ("top-mixture-3-to-record_nli-1", "top-mixture-3-for-record_nli-1/out"),
    ):
        record = read_json(runs / name / "run.json")
        assert record["arguments"]["init"] == str(runs / start)
    mixed = read_json(runs / "top-mixture-3-for-record_nli-1/out/run.json")["arguments"]
    names = {path.split("/")[-1] for path in mixed["train"]}
    assert names == {f"{t}-train.jsonl" for t in [*SOURCES, "record_nli"]} and mixed["seed"] == 1
    made = read_json(runs / "top-mixture-3-for-record_nli-1/result.json")
    assert "scratch-to-record_nli-0 " in made["command"]  # its own seed would be too alike
    best = {name.split("/")[-1] for name, _ in made["results"]["best"]}
    assert best == {f"source-{name}-1" for name in SOURCES}
    multitask = read_json(runs / "multitask-to-record_nli-0/run.json")["arguments"]["model"]
    assert multitask == str(runs / "multitask-0/model")


def test_targets_have_few_examples_and_continued_pretraining_no_held_out_cluster(done):
    runs = done[0] / "runs/transfer"
    assert len(read_lines(runs / "few/record_nli-train.jsonl")) == 8
    assert len(predictions(done, "scratch-to-record_nli-0")) == 6
    for file in (runs / "suite").glob("*-train.jsonl"):
        assert not {row["cluster"] for row in read_lines(file)} & set(HELD_OUT)
    shots = json.loads((runs / "ppt-few-1/out/shots.json").read_text())
    assert shots == json.loads((runs / "none-few-0/out/shots.json").read_text())


def test_scores_are_those_of_the_predictions(done):
    results = done[1]
    json.dumps(results, allow_nan=False)
    for target in TARGETS:
        rows = predictions(done, f"news_topic-to-{target}-0")
        assert results["pairs"][target]["news_topic"] == np.mean([row["f1"] for row in rows])
        seeds = [predictions(done, f"scratch-to-{target}-{seed}") for seed in range(3)]
        means = [np.mean([row["f1"] for row in rows]) for rows in seeds]
        assert results["methods"]["scratch"][target] == pytest.approx(means)
        assert results["baseline"][target] == pytest.approx(np.mean(means))


def test_the_report_has_every_table_and_the_picture(done):
    printed = (done[0] / "printed.txt").read_text()
    for text in ("similarity, neurons", "random | oracle", "average | 3", "top-mixture | 3"):
        assert text in printed, text
    (picture,) = (done[0] / "results").glob("*.png")
    assert picture.name == "transfer-model-part.png"


def test_fewer_steps_or_examples_make_a_part_of_the_study():
    for flag in ("--source-steps", "--target-steps", "--examples", "--count", "--steps"):
        assert reproduce.is_part(reproduce.parser().parse_args(["transfer", flag, "7"])), flag
    assert not reproduce.is_part(reproduce.parser().parse_args(["transfer"]))


def test_similarities_are_means_over_pairs_of_different_seeds(done):
    folder, results = done
    runs, tasks = folder / "runs/transfer", results["tasks"]
    assert tasks == [*SOURCES, *TARGETS]
    a, b = (
        [transfer.read_embedding(runs / f"{row}-{seed}")[0] for seed in range(3)]
        for row in ("source-food_reviews", "scratch-to-staff_reviews")
    )
    for kind in ("per_token", "average_tokens"):
        for other, column in ((b, 2), (a, 0)):  # a task and itself, too
            pairs = [(a[i], other[j]) for i, j in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))]
            mean = np.mean([transfer.similarity(x, y, kind) for x, y in pairs])
            assert results["similarities"][kind][0][column] == pytest.approx(mean, abs=1e-4)
            mean = np.mean([transfer.similarity(x, other[0], kind) for x in a[1:]])
            toward = results["of search"][kind][0][column]
            assert toward == pytest.approx(mean, abs=1e-4), "a transfer starts from seed 0"
    assert set(results["similarities"]) == set(transfer.KINDS)


def test_the_nearest_sources_are_those_of_the_most_similar_embeddings(done):
    runs = done[0] / "runs/transfer"
    sources = [str(runs / f"source-{name}-{seed}") for name in SOURCES for seed in (0, 1)]
    target = str(runs / "scratch-to-record_nli-2")
    embedding, *others = (transfer.read_prompt(f"{run}/embedding") for run in (target, *sources))
    near = {run: transfer.similarity(embedding, other) for run, other in zip(sources, others)}
    best = sorted(near, key=near.get)[:-4:-1]
    assert transfer_study.nearest(3, target, sources) == [(run, near[run]) for run in best]


def test_the_gain_of_a_row_is_its_mean_over_datasets_of_means_over_templates(done):
    results = done[1]["gains"]
    chance = {
        key: 1 / 3 for key in ((r["task"], r["id"]) for r in predictions(done, "none-zero-0"))
    }
    gains = []
    for task in HELD:
        rows = [row for row in predictions(done, "reptile-few-2") if row["task"] == task]
        parts = [[r["em"] for r in rows if r["template"] == t] for t in ("is", "paint")]
        gains.append(np.mean([3 * np.mean(part) - 1 for part in parts]))
    assert results["reptile-few"]["gain"][2] == pytest.approx(np.mean(gains))
    assert len(results["reptile-few"]["gain"]) == 3 and len(results["none-zero"]["gain"]) == 1
    run = {(r["task"], r["id"]): r for r in predictions(done, "reptile-few-2")}
    parts = promptability_study.relative_gains([run], chance)
    assert parts.mean() == pytest.approx(np.mean(gains))


def test_an_accuracy_stands_below_the_name_of_its_data_set(done):
    printed = (done[0] / "printed.txt").read_text().split("accuracy by dataset, in percent")[1]
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    (names,) = [row for row in rows if row[2:3] == ["shots"]]
    (reptile,) = [row for row in rows if row[1:3] == ["reptile", "16"]]
    (zero,) = [row for row in rows if row[1:3] == ["none", "0"]]
    for row, name in ((reptile, "reptile-few"), (zero, "none-zero")):
        for task, accuracy in done[1]["gains"][name]["datasets"].items():
            assert row[names.index(f"{task} *")] == f"{100 * accuracy:.0f}", (name, task)


def test_parts_of_unequal_templates_still_average_to_the_gain():
    """Three examples of a template weigh as much as one of another, and a dataset as a dataset."""
    run, chance = {}, {}
    for task, template, right in (("a", "x", (1, 0, 1)), ("a", "y", (1,)), ("b", "x", (0, 1))):
        for i, em in enumerate(right):
            key = task, f"{template}{i}"
            run[key] = {"template": template, "em": em}
            chance[key] = 0.5 if task == "a" else 0.25
    expected = ((2 / 3 / 0.5 - 1 + 1) / 2 + (0.5 / 0.25 - 1)) / 2
    parts = promptability_study.relative_gains([run], chance)
    assert parts.mean() == pytest.approx(expected)
    assert promptability_study.summary([run], chance)["gain"] == pytest.approx([expected])
    turned = dict(reversed(run.items()))
    assert np.array_equal(promptability_study.relative_gains([turned], chance), parts)


def one_run(right):
    """Of 40 examples of a task, `right` are right. Of 40 of another, which is at chance, half."""
    parts = (("story_end", right), ("same_sense", 20))
    return {
        (task, f"test-{i}-is"): {"template": "is", "em": int(i < count)}
        for task, count in parts
        for i in range(40)
    }


CHANCE = dict.fromkeys(one_run(0), 0.5)


def test_a_claim_of_promptability_is_that_its_first_row_gains_more():
    names = {name for _, *pair in promptability_study.CLAIMS for name in pair}
    right = {name: 5 + i for i, name in enumerate(sorted(names))}
    found, plain = {name: [one_run(count)] for name, count in right.items()}, 0
    words = {"none": "none", "T0": "t0", "LM and prompt": "mtl", "prompt alone": "ppt"}
    words |= {"Reptile": "reptile", "FOMAML": "fomaml"}
    pattern = r"(zero|16)-shot: ([^,>]+) > ([^,>]+)(, equal steps)?"
    for line in promptability_study.show_claims(found, CHANCE):
        a, b = (right[name] for name in line["rows"])
        share = 1 if line["slice"] == "those that can be learnt" else 1 / 2
        assert line["difference"] == pytest.approx(share * (a - b) / 20)
        if (match := re.fullmatch(pattern, line["claim"])) and {*match.group(2, 3)} <= {*words}:
            end = {"zero": "zero", "16": "few"}[match[1]]
            assert line["rows"] == [f"{words[match[part]]}-{end}" for part in (2, 3)]
            plain += 1
    assert plain >= 20


def test_a_row_is_at_the_floor_if_its_interval_reaches_chance():
    found = {name: [one_run(n)] for name, n in (("sure", 38), ("may be", 22), ("no", 3))}
    assert promptability_study.at_the_floor(found, CHANCE) == ["may be", "no"]


def test_the_templates_of_an_example_are_one_example(tmp_path):
    """The bootstrap must not take the same question in two wordings for two."""
    ems, rows = {"x": (1, 0, 0), "y": (1, 1, 0)}, []
    for template, values in ems.items():
        for i, em in enumerate(values):
            row = {"task": "a", "id": f"test-{i}-{template}", "template": template}
            rows.append(row | {"em": em, "f1": em})
    run, chance = {("a", row["id"]): row for row in rows}, {("a", row["id"]): 0.5 for row in rows}
    assert promptability_study.relative_gains([run], chance).tolist() == [[1, 0, -1]]
    write_lines(tmp_path / "predictions.jsonl", rows[::-1])
    study = SimpleNamespace(finished=lambda name: [SimpleNamespace(answers=tmp_path)])
    scores = transfer_tables.test_scores(study, "any")
    assert scores == [{"test-0": 1, "test-1": 0.5, "test-2": 0}]
    assert list(scores[0]) == sorted(scores[0])


def test_nearest_tasks_are_neighbours_in_the_order_of_the_heatmap():
    near = np.array([[1, 0, 0.9, 0.1], [0, 1, 0.2, 0.8], [0.9, 0.2, 1, 0], [0.1, 0.8, 0, 1.0]])
    order = transfer_tables.leaf_order(near)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    near = np.eye(5)  # 0 and 1 are a group; by its mean 3 is next, by its maximum 2, else 4
    near[0, 1:], near[1, 3:] = (0.9, 0.8, 0.7, 0.45), (0.3, 0.4)
    near = np.maximum(near, near.T)
    assert transfer_tables.leaf_order(near) == [0, 1, 3, 4, 2]
    assert transfer_tables.show_clusters(near, [*"abcde"]) == [*"abdec"]


def test_a_random_search_keeps_what_chance_keeps():
    scores, base = {"x": {"a": 0.6, "b": 0.8}}, {"x": 0.5}
    tables = transfer_tables.random_searches(scores, base, ["a", "b"], 400)
    one, two = (transfer_tables.mean_row(rows) for rows in zip(*tables))
    assert one["score"] == pytest.approx(0.7, abs=0.02) and two["gain_kept"] == 1


def test_the_mean_correlation_permutes_the_sources_of_all_targets_together():
    rng = np.random.default_rng(0)
    x, noise = rng.random(8), rng.random((3, 8))
    r, p = transfer_tables.mean_correlation([x, 2 * x, np.ones(8)], [x, x + 1, x])
    assert r == pytest.approx(2 / 3) and p < 0.01, "a constant counts 0"
    same = [x, x, x]
    r, p = transfer_tables.mean_correlation(same, [noise[0]] * 3)
    assert r == pytest.approx(np.corrcoef(x, noise[0])[0, 1])
    _, alone = transfer_tables.mean_correlation(same[:1], noise[:1])
    assert p == alone, "copies of a target are no further evidence"


def test_a_library_without_any_gain_is_valid_json(tmp_path, capsys):
    """No share of a gain that does not exist: null in the file, a dash in the table."""
    rows = [{"task": "x", "id": f"test-{i}-is", "template": "is", "f1": 1.0} for i in range(4)]
    write_lines(tmp_path / "predictions.jsonl", rows)
    jobs = [SimpleNamespace(answers=tmp_path)]
    study = SimpleNamespace(
        groups={"targets": [SimpleNamespace(name="scratch-to-x")]},
        finished=lambda name: jobs if name.startswith("scratch-") else [],
    )
    near = {"per_token": np.array([[1, 0, 0.9], [0, 1, 0.2], [0.9, 0.2, 1]])}
    scores = {"x": {"a": np.full(6, 0.5), "b": np.ones(6)}}
    results = transfer_tables.show_search(study, scores, near, ["x", "a", "b"])
    kept = [row["gain_kept"] for part in results["search"].values() for row in part]
    assert kept == [None] * 4 and json.loads(json.dumps(results, allow_nan=False)) is not None
    printed = capsys.readouterr().out
    assert printed.count(" | - |") == 4 and "nan" not in printed and "of the gain" not in printed


# A study by hand: the score of a method is the same for all examples of all seeds

LEVELS = {"scratch": 0.5, "mixture": 0.62, "text": 0.41}
LEVELS |= {"longer": 0.55, "tuned": 0.58, "multitask": 0.66}
WORDS = {"from scratch": "scratch", "transfer from a mixture": "mixture"}
WORDS |= {"transfer from text": "text", "longer prompt tuning": "longer"}
WORDS |= {"tuning of the LM": "tuned", "multi-task tuning of the LM": "multitask"}
BEST, SECOND, WORST = 0.9, 0.7, 0.2  # scores of a target from three sources


@pytest.fixture
def by_hand(monkeypatch):
    """(study, scores of its pairs, similarities, tasks). The nearest source is the best one for
    seven targets, and the second for two."""

    def test_scores(_, name):
        method, target = name.split("-to-")
        level = 0.5 if target in suite.AT_CHANCE else LEVELS.get(method)
        return [dict.fromkeys("abcde", level)] * 2 if method in LEVELS else []

    monkeypatch.setattr(transfer_tables, "test_scores", test_scores)
    sources, targets = ["food_reviews", "news_topic", "subject_type"], transfer_study.TARGETS
    tasks, scores = [*sources, *targets], {}
    near = np.zeros((len(tasks), len(tasks)))
    for i, target in enumerate(targets):
        order = [sources[(i + k) % 3] for k in range(3)]
        levels = dict(zip(order, (BEST, SECOND, WORST)))
        scores[target] = {name: np.full(5, levels[name]) for name in sources}
        if i < 2:
            order[:2] = order[1::-1]
        near[tasks.index(target), [tasks.index(name) for name in order]] = 0.6, 0.4, 0.1
    rows = [SimpleNamespace(name=f"scratch-to-{target}") for target in targets]
    study = SimpleNamespace(groups={"targets": rows})
    return study, scores, {"per_token": near, "neurons": -near}, tasks


def test_a_claim_is_that_its_first_method_scores_higher(by_hand):
    claims = transfer_tables.show_claims(by_hand[0])
    assert len(claims) == 2 * 6
    for line in claims:
        a, b = (LEVELS[WORDS[name]] for name in line["claim"].split(" > "))
        share = 1 if line["slice"] == "those that can be learnt" else 6 / 9
        assert line["difference"] == pytest.approx(share * (a - b))
        assert line["verdict"] == ("holds" if a > b else "does not hold")


def test_the_nearest_source_is_compared_with_none_and_with_the_mean_source(by_hand):
    found = {r["claim"]: r["difference"] for r in transfer_tables.show_nearest(*by_hand)}
    mean = (BEST + SECOND + WORST) / 3
    for kind, nearest in (("per_token", (7 * BEST + 2 * SECOND) / 9), ("neurons", WORST)):
        assert found[f"nearest, {kind} > from scratch"] == pytest.approx(nearest - 0.5)
        assert found[f"nearest, {kind} > a random source"] == pytest.approx(nearest - mean)


def test_a_search_by_what_predicts_the_score_needs_few_sources(by_hand, monkeypatch, capsys):
    """Of 200 random orders none is as good, and all are as good as the worst one."""
    _, scores, toward, tasks = by_hand
    monkeypatch.setattr(transfer, "pearson", lambda *rest: (0.0, 1.0))
    results = transfer_tables.show_search(*by_hand)
    first, worst = (results["search"][kind][0] for kind in toward)
    assert first["gain_kept"] == pytest.approx(1 - 2 * (BEST - SECOND) / (9 * (BEST - 0.5)))
    assert (first["p"], worst["p"]) == (1 / 201, 1)
    printed = capsys.readouterr().out
    assert "per_token: 80 % of the gain needs 1 of 3 sources" in printed
    assert "per_token: 90 % of the gain needs 2 of 3 sources" in printed
    pairs = {t: {s: part[s].mean() for s in part} for t, part in scores.items()}
    results |= {"pairs": pairs, "tasks": tasks, "of search": toward, "leaf order": tasks}
    figure, near = Figure(), {"average_tokens": toward["per_token"]}
    transfer_tables.draw(figure, results | {"similarities": near})
    image = figure.subfigs[0].axes[0].images[0]
    gains = [[100 * (score - 0.5) for score in part.values()] for part in pairs.values()]
    assert np.allclose(image.get_array(), gains)
    red, _, blue, _ = image.cmap(image.norm(30))
    assert blue > red, "a gain is blue"


def test_families_are_the_clusters_of_the_suite(by_hand):
    """Two reviews are near each other, and three topics. Seven tasks are alone in their family."""
    tasks = by_hand[3]
    clusters = [suite.TASKS[name].cluster for name in tasks]
    near = np.array([[0.9 * (a == b) for b in clusters] for a in clusters])
    np.fill_diagonal(near, 1)
    found = transfer_tables.show_families({"per_token": near}, tasks)["per_token"]
    assert found["silhouette"] == pytest.approx(0.9 * 5 / 12) and found["p"] < 0.01


# Given tasks


@pytest.fixture
def own(tmp_path, monkeypatch):
    """(command, folder): sources a and b and a target c, as convert.py writes them."""
    place = make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "draw_curve", lambda run, history: None)
    (tmp_path / "own").mkdir()
    for name, splits in (("a", ["train"]), ("b", ["train"]), ("c", ["train", "test"])):
        for split in splits:
            rows = suite_rows(name, 20, split, "")
            rows = [{key: row[key] for key in ("input", "target", "options")} for row in rows]
            write_lines(tmp_path / f"own/{name}-{split}.jsonl", rows)
    line = f"transfer --data own --model {place}/lm/model {FLAGS} --seeds 2 --out given"
    return line, tmp_path


def test_given_tasks_are_sources_or_targets(own, capsys):
    """A target has a test file. All pairs are made, with the LM's default rate, and reported."""
    line, folder = own
    results = reproduce.main(line.split())
    assert list(results["methods"]) == ["scratch"] and results["missing"] == {}
    assert set(results["pairs"]["c"]) == {"a", "b"} and results["tasks"] == ["a", "b", "c"]
    claims = [row["claim"] for row in results["nearest"]]
    assert "nearest, per_token > from scratch" in claims and len(claims) == 6
    runs = folder / "given/transfer"
    made = {path.parent.name for path in runs.glob("*/run.json")}
    assert made == {"source-a-0", "source-b-0", "a-to-c-0", "b-to-c-0"} | {
        f"scratch-to-c-{seed}" for seed in range(2)
    }
    assert read_json(runs / "a-to-c-0/run.json")["arguments"]["lr"] is None
    given = read_lines(folder / "own/c-train.jsonl")
    few = read_lines(runs / "few/c-train.jsonl")
    assert len(few) == 8 and all(row in given for row in few) and few != given[:8]
    printed = capsys.readouterr().out
    assert "families" not in printed and "others' scores" not in printed
    assert (folder / "results/transfer-model-own-part.json").is_file()
    for flag in ("--source-steps 4", "--examples 7", f"--model {reproduce.ASSETS}/lm"):
        with pytest.raises(ValueError, match=f"made with another {flag.split()[0]}"):
            reproduce.main(f"{line} {flag} --minutes 0".split())
    write_lines(folder / "own/b-train.jsonl", given)
    with pytest.raises(ValueError, match="made with another --data"):
        reproduce.main(f"{line} --minutes 0".split())


def test_given_files_are_checked_before_anything_is_written(own):
    line, folder = own
    good = (folder / "own/a-train.jsonl").read_text()
    for name, text, problem in (
        ("a-train", good + '{"input": "no target"}\n', "a-train.jsonl:21: needs a list"),
        ("a-train", "\n", "a-train.jsonl: holds no examples"),
        ("d-test", good, "d-test.jsonl: there is no d-train.jsonl"),
        ("scratch-train", good, "'scratch' cannot be a task's name"),
        ("v1.0-train", good, "'v1.0' cannot be a task's name"),
    ):
        file = folder / f"own/{name}.jsonl"
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(problem)):
            reproduce.main(f"{line} --plan".split())
        file.write_text(good) if name == "a-train" else file.unlink()
    with pytest.raises(ValueError, match="--seeds 1: prompts of one seed"):
        reproduce.main(f"{line} --seeds 1".split())
    assert not (folder / "given").exists()
    assert reproduce.main(f"{line} --plan".split()) == {}


# The real study


def whole_study(tmp_path) -> TransferStudy:
    flags = "transfer --pretrained assets --flags=--dtype=bfloat16"
    return transfer_study.make_study(reproduce.parser().parse_args(flags.split()), tmp_path)


def test_every_row_is_a_command_and_every_name_is_one_row(tmp_path):
    whole, runs = whole_study(tmp_path), {}
    assert len(whole.rows) == sum(map(len, whole.groups.values()))
    for job in whole.plan():
        if job.trains or job.program == "transfer.py":
            run = whole.programs[job.program].parse(whole.line(job))
            runs[job.row.name] = run
            assert (run.seed, run.dtype) == (job.seed, "bfloat16")
            assert run.out == str(job.answers)
        for name in re.findall(r"\{out\}/([\w-]+)-\d+", job.command):
            assert name in whole.rows, f"{job.row.name} starts from {name}"
    named = {name for _, *pair in promptability_study.CLAIMS for name in pair}
    assert named <= whole.rows.keys()
    assert {m for _, *pair in transfer_tables.CLAIMS for m in pair} <= {*transfer_tables.METHODS}
    for method in transfer_tables.METHODS:
        assert {f"{method}-to-{t}" for t in transfer_study.TARGETS} <= whole.rows.keys()
    pairs = [name for name in whole.rows if name.split("-to-")[0] in transfer_study.SOURCES]
    assert len(pairs) == len(transfer_study.SOURCES) * len(transfer_study.TARGETS) >= 96
    args = whole.args
    both = args.source_steps + args.target_steps
    for name, steps in (("longer", both), ("scratch", args.target_steps)):
        for target in transfer_study.TARGETS:
            assert runs[f"{name}-to-{target}"].steps == steps
            assert runs[f"{name}-larger-to-{target}"].steps == steps
    plain, meta = (args.steps, 16, 4), (args.steps, 64, 4)  # a step reads 64 examples, or 256
    expected = {"t0": plain, "ppt": plain, "mtl": plain, "reptile": meta, "fomaml": meta}
    expected |= {"reptile-small": (args.steps, 64, 1)}
    expected |= dict.fromkeys(("t0-long", "mtl-long"), (3 * args.steps, 16, 4))
    for name, numbers in expected.items():
        run = runs[name]
        assert (run.steps, run.batch_size, run.grad_accum) == numbers, name
        assert run.variant == name.split("-")[0]


def test_the_plan_fits_two_cores_for_three_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["transfer", "--plan"]) == {}
    hours = float(capsys.readouterr().out.split("quiet cores take ")[1].split()[0])
    assert 0.5 < hours <= 3 and not list(tmp_path.iterdir())


def test_the_folder_of_the_suite_is_not_that_of_given_tasks(done, own):
    line, folder = own
    assert f"--model {folder}" in line
    line = line.replace(f"{folder}/lm/model", f"{done[0]}/lm/model").replace("given", "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done[0])
        with pytest.raises(ValueError, match="made with another --data"):
            reproduce.main(line.replace("--data own", f"--data {folder}/own").split())


def test_a_folder_with_other_tasks_is_refused(done):
    with pytest.raises(ValueError, match="made with another --examples"):
        reproduce.main(f"transfer --out {done[0]}/runs --examples 9 --minutes 0".split())
