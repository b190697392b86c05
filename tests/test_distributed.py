"""Several processes: the same numbers as one, their traffic, checkpoints, signals, failures."""

import base64
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
from conftest import ROOT, read_log
from processes import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model
import train

TINY = ROOT / "assets" / "tiny-qwen2-vl"


def metrics(directory: Path) -> list[dict]:
    file = directory / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def last_checkpoint(directory: Path) -> Path | None:
    complete = train.own_checkpoints(directory)
    return complete[-1] if complete else None


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*unfinished*")]


def train_on(world: int, directory: Path, *flags, target="ranks:main") -> list[int]:
    """Exit codes of a run on `world` ranks."""
    ranks = Ranks(world, directory.parent / "out", target, "--output_dir", directory, *flags)
    return ranks.wait()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.02)


# ---- The same numbers as one process -------------------------------------------------------------

# Five prompts: on 2 and 4 ranks some have one more than others. Three on 4 ranks: one has none.
METHODS = ("sft", "rlvr", "visurf")
SETTINGS = {}
for method in METHODS:
    SETTINGS[method] = ["--method", method]
    SETTINGS[f"{method}, recomputed"] = ["--method", method, "--micro_batch_size", 2,
                                         "--checkpoint_activations"]
    SETTINGS[f"{method} of three prompts"] = ["--method", method, "--batch_size", "3"]
SETTINGS["visurf, one at a time"] = ["--micro_batch_size", 1]
SETTINGS["visurf, offloaded"] = ["--cpu_offload"]
# Each is compared with what stands before its comma, on one process. There, that alone would be compared with itself.
PLAIN = [name for name in SETTINGS if "," not in name]
VARIED = [name for name in SETTINGS if "," in name]
CASES = [*((1, name) for name in VARIED), *((2, name) for name in SETTINGS), *((4, name) for name in PLAIN)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What ranks.some_steps returns, by the number of processes."""
    found = {}
    for world, names in ((1, SETTINGS), (2, SETTINGS), (4, PLAIN)):
        flags = {name: SETTINGS[name] for name in names}
        ranks = Ranks(world, tmp_path_factory.mktemp("ranks"), "ranks:some_steps", flags)
        found[world] = ranks.values()[0]
    return found


@pytest.mark.parametrize("world, name", CASES)
def test_any_number_of_processes_computes_the_same(results, world, name):
    """Metrics, gradient norms, logs, and weights after two steps, whatever the micro-batches."""
    expected, weights, votes = results[1][name.split(",")[0]]
    found, weights_found, votes_found = results[world][name]
    assert votes_found == votes
    for (a, groups), (b, groups_found) in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        # Groups come in the order of the batch.
        for key in ("question", "texts", "lengths", "rewards"):
            assert [group[key] for group in groups] == [group[key] for group in groups_found]
        for key in a.keys() - {"rollout_seconds", "update_seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), key
    if name in ("rlvr", "visurf"):
        groups = [group for _, groups in expected for group in groups]
        assert not all(any(group["advantages"]) for group in groups), "nothing was left out"
        lengths = {length for group in groups for length in group["lengths"]}
        assert len(lengths) > 5, "completions are of one length"
        assert len(votes) > 1, "rollouts are of one style"
    difference, norm = {}, {}
    for key in weights:
        difference[key] = np.linalg.norm(weights_found[key] - weights[key])
        norm[key] = np.linalg.norm(weights[key])
        # A bias of keys has no gradient: AdamW makes steps of its rounding errors.
        assert difference[key] < 1e-5 * norm[key] or key.endswith(("qkv.bias", "k_proj.bias")), key
    total = np.linalg.norm(list(norm.values()))
    assert np.linalg.norm(list(difference.values())) < 1e-5 * total


def test_rollouts_cost_one_gather_per_unit_and_none_while_decoding(tmp_path):
    for found in Ranks(2, tmp_path, "ranks:traffic").values():
        # The vision blocks and the layers, and the rest of the network.
        assert found["units"] == found["blocks"] + 1
        assert found["gathering"] == found["sampling"] == {"_allgather_base_": found["units"]}
        assert found["decoding"] == {} and sum(found["tokens"]) > 60
        # Forward and backward gather every unit, the root only once; gradients are summed once.
        assert found["updating"]["_allgather_base_"] == 2 * found["units"] - 1
        assert found["updating"]["_reduce_scatter_base_"] == found["units"]
        assert found["bytes"] == pytest.approx(found["planned"], rel=0.01)


def test_bfloat16_computes_and_float32_keeps(tmp_path):
    for found in Ranks(2, tmp_path, "ranks:in_bfloat16").values():
        assert found["bfloat16"] == {"torch.bfloat16"} and found["float32"] == {"torch.float32"}
        assert found["bfloat16", "kept"] == {"torch.float32"}
        exchanged = {("_allgather_base_", "torch.bfloat16"),
                     ("_reduce_scatter_base_", "torch.float32")}
        assert found["bfloat16", "exchanged"] == exchanged
        assert found["losses"]["bfloat16"] == pytest.approx(found["losses"]["float32"], rel=0.05)
        assert found["losses"]["bfloat16"] != found["losses"]["float32"]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path):
    ranks = Ranks(2, tmp_path, "ranks:a_loss_that_is_not_finite")
    for first, second, before, after, later in ranks.values():
        assert first["skipped"] == 1 and second["skipped"] == 0
        assert all((before[name] == after[name]).all() for name in before)
        assert all(np.isfinite(later[name]).all() for name in later)
        assert np.isfinite(second["loss"])
        assert any((after[name] != later[name]).any() for name in after)


# ---- Resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of three steps on two ranks that saves after each."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train_on(2, directory, "--max_steps", 3, "--save_steps", 1) == [0, 0]
    return directory


def state(directory: Path) -> dict:
    """Weights and optimizer of a run's last checkpoint, put together from all ranks' files."""
    tensors = {}
    for file in sorted((last_checkpoint(directory) / "training_state").glob("*.safetensors")):
        with safe_open(file, "pt") as part:
            for name in part.keys():
                tensors.setdefault(name, []).append(part.get_tensor(name))
    for name, parts in tensors.items():
        tensors[name] = parts[0] if parts[0].dim() == 0 else torch.cat(parts)
    return tensors


def assert_same_run(directory: Path, expected: Path):
    """Logs, seconds left out, and last checkpoint are the same to the last bit."""
    for log in ("metrics.jsonl", "completions.jsonl"):
        assert read_log(directory / log) == read_log(expected / log)
    assert len(train.own_checkpoints(directory)) == 1 and not leftovers(directory)
    a, b = state(directory), state(expected)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (last_checkpoint(run) / "model.safetensors" for run in (directory, expected))
    assert a.parent.name == b.parent.name and a.read_bytes() == b.read_bytes()


def test_killed_three_times_and_resumed_the_run_is_the_same(tmp_path):
    """kill -9 at random moments, saves included: nothing but time is lost."""
    expected = tmp_path / "expected"
    assert train_on(2, expected, "--max_steps", 7, "--save_steps", 1) == [0, 0]
    moment = random.Random(0)
    directory = tmp_path / "run"
    reached = []
    flags = "--max_steps", 7, "--save_steps", 1, "--resume"
    for _ in range(3):
        begun = len(metrics(directory))
        ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", directory, *flags)
        wait_for(lambda: len(metrics(directory)) > begun)
        time.sleep(moment.uniform(0, 0.4))
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL] * 2
        reached.append((len(metrics(directory)), last_checkpoint(directory), leftovers(directory)))
    print("steps logged, last checkpoint, half-written one:", reached)
    assert train_on(2, directory, *flags) == [0, 0]
    assert_same_run(directory, expected)


@pytest.mark.parametrize("where, nth", [
    ("model.save_pretrained", 2), ("os.rename", 2), ("os.rename", 3)])
def test_killed_inside_a_save_the_run_is_the_same(tmp_path, uninterrupted, where, nth):
    """In the order of the calls: before the second save's network is written, before it has its
    name, and before the older one loses its own."""
    directory = tmp_path / "run"
    flags = "--max_steps", 3, "--save_steps", 1, "--resume"
    arguments = (where, nth, "--output_dir", directory, *flags)
    ranks = Ranks(2, tmp_path / "out", "ranks:main_killed", *arguments)
    wait_for(lambda: not ranks.processes[0].is_alive())
    assert ranks.processes[0].exitcode == -signal.SIGKILL
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert last_checkpoint(directory).name in ("checkpoint-1", "checkpoint-2")
    assert train_on(2, directory, *flags) == [0, 0]
    assert_same_run(directory, uninterrupted)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 4)])
def test_another_number_of_processes_continues(tmp_path, uninterrupted, first, then):
    """Step, data position, log and optimizer go on; the numbers agree as well as between worlds."""
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
        assert close or name.endswith(("qkv.bias", "k_proj.bias")), name
    assert {float(found[name]) for name in found if name.startswith("step/")} == {3.0}


def test_a_checkpoint_without_one_ranks_part_is_refused(tmp_path, uninterrupted):
    """Half of the weights would be the starting checkpoint's, and nobody would know."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    shards = sorted((directory / "checkpoint-3" / "training_state").iterdir())
    assert len(shards) == 2
    shards[1].unlink()
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", directory, "--resume",
                  "--max_steps", 4)
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("a damaged or missing tensor file") == 1


# ---- Stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, to, code", [
    (signal.SIGTERM, None, 143), (signal.SIGINT, [1], 130), (signal.SIGHUP, None, 129)])
def test_a_signal_saves_and_leaves(tmp_path, number, to, code):
    """To all ranks or to one: all finish what they are at, save, say so once, and are gone."""
    directory = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", directory, "--max_steps", 1000)
    wait_for(lambda: len(metrics(directory)) >= 2)
    ranks.signal(number, to)
    assert ranks.wait(30) == [code, code]
    done = len(metrics(directory))
    assert last_checkpoint(directory).name == f"checkpoint-{done}" and done < 1000
    name = signal.Signals(number).name
    assert ranks.text().count(f"train.py: stopped by {name}; --resume continues") == 1
    assert "Traceback" not in ranks.text()
    assert train_on(1, directory, "--max_steps", done + 1, "--resume") == [0]
    assert [m["step"] for m in metrics(directory)] == list(range(1, done + 2))


def test_asked_to_leave_in_the_midst_of_a_step_the_run_is_the_same(tmp_path):
    """The step is done first, and nothing is counted twice: every second row has half an image."""
    rows = [json.loads(line) for line in (ROOT / "assets/digits/train.jsonl").open()][:20]
    for row in rows[::2]:
        image = base64.b64decode(row["image"].partition(",")[2])
        row["image"] = "data:image/jpeg;base64," + base64.b64encode(image[:-300]).decode()
    file = tmp_path / "half.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--data", file, "--skip_bad_rows", "--max_steps", 3
    assert train_on(2, tmp_path / "expected", *flags) == [0, 0]
    directory = tmp_path / "run"
    assert train_on(2, directory, *flags, target="ranks:main_asked_to_leave") == [143, 143]
    assert [m["step"] for m in metrics(directory)] == [1, 2]
    assert last_checkpoint(directory).name == "checkpoint-2"
    assert train_on(2, directory, *flags, "--resume") == [0, 0]
    assert metrics(directory)[-1]["skipped_rows"] > 0
    assert_same_run(directory, tmp_path / "expected")


def test_a_bug_on_one_rank_ends_all_and_is_shown_once(tmp_path):
    ranks = Ranks(2, tmp_path / "out", "ranks:main_with_a_bug", "--output_dir", tmp_path / "run")
    assert ranks.wait(30) == [-signal.SIGKILL, 1]
    assert ranks.text().count("ZeroDivisionError: a bug of ours") == 1
    assert "Traceback" in ranks.outputs[1].read_text()


def test_a_mistake_is_told_once(tmp_path):
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", tmp_path / "run",
                  "--data", "nowhere.jsonl")
    assert ranks.wait(30) == [2, 2]
    assert ranks.text().startswith("train.py: nowhere.jsonl: no such file or folder")
    assert ranks.text().count("\n") == 1
    ranks = Ranks(2, tmp_path / "out2", "ranks:main", "--batch_size", "0")
    assert ranks.wait(30) == [2, 2] and ranks.text().count("--batch_size") == 1


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    directory = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "out", "ranks:main_without_a_finite_loss",
                  "--output_dir", directory)
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("10 updates in a row") == 1 and "--learning_rate" in ranks.text()
    assert last_checkpoint(directory).name == "checkpoint-10"
    assert [m["loss"] for m in metrics(directory)] == [None] * 10, "NaN is not JSON"


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    """The write of one rank's shard fails: one line, and the checkpoint before is whole."""
    directory = tmp_path / "run"
    flags = "--output_dir", directory, "--max_steps", 9, "--save_steps", 1
    ranks = Ranks(2, tmp_path / "out", "ranks:main_with_a_full_disk", *flags)
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("train.py: ") == 1 and "checkpoint-2: not written" in ranks.text()
    assert "Traceback" not in ranks.text() and last_checkpoint(directory).name == "checkpoint-1"
    assert train_on(2, directory, "--max_steps", 2, "--resume") == [0, 0]


# ---- Evaluating ----------------------------------------------------------------------------------


def test_evaluation_on_several_ranks_gives_the_same_answers(tmp_path):
    """Nine samples on two and four ranks; one rank prints and writes."""
    answers = {}
    for world in (1, 2, 4):
        directory = tmp_path / f"eval{world}"
        ranks = Ranks(world, tmp_path / str(world), "ranks:evaluate", "--limit", 9,
                      "--output_dir", directory)
        assert ranks.wait() == [0] * world, ranks.text()
        assert ranks.text().count("gIoU") == 1
        answers[world] = json.loads((directory / "answers.json").read_text())
    for world in (2, 4):
        assert answers[world]["metrics"] == answers[1]["metrics"]
        # A batch's composition shows in its roundings.
        for a, b in zip(answers[1]["answers"], answers[world]["answers"], strict=True):
            assert b.pop("logprob") == pytest.approx(a["logprob"], rel=1e-5, abs=1e-5)
    for answer in answers[1]["answers"]:
        del answer["logprob"]
    for world in (2, 4):
        assert answers[world]["answers"] == answers[1]["answers"]
    assert len(answers[1]["answers"]) == 9


# ---- What comes out ------------------------------------------------------------------------------


def copy_of_tiny(directory: Path, tied: bool) -> Path:
    """The bundled checkpoint with a head of its own, or without."""
    shutil.copytree(TINY, directory)
    config = json.loads((TINY / "config.json").read_text())
    weights = load_file(TINY / "model.safetensors")
    for part in (config, config.get("text_config", {})):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
    weights.pop("lm_head.weight", None)
    if not tied:
        weights["lm_head.weight"] = 1.1 * weights["model.embed_tokens.weight"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def log_probs(network, example) -> torch.Tensor:
    """Log-probs (1, 1, T) of an example's label."""
    batch = model.PromptBatch.from_prompts([example], network.config)
    ids, mask = model.pad_completions([[example.ids[-9:]]])
    with torch.no_grad():
        return network(batch, ids, mask)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_two_ranks_is_one_for_everybody(tmp_path, tied):
    """It loads in transformers with equal log-probs, in eval.py, and in a further run; a tied head
    is stored once."""
    import transformers

    source = copy_of_tiny(tmp_path / "source", tied)
    flags = "--model", source, "--max_steps", 2, "--learning_rate", "1e-3"
    assert train_on(2, tmp_path / "run", *flags) == [0, 0]
    saved = tmp_path / "run" / "checkpoint-2"
    assert ("lm_head.weight" in load_file(saved / "model.safetensors")) == (not tied)
    auto = transformers.AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
    task = data.TASKS["digits"]
    sample = data.load_samples("", task, limit=1)[0]
    example = data.Processor(saved, task).encode(sample)
    found = log_probs(model.load_pretrained(saved), example)[0, 0]
    before = log_probs(model.load_pretrained(source), example)[0, 0]
    ids = torch.cat([example.ids, example.ids[-9:]])
    with torch.no_grad():
        logits = auto.eval()(
            input_ids=ids[None], pixel_values=example.pixels, image_grid_thw=example.grid_thw,
            mm_token_type_ids=(ids == auto.config.image_token_id).int()[None]).logits[0]
    # Ours leaves out the tokens that are never sampled.
    logits[:, model.load_pretrained(saved).forbidden_tokens] = -torch.inf
    rows = logits[len(example.ids) - 1 : -1].log_softmax(-1)
    expected = rows.gather(-1, ids[len(example.ids) :, None])[:, 0]
    assert (found - expected)[expected.isfinite()].abs().max() < 1e-4
    assert (found - before)[expected.isfinite()].abs().max() > 1e-4
    evaluation.main(["--model", str(saved), "--limit", "2", "--output_dir", str(tmp_path / "eval")])
    assert train_on(1, tmp_path / "further", "--model", saved, "--max_steps", 1) == [0]


def test_torchrun_as_a_user_types_it(tmp_path):
    """One log, one checkpoint; and where one process is killed, torchrun ends the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", str(ROOT / "train.py"), "--batch_size", "3", "--num_generations",
               "2", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run([*command, "--max_steps", "2"],
                            capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"step +\d/2 \| loss .* \| reward ", result.stdout)) == 2
    assert [path.name for path in train.own_checkpoints(tmp_path / "run")] == ["checkpoint-2"]

    arguments = [*command, "--max_steps", "1000", "--resume"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    wait_for(lambda: len(metrics(tmp_path / "run")) > 3, 120)
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"],
                             capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    subprocess.run(["kill", "-9", workers[1]])
    assert process.wait(60) == 1
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 60)
