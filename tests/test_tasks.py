"""Every task from files to metrics: each layout, coordinate convention and image size; tiny runs; masks through SAM 2.

The files are made here, in the columns that people's data have, so these tests need nothing from outside.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from test_eval import make_processor, speak

import data
import eval as evaluation
import rewards
import train
from support import masks, sources
from support.tasks import Task

TINY = ROOT / "assets" / "tiny-qwen2-vl"
SIX = ("grounding", "gui", "anomaly", "medical", "counting", "math")
LAYOUTS = ("json lines", "json list", "parquet", "save_to_disk")
A, B = [9, 6, 45, 54], [50, 10, 88, 30]                  # boxes in the stored image of 90 x 60


def scaled(box, x, y):
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def make_rows(task: str, split: str) -> list[dict]:
    """Rows with each kind of label that a task takes. Training labels are in pixels of the stored image, 90 x 60, test
    labels in those of the original, 180 x 240. Images and masks are Pillow images."""
    image, test = Image.new("RGB", (90, 60), "grey"), split == "test"
    for box in (A, B):
        ImageDraw.Draw(image).rectangle(box, "white")
    base = {"text" if test else "problem": "the white part", "image": image, "img_width": 180, "img_height": 240}
    solution = lambda *objects: base | {"solution": json.dumps(objects)}
    bbox = lambda *boxes: base | {"bbox": [scaled(box, 2, 4) for box in boxes]}
    with_point, without = {"bbox_2d": A, "point_2d": [20, 30]}, {"bbox_2d": B}
    boxes = [bbox(A, B), bbox(A), bbox()] if test else [solution(with_point, without), solution(without), solution()]
    mask = Image.new("L", (90, 120))                     # half the original's size: a mask has its own frame
    ImageDraw.Draw(mask).ellipse([9, 12, 44, 107], 255)
    return {
        "grounding": boxes, "anomaly": boxes,
        "gui": boxes[1:2] if test else [*boxes[:2], solution({"point_2d": [20, 30]})],
        "medical": [base | {"mask": mask}, boxes[1]],
        "counting": [base | {"count": 2}, base | {"count": 0}] if test else [*boxes, base | {"answer": "2"}],
        "math": [base | {"answer": "24", "choices": ["12", "24"]}, base | {"answer": r"\frac{1}{2}", "choices": None}],
    }[task]


def write(rows: list[dict], layout: str, folder: Path, split: str = "train") -> Path:
    """The rows in a layout; returns what to give as --data."""
    def png(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    folder.mkdir(parents=True, exist_ok=True)
    if layout.startswith("json"):
        named = []
        for i, row in enumerate(rows):
            pictures = {name: cell for name, cell in row.items() if isinstance(cell, Image.Image)}
            for name, picture in pictures.items():
                picture.save(folder / f"{i}-{name}.png")
            named.append(row | {name: f"{i}-{name}.png" for name in pictures})
        file = folder / ("rows.jsonl" if layout == "json lines" else "rows.json")
        lines = [json.dumps(row) for row in named]
        file.write_text("\n".join(lines) if layout == "json lines" else "[" + ",\n".join(lines) + "]")
        return file
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cell = lambda value: {"bytes": png(value), "path": None} if isinstance(value, Image.Image) else value
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.Table.from_pylist([{name: cell(row.get(name)) for name in names} for row in rows])
    if layout == "parquet":
        (folder / "data").mkdir()
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=2)
        return folder
    (folder / split).mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    (folder / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    with pyarrow.OSFile(str(folder / split / "data-0.arrow"), "wb") as sink, \
            pyarrow.ipc.new_stream(sink, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=2):
            stream.write_batch(batch)
    return folder


def load(tmp_path, task, split="train", layout="json lines", rows=None):
    source = write(rows or make_rows(task, split), layout, tmp_path / layout / split, split)
    return data.load_samples(source, data.TASKS[task], split)


# ---- Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", SIX)
def test_all_layouts_give_the_same_samples(tmp_path, task, split):
    def content(samples):
        return [(s.question, s.objects, s.frame and tuple(s.frame), s.size, s.solution,
                 data.open_image(s.image).tobytes(), s.mask is not None and masks.read_mask(s.mask).tobytes())
                for s in samples]

    first, *others = [content(load(tmp_path, task, split, layout)) for layout in LAYOUTS]
    assert len(first) == len(make_rows(task, split)) and all(other == first for other in others)


def test_the_authors_own_files_in_both_layouts():
    """The folders that `datasets` wrote: Parquet shards and save_to_disk hold the same rows."""
    shared = ROOT.parent / "shared" / "data" / "parquet"
    if not shared.exists():
        pytest.skip("../shared/data is not here")
    pytest.importorskip("pyarrow")
    for split in ("train", "test"):
        ours, theirs = (data.load_samples(shared / name, data.GROUNDING, split) for name in (split, f"{split}_disk"))
        assert [(s.id, s.question, s.objects, s.size) for s in ours] == [
            (s.id, s.question, s.objects, s.size) for s in theirs]
        assert [data.open_image(s.image).tobytes() for s in ours] == [data.open_image(s.image).tobytes() for s in theirs]
    [test] = theirs
    truth = masks.read_mask(test.mask)
    assert truth.shape == (643, 960)                     # drawn by hand, like the box: they agree by some pixels
    assert np.abs(np.subtract(masks.mask_objects(truth)[0]["bbox_2d"], test.objects[0]["bbox_2d"])).max() < 8
    [question] = data.load_samples(shared / "math", data.TASKS["math"], "test")
    assert question.question == "How many coins?\nChoices: 12, 24, 36" and question.objects == r"\boxed{24}"
    with pytest.raises(data.DataError, match="has no split 'test', but 'train'"):
        data.load_samples(shared / "train_disk", data.GROUNDING, "test")


def test_damaged_files_end_in_one_line(tmp_path):
    """Cut short, with bytes changed in the middle, or naming files that are not there."""
    pytest.importorskip("pyarrow")
    rows = make_rows("grounding", "train") * 20
    for layout, name in (("parquet", "data/train-00000-of-00001.parquet"), ("save_to_disk", "train/data-0.arrow")):
        folder = write(rows, layout, tmp_path / layout)
        whole = (folder / name).read_bytes()
        for damage in (whole[:len(whole) // 2], b"", whole[:40] + bytes(len(whole) // 2) + whole[len(whole) // 2 + 40:]):
            (folder / name).write_bytes(damage)
            sources._open.cache_clear()
            sources._large_column.cache_clear()
            with pytest.raises(data.DataError) as error:
                data.load_samples(folder, data.GROUNDING)
            assert Path(name).name in str(error.value) and "\n" not in str(error.value)
        (folder / name).unlink()
        with pytest.raises(data.DataError):
            data.load_samples(folder, data.GROUNDING)
    (folder / "data-0.arrow").write_bytes(b"somebody else's")
    (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "../data-0.arrow"}]}')
    with pytest.raises(data.DataError, match="train/data-0.arrow"):
        data.load_samples(folder, data.GROUNDING)
    (folder / "train" / "state.json").write_text('{"_data_files": [')
    with pytest.raises(data.DataError, match="state.json: not JSON"):
        data.load_samples(folder, data.GROUNDING)
    (tmp_path / "a.json").write_text('[{"image": 3}, ')
    with pytest.raises(data.DataError, match="a.json: not JSON"):
        data.load_samples(tmp_path / "a.json", data.GROUNDING)
    (tmp_path / "a.json").write_text("[null]")
    with pytest.raises(data.DataError, match="a.json, row 1: not a JSON object"):
        data.load_samples(tmp_path / "a.json", data.GROUNDING)


@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_images_of_large_files_stay_on_disk(tmp_path, layout):
    """12 MB of noise in row groups of 2 rows, and copies of it: what is kept is far less, in Python and in Arrow."""
    pyarrow = pytest.importorskip("pyarrow")
    noise = np.random.default_rng(0)
    rows = [{"problem": f"number {i}", "solution": "[]", "image": Image.fromarray(
        noise.integers(0, 256, (200, 200, 3), np.uint8))} for i in range(100)]
    folder = write(rows, layout, tmp_path / "data")
    assert sum(file.stat().st_size for file in folder.rglob("*")) > 11e6
    copies = 9 if layout == "parquet" else 0
    for number in range(copies):
        shutil.copy(folder / "data" / "train-00000-of-00001.parquet", folder / "data" / f"train-9{number}.parquet")
    sources._large_column.cache_clear()
    before = pyarrow.total_allocated_bytes()
    samples = data.load_samples(folder, data.GROUNDING)
    assert len(samples) == 100 * (1 + copies) and all(isinstance(sample.image, sources.Stored) for sample in samples)
    for i in (0, 99, 50, 0):                             # in any order
        assert data.open_image(samples[i].image).tobytes() == rows[i]["image"].tobytes()
    assert pyarrow.total_allocated_bytes() - before < 2e6


def test_a_folder_of_json_lines_and_splits_in_names(tmp_path):
    for name in ("train/a", "b_test", "c-validation-1", "latest"):
        write([make_rows("grounding", "train")[0] | {"problem": name}], "json lines", tmp_path / "x")
        (tmp_path / "x" / "rows.jsonl").rename(tmp_path / "x" / f"{name.replace('/', '-')}.jsonl")
    asked = lambda split: [s.question for s in data.load_samples(tmp_path / "x", data.GROUNDING, split)]
    assert asked("train") == ["latest", "train/a"] and asked("test") == ["b_test", "latest"]
    assert asked("validation") == ["c-validation-1", "latest"]


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, changes, expected", [
    ("grounding", {"solution": [A, B]}, [A, B]),                              # bare boxes
    ("grounding", {"solution": A}, [A]),                                      # one flat box
    ("grounding", {"solution": [A], "images": [{"bytes": None, "path": "0-image.png"}]}, [A]),
    ("grounding", {"solution": [{"bbox_2d": [100, 100, 500, 900]}], "frame": [1000, 1000]}, [[100, 100, 500, 900]]),
    ("counting", {"count": 3.0}, "3"), ("counting", {"answer": " 12 "}, "12"), ("counting", {"count": 0}, "0"),
    ("math", {"answer": "x + 1"}, r"\boxed{x + 1}"), ("math", {"solution": r"so \boxed{\frac{1}{2}}"}, None),
    ("math", {"answer": "B", "choices": ["12", "24"]}, r"\boxed{24}"),
    ("math", {"answer": "B", "choices": ["A", "B"]}, r"\boxed{B}"), ("math", {"answer": 2.5}, r"\boxed{2.5}"),
    ("math", {"answer": "[1, 2]"}, r"\boxed{[1, 2]}"),
])
def test_labels_of_every_kind(tmp_path, task, changes, expected):
    row = {"problem": "<image>what?", "images": ["0-image.png"]}
    write(make_rows("grounding", "train")[:1], "json lines", tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | changes))
    [sample] = data.load_samples(tmp_path / "rows.jsonl", data.TASKS[task])
    assert sample.question.startswith("what?")
    assert data.open_image(sample.image).size == (90, 60)
    if isinstance(sample.objects, list):
        assert [found["bbox_2d"] for found in sample.objects] == expected
        assert sample.frame == (tuple(changes["frame"]) if "frame" in changes else None)
    else:
        assert sample.objects == (expected or r"\boxed{\frac{1}{2}}")


@pytest.mark.parametrize("task, changes, complaint", [
    ("grounding", {"count": 3}, "no 'solution' or 'bbox' or 'mask'"),
    ("grounding", {"solution": [{"point_2d": [1, 2]}]}, "bbox_2d is not a list of 4"),
    ("gui", {"solution": [{"point_2d": [1]}]}, "point_2d is not a list of 2"),
    ("counting", {"count": "many"}, "not a number of objects: 'many'"), ("counting", {"count": -1}, "not a number"),
    ("math", {"answer": "a</answer>"}, "a tag in it"), ("math", {"answer": "<|im_end|>"}, "a tag in it"),
    ("math", {"answer": " "}, "no answer"), ("math", {}, "no 'answer' or 'solution'"),
    ("grounding", {"solution": [A], "frame": [1000]}, "not a width and a height"),
    ("grounding", {"solution": [A], "frame": [0, 9]}, "not a width and a height"),
    ("grounding", {"solution": [A], "img_width": "x", "img_height": 3}, "not a width and a height"),
    ("grounding", {"solution": [A], "image": ["a.png", "b.png"]}, "2 images in a row"),
    ("medical", {"mask": [[0, 1], [0]]}, "unreadable mask"), ("medical", {"mask": "rows.jsonl"}, "unreadable mask"),
    ("medical", {"mask": [0, 1]}, "the shape (2,)"),
])
def test_labels_that_cannot_be(tmp_path, task, changes, complaint):
    write(make_rows("grounding", "train")[:1], "json lines", tmp_path)
    row = {"problem": "what?", "image": "0-image.png"} | changes
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(data.DataError) as error:
        data.load_samples(tmp_path / "rows.jsonl", data.TASKS[task])
    assert f"rows.jsonl, row 1: " in str(error.value) and complaint in str(error.value)


def test_points_alone_are_labels_where_they_will_do(tmp_path):
    for task in ("gui", "counting"):
        rows = [make_rows("gui", "train")[0] | {"solution": json.dumps([{"point_2d": [20, 30]}, {"point_2d": [95, -3]}])}]
        samples = load(tmp_path / task, task, rows=rows)
        assert samples[0].objects == [{"point_2d": [20, 30]}, {"point_2d": [90, 0]}] and samples.clipped == 1
        example = make_processor("relative").encode(samples[0], data.TASKS[task], image_size=(48, 48))
        assert example.objects == [{"point_2d": [222, 500]}, {"point_2d": [1000, 0]}]
        assert rewards.score(data.label_text(example.objects), example.objects, task, example.frame)["accuracy"] == 3


def test_a_point_of_a_mask_is_inside_even_where_its_centre_is_not():
    """Counted pixel by pixel on rings, corners and noise."""
    rng, ring = np.random.default_rng(0), np.ones((30, 40), bool)
    ring[3:-3, 3:-3] = False
    for mask in (ring, np.eye(20, dtype=bool)[::-1], *(rng.random((5, 15, 25)) > 0.97)):
        [found] = masks.mask_objects(mask)
        (x1, y1, x2, y2), (x, y) = found["bbox_2d"], found["point_2d"]
        assert mask[int(y), int(x)]
        ys, xs = np.nonzero(mask)
        assert np.hypot(y - 0.5 - ys.mean(), x - 0.5 - xs.mean()) == pytest.approx(
            min(np.hypot(b - ys.mean(), a - xs.mean()) for b, a in zip(ys, xs)))
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = True
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()
    assert masks.mask_objects(ring & False) == []


# ---- From labels to answers and back --------------------------------------------------------------------------------

PERFECT = {"MAE": 0, "RMSE": 0}
ENCODINGS = [{"image_size": (48, 48)}, {"image_size": (96, 24)}, {"min_pixels": 96 * 48, "max_pixels": 96 * 96}]


def answers(monkeypatch, tmp_path, task, split, say, coordinates="pixels", layout="json lines", think=True, **encoding):
    samples = load(tmp_path, task, split, layout)
    speak(monkeypatch, say)
    return evaluation.evaluate(None, make_processor(coordinates), data.TASKS[task], samples, think=think,
                               max_new_tokens=9, progress=False, **encoding)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("coordinates", ["pixels", "relative"])
@pytest.mark.parametrize("layout", ["json lines", "parquet"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", SIX)
def test_who_answers_the_label_is_right(monkeypatch, tmp_path, task, split, layout, coordinates, encoding):
    """In original pixels, whatever the file, its frame, the model's coordinates and the image's size."""
    say = lambda example: f"<think>I see</think> {data.label_text(example.objects)}"
    results = answers(monkeypatch, tmp_path, task, split, say, coordinates, layout, **encoding)
    found = evaluation.metrics(results, data.TASKS[task])
    assert tuple(found)[:len(data.TASKS[task].metrics)] == data.TASKS[task].metrics
    for name in data.TASKS[task].metrics:
        if found[name] is not None:
            assert found[name] > 0.85 if name in ("gIoU", "cIoU") else found[name] == PERFECT.get(name, 1), name
    assert found["well_formed"] == found["thinking"] == 1 and found["reward"] == (3 if task == "math" else 7)
    assert {result["verdict"].split(",")[0].split(":")[0] for result in results} - {"nothing to compare"} == {"right"}
    if task not in ("counting", "math"):                 # the labels themselves, too
        assert results[0]["size"] == [180, 240]
        boxes = [thing["bbox_2d"] for thing in results[0]["label"]]
        assert boxes == [scaled(A, 2, 4), scaled(B, 2, 4)][:len(boxes)]


@pytest.mark.parametrize("coordinates", ["pixels", "relative"])
@pytest.mark.parametrize("task", ["grounding", "gui", "anomaly", "medical"])
def test_who_answers_in_another_frame_is_wrong(monkeypatch, tmp_path, task, coordinates):
    other = (48, 48) if coordinates == "relative" else (1000, 1000)
    say = lambda example: data.label_text(data.move_objects(example.objects, example.frame, other, True))
    found = evaluation.metrics(answers(monkeypatch, tmp_path, task, "test", say, coordinates, image_size=(48, 48)),
                               data.TASKS[task])
    assert found["accuracy"] == 0 and found["reward"] < 7
    assert found.get("point_in_box", 0) == 0


@pytest.mark.parametrize("task", SIX)
def test_wrong_answers_and_none_are_wrong_in_words_too(monkeypatch, tmp_path, task):
    wrong = {"counting": "<answer>77</answer>", "math": r"<answer>\boxed{77}</answer>"}
    wrong = wrong.get(task, '<answer>[{"bbox_2d": [0, 0, 2, 2], "point_2d": [1, 1]}]</answer>')
    found = answers(monkeypatch, tmp_path, task, "test", lambda example: wrong, image_size=(48, 48))
    verdicts = {result["verdict"] for result in found}
    expected = {"counting": {"wrong: 77, not 2", "wrong: 77, not 0"},
                "math": {"wrong: 77, not 24", r"wrong: 77, not \frac{1}{2}"}}
    assert verdicts == expected[task] if task in expected else verdicts
    first = evaluation.metrics(found, data.TASKS[task])[data.TASKS[task].metrics[0]]
    assert first == {"anomaly": 2 / 3}.get(task, first) and (first < 0.1 or task == "anomaly")
    found = answers(monkeypatch, tmp_path / "2", task, "test", lambda example: "?", image_size=(48, 48))
    assert {result["verdict"] for result in found} == {"no answer"}
    assert evaluation.metrics(found, data.TASKS[task])[data.TASKS[task].metrics[0]] == 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("task", SIX)
def test_the_prompt_asks_in_its_own_words_and_its_example_can_be_read(task):
    record = data.TASKS[task]
    for think in (True, False):
        text = record.prompt("a {strange} question", (840, 420), think)
        assert "a {strange} question" in text and ("<think>" in text) == think
        answer = rewards.read_answer(text[text.rindex("For example:"):], task)
        assert answer == "24" if task == "math" else answer[0]["point_2d"] == [310, 352]
        assert task == "math" or "840 at the right" in text and "420 at the bottom" in text
    style = data.LabelStyle(record)
    style.observe(record.example.replace("<answer>", "<answer>\n"))
    assert style.example().startswith("<answer>\n") and rewards.read_answer(style.example(), task)


@pytest.mark.parametrize("task", SIX)
def test_labels_survive_the_real_tokenizer(tmp_path, task):
    """Text -> tokens -> text -> answer, with Qwen2-VL's own vocabulary; the prompt has its image and its question."""
    shared = ROOT.parent / "shared" / "data" / "qwen2_vl"
    if not shared.exists():
        pytest.skip("../shared/data is not here")
    processor = data.Processor.from_pretrained(shared)
    for sample in load(tmp_path, task):
        example = processor.encode(sample, data.TASKS[task], image_size=(56, 56))
        text = data.label_text(example.objects)
        assert processor.decode(processor.label_ids(text)) == text
        answer, label = rewards.read_answer(text, task), example.objects
        assert answer == (rewards.boxed(label) if task == "math" else label)
        assert sample.question in processor.tokenizer.decode(example.ids)


def test_a_label_in_words_takes_the_rollouts_style():
    style = data.LabelStyle(data.TASKS["math"])
    style.observe("<think>1 + 1</think>\n<answer> \\boxed{ 2 + x } </answer>")
    assert style.render(r"\boxed{\frac{1}{2} + y}") == r"<answer> \boxed{\frac{1}{2} + y} </answer>"
    style = data.LabelStyle(data.TASKS["counting"])
    style.observe("<answer>\n7\n</answer>")
    assert style.render("12") == "<answer>\n12\n</answer>" and style.render([]) == "<answer>[]</answer>"


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SIX)
@pytest.mark.parametrize("layout, think", [("json lines", "--think"), ("parquet", "--no-think")])
def test_train_and_evaluate_from_files(tmp_path, capsys, task, layout, think):
    files = {split: str(write(make_rows(task, split), layout, tmp_path / split, split)) for split in ("train", "test")}
    common = ["--task", task, think, "--image_size", "48", "--max_completion_length", "8"]
    train.main([*common, "--model", str(TINY), "--data", files["train"], "--eval_data", files["test"], "--eval_steps",
                "1", "--max_steps", "2", "--batch_size", "2", "--num_generations", "2", "--micro_batch_size", "2",
                "--log_rollouts", "1", "--output_dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in data.TASKS[task].metrics)
    assert (tmp_path / "run" / "eval-1.json").exists() and (tmp_path / "run" / "gallery.png").exists()
    assert ("thinking " in printed.split("held out")[0]) == (think == "--think")
    evaluation.main([*common, "--model", str(tmp_path / "run" / "checkpoint-2"), "--data", files["test"],
                     "--output_dir", str(tmp_path / "eval")])
    saved = json.loads((tmp_path / "eval" / "answers.json").read_text())
    assert len(saved["answers"]) == len(make_rows(task, "test"))
    assert set(data.TASKS[task].metrics) <= set(saved["metrics"])


def test_a_tasks_recipe_holds_in_evaluation_too():
    settings = evaluation.parse_command_line(["--task", "math"])
    assert (settings.max_pixels, settings.max_completion_length) == (1_003_520, 1024)
    assert evaluation.parse_command_line(["--task", "math", "--max_pixels", "9000"]).max_pixels == 9000
    assert train.parse_command_line(["--task", "math"]).max_pixels == 1_003_520
    assert evaluation.parse_command_line(["--task", "gui"]).max_pixels == 0


def test_a_task_without_data_of_its_own_says_so(capsys):
    for task, split in (("gui", "train"), ("anomaly", "test")):
        with pytest.raises(data.DataError, match=f"task {task} has no {split} data of its own: give .* --data PATH"):
            data.load_samples(None, data.TASKS[task], split)


def test_a_task_of_ones_own_is_ten_lines(monkeypatch, tmp_path):
    """The README's example, executed as it stands there."""
    readme = (ROOT / "README.md").read_text()
    block = next(block for block in readme.split("```python\n")[1:] if "Task(" in block).split("```")[0]
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    names = {"Task": Task, "TASKS": data.TASKS, "REWARDS": rewards.REWARDS, "BOXES": rewards.BOXES}
    exec(block, names)
    [name] = set(data.TASKS) - {*SIX, "digits"}
    monkeypatch.setitem(data.TASKS, name, data.TASKS[name])
    samples = data.load_samples(write(make_rows("anomaly", "test"), "json lines", tmp_path), data.TASKS[name], "test")
    speak(monkeypatch, lambda example: data.label_text(example.objects))
    found = evaluation.evaluate(None, make_processor(), data.TASKS[name], samples, image_size=(96, 96))
    assert evaluation.metrics(found, data.TASKS[name])["accuracy"] == 1


def test_the_readmes_rows_are_read(tmp_path):
    """Every sample line of the README's section on data, and its conversion of VLM-R1's rows."""
    readme = (ROOT / "README.md").read_text().split("## Data")[1].split("## Training")[0]
    rows = [json.loads(line) for line in readme.split("```json\n")[1].split("```")[0].splitlines()]
    tasks = ("grounding", "grounding", "grounding", "grounding", "medical", "counting", "math")
    for name in ("cats.jpg", "lesion.jpg", "lesion_mask.png", "coins.png", "plot.png"):
        Image.new("L", (600, 400), 255).save(tmp_path / name)
    for row, task in zip(rows, tasks, strict=True):
        (tmp_path / "row.jsonl").write_text(json.dumps(row))
        [sample] = data.load_samples(tmp_path / "row.jsonl", data.TASKS[task])
    assert sample.objects == r"\boxed{4}" and sample.question.endswith("\nChoices: 3, 4, 5")
    names = {}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    for answer, task, objects in (("0", "counting", "0"), ("[12, 40, 210, 300]", "grounding", [12, 40, 210, 300])):
        row = {"id": 1, "image": "cats.jpg", "conversations": [{"from": "human", "value": "<image>What?"},
                                                               {"from": "gpt", "value": answer}]}
        (tmp_path / "row.jsonl").write_text(json.dumps(names["from_vlm_r1"](row)))
        [sample] = data.load_samples(tmp_path / "row.jsonl", data.TASKS[task])
        assert sample.question == "What?" and (sample.objects == objects or sample.objects[0]["bbox_2d"] == objects)


# ---- Masks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """A SAM 2 of 0.1 million random parameters, saved by transformers."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        blocks_per_stage=[1, 2, 2, 1], global_attention_blocks=[2], window_size_per_stage=[4, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4])
    vision = Sam2VisionConfig(backbone_config=backbone.to_dict(), backbone_channel_list=[64, 32, 16, 8],
                              backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)
    config = Sam2Config(
        vision_config=vision.to_dict(),
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16})
    network = Sam2Model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("sam2")
    network.save_pretrained(folder)
    return folder


def test_masks_are_what_transformers_says_at_each_box_and_point(sam_folder):
    """Prompted one object at a time, pixels normalised by hand: the union of their masks, in original pixels."""
    sam = masks.load_sam(sam_folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    objects = [{"bbox_2d": [20, 10, 100, 70], "point_2d": [30, 40]}, {"bbox_2d": [110, 20, 190, 90]},
               {"point_2d": [3, 3]}]
    expected = np.zeros((96, 192), bool)
    pixels = np.stack([(np.asarray(image)[:, :, c] / 255 - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                       for c in range(3)])
    for (x1, y1, x2, y2), (x, y) in (([20, 10, 100, 70], [30, 40]), ([110, 20, 190, 90], [150, 55])):
        with torch.no_grad():
            out = sam(pixel_values=torch.tensor(pixels[None]).float(),
                      input_boxes=torch.tensor([[[x1 / 3, y1 / 1.5, x2 / 3, y2 / 1.5]]]),
                      input_points=torch.tensor([[[[x / 3, y / 1.5]]]]), input_labels=torch.ones(1, 1, 1).int(),
                      multimask_output=False).pred_masks[0, 0]
        large = torch.nn.functional.interpolate(out[None], (96, 192), mode="bilinear")[0, 0]
        expected |= large.numpy() > 0
    found = masks.predict_mask(sam, image, objects, (192, 96))
    assert 0.02 < expected.mean() < 0.98 and (found == expected).mean() > 0.999
    assert (masks.predict_mask(sam, image, objects[1:], (192, 96)) != expected).mean() > 0.05, "prompts do matter"
    assert not masks.predict_mask(sam, image, objects[2:], (192, 96)).any()


def test_half_a_sam_is_refused(sam_folder, tmp_path):
    """transformers itself fills what is missing with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sam_folder, tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    save_file(dict(list(tensors.items())[5:]), tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(data.DataError, match="5 tensors are missing"):
        masks.load_sam(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(data.DataError, match="not a SAM 2 checkpoint"):
        masks.load_sam(tmp_path / "half")


def test_iou_of_masks_is_counted_in_pixels(monkeypatch, tmp_path):
    """With a SAM 2 that finds exactly the lower half of what is asked for."""
    half = lambda sam, image, objects, size: np.arange(size[1])[:, None] + np.zeros(size[0]) >= 120
    monkeypatch.setattr(masks, "predict_mask", half)
    samples = load(tmp_path, "medical", "test", rows=make_rows("medical", "test")[:1])
    speak(monkeypatch, lambda example: data.label_text(example.objects))
    results = evaluation.evaluate(None, make_processor(), data.TASKS["medical"], samples, image_size=(48, 48))
    masks.add_overlaps(results, samples, None)
    truth = np.asarray(make_rows("medical", "test")[0]["mask"]).repeat(2, axis=0).repeat(2, axis=1) > 0
    expected = truth[120:].sum() / (truth.sum() + 120 * 180 - truth[120:].sum())
    found = evaluation.metrics(results, data.TASKS["medical"])
    assert found["gIoU"] == found["cIoU"] == pytest.approx(expected) and 0.2 < expected < 0.8
    assert f"mask {expected:.2f}" in results[0]["verdict"]


def test_masks_on_the_command_line(tmp_path, capsys, sam_folder):
    def run(*flags, rows=make_rows("medical", "test")[:1]):
        source = write(rows, "json lines", tmp_path / "data")
        evaluation.main(["--task", "medical", "--model", str(TINY), "--data", str(source), "--image_size", "48",
                         "--max_completion_length", "4", "--output_dir", str(tmp_path / "out"), *map(str, flags)])
        return json.loads((tmp_path / "out" / "answers.json").read_text())

    found = run("--masks", sam_folder)["answers"][0]
    assert found["overlap"][0] == 0 and found["overlap"][1] > 9000, "nothing was predicted: the union is the label"
    for flags, rows, complaint in (
            (["--masks", TINY], make_rows("medical", "test")[:1], "not a SAM 2 checkpoint"),
            (["--masks", tmp_path / "nowhere"], make_rows("medical", "test")[:1], "SAM 2 with --masks"),
            (["--masks", sam_folder], make_rows("medical", "test")[1:], "row 1: no 'mask'")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*flags, rows=rows)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and complaint in error and error.count("\n") == 1
