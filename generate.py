"""Generation and scoring: prefill, sampling, n samples of one prompt, answer choices.

`lm` is a model.LM or anything with its interface, such as recurse.Stack over several passes. Its
prefix has the methods of model.Prefix: rows, row_lengths, select, preallocate and stack.

    prefill            reads every question, except its last token, into the KV cache
    sample_next_token  logits -> one token per row
    generate           prefill, then one token per step; finished rows leave the batch
    option_scores      log-probabilities of answer choices; each question is read once
    predict            answers as text, in batches

Needs torch, and only its command line needs other files of the project. Dimensions as in model.py.

    python generate.py assets/lm "Once upon a time"

continues the text and prints the mean negative log-probability of its tokens  (3 s)
"""

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """One continuation: its new token ids, including the eos that ended it, and their logprob.

    logprob is in nats, at temperature 1 and over the whole vocabulary, however it was sampled.
    """

    ids: list[int]
    logprob: float


def pad(ids: list[list[int]], device=None) -> tuple[Tensor, Tensor]:
    """Lists of token ids -> (B, T), padded on the right with zeros, and their lengths (B,)."""
    lengths = [len(row) for row in ids]
    T = max(lengths)
    padded = torch.tensor([row + [0] * (T - len(row)) for row in ids], device=device)
    return padded, torch.tensor(lengths, device=device)


def check_context(lm, ids: list[list[int]], prefix, max_new: list[int]) -> None:
    """ValueError if the prefix has a wrong number of rows, or if the prefix, tokens and new tokens
    of a question exceed the context."""
    B, limit = len(ids), lm.config.max_len
    if prefix is not None and prefix.rows not in (1, B):
        raise ValueError(f"the prefix has {prefix.rows} rows for {B} questions")
    prefix_lengths = [0] * B if prefix is None else prefix.row_lengths(B)
    for b, (P, row, new) in enumerate(zip(prefix_lengths, ids, max_new)):
        if P + len(row) + new - 1 > limit:  # the last new token is never fed back
            raise ValueError(
                f"question {b}: a prefix of {P}, {len(row)} tokens and {new} new ones exceed "
                f"the LM's context of {limit}"
            )


def check_ids(ids: list[list[int]], vocab_size: int) -> None:
    """ValueError if a question is empty or has a token outside the vocabulary."""
    if not ids:
        raise ValueError("no questions")
    for b, row in enumerate(ids):
        if not row:
            raise ValueError(f"question {b} is empty; it needs at least one token")
        for token in (min(row), max(row)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"question {b} has the token id {token}, outside the vocabulary of {vocab_size}"
                )


def stack_prefixes(prefix, B: int):
    """The prefix of a batch. A list with one prefix or None per question is joined into one."""
    if not isinstance(prefix, list):
        return prefix
    if len(prefix) != B:
        raise ValueError(f"{len(prefix)} prefixes for {B} questions")
    present = [p for p in prefix if p is not None]
    return present[0].stack(prefix) if present else None  # Prefix's or StackPrefix's


def prefill(lm, ids: list[list[int]], prefix, max_new: list[int]):
    """Reads all but the last token of every question. Returns (the last tokens (B, 1), cache).

    The caller feeds the last token, and gets from it the logits of the first new one. prefix is
    None, one for all, or a list of one per question. max_new, the number of tokens that may follow
    each question, only serves to check the context.
    """
    check_ids(ids, lm.config.vocab_size)
    prefix = stack_prefixes(prefix, len(ids))
    check_context(lm, ids, prefix, max_new)
    tokens, lengths = pad(ids, next(lm.parameters()).device)
    last = tokens.gather(1, lengths[:, None] - 1)
    if tokens.shape[1] == 1:
        return last, prefix
    # lengths - 1: the last token of a shorter row counts as padding.
    return last, lm.read(lm.embed(tokens[:, :-1]), prefix, lengths - 1)


def sample_next_token(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token id per row of logits (R, V).

    Temperature 0 takes the most likely token. Otherwise it samples: top_k keeps only the most
    likely tokens, and top_p then keeps the fewest most likely ones whose sum reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    if top_p is not None:  # a token stays if the probability of all likelier ones is below top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = (ordered.cumsum(-1) - ordered) >= top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_sampling(max_new_tokens, temperature, top_k, top_p, n) -> None:
    """ValueError if an argument of `generate` is out of range."""
    for name, value, valid in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < math.inf),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
        ("n", n, n >= 1),
    ):
        if not valid:
            raise ValueError(f"{name} cannot be {value}")


@torch.no_grad()
def generate(
    lm,
    ids: list[list[int]],
    prefix=None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n: int = 1,
    eos: int | list[int] | tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[Sample]]:
    """Continues each of B questions n times. Returns B lists of n Samples, new tokens only.

    ids     B non-empty lists of token ids, of any lengths
    prefix  None, one for all, or a list with a prefix or None per question
    eos     id or ids that end a continuation; its row then leaves the batch. None never stops early

    A question is read once, however many samples are drawn. Memory: 2 * K * D values per position,
    active row and layer (of every part of a Stack), with space for max_new_tokens. When finished
    rows are removed, the old and the new cache exist together for a moment.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, n)
    token, cache = prefill(lm, ids, prefix, [max_new_tokens] * len(ids))
    device, R = token.device, len(ids) * n
    eos_ids = torch.tensor(as_list(eos), dtype=torch.long, device=device)
    active = torch.arange(R, device=device)  # row i of the batch writes sample active[i]
    new_tokens = torch.full((R, max_new_tokens), -1, device=device)  # -1: not written
    logprob = torch.zeros(R, device=device)
    for step in range(max_new_tokens):
        h, cache = lm(lm.embed(token), cache, keep=True)
        logits = lm.logits(h[:, -1])
        if step == 0:  # until here the n samples of a question share one row
            rows = torch.arange(len(ids), device=device).repeat_interleave(n)
            logits, cache = logits[rows], cache.preallocate(rows, max_new_tokens - 1)
        token = sample_next_token(logits, temperature, top_k, top_p, generator)[:, None]
        new_tokens[active, step] = token[:, 0]
        logprob[active] += (logits.gather(1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]
        unfinished = ~torch.isin(token[:, 0], eos_ids)
        if not unfinished.any():
            break
        if not unfinished.all():
            active, token = active[unfinished], token[unfinished]
            cache = cache.select(unfinished.nonzero()[:, 0])
    samples = [
        Sample([token for token in row if token >= 0], value)
        for row, value in zip(new_tokens.tolist(), logprob.tolist())
    ]
    return [samples[b * n : (b + 1) * n] for b in range(len(ids))]


def as_list(eos: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """The end tokens as a list."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


@torch.no_grad()
def option_scores(lm, ids: list[list[int]], options, prefix=None, mean: bool = False):
    """Log-probabilities of answer choices: B float32 tensors, one value per option.

    options[b] is a list of non-empty lists of token ids. A score is the sum over an option's
    tokens, or with `mean` their mean. Each question is read only once.
    """
    if len(options) != len(ids) or not all(choices and all(choices) for choices in options):
        raise ValueError(
            f"{len(ids)} questions need as many non-empty lists of options, "
            "and every option at least one token"
        )
    longest = [max(len(option) for option in choices) for choices in options]
    last, cache = prefill(lm, ids, prefix, longest)
    counts = [len(choices) for choices in options]
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor(counts)).to(last.device)
    targets, lengths = pad([option for choices in options for option in choices], last.device)
    if cache is not None:
        cache = cache.select(rows)
    inputs = torch.cat([last[rows], targets[:, :-1]], dim=1)  # position t predicts target t
    logprobs = lm.logits(lm(lm.embed(inputs), cache)).log_softmax(-1)
    logprobs = logprobs.gather(2, targets[:, :, None])[:, :, 0]
    is_real = torch.arange(targets.shape[1], device=last.device) < lengths[:, None]
    scores = (logprobs * is_real).sum(1) / (lengths if mean else 1)
    return list(scores.split(counts))


def predict(lm, tokenizer, ids, prefix=None, max_new_tokens=16, options=None, batch_size=128):
    """Answers B questions as text, in batches of similar lengths. prefix: None or one for all.

    The answer is the greedy continuation. options[b] is a list of choices, each a list of token
    ids. If it is not empty, the answer is the choice with the highest sum of log-probabilities (as
    T0 ranks answers). Returns B strings.
    """
    options = options or [[] for _ in ids]
    # Every question is checked before the first is answered. No options: max_new_tokens follow.
    max_new = [max(map(len, choices), default=max_new_tokens) for choices in options]
    check_context(lm, ids, prefix, max_new)
    answers: list[list[int]] = [[] for _ in ids]
    by_length = sorted(range(len(ids)), key=lambda b: len(ids[b]))
    for chosen in chunks([b for b in by_length if not options[b]], batch_size):
        prompts = [ids[b] for b in chosen]
        continued = generate(lm, prompts, prefix, max_new_tokens, eos=lm.config.eos)
        for b, samples in zip(chosen, continued):
            answers[b] = samples[0].ids
    fewer = max(1, batch_size // 4)  # every option is a row of the batch
    for chosen in chunks([b for b in by_length if options[b]], fewer):
        prompts, choices = [ids[b] for b in chosen], [options[b] for b in chosen]
        for b, scores in zip(chosen, option_scores(lm, prompts, choices, prefix)):
            answers[b] = options[b][scores.argmax()]
    return [tokenizer.decode(tokens).strip() for tokens in answers]  # decode drops special tokens


def chunks(items: list[int], size: int):
    """Yields consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def main(argv: list[str] | None = None) -> dict:
    """Continues one text. Returns {"ids": the new tokens, "nats": the text's loss per token}."""
    parser = argparse.ArgumentParser(
        description="Continue a text with a published checkpoint, and print its loss per token."
    )
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = lambda message: parser.exit(2, f"generate.py: {message}\n")
    args = parser.parse_args(argv)

    from checkpoints import load_tokenizer
    from model import LM

    lm = LM.from_pretrained(args.model)
    tokenizer = load_tokenizer(lm.folder, lm.config.vocab_size)
    ids, rng = tokenizer.encode(args.text).ids, torch.Generator().manual_seed(args.seed)
    eos = lm.config.eos
    samples = generate(
        lm, [ids], None, args.max_new_tokens, args.temperature, eos=eos, generator=rng
    )
    new, nats = samples[0][0], math.nan
    if len(ids) > 1:  # the text after its first token
        nats = -option_scores(lm, [ids[:1]], [[ids[1:]]], mean=True)[0].item()
    print(args.text + tokenizer.decode(ids + new.ids)[len(tokenizer.decode(ids)) :])
    cost = -new.logprob / len(new.ids)
    print(f"[{nats:.4f} nats a token for the text, {cost:.4f} for the {len(new.ids)} new tokens]")
    return {"ids": new.ids, "nats": nats}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
