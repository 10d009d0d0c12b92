"""Compositions around one frozen LM: prompts, and several passes with the LM's own interface.

LM recursion: Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language Models",
section 4.2 (neural recursion). The last hidden states of a first pass, "before translation into the
vocabulary", go through a small trained Connector. The Connector's output enters the first layer of
a second pass in place of the embeddings.

    neural recursion   lm(connector(lm(lm.embed(ids))))
    LM-Connector       connector(lm(lm.embed(ids)))      one pass; the Connector comes after it
    Connector-LM       lm(connector(lm.embed(ids)))      one pass; the Connector comes before it

A Stack generates like an LM: every new token runs through all its parts, and every part has its own
KV cache. Needs adapters.py, t5.py and checkpoints.py; the caller passes the LM.

    python train.py --method neural_recursion      trains one on the embedded world
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from adapters import (
    Connector,
    DeepPrompt,
    PromptGenerator,
    SoftPrompt,
    load_adapter,
    rms,
    save_adapter,
    without_bos,
)
from checkpoints import load_tokenizer
from t5 import T5Encoder


@dataclass
class StackPrefix:
    """The prefixes of all parts of a Stack, with those methods of Prefix that generate.py calls."""

    parts: list  # one Prefix per part, all of the same lengths

    @property
    def size(self) -> int:
        """P, the same in every part."""
        return self.parts[0].size

    @property
    def rows(self) -> int:
        """1 if shared by all rows of the batch, otherwise B."""
        return self.parts[0].rows

    def row_lengths(self, B: int) -> list[int]:
        """The number of prefix positions before each of B rows of text."""
        return self.parts[0].row_lengths(B)

    def select(self, index: Tensor) -> "StackPrefix":
        """Rows `index` (R,) of every part."""
        return StackPrefix([p.select(index) for p in self.parts])

    def preallocate(self, index: Tensor, more: int) -> "StackPrefix":
        """Rows `index` (R,) of every part, in buffers with space for `more` positions."""
        return StackPrefix([p.preallocate(index, more) for p in self.parts])

    def drop_padding(self, padding: Tensor) -> "StackPrefix":
        """Removes the last padding[b] positions of row b in every part."""
        return StackPrefix([p.drop_padding(padding) for p in self.parts])

    @staticmethod
    def stack(prefixes: list["StackPrefix | None"]) -> "StackPrefix | None":
        """Joins prefixes of one row each, one per example. None is an empty prefix."""
        present = [p for p in prefixes if p is not None]
        if not present:
            return None
        stacked = []
        for i, part in enumerate(present[0].parts):
            rows = [None if p is None else p.parts[i] for p in prefixes]
            stacked.append(part.stack(rows))
        return StackPrefix(stacked)


class Stack(nn.Module):
    """Parts in a row, each the LM or a Connector, with the LM's interface.

    Stack(lm, [c]) is LM-Connector-LM and Stack(lm, [c1, c2]) runs the LM three times; `parts` gives
    any other order. If the first part is the frozen LM, autograd records nothing for it, because
    nothing trained comes before it.
    """

    def __init__(self, lm, connectors=(), parts: list[nn.Module] | None = None):
        super().__init__()
        self.config = lm.config
        self.lm = lm
        if parts is None:
            parts = [lm]
            for connector in connectors:
                parts += [connector, lm]
        self.parts = nn.ModuleList(parts)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C), what the first part reads."""
        return self.lm.embed(ids)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V), float32."""
        return self.lm.logits(h)

    def forward(self, x: Tensor, prefix: StackPrefix | None = None, keep: bool = False):
        """x (B, T, C) -> (B, T, C) through every part.

        With keep it returns (output, every part's prefix extended by what that part read).
        """
        extended = []
        for i, part in enumerate(self.parts):
            x = part(x, None if prefix is None else prefix.parts[i], keep)
            if keep:
                x, part_prefix = x
                extended.append(part_prefix)
        return (x, StackPrefix(extended)) if keep else x

    def read(self, x: Tensor, prefix: StackPrefix | None = None, lengths: Tensor | None = None):
        """The StackPrefix after x (T, C) or (B, T, C); lengths (B,) as in LM.read."""
        x = x[None] if x.dim() == 2 else x
        _, extended = self(x, prefix, keep=True)
        if lengths is None:
            return extended
        return extended.drop_padding(x.shape[1] - lengths.to(x.device))


@dataclass
class GeneratedPrefix:
    """The prefix of ID-PT: prefix(questions) computes it, one row for each list of token ids.

    Until the questions are known, it has those methods of Prefix that say how long it is.
    """

    lm: nn.Module
    generator: PromptGenerator
    rows: int = 1  # like a shared prefix, it stands before any number of questions

    @property
    def size(self) -> int:
        """P, the length of every generated prompt."""
        return len(self.generator.queries)

    def row_lengths(self, B: int) -> list[int]:
        """The number of prefix positions before each of B questions."""
        return [self.size] * B

    def __call__(self, questions: list[list[int]]):
        return self.lm.read(self.generator.prompts(questions))


# method: a function (lm, adapter) -> (model with the LM's interface, prefix of every text or None)
COMPOSITIONS = {
    "fine_tuning": lambda lm, _: (lm, None),
    "prompt_tuning": lambda lm, prompt: (lm, lm.read(prompt())),
    "deep_prompt": lambda lm, prompt: (lm, prompt()),
    "id_pt": lambda lm, generator: (lm, GeneratedPrefix(lm, generator)),
    "neural_recursion": lambda lm, connector: (Stack(lm, [connector]), None),
    "lm_connector": lambda lm, connector: (Stack(lm, parts=[lm, connector]), None),
    "connector_lm": lambda lm, connector: (Stack(lm, parts=[connector, lm]), None),
}
PROMPT_METHODS = ("prompt_tuning", "deep_prompt", "id_pt")
CONNECTOR_METHODS = ("neural_recursion", "lm_connector", "connector_lm")


def new_connector(lm, method: str, layers: int) -> Connector:
    """A freshly initialised Connector for one of CONNECTOR_METHODS.

    Its output replaces token embeddings, so it starts at their root mean square. In LM-Connector it
    replaces the LM's final hidden states, whose root mean square is about the final norm's gain.
    """
    reference = lm.norm.weight if method == "lm_connector" else lm.embed_tokens.weight
    return Connector(lm.new_layers(layers), rms(reference))


def load_encoder(folder, tokenizer, device: str = "cpu"):
    """(encoder, recode) of a PromptGenerator: a frozen T5Encoder, and a function from token ids of
    `tokenizer`, the LM's, to those of the encoder's own tokenizer, by way of the text."""
    encoder = T5Encoder.from_pretrained(folder, device)
    own = load_tokenizer(folder, encoder.config.vocab_size)

    def recode(ids: list[int]) -> list[int]:
        return own.encode(tokenizer.decode(ids)).ids

    return encoder, recode


def load_trained(folder, lm, tokenizer, encoder_folder=None):
    """(adapter, tokenizer): the frozen adapter of a folder, and what tokenises the texts for it.

    encoder_folder is the one of ID-PT. The tokenizer adds no BOS if the prompt stands after it.
    """
    encoder, recode = None, None
    if encoder_folder is not None:
        encoder, recode = load_encoder(encoder_folder, tokenizer, lm.embed_tokens.weight.device)
    adapter = load_adapter(folder, lm, encoder).requires_grad_(False)
    if isinstance(adapter, PromptGenerator):
        adapter.recode = recode
    elif isinstance(adapter, SoftPrompt) and adapter.bos is not None:
        tokenizer = without_bos(tokenizer)
    return adapter, tokenizer


# A prefix as a file


def save_prefix(folder, prefix, lm, **info) -> None:
    """Stores a shared prefix, such as examples read once, as a deep prompt. PEFT loads it too."""
    save_adapter(folder, DeepPrompt(prefix), lm, **info)


def load_prefix(folder, lm, tokenizer=None, encoder_folder=None):
    """The prefix of the prompt in a folder, of any kind, for `generate` and `predict`.

    ValueError if the prompt was made for another LM, or if the folder holds a Connector. ID-PT
    needs the LM's tokenizer and the folder of its encoder.
    """
    adapter, _ = load_trained(folder, lm, tokenizer, encoder_folder)
    methods = dict(zip((SoftPrompt, DeepPrompt, PromptGenerator), PROMPT_METHODS))
    if type(adapter) not in methods:
        raise ValueError(f"{folder}: holds a {type(adapter).__name__}, which is no prompt")
    return COMPOSITIONS[methods[type(adapter)]](lm, adapter)[1]


@torch.no_grad()
def prompt_embeddings(adapter, lm, ids: list[int]) -> Tensor:
    """[prompt; embeddings] of a question (P + T, C), for engines that take prompt embeddings.

    ids are the question's tokens as the LM reads them, after a prompt after BOS without BOS.
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
