"""The training loop of the whole project, its optimisers and its loss.

`fit` trains the parameters of any module. It gets batches, losses and dev scores from functions,
so it knows no method and no data file. train.py and pretrain.py call it.

    from fit import Recipe, fit
    fit(run, Recipe(steps=100, lr=1e-3), adapter, batch_at, loss_of, evaluate, save)
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from data import IGNORE_INDEX, Batch
from runs import Run, State, draw_curve, only_shows, show

# Optimisation


@dataclass(frozen=True)
class Recipe:
    """The settings of `fit`. train.py's flags describe them."""

    steps: int
    lr: float  # peak
    schedule: str = "linear"
    warmup: float = 0.005  # fraction of the steps
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    grad_accum: int = 1
    eval_every: int = 200
    log_every: int = 10
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def from_args(cls, args) -> "Recipe":
        """The recipe that a parsed command line asks for."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018) as the prompt-tuning papers use it.

    By default the learning rate is absolute and the second moment is kept in full; torch's own
    Adafactor can do neither. `scale_parameter` multiplies the rate by the parameter's root mean
    square, and `factored` keeps only row and column means of the second moment. At step t, beta2
    is 1 - t ** decay. An update is scaled down if its own root mean square exceeds `clip`.
    """

    def __init__(
        self,
        params,
        lr: float,
        decay: float = -0.8,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        factored: bool = False,
        scale_parameter: bool = False,
    ):
        defaults = {"lr": lr, "decay": decay, "clip": clip, "weight_decay": weight_decay}
        defaults |= {"factored": factored, "scale_parameter": scale_parameter}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        """Update one parameter from its gradient `g`."""
        factored = group["factored"] and p.dim() >= 2
        if not state:
            state["step"] = torch.zeros(())
            if factored:
                state["row"] = g.new_zeros(g.shape[:-1])
                state["column"] = g.new_zeros(g.shape[:-2] + g.shape[-1:])
            else:
                state["square"] = torch.zeros_like(g)
        state["step"] += 1
        beta2 = 1 - state["step"].item() ** group["decay"]
        square = g.square() + 1e-30
        if factored:  # second moment: row means times column means, over the mean of the rows
            row = state["row"].lerp_(square.mean(-1), 1 - beta2)
            column = state["column"].lerp_(square.mean(-2), 1 - beta2)
            row_factor = (row / row.mean(-1, keepdim=True)).rsqrt()[..., None]
            update = g * row_factor * column.rsqrt()[..., None, :]
        else:
            update = g * state["square"].lerp_(square, 1 - beta2).rsqrt()
        update /= (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
        scale = 1.0
        if group["scale_parameter"]:
            scale = p.float().square().mean().sqrt().clamp(min=1e-3)
        p.mul_(1 - group["lr"] * scale * group["weight_decay"])
        p.sub_(update.to(p.dtype), alpha=float(group["lr"] * scale))


def make_optimizer(trained: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the betas and epsilon of Levine et al. (2022), or Adafactor.

    Only matrices are decayed, not norm gains and biases.
    """
    parameters = [p for p in trained.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}] if matrices else []
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    if recipe.optimizer == "adafactor":
        return Adafactor(groups, lr=recipe.lr)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-6)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, or linear, to reach zero at step `steps`. Steps start at 0."""
    warmup = round(recipe.warmup * recipe.steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * ((recipe.steps - step) / (recipe.steps - warmup))


def autocast(recipe: Recipe):
    """A context with bf16 arithmetic if the dtype is bfloat16. Trained tensors stay in float32."""
    return torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.dtype == "bfloat16")


def target_loss(model, prefix, batch: Batch, x: Tensor | None = None) -> Tensor:
    """Cross entropy, summed over the batch's targets. Logits are computed at these only.

    x (B, T, C) is what the model reads in place of the embeddings, if it is given.
    """
    target_mask = batch.targets != IGNORE_INDEX
    h = model(model.embed(batch.ids) if x is None else x, prefix)
    logits = model.logits(h[target_mask])
    return F.cross_entropy(logits, batch.targets[target_mask], reduction="sum")


# The loop


def fit(
    run: Run,
    recipe: Recipe,
    trained: nn.Module,
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[Batch], Tensor],
    evaluate: Callable[[], float | None],
    save: Callable[[], None],
) -> dict:
    """Train the parameters of `trained`, and leave the best ones in it.

    batch_at  number -> Batch, counted from 0 over the whole run; a step takes `grad_accum` of them.
              It must be a pure function: a resumed run asks for the same batches.
    loss_of   Batch -> loss summed over its targets. A step minimises the mean over all its targets.
    evaluate  () -> dev score, higher is better. It runs without gradients every `eval_every` steps
              and after the last one. If it returns None, the latest parameters are the best.
    save      () -> None writes what is trained. It runs after each best score, and at the end.

    Returns step and score of the best parameters, seconds, and tokens_per_second without scoring.
    ValueError if a loss, gradient, parameter or score is not finite, OSError if the disk is full;
    the last saved state stays.
    KeyboardInterrupt after SIGINT or SIGTERM, once the step is finished and saved.
    """
    optimizer = make_optimizer(trained, recipe)
    state = run.load_state(trained, optimizer)
    log = run.rewind_log(state.step)
    earlier_seconds, start = state.seconds, time.perf_counter()
    with progress(recipe.steps, state.step) as (show_step, stopped):
        for step in range(state.step, recipe.steps):
            began = time.perf_counter()
            numbers = range(step * recipe.grad_accum, (step + 1) * recipe.grad_accum)
            batches = [batch_at(number).to(recipe.device) for number in numbers]
            loss = take_step(run, recipe, trained, optimizer, batches, loss_of, step)
            state.tokens += sum(int(batch.lengths.sum()) for batch in batches)
            state.step = step + 1
            state.step_seconds += time.perf_counter() - began
            record = {"step": state.step, "loss": loss, "lr": learning_rate(step, recipe)}
            if state.step % recipe.eval_every == 0 or state.step == recipe.steps:
                with torch.no_grad(), autocast(recipe):
                    record["score"] = evaluate()
            with checkpoint(run, state):
                if "score" in record:
                    keep_best(run, trained, state, record["score"], save)
                if "score" in record or state.step % recipe.log_every == 0:
                    log.append(record)
                    run.log(record)
                if (stop := stopped()) or "score" in record:
                    state.seconds = earlier_seconds + time.perf_counter() - start
                    run.save_state(trained, optimizer, state)
            show_step(record)
            if stop:
                raise KeyboardInterrupt
    trained.load_state_dict(state.best)
    with checkpoint(run, state):
        save()
    with only_shows("curve.png"):
        draw_curve(run, log)
    state.seconds = earlier_seconds + time.perf_counter() - start
    return outcome(state)


def outcome(state: State) -> dict:
    """What run.json holds of a finished training."""
    result = {
        "step": state.best_step,
        "score": None if state.best_score == -math.inf else state.best_score,
        "seconds": round(state.seconds, 1),
    }
    if state.tokens:  # the state of an earlier program does not count them
        result["tokens_per_second"] = round(state.tokens / state.step_seconds)
    return result


@contextmanager
def checkpoint(run: Run, state: State):
    """A context for writing. OSError, with the run's folder and the step, if the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{run.folder}: cannot be written after step {state.step} ({error}); the checkpoint "
            "before it is kept, and --resume goes on from it"
        ) from None


def take_step(run, recipe, trained, optimizer, batches, loss_of, step: int) -> float:
    """Take one optimiser step. Returns the mean loss over all targets of its batches.

    ValueError if the loss or the gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    count = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        with autocast(recipe):
            part = loss_of(batch) / count
        part.backward()
        loss += part.item()
    norm = nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(
            f"{run.folder}: the loss is {loss} at step {step + 1}, its gradient's norm {norm}; "
            "the checkpoint before it is kept. Try a lower --lr"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss


def keep_best(run, trained: nn.Module, state: State, score: float | None, save) -> None:
    """Keep and save the parameters if their score is the best so far, or if there are no scores.

    ValueError if a parameter or the score is not finite.
    """
    finite = score is None or math.isfinite(score)
    if not finite or not all(p.isfinite().all() for p in trained.parameters()):
        raise ValueError(
            f"{run.folder}: parameters or dev score are not finite after step {state.step}; "
            "the checkpoint before it is kept. Try a lower --lr"
        )
    if score is None or score > state.best_score:
        state.best_step = state.step
        state.best_score = -math.inf if score is None else score
        state.best = {name: p.detach().clone() for name, p in trained.named_parameters()}
        save()  # before `fit` saves the state: after a kill in between, --resume repeats steps


@contextmanager
def progress(steps: int, first: int):
    """Yield (show_step, stopped), and handle SIGINT and SIGTERM meanwhile.

    show_step(record) moves a bar on a terminal; elsewhere it prints a line for each dev score.
    stopped() is true once a signal came: end after this step. A second signal ends at once.
    """
    from tqdm import tqdm

    signals, shown = [], {}

    def on_signal(number, _):
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    def show_step(record: dict) -> None:
        shown["loss"] = f"{record['loss']:.3f}"
        if record.get("score") is not None:
            shown["dev"] = f"{record['score']:.3f}"
        if bar.disable and "score" in record:
            line = f"step {record['step']:>5} of {steps}  loss {record['loss']:.4f}"
            show(f"{line} dev {shown['dev']}" if "dev" in shown else line)
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def stopped() -> bool:
        return bool(signals)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = tqdm(total=steps, initial=first, unit="step", disable=not on_terminal)
    try:
        yield show_step, stopped
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
