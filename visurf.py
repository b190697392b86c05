"""ViSurf (arXiv 2510.10606): one update that learns from rollouts and from the ground-truth label.

Pure functions on tensors that need torch only: copy this file alone. `python visurf.py` prints one worked group.

The algorithm, for a prompt x with label y:

    1. sample G rollouts o_1 .. o_G from the policy, and score them and the label with the same verifiable rewards
    2. reward control 1: write the label in the rollouts' own style    (text, so it lives in data.py: LabelStyle)
       reward control 2: the label earns no reward for reasoning       label_reward
       reward control 3: switch the label off where the policy is good smooth_label_reward
    3. inject the label: the group is {o_1 .. o_G, y}, N = G + 1       inject_label
    4. advantages A_m = (r_m - mean) / (std + eps) over the N members  group_advantages      (Eq. 6-7)
    5. clipped policy-gradient loss over all N members                 policy_loss           (Eq. 8)

With one update per sampling the importance ratio is 1 and the gradient of the objective is (Eq. 9)

    1/N [ sum_i A_i grad log pi(o_i|x)  +  A_y grad log pi(y|x) ]

reinforcement from within plus supervision from outside, weighted by one common scale.

Shapes: the last axis of a reward or advantage tensor is the group (G rollouts, or N = G + 1 members); log-probs are
(..., N, T), natural logarithms, one per completion token; masks are True on tokens that count.
"""

import torch

def visurf_advantages(rollout_rewards, label_components: dict, thinking=("thinking",), drop_thinking: bool = True,
                      smooth: bool = True) -> torch.Tensor:
    """Steps 2 to 4 in one call: rollout rewards (..., G) and the label's reward by component -> advantages (..., N).

    The label's advantage is the last one. `label_components` maps names to tensors (...) or numbers.

    >>> label = {"thinking": 1.0, "format": 2.0, "accuracy": 2.0}             # r(y) = 4 without the thinking reward
    >>> visurf_advantages(torch.zeros(8), label)                              # nobody succeeds: the label leads
    tensor([-0.3333, -0.3333, -0.3333, -0.3333, -0.3333, -0.3333, -0.3333, -0.3333,
             2.6667])
    """
    reward = label_reward(label_components, thinking, drop_thinking).to(rollout_rewards)
    if smooth:
        reward = smooth_label_reward(rollout_rewards, reward)
    return group_advantages(inject_label(rollout_rewards, reward))

def label_reward(components: dict, thinking=("thinking",), drop_thinking: bool = True) -> torch.Tensor:
    """Reward control 2: the label's reward is the sum of its components, but never those about reasoning.

    The label is an answer without a reasoning trace: rewarded for one, it would teach the policy to stop thinking.
    `components` maps names to tensors or numbers, without their total (ValueError: it would count all of them twice).

    >>> label_reward({"thinking": 1.0, "format": 2.0, "accuracy": 3.0})
    tensor(5., dtype=torch.float64)
    """
    if "total" in components:
        raise ValueError("pass the components without their total")
    kept = [value for name, value in components.items() if not (drop_thinking and name in thinking)]
    return sum(torch.as_tensor(value, dtype=torch.float64) for value in kept)

def smooth_label_reward(rollout_rewards, label_reward) -> torch.Tensor:
    """Reward control 3: where some rollout is at least as good as the label, the label earns the rollouts' mean.

    rollout_rewards (..., G), label_reward (...) -> label reward (...). Who earns the others' mean has advantage 0:
    supervision has switched itself off for this prompt, and reinforcement goes on alone.

    >>> smooth_label_reward(torch.tensor([3.0, 0.0, 0.0, 3.0]), torch.tensor(3.0))
    tensor(1.5000)
    """
    solved = rollout_rewards.amax(dim=-1) >= label_reward
    return torch.where(solved, rollout_rewards.mean(dim=-1), label_reward)

def inject_label(rollout_rewards, label_reward) -> torch.Tensor:
    """Rewards (..., G) and the label's (...) -> rewards of the whole group (..., N = G + 1), the label last."""
    return torch.cat([rollout_rewards, label_reward[..., None]], dim=-1)

def group_advantages(rewards, eps: float = 1e-6) -> torch.Tensor:
    """A_m = (r_m - mean) / (std + eps) over the last axis, the group (Eq. 6-7); std is the sample's, with n - 1.

    Advantages are exactly 0, not rounding noise divided by eps, where all members score the same; so they are in a
    group of one, whose sample deviation does not exist.

    >>> group_advantages(torch.tensor([[3.0, 0.0, 0.0, 3.0, 1.5], [2.0, 2.0, 2.0, 2.0, 2.0]])).round(decimals=3)
    tensor([[ 1., -1., -1.,  1.,  0.],
            [ 0.,  0.,  0.,  0.,  0.]])
    """
    if rewards.shape[-1] < 2:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    advantages = centred / (rewards.std(dim=-1, keepdim=True) + eps)
    has_spread = rewards.amax(dim=-1, keepdim=True) > rewards.amin(dim=-1, keepdim=True)
    return torch.where(has_spread, advantages, 0.0)

def policy_loss(logprobs, old_logprobs, advantages, mask, epsilon_low: float = 0.2, epsilon_high: float = 0.2,
                ratio: str = "token", average: str = "token", total=None) -> tuple[torch.Tensor, dict]:
    """The negated objective: mean of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), without reference KL (Eq. 8).

    logprobs, old_logprobs, mask (..., N, T), advantages (..., N). `old_logprobs` are those of the policy that sampled;
    pass logprobs.detach() for one update per sampling (rho = 1, and the gradient is Eq. 9's).

    ratio    "token": one ratio a token (GRPO); "sequence": the length-normalised ratio of the whole completion (GSPO)
    average  "token": every token of the batch weighs the same; "sequence": first over a completion's tokens, then over
             completions
    total    what the sum is divided by; the whole batch's tokens or completions if it comes in pieces

    Returns the loss and {"clipped": share of tokens whose gradient is cut off, "kl": estimate of KL(old, new)}, both
    over this call's tokens. ValueError for another ratio or average.

    >>> new, old = torch.log(torch.tensor([[1.5], [1.1]])), torch.zeros(2, 1)     # ratios 1.5 (clipped to 1.2) and 1.1
    >>> loss, stats = policy_loss(new, old, torch.tensor([1.0, -1.0]), torch.ones(2, 1, dtype=torch.bool))
    >>> round(loss.item(), 3), stats["clipped"].item()                            # -(1.2 - 1.1) / 2
    (-0.05, 0.5)
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (..., N, T)
    kl = kl_estimate(log_ratio.detach())
    if ratio == "sequence":
        lengths = mask.sum(dim=-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=-1, keepdim=True) / lengths).expand_as(logprobs)
    elif ratio != "token":
        raise ValueError(f"ratio must be 'token' or 'sequence', not {ratio!r}")
    rho = log_ratio.exp()
    A = advantages[..., None].to(rho)
    objective = torch.minimum(rho * A, rho.clamp(1 - epsilon_low, 1 + epsilon_high) * A)
    clipped = ((A > 0) & (rho > 1 + epsilon_high)) | ((A < 0) & (rho < 1 - epsilon_low))
    tokens = mask.sum().clamp(min=1)
    stats = {"clipped": (clipped & mask).sum() / tokens, "kl": (kl * mask).sum() / tokens}
    return -masked_mean(objective, mask, average, total), stats

def kl_estimate(log_ratio) -> torch.Tensor:
    """KL(p, q) at each token drawn from p, from log q - log p there: never negative, right on average (Schulman's k3).

    With p the policy and q a frozen reference, beta times its mean over rollouts is GRPO's KL term, which ViSurf drops.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> estimate = (p * kl_estimate((q / p).log())).sum()                         # the mean over draws from p
    >>> torch.allclose(estimate, (p * (p / q).log()).sum())
    True
    """
    return log_ratio.expm1() - log_ratio

def sft_loss(logprobs, mask, average: str = "token", total=None) -> torch.Tensor:
    """Cross-entropy of the labels: the negated mean log-prob of logprobs (..., T) where mask (..., T) is True.

    `average` and `total` as in policy_loss.

    >>> round(sft_loss(torch.log(torch.tensor([[0.5, 0.25]])), torch.tensor([[True, True]])).item(), 4)
    1.0397
    """
    return -masked_mean(logprobs, mask, average, total)

def masked_mean(values, mask, average: str = "token", total=None) -> torch.Tensor:
    """Mean of values (..., T) where mask is True, over tokens, or over each sequence's tokens and then sequences.

    >>> values = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> masked_mean(values, mask, "token").item(), masked_mean(values, mask, "sequence").item()
    (1.75, 2.5)
    """
    values = torch.where(mask, values, 0.0)  # not a product: padding may hold inf, and inf * 0 is nan
    if average == "token":
        return values.sum() / (mask.sum().clamp(min=1) if total is None else total)
    if average != "sequence":
        raise ValueError(f"average must be 'token' or 'sequence', not {average!r}")
    lengths = mask.sum(dim=-1)
    per_sequence = values.sum(dim=-1) / lengths.clamp(min=1)
    return per_sequence.sum() / ((lengths > 0).sum().clamp(min=1) if total is None else total)

def main():
    """Print one group step by step: four rollouts that do not all succeed, a label, and what each of them weighs."""
    rollouts = torch.tensor([3.0, 0.0, 1.0, 0.0])  # sums of their reward components
    components = {"thinking": 1.0, "format": 2.0, "accuracy": 3.0}
    show = lambda values: "  ".join(f"{value:6.3f}" for value in values.tolist())
    print(f"rollout rewards                {show(rollouts)}")
    reward = label_reward(components).float()
    print(f"label reward without thinking  {reward:6.3f}   (of {sum(components.values()):.0f})")
    smoothed = smooth_label_reward(rollouts, reward)
    print(f"after smoothing                {smoothed:6.3f}   (no rollout reaches the label: it stays)")
    advantages = group_advantages(inject_label(rollouts, smoothed))
    print(f"advantages, label last         {show(advantages)}")

    logprobs = torch.full((5, 2), -1.0, requires_grad=True)  # two tokens each
    mask = torch.ones(5, 2, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    print(f"d(-loss)/d(log-prob), a token  {show(-logprobs.grad[:, 0])}   (= advantage / 10 tokens, Eq. 9)")

    solved = rollouts.clone()
    solved[1] = 5.0
    smoothed = smooth_label_reward(solved, reward)
    print(f"\nrollout 2 reaches 5: label reward becomes the rollouts' mean {smoothed:.3f}")
    print(f"advantages, label last         {show(group_advantages(inject_label(solved, smoothed)))}")

if __name__ == "__main__":
    main()
