"""What the first pass of a neural recursion hands over to the second, and what follows from it.

    two_hop         the two-hop questions of the embedded world, with the bridge of each: the answer
                    to the first hop
    read_bridges    what the vocabulary and the table of embeddings read where a question ends
    intervene       the answers if another question's hand-over, or the mean, takes its place

The hand-over is the Connector's output. If filler follows a question (--pause), there is more
than one position at which the bridge can be handed over.

Needs recurse.py, prompts.py, generate.py, world.py, data.py and eval.py. The command is
of audit.py.

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
        if (e.id, e.input) not in facts:
            raise ValueError(f"{e.source}: is no question of the world {made.seed}")
        path, subject = facts[e.id, e.input]["relation"], facts[e.id, e.input]["subject"]
        if "." in path:
            bridge = made.answer(subject, path.split(".")[0])
            found.append({"row": row, "example": e, "path": path, "bridge": bridge})
    return found


@torch.no_grad()
def hand_over(model, ids: list[int]) -> tuple[Tensor, Tensor]:
    """What a question of T tokens leads to in the first two parts, the LM and the Connector.

    model  a Stack; ids are the question's, with those of the filler behind it
    Returns (the first pass's last hidden states (T, C), the Connector's output (T, C)). The second
    pass reads this output, or if it is residual, the question's embeddings plus this output.
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

    def forward(self, x: Tensor, prefix=None, keep: bool = False):
        """As the Connector's."""
        h, extended = self.connector(x, prefix, keep=True)
        first = 0 if prefix is None else prefix.size  # the position of x[:, 0]
        for i, position in enumerate(self.at):
            if first <= position < first + x.shape[1]:  # not when the answer is continued
                h[:, position - first] = self.vectors[:, i]
        return (h, extended) if keep else h


@torch.no_grad()
def answers_with(model, tokenizer, ids, at, vectors: Tensor, new: int, stops) -> list[str]:
    """The greedy answers to B questions if the Connector gives `vectors` (B, len(at), C).

    at  positions, counted from the end of a question: -1 is the last. Other positions, before and
        behind it, stay as they are
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
    """For each question another one of the same path, with another bridge and another answer."""
    rng, chosen = random.Random(f"{seed} donors"), []
    for a in questions:
        others = []
        for j, b in enumerate(questions):
            differs = a["bridge"] != b["bridge"] and not same(b, a["example"].answers)
            if a["path"] == b["path"] and differs:
                others.append(j)
        chosen.append(rng.choice(others) if others else None)
    return chosen


def same(question: dict, answers: Sequence[str]) -> bool:
    """Whether one of the answers is right for the question."""
    return any(metrics.exact_match(a, question["example"].answers) for a in answers)


def read_bridges(model, tokenizer, questions: list[dict], ids: list[list[int]]) -> list[dict]:
    """What stands at the end of every question, added to its dict.

    The positions are the last one of the question itself and those of the filler, if there is any.
    For each, "first" is the vocabulary's reading of the first pass, "given" the embedding nearest
    to the Connector's output, "vectors" (positions, C) this output. "token" is the first token of
    the bridge.
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
    """How many questions' bridges each position holds: as read from the first pass, or given."""
    counts = [0] * len(read[0]["first"])
    for q in read:
        for i, tokens in enumerate(zip(q["first"], q["given"])):
            counts[i] += q["token"] in tokens
    return counts


def intervene(model, tokenizer, read: list[dict], ids, new: int, stops, seed: int) -> list[dict]:
    """Answers with the hand-over as it is, with that of a donor, and with the mean.

    Returns rows {"own", "other", "mean": the answers, "donor": its index}, where the hand-over is
    replaced at all positions. If there is filler, "other_one" and "mean_one" are the answers if it
    is replaced only where the bridge is held most often. "other" and "donor" are None if there is
    no donor.
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
