"""Generation and scoring: prefill, sampling, n samples of one prompt, answer choices.

`lm` is a model.LM or anything with its interface, such as recurse.Stack over several passes. Of
its prefix these are used: rows, lengths, layers, row_lengths, select and stack (model.Prefix). To
decode, it must extend its cache by Prefix.joined, as model.Attention does.

    prefill            reads every question, except its last token, into the KV cache
    sample_next_token  logits -> one token per row
    generate           greedy continuations, or n samples of each question
    sample_answers     n samples of each question, each with random numbers of its own
    option_scores      log-probabilities of answer choices; each question is read once
    predict            answers: texts, or choices among options; in batches within a memory budget

Needs torch. For new tokens it needs cache.py and model.py, on a GPU also replay.py, and for the
command line other files of the project. Dimensions as in model.py.

    python generate.py assets/lm "Once upon a time"

continues the text and prints the mean negative log-probability of the tokens that it read (3 s). It
also takes the folder of a run in place of a checkpoint.
"""

if __name__ == "__main__":
    import show  # before torch: it sets how threads wait

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

GRAPH_DEVICES = ("cuda",)  # devices on which `decode` replays a graph, see replay.py


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
    """ValueError if prefix, tokens and new tokens of a question exceed the context."""
    limit = lm.config.max_len
    for b, (P, row, new) in enumerate(zip(prefix_lengths(prefix, len(ids)), ids, max_new)):
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


def prefix_lengths(prefix, B: int) -> list[int]:
    """The number of prefix positions before each of B questions. ValueError if its rows are neither
    1 nor B."""
    if isinstance(prefix, list):
        if len(prefix) != B:
            raise ValueError(f"{len(prefix)} prefixes for {B} questions")
        return [prefix_lengths(p, 1)[0] for p in prefix]
    if prefix is None:
        return [0] * B
    if prefix.rows not in (1, B):
        raise ValueError(f"the prefix has {prefix.rows} rows for {B} questions")
    return prefix.row_lengths(B)


def stack_prefixes(prefix, ids: list[list[int]]):
    """The prefix of a batch of questions: None, or one for all, or one row each.

    A recurse.GeneratedPrefix depends on the questions and is computed here. A list holds a prefix
    or None per question, of any kinds and lengths, and is joined into one. A GeneratedPrefix that
    stands in it several times is computed once, for all of its questions.
    """
    if callable(prefix):
        return prefix(ids)
    if not isinstance(prefix, list):
        return prefix
    rows = list(prefix)
    for generated in {id(p): p for p in prefix if callable(p)}.values():
        own = [b for b, p in enumerate(prefix) if p is generated]
        whole = generated([ids[b] for b in own])
        for i, b in enumerate(own):
            rows[b] = whole.select(torch.tensor([i]))
    present = [p for p in rows if p is not None]
    return present[0].stack(rows) if present else None


def prefill(lm, ids: list[list[int]], prefix, max_new: list[int]):
    """Reads all but the last token of every question. Returns (the last tokens (B, 1), cache).

    The caller feeds the last token, whose logits give the first new one. prefix: see
    `stack_prefixes`. max_new: how many tokens may follow each question, to check the context.
    """
    check_ids(ids, lm.config.vocab_size)
    check_context(lm, ids, prefix, max_new)
    prefix = stack_prefixes(prefix, ids)
    tokens, lengths = pad(ids, next(lm.parameters()).device)
    last = tokens.gather(1, lengths[:, None] - 1)
    if tokens.shape[1] == 1:
        return last, prefix
    # lengths - 1: the last token of a shorter row counts as padding.
    return last, lm.read(lm.embed(tokens[:, :-1]), prefix, lengths - 1)


def sample_next_token(logits: Tensor, temperature: float, top_k, top_p, generator, row=None):
    """A token id for each row of logits (R, V), or for each of the rows named in row (S,). Returns
    (R,) or (S,).

    Temperature 0 takes the most likely token. Otherwise it samples: top_k keeps only the most
    likely tokens, and top_p then keeps the fewest most likely ones whose sum reaches top_p.
    """
    row = torch.arange(len(logits), device=logits.device) if row is None else row
    # Division by less could overflow float32. At 1e-20 sampling is greedy already: of two logits
    # that differ by 1e-17, only the larger one can be sampled.
    if temperature < 1e-20:
        return logits.argmax(-1)[row]
    logits = logits if temperature == 1 else logits / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    if top_p is not None:  # a token stays if the probability of all likelier ones is below top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = (ordered.cumsum(-1) - ordered) >= top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    from cache import inverse_cdf

    u = torch.rand(len(row), dtype=torch.float64, device=row.device, generator=generator)
    return inverse_cdf(logits, row, u)


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
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[Sample]]:
    """Continues each of B questions n times. Returns B lists of n Samples, new tokens only.

    ids     B non-empty lists of token ids, of any lengths
    prefix  None, one for all, or a list with a prefix or None per question
    eos     id or ids that end a continuation; its row then leaves the batch. None never stops early
    ended   a function of the question's number and the tokens so far; True ends a continuation

    A question is read once, however many samples are drawn, and samples whose tokens are the same
    so far are one row. Memory: a position of the cache has 2 * K * D values per layer (of every
    part of a Stack). For each question there are those of the prefix and of the longest question,
    and max_new_tokens for each of its samples; at most the questions' are there twice. A prefix
    that the caller keeps comes on top. Where replay.py decodes, on a GPU, each sample is a row and
    has its question's positions for itself.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, n)

    def draw(logits: Tensor, row: Tensor, active: Tensor, step: int) -> Tensor:
        return sample_next_token(logits, temperature, top_k, top_p, generator, row)

    return decode(lm, ids, prefix, max_new_tokens, n, eos, draw, ended)


@torch.no_grad()
def sample_answers(
    lm,
    ids: list[list[int]],
    n: int,
    seeds: list[int],
    prefix=None,
    max_new_tokens: int = 16,
    eos: int | list[int] | tuple[int, ...] | None = None,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[Sample]]:
    """Samples n answers to each of B questions at temperature 1, as `generate` returns them.

    seeds  B seeds. The random numbers of sample i of a question depend on its seed, on i and on
           max_new_tokens alone, so neither the questions beside it nor n change it (beyond float32
           rounding)

    The other arguments are those of `generate`.
    """
    from cache import inverse_cdf

    check_sampling(max_new_tokens, 1.0, None, None, n)
    if len(seeds) != len(ids):
        raise ValueError(f"{len(seeds)} seeds for {len(ids)} questions")
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: all devices alike
    numbers = [torch.rand(n, max_new_tokens, generator=rng) for rng in rngs]
    numbers = torch.cat(numbers).double()  # (B * n, max_new_tokens), in [0, 1)

    def draw(logits: Tensor, row: Tensor, active: Tensor, step: int) -> Tensor:
        return inverse_cdf(logits, row, numbers[active.cpu(), step].to(logits.device))

    return decode(lm, ids, prefix, max_new_tokens, n, eos, draw, ended)


def decode(lm, ids, prefix, max_new_tokens: int, n: int, eos, draw, ended) -> list[list[Sample]]:
    """One token per step. Samples that agree so far share one row, except in replay.py.

    draw  (logits (R, V), row (S,), active (S,), step) -> the next token (S,) of each of the S
          samples that go on: `active` holds their numbers, `row` the row of each
    """
    token, cache = prefill(lm, ids, prefix, [max_new_tokens] * len(ids))
    make_steps, merges = choose_steps(lm, token.device.type, max_new_tokens, n)
    device, samples = token.device, [Sample([], 0.0)] * (len(ids) * n)
    eos_ids = torch.tensor(as_list(eos), dtype=torch.long, device=device)
    active = torch.arange(len(ids) * n, device=device)  # numbers of the samples that go on
    row = active // n  # of each of these samples: its row of the cache
    texts = [(b, []) for b in range(len(ids))]  # of each row: its question and its new tokens
    logprob = torch.zeros(len(ids), device=device)  # of each row: the sum over its new tokens
    steps = None
    for step in range(max_new_tokens):
        if steps is None:
            h, cache = lm(lm.embed(token), cache, keep=True)
            logits = lm.logits(h[:, -1])  # (R, V)
        else:
            logits = steps(token)
        V = logits.shape[1]
        pairs = row * V + draw(logits, row, active, step)  # (row, new token) as one number
        if merges:  # samples of one row that drew the same token stay one row
            pairs, row = pairs.unique(return_inverse=True)  # the new rows, ordered by their parents
        else:
            row = torch.arange(len(pairs), device=device)
        parent, token = pairs // V, pairs % V  # parent: the row before
        logprob = logprob[parent] + logits.log_softmax(-1)[parent, token]
        texts = [(texts[i][0], [*texts[i][1], t]) for i, t in zip(parent.tolist(), token.tolist())]
        done = torch.isin(token, eos_ids)
        if ended is not None:
            done |= torch.tensor([ended(b, tokens) for b, tokens in texts], device=device)
        done |= step == max_new_tokens - 1
        values = logprob.tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError("logits that are not finite")
        for i, r in zip(active[done[row]].tolist(), row[done[row]].tolist()):
            samples[i] = Sample(texts[r][1], values[r])
        if done.all():
            break
        kept = (~done).nonzero()[:, 0]  # the rows that go on
        kept = kept[order_in_place(parent[kept])]
        if steps is None:
            steps, cache = make_steps(lm, cache, parent[kept], max_new_tokens - 1), None
        else:
            steps.keep(parent[kept])
        place, goes_on = torch.empty_like(parent), ~done[row]
        place[kept] = torch.arange(len(kept), device=device)  # of a new row: its index in the cache
        active, row = active[goes_on], place[row[goes_on]]
        token, logprob = token[kept, None], logprob[kept]
        texts = [texts[r] for r in kept.tolist()]
    return [samples[b * n : (b + 1) * n] for b in range(len(ids))]


def choose_steps(lm, device: str, max_new_tokens: int, n: int):
    """(what makes the steps after the first, whether samples that agree are one row in them)."""
    if device in GRAPH_DEVICES:
        from replay import Replayed, can_replay

        if can_replay(lm, max_new_tokens):
            return Replayed, False
    from cache import Steps

    return partial(Steps, n=n), True


def order_in_place(parents: Tensor) -> Tensor:
    """Order new rows so that as many as possible keep the index of their parent: the cache then
    copies few rows. parents (R,): the row that each continues, equal ones together. -> (R,)"""
    places = torch.arange(len(parents), device=parents.device)
    stay = parents < len(parents)
    stay[1:] &= parents[1:] != parents[:-1]  # of several children, the first
    place = parents.clone()
    place[~stay] = places[~torch.isin(places, parents[stay])]
    return place.argsort()


def as_list(eos: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """The end tokens as a list."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


@torch.no_grad()
def option_scores(lm, ids: list[list[int]], options, prefix=None, mean=False, max_rows=None):
    """Log-probabilities of answer choices: B float32 tensors, one value per option.

    options[b] is a list of non-empty lists of token ids. A score is the sum over an option's
    tokens, or with `mean` their mean. Each question is read only once. Every option is a row, with
    its question's cache; at most `max_rows` rows (None: all) are computed at a time.
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
    is_real = torch.arange(targets.shape[1], device=last.device) < lengths[:, None]
    scores = []
    for part in torch.arange(len(rows), device=last.device).split(max_rows or len(rows)):
        question = rows[part]
        part_cache = None if cache is None else cache.select(question)
        inputs = torch.cat([last[question], targets[part, :-1]], dim=1)  # position t predicts t
        h = lm(lm.embed(inputs), part_cache)  # (rows, T, C)
        logprobs = torch.zeros(inputs.shape, device=last.device)
        real = is_real[part]
        logprobs[real] = token_logprobs(lm, h[real], targets[part][real])
        scores.append(logprobs.sum(1) / (lengths[part] if mean else 1))
    return list(torch.cat(scores).split(counts))


def token_logprobs(lm, h: Tensor, targets: Tensor) -> Tensor:
    """h (R, C) and the tokens that follow (R,) -> their log-probabilities (R,).

    Of large vocabularies the logits are the largest tensor, so only 128 MiB exist at a time.
    """
    size, logprobs = max(1, 2**25 // lm.config.vocab_size), []
    for part, target in zip(h.split(size), targets.split(size)):
        logits = lm.logits(part)
        logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(logprobs)


def predict(
    lm,
    tokenizer,
    ids: list[list[int]],
    prefix=None,
    max_new_tokens: int = 16,
    options=None,
    stops: list[str] | None = None,
    max_tokens: int = 8192,
    batch_size: int = 128,
    mean: bool = False,
    logprobs: bool = False,
) -> list:
    """Answers B questions in batches of similar lengths. prefix: None, one for all, or a list of
    one per question, so that questions of different tasks share batches.

    Without options the answer is a text: the greedy continuation before an eos of the LM or before
    stops[b] ("" for none). options[b] is a list of choices, each a list of token ids. If it is not
    empty, the answer is the index of the choice with the highest sum of log-probabilities (as T0
    ranks answers), or with `mean` the highest mean over its tokens.

    With `logprobs` it returns pairs (answer, log-probability), an end token's included.

    A batch has at most batch_size rows and max_tokens positions: rows times (longest prefix +
    longest question + most new tokens). Every option is a row.
    """
    if getattr(prefix, "rows", 1) != 1:  # batches take the questions in another order
        raise ValueError("a prefix of several rows: predict takes a list, one for each question")
    options = options or [[] for _ in ids]
    stops = stops or [""] * len(ids)
    # Questions are checked before the first is answered. No options: max_new_tokens follow.
    max_new = [max(map(len, choices), default=max_new_tokens) for choices in options]
    if ids:
        check_ids(ids, lm.config.vocab_size)
    check_context(lm, ids, prefix, max_new)
    lengths = list(zip(prefix_lengths(prefix, len(ids)), map(len, ids), max_new))
    rows = [max(1, len(choices)) for choices in options]
    groups = {}  # (whether it has options, its stop): the questions, the shortest first
    for b in sorted(range(len(ids)), key=lambda b: lengths[b]):
        groups.setdefault((bool(options[b]), "" if options[b] else stops[b]), []).append(b)
    answers: list = [("", 0.0)] * len(ids)
    for (chooses, stop), group in groups.items():
        for batch in batches(group, rows, lengths, batch_size, max_tokens):
            prompts = [ids[b] for b in batch]
            before = [prefix[b] for b in batch] if isinstance(prefix, list) else prefix
            if chooses:  # one question's options may exceed the budget
                width = sum(map(max, zip(*(lengths[b] for b in batch))))
                max_rows = max(1, min(batch_size, max_tokens // width))
                choices = [options[b] for b in batch]
                scores = option_scores(lm, prompts, choices, before, mean, max_rows)
                found = [(row.argmax().item(), row.max().item()) for row in scores]
            else:
                found = continue_texts(lm, tokenizer, prompts, before, max_new_tokens, stop)
            for b, answer in zip(batch, found):
                answers[b] = answer
    return answers if logprobs else [answer for answer, _ in answers]


def continue_texts(lm, tokenizer, ids, prefix, max_new_tokens: int, stop: str) -> list:
    """The greedy continuations, which end before `stop` ("" for none) or an eos of the LM.

    Returns pairs (text, log-probability of its tokens).
    """

    def has_stop(_, tokens: list[int]) -> bool:
        return find_stop(tokenizer.decode(tokens), stop) is not None

    eos, ended, texts = lm.config.eos, has_stop if stop else None, []
    for (sample,) in generate(lm, ids, prefix, max_new_tokens, eos=eos, ended=ended):
        text = tokenizer.decode(drop_eos(sample.ids, eos))  # decode drops special tokens
        texts.append((text[: find_stop(text, stop)].strip(), sample.logprob))
    return texts


def find_stop(text: str, stop: str) -> int | None:
    """Where `stop` begins in an answer, or None. Spaces before the answer are not a stop."""
    spaces = len(text) - len(text.lstrip(" "))
    # A stop that begins with spaces may overlap these by all but its last letter.
    index = text.find(stop, max(0, spaces - len(stop) + 1)) if stop else -1
    return None if index < 0 else index


def drop_eos(ids: list[int], eos) -> list[int]:
    """The tokens without the eos that ended them. A tokenizer need not know that it is special."""
    return ids[:-1] if ids and ids[-1] in as_list(eos) else ids


def batches(order: list[int], rows, lengths, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Cuts the questions `order` into batches of at most max_rows rows and max_tokens positions.

    Question b has rows[b] rows; lengths[b] are the lengths of its prefix, text and answer. A row is
    as wide as the longest of the three together. What exceeds a limit alone is a batch of its own.
    """
    batch, count, longest = [], 0, (0, 0, 0)
    for b in order:
        count, longest = count + rows[b], tuple(map(max, longest, lengths[b]))
        if batch and (count > max_rows or count * sum(longest) > max_tokens):
            yield batch
            batch, count, longest = [], rows[b], lengths[b]
        batch.append(b)
    if batch:
        yield batch


def main(argv: list[str] | None = None) -> dict:
    """Continues one text. Returns {"ids": the new tokens, "nats": the text's loss per token}."""
    from show import SEED, Parser, number_type, show

    from questions import load_text

    description = "Continue a text with a published checkpoint or a run, and print its loss."
    parser = Parser(prog="generate.py", description=description)
    parser.add_argument("model", help="checkpoint folder, hub id, or run folder")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    one = "neural_recursion: keep what one pass writes if its log-probability is at least this"
    parser.add_argument("--threshold", type=number_type(float, -math.inf), help=one)
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args(argv)

    model, prefix, tokenizer, ids = load_text(args.model, args.text, args.max_new_tokens)
    tries = [(model, prefix)]
    if args.threshold is not None:
        from recurse import check_stack

        check_stack(model)
        tries = [(model.lm, model.prefix_of(0, prefix)), *tries]  # the first pass alone, then all
    eos, length = model.config.eos, args.max_new_tokens
    for model, prefix in tries:
        rng = torch.Generator().manual_seed(args.seed)
        new = generate(model, [ids], prefix, length, args.temperature, eos=eos, generator=rng)[0][0]
        if args.threshold is not None and new.logprob >= args.threshold:
            break
    nats = math.nan
    end = getattr(model, "first_filler", math.inf)  # filler that is trained has no logits
    text = [token for token in ids if token < end]
    if len(text) > 1:  # the text after its first token
        nats = -option_scores(model, [text[:1]], [[text[1:]]], prefix, mean=True)[0].item()
    whole = tokenizer.decode(ids + drop_eos(new.ids, eos))
    show(args.text + whole[len(tokenizer.decode(ids)) :], result=True)
    cost = -new.logprob / len(new.ids)
    read = "" if math.isnan(nats) else f"{nats:.4f} nats a token that was read, "
    line = f"[{read}{cost:.4f} nats for each of the {len(new.ids)} new tokens]"
    show(line, result=True)
    return {"ids": new.ids, "nats": nats}


if __name__ == "__main__":
    show.run_program("generate.py", main)
