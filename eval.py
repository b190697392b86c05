"""Evaluate a checkpoint: greedy answers, the metrics of the ViSurf authors' evaluation, a picture of predictions.

    python eval.py                                                        # bundled checkpoint, built-in task
    python eval.py --task grounding --model Qwen/Qwen2.5-VL-7B-Instruct --data my.jsonl
    python eval.py --compare runs/digits-visurf runs/digits-rlvr          # side by side: a table, and report.html

samples -> `evaluate` -> results, a dict each, in pixels of the ORIGINAL image -> `metrics`, support/report.py
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import rewards
from support import flags, masks, page, processes, report
from support.flags import option
from support.measures import clicks, compare, mean, measure, ratio, roc_auc, suspicion

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

@dataclass
class Config:
    """What to evaluate; every field is a flag."""

    task: str = option("digits", "what is asked", tuple(data.TASKS))
    model: str = option("", "checkpoint directory or hub id (default: the task's)")
    split: str = option("test", "of the data, where they have splits", data.SPLITS)
    data: str = option("", "file, folder or hub id (default: the task's evaluation data)")
    limit: int = option(0, "only the first so many samples, 0 for all")
    batch_size: int = option(32, "prompts in a batch")
    max_completion_length: int = option(0, "longest answer in tokens (default: the task's)")
    think: bool = option(True, "ask for reasoning before the answer")
    image_size: list = option((), "side, or width and height, to which images are squashed, in pixels", several=int)
    min_pixels: int = option(0, "keep aspect ratios instead, with at least this many pixels")
    max_pixels: int = option(0, "keep aspect ratios instead, with at most this many pixels")
    masks: str = option("", "compare masks, made from the answers by this SAM 2 checkpoint, not boxes")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and count them")
    compare: list = option((), "evaluate nothing: show these runs side by side, in report.html too", several=str)
    output_dir: str = option("", "for answers.json and gallery.png, or report.html (default: runs/eval-TASK-MODEL)")

def parse_command_line(argv=None) -> Config:
    """The flags; a mistake in them is one line on stderr and exit code 2."""
    config, _ = flags.parse(Config, "eval.py", __doc__.split("\n")[0], argv=argv)
    if config.compare:
        return config
    task = data.TASKS[config.task]
    config.model, config.data = config.model or task.model, config.data or task.eval_data
    config.max_pixels = config.max_pixels or task.recipe.get("max_pixels", 0)
    config.max_completion_length = config.max_completion_length or task.recipe.get("max_completion_length", 512)
    config.output_dir = config.output_dir or "-".join(["runs/eval", config.task, *Path(config.model).parts[-2:]])
    return config

def run(config: Config):
    """Answer, measure, and write and show the results; every rank has a share of the samples."""
    task, directory, device = data.TASKS[config.task], Path(config.output_dir), processes.start()
    encoding = flags.encoding(config)
    samples = data.load_samples(config.data, task, config.split, config.limit or None, config.skip_bad_rows)
    checkpoint = data.fetch(config.model, "model")
    processor = data.Processor.from_pretrained(checkpoint)
    processor.encode(samples[0], task, **encoding)             # what cannot work fails before the weights are read
    if config.masks:
        masks.check_masks(samples)
        sam = masks.load_sam(data.fetch(config.masks, "masks"), device)
    directory.mkdir(parents=True, exist_ok=True)
    network = model.load_pretrained(checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    share = processes.share(samples)
    results = evaluate(network, processor, task, share, max_new_tokens=config.max_completion_length,
                       batch_size=config.batch_size, progress=processes.is_first(), **encoding)
    if config.masks:
        masks.add_overlaps(results, share, sam)
    results = processes.interleaved(results)                   # in the order of the samples
    if processes.is_first():
        report.end_of_evaluation(directory, asdict(config), metrics(results, task), results, samples)

def main(argv=None):
    config = parse_command_line(argv)
    with processes.one_report("eval.py", (data.DataError, model.CheckpointError, OSError)):
        page.compare_runs(config.compare, config.output_dir) if config.compare else run(config)

if __name__ == "__main__":
    main()
    processes.leave()
