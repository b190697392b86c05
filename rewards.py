"""Rewards: read the answer out of a completion, compare it with the label, score it by named components.

A completion should read

    <think> reasoning </think> <answer>[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, ...]</answer>

with `[]` for nothing found; tasks that ask for a number or for words want 24 or \\boxed{x + 1} between the tags. Its
reward is the sum of four components, at most 7, as in the VisionReasoner line of ViSurf's authors (arXiv 2510.10606):

    thinking    0 or 1   the completion has exactly the shape above, and there are words in the thinking
    format      0 to 2   share of the listed objects with a readable box + share with a readable point
    accuracy    0 to 3   best one-to-one matching: a pair earns 1 for IoU, 1 for box L1, 1 for the point
    non_repeat  0 or 1   fewer than two sentences repeat an earlier one

The policy will exploit whatever this file lets through: so what the parser cannot read earns nothing, never raises, and
is scored in milliseconds whatever it holds. A box (x1, y1, x2, y2) is x2 - x1 wide: corners lie between pixels.
"""

import json
import re
from dataclasses import dataclass

import numpy as np

RANGES = {"thinking": (0, 1), "format": (0, 2), "accuracy": (0, 3), "non_repeat": (0, 1)}
MAX_REWARD = sum(high for _, high in RANGES.values())   # 7
THINKING = ("thinking",)     # components about reasoning: never credited to an injected label (reward control 2)
FRAME = 840                  # pixel thresholds are stated for images of FRAME x FRAME pixels
MAX_TEXT = 30_000            # characters, some 8,000 tokens of English; a longer completion earns nothing
MAX_ANSWER = 22_000          # characters between the answer tags: room for 120 objects with every number on a line
MAX_OBJECTS = 120
MAX_DEPTH = 8                # a list of objects of lists is 3; json recurses, so depth is checked before it runs
MAX_NUMBER = 100_000         # no image is wider; a larger number is no coordinate

@dataclass(frozen=True)
class Thresholds:
    """When a predicted and a labelled object agree: IoU above the first, distances below the others (all strictly)."""

    iou: float = 0.5
    box_l1: float = 10.0     # mean absolute difference of the four box numbers, in pixels of an 840x840 frame
    point: float = 30.0      # distance, in pixels of an 840x840 frame

# ---- The reward ------------------------------------------------------------------------------------------------------

def score(completion: str, label: list[dict] | str, task: str = "grounding", frame=(FRAME, FRAME),
          thresholds: Thresholds = Thresholds(), think: bool = True) -> dict[str, float]:
    """Score one completion against its label: its components by name, those of RANGES at most, and their sum, "total".

    label: objects {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, [] for nothing to find. No point: the box centre.
        In counting also the number of objects, as text; in math the answer, as text.
    frame: (width, height) of the coordinates in both, such as the pixels of the image the model sees, or (1000, 1000).
    think: False leaves out the components in THINKING.
    Raises ValueError for an unknown task or a frame without area; never for what a completion holds.

    >>> label = [{"bbox_2d": [100, 100, 300, 300]}]
    >>> score('<answer>[{"bbox_2d": [104, 98, 310, 304], "point_2d": [290, 290]}]</answer>', label)
    {'thinking': 0.0, 'format': 2.0, 'accuracy': 2.0, 'non_repeat': 1.0, 'total': 5.0}
    """
    if task not in REWARDS:
        raise ValueError(f"no reward for task {task!r}; known tasks: {', '.join(REWARDS)}")
    if min(frame) <= 0:
        raise ValueError(f"frame must be a positive (width, height), got {frame}")
    readable = len(completion) <= MAX_TEXT
    text, (read, reward) = completion if readable else "", REWARDS[task]
    components = reward(text, read(text), label, frame, thresholds)
    components = {name: value * readable for name, value in components.items() if think or name not in THINKING}
    return {**components, "total": sum(components.values())}

def box_reward(completion: str, predicted, label: list[dict], frame, thresholds: Thresholds) -> dict[str, float]:
    """The four components for tasks that are answered with boxes and points."""
    return {"thinking": float(has_thinking(completion)), "format": answer_format(predicted, label),
            "accuracy": accuracy(predicted, label, frame, thresholds), "non_repeat": non_repeat(completion)}

def count_reward(completion: str, predicted, label, frame, thresholds: Thresholds) -> dict[str, float]:
    """The same, where the answer or the label may be just a number of objects.

    The right number earns accuracy 3 if that is all the label says, but 1 where the label shows the objects.
    """
    if predicted is None or isinstance(predicted, list) and isinstance(label, list):
        return box_reward(completion, predicted, label, frame, thresholds)
    shown = answer_format(predicted, [{}] * count(label)) if isinstance(predicted, list) else 2.0
    right = float(count(predicted) == count(label))
    return {"thinking": float(has_thinking(completion)), "format": shown,
            "accuracy": right if isinstance(label, list) else 3 * right, "non_repeat": non_repeat(completion)}

def math_reward(completion: str, predicted: str | None, label: str, frame, thresholds) -> dict[str, float]:
    """thinking 0 or 1, format 0 or 1 for an answer in \\boxed{}, accuracy 0 or 1 for an answer equal to the label."""
    from support.answers import same_answer              # here: who copies this file for boxes needs no other

    right = predicted is not None and same_answer(predicted, boxed(label) or label)
    return {"thinking": float(has_thinking(completion)), "format": float(predicted is not None),
            "accuracy": float(right)}

def count(answer: list[dict] | str) -> int:
    """How many objects a list shows, or a number says."""
    return len(answer) if isinstance(answer, list) else int(answer)

# ---- Its components --------------------------------------------------------------------------------------------------

def has_thinking(completion: str) -> bool:
    """Whether this is just `<think>words</think>`, white space, `<answer>anything</answer>`, with each tag once."""
    if any(completion.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    shape = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", completion, re.DOTALL)
    return shape is not None and re.search(r"[^\W_]", shape[1]) is not None

def answer_format(predicted: list[dict] | None, label: list[dict]) -> float:
    """Mean over the listed objects of [has a readable box] + [has a readable point], from 0 to 2.

    A correct `[]` earns 2, or it would pay less than a hallucination; a wrong one 0, or it would pay as much as a try.
    Where the label has only points, a readable point earns 2.
    """
    if not predicted:
        return 2.0 if predicted == [] and not label else 0.0
    if label and all("point_2d" in thing and "bbox_2d" not in thing for thing in label):
        return 2 * sum("point_2d" in found for found in predicted) / len(predicted)
    return sum(len(found) for found in predicted) / len(predicted)   # the parser keeps readable fields only

def accuracy(predicted: list[dict] | None, label: list[dict], frame, thresholds: Thresholds) -> float:
    """What the best one-to-one matching of predicted and labelled objects earns / max(#predicted, #label), from 0 to 3.

    So a superfluous object, such as a box listed twice, costs as much as a missing one. Empty against empty earns 3.
    """
    if not predicted or not label:
        return 3.0 if predicted == [] and not label else 0.0
    gain = pair_gain(predicted, label, frame, thresholds)
    return float(sum(gain[pair] for pair in match(gain)) / max(gain.shape))

def pair_gain(predicted: list[dict], label: list[dict], frame, thresholds: Thresholds) -> np.ndarray:
    """What predicted object i and labelled object j earn as a pair: (n, m) integers from 0 to 3.

    1 for the IoU, 1 for the L1 distance of the boxes, 1 for the distance of the points if the predicted one lies in its
    own predicted box, edge included. A box that is missing, inside out or without area earns none of them. Where the
    label has only a point, its distance earns all 3.
    """
    stretch = np.array([FRAME / frame[0], FRAME / frame[1]] * 2)   # to the frame the thresholds are stated for
    missing = [np.nan] * 4                                         # comparisons with NaN are False: it earns nothing
    boxes = np.array([found.get("bbox_2d", missing) for found in predicted]) * stretch                # (n, 4)
    points = np.array([found.get("point_2d", missing[:2]) for found in predicted]) * stretch[:2]      # (n, 2)
    only_point = np.array(["bbox_2d" not in thing and "point_2d" in thing for thing in label])        # (m,)
    true_boxes = np.array([missing if alone else thing["bbox_2d"] for alone, thing in zip(only_point, label)]) * stretch
    true_points = np.array([thing.get("point_2d") or np.reshape(thing["bbox_2d"], (2, 2)).mean(axis=0)
                            for thing in label]) * stretch[:2]                                        # (m, 2)
    low, high = boxes[:, :2], boxes[:, 2:]
    is_box = (low < high).all(axis=1)                                                                 # (n,)
    has_point = is_box & ((low <= points) & (points <= high)).all(axis=1)
    l1 = sum(abs(boxes[:, None, i] - true_boxes[:, i]) for i in range(4)) / 4                         # (n, m)
    distance = np.hypot(*(points[:, None, i] - true_points[:, i] for i in range(2)))                  # (n, m)
    near = distance < thresholds.point                                                                # (n, m)
    gain = ((iou(boxes, true_boxes) > thresholds.iou).astype(int) + (is_box[:, None] & (l1 < thresholds.box_l1))
            + (has_point[:, None] & near))
    return np.where(only_point, 3 * near, gain)

def non_repeat(completion: str) -> float:
    """1, or 0 when at least two sentences of the prose were already said before; case and white space do not count.

    Sentences end at . ! ? (also the Chinese ones) or a line break, not at the point inside a number.
    """
    prose, _ = split_completion(completion)
    text = re.sub(r"\.(?<=\d\.)(?=\d)", ",", prose.casefold())
    for end in "!?\n。！？":
        text = text.replace(end, ".")
    sentences = [sentence for sentence in "".join(text.split()).split(".") if sentence]
    return float(len(sentences) - len(set(sentences)) < 2)

# ---- Comparing boxes -------------------------------------------------------------------------------------------------

def iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of (n, 4) with every box of (m, 4): (n, m); 0 for boxes without area."""
    a, b = (np.asarray(boxes, float).reshape(-1, 4).T for boxes in (boxes_a, boxes_b))    # x1, y1, x2, y2 as rows
    a = a[:, :, None]                                                                     # against b: (n, m)
    width, height = (np.minimum(a[i + 2], b[i + 2]) - np.maximum(a[i], b[i]) for i in (0, 1))
    intersection = width.clip(0) * height.clip(0)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    # Without an area there is no intersection either: 0 / 1e-12, where the union is 0 or, inside out, negative.
    return intersection / np.maximum(area_a + area_b - intersection, 1e-12)

def match(gain: np.ndarray) -> list[tuple[int, int]]:
    """One-to-one (row, column) pairs of an (n, m) matrix with the largest possible sum; pairs worth 0 are left out.

    The Hungarian method (Kuhn 1955). Rows and columns carry prices, row + column >= gain; only tight pairs (equality)
    are matched. When no more rows find a place, those that compete for the same columns lower their price by 1 and the
    columns raise theirs. Once unmatched rows are at price 0, the prices add up to the gains matched: nothing can be
    better, after as many rounds as the largest gain, 3. Raises ValueError unless gains are whole and >= 0.

    >>> match(np.array([[3, 2], [3, 0]]))   # 2 + 3 beats 3 + 0
    [(0, 1), (1, 0)]
    """
    gain = np.asarray(gain)
    if not ((gain >= 0) & (gain % 1 == 0)).all():
        raise ValueError(f"gains must be whole numbers >= 0, got {gain.tolist()}")
    top = int(gain.max(initial=0))
    row_price, column_price = np.full(len(gain), top), np.zeros(gain.shape[1], int)
    owner = {}                                       # column -> the row it is matched with
    unmatched = np.argsort(gain.sum(axis=1), kind="stable").tolist()   # choosy rows first: fewer have to move later
    for _ in range(top):
        tight = [np.flatnonzero(row).tolist() for row in gain == row_price[:, None] + column_price]
        while True:                                  # each pass visits a column at most once
            seen = set()
            waiting = [row for row in unmatched if not _place(row, tight, owner, seen)]
            if len(waiting) == len(unmatched):
                break
            unmatched = waiting
        row_price[unmatched + [owner[column] for column in seen]] -= 1
        column_price[list(seen)] += 1
    return sorted((row, column) for column, row in owner.items())

def _place(row: int, tight: list[list[int]], owner: dict, seen: set) -> bool:
    """Give `row` a tight column, moving that column's owner elsewhere if need be (an augmenting path)."""
    for column in tight[row]:
        if column not in seen:
            seen.add(column)
            if column not in owner or _place(owner[column], tight, owner, seen):
                owner[column] = row
                return True
    return False

# ---- Reading the answer ----------------------------------------------------------------------------------------------

def parse_answer(completion: str) -> list[dict] | None:
    """The objects of the last `<answer>…</answer>` outside `<think>…</think>`, or None for no answer. Never raises.

    Thinking ends at the first `</think>`, or never. A last `<answer>` that is not closed or is interrupted by thinking
    is no answer. Its text is a JSON list of objects within the MAX_ bounds, no number in it NaN, infinite or beyond
    MAX_NUMBER. Objects keep their readable fields: "bbox_2d" of four numbers, "point_2d" of two (true is no number).

    >>> parse_answer('<think>A dog?</think><answer>[{"bbox_2d": [1, 2, 3, 4], "point_2d": "middle"}]</answer>')
    [{'bbox_2d': [1.0, 2.0, 3.0, 4.0]}]
    """
    _, answer = split_completion(completion)
    if answer is None or len(answer) > MAX_ANSWER or _depth(answer) > MAX_DEPTH:
        return None
    try:
        objects = _DECODER.decode(answer)
    except ValueError:                               # not JSON, or a number that _number refuses
        return None
    if type(objects) is not list or len(objects) > MAX_OBJECTS or any(type(found) is not dict for found in objects):
        return None
    are_numbers = lambda value, count: type(value) is list and [type(number) for number in value] == [float] * count
    fields = {"bbox_2d": 4, "point_2d": 2}.items()
    return [{name: found[name] for name, count in fields if are_numbers(found.get(name), count)} for found in objects]

def parse_count(completion: str) -> list[dict] | str | None:
    """The objects of an answer, or the number it consists of, as text without leading zeros; None for no answer."""
    objects, text = parse_answer(completion), split_completion(completion)[1] or ""
    return str(int(text)) if objects is None and re.fullmatch(r"\s*[0-9]{1,4}\s*", text) else objects

def parse_boxed(completion: str) -> str | None:
    """What the last \\boxed{…} of an answer holds, or None."""
    answer = split_completion(completion)[1]
    return boxed(answer) if answer is not None and len(answer) <= MAX_ANSWER else None

def boxed(text: str) -> str | None:
    """What the last \\boxed{…} of a text holds, braces within it paired; None where there is none, or nothing in it."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for end in range(len(rest) if found else 0):
        depth += (rest[end] == "{") - (rest[end] == "}")
        if depth == 0:
            return rest[:end].strip() or None
    return None

def read_answer(completion: str, task: str) -> list[dict] | str | None:
    """A completion's answer, as its task reads it: objects, or text; None for no well-formed answer."""
    return REWARDS[task][0](completion)

def split_completion(completion: str) -> tuple[str, str | None]:
    """A completion's prose (thinking and all else, in no special order) and the text of its answer, or None."""
    outside, *pieces = completion.split("<think>")
    pieces = [piece.partition("</think>") for piece in pieces]
    thinking = "\n".join(inside for inside, _, _ in pieces)
    # NUL, which JSON forbids, marks where thinking was cut out: the parts around it must not join to a tag or an answer
    outside = "\0".join([outside] + [after for _, _, after in pieces])
    before, opened, rest = outside.rpartition("<answer>")
    answer, closed, after = rest.partition("</answer>") if opened else ("", "", rest)
    return f"{thinking}\n{before}\n{after}", answer if closed else None

def _depth(text: str) -> int:
    """How deep the brackets of a text nest, those in strings included."""
    codes = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    return int(np.cumsum(np.isin(codes, list(b"[{")).astype(int) - np.isin(codes, list(b"]}"))).max(initial=0))

def _number(text: str) -> float:
    """A JSON number, or NaN or Infinity, as a float; ValueError unless it is within MAX_NUMBER (NaN never is)."""
    value = float(text)
    if not abs(value) <= MAX_NUMBER:
        raise ValueError(f"no coordinate: {text[:20]}")
    return value

_DECODER = json.JSONDecoder(parse_int=_number, parse_float=_number, parse_constant=_number)

# How a task's answers are read and scored: task -> (reader(completion), reward(completion, what was read, label, frame,
# thresholds) -> components). "digits" is the built-in task.
BOXES = (parse_answer, box_reward)
REWARDS = {"grounding": BOXES, "gui": BOXES, "anomaly": BOXES, "medical": BOXES, "digits": BOXES,
           "counting": (parse_count, count_reward), "math": (parse_boxed, math_reward)}
