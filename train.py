"""Train something small around a frozen LM, or the LM itself.

    python train.py --method neural_recursion

trains a Connector between two passes through the embedded LM, on questions about the embedded
world. In 2 to 4 minutes on two CPU cores it reaches an exact match of 68 % on one-hop and 16 % on
two-hop test questions, about people who occur in no training question. One pass answers 100 % and
0 % of them. runs.py describes the folder that a run leaves.

    method             what answers a question                        what is trained
    prompt_tuning      lm(lm.embed(ids), prefix=lm.read(prompt()))    the prompt, P vectors
    deep_prompt        lm(lm.embed(ids), prefix=prompt())             keys and values of every layer
    id_pt              lm(lm.embed(ids), prefix=lm.read(prompt(ids))) what computes the prompt
    textual_recursion  prompt tuning, reading candidates of a prompt  both prompts
    neural_recursion   lm(connector(lm(lm.embed(ids))))               the Connector
    lm_connector       connector(lm(lm.embed(ids)))                   the Connector
    connector_lm       lm(connector(lm.embed(ids)))                   the Connector
    fine_tuning        lm(lm.embed(ids))                              the LM itself
    training_free      lm(rescale(lm(lm.embed(ids))))                 nothing; it is only scored
    reader             prompt tuning, reading passages                a re-ranker and the prompt
    retriever          nothing: it finds passages                     two BERTs
    reranker           nothing: it sorts passages                     a BERT and its heads

The second column is recurse.COMPOSITIONS. By default neural_recursion starts from the Connector in
assets/neural_recursion_2, which was pretrained on text. The other two Connectors start from random
weights, unless --init names a folder. With --passes 3 the LM is run three times, with one Connector
between the passes or one in each gap. A Connector-LM whose Connector has as many layers as the
recursion has after its first pass (--connector-layers 8 on the embedded LM) spends the same compute
without a second pass. The training loop is in fit.py, and what it starts from in start.py. To add a
method, add a line to recurse.COMPOSITIONS, and a function and a line of METHODS here.
"""

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import adapters
import cli
import data
import encoders
import eval as metrics
import openbook
import reader
import recurse
import start
import textual
from checkpoints import hash_tensors, read_tensors, write_json
from fit import Recipe, autocast, fit, target_loss
from generate import predict
from model import LM
from pause import Paused, pause_parts, save_pause
from runs import Run, finish_record, read_record, start_record
from show import only_shows, show

# The methods


def prompt_tuning(task: start.Task) -> dict:
    """Train P vectors that stand before every question (Lester et al. 2021)."""
    return train_adapter(task, trained=start.start_prompt(task))


def deep_prompt(task: start.Task) -> dict:
    """Train the keys and values of P positions in every layer (Li & Liang 2021)."""
    return train_adapter(task, trained=start.start_deep_prompt(task))


def id_pt(task: start.Task) -> dict:
    """Train what computes P vectors from each question (Levine et al. 2022, section 2)."""
    return train_adapter(task, trained=start.start_generator(task))


def textual_recursion(task: start.Task) -> dict:
    """Train a prompt that reads what earlier prompts sampled (Levine et al. 2022, section 4).

    textual.py describes the stages. Whatever one of them has finished, --resume does not do again.
    """
    run = Run.from_args(task.args)
    if not task.args.no_cross_fit:  # refuse before anything is written
        textual.halves(task.examples["train"], task.args.seed)
    with run:
        prompt = start.start_prompt(task)
        record = start_record(run, prompt, task.lm, hashes(task, prompt))
        asked, prompt, rounds = textual.sample_rounds(task, train_stage, show_candidates)
        write_json(run.folder / "run.json", record | {"candidates": rounds})
    return train_adapter(asked, trained=start.next_prompt(task, prompt), loaded=task)


def neural_recursion(task: start.Task) -> dict:
    """Train a Connector between two passes through the LM (Levine et al. 2022, section 4.2)."""
    return train_adapter(task, trained=start.start_connector(task))


def lm_connector(task: start.Task) -> dict:
    """Train a Connector after one pass, like more layers on top of the LM."""
    return train_adapter(task, trained=start.start_connector(task))


def connector_lm(task: start.Task) -> dict:
    """Train a Connector before one pass, between the embeddings and the first layer."""
    return train_adapter(task, trained=start.start_connector(task))


def fine_tuning(task: start.Task) -> dict:
    """Train every parameter of the LM, stored in float32: the reference for the others."""
    return train_adapter(task, trained=task.lm.requires_grad_(True))


def training_free(task: start.Task) -> dict:
    """Train nothing: score a second pass over the first one's output at the embeddings' scale."""
    run = Run.from_args(task.args)
    task.pause = start.start_pause(task)
    with run:
        record = start_record(run, nn.Module(), task.lm, hashes(task, None))
        record |= {"question_format": asks_questions(task)}
        record |= {"step": 0, "score": None, "seconds": 0.0}
        return finish(task, run, record, None)


def frozen_reader(args) -> dict:
    """Train a prompt that reads the passages found for a question (Levine et al. 2022, section 3).

    reader.py describes the stages. Whatever one of them has finished, --resume does not do again.
    """
    book = openbook.load_book(args)
    used = reader.check(args, book)
    task = start.load_task(args, *start.load_lm(args), reader.examples(book))
    task.more = book.hash() + openbook.hash_encoders(used)
    if args.tune == "lm":
        trained, frozen, adapter = task.lm.requires_grad_(True), None, None
    else:
        trained = adapter = start.start_prompt(task)
        frozen = task.lm
    run = Run.from_args(args)

    def train_reranker(name: str, questions: dict) -> nn.Module:
        return encoders.stage(args, name, replace(book, questions=questions))

    with run:
        record = start_record(run, trained, frozen, hashes(task, adapter))
        asked, info = reader.prepare(task, book, run.folder, train_reranker)
        write_json(run.folder / "run.json", record | {"passages": info})
    torch.manual_seed(args.seed)  # whichever stages were loaded
    record = train_adapter(asked, trained=trained, loaded=task)
    if args.top > 0:
        record["seconds_per_question"] = reader.time_reader(asked, adapter, book)
        write_json(run.folder / "run.json", record)
    return record


OPEN_BOOK = ("retriever", "reranker", "reader")  # their functions take the flags, not a Task
METHODS = {  # method: (function, defaults of its flags)
    "prompt_tuning": (
        prompt_tuning,
        {"steps": 400, "schedule": "constant", "weight_decay": 0.0},  # lr: default_prompt_lr
    ),
    "deep_prompt": (
        deep_prompt,
        {"steps": 400, "lr": 0.01, "schedule": "constant", "weight_decay": 0.0},
    ),
    "id_pt": (id_pt, {"steps": 1200, "lr": 1e-3, "schedule": "constant"}),
    "textual_recursion": (
        textual_recursion,
        {"steps": 400, "schedule": "constant", "weight_decay": 0.0},  # lr: default_prompt_lr
    ),
    "neural_recursion": (neural_recursion, {"steps": 1200, "lr": 1e-3}),
    "lm_connector": (lm_connector, {"steps": 1200, "lr": 1e-3}),
    "connector_lm": (connector_lm, {"steps": 1200, "lr": 1e-3}),
    "fine_tuning": (fine_tuning, {"steps": 1200, "lr": 3e-4}),
    "training_free": (training_free, {"steps": 0, "lr": 0.0}),
    "retriever": (encoders.retriever, encoders.RETRIEVER),
    "reranker": (encoders.reranker, encoders.RERANKER),
    "reader": (
        frozen_reader,
        {"steps": 400, "schedule": "constant", "weight_decay": 0.0, "batch_size": 16},
    ),
}


def default_prompt_lr(lm: LM) -> float:
    """The learning rate of a soft prompt if --lr is not given, for AdamW.

    AdamW moves every entry by about the rate in a step, so the rate is tied to the size of entries:
    a quarter of the standard deviation of the token embeddings. (Lester et al. tune 0.3 for T5,
    whose embeddings are larger than 1.)
    """
    return 0.25 * lm.embed_tokens.weight.float().std().item()


def train_adapter(task, trained: nn.Module, loaded=None, batch_at=None, after_step=None) -> dict:
    """Train an adapter, or the LM itself, to answer the training questions.

    Dev chooses the best parameters. Returns the record, which run.json holds too. `loaded` is the
    task whose hashes identify the run, if its questions have since got other tokens. `batch_at` and
    `after_step` as in `fit`.
    """
    args, lm, tokens = task.args, task.lm, task.tokens
    recipe, run = Recipe.from_args(args), Run.from_args(args)
    if recipe.lr is None:
        recipe = replace(recipe, lr=default_prompt_lr(lm))
    adapter = None if trained is lm else trained
    frozen = None if trained is lm else lm
    pause = task.pause = start.start_pause(task)
    if pause is not None and pause.vectors is not None:
        trained = nn.ModuleDict({"adapter": trained, "pause": pause})

    def shuffled(number: int) -> data.Batch:
        return data.batches(tokens["train"], args.batch_size, args.seed, number)

    def loss_of(batch: data.Batch) -> Tensor:
        if cache is None:
            model, prefix = recurse.compose(args.method, lm, adapter, pause)  # reads the new prompt
            if getattr(args, "checkpoint_activations", False):
                model = reader.Checkpointed(model)
            if callable(prefix):  # one per question
                prefix = prefix([tokens["train"][row].input for row in batch.rows])
            return target_loss(model, prefix, batch)
        stack, prefix = recurse.COMPOSITIONS[args.method](lm, adapter)
        x = cache(batch.rows, batch.ids.shape[1])
        return target_loss(stack.after_first(), prefix, batch, x)

    def evaluate() -> float | None:
        if not tokens["dev"]:
            return None
        return metrics.summary(predict_split(task, adapter, "dev", args.eval_limit))["em"]

    def save() -> None:
        if adapter is None:
            lm.save(run.folder / "model", tokenizer=task.tokenizer, replace=True)
        else:
            base = run.arguments["model"]
            info = {"method": args.method, "base_model_name_or_path": base}
            if pause is not None:
                info |= {"pause": args.pause, "pause_text": args.pause_text}
            adapters.save_adapter(run.folder, adapter, lm, **info)
        save_pause(run.folder, pause)

    with run:
        record = start_record(run, trained, frozen, hashes(loaded or task, adapter))
        record["lr"] = recipe.lr
        if args.lr is None:
            show(f"learning rate {recipe.lr:.3g}, a quarter of the embeddings' standard deviation")
        record["question_format"] = asks_questions(task)
        cache = first_pass(task)
        batch_at = batch_at or shuffled
        record |= fit(run, recipe, trained, batch_at, loss_of, evaluate, save, None, after_step)
        return finish(task, run, record, adapter)


def train_stage(task: start.Task, name: str, before: adapters.SoftPrompt | None) -> nn.Module:
    """Train a prompt in the folder `name` below --out, or load it if it is trained already."""
    folder = Path(task.args.out) / name
    flags = vars(task.args) | {"method": "prompt_tuning", "out": str(folder)}
    if not (folder / "run.json").is_file() or "results" not in read_record(folder):
        show(f"{folder}: {len(task.tokens['train'])} training questions")
        stage = replace(task, args=argparse.Namespace(**flags))
        train_adapter(stage, trained=start.next_prompt(stage, before))
    return adapters.load_adapter(folder, task.lm)


def asks_questions(task: start.Task) -> bool:
    """Whether `eval.py ask` must put its questions into the format of data.question_text."""
    return all(metrics.is_question(example.input) for example in task.examples["train"])


def finish(task: start.Task, run: Run, record: dict, adapter) -> dict:
    """Answer and score dev and test, show examples, and complete the record, which is returned."""
    args = task.args
    with autocast(Recipe.from_args(args)):
        splits = [split for split in ("dev", "test") if task.tokens[split]]
        predictions = {split: predict_split(task, adapter, split) for split in splits}
    rows = predictions.get("test") or predictions.get("dev") or []
    run.write_lines("predictions.jsonl", rows)
    with only_shows("examples"):
        show_examples(rows)
        if args.method == "neural_recursion" and rows:
            show_passes(task, what_recursion_adds(task, rows))
    results = {split: metrics.summary(part) for split, part in predictions.items()}
    frozen = task.lm if record["weights_before"] else None
    return finish_record(run, record, frozen, results)


def first_pass(task: start.Task) -> recurse.FirstPass | None:
    """The cache of the first pass over the training questions. Prints its size.

    None if something trained comes before it or in its text, if no question is read twice, or if
    the states exceed --cache-first-pass.
    """
    args = task.args
    _, trained_vectors = pause_parts(args.pause, args.pause_text)
    texts = [(e.input + e.target)[:-1] for e in task.tokens["train"]]
    read = args.steps * args.grad_accum * args.batch_size  # texts in the whole training
    frozen = args.method in ("neural_recursion", "lm_connector") and not trained_vectors
    if not frozen or read <= len(texts):
        return None
    cache = recurse.FirstPass(task.lm, texts)
    size = cache.positions * task.lm.config.dim * (2 if args.dtype == "bfloat16" else 4) / 1e9
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
    model, prefix = recurse.compose(args.method, task.lm, adapter, task.pause)
    rows = data.sample(len(task.tokens[split]), limit, args.seed)
    examples = [task.examples[split][row] for row in rows]
    tokens = [task.tokens[split][row] for row in rows]
    ids, options = [t.input for t in tokens], [t.options for t in tokens]
    new, stops = args.max_new_tokens, metrics.stops(examples, args.stop)
    shape = {"max_tokens": args.eval_tokens, "mean": getattr(args, "rank_by", "sum") == "mean"}
    answers = predict(model, task.tokenizer, ids, prefix, new, options, stops, **shape)
    return metrics.score(examples, answers)


def hashes(task: start.Task, trained: nn.Module | None) -> dict[str, str | None]:
    """What identifies the data, their tokens, the frozen models, and what training starts from."""
    folder, adapter, encoder = start.init_folder(task.args), None, None
    if folder:
        adapter = hash_tensors(read_tensors(folder / "adapter_model.safetensors"))
    if isinstance(trained, adapters.PromptGenerator):
        encoder = hash_tensors(trained.encoder[0].state_dict())
    texts, tokens = (repr(sorted(part.items())) for part in (task.examples, task.tokens))
    texts += task.more
    return {
        "data_hash": hashlib.sha256(texts.encode()).hexdigest(),
        "tokens_hash": hashlib.sha256(tokens.encode()).hexdigest(),
        "fingerprint": task.lm.fingerprint(),
        "init_hash": adapter,
        "encoder_hash": encoder,
    }


# What is shown at the end


def show_examples(rows: list[dict]) -> None:
    """Print the first question of each task with its prediction and the accepted answers."""
    for name in dict.fromkeys(row["task"] for row in rows):
        row = next(row for row in rows if row["task"] == name)
        show(f"{row['input']} {row['prediction']}   (accepted: {', '.join(row['answers'])})")


def what_recursion_adds(task: start.Task, rows: list[dict]) -> dict:
    """One of the last correct answers, one that the LM alone does not give if there is one."""
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
    lm, tokenizer, pause = task.lm, task.tokenizer, task.pause
    reader = lm if pause is None else Paused(lm, pause)
    asked = row["input"] + getattr(reader, "pause_text", "")
    texts = [row["input"], asked, f"{asked} {row['prediction']}"]
    bare, question, whole = data.encode_prompts(tokenizer, texts)
    last = whole[len(question) :]
    question = question + getattr(reader, "pause_ids", [])
    with torch.no_grad():
        ids = torch.tensor([question + last], device=lm.embed_tokens.weight.device)
        h = lm(reader.embed(ids))[0, len(question) - 1 : -1]  # position t predicts token t + 1
        first = lm.logits(h).argmax(-1).tolist()
        alone = predict(lm, tokenizer, [bare], stops=["\n"])[0]
    show(f"\n{row['input']}\n  the frozen LM alone answers  {alone}")
    lines = [[repr(tokenizer.decode([token])) for token in tokens] for tokens in (last, first)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, line in zip(("last pass", "first pass"), lines):
        show(" ".join([f"  {name:12}", *map(str.ljust, line, widths)]))
    show(f"  accepted     {', '.join(row['answers'])}\n")


def show_candidates(split: str, scores: dict) -> None:
    """Print how good the candidates of a split are, for all its questions and for each task."""
    for task, row in {"all": scores, **scores["tasks"]}.items():
        recall = "  ".join(f"@{k} {100 * value:5.1f}" for k, value in row["recall"].items())
        first, most = 100 * row["best"], 100 * row["majority"]
        text = f"recall {recall}   EM likeliest {first:5.1f}, most frequent {most:5.1f}"
        show(f"{split:5} {task or 'other':12} {text}   ({row['n']} questions)")
    if scores["left_out"]:
        show(f"{split:5} {scores['left_out']} candidates did not fit the context and are left out")


# The command line


def parse(argv: list[str], program: str = "train.py") -> argparse.Namespace:
    """Parse the flags, with the method's own defaults. A bad flag exits with status 2."""
    parser = cli.Parser(prog=program, description=__doc__.split("\n")[0])
    parser.add_argument("--method", required=True, choices=METHODS, help="what is trained")
    init = "folder of a trained adapter to start from, or random; if neither this nor --model is "
    init += "given, the Connector of this method and size in assets/, if any; prompts: also vocab "
    init += "(embeddings of sampled tokens, the default), labels (of training answers), text:WORDS"
    init = ("--init", str, None, init)
    cli.add_flags(
        parser,
        "model",
        cli.MODEL,
        cli.TOKENIZER,
        init,
        cli.PROMPT,
        ("--placement", ["before_bos", "after_bos"], "before_bos", "of prompt_tuning's prompt"),
        ("--reparam-dim", cli.COUNT, None, "deep_prompt: width of an MLP in training (paper: 512)"),
        ("--encoder", str, None, "id_pt: folder of a T5 encoder, or assets/t5; open book: a BERT"),
        ("--encoder-prompt", cli.COUNT, 20, "id_pt: the encoder's own prompt (paper: about 430)"),
        cli.CONNECTOR,
        cli.ATTENTION,
        cli.PASSES,
        cli.CONNECTORS,
    )
    cli.add_flags(
        parser,
        "data",
        ("--train", str, None, "JSONL of questions; those of the embedded world if not given"),
        ("--dev", str, None, "questions that choose the best parameters"),
        ("--test", str, None, "questions that are scored once, at the end"),
        cli.WORLD,
        cli.PAUSE,
        cli.PAUSE_TEXT,
        ("--max-new-tokens", cli.COUNT, 16, "longest answer"),
        ("--stop", str, None, "ends an answer; a newline for questions if not given, '' for none"),
        ("--eval-limit", cli.COUNT, 240, "dev questions scored along training; the end scores all"),
        ("--eval-tokens", cli.COUNT, 8192, "tokens in a batch of evaluation, options included"),
    )
    group = cli.add_flags(
        parser,
        "textual recursion",
        ("--candidates", cli.COUNT, 16, "answers sampled for each question (paper: 1 to 64)"),
        ("--rounds", cli.COUNT, 1, "how often candidates are sampled, each time after reading"),
    )
    whole = "sample for training questions with a prompt that has seen them (the paper's way)"
    group.add_argument("--no-cross-fit", action="store_true", help=whole)
    cli.add_open_book_flags(parser)
    cli.add_training_flags(parser)
    keep = "GB of memory for the first pass's states, which are the same in every epoch; 0 for none"
    cli.add_flags(parser, "recursion", ("--cache-first-pass", cli.number_type(float, 0), 1.0, keep))
    cli.add_run_flags(parser)
    first = cli.Parser(prog=program, add_help=False)  # reads the method, which sets other defaults
    first.add_argument("--method")
    method = first.parse_known_args(argv)[0].method
    if method in METHODS:
        parser.set_defaults(**METHODS[method][1])
    return cli.add_late_defaults(parser.parse_args(argv), program, argv)


def check_flags(args: argparse.Namespace) -> None:
    """ValueError if flags contradict the method."""
    if args.init and args.method in ("fine_tuning", "training_free", "retriever", "reranker"):
        raise ValueError(f"--init: {args.method} does not start from an adapter")
    if args.pause and not args.pause_text:
        raise ValueError(f"--pause {args.pause}: --pause-text is empty")
    if args.pause and args.method in ("textual_recursion", *OPEN_BOOK):
        raise ValueError(f"--pause {args.pause}: not for {args.method}")
    if args.passes > 2 and args.method != "neural_recursion":
        raise ValueError(f"--passes {args.passes}: only neural_recursion has more than two passes")
    if args.checkpoint_activations and (args.pause or args.method not in CHECKPOINTED):
        raise ValueError(f"--checkpoint-activations: not for {args.method}, nor with --pause")
    if args.tune == "lm" and (args.init or args.method != "reader"):
        raise ValueError("--tune lm: for a reader, without --init; else --method fine_tuning")


CHECKPOINTED = (*recurse.PROMPT_METHODS, "fine_tuning")  # the LM alone, behind a prefix


def main(argv: list[str] | None = None) -> dict:
    """Run one method. Returns the record, which run.json holds too."""
    args = parse(sys.argv[1:] if argv is None else argv)
    check_flags(args)
    if args.tune == "lm":
        args.prompt_length = 0
    cli.check_and_seed(args)
    method, _ = METHODS[args.method]
    if args.method in OPEN_BOOK:
        return method(args)
    return method(start.load_task(args, *start.load_lm(args)))


if __name__ == "__main__":
    cli.run_program("train.py", main)
