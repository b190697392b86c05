"""Make the bundled data set `assets/digits`: three or four handwritten digits on a noisy ground.

    python extras/make_digits.py        # the same three files each time; takes some seconds

Each quarter of a picture holds one digit or none. No two digits of a picture share a colour or a
value, so that one word names each of them. The questions are of four sorts, in turn:

    known     "find the red": the bundled network can do it
    two-hop   "find the one left of the five": it can, if it thinks of the five's place first
    new word  "find the trio": a word for a colour or value that it was never taught
    absent    "find the cyan", of which there is none: the label is []

The sort is the part of a sample's id after its first space: "train-3 absent".

The handwriting in digits.png is the UCI data set "Optical Recognition of Handwritten Digits" as
scikit-learn ships it (E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0): 176 pictures
of 8x8 pixels for each digit up to 5. No picture of a digit is in two splits.
"""

import argparse
import base64
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
SIZE = 400                               # samples in each split
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 210, 40),
    "purple": (150, 55, 190),
    "cyan": (50, 200, 215),
}
VALUES = ("zero", "one", "two", "three", "four", "five")
# One row of pictures for each value, and which of them a split may use.
HANDWRITING = np.asarray(Image.open(HERE / "digits.png").convert("L"))
PART = {"train": (0, 120), "validation": (120, 148), "test": (148, 176)}
# Words that the bundled network was never taught.
SYNONYMS = {"crimson": "red", "azure": "blue", "pair": "two", "trio": "three"}
PLACES = ("northwest", "northeast", "southwest", "southeast")            # of quarters 0 to 3
NEIGHBOURS = {
    "left of": {1: 0, 3: 2},
    "right of": {0: 1, 2: 3},
    "above": {2: 0, 3: 1},
    "below": {0: 2, 1: 3},
}
QUESTIONS = ("known", "two-hop", "new word", "absent")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "assets" / "digits")
    directory = parser.parse_args().output
    directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(make_row(split, index)) + "\n" for index in range(SIZE)]
        unfinished = directory / f"{split}.jsonl.unfinished"
        unfinished.write_text("".join(lines))
        os.replace(unfinished, directory / f"{split}.jsonl")
        print(f"{directory / split}.jsonl: {SIZE} rows, {sum(map(len, lines)) / 1e6:.2f} MB")


def make_row(split: str, index: int) -> dict:
    """A row of the data set in the training layout, with the picture inside it."""
    sample = make_sample(split, index)
    # Lossless, the noise of 1,200 pictures would take 4.7 MB.
    buffer = io.BytesIO()
    sample["image"].save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return {
        "id": sample["id"],
        "problem": sample["question"],
        "solution": json.dumps(sample["objects"]),
        "image": f"data:image/jpeg;base64,{picture}",
    }


def make_sample(split: str, index: int) -> dict:
    """The index-th sample of a split, always the same: id, question, image, objects and scene."""
    rng = np.random.default_rng([SPLITS.index(split), index])
    sort = QUESTIONS[index % len(QUESTIONS)]
    question = None
    # Not every picture has an answer to every sort of question.
    while question is None:
        image, scene = draw(rng, split)
        question, target = ask(sort, scene, rng)
    objects = []
    if target is not None:
        objects = [{name: target[name] for name in ("bbox_2d", "point_2d")}]
    return {
        "id": f"{split}-{index} {sort}",
        "question": f"find the {question}",
        "image": image,
        "objects": objects,
        "scene": scene,
    }


def ask(sort: str, scene: list[dict], rng) -> tuple[str | None, dict | None]:
    """What to find, and the digit that is meant; (None, None) if the picture does not allow it."""
    if sort == "absent":
        present = {digit[name] for digit in scene for name in ("colour", "value")}
        words = [word for word in (*COLOURS, *VALUES) if word not in present]
        return str(rng.choice(words)), None
    digit = scene[rng.integers(len(scene))]
    word = digit[rng.choice(["colour", "value"])]
    if sort == "known":
        return word, digit
    if sort == "new word":
        words = [new for new, old in SYNONYMS.items() if old in (digit["colour"], digit["value"])]
        return (str(rng.choice(words)), digit) if words else (None, None)
    return ask_two_hop(digit, word, scene, rng)


def ask_two_hop(digit: dict, word: str, scene: list[dict], rng) -> tuple[str | None, dict | None]:
    """A question for a neighbour of the digit that a word names."""
    found = []
    for relation, quarters in NEIGHBOURS.items():
        for other in scene:
            if quarters.get(digit["quarter"]) == other["quarter"]:
                found.append((relation, other))
    if not found:
        return None, None
    relation, other = found[rng.integers(len(found))]
    return f"one {relation} the {word}", other


def draw(rng, split: str = "train") -> tuple[Image.Image, list[dict]]:
    """A picture of 48x48 pixels, and its digits.

    A digit has a colour, a value, a quarter (0 to 3), its bbox_2d in pixels, and that box's centre
    as point_2d.
    """
    tone = rng.choice([45, 205]) + rng.integers(-25, 26)
    coarse = rng.integers(tone - 18, tone + 19, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
    picture = np.asarray(smooth) + rng.normal(0, 3, (48, 48, 3))
    colours = rng.permutation(list(COLOURS))
    values = rng.permutation(len(VALUES))
    quarters = rng.permutation(4)[:rng.integers(3, 5)]
    scene = []
    for colour, value, quarter in zip(colours, values, quarters):
        ink = write(value, rng.integers(*PART[split]), rng.integers(16, 23))     # (h, w)
        h, w = ink.shape
        x = 24 * (quarter % 2) + rng.integers(25 - w)
        y = 24 * (quarter // 2) + rng.integers(25 - h)
        shade = COLOURS[colour] + rng.integers(-10, 11, 3)
        picture[y:y + h, x:x + w] += ink[:, :, None] * (shade - picture[y:y + h, x:x + w])
        scene.append({
            "colour": str(colour),
            "value": VALUES[value],
            "quarter": int(quarter),
            "bbox_2d": [int(x), int(y), int(x + w), int(y + h)],
            "point_2d": [int(x + w // 2), int(y + h // 2)],
        })
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), scene


def write(value: int, which: int, size: int) -> np.ndarray:
    """A digit as (height, width) of ink from 0 to 1, cut tightly around its strokes.

    size: the side in pixels that its 8x8 pixels are enlarged to before they are cut.
    """
    tile = Image.fromarray(HANDWRITING[8 * value:8 * value + 8, 8 * which:8 * which + 8])
    ink = np.asarray(tile.resize((size, size), Image.Resampling.BICUBIC)) / 255
    ys, xs = np.nonzero(ink > 0.35)
    return np.clip(1.5 * ink[ys.min():ys.max() + 1, xs.min():xs.max() + 1], 0, 1)


if __name__ == "__main__":
    main()
