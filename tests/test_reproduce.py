"""Studies: runs that are made once, shared by processes and cut short; and what they conclude."""

import json
from types import SimpleNamespace

import pytest
from tiny_runs import write_lines

import cost
import data
import recursion_study
import reproduce
import study
import suite
import train
from checkpoints import read_json, write_json
from model import LM
from runs import ASSETS, Run
from study import Job, Row, Study

SHORT = "--batch-size 3 --max-new-tokens 4 --device cpu --eval-every 2"
PROMPT = f"train.py --method prompt_tuning --prompt-length 4 {SHORT}"
BEFORE = f"train.py --method connector_lm --connector-layers 1 --init random {SHORT}"
PROMPT_RATES = {"prompt": ("0.01", "0.03")}
TWO = [Row("prompt", PROMPT, 2, rates="prompt"), Row("before", BEFORE)]


@pytest.fixture
def reproduces(place, tmp_path, monkeypatch):
    """reproduces(rows, flags, rates) -> (results, names of the runs that were made, in order)."""
    monkeypatch.chdir(tmp_path)
    made, original = [], train.main

    def counted(line):
        made.append(line[line.index("--out") + 1].split("/")[-1])
        return original(line)

    monkeypatch.setattr(train, "main", counted)

    def call(rows, flags="", rates=PROMPT_RATES):
        made.clear()
        monkeypatch.setattr(recursion_study, "GROUPS", {"rows": rows})
        monkeypatch.setattr(recursion_study, "RATES", rates)
        monkeypatch.setattr(recursion_study, "ORDERINGS", [("a > b", "prompt", "before")])
        line = f"recursion --model {place}/lm/model --count 6 --steps 4 {flags}"
        return reproduce.main(line.split()), list(made)

    return call


def test_rows_are_made_once_and_their_numbers_are_stored(reproduces, tmp_path):
    results, made = reproduces(TWO)
    assert made == ["prompt-0", "prompt-1", "before-0"] and not results["missing"]
    assert reproduces(TWO)[1] == []
    stored = read_json(tmp_path / "results/recursion-model-part.json")["results"]
    runs = {name: len(part) for name, part in stored["runs"].items()}
    assert runs == {"prompt": 2, "before": 1} and stored["orderings"][0]["seeds"] == [2, 1]
    record = read_json(tmp_path / "runs/recursion/prompt-1/run.json")
    kept = stored["runs"]["prompt"][1]
    assert kept["results"] == record["results"] and kept["command"] == record["command"]
    assert record["arguments"]["seed"] == 1 and kept["lr"] == 0.01
    with pytest.raises(ValueError, match="train.jsonl: holds other questions"):
        reproduces(TWO, "--count 5")


def test_more_flags_reach_every_training(reproduces, tmp_path):
    reproduces(TWO[:1], "--flags=--log-every=3")
    record = read_json(tmp_path / "runs/recursion/prompt-1/run.json")
    assert record["arguments"]["log_every"] == 3


def test_the_grid_chooses_the_rate_that_is_best_on_dev(reproduces, tmp_path):
    names = ["grid-prompt-0.01-0", "grid-prompt-0.03-0"]
    assert reproduces(TWO[:1], "--grid")[1] == [*names, "prompt-0", "prompt-1"]
    folder = tmp_path / "runs/recursion"
    for name, em in zip(names, (0.25, 0.5)):
        record = read_json(folder / name / "run.json")
        assert record["results"].keys() == {"dev"} and record["arguments"]["steps"] == 1
        record["results"]["dev"]["em"] = em
        write_json(folder / name / "run.json", record)
    results, made = reproduces([TWO[0], TWO[0]._replace(name="again")])
    assert made == ["again-0", "again-1"] and results["rates"] == {
        "prompt": {"0.01": 25, "0.03": 50}
    }
    assert [run["lr"] for run in results["runs"]["again"]] == [0.03, 0.03]


def test_a_run_that_another_process_makes_is_left_to_it_and_waited_for(
    reproduces, tmp_path, monkeypatch
):
    other = Run(tmp_path / "runs/recursion/prompt-0", {})
    waited = []

    def ends(seconds):
        waited.append(seconds)
        other.lock.close()

    with other:
        monkeypatch.setattr(study.time, "sleep", ends)
        _, made = reproduces(TWO)
    assert made == ["prompt-1", "before-0", "prompt-0"] and waited == [study.WAIT]


def test_nothing_starts_when_the_minutes_are_over(reproduces, monkeypatch):
    results, made = reproduces(TWO, "--minutes 0")
    assert made == [] and set(results["missing"].values()) == {"no time"}
    clock, execute = [0.0], Study.execute

    def takes_a_minute(*rest):
        execute(*rest)
        clock[0] += 60

    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Study, "execute", takes_a_minute)
    results, made = reproduces(TWO, "--minutes 1.5")
    assert made == ["prompt-0", "prompt-1"]
    assert list(results["missing"]) == ["before-0"] and list(results["runs"]) == ["prompt"]


def test_a_failure_stops_no_other_row_and_is_not_repeated(reproduces):
    rows = [Row("wrong", f"{BEFORE} --passes 3"), TWO[1]]
    results, made = reproduces(rows, rates={})
    assert made == ["wrong-0", "before-0"] and "only neural" in results["missing"]["wrong-0"]
    assert reproduces(rows, rates={})[1] == []


def test_a_row_waits_for_what_it_starts_from(reproduces):
    later = Row("later", f"{PROMPT} --init {{out}}/prompt-1")
    never = Row("never", f"{BEFORE} --init {{pretrained}}/nothing")
    results, made = reproduces([later, never, *TWO])
    assert made == ["prompt-0", "prompt-1", "later-0", "before-0"]
    assert results["missing"] == {"never-0": "what it starts from is missing"}


def test_only_some_rows(reproduces):
    assert reproduces(TWO, "--only before")[1] == ["before-0"]
    assert reproduces(TWO, "--seeds 1")[1] == ["prompt-0"]
    with pytest.raises(ValueError, match="--only nothing: no row or table"):
        reproduces(TWO, "--only nothing")


def test_analyses_are_made_once_and_keep_what_they_return(reproduces, tmp_path):
    rows = [TWO[0], Row("hard", "audit.py hard {out}/prompt-0 --samples 2")]
    rows.append(Row("alone", "eval.py score {test}"))
    results, _ = reproduces(rows)
    assert results["hard"][0]["what"] == "prompt-0" and results["hard"][-1]["what"] == "alone-0"
    assert results["runs"]["alone"][0]["results"]["test"]["n"] == 6
    file = tmp_path / "runs/recursion/hard-0/result.json"
    assert read_json(file)["results"]["questions"] == 6
    file.write_text(json.dumps({"results": "kept"}))
    reproduces(rows)
    assert read_json(file) == {"results": "kept"}


# What a study concludes

RUN = {"arguments": {"method": "m"}, "results": {}}


def answer(i: int, em: float, task: str = "t") -> dict:
    """A line of predictions.jsonl."""
    line = {"id": str(i), "task": task, "input": "", "prediction": "", "answers": ["x"]}
    return line | {"em": em, "f1": em}


def finish(made: Study, name: str, *records: dict) -> list[Job]:
    """Make as many seeds of a row finished as there are records. Returns them."""
    jobs = made.jobs(made.rows[name])[: len(records)]
    for job, record in zip(jobs, records, strict=True):
        job.folder.mkdir()
        write_json(job.folder / ("run.json" if job.trains else "result.json"), record)
    return jobs


def test_orderings_hold_do_not_hold_or_stay_undecided(tmp_path, capsys):
    """Two seeds against one: better at two hops, worse at one hop, and the same over a person."""
    ems = {
        "a": {"one-hop": (40, 42), "two-hop": (60, 58), "two-hop-person": (10, 10)},
        "b": {"one-hop": (70,), "two-hop": (20,), "two-hop-person": (11,)},
    }
    rows = [Row("a", "train.py", 2), Row("b", "train.py"), Row("never", "train.py")]
    made = Study(SimpleNamespace(seeds=3), tmp_path, {"": rows}, {}, {})
    for name, parts in ems.items():
        for job in finish(made, name, *[RUN] * len(parts["one-hop"])):
            lines = []
            for task, right in parts.items():
                for i in range(100):
                    lines.append(answer(i, float(i * 37 % 100 < right[job.seed]), task))
            write_lines(job.folder / "predictions.jsonl", lines[:: 1 - 2 * job.seed])
    claims = [("a > b", "a", "b"), ("a > never", "a", "never")]
    found = {r["slice"]: r for r in study.show_orderings(made, claims)}
    verdicts = {part: r["verdict"] for part, r in found.items()}
    assert verdicts.pop("all") in ("holds", "undecided")
    assert verdicts == {
        "one-hop": "does not hold",
        "two-hop": "holds",
        "two-hop-person": "undecided",
    }
    two = found["two-hop"]
    assert abs(two["difference"] - 0.39) < 1e-9 and two["low"] < 0.39 < two["high"]
    assert two["seeds"] == [2, 1] and two["n"] == 100 and found["all"]["n"] == 300
    assert "| a > b | two-hop | 2, 1 | +39.0 |" in capsys.readouterr().out


def test_a_claim_with_a_margin_is_about_the_whole_interval(tmp_path):
    """100 questions. 1 point less is within 8 points, 30 points less are not; 6 less may be."""
    rows = [Row(name, "train.py") for name in "abcd"]
    made = Study(SimpleNamespace(seeds=3), tmp_path, {"": rows}, {}, {})
    for name, right in (("a", 60), ("b", 61), ("c", 90), ("d", 66)):
        (job,) = finish(made, name, RUN)
        lines = [answer(i, float(i < right)) for i in range(100)]
        write_lines(job.folder / "predictions.jsonl", lines)
    claims = [("near", "a", other, 0.08) for other in "bcd"] + [("higher", "a", "b")]
    found = [row["verdict"] for row in study.show_orderings(made, claims)]
    assert found == ["holds", "does not hold", "undecided", "undecided"]


def test_a_cell_has_the_means_and_the_deviation_of_test():
    def record(dev, test):
        return {"results": {"dev": {"em": dev, "tasks": {}}, "test": {"em": test, "tasks": {}}}}

    assert study.cell([record(0.5, 0.2)], "all") == "50.0 / 20.0"
    assert study.cell([record(0.5, 0.2), record(0.6, 0.4)], "all") == "55.0 / 30.0 ± 14.1"
    assert study.cell([record(0.5, 0.2)], "one-hop") == "- / -"


def test_the_threshold_is_the_best_one_on_dev(monkeypatch):
    """The first pass is right where it is sure of its answer, the second on the other questions.

    It is the other way around where the first is least sure, so fewer second passes are no better.
    """
    examples = [data.Example(f"{i}", "x", ("x",), "", str(i)) for i in range(6)]
    sure = [-0.1, -0.2, -0.3, -4.0, -5.0, -6.0]
    first = [("x" if c > -1 or c == -6 else "y", c) for c in sure]
    patch = {
        "load_run": lambda run: None,
        "predict": lambda *rest: ["x" if -6 < c < -1 else "y" for c in sure],
    }
    for name, function in patch.items():
        monkeypatch.setattr(recursion_study, name, function)
    monkeypatch.setattr(recursion_study.audit, "arguments", lambda loaded, examples: ())
    monkeypatch.setattr(recursion_study.recurse, "predict_first_pass", lambda *rest: first)
    threshold = recursion_study.best_threshold("run", examples)
    assert [c < threshold for c in sure] == [False, False, False, True, True, True]


def test_answers_of_several_runs_are_timed_in_turn(monkeypatch, tmp_path):
    write_lines(tmp_path / "test", [{"input": f"{i}", "target": "x"} for i in range(400)])
    clock, order = [0.0], []

    def answers(run, *rest):
        order.append(run)
        clock[0] += {"a": 32.0, "b": 64.0}[run] + 320 * (order.count(run) == 1)

    monkeypatch.setattr(recursion_study.audit, "arguments", lambda run, e: (run[-1], e))
    patch = {"load_run": str, "predict": answers}
    patch["time"] = SimpleNamespace(perf_counter=lambda: clock[0])
    for name, function in patch.items():
        monkeypatch.setattr(recursion_study, name, function)
    line = [str(tmp_path / "test"), "runs/a", "runs/b", "--out", "folder"]
    assert recursion_study.time_answers(line) == {"a": 0.1, "b": 0.2}
    assert order == ["a", "b"] * 5


def test_two_sizes_stand_beside_each_other(tmp_path, capsys):
    """Prompt tuning of the larger LM gains 20 points at one hop, and less than one at two hops."""
    ems = {"prompt": [(0.4, 0.1), (0.6, 0.1)], "prompt-large": [(0.7, 0.104)]}
    ems |= {"neural-2": [(0.6, 0.3)], "lm-alone": [(0.3, 0.0)]}
    whole = whole_study(tmp_path, "")
    for name, pairs in ems.items():
        records = []
        for one, two in pairs:
            tasks = {"one-hop": {"em": one}, "two-hop": {"em": two}}
            results = {"test": {"em": (one + two) / 2, "tasks": tasks}}
            records.append(RUN | {"results": results, "trained_parameters": 7})
        finish(whole, name, *records)
    clocked = {f"{name}-0": 0.001 * k for k, name in enumerate(recursion_study.CLOCKED)}
    finish(whole, "seconds", {"results": clocked})
    found = recursion_study.show_sizes(whole)
    assert list(found["rows"]) == ["lm-alone", "prompt", "neural-2", "prompt-large"]
    alone, prompt, neural, large = found["rows"].values()
    assert prompt["em"]["one-hop"] == 0.5 and prompt["seeds"] == 2
    assert alone["operations"] == prompt["operations"] == 1 and alone["seconds"] is None
    assert large["operations"] > 2 and large["frozen"] > neural["frozen"] == alone["frozen"]
    assert (alone["trained"], neural["trained"], neural["seconds"]) == (0, 7, 0.001)
    share = found["share"]["neural-2"]
    assert share["one-hop"] == pytest.approx(0.5) and share["two-hop"] is None
    assert found["gap"]["one-hop"] == pytest.approx(0.2) and found["share"].keys() == {"neural-2"}
    text = capsys.readouterr().out
    assert "| prompt | 2 | 30.0 | 50.0 | 10.0 | - | " in text and "| 2.33 | 1.00 |" in text
    assert "| the gap, in points | +10.2 | +20.0 | +0.4 |" in text
    assert "| neural-2 | 147 % | 50 % | - |" in text


def test_the_report_reads_test_candidates_and_names_the_audited_runs(tmp_path, capsys):
    whole = whole_study(tmp_path)

    def candidates(share: float) -> dict:
        return {"recall": {"8": share}, "best": 0.1, "majority": 0.2, "distinct": 3.0}

    splits = {"dev": 0.25, "test": 0.75}
    halves = {s: candidates(x) | {"tasks": {"two-hop": candidates(x)}} for s, x in splits.items()}
    scores = {s: {"em": x / 2, "tasks": {"two-hop": {"em": x / 4}}} for s, x in splits.items()}
    record = {
        "arguments": {"method": "m", "candidates": 8},
        "candidates": [halves],
        "results": scores,
    }
    finish(whole, "textual-8", record)
    found = {row["slice"]: row for row in recursion_study.show_candidates(whole)}
    assert found["all"]["recall"] == {"8": 0.75} and found["all"]["em"] == 0.375
    assert found["two-hop"]["em"] == 0.1875 and found["all"]["samples"] == 8
    assert "| textual-8 | all | 75.0 | 10.0 | 20.0 | 37.5 | 3.0 |" in capsys.readouterr().out

    kept = {"passes": 1.5, "operations": 3.0, "threshold": None, "em": 0.5}
    curve = [kept | {"random": 0.4, "oracle": 0.6}] * 3
    rate = {"what": "other: the other's answer", "n": 4, "rate": 0.5, "low": 0.2, "high": 0.8}
    for name in ("passes", "passes-paper"):
        beside = {"curve": curve, "two_passes_operations": 2.0, "beside": {}}
        finish(whole, name, {"results": beside})
    for name in ("bridge", "bridge-pause"):
        finish(whole, name, {"results": {"rates": [rate]}})
    drawn = tmp_path / "bridge-0" / "out" / "bridge.png"  # the other one could not be drawn
    drawn.parent.mkdir()
    drawn.write_text("a question")
    assert recursion_study.show_analyses(whole).keys() == {
        "passes",
        "passes-paper",
        "bridge",
        "bridge-pause",
    }
    assert (tmp_path / "study-bridge.png").read_text() == "a question"
    assert not (tmp_path / "study-bridge-pause.png").exists()
    text = capsys.readouterr().out
    for what in ("one pass or two: {}", "the first pass of {} hands over"):
        paper, best = (what.format(run) for run in ("neural-2-0", f"{recursion_study.BEST}-0"))
        assert paper in text and best in text


def test_operations_of_textual_recursion():
    """Two for each parameter of a layer and token, and for each entry of the table and new token;
    here 18 tokens of a question and 3 different samples of 4, then 30 of all and 4 of an answer."""
    lm = LM.from_pretrained(ASSETS / "lm")
    layers, table = sum(p.numel() for p in lm.layers.parameters()), lm.embed_tokens.weight.numel()
    sampled = 2 * layers * (18 + 12 - 1) + 2 * table * 12
    samples = {"distinct": 3.0}
    assert recursion_study.textual_operations(samples, reads=False) == sampled
    more = 2 * layers * (30 + 4 - 1) + 2 * table * 4
    assert recursion_study.textual_operations(samples, reads=True) == sampled + more


# The real study


def whole_study(tmp_path, flags="--grid") -> Study:
    args = reproduce.parser().parse_args(f"recursion --pretrained assets {flags}".split())
    args.picture = tmp_path / "study.png"
    return recursion_study.make_study(args, tmp_path)


def test_the_name_of_a_row_says_what_it_trains():
    rows = {row.name: row.command for rows in recursion_study.GROUPS.values() for row in rows}
    methods = {"neural": "neural_recursion", "after": "lm_connector", "before": "connector_lm"}
    for name, command in rows.items():
        first, _, rest = name.partition("-")
        if first in methods and "routed" not in name:
            assert command.startswith(f"train.py --method {methods[first]} "), name
            assert ("--init random" in command) == ("random" in name), name
            ours = "residual" in name or "muon" in name
            assert command.count("--residual") == 1, name
            assert ("--residual on" in command) == ours, name
        assert ("--pause" in command) == ("-pause-" in name), name
        assert ("--pause-trained" in command) == ("-pause-" in name and "trained" in name), name
    assert rows["bridge-pause"].split("/")[1].startswith(f"{recursion_study.BEST}-0")
    assert rows["bridge-trained"].split("/")[1].startswith(f"{recursion_study.SEVEN}-0")
    assert rows["bridge"].split("/")[1].startswith("neural-2-0")


def test_every_row_is_a_command_and_every_name_is_one_row(tmp_path):
    whole = whole_study(tmp_path)
    assert len(whole.rows) == sum(map(len, whole.groups.values()))
    named = {row.rates for row in whole.rows.values()} | whole.rates.keys()
    named |= {name for _, *pair in recursion_study.ORDERINGS for name in pair[:2]}
    assert named - {""} <= whole.rows.keys()
    steps = {}
    for job in whole.plan():
        line = whole.line(job)
        if job.trains:
            run = whole.programs[job.program].parse(line)
            steps[job.row.name] = run.steps
            assert run.seed == job.seed and run.out == str(job.folder)
            assert not job.short or run.test is None
    assert {steps["neural-2"], steps["prompt-long"], steps["grid-prompt-0.024"]} == {
        1200,
        3600,
        300,
    }


def test_the_plan_is_computed_without_making_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["recursion", "--plan", "--grid"]) == {}
    text = capsys.readouterr().out
    assert "| headline, as in table 4 | 18 | " in text and "| learning rates | " in text
    assert not list(tmp_path.iterdir())
    hours = float(text.split("quiet cores take ")[1].split()[0])
    assert 1 < hours <= 2.8


def test_costs_follow_the_operations_and_the_finished_runs(tmp_path):
    whole = whole_study(tmp_path, "")
    jobs = {job.row.name: job for job in whole.plan() if job.seed == 0}
    runs = {n: train.parse(whole.line(j)) for n, j in jobs.items() if j.program == "train.py"}
    two, eight = (cost.passes(runs[f"before-{n}-random"])[0] for n in (2, 8))
    assert (two, eight) == (3, 6)  # forward and backward through 6 layers, and 3 for each own one
    cached = cost.passes(runs["neural-2"])[0]
    assert cached == two and cost.passes(runs["neural-2-passes-3"])[0] == 2 * cached
    again = Job(
        Row("again", f"{recursion_study.TEXTUAL} --candidates 8", rates="prompt"), 0, tmp_path
    )
    trained = cost.passes(runs["neural-2-residual-pause-3-trained"])[0]
    assert trained == cached + 2  # forward and backward through the first pass
    taken = cost.seconds(whole, again) - cost.seconds(whole, jobs["textual-8"])
    steps = {name: cost.training_tokens(whole, run) for name, run in runs.items()}
    prompts = 3 * cost.TOKEN * steps["prompt"]  # textual-8 takes them from textual-16
    assert taken == pytest.approx(prompts)
    assert steps["neural-2-residual-pause-3"] > 1.4 * steps["neural-2-residual"]
    large = cost.recorded_seconds(whole, jobs["prompt-large"])
    weights = 7 * 256 * (4 * 256 + 3 * 672), 6 * 192 * (4 * 192 + 3 * 512)  # of both LMs' layers
    assert large == pytest.approx(weights[0] / weights[1] * cost.TOKEN * steps["prompt"])
    answers = {name: recursion_study.answer_operations(run) for name, run in runs.items()}
    assert answers["prompt"] == 1 and answers["neural-2"] == pytest.approx(2 + 2 / 6)
    assert answers["neural-2-residual-pause-3"] == pytest.approx(1.5 * answers["neural-2"])
    before = cost.show_cost(whole)
    seconds = 2 * cost.recorded_seconds(whole, jobs["neural-2"])
    finish(whole, "neural-2", RUN | {"seconds": seconds})
    after = cost.show_cost(whole)
    assert before["factor"] == 1 and after["factor"] == pytest.approx(2)
    assert after["seconds"] == pytest.approx(2 * before["seconds"], rel=1e-3)
    assert after["left"] < after["seconds"] and before["left"] == before["seconds"]


@pytest.mark.parametrize("flags", ["reader --top 3", "reader --context 9", "transfer --count 5"])
def test_less_of_an_experiment_has_a_record_of_its_own(flags):
    assert reproduce.is_part(reproduce.parser().parse_args(flags.split()))
    assert not reproduce.is_part(reproduce.parser().parse_args(flags.split()[:1]))


def test_headroom_is_measured_once_and_does_not_cut_long_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = {name: suite.TASKS[name] for name in ("people_trivia", "record_to_text")}
    monkeypatch.setattr(suite, "TASKS", tasks)
    flags = "headroom --count 8 --steps 1".split()
    results = reproduce.main(flags)
    assert read_json(tmp_path / "results/headroom-part.json")["results"] == results
    assert results.keys() == tasks.keys()
    place = tmp_path / "runs/headroom"
    for name, longest in (("people_trivia", 16), ("record_to_text", 30)):
        record = read_json(place / f"{name}-fine_tuning/run.json")
        assert 16 <= record["arguments"]["max_new_tokens"] <= longest
        assert results[name]["fine_tuning"] == round(100 * record["results"]["test"]["em"], 1)
        assert (record["arguments"]["max_new_tokens"] > 16) == (name == "record_to_text")
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda line: pytest.fail("made twice"))
        assert reproduce.main(flags) == results
    with pytest.raises(ValueError, match="--steps"):
        reproduce.main([*flags[:-1], "2"])
    with pytest.raises(ValueError, match="holds other questions"):
        reproduce.main("headroom --count 7 --steps 1".split())
