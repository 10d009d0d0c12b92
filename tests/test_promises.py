"""Standing promises: who imports whom, files that can be copied out alone, documented names, no pickles."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIERS = {"model": 0, "adapters": 0, "data": 0, "world": 0, "eval": 0, "recurse": 1, "train": 2, "bench": 3}
FILES = sorted(p for p in ROOT.glob("*.py"))


def imports(node):
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from ((n, a.name.split(".")[0]) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            yield n, n.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_go_down_the_tiers(path):
    tree, tier = ast.parse(path.read_text()), TIERS[path.stem]
    mains = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "main"]
    in_main = {n for main in mains for n, _ in imports(main)}
    for node, name in imports(tree):
        if name in TIERS:
            assert TIERS[name] < tier or (node in in_main and tier <= 1 and TIERS[name] <= 1), f"{path.name}:{node.lineno} imports {name}"


@pytest.mark.parametrize("name", [n for n, tier in TIERS.items() if tier == 0])
def test_a_leaf_runs_alone_in_an_empty_folder(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage:"), result.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_pickle_and_nothing_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec"))
        assert not (isinstance(node, ast.keyword) and node.arg == "strict" and isinstance(node.value, ast.Constant) and not node.value.value)
    assert not {name for _, name in imports(ast.parse(path.read_text()))} & {"pickle", "dill", "joblib"}


def test_readme_begins_with_the_main_job_and_the_tests():
    text = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```sh\n")[1:]]
    assert "python train.py --method neural_recursion" in blocks[0] and "pytest" in blocks[1]
