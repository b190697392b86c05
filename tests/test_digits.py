"""The bundled data set and checkpoint are what their scripts in extras/ make, and are read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data
import make_digits
import make_tiny
from data import TASKS, Processor, load_samples

DIGITS = TASKS["digits"]


@pytest.fixture(scope="session")
def digits():
    """The samples of each split as the generator makes them, before they are compressed."""
    return {split: [make_digits.make_sample(split, i) for i in range(make_digits.SIZE)]
            for split in make_digits.SPLITS}


def test_the_bundled_data_are_what_their_script_makes(digits):
    """Ids, questions and labels exactly; pictures as far as JPEG keeps them."""
    for split in make_digits.SPLITS:
        samples = load_samples(None, DIGITS, split) if split != "validation" else \
            load_samples(ROOT / "assets" / "digits", DIGITS, split)
        assert len(samples) == 400
        for sample, made in zip(samples, digits[split]):
            assert (sample.id, sample.question, sample.label) == (
                made["id"], made["question"], made["objects"])
            assert sample.frame == sample.size == (48, 48)
            shown = np.asarray(data.open_image(sample.image), float)
            assert np.sqrt(((shown - np.asarray(made["image"])) ** 2).mean()) < 8
    total = sum(file.stat().st_size for file in (ROOT / "assets" / "digits").iterdir())
    assert total < 3e6


def test_boxes_are_tight_around_the_pixels_drawn(digits):
    """Measured in the picture: the digits are saturated, what is around them is nearly grey."""
    for sample in digits["train"][:150]:
        picture = np.asarray(sample["image"], float)
        assert picture.shape == (48, 48, 3)
        saturation = picture.max(axis=2) - picture.min(axis=2)
        explained = np.zeros((48, 48), bool)
        for digit in sample["scene"]:
            x1, y1, x2, y2 = digit["bbox_2d"]
            left, top = 24 * (digit["quarter"] % 2), 24 * (digit["quarter"] // 2)
            assert left <= x1 and top <= y1 and x2 <= left + 24 and y2 <= top + 24
            assert 14 <= y2 - y1 <= 23 and 4 <= x2 - x1 <= 23
            box = saturation[y1:y2, x1:x2]
            assert min(edge.max() for edge in (box[0], box[-1], box[:, 0], box[:, -1])) > 45
            colour = np.median(picture[y1:y2, x1:x2][box > 100], axis=0)
            distances = {name: np.abs(colour - shade).sum()
                         for name, shade in make_digits.COLOURS.items()}
            assert min(distances, key=distances.get) == digit["colour"]
            explained[y1:y2, x1:x2] = True
        assert not (saturation > 60)[~explained].any(), "nothing is drawn outside the boxes"


def test_no_handwriting_is_in_two_splits():
    """By the pictures of the digits themselves, not by the numbers that choose them."""
    ink, tiles = make_digits.HANDWRITING, {}
    for split, part in make_digits.PART.items():
        tiles[split] = {ink[8 * value:8 * value + 8, 8 * i:8 * i + 8].tobytes()
                        for value in range(len(make_digits.VALUES)) for i in range(*part)}
    assert not tiles["train"] & tiles["validation"]
    assert not (tiles["train"] | tiles["validation"]) & tiles["test"]
    assert ink.shape == (8 * len(make_digits.VALUES), 8 * 176)


def meant(question: str, scene: list[dict]) -> list[dict]:
    """The digits a question means, found from the positions of the boxes alone."""
    relation, _, word = question.removeprefix("find the ").removeprefix("one ").rpartition("the ")
    word = make_digits.SYNONYMS.get(word, word)
    named = [digit for digit in scene if word in (digit["colour"], digit["value"])]
    if not relation:
        return named
    [anchor] = named
    directions = {"left of ": (0, -1), "right of ": (0, 1), "above ": (1, -1), "below ": (1, 1)}
    axis, sign = directions[relation]

    def half(digit, axis):
        return int(digit["point_2d"][axis] >= 24)

    return [digit for digit in scene if half(digit, 1 - axis) == half(anchor, 1 - axis)
            and half(digit, axis) - half(anchor, axis) == sign]


def test_every_question_means_its_label(digits):
    for sample in digits["train"] + digits["test"]:
        found = meant(sample["question"], sample["scene"])
        fields = ("bbox_2d", "point_2d")
        assert sample["objects"] == [{name: digit[name] for name in fields} for digit in found]
        assert (sample["objects"] == []) == sample["id"].endswith(" absent")


def test_the_four_sorts_of_question_are_equally_frequent_and_use_all_words(digits):
    last_words = {}
    for sample in digits["train"]:
        sort = sample["id"].split(" ", 1)[1]
        last_words.setdefault(sort, []).append(sample["question"].split()[-1])
    assert {len(words) for words in last_words.values()} == {100}
    assert set(last_words.pop("new word")) == set(make_digits.SYNONYMS)
    assert set(last_words) == {"known", "two-hop", "absent"}
    for words in last_words.values():
        assert set(words) == {*make_digits.COLOURS, *make_digits.VALUES}


def test_the_bundled_checkpoint_reads_the_bundled_data():
    """Its prompt is Qwen2-VL's, but its coordinates are pixels, as its config.json says."""
    processor = Processor(DIGITS.model, DIGITS)
    sample = load_samples(None, DIGITS, limit=1)[0]
    example = processor.encode(sample)
    chat = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
            f"{sample.question}<|im_end|>\n<|im_start|>assistant\n")
    assert example.ids.tolist() == processor.token_ids(chat).tolist()
    assert processor.tokenizer.unk_token_id not in example.ids, "its words are all known"
    assert example.frame == (48, 48) and example.pixels.shape == (64, 216)
    assert DIGITS.reward.keywords == pytest.approx({"l1_below": 35, "distance_below": 70})
    assert Path(DIGITS.model).is_absolute() and Path(DIGITS.data).is_absolute()
    template = (Path(DIGITS.model) / "chat_template.jinja").read_text()
    assert template == make_tiny.CHAT_TEMPLATE


def test_the_bundled_checkpoints_script_still_trains(tmp_path, monkeypatch, capsys):
    """A few steps of each stage give a checkpoint that loads, with the bundled one's tokenizer."""
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--output", str(tmp_path / "tiny"),
                                      "--seeing_steps", "1", "--matching_steps", "1",
                                      "--answering_steps", "1"])
    make_tiny.main()
    made = (tmp_path / "tiny" / "tokenizer.json").read_text()
    assert made == (Path(DIGITS.model) / "tokenizer.json").read_text()
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["vision_config"]["patch_size"] == 6 and config["coordinates"] == "pixels"
    Processor(tmp_path / "tiny", DIGITS)
    make_tiny.model.load_pretrained(tmp_path / "tiny")
