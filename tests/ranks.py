"""What each rank does in tests of several processes; imported by forked processes, so free of pytest."""

import ctypes
import gc
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig  # noqa: F401 here, once, not in each forked rank

import data
import train
from support import checkpoints, processes

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2-vl"
SMALL = ["--batch_size", "5", "--num_generations", "3", "--max_completion_length", "48", "--temperature", "2.0",
         "--learning_rate", "2e-4"]


def start(*flags):
    """A run at step 0, its samples and their encoding."""
    config = train.parse_command_line([*SMALL, *map(str, flags)])
    device, task, processor = processes.start(), data.TASKS["digits"], data.Processor.from_pretrained(TINY)
    samples = data.load_samples("builtin", task, limit=40)
    encode = lambda sample: processor.encode(sample, task)
    return train.make_run(config, task, processor, TINY, encode(samples[0]), device), samples, encode


def whole(run) -> dict:
    return {name: p.full_tensor().detach().numpy().copy() for name, p in run.network.named_parameters()}


def steps(run, samples, encode, count: int) -> list[tuple]:
    """Metrics and group records of some steps."""
    results = []
    for _ in range(count):
        metrics, _, records = train.train_step(run, train.next_examples(run, samples, encode))
        results.append((metrics, records))
        run.step, run.prompts_seen = run.step + 1, run.prompts_seen + run.config.batch_size
    return results


def without_signal(word: str, score):
    """A reward that cannot tell apart the rollouts of prompts with this word in their question."""
    def constant(run, text, example):
        scores = score(run, text, example)
        return dict.fromkeys(scores, 1.0) if word in example.sample.question else scores

    return constant


def in_two_styles(decode):
    """A decoder that writes about half of all completions with a space after each comma."""
    return lambda ids: decode(ids).replace(",", ", ") if int(sum(ids)) % 2 else decode(ids)


def three_steps(settings: dict) -> dict:
    """For each list of flags by name: metrics and records of three steps, and the weights then.

    Some groups have no signal, and rollouts differ in style."""
    train.score, results = without_signal("one", train.score), {}
    for name, flags in settings.items():
        run, samples, encode = start(*flags)
        run.processor.decode = in_two_styles(run.processor.decode)
        results[name] = steps(run, samples, encode, 3), whole(run)
    return results if processes.is_first() else {}


class Collectives(TorchDispatchMode):
    """Counts the calls of torch.distributed's operations by name, and the bytes that FSDP's gathers and sums hold."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes, self.dtypes = Counter(), 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            name = function.name().split("::")[1]
            self.counts[name] += 1
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                self.bytes += max(args[0].nbytes, args[1].nbytes)  # one side is the whole, the other a rank's part
                self.dtypes.add((name, str(args[0].dtype)))
        return function(*args, **(kwargs or {}))


def traffic() -> dict:
    """Collectives of the parts of a step, the number of FSDP units, that of the tokens decoded, and bytes received."""
    import memory as planned

    run, samples, encode = start("--batch_size", 2)
    examples = train.next_examples(run, samples, encode)
    with Collectives() as gathering, train.gathered(run.network) as network:
        with Collectives() as decoding:
            tokens = train.model.generate(network, examples, 3, 48, seeds=[dist.get_rank()])
    with Collectives() as sampling:
        train.sample_rollouts(run, examples)
    groups = [train.score_rollouts(run, e, c) for e, c in zip(examples, train.sample_rollouts(run, examples))]
    for group in groups:
        group.advantages = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    with Collectives() as updating:
        train.update(run, groups)
    return {"blocks": len(run.network.visual.blocks) + len(run.network.model.layers),
            "units": sum(isinstance(module, FSDPModule) for module in run.network.modules()),
            "gathering": gathering.counts, "decoding": decoding.counts, "sampling": sampling.counts,
            "updating": updating.counts, "tokens": [len(c.ids) for group in tokens for c in group],
            "bytes": (sampling.bytes + updating.bytes) / 2,  # of two ranks, each has one half already
            "planned bytes": planned.traffic(run.network.config, 2, dtype_bytes=4, pieces=1)}


def a_loss_that_is_not_finite() -> tuple:
    """The second rank's loss is NaN in the first of two steps: what the metrics say, and weights before and after."""
    run, samples, encode = start("--batch_size", 2, "--method", "sft")
    before, good = whole(run), train.visurf.sft_loss
    if dist.get_rank() == 1:
        train.visurf.sft_loss = lambda *args: good(*args) * float("nan")
    [(first, _)], after = steps(run, samples, encode, 1), whole(run)
    train.visurf.sft_loss = good
    [(second, _)] = steps(run, samples, encode, 1)
    return first, second, before, after, whole(run)


def in_bfloat16() -> dict:
    """Data types in a run that computes in bfloat16, and its loss beside that in float32."""
    losses, found = {}, {}
    for dtype in ("float32", "bfloat16"):
        run, samples, encode = start("--method", "sft", "--dtype", dtype)
        gradients = []
        run.optimizer.register_step_pre_hook(lambda optimizer, *_: gradients.extend(
            p.grad.dtype for group in optimizer.param_groups for p in group["params"]))
        with Collectives() as exchanged:
            losses[dtype] = steps(run, samples, encode, 1)[0][0]["loss"]
        with train.gathered(run.network) as network:
            found[dtype] = {str(p.dtype) for p in network.parameters()}
        found[dtype, "exchanged"] = exchanged.dtypes
        found[dtype, "kept"] = {str(t.dtype) for t in checkpoints.tensors(run).values()} | set(map(str, gradients))
    return {"losses": losses} | found


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def main(*flags):
    """train.py as torchrun starts it."""
    train.main([*SMALL, "--eval_samples", "0", "--method", "visurf", *map(str, flags)])
    assert not dist.is_initialized(), "it leaves without having said so"


def main_with_a_bug(*flags):
    """One rank's reward has a bug that shows in the second step; the other would wait for ever, as GPUs do."""
    score = train.score

    def broken(run, text, example):
        if run.step == 1:
            if dist.get_rank() == 1:
                raise ZeroDivisionError("a bug of ours")
            time.sleep(1000)
        return score(run, text, example)

    train.score = broken
    main(*flags)


def first_to_fail() -> bool:
    """Whether this rank is the one to report, when all fail at once and none is ended by another."""
    processes._leave_when_another_fails = lambda: None
    processes.start()
    processes.everyone("is here")
    first = processes._is_first_to_fail(2)
    processes.everyone("knows")
    return first


def main_without_a_finite_loss(*flags):
    """The last rank's loss is never finite."""
    good = train.visurf.sft_loss
    train.visurf.sft_loss = lambda *args: good(*args) * (float("nan") if dist.get_rank() else 1.0)
    main("--method", "sft", *flags)


def main_with_a_full_disk(*flags):
    """The disk of the last rank takes no file of more than 1 MB any more, from the second checkpoint on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = checkpoints.dcp.save

    def save_and_fill(*args, **kwargs):
        save(*args, **kwargs)
        if dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    checkpoints.dcp.save = save_and_fill
    main(*flags)


def main_killed(where: str, nth: int, *flags):
    """All ranks are killed when the first comes to its nth call of a function, such as "os.replace"."""
    owner, name = where.split(".")
    owner = getattr(checkpoints, owner)
    function, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    if os.environ["RANK"] == "0":
        setattr(owner, name, deadly)
    main(*flags)


def evaluate(*flags):
    """eval.py as torchrun starts it."""
    train.evaluate.main([*map(str, flags)])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory() -> tuple[dict, dict]:
    """Bytes as tests/memory.py plans them and as measured, of a network with 58 M parameters in float32."""
    import bench
    import memory as planned

    shape = bench.SIZES["large"]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": shape["mrope_section"], "rope_theta": 1e6}
    network_config = Qwen2VLConfig(text_config={**shape["text"], "vocab_size": 60_000, "rope_parameters": rope},
                                   vision_config=shape["vision"], tie_word_embeddings=True, image_token_id=bench.IMAGE)
    config, device = train.parse_command_line(["--checkpoint_activations"]), processes.start()
    steps(*start("--batch_size", 2), 1)  # loads what PyTorch loads on first use
    before = resident()
    network = train.model.empty_network(network_config)
    train.shard(config, device, network)
    network.to_empty(device=device)
    network.checkpoint_activations = True
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.to_local(), std=0.02)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    prompts, G, T = bench.make_prompts(2, 16), 4, 32
    batch = train.model.PromptBatch.from_prompts(prompts[:1], network_config)
    completions = bench.random_completions(G + 1, T)[None]
    mask = torch.ones_like(completions, dtype=torch.bool)

    def rollouts():
        with train.gathered(network) as whole:
            train.model.generate(whole, prompts, G, T)

    def update():
        network(batch, completions, mask, expected=mask / mask.sum()).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    rollouts()
    found = {"always": resident() - before, "rollouts": peak(rollouts), "update": peak(update)}
    return planned.plan(network_config, dist.get_world_size(), 4, 2, G, len(prompts[0].ids), 64, T), found


def resident() -> float:
    """Bytes of memory that the process holds, once what it has freed is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def peak(function) -> float:
    """Bytes that the process grows at most while a function runs."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    function()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) - before
