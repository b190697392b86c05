"""How much memory a GPU needs, and what goes over the wire: the table of docs/many_gpus.md.

    python extras/memory.py

Counted are the parts that grow with the network or the batch. The text is Qwen2's: L layers of
width D. tests/test_distributed.py compares `traffic` with what two processes exchange.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

import model


def empty_network(config, dtype=torch.float32) -> model.GroupPolicy:
    """A network of shapes only, without memory: its parameters are on the meta device."""
    with torch.device("meta"):
        return model.GroupPolicy(transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=model.ATTENTION))


def parameters(config) -> tuple[int, int, int]:
    """Parameters of the whole network, of its largest block, and of all that is in no block."""
    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    network = empty_network(config)
    blocks = [count(block) for block in network.modules() if isinstance(block, GradientCheckpointingLayer)]
    return count(network), max(blocks), count(network) - sum(blocks)


def plan(config, world: int, dtype_bytes: int = 2, prompts: int = 2, group: int = 8,
         prompt_tokens: int = 950, image_tokens: int = 900,
         completion_tokens: int = 512) -> dict[str, float]:
    """Bytes on each of `world` GPUs: what is always there; what rollouts and update need above it.

    One group at a time is updated, with --checkpoint_activations. `prompts`: of a rank in a step.
    """
    c, text, vision = dtype_bytes, config.text_config, config.vision_config
    whole, block, root = parameters(config)
    D, V, L = text.hidden_size, text.vocab_size, text.num_hidden_layers
    kv = D // text.num_attention_heads * text.num_key_value_heads
    width = getattr(vision, "embed_dim", vision.hidden_size)
    rows, patches = prompts * group, image_tokens * vision.spatial_merge_size**2
    tokens = prompt_tokens + (group + 1) * completion_tokens
    # Each completion gets a copy of its prompt's keys and values.
    repeated = (group + 1) * (prompt_tokens + completion_tokens)

    # Weights, keys and values, and the float32 logits of one token of each row.
    cache = 2 * L * kv * c * (prompts * prompt_tokens + rows * completion_tokens)
    rollouts = c * whole + cache + 3 * 4 * rows * V

    # What enters each block is kept, and one block's own activations at a time.
    stored = c * (L * D * tokens + vision.depth * width * patches)
    layer = c * (tokens * (8 * D + 5 * text.intermediate_size) + 8 * repeated * kv)
    tower = c * patches * (8 * width + 5 * getattr(vision, "intermediate_size", 4 * width))
    gradients = 4 * whole / world
    # The output head's gradient, and a chunk of logits in float32.
    head = c * V * D + 3 * 4 * model.CHUNK * V
    # Gathered are the root, a block, and the one after it.
    weights = c * (root + 2 * block)
    # The root's gradient, and once more in float32 for the sum over ranks.
    summed = (c + 4) * root
    update = weights + gradients + stored + max(layer + head, tower, summed)
    return {"always": 12 * whole / world, "rollouts": rollouts, "update": update}


def traffic(config, world: int, dtype_bytes: int = 2, pieces: int = 2) -> float:
    """Bytes that each GPU receives in a step: weights once for rollouts and twice for each of
    `pieces` micro-batches (the root once), float32 gradients once for each."""
    whole, _, root = parameters(config)
    gathered = dtype_bytes * (whole + pieces * (2 * whole - root))
    return (gathered + 4 * pieces * whole) * (world - 1) / world


def config_of(size: str):
    """The shapes of Qwen2-VL-2B and Qwen2.5-VL-7B, as published."""
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24],
            "rope_theta": 1e6}
    if size == "Qwen2-VL-2B":
        text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936}
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}
        return transformers.Qwen2VLConfig(text_config=text | {"rope_parameters": rope},
                                          vision_config=vision, tie_word_embeddings=True)
    text = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
              "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope},
                                         vision_config=vision, tie_word_embeddings=False)


def main():
    print("| GB on each GPU | GPUs | always | + rollouts | + update | peak | received a step |\n"
          "|---|---:|---:|---:|---:|---:|---:|")
    for size in ("Qwen2-VL-2B", "Qwen2.5-VL-7B"):
        config = config_of(size)
        for world in (1, 2, 4, 8):
            prompts = 16 // world
            part = plan(config, world, prompts=prompts)
            peak = part["always"] + max(part["rollouts"], part["update"])
            received = traffic(config, world, pieces=prompts)
            cells = (part["always"], part["rollouts"], part["update"], peak, received)
            print(f"| {size} | {world} | " + " | ".join(f"{x / 1e9:.0f}" for x in cells) + " |")


if __name__ == "__main__":
    main()
