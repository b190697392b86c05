"""What the study measures of a checkpoint: accuracy by sort of question, how it answers, what it still remembers."""

import json
from pathlib import Path

import numpy as np

import data
import eval as evaluation
import make_tiny
import model
import rewards
from make_digits import draw, make_row
from study_report import SORTS

# Lessons of the base that no training set holds.
RETENTION = ("where", "name", "outline")


def measure(checkpoint: Path, samples: list[data.Sample], lesson_size: int = 0) -> dict[str, float]:
    """All numbers of a checkpoint, as shares from 0 to 1; without retention if lesson_size is 0."""
    network, processor = model.load_pretrained(checkpoint), data.Processor(checkpoint, data.TASKS["digits"])
    results, _ = evaluation.evaluate(network, processor, samples, max_new_tokens=64, batch_size=100)
    numbers = outcomes(results)
    if lesson_size:
        for sort in RETENTION:
            numbers[sort] = retention(network, processor, sort, lesson_size)
        numbers["retention"] = np.mean([numbers[sort] for sort in RETENTION])
    return {name: round(float(value), 5) for name, value in numbers.items()}


def outcomes(results: list[dict]) -> dict[str, float]:
    """Accuracy (IoU > 0.5, or a right []) and thinking by sort of question, and what else is counted."""
    numbers = {}
    for sort in SORTS:
        answers = [result for result in results if result["id"].endswith(f" {sort}")]
        numbers[sort] = np.mean([evaluation.measure(result)["one_to_one"] for result in answers])
        numbers[f"thinking, {sort}"] = np.mean([result["thinking"] for result in answers])
    numbers["mean of four"] = np.mean([numbers[sort] for sort in SORTS])
    numbers["mean of three"] = np.mean([numbers[sort] for sort in SORTS if sort != "absent"])
    numbers["false []"] = np.mean([result["prediction"] == [] for result in results if result["label"]])
    for name in ("thinking", "truncated"):
        numbers[name] = np.mean([result[name] for result in results])
    return numbers


def retention(network, processor, sort: str, count: int) -> float:
    """Share of a lesson's questions that are still answered as the base was taught: the very words, or for outlines
    a box with IoU > 0.5. The pictures are new; the handwriting is what the base has learnt to read, as what it could
    never do it cannot forget."""
    rng = np.random.default_rng([99, 2])                 # no data set's
    examples, truths = [], []
    for _ in range(count):
        image, scene = draw(rng)
        question, truth = make_tiny.lesson(scene, sort, rng)
        examples.append(processor.encode(data.Sample("", question, image, [], (48, 48), (48, 48))))
        truths.append(truth)
    kept = []
    for truth, [completion] in zip(truths, model.generate(network, examples, 1, 64, temperature=0)):
        text = processor.decode(completion.ids, completion.finished)
        if sort == "outline":
            overlaps = rewards.iou(boxes_in(text), boxes_in(truth))
            kept.append(overlaps.shape == (1, 1) and overlaps[0, 0] > 0.5)
        else:
            kept.append(text == truth)
    return np.mean(kept)


def boxes_in(text: str) -> list:
    return [found.get("bbox_2d", [0] * 4) for found in rewards.read_answer(text) or []]


def test_samples(path: Path, size: int) -> list[data.Sample]:
    """Questions that no split has: the test split goes on behind its 400 published ones."""
    if not path.exists():
        rows = [json.dumps(make_row("test", 400 + index)) for index in range(size)]
        evaluation.write_text(path, "\n".join(rows) + "\n")
    return data.load_samples(path, data.TASKS["digits"], "test")


def sampled_empty(checkpoint: Path, size: int) -> float:
    """How often a checkpoint samples [] where nothing is there: the share of 8 rollouts for each such question among
    the first of the validation split."""
    processor = data.Processor(checkpoint, data.TASKS["digits"])
    samples = data.load_samples(None, processor.task, "validation", size)
    examples = [processor.encode(sample) for sample in samples if not sample.label]
    groups = model.generate(model.load_pretrained(checkpoint), examples, 8, 64, seeds=list(range(len(examples))))
    texts = [processor.decode(completion.ids, completion.finished) for group in groups for completion in group]
    return float(np.mean([rewards.read_answer(text) == [] for text in texts]))
