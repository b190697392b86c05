"""eval.py: metrics against brute force and the authors' definitions, the way back to original pixels, processes, flags.

Networks are stand-ins that say what a test tells them; the processor is the real one, with a tokenizer of bytes.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model
import train

TINY = ROOT / "assets" / "tiny-qwen2-vl"
DIGITS = data.TASKS["digits"]


def thing(*box):
    return {"bbox_2d": list(box), "point_2d": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}


def result(prediction, label, size=(40, 30), **fields):
    return {"id": "a", "where": "row 1", "question": "find it", "completion": "<think>here</think><answer>…</answer>",
            "prediction": prediction, "label": label, "size": list(size), "length": 10, "truncated": False,
            "thinking": True, "reward": {"format": 2.0, "accuracy": 1.0, "non_repeat": 1.0}, **fields}


def measured(task, results):
    return evaluation.metrics(results, data.TASKS[task])


def one_to_one(results) -> float:
    return np.mean([evaluation.measure(result)["one_to_one"] for result in results])


# ---- Metrics --------------------------------------------------------------------------------------------------------


def iou_of_pixels(a, b) -> float:
    """IoU of two boxes of whole numbers, counted on a canvas of pixels."""
    canvas = np.zeros((2, 200, 200), bool)
    for layer, (x1, y1, x2, y2) in zip(canvas, (a, b)):
        layer[y1 + 50:y2 + 50, x1 + 50:x2 + 50] = True
    return (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum() if canvas.any() else 0


def by_the_authors(prediction, label) -> float:
    """Box accuracy as VisionReasoner's evaluation_segmentation.py computes it, on pixels."""
    def around(boxes):
        return [min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)]

    boxes = [found["bbox_2d"] for found in prediction or []]
    if not label:
        return float(prediction == [])
    truth = around([found["bbox_2d"] for found in label])
    if any(iou_of_pixels(box, truth) > 0.5 for box in boxes):
        return 1.0
    return float(bool(boxes) and iou_of_pixels(around(boxes), truth) > 0.5)


def brute_force(results) -> dict:
    """The box metrics by their definitions alone: masks of pixels, and every possible matching tried."""
    def mask(objects, size):
        picture = np.zeros((size[1], size[0]), bool)
        for found in objects or []:
            x1, y1, x2, y2 = (max(v, 0) for v in found["bbox_2d"])
            picture[y1:y2, x1:x2] = True
        return picture

    pairs, absents, ious, intersections, unions = [], [], [], 0, 0
    for r in results:
        predicted, label = r["prediction"], r["label"]
        a, b = mask(predicted, r["size"]), mask(label, r["size"])
        intersections, unions = intersections + (a & b).sum(), unions + (a | b).sum()
        if not label:
            absents.append(float(predicted == []))
            ious.append(absents[-1])
            pairs.append(absents[-1])
            continue
        few, many = sorted([predicted or [], label], key=len)
        best = max(sum(iou_of_pixels(x["bbox_2d"], y["bbox_2d"]) > 0.5 for x, y in zip(few, order))
                   for order in permutations(many, len(few)))
        pairs.append(best / len(many))
        ious.append((a & b).sum() / (a | b).sum())
    return {"accuracy": np.mean([by_the_authors(r["prediction"], r["label"]) for r in results]),
            "one_to_one": np.mean(pairs), "gIoU": np.mean(ious), "cIoU": intersections / unions,
            "N-Acc": np.mean(absents)}


def test_metrics_equal_brute_force_on_pixels():
    """Boxes of whole numbers, many, overlapping, outside the image: masks of pixels and all matchings agree."""
    rng = np.random.default_rng(0)

    def objects(count, low, high):
        corners = np.sort(rng.integers(low, high, (count, 2, 2)), axis=1)
        corners[:, 1] += 1
        return [{"bbox_2d": box.ravel().tolist()} for box in corners]

    results = []
    for n in range(300):
        label = objects(rng.integers(0, 4), 0, 29)
        prediction = objects(rng.integers(0, 4), -8, 45)
        for found in label[:rng.integers(0, 4)]:         # near misses and near hits
            moved = np.array(found["bbox_2d"]) + rng.integers(-2, 3, 4)
            if moved[0] < moved[2] and moved[1] < moved[3]:
                prediction.append({"bbox_2d": moved.tolist()})
        results.append(result(None if n % 7 == 0 else prediction[:4], label))
    expected, found = brute_force(results), measured("grounding", results) | {"one_to_one": one_to_one(results)}
    assert 0.05 < expected["one_to_one"] < expected["accuracy"] < 0.6 and 0 < expected["N-Acc"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_metrics_by_hand():
    cat, dog, far = thing(0, 0, 10, 10), thing(20, 0, 30, 10), thing(0, 20, 10, 30)
    table = [    # prediction, label, the authors' accuracy, one to one, mask IoU
        ([cat], [cat], 1, 1, 1),
        ([thing(0, 0, 10, 5)], [cat], 0, 0, 0.5),                # IoU of exactly 0.5 is not above it
        ([thing(0, 0, 10, 6)], [cat], 1, 1, 0.6),
        ([cat, cat], [cat], 1, 0.5, 1),                          # a box listed twice is free there, not here
        ([cat], [cat, dog], 0, 0.5, 0.5),                        # 10 x 10 of the 30 x 10 around both
        ([dog, cat], [cat, dog], 1, 1, 1),                       # in any order
        ([cat, far], [cat, dog], 0, 0.5, 1 / 3),
        ([thing(0, 0, 30, 10)], [cat, dog], 1, 0, 2 / 3),        # a box around both does there, not here
        ([thing(0, 0, 5, 10), thing(5, 0, 10, 10)], [cat], 1, 0, 1),       # and so do two halves
        ([], [cat], 0, 0, 0),
        ([{"point_2d": [5, 5]}], [cat], 0, 0, 0),
        ([{"bbox_2d": [9, 9, 1, 1]}], [cat], 0, 0, 0),           # inside out
        ([{}, cat], [cat], 1, 0.5, 1),                           # an object without a box is an object
        (None, [cat], 0, 0, 0),
        ([], [], 1, 1, 1),
        ([cat], [], 0, 0, 0),
        ([{}], [], 0, 0, 0),
        (None, [], 0, 0, 0),                                     # no answer is not the answer []
    ]
    for prediction, label, accuracy, ours, iou in table:
        found = measured("grounding", [result(prediction, label)])
        assert found["accuracy"] == accuracy, (prediction, label)
        assert one_to_one([result(prediction, label)]) == pytest.approx(ours), (prediction, label)
        assert found["N-Acc"] == (None if label else ours)
        assert found["gIoU"] == pytest.approx(iou), (prediction, label)
    found = measured("grounding", [result(prediction, label) for prediction, label, *_ in table])
    assert found["accuracy"] == pytest.approx(np.mean([row[2] for row in table]))
    assert found["N-Acc"] == pytest.approx(1 / 4)
    assert found["gIoU"] == pytest.approx(np.mean([row[4] for row in table]))
    assert found["well_formed"] == pytest.approx(16 / 18) and found["samples"] == 18


def test_ciou_weighs_by_area_and_giou_does_not():
    results = [result([thing(0, 0, 30, 30)], [thing(0, 0, 30, 30)]), result([], [thing(0, 0, 10, 10)])]
    found = measured("grounding", results)
    assert found["gIoU"] == 0.5 and found["cIoU"] == pytest.approx(0.9)


def test_areas_are_pixels_inside_any_box_and_cut_to_the_image():
    a, b = {"bbox_2d": [0.25, 0.4, 2.75, 3.0]}, {"bbox_2d": [2, 1, 5, 2]}
    found = evaluation.measure(result([a, a], [b]))
    assert (found["intersection"], found["union"]) == (1, 9 + 3 - 1)
    rng = np.random.default_rng(0)
    many = [{"bbox_2d": np.sort(rng.uniform(0, 1e3, (2, 2)), axis=0).ravel().tolist()} for _ in range(120)]
    whole = [{"bbox_2d": [-1e5, -1e5, 1e5, 1e5]}]
    found = evaluation.measure(result(whole, many, (1000, 1000)))
    assert found["union"] == 1e6 and 0 < found["intersection"] < 1e6


def anomaly_results(answers):
    box = [thing(0, 0, 9, 9)]
    return [result(box if says else [], box if is_one else []) for says, is_one in answers]


def test_roc_auc_equals_a_count_of_pairs():
    """As calculate_acc_auc.py does it: the score is whether anything was found. The area under the curve is the share
    of pairs, one of each class, that the score puts in order; a tie counts half."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        answers = list(zip((rng.random(20) < 0.6).tolist(), (rng.random(20) < 0.4).tolist()))
        found = measured("anomaly", anomaly_results(answers))
        pairs = [(a > b) + (a == b) / 2 for a, p in answers if p for b, q in answers if not q]
        assert found["ROC-AUC"] == pytest.approx(np.mean(pairs))
        assert found["anomaly_acc"] == pytest.approx(np.mean([a == p for a, p in answers]))
    assert measured("anomaly", anomaly_results([(True, True), (False, True)]))["ROC-AUC"] is None


def test_an_unreadable_answer_about_anomalies_is_wrong():
    box = [thing(0, 0, 10, 10)]
    pairs = (box, box), ([], box), (box, box), (None, box), ([], []), (box, []), (None, [])
    results = [result(*pair) for pair in pairs]
    found = measured("anomaly", results)
    assert found["anomaly_acc"] == pytest.approx(3 / 7)
    assert found["ROC-AUC"] == pytest.approx((2 / 4 + 1 / 3) / 2)


def test_counts_against_plain_sums():
    rng, results, errors, right = np.random.default_rng(0), [], [], []
    for n in range(200):
        label, predicted = rng.integers(0, 9, 2).tolist()
        answer = [[thing(0, 0, 9, 9)] * predicted, str(predicted), None][n % 3]
        truth = [[thing(0, 0, 9, 9)] * label, str(label)][n // 3 % 2]
        results.append(result(answer, truth))
        errors.append((0 if answer is None else predicted) - label)
        right.append(answer is not None and predicted == label)
    found = measured("counting", results)
    assert found["MAE"] == pytest.approx(sum(abs(e) for e in errors) / 200)
    assert found["count_acc"] == sum(right) / 200 and 0 < sum(right) < 60
    assert all(value is None for name, value in measured("counting", []).items() if name != "samples")


def test_a_click_counts_if_any_listed_point_is_inside():
    """As evaluation_gui.py does it: any of the points, edges included; boxes do not count."""
    box, two = [{"bbox_2d": [10, 20, 30, 40]}], [{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [50, 50, 60, 60]}]
    for predicted, label, expected in (
            ([{"point_2d": [15, 25]}], box, 1), ([{"point_2d": [10, 40]}], box, 1), ([{"point_2d": [9.9, 30]}], box, 0),
            ([{"point_2d": [30, 15]}], box, 0), ([{"point_2d": [25, 15]}], box, 0),      # x and y are not the same
            ([{"point_2d": [35, 30]}], box, 0), ([{"point_2d": [20, 45]}], box, 0),
            ([{"bbox_2d": [0, 0, 40, 60], "point_2d": [1, 1]}], box, 0), ([{"bbox_2d": [10, 20, 30, 40]}], box, 1),
            ([{"point_2d": [1, 1]}, {"point_2d": [15, 25]}], box, 1), ([{}, {"point_2d": [55, 55]}], two, 1),
            ([{"point_2d": [15, 55]}], two, 0),                  # x in one box and y in the other
            ([{}], box, 0), ([], box, 0), (None, box, 0)):
        assert measured("gui", [result(predicted, label)])["point_in_box"] == expected, (predicted, label)


def test_words_are_right_if_their_reward_says_so():
    results = [result("x", "y", reward={"format": 1.0, "accuracy": float(right)}) for right in (1, 0, 0)]
    assert measured("math", results)["accuracy"] == pytest.approx(1 / 3)


def test_nothing_to_measure_is_none():
    found = measured("medical", [])
    assert found.pop("samples") == 0 and all(value is None for value in found.values())
    box = [thing(0, 0, 9, 9)]
    table = evaluation.format_table(measured("grounding", [result(box, box)]) | {"MAE": 1234.5, "gIoU": 2 / 3})
    rows = dict(map(str.split, table.splitlines()))
    assert len({len(line) for line in table.splitlines()}) == 1
    assert rows["accuracy"] == "1" and rows["gIoU"] == "0.666667" and rows["N-Acc"] == "nan" and rows["MAE"] == "1234.5"
    assert rows["length"] == "10" and rows["reward"] == "4" and rows["samples"] == "1"


def test_general_metrics_are_means():
    results = [result([], [], length=10, truncated=True), result([], [], length=13, thinking=False),
               result(None, [], reward={"non_repeat": 1.0}), result(None, [], thinking=False)]
    found = measured("grounding", results)
    assert [found[name] for name in ("well_formed", "thinking", "truncated", "length", "reward")] == [
        0.5, 0.5, 0.25, 43 / 4, 13 / 4]


# ---- From a model's answer to original pixels -----------------------------------------------------------------------


def save_processor(folder: Path, family="qwen2_vl", patch=14, pixels=(56 * 56, 28 * 28 * 16), **config) -> Path:
    """A checkpoint's folder without weights: the tokens are bytes, the chat template is the bundled checkpoint's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                                  "<|image_pad|>", "<|video_pad|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(TINY / "chat_template.jinja", folder)
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
             "config": {"model_type": family, "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
                        "vision_config": {"patch_size": patch}, **config},
             "preprocessor_config": {
                 "image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "merge_size": 2,
                 "temporal_patch_size": 2, "min_pixels": pixels[0], "max_pixels": pixels[1],
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_processor(folder, task=DIGITS, family="qwen2_vl", patch=14, **settings):
    return data.Processor(save_processor(folder, family, patch), task, **settings)


def make_sample(name="a", stored=(90, 60), objects=None, frame=None, size=None, **fields):
    objects = [thing(9, 6, 45, 54), thing(50, 10, 88, 30)] if objects is None else objects
    return data.Sample(name, f"find {name}", Image.new("RGB", stored, "grey"), objects, frame or stored,
                       size or stored, f"row {name}", **fields)


def speak(monkeypatch, processor, say, finished=True, logprob=-1.0):
    """Let the network answer with the text say(example); returns the list of the batches it was asked."""
    batches = []

    def generate(network, examples, num_generations, max_new_tokens, temperature, cuda_graph=True):
        assert num_generations == 1 and temperature == 0
        batches.append(examples)
        tokens = [processor.token_ids(say(example) + "<|im_end|>" * finished) for example in examples]
        return [[model.Completion(ids, torch.full((len(ids),), logprob), finished)] for ids in tokens]

    monkeypatch.setattr(model, "generate", generate)
    return batches


def says_label(example):
    return f"<think>I see</think><answer>{json.dumps(example.label)}</answer>"


def test_results_say_what_happened(monkeypatch, tmp_path):
    processor = make_processor(tmp_path)
    speak(monkeypatch, processor, says_label)
    [found], bad = evaluation.evaluate(None, processor, [make_sample(objects=[])])
    text = "<think>I see</think><answer>[]</answer>"
    assert bad == [] and found == {
        "id": "a", "where": "row a", "question": "find a", "completion": text, "prediction": [], "label": [],
        "size": [90, 60], "length": len(text) + 1, "logprob": -len(text) - 1, "truncated": False,
        "thinking": True, "reward": {"thinking": 1, "format": 2, "accuracy": 3, "non_repeat": 1}}
    speak(monkeypatch, processor, lambda example: "<think>I see, and I go on", finished=False)
    [found], _ = evaluation.evaluate(None, processor, [make_sample()])
    assert found["prediction"] is None and found["truncated"] and not found["thinking"]
    assert sum(found["reward"].values()) == 1 and found["length"] == len("<think>I see, and I go on")
    json.dumps(found, allow_nan=False)


def test_reward_is_counted_in_the_models_frame_and_metrics_in_the_originals(monkeypatch, tmp_path):
    """5 of its 56 pixels beside the label: the overlap is enough, box and point are too far off. Not 5 of 1050."""
    processor = make_processor(tmp_path, family="qwen2_5_vl", image_size=56)
    speak(monkeypatch, processor, lambda example: f"<answer>{json.dumps([thing(11, 6, 33, 50)])}</answer>")
    sample = make_sample(objects=[thing(9, 6, 45, 54)], size=(1050, 600))             # [6, 6, 28, 50] for the model
    [found], _ = evaluation.evaluate(None, processor, [sample])
    assert found["reward"]["accuracy"] == 1 and measured("digits", [found])["accuracy"] == 1
    assert measured("digits", [found])["gIoU"] == pytest.approx(150267 / 245797, abs=2e-3)
    box = [11 * 1050 / 56, 6 * 600 / 56, 33 * 1050 / 56, 50 * 600 / 56]
    assert found["prediction"][0]["bbox_2d"] == pytest.approx(box)


def test_a_batch_is_opened_when_its_turn_comes_and_the_order_is_that_of_the_samples(monkeypatch, tmp_path):
    processor, opened = make_processor(tmp_path), []
    samples = [make_sample(str(n), objects=[]) for n in range(7)]
    encode = data.Processor.encode
    monkeypatch.setattr(data.Processor, "encode", lambda self, sample: opened.append(sample.id) or encode(self, sample))
    seen = []
    batches = speak(monkeypatch, processor, lambda example: seen.append(len(opened)) or f"I am {example.sample.id}")
    found, _ = evaluation.evaluate(None, processor, samples, batch_size=3)
    assert [r["completion"] for r in found] == [f"I am {n}" for n in range(7)]
    assert [len(batch) for batch in batches] == [3, 3, 1] and seen == [3, 3, 3, 6, 6, 6, 7]


def test_rows_that_cannot_be_used_are_named_and_all_others_answered(monkeypatch, tmp_path):
    """A truncated image and one that the image processor refuses, met in the middle of an evaluation."""
    processor = make_processor(tmp_path, replace(DIGITS, keep_shape=True))
    speak(monkeypatch, processor, lambda example: "<answer>[]</answer>")
    samples = [make_sample(str(n)) for n in range(5)]
    samples[1].image, samples[3].image = b"\x89PNG\r\n", Image.new("RGB", (900, 3))
    for batch_size in (1, 2, 5):
        found, bad = evaluation.evaluate(None, processor, samples, batch_size=batch_size)
        assert [r["id"] for r in found] == ["0", "2", "4"]
        assert len(bad) == 2 and "row 1" in bad[0] and "row 3" in bad[1]


def test_weights_that_are_not_finite_are_an_error_and_not_metrics():
    network = model.load_pretrained(TINY)
    with torch.no_grad():
        next(network.vlm.model.language_model.parameters()).fill_(float("nan"))
    processor = data.Processor(TINY, DIGITS)
    with pytest.raises(model.CheckpointError, match="not finite"):
        evaluation.evaluate(network, processor, [make_sample(stored=(48, 48), objects=[])], max_new_tokens=3)


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with three rows of data, and a checkpoint whose weights are a stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "load_pretrained", lambda *_: None)
    save_processor(tmp_path / "runs" / "mine" / "checkpoint-7")
    rows = []
    for n in range(3):
        Image.new("RGB", (60, 60), "grey").save(f"{n}.png")
        rows.append({"text": f"find {n}", "image": f"{n}.png", "bbox": [6, 6, 30, 30]})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    processor = data.Processor(tmp_path / "runs/mine/checkpoint-7", DIGITS)
    speak(monkeypatch, processor, says_label)
    return ["--model", "runs/mine/checkpoint-7", "--data", "rows.jsonl"]


def mistake(capsys, arguments) -> str:
    """What evaluation.main says of a user's mistake: one line on stderr, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(arguments)
    error = capsys.readouterr().err.rpartition("\r")[2]          # after the progress bar
    assert stop.value.code == 2 and error.startswith("eval.py: ")
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error and "\x1b" not in error
    return error


@pytest.mark.parametrize("flags, complaint", [
    (["--task", "chess"], "chess"),
    (["--split", "tset"], "tset"),
    (["--data", "no/such/file.jsonl"], "no/such/file.jsonl"),
    (["--model", "/no/such/checkpoint"], "/no/such/checkpoint"),
    (["--model", "."], "config.json: missing or damaged; restore it"),
    (["--eval_batch_size", "0"], "--eval_batch_size: must be from 1 to 4096, not 0"), (["--limit", "-1"], "--limit"),
    (["--image_size", "x"], "--image_size"),
    (["--max_completion_length", "999999999"], "1 to 8192"),
    (["--unknown"], "--unknown"), (["--over"], "--over"),
    (["--output_dir", "rows.jsonl/x"], "rows.jsonl"),
    (["--output_dir", "rows.jsonl"], "rows.jsonl"),
])
def test_a_users_mistake_is_one_line_before_anything_is_loaded(flags, complaint, files, monkeypatch, capsys):
    monkeypatch.setattr(model, "load_pretrained", lambda *_: pytest.fail("weights were loaded"))
    assert complaint in mistake(capsys, [*files, *flags])


def test_missing_tensors_are_one_line(files, tmp_path):
    """transformers would print a table of them, with names that a foreign file chose."""
    broken = shutil.copytree(ROOT / "assets/tiny-qwen2-vl", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    arguments = [sys.executable, ROOT / "eval.py", *files, "--model", broken, "--output_dir", tmp_path / "out"]
    printed = subprocess.run(arguments, capture_output=True, text=True)
    assert printed.returncode == 2 and printed.stderr.count("\n") == 1 and "missing_keys" in printed.stderr


def test_unusable_weights_are_one_line(files, monkeypatch, capsys):
    def load(*_):
        raise model.CheckpointError("runs/mine: lacks a tensor")

    monkeypatch.setattr(model, "load_pretrained", load)
    assert mistake(capsys, files) == "eval.py: runs/mine: lacks a tensor\n"


def test_answers_are_written_and_the_table_is_printed(files, tmp_path, capsys):
    evaluation.main([*files, "--limit", "2", "--image_size", "56"])
    printed, directory = capsys.readouterr().out, tmp_path / "runs" / "eval-digits-mine-checkpoint-7"
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "answers.json"]
    saved = json.loads((directory / "answers.json").read_text())
    assert saved["metrics"]["accuracy"] == 1 and saved["metrics"]["samples"] == len(saved["answers"]) == 2
    assert saved["settings"]["image_size"] == 56 and saved["settings"]["data"] == "rows.jsonl"
    assert saved["settings"]["max_completion_length"] == DIGITS.recipe["max_completion_length"]
    assert evaluation.format_table(saved["metrics"]) in printed and "answers.json" in printed


def test_answers_that_are_there_are_not_replaced(files, capsys):
    evaluation.main([*files, "--output_dir", "out"])
    before = Path("out/answers.json").read_text()
    error = mistake(capsys, [*files, "--output_dir", "out", "--limit", "1"])
    assert "out is not empty" in error and Path("out/answers.json").read_text() == before


def test_a_bad_row_met_later_costs_no_answer(files, capsys):
    """A truncated JPEG opens, and fails when decoded. Without --skip_bad_rows the other answers are kept."""
    Image.effect_noise((60, 60), 50).convert("RGB").save("1.png", "JPEG")
    noise = Path("1.png").read_bytes()
    Path("1.png").write_bytes(noise[: len(noise) // 2])
    error = mistake(capsys, [*files, "--output_dir", "out"])
    assert "rows.jsonl, row 2" in error and "--skip_bad_rows" in error
    saved = json.loads(Path("out/answers.json").read_text())
    assert [answer["question"] for answer in saved["answers"]] == ["find 0", "find 2"]
    evaluation.main([*files, "--output_dir", "skipped", "--skip_bad_rows"])
    assert re.search(r"^bad rows +1$", capsys.readouterr().out, re.MULTILINE)
    assert json.loads(Path("skipped/answers.json").read_text())["answers"] == saved["answers"]


def test_control_characters_of_data_are_not_printed_raw(files, tmp_path, capsys):
    row = {"text": "a", "image": "\x1b]0;title\x07.png", "bbox": []}
    Path("rows.jsonl").write_text(json.dumps(row))
    assert "title" in mistake(capsys, files)
    Path("\x1b]0;title\x07.png").write_bytes(b"x")
    assert "title" in mistake(capsys, files)


def test_a_directory_that_cannot_be_written_is_found_before_the_answers(files, monkeypatch, capsys):
    Path("out").write_text("a file")
    monkeypatch.setattr(model, "load_pretrained", lambda *_: pytest.fail("weights were loaded"))
    assert "File exists: 'out" in mistake(capsys, [*files, "--output_dir", "out"])


def test_a_signal_keeps_the_answers_so_far(files, monkeypatch, capsys):
    """It comes while the second of three batches is answered; torchrun's 128 + number says why it ended."""
    answer, calls = evaluation.make_result, []

    def send_before(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(*args)

    monkeypatch.setattr(evaluation, "make_result", send_before)
    monkeypatch.setattr(evaluation, "received_signals", [])      # other tests receive none
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*files, "--output_dir", "out", "--eval_batch_size", "1"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert "eval.py: stopped by SIGTERM; 2 of 3 samples are answered" in capsys.readouterr().err
    assert json.loads(Path("out/answers.json").read_text())["metrics"]["samples"] == 2


def test_two_evaluations_in_one_directory(files, capsys):
    """The later one is refused while the first one lives, before it has written anything."""
    Path("out").mkdir()
    with open("out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in mistake(capsys, [*files, "--output_dir", "out"])


# ---- Flags and processes --------------------------------------------------------------------------------------------


def test_a_tasks_recipe_holds_where_a_flag_is_not_given():
    parse = lambda *arguments: evaluation.parse(evaluation.Settings, list(arguments), "eval.py")
    assert parse("--task", "math").max_completion_length == 1024
    assert parse("--task", "math", "--max_completion_length", "90").max_completion_length == 90
    gui = data.TASKS["gui"]
    assert parse("--task", "gui") == evaluation.Settings(task="gui", model=gui.model, image_size=840)
    assert parse().max_completion_length == DIGITS.recipe["max_completion_length"]


@dataclass
class Flags:
    """Flags of every kind."""

    task: str = evaluation.flag("math", "a task", choices=("math", "gui"))
    share: float = evaluation.flag(0.5, "a share", low=0, high=1)
    think: bool = evaluation.flag(True, "on by default")
    save: bool = evaluation.flag(False, "off by default")


@pytest.mark.parametrize("flags, expected", [
    ([], ("math", 0.5, True, False)), (["--no-think", "--save", "--share", "1"], ("math", 1.0, False, True)),
    (["--no-think", "--no-save"], ("math", 0.5, False, False)), (["--save", "no"], "no"),
    (["--share", "1.1"], "0 to 1"), (["--share", "nan"], "0 to 1"), (["--share", "inf"], "0 to 1"),
    (["--share", "-0.1"], "0 to 1"), (["--share", "half"], "half"), (["--sha", "1"], "--sha"), (["x"], "x")])
def test_flags_are_the_fields_of_a_dataclass(flags, expected, capsys, monkeypatch):
    if isinstance(expected, tuple):
        assert evaluation.parse(Flags, flags, "x.py") == Flags(*expected)
        return
    for rank, lines in (("0", 1), ("1", 0)):             # of several processes, the first one speaks
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            evaluation.parse(Flags, flags, "x.py")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == lines and (expected in error) == bool(lines)


@pytest.mark.parametrize("split, name", [("train", "data"), ("test", "eval_data"), ("validation", "eval_data")])
def test_the_training_split_is_that_of_the_training_data(split, name):
    """For grounding, both are data sets of their own."""
    settings = evaluation.parse(evaluation.Settings, ["--task", "grounding", "--split", split], "eval.py")
    assert settings.data == getattr(data.TASKS["grounding"], name)



@pytest.mark.parametrize("flags", [[], ["--task", "grounding"], ["--task", "math"]], ids=" ".join)
@pytest.mark.parametrize("program", [train, evaluation], ids=lambda program: program.__name__)
def test_help_shows_the_numbers_that_a_run_uses(program, flags, capsys):
    """Those of the task's recipe, where it has some: what is told in brackets at a flag's end."""
    with pytest.raises(SystemExit) as stop:
        program.main([*flags, "--help"])
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)
    shown = {}
    for entry in entries:
        found = re.match(r"--(\w+).*\((?:default: )?([\w.+-]+)\)\s*$", entry, re.DOTALL)
        if found:
            shown[found[1]] = found[2]
    assert stop.value.code == 0
    used = evaluation.parse(program.Settings, flags, "x.py")
    for name, value in vars(used).items():
        if not isinstance(value, str):
            assert shown[name] == str(value), name


@pytest.mark.parametrize("error, code", [
    (data.UserError("no such row"), 2), (model.CheckpointError("no such tensor"), 2), (OSError(28, "disk full"), 2),
    (ValueError("our own bug"), None), (SystemExit(143), 143)])
def test_mistakes_are_one_line_and_bugs_are_raised(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(type(error) if code is None else SystemExit) as stop:
        evaluation.run_program("x.py", fail)
    printed = capsys.readouterr().err
    assert code is None or stop.value.code == code
    assert printed == (f"x.py: {error}\n" if code == 2 else "")


def test_one_process_exchanges_nothing(monkeypatch):
    evaluation.start()
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: pytest.fail("exchanged"))
    assert evaluation.gather([1, 2]) == [1, 2] and evaluation.my_share("abc") == ["a", "b", "c"]
    assert evaluation.on_first_rank(divmod, 7, 2) == (3, 1) and evaluation.is_first()
    with pytest.raises(data.UserError, match="here"):
        evaluation.on_first_rank(data.require, False, "here")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    evaluation.write_text(tmp_path / "a.json", "whole")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError):
        evaluation.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "whole"


def exchange() -> tuple:
    """Runs on every rank."""
    evaluation.start()
    rank, world = evaluation.world()
    shares = evaluation.gather(evaluation.my_share("abcdefg"))
    uneven = evaluation.gather([rank] * rank)
    first = evaluation.on_first_rank(lambda: f"from {rank}")
    try:
        evaluation.on_first_rank(data.require, False, f"mistake of {rank}")
    except data.UserError as error:
        return shares, uneven, first, str(error), evaluation.is_first() == (rank == 0)


@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_exchange_comes_in_the_order_of_one_process(tmp_path, world):
    from processes import Ranks

    found = Ranks(world, tmp_path, "test_eval:exchange").values()
    uneven = {2: [1], 3: [1, 2, 2]}[world]
    assert found == [(list("abcdefg"), uneven, "from 0", "mistake of 0", True)] * world


def fail_on_one_rank(kind: str, directory: Path):
    """Runs on every rank: rank 1 fails, and the others wait for it in vain."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(directory / f"error{os.environ['RANK']}.json")

    def program():
        evaluation.start()
        if evaluation.world()[0] == 1:
            data.require(kind != "mistake", "only here")
            raise RuntimeError("our own bug")
        evaluation.gather(["waiting"])

    evaluation.run_program("x.py", program)


@pytest.mark.parametrize("kind, code, line", [("mistake", 2, "only here"), ("bug", 1, "our own bug")])
def test_a_failure_of_one_rank_ends_all_and_is_recorded_for_torchrun(tmp_path, kind, code, line):
    """torchrun shows what it finds in the file of the rank that failed first."""
    from processes import Ranks

    codes = Ranks(3, tmp_path, "test_eval:fail_on_one_rank", kind, tmp_path).wait(60)
    assert codes[1] == code and 0 not in codes
    assert line in json.loads((tmp_path / "error1.json").read_text())["message"]["message"]
