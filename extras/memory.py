"""What fits on which GPUs, what the machine holds, and what goes over the wire: docs/many_gpus.md.

    python extras/memory.py

Counted is what grows with the network or with the batch, from the shapes alone. tests/test_memory.py
compares `plan` with what processes on a CPU allocate and `host` with what saving takes there, and
tests/test_distributed.py `traffic` with what two processes exchange. No GPU was measured: CUDA itself,
NCCL, kernels' workspaces and pieces of free memory come on top, for which ROOM leaves a part of each GPU.

Parameters by these shapes are 2.21, 3.75, 8.29, 2.13, 4.44 and 8.77 billion, in NETWORKS' order; their
publishers say 2.2, 3.75, 8.3, 2.1, 4.4 and 8.8.
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

import model

# Of each GPU, the part that is planned with; formulas may be off by a quarter.
ROOM = 0.85
MACHINES = ((1, 24), (1, 80), (2, 24), (4, 80), (8, 80))      # GPUs, and GB of each
PROMPTS = 16                                                  # --batch_size
LORA = 16                                                     # --lora_rank
# Tried one after the other: each is slower, or cuts answers, which take about 60 tokens.
WAYS = ({}, {"max_completion_length": 256}, {"cpu_offload": True}, {"cpu_offload": True, "max_completion_length": 256})

# Shapes as published: D, intermediate, layers, heads, heads of keys, vocabulary, tied; of the tower all that is
# not transformers' default.
TOWER3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
NETWORKS = {
    "Qwen2-VL-2B": ((1536, 8960, 28, 12, 2, 151_936, True), {"hidden_size": 1536}),
    "Qwen2.5-VL-3B": ((2048, 11_008, 36, 16, 2, 151_936, True), {"hidden_size": 1280, "out_hidden_size": 2048}),
    "Qwen2.5-VL-7B": ((3584, 18_944, 28, 28, 4, 152_064, False), {"hidden_size": 1280, "out_hidden_size": 3584}),
    "Qwen3-VL-2B": ((2048, 6144, 28, 16, 8, 151_936, True), {**TOWER3, "out_hidden_size": 2048}),
    "Qwen3-VL-4B": ((2560, 9728, 36, 32, 8, 151_936, True), {**TOWER3, "out_hidden_size": 2560}),
    "Qwen3-VL-8B": ((4096, 12_288, 36, 32, 8, 151_936, False), {"out_hidden_size": 4096})}


def config_of(name: str):
    """The transformers config of one of NETWORKS."""
    (D, inner, layers, heads, kv_heads, vocabulary, tied), vision = NETWORKS[name]
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {"hidden_size": D, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rope_parameters": rope}
    kind = transformers.Qwen2_5_VLConfig
    if name.startswith("Qwen2-"):
        kind = transformers.Qwen2VLConfig
    if name.startswith("Qwen3-"):
        kind = transformers.Qwen3VLConfig
        text |= {"head_dim": 128, "rope_parameters": {**rope, "mrope_section": [24, 20, 20]}}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied)


# ---- The network ---------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Parameters of the network, of its root's unit (all that is in no block), and of its largest block."""

    whole: int
    root: int
    block: int
    tower: int            # of the vision tower's blocks
    trained: int          # of the whole
    root_trained: int
    block_trained: int    # of the largest block


def empty_network(config, dtype=torch.float32, lora_rank=0, frozen_tower=False) -> model.GroupPolicy:
    """A network of shapes only, without memory: its parameters are on the meta device."""
    with torch.device("meta"):
        network = model.GroupPolicy(transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=model.ATTENTION))
        network.vlm.model.visual.requires_grad_(not frozen_tower)
        if lora_rank:
            model.add_adapters(network, ROOT / "no_folder", lora_rank, "")
    return network


def count(config, lora_rank=0, frozen_tower=False) -> Counts:
    """The parameters of a network, all and trained ones."""
    def numbers(module):
        """All parameters of a module, and those that are trained."""
        weights = [*module.parameters()]
        return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)

    network = empty_network(config, torch.float32, lora_rank, frozen_tower)
    whole, trained = numbers(network)
    blocks = [numbers(block) for block in network.modules() if isinstance(block, GradientCheckpointingLayer)]
    tower = [numbers(block)[0] for block in network.vlm.model.visual.modules()
             if isinstance(block, GradientCheckpointingLayer)]
    of_blocks, trained_of_blocks = map(sum, zip(*blocks))
    return Counts(whole, whole - of_blocks, max(blocks)[0], sum(tower), trained,
                  trained - trained_of_blocks, max(blocks)[1])


# ---- A GPU ---------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a rank does in a step; an image of 840x840 has 60x60 patches, or 52x52 of Qwen3-VL's."""

    prompts: int = 2
    group: int = 8                # rollouts of each; the label is one more
    prompt_tokens: int = 950
    patches: int = 3600           # of each prompt
    completion_tokens: int = 512
    micro_batch: int = 1          # prompts


class Sizes(NamedTuple):
    """Widths that activations have: c bytes a number; the text's D, V, L, I, q and kv; the tower's width, inner."""

    c: int
    D: int
    V: int
    L: int
    I: int  # noqa: E741 short, as the others
    q: int
    kv: int
    width: int
    inner: int
    pixels: int          # of a patch
    depth: int
    deep: int            # layers of the tower that feed the text (DeepStack)

    @classmethod
    def of(cls, config, c):
        """The widths in a config, whose families name them differently."""
        text, vision = config.text_config, config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = getattr(vision, "embed_dim", vision.hidden_size)
        inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio
        return cls(c, text.hidden_size, text.vocab_size, text.num_hidden_layers, text.intermediate_size,
                   head * text.num_attention_heads, head * text.num_key_value_heads, width, inner,
                   3 * vision.temporal_patch_size * vision.patch_size**2, vision.depth,
                   len(getattr(vision, "deepstack_visual_indexes", ())))


def rollouts(s: Sizes, n: Counts, work: Work, heads: int) -> float:
    """Bytes that sampling needs: the whole network, the caches, and the larger of prefill and decoding."""
    rows = work.prompts * work.group
    patches, tokens = work.prompts * work.patches, work.prompts * work.prompt_tokens
    # Room for the longest completion from the start; a prompt's keys and values once.
    cache = 2 * s.L * s.kv * s.c * (tokens + rows * work.completion_tokens)
    inputs = 4 * patches * s.pixels + s.c * tokens * s.D
    layer = s.c * tokens * (5 * s.D + max(3 * s.I, 4 * s.q + 4 * s.kv))
    # Of one token of each row: logits and probabilities in float32, their sums twice in float64; and of
    # all its queries: scores, with the mask, and their softmax.
    decoding = 24 * rows * s.V + 12 * rows * heads * (work.prompt_tokens + work.completion_tokens)
    return s.c * n.whole + inputs + max(vision(s, patches), cache + max(layer, decoding))


def vision(s: Sizes, patches: int, trained=False) -> float:
    """Bytes that one block of the vision tower needs; for its backward pass too, if it is trained."""
    # M-RoPE turns queries and keys in float32.
    turned = 3 * s.c + 16 + (8 if s.c < 4 else 0)
    if trained:
        return patches * max(s.c * (8 * s.width + 5 * s.inner), (6 * s.c + turned) * s.width)
    return patches * (3 * s.c * s.width + max(3 * s.c * s.inner, turned * s.width))


def update(s: Sizes, n: Counts, work: Work, tower_trained: bool, gathered: int) -> float:
    """Bytes that a micro-batch needs above weights and gradients that are kept, with --checkpoint_activations."""
    members = work.micro_batch * (work.group + 1)
    patches = work.micro_batch * work.patches
    tokens = work.micro_batch * work.prompt_tokens + members * work.completion_tokens
    # Each completion gets a copy of its prompt's keys and values.
    repeated = members * (work.prompt_tokens + work.completion_tokens)
    # What enters each block is kept, and the same before and behind all blocks.
    stored = s.c * (s.L + 4) * s.D * tokens + 4 * patches * s.pixels + s.c * s.deep * patches // 4 * s.D
    if tower_trained:
        stored += s.c * s.depth * s.width * patches
    # GroupAttention.make_bias: N * g * T * (P + T) numbers, for all layers.
    bias = s.c * (s.q // s.kv) * work.completion_tokens * repeated
    # One block's own activations at a time: those of its MLP, or of its attention.
    layer = s.c * (tokens * (6 * s.D + 3 * s.q) + 2 * repeated * s.kv
                   + max(6 * s.I * tokens, 4 * repeated * s.kv + 4 * s.q * tokens))
    # Gradients of a block, and once more in float32 for the sum over ranks: the block's before, too.
    layer += (s.c + 2 * 4) * n.block_trained
    head = 12 * min(model.CHUNK, members * work.completion_tokens) * s.V
    if n.root_trained:
        # The gradient in float32; in half precision, a chunk's product is added to it.
        head += (4 if s.c == 4 else 8) * s.V * s.D
        layer += s.c * s.V * s.D
    summed = (s.c + 4) * n.root_trained
    weights = s.c * (n.root + gathered * n.block)
    return weights + stored + bias + max(head, layer, summed, vision(s, patches, tower_trained))


def plan(config, world: int, work: Work, dtype_bytes: int = 2, lora_rank: int = 0, frozen_tower: bool = False,
         cpu_offload: bool = False, on_gpu: bool = True, counts: Counts | None = None) -> dict[str, float]:
    """Bytes on each of `world` GPUs: what is always there; what rollouts and update need above it."""
    n = counts or count(config, lora_rank, frozen_tower)
    s = Sizes.of(config, dtype_bytes)
    heads = config.text_config.num_attention_heads
    # Weight and two moments in float32. LoRA's base stays in the type that it computes in.
    frozen = (dtype_bytes if lora_rank else 4) * (n.whole - n.trained)
    always = 0 if cpu_offload else (12 * n.trained + frozen) / world
    gradients = 0 if cpu_offload else 4 * n.trained / world
    trains_tower = not (lora_rank or frozen_tower)
    # Gathered for the update are the root and a block, and on a GPU already the one after it. For rollouts,
    # the last block is still there as it was received; and gloo, on a CPU, keeps its own copy of it for a while.
    received = 0 if world == 1 else s.c * n.block * (1 if on_gpu else 2)
    return {"always": always, "rollouts": received + rollouts(s, n, work, heads),
            "update": gradients + update(s, n, work, trains_tower, 2 if on_gpu else 1)}


# ---- The machine and the wire --------------------------------------------------------------------


def host(config, lora_rank: int = 0) -> dict[str, float]:
    """Bytes of a machine's memory, over all its processes: files while loading, checkpoints, --cpu_offload."""
    n = count(config, lora_rank)
    # Weights and moments in float32: copied from GPUs, and twice more while safetensors makes the file.
    # The first rank has the whole network in bfloat16, or the adapters in float32, before that.
    written = 4 * n.trained if lora_rank else 2 * n.whole
    frozen = 2 * (n.whole - n.trained) if lora_rank else 0
    return {"loading": 2 * (n.whole - n.trained if lora_rank else n.whole),
            "saving": max(written, 36 * n.trained), "cpu_offload": 16 * n.trained + frozen}


def traffic(config, world: int, dtype_bytes: int = 2, pieces: int = 2, lora_rank: int = 0) -> float:
    """Bytes that each GPU receives in a step: weights once for rollouts and twice for each of
    `pieces` micro-batches (the root once), float32 gradients once for each."""
    n = count(config, lora_rank)
    # No gradient enters a frozen tower, so that its blocks are gathered once.
    once = n.root + (n.tower if lora_rank else 0)
    gathered = dtype_bytes * (n.whole + pieces * (2 * n.whole - once))
    return (gathered + 4 * pieces * n.trained) * (world - 1) / world


# ---- Tables ----------------------------------------------------------------------------------------


def work_of(name: str, world: int, completion_tokens: int = 512) -> Work:
    """A rank's share of the batch, at 840x840 and with about 50 words of text."""
    side = 52 if name.startswith("Qwen3-") else 60
    return Work(PROMPTS // world, 8, side**2 // 4 + 50, side**2, completion_tokens)


def peak(name: str, world: int, lora_rank: int, counts: Counts, max_completion_length=512, cpu_offload=False) -> float:
    """GB that each GPU holds at most."""
    part = plan(config_of(name), world, work_of(name, world, max_completion_length), 2, lora_rank,
                cpu_offload=cpu_offload, counts=counts)
    return (part["always"] + max(part["rollouts"], part["update"])) / 1e9


def fit(name: str, lora_rank: int, counts: Counts, world: int, size: int) -> tuple[str, str]:
    """What a cell says, and the command for it or "" where nothing fits."""
    peaks = [peak(name, world, lora_rank, counts, **way) for way in WAYS]
    launcher = "python" if world == 1 else f"torchrun --nproc_per_node {world}"
    for gigabytes, way in zip(peaks, WAYS):
        if gigabytes > ROOM * size:
            continue
        flags = f" --lora_rank {lora_rank}" if lora_rank else ""
        for key, value in way.items():
            flags += f" --{key}" if value is True else f" --{key} {value}"
        short = ["offload"] * ("cpu_offload" in way) + ["256 tokens"] * ("max_completion_length" in way)
        cell = f"{gigabytes:.0f} with {', '.join(short)}; else {peaks[0]:.0f}" if way else f"{gigabytes:.0f}"
        return cell, f"{launcher} train.py --task grounding --model Qwen/{name}-Instruct{flags}"
    return f"no: {peaks[0]:.0f}, offload {peaks[2]:.0f}", ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, numbers on the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """All tables of docs/many_gpus.md, and a command for each row on the smallest machine that it fits on."""
    gpus, commands, machines = [], [], []
    for name in NETWORKS:
        config = config_of(name)
        for lora_rank, words in ((0, "all weights"), (LORA, "LoRA")):
            counts = count(config, lora_rank)
            cells = [fit(name, lora_rank, counts, *machine) for machine in MACHINES]
            gpus.append([f"{name}, {words}", *(cell for cell, _ in cells)])
            commands += [command for _, command in cells if command][:1]
            numbers = [*host(config, lora_rank).values(), traffic(config, 8, lora_rank=lora_rank)]
            machines.append([f"{name}, {words}", *(f"{number / 1e9:.1f}" for number in numbers)])
    first = table(["GB on each GPU", *(f"{world} x {size} GB" for world, size in MACHINES)], gpus)
    second = table(["GB of the machine", "page cache while loading", "while saving", "always, with `--cpu_offload`",
                    "received by each of 8 GPUs in a step"], machines)
    return f"{first}\n\n```bash\n" + "\n".join(commands) + f"\n```\n\n{second}"


if __name__ == "__main__":
    print(page())
