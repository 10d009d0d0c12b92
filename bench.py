"""Speed and memory: beside the peers, measured in one run, and before a run, estimated.

prompt      a step of prompt tuning against PEFT on transformers. The frozen LM reads a shared
            prompt once per batch instead of once per example. Counting multiplications alone, a
            step computes P + BT instead of B(P + T) tokens. At P = 100, B = 32, T = 64, and with
            logits at 8 answer tokens instead of all 164, PEFT needs about 2.9 times as many.
generation  `generate` against transformers: 16 samples of 16 new tokens for each of 32 questions of
            24 tokens, and one greedy continuation of each. Samples share the reading of their
            question: 24 + 16 * 16 tokens instead of 16 * (24 + 16), 2.3 times as many.
loading     `LM.from_pretrained` and a first token against transformers, on a checkpoint of 1.1 GB,
            each time in a fresh process: seconds, and the peak of the memory beyond that of Python
            and the libraries, divided by the size of the weights.

pip install -r requirements-dev.txt
python bench.py                     a row for each workload: our median, the peer's, and the ratio
python bench.py --only generation   the rows of one workload; --tiny runs every row in seconds
python bench.py plan --method neural_recursion --model EleutherAI/pythia-1b
                                    the memory that this command of train.py would need, from
                                    config.json and the lengths of its questions, or from --seq-len
                                    tokens in each; --text: of pretrain.py connector
python bench.py attention --device cuda
                                    attention.py beside PyTorch's attention, shape by shape
python bench.py retrieval           BM25 and re-ranking beside bm25s and sentence-transformers
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import bench_attention
import bench_retrieval
import cli
import recurse
import start
import train
from adapters import Connector, SoftPrompt
from checkpoints import HUB_FILES, load_tokenizer, read_config, resolve, skip_init
from fit import Recipe, linear_weights, make_optimizer
from generate import generate
from model import LM, Config
from runs import ASSETS
from show import show


def llama(
    vocab_size: int, dim: int, n_layers: int, n_heads: int, hidden_dim: int, **more
) -> Config:
    """The shape of a Llama without grouped heads."""
    head_dim = dim // n_heads
    return Config(vocab_size, dim, n_layers, n_heads, n_heads, head_dim, hidden_dim, **more)


SMALL = llama(4096, 192, 6, 6, 512, max_len=512)
LLAMA_100M = llama(32_000, 768, 12, 12, 1792, max_len=1024)
LLAMA_1GB = llama(32_000, 1024, 16, 16, 2816, max_len=1024, tied=False)
TINY = dict(vocab_size=300, dim=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, hidden_dim=64)


def race(ours, theirs, runs: int) -> dict:
    """Time both in turn, `runs` times. The caller has run both once, as a warm-up."""
    return compare([[timed(step) for step in (ours, theirs)] for _ in range(runs)])


def timed(step) -> float:
    """Seconds that step() takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(seconds: list) -> dict:
    """From pairs (our seconds, the peer's): the medians, and the median ratio with its spread."""
    ratios = sorted(b / a for a, b in seconds)
    medians = {
        "ours": statistics.median(a for a, _ in seconds),
        "peer": statistics.median(b for _, b in seconds),
    }
    return medians | {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


# Prompt tuning


def prompt_rows(runs: int, tiny: bool):
    """Yield a row and a note for a long prompt and for a short one."""
    for P in (100, 20):
        B, T, answer, config = (2, 12, 4, replace(SMALL, **TINY)) if tiny else (32, 64, 8, SMALL)
        ours, theirs = prompt_tuning_steps(P, B, T, answer, config)
        (loss, gradient), (peer_loss, peer_gradient) = ours(), theirs()
        row = {"workload": f"prompt tuning P={P} B={B} T={T} V={config.vocab_size}"}
        row |= race(ours, theirs, runs)
        row["loss_difference"] = abs(loss - peer_loss)
        largest = peer_gradient.abs().max().item()
        row["gradient_difference"] = (gradient - peer_gradient).abs().max().item() / largest
        note = f"losses differ by {row['loss_difference']:.0e}, "
        yield row, note + f"gradients by {row['gradient_difference']:.0e} of the largest"


def prompt_tuning_steps(P: int, B: int, T: int, answer: int, config: Config):
    """Return (our step, PEFT's step): forward and backward -> (loss, gradient of the prompt)."""
    import peft
    import transformers

    lm = LM(config).requires_grad_(False)
    prompt = SoftPrompt(lm.embed(torch.randint(config.vocab_size, (P,))))
    with tempfile.TemporaryDirectory() as folder:
        lm.save(Path(folder) / "lm")
        base = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "lm")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    peer = peft.get_peft_model(base, config)
    weight = peer.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt.vectors.data)
    ids = torch.randint(lm.config.vocab_size, (B, T))
    labels = ids.clone()
    labels[:, :-answer] = -100

    def ours():
        prompt.zero_grad()
        h = lm(lm.embed(ids[:, :-1]), prefix=lm.read(prompt()))
        loss = F.cross_entropy(lm.logits(h[:, -answer:]).flatten(0, 1), ids[:, -answer:].flatten())
        loss.backward()
        return loss.item(), prompt.vectors.grad

    def theirs():
        peer.zero_grad()
        loss = peer(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        return loss.item(), weight.grad

    return ours, theirs


# Generation


def generation_rows(runs: int, tiny: bool):
    """Yield rows for samples and for greedy decoding, by the embedded LM and by a random one."""
    with tempfile.TemporaryDirectory() as folder:
        LM(replace(LLAMA_100M, **TINY) if tiny else LLAMA_100M).save(Path(folder) / "lm")
        for name, source in (("embedded LM", ASSETS / "lm"), ("random Llama", Path(folder) / "lm")):
            lm, peer = LM.from_pretrained(source), load_peer(source)
            for n in (2 if tiny else 16, 1):
                yield generation_row(name, source, lm, peer, n, runs, tiny)


def generation_row(name: str, source: Path, lm: LM, peer, n: int, runs: int, tiny: bool):
    """Return the row and the note of n samples, or of greedy decoding if n is 1."""
    questions, tokens, new = (3, 5, 4) if tiny else (32, 24, 16)
    ids = torch.randint(lm.config.vocab_size, (questions, tokens)).tolist()

    def ours():
        return generate_ours(lm, ids, new, n)

    def theirs():
        return generate_peer(peer, ids, new, n)

    same = sum(a == b for a, b in zip(ours(), theirs()))  # this is also the warm-up
    size = f"{sum(p.numel() for p in lm.parameters()) / 1e6:.0f}M"
    how = f"{questions} questions of {tokens}, " + (f"n={n}" if n > 1 else "greedy")
    row = {"workload": f"generate, {name} ({size}), {how}"} | race(ours, theirs, runs)
    for who in ("ours", "peer"):
        row[f"{who}_tokens_per_second"] = questions * n * new / row[who]
        row[f"{who}_peak"] = alone("generate", who, source, ids, new, n)["peak"]
    speeds = [f"{row[f'{who}_tokens_per_second']:,.0f}" for who in ("ours", "peer")]
    peaks = [f"{row[f'{who}_peak'] / 1e6:,.0f}" for who in ("ours", "peer")]
    note = f"{' and '.join(speeds)} tokens a second; "
    note += f"at most {' and '.join(peaks)} MB beside the weights"
    if n == 1:
        row["identical"] = same / questions
        note += f"; {same} of {questions} continuations identical"
    return row, note


def load_peer(folder: Path, dtype: torch.dtype = torch.float32):
    """transformers' model of a checkpoint folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def generate_ours(lm: LM, ids: list[list[int]], new: int, n: int) -> list[list[int]]:
    """n samples of each question at temperature 1, or its greedy continuation if n is 1."""
    samples = generate(lm, ids, None, new, temperature=float(n > 1), n=n)
    return [sample.ids for row in samples for sample in row]


@torch.no_grad()
def generate_peer(peer, ids: list[list[int]], new: int, n: int) -> list[list[int]]:
    """The same with transformers. Neither side stops at an eos or narrows what it samples from."""
    tokens = torch.tensor(ids)
    options = {"do_sample": False}
    if n > 1:
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        options["num_return_sequences"] = n
    options |= {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return out[:, tokens.shape[1] :].tolist()


# Loading


def loading_rows(runs: int, tiny: bool):
    """Yield a row for a checkpoint stored in float32, and for one stored in bf16. Both are used in
    float32."""
    with tempfile.TemporaryDirectory() as folder:
        lm = LM(replace(LLAMA_1GB, **TINY) if tiny else LLAMA_1GB)
        size = 4 * sum(p.numel() for p in lm.parameters())
        for dtype in (torch.float32, torch.bfloat16):
            path = Path(folder) / str(dtype)
            lm.save(path, dtype)
            both = ("ours", "peer")
            results = [[alone("load", who, path) for who in both] for _ in range(runs + 1)]
            results = results[1:]  # the first fills the page cache
            stored = str(dtype).removeprefix("torch.")
            row = {"workload": f"load {size / 1e9:.2f} GB stored in {stored}, and a first token"}
            row |= compare([[result["seconds"] for result in pair] for pair in results])
            peaks = [max(pair[i]["peak"] for pair in results) / size for i in range(2)]
            row["ours_peak_over_weights"], row["peer_peak_over_weights"] = peaks
            yield row, f"peak memory {peaks[0]:.2f} and {peaks[1]:.2f} times the weights"


def alone(*task) -> dict:
    """Run a task in a fresh process. Returns its {"seconds", "peak"}; peak is in bytes, beyond what
    the process held before."""
    command = [sys.executable, __file__, "--alone", json.dumps(task, default=str)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_alone(kind: str, who: str, folder: str, *rest) -> dict:
    """The task of `alone`: kind is load or generate, who is ours or peer."""
    load, go = (LM.from_pretrained, generate_ours) if who == "ours" else (load_peer, generate_peer)
    if who == "peer":  # so that this import counts neither as time nor as memory
        import transformers.models.llama.modeling_llama  # noqa: F401

    def step():
        if kind == "generate":
            go(model, *rest)
        else:
            go(load(folder), [[1]], 1, 1)

    if kind == "generate":
        model = load(folder)
        go(model, [[1]], 1, 1)  # touches every weight, so the peak below is what comes on top
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    seconds = timed(step)
    return {"seconds": seconds, "peak": memory("VmHWM") - before}


def memory(mark: str) -> int:
    """Bytes of memory in use: VmRSS now, VmHWM at the peak."""
    return 1024 * int(re.search(rf"{mark}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# The memory of a run, before anything is loaded


@dataclass
class Lengths:
    """The longest of what a run reads, in tokens, and the fewest answer choices of a question."""

    text: int  # of a training text
    targets: int  # of a training text
    question: int
    new: int  # after a question: new tokens, or those of its longest option
    options: int
    kept: int  # positions of the first pass that are computed once and kept


def parse_plan(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of train.py, and with them --seq-len and --text."""
    first = cli.Parser(prog="bench.py plan", add_help=False)
    first.add_argument("--seq-len", type=cli.COUNT)  # of a question and its answer
    first.add_argument("--text", action="store_true")  # every token is a target, as in pretraining
    more, rest = first.parse_known_args(argv)
    args = train.parse(rest, "bench.py plan")
    args.seq_len, args.text = more.seq_len, more.text
    if args.text and args.seq_len is None:
        args.seq_len = 128  # as in pretrain.py
    return args


def read_lengths(args: argparse.Namespace, lm: LM, folder: str | Path) -> Lengths:
    """The lengths that --seq-len assumes, or else those of the questions of the run."""
    if args.seq_len:
        T, new = args.seq_len, args.max_new_tokens
        return Lengths(T, T if args.text else min(T, new), T, new, 0, 0)
    files = [name for name in HUB_FILES if "safetensors" not in name]
    tokenizer = load_tokenizer(args.tokenizer or resolve(folder, files), lm.config.vocab_size)
    task = start.load_task(args, lm, tokenizer)
    tokens, first_pass = task.tokens, train.first_pass(task)
    asked = [e for split in ("dev", "test") for e in tokens[split]]
    ends = [max(map(len, e.options), default=args.max_new_tokens) for e in asked]
    return Lengths(
        text=max(len(e.input) + len(e.target) - 1 for e in tokens["train"]),
        targets=max(len(e.target) for e in tokens["train"]),
        question=max((len(e.input) for e in asked), default=0),
        new=max(ends, default=0),
        options=min((len(e.options) for e in asked), default=0),
        kept=0 if first_pass is None else first_pass.positions,
    )


def estimate_memory(args: argparse.Namespace) -> dict[str, int]:
    """Print and return the bytes that this command will hold at most, by what holds them.

    The weights are counted from config.json. A step and an evaluation do not come at the same time,
    so the table has what a step holds, and what an evaluation holds beyond that.
    """
    if args.method == "id_pt":
        raise ValueError("plan: the encoder and the generator of id_pt are not counted yet")
    if args.method in train.OPEN_BOOK:
        raise ValueError(f"plan: what {args.method} reads is not counted yet")
    folder = args.model or ASSETS / "lm"
    config = Config(**read_config(resolve(folder, ["config.json"])))
    with torch.device("meta"), skip_init():
        lm = LM(config)
        module = planned(args, lm)
    lengths = read_lengths(args, lm, folder)
    trained = count(module.parameters())
    frozen = 0 if args.method == "fine_tuning" else count(lm.parameters())
    size = 2 if args.dtype == "bfloat16" else 4  # what is trained is in float32 all the same
    step = {"its gradients": 4 * trained} | step_memory(args, config, lengths, size)
    evaluation = evaluation_memory(args, config, lengths, size)
    table = {
        "frozen weights": size * frozen,
        "trained": 4 * trained,
        "the best so far": 4 * trained,
        f"optimiser ({args.optimizer})": optimizer_memory(args.optimizer, module),
        **step,
        "evaluation beyond this": max(0, evaluation - sum(step.values())),
    }
    if lengths.kept:
        table["first pass, kept"] = size * config.dim * lengths.kept
    if args.device == "cpu":
        recipe = Recipe(steps=1, lr=1.0, optimizer=args.optimizer)
        make_optimizer(torch.nn.Linear(1, 1), recipe)  # torch imports more for it
        table["Python and libraries"] = memory("VmRSS")  # this process has loaded the same ones
        # malloc keeps freed blocks: 0.2 to 0.65 of the others, in runs that were measured.
        table["allocator, about"] = max(sum(step.values()), evaluation) // 2
    print(f"{args.method}: {trained:,} parameters trained, {frozen:,} frozen; ", end="")
    print(f"{args.batch_size} texts of at most {lengths.text} tokens, {args.dtype}")
    for what, bytes_held in (table | {"in all": sum(table.values())}).items():
        print(f"{what:22} {bytes_held / 1e9:8.2f} GB")
    if args.device == "cuda":
        print("not counted: the CUDA context, and freed memory that torch's allocator keeps")
    return table


def count(parameters: Iterable[torch.Tensor]) -> int:
    """The number of entries of all parameters."""
    return sum(p.numel() for p in parameters)


def optimizer_memory(optimizer: str, trained: torch.nn.Module) -> int:
    """Bytes of the moments: two of each entry with AdamW, one with Adafactor or Muon."""
    entries, linear = count(trained.parameters()), count(linear_weights(trained))
    moments = {"adamw": 2 * entries, "adafactor": entries, "muon": 2 * entries - linear}
    return 4 * moments[optimizer]


def planned(args, lm: LM) -> torch.nn.Module:
    """What the method trains, or as many parameters."""
    parts = torch.nn.ModuleList()
    if args.method == "deep_prompt":
        parts.append(SoftPrompt(torch.empty(deep_parameters(args, lm.config), 1)))
    elif args.method in recurse.PROMPT_METHODS:
        parts.append(SoftPrompt(torch.empty(args.prompt_length, lm.config.dim)))
    elif args.method == "fine_tuning":
        parts.append(lm)
    elif args.method != "training_free":
        gaps = args.passes - 1 if args.connectors == "each" else 1
        parts.extend(Connector(lm.new_layers(args.connector_layers)) for _ in range(gaps))
    if args.pause_text == "trained":
        parts.append(SoftPrompt(torch.empty(args.pause, lm.config.dim)))
    return parts


def deep_parameters(args, c: Config) -> int:
    """Count what a deep prompt trains."""
    P, width = args.prompt_length, c.n_kv_heads * c.head_dim
    if args.reparam_dim is None:
        return P * 2 * c.n_layers * width
    mlp = (width + 1) * args.reparam_dim + (args.reparam_dim + 1) * 2 * c.n_layers * width
    return P * width + mlp


def step_memory(args, c: Config, lengths: Lengths, size: int) -> dict[str, int]:
    """What a training step holds beside the gradients."""
    trained_layers, frozen_layers = args.connector_layers, c.n_layers
    tokens = args.batch_size * lengths.text
    if args.method in recurse.PROMPT_METHODS:
        trained_layers = 0
    if args.method in ("prompt_tuning", "textual_recursion"):
        tokens += args.prompt_length  # read once per batch
    elif args.method == "fine_tuning":
        trained_layers, frozen_layers = c.n_layers, 0
    elif args.method == "lm_connector":  # the gradient ends in the Connector
        frozen_layers = 0
    elif args.method == "training_free":  # no step
        return {}
    elif args.method == "neural_recursion":  # the first pass keeps nothing
        trained_layers *= args.passes - 1
        frozen_layers *= args.passes - 1
    kept = trained_layers * activations(c, trained=True)
    kept += frozen_layers * activations(c, trained=False)
    targets = args.batch_size * lengths.targets
    return {
        "activations": size * tokens * kept,
        "logits": 3 * 4 * targets * c.vocab_size,  # with log softmax and gradient
    }


def evaluation_memory(args, c: Config, lengths: Lengths, size: int) -> int:
    """What a batch of questions holds: in all its rows at most --eval-tokens positions."""
    if args.text or not lengths.question:  # a loss without gradients, or nothing: less than a step
        return 0
    P = args.prompt_length if args.method in recurse.PROMPT_METHODS else 0
    length = P + lengths.question + lengths.new
    rows = min(128, max(1, args.eval_tokens // length))  # as in generate.predict
    gaps = args.passes - 1
    passes = {"neural_recursion": (gaps + 1) * c.n_layers + gaps * args.connector_layers}
    passes["training_free"] = 2 * c.n_layers
    passes |= dict.fromkeys((*recurse.PROMPT_METHODS, "fine_tuning"), c.n_layers)
    layers = passes.get(args.method, c.n_layers + args.connector_layers)
    cache = 2 * c.n_kv_heads * c.head_dim * layers * size
    cached = 2 * rows * length  # positions, before and after a row ends
    read, scored = rows * length, rows  # positions that a layer reads at once, and with logits
    if lengths.options:  # each question is read once, then its cache is copied for every option
        questions = math.ceil(rows / lengths.options)
        cached = (questions + rows) * length
        read = questions * length + rows * lengths.new
        scored = min(rows * lengths.new, max(1, 2**25 // c.vocab_size))  # generate.token_logprobs
    held = cached * cache + read * size * activations(c, trained=True)
    return held + 2 * 4 * scored * c.vocab_size


def activations(c: Config, trained: bool) -> int:
    """Count the values that a token leaves in one layer for the backward pass."""
    query, key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    values = 2 * c.dim + 2 * query + 2 * key  # inputs of the norms; q, k, v and attention's output
    values += c.hidden_dim * (3 if c.gated else 1)  # the activation's input, the gate's factors
    if trained:
        values += 2 * c.dim + query + c.hidden_dim  # inputs of the weights
    return values


# The command line


WORKLOADS = {"prompt": prompt_rows, "generation": generation_rows, "loading": loading_rows}


def main(argv: list[str] | None = None):
    """Measure and return the rows, or estimate memory and return the table."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:
        return estimate_memory(parse_plan(argv[1:]))
    if argv[:1] == ["attention"]:
        return bench_attention.main(argv[1:])
    if argv[:1] == ["retrieval"]:
        return bench_retrieval.main(argv[1:])
    description = "Speed and memory beside the peers, in one run. `bench.py plan` with flags of "
    description += "train.py estimates the memory of a run instead."
    parser = cli.Parser(prog="bench.py", description=description)
    text = "the rows of this workload; may be given several times; all if not given"
    parser.add_argument("--only", choices=WORKLOADS, action="append", help=text)
    parser.add_argument("--runs", type=cli.COUNT, default=5, help="timed pairs per workload")
    text = "tiny shapes, which show that every row runs and measure nothing"
    parser.add_argument("--tiny", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(run_alone(*json.loads(args.alone))))
        return []
    try:
        import peft  # noqa: F401
    except ImportError:
        text = "transformers and PEFT are not installed: pip install -r requirements-dev.txt"
        raise ValueError(text) from None
    torch.manual_seed(0)
    rows = []
    for workload in args.only or WORKLOADS:
        for row, note in WORKLOADS[workload](args.runs, args.tiny):
            rows.append(row)
            print(json.dumps(row) if args.json else as_line(row, note), flush=True)
    return rows


def as_line(row: dict, note: str) -> str:
    """A row as text."""
    ours, peer = (f"{1e3 * row[who]:,.0f} ms" for who in ("ours", "peer"))
    low, high = row["spread"]
    ratio = f"ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return f"{row['workload']}: {ours}, peer {peer}, {ratio}; {note}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        show(f"bench.py: {error}", "stderr")
        sys.exit(2)
