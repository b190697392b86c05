"""Evaluate a checkpoint: greedy answers and the metrics of the ViSurf authors' evaluation.

    python eval.py                                              # bundled checkpoint, built-in task
    python eval.py --task grounding --model Qwen/Qwen2.5-VL-7B-Instruct --data my.jsonl
    torchrun --nproc_per_node 8 eval.py --task grounding        # each GPU answers its share

samples -> `evaluate` -> results, a dict each, in pixels of the ORIGINAL image -> `metrics`."""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model
import rewards
from data import UserError, require

def flag(default, help, low=0, high=np.inf, **words):
    """A field of Settings, with its words for argparse; a number must be from low to high."""
    def number(text):
        value = type(default)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {value}")
        return value
    words["help"] = f"{help} (%(default)r)"
    if isinstance(default, bool):
        words["action"] = argparse.BooleanOptionalAction
    elif not isinstance(default, str):
        words["type"] = number
    return field(default=default, metadata=words)

@dataclass
class Common:
    """Flags of train.py and eval.py."""
    task: str = flag("digits", "what to ask of the images", choices=tuple(data.TASKS))
    model: str = flag("", "checkpoint directory or hub id")
    data: str = flag("", "file, folder or hub id")
    output_dir: str = flag("", "by default runs/TASK-METHOD, or runs/eval-TASK-MODEL")
    max_completion_length: int = flag(512, "tokens; training memory grows as its square", 1, 8192)
    image_size: int = flag(0, "side of images in pixels", 1, 8192)
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    cuda_graph: bool = flag(True, "on a GPU, capture the decoding step: faster")
    timeout: float = flag(30.0, "minutes to wait for a silent rank", 0.01, 1e4)

@dataclass
class Settings(Common):
    """Evaluate a checkpoint by its greedy answers. The task decides some defaults."""
    split: str = flag("test", "of the data", choices=("train", "validation", "test"))
    limit: int = flag(0, "only the first LIMIT samples; 0: all")
    eval_batch_size: int = flag(32, "prompts answered at a time", 1, 4096)

def main(argv=None):
    """The command line."""
    run_program("eval.py", run, parse(Settings, argv, "eval.py"))

def run(settings):
    """Answer, measure, write answers.json and print the metrics."""
    device = start(settings.timeout)
    task = data.TASKS[settings.task]
    samples = data.load_samples(settings.data, task, settings.split, settings.limit,
                                settings.skip_bad_rows)
    source = data.fetch(settings.model)
    checkpoint = data.fetch(model.find_base(source))
    model.check_checkpoint(checkpoint)
    processor = data.Processor(checkpoint, task, settings.image_size)
    name = "-".join(Path(settings.model).absolute().parts[-2:])
    directory = Path(settings.output_dir or f"runs/eval-{task.name}-{name}")
    on_first_rank(claim, directory)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = model.load_pretrained(checkpoint, dtype, device)
    if source != checkpoint:
        model.add_adapters(network, source)
    note_signals()
    results, bad_rows = evaluate(network, processor, samples, settings.max_completion_length,
                                 settings.eval_batch_size, settings.cuda_graph)
    means = metrics(results, task) | {"bad rows": len(bad_rows)}
    content = {"settings": asdict(settings), "metrics": means, "answers": results}
    on_first_rank(write_text, directory / "answers.json", json.dumps(content, indent=1))
    on_first_rank(print, f"{format_table(means)}\n{directory}/answers.json")
    leave_if_asked("eval.py", f"{len(results)} of {len(samples)} samples are answered")
    for problem in bad_rows:
        require(settings.skip_bad_rows, f"{problem}; the rest are answered; see --skip_bad_rows")

def evaluate(network, processor, samples, max_new_tokens=512, batch_size=32, cuda_graph=True):
    """All ranks' results in samples' order, and a line on each sample that cannot be used."""
    results = []
    bad_rows = []
    shared = my_share(samples)
    for first in tqdm(range(0, len(shared), batch_size), "evaluating", leave=False,
                      disable=None if is_first() else True):     # None: in terminals only
        if received_signals:
            break
        examples = []
        for sample in shared[first : first + batch_size]:
            try:
                examples.append(processor.encode(sample))
            except UserError as error:
                bad_rows.append(str(error))
        completions = model.generate(network, examples, 1, max_new_tokens, temperature=0,
                                     cuda_graph=cuda_graph)
        for example, [completion] in zip(examples, completions):
            results.append(make_result(processor, example, completion))
    return gather(results), gather(bad_rows)

def make_result(processor, example, completion):
    """One answer, ready for JSON; only its reward is computed in the model's frame."""
    sample = example.sample
    text = processor.decode(completion.ids, completion.finished)
    predicted = rewards.read_answer(text, processor.task.kind)
    predicted = data.move_objects(predicted, example.frame, sample.size)
    return {
        "id": sample.id, "where": sample.where, "question": sample.question,
        "completion": text, "prediction": predicted,
        "label": data.move_objects(sample.label, sample.frame, sample.size),
        "size": list(sample.size), "length": len(completion.ids),
        "logprob": completion.logprobs.sum().item(), "truncated": not completion.finished,
        "thinking": rewards.has_thinking(text), "reward": processor.score(text, example),
    }

# ---- Metrics -----------------------------------------------------------------------------------
def metrics(results, task):
    """The task's and general metrics, each a mean over the samples that have it, or None."""
    columns = {}
    for result in results:
        for name, value in measure(result, task.kind).items():
            columns.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    if means.get("union"):
        # All intersections over all unions: large objects weigh more than in gIoU.
        means["cIoU"] = means["intersection"] / means["union"]
    if "detected" in means and "N-Acc" in means:
        # With yes-or-no answers, ROC-AUC is the mean of two hit rates: with a defect, and without.
        means["ROC-AUC"] = (means["detected"] + means["N-Acc"]) / 2
    names = (*task.metrics, "well_formed", "thinking", "truncated", "length", "reward")
    return {name: means.get(name) for name in names} | {"samples": len(results)}

def measure(result, kind="objects"):
    """The scores of one answer, as in the authors' evaluation; an unreadable one is wrong."""
    predicted = result["prediction"]
    # The reward has an "accuracy", too: mathematics keeps it, for objects the metric replaces it.
    scores = result["reward"] | {"reward": sum(result["reward"].values())}
    scores |= {name: result[name] for name in ("thinking", "truncated", "length")}
    scores["well_formed"] = predicted is not None
    if kind == "count":
        error = rewards.count(predicted or []) - rewards.count(result["label"])
        scores["count_acc"] = predicted is not None and error == 0
        scores["MAE"] = abs(error)
    elif kind == "objects":
        scores |= measure_objects(predicted, result["label"], result["size"])
    return scores

def measure_objects(predicted, label, size):
    """Scores of objects, or of None, in pixels of an image of `size`."""
    boxes = numbers_of(predicted, "bbox_2d", 4)  # (n, 4)
    true_boxes = numbers_of(label, "bbox_2d", 4)  # (m, 4)
    mask = paint(boxes, size)
    true_mask = paint(true_boxes, size)
    intersection = (mask & true_mask).sum()
    union = (mask | true_mask).sum()
    scores = {"intersection": intersection, "union": union}
    if not label:
        # Only [] is right where there is nothing. N-Acc is how often it is answered there.
        names = ("accuracy", "one_to_one", "gIoU", "N-Acc", "anomaly_acc")
        return scores | dict.fromkeys(names, predicted == [])
    scores["gIoU"] = intersection / max(union, 1)
    # For anomalies, anything that is listed says that there is a defect.
    scores["detected"] = scores["anomaly_acc"] = bool(predicted)
    # accuracy, the authors': a listed box, or the hull of all, has IoU > 0.5 with the label's hull.
    overlaps = rewards.iou([*boxes, box_around(boxes)], box_around(true_boxes))
    scores["accuracy"] = (overlaps > 0.5).any()
    # one_to_one, ours: an object too many costs as much as one too few.
    pairs = rewards.match(rewards.iou(boxes, true_boxes) > 0.5)
    scores["one_to_one"] = len(pairs) / max(len(predicted or []), len(label))
    # point_in_box: any listed point, or else a box's centre, is in a labelled box, edge included.
    points = numbers_of(predicted, "point_2d", 2)[:, None]  # (n, 1, 2)
    if len(points) == 0:
        points = boxes.reshape(-1, 2, 2).mean(axis=1, keepdims=True)
    inside = (true_boxes[:, :2] <= points) & (points <= true_boxes[:, 2:])  # (n, m, 2)
    scores["point_in_box"] = inside.all(axis=2).any()
    return scores

def numbers_of(answer, name, length):
    """Boxes (n, 4) or points (n, 2) of an answer's objects; none of an unreadable answer."""
    numbers = [found[name] for found in answer or [] if name in found]
    return np.array(numbers, float).reshape(-1, length)

def box_around(boxes):
    """The smallest box (4,) that holds all boxes (n, 4); if none, one that overlaps nothing."""
    low, high = np.split(boxes, 2, axis=1)
    return np.append(low.min(0, initial=np.inf), high.max(0, initial=-np.inf))

def paint(boxes, size):
    """One mask (height, width), True inside any of boxes (n, 4)."""
    mask = np.zeros(size[::-1], bool)
    for x1, y1, x2, y2 in boxes.round().astype(int).clip(0):
        mask[y1:y2, x1:x2] = True
    return mask

def format_table(values):
    """Metrics as text, one a line; nan, if no sample has it."""
    return "\n".join(f"{name:12}{np.float64(value):10.6g}" for name, value in values.items())

# ---- Flags and files ---------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, printed by one rank, and exit code 2."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if is_first() else None)

def parse(settings_class, argv, program):
    """Read flags into a dataclass; the task's defaults are set first, so that --help shows them."""
    parser = Parser(program, description=settings_class.__doc__, allow_abbrev=False, add_help=False)
    for setting in fields(settings_class):
        parser.add_argument(f"--{setting.name}", default=setting.default, **setting.metadata)
    # --help ends the program, and so it comes after the task's defaults.
    known, _ = parser.parse_known_args(argv)
    task = data.TASKS[known.task]
    source = task.data if getattr(known, "split", "train") == "train" else task.eval_data
    parser.set_defaults(model=task.model, data=source, eval_data=task.eval_data,
                        image_size=task.image_size, **task.recipe)
    if getattr(known, "lora_rank", 0):
        parser.set_defaults(learning_rate=10 * parser.get_default("learning_rate"))
    parser.add_argument("-h", "--help", action="help")
    values = vars(parser.parse_args(argv))
    return settings_class(*[values[setting.name] for setting in fields(settings_class)])

held_locks = ExitStack()     # files, locked until the program ends, however it ends

def claim(directory, resume=False):
    """Take a directory that is new or empty or, to resume, a run's own; else raise UserError."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = held_locks.enter_context(open(directory / ".lock", "w"))
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory}: another run is at work there") from None
    others = set(os.listdir(directory)) - {".lock"}
    require(not others or resume and "config.json" in others, f"{directory} is not empty: "
            "give another --output_dir, or --resume if a run of train.py was in it")

def write_text(path, text):
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)

# ---- One process or many -----------------------------------------------------------------------
received_signals = []

def run_program(program, function, *args):
    """Call function(*args). A user's mistake is one line and exit code 2; our own bugs raise."""
    sys.stdout.reconfigure(errors="replace")     # a terminal may lack what a model writes
    try:
        # Under torchrun, a failure is recorded, and all other processes are ended.
        record(function)(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, model.CheckpointError, OSError) as error:
        # Rank 0 speaks for all; what another rank alone met is in torchrun's summary.
        if is_first():
            complain(program, error)
        sys.exit(2)
    except RuntimeError as error:
        # A link was cut, or a rank has died or stopped.
        if not any(name in str(error) for name in ("gloo", "NCCL", "TCPStore")):
            raise
        complain(program, f"rank {world()[0]} waited for another rank in vain: {error}")
        sys.exit(1)
    finally:
        held_locks.close()
        # Python 3.11 crashes at exit if a thread of gloo is waiting for the interpreter's lock.
        time.sleep(0.1)

def complain(program, error):
    """Print one line; raw control characters in it could take over the terminal."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)

def note_signals():
    """From now on a signal to stop is only noted; `leave_if_asked` acts on it."""
    received_signals.clear()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:       # as nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: received_signals.append(number))

def leave_if_asked(program, message):
    """End all ranks if a signal came to any of them, with the exit code 128 + its number."""
    numbers = gather(received_signals[:1])
    if numbers:
        on_first_rank(complain, program, f"stopped by {signal.Signals(numbers[0]).name}; {message}")
        sys.exit(128 + numbers[0])

def start(timeout_minutes=30):
    """Join torchrun's processes, or be a group of one; returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        require(device.index < torch.cuda.device_count(), "fewer GPUs than --nproc_per_node")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo carries small objects beside NCCL's tensors.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, size = world()
        # A process alone has nobody to meet at torchrun's address.
        store = dist.HashStore() if size == 1 else None
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes),
                                rank=rank, world_size=size, store=store)
    return device

def world():
    """This process's rank and the number of ranks."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def is_first():
    """Whether this is rank 0, which prints and writes for all."""
    return world()[0] == 0

def my_share(items):
    """This rank's part of what all ranks have: a stretch of it, about as long as the others'."""
    rank, size = world()
    return list(items[len(items) * rank // size : len(items) * (rank + 1) // size])

def gather(items):
    """The items of all ranks as one list on every rank: all of rank 0, then all of rank 1, ..."""
    lists = [None] * world()[1]
    # One process exchanges nothing: gloo's thread would slow down OpenMP's threads for good.
    if len(lists) == 1:
        return items
    dist.all_gather_object(lists, items)
    return sum(lists, [])

def on_first_rank(function, *args):
    """Call a function on rank 0 alone; all ranks get its result, or raise its error."""
    outcome = []
    if is_first():
        try:
            outcome = [function(*args)]
        except (OSError, ValueError, SafetensorError) as error:
            outcome = [error]
    [outcome] = gather(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome

if __name__ == "__main__":
    main()
