"""The training loop on its own, with models small enough to check by hand, and what it owes a run that ends too soon.

Whole runs from the command line are in test_runs.py.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import adapters
import data
import train
from model import LM, Config

ROOT = Path(train.__file__).parent


class Dead(Exception):
    """Stands for a process that ends without a word."""


class Toy(nn.Module):
    """Predicts a token from the one before it; dropout makes each step depend on the random state."""

    def __init__(self, dropout=0.0):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(20, 20, generator=draw))
        self.gain = nn.Parameter(torch.ones(20))
        self.dropout = dropout

    def loss(self, batch):
        asked = batch.targets != data.NO_TARGET
        logits = F.dropout(self.table[batch.ids[asked]], self.dropout) * self.gain
        return F.cross_entropy(logits, batch.targets[asked], reduction="sum")


EXAMPLES = [data.Encoded([1 + i % 7, 2 + i % 5], [3 + i] * (1 + i % 4)) for i in range(12)]


@pytest.fixture
def fit(monkeypatch):
    """fit(folder, model, flags) -> (result, micro-batch numbers asked for); `dies_at` is the number at which the process ends."""
    monkeypatch.setattr(train, "draw_curve", lambda run, history: None)

    def call(
        folder,
        model,
        flags="",
        evaluate=lambda: None,
        save=lambda: None,
        loss_of=None,
        dies_at=None,
        size=3,
    ):
        asked = []

        def batch_at(number):
            if number == dies_at:
                raise Dead
            asked.append(number)
            return data.batches(EXAMPLES, size, 0, number)

        args = train.parse(
            [
                "--method",
                "pretrain",
                "--out",
                str(folder),
                "--device",
                "cpu",
                *"--lr 0.1 --steps 12 --eval-every 4 --log-every 1".split(),
                *flags.split(),
            ]
        )
        with train.Run(args) as run:
            return train.fit(run, model, batch_at, loss_of or model.loss, evaluate, save), asked

    return call


@pytest.fixture
def plain(monkeypatch):
    """Gradient descent in the place of the optimiser: a step is the learning rate times the gradient, and no more."""
    monkeypatch.setattr(
        train,
        "make_optimizer",
        lambda trained, args: torch.optim.SGD(trained.parameters(), lr=args.lr),
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


# ---------------------------------------------------------------------------------------------------------------------
# The step


def test_a_step_is_the_mean_over_all_targets_of_all_its_batches(fit, plain, tmp_path):
    """Batches with different numbers of targets: the mean of their means would be another step."""
    once, twice = Toy(), Toy()
    fit(tmp_path / "once", once, "--steps 1 --clip 1e9", size=12)
    _, asked = fit(tmp_path / "twice", twice, "--steps 1 --clip 1e9 --accumulate 2", size=6)
    counts = [
        int((data.batches(EXAMPLES, 6, 0, i).targets != data.NO_TARGET).sum()) for i in range(2)
    ]
    assert asked == [0, 1] and counts[0] != counts[1]
    torch.testing.assert_close(once.table, twice.table)
    assert lines(tmp_path / "once")[0]["loss"] == pytest.approx(
        lines(tmp_path / "twice")[0]["loss"], rel=1e-6
    )
    fresh = Toy()
    whole = data.batches(EXAMPLES, 12, 0, 0)
    (fresh.loss(whole) / (whole.targets != data.NO_TARGET).sum()).backward()
    torch.testing.assert_close(
        once.table,
        fresh.table
        - train.learning_rate(0, train.parse("--method pretrain --lr 0.1 --steps 1".split()))
        * fresh.table.grad,
    )


def test_the_scheduled_rate_is_the_rate_of_the_step(fit, plain, tmp_path):
    """With a gradient of 1 the parameter walks down by the sum of the rates."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    loss = lambda batch: model.w[0] * (batch.targets != data.NO_TARGET).sum()
    fit(
        tmp_path / "run", model, "--steps 8 --warmup 0.5 --schedule linear --clip 1e9", loss_of=loss
    )
    rates = [
        0.025,
        0.05,
        0.075,
        0.1,
        0.1,
        0.075,
        0.05,
        0.025,
    ]  # up over four steps, then down towards 0 after the eighth
    assert [r["lr"] for r in lines(tmp_path / "run")] == pytest.approx(rates)
    assert model.w.item() == pytest.approx(-sum(rates))


def test_a_gradient_longer_than_clip_is_cut_to_it(fit, plain, tmp_path):
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    loss = lambda batch: (
        (model.w * torch.tensor([3.0, 4.0])).sum() * (batch.targets != data.NO_TARGET).sum()
    )  # norm 5
    fit(
        tmp_path / "cut", model, "--steps 1 --schedule constant --warmup 0 --clip 0.5", loss_of=loss
    )
    torch.testing.assert_close(model.w.detach(), -0.1 * 0.5 * torch.tensor([0.6, 0.8]))


def test_decay_shrinks_matrices_and_leaves_gains(fit, tmp_path):
    model = Toy()
    before = model.table.detach().clone()
    fit(
        tmp_path / "run",
        model,
        "--steps 1 --schedule constant --warmup 0 --weight-decay 0.5",
        loss_of=lambda batch: (model.table.sum() + model.gain.sum()) * 0.0,
    )
    torch.testing.assert_close(model.table.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model.gain.detach(), torch.ones(20))


def test_adamw_has_the_papers_betas_and_epsilon():
    args = train.parse("--method neural_recursion --lr 0.1".split())
    optimizer = train.make_optimizer(Toy(), args)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(
        g["betas"] == (0.9, 0.95) and g["eps"] == 1e-6 and g["lr"] == 0.1
        for g in optimizer.param_groups
    )


def test_adafactor_takes_its_first_step_in_the_direction_of_the_signs():
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[5.0, -0.01], [2.0, -3.0]])
    train.Adafactor([p], lr=0.3).step()
    torch.testing.assert_close(p.detach(), -0.3 * p.grad.sign())


def test_the_loss_is_the_sum_over_targets_of_the_naive_one():
    torch.manual_seed(0)
    lm = LM(Config(40, 16, 2, 2, 1, 8, 24, 32))
    for p in lm.parameters():
        nn.init.normal_(p, std=0.3)
    batch, prompt = data.collate(EXAMPLES[:5], list(range(5))), torch.randn(3, 16)
    for prefix, start in ((None, 0), (lm.read(prompt), 3)):
        expected = 0.0
        for e in EXAMPLES[:5]:  # one by one, the prompt as if it were tokens
            x = torch.cat([prompt[:start], lm.embed(torch.tensor([e.input + e.target]))[0]])[None]
            logprobs = lm.logits(lm(x)).log_softmax(-1)[0]
            expected -= sum(
                logprobs[start + len(e.input) - 1 + i, token] for i, token in enumerate(e.target)
            )
        torch.testing.assert_close(train.target_loss(lm, prefix, batch), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What a run keeps


def scripted(scores):
    """An evaluation whose scores are known beforehand; it goes on where a resumed run needs it to."""
    return iter(scores).__next__


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("dies_at", [3, 4, 14, 23])
def test_a_resumed_run_is_the_uninterrupted_one(fit, tmp_path, optimizer, dies_at):
    """Moments, dropout, schedule, batches, the best so far: before the first checkpoint, right at one, between two, at the end."""
    flags, scores = f"--optimizer {optimizer} --accumulate 2", [0.2, 0.9, 0.4]
    whole, saved = Toy(dropout=0.5), []
    torch.manual_seed(0)
    result, numbers = fit(
        tmp_path / "whole",
        whole,
        flags,
        scripted(scores),
        lambda: saved.append(whole.table.detach().clone()),
    )
    assert numbers == list(range(24)) and result["step"] == 8 and result["score"] == 0.9
    assert (
        len(saved) == 3 and torch.equal(saved[1], saved[2]) and torch.equal(whole.table, saved[1])
    )  # at 4, at 8, and the best once more
    torch.manual_seed(0)
    with pytest.raises(Dead):
        fit(tmp_path / "killed", Toy(dropout=0.5), flags, scripted(scores), dies_at=dies_at)
    done = dies_at // 2 // 4 * 4
    torch.manual_seed(99 if done else 0)  # a process that resumes has drawn other numbers by then
    resumed = Toy(dropout=0.5)
    again, numbers = fit(
        tmp_path / "killed", resumed, f"{flags} --resume", scripted(scores[done // 4 :])
    )
    assert numbers == list(range(2 * done, 24))
    assert {k: again[k] for k in ("step", "score")} == {"step": 8, "score": 0.9}
    assert torch.equal(resumed.table, whole.table) and torch.equal(resumed.gain, whole.gain)
    a, b = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(
        k.startswith("optimizer.") and v.numel() == 400 for k, v in a.items()
    )  # moments are there at all
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_the_best_is_the_first_of_equals_or_the_latest_without_scores(fit, tmp_path):
    assert fit(tmp_path / "equals", Toy(), evaluate=scripted([0.0, 0.5, 0.5]))[0]["step"] == 8
    result, _ = fit(tmp_path / "latest", Toy())
    assert result["step"] == 12 and result["score"] is None


def test_a_finished_run_that_is_resumed_takes_no_step(fit, tmp_path):
    model, again = Toy(), Toy()
    first, _ = fit(tmp_path / "run", model, evaluate=scripted([0.1, 0.3, 0.2]))
    before = (
        (tmp_path / "run" / "metrics.jsonl").read_bytes(),
        (tmp_path / "run" / "state.safetensors").read_bytes(),
    )
    second, numbers = fit(tmp_path / "run", again, "--resume", evaluate=scripted([]))
    assert (
        numbers == []
        and second["step"] == first["step"] == 8
        and torch.equal(model.table, again.table)
    )
    assert before == (
        (tmp_path / "run" / "metrics.jsonl").read_bytes(),
        (tmp_path / "run" / "state.safetensors").read_bytes(),
    )


def nan_loss(model, batch, step):
    return model.loss(batch) * (float("nan") if step == 6 else 1.0)


def infinite_gradient(model, batch, step):
    """The root's slope at 0 is infinite, its value is not."""
    return model.loss(batch) + (
        (model.gain - model.gain.detach()).abs().sum().sqrt() if step == 6 else 0.0
    )


@pytest.mark.parametrize("broken", [nan_loss, infinite_gradient])
def test_what_is_not_finite_stops_the_run_at_once(fit, tmp_path, broken):
    model, seen = Toy(), []

    def loss_of(batch):
        seen.append(batch)
        if len(seen) == 6:
            kept.append((tmp_path / "run" / "state.safetensors").read_bytes())
        return broken(model, batch, len(seen))

    kept = []
    with pytest.raises(ValueError, match="at step 6.*--lr") as caught:
        fit(tmp_path / "run", model, loss_of=loss_of, evaluate=scripted([0.5]))
    assert "\n" not in str(caught.value) and kept == [
        (tmp_path / "run" / "state.safetensors").read_bytes()
    ]
    assert load_file(tmp_path / "run" / "state.safetensors")["trained.table"].isfinite().all()
    assert [r["step"] for r in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["parameter", "score"])
def test_a_checkpoint_that_is_not_finite_is_never_written(fit, tmp_path, what):
    """A step can leave the finite numbers although its loss and gradient did not; there is no loss after the last one to tell."""
    model, saved = Toy(), []

    def evaluate():
        if what == "parameter":
            with torch.no_grad():
                model.table[0, 0] = float("inf")
        return 0.5 if what == "parameter" else float("nan")

    with pytest.raises(ValueError, match="not finite after step 4"):
        fit(tmp_path / "run", model, "--steps 4", evaluate=evaluate, save=lambda: saved.append(1))
    assert not saved and not (tmp_path / "run" / "state.safetensors").exists()


def test_a_signal_saves_the_step_it_interrupts(fit, tmp_path):
    model, seen = Toy(), []

    def loss_of(batch):
        seen.append(batch)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return model.loss(batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", model, loss_of=loss_of, evaluate=scripted([0.5]))
    assert signal.getsignal(signal.SIGTERM) is before and len(seen) == 6
    _, numbers = fit(tmp_path / "run", Toy(), "--resume", evaluate=scripted([0.1, 0.1]))
    assert numbers == list(range(6, 12))  # not from the checkpoint at 4


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with questions, text, and a tiny LM that the command line pretrained on the text."""
    folder = tmp_path_factory.mktemp("tiny")
    people = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Fedor"]
    records = [
        {"question": f"where was {n} born", "answer": [t]}
        for n, t in zip(people, ["Velmor", "Kranstad", "Delmau"] * 2)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} was born in Velmor."}) + "\n" for n in people * 10)
    )
    (folder / "long.jsonl").write_text(
        json.dumps({"question": "why so " * 8, "answer": ["b"]}) + "\n"
    )
    train.main(command(folder, "pretrain", folder / "lm"))
    return folder


SHAPE = "--dim 32 --layers 1 --heads 2 --vocab-size 300 --context 96 --length 16".split()
SHORT = "--steps 40 --eval-every 4 --log-every 1 --batch-size 3 --max-new-tokens 3 --prompt-length 4 --connector-layers 1".split()


def command(place, method, out, *more):
    """The arguments of a short run."""
    file = place / ("text.jsonl" if method.startswith("pretrain") else "questions.jsonl")
    flags = [] if method == "pretrain" else ["--model", place / "lm" / "model", "--length", "16"]
    flags += (
        [*SHAPE, "--lr", "0.01"]
        if method in ("pretrain", "pretrain_encoder", "pretrain_bert")
        else []
    )
    return [
        str(a)
        for a in [
            "--method",
            method,
            *flags,
            "--train",
            file,
            "--dev",
            file,
            "--out",
            out,
            *SHORT,
            *more,
        ]
    ]


def start(arguments, out):
    """A run in a process of its own, under way: it has written a checkpoint."""
    # The same number of threads as in this process: sums are split by thread, and another split rounds otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while not (out / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    return process


def contents(folder):
    """What two equal runs share: every file but those that tell when and where."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("run.json", "curve.png", "lock", "state.safetensors")
    }


@pytest.mark.parametrize(
    "method, optimizer",
    [
        ("neural_recursion", "adafactor"),
        ("prompt_tuning", "adamw"),
        ("fine_tuning", "adamw"),
        ("pretrain", "adamw"),
        ("pretrain_encoder", "adamw"),
        ("pretrain_bert", "adamw"),
    ],
)
def test_killed_and_resumed_ends_with_the_same_bits(place, tmp_path, method, optimizer):
    arguments = command(place, method, tmp_path / "whole", "--optimizer", optimizer)
    whole = train.main(arguments)
    arguments[arguments.index("--out") + 1] = str(tmp_path / "killed")
    process = start(arguments, tmp_path / "killed")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    again = train.main([*arguments, "--resume"])
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert again["results"] == whole["results"] and again["step"] == whole["step"]
    a, b = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method, steps", [("pretrain_encoder", "300"), ("pretrain_bert", "1200")])
def test_encoders_learn_and_leave_published_folders(place, tmp_path, method, steps):
    """The text has six names at one place and the rest is fixed: little is left to guess. The tokenizer is the LM's and more."""
    load, names = {
        "pretrain_encoder": (train.adapters.T5Encoder, ["<extra_id_0>", "<extra_id_31>"]),
        "pretrain_bert": (train.rerank.Bert, ["[CLS]", "[SEP]", "[MASK]"]),
    }[method]
    record = train.main(
        command(
            place,
            method,
            tmp_path / "run",
            "--steps",
            steps,
            "--eval-every",
            "100",
            "--batch-size",
            "12",
            "--lr",
            "0.005",
        )
    )
    words, tokenizer, model = (
        train.load_tokenizer(place / "lm" / "model"),
        train.load_tokenizer(tmp_path / "run" / "model"),
        load.from_pretrained(tmp_path / "run" / "model"),
    )
    assert all(
        words.get_vocab_size()
        <= tokenizer.token_to_id(name)
        < model.config.vocab_size
        == tokenizer.get_vocab_size()
        for name in names
    )
    assert tokenizer.encode("Anna was born").ids == words.encode("Anna was born").ids
    losses = [-r["score"] for r in lines(tmp_path / "run") if "score" in r]
    assert (
        record["results"]["dev"]["loss"] == min(losses) < 1.2 and len(losses) == int(steps) // 100
    )  # guessing by frequency costs 2.2


def test_a_folder_in_use_is_refused_to_a_second_process(place, tmp_path):
    arguments = command(
        place, "prompt_tuning", tmp_path / "run", "--steps", "2000", "--eval-every", "1"
    )  # longer than it takes to try
    process = start(arguments, tmp_path / "run")
    try:
        with pytest.raises(FileExistsError, match="in use by another process"):
            train.main([*arguments, "--resume"])
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_the_same_command_gives_the_same_run_and_another_seed_another(place, tmp_path):
    a, b, c = (
        train.main(command(place, "connector_lm", tmp_path / name, "--seed", seed))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and a["results"] == b["results"]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "c"))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours)
    assert shlex.split(a["command"])[2:] == command(
        place, "connector_lm", tmp_path / "a", "--seed", "1"
    )
    assert c["data_hash"] == a["data_hash"] and c["fingerprint"] == a["fingerprint"]


def test_init_goes_on_from_a_trained_adapter(place, tmp_path):
    train.main(command(place, "prompt_tuning", tmp_path / "first"))
    record = train.main(
        command(
            place,
            "prompt_tuning",
            tmp_path / "second",
            "--init",
            str(tmp_path / "first"),
            "--lr",
            "0",
        )
    )
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert (
        torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"]) and record["step"] == 4
    )


def test_what_a_prompt_starts_from(place, tmp_path):
    """With a rate of 0 the stored prompt is the start: embeddings of the most frequent answers, or of a text, then vocabulary."""
    lm, tokenizer = (
        LM.from_pretrained(place / "lm" / "model"),
        train.load_tokenizer(place / "lm" / "model"),
    )
    targets = [e.target for e in train.data.read(place / "questions.jsonl")]
    wanted = {
        "labels": [
            lm.embedding.weight[tokenizer.encode(label, add_special_tokens=False).ids].mean(0)
            for label in dict.fromkeys(targets)
        ],  # equally frequent
        "text:Velmor, born": list(
            lm.embedding.weight[tokenizer.encode("Velmor, born", add_special_tokens=False).ids[:4]]
        ),
    }
    for i, (init, rows) in enumerate(wanted.items()):
        train.main(
            command(
                place,
                "prompt_tuning",
                tmp_path / str(i),
                "--init",
                init,
                "--lr",
                "0",
                "--steps",
                "1",
                "--prompt-length",
                "4",
            )
        )
        stored = load_file(tmp_path / str(i) / "adapter_model.safetensors")["prompt_embeddings"]
        assert stored.shape == (4, 32)
        torch.testing.assert_close(stored[: len(rows)], torch.stack(rows))


def test_an_lm_for_another_tokenizer_ends_as_its_texts_do(place, tmp_path):
    """BOS and EOS are what the tokenizer puts around a text, not ids 0."""
    from tokenizers import processors

    tokenizer = train.load_tokenizer(place / "lm" / "model")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos, eos = (tokenizer.token_to_id(t) for t in ("<s>", "</s>"))
    for name, template, expected in (
        ("both", "<s> $A </s>", (bos, (eos,))),
        ("none", "$A", (None, ())),
    ):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", bos), ("</s>", eos)]
        )
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        train.main(
            command(
                place,
                "pretrain",
                tmp_path / f"lm-{name}",
                "--tokenizer",
                str(tmp_path / name),
                "--steps",
                "1",
            )
        )
        config = LM.from_pretrained(tmp_path / f"lm-{name}" / "model").config
        assert (config.bos, config.eos) == expected


def test_a_kill_before_the_first_record_is_complete_can_be_resumed(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "run.json.unfinished").write_text('{"comm')
    train.main(command(place, "prompt_tuning", tmp_path / "run", "--steps", "1", "--resume"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 1


def test_another_lm_under_the_same_name_is_not_resumed(place, tmp_path):
    lm = LM.from_pretrained(place / "lm" / "model")
    tokenizer = train.load_tokenizer(place / "lm" / "model")
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    arguments = command(
        place, "prompt_tuning", tmp_path / "run", "--model", str(tmp_path / "lm"), "--steps", "2"
    )
    train.main(arguments)
    before = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "lm").rename(tmp_path / "old")
    with torch.no_grad():
        lm.norm.weight += 0.5
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="another LM"):
        train.main([*arguments, "--resume"])
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_loss_too_large_for_a_perplexity_is_still_a_result(place, tmp_path):
    record = train.main(
        command(place, "pretrain", tmp_path / "run", "--lr", "100", "--warmup", "0", "--steps", "2")
    )
    assert record["results"]["dev"]["loss"] > 710


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line, before anything is written

REFUSED = {
    "windows longer than the context": ("pretrain", ["--length", "97"], "--length 97"),
    "windows longer than the frozen LM's context": (
        "pretrain_connector",
        ["--length", "97"],
        "--length 97",
    ),
    "too little text": ("pretrain", ["--train", "{tmp}/little.jsonl"], "too few"),
    "one document, nothing to hold out": (
        "pretrain",
        ["--train", "{tmp}/little.jsonl", "--dev", ""],
        "--dev",
    ),
    "heads that do not divide the width": ("pretrain", ["--heads", "5"], "--heads 5"),
    "odd heads": ("pretrain", ["--dim", "6"], "--dim 6"),
    "a longer prompt than said": (
        "prompt_tuning",
        ["--init", "{place}/prompt", "--prompt-length", "4"],
        "--prompt-length",
    ),
    "a question that leaves no room for its answer": (
        "connector_lm",
        ["--dev", "{place}/long.jsonl", "--max-new-tokens", "70"],
        "long.jsonl:1",
    ),
    "an id twice": ("prompt_tuning", ["--dev", "{tmp}/twice.jsonl"], "twice.jsonl:2"),
    "half a character": ("prompt_tuning", ["--train", "{tmp}/half.jsonl"], "half.jsonl:1"),
    "an abbreviated flag": ("prompt_tuning", ["--meth", "prompt_tuning"], "--meth"),
    "no method": (None, ["--steps", "1"], "--method"),
    "an output folder inside a file": (
        "prompt_tuning",
        ["--out", "{tmp}/twice.jsonl/run"],
        "twice.jsonl",
    ),
}


@pytest.fixture(scope="module")
def prompt(place):
    """A stored prompt so long that the questions beside it do not fit."""
    lm = LM.from_pretrained(place / "lm" / "model")
    adapters.save_adapter(place / "prompt", adapters.SoftPrompt(torch.zeros(90, 32)), lm)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(place, prompt, tmp_path, capsys, case):
    method, more, word = REFUSED[case]
    (tmp_path / "little.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "question": "a", "answer": ["b"]}\n' * 2)
    (tmp_path / "half.jsonl").write_text('{"question": "\\ud83d", "answer": ["b"]}\n')
    more = [a.format(tmp=tmp_path, place=place) for a in more]
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        train.main(command(place, method, tmp_path / "run", *more) if method else more)
    message = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = capsys.readouterr().err.strip()
    assert word in message and "\n" not in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# --plan


def left_for_the_backward_pass(compute, *modules):
    """Bytes that autograd keeps of what compute() makes, each storage once, parameters apart."""
    known, kept = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (
            tensor  # held, so that no other takes its address
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compute()
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


@pytest.mark.parametrize(
    "method", ["neural_recursion", "lm_connector", "connector_lm", "prompt_tuning", "fine_tuning"]
)
@pytest.mark.parametrize(
    "family",
    [
        {},
        dict(
            family="gpt_neox",
            layer_norm=True,
            gated=False,
            activation="gelu",
            mlp_bias=True,
            qkv_bias=True,
            o_bias=True,
            parallel=True,
            tied=False,
        ),
    ],
)
def test_the_plan_counts_what_a_step_holds(tmp_path, capsys, method, family):
    config = Config(60, 48, 3, 4, 4 if family else 2, 12, 96, 64, **family)
    LM(config).save(tmp_path / "lm")
    folder = tmp_path / "here"
    table = train.main(
        f"--method {method} --model {tmp_path / 'lm'} --plan --batch-size 5 --length 40 --prompt-length 7 --max-new-tokens 3 --device cpu --out {folder}".split()
    )
    assert not folder.exists()
    lm = LM.from_pretrained(tmp_path / "lm")
    if method == "fine_tuning":
        trained = lm.requires_grad_(True)
        adapter = None
    else:
        trained = adapter = (
            adapters.SoftPrompt(torch.randn(7, 48))
            if method == "prompt_tuning"
            else train.recurse.new_connector(lm, method, 2)
        )
    ids = torch.randint(60, (5, 40))

    def step():
        model, prefix = train.recurse.compose(method, lm, adapter)
        return model(model.embed(ids), prefix)

    count = sum(p.numel() for p in trained.parameters())
    frozen = 0 if adapter is None else sum(p.numel() for p in lm.parameters())
    assert (table["trained"], table["frozen weights"], table["optimiser (adamw)"]) == (
        4 * count,
        4 * frozen,
        8 * count,
    )
    assert table["logits"] == 3 * 4 * 15 * 60
    assert table["activations"] == pytest.approx(
        left_for_the_backward_pass(step, lm, trained), rel=0.15
    )
    out = capsys.readouterr().out
    assert (
        f"{count:,} parameters trained, {frozen:,} frozen" in out
        and f"in all                 {sum(table.values()) / 1e9:8.2f} GB" in out
    )


def test_the_plan_of_a_method_without_a_model_is_refused():
    with pytest.raises(ValueError, match="--plan: pretrain trains no LM or adapter of a --model"):
        train.main(["--method", "pretrain", "--plan"])
