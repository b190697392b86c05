"""The built-in task `digits`: three or four handwritten digits in colour on a noisy ground, and a question about them.

Demo material, like the bundled checkpoint beside this file: nothing of the method depends on it. Each quarter of a
picture holds one digit or none; no two of a picture share a colour or a value, so that one word names each.

The handwriting, in digits.png, is the UCI "Optical Recognition of Handwritten Digits" data as scikit-learn ships it
(E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0): 176 pictures, 8x8 pixels each, of every digit up to 5.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from data import SPLITS, Sample

COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 225), "yellow": (235, 210, 40),
           "purple": (150, 55, 190), "cyan": (50, 200, 215)}
VALUES = ("zero", "one", "two", "three", "four", "five")
HANDWRITING = np.asarray(Image.open(Path(__file__).parent / "digits.png").convert("L"))  # a row for each value
PART = {"train": (0, 120), "validation": (120, 148), "test": (148, 176)}                 # none is in two splits
SYNONYMS = {"crimson": "red", "azure": "blue", "pair": "two", "trio": "three"}           # words the base never met
PLACES = ("northwest", "northeast", "southwest", "southeast")                            # of quarter 0, 1, 2, 3
NEIGHBOURS = {"left of": {1: 0, 3: 2}, "right of": {0: 1, 2: 3}, "above": {2: 0, 3: 1}, "below": {0: 2, 1: 3}}
QUESTIONS = ("known", "two-hop", "new word", "absent")
SIZE = {"train": 400, "validation": 400, "test": 400}


def digits_sample(split: str, index: int) -> Sample:
    """The index-th sample of a split, always the same: 48x48 pixels, and a question of one of four sorts in turn.

    known     "find the red": the base network can do it
    two-hop   "find the one left of the five": it can, if it thinks of the five's place first
    new word  "find the trio": a word for a colour or value that it was never taught
    absent    "find the cyan", of which there is none: the label is []

    The sort is what follows the first space of the sample's id.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    sort, question = QUESTIONS[index % len(QUESTIONS)], None
    while question is None:              # not every picture has an answer to such a question
        image, scene = draw(rng, split)
        question, target = ask(sort, scene, rng)
    objects = [{name: target[name] for name in ("bbox_2d", "point_2d")}] if target else []
    return Sample(f"{split}-{index} {sort}", f"find the {question}", image, objects, scene=scene,
                  where=f"built-in {split} picture {index}")


def ask(sort: str, scene: list[dict], rng) -> tuple[str | None, dict | None]:
    """What to find and the digit that is meant; (None, None) where this picture cannot be asked such a question."""
    if sort == "absent":
        there = {digit[name] for digit in scene for name in ("colour", "value")}
        return str(rng.choice([word for word in (*COLOURS, *VALUES) if word not in there])), None
    digit = scene[rng.integers(len(scene))]
    word = digit[rng.choice(["colour", "value"])]
    if sort == "known":
        return word, digit
    if sort == "new word":
        words = [new for new, old in SYNONYMS.items() if old in (digit["colour"], digit["value"])]
        return (str(rng.choice(words)), digit) if words else (None, None)
    found = [(relation, other) for relation, quarters in NEIGHBOURS.items() for other in scene
             if quarters.get(digit["quarter"]) == other["quarter"]]
    if not found:
        return None, None
    relation, other = found[rng.integers(len(found))]
    return f"one {relation} the {word}", other


def draw(rng, split: str = "train") -> tuple[Image.Image, list[dict]]:
    """A picture, and its digits: colour, value, quarter, bbox_2d and its centre, point_2d, in pixels."""
    tone = rng.choice([45, 205]) + rng.integers(-25, 26)
    coarse = rng.integers(tone - 18, tone + 19, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
    picture, scene = np.asarray(smooth) + rng.normal(0, 3, (48, 48, 3)), []
    looks = zip(rng.permutation(list(COLOURS)), rng.permutation(len(VALUES)), rng.permutation(4)[:rng.integers(3, 5)])
    for colour, value, quarter in looks:
        ink = write(value, rng.integers(*PART[split]), rng.integers(16, 23))     # (h, w)
        h, w = ink.shape
        x, y = 24 * (quarter % 2) + rng.integers(25 - w), 24 * (quarter // 2) + rng.integers(25 - h)
        shade = COLOURS[colour] + rng.integers(-10, 11, 3)
        picture[y:y + h, x:x + w] += ink[:, :, None] * (shade - picture[y:y + h, x:x + w])
        scene.append({"colour": str(colour), "value": VALUES[value], "quarter": int(quarter),
                      "bbox_2d": [int(x), int(y), int(x + w), int(y + h)],
                      "point_2d": [int(x + w // 2), int(y + h // 2)]})
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), scene


def write(value: int, which: int, size: int) -> np.ndarray:
    """A digit as (height, width) of ink from 0 to 1, cut tightly around what is written; size: of its 8x8 pixels."""
    tile = Image.fromarray(HANDWRITING[8 * value:8 * value + 8, 8 * which:8 * which + 8])
    ink = np.asarray(tile.resize((size, size), Image.Resampling.BICUBIC)) / 255
    ys, xs = np.nonzero(ink > 0.35)
    return np.clip(1.5 * ink[ys.min():ys.max() + 1, xs.min():xs.max() + 1], 0, 1)
