"""Standing promises: who imports whom, files that can be copied out alone, documented names, no pickles."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIERS = (
    dict.fromkeys(["model", "adapters", "data", "world", "rerank", "eval", "attention"], 0)
    | {"recurse": 1, "train": 2}
    | dict.fromkeys(["transfer", "bench", "reproduce"], 3)
)
FILES = sorted(ROOT.glob("*.py"))
CORE = {"torch", "numpy", "tokenizers", "safetensors"}


def imports(node):
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from ((n, a.name.split(".")[0]) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            assert not n.level, f"line {n.lineno}: a relative import needs a package"
            yield n, n.module.split(".")[0]


def at_import(body):
    """The statements of a file that run when it is imported: all but the bodies of functions."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from at_import(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_go_down_the_tiers(path):
    tree, tier = ast.parse(path.read_text()), TIERS[path.stem]
    mains = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "main"]
    in_main = {n for main in mains for n, _ in imports(main)}
    for node, name in imports(tree):
        if name in TIERS:
            assert TIERS[name] < tier or (node in in_main and tier <= 1 and TIERS[name] <= 1), (
                f"{path.name}:{node.lineno} imports {name}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_imports_with_the_core_packages_alone(path):
    for node in at_import(ast.parse(path.read_text()).body):
        for _, name in imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            assert name in CORE | TIERS.keys() or name in sys.stdlib_module_names, (
                f"{path.name}:{node.lineno} imports {name}"
            )


def test_what_is_imported_is_required():
    required = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M))
    for path in FILES:
        missing = (
            {name for _, name in imports(ast.parse(path.read_text()))}
            - required
            - TIERS.keys()
            - set(sys.stdlib_module_names)
        )
        assert missing <= ({"peft", "transformers"} if path.stem == "bench" else {"triton"}), (
            path.name
        )


@pytest.mark.parametrize("name", [p.stem for p in FILES if TIERS[p.stem] == 0])
def test_a_leaf_runs_alone_in_an_empty_folder(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    call = f"import {name}; {name}.main(['--help'])"
    result = subprocess.run(
        [sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and result.stdout.startswith("usage:"), result.stderr


@pytest.mark.parametrize("name", ["train", "bench"])
def test_a_program_runs_from_another_folder(tmp_path, name):
    result = subprocess.run(
        [sys.executable, ROOT / f"{name}.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.startswith("usage:"), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and node.name != "main"
        ):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_pickle_and_nothing_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        assert not (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("torch.load", "torch.save", "np.load", "eval", "exec")
        )
        assert not (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("load_state_dict")
            and len(node.args) > 1
        )  # strict, by position
        assert not (
            isinstance(node, ast.keyword)
            and node.arg == "strict"
            and isinstance(node.value, ast.Constant)
            and not node.value.value
        )
    assert not {name for _, name in imports(ast.parse(path.read_text()))} & {
        "pickle",
        "dill",
        "joblib",
    }


def test_readme_begins_with_the_main_job_and_the_tests():
    text = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```sh\n")[1:]]
    assert "python train.py --method neural_recursion" in blocks[0] and "pytest" in blocks[1]


def test_commands_in_the_texts_are_commands():
    """Every `python x.py` of README and docstrings names a file, and every `python train.py` parses."""
    import train

    texts = [(ROOT / "README.md").read_text()] + [
        ast.get_docstring(ast.parse(p.read_text())) for p in FILES
    ]
    lines = [
        line.strip()
        for text in texts
        for line in text.splitlines()
        if line.strip().startswith("python ")
    ]
    assert len(lines) > 5
    for line in lines:
        name = line.split()[1]
        assert name == "-m" or (ROOT / name).is_file(), line
        if name == "train.py" and "..." not in line:
            train.parse(
                shlex.split(line.split("   ")[0])[2:]
            )  # an explanation may stand beside the command
