"""The training loop of the whole project, its optimisers and its loss.

`fit` trains the parameters of any module. It gets batches, losses and dev scores from functions,
so it knows no method and no data file. train.py, pretrain.py, promptability.py and encoders.py call
it.

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
from functools import partial

from show import only_shows, picture, show

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpoint_activations

import parallel
from data import IGNORE_INDEX, Batch
from runs import Run, State

# Optimisation


@dataclass(frozen=True)
class Recipe:
    """The settings of `fit`. The help of train.py's flags describes them."""

    steps: int
    lr: float  # peak
    schedule: str = "linear"
    warmup: float = 0.005  # fraction of the steps
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    beta2: float = 0.95
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
    """Adafactor (Shazeer & Stern 2018) as Lester et al. use it for prompts.

    The learning rate is absolute, and the second moment is stored in full, not factored. (torch's
    own Adafactor can do neither.) At step t, beta2 is 1 - t ** decay. An update whose root mean
    square exceeds `clip` is scaled down to it.
    """

    def __init__(self, params, lr: float, decay=-0.8, clip: float = 1.0, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, decay=decay, clip=clip, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        """Update one parameter from its gradient `g`."""
        if not state:
            state["step"] = torch.zeros(())
            state["square"] = torch.zeros_like(g)
        state["step"] += 1
        beta2 = 1 - state["step"].item() ** group["decay"]
        square = g.square() + 1e-30
        update = g * state["square"].lerp_(square, 1 - beta2).rsqrt()
        update /= (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(update.to(p.dtype), alpha=group["lr"])


class Muon:
    """Muon (Jordan et al. 2024) for `matrices` and AdamW for `others`, as one optimiser.

    Muon orthogonalises the momentum and scales it to the size of AdamW's updates (Liu et al. 2025),
    so both take the same learning rate. `matrices` and `others` are lists of parameter groups, and
    one of them may be empty.
    """

    def __init__(self, matrices: list[dict], others: list[dict], lr: float, beta2: float = 0.95):
        self.parts = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if others:
            self.parts.append(adamw(others, lr, beta2))

    @property
    def param_groups(self) -> list[dict]:
        """The groups of both, looked up each time: `load_state_dict` replaces them."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """The moments of every parameter. They are numbered through, Muon's matrices first."""
        state, first = {}, 0
        for part in self.parts:
            own = part.state_dict()
            state |= {first + i: moments for i, moments in own["state"].items()}
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": []}

    def load_state_dict(self, saved: dict) -> None:
        """Restore the state of `state_dict`. The parameter groups stay as they are."""
        state, first = saved["state"], 0
        for part in self.parts:
            groups = part.state_dict()["param_groups"]
            count = sum(len(group["params"]) for group in groups)
            own = {i: state[first + i] for i in range(count) if first + i in state}
            part.load_state_dict({"state": own, "param_groups": groups})
            first += count


def adamw(groups: list[dict], lr: float, beta2: float = 0.95) -> torch.optim.AdamW:
    """AdamW with beta1 and epsilon of Levine et al. (2022), whose beta2 is 0.95 or 0.999."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=1e-6)


def linear_weights(trained: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon trains: those of linear layers, except an LM's output layer.

    The output layer is a table of tokens, like the embedding.
    """
    return {
        module.weight
        for name, module in trained.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] != "lm_head"
    }


def make_optimizer(trained: nn.Module, recipe: Recipe) -> torch.optim.Optimizer | Muon:
    """AdamW, Adafactor, or Muon for `linear_weights` and AdamW for the rest.

    Matrices are decayed. Norm gains and biases are not.
    """
    parameters = [p for p in trained.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]

    def groups(decayed: list, undecayed: list) -> list[dict]:
        both = ((decayed, recipe.weight_decay), (undecayed, 0.0))
        return [{"params": chosen, "weight_decay": decay} for chosen, decay in both if chosen]

    if recipe.optimizer == "muon":
        linear = linear_weights(trained)
        others = [p for p in matrices if p not in linear]
        layers = [p for p in matrices if p in linear]
        return Muon(groups(layers, []), groups(others, vectors), recipe.lr, recipe.beta2)
    if recipe.optimizer == "adafactor":
        return Adafactor(groups(matrices, vectors), lr=recipe.lr)
    return adamw(groups(matrices, vectors), recipe.lr, recipe.beta2)


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of a step, counted from 0: linear warm-up, then constant or linear down to zero."""
    warmup = round(recipe.warmup * recipe.steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * ((recipe.steps - step) / (recipe.steps - warmup))


def autocast(settings):
    """A context with bf16 arithmetic if `settings`, a Recipe or parsed flags, have dtype bfloat16.
    Trained tensors stay in float32."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def target_loss(model, prefix, batch: Batch, x: Tensor | None = None) -> Tensor:
    """Cross entropy, summed over the batch's targets. Logits are computed at these only, and the
    last layer computes only the columns from the first that has a target.

    x (B, T, C) is what the model reads in place of the embeddings, if it is given. At most 128 MiB
    of logits exist at a time. If there are more, the backward pass computes them again.
    """
    target_mask = batch.targets != IGNORE_INDEX
    last = target_mask.shape[1] - int(target_mask.any(0).int().argmax())
    h = model(model.embed(batch.ids) if x is None else x, prefix, last=last)
    h, targets = h[target_mask[:, -last:]], batch.targets[target_mask]

    def loss_of(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(h), targets, reduction="sum")

    size = max(1, 2**25 // model.config.vocab_size)
    if len(h) <= size:
        return loss_of(h, targets)
    parts = zip(h.split(size), targets.split(size))
    return sum(checkpoint_activations(loss_of, *part, use_reentrant=False) for part in parts)


# The loop


def fit(
    run: Run,
    recipe: Recipe,
    trained: nn.Module,
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[Batch], Tensor],
    evaluate: Callable[[], float | None],
    save: Callable[[], None],
    gradient: Callable[..., float] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> dict:
    """Train the parameters of `trained`, and leave the best ones in it.

    batch_at  number -> Batch, counted from 0 over the whole run; a step takes `grad_accum` of them.
              It must be a pure function, so that a resumed run gets the same batches.
    loss_of   Batch -> loss summed over its targets. A step minimises the mean over all its targets.
              Each of several processes calls it with its own share of the rows (Batch.part).
    evaluate  () -> dev score, higher is better. It runs without gradients every `eval_every` steps
              and after the last one. If it returns None, the latest parameters are the best.
    save      () -> None writes what is trained. It runs after each best score, and at the end.
    gradient  (recipe, loss_of, batches) -> loss, in place of `mean_gradient`
    after_step  number of finished steps -> None; called after each step, and after a kill again
                for the steps that are repeated

    Returns step and score of the best parameters, seconds, tokens_per_second and padding.
    ValueError if a loss, gradient, parameter or score is not finite, OSError if the disk is full:
    the last saved state stays. KeyboardInterrupt after SIGINT or SIGTERM, once the step is saved.
    """
    add_gradient = partial(gradient or mean_gradient, recipe, loss_of)
    optimizer = make_optimizer(trained, recipe)
    state = run.load_state(trained, optimizer)
    log = run.rewind_log(state.step)
    start = time.perf_counter() - state.seconds  # as if the run had never been stopped
    with progress(recipe.steps, state.step) as (show_step, signals):
        for step in range(state.step, recipe.steps):
            loss = take_step(run, recipe, trained, optimizer, state, batch_at, add_gradient)
            record = {"step": state.step, "loss": loss, "lr": learning_rate(step, recipe)}
            if state.step % recipe.eval_every == 0 or state.step == recipe.steps:
                with torch.no_grad(), autocast(recipe):
                    record["score"] = evaluate()
            stop = parallel.any_of(bool(signals))
            with explain_disk_errors(run, state):
                if after_step is not None:
                    after_step(state.step)
                if "score" in record:
                    keep_best(run, trained, state, record["score"], save)
                if "score" in record or state.step % recipe.log_every == 0:
                    log.append(record)
                    run.log(record)
                if stop or "score" in record:
                    state.seconds = time.perf_counter() - start
                    run.save_state(trained, optimizer, state)
            show_step(record)
            if stop:
                raise KeyboardInterrupt
    trained.load_state_dict(state.best)
    if parallel.first():
        write_trained(run, state, save, log)
    state.seconds = time.perf_counter() - start
    return outcome(state)


def write_trained(run: Run, state: State, save: Callable[[], None], log: list[dict]) -> None:
    """Write what is trained, and the curve of its training."""
    with explain_disk_errors(run, state):
        save()
    with only_shows("curve.png"):
        draw_curve(run, log)


def outcome(state: State) -> dict:
    """What `fit` returns. Evaluation does not count in tokens_per_second. Prints the padding."""
    result = {
        "step": state.best_step,
        "score": None if state.best_score == -math.inf else state.best_score,
        "seconds": round(state.seconds, 1),
    }
    if state.tokens:  # a state of an earlier version of this program does not count them
        result["tokens_per_second"] = round(state.tokens / state.step_seconds)
    if state.tokens and state.positions >= state.tokens:
        result["padding"] = round(1 - state.tokens / state.positions, 4)
        show(f"padding: {100 * result['padding']:.1f} % of the positions that were computed")
    return result


@contextmanager
def explain_disk_errors(run: Run, state: State):
    """A context for writing. OSError, with the run's folder and step, if it cannot be done."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        after = "there is none before it, and --resume starts from the first step"
        if run.state_path.is_file():
            after = "the one before it is kept, and --resume goes on from it"
        message = f"{run.folder}: no checkpoint after step {state.step}: {error}; {after}"
        raise OSError(message) from None


def mean_gradient(recipe: Recipe, loss_of, batches: list[Batch]) -> float:
    """Add the gradient of the mean loss over all targets of the batches, and return that loss.

    Each of several processes does so for its share of the rows, divided by the number of all
    targets, so that gradients and losses of all processes add up to those of one.
    """
    count = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        rows = list(parallel.share(range(len(batch.rows))))
        with autocast(recipe):
            # With fewer rows than processes, some compute a row whose loss is divided by infinity.
            part = loss_of(batch.part(rows or [0])) / (count if rows else math.inf)
        part.backward()
        loss += part.item()
    return loss


def take_step(run, recipe, trained, optimizer, state: State, batch_at, add_gradient) -> float:
    """Take one optimiser step, and count it in `state`. Returns the loss of its batches.

    `add_gradient` is `mean_gradient` with its first arguments. ValueError if the loss or the
    gradient is not finite.
    """
    began, step = time.perf_counter(), state.step
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    numbers = range(step * recipe.grad_accum, (step + 1) * recipe.grad_accum)
    batches = [batch_at(number).to(recipe.device) for number in numbers]
    loss = parallel.sum_gradients(trained.parameters(), add_gradient(batches))
    norm = nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(
            f"{run.folder}: the loss is {loss} at step {step + 1}, its gradient's norm {norm}; "
            "the checkpoint before it is kept. Try a lower --lr"
        )
    optimizer.step()
    trained.zero_grad()
    state.tokens += sum(int(batch.lengths.sum()) for batch in batches)
    state.positions += sum(getattr(b, "positions", b.ids.numel()) for b in batches)
    state.step += 1
    state.step_seconds += time.perf_counter() - began
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
        if parallel.first():
            save()  # before `fit` saves the state: after a kill in between, --resume repeats steps


@contextmanager
def progress(steps: int, first: int):
    """Yield (show_step, signals), and handle SIGINT and SIGTERM meanwhile.

    show_step(record) moves a bar on a terminal; elsewhere it prints a line for each evaluation.
    `signals` is the list of those that came: end after this step. A second one ends at once.
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

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    hidden = not (on_terminal and parallel.first())
    bar = tqdm(total=steps, initial=first, unit="step", disable=hidden)
    try:
        yield show_step, signals
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_curve(run: Run, history: list[dict]) -> None:
    """Write curve.png: loss and dev score against steps."""
    losses = [(r["step"], r["loss"]) for r in history]
    scores = [(r["step"], r["score"]) for r in history if r.get("score") is not None]
    name = run.folder.name.encode("utf-8", "backslashreplace").decode()
    with picture(run.folder / "curve.png", 7, 4) as figure:
        left = figure.subplots()
        left.plot(*zip(*losses), color="tab:gray")
        left.set(xlabel="step", ylabel="loss (nats a token)")
        left.set_title(f"{run.arguments['method']}: {name}", parse_math=False)  # $ is no formula
        if scores:
            right = left.twinx()
            right.plot(*zip(*scores), color="tab:blue", marker="o")
            right.set_ylabel("dev score", color="tab:blue")
