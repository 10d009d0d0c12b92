"""Run folders: what a training run leaves on disk, and how it is resumed and loaded again.

    adapter_config.json, adapter_model.safetensors   the trained adapter, best on dev
    pause.safetensors                                the trained filler, if there is one
    model/                                           the model, if it was trained itself
    predictions.jsonl                                each test question (dev, if there is no test),
                                                     its prediction and scores
    run.json                                         arguments, versions, hardware, hashes, results
    metrics.jsonl, curve.png                         loss and dev score along training
    state.safetensors                                what --resume needs
    state.before.safetensors                         the checkpoint before it, for `verify`
    lock                                             held by the process that writes the folder

Files are written under a temporary name, synced and renamed, so they are always complete. Only
metrics.jsonl is appended to, and a kill can cut its last line. No pickle is ever read or written. A
kill costs at most the steps since the last saved state. README.md says when a resumed run has the
bits of an uninterrupted one. Hashes identify the LM and the data, so a run can be moved together
with them.

    from runs import load_run
    model, prefix, tokenizer, record = load_run("runs/neural_recursion")      # under a second
"""

import hashlib
import json
import math
import os
import shlex
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from show import run_program, show, show_result

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import parallel
from checkpoints import atomic_write, hash_tensors, load_tokenizer, write_json, write_lines
from families import COUNT, FILES, ID, IDS, OBJECT, OBJECTS, SHARE, TEXT, TEXTS, WHOLE, check_keys
from filler import Filler
from int8 import quantize
from model import LM
from questions import environment, hash_tokenizer
from recurse import COMPOSITIONS, load_trained, without_bos
from textual import TextualRecursion

ASSETS = Path(__file__).parent / "assets"  # the embedded LM and the Connectors pretrained on it

# What identifies a run

HASHES = {  # keys of run.json that identify what a run reads
    "data_hash": "on other data",
    **dict.fromkeys(["tokens_hash", "tokenizer_hash"], "with another tokenizer"),
    "eos": "with other end tokens",
    "fingerprint": "on another LM",
    "init_hash": "from another adapter",
    "encoder_hash": "with another encoder",
    "templates_hash": "with other templates",
}
PATHS = {  # arguments that name files, and the hash that identifies what they hold
    "model": "fingerprint",
    "tokenizer": "tokens_hash",
    "init": "init_hash",
    "encoder": "encoder_hash",
    **dict.fromkeys(["passages", "retriever", "reranker"], "data_hash"),
    **dict.fromkeys(["train", "dev", "test"], "data_hash"),
}
# Keys of run.json, of its arguments and of a line of predictions.jsonl, and kinds of their values
RECORD = dict.fromkeys(["arguments", "versions", "hardware", "results"], OBJECT)
RECORD |= {"command": TEXT, "folder": TEXT, "resumed": OBJECTS, "eos": IDS}
ARGUMENTS = dict.fromkeys([*PATHS, "stop"], FILES) | {"pause": WHOLE, "seed": WHOLE}
ARGUMENTS |= dict.fromkeys(["max_new_tokens", "candidates", "rounds"], COUNT)
ARGUMENTS |= dict.fromkeys(["method", "composition", "pause_text"], TEXT)
PREDICTION = dict.fromkeys(["task", "input", "prediction", "template", "cluster"], TEXT)
PREDICTION |= {"id": ID, "answers": TEXTS, "em": SHARE, "f1": SHARE}
OTHER = "choose another --out"
INIT_WORDS = ("random", "vocab", "labels")  # ways to start; others are text:WORDS, vocab:SIZE


def is_word(key: str, value) -> bool:
    """Whether an argument is a way to start, or the word suite. Those are never taken for paths."""
    if key in ("train", "dev", "test"):
        return value == "suite"
    return key == "init" and (value in INIT_WORDS or str(value).startswith(("text:", "vocab:")))


def names_file(key: str, value) -> bool:
    """Whether an argument is given and names a file, a folder or a hub id."""
    return key in PATHS and value is not None and not is_word(key, value)


def arguments(args) -> dict:
    """Return the arguments that identify a run. Others say where and in what parts it is computed.

    Paths of existing files become absolute, so a run can be resumed and used from any folder.
    """
    free = ("out", "resume", "program", "argv", "shard")
    kept = {key: value for key, value in vars(args).items() if key not in free}
    for key, value in kept.items():
        if names_file(key, value) and isinstance(value, list):
            kept[key] = [os.path.abspath(path) for path in value]
        elif names_file(key, value) and os.path.exists(value):
            kept[key] = os.path.abspath(value)
    return kept


def places(path: str, folder: str | Path, record: dict) -> list[str]:
    """Return where a path of a run's record may be now: the path itself, and the same place
    relative to the run's folder, in case that both were moved together."""
    if not os.path.isabs(path) or "folder" not in record:  # not absolute: a hub id
        return [path]
    relative = os.path.relpath(path, record["folder"])
    return [path, os.path.normpath(os.path.join(os.path.abspath(folder), relative))]


def find(path: str | list[str], folder: str | Path, record: dict) -> str | list[str]:
    """Return the first of `places` that exists, or else the path itself. Of a list: of each."""
    if isinstance(path, list):
        return [find(one, folder, record) for one in path]
    return next(filter(os.path.exists, places(path, folder, record)), path)


def find_encoder(folder: str | Path, record: dict) -> str:
    """The folder of the encoder that --encoder named for a run of ID-PT, or assets/t5."""
    stored = record.get("arguments", {}).get("encoder") or str(ASSETS / "t5")
    path = find(stored, folder, record)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{folder}: its encoder, --encoder {stored}, is not there any more")
    return path


# The run folder


@dataclass
class State:
    """How far a run is, and its best parameters so far. `save_state` stores it with the current
    parameters, the optimiser and the random state."""

    step: int = 0  # finished steps
    seconds: float = 0.0  # training time
    tokens: int = 0  # read by the steps
    positions: int = 0  # computed by the steps: the tokens, and the padding of their batches
    step_seconds: float = 0.0  # of the steps that read them, without scoring
    best_step: int = 0
    best_score: float = -math.inf
    best: dict[str, Tensor] = field(default_factory=dict)  # the parameters after best_step


class Run:
    """The folder of one run. `with run:` locks it against other processes."""

    def __init__(self, folder, arguments: dict, command: str = "", resume: bool = False):
        self.folder = Path(folder)
        self.arguments = arguments  # what identifies the run; "method" and "device" are needed
        self.command = command  # the command line, for run.json
        self.resume = resume  # continue from the state in the folder
        self.state_path = self.folder / "state.safetensors"
        self.before_path = self.folder / "state.before.safetensors"
        self.metrics_path = self.folder / "metrics.jsonl"

    @classmethod
    def from_args(cls, args) -> "Run":
        """The run that a parsed command line asks for."""
        command = shlex.join(["python", *args.program.split(), *args.argv])
        return cls(args.out, arguments(args), command, args.resume)

    def check(self) -> None:
        """FileExistsError or ValueError if this run must not write to its folder.

        An existing folder needs --resume, and must hold a run with the same arguments.
        """
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise FileExistsError(f"--out {self.folder}: is not a folder")
        if not self.resume:
            raise FileExistsError(f"{self.folder} exists; continue it with --resume, or {OTHER}")
        record = self.record()
        if record is None:
            # A kill at the very start leaves only these two files.
            leftovers = {"lock", "run.json.unfinished"}
            if {path.name for path in self.folder.iterdir()} - leftovers:
                raise FileExistsError(f"{self.folder} is not a run's folder (no run.json); {OTHER}")
            return
        free = ["eval_tokens", "stages_from"]  # change no result
        older = {"sort_by": "reranker"}  # what was done before there was the flag
        if self.arguments.get("method") != "reader":
            free.append("encoder_lr")  # only a reader reads it, and its default was another one
        for key, value in self.arguments.items():
            before = record["arguments"].get(key, older.get(key, value))
            words = key == "init" and (is_word(key, before) or is_word(key, value))
            if key in PATHS and PATHS[key] in record and not words:
                continue  # a path is a hint; start_record compares the hashes
            if before != value and key not in free:
                flag = f"--{key.replace('_', '-')}"
                problem = f"was started with {flag} {before}, not {value}; {OTHER}"
                raise ValueError(f"{self.folder} {problem}")

    def record(self) -> dict | None:
        """Return run.json of the run that the folder holds already, or None."""
        return read_record(self.folder) if (self.folder / "run.json").is_file() else None

    def __enter__(self) -> "Run":
        parallel.wait()  # until all processes have checked the folder
        if parallel.first():
            self.take_lock()
        parallel.wait()
        return self

    def take_lock(self) -> None:
        """Make the folder and lock it. FileExistsError if another process holds it."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:  # the system releases the lock, however the process ends
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{self.folder} is in use by another process") from None
        for path in self.folder.glob(".tmp??????"):  # of safetensors, whose write a kill has ended
            path.unlink()

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            parallel.wait()  # until the files are complete, which all may read now
        if parallel.first():
            self.lock.close()

    def write_record(self, record: dict) -> None:
        """Write run.json. Like all files of a run, it is written by the first process alone."""
        if parallel.first():
            write_json(self.folder / "run.json", record)

    def log(self, record: dict) -> None:
        if parallel.first():
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def rewind_log(self, step: int) -> list[dict]:
        """Delete the records after `step` from metrics.jsonl, and return the others."""
        path, records = self.metrics_path, []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            with suppress(ValueError, RecursionError):  # a kill can cut the last line short
                records.append(json.loads(line))
        for record in records:
            check_keys(path, record, {"step": WHOLE}, ["step"])
        records = [record for record in records if record["step"] <= step]
        if parallel.first():
            write_lines(self.metrics_path, records)
        return records

    def save_state(self, trained: nn.Module, optimizer, state: State) -> None:
        """Write all that a resumed run needs: parameters, optimiser, random state, `state`."""
        if not parallel.first():
            return
        tensors = {f"trained.{name}": p.detach() for name, p in trained.named_parameters()}
        tensors |= {f"best.{name}": p for name, p in state.best.items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps({k: v for k, v in vars(state).items() if k != "best"})
        metadata = {"json": text, "sha256": _hash_state(text, tensors)}
        with suppress(OSError):  # there is none yet, or the file system knows no hard links
            self.before_path.unlink(missing_ok=True)
            os.link(self.state_path, self.before_path)
        with atomic_write(self.state_path) as path:
            save_file(tensors, path, metadata=metadata)

    def load_state(self, trained: nn.Module, optimizer) -> State:
        """Restore what `save_state` wrote. Returns a fresh State if there is nothing to resume."""
        if not (self.resume and self.state_path.is_file()):
            return State()
        try:
            with safe_open(self.state_path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            true_hash = _hash_state(metadata["json"], tensors)
            if metadata.get("sha256", true_hash) != true_hash:
                raise ValueError("its bytes have changed since they were written")
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            advice = f"put {self.before_path.name} in its place, or delete it to start again"
            raise ValueError(f"{self.state_path}: corrupt ({error}); {advice}") from None
        stored = {name: tensor.shape for name, tensor in _group("trained.", tensors).items()}
        if stored != {name: p.shape for name, p in trained.named_parameters()}:
            raise ValueError(f"{self.state_path}: is the state of another run; it does not fit")
        trained.load_state_dict(_group("trained.", tensors))
        moments = {}
        for name, tensor in _group("optimizer.", tensors).items():
            i, key = name.split(".")
            moments.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return State(**json.loads(metadata["json"]), best=_group("best.", tensors))


def _hash_state(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256((text + hash_tensors(tensors)).encode()).hexdigest()


def _group(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`; it is removed from the names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# Records


def start_record(run: Run, trained: nn.Module, frozen: LM | None, hashes: dict) -> dict:
    """Write run.json with all that is known before training, and return it as a dict. `hashes` has
    keys of HASHES. ValueError if the folder's run was started with others."""
    before = run.record() or {}
    for key, what in HASHES.items():
        if key in before and before[key] != hashes.get(key):
            raise ValueError(f"{run.folder} was started {what} (its {key} differs); {OTHER}")
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    line = f"{run.arguments['method']}: {count:,} parameters trained"
    if frozen:
        line += f", {sum(p.numel() for p in frozen.parameters()):,} frozen"
    show(line)
    now = environment(run.arguments["device"])
    record = {"command": run.command} | now | before  # earlier results stay
    record |= {
        "arguments": run.arguments,
        "folder": os.path.abspath(run.folder),
        "trained_parameters": count,
        "weights_before": hash_tensors(parallel.Whole(frozen.state_dict())) if frozen else None,
        **hashes,
    }
    latest = record.get("resumed", [record])[-1]
    if any(latest.get(key) != now[key] for key in now):
        record["resumed"] = [*record.get("resumed", []), now]
    run.write_record(record)
    return record


def finish_record(run: Run, record: dict, frozen: LM | None, results: dict) -> dict:
    """Write run.json with the results, print them, and return the record.

    ValueError if the weights of the frozen LM changed during the run.
    """
    record["weights_after"] = hash_tensors(parallel.Whole(frozen.state_dict())) if frozen else None
    if record["weights_before"] != record["weights_after"]:
        raise ValueError(f"{run.folder}: the frozen LM's weights changed during the run")
    record["results"] = results
    run.write_record(record)
    for split, result in results.items():
        show_result(split, result)
    show(f"{run.folder}: step {record['step']} was best; {record['seconds']:.0f} s of training")
    return record


# What a run trained


def read_record(folder: str | Path) -> dict:
    """Return run.json as a dict. FileNotFoundError if there is none, ValueError if it is no record.

    Keys: command, arguments, folder, versions, hardware, resumed, trained_parameters, the keys of
    HASHES, weights_before, weights_after, lr, step, score, seconds, tokens_per_second, padding,
    results, question_format, and some of single methods, as candidates. Versions and hardware are
    those of the start. If a run was resumed with others, resumed is the list of these.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run.json, so this is not a run's folder")
    place = f"{path}: not a run record"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} ({error})") from None
    check_keys(place, record, RECORD, ["arguments"])
    check_keys(place, record["arguments"], ARGUMENTS, ["method"])
    return record


def finished(folder: str | Path) -> dict | None:
    """The record of a run that has finished, or None."""
    record = read_record(folder) if (Path(folder) / "run.json").is_file() else {}
    return record if "results" in record else None


def load_run(folder: str | Path, device: str = "cpu", model: str | Path | None = None):
    """Load what a run trained. Returns (model, prefix, tokenizer, record).

    model      the LM, or a Stack, WithFiller, TextualRecursion or Reader with its interface; in
               float32, whatever the run used. questions.prepare makes what it reads of a question,
               with `model.filler` behind it
    prefix     the trained prompt as a Prefix, or None
    tokenizer  the one that the run used
    record     run.json

    The argument `model` says where the LM is now, if it was moved. ValueError if it is another LM
    or has another tokenizer, or if the run trained no LM or adapter but an encoder. Answers end
    with the end tokens that the run recorded. If the LM's configuration names others now, a warning
    says so. (--resume refuses that.)
    """
    folder, record = Path(folder), read_record(folder)
    args, own_lm = record["arguments"], (folder / "model").is_dir()
    method = args.get("composition", args["method"])  # pretraining says what it is for
    encoder = method in ("retriever", "reranker")  # a model, but no LM
    if encoder or not (own_lm or method in COMPOSITIONS):
        raise ValueError(f"{folder}/run.json: {args['method']} trains nothing that answers")
    if args.get("per_task"):
        raise ValueError(f"{folder}: has a prompt for each task; `eval.py mixed` answers with them")
    lm, tokenizer = load_base(folder, record, device, model)
    adapter = None
    if own_lm and method not in ("prompt_tuning", "deep_prompt"):
        method = "fine_tuning"  # `continue` stores a prompt beside its LM
    elif method != "training_free":
        t5 = find_encoder(folder, record) if method == "id_pt" else None
        adapter, tokenizer = load_trained(folder, lm, tokenizer, t5)
    filler = Filler.of(args, lm, tokenizer).load(folder, lm)
    model, prefix = COMPOSITIONS[method](filler.around(lm), adapter)
    if method == "textual_recursion":
        model = TextualRecursion.load(folder, lm, filler, args)
    if args["method"] == "reader":
        from reader import Reader

        model = Reader.load(folder, model, tokenizer, record, device)
    model.filler = filler.text
    model.input_end = lm.config.eos[:1] if args.get("input_eos") else ()
    return model.requires_grad_(False), prefix, filler.tokenizer, record


def load_base(folder: str | Path, record: dict, device: str = "cpu", model=None):
    """Return (LM, tokenizer) of a run: the LM that it trained, or the frozen one that it used."""
    folder, own = Path(folder), Path(folder) / "model"
    if own.is_dir() and model is not None:
        method = record["arguments"]["method"]
        raise ValueError(f"{folder}: {method} trained an LM of its own; --model says another")
    frozen = not own.is_dir()
    lm = _load_frozen(folder, record, device, model) if frozen else LM.from_pretrained(own, device)
    _set_eos(folder, record, lm)
    return lm, _load_tokenizer(folder, record, lm)


def _load_frozen(folder: Path, record: dict, device: str, model: str | Path | None) -> LM:
    """Load the LM that a run was trained on. The fingerprint decides whether it is the one."""
    stored = str(model or record["arguments"].get("model") or ASSETS / "lm")
    candidates = [stored] if model else places(stored, folder, record)
    if not model and os.path.isabs(stored):
        candidates = [path for path in candidates if os.path.isdir(path)]
    if not candidates:
        advice = "--model says where it is now"
        raise FileNotFoundError(f"{folder}: its LM is not at {stored} any more; {advice}")
    for path in candidates:
        lm = LM.from_pretrained(path, device)
        if record.get("fingerprint") in (None, lm.fingerprint()):
            int8 = record["arguments"].get("base_dtype") == "int8"
            return quantize(lm) if int8 else lm
    problem = f"was trained on another LM than {path} (its fingerprint differs)"
    raise ValueError(f"{folder}: {problem}; --model says where its own is")


def _load_tokenizer(folder: Path, record: dict, lm: LM) -> Tokenizer:
    """Load the tokenizer that a run used. Its hash decides whether it is the one."""
    args, own = record["arguments"], (folder / "model").is_dir()  # saved with the LM it trained
    stored = str(lm.folder) if own else args.get("tokenizer") or str(lm.folder)
    for path in [*filter(os.path.exists, places(stored, folder, record)), lm.folder]:
        tokenizer = load_tokenizer(path, lm.config.vocab_size)
        used = without_bos(tokenizer) if args.get("placement") == "after_bos" else tokenizer
        if record.get("tokenizer_hash") in (None, hash_tokenizer(used)):
            return tokenizer
    problem = "was trained with another tokenizer than its LM has now"
    raise ValueError(f"{folder}: {problem} (its tokenizer_hash differs)")


def _set_eos(folder: Path, record: dict, lm: LM) -> None:
    """Let the LM end answers with the tokens that the run recorded."""
    now, then = list(lm.config.eos), record.get("eos")
    if then is not None and then != now:
        text = f"{folder}: answers end with its own tokens {then}, not with its LM's {now}"
        warnings.warn(text, stacklevel=4)
        lm.config = replace(lm.config, eos=tuple(then))


def read_predictions(folder: str | Path, needed: tuple = ()) -> list[dict]:
    """Return the records of predictions.jsonl in file order. `eval.score` describes them.

    FileNotFoundError if there is no file. ValueError, with file and line, if a line is no record
    with a task, an id and the keys `needed`, or repeats task and id of another.
    """
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run writes it when it has been tested")
    records, line_of = [], {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}:{number}: not a prediction"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} ({error})") from None
        check_keys(place, record, PREDICTION, ("task", "id", *needed))
        key = record["task"], record["id"]
        if line_of.setdefault(key, number) != number:
            raise ValueError(f"{path}:{number}: the id {key[1]!r} is on line {line_of[key]} too")
        records.append(record)
    return records


def main(argv: list[str] | None = None) -> None:
    import verify  # reaches up

    verify.main(argv)


if __name__ == "__main__":
    run_program("runs.py", main)
