"""Every task from files to metrics: each layout, convention of coordinates and image size; and tiny whole runs.

The files are made here, in the columns that people's data have, so these tests need nothing from outside.
"""

import copy
import dataclasses
import functools
import io
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw
from test_eval import save_processor, speak

import data
import eval as evaluation
import rewards
import train
import visurf

TINY = ROOT / "assets" / "tiny-qwen2-vl"
TASKS = ("grounding", "gui", "anomaly", "medical", "counting", "math", "digits")
LAYOUTS = ("json lines", "parquet", "save_to_disk")
CONVENTIONS = {"qwen2_vl": ("relative", 14), "qwen2_5_vl": ("pixels", 14), "qwen3_vl": ("relative", 16)}
SIZES = [{"image_size": 60}, {"image_size": 120}, {"image_size": 128, "keep_shape": True}]
A, B = [9, 6, 45, 54], [50, 10, 88, 30]                  # boxes in the stored image of 90 x 60


def scaled(box, x, y):
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def make_rows(task: str, split: str) -> list[dict]:
    """Rows with each kind of label that a task takes. Training labels are in pixels of the stored image, 90 x 60, test
    labels in those of the original, 180 x 240. Images are Pillow images."""
    image, test = Image.new("RGB", (90, 60), "grey"), split == "test"
    for box in (A, B):
        ImageDraw.Draw(image).rectangle(box, "white")
    base = {"text" if test else "problem": "the white part", "image": image, "img_width": 180, "img_height": 240}

    def solution(*objects):
        return base | {"solution": json.dumps(objects)}

    def bbox(*boxes):
        return base | {"bbox": [scaled(box, 2, 4) for box in boxes]}

    with_point, without = {"bbox_2d": A, "point_2d": [20, 30]}, {"bbox_2d": B}
    boxes = [bbox(A, B), bbox(A), bbox()] if test else [solution(with_point, without), solution(without), solution()]
    return {
        "grounding": boxes, "anomaly": boxes, "medical": boxes, "digits": boxes,
        "gui": boxes[1:2] if test else boxes[:2],
        "counting": [base | {"count": 2}, base | {"count": 0}] if test else [*boxes, base | {"answer": "2"}],
        "math": [base | {"answer": "24", "choices": ["12", "24"]}, base | {"answer": r"\frac{1}{2}", "choices": None}],
    }[task]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(rows: list[dict], layout: str, folder: Path, split: str = "train") -> Path:
    """The rows in a layout; returns what to give as --data."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "json lines":
        lines = []
        for i, row in enumerate(rows):
            line = dict(row)
            for name, cell in row.items():
                if isinstance(cell, Image.Image):
                    cell.save(folder / f"{i}-{name}.png")
                    line[name] = f"{i}-{name}.png"
            lines.append(json.dumps(line))
        (folder / "rows.jsonl").write_text("\n".join(lines))
        return folder / "rows.jsonl"
    datasets = pytest.importorskip("datasets")
    names = dict.fromkeys(name for row in rows for name in row)
    cells = [{name: row.get(name) for name in names} for row in rows]
    for row in cells:
        row.update({name: {"bytes": png(cell), "path": None} for name, cell in row.items()
                    if isinstance(cell, Image.Image)})
    table = datasets.Dataset.from_list(cells)
    table = table.cast_column("image", datasets.Image())
    if layout == "parquet":
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict({split: table}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """load(task, split, layout) -> samples, read from files that are written once."""
    made, root = {}, tmp_path_factory.mktemp("layouts")

    def get(task, split="test", layout="json lines"):
        if (task, split, layout) not in made:
            source = write(make_rows(task, split), layout, root / f"{task}-{split}-{layout}", split)
            made[task, split, layout] = data.load_samples(source, data.TASKS[task], split)
        return made[task, split, layout]

    return get


@pytest.fixture(scope="session")
def processor_of(tmp_path_factory):
    """processor_of(family, task, image_size, keep_shape): what a checkpoint of the family makes of the task."""
    root = tmp_path_factory.mktemp("families")
    folders = {family: save_processor(root / family, family, patch) for family, (_, patch) in CONVENTIONS.items()}

    @functools.lru_cache(maxsize=None)
    def get(family, task, image_size=None, keep_shape=False):
        task = data.TASKS[task]
        task = dataclasses.replace(task, keep_shape=keep_shape or task.keep_shape)
        return data.Processor(folders[family], task, image_size)

    return get


@pytest.fixture(scope="session")
def real_processor():
    """With Qwen2-VL's own vocabulary; for the task of grounding."""
    shared = ROOT.parent / "shared" / "data" / "qwen2_vl"
    if not shared.exists():
        pytest.skip("../shared/data is not here")
    return data.Processor(shared, data.TASKS["grounding"], image_size=56)


def answer(monkeypatch, processor, samples, say):
    """The metrics and results of a network that says say(example)."""
    speak(monkeypatch, processor, say)
    results, bad_rows = evaluation.evaluate(None, processor, samples)
    assert not bad_rows
    return evaluation.metrics(results, processor.task), results


# ---- From labels to answers and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONVENTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_a_network_that_answers_the_label_is_right(monkeypatch, load, processor_of, task, split, layout, family):
    """In original pixels, whatever the file, its frame, the network's coordinates and the size of its image."""
    for size in SIZES:
        processor = processor_of(family, task, **size)
        say = lambda example: f"<think>I see</think> {visurf.align_label(example.label, 'spaced')}"
        found, results = answer(monkeypatch, processor, load(task, split, layout), say)
        assert tuple(found)[:len(processor.task.metrics)] == processor.task.metrics
        for name in processor.task.metrics:
            if name in ("gIoU", "cIoU"):                 # of rounded boxes
                assert found[name] > 0.85
            elif found[name] is not None:
                assert found[name] == (0 if name == "MAE" else 1), name
        assert found["well_formed"] == found["thinking"] == 1 and found["reward"] == (3 if task == "math" else 7)
        if task not in ("counting", "math"):             # the labels themselves, too
            assert results[0]["size"] == [180, 240]
            boxes = [found["bbox_2d"] for found in results[0]["label"]]
            assert boxes == [scaled(A, 2, 4), scaled(B, 2, 4)][:len(boxes)]


@pytest.mark.parametrize("family", CONVENTIONS)
@pytest.mark.parametrize("task", ["grounding", "gui", "anomaly", "medical", "digits"])
def test_a_network_that_answers_in_another_frame_is_wrong(monkeypatch, load, processor_of, task, family):
    """In the other convention, or in pixels of the original, however right it is there."""
    relative = CONVENTIONS[family][0] == "relative"
    for other in ((60, 60) if relative else (1000, 1000), (1800, 2400)):
        processor = processor_of(family, task, image_size=60)
        say = lambda example: visurf.align_label(data.move_objects(example.label, example.frame, other, True), "compact")
        samples = [sample for sample in load(task, "test") if sample.label]
        found, _ = answer(monkeypatch, processor, samples, say)
        assert found["accuracy"] == 0 and found["reward"] < 6
        assert found.get("point_in_box", 0) == 0


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_and_none_are_wrong(monkeypatch, load, processor_of, task):
    processor = processor_of("qwen2_vl", task, image_size=60)
    wrong = {"counting": "<answer>77</answer>", "math": "<answer>77</answer>"}
    wrong = wrong.get(task, '<answer>[{"bbox_2d": [0, 0, 2, 2], "point_2d": [1, 1]}]</answer>')
    main = processor.task.metrics[0]
    found, _ = answer(monkeypatch, processor, load(task), lambda example: wrong)
    # a box anywhere says that something is defective, which is true of two samples in three
    assert found[main] == (2 / 3 if task == "anomaly" else 0) and found["well_formed"] == 1
    found, results = answer(monkeypatch, processor, load(task), lambda example: "?")
    assert found[main] == found["well_formed"] == 0
    json.dumps(results, allow_nan=False)


def test_a_choice_is_right_by_its_letter_and_by_its_words(monkeypatch, load, processor_of):
    processor = processor_of("qwen2_vl", "math")
    for said, expected in (("B", 1), ("24", 1), (r"\boxed{24}", 1), ("A", 0), ("12", 0)):
        found, _ = answer(monkeypatch, processor, load("math")[:1], lambda example: f"<answer>{said}</answer>")
        assert found["accuracy"] == expected, said


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_asks_in_its_own_words_and_its_example_can_be_read(processor_of, task):
    sample = data.Sample("", "a {strange} question", Image.new("RGB", (90, 60)), [], (90, 60), (90, 60))
    processor = processor_of("qwen2_5_vl", task, image_size=840)
    text = processor.tokenizer.decode(processor.encode(sample).ids)
    assert "a {strange} question" in text
    if task != "digits":                                 # its network knows a hundred words
        assert "<think>" in text
        [example] = re.findall("<answer>[^ ].*</answer>", text)
        found = rewards.read_answer(example, data.TASKS[task].kind)
        assert found == r"\frac{3}{4}" if task == "math" else found[0]["point_2d"] == [310, 352]
        assert task == "math" or "840 at the right" in text and "840 at the bottom" in text


@pytest.mark.parametrize("task", TASKS)
def test_labels_survive_the_real_tokenizer(load, real_processor, task):
    """Label -> text in every style -> tokens -> text -> answer, with Qwen2-VL's own vocabulary."""
    processor = copy.copy(real_processor)
    processor.task = data.TASKS[task]
    for sample in load(task, "train"):
        example = processor.encode(sample)
        for style in visurf.STYLES:
            text = visurf.align_label(example.label, style)
            assert processor.decode(processor.token_ids(text + data.END)) == text
            assert rewards.read_answer(text, data.TASKS[task].kind) == example.label
        assert sample.question in processor.tokenizer.decode(example.ids)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, layout", [
    ("grounding", "parquet"), ("gui", "json lines"), ("anomaly", "save_to_disk"), ("medical", "json lines"),
    ("counting", "json lines"), ("math", "parquet")])
def test_train_and_evaluate_from_files(tmp_path, capsys, task, layout):
    files = {split: str(write(make_rows(task, split), layout, tmp_path / split, split)) for split in ("train", "test")}
    common = ["--task", task, "--image_size", "48", "--max_completion_length", "200"]
    train.main([*common, "--model", str(TINY), "--data", files["train"], "--max_steps", "2", "--batch_size", "2",
                "--num_generations", "2", "--micro_batch_size", "2", "--output_dir", str(tmp_path / "run")])
    evaluation.main([*common, "--model", str(tmp_path / "run" / "checkpoint-2"), "--data", files["test"],
                     "--output_dir", str(tmp_path / "eval")])
    assert all(name in capsys.readouterr().out for name in data.TASKS[task].metrics[:1])
    saved = json.loads((tmp_path / "eval" / "answers.json").read_text())
    assert set(data.TASKS[task].metrics) <= set(saved["metrics"])
    assert len(saved["answers"]) == len(make_rows(task, "test"))
