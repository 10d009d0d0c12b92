"""Compositions around one frozen LM: prompts, and several passes with the LM's own interface.

LM recursion: Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models",
section 4.2 (neural recursion). The last hidden states of a first pass, "before translation into the
vocabulary" (here: after the final norm), go through a small trained Connector. The Connector's
output enters the first layer of a second pass in place of the embeddings.

    neural recursion   lm(connector(lm(lm.embed(ids))))
    LM-Connector       connector(lm(lm.embed(ids)))      one pass; the Connector comes after it
    Connector-LM       lm(connector(lm.embed(ids)))      one pass; the Connector comes before it
    training-free      lm(rescale(lm(lm.embed(ids))))    no Connector; the second pass reads the
                                                         first one's output at the embeddings' scale

A residual Connector, which is train.py's default and not in the paper, adds its output to what it
would replace:

    neural recursion   lm(x + connector(lm(x)))         x = lm.embed(ids)

A Stack generates like an LM: every new token runs through all its parts. Its KV cache holds the
layers of all of them.

Textual recursion (section 4.1 of the same paper) composes two passes as text. With a prompt p1 the
LM samples n answers, and with a prompt p2 it reads the question and these candidates.

Needs adapters.py, generate.py, cache.py, model.py, t5.py, parallel.py, checkpoints.py and
families.py. The caller passes the LM.

    python train.py --method neural_recursion      trains one on the embedded world
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import parallel
from adapters import (
    Connector,
    Connectors,
    DeepPrompt,
    PromptGenerator,
    SoftPrompt,
    load_adapter,
    rms,
)
from checkpoints import load_tokenizer
from generate import (
    Sample,
    batches,
    drop_eos,
    find_stop,
    pad,
    predict,
    prefix_lengths,
    sample_answers,
)
from model import rope_cos_sin, text_positions
from t5 import T5Encoder


class Around(nn.Module):
    """Wraps an LM and has its interface. What a subclass does not define is the wrapped LM's."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)  # a module, parameter or buffer of its own
        except AttributeError:
            return getattr(super().__getattr__("lm"), name)

    def forward(self, x: Tensor, prefix=None, keep: bool = False, last=None):
        """As LM.forward: x (B, T, C) -> (B, T, C), or with keep (output, the extended prefix)."""
        return self.lm(x, prefix, keep, last)


class Checkpointed(Around):
    """An LM, with the LM's interface, that keeps one state per block for the backward pass.

    The backward pass computes each block again (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost"). The loss and the gradient stay the same. Without gradients, and with
    `keep`, the LM runs as it is.
    """

    def forward(self, x: Tensor, prefix=None, keep: bool = False, last=None):
        """x (B, T, C) -> h (B, T, C), as in LM.forward."""
        lm, layers = self.lm, self.lm.layers
        if keep or not torch.is_grad_enabled():
            return lm(x, prefix, keep, last)
        x = lm.add_positions(x, prefix)
        cos_sin = rope_cos_sin(layers.config, text_positions(layers, x, prefix))
        for block, at in zip(layers, layers.positions(last)):

            def run(x: Tensor, block=block, at=at) -> Tensor:
                return block(x, cos_sin, prefix, False, layers.attend, at)[0]

            x = checkpoint(run, x, use_reentrant=False)
        return lm.norm(x)


class Stack(Around):
    """Parts in a row, each the LM or a Connector, with the LM's interface.

    Stack(lm, [c]) is LM-Connector-LM and Stack(lm, [c1, c2]) runs the LM three times; `parts` gives
    any other order. If the first part is the frozen LM, autograd records nothing for it, because
    nothing trained comes before it. A Stack's prefix is one Prefix with the layers of all parts, in
    order. `embeddings` is set by `after_first` only.
    """

    def __init__(self, lm, connectors=(), parts=None, embeddings: Tensor | None = None):
        super().__init__(lm)
        self.embeddings = embeddings
        if parts is None:
            parts = [lm]
            for connector in connectors:
                parts += [connector, lm]
        self.parts = nn.ModuleList(parts)

    def after_first(self, embeddings: Tensor) -> "Stack":
        """The Stack that reads the first part's output. embeddings (B, T, C): that part's input."""
        return Stack(self.lm, parts=self.parts[1:], embeddings=embeddings)

    def prefix_of(self, i: int, prefix):
        """The Prefix of part i: the layers of the Stack's prefix that are its own, or None."""
        if prefix is None:
            return None
        first = sum(len(part.layers) for part in list(self.parts)[:i])
        own = slice(first, first + len(self.parts[i].layers))
        fields = {k: v[own] for k, v in vars(prefix).items() if isinstance(v, list)}  # per layer
        return replace(prefix, **fields)

    def forward(self, x: Tensor, prefix=None, keep: bool = False, last=None):
        """x (B, T, C) -> (B, T, C) through every part, or (B, last, C) as in LM.forward.

        The output of a residual Connector is added to the vectors that it would otherwise replace:
        to the embeddings, or to its own input, the LM's output, if it is the last part. With keep
        it returns (output, the prefix extended by what each part read).
        """
        extended, embeddings = [], x if self.embeddings is None else self.embeddings
        for i, part in enumerate(self.parts):
            ends = i == len(self.parts) - 1
            replaced = x if ends else embeddings
            x = part(x, self.prefix_of(i, prefix), keep, last if ends else None)
            if keep:
                x, own = x
                extended.append(own)
            if getattr(part, "residual", False):
                x = replaced[:, -x.shape[1] :] + x
        if not keep:
            return x
        layers = [kv for own in extended for kv in own.layers]
        return x, replace(prefix or extended[0], layers=layers, lengths=extended[0].lengths)

    def read(self, x: Tensor, prefix=None, lengths: Tensor | None = None):
        """The prefix after x (T, C) or (B, T, C); lengths (B,) as in LM.read."""
        x = x[None] if x.dim() == 2 else x
        _, extended = self(x, prefix, keep=True, last=1)  # the last layer's output is unused
        return extended.drop_padding(x.shape[1], lengths)


class Reread(nn.Module):
    """One more pass, over hidden states scaled to the embeddings' root mean square. Untrained."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.scale = lm, rms(lm.embed_tokens.weight)
        self.layers = lm.layers

    def forward(self, h: Tensor, prefix=None, keep: bool = False, last=None):
        """h (B, T, C) -> (B, T, C), and with keep the extended Prefix, as in LM.forward."""
        return self.lm(self.scale * F.rms_norm(h, h.shape[-1:]), prefix, keep, last)


class FirstPass:
    """The frozen LM's last hidden states of the training texts, computed once and kept.

    A first pass reads the same tokens in every epoch, and nothing trained comes before it. The
    texts are read in batches that depend on the texts alone, so a resumed run gets the same bits.
    The batches of the steps pad and round differently, so a first pass inside the step would have
    the same states to float32 rounding only.
    """

    def __init__(self, lm, texts: list[list[int]], batch_size: int = 32):
        self.lm, self.texts, self.batch_size = lm, texts, batch_size
        lengths = torch.tensor([len(text) for text in texts])
        self.starts = lengths.cumsum(0) - lengths  # of each text in `states`
        self.positions = int(lengths.sum())
        self.states = None  # (positions, C)

    @torch.no_grad()
    def compute(self) -> None:
        """Read every text once, the shortest first."""
        device = self.lm.embed_tokens.weight.device
        order = sorted(range(len(self.texts)), key=lambda row: len(self.texts[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids, lengths = pad([self.texts[row] for row in rows], device)
            h = self.lm(self.lm.embed(ids))
            if self.states is None:
                self.states = h.new_empty(self.positions, h.shape[-1])
            for row, states, length in zip(rows, h, lengths.tolist()):
                first = self.starts[row]
                self.states[first : first + length] = states[:length]
        self.starts = self.starts.to(device)

    def __call__(self, rows: list[int], T: int) -> Tensor:
        """The states of the texts `rows` as (B, T, C). Positions after a text's end are padding:
        they hold states of other texts."""
        if self.states is None:
            self.compute()
        index = self.starts[rows][:, None] + torch.arange(T, device=self.starts.device)
        return self.states[index.clamp(max=self.positions - 1)]


@dataclass
class GeneratedPrefix:
    """The prefix of ID-PT: prefix(questions) computes it, one row for each list of token ids.

    Before the call it counts as a shared Prefix of P positions, since only P is known.
    """

    lm: nn.Module
    generator: PromptGenerator
    rows = 1

    def row_lengths(self, B: int) -> list[int]:
        """The number of prefix positions before each of B questions."""
        return [len(self.generator.queries)] * B

    def __call__(self, questions: list[list[int]]):
        return self.lm.read(self.generator.prompts(questions))


# method: a function (lm, adapter) -> (model with the LM's interface, prefix of every text or None)
COMPOSITIONS = {
    "fine_tuning": lambda lm, _: (lm, None),
    "prompt_tuning": lambda lm, prompt: (lm, lm.read(prompt())),
    "textual_recursion": lambda lm, prompt: (lm, lm.read(prompt())),  # the last prompt
    "reader": lambda lm, prompt: (lm, None if prompt is None else lm.read(prompt())),
    "deep_prompt": lambda lm, prompt: (lm, prompt()),
    "id_pt": lambda lm, generator: (lm, GeneratedPrefix(lm, generator)),
    "neural_recursion": lambda lm, connector: (Stack(lm, gaps(connector)), None),
    "lm_connector": lambda lm, connector: (Stack(lm, parts=[lm, connector]), None),
    "connector_lm": lambda lm, connector: (Stack(lm, parts=[connector, lm]), None),
    "training_free": lambda lm, _: (Stack(lm, parts=[lm, Reread(lm)]), None),
}
PROMPT_METHODS = ("prompt_tuning", "deep_prompt", "id_pt", "textual_recursion", "reader")
CONNECTOR_METHODS = ("neural_recursion", "lm_connector", "connector_lm")


def gaps(connector: Connector | Connectors) -> list[Connector]:
    """The Connector of each gap between the passes of a neural recursion."""
    if isinstance(connector, Connectors):
        return [connector[i % len(connector)] for i in range(connector.passes - 1)]
    return [connector]


def make_connectors(passes: int, shared: bool, new: Callable) -> Connector | Connectors:
    """What stands between `passes` passes: a shared Connector, or one for each gap.

    new() returns a Connector. Two passes have one gap, and get a plain Connector.
    """
    if passes == 2:
        return new()
    count = 1 if shared else passes - 1
    return Connectors([new() for _ in range(count)], passes)


def new_connector(lm, method: str, layers: int) -> Connector:
    """A freshly initialised Connector for one of CONNECTOR_METHODS.

    Its output replaces token embeddings, so it starts at their root mean square. In LM-Connector it
    replaces the LM's final hidden states, whose root mean square is about the final norm's gain.
    """
    reference = lm.norm.weight if method == "lm_connector" else lm.embed_tokens.weight
    return Connector(lm.new_layers(layers), rms(parallel.whole(reference)))


# Prompts


def positions_left(args: dict, config, P: int) -> int:
    """The positions of the LM's context, or of --context, that a prompt of P vectors leaves."""
    return min(config.max_len, args.get("context") or config.max_len) - P


def without_bos(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer that adds no special tokens to a text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    return tokenizer


def load_encoder(folder, tokenizer, device: str = "cpu"):
    """The frozen encoder of a PromptGenerator. Its function `recode` turns ids of `tokenizer`, the
    LM's, into a text, and this into ids of the encoder's own tokenizer."""
    encoder = T5Encoder.from_pretrained(folder, device)
    own = load_tokenizer(folder, encoder.config.vocab_size)
    encoder.recode = lambda ids: own.encode(tokenizer.decode(ids)).ids
    return encoder


def load_trained(folder, lm, tokenizer, encoder_folder=None):
    """(adapter, tokenizer): the frozen adapter of a folder, and what tokenises the texts for it.

    encoder_folder: the T5 encoder of ID-PT. The tokenizer adds no BOS if the prompt follows it.
    """
    encoder = None
    if encoder_folder is not None:
        encoder = load_encoder(encoder_folder, tokenizer, lm.embed_tokens.weight.device)
    adapter = load_adapter(folder, lm, encoder).requires_grad_(False)
    if isinstance(adapter, SoftPrompt) and adapter.bos is not None:
        tokenizer = without_bos(tokenizer)
    return adapter, tokenizer


def prompt_prefix(adapter, lm, source=""):
    """The prefix of a prompt of any kind. ValueError, with its source, if it is a Connector."""
    methods = {SoftPrompt: "prompt_tuning", DeepPrompt: "deep_prompt", PromptGenerator: "id_pt"}
    if type(adapter) not in methods:
        raise ValueError(f"{source}: holds a {type(adapter).__name__}, which is no prompt")
    return COMPOSITIONS[methods[type(adapter)]](lm, adapter)[1]


@torch.no_grad()
def prompt_embeddings(adapter, lm, ids: list[int]) -> Tensor:
    """[prompt; embeddings] of a question (P + T, C), for engines that take prompt embeddings.

    ids are the question's tokens. If the prompt stands after BOS, pass ids without BOS: the prompt
    begins with it, one row more.
    ValueError for a deep prompt, which is no embeddings. With vLLM:

        llm = vllm.LLM(model, enable_prompt_embeds=True)
        llm.generate({"prompt_embeds": prompt_embeddings(adapter, lm, ids)})

    With transformers: model.generate(inputs_embeds=prompt_embeddings(adapter, lm, ids)[None]).
    """
    if isinstance(adapter, DeepPrompt):
        raise ValueError("a deep prompt is keys and values, and has no embeddings")
    generated = isinstance(adapter, PromptGenerator)
    prompt = adapter.prompts([ids])[0] if generated else adapter()
    x = lm.embed(torch.tensor(ids, device=prompt.device))
    return torch.cat([prompt.to(x.dtype), x])


# Passes by difficulty


def route(
    threshold: float | None,
    stack,
    tokenizer,
    ids: list[list[int]],
    prefix=None,
    max_new_tokens: int = 16,
    options=None,
    stops: list[str] | None = None,
    max_tokens: int = 8192,
    mean: bool = False,
) -> tuple[list[str | int], list[bool]]:
    """Answers each question with the first pass alone, or with all passes. Arguments of predict,
    except that with a threshold `prefix` is None or one for all.

    The first pass, the frozen LM, answers. If the log-probability of its answer is below
    `threshold`, the whole stack answers instead. Returns (answers, for each whether the stack gave
    it). If threshold is None, the stack answers all questions, and may be any model.
    """
    rest = (max_new_tokens, options, stops, max_tokens)
    if threshold is None:
        return predict(stack, tokenizer, ids, prefix, *rest, mean=mean), [True] * len(ids)
    check_stack(stack)
    if math.isnan(threshold):
        raise ValueError("--threshold: nan is no number")
    first = predict_first_pass(stack, tokenizer, ids, prefix, *rest, mean=mean)
    answers, unsure = [answer for answer, _ in first], [value < threshold for _, value in first]
    rows = [b for b, more in enumerate(unsure) if more]
    asked = [ids[b] for b in rows]
    options = [options[b] for b in rows] if options else None
    stops = [stops[b] for b in rows] if stops else None
    rest = (max_new_tokens, options, stops, max_tokens)
    for b, answer in zip(rows, predict(stack, tokenizer, asked, prefix, *rest, mean=mean)):
        answers[b] = answer
    return answers, unsure


def check_stack(stack) -> None:
    """ValueError unless it is a neural recursion: passes with something between them."""
    passes = isinstance(stack, Stack) and stack.parts[0] is stack.parts[-1] is stack.lm
    if not passes or len(stack.parts) < 3:
        raise ValueError("only a run of neural_recursion has a first pass that can answer")


def predict_first_pass(stack, tokenizer, ids, prefix=None, *rest, mean: bool = False) -> list:
    """What `predict` returns for the frozen LM alone: (answer, log-probability) pairs."""
    prefix = stack.prefix_of(0, prefix)
    return predict(stack.lm, tokenizer, ids, prefix, *rest, mean=mean, logprobs=True)


# Textual recursion


@dataclass(frozen=True)
class Candidate:
    """An answer that the LM sampled."""

    text: str  # white space is single spaces
    logprob: float  # in nats, of the likeliest token sequence that gave it, with its end token
    count: int  # how many samples gave it
    first: int  # the first of these samples, counted from 0


def candidates(
    lm,
    ids: list[list[int]],
    n: int,
    prefix=None,
    tokenizer=None,
    max_new_tokens: int = 16,
    stops: list[str] | None = None,
    seed: int = 0,
    max_tokens: int = 8192,
) -> list[list[Candidate]]:
    """Samples n answers to each of B questions, which are read once. Returns B ranked lists.

    The temperature is 1, over the whole vocabulary. prefix: None or one for all. `merge_samples`
    states how they are ordered. An answer ends with an eos of the LM or at stops[b] ("" for
    none). Without a tokenizer a text is its token ids, and there are no stops.

    A batch has at most max_tokens positions: for each question n times (prefix + longest question +
    max_new_tokens), as if no two samples agreed or shared their question. The random numbers of a
    question depend on `seed`, its tokens and max_new_tokens alone, so its candidates do not depend
    on the questions beside it (but other batches round log-probabilities differently). The same
    arguments give the same bits.
    """
    stops, ranked = stops or [""] * len(ids), [[]] * len(ids)
    P = prefix_lengths(prefix, 1)[0]
    lengths = [(P, len(row), max_new_tokens) for row in ids]
    by_length = sorted(range(len(ids)), key=lambda b: lengths[b])
    for batch in batches(by_length, [n] * len(ids), lengths, max_tokens, max_tokens):

        def ended(i: int, tokens: list[int], batch=batch) -> bool:
            stop = stops[batch[i]]
            return bool(stop) and find_stop(tokenizer.decode(tokens), stop) is not None

        asked, eos = [ids[b] for b in batch], lm.config.eos
        seeds = [question_seed(seed, row) for row in asked]
        found = sample_answers(lm, asked, n, seeds, prefix, max_new_tokens, eos, ended)
        for b, samples in zip(batch, found):
            ranked[b] = merge_samples(samples, eos, tokenizer, stops[b])
    return ranked


def question_seed(seed: int, ids: list[int]) -> int:
    """A seed that depends on `seed` and on the tokens of a question."""
    return int.from_bytes(hashlib.sha256(repr((seed, ids)).encode()).digest()[:7], "big")


def merge_samples(samples: list[Sample], eos, tokenizer=None, stop: str = "") -> list[Candidate]:
    """Merges the samples of one question by their text, the likeliest text first.

    A text is cut at `stop`, and its white space becomes single spaces. Samples with the same text
    are one candidate. Its log-probability is the highest of theirs, a sum over tokens that is not
    divided by their number. Empty texts are dropped.
    """
    merged = {}
    for number, sample in enumerate(samples):
        ids = drop_eos(sample.ids, eos)
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        text = " ".join(text[: find_stop(text, stop)].split())
        same = merged.get(text, Candidate(text, sample.logprob, 0, number))
        best = max(same.logprob, sample.logprob)
        merged[text] = Candidate(text, best, same.count + 1, same.first)
    merged.pop("", None)
    return sorted(merged.values(), key=lambda candidate: -candidate.logprob)  # ties: first sampled


def text_with(question: str, candidates: Sequence[str | Candidate]) -> str:
    """Puts candidates, if there are any, on a line of their own before a question or another text.

        Candidates: Velmor; Kranstad
        Q: Where was Anna Teller born?
        A:

    In the paper the list follows the question. Here it comes first: the question and the place of
    its answer stay as p1 saw them, so a prompt that starts from p1 answers as well as p1 from the
    first step.
    """
    texts = [c.text if isinstance(c, Candidate) else c for c in candidates]
    return f"Candidates: {'; '.join(texts)}\n{question}" if texts else question
