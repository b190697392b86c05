"""Evaluate a checkpoint: greedy answers, the metrics of the ViSurf authors' evaluation, and a picture of predictions.

    python eval.py                                                        # bundled checkpoint, built-in task
    python eval.py --model runs/shapes-visurf/checkpoint-500 --limit 100
    python eval.py --task grounding --model Qwen/Qwen2.5-VL-7B-Instruct --data my.jsonl

samples -> `evaluate` -> results, a plain dict for each sample -> `metrics`, `format_table`, `gallery`

A result holds, ready for JSON: id, where, question, completion (text), prediction (objects, [] for nothing found, None for
no well-formed answer), label (objects), size (width, height), length (tokens, the end token included), truncated,
thinking, reward (components by name and "total", as in training). Prediction, label and size are in pixels of the ORIGINAL
image, whatever size and coordinates the model worked with; only the reward is counted in the model's own frame.
"""

import argparse
import json
import math
import sys
from bisect import bisect_right
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import model
import rewards

WINDOW = 4    # batches that are encoded together and sorted by length; at 840x840 pixels a sample takes 17 MB


# ---- Answers --------------------------------------------------------------------------------------------------------

def evaluate(network, processor, task: data.Task, samples, *, think=True, max_new_tokens=512, batch_size=32,
             image_size=None, max_pixels=None, min_pixels=None, max_prompt_length=None, progress=True) -> list[dict]:
    """Answer every sample by greedy decoding; results in the order of the samples.

    Images are opened a few batches at a time, and prompts of similar length share a batch, so that little of it is
    padding. The image settings are those of Processor.encode. Raises its DataError, for example for a damaged image.
    """
    settings = {"think": think, "image_size": image_size, "max_pixels": max_pixels, "min_pixels": min_pixels,
                "max_prompt_length": max_prompt_length}
    results, window = [None] * len(samples), WINDOW * batch_size
    with tqdm(total=len(samples), desc="evaluating", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(samples), window):
            indices = range(len(samples))[start:start + window]
            examples = {i: processor.encode(samples[i], task, **settings) for i in indices}
            order = sorted(indices, key=lambda i: len(examples[i].ids))
            for first in range(0, len(order), batch_size):
                batch = {i: examples.pop(i) for i in order[first:first + batch_size]}    # popped: frees the pixels
                answers = model.generate(network, list(batch.values()), 1, max_new_tokens, temperature=0)
                for (i, example), [completion] in zip(batch.items(), answers):
                    results[i] = make_result(processor, task, example, completion, think)
                bar.update(len(batch))
    return results


def make_result(processor, task: data.Task, example, completion, think: bool) -> dict:
    """One answer as the module's docstring describes it."""
    text, sample = processor.decode(completion.ids), example.sample
    predicted = rewards.parse_answer(text)
    thresholds = rewards.Thresholds(**(task.thresholds or {}))
    return {
        "id": sample.id, "where": sample.where, "question": sample.question, "completion": text,
        "prediction": None if predicted is None else example.to_original(predicted),
        "label": example.truth, "size": list(example.size),
        "length": len(completion.ids), "truncated": not completion.finished, "thinking": rewards.has_thinking(text),
        "reward": rewards.score(text, example.objects, task.name, example.frame, thresholds, think)}


# ---- Metrics --------------------------------------------------------------------------------------------------------

def metrics(results: list[dict], names=("accuracy", "gIoU", "cIoU", "N-Acc")) -> dict:
    """The metrics `names` (those of a task), then what is reported for every task. None: no sample to measure it on.

    accuracy      over samples with something to find: pairs of boxes with IoU > 0.5, matched one to one / max(#predicted,
                  #labelled); their mean
    gIoU          mean over all samples of intersection / union of the predicted boxes, as one mask, with the labelled
                  ones; where there is nothing to find, 1 for the answer [] and else 0
    cIoU          sum of all these intersections / sum of all unions: large objects weigh more
    N-Acc         share of the samples with nothing to find that were answered with []
    well_formed   share with an answer that can be parsed; any other is an empty mask and a wrong answer above
    thinking      share of the completions that are exactly <think>…</think> <answer>…</answer>
    truncated     share cut off at the length limit
    length        mean number of tokens; reward: mean total reward; samples: how many there are
    """
    return {
        **{name: METRICS[name](results) for name in names},
        "well_formed": mean(result["prediction"] is not None for result in results),
        **{name: mean(result[name] for result in results) for name in ("thinking", "truncated", "length")},
        "reward": mean(result["reward"]["total"] for result in results),
        "samples": len(results)}


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def hits(result: dict) -> float:
    """Share of boxes that are right, from 0 to 1; a correct [] is 1, no answer is 0."""
    predicted, label = result["prediction"], result["label"]
    if not predicted or not label:
        return float(predicted == label)     # both []
    close = rewards.iou(boxes(predicted), boxes(label)) > 0.5
    return len(rewards.match(close.astype(int))) / max(close.shape)


def mask_iou(result: dict) -> float:
    """Intersection over union of all predicted with all labelled boxes; with nothing to find, 1 for [] and else 0."""
    if not result["label"]:
        return hits(result)
    intersection, union = overlap(result)
    return intersection / union


def cumulative_iou(results: list[dict]) -> float | None:
    overlaps = [overlap(result) for result in results]
    union = sum(union for _, union in overlaps)
    return sum(intersection for intersection, _ in overlaps) / union if union else None


# Metric -> function(results) -> number or None. A task names its own (data.Task.metrics).
METRICS = {
    "accuracy": lambda results: mean(hits(result) for result in results if result["label"]),
    "gIoU": lambda results: mean(mask_iou(result) for result in results),
    "cIoU": cumulative_iou,
    "N-Acc": lambda results: mean(hits(result) for result in results if not result["label"])}


def boxes(objects: list[dict] | None) -> np.ndarray:
    """Boxes (n, 4) of n objects; an object listed without a box has one without area."""
    return np.array([found.get("bbox_2d", [0] * 4) for found in objects or []], float).reshape(-1, 4)


def overlap(result: dict) -> tuple[float, float]:
    """Areas of intersection and union of the predicted and the labelled mask, in original pixels."""
    return areas(boxes(result["prediction"]), boxes(result["label"]), result["size"])


def areas(boxes_a, boxes_b, size) -> tuple[float, float]:
    """Areas of intersection and union of two masks, each the union of some boxes (n, 4) within an image (width, height).

    Exact, and independent of the image's size: the boxes' own edges cut the image into at most (2n - 1)² cells, each
    wholly inside or outside of every box (coordinate compression).

    >>> areas([[0, 0, 2, 2]], [[1, 1, 3, 3], [1, 1, 3, 3]], (10_000, 10_000))
    (1.0, 7.0)
    """
    a, b = (np.clip(np.reshape(boxes, (-1, 4)), 0, [*size, *size]) for boxes in (boxes_a, boxes_b))
    xs, ys = (np.unique(np.concatenate([a, b])[:, axis::2]) for axis in (0, 1))
    cells = np.outer(np.diff(ys), np.diff(xs))                               # areas (rows, columns)

    def mask(boxes):
        columns = (boxes[:, :1] <= xs[:-1]) & (xs[1:] <= boxes[:, 2:3])      # (n, columns) True = inside box n
        rows = (boxes[:, 1:2] <= ys[:-1]) & (ys[1:] <= boxes[:, 3:])         # (n, rows)
        return rows.T.astype(np.float32) @ columns.astype(np.float32) > 0    # (rows, columns) True = inside any

    return float(cells[mask(a) & mask(b)].sum()), float(cells[mask(a) | mask(b)].sum())


def format_table(metrics: dict) -> str:
    """Metrics as aligned lines of name and value: shares in percent, `-` where there was nothing to measure."""
    def form(name, value):
        if value is None:
            return "-"
        return str(value) if name == "samples" else f"{value:.2f}" if name in ("length", "reward") else f"{value:.1%}"

    return "\n".join(f"{name:12s} {form(name, value):>8s}" for name, value in metrics.items())


# ---- The gallery ----------------------------------------------------------------------------------------------------

TILE, TEXT, GAP, HEADER = 300, 152, 24, 64               # pixels: picture, text below it, between tiles, legend
LABEL, PREDICTION = (0, 150, 90), (235, 95, 0)
BLACK, GREY, PALE = (25, 25, 25), (105, 105, 105), (244, 244, 244)


def gallery(results: list[dict], samples, path, columns=4, count=12):
    """Write a PNG of up to `count` answers over their images, right and wrong ones spread evenly over the results."""
    chosen = choose(results, count)
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), HEADER + rows * (TILE + TEXT + GAP)), "white")
    draw_legend(ImageDraw.Draw(sheet), results, len(chosen))
    for place, i in enumerate(chosen):
        image = data.open_image(samples[i].image, samples[i].where)
        x, y = GAP + place % columns * (TILE + GAP), HEADER + place // columns * (TILE + TEXT + GAP)
        sheet.paste(draw_picture(image, results[i]), (x, y))
        draw_text(ImageDraw.Draw(sheet), x, y + TILE + 8, results[i])
    png = BytesIO()
    sheet.save(png, format="PNG")
    write_whole(path, png.getvalue())


def choose(results: list[dict], count: int) -> list[int]:
    """Indices of `count` results, half of them wholly right and half not, as far as there are enough of both."""
    right, wrong = ([i for i, result in enumerate(results) if (hits(result) == 1) == which] for which in (True, False))
    wrongs = min(len(wrong), max(count // 2, count - len(right)))
    spread = lambda items, n: [items[k * len(items) // n] for k in range(n)]
    return sorted(spread(wrong, wrongs) + spread(right, min(len(right), count - wrongs)))


def draw_legend(draw: ImageDraw.ImageDraw, results: list[dict], shown: int):
    right = sum(hits(result) == 1 for result in results)
    x, font = GAP, ImageFont.load_default(17)
    for colour, text in ((LABEL, "label"), (PREDICTION, "prediction")):
        draw.rectangle((x, 22, x + 18, 40), outline=colour, width=3)
        draw.text((x + 26, 31), text, BLACK, font, anchor="lm")
        x += 26 + font.getlength(text) + 28
    draw.text((x, 31), f"{shown} of {len(results)} answers, half of them wrong ones if there are; {right} of all "
              f"{len(results)} are wholly right", GREY, font, anchor="lm")


def draw_picture(image: Image.Image, result: dict) -> Image.Image:
    """The image in a square tile with the original's shape, boxes and points over it: label below, prediction on top."""
    scale = TILE / max(result["size"])
    size = tuple(max(1, round(side * scale)) for side in result["size"])
    tile, corner = Image.new("RGB", (TILE, TILE), PALE), ((TILE - size[0]) // 2, (TILE - size[1]) // 2)
    # pixels of a tiny image are shown as they are, not blurred into shapes that nobody saw
    tile.paste(image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC), corner)
    draw = ImageDraw.Draw(tile)
    for objects, colour, width in ((result["label"], LABEL, 5), (result["prediction"] or [], PREDICTION, 2)):
        for found in data.move_objects(objects, result["size"], size):
            x, y = found.get("point_2d", (-99, -99))
            x1, y1, x2, y2 = found.get("bbox_2d", (0, 0, -1, -1))
    return tile


def write_whole(path, content: bytes):
    """Write a file beside its place and rename it: nobody ever finds half of it."""
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
