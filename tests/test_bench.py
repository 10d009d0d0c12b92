"""bench.py plan: the memory that a run will need, against what autograd keeps of a step."""

import pytest
import torch

import adapters
import bench
import recurse
import train
from model import LM, Config


def kept_for_backward(compute, *modules):
    """Bytes that autograd keeps of what compute() makes, each storage once, without parameters."""
    known = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    kept = {}

    def pack(tensor):  # holds the tensor, so that no other takes its address
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compute()
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in known)


NEOX = {"family": "gpt_neox", "layer_norm": True, "gated": False, "activation": "gelu"}
NEOX |= {"mlp_bias": True, "qkv_bias": True, "o_bias": True, "parallel": True, "tied": False}


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("family", [{}, NEOX])
def test_the_plan_counts_what_a_step_holds(tmp_path, capsys, method, family):
    LM(Config(60, 48, 3, 4, 4 if family else 2, 12, 96, 64, **family)).save(tmp_path / "lm")
    flags = (
        f"plan --method {method} --model {tmp_path}/lm --batch-size 5 --seq-len 40 --device cpu "
    )
    flags += f"--prompt-length 7 --max-new-tokens 3 --out {tmp_path}/out"
    table = bench.main(flags.split())
    assert not (tmp_path / "out").exists()
    lm = LM.from_pretrained(tmp_path / "lm")
    if method == "fine_tuning":
        adapter, trained = None, lm.requires_grad_(True)
    elif method == "prompt_tuning":
        adapter = trained = adapters.SoftPrompt(torch.randn(7, 48))
    else:
        adapter = trained = recurse.new_connector(lm, method, 2)

    def step():
        model, prefix = recurse.COMPOSITIONS[method](lm, adapter)
        return model(model.embed(torch.randint(60, (5, 40))), prefix)

    count = sum(p.numel() for p in trained.parameters())
    frozen = 0 if adapter is None else sum(p.numel() for p in lm.parameters())
    held = [table[key] for key in ("trained", "frozen weights", "optimiser (adamw)", "logits")]
    assert held == [4 * count, 4 * frozen, 8 * count, 3 * 4 * 15 * 60]
    kept = kept_for_backward(step, lm, trained)
    assert table["activations"] == pytest.approx(kept, rel=0.15)
    out, total = capsys.readouterr().out, sum(table.values()) / 1e9
    assert f"{count:,} parameters trained, {frozen:,} frozen" in out
    assert f"in all                 {total:8.2f} GB" in out


def test_the_plan_of_a_pretraining_counts_every_token_as_a_target(tmp_path):
    LM(Config(60, 48, 3, 4, 2, 12, 96, 64)).save(tmp_path / "lm")
    flags = f"plan --method neural_recursion --text --model {tmp_path}/lm --device cpu"
    flags += " --batch-size 5 --seq-len 40"
    assert bench.main(flags.split())["logits"] == 3 * 4 * 5 * 40 * 60
