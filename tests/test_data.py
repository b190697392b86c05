"""data.py against transformers, against real photos and labels, and against what users get wrong."""

import doctest
import io
import json
import random
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from assets.digits import (COLOURS, HANDWRITING, NEIGHBOURS, PART, QUESTIONS, SYNONYMS, VALUES,
                           digits_sample)
from data import GROUNDING, DIGITS, DataError, LabelStyle, Processor, label_text, load_samples, move_objects
from rewards import parse_answer
from support import sources

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TWO = [{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}, {"bbox_2d": [5, 6, 700, 800], "point_2d": [7, 8]}]


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def processors(shared, tmp_path_factory):
    """Both real tokenizers with their configurations: {"qwen2_vl": Processor, "qwen2_5_vl": Processor}."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    vocabulary = [shared / "qwen2_vl" / name for name in ("vocab.json", "merges.txt")]
    for file in [*(shared / "qwen2_5_vl").iterdir(), *vocabulary]:
        shutil.copy(file, folder)
    return {"qwen2_vl": Processor.from_pretrained(shared / "qwen2_vl"),
            "qwen2_5_vl": Processor.from_pretrained(folder)}


@pytest.fixture(scope="session")
def qwen2(processors):
    return processors["qwen2_vl"]


def write_rows(folder, rows, name="rows.jsonl", image_size=(100, 80)):
    """A JSON lines file; a row is a dict or raw text. Beside it lies image.png."""
    Image.new("RGB", image_size, "white").save(folder / "image.png")
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def train_row(**changes):
    return {"problem": "the cat", "image": "image.png",
            "solution": '[{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}]', **changes}


def save_turned(upright, orientation, file):
    """Store an image as a camera held in another way does: pixels turned, and an EXIF tag that says how."""
    degrees = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]         # anticlockwise; a viewer turns it back
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.rotate(degrees, expand=True).save(file, exif=exif, quality=95)


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def iou(a, b):
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def test_doctests():
    assert doctest.testmod(data).failed == 0 < doctest.testmod(data).attempted


# ---- Images ---------------------------------------------------------------------------------------------------------

def test_pixels_are_bit_equal_to_the_pillow_image_processor(processors):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    rng = np.random.default_rng(0)
    images = [Image.open(SHARED / "images" / name).convert("RGB")
              for name in ("quokka.jpg", "chelsea.png", "coins.png")]
    images += [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((30, 700), (333, 77))]
    for max_pixels in (60_000, 200_000, 480_000):
        limits = {"min_pixels": 56 * 56, "max_pixels": max_pixels}
        reference = Qwen2VLImageProcessorPil.from_pretrained(SHARED / "qwen2_vl", **limits)
        for image in images:
            theirs = reference(image, return_tensors="np")
            ours = processors["qwen2_5_vl"].encode(data.Sample("", "cat", image, []), DIGITS, **limits)
            assert ours.grid_thw.tolist() == theirs["image_grid_thw"].tolist()
            assert ours.pixels.dtype == torch.float32
            assert np.array_equal(ours.pixels.numpy(), theirs["pixel_values"])


def test_smart_resize_equals_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    rng = random.Random(0)
    for _ in range(2000):
        width, height = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
        factor = rng.choice([8, 28, 32])
        limits = sorted(int(2 ** rng.uniform(12, 22)) for _ in range(2))
        if max(width, height) <= 200 * min(width, height):
            expected = smart_resize(height, width, factor, *limits)[::-1]
            assert data.smart_resize(width, height, factor, *limits) == expected
    with pytest.raises(ValueError, match="200"):
        data.smart_resize(2010, 10, 28, 3136, 1003520)


def test_target_size_is_a_multiple_of_the_factor():
    assert data.target_size((960, 643), 28, 3136, 10 ** 7, fixed=(840, 840)) == (840, 840)
    assert data.target_size((960, 643), 28, 3136, 10 ** 7, fixed=(850, 10)) == (840, 28)
    assert data.target_size((960, 643), 28, 3136, 10 ** 7) == (952, 644)


def test_open_image_gives_rgb_and_refuses_what_it_cannot_hold(tmp_path, monkeypatch):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert data.open_image(Image.new(mode, (5, 4))).mode == "RGB"
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match="^file, row 3: "):
        data.open_image(tmp_path / "cut.png", "file, row 3")
    with pytest.raises(DataError, match="^x: unreadable image"):
        data.open_image(b"not an image", "x")
    monkeypatch.setattr(sources, "MAX_IMAGE_PIXELS", 59_999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded an image that is too large"))
    with pytest.raises(DataError, match="300 x 200 pixels is too large"):
        data.open_image(tmp_path / "a.png", "x")


def test_odd_images_look_as_a_viewer_shows_them(tmp_path):
    """Transparent parts are white, 16 bits keep their shades, CMYK its colours, an animation is its first picture."""
    def seen(image, name, **options):
        image.save(tmp_path / name, **options)
        for source in (tmp_path / name, (tmp_path / name).read_bytes()):
            assert data.image_size(source) == image.size
        opened = np.asarray(data.open_image(tmp_path / name))
        assert np.array_equal(opened, np.asarray(data.open_image((tmp_path / name).read_bytes())))
        return opened

    ramp = np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)
    shades = seen(Image.fromarray(ramp), "deep.png")
    assert np.abs(shades[:, :, 0] - ramp / 257.0).max() < 2 and shades.std() > 60
    for mode, name in (("RGBA", "a.png"), ("LA", "b.png")):
        image = Image.new(mode, (20, 10), "black")
        image.putalpha(Image.new("L", (20, 10), 0))
        image.paste(Image.new(mode, (5, 5), "black"), (0, 0))
        pixels = seen(image, name)
        assert (pixels[:5, :5] == 0).all() and (pixels[5:, 5:] == 255).all()
    palette = Image.new("P", (20, 10), 1)
    palette.putpalette([0, 0, 0, 200, 30, 40])
    assert (seen(palette, "p.gif") == [200, 30, 40]).all()
    assert (seen(palette, "t.png", transparency=1) == 255).all()
    red = seen(Image.new("RGB", (20, 10), (200, 30, 40)).convert("CMYK"), "c.jpg", quality=95)
    assert np.abs(red.astype(int) - [200, 30, 40]).max() < 8
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    assert (seen(frames[0], "m.gif", save_all=True, append_images=frames[1:]) == [255, 0, 0]).all()


def test_images_that_no_model_could_take_are_refused_by_name(tmp_path):
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    Image.new("F", (20, 10)).save(tmp_path / "float.tiff")
    Image.new("RGB", (300, 200)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    png = bytearray(png_bytes(Image.new("RGB", (300, 200))))
    png[16:24] = (100_000).to_bytes(4, "big") * 2                # the header claims 10 thousand million pixels
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(png)
    for name, complaint in (("thin.png", "1 x 5000 pixels is too large or too long"), ("float.tiff", "32 bits"),
                            ("cut.jpg", "truncated"), ("huge.png", "pixels")):
        with pytest.raises(DataError, match=complaint) as error:
            data.open_image(tmp_path / name, "file, row 3")
        assert str(error.value).startswith("file, row 3: ") and "\n" not in str(error.value)
    rows = [train_row(image=name, solution="[]") for name in ("thin.png", "huge.png", "whole.jpg")]
    samples = load_samples(write_rows(tmp_path, rows), GROUNDING, skip_bad_rows=True)
    assert samples.skipped == 2 and len(samples) == 1


# ---- Geometry -------------------------------------------------------------------------------------------------------

def test_move_objects_scales_each_axis_by_its_own_factor_and_leaves_its_input_alone():
    objects = [{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}, {"point_2d": [1, 2], "label": "cat"}]
    before = json.dumps(objects)
    moved = move_objects(objects, (100, 80), (1000, 160))
    assert moved == [{"bbox_2d": [100, 40, 300, 80], "point_2d": [150, 50]}, {"point_2d": [10, 4]}]
    moved[0]["bbox_2d"][0] = -1
    assert json.dumps(objects) == before
    rounded = move_objects(objects, (100, 80), (33, 33), round_to_int=True)
    assert all(type(value) is int for found in rounded for numbers in found.values() for value in numbers)


def test_a_box_that_rounds_to_nothing_stays_one_unit_wide_and_high_inside_its_frame(qwen2):
    """Else the label would be a box without area, which earns nothing and teaches the policy to write such."""
    thin = [{"bbox_2d": [10.2, 0, 10.4, 80], "point_2d": [10.3, 40]}, {"bbox_2d": [99.8, 79.9, 100, 80]}]
    assert move_objects(thin, (100, 80), (100, 80), round_to_int=True) == [
        {"bbox_2d": [10, 0, 11, 80], "point_2d": [10, 40]}, {"bbox_2d": [99, 79, 100, 80]}]
    assert move_objects(thin[:1], (100, 80), (100, 80)) == thin[:1], "not rounded, not changed"
    image = Image.new("RGB", (9000, 6000))
    example = qwen2.encode(data.Sample("", "cat", image, [{"bbox_2d": [8999, 5999, 9000, 6000]}]), GROUNDING)
    assert example.frame == (1000, 1000) and example.objects == [{"bbox_2d": [999, 999, 1000, 1000]}]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("fixed", [(840, 840), (560, 1120), None])
def test_the_quokka_box_survives_the_way_to_the_model_and_back(processors, tmp_path, orientation, fixed):
    """The image is stored rotated, with an EXIF tag that says so; the label is that of the upright image."""
    box = json.loads((SHARED / "images" / "quokka_annotations.json").read_text())["bounding_boxes"][0]
    box = [box["x1"], box["y1"], box["x2"], box["y2"]]
    save_turned(Image.open(SHARED / "images" / "quokka.jpg"), orientation, tmp_path / "quokka.jpg")
    assert data.image_size(tmp_path / "quokka.jpg") == (960, 643)
    row = {"text": "the quokka", "image": "quokka.jpg", "bbox": box}
    [sample] = load_samples(write_rows(tmp_path, [row]), GROUNDING, "test")
    for processor in processors.values():
        example = processor.encode(sample, GROUNDING, image_size=fixed, max_pixels=None if fixed else 300_000)
        assert example.size == (960, 643)
        [back] = example.to_original(example.objects)
        assert np.abs(np.subtract(back["bbox_2d"], box)).max() <= 1
        assert example.truth[0]["bbox_2d"] == box
        expected = [round(v * f / s) for v, f, s in zip(box, example.frame * 2, (960, 643) * 2)]
        assert example.objects[0]["bbox_2d"] == expected


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("size", [(448, 448), (224, 560), None])
def test_boxes_land_on_the_pixels_the_model_sees(processors, tmp_path, orientation, size):
    """A dark rectangle on white, found again in the pixels that are sent, is where the label says."""
    processor, box = processors["qwen2_5_vl"], [40, 30, 180, 90]
    upright = Image.new("RGB", (400, 240), "white")
    upright.paste("black", tuple(box))
    save_turned(upright, orientation, tmp_path / "a.jpg")
    row = train_row(image="a.jpg", solution=[{"bbox_2d": box}], img_width=800, img_height=480)
    [sample] = load_samples(write_rows(tmp_path, [row]), GROUNDING)
    example = processor.encode(sample, GROUNDING, image_size=size, max_pixels=None if size else 40_000)
    _, grid_h, grid_w = example.grid_thw[0].tolist()
    # undo the patches: (h/2, w/2, 2, 2, 3, temporal, p, p) -> (H, W) of the first channel
    pixels = example.pixels.numpy().reshape(grid_h // 2, grid_w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, 0, 1]
    seen = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(grid_h * 14, grid_w * 14)
    ys, xs = np.nonzero(seen < 0)
    assert example.frame == (grid_w * 14, grid_h * 14)
    assert iou([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], example.objects[0]["bbox_2d"]) > 0.95
    assert example.truth[0]["bbox_2d"] == [80, 60, 360, 180] and example.size == (800, 480)


def test_labels_of_real_digits_move_with_their_images(processors, shared):
    """Squashed to 840x840 or resized by smart_resize, in either convention, labels stay on their digits."""
    for split, squashed in (("train", True), ("test", False)):
        samples = [s for s in load_samples(shared / "digits", GROUNDING, split, limit=12) if s.objects]
        assert len(samples) > 4
        for sample in samples:
            for processor in processors.values():
                for limits in ({}, {"max_pixels": 50_000}):
                    example = processor.encode(sample, GROUNDING, **limits)
                    width, height = (168, 168) if squashed else sample.size
                    for found, original in zip(example.objects, sample.objects):
                        sx, sy = example.frame[0] / width, example.frame[1] / height
                        expected = [v * s for v, s in zip(original["bbox_2d"], (sx, sy, sx, sy))]
                        assert iou(found["bbox_2d"], expected) > 0.9
                    assert move_objects(example.truth, sample.size, (width, height), True) == \
                        move_objects(sample.objects, (width, height), (width, height), True)
    assert processors["qwen2_vl"].encode(sample, GROUNDING).frame == (1000, 1000)
    assert processors["qwen2_5_vl"].encode(sample, GROUNDING).frame == (840, 840)


# ---- Prompts and tokens ---------------------------------------------------------------------------------------------

def test_texts_tokenise_to_the_golden_ids(processors):
    golden = json.loads((SHARED / "qwen2_vl" / "golden_tokens.json").read_text())
    assert len(golden) == 34
    for processor in processors.values():
        for case in golden:
            assert processor.token_ids(case["text"]).tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_the_prompt_is_the_checkpoints_chat_template(processors, name):
    processor = processors[name]
    sample = data.Sample("", "the cat", Image.new("RGB", (100, 60)), [])
    template = json.loads((SHARED / name / "chat_template.json").read_text())["chat_template"]
    for think in (True, False):
        example = processor.encode(sample, GROUNDING, think=think)
        text = GROUNDING.prompt("the cat", example.frame, think)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        expected = processor.tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert data.chat(text, 900) == expected.replace("<|image_pad|>", "<|image_pad|>" * 900)
        assert example.ids.tolist() == processor.tokenizer(data.chat(text, 900), add_special_tokens=False)["input_ids"]
        assert (example.ids == processor.image_token_id).sum() == 900
        assert f"to {example.frame[0]} at the right" in text and ("<think>" in text) == think and '"the cat"' in text
        assert parse_answer(text[text.rindex("For example:"):]), "the example in the prompt is an answer"


def test_a_label_is_tokenised_as_one_string(qwen2):
    text = label_text(TWO[:1])
    ids = qwen2.label_ids(text)
    assert ids.tolist() == qwen2.tokenizer(text + "<|im_end|>")["input_ids"]
    pieces = [qwen2.token_ids(piece).tolist() for piece in ("<answer>", text[8:-9], "</answer>", "<|im_end|>")]
    assert sum(pieces, []) != ids.tolist(), "merges run across the tags; if not, this test shows nothing"
    assert ids[-1] == qwen2.tokenizer.convert_tokens_to_ids("<|im_end|>") and qwen2.decode(ids) == text
    assert qwen2.decode(torch.cat([ids, ids])) == text and qwen2.decode(ids[:-1]) == text


def test_a_prompt_that_is_too_long_is_an_error_that_names_the_sample_and_both_numbers(qwen2):
    sample = data.Sample("", "the cat", Image.new("RGB", (100, 60)), [], where="a.jsonl, row 3")
    length = len(qwen2.encode(sample, GROUNDING).ids)
    assert len(qwen2.encode(sample, GROUNDING, max_prompt_length=length).ids) == length
    with pytest.raises(DataError, match=rf"^a.jsonl, row 3: .*{length} tokens.*--max_prompt_length {length - 1}"):
        qwen2.encode(sample, GROUNDING, max_prompt_length=length - 1)


def test_a_checkpoint_may_say_which_coordinates_it_speaks(qwen2, tmp_path):
    for file in (SHARED / "qwen2_vl").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"coordinates": "pixels"}))
    assert qwen2.coordinates == "relative" and Processor.from_pretrained(tmp_path).coordinates == "pixels"
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    limits = {"size": {"shortest_edge": images.pop("min_pixels"), "longest_edge": images.pop("max_pixels")}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images | limits))
    assert Processor.from_pretrained(tmp_path).max_pixels == qwen2.max_pixels


@pytest.mark.parametrize("fault", ["no folder", "preprocessor_config.json", "config.json", "tokenizer", "bad json",
                                   "other model", "other tokenizer"])
def test_a_bad_checkpoint_folder_is_one_line(shared, tmp_path, fault):
    folder = tmp_path / "checkpoint"
    if fault != "no folder":
        folder.mkdir()
        for file in (shared / "qwen2_vl").iterdir():
            shutil.copyfile(file, folder / file.name)
    if fault.endswith("json"):
        (folder / fault).unlink() if fault != "bad json" else (folder / "config.json").write_text("{")
    if fault == "tokenizer":
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).unlink()
    if fault == "other model":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    if fault == "other tokenizer":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(DataError) as error:
        Processor.from_pretrained(folder)
    assert str(folder) in str(error.value) and "--model" in str(error.value) and "\n" not in str(error.value)


# ---- Label text and its style ---------------------------------------------------------------------------------------

STYLES = {
    "compact": lambda objects: "<answer>" + json.dumps(objects, separators=(",", ":")) + "</answer>",
    "json.dumps": lambda objects: "<answer>" + json.dumps(objects) + "</answer>",
    "indented": lambda objects: "<answer>\n" + json.dumps(objects, indent=2) + "\n</answer>",
    "tabs": lambda objects: "<answer>" + json.dumps(objects, indent="\t") + " </answer>",
    "authors": lambda objects: "<answer>" + json.dumps(objects).replace(", ", ",").replace(
        '],"', '], "').replace("},{", "}, {") + "</answer>"}


def rollout(answer):
    return f"<think>Perhaps <answer>[ 1 ,  2 ]</answer>?</think>\n{answer}"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seen", [1, 2])
def test_the_label_takes_the_style_of_the_rollouts(style, seen):
    """Seen with one object or two, every style is written as its writer would, also for more objects than seen."""
    write, label_style = STYLES[style], LabelStyle(GROUNDING)
    label_style.observe(rollout(write([{"bbox_2d": [1, 2, 3, 44], "point_2d": [5, 6]}] * seen)))
    for objects in (TWO[:1], TWO, TWO + TWO):
        assert label_style.render(objects) == write(objects)
        assert parse_answer(label_style.render(objects)) == objects
    assert parse_answer(label_style.render([])) == []
    label_style.observe(rollout(write([])))
    assert label_style.render([]) == write([])
    assert label_style.example() == write([{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}])


def test_the_style_is_the_majoritys_with_one_vote_per_rollout():
    style = LabelStyle(GROUNDING)
    for name, objects in (("compact", TWO), ("compact", TWO[:1]), ("indented", TWO * 20), ("json.dumps", TWO)):
        style.observe(rollout(STYLES[name](objects)))
    assert style.render(TWO) == STYLES["compact"](TWO)
    for _ in range(3):
        style.observe(STYLES["json.dumps"](TWO))
    assert style.render(TWO) == STYLES["json.dumps"](TWO)


def test_without_rollouts_the_style_is_the_tasks_and_bad_rollouts_have_none():
    style = LabelStyle(GROUNDING)
    compact = STYLES["compact"](TWO)
    for garbage in ("", "hello", "<answer>", "<answer>[1</answer>", "<answer>[{]}</answer>", compact[:-1],
                    f"<think>{compact}", f"<think>{compact}</think>", compact.replace(",", "," + " " * 100),
                    compact + "<answer>", "<answer>" + "[" * 5000 + "]" * 5000 + "</answer>"):
        style.observe(garbage)
        assert style.state_dict() == {}, garbage
    assert style.render(TWO) == label_text(TWO) == STYLES["json.dumps"](TWO)
    style.observe(f"<think>{STYLES['indented'](TWO)}</think>{compact}<think>{STYLES['indented'](TWO)}")
    assert style.render(TWO) == compact, "the answer that counts is the last outside the thinking"


def test_empty_answers_do_not_spoil_the_style_of_full_ones():
    style = LabelStyle(GROUNDING)
    style.observe("<answer> []\n</answer>")
    assert style.render([]) == "<answer> []\n</answer>"
    assert style.render(TWO) == f"<answer> {json.dumps(TWO)}\n</answer>"


def test_the_style_survives_a_resume():
    style, resumed = LabelStyle(GROUNDING), LabelStyle(GROUNDING)
    for name in ("compact", "indented", "indented"):
        style.observe(STYLES[name](TWO))
    resumed.load_state_dict(json.loads(json.dumps(style.state_dict())))
    assert resumed.render(TWO) == style.render(TWO) == STYLES["indented"](TWO)
    for _ in range(2):
        for one in (style, resumed):
            one.observe(STYLES["compact"](TWO))
    assert style.render(TWO) == resumed.render(TWO) == STYLES["compact"](TWO)


def test_labels_without_alignment_are_the_data_sets_bytes(processors, shared):
    """The real training labels in Qwen2.5-VL's pixels of the stored image; moved to 0 to 1000 they keep their style."""
    samples = load_samples(shared / "parquet" / "train", GROUNDING)
    samples += load_samples(shared / "digits", GROUNDING, limit=40)
    assert any(not s.objects for s in samples) and any(len(s.objects) > 2 for s in samples)
    for sample in samples:
        example = processors["qwen2_5_vl"].encode(sample, GROUNDING, image_size=data.image_size(sample.image))
        assert example.written_label() == f"<answer>{sample.solution}</answer>"
        for spacing in ((",", ":"), (", ", ":")):
            sample.solution = json.dumps(sample.objects, separators=spacing)
            example = processors["qwen2_vl"].encode(sample, GROUNDING, image_size=(56, 56))
            assert example.written_label() == f"<answer>{json.dumps(example.objects, separators=spacing)}</answer>"
    example.sample.solution = None
    assert example.written_label() == f"<answer>{json.dumps(example.objects)}</answer>"


# ---- Loading --------------------------------------------------------------------------------------------------------

def same(a, b):
    fields = ("question", "objects", "frame", "size", "solution")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and \
        np.array_equal(np.asarray(data.open_image(a.image)), np.asarray(data.open_image(b.image)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_json_lines_and_parquet_give_the_same_samples(shared, tmp_path, split):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(shared / "digits" / f"digits_{split}.parquet").to_pylist()
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        row["image"] = f"{number}.jpg"
        if split == "test" and len(row["bbox"]) == 1 and number % 2:
            row["bbox"] = row["bbox"][0]                         # one flat box is allowed
    ours = load_samples(write_rows(tmp_path, rows), GROUNDING, split)
    theirs = load_samples(shared / "digits", GROUNDING, split)
    assert len(ours) == len(theirs) == {"train": 480, "test": 120}[split]
    assert all(map(same, ours, theirs)) and theirs.clipped == ours.clipped == theirs.skipped == 0
    assert {s.id for s in ours} == {s.id for s in theirs} and any(not s.objects for s in ours)
    assert [s.id for s in load_samples(shared / "digits", GROUNDING, split, limit=7)] == [s.id for s in theirs[:7]]
    assert theirs[2].where.endswith(f"digits_{split}.parquet, row 3")


def test_the_authors_layouts(shared):
    first, _ = load_samples(shared / "parquet" / "train", GROUNDING)
    assert first.objects == [{"bbox_2d": [130, 65, 481, 839], "point_2d": [274, 353]}]
    assert data.image_size(first.image) == (840, 840) and first.size == (960, 643) and first.frame is None
    [test] = load_samples(shared / "parquet" / "test", GROUNDING, "test")
    assert test.objects == [{"bbox_2d": [148, 50, 550, 642], "point_2d": [349, 346]}]
    assert test.size == test.frame == data.image_size(test.image) == (960, 643)
    trained = move_objects(first.objects, (840, 840), first.size)[0]["bbox_2d"]
    assert iou(trained, test.objects[0]["bbox_2d"]) > 0.98, "the same quokka in both layouts"
    with pytest.raises(DataError, match="lines file of the test split"):
        load_samples(shared / "parquet" / "train", GROUNDING, "test")


MISTAKES = {
    "not JSON": '{"problem": ',
    "not JSON ": '{"problem": "\\ud8"}',
    "not a JSON object": "[1, 2]",
    "no 'solution' or": {"problem": "the cat", "image": "image.png"},
    "no 'problem' or 'text'": {"image": "image.png"},
    "no 'solution' or 'bbox' or 'mask'": {"image": "image.png", "text": "the cat", "bbox": None},
    "no 'image'": train_row(image=None),
    "the question ('problem') is empty": train_row(problem=" \n"),
    "the question ('problem') is empty ": train_row(problem="<image>"),
    "the question ('problem') is not text": train_row(problem=7),
    "control token ": train_row(choices=["<|image_pad|>"]),
    "control token": train_row(problem="a cat <|image_pad|>?"),
    "nowhere.png": train_row(image="nowhere.png"),
    "unreadable image": train_row(image=""),
    "the image is empty": train_row(image={"bytes": None, "path": None}),
    "unreadable image  ": train_row(image="rows.jsonl"),
    "not JSON  ": train_row(solution="[{'bbox_2d': [1, 2, 3, 4]}]"),
    "not JSON   ": train_row(solution="[" * 100_000),
    "the label is not a list": train_row(solution='{"bbox_2d": [1, 2, 3, 4]}'),
    "bbox_2d is not a list of 4": train_row(solution="[7]"),
    "bbox_2d is not a list of 4 ": train_row(solution='[{"point_2d": [1, 2]}]'),
    "bbox_2d is not a list of 4  ": train_row(solution='[{"bbox_2d": [1, 2, 3]}]'),
    "bbox_2d is not a list of 4   ": train_row(solution='[{"bbox_2d": [1, 2, 3, NaN]}]'),
    "bbox_2d is not a list of 4    ": train_row(solution='[{"bbox_2d": [1, 2, 3, Infinity]}]'),
    "bbox_2d is not a list of 4     ": train_row(solution='[{"bbox_2d": [1, 2, 3, "4"]}]'),
    "bbox_2d is not a list of 4      ": {"text": "cat", "image": "image.png", "bbox": [[1, 2, 3]]},
    "point_2d is not a list of 2": train_row(solution='[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1]}]'),
    "inside out": train_row(solution='[{"bbox_2d": [30, 20, 10, 40]}]'),
    "inside out ": {"text": "cat", "image": "image.png", "bbox": [10, 40, 30, 40]},
    "outside its image of 100 x 80": train_row(solution='[{"bbox_2d": [10, 80, 20, 90]}]'),
    "outside its image of 200 x 300": {"text": "cat", "image": "image.png", "bbox": [200, 5, 210, 9],
                                       "img_width": 200, "img_height": 300},
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_a_bad_row_is_named_in_one_line_or_skipped_and_counted(tmp_path, complaint):
    file = write_rows(tmp_path, [train_row(), "", MISTAKES[complaint], train_row()])
    with pytest.raises(DataError) as error:
        load_samples(file, GROUNDING)
    message = str(error.value)
    assert message.startswith(f"{file}, row 3: ") and complaint.strip() in message and "--skip_bad_rows" in message
    assert "\n" not in message and len(message) < 500
    samples = load_samples(file, GROUNDING, skip_bad_rows=True)
    assert [s.where for s in samples] == [f"{file}, row 1", f"{file}, row 4"] and samples.skipped == 1


def test_bad_bytes_and_bad_parquet_rows_are_named_too(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = write_rows(tmp_path, [train_row()])
    file.write_bytes(file.read_bytes() + b'{"problem": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="row 2: not JSON"):
        load_samples(file, GROUNDING)
    image = {"bytes": png_bytes(Image.new("RGB", (100, 80))), "path": None}
    rows = [train_row(image=image), train_row(image={"bytes": b"no image", "path": None})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet, row 2: unreadable image"):
        load_samples(tmp_path / "rows.parquet", GROUNDING)
    assert load_samples(tmp_path / "rows.parquet", GROUNDING, skip_bad_rows=True).skipped == 1
    parquet.write_table(pyarrow.table({"answer": ["7"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="other.parquet, row 1: no 'image' or 'images'"):
        load_samples(tmp_path / "other.parquet", GROUNDING)


def test_overshoot_is_clipped_and_counted(tmp_path):
    solution = [{"bbox_2d": [-2, 20, 101, 81], "point_2d": [50, 50]}, {"bbox_2d": [0, 0, 100, 80]}]
    samples = load_samples(write_rows(tmp_path, [train_row(solution=solution), train_row()]), GROUNDING)
    assert samples[0].objects[0] == {"bbox_2d": [0, 20, 100, 80], "point_2d": [50, 50]}
    assert samples.clipped == 1 and samples.skipped == 0


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    def complaint(source, split="train"):
        with pytest.raises(DataError) as error:
            load_samples(source, GROUNDING, split)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nowhere.jsonl: no such file" in complaint("nowhere.jsonl")
    assert "no such file" in complaint("data/nowhere.parquet") and "no such file" in complaint(tmp_path / "a" / "b")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no usable rows" in complaint(tmp_path / "empty.jsonl")
    pytest.importorskip("pyarrow")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert "cut.parquet: not readable as Parquet" in complaint(tmp_path / "cut.parquet")
    (tmp_path / "folder").mkdir()
    assert "file of the train split" in complaint(tmp_path / "folder")

    def offline(name, **options):
        raise OSError("we are\noffline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "OSError: we are offline" in complaint("owner/name") and "--data PATH" in complaint("owner/name")
    assert GROUNDING.data in complaint(None) and GROUNDING.eval_data in complaint(None, "test")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in complaint("owner/name")
    assert "pip install pyarrow" in complaint(tmp_path / "cut.parquet")


def test_a_hub_id_is_downloaded_and_read(shared, monkeypatch):
    def download(name, repo_type, ignore_patterns):
        assert (name, repo_type) == ("owner/name", "dataset") and "*.py" in ignore_patterns
        return str(shared / "parquet" / "train")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert [s.id for s in load_samples("owner/name", GROUNDING)] == ["quokka_0", "SOAP_061_alive"]


# ---- The built-in task ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def digits():
    return load_samples("builtin", DIGITS, limit=400)


def test_pictures_are_the_same_every_time_and_disjoint_between_splits(digits):
    again = digits_sample("train", 17)
    assert same(again, digits[17]) and again.scene == digits[17].scene
    pictures = [s.image.tobytes() for split in data.SPLITS for s in load_samples(None, DIGITS, split, limit=200)]
    assert len(set(pictures)) == 600


def test_the_built_in_splits_have_an_end_and_a_limit_is_at_least_one_sample():
    assert len(load_samples("builtin", DIGITS, "test", limit=401)) == len(load_samples(None, DIGITS, "test")) == 400
    assert len(load_samples("builtin", DIGITS, limit=1)) == 1
    for limit in (0, -1):
        with pytest.raises(DataError, match=f"limit is {limit}"):
            load_samples("builtin", DIGITS, limit=limit)


def test_boxes_are_tight_around_the_pixels_drawn(digits):
    """Measured in the picture: the digits are saturated, what is around them is nearly grey."""
    for sample in digits[:150]:
        assert sample.image.size == (48, 48) and sample.image.mode == "RGB"
        picture = np.asarray(sample.image, float)
        saturation = picture.max(axis=2) - picture.min(axis=2)
        explained = np.zeros((48, 48), bool)
        for digit in sample.scene:
            x1, y1, x2, y2 = digit["bbox_2d"]
            left, top = 24 * (digit["quarter"] % 2), 24 * (digit["quarter"] // 2)
            assert left <= x1 and top <= y1 and x2 <= left + 24 and y2 <= top + 24
            assert 14 <= y2 - y1 <= 23 and 4 <= x2 - x1 <= 23
            box = saturation[y1:y2, x1:x2]
            assert min(edge.max() for edge in (box[0], box[-1], box[:, 0], box[:, -1])) > 45
            colour = np.median(picture[y1:y2, x1:x2][box > 100], axis=0)
            assert min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).sum()) == digit["colour"]
            explained[y1:y2, x1:x2] = True
        assert not (saturation > 60)[~explained].any(), "nothing is drawn outside the boxes"


def test_no_handwriting_is_in_two_splits():
    """By the pictures of the digits themselves, not by the numbers that choose them."""
    tiles = {split: {HANDWRITING[8 * value:8 * value + 8, 8 * i:8 * i + 8].tobytes()
                     for value in range(len(VALUES)) for i in range(*part)} for split, part in PART.items()}
    assert not tiles["train"] & tiles["validation"] and not (tiles["train"] | tiles["validation"]) & tiles["test"]
    assert set(PART) == set(data.SPLITS) and HANDWRITING.shape == (8 * len(VALUES), 8 * 176)


def meant(question: str, scene: list[dict]) -> list[dict]:
    """The digits a question means, found from the positions of the boxes alone."""
    relation, _, word = question.removeprefix("find the ").removeprefix("one ").rpartition("the ")
    word = SYNONYMS.get(word, word)
    named = [digit for digit in scene if word in (digit["colour"], digit["value"])]
    if not relation:
        return named
    [anchor] = named
    axis, sign = {"left of ": (0, -1), "right of ": (0, 1), "above ": (1, -1), "below ": (1, 1)}[relation]
    half = lambda digit, axis: digit["point_2d"][axis] >= 24
    return [digit for digit in scene if half(digit, 1 - axis) == half(anchor, 1 - axis)
            and half(digit, axis) - half(anchor, axis) == sign]


def test_every_question_means_its_label(digits):
    for sample in digits:
        found = meant(sample.question, sample.scene)
        assert sample.objects == [{name: digit[name] for name in ("bbox_2d", "point_2d")} for digit in found]
        assert (len(sample.objects) == 0) == sample.id.endswith(" absent")


def test_the_four_sorts_of_question_are_equally_frequent_and_use_all_words(digits):
    sorts = {sort: [s.question for s in digits if s.id.split(" ", 1)[1] == sort] for sort in QUESTIONS}
    assert {len(questions) for questions in sorts.values()} == {100}
    assert {q.split()[-1] for q in sorts["new word"]} == set(SYNONYMS)
    for sort in ("known", "absent", "two-hop"):
        assert {q.split()[-1] for q in sorts[sort]} == {*COLOURS, *VALUES}, sort
    assert all(any(f" {relation} " in q for q in sorts["two-hop"]) for relation in NEIGHBOURS)
    assert len({s.objects[0]["bbox_2d"][0] for s in digits if s.objects}) > 25, "digits are everywhere"
    assert {len(s.scene) for s in digits} == {3, 4}
    for sample in digits:
        assert len({digit["quarter"] for digit in sample.scene}) == len(sample.scene)
        for name in ("colour", "value"):
            assert len({digit[name] for digit in sample.scene}) == len(sample.scene), "one word names each"


def test_the_built_in_task_encodes(processors, digits):
    example = processors["qwen2_vl"].encode(digits[0], DIGITS, image_size=(56, 56))
    assert digits[0].question in processors["qwen2_vl"].tokenizer.decode(example.ids)
    assert DIGITS.thresholds == {"iou": 0.5, "box_l1": pytest.approx(35), "point": pytest.approx(70)}
    assert Path(DIGITS.model).is_absolute() and data.TASKS["digits"] == DIGITS
