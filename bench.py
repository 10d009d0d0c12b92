"""Speed beside the peers, in one run on the same weights and the same batch.

Prompt tuning against PEFT on transformers: the frozen LM reads a shared prompt once per batch instead of once per
example. Counting multiplications alone, a step computes P + BT instead of B(P + T) tokens, so at P = 100, B = 32, T = 64
and a vocabulary computed at 8 answer tokens instead of at all 164 positions, theirs needs about 2.9 times as many.

    pip install -r requirements-dev.txt
    python bench.py      ->  a row for each workload: our median, the peer's, the ratio with its spread
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from adapters import SoftPrompt
from model import LM, Config


def prompt_tuning_steps(P: int, B: int, T: int, answer: int, vocab_size: int):
    """(our step, PEFT's step): functions that run forward and backward and return (loss, the prompt's gradient (P, C))."""
    import peft
    import transformers

    lm = LM(Config(vocab_size, dim=192, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=32, hidden_dim=512, max_len=512)).requires_grad_(False)
    prompt = SoftPrompt(lm.embed(torch.randint(vocab_size, (P,))))
    with tempfile.TemporaryDirectory() as folder:
        lm.save(Path(folder) / "lm")
        base = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "lm")
    peer = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    weight = peer.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt.vectors.data)
    ids = torch.randint(vocab_size, (B, T))
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


def race(ours, theirs, runs: int) -> dict:
    """Both in turn, after a warm-up: median seconds of each, and the ratio theirs / ours pair by pair (low, median, high)."""
    (loss, gradient), (peer_loss, peer_gradient) = ours(), theirs()
    seconds = []
    for _ in range(runs):
        pair = []
        for step in (ours, theirs):
            start = time.perf_counter()
            step()
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    ratios = sorted(b / a for a, b in seconds)
    return {
        "ours": statistics.median(a for a, _ in seconds),
        "peer": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
        "loss_difference": abs(loss - peer_loss),
        "gradient_difference": (gradient - peer_gradient).abs().max().item() / peer_gradient.abs().max().item(),
    }


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description="Our speed beside the peers', in one run.")
    parser.add_argument("--runs", type=int, default=15, help="timed pairs per workload (default 15)")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("PEFT is not installed: pip install -r requirements-dev.txt") from None
    torch.manual_seed(0)
    rows = []
    for P, B, T, vocab_size in ((100, 32, 64, 4096), (20, 32, 64, 4096)):
        row = {"workload": f"prompt tuning P={P} B={B} T={T} V={vocab_size}"} | race(*prompt_tuning_steps(P, B, T, 8, vocab_size), args.runs)
        rows.append(row)
        if args.json:
            print(json.dumps(row))
        else:
            print(f"{row['workload']}: {1e3 * row['ours']:.0f} ms, PEFT {1e3 * row['peer']:.0f} ms, ratio {row['ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f}); "
                  f"losses differ by {row['loss_difference']:.0e}, gradients by {row['gradient_difference']:.0e} of the largest")  # fmt: skip
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
