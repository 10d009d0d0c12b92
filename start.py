"""What training starts from, as the flags of train.py say: questions, a frozen LM, an adapter.

All of it is loaded, and refused if it does not fit, before training writes anything. Needs
adapters.py, recurse.py, runs.py and what these need.

    task = load_task(args, *load_lm(args))
    connector = start_connector(task)
"""

import argparse
import hashlib
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from show import show

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch import Tensor

import adapters
import data
import eval as metrics
import parallel
import recurse
import suite
import world
from checkpoints import hash_tensors, load_tokenizer, read_tensors, resolve
from filler import FILE, Filler
from int8 import quantize
from model import LM, Layers
from prompts import TaskPrompts
from questions import check_answers, check_length, check_targets, check_unique, hash_tokenizer
from runs import ASSETS, HASHES, Run, arguments, finished, names_file

SUITE = "suite"  # --train suite
SUITE_DEFAULTS = {"mixture_cap": 500, "max_new_tokens": 32}


@dataclass
class Task:
    """The frozen LM and the questions of each split, as text and as tokens."""

    args: argparse.Namespace
    lm: LM
    tokenizer: Tokenizer
    examples: dict[str, list[data.Example]]
    tokens: dict[str, list[data.TokenizedExample]]
    filler: Filler
    extra_hash: str = ""  # of passages and encoders


def load_task(args, lm: LM, tokenizer: Tokenizer, examples: dict | None = None) -> Task:
    """Tokenise the questions of each split: `examples`, or those of the files that the flags name.

    ValueError if a question does not fit the context, or if its answer cannot be given.
    """
    P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    if args.placement == "after_bos":
        if args.method != "prompt_tuning":
            raise ValueError(f"--placement after_bos: {args.method} cannot; only prompt_tuning can")
        P += 1  # BOS is read with the prompt
        tokenizer = recurse.without_bos(tokenizer)
    left = recurse.positions_left(vars(args), lm.config, P)  # for a question and its answer
    if left < 2:
        raise ValueError(f"--prompt-length {P} leaves {left} of the LM's context of {left + P}")
    if examples is None:
        examples = {split: load_split(args, split) for split in ("train", "dev", "test")}
    check_targets(tokenizer, examples["train"], lm.config.eos)
    for split in ("dev", "test"):
        stops = metrics.stops(examples[split], args.stop)
        check_answers(tokenizer, examples[split], lm.config.eos, stops, args.max_new_tokens)
    tokens, eos = {}, lm.config.eos[0] if lm.config.eos else None
    filler = Filler.of(vars(args), lm, tokenizer)
    if (folder := init_folder(args)) and (folder / FILE).is_file():
        filler = filler.load(folder, lm)
    vocab_size = filler.around(lm).config.vocab_size
    for split, part in examples.items():
        part = [replace(e, input=e.input + filler.text) for e in part]
        tokens[split] = data.tokenize(part, filler.tokenizer, eos, left, vocab_size)
    for split in ("dev", "test"):  # refuse before training what `predict` would refuse after it
        for example, question in zip(examples[split], tokens[split]):
            check_length(example, question.input, args.max_new_tokens, left)
    return Task(args, lm, tokenizer, examples, tokens, filler)


def load_lm(args) -> tuple[LM, Tokenizer]:
    """Load the LM, frozen, and its tokenizer. ValueError if --tokenizer does not belong to it."""
    folder = resolve(args.model or ASSETS / "lm")
    whole = args.method == "fine_tuning" or getattr(args, "tune", None) == "lm"
    bf16 = args.dtype == "bfloat16" and not whole
    dtype = torch.bfloat16 if bf16 else torch.float32
    shard = getattr(args, "shard", False)
    device = "cpu" if shard else args.device  # `parallel.shard` moves block by block
    lm = LM.from_pretrained(folder, device, dtype, choose_attention(args))
    if getattr(args, "base_dtype", None) == "int8":
        if whole:
            raise ValueError("--base-dtype int8: the LM itself is trained, which takes float32")
        quantize(lm)
    if args.compile:
        compile_steps(lm.layers)
    tokenizer = load_tokenizer(args.tokenizer or folder, lm.config.vocab_size)
    if args.tokenizer and (folder / "tokenizer.json").is_file():
        given, own = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
        if given != own:
            token = min(given.items() ^ own.items())[0]  # one that differs
            raise ValueError(
                f"--tokenizer {args.tokenizer} belongs to another LM: {token!r} is "
                f"{given.get(token)} there and {own.get(token)} in the LM's own tokenizer"
            )
    if shard:
        size = sum(p.numel() * p.element_size() for p in lm.parameters()) / 1e6
        part, count = parallel.shard(lm, args.device) / 1e6, parallel.count()
        show(f"frozen weights: {part:.2f} of {size:.2f} MB in each of {count} processes")
    return lm, tokenizer


def compile_steps(layers: Layers) -> None:
    """Compiles the passes of training steps. Without gradients the layers run as they are: decoding
    has too many shapes. A later copy of the layers would still run these."""
    plain, compiled = layers.forward, torch.compile(layers.forward, dynamic=True)

    def forward(*args, **more):
        return (compiled if torch.is_grad_enabled() else plain)(*args, **more)

    layers.forward = forward


def choose_attention(args):
    """The `attend` of LM.from_pretrained that --attention names; None is the LM's own."""
    if args.attention == "plain":
        return None
    if args.device != "cuda" or find_spec("triton") is None:
        raise ValueError("--attention fused needs --device cuda and triton (pip install triton)")
    import attention

    return attention.attend


def load_split(args, split: str) -> list[data.Example]:
    """Read --train, --dev or --test. If not given: the world's, or none if --train is given.

    The word suite stands for the tasks of suite.py, a folder for its files TASK-SPLIT.jsonl.
    """
    path = getattr(args, split) or (args.train if args.train == SUITE else None)
    if path == SUITE:
        place = world.make(args.world_seed)
        rows = [row for name in suite.TASKS for row in suite.rows(place, name, split)]
        return [data.parse_record(row, f"{row['task']} {row['id']}") for row in rows]
    if path and Path(path).is_dir():
        files = sorted(Path(path).glob(f"*-{split}.jsonl"))
        if not files:
            raise ValueError(f"--{split} {path}: holds no file TASK-{split}.jsonl")
        examples = [example for file in files for example in data.read(file)]
        check_unique(examples)
        return examples
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
    """The Connector that training starts from: that of --init or of assets/, or a random one.

    With more than two passes, a single Connector that is loaded starts every gap.
    """
    args, lm = task.args, task.lm
    folder = init_folder(args)
    if args.init not in (None, "random") and not folder:
        raise ValueError(f"--init {args.init} starts a prompt; {args.method} trains a Connector")
    if folder and folder.is_dir() and "passes" in adapters.read_adapter_config(folder):
        return set_residual(load_init(folder, args, lm, adapters.Connectors), args.residual)

    def new() -> adapters.Connector:
        if folder:
            return load_init(folder, args, lm, adapters.Connector)
        return recurse.new_connector(lm, args.method, args.connector_layers)

    show(f"the Connector starts from {folder or 'random weights'}")
    connector = recurse.make_connectors(args.passes, args.connectors == "shared", new)
    return set_residual(connector, args.residual)


def set_residual(connector: nn.Module, switch: str) -> nn.Module:
    """The same Connector or Connectors, residual if the flag --residual is on."""
    for part in connector.modules():
        if isinstance(part, adapters.Connector):
            part.residual = switch == "on"
    return connector


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
        table = lm.embed_tokens.weight
        start = lm.read(start.to(table.device, table.dtype))
    if args.init == "random":
        rng = torch.Generator().manual_seed(args.seed)
        start = adapters.random_like(start, generator=rng)
    return adapters.DeepPrompt(start, args.reparam_dim)


def start_generator(task: Task) -> adapters.PromptGenerator:
    """The prompt generator that training starts from: a stored one, or one that gives every text
    the prompt that --init describes."""
    args, lm, folder = task.args, task.lm, init_folder(task.args)
    encoder = recurse.load_encoder(t5_folder(args), task.tokenizer, args.device)
    if encoder.config.dim % 8:  # the heads of a CrossBlock
        width = f"its width {encoder.config.dim} is not a multiple of 8"
        raise ValueError(f"--encoder {t5_folder(args)}: {width}")
    if folder:
        generator = load_init(folder, args, lm, adapters.PromptGenerator, encoder)
        P = len(generator.start)
        if P != args.encoder_prompt:
            say = f"say so with --encoder-prompt {P}"
            raise ValueError(f"--init {folder} gives the encoder a prompt of {P}; {say}")
        return generator
    rng, table = torch.Generator().manual_seed(args.seed), encoder.embed_tokens.weight
    start = adapters.from_vocab(args.encoder_prompt, table, generator=rng).to(args.device)
    return adapters.PromptGenerator(encoder, start, start_vectors(task))


def t5_folder(args) -> Path:
    """The folder of the encoder of ID-PT. ValueError if it holds none."""
    folder = Path(args.encoder or ASSETS / "t5")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{'--encoder ' if args.encoder else ''}{folder}: holds no T5 encoder; "
            "`python pretrain.py encoder` makes one, and --encoder names its folder"
        )
    return folder


def start_vectors(task: Task) -> Tensor:
    """The vectors (P, C) that --init describes in words."""
    args, P = task.args, task.args.prompt_length
    table = parallel.whole(task.lm.embed_tokens.weight)
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
    population = text or "5000"
    if not population.isdecimal() or int(population) < 1:
        raise ValueError(f"--init {args.init}: vocab:SIZE samples the first SIZE tokens")
    return adapters.from_vocab(P, table, int(population), generator=rng)


def next_stage(task: Task, before: tuple | None) -> tuple[Task, adapters.SoftPrompt]:
    """The task with filler of its own, and the prompt: what a stage starts from.

    They are copies of (prompt, filler) of the stage `before`, if there is one and no --init.
    """
    if before is None or task.args.init:
        return replace(task, filler=task.filler.copy()), start_prompt(task)
    prompt, filler = before
    task = replace(task, filler=filler.copy())
    return task, adapters.SoftPrompt(prompt.vectors).to(task.args.device)


def hashes(task: Task, trained: nn.Module | None) -> dict[str, str | None]:
    """What identifies the data, their tokens, the frozen models, and what training starts from."""
    folder, adapter, encoder = init_folder(task.args), None, None
    if folder:
        files = folder / "adapter_model.safetensors", folder / FILE
        parts = map(read_tensors, files if files[1].is_file() else files[:1])
        adapter = hash_tensors({name: t for part in parts for name, t in part.items()})
    if isinstance(trained, TaskPrompts):
        trained = trained.prompts[0]
    if isinstance(trained, adapters.PromptGenerator):
        encoder = hash_tensors(trained.encoder[0].state_dict())
    texts, tokens = (repr(sorted(part.items())) for part in (task.examples, task.tokens))
    templates = repr([e.template for e in task.examples["train"]])  # no part of an example's repr
    return {
        "data_hash": sha256(texts + task.extra_hash),
        "templates_hash": sha256(templates) if task.args.mixture_cap else None,
        "tokens_hash": sha256(tokens),
        "tokenizer_hash": hash_tokenizer(task.tokenizer),
        "eos": list(task.lm.config.eos),
        "fingerprint": task.lm.fingerprint(),
        "init_hash": adapter,
        "encoder_hash": encoder,
    }


def sha256(text: str) -> str:
    """The hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


STAGE_FREE = ("candidates", "rounds", "no_cross_fit", "eval_tokens")  # flags that p1 does not need


def finished_stage(args, hashes: dict) -> Path | None:
    """The folder in the run --stages-from of the same stage as args.out, such as p1-a.

    None if that run has not finished this stage. ValueError if it was trained on other questions,
    on another LM, or with other flags, except those of STAGE_FREE.
    """
    folder = Path(args.stages_from) / Path(args.out).name
    record = finished(folder)
    if record is None:
        return None
    same = {key: record["arguments"][key] for key in STAGE_FREE if key in record["arguments"]}
    own = argparse.Namespace(**vars(args) | same)
    Run(folder, arguments(own), resume=True).check()
    for key, what in HASHES.items():
        if record.get(key) != hashes.get(key):
            raise ValueError(f"--stages-from: {folder} was trained {what} (its {key} differs)")
    return folder


def take_stage(args, hashes: dict) -> None:
    """Copy the stage args.out from --stages-from, if it is of the first round and not begun."""
    folder = Path(args.out)
    wanted = args.stages_from and folder.name.startswith("p1") and not folder.exists()
    if wanted and parallel.first() and (source := finished_stage(args, hashes)):
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # a kill may have left one
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        unfinished.rename(folder)
    parallel.wait()


SIZES = {  # kind of adapter: (the attribute whose length is its size, the flag of the size)
    adapters.SoftPrompt: ("vectors", "prompt_length"),
    adapters.DeepPrompt: ("keys_values", "prompt_length"),
    adapters.PromptGenerator: ("queries", "prompt_length"),
    adapters.Connector: ("layers", "connector_layers"),
}


def load_init(init: Path, args, lm: LM, kind: type | tuple[type, ...], encoder=None) -> nn.Module:
    """Load the adapter in folder `init`. ValueError if it is not of `kind`, or was trained for
    another method, number of passes or size than the flags say. --residual may be another."""
    method = args.method
    if not init.is_dir():
        raise ValueError(f"--init {init} is no adapter's folder, and no way to start {method}")
    adapter = adapters.load_adapter(init, lm, encoder)
    name = type(adapter).__name__
    if not isinstance(adapter, kind):
        raise ValueError(f"--init {init} holds a {name}, which {method} does not train")
    made_for = adapters.read_adapter_config(init).get("method", method)
    if kind in (adapters.Connector, adapters.Connectors) and made_for != method:
        raise ValueError(
            f"--init {init} was trained for {made_for}, where the Connector stands "
            f"elsewhere than in {method}"
        )
    if kind is adapters.Connectors:
        between = "shared" if len(adapter) == 1 else "each"
        if (adapter.passes, between) != (args.passes, args.connectors):
            raise ValueError(
                f"--init {init} was trained for other passes; say so with --passes "
                f"{adapter.passes} --connectors {between}"
            )
    one = adapter[0] if kind is adapters.Connectors else adapter
    part, flag = SIZES[type(one)]
    size = len(getattr(one, part))
    if size != getattr(args, flag):
        flag = f"--{flag.replace('_', '-')} {size}"
        raise ValueError(f"--init {init} holds a {name} of {size}; say so with {flag}")
    return adapter


def template_rates(examples: list[data.Example], cap: int) -> tuple[list[list[int]], list[int]]:
    """How T0 mixes tasks: (the rows of each template, how many of them an epoch has).

    An epoch has all examples of a template, or if they are more than `cap`, `cap` divided by the
    number of templates of its task (Levine et al. 2022, section 2.2, and T0: cap 500,000).
    """
    groups = {}
    for row, example in enumerate(examples):
        groups.setdefault((example.task, example.template), []).append(row)
    templates = Counter(task for task, _ in groups)
    counts = [
        len(rows) if len(rows) <= cap else max(1, cap // templates[task])
        for (task, _), rows in groups.items()
    ]
    return list(groups.values()), counts


@lru_cache(maxsize=2)
def epoch_samples(sizes: tuple, counts: tuple, seed: int, epoch: int) -> list[list[int]]:
    """The counts[i] of sizes[i] examples of each group i that an epoch has."""
    pairs = enumerate(zip(sizes, counts))
    return [data.sample(size, count, [seed, epoch, i]) for i, (size, count) in pairs]


def mixture_batch(tokens: list, groups, counts, size: int, seed: int, step: int) -> data.Batch:
    """The batch of a step over groups of rows of `tokens`, a pure function of the arguments.

    An epoch holds counts[i] examples of group i, sampled anew in every epoch. The `rows` of the
    batch are those of `tokens`.
    """
    epoch = step // -(-sum(counts) // size)
    drawn = epoch_samples(tuple(map(len, groups)), tuple(counts), seed, epoch)
    pool = [rows[i] for rows, sample in zip(groups, drawn) for i in sample]
    batch = data.batches([tokens[row] for row in pool], size, seed, step)
    return replace(batch, rows=[pool[row] for row in batch.rows])
