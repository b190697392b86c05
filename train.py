"""Post-train a Qwen2-VL or Qwen2.5-VL checkpoint with ViSurf, with reinforcement alone, or with supervision alone.

    python train.py                                                     # built-in task, bundled checkpoint, minutes
    python train.py --task grounding --data my.jsonl --model path/to/checkpoint
    torchrun --nproc_per_node 8 train.py --task grounding               # FSDP2 on eight GPUs, the paper's recipe
    python train.py --method rlvr                                       # no label in the group: GRPO
    python train.py --method sft                                        # no rollouts: cross-entropy on the label

One step, for a batch of prompts:   sample -> score -> inject the label -> advantages -> loss -> optimizer step
`train_step` is that line, in that order. The algorithm is in visurf.py, the network and the sampler in model.py.
"""

import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from tqdm import tqdm

import data
import eval as evaluate  # the module's name hides Python's eval, which nothing here calls
import model
import rewards
import visurf
from support import checkpoints, flags, processes, report
from support.flags import option

@dataclass
class Config:
    """All settings of a run; every field is a flag. A task's record may change a default (data.TASKS, `recipe`)."""

    task: str = option("digits", "what to learn", tuple(data.TASKS))
    method: str = option("visurf", "visurf, rlvr (no label injected) or sft (label only)", ("visurf", "rlvr", "sft"))
    model: str = option("", "checkpoint directory or hub id (default: the task's)")
    data: str = option("", "training data: file, folder or hub id (default: the task's)")
    eval_data: str = option("", "held-out data, evaluated before and after (default: the task's, if it is built in)")
    eval_steps: int = option(0, "evaluate every so many steps too, 0 for only before and after")
    eval_samples: int = option(200, "how many held-out samples to evaluate, 0 for none", zero=True)
    output_dir: str = option("", "where checkpoints and logs go (default: runs/TASK-METHOD)")
    resume: bool = option(False, "continue the run in output_dir from its last checkpoint")
    overwrite: bool = option(False, "delete the run in output_dir and start anew")
    seed: int = option(0, "decides data order and every sampled token")
    max_steps: int = option(500, "optimizer steps, or batches of prompts with --num_iterations")
    batch_size: int = option(16, "prompts a step")
    micro_batch_size: int = option(1, "prompts, with all their group members, in one forward and backward pass")
    num_generations: int = option(8, "rollouts of each prompt (G)")
    num_iterations: int = option(1, "optimizer steps on each batch of rollouts")
    max_prompt_length: int = option(4096, "longest prompt in tokens; a longer one is an error, never cut")
    max_completion_length: int = option(512, "longest rollout in tokens")
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained")
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability")
    top_k: int = option(0, "sample from this many likeliest tokens, 0 for all")
    learning_rate: float = option(1e-6, "of AdamW, constant")
    weight_decay: float = option(0.01, "of AdamW", zero=True)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    beta: float = option(0.0, "weight of the KL to the starting checkpoint; the paper has none")
    epsilon: float = option(0.2, "importance ratios are clipped below 1 - epsilon")
    epsilon_high: float = option(0.0, "and above 1 + epsilon_high (0: epsilon)")
    ratio: str = option("token", "importance ratio per token (GRPO) or per sequence (GSPO)", ("token", "sequence"))
    average: str = option("token", "the loss is averaged over tokens, or per sequence first", ("token", "sequence"))
    align_label: bool = option(True, "control 1: write the label in the rollouts' style")
    drop_thinking_reward: bool = option(True, "control 2: no reward for thinking to the label")
    smooth_label_reward: bool = option(True, "control 3: the label earns the rollouts' mean once one is as good")
    think: bool = option(True, "ask for reasoning before the answer")
    image_size: list = option((), "side, or width and height, to which images are squashed, in pixels", several=int)
    min_pixels: int = option(0, "keep aspect ratios instead, with at least this many pixels")
    max_pixels: int = option(0, "keep aspect ratios instead, with at most this many pixels")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and count them")
    checkpoint_activations: bool = option(True, "recompute activations in the backward pass: less memory, slower")
    dtype: str = option("", "of the computation; weights and optimizer are float32 (default: bfloat16 on GPUs)",
                        ("float32", "bfloat16"))
    cpu_offload: bool = option(False, "keep weights and optimizer in the machine's memory, not the GPU's: much slower")
    save_steps: int = option(100, "steps between checkpoints")
    keep: int = option(1, "checkpoints to keep")
    log_rollouts: int = option(10, "steps between rollouts shown in full")

# ---- The step --------------------------------------------------------------------------------------------------------

GIVE_UP_AFTER = 10  # updates in a row that are not finite

@dataclass
class Run:
    """What a run carries from step to step."""

    config: Config
    task: data.Task
    processor: data.Processor
    network: model.QwenVL  # sharded
    reference: model.QwenVL | None  # what it was at the start, for beta > 0
    optimizer: torch.optim.Optimizer
    device: torch.device
    style: data.LabelStyle  # how the rollouts so far wrote their answers
    spare: data.Example  # what a rank without work computes, for nothing
    stop: processes.Interruption = field(default_factory=processes.Interruption)
    step: int = 0  # steps done
    prompts_seen: int = 0  # the place in the stream of prompts
    not_finite: int = 0  # updates given up because loss or gradient was not finite
    not_finite_in_a_row: int = 0

@dataclass
class Group:
    """A prompt and its group of N: G rollouts (none in SFT), then the label (not in RLVR)."""

    example: data.Example
    ids: list[torch.Tensor]  # tokens of each member, (T,)
    texts: list[str]
    components: list[dict]  # reward of each member by component
    truncated: int  # rollouts cut off at the length limit
    advantages: torch.Tensor | None = None  # (N,) float64

    def record(self) -> dict:
        """What the logs keep of it, and all ranks are told."""
        return {"question": self.example.sample.question, "texts": self.texts, "rewards": self.components,
                "lengths": [len(ids) for ids in self.ids], "truncated": self.truncated,
                "advantages": self.advantages.tolist()}

def train_step(run: Run, examples: list[data.Example]) -> tuple[dict, dict, list[dict]]:
    """One batch of prompts through the whole method, this rank's share of it being `examples`: every W-th prompt.

    Returns what is logged of the whole batch: metrics, timing, and a record of each group.
    """
    start, cpu = time.perf_counter(), time.process_time()
    rollouts = sample_rollouts(run, examples)
    run.stop.check()  # asked to leave: this step has changed nothing yet
    groups = [score_rollouts(run, example, completions) for example, completions in zip(examples, rollouts)]
    for texts in processes.interleaved([group.texts for group in groups]):
        for text in texts:  # the label's style learns from the rollouts of all ranks
            run.style.observe(text)
    if run.config.method != "rlvr":
        inject_labels(run, groups)
    for group in groups:
        group.advantages = compute_advantages(run.config, group)
    sampled = time.perf_counter()
    updated = update(run, groups)
    records = processes.interleaved([group.record() for group in groups])
    timing = {"rollout_seconds": sampled - start, "update_seconds": time.perf_counter() - sampled,
              "cpu_seconds": time.process_time() - cpu}
    return report.describe(run.config, records, run.style) | updated, timing, records

def sample_rollouts(run: Run, examples) -> list[list[model.Completion]]:
    """G completions of each prompt; their seed is the prompt's place in the run, whatever rank draws them."""
    config = run.config
    if config.method == "sft":
        return [[] for _ in examples]
    places = processes.share(range(run.prompts_seen, run.prompts_seen + config.batch_size))
    seeds = [mix_seeds(config.seed, place) for place in places]
    with gathered(run.network) as network:
        return model.generate(network, examples, config.num_generations, config.max_completion_length,
                              config.temperature, config.top_p, config.top_k, seeds)

def score_rollouts(run: Run, example, completions) -> Group:
    """The group of one prompt without its label."""
    texts = [run.processor.decode(completion.ids) for completion in completions]
    truncated = sum(not completion.finished for completion in completions)
    return Group(example, [c.ids for c in completions], texts, [score(run, t, example) for t in texts], truncated)

def score(run: Run, text: str, example) -> dict:
    """Reward components of a completion, in the frame that the model speaks."""
    thresholds = rewards.Thresholds(**(run.task.thresholds or {}))
    scores = rewards.score(text, example.objects, run.task.name, example.frame, thresholds, run.config.think)
    del scores["total"]
    return scores

def inject_labels(run: Run, groups: list[Group]):
    """Append each group's label: its text in the rollouts' style (control 1), its tokens, its reward components."""
    for group in groups:
        example = group.example
        text = run.style.render(example.objects) if run.config.align_label else example.written_label()
        components = score(run, text, example)
        if not run.config.drop_thinking_reward:  # control 2 off: right by definition, the label earns all there is
            components |= {name: rewards.RANGES[name][1] for name in rewards.THINKING if name in components}
        group.texts.append(text)
        group.ids.append(run.processor.label_ids(text))
        group.components.append(components)

def compute_advantages(config: Config, group: Group) -> torch.Tensor:
    """Advantages (N,) of one group, float64; in SFT the label weighs 1."""
    if config.method == "sft":
        return torch.ones(1, dtype=torch.float64)
    totals = [sum(components.values()) for components in group.components[: config.num_generations]]
    totals = torch.tensor(totals, dtype=torch.float64)  # (G,)
    if config.method == "rlvr":
        return visurf.group_advantages(totals)
    return visurf.visurf_advantages(totals, group.components[-1], rewards.THINKING, config.drop_thinking_reward,
                                    config.smooth_label_reward)

def update(run: Run, groups: list[Group]) -> dict:
    """One or more optimizer steps on the groups of all ranks; groups without any advantage are left out, they have no
    gradient. All ranks compute equally many pieces, some perhaps of nothing: every rank takes part in every gather."""
    config, world = run.config, dist.get_world_size()
    useful = [group for group in groups if group.advantages.any() or config.beta]
    useful.sort(key=lambda group: max(map(len, group.ids)))  # groups of similar length share a piece: little padding
    pieces = [useful[i : i + config.micro_batch_size] for i in range(0, len(useful), config.micro_batch_size)]
    lengths = [len(ids) for group in groups for ids in group.ids]
    sizes = processes.everyone((sum(lengths), len(lengths), len(pieces)))
    tokens, members = (sum(size[i] for size in sizes) for i in (0, 1))  # of the whole batch, however it is cut
    pieces += [[]] * (max(size[2] for size in sizes) - len(pieces))
    pieces = [make_piece(run, piece) for piece in pieces]
    # FSDP averages gradients over ranks: divided by its fair share, a rank's sum becomes a part of the batch's mean
    total = (tokens if config.average == "token" else members) / world
    old, reference = log_probs_before(run, pieces)

    metrics = dict.fromkeys(("loss", "grad_norm", "clipped", "kl"), 0.0)
    for iteration in range(config.num_iterations if pieces else 0):
        run.optimizer.zero_grad(set_to_none=True)
        known = iteration == 0 and run.reference is None
        stats = [backward(run, *inputs, total, known) for inputs in zip(pieces, old, reference)]
        stats = {name: sum(piece[name] for piece in stats) for name in stats[0]}  # scalars, on the device
        sums = torch.stack([*stats.values()]).double().cpu()
        dist.all_reduce(sums)
        parts = dict(zip(stats, sums.tolist()))
        parts = {name: value / (world if name == "loss" else tokens) for name, value in parts.items()}
        norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), config.max_grad_norm).full_tensor().item()
        if math.isfinite(norm) and math.isfinite(parts["loss"]):
            run.optimizer.step()
            run.not_finite_in_a_row = 0
        else:  # on all ranks alike: this update is dropped and counted, and the run goes on
            run.not_finite, run.not_finite_in_a_row = run.not_finite + 1, run.not_finite_in_a_row + 1
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value / config.num_iterations
        metrics["grad_norm"] = norm
    run.optimizer.zero_grad(set_to_none=True)
    return metrics | {"not_finite": run.not_finite}

def make_piece(run: Run, groups: list[Group]):
    """The tensors of a few groups: prompts, completions (b, N, T), mask (b, N, T), advantages (b, N). Of none, those of
    a prompt whose completion is masked out: it costs a pass and changes nothing."""
    ids, mask = model.pad_completions([group.ids for group in groups] or [[torch.zeros(1, dtype=torch.long)]])
    mask &= bool(groups)
    advantages = torch.stack([group.advantages for group in groups] or [torch.zeros(1)])
    examples = [group.example for group in groups] or [run.spare]
    batch = model.PromptBatch.from_prompts(examples, run.network.config, run.device)
    return batch, ids.to(run.device), mask.to(run.device), advantages.to(run.device)

def log_probs_before(run: Run, pieces) -> tuple[list, list]:
    """Log-probs (b, N, T) of every piece under the policy that sampled and under the reference; None if not needed.

    With a single iteration, the policy that is updated is the one that sampled: its own log-probs, detached, will do.
    """
    log_probs = lambda network: [network(*piece[:3], run.config.temperature) for piece in pieces]
    nothing = [None] * len(pieces)
    with torch.no_grad():
        old = log_probs(run.network) if run.config.num_iterations > 1 else nothing
        if run.reference is None:
            return old, nothing
        reference = log_probs(run.reference)
        run.reference.reshard()  # FSDP keeps the root's weights gathered after a pass that has no backward
    return old, reference

def backward(run: Run, piece, old, reference, total, known: bool) -> dict:
    """Add a piece's gradient; returns its loss, and sums over its tokens of what loss_of tells.

    `known`: while the ratio is 1, the gradient by each log-prob does not depend on their values, and the output head
    needs one pass instead of two (model.TokenLogProbs).
    """
    config, (batch, ids, mask, A) = run.config, piece
    expected = None
    if known:
        guess = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        loss_of(config, guess, guess.detach(), None, A, mask, total)[0].backward()
        expected = guess.grad
    logprobs = run.network(batch, ids, mask, config.temperature, expected)  # (b, N, T)
    old = logprobs.detach() if old is None else old
    loss, stats = loss_of(config, logprobs, old, reference, A, mask, total)
    loss.backward()
    return {"loss": loss.detach(), **{name: value * mask.sum() for name, value in stats.items()}}

def loss_of(config: Config, logprobs, old, reference, A, mask, total) -> tuple[torch.Tensor, dict]:
    """The method's loss on some groups, divided by `total`, and means over their tokens of what is worth knowing."""
    if config.method == "sft":
        return visurf.sft_loss(logprobs, mask, config.average, total), {}
    clip = config.epsilon, config.epsilon_high or config.epsilon
    loss, stats = visurf.policy_loss(logprobs, old, A, mask, *clip, config.ratio, config.average, total)
    if reference is not None:
        kl, sampled = visurf.kl_estimate(reference - logprobs), mask.clone()
        if config.method == "visurf":
            sampled[:, -1] = False  # the estimate holds for draws from the policy, and the label is none
        loss = loss + config.beta * visurf.masked_mean(kl, sampled, config.average, total)
        stats["reference_kl"] = visurf.masked_mean(kl.detach(), sampled, total=mask.sum().clamp(min=1))
    return loss, stats

# ---- Many processes --------------------------------------------------------------------------------------------------

def shard(config: Config, device: torch.device, network: model.QwenVL):
    """Let each of W ranks hold 1/W of the rows of every weight (FSDP2), in float32. A block's weights are gathered for
    its turn, in the computation's dtype; its gradients are summed up in float32. What is left, tied or untied head and
    embedding among it, is the root's."""
    policy = MixedPrecisionPolicy(compute_dtype(config, device), torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*network.visual.blocks, *network.model.layers, network]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)

@contextmanager
def gathered(network: model.QwenVL):
    """The whole network on every rank, a plain one, without hooks: one all-gather per unit here, and none while it
    decodes, so ranks need not keep step. Its weights are gone after the `with` block."""
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:  # one by one: each needs its weights twice for a moment
        unit.unshard()
    whole = model.empty_network(network.config)
    whole.load_state_dict(dict(network.named_parameters()), assign=True)
    whole.stop_tokens, whole.forbidden_tokens = network.stop_tokens, network.forbidden_tokens
    try:
        yield whole
    finally:
        for unit in units:
            unit.reshard()

def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """--dtype, or what suits the device."""
    return getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))

# ---- The loop --------------------------------------------------------------------------------------------------------

def train(config: Config):
    """A whole run: check what the user gave, load, evaluate, train, save, evaluate again."""
    device, task = processes.start(), data.TASKS[config.task]
    samples = data.load_samples(config.data, task, "train", skip_bad_rows=config.skip_bad_rows)
    held_out = []
    if config.eval_samples and (config.eval_data or task.eval_data == "builtin"):
        held_out = data.load_samples(config.eval_data, task, "test", config.eval_samples, config.skip_bad_rows)
    checkpoint = data.fetch(config.model or task.model, "model")
    empty = model.empty_network(model.read_config(checkpoint))
    processor = data.Processor.from_pretrained(checkpoint)
    encode = partial(processor.encode, task=task, max_prompt_length=config.max_prompt_length, **flags.encoding(config))
    spare = encode(samples[0])  # image settings or a prompt that cannot work: before the weights are read
    size = sum(parameter.numel() for parameter in empty.parameters())
    processes.check_memory(size, compute_dtype(config, device), device, config.cpu_offload)
    directory = processes.on_first_rank(checkpoints.check_output, config, size)

    run = make_run(config, task, processor, checkpoint, spare, device)
    processes.on_first_rank(checkpoints.claim_output, config, directory)
    if config.resume and (last := processes.on_first_rank(checkpoints.last_checkpoint, directory)):
        checkpoints.load(run, last)
    if processes.is_first():
        print(f"{config.method} on {config.task}: {len(samples)} samples ({samples.skipped} bad rows skipped, "
              f"{samples.clipped} boxes clipped), {size / 1e6:.1f} M parameters, "
              f"{dist.get_world_size()} x {device.type}")
        print("The policy loss stays near 0, which is normal: advantages have mean 0. Watch the rewards.")
    if run.step == 0 or not processes.on_first_rank((directory / "before.json").exists):  # else it is known
        run_evaluation(run, held_out, directory / "before.json")
    with run.stop:
        loop(run, samples, held_out, encode, directory, checkpoint)
        final = checkpoints.save(run, gathered(run.network), directory, checkpoint)
    run_evaluation(run, held_out, directory / "after.json", directory / "gallery.png")
    if processes.is_first():
        report.end_of_run(directory, final)

def make_run(config: Config, task, processor, checkpoint, spare, device) -> Run:
    """A run at step 0: sharded networks, AdamW on float32 weights, no style seen yet."""
    where = "cpu" if config.cpu_offload else device
    load = partial(model.load_pretrained, checkpoint, device=where, shard=partial(shard, config, device))
    network, reference = load(), None
    network.checkpoint_activations = config.checkpoint_activations
    if config.beta:
        reference = load(dtype=compute_dtype(config, device)).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay,
                                  fused=True)
    return Run(config, task, processor, network, reference, optimizer, device, data.LabelStyle(task), spare)

def loop(run: Run, samples, held_out, encode, directory: Path, source):
    """Steps until max_steps, with a line, records and now and then a checkpoint for each."""
    config, first = run.config, processes.is_first()
    logs = {name: checkpoints.open_log(directory / f"{name}.jsonl", run.step) for name in checkpoints.LOGS if first}
    log = lambda name, record: checkpoints.append(logs[name], {"step": run.step, **record})
    steps = range(run.step, config.max_steps)
    for _ in tqdm(steps, "training", config.max_steps, initial=run.step, leave=False, disable=not first):
        try:
            metrics, timing, records = train_step(run, next_examples(run, samples, encode))
        except (processes.Interrupted, data.DataError):  # on all ranks alike; what was learnt so far is kept
            checkpoints.save(run, gathered(run.network), directory, source)
            raise
        run.step, run.prompts_seen = run.step + 1, run.prompts_seen + config.batch_size
        if first:
            tqdm.write(report.step_line(metrics | timing, run.step, config.max_steps))
            log("metrics", metrics)
            log("timing", timing)
            if (run.step - 1) % config.log_rollouts == 0:
                tqdm.write(report.show_group(records[0], config.method))
                for record in records:
                    log("completions", record)
        if config.eval_steps and run.step % config.eval_steps == 0:
            run_evaluation(run, held_out, directory / f"eval-{run.step}.json")
        if run.step % config.save_steps == 0:
            checkpoints.save(run, gathered(run.network), directory, source)

def next_examples(run: Run, samples, encode) -> list[data.Example]:
    """This rank's share of the next batch: its places rank, rank + W, … Raises on all ranks what happened on any."""
    config, error, examples = run.config, None, []
    run.stop.check()
    if run.not_finite_in_a_row >= GIVE_UP_AFTER:
        raise data.DataError(f"{GIVE_UP_AFTER} updates in a row had a loss or gradient that is not finite, the last at "
                             f"step {run.step}: lower --learning_rate, or compute in --dtype float32")
    order = data_order(len(samples), run.prompts_seen, config.batch_size, config.seed)
    try:
        examples = [encode(samples[i]) for i in processes.share(order)]
    except data.DataError as problem:  # an image that cannot be decoded
        error = problem
    for problem in processes.everyone(error):
        if problem is not None:
            raise problem
    return examples

def data_order(size: int, first: int, count: int, seed: int) -> list[int]:
    """Which samples are number first .. first + count - 1 of an endless stream that shuffles the data each epoch."""
    places = range(first, first + count)
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch in {k // size for k in places}}
    return [int(shuffled[k // size][k % size]) for k in places]

def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers. Shifted together they would not do: torch's CPU generator keeps 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

# ---- What is shown ---------------------------------------------------------------------------------------------------

def run_evaluation(run: Run, samples, answers: Path, gallery: Path | None = None):
    """Held-out metrics and every answer go to a file, and some answers into a picture; nothing without samples."""
    if not samples:
        return
    with gathered(run.network) as network:
        results = evaluate.evaluate(network, run.processor, run.task, processes.share(samples),
                                    max_new_tokens=run.config.max_completion_length, progress=processes.is_first(),
                                    **flags.encoding(run.config))
    results = processes.interleaved(results)  # in the order of the samples
    if processes.is_first():
        content = {"metrics": evaluate.metrics(results, run.task), "answers": results}
        checkpoints.write_text(answers, json.dumps(content, indent=1))
        if gallery:
            report.gallery(results, samples, gallery)

# ---- The command line ------------------------------------------------------------------------------------------------

def parse_command_line(argv=None) -> Config:
    """Flags from Config's fields; a flag that was not given takes the task's default, then Config's."""
    recipe = lambda given: data.TASKS[given.get("task", Config.task)].recipe
    config, error = flags.parse(Config, "train.py", __doc__.split("\n")[0], recipe, argv)
    if config.method == "rlvr" and config.num_generations < 2:
        error("--num_generations 1 leaves rlvr nothing to compare in a group: use 2 or more, or --method visurf")
    if config.beta and config.method == "sft":
        error("--beta weighs a KL over rollouts, and --method sft has none: leave it out")
    if config.resume and config.overwrite:
        error("--resume continues the run in --output_dir and --overwrite deletes it: give one of them")
    return config

def main(argv=None):
    config = parse_command_line(argv)
    with processes.one_report("train.py", (data.DataError, model.CheckpointError, OSError)):
        train(config)

if __name__ == "__main__":
    main()
    processes.leave()
