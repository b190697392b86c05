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

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import eval as evaluate  # the module's name hides Python's eval, which nothing here calls
import model
import rewards
import visurf
from support import report

def option(default, help: str, choices=None):
    """A field of Config that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})

@dataclass
class Config:
    """All settings of a run; every field is a flag. A task's record may change a default (data.TASKS, `recipe`)."""

    task: str = option("shapes", "what to learn", tuple(data.TASKS))
    method: str = option("visurf", "visurf, rlvr (no label injected) or sft (label only)", ("visurf", "rlvr", "sft"))
    model: str = option("", "checkpoint directory or hub id (default: the task's)")
    data: str = option("", "training data: file, folder or hub id (default: the task's)")
    eval_data: str = option("", "held-out data, evaluated before and after (default: the task's, if it is built in)")
    eval_steps: int = option(0, "evaluate every so many steps too, 0 for only before and after")
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
    learning_rate: float = option(1e-6, "of AdamW, constant")
    weight_decay: float = option(0.01, "of AdamW")
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
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass: less memory, slower")
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
    step: int = 0  # steps done
    not_finite: int = 0  # updates given up because the gradient was not finite

def make_run(config: Config, task, processor, network) -> Run:
    """A run at step 0: AdamW on float32 weights, no style seen yet."""
    network.checkpoint_activations = config.checkpoint_activations
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    return Run(config, task, processor, network, optimizer, data.LabelStyle(task))

@dataclass
class Group:
    """A prompt and its group of N: G rollouts (none in SFT), then the label (not in RLVR)."""

    example: data.Example
    ids: list[torch.Tensor]  # tokens of each member, (T,)
    texts: list[str]
    components: list[dict]  # reward of each member by component
    truncated: int  # rollouts cut off at the length limit

def train_step(run: Run, examples: list[data.Example]) -> tuple[dict, list[Group]]:
    """One batch of prompts through the whole method; returns what is logged, and the groups."""
    start = time.perf_counter()
    rollouts = sample_rollouts(run, examples)
    groups = [score_rollouts(run, example, completions) for example, completions in zip(examples, rollouts)]
    if run.config.method != "rlvr":
        inject_labels(run, groups)
    advantages = compute_advantages(run.config, groups)  # (B, N)
    sampled = time.perf_counter()
    metrics = update(run, groups, advantages)
    seconds = {"rollout_seconds": sampled - start, "update_seconds": time.perf_counter() - sampled}
    return describe(run, groups, advantages) | metrics | seconds, groups

def sample_rollouts(run: Run, examples) -> list[list[model.Completion]]:
    """G completions of each prompt; the seed of a prompt's rollouts is its place in the run."""
    config = run.config
    if config.method == "sft":
        return [[] for _ in examples]
    seeds = [mix_seeds(config.seed, run.step * config.batch_size + i) for i in range(len(examples))]
    return model.generate(run.network, examples, config.num_generations, config.max_completion_length,
                          config.temperature, config.top_p, config.top_k, seeds)

def score_rollouts(run: Run, example, completions) -> Group:
    """The group of one prompt without its label; the label's style learns from the rollouts."""
    texts = [run.processor.decode(completion.ids) for completion in completions]
    for text in texts:
        run.style.observe(text)
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

def compute_advantages(config: Config, groups: list[Group]) -> torch.Tensor:
    """Advantages (B, N), float64; in SFT every label weighs 1."""
    if config.method == "sft":
        return torch.ones(len(groups), 1, dtype=torch.float64)
    totals = [[sum(components.values()) for components in group.components] for group in groups]
    totals = torch.tensor(totals, dtype=torch.float64)[:, : config.num_generations]  # (B, G)
    if config.method == "rlvr":
        return visurf.group_advantages(totals)
    labels = [group.components[-1] for group in groups]
    labels = {name: torch.tensor([label[name] for label in labels], dtype=torch.float64) for name in labels[0]}
    return visurf.visurf_advantages(totals, labels, rewards.THINKING, config.drop_thinking_reward,
                                    config.smooth_label_reward)

def update(run: Run, groups: list[Group], advantages: torch.Tensor) -> dict:
    """One or more optimizer steps on the groups. Groups without any advantage are left out: their gradient is 0."""
    config = run.config
    tokens = sum(len(ids) for group in groups for ids in group.ids)
    total = tokens if config.average == "token" else advantages.numel()  # of the whole batch, however it is cut
    useful = [i for i in range(len(groups)) if advantages[i].any()]
    useful.sort(key=lambda i: max(map(len, groups[i].ids)))  # groups of similar length share a piece: little padding
    pieces = [useful[i : i + config.micro_batch_size] for i in range(0, len(useful), config.micro_batch_size)]
    pieces = [make_piece(run, [groups[i] for i in piece], advantages[piece]) for piece in pieces]
    with torch.no_grad():  # with a single iteration, the policy that is updated is the one that sampled
        old = [run.network(*piece[:3], config.temperature) if config.num_iterations > 1 else None for piece in pieces]

    metrics = {"loss": 0.0, "grad_norm": 0.0, "clipped": 0.0, "kl": 0.0}
    for iteration in range(config.num_iterations if pieces else 0):
        run.optimizer.zero_grad(set_to_none=True)
        for (batch, ids, mask, A), before in zip(pieces, old):
            guess = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
            loss_of(config, guess, guess.detach(), A, mask, total)[0].backward()  # its gradient while the ratio is 1
            expected = guess.grad if iteration == 0 else None
            logprobs = run.network(batch, ids, mask, config.temperature, expected)  # (b, N, T)
            before = logprobs.detach() if before is None else before
            loss, stats = loss_of(config, logprobs, before, A, mask, total)
            loss.backward()
            metrics["loss"] += loss.item() / config.num_iterations
            for name, value in stats.items():  # means over a piece's tokens -> mean over the batch's
                metrics[name] += (value * mask.sum()).item() / tokens / config.num_iterations
        norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), config.max_grad_norm).item()
        metrics["grad_norm"] = norm
        if math.isfinite(norm):
            run.optimizer.step()
        else:  # this update is dropped and counted, and the run goes on
            run.not_finite += 1
    return metrics

def loss_of(config: Config, logprobs, old, A, mask, total) -> tuple[torch.Tensor, dict]:
    """The method's loss on some groups, divided by the whole batch's `total`, and what policy_loss tells about it."""
    if config.method == "sft":
        return visurf.sft_loss(logprobs, mask, config.average, total), {}
    clip = config.epsilon, config.epsilon_high or config.epsilon
    return visurf.policy_loss(logprobs, old, A, mask, *clip, config.ratio, config.average, total)

def make_piece(run: Run, groups: list[Group], advantages):
    """The tensors of a few groups: prompts, completions (b, N, T), their mask, advantages (b, N)."""
    device = run.network.head_weight.device
    ids, mask = model.pad_completions([group.ids for group in groups])
    batch = model.PromptBatch.from_prompts([group.example for group in groups], run.network.config, device)
    return batch, ids.to(device), mask.to(device), advantages.to(device)

# ---- The loop --------------------------------------------------------------------------------------------------------

def train(config: Config):
    """A whole run: check what the user gave, load, evaluate, train, save, evaluate again."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise data.DataError("several processes are not supported yet: use plain python, or --nproc_per_node 1")
    task = data.TASKS[config.task]
    checkpoint = data.fetch(config.model or task.model, "model")
    model.read_config(checkpoint)
    processor = data.Processor.from_pretrained(checkpoint)
    samples = data.load_samples(config.data, task, "train", skip_bad_rows=config.skip_bad_rows)
    held_out = []
    if config.eval_samples and (config.eval_data or task.eval_data == "builtin"):
        held_out = data.load_samples(config.eval_data, task, "test", config.eval_samples, config.skip_bad_rows)
    encode = partial(processor.encode, task=task, max_prompt_length=config.max_prompt_length, **encoding(config))
    encode(samples[0])  # image settings or a prompt that cannot work: before the weights are read
    directory = check_output(config)

    network = model.load_pretrained(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    run = make_run(config, task, processor, network)
    claim_output(config, directory)
    if config.resume and (last := last_checkpoint(directory)):
        load_state(run, last)
    print(f"{config.method} on {config.task}: {len(samples)} samples ({samples.skipped} bad rows skipped, "
          f"{samples.clipped} boxes clipped), {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters\n"
          "The policy loss stays near 0, which is normal: advantages have mean 0. Watch the rewards.")
    if not (run.step and (directory / "before.json").exists()):  # a resumed run knows what it started from
        run_evaluation(run, held_out, directory / "before.json")
    loop(run, samples, held_out, encode, directory, checkpoint)
    final = save(run, directory, checkpoint)
    run_evaluation(run, held_out, directory / "after.json", directory / "gallery.png")
    report.end_of_run(directory, final)

def loop(run: Run, samples, held_out, encode, directory: Path, source):
    """Steps until max_steps, with a line, a record and now and then a checkpoint for each."""
    config = run.config
    metrics_file, completions_file = (open_log(directory / f"{name}.jsonl", run.step) for name in LOGS)
    for _ in tqdm(range(run.step, config.max_steps), "training", config.max_steps, initial=run.step, leave=False):
        order = data_order(len(samples), run.step * config.batch_size, config.batch_size, config.seed)
        try:
            examples = [encode(samples[i]) for i in order]
        except data.DataError:  # an image that cannot be decoded: what was learnt so far is kept
            save(run, directory, source)
            raise
        metrics, groups = train_step(run, examples)
        run.step += 1
        tqdm.write(report.step_line(metrics, run.step, config.max_steps))
        print(json.dumps({"step": run.step, **metrics}), file=metrics_file, flush=True)
        if (run.step - 1) % config.log_rollouts == 0:
            tqdm.write(report.show_group(groups[0], config.method))
            for group in groups:
                record = {"step": run.step, "question": group.example.sample.question, "texts": group.texts}
                print(json.dumps({**record, "rewards": group.components}), file=completions_file, flush=True)
        if config.eval_steps and run.step % config.eval_steps == 0:
            run_evaluation(run, held_out, directory / f"eval-{run.step}.json")
        if run.step % config.save_steps == 0:
            save(run, directory, source)

def data_order(size: int, first: int, count: int, seed: int) -> list[int]:
    """Which samples are number first .. first + count - 1 of an endless stream that shuffles the data each epoch."""
    places = range(first, first + count)
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch in {k // size for k in places}}
    return [int(shuffled[k // size][k % size]) for k in places]

def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers. Shifted together they would not do: torch's CPU generator keeps 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def encoding(config: Config) -> dict:
    """The flags about prompts and image sizes, as data.Processor.encode takes them; what was not given is None."""
    side = config.image_size
    return {"think": config.think, "image_size": (side, side) if side else None,
            "min_pixels": config.min_pixels or None, "max_pixels": config.max_pixels or None}

# ---- What is shown ---------------------------------------------------------------------------------------------------

def describe(run: Run, groups: list[Group], advantages) -> dict:
    """What happened in a step: shares from 0 to 1, rewards as means over rollouts, lengths in tokens."""
    config, metrics, mean = run.config, {}, lambda values: sum(values) / len(values)
    if config.method != "sft":
        rollouts = [components for group in groups for components in group.components[: config.num_generations]]
        lengths = [len(ids) for group in groups for ids in group.ids[: config.num_generations]]
        metrics = {"reward": mean([sum(components.values()) for components in rollouts])}
        metrics |= {f"reward/{name}": mean([components[name] for components in rollouts]) for name in rollouts[0]}
        metrics |= {"no_signal": mean([not group.any() for group in advantages]), "length": mean(lengths),
                    "truncated": sum(group.truncated for group in groups) / len(lengths), "tokens": sum(lengths),
                    "style": run.style.example()}
    if config.method == "visurf":
        reward = lambda label: visurf.label_reward(label, rewards.THINKING, config.drop_thinking_reward).item()
        metrics |= {"label_reward": mean([reward(group.components[-1]) for group in groups]),  # before smoothing
                    "label_active": mean((advantages[:, -1].abs() > 1e-6).tolist()),
                    "label_advantage": advantages[:, -1].mean().item()}
    return metrics | {"not_finite": run.not_finite}

def run_evaluation(run: Run, samples, answers: Path, gallery: Path | None = None):
    """Held-out metrics and every answer go to a file, and some answers into a picture; nothing without samples."""
    if not samples:
        return
    results = evaluate.evaluate(run.network, run.processor, run.task, samples,
                                max_new_tokens=run.config.max_completion_length, **encoding(run.config))
    answers.write_text(json.dumps({"metrics": evaluate.metrics(results, run.task), "answers": results}, indent=1))
    if gallery:
        report.gallery(results, samples, gallery)

# ---- What is kept ----------------------------------------------------------------------------------------------------

LOGS = ("metrics", "completions")
RUN_FILES = ("config.json", "metrics.jsonl", "completions.jsonl", "before.json", "after.json", "gallery.png",
             "eval-[0-9]*.json", "checkpoint-[0-9]*", "unfinished")

def check_output(config: Config) -> Path:
    """The output directory, made if absent; a DataError if it holds another run or cannot be written."""
    directory = Path(config.output_dir or f"runs/{config.task}-{config.method}")
    if (directory / "config.json").exists() and not (config.resume or config.overwrite):
        raise data.DataError(f"{directory} holds another run: --resume continues it, --overwrite replaces it, another "
                             "--output_dir leaves it alone")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "unfinished").mkdir(exist_ok=True)
    except OSError as error:
        raise data.DataError(f"{directory}: not writable ({error.strerror}); choose another --output_dir") from None
    return directory

def claim_output(config: Config, directory: Path):
    """Make the directory this run's. Not before the weights are loaded: a run that cannot start deletes nothing.

    --overwrite removes what a run writes and nothing else: the directory may be somebody's home.
    """
    for path in [path for name in RUN_FILES for path in directory.glob(name) if config.overwrite]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (directory / "config.json").write_text(json.dumps(asdict(config), indent=2))

def open_log(path: Path, steps_done: int):
    """A log to append to, without the records of steps that a resumed run will do again."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= steps_done))
    return path.open("a")

def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; unfinished ones have another name."""
    return max(directory.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), default=None)

def save(run: Run, directory: Path, source) -> Path:
    """Write checkpoint-STEP, a Hugging Face checkpoint with the training state beside it, and drop the one before.

    It is written under another name and renamed when complete: a run that is killed leaves its last checkpoint whole.
    """
    final, before = directory / f"checkpoint-{run.step}", last_checkpoint(directory)
    if final == before:
        return final
    unfinished = directory / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(run.network, unfinished, source)
    tensors = {}
    for name, parameter in run.network.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        tensors |= {f"{key}/{name}": value for key, value in run.optimizer.state[parameter].items()}
    save_file(tensors, unfinished / "training_state.safetensors")
    state = {"step": run.step, "not_finite": run.not_finite, "style": run.style.state_dict()}
    (unfinished / "training_state.json").write_text(json.dumps(state))
    os.replace(unfinished, final)
    if before is not None:
        shutil.rmtree(before)
    return final

def load_state(run: Run, checkpoint: Path):
    """Continue where `save` left off: float32 weights, optimizer moments, step, label style."""
    state = json.loads((checkpoint / "training_state.json").read_text())
    run.step, run.not_finite = state["step"], state["not_finite"]
    run.style.load_state_dict(state["style"])
    parameters = dict(run.network.named_parameters())
    with safe_open(checkpoint / "training_state.safetensors", "pt") as tensors:
        for key in tensors.keys():
            kind, name = key.split("/")
            value, parameter = tensors.get_tensor(key), parameters[name]
            if kind == "weight":
                parameter.data.copy_(value)
            else:  # AdamW's moments live beside the parameter, its step count on the CPU
                run.optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)

# ---- The command line ------------------------------------------------------------------------------------------------

def parse_command_line(argv=None) -> Config:
    """Flags from Config's fields; a flag that was not given takes the task's default, then Config's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    for f in fields(Config):
        help = f.metadata["help"] + (f" (default: {f.default})" if f.default or f.type is bool else "")
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=help)
    given = vars(parser.parse_args(argv))
    config = Config(**{**data.TASKS[given.get("task", Config.task)].recipe, **given})
    for name in ("max_steps", "batch_size", "micro_batch_size", "num_generations", "num_iterations", "save_steps",
                 "log_rollouts", "max_prompt_length", "max_completion_length", "temperature", "top_p", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            parser.error(f"--{name} must be a number greater than 0, not {getattr(config, name)}")
    if config.method == "rlvr" and config.num_generations < 2:
        parser.error("--num_generations 1 leaves rlvr nothing to compare in a group: use 2 or more, or --method visurf")
    if config.resume and config.overwrite:
        parser.error("--resume continues the run in --output_dir and --overwrite deletes it: give one of them")
    return config

def main(argv=None):
    config = parse_command_line(argv)
    try:
        train(config)
    except (data.DataError, model.CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
