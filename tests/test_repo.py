"""Promises the README makes about the files: who imports whom, how long they are, that its examples run."""

import ast
import doctest
import importlib
import io
import re
import shutil
import subprocess
import sys
import tokenize

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
OPTIONAL = {"datasets", "math_verify", "peft", "tensorboard"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
# Folder by folder: a virtual environment in the checkout is nobody's source.
PROGRAMS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "extras").glob("*.py"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))


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
    ours = {path.stem for path in [*PROGRAMS, *TESTS]} | {"extras", "tests", "assets", "docs"}
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


def test_extras_do_not_need_the_tests():
    """They are programs for users, who may have no tests."""
    tests = {path.stem for path in TESTS} | {"tests", "pytest"}
    for path in PROGRAMS:
        assert not imports(str(path)) & tests, path.name


def count_lines(file: str) -> int:
    return source(file).count("\n")


def full_lines(file: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in source(file).splitlines() if line.strip()]


def test_the_six_files_are_about_two_thousand_lines():
    assert sum(len(full_lines(file)) for file in FILES) <= 2_000
    assert sum(map(count_lines, FILES)) <= 2_200


def count_tokens(file: str) -> tuple[int, int]:
    """Lines of code of a file and the tokens on them, as `tokenize` splits them: names, numbers, strings, operators and
    brackets are one each. Comments and docstrings are no code, and layout is no token."""
    documented = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source(file)).readline)
    lines = [token.start[0] for token in tokens if token.type not in layout and token.start[0] not in documented]
    return len(set(lines)), len(lines)


def test_a_line_asks_for_little_attention():
    """Room comes from leaving out, not from packing. A ratchet: the aim is 10.5 tokens a line of code, 11.5 in each."""
    counts = [count_tokens(file) for file in FILES]
    for file, (lines, tokens) in zip(FILES, counts):
        assert tokens <= 12.3 * lines, f"{file}: {tokens / lines:.2f}"
    lines, tokens = map(sum, zip(*counts))
    assert tokens <= 10.9 * lines, f"together: {tokens / lines:.2f}"


def test_the_readme_tells_the_files_lengths():
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    lengths = {file: count_lines(file) for file in FILES}
    assert {file: int(count) for file, count in table.items()} == lengths
    told = [int(count.replace(",", "")) for count in re.findall(r"\bsix\s+files,\s+([\d,]+)\s+lines", README)]
    assert told == [sum(lengths.values())]
    assert README.count("\n") <= 200


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short_lines_narrow_and_statements_plain(file):
    text = source(file)
    nodes = list(ast.walk(ast.parse(text)))
    full = full_lines(file)
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
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
    """At least seven in a hundred lines are a comment alone."""
    lines = [line.strip() for file in FILES for line in full_lines(file)]
    comments = [line for line in lines if line.startswith("#")]
    assert len(comments) >= 0.07 * len(lines)


@pytest.mark.parametrize("path", [path for path in PROGRAMS if ">>>" in path.read_text()], ids=lambda path: path.name)
def test_docstring_examples(path):
    results = doctest.testmod(importlib.import_module(path.stem))
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("name, call, printed", [
    ("visurf", "visurf.align_label([{'point_2d': [7, 8]}], 'compact')", '<answer>[{"point_2d":[7,8]}]</answer>'),
    ("rewards", "rewards.has_thinking('<think>I see it</think><answer>[]</answer>')", "True"),
    ("model", "type(model.load_pretrained(CHECKPOINT)).__name__", "GroupPolicy"),
])
def test_a_file_copied_alone_works(tmp_path, name, call, printed):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import {name}; CHECKPOINT = {str(ROOT / 'assets/tiny-qwen2-vl')!r}; print({call})"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env={"PATH": "", "HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{printed}\n"


def test_the_six_files_and_assets_are_the_whole_flow(tmp_path):
    """A copy without extras/, docs/ and tests/ trains and evaluates, with the commands as a user types them."""
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    for command, printed in (
            ("train.py --max_steps 1 --batch_size 2 --num_generations 2", r"step +1/1 .*reward"),
            ("eval.py --limit 2 --model runs/digits-visurf/checkpoint-1", r"^samples +2$")):
        result = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert re.search(printed, result.stdout, re.MULTILINE)


EXAMPLES = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if EXAMPLES.search(path.read_text())],
                         ids=lambda path: path.name)
def test_the_documents_python_runs(document, tmp_path, monkeypatch):
    import data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))
    for block in EXAMPLES.findall(document.read_text()):
        exec(block, {})


def test_every_flag_the_documents_name_exists(capsys):
    import torch.distributed.run

    import eval as evaluation
    import train

    known = set(re.findall(r"--[\w-]+", torch.distributed.run.get_args_parser().format_help()))
    for command in (train, evaluation):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for path in PROGRAMS:
        known |= set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", path.read_text()))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", document.read_text()))
        assert named <= known, f"{document.name}: {named - known}"


def test_every_file_that_documents_and_programs_name_exists():
    for path in [*DOCUMENTS, *PROGRAMS]:
        for named in re.findall(r"(?<![\w/.-])(?:assets|docs|extras|tests|\.ci)/[\w./-]*\w", path.read_text()):
            assert (ROOT / named).exists(), f"{path.name}: {named}"
    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!http)([\w./-]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
