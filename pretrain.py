"""Train from text: an LM, a T5 encoder or a BERT, or the first weights of a Connector.

    python pretrain.py lm          next-token prediction; a new tokenizer too, if none is given
    python pretrain.py encoder     span corruption (Raffel et al. 2020)
    python pretrain.py bert        masked language modelling (Devlin et al. 2019)
    python pretrain.py connector   next-token prediction through a frozen LM and the Connector
                                   (Levine et al. 2022, section 4.2: up to 3 % of the LM's text)
    python pretrain.py prompt      next-token prediction behind a soft prompt, so that prompt tuning
                                   can have the same pretraining (Levine et al. 2022, table 6)

The text is --train, or the documents of the embedded world. A run leaves the folder that runs.py
describes. The first three leave model/ in it, in the published format. The others leave an adapter,
which train.py takes as --init. assets/README.md has the commands that made the embedded models,
with their time and loss.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from show import Parser, run_program

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import adapters
import cli
import data
import genres
import parallel
import recurse
import start
import world
from checkpoints import load_tokenizer, resolve
from corpus import hash_tokens, split, token_file
from fit import Recipe, fit, target_loss
from model import LM, Config
from questions import hash_tokenizer
from rerank import Bert, BertConfig, token_type_ids
from runs import ASSETS, Run, arguments, finish_record, start_record
from t5 import T5Config, T5Encoder

# The objectives


def pretrain_lm(args) -> dict:
    """Train an LM to predict the next token of the text."""
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        some = islice(load_texts(args), 50_000)  # enough text
        tokenizer = data.train_tokenizer(some, args.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    text = tokenize_corpus(args, tokenizer, vocab_size)
    # The special tokens around a document. The first is BOS and the last EOS, often the same one.
    ends = tokenizer.encode("").ids
    bos, eos = (ends[0], (ends[-1],)) if ends else (None, ())
    lm = LM(decoder_config(args, vocab_size, args.layers, args.context, bos, eos)).to(args.device)

    def save() -> None:
        lm.save(Path(args.out) / "model", torch.bfloat16, tokenizer, replace=True)

    return train_on_text(args, text, lm, partial(target_loss, lm, None), save, args.context)


def pretrain_encoder(args) -> dict:
    """Train a T5 encoder to encode a text with missing spans, so that a decoder can write them.

    The decoder reads the encoded text as a prefix. It is small, and thrown away at the end.
    """
    tokenizer, sentinels = encoder_tokenizer(args, [f"<extra_id_{i}>" for i in range(32)])
    V, D = tokenizer.get_vocab_size(), args.dim // args.heads
    text = tokenize_corpus(args, tokenizer, V)
    encoder = T5Encoder(T5Config(V, args.dim, args.layers, args.heads, D, mlp_width(args)))
    decoder = LM(decoder_config(args, V, layers=2, context=2 * args.seq_len))  # encoded and new
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(args.device)

    def loss_of(batch: data.Batch) -> Tensor:
        prefix = decoder.read(encoder(encoder.embed(batch.ids)))
        inputs = F.pad(batch.targets[:, :-1], (1, 0))  # token 0 starts what the decoder writes
        logits = decoder.logits(decoder(decoder.embed(inputs), prefix))
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")

    def corrupt(batch: data.Batch, seed: int, step: int) -> data.Batch:
        return corrupt_spans(batch, sentinels, seed, step)

    save = partial(save_encoder, args, encoder, tokenizer)
    return train_on_text(args, text, both, loss_of, save, args.seq_len, corrupt=corrupt)


def pretrain_bert(args) -> dict:
    """Train a BERT to predict masked tokens of [CLS] first part [SEP] rest."""
    names = ["[CLS]", "[SEP]", "[MASK]"]
    tokenizer, ids = encoder_tokenizer(args, names)
    V, C = tokenizer.get_vocab_size(), args.dim
    text = tokenize_corpus(args, tokenizer, V)
    bert = Bert(BertConfig(V, C, args.layers, args.heads, 4 * C, args.context))
    head = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.LayerNorm(C))  # before the output layer
    both = nn.ModuleDict({"bert": bert, "head": head}).to(args.device)
    special = dict(zip(names, ids))
    # Random tokens are below the special ones that were added. Of a tokenizer that had its own,
    # which may be its first tokens, any may be drawn, as in the paper.
    words = V - len(ids) if min(ids) == V - len(ids) else V

    def loss_of(batch: data.Batch) -> Tensor:
        target_mask = batch.targets != data.IGNORE_INDEX
        types = token_type_ids(batch.ids, special["[SEP]"])
        h = head(bert(batch.ids, token_type_ids=types)[target_mask])
        logits = F.linear(h, bert.word_embeddings.weight).float()  # tied, as in the paper
        return F.cross_entropy(logits, batch.targets[target_mask], reduction="sum")

    def corrupt(batch: data.Batch, seed: int, step: int) -> data.Batch:
        return mask_tokens(batch, special, words, seed, step)

    save = partial(save_encoder, args, bert, tokenizer)
    longest = args.context - 2  # [CLS] and [SEP] come to the text
    return train_on_text(args, text, both, loss_of, save, longest, corrupt=corrupt)


def pretrain_connector(args) -> dict:
    """Train a Connector to predict the next token from its place before, after or between LMs.

    Its output takes the place of its input, as in the paper. In train.py --residual says.
    """
    lm, tokenizer = start.load_lm(args)
    text = tokenize_corpus(args, tokenizer, lm.config.vocab_size)

    def new() -> adapters.Connector:
        return recurse.new_connector(lm, args.composition, args.connector_layers)

    connector = recurse.make_connectors(args.passes, args.connectors == "shared", new)
    return train_adapter_on_text(args, text, lm, connector, lm.config.max_len)


def pretrain_prompt(args) -> dict:
    """Train a soft prompt to predict the next token of the text that follows it."""
    lm, tokenizer = start.load_lm(args)
    P, longest = args.prompt_length, lm.config.max_len - args.prompt_length
    if longest < 2:
        raise ValueError(
            f"--prompt-length {P} leaves {longest} of the LM's context of {lm.config.max_len}"
        )
    text = tokenize_corpus(args, tokenizer, lm.config.vocab_size)
    rng = torch.Generator().manual_seed(args.seed)
    vectors = adapters.from_vocab(P, lm.embed_tokens.weight, generator=rng)
    prompt = adapters.SoftPrompt(vectors).to(args.device)
    return train_adapter_on_text(args, text, lm, prompt, longest)


def train_adapter_on_text(args, text: "Text", lm: LM, adapter: nn.Module, longest: int) -> dict:
    """Train what stands around a frozen LM, which --composition says, to predict the next token."""

    def loss_of(batch: data.Batch) -> Tensor:
        model, prefix = recurse.COMPOSITIONS[args.composition](lm, adapter)
        return target_loss(model, prefix, batch)

    def save() -> None:
        base = arguments(args)["model"]
        info = {"method": args.composition, "base_model_name_or_path": base}
        adapters.save_adapter(args.out, adapter, lm, torch.bfloat16, **info)

    return train_on_text(args, text, adapter, loss_of, save, longest, frozen=lm)


OBJECTIVES = {  # objective: (function, defaults of its flags)
    "lm": (
        pretrain_lm,
        {"steps": 4600, "lr": 5e-3, "warmup": 0.03, "optimizer": "muon", "eval_every": 300}
        | {"batch_size": 8, "seq_len": 512, "documents": 360_000},
    ),
    "encoder": (
        pretrain_encoder,
        {"steps": 2600, "lr": 5e-3, "warmup": 0.02, "optimizer": "muon", "eval_every": 250}
        | {"dim": 128, "layers": 4, "heads": 4},
    ),
    "bert": (
        pretrain_bert,
        {"steps": 2600, "lr": 5e-3, "warmup": 0.05, "optimizer": "muon", "eval_every": 250}
        | {"dim": 160, "layers": 3, "heads": 5},
    ),
    "connector": (
        pretrain_connector,
        {"steps": 700, "lr": 4e-3, "warmup": 0.03, "optimizer": "muon", "eval_every": 100}
        | {"batch_size": 8, "seq_len": 256, "documents": 60_000},
    ),
    "prompt": (
        pretrain_prompt,
        {"steps": 800, "lr": 0.1, "schedule": "constant", "weight_decay": 0.0, "batch_size": 16}
        | {"composition": "prompt_tuning"},
    ),
}


# The tasks of BERT and T5


def mask_tokens(
    batch: data.Batch, special: dict[str, int], vocab_size: int, seed: int, step: int, fraction=0.15
) -> data.Batch:
    """Turn windows of text into BERT's masked language modelling (Devlin et al. 2019, 3.1).

    A row becomes [CLS] beginning [SEP] rest, cut at a random place. `fraction` of the text's tokens
    become prediction targets. The model reads 80 % of these as [MASK], 10 % as a random token below
    `vocab_size`, and 10 % unchanged. `special` holds the ids of "[CLS]", "[SEP]" and "[MASK]".
    """
    rng, (B, T) = np.random.default_rng([seed, step]), batch.ids.shape
    cls, sep, mask = [special["[CLS]"]], [special["[SEP]"]], special["[MASK]"]
    rows = zip(batch.ids.numpy(), rng.integers(1, T, B))
    whole = np.stack([np.concatenate([cls, row[:cut], sep, row[cut:]]) for row, cut in rows])
    u = rng.random(whole.shape) / fraction  # below 1 with probability `fraction`: a target
    u = np.where(np.isin(whole, list(special.values())), 1.0, u)
    random_tokens = rng.integers(0, vocab_size, whole.shape)
    ids = np.where(u < 0.8, mask, np.where(u < 0.9, random_tokens, whole))
    targets = np.where(u < 1, whole, data.IGNORE_INDEX)
    lengths = torch.full((B,), T + 2)
    return data.Batch(torch.from_numpy(ids), lengths, torch.from_numpy(targets), batch.rows)


def corrupt_spans(
    batch: data.Batch, sentinels: list[int], seed: int, step: int, fraction=0.15, mean_length=3.0
) -> data.Batch:
    """Turn windows of text into T5's span corruption (Raffel et al. 2020, section 3.1.4).

    Spans of `mean_length` tokens on average, `fraction` of the text in total, are each replaced by
    a sentinel. The targets are a text of their own: sentinel, span, sentinel, span, ..., sentinel.
    """
    rng, (B, T) = np.random.default_rng([seed, step]), batch.ids.shape
    removed = max(1, round(T * fraction))
    count = min(max(1, round(removed / mean_length)), T - removed, len(sentinels) - 1)
    inputs, targets = [], []
    for row in batch.ids.numpy():
        lengths = [_random_lengths(rng, total, count) for total in (T - removed, removed)]
        ends = np.cumsum(np.stack(lengths, 1).ravel())
        parts = np.split(row, ends[:-1])  # kept, span, kept, span, ...
        input, target = [], []
        for kept, span, sentinel in zip(parts[::2], parts[1::2], sentinels):
            input += [kept, [sentinel]]
            target += [[sentinel], span]
        inputs.append(np.concatenate(input))
        targets.append(np.concatenate([*target, [sentinels[count]]]))
    ids, targets = torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))
    return data.Batch(ids, torch.full((B,), ids.shape[1]), targets, batch.rows)


def _random_lengths(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draw `count` whole numbers of at least 1 that sum to `total`, uniformly over such lists."""
    ends = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(ends, prepend=0, append=total)


# What they share


def decoder_config(args, vocab_size: int, layers: int, context: int, bos=None, eos=()) -> Config:
    """The shape of a decoder with the width, heads and MLP that the flags give."""
    return Config(
        vocab_size=vocab_size,
        dim=args.dim,
        n_layers=layers,
        n_heads=args.heads,
        n_kv_heads=args.heads,
        head_dim=args.dim // args.heads,
        hidden_dim=mlp_width(args),
        max_len=context,
        bos=bos,
        eos=eos,
    )


def mlp_width(args) -> int:
    """--hidden, or 8/3 of --dim in multiples of 32.

    A gated MLP of that width has as many weights as a plain one of four times --dim.
    """
    return args.hidden or max(32, round(args.dim * 8 / 3 / 32) * 32)


def encoder_tokenizer(args, names: list[str]) -> tuple[Tokenizer, list[int]]:
    """The LM's tokenizer with the special tokens `names` added, and their ids.

    An encoder and the LM then agree on the tokens of every text.
    """
    tokenizer = load_tokenizer(args.tokenizer or resolve(args.model or ASSETS / "lm"))
    tokenizer.add_special_tokens(names)
    return tokenizer, [tokenizer.token_to_id(name) for name in names]


def save_encoder(args, encoder: T5Encoder | Bert, tokenizer: Tokenizer) -> None:
    """Write the encoder, in bf16, and its tokenizer as a published checkpoint."""
    folder = Path(args.out) / "model"
    encoder.save(folder, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))


def load_texts(args) -> Iterator[str]:
    """The documents of --train, or of the embedded world, one at a time."""
    if args.train:
        return data.read_texts(args.train)
    documents = genres.documents(world.make(args.world_seed), args.documents, args.seed)
    return (document["text"] for document in documents)


@dataclass
class Text:
    """The tokens to train on, and those of other documents that measure the loss."""

    tokenizer: Tokenizer
    train: data.Corpus
    held_out: data.Corpus


def tokenize_corpus(args, tokenizer: Tokenizer, vocab_size: int) -> Text:
    """Tokenise the documents. Held out are those of --dev, or the last two percent.

    Tokens of files are kept in a folder beside --out. ValueError if a token is not below
    `vocab_size`, the rows of the embedding table.
    """
    folder = Path(args.out).parent / "tokens"
    if args.train:
        train = token_file(args.train, tokenizer, vocab_size, folder)
    else:
        train = data.encode_texts(load_texts(args), tokenizer, vocab_size)
    if args.dev:
        return Text(tokenizer, train, token_file(args.dev, tokenizer, vocab_size, folder))
    documents = len(train.starts) - 1
    if documents < 2:
        raise ValueError(
            f"{args.train}: holds one document; separate documents with blank lines, or name "
            "held-out text with --dev"
        )
    return Text(tokenizer, *split(train, max(1, documents // 50)))


def train_on_text(
    args, text: Text, trained: nn.Module, loss_of, save, longest: int, frozen=None, corrupt=None
) -> dict:
    """Train on windows of the text. The score is minus the mean loss on held-out text, in nats.

    loss_of   Batch -> loss summed over its targets
    save      () -> None writes what is trained
    longest   the longest window that fits the model's context
    frozen    the LM that must not change, if there is one
    corrupt   (Batch, seed, step) -> Batch, if the task is not to predict the next token

    Returns the record, which run.json holds too.
    """
    held_out_batches = (len(text.held_out.tokens) - 1) // args.seq_len // args.batch_size

    def make_batch(corpus: data.Corpus, seed: int, step: int) -> data.Batch:
        batch = data.windows(corpus, args.batch_size, args.seq_len, seed, step)
        return batch if corrupt is None else corrupt(batch, seed, step)

    def evaluate() -> float:
        trained.eval()
        batches = [make_batch(text.held_out, 0, i).to(args.device) for i in range(held_out_batches)]
        losses = parallel.divide(lambda part: [loss_of(batch).item() for batch in part], batches)
        targets = sum(int((batch.targets != data.IGNORE_INDEX).sum()) for batch in batches)
        trained.train()
        return -sum(losses) / targets

    if args.seq_len > longest:
        raise ValueError(f"--seq-len {args.seq_len} exceeds the {longest} that the model can read")
    if held_out_batches < 1:
        raise ValueError(
            f"the held-out text has {len(text.held_out.tokens)} tokens, too few for a batch of "
            f"{args.batch_size} windows of {args.seq_len}"
        )
    make_batch(text.train, args.seed, 0)  # refuses too little text before anything is written
    digest, run = hash_tokens([text.train, text.held_out]), Run.from_args(args)
    hashes = {"data_hash": digest, "tokens_hash": digest, "init_hash": None}
    hashes["tokenizer_hash"] = hash_tokenizer(text.tokenizer)
    hashes["eos"] = list(frozen.config.eos) if frozen else None
    hashes["fingerprint"] = frozen.fingerprint() if frozen else None
    with run:
        record = start_record(run, trained, frozen, hashes)
        record |= fit(
            run,
            Recipe.from_args(args),
            trained.train(),
            lambda step: make_batch(text.train, args.seed, step),
            loss_of,
            evaluate,
            save,
        )
        loss = -record["score"]
        perplexity = math.exp(min(loss, 700))  # exp overflows above 709
        return finish_record(run, record, frozen, {"dev": {"loss": loss, "perplexity": perplexity}})


# The command line


def parse(argv: list[str], program: str = "pretrain.py") -> argparse.Namespace:
    """Parse the objective and its flags. A bad flag exits with status 2."""
    shape = [
        ("--dim", cli.COUNT, 192, "C, the model's width"),
        ("--layers", cli.COUNT, 6, "number of layers"),
        ("--heads", cli.COUNT, 6, "attention heads"),
    ]
    hidden = ("--hidden", cli.COUNT, None, "width of the MLP; 8/3 of --dim if not given")
    context = ("--context", cli.number_type(int, 8), 512, "positions that the model is made for")
    vocab = ("--vocab-size", cli.number_type(int, 257, 10**6), 3072, "of the new tokenizer")
    uses = list(recurse.CONNECTOR_METHODS)
    use = ("--composition", uses, "neural_recursion", "what the Connector is pretrained for")
    model_flags = {
        "lm": [cli.TOKENIZER, *shape, hidden, context, vocab],
        "encoder": [cli.MODEL, cli.TOKENIZER, *shape, hidden],
        "bert": [cli.MODEL, cli.TOKENIZER, *shape, context],
        "connector": [cli.MODEL, cli.TOKENIZER, use, cli.CONNECTOR, cli.PASSES, cli.CONNECTORS]
        + [cli.BASE_DTYPE, cli.ATTENTION],
        "prompt": [cli.MODEL, cli.TOKENIZER, cli.PROMPT, cli.BASE_DTYPE, cli.ATTENTION],
    }
    data_flags = [
        ("--train", str, None, "text: .txt or JSONL; the embedded world's if not given"),
        ("--dev", str, None, "held-out text; the last 2 %% of the documents if not given"),
        cli.WORLD,
        ("--documents", cli.COUNT, 120_000, "documents of the embedded world"),
        ("--seq-len", cli.number_type(int, 2), 128, "tokens in a window of text"),
    ]
    parser = Parser(prog=program, description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="objective", required=True)
    for name, (objective, defaults) in OBJECTIVES.items():
        summary = objective.__doc__.split("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        cli.add_flags(command, "model", *model_flags[name])
        cli.add_flags(command, "data", *data_flags)
        cli.add_training_flags(command)
        cli.add_run_flags(command)
        command.set_defaults(method=f"pretrain_{name}", **defaults)
    args = cli.add_late_defaults(parser.parse_args(argv), program, argv)
    del args.objective  # the method says it
    return args


def main(argv: list[str] | None = None) -> dict:
    """Run one objective. Returns the record, which run.json holds too."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if getattr(args, "passes", 2) > 2 and args.composition != "neural_recursion":
        raise ValueError(f"--passes {args.passes}: only neural_recursion has more than two passes")
    if "dim" in args:
        dim, heads = args.dim, args.heads
        if dim % heads:
            raise ValueError(f"--dim {dim} is not a multiple of --heads {heads}")
        if dim // heads % 2:
            raise ValueError(f"--dim {dim} / --heads {heads} is odd; heads need an even width")
    cli.check_and_seed(args)
    objective, _ = OBJECTIVES[args.method.removeprefix("pretrain_")]
    return objective(args)


if __name__ == "__main__":
    run_program("pretrain.py", main, resumes=True)
