"""Evaluate a checkpoint: greedy answers, the metrics of the ViSurf authors' evaluation, a picture of predictions.

    python eval.py                                                        # bundled checkpoint, built-in task
    python eval.py --task grounding --model Qwen/Qwen2.5-VL-7B-Instruct --data my.jsonl
    python eval.py --compare runs/shapes-visurf runs/shapes-rlvr          # side by side: a table, and report.html

samples -> `evaluate` -> results, a dict each, in pixels of the ORIGINAL image -> `metrics`, support/report.py
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import rewards

def evaluate(network, processor, task: data.Task, samples, *, max_new_tokens=512, batch_size=32, think=True,
             progress=True, **encoding) -> list[dict]:
    """Answer every sample by greedy decoding; results (see `make_result`) in the order of the samples.

    encoding: image_size, max_pixels, min_pixels, max_prompt_length of Processor.encode, whose DataError is not caught.
    A batch holds images of similar size, for little padding, and is opened when its turn comes; the largest come first,
    so that what does not fit into memory fails at once.
    """
    lengths = [(np.prod(data.image_size(sample.image)), len(sample.question)) for sample in samples]
    order, results = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True), [None] * len(samples)
    for first in tqdm(range(0, len(samples), batch_size), "evaluating", leave=False, disable=not progress or None):
        batch = order[first:first + batch_size]
        examples = [processor.encode(samples[i], task, think=think, **encoding) for i in batch]
        completions = model.generate(network, examples, 1, max_new_tokens, temperature=0)
        for i, example, [completion] in zip(batch, examples, completions):
            results[i] = make_result(processor, task, example, completion, think)
    return results

def make_result(processor, task: data.Task, example, completion, think: bool) -> dict:
    """One answer, ready for JSON, in pixels of the original image; only its reward is counted in the model's frame."""
    text, sample = processor.decode(completion.ids), example.sample
    predicted, thresholds = rewards.parse_answer(text), rewards.Thresholds(**(task.thresholds or {}))
    return {
        "id": sample.id, "where": sample.where, "question": sample.question, "completion": text,
        "prediction": None if predicted is None else example.to_original(predicted),     # None: no well-formed answer
        "label": example.truth, "size": list(example.size), "length": len(completion.ids),
        "truncated": not completion.finished, "thinking": rewards.has_thinking(text),
        "reward": rewards.score(text, example.objects, task.name, example.frame, thresholds, think)}

def metrics(results: list[dict]) -> dict:
    """All metrics by name; None where there is no sample to measure one on.

    accuracy     one-to-one pairs with IoU > 0.5 / max(#predicted, #labelled), mean over samples whose label is not []
    gIoU         mean IoU of all predicted boxes, as one mask, with all labelled ones; label []: 1 for [] and else 0
    cIoU         sum of the intersections / sum of the unions of these masks: large objects weigh more
    N-Acc        share of the samples with label [] that were answered with []
    well_formed  share with an answer that can be parsed; any other is wrong above, and an empty mask
    thinking     share that is exactly <think>…</think> <answer>…</answer>; truncated: cut off at the length limit
    length       mean number of tokens, the end token included; reward: mean total
    """
    mean = lambda values: sum(values) / len(values) if values else None
    hits, ious, intersections, unions = zip(*map(compare, results)) if results else [()] * 4
    return {
        "accuracy": mean([hit for hit, result in zip(hits, results) if result["label"]]),
        "gIoU": mean(ious),
        "cIoU": sum(intersections) / sum(unions) if sum(unions) else None,
        "N-Acc": mean([hit for hit, result in zip(hits, results) if not result["label"]]),
        "well_formed": mean([result["prediction"] is not None for result in results]),
        **{name: mean([result[name] for result in results]) for name in ("thinking", "truncated", "length")},
        "reward": mean([result["reward"]["total"] for result in results]), "samples": len(results)}

def compare(result: dict) -> tuple[float, float, float, float]:
    """What accuracy, gIoU and cIoU are made of: (hits / max(#predicted, #labelled), IoU, intersection, union)."""
    predicted, label, corner = result["prediction"], result["label"], np.tile(result["size"], 2)
    a, b = (np.array([found.get("bbox_2d", [0] * 4) for found in objects or []], float).reshape(-1, 4)
            for objects in (predicted, label))       # an object without a box has one without area
    intersection, union = areas(a.clip(0, corner), b.clip(0, corner))
    if not predicted or not label:                   # right if both are []; no answer is None
        return float(predicted == label), float(predicted == label), intersection, union
    pairs = rewards.match((rewards.iou(a, b) > 0.5).astype(int))
    return len(pairs) / max(len(a), len(b)), intersection / union, intersection, union

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

def parse_command_line(argv=None) -> argparse.Namespace:
    """The flags; a mistake in them is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"eval.py: {message}\n")
    flag = parser.add_argument
    flag("--task", default="shapes", choices=tuple(data.TASKS), help="what is asked (default: shapes)")
    flag("--model", help="checkpoint directory or hub id (default: the task's)")
    flag("--data", help="file, folder or hub id (default: the task's evaluation data)")
    flag("--split", default="test", choices=data.SPLITS, help="of the data, where they have splits (default: test)")
    flag("--limit", type=int, help="only the first so many samples")
    flag("--batch_size", type=int, default=32, help="prompts in a batch (default: 32)")
    flag("--max_completion_length", type=int, help="longest answer in tokens (default: the task's)")
    flag("--think", action=argparse.BooleanOptionalAction, default=True, help="ask for reasoning before the answer")
    flag("--image_size", type=int, nargs="+", help="side, or width and height, to which images are squashed, in pixels")
    flag("--min_pixels", type=int, help="keep aspect ratios instead, with at least this many pixels")
    flag("--max_pixels", type=int, help="keep aspect ratios instead, with at most this many pixels")
    flag("--skip_bad_rows", action="store_true", help="leave out rows that cannot be used, and count them")
    flag("--compare", nargs="+", metavar="RUN", help="evaluate nothing: show runs side by side, in report.html too")
    flag("--output_dir", help="for answers.json and gallery.png, or report.html (default: runs/eval-TASK-MODEL)")
    config = parser.parse_args(argv)
    if config.compare:
        return config
    for name, value in vars(config).items():
        if type(value) in (int, list) and (np.min(value) < 1 or np.size(value) > 2):
            parser.error(f"--{name} must be at least 1 (and at most two numbers), not {value}")
    task = data.TASKS[config.task]
    config.image_size = config.image_size and (config.image_size * 2)[:2]              # one number is both sides
    config.model, config.data = config.model or task.model, config.data or task.eval_data
    config.max_completion_length = config.max_completion_length or task.recipe.get("max_completion_length", 512)
    config.output_dir = config.output_dir or "-".join(["runs/eval", config.task, *Path(config.model).parts[-2:]])
    return config

def main(argv=None):
    from support import page, report  # not above: they import this file

    config = parse_command_line(argv)
    try:
        if config.compare:
            return page.compare_runs(config.compare, config.output_dir)
        task, directory = data.TASKS[config.task], Path(config.output_dir)
        encoding = {name: getattr(config, name) for name in ("think", "image_size", "min_pixels", "max_pixels")}
        samples = data.load_samples(config.data, task, config.split, config.limit, config.skip_bad_rows)
        checkpoint = data.fetch(config.model, "model")
        processor = data.Processor.from_pretrained(checkpoint)
        processor.encode(samples[0], task, **encoding)         # what cannot work fails before the weights are read
        directory.mkdir(parents=True, exist_ok=True)
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        network = model.load_pretrained(checkpoint, dtype, device)
        results = evaluate(network, processor, task, samples, max_new_tokens=config.max_completion_length,
                           batch_size=config.batch_size, **encoding)
    except (data.DataError, model.CheckpointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    report.end_of_evaluation(directory, vars(config), metrics(results), results, samples)

if __name__ == "__main__":
    main()
