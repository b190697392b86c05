"""The algorithm: the paper's worked numbers, each control alone, the loss against loops, Eq. 9 on a real network."""

import doctest
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_prompt

import model
import visurf


def test_the_docstrings_examples():
    assert doctest.testmod(visurf).attempted > 8 and doctest.testmod(visurf).failed == 0


def test_the_file_alone_runs_and_prints_the_worked_group(tmp_path):
    shutil.copy(ROOT / "visurf.py", tmp_path)
    run = subprocess.run([sys.executable, "visurf.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr
    assert "advantages, label last          0.554  -0.830  -0.369  -0.830   1.476" in run.stdout


# ---- Advantages and the three controls -------------------------------------------------------------------------------


def test_worked_numbers():
    label = {"thinking": 1.0, "format": 2.0, "accuracy": 2.0}
    advantages = visurf.visurf_advantages(torch.zeros(8, dtype=torch.float64), label)
    assert advantages[-1].item() == pytest.approx(8 / 3, abs=1e-5)
    assert advantages[:-1].tolist() == pytest.approx([-1 / 3] * 8, abs=1e-5)
    rewards = torch.tensor([3.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    assert visurf.smooth_label_reward(rewards, torch.tensor(3.0, dtype=torch.float64)).item() == 1.5
    assert visurf.visurf_advantages(rewards, {"accuracy": 3.0})[-1].item() == 0


def test_each_control_changes_what_it_should_and_nothing_else():
    rollouts = torch.tensor([[4.0, 1.0, 2.0], [0.0, 1.0, 0.0]], dtype=torch.float64)  # the first prompt is solved
    label = {"thinking": torch.ones(2), "format": torch.tensor([2.0, 2.0]), "accuracy": torch.tensor([1.0, 1.0])}
    join = lambda reward: torch.cat([rollouts, torch.tensor(reward, dtype=torch.float64)[:, None]], dim=1)
    plain = lambda reward: visurf.group_advantages(join(reward))
    call = lambda **switches: visurf.visurf_advantages(rollouts, label, **switches)
    assert torch.equal(call(drop_thinking=False, smooth=False), plain([4.0, 4.0]))
    assert torch.equal(call(drop_thinking=True, smooth=False), plain([3.0, 3.0]))
    assert torch.equal(call(drop_thinking=False, smooth=True), plain([7 / 3, 4.0]))  # 4 >= 4: smoothed
    assert torch.equal(call(drop_thinking=True, smooth=True), plain([7 / 3, 3.0]))
    assert call()[0, -1].abs() < 1e-12 and call()[1, -1] > 1
    with pytest.raises(ValueError, match="total"):
        visurf.label_reward({"format": 1.0, "total": 1.0})


def test_advantages_are_the_standard_score_with_the_sample_deviation():
    rewards = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for group, advantages in zip(rewards.tolist(), visurf.group_advantages(rewards).tolist()):
        mean = sum(group) / 7
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 6)
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in group], abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.0, 1e6])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_group_of_equal_rewards_has_advantages_exactly_zero(value, size):
    """The mean of equal numbers is off by rounding (try 0.1 three times): divided by eps that would be a signal."""
    for dtype in (torch.float32, torch.float64):
        assert (visurf.group_advantages(torch.full((3, size), value, dtype=dtype)) == 0).all()


def test_inputs_are_left_alone():
    rewards, label = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    visurf.smooth_label_reward(rewards, label), visurf.group_advantages(visurf.inject_label(rewards, label))
    assert rewards.tolist() == [1.0, 2.0] and label.item() == 0.5


# ---- The loss --------------------------------------------------------------------------------------------------------


def random_group(seed=0):
    """log-probs of two policies (B, N, T), advantages (B, N) and a mask with completions of different length."""
    torch.manual_seed(seed)
    old = -3 * torch.rand(2, 3, 5, dtype=torch.float64)
    new = old + 0.4 * torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5, 2, 3], [1, 4, 5]])[..., None]
    return new.requires_grad_(), old, torch.randn(2, 3, dtype=torch.float64), mask


def loss_by_loops(new, old, A, mask, low, high, ratio, average):
    """Eq. 8 for one completion after another, in plain Python."""
    per_sequence, tokens = [], 0
    for b in range(2):
        for n in range(3):
            steps = [t for t in range(5) if mask[b, n, t]]
            logs = [(new[b, n, t] - old[b, n, t]).item() for t in steps]
            if ratio == "sequence":
                logs = [sum(logs) / len(logs)] * len(logs)
            a = A[b, n].item()
            terms = [min(math.exp(x) * a, min(max(math.exp(x), 1 - low), 1 + high) * a) for x in logs]
            per_sequence.append(sum(terms) if average == "token" else sum(terms) / len(terms))
            tokens += len(terms)
    return -sum(per_sequence) / (tokens if average == "token" else 6)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_policy_loss_against_loops_and_finite_differences(ratio, average):
    new, old, A, mask = random_group()
    loss = lambda logprobs: visurf.policy_loss(logprobs, old, A, mask, 0.2, 0.3, ratio, average)[0]
    assert loss(new).item() == pytest.approx(loss_by_loops(new, old, A, mask, 0.2, 0.3, ratio, average), abs=1e-12)
    assert torch.autograd.gradcheck(loss, new)


def test_clipping_stops_the_gradient_on_the_right_side_only():
    log_ratio = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]])).requires_grad_()
    A, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1, dtype=torch.bool)
    loss, stats = visurf.policy_loss(log_ratio, torch.zeros(4, 1), A, mask)
    loss.backward()
    assert (log_ratio.grad[:, 0] == 0).tolist() == [True, False, False, True]
    assert stats["clipped"].item() == 0.5 and stats["kl"].item() > 0


def test_padding_may_hold_anything():
    new, old, A, mask = random_group()
    clean = visurf.policy_loss(new, old, A, mask)[0]
    dirty = visurf.policy_loss(torch.where(mask, new, -torch.inf), torch.where(mask, old, torch.nan), A, mask)[0]
    assert torch.equal(clean, dirty)
    assert torch.equal(visurf.sft_loss(torch.where(mask, new, torch.nan), mask), visurf.sft_loss(new, mask))


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_pieces_add_up_to_the_whole(average):
    """With the batch's totals passed in, micro-batches give the same loss however the batch is cut."""
    new, old, A, mask = random_group()
    total = mask.sum() if average == "token" else A.numel()
    whole = visurf.policy_loss(new, old, A, mask, average=average)[0]
    pieces = [visurf.policy_loss(new[i], old[i], A[i], mask[i], average=average, total=total)[0] for i in range(2)]
    assert sum(pieces).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("call", [lambda x, m: visurf.policy_loss(x, x, x[..., 0], m, ratio="word"),
                                  lambda x, m: visurf.sft_loss(x, m, average="word")])
def test_unknown_settings_are_refused(call):
    with pytest.raises(ValueError, match="'word'"):
        call(torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool))


# ---- On a real network -----------------------------------------------------------------------------------------------


@pytest.fixture
def group(reference):
    """A tiny network, two prompts, and for each three rollouts and a label last: (B, N = 4, T) ids and mask."""
    network = model.load_pretrained(reference("qwen2_vl")[1])
    prompts = [random_prompt([(8, 8)], 4, seed=1), random_prompt([(4, 8)], 6, seed=2)]
    rollouts = model.generate(network, prompts, 3, 10)
    labels = [torch.arange(20, 27), torch.arange(30, 42)]
    ids, mask = model.pad_completions([[c.ids for c in group] + [y] for group, y in zip(rollouts, labels)])
    return network, model.PromptBatch.from_prompts(prompts, network.config), ids, mask


def gradient(network, loss) -> torch.Tensor:
    network.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in network.parameters()])


def test_gradient_is_reinforcement_plus_weighted_supervision(group):
    """Eq. 9: the ViSurf gradient is the rollouts' term plus A_y times the gradient of supervised fine-tuning."""
    network, batch, ids, mask = group
    rewards = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    A = visurf.visurf_advantages(rewards, {"format": torch.full((2,), 4.0)})  # (B, 4), the label last
    total = mask.sum()
    logprobs = network(batch, ids, mask)
    whole = gradient(network, visurf.policy_loss(logprobs, logprobs.detach(), A, mask)[0])
    logprobs = network(batch, ids[:, :3], mask[:, :3])
    reinforcement = visurf.policy_loss(logprobs, logprobs.detach(), A[:, :3], mask[:, :3], total=total)[0]
    expected = gradient(network, reinforcement)
    for b in range(2):
        keep = mask[:, 3:] & (torch.arange(2) == b)[:, None, None]
        expected += A[b, 3] * gradient(network, visurf.sft_loss(network(batch, ids[:, 3:], keep), keep, total=total))
    assert (whole - expected).norm() / expected.norm() < 1e-5


def test_with_every_label_smoothed_it_is_the_rlvr_gradient(group):
    """Up to one scale: the deviation over G + 1 members, one of them the mean, and the mean over one more member."""
    network, batch, ids, mask = group
    rewards = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    A = visurf.visurf_advantages(rewards, {"format": torch.full((2,), 2.0)})
    assert A[:, 3].abs().max() < 1e-12
    logprobs = network(batch, ids, mask)
    ours = gradient(network, visurf.policy_loss(logprobs, logprobs.detach(), A, mask, average="sequence")[0])
    logprobs = network(batch, ids[:, :3], mask[:, :3])
    A = visurf.group_advantages(rewards)
    rlvr = visurf.policy_loss(logprobs, logprobs.detach(), A, mask[:, :3], average="sequence")
    expected = gradient(network, rlvr[0]) * math.sqrt(3 / 2) * 3 / 4
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_a_group_of_equal_rewards_leaves_every_gradient_exactly_zero(group):
    network, batch, ids, mask = group
    A = visurf.group_advantages(torch.full((2, 4), 0.1, dtype=torch.float64))
    logprobs = network(batch, ids, mask)
    assert (gradient(network, visurf.policy_loss(logprobs, logprobs.detach(), A, mask)[0]) == 0).all()
