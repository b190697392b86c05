"""Post-train a Qwen-VL checkpoint with ViSurf; --method rlvr: GRPO alone, sft: labels alone.

    python train.py                                         # built-in task, bundled checkpoint
    python train.py --task grounding --data my.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct
    torchrun --nproc_per_node 8 train.py --task grounding   # FSDP2 on eight GPUs
    python train.py --resume                                # with the same flags: go on

`train_step`: sample -> align and inject the label -> score -> advantages -> update.
runs/TASK-METHOD gets config.json, logs (*.jsonl) and checkpoint-STEP/, for eval.py and --resume."""

import copy
import json
import os
import shutil
import time
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers.modeling_layers import GradientCheckpointingLayer

import data
import model
import rewards
import visurf
from data import UserError, require
from eval import (Common, claim, evaluate, flag, gather, is_first, leave_if_asked, metrics,
                  my_share, note_signals, on_first_rank, parse, run_program, start,
                  world, write_text)      # on_first_rank: all ranks get its result

@dataclass
class Settings(Common):
    """Post-train a Qwen-VL checkpoint. The task decides some defaults."""
    method: str = flag("visurf", "rlvr: GRPO; sft: labels", choices=("visurf", "rlvr", "sft"))
    resume: bool = flag(False, "continue the run in output_dir from its last checkpoint")
    seed: int = flag(0, "decides the order of the data and every sampled token")
    max_steps: int = flag(500, "batches of prompts to train on", 1)
    batch_size: int = flag(16, "prompts in a step", 1, 65536)
    micro_batch_size: int = flag(1, "prompts, with their groups, in one forward pass", 1)
    num_generations: int = flag(8, "rollouts of each prompt (G)", 2, 1024)
    temperature: float = flag(1.0, "of sampling and of log-probs", 0.01)
    learning_rate: float = flag(1e-6, "of AdamW, constant; LoRA's default is 10 times the task's")
    lora_rank: int = flag(0, "train only LoRA adapters of this rank; 0: all weights", 0, 1024)
    freeze_vision_tower: bool = flag(False, "do not train the vision tower; LoRA never does")
    align_label: bool = flag(True, "control 1: write the label in the rollouts' style")
    drop_thinking_reward: bool = flag(True, "control 2: no thinking reward for the label")
    smooth_label_reward: bool = flag(True, "control 3: no advantage for a label that is matched")
    checkpoint_activations: bool = flag(True, "compute activations twice to save memory")
    cpu_offload: bool = flag(False, "weights and optimizer off the GPU; raise OMP_NUM_THREADS")
    save_steps: int = flag(100, "steps between checkpoints", 1)
    keep: int = flag(1, "checkpoints to keep", 1)
    eval_steps: int = flag(0, "steps between evaluations; 0: none", 0)
    eval_data: str = flag("", "like --data of eval.py")
    eval_limit: int = flag(200, "only the first samples of eval_data; 0: all", 0)
    tensorboard: bool = flag(False, "log for TensorBoard, too")

@dataclass
class Run:
    """All that a run carries from step to step."""
    settings: Settings
    directory: Path
    files: dict                        # for its checkpoints: configs, tokenizer, licence
    processor: data.Processor
    samples: list[data.Sample]
    filler: "Group"                    # computed by a rank that has no work left
    device: torch.device
    network: model.GroupPolicy         # sharded
    sampler: model.GroupPolicy         # borrows the network's whole weights, see `gathered`
    optimizer: torch.optim.Optimizer
    votes: Counter = field(default_factory=Counter)      # label styles seen in rollouts so far
    step: int = 0                      # steps done
    skipped: int = 0                   # skipped updates in a row: no usable sample, or not finite
    eval_samples: list = field(default_factory=list)
    evaluated: int = -1                # the last step that was evaluated
    writer: object = None              # for TensorBoard, on the first rank

STATE = "training_state"               # of a checkpoint: a folder of tensors, and a JSON file
warnings.filterwarnings("ignore", "torch.distributed is disabled")     # when one process saves

def main(argv=None):
    """The command line."""
    run_program("train.py", train, parse(Settings, argv, "train.py"))

# ---- A run -------------------------------------------------------------------------------------
def train(settings):
    """Check what the user gave, load the network and train it."""
    device = start(settings.timeout)
    task = data.TASKS[settings.task]
    require(not settings.lora_rank or find_spec("peft"), "--lora_rank needs: pip install peft")
    require(not settings.tensorboard or find_spec("tensorboard"), "pip install tensorboard")
    samples = data.load_samples(settings.data, task, skip_bad_rows=settings.skip_bad_rows)
    eval_samples = []
    if settings.eval_steps:
        eval_samples = data.load_samples(settings.eval_data, task, "test", settings.eval_limit,
                                         settings.skip_bad_rows)
    directory = Path(settings.output_dir or f"runs/{settings.task}-{settings.method}")
    on_first_rank(claim, directory, settings.resume)
    config = asdict(settings) | {"samples": len(samples)}
    on_first_rank(compare_with_before, directory, config)
    # Its own checkpoint replaces --model: that is whole, or adapters that name their base.
    saved = on_first_rank(own_checkpoints, directory)
    source = saved[-1] if saved else data.fetch(settings.model)
    base = data.fetch(model.find_base(source))
    require(source == base or settings.lora_rank, f"{source} are adapters: give --lora_rank")
    model.check_checkpoint(base)
    processor = data.Processor(base, task, settings.image_size)
    filler = Group(processor.blank, ids=[processor.token_ids("[]")], advantages=torch.zeros(1))
    network, sampler = load_network(settings, source, device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, fused=True)
    run = Run(settings, directory, model.read_files(base), processor, samples, filler,
              device, network, sampler, optimizer, eval_samples=eval_samples)
    on_first_rank(write_text, directory / "config.json", json.dumps(config, indent=2))
    resume(run)
    if settings.tensorboard and is_first():
        from torch.utils.tensorboard import SummaryWriter
        # After --resume, this drops what was logged of later steps.
        run.writer = SummaryWriter(directory, purge_step=run.step + 1)
    on_first_rank(print, f"{settings.method} on {len(samples)} samples, {world()[1]} x {device}")
    if settings.method != "sft":
        # Advantages cancel, and so, nearly, does the loss.
        names = processor.score("", filler.example).keys()
        on_first_rank(print, "Loss near 0 is fine. Rewards:", *names)
    loop(run)

def loop(run):
    """Train step by step; save now and then, and if a signal or a user's mistake ends the run."""
    note_signals()
    settings = run.settings
    try:
        if settings.method == "sft" and run.step == 0:
            vote_before_sft(run)
        evaluate_if_due(run)
        while run.step < settings.max_steps:
            values, records = train_step(run)
            on_first_rank(log_step, run, values, records)
            require(run.skipped < 10, "10 updates in a row skipped: no row of --data can be used, "
                    "or the gradient is not finite: lower --learning_rate")
            evaluate_if_due(run)
            if run.step % settings.save_steps == 0:
                save(run)
    except (SystemExit, UserError, OSError):
        save(run)
        raise
    save(run)

def vote_before_sft(run):
    """Without rollouts, the network's own answers to 32 questions decide the label's style."""
    groups, _ = encode_share(run, range(32))
    sample(run, groups, 1, temperature=0)
    vote_for_style(run, groups)

def evaluate_if_due(run):
    """Every --eval_steps steps, greedy answers: metrics on the console and in evaluations.jsonl."""
    settings = run.settings
    if not settings.eval_steps or run.step % settings.eval_steps or run.step == run.evaluated:
        return
    with gathered(run) as network:
        results, bad_rows = evaluate(network, run.processor, run.eval_samples,
                                     settings.max_completion_length, 32, settings.cuda_graph)
    leave_if_asked("train.py", "--resume continues")       # a signal cuts the evaluation short
    for problem in bad_rows:
        require(settings.skip_bad_rows, f"{problem}; see --skip_bad_rows")
    values = metrics(results, run.processor.task)
    on_first_rank(append, run, "evaluations.jsonl", values)
    metric = run.processor.task.metrics[0]
    on_first_rank(print, f"after step {run.step}: {metric} {values[metric]}")
    run.evaluated = run.step

# ---- A step ------------------------------------------------------------------------------------
@dataclass
class Group:
    """A prompt with its N completions: G rollouts (none in SFT), then the label (none in RLVR)."""
    example: data.Example
    seed: int = 0                                        # decides the rollouts' tokens
    ids: list = field(default_factory=list)              # tokens of each completion, (T,)
    texts: list = field(default_factory=list)
    rewards: list = field(default_factory=list)          # of each completion, by component
    truncated: int = 0                                   # rollouts that reached the length limit
    advantages: torch.Tensor | None = None               # (N,) float64

    def record(self):
        return {"question": self.example.sample.question, "label": self.example.label,
                "texts": self.texts, "lengths": list(map(len, self.ids)),
                "truncated": self.truncated, "rewards": self.rewards,
                "advantages": self.advantages.tolist()}

def train_step(run):
    """The method on the next batch: metrics, and a record of each group of all ranks."""
    settings = run.settings
    leave_if_asked("train.py", "--resume continues")
    began = time.perf_counter()
    first = run.step * settings.batch_size
    groups, bad_rows = encode_share(run, range(first, first + settings.batch_size))
    if settings.method != "sft":
        sample(run, groups, settings.num_generations, settings.temperature)
        vote_for_style(run, groups)
    for group in groups:
        if settings.method != "rlvr":
            append_label(run, group)
        for text in group.texts:
            group.rewards.append(run.processor.score(text, group.example))
        group.advantages = compute_advantages(settings, group)
    sampled = time.perf_counter()
    values = update(run, groups)
    run.step += 1
    values["skipped_rows"] = bad_rows
    records = gather([group.record() for group in groups])
    if settings.method != "sft" and records:
        values |= summarize(records, settings)
    values["rollout_seconds"] = sampled - began
    values["update_seconds"] = time.perf_counter() - sampled
    return values, records

def encode_share(run, indices):
    """This rank's share of the prompts at `indices`, as groups; and how many rows were bad."""
    settings = run.settings
    groups = []
    bad_rows = []
    for index in my_share(indices):
        epoch, place = divmod(index, len(run.samples))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(run.samples))
        # The same on any rank. Hashed, because with seed + index, seed 1 would replay seed 0.
        seed = np.random.SeedSequence([settings.seed, index]).generate_state(1)[0]
        try:
            example = run.processor.encode(run.samples[order[place]])
            # RLVR: no rollout can equal a label too long in any style. Other methods inject it.
            label = run.processor.token_ids(visurf.align_label(example.label, "compact") + data.END)
            require(settings.method != "rlvr" or len(label) <= settings.max_completion_length,
                    f"{example.sample.where}: a label that is longer than --max_completion_length")
            groups.append(Group(example, int(seed)))
        except UserError as error:
            bad_rows.append(str(error))
    bad_rows = gather(bad_rows)
    for problem in bad_rows:
        require(settings.skip_bad_rows, f"{problem}; see --skip_bad_rows")
    return groups, len(bad_rows)

def sample(run, groups, num_generations, temperature):
    """Add completions from the current policy to each group."""
    prompts = [group.example for group in groups]
    seeds = [group.seed for group in groups]
    with gathered(run) as network:
        rollouts = model.generate(network, prompts, num_generations,
                                  run.settings.max_completion_length, temperature, seeds,
                                  run.settings.cuda_graph)
    for group, completions in zip(groups, rollouts):
        for completion in completions:
            group.ids.append(completion.ids)
            group.texts.append(run.processor.decode(completion.ids, completion.finished))
            group.truncated += not completion.finished

def vote_for_style(run, groups):
    """Control 1: count the styles of all ranks' well-formed answers."""
    styles = []
    for group in groups:
        for text in group.texts:
            if rewards.read_answer(text, run.processor.task.kind) is not None:
                styles.append(visurf.style_of(rewards.split_completion(text)[1]))
    run.votes.update(gather(styles))
    # Answers that several styles would write alike, such as [], say nothing.
    run.votes.pop(None, None)

def append_label(run, group):
    """Add the label to its group, in the rollouts' style."""
    style = "spaced"
    if run.settings.align_label:
        style = visurf.preferred_style(run.votes)
    text = visurf.align_label(group.example.label, style)
    group.texts.append(text)
    group.ids.append(run.processor.token_ids(text + data.END))

def compute_advantages(settings, group):
    """Advantages (N,) of one group, in float64; in SFT the label weighs 1."""
    if settings.method == "sft":
        return torch.ones(1, dtype=torch.float64)
    rollouts = [sum(parts.values()) for parts in group.rewards[: settings.num_generations]]
    rollouts = torch.tensor(rollouts, dtype=torch.float64)  # (G,)
    if settings.method == "rlvr":
        return visurf.group_advantages(rollouts)
    return visurf.visurf_advantages(rollouts, group.rewards[-1], settings.drop_thinking_reward,
                                    settings.smooth_label_reward)

def update(run, groups):
    """One optimizer step on the groups of all ranks; the loss is a mean over all their tokens."""
    micro_batches, total = plan(run, groups)
    loss_sum = 0.0
    for micro_batch in micro_batches:
        loss = loss_of(run, micro_batch, total)
        loss.backward()
        loss_sum += loss.item()
    # The mean over ranks, as FSDP takes the mean of their gradients: see plan.
    mean_loss = np.mean(gather([loss_sum]))
    norm = 0.0
    if micro_batches:
        norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), max_norm=1.0)
        norm = norm.full_tensor().item()
    # All ranks see the same sums, so they agree. Without a useful group, step() changes no weight.
    if total > 0 and np.isfinite(mean_loss + norm):
        run.optimizer.step()
        run.skipped = 0
    else:
        run.skipped += 1
    run.optimizer.zero_grad()
    return {"loss": mean_loss, "grad_norm": norm, "clipped": norm > 1, "skipped": run.skipped}

def plan(run, groups):
    """This rank's micro-batches, as many as any other's, and the tokens to divide losses by."""
    # A group whose advantages are all 0 has no gradient, but its tokens count in the mean.
    useful = [group for group in groups if group.advantages.any()]
    # Groups of similar length share a micro-batch: little padding.
    useful.sort(key=lambda group: max(map(len, group.ids)))
    size = run.settings.micro_batch_size
    micro_batches = [useful[i : i + size] for i in range(0, len(useful), size)]
    tokens = 0
    for group in groups:
        tokens += sum(map(len, group.ids))
    of_all_ranks = np.array(gather([(len(micro_batches), tokens)]))  # (W, 2)
    # FSDP's exchanges need all ranks: one with fewer micro-batches computes fillers.
    micro_batches += [[run.filler]] * (of_all_ranks[:, 0].max() - len(micro_batches))
    # FSDP and update() average over ranks: so divide by the mean of the ranks' tokens.
    return micro_batches, of_all_ranks[:, 1].mean()

def loss_of(run, micro_batch, total):
    """The loss of b groups: a sum over their tokens, divided by `total`."""
    examples = [group.example for group in micro_batch]
    prompts = model.PromptBatch.from_prompts(examples, run.network.config, run.device)
    ids, mask = model.pad_completions([group.ids for group in micro_batch])  # (b, N, T)
    A = torch.stack([group.advantages for group in micro_batch]).float()  # (b, N)
    # Completions with zero advantage, a filler's too, have no gradient and are left out.
    mask = (mask & (A[..., None] != 0)).to(run.device)
    logprobs = run.network(prompts, ids.to(run.device), mask, run.settings.temperature)
    if run.settings.method == "sft":
        return visurf.sft_loss(logprobs, mask, total)
    # The policy is the one that sampled: the importance ratio is 1.
    return visurf.policy_loss(logprobs, logprobs.detach(), A.to(run.device), mask, total=total)

# ---- The network, sharded ----------------------------------------------------------------------
def load_network(settings, source, device):
    """The network, 1/W of it on each of W ranks; and its sampler, see gathered."""
    base = data.fetch(model.find_base(source))
    network = model.load_pretrained(base, dtype="auto")
    network.vlm.model.visual.requires_grad_(not settings.freeze_vision_tower)
    if settings.lora_rank:
        torch.manual_seed(settings.seed)        # new adapters are the same on all ranks
        model.add_adapters(network, source, settings.lora_rank, settings.model)
    # The sampler is a copy without FSDP's hooks. By this memo, deepcopy shares the buffers, and
    # makes weights that are empty until `gathered` lends it the network's.
    memo = {}
    for buffer in network.buffers():
        memo[id(buffer)] = buffer
    for weight in network.parameters():
        memo[id(weight)] = torch.nn.Parameter(weight.to("meta"), weight.requires_grad)
    sampler = copy.deepcopy(network, memo)
    on_gpu = device.type == "cuda"
    if on_gpu:
        needed = 0
        for weight in network.parameters():
            # Bytes of a weight: 2 gathered, and sharded 16 if trained, 4 if frozen (with LoRA 2).
            frozen = 2 if settings.lora_rank else 4
            kept = 16 if weight.requires_grad else frozen
            share = 0 if settings.cpu_offload else kept / dist.get_world_size()
            needed += (2 + share) * weight.numel()
        available = torch.cuda.get_device_properties(device).total_memory
        require(needed <= available, f"this --model needs {needed / 1e9:.0f} of "
                f"{available / 1e9:.0f} GB before any activation: use more GPUs or --cpu_offload")
    # Inputs are not cast: rotary tables and pixels stay in float32.
    compute = torch.bfloat16 if on_gpu else torch.float32
    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32,
                                       cast_forward_inputs=False)
    offload = fsdp.OffloadPolicy()
    if settings.cpu_offload:
        offload = fsdp.CPUOffloadPolicy(pin_memory=on_gpu)
    # Each block is a unit, the rest another. This moves buffers, the sampler's too, in place.
    blocks = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in [*blocks, network]:
        fsdp.fully_shard(module, mp_policy=policy, offload_policy=offload)
    # Only now: whole float32 weights may not fit on a rank. LoRA's base stays bfloat16 on GPUs.
    if not (settings.lora_rank and on_gpu):
        network.float()
    if settings.checkpoint_activations:
        network.vlm.activation_checkpointing_enable({"use_reentrant": False})
        # The line before makes inputs ask for gradients: a frozen tower would run backward in vain.
        network.vlm.disable_input_require_grads()
        network.train()     # else transformers recomputes nothing
    return network, sampler

@contextmanager
def gathered(run):
    """The sampler with the whole weights, in the compute dtype; unusable after the context."""
    # The sampler exchanges nothing while it decodes: with FSDP's hooks, ranks would wait forever
    # for one that has fewer prompts.
    units = [module for module in run.network.modules() if isinstance(module, fsdp.FSDPModule)]
    for unit in units:
        unit.unshard()
    weights = dict(run.network.named_parameters(remove_duplicate=False))    # tied ones twice
    run.sampler.load_state_dict(weights, assign=True)
    try:
        yield run.sampler
    finally:
        for unit in units:
            unit.reshard()

# ---- Checkpoints -------------------------------------------------------------------------------
def save(run):
    """Write checkpoint-STEP, unless it is there or STEP is 0; delete the oldest beyond --keep."""
    final = run.directory / f"checkpoint-{run.step}"
    # Under this name until it is complete on disk, so no half-written one is ever found.
    unfinished = run.directory / "unfinished"
    if run.step == 0 or on_first_rank(final.exists):
        return
    try:
        write_checkpoint(run, unfinished)
        on_first_rank(os.rename, unfinished, final)
    except (OSError, SafetensorError, dcp.CheckpointException, model.CheckpointError) as error:
        on_first_rank(shutil.rmtree, unfinished, True)
        reason = str(error).strip().rpartition("\n")[2]
        raise UserError(f"{final}: not written ({reason:.300}); repair, then --resume") from None
    for old in on_first_rank(own_checkpoints, run.directory)[: -run.settings.keep]:
        # Renamed first: a half-deleted one must not look complete.
        on_first_rank(os.rename, old, unfinished)
        on_first_rank(shutil.rmtree, unfinished)

def write_checkpoint(run, directory):
    """Write a Hugging Face checkpoint and the training state, and wait until the disk has them."""
    with gathered(run) as network:
        # An error if its log-probs are NaN: such weights must not replace better ones.
        model.generate(network, [run.filler.example], 1, 1)
        on_first_rank(shutil.rmtree, directory, True)
        on_first_rank(model.save_pretrained, network, directory, run.files)
    writer = dcp.HuggingFaceStorageWriter(str(directory / STATE), save_distributed=True)
    dcp.save(tensors(run), storage_writer=writer, no_dist=dist.get_world_size() == 1)
    state = {"step": run.step, "evaluated": run.evaluated, "votes": run.votes,
             "logs": sizes(run.directory.glob("*.jsonl")),
             "tensors": sizes(directory.rglob("*.safetensors"))}
    on_first_rank(write_text, directory / f"{STATE}.json", json.dumps(state, indent=1))
    os.sync()     # the final name must not reach the disk before the contents,
    gather([])    # nor before those of other ranks

def tensors(run):
    """Training state by name: weights, and AdamW's moments and step counts."""
    found = {}
    state = get_optimizer_state_dict(run.network, run.optimizer)["state"]
    for name, moments in state.items():
        for moment, value in moments.items():
            found[f"{moment}/{name}"] = value
    for name, weight in run.network.named_parameters():
        if weight.requires_grad or not run.settings.lora_rank:
            found[f"weight/{name}"] = weight.detach()
    return found

def sizes(paths):
    """The bytes of files, by name."""
    return {path.name: path.stat().st_size for path in paths}

def own_checkpoints(directory):
    """The run's checkpoints, the oldest first; an error if anything else has such a name."""
    paths = {}
    for path in directory.glob("checkpoint-*"):
        step = model.read_json(path / f"{STATE}.json").get("step")
        require(path.name == f"checkpoint-{step}", f"{path}: holds step {step}; move it away")
        paths[step] = path
    return list(map(paths.get, sorted(paths)))

def compare_with_before(directory, config):
    """UserError if the directory holds another run, as --resume cannot change these settings."""
    path = directory / "config.json"
    before = model.read_json(path) if path.exists() else config
    for name in ("task", "method", "model", "seed", "batch_size", "lora_rank",
                 "freeze_vision_tower", "samples"):
        require(before.get(name) == config[name], f"{directory} holds a run with another {name}: "
                f"{before.get(name)!r}, not {config[name]!r}; --resume cannot change it")

def resume(run):
    """Go on from the last checkpoint, if there is one, on as many ranks as there are now."""
    state = {"logs": {}}
    checkpoints = on_first_rank(own_checkpoints, run.directory)
    if checkpoints:
        last = checkpoints[-1]
        state = model.read_json(last / f"{STATE}.json")
        # Without one rank's file, load would silently leave its shards of weights as they were.
        require(sizes(last.rglob("*.safetensors")) == state.get("tensors"), f"{last}: a damaged or "
                "missing tensor file; delete it to go on from an older checkpoint, or anew")
        run.step = state["step"]
        run.evaluated = state["evaluated"]
        run.votes = Counter(state["votes"])
        reader = dcp.HuggingFaceStorageReader(str(last / STATE))
        # In place: tensors() gives the network's own tensors, and AdamW's, made as zeros if needed.
        dcp.load(tensors(run), storage_reader=reader, no_dist=dist.get_world_size() == 1)
    if is_first():
        for log in run.directory.glob("*.jsonl"):
            os.truncate(log, state["logs"].get(log.name, 0))     # later steps run again

# ---- Logs --------------------------------------------------------------------------------------
def summarize(records, settings):
    """Means over all rollouts of a step, and over its labels if they were injected."""
    G = settings.num_generations
    columns = defaultdict(list)
    for record in records:
        # Labels come last. [] and 0 say that nothing is there: such groups are counted apart.
        kind = "absent" if record["label"] in ([], "0") else "present"
        columns["length"] += record["lengths"][:G]
        for text in record["texts"][:G]:
            columns[f"thinking/{kind}"].append(rewards.has_thinking(text))
            columns[f"empty/{kind}"].append(rewards.read_answer(text, "count") in ([], "0"))
        for components in record["rewards"][:G]:
            columns["reward"].append(sum(components.values()))
            for name, reward in components.items():
                columns[f"reward/{name}"].append(reward)
        columns["truncated"].append(record["truncated"] / G)
        if settings.method == "visurf":
            active = record["advantages"][-1] != 0
            columns["label_active"].append(active)
            columns[f"label_active/{kind}"].append(active)
    return {name: np.mean(values) for name, values in columns.items()}

def log_step(run, values, records):
    """A line on the console and a record in the logs; every tenth step whole groups too."""
    line = f"step {run.step:4d}/{run.settings.max_steps} | loss {values['loss']:.3g}"
    if "reward" in values:
        parts = [f"{values[name]:.2f}" for name in values if name.startswith("reward/")]
        line += f" | reward {values['reward']:.2f} = {' + '.join(parts)}"
    if "label_active" in values:
        line += f" | label_active {values['label_active']:.2f}"
    print(f"{line} | {values['rollout_seconds'] + values['update_seconds']:.2f} s", flush=True)
    # JSON has no NaN.
    values = {name: value if np.isfinite(value) else None for name, value in values.items()}
    append(run, "metrics.jsonl", values | {"style": visurf.preferred_style(run.votes)})
    if run.step % 10 == 1 and records:                 # steps 1, 11, 21, ...
        print(f"    {records[0]['texts'][0]!r} earns {records[0]['rewards'][0]}")
        for record in records:
            append(run, "completions.jsonl", record)

def append(run, name, entry):
    """Add an entry to a log of JSON lines, with its step, and its floats to TensorBoard's log."""
    with open(run.directory / name, "a") as log:
        log.write(json.dumps({"step": run.step} | entry) + "\n")
    if run.writer is not None:
        for key, value in entry.items():
            if isinstance(value, float):
                run.writer.add_scalar(f"{name.removesuffix('.jsonl')}/{key}", value, run.step)

if __name__ == "__main__":
    main()
