"""Turn the rows of LLaVA, VLM-R1 and ms-swift into the JSON lines that data.py reads.

    python extras/convert.py rec_jsons/refcoco_train.jsonl --images coco --output refcoco.jsonl

The file is a JSON list or JSON lines, in UTF-8 or UTF-16, of rows with an image and turns:
"conversations" of LLaVA and VLM-R1, "messages" or "query" and "response" of ms-swift, whose
"objects" fill <ref-object> and <bbox>, and whose "solution" replaces the answer. System turns are
left out. Boxes are in pixels of the image, or run to --frame; an answer without boxes is kept as
text. Rows that data.py could read already stay as they are, but for their image's path.
"""

import argparse
import json
import os
import re
from pathlib import Path

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("annotations", type=Path, help="a .json or .jsonl file")
    parser.add_argument("--images", type=Path, help="folder of the images (default: annotations')")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--frame", type=float, nargs=2, metavar=("WIDTH", "HEIGHT"),
                        help="what coordinates run to, such as 1000 1000 (default: the image)")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out, and count, others")
    settings = parser.parse_args(argv)
    unfinished = settings.output.with_name(settings.output.name + ".unfinished")
    try:
        done, bad_rows = write_rows(settings, unfinished)
        os.replace(unfinished, settings.output)
    except (ValueError, OSError) as error:
        unfinished.unlink(missing_ok=True)
        parser.exit(2, f"convert.py: {settings.annotations}: {' '.join(str(error).split())}\n")
    print(f"{settings.output}: {done} rows, {bad_rows} bad rows left out")


def write_rows(settings, output: Path) -> tuple[int, int]:
    """Write all rows; how many were converted, and how many could not be. ValueError names a row."""
    images = settings.images or settings.annotations.parent
    # Paths in our JSON lines are relative to the file.
    folder = os.path.relpath(images, output.parent)
    done = bad_rows = 0
    with output.open("w", encoding="utf-8") as file:
        for number, row in enumerate(read_rows(settings.annotations), 1):
            try:
                line = json.dumps(convert(row, folder, settings.frame))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if not settings.skip_bad_rows:
                    raise ValueError(f"row {number}: {error!r}; see --skip_bad_rows") from None
                bad_rows += 1
                continue
            file.write(line + "\n")
            done += 1
    return done, bad_rows


def read_rows(file: Path) -> list[dict]:
    """The rows of a file that is one JSON list, or JSON lines."""
    content = file.read_bytes()
    text = content.decode(json.detect_encoding(content)).strip()
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def convert(row: dict, folder: str = "", frame=None) -> dict:
    """One row as one of ours; ValueError, KeyError, TypeError or AttributeError if that fails.

    >>> turns = [{"from": "human", "value": "<image>Find the cat."},
    ...          {"from": "gpt", "value": "<answer>[1, 2, 30, 40]</answer>"}]
    >>> convert({"id": 7, "image": "a.jpg", "conversations": turns}, "coco")
    {'problem': '<image>Find the cat.', 'solution': [[1.0, 2.0, 30.0, 40.0]], 'id': 7, 'image': 'coco/a.jpg'}
    """
    if "problem" in row or "text" in row:
        converted = dict(row)
    else:
        turns = read_turns(row)
        converted = {"problem": turns["question"], **read_answer(row.get("solution", turns.get("answer")))}
        if (row.get("objects") or {}).get("bbox_type") == "norm1":
            converted["frame"] = [1, 1]
    if row.get("id") is not None:
        converted["id"] = row["id"]
    image = row.get("image") or row.get("images")
    if isinstance(image, list):
        [image] = image                  # a sample has one image
    if isinstance(image, dict):
        image = image["path"]
    if not image:
        raise ValueError("no image")
    converted.pop("images", None)
    converted["image"] = image if image.startswith("data:image/") else os.path.join(folder, image)
    if frame:
        converted["frame"] = frame
    return converted


def read_turns(row: dict) -> dict[str, str]:
    """The question and, unless it is in another column, the answer."""
    if "query" in row:
        turns = [("user", row["query"]), ("assistant", row.get("response"))]
    elif "messages" in row:
        turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    else:
        turns = [(turn["from"], turn["value"]) for turn in row.get("conversations") or []]
    objects = row.get("objects") or {}
    fillings = {"<ref-object>": iter(objects.get("ref") or []), "<bbox>": iter(objects.get("bbox") or [])}
    found = {}
    for role, text in turns:
        if role == "system" or text is None:
            continue
        name = ROLES.get(role)
        if name is None or name in found:
            raise ValueError(f"more than a question and its answer ({role})")
        found[name] = re.sub("<ref-object>|<bbox>", lambda mark: str(next(fillings[mark[0]], mark[0])), text)
    if "question" not in found:
        raise ValueError("no question: not a row of LLaVA, VLM-R1 or ms-swift")
    return found


def read_answer(answer) -> dict:
    """The column of an answer: its objects or boxes if it has any, or else its text.

    >>> read_answer("No cat: []"), read_answer('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]')
    ({'answer': 'No cat: []'}, {'solution': [{'bbox_2d': [1, 2, 3, 4], 'point_2d': [2, 3]}]})
    """
    if answer is None:
        raise ValueError("no answer")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    text = re.sub("</?answer>|```(json)?", "", text).strip()
    try:
        objects = json.loads(text)
    except ValueError:
        objects = None
    if isinstance(objects, list) and all(isinstance(found, dict) for found in objects):
        return {"solution": objects}
    boxes = [[float(number) for number in box] for box in BOX.findall(text)]
    return {"solution": boxes} if boxes else {"answer": text}


if __name__ == "__main__":
    main()
