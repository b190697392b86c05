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
    """A network with 9 million parameters, in bfloat16: enough to see them beside all else."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 4000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    vision = {"depth": 4, "embed_dim": 128, "num_heads": 2, "hidden_size": 256, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **VISION)
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
    # A CPU's tensors are not copied to pinned memory, and adapters are too small to see.
    pinned = 12 * memory.count(config, lora_rank).trained
    if not lora_rank:
        planned["saving"] = (memory.host(config)["saving"] - pinned) / world
    found = ranks.values()
    for part in planned:
        # Of the ranks the least: gloo gives its copies back when it gets to it, sometimes several later.
        measured = min(values[part] for values in found)
        print(f"{part}: {planned[part] / 1e6:.1f} MB by the formula, {measured / 1e6:.1f} measured")
        assert planned[part] == pytest.approx(measured, rel=0.25), part


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_as_many_parameters_as_published(name):
    assert memory.count(memory.config_of(name)).whole / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


def test_the_document_shows_what_the_program_prints():
    pytest.importorskip("peft")
    text = (ROOT / "docs" / "many_gpus.md").read_text()
    shown = text.partition("<!-- memory -->\n")[2].partition("\n<!-- /memory -->")[0]
    assert shown == memory.page()
