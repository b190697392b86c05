"""Promises the README makes about the files: who imports whom, how long they are, that its examples run."""

import ast
import doctest
import importlib
import re

import pytest
import torch.distributed.run
from conftest import ROOT

FILES = ["visurf.py", "train.py", "rewards.py", "data.py", "model.py", "eval.py"]
REQUIRED = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm",
            "huggingface_hub"}  # which transformers brings
SUPPORT = sorted(f"support/{file.name}" for file in (ROOT / "support").glob("*.py"))
README = (ROOT / "README.md").read_text()


def imports(file: str) -> set[str]:
    """Top-level names of all modules a file imports, guarded and local imports included."""
    nodes = list(ast.walk(ast.parse((ROOT / file).read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in found}


def test_who_imports_whom():
    ours = {file: {f"{name}.py" for name in imports(file)} & set(FILES) for file in FILES}
    assert ours == {"visurf.py": set(), "model.py": set(), "rewards.py": set(), "data.py": {"rewards.py"},
                    "eval.py": {"model.py", "data.py", "rewards.py"},
                    "train.py": {"model.py", "data.py", "rewards.py", "eval.py", "visurf.py"}}
    assert imports("visurf.py") == {"torch"}


def test_nothing_else_is_required():
    import sys

    outside = set().union(*map(imports, FILES)) - set(sys.stdlib_module_names) - {f[:-3] for f in FILES} - {"assets", "support"}
    assert outside <= REQUIRED
    outside = set().union(*map(imports, SUPPORT)) - set(sys.stdlib_module_names) - {f[:-3] for f in FILES} - {"support"}
    assert outside - {"pyarrow", "math_verify"} <= REQUIRED  # what is not required is looked for before it is imported
    for package, file in (("pyarrow", "sources.py"), ("math_verify", "answers.py")):
        assert f'find_spec("{package}")' in (ROOT / "support" / file).read_text()


def lines(file: str) -> int:
    return (ROOT / file).read_text().count("\n")


def test_the_readme_tells_the_files_lengths():
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert {file: int(count) for file, count in table.items()} == {file: lines(file) for file in FILES}


def test_the_promised_total():
    """Under 2,000 lines of code and documentation; blank lines are for the reader's eye and do not count."""
    total = sum(bool(line.strip()) for file in FILES for line in (ROOT / file).read_text().splitlines())
    assert total < 2000
    said = re.search(r"([\d,]+) lines of code and documentation, ([\d,]+) with blank ones", README)
    assert [int(n.replace(",", "")) for n in said.groups()] == [total, sum(map(lines, FILES))]


@pytest.mark.parametrize("file", FILES + SUPPORT)
def test_functions_stay_short_and_lines_narrow(file):
    source = (ROOT / file).read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    longest = max(functions, key=lambda node: node.end_lineno - node.lineno)
    assert longest.end_lineno - longest.lineno < 60, longest.name
    assert max(map(len, source.splitlines())) <= 120
    public = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    bare = [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not set(bare) - {"main"}, f"no docstring: {bare}"


@pytest.mark.parametrize("name", ["rewards", "data", "eval", "support.masks", "support.answers", "support.measures"])
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_readmes_memory_table_is_what_the_formula_prints(capsys):
    import memory

    memory.main()
    assert capsys.readouterr().out in README


def test_the_readmes_python_runs():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, {})


def test_every_flag_the_readme_names_exists(capsys):
    import bench
    import study
    import eval as evaluate
    import train

    known = set(re.findall(r"--[\w-]+", torch.distributed.run.get_args_parser().format_help()))
    for command in (train, evaluate, bench, study):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README))
    assert named <= known, named - known


def test_every_file_the_readme_names_exists():
    for path in re.findall(r"`((?:assets|support|tests)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path
