"""The training loop on models small enough to check by hand, and what it owes a run that stops."""

import json
import os
import shlex
import signal

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import seeded
from safetensors.torch import load_file
from tiny_runs import Dead, command, read_lines, run, same_runs

import data
import fit as loop
from adapters import SoftPrompt
from fit import Recipe, learning_rate
from runs import Run


class Toy(nn.Module):
    """Predicts a token from the one before it. Dropout makes a step depend on the random state."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 20, generator=seeded(1)))
        self.linear = nn.utils.skip_init(nn.Linear, 20, 20, bias=False)  # draws no random numbers
        self.linear.weight.data.normal_(generator=seeded(2))
        self.gain = nn.Parameter(torch.ones(20))
        self.dropout = dropout

    def loss(self, batch):
        mask = batch.targets != data.IGNORE_INDEX
        h = F.dropout(self.table[batch.ids[mask]], self.dropout)
        logits = self.linear(h) * self.gain
        return F.cross_entropy(logits, batch.targets[mask], reduction="sum")


def parameter(*values):
    """A module with one parameter, `w`."""
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return module


def targets(batch):
    return (batch.targets != data.IGNORE_INDEX).sum()


EXAMPLES = [data.TokenizedExample([1 + i % 7, 2 + i % 5], [3 + i] * (1 + i % 4)) for i in range(12)]
LEVEL = {"schedule": "constant", "warmup": 0.0}


@pytest.fixture
def fit(monkeypatch):
    """fit(folder, model, **recipe) -> (result, numbers of the batches that it asked for)."""
    monkeypatch.setattr(loop, "draw_curve", lambda run, history: None)

    def sgd(trained, recipe):  # a step is the learning rate times the gradient, and no more
        return torch.optim.SGD(trained.parameters(), lr=recipe.lr)

    def call(folder, model, loss_of=None, scores=None, save=None, size=3, plain=False, **more):
        asked, dies_at, resume = [], more.pop("dies_at", None), more.pop("resume", False)
        if plain:
            monkeypatch.setattr(loop, "make_optimizer", sgd)

        def batch_at(number):
            if number == dies_at:
                raise Dead
            asked.append(number)
            return data.batches(EXAMPLES, size, 0, number)

        evaluate = (lambda: None) if scores is None else iter(scores).__next__
        save = save or (lambda: None)
        recipe = Recipe(**{"steps": 12, "lr": 0.1, "eval_every": 4, "log_every": 1} | more)
        with Run(folder, {}, resume=resume) as folder:
            loss_of = loss_of or model.loss
            return loop.fit(folder, recipe, model, batch_at, loss_of, evaluate, save), asked

    return call


# The step


def test_a_step_is_the_mean_over_all_targets_of_all_its_batches(fit, tmp_path):
    """The batches have different numbers of targets: the mean of their means would differ."""
    once, twice, fresh = Toy(), Toy(), Toy()
    whole = {"steps": 1, "clip": 1e9, "plain": True}
    fit(tmp_path / "once", once, size=12, **whole)
    _, asked = fit(tmp_path / "twice", twice, size=6, grad_accum=2, **whole)
    counts = [int(targets(data.batches(EXAMPLES, 6, 0, i))) for i in range(2)]
    assert asked == [0, 1] and counts[0] != counts[1]
    torch.testing.assert_close(once.table, twice.table)
    logged = [read_lines(tmp_path / k / "metrics.jsonl")[0]["loss"] for k in ("once", "twice")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    batch = data.batches(EXAMPLES, 12, 0, 0)
    (fresh.loss(batch) / targets(batch)).backward()
    rate = learning_rate(0, Recipe(steps=1, lr=0.1))
    torch.testing.assert_close(once.table, fresh.table - rate * fresh.table.grad)


def test_learning_rate_warms_up_and_decays():
    recipe = Recipe(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(step, recipe) for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 1 / 90])
    recipe = Recipe(steps=100, lr=1.0, **LEVEL)
    assert learning_rate(0, recipe) == learning_rate(99, recipe) == 1.0


def test_the_scheduled_rate_is_the_rate_of_the_step(fit, tmp_path):
    """With a gradient of 1, the parameter falls by the sum of the rates."""
    model = parameter(0.0)
    recipe = {"steps": 8, "warmup": 0.5, "clip": 1e9}
    fit(tmp_path, model, lambda b: model.w[0] * targets(b), plain=True, **recipe)
    rates = [0.025, 0.05, 0.075, 0.1, 0.1, 0.075, 0.05, 0.025]  # 0 would follow the eighth
    assert [line["lr"] for line in read_lines(tmp_path / "metrics.jsonl")] == pytest.approx(rates)
    assert model.w.item() == pytest.approx(-sum(rates))


def test_a_gradient_longer_than_clip_is_cut_to_it(fit, tmp_path):
    model, slope = parameter(0.0, 0.0), torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5
    recipe = {"steps": 1, "clip": 0.5, "plain": True} | LEVEL
    fit(tmp_path, model, lambda b: (model.w * slope).sum() * targets(b), **recipe)
    torch.testing.assert_close(model.w.detach(), -0.1 * 0.5 * slope / 5)


def test_decay_shrinks_matrices_and_leaves_gains(fit, tmp_path):
    model, before = Toy(), Toy().table.detach()
    fit(tmp_path, model, lambda b: model.loss(b) * 0.0, steps=1, weight_decay=0.5, **LEVEL)
    torch.testing.assert_close(model.table.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model.gain.detach(), torch.ones(20))


def test_adamw_has_the_papers_betas_and_epsilon():
    optimizer = loop.make_optimizer(Toy(), Recipe(steps=1, lr=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-6, 0.1)


# Muon


def muon(trained):
    """The parts of a Muon: which optimiser trains which parameters, by name."""
    names = {p: name for name, p in trained.named_parameters()}
    parts = loop.make_optimizer(trained, Recipe(steps=1, lr=0.1, optimizer="muon")).parts
    return {
        type(part): {names[p]: g["weight_decay"] for g in part.param_groups for p in g["params"]}
        for part in parts
    }


@pytest.mark.parametrize("kind", ["untied", "learned"])
def test_muon_trains_the_weights_of_linear_layers_and_adamw_the_rest(make_lm, kind):
    """An untied lm_head and the tables of tokens and positions are among the rest."""
    lm = make_lm(kind).requires_grad_(True)
    parameters = dict(lm.named_parameters())
    linear = {name for name in parameters if name.endswith("_proj.weight")}
    assert len(linear) == len(lm.layers) * (7 if lm.config.gated else 6)
    rest = {name: 0.1 if parameters[name].dim() > 1 else 0.0 for name in parameters.keys() - linear}
    assert rest["embed_tokens.weight"] == 0.1 and rest["norm.weight"] == 0.0
    assert rest.get("lm_head.weight" if kind == "untied" else "embed_positions.weight") == 0.1
    parts = {torch.optim.Muon: dict.fromkeys(linear, 0.1), torch.optim.AdamW: rest}
    assert muon(lm) == parts


def test_a_part_of_muon_without_parameters_is_left_out(fit, tmp_path):
    """A soft prompt is then trained as with AdamW."""
    assert muon(nn.Linear(3, 4, bias=False)) == {torch.optim.Muon: {"weight": 0.1}}
    assert muon(SoftPrompt(torch.zeros(3, 4))) == {torch.optim.AdamW: {"vectors": 0.1}}

    def trained_with(optimizer):
        prompt, out = SoftPrompt(torch.ones(3, 4)), tmp_path / optimizer
        fit(out, prompt, lambda b: prompt().square().sum() * targets(b), optimizer=optimizer)
        return prompt.vectors

    vectors = trained_with("muon")
    assert torch.equal(vectors, trained_with("adamw")) and (vectors < 0.9).all()


def test_muons_steps_are_those_of_torch_and_of_the_size_of_adamws():
    """The second step has the momentum of the first."""
    ours = nn.Linear(30, 20)
    theirs = nn.Parameter(ours.weight.detach().clone())
    optimizer = loop.make_optimizer(ours, Recipe(steps=2, lr=0.1, optimizer="muon"))
    settings = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    peer = torch.optim.Muon([theirs], lr=0.1, **settings)
    for seed in range(2):
        before = theirs.detach().clone()
        theirs.grad = torch.randn(20, 30, generator=seeded(seed))
        ours.weight.grad, ours.bias.grad = theirs.grad.clone(), torch.ones(20)
        optimizer.step()
        peer.step()
        assert torch.equal(ours.weight, theirs)
        update = theirs - before * (1 - 0.1 * 0.1)
        assert update.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)


# What a run keeps

ADAMW = {"step", "exp_avg", "exp_avg_sq"}
MOMENTS = {"adamw": ADAMW, "adafactor": {"step", "square"}, "muon": ADAMW | {"momentum_buffer"}}


@pytest.mark.parametrize("optimizer", MOMENTS)
@pytest.mark.parametrize("dies_at", [3, 4, 14, 23])
def test_a_resumed_run_is_the_uninterrupted_one(fit, tmp_path, optimizer, dies_at):
    """Moments, dropout, schedule, batches, the best so far: a run that dies before the first
    checkpoint, at one, between two and at the end."""
    flags, scores = {"optimizer": optimizer, "grad_accum": 2}, [0.2, 0.9, 0.4]
    whole, saved = Toy(dropout=0.5), []
    torch.manual_seed(0)

    def save():
        saved.append(whole.table.detach().clone())

    result, numbers = fit(tmp_path / "whole", whole, scores=scores, save=save, **flags)
    assert numbers == list(range(24)) and result["step"] == 8 and result["score"] == 0.9
    assert len(saved) == 3  # after 4, after 8, and the best once more at the end
    assert torch.equal(saved[1], saved[2]) and torch.equal(whole.table, saved[1])
    torch.manual_seed(0)
    with pytest.raises(Dead):
        fit(tmp_path / "killed", Toy(dropout=0.5), scores=scores, dies_at=dies_at, **flags)
    done = dies_at // 2 // 4 * 4
    torch.manual_seed(99 if done else 0)  # a new process has drawn other random numbers
    resumed, left = Toy(dropout=0.5), scores[done // 4 :]
    again, numbers = fit(tmp_path / "killed", resumed, scores=left, resume=True, **flags)
    assert numbers == list(range(2 * done, 24)) and again["step"] == 8 and again["score"] == 0.9
    assert torch.equal(resumed.table, whole.table) and torch.equal(resumed.gain, whole.gain)
    assert torch.equal(resumed.linear.weight, whole.linear.weight)
    state = same_runs(tmp_path / "whole", tmp_path / "killed")
    held = [key.split(".") for key in state if key.startswith("optimizer.")]
    assert {number for _, number, _ in held} == {"0", "1", "2"}  # three parameters
    assert {moment for _, _, moment in held} == MOMENTS[optimizer]


def test_the_best_is_the_first_of_equals_or_the_latest_without_scores(fit, tmp_path):
    assert fit(tmp_path / "equals", Toy(), scores=[0.0, 0.5, 0.5])[0]["step"] == 8
    result, _ = fit(tmp_path / "latest", Toy())
    assert result["step"] == 12 and result["score"] is None


def test_a_finished_run_that_is_resumed_takes_no_step(fit, tmp_path):
    files = [tmp_path / "metrics.jsonl", tmp_path / "state.safetensors"]
    model, again = Toy(), Toy()
    first, _ = fit(tmp_path, model, scores=[0.1, 0.3, 0.2])
    before = [file.read_bytes() for file in files]
    second, numbers = fit(tmp_path, again, scores=[], resume=True)
    assert numbers == [] and second["step"] == first["step"] == 8
    assert torch.equal(model.table, again.table)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_at_once(fit, tmp_path, broken):
    model, seen, kept, out = Toy(), [], [], tmp_path / "run"

    def loss_of(batch):
        seen.append(batch)
        loss = model.loss(batch)
        if len(seen) < 6:
            return loss
        kept.append((out / "state.safetensors").read_bytes())
        if broken == "loss":
            return loss * float("nan")
        return loss + (model.gain - model.gain.detach()).abs().sum().sqrt()  # its slope is infinite

    with pytest.raises(ValueError, match="at step 6.*--lr") as caught:
        fit(out, model, loss_of, scores=[0.5])
    assert "\n" not in str(caught.value) and kept == [(out / "state.safetensors").read_bytes()]
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    fit(out, Toy(), scores=[0.1, 0.1], resume=True)
    fit(tmp_path / "whole", Toy(), scores=[0.5, 0.1, 0.1])
    same_runs(out, tmp_path / "whole")


@pytest.mark.parametrize("broken", ["parameter", "score"])
def test_a_checkpoint_that_is_not_finite_is_never_written(fit, tmp_path, broken):
    """A step from finite loss and gradient can overflow, and no loss follows the last step."""
    model, saved = Toy(), []

    def scores():
        if broken == "parameter":
            model.table.data[0, 0] = float("inf")
        yield 0.5 if broken == "parameter" else float("nan")

    with pytest.raises(ValueError, match="not finite after step 4"):
        fit(tmp_path, model, scores=scores(), save=lambda: saved.append(1), steps=4)
    assert not saved and not (tmp_path / "state.safetensors").exists()


def test_a_signal_saves_the_step_that_it_interrupts(fit, tmp_path):
    model, seen, before = Toy(), [], signal.getsignal(signal.SIGTERM)

    def loss_of(batch):
        seen.append(batch)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return model.loss(batch)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, model, loss_of, scores=[0.5])
    assert signal.getsignal(signal.SIGTERM) is before and len(seen) == 6
    _, numbers = fit(tmp_path, Toy(), scores=[0.1, 0.1], resume=True)
    assert numbers == list(range(6, 12))  # and not from the checkpoint after 4


# Whole runs


def test_a_run_resumes_after_a_kill_before_its_first_record(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "run.json.unfinished").write_text('{"comm')
    line = command(place, "prompt_tuning", tmp_path / "run", "--steps 1 --resume")
    assert run(line)["step"] == 1


def test_the_same_command_gives_the_same_run_and_another_seed_another(place, tmp_path):
    seeds = (("a", 1), ("b", 1), ("c", 2))
    line = {k: command(place, "connector_lm", tmp_path / k, f"--seed {n}") for k, n in seeds}
    a, b, c = map(run, line.values())
    same_runs(tmp_path / "a", tmp_path / "b")
    first, other = (load_file(tmp_path / k / "adapter_model.safetensors") for k in "ac")
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert a["results"] == b["results"] and shlex.split(a["command"]) == ["python", *line["a"]]
    assert all(c[key] == a[key] for key in ("data_hash", "fingerprint"))


def test_a_second_signal_does_not_wait_for_the_step():
    with pytest.raises(KeyboardInterrupt), loop.progress(2, 0) as (_, signals):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was ignored")


def test_a_resumed_run_keeps_its_command_and_its_results(place, tmp_path, monkeypatch):
    before = run(command(place, "connector_lm", tmp_path / "run"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.fit", stop)
    with pytest.raises(KeyboardInterrupt):
        run(command(place, "connector_lm", tmp_path / "run", "--resume"))
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert after["command"] == before["command"] and "--resume" not in after["command"]
    assert after["results"] == before["results"]
    assert after["tokens_per_second"] == before["tokens_per_second"] > 0
