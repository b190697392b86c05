"""The loop in one process: every method end to end, a step's parts, resume, and users' mistakes."""

import fcntl
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import torch
from conftest import ROOT, hear_signals, read_log
from safetensors.torch import load_file

import data
import eval as evaluation
import model
import rewards
import train
import visurf

TINY = ROOT / "assets" / "tiny-qwen2-vl"
FAST = ["--max_steps", "2", "--batch_size", "2", "--num_generations", "3", "--micro_batch_size", "2",
        "--max_completion_length", "40"]


def run(tmp_path, *flags, name="run") -> Path:
    """Train in this process and return the output directory."""
    train.main([*FAST, "--output_dir", str(tmp_path / name), *map(str, flags)])
    return tmp_path / name


def expect_exit(tmp_path, capsys, *flags, name="run", code=2) -> str:
    """What a run that must end with one line says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags, name=name)
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if "Writing model shards" not in line]
    assert stop.value.code == code, printed
    assert len(lines) == 1 and lines[0].startswith("train.py: "), printed
    return lines[0]


def records(directory: Path, name="metrics") -> list[dict]:
    file = directory / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def make_run(*flags) -> train.Run:
    return ranks.make_run(*FAST, *flags)


def state(run_) -> dict:
    """A copy of all weights."""
    weights = {}
    for name, parameter in run_.network.named_parameters():
        weights[name] = parameter.full_tensor().detach().clone()
    return weights


def unchanged(run_, before: dict) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in state(run_).items())


def step_gradient(run_, monkeypatch) -> tuple[dict, list, dict]:
    """A step's metrics and records, and the gradient by parameter that AdamW was given."""
    kept = {}

    def keep():
        for name, parameter in run_.network.named_parameters():
            kept[name] = parameter.grad.full_tensor().clone()

    monkeypatch.setattr(run_.optimizer, "step", keep)
    return *train.train_step(run_), kept


def answer_with(monkeypatch, processor, write):
    """Let the sampler return write(example, i) as rollout i of each prompt."""
    def generate(network, examples, G, *rest, **more):
        groups = []
        for example in examples:
            ids = [processor.token_ids(write(example, i) + data.END) for i in range(G)]
            groups.append([model.Completion(row, torch.zeros(len(row)), True) for row in ids])
        return groups

    monkeypatch.setattr(model, "generate", generate)


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["visurf", "rlvr", "sft"])
def test_a_run_leaves_a_checkpoint_and_logs(tmp_path, capsys, method):
    directory = run(tmp_path, "--method", method)
    printed = capsys.readouterr().out
    metrics = records(directory)
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(m[name] > 0 for m in metrics for name in ("grad_norm", "rollout_seconds", "update_seconds"))
    assert ("label_active" in metrics[0]) == (method == "visurf")
    assert ("reward/accuracy" in metrics[0]) == (method != "sft")
    assert "step    2/2" in printed
    if method != "sft":
        kinds = {name.partition("/")[2] for name in metrics[0] if name.startswith("empty/")}
        assert kinds <= {"present", "absent"} and kinds
    assert len(records(directory, "completions")) == 2
    texts = records(directory, "completions")[0]["texts"]
    assert len(texts) == {"visurf": 4, "rlvr": 3, "sft": 1}[method]
    before = model.load_pretrained(TINY).state_dict()
    after = model.load_pretrained(directory / "checkpoint-2").state_dict()
    assert any(not torch.equal(before[name].bfloat16(), after[name]) for name in before)


def test_means_of_groups_whose_label_is_empty_stand_apart():
    """By hand: two groups of two rollouts; the first label, the empty one, is active, and the second is not."""
    thought, bare = "<think>so</think><answer>[]</answer>", "<answer>[]</answer>"
    shared = {"lengths": [9, 9, 9], "truncated": 0, "rewards": [{"accuracy": 1.0}] * 3}
    absent = {**shared, "label": [], "texts": [thought, bare, bare], "advantages": [0, 0, 1]}
    present = {**shared, "label": [{"bbox_2d": [1, 1, 2, 2]}], "texts": [thought, thought, bare],
               "advantages": [1, -1, 0]}
    present["texts"][1] = thought.replace("[]", "[{}]")
    means = train.summarize([absent, present], train.Settings(num_generations=2))
    found = {name: value for name, value in means.items() if name.endswith("sent")}
    assert found == {"thinking/absent": 0.5, "empty/absent": 1.0, "label_active/absent": 1.0,
                     "thinking/present": 1.0, "empty/present": 0.5, "label_active/present": 0.0}
    assert means["label_active"] == 0.5
    texts = ["<answer>0</answer>", "<answer>10</answer>", "<answer>0</answer>"]
    counts = [{**absent, "label": label, "texts": texts} for label in ("0", "10")]
    means = train.summarize(counts, train.Settings(num_generations=2))
    assert means["empty/absent"] == means["empty/present"] == 0.5, "a count of nothing is empty, too"


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real tokenizer) is not here")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_real_files(tmp_path, family):
    """A hub-layout checkpoint with the real tokenizer, and Parquet: train, save, evaluate."""
    pytest.importorskip("datasets")
    checkpoint = real_checkpoint(tmp_path / family, family)
    directory = run(tmp_path, "--task", "grounding", "--model", checkpoint, "--image_size", "168",
                    "--data", SHARED / "digits/digits_train.parquet", "--skip_bad_rows",
                    "--max_completion_length", 40, "--learning_rate", "1e-3")
    evaluation.main(["--task", "grounding", "--model", str(directory / "checkpoint-2"), "--image_size", "168",
                     "--data", str(SHARED / "digits/digits_test.parquet"), "--limit", "2",
                     "--max_completion_length", "40", "--output_dir", str(tmp_path / "answers")])
    answers = json.loads((tmp_path / "answers" / "answers.json").read_text())["answers"]
    # In pixels of the original image.
    assert answers[0]["label"][0]["bbox_2d"] == [52, 34, 93, 75]
    assert answers[0]["size"] == [296, 168]
    names = set(load_file(directory / "checkpoint-2" / "model.safetensors"))
    assert names == set(load_file(checkpoint / "model.safetensors"))


def real_checkpoint(directory: Path, family: str) -> Path:
    """The real tokenizer and configs of a family, shrunk to a small network of random weights."""
    import transformers

    shutil.copytree(SHARED / family, directory)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(SHARED / "qwen2_vl" / name, directory / name)
    config = json.loads((SHARED / family / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2}
    config["rope_scaling"]["mrope_section"] = [2, 1, 1]
    if family == "qwen2_vl":
        config["vision_config"] |= {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    else:
        config["vision_config"] |= {"depth": 2, "hidden_size": 32, "num_heads": 2,
                                    "intermediate_size": 48, "out_hidden_size": 32,
                                    "fullatt_block_indexes": [1]}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    network = transformers.AutoModelForImageTextToText.from_config(config)
    network.save_pretrained(directory / "weights")
    shutil.move(directory / "weights" / "model.safetensors", directory / "model.safetensors")
    return directory


# ---- Resume --------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    flags = "--micro_batch_size", 1
    whole = run(tmp_path, "--max_steps", 4, *flags, name="whole")
    run(tmp_path, "--max_steps", 2, *flags, name="parts")
    parts = run(tmp_path, "--max_steps", 4, *flags, "--resume", name="parts")
    for log in ("metrics.jsonl", "completions.jsonl"):
        assert read_log(whole / log) == read_log(parts / log)
    a = json.loads((whole / "checkpoint-4" / "training_state.json").read_text())
    b = json.loads((parts / "checkpoint-4" / "training_state.json").read_text())
    assert a["votes"] == b["votes"] and a["step"] == b["step"] == 4
    assert a["tensors"] == b["tensors"]
    assert (whole / "checkpoint-4/model.safetensors").read_bytes() == (parts / "checkpoint-4/model.safetensors").read_bytes()
    for file in (whole / "checkpoint-4" / "training_state").glob("*.safetensors"):
        # The order of its header is not fixed.
        x, y = load_file(file), load_file(parts / "checkpoint-4" / "training_state" / file.name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        assert len(x) == 4 * len(load_file(TINY / "model.safetensors"))
    assert checkpoints(parts) == ["checkpoint-4"], "the one before is dropped"


def test_resume_forgets_steps_after_the_checkpoint_and_unfinished_ones(tmp_path, capsys):
    """Killed after step 3 with a half-written checkpoint: step 3 is done again, once."""
    directory = run(tmp_path)
    with (directory / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 123}) + "\n\0\0" + '{"step": 2, "lo')
    (directory / "unfinished" / "training_state").mkdir(parents=True)
    run(tmp_path, "--max_steps", 3, "--resume", "--learning_rate", 1e-2)
    assert [m["step"] for m in records(directory)] == [1, 2, 3]
    assert records(directory)[2]["loss"] != 123
    assert not list(directory.glob("unfinished*"))


def test_the_newest_checkpoints_are_kept(tmp_path):
    directory = run(tmp_path, "--max_steps", 4, "--save_steps", 1, "--keep", 2, "--method", "sft")
    assert checkpoints(directory) == ["checkpoint-3", "checkpoint-4"]
    assert not list(directory.glob("unfinished*"))


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "--max_steps", 1)


@pytest.mark.parametrize("damage", ["half a shard", "no shard", "half the network"])
def test_a_damaged_checkpoint_is_named(tmp_path, capsys, one_step, damage):
    """Issue 14, 1: nothing is resumed from half of a checkpoint."""
    shutil.copytree(one_step, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    [shard] = (checkpoint / "training_state").glob("*.safetensors")
    file = checkpoint / "model.safetensors" if "network" in damage else shard
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if damage == "no shard":
        file.unlink()
    else:
        file.write_bytes(content[:middle])
    line = expect_exit(tmp_path, capsys, "--max_steps", 2, "--resume")
    assert str(checkpoint) in line and "damaged" in line
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1', "\0" * 20])
@pytest.mark.parametrize("file", ["config.json", "checkpoint-1/training_state.json"])
def test_a_damaged_file_of_the_run_is_named(tmp_path, capsys, one_step, file, content):
    shutil.copytree(one_step, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    line = expect_exit(tmp_path, capsys, "--max_steps", 2, "--resume")
    assert f"{file}: missing or damaged" in line and "restore it" in line


def test_every_sample_once_an_epoch():
    run_ = make_run()
    run_.samples = run_.samples[:7]
    names = {sample.id for sample in run_.samples}
    assert len(names) == 7

    def stream(*places):
        return [group.example.sample.id for group in train.encode_share(run_, range(*places))[0]]

    whole = stream(21)
    for first in (0, 7, 14):
        assert set(whole[first : first + 7]) == names
    assert whole[:7] != whole[7:14]
    assert stream(5, 11) == whole[5:11]
    run_.settings.seed = 4
    assert stream(21) != whole


# ---- One step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["visurf", "rlvr", "sft"])
def test_the_gradient_is_equation_9_by_hand(monkeypatch, method):
    """Plain autograd through transformers' network, row by row: sum of A * log-prob / tokens, and clipped."""
    import transformers

    run_ = make_run("--method", method, "--micro_batch_size", 1, "--temperature", 1,
                    "--batch_size", 4, "--num_generations", 4, "--max_completion_length", 100)
    metrics, groups, found = step_gradient(run_, monkeypatch)
    batch = train.encode_share(run_, range(4))[0]
    plain = transformers.AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    forbidden = run_.network.forbidden_tokens
    tokens = sum(sum(group["lengths"]) for group in groups)
    total = 0
    for example, group in zip((encoded.example for encoded in batch), groups):
        for text, A in zip(group["texts"], group["advantages"]):
            ids = run_.processor.token_ids(text + data.END)
            row = torch.cat([example.ids, ids])
            logits = plain(input_ids=row[None], pixel_values=example.pixels,
                           image_grid_thw=example.grid_thw,
                           mm_token_type_ids=(row == plain.config.image_token_id).int()[None])
            logits = logits.logits[0, len(example.ids) - 1 : -1]
            allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
            allowed[forbidden] = False
            logits = logits.where(allowed, -torch.inf)
            total -= A * logits.log_softmax(-1).gather(-1, ids[:, None]).sum() / tokens
    total.backward()
    expected = {f"vlm.{name}": parameter.grad for name, parameter in plain.named_parameters()}
    size = math.sqrt(sum(expected[name].norm() ** 2 for name in expected))
    assert size > 0 and metrics["grad_norm"] == pytest.approx(size, rel=1e-4)
    clipped = {name: gradient / max(size, 1) for name, gradient in expected.items()}
    difference = math.sqrt(sum((found[name] - clipped[name]).norm() ** 2 for name in clipped))
    assert difference < 1e-4 * min(size, 1)


STYLES = {"compact": '[{{"bbox_2d":[{0},{1},{2},{3}],"point_2d":[{4},{5}]}}]',
          "spaced": '[{{"bbox_2d": [{0}, {1}, {2}, {3}], "point_2d": [{4}, {5}]}}]'}


@pytest.mark.parametrize("style", STYLES)
def test_the_injected_label_follows_the_majority_style(monkeypatch, style):
    """Control 1: two of three rollouts write one style, so the label does, with its own objects."""
    run_ = make_run()
    run_.samples = [sample for sample in run_.samples if sample.label][:2]
    other = next(name for name in STYLES if name != style)

    def write(example, i):
        answer = STYLES[style if i < 2 else other].format(1, 2, 30, 40, 5, 6)
        return f"<think>it is there</think><answer>{answer}</answer>"

    answer_with(monkeypatch, run_.processor, write)
    _, groups = train.train_step(run_)
    assert visurf.preferred_style(run_.votes) == style and run_.votes == {style: 4, other: 2}
    batch = train.encode_share(run_, range(2))[0]
    for group, encoded in zip(groups, batch):
        found = encoded.example.label[0]
        answer = STYLES[style].format(*found["bbox_2d"], *found["point_2d"])
        assert group["texts"][-1] == f"<answer>{answer}</answer>"
        assert group["lengths"][-1] == len(run_.processor.token_ids(group["texts"][-1] + data.END))
    run_.settings.align_label = False
    batch = train.encode_share(run_, range(2, 4))[0]
    _, groups = train.train_step(run_)
    spaced = [visurf.align_label(encoded.example.label, "spaced") for encoded in batch]
    assert [group["texts"][-1] for group in groups] == spaced


def test_sft_writes_labels_as_the_network_answers(tmp_path, monkeypatch):
    """Without rollouts, greedy answers to the first questions vote; here they are indented."""
    greedy = []
    generate = model.generate

    def generate_indented(network, examples, N, length, temperature=1.0, seeds=None, cuda_graph=True):
        greedy.append((N, temperature, len(examples)))
        completions = generate(network, examples, N, length, temperature, seeds)
        answer = visurf.align_label([{"bbox_2d": [1, 2, 3, 4]}], "indented")
        ids = processor.token_ids(answer + data.END)
        return [[completion._replace(ids=ids)] for [completion] in completions]

    processor = data.Processor(TINY, data.TASKS["digits"])
    monkeypatch.setattr(model, "generate", generate_indented)
    monkeypatch.setattr(data.Processor, "decode",
                        lambda self, ids, finished: visurf.align_label([{"bbox_2d": [1, 2, 3, 4]}], "indented"))
    directory = run(tmp_path, "--method", "sft")
    assert greedy[0] == (1, 0, 32)
    for record in records(directory, "completions"):
        [text] = record["texts"]
        _, answer = rewards.split_completion(text)
        assert visurf.style_of(answer) in ("indented", None)
        assert answer == "[]" or answer.startswith("[\n  {")


def test_the_controls_reach_the_advantages(monkeypatch):
    """A perfect, thinking rollout earns 7, the label 6: controls 2 and 3 decide its advantage."""
    run_ = make_run()

    def write(example, i):
        text = visurf.align_label(example.label, "spaced")
        return f"<think>I see it</think>{text}" if i == 0 else "nothing"

    answer_with(monkeypatch, run_.processor, write)
    metrics, groups = train.train_step(run_)
    assert metrics["label_active"] == 0 and groups[0]["advantages"][-1] == 0
    assert [sum(parts.values()) for parts in groups[0]["rewards"]] == [7, 1, 1, 6]
    run_.settings.smooth_label_reward = False
    _, groups = train.train_step(run_)
    expected = visurf.group_advantages(torch.tensor([7.0, 1, 1, 6], dtype=torch.float64))
    assert groups[0]["advantages"] == pytest.approx(expected.tolist())
    run_.settings.drop_thinking_reward = False
    _, groups = train.train_step(run_)
    expected = visurf.group_advantages(torch.tensor([7.0, 1, 1, 7], dtype=torch.float64))
    assert groups[0]["advantages"] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("flags", [[], ["--method", "sft"]])
def test_micro_batches_do_not_change_the_step(monkeypatch, flags):
    results = []
    for size in (1, 2, 4):
        run_ = make_run("--batch_size", 4, "--micro_batch_size", size, *flags)
        metrics, _, gradient = step_gradient(run_, monkeypatch)
        gradient = torch.cat([part.flatten() for part in gradient.values()])
        results.append((metrics["loss"], metrics["grad_norm"], gradient))
    for loss, norm, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        assert (gradient - results[0][2]).norm() < 1e-5 * gradient.norm()


def test_the_seed_and_the_place_in_the_run_decide_the_rollouts():
    run_ = make_run()
    run_.samples = run_.samples[:1]

    def sample(*places):
        groups = []
        for place in places:
            groups += train.encode_share(run_, range(place, place + 1))[0]
        train.sample(run_, groups, 3, 1.0)
        return [group.texts for group in groups]

    first, second = sample(0, 1)
    assert first != second, "two prompts of a step draw differently"
    assert sample(1) == [second], "whatever else is in the batch"
    run_.settings.seed = 1
    assert first not in sample(0, 1)


def test_an_update_that_is_not_finite_is_skipped_and_counted(monkeypatch):
    run_ = make_run()
    before = state(run_)
    good = visurf.policy_loss

    def bad(*args, **more):
        return good(*args, **more) + math.nan

    monkeypatch.setattr(visurf, "policy_loss", bad)
    metrics, _ = train.train_step(run_)
    assert run_.skipped == metrics["skipped"] == 1 and unchanged(run_, before)
    monkeypatch.undo()
    metrics, _ = train.train_step(run_)
    assert metrics["skipped"] == run_.skipped == 0
    assert not unchanged(run_, before)


def test_a_batch_without_signal_changes_nothing(monkeypatch):
    run_ = make_run("--method", "rlvr", "--learning_rate", 1e-2)
    answer_with(monkeypatch, run_.processor, lambda example, i: "the same for all")
    before = state(run_)
    metrics, _ = train.train_step(run_)
    assert metrics["grad_norm"] == 0 and unchanged(run_, before)


def test_weights_that_explode_end_the_run_and_are_not_kept(tmp_path, capsys):
    """Issue 14, 6: --learning_rate 1e20 makes log-probs that are not finite. The good checkpoint
    stays the last one, and --resume goes on from it."""
    run(tmp_path, "--max_steps", 1)
    line = expect_exit(tmp_path, capsys, "--max_steps", 30, "--save_steps", 5, "--resume",
                       "--learning_rate", "1e20")
    assert "--learning_rate" in line and "not finite" in line
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    run(tmp_path, "--max_steps", 2, "--resume")
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


# ---- Users' mistakes -----------------------------------------------------------------------------


def test_a_label_longer_than_any_rollout_is_refused_for_grpo_alone(tmp_path, capsys):
    """No rollout could be right. The others learn from the label itself."""
    row = json.loads((ROOT / "assets/digits/train.jsonl").read_text().splitlines()[0])
    row["solution"] = [{"bbox_2d": [1, 1, 9 + i, 9], "point_2d": [5, 5]} for i in range(8)]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps(row))
    flags = "--data", file, "--max_steps", 1, "--batch_size", 1
    line = expect_exit(tmp_path, capsys, *flags, "--method", "rlvr", name="rlvr")
    assert f"{file}, row 1: a label that is longer than --max_completion_length" in line
    for name, more in (("visurf", ()), ("sft", ("--method", "sft")),
                       ("longer", ("--method", "rlvr", "--max_completion_length", 400))):
        assert checkpoints(run(tmp_path, *flags, *more, name=name)) == ["checkpoint-1"]


def grounding_file(tmp_path, **changes) -> Path:
    """JSON lines with one good row, and one with `changes`; None removes a column."""
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
    (["--num_generations", "1"], "--num_generations: must be from 2"),
    (["--batch_size", "0"], "--batch_size"),
    (["--temperature", "nan"], "--temperature"),
    (["--max_completion_length", "999999999"], "--max_completion_length"),
    (["--image_size", "40000"], "--image_size"),
    (["--model", "no/such/directory"], "no/such/directory"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
])
def test_a_mistake_in_a_flag_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags,
                                                         message):
    """Before anything is loaded, so that `--image_size 40000` costs no memory either."""
    monkeypatch.setattr(model, "load_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    assert message in expect_exit(tmp_path, capsys, *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "load_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    file = grounding_file(tmp_path, image="absent.png")
    line = expect_exit(tmp_path, capsys, "--data", file)
    assert "rows.jsonl, row 2" in line and "absent.png" in line


def test_an_image_that_breaks_late_keeps_what_was_learnt(tmp_path, capsys):
    """Its header is fine, so it is found when it is needed: one line, after saving. Skipped and
    counted with --skip_bad_rows."""
    file = grounding_file(tmp_path, image="broken.png")
    flags = "--data", file, "--batch_size", 1, "--max_steps", 6
    line = expect_exit(tmp_path, capsys, *flags)
    assert "rows.jsonl, row 2" in line and "--skip_bad_rows" in line
    done = len(records(tmp_path / "run"))
    assert done > 0 and checkpoints(tmp_path / "run") == [f"checkpoint-{done}"]

    directory = run(tmp_path, *flags, "--skip_bad_rows", name="skipping")
    assert len(records(directory)) == 6
    assert sum(m["skipped_rows"] for m in records(directory)) == 3
    resumed = [m["skipped_rows"] for m in records(directory)]
    run(tmp_path, *flags, "--skip_bad_rows", "--max_steps", 8, "--resume", name="skipping")
    counts = [m["skipped_rows"] for m in records(directory)]
    assert counts[:6] == resumed and sum(counts) == 4


def test_an_unwritable_directory_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in expect_exit(tmp_path, capsys, name="file/run")


def test_a_log_that_the_disk_does_not_take(tmp_path, capsys, monkeypatch):
    """A full disk at the second step's log: one line that names the file, and both steps are saved."""
    log_step = train.log_step

    def fill(run_, *args):
        if run_.step == 2:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        log_step(run_, *args)

    monkeypatch.setattr(train, "log_step", fill)
    line = expect_exit(tmp_path, capsys, "--max_steps", 3)
    assert "No space left on device" in line and "metrics.jsonl" in line
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


def test_resuming_another_kind_of_run_is_a_mistake(tmp_path, capsys, one_step):
    shutil.copytree(one_step, tmp_path / "run")
    line = expect_exit(tmp_path, capsys, "--resume", "--method", "sft")
    assert "holds a run with another method: 'visurf'" in line
    assert "another seed: 0, not 3" in expect_exit(tmp_path, capsys, "--resume", "--seed", 3)


# ---- The directory is somebody's -----------------------------------------------------------------


def test_a_directory_with_anything_in_it_is_no_place_for_a_new_run(tmp_path, capsys):
    """So no file, link or folder of a user can be met, overwritten or deleted later."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("mine")
    for flags in ([], ["--resume"]):
        assert "is not empty" in expect_exit(tmp_path, capsys, *flags)
    assert (directory / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoint-900-best", "checkpoint-01", "checkpoint-2", "checkpoint-1.bak"])
def test_what_is_called_a_checkpoint_and_is_another_is_named(tmp_path, capsys, one_step, name):
    """A copy under another name, a leading zero: neither taken for the newest, nor skipped, nor deleted."""
    shutil.copytree(one_step, tmp_path / "run")
    shutil.copytree(one_step / "checkpoint-1", tmp_path / "run" / name)
    line = expect_exit(tmp_path, capsys, "--max_steps", 2, "--resume")
    assert f"{name}: " in line and "move it away" in line
    assert checkpoints(tmp_path / "run") == sorted(["checkpoint-1", name])


def test_a_checkpoint_without_its_state_is_named_and_loses_nothing(tmp_path, capsys, one_step):
    shutil.copytree(one_step, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "training_state.json").unlink()
    line = expect_exit(tmp_path, capsys, "--max_steps", 2, "--resume")
    assert "checkpoint-1/training_state.json: missing" in line
    assert len(records(tmp_path / "run")) == 1


def test_a_run_goes_on_without_the_checkpoint_it_began_with(tmp_path):
    """Its files were read at the start, and the last checkpoint stands in for it afterwards."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "processor_config.json").write_text("{}")
    run(tmp_path, "--model", base, "--max_steps", 1)
    shutil.rmtree(base)
    run(tmp_path, "--model", base, "--max_steps", 2, "--resume")
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert names == {path.name for path in TINY.iterdir()} | {
        "processor_config.json", "training_state", "training_state.json"}


def test_moved_rows_go_on_and_fewer_rows_do_not(tmp_path, capsys):
    rows = (ROOT / "assets/digits/train.jsonl").read_text().splitlines()[:20]
    for name, lines in (("a", rows), ("b", rows), ("c", rows[1:])):
        shutil.copytree(ROOT / "assets/digits", tmp_path / name)
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    run(tmp_path, "--data", tmp_path / "a", "--max_steps", 1)
    line = expect_exit(tmp_path, capsys, "--data", tmp_path / "c", "--max_steps", 2, "--resume")
    assert "another samples: 20, not 19" in line
    run(tmp_path, "--data", tmp_path / "b", "--max_steps", 2, "--resume")


def test_two_runs_in_one_directory(tmp_path, capsys, one_step):
    """Issue 14, 4: a lock is held while a run lives, whatever becomes of torchrun."""
    shutil.copytree(one_step, tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in (["--resume"], []):
            assert "another run is at work" in expect_exit(tmp_path, capsys, *flags)
    run(tmp_path, "--max_steps", 2, "--resume")


# ---- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, when, done", [
    (signal.SIGINT, "train_step", 0), (signal.SIGTERM, "sample", 1), (signal.SIGTERM, "update", 1),
    (signal.SIGHUP, "save", 1)])
def test_a_signal_at_any_time_saves_and_leaves(tmp_path, capsys, monkeypatch, number, when, done):
    """Issue 14, 7: before the first step, in its rollouts, in its update, in its save."""
    function = getattr(train, when)
    sent = []

    def send_before(*args, **kwargs):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(train, when, send_before)
    hear_signals()
    flags = "--max_steps", 2, "--save_steps", 1
    line = expect_exit(tmp_path, capsys, *flags, code=128 + number)
    assert line == f"train.py: stopped by {signal.Signals(number).name}; --resume continues"
    monkeypatch.undo()
    directory = tmp_path / "run"
    assert checkpoints(directory) == ["checkpoint-1"][:done]
    assert len(records(directory)) == done
    run(tmp_path, *flags, "--resume")
    assert [m["step"] for m in records(directory)] == [1, 2]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    """nohup has SIGHUP ignored, and the run must not start to listen to it."""
    hear_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run(tmp_path, "--max_steps", 1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
