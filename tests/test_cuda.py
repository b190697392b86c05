"""What only a GPU can show; all of it skips, saying so, where there is none."""

import pytest
import torch
from test_model import PROMPTS, one

import model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(params=FAMILIES)
def checkpoint(reference, request):
    return reference(request.param)[1]


def test_the_graph_gives_the_eager_steps_tokens(checkpoint):
    """Over several captures: the cache's stretch doubles, and rows leave the batch."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, "cuda")
    network.stop_tokens = [2, 3]
    captured = model.generate(network, PROMPTS, 8, 150)
    eager = model.generate(network, PROMPTS, 8, 150, cuda_graph=False)
    lengths = [len(row.ids) for row in sum(eager, [])]
    assert min(lengths) < 64 < max(lengths)
    for a, b in zip(sum(captured, []), sum(eager, [])):
        assert a.ids.tolist() == b.ids.tolist()


def test_bfloat16_log_probs_of_sampler_and_trainer_agree(checkpoint):
    network = model.load_pretrained(checkpoint, torch.bfloat16, "cuda")
    groups = model.generate(network, PROMPTS, 4, 40)
    ids, mask = model.pad_completions([[row.ids for row in group] for group in groups])
    batch = model.PromptBatch.from_prompts(PROMPTS, network.config, "cuda")
    with torch.no_grad():
        trained = network(batch, ids.cuda(), mask.cuda()).cpu()
    sampled = torch.stack([torch.stack([row.logprobs for row in group]) for group in groups])
    assert (trained - sampled).abs().max() < 2e-2


def test_float32_equals_the_cpu(checkpoint):
    results = []
    for device in ("cpu", "cuda"):
        network = model.load_pretrained(checkpoint, device=device)
        ids, mask = model.pad_completions([[torch.arange(10, 30), torch.arange(30, 35)]])
        batch = model.PromptBatch.from_prompts(PROMPTS[:1], network.config, device)
        logprobs = network(batch, ids.to(device), mask.to(device), expected=mask.to(device).float())
        logprobs.sum().backward()
        gradients = [parameter.grad.cpu() for parameter in network.parameters()]
        results.append((logprobs.detach().cpu(), gradients))
    (expected, their_gradients), (found, our_gradients) = results
    assert torch.allclose(found, expected, atol=1e-4)
    for ours, theirs in zip(our_gradients, their_gradients):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_bfloat16_gradients_of_the_head_are_close_to_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64, device="cuda"), torch.randn(1000, 64, device="cuda") / 8
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight))
        values = model.token_log_probs(h, w, torch.arange(40, device="cuda"), chunk=16)
        values.mean().backward()
        results.append((values.detach(), h.grad.float(), w.grad.float()))
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 1e-2 * exact.norm()
    assert (results[0][0] - results[1][0]).abs().max() < 1e-4, "logits of half-precision factors are float32"


def test_prompts_run_on_flash_attention(checkpoint):
    """The causal pass over prompts asks for nothing that SDPA's flash kernel lacks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    network = model.load_pretrained(checkpoint, torch.bfloat16, "cuda")
    batch = one(PROMPTS[1], network)
    states = model.PromptBatch.from_prompts(PROMPTS[1:2], network.config, "cuda")
    with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert network.prompt_states(states).shape[:2] == batch.ids.shape
