"""Questions that a model answers: read, checked, and made into what generate.predict takes.

read_questions     the file of `eval.py ask --input`, whose answers are not needed
prepare            examples of data.py, and examples before them -> the arguments of predict
check_targets      refuses targets that no tokens spell, which training would teach
check_answers      refuses answers that `predict` could never return, which would score 0
load_model         the run or the bare LM that the flags of `ask` and `score` name
load_text          a run or a bare LM, and one text as it reads it
answer             answers as these flags say
finish_scores      prints scores, and writes what `score --out` leaves

ids, options, prefix = prepare(lm, tokenizer, data.read("questions.jsonl"))
"""

import hashlib
import json
import os
import platform
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

from show import processor, show_result

import numpy as np
import torch
from tokenizers import Tokenizer

import data
import eval as metrics
import parallel
from checkpoints import write_json, write_lines
from generate import check_ids, find_stop, prefix_lengths, stack_prefixes

SHOT_END = "\n\n"  # follows each of the examples that stand before a question

# Files


def read_questions(path: str | Path, question_format: bool = True) -> list[data.Example]:
    """Read examples without their answers. The `id` of each is what was asked.

    The file is JSONL if its name ends so, in letters of any case. A name without a suffix, such as
    /dev/stdin, is JSONL if the first line is a JSON object. Otherwise each line is a question. With
    `question_format` these are put into the format of data.question_text.
    """
    path = Path(path)
    content = path.read_bytes()  # once: standard input cannot be read again
    if _is_json(path, content):
        records = data.json_lines(path, content)
        return [parse_question(record, source) for source, record in records]
    lines = data.decode_utf8(content, path).split("\n")
    return [plain_question(line.strip(), question_format) for line in lines if line.strip()]


def _is_json(path: Path, content: bytes) -> bool:
    if path.suffix:
        return path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    first = content.removeprefix(data.BOM.encode()).lstrip().split(b"\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def plain_question(text: str, question_format: bool) -> data.Example:
    """Make an Example of a question without options and answers."""
    input = data.question_text(text) if question_format else text
    return data.Example(input, "", (), id=text, source=repr(text))


def parse_question(record: dict, source: str) -> data.Example:
    """Make an Example of a record that need not say the answer. If it does, that is dropped."""
    options = record["options"] if isinstance(record.get("options"), list) else []
    filler = next((o for o in options if isinstance(o, str) and o.strip()), "?")
    unlabelled = record | {"target": filler, "answer": filler, "answers": None}
    example = data.parse_record(unlabelled, source)
    return replace(example, answers=(), id=record.get("question", example.input))


def read_shots(path, count: int, seed: int, asked) -> list[data.Example]:
    """Sample `count` examples of a file that are not among the examples `asked`, with `seed`.

    White space, case and Unicode form make no other example.
    """

    def key(e) -> str:
        return " ".join(normalize("NFKC", e.input).casefold().split())

    inputs = {key(e) for e in asked}
    pool = [e for e in data.read(path) if key(e) not in inputs]
    if len(pool) < count:
        raise ValueError(f"{path}: {len(pool)} examples that are not asked, fewer than {count}")
    return [pool[row] for row in data.sample(len(pool), count, seed)]


# Tokens


def prepare(
    lm,
    tokenizer: Tokenizer,
    examples,
    prefix=None,
    max_new_tokens: int = 16,
    shots=(),
    stops: list[str] | None = None,
    check: bool = True,
) -> tuple:
    """Tokenise examples of data.py for `predict`. Returns (ids, options, prefix).

    `shots` are examples that stand, with their answers, before every question. If all questions
    have the same prefix, the shots are read once, here, and extend it. The text `lm.filler`, if
    there is one, stands behind every question, and behind it the tokens `lm.input_end`. A
    TextualRecursion first adds its candidates, and a Reader its passages.
    ValueError, with the example's name, if an option or `max_new_tokens` do not fit the context, or
    for what `check_answers` refuses; check=False leaves that out.
    """
    config = lm.config
    check_targets(tokenizer, shots, config.eos)
    if check:
        check_answers(tokenizer, examples, config.eos, stops, max_new_tokens)
    if hasattr(lm, "read_back"):
        examples = lm.read_back(examples)
    longest = max(prefix_lengths(prefix, len(examples)), default=0)
    left = config.max_len - longest
    before = "".join(f"{shot.input} {shot.target}{SHOT_END}" for shot in shots)
    after, V = getattr(lm, "filler", ""), config.vocab_size
    examples = [replace(e, input=before + e.input + after) for e in examples]
    eos = config.eos[0] if config.eos else None
    choices = [e for e in examples if e.options]
    options, end = [], list(getattr(lm, "input_end", ()))
    tokenized = iter(data.tokenize(choices, tokenizer, eos, left - len(end), V))
    ids = [row + end for row in data.encode_prompts(tokenizer, [e.input for e in examples])]
    for e, row in zip(examples, ids):
        try:
            data.check_vocabulary(row, tokenizer, V)
        except ValueError as error:
            raise ValueError(f"{e.source}: {error}") from None
        options.append(next(tokenized).options if e.options else [])
        check_length(e, row, max_new_tokens, left)
    if shots and not (callable(prefix) or isinstance(prefix, list)):
        ids, prefix = read_shared(lm, ids, prefix)
    return ids, options, prefix


def check_unique(items) -> None:
    """ValueError if two examples or questions have one task and id, as data.read says of a file."""
    sources = {}
    for item in items:
        if (key := (item.task, item.id)) in sources:
            raise ValueError(f"{item.source}: the id {item.id} is taken by {sources[key]}")
        sources[key] = item.source


def check_length(example, ids: list[int], new: int, left: int) -> None:
    """ValueError if an example without options and `new` tokens exceed what the context leaves."""
    if not example.options and len(ids) + new - 1 > left:  # the last new token is never read
        raise ValueError(
            f"{example.source}: {len(ids)} tokens and {new} new ones exceed the {left} that the "
            "LM's context leaves"
        )


@torch.no_grad()
def read_shared(lm, ids: list[list[int]], prefix=None):
    """Read the tokens that all questions begin with. Returns the rest of each, and the prefix."""
    check_ids(ids, lm.config.vocab_size)
    # Every question keeps a token: its logits give the first token of the answer.
    n = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)
    shared = torch.tensor([ids[0][:n]], device=next(lm.parameters()).device)
    if n > 0:
        prefix = lm.read(lm.embed(shared), prefix)
    return [row[n:] for row in ids], prefix


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Hash what a tokenizer does, as hex SHA-256: its vocabulary, tokens and texts of a sample.

    How a file stores it may change with the version of the library, so its bytes are not hashed.
    The sample is every token's text, and letters that tokenizers normalise.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[::-1])
    texts = tokenizer.decode_batch([[i] for _, i in vocabulary], skip_special_tokens=False)
    texts = [" ".join(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    texts += ["", "The U.S.A.  isn't  \u00c9mile\u0301 \ufb01 \u00bd \u65e5\n\tA 12,345 \U0001f600"]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    does = [vocabulary, ids, tokenizer.decode_batch(ids)]
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()


# Answers that can be given


def check_targets(tokenizer: Tokenizer, examples, eos=()) -> None:
    """ValueError, which names the example, if no tokens spell its target."""
    first = {}  # each target is checked once
    for e in examples:
        if e.answers and not e.options and e.target not in first:
            first[e.target] = replace(e, answers=(e.target,))
    check_answers(tokenizer, list(first.values()), eos)


def check_answers(tokenizer: Tokenizer, examples, eos=(), stops=None, limit=None) -> None:
    """ValueError, which names the example, if `predict` can return none of the accepted answers.

    It cannot return an answer that no tokens spell, or one that holds the text of stops[b]. One
    possible answer of several is enough. A warning counts the examples whose answers have more than
    `limit` tokens. A choice among options is right by its index, so it is not checked.
    """
    stops = stops or [""] * len(examples)
    free = [(e, stop) for e, stop in zip(examples, stops) if e.answers and not e.options]
    longer = []
    for e, stop in free:
        if any(spells(tokenizer, answer, eos, stop, limit) for answer in e.answers):
            continue
        if not any(spells(tokenizer, answer, eos, stop) for answer in e.answers):
            answer = e.answers[0]
            problem = f"the tokenizer has no tokens for the answer {answer!r}"
            if spells(tokenizer, answer, eos):
                problem = f"the answer {answer!r} holds {stop!r}; --stop sets another end"
            raise ValueError(f"{e.source}: {problem}")
        longer.append(e.source)
    if longer:
        scored = f"{len(longer)} of {len(free)} questions cannot be scored as right: their answers"
        text = f"{scored} have more than --max-new-tokens {limit} tokens (first: {longer[0]})"
        warnings.warn(text, stacklevel=2)


def spells(tokenizer: Tokenizer, answer: str, eos, stop: str = "", limit=None) -> bool:
    """Whether `predict` returns the answer if the LM generates its tokens. What is returned may
    differ from it in Unicode form and in what the scores normalise."""
    for text in (f" {answer}", answer):  # tokenizers differ in which they need
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:limit]
        end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
        given = tokenizer.decode(ids[:end])
        given = given[: find_stop(given, stop)].strip()
        if given and metrics.exact_match(given, [answer], "NFKC"):
            return True
    return False


# The commands `ask` and `score` of eval.py


def load_model(args) -> tuple:
    """Return (model, prefix, tokenizer, record) of a run, or of a bare LM, whose record is {}.

    Flags that were not given become those of the run.
    """
    if parallel.launched() > 1:
        parallel.start("cpu")
    model = args.model or (None if args.run else Path(__file__).parent / "assets" / "lm")
    loaded = load_either(args.run, model)
    take_flags(args, [loaded[-1].get("arguments", {})])
    return loaded


def load_either(run: str | None, model: str | Path | None) -> tuple:
    """Return (model, prefix, tokenizer, record) of a run, or of a bare LM, whose record is {}."""
    if run:
        from runs import load_run

        return load_run(run, model=model)
    from checkpoints import load_tokenizer
    from model import LM

    lm = LM.from_pretrained(model)
    return lm, None, load_tokenizer(lm.folder, lm.config.vocab_size), {}


def load_text(folder: str, text: str, max_new_tokens: int) -> tuple:
    """Load a checkpoint or a run. Return (model, prefix, tokenizer, the text's token ids).

    A run adds to the text what it was trained to read with it: filler, candidates or passages.
    """
    if not (Path(folder) / "run.json").is_file():
        lm, prefix, tokenizer, _ = load_either(None, folder)
        (ids,) = data.encode_prompts(tokenizer, [text])
        return lm, prefix, tokenizer, ids
    model, prefix, tokenizer, _ = load_either(folder, None)
    example = data.Example(text, "", (), "text", "text", "the text")
    (ids,), _, prefix = prepare(model, tokenizer, [example], prefix, max_new_tokens)
    return model, stack_prefixes(prefix, [ids]), tokenizer, ids


def take_flags(args, runs: list[dict]) -> None:
    """Set --stop, --max-new-tokens and --rank-by, where they were not given, as in the arguments of
    the runs. ValueError if these differ."""
    for key, default in (("stop", None), ("max_new_tokens", 16), ("rank_by", "sum")):
        if getattr(args, key) is not None:
            continue
        found = list(dict.fromkeys(run.get(key, default) for run in runs)) or [default]
        if len(found) > 1:
            flag, values = f"--{key.replace('_', '-')}", " and ".join(map(str, found))
            raise ValueError(f"{flag} is needed: the runs of --prompts have {values}")
        setattr(args, key, found[0])


def answer(args, model, prefix, tokenizer, examples: list) -> list[str | int]:
    """Answer examples as the flags say. The result is what eval.score takes."""
    from recurse import route

    if (args.shots is None) != (args.shots_from is None):
        raise ValueError("--shots and --shots-from need each other")
    shots, new = [], args.max_new_tokens
    if args.shots:
        shots = read_shots(args.shots_from, args.shots, args.seed, examples)
    ends = metrics.stops(examples, args.stop)
    if shots and args.stop is None:  # otherwise the model goes on with an example of its own
        ends = [end or SHOT_END for end in ends]
    check_answers(tokenizer, examples, model.config.eos, ends, new)  # not of a share

    def answer_part(rows: Sequence[int]) -> list[str | int]:
        part, stops = [examples[row] for row in rows], [ends[row] for row in rows]
        ids, options, before = prepare(model, tokenizer, part, prefix, new, shots, stops, False)
        if getattr(args, "out", None):  # before the work: the folder may be one that cannot be made
            Path(args.out).mkdir(parents=True, exist_ok=True)
        asked = (model, tokenizer, ids, before, new, options, stops, args.eval_tokens)
        return route(args.threshold, *asked, mean=args.rank_by == "mean")[0]

    return parallel.divide(answer_part, range(len(examples)))


def environment(device: str) -> dict:
    """What the process computes with: versions and hardware."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    hardware = {"device": name, "threads": torch.get_num_threads()}
    if parallel.count() > 1:
        hardware["processes"] = parallel.count()
    return {"versions": versions | {"numpy": np.__version__}, "hardware": hardware}


def score_record(args, model, tokenizer, results: dict) -> dict:
    """What `score --out` stores beside the predictions, in score.json.

    Keys: command, arguments (--stop, --max-new-tokens and --rank-by as used), fingerprint (of the
    LM), tokenizer_hash, eos (the tokens that ended answers), adapter_hash, filler_hash (of trained
    filler), file_hash, shots_hash, versions, hardware, results.
    """
    ignored = ("function", "command", "argv", "out", "eval_tokens")  # they change no answer
    names = {"adapter_hash": "adapter_model.safetensors", "filler_hash": "pause.safetensors"}
    files = {key: Path(args.run) / name if args.run else None for key, name in names.items()}
    files |= {"file_hash": args.file, "shots_hash": args.shots_from}
    hashes = {"tokenizer_hash": hash_tokenizer(tokenizer), "eos": list(model.config.eos)}
    for key, path in files.items():
        known = path is not None and Path(path).is_file()  # of an LM trained itself: no adapter
        hashes[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest() if known else None
    return {
        "command": shlex.join(["python", "eval.py", *args.argv]),
        "arguments": {key: value for key, value in vars(args).items() if key not in ignored},
        "fingerprint": getattr(model, "lm", model).fingerprint(),
        **hashes,
        **environment("cpu"),
        "results": results,
    }


def check_out(out: str | None) -> None:
    """FileExistsError if no folder can be made at `out`, or if it holds predictions already."""
    if out and Path(out).exists() and not Path(out).is_dir():
        raise FileExistsError(f"--out {out}: is not a folder")
    if out and (Path(out) / "predictions.jsonl").exists():
        raise FileExistsError(f"{out}/predictions.jsonl exists; choose another --out")


def finish_scores(args, model, tokenizer, records: list[dict], **more) -> dict:
    """Print and return the scores. With --out, write predictions.jsonl and beside it score.json:
    `score_record`, and `more`."""
    result = metrics.summary(records)
    if args.out:
        record = score_record(args, model, tokenizer, result) | more
        if parallel.first():
            write_json(Path(args.out) / "score.json", record)
            write_lines(Path(args.out) / "predictions.jsonl", records)
    show_result("score", result, asked=not args.out)
    return result
