r"""Rewards: read the answer of a completion, match it with the label, score it by component.

    <think> reasoning </think> <answer>[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}]</answer>

    thinking    0 or 1   the completion has just this shape, and words in its thinking
    format      0 to 2   share of objects with a readable box + share with a readable point
    accuracy    0 to 3   best one-to-one matching; a pair earns 1 for each of IoU, box L1 and point
    non_repeat  0 or 1   fewer than two sentences are repetitions

Counting also takes a number. Mathematics takes any text: no non_repeat, the others are 0 or 1."""

import json
import logging
import os
import re
import signal
from functools import cache
from string import ascii_uppercase

import numpy as np

SENTENCE = re.compile(r"(?:[^.!?\n。！？]|(?<=\d)\.(?=\d))+")    # a dot in 0.5 ends none
# Math-verify knows neither full-width characters nor the root sign.
CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("√"): r"\sqrt "}
# Math-verify reads words as products (dog = god), 1 1/2 as 1, and is slow on long texts.
NO_FORMULA = re.compile(r"(?s)^[a-zA-Z ]{3,}$|\d\s+\d|.{201}")

def score(completion, label, kind="objects", frame=(840, 840), choices=(), **thresholds):
    """A completion's rewards by component: those in the table above that its kind has.

    label: text, or objects with "bbox_2d" and "point_2d", in coordinates of frame (width, height).
    kind: "count", "math", or else objects. thresholds: accuracy_score's, for a frame scaled to 840.

    >>> score("<answer>[]</answer>", [])
    {'thinking': 0.0, 'format': 2.0, 'accuracy': 3.0, 'non_repeat': 1.0}
    """
    # A cut bounds the time that regular expressions take.
    completion = completion[:30_000]
    predicted = read_answer(completion, kind)
    components = {"thinking": float(has_thinking(completion))}
    if kind == "math":
        right = predicted is not None and same_answer(predicted, label, choices)
        return components | {"format": float(predicted is not None), "accuracy": float(right)}
    return components | {"format": format_score(predicted, label),
                         "accuracy": accuracy_score(predicted, label, frame, **thresholds),
                         "non_repeat": non_repeat(completion)}

def split_completion(completion):
    """The prose before the last `<answer>` outside thinking, and the answer, None if not closed."""
    # Thinking becomes NULs, one for each character: no answer may start in it or contain it.
    visible = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", lambda t: "\0" * len(t[0]), completion)
    prose, opened, rest = visible.rpartition("<answer>")
    if not opened:
        return completion, None
    answer, closed, _ = rest.partition("</answer>")
    if not closed or "\0" in answer:
        answer = None
    return completion[:len(prose)], answer

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
    if not isinstance(objects, list) or len(objects) > 120:
        return None
    readable = []
    for found in objects:
        if not isinstance(found, dict):
            return None
        readable.append({})
        for name, length in (("bbox_2d", 4), ("point_2d", 2)):
            numbers = found.get(name)
            # Any number is a float by now, but true is not.
            if isinstance(numbers, list) and list(map(type, numbers)) == [float] * length:
                if max(map(abs, numbers)) <= 100_000:
                    readable[-1][name] = numbers
    return readable

def has_thinking(completion):
    """Whether this is `<think>words</think>`, white space, `<answer>...</answer>` and no more."""
    text = r"((?:(?!</?(?:think|answer)>).)*)"          # any text without these tags
    found = re.fullmatch(rf"(?s)\s*<think>{text}</think>\s*<answer>{text}</answer>\s*", completion)
    return bool(found and re.search(r"[^\W_]", found[1]))

def non_repeat(completion):
    """1, or 0 if two or more sentences of the prose repeat; case and blanks do not count."""
    prose = split_completion(completion.casefold())[0]
    sentences = SENTENCE.findall(re.sub(r"</?think>|[^\S\n]", "", prose))
    return float(len(sentences) - len(set(sentences)) < 2)

def format_score(predicted, label):
    """0 to 2: how many of its two fields an object has, on average; 2 for a number."""
    if isinstance(predicted, str):
        return 2.0
    if predicted:
        return sum(map(len, predicted)) / len(predicted)
    # A right "[]" earns all: otherwise inventing boxes would earn more. A wrong one earns nothing.
    return 2.0 if predicted == [] and count(label) == 0 else 0.0

def count(answer):
    """How many objects an answer or a label lists, or names as text."""
    return int(answer) if isinstance(answer, str) else len(answer)

def accuracy_score(predicted, label, frame, iou_above=0.5, l1_below=10, distance_below=30):
    """0 to 3: for the best matching of n predicted with m labelled objects, or for their number."""
    if predicted is None:
        return 0.0
    if not predicted or not label or isinstance(predicted, str) or isinstance(label, str):
        # No boxes to pair: counts decide. A bare number earns little where the label has objects.
        best = 1.0 if isinstance(predicted, str) and isinstance(label, list) else 3.0
        return best if count(predicted) == count(label) else 0.0
    # What is missing cannot earn: it becomes a box without area, or a point outside of any box.
    found = [[*item.get("bbox_2d", [0] * 4), *item.get("point_2d", [np.inf] * 2)]
             for item in predicted]
    found = np.array(found)[:, None]                                          # (n, 1, 6)
    wanted = np.array([item["bbox_2d"] + item["point_2d"] for item in label])  # (m, 6)
    offset = abs(found - wanted) * 840 / np.tile(frame, 3)                   # (n, m, 6)
    l1 = offset[..., :4].mean(axis=2)                                         # (n, m)
    distance = np.linalg.norm(offset[..., 4:], axis=2)                        # (n, m)
    # A box needs an area, and a point must lie in its own box, edge included.
    low, high, point = np.split(found, 3, axis=2)                             # (n, 1, 2) each
    has_area = (low < high).all(axis=2)                                       # (n, 1)
    inside = ((low <= point) & (point <= high)).all(axis=2)                   # (n, 1)
    overlap = iou(found[..., :4], wanted[:, :4])
    agree = [overlap > iou_above, l1 < l1_below, inside & (distance < distance_below)]
    gains = has_area * np.sum(agree, axis=0)                                  # (n, m), 0 to 3
    # The larger number divides, so an object too many costs as much as one too few.
    return float(sum(gains[pair] for pair in match(gains)) / max(gains.shape))

def iou(boxes_a, boxes_b):
    """Intersection over union of boxes (n, 4) with boxes (m, 4), x2 - x1 wide: (n, m)."""
    low_a, high_a = np.split(np.reshape(boxes_a, (-1, 1, 4)), 2, axis=2)      # (n, 1, 2) corners
    low_b, high_b = np.split(np.reshape(boxes_b, (1, -1, 4)), 2, axis=2)      # (1, m, 2)
    sides = np.minimum(high_a, high_b) - np.maximum(low_a, low_b)             # (n, m, 2)
    intersection = sides.clip(0).prod(axis=2)
    areas = (high_a - low_a).prod(axis=2) + (high_b - low_b).prod(axis=2)
    return intersection / np.maximum(areas - intersection, 1e-12)             # two empty ones: 0

def match(gains):
    """One-to-one (row, column) pairs of integer gains (n, m) above 0, whose sum is the largest.
    By auction (Bertsekas 1979): columns bid for rows until each column has one.
    >>> match([[3, 2], [3, 0]])      # 2 + 3 beats 3 + 0
    [(0, 1), (1, 0)]
    """
    gains = np.asarray(gains, int)
    n, m = gains.shape
    # m + 1 more rows, worth nothing: for columns that win none, and so that a second best exists.
    worth = np.pad(gains, ((0, m + 1), (0, 0)))
    prices = np.zeros(n + m + 1)
    owners = np.full(n + m + 1, -1)
    bidders = list(range(m))
    while bidders:
        column = bidders.pop()
        net = worth[:, column] - prices
        second, best = np.argsort(net)[-2:]
        # A bid leaves the best row 1/(m + 1) worse than the second. So a column ends with a row at
        # most 1/(m + 1) below its best: all together less than 1, and no integer sum is higher.
        prices[best] += net[best] - net[second] + 1 / (m + 1)
        if owners[best] >= 0:
            bidders.append(owners[best])
        owners[best] = column
    rows = np.flatnonzero(owners[:n] >= 0)
    rows = rows[gains[rows, owners[rows]] > 0]
    return list(zip(rows.tolist(), owners[rows].tolist()))

def same_answer(predicted, label, choices=()):
    """Whether two answers are the same choice or text, or equal by math-verify's judgement."""
    gold = meaning(label, choices)
    answer = meaning(predicted, choices)
    if gold.casefold() == answer.casefold():
        return True
    if NO_FORMULA.search(gold) or NO_FORMULA.search(answer):
        return False
    # Once (@cache), before the fork: loading sympy's parts takes longer than most pairs do.
    equal_formulas("x(x+1)", "x^2+x")
    # A child judges. After half a second of CPU time the kernel kills it, even inside a long C
    # call, such as gmpy2's on 9^{9^{9^9}}, and the pair counts as not equal.
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, 0.5)
            signal.alarm(60)                     # in case it only waits
            os._exit(not equal_formulas(gold, answer))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status == 0

@cache
def equal_formulas(gold, answer):
    """Math-verify's judgement. It may take forever, or crash."""
    from math_verify import parse, verify
    # Its timeouts are alarms, which need the main thread: off. Silence its warning about that.
    logging.getLogger("math_verify").setLevel("CRITICAL")
    gold = parse(f"${gold}$", parsing_timeout=None)
    answer = parse(f"${answer}$", parsing_timeout=None)
    return verify(gold, answer, timeout_seconds=None)

def meaning(answer, choices=()):
    r"""An answer in plain characters, without \boxed{}; a choice's text for letter or index."""
    unboxed = re.sub(r"^\\boxed\{((?!.*\\boxed).*)\}[\s.]*$", r"\1", answer.strip())
    rooted = re.sub(r"√\s*(\d+(?:\.\d+)?|\([^()]*\))", r"\\sqrt{\1}", unboxed)     # √12, √(12)
    text = rooted.translate(CHARACTERS).strip().rstrip(" .")
    options = [meaning(choice) for choice in choices]
    names = dict(zip(ascii_uppercase, options))
    # Among choices that have numbers, a number is no index.
    if not re.search(r"\d", "".join(options)):
        names |= dict(zip(map(str, range(26)), options))
    # Text goes before letter: choices may be the points B, A, C.
    return text if text in options else names.get(text.strip("()").upper(), text)
