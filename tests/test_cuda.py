"""What GPUs do otherwise than a CPU. Where only the choice of a kernel or the layout of tensors matters, a pretended
GPU serves too; where rounding matters, tests skip without a real one."""

import pytest
import torch
from conftest import FAMILIES
from pretended_gpu import pretended_gpu
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


@pytest.fixture(params=["real", "pretended"])
def gpu(request):
    if request.param == "pretended":
        with pretended_gpu() as device:
            yield device
    elif torch.cuda.is_available():
        yield torch.device(DEVICE)
    else:
        pytest.skip("no CUDA device")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_run_on_the_memory_efficient_kernel(gpu, dtype):
    """Their attention asks for nothing that would materialise all scores, and reads the kernel's layout rightly."""
    heads = random_heads(dtype, gpu)
    group = model.GroupAttention(LENGTHS.to(gpu), int(LENGTHS.max()), REAL.to(gpu))
    attend = group.attend_completions

    def attend_on_that_kernel(*args):
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
            return attend(*args)

    group.attend_completions = attend_on_that_kernel
    found = group(0, *heads)  # (S, H, E)
    found.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in heads)

    mask, real = plain_mask()
    q, k, v = (x.detach().float().cpu()[None] for x in heads)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected = expected[0].transpose(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.detach().float().cpu()[real], expected[real], atol=tolerance)


def test_a_training_pass_needs_no_plain_attention(checkpoint, gpu):
    """Prompts and images run on the flash kernel, completions on the memory-efficient one: none is left for `math`."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, gpu)
    ids, mask = model.pad_completions([[torch.arange(10, 30), torch.arange(30, 35)]] * 2)
    batch = model.PromptBatch.from_prompts(PROMPTS[:2], network.config, gpu)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        network(batch, ids.to(gpu), mask.to(gpu)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_float32_equals_the_cpu(checkpoint, gpu):
    """Log-probs within 1e-4, and each parameter's gradient within 1e-4 of its norm."""
    results = []
    for device in ("cpu", gpu):
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


def test_bfloat16_gradients_of_the_head_are_close_to_float32(monkeypatch, gpu):
    """Over 80 chunks, from the same rounded factors: logits, and the sum over chunks, are float32 in both types."""
    monkeypatch.setattr(model, "CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1280, 64, generator=generator).bfloat16().to(gpu)
    weight = (torch.randn(200, 64, generator=generator) / 8).bfloat16().to(gpu)
    targets = torch.randint(100, (1280,), generator=generator).to(gpu)
    forbidden = torch.tensor([150, 199], device=gpu)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        h = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.to(dtype, copy=True).requires_grad_()
        values = model.TokenLogProbs.apply(h, w, targets, 1.0, forbidden)
        values.mean().backward()
        results.append((values.detach(), h.grad.float(), w.grad.float()))
    (values, *gradients), (rounded_values, *rounded_gradients) = results
    assert (values - rounded_values).abs().max() < 1e-4
    for exact, rounded in zip(gradients, rounded_gradients):
        assert (exact - rounded).norm() < 4e-3 * exact.norm()


@on_a_gpu
def test_the_graph_computes_the_eager_step(checkpoint):
    """On the same tokens, up to rounding: a graph reads all 150 slots, an eager step only those that are filled."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, DEVICE)
    tokens = torch.randint(10, 180, (150, 2 * len(PROMPTS)), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        captured = model.Decoder(network, PROMPTS, 2, 150, cuda_graph=True)
        eager = model.Decoder(network, PROMPTS, 2, 150, cuda_graph=False)
        captured.prefill()
        eager.prefill()
        for t in range(150):
            expected = eager.step(tokens[t])
            assert (captured.step(tokens[t]) - expected).norm() < 3e-2 * expected.norm()


@on_a_gpu
def test_bfloat16_log_probs_of_sampler_and_trainer_agree(checkpoint):
    """Within 4e-2 at every token, with rows that finish early."""
    network = model.load_pretrained(checkpoint, torch.bfloat16, DEVICE)
    network.stop_tokens = [2, 3]
    groups = model.generate(network, PROMPTS, 4, 150)
    ids, mask = model.pad_completions([[row.ids for row in group] for group in groups])
    batch = model.PromptBatch.from_prompts(PROMPTS, network.config, DEVICE)
    with torch.no_grad():
        trained = network(batch, ids.to(DEVICE), mask.to(DEVICE)).cpu()
    sampled = torch.cat([row.logprobs for row in sum(groups, [])])
    assert (trained[mask] - sampled).abs().max() < 4e-2
