"""The loop: every method end to end, what a step logs, resume, and users' mistakes."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import data
import eval as evaluate
import model
import rewards
import train
from support import checkpoints, processes

TINY = ROOT / "assets" / "tiny-qwen2-vl"
FAST = ["--max_steps", "2", "--batch_size", "2", "--num_generations", "3", "--max_completion_length", "48",
        "--eval_samples", "0", "--log_rollouts", "1", "--micro_batch_size", "2"]


def run(tmp_path, *flags, name="run") -> Path:
    """Train in this process and return the output directory."""
    train.main([*FAST, "--output_dir", str(tmp_path / name), *map(str, flags)])
    return tmp_path / name


def records(directory: Path, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict:
    return model.load_pretrained(checkpoints.last_checkpoint(directory)).state_dict()


def start(tmp_path, *flags):
    """A Run at step 0 and its first batch of examples, for tests of a single step."""
    config = train.parse_command_line([*FAST, "--output_dir", str(tmp_path), *map(str, flags)])
    task, processor, device = data.TASKS["digits"], data.Processor.from_pretrained(TINY), processes.start()
    samples = data.load_samples("builtin", task, limit=config.batch_size)
    examples = [processor.encode(sample, task) for sample in samples]
    return train.make_run(config, task, processor, TINY, examples[0], device), examples


def state(run_) -> dict:
    """A copy of all weights."""
    return {name: parameter.full_tensor().detach().clone() for name, parameter in run_.network.named_parameters()}


def update_gradient(run_, examples, monkeypatch) -> tuple[dict, torch.Tensor]:
    """A step's metrics, and the gradient it handed to the optimizer."""
    kept = []
    parameters = list(run_.network.parameters())
    monkeypatch.setattr(run_.optimizer, "step", lambda: kept.extend(p.grad.full_tensor().flatten() for p in parameters))
    metrics, _, _ = train.train_step(run_, examples)
    return metrics, torch.cat(kept)


def answer_with(monkeypatch, run_, write):
    """Let the sampler return write(example, i) as rollout i of each prompt."""
    def generate(network, examples, G, *rest, **seeds):
        return [[model.Completion(run_.processor.label_ids(write(example, i)), None, True) for i in range(G)]
                for example in examples]

    monkeypatch.setattr(model, "generate", generate)


# ---- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["visurf", "rlvr", "sft"])
def test_a_run_leaves_a_checkpoint_logs_and_a_gallery(tmp_path, capsys, method):
    directory = run(tmp_path, "--method", method, "--eval_samples", "6")
    printed = capsys.readouterr().out
    metrics = records(directory)
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(m["grad_norm"] > 0 for m in metrics)
    assert ("label_active" in metrics[0]) == (method == "visurf")
    assert ("reward/accuracy" in metrics[0]) == (method != "sft")
    assert f"checkpoint   {directory / 'checkpoint-2'}" in printed and "held out" in printed
    assert len(records(directory, "completions")) == 4
    texts = records(directory, "completions")[0]["texts"]
    assert len(texts) == {"visurf": 4, "rlvr": 3, "sft": 1}[method]
    assert (directory / "gallery.png").stat().st_size > 10_000
    before = model.load_pretrained(TINY).state_dict()
    after = weights(directory)
    assert any(not torch.equal(before[name].bfloat16(), after[name].bfloat16()) for name in before)


def test_python_train_py_as_a_user_types_it(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "--max_steps", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step    1/1 | reward" in result.stdout and (tmp_path / "runs/digits-visurf/checkpoint-1").is_dir()


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real tokenizer, real images) is not here")
@pytest.mark.parametrize("method", ["visurf", "rlvr", "sft"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_real_files(tmp_path, family, method, capsys):
    """A hub-layout checkpoint with the real tokenizer, real images: train, evaluate, load in transformers."""
    pytest.importorskip("pyarrow")
    import transformers as hf

    checkpoint = real_checkpoint(tmp_path / family, family)
    directory = run(tmp_path, "--task", "grounding", "--model", checkpoint, "--method", method, "--image_size", "168",
                    "--data", SHARED / "digits/digits_train.parquet", "--max_completion_length", "16",
                    "--learning_rate", "1e-3")
    saved = directory / "checkpoint-2"
    evaluate.main(["--task", "grounding", "--model", str(saved), "--data", str(SHARED / "digits/digits_test.parquet"),
                   "--image_size", "168", "--limit", "4", "--max_completion_length", "16",
                   "--output_dir", str(tmp_path / "eval")])
    answers = json.loads((tmp_path / "eval/answers.json").read_text())["answers"]
    assert answers[0]["label"][0]["bbox_2d"] == [52, 34, 93, 75] and answers[0]["size"] == [296, 168]  # original pixels

    auto = hf.AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32).eval()
    ours = model.load_pretrained(saved)
    processor, task = data.Processor.from_pretrained(saved), data.TASKS["grounding"]
    sample = data.load_samples(SHARED / "digits/digits_test.parquet", task, "test", limit=1)[0]
    example = processor.encode(sample, task, image_size=(168, 140))
    with torch.no_grad():
        logits = ours.logits(model.PromptBatch.from_prompts([example], ours.config))
        expected = auto(input_ids=example.ids[None], pixel_values=example.pixels, image_grid_thw=example.grid_thw,
                        mm_token_type_ids=(example.ids == ours.config.image_token_id).int()[None]).logits
    assert (logits - expected).abs().max() < 1e-4


def real_checkpoint(directory: Path, family: str) -> Path:
    """The real tokenizer and configs of a family, shrunk to a small network with random weights."""
    shutil.copytree(SHARED / family, directory)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(SHARED / "qwen2_vl" / name, directory / f"{name}")
    config = json.loads((SHARED / family / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2}
    config["rope_scaling"]["mrope_section"] = [2, 1, 1]
    if family == "qwen2_vl":
        config["vision_config"] |= {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    else:
        config["vision_config"] |= {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                                    "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = model.QwenVL(model.read_config(directory))
    model.save_pretrained(network, directory / "weights", directory)
    shutil.move(directory / "weights" / "model.safetensors", directory / "model.safetensors")
    return directory


# ---- Resume ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path, "--max_steps", 4, "--num_iterations", 2, name="whole")
    run(tmp_path, "--max_steps", 2, "--num_iterations", 2, name="parts")
    parts = run(tmp_path, "--max_steps", 4, "--num_iterations", 2, "--resume", name="parts")
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert len(records(parts, "timing")) == 4
    names = [file.relative_to(whole) for file in (whole / "checkpoint-4").rglob("*.*")]
    assert len(names) == 8
    for name in names:
        if name.parent.name == "training_state":  # the order of its header is not fixed
            a, b = load_file(whole / name), load_file(parts / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and len(a) == 4 * 74
        else:
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-4"], "the one before is dropped"


def test_resume_forgets_steps_after_the_checkpoint_and_unfinished_ones(tmp_path):
    """Killed after step 3 with a half-written checkpoint: step 3 is done again, once, from checkpoint-2."""
    directory = run(tmp_path, "--eval_samples", 4)
    before = (directory / "before.json").read_text()
    with (directory / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 123}) + "\n" + '{"step": 2, "lo')
    (directory / "unfinished").mkdir()
    run(tmp_path, "--max_steps", 3, "--resume", "--eval_samples", 4, "--learning_rate", 1e-2)
    assert (directory / "before.json").read_text() == before, "the run still knows what it started from"
    assert [m["step"] for m in records(directory)] == [1, 2, 3] and records(directory)[2]["loss"] != 123
    assert not (directory / "unfinished").exists()


@pytest.mark.parametrize("damage", ["half a shard", "no shard", "half the counters", "other network"])
def test_a_damaged_checkpoint_is_named(tmp_path, capsys, damage):
    directory = run(tmp_path, "--max_steps", 1)
    state = directory / "checkpoint-1" / "training_state"
    [shard] = state.glob("*.safetensors")
    counters = state.with_suffix(".json")
    if damage == "half a shard":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "no shard":
        shard.unlink()
    elif damage == "half the counters":
        counters.write_text(counters.read_text()[:20])
    else:
        tensors = load_file(shard)
        save_file({name: tensor[:1] for name, tensor in tensors.items() if tensor.dim()}, shard)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max_steps", 2, "--resume")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "checkpoint-1: cannot be continued from" in printed and "Traceback" not in printed


def test_every_sample_once_an_epoch():
    stream = train.data_order(7, 0, 21, seed=3)
    assert [sorted(stream[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert stream[:7] != stream[7:14] and stream[5:11] == train.data_order(7, 5, 6, seed=3)
    assert stream != train.data_order(7, 0, 21, seed=4)
    assert len({train.mix_seeds(seed, place) for seed in range(50) for place in range(50)}) == 2500


# ---- One step --------------------------------------------------------------------------------------------------------

STYLES = {"compact": '[{{"bbox_2d":[{0},{1},{2},{3}],"point_2d":[{4},{5}]}}]',
          "spaces": '[ {{ "bbox_2d" : [ {0} , {1} , {2} , {3} ] , "point_2d" : [ {4} , {5} ] }} ]',
          "indented": '\n[\n  {{\n    "bbox_2d": [{0}, {1}, {2}, {3}],\n    "point_2d": [{4}, {5}]\n  }}\n]\n'}


@pytest.mark.parametrize("style", STYLES)
def test_the_injected_label_follows_the_majority_style(tmp_path, monkeypatch, style):
    """Two of three rollouts write one style: the label does too, means the same objects, and the log shows it."""
    run_, examples = start(tmp_path)
    other = next(name for name in STYLES if name != style)
    write = lambda example, i: (
        f"<think>it is there</think><answer>{STYLES[style if i < 2 else other].format(1, 2, 30, 40, 5, 6)}</answer>")
    answer_with(monkeypatch, run_, write)
    metrics, _, groups = train.train_step(run_, examples)
    assert metrics["style"] == "<answer>" + STYLES[style].format(1, 2, 3, 4, 2, 3) + "</answer>"
    for group, example in zip(groups, examples):
        label = group["texts"][-1]
        assert rewards.parse_answer(label) == example.objects
        if example.objects:
            found = example.objects[0]
            assert label == f"<answer>{STYLES[style].format(*found['bbox_2d'], *found['point_2d'])}</answer>"
        assert group["lengths"][-1] == len(run_.processor.label_ids(label))
    run_.config.align_label = False
    _, _, groups = train.train_step(run_, examples)
    assert groups[0]["texts"][-1] == examples[0].written_label()


def test_the_controls_reach_the_advantages(tmp_path, monkeypatch):
    """A perfect, thinking rollout earns 7, the label 6, or 7 with thinking credited; smoothing switches it off."""
    run_, examples = start(tmp_path)
    perfect = lambda example: "<think>I see it</think>" + data.label_text(example.objects, {})
    answer_with(monkeypatch, run_, lambda example, i: perfect(example) if i == 0 else "nothing")
    metrics = train.train_step(run_, examples)[0]
    assert metrics["label_active"] == 0 and metrics["label_advantage"] == pytest.approx(0, abs=1e-9)
    assert metrics["label_reward"] == 6
    run_.config.smooth_label_reward = False
    metrics = train.train_step(run_, examples)[0]
    assert metrics["label_active"] == 1 and metrics["label_advantage"] > 0.5
    run_.config.drop_thinking_reward = False
    assert train.train_step(run_, examples)[0]["label_reward"] == 7


@pytest.mark.parametrize("flags", [[], ["--method", "sft"], ["--average", "sequence", "--ratio", "sequence"]])
def test_micro_batches_do_not_change_the_step(tmp_path, monkeypatch, flags):
    results = []
    for size in (1, 2, 4):
        run_, examples = start(tmp_path, "--batch_size", 4, "--micro_batch_size", size, *flags)
        metrics, gradient = update_gradient(run_, examples, monkeypatch)
        results.append((metrics["loss"], metrics["grad_norm"], gradient))
    for loss, norm, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6) and norm == pytest.approx(results[0][1], rel=1e-5)
        assert (gradient - results[0][2]).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("flags, passes", [
    ([], [True]), (["--method", "sft"], [True]), (["--method", "rlvr"], [True]),
    (["--average", "sequence", "--ratio", "sequence"], [True]),
    (["--num_iterations", 2], [False, True, False, True])])  # old log-probs, a known gradient, then an unknown one
def test_the_head_runs_once_while_the_gradient_is_known(tmp_path, monkeypatch, flags, passes):
    """Each pass through the output head, and whether it computes gradients."""
    run_, examples = start(tmp_path, "--batch_size", 2, "--micro_batch_size", 2, "--learning_rate", 1e-3, *flags)
    calls, run = [], train.model.log_probs_by_chunk
    monkeypatch.setattr(train.model, "log_probs_by_chunk", lambda *args, grad=None: calls.append(grad is not None)
                        or run(*args, grad=grad))
    train.train_step(run_, examples)
    assert calls == passes


def test_the_seed_and_the_place_in_the_run_decide_the_rollouts(tmp_path):
    run_, examples = start(tmp_path)
    sample = lambda: [c.ids.tolist() for group in train.sample_rollouts(run_, [examples[0]] * 2) for c in group]
    first = sample()
    assert first == sample() and first[:3] != first[3:], "two prompts of a step draw differently"
    run_.prompts_seen = 2
    assert sample() != first
    run_.prompts_seen, run_.config.seed = 0, 1
    assert sample() != first


def test_more_iterations_leave_the_sampling_policy_behind(tmp_path):
    one, examples = start(tmp_path, "--learning_rate", 1e-3)
    several, _ = start(tmp_path, "--learning_rate", 1e-3, "--num_iterations", 3)
    assert train.train_step(one, examples)[0]["kl"] == 0
    assert train.train_step(several, examples)[0]["kl"] > 0


def test_the_kl_to_the_reference_counts_rollouts_and_not_the_label():
    """Without advantages the loss is beta times the mean of exp(d) - d - 1, d = log reference - log policy."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(1, 3, 4, generator=generator) for _ in range(2))
    policy.requires_grad_()
    mask, A = torch.ones(1, 3, 4, dtype=torch.bool), torch.zeros(1, 3)
    mask[0, 1, 3] = False
    for method, members in (("rlvr", 3), ("visurf", 2)):
        config = train.Config(method=method, beta=0.3)
        expected = sum(math.exp(d) - d - 1 for i in range(members) for j in range(4) if mask[0, i, j]
                       for d in [(reference - policy.detach())[0, i, j].item()])
        policy.grad = None
        loss, stats = train.loss_of(config, policy, policy.detach(), reference, A, mask, 11)
        loss.backward()
        assert loss.item() == pytest.approx(0.3 * expected / 11, rel=1e-5)
        assert stats["reference_kl"].item() == pytest.approx(expected / 11, rel=1e-5)
        assert bool(policy.grad[0, 2].any()) == (method == "rlvr")


def test_the_reference_pulls_back_where_no_group_has_a_signal(tmp_path, monkeypatch):
    """The first step leaves it; in the second, rewards say nothing, and the KL alone moves the weights."""
    run_, examples = start(tmp_path, "--beta", 1, "--learning_rate", 1e-3)
    assert train.train_step(run_, examples)[0]["reference_kl"] == 0
    answer_with(monkeypatch, run_, lambda example, i: "the same for all")
    run_.config.method = "rlvr"
    metrics, gradient = update_gradient(run_, examples, monkeypatch)
    assert metrics["no_signal"] == 1 and metrics["reference_kl"] > 0 and gradient.norm() > 0
    assert metrics["loss"] == pytest.approx(metrics["reference_kl"], rel=1e-4)


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    run_, examples = start(tmp_path)
    before = state(run_)
    good = train.visurf.policy_loss
    monkeypatch.setattr(train.visurf, "policy_loss", lambda *a, **k: (good(*a, **k)[0] * float("nan"), {}))
    metrics, _, _ = train.train_step(run_, examples)
    assert run_.not_finite == metrics["not_finite"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in state(run_).items())


def test_a_batch_without_signal_changes_nothing(tmp_path, monkeypatch):
    run_, examples = start(tmp_path, "--method", "rlvr", "--learning_rate", 1e-2)
    answer_with(monkeypatch, run_, lambda example, i: "the same for all")
    before = state(run_)
    metrics, _, _ = train.train_step(run_, examples)
    assert metrics["no_signal"] == 1 and metrics["grad_norm"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in state(run_).items())


# ---- Users' mistakes -------------------------------------------------------------------------------------------------


def grounding_file(tmp_path, **changes) -> Path:
    """A JSON-lines file with one good row, and one with `changes`; None removes a column."""
    from PIL import Image

    Image.new("RGB", (60, 40)).save(tmp_path / "image.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    row = {"problem": "the cat", "solution": '[{"bbox_2d": [1, 2, 30, 20]}]', "image": "image.png"}
    bad = {name: value for name, value in (row | changes).items() if value is not None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("flags, message", [
    (["--task", "painting"], "invalid choice: 'painting'"),
    (["--method", "dpo"], "invalid choice: 'dpo'"),
    (["--method", "rlvr", "--num_generations", "1"], "--num_generations 1"),
    (["--batch_size", "0"], "--batch_size must be"),
    (["--temperature", "nan"], "--temperature must be"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--model", "no/such/directory"], "no/such/directory"),
    (["--model", "nobody/nothing"], "nobody/nothing"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--max_prompt_length", "20"], "--max_prompt_length 20"),
])
def test_a_mistake_in_a_flag_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, message):
    expect_mistake(tmp_path, capsys, monkeypatch, flags, message)


@pytest.mark.parametrize("changes, message", [
    ({"image": None}, "row 2: no 'image'"),
    ({"image": "absent.png"}, "absent.png"),
    ({"image": "rows.jsonl"}, "unreadable image"),
    ({"solution": '[{"bbox_2d": [1, 2, 3'}, "not JSON"),
    ({"solution": '[{"bbox_2d": [30, 2, 1, 20]}]'}, "inside out"),
    ({"solution": '[{"bbox_2d": [100, 2, 130, 20]}]'}, "outside"),
    ({"problem": " "}, "empty"),
])
def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, changes, message):
    file = grounding_file(tmp_path, **changes)
    expect_mistake(tmp_path, capsys, monkeypatch, ["--data", str(file)], message)
    assert "rows.jsonl, row 2" in capsys.last


def expect_mistake(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(model, "load_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags)
    printed = capsys.readouterr().err
    capsys.last = printed
    assert stop.value.code == 2 and message in printed
    assert printed.count("\n") == 1 and printed.startswith("train.py: "), printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, capsys):
    file = grounding_file(tmp_path, solution='[{"bbox_2d": [50, 30, 70, 39]}]')  # overshoots: clipped
    with file.open("a") as rows:
        rows.write('{"problem": "x"}\n')
    run(tmp_path, "--data", file, "--skip_bad_rows", "--max_steps", 1)
    assert "2 samples (1 bad rows skipped, 1 boxes clipped)" in capsys.readouterr().out


def test_empty_data_and_another_runs_directory(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    expect_mistake(tmp_path, capsys, monkeypatch, ["--data", str(tmp_path / "empty.jsonl")], "no usable rows")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    expect_mistake(tmp_path, capsys, monkeypatch, [], "holds another run")
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_an_image_that_breaks_late_keeps_what_was_learnt(tmp_path, capsys):
    """Its header is fine, so it is found when it is needed: the run ends with one line, after saving."""
    file = grounding_file(tmp_path, image="broken.png")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--data", file, "--batch_size", 1, "--max_steps", 9)
    assert stop.value.code == 2 and "row 2" in capsys.readouterr().err
    assert checkpoints.last_checkpoint(tmp_path / "run")


def test_a_run_that_cannot_start_deletes_nothing(tmp_path, capsys):
    """A damaged checkpoint with --overwrite: one line, and the old run is still there; nor is a new directory taken."""
    directory = run(tmp_path, "--max_steps", 1)
    shutil.copytree(TINY, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    for name in ("run", "new"):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "--overwrite", "--model", tmp_path / "damaged", name=name)
        assert stop.value.code == 2 and "damaged or not a safetensors file" in capsys.readouterr().err
    assert checkpoints.last_checkpoint(directory) and len(records(directory)) == 1
    run(tmp_path, "--max_steps", 1, name="new")


def test_an_unwritable_directory_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    expect_mistake(tmp_path, capsys, monkeypatch, ["--output_dir", str(tmp_path / "file" / "run")], "not writable")


def test_a_network_that_does_not_fit_is_told_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes.os, "sysconf", lambda name: 2048)  # 4 MB in all
    expect_mistake(tmp_path, capsys, monkeypatch, [], "before any activation, and there are 0 GB")


@pytest.mark.parametrize("flags", [[], ["--max_steps", "3", "--resume", "--save_steps", "1"]])
def test_a_disk_without_room_for_a_checkpoint(tmp_path, capsys, monkeypatch, flags):
    """Said before a run begins; in a resumed one the disk fills up later, and the last checkpoint stays."""
    directory = run(tmp_path, "--max_steps", 1) if flags else tmp_path / "run"
    capsys.readouterr()
    free = [10**9, 10**6] if flags else [10**6]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count("the disk has 0.00 GB left") == 1
    assert [path.name for path in directory.glob("*-*")] == ["checkpoint-1"] * bool(flags)


def test_a_log_that_the_disk_does_not_take(tmp_path, capsys, monkeypatch):
    """Writing to /dev/full fails as on a full disk: one line that names the log."""
    monkeypatch.setattr(checkpoints, "open_log", lambda path, step: open("/dev/full", "w"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2 and "/dev/full: not written (No space left on device)" in capsys.readouterr().err


def test_resuming_another_kind_of_run_is_a_mistake(tmp_path, capsys):
    run(tmp_path, "--max_steps", 1)
    for flags, message in ((["--method", "sft"], "holds a run with --method 'visurf'"), (["--seed", 3], "--seed 0")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "--resume", *flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_overwrite_replaces_a_run(tmp_path):
    (run(tmp_path, "--max_steps", 2) / "notes.txt").write_text("mine")
    directory = run(tmp_path, "--max_steps", 1, "--overwrite")
    assert [m["step"] for m in records(directory)] == [1]
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (directory / "notes.txt").read_text() == "mine", "only what a run writes is removed"
