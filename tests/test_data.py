"""data.py against transformers, against real photos and labels, and against users' mistakes."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import rewards
import visurf
from data import TASKS, UserError, Processor, Sample, load_samples, move_objects

SHARED = ROOT.parent / "shared" / "data"
GROUNDING, MATH, DIGITS = (TASKS[name] for name in ("grounding", "math", "digits"))
KEPT = dataclasses.replace(GROUNDING, keep_shape=True)
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LABEL = [{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}]
# Qwen3-VL's template has no system turn of its own.
QWEN3_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- for content in message.content %}
        {%- if content.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
        {%- elif 'text' in content %}{{- content.text }}
        {%- endif %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def checkpoints(shared, tmp_path_factory):
    """Folders with the tokenizer and settings of each family, as published but for Qwen3-VL's."""
    import transformers
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        published = shared / ("qwen2_vl" if family == "qwen3_vl" else family)
        vocabulary = [shared / "qwen2_vl" / name for name in ("vocab.json", "merges.txt")]
        for file in [*published.iterdir(), *vocabulary]:
            shutil.copyfile(file, folder / file.name)
    config = transformers.Qwen3VLConfig(image_token_id=151655).to_dict()
    images = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16,
              "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
              "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast"}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return folders


@pytest.fixture(scope="session")
def load_processor(checkpoints):
    """load_processor(family, **settings), for the task grounding unless another is given."""
    import transformers
    read_tokenizer = functools.cache(transformers.AutoTokenizer.from_pretrained)     # a second each

    def load(family, task=GROUNDING, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.AutoTokenizer, "from_pretrained", read_tokenizer)
            return Processor(checkpoints[family], task, **settings)

    return load


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """datasets' copies of Parquet files go to a folder of the tests' own."""
    if find_spec("datasets"):
        folder = tmp_path_factory.getbasetemp() / "cache"
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)


def write_rows(folder, rows, name="rows.jsonl"):
    """A JSON lines file; a row is a dict or raw text. Beside it lies image.png."""
    Image.new("RGB", (100, 80), "white").save(folder / "image.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def train_row(**changes):
    return {"problem": "the cat", "image": "image.png", "solution": json.dumps(LABEL), **changes}


def make_sample(image, label=(), question="the cat", **changes):
    return Sample("", question, image, list(label), image.size, image.size, **changes)


def save_turned(upright, orientation, file):
    """Store an image as a camera held in another way does: pixels turned, and an EXIF tag."""
    degrees = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]     # anticlockwise; a viewer turns it back
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.rotate(degrees, expand=True).save(file, exif=exif, quality=95)


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def prompt_text(processor, example):
    """What the user's turn says after the image."""
    prompt = processor.tokenizer.decode(example.ids)
    return prompt.partition("<|vision_end|>")[2].partition("<|im_end|>")[0]


def iou(a, b):
    [[value]] = rewards.iou([a], [b])
    return value


def mistake(function, *args, **options):
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    message = str(error.value)
    assert len(message) < 800
    return message


# ---- Images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_transformers_image_processor(load_processor, checkpoints, family):
    """With kept shapes as the processor resizes; at a fixed size as it leaves a resized image."""
    from transformers import AutoImageProcessor
    rng = np.random.default_rng(0)
    images = [Image.open(SHARED / "images" / name).convert("RGB")
              for name in ("quokka.jpg", "chelsea.png", "coins.png")]
    images += [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
               for h, w in ((30, 700), (333, 77))]
    for side in (280, 550):
        reference = AutoImageProcessor.from_pretrained(checkpoints[family], backend="pil",
                                                       max_pixels=side ** 2)
        processor = load_processor(family, KEPT, image_size=side)
        for image in images:
            theirs = reference(image, return_tensors="np")
            ours = processor.encode(make_sample(image))
            assert ours.grid_thw.tolist() == theirs["image_grid_thw"].tolist()
            assert ours.pixels.dtype == torch.float32
            assert np.array_equal(ours.pixels.numpy(), theirs["pixel_values"])
    factor = 32 if family == "qwen3_vl" else 28
    reference = AutoImageProcessor.from_pretrained(checkpoints[family], backend="pil")
    fixed = images[0].resize((12 * factor, 12 * factor), Image.Resampling.BILINEAR)
    processor = load_processor(family, image_size=12 * factor + 3)
    theirs = reference(fixed, return_tensors="np")
    assert np.array_equal(processor.encode(make_sample(images[0])).pixels, theirs["pixel_values"])


def test_image_sizes_are_whole_tokens(load_processor):
    image = make_sample(Image.new("RGB", (960, 643)))
    for size, side in ((None, 60), (840, 60), (850, 60), (10, 2)):
        processor = load_processor("qwen2_vl", image_size=size)
        assert processor.encode(image).grid_thw.tolist() == [[1, side, side]]
    for size, grid in ((None, (46, 68)), (280, (16, 24))):
        processor = load_processor("qwen2_vl", MATH, image_size=size)
        assert processor.encode(image).grid_thw.tolist() == [[1, *grid]], "math keeps shapes"


def test_open_image_gives_rgb_and_of_an_animation_the_first_picture(tmp_path):
    for mode in ("L", "LA", "RGBA", "P", "1", "CMYK"):
        assert data.open_image(Image.new(mode, (5, 4))).mode == "RGB"
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (np.asarray(data.open_image(tmp_path / "a.gif")) == [255, 0, 0]).all()
    assert data.open_image(tmp_path / "a.gif", only_size=True) == (20, 10)


def on_white(colour, alpha):
    """What shines through, in numbers of our own: colours (..., 3) from 0 to 255, alpha too."""
    share = np.asarray(alpha, float)[..., None] / 255
    return np.asarray(colour, float) * share + 255 * (1 - share)


def test_transparent_images_stand_on_white(tmp_path):
    """A black drawing on nothing is not a black surface. All ways to be transparent: a channel, an
    entry of the palette or several, one colour of a PNG without a channel."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (20, 30, 4), np.uint8)
    rgba[:10, :, 3] = rng.choice([0, 255], (10, 30))
    Image.fromarray(rgba, "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(rgba, "RGBA").save(tmp_path / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(rgba[..., [0, 3]], "LA").save(tmp_path / "la.png")
    index = rng.integers(0, 4, (20, 30), np.uint8)
    colours, alpha = rng.integers(0, 256, (4, 3), np.uint8), np.array([0, 255, 128, 255])
    palette = Image.fromarray(index, "P")
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "p.png", transparency=bytes(alpha.tolist()))
    palette.save(tmp_path / "p.gif", transparency=2)
    colour = Image.fromarray(colours[index], "RGB")
    colour.save(tmp_path / "rgb.png", transparency=tuple(colours[1].tolist()))
    colour.save(tmp_path / "opaque.png")
    Image.fromarray(index, "L").save(tmp_path / "l.png", transparency=3)
    expected = {
        "rgba.png": on_white(rgba[..., :3], rgba[..., 3]),
        "rgba.webp": on_white(rgba[..., :3], rgba[..., 3]),
        "la.png": on_white(rgba[..., [0, 0, 0]], rgba[..., 3]),
        "p.png": on_white(colours[index], alpha[index]),
        "p.gif": on_white(colours[index], 255 * (index != 2)),
        "rgb.png": on_white(colours[index], 255 * (index != 1)),
        "opaque.png": colours[index],
        "l.png": on_white(np.repeat(index[..., None], 3, axis=2), 255 * (index != 3))}
    for name, pixels in expected.items():
        seen = data.open_image(tmp_path / name)
        assert seen.mode == "RGB" and np.abs(np.asarray(seen) - pixels).max() <= 1, name
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba, "RGBA").save(tmp_path / "turned.png", exif=exif)
    seen = np.asarray(data.open_image(tmp_path / "turned.png"), float)
    assert np.abs(seen - np.rot90(expected["rgba.png"], -1)).max() <= 1, "upright too"


def test_an_image_has_the_size_that_its_header_told(tmp_path):
    """A PNG may hold its EXIF chunk before its pixels or behind them, which the header does not show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "before.png", exif=exif)
    png = (tmp_path / "before.png").read_bytes()
    start = png.index(b"eXIf") - 4
    chunk = png[start:start + 12 + int.from_bytes(png[start:start + 4], "big")]
    end = png.index(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(png[:start] + png[start + len(chunk):end] + chunk + png[end:])
    for name, size in (("before.png", (20, 40)), ("behind.png", (40, 20))):
        assert data.open_image(tmp_path / name, only_size=True) == size
        assert data.open_image(tmp_path / name).size == size
    assert Image.open(tmp_path / "behind.png").getexif()[0x0112] == 6, "Pillow finds it"


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29_000)        # Pillow warns until twice that
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded a large image"))
    assert "60000 pixels" in mistake(data.open_image, tmp_path / "a.png")


def test_images_that_no_model_could_take_are_refused_by_name(load_processor, tmp_path):
    """At loading if the header tells; else when the image is decoded, with file and row too."""
    Image.fromarray(np.zeros((10, 30), np.uint16)).save(tmp_path / "deep.png")
    Image.new("F", (20, 10)).save(tmp_path / "float.tiff")
    whole = encoded(Image.new("RGB", (300, 200)), "JPEG")
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    names = ("deep.png", "float.tiff", "cut.jpg", "whole.jpg")
    file = write_rows(tmp_path, [train_row(image=name, solution="[]") for name in names])
    assert "row 1: unreadable image (over 8 bits a colour: convert it)" in mistake(
        load_samples, file, GROUNDING)
    cut, whole = load_samples(file, GROUNDING, skip_bad_rows=True)
    processor = load_processor("qwen2_vl", image_size=56)
    assert re.search(r"rows.jsonl, row 3: .*truncated", mistake(processor.encode, cut))
    assert processor.encode(whole).pixels.shape == (16, 1176)


@pytest.mark.parametrize("cell, complaint", [
    ("pipe", "no such image file"), ("folder", "no such image file"),
    ("a\0b", "no such image file"), ("x" * 5000, "no such image file"),
    ("https://a.b/c.jpg", "no such image file"),
    (["image.png", "image.png"], "2 images: a sample has one"), ([], "no 'image' or 'images'"),
    ("", "no 'image' or 'images'"), (7, "unreadable image"), ("rows.jsonl", "unreadable image"),
    ({"bytes": None, "path": None}, "no 'image' or 'images'"),
    ("data:image/png;base64,!", "unreadable image")])
def test_what_is_no_image_is_refused_at_once(tmp_path, cell, complaint):
    """A named pipe would be read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    file = write_rows(tmp_path, [train_row(image=cell)])
    assert complaint in mistake(load_samples, file, GROUNDING)[:1000]


# ---- Geometry ------------------------------------------------------------------------------------

def test_move_objects_scales_each_axis_by_its_own_factor_and_leaves_its_input_alone():
    objects = [*LABEL, {"point_2d": [1, 2]}]
    before = json.dumps(objects)
    moved = move_objects(objects, (100, 80), (1000, 160))
    assert moved == [{"bbox_2d": [100, 40, 300, 80], "point_2d": [150, 50]}, {"point_2d": [10, 4]}]
    moved[0]["bbox_2d"][0] = -1
    assert json.dumps(objects) == before
    [first, _] = move_objects(objects, (100, 80), (33, 33), round_to_int=True)
    assert list(first) == ["bbox_2d", "point_2d"], "in the order in which labels are written"
    assert all(type(value) is int for numbers in first.values() for value in numbers)
    assert move_objects("\\frac{1}{2}", (1, 1), (2, 2)) == "\\frac{1}{2}"


def test_a_box_that_rounds_to_nothing_stays_one_unit_wide_and_high_inside_its_frame():
    """Else the label would be a box without area, which earns nothing and teaches such boxes."""
    thin = [{"bbox_2d": [10.2, 0, 10.4, 80], "point_2d": [10.3, 40]},
            {"bbox_2d": [99.8, 79.9, 100, 80]}]
    assert move_objects(thin, (100, 80), (100, 80), round_to_int=True) == [
        {"bbox_2d": [10, 0, 11, 80], "point_2d": [10, 40]}, {"bbox_2d": [99, 79, 100, 80]}]
    assert move_objects(thin[:1], (100, 80), (100, 80)) == thin[:1], "not rounded, not changed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("task, image_size", [(GROUNDING, 280), (GROUNDING, 560), (KEPT, 316)])
def test_the_quokka_box_survives_the_way_to_the_model_and_back(load_processor, tmp_path, family,
                                                               orientation, task, image_size):
    """The image is stored turned, with an EXIF tag; the label is that of the upright image."""
    box = json.loads((SHARED / "images" / "quokka_annotations.json").read_text())
    box = [box["bounding_boxes"][0][name] for name in ("x1", "y1", "x2", "y2")]
    save_turned(Image.open(SHARED / "images" / "quokka.jpg"), orientation, tmp_path / "quokka.jpg")
    assert data.open_image(tmp_path / "quokka.jpg", only_size=True) == (960, 643)
    row = {"text": "the quokka", "image": "quokka.jpg", "bbox": box}
    [sample] = load_samples(write_rows(tmp_path, [row]), GROUNDING, "test")
    example = load_processor(family, task, image_size=image_size).encode(sample)
    assert sample.size == (960, 643) and in_original(example)[0]["bbox_2d"] == box
    if family != "qwen2_5_vl":
        assert example.frame == (1000, 1000)
    [back] = data.move_objects(example.label, example.frame, sample.size)
    step = np.divide(sample.size * 2, example.frame * 2)
    assert (np.abs(np.subtract(back["bbox_2d"], box)) <= step / 2 + 1e-9).all()


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("task, image_size", [(GROUNDING, 448), (GROUNDING, 224), (KEPT, 200)])
def test_boxes_land_on_the_pixels_the_model_sees(load_processor, tmp_path, orientation, task,
                                                 image_size):
    """A dark rectangle on white, found again in the pixels, is where the label says."""
    upright = Image.new("RGB", (400, 240), "white")
    upright.paste("black", (40, 30, 180, 90))
    save_turned(upright, orientation, tmp_path / "a.jpg")
    row = train_row(image="a.jpg", solution=[[40, 30, 180, 90]], img_width=800, img_height=480)
    [sample] = load_samples(write_rows(tmp_path, [row]), GROUNDING)
    example = load_processor("qwen2_5_vl", task, image_size=image_size).encode(sample)
    _, grid_h, grid_w = example.grid_thw[0].tolist()
    # undo the patches: (h/2, w/2, 2, 2, 3, temporal, p, p) -> (H, W) of the first channel
    pixels = example.pixels.numpy().reshape(grid_h // 2, grid_w // 2, 2, 2, 3, 2, 14, 14)
    seen = pixels[:, :, :, :, 0, 1].transpose(0, 2, 4, 1, 3, 5).reshape(grid_h * 14, grid_w * 14)
    ys, xs = np.nonzero(seen < 0)
    assert example.frame == (grid_w * 14, grid_h * 14)
    found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert iou(found, example.label[0]["bbox_2d"]) > 0.95
    assert in_original(example)[0]["bbox_2d"] == [80, 60, 360, 180] and sample.size == (800, 480)


# ---- Prompts and tokens --------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_texts_tokenise_to_the_published_ids(load_processor, family):
    golden = json.loads((SHARED / "qwen2_vl" / "golden_tokens.json").read_text())
    assert len(golden) == 34
    for case in golden:
        assert load_processor(family).token_ids(case["text"]).tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_checkpoints_chat_template(load_processor, family):
    processor = load_processor(family)
    question = "the {cat} {{ 7 * 7 }}\n on the left"         # no template within the template
    example = processor.encode(make_sample(Image.new("RGB", (100, 60)), question=question))
    image_tokens = 26 * 26 if family == "qwen3_vl" else 900
    text = prompt_text(processor, example)
    chat = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
            f"{text}<|im_end|>\n<|im_start|>assistant\n")
    if family == "qwen3_vl":
        chat = chat[chat.index("<|im_start|>user"):]         # Qwen3-VL adds no system turn
    assert example.ids.tolist() == processor.tokenizer(chat)["input_ids"]
    assert example.frame == ((840, 840) if family == "qwen2_5_vl" else (1000, 1000))
    assert f"to {example.frame[0]} at the right" in text and f'"{question}"' in text
    assert "<think>" in text


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_tasks_prompt_holds_its_question_and_shows_a_readable_answer(load_processor, task):
    """The bundled network was trained on questions alone."""
    sample = make_sample(Image.new("RGB", (100, 60)), question="the {cat}")
    kept = dataclasses.replace(task, keep_shape=True)
    processor = load_processor("qwen2_5_vl", kept, image_size=112)
    text = prompt_text(processor, processor.encode(sample))
    if task.name == "digits":
        assert text == "the {cat}"
        return
    assert "the {cat}" in text and "<think>" in text
    assert rewards.read_answer(text[text.rindex("For example:"):], task.kind)
    if task.name != "math":
        assert "to 112 at the right" in text and "to 56 at the bottom" in text


def test_a_label_is_tokenised_as_one_string(load_processor):
    processor = load_processor("qwen2_vl")
    text = f"<answer>{json.dumps(LABEL)}</answer>"
    ids = processor.token_ids(text + data.END)
    assert ids.tolist() == processor.tokenizer(text + "<|im_end|>")["input_ids"]
    parts = ("<answer>", text[8:-9], "</answer>", "<|im_end|>")
    apart = torch.cat([processor.token_ids(part) for part in parts])
    assert apart.tolist() != ids.tolist(), "merges run across the tags, or this test shows nothing"
    assert processor.decode(ids) == processor.decode(ids[:-1], finished=False) == text
    assert processor.decode([]) == processor.decode([], finished=False) == ""


def in_original(example):
    """The label in pixels of the original image, as eval.py reports it."""
    return data.move_objects(example.sample.label, example.sample.frame, example.sample.size)


def drop(name):
    return lambda folder: (folder / name).unlink()


def change(name, **entries):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))
    return apply


@pytest.mark.parametrize("damage", [
    shutil.rmtree, drop("preprocessor_config.json"), drop("config.json"),
    lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "preprocessor_config.json").write_text("[]"),
    change("config.json", model_type="llama"),
    change("config.json", image_token_id=1),
    change("tokenizer_config.json", chat_template="no image"),
    change("tokenizer_config.json", tokenizer_class="NoTokenizer"),
    lambda folder: [file.unlink() for file in folder.glob("[vmt]*")]])
def test_a_bad_checkpoint_folder_is_one_line(checkpoints, tmp_path, damage):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["qwen2_vl"], folder)
    damage(folder)
    message = mistake(Processor, folder, GROUNDING)
    assert str(folder) in message and "--model" in message


@pytest.mark.parametrize("changes", [{"patch_size": 7}, {"temporal_patch_size": 1}, {"merge_size": 4}])
def test_patches_are_those_of_the_network(checkpoints, load_processor, tmp_path, changes):
    """An image processor's settings cannot contradict config.json, for what it says is used."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["qwen2_vl"], folder)
    change("preprocessor_config.json", **changes)(folder)
    sample = make_sample(Image.new("RGB", (100, 60)))
    expected = load_processor("qwen2_vl").encode(sample)
    found = Processor(folder, GROUNDING).encode(sample)
    assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.ids, expected.ids)
    assert found.grid_thw.tolist() == expected.grid_thw.tolist()


def test_a_completion_is_scored_by_its_task_in_the_models_frame(load_processor):
    processor = load_processor("qwen2_vl", image_size=56)
    example = processor.encode(make_sample(Image.new("RGB", (100, 80)), LABEL))
    right = processor.score(f"<answer>{json.dumps(example.label)}</answer>", example)
    assert right == {"thinking": 0, "format": 2, "accuracy": 3, "non_repeat": 1}
    elsewhere = processor.score(f"<answer>{json.dumps(LABEL)}</answer>", example)
    assert elsewhere["accuracy"] == 0, "the label in pixels is wrong from 0 to 1000"
    processor = load_processor("qwen2_vl", MATH, image_size=56)
    example.label = "4"
    example.sample.choices = ["3", "4"]
    for answer, worth in (("B", 1), ("4", 1), ("3", 0), ("A", 0)):
        scored = processor.score(f"<answer>{answer}</answer>", example)
        assert scored["accuracy"] == worth, answer


def test_labels_in_the_pixels_of_their_image_keep_their_numbers(load_processor, shared):
    """Real training labels, in Qwen2.5-VL's pixels of the stored image."""
    samples = load_samples(shared / "parquet" / "train", GROUNDING)
    samples += load_samples(shared / "digits", GROUNDING, limit=40)
    assert any(not s.label for s in samples) and any(len(s.label) > 2 for s in samples)
    for sample in samples:
        side, _ = data.open_image(sample.image, only_size=True)
        example = load_processor("qwen2_5_vl", image_size=side).encode(sample)
        assert example.label == sample.label and example.frame == sample.frame
        assert not sample.label or visurf.style_of(json.dumps(example.label)) == "spaced"


# ---- Loading -------------------------------------------------------------------------------------

def same(a, b):
    fields = ("id", "question", "label", "frame", "size", "choices")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and np.array_equal(
        np.asarray(data.open_image(a.image)), np.asarray(data.open_image(b.image)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_formats_give_the_same_samples(shared, tmp_path, split):
    """JSON lines with files or inline images, Parquet, a folder of it, and save_to_disk."""
    datasets = pytest.importorskip("datasets")
    parquet = shared / "digits" / f"digits_{split}.parquet"
    table = datasets.Dataset.from_parquet(str(parquet), split=split).select(range(40))
    rows = table.with_format("arrow")[:].to_pylist()
    inline = []
    for number, row in enumerate(rows):
        content = base64.b64encode(row["image"]["bytes"]).decode()
        inline.append(row | {"image": f"data:image/jpeg;base64,{content}"})
        (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        row["image"] = f"{number}.jpg"
        if split == "test" and len(row["bbox"]) == 1 and number % 2:
            row["bbox"] = row["bbox"][0]                     # one flat box is allowed
    for folder in ("lines", "shards"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "lines", inline, f"{split}.jsonl")
    table.select(range(25)).to_parquet(str(tmp_path / "shards" / f"{split}-0.parquet"))
    table.select(range(25, 40)).to_parquet(str(tmp_path / "shards" / f"{split}-1.parquet"))
    table.with_format("arrow").save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({split: table}).save_to_disk(str(tmp_path / "dict"))

    theirs = load_samples(parquet, GROUNDING, split)
    assert len(theirs) == {"train": 480, "test": 120}[split] and theirs[2].where.endswith(", row 3")
    assert any(not s.label for s in theirs)
    for source in (write_rows(tmp_path, rows), tmp_path / "lines", tmp_path / "shards",
                   tmp_path / "disk", tmp_path / "dict"):
        samples = load_samples(source, GROUNDING, split)
        assert len(samples) == 40 and all(map(same, samples, theirs)), source
    samples = load_samples(shared / "digits", GROUNDING, split, limit=7)
    assert len(samples) == 7 and all(map(same, samples, theirs))


def test_the_authors_layouts(shared):
    pytest.importorskip("datasets")
    for folder in ("train", "train_disk"):
        first, second = load_samples(shared / "parquet" / folder, GROUNDING)
        assert first.label == [{"bbox_2d": [130, 65, 481, 839], "point_2d": [274, 353]}]
        assert first.frame == data.open_image(first.image, only_size=True) == (840, 840)
        assert first.size == (960, 643) and (first.id, second.id) == ("quokka_0", "SOAP_061_alive")
    for folder in ("test", "test_disk"):
        [test] = load_samples(shared / "parquet" / folder, GROUNDING, "test")
        assert test.label == [{"bbox_2d": [148, 50, 550, 642], "point_2d": [349, 346]}]
        assert test.size == test.frame == data.open_image(test.image, only_size=True) == (960, 643)
    trained = move_objects(first.label, (840, 840), first.size)[0]["bbox_2d"]
    assert iou(trained, test.label[0]["bbox_2d"]) > 0.98, "the same quokka in both layouts"
    for folder in ("train", "train_disk"):
        assert "no readable test data" in mistake(load_samples, shared / "parquet" / folder,
                                                   GROUNDING, "test")


def write_tables(folder, *names):
    """Parquet files, each with one row, whose question is the file's name."""
    datasets = pytest.importorskip("datasets")
    image = {"bytes": encoded(Image.new("RGB", (100, 80))), "path": None}
    for name in names:
        row = {"text": name, "image": image, "bbox": [1.0, 2.0, 30.0, 40.0]}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([row]).to_parquet(str(folder / name))


def names_of(folder, split):
    return [sample.question for sample in load_samples(folder, GROUNDING, split)]


@pytest.mark.parametrize("above", ["train2014", "test-bench", "val/dev", "plain"])
def test_a_tables_split_is_in_its_path_below_the_folder(tmp_path, above):
    """Whatever the folders above are called. Rows of a file that names another split never enter."""
    files = {"train": ["data/train-0.parquet", "data/train-1.parquet", "train/x.parquet", "a_train.parquet",
                       "train2014/b.parquet"],
             "validation": ["val-0.parquet", "dev/y.parquet", "validation/z.parquet", "c.validation.parquet"],
             "test": ["test-0.parquet", "more/test/0.parquet", "test_1.parquet"]}
    neither = ["constrained.parquet", "latest-0.parquet", "testing0.parquet", "device.parquet", "rows.parquet",
               "evaluation.parquet", "train/test-0.parquet", "train_test_split/0.parquet", "test/train2014.parquet"]
    folder = tmp_path / above / "data"
    write_tables(folder, *neither, *sum(files.values(), []))
    for split, names in files.items():
        assert names_of(folder, split) == sorted(names), split
    (tmp_path / "other").mkdir()
    write_tables(tmp_path / "other", *neither, *files["train"])
    for split in ("validation", "test"):
        message = mistake(load_samples, tmp_path / "other", GROUNDING, split)
        assert "names this split alone" in message and f"no readable {split} data" in message
    assert names_of(folder / "rows.parquet", "test") == ["rows.parquet"], "a file itself needs no name"


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_validation_has_several_names(tmp_path, name):
    """Of a JSON lines file, and of a split that save_to_disk wrote."""
    write_rows(tmp_path, [train_row(problem="seen")], f"{name}.jsonl")
    write_rows(tmp_path, [train_row(problem="hidden")], "train.jsonl")
    assert names_of(tmp_path, "validation") == ["seen"] and names_of(tmp_path, "train") == ["hidden"]
    datasets = pytest.importorskip("datasets")
    image = {"bytes": encoded(Image.new("RGB", (100, 80))), "path": None}
    table = datasets.Dataset.from_list([train_row(problem="seen", image=image)])
    datasets.DatasetDict({name: table}).save_to_disk(str(tmp_path / "disk"))
    assert names_of(tmp_path / "disk", "validation") == ["seen"]
    message = mistake(load_samples, tmp_path / "disk", GROUNDING, "train")
    assert "names this split alone" in message and "no readable train data" in message


LLAVA = {"image": "image.png", "conversations": [{"from": "human", "value": "<image>\nWhere?"},
                                                 {"from": "gpt", "value": "[1, 2, 30, 40]"}]}
SWIFT = {"images": ["image.png"], "messages": [{"role": "user", "content": "<image>How many?"}],
         "solution": "3"}


@pytest.mark.parametrize("name, content", [
    ("rows.json", json.dumps([LLAVA])), ("rows.csv", "image,problem\n"), ("rows.txt", "a.png the cat"),
    ("rows.json", json.dumps([train_row()], indent=1)), ("rows", json.dumps(train_row())),
    ("list.jsonl", json.dumps([LLAVA], indent=1)), ("list.jsonl", json.dumps([train_row()])),
    ("text.jsonl", '"the cat"'), ("llava.jsonl", json.dumps(LLAVA)), ("swift.jsonl", json.dumps(SWIFT)),
    ("utf16.jsonl", json.dumps(train_row()).encode("utf-16")),
    ("utf16.jsonl", json.dumps(train_row()).encode("utf-16-be"))])
def test_other_formats_are_named_with_the_converter(tmp_path, name, content):
    pytest.importorskip("datasets")
    write_rows(tmp_path, [])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = mistake(load_samples, tmp_path / name, GROUNDING)
    assert message.startswith(str(tmp_path / name)) and "extras/convert.py" in message
    assert "LLaVA, VLM-R1 and ms-swift" in message
    if ".jsonl" in name:
        assert "row 1: " in message
    else:
        assert "no readable train data (UserError('no Parquet file" in message


def test_images_of_a_table_stay_on_disk_until_they_are_opened(shared, tmp_path):
    """Columns that are not needed may hold anything; a damaged image does not stop the others."""
    datasets = pytest.importorskip("datasets")
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    whole = encoded(Image.fromarray(noise))
    rows = [train_row(image={"bytes": content, "path": None}, solution="[]", extra=[{"a": b"\xff"}])
            for content in (whole, whole[:-1000], whole)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    samples = load_samples(tmp_path / "rows.parquet", GROUNDING)
    assert all(callable(sample.image) for sample in samples)
    assert np.array_equal(data.open_image(samples[2].image), noise)
    assert "unreadable image" in mistake(data.open_image, samples[1].image)


def test_a_null_column_counts_as_absent(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": encoded(Image.new("RGB", (100, 80))), "path": None}
    rows = [train_row(image=image, answer=None, choices=None, img_width=None, img_height=None),
            train_row(image=image, answer="4", choices=["3", "4"], img_width=50, img_height=40)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    first, second = load_samples(tmp_path / "rows.parquet", GROUNDING)
    assert first.label == second.label == LABEL and first.choices == []
    assert first.size == (100, 80) and second.size == (50, 40)
    assert second.question.endswith("\nChoices: A. 3, B. 4")


def boxed_row(box, **changes):
    return {"text": "the cat", "image": "image.png", "bbox": box, **changes}


def math_row(**changes):
    return {"problem": "how many", "image": "image.png", **changes}


UNREADABLE = "no label that grounding can read"
BEYOND = "no box with its point in "
MISTAKES = [
    ("Expecting value", '{"problem": '),
    ("Invalid \\u", '{"problem": "\\ud8"}'),
    ("not a JSON object", "[1, 2]"),
    ("no 'problem' or 'text', or an empty one", {"image": "image.png"}),
    ("no 'problem' or 'text', or an empty one", train_row(problem="<image> \n")),
    ("no 'solution' or 'bbox'", boxed_row(None)),
    ("no 'image' or 'images'", train_row(image=None)),
    ("control token", train_row(problem="a cat <|image_pad|>?")),
    ("half a character", '{"problem": "cat \\ud83d", "image": "image.png", "solution": []}'),
    (UNREADABLE, train_row(solution="[{'bbox_2d': [1, 2, 3, 4]}]")),
    (UNREADABLE, train_row(solution="[" * 100_000)),
    (UNREADABLE, train_row(solution='[{"bbox_2d": [1, 2, 3, NaN]}]')),
    (UNREADABLE, train_row(solution=[[1, 2, 3, 4]] * 121)),
    (UNREADABLE, train_row(solution="[[1, 2, 3, 4]]")),
    ("bbox_2d is four numbers", train_row(solution='[{"bbox_2d": [1, 2, 3, 1e6]}]')),
    ("bbox_2d is four numbers", train_row(solution='[{"point_2d": [1, 2]}]')),
    ("bbox_2d is four numbers", train_row(solution='[{"bbox_2d": [1, 2, 3, "4"]}]')),
    ("cannot reshape", boxed_row([[1, 2, 3]])),
    (BEYOND, train_row(solution='[{"bbox_2d": [10, 20, 30, 40], "point_2d": [31, 25]}]')),
    (BEYOND, boxed_row([10, 40, 30, 40])),
    (BEYOND + "100 x 80", train_row(solution='[{"bbox_2d": [10, 80, 20, 90]}]')),
    (BEYOND + "200 x 300", boxed_row([200, 5, 210, 9], img_width=200, img_height=300)),
    ('(add "frame")', boxed_row([0.1, 0.2, 0.5, 1])),
    (BEYOND, train_row(solution='[{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 5000]}]')),
    ("choices: a list of at most 26", train_row(choices=list("abc") * 9)),
    ("choices: a list of at most 26", train_row(choices='{"A": "3"}')),
    ("Expecting value", train_row(choices="['3', '4']")),
    ("a sample is about one image", train_row(problem="is <image> larger than <image>?")),
    ("a sample is about one image", train_row(problem="<image> or <video>?")),
    ("a sample is about one image", train_row(problem="<video> what is it?")),
    ("3 is no choice, nor its index from 0", math_row(answer=3, choices=["x", "y", "z"])),
    ("-1 is no choice, nor its index from 0", math_row(answer=-1, choices=["x", "y", "z"])),
    ("two positive numbers", train_row(frame=[0, 1000])),
    ("values to unpack", train_row(frame=[1000])),
    ("no label that counting can read", train_row(solution=None, count="many")),
    ("no label that counting can read", train_row(solution=None, count=-1)),
    ("no label that math can read", math_row(answer="a<think>")),
    ("no label that math can read", math_row(answer=" ")),
]


@pytest.mark.parametrize("complaint, row", MISTAKES)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, capsys, complaint, row):
    file = write_rows(tmp_path, [train_row(), "", row, train_row()])
    found = re.search("counting|math|no choice", complaint)
    task = TASKS[found[0].replace("no choice", "math")] if found else GROUNDING
    if task.name == "math":
        pytest.importorskip("math_verify")
    message = mistake(load_samples, file, task)
    assert message.startswith(f"{file}, row 2: ") and complaint in message
    assert "--skip_bad_rows" in message
    assert capsys.readouterr().out == ""
    samples = load_samples(file, task, skip_bad_rows=True)
    assert [s.where for s in samples] == [f"{file}, row 1", f"{file}, row 3"]
    assert capsys.readouterr().out == f"{file}: 1 bad rows skipped\n"


def test_answers_in_words_and_numbers(tmp_path):
    def label(task, **row):
        rows = [{"problem": "how many", "image": "image.png", **row}]
        return load_samples(write_rows(tmp_path, rows), TASKS[task])[0].label

    assert label("counting", count=24) == label("counting", answer="24.0") == "24"
    assert label("counting", count=24.0) == "24" and label("counting", count=0) == "0"
    assert label("counting", solution=LABEL, count=2) == label("gui", solution=LABEL) == LABEL
    for answer in ("B", "4", "\\frac{1}{2}", "two dogs"):
        assert label("math", answer=answer, choices=["3", "4"]) == answer
    assert label("math", answer=2.5) == "2.5" and label("math", solution=" 24 ") == "24"


def test_math_asks_for_its_package_before_it_reads_anything(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert "pip install math-verify" in mistake(load_samples, "nowhere.jsonl", MATH)


def test_files_may_begin_with_the_mark_of_utf_8_and_lines_may_end_as_on_windows(tmp_path):
    file = write_rows(tmp_path, [])
    line = json.dumps(train_row(problem="die Kätzchen"), ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    samples = load_samples(file, GROUNDING)
    assert [(sample.question, sample.label) for sample in samples] == [("die kätzchen", LABEL)] * 2


def test_control_characters_in_a_question_reach_the_model(load_processor, tmp_path):
    evil = "cat\x1b]0;title\x07\x1b[2j\u202e\x00"
    [sample] = load_samples(write_rows(tmp_path, [train_row(problem=evil)]), GROUNDING)
    processor = load_processor("qwen2_vl", image_size=56)
    assert evil in prompt_text(processor, processor.encode(sample))


def test_bad_bytes_and_bad_tables_are_named_too(tmp_path):
    file = write_rows(tmp_path, [train_row()])
    file.write_bytes(file.read_bytes() + b'{"problem": "\xff\xfe"}\n')
    assert "can't decode" in mistake(load_samples, file, GROUNDING)
    datasets = pytest.importorskip("datasets")
    images = [encoded(Image.new("RGB", (100, 80))), b"no image"]
    rows = [train_row(image={"bytes": image, "path": None}) for image in images]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    message = mistake(load_samples, tmp_path / "rows.parquet", GROUNDING)
    assert "rows.parquet, row 2: unreadable image" in message
    assert len(load_samples(tmp_path / "rows.parquet", GROUNDING, skip_bad_rows=True)) == 1
    datasets.Dataset.from_list([{"x": 1}]).to_parquet(str(tmp_path / "none.parquet"))
    assert "none.parquet" in mistake(load_samples, tmp_path / "none.parquet", GROUNDING)


def load_row(folder, row, task=GROUNDING):
    """The sample of a file with this one row."""
    [sample] = load_samples(write_rows(folder, [row]), task)
    return sample


def test_overshoot_of_two_percent_is_cut_and_a_point_goes_with_it(tmp_path):
    """The centre is that of the box as cut; a point that is given stays in its box."""
    solution = [{"bbox_2d": [-2, 20, 101, 81], "point_2d": [50, 50]}, {"bbox_2d": [0, 0, 100, 80]},
                {"bbox_2d": [60, 20, 102, 40]}, {"bbox_2d": [90, 20, 102, 40], "point_2d": [101, 30]}]
    assert load_row(tmp_path, train_row(solution=solution)).label == [
        {"bbox_2d": [0, 20, 100, 80], "point_2d": [50, 50]},
        {"bbox_2d": [0, 0, 100, 80], "point_2d": [50, 40]},
        {"bbox_2d": [60, 20, 100, 40], "point_2d": [80, 30]},
        {"bbox_2d": [90, 20, 100, 40], "point_2d": [100, 30]}]
    relative = boxed_row([990, 0, 1020, 1000], frame=[1000, 1000])
    assert load_row(tmp_path, relative).label == [
        {"bbox_2d": [990, 0, 1000, 1000], "point_2d": [995, 500]}]


@pytest.mark.parametrize("box", [
    [50, 30, 90, 95], [30, 10, 180, 60],                     # 0 to 1000, pixels of a larger image
    [60, 50, 20, 20], [60, 10, 50, 60],                      # x, y, width, height
    [-2.1, 0, 50, 50], [0, -1.7, 50, 50], [50, 50, 102.1, 70], [50, 50, 70, 81.7],
    [101, 10, 102, 20], [0.1, 0.2, 0.7, 0.9]])
@pytest.mark.parametrize("row", [train_row(solution=None), boxed_row(None)])
def test_a_box_that_cannot_be_of_its_image_is_refused_with_the_usual_reasons(tmp_path, box, row):
    """Cut, as it was once, it would teach another box, with its point on an edge."""
    message = mistake(load_row, tmp_path, row | {"bbox": [box]})
    assert "row 1: " + BEYOND + "100 x 80; " in message
    for reason in ("1000", "another frame", '"frame"', "[x, y, width, height]", "EXIF"):
        assert reason in message


@pytest.mark.parametrize("orientation, stored", [(1, (40, 60)), (6, (60, 40)), (8, (60, 40))])
def test_a_declared_size_is_that_of_the_upright_image(tmp_path, orientation, stored):
    """The size of the file before its EXIF turn is refused, as size and as frame. An image may have
    been resized, whatever its original was, and coordinates may run to anything else."""
    save_turned(Image.new("RGB", (40, 60)), orientation, tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").size == stored
    row = boxed_row([4, 4, 20, 20], image="a.jpg")
    for wrong in ({"img_width": 60, "img_height": 40}, {"frame": [60, 40]}):
        assert "60 x 40, on its side" in mistake(load_row, tmp_path, row | wrong)
    for size in ((40, 60), (80, 120), (120, 80), (30, 30)):
        sample = load_row(tmp_path, row | {"img_width": size[0], "img_height": size[1]})
        assert sample.size == sample.frame == size
        assert load_row(tmp_path, row | {"frame": size}).frame == size
    Image.new("RGB", (50, 50)).save(tmp_path / "square.png")
    assert load_row(tmp_path, row | {"image": "square.png", "frame": [50, 50]}).frame == (50, 50)


@pytest.mark.parametrize("task", [GROUNDING, TASKS["counting"], MATH])
def test_questions_for_objects_are_lower_case_and_without_their_last_marks(tmp_path, task):
    """As the authors ask; mathematics stays as it is."""
    given = 'Where is the "Big" Cat?"'
    row = train_row(problem=f"<image>\n{given} ", answer="5", count=1)
    asked = given if task is MATH else 'where is the "big" cat'
    assert load_row(tmp_path, row, task).question == asked


def test_an_id_may_be_zero(tmp_path):
    for columns, name in (({"id": 0}, "0"), ({"image_id": 0}, "0"), ({"id": None, "image_id": 7}, "7"),
                          ({"id": "a", "image_id": 7}, "a"), ({}, str(tmp_path / "rows.jsonl, row 1"))):
        assert load_row(tmp_path, train_row(**columns)).id == name


def test_blank_lines_are_no_rows(tmp_path):
    file = write_rows(tmp_path, ["", "  \t", train_row(), " \r", train_row(), "\v"])
    assert [s.where for s in load_samples(file, GROUNDING)] == [f"{file}, row 1", f"{file}, row 2"]


@pytest.mark.parametrize("text", [
    "if |a|<|b|, find a", "|AB|<|CD|> 0", "a <| b |> c", "<|>", "< | image_pad | >"])
def test_bars_of_mathematics_are_no_control_tokens(tmp_path, load_processor, text):
    """Nor does the tokenizer take them for any."""
    assert load_row(tmp_path, math_row(problem=text, answer=text), MATH).question == text
    special = set(load_processor("qwen2_5_vl").tokenizer.added_tokens_decoder)
    assert not special & set(load_processor("qwen2_5_vl").token_ids(text).tolist())


def test_every_control_token_of_the_tokenizers_is_refused(tmp_path, load_processor):
    for family in ("qwen2_vl", "qwen2_5_vl"):
        added = load_processor(family).tokenizer.added_tokens_decoder.values()
        names = [str(token) for token in added if "|" in str(token)]
        assert "<|image_pad|>" in names and "<|im_end|>" in names
        for name in names:
            for row in (math_row(problem=f"a{name}b", answer="1"), math_row(answer=f"a{name}b")):
                assert "control token" in mistake(load_row, tmp_path, row, MATH)


@pytest.mark.parametrize("choices, answer, label", [
    (["trout", "heron", "otter"], 2, "otter"), (["trout", "heron", "otter"], 0, "trout"),
    (["trout", "heron", "otter"], 2.0, "otter"), ('["trout", "heron", "otter"]', 1, "heron"),
    (["trout", "heron", "otter"], "C", "C"), (["trout", "heron", "otter"], "otter", "otter"),
    (["3", "4", "5"], "4", "4"), ([3, 4, 5], 4, "4"), ([1, 2, 3], 2, "2"), (["1", "2", "3"], 2, "3"),
    (["1", "2", "3"], "2", "2"), (list("abcdefghijklmnopqrstuvwxyz"), 25, "z"), ("[]", 2, "2"),
    (None, 2, "2"), ("", "x", "x")])
def test_an_answer_to_a_choice_is_a_text_a_letter_or_a_number_from_0(tmp_path, choices, answer, label):
    """A number that is not itself a choice is an index, as in ScienceQA."""
    pytest.importorskip("math_verify")
    sample = load_row(tmp_path, math_row(choices=choices, answer=answer), MATH)
    assert sample.label == label
    given = choices if isinstance(choices, list) else json.loads(choices or "[]")
    assert sample.choices == [str(choice) for choice in given]
    for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", sample.choices):
        assert f"{letter}. {choice}" in sample.question.partition("Choices: ")[2]
    right = {answer for answer in sample.choices if rewards.same_answer(answer, label, sample.choices)}
    assert len(right) == bool(given)


def test_rows_with_a_mask_and_no_box_have_the_masks_box(tmp_path):
    """The authors' columns of ReasonSeg. Compared with a search through all pixels."""
    rng = np.random.default_rng(3)
    rows, boxes = [], []
    for index in range(6):
        mask = np.zeros((80, 100), bool)
        for y, x in rng.integers((80, 100), size=(index, 2)):
            mask[y, x] = True
        on = [(x, y) for y in range(80) for x in range(100) if mask[y, x]]
        xs, ys = [x for x, _ in on], [y for _, y in on]
        boxes.append([[min(xs), min(ys), max(xs) + 1, max(ys) + 1]] if on else [])
        rows.append({"text": "a seat", "image": "image.png", "mask": mask.astype(int).tolist(),
                     "image_id": "1", "ann_id": "0", "img_height": 80, "img_width": 100})
    rows.append(rows[-1] | {"bbox": [1, 2, 3, 4]})           # a box, if there is one, is the label
    samples = load_samples(write_rows(tmp_path, rows), GROUNDING, "test")
    found = [[item["bbox_2d"] for item in sample.label] for sample in samples]
    assert found == [*boxes, [[1, 2, 3, 4]]]
    for mask in ([[0, 1]], np.zeros((100, 80)).tolist(), [], "image.png", [[0], [0, 1]]):
        assert "row 1: " in mistake(load_row, tmp_path, rows[0] | {"mask": mask})
    assert "no 'solution' or" in mistake(load_row, tmp_path, rows[0], TASKS["counting"]), \
        "a mask does not say how many objects it shows"


def test_the_authors_masks_give_their_boxes(shared):
    """Their file has both, so the box of the mask can be compared with the one in the row."""
    [sample] = load_samples(shared / "parquet" / "test", GROUNDING, "test")
    rows, number, _ = sample.image.args
    row = data.read_row(rows, number) | {"bbox": None}
    [found] = data.read_label(row, GROUNDING, sample.frame, [])
    assert iou(found["bbox_2d"], sample.label[0]["bbox_2d"]) > 0.95


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    def complaint(source, split="train", task=GROUNDING):
        return mistake(load_samples, source, task, split)

    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no good row" in complaint(tmp_path / "empty.jsonl")
    assert "no train data of its own" in complaint(None, task=TASKS["gui"])
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    for source in (tmp_path / "folder", tmp_path / "cut.parquet"):
        assert f"{source}: no readable train data" in complaint(source)
        assert "JSON lines (.jsonl) or Parquet (pip install datasets)" in complaint(source)
    for source in ("nowhere.jsonl", "data/nowhere", tmp_path / "a" / "b"):
        assert f"{source}: no such f" in complaint(source)
    assert GROUNDING.data in complaint(None) and GROUNDING.eval_data in complaint(None, "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in complaint(tmp_path / "cut.parquet")


def test_a_model_is_a_folder_or_comes_from_the_hub(tmp_path, monkeypatch):
    assert data.fetch(tmp_path) == tmp_path

    def download(name, repo_type, ignore_patterns, **limits):
        assert repo_type == "model" and {"*.py", "*.bin"} <= set(ignore_patterns)
        return {"owner/name": tmp_path}[name]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert data.fetch("owner/name") == tmp_path
    message = mistake(data.fetch, "owner/other")
    assert "owner/other: no such folder" in message and "give a name that exists" in message


# ---- Documentation -------------------------------------------------------------------------------

def blocks(language):
    text = (ROOT / "docs" / "data.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_rows_in_the_documentation_load_as_it_says(tmp_path):
    for name in ("cats.jpg", "coins.png", "plot.png"):
        Image.new("RGB", (500, 400)).save(tmp_path / name)
    [text] = blocks("json")
    tasks = ["grounding", "grounding", "grounding", "grounding", "counting", "math"]
    samples = []
    for line, task in zip(text.splitlines(), tasks, strict=True):
        (tmp_path / "row.jsonl").write_text(line)
        samples += load_samples(tmp_path / "row.jsonl", TASKS[task])
    boxes = [[found["bbox_2d"] for found in sample.label] for sample in samples[:4]]
    assert boxes == [[[12, 40, 210, 300]], [], [[12, 40, 210, 300]],
                     [[12, 40, 210, 300], [250, 60, 400, 310]]]
    assert samples[0].label[0]["point_2d"] == [110, 170] and samples[3].frame == (1000, 1000)
    assert samples[2].label[0]["point_2d"] == [111, 170], "a box's centre"
    assert samples[4].label == "24" and samples[5].label == "B"
    assert rewards.same_answer("4", samples[5].label, samples[5].choices)
    assert samples[5].question == "How many bars exceed 10?\nChoices: A. 3, B. 4, C. 5"


def test_the_python_in_the_documentation_runs_and_prints_what_it_shows(monkeypatch):
    monkeypatch.setattr(data, "TASKS", dict(TASKS))
    walk, new_task, new_reward = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(walk, {})
    assert [printed.getvalue()] == blocks("text")
    exec(new_task, {})
    processor = Processor(DIGITS.model, data.TASKS["aerial"], image_size=48)
    example = processor.encode(make_sample(Image.new("RGB", (48, 48)), LABEL))
    written = f"<answer>{json.dumps(example.label)}</answer>"
    assert processor.score(written, example)["accuracy"] == 3
    exec(new_reward, {})
    processor = Processor(DIGITS.model, data.TASKS["plates"], image_size=48)
    example = processor.encode(make_sample(Image.new("RGB", (48, 48))))
    example.label = "X 1"
    assert processor.score("<answer>X 1</answer>", example) == {"accuracy": 1, "short": 1}
    assert processor.score("so " * 99 + "<answer>X</answer>", example) == {"accuracy": 0, "short": 0}


def test_the_documentation_names_every_task_column_and_metric():
    text = (ROOT / "docs" / "data.md").read_text()
    columns = ("id", "image_id", "problem", "text", "solution", "bbox", "answer", "count", "choices",
               "frame", "img_width", "img_height", "image", "images", "mask")
    for name in (*TASKS, *columns):
        assert f"`{name}`" in text, name
    for task in TASKS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{task.name}`"))
        assert task.name == "digits" or all(metric in row for metric in task.metrics), task.name
