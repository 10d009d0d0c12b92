"""What the first pass of a neural recursion hands over to the second, and what follows from it.

    two_hop         the two-hop questions of the embedded world, with the bridge of each: the answer
                    to the first hop
    read_bridges    the tokens that the states at the end of a question stand for, in the LM's
                    vocabulary and in its table of embeddings
    intervene       the answers if another question's hand-over, or the mean, takes its place

The hand-over is the Connector's output. If filler follows a question (--pause), there is more
than one position at which the bridge can be handed over.

Needs recurse.py, prompts.py, generate.py, world.py, data.py and eval.py. audit.py has the command:

    python audit.py bridge runs/neural_recursion --out audit/bridge
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

import data
import eval as metrics
import recurse
import world
from generate import continue_texts
from prompts import nearest_tokens


def two_hop(examples: Sequence, made: world.World) -> list[dict]:
    """The two-hop questions among the examples: {"row", "example", "path", "bridge"}.

    The bridge is the answer to the first hop, row the index of the example. ValueError if the
    questions are not this world's.
    """
    facts = {}
    for split in world.SPLITS:
        for fact in made.questions(split):
            facts[fact["id"], data.question_text(fact["question"])] = fact
    found = []
    for row, e in enumerate(examples):
        fact = facts.get((e.id, e.input))
        if fact is None:
            raise ValueError(f"{e.source}: is no question of the world {made.seed}")
        hops = fact["relation"].split(".")
        if len(hops) > 1:
            bridge = made.answer(fact["subject"], hops[0])
            found.append({"row": row, "example": e, "path": fact["relation"], "bridge": bridge})
    return found


@torch.no_grad()
def hand_over(model, ids: list[int]) -> tuple[Tensor, Tensor]:
    """(last hidden states of the first pass (T, C), the Connector's output (T, C)) of a question.

    model is a Stack; ids are the question's T tokens, with the filler behind it. The second pass
    reads this output, or if the Connector is residual, the question's embeddings plus this output.
    """
    first, connector = model.parts[:2]
    h = first(model.embed(torch.tensor([ids], device=model.lm.embed_tokens.weight.device)))
    return h[0], connector(h)[0]


class Replaced(torch.nn.Module):
    """A Connector whose output at the positions `at` of every text is `vectors` (B, len(at), C).

    The texts have the same length, and nothing stands before them.
    """

    def __init__(self, connector, at: Sequence[int], vectors: Tensor):
        super().__init__()
        self.connector, self.at, self.vectors = connector, at, vectors
        self.residual, self.layers = connector.residual, connector.layers

    def forward(self, x: Tensor, prefix=None, keep: bool = False, last=None):
        """As the Connector's. `last` is not used: what a Stack hands on is whole."""
        h, extended = self.connector(x, prefix, keep=True)
        first = 0 if prefix is None else prefix.size  # the position of x[:, 0]
        for i, position in enumerate(self.at):
            if first <= position < first + x.shape[1]:  # never in the new tokens of an answer
                h[:, position - first] = self.vectors[:, i]
        return (h, extended) if keep else h


@torch.no_grad()
def answers_with(model, tokenizer, ids, at, vectors: Tensor, new: int, stops) -> list[str]:
    """The greedy answers to B questions if the Connector gives `vectors` (B, len(at), C).

    at  positions, counted from the end of a question: -1 is the last. Others stay as they are
    """
    answers, alike = [""] * len(ids), {}
    for b, (row, stop) in enumerate(zip(ids, stops, strict=True)):
        alike.setdefault((len(row), stop), []).append(b)
    for (length, stop), rows in alike.items():
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            given = Replaced(model.parts[1], [length + i for i in at], vectors[part])
            changed = recurse.Stack(model.lm, parts=[model.parts[0], given, *model.parts[2:]])
            texts = continue_texts(changed, tokenizer, [ids[b] for b in part], None, new, stop)
            for b, (text, _) in zip(part, texts):
                answers[b] = text
    return answers


def nearest(lm, vectors: Tensor) -> list[int]:
    """The token whose embedding has the largest cosine with each of the vectors (T, C)."""
    _, ids = nearest_tokens(vectors, lm.embed_tokens.weight, k=1)["cosine"]
    return ids[:, 0].tolist()


def donors(questions: list[dict], seed: int) -> list[int | None]:
    """For each question the index of a random other one of the same path, with another bridge and
    another answer, or None if there is none."""
    rng, chosen = random.Random(f"{seed} donors"), []
    for a in questions:
        others = []
        for j, b in enumerate(questions):
            differs = a["bridge"] != b["bridge"] and not is_right(b, a["example"].answers)
            if a["path"] == b["path"] and differs:
                others.append(j)
        chosen.append(rng.choice(others) if others else None)
    return chosen


def is_right(question: dict, answers: Sequence[str]) -> bool:
    """Whether one of the answers is right for the question."""
    return any(metrics.exact_match(a, question["example"].answers) for a in answers)


def read_bridges(model, tokenizer, questions: list[dict], ids: list[list[int]]) -> list[dict]:
    """What can be read at the end of every question, added to its dict.

    The positions are the last one of the question itself and those of the filler, if there is any.
    At each of them "first" is the likeliest token after the first pass, "vectors" (positions, C) is
    the Connector's output and "given" the token whose embedding is nearest to it. "token" is the
    first token of the bridge.
    """
    inputs = [q["example"].input for q in questions]
    alone = data.encode_prompts(tokenizer, inputs)
    texts = [f"{text} {q['bridge']}" for text, q in zip(inputs, questions)]
    count = 1 + min(len(row) - len(bare) for row, bare in zip(ids, alone))
    rows = []
    for q, row, bare, whole in zip(
        questions, ids, alone, data.encode_prompts(tokenizer, texts), strict=True
    ):
        h, given = (states[-count:] for states in hand_over(model, row))
        read = {"first": model.logits(h).argmax(-1).tolist(), "vectors": given}
        read |= {"given": nearest(model.lm, given), "token": whole[len(bare)]}
        rows.append(q | read)
    return rows


def holders(read: list[dict]) -> list[int]:
    """For each position, how many questions have their bridge there, as "first" or as "given"."""
    counts = [0] * len(read[0]["first"])
    for q in read:
        for i, tokens in enumerate(zip(q["first"], q["given"])):
            counts[i] += q["token"] in tokens
    return counts


def intervene(model, tokenizer, read: list[dict], ids, new: int, stops, seed: int) -> list[dict]:
    """Answers with the hand-over as it is, with that of a donor, and with the mean.

    Returns a row for each question: "own", "other" and "mean" are its answers if the hand-over is
    replaced at all positions; "donor" is the index of the other question. With filler, "other_one"
    and "mean_one" are the answers if it is replaced only at the position that holds the bridge most
    often. Without a donor, "donor" and the answers with it are None.
    """
    counts, chosen = holders(read), donors(read, seed)
    own = torch.stack([q["vectors"] for q in read])  # (B, positions, C)
    other = own[[b if donor is None else donor for b, donor in enumerate(chosen)]]
    mean, rows = own.mean(0).expand_as(own), [{"donor": donor} for donor in chosen]
    everywhere = range(-len(counts), 0)
    places = {"": everywhere}
    if len(counts) > 1:
        places["_one"] = [everywhere[counts.index(max(counts))]]
    cases = [("own", everywhere, own)]
    for name, at in places.items():
        cases += [(f"other{name}", at, other[:, at]), (f"mean{name}", at, mean[:, at])]
    for name, at, vectors in cases:
        texts = answers_with(model, tokenizer, ids, at, vectors, new, stops)
        for row, text in zip(rows, texts):
            row[name] = None if "other" in name and row["donor"] is None else text
    return rows
