r"""Rewards: read the answer of a completion, match it with the label, score it by component.

    <think> reasoning </think> <answer>[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}]</answer>

    thinking    0 or 1   the completion has just this shape, and words in its thinking
    format      0 to 2   share of objects with a readable box + share with a readable point
    accuracy    0 to 3   best one-to-one matching; a pair earns 1 for each of IoU, box L1 and point
    non_repeat  0 or 1   fewer than two sentences are repetitions

Counting also takes a number. In mathematics, whose answer may be any text, format and accuracy are
0 or 1, and repeats do not count. An unreadable answer earns nothing for format and accuracy.
"""

import json
import re
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np

MAX_OBJECTS = 120
# Not for math-verify: 9^{9^{9^9}} hangs in one step, which no alarm interrupts, and a word is read
# as a product of letters, so that dog = god.
COSTLY = re.compile(r"""
    \\(?!(boxed|text|circ|[dt]?frac|sqrt(?!\[)|pi|cdot|times|div|pm|left|right|infty|cup|log|ln)
       (?![a-zA-Z])|[{}%])|!|[^ -~]|.{201}|^[a-zA-Z ]{3,}$|\d[ ]\d
    |\^(?!\w|\{-?\w{1,2}\}|\{?\\circ)|(\^.*){4}|(\^\{-?\d\d.*){2}""", re.VERBOSE)

@dataclass(frozen=True)
class Thresholds:
    """A pair agrees above this IoU, and below these distances in pixels of 840 x 840."""
    iou: float = 0.5
    box_l1: float = 10.0         # mean difference of the four numbers
    point: float = 30.0

def score(completion: str, label: list[dict] | str, kind: str = "objects", frame=(840, 840),
          thresholds=Thresholds(), choices=()) -> dict[str, float]:
    """The reward of a completion by component: those above that its kind of answer has.

    label: objects with "bbox_2d" and perhaps "point_2d", in coordinates that run to frame (width,
    height); or text, the number in counting, the answer in mathematics (perhaps one of `choices`).

    >>> score('<answer>[{"bbox_2d": [0, 0, 50, 60]}]</answer>', [{"bbox_2d": [0, 0, 50, 50]}])
    {'thinking': 0.0, 'format': 1.0, 'accuracy': 2.0, 'non_repeat': 1.0}
    """
    # A cut bounds the time that regular expressions take.
    completion = completion[:30_000]
    predicted = read_answer(completion, kind)
    components = {"thinking": float(has_thinking(completion))}
    if kind == "math":
        right = predicted is not None and same_answer(predicted, label, choices)
        return components | {"format": float(predicted is not None), "accuracy": float(right)}
    components |= score_objects(predicted, label, frame, thresholds)
    return components | {"non_repeat": non_repeat(completion)}

def has_thinking(completion: str) -> bool:
    """Whether this is `<think>words</think>`, white space, `<answer>...</answer>` and no more."""
    text = r"((?:(?!</?(?:think|answer)>).)*)"          # any text without these tags
    found = re.fullmatch(rf"(?s)\s*<think>{text}</think>\s*<answer>{text}</answer>\s*", completion)
    return found is not None and re.search(r"[^\W_]", found[1]) is not None

def non_repeat(completion: str) -> float:
    """1, or 0 if two or more sentences of the prose repeat; case and white space do not count."""
    prose = re.sub(r"</?think>|[^\S\n]", "", split_completion(completion.casefold())[0])
    # The point in 0.5 does not end a sentence.
    sentences = re.findall(r"(?:[^.!?\n。！？]|(?<=\d)\.(?=\d))+", prose)
    return float(len(sentences) - len(set(sentences)) < 2)

def score_objects(predicted, label, frame, thresholds) -> dict[str, float]:
    """Format and accuracy; a right number earns 3, but only 1 if the label lists objects."""
    if predicted is None:
        return {"format": 0.0, "accuracy": 0.0}
    counts = [len(x) if isinstance(x, list) else int(x) for x in (predicted, label)]
    right = float(counts[0] == counts[1])
    if isinstance(predicted, str):
        return {"format": 2.0, "accuracy": right if isinstance(label, list) else 3 * right}
    # An object's length is its number of readable fields. A right "[]" earns full format too, or
    # boxes where nothing is would earn more; a wrong one earns nothing.
    readable = sum(map(len, predicted)) / len(predicted) if predicted else 2 * right
    # Nothing to match? Then only the numbers of objects are compared.
    if not predicted or not label or isinstance(label, str):
        return {"format": readable, "accuracy": 3 * right}
    # What is missing is NaN here, and no comparison with NaN is true.
    nan = [np.nan] * 4
    found = [[*item.get("bbox_2d", nan), *item.get("point_2d", nan[:2])] for item in predicted]
    boxes, points = np.split(np.array(found), [4], axis=1)                           # (n, 4 and 2)
    true = [[*item["bbox_2d"], *(item.get("point_2d") or nan[:2])] for item in label]
    true_boxes, true_points = np.split(np.array(true), [4], axis=1)                  # (m, 4 and 2)
    centres = (true_boxes[:, :2] + true_boxes[:, 2:]) / 2
    true_points = np.where(np.isnan(true_points), centres, true_points)
    scale = 840 / np.array(frame)
    l1 = (abs(boxes[:, None] - true_boxes) * np.tile(scale, 2)).mean(axis=2)         # (n, m)
    distance = np.linalg.norm((points[:, None] - true_points) * scale, axis=2)
    # A box needs an area, and a point must lie in its own box, edge included.
    is_box = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)                               # (n,)
    inside = ((boxes[:, :2] <= points) & (points <= boxes[:, 2:])).all(axis=1)
    near = inside[:, None] & (distance < thresholds.point)
    agree = [iou(boxes, true_boxes) > thresholds.iou, l1 < thresholds.box_l1, near]
    gains = is_box[:, None] * np.sum(agree, axis=0)                                  # 0 to 3
    total = 0
    for pair in match(gains):
        total += gains[pair]
    # Divided by the larger number, an object too many costs as much as one too few.
    return {"format": readable, "accuracy": float(total / max(gains.shape))}

def iou(boxes_a, boxes_b) -> np.ndarray:
    """Intersection over union of boxes (n, 4) with boxes (m, 4), x2 - x1 wide: (n, m)."""
    a = np.reshape(boxes_a, (-1, 1, 4))
    b = np.reshape(boxes_b, (1, -1, 4))
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (n, m, 2)
    intersection = sides.clip(0).prod(axis=2)
    areas = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2)
    return intersection / np.maximum(areas - intersection, 1e-12)        # two empty boxes: 0

def match(gains) -> list[tuple[int, int]]:
    """(row, column) pairs of integer gains (n, m) >= 0, one-to-one, with the largest sum; none 0.

    >>> match([[3, 2], [3, 0]])      # 2 + 3 beats 3 + 0
    [(0, 1), (1, 0)]
    """
    def augment(row: int) -> bool:
        # Match the row by a path of tight pairs that may move other rows; free columns come first.
        for column in sorted(tight[row] - visited, key=row_of.__contains__):
            if column not in visited:
                visited.add(column)
                if column not in row_of or augment(row_of[column]):
                    row_of[column] = row
                    return True
        return False
    # The Hungarian method (Kuhn 1955). Row price + column price >= gain, with equality if matched.
    # So no matching gains more than all prices, and in the end, when all that is free has price 0,
    # this one gains as much.
    gains = np.asarray(gains).astype(int)
    row_price = np.full(gains.shape[0], gains.max(initial=0))
    column_price = np.zeros(gains.shape[1], int)
    row_of = {}                      # column -> the row it is matched with
    failed = range(gains.shape[0])
    for _ in range(gains.max(initial=0)):
        slack = row_price[:, None] + column_price - gains
        tight = [set(np.flatnonzero(row == 0).tolist()) for row in slack]
        free_rows, failed = failed, []
        dead_ends = set()            # columns from which no path leads to a free column
        for row in free_rows:
            visited = set(dead_ends)
            if not augment(row):
                failed.append(row)
                dead_ends = visited
        # Lower the price of the rows that compete for these columns; raise the columns'.
        row_price[failed + list(map(row_of.get, dead_ends))] -= 1
        column_price[list(dead_ends)] += 1
    return sorted(zip(row_of.values(), row_of.keys()))

def split_completion(completion: str) -> tuple[str, str | None]:
    """The prose before the last `<answer>` outside thinking, and the answer, None if not closed."""
    # NUL hides thinking: no answer starts there, and JSON forbids it inside an answer.
    visible = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", lambda t: "\0" * len(t[0]), completion)
    before, opened, rest = visible.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    prose = completion[:len(before)] if opened else completion
    return prose, answer if opened and closed else None

def read_answer(completion: str, kind: str = "objects") -> list[dict] | str | None:
    """The answer as text, or as objects with their readable fields alone; None if malformed."""
    text = split_completion(completion)[1] or ""
    if kind == "math":
        return text.strip() or None
    if kind == "count" and re.fullmatch(r"\s*[0-9]{1,4}\s*", text):
        return str(int(text))
    try:
        objects = json.loads(text, parse_int=float, parse_constant=int)
    except (ValueError, RecursionError):     # not JSON, NaN, or nested too deep
        return None
    if type(objects) is not list or len(objects) > MAX_OBJECTS or set(map(type, objects)) - {dict}:
        return None
    for index, found in enumerate(objects):
        objects[index] = {}
        for name, length in (("bbox_2d", 4), ("point_2d", 2)):
            numbers = found.get(name)        # any number is a float by now, but true is not
            if isinstance(numbers, list) and list(map(type, numbers)) == [float] * length:
                if max(map(abs, numbers)) <= 100_000:
                    objects[index][name] = numbers
    return objects

def same_answer(predicted: str, label: str, choices=()) -> bool:
    """Whether two answers say the same, as plain text or to math-verify. Never raises."""
    options = dict(zip(ascii_uppercase, choices))
    texts = []
    for text in (label, predicted):
        text = re.sub(r"^\\boxed\{(.*)\}[\s.]*$", r"\1", text.strip()).strip().rstrip(" .")
        # The letter of a choice stands for its text.
        texts.append(options.get(text.strip("()").upper(), text))
    if texts[0].casefold() == texts[1].casefold():
        return True
    if COSTLY.search(texts[0]) or COSTLY.search(texts[1]):
        return False
    from math_verify import LatexExtractionConfig, parse, verify
    read = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=3) for text in texts]
    return verify(*read, timeout_seconds=3)
