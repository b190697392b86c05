"""Promises the README makes about the files: who imports whom, how long they are, that its examples run."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = ["visurf.py", "train.py", "rewards.py", "data.py", "model.py", "eval.py"]
# What each of the six may import of ours: downwards only.
BELOW = {
    "visurf.py": set(),
    "model.py": set(),
    "rewards.py": set(),
    "data.py": {"rewards"},
    "eval.py": {"model", "data", "rewards"},
    "train.py": {"model", "data", "rewards", "eval", "visurf"},
}
REQUIRED = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm", "huggingface_hub"}
OPTIONAL = {"datasets", "math_verify"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def source(file: str) -> str:
    return (ROOT / file).read_text()


def imports(file: str) -> set[str]:
    """Top-level names of all modules a file imports, guarded and local imports included."""
    found = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES)
def test_the_six_files_import_downwards_and_nothing_else_of_ours(file):
    ours = {path.stem for path in ROOT.glob("**/*.py")} | {"extras", "tests", "assets", "docs"}
    assert imports(file) & ours <= BELOW[file]
    outside = imports(file) - set(sys.stdlib_module_names) - ours
    assert outside <= REQUIRED | OPTIONAL
    assert file != "visurf.py" or outside == {"torch"}


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_imported_where_they_are_needed(file):
    """At the top of a file they would be required."""
    top = [node for node in ast.parse(source(file)).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(node.names[0].name if isinstance(node, ast.Import) else node.module).split(".")[0] for node in top}
    assert not names & OPTIONAL


def count_lines(file: str) -> int:
    return source(file).count("\n")


def test_the_six_files_are_about_two_thousand_lines():
    assert sum(map(count_lines, FILES)) <= 2_200


def test_the_readme_tells_the_files_lengths():
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert {file: int(count) for file, count in table.items()} == {file: count_lines(file) for file in FILES}
    assert README.count("\n") <= 200


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short_lines_narrow_and_statements_plain(file):
    text = source(file)
    nodes = list(ast.walk(ast.parse(text)))
    full = [line for line in text.splitlines() if line.strip()]
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    assert max(map(len, full)) <= 100
    named = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
    assert not named, "a named lambda is a function"
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert sum(isinstance(node, kinds) for node in nodes) <= 0.03 * len(full)
    tuples = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
              and isinstance(node.targets[0], ast.Tuple)]
    assert len(tuples) <= 0.01 * len(full)
    public = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    bare = {node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)}
    assert not bare, f"no docstring: {bare}"


def test_comments_say_why_often_enough():
    """About one line in twelve of the code is a comment of its own."""
    lines = [line.strip() for file in FILES for line in source(file).splitlines() if line.strip()]
    comments = [line for line in lines if line.startswith("#")]
    assert len(comments) >= len(lines) / 16


@pytest.mark.parametrize("name", ["visurf", "rewards", "data", "eval"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("name, call", [
    ("visurf", "import torch; print(visurf.group_advantages(torch.eye(2)))"),
    ("rewards", "print(rewards.score('<answer>[]</answer>', []))"),
    ("model", "print(model.load_pretrained(CHECKPOINT).stop_tokens)"),
])
def test_a_file_copied_alone_works(tmp_path, name, call):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    checkpoint = str(ROOT / "assets" / "tiny-qwen2-vl")
    result = subprocess.run([sys.executable, "-c", f"CHECKPOINT = {checkpoint!r}; import {name}; {call}"],
                            cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_six_files_and_assets_are_the_whole_flow(tmp_path):
    """A copy without extras/, docs/ and tests/ trains with one process and with two, and evaluates."""
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    small = ["--max_steps", "1", "--batch_size", "2", "--num_generations", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in (
            [sys.executable, "train.py", *small],
            [*torchrun, "train.py", *small, "--output_dir", "runs/two"],
            [sys.executable, "eval.py", "--limit", "2", "--model", "runs/two/checkpoint-1"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_python_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        exec(block, {})


def test_every_flag_the_documents_name_exists(capsys):
    import torch.distributed.run

    import bench
    import eval as evaluation
    import study
    import train

    known = set(re.findall(r"--[\w-]+", torch.distributed.run.get_args_parser().format_help()))
    for command in (train, evaluation, bench, study):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for script in (ROOT / "extras").glob("*.py"):
        known |= set(re.findall(r"\"(--[\w-]+)\"", script.read_text()))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", document.read_text()))
        assert named <= known, f"{document.name}: {named - known}"


def test_every_file_the_documents_name_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        for path in re.findall(r"`((?:assets|docs|extras|tests)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"
        for path in re.findall(r"\]\((?!http)([\w./-]+)\)", text):
            assert (document.parent / path).exists(), f"{document.name}: {path}"
