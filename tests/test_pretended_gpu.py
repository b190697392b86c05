"""What runs on CUDA alone, on a pretended GPU (pretended_gpu.py says what that cannot see): in bfloat16, one family."""

import copy
import os

import pytest
import ranks
import torch
from pretended_gpu import Seen, pretended_gpu
from safetensors.torch import load_file
from test_model import PROMPTS

import model
import train

# Of the CPU for the GPU, transformers' own included: in a pass over four prompts (4 are for the pixels of each), and in
# sampling 150 tokens (19 are to ask, every 8 tokens, whether all have finished). More layers must not mean more waits.
WAITS = 22
SAMPLING_WAITS = 44


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


def train_pass(network, rollouts, device):
    """Log-probs (tokens,) of rollouts of PROMPTS, and the parameters' gradients."""
    ids, mask = model.pad_completions([[rollout.ids for rollout in group] for group in rollouts])
    ids = ids.to(device)
    mask = mask.to(device)
    network.zero_grad()
    Seen.waits.clear()
    batch = model.PromptBatch.from_prompts(PROMPTS, network.config, device)
    logprobs = network(batch, ids, mask)
    logprobs.sum().backward()
    assert Seen.waits.total() <= WAITS, Seen.waits
    return logprobs.detach()[mask].cpu(), [parameter.grad.cpu() for parameter in network.parameters()]


def test_sampling_and_training_on_a_gpu(reference, gpu):
    """Captured steps find the log-probs of the trainer, on fused kernels, and no layer waits for the GPU."""
    network = model.load_pretrained(reference("qwen2_vl")[1], torch.bfloat16, gpu)
    network.stop_tokens = [2, 3]
    Seen.waits.clear()
    rollouts = model.generate(network, PROMPTS, 4, 150)
    assert Seen.waits.total() <= SAMPLING_WAITS, Seen.waits
    assert len(Seen.graphs) == 1
    sampled = torch.cat([rollout.logprobs for group in rollouts for rollout in group])
    logprobs, gradients = train_pass(network, rollouts, gpu)
    assert (logprobs - sampled).abs().max() < 4e-2
    assert all(gradient.isfinite().all() for gradient in gradients)

    network.vlm.activation_checkpointing_enable({"use_reentrant": False})
    network.train()
    again, recomputed = train_pass(network, rollouts, gpu)
    assert torch.equal(logprobs, again) and all(map(torch.equal, gradients, recomputed))
    assert set(Seen.kernels) == {"flash", "efficient"}

    # Twice as deep.
    for tower in (network.vlm.model.visual.blocks, network.vlm.model.language_model.layers):
        tower.extend(copy.deepcopy(tower))
    network.config.text_config.layer_types *= 2
    train_pass(network, rollouts, gpu)


def test_a_run_on_a_gpu(tmp_path, gpu, monkeypatch):
    """FSDP2 with float32 shards and a bfloat16 sampler: after --resume, the second step is the same to the bit."""
    flags = ["--output_dir", str(tmp_path), "--batch_size", "2", "--num_generations", "3", "--max_steps", "2",
             "--max_completion_length", "70", "--save_steps", "1", "--keep", "2"]
    save = train.save

    def check_and_save(run):
        assert ranks.dtypes_of(run) == {torch.float32}
        with train.gathered(run) as network:
            assert {(weight.device, weight.dtype) for weight in network.parameters()} == {(gpu, torch.bfloat16)}
        save(run)

    monkeypatch.setattr(train, "save", check_and_save)
    train.main(flags)
    os.rename(tmp_path / "checkpoint-2", tmp_path / "uninterrupted")
    train.main([*flags, "--resume"])
    for file in (tmp_path / "uninterrupted").rglob("*.safetensors"):
        expected = load_file(file)
        found = load_file(tmp_path / "checkpoint-2" / file.relative_to(tmp_path / "uninterrupted"))
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert set(Seen.kernels) == {"flash", "efficient"} and Seen.graphs


def test_the_pretended_gpu_minds_what_a_gpu_minds(gpu):
    """Two devices in one operation, waits, and graphs of tensors that are replaced."""
    x = torch.arange(4, device=gpu)
    with pytest.raises(RuntimeError, match="on cuda and cpu at test_pretended_gpu.py"):
        x + torch.arange(4)
    for wait in (x.tolist, x.cpu, x.sum().item, x.nonzero, lambda: x[x > 2], lambda: torch.tensor(1, device=gpu)):
        Seen.waits.clear()
        wait()
        assert Seen.waits.total() == 1
    with pytest.raises(RuntimeError, match="while a graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    counter = torch.zeros(1, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = counter * 2
        counter += 1
    assert doubled.isnan() and counter == 0, "a capture computes nothing"
    graph.replay()
    assert doubled == 0 and counter == 1
    counter = counter + 5
    graph.replay()
    assert doubled == 2 and counter == 6, "a graph has the tensors of its capture"
