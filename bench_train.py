"""Workloads of bench.py that train: one step, forward and backward, beside PEFT and transformers.

prompt       prompt tuning. The frozen LM reads a shared prompt once per batch instead of once per
             example, so a step computes P + BT positions instead of B(P + T). Logits are computed
             at the 8 answer tokens only. The peer "trimmed" computes its logits there only, too.
deep_prompt  keys and values of P positions in every layer, against PEFT's prefix tuning
id_pt        a prompt computed from each text. No peer has it: transformers gets the same prompts
reader       prompt tuning on texts that fill the context
fine_tuning  a step of the whole LM, with AdamW's update
recursion    neural recursion: a step with the first pass kept against one that computes it again,
             and greedy decoding with two passes against one
options      what our own options cost or gain, each against the same step without it
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import start
from adapters import DeepPrompt, PromptGenerator, SoftPrompt
from contest import Contest, Setting, decoding, llama
from data import IGNORE_INDEX, Batch
from fit import adamw, target_loss
from int8 import quantize
from model import LM
from recurse import COMPOSITIONS, Checkpointed, FirstPass, Stack, new_connector
from runs import ASSETS
from t5 import T5Config, T5Encoder

SMALL = llama(4096, 192, 6, 6, 512, max_len=512)
WIDE = replace(SMALL, vocab_size=32_000)  # the vocabulary of Llama 2
ANSWER = 8  # tokens with a loss at the end of each text


def prompt(setting: Setting) -> Iterator[Contest]:
    """Prompt tuning, by length of prompt and text and by vocabulary; with --model only T = 64."""
    for source in setting.sources(SMALL, WIDE):
        lm, peer = setting.pair(source)
        texts = (64,) if setting.model else (32, 64, 256)
        lengths = [(4, 12)] if setting.tiny else product((20, 100), texts)
        for P, T in lengths:
            yield tuning(setting, "prompt_tuning", lm, peer, soft_prompt(setting, lm, P), P, T)


def deep_prompt(setting: Setting) -> Iterator[Contest]:
    """Prefix tuning."""
    for source in setting.sources(SMALL):
        lm, peer = setting.pair(source)
        for P in (4,) if setting.tiny else (100, 20):
            with torch.no_grad():
                deep = DeepPrompt(lm.read(lm.embed(setting.random_ids(lm, 1, P))))
            yield tuning(setting, "deep_prompt", lm, peer, deep, P, 12 if setting.tiny else 64)


def id_pt(setting: Setting) -> Iterator[Contest]:
    """Input-dependent prompt tuning with a frozen T5 encoder."""
    for source in setting.sources(ASSETS / "lm"):
        lm, peer = setting.pair(source)
        if setting.tiny or not (ASSETS / "t5").is_dir():
            encoder = T5Encoder(T5Config(300, 128, 2, 4, 32, 256)).requires_grad_(False)
            encoder = encoder.to(setting.device)
        else:
            encoder = T5Encoder.from_pretrained(ASSETS / "t5", setting.device)
        P, T = (4, 12) if setting.tiny else (20, 64)
        start = torch.randn(P, encoder.config.dim, device=setting.device)
        prompt = lm.embed(setting.random_ids(lm, 1, P))[0]
        generator = PromptGenerator(encoder, start, prompt)
        below = encoder.config.vocab_size
        yield tuning(setting, "id_pt", lm, peer, generator, P, T, below=below)


def reader(setting: Setting) -> Iterator[Contest]:
    """A prompt behind which texts fill the LM's context, at the batch size of --method reader."""
    for source in setting.sources(ASSETS / "lm"):
        lm, peer = setting.pair(source)
        P = 4 if setting.tiny else 20
        T = min(lm.config.max_len, 1024) - P
        yield tuning(setting, "reader", lm, peer, soft_prompt(setting, lm, P), P, T, B=16)


def fine_tuning(setting: Setting) -> Iterator[Contest]:
    """The whole LM, in float32, with AdamW."""
    for source in setting.sources(ASSETS / "lm"):
        lm, peer = setting.pair(source, torch.float32)
        B, T = (2, 12) if setting.tiny else (32, 64)
        ids = setting.random_ids(lm, B, T)
        whole = partial(COMPOSITIONS["fine_tuning"], lm, None)
        ours = updated(training_step(setting, lm, whole, ids), lm)
        peers = {"transformers": None, "transformers, trimmed": None}
        if peer is not None:
            steps = peer_steps(setting, peer, ids)
            peers = {name: updated(step, peer) for name, step in zip(peers, steps)}
        title = f"fine_tuning B={B} T={T} V={lm.config.vocab_size}"
        yield Contest(setting, title, lm, ours, peers, B * T, B * T)


def recursion(setting: Setting) -> Iterator[Contest]:
    """Neural recursion with two Connector layers: the kept first pass, and a second pass's cost.

    A title gives the ratio that counting layers predicts. With c Connector layers on L of the LM, a
    step reads 2L + 3c layers forward and backward, and L more if the first pass is not kept. A new
    token is read by 2L + c layers instead of L.
    """
    for source in setting.sources(ASSETS / "lm"):
        lm, _ = setting.pair(source)
        B, T, new = (2, 12, 4) if setting.tiny else (32, 24, 16)
        c, L = 2, lm.config.n_layers
        connector = new_connector(lm, "neural_recursion", c).to(lm.embed_tokens.weight)
        stack, ids = Stack(lm, [connector]), setting.random_ids(lm, B, T)
        first_pass = FirstPass(lm, ids[:, :-1].tolist())

        def after_first(stack=stack, ids=ids):
            return stack.after_first(stack.embed(ids[:, :-1])), None

        def kept(first_pass=first_pass, B=B, T=T):
            return first_pass(list(range(B)), T - 1)

        ours = training_step(setting, connector, after_first, ids, kept)
        without = training_step(setting, connector, lambda stack=stack: (stack, None), ids)
        layers = f"{c} Connector layers on {L}"
        title = f"neural_recursion, first pass kept, {layers}, B={B} T={T}, "
        title += f"layers alone: {(3 * L + 3 * c) / (2 * L + 3 * c):.2f}"
        yield Contest(setting, title, lm, ours, {"computed again": without}, B * T, B * T)
        title = f"generate with two passes, {layers}, {B} questions of {T}, greedy, "
        title += f"layers alone: {L / (2 * L + c):.2f}"
        ours, peers = decoding(stack, ids, new), {"one pass": decoding(lm, ids, new)}
        yield Contest(setting, title, lm, ours, peers, B * new, B, same=False)


def options(setting: Setting) -> Iterator[Contest]:
    """Activation checkpointing, bf16 arithmetic, an int8 LM and torch.compile, one by one."""
    for source in setting.sources(SMALL):
        lm, _ = setting.pair(source)
        B, P = (2, 4) if setting.tiny else (16, 20)
        T = min(lm.config.max_len, 512) - P
        ids, vectors = setting.random_ids(lm, B, T), soft_prompt(setting, lm, P)

        def step(lm: LM, model=None, setting=setting, vectors=vectors, ids=ids) -> Callable:
            return training_step(setting, vectors, lambda: (model or lm, lm.read(vectors())), ids)

        compiled = deepcopy(lm)
        start.compile_steps(compiled.layers)
        for name, ours in (
            ("--checkpoint-activations", step(lm, Checkpointed(lm))),
            ("--dtype bfloat16", step(lm, setting=replace(setting, dtype=torch.bfloat16))),
            ("--base-dtype int8", step(quantize(deepcopy(lm)))),
            ("--compile", step(compiled)),
        ):
            title = f"{name}, prompt tuning B={B} P={P} T={T}"
            yield Contest(setting, title, lm, ours, {"without it": step(lm)}, B * T, B * T)


WORKLOADS = {f.__name__: f for f in (prompt, deep_prompt, id_pt, reader, fine_tuning)}
WORKLOADS |= {f.__name__: f for f in (recursion, options)}


# Steps


def soft_prompt(setting: Setting, lm: LM, P: int) -> SoftPrompt:
    """A soft prompt of P random tokens."""
    return SoftPrompt(lm.embed(setting.random_ids(lm, P)))


def tuning(setting: Setting, method: str, lm: LM, peer, prompt, P: int, T: int, B=32, below=None):
    """The contest of a prompt of any kind before texts of T tokens, with ids below a bound."""
    B = 2 if setting.tiny else B
    ids = setting.random_ids(lm, B, T, below=below)
    questions = ids[:, :-ANSWER].tolist()

    def compose():
        model, prefix = COMPOSITIONS[method](lm, prompt)
        return model, prefix(questions) if callable(prefix) else prefix

    generated = isinstance(prompt, PromptGenerator)
    name = "transformers" if generated else "PEFT"
    peers = {name: None, f"{name}, trimmed": None}
    if peer is not None and (generated or find_spec("peft")):
        model = Prepended(peer, prompt, questions) if generated else peft_model(peer, prompt)
        peers = dict(zip(peers, peer_steps(setting, model, ids)))
    title = f"{method} P={P} B={B} T={T} V={lm.config.vocab_size}"
    ours = training_step(setting, prompt, compose, ids)
    return Contest(setting, title, lm, ours, peers, B * T, B * T)


def training_step(
    setting: Setting, trained: nn.Module, compose: Callable, ids: Tensor, read: Callable = None
) -> Callable:
    """Our step: compose() gives the model and the prefix before the texts `ids` (B, T), and read()
    what the model reads (B, T - 1, C), if it is not their embeddings."""
    targets = ids[:, 1:].clone()
    targets[:, :-ANSWER] = IGNORE_INDEX
    lengths = torch.full((len(ids),), ids.shape[1] - 1)
    batch = Batch(ids[:, :-1], lengths, targets, list(range(len(ids))))

    def step() -> float:
        trained.zero_grad()
        with setting.autocast():
            model, prefix = compose()
            loss = target_loss(model, prefix, batch, read and read()) / (len(ids) * ANSWER)
        loss.backward()
        return loss.item()

    return step


def peer_steps(setting: Setting, model: nn.Module, ids: Tensor) -> tuple[Callable, Callable]:
    """A peer's step with all its logits, as its own loss takes them, and with the answers' only.
    As in transformers' Trainer, it fills no KV cache."""
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE_INDEX

    def whole() -> Tensor:
        mask = torch.ones_like(ids)
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    def trimmed() -> Tensor:
        kept = {"attention_mask": torch.ones_like(ids[:, :-1]), "logits_to_keep": ANSWER}
        logits = model(input_ids=ids[:, :-1], use_cache=False, **kept).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, -ANSWER:].flatten())

    def step_of(loss_of: Callable) -> Callable:
        def step() -> float:
            model.zero_grad()
            with setting.autocast():
                loss = loss_of()
            loss.backward()
            return loss.item()

        return step

    return step_of(whole), step_of(trimmed)


def updated(step: Callable, model: nn.Module) -> Callable:
    """The step of a whole model, with an update of its parameters by a learning rate of 0: as much
    work as any, and the next step has the same loss."""
    optimizer = adamw([{"params": list(model.requires_grad_(True).parameters())}], 0.0)

    def both() -> float:
        loss = step()
        optimizer.step()
        return loss

    return both


# The peers


def peft_model(base: nn.Module, prompt: SoftPrompt | DeepPrompt) -> nn.Module:
    """PEFT's model of the same prompt."""
    import peft

    soft = isinstance(prompt, SoftPrompt)
    kind = peft.PromptTuningConfig if soft else peft.PrefixTuningConfig
    values = (prompt.vectors if soft else prompt.table()).detach()
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=len(values)))
    model.prompt_encoder["default"].embedding.weight.data.copy_(values)
    return model


class Prepended(nn.Module):
    """transformers' model with generated prompts before the rows."""

    def __init__(self, base: nn.Module, generator: PromptGenerator, questions: list[list[int]]):
        super().__init__()
        self.base, self.generator, self.questions = base, generator, questions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels=None, **options):
        prompts = self.generator.prompts(self.questions)
        x = self.base.get_input_embeddings()(input_ids)
        x = torch.cat([prompts.to(x.dtype), x], dim=1)
        if labels is not None:
            labels = F.pad(labels, (prompts.shape[1], 0), value=IGNORE_INDEX)
        return self.base(inputs_embeds=x, labels=labels, **options)
