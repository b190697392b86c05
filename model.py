"""Qwen2-VL and Qwen2.5-VL by hand: the network, its weights on disk, and sampling with a KV cache.

Three entry points, everything else serves them:

    network = load_pretrained("path/to/checkpoint")           # Hugging Face checkpoint -> QwenVL
    rollouts = generate(network, prompts, num_generations=8)  # a prompt is run once, 8 rollouts continue from its cache
    logprobs = network(batch, completions, mask)              # a prompt is run once, N members continue, with gradient

The central idea is in the last two lines. A prompt holds about 900 image tokens and an answer about 60, so a group of N
completions costs P + N*T tokens instead of N*(P + T) when all of them read the prompt's keys and values from one place.

Glossary of shapes
    B   prompts in a batch                P   prompt tokens (right-padded to the longest)
    N   completions of each prompt        T   completion tokens (right-padded)
    D   hidden size                       V   vocabulary
    H   query heads, K key/value heads, E head size       M   tokens whose log-prob is wanted
    Activations are flat: x is (tokens, D), first the B*P prompt tokens, then those of completions, without padding.

The network knows nothing of ranks, rewards or what a file means. Modules carry the checkpoint's own names, except that
q/k/v and gate/up are one matrix each here (`checkpoint_rows`).
"""

import json
import shutil
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file and what is wrong."""

# ---- The whole network -----------------------------------------------------------------------------------------------

class QwenVL(nn.Module):
    """Vision tower, language model and output head (Qwen2-VL: arXiv 2409.12191; Qwen2.5-VL: arXiv 2502.13923).

    `network(batch, completions, mask)` is the training forward: log-probs of completions, with gradient.
    `generate` is sampling; `network.logits(batch)` is the plain forward that other implementations are compared with.
    """

    def __init__(self, config):  # a transformers Qwen2VLConfig or Qwen2_5_VLConfig
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass instead of storing it
        self.stop_tokens: list[int] = []  # any of these ends a completion
        self.forbidden_tokens: list[int] = []  # have probability 0: vision tokens, rows past the tokenizer's last word
        self.visual = VisionTower(config.vision_config)
        self.model = LanguageModel(config.text_config)
        text = config.text_config
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight  # (V, D)

    def forward(self, batch: "PromptBatch", completions, mask, temperature: float = 1.0, expected=None) -> torch.Tensor:
        """Log-probs (B, N, T), float32, of completions (B, N, T) under softmax(logits / temperature).

        mask (B, N, T) is True on a completion's tokens; padding, which must follow them (ValueError), gets 0. Forbidden
        tokens are left out of the softmax, as in sampling. Each prompt is run once: its N completions attend to its
        keys and values, and their gradients meet there. `expected`: see TokenLogProbs.
        """
        B, N, T = completions.shape
        if (mask[:, :, 1:] & ~mask[:, :, :-1]).any():  # a token that is masked out is not seen by those after it either
            raise ValueError("mask has tokens after padding: leave what should not be learnt out of the loss instead")
        P, real = batch.ids.shape[1], mask[:, :, 1:]  # the token at t is predicted from position t-1: one input less
        after_prompt = batch.next_position[:, None, None] + torch.arange(T - 1, device=mask.device).expand(B, N, -1)
        rotary = self.model.rotary(torch.cat([batch.positions.flatten(1), after_prompt[real].expand(3, -1)], dim=1))
        x = self.embed(batch, completions[:, :, :-1][real])  # (B*P + n, D), n real inputs of completions
        x = self.model(x, rotary, GroupAttention(batch.lengths, P, real), self.checkpoint_activations)

        last = x[torch.arange(B, device=x.device) * P + batch.lengths - 1]  # (B, D) predicts token 0
        states = x.new_zeros(B, N, T, x.shape[-1])
        states[:, :, 0] = last[:, None]
        states[:, :, 1:][real] = x[B * P :]
        wanted = self.model.norm(states[mask])  # (M, D): the head never sees the other positions
        values = token_log_probs(wanted, self.head_weight, completions[mask], temperature, self.forbidden_tokens,
                                 expected=None if expected is None else expected[mask])
        return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)

    def logits(self, batch: "PromptBatch") -> torch.Tensor:
        """Logits (B, P, V) at every prompt position; nothing is left out of them."""
        return F.linear(self.model.norm(self.prompt_states(batch)), self.head_weight)

    def prompt_states(self, batch: "PromptBatch", cache: "KVCache | None" = None) -> torch.Tensor:
        """Last layer's states (B, P, D) of the prompts alone; with a cache, their keys and values are kept there."""
        rotary = self.model.rotary(batch.positions.flatten(1))
        attend = GroupAttention(batch.lengths, batch.ids.shape[1], cache=cache)
        return self.model(self.embed(batch), rotary, attend).view(*batch.ids.shape, -1)

    def embed(self, batch: "PromptBatch", more=None) -> torch.Tensor:
        """Embeddings (B*P + n, D) of the prompts, with the vision tower's features in the image slots, and of n more
        tokens. One call for all, because its gradient is as large as the embedding."""
        prompts = batch.ids.flatten()
        x = self.model.embed_tokens(prompts if more is None else torch.cat([prompts, more]))
        if len(batch.grid_thw) == 0:
            return x
        slots = (prompts == self.config.image_token_id).nonzero()[:, 0]
        features = self.visual(batch.pixels, batch.grid_thw, self.checkpoint_activations)
        return x.index_copy(0, slots, features.to(x.dtype))

class LanguageModel(nn.Module):
    """Qwen2: pre-norm transformer with grouped-query attention and multimodal rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, rotary, attend, checkpoint_activations: bool = False) -> torch.Tensor:
        """Run the layers on flat tokens x (tokens, D); `attend` knows which token may see which. No final norm."""
        for layer in self.layers:
            x = run_block(layer, x, rotary, attend, checkpoint_activations)
        return x

    def rotary(self, positions: torch.Tensor) -> "Rotary":
        """Rotations for M-RoPE positions (3, tokens): each frequency follows one of time, height, width."""
        rope, half = self.config.rope_parameters, self.config.hidden_size // self.config.num_attention_heads // 2
        frequency = rope["rope_theta"] ** -(torch.arange(half, device=positions.device).float() / half)
        axis = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"])).to(positions.device)
        return Rotary(positions[axis].T.float() * frequency)  # angles (tokens, E/2)

def run_block(block, x, rotary, attend, checkpoint_activations: bool) -> torch.Tensor:
    """block(x, rotary, attend), of either tower; its activations can be recomputed in the backward pass, not stored."""
    if checkpoint_activations and torch.is_grad_enabled():
        return checkpoint(block, x, rotary, attend, use_reentrant=False)
    return block(x, rotary, attend)

class Layer(nn.Module):
    """One transformer block. It sees flat tokens only, so prompts and completions go through it in a single call."""

    def __init__(self, config, index: int):
        super().__init__()
        self.index, heads = index, (config.num_attention_heads, config.num_key_value_heads)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config.hidden_size, *heads, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x, rotary, attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, partial(attend, self.index))
        return x + self.mlp(self.post_attention_layernorm(x))

class Attention(nn.Module):
    """Projections and rotation, for both towers; who attends to whom is decided by attend(q, k, v)."""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool):
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.qkv = nn.Linear(width, sum(self.heads) * (width // heads), bias=True)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x, rotary, attend) -> torch.Tensor:
        heads = self.qkv(x).view(len(x), sum(self.heads), -1)
        turned = rotary(heads[:, : sum(self.heads[:2])])  # queries and keys
        q, k = turned.split(self.heads[:2], dim=1)  # (tokens, H, E), (tokens, K, E)
        return self.proj(attend(q, k, heads[:, -self.heads[2] :]).flatten(1))

class GatedMLP(nn.Module):
    """SwiGLU feed-forward block, gate and up projection in one matrix."""

    def __init__(self, width: int, mlp_width: int, bias: bool):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * mlp_width, bias=bias)
        self.down_proj = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

class Rotary:
    """Rotates pairs (i, i + E/2) of each head by a per-token angle, in float32 whatever the network's dtype."""

    def __init__(self, angles: torch.Tensor):  # (tokens, E/2)
        self.cos = torch.cat([angles, angles], dim=-1).cos()[:, None]  # (tokens, 1, E)
        self.sin = torch.cat([-angles, angles], dim=-1).sin()[:, None]  # the first of a pair gets minus the second

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, E)
        partner = x.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(x * self.cos, partner, self.sin).to(x.dtype)

    def at(self, index) -> "Rotary":
        """The rotations of some tokens (n,) only."""
        chosen = copy(self)
        chosen.cos, chosen.sin = self.cos[index], self.sin[index]
        return chosen

# ---- Who attends to whom ---------------------------------------------------------------------------------------------

class GroupAttention:
    """Causal attention inside each prompt; each completion sees its own prompt and its own past.

    Called as attend(layer, q, k, v) on flat tokens: B*P of prompts, then those of completions that are True in `real`
    (B, N, T). Prompts are right-padded: under a causal mask no real token ever sees the padding behind it, so prompts
    need no mask, only the completions that follow. With `cache`, the prompts' keys and values are kept for decoding.
    """

    def __init__(self, lengths, P: int, real=None, cache: "KVCache | None" = None):
        self.B, self.P, self.cache, self.real = len(lengths), P, cache, None
        if real is not None and real.any():
            B, self.N, T = real.shape
            prompt = torch.arange(P, device=lengths.device) < lengths[:, None]  # (B, P) True = a real prompt token
            causal = torch.ones(T, T, dtype=torch.bool, device=lengths.device).tril()
            mask = torch.cat([prompt[:, None].expand(-1, T, -1), causal.expand(B, -1, -1)], dim=-1)
            self.mask = mask.repeat_interleave(self.N, dim=0)[:, None]  # (B*N, 1, T, P+T) True = may be seen
            self.real = real.flatten(0, 1)  # (B*N, T)

    def __call__(self, layer: int, q, k, v) -> torch.Tensor:
        B, P = self.B, self.P
        prompt_q, prompt_k, prompt_v = (x[: B * P].unflatten(0, (B, P)).transpose(1, 2) for x in (q, k, v))
        if self.cache is not None:
            self.cache.store_prompts(layer, prompt_k, prompt_v)
        out = F.scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).flatten(0, 1)  # (B*P, H, E)
        if self.real is None:
            return out
        rectangle = lambda x: x.new_zeros(*self.real.shape, *x.shape[1:]).index_put((self.real,), x)
        own_q, own_k, own_v = (rectangle(x[B * P :]).transpose(1, 2) for x in (q, k, v))  # (B*N, heads, T, E)
        # Grouped heads make keys and values small, so each completion gets a copy of its prompt's: autograd adds the
        # copies' gradients up, and one fused attention call serves the group.
        keys = torch.cat([prompt_k.repeat_interleave(self.N, dim=0), own_k], dim=2)  # (B*N, K, P+T, E)
        values = torch.cat([prompt_v.repeat_interleave(self.N, dim=0), own_v], dim=2)
        own = F.scaled_dot_product_attention(own_q, keys, values, attn_mask=self.mask, enable_gqa=True)
        return torch.cat([out, own.transpose(1, 2)[self.real]])

class KVCache:
    """Keys and values while decoding: each prompt's once, and a preallocated stretch for each of its N rows.

    Called as attend(layer, q, k, v) on one new token per row (B*N, heads, E). Rows of one prompt share the product with
    the prompt's keys: no copy of a 900-token prompt per rollout, in memory or in bandwidth.

    `fixed` is for a captured step: attention reads a stretch of the rows that doubles now and then, partly masked.
    """

    def __init__(self, num_layers: int, lengths, N: int, max_tokens: int, fixed: bool = False):
        self.B, self.N, self.lengths, self.max_tokens, self.fixed = len(lengths), N, lengths, max_tokens, fixed
        self.t, self.used = -1, 0  # the slot that the current token fills, and how many slots attention reads
        self.slot = torch.zeros(1, dtype=torch.long, device=lengths.device)  # t, where a captured graph can see it
        self.prompts = [None] * num_layers  # per layer: keys (B*K, E, P), as products want them, and values (B*K, P, E)
        self.rows = [None] * num_layers  # per layer: keys and values (B, K, N, max_tokens, E)

    def store_prompts(self, layer: int, k, v):  # (B, K, P, E) each
        B, self.K, self.P, E = k.shape
        self.prompts[layer] = k.mT.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()
        self.rows[layer] = k.new_zeros(2, B, self.K, self.N, self.max_tokens, E).unbind()
        if layer == 0:
            self.make_mask()

    def make_mask(self):
        """What is added to scores (B*K, 1, P + max_tokens): -inf on padding and on slots that are not filled yet."""
        place = torch.arange(self.P + self.max_tokens, device=self.lengths.device)
        seen = (place < self.lengths[:, None]) | ((place >= self.P) & (place <= self.P + self.t))  # (B, P + max_tokens)
        self.mask = torch.where(seen, 0.0, -torch.inf).repeat_interleave(self.K, dim=0)[:, None]
        self.padded = bool((self.lengths < self.P).any())

    def advance(self) -> bool:
        """Open the slot of the next token; True if attention reads more slots than before: a captured graph is void."""
        self.t, before = self.t + 1, self.used
        self.slot.fill_(self.t)
        self.mask[..., self.P + self.t] = 0
        self.used = min(max(64, 1 << self.t.bit_length()), self.max_tokens) if self.fixed else self.t + 1
        return self.used != before

    def __call__(self, layer: int, q, k, v) -> torch.Tensor:
        B, N, K, P, used = self.B, self.N, self.K, self.P, self.used
        g, E = q.shape[1] // K, q.shape[2]  # g query heads share a key/value head
        keys, values = self.rows[layer]
        keys.index_copy_(3, self.slot, k.view(B, N, K, 1, E).transpose(1, 2))
        values.index_copy_(3, self.slot, v.view(B, N, K, 1, E).transpose(1, 2))
        prompt_k, prompt_v = self.prompts[layer]

        q = (q * E**-0.5).view(B, N, K, g, E).transpose(1, 2).reshape(B * K, N * g, E)
        on_prompt = product(q, prompt_k)  # (B*K, N*g, P): all rows of a prompt against its keys at once
        on_own = product(q.view(-1, g, E), keys.flatten(0, 2)[:, :used].mT)  # (B*K*N, g, used)
        scores = torch.cat([on_prompt, on_own.view(B * K, N * g, used)], dim=-1)
        if self.fixed or self.padded:
            scores += self.mask[..., : P + used]
        weights = scores.softmax(dim=-1).to(q.dtype)
        out = torch.bmm(weights[..., :P], prompt_v)  # (B*K, N*g, E)
        on_own = weights[..., P:].view(-1, g, used)
        out = torch.baddbmm(out.view(-1, g, E), on_own, values.flatten(0, 2)[:, :used])
        return out.view(B, K, N, g, E).transpose(1, 2).reshape(B * N, K * g, E)

    def keep(self, prompts, rows):
        """Keep only some prompts (B',) and rows (B', N'), in that order: finished rows cost nothing any more."""
        own = lambda x: x.transpose(1, 2)[rows // self.N, rows % self.N].transpose(1, 2).contiguous()
        shared = lambda x: x.unflatten(0, (self.B, self.K))[prompts].flatten(0, 1)
        for layer in range(len(self.rows)):  # one at a time: two copies of the whole would be much memory
            self.rows[layer] = tuple(own(x) for x in self.rows[layer])
            if len(prompts) < self.B:
                self.prompts[layer] = tuple(shared(x) for x in self.prompts[layer])
        self.lengths, (self.B, self.N) = self.lengths[prompts], rows.shape
        self.make_mask()

# ---- Vision tower ----------------------------------------------------------------------------------------------------

class VisionTower(nn.Module):
    """ViT over the patches of all images at once; merge x merge neighbouring patches leave it as one feature.

    Qwen2-VL has LayerNorm and QuickGELU. Qwen2.5-VL has RMSNorm and SwiGLU, and most blocks see only a window.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.windowed = config, hasattr(config, "window_size")
        self.width = config.hidden_size if self.windowed else config.embed_dim
        self.patch_embed = PatchEmbed(config, self.width)
        self.blocks = nn.ModuleList(VisionBlock(config, self.width, self.windowed) for _ in range(config.depth))
        self.merger = PatchMerger(config, self.width, self.windowed)

    def forward(self, pixels, grid_thw, checkpoint_activations: bool = False) -> torch.Tensor:
        """A list of pixels (patches, channels*time*14*14) and grid_thw (images, 3) -> features (patches/merge**2, D).

        Patches come in the processor's order: those of one feature are neighbours. ValueError for videos.
        """
        grids, merge = grid_thw.tolist(), self.config.spatial_merge_size
        if any(t != 1 for t, _, _ in grids):
            raise ValueError(f"only still images are supported, got grids {grids}")
        x = torch.cat([self.patch_embed(part) for part in pixels])  # (patches, width)
        angles = patch_angles(grids, merge, self.width // self.config.num_heads)
        images = windows = [h * w for _, h, w in grids]  # lengths of the segments that attention stays inside
        if self.windowed:
            order, windows = window_order(grids, merge, self.config.window_size // self.config.patch_size // merge)
            patches = (order[:, None] * merge**2 + torch.arange(merge**2)).flatten()
            x, angles = x[patches.to(x.device)], angles[patches]
        rotary = Rotary(angles.to(x.device))
        for i, block in enumerate(self.blocks):
            whole = not self.windowed or i in self.config.fullatt_block_indexes
            attend = partial(segment_attention, lengths=images if whole else windows)
            x = run_block(block, x, rotary, attend, checkpoint_activations)
        x = self.merger(x)
        return x[order.argsort().to(x.device)] if self.windowed else x

def segment_attention(q, k, v, lengths: list[int]) -> torch.Tensor:
    """Full attention inside consecutive segments of q, k, v (patches, heads, E); equal ones share a call."""
    outs, start = [], 0
    for length, run in groupby(lengths):
        n = len(list(run))
        batch = (x[start : start + n * length].unflatten(0, (n, length)).transpose(1, 2) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        start += n * length
    return torch.cat(outs)

def patch_angles(grids, merge: int, head_dim: int) -> torch.Tensor:
    """2-D rotary angles (patches, E/2): half of the frequencies follow the patch's row, half its column."""
    frequency = 10000.0 ** -(torch.arange(head_dim // 4).float() / (head_dim // 4))
    angles = []
    for _, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        blocks = (x.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten() for x in (row, column))
        angles.append(torch.cat([x[:, None] * frequency for x in blocks], dim=-1))
    return torch.cat(angles)

def window_order(grids, merge: int, window: int):
    """An order of the merged patches with every attention window contiguous, and the windows' lengths in patches.

    Windows of equal size follow each other (those at the border are smaller): they share one attention call.
    """
    order, lengths, start = [], [], 0
    for _, h, w in grids:
        h, w = h // merge, w // merge
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        index = (row // window * w + column // window).flatten()  # which window each merged patch is in
        size = torch.bincount(index)[index]  # and how many share it
        inside = torch.argsort(size * h * w + index, stable=True)
        order.append(inside + start)
        lengths += torch.unique_consecutive(index[inside], return_counts=True)[1].tolist()
        start += h * w
    return torch.cat(order), [n * merge**2 for n in lengths]

class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a matrix product; on a CPU the convolution would dominate a step."""

    def __init__(self, config, width: int):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, width, kernel, bias=False)

    def forward(self, pixels) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)  # (width, channels*time*14*14)
        return F.linear(pixels.to(weight.dtype), weight)

class VisionBlock(nn.Module):
    """One transformer block of the vision tower."""

    def __init__(self, config, width: int, windowed: bool):
        super().__init__()
        norm = nn.RMSNorm if windowed else nn.LayerNorm
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.attn = Attention(width, config.num_heads, config.num_heads, bias=True)
        if windowed:
            self.mlp = GatedMLP(width, config.intermediate_size, bias=True)
        else:
            self.mlp = QuickMLP(width, int(width * config.mlp_ratio))

    def forward(self, x, rotary, attend) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rotary, attend)
        return x + self.mlp(self.norm2(x))

class QuickMLP(nn.Module):
    """Two layers with QuickGELU, x * sigmoid(1.702 x), as in CLIP."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))

class PatchMerger(nn.Module):
    """Joins merge x merge neighbouring patches and projects them to the language model's width."""

    def __init__(self, config, width: int, windowed: bool):
        super().__init__()
        self.joined = width * config.spatial_merge_size**2
        self.ln_q = (nn.RMSNorm if windowed else nn.LayerNorm)(width, eps=1e-6)
        out = config.out_hidden_size if windowed else config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, out))

    def forward(self, x) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.joined))

# ---- Prompts and completions as tensors ------------------------------------------------------------------------------

@dataclass
class PromptBatch:
    """B prompts as one batch, right-padded; grids of all their images follow each other in prompt order."""

    ids: torch.Tensor  # (B, P)
    lengths: torch.Tensor  # (B,) real tokens of each prompt
    positions: torch.Tensor  # (3, B, P) M-RoPE: time, height, width
    next_position: torch.Tensor  # (B,) of the first completion token, equal on all three axes
    pixels: list[torch.Tensor]  # of each prompt, (patches, channels*time*14*14); joined they would be a large copy
    grid_thw: torch.Tensor  # (images, 3)

    @classmethod
    def from_prompts(cls, prompts, config, device="cpu") -> "PromptBatch":
        """Build from objects with .ids (P,), .pixels (patches, ...) and .grid_thw (images, 3)."""
        positions = [mrope_positions(p.ids, p.grid_thw, config) for p in prompts]  # (3, P) each
        return cls(
            ids=pad_sequence([p.ids for p in prompts], batch_first=True).to(device),
            lengths=torch.tensor([len(p.ids) for p in prompts], device=device),
            positions=pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1).to(device),
            next_position=torch.stack([p.max() + 1 for p in positions]).to(device),
            pixels=[p.pixels.to(device) for p in prompts],
            grid_thw=torch.cat([p.grid_thw for p in prompts]))  # stays on the CPU: it only steers loops

def mrope_positions(ids, grid_thw, config) -> torch.Tensor:
    """M-RoPE positions (3, P) of one prompt (P,) with images grid_thw (images, 3), in patches (Qwen2-VL, section 2.1).

    Text advances all three axes together. An image's tokens share one time; rows and columns count up from there, and
    the text after it goes on from the largest position used. Raises ValueError if ids and grids disagree.
    """
    m, images = config.vision_config.spatial_merge_size, iter(grid_thw.tolist())
    columns, start = [], 0
    for is_image, run in groupby((ids == config.image_token_id).tolist()):  # images are apart: <|vision_end|> follows
        n = len(list(run))
        if is_image:
            t, h, w = next(images, (0, 0, 0))
            index = torch.cartesian_prod(torch.arange(t), torch.arange(h // m), torch.arange(w // m)).view(-1, 3).T
        else:
            index = torch.arange(n).expand(3, -1)
        if index.shape[1] != n:
            raise ValueError(f"{n} image tokens in a row do not match the grids {grid_thw.tolist()}")
        columns.append(start + index)
        start += int(index.max()) + 1
    if next(images, None) is not None:
        raise ValueError(f"{len(grid_thw)} images, but fewer stretches of image tokens in the prompt")
    return torch.cat(columns, dim=1)

def pad_completions(groups) -> tuple[torch.Tensor, torch.Tensor]:
    """B groups of N token-id tensors -> ids (B, N, T), right-padded, and mask (B, N, T), True on real tokens."""
    lengths = torch.tensor([[len(ids) for ids in group] for group in groups])  # (B, N)
    padded = pad_sequence([ids for group in groups for ids in group], batch_first=True)
    return padded.view(*lengths.shape, -1), torch.arange(padded.shape[1]) < lengths[..., None]

# ---- Log-probs without the logits of a whole batch in memory ---------------------------------------------------------

def token_log_probs(hidden, weight, targets, temperature: float = 1.0, forbidden=(), chunk: int = 256,
                    expected=None) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], (M,) float32, of hidden (M, D), weight (V, D).

    Works through `chunk` rows at a time, so that memory does not grow with M * V. expected (M,) is what the gradient of
    the loss by these log-probs will be, where that is known: see TokenLogProbs.
    """
    forbidden = torch.tensor(forbidden, dtype=torch.long, device=hidden.device)
    return TokenLogProbs.apply(hidden, weight, targets, expected, (temperature, forbidden, chunk))

class TokenLogProbs(torch.autograd.Function):
    """Keeps no logits for the backward pass, which computes them once more, unless told the gradient that will arrive.

    It is known beforehand for one update per sampling and for cross-entropy. Then a single pass computes log-probs and
    gradients, and backward only checks that what was `expected` arrived.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, expected, settings):
        ctx.settings, ctx.expected = settings, expected
        ctx.save_for_backward(hidden, weight, targets)
        values, *ctx.gradients = log_probs_by_chunk(hidden, weight, targets, *settings, grad=expected)
        return values

    @staticmethod
    def backward(ctx, grad):
        guess, gradients, ctx.expected = ctx.expected, ctx.gradients, None
        if guess is None or not torch.allclose(grad, guess, rtol=1e-5, atol=0):
            _, *gradients = log_probs_by_chunk(*ctx.saved_tensors, *ctx.settings, grad=grad)
        ctx.gradients = None
        return *gradients, None, None, None

def log_probs_by_chunk(hidden, weight, targets, temperature, forbidden, chunk, grad=None):
    """Log-probs (M,), and the gradients of hidden (M, D) and weight (V, D) if that of the log-probs (M,) is given."""
    values = hidden.new_empty(len(hidden), dtype=torch.float32)
    grad_hidden = grad_weight = None
    if grad is not None:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    space = values.new_empty(min(chunk, len(hidden)), len(weight))
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        h, target = hidden[part], targets[part, None]
        logits = scaled_logits(h, weight, temperature, forbidden, space)  # (chunk, V)
        at_target, top = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
        exp = logits.sub_(top).exp_()  # in place: a second chunk of this size would be much memory
        total = exp.sum(dim=-1, keepdim=True)
        values[part] = (at_target - top - total.log())[:, 0]
        if grad is not None:
            g = grad[part, None] / temperature
            d_logits = exp.mul_(-g / total).scatter_add_(1, target, g).to(weight.dtype)  # g * (one-hot - softmax)
            grad_hidden[part] = d_logits @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(d_logits.T, h)
            else:
                grad_weight += product(d_logits.T, h)
    return values, grad_hidden, None if grad is None else grad_weight.to(weight.dtype)

def scaled_logits(hidden, weight, temperature: float, forbidden, space=None) -> torch.Tensor:
    """Float32 logits (M, V) / temperature with forbidden tokens at -inf: the one definition of the policy's softmax.
    They are written into `space` (at least M, V), if given: chunk after chunk needs no new memory."""
    logits = product(hidden, weight.T, out=None if space is None else space[: len(hidden)])
    if temperature != 1:
        logits.div_(temperature)
    return logits.index_fill_(1, forbidden, -torch.inf)

def product(a, b, out=None) -> torch.Tensor:
    """a @ b, of two matrices or two batches, in float32. Half-precision factors need no copy for that on a GPU, whose
    matrix units add up in float32; a CPU is faster in float32 anyway."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype != torch.float32 and a.is_cuda:
        return multiply(a, b, out_dtype=torch.float32, out=out)
    return multiply(a.float(), b.float(), out=out)

# ---- Sampling --------------------------------------------------------------------------------------------------------

@dataclass
class Completion:
    """What was sampled: ids (T,) with the end token if there is one, their log-probs (T,) under the sampling
    distribution, and whether it ended by itself (False = cut off at the length limit)."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    finished: bool

def generate(network: QwenVL, prompts, num_generations: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
             top_p: float = 1.0, top_k: int = 0, seeds=None, cuda_graph: bool = True) -> list[list[Completion]]:
    """Sample num_generations completions of each prompt; temperature 0 is greedy decoding.

    `seeds` holds one integer per prompt (default 0, 1, ...): it decides every token of that prompt's rollouts, whatever
    else is in the batch. Each prompt is run once; finished rows leave the batch. `cuda_graph` changes only the time.
    """
    seeds, groups = list(seeds or range(len(prompts))), [None] * len(prompts)
    for batch in similar_lengths([len(prompt.ids) for prompt in prompts]):
        uniform = uniform_draws([seeds[i] for i in batch], num_generations, max_new_tokens)
        with torch.inference_mode():  # no_grad, and a little faster for small operations
            decoder = Decoder(network, [prompts[i] for i in batch], num_generations, max_new_tokens, cuda_graph)
            ids, logprobs = sample_rows(decoder, uniform.to(network.head_weight.device), temperature, top_p, top_k)
        ids, logprobs = ids.cpu().clone(), logprobs.cpu().clone()  # cloned: fit for autograd again
        ended = torch.isin(ids, torch.tensor(network.stop_tokens))  # (max_new_tokens, B*N)
        rows = []
        for r, finished in enumerate(ended.any(dim=0).tolist()):
            length = int(ended[:, r].int().argmax()) + 1 if finished else max_new_tokens
            rows.append(Completion(ids[:length, r], logprobs[:length, r], finished))
        for i in batch:
            groups[i], rows = rows[:num_generations], rows[num_generations:]
    return groups

def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Indices in batches, from the shortest on, each with its longest at most twice its shortest. Less padding would
    mean more batches, and a step of decoding costs nearly the same for few rows as for many."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[i] > 2 * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(i)
    return batches

CAPTURED_ON = ("cuda",)  # where the decoding step becomes a graph
LOOK_EVERY = {"cpu": 1, "cuda": 8}  # tokens from one look for finished rows to the next: a look waits for the GPU
DROP_BELOW = {"cpu": 0.8, "cuda": 0.5}  # they go when slots can shrink to this share: that means another graph

def sample_rows(decoder: "Decoder", uniform, temperature: float, top_p: float, top_k: int):
    """Token ids and log-probs, (max_new_tokens, B*N) each; what follows a row's end token means nothing."""
    network, cache, device = decoder.network, decoder.cache, uniform.device
    forbidden = torch.tensor(network.forbidden_tokens, dtype=torch.long, device=device)
    stop = torch.tensor(network.stop_tokens, dtype=torch.long, device=device)
    ids = torch.zeros(uniform.shape, dtype=torch.long, device=device)
    logprobs = torch.zeros(uniform.shape, device=device)
    hidden = decoder.prefill()  # (B*N, D)
    row = torch.arange(len(hidden), device=device)  # which completion a slot of the batch works on
    alive = torch.ones_like(row, dtype=torch.bool)  # slots that have not finished
    for t in range(len(uniform)):
        logits = scaled_logits(hidden, network.head_weight, temperature or 1.0, forbidden)
        tokens, values = sample_tokens(logits, uniform[t, row], temperature == 0, top_p, top_k)
        ids[t, row], logprobs[t, row] = tokens, values
        alive &= ~torch.isin(tokens, stop)
        if t % LOOK_EVERY[device.type] == 0:
            if not alive.any():
                break
            keep = rows_worth_keeping(alive.view(cache.B, cache.N), DROP_BELOW[device.type])
            if keep is not None:
                decoder.keep(*keep)
                tokens, alive, row = (x[keep[1].flatten()] for x in (tokens, alive, row))
        if t + 1 < len(uniform):
            hidden = decoder.step(tokens)
    return ids, logprobs

class Decoder:
    """Runs prompts once, then one token of each of their rows at a time.

    On CUDA the step is captured as a graph: one launch instead of some 25 a layer. The first step of every new shape
    runs eagerly, which is also the warm-up that capturing needs.
    """

    def __init__(self, network: QwenVL, prompts, N: int, max_tokens: int, cuda_graph: bool = True):
        self.network, self.graph = network, None
        self.batch = PromptBatch.from_prompts(prompts, network.config, network.head_weight.device)
        self.captures = cuda_graph and self.batch.ids.device.type in CAPTURED_ON
        layers = network.config.text_config.num_hidden_layers
        self.cache = KVCache(layers, self.batch.lengths, N, max_tokens, fixed=self.captures)
        self.position = self.batch.next_position.repeat_interleave(N)  # (B*N,) of the token that goes in next
        everywhere = torch.arange(int(self.position.max()) + max_tokens, device=self.position.device)
        self.rotary = network.model.rotary(everywhere.expand(3, -1))  # after the prompt all three axes are equal

    def prefill(self) -> torch.Tensor:
        """Final hidden states (B*N, D) of the prompts' last tokens, equal for all rows of a prompt."""
        states, lengths = self.network.prompt_states(self.batch, self.cache), self.batch.lengths
        last = states[torch.arange(len(states), device=states.device), lengths - 1]  # (B, D)
        return self.network.model.norm(last).repeat_interleave(self.cache.N, dim=0)

    def step(self, tokens) -> torch.Tensor:
        """Tokens (B*N,) -> final hidden states (B*N, D), valid until the next step."""
        if self.cache.advance() or self.graph is None:
            self.tokens = tokens.clone()
            hidden = self.run()
            self.graph = self.capture() if self.captures else None
        else:
            self.tokens.copy_(tokens)
            self.graph.replay()
            hidden = self.hidden
        self.position += 1
        return hidden

    def capture(self):
        """A graph of `run`, which reads and writes the tensors that are in use now; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.hidden = self.run()
        return graph

    def run(self) -> torch.Tensor:
        model = self.network.model
        return model.norm(model(model.embed_tokens(self.tokens), self.rotary.at(self.position), self.cache))

    def keep(self, prompts, rows):
        """Go on with some prompts (B',) and rows (B', N') only."""
        self.cache.keep(prompts, rows)
        self.position, self.graph = self.position[rows.flatten()], None

def uniform_draws(seeds, N: int, length: int) -> torch.Tensor:
    """One uniform number in [0, 1) for every token that may be sampled, (length, len(seeds)*N) float64.

    Drawn up front and per prompt: neither the batch's composition nor rows that leave it move the stream.
    """
    if not all(0 <= seed < 2**32 for seed in seeds):  # torch's CPU generator ignores higher bits
        raise ValueError(f"seeds must be from 0 to 2**32 - 1, got {list(seeds)}")
    draws = [torch.rand(N, length, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.cat(draws).T.contiguous()

def sample_tokens(logits, uniform, greedy: bool = False, top_p: float = 1.0, top_k: int = 0):
    """Draw a token from each row of logits (R, V) by uniform numbers (R,); returns tokens and log-probs, (R,) each.

    Inverts the cumulative distribution, which is many times faster than torch.multinomial at 150,000 words and makes
    the draw a function of one number. top_k keeps the k likeliest tokens, then top_p the smallest set of likeliest
    tokens whose probability reaches top_p; the log-prob is that of the distribution drawn from.
    """
    candidates = None
    if not greedy and (top_k or top_p < 1):
        logits, candidates = likeliest(logits, top_p, top_k)
    probabilities = logits.softmax(dim=-1)
    pick = logits.argmax(dim=-1, keepdim=True) if greedy else draw(probabilities, uniform[:, None])  # (R, 1)
    tokens = pick if candidates is None else candidates.gather(1, pick)
    return tokens[:, 0], probabilities.gather(1, pick).log()[:, 0]

def draw(probabilities, uniform, block: int = 128) -> torch.Tensor:
    """The index (R, 1) at which the cumulative probabilities (R, V) pass uniform numbers (R, 1) in [0, 1).

    In a large vocabulary, first the block of tokens and then the token inside it: the float64 sum is slow.
    """
    R, V = probabilities.shape
    if V <= 32 * block:
        return invert(probabilities.cumsum(dim=-1, dtype=torch.float64), uniform)
    whole = probabilities if V % block == 0 else F.pad(probabilities, (0, -V % block))
    blocks = whole.view(R, -1, block)
    sums = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # (R, blocks)
    which = invert(sums, uniform)
    below = F.pad(sums, (1, 0)).gather(1, which)
    inside = blocks.gather(1, which[..., None].expand(-1, -1, block))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    return which * block + invert(inside, (uniform * sums[:, -1:] - below) / inside[:, -1:])

def invert(cumulative, fraction) -> torch.Tensor:
    """The index (R, 1) at which cumulative sums (R, C) pass a fraction (R, 1) of their last: never that of a zero."""
    return torch.searchsorted(cumulative, fraction.clamp(0, 1 - 1e-12) * cumulative[:, -1:], right=True)

def likeliest(logits, top_p: float, top_k: int, first: int = 1024):
    """The candidates of top-k and top-p: logits (R, C), sorted, the excluded at -inf, and their token ids (R, C).

    A full sort of 150,000 logits is slow: it comes only where the nucleus does not fit into the `first` likeliest.
    """
    V = logits.shape[-1]
    count = min(top_k or (first if top_p < 1 else V), V)
    values, ids = logits.topk(count, dim=-1)
    if top_p < 1:
        log_z = values.logsumexp(-1, keepdim=True) if top_k else logits.logsumexp(-1, keepdim=True)
        reached = (values - log_z).exp().cumsum(dim=-1)
        if not top_k and count < V and (reached[:, -1] < top_p).any():
            return likeliest(logits, top_p, top_k, first=V)
        before = F.pad(reached[:, :-1], (1, 0))  # probability of all likelier tokens
        values = values.masked_fill(before >= top_p, -torch.inf)
    return values, ids

def rows_worth_keeping(alive, share: float = 0.8):
    """Decide whether dropping finished rows pays: None, or (prompts (B',), rows (B', N')) for Decoder.keep.

    alive (B, N). What remains must be a rectangle again: the prompts that still have a living row, and as many rows of
    each as the fullest of them needs. Copying the cache is worth it once that is at most a `share` of the slots.
    """
    B, N = alive.shape
    if alive.sum() > share * B * N:  # the common case, decided quickly
        return None
    living = alive.sum(dim=1)
    prompts, most = living.nonzero()[:, 0], int(living.max())
    if len(prompts) * most > share * B * N:
        return None
    living_first = alive[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return prompts, prompts[:, None] * N + living_first

# ---- Weights on disk -------------------------------------------------------------------------------------------------

# Files beside the weights that a copy of the checkpoint needs; anything else (code above all) is left behind.
SIDE_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "generation_config.json", "preprocessor_config.json", "chat_template*", "LICENSE*")

def load_pretrained(path, dtype=torch.float32, device="cpu", shard=None) -> QwenVL:
    """A QwenVL with the weights of a Hugging Face checkpoint directory: one safetensors file or several, hub names or
    those of transformers 5.

    `shard(network)`, if given, may split the still empty network's parameters by rows over processes (FSDP2): each then
    reads its own rows only. Raises CheckpointError if the checkpoint is absent, of another kind, or a tensor is
    missing, unknown or misshaped.
    """
    path, network = Path(path), empty_network(read_config(path)).to(dtype)  # every number comes from the files
    if shard is not None:
        shard(network)
    network.to_empty(device=device)
    network.stop_tokens, network.forbidden_tokens = special_tokens(path, network.config)
    files, ours, parameters = tensor_files(path), checkpoint_rows(network), dict(network.named_parameters())
    missing, unknown = sorted(ours.keys() - files), sorted(files.keys() - ours - {"lm_head.weight"})
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {unknown[0]}"
        raise CheckpointError(f"{path}: {what} ({len(missing)} missing, {len(unknown)} unknown): other weights")
    for name, (parameter_name, start, stop) in ours.items():
        parameter, (file, name_there) = parameters[parameter_name], files[name]
        with safe_open(file, "pt") as tensors, torch.no_grad():
            tensor, shape = tensors.get_slice(name_there), (stop - start, *parameter.shape[1:])
            if tuple(tensor.get_shape()) != shape:
                raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.get_shape())}, config.json says "
                                      f"{shape}: weights and config.json do not belong together")
            own, first = own_rows(parameter)
            low, high = max(start, first), min(stop, first + len(own))
            if low < high:
                own[low - first : high - first] = tensor[low - start : high - start].to(own)
    return network

def empty_network(config) -> QwenVL:
    """A network of shapes only, without memory: parameters on the meta device."""
    with torch.device("meta"):
        return QwenVL(config)

def own_rows(parameter) -> tuple[torch.Tensor, int]:
    """The rows of a parameter that this process holds, and which is the first: all, unless FSDP2 has split it."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    mesh = parameter.device_mesh
    return parameter.to_local(), -(-len(parameter) // mesh.size()) * mesh.get_local_rank()  # split as by torch.chunk

def save_pretrained(network: QwenVL, directory, source, dtype=torch.bfloat16, max_shard_size="5GB"):
    """Write a Hugging Face checkpoint: weights under their hub names, config.json, and `source`'s tokenizer files."""
    from huggingface_hub import save_torch_state_dict

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    tensors = {name: state[ours][start:stop].to("cpu", dtype, copy=True)
               for name, (ours, start, stop) in checkpoint_rows(network).items()}
    save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size)
    network.config.dtype = dtype
    network.config.save_pretrained(directory)
    for file in [file for pattern in SIDE_FILES for file in Path(source).glob(pattern)]:
        if not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)

def read_config(path):
    """config.json as transformers' Qwen2VLConfig or Qwen2_5_VLConfig, which know the hub's old and new layouts."""
    from transformers import AutoConfig  # takes seconds to import

    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json, so not a checkpoint directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/config.json: {' '.join(str(error).split())[:200]}") from None
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        raise CheckpointError(f"{path}/config.json: model_type {config.model_type!r}, not qwen2_vl or qwen2_5_vl")
    if "mrope_section" not in config.text_config.rope_parameters or config.text_config.use_sliding_window:
        raise CheckpointError(f"{path}/config.json: needs an mrope_section, and no sliding window")
    return config

def special_tokens(path: Path, config) -> tuple[list[int], list[int]]:
    """End tokens, from config.json and generation_config.json; tokens never to be sampled (see QwenVL)."""
    read = lambda name: json.loads(file.read_text("utf-8")) if (file := path / name).exists() else {}
    stop = [config.text_config.eos_token_id, read("generation_config.json").get("eos_token_id")]
    stop = {token for entry in stop if entry is not None for token in (entry if isinstance(entry, list) else [entry])}
    whole = read("tokenizer.json")
    words = list((whole["model"]["vocab"] if whole else read("vocab.json")).values())
    words += [token["id"] for token in whole.get("added_tokens", [])]
    words += map(int, read("tokenizer_config.json").get("added_tokens_decoder", {}))
    vocab_size = config.text_config.vocab_size
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    vision = {getattr(config, name, None) for name in names} - {None}
    return sorted(stop), sorted(vision | set(range(max(words, default=vocab_size - 1) + 1, vocab_size)))

def tensor_files(path: Path) -> dict:
    """Hub name of every tensor -> (file, its name there), of a single safetensors file or a sharded checkpoint."""
    found, index = {}, path / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
    for file in (path / Path(name).name for name in sorted(names)):  # .name: an index must not point elsewhere
        if not file.exists():
            raise CheckpointError(f"{path}: no {file.name} (only safetensors checkpoints are read)")
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # transformers 5 may have saved its own module paths
                    hub = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
                    found[hub] = (file, name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or not a safetensors file ({error})") from None
    return found

def checkpoint_rows(network: QwenVL) -> dict[str, tuple[str, int, int]]:
    """The checkpoint's name of every tensor -> (our parameter, first row, row after the last): a matrix here may be
    several there."""
    text, rows = network.config.text_config, {}
    head = text.hidden_size // text.num_attention_heads
    qkv = [n * head for n in (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)]
    for name, parameter in network.named_parameters():
        if ".self_attn.qkv." in name:
            parts = {name.replace("qkv", f"{x}_proj"): size for x, size in zip("qkv", qkv)}
        elif ".gate_up_proj." in name:
            parts = {name.replace("gate_up", x): len(parameter) // 2 for x in ("gate", "up")}
        else:
            parts = {name.replace(".self_attn.proj.", ".self_attn.o_proj."): len(parameter)}
        start = 0
        for part, size in parts.items():
            rows[part] = name, start, start + size
            start += size
    return rows
