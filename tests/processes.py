"""Start the ranks of a run from tests, and end them as torchrun would.

They are forked from one server that has imported torch once, and are joined over gloo. The parent
plays torchrun's agent: where one rank fails, the others get SIGTERM, and after a while SIGKILL.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import ROOT, hear_signals
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks"])
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "extras"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
NOTICE = 1.0  # seconds between a rank's failure and SIGTERM for the others
GRACE = 3.0  # seconds between that and SIGKILL; torchrun's agent gives 30


class Ranks:
    """`world` processes that call module.function(*args); what they print goes to files."""

    def __init__(self, world: int, directory: Path, target: str, *args):
        # The store that torchrun's agent offers to its workers.
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        directory.mkdir(parents=True, exist_ok=True)
        self.outputs = [directory / f"rank{rank}.txt" for rank in range(world)]
        self.results = []
        self.processes = []
        for rank in range(world):
            receive, send = CONTEXT.Pipe(duplex=False)
            arguments = (rank, world, self.store.port, str(self.outputs[rank]), send, target, args)
            process = CONTEXT.Process(target=run_rank, args=arguments)
            process.start()
            send.close()
            self.results.append(receive)
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list:
        """Exit codes once all ranks have ended; -9 for one that had to be killed."""
        end = time.monotonic() + seconds
        failed_at = None
        steps = [(NOTICE, signal.SIGTERM), (NOTICE + GRACE, signal.SIGKILL)]
        while any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, f"still running after {seconds} s: {self.stop()}"
            if any(process.exitcode not in (0, None) for process in self.processes):
                failed_at = failed_at or time.monotonic()
            if steps and failed_at and time.monotonic() > failed_at + steps[0][0]:
                self.signal(steps.pop(0)[1])
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def values(self, seconds: float = 240) -> list:
        """What the function returned on each rank."""
        received = []
        for result in self.results:
            try:
                received.append(result.recv() if result.poll(seconds) else None)
            except EOFError:
                # It died; its exit code and what it printed tell why.
                received.append(None)
        assert self.wait(30) == [0] * len(self.processes), self.text()
        return received

    def signal(self, number: int, ranks=None):
        """Send a signal to some ranks, or to all; those that have ended do not mind."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid, number)

    def stop(self) -> str:
        self.signal(signal.SIGKILL)
        return self.text()

    def text(self) -> str:
        return "".join(output.read_text() for output in self.outputs if output.exists())


def run_rank(rank, world, port, output, send, target, args):
    hear_signals()
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", 1)
    sys.stderr = os.fdopen(2, "w", 1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    module, function = target.split(":")
    send.send(getattr(importlib.import_module(module), function)(*args))
    sys.stdout.flush()
    # A regular exit would wait for threads that wait for other ranks.
    os._exit(0)
