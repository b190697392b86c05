"""What is loaded by name, from a hub on loopback: the README's command from nothing, wrong names, a hub that fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub
import pytest
from conftest import ROOT
from PIL import Image

import data

TASK = data.TASKS["grounding"]
README = (ROOT / "README.md").read_text()
SMALL = ["--image_size", "48", "--max_completion_length", "8"]
# What a checkpoint's repository may hold beside its checkpoint: pickles and code, which are not to be fetched.
UNWANTED = ["pytorch_model.bin", "training_args.pt", "optimizer.pth", "modeling_evil.py"]
SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1"}
# One process for many mistakes, because importing torch takes seconds; the exit code follows what each one prints.
MISTAKES = """
import json, sys
import eval, train
for program, flags in json.load(sys.stdin):
    try:
        {"train.py": train, "eval.py": eval}[program].main(flags)
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The default names of --task grounding: the bundled small network, and two rows in the authors' columns each."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    checkpoint = shutil.copytree(ROOT / "assets" / "tiny-qwen2-vl", root / "models" / TASK.model)
    for name in UNWANTED:
        (checkpoint / name).write_bytes(b"unwanted")
    boxes = [[4, 6, 40, 60], [50, 10, 80, 50]]
    train_rows = []
    test_rows = []
    for number, box in enumerate(boxes):
        label = [{"bbox_2d": box, "point_2d": box[:2]}]
        image = Image.new("RGB", (84, 84), (90 * number, 30, 40))
        train_rows.append({"id": str(number), "problem": "the square", "solution": json.dumps(label), "image": image,
                           "img_height": 63, "img_width": 84})
        mask = [[True] * 84] * 63
        test_rows.append({"image": image.resize((84, 63)), "mask": mask, "text": "the square", "image_id": "7",
                          "ann_id": str(number), "bbox": box, "img_height": 63, "img_width": 84})
    for name, split, rows in ((TASK.data, "train", train_rows), (TASK.eval_data, "test", test_rows)):
        table = datasets.Dataset.from_list(rows)
        file = root / "datasets" / name / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        table.to_parquet(file)
    return root


@pytest.fixture
def server(repositories):
    with hub.serve(repositories) as running:
        yield running


def call(server, directory: Path, arguments: list, stdin=None) -> subprocess.CompletedProcess:
    """Run Python in a directory, with a hub, nothing from it yet, and no hub but this."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(directory / "home"), "PYTHONPATH": str(ROOT)}
    # Pipes are read to their end, so none of its processes is left when this returns.
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=directory, env={**kept, **SETTINGS, **home},
                          input=stdin, capture_output=True, text=True, timeout=240)


def readme_command() -> list[str]:
    """The named command, on two processes; beside other tests, its port must be a free one."""
    [flags] = re.findall(r"^torchrun --nproc_per_node 8 train.py (--task grounding) ", README, re.M)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    return [*launcher, ROOT / "train.py", *flags.split(), *SMALL, "--num_generations", 2, "--batch_size", 2]


def fetched(server) -> Counter:
    """How often each file was sent."""
    return Counter(path.partition("/resolve/")[2].partition("/")[2]
                   for method, path in server.asked if method == "GET" and "/resolve/" in path)


def test_the_readme_s_command_runs_from_nothing_and_fetches_each_file_once(server, tmp_path):
    """Two ranks ask for the default names: no file is sent twice, no pickle and no code at all; then eval.py."""
    run = call(server, tmp_path, [*readme_command(), "--max_steps", 1])
    assert run.returncode == 0, run.stderr
    assert "on 2 samples, 2 x cpu" in run.stdout and "step    1/1" in run.stdout
    checkpoint = {file.name for file in (ROOT / "assets" / "tiny-qwen2-vl").iterdir()}
    wanted = {*checkpoint, "data/train-00000-of-00001.parquet"}
    assert fetched(server) == dict.fromkeys(wanted, 1)

    [checkpoint] = tmp_path.glob("**/checkpoint-1")
    server.asked.clear()
    evaluation = call(server, tmp_path, [ROOT / "eval.py", "--task", "grounding", "--model", checkpoint, *SMALL])
    assert evaluation.returncode == 0, evaluation.stderr
    assert re.search(r"^samples +2$", evaluation.stdout, re.M)
    assert fetched(server) == {"data/test-00000-of-00001.parquet": 1}


def test_wrong_names_and_paths_are_one_line_each(server, tmp_path):
    """Exit code 2; the hub is asked once about what may be a name on it, and never about what is a path."""
    row = {"image": "cat.png", "problem": "the cat", "solution": []}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    Image.new("RGB", (56, 56)).save(tmp_path / "cat.png")
    names = ["nobody/nothing", f"{hub.BROKEN}/name", "runs/typo"]
    paths = ["runs/x/chekpoint-5", "/nowhere/rows", "../rows", "~/rows", "missing.jsonl", "./missing.jsonl",
             "rows/missing.jsonl", "rows/missing.parquet", "https://huggingface.co/owner/name"]
    commands = []
    for program in ("train.py", "eval.py"):
        for name in [*names, *paths]:
            commands.append([program, ["--task", "grounding", "--data", name]])
            commands.append([program, ["--task", "grounding", "--data", "rows.jsonl", "--model", name]])
    run = call(server, tmp_path, ["-c", MISTAKES], stdin=json.dumps(commands))
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 2 * len(commands), run.stderr
    for (program, flags), message, code in zip(commands, lines[::2], lines[1::2]):
        name = flags[-1]
        # A path is shown as pathlib writes it.
        assert message.startswith((f"{program}: {name}: no such ", f"{program}: {Path(name)}: no such ")), message
        assert code == "exit code 2"
    # Each name was asked for as a model and as a data set, by both programs. A retry would be one more.
    times = dict.fromkeys([f"/api/{kind}/{name}/revision/main" for kind in ("models", "datasets") for name in names], 2)
    assert Counter(path for _, path in server.asked) == times


def test_all_ranks_end_in_one_line_if_the_hub_fails(server, tmp_path):
    """A hub that answers 500 is asked once by each rank, and the launcher reports the failure."""
    server.is_down = True
    run = call(server, tmp_path, readme_command())
    assert run.returncode == 1
    # The rest is torchrun's report.
    [line] = re.findall(r"^train.py: .*", run.stderr, re.M)
    assert line.startswith(f"train.py: {TASK.data}: no such folder") and "500" in line
    # The second rank may be ended before it asks. A retry would be one more.
    assert len(server.asked) in (1, 2)
