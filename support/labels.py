"""From a row's label to objects or text: boxes, points, masks, numbers, words, choices, each checked.

A row has its label in one of the columns that its task names (Task.columns):

    solution, bbox    objects as JSON or as a list: {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]} each, or just
                      [x1, y1, x2, y2]; one flat box; [] for nothing to find
    mask              rows of 0 and 1, or an image: its box, and a point inside
    answer, count     a number or words
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewards import boxed
from support.masks import keep_mask, mask_objects, read_mask
from support.sources import DataError, from_json, require
from support.tasks import Frame, Task

@dataclass
class Label:
    """What a row says is right."""

    objects: list[dict] | str            # in `frame`, or what stands between the answer tags
    frame: Frame | None                  # None: pixels of the stored image
    text: str | None = None              # objects as the row wrote them, if as text
    clipped: int = 0                     # how many objects were cut to their frame

def read_label(row: dict, task: Task, folder: Path, frame: Frame | None, stored: Frame) -> Label:
    """The label of a row, whose coordinates are in `frame`, or else in pixels of the image as stored; or DataError."""
    column, value = first_of(row, *task.columns)
    if column in ("answer", "count") or "bbox" not in task.columns:
        return Label(task.text_answer.format(short_answer(value, task, row.get("choices"))), frame)
    if column == "mask":
        mask = read_mask(keep_mask(value, folder))
        return Label(mask_objects(mask), mask.shape[::-1])
    objects = from_json(value)
    require(isinstance(objects, list), f"the label is not a list: {str(value)[:80]}")
    if objects and not isinstance(objects[0], (dict, list)):
        objects = [objects]              # one flat box
    found = [clip_object(found, frame or stored, task.needs_box) for found in objects]
    text = value if isinstance(value, str) and column == "solution" else None
    return Label([inside for inside, _ in found], frame, text, sum(cut for _, cut in found))

def first_of(row: dict, *names) -> tuple[str, object]:
    """The first of some columns that a row has, by name and value; DataError if it has none of them."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise DataError(f"no {' or '.join(map(repr, names))}; a row has an image, a problem or text, and a label")

def read_frame(sides) -> Frame | None:
    """The (width, height) that a row states, checked; None where it states none."""
    if sides is None or sides == [None, None]:
        return None
    require(isinstance(sides, list) and [type(side) in (int, float) and 0 < side < 1e9 for side in sides] == [True] * 2,
            f"not a width and a height: {str(sides)[:80]}")
    return tuple(sides)

def short_answer(value, task: Task, choices: list | None) -> str:
    """The text of a number, of words, or of the choice that a letter stands for; without the \\boxed{} around it."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    text = boxed(text) or text
    letter = ord(text) - ord("A") if len(text) == 1 else -1
    if choices and text not in map(str, choices) and 0 <= letter < len(choices):
        text = str(choices[letter])
    if "count" in task.columns:
        require(re.fullmatch("[0-9]{1,4}", text), f"not a number of objects: {text[:80]!r}")
    require(text and not re.search(r"</?(think|answer)>|<\|", text), f"no answer, or a tag in it: {text[:80]!r}")
    return text

def clip_object(found, frame: Frame, needs_box: bool) -> tuple[dict, bool]:
    """A label object, checked and cut to its frame, and whether there was something to cut."""
    found = {"bbox_2d": found} if isinstance(found, list) else found

    def numbers(name, count):
        values = found.get(name) if isinstance(found, dict) else None
        require(isinstance(values, list) and [type(value) in (int, float) and abs(value) < 1e9 for value in values]
                == [True] * count, f"{name} is not a list of {count} finite numbers: {str(found)[:80]}")
        return values

    if not needs_box and isinstance(found, dict) and found.get("bbox_2d") is None:
        point = numbers("point_2d", 2)
        inside = np.clip(point, 0, frame).tolist()
        return {"point_2d": inside}, inside != point
    x1, y1, x2, y2 = box = numbers("bbox_2d", 4)
    require(x1 < x2 and y1 < y2, f"the box {box} is inside out or empty: it is [x1, y1, x2, y2]")
    point = [(x1 + x2) / 2, (y1 + y2) / 2] if found.get("point_2d") is None else numbers("point_2d", 2)
    x1, y1, x2, y2, *_ = inside = np.clip(box + point, 0, frame * 3).tolist()
    require(x1 < x2 and y1 < y2, f"the box {box} lies outside its image of {frame[0]} x {frame[1]} pixels")
    return {"bbox_2d": inside[:4], "point_2d": inside[4:]}, inside != box + point
