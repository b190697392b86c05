"""The method: the paper's worked numbers, each control alone, the losses against loops and autograd, Eq. 9."""

import json
import math
import random
import statistics
from collections import Counter

import pytest
import torch
from conftest import ROOT

import visurf
from visurf import STYLES, align_label, preferred_style, style_of, visurf_advantages

TWO = [{"bbox_2d": [1, 2, 30, 44], "point_2d": [5, -6]}, {"bbox_2d": [7, 8, 90, 100], "point_2d": [11, 12]}]


# ---- Control 1: the label's style --------------------------------------------------------------

# Written by hand and by json alone, not by this project.
WRITTEN = {
    "spaced": json.dumps(TWO),
    "compact": '[{"bbox_2d":[1,2,30,44],"point_2d":[5,-6]},{"bbox_2d":[7,8,90,100],"point_2d":[11,12]}]',
    "indented": json.dumps(TWO, indent=2),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_recognised_and_written(style):
    assert set(WRITTEN) == set(STYLES)
    assert style_of(WRITTEN[style]) == style
    assert align_label(TWO, style) == f"<answer>{WRITTEN[style]}</answer>"
    for objects in (TWO[:1], TWO, TWO + TWO, [{"point_2d": [3, 4]}], [{"bbox_2d": [1, 2, 3, 4]}]):
        text = align_label(objects, style).removeprefix("<answer>").removesuffix("</answer>")
        assert json.loads(text) == objects and style_of(text) == style


def test_key_order_numbers_and_other_fields_do_not_matter():
    for answer in ([{"point_2d": [1, 2], "bbox_2d": [1, 2, 3, 4]}], [{"bbox_2d": [1.5, 2.0, 3, 4]}],
                   [{"label": "a dog, 1, 2", "score": 0.9, "seen": True, "bbox_2d": [1, 2, 3, 4]}]):
        assert style_of(json.dumps(answer)) == "spaced"
        assert style_of(json.dumps(answer, separators=(",", ":"))) == "compact"


def test_only_an_answer_that_one_style_writes_has_a_vote():
    for text in ("", "[]", "\n[]\n", "24", "a dog", '[{"a": NaN}]', '[{"a": -Infinity}]', "[{", '[{"a": 1e999}]',
                 '[{"point_2d": [1,  2]}]', '[{"point_2d": [1, 2]} ]', ' [{"point_2d": [1, 2]}]', '[{"point_2d": [01, 2]}]',
                 '[{"a": 1, "a": 2}]', "[" * 20_000, "[" * 900 + "]" * 900, '{"a":' * 4000, "9" * 6000, "[" + "9" * 6000 + "]",
                 '[{"point_2d": [1, 2]}' + " " * 22_000 + "]", "\ud800", "\0", '["\ud800"'):
        assert style_of(text) is None, text[:40]


def test_hostile_answers_never_raise():
    rng = random.Random(0)
    parts = [*'[]{}",: \n\t.-+eE019', '"bbox_2d"', "[1, 2]", "NaN", "true", "\\ud800", "\ud800", "\0", "[" * 200, '{"a":' * 200]
    for _ in range(20_000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 20)))
        assert style_of(text) in {None, *STYLES}
    assert style_of(json.dumps(TWO * 60, indent=2)) == "indented"


def test_the_majority_writes_the_label():
    votes = Counter(map(style_of, [WRITTEN["compact"], WRITTEN["indented"], "[]", "a dog", "", WRITTEN["compact"]]))
    assert votes[None] == 3 and preferred_style(votes) == "compact"
    assert preferred_style(Counter({"indented": 2, "compact": 2, "spaced": 1})) == "compact", "the earlier in STYLES"
    assert preferred_style(Counter()) == preferred_style(Counter({None: 9, "gone": 9})) == "spaced"


def test_an_answer_in_words_stays_as_it_is():
    for style in STYLES:
        assert align_label(r"\frac{1}{2}, 3", style) == r"<answer>\frac{1}{2}, 3</answer>"


def test_the_authors_labels_are_spaced():
    parquet = pytest.importorskip("pyarrow.parquet")
    source = ROOT.parent / "shared" / "data" / "parquet" / "train" / "data"
    if not source.exists():
        pytest.skip("../shared/data is not here")
    for solution in parquet.read_table(source)["solution"].to_pylist():
        assert style_of(solution) == "spaced"
        assert align_label(json.loads(solution), "spaced") == f"<answer>{solution}</answer>"


# ---- Controls 2 and 3, and advantages ----------------------------------------------------------


def test_worked_numbers():
    label = {"thinking": 0.0, "format": 2.0, "accuracy": 2.0}
    advantages = visurf_advantages(torch.zeros(8, dtype=torch.float64), label)
    assert advantages[-1].item() == pytest.approx(8 / 3, abs=1e-5)
    assert advantages[:-1].tolist() == pytest.approx([-1 / 3] * 8, abs=1e-5)
    rewards = torch.tensor([3.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    assert visurf.smooth_if_matched(torch.tensor(3.0, dtype=torch.float64), rewards).item() == 1.5
    assert visurf_advantages(rewards, {"accuracy": 3.0})[-1].item() == 0
    for rewards, expected in (([3.0, 0.0, 1.0, 0.0], [0.554, -0.830, -0.369, -0.830, 1.476]),
                              ([3.0, 5.0, 1.0, 0.0], [0.391, 1.432, -0.651, -1.172, 0.0])):
        advantages = visurf_advantages(torch.tensor(rewards), {"format": 2.0, "accuracy": 3.0})
        assert advantages.tolist() == pytest.approx(expected, abs=1e-3)


def test_each_control_changes_what_it_should_and_nothing_else():
    rollouts = torch.tensor([[4.0, 1.0, 2.0], [0.0, 1.0, 0.0]], dtype=torch.float64)     # the first prompt is solved
    label = {"thinking": torch.zeros(2), "format": torch.tensor([2.0, 2.0]), "accuracy": torch.tensor([1.0, 1.0])}

    def plain(*rewards):
        return visurf.group_advantages(torch.cat([rollouts, torch.tensor(rewards, dtype=torch.float64)[:, None]], 1))

    def call(**switches):
        return visurf_advantages(rollouts, label, **switches)

    assert torch.equal(call(drop_thinking_reward=False, smooth_label_reward=False), plain(4.0, 4.0))
    assert torch.equal(call(drop_thinking_reward=True, smooth_label_reward=False), plain(3.0, 3.0))
    assert torch.equal(call(drop_thinking_reward=False, smooth_label_reward=True), plain(7 / 3, 4.0))       # 4 >= 4: smoothed
    assert torch.equal(call(drop_thinking_reward=True, smooth_label_reward=True), plain(7 / 3, 3.0))
    assert torch.equal(call(), call(drop_thinking_reward=True, smooth_label_reward=True))
    assert call()[0, -1] == 0 and call()[1, -1] > 1


def test_thinking_is_credited_in_full_or_not_at_all():
    """Whatever the label scored for it; and only if the task has such a component."""
    for scored in (0.0, 0.4, 1.0):
        components = {"thinking": scored, "format": 2.0}
        assert visurf.label_reward(components).item() == 2.0
        assert visurf.label_reward(components, credit_thinking=True).item() == 3.0
    assert visurf.label_reward({"format": 2.0}, credit_thinking=True).item() == 2.0


def test_advantages_are_the_standard_score_with_the_sample_deviation():
    rewards = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for group, advantages in zip(rewards.tolist(), visurf.group_advantages(rewards).tolist()):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in group], abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -2.7, 7.0, 1e6])
@pytest.mark.parametrize("size", [1, 2, 3, 9, 65])
def test_a_group_of_equal_rewards_has_advantages_exactly_zero(value, size):
    """The mean of equal numbers is off by rounding (try 0.1 three times); divided by eps, that would be a signal."""
    for dtype in (torch.float32, torch.float64):
        assert (visurf.group_advantages(torch.full((3, size), value, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_smoothed_label_has_the_advantage_zero_exactly_and_others_do_not(dtype):
    rewards = 7 * torch.rand(200, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    advantages = visurf_advantages(rewards, {"accuracy": 0.0})
    assert (advantages[:, -1] == 0).all() and (advantages[:, :-1] != 0).all()
    same = torch.full((4, 3), 0.1, dtype=dtype)
    assert (visurf_advantages(same, {"accuracy": 0.1}) == 0).all()


def test_inputs_are_left_alone():
    rewards, label, components = torch.tensor([1.0, 2.0]), torch.tensor(0.5), {"thinking": torch.tensor(1.0)}
    visurf.smooth_if_matched(label, rewards)
    visurf_advantages(rewards, components, drop_thinking_reward=False)
    visurf.label_reward(components, credit_thinking=True)
    assert rewards.tolist() == [1.0, 2.0] and label.item() == 0.5 and components["thinking"].item() == 1.0


# ---- The losses --------------------------------------------------------------------------------


def random_group(seed=0):
    """Log-probs of two policies (B, N, T), advantages (B, N), and a mask with completions of different length."""
    torch.manual_seed(seed)
    old = -3 * torch.rand(2, 3, 5, dtype=torch.float64)
    new = old + 0.4 * torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5, 2, 3], [1, 4, 5]])[..., None]
    return new.requires_grad_(), old, torch.randn(2, 3, dtype=torch.float64), mask


def loss_by_loops(new, old, A, mask, epsilon):
    """Eq. 8 token by token, in plain Python."""
    terms = []
    for b, n, t in mask.nonzero().tolist():
        rho, a = math.exp((new[b, n, t] - old[b, n, t]).item()), A[b, n].item()
        limited = min(max(rho, 1 - epsilon), 1 + epsilon)
        terms.append(min(rho * a, limited * a))
    return -sum(terms) / len(terms)


@pytest.mark.parametrize("epsilon", [0.2, 0.5])
def test_policy_loss_against_loops_and_finite_differences(epsilon):
    new, old, A, mask = random_group()
    loss = visurf.policy_loss(new, old, A, mask, epsilon)
    assert loss.item() == pytest.approx(loss_by_loops(new, old, A, mask, epsilon), abs=1e-12)
    assert torch.autograd.gradcheck(lambda logprobs: visurf.policy_loss(logprobs, old, A, mask, epsilon), new)


def test_clipping_stops_the_gradient_on_the_right_side_only():
    log_ratio = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]])).requires_grad_()
    A, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1, dtype=torch.bool)
    loss = visurf.policy_loss(log_ratio, torch.zeros(4, 1), A, mask)
    loss.backward()
    assert (log_ratio.grad[:, 0] == 0).tolist() == [True, False, False, True]


def test_padding_may_hold_anything():
    new, old, A, mask = random_group()
    clean = visurf.policy_loss(new, old, A, mask)
    padded = torch.where(mask, new, -torch.inf).detach().requires_grad_()
    dirty = visurf.policy_loss(padded, torch.where(mask, old, torch.nan), A, mask)
    assert torch.equal(clean, dirty)
    dirty.backward()
    assert padded.grad.isfinite().all() and (padded.grad[~mask] == 0).all()
    assert torch.equal(visurf.sft_loss(torch.where(mask, new, torch.nan), mask), visurf.sft_loss(new, mask))


def test_micro_batches_add_up_to_the_whole():
    """With the batch's number of tokens passed in, losses do not depend on how the batch is cut."""
    new, old, A, mask = random_group()
    loss = visurf.policy_loss(new, old, A, mask)
    parts = [visurf.policy_loss(new[i], old[i], A[i], mask[i], total=mask.sum()) for i in range(2)]
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-12)
    parts = [visurf.sft_loss(new[i], mask[i], total=mask.sum()) for i in range(2)]
    assert sum(parts).item() == pytest.approx(visurf.sft_loss(new, mask).item(), abs=1e-12)


def test_a_mask_without_tokens_gives_zero():
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    logprobs = torch.full((1, 2, 3), -1.0, requires_grad=True)
    loss = visurf.policy_loss(logprobs, logprobs.detach(), torch.ones(1, 2), nothing)
    (loss + visurf.sft_loss(logprobs, nothing)).backward()
    assert loss.item() == 0 and (logprobs.grad == 0).all()
    nothing[0, 1, 2] = True
    assert visurf.sft_loss(logprobs, nothing).item() == 1, "of one token, the mean is its own"


# ---- Eq. 9 on a network ------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """A recurrent network that writes words after a prompt: any autoregressive policy will do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(20, 8)
        self.memory = torch.nn.GRU(8, 8, batch_first=True)
        self.head = torch.nn.Linear(8, 20)
        self.double()

    def forward(self, prompts, completions):
        """prompts (B, P), completions (B, N, T) -> log-probs (B, N, T)."""
        B, N, T = completions.shape
        words = torch.cat([prompts[:, None].expand(B, N, -1), completions], dim=-1).flatten(0, 1)
        hidden, _ = self.memory(self.embedding(words))
        logprobs = self.head(hidden[:, -T - 1:-1]).log_softmax(dim=-1)
        return logprobs.gather(-1, completions.flatten(0, 1)[..., None]).view(B, N, T)

    def gradient(self, loss) -> torch.Tensor:
        self.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters()])


@pytest.fixture
def group():
    """A policy, two prompts (B = 2, P = 4), and for each three rollouts and a label last: ids and mask (B, N = 4, T)."""
    policy = Policy()
    mask = torch.arange(6) < torch.tensor([[6, 2, 3, 5], [1, 4, 6, 2]])[..., None]
    return policy, torch.randint(20, (2, 4)), torch.randint(20, (2, 4, 6)), mask


def test_the_gradient_is_reinforcement_plus_weighted_supervision(group):
    """Eq. 9: the ViSurf gradient is the rollouts' term plus A_y times the gradient of supervised fine-tuning."""
    policy, prompts, ids, mask = group
    rewards = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    A = visurf_advantages(rewards, {"format": torch.full((2,), 4.0)})          # (B, 4), the label last
    total = mask.sum()
    logprobs = policy(prompts, ids)
    whole = policy.gradient(visurf.policy_loss(logprobs, logprobs.detach(), A, mask))
    logprobs = policy(prompts, ids[:, :3])
    rollouts = visurf.policy_loss(logprobs, logprobs.detach(), A[:, :3], mask[:, :3], total=total)
    expected = policy.gradient(rollouts)
    for b in range(2):
        supervision = visurf.sft_loss(policy(prompts[b:b + 1], ids[b:b + 1, 3:]), mask[b:b + 1, 3:], total)
        expected += A[b, 3] * policy.gradient(supervision)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)


def test_with_every_label_smoothed_it_is_the_rlvr_gradient(group):
    """Up to one scale: the deviation over G + 1 members, one of them the mean."""
    policy, prompts, ids, mask = group
    rewards = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    A = visurf_advantages(rewards, {"format": torch.full((2,), 2.0)})
    total = mask.sum()
    logprobs = policy(prompts, ids)
    ours = policy.gradient(visurf.policy_loss(logprobs, logprobs.detach(), A, mask))
    logprobs = policy(prompts, ids[:, :3])
    grpo = visurf.group_advantages(rewards)
    rlvr = policy.gradient(visurf.policy_loss(logprobs, logprobs.detach(), grpo, mask[:, :3], total=total))
    torch.testing.assert_close(ours, rlvr * math.sqrt(3 / 2), rtol=1e-5, atol=1e-9)


def test_a_group_of_equal_rewards_leaves_every_gradient_exactly_zero(group):
    policy, prompts, ids, mask = group
    A = visurf.group_advantages(torch.full((2, 4), 0.1, dtype=torch.float64))
    logprobs = policy(prompts, ids)
    assert (policy.gradient(visurf.policy_loss(logprobs, logprobs.detach(), A, mask)) == 0).all()
