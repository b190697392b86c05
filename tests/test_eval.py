"""eval.py: its metrics against brute force, the way back to original pixels, the gallery, and the command line."""

import json
import re
import sys
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import model
from support import measures, report


def thing(*box):
    return {"bbox_2d": list(box), "point_2d": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}


def result(prediction, label, size=(40, 30), **fields):
    return {"id": "a", "where": "row 1", "question": "find it", "completion": "<think>here</think><answer>…</answer>",
            "prediction": prediction, "label": label, "size": list(size), "length": 10, "truncated": False,
            "thinking": True, "reward": {"format": 2.0, "total": 4.0}, "verdict": "right, IoU 1.00", **fields}


# ---- Metrics ---------------------------------------------------------------------------------------------------------

def brute_force(results) -> dict:
    """The box metrics by their definitions alone: masks of pixels, and every possible matching tried."""
    def mask(objects, size):
        picture = np.zeros((size[1], size[0]), bool)
        for found in objects or []:
            x1, y1, x2, y2 = (max(int(v), 0) for v in found.get("bbox_2d", [0] * 4))
            picture[y1:y2, x1:x2] = True
        return picture

    def box_iou(a, b):
        canvas = [mask([{"bbox_2d": [v + 50 for v in found.get("bbox_2d", [0] * 4)]}], (200, 200)) for found in (a, b)]
        union = (canvas[0] | canvas[1]).sum()
        return (canvas[0] & canvas[1]).sum() / union if union else 0

    accuracies, absents, ious, intersections, unions = [], [], [], 0, 0
    for r in results:
        predicted, label = r["prediction"], r["label"]
        a, b = mask(predicted, r["size"]), mask(label, r["size"])
        intersections, unions = intersections + (a & b).sum(), unions + (a | b).sum()
        if not label:
            absents.append(float(predicted == []))
            ious.append(absents[-1])
            continue
        few, many = sorted([predicted or [], label], key=len)
        best = max(sum(box_iou(x, y) > 0.5 for x, y in zip(few, order)) for order in permutations(many, len(few)))
        accuracies.append(best / len(many))
        ious.append((a & b).sum() / (a | b).sum())
    return {"accuracy": np.mean(accuracies), "gIoU": np.mean(ious), "cIoU": intersections / unions,
            "N-Acc": np.mean(absents)}


def test_metrics_equal_brute_force_on_pixels():
    """Whole-number boxes, many and overlapping, outside the image, inside out or missing: masks of pixels agree."""
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
            prediction.append({"bbox_2d": (np.array(found["bbox_2d"]) + rng.integers(-2, 3, 4)).tolist()})
        if n % 10 == 0:
            prediction.append({"bbox_2d": [20, 20, 5, 5]})
        if n % 15 == 0:
            prediction.append({"point_2d": [3, 3]})
        results.append(result(None if n % 7 == 0 else prediction[:4], label))
    expected, found = brute_force(results), evaluation.metrics(results)
    assert 0.05 < expected["accuracy"] < 0.6 and 0 < expected["N-Acc"] < 1     # the cases do tell metrics apart
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_metrics_by_hand():
    cat, dog, far = thing(0, 0, 10, 10), thing(20, 0, 30, 10), thing(0, 20, 10, 30)
    table = [    # prediction, label, accuracy or N-Acc, mask IoU
        ([cat], [cat], 1, 1),
        ([thing(0, 0, 10, 5)], [cat], 0, 0.5),                   # IoU of exactly 0.5 is not above it
        ([thing(0, 0, 10, 6)], [cat], 1, 0.6),
        ([cat, cat], [cat], 0.5, 1),                             # a box listed twice is not free
        ([cat], [cat, dog], 0.5, 0.5),
        ([dog, cat], [cat, dog], 1, 1),                          # in any order
        ([cat, far], [cat, dog], 0.5, 1 / 3),
        ([], [cat], 0, 0),
        ([{"point_2d": [5, 5]}], [cat], 0, 0),
        (None, [cat], 0, 0),
        ([], [], 1, 1),
        ([cat], [], 0, 0),
        (None, [], 0, 0),                                        # no answer is not the answer []
    ]
    for prediction, label, hit, iou in table:
        found = evaluation.metrics([result(prediction, label)])
        assert found["accuracy" if label else "N-Acc"] == pytest.approx(hit), (prediction, label)
        assert found["N-Acc" if label else "accuracy"] is None
        assert found["gIoU"] == pytest.approx(iou), (prediction, label)
    found = evaluation.metrics([result(prediction, label) for prediction, label, _, _ in table])
    assert found["accuracy"] == pytest.approx(sum(hit for _, label, hit, _ in table if label) / 10)
    assert found["N-Acc"] == pytest.approx(1 / 3)
    assert found["gIoU"] == pytest.approx(sum(iou for *_, iou in table) / 13)
    assert found["cIoU"] == pytest.approx((100 + 50 + 60 + 100 + 100 + 200 + 100) / (100 * 14 + 100))
    assert found["well_formed"] == pytest.approx(11 / 13) and found["samples"] == 13


def test_ciou_weighs_by_area_and_giou_does_not():
    results = [result([thing(0, 0, 30, 30)], [thing(0, 0, 30, 30)]), result([], [thing(0, 0, 10, 10)])]
    found = evaluation.metrics(results)
    assert found["gIoU"] == 0.5 and found["cIoU"] == pytest.approx(0.9)


def test_areas_are_exact_for_real_numbers_and_quick_for_large_images():
    a, b = np.array([[0.25, 0.5, 2.75, 3.0]]), np.array([[1.5, 1.25, 5.0, 2.0]])
    assert measures.areas(a, b) == pytest.approx((1.25 * 0.75, 2.5 * 2.5 + 3.5 * 0.75 - 1.25 * 0.75), abs=1e-12)
    rng, start = np.random.default_rng(0), time.perf_counter()
    many = [{"bbox_2d": np.sort(rng.uniform(0, 1e4, (2, 2)), axis=0).ravel().tolist()} for _ in range(120)]
    whole = [{"bbox_2d": [-1e5, -1e5, 1e5, 1e5]}]
    *_, intersection, union = evaluation.compare(result(whole, many, (10_000, 10_000)))
    assert union == 1e8 and 0 < intersection < 1e8
    assert time.perf_counter() - start < 1


def task_metrics(task, results):
    return evaluation.metrics(results, data.TASKS[task])


def test_roc_auc_counts_pairs():
    """Brute force over all pairs, with many ties, and the answers of an anomaly detector."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores, positive = rng.integers(0, rng.integers(1, 6) + 1, 20) / 4, rng.random(20) < 0.4
        pairs = [(a, b) for a, p in zip(scores, positive) if p for b, q in zip(scores, positive) if not q]
        expected = np.mean([(a > b) + (a == b) / 2 for a, b in pairs]) if pairs else None
        assert evaluation.roc_auc(scores, positive) == (expected if expected is None else pytest.approx(expected))
    box = [thing(0, 0, 10, 10)]
    results = [result(*pair) for pair in ((box, box), ([], box), (box, box), (None, box), ([], []), (box, []), (None, []))]
    found = task_metrics("anomaly", results)
    assert found["anomaly_acc"] == pytest.approx(3 / 7)
    says = [1, 0, 1, 0, 0, 1, 1]                                  # no answer is as wrong as can be
    pairs = [(a > b) + (a == b) / 2 for a in says[:4] for b in says[4:]]
    assert found["ROC-AUC"] == pytest.approx(np.mean(pairs))
    assert task_metrics("anomaly", results[:4])["ROC-AUC"] is None


def test_counts_against_plain_sums():
    rng, results, errors, right = np.random.default_rng(0), [], [], []
    for n in range(200):
        label, predicted = rng.integers(0, 9, 2).tolist()
        answer = [[thing(0, 0, 9, 9)] * predicted, str(predicted), None][n % 3]
        truth = [[thing(0, 0, 9, 9)] * label, str(label)][n // 3 % 2]
        results.append(result(answer, truth))
        errors.append((0 if answer is None else predicted) - label)
        right.append(answer is not None and predicted == label)
    found = task_metrics("counting", results)
    assert found["MAE"] == pytest.approx(sum(abs(e) for e in errors) / 200)
    assert found["RMSE"] == pytest.approx((sum(e * e for e in errors) / 200) ** 0.5)
    assert found["count_acc"] == sum(right) / 200 and 0 < sum(right) < 60
    assert all(value is None for name, value in task_metrics("counting", []).items() if name != "samples")


def test_a_click_counts_where_it_lands():
    box, two = [{"bbox_2d": [10, 20, 30, 40]}], [{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [50, 50, 60, 60]}]
    for predicted, label, expected in (
            ([{"point_2d": [15, 25]}], box, 1), ([{"point_2d": [10, 40]}], box, 1), ([{"point_2d": [9.9, 30]}], box, 0),
            ([{"point_2d": [30, 15]}], box, 0), ([{"point_2d": [25, 15]}], box, 0),      # x and y are not the same
            ([{"bbox_2d": [0, 0, 40, 60]}], box, 1), ([{"bbox_2d": [0, 0, 10, 10]}], box, 0),     # its centre
            ([{"bbox_2d": [0, 0, 40, 60], "point_2d": [1, 1]}], box, 0),
            ([{"point_2d": [55, 55]}], two, 1), ([{"point_2d": [1, 1]}, {"point_2d": [15, 25]}], two, 0),
            ([{}], box, 0), ([], box, 0), (None, box, 0), ([{"point_2d": [1, 1]}], [{"point_2d": [1, 1]}], None)):
        assert task_metrics("gui", [result(predicted, label)])["point_in_box"] == expected, (predicted, label)


def test_labels_of_points_alone_say_nothing_about_boxes():
    found = task_metrics("gui", [result([thing(0, 0, 9, 9)], [{"point_2d": [3, 3]}])])
    assert found["accuracy"] is found["gIoU"] is found["point_in_box"] is None


def test_math_accuracy_and_measured_masks():
    results = [result("0.5", r"\boxed{\frac{1}{2}}"), result("7", r"\boxed{8}"), result(None, r"\boxed{8}")]
    assert task_metrics("math", results)["accuracy"] == pytest.approx(1 / 3)
    box = [thing(0, 0, 10, 10)]
    found = evaluation.metrics([result(box, box, overlap=[30.0, 120.0]), result(box, box)])
    assert found["gIoU"] == (0.25 + 1) / 2 and found["cIoU"] == 130 / 220


def test_nothing_to_measure_is_none_and_printed_as_a_dash():
    found = evaluation.metrics([])
    assert found.pop("samples") == 0 and all(value is None for value in found.values())
    table = report.format_table(evaluation.metrics([result([thing(0, 0, 9, 9)], [thing(0, 0, 9, 9)])]))
    rows = dict(line.split() for line in table.splitlines())
    assert rows == {"accuracy": "100.0%", "gIoU": "100.0%", "cIoU": "100.0%", "N-Acc": "-", "well_formed": "100.0%",
                    "thinking": "100.0%", "truncated": "0.0%", "length": "10.0", "reward": "4.00", "samples": "1"}
    assert len({len(line) for line in table.splitlines()}) == 1


def test_general_metrics_are_means():
    results = [result([], [], length=10, truncated=True), result([], [], length=13, thinking=False),
               result(None, [], reward={"total": 1.0}), result(None, [], thinking=False)]
    found = evaluation.metrics(results)
    assert [found[name] for name in ("well_formed", "thinking", "truncated", "length", "reward")] == [
        0.5, 0.5, 0.25, 43 / 4, 13 / 4]


# ---- From a model's answer to original pixels ------------------------------------------------------------------------

class Letters:
    """A tokenizer with a token for every character, enough for data.Processor."""

    special = ["<|image_pad|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.special)}

    def encode(self, text, add_special_tokens=False):
        pieces = re.findall("|".join(map(re.escape, self.special)) + "|.", text, re.DOTALL)
        return [self.special.index(piece) if piece in self.special else 100 + ord(piece) for piece in pieces]

    def decode(self, ids, **_):
        return "".join(self.special[i] if i < 100 else chr(i - 100) for i in ids)


def make_processor(coordinates="pixels"):
    images = {"patch_size": 6, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 48 * 48, "max_pixels": 96 * 96,
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return data.Processor(Letters(), {"model_type": "qwen2_vl", "coordinates": coordinates}, images)


def make_sample(name="a", stored=(90, 60), objects=None, **fields):
    objects = [thing(9, 6, 45, 54), thing(50, 10, 88, 30)] if objects is None else objects
    return data.Sample(name, f"find {name}", Image.new("RGB", stored, "grey"), objects, where=f"row {name}", **fields)


def speak(monkeypatch, say, finished=True):
    """Let the network answer with the text say(example); returns the list of the batches it was asked."""
    batches = []

    def generate(network, examples, num_generations, max_new_tokens, temperature):
        assert num_generations == 1 and temperature == 0
        batches.append(examples)
        tokens = [Letters().encode(say(example) + "<|im_end|>" * finished) for example in examples]
        return [[model.Completion(torch.tensor(ids), torch.zeros(len(ids)), finished)] for ids in tokens]

    monkeypatch.setattr(model, "generate", generate)
    return batches


DIGITS = data.TASKS["digits"]
SAYS_LABEL = lambda example: f"<think>I see</think><answer>{json.dumps(example.objects)}</answer>"


@pytest.mark.parametrize("coordinates", ["pixels", "relative"])
@pytest.mark.parametrize("encoding", [{"image_size": (48, 48)}, {"image_size": (96, 24)}, {"max_pixels": 48 * 96}])
@pytest.mark.parametrize("fields", [{}, {"size": (1800, 800)}, {"frame": (840, 840)}])
def test_the_label_as_answer_is_right_in_original_pixels(monkeypatch, coordinates, encoding, fields):
    """Whatever the model's size, its coordinates, the stored image and the label's frame; within their rounding."""
    frame = fields.get("frame", (90, 60))
    objects = data.move_objects(make_sample().objects, (90, 60), frame)
    speak(monkeypatch, SAYS_LABEL)
    [found] = evaluation.evaluate(None, make_processor(coordinates), DIGITS, [make_sample(objects=objects, **fields)],
                                  progress=False, **encoding)
    size = fields.get("size", (90, 60))
    assert found["size"] == list(size)
    assert np.allclose(found["label"][0]["bbox_2d"], [0.1 * size[0], 0.1 * size[1], 0.5 * size[0], 0.9 * size[1]])
    score = evaluation.metrics([found])
    assert score["accuracy"] == 1 and score["gIoU"] > 0.8
    assert found["reward"] == {"thinking": 1, "format": 2, "accuracy": 3, "non_repeat": 1, "total": 7}


@pytest.mark.parametrize("coordinates", ["pixels", "relative"])
def test_an_answer_in_another_frame_is_wrong(monkeypatch, coordinates):
    """Coordinates of the original image, or of the other convention, are not what this model is asked for."""
    other = (96, 60) if coordinates == "relative" else (1000, 1000)
    for frame in (other, (450, 300)):
        moved = data.move_objects(make_sample().objects, (90, 60), frame)
        speak(monkeypatch, lambda example: f"<answer>{json.dumps(moved)}</answer>")
        found = evaluation.evaluate(None, make_processor(coordinates), DIGITS, [make_sample()], image_size=(96, 60))
        assert evaluation.metrics(found)["accuracy"] == 0
        assert found[0]["reward"]["accuracy"] == 0


def test_reward_is_counted_in_the_models_frame(monkeypatch):
    """5 of its 48 pixels beside the label: IoU 0.58 is enough, box and point are too far off. 5 of 900 were close."""
    speak(monkeypatch, lambda example: f"<answer>{json.dumps([thing(10, 5, 29, 43)])}</answer>")
    sample = make_sample(objects=[thing(9, 6, 45, 54)], size=(900, 600))               # [5, 5, 24, 43] for the model
    [found] = evaluation.evaluate(None, make_processor(), DIGITS, [sample], image_size=(48, 48))
    assert found["reward"]["accuracy"] == 1 and evaluation.metrics([found])["accuracy"] == 1


def test_results_say_what_happened(monkeypatch):
    speak(monkeypatch, SAYS_LABEL)
    [found] = evaluation.evaluate(None, make_processor(), DIGITS, [make_sample(objects=[])])
    text = "<think>I see</think><answer>[]</answer>"
    assert found == {
        "id": "a", "where": "row a", "question": "find a", "completion": text, "prediction": [], "label": [],
        "size": [90, 60], "length": len(text) + 1, "truncated": False, "thinking": True,
        "reward": {"thinking": 1, "format": 2, "accuracy": 3, "non_repeat": 1, "total": 7},
        "verdict": "right, nothing to find"}
    speak(monkeypatch, lambda example: "<think>I see, and I go on", finished=False)
    [found] = evaluation.evaluate(None, make_processor(), DIGITS, [make_sample()], think=False)
    assert found["prediction"] is None and found["truncated"] and not found["thinking"]
    assert "thinking" not in found["reward"] and found["length"] == len("<think>I see, and I go on")
    json.dumps(found, allow_nan=False)


def test_order_is_restored_and_images_are_opened_a_batch_at_a_time(monkeypatch):
    sizes = [(24, 24), (96, 96), (48, 24), (96, 48), (24, 48), (72, 72), (96, 96)]
    samples = [make_sample(str(n), size, objects=[]) for n, size in enumerate(sizes)]
    processor, opened = make_processor(), []
    encode = processor.encode
    processor.encode = lambda sample, *rest, **settings: opened.append(sample) or encode(sample, *rest, **settings)
    seen = []
    batches = speak(monkeypatch, lambda example: seen.append(len(opened)) or f"I am {example.sample.id}")
    found = evaluation.evaluate(None, processor, DIGITS, samples, batch_size=3, min_pixels=24 * 24)
    assert [r["completion"] for r in found] == [f"I am {n}" for n in range(7)]
    assert [r["id"] for r in found] == [sample.id for sample in samples]
    assert [len(batch) for batch in batches] == [3, 3, 1] and seen == [3, 3, 3, 6, 6, 6, 7]
    lengths = [len(example.ids) for batch in batches for example in batch]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2      # alike, and the largest first


# ---- The gallery -----------------------------------------------------------------------------------------------------

def gallery_of(tmp_path, results, samples, **settings):
    report.gallery(results, samples, tmp_path / "g.png", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]                 # nothing half-written stays behind
    return Image.open(tmp_path / "g.png").convert("RGB")


@pytest.mark.parametrize("count, rows", [(0, 0), (2, 1), (5, 2), (40, 3)])
def test_gallery_has_the_size_of_its_tiles_and_is_always_the_same(tmp_path, count, rows):
    box = [thing(9, 6, 45, 54)]
    odd = [None, [], box, [{"point_2d": [500, -9]}], [{"bbox_2d": [50, 50, 9, 9]}, *box]]
    results = [result(odd[n % 5], box if n % 2 else [], (90, 60), completion="word" * 300) for n in range(count)]
    samples = [make_sample() for _ in results]
    picture = gallery_of(tmp_path, results, samples)
    tile, gap = report.TILE, report.GAP
    assert picture.size == (gap + 4 * (tile + gap), 2 * gap + rows * (tile + report.TEXT + gap))
    assert picture.tobytes() == gallery_of(tmp_path, results, samples).tobytes()


def test_gallery_draws_label_and_prediction_where_they_are(tmp_path):
    """A square image of 30x30 pixels, shown at 300: edges at ten times their coordinates, below the other tile's."""
    samples = [make_sample(stored=(15, 15)), make_sample(stored=(30, 30))]     # stored smaller than the original
    results = [result([thing(15, 15, 25, 25)], [thing(5, 5, 25, 25)], (30, 30)), result([], [], (30, 30))]
    picture = gallery_of(tmp_path, results, samples, columns=1)
    x, y = report.GAP, 2 * report.GAP
    label, prediction = (0, 153, 92), (230, 92, 0)
    assert picture.getpixel((x + 50, y + 100)) == label and picture.getpixel((x + 100, y + 50)) == label
    assert picture.getpixel((x + 150, y + 200 + 20)) == prediction
    assert picture.getpixel((x + 200, y + 200)) == prediction                      # its point, at the box's centre
    assert picture.getpixel((x + 100, y + 100)) == (128, 128, 128)
    below = y + report.TILE + report.TEXT + report.GAP
    colours = picture.crop((x, below, x + 300, below + 300)).getcolors()
    assert colours == [(90000, (128, 128, 128))]                                   # [] draws nothing: best comes last


def test_a_gallery_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    def save(image, file, *rest, **settings):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "g.png").write_bytes(b"whole")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="disk full"):
        report.gallery([], [], tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes() == b"whole"


def test_gallery_shows_wrong_and_right_answers(tmp_path, monkeypatch):
    box, shown = [thing(9, 6, 45, 54)], []
    results = [result(box if n != 33 else [], box, (90, 60), id=n) for n in range(100)]
    monkeypatch.setattr(report, "draw_tile", lambda r, image: shown.append(r["id"]) or Image.new("RGB", (9, 9)))
    gallery_of(tmp_path, results, [make_sample()] * 100, count=6)
    assert shown[0] == 33 and len(set(shown)) == 6 and shown[1:] == sorted(shown[1:]) and shown[-1] == 99


# ---- The command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, complaint", [
    (["--task", "chess"], "chess"),
    (["--split", "tset"], "tset"),
    (["--data", "no/such/file.jsonl"], "no/such/file.jsonl"),
    (["--model", "/no/such/checkpoint"], "/no/such/checkpoint"),
    (["--model", "EMPTY"], "config.json"),
    (["--batch_size", "0"], "--batch_size"),
    (["--image_size", "48", "48", "48"], "--image_size"),
    (["--unknown"], "--unknown"),
])
def test_a_users_mistake_is_one_line_before_anything_is_loaded(flags, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "load_pretrained", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "empty") if flag == "EMPTY" else flag for flag in flags] + ["--limit", "2"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("eval.py: ") and complaint in error
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A working directory, and a checkpoint whose processor and weights are stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "fetch", lambda name, kind: Path(name))
    monkeypatch.setattr(data.Processor, "from_pretrained", lambda path: make_processor("relative"))
    monkeypatch.setattr(model, "load_pretrained", lambda *_: None)
    return "runs/mine/checkpoint-7"


def test_unusable_weights_are_one_line(checkpoint, monkeypatch, capsys):
    def load(*_):
        raise model.CheckpointError("runs/mine: lacks a tensor")

    monkeypatch.setattr(model, "load_pretrained", load)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--limit", "2", "--model", checkpoint])
    assert stop.value.code == 2 and capsys.readouterr().err == "eval.py: runs/mine: lacks a tensor\n"


def test_command_line_writes_answers_and_gallery_and_prints_the_table(checkpoint, tmp_path, monkeypatch, capsys):
    speak(monkeypatch, SAYS_LABEL)
    evaluation.main(["--limit", "5", "--model", checkpoint, "--image_size", "96", "--no-think"])
    printed, directory = capsys.readouterr().out, tmp_path / "runs" / "eval-digits-mine-checkpoint-7"
    assert sorted(path.name for path in directory.iterdir()) == ["answers.json", "gallery.png"]
    saved = json.loads((directory / "answers.json").read_text())
    assert saved["metrics"]["accuracy"] == 1 and saved["metrics"]["samples"] == len(saved["answers"]) == 5
    assert saved["settings"]["image_size"] == [96] and saved["settings"]["data"] == "builtin"
    assert saved["settings"]["max_completion_length"] == data.TASKS["digits"].recipe["max_completion_length"]
    assert saved["settings"]["think"] is False
    assert report.format_table(saved["metrics"]) in printed
    assert "answers.json" in printed and "gallery.png" in printed
