"""extras/memory.py: its formulas beside what processes on a CPU allocate, and the tables of docs/many_gpus.md."""

import pytest
import torch
import transformers
from conftest import ROOT, VISION
from processes import Ranks

import memory

PUBLISHED = {"Qwen2-VL-2B": 2.21, "Qwen2.5-VL-3B": 3.75, "Qwen2.5-VL-7B": 8.29,
             "Qwen3-VL-2B": 2.13, "Qwen3-VL-4B": 4.44, "Qwen3-VL-8B": 8.77}
# Prompts, rollouts of each, and tokens of a prompt, patches, tokens of a completion. Weights weigh most in the
# first, completions and their biases in the second, the image in the third.
WORK = {"weights": (2, 2, 30, 64, 8), "completions": (2, 7, 60, 144, 96), "image": (2, 2, 500, 1936, 8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with 8 million parameters, in bfloat16: enough to see them beside all else."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 4000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    vision = {"depth": 4, "embed_dim": 128, "num_heads": 2, "hidden_size": 256, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **VISION)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network")
    transformers.AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(path)
    return config, path


# Each process with both ways to train, and each kind of work.
CASES = [(1, 0, "completions"), (2, 0, "weights"), (1, 16, "image"), (2, 16, "completions")]


@pytest.mark.parametrize("world, lora_rank, work", CASES)
def test_formulas_agree_with_what_is_allocated(checkpoint, tmp_path, world, lora_rank, work):
    """Within a quarter, in float32, as a CPU computes; and what a checkpoint adds to each process."""
    if lora_rank:
        pytest.importorskip("peft")
    config, path = checkpoint
    ranks = Ranks(world, tmp_path, "ranks:memory_of_parts", str(path), WORK[work], str(tmp_path),
                  "--lora_rank", lora_rank)
    planned = memory.plan(config, world, memory.Work(*WORK[work]), 4, lora_rank, on_gpu=False)
    for measured in ranks.values():
        saving = measured.pop("saving")
        for part, size in measured.items():
            print(f"{work}, {world} processes, LoRA {lora_rank}: {part} {planned[part] / 1e6:.1f} / {size / 1e6:.1f}")
            assert planned[part] == pytest.approx(size, rel=0.25), part
        # Adapters are too small to see. A CPU's tensors are not copied to pinned memory.
        expected = (memory.host(config, lora_rank)["saving"] - 12 * memory.count(config).trained) / world
        print(f"saving {expected / 1e6:.1f} / {saving / 1e6:.1f}")
        assert lora_rank or saving == pytest.approx(expected, rel=0.25)
