"""Evaluate a checkpoint: greedy answers, the metrics of the ViSurf authors' evaluation, a picture of predictions.

    python eval.py                                                        # bundled checkpoint, built-in task
    python eval.py --task grounding --model Qwen/Qwen2.5-VL-7B-Instruct --data my.jsonl

samples -> `evaluate` -> results, a dict each, in pixels of the ORIGINAL image -> `metrics`, support/report.py
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import rewards
from support import masks
from support.answers import same_answer
from support.measures import areas, clicks, mean, ratio, roc_auc, suspicion

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
    predicted, thresholds = rewards.read_answer(text, task.name), rewards.Thresholds(**(task.thresholds or {}))
    result = {
        "id": sample.id, "where": sample.where, "question": sample.question, "completion": text,
        "prediction": None if predicted is None else example.to_original(predicted),     # None: no well-formed answer
        "label": example.truth, "size": list(example.size), "length": len(completion.ids),
        "truncated": not completion.finished, "thinking": rewards.has_thinking(text),
        "reward": rewards.score(text, example.objects, task.name, example.frame, thresholds, think)}
    return result | {"verdict": verdict(result, task)}

def verdict(result: dict, task: data.Task) -> str:
    """How right an answer is by its task's first metric that says so, in words."""
    answers = [result["prediction"], result["label"]]
    if answers[0] is None:
        return "no answer"
    values = (METRICS[name]([result | measure(result)]) for name in task.metrics)
    worth = next((value for value in values if value is not None), None)
    words = {1: "right", 0: "wrong", None: "nothing to compare"}.get(worth, "partly right")
    if worth is None:
        return words
    if task.text_answer:
        predicted, label = (len(a) if isinstance(a, list) else rewards.boxed(a) or a for a in answers)
        return f"{words}: {predicted}" + f", not {label}" * (worth != 1)
    return words + (f", IoU {compare(result)[1]:.2f}" if answers[1] else ", nothing to find")

def metrics(results: list[dict], task: data.Task = data.GROUNDING) -> dict:
    """The task's METRICS and those of every task by name; None where there is no sample to measure one on.

    well_formed  share with an answer that can be parsed; any other is wrong above, an empty mask, a count of 0
    thinking     share that is exactly <think>…</think> <answer>…</answer>; truncated: cut off at the length limit
    length       mean number of tokens, the end token included; reward: mean total
    """
    measured = [result | measure(result) for result in results]
    return {
        **{name: METRICS[name](measured) for name in task.metrics},
        "well_formed": mean(result["prediction"] is not None for result in results),
        **{name: mean(result[name] for result in results) for name in ("thinking", "truncated", "length")},
        "reward": mean(result["reward"]["total"] for result in results), "samples": len(results)}

def measure(result: dict) -> dict:
    """What METRICS are made of: the four numbers of `compare`, and the error in the number of objects."""
    answers = [result["prediction"] or [], result["label"]]
    counts = [rewards.count(answer) if isinstance(answer, list) or re.fullmatch("[0-9]{1,4}", answer) else np.nan
              for answer in answers]
    hits, iou, intersection, union = compare(result)
    if answers[1] and isinstance(answers[1], list) and not any("bbox_2d" in thing for thing in answers[1]):
        hits = iou = None                            # a label of points says nothing about boxes
    return {"hits": hits, "iou": iou, "intersection": intersection, "union": union, "error": counts[0] - counts[1]}

# A metric is a function of all results, each with what `measure` adds to it.
METRICS = {
    # one-to-one pairs with IoU > 0.5 / max(#predicted, #labelled), where the label is not []; in math: equal answers
    "accuracy": lambda results: mean(result["hits"] for result in results if result["label"]),
    # mean IoU of all predicted boxes, as one mask, with all labelled ones; label []: 1 for [] and else 0
    "gIoU": lambda results: mean(result["iou"] for result in results),
    # sum of the intersections / sum of the unions of these masks: large objects weigh more
    "cIoU": lambda results: ratio(sum(result["intersection"] for result in results),
                                  sum(result["union"] for result in results)),
    # share of the samples with label [] that were answered with []
    "N-Acc": lambda results: mean(result["hits"] for result in results if not result["label"]),
    # GUI: the first object's point, or else the centre of its box, lies in a labelled box, edge included
    "point_in_box": lambda results: mean(clicks(result) for result in results if result["label"]),
    # anomaly: something was listed where there is something, and nothing where there is nothing
    "anomaly_acc": lambda results: mean(float(suspicion(result) == bool(result["label"])) for result in results),
    "ROC-AUC": lambda results: roc_auc(list(map(suspicion, results)), [bool(result["label"]) for result in results]),
    # counting: share of exact counts, mean absolute error, root of the mean squared error
    "count_acc": lambda results: mean(float(result["prediction"] is not None and result["error"] == 0)
                                      for result in results),
    "MAE": lambda results: mean(abs(result["error"]) for result in results),
    "RMSE": lambda results: np.sqrt(mean(result["error"] ** 2 for result in results)).item() if results else None}

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
    flag("--masks", metavar="MODEL", help="compare masks, made from the answers by this SAM 2 checkpoint, not boxes")
    flag("--skip_bad_rows", action="store_true", help="leave out rows that cannot be used, and count them")
    flag("--output_dir", help="for answers.json and gallery.png (default: runs/eval-TASK-MODEL)")
    config = parser.parse_args(argv)
    for name, value in vars(config).items():
        if type(value) in (int, list) and (np.min(value) < 1 or np.size(value) > 2):
            parser.error(f"--{name} must be at least 1 (and at most two numbers), not {value}")
    task = data.TASKS[config.task]
    config.image_size = config.image_size and (config.image_size * 2)[:2]              # one number is both sides
    config.model, config.data = config.model or task.model, config.data or task.eval_data
    config.max_pixels = config.max_pixels or task.recipe.get("max_pixels")
    config.max_completion_length = config.max_completion_length or task.recipe.get("max_completion_length", 512)
    config.output_dir = config.output_dir or "-".join(["runs/eval", config.task, *Path(config.model).parts[-2:]])
    return config

def main(argv=None):
    config = parse_command_line(argv)
    task, directory = data.TASKS[config.task], Path(config.output_dir)
    encoding = {name: getattr(config, name) for name in ("think", "image_size", "min_pixels", "max_pixels")}
    try:
        samples = data.load_samples(config.data, task, config.split, config.limit, config.skip_bad_rows)
        checkpoint = data.fetch(config.model, "model")
        processor = data.Processor.from_pretrained(checkpoint)
        processor.encode(samples[0], task, **encoding)         # what cannot work fails before the weights are read
        if config.masks:
            masks.check_masks(samples)
            sam = masks.load_sam(data.fetch(config.masks, "masks"), "cuda" if torch.cuda.is_available() else "cpu")
        directory.mkdir(parents=True, exist_ok=True)
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        network = model.load_pretrained(checkpoint, dtype, device)
        results = evaluate(network, processor, task, samples, max_new_tokens=config.max_completion_length,
                           batch_size=config.batch_size, **encoding)
        if config.masks:
            masks.add_overlaps(results, samples, sam)
    except (data.DataError, model.CheckpointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    answers = {"settings": vars(config), "metrics": metrics(results, task), "answers": results}
    (directory / "answers.json.partial").write_text(json.dumps(answers, indent=1))
    (directory / "answers.json.partial").replace(directory / "answers.json")
    from support.report import format_table, gallery  # not above: it imports this file

    gallery(results, samples, directory / "gallery.png")
    print(format_table(answers["metrics"]), "", directory / "answers.json", directory / "gallery.png", sep="\n")
    print(f"{samples.skipped} bad rows skipped, {samples.clipped} label boxes clipped to their image")

if __name__ == "__main__":
    main()
