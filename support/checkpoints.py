"""What a run keeps on disk: its directory, its logs, and checkpoints from which it goes on as if never interrupted.

    runs/TASK-METHOD/config.json
                     metrics.jsonl, timing.jsonl, completions.jsonl     a record a step
                     before.json, after.json, gallery.png               held-out answers
                     checkpoint-STEP/                                   a Hugging Face checkpoint in bfloat16, and
                         training_state/*.safetensors                   float32 weights, AdamW's moments, a shard a rank
                         training_state.json                            step, data position, label style

`save` and `load` are called on all ranks, the rest on the first. Nobody ever finds half of anything: it is written
under another name and renamed when complete.
"""

import json
import math
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

import data
import model
from support.processes import alone, everyone, on_first_rank

LOGS = ("metrics", "timing", "completions")
RUN_FILES = ("config.json", *(f"{name}.jsonl" for name in LOGS), "before.json", "after.json", "gallery.png",
             "report.html", "eval-[0-9]*.json", "checkpoint-[0-9]*", "unfinished")
BYTES_PER_PARAMETER = 2 + 4 + 8  # bfloat16 weight, float32 weight, AdamW's two moments
STATE = "training_state"

# ---- The run's directory ---------------------------------------------------------------------------------------------

def check_output(config, parameters: int) -> Path:
    """The output directory, made if absent; DataError if it holds another run, cannot be written, or is too full for a
    checkpoint of so many parameters."""
    directory = Path(config.output_dir or f"runs/{config.task}-{config.method}")
    old = directory / "config.json"
    if old.exists() and not (config.resume or config.overwrite):
        raise data.DataError(f"{directory} holds another run: --resume continues it, --overwrite replaces it, another "
                             "--output_dir leaves it alone")
    if old.exists() and config.resume:
        before = json.loads(old.read_text())
        for name in ("task", "method", "model", "data", "seed"):
            if before[name] != getattr(config, name):
                raise data.DataError(f"{directory} holds a run with --{name} {before[name]!r}: --resume continues it "
                                     "with the same, another --output_dir starts a new one")
    whole_path = directory.absolute()
    check_space(next(path for path in (whole_path, *whole_path.parents) if path.exists()), parameters)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()
    except OSError as error:
        raise data.DataError(f"{directory}: not writable ({error.strerror}); choose another --output_dir") from None
    return directory

def check_space(directory: Path, parameters: int):
    """DataError unless the disk has room for a checkpoint of a network with so many parameters."""
    needed, free = int(parameters * BYTES_PER_PARAMETER * 1.02) + 2**24, shutil.disk_usage(directory).free
    if free < needed:
        raise data.DataError(f"{directory}: a checkpoint takes {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} "
                             "GB left: free some space, or choose another --output_dir")

def claim_output(config, directory: Path):
    """Make the directory this run's. Not before the weights are loaded: a run that cannot start deletes nothing.

    --overwrite removes what a run writes and nothing else: the directory may be somebody's home.
    """
    for path in [path for name in RUN_FILES for path in directory.glob(name) if config.overwrite]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(directory / "config.json", json.dumps(asdict(config), indent=2))

def write_text(path: Path, text: str):
    """Write a file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)

def open_log(path: Path, steps_done: int):
    """A log to append to, without a line that was cut off and the records of steps that a resumed run will do again."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last line break is cut off
    kept = [line for line in lines if json.loads(line)["step"] <= steps_done]
    write_text(path, "".join(f"{line}\n" for line in kept))
    return path.open("a")

def append(log, record: dict):
    """Write a record to a log; null is what is not finite, for JSON knows no NaN. DataError if the disk is full."""
    finite = lambda value: not isinstance(value, float) or math.isfinite(value)
    record = {name: value if finite(value) else None for name, value in record.items()}
    try:
        print(json.dumps(record), file=log, flush=True)
    except OSError as error:
        raise data.DataError(f"{log.name}: not written ({error.strerror}); make room, and --resume continues from the "
                             "last checkpoint") from None

# ---- Checkpoints -----------------------------------------------------------------------------------------------------

def complete(directory: Path) -> list[Path]:
    """A run's complete checkpoints, from the oldest to the newest."""
    return sorted(directory.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))

def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(complete(directory)), None)

def save(run, whole, directory: Path, source) -> Path:
    """Write checkpoint-STEP unless it is there, then drop the oldest beyond --keep. `with whole as network` gathers the
    run's weights.

    DataError if it cannot be written; the checkpoints before it are still there then.
    """
    final, unfinished = directory / f"checkpoint-{run.step}", directory / "unfinished"
    if on_first_rank(final.exists):
        return final
    try:
        with whole as network:
            on_first_rank(_save_network, run, network, unfinished, source)
        writer = dcp.HuggingFaceStorageWriter(str(unfinished / STATE), save_distributed=True)  # safetensors, no pickle
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "assuming a single process": yes
            dcp.save(tensors(run), storage_writer=writer, no_dist=alone())
        os.sync()  # the name must not reach the disk before the contents
        everyone(None)  # wait for all
        on_first_rank(_finish, run, unfinished, final)
    except TROUBLE as error:
        raise data.DataError(f"{final}: not written ({cause(error)}); --resume continues from "
                             f"{last_checkpoint(directory) or 'the start'}") from None
    return final

def _save_network(run, network: model.QwenVL, unfinished: Path, source):
    shutil.rmtree(unfinished, ignore_errors=True)
    check_space(unfinished.parent, sum(parameter.numel() for parameter in network.parameters()))
    (unfinished / STATE).mkdir(parents=True)
    model.save_pretrained(network, unfinished, source)
    state = {name: getattr(run, name) for name in COUNTERS} | {"style": run.style.state_dict()}
    (unfinished / f"{STATE}.json").write_text(json.dumps(state))

def _finish(run, unfinished: Path, final: Path):
    os.replace(unfinished, final)
    for old in complete(final.parent)[: -run.config.keep]:
        os.replace(old, unfinished)  # a half-deleted one must not look complete
        shutil.rmtree(unfinished)

COUNTERS = ("step", "prompts_seen", "not_finite", "not_finite_in_a_row")

def tensors(run) -> dict[str, torch.Tensor]:
    """All tensors of the training state by name: weights, and AdamW's moments and step counts."""
    found = {}
    for name, parameter in run.network.named_parameters():
        found[f"weight/{name}"] = parameter.detach()
        found |= {f"{key}/{name}": value for key, value in run.optimizer.state[parameter].items()}
    return found

def load(run, checkpoint: Path):
    """Continue where `save` left off, on as many processes as there are now. DataError if the state is damaged, or of
    another network."""
    try:
        state = json.loads((checkpoint / f"{STATE}.json").read_text())
        for name in COUNTERS:
            setattr(run, name, state[name])
        run.style.load_state_dict(state["style"])
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / STATE))
        saved = reader.read_metadata().state_dict_metadata
        for name, parameter in run.network.named_parameters():
            if saved[f"weight/{name}"].size != parameter.shape:
                raise ValueError(f"{name} has another shape there")
            if f"exp_avg/{name}" in saved:  # AdamW has none for what never had a gradient
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                run.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "assuming a single process": yes
            dcp.load(tensors(run), storage_reader=reader, no_dist=alone())
    except (*TROUBLE, KeyError, ValueError) as error:
        raise data.DataError(f"{checkpoint}: cannot be continued from ({cause(error)}); delete it to go on from the "
                             "one before, or begin again with --overwrite") from None

# What goes wrong between a run and a disk. One rank's trouble reaches the others inside a CheckpointException.
TROUBLE = (OSError, SafetensorError, dcp.CheckpointException)

def cause(error) -> str:
    """What happened, in words, on whatever rank it happened."""
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error,)]
    return "; ".join(sorted({f"{type(failure[0]).__name__}: {failure[0]}" for failure in failures}))
