"""A Qwen-VL checkpoint whose attention lets a group of completions share its prompt.

The network is transformers': Qwen2-VL, Qwen2.5-VL or dense Qwen3-VL. A prompt holds about 900 image
tokens and an answer about 60. Here a group of N completions is ONE sequence of P + N*T tokens
instead of N*(P + T), and an attention function of ours decides which token sees which:

                     prompt     completion 1   completion 2
    prompt           causal     -              -
    completion 1     all        causal         -
    completion 2     all        -              causal

The positions of each completion continue from its prompt's, as if no other completion were there.
The vision tower runs once, and all members' gradients meet in the prompt.

Shapes
    B   prompts in a batch               P   prompt tokens, right-padded to the longest
    N   completions of each prompt       T   completion tokens, right-padded
    R   rows being decoded, B*N          S   tokens of the flat sequence: B*P, then the completions'
    D   hidden size                      V   vocabulary          M   tokens to be scored
    H   query heads, K key/value heads, g = H/K query heads for each of them, E size of a head"""

import json
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Nothing is downloaded, and no code of a checkpoint runs.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
CHUNK = 256  # tokens whose logits are in memory at a time

class CheckpointError(ValueError):
    """A checkpoint that cannot be used; its one-line message names the file and the problem."""

# ---- The network -------------------------------------------------------------------------------
class GroupPolicy(nn.Module):
    """A transformers Qwen-VL network, `vlm`, that reads groups: prompts with their completions."""
    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm
        self.config = vlm.config
        for module in vlm.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(fused_rms_norm, module)
            if type(module).__name__.endswith("PatchEmbed"):
                module.forward = MethodType(patch_product, module)
        self.stop_tokens = []  # any of these ends a completion
        self.forbidden_tokens = []  # probability 0: vision tokens, rows past the tokenizer's last

    def forward(self, batch, completions, mask, temperature=1.0):
        """Float32 log-probs (B, N, T) of completions (B, N, T) under softmax(logits / temperature).

        mask (B, N, T) is True on tokens and False on the padding behind them, which gets 0."""
        _, N, T = completions.shape
        B, P = batch.ids.shape
        # Token t of a completion predicts token t + 1, and is an input only if mask has t + 1.
        attend = GroupAttention(batch.lengths, P, is_input=mask[:, :, 1:])
        b, n, t = attend.where  # prompt, completion and place of each input
        prompt_positions, next_position = self.positions(batch)
        after_prompt = (next_position[b] + t).expand(3, -1)  # M-RoPE's axes are equal in text
        positions = torch.cat([prompt_positions, after_prompt], dim=1)  # (3, S)
        hidden = self.hidden_states(batch, positions, attend, completions[b, n, t])  # (S, D)
        # Which row of `hidden` predicts each token: the prompt's last one, then those of inputs.
        predictor = batch.last_tokens()[:, None, None].repeat(1, N, T)
        inputs = torch.arange(B * P, len(hidden), device=mask.device)
        predictor[b, n, t + 1] = inputs
        tokens = mask.nonzero(as_tuple=True)
        states = hidden.index_select(0, predictor[tokens])  # (M, D)
        forbidden = torch.LongTensor(self.forbidden_tokens).to(mask.device)
        values = TokenLogProbs.apply(states, self.vlm.lm_head.weight, completions[tokens],
                                     temperature, forbidden)  # (M,)
        return values.new_zeros(mask.shape).index_put(tokens, values)

    def hidden_states(self, batch, positions, attend, completion_ids):
        """Final hidden states (S, D) of the prompts and completions, at `positions` (3, S)."""
        ids = torch.cat([batch.ids.flatten(), completion_ids])
        # Where images end, on the CPU: a GPU tensor would make every vision block wait.
        patches = batch.grid_thw.cpu().prod(dim=1)  # (images,)
        ends = patches.cumsum(dim=0, dtype=torch.int32)
        output = self.vlm.model(input_ids=ids[None], position_ids=positions[:, None],
                                pixel_values=batch.pixels, image_grid_thw=batch.grid_thw,
                                image_cu_seqlens=F.pad(ends, (1, 0)), use_cache=False,
                                attend=attend)
        return output.last_hidden_state[0]

    def positions(self, batch):
        """M-RoPE positions (3, B*P) of prompts, and that of the first completion token (B,)."""
        # On the CPU, where get_rope_index's loops need not wait for a GPU.
        place = torch.arange(batch.ids.shape[1])
        real = place < batch.lengths.cpu()[:, None]  # (B, P)
        ids = batch.ids.cpu()
        is_image = (ids == self.config.image_token_id).int()
        positions, _ = self.vlm.model.get_rope_index(ids, is_image, batch.grid_thw.cpu(),
                                                     attention_mask=real)  # (3, B, P)
        positions = positions.to(batch.ids.device)
        return positions.flatten(1), positions.amax(dim=(0, 2)) + 1

def fused_rms_norm(module, x):
    """RMSNorm in one operation; as transformers writes it, it takes a fifth of a small step."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)

def patch_product(module, pixels):
    """A convolution whose stride is its kernel, as the matrix product that it is."""
    weight = module.proj.weight.flatten(1)  # (width, channels * time * height * width)
    return F.linear(pixels.to(weight.dtype), weight, module.proj.bias)

class PromptBatch(NamedTuple):
    """B prompts as tensors; one or more images in all, in the prompts' order."""
    ids: torch.Tensor  # (B, P) right-padded
    lengths: torch.Tensor  # (B,) real tokens of each prompt
    pixels: torch.Tensor  # (patches, channels * time * height * width)
    grid_thw: torch.Tensor  # (images, 3) in patches

    @classmethod
    def from_prompts(cls, prompts, config=None, device="cpu"):
        """Build from objects with .ids (P,), .pixels (patches, ...) and .grid_thw (images, 3)."""
        ids = pad_sequence([prompt.ids for prompt in prompts], batch_first=True)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        pixels = torch.cat([prompt.pixels for prompt in prompts])
        grid_thw = torch.cat([prompt.grid_thw for prompt in prompts])
        return cls(*[tensor.to(device) for tensor in (ids, lengths, pixels, grid_thw)])

    def last_tokens(self):
        """Where the prompts' last tokens are in the flat sequence, (B,)."""
        B, P = self.ids.shape
        return self.lengths - 1 + P * torch.arange(B, device=self.ids.device)

def pad_completions(groups):
    """B groups of N token-id tensors -> ids (B, N, T), right-padded, mask True on real tokens."""
    lengths = torch.tensor([[len(ids) for ids in group] for group in groups])  # (B, N)
    ids = pad_sequence([ids for group in groups for ids in group], batch_first=True)  # (B*N, T)
    mask = torch.arange(ids.shape[1]) < lengths[..., None]  # (B, N, T)
    return ids.view(mask.shape), mask

# ---- Which token sees which --------------------------------------------------------------------
def group_attention(module, query, key, value, attention_mask, attend=None, **kwargs):
    """The attention function that every text layer runs: q (1, H, S, E), k and v (1, K, S, E)."""
    output = attend(module.layer_idx, query[0], key[0], value[0])  # (S, H, E)
    return output[None], None

transformers.AttentionInterface.register("visurf", group_attention)
ATTENTION = {"text_config": "visurf", "vision_config": "sdpa"}
# CuDNN's kernel plans anew for every shape, and its gradient can be NaN (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)

class GroupAttention:
    """Causal attention inside each prompt; each completion sees its own prompt and its own past.

    The flat sequence holds B*P prompt tokens and then the completions' inputs, those that are True
    in is_input (B, N, T): T is one less here, as a last token is no input. Under a causal mask, no
    prompt token sees its padding. store(layer, k, v) gets the keys and values of the prompts."""
    def __init__(self, lengths, P, is_input, store=None):
        self.lengths = lengths
        self.P = P
        self.store = store
        self.bias = None
        self.B, self.N, self.T = is_input.shape
        # nonzero waits for the GPU: once here; a mask as index would wait in every layer.
        self.where = is_input.nonzero(as_tuple=True)

    def __call__(self, layer, q, k, v):
        """q (H, S, E), k and v (K, S, E) of all tokens -> their outputs (S, H, E)."""
        prompt_q, prompt_k, prompt_v = map(self.prompts, (q, k, v))  # (B, H or K, P, E)
        if self.store is not None:
            self.store(layer, prompt_k, prompt_v)
        output = F.scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True,
                                                enable_gqa=True)
        output = output.transpose(1, 2).flatten(0, 1)  # (B*P, H, E)
        if len(self.where[0]) == 0:
            return output
        keys = self.with_prompt(prompt_k, k)
        values = self.with_prompt(prompt_v, v)
        completions = self.attend_completions(self.completions(q), keys, values)
        return torch.cat([output, completions])

    def with_prompt(self, prompt_x, x):
        """Each completion's keys or values behind a copy of its prompt's: (B*N, K, P+T, E)."""
        copies = prompt_x.repeat_interleave(self.N, dim=0)
        return torch.cat([copies, self.completions(x)], dim=2)

    def attend_completions(self, q, keys, values):
        """Completions' q (B*N, H, T, E), keys and values (B*N, K, P+T, E) -> (S - B*P, H, E)."""
        rows, H, T, E = q.shape
        K = keys.shape[1]
        g = H // K
        if self.bias is None:
            self.bias = self.make_bias(g, q.dtype)
        # With a mask, CUDA's fused kernels lack GQA: the g heads of a key become g*T queries.
        q = q.reshape(rows, K, g * T, E)
        output = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)
        # Not view: the memory-efficient kernel of CUDA returns another layout than the CPU's.
        output = output.reshape(self.B, self.N, H, T, E).transpose(2, 3)
        return output[self.where]

    def make_bias(self, g, dtype):
        """(B*N, 1, g*T, P+T), shared by all layers: 0 on what a token may see, and else -inf."""
        place = torch.arange(self.P + self.T, device=self.lengths.device)
        real = (place < self.lengths[:, None]) | (place >= self.P)  # (B, P+T)
        past = place <= place[self.P :, None]  # (T, P+T)
        bias = torch.where(real[:, None] & past, 0.0, -torch.inf).to(dtype)  # (B, T, P+T)
        # CUDA wants rows that begin at multiples of 8 numbers: this is a view of padded ones.
        bias = F.pad(bias, (0, -len(place) % 8))
        bias = bias.repeat(1, g, 1)  # (B, g*T, padded)
        return bias.repeat_interleave(self.N, dim=0)[:, None, :, : len(place)]

    def prompts(self, x):
        """The prompts' part of x (heads, S, E), as (B, heads, P, E)."""
        tokens = x[:, : self.B * self.P]  # (heads, B*P, E)
        return tokens.unflatten(1, (self.B, self.P)).transpose(0, 1)

    def completions(self, x):
        """The completions' part of x (heads, S, E), padded: (B*N, heads, T, E)."""
        tokens = x[:, self.B * self.P :].transpose(0, 1)  # (S - B*P, heads, E)
        padded = x.new_zeros(self.B, self.N, self.T, *tokens.shape[1:])
        return padded.index_put(self.where, tokens).flatten(0, 1).transpose(1, 2)

# ---- Log-probs without the logits of a whole batch in memory -----------------------------------
class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden (M, D) @ weight (V, D).T / temperature)[targets (M,)], (M,) float32."""
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden):
        totals = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
        values = torch.empty_like(totals)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = scaled_logits(hidden[part], weight, temperature, forbidden)
            totals[part] = logits.logsumexp(dim=-1, keepdim=True)
            values[part] = logits.gather(1, targets[part, None]) - totals[part]
        ctx.save_for_backward(hidden, weight, targets, forbidden, totals)
        ctx.temperature = temperature
        return values[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        # Logits are computed again, as they would fill the memory.
        hidden, weight, targets, forbidden, totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # In float32: autograd casts it once to weight's type. Casts per chunk err by up to 1 %.
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            g = gradient[part, None] / ctx.temperature
            logits = scaled_logits(hidden[part], weight, ctx.temperature, forbidden)
            # d log p(target) / d logits = one-hot(target) - softmax
            softmax = logits.sub_(totals[part]).exp_()
            d_logits = softmax.mul_(-g).scatter_add_(1, targets[part, None], g)
            d_logits = d_logits.to(weight.dtype)
            grad_hidden[part] = d_logits @ weight
            if grad_weight is not None:
                grad_weight += product(d_logits.T, hidden[part])
        return grad_hidden, grad_weight, None, None, None

def scaled_logits(hidden, weight, temperature, forbidden):
    """Logits (M, V) of the policy in float32; a forbidden token has probability 0."""
    logits = product(hidden, weight.T).div_(temperature)
    return logits.index_fill_(1, forbidden, -torch.inf)

def product(a, b):
    """a @ b, of two matrices or two batches of matrices, in float32."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cuda and a.dtype != torch.float32:
        # A GPU adds up half-precision products in float32, without a float32 copy of a or b.
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())

# ---- Sampling ----------------------------------------------------------------------------------
class Completion(NamedTuple):
    """A sampled completion; its tensors are on the CPU."""
    ids: torch.Tensor  # (T,) with the end token, if there is one
    logprobs: torch.Tensor  # (T,) under softmax(logits / temperature); greedy: temperature 1
    finished: bool  # False: cut off at the length limit

@torch.inference_mode()
def generate(network, prompts, num_generations=1, max_new_tokens=256, temperature=1.0, seeds=None,
             cuda_graph=True):
    """Sample num_generations Completions of each prompt; temperature 0 is greedy decoding.
    seeds: an integer below 2**32 for each prompt (default 0, 1, ...) decides all random numbers
    of its rollouts, whatever else is in the batch. cuda_graph changes time and rounding."""
    if not prompts:
        return []
    decoder = Decoder(network, prompts, num_generations, max_new_tokens, cuda_graph)
    device = decoder.position.device
    stop = torch.LongTensor(network.stop_tokens).to(device)
    forbidden = torch.LongTensor(network.forbidden_tokens).to(device)
    # In [0, 1), drawn for each prompt by itself: others in the batch do not move the stream.
    uniforms = []
    for seed in seeds or range(len(prompts)):
        generator = torch.Generator().manual_seed(seed)
        uniforms.append(torch.rand(num_generations, max_new_tokens, generator=generator,
                                   dtype=torch.float64))
    uniform = torch.cat(uniforms).T.to(device)[..., None]  # (length, R, 1)
    ids = []
    logprobs = []
    running = torch.ones(uniform.shape[1], dtype=torch.bool, device=device)  # (R,)
    hidden = decoder.prefill()  # (R, D)
    for t in range(max_new_tokens):
        logits = scaled_logits(hidden, network.vlm.lm_head.weight, temperature or 1.0, forbidden)
        probabilities = logits.softmax(dim=-1)  # (R, V)
        if temperature == 0:
            tokens = logits.argmax(dim=-1, keepdim=True)
        else:
            tokens = draw(probabilities, uniform[t])
        ids.append(tokens[:, 0])
        logprobs.append(probabilities.gather(1, tokens).log()[:, 0])
        running &= ~torch.isin(ids[t], stop)
        # On a GPU only now and then, as the check waits for it.
        check_now = t % 8 == 0 or device.type == "cpu"
        if t + 1 == max_new_tokens or (check_now and not running.any()):
            break
        hidden = decoder.step(ids[t])
    ids = torch.stack(ids, dim=1).cpu()  # (R, length)
    logprobs = torch.stack(logprobs, dim=1).cpu()
    if not logprobs.isfinite().all():
        raise CheckpointError("log-probs are not finite: damaged weights, or high --learning_rate")
    ended = torch.isin(ids, stop.cpu())
    groups = [[] for _ in prompts]
    for r, finished in enumerate(ended.any(dim=1).tolist()):
        length = ids.shape[1]
        if finished:
            length = int(ended[r].int().argmax()) + 1  # argmax: the place of the first True
        completion = Completion(ids[r, :length], logprobs[r, :length], finished)
        groups[r // num_generations].append(completion)
    return groups

def draw(probabilities, uniform):
    """Index (R, 1) where the cumulative probabilities (R, V) pass uniform (R, 1) in [0, 1)."""
    # torch.multinomial takes 143 ms for 32 rows of 152,000 words on a CPU; this takes 7.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # Stay below the total: the last words may have probability 0.
    target = uniform.clamp(max=1 - 1e-12) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    # NaN gives an arbitrary word, and its log-prob is NaN too.
    return index.clamp(max=probabilities.shape[1] - 1)

class Decoder:
    """Runs each prompt once, then one token of each row a step, with a KV cache.
    A prompt's keys and values are kept once, for all its rows."""
    def __init__(self, network, prompts, N, max_tokens, cuda_graph):
        device = network.vlm.lm_head.weight.device
        self.network = network
        self.batch = PromptBatch.from_prompts(prompts, network.config, device)
        self.B, self.P = self.batch.ids.shape
        self.N = N
        self.max_tokens = max_tokens
        # A graph's shapes are fixed: attention then reads all slots, and empty ones are masked.
        self.captures = cuda_graph and device.type == "cuda"
        self.graph = None
        self.prompts = {}  # by layer: keys (K*B, E, P) and values (K*B, P, E)
        self.rows = {}  # by layer: keys and values in one, (2, K*R, max_tokens, E)
        self.t = -1  # the slot that the current token fills
        self.window = max_tokens  # how many slots attention reads
        # A graph reads these tensors: they are changed in place.
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # t
        self.tokens = torch.zeros(self.B * N, dtype=torch.long, device=device)
        # To be added to scores: -inf on the padding of prompts and on slots that are still empty.
        place = torch.arange(self.P + max_tokens, device=device)
        mask = torch.where(place < self.batch.lengths[:, None], 0.0, -torch.inf)
        K = network.config.text_config.num_key_value_heads
        self.mask = mask.repeat(K, 1)[:, None]  # (K*B, 1, P + max_tokens)
        self.prompt_positions, next_position = network.positions(self.batch)
        self.position = next_position.repeat_interleave(N)  # (R,) of the token that goes in next

    def prefill(self):
        """Hidden states (R, D) of the prompts' last tokens, equal for all rows of a prompt."""
        batch = self.batch
        no_completions = batch.ids.new_zeros(self.B, 1, 0, dtype=torch.bool)
        attend = GroupAttention(batch.lengths, self.P, no_completions, self.store_prompts)
        hidden = self.network.hidden_states(batch, self.prompt_positions, attend, self.tokens[:0])
        return hidden[batch.last_tokens()].repeat_interleave(self.N, dim=0)

    def store_prompts(self, layer, k, v):
        """Keep a layer's prompt keys and values, (B, K, P, E) each, and make room for the rows'."""
        k = k.transpose(0, 1).flatten(0, 1)  # (K*B, P, E)
        v = v.transpose(0, 1).flatten(0, 1)
        self.prompts[layer] = (k.mT.contiguous(), v)
        rows = len(k) * self.N  # K*R
        E = k.shape[-1]
        self.rows[layer] = k.new_zeros(2, rows, self.max_tokens, E)

    def step(self, tokens):
        """Tokens (R,) -> hidden states (R, D), valid until the next step."""
        self.t += 1
        self.slot.fill_(self.t)
        self.mask[..., self.P + self.t] = 0
        self.tokens.copy_(tokens)
        if self.captures:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        else:
            self.window = self.t + 1
            self.hidden = self.decode()
        self.position += 1
        return self.hidden

    def capture(self):
        """Record `decode` as a graph, in which it writes to self.hidden."""
        self.decode()  # at first use, libraries allocate what cannot be recorded
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.hidden = self.decode()  # recorded, not computed

    def decode(self):
        """One pass of the language model over the current token of every row."""
        text = self.network.vlm.model.language_model
        output = text(self.tokens[None], position_ids=self.position.expand(3, 1, -1),
                      use_cache=False, attend=self.attend)
        return output.last_hidden_state[0]

    def attend(self, layer, q, k, v):
        """One token of each row: q (H, R, E), k and v (K, R, E) -> outputs (R, H, E)."""
        K, R, E = k.shape
        g = len(q) // K
        own = torch.stack([k, v]).view(2, K * R, 1, E)
        cache = self.rows[layer].index_copy_(2, self.slot, own)  # (2, K*R, max_tokens, E)
        keys, values = cache[:, :, : self.window]
        prompt_keys, prompt_values = self.prompts[layer]
        # As (K, B, N, g): on_prompt takes q by prompt (N*g queries each), on_own by row (g each).
        q = (q * E**-0.5).view(K, g, R, E)
        q = q.transpose(1, 2).reshape(K * R, g, E)
        on_prompt = product(q.view(K * self.B, -1, E), prompt_keys)  # (K*B, N*g, P)
        on_own = product(q, keys.mT)  # (K*R, g, window)
        on_own = on_own.view(K * self.B, -1, self.window)
        scores = torch.cat([on_prompt, on_own], dim=-1)
        mask = self.mask[..., : self.P + self.window]
        weights = (scores + mask).softmax(dim=-1).to(q.dtype)
        for_prompt, for_own = weights.split([self.P, self.window], dim=-1)
        output = torch.bmm(for_prompt, prompt_values).view(K * R, g, E)
        output = output.baddbmm(for_own.reshape(K * R, g, -1), values)
        output = output.view(K, R, g, E).transpose(0, 1)
        return output.reshape(R, K * g, E)

# ---- Files -------------------------------------------------------------------------------------
def load_pretrained(path, dtype=torch.float32, device="cpu"):
    """A GroupPolicy of a checkpoint directory, in `dtype` ("auto": its own), or CheckpointError."""
    check_checkpoint(path)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # no table of missing tensors: we name one
    try:
        vlm, report = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION, use_safetensors=True,
            output_loading_info=True, **LOCAL)
        for kind in ("missing_keys", "unexpected_keys"):
            if report[kind]:
                raise ValueError(f"{kind} in its safetensors files: {sorted(report[kind])[0]}")
        network = GroupPolicy(vlm.to(device)).eval()
        find_special_tokens(network, Path(path))
    except Exception as error:  # foreign files make their readers raise nearly anything
        raise CheckpointError(f"{path}: {error!s:.300}") from None
    return network

def check_checkpoint(path):
    """CheckpointError, saying what the directory is, unless it is a Qwen-VL checkpoint."""
    path = Path(path)
    if list(path.glob("model_world_size_*")):
        raise CheckpointError(f"{path}: verl's shards: merge them with verl.model_merger")
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type {kind!r} is none of {', '.join(MODEL_TYPES)}")
    if "quantization_config" in config:
        raise CheckpointError(f"{path}: quantised (AWQ, GPTQ): give the weights it was made from")

def find_base(path):
    """The name of the checkpoint that a folder of LoRA adapters is for; else the path itself."""
    config = Path(path) / "adapter_config.json"
    if not config.exists():
        return path
    if not config.with_name("adapter_model.safetensors").exists():
        raise CheckpointError(f"{config}: no adapter_model.safetensors beside it")
    return str(read_json(config).get("base_model_name_or_path"))

def add_adapters(network, folder, rank=None, base=None):
    """Add a folder's LoRA adapters, or, if it has none, new ones of this rank; freeze the rest."""
    vlm = network.vlm
    try:
        import peft
        if find_base(folder) == folder:
            # No adapters yet. Peft saves this name with them, for find_base.
            vlm.name_or_path = str(base)
            vlm.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank,
                                            target_modules=r".*language_model.*_proj"))
        else:
            report = vlm.load_adapter(str(folder), is_trainable=True)
            if report.missing_keys or report.unexpected_keys:
                raise ValueError("its two files do not fit together")
    except Exception as error:  # foreign files make their readers raise nearly anything
        raise CheckpointError(f"{folder}: unusable LoRA adapters ({error!s:.300})") from None
    for weight in vlm.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()

def find_special_tokens(network, path):
    """Read which tokens end a completion, and which can never be in one."""
    stop = network.vlm.generation_config.eos_token_id or []
    network.stop_tokens = stop if isinstance(stop, list) else [stop]
    for name in ("image", "video", "vision_start", "vision_end", "vision"):
        token = getattr(network.config, f"{name}_token_id", None)
        if token is not None:
            network.forbidden_tokens.append(token)
    size = network.config.text_config.vocab_size
    if (path / "tokenizer_config.json").exists():
        words = transformers.AutoTokenizer.from_pretrained(path, **LOCAL).get_vocab()
        # Embeddings have more rows than there are words: 151,936 for 151,657 in Qwen2-VL.
        network.forbidden_tokens += range(max(words.values()) + 1, size)
        # Merged checkpoints may name only <|endoftext|>, which no answer ends with.
        network.stop_tokens = [*network.stop_tokens, words["<|im_end|>"]]
    wrong = {*network.stop_tokens, *network.forbidden_tokens} - set(range(size))
    if wrong:
        raise ValueError(f"its JSON files name tokens that are no numbers below {size}: {wrong}")

def read_json(path):
    """The object in a JSON file; CheckpointError names a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: missing or damaged; restore it ({content!r:.80})")
    return content

def read_files(path):
    """What a checkpoint has beside weights: configs, tokenizer, template, licence; never code."""
    files = {}
    for file in Path(path).iterdir():
        kept = file.suffix in (".json", ".jinja", ".txt") or file.name.startswith("LICENSE")
        if kept and file.is_file() and not file.name.endswith((".index.json", "_state.json")):
            files[file.name] = file.read_bytes()
    return files

def save_pretrained(network, directory, source, dtype=torch.bfloat16):
    """Write a checkpoint with the other files of `source`, a path or a dict; adapters go alone."""
    directory = Path(directory)
    files = source if isinstance(source, dict) else read_files(source)
    has_adapters = hasattr(network.vlm, "peft_config")
    if has_adapters:
        files = {}
        dtype = torch.float32
    state = {}
    for name, weight in network.vlm.named_parameters():
        if not has_adapters or "lora_" in name:
            state[name] = weight.detach().to("cpu", dtype, copy=True)
    network.vlm.save_pretrained(directory, state_dict=state)
    for name, content in files.items():
        # config.json, too: transformers 4 cannot read the one that transformers 5 has written.
        (directory / name).write_bytes(content)
