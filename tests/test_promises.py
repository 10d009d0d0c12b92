"""Standing promises: imports, files that run alone, lengths, documented names, documents."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from forks import run_in_folders

ROOT = Path(__file__).parent.parent
TIERS = {  # imports at the top of a file go strictly down
    **dict.fromkeys(["families", "show", "int8", "parallel"], 0),
    **dict.fromkeys(["checkpoints", "data", "eval", "world"], 1),
    **dict.fromkeys(["attention", "generate"], 1),
    **dict.fromkeys(["model", "adapters", "questions", "rerank", "t5", "genres"], 2),
    **dict.fromkeys(["recurse", "suite", "retrieve", "documents", "cache"], 3),
    **dict.fromkeys(["filler", "passages", "replay"], 4),
    **dict.fromkeys(["openbook", "prompts", "textual", "convert"], 5),
    **dict.fromkeys(["runs", "reader", "handover"], 6),
    **dict.fromkeys(["fit", "cli", "start", "study", "corpus", "verify"], 7),
    **dict.fromkeys(["encoders", "contest", "cost"], 8),
    **dict.fromkeys(["train", "audit", "prompt_audit"], 9),
    **dict.fromkeys(["pretrain", "promptability", "plan"], 10),
    **dict.fromkeys(["bench_attention", "bench_retrieval"], 10),
    **dict.fromkeys(["bench_train", "bench_generate", "bench_processes"], 10),
    **dict.fromkeys(["bench", "transfer", "promptability_study"], 11),
    **dict.fromkeys(["recursion_study", "reader_study", "prompt_study", "transfer_tables"], 12),
    "transfer_study": 13,
    "reproduce": 14,
}
FILES = sorted(ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in FILES}
CORE = {"torch", "numpy", "tokenizers", "safetensors"}
DEVELOPMENT = {"contest": {"transformers"}, "attention": {"triton"}}  # not required
DEVELOPMENT |= {"bench_train": {"peft", "transformers"}, "bench_processes": {"transformers"}}
DEVELOPMENT["bench_retrieval"] = {"bm25s", "rank_bm25", "sentence_transformers"}
README = (ROOT / "README.md").read_text()
each_file = pytest.mark.parametrize("name", TREES)


def imports(node):
    """(node, top-level name) of every import below `node`."""
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from ((n, alias.name.split(".")[0]) for alias in n.names)
        elif isinstance(n, ast.ImportFrom):
            assert not n.level, f"line {n.lineno}: a relative import needs a package"
            yield n, n.module.split(".")[0]


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


@each_file
def test_imports_go_down_and_optional_ones_stand_inside_functions(name):
    """Inside a function a file may reach up, but no further than runs, whose own command is in
    verify.py. attention.py is made of Triton's kernels, so it is itself imported inside functions
    only."""
    inside = {n for function in functions(TREES[name]) for n, _ in imports(function)}
    for node, imported in imports(TREES[name]):
        where = f"{name}.py:{node.lineno} imports {imported}"
        if imported in TIERS:
            late = TIERS[imported] <= TIERS["runs"] or (name, imported) == ("runs", "verify")
            late = late and node in inside
            assert TIERS[imported] < TIERS[name] or late, where
            assert imported != "attention" or node in inside, where
        elif node not in inside and (name, imported) != ("attention", "triton"):
            assert imported in CORE or imported in sys.stdlib_module_names, where


def test_what_is_imported_is_required():
    required = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M))
    known = required | TIERS.keys() | set(sys.stdlib_module_names)
    for name, tree in TREES.items():
        missing = {imported for _, imported in imports(tree)} - known
        assert missing <= DEVELOPMENT.get(name, set()), name


@each_file
def test_files_lines_and_functions_are_short(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 520
    for function in functions(TREES[name]):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{name}.py: {function.name} has {length} lines"


def test_no_line_is_wider_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def test_attention_comes_first():
    lines = (ROOT / "model.py").read_text().splitlines()
    assert any(line.startswith("def attend(") for line in lines[:129])


@each_file
def test_public_names_are_documented(name):
    assert ast.get_docstring(TREES[name])
    for node in TREES[name].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name == "main", f"{name}.py: {node.name}"


@each_file
def test_no_pickle_and_nothing_swallowed(name):
    forbidden = ("torch.load", "torch.save", "np.load", "eval", "exec")
    for node in ast.walk(TREES[name]):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in forbidden
            strict = called.endswith("load_state_dict") and len(node.args) > 1
            assert not strict, "strict=False by position"
        if isinstance(node, ast.keyword) and node.arg == "strict":
            assert ast.unparse(node.value) == "True"
    assert not {imported for _, imported in imports(TREES[name])} & {"pickle", "dill", "joblib"}


# A file copied into an empty folder is built and trained for one step there, by itself.
STEP = """
before = [p.detach().clone() for p in module.parameters()]
loss.backward()
torch.optim.SGD(module.parameters(), lr=1.0).step()
assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters()))
"""
ALONE = {
    "model": """
import torch
from model import LM, Config
module = LM(Config(50, 16, 2, 2, 1, 8, 24, 32))
ids = torch.randint(50, (2, 6))
prefix = module.read(module.embed(torch.randint(50, (1, 3))))
loss = module.logits(module(module.embed(ids), prefix)).logsumexp(-1).mean()
""",
    "adapters": """
import torch
from adapters import Connector, DeepPrompt, PromptGenerator, SoftPrompt, from_vocab
class Config: dim, norm_eps = 16, 1e-5
class Prefix:
    rows, lengths = 1, None
    def __init__(self, layers): self.layers = layers
class Encoder:
    embed = torch.nn.Embedding(50, 16).requires_grad_(False)
    def __call__(self, x, lengths): return x.tanh()
class Layers(torch.nn.Linear):
    config = Config
    def forward(self, x, prefix, keep, last): return super().forward(x)
prompt = SoftPrompt(from_vocab(4, torch.randn(50, 16)))
connector = Connector(Layers(16, 16), 0.1)
deep = DeepPrompt(Prefix([(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))] * 3))
generator = PromptGenerator(Encoder(), torch.randn(3, 16), torch.randn(4, 16))
module = torch.nn.ModuleList([prompt, connector, deep, generator])
loss = connector(prompt()[None]).square().sum() + prompt().square().sum()
loss += sum(t.square().sum() for pair in deep().layers for t in pair)
loss += generator.prompts([[3, 4], [5]]).square().sum()
""",
    "rerank": """
import torch
from rerank import Bert, BertConfig, CrossEncoder, cross_fit, pack, reranker_loss
class Tokenizer:
    token_to_id = {"[CLS]": 1, "[SEP]": 2}.get
module = CrossEncoder(Bert(BertConfig(50, 16, 2, 2, 24, 32)), Tokenizer())
ids, spans = torch.randint(3, 50, (2, 6)), torch.tensor([[[4, 5]]])
assert pack("ab", [1, 2], 1, len) == (["b"], 1)
assert cross_fit("ab", str, lambda model, items: items, 0)[0] == ["a", "b"]
loss = reranker_loss(module, ids, torch.tensor([6, 4]), torch.tensor([[0, 1]]), spans)
""",
    "t5": """
import torch
from t5 import T5Config, T5Encoder
module = T5Encoder(T5Config(50, 16, 2, 2, 8, 24))
loss = module(module.embed(torch.randint(50, (2, 6))), torch.tensor([6, 4])).square().sum()
""",
    "data": """
import torch
from data import TokenizedExample, IGNORE_INDEX, batches
batch = batches([TokenizedExample([1, 2], [3]), TokenizedExample([4], [5, 6])], 2, seed=0, step=0)
module = torch.nn.Embedding(10, 10)
loss = torch.nn.functional.cross_entropy(
    module(batch.ids).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
""",
    "eval": """
import torch
from eval import exact_match, has_answer, paired_bootstrap, recall_at, rouge, token_f1
assert exact_match("the Bard", ["bard"]) == token_f1("a bard", ["Bard"]) == 1.0
assert rouge("the bard", ["the bard"]) == recall_at([[has_answer(["Bard"], "A bard.")]], 1) == 1.0
assert paired_bootstrap([1, 1, 1], [0, 0, 0])[0] == 1.0
module = torch.nn.Linear(1, 1)
loss = module(torch.ones(1, 1)).sum()
""",
    "generate": """
import torch
from generate import generate
from model import LM, Config
module = LM(Config(50, 16, 2, 2, 1, 8, 24, 32))
samples = generate(module, [[3, 4], [5]], None, 6, temperature=1.0, n=3)
assert [[len(s.ids) for s in some] for some in samples] == [[6] * 3] * 2
loss = module(module.embed(torch.tensor([samples[0][0].ids]))).square().sum()
""",
}
WITH = {"generate": ("model", "cache")}  # what README says that a file takes along

PROGRAMS = ("train", "pretrain", "transfer", "bench", "audit", "world")
HELP = """
import runpy, sys
sys.argv, sys.path[0] = [{path!r}, "--help"], {root!r}
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def in_folders(tmp_path_factory):
    """{name: (folder, status, output)} of the files alone and of the programs that show help."""
    place, codes = tmp_path_factory.mktemp("alone"), {}
    for name, code in ALONE.items():
        (place / name).mkdir()
        for file in (name, *WITH.get(name, ())):
            shutil.copy(ROOT / f"{file}.py", place / name)
        codes[place / name] = code + STEP
    for name in PROGRAMS:
        (place / f"{name}-help").mkdir()
        path = str(ROOT / f"{name}.py")
        codes[place / f"{name}-help"] = HELP.format(path=path, root=str(ROOT))
    return {folder.name: (folder, *found) for folder, found in run_in_folders(codes).items()}


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_file_builds_and_trains_alone_in_an_empty_folder(in_folders, name):
    _, status, output = in_folders[name]
    assert status == 0, output


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_from_another_folder_and_leaves_nothing_there(in_folders, name):
    folder, status, output = in_folders[f"{name}-help"]
    assert status == 0 and output.startswith("usage:"), output
    assert not list(folder.iterdir())


# The documents


def test_readme_begins_with_the_main_job_and_the_tests():
    blocks = [part.split("```")[0] for part in README.split("```sh\n")[1:]]
    assert "python train.py --method neural_recursion" in blocks[0] and "pytest" in blocks[1]


def test_readme_counts_lines_within_a_tenth_and_forgets_no_file():
    counts = dict(re.findall(r"^(\w+\.py) +(\d+) ", README, re.M))
    assert counts.keys() == {path.name for path in FILES}
    for name, count in counts.items():
        true = len((ROOT / name).read_text().splitlines())
        assert abs(int(count) - true) <= 0.1 * true, f"{name}: {count}, in truth {true}"


def documented_commands():
    """Every line of README, RESULTS, asset cards and docstrings that begins with `python x.py`."""
    texts = [path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("assets/*.md"))]
    texts += [ast.get_docstring(tree) for tree in TREES.values()]
    whole = [re.sub(r" *\\\n *", " ", text) for text in texts]  # a backslash continues a command
    lines = [line.strip().lstrip("|` ") for text in whole for line in text.splitlines()]
    return [re.split("  |`", line)[0] for line in lines if re.match(r"python \w+\.py", line)]


def parses(monkeypatch, command: str) -> bool:
    """Whether a program reads its flags. `main` is left as soon as its parser has returned."""

    class Parsed(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_args(self, argv=None, namespace=None):
        original(self, argv, namespace)
        raise Parsed

    _, name, *arguments = shlex.split(command)
    program = importlib.import_module(name.removesuffix(".py"))
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            program.main(arguments)
        except Parsed:
            return True
        except SystemExit:
            return False


def test_documented_commands_parse(monkeypatch):
    commands = [command for command in documented_commands() if "..." not in command]
    known = {shlex.split(command)[1] for command in commands}
    assert len(commands) > 100 and {"eval.py", "audit.py", "bench.py", "reproduce.py"} <= known
    for command in commands:
        assert parses(monkeypatch, command), command
    assert not parses(monkeypatch, "python bench.py attention --colour red")
