"""Train something small around a frozen LM, or the LM itself.

    python train.py --method neural_recursion

trains a Connector between two passes through the embedded LM, on questions about the embedded
world. In 2 to 4 minutes on two CPU cores it reaches an exact match of 96 % on one-hop and 20 % on
two-hop test questions, about people who occur in no training question. runs.py describes the
folder that a run leaves.

    method             what answers a question                        what is trained
    prompt_tuning      lm(lm.embed(ids), prefix=lm.read(prompt()))    the prompt, P vectors
    textual_recursion  the same, reading candidates of a prompt p1    both prompts
    neural_recursion   lm(connector(lm(lm.embed(ids))))               the Connector
    lm_connector       connector(lm(lm.embed(ids)))                   the Connector
    connector_lm       lm(connector(lm.embed(ids)))                   the Connector
    fine_tuning        lm(lm.embed(ids))                              the LM itself
    training_free      lm(rescale(lm(lm.embed(ids))))                 nothing; it is only scored

The second column is recurse.COMPOSITIONS. By default neural_recursion starts from the Connector in
assets/neural_recursion_2, which was pretrained on text. The other two Connectors start from random
weights, unless --init names a folder. With --passes 3 the LM is run three times, with one Connector
between the passes or one in each gap. A Connector-LM whose Connector has as many layers as the
recursion has after its first pass (--connector-layers 8 on the embedded LM) spends the same compute
without a second pass. The training loop is in fit.py. To add a method, add a line to
recurse.COMPOSITIONS, and a function and a line of METHODS here.
"""

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch import Tensor

import adapters
import cli
import data
import eval as metrics
import recurse
import textual
import world
from checkpoints import hash_tensors, load_tokenizer, read_tensors, resolve, write_json
from fit import Recipe, autocast, fit, target_loss
from generate import predict
from model import LM
from runs import (
    ASSETS,
    Run,
    finish_record,
    names_file,
    only_shows,
    read_record,
    show,
    start_record,
)

# The methods


@dataclass
class Task:
    """The frozen LM and the questions of each split, as text and as tokens."""

    args: argparse.Namespace
    lm: LM
    tokenizer: Tokenizer
    examples: dict[str, list[data.Example]]
    tokens: dict[str, list[data.TokenizedExample]]
    pause: adapters.Pause | None = None  # what follows every question


def prompt_tuning(task: Task) -> dict:
    """Train P vectors that stand before every question (Lester et al. 2021)."""
    return train_adapter(task, trained=start_prompt(task))


def textual_recursion(task: Task) -> dict:
    """Train a prompt that reads what earlier prompts sampled (Levine et al. 2022, section 4).

    textual.py describes the stages. Whatever one of them has finished, --resume does not do again.
    """
    run = Run.from_args(task.args)
    if not task.args.no_cross_fit:  # refuse before anything is written
        textual.halves(task.examples["train"], task.args.seed)
    with run:
        record = start_record(run, start_prompt(task), task.lm, hashes(task))
        asked, prompt, rounds = textual.sample_rounds(task, train_stage)
        write_json(run.folder / "run.json", record | {"candidates": rounds})
    return train_adapter(asked, trained=next_prompt(task, prompt), loaded=task)


def neural_recursion(task: Task) -> dict:
    """Train a Connector between two passes through the LM (Levine et al. 2022, section 4.2)."""
    return train_adapter(task, trained=start_connector(task))


def lm_connector(task: Task) -> dict:
    """Train a Connector after one pass, like more layers on top of the LM."""
    return train_adapter(task, trained=start_connector(task))


def connector_lm(task: Task) -> dict:
    """Train a Connector before one pass, between the embeddings and the first layer."""
    return train_adapter(task, trained=start_connector(task))


def fine_tuning(task: Task) -> dict:
    """Train every parameter of the LM, stored in float32: the reference for the others."""
    return train_adapter(task, trained=task.lm.requires_grad_(True))


def training_free(task: Task) -> dict:
    """Train nothing: score a second pass over the first one's output at the embeddings' scale."""
    run = Run.from_args(task.args)
    task.pause = start_pause(task)
    with run:
        record = start_record(run, nn.Module(), task.lm, hashes(task))
        record |= {"question_format": asks_questions(task)}
        record |= {"step": 0, "score": None, "seconds": 0.0}
        return finish(task, run, record, None)


METHODS = {  # method: (function, defaults of its flags)
    "prompt_tuning": (
        prompt_tuning,
        {"steps": 400, "lr": 0.1, "schedule": "constant", "weight_decay": 0.0},
    ),
    "textual_recursion": (
        textual_recursion,
        {"steps": 400, "lr": 0.1, "schedule": "constant", "weight_decay": 0.0},
    ),
    "neural_recursion": (neural_recursion, {"steps": 1200, "lr": 3e-3}),
    "lm_connector": (lm_connector, {"steps": 1200, "lr": 3e-3}),
    "connector_lm": (connector_lm, {"steps": 1200, "lr": 3e-3}),
    "fine_tuning": (fine_tuning, {"steps": 1200, "lr": 3e-4}),
    "training_free": (training_free, {"steps": 0, "lr": 0.0}),
}


def train_adapter(task: Task, trained: nn.Module, loaded: Task | None = None) -> dict:
    """Train an adapter, or the LM itself, to answer the training questions.

    Dev chooses the best parameters. Returns the record, which run.json holds too. `loaded` is the
    task whose hashes identify the run, if its questions have since got other tokens.
    """
    args, lm, tokens = task.args, task.lm, task.tokens
    recipe, run = Recipe.from_args(args), Run.from_args(args)
    adapter = None if trained is lm else trained
    frozen = None if trained is lm else lm
    pause = task.pause = start_pause(task)
    if pause is not None and pause.vectors is not None:
        trained = nn.ModuleDict({"adapter": trained, "pause": pause})

    def batch_at(number: int) -> data.Batch:
        return data.batches(tokens["train"], args.batch_size, args.seed, number)

    def loss_of(batch: data.Batch) -> Tensor:
        if cache is None:
            model, prefix = recurse.compose(args.method, lm, adapter, pause)  # reads the new prompt
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
        adapters.save_pause(run.folder, pause)

    with run:
        record = start_record(run, trained, frozen, hashes(loaded or task))
        record["question_format"] = asks_questions(task)
        cache = first_pass(task)
        record |= fit(run, recipe, trained, batch_at, loss_of, evaluate, save)
        return finish(task, run, record, adapter)


def asks_questions(task: Task) -> bool:
    """Whether `eval.py ask` must put its questions into the format of data.question_text."""
    return all(data.is_question(example.input) for example in task.examples["train"])


def finish(task: Task, run: Run, record: dict, adapter) -> dict:
    """Answer and score dev and test, show examples, and complete the record, which is returned."""
    args = task.args
    with autocast(Recipe.from_args(args)):
        splits = [split for split in ("dev", "test") if task.tokens[split]]
        predictions = {split: predict_split(task, adapter, split) for split in splits}
    rows = predictions.get("test") or predictions.get("dev") or []
    run.write_lines("predictions.jsonl", rows)
    with only_shows("examples"):
        show_examples(rows)
        if args.method == "neural_recursion" and rows:  # the last correct answer, or the last
            show_passes(task, next((row for row in rows[::-1] if row["em"]), rows[-1]))
    results = {split: metrics.summary(part) for split, part in predictions.items()}
    frozen = None if args.method == "fine_tuning" else task.lm
    return finish_record(run, record, frozen, results)


def first_pass(task: Task) -> recurse.FirstPass | None:
    """The cache of the first pass over the training questions. Prints its size.

    None if something trained comes before it or in its text, if no question is read twice, or if
    the states exceed --cache-first-pass.
    """
    args = task.args
    _, trained_vectors = adapters.pause_parts(args.pause, args.pause_text)
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
def predict_split(task: Task, adapter, split: str, limit: int | None = None) -> list[dict]:
    """Answer a split's questions, or a sample of `limit` of them, and score the answers."""
    args = task.args
    model, prefix = recurse.compose(args.method, task.lm, adapter, task.pause)
    rows = data.sample(len(task.tokens[split]), limit, args.seed)
    examples = [task.examples[split][row] for row in rows]
    tokens = [task.tokens[split][row] for row in rows]
    ids, options = [t.input for t in tokens], [t.options for t in tokens]
    new, stops = args.max_new_tokens, metrics.stops(examples, args.stop)
    answers = predict(model, task.tokenizer, ids, prefix, new, options, stops, args.eval_tokens)
    return metrics.score(examples, answers)


def hashes(task: Task) -> dict[str, str | None]:
    """What identifies the data, their tokens, the LM, and the adapter that training starts from."""
    folder, adapter = init_folder(task.args), None
    if folder:
        adapter = hash_tensors(read_tensors(folder / "adapter_model.safetensors"))
    texts, tokens = (repr(sorted(part.items())) for part in (task.examples, task.tokens))
    return {
        "data_hash": hashlib.sha256(texts.encode()).hexdigest(),
        "tokens_hash": hashlib.sha256(tokens.encode()).hexdigest(),
        "fingerprint": task.lm.fingerprint(),
        "init_hash": adapter,
    }


# What training starts from


def load_task(args, lm: LM, tokenizer: Tokenizer) -> Task:
    """Load and tokenise the questions. One that does not fit the context is a ValueError."""
    P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    context = lm.config.max_len
    after, k = adapters.pause_parts(args.pause, args.pause_text)  # what follows every question
    left = context - P - k  # for a question and its answer
    if left < 2:
        flags = f"--prompt-length {P}" + (f" and --pause {k}" if k else "")
        raise ValueError(f"{flags} leaves {left} of the LM's context of {context}")
    eos = lm.config.eos[0] if lm.config.eos else None
    examples = {split: load_split(args, split) for split in ("train", "dev", "test")}
    V = lm.config.vocab_size
    tokens, pause_ids = {}, list(range(V, V + k))  # those of recurse.Paused
    for split, part in examples.items():
        paused = [replace(example, input=example.input + after) for example in part]
        rows = data.tokenize(paused, tokenizer, eos, left, V)
        tokens[split] = [replace(row, input=row.input + pause_ids) for row in rows]
    for split in ("dev", "test"):  # refuse before training what `predict` would refuse after it
        for example, question in zip(examples[split], tokens[split]):
            T, new = len(question.input) - k, args.max_new_tokens
            if not example.options and T + new - 1 > left:  # the last new token is never read
                raise ValueError(
                    f"{example.source}: {T} tokens and {new} new ones exceed the {left} that the "
                    "LM's context leaves"
                )
    return Task(args, lm, tokenizer, examples, tokens)


def load_lm(args) -> tuple[LM, Tokenizer]:
    """Load the LM, frozen, and its tokenizer. ValueError if --tokenizer does not belong to it."""
    folder = resolve(args.model or ASSETS / "lm")
    bf16 = args.dtype == "bfloat16" and args.method != "fine_tuning"
    lm = LM.from_pretrained(folder, args.device, torch.bfloat16 if bf16 else torch.float32)
    tokenizer = load_tokenizer(args.tokenizer or folder, lm.config.vocab_size)
    if args.tokenizer and (folder / "tokenizer.json").is_file():
        given, own = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
        if given != own:
            token = min(given.items() ^ own.items())[0]  # one that differs
            raise ValueError(
                f"--tokenizer {args.tokenizer} belongs to another LM: {token!r} is "
                f"{given.get(token)} there and {own.get(token)} in the LM's own tokenizer"
            )
    return lm, tokenizer


def load_split(args, split: str) -> list[data.Example]:
    """Read --train, --dev or --test. If not given: the world's, or none if --train is given."""
    path = getattr(args, split)
    if path:
        return data.read(path)
    if args.train:
        return []
    records = world.make(args.world_seed).questions(split)
    return [data.parse_record(record, f"world {split}") for record in records]


def init_folder(args) -> Path | None:
    """The folder of the adapter that training starts from, or None if it starts from none."""
    if names_file("init", args.init):
        return Path(args.init)
    stored = ASSETS / f"{args.method}_{args.connector_layers}"
    embedded = args.init is None and args.model is None and stored.is_dir()
    return stored if embedded else None


def start_connector(task: Task) -> adapters.Connector | adapters.Connectors:
    """What training starts from: --init, or the Connector in assets/, or a random one.

    If there are more than two passes, the one that is loaded is copied into every gap.
    """
    args, lm = task.args, task.lm
    folder = init_folder(args)
    if args.init not in (None, "random") and not folder:
        raise ValueError(
            f"--init {args.init} starts a prompt, and {args.method} trains a Connector"
        )
    if folder and folder.is_dir() and "passes" in adapters.read_adapter_config(folder):
        return load_init(folder, args, lm, adapters.Connectors)

    def start() -> adapters.Connector:
        if folder:
            return load_init(folder, args, lm, adapters.Connector)
        return recurse.new_connector(lm, args.method, args.connector_layers)

    return recurse.between_passes(args.passes, args.connectors == "shared", start)


def start_prompt(task: Task) -> adapters.SoftPrompt:
    """The prompt that training starts from, as --init says."""
    args, table, P = task.args, task.lm.embed_tokens.weight, task.args.prompt_length
    folder = init_folder(args)
    if folder:
        return load_init(folder, args, task.lm, adapters.SoftPrompt)
    kind, _, text = (args.init or "vocab").partition(":")
    rng = torch.Generator().manual_seed(args.seed)
    if kind == "labels":  # the most frequent answers
        counts = Counter(example.target for example in task.examples["train"])
        labels = [label for label, _ in counts.most_common(P)]
        vectors = adapters.from_labels(P, table, task.tokenizer, labels, generator=rng)
    elif kind == "text":
        vectors = adapters.from_text(P, table, task.tokenizer, text, generator=rng)
    elif kind == "random":
        vectors = adapters.random(P, table, generator=rng)
    else:
        vectors = adapters.from_vocab(P, table, generator=rng)
    return adapters.SoftPrompt(vectors).to(args.device)


def start_pause(task: Task) -> adapters.Pause | None:
    """The filler after every question. Trained vectors start as the tokens of "\\nA:", repeated, or
    as those of the adapter that training starts from, if it has any."""
    args, lm, folder = task.args, task.lm, init_folder(task.args)
    text, k = adapters.pause_parts(args.pause, args.pause_text)
    if folder and (folder / "pause.safetensors").is_file():
        stored = adapters.read_adapter_config(folder)["pause"]
        if stored != k:
            raise ValueError(
                f"--init {folder} ends questions with {stored} trained vectors; say so with "
                f"--pause {stored} --pause-text trained"
            )
        return adapters.load_pause(folder, k, "trained", lm)
    if k == 0:
        return adapters.Pause(text) if text else None
    filler = adapters.from_text(k, lm.embed_tokens.weight, task.tokenizer, "\nA:" * k)
    return adapters.Pause(vectors=filler).to(args.device)


def next_prompt(task: Task, before: adapters.SoftPrompt | None) -> adapters.SoftPrompt:
    """The prompt that a stage starts from: the one before it, if there is one and no --init."""
    if before is None or task.args.init:
        return start_prompt(task)
    return adapters.SoftPrompt(before.vectors).to(task.args.device)


def train_stage(task: Task, name: str, before: adapters.SoftPrompt | None) -> adapters.SoftPrompt:
    """Train a prompt in the folder `name` below --out, or load it if it is trained already."""
    folder = Path(task.args.out) / name
    flags = vars(task.args) | {"method": "prompt_tuning", "out": str(folder)}
    if not (folder / "run.json").is_file() or "results" not in read_record(folder):
        show(f"{folder}: {len(task.tokens['train'])} training questions")
        stage = replace(task, args=argparse.Namespace(**flags))
        train_adapter(stage, trained=next_prompt(stage, before))
    return adapters.load_adapter(folder, task.lm)


def load_init(init: Path, args, lm: LM, kind: type) -> nn.Module:
    """Load the stored adapter that --init names. ValueError if the method does not train it."""
    method = args.method
    if not init.is_dir():
        raise ValueError(
            f"--init {init} is neither the folder of an adapter nor a way to start {method}"
        )
    adapter = adapters.load_adapter(init, lm)
    name = type(adapter).__name__
    if not isinstance(adapter, kind):
        raise ValueError(f"--init {init} holds a {name}, which {method} does not train")
    made_for = adapters.read_adapter_config(init).get("method", method)
    if kind is not adapters.SoftPrompt and made_for != method:
        raise ValueError(
            f"--init {init} was trained for {made_for}, where the Connector stands "
            f"elsewhere than in {method}"
        )
    if kind is adapters.SoftPrompt:
        size, wanted, flag = len(adapter.vectors), args.prompt_length, "--prompt-length"
    else:
        one = adapter[0] if kind is adapters.Connectors else adapter
        size, wanted, flag = len(one.layers), args.connector_layers, "--connector-layers"
    if kind is adapters.Connectors:
        between = "shared" if len(adapter) == 1 else "each"
        if (adapter.passes, between) != (args.passes, args.connectors):
            raise ValueError(
                f"--init {init} was trained for other passes; say so with --passes "
                f"{adapter.passes} --connectors {between}"
            )
    if size != wanted:
        raise ValueError(f"--init {init} holds a {name} of {size}; say so with {flag} {size}")
    return adapter


# What is shown at the end


def show_examples(rows: list[dict]) -> None:
    """Print the first question of each task with its prediction and the accepted answers."""
    for name in dict.fromkeys(row["task"] for row in rows):
        row = next(row for row in rows if row["task"] == name)
        show(f"{row['input']} {row['prediction']}   (accepted: {', '.join(row['answers'])})")


def show_passes(task: Task, row: dict) -> None:
    """Print how the recursion answers one question.

    Last pass: the prediction, token by token. First pass: the LM's own likeliest token at each of
    these positions, after the same tokens.
    """
    lm, tokenizer, pause = task.lm, task.tokenizer, task.pause
    reader = lm if pause is None else recurse.Paused(lm, pause)
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


# The command line


def parse(argv: list[str], program: str = "train.py") -> argparse.Namespace:
    """Parse the flags, with the method's own defaults. A bad flag exits with status 2."""
    parser = cli.Parser(prog=program, description=__doc__.split("\n")[0])
    parser.add_argument("--method", required=True, choices=METHODS, help="what is trained")
    init = "folder of a trained adapter to start from, or random; if neither this nor --model is "
    init += "given, the Connector of this method and size in assets/, if any; prompts: also vocab "
    init += "(embeddings of sampled tokens, the default), labels (of training answers), text:WORDS"
    start = ("--init", str, None, init)
    connector = (cli.CONNECTOR, cli.PASSES, cli.CONNECTORS)
    cli.add_flags(parser, "model", cli.MODEL, cli.TOKENIZER, start, cli.PROMPT, *connector)
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


def main(argv: list[str] | None = None) -> dict:
    """Run one method. Returns the record, which run.json holds too."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.init and args.method in ("fine_tuning", "training_free"):
        raise ValueError(f"--init: {args.method} does not start from an adapter")
    if args.pause and not args.pause_text:
        raise ValueError(f"--pause {args.pause}: --pause-text is empty")
    if args.passes > 2 and args.method != "neural_recursion":
        raise ValueError(f"--passes {args.passes}: only neural_recursion has more than two passes")
    cli.check_and_seed(args)
    method, _ = METHODS[args.method]
    return method(load_task(args, *load_lm(args)))


if __name__ == "__main__":
    cli.run_program("train.py", main)
