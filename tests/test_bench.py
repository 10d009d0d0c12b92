"""bench.py plan: the memory that a run needs, against what autograd keeps of a step and against the
peak of a whole run."""

import random
import shlex
import subprocess
import sys

import pytest
import torch
from tiny_runs import PEOPLE, ROOT, write_lines

import adapters
import bench
import plan
import recurse
import start
import train
from contest import count_operations
from data import train_tokenizer
from fit import Recipe, make_optimizer
from model import LM, Config
from t5 import T5Config, T5Encoder


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


def new_adapter(method, lm):
    """What the method trains around the LM; None if it trains the LM itself."""
    if method == "fine_tuning":
        return None
    if method == "deep_prompt":
        return adapters.DeepPrompt(lm.read(torch.randn(7, lm.config.dim)))
    if method == "id_pt":
        encoder = T5Encoder(ENCODER).requires_grad_(False)
        return adapters.PromptGenerator(encoder, torch.randn(6, 32), torch.randn(7, lm.config.dim))
    if method in recurse.PROMPT_METHODS:
        return adapters.SoftPrompt(torch.randn(7, lm.config.dim))
    connector = recurse.new_connector(lm, method, 2)
    connector.residual = True  # as by default
    return connector


UNPLANNED = ("training_free", *train.OPEN_BOOK)
PLANNED = [method for method in train.METHODS if method not in UNPLANNED]
ENCODER = T5Config(60, 32, 3, 4, 8, 80)
NEOX = {"family": "gpt_neox", "layer_norm": True, "gated": False, "activation": "gelu"}
NEOX |= {"mlp_bias": True, "qkv_bias": True, "o_bias": True, "parallel": True, "tied": False}


def test_the_plan_of_textual_recursion_leaves_out_the_stages_of_another_run(place):
    """And the samples of as many questions as --eval-tokens has positions for are held at once."""

    def planned(flags):
        line = f"--method textual_recursion --model {place}/lm/model --device cpu --seq-len 20"
        args = plan.parse(f"{line} --prompt-length 4 --steps 5 {flags}".split())
        return plan.estimate(args)[:2]

    for more, prompts in {"": 4, "--rounds 2": 7, "--no-cross-fit": 2}.items():
        step, steps = (planned(more)[1][key] for key in ("a step", "all steps"))
        assert steps == 5 * prompts * step
        taken = planned(f"{more} --stages-from other")[1]["all steps"]
        assert taken == 5 * step * (prompts - (1 if more == "--no-cross-fit" else 3))
    flags = "--candidates 8 --eval-tokens"
    few, many = (planned(f"{flags} {n}")[0]["evaluation beyond this"] for n in (300_000, 900_000))
    c = LM.from_pretrained(place / "lm" / "model").config
    position = 2 * c.n_kv_heads * c.head_dim * c.n_layers * 4  # bytes of keys and values
    assert 0.25 < (many - few) / (600_000 * position) < 0.5  # samples share their question's


def test_the_plan_of_an_int8_lm_holds_a_quarter_of_its_matrices(place):
    flags = [f"--seq-len 20 {more}" for more in ("", "--base-dtype int8")]
    whole, int8 = (plan_of(place, f)["frozen weights"] for f in flags)
    assert whole / 4 < int8 < 0.9 * whole  # the embeddings stay


def test_the_plan_of_a_residual_connector_is_that_of_any(place):
    """A sum leaves nothing for the backward pass: the test below counts what autograd keeps."""
    one, two = (plan_of(place, f"--seq-len 20 --residual {switch}") for switch in ("on", "off"))
    one["Python and libraries"] = two["Python and libraries"]
    assert one == two


@pytest.mark.parametrize("method", PLANNED)
@pytest.mark.parametrize("family", [{}, NEOX])
def test_the_plan_counts_what_a_step_holds_and_computes(
    tmp_path, monkeypatch, capsys, method, family
):
    LM(Config(60, 48, 2, 4, 4 if family else 2, 12, 96, 128, **family)).save(tmp_path / "lm")
    T5Encoder(ENCODER).save(tmp_path / "t5")
    flags = f"--method {method} --model {tmp_path}/lm --batch-size 5 --seq-len 40 --device cpu "
    flags += f"--prompt-length 7 --max-new-tokens 3 --out {tmp_path}/out --candidates 6 --steps 9 "
    flags += f"--encoder {tmp_path}/t5 --encoder-prompt 6"
    estimate = plan.estimate(plan.parse(flags.split()))
    monkeypatch.setattr(plan, "estimate", lambda args: estimate)
    table, operations = bench.main(["plan", *flags.split()]), estimate[1]
    # A candidate has a separator, and four more tokens stand around all of them.
    T = 40 + 6 * (3 + 1) + 4 if method == "textual_recursion" else 40
    assert not (tmp_path / "out").exists()
    lm = LM.from_pretrained(tmp_path / "lm")
    if method == "fine_tuning":
        adapter, trained = None, lm.requires_grad_(True)
    else:
        adapter = trained = new_adapter(method, lm)

    def step():
        model, prefix = recurse.COMPOSITIONS[method](lm, adapter)
        ids = torch.randint(60, (5, T))
        prefix = prefix(ids.tolist()) if callable(prefix) else prefix
        return model(model.embed(ids), prefix, last=3)

    def whole_step():
        lm.logits(step()).sum().backward()

    count = sum(p.numel() for p in trained.parameters())
    frozen = 0 if adapter is None else sum(p.numel() for p in lm.parameters())
    held = [table[key] for key in ("trained", "frozen weights", "optimiser (adamw)", "logits")]
    assert held == [4 * count, 4 * frozen, 8 * count, 3 * 4 * 15 * 60]
    kept = kept_for_backward(step, lm, trained, *getattr(adapter, "encoder", []))
    assert table["activations"] == pytest.approx(kept, rel=0.15)
    assert operations["a step"] == pytest.approx(count_operations(whole_step, lm), rel=0.12)
    prompts = 4 if method == "textual_recursion" else 1  # of all, of either half, and the last
    assert operations["all steps"] == 9 * prompts * operations["a step"]
    out, total = capsys.readouterr().out, sum(table.values()) / 1e9
    assert f"{count:,} parameters trained, {frozen:,} frozen" in out
    assert f"in all                 {total:8.2f} GB" in out


@pytest.mark.parametrize("method", ["neural_recursion", "prompt_tuning", "fine_tuning"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_the_plan_counts_what_an_optimiser_holds(tmp_path, method, optimizer):
    LM(Config(60, 48, 3, 4, 2, 12, 96, 64, tied=False)).save(tmp_path / "lm")
    flags = f"plan --method {method} --model {tmp_path}/lm --optimizer {optimizer} --seq-len 20"
    table = bench.main([*flags.split(), "--prompt-length", "7"])
    lm = LM.from_pretrained(tmp_path / "lm")
    trained = new_adapter(method, lm) or lm.requires_grad_(True)
    update = make_optimizer(trained, Recipe(steps=1, lr=0.1, optimizer=optimizer))
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    update.step()
    states = update.state_dict()["state"].values()
    held = sum(v.nbytes for state in states for key, v in state.items() if key != "step")
    assert table[f"optimiser ({optimizer})"] == held


def test_the_plan_of_a_pretraining_counts_every_token_as_a_target(tmp_path):
    LM(Config(60, 48, 3, 4, 2, 12, 96, 64)).save(tmp_path / "lm")
    flags = f"plan --method neural_recursion --text --model {tmp_path}/lm --device cpu"
    flags += " --batch-size 5 --seq-len 40"
    assert bench.main(flags.split())["logits"] == 3 * 4 * 5 * 40 * 60


def plan_of(place, flags, method="neural_recursion"):
    line = f"plan --method {method} --model {place}/lm/model --device cpu"
    line += f" --train {place}/train.jsonl --encoder {place}/t5/model"
    return bench.main(shlex.split(f"{line} {flags}"))


@pytest.mark.parametrize("method, words", [("neural_recursion", 1), ("fine_tuning", 12)])
def test_the_plan_reads_the_lengths_of_the_questions(place, tmp_path, capsys, method, words):
    """They are those of the longest training question with its answer, in tokens of the LM."""
    rows = [{"question": "why " * n, "answer": ["so it is"]} for n in (1, words)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    flags = f"--train {file} --max-new-tokens 1"
    args = train.parse(["--method", method, "--model", f"{place}/lm/model", *flags.split()])
    longest = start.load_task(args, *start.load_lm(args)).tokens["train"][1]
    T, S = len(longest.input) + len(longest.target) - 1, len(longest.target)
    table = plan_of(place, flags, method)
    assumed = plan_of(place, f"--seq-len {T} --max-new-tokens {S}", method)
    assert table["activations"] == assumed["activations"]
    assert table["logits"] == 3 * 4 * 32 * S * 300
    assert f"at most {T} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("method", PLANNED)
def test_the_plan_counts_evaluation(place, method):
    """It grows with the budget of tokens, with the prompt, and not without questions to answer."""
    rest = f"--dev {place}/dev.jsonl --batch-size 1 --candidates 2 --eval-tokens"
    cases = ("", f"{rest} 500", f"{rest} 1000", f"{rest} 1000 --prompt-length 40")
    beyond = [plan_of(place, flags, method)["evaluation beyond this"] for flags in cases]
    assert 0 == beyond[0] < beyond[1] < beyond[2]
    assert (method in recurse.PROMPT_METHODS) == (beyond[3] != beyond[2])


def test_the_plan_counts_the_mlp_of_a_deep_prompt(place, capsys):
    plan_of(place, "--prompt-length 4 --reparam-dim 8", "deep_prompt")
    lm = LM.from_pretrained(place / "lm" / "model")
    deep = adapters.DeepPrompt(lm.read(torch.randn(4, lm.config.dim)), hidden=8)
    count = sum(p.numel() for p in deep.parameters())
    assert f"deep_prompt: {count:,} parameters trained" in capsys.readouterr().out


def test_the_plan_counts_the_options_of_a_question(place, tmp_path):
    towns = [f"{name}ville" for name in PEOPLE]
    rows = [{"input": "where", "target": towns[0], "options": towns}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    flags = "--batch-size 1 --eval-tokens 2000 --max-new-tokens 1"
    alone = write_lines(tmp_path / "alone.jsonl", [{"input": "where", "target": towns[0]}])
    one, many = (plan_of(place, f"{flags} --dev {f}") for f in (alone, file))
    # Every position of an option has logits, and the last token of a question only.
    assert many["evaluation beyond this"] > one["evaluation beyond this"]


@pytest.mark.parametrize("method", ["neural_recursion", "id_pt", "textual_recursion"])
def test_the_plan_is_near_the_peak_of_a_whole_run(tmp_path, monkeypatch, capsys, method):
    rng, words = random.Random(0), [f"w{i}" for i in range(500)]
    tokenizer = train_tokenizer([" ".join(rng.choices(words, k=200)) for _ in range(50)], 1000)
    lm = LM(Config(1000, 256, 6, 4, 4, 64, 704, 512, eos=(0,)))
    lm.save(tmp_path / "lm", tokenizer=tokenizer)
    T5Encoder(T5Config(1000, 256, 4, 4, 64, 704)).save(tmp_path / "t5")
    tokenizer.save(str(tmp_path / "t5" / "tokenizer.json"))

    def rows(count, length):
        for _ in range(count):
            yield {"input": " ".join(rng.choices(words, k=length)), "target": "w1"}

    asked = 4 if method == "textual_recursion" else 12  # as many as are answered at once
    write_lines(tmp_path / "train.jsonl", rows(24, 20))
    write_lines(tmp_path / "dev.jsonl", rows(asked, 150))
    flags = f"--method {method} --encoder t5 --candidates 8 --model lm --train train.jsonl "
    flags += "--dev dev.jsonl --steps 2 --batch-size 4 --device cpu --connector-layers 1 "
    flags += "--max-new-tokens 4 --eval-tokens 2000"
    monkeypatch.chdir(tmp_path)
    plan.main(flags.split())
    lines = capsys.readouterr().out.splitlines()
    (total,) = [line.split()[2] for line in lines if "in all" in line]
    code = "import resource, sys, train; train.main(sys.argv[1:])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    call = [sys.executable, "-c", code, *flags.split()]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert 0.7 < float(total) * 1e9 / int(result.stdout.splitlines()[-1]) < 1.5


def test_a_loop_that_trains_nothing_has_a_plan_without_steps(place):
    flags = ["--method", "training_free", "--model", f"{place}/lm/model", "--device", "cpu"]
    flags += ["--train", f"{place}/train.jsonl", "--dev", f"{place}/dev.jsonl"]
    table, operations, _ = plan.estimate(plan.parse(flags))
    assert table["frozen weights"] > table["trained"] == 0 == min(table.values())
    assert list(operations) == ["an answer"] and operations["an answer"] > 0


def test_the_plan_counts_a_prompt_for_each_task(place):
    one, each = (
        plan_of(place, f"--prompt-length 4 {more}", "prompt_tuning") for more in ("", "--per-task")
    )
    assert each["trained"] == 2 * one["trained"]  # the tasks a and b
    assert each["activations"] > one["activations"]  # every text has a copy of its prompt


def test_the_plan_counts_the_blocks_that_are_computed_again(place):
    flags = f"--model {ROOT}/assets/lm --seq-len 60 --prompt-length 4"  # 6 blocks
    whole, again = (
        plan_of(place, f"{flags} {more}", "prompt_tuning")
        for more in ("", "--checkpoint-activations")
    )
    assert 0.2 * whole["activations"] < again["activations"] < 0.5 * whole["activations"]
    with pytest.raises(ValueError, match="--checkpoint-activations: not for neural_recursion"):
        plan_of(place, "--checkpoint-activations")


@pytest.mark.parametrize("method", train.OPEN_BOOK)
def test_the_plan_refuses_what_reads_passages(place, method):
    with pytest.raises(ValueError, match=f"plan: what {method} reads is not counted yet"):
        plan_of(place, "", method)


def test_a_plan_without_an_encoder_names_the_flag(place):
    with pytest.raises(ValueError, match="--encoder"):
        plan_of(place, "--encoder nowhere", "id_pt")
