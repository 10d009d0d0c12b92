"""Speed and memory beside the peers, measured in one run.

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
                                    what this command of train.py would need: see plan.py
python bench.py attention --device cuda
                                    attention.py beside PyTorch's attention, shape by shape
python bench.py retrieval           BM25 and re-ranking beside bm25s and sentence-transformers
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from show import Parser, run_program

import torch
import torch.nn.functional as F

import bench_attention
import bench_retrieval
import cli
import plan
from adapters import SoftPrompt
from generate import generate
from model import LM, Config
from runs import ASSETS


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
    before = plan.memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    seconds = timed(step)
    return {"seconds": seconds, "peak": plan.memory("VmHWM") - before}


# The command line


WORKLOADS = {"prompt": prompt_rows, "generation": generation_rows, "loading": loading_rows}


def main(argv: list[str] | None = None):
    """Measure and return the rows, or estimate memory and return the table of plan.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:
        return plan.main(argv[1:])
    if argv[:1] == ["attention"]:
        return bench_attention.main(argv[1:])
    if argv[:1] == ["retrieval"]:
        return bench_retrieval.main(argv[1:])
    description = "Speed and memory beside the peers, in one run. `bench.py plan` with flags of "
    description += "train.py estimates the memory and the operations of a run instead."
    parser = Parser(prog="bench.py", description=description)
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
    run_program("bench.py", main)
