"""Start the ranks of a run from tests: forked from one server that has imported torch once, joined over gloo."""

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from conftest import ROOT
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


class Ranks:
    """`world` processes that call module.function(*args) as torchrun's would; what they print goes to files."""

    def __init__(self, world: int, directory: Path, target: str, *args):
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's part
        directory.mkdir(parents=True, exist_ok=True)
        self.outputs = [directory / f"rank{rank}.txt" for rank in range(world)]
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
        self.results = [receive for receive, _ in pipes]
        self.processes = [
            CONTEXT.Process(target=_rank, args=(rank, world, self.store.port, str(output), send, target, args))
            for rank, (output, (_, send)) in enumerate(zip(self.outputs, pipes))]
        for process in self.processes:
            process.start()
        for _, send in pipes:
            send.close()

    def wait(self, seconds: float = 120) -> list:
        """Exit codes once all have ended (-9 for a process that had to be killed after `seconds`)."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {seconds} s: {self.text()}"
        return [process.exitcode for process in self.processes]

    def values(self, seconds: float = 240) -> list:
        """What the function returned on each rank."""
        received = []
        for result in self.results:
            try:
                received.append(result.recv() if result.poll(seconds) else None)
            except EOFError:  # it died; its exit code and what it printed tell why
                received.append(None)
        assert self.wait(30) == [0] * len(self.processes), self.text()
        return received

    def signal(self, number: int, ranks=None):
        """Send a signal to some ranks, or all; those that have ended meanwhile do not mind."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def text(self) -> str:
        return "".join(output.read_text() for output in self.outputs if output.exists())


def _rank(rank, world, port, output, send, target, args):
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(*args)
    send.send(value)
    sys.stdout.flush()
    os._exit(0)  # a regular exit would wait for threads that wait for other ranks
