"""Training takes the fast path: one reading of a shared prompt, a first pass that is kept, batches
of similar lengths, logits at the targets. Here every method trains a second time on the plainest
path: each text alone, its prompt in front, every pass in every step, all logits, AdamW by hand."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny_runs import TRAINED, command, make_shelf, open_book_command, read_lines, run

import encoders
import fit
import start
import suite
import train
import world
from checkpoints import load_tokenizer
from data import Batch, collate, parse_record, tokenize
from model import LM, Config
from runs import ASSETS

STEPS = 50


def behind(prompt, lm, x):
    """The output at the text x (1, T, C), which the prompt (P, C) stands before."""
    return lm(torch.cat([prompt[None], x], dim=1))[:, len(prompt) :]


HIDDEN = {  # method: (lm, what is trained, x (1, T, C), the question's tokens) -> h (1, T, C)
    "prompt_tuning": lambda lm, prompt, x, _: behind(prompt(), lm, x),
    "textual_recursion": lambda lm, prompt, x, _: behind(prompt(), lm, x),
    "deep_prompt": lambda lm, prompt, x, _: lm(x, prompt()),
    "id_pt": lambda lm, generator, x, ids: behind(generator.prompts([ids])[0], lm, x),
    "neural_recursion": lambda lm, connector, x, _: lm(x + connector(lm(x))),
    "lm_connector": lambda lm, connector, x, _: lm(x) + connector(lm(x)),
    "connector_lm": lambda lm, connector, x, _: lm(x + connector(x)),
    "fine_tuning": lambda _, lm, x, __: lm(x),
}


def take_steps(trained, args, rates, loss_at):
    """Minimise loss_at(step). Returns the losses."""
    groups = [
        {"params": [p for p in trained.parameters() if p.dim() > 1]},
        {"params": [p for p in trained.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    decay, losses = args.weight_decay, []
    optimizer = torch.optim.AdamW(groups, 0.0, (0.9, args.beta2), 1e-6, decay, foreach=False)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), args.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_losses(method, task, trained):
    """The losses of all steps. `trained` is as it was before the first."""
    args, lm, tokens = task.args, task.lm, task.tokens["train"]
    lr = train.default_prompt_lr(lm, trained) if args.lr is None else args.lr
    linear = args.schedule == "linear"
    rates = [lr * (STEPS - step) / STEPS if linear else lr for step in range(STEPS)]

    def loss_at(step):
        loss, count = 0.0, 0
        for row in train.batches(task)(step).rows:
            example = tokens[row]
            ids = torch.tensor([(example.input + example.target)[:-1]])
            h = HIDDEN[method](lm, trained, lm.embed(ids), example.input)
            logprobs = lm.logits(h)[0].log_softmax(-1)
            first = len(example.input) - 1  # where the first token of the target is predicted
            for t, token in enumerate(example.target, first):
                loss = loss - logprobs[t, token]
                count += 1
        return loss / count

    return take_steps(trained, args, rates, loss_at)


def plain_padding(task):
    """The share of a run's positions that pad a text to the longest one of its batch."""
    real, padded = 0, 0
    for step in range(STEPS):
        examples = [task.tokens["train"][row] for row in train.batches(task)(step).rows]
        lengths = [len(e.input) + len(e.target) - 1 for e in examples]
        real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
    return 1 - real / padded


@pytest.mark.parametrize("method", TRAINED)
def test_the_fast_path_trains_as_the_plainest_path(place, monkeypatch, method):
    """A frozen reader is trained as prompt tuning is, by the same function."""
    seen = []

    def spy(task, trained, **rest):
        lm, initial = task.lm, copy.deepcopy(trained)
        record = train_adapter(task, trained=trained, **rest)
        seen.append((task, lm if trained is not lm else initial, initial))
        return record

    train_adapter = train.train_adapter
    monkeypatch.setattr(train, "train_adapter", spy)
    flags = f"--steps {STEPS} --eval-every {STEPS} --no-cross-fit"
    flags += " --residual on" if method in ("neural_recursion", "lm_connector") else ""
    record = run(command(place, method, place / method, flags))
    task, lm, initial = seen[-1]
    losses = [row["loss"] for row in read_lines(place / method / "metrics.jsonl")]
    plain = plain_losses(method, SimpleNamespace(**vars(task) | {"lm": lm}), initial)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    torch.testing.assert_close(losses, plain, atol=2e-4, rtol=2e-4)
    assert record["padding"] == round(plain_padding(task), 4) > 0


@pytest.fixture(scope="module")
def shelf(place):
    """Its BERT has no dropout."""
    config = make_shelf(place) / "bert" / "model" / "config.json"
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | dropout))
    return place


def rerank_plainly(encoder, batch):
    """Equations 3 to 5 of Levine et al. (2022)."""
    loss = 0.0
    for group, spans in zip(batch.groups.tolist(), batch.spans.tolist()):
        rows = [row for row in group if row >= 0]
        alone = [batch.ids[row : row + 1, : batch.lengths[row]] for row in rows]
        read = [encoder(ids, torch.tensor([ids.shape[1]]), spans=True) for ids in alone]
        loss = loss - torch.cat([rank for rank, _ in read]).log_softmax(0)[0]
        start, end = read[0][1][0].softmax(0).unbind(1)
        places = [(first, last) for first, last in spans if first >= 0]
        loss = loss - sum(start[first] * end[last] for first, last in places).log()
    return loss


def retrieve_plainly(dual, batch):
    """Each question chooses among the passages of all."""

    def vector(bert, ids, length):
        return dual(bert, ids[None, :length], length[None])[0]

    passages = zip(batch.passage_ids, batch.passage_lengths)
    passages = [vector(dual.passage, *passage) for passage in passages]
    loss = 0.0
    for i, question in enumerate(zip(batch.ids, batch.lengths)):
        asked = vector(dual.question, *question)
        scores = [
            asked @ passage
            for row, passage in enumerate(passages)
            if row == batch.targets[i] or not batch.known[i, row]
        ]
        loss = loss + torch.stack(scores).logsumexp(0) - asked @ passages[batch.targets[i]]
    return loss


@pytest.mark.parametrize("method", ["reranker", "retriever"])
def test_an_encoder_trains_as_on_the_plainest_path(shelf, monkeypatch, method):
    """Each question and each passage alone. The rate warms up for a tenth of the steps."""
    seen, fast = [], encoders.fit

    def spy(run, recipe, trained, batch_at, *rest):
        seen.append((copy.deepcopy(trained), [batch_at(step) for step in range(16)]))
        return fast(run, recipe, trained, batch_at, *rest)

    monkeypatch.setattr(encoders, "fit", spy)
    flags = "--steps 16 --eval-every 16 --lr 0.02"
    flags += " --group-size 4" if method == "reranker" else ""
    line = open_book_command(shelf, method, shelf / method, flags)
    record = run(line)
    (trained, batches), args = seen[0], train.parse(line[1:])
    losses = [row["loss"] for row in read_lines(shelf / method / "metrics.jsonl")]
    rates = [0.01, 0.02, *(0.02 * (16 - step) / 14 for step in range(2, 16))]
    plainly = rerank_plainly if method == "reranker" else retrieve_plainly

    def loss_at(step):
        return plainly(trained, batches[step]) / len(batches[step].rows)

    plain = take_steps(trained, args, rates, loss_at)
    torch.testing.assert_close(losses, plain, atol=2e-4, rtol=2e-4)
    assert losses[-1] < losses[0] and record["arguments"]["weight_decay"] == 0


def test_logits_in_parts_have_the_loss_and_gradient_of_all(monkeypatch):
    """At most 128 MiB of logits: here 2**25 / V of 36 targets."""
    V = 2**20
    lm = LM(Config(V, 4, 1, 1, 1, 4, 8, 64)).requires_grad_(False)
    ids = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.full((4,), 9), ids.roll(-1, 1), [0, 1, 2, 3])
    sizes, logits = [], lm.logits
    monkeypatch.setattr(lm, "logits", lambda h: sizes.append(len(h)) or logits(h))
    x = lm.embed(ids).requires_grad_()
    loss = fit.target_loss(lm, None, batch, x)
    loss.backward()
    assert sizes == [32, 4, 32, 4] or sizes == [32, 4, 4, 32]
    gradient, x.grad = x.grad, None
    whole = F.cross_entropy(logits(lm(x)).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    whole.backward()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, x.grad)


def test_little_of_a_step_on_the_suite_is_padding():
    """Over its own lengths, at the default batch size and mixture."""
    place, tokenizer = world.make(1), load_tokenizer(ASSETS / "lm")
    rows = [row for name in suite.TASKS for row in suite.rows(place, name, "train", 100)]
    examples = [parse_record(row, f"{i}") for i, row in enumerate(rows)]
    tokens = tokenize(examples, tokenizer, 0, 512)
    groups, counts = start.template_rates(examples, start.SUITE_DEFAULTS["mixture_cap"])
    batches = [start.mixture_batch(tokens, groups, counts, 32, 0, step) for step in range(40)]

    def padding(batches):
        real = sum(int(batch.lengths.sum()) for batch in batches)
        return 1 - real / sum(batch.ids.numel() for batch in batches)

    assert padding(batches) < 0.05
    assert padding([collate(tokens[i::60][:32], []) for i in range(40)]) > 0.2  # in any order
