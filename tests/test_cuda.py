"""What only a GPU can show: those tests skip, saying so, where there is none. The attention that GPUs run is tested
on a CPU too, against a plain mask over the whole sequence."""

import pytest
import torch
from conftest import FAMILIES
from test_model import PROMPTS
from torch.nn.attention import SDPBackend, sdpa_kernel

import model

DEVICE = "cuda"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Two prompts of 7 and 4 tokens, with three completions each: shapes (B, N, T).
LENGTHS = torch.tensor([7, 4])
REAL = torch.arange(5) < torch.tensor([[5, 2, 1], [3, 5, 4]])[..., None]


@pytest.fixture(params=FAMILIES)
def checkpoint(reference, request):
    return reference(request.param)[1]


def random_heads(dtype=torch.float32, device="cpu", E: int = 16) -> list[torch.Tensor]:
    """Queries (4, S, E), keys and values (2, S, E) of the flat sequence of LENGTHS and REAL."""
    generator = torch.Generator().manual_seed(0)
    S = len(LENGTHS) * int(LENGTHS.max()) + int(REAL.sum())
    heads = [torch.randn(count, S, E, generator=generator) for count in (4, 2, 2)]
    return [x.to(device, dtype).requires_grad_() for x in heads]


def plain_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """The picture at the head of model.py, token by token: (S, S) True = may be seen, and (S,) True = real token."""
    tokens = []  # (prompt, completion or None, place, is it real)
    for b, length in enumerate(LENGTHS.tolist()):
        tokens += [(b, None, p, p < length) for p in range(int(LENGTHS.max()))]
    for b, n, t in REAL.nonzero().tolist():
        tokens.append((b, n, t, True))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (b, n, place, _) in enumerate(tokens):
        for j, (seen_b, seen_n, seen_place, is_real) in enumerate(tokens):
            own = seen_n == n and seen_place <= place
            prompt = seen_n is None and n is not None and is_real
            mask[i, j] = seen_b == b and (own or prompt)
    return mask, torch.tensor([is_real for *_, is_real in tokens])


def test_group_attention_equals_a_plain_mask_with_shared_heads():
    """Query heads laid along the query axis, and copies of a prompt's keys, change neither outputs nor gradients."""
    mask, real = plain_mask()
    ours = random_heads()
    theirs = random_heads()
    found = model.GroupAttention(LENGTHS, int(LENGTHS.max()), REAL)(0, *ours)  # (S, H, E)
    q, k, v = (x[None] for x in theirs)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected = expected[0].transpose(0, 1)  # (S, H, E)
    assert torch.allclose(found[real], expected[real], atol=1e-6)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * real[:, None, None]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_run_on_the_memory_efficient_kernel(monkeypatch, dtype):
    """Their attention, forward and backward, asks for nothing that would materialise all scores."""
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def noted(*args, **more):
        calls.append((args, more))
        return attention(*args, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    heads = random_heads(dtype, DEVICE)
    found = model.GroupAttention(LENGTHS.to(DEVICE), int(LENGTHS.max()), REAL.to(DEVICE))(0, *heads)
    _, (args, more) = calls  # the prompts', then the completions'
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        output = attention(*args, **more)
        output.float().sum().backward()
    assert output.isfinite().all() and all(x.grad.isfinite().all() for x in heads)

    mask, real = plain_mask()
    q, k, v = (x.detach().float().cpu()[None] for x in heads)
    expected = attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.detach().float().cpu()[real], expected[real], atol=tolerance)


@on_a_gpu
def test_a_training_pass_needs_no_plain_attention(checkpoint):
    """Prompts and images run on the flash kernel, completions on the memory-efficient one: none is left for `math`."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, DEVICE)
    ids, mask = model.pad_completions([[torch.arange(10, 30), torch.arange(30, 35)]] * 2)
    batch = model.PromptBatch.from_prompts(PROMPTS[:2], network.config, DEVICE)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        network(batch, ids.to(DEVICE), mask.to(DEVICE)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@on_a_gpu
def test_the_graph_gives_the_eager_steps_tokens(checkpoint):
    """Over several captures, for the cache's stretch doubles, and with rows that finish early."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, DEVICE)
    network.stop_tokens = [2, 3]
    captured = sum(model.generate(network, PROMPTS, 8, 150), [])
    eager = sum(model.generate(network, PROMPTS, 8, 150, cuda_graph=False), [])
    lengths = [len(row.ids) for row in eager]
    assert min(lengths) < 64 < max(lengths)
    for a, b in zip(captured, eager):
        assert a.ids.tolist() == b.ids.tolist()


@on_a_gpu
def test_bfloat16_log_probs_of_sampler_and_trainer_agree(checkpoint):
    """Within 2e-2, at every token."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, DEVICE)
    groups = model.generate(network, PROMPTS, 4, 40)
    ids, mask = model.pad_completions([[row.ids for row in group] for group in groups])
    batch = model.PromptBatch.from_prompts(PROMPTS, network.config, DEVICE)
    with torch.no_grad():
        trained = network(batch, ids.to(DEVICE), mask.to(DEVICE)).cpu()
    sampled = torch.cat([row.logprobs for row in sum(groups, [])])
    assert (trained[mask] - sampled).abs().max() < 2e-2


@on_a_gpu
def test_float32_equals_the_cpu(checkpoint):
    """Log-probs within 1e-4, and each parameter's gradient within 1e-4 of its norm."""
    results = []
    for device in ("cpu", DEVICE):
        network = model.load_pretrained(checkpoint, device=device)
        ids, mask = model.pad_completions([[torch.arange(10, 30), torch.arange(30, 35)]])
        batch = model.PromptBatch.from_prompts(PROMPTS[:1], network.config, device)
        logprobs = network(batch, ids.to(device), mask.to(device))
        logprobs.sum().backward()
        gradients = [parameter.grad.cpu() for parameter in network.parameters()]
        results.append((logprobs.detach().cpu(), gradients))
    (expected, their_gradients), (found, our_gradients) = results
    assert torch.allclose(found, expected, atol=1e-4)
    # Key biases have no gradient but rounding: softmax does not see what is added to all keys.
    norm = torch.nn.utils.get_total_norm(their_gradients)
    for ours, theirs in zip(our_gradients, their_gradients):
        assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm(), 0.01 * norm)


@on_a_gpu
def test_bfloat16_gradients_of_the_head_are_close_to_float32(monkeypatch):
    """The same rounded factors in both types: logits are float32 in either, and gradients are rounded once a chunk."""
    monkeypatch.setattr(model, "CHUNK", 16)
    torch.manual_seed(0)
    hidden = torch.randn(40, 64, device=DEVICE).bfloat16()
    weight = (torch.randn(1000, 64, device=DEVICE) / 8).bfloat16()
    targets = torch.arange(40, device=DEVICE)
    forbidden = torch.tensor([500, 999], device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        h = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.to(dtype, copy=True).requires_grad_()
        values = model.TokenLogProbs.apply(h, w, targets, 1.0, forbidden)
        values.mean().backward()
        results.append((values.detach(), h.grad.float(), w.grad.float()))
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 1e-2 * exact.norm()
    assert (results[0][0] - results[1][0]).abs().max() < 1e-4, "logits of half-precision factors are float32"
