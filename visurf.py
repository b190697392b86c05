"""ViSurf (arXiv 2510.10606): one update that learns from rollouts and from the ground-truth label.

Needs torch alone: copy it. For a prompt x, an image and a question, with the label y:
    1. Sample G rollouts o_1 .. o_G from the policy
    2. Write y as most rollouts so far are written (control 1)       style_of, align_label
    3. Score rollouts and label with the same rewards r(.), but
         control 2  y earns nothing for thinking                     label_reward
         control 3  y gets their mean, if a rollout is as good       smooth_if_matched
    4. Inject y: the group {o_1 .. o_G, y} has N = G + 1 members     visurf_advantages (3 and 4)
         advantages  A_m = (r_m - mean) / (std + eps)                group_advantages  (Eq. 6-7)
    5. Maximise the token mean of min(rho A_m, clip(rho) A_m)        policy_loss  (Eq. 8)

With one update per sampling, the ratio rho is 1, and a group's gradient is, up to its scale,
    1/N [ sum_i A_i grad log pi(o_i|x)  +  A_y grad log pi(y|x) ]                      (Eq. 9)
Shapes: G rollouts, N members, T tokens; "..." are leading axes. Masks are True on real tokens."""

import json

import torch

# ---- Control 1: the label's style --------------------------------------------------------------
# Candidates for the label's style: name -> function(answer) -> the text between the answer tags.
STYLES = {
    "spaced": json.dumps,
    "compact": json.JSONEncoder(separators=(",", ":")).encode,
    "indented": json.JSONEncoder(indent=2).encode,
}

def style_of(answer_text):
    """Reward control 1: the only style that reproduces a rollout's answer text, or None.

    >>> style_of('[{"point_2d":[1,2]}]'), style_of('[{"point_2d": [1, 2]}]'), style_of("[]")
    ('compact', 'spaced', None)
    """
    try:
        # json would accept NaN and Infinity; int() refuses both.
        answer = json.loads(answer_text, parse_constant=int)
        matching = [name for name, write in STYLES.items() if write(answer) == answer_text]
    except (ValueError, RecursionError):     # not JSON, or nested too deep
        return None
    # All styles write "[]" and "24" alike: such an answer has no vote.
    return matching[0] if len(matching) == 1 else None

def preferred_style(votes):
    """The style with the most votes; a tie goes to the first in STYLES."""
    return max(STYLES, key=lambda name: votes[name])

def align_label(answer, style):
    """The label's completion, `<answer>...</answer>`; an answer that is text stays as it is."""
    if not isinstance(answer, str):
        answer = STYLES[style](answer)
    return f"<answer>{answer}</answer>"

# ---- Steps 3 and 4: rewards of a group, and its advantages -------------------------------------
def visurf_advantages(rollout_rewards, label_components, drop_thinking_reward=True,
                      smooth_label_reward=True):
    """Advantages (..., N) of G rollouts with rewards (..., G), and of their label, the last.

    label_components: a dict of the label's rewards, numbers or tensors (...). The two flags switch
    controls 2 and 3; control 1 is in the text that was scored.
    >>> visurf_advantages(torch.zeros(4), {"format": 1.0, "accuracy": 3.0})
    tensor([-0.4472, -0.4472, -0.4472, -0.4472,  1.7889])
    """
    r_label = label_reward(label_components, credit_thinking=not drop_thinking_reward)
    # In one type: 2.1 in float32 is less than 2.1 in float64, and control 3 would miss a match.
    r_label = r_label.to(rollout_rewards)
    if smooth_label_reward:
        r_label = smooth_if_matched(r_label, rollout_rewards)
    r_label = r_label.expand(rollout_rewards.shape[:-1])
    rewards = torch.cat([rollout_rewards, r_label[..., None]], dim=-1)      # (..., N)
    return group_advantages(rewards)

def label_reward(components, credit_thinking=False):
    """Reward control 2: the sum (...) of the label's components, in float64, without thinking."""
    # A label never thinks: it earns 0 with this control, and is given 1 without it (an ablation).
    if "thinking" in components:
        components = components | {"thinking": float(credit_thinking)}
    return sum(torch.as_tensor(value, dtype=torch.float64) for value in components.values())

def smooth_if_matched(r_label, rollout_rewards):
    """Reward control 3: where a rollout is as good as the label, the label gets the rollouts' mean.

    r_label (...), rollout_rewards (..., G) -> (...).
    >>> smooth_if_matched(torch.tensor(3.0), torch.tensor([3.0, 0.0, 0.0, 3.0]))
    tensor(1.5000)
    """
    # With the rollouts' mean, the label has zero advantage: only the rollouts teach.
    matched = rollout_rewards.amax(dim=-1) >= r_label                       # (...)
    return torch.where(matched, rollout_rewards.mean(dim=-1), r_label)

def group_advantages(rewards, eps=1e-6):
    """A_m = (r_m - mean) / (std + eps) within each group: (..., N) -> (..., N)   (Eq. 6-7).

    >>> group_advantages(torch.tensor([3.0, 0.0, 0.0, 3.0, 1.5]))
    tensor([ 1.0000, -1.0000, -1.0000,  1.0000,  0.0000])
    """
    # The standard deviation is the sample's, with N - 1: a group of one has none.
    N = rewards.shape[-1]
    if N == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)                  # (..., N)
    # Exactly 0 where only rounding differs, so that equal rewards teach nothing.
    rounding = N * torch.finfo(rewards.dtype).eps * rewards.abs().amax(dim=-1, keepdim=True)
    centred = torch.where(centred.abs() <= rounding, 0.0, centred)
    return centred / (rewards.std(dim=-1, keepdim=True) + eps)

# ---- Step 5: losses ----------------------------------------------------------------------------
def policy_loss(logprobs, old_logprobs, advantages, mask, epsilon=0.2, total=None):
    """The negated objective: the mean of min(rho A, clip(rho) A), without reference KL (Eq. 8).

    logprobs, old_logprobs, mask (..., N, T), advantages (..., N). rho is a token's importance ratio
    to the policy that sampled it. With one update per sampling, old_logprobs=logprobs.detach().
    total: the number of tokens to divide by, if it is the whole batch's and not this mask's."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)             # (..., N, T)
    rho = log_ratio.exp()
    A = advantages[..., None].to(rho)                                       # (..., N, 1)
    objective = torch.minimum(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A)
    return -masked_mean(objective, mask, total)

def sft_loss(logprobs, mask, total=None):
    """Cross-entropy of labels (..., T): its gradient is policy_loss's with advantages 1."""
    return -masked_mean(logprobs, mask, total)

def masked_mean(values, mask, total=None):
    """The sum of values (..., T) where mask is True, divided by `total` or else by their number."""
    if total is None:
        total = mask.sum().clamp(min=1)
    # Not values * mask: padding may hold infinities, and inf * 0 is nan.
    return torch.where(mask, values, 0.0).sum() / total
