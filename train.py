"""Post-train a Qwen2-VL or Qwen2.5-VL checkpoint with ViSurf, with reinforcement alone, or with supervision alone.

    python train.py                                                     # built-in task, bundled checkpoint, minutes
    python train.py --task grounding --data my.jsonl --model path/to/checkpoint
    python train.py --method rlvr                                       # no label in the group: GRPO
    python train.py --method sft                                        # no rollouts: cross-entropy on the label

One step, for a batch of prompts:   sample -> score -> inject the label -> advantages -> loss -> optimizer step
`train_step` is that line, in that order. The algorithm is in visurf.py, the network and the sampler in model.py.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import eval as evaluation
import model
import rewards
import visurf


class UsageError(ValueError):
    """A flag that cannot work; the message is one line that names the flag and the remedy."""


def option(default, help: str, choices=None):
    """A field of Config that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """All settings of a run; every field is a flag. A task's record may change a default (data.TASKS, `recipe`)."""

    task: str = option("shapes", "what to learn", tuple(data.TASKS))
    method: str = option("visurf", "visurf, rlvr (no label in the group) or sft (label only)", ("visurf", "rlvr", "sft"))
    model: str = option("", "checkpoint directory or hub id (default: the task's)")
    data: str = option("", "training data: file, folder or hub id (default: the task's)")
    eval_data: str = option("", "held-out data, evaluated before and after (default: the task's, if it is built in)")
    eval_samples: int = option(200, "how many held-out samples to evaluate, 0 for none")
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
    learning_rate: float = option(1e-6, "constant after the warm-up")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.01, "of AdamW, on matrices")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    epsilon: float = option(0.2, "importance ratios are clipped below 1 - epsilon")
    epsilon_high: float = option(0.0, "and above 1 + epsilon_high (0: epsilon)")
    ratio: str = option("token", "importance ratio per token (GRPO) or per sequence (GSPO)", ("token", "sequence"))
    average: str = option("token", "the loss is averaged over tokens, or per sequence first", ("token", "sequence"))
    align_label: bool = option(True, "control 1: write the label in the rollouts' style")
    drop_thinking_reward: bool = option(True, "control 2: no reward for thinking to the label")
    smooth_label_reward: bool = option(True, "control 3: the label earns the rollouts' mean once one is as good")
    think: bool = option(True, "ask for reasoning before the answer")
    image_size: int = option(0, "side to which images are squashed, in pixels (default: the task's)")
    min_pixels: int = option(0, "keep aspect ratios instead, with at least this many pixels")
    max_pixels: int = option(0, "keep aspect ratios instead, with at most this many pixels")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and count them")
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    save_steps: int = option(100, "steps between checkpoints")
    log_rollouts: int = option(10, "steps between rollouts shown in full")


# ---- The step --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run carries from step to step."""

    config: Config
    task: data.Task
    processor: data.Processor
    network: model.QwenVL
    optimizer: torch.optim.Optimizer
    style: data.LabelStyle  # how the rollouts so far wrote their answers
    step: int = 0  # the next one
    not_finite: int = 0  # updates given up because a loss or gradient was not a number


@dataclass
class Group:
    """A prompt and its group: G rollouts (none in SFT), then the label (not in RLVR)."""

    example: data.Example
    ids: list[torch.Tensor]  # tokens of each member, (T,)
    texts: list[str]
    components: list[dict]  # reward of each member by component
    truncated: int = 0  # rollouts cut off at the length limit


def train_step(run: Run, examples: list[data.Example]) -> tuple[dict, list[Group]]:
    """One batch of prompts through the whole method; returns what is logged and the groups."""
    start = time.perf_counter()
    rollouts = sample_rollouts(run, examples)
    groups = [make_group(run, example, completions) for example, completions in zip(examples, rollouts)]
    if run.config.method != "rlvr":
        inject_labels(run, groups)
    advantages = compute_advantages(run.config, groups)  # (B, N)
    sampled = time.perf_counter()
    metrics = update(run, groups, advantages)
    metrics |= describe(run, groups, advantages)
    metrics |= {"rollout_seconds": sampled - start, "update_seconds": time.perf_counter() - sampled}
    return metrics, groups


def sample_rollouts(run: Run, examples) -> list[list[model.Completion]]:
    """G completions of each prompt; the seed of a prompt's rollouts is its place in the run."""
    config = run.config
    if config.method == "sft":
        return [[] for _ in examples]
    first = (config.seed << 32) + run.step * config.batch_size
    run.network.eval()
    return model.generate(run.network, examples, config.num_generations, config.max_completion_length,
                          config.temperature, config.top_p, config.top_k, seeds=range(first, first + len(examples)))


def make_group(run: Run, example, completions) -> Group:
    """Score one prompt's rollouts, and let the label's style learn from them."""
    group = Group(example, [], [], [])
    for completion in completions:
        text = run.processor.decode(completion.ids)
        run.style.observe(text)
        group.ids.append(completion.ids)
        group.texts.append(text)
        group.components.append(score(run, text, example))
        group.truncated += not completion.finished
    return group


def score(run: Run, text: str, example) -> dict:
    """Reward components of a completion, in the frame that the model speaks; without their total."""
    thresholds = rewards.Thresholds(**(run.task.thresholds or {}))
    scores = rewards.score(text, example.objects, run.task.name, example.frame, thresholds, run.config.think)
    return {name: value for name, value in scores.items() if name != "total"}


def inject_labels(run: Run, groups: list[Group]):
    """Append each group's label: its text in the rollouts' style (control 1), its tokens, its reward components."""
    for group in groups:
        example = group.example  # without control 1 the label stays as the data set wrote it
        text = run.style.render(example.objects) if run.config.align_label else example.written_label()
        components = score(run, text, example)
        for name in components.keys() & set(rewards.THINKING):
            components[name] = 1.0  # right by definition, so it would earn all there is; control 2 takes this back
        group.texts.append(text)
        group.ids.append(run.processor.label_ids(text))
        group.components.append(components)


def compute_advantages(config: Config, groups: list[Group]) -> torch.Tensor:
    """Advantages (B, N), float64; in SFT every label weighs 1."""
    if config.method == "sft":
        return torch.ones(len(groups), 1, dtype=torch.float64)
    G = config.num_generations
    totals = [[sum(components.values()) for components in group.components[:G]] for group in groups]
    totals = torch.tensor(totals, dtype=torch.float64)  # (B, G)
    if config.method == "rlvr":
        return visurf.group_advantages(totals)
    labels = [group.components[-1] for group in groups]
    labels = {name: torch.tensor([label[name] for label in labels], dtype=torch.float64) for name in labels[0]}
    return visurf.visurf_advantages(totals, labels, rewards.THINKING, config.drop_thinking_reward,
                                    config.smooth_label_reward)


def update(run: Run, groups: list[Group], advantages: torch.Tensor) -> dict:
    """One or more optimizer steps on the groups. Groups without any advantage are left out: their gradient is 0."""
    config, network = run.config, run.network
    network.train()
    tokens = sum(len(ids) for group in groups for ids in group.ids)
    total = tokens if config.average == "token" else advantages.numel()  # of the whole batch, however it is cut
    useful = [i for i in range(len(groups)) if advantages[i].any()]
    pieces = [useful[i : i + config.micro_batch_size] for i in range(0, len(useful), config.micro_batch_size)]
    pieces = [make_piece(run, [groups[i] for i in piece], advantages[piece]) for piece in pieces]
    old = [None] * len(pieces)
    if config.num_iterations > 1:  # otherwise the policy that sampled is the one that is updated
        with torch.no_grad():
            old = [network(*piece[:3], config.temperature) for piece in pieces]

    metrics = {"loss": 0.0, "grad_norm": 0.0, "clipped": 0.0, "kl": 0.0}
    for _ in range(config.num_iterations if pieces else 0):
        run.optimizer.zero_grad(set_to_none=True)
        for (batch, ids, mask, A), old_logprobs in zip(pieces, old):
            logprobs = network(batch, ids, mask, config.temperature)  # (b, N, T)
            if config.method == "sft":
                loss, stats = visurf.sft_loss(logprobs, mask, config.average, total), {}
            else:
                before = logprobs.detach() if old_logprobs is None else old_logprobs
                loss, stats = visurf.policy_loss(logprobs, before, A, mask, config.epsilon,
                                                 config.epsilon_high or config.epsilon, config.ratio, config.average, total)
            loss.backward()
            metrics["loss"] += loss.item() / config.num_iterations
            for name, value in stats.items():
                metrics[name] += (value * mask.sum()).item() / tokens / config.num_iterations
        metrics["grad_norm"] = optimizer_step(run)
    return metrics


def make_piece(run: Run, groups: list[Group], advantages):
    """The tensors of a few groups: prompts, completions (b, N, T), their mask, advantages (b, N)."""
    device = run.network.head_weight.device
    ids, mask = model.pad_completions([group.ids for group in groups])
    batch = model.PromptBatch.from_prompts([group.example for group in groups], run.network.config, device)
    return batch, ids.to(device), mask.to(device), advantages.to(device)


def optimizer_step(run: Run) -> float:
    """Clip and step; a gradient that is not finite is dropped and counted, and the run goes on. Returns the norm."""
    config = run.config
    norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm):
        run.not_finite += 1
        return float("nan")
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (run.step + 1) / max(config.warmup_steps, 1))
    run.optimizer.step()
    return norm.item()


# ---- What is shown ---------------------------------------------------------------------------------------------------


def describe(run: Run, groups: list[Group], advantages) -> dict:
    """What happened in a step, by name: shares run from 0 to 1, rewards are means over rollouts, lengths in tokens."""
    G = run.config.num_generations if run.config.method != "sft" else 0
    metrics = {"not_finite": run.not_finite}
    if run.config.method != "rlvr":
        labels = [group.components[-1] for group in groups]
        metrics["label_reward"] = sum(sum(label.values()) for label in labels) / len(groups)
        metrics["label_text"] = groups[0].texts[-1]
    if not G:
        return metrics
    rollouts = [components for group in groups for components in group.components[:G]]
    metrics["reward"] = sum(sum(components.values()) for components in rollouts) / len(rollouts)
    for name in rollouts[0]:
        metrics[f"reward/{name}"] = sum(components[name] for components in rollouts) / len(rollouts)
    lengths = [len(ids) for group in groups for ids in group.ids[:G]]
    metrics["length"], metrics["tokens"] = sum(lengths) / len(lengths), sum(lengths)
    metrics["truncated"] = sum(group.truncated for group in groups) / len(lengths)
    metrics["no_signal"] = (advantages == 0).all(dim=1).double().mean().item()
    metrics["style"] = run.style.example()
    if run.config.method == "visurf":
        label = advantages[:, -1]
        metrics["label_active"] = (label.abs() > 1e-6).double().mean().item()
        metrics["label_advantage"] = label.mean().item()
    return metrics


def step_line(run: Run, m: dict) -> str:
    """A step in one line of words."""
    words = [f"step {run.step + 1:4d}/{run.config.max_steps}"]
    if "reward" in m:
        parts = " ".join(f"{name[7:]} {value:.2f}" for name, value in m.items() if name.startswith("reward/"))
        words.append(f"reward {m['reward']:.2f} ({parts})")
    if "label_active" in m:
        words.append(f"label active {m['label_active']:.0%}, advantage {m['label_advantage']:+.2f}")
    words.append(f"loss {m['loss']:+.3f}, gradient {m['grad_norm']:.2f}")
    if "reward" in m:
        words.append(f"no signal {m['no_signal']:.0%}, clipped {m['clipped']:.1%}")
        words.append(f"length {m['length']:.0f}, cut off {m['truncated']:.0%}")
        words.append(f"{m['tokens'] / m['rollout_seconds']:,.0f} tokens/s")
    words.append(f"{m['rollout_seconds']:.1f} s rollout + {m['update_seconds']:.1f} s update")
    if m["not_finite"]:
        words.append(f"{m['not_finite']} updates were not finite")
    return " | ".join(words)


def show_rollout(run: Run, group: Group, advantages=None) -> str:
    """A whole group member or two, as a reader would want to see them."""
    lines = [f"--- {group.example.sample.question}"]
    for text, components in list(zip(group.texts, group.components))[:: max(len(group.texts) - 1, 1)]:
        which = "label  " if text is group.texts[-1] and run.config.method != "rlvr" else "rollout"
        scores = " ".join(f"{name} {value:.2f}" for name, value in components.items())
        lines.append(f"    {which} {text!r}  ({scores})")
    return "\n".join(lines)


# ---- What is kept ----------------------------------------------------------------------------------------------------


def prepare_output(config: Config) -> Path:
    """Make the output directory; refuse to mix two runs. Raises UsageError."""
    directory = Path(config.output_dir or f"runs/{config.task}-{config.method}")
    if config.overwrite and config.resume:
        raise UsageError("--resume and --overwrite exclude each other")
    if config.overwrite and (directory / "config.json").exists():
        shutil.rmtree(directory)
    if (directory / "config.json").exists() and not config.resume:
        raise UsageError(f"{directory} holds another run: continue it with --resume, replace it with --overwrite, or "
                         "choose another --output_dir")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(asdict(config), indent=2))
    return directory


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; unfinished ones have another name."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def save(run: Run, directory: Path, source) -> Path:
    """Write checkpoint-STEP, a Hugging Face checkpoint with the training state beside it, and drop the one before.

    It is written under another name and renamed when complete: a run that is killed leaves its last checkpoint whole.
    """
    final, before = directory / f"checkpoint-{run.step}", last_checkpoint(directory)
    if final == before:
        return final
    partial = directory / "unfinished-checkpoint"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(run.network, partial, source)
    names = {parameter: name for name, parameter in run.network.named_parameters()}
    tensors = {f"weight/{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, state in run.optimizer.state.items():
        tensors |= {f"{key}/{names[parameter]}": value for key, value in state.items()}
    save_file(tensors, partial / "training_state.safetensors")
    state = {"step": run.step, "not_finite": run.not_finite, "style": run.style.state_dict()}
    (partial / "training_state.json").write_text(json.dumps(state))
    os.replace(partial, final)
    if before is not None:
        shutil.rmtree(before)
    return final


def load_state(run: Run, checkpoint: Path):
    """Continue where `save` left off: float32 weights, optimizer moments, step, label style."""
    state = model.read_json(checkpoint / "training_state.json")
    run.step, run.not_finite = state["step"], state["not_finite"]
    run.style.load_state_dict(state["style"])
    with safe_open(checkpoint / "training_state.safetensors", "pt") as tensors:
        keys = {key.split("/")[0] for key in tensors.keys()} - {"weight"}
        for name, parameter in run.network.named_parameters():
            parameter.data.copy_(tensors.get_tensor(f"weight/{name}"))
            if keys:
                device = parameter.device
                run.optimizer.state[parameter] = {
                    key: tensors.get_tensor(f"{key}/{name}").to("cpu" if key == "step" else device) for key in keys}


class Log:
    """metrics.jsonl, completions.jsonl and the console; steps that a resumed run does again are dropped first."""

    def __init__(self, directory: Path, first_step: int):
        self.files = {}
        for name in ("metrics", "completions"):
            path = directory / f"{name}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            path.write_text("".join(line + "\n" for line in kept))
            self.files[name] = path.open("a")

    def write(self, name: str, record: dict):
        print(json.dumps(record), file=self.files[name], flush=True)


# ---- The loop --------------------------------------------------------------------------------------------------------


def data_order(size: int, first: int, count: int, seed: int) -> list[int]:
    """Which samples are number first .. first + count - 1 of an endless stream that shuffles the data each epoch."""
    epochs = {k // size for k in range(first, first + count)}
    shuffled = {e: torch.randperm(size, generator=torch.Generator().manual_seed((seed << 32) + e)) for e in epochs}
    return [int(shuffled[k // size][k % size]) for k in range(first, first + count)]


def train(config: Config):
    """A whole run: check what the user gave, load, evaluate, train, save, evaluate again."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("several processes are not supported yet: use torchrun --nproc_per_node 1, or plain python")
    task = data.TASKS[config.task]
    checkpoint = model.find_checkpoint(config.model or task.model)
    model.read_config(checkpoint)  # a wrong checkpoint is found out before the data is read
    processor = data.Processor.from_pretrained(checkpoint)
    samples = data.load_samples(config.data or None, task, "train", skip_bad_rows=config.skip_bad_rows)
    held_out = []
    if config.eval_samples and (config.eval_data or task.eval_data == "builtin"):
        held_out = data.load_samples(config.eval_data or None, task, "test", config.eval_samples, config.skip_bad_rows)
    encode = partial(processor.encode, task=task, think=config.think, max_prompt_length=config.max_prompt_length,
                     **image_settings(config))
    encode(samples[0])  # wrong image settings, too long prompts: before the weights are read
    directory = prepare_output(config)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = model.load_pretrained(checkpoint, device=device)
    network.checkpoint_activations = config.checkpoint_activations
    run = Run(config, task, processor, network, make_optimizer(network, config), data.LabelStyle(task))
    resumed = last_checkpoint(directory) if config.resume else None
    if resumed:
        load_state(run, resumed)
    log = Log(directory, run.step)
    print(f"{config.method} on {config.task}: {len(samples)} samples ({samples.skipped} skipped, {samples.clipped} boxes "
          f"clipped), {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters on {device}, "
          f"{config.max_steps} steps of {config.batch_size} prompts x {config.num_generations} rollouts")

    before = run_evaluation(run, held_out, directory / "before.json")
    progress = tqdm(range(run.step, config.max_steps), initial=run.step, total=config.max_steps, unit="step", leave=False)
    for _ in progress:
        indices = data_order(len(samples), run.step * config.batch_size, config.batch_size, config.seed)
        metrics, groups = train_step(run, [encode(samples[i]) for i in indices])
        tqdm.write(step_line(run, metrics))
        log.write("metrics", {"step": run.step + 1, **metrics})
        if run.step % config.log_rollouts == 0:
            tqdm.write(show_rollout(run, groups[0]))
            for group in groups:
                log.write("completions", {"step": run.step + 1, "question": group.example.sample.question,
                                          "texts": group.texts, "rewards": group.components})
        run.step += 1
        if run.step % config.save_steps == 0:
            save(run, directory, checkpoint)
    final = save(run, directory, checkpoint)
    after = run_evaluation(run, held_out, directory / "after.json", directory / "gallery.png")
    report(before, after, {"checkpoint": final, "metrics": directory / "metrics.jsonl",
                           "completions": directory / "completions.jsonl",
                           "gallery": directory / "gallery.png" if held_out else None})


def image_settings(config: Config) -> dict:
    """The flags about image sizes, as data.Processor.encode takes them: what was not given is None."""
    side = config.image_size
    return {"image_size": (side, side) if side else None, "min_pixels": config.min_pixels or None,
            "max_pixels": config.max_pixels or None}


def make_optimizer(network, config: Config) -> torch.optim.AdamW:
    """AdamW on float32 weights; norms and biases do not decay."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999))


def run_evaluation(run: Run, samples, answers_file: Path, gallery_file: Path | None = None) -> dict:
    """Metrics on held-out samples, answers to a file, a picture if asked for; {} without samples."""
    if not samples:
        return {}
    config = run.config
    results = evaluation.evaluate(
        run.network, run.processor, run.task, samples, think=config.think, max_new_tokens=config.max_completion_length,
        **image_settings(config))
    metrics = evaluation.metrics(results)
    answers_file.write_text(json.dumps({"metrics": metrics, "answers": results}))
    if gallery_file:
        evaluation.gallery(results, samples, gallery_file)
    return metrics


def report(before: dict, after: dict, files: dict):
    """The end of a run: held-out metrics before and after, and where everything is."""
    if after:
        print(f"\n{'held out':14s} {'before':>8s} {'after':>8s}")
    for name, value in after.items():
        old = before.get(name)
        print(f"{name:14s} " + " ".join(f"{'-':>8s}" if v is None else f"{v:8.3f}" for v in (old, value)))
    print()
    for name, path in files.items():
        if path:
            print(f"{name:14s} {path}")


def parse_command_line(argv=None) -> Config:
    """Flags from Config's fields; a flag that was not given takes the task's default, then Config's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        help = f.metadata["help"] + ("" if f.default in ("", 0) and f.type is not bool else f" (default: {f.default})")
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=help)
    given = vars(parser.parse_args(argv))
    task = data.TASKS[given.get("task", Config.task)]
    config = Config(**{**task.recipe, **given})
    for name in ("batch_size", "micro_batch_size", "num_generations", "num_iterations", "max_steps", "save_steps",
                 "max_completion_length", "temperature", "top_p", "learning_rate"):
        if not (getattr(config, name) > 0 and math.isfinite(getattr(config, name))):
            raise UsageError(f"--{name} must be greater than 0, not {getattr(config, name)}")
    if config.method == "rlvr" and config.num_generations < 2:
        raise UsageError("--num_generations 1 leaves rlvr nothing to compare in a group: use 2 or more, or --method visurf")
    return config


def main(argv=None):
    try:
        train(parse_command_line(argv))
    except (UsageError, data.DataError, model.CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
