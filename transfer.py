"""Soft prompt transfer, and continued pretraining that makes an LM easier to prompt.

SPoT (Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer"): a prompt
trained on source tasks is where the prompt of a target task starts. If sources are many, the task
embedding, which is a prompt after a few steps, finds the ones to try.

    python transfer.py source --each --train world/suite --dev world/suite --out runs/library
    python transfer.py search --library runs/library --task news-train.jsonl
    python train.py --method prompt_tuning --init runs/library/subject_type --train news-train.jsonl

The first command trains a prompt for each task of a folder. Without --each it trains one prompt on
a mixture of its files. A file of running text, among others or alone, is learned as a prefix LM:
each window is cut at a random token, and the LM predicts the second part from the first. If --task
is a file, `search` first trains a prompt on it with the flags of the library, in --out or, if that
is not given, beside the library (here in runs/news). --average writes the average of the best
prompts, weighted by similarity. For a top-k mixture, run `source` on the files of the k best
sources and of the target.

`continue` and `few-shot` are in promptability.py. A run leaves the folder that runs.py describes.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from show import Parser, run_program, show

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import adapters
import cli  # the flags that programs share
import data
import promptability
import start
import train
from adapters import read_prompt
from checkpoints import read_json, write_json, write_tensors
from model import LM
from promptability import load_task, pieces, read_dev_and_test
from runs import ASSETS

# Search for a source

KINDS = ("per_token", "average_tokens", "neurons")


def similarity(a, b, kind: str = "per_token", lm=None) -> float:
    """How similar two tasks are, from -1 to 1. a, b: their prompts (P, C), or a Prefix for neurons.

    per_token       mean cosine over all pairs of prompt tokens        (Vu et al. 2022, section 3.2)
    average_tokens  cosine of the two mean tokens                      (the same)
    neurons         overlap of the MLP neurons that the prompts activate in `lm` (Su et al. 2022,
                    "On Transferability of Prompt Tuning for Natural Language Processing")

    ValueError if the prompts have different shapes.
    """
    if kind not in KINDS:
        raise ValueError(f"similarity {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "neurons" and lm is None:
        raise ValueError("similarity 'neurons' needs an LM")
    if kind == "neurons":
        a, b = (activated_neurons(lm, prompt)[None] for prompt in (a, b))
    elif a.shape != b.shape:
        raise ValueError(f"the prompts are {tuple(a.shape)} and {tuple(b.shape)}")
    elif kind == "average_tokens":
        a, b = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
    a, b = (F.normalize(t.detach().double(), dim=-1) for t in (a, b))
    return (a @ b.T).mean().item()


@torch.no_grad()
def activated_neurons(lm, prompt) -> Tensor:
    """1 for each MLP neuron that the token after a prompt activates, else 0: (layers * hidden,).

    A neuron is active if the input of its activation function is positive; in a gated MLP that is
    the gate. The token is BOS, or EOS if the LM has none. Su et al. look at [MASK] behind the
    prompt, or at the first position of T5's decoder, and like here they read no text of the task.
    The cosine of two such vectors is their overlap rate, here over all layers.
    """
    found, config = [], lm.config
    gates = [block.mlp.gate_proj or block.mlp.up_proj for block in lm.layers]
    hooks = [g.register_forward_hook(lambda _, __, out: found.append(out[0, -1])) for g in gates]
    try:
        prefix = lm.read(prompt) if isinstance(prompt, Tensor) else prompt
        found.clear()  # what the prompt's own tokens activate
        token = next(id for id in (config.bos, *config.eos, 0) if id is not None)
        lm(lm.embed(torch.tensor([[token]], device=lm.embed_tokens.weight.device)), prefix)
    finally:
        for hook in hooks:
            hook.remove()
    return (torch.cat(found) > 0).float()


def search(task, library, kind: str = "per_token", lm=None) -> list[tuple[str, float]]:
    """Rank source tasks by their similarity to a task. Returns [(name, similarity)], best first.

    task     its embedding (P, C), or the folder of a run
    library  {name: embedding}, or a folder of such folders (see `read_embedding`)

    ValueError if the library is empty, or if folders have other LMs or embeddings of other steps.
    """
    if not isinstance(library, dict):
        library = load_library(library, None if isinstance(task, Tensor) else task, lm)
    if isinstance(task, (str, Path)):
        task, _ = read_embedding(task, lm)
    if not library:
        raise ValueError("the library holds no source prompts")
    found = [(name, similarity(task, prompt, kind, lm)) for name, prompt in library.items()]
    return sorted(found, key=lambda pair: -pair[1])


def read_embedding(folder: str | Path, lm=None) -> tuple:
    """(task embedding, facts that embeddings must share) of a run's folder, or of an adapter's.

    The embedding is in embedding/, or it is the folder's own prompt if there is none. It is a
    tensor (P, C), and of deep prompts (P, 2 * layers * K * D). With `lm` it is what the adapter
    returns: (P, C) or a Prefix.
    """
    folder = Path(folder)
    kept = folder / "embedding"
    kept = kept if kept.is_dir() else folder
    config, table = adapters.read_adapter_config(kept), read_prompt(kept)
    facts = {"its base LM": config.get("fingerprint"), "its step": config.get("step")}
    facts["the prompt"] = tuple(table.shape)
    return table if lm is None else adapters.load_adapter(kept, lm)(), facts


def load_library(folder: str | Path, task=None, lm=None) -> dict[str, Tensor]:
    """{name: embedding} of every sub-folder that holds an adapter, but not of the task itself.

    ValueError if there is none, or if one does not fit the first, or the folder `task`.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
    found = [path for path in found if task is None or path.resolve() != Path(task).resolve()]
    if not found:
        raise ValueError(f"{folder}: holds no folder of a prompt; `transfer.py source` makes them")
    first, library = task or found[0], {}
    _, facts = read_embedding(first, lm)
    for path in found:
        library[path.name], other = read_embedding(path, lm)
        for what, value in facts.items():
            if other[what] != value:
                raise ValueError(f"{path}: {what} is {other[what]}, that of {first} is {value}")
    return library


def weighted_average(prompts: list[Tensor], similarities: list[float]) -> Tensor:
    """The average of prompts (P, C), each weighted by its similarity to the target.

    Vu et al. 2022, section 3.3: weight r is sim_r / sum(sim). `similarities` are those of the task
    embeddings; `prompts` are the best source prompts. The paper does not discuss negative
    similarities; here they get weight 0. ValueError if shapes differ or no similarity is positive.
    """
    if len({prompt.shape for prompt in prompts}) != 1 or len(prompts) != len(similarities):
        shapes = ", ".join(str(tuple(prompt.shape)) for prompt in prompts)
        raise ValueError(f"prompts of shapes {shapes} for {len(similarities)} similarities")
    weights = torch.tensor(similarities, dtype=torch.float64).clamp(min=0)
    if weights.sum() <= 0:
        raise ValueError("no source prompt has a positive similarity to the task")
    weights = (weights / weights.sum()).to(prompts[0].dtype)
    return torch.einsum("n,npc->pc", weights, torch.stack(prompts))


def search_table(scores: dict, baselines: dict, rankings: dict, ks: list[int]) -> list[dict]:
    """What trying only the k sources of highest similarity costs and keeps (Vu et al., table 3).

    scores     {target: {source: score of the target if its prompt starts from the source's}}; or in
               place of a score, several, each of another part of the test examples
    baselines  {target: score without transfer};  rankings {target: what `search` returned}

    A row holds the mean over targets of the best-of-top-k score and of its relative error
    reduction, and the fractions of the search eliminated and of the oracle's gain kept (None if the
    oracle gains nothing). With one score per source, the best source is chosen by the score that is
    averaged, as in the paper. So a part of its gain is chance. With several, the source for each
    part is chosen by the scores on the other parts.
    """

    def best(target: str, k: int) -> float:
        tried = np.array([np.ravel(scores[target][name]) for name, _ in rankings[target][:k]])
        others = tried.sum(1, keepdims=True) - tried if tried.shape[1] > 1 else tried
        return tried[others.argmax(0), np.arange(tried.shape[1])].mean()

    n = min(len(ranking) for ranking in rankings.values())
    base = np.mean([baselines[t] for t in scores])
    oracle, rows = np.mean([best(t, n) for t in scores]), []
    for k in ks:
        score = np.mean([best(t, k) for t in scores])
        errors = [relative_error_reduction(best(t, k), baselines[t]) for t in scores]
        row = {"k": k, "score": float(score), "error_reduction": float(np.mean(errors))}
        kept = float((score - base) / (oracle - base)) if oracle > base else None
        rows.append(row | {"eliminated": 1 - k / n, "gain_kept": kept})
    return rows


def relative_error_reduction(score: float, baseline: float) -> float:
    """The fraction of the baseline's errors that are gone, 0 if it makes none. Scores: 0 to 1."""
    return (score - baseline) / (1 - baseline) if baseline < 1 else 0.0


def permutation_test(statistic: Callable, values, iters=10_000) -> tuple[float, float]:
    """(statistic(values), p): p is the chance of a statistic at least as large if the values stood
    in random order, (count + 1) / (iters + 1)."""
    rng, values = np.random.default_rng(0), np.asarray(values)
    observed = statistic(values)
    as_large = sum(statistic(rng.permutation(values)) >= observed - 1e-12 for _ in range(iters))
    return float(observed), float((as_large + 1) / (iters + 1))


def silhouette(similarities, labels) -> float:
    """Mean silhouette (Rousseeuw 1987) of tasks in the groups `labels`; distance 1 - similarity.

    `similarities` is (n, n). 1: groups far apart; 0: no groups. A task alone in its group counts 0.
    ValueError if there is one group.
    `permutation_test(partial(silhouette, similarities), labels)` says whether chance explains it.
    """
    names, group = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError("a silhouette needs two groups or more")
    member = np.eye(len(names))[group]  # (n, groups)
    sums, sizes = (1 - np.asarray(similarities)) @ member, member.sum(0)
    own = np.arange(len(group)), group
    a = (sums[own] - (1 - np.diag(similarities))) / np.maximum(sizes[group] - 1, 1)
    b = np.where(member == 1, np.inf, sums / sizes).min(1)
    width = np.maximum(a, b)  # 0 if all tasks of both groups are the same
    width = np.where((sizes[group] > 1) & (width > 0), width, np.inf)
    return float(((b - a) / width).mean())


def pearson(x, y, iters: int = 10_000) -> tuple[float, float]:
    """Pearson's r, and a two-sided p from permutations: no normal distribution is assumed.

    A constant correlates with nothing: r is 0 and p is 1.
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0, 1.0
    _, p = permutation_test(lambda y: abs(np.corrcoef(x, y)[0, 1]), y, iters)
    return float(np.corrcoef(x, y)[0, 1]), p


# Source prompts


def mixture_batch(tasks: list[list], limit: int | None, size: int, seed: int, step: int):
    """The batch of a step over several tasks, a pure function of the arguments.

    Examples-proportional mixing (Raffel et al. 2020, section 3.5.2): an epoch holds min(n, limit)
    examples of a task with n, sampled anew in every epoch.
    """
    counts = [min(len(task), limit or len(task)) for task in tasks]
    groups = pieces(range(sum(map(len, tasks))), tasks)
    return start.mixture_batch(sum(tasks, []), groups, counts, size, seed, step)


def text_windows(path: str, task: start.Task) -> list[data.TokenizedExample]:
    """Windows of running text, each cut at a random token: prefix LM (Raffel et al. 2020)."""
    args, config = task.args, task.lm.config
    T = args.seq_len
    if T > config.max_len - args.prompt_length:
        raise ValueError(f"--seq-len {T} exceeds what --prompt-length leaves of {config.max_len}")
    tokens = data.encode_texts(data.read_texts(path), task.tokenizer, config.vocab_size).tokens
    rows = tokens[: len(tokens) // T * T].reshape(-1, T).tolist()
    if not rows:
        raise ValueError(f"{path}: {len(tokens)} tokens, too few for one window of {T}")
    cuts = np.random.default_rng(args.seed).integers(1, T, len(rows))
    return [data.TokenizedExample(row[:cut], row[cut:]) for row, cut in zip(rows, cuts)]


def is_text(path: str) -> bool:
    """Whether a file holds running text instead of examples, which may have a key "text", too."""
    if Path(path).suffix.lower() == ".txt":
        return True
    keys = {"text", "question", "input", "inputs_pretokenized"}
    return all(keys & record.keys() == {"text"} for _, record in data.records(path))


def source(args: Namespace) -> dict:
    """Train one prompt on a mixture of files, or with --each one per file. Returns the records."""
    runs = one_run_per_file(args) if args.each else {"": args}
    for run in runs.values():  # a folder that cannot be written is refused before any training
        cli.check_and_seed(run)
    lm, tokenizer = start.load_lm(args)
    tasks = {name: source_task(run, lm, tokenizer) for name, run in runs.items()}  # all are read
    records = {name: source_prompt(*task) for name, task in tasks.items()}
    return records if args.each else records[""]


def one_run_per_file(args: Namespace) -> dict[str, Namespace]:
    """{name: arguments} of a run for each file TASK-train.jsonl, in the folder OUT/TASK."""
    runs = {}
    given = [s for s in ("dev", "test") if getattr(args, s)]
    others = {split: promptability.files_of_tasks(args, split) for split in given}
    for number, path in enumerate(args.train):
        name = promptability.task_name(path)
        if name in runs:
            raise ValueError(f"{path}: another file has the name {name}, and so the same folder")
        files = {"train": [path]} | {split: [others[split][number]] for split in given}
        runs[name] = one_run(args, args.argv, files, Path(args.out) / name)
    return runs


def one_run(args: Namespace, argv: list[str], files: dict, out: Path) -> Namespace:
    """The arguments of one of several runs, and the command that makes it alone."""
    changed = ("--each", "--train", "--dev", "--test", "--out")
    kept, drop = [], False
    for word in argv:
        drop = word.split("=")[0] in changed if word.startswith("--") else drop
        kept += [] if drop else [word]
    for split, paths in files.items():
        kept += [f"--{split}", *paths]
    own = {"each": False, "out": str(out), "argv": [*kept, "--out", str(out)]}
    return Namespace(**vars(args) | {"dev": [], "test": []} | files | own)


def source_task(args: Namespace, lm: LM, tokenizer) -> tuple[start.Task, list]:
    """The task of the files of --train, and the tokens of each file."""
    if args.keep_at > args.steps:
        raise ValueError(f"--keep-at {args.keep_at} exceeds --steps {args.steps}; 0 keeps none")
    texts = [path for path in args.train if is_text(path)]
    for path in texts:
        show(f"{path}: running text")
    parts = [data.read(path) for path in args.train if path not in texts]
    task = load_task(args, lm, tokenizer, {"train": sum(parts, [])} | read_dev_and_test(args))
    tasks = pieces(task.tokens["train"], parts) + [text_windows(path, task) for path in texts]
    task.tokens["train"] = sum(tasks, [])  # all of them identify the run
    return task, tasks


def source_prompt(task: start.Task, tasks: list[list[data.TokenizedExample]]) -> dict:
    """Train a prompt on a mixture of tasks, and keep the one after step --keep-at apart."""
    args, lm = task.args, task.lm
    torch.manual_seed(args.seed)
    prompt = promptability.new_prompt(task)

    def batch_at(number: int) -> data.Batch:
        return mixture_batch(tasks, args.limit, args.batch_size, args.seed, number)

    def after_step(step: int) -> None:
        if step == args.keep_at:
            info = {"step": step, "method": args.method}
            adapters.save_adapter(Path(args.out) / "embedding", prompt, lm, **info)

    return train.train_adapter(task, prompt, batch_at=batch_at, after_step=after_step)


# Command line


def search_command(args: Namespace) -> list[tuple[str, float]]:
    """Rank the prompts of a library for a task; write the average of the best if asked to."""
    if args.average and Path(args.average).exists():
        raise FileExistsError(f"{args.average} exists; choose another --average")
    if not Path(args.task).exists():
        raise FileNotFoundError(f"--task {args.task}: no such file or folder")
    lm = LM.from_pretrained(args.model or ASSETS / "lm") if args.kind == "neurons" else None
    folder = None if Path(args.task).is_file() else args.task
    count = len(load_library(args.library, folder, lm))
    if args.average and args.top_k > count:
        raise ValueError(f"--top-k {args.top_k} exceeds the {count} of {args.library}")
    ranking = search(folder or embed_file(args, lm), args.library, args.kind, lm)
    for name, value in ranking:
        show(f"{value:+.4f}  {name}")
    if args.average:
        write_average(args.average, args.library, ranking[: args.top_k])
    return ranking


def embed_file(args: Namespace, lm: LM | None) -> Path:
    """Train the prompt of the file --task with the flags of the library's first run, but a new
    seed: prompts of one seed are alike because they start from the same vectors. Returns the
    folder: --out, or if not given TASK beside the library. A finished run is not trained again."""
    records = [read_json(path) for path in sorted(Path(args.library).glob("*/run.json"))]
    records = [r for r in records if "keep_at" in r.get("arguments", {})]
    if not records:
        where = "holds no run of `transfer.py source` to train --task like"
        raise ValueError(f"{args.library}: {where}; give --task the folder of a run")
    beside = Path(args.library).resolve().parent / promptability.task_name(args.task)
    out = beside if args.out is None else Path(args.out)
    seed = 1 + max(record["arguments"]["seed"] for record in records)
    own = {"seed": seed, "program": "transfer.py", "resume": True}
    argv = [*shlex.split(records[0]["command"])[2:], "--seed", str(seed)]
    if args.model:  # the library's LM lies elsewhere now
        own["model"], argv = args.model, [*argv, "--model", args.model]
        if LM.from_pretrained(args.model).fingerprint() != records[0]["fingerprint"]:
            raise ValueError(f"--model {args.model} is not the LM of {args.library}")
    like = Namespace(**records[0]["arguments"] | own)
    source(one_run(like, argv, {"train": [args.task]}, out))
    return out


def write_average(out: str | Path, library: str | Path, best: list[tuple[str, float]]) -> None:
    """Write the weighted average of some prompts of a library as an adapter's folder `out`.

    best: [(name, similarity)], as `search` returns them.
    """
    folders = [Path(library) / name for name, _ in best]
    prompt = weighted_average([read_prompt(f) for f in folders], [value for _, value in best])
    config = adapters.read_adapter_config(folders[0]) | {"averaged": dict(best)}
    unfinished = Path(f"{Path(out)}.unfinished")  # a kill leaves no other folder
    unfinished.mkdir(parents=True, exist_ok=True)
    write_tensors(unfinished / "adapter_model.safetensors", {"prompt_embeddings": prompt})
    write_json(unfinished / "adapter_config.json", config)
    unfinished.rename(out)


WU = {"schedule": "constant", "optimizer": "adafactor", "weight_decay": 0.0}  # Wu et al. 2022
COMMANDS = {  # command: (function, defaults of its flags)
    "search": (search_command, {}),
    "source": (source, train.METHODS["prompt_tuning"][1]),
    "continue": (
        promptability.continued_pretraining,
        WU | {"steps": 200, "lr": 1e-3, "grad_accum": 16},
    ),
    "few-shot": (promptability.few_shot, WU | {"steps": 100, "lr": 0.1, "batch_size": 16}),
}


def add_own_flags(command, name: str) -> None:
    """The flags of one command alone."""
    count, positive, natural = cli.COUNT, cli.number_type(float, 0), cli.number_type(int, 0)
    limit = ("--limit", count, None, "K, examples used of a task (papers: 2^19, 500,000)")
    if name == "search":
        command.add_argument("--library", required=True, help="folder of the source prompts' runs")
        command.add_argument("--task", required=True, help="the target's file, or its prompt's run")
        command.add_argument("--out", help="folder of a file's prompt; TASK beside the library")
        command.add_argument("--average", help="new folder for the average of the best prompts")
        k = ("--top-k", count, 3, "how many prompts are averaged (paper: 3)")
        kind = ("--kind", list(KINDS), KINDS[0], "of similarity; neurons reads the LM")
        cli.add_flags(command, "search", k, kind, cli.MODEL)
    if name == "source":
        each = ("--each", bool, False, "a prompt per file, in OUT/TASK")
        text = "step of the task embedding; 0: none (paper: 10,000)"
        step = ("--keep-at", natural, 100, text)
        length = ("--seq-len", cli.number_type(int, 2), 64, "tokens in a window of running text")
        cli.add_flags(command, "source", each, limit, step, length)
    if name == "continue":
        command.add_argument(
            "--hold-out", nargs="*", default=promptability.HELD_OUT, help="clusters left out"
        )
        trained = "t0 trains the LM, ppt a prompt, the others both"
        cli.add_flags(
            command,
            "variants",
            ("--variant", list(promptability.VARIANTS), "mtl", trained),
            ("--inner-steps", natural, 7, "of the prompt, per task (paper: 7)"),
            ("--inner-lr", positive, 1e-3, "of the inner steps (paper: 0.001)"),
            ("--inner-optimizer", ["adafactor", "sgd"], "adafactor", "of the inner steps"),
            ("--inner-state", ["carried", "reset"], "carried", "its moments, from task to task"),
            ("--support", ["different", "same"], "different", "examples of the inner steps"),
            limit,
        )
    if name == "few-shot":
        shots = ("--shots", count, 16, "training examples of each template (paper: 16)")
        seed = ("--shots-seed", natural, 100, "of their choice (paper: 100)")
        cli.add_flags(command, "few-shot", shots, seed)


def add_shared_flags(command, splits: tuple[str, ...]) -> None:
    """The flags of the commands that train."""
    init = "folder of a trained prompt to start from, or vocab, random, labels, text:WORDS"
    init = ("--init", str, None, f"{init}; vocab if not given")
    cli.add_flags(command, "model", cli.MODEL, cli.TOKENIZER, init, cli.PROMPT, cli.ATTENTION)
    files = "files, or folders with files TASK-{}.jsonl"
    for split in splits:
        needed, help = split == "train", files.format(split)
        command.add_argument(f"--{split}", nargs="+", default=[], required=needed, help=help)
    ends = ("--input-eos", bool, False, "end inputs with EOS")
    deep = ("--deep", bool, False, "a prompt is keys and values of every layer, not vectors")
    cli.add_flags(command, "data", *cli.ANSWERS, ends, deep)
    cli.add_training_flags(command)
    cli.add_run_flags(command)
    command.set_defaults(connector_layers=0, variant=None, placement="before_bos", dev=[])
    command.set_defaults(pause=0, pause_text="", pause_trained=False, cache_first_pass=0.0)
    command.set_defaults(mixture_cap=None, per_task=False, reparam_dim=None)  # flags of train.py


def parse(argv: list[str], program: str = "transfer.py") -> Namespace:
    """Parse the command and its flags. A bad flag exits with status 2."""
    parser = Parser(prog=program, description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, defaults) in COMMANDS.items():
        summary = function.__doc__.split("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        if name != "search":
            few = name == "few-shot"  # which has no dev examples
            add_shared_flags(command, ("train", "test") if few else ("train", "dev", "test"))
        add_own_flags(command, name)
        command.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.argv = argv
    if args.command != "search":
        args.method = "deep_prompt" if args.deep else "prompt_tuning"
        if args.variant == "t0":
            args.method = "fine_tuning"
        args.out = args.out or f"runs/{args.variant or args.command}"
        cli.add_late_defaults(args, program, argv)
    return args


def main(argv: list[str] | None = None):
    """Run a command and return its result: the run's record, or the ranking."""
    args = parse(sys.argv[1:] if argv is None else argv)
    command, _ = COMMANDS[vars(args).pop("command")]
    for split in ("train", "dev", "test"):
        if hasattr(args, split):
            setattr(args, split, promptability.expand(getattr(args, split), split))
    return command(args)


if __name__ == "__main__":
    run_program("transfer.py", main, resumes=True)
