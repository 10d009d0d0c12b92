"""Speed and memory beside the peers, in one run on the same weights and the same batch.

prompt      a step of prompt tuning against PEFT on transformers. The frozen LM reads a shared prompt once per batch
            instead of once per example. Counting multiplications alone, a step computes P + BT instead of B(P + T) tokens,
            so at P = 100, B = 32, T = 64 and a vocabulary computed at 8 answer tokens instead of at all 164 positions,
            theirs needs about 2.9 times as many.
generation  `generate` against transformers: 16 samples of 16 new tokens for each of 32 questions of 24 tokens, and one greedy
            continuation of each. Samples share the reading of their question: 24 + 16 * 16 tokens instead of 16 * (24 + 16),
            2.3 times as many.
loading     `LM.from_pretrained` and a first token against transformers, on a checkpoint of 1.1 GB, each time in a fresh
            process: seconds, and the most memory held beyond what Python and the libraries hold, over the size of the weights.

pip install -r requirements-dev.txt
python bench.py                     ->  a row for each workload: our median, the peer's, the ratio with its spread
python bench.py --only generation   ->  those rows alone; --tiny runs every row in seconds, to see that it runs
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from adapters import SoftPrompt
from model import LM, Config, generate

ASSETS = Path(__file__).parent / "assets"
SMALL = Config(
    4096, dim=192, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=32, hidden_dim=512, max_len=512
)
LLAMA_100M = Config(
    32_000,
    dim=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    hidden_dim=1792,
    max_len=1024,
)
LLAMA_1GB = Config(
    32_000,
    dim=1024,
    n_layers=16,
    n_heads=16,
    n_kv_heads=16,
    head_dim=64,
    hidden_dim=2816,
    max_len=1024,
    tied=False,
)
TINY = dict(vocab_size=300, dim=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, hidden_dim=64)


def race(ours, theirs, runs: int) -> dict:
    """Both in turn, after a warm-up: median seconds of each, and the ratio theirs / ours pair by pair (low, median, high)."""
    return compare([[timed(step) for step in (ours, theirs)] for _ in range(runs)])


def timed(step) -> float:
    """Seconds that step() takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(seconds: list) -> dict:
    """Pairs (our seconds, the peer's) -> medians, and the ratio with its spread."""
    ratios = sorted(b / a for a, b in seconds)
    medians = {
        "ours": statistics.median(a for a, _ in seconds),
        "peer": statistics.median(b for _, b in seconds),
    }
    return medians | {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


def describe(lm: LM) -> str:
    """The number of parameters."""
    return f"{sum(p.numel() for p in lm.parameters()) / 1e6:.0f}M"


# --- Prompt tuning -------------------------------------------------------------------------------------------------------


def prompt_rows(runs: int, tiny: bool):
    """A row for a long prompt and one for a short one."""
    for P in (100, 20):
        B, T, answer, config = (2, 12, 4, replace(SMALL, **TINY)) if tiny else (32, 64, 8, SMALL)
        ours, theirs = prompt_tuning_steps(P, B, T, answer, config)
        (loss, gradient), (peer_loss, peer_gradient) = ours(), theirs()
        row = {"workload": f"prompt tuning P={P} B={B} T={T} V={config.vocab_size}"} | race(
            ours, theirs, runs
        )
        row["loss_difference"] = abs(loss - peer_loss)
        row["gradient_difference"] = (
            gradient - peer_gradient
        ).abs().max().item() / peer_gradient.abs().max().item()
        yield (
            row,
            f"losses differ by {row['loss_difference']:.0e}, gradients by {row['gradient_difference']:.0e} of the largest",
        )


def prompt_tuning_steps(P: int, B: int, T: int, answer: int, config: Config):
    """(our step, PEFT's step): functions that run forward and backward and return (loss, the prompt's gradient (P, C))."""
    import peft
    import transformers

    lm = LM(config).requires_grad_(False)
    prompt = SoftPrompt(lm.embed(torch.randint(config.vocab_size, (P,))))
    with tempfile.TemporaryDirectory() as folder:
        lm.save(Path(folder) / "lm")
        base = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "lm")
    peer = peft.get_peft_model(
        base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    weight = peer.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt.vectors.data)
    ids = torch.randint(config.vocab_size, (B, T))
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


# --- Generation ----------------------------------------------------------------------------------------------------------


def generation_rows(runs: int, tiny: bool):
    """Samples and greedy continuations, by the embedded LM and by a random one of 100M parameters."""
    questions, tokens, new, n = (3, 5, 4, 2) if tiny else (32, 24, 16, 16)
    with tempfile.TemporaryDirectory() as folder:
        LM(replace(LLAMA_100M, **TINY) if tiny else LLAMA_100M).save(Path(folder) / "lm")
        for name, source in (("embedded LM", ASSETS / "lm"), ("random Llama", Path(folder) / "lm")):
            lm, peer = LM.from_pretrained(source), load_peer(source)
            ids = torch.randint(lm.config.vocab_size, (questions, tokens)).tolist()
            for samples in (n, 1):
                ours, theirs = (
                    lambda f=f, model=model: f(model, ids, new, samples)
                    for f, model in ((generate_ours, lm), (generate_peer, peer))
                )
                same = sum(a == b for a, b in zip(ours(), theirs()))  # this is also the warm-up
                how = f"n={samples}" if samples > 1 else "greedy"
                row = {
                    "workload": f"generate, {name} ({describe(lm)}), {questions} questions of {tokens}, {how}"
                }
                row |= race(ours, theirs, runs)
                row |= {
                    f"{who}_tokens_per_second": questions * samples * new / row[who]
                    for who in ("ours", "peer")
                }
                row |= {
                    f"{who}_peak": alone("generate", who, source, ids, new, samples)["peak"]
                    for who in ("ours", "peer")
                }
                note = f"{row['ours_tokens_per_second']:,.0f} and {row['peer_tokens_per_second']:,.0f} tokens a second; "
                note += f"at most {row['ours_peak'] / 1e6:,.0f} and {row['peer_peak'] / 1e6:,.0f} MB beside the weights"
                if samples == 1:
                    row["identical"] = same / questions
                    note += f"; {same} of {questions} continuations identical"
                yield row, note


def load_peer(folder: Path, dtype: torch.dtype = torch.float32):
    """transformers' model of a checkpoint folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def generate_ours(lm: LM, ids: list[list[int]], new: int, n: int) -> list[list[int]]:
    """Greedy for one continuation, else samples at temperature 1."""
    return [
        sample.ids
        for row in generate(lm, ids, None, new, temperature=float(n > 1), n=n)
        for sample in row
    ]


@torch.no_grad()
def generate_peer(peer, ids: list[list[int]], new: int, n: int) -> list[list[int]]:
    """The same by transformers, which neither stops at an eos nor narrows what it samples from."""
    tokens = torch.tensor(ids)
    options = (
        dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=n)
        if n > 1
        else dict(do_sample=False)
    )
    out = peer.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out[:, tokens.shape[1] :].tolist()


# --- Loading -------------------------------------------------------------------------------------------------------------


def loading_rows(runs: int, tiny: bool):
    """A checkpoint used as it is stored, and one stored in bfloat16 and used in float32."""
    with tempfile.TemporaryDirectory() as folder:
        lm = LM(replace(LLAMA_1GB, **TINY) if tiny else LLAMA_1GB)
        size = 4 * sum(p.numel() for p in lm.parameters())  # in float32, as it is used
        for dtype in (torch.float32, torch.bfloat16):
            path = Path(folder) / str(dtype)
            lm.save(path, dtype)
            results = [
                [alone("load", who, path) for who in ("ours", "peer")] for _ in range(runs + 1)
            ][1:]  # the first fills the page cache
            row = {
                "workload": f"load {size / 1e9:.2f} GB stored in {str(dtype).removeprefix('torch.')}, and a first token"
            }
            row |= compare([[result["seconds"] for result in pair] for pair in results])
            row |= {
                f"{who}_peak_over_weights": max(pair[i]["peak"] for pair in results) / size
                for i, who in enumerate(("ours", "peer"))
            }
            yield (
                row,
                f"peak memory {row['ours_peak_over_weights']:.2f} and {row['peer_peak_over_weights']:.2f} times the weights",
            )


def alone(*task) -> dict:
    """{"seconds", "peak"} of a task run by a fresh process: time, and bytes held at most beyond what it held before."""
    command = [sys.executable, __file__, "--alone", json.dumps(task, default=str)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def run_alone(kind: str, who: str, folder: str, *rest) -> dict:
    """What `alone` asks for: kind is load or generate, who is ours or peer."""
    load, go = (LM.from_pretrained, generate_ours) if who == "ours" else (load_peer, generate_peer)
    if who == "peer":
        import transformers.models.llama.modeling_llama  # so that its import counts neither as time nor as memory
    if kind == "generate":
        model = load(folder)
        go(model, [[1]], 1, 1)  # every weight has been touched: what follows is beside the weights
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest mark begins anew
    seconds = timed(
        lambda: go(model, *rest) if kind == "generate" else go(load(folder), [[1]], 1, 1)
    )
    return {"seconds": seconds, "peak": memory("VmHWM") - before}


def memory(mark: str) -> int:
    """Bytes resident in memory: VmRSS now, VmHWM at most."""
    return 1024 * int(re.search(rf"{mark}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


WORKLOADS = {"prompt": prompt_rows, "generation": generation_rows, "loading": loading_rows}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description="Our speed and memory beside the peers', in one run."
    )
    parser.add_argument(
        "--only",
        choices=WORKLOADS,
        action="append",
        help="these rows; may be given several times (default: all)",
    )
    parser.add_argument("--runs", type=int, default=5, help="timed pairs per workload (default 5)")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny shapes: shows that every row runs, measures nothing",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(run_alone(*json.loads(args.alone))))
        return []
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(
            "transformers and PEFT are not installed: pip install -r requirements-dev.txt"
        ) from None
    torch.manual_seed(0)
    rows = []
    for workload in args.only or WORKLOADS:
        for row, note in WORKLOADS[workload](args.runs, args.tiny):
            rows.append(row)
            ours, theirs = (f"{1e3 * row[who]:,.0f} ms" for who in ("ours", "peer"))
            ratio = f"ratio {row['ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"
            print(
                json.dumps(row)
                if args.json
                else f"{row['workload']}: {ours}, peer {theirs}, {ratio}; {note}",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
