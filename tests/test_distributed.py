"""Several processes: the same numbers as one, the traffic between them, checkpoints, interruptions, failures."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval as evaluate
import model
from support import checkpoints

TINY = ROOT / "assets" / "tiny-qwen2-vl"


def metrics(directory: Path) -> list[dict]:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


# ---- The same numbers as one process ---------------------------------------------------------------------------------

# Five prompts: on 2 and 4 ranks some have one more than others. Three on 4 ranks: one has none.
METHODS = {method: ["--method", method] for method in ("sft", "rlvr", "visurf")}
VARIANTS = {"pieces of 2, recomputed": ["--micro_batch_size", 2, "--checkpoint_activations"],
            "pieces of 8": ["--micro_batch_size", 8]}
SETTINGS = METHODS | {f"{method}, {variant}": ["--method", method, *flags]
                      for method in METHODS for variant, flags in VARIANTS.items()}
SETTINGS |= {f"{method} of three prompts": ["--method", method, "--batch_size", "3"] for method in METHODS}
SETTINGS |= {"offloaded": ["--cpu_offload"],
             "iterations": ["--num_iterations", "2", "--average", "sequence"],
             "reference": ["--beta", "0.1"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What ranks.three_steps returns, by the number of processes."""
    return {world: Ranks(world, tmp_path_factory.mktemp("ranks"), "ranks:three_steps", SETTINGS).values()[0]
            for world in (1, 2, 4)}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_computes_the_same(results, world, name):
    """Losses, gradient norms, what is logged, and weights after three steps, whatever the pieces are."""
    base = name.split(",")[0] if name != "offloaded" else "visurf"
    (expected, weights), (found, weights_found) = results[1][base], results[world][name]
    for (a, groups), (b, groups_found) in zip(expected, found):
        assert a.keys() == b.keys() and a.get("style") == b.get("style")
        for key in ("question", "texts", "lengths", "rewards"):  # in the order of the batch
            assert [group[key] for group in groups] == [group[key] for group in groups_found]
        for key in a.keys() - {"style"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), key
    if name in ("rlvr", "visurf"):
        assert {m["no_signal"] for m, _ in expected} != {0}, "nothing was left out"
        lengths = [length for _, groups in expected for group in groups for length in group["lengths"]]
        assert len(set(lengths)) > 5, "completions are of one length"
    difference = {key: np.linalg.norm(weights_found[key] - weights[key]) for key in weights}
    norm = {key: np.linalg.norm(weights[key]) for key in weights}
    assert np.linalg.norm(list(difference.values())) < 1e-5 * np.linalg.norm(list(norm.values()))
    for key in weights:  # a bias of keys has no gradient: AdamW makes steps of its rounding errors
        assert difference[key] < 1e-5 * norm[key] or key.endswith("qkv.bias"), key


def test_rollouts_cost_one_gather_per_unit_and_none_while_decoding(tmp_path):
    first, second = Ranks(2, tmp_path, "ranks:traffic").values()
    for found in (first, second):
        assert found["units"] == found["blocks"] + 1  # vision blocks and layers, and the rest of the network
        assert found["gathering"] == found["sampling"] == {"_allgather_base_": found["units"]}
        assert found["decoding"] == {} and sum(found["tokens"]) > 60
        # forward and backward gather every unit, but the root only once; each unit's gradients are reduced once
        assert found["updating"]["_allgather_base_"] == 2 * found["units"] - 1
        assert found["updating"]["_reduce_scatter_base_"] == found["units"]
        assert found["bytes"] == pytest.approx(found["planned bytes"], rel=0.01)


@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_as_planned(tmp_path, world):
    """The README's formula against what processes of 1 and 2 ranks grow by (float32, Linux), within a quarter, or 80 MB
    of what PyTorch itself holds on to."""
    for planned, found in Ranks(world, tmp_path, "ranks:memory").values():
        print({name: f"{planned[name] / 1e6:.0f} MB planned, {found[name] / 1e6:.0f} measured" for name in planned})
        for name in planned:
            assert found[name] == pytest.approx(planned[name], rel=0.25, abs=80e6), name


def test_bfloat16_computes_and_float32_keeps(tmp_path):
    for found in Ranks(2, tmp_path, "ranks:in_bfloat16").values():
        assert found["bfloat16"] == {"torch.bfloat16"} and found["float32"] == {"torch.float32"}
        assert found["bfloat16", "kept"] == {"torch.float32"}
        assert found["bfloat16", "exchanged"] == {("_allgather_base_", "torch.bfloat16"),
                                                  ("_reduce_scatter_base_", "torch.float32")}
        assert found["losses"]["bfloat16"] == pytest.approx(found["losses"]["float32"], rel=0.05)
        assert found["losses"]["bfloat16"] != found["losses"]["float32"]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path):
    for first, second, before, after, later in Ranks(2, tmp_path, "ranks:a_loss_that_is_not_finite").values():
        assert first["not_finite"] == second["not_finite"] == 1
        assert all((before[name] == after[name]).all() for name in before)
        assert all(np.isfinite(later[name]).all() for name in later) and np.isfinite(second["loss"])
        assert any((after[name] != later[name]).any() for name in after)


# ---- Resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of three steps on two ranks that saves after each."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train_on(2, directory, "--max_steps", 3, "--save_steps", 1) == [0, 0]
    return directory


def train_on(world: int, directory: Path, *flags, target="ranks:main", before=()) -> list[int]:
    """Exit codes of a run on `world` ranks."""
    return Ranks(world, directory.parent / "out", target, *before, "--output_dir", directory, *flags).wait()


def state(directory: Path) -> dict:
    """Weights and optimizer state of a run's last checkpoint, put together from all ranks' files."""
    tensors = {}
    for file in sorted((checkpoints.last_checkpoint(directory) / "training_state").glob("*.safetensors")):
        with safe_open(file, "pt") as part:
            for name in part.keys():
                tensors.setdefault(name, []).append(part.get_tensor(name))
    return {name: parts[0] if parts[0].dim() == 0 else torch.cat(parts) for name, parts in tensors.items()}


def assert_same_run(directory: Path, expected: Path):
    """Log and last checkpoint are the same to the last bit."""
    assert (directory / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    assert (directory / "completions.jsonl").read_bytes() == (expected / "completions.jsonl").read_bytes()
    assert len(checkpoints.complete(directory)) == 1 and not (directory / "unfinished").exists()
    a, b = state(directory), state(expected)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (checkpoints.last_checkpoint(run) / "model.safetensors" for run in (directory, expected))
    assert a.parent.name == b.parent.name and a.read_bytes() == b.read_bytes()


def test_killed_ten_times_and_resumed_the_run_is_the_same(tmp_path):
    """kill -9 at random moments, saves included: nothing but time is lost."""
    expected = tmp_path / "expected"
    assert train_on(2, expected, "--max_steps", 14, "--save_steps", 1) == [0, 0]
    moment, directory, reached = random.Random(0), tmp_path / "run", []
    flags = "--max_steps", 14, "--save_steps", 1, "--resume"
    for _ in range(10):
        begun = len(metrics(directory))
        ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", directory, *flags)
        wait_for(lambda: len(metrics(directory)) > begun)
        time.sleep(moment.uniform(0, 0.5))
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL] * 2
        last = checkpoints.last_checkpoint(directory)
        reached.append((len(metrics(directory)), last and last.name, (directory / "unfinished").exists()))
    print("steps logged, last checkpoint, half-written one:", reached)
    assert train_on(2, directory, *flags) == [0, 0]
    assert_same_run(directory, expected)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("where, nth", [("model.save_pretrained", 2), ("dcp.save", 2), ("os.sync", 2),
                                        ("os.replace", 6), ("os.replace", 7), ("shutil.rmtree", 3)])
def test_killed_inside_a_save_the_run_is_the_same(tmp_path, uninterrupted, where, nth):
    """Before the network is written, before the state is, before it is on disk, before it has its name, before the
    older checkpoint loses its own, and before that is deleted."""
    directory = tmp_path / "run"
    flags = "--max_steps", 3, "--save_steps", 1, "--resume"
    ranks = Ranks(2, tmp_path / "out", "ranks:main_killed", where, nth, "--output_dir", directory, *flags)
    wait_for(lambda: not ranks.processes[0].is_alive())
    assert ranks.processes[0].exitcode == -signal.SIGKILL
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert checkpoints.last_checkpoint(directory).name in ("checkpoint-1", "checkpoint-2")
    assert train_on(2, directory, *flags) == [0, 0]
    assert_same_run(directory, uninterrupted)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 4)])
def test_another_number_of_processes_continues(tmp_path, uninterrupted, first, then):
    """Step, data position, log and optimizer state go on; the numbers agree as well as between worlds."""
    directory = tmp_path / "run"
    assert train_on(first, directory, "--max_steps", 1) == [0] * first
    assert train_on(then, directory, "--max_steps", 3, "--resume") == [0] * then
    for a, b in zip(metrics(uninterrupted), metrics(directory), strict=True):
        assert a["step"] == b["step"] and a["style"] == b["style"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    expected, found = state(uninterrupted), state(directory)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close = (found[name] - tensor).norm() <= 1e-4 * tensor.norm()
        assert close or name.endswith("qkv.bias"), name
    assert {float(found[name]) for name in found if name.startswith("step/")} == {3.0}


def test_keep_deletes_the_oldest_only_when_a_newer_is_complete(tmp_path):
    directory = tmp_path / "run"
    flags = "--max_steps", 4, "--save_steps", 1, "--keep", 2, "--method", "sft"
    assert train_on(1, directory, *flags) == [0]
    assert [path.name for path in checkpoints.complete(directory)] == ["checkpoint-3", "checkpoint-4"]


# ---- Stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, to, code", [(signal.SIGTERM, None, 143), (signal.SIGINT, [1], 130)])
def test_a_signal_saves_and_leaves(tmp_path, number, to, code):
    """To all ranks or to one: all finish what they are at, save, say so once, and are gone."""
    directory = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", directory, "--max_steps", 1000)
    wait_for(lambda: len(metrics(directory)) >= 2)
    ranks.signal(number, to)
    assert ranks.wait(30) == [code, code]
    done = len(metrics(directory))
    assert checkpoints.last_checkpoint(directory).name == f"checkpoint-{done}" and done < 1000
    assert ranks.text().count(f"train.py: stopped by {signal.Signals(number).name}; --resume continues") == 1
    assert "Traceback" not in ranks.text()
    assert train_on(1, directory, "--max_steps", done + 1, "--resume") == [0]
    assert [m["step"] for m in metrics(directory)] == list(range(1, done + 2))


def test_a_bug_on_one_rank_ends_all_and_is_shown_once(tmp_path):
    ranks = Ranks(2, tmp_path / "out", "ranks:main_with_a_bug", "--output_dir", tmp_path / "run")
    assert ranks.wait(30) == [1, 1]
    assert ranks.text().count("Traceback") == 1 and ranks.text().count("ZeroDivisionError: a bug of ours") == 1
    assert "Traceback" in ranks.outputs[1].read_text()


def test_one_rank_reports_where_all_fail(tmp_path):
    assert sorted(Ranks(4, tmp_path, "ranks:first_to_fail").values()) == [False, False, False, True]


def test_a_rank_that_is_killed_ends_all(tmp_path):
    ranks = Ranks(4, tmp_path / "out", "ranks:main", "--output_dir", tmp_path / "run", "--max_steps", 1000)
    wait_for(lambda: metrics(tmp_path / "run"))
    ranks.signal(signal.SIGKILL, [2])
    codes = ranks.wait(30)
    assert codes[2] == -signal.SIGKILL and codes.count(1) == 3
    assert ranks.text().count("Traceback") == 1


def test_a_mistake_is_told_once(tmp_path):
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", tmp_path / "run", "--data", "nowhere.jsonl")
    assert ranks.wait(30) == [2, 2]
    assert ranks.text().count("nowhere.jsonl: no such file") == 1 and "Traceback" not in ranks.text()
    ranks = Ranks(2, tmp_path / "out2", "ranks:main", "--batch_size", "0")
    assert ranks.wait(30) == [2, 2] and ranks.text().count("--batch_size must be") == 1


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    directory = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "out", "ranks:main_without_a_finite_loss", "--output_dir", directory)
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("10 updates in a row") == 1 and "--learning_rate" in ranks.text()
    assert checkpoints.last_checkpoint(directory).name == "checkpoint-10"
    assert [m["loss"] for m in metrics(directory)] == [None] * 10, "NaN is not JSON"


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    """The write of one rank's shard fails: one line, and the checkpoint before is whole."""
    directory = tmp_path / "run"
    flags = "--output_dir", directory, "--max_steps", 9, "--save_steps", 1
    ranks = Ranks(2, tmp_path / "out", "ranks:main_with_a_full_disk", *flags)
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("train.py: ") == 1 and "checkpoint-2: not written" in ranks.text()
    assert "Traceback" not in ranks.text() and checkpoints.last_checkpoint(directory).name == "checkpoint-1"
    assert train_on(2, directory, "--max_steps", 2, "--resume") == [0, 0]


# ---- Evaluating ------------------------------------------------------------------------------------------------------


def test_evaluation_on_several_ranks_gives_the_same_answers(tmp_path):
    """Nine samples on two and four ranks; one rank prints and writes."""
    answers = {}
    for world in (1, 2, 4):
        ranks = Ranks(world, tmp_path / str(world), "ranks:evaluate", "--limit", 9, "--output_dir", tmp_path / f"e{world}")
        assert ranks.wait() == [0] * world, ranks.text()
        assert ranks.text().count("gIoU") == 1
        answers[world] = json.loads((tmp_path / f"e{world}" / "answers.json").read_text())
    for world in (2, 4):
        assert answers[world]["metrics"] == answers[1]["metrics"]
        assert answers[world]["answers"] == answers[1]["answers"] and len(answers[1]["answers"]) == 9


# ---- What comes out --------------------------------------------------------------------------------------------------


def copy_of_tiny(directory: Path, tied: bool) -> Path:
    """The bundled checkpoint with a head of its own, or without."""
    shutil.copytree(TINY, directory)
    config, weights = json.loads((TINY / "config.json").read_text()), load_file(TINY / "model.safetensors")
    for part in (config, config.get("text_config", {})):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
    weights.pop("lm_head.weight", None)
    if not tied:
        weights["lm_head.weight"] = 1.1 * weights["model.embed_tokens.weight"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_two_ranks_is_one_for_everybody(tmp_path, tied):
    """It loads in transformers with equal logits, in eval.py, and in a further run; a tied head is stored once."""
    import transformers as hf

    source = copy_of_tiny(tmp_path / "source", tied)
    assert train_on(2, tmp_path / "run", "--model", source, "--max_steps", 2, "--learning_rate", "1e-3") == [0, 0]
    saved = tmp_path / "run" / "checkpoint-2"
    assert ("lm_head.weight" in load_file(saved / "model.safetensors")) == (not tied)
    auto = hf.AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32).eval()
    ours, task = model.load_pretrained(saved), data.TASKS["digits"]
    example = data.Processor.from_pretrained(saved).encode(data.load_samples("builtin", task, limit=1)[0], task)
    with torch.no_grad():
        logits = ours.logits(model.PromptBatch.from_prompts([example], ours.config))
        expected = auto(input_ids=example.ids[None], pixel_values=example.pixels, image_grid_thw=example.grid_thw,
                        mm_token_type_ids=(example.ids == ours.config.image_token_id).int()[None]).logits
        before = model.load_pretrained(source).logits(model.PromptBatch.from_prompts([example], ours.config))
    assert (logits - expected).abs().max() < 1e-4 < (logits - before).abs().max()
    evaluate.main(["--model", str(saved), "--limit", "2", "--output_dir", str(tmp_path / "eval")])
    assert train_on(1, tmp_path / "further", "--model", saved, "--max_steps", 1) == [0]


def test_torchrun_as_a_user_types_it(tmp_path):
    """One log, one checkpoint, one progress bar."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               str(ROOT / "train.py"), "--max_steps", "2", "--batch_size", "3", "--num_generations", "2",
               "--eval_samples", "4", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"step +\d/2 \| reward", result.stdout)) == 2 and result.stdout.count("held out") == 1
    assert result.stderr.count("training: 100%") <= 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(json.loads((tmp_path / "run" / "after.json").read_text())["answers"]) == 4
