"""What each rank does in tests of several processes; imported by forked ones, so free of pytest."""

import ctypes
import gc
import os
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil  # noqa: F401 not in each rank
from transformers.modeling_layers import GradientCheckpointingLayer

import data
import eval as evaluation
import memory
import model
import train

SMALL = ["--batch_size", "5", "--num_generations", "3", "--max_completion_length", "32",
         "--temperature", "2.0", "--learning_rate", "2e-4"]


def make_run(*flags, directory=".") -> train.Run:
    """A run at step 0, and nothing on disk."""
    settings = evaluation.parse(train.Settings, [*SMALL, *map(str, flags)], "train.py")
    device = evaluation.start()
    task = data.TASKS[settings.task]
    source = data.fetch(settings.model or task.model)
    processor = data.Processor(source, task)
    samples = data.load_samples(settings.data, task, "train", 40)
    dummy = train.Group(processor.encode(samples[0]), ids=[processor.token_ids("[]")],
                        advantages=torch.zeros(1))
    network, twin = train.load_network(settings, source, device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, fused=True)
    return train.Run(settings, Path(directory), source, processor, samples, dummy, device,
                     network, twin, optimizer)


def whole(run) -> dict:
    """All weights, gathered, as float32 arrays."""
    weights = {}
    for name, parameter in run.network.named_parameters():
        weights[name] = parameter.full_tensor().detach().numpy().copy()
    return weights


def dtypes_of(run) -> set:
    """Of all tensors that a checkpoint keeps to go on with."""
    return {tensor.dtype for tensor in train.tensors(run).values()}


def steps(run, count: int) -> list[tuple]:
    """Metrics and group records of some steps."""
    return [train.train_step(run) for _ in range(count)]


def without_signal(words: str, score):
    """A reward that cannot tell apart the rollouts of questions with these words."""
    def constant(processor, text, example):
        scores = score(processor, text, example)
        return dict.fromkeys(scores, 1.0) if words in example.sample.question else scores

    return constant


def in_two_styles(decode):
    """A decoder that writes about half of all completions spaced, the others compactly."""
    def decode_some(processor, ids, finished):
        text = decode(processor, ids, finished)
        return text.replace(",", ", ").replace(":", ": ") if int(sum(ids)) % 2 else text

    return decode_some


def some_steps(settings: dict) -> dict:
    """For each list of flags by name: metrics and records of two steps, and weights and votes then.

    Some groups have no signal, and rollouts differ in style.
    """
    data.Processor.score = without_signal("the one", data.Processor.score)
    data.Processor.decode = in_two_styles(data.Processor.decode)
    results = {}
    for name, flags in settings.items():
        run = make_run(*flags)
        if run.settings.method == "sft":
            groups, _ = train.encode_share(run, range(32))
            train.sample(run, groups, 1, temperature=0)
            train.vote_for_style(run, groups)
        results[name] = steps(run, 2), whole(run), run.votes
    return results if evaluation.is_first() else {}


# ---- Traffic and numbers -------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts torch.distributed's operations by name, and the bytes of FSDP's gathers and sums."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.bytes = 0
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            name = function.name().split("::")[1]
            self.counts[name] += 1
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                # One side is the whole, the other a rank's part of it.
                self.bytes += max(args[0].nbytes, args[1].nbytes)
                self.dtypes.add((name, str(args[0].dtype)))
        return function(*args, **(kwargs or {}))


def traffic() -> dict:
    """Collectives of the parts of a step, and how many FSDP units and decoded tokens there are."""
    run = make_run("--batch_size", 2)
    groups, _ = train.encode_share(run, range(2))
    with Collectives() as gathering, train.gathered(run) as network:
        with Collectives() as decoding:
            examples = [group.example for group in groups]
            tokens = model.generate(network, examples, 3, 48, seeds=[dist.get_rank()])
    with Collectives() as sampling:
        train.sample(run, groups, 3, 1.0)
    for group in groups:
        group.advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    with Collectives() as updating:
        train.update(run, groups)
    blocks = [m for m in run.network.modules() if isinstance(m, GradientCheckpointingLayer)]
    return {"blocks": len(blocks),
            "units": sum(isinstance(module, FSDPModule) for module in run.network.modules()),
            "gathering": gathering.counts, "decoding": decoding.counts,
            "sampling": sampling.counts, "updating": updating.counts,
            "tokens": [len(completion.ids) for group in tokens for completion in group],
            # Of two ranks, each has one half already.
            "bytes": (sampling.bytes + updating.bytes) / 2,
            "planned": memory.traffic(run.network.config, 2, dtype_bytes=4, pieces=1)}


def in_bfloat16() -> dict:
    """Data types in a run that computes in bfloat16, as on CUDA, and its loss beside float32's."""
    losses, found = {}, {}
    policy = train.fsdp.MixedPrecisionPolicy
    for dtype in ("float32", "bfloat16"):
        train.fsdp.MixedPrecisionPolicy = lambda param_dtype, **more: policy(
            param_dtype=getattr(torch, dtype), **more)
        run = make_run("--method", "sft")
        gradients = []

        def note_dtypes(optimizer, *_):
            for group in optimizer.param_groups:
                gradients.extend(str(parameter.grad.dtype) for parameter in group["params"])

        run.optimizer.register_step_pre_hook(note_dtypes)
        with Collectives() as exchanged:
            losses[dtype] = steps(run, 1)[0][0]["loss"]
        with train.gathered(run) as network:
            found[dtype] = {str(parameter.dtype) for parameter in network.parameters()}
        found[dtype, "exchanged"] = exchanged.dtypes
        found[dtype, "kept"] = set(map(str, dtypes_of(run))) | set(gradients)
    return {"losses": losses} | found


def a_loss_that_is_not_finite() -> tuple:
    """The last rank's loss is NaN in the first of two steps: metrics, weights before and after."""
    run = make_run("--batch_size", 2, "--method", "sft")
    before = whole(run)
    good = train.visurf.sft_loss
    if dist.get_rank() == dist.get_world_size() - 1:
        train.visurf.sft_loss = lambda *args: good(*args) + float("nan")
    [(first, _)] = steps(run, 1)
    after = whole(run)
    train.visurf.sft_loss = good
    [(second, _)] = steps(run, 1)
    return first, second, before, after, whole(run)


# ---- Memory ----------------------------------------------------------------------------------------


def allocated(function) -> tuple[int, int]:
    """Bytes that a call allocates on the CPU: at most at a time, and what is left behind it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak, total


def resident(key: str) -> int:
    """Bytes of this process in the machine's memory: VmRSS now, VmHWM at most since the last reset."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def kept(run) -> int:
    """Bytes of this rank's part of weights and moments."""
    tensors = [*run.network.parameters()]
    for state in run.optimizer.state.values():
        tensors += state.values()
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def a_group(work: memory.Work, seed: int) -> train.Group:
    """A prompt with one image, and completions that are all as long as can be."""
    side = round(work.patches**0.5)
    ids = [192] + [190] * (work.patches // 4) + [193]
    ids += [20] * (work.prompt_tokens - len(ids))
    pixels = torch.zeros(work.patches, 3 * 2 * 4 * 4)
    example = SimpleNamespace(ids=torch.tensor(ids), pixels=pixels, grid_thw=torch.tensor([[1, side, side]]))
    completion = torch.full((work.completion_tokens,), 30)
    members = work.group + 1
    return train.Group(example, seed, [completion] * members, advantages=torch.ones(members, dtype=torch.float64))


def memory_of_parts(path: str, work: tuple, directory: str, *flags) -> dict:
    """Bytes allocated by the parts of a step, without a tokenizer; and what saving adds to the process."""
    work = memory.Work(*work)
    given = ["--model", path, "--checkpoint_activations", "--micro_batch_size", 1, *flags]
    settings = evaluation.parse(train.Settings, list(map(str, given)), "train.py")
    device = evaluation.start()
    parts = []
    _, always = allocated(lambda: parts.extend(train.load_network(settings, path, device)))
    network, sampler = parts
    # About half of all tokens, so that few are decoded: there is room for all of them anyway.
    sampler.stop_tokens = [*range(0, network.config.text_config.vocab_size, 2)]
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, fused=True)
    run = train.Run(settings, Path(directory), {}, None, [], None, device, network, sampler, optimizer)
    groups = [a_group(work, seed) for seed in range(work.prompts)]

    def roll():
        with train.gathered(run) as whole_network:
            model.generate(whole_network, [group.example for group in groups], work.group, work.completion_tokens)

    # The first update makes the moments.
    always += allocated(lambda: train.update(run, groups))[1]
    if dist.get_world_size() > 1:
        # Gloo's threads still hold copies of what they exchanged last, so this is counted by tensor.
        always = kept(run)
    measured = {"always": always, "rollouts": allocated(roll)[0],
                "update": allocated(lambda: train.update(run, groups))[0]}
    # What was freed goes back to the machine: otherwise saving would fill that first.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    writer = train.dcp.HuggingFaceStorageWriter(directory, save_distributed=True)
    train.dcp.save(train.tensors(run), storage_writer=writer, no_dist=dist.get_world_size() == 1)
    return measured | {"saving": resident("VmHWM") - before}


# ---- Whole runs ----------------------------------------------------------------------------------


def main(*flags):
    """train.py as torchrun starts it."""
    train.main([*SMALL, *map(str, flags)])
    assert not dist.is_initialized(), "it leaves without having said so"


def main_with_a_bug(*flags):
    """One rank has a bug that shows in the second step; the other would wait, as GPUs do."""
    inject = train.append_label

    def broken(run, group):
        if run.step == 1:
            if dist.get_rank() == 1:
                raise ZeroDivisionError("a bug of ours")
            time.sleep(1000)
        inject(run, group)

    train.append_label = broken
    main(*flags)


def main_without_a_finite_loss(*flags):
    """The last rank's loss is never finite."""
    good = train.visurf.sft_loss
    if os.environ["RANK"] != "0":
        train.visurf.sft_loss = lambda *args: good(*args) + float("nan")
    main("--method", "sft", *flags)


def main_with_a_full_disk(*flags):
    """The last rank's disk takes no file of more than 1 MB any more after the first checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = train.dcp.save

    def save_and_fill(*args, **kwargs):
        save(*args, **kwargs)
        if dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    train.dcp.save = save_and_fill
    main(*flags)


def main_killed(where: str, nth: int, *flags):
    """The first rank is killed when it comes to its nth call of a function, such as "os.rename"."""
    owner, name = where.split(".")
    owner = getattr(train, owner)
    function, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    if os.environ["RANK"] == "0":
        setattr(owner, name, deadly)
    main(*flags)


def main_asked_to_leave(*flags):
    """A signal comes to the last rank while it samples in the second step."""
    sample, calls = train.sample, []

    def sample_and_note(*args):
        calls.append(args)
        if len(calls) == 2 and os.environ["RANK"] != "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args)

    train.sample = sample_and_note
    main(*flags)


def evaluate(*flags):
    """eval.py as torchrun starts it."""
    evaluation.main([*map(str, flags)])
