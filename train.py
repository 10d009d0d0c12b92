"""Training: one loop, `fit`, for everything the project trains, and the command line.

    python train.py --method neural_recursion

trains a Connector between two passes through the embedded frozen LM on questions about the embedded world, reports exact
match on people it never saw a question about, and leaves runs/neural_recursion/:

    adapter_config.json, adapter_model.safetensors   what was trained, best on dev (a folder `model` where the LM itself was)
    predictions.jsonl                                every test question, its prediction and its scores
    run.json                                         arguments, versions, hardware, fingerprint, data hash, seconds, results
    metrics.jsonl, curve.png                         loss and dev scores along training
    state.safetensors                                what --resume needs: parameters, optimiser, random state, step

A method says what is trained and how it is composed with the LM (recurse.compose); all else is shared. To add one: a line
in METHODS, and its composition.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import adapters
import data
import eval as metrics
import recurse
import rerank
import world
from model import LM, Config, answer, hash_tensors, load_tokenizer, locate, read_config

ASSETS = (
    Path(__file__).parent / "assets"
)  # the embedded LM, its tokenizer and its pretrained Connectors

# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018) with the choices of the prompt-tuning papers: a learning rate of its own instead of
    one scaled by the parameter, and a full second moment instead of a factored one. torch's own always does both.

    beta2 at step t is 1 - t^decay; an update whose root mean square exceeds `clip` is scaled down to it.
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
        super().__init__(
            params,
            dict(
                lr=lr,
                decay=decay,
                clip=clip,
                weight_decay=weight_decay,
                factored=factored,
                scale_parameter=scale_parameter,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        factored = group["factored"] and p.dim() >= 2
        if not state:
            state["step"] = torch.zeros(())
            if factored:
                state["row"], state["column"] = (
                    g.new_zeros(g.shape[:-1]),
                    g.new_zeros(g.shape[:-2] + g.shape[-1:]),
                )
            else:
                state["square"] = torch.zeros_like(g)
        state["step"] += 1
        beta, square = 1 - state["step"].item() ** group["decay"], g.square() + 1e-30
        if factored:  # the second moment is the outer product of its row and column means, over the mean of the rows
            row, column = (
                state["row"].lerp_(square.mean(-1), 1 - beta),
                state["column"].lerp_(square.mean(-2), 1 - beta),
            )
            update = (
                g
                * (row / row.mean(-1, keepdim=True)).rsqrt()[..., None]
                * column.rsqrt()[..., None, :]
            )
        else:
            update = g * state["square"].lerp_(square, 1 - beta).rsqrt()
        update /= (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
        scale = (
            p.float().square().mean().sqrt().clamp(min=1e-3) if group["scale_parameter"] else 1.0
        )
        p.mul_(1 - group["lr"] * scale * group["weight_decay"]).sub_(
            update.to(p.dtype), alpha=float(group["lr"] * scale)
        )


def make_optimizer(trained: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW (AI21's betas and epsilon) or Adafactor over what is trained; norm gains are not decayed."""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "adafactor":
        return Adafactor(groups, lr=args.lr)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-6)


def learning_rate(step: int, args) -> float:
    """Linear warm-up over a share of the steps, then constant, or linear down to zero at the last step."""
    warmup = round(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (
        (args.steps - step) / (args.steps - warmup) if args.schedule == "linear" else 1.0
    )


def autocast(args):
    """bf16 arithmetic around the LM where --dtype asks for it; adapters stay in float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def target_loss(model, prefix, batch: data.Batch) -> Tensor:
    """Cross entropy summed over the batch's targets; the vocabulary is computed at their positions only."""
    asked = batch.targets != data.NO_TARGET
    h = model(model.embed(batch.ids), prefix)
    return F.cross_entropy(model.logits(h[asked]), batch.targets[asked], reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Run:
    """A run's folder, locked while in use: `with Run(...) as run`. Every file in it appears whole or not at all."""

    def __init__(self, args):
        self.folder, self.args = Path(args.out), args
        self.state_path, self.metrics_path = (
            self.folder / "state.safetensors",
            self.folder / "metrics.jsonl",
        )

    def check(self) -> None:
        """Refuses, before anything is loaded, a folder that exists (without --resume) or was started with other arguments."""
        if not self.folder.exists():
            return
        if not self.args.resume:
            raise FileExistsError(
                f"{self.folder} exists; continue it with --resume, or choose another --out"
            )
        before = self.record()
        if before:
            for key, value in arguments(self.args).items():
                if before["arguments"].get(key) != value:
                    raise ValueError(
                        f"{self.folder} was started with --{key.replace('_', '-')} {before['arguments'].get(key)}, not {value}"
                    )
        elif any(
            path.name not in ("lock", "run.json.unfinished") for path in self.folder.iterdir()
        ):  # alone, they are left from a kill at the very start
            raise FileExistsError(f"{self.folder} is not a run's folder (it has no run.json)")

    def record(self) -> dict | None:
        """run.json of the run that this folder holds already, if it does."""
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record["arguments"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a run record ({error!r})") from None
        return record

    def __enter__(self) -> "Run":
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(
                self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system releases it however the process ends
        except BlockingIOError:
            raise FileExistsError(f"{self.folder} is in use by another process") from None
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()

    def write_json(self, name: str, content) -> None:
        with adapters.replacing(self.folder / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def write_lines(self, name: str, records: list[dict]) -> None:
        with adapters.replacing(self.folder / name) as path:
            path.write_text(
                "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
            )

    def log(self, record: dict) -> None:
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def history(self, upto: int) -> list[dict]:
        """The logged records up to a step; a line that a kill cut short, and what came after that step, are gone from the file too."""
        records = []
        for line in (
            self.metrics_path.read_text(encoding="utf-8").splitlines()
            if self.metrics_path.is_file()
            else []
        ):
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        records = [r for r in records if isinstance(r, dict) and r.get("step", math.inf) <= upto]
        self.write_lines("metrics.jsonl", records)
        return records

    def save_state(
        self, step: int, trained: nn.Module, optimizer, best: dict, seconds: float
    ) -> None:
        """Everything that the next step depends on, in one file: what is trained, the best so far, optimiser, random state."""
        tensors = {f"trained.{n}": p.detach() for n, p in trained.named_parameters()}
        tensors |= {f"best.{n}": p for n, p in best["tensors"].items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        metadata = {
            "step": step,
            "best_step": best["step"],
            "best_score": best["score"],
            "seconds": seconds,
        }
        with adapters.replacing(self.state_path) as path:
            save_file(
                {k: v.cpu().contiguous() for k, v in tensors.items()},
                path,
                metadata={"json": json.dumps(metadata)},
            )

    def load_state(self, trained: nn.Module, optimizer, best: dict) -> tuple[int, float]:
        """Restores what `save_state` wrote. Returns (the step to go on from, seconds spent so far); (0, 0.0) if nothing was saved."""
        if not (self.args.resume and self.state_path.is_file()):
            return 0, 0.0
        try:
            with safe_open(self.state_path, framework="pt") as file:
                metadata, tensors = (
                    json.loads(file.metadata()["json"]),
                    {k: file.get_tensor(k) for k in file.keys()},
                )
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.state_path}: truncated or corrupt ({error}); delete it to start the run again"
            ) from None
        part = lambda prefix: {
            k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
        }
        trained.load_state_dict(part("trained."))
        saved = optimizer.state_dict()
        indices = sorted({int(k.split(".")[0]) for k in part("optimizer.")})
        optimizer.load_state_dict(
            {
                "state": {i: part(f"optimizer.{i}.") for i in indices},
                "param_groups": saved["param_groups"],
            }
        )
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        best.update(step=metadata["best_step"], score=metadata["best_score"], tensors=part("best."))
        return metadata["step"], metadata["seconds"]


def arguments(args) -> dict:
    """The arguments that make a run what it is: all but where it lies and how it is continued."""
    return {
        key: value
        for key, value in vars(args).items()
        if key not in ("resume", "out", "argv", "plan")
    }


def draw_curve(run: Run, history: list[dict]) -> None:
    """curve.png: loss and dev score against steps."""
    try:
        import matplotlib
    except ImportError:
        print("no curve.png: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4))
    losses, scores = (
        [(r["step"], r[key]) for r in history if r.get(key) is not None]
        for key in ("loss", "score")
    )
    left.plot(*zip(*losses), color="tab:gray")
    left.set(
        xlabel="step", ylabel="loss (nats a token)", title=f"{run.args.method}: {run.folder.name}"
    )
    if scores:
        right = left.twinx()
        right.plot(*zip(*scores), color="tab:blue", marker="o")
        right.set_ylabel("dev score", color="tab:blue")
    figure.tight_layout()
    with adapters.replacing(run.folder / "curve.png") as path:
        figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fit(
    run: Run,
    trained: nn.Module,
    batch_at: Callable[[int], data.Batch],
    loss_of: Callable[[data.Batch], Tensor],
    evaluate: Callable[[], float | None],
    save: Callable[[], None],
) -> dict:
    """Trains `trained`'s parameters and leaves the best in it. Returns {"step", "score", "seconds", "tokens_per_second"}.

    batch_at  micro-batch number -> Batch, a pure function, so that a resumed run sees what an uninterrupted one would
    loss_of   Batch -> the loss summed over its targets; the step's loss is its mean over all targets of all micro-batches
    evaluate  () -> dev score, higher is better, or None (then the latest is the best); called without gradients every
              eval_every steps and at the end
    save      () -> writes what was trained to the run's folder; called whenever the score is the best so far
    A loss that is not finite stops the run (ValueError) and leaves the last checkpoint as it was.
    """
    args, device = run.args, next(trained.parameters()).device
    optimizer, best = make_optimizer(trained, args), {"step": 0, "score": -math.inf, "tensors": {}}
    first, seconds = run.load_state(trained, optimizer, best)
    history, tokens, scoring, start = run.history(first), 0, 0.0, time.perf_counter()
    with progress(args, first) as (show, stopped):
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            micro = [
                batch_at(step * args.accumulate + i).to(device) for i in range(args.accumulate)
            ]
            targets = sum(int((b.targets != data.NO_TARGET).sum()) for b in micro)
            loss = 0.0
            for batch in micro:
                with autocast(args):
                    part = loss_of(batch) / targets
                part.backward()
                loss, tokens = loss + part.item(), tokens + int(batch.lengths.sum())
            norm = nn.utils.clip_grad_norm_(trained.parameters(), args.clip).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise ValueError(
                    f"{run.folder}: the loss is {loss} at step {step + 1}, its gradient's norm {norm}; the checkpoint before it is kept. Try a lower --lr"
                )
            optimizer.step()
            optimizer.zero_grad()
            done, record = (
                step + 1,
                {"step": step + 1, "loss": loss, "lr": learning_rate(step, args)},
            )
            if done % args.eval_every == 0 or done == args.steps:
                began = time.perf_counter()
                with torch.no_grad(), autocast(args):
                    record["score"] = evaluate()
                scoring += time.perf_counter() - began
                if not all(p.isfinite().all() for p in trained.parameters()) or not math.isfinite(
                    record["score"] or 0.0
                ):
                    raise ValueError(
                        f"{run.folder}: parameters or dev score are not finite after step {done}; the checkpoint before it is kept. Try a lower --lr"
                    )
                if record["score"] is None or record["score"] > best["score"]:
                    best.update(
                        step=done,
                        score=-math.inf if record["score"] is None else record["score"],
                        tensors={n: p.detach().clone() for n, p in trained.named_parameters()},
                    )
                    save()  # before the state that says it is there: a kill between the two only repeats a score
            if "score" in record or done % args.log_every == 0:
                history.append(record)
                run.log(record)
            if "score" in record or stopped():
                run.save_state(
                    done, trained, optimizer, best, seconds + time.perf_counter() - start
                )
            show(record)
            if stopped():
                raise KeyboardInterrupt
    trained.load_state_dict(best["tensors"])
    save()
    draw_curve(run, history)
    spent = time.perf_counter() - start
    score = None if best["score"] == -math.inf else best["score"]
    return {
        "step": best["step"],
        "score": score,
        "seconds": round(seconds + spent, 1),
        "tokens_per_second": round(tokens / (spent - scoring)),
    }


@contextlib.contextmanager
def progress(args, first: int):
    """Yields (show, stopped): show(record) moves a bar on a terminal and prints plain lines elsewhere; stopped() tells that
    SIGINT or SIGTERM asked to end after this step. A second signal ends at once."""
    from tqdm import tqdm

    signals: list[int] = []

    def ask(number, _):
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=first, unit="step", disable=not sys.stderr.isatty())
    score = {}

    def show(record: dict) -> None:
        if record.get("score") is not None:
            score["dev"] = f"{record['score']:.3f}"
        if bar.disable and "score" in record:
            print(
                f"step {record['step']:>5} of {args.steps}  loss {record['loss']:.4f}",
                *(f"{k} {v}" for k, v in score.items()),
                flush=True,
            )
        bar.set_postfix(loss=f"{record['loss']:.3f}", **score, refresh=False)
        bar.update()

    try:
        yield show, lambda: bool(signals)
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def load_lm(args) -> tuple[LM, Tokenizer]:
    """The frozen LM and its tokenizer, checked to belong together."""
    folder = locate(args.model or ASSETS / "lm")
    dtype = (
        torch.bfloat16
        if args.dtype == "bfloat16" and args.method != "fine_tuning"
        else torch.float32
    )
    lm = LM.from_pretrained(folder, args.device, dtype)
    tokenizer = load_tokenizer(args.tokenizer or folder, lm.config.vocab_size)
    if args.tokenizer and (folder / "tokenizer.json").is_file():
        here, own = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
        if here != own:
            token = min(here.items() ^ own.items())[0]
            raise ValueError(
                f"--tokenizer {args.tokenizer} belongs to another LM: {token!r} is {here.get(token)} there and {own.get(token)} in {folder}"
            )
    return lm, tokenizer


def load_split(args, split: str) -> list[data.Example]:
    """The examples of --train, --dev or --test; those of the embedded world where no file is given, none for a file not asked for."""
    path = getattr(args, split)
    if path:
        return data.read(path)
    if args.train:
        return []
    return [
        data.example(record, f"world {split}")
        for record in world.make(args.world_seed).questions(split)
    ]


def tune(args) -> dict:
    """Trains an adapter (or, for fine_tuning, the LM itself) to answer the training questions; keeps the best on dev; scores test."""
    lm, tokenizer = load_lm(args)
    eos = lm.config.eos[0] if lm.config.eos else None
    room = lm.config.max_len - (args.prompt_length if args.method == "prompt_tuning" else 0)
    if room < 2:
        raise ValueError(
            f"--prompt-length {args.prompt_length} leaves {room} of the LM's context of {lm.config.max_len}"
        )
    examples = {split: load_split(args, split) for split in ("train", "dev", "test")}
    tokens = {split: data.encode(part, tokenizer, eos, room) for split, part in examples.items()}
    for example, asked in (
        (e, t.input)
        for split in ("dev", "test")
        for e, t in zip(examples[split], tokens[split])
        if not e.options
    ):
        if len(asked) + args.max_new_tokens - 1 > room:
            raise ValueError(
                f"{example.where}: {len(asked)} tokens and {args.max_new_tokens} new ones exceed the {room} that the LM's context leaves"
            )
    trained = (
        lm.requires_grad_(True)
        if args.method == "fine_tuning"
        else new_adapter(args, lm, tokenizer, examples["train"])
    )
    adapter = None if trained is lm else trained

    def loss_of(batch: data.Batch) -> Tensor:
        model, prefix = recurse.compose(args.method, lm, adapter)
        return target_loss(model, prefix, batch)

    @torch.no_grad()
    def scored(split: str, limit: int | None = None) -> list[dict]:
        model, prefix = recurse.compose(args.method, lm, adapter)
        chosen = slice(
            None, None, -(-len(tokens[split]) // limit) if limit else None
        )  # evenly spaced, whatever the file's order
        asked, options = (
            [t.input for t in tokens[split][chosen]],
            [t.options for t in tokens[split][chosen]],
        )
        return metrics.score(
            examples[split][chosen],
            answer(model, tokenizer, asked, prefix, args.max_new_tokens, options),
        )

    def evaluate() -> float | None:
        return metrics.summary(scored("dev", args.eval_limit))["em"] if tokens["dev"] else None

    def save() -> None:
        if adapter is None:
            lm.save(run.folder / "model", tokenizer=tokenizer, replace=True)
        else:
            adapters.save_adapter(
                run.folder, adapter, lm, method=args.method, base_model_name_or_path=args.model
            )

    run = Run(args)
    with run:
        digest = hashlib.sha256(repr(sorted(examples.items())).encode()).hexdigest()
        record = start_record(run, trained, None if adapter is None else lm, digest)
        record["question_format"] = all(
            data.is_question(e.input) for e in examples["train"]
        )  # how `eval.py ask` is to ask
        record |= fit(
            run,
            trained,
            lambda step: data.batches(tokens["train"], args.batch_size, args.seed, step),
            loss_of,
            evaluate,
            save,
        )
        with autocast(args):
            results = {split: scored(split) for split in ("dev", "test") if tokens[split]}
        run.write_lines("predictions.jsonl", results.get("test") or results.get("dev") or [])
        rows = results.get("test") or results.get("dev") or []
        show_examples(rows)
        if args.method == "neural_recursion" and rows:
            show_passes(lm, tokenizer, next((row for row in rows[::-1] if row["em"]), rows[-1]))
        return finish_record(
            run,
            record,
            None if adapter is None else lm,
            {split: metrics.summary(rows) for split, rows in results.items()},
        )


def new_adapter(args, lm: LM, tokenizer: Tokenizer, train: list[data.Example]) -> nn.Module:
    """What a method trains, at its start; --init says which (see --help)."""
    stored, init = ASSETS / f"{args.method}_{args.connector_layers}", args.init
    if init is None and args.method == "prompt_tuning":
        init = "vocab"
    elif init is None:
        init = str(stored) if args.model is None and stored.is_dir() else "random"
    kind, _, text = init.partition(":")
    if Path(init).is_dir():
        adapter, made_for = (
            adapters.load_adapter(init, lm),
            adapters.read_adapter_config(init).get("method", args.method),
        )
        if made_for != args.method and args.method in recurse.COMPOSITIONS:
            raise ValueError(
                f"--init {init} was trained for {made_for}, where a Connector's output has another reader than in {args.method}"
            )
    elif init == "random" and args.method != "prompt_tuning":
        adapter = recurse.new_connector(lm, args.method, args.connector_layers)
    elif args.method == "prompt_tuning" and kind in ("random", "vocab", "labels", "text"):
        P, table, draw = (
            args.prompt_length,
            lm.embedding.weight,
            torch.Generator().manual_seed(args.seed),
        )
        if kind == "labels":
            vectors = adapters.from_labels(
                P,
                table,
                tokenizer,
                [label for label, _ in Counter(e.target for e in train).most_common(P)],
                draw,
            )
        elif kind == "text":
            vectors = adapters.from_text(P, table, tokenizer, text, draw)
        else:
            vectors = {"random": adapters.random, "vocab": adapters.from_vocab}[kind](
                P, table, generator=draw
            )
        adapter = adapters.SoftPrompt(vectors).to(args.device)
    else:
        raise ValueError(
            f"--init {init} is no folder of an adapter, and no way to make what {args.method} trains"
        )
    prompt = isinstance(adapter, adapters.SoftPrompt)
    if prompt != (args.method == "prompt_tuning"):
        raise ValueError(
            f"--init {init} holds a {type(adapter).__name__}, which {args.method} does not train"
        )
    size, flag = (
        (len(adapter.vectors), "prompt_length")
        if prompt
        else (len(adapter.layers), "connector_layers")
    )
    if size != getattr(args, flag):
        raise ValueError(
            f"--init {init} holds a {type(adapter).__name__} of {size}; say so with --{flag.replace('_', '-')} {size}"
        )
    return adapter


def pretrain_connector(args) -> dict:
    """Trains a Connector by language modelling through the frozen composition it is meant for (section 4.2: up to 3 % of the corpus)."""
    lm, tokenizer = load_lm(args)
    corpus, held_out = load_corpus(args, tokenizer)
    connector = recurse.new_connector(lm, args.composition, args.connector_layers)
    stack = recurse.COMPOSITIONS[args.composition](lm, connector)
    save = lambda run: adapters.save_adapter(
        run.folder, connector, lm, method=args.composition, base_model_name_or_path=args.model
    )
    return model_text(
        args,
        connector,
        lm,
        corpus,
        held_out,
        lambda batch: target_loss(stack, None, batch),
        save,
        stack.config.max_len,
    )


def pretrain(args) -> dict:
    """Trains an LM and, where none is given, its tokenizer, from nothing on text; writes them as a published-format folder `model`."""
    texts = load_texts(args)
    tokenizer = (
        load_tokenizer(args.tokenizer)
        if args.tokenizer
        else data.train_tokenizer(texts[:50_000], args.vocab_size)
    )
    corpus, held_out = load_corpus(args, tokenizer, texts)
    marks = tokenizer.encode(
        ""
    ).ids  # what stands around every document of the stream: the last of it is what the LM says when a text is over
    bos, eos = (marks[0], (marks[-1],)) if marks else (None, ())
    lm = LM(
        decoder_config(
            args, tokenizer.get_vocab_size(), args.layers, args.context, bos=bos, eos=eos
        )
    ).to(args.device)
    save = lambda run: lm.save(run.folder / "model", torch.bfloat16, tokenizer, replace=True)
    return model_text(
        args,
        lm,
        None,
        corpus,
        held_out,
        lambda batch: target_loss(lm, None, batch),
        save,
        args.context,
    )


def decoder_config(args, vocab_size: int, layers: int, context: int, **marks) -> Config:
    """The shape that --dim, --heads and --hidden ask for."""
    return Config(
        vocab_size,
        args.dim,
        layers,
        args.heads,
        args.heads,
        args.dim // args.heads,
        mlp_width(args),
        context,
        **marks,
    )


def mlp_width(args) -> int:
    """--hidden, or 8/3 of --dim in multiples of 32: a gated MLP of that width has the weights of a plain one of 4 C."""
    return args.hidden or max(32, round(args.dim * 8 / 3 / 32) * 32)


def pretrain_encoder(args) -> dict:
    """Trains a T5 encoder by span corruption. What it encodes is read as a prefix by a small decoder, which is then thrown away."""
    tokenizer, sentinels = encoder_tokenizer(args, [f"<extra_id_{i}>" for i in range(32)])
    corpus, held_out = load_corpus(args, tokenizer)
    V = tokenizer.get_vocab_size()
    encoder = adapters.T5Encoder(
        adapters.T5Config(
            V, args.dim, args.layers, args.heads, args.dim // args.heads, mlp_width(args)
        )
    )
    decoder = LM(decoder_config(args, V, 2, 2 * args.length))
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(args.device)

    def loss_of(batch: data.Batch) -> Tensor:
        prefix = decoder.read(encoder(encoder.embed(batch.ids)))
        h = decoder(
            decoder.embed(F.pad(batch.targets[:, :-1], (1, 0))), prefix
        )  # token 0 starts the text that the decoder writes
        return F.cross_entropy(
            decoder.logits(h).flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )

    def save(run: Run) -> None:
        encoder.save(run.folder / "model", torch.bfloat16)
        tokenizer.save(str(run.folder / "model" / "tokenizer.json"))

    corrupt = lambda batch, seed, step: data.corrupt_spans(batch, sentinels, seed, step)
    return model_text(args, both, None, corpus, held_out, loss_of, save, args.length, corrupt)


def pretrain_bert(args) -> dict:
    """Trains a BERT by masked language modelling, [CLS] ... [SEP] ... over windows of the corpus."""
    names = ["[CLS]", "[SEP]", "[MASK]"]
    tokenizer, ids = encoder_tokenizer(args, names)
    corpus, held_out = load_corpus(args, tokenizer)
    bert = rerank.Bert(
        rerank.BertConfig(
            tokenizer.get_vocab_size(),
            args.dim,
            args.layers,
            args.heads,
            4 * args.dim,
            args.context,
        )
    )
    head = nn.Sequential(
        nn.Linear(args.dim, args.dim), nn.GELU(), nn.LayerNorm(args.dim)
    )  # before the tied output layer, as in BERT
    both, special = (
        nn.ModuleDict({"bert": bert, "head": head}).to(args.device),
        dict(zip(names, ids)),
    )

    def loss_of(batch: data.Batch) -> Tensor:
        asked = batch.targets != data.NO_TARGET
        h = bert(batch.ids, types=rerank.segments(batch.ids, special["[SEP]"]))[asked]
        return F.cross_entropy(
            F.linear(head(h), bert.words.weight).float(), batch.targets[asked], reduction="sum"
        )

    def save(run: Run) -> None:
        bert.save(run.folder / "model", torch.bfloat16)
        tokenizer.save(str(run.folder / "model" / "tokenizer.json"))

    corrupt = lambda batch, seed, step: data.mask_words(batch, special, min(ids), seed, step)
    return model_text(args, both, None, corpus, held_out, loss_of, save, args.context - 2, corrupt)


def encoder_tokenizer(args, names: list[str]) -> tuple[Tokenizer, list[int]]:
    """The LM's tokenizer with special tokens behind its own, and their ids: an encoder and the LM agree on every text."""
    tokenizer = load_tokenizer(args.tokenizer or locate(args.model or ASSETS / "lm"))
    tokenizer.add_special_tokens(names)
    return tokenizer, [tokenizer.token_to_id(name) for name in names]


def model_text(
    args,
    trained: nn.Module,
    frozen: LM | None,
    corpus: data.Corpus,
    held_out: data.Corpus,
    loss_of,
    save,
    longest: int,
    corrupt=None,
) -> dict:
    """Learns from windows of a corpus, of at most `longest` tokens; the score is minus the loss, in nats a target, on held-out documents.

    loss_of   Batch -> loss summed over targets            save   Run -> None, writes what is trained
    corrupt   (window Batch, seed, step) -> Batch, where the task is not to predict the next token
    """

    def batch_at(text: data.Corpus, seed: int, step: int) -> data.Batch:
        batch = data.windows(text, args.batch_size, args.length, seed, step)
        return corrupt(batch, seed, step) if corrupt else batch

    def evaluate() -> float:
        trained.eval()
        held = [batch_at(held_out, 0, i).to(args.device) for i in range(batches)]
        score = -sum(loss_of(batch).item() for batch in held) / sum(
            int((batch.targets != data.NO_TARGET).sum()) for batch in held
        )
        trained.train()
        return score

    batches = (len(held_out.tokens) - 1) // args.length // args.batch_size
    if args.length > longest:
        raise ValueError(
            f"--length {args.length} exceeds the {longest} that fit the model's context"
        )
    if batches < 1:
        raise ValueError(
            f"the held-out text has {len(held_out.tokens)} tokens, too few for a batch of {args.batch_size} windows of {args.length}"
        )
    batch_at(corpus, args.seed, 0)  # refuses too little text before anything is written
    run = Run(args)
    with run:
        record = start_record(
            run,
            trained,
            frozen,
            hashlib.sha256(corpus.tokens.tobytes() + held_out.tokens.tobytes()).hexdigest(),
        )
        record |= fit(
            run,
            trained.train(),
            lambda step: batch_at(corpus, args.seed, step),
            loss_of,
            evaluate,
            lambda: save(run),
        )
        return finish_record(
            run,
            record,
            frozen,
            {"dev": {"loss": -record["score"], "perplexity": math.exp(min(-record["score"], 700))}},
        )


def load_texts(args) -> list[str]:
    """The documents of --train, or of the embedded world."""
    if args.train:
        return data.read_texts(args.train)
    documents = world.make(args.world_seed).documents(args.documents, args.seed)
    return [
        d["text"] if "text" in d else f"{data.question_text(d['question'])} {d['answer'][0]}"
        for d in documents
    ]


def load_corpus(args, tokenizer, texts: list[str] | None = None) -> tuple[data.Corpus, data.Corpus]:
    """(training, held-out) text in tokens; held out are --dev, or the last two percent of the documents."""
    texts = texts or load_texts(args)
    held_out = data.read_texts(args.dev) if args.dev else texts[-max(1, len(texts) // 50) :]
    texts = texts if args.dev else texts[: len(texts) - len(held_out)]
    if not texts:
        raise ValueError(
            f"{args.train}: holds one document; separate documents with blank lines, or name held-out text with --dev"
        )
    return data.encode_texts(texts, tokenizer), data.encode_texts(held_out, tokenizer)


METHODS = {
    "prompt_tuning": (tune, dict(steps=400, lr=0.1, schedule="constant", weight_decay=0.0)),
    "neural_recursion": (tune, dict(steps=1200, lr=3e-3)),
    "lm_connector": (tune, dict(steps=1200, lr=3e-3)),
    "connector_lm": (tune, dict(steps=1200, lr=3e-3)),
    "fine_tuning": (tune, dict(steps=1200, lr=3e-4)),
    "pretrain": (pretrain, dict(steps=4500, lr=3e-3, batch_size=16, eval_every=500)),
    "pretrain_encoder": (
        pretrain_encoder,
        dict(
            steps=3000,
            lr=2e-3,
            batch_size=32,
            dim=128,
            layers=4,
            heads=4,
            warmup=0.02,
            eval_every=250,
        ),
    ),
    "pretrain_bert": (
        pretrain_bert,
        dict(
            steps=4000,
            lr=1e-3,
            batch_size=32,
            dim=160,
            layers=3,
            heads=5,
            warmup=0.05,
            eval_every=250,
        ),
    ),
    "pretrain_connector": (pretrain_connector, dict(steps=800, lr=1e-3, batch_size=16)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Memory, before anything is loaded


def plan(args) -> dict[str, int]:
    """--plan: the bytes that a step of this command will hold at most, counted from the LM's config.json alone, as a table."""
    config = read_config(locate(args.model or ASSETS / "lm", ["config.json"]))
    with torch.device("meta"):
        lm = LM(config)
        connector = adapters.Connector(lm.new_layers(args.connector_layers))
    method = args.composition if args.method == "pretrain_connector" else args.method
    if method not in (*recurse.COMPOSITIONS, "prompt_tuning", "fine_tuning"):
        raise ValueError(f"--plan: {args.method} trains no LM or adapter of a --model")
    weights, lm_layers = (
        sum(p.numel() for p in lm.parameters()),
        0 if method == "lm_connector" else config.n_layers,
    )
    trained = {"prompt_tuning": args.prompt_length * config.dim, "fine_tuning": weights}.get(
        method
    ) or sum(p.numel() for p in connector.parameters())
    tokens = args.batch_size * args.length + (
        args.prompt_length if method == "prompt_tuning" else 0
    )
    targets = args.batch_size * (
        args.length
        if args.method == "pretrain_connector"
        else min(args.length, args.max_new_tokens)
    )
    size = (
        2 if args.dtype == "bfloat16" else 4
    )  # of frozen weights and of what is computed; what is trained is held in float32
    kept = lm_layers * activations(config, trained=method == "fine_tuning")
    kept += (
        args.connector_layers * activations(config, trained=True)
        if method in recurse.COMPOSITIONS
        else 0
    )
    table = {
        "frozen weights": 0 if method == "fine_tuning" else size * weights,
        "trained": 4 * trained,
        "its gradients": 4 * trained,
        "the best so far": 4 * trained,
        f"optimiser ({args.optimizer})": (8 if args.optimizer == "adamw" else 4) * trained,
        "activations": size * tokens * kept,
        "logits": 3
        * 4
        * targets
        * config.vocab_size,  # themselves, their log softmax, its gradient
    }
    frozen = 0 if method == "fine_tuning" else weights
    print(
        f"{args.method}: {trained:,} parameters trained, {frozen:,} frozen; {args.batch_size} texts of {args.length} tokens, {args.dtype}"
    )
    for what, held in (table | {"in all": sum(table.values())}).items():
        print(f"{what:22} {held / 1e9:8.2f} GB")
    return table


def activations(c: Config, trained: bool) -> int:
    """How many values a token leaves behind in one layer for the backward pass."""
    query, key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    values = (
        2 * c.dim + 2 * query + 2 * key
    )  # what the norms read; q, k, v and what was attended to
    values += (
        3 if c.gated else 1
    ) * c.hidden_dim  # what the activation reads, and the factors of a gated MLP
    return values + (
        2 * c.dim + query + c.hidden_dim if trained else 0
    )  # what trained weights were multiplied with


# ---------------------------------------------------------------------------------------------------------------------
# Records


def start_record(run: Run, trained: nn.Module, frozen: LM | None, data_hash: str) -> dict:
    """Writes run.json as the run begins; what is known before it: arguments, versions, hardware, fingerprint, data."""
    fingerprint, before = frozen.fingerprint() if frozen else None, run.record()
    for what, now in (("data_hash", data_hash), ("fingerprint", fingerprint)):
        if before and before.get(what) != now:
            raise ValueError(
                f"{run.folder} was started on {'other data' if what == 'data_hash' else 'another LM'} (its {what} differs)"
            )
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    print(
        f"{run.args.method}: {count:,} parameters trained"
        + (f", {sum(p.numel() for p in frozen.parameters()):,} frozen" if frozen else ""),
        flush=True,
    )
    record = (before or {}) | {  # what a finished run found stays until it is found again
        "command": before["command"]
        if before
        else shlex.join(["python", "train.py", *run.args.argv]),
        "arguments": arguments(run.args),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "hardware": {
            "device": torch.cuda.get_device_name()
            if run.args.device == "cuda"
            else platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "trained_parameters": count,
        "fingerprint": fingerprint,
        "weights_before": hash_tensors(frozen.state_dict()) if frozen else None,
        "data_hash": data_hash,
    }
    run.write_json("run.json", record)
    return record


def finish_record(run: Run, record: dict, frozen: LM | None, results: dict) -> dict:
    """Writes run.json as the run ends, checks that the frozen weights are what they were, and prints the results."""
    record |= {
        "weights_after": hash_tensors(frozen.state_dict()) if frozen else None,
        "results": results,
    }
    run.write_json("run.json", record)
    if record["weights_before"] != record["weights_after"]:
        raise ValueError(f"{run.folder}: the frozen LM's weights changed during the run")
    for split, result in results.items():
        if "em" not in result:
            print(
                f"{split:5} loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}"
            )
            continue
        for task, row in [("all", result), *result["tasks"].items()]:
            if task:
                print(
                    f"{split:5} {task:12} EM {100 * row['em']:5.1f}   F1 {100 * row['f1']:5.1f}   ({row['n']} questions)"
                )
    print(f"{run.folder}: step {record['step']} was best; {record['seconds']:.0f} s of training")
    return record


def show_examples(rows: list[dict]) -> None:
    """The first question of each task, what was answered, and what was accepted."""
    for task in dict.fromkeys(row["task"] for row in rows):
        row = next(row for row in rows if row["task"] == task)
        print(f"{row['input']} {row['prediction']}   (accepted: {', '.join(row['answers'])})")


def show_passes(lm: LM, tokenizer: Tokenizer, row: dict) -> None:
    """One question as the recursion answers it: what the second pass said, token by token, and under it what the first pass,
    which had read the same tokens, would have said in its place."""
    asked = data.open_ended(tokenizer, [row["input"], f"{row['input']} {row['prediction']}"])
    said = asked[1][len(asked[0]) :]
    with torch.no_grad():
        h = lm(lm.embed(torch.tensor([asked[0] + said], device=next(lm.parameters()).device)))[
            0, len(asked[0]) - 1 : -1
        ]
        alone = answer(lm, tokenizer, asked[:1])[0]
    pieces = [
        [repr(tokenizer.decode([token])) for token in tokens]
        for tokens in (said, lm.logits(h).argmax(-1).tolist())
    ]
    print(f"\n{row['input']}\n  the frozen LM alone answers  {alone}")
    for who, line in zip(("second pass", "first pass"), pieces):
        print(
            f"  {who:12}",
            *(piece.ljust(max(map(len, column))) for piece, column in zip(line, zip(*pieces))),
        )
    print(f"  accepted     {', '.join(row['answers'])}\n")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with each method's own defaults filled in. A bad one is argparse's line and exit status 2."""
    parser = argparse.ArgumentParser(
        description="Train something small around a frozen LM (or the LM itself).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    number = lambda kind, low, high=math.inf: in_range(kind, low, high)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--method",
        required=True,
        choices=METHODS,
        help="what is trained, and how it is composed with the LM",
    )
    group.add_argument(
        "--model",
        help="checkpoint folder or hub id of the frozen LM; the embedded one if not given",
    )
    group.add_argument("--tokenizer", help="tokenizer.json or its folder, if not the model's")
    group.add_argument(
        "--init",
        help="the folder of a trained adapter to start from, or random; for prompts also vocab (sampled token embeddings), labels "
        "(of the training answers) or text:WORDS. If not given: a Connector pretrained on the embedded LM, if assets/ has it, else random; vocab for prompts",
    )
    group.add_argument(
        "--prompt-length",
        type=number(int, 1),
        default=20,
        help="P of a soft prompt (papers: 100 to 400)",
    )
    group.add_argument(
        "--connector-layers",
        type=number(int, 1),
        default=2,
        help="layers of a Connector (paper: 1 and 2)",
    )
    group.add_argument(
        "--composition",
        choices=recurse.COMPOSITIONS,
        default="neural_recursion",
        help="pretrain_connector: what the Connector is pretrained for",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train",
        help="JSONL of questions or inputs and targets; for pretraining a .txt or JSONL of text; the embedded world if not given",
    )
    group.add_argument("--dev", help="chooses the best checkpoint")
    group.add_argument("--test", help="reported once, at the end")
    group.add_argument(
        "--world-seed",
        type=int,
        default=1,
        help="which embedded world; the embedded LM knows world 1",
    )
    group.add_argument(
        "--documents",
        type=number(int, 1),
        default=120_000,
        help="pretraining: documents of the embedded world",
    )
    group.add_argument("--max-new-tokens", type=number(int, 1), default=16, help="longest answer")
    group.add_argument(
        "--eval-limit",
        type=number(int, 1),
        default=240,
        help="dev questions scored along training; the end scores all",
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps", type=number(int, 1), help="optimiser steps (paper: up to 100,000)"
    )
    group.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=32,
        help="examples, or windows of text, in a batch (paper: 32)",
    )
    group.add_argument("--accumulate", type=number(int, 1), default=1, help="batches in a step")
    group.add_argument(
        "--lr",
        type=number(float, 0),
        help="peak learning rate (paper: 1e-5 to 4e-4 for Connectors, 0.03 to 0.5 for prompts)",
    )
    group.add_argument(
        "--schedule",
        choices=["linear", "constant"],
        default="linear",
        help="after warm-up: down to zero, or level",
    )
    group.add_argument(
        "--warmup",
        type=number(float, 0, 1),
        default=0.005,
        help="share of the steps (paper: 0.005)",
    )
    group.add_argument("--optimizer", choices=["adamw", "adafactor"], default="adamw")
    group.add_argument("--weight-decay", type=number(float, 0), default=0.1)
    group.add_argument(
        "--clip", type=number(float, 1e-12), default=1.0, help="largest gradient norm"
    )
    group.add_argument(
        "--eval-every",
        type=number(int, 1),
        default=200,
        help="steps between dev scores; a checkpoint is written with each",
    )
    group.add_argument("--log-every", type=number(int, 1), default=10)
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    group = parser.add_argument_group("pretraining")
    group.add_argument("--dim", type=number(int, 1), default=192)
    group.add_argument("--layers", type=number(int, 1), default=6)
    group.add_argument("--heads", type=number(int, 1), default=6)
    group.add_argument(
        "--hidden", type=number(int, 1), help="width of the MLP; 8/3 of --dim if not given"
    )
    group.add_argument(
        "--context", type=number(int, 8), default=512, help="positions the LM is made for"
    )
    group.add_argument(
        "--length",
        type=number(int, 1),
        default=128,
        help="tokens in a window of text; for --plan, in a question and its answer too",
    )
    group.add_argument("--vocab-size", type=number(int, 257, 10**6), default=2048)
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="the run's folder; runs/<method> if not given")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, bit for bit on a CPU; starts there if it has none",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="train nothing: print what the run would hold in memory, from config.json alone",
    )
    group.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="bfloat16: frozen weights in bf16 and autocast; the default on CUDA",
    )
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False
    )  # the method alone, whose defaults the rest is parsed with
    first.error = parser.error
    first.add_argument("--method")
    parser.set_defaults(**METHODS.get(first.parse_known_args(argv)[0].method, (None, {}))[1])
    args = parser.parse_args(argv)
    args.argv, args.out, args.dtype = (
        argv,
        args.out or f"runs/{args.method}",
        args.dtype or ("bfloat16" if args.device == "cuda" else "float32"),
    )
    for key in (
        "model",
        "tokenizer",
        "init",
        "train",
        "dev",
        "test",
    ):  # a run is resumed and asked from wherever one stands
        value = getattr(args, key)
        if value and Path(value).exists():
            setattr(args, key, os.path.abspath(value))
    return args


def in_range(kind: type, low: float, high: float):
    """An argparse type: a finite number from low to high, both included."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(
                f"{text} is not between {low} and {high}"
                if high < math.inf
                else f"{text} is not a number from {low} up"
            )
        return value

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def main(argv: list[str] | None = None) -> dict:
    """Runs one method; returns what run.json records."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.dim % args.heads:
        raise ValueError(f"--dim {args.dim} is not a multiple of --heads {args.heads}")
    if args.init and (args.method == "fine_tuning" or args.method.startswith("pretrain")):
        raise ValueError(f"--init: {args.method} trains no stored adapter further")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if args.dim // args.heads % 2:
        raise ValueError(
            f"--dim {args.dim} / --heads {args.heads} is odd; rotary positions turn pairs of channels"
        )
    if args.plan:
        return plan(args)
    Run(args).check()
    torch.manual_seed(args.seed)
    return METHODS[args.method][0](args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(
            "train.py: stopped; the same command with --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
