"""Continued pretraining that makes an LM easier to prompt, and what a few examples then teach.

Wu et al. 2022, "Continued Pretraining for Better Zero- and Few-Shot Promptability", train an LM
(T), a prompt (P) or both on many tasks, so that prompts of other tasks need few examples.
`VARIANTS` lists what they compare: what is trained, and by which gradient. The three gradients
differ in a line or two:

    mtl        the gradient on a task
    fomaml     k steps of the prompt on the task, then the gradient  (Finn et al. 2017, first order)
    reptile    k steps of the prompt, then one of all parameters; the displacement is the gradient
                                                                     (Nichol et al. 2018)

    python transfer.py continue --variant reptile --train world/suite --out runs/reptile
    python transfer.py few-shot --model runs/reptile/model --init runs/reptile \\
        --train world/suite/record_nli-train.jsonl --test world/suite/record_nli-test.jsonl

Where paper and code differ, a flag decides. Its default, and why:

- --support different: each inner step reads other examples of the task, as the paper says and as
  the code does for Reptile. `same`, the code's setting of FOMAML: all read one half of the batch.
- --inner-state carried: Adafactor's moments in the inner loop go on from task to task, as in the
  code. The few steps of one task are too few to estimate them. The paper does not mention it.
- --rank-by sum: an answer choice is ranked by its log-probability, as by T0 and by all other
  programs here. The code of Wu et al. takes the mean over the choice's tokens.
- --limit caps the examples of each template, as in the code. The paper and T0 cap those of a
  data set, divided among its templates; this needs no count of them.
- --input-eos is off, as in T0: a decoder reads EOS as the end of a text. The code, for T5, adds it.

Some things differ from both. Each batch is of one task, for all variants, so that they read the
same batches; Wu et al. mix tasks in the batches of all but the meta-learners. A deep prompt is keys
and values (Li & Liang 2021), not hidden vectors that go through a layer's projections. There is no
dropout (T5: 0.1), an input that exceeds the context is refused instead of cut, and Adafactor's
second moments are not factored.

A run's folder holds the trained LM in model/, and its prompt. Few-shot tuning at the paper's
learning rate of 0.001 moves the numbers of the prompt by at most 0.1 in 100 steps (root mean
square). The default is 0.1.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from show import show

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import adapters
import cli  # the flags that programs share
import data
import eval as metrics
import start
import train
from checkpoints import read_json, write_json, write_lines
from data import IGNORE_INDEX, Batch
from fit import Adafactor, Recipe, autocast, fit, target_loss
from model import LM
from prompts import folder_name
from questions import check_unique
from recurse import COMPOSITIONS
from runs import Run, read_predictions, start_record

# The gradients


def mtl(learner: "Learner", batch: Batch) -> Tensor:
    """Multi-task learning: the gradient of the loss."""
    return learner.gradient(batch, learner.everything)


def fomaml(learner: "Learner", batch: Batch) -> Tensor:
    """First-order MAML: the gradient after the prompt has adapted to the task. It does not go
    through the inner steps."""
    *support, query = learner.split(batch)
    for part in support:
        learner.step(part, learner.prompt_only)
    return learner.gradient(query, learner.everything)


def reptile(learner: "Learner", batch: Batch) -> Tensor:
    """Reptile as Wu et al. adapt it: the last step moves all parameters. The displacement is the
    gradient, not divided by the inner learning rate."""
    *support, query = learner.split(batch)
    theta = learner.vector()
    for part in support:
        learner.step(part, learner.prompt_only)
    learner.step(query, learner.everything)
    return theta - learner.vector()


VARIANTS = {  # name: (what is trained: T the LM, P a prompt; its gradient)
    "t0": ("T", mtl),  # no prompt (Sanh et al. 2022)
    "ppt": ("P", mtl),  # the LM is frozen (in the manner of Gu et al. 2022)
    "mtl": ("TP", mtl),
    "fomaml": ("TP", fomaml),
    "reptile": ("TP", reptile),
}


class Learner(nn.Module):
    """What is trained, and the inner loop. lm is None if frozen, prompt None if there is none.

    All parameters together are handled as one vector (N,).

    support      "different": every inner step reads its own part of the batch. "same": all of them
                 read its first half.
    inner_state  "carried": the moments of the inner Adafactor go on from task to task. "reset":
                 each task begins with none. They are stored as parameters without gradient, so the
                 checkpoints of a run hold them.
    """

    def __init__(
        self,
        lm: nn.Module | None,
        prompt: nn.Module | None,
        variant: Callable[["Learner", Batch], Tensor],
        inner_steps: int = 7,
        inner_lr: float = 1e-3,
        inner_optimizer: str = "adafactor",
        inner_state: str = "carried",
        support: str = "different",
    ):
        super().__init__()
        self.lm, self.prompt, self.variant = lm, prompt, variant
        self.inner_steps, self.support, self.inner_state = inner_steps, support, inner_state
        self.everything = list(self.parameters())
        self.prompt_only = [] if prompt is None else list(prompt.parameters())
        self.mean_loss: Callable[[Batch], Tensor] | None = None  # `add_gradient` sets it
        self.moments = nn.ParameterList()
        adafactor = inner_optimizer == "adafactor"
        self.inner = (Adafactor if adafactor else torch.optim.SGD)(self.everything, inner_lr)
        for p in self.everything if adafactor and variant is not mtl else ():
            step, square = p.new_zeros(()).float(), torch.zeros_like(p).float()
            self.moments.extend(nn.Parameter(m, requires_grad=False) for m in (step, square))
            self.inner.state[p] = {"step": self.moments[-2], "square": self.moments[-1]}

    def vector(self) -> Tensor:
        """A copy of all parameters, (N,)."""
        return torch.cat([p.detach().flatten() for p in self.everything])

    def set_vector(self, vector: Tensor) -> None:
        """Give all parameters the values of a vector (N,)."""
        for p, values in zip(self.everything, like(vector, self.everything)):
            p.data.copy_(values)

    def gradient(self, batch: Batch, parameters: list) -> Tensor:
        """The gradient of `mean_loss` by some parameters, as one vector."""
        loss = self.mean_loss(batch)
        self.loss = loss.item()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    def step(self, batch: Batch, parameters: list) -> None:
        """One step of the inner optimiser by some parameters. The others stay."""
        for p, g in zip(parameters, like(self.gradient(batch, parameters), parameters)):
            p.grad = g
        self.inner.step()
        self.inner.zero_grad()

    def split(self, batch: Batch) -> list[Batch]:
        """The batches of the inner steps and, last, that of the query, all of one size."""
        k, same = self.inner_steps, self.support == "same" and self.inner_steps > 0
        parts = split_rows(batch, 2 if same else k + 1)
        return [parts[0]] * k + parts[1:] if same else parts


def like(vector: Tensor, parameters: list) -> list[Tensor]:
    """A vector as one tensor for each parameter, of its shape."""
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters)]


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` batches of one size. ValueError if its rows cannot be shared out."""
    size, rest = divmod(len(batch.rows), parts)
    if rest:
        raise ValueError(f"--batch-size: {len(batch.rows)} rows cannot be split into {parts} parts")
    return [batch.part(range(i * size, (i + 1) * size)) for i in range(parts)]


def add_gradient(learner: Learner, recipe: Recipe, loss_of, tasks: list[Batch]) -> float:
    """Add the variant's gradient, its mean over tasks, to the parameters' gradients.

    Every batch is a task. Each starts from the same parameters, which are the same afterwards.
    Returns the mean loss. `fit` describes recipe and loss_of.
    """

    def mean_loss(batch: Batch) -> Tensor:
        with autocast(recipe):
            return loss_of(batch) / (batch.targets != IGNORE_INDEX).sum()

    learner.mean_loss, theta = mean_loss, learner.vector()
    total, loss = torch.zeros_like(theta), 0.0
    for batch in tasks:
        if learner.inner_state == "reset":
            for moment in learner.moments:
                moment.zero_()
        total += learner.variant(learner, batch)
        loss += learner.loss
        learner.set_vector(theta)
    for p, g in zip(learner.everything, like(total / len(tasks), learner.everything)):
        p.grad = g
    return loss / len(tasks)


def task_batch(tasks: list[list], size: int, seed: int, step: int) -> Batch:
    """The batch of a step, all of it from one task; a pure function of the arguments.

    An epoch takes the full batches of all tasks in random order, so a task is drawn in proportion
    to its remaining batches. The rows have similar lengths. Their order is random, because `split`
    makes support and query of the first and last ones.
    """
    counts = np.array([len(task) // size for task in tasks])
    epoch, index = divmod(step, int(counts.sum()))
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(np.repeat(np.arange(len(tasks)), counts))
    task = tasks[order[index]]
    earlier = int((order[:index] == order[index]).sum())
    batch = data.batches(task, size, seed, epoch * -(-len(task) // size) + earlier)
    shuffled = np.random.default_rng([seed, epoch, index]).permutation(size)
    return batch.part(shuffled.tolist())


# The runs

HELD_OUT = ["sentence completion", "natural language inference", "coreference resolution"]
HELD_OUT += ["word sense disambiguation"]  # the clusters of Wu et al. 2022's evaluation


def continued_pretraining(args: Namespace) -> dict:
    """Train the LM, a prompt or both on many tasks. A task is one template of one file.

    All variants read the same batches. A step takes --grad-accum of them: the meta-batch.
    """
    trains, gradient = VARIANTS[args.variant]
    if trains == "T" and (args.init or args.deep):
        flag = "--init" if args.init else "--deep"
        raise ValueError(f"{flag}: {args.variant} trains no prompt")
    cli.check_and_seed(args)
    dtype = "float32" if "T" in trains else args.dtype  # what is trained is held in float32
    lm, tokenizer = start.load_lm(Namespace(**vars(args) | {"dtype": dtype}))
    groups = read_tasks(args)
    examples = {"train": sum(groups, [])} | read_dev_and_test(args)
    task = load_task(args, lm, tokenizer, examples)
    tasks = pieces(task.tokens["train"], groups)
    prompt = new_prompt(task) if "P" in trains else None
    trained_lm = lm.requires_grad_(True) if "T" in trains else None
    inner = {key: getattr(args, key) for key in vars(args) if key.startswith("inner_")}
    learner = Learner(trained_lm, prompt, gradient, **inner, support=args.support)
    if gradient is not mtl:
        learner.split(task_batch(tasks, args.batch_size, args.seed, 0))  # refuses a wrong size
    return train_learner(task, tasks, learner, prompt)


def train_learner(task: start.Task, tasks: list[list], learner: Learner, prompt) -> dict:
    """Train a Learner on `tasks`, and score it on the dev and test examples of `task`."""
    args, lm, tokens = task.args, task.lm, task.tokens
    run, frozen = Run.from_args(args), None if learner.lm is lm else lm

    def batch_at(number: int) -> Batch:
        return task_batch(tasks, args.batch_size, args.seed, number)

    def loss_of(batch: Batch) -> Tensor:
        return target_loss(*COMPOSITIONS[args.method](lm, prompt), batch)

    def evaluate() -> float | None:
        if not tokens["dev"]:
            return None
        return metrics.summary(train.predict_split(task, prompt, "dev", args.eval_limit))["em"]

    def save() -> None:
        base = lm
        if frozen is None:
            lm.save(run.folder / "model", tokenizer=task.tokenizer, replace=True)
            base = LM.from_pretrained(run.folder / "model")  # the LM that the prompt belongs to
        if prompt is not None:
            adapters.save_adapter(run.folder, prompt, base, method=args.method)

    with run:
        record = start_record(run, learner, frozen, start.hashes(task, prompt))
        record["question_format"] = train.asks_questions(task)
        recipe, gradient = Recipe.from_args(args), partial(add_gradient, learner)
        record |= fit(run, recipe, learner, batch_at, loss_of, evaluate, save, gradient)
        return train.finish(task, run, record, prompt)


def read_tasks(args: Namespace) -> list[list[data.Example]]:
    """The training examples of each task, at most --limit of it, without held-out clusters."""
    groups, clusters = [], set()
    for path in args.train:
        for template, examples in by_template(path).items():
            clusters |= {example.cluster for example in examples}
            examples = [e for e in examples if e.cluster not in args.hold_out]
            if not examples:
                continue
            kept = data.sample(len(examples), args.limit, args.seed)
            if len(kept) < args.batch_size:
                raise ValueError(
                    f"{path}: {len(kept)} examples of the template {template!r}, fewer than "
                    f"--batch-size {args.batch_size}"
                )
            groups.append([examples[row] for row in kept])
    if args.hold_out and not any(clusters):
        show("no example of --train has a cluster: --hold-out holds nothing out")
    if unknown := set(args.hold_out) - clusters - set(HELD_OUT):
        raise ValueError(f"--hold-out: no file of --train has the cluster {min(unknown)!r}")
    if not groups:
        raise ValueError("--hold-out leaves no task in the files of --train")
    return groups


def by_template(path: str) -> dict[str, list[data.Example]]:
    """The examples of a file for each `template` of its records."""
    groups = {}
    for example in data.read(path):
        groups.setdefault(example.template or "all", []).append(example)
    return groups


# Few-shot prompts


def few_shot(args: Namespace) -> dict:
    """Train a prompt on a few examples of each template, and score it once, after the last step.

    Returns {"datasets": {name: {template: {"accuracy", "chance"}}}, "average_relative_gain"}, which
    OUT/few_shot.json holds too. OUT/shots.json holds the ids of the examples, OUT/predictions.jsonl
    the predictions of all templates.
    """
    out = Path(args.out)
    check_few_shot_folder(out, args.resume)
    lm, tokenizer = start.load_lm(args)
    plans, shots = [], {}
    for name, template, examples, tests in few_shot_splits(args):
        folder = out / folder_name(f"{name}.{template}")
        if folder.name in shots:
            raise ValueError(f"{name}, {template!r}: another template has the folder {folder}")
        run = Namespace(**vars(args) | {"out": str(folder)})
        cli.check_and_seed(run)
        splits = {"train": examples, "dev": [], "test": tests}
        task = load_task(run, lm, tokenizer, splits)
        plans.append((name, template, task, new_prompt(task)))
        shots[folder.name] = [example.id for example in examples]
    check_unique(example for _, _, task, _ in plans for example in task.examples["test"])
    if (out / "shots.json").is_file() and read_json(out / "shots.json") != shots:
        raise ValueError(f"{out} was started with other files: its shots.json holds other ids")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "shots.json", shots)
    datasets, rows = {}, []
    for name, template, task, prompt in plans:
        torch.manual_seed(args.seed)
        record = train.train_adapter(task, prompt)
        rows += read_predictions(task.args.out)
        chance = float(np.mean([1 / len(e.options) for e in task.examples["test"]]))
        scored = {"accuracy": record["results"]["test"]["em"], "chance": chance}
        datasets.setdefault(name, {})[template] = scored
    write_lines(out / "predictions.jsonl", rows)
    gain = metrics.average_relative_gain(datasets)
    result = {"datasets": datasets, "average_relative_gain": gain}
    write_json(out / "few_shot.json", result)
    show(f"{out}: {len(plans)} templates, average relative gain {100 * gain:.1f} %")
    return result


def check_few_shot_folder(out: Path, resume: bool) -> None:
    """FileExistsError if few-shot must not write to a folder: it is not its own, or not resumed."""
    if out.exists() and not resume:
        raise FileExistsError(f"{out} exists; continue it with --resume, or choose another --out")
    if out.exists() and not (out / "shots.json").is_file():
        if {path.name for path in out.iterdir()} - {"shots.json.unfinished"}:  # what a kill leaves
            raise FileExistsError(f"{out} is not a folder of few-shot (it has no shots.json)")


def few_shot_splits(args: Namespace) -> Iterator[tuple]:
    """Yield (dataset, template, its --shots training examples, its test examples). A file is a data
    set: join those that count as one, such as the three rounds of ANLI.

    The examples depend on --shots-seed alone, so they are the same for all that are compared.
    ValueError if a template has too few of them, or no test examples, or these have no options.
    """
    for path, test_path in zip(args.train, files_of_tasks(args, "test")):
        tests = by_template(test_path)
        for template, examples in by_template(path).items():
            where = f"the template {template!r}"
            if template not in tests or not all(e.options for e in tests[template]):
                raise ValueError(f"{test_path}: {where} has no examples, or some without options")
            if len(examples) < args.shots:
                raise ValueError(f"{path}: {where} has {len(examples)} examples, not {args.shots}")
            kept = data.sample(len(examples), args.shots, args.shots_seed)
            yield task_name(path), template, [examples[row] for row in kept], tests[template]


# What tasks share


def load_task(args: Namespace, lm: LM, tokenizer, examples: dict) -> start.Task:
    """Tokenise examples as train.py does; --input-eos ends every input with the LM's EOS."""
    task = start.load_task(args, lm, tokenizer, examples)
    if args.input_eos and not lm.config.eos:
        raise ValueError("--input-eos: the LM has no EOS")
    if args.input_eos:
        for split, tokens in task.tokens.items():
            longer = [replace(t, input=[*t.input, lm.config.eos[0]]) for t in tokens]
            task.tokens[split] = longer
    return task


def new_prompt(task: start.Task) -> nn.Module:
    """The prompt that training starts from; with --deep keys and values of every layer."""
    deep, folder = task.args.method == "deep_prompt", start.init_folder(task.args)
    if not deep and folder and (folder / "adapter_config.json").is_file():
        if adapters.read_adapter_config(folder)["peft_type"] == "PREFIX_TUNING":
            raise ValueError(f"--init {folder} holds a deep prompt, which needs --deep")
    return start.start_deep_prompt(task) if deep else start.start_prompt(task)


def read_dev_and_test(args: Namespace) -> dict[str, list[data.Example]]:
    """The examples of all files of --dev, and of --test. ValueError if two test examples have one
    task and id: predictions are found by these."""
    splits = {s: [e for path in getattr(args, s) for e in data.read(path)] for s in ("dev", "test")}
    check_unique(splits["test"])
    return splits


def files_of_tasks(args: Namespace, split: str) -> list[str]:
    """The file of --dev or --test for each of --train: a-test.jsonl belongs to a-train.jsonl. One
    file belongs to one, whatever their names are. ValueError if there is not one for each."""
    files = getattr(args, split)
    if len(files) != len(args.train):
        raise ValueError(f"--{split} needs as many files as --train, one for each task")
    if len(files) == 1:
        return files
    tasks = {Path(path).stem.removesuffix(f"-{split}"): path for path in files}
    for path in args.train:
        if task_name(path) not in tasks:
            raise ValueError(f"--{split} has no file of the task {task_name(path)}, as {path} has")
    return [tasks[task_name(path)] for path in args.train]


def expand(paths: list[str], split: str) -> list[str]:
    """The files of a flag: a folder stands for its files TASK-SPLIT.jsonl. ValueError if it has
    none."""
    files = []
    for path in paths:
        found = sorted(map(str, Path(path).glob(f"*-{split}.jsonl")))
        if Path(path).is_dir() and not found:
            raise ValueError(f"--{split} {path}: holds no file TASK-{split}.jsonl")
        files += found or [path]
    return files


def task_name(path: str) -> str:
    """a of DIR/a-train.jsonl."""
    return Path(path).stem.removesuffix("-train")


def pieces(items: list, groups: list[list]) -> list[list]:
    """Cut a list into pieces as long as the groups."""
    ends = np.cumsum([0, *map(len, groups)])
    return [items[start:end] for start, end in zip(ends, ends[1:])]
