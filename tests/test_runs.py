"""Runs from the command line: complete folders, frozen weights, exact resume after a kill, refusals of one line."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as metrics
import recurse
import train
from model import answer, option_scores

ROOT = Path(train.__file__).parent
PEOPLE = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Fedor", "Galina", "Hugo"]
TOWNS = ["Velmor", "Kranstad", "Pornwick", "Delmau"]
TUNED = ["prompt_tuning", "neural_recursion", "lm_connector", "connector_lm", "fine_tuning"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with questions, text, and a tiny LM pretrained on the text by the command line itself."""
    folder = tmp_path_factory.mktemp("place")
    facts = [(name, TOWNS[i % 4]) for i, name in enumerate(PEOPLE)]
    records = [
        {
            "id": f"q{i}",
            "task": "a" if i % 2 else "b",
            "question": f"where was {n} born",
            "answer": [t, "nowhere"],
        }
        for i, (n, t) in enumerate(facts)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:5]))
    texts = [
        f"{name} was born in {town}. {name} lives in {TOWNS[(i + 1) % 4]}."
        for i, (name, town) in enumerate(facts)
    ] * 12
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    shape = "--dim 32 --layers 2 --heads 2 --vocab-size 300 --context 96 --length 16 --batch-size 4 --steps 12 --eval-every 6 --lr 0.01".split()
    train.main(
        [
            "--method",
            "pretrain",
            "--train",
            str(folder / "text.jsonl"),
            "--dev",
            str(folder / "text.jsonl"),
            "--out",
            str(folder / "lm"),
            *shape,
        ]
    )
    return folder


def command(place, method, out, *more):
    """The arguments of a short run on the tiny LM."""
    text = method.startswith("pretrain")
    files = ["--train", place / ("text.jsonl" if text else "train.jsonl")]
    files += ["--dev", place / ("text.jsonl" if text else "dev.jsonl")]
    rest = "--steps 6 --eval-every 2 --log-every 1 --batch-size 3 --max-new-tokens 4 --prompt-length 4 --connector-layers 1 --length 16".split()
    return [
        str(a)
        for a in [
            "--method",
            method,
            "--model",
            place / "lm" / "model",
            *files,
            "--out",
            out,
            *rest,
            *more,
        ]
    ]


def run(arguments, **options):
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("method", [*TUNED, "pretrain_connector"])
def test_a_run_leaves_a_complete_folder_and_the_frozen_lm_as_it_was(place, tmp_path, method):
    before = hashlib.sha256((place / "lm" / "model" / "model.safetensors").read_bytes()).hexdigest()
    record = train.main(command(place, method, tmp_path / "run"))
    assert (
        hashlib.sha256((place / "lm" / "model" / "model.safetensors").read_bytes()).hexdigest()
        == before
    )
    assert record["weights_before"] == record["weights_after"] and (
        record["weights_before"] is None
    ) == (method == "fine_tuning")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    trained = (
        {"model"}
        if method == "fine_tuning"
        else {"adapter_config.json", "adapter_model.safetensors"}
    )
    assert names >= {"run.json", "metrics.jsonl", "state.safetensors", "curve.png"} | trained
    assert not [n for n in names if "unfinished" in n]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] == record["results"]
    if method != "pretrain_connector":
        rows = metrics.read_predictions(tmp_path / "run")
        assert metrics.summary(rows) == record["results"]["dev"] and [r["id"] for r in rows] == [
            f"q{i}" for i in range(5)
        ]
        model, prefix, tokenizer, _ = recurse.load_run(tmp_path / "run")
        assert answer(
            model, tokenizer, [tokenizer.encode(r["input"]).ids for r in rows], prefix, 4
        ) == [r["prediction"] for r in rows]


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_leaves_a_whole_run_refuses_a_second_writer_and_resumes(
    place, tmp_path, monkeypatch, method
):
    """From the command line's entry to files on disk: a run that dies at step 5 and is resumed
    leaves the same bytes as one that does not, and a locked folder is left alone."""

    class Dead(Exception):
        """Stands for a process that ends without a word."""

    def dies(run, record):
        if record["step"] == 5:
            raise Dead
        log(run, record)

    shape = "--dim 16 --layers 1 --heads 2 --context 32 --seed 1".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record = train.main(command(place, method, whole, *shape))
    log = train.Run.log
    monkeypatch.setattr(train.Run, "log", dies)
    with pytest.raises(Dead):
        train.main(command(place, method, killed, *shape))
    monkeypatch.undo()
    with open(killed / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="in use by another process"):
            train.main(command(place, method, killed, *shape, "--resume"))
    train.main(command(place, method, killed, *shape, "--resume"))
    assert record["results"]["dev"]
    made = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert made == {path.relative_to(killed) for path in killed.rglob("*") if path.is_file()}
    assert {"run.json", "metrics.jsonl", "state.safetensors", "curve.png"} <= set(map(str, made))
    a, b = (load_file(run / "state.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for path in made - set(map(Path, ("run.json", "state.safetensors", "curve.png", "lock"))):
        assert (whole / path).read_bytes() == (killed / path).read_bytes(), path


def test_what_is_trained_moves_and_only_that(place, tmp_path):
    train.main(command(place, "neural_recursion", tmp_path / "run", "--seed", "3"))
    torch.manual_seed(3)
    lm = recurse.LM.from_pretrained(place / "lm" / "model")
    start = dict(recurse.new_connector(lm, "neural_recursion", 1).named_parameters())
    after = load_file(tmp_path / "run" / "state.safetensors")
    assert all(not torch.equal(start[name], after[f"trained.{name}"]) for name in start)


def test_fine_tuning_learns_its_training_questions_and_dev_chooses_the_best(place, tmp_path):
    more = ["--steps", "200", "--eval-every", "50", "--batch-size", "8", "--lr", "0.01"]
    record = train.main(command(place, "fine_tuning", tmp_path / "run", *more))
    scores = {
        r["step"]: r["score"]
        for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
        if "score" in r
    }
    assert record["results"]["dev"]["em"] == max(scores.values()) == 1.0
    assert record["step"] == min(step for step, score in scores.items() if score == 1.0)


@pytest.mark.parametrize(
    "method", ["prompt_tuning", "neural_recursion", "fine_tuning", "pretrain_connector"]
)
def test_bf16_runs_through(place, tmp_path, method):
    record = train.main(command(place, method, tmp_path / "run", "--dtype", "bfloat16"))
    assert record["weights_before"] == record["weights_after"] and record["seconds"] > 0


@pytest.mark.parametrize("method", TUNED)
def test_what_is_frozen_may_be_bf16_and_what_is_trained_is_float32(place, method):
    lm, _ = train.load_lm(train.parse(command(place, method, "unused", "--dtype", "bfloat16")))
    assert lm.embedding.weight.dtype == (
        torch.float32 if method == "fine_tuning" else torch.bfloat16
    )


def test_dev_scores_along_training_are_taken_from_the_whole_file(place, tmp_path, monkeypatch):
    """Files are often sorted: of 5 questions with --eval-limit 2 the 1st and the 4th are asked, and all 5 at the end."""
    asked, score = [], metrics.score
    monkeypatch.setattr(
        metrics,
        "score",
        lambda examples, answers: (
            asked.append([e.id for e in examples]) or score(examples, answers)
        ),
    )
    train.main(command(place, "prompt_tuning", tmp_path / "run", "--eval-limit", "2"))
    assert asked == [["q0", "q3"]] * 3 + [[f"q{i}" for i in range(5)]]


def test_a_frozen_lm_that_changes_is_reported(place, tmp_path, monkeypatch):
    def careless(run, *arguments):
        lm.embedding.weight.data[0] += 1
        return fit(run, *arguments)

    load, fit = train.load_lm, train.fit
    lm, tokenizer = load(train.parse(command(place, "connector_lm", "unused")))
    monkeypatch.setattr(train, "load_lm", lambda args: (lm, tokenizer))
    monkeypatch.setattr(train, "fit", careless)
    with pytest.raises(ValueError, match="weights changed"):
        train.main(command(place, "connector_lm", tmp_path / "run"))


def test_held_out_text_is_not_trained_on(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"document number {i}."}) + "\n" for i in range(100))
    )
    args = train.parse(["--method", "pretrain", "--train", str(tmp_path / "text.jsonl")])
    tokenizer = train.data.train_tokenizer(["document number 0123456789."], 300)
    texts = [
        tokenizer.decode(corpus.tokens.tolist()) for corpus in train.load_corpus(args, tokenizer)
    ]
    assert (
        "number 97." in texts[0]
        and "number 98." not in texts[0]
        and texts[1] == "document number 98.document number 99."
    )


def test_a_resumed_run_keeps_its_command_and_what_it_found(place, tmp_path, monkeypatch):
    before = train.main(command(place, "connector_lm", tmp_path / "run"))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(command(place, "connector_lm", tmp_path / "run", "--resume"))
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        after["command"] == before["command"]
        and "--resume" not in after["command"]
        and after["results"] == before["results"]
    )


def test_a_run_remembers_a_tokenizer_of_its_own(place, tmp_path):
    """A base without tokenizer.json is trained with --tokenizer, and asked with the same."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).write_bytes((place / "lm" / "model" / name).read_bytes())
    (tmp_path / "words.json").write_bytes((place / "lm" / "model" / "tokenizer.json").read_bytes())
    train.main(
        command(
            place,
            "connector_lm",
            tmp_path / "run",
            "--model",
            tmp_path / "base",
            "--tokenizer",
            tmp_path / "words.json",
        )
    )
    assert metrics.main(
        ["ask", "--run", str(tmp_path / "run"), "--max-new-tokens", "4", "where was Anna born"]
    ) == [metrics.read_predictions(tmp_path / "run")[0]["prediction"]]


def test_where_there_are_options_one_of_them_is_the_answer(place, tmp_path, capsys):
    """P3's format from training to `eval.py score`, whose figures for the bare LM and for the run are those of choosing the likeliest option."""
    rows = [
        {
            "inputs_pretokenized": f"Where does {n} live?",
            "targets_pretokenized": TOWNS[i % 4],
            "answer_choices": TOWNS,
            "task": "homes",
        }
        for i, n in enumerate(PEOPLE)
    ]
    (tmp_path / "homes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = train.main(
        command(
            place,
            "prompt_tuning",
            tmp_path / "run",
            "--train",
            tmp_path / "homes.jsonl",
            "--dev",
            tmp_path / "homes.jsonl",
        )
    )
    predictions = [r["prediction"] for r in metrics.read_predictions(tmp_path / "run")]
    assert set(predictions) <= set(TOWNS) and record["results"]["dev"]["em"] == sum(
        p == TOWNS[i % 4] for i, p in enumerate(predictions)
    ) / len(PEOPLE)
    scored = metrics.main(["score", str(tmp_path / "homes.jsonl"), "--run", str(tmp_path / "run")])
    assert scored == record["results"]["dev"] and "homes" in capsys.readouterr().out
    lm, tokenizer, examples = (
        *train.load_lm(train.parse(command(place, "prompt_tuning", "unused"))),
        train.data.read(tmp_path / "homes.jsonl"),
    )
    tokens = train.data.encode(examples, tokenizer, lm.config.eos[0], 90)
    likeliest = [
        TOWNS[scores.argmax()]
        for scores in option_scores(lm, [t.input for t in tokens], [t.options for t in tokens])
    ]
    bare = metrics.main(
        ["score", str(tmp_path / "homes.jsonl"), "--model", str(place / "lm" / "model")]
    )
    assert bare["em"] == sum(a == b for a, b in zip(likeliest, [e.target for e in examples])) / len(
        examples
    )
    assert (
        metrics.main(
            [
                "score",
                str(tmp_path / "homes.jsonl"),
                "--model",
                str(place / "lm" / "model"),
                "--limit",
                "4",
            ]
        )["n"]
        == 4
    )


def test_an_empty_question_is_refused(place, tmp_path, capsys):
    train.main(command(place, "connector_lm", tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        metrics.main(["ask", "--run", str(tmp_path / "run"), " "])
    assert stop.value.code == 2 and "empty" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_not_resumed(place, tmp_path):
    files = command(
        place, "prompt_tuning", tmp_path / "run", "--train", str(tmp_path / "mine.jsonl")
    )
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    train.main(files)
    (tmp_path / "mine.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(ValueError, match="other data"):
        train.main([*files, "--resume"])


def test_ask_answers_as_the_run_did(place, tmp_path):
    train.main(command(place, "connector_lm", tmp_path / "run"))
    asked = subprocess.run(
        [
            sys.executable,
            ROOT / "eval.py",
            "ask",
            "--run",
            tmp_path / "run",
            "--max-new-tokens",
            "4",
            "where was Anna born",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        asked.returncode == 0
        and asked.stdout.strip("\n") == metrics.read_predictions(tmp_path / "run")[0]["prediction"]
    )


def test_a_run_is_asked_and_resumed_from_any_folder(place, tmp_path, monkeypatch):
    """Files named relative to where the run began are found from elsewhere, and inputs are asked as they were trained."""
    (tmp_path / "begin").mkdir()
    monkeypatch.chdir(tmp_path / "begin")
    lines = [
        {"input": f"Name: {name}\nTown:", "target": TOWNS[i % 4]} for i, name in enumerate(PEOPLE)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [
        os.path.relpath(a) if Path(a).is_absolute() else a
        for a in command(
            place,
            "connector_lm",
            tmp_path / "run",
            "--train",
            tmp_path / "begin" / "pairs.jsonl",
            "--dev",
            tmp_path / "begin" / "pairs.jsonl",
        )
    ]
    train.main(flags)
    monkeypatch.chdir(tmp_path)
    asked = metrics.main(["ask", "--run", "run", "--max-new-tokens", "4", lines[0]["input"]])
    assert asked == [metrics.read_predictions("run")[0]["prediction"]]
    record = train.main(
        command(
            place,
            "connector_lm",
            "run",
            "--train",
            "begin/pairs.jsonl",
            "--dev",
            "begin/pairs.jsonl",
            "--resume",
        )
    )
    assert record["step"] <= 6


def test_learning_rate_warms_up_and_decays():
    args = train.parse(
        "--method pretrain --steps 100 --warmup 0.1 --lr 1 --schedule linear".split()
    )
    assert [train.learning_rate(s, args) for s in (0, 9, 10, 55, 99)] == pytest.approx(
        [0.1, 1.0, 1.0, 0.5, 1 / 90]
    )
    args.schedule, args.warmup = "constant", 0.0
    assert train.learning_rate(0, args) == train.learning_rate(99, args) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def same_state(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("metrics.jsonl", "predictions.jsonl"):
        if (a / name).exists():
            assert (a / name).read_text() == (b / name).read_text()
    assert (a / "adapter_model.safetensors").read_bytes() == (
        b / "adapter_model.safetensors"
    ).read_bytes()


def interrupt(place, method, out, number, more):
    """Starts a run in a process of its own, sends it a signal after its first checkpoint, and returns its exit status."""
    # The same number of threads as in this process: sums are split by thread, and another split rounds otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [sys.executable, ROOT / "train.py", *command(place, method, out, *more)]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (out / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    "method, optimizer",
    [
        ("neural_recursion", "adamw"),
        ("prompt_tuning", "adafactor"),
        ("pretrain_connector", "adamw"),
    ],
)
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    place, tmp_path, method, optimizer
):
    more = ["--optimizer", optimizer, "--steps", "40", "--eval-every", "4"]
    train.main(command(place, method, tmp_path / "whole", *more))
    status, _ = interrupt(place, method, tmp_path / "killed", signal.SIGKILL, more)
    assert status == -signal.SIGKILL
    train.main(command(place, method, tmp_path / "killed", *more, "--resume"))
    same_state(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_with_one_line_and_resumes(place, tmp_path, number):
    more = ["--steps", "60", "--eval-every", "4"]
    train.main(command(place, "prompt_tuning", tmp_path / "whole", *more))
    status, errors = interrupt(place, "prompt_tuning", tmp_path / "stopped", number, more)
    assert status == 130 and "--resume" in errors and "Traceback" not in errors
    train.main(command(place, "prompt_tuning", tmp_path / "stopped", *more, "--resume"))
    same_state(tmp_path / "whole", tmp_path / "stopped")


def test_a_half_written_metrics_line_is_forgotten(place, tmp_path):
    train.main(command(place, "prompt_tuning", tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(before + '{"step": 7, "lo')
    train.main(command(place, "prompt_tuning", tmp_path / "run", "--resume"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(place, tmp_path, monkeypatch):
    real, calls = train.target_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train, "target_loss", poisoned)
    with pytest.raises(ValueError, match="loss is nan at step 4"):
        train.main(command(place, "neural_recursion", tmp_path / "run"))
    monkeypatch.undo()
    train.main(command(place, "neural_recursion", tmp_path / "whole"))
    train.main(command(place, "neural_recursion", tmp_path / "run", "--resume"))
    same_state(tmp_path / "whole", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(arguments, *words, untouched: Path | None = None, cwd=None):
    result = run(arguments, cwd=cwd)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    if untouched is not None:
        assert not untouched.exists()


BAD = {
    "no checkpoint folder": (["--model", "{place}/nowhere/at/all"], ["nowhere"]),
    "no data file": (["--train", "{place}/none.jsonl"], ["none.jsonl", "no such file"]),
    "broken line": (["--train", "{place}/broken.jsonl"], ["broken.jsonl:2"]),
    "no answer": (["--dev", "{place}/unanswered.jsonl"], ["unanswered.jsonl:1", "answer"]),
    "long question": (["--train", "{place}/long.jsonl"], ["long.jsonl:2", "context"]),
    "long dev question": (["--dev", "{place}/long.jsonl"], ["long.jsonl:2", "context"]),
    "long prompt": (
        ["--method", "prompt_tuning", "--prompt-length", "90"],
        ["train.jsonl:1", "context"],
    ),
    "a prompt that fills the context": (
        ["--method", "prompt_tuning", "--prompt-length", "600"],
        ["--prompt-length 600", "context"],
    ),
    "a folder for a file": (["--train", "{place}"], ["is a folder"]),
    "a Connector for another composition": (
        ["--init", "{place}/connector", "--method", "lm_connector"],
        ["trained for neural_recursion", "lm_connector"],
    ),
    "wrong tokenizer": (["--tokenizer", "{place}/large"], ["tokenizer", "belongs to another LM"]),
    "adapter of another base": (["--init", "{place}/foreign"], ["another base"]),
    "a tokenizer with other ids": (
        ["--tokenizer", "{place}/small"],
        ["--tokenizer", "belongs to another LM"],
    ),
    "a Connector of another depth": (
        ["--init", "{place}/connector", "--connector-layers", "2"],
        ["--connector-layers 1"],
    ),
    "a way to make prompts": (["--init", "vocab"], ["--init vocab", "neural_recursion"]),
    "no such adapter": (["--init", "{place}/nothing"], ["--init", "nothing"]),
    "a start for fine-tuning": (
        ["--method", "fine_tuning", "--init", "{place}/connector"],
        ["--init", "fine_tuning"],
    ),
    "an adapter of another kind": (
        ["--method", "prompt_tuning", "--init", "{place}/connector"],
        ["Connector", "prompt_tuning"],
    ),
    "unknown method": (["--method", "magic"], ["magic", "neural_recursion"]),
    "no steps": (["--steps", "0"], ["--steps"]),
    "negative learning rate": (["--lr", "-1"], ["--lr"]),
    "learning rate that is no number": (["--lr", "nan"], ["--lr"]),
    **(
        {}
        if torch.cuda.is_available()
        else {"a device that is not there": (["--device", "cuda"], ["--device cuda"])}
    ),
    "unknown flag": (["--colour", "red"], ["--colour"]),
}


@pytest.fixture(scope="module")
def bad(place):
    """The tiny LM's place, with broken files beside the good ones."""
    (place / "broken.jsonl").write_text('{"question": "a", "answer": ["b"]}\n{"question": \n')
    (place / "unanswered.jsonl").write_text('{"question": "a", "answer": []}\n')
    (place / "long.jsonl").write_text(
        '{"question": "a", "answer": ["b"]}\n'
        + json.dumps({"question": "why " * 200, "answer": ["b"]})
        + "\n"
    )
    (place / "large").mkdir()
    (place / "small").mkdir()
    train.data.train_tokenizer(["another text"], 262).save(str(place / "small" / "tokenizer.json"))
    train.data.train_tokenizer([" ".join(f"word{i}" for i in range(400))], 600).save(
        str(place / "large" / "tokenizer.json")
    )
    train.main(command(place, "neural_recursion", place / "connector"))
    other = train.LM(recurse.LM.from_pretrained(place / "lm" / "model").config)
    train.adapters.save_adapter(
        place / "foreign", recurse.new_connector(other, "neural_recursion", 1), other
    )
    return place


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(bad, tmp_path, case):
    flags, words = BAD[case]
    flags = [flag.replace("{place}", str(bad)) for flag in flags]
    refused(
        command(bad, "neural_recursion", tmp_path / "run", *flags),
        *words,
        untouched=tmp_path / "run",
    )


def test_existing_and_changed_and_busy_runs_are_refused(place, tmp_path):
    out = tmp_path / "run"
    train.main(command(place, "neural_recursion", out))
    content = {p.name: p.read_bytes() for p in out.iterdir()}
    refused(command(place, "neural_recursion", out), "exists", "--resume")
    refused(command(place, "neural_recursion", out, "--resume", "--lr", "0.5"), "--lr", "0.5")
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command(place, "neural_recursion", out, "--resume"), "in use by another process")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == content
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    refused(
        command(place, "neural_recursion", tmp_path / "other", "--resume"), "not a run's folder"
    )


def test_a_broken_checkpoint_is_named(place, tmp_path):
    out = tmp_path / "run"
    train.main(command(place, "neural_recursion", out))
    whole = (out / "state.safetensors").read_bytes()
    (out / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(command(place, "neural_recursion", out, "--resume"), "state.safetensors", "corrupt")


def test_help_from_another_folder(tmp_path):
    result = run(["--help"], cwd=tmp_path, env=os.environ | {"COLUMNS": "100"})
    assert (
        result.returncode == 0
        and "--method" in result.stdout
        and "neural_recursion" in result.stdout
    )
