"""The processes of a run: start them, pass small objects around, and stop together.

One process and many run the same code: without torchrun this makes a group of one. Whatever goes wrong is reported
once, by the first process it happens to, and ends all of them.
"""

import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from support.sources import DataError

# The store's key under which the first process to fail leaves "rank exit_code"; torchrun may start all of them anew.
FAILED = f"visurf/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

class Interrupted(Exception):
    """A signal asked the run to stop, and all processes agreed to; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; --resume continues")
        self.number = number

def start() -> torch.device:
    """Join torchrun's processes, or be a group of one; returns this process's device. DataError without enough GPUs."""
    local_rank, device = int(os.environ.get("LOCAL_RANK", 0)), torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise DataError(f"process {local_rank} of this machine has no GPU of its own: "
                            f"--nproc_per_node {torch.cuda.device_count()} fits")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo also carries the small objects
        if "RANK" in os.environ:  # watched from the start: who joins would wait long for one who has left again
            threading.Thread(target=_leave_when_another_fails, daemon=True).start()
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device

def check_memory(parameters: int, dtype: torch.dtype, device: torch.device, offloaded: bool):
    """DataError if what a run holds, before any activation, does not fit: 16 bytes a parameter split over all processes
    (weights, gradients, moments), and on each the weights that rollouts gather."""
    split, whole = 16 * parameters / dist.get_world_size(), dtype.itemsize * parameters
    if device.type == "cuda":
        needed, have = whole + split * (not offloaded), torch.cuda.get_device_properties(device).total_memory
        remedy = "use more GPUs, --cpu_offload"
    else:
        needed = (whole + split) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        have, remedy = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "use a machine with more"
    if needed > have:
        raise DataError(f"{parameters / 1e9:.1f} billion parameters need {needed / 1e9:.0f} GB before any activation, "
                        f"and there are {have / 1e9:.0f} GB: {remedy}, or a smaller --model")

def is_first() -> bool:
    """Whether this is rank 0, which prints and writes for all."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"

def alone() -> bool:
    """Whether this is the only process. Then gloo is left out: a thread of its own that copies a large object starts
    OpenMP's threads a second time, and from then on every small operation of two threads is twice as slow."""
    return dist.get_world_size() == 1

def everyone(value) -> list:
    """The values of all ranks, on every rank."""
    if alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

def share(items) -> list:
    """This rank's part of what all ranks have: rank r of W takes the places r, r + W, r + 2 W, …"""
    return [items[i] for i in range(dist.get_rank(), len(items), dist.get_world_size())]

def interleaved(items: list) -> list:
    """The shares of all ranks as one list again, on every rank: everybody's first item, everybody's second, …"""
    missing = object()
    rounds = zip_longest(*everyone(items), fillvalue=missing)
    return [item for items in rounds for item in items if item is not missing]

def on_first_rank(function, *args):
    """Call a function on rank 0 alone; all ranks wait and get its result, or raise what a user or a disk did to it."""
    if alone():
        return function(*args)
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except (OSError, ValueError, SafetensorError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]

# ---- Stopping when asked to ------------------------------------------------------------------------------------------

class Interruption:
    """Inside `with`, SIGTERM and Ctrl-C are only noted; `check` raises Interrupted on all ranks if one was."""

    number = 0  # of the signal that came, 0 for none

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.number = number
        if is_first():  # not print: the signal may have come in the middle of one
            os.write(2, b"\nleaving after this step, with a checkpoint\n")

    def check(self):
        number = torch.tensor(self.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise Interrupted(int(number))

# ---- Stopping when something fails -----------------------------------------------------------------------------------

@contextmanager
def one_report(program: str, mistakes: tuple):
    """Ends this process, and thereby all, when the block raises: `mistakes`, the user's, with one line on stderr and
    exit code 2, Interrupted likewise with 128 + signal, and anything else, our own bug, with its traceback and 1."""
    try:
        yield
        if "RANK" in os.environ and dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):  # Ctrl-C at a time when nothing would be lost
            error = Interrupted(signal.SIGINT)
        code = 2 if isinstance(error, mistakes) else 128 + error.number if isinstance(error, Interrupted) else 1
        first = _is_first_to_fail(code)
        if code != 1 and first:
            print(f"{program}: {error}", file=sys.stderr)
        if "RANK" not in os.environ:
            if code == 1:
                raise
            sys.exit(code)
        if code == 1 and first:
            traceback.print_exc()
        _exit(code)

def leave():
    """The end of a program that went well. With torchrun, the thread that waits for failures is in the midst of a call
    that nothing can stop, and Python's own way of ending aborts there now and then, with exit code -6."""
    if "RANK" in os.environ:
        _exit(0)

def _exit(code: int):
    """Leave now: a regular exit would wait for processes that do not answer any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def _is_first_to_fail(code: int) -> bool:
    if not (dist.is_initialized() and "RANK" in os.environ):
        return is_first()
    mine = f"{dist.get_rank()} {code}"
    try:
        return _store(seconds=10).compare_set(FAILED, "", mine).decode() == mine
    except dist.DistError:  # torchrun itself is gone: rather twice than never
        return True

def _store(seconds: float) -> dist.TCPStore:
    """A connection of its own to the processes' common store: the usual one may be busy waiting for a dead process."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))

def _leave_when_another_fails():
    """Wait in a thread until some rank fails, then leave without a word: it has reported, and will not answer again."""
    try:
        store = _store(seconds=300)
        store.wait([FAILED], timedelta(days=365))
        rank, code = map(int, store.get(FAILED).decode().split())
    except dist.DistError:
        return  # the store is gone, and with it the rank that had it: the next exchange with that rank will fail
    if rank != int(os.environ["RANK"]):
        _exit(code)
