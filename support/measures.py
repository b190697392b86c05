"""What eval.METRICS are computed with: means, clicks, areas of boxes taken together, the area under a ROC curve."""

import re

import numpy as np

import rewards
from support.answers import same_answer

def mean(values) -> float | None:
    """The mean of some numbers, None for none; None among them does not count."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None

def ratio(part: float, whole: float) -> float | None:
    """part / whole, None where there is nothing."""
    return part / whole if whole else None

def clicks(result: dict) -> float | None:
    """1 if the first predicted object points into a labelled box, else 0; None where no box is labelled."""
    first, *_ = result["prediction"] or [{}]
    x1, y1, x2, y2 = first.get("bbox_2d", [np.nan] * 4)
    x, y = first.get("point_2d", ((x1 + x2) / 2, (y1 + y2) / 2))
    boxes = [thing["bbox_2d"] for thing in result["label"] if "bbox_2d" in thing]
    inside = [left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes]
    return float(any(inside)) if boxes else None

def suspicion(result: dict) -> float:
    """1 for an answer that lists a defect and 0 for []; no answer at all is as wrong as can be."""
    return float(not result["label"] if result["prediction"] is None else bool(result["prediction"]))

def areas(boxes_a: np.ndarray, boxes_b: np.ndarray) -> tuple[float, float]:
    """Areas of intersection and union of two masks, each the union of boxes: (n, 4) and (m, 4), real numbers.

    Exact, and cheap for an image of any size: the boxes' own edges cut it into at most (2n + 2m - 1)² cells, each
    wholly inside or outside of every box (coordinate compression).

    >>> areas(np.array([[0, 0, 2, 2]]), np.array([[1, 1, 3, 3], [1, 1, 3, 3]]))
    (1.0, 7.0)
    """
    x1, y1, x2, y2 = np.concatenate([boxes_a, boxes_b]).T[:, :, None]        # (n + m, 1) each
    xs, ys = np.unique([x1, x2]), np.unique([y1, y2])
    inside_x, inside_y = (x1 <= xs[:-1]) & (xs[1:] <= x2), (y1 <= ys[:-1]) & (ys[1:] <= y2)
    inside = inside_y[:, :, None] & inside_x[:, None]                        # (n + m, rows, columns) True = cell in box
    a, b = inside[:len(boxes_a)].any(axis=0), inside[len(boxes_a):].any(axis=0)
    cells = np.outer(np.diff(ys), np.diff(xs))
    return float(cells[a & b].sum()), float(cells[a | b].sum())

def roc_auc(scores: list[float], positive: list[bool]) -> float | None:
    """The area under the ROC curve: how often a positive scores above a negative, ties counting half (Mann-Whitney).

    >>> roc_auc([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    0.875
    """
    scores, positive = np.array(scores), np.array(positive, bool)
    _, place, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[place]                      # from 1; the mean rank where scores tie
    n, m = positive.sum(), (~positive).sum()
    return ratio(float(ranks[positive].sum() - n * (n + 1) / 2), float(n * m))

def measure(result: dict) -> dict:
    """What METRICS are made of: the four numbers of `compare`, and the error in the number of objects."""
    answers = [result["prediction"] or [], result["label"]]
    counts = [rewards.count(answer) if isinstance(answer, list) or re.fullmatch("[0-9]{1,4}", answer) else np.nan
              for answer in answers]
    hits, iou, intersection, union = compare(result)
    if answers[1] and isinstance(answers[1], list) and not any("bbox_2d" in thing for thing in answers[1]):
        hits = iou = None                            # a label of points says nothing about boxes
    return {"hits": hits, "iou": iou, "intersection": intersection, "union": union, "error": counts[0] - counts[1]}

def compare(result: dict) -> tuple[float, float, float, float]:
    """What accuracy, gIoU and cIoU are made of: (hits / max(#predicted, #labelled), IoU, intersection, union)."""
    predicted, label, corner = result["prediction"], result["label"], np.tile(result["size"], 2)
    if isinstance(label, str):                       # words have no boxes; a list of objects has a number
        answer = str(len(predicted)) if isinstance(predicted, list) else predicted or ""
        right = float(same_answer(answer, rewards.boxed(label) or label))
        return right, right, 0.0, 0.0
    a, b = (np.array([found.get("bbox_2d", [0] * 4) for found in objects], float).reshape(-1, 4)
            for objects in (predicted if isinstance(predicted, list) else [], label))   # no box: one without area
    intersection, union = result.get("overlap") or areas(a.clip(0, corner), b.clip(0, corner))   # of masks, if measured
    if not predicted or not label:                   # right if both are []; no answer is None
        return float(predicted == label), float(predicted == label), intersection, union
    pairs = rewards.match((rewards.iou(a, b) > 0.5).astype(int))
    return len(pairs) / max(len(a), len(b)), ratio(intersection, union) or 0.0, intersection, union
