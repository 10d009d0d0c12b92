"""What a run will need, before the weights of its LM are loaded: memory, and operations.

    python bench.py plan --method neural_recursion --model EleutherAI/pythia-1b

It takes the flags of train.py. A training step and a batch of answers run on torch's meta device,
where tensors have shapes and no values, and OperationCounter counts their bytes and operations. The
lengths are those of the questions that the flags name. --seq-len assumes a length instead, of a
question with its answer; --text makes every token a target, as in pretrain.py connector. In textual
recursion the texts are longer by the candidates.
"""

import argparse
import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from show import Parser, show

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli
import prompts
import recurse
import start
import train
from adapters import Connector, DeepPrompt, PromptGenerator, SoftPrompt
from cache import Buffered, SampleCache
from checkpoints import HUB_FILES, load_tokenizer, read_config, resolve, skip_init
from contest import FORMULAS, memory
from families import t5_from_hf
from filler import Filler
from fit import Recipe, linear_weights, make_optimizer
from generate import stack_prefixes, token_logprobs
from int8 import quantize
from model import LM, Config
from replay import can_replay
from runs import ASSETS
from t5 import T5Config, T5Encoder


@dataclass
class Lengths:
    """The longest of what a run reads, in tokens, and the fewest answer choices of a question."""

    text: int  # of a training text: a question, with its candidates, and its answer
    targets: int  # of a training text
    train_question: int  # of a training question, without candidates
    eval_question: int
    new: int  # after a question: new tokens, or those of its longest option
    options: int
    kept: int  # positions of the first pass that are computed once and kept
    tasks: list[str]  # that have a prompt each, with --per-task
    vectors: int  # of trained filler


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of train.py, and with them --seq-len and --text."""
    first = Parser(prog="bench.py plan", add_help=False)
    length = "assume texts of this length, a question with its answer"
    first.add_argument("--seq-len", type=cli.COUNT, help=length)
    every = "every token is a target, as in pretrain.py connector"
    first.add_argument("--text", action="store_true", help=every)
    if {"-h", "--help"} & {*argv}:
        show(first.format_help(), result=True)  # train.py's help follows
    more, rest = first.parse_known_args(argv)
    args = train.parse(rest, "bench.py plan")
    train.check_flags(args)
    args.seq_len, args.text = more.seq_len, more.text
    if args.text and args.seq_len is None:
        args.seq_len = 128  # as in pretrain.py
    return args


def read_lengths(args: argparse.Namespace, lm: LM, folder: str | Path) -> Lengths:
    """The lengths that --seq-len assumes, or else those of the questions of the run."""
    if args.seq_len:
        T, new = args.seq_len, args.max_new_tokens
        part = {"train": start.load_split(args, "train")} if args.per_task else {"train": []}
        return Lengths(
            text=T,
            targets=T if args.text else min(T, new),
            train_question=T,
            eval_question=max(1, T - new),
            new=new,
            options=0,
            kept=0,
            tasks=prompts.tasks_of(part),
            vectors=args.pause if args.pause_trained else 0,  # one for each repetition, at least
        )
    files = [name for name in HUB_FILES if "safetensors" not in name]
    tokenizer = load_tokenizer(args.tokenizer or resolve(folder, files), lm.config.vocab_size)
    task = start.load_task(args, lm, tokenizer)
    tokens, first_pass = task.tokens, train.cache_first_pass(task)
    evaluated = [e for split in ("dev", "test") for e in tokens[split]]
    ends = [max(map(len, e.options), default=args.max_new_tokens) for e in evaluated]
    return Lengths(
        text=max(len(e.input) + len(e.target) - 1 for e in tokens["train"]),
        targets=max(len(e.target) for e in tokens["train"]),
        train_question=max(len(e.input) for e in tokens["train"]),
        eval_question=max((len(e.input) for e in evaluated), default=0),
        new=max(ends, default=0),
        options=min((len(e.options) for e in evaluated), default=0),
        kept=0 if first_pass is None else first_pass.positions,
        tasks=prompts.tasks_of(task.examples) if args.per_task else [],
        vectors=sum(p.shape[0] for p in task.filler.parameters()),
    )


def add_candidates(args: argparse.Namespace, c: Config, lengths: Lengths) -> Lengths:
    """The lengths if every question holds as many candidates as there can be.

    A candidate has --max-new-tokens tokens and a separator. Those that exceed the context are left
    out (textual.with_candidates).
    """
    longer = args.candidates * (args.max_new_tokens + 1) + 4  # "Candidates: " and the line's end
    left = recurse.positions_left(vars(args), c, args.prompt_length)
    text = max(lengths.text, min(left, lengths.text + longer))
    question = min(left - lengths.new + 1, lengths.eval_question + longer)
    question = max(lengths.eval_question, question if lengths.eval_question else 0)
    return replace(lengths, text=text, eval_question=question)


def main(argv: list[str]) -> dict[str, int]:
    """Print what a run will need at most. Returns the bytes that it will hold, by what holds them.

    The table of memory has what a step holds, and what an evaluation holds beyond that, as they do
    not come at the same time.
    """
    args = parse(argv)
    table, operations, line = estimate(args)
    show(line, result=True)
    for what, bytes_held in (table | {"in all": sum(table.values())}).items():
        show(f"{what:22} {bytes_held / 1e9:8.2f} GB", result=True)
    if args.device == "cuda":
        show("not counted: the CUDA context, and freed memory that torch's allocator keeps")
    for what, count in operations.items():
        show(f"{what:22} {count / 1e12:12.4g} TFLOP", result=True)
    return table


def estimate(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, int], str]:
    """Return ({what: bytes}, {what: floating-point operations}, a line about the run)."""
    if args.method in train.OPEN_BOOK:
        raise ValueError(f"plan: what {args.method} reads is not counted yet")
    make_optimizer(nn.Linear(1, 1), Recipe(steps=1, lr=1.0))  # torch imports more for it
    libraries = memory("VmRSS")  # this process has loaded the same ones as a run
    folder = args.model or ASSETS / "lm"
    config = Config(**read_config(resolve(folder, ["config.json"])))
    with without_values():
        lm, encoder = LM(config), None
        if args.method == "id_pt":
            encoder = T5Encoder(T5Config(**t5_from_hf(start.t5_folder(args) / "config.json")))
    size = count(lm)
    lengths = read_lengths(args, lm, folder)
    if args.method == "textual_recursion":
        lengths = add_candidates(args, config, lengths)
    with without_values():
        run = DryRun(args, lm, encoder, lengths)
        step, operations = run.step() if args.method != "training_free" else ({}, {})
        evaluation = run.evaluation()
        operations |= run.answer_operations()
    whole = args.method == "fine_tuning"
    trained, frozen = count(run.trained), 0 if whole else size
    held = 0 if whole else sum(p.nbytes for p in lm.parameters())
    table = {"frozen weights": held}
    if encoder:
        table["frozen encoder"] = 4 * count(encoder)
    table |= {"trained": 4 * trained, "the best so far": 4 * trained}
    table[f"optimiser ({args.optimizer})"] = optimizer_memory(args.optimizer, run.trained)
    step = {"its gradients": 4 * trained} | step
    table |= step | {"evaluation beyond this": max(0, evaluation - sum(step.values()))}
    if lengths.kept:
        itemsize = run.dtype.itemsize if args.device == "cpu" else 4  # CUDA norms in float32
        table["first pass, kept"] = itemsize * config.dim * lengths.kept
    if args.device == "cpu":
        table["Python and libraries"] = libraries
        # malloc keeps freed blocks: 0.2 to 0.65 of the others, in runs that were measured.
        table["allocator, about"] = max(sum(step.values()), evaluation) // 2
    line = f"{args.method}: {trained:,} parameters trained, {frozen:,} frozen; "
    line += f"{args.batch_size} texts of at most {lengths.text} tokens, {args.dtype}"
    return table, operations, line


def count(module: nn.Module) -> int:
    """The number of entries of all parameters."""
    return sum(p.numel() for p in module.parameters())


def optimizer_memory(optimizer: str, trained: nn.Module) -> int:
    """Bytes of the moments: AdamW has two for each entry, Adafactor one, and
    Muon one for those of linear weights and two for the rest."""
    entries, linear = count(trained), sum(p.numel() for p in linear_weights(trained))
    moments = {"adamw": 2 * entries, "adafactor": entries, "muon": 2 * entries - linear}
    return 4 * moments[optimizer]


# A run without values


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_attention(q, k, v, attn_mask=None, *_, **__):
    """Attention that keeps no scores, as on a CPU and on a GPU. Without values torch would take
    another way, which keeps them."""
    return FLASH(q, k, v, attn_mask=attn_mask)[0]


@contextmanager
def without_values():
    """A context whose new tensors and modules have shapes and no values."""
    fused = patch.object(F, "scaled_dot_product_attention", fused_attention)
    with torch.device("meta"), skip_init(), fused:
        yield


class OperationCounter(TorchDispatchMode):
    """A context that counts operations, and the bytes of the tensors made in it.

    operations   of products of matrices; a multiplication and its sum are two
    live, peak   the bytes of tensors now, and at most
    """

    def __init__(self):
        super().__init__()
        self.operations = self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.overloadpacket in FORMULAS:
            self.operations += FORMULAS[function.overloadpacket](*args, **kwargs, out_val=out)
        known = {storage._cdata for storage in storages((args, kwargs))}  # of what it views
        for storage in storages(out):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size: int) -> None:
        """Count the bytes of a new tensor, or subtract those of one that is freed."""
        self.live += size
        self.peak = max(self.peak, self.live)


def storages(tree) -> list:
    """The storages of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def new_adapter(args, lm: LM, encoder: T5Encoder | None, tasks: list[str]) -> nn.Module:
    """What the method trains around the LM."""
    P, C = args.prompt_length, lm.config.dim
    if args.per_task:
        one = argparse.Namespace(**vars(args) | {"per_task": False})
        return prompts.TaskPrompts({task: new_adapter(one, lm, encoder, []) for task in tasks})
    if args.method == "deep_prompt":
        return DeepPrompt(lm.read(torch.empty(P, C)), args.reparam_dim)
    if args.method == "id_pt":
        start_vectors = torch.empty(args.encoder_prompt, encoder.config.dim)
        return PromptGenerator(encoder, start_vectors, torch.empty(P, C))
    if args.method in recurse.PROMPT_METHODS:
        bos = torch.empty(C) if args.placement == "after_bos" else None
        return SoftPrompt(torch.empty(P, C), bos)
    if args.method not in recurse.CONNECTOR_METHODS:
        return nn.Module()

    def connector() -> Connector:
        return Connector(lm.new_layers(args.connector_layers))

    between = recurse.make_connectors(args.passes, args.connectors == "shared", connector)
    return start.set_residual(between, args.residual)


class DryRun:
    """The steps and answers of a run, to be counted. All its tensors are without values."""

    def __init__(self, args, lm: LM, encoder: T5Encoder | None, lengths: Lengths):
        self.args, self.lm, self.lengths = args, lm.requires_grad_(False), lengths
        self.dtype = getattr(torch, args.dtype)
        if encoder is not None:
            encoder.requires_grad_(False).to(self.dtype)
        self.adapter = new_adapter(args, lm, encoder, lengths.tasks).to(self.dtype)
        whole = args.method == "fine_tuning"
        lm.to(self.dtype)
        filler = Filler("", None, torch.empty(lengths.vectors, lm.config.dim), lm.config.vocab_size)
        self.filler = filler.to(self.dtype) if lengths.vectors else Filler("", None)
        self.trained = self.filler.beside(lm.requires_grad_(True) if whole else self.adapter)
        if args.base_dtype == "int8":
            quantize(lm)

    def compose(self, questions: int, asked: int) -> tuple:
        """(model, prefix) for a batch of questions of `asked` tokens, as train.compose."""
        lm = self.filler.around(self.lm)
        if self.args.per_task:
            tasks = [self.lengths.tasks[b % len(self.lengths.tasks)] for b in range(questions)]
            model, prefix = self.lm, self.adapter.prefixes(self.lm, tasks)
        elif self.args.method == "training_free":
            model, prefix = recurse.Stack(self.lm, parts=[self.lm, self.lm]), None
        else:
            model, prefix = recurse.COMPOSITIONS[self.args.method](lm, self.adapter)
        return model, stack_prefixes(prefix, [[0] * asked] * questions)

    def step(self) -> tuple[dict[str, int], dict[str, int]]:
        """What a step holds beside the gradients, and the operations of a step and of all."""
        args, c = self.args, self.lm.config
        targets = args.batch_size * self.lengths.targets
        ids = torch.zeros(args.batch_size, self.lengths.text, dtype=torch.long)
        with OperationCounter() as step:
            model, prefix = self.compose(args.batch_size, self.lengths.train_question)
            if args.checkpoint_activations:
                model = recurse.Checkpointed(model)
            x = model.embed(ids)
            if self.lengths.kept:  # x: the first pass's states
                model = model.after_first(x)
            h = model(x, prefix, last=self.lengths.targets)
            held = step.live
            h.backward(torch.empty_like(h))
        with OperationCounter() as end:
            h = torch.empty(targets, c.dim, dtype=self.dtype, requires_grad=True)
            self.lm.logits(h).sum().backward()
        if args.checkpoint_activations:  # the backward pass makes those of a block again
            held = step.peak - self.dtype.itemsize * count(self.trained)
        logits = 3 * 4 * targets * c.vocab_size  # with log softmax and gradient
        one, trainings = (step.operations + end.operations) * args.grad_accum, 1
        if args.method == "textual_recursion":
            rounds = args.rounds - (args.stages_from is not None)
            trainings += rounds * (1 if args.no_cross_fit else 3)
        table = {"activations": held, "logits": logits}
        return table, {"a step": one, "all steps": args.steps * trainings * one}

    def evaluation(self) -> int:
        """What a batch of answers holds: in all its rows at most --eval-tokens positions."""
        args, lengths = self.args, self.lengths
        if args.text or not lengths.eval_question:  # a loss without gradients, or nothing
            return 0
        P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
        rows = args.eval_tokens // (P + lengths.eval_question + lengths.new)
        rows = min(128, max(1, rows))  # as in generate.predict
        held = self.answers(lengths.eval_question, math.ceil(rows / max(1, lengths.options)), rows)
        if args.method != "textual_recursion":
            return held
        # Samples of which no two agree, as in recurse.candidates.
        n, question = args.candidates, max(lengths.eval_question, lengths.text - lengths.targets)
        questions = max(1, args.eval_tokens // (n * (P + question + args.max_new_tokens)))
        return max(held, self.answers(question, questions, n * questions, samples=True))

    @torch.no_grad()
    def answers(self, question: int, questions: int, rows: int, samples: bool = False) -> int:
        """The peak of `rows` answers to questions that are read once, as in generate.py."""
        read = max(1, question - 1)  # the last token is fed with the answer
        index, new = torch.zeros(rows, dtype=torch.long), self.lengths.new
        more = self.args.max_new_tokens
        shared = samples and not (self.args.device == "cuda" and can_replay(self.lm, more))
        with OperationCounter() as counter:
            model, prefix = self.compose(questions, read)
            ids = torch.zeros(questions, read, dtype=torch.long)
            cache = model.read(model.embed(ids), prefix)
            if self.lengths.options and not samples:
                ids = index[:, None].expand(-1, new)
                h = model(model.embed(ids), cache.select(index))
                token_logprobs(self.lm, h.flatten(0, 1), ids.flatten())
            else:
                _, cache = model(model.embed(ids[:, :1]), cache, keep=True)
                cache = (SampleCache if shared else Buffered).of(cache)
                cache = Buffered.preallocate(cache, index, more, rows)
                if shared:  # what its own `preallocate` would find in the values of `index`
                    cache = replace(cache, place=torch.arange(rows), width=rows // questions)
                h, cache = model(model.embed(index[:, None]), cache, keep=True)
                logprobs = model.logits(h[:, -1]).log_softmax(-1)
                if samples:
                    logprobs.double()
        return counter.peak

    @torch.no_grad()
    def answer_operations(self) -> dict[str, int]:
        """Operations of an answer, and of the samples of a question of textual recursion."""
        args, lengths = self.args, self.lengths
        asked, new = (
            lengths.eval_question or lengths.train_question,
            lengths.new or args.max_new_tokens,
        )
        model, prefix = self.compose(1, asked)
        new = max(1, min(new, self.lm.config.max_len - asked - (prefix.size if prefix else 0)))
        with OperationCounter() as answer:
            model, prefix = self.compose(1, asked)
            h = model(model.embed(torch.zeros(1, asked + new - 1, dtype=torch.long)), prefix)
            self.lm.logits(h[0, -new:])
        operations = {"an answer": answer.operations}
        if args.method == "textual_recursion":
            with OperationCounter() as samples:
                cache = model.read(model.embed(torch.zeros(1, asked, dtype=torch.long)), prefix)
                ids = torch.zeros(args.candidates, new, dtype=torch.long)
                self.lm.logits(model(model.embed(ids), cache))
            operations = {"samples of a question": samples.operations} | operations
        return operations
