"""Train something small around a frozen LM, or the LM itself.

    python train.py --method neural_recursion

trains a Connector between two passes through the embedded LM, on questions about the embedded
world. In 2 to 4 minutes on two CPU cores it reaches an exact match of 99 % on one-hop and 18 % on
two-hop test questions, about people who occur in no training question. The frozen LM alone answers
100 % and 0 % of them. runs.py describes the folder that a run leaves.

    method             what answers a question                        what is trained
    prompt_tuning      lm(lm.embed(ids), prefix=lm.read(prompt()))    the prompt, P vectors
    deep_prompt        lm(lm.embed(ids), prefix=prompt())             keys and values of every layer
    id_pt              lm(lm.embed(ids), prefix=lm.read(prompt(ids))) the prompt's generator
    textual_recursion  prompt tuning, reading candidates of a prompt  both prompts
    neural_recursion   lm(x + connector(lm(x))), x = lm.embed(ids)    the Connector
    lm_connector       lm(x) + connector(lm(x))                       the Connector
    connector_lm       lm(x + connector(x))                           the Connector
    fine_tuning        lm(x)                                          the LM itself
    training_free      lm(rescale(lm(x)))                             nothing; it is only scored
    reader             prompt tuning, reading passages                a re-ranker and the prompt
    retriever          nothing: it finds passages                     two BERTs
    reranker           nothing: it sorts passages                     a BERT and its heads

The second column, but for the last two methods, is recurse.COMPOSITIONS; a Stack adds the x. By
default a Connector starts from that of its method and size in assets/, which was pretrained on text
in the paper's form, --residual off: its output replaces x, or lm(x), and is not added to it. With
--passes 3 the LM is run three times, with one Connector for both gaps or one in each. A
Connector-LM whose Connector has as many layers as the recursion has after its first pass
(--connector-layers 8 on the embedded LM) spends the same compute without a second pass. `--train
suite` trains on the 29 prompted tasks of suite.py by the protocol of prompts.py, with --per-task a
prompt for each of them.

    torchrun --nproc-per-node 2 train.py --method neural_recursion

divides the work among processes, and with --shard the frozen LM too (parallel.py). The training
loop is in fit.py, and what it starts from in start.py. To add a method, add a line to
recurse.COMPOSITIONS, its name to PROMPT_METHODS or CONNECTOR_METHODS there if it trains one of
these, a function with a line in METHODS here, and a new class of adapter to save_adapter and
load_adapter.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from show import Parser, only_shows, run_program, show

import torch
import torch.nn as nn
from torch import Tensor

import adapters
import cli
import data
import encoders
import eval as metrics
import openbook
import parallel
import prompts
import reader
import recurse
import start
import textual
from checkpoints import write_lines
from fit import Recipe, autocast, fit, target_loss
from generate import predict, stack_prefixes
from model import LM
from runs import Run, finish_record, finished, start_record

# The methods


def prompt_tuning(task: start.Task) -> dict:
    """Train P vectors that stand before every question (Lester et al. 2021). Their recipe
    also has Adafactor (here --optimizer adafactor), a z-loss of 1e-4 and dropout of 0.1."""
    return train_prompt(task, start.start_prompt)


def deep_prompt(task: start.Task) -> dict:
    """Train the keys and values of P positions in every layer (Li & Liang 2021)."""
    return train_prompt(task, start.start_deep_prompt)


def id_pt(task: start.Task) -> dict:
    """Train the generator of P vectors for each question (Levine et al. 2022, section 2)."""
    return train_prompt(task, start.start_generator)


def train_prompt(task: start.Task, new: Callable[[start.Task], nn.Module]) -> dict:
    """Train one prompt, or with --per-task one for each task, all of them in the same batches."""
    if not task.args.per_task:
        return train_adapter(task, trained=new(task))
    own = {}
    for name in prompts.tasks_of(task.examples):
        part = [example for example in task.examples["train"] if example.task == name]
        own[name] = new(replace(task, examples=task.examples | {"train": part}))
    return train_adapter(task, trained=prompts.TaskPrompts(own))


def textual_recursion(task: start.Task) -> dict:
    """Train a prompt that reads what earlier prompts sampled (Levine et al. 2022, section 4.1).

    textual.py describes the stages. --resume goes on in the one that was interrupted.
    """
    run = Run.from_args(task.args)
    if not task.args.no_cross_fit:  # refuse before anything is written
        textual.group_questions(task.examples["train"])
    if task.args.stages_from and start.finished_stage(*stage_of(task, "p1")) is None:
        raise ValueError(f"--stages-from {task.args.stages_from}: holds no finished p1")
    with run:
        prompt = start.start_prompt(task)  # it is counted here; the stages make their own
        trained = task.filler.beside(prompt)
        record = start_record(run, trained, task.lm, start.hashes(task, prompt))
        asked, before, rounds, halves = textual.sample_rounds(task, train_stage)
        split = {"halves": "".join(halves)} if halves else {}
        run.write_record(record | {"candidates": rounds} | split)
    asked, prompt = start.next_stage(asked, before)
    return train_adapter(asked, trained=prompt, hashed=task)


def connector(task: start.Task) -> dict:
    """Train a Connector between the passes through the LM (Levine et al. 2022, section 4.2), or
    after or before a single one. Only the line of recurse.COMPOSITIONS differs."""
    return train_adapter(task, trained=start.start_connector(task))


def fine_tuning(task: start.Task) -> dict:
    """Train every parameter of the LM, in float32: what the other methods are compared with."""
    return train_adapter(task, trained=task.lm.requires_grad_(True))


def training_free(task: start.Task) -> dict:
    """Train nothing: score a second pass over the first one's output at the embeddings' scale."""
    with Run.from_args(task.args) as run:
        record = start_record(run, nn.Module(), task.lm, start.hashes(task, None))
        record |= {"question_format": asks_questions(task)}
        record |= {"step": 0, "score": None, "seconds": 0.0}
        return finish(task, run, record, None)


def frozen_reader(args) -> dict:
    """Train a prompt that reads the passages found for a question (Levine et al. 2022, section 3).

    reader.py describes the stages. --resume goes on in the one that was interrupted.
    """
    book = openbook.load_book(args)
    used = reader.check(args, book)
    task = start.load_task(args, *start.load_lm(args), reader.examples(book))
    task.extra_hash = book.hash() + openbook.hash_encoders(used)
    if args.tune == "lm":
        trained, frozen, adapter = task.lm.requires_grad_(True), None, None
    else:
        trained = adapter = start.start_prompt(task)
        frozen = task.lm
    run = Run.from_args(args)

    def train_reranker(name: str, questions: dict) -> nn.Module:
        return encoders.stage(args, name, replace(book, questions=questions))

    with run:
        record = start_record(run, trained, frozen, start.hashes(task, adapter))
        asked, info = reader.prepare(task, book, run.folder, train_reranker)
        run.write_record(record | {"passages": info})
    torch.manual_seed(args.seed)  # the same whether stages were trained or loaded
    record = train_adapter(asked, trained=trained, hashed=task)
    if args.top > 0 and parallel.count() == 1:  # the time of a single process
        record["seconds_per_question"] = reader.time_reader(asked, adapter, book)
        run.write_record(record)
    return record


OPEN_BOOK = ("retriever", "reranker", "reader")  # their functions take the flags, not a Task
PROMPT = {"steps": 400, "schedule": "constant", "weight_decay": 0.0}  # lr: default_prompt_lr
METHODS = {  # method: (function, defaults of its flags)
    "prompt_tuning": (prompt_tuning, PROMPT),
    "deep_prompt": (deep_prompt, PROMPT),
    "id_pt": (id_pt, {"steps": 1200, "lr": 3e-3, "schedule": "constant"}),
    "textual_recursion": (textual_recursion, PROMPT),
    "neural_recursion": (connector, {"steps": 1200, "lr": 1e-3}),
    "lm_connector": (connector, {"steps": 1200, "lr": 1e-3}),
    "connector_lm": (connector, {"steps": 1200, "lr": 1e-3}),
    "fine_tuning": (fine_tuning, {"steps": 1200, "lr": 3e-4}),
    "training_free": (training_free, {"steps": 0, "lr": 0.0}),
    "retriever": (encoders.train_encoder, encoders.RETRIEVER),
    "reranker": (encoders.train_encoder, encoders.RERANKER),
    "reader": (frozen_reader, PROMPT | {"batch_size": 16}),
}


def default_prompt_lr(lm: LM, prompt: nn.Module) -> float:
    """The learning rate of a prompt if --lr is not given, for AdamW.

    AdamW moves every entry by about the rate in a step, so the rate of a soft prompt follows the
    size of entries: it is a quarter of the standard deviation of the token embeddings. (Lester et
    al. tune 0.3 for T5, whose embeddings are larger than 1.) Keys and values are of similar size in
    all LMs, but a deep prompt moves those of every layer at once. Its rate is 1 over the square of
    the number of layers. For 6 layers that is 0.03 (0.01 was worse there, 0.1 was better), for 30
    layers 0.001 (0.003 and 0.01 were worse). With an MLP (--reparam-dim) every entry follows many
    weights, and the rate is a tenth: 0.003 for 6 layers, the best of six (0.03 learned nothing).
    """
    if isinstance(prompt, prompts.TaskPrompts):
        prompt = prompt.prompts[0]
    if isinstance(prompt, adapters.DeepPrompt):
        return lm.config.n_layers**-2 * (1 if prompt.mlp is None else 0.1)
    return 0.25 * parallel.whole(lm.embed_tokens.weight).float().std().item()


def train_adapter(task, trained: nn.Module, hashed=None, batch_at=None, after_step=None) -> dict:
    """Train an adapter, or the LM itself, to answer the training questions.

    Dev chooses the best parameters. Returns the record of run.json. `hashed` is the task whose
    hashes identify the run, if `task` has passages or candidates in its tokens. batch_at and
    after_step: see `fit`.
    """
    args, lm, tokens = task.args, task.lm, task.tokens
    recipe, run = Recipe.from_args(args), Run.from_args(args)
    if recipe.lr is None:
        recipe = replace(recipe, lr=default_prompt_lr(lm, trained))
    adapter, frozen = (None, None) if trained is lm else (trained, lm)
    trained = task.filler.beside(trained)  # what `fit` trains, and more than the adapter alone

    # `cache` holds the states of the first pass, or is None. It is set once the folder is locked.
    def loss_of(batch: data.Batch) -> Tensor:
        if cache is None:
            model, prefix = compose(task, adapter, "train", batch.rows)  # anew: it is trained
            if getattr(args, "checkpoint_activations", False):
                model = recurse.Checkpointed(model)
            rows = [tokens["train"][row].input for row in batch.rows]
            return target_loss(model, stack_prefixes(prefix, rows), batch)
        stack, prefix = recurse.COMPOSITIONS[args.method](lm, adapter)
        x = cache(batch.rows, batch.ids.shape[1])
        return target_loss(stack.after_first(lm.embed(batch.ids)), prefix, batch, x)

    def evaluate() -> float | None:
        if not tokens["dev"]:
            return None
        rows = predict_split(task, adapter, "dev", args.eval_limit)
        return prompts.mean_over_tasks(rows) if args.mixture_cap else metrics.summary(rows)["em"]

    def save() -> None:
        if adapter is None:
            lm.save(run.folder / "model", tokenizer=task.tokenizer, replace=True)
        else:
            base = run.arguments["model"]
            info = {"method": args.method, "base_model_name_or_path": base}
            if args.pause:
                info |= {key: vars(args)[key] for key in ("pause", "pause_text", "pause_trained")}
            prompts.save(run.folder, adapter, lm, **info)
        task.filler.save(run.folder, lm)

    with run:
        record = start_record(run, trained, frozen, start.hashes(hashed or task, adapter))
        record["lr"] = recipe.lr
        if args.lr is None:
            show(f"learning rate {recipe.lr:.3g}, by the LM's embeddings or depth")
        record["question_format"] = asks_questions(task)
        cache, batch_at = cache_first_pass(task), batch_at or batches(task)
        done = fit(run, recipe, trained, batch_at, loss_of, evaluate, save, after_step=after_step)
        return finish(task, run, record | done, adapter)


def batches(task: start.Task) -> Callable[[int], data.Batch]:
    """step -> Batch, of all training questions, or with --mixture-cap mixed as T0 mixes tasks."""
    args, tokens = task.args, task.tokens["train"]
    if args.mixture_cap is None:
        return partial(data.batches, tokens, args.batch_size, args.seed)
    groups, counts = start.template_rates(task.examples["train"], args.mixture_cap)
    return partial(start.mixture_batch, tokens, groups, counts, args.batch_size, args.seed)


def compose(task: start.Task, adapter, split: str, rows: list[int]):
    """(model, prefix) for rows of a split. With --per-task, prefix is a list of one per row."""
    if isinstance(adapter, prompts.TaskPrompts):
        return task.lm, adapter.prefixes(task.lm, [task.examples[split][row].task for row in rows])
    return recurse.COMPOSITIONS[task.args.method](task.filler.around(task.lm), adapter)


def train_stage(task: start.Task, name: str, before: tuple | None) -> tuple:
    """Train a soft prompt in the folder `name` below --out, or load it if it is trained already.
    Returns (prompt, filler). `before` is such a pair, or None.

    ValueError if it was trained on other questions, for example on other halves of them.
    """
    args, known = stage_of(task, name)
    folder = Path(args.out)
    start.take_stage(args, known)
    record = finished(folder)
    if record and record["data_hash"] != known["data_hash"]:
        raise ValueError(f"{folder} was trained on other questions; choose another --out")
    if not record:
        show(f"{folder}: {len(task.tokens['train'])} training questions")
        stage, prompt = start.next_stage(replace(task, args=args), before)
        train_adapter(stage, trained=prompt)
    return adapters.load_adapter(folder, task.lm), task.filler.load(folder, task.lm)


def stage_of(task: start.Task, name: str) -> tuple[argparse.Namespace, dict]:
    """The arguments of a stage of textual recursion, and the hashes that identify it."""
    own = {"method": "prompt_tuning", "out": str(Path(task.args.out) / name)}
    return argparse.Namespace(**vars(task.args) | own), start.hashes(task, None)


def asks_questions(task: start.Task) -> bool:
    """Whether `eval.py ask` must put its questions into the format of data.question_text."""
    return all(metrics.is_question(example.input) for example in task.examples["train"])


def finish(task: start.Task, run: Run, record: dict, adapter) -> dict:
    """Answer and score dev and test, show examples, and complete the record, which is returned."""
    args = task.args
    with autocast(args):
        splits = [split for split in ("dev", "test") if task.tokens[split]]
        predictions = {split: predict_split(task, adapter, split) for split in splits}
    rows = predictions.get("test") or predictions.get("dev") or []
    if parallel.first():
        write_lines(run.folder / "predictions.jsonl", rows)
    with only_shows("examples"):
        show_examples(rows)
        if args.method == "neural_recursion" and rows:
            show_passes(task, what_recursion_adds(task, rows))
    results = {split: metrics.summary(part) for split, part in predictions.items()}
    frozen = task.lm if record["weights_before"] else None
    if any("template" in row for row in rows):
        record["medians"] = prompts.template_medians(rows)
    record = finish_record(run, record, frozen, results)
    if "medians" in record:
        show(f"answer choices are ranked by the {args.rank_by} of their log-probabilities")
        prompts.show_medians(record["medians"])
    return record


def cache_first_pass(task: start.Task) -> recurse.FirstPass | None:
    """The cache of the first pass over the training questions. Prints its size.

    None if something trained comes before it, if no question is read twice, or if the states
    exceed --cache-first-pass.
    """
    args = task.args
    texts = [(e.input + e.target)[:-1] for e in task.tokens["train"]]
    read = args.steps * args.grad_accum * args.batch_size  # texts in the whole training
    reads_again = args.method in ("neural_recursion", "lm_connector") and read > len(texts)
    if args.pause_trained or not reads_again:
        return None
    cache = recurse.FirstPass(task.lm, texts)
    small = args.dtype == "bfloat16" and args.device == "cpu"  # CUDA's autocast norms in float32
    size = cache.positions * task.lm.config.dim * (2 if small else 4) / 1e9
    line = f"first pass: {cache.positions:,} positions of {len(texts):,} texts, {size:.3f} GB"
    if size > args.cache_first_pass:
        show(f"{line}, more than --cache-first-pass {args.cache_first_pass}: computed in each step")
        return None
    show(f"{line}: computed once and kept")
    return cache


@torch.no_grad()
def predict_split(task: start.Task, adapter, split: str, limit: int | None = None) -> list[dict]:
    """Answer a split's questions, or a sample of `limit` of them, and score the answers."""
    args = task.args

    def answer(rows: list[int]) -> list:
        model, prefix = compose(task, adapter, split, rows)
        tokens = [task.tokens[split][row] for row in rows]
        ids, options = [t.input for t in tokens], [t.options for t in tokens]
        stops = metrics.stops([task.examples[split][row] for row in rows], args.stop)
        new, most, mean = args.max_new_tokens, args.eval_tokens, args.rank_by == "mean"
        return predict(model, task.tokenizer, ids, prefix, new, options, stops, most, mean=mean)

    rows = data.sample(len(task.tokens[split]), limit, args.seed)
    answers = answer(rows) if getattr(args, "shard", False) else parallel.divide(answer, rows)
    return metrics.score([task.examples[split][row] for row in rows], answers)


# What is shown at the end


def show_examples(rows: list[dict]) -> None:
    """Print the first question of each task with its prediction and the accepted answers."""
    for name in dict.fromkeys(row["task"] for row in rows):
        row = next(row for row in rows if row["task"] == name)
        show(f"{row['input']} {row['prediction']}   (accepted: {', '.join(row['answers'])})")


def what_recursion_adds(task: start.Task, rows: list[dict]) -> dict:
    """A correct answer, if there is one, and if possible one that the LM alone gets wrong."""
    rows = [row for row in rows if row["em"]][-100:] or rows[-1:]
    ids = data.encode_prompts(task.tokenizer, [row["input"] for row in rows])
    alone = predict(task.lm, task.tokenizer, ids, stops=["\n"] * len(ids))
    new = [r for r, text in zip(rows, alone) if not metrics.exact_match(text, r["answers"])]
    return (new or rows)[-1]


def show_passes(task: start.Task, row: dict) -> None:
    """Print how the recursion answers one question.

    Last pass: the prediction, token by token. First pass: the LM's own likeliest token at each of
    these positions, after the same tokens.
    """
    lm, tokenizer = task.filler.around(task.lm), task.filler.tokenizer
    asked = row["input"] + task.filler.text
    texts = [row["input"], asked, f"{asked} {row['prediction']}"]
    bare, question, whole = data.encode_prompts(tokenizer, texts)
    last = whole[len(question) :]
    with torch.no_grad():
        ids = torch.tensor([question + last], device=lm.embed_tokens.weight.device)
        h = lm(lm.embed(ids))[0, len(question) - 1 : -1]  # position t predicts token t + 1
        first = lm.logits(h).argmax(-1).tolist()
        alone = predict(lm, tokenizer, [bare], stops=["\n"])[0]
    show(f"\n{row['input']}\n  the frozen LM alone answers  {alone}")
    lines = [[repr(tokenizer.decode([token])) for token in tokens] for tokens in (last, first)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, line in zip(("last pass", "first pass"), lines):
        show(" ".join([f"  {name:12}", *map(str.ljust, line, widths)]))
    show(f"  accepted     {', '.join(row['answers'])}\n")


# The command line


def parse(argv: list[str], program: str = "train.py") -> argparse.Namespace:
    """Parse the flags, with the method's own defaults. A bad flag exits with status 2."""
    about = __doc__.split("\n")[0] + " --method X --help shows the defaults of a method."
    parser = Parser(prog=program, description=about)
    parser.add_argument("--method", required=True, choices=METHODS, help="what is trained")
    cli.add_model_flags(parser)
    cli.add_data_flags(parser)
    cli.add_recursion_flags(parser)
    cli.add_open_book_flags(parser)
    cli.add_training_flags(parser)
    cli.add_run_flags(parser)
    first = Parser(prog=program, add_help=False)  # reads what sets other defaults
    first.add_argument("--method")
    first.add_argument("--train")
    known = first.parse_known_args(argv)[0]
    if known.method in METHODS:
        parser.set_defaults(**METHODS[known.method][1])
    if known.train == start.SUITE:
        parser.set_defaults(**start.SUITE_DEFAULTS)
    return cli.add_late_defaults(parser.parse_args(argv), program, argv)


SHARDED = (*recurse.PROMPT_METHODS, *recurse.CONNECTOR_METHODS)  # around a frozen LM
CHECKPOINTED = (*recurse.PROMPT_METHODS, "fine_tuning")  # the LM alone, behind a prefix


def check_flags(args: argparse.Namespace) -> None:
    """ValueError if flags contradict the method."""
    if args.init and args.method in ("fine_tuning", "training_free", "retriever", "reranker"):
        raise ValueError(f"--init: {args.method} does not start from an adapter")
    if args.pause and not args.pause_text:
        raise ValueError(f"--pause {args.pause}: --pause-text is empty")
    if args.pause_trained and not args.pause:
        raise ValueError("--pause-trained: needs --pause")
    if args.pause_trained and args.method == "training_free":
        raise ValueError("--pause-trained: training_free trains nothing")
    if args.pause_trained and args.cache_first_pass:
        raise ValueError("--cache-first-pass: not with --pause-trained, the first pass changes")
    if args.stages_from and args.method != "textual_recursion":
        raise ValueError(f"--stages-from {args.stages_from}: {args.method} has no stages")
    if args.pause and args.method in OPEN_BOOK:
        raise ValueError(f"--pause {args.pause}: not for {args.method}")
    if args.passes > 2 and args.method != "neural_recursion":
        raise ValueError(f"--passes {args.passes}: only neural_recursion has more than two passes")
    prompt = args.method in ("prompt_tuning", "deep_prompt", "id_pt")
    if args.per_task and (args.pause or not prompt):
        raise ValueError(f"--per-task: not for {args.method}, and not with --pause")
    if args.checkpoint_activations and (args.pause or args.method not in CHECKPOINTED):
        raise ValueError(f"--checkpoint-activations: not for {args.method}, nor with --pause")
    if args.checkpoint_activations and args.compile:
        raise ValueError("--checkpoint-activations: runs block by block, which --compile does not")
    if args.tune == "lm" and (args.init or args.method != "reader"):
        raise ValueError("--tune lm: for a reader, without --init; else --method fine_tuning")
    adapter = args.method in SHARDED and args.tune == "prompt" and not args.per_task
    if args.shard and not (adapter and args.base_dtype is None and not args.compile):
        raise ValueError("--shard: for one adapter around a frozen LM, not int8, not compiled")
    if args.shard and parallel.launched() == 1:
        raise ValueError("--shard: needs processes: torchrun --nproc-per-node 2 train.py ...")


def main(argv: list[str] | None = None) -> dict:
    """Run one method. Returns the record, which run.json holds too."""
    args = parse(sys.argv[1:] if argv is None else argv)
    check_flags(args)
    if args.tune == "lm":
        args.prompt_length = 0
        args.lr = METHODS["fine_tuning"][1]["lr"] if args.lr is None else args.lr
    cli.check_and_seed(args)
    method, _ = METHODS[args.method]
    if args.method in OPEN_BOOK:
        return method(args)
    return method(start.load_task(args, *start.load_lm(args)))


if __name__ == "__main__":
    run_program("train.py", main, resumes=True)
