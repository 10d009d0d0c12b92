"""Train something small around a frozen LM, or the LM itself.

    python train.py --method neural_recursion

trains a Connector between two passes through the embedded LM, on questions about the embedded
world. In 2 to 4 minutes on two CPU cores it reaches an exact match of 96 % on one-hop and 20 % on
two-hop test questions, about people who occur in no training question. runs.py describes the
folder that a run leaves.

    method             what answers a question                        what is trained
    prompt_tuning      lm(lm.embed(ids), prefix=lm.read(prompt()))    the prompt, P vectors
    deep_prompt        lm(lm.embed(ids), prefix=prompt())             keys and values of every layer
    id_pt              lm(lm.embed(ids), prefix=lm.read(prompt(ids))) what computes the prompt
    neural_recursion   lm(connector(lm(lm.embed(ids))))               the Connector
    lm_connector       connector(lm(lm.embed(ids)))                   the Connector
    connector_lm       lm(connector(lm.embed(ids)))                   the Connector
    fine_tuning        lm(lm.embed(ids))                              the LM itself

The second column is recurse.COMPOSITIONS. By default neural_recursion starts from the Connector in
assets/neural_recursion_2, which was pretrained on text. The other two Connectors start from random
weights, unless --init names a folder. The training loop is in fit.py. To add a method, add a line
to recurse.COMPOSITIONS, and a function and a line of METHODS here.
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
import world
from checkpoints import hash_tensors, load_tokenizer, read_tensors, resolve
from fit import Recipe, autocast, fit, target_loss
from generate import predict, stack_prefixes
from model import LM
from runs import ASSETS, Run, finish_record, names_file, only_shows, show, start_record

# The methods


@dataclass
class Task:
    """The frozen LM and the questions of each split, as text and as tokens."""

    args: argparse.Namespace
    lm: LM
    tokenizer: Tokenizer
    examples: dict[str, list[data.Example]]
    tokens: dict[str, list[data.TokenizedExample]]


def prompt_tuning(task: Task) -> dict:
    """Train P vectors that stand before every question (Lester et al. 2021)."""
    return train_adapter(task, trained=start_prompt(task))


def deep_prompt(task: Task) -> dict:
    """Train the keys and values of P positions in every layer (Li & Liang 2021)."""
    return train_adapter(task, trained=start_deep_prompt(task))


def id_pt(task: Task) -> dict:
    """Train what computes P vectors from each question (Levine et al. 2022, section 2)."""
    return train_adapter(task, trained=start_generator(task))


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


METHODS = {  # method: (function, defaults of its flags)
    "prompt_tuning": (
        prompt_tuning,
        {"steps": 400, "schedule": "constant", "weight_decay": 0.0},  # lr: see default_prompt_lr
    ),
    "deep_prompt": (
        deep_prompt,
        {"steps": 400, "lr": 0.01, "schedule": "constant", "weight_decay": 0.0},
    ),
    "id_pt": (id_pt, {"steps": 1200, "lr": 1e-3, "schedule": "constant"}),
    "neural_recursion": (neural_recursion, {"steps": 1200, "lr": 3e-3}),
    "lm_connector": (lm_connector, {"steps": 1200, "lr": 3e-3}),
    "connector_lm": (connector_lm, {"steps": 1200, "lr": 3e-3}),
    "fine_tuning": (fine_tuning, {"steps": 1200, "lr": 3e-4}),
}


def default_prompt_lr(lm: LM) -> float:
    """The learning rate of prompt_tuning if --lr is not given, for AdamW.

    AdamW moves every entry by about the rate in a step, so the rate is tied to the size of entries:
    a quarter of the standard deviation of the token embeddings. (Lester et al. tune 0.3 for T5,
    whose embeddings are larger than 1.)
    """
    return 0.25 * lm.embed_tokens.weight.float().std().item()


def train_adapter(task: Task, trained: nn.Module) -> dict:
    """Train an adapter, or the LM itself, to answer the training questions.

    Dev chooses the best parameters. Returns the record, which run.json holds too.
    """
    args, lm, tokens = task.args, task.lm, task.tokens
    recipe, run = Recipe.from_args(args), Run.from_args(args)
    if recipe.lr is None:
        recipe = replace(recipe, lr=default_prompt_lr(lm))
    adapter = None if trained is lm else trained
    frozen = None if trained is lm else lm

    def batch_at(number: int) -> data.Batch:
        return data.batches(tokens["train"], args.batch_size, args.seed, number)

    def loss_of(batch: data.Batch) -> Tensor:
        model, prefix = recurse.COMPOSITIONS[args.method](lm, adapter)  # reads the new prompt
        prefix = stack_prefixes(prefix, [tokens["train"][row].input for row in batch.rows])
        return target_loss(model, prefix, batch)

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
            adapters.save_adapter(run.folder, adapter, lm, **info)

    with run:
        record = start_record(run, trained, frozen, hashes(task, trained))
        record["lr"] = recipe.lr
        if args.lr is None:
            show(f"learning rate {recipe.lr:.3g}, a quarter of the embeddings' standard deviation")
        # Whether `eval.py ask` must put its questions into the format of data.question_text.
        inputs = [example.input for example in task.examples["train"]]
        record["question_format"] = all(map(data.is_question, inputs))
        record |= fit(run, recipe, trained, batch_at, loss_of, evaluate, save)
        with autocast(recipe):
            splits = [split for split in ("dev", "test") if tokens[split]]
            predictions = {split: predict_split(task, adapter, split) for split in splits}
        rows = predictions.get("test") or predictions.get("dev") or []
        run.write_lines("predictions.jsonl", rows)
        with only_shows("examples"):
            show_examples(rows)
            if args.method == "neural_recursion" and rows:  # the last correct answer, or the last
                show_passes(task, next((row for row in rows[::-1] if row["em"]), rows[-1]))
        results = {split: metrics.summary(part) for split, part in predictions.items()}
        return finish_record(run, record, frozen, results)


@torch.no_grad()
def predict_split(task: Task, adapter, split: str, limit: int | None = None) -> list[dict]:
    """Answer a split's questions, or a sample of `limit` of them, and score the answers."""
    args = task.args
    model, prefix = recurse.COMPOSITIONS[args.method](task.lm, adapter)
    rows = data.sample(len(task.tokens[split]), limit, args.seed)
    examples = [task.examples[split][row] for row in rows]
    tokens = [task.tokens[split][row] for row in rows]
    ids, options = [t.input for t in tokens], [t.options for t in tokens]
    new, stops = args.max_new_tokens, metrics.stops(examples, args.stop)
    answers = predict(model, task.tokenizer, ids, prefix, new, options, stops, args.eval_tokens)
    return metrics.score(examples, answers)


def hashes(task: Task, trained: nn.Module) -> dict[str, str | None]:
    """What identifies the data, their tokens, the frozen models, and what training starts from."""
    folder, adapter, encoder = init_folder(task.args), None, None
    if folder:
        adapter = hash_tensors(read_tensors(folder / "adapter_model.safetensors"))
    if isinstance(trained, adapters.PromptGenerator):
        encoder = hash_tensors(trained.encoder[0].state_dict())
    texts, tokens = (repr(sorted(part.items())) for part in (task.examples, task.tokens))
    return {
        "data_hash": hashlib.sha256(texts.encode()).hexdigest(),
        "tokens_hash": hashlib.sha256(tokens.encode()).hexdigest(),
        "fingerprint": task.lm.fingerprint(),
        "init_hash": adapter,
        "encoder_hash": encoder,
    }


# What training starts from


def load_task(args, lm: LM, tokenizer: Tokenizer) -> Task:
    """Load and tokenise the questions. One that does not fit the context is a ValueError."""
    P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    if args.placement == "after_bos":
        if args.method != "prompt_tuning":
            raise ValueError(f"--placement after_bos: {args.method} trains no prompt that can be")
        P += 1
        tokenizer = adapters.without_bos(tokenizer)
    context = lm.config.max_len
    left = context - P  # for a question and its answer
    if left < 2:
        raise ValueError(f"--prompt-length {P} leaves {left} of the LM's context of {context}")
    eos = lm.config.eos[0] if lm.config.eos else None
    examples = {split: load_split(args, split) for split in ("train", "dev", "test")}
    V = lm.config.vocab_size
    tokens = {k: data.tokenize(part, tokenizer, eos, left, V) for k, part in examples.items()}
    for split in ("dev", "test"):  # refuse before training what `predict` would refuse after it
        for example, question in zip(examples[split], tokens[split]):
            T, new = len(question.input), args.max_new_tokens
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


def start_connector(task: Task) -> adapters.Connector:
    """The Connector that training starts from: --init, or the one in assets/, or a random one."""
    args, lm = task.args, task.lm
    folder = init_folder(args)
    if folder:
        return load_init(folder, args, lm, adapters.Connector)
    if args.init in (None, "random"):
        return recurse.new_connector(lm, args.method, args.connector_layers)
    raise ValueError(f"--init {args.init} starts a prompt, and {args.method} trains a Connector")


def start_prompt(task: Task) -> adapters.SoftPrompt:
    """The soft prompt that training starts from, as --init and --placement say."""
    args, lm, folder = task.args, task.lm, init_folder(task.args)
    if folder:
        vectors = load_init(folder, args, lm, adapters.SoftPrompt).vectors
    else:
        vectors = start_vectors(task)
    bos = adapters.bos_vector(lm) if args.placement == "after_bos" else None
    return adapters.SoftPrompt(vectors, bos).to(args.device)


@torch.no_grad()
def start_deep_prompt(task: Task) -> adapters.DeepPrompt:
    """The deep prompt that training starts from: what the LM reads of a soft prompt, or noise."""
    args, lm, folder = task.args, task.lm, init_folder(task.args)
    if folder:
        kinds = (adapters.SoftPrompt, adapters.DeepPrompt)
        start = load_init(folder, args, lm, kinds)()
    else:
        start = start_vectors(task)
    if isinstance(start, Tensor):
        start = lm.read(start.to(lm.embed_tokens.weight))
    if args.init == "random":
        rng = torch.Generator().manual_seed(args.seed)
        start = adapters.random_like(start, generator=rng)
    return adapters.DeepPrompt(start, args.reparam_dim)


def start_generator(task: Task) -> adapters.PromptGenerator:
    """The prompt generator that training starts from: --init, or a random one."""
    args, lm, folder = task.args, task.lm, init_folder(task.args)
    if not folder and args.init not in (None, "random"):
        raise ValueError(f"--init {args.init} starts a prompt, and id_pt trains what computes one")
    path = Path(args.encoder or ASSETS / "t5")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{'--encoder ' if args.encoder else ''}{path}: holds no T5 encoder; "
            "`python pretrain.py encoder` makes one, and --encoder names its folder"
        )
    encoder, recode = recurse.load_encoder(path, task.tokenizer, args.device)
    if folder:
        generator = load_init(folder, args, lm, adapters.PromptGenerator, encoder)
    else:
        rng, table = torch.Generator().manual_seed(args.seed), encoder.embed_tokens.weight
        start = adapters.from_vocab(args.encoder_prompt, table, generator=rng).to(args.device)
        scale = adapters.rms(lm.embed_tokens.weight)
        dim = lm.config.dim
        generator = adapters.PromptGenerator(encoder, start, args.prompt_length, dim, scale)
    generator.recode = recode
    return generator


def start_vectors(task: Task) -> Tensor:
    """The vectors (P, C) that --init describes in words."""
    args, table, P = task.args, task.lm.embed_tokens.weight, task.args.prompt_length
    kind, _, text = (args.init or "vocab").partition(":")
    rng = torch.Generator().manual_seed(args.seed)
    if kind == "labels":  # the most frequent answers
        counts = Counter(example.target for example in task.examples["train"])
        labels = [label for label, _ in counts.most_common(P)]
        return adapters.from_labels(P, table, task.tokenizer, labels, generator=rng)
    if kind == "text":
        return adapters.from_text(P, table, task.tokenizer, text, generator=rng)
    if kind == "random":
        return adapters.random(P, table, generator=rng)
    return adapters.from_vocab(P, table, generator=rng)


def load_init(init: Path, args, lm: LM, kind: type | tuple[type, ...], encoder=None) -> nn.Module:
    """Load the stored adapter that --init names. ValueError if the method does not train it."""
    method = args.method
    if not init.is_dir():
        raise ValueError(
            f"--init {init} is neither the folder of an adapter nor a way to start {method}"
        )
    adapter = adapters.load_adapter(init, lm, encoder)
    name = type(adapter).__name__
    if not isinstance(adapter, kind):
        raise ValueError(f"--init {init} holds a {name}, which {method} does not train")
    made_for = adapters.read_adapter_config(init).get("method", method)
    if kind is adapters.Connector and made_for != method:
        raise ValueError(
            f"--init {init} was trained for {made_for}, where the Connector stands "
            f"elsewhere than in {method}"
        )
    wanted, flag = args.prompt_length, "--prompt-length"
    if kind is adapters.Connector:
        size, wanted, flag = len(adapter.layers), args.connector_layers, "--connector-layers"
    elif isinstance(adapter, adapters.SoftPrompt):
        size = len(adapter.vectors)
    elif isinstance(adapter, adapters.DeepPrompt):
        size = len(adapter.keys_values)
    else:
        size = len(adapter.queries)
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

    Second pass: the prediction, token by token. First pass: the LM's own likeliest token at each of
    these positions, after the same tokens.
    """
    lm, tokenizer = task.lm, task.tokenizer
    texts = [row["input"], f"{row['input']} {row['prediction']}"]
    question, whole = data.encode_prompts(tokenizer, texts)
    second = whole[len(question) :]
    with torch.no_grad():
        ids = torch.tensor([question + second], device=lm.embed_tokens.weight.device)
        h = lm(lm.embed(ids))[0, len(question) - 1 : -1]  # position t predicts token t + 1
        first = lm.logits(h).argmax(-1).tolist()
        alone = predict(lm, tokenizer, [question], stops=["\n"])[0]
    show(f"\n{row['input']}\n  the frozen LM alone answers  {alone}")
    lines = [[repr(tokenizer.decode([token])) for token in tokens] for tokens in (second, first)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, line in zip(("second pass", "first pass"), lines):
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
    cli.add_flags(
        parser,
        "model",
        cli.MODEL,
        cli.TOKENIZER,
        start,
        ("--prompt-length", cli.COUNT, 20, "P of a prompt (papers: 100 to 400)"),
        ("--placement", ["before_bos", "after_bos"], "before_bos", "of prompt_tuning's prompt"),
        ("--reparam-dim", cli.COUNT, None, "deep_prompt: width of an MLP in training (paper: 512)"),
        ("--encoder", str, None, "id_pt: folder of a T5 encoder; assets/t5 if not given"),
        ("--encoder-prompt", cli.COUNT, 20, "id_pt: the encoder's own prompt (paper: about 430)"),
        cli.CONNECTOR,
    )
    cli.add_flags(
        parser,
        "data",
        ("--train", str, None, "JSONL of questions; those of the embedded world if not given"),
        ("--dev", str, None, "questions that choose the best parameters"),
        ("--test", str, None, "questions that are scored once, at the end"),
        cli.WORLD,
        ("--max-new-tokens", cli.COUNT, 16, "longest answer"),
        ("--stop", str, None, "ends an answer; a newline for questions if not given, '' for none"),
        ("--eval-limit", cli.COUNT, 240, "dev questions scored along training; the end scores all"),
        ("--eval-tokens", cli.COUNT, 8192, "tokens in a batch of evaluation, options included"),
    )
    cli.add_training_flags(parser)
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
    if args.init and args.method == "fine_tuning":
        raise ValueError("--init: fine_tuning does not start from an adapter")
    cli.check_and_seed(args)
    method, _ = METHODS[args.method]
    return method(load_task(args, *load_lm(args)))


if __name__ == "__main__":
    cli.run_program("train.py", main)
