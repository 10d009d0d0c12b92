"""The workload of bench.py that decodes, against transformers' generate.

generation  16 samples of 16 new tokens for each of 32 questions of 24 tokens, and greedy
            continuations of 32, 8 and 1 questions, against transformers' generate. Samples share
            the reading of their question: 24 + 16 * 16 positions instead of 16 * (24 + 16), 2.3
            times as many. Then 32 questions with prompts of four lengths in one batch; transformers
            gets them as embeddings, padded on the left. Then a neural recursion, which no peer
            generates with: transformers reads with its LM twice. On a GPU also without the graph of
            replay.py.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from contest import Contest, Setting, decoding, llama, peer_step
from model import LM
from recurse import Stack, new_connector
from runs import ASSETS

LLAMA_100M = llama(32_000, 768, 12, 12, 1792, max_len=1024)

# Generation


def generation(setting: Setting) -> Iterator[Contest]:
    """Samples, greedy decoding, prompts mixed in a batch, and a recursion."""
    questions, tokens, new, n = (3, 5, 4, 2) if setting.tiny else (32, 24, 16, 16)
    for source in setting.sources(ASSETS / "lm", LLAMA_100M):
        lm, peer = setting.pair(source)
        ids = setting.random_ids(lm, questions, tokens)
        prompts = mixed_prompts(setting, lm, questions)
        stack = Stack(lm, [new_connector(lm, "neural_recursion", 2).to(lm.embed_tokens.weight)])
        size = sum(p.numel() for p in lm.parameters()) / 1e6
        greedy = [
            ("greedy", decoding(lm, ids[:B], new), peer_step(peer, ids[:B], new), B)
            for B in (questions, *((2, 1) if setting.tiny else (8, 1)))
        ]
        for how, ours, theirs, rows in (
            (f"n={n}", decoding(lm, ids, new, n), peer_step(peer, ids, new, n), n * questions),
            *greedy,
            ("mixed prompts", *mixed_steps(lm, peer, ids, new, prompts), questions),
            ("recursion", decoding(stack, ids, new), twice(peer_step(peer, ids, new)), questions),
        ):
            B = min(rows, questions)
            title = f"generate, LM of {size:.0f}M, {B} questions of {tokens}, {how}"
            name = "transformers, twice" if how == "recursion" else "transformers"
            peers = {name: None if peer is None else theirs}
            if setting.device == "cuda":
                peers["ours, without a graph"] = without_graph(ours)
            same = how in ("greedy", "mixed prompts")  # not samples, nor the LM without Connector
            yield Contest(setting, title, lm, ours, peers, rows * new, rows, same)


def without_graph(step: Callable) -> Callable:
    """The same decoding, with every kernel launched by Python."""

    def run():
        graphs, generate.GRAPH_DEVICES = generate.GRAPH_DEVICES, ()
        try:
            return step()
        finally:
            generate.GRAPH_DEVICES = graphs

    return run


def twice(step: Callable) -> Callable:
    """A function that takes the step two times."""

    def both() -> None:
        step()
        step()

    return both


@torch.no_grad()
def mixed_prompts(setting: Setting, lm: LM, count: int) -> list[Tensor]:
    """The vectors of `count` prompts, of four lengths in turn."""
    lengths = (1, 2, 3, 4) if setting.tiny else (5, 10, 20, 40)
    prompts = [lm.embed(setting.random_ids(lm, P)) for P in lengths]
    return [prompts[b % 4] for b in range(count)]


@torch.no_grad()
def mixed_steps(lm: LM, peer, ids: Tensor, new: int, prompts: list[Tensor]):
    """Our greedy continuation of questions behind prompts of their own, and the peer's."""

    @torch.no_grad()
    def ours() -> list[list[int]]:
        prefixes = [lm.read(prompt) for prompt in prompts[:4]]  # they come back in turn
        return decoding(lm, ids, new, prefix=[prefixes[b % 4] for b in range(len(ids))])()

    rows = [torch.cat([prompt, row]) for prompt, row in zip(prompts, lm.embed(ids))]
    T = max(map(len, rows))
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(T) >= T - len(row) for row in rows]).to(ids)
    return ours, peer_step(peer, ids, new, inputs_embeds=x, attention_mask=mask)


WORKLOADS = {"generation": generation}
