r"""Rewards: read the answer of a completion, match it with the label, score it by component.

    <think> reasoning </think> <answer>[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}]</answer>

    thinking    0 or 1   the completion has just this shape, and words in its thinking
    format      0 to 2   share of objects with a readable box + share with a readable point
    accuracy    0 to 3   best one-to-one matching; a pair earns 1 for each of IoU, box L1 and point
    non_repeat  0 or 1   fewer than two sentences are repetitions

Counting also takes a number. Mathematics takes any text, with 0 or 1 for format and for accuracy.
"""

import json
import logging
import os
import re
import signal
from dataclasses import dataclass
from functools import cache
from string import ascii_uppercase

import numpy as np

MAX_OBJECTS = 120
# The point in 0.5 does not end a sentence.
SENTENCE = re.compile(r"(?:[^.!?\n。！？]|(?<=\d)\.(?=\d))+")
# Math-verify knows neither full-width characters nor the root sign.
CHARACTERS = dict(zip(range(0xFF01, 0xFF5F), range(0x21, 0x7F))) | {ord("√"): r"\sqrt "}
# Math-verify multiplies the letters of words (dog = god), reads 1 1/2 as 1, and long texts slowly.
NO_FORMULA = re.compile(r"(?s)^[a-zA-Z ]{3,}$|\d\s+\d|.{201}")

@dataclass(frozen=True)
class Thresholds:
    """A pair agrees above this IoU, and below these distances in pixels of 840 x 840."""
    iou: float = 0.5
    box_l1: float = 10.0         # mean difference of the four numbers
    point: float = 30.0

def score(completion, label, kind="objects", frame=(840, 840), thresholds=Thresholds(), choices=()):
    """The reward of a completion by component, a dict: those above that its kind of answer has.

    label: objects with "bbox_2d" and perhaps "point_2d", in coordinates that run to frame (width,
    height); or text, the number in counting, the answer in mathematics (perhaps one of `choices`).
    kind: "count", "math", or else objects.

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
    return components | {"format": format_score(predicted, label),
                         "accuracy": accuracy_score(predicted, label, frame, thresholds),
                         "non_repeat": non_repeat(completion)}

def has_thinking(completion):
    """Whether this is `<think>words</think>`, white space, `<answer>...</answer>` and no more."""
    text = r"((?:(?!</?(?:think|answer)>).)*)"          # any text without these tags
    found = re.fullmatch(rf"(?s)\s*<think>{text}</think>\s*<answer>{text}</answer>\s*", completion)
    return bool(found and re.search(r"[^\W_]", found[1]))

def non_repeat(completion):
    """1, or 0 if two or more sentences of the prose repeat; case and white space do not count."""
    prose = split_completion(completion.casefold())[0]
    sentences = SENTENCE.findall(re.sub(r"</?think>|[^\S\n]", "", prose))
    return float(len(sentences) - len(set(sentences)) < 2)

def format_score(predicted, label):
    """0 to 2: how many of its two fields an object has, on average; 2 for a number."""
    if isinstance(predicted, str):
        return 2.0
    if predicted:
        return sum(map(len, predicted)) / len(predicted)
    # A right "[]" earns all, or boxes where nothing is would earn more; a wrong one earns nothing.
    return 2.0 if predicted == [] and count(label) == 0 else 0.0

def count(answer):
    """How many objects an answer or a label lists or, as text, names."""
    return int(answer) if isinstance(answer, str) else len(answer)

def accuracy_score(predicted, label, frame, thresholds):
    """0 to 3: for the best matching of n predicted with m labelled objects, or for their number."""
    if predicted is None:
        return 0.0
    if not predicted or not label or isinstance(predicted, str) or isinstance(label, str):
        # A bare number earns little where objects could be shown.
        best = 1.0 if isinstance(predicted, str) and isinstance(label, list) else 3.0
        return best if count(predicted) == count(label) else 0.0
    # What is missing cannot earn: it becomes a box without area, or a point outside of any box.
    found = [[*item.get("bbox_2d", [0] * 4), *item.get("point_2d", [np.inf] * 2)]
             for item in predicted]
    found = np.array(found)[:, None]                                          # (n, 1, 6)
    # A label without a point means the centre of its box.
    wanted = []
    for item in label:
        x1, y1, x2, y2 = item["bbox_2d"]
        point = item.get("point_2d") or [(x1 + x2) / 2, (y1 + y2) / 2]
        wanted.append([x1, y1, x2, y2, *point])
    wanted = np.array(wanted)                                                 # (m, 6)

    offset = abs(found - wanted) * np.tile(840 / np.array(frame), 3)          # (n, m, 6)
    l1 = offset[..., :4].mean(axis=2)                                         # (n, m)
    distance = np.linalg.norm(offset[..., 4:], axis=2)                        # (n, m)
    # A box needs an area, and a point must lie in its own box, edge included.
    low, high, point = np.split(found, 3, axis=2)                             # (n, 1, 2) each
    has_area = (low < high).all(axis=2)                                       # (n, 1)
    inside = ((low <= point) & (point <= high)).all(axis=2)                   # (n, 1)
    near = inside & (distance < thresholds.point)
    overlap = iou(found[..., :4], wanted[:, :4])
    agree = [overlap > thresholds.iou, l1 < thresholds.box_l1, near]
    gains = has_area * np.sum(agree, axis=0)                                  # (n, m), 0 to 3
    # Divided by the larger number, an object too many costs as much as one too few.
    return float(sum(gains[pair] for pair in match(gains)) / max(gains.shape))

def iou(boxes_a, boxes_b):
    """Intersection over union of boxes (n, 4) with boxes (m, 4), x2 - x1 wide: (n, m)."""
    low_a, high_a = np.split(np.reshape(boxes_a, (-1, 1, 4)), 2, axis=2)      # (n, 1, 2) corners
    low_b, high_b = np.split(np.reshape(boxes_b, (1, -1, 4)), 2, axis=2)      # (1, m, 2)
    sides = np.minimum(high_a, high_b) - np.maximum(low_a, low_b)             # (n, m, 2)
    intersection = sides.clip(0).prod(axis=2)
    areas = (high_a - low_a).prod(axis=2) + (high_b - low_b).prod(axis=2)
    # Two empty boxes have 0.
    return intersection / np.maximum(areas - intersection, 1e-12)

def match(gains):
    """(row, column) pairs of integer gains (n, m) >= 0, one-to-one, with the largest sum; none 0.

    The Hungarian method (Kuhn 1955), by shortest augmenting paths (Jonker and Volgenant 1987).

    >>> match([[3, 2], [3, 0]])      # 2 + 3 beats 3 + 0
    [(0, 1), (1, 0)]
    """
    gains = np.asarray(gains, float)
    n, m = gains.shape
    if n > m:
        return sorted((row, column) for column, row in match(gains.T))
    # The largest gain costs 0.
    costs = gains.max(initial=0) - gains
    column_of = np.full(n, -1)
    row_of = np.full(m, -1)
    for new_row in range(n):
        # Dijkstra's shortest path to a free column; a taken one is passed by moving its row on.
        distance = costs[new_row].copy()
        came_from = np.full(m, new_row)
        # Of equally near columns, a free one comes first. None is visited twice.
        handicap = np.where(row_of < 0, 0, 0.5)
        column = np.argmin(distance + handicap)
        while row_of[column] >= 0:
            row = row_of[column]
            handicap[column] = np.inf
            through = distance[column] + costs[row]
            shorter = through < distance
            distance[shorter] = through[shorter]
            came_from[shorter] = row
            column = np.argmin(distance + handicap)
        # Potentials, added to whole rows and columns, change no matching's rank. Pairs of the path
        # then cost 0, as matched pairs do, and none costs less.
        surplus = np.maximum(distance[column] - distance, 0)
        costs += surplus
        costs[:new_row] -= surplus[column_of[:new_row], None]
        costs[new_row] -= distance[column]
        # Back along the path, each row takes the column it led to, and leaves its own.
        while column >= 0:
            row = came_from[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return [(row, column) for row, column in enumerate(column_of.tolist()) if gains[row, column]]

def split_completion(completion):
    """The prose before the last `<answer>` outside thinking, and the answer, None if not closed."""
    # NUL hides thinking: no answer starts there, and JSON forbids it inside an answer.
    visible = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", lambda t: "\0" * len(t[0]), completion)
    prose, opened, rest = visible.rpartition("<answer>")
    if not opened:
        return completion, None
    answer, closed, _ = rest.partition("</answer>")
    return completion[:len(prose)], answer if closed else None

def read_answer(completion, kind="objects"):
    """The answer as text, or as objects with their readable fields alone; None if malformed."""
    text = split_completion(completion)[1] or ""
    if kind == "math":
        return text.strip() or None
    if kind == "count" and re.fullmatch(r"\s*[0-9]{1,4}\s*", text):
        return str(int(text))
    try:
        # Every number becomes a float; NaN and Infinity are errors.
        objects = json.loads(text, parse_int=float, parse_constant=int)
    except (ValueError, RecursionError):     # not JSON, or nested too deep
        return None
    if not isinstance(objects, list) or len(objects) > MAX_OBJECTS:
        return None
    for index, found in enumerate(objects):
        if not isinstance(found, dict):
            return None
        objects[index] = {}
        for name, length in (("bbox_2d", 4), ("point_2d", 2)):
            numbers = found.get(name)
            # Any number is a float by now, but true is not.
            if isinstance(numbers, list) and list(map(type, numbers)) == [float] * length:
                if max(map(abs, numbers)) <= 100_000:
                    objects[index][name] = numbers
    return objects

def same_answer(predicted, label, choices=()):
    """Whether answers are one choice or text, or equal to math-verify; ImportError without it."""
    texts = [meaning(label, choices), meaning(predicted, choices)]
    if texts[0].casefold() == texts[1].casefold():
        return True
    if any(map(NO_FORMULA.search, texts)):
        return False
    parse, verify = load_math_verify()
    # A child process judges. After half a second of work the kernel ends it, even in a step in
    # which Python handles no signals, as 9^{9^{9^9}} is to gmpy2. The pair is not equal, then.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, 0.5)
            gold, answer = [parse(f"${text}$", parsing_timeout=None) for text in texts]
            status = int(not verify(gold, answer, timeout_seconds=None))
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0

@cache
def load_math_verify():
    """Math-verify's parse and verify, ready to be called without their own limits of time."""
    from math_verify import parse, verify
    # It warns that limits are off: they are alarms, which only the main thread could set.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # What sympy loads and prepares at first need takes longer than most pairs.
    x_squared = parse("$x^2+x$", parsing_timeout=None)
    verify(parse("$x(x+1)$", parsing_timeout=None), x_squared, timeout_seconds=None)
    return parse, verify

def meaning(answer, choices):
    """An answer in plain characters, without its box; the text of a choice for letter or index."""
    unboxed = re.sub(r"^\\boxed\{((?!.*\\boxed).*)\}[\s.]*$", r"\1", answer.strip())
    text, *options = [t.translate(CHARACTERS).strip().rstrip(" .") for t in [unboxed, *choices]]
    names = dict(zip(ascii_uppercase, options))
    # Among choices that have numbers, a number is no index.
    if not re.search(r"\d", "".join(options)):
        names |= dict(zip(map(str, range(26)), options))
    # Text goes before letter: choices may be the points B, A, C.
    return text if text in options else names.get(text.strip("()").upper(), text)
