"""What a run will need, before anything is loaded: memory, and operations.

    python bench.py plan --method neural_recursion --model EleutherAI/pythia-1b

It takes the flags of train.py. The weights are counted from config.json (with --method id_pt, those
of the encoder too), the lengths are those of the questions that the flags name. --seq-len assumes a
length instead, of a question with its answer; --text makes every token a target, as in
pretrain.py connector. In textual recursion the texts are longer by the candidates.
"""

import argparse
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from show import Parser, show

import torch

import cli
import recurse
import start
import train
from adapters import Connector, PromptGenerator, SoftPrompt
from checkpoints import HUB_FILES, load_tokenizer, read_config, resolve, skip_init
from families import t5_from_hf
from fit import Recipe, linear_weights, make_optimizer
from model import LM, Config
from runs import ASSETS
from t5 import T5Config, T5Encoder


@dataclass
class Lengths:
    """The longest of what a run reads, in tokens, and the fewest answer choices of a question."""

    text: int  # of a training text: a question, with its candidates, and its answer
    targets: int  # of a training text
    asked: int  # of a training question, without candidates
    question: int
    new: int  # after a question: new tokens, or those of its longest option
    options: int
    kept: int  # positions of the first pass that are computed once and kept


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of train.py, and with them --seq-len and --text."""
    first = Parser(prog="bench.py plan", add_help=False)
    first.add_argument("--seq-len", type=cli.COUNT)  # of a question and its answer
    first.add_argument("--text", action="store_true")  # every token is a target, as in pretraining
    more, rest = first.parse_known_args(argv)
    args = train.parse(rest, "bench.py plan")
    args.seq_len, args.text = more.seq_len, more.text
    if args.text and args.seq_len is None:
        args.seq_len = 128  # as in pretrain.py
    return args


def read_lengths(args: argparse.Namespace, lm: LM, folder: str | Path) -> Lengths:
    """The lengths that --seq-len assumes, or else those of the questions of the run."""
    if args.seq_len:
        T, new = args.seq_len, args.max_new_tokens
        return Lengths(T, T if args.text else min(T, new), T, T, new, 0, 0)
    files = [name for name in HUB_FILES if "safetensors" not in name]
    tokenizer = load_tokenizer(args.tokenizer or resolve(folder, files), lm.config.vocab_size)
    task = start.load_task(args, lm, tokenizer)
    tokens, first_pass = task.tokens, train.first_pass(task)
    asked = [e for split in ("dev", "test") for e in tokens[split]]
    ends = [max(map(len, e.options), default=args.max_new_tokens) for e in asked]
    return Lengths(
        text=max(len(e.input) + len(e.target) - 1 for e in tokens["train"]),
        targets=max(len(e.target) for e in tokens["train"]),
        asked=max(len(e.input) for e in tokens["train"]),
        question=max((len(e.input) for e in asked), default=0),
        new=max(ends, default=0),
        options=min((len(e.options) for e in asked), default=0),
        kept=0 if first_pass is None else first_pass.positions,
    )


def add_candidates(args: argparse.Namespace, c: Config, lengths: Lengths) -> Lengths:
    """The lengths if every question holds as many candidates as there can be.

    A candidate has --max-new-tokens tokens and a separator. Those that exceed the context are left
    out (textual.with_candidates).
    """
    longer = args.candidates * (args.max_new_tokens + 1) + 4  # "Candidates: " and the line's end
    left = c.max_len - args.prompt_length
    text = max(lengths.text, min(left, lengths.text + longer))
    question = min(left - lengths.new + 1, lengths.question + longer)
    question = max(lengths.question, question if lengths.question else 0)
    return replace(lengths, text=text, question=question)


def read_encoder(args: argparse.Namespace) -> T5Config:
    """The shape of the encoder of ID-PT, from its config.json. ValueError if it is not there."""
    path = Path(args.encoder or ASSETS / "t5") / "config.json"
    if not path.is_file():
        raise ValueError("--encoder: needs the folder of a T5 encoder, which has a config.json")
    return T5Config(**t5_from_hf(path))


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
    folder = args.model or ASSETS / "lm"
    config = Config(**read_config(resolve(folder, ["config.json"])))
    e = read_encoder(args) if args.method == "id_pt" else None
    with torch.device("meta"), skip_init():
        lm = LM(config)
        encoder = T5Encoder(e) if e else None
        module = planned(args, lm, encoder)
    lengths = asked = read_lengths(args, lm, folder)
    if args.method == "textual_recursion":
        lengths = add_candidates(args, config, asked)
    trained = count(module.parameters())
    frozen = 0 if args.method == "fine_tuning" else count(lm.parameters())
    size = 2 if args.dtype == "bfloat16" else 4  # what is trained is in float32 all the same
    step = {"its gradients": 4 * trained} | step_memory(args, config, lengths, size)
    if encoder:
        step["encoder, generator"] = 4 * generator_values(args, e, lengths)
    evaluation = evaluation_memory(args, config, lengths, size)
    if args.method == "textual_recursion":
        evaluation = max(evaluation, sampling_memory(args, config, lengths, size))
    table = {
        "frozen weights": size * frozen,
        "frozen encoder": 4 * count(encoder.parameters()) if encoder else 0,
        "trained": 4 * trained,
        "the best so far": 4 * trained,
        f"optimiser ({args.optimizer})": optimizer_memory(args.optimizer, module),
        **step,
        "evaluation beyond this": max(0, evaluation - sum(step.values())),
    }
    if not encoder:
        del table["frozen encoder"]
    if lengths.kept:
        table["first pass, kept"] = size * config.dim * lengths.kept
    if args.device == "cpu":
        recipe = Recipe(steps=1, lr=1.0, optimizer=args.optimizer)
        make_optimizer(torch.nn.Linear(1, 1), recipe)  # torch imports more for it
        table["Python and libraries"] = memory("VmRSS")  # this process has loaded the same ones
        # malloc keeps freed blocks: 0.2 to 0.65 of the others, in runs that were measured.
        table["allocator, about"] = max(sum(step.values()), evaluation) // 2
    line = f"{args.method}: {trained:,} parameters trained, {frozen:,} frozen; "
    line += f"{args.batch_size} texts of at most {lengths.text} tokens, {args.dtype}"
    return table, count_operations(args, config, e, lengths), line


def count(parameters: Iterable[torch.Tensor]) -> int:
    """The number of entries of all parameters."""
    return sum(p.numel() for p in parameters)


def optimizer_memory(optimizer: str, trained: torch.nn.Module) -> int:
    """Bytes of the moments: two of each entry with AdamW, one with Adafactor or Muon."""
    entries, linear = count(trained.parameters()), count(linear_weights(trained))
    moments = {"adamw": 2 * entries, "adafactor": entries, "muon": 2 * entries - linear}
    return 4 * moments[optimizer]


def planned(args, lm: LM, encoder: T5Encoder | None = None) -> torch.nn.Module:
    """What the method trains, or as many parameters."""
    parts = torch.nn.ModuleList()
    if args.method == "deep_prompt":
        parts.append(SoftPrompt(torch.empty(deep_parameters(args, lm.config), 1)))
    elif args.method == "id_pt":
        begin = torch.empty(args.encoder_prompt, encoder.config.dim)
        parts.append(PromptGenerator(encoder, begin, args.prompt_length, lm.config.dim))
    elif args.method in recurse.PROMPT_METHODS:
        parts.append(SoftPrompt(torch.empty(args.prompt_length, lm.config.dim)))
    elif args.method == "fine_tuning":
        parts.append(lm)
    elif args.method != "training_free":
        gaps = args.passes - 1 if args.connectors == "each" else 1
        parts.extend(Connector(lm.new_layers(args.connector_layers)) for _ in range(gaps))
    return parts


def deep_parameters(args, c: Config) -> int:
    """Count what a deep prompt trains."""
    P, width = args.prompt_length, c.n_kv_heads * c.head_dim
    if args.reparam_dim is None:
        return P * 2 * c.n_layers * width
    mlp = (width + 1) * args.reparam_dim + (args.reparam_dim + 1) * 2 * c.n_layers * width
    return P * width + mlp


# Memory


def step_memory(args, c: Config, lengths: Lengths, size: int) -> dict[str, int]:
    """What a training step holds beside the gradients."""
    trained_layers, frozen_layers = args.connector_layers, c.n_layers
    tokens = args.batch_size * lengths.text
    if args.method in recurse.PROMPT_METHODS:
        trained_layers = 0
    if args.method in ("prompt_tuning", "textual_recursion"):
        tokens += args.prompt_length  # read once per batch
    elif args.method == "id_pt":
        tokens += args.batch_size * args.prompt_length  # each text has its own
    elif args.method == "fine_tuning":
        trained_layers, frozen_layers = c.n_layers, 0
    elif args.method == "lm_connector":  # the gradient ends in the Connector
        frozen_layers = 0
    elif args.method == "training_free":  # no step
        return {}
    elif args.method == "neural_recursion":  # the first pass keeps nothing
        trained_layers *= args.passes - 1
        frozen_layers *= args.passes - 1
    kept = trained_layers * activations(c, trained=True)
    kept += frozen_layers * activations(c, trained=False)
    targets = args.batch_size * lengths.targets
    held = size * tokens * kept
    if args.method == "id_pt":  # keys and values of each prompt, joined with those of its text
        key = c.n_kv_heads * c.head_dim
        held += size * args.batch_size * args.prompt_length * 2 * key * c.n_layers
    return {
        "activations": held,
        "logits": 3 * 4 * targets * c.vocab_size,  # with log softmax and gradient
    }


def generator_values(args, e: T5Config, lengths: Lengths) -> int:
    """Count the values that the encoder and the generator of ID-PT leave for the backward pass.

    The encoder is frozen. Its prompt is trained, so the gradient goes through all of it.
    """
    query, B, P = e.n_heads * e.head_dim, args.batch_size, args.prompt_length
    L = args.encoder_prompt + lengths.asked  # about as many tokens as the LM's
    layer = 2 * e.dim + 4 * query  # inputs of the norms; q, k, v and attention's output
    layer += e.hidden_dim * (3 if e.gated else 1)
    bias = e.n_heads * L * L  # on the scores of a row, and its mask; the layers share it
    # A block of the generator: inputs of two norms and of q, k, v and o; q, k, v; the MLP.
    block = 8 * e.dim + 8 * e.dim
    return B * (L * (e.n_layers * layer + 5 * e.dim) + bias + 3 * P * block)


def sampling_memory(args, c: Config, lengths: Lengths, size: int) -> int:
    """What a batch of samples holds if no two of a question agree: each then has its own cache."""
    question = max(lengths.question, lengths.text - lengths.targets)
    length = args.prompt_length + question + args.max_new_tokens
    cache = 2 * c.n_kv_heads * c.head_dim * c.n_layers * size
    questions = max(1, args.eval_tokens // (args.candidates * length))  # as in recurse.candidates
    rows = questions * args.candidates
    held = 2 * rows * length * cache  # before and after a row ends
    return held + (4 + 8) * rows * c.vocab_size  # log-probabilities, and their sums in float64


def evaluation_memory(args, c: Config, lengths: Lengths, size: int) -> int:
    """What a batch of questions holds: in all its rows at most --eval-tokens positions."""
    if args.text or not lengths.question:  # a loss without gradients, or nothing: less than a step
        return 0
    P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    length = P + lengths.question + lengths.new
    rows = min(128, max(1, args.eval_tokens // length))  # as in generate.predict
    gaps = args.passes - 1
    passes = {"neural_recursion": (gaps + 1) * c.n_layers + gaps * args.connector_layers}
    passes["training_free"] = 2 * c.n_layers
    passes |= dict.fromkeys((*recurse.PROMPT_METHODS, "fine_tuning"), c.n_layers)
    layers = passes.get(args.method, c.n_layers + args.connector_layers)
    cache = 2 * c.n_kv_heads * c.head_dim * layers * size
    cached = 2 * rows * length  # positions, before and after a row ends
    read, scored = rows * length, rows  # positions that a layer reads at once, and with logits
    if lengths.options:  # each question is read once, then its cache is copied for every option
        questions = math.ceil(rows / lengths.options)
        cached = (questions + rows) * length
        read = questions * length + rows * lengths.new
        scored = min(rows * lengths.new, max(1, 2**25 // c.vocab_size))  # generate.token_logprobs
    held = cached * cache + read * size * activations(c, trained=True)
    return held + 2 * 4 * scored * c.vocab_size


def activations(c: Config, trained: bool) -> int:
    """Count the values that a token leaves in one layer for the backward pass."""
    query, key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    values = 2 * c.dim + 2 * query + 2 * key  # inputs of the norms; q, k, v and attention's output
    values += c.hidden_dim * (3 if c.gated else 1)  # the activation's input, the gate's factors
    if trained:
        values += 2 * c.dim + query + c.hidden_dim  # inputs of the weights
    return values


def memory(mark: str) -> int:
    """Bytes of memory in use: VmRSS now, VmHWM at the peak."""
    return 1024 * int(re.search(rf"{mark}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# Operations


def count_operations(args, c: Config, e: T5Config | None, lengths: Lengths) -> dict[str, int]:
    """Floating-point operations of a step, of all steps, and of an answer, all of the greatest
    length. Attention is counted as if it had no causal mask.
    """
    n, gaps = c.n_layers, args.passes - 1
    connectors = args.connector_layers
    first = 0 if lengths.kept else 1  # a first pass that is kept is computed once
    passes = {  # method: layers, and how often a step computes them
        "fine_tuning": [(n, 3)],
        "neural_recursion": [(n, first), (gaps * connectors, 3), (gaps * n, 2)],
        "lm_connector": [(n, first), (connectors, 3)],
        "connector_lm": [(connectors, 3), (n, 2)],
        "training_free": [(2 * n, 0)],
    }.get(args.method, [(n, 2)])
    B, P = args.batch_size, args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    prompts = {"deep_prompt": 0, "id_pt": B}.get(args.method, 1) * P  # positions read in a step
    step = sum(
        k * layer_operations(c, B * lengths.text, P + lengths.text, times)
        + k * layer_operations(c, prompts, P, times)
        for k, times in passes
    )
    logits, layers = 2 * c.dim * c.vocab_size, sum(k for k, _ in passes)
    step += B * lengths.targets * logits * (3 if args.method == "fine_tuning" else 2)
    asked, new = lengths.question or lengths.asked, lengths.new or args.max_new_tokens
    answer = layers * layer_operations(c, asked + new, P + asked + new) + new * logits
    if e:
        encoder, generator = generator_operations(args, c, e, lengths.asked)
        step += B * (2 * encoder + 3 * generator)
        answer += encoder + generator + n * layer_operations(c, P, P)
    operations, prompts = {}, 1
    if args.method == "textual_recursion":
        rounds = args.rounds - (args.stages_from is not None)
        prompts += rounds * (1 if args.no_cross_fit else 3)
        sampled = args.candidates * new
        read = layer_operations(c, asked + sampled, P + asked + new)
        operations["samples of a question"] = n * read + sampled * logits
    if args.method != "training_free":
        steps = args.steps * args.grad_accum * prompts
        operations = {"a step": step * args.grad_accum, "all steps": step * steps} | operations
    return operations | {"an answer": answer}


def layer_operations(c: Config, tokens: int, positions: int, times: int = 1) -> int:
    """Operations of one layer on tokens that each attend to so many positions.

    times: 1 forward, 2 with the gradient of the input, 3 with that of the weights. The gradient of
    attention takes 2.5 times what attention takes: five products of matrices, not two.
    """
    query, key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    weights = c.dim * (2 * query + 2 * key) + c.dim * c.hidden_dim * (3 if c.gated else 2)
    attention = query * positions * (7 if times > 1 else 2 * times)
    return 2 * tokens * (weights * times + attention)


def generator_operations(args, c: Config, e: T5Config, asked: int) -> tuple[int, int]:
    """Operations of the encoder and of the generator of ID-PT, forward, for one question."""
    L, P, W, query = args.encoder_prompt + asked, args.prompt_length, e.dim, e.n_heads * e.head_dim
    weights = 4 * W * query + W * e.hidden_dim * (3 if e.gated else 2)
    encoder = e.n_layers * 2 * L * (weights + 2 * query * L)
    # CrossBlock: q and o have W * W weights, the MLP 8 of that. The first reads L tokens of the
    # encoder, the other two the P vectors themselves.
    blocks = P * (10 + 12 + 12) * W * W + L * 2 * W * W + 2 * W * P * (L + 2 * P)
    return encoder, 2 * (blocks + P * W * c.dim)
