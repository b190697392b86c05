"""Turn VLM-R1's annotations into the JSON lines that data.py reads.

    python extras/vlm_r1.py rec_jsons/refcoco_train.jsonl --images coco --output refcoco.jsonl

VLM-R1's rows are {"id", "image", "conversations": [question, answer]}; the boxes in an answer are
in pixels of the image. An answer without boxes is kept as text.
"""

import argparse
import json
import os
import re
from pathlib import Path

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("annotations", type=Path, help="a .json or .jsonl file of VLM-R1's")
    parser.add_argument("--images", type=Path, help="folder of the images (default: annotations')")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    settings = parser.parse_args(argv)
    images = settings.images or settings.annotations.parent
    # Paths in our JSON lines are relative to the file.
    folder = os.path.relpath(images, settings.output.parent)
    rows = read_rows(settings.annotations)
    unfinished = settings.output.with_name(settings.output.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(convert(row, folder)) + "\n")
    os.replace(unfinished, settings.output)
    print(f"{settings.output}: {len(rows)} rows")


def read_rows(file: Path) -> list[dict]:
    """The rows of a file that is one JSON list, or JSON lines."""
    text = file.read_text("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def convert(row: dict, folder: str = "") -> dict:
    """One row of VLM-R1's as one of ours.

    >>> turns = [{"value": "<image>Find the cat."}, {"value": "<answer>[1, 2, 30, 40]</answer>"}]
    >>> convert({"id": 7, "image": "a.jpg", "conversations": turns}, "coco")["solution"]
    [[1.0, 2.0, 30.0, 40.0]]
    """
    question, answer = (turn["value"] for turn in row["conversations"])
    image = row["image"]
    if isinstance(image, list):
        [image] = image                  # a sample has one image
    converted = {"id": row["id"], "image": os.path.join(folder, image), "problem": question}
    boxes = [[float(number) for number in box] for box in BOX.findall(answer)]
    if boxes:
        converted["solution"] = boxes
    else:
        converted["answer"] = re.sub("</?answer>", "", answer).strip()
    return converted


if __name__ == "__main__":
    main()
