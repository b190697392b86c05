"""Speed and memory of ViSurf's sampler and update, beside transformers doing the same work.

    python extras/bench.py                                # everything; about 45 minutes on two cores
    python extras/bench.py sampling update --size small   # some sections, one network size
    python extras/bench.py --cuda                         # the part for a GPU: shapes of Qwen2-VL-2B and 7B, bfloat16

Both sides load one random checkpoint and get the same inputs, alternately, in this process, after a check that they
compute the same thing. transformers runs with every setting that could help it, each is timed, and the fastest one
counts; rows "by hand" let it share the prompt's cache or the vision tower's features, which its user would have to
write. A ratio is taken inside each round, so that a machine whose speed drifts does not move it; shown are medians
(lowest–highest of the rounds). Nothing here is a test: no duration is asserted anywhere.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers

import model
import visurf
from memory import config_of, empty_network

IMAGE, VISION_START, VISION_END = 3, 4, 5
SIZES = {  # about 1 M parameters, and about 100 M with the vocabulary of Qwen2-VL
    "small": {"text": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "vocab_size": 1024},
              "vision": {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128}},
    "large": {"text": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
                       "num_key_value_heads": 2, "vocab_size": 151_936},
              "vision": {"depth": 6, "embed_dim": 256, "num_heads": 4, "hidden_size": 512}}}

# transformers' settings for sampling. The last one runs each prompt once and repeats its cache for the N rows.
BY_HAND = "by hand"
CACHED_PROMPT = f"prompt cached {BY_HAND}"
CACHES = ("dynamic cache", "static cache", CACHED_PROMPT)


# ---- Networks and inputs ---------------------------------------------------------------------------------------------


def make_config(family: str, text: dict, vision: dict, tied: bool = True):
    """transformers' configuration of a Qwen-VL network with these shapes."""
    classes = {"qwen2_vl": transformers.Qwen2VLConfig, "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
               "qwen3_vl": transformers.Qwen3VLConfig}
    head = text["hidden_size"] // text["num_attention_heads"]
    # As in the checkpoints: a quarter of the frequencies for time, and three eighths each for height and width.
    rope = {"rope_type": "default", "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16], "rope_theta": 1e6}
    more = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        more["head_dim"] = head
    return classes[family](text_config={**text, **more, "rope_parameters": rope}, vision_config=vision,
                           tie_word_embeddings=tied, image_token_id=IMAGE, video_token_id=6,
                           vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)


def make_networks(size: str):
    """(transformers' network, ours) with the same random weights, each loaded by its own side from the same files."""
    config = make_config("qwen2_vl", **SIZES[size])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
        theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory).eval()
        ours = model.load_pretrained(directory)
    # Rivals run transformers as it is: SDPA in both towers, and none of the forwards that we replace.
    for part in (theirs.model.language_model, theirs.model.visual):
        assert part.config._attn_implementation == "sdpa", part.config._attn_implementation
    assert not any("forward" in vars(module) for module in theirs.modules())
    # Nothing ends a completion but its length, and every token may be sampled, on both sides.
    ours.stop_tokens = []
    ours.forbidden_tokens = []
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs, ours


def random_network(config, dtype=torch.float32, device="cpu") -> model.GroupPolicy:
    """Our network with random weights, made where it is used: no file, no copy."""
    network = empty_network(config, dtype)
    network.to_empty(device=device)
    network.vlm.tie_weights()
    torch.manual_seed(0)
    network.vlm.apply(network.vlm._init_weights)
    return network.eval()


def make_prompts(count: int, side: int, patch: int = 14, words: int = 27) -> list:
    """Prompts with one image of side x side pixels and some words, as our network takes them."""
    patches = side // patch  # along a side
    prompts = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(10, 1000, (words,), generator=generator).tolist()
        ids = [text[0], VISION_START] + [IMAGE] * (patches // 2) ** 2 + [VISION_END] + text
        pixels = torch.randn(patches**2, 3 * 2 * patch**2, generator=generator)
        prompts.append(SimpleNamespace(ids=torch.tensor(ids), pixels=pixels,
                                       grid_thw=torch.tensor([[1, patches, patches]])))
    return prompts


def random_completions(N: int, T: int) -> torch.Tensor:
    """Token ids (N, T) of words that are in every vocabulary."""
    return torch.randint(10, 1000, (N, T), generator=torch.Generator().manual_seed(0))


def their_inputs(prompts, completions=None) -> dict:
    """transformers' inputs for prompts of one length, each followed by its row of completions (rows, T) if given."""
    ids = torch.stack([prompt.ids for prompt in prompts])
    if completions is not None:
        ids = torch.cat([ids, completions], dim=1)
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.cat([prompt.pixels for prompt in prompts]),
            "image_grid_thw": torch.cat([prompt.grid_thw for prompt in prompts])}


# ---- The two sides ---------------------------------------------------------------------------------------------------


def their_sampling(network, inputs, N: int, T: int, kind: str, stop=None, sample: bool = True) -> torch.Tensor:
    """generate's tokens (rows, up to T), for `their_inputs`; kind is one of CACHES."""
    P = inputs["input_ids"].shape[1]
    settings = {"do_sample": sample, "max_new_tokens": T, "eos_token_id": stop}
    if sample:
        settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if kind == "static cache":
        settings["cache_implementation"] = "static"
    with torch.no_grad():
        if kind == CACHED_PROMPT:
            inputs = run_prompts_once(network, inputs, N)
        else:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"]), "num_return_sequences": N}
        return network.generate(**inputs, **settings)[:, P:]


def run_prompts_once(network, inputs, N: int) -> dict:
    """Inputs for generate that bring the prompts' cache along, repeated for N rows: generate has no switch for that."""
    cache = transformers.DynamicCache(config=network.config.get_text_config())
    # All but the last token, which generate runs for its first new one.
    part = {name: inputs[name][:, :-1] for name in ("input_ids", "mm_token_type_ids")}
    network.model.rope_deltas = None
    network(**{**inputs, **part}, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(N)
    network.model.rope_deltas = network.model.rope_deltas.repeat_interleave(N, dim=0)
    ids = inputs["input_ids"].repeat_interleave(N, dim=0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}


def our_sampling(network, prompts, N: int, T: int, temperature: float = 1.0) -> list:
    return model.generate(network, prompts, N, T, temperature)


def their_logits(network, inputs, T: int) -> torch.Tensor:
    """Logits (rows, T, V) of the last T tokens, from a plain forward."""
    network.model.rope_deltas = None
    return network(**inputs, logits_to_keep=T, use_cache=False).logits


def their_loss(network, prompt, completions, vision: str, rows: int) -> float:
    """Mean log-prob of one group's completions (N, T), with gradients, `rows` members at a time.

    vision: "each" member runs the vision tower, as in a plain forward, or it runs "once" for the group.
    """
    N, T = completions.shape
    total = 0.0
    if vision == "once":
        features = network.model.get_image_features(prompt.pixels, prompt.grid_thw, return_dict=True).pooler_output[0]
        leaf = features.detach().requires_grad_()
    for part in completions.split(rows):
        inputs = their_inputs([prompt] * len(part), part[:, :-1])
        if vision == "once":
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=[leaf] * len(part))}
            del inputs["pixel_values"]
        logits = their_logits(network, inputs, T)
        loss = -F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum") / (N * T)
        loss.backward()
        total += loss.item()
    if vision == "once":
        features.backward(leaf.grad)
    return total


def our_loss(network, prompt, completions) -> float:
    """The same of our network, in one pass for the group."""
    batch = model.PromptBatch.from_prompts([prompt], network.config, completions.device)
    mask = torch.ones(1, *completions.shape, dtype=torch.bool, device=completions.device)
    loss = network(batch, completions[None], mask).mean()
    loss.backward()
    return loss.item()


# ---- Timing ----------------------------------------------------------------------------------------------------------


def seconds(function) -> float:
    """Wall time of one call; on a GPU until it has finished."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(rounds: int, ours, rivals: dict) -> list[dict]:
    """Run ours and the rivals {name: function}, all in turn; a function returns {what: seconds}.

    Returns {what: {name: seconds of each round}}, first with what transformers offers, then with what its users could
    add by hand. One round comes first and is not counted; whoever is in everything 1.2 times slower in it than the
    fastest of its kind does not run again.
    """
    ours()
    first = {name: rival() for name, rival in rivals.items()}
    kinds = []
    for by_hand in (False, True):
        names = [name for name in rivals if (BY_HAND in name) == by_hand]
        if names:
            kinds.append(fast_ones({name: first[name] for name in names}))
    running = {"ours": ours}
    for names in kinds:
        running |= {name: rivals[name] for name in names}
    runs = [{name: function() for name, function in running.items()} for _ in range(rounds)]

    results = []
    for names in kinds:
        result = {}
        for what in runs[0]["ours"]:
            result[what] = {name: [run[name][what] for run in runs] for name in ["ours", *names]}
        results.append(result)
    return results


def fast_ones(times: dict) -> list[str]:
    """Those of {name: {what: seconds}} that are, in something, within 1.2 times the fastest."""
    fast = []
    for name, own in times.items():
        if any(own[what] < 1.2 * min(other[what] for other in times.values()) for what in own):
            fast.append(name)
    return fast


def spread(values, form="{:.2f}") -> str:
    """Median (lowest–highest)."""
    return f"{form} ({form}–{form})".format(statistics.median(values), min(values), max(values))


def header(title: str):
    print(f"\n### {title}\n\n| | ours, s | transformers, s (fastest setting) | ratio (spread) |")
    print("|---|---:|---:|---:|", flush=True)


def show(results: list[dict], what: str):
    """Rows of a race: our seconds, those of the fastest rival of each kind, and the ratio round by round."""
    for part in results[0]:
        for result in results:
            rivals = dict(result[part])
            ours = rivals.pop("ours")
            best = min(rivals, key=lambda name: statistics.median(rivals[name]))
            ratios = [b / a for a, b in zip(ours, rivals[best])]
            print(f"| {what}{part} | {statistics.median(ours):.3g} | {statistics.median(rivals[best]):.3g} ({best}) | "
                  f"{spread(ratios)}× |", flush=True)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def bench_sampling(sizes, rounds: int, N: int = 8, T: int = 128):
    """4 prompts x 8 rollouts, 128 new tokens; decoding alone is the time of 128 tokens less that of 1."""
    header(f"(a) Sampling, 4 prompts × {N} rollouts × {T} tokens")
    for size in sizes:
        theirs, ours = make_networks(size)
        for side in (840, 224):
            prompts = make_prompts(4, side)
            inputs = their_inputs(prompts)
            check_sampling(theirs, ours, prompts)

            def our_times():
                return whole_and_decoding(lambda t: our_sampling(ours, prompts, N, t), T)

            def their_times(kind):
                return whole_and_decoding(lambda t: their_sampling(theirs, inputs, N, t, kind), T)

            rivals = {kind: lambda kind=kind: their_times(kind) for kind in CACHES}
            show(race(rounds, our_times, rivals), f"{size}, {side}×{side} image")
        if size == "small":
            bench_ending_rows(theirs, ours, rounds, N, T)


def whole_and_decoding(sample, T: int) -> dict:
    """Seconds of sample(T), and what the tokens after the first take of it."""
    whole = seconds(lambda: sample(T))
    return {", whole": whole, ", decoding alone": whole - seconds(lambda: sample(1))}


def bench_ending_rows(theirs, ours, rounds: int, N: int, T: int):
    """Rows that end at different times: either side decodes until the last one has ended."""
    stop = list(range(10, ours.config.text_config.vocab_size, 40))
    ours.stop_tokens = stop
    prompts = make_prompts(4, 840)
    inputs = their_inputs(prompts)
    rivals = {kind: lambda kind=kind: {"": seconds(lambda: their_sampling(theirs, inputs, N, T, kind, stop))}
              for kind in CACHES}
    results = race(rounds, lambda: {"": seconds(lambda: our_sampling(ours, prompts, N, T))}, rivals)
    show(results, "small, 840×840 image, 1 token in 40 ends")


def check_sampling(theirs, ours, prompts, T: int = 16):
    """Greedy tokens are identical, and sampled log-probs those of transformers' forward."""
    greedy = our_sampling(ours, prompts, 1, T, temperature=0.0)
    tokens = torch.stack([completion.ids for [completion] in greedy])
    for kind in CACHES:
        expected = their_sampling(theirs, their_inputs(prompts), 1, T, kind, sample=False)
        assert torch.equal(tokens, expected), f"greedy tokens differ from transformers' with {kind}"
    for prompt, [row] in zip(prompts, our_sampling(ours, prompts, 1, T)):
        with torch.no_grad():
            logits = their_logits(theirs, their_inputs([prompt], row.ids[None, :-1]), T)[0]
        expected = logits.log_softmax(-1).gather(1, row.ids[:, None])[:, 0]
        assert (row.logprobs - expected).abs().max() < 1e-4


# ---- The update and the whole step -----------------------------------------------------------------------------------


def bench_update(sizes, rounds: int, N: int = 9):
    """Loss and backward of one group of 9 members; the other side repeats the prompt for each of them."""
    header(f"(b) Loss and backward of a group of {N}")
    for size in sizes:
        theirs, ours = make_networks(size)
        for side, T in ((840, 64), (840, 256), (224, 64)):
            [prompt] = make_prompts(1, side)
            completions = random_completions(N, T)
            check_update(theirs, ours, prompt, completions)

            def their_time(vision, rows):
                return {"": seconds(lambda: their_loss(theirs, prompt, completions, vision, rows))}

            rivals = {}
            for rows in (1, 3, 9) if size == "small" else (1, 9):  # three took no less time at the large size
                rivals[f"{rows} rows at a time"] = lambda rows=rows: their_time("each", rows)
                rivals[f"{rows} rows, vision once {BY_HAND}"] = lambda rows=rows: their_time("once", rows)
            results = race(rounds, lambda: {"": seconds(lambda: our_loss(ours, prompt, completions))}, rivals)
            show(results, f"{size}, {side}×{side} image, {T} tokens")


def check_update(theirs, ours, prompt, completions):
    """Losses agree to 1e-5 and gradient norms to 1e-4, whichever way the other side runs."""
    ours.zero_grad()
    loss = our_loss(ours, prompt, completions)
    norm = gradient_norm(ours)
    for vision in ("each", "once"):
        theirs.zero_grad()
        expected = their_loss(theirs, prompt, completions, vision, rows=3)
        assert abs(loss - expected) < 1e-5 * abs(expected), (loss, expected)
        assert abs(norm - gradient_norm(theirs)) < 1e-4 * norm, (norm, gradient_norm(theirs))


def gradient_norm(network) -> float:
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()]).item()


def bench_step(sizes, rounds: int, G: int = 8, T: int = 64):
    """A whole step of the small network: rollouts, random rewards, a label injected, ViSurf's loss, backward, AdamW."""
    header(f"(c) A whole step, 4 prompts × {G} rollouts × {T} tokens and their labels, 840×840")
    size = sizes[0]
    theirs, ours = make_networks(size)
    prompts = make_prompts(4, 840)
    labels = random_completions(4, T)
    rewards = torch.rand(4, G, generator=torch.Generator().manual_seed(0))
    advantages = visurf.visurf_advantages(rewards, {"accuracy": torch.ones(4)})  # (4, G+1)
    optimizers = {side: torch.optim.AdamW(side.parameters(), 1e-6) for side in (theirs, ours)}

    def finish(side):
        optimizers[side].step()
        optimizers[side].zero_grad()

    # A sampled image token would need an image, so tokens below 10 are replaced.
    def our_step():
        rollouts = [[row.ids.clamp(min=10) for row in group] for group in our_sampling(ours, prompts, G, T)]
        our_gradients(ours, prompts, rollouts, labels, advantages)
        finish(ours)

    def their_step(kind, rows):
        rollouts = their_sampling(theirs, their_inputs(prompts), G, T, kind).clamp(min=10)
        their_gradients(theirs, prompts, rollouts.view(4, G, T), labels, advantages, rows)
        finish(theirs)

    rivals = {}
    for kind in CACHES[:2]:
        for rows in (1, 3, 9):
            rivals[f"{kind}, {rows} rows at a time"] = lambda kind=kind, rows=rows: {
                "": seconds(lambda: their_step(kind, rows))}
    show(race(rounds, lambda: {"": seconds(our_step)}, rivals), size)


def our_gradients(network, prompts, rollouts, labels, advantages):
    """ViSurf's loss, group by group, as train.py computes it."""
    total = advantages.numel() * labels.shape[1]  # tokens of all groups
    for prompt, group, label, A in zip(prompts, rollouts, labels, advantages):
        ids, mask = model.pad_completions([[*group, label]])
        batch = model.PromptBatch.from_prompts([prompt], network.config)
        logprobs = network(batch, ids, mask)
        visurf.policy_loss(logprobs, logprobs.detach(), A[None], mask, total=total).backward()


def their_gradients(network, prompts, rollouts, labels, advantages, rows: int):
    """The same loss from plain forwards, `rows` members at a time."""
    total = advantages.numel() * labels.shape[1]
    for prompt, ids, label, A in zip(prompts, rollouts, labels, advantages):
        members = torch.cat([ids, label[None]])
        for part, a in zip(members.split(rows), A.split(rows)):
            logits = their_logits(network, their_inputs([prompt] * len(part), part[:, :-1]), part.shape[1])
            logprobs = logits.log_softmax(-1).gather(2, part[..., None])[..., 0]
            mask = torch.ones_like(part, dtype=torch.bool)
            visurf.policy_loss(logprobs, logprobs.detach(), a, mask, total=total).backward()


# ---- Memory ----------------------------------------------------------------------------------------------------------


def bench_memory(sizes, rounds: int, N: int = 9, T: int = 256):
    """Peak memory above weights and gradients, of the loss alone and of a whole group's pass, by vocabulary."""
    print(f"\n### (d) Peak memory above weights and gradients, MiB\n\nLoss alone: log-probs of {N}×{T} tokens from "
          "hidden\nstates of width 512, and backward. Pass: prompt 930, the large network; without head: a sum of "
          f"states.\n\n| vocabulary | loss, ours | loss, full logits | ratio | pass, ours | without head | head adds | "
          f"T = {T // 4} | N·T fit |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    [prompt] = make_prompts(1, 840)
    for vocabulary in (1024, 151_936):
        loss, loss_full = memory_of_loss(vocabulary, N * T)
        shapes = {**SIZES["large"]["text"], "vocab_size": vocabulary}
        ours = random_network(make_config("qwen2_vl", shapes, SIZES["large"]["vision"]))
        for parameter in ours.parameters():
            parameter.grad = torch.zeros_like(parameter)
        peaks = {}
        for tokens in (T // 4, T // 2, T):
            peaks[tokens] = peak_memory(lambda: our_loss(ours, prompt, random_completions(N, tokens)))
        # A line through the first and the last; the middle says how straight the growth is.
        slope = (peaks[T] - peaks[T // 4]) / (N * (T - T // 4))
        bend = abs(peaks[T // 2] - peaks[T // 4] - slope * N * (T // 2 - T // 4)) / peaks[T // 2]
        with mock.patch.object(model.TokenLogProbs, "apply", lambda hidden, *others: hidden.float().sum(dim=1)):
            bare = peak_memory(lambda: our_loss(ours, prompt, random_completions(N, T)))
        print(f"| {vocabulary:,} | {loss:.0f} | {loss_full:.0f} | 1/{loss_full / loss:.1f} | {peaks[T]:.0f} | "
              f"{bare:.0f} | {peaks[T] / bare - 1:.0%} | {peaks[T // 4]:.0f} | {slope * 1024:.0f} KiB a token, off by "
              f"{bend:.1%} |", flush=True)
    print()
    for members in (3, N):  # if memory grew with N·P, the second would be three times the first
        short, long = [peak_memory(lambda: our_loss(ours, make_prompts(1, side)[0], random_completions(members, 64)))
                       for side in (224, 840)]
        print(f"A prompt of 930 instead of 94 tokens takes {long - short:.0f} MiB more in a group of {members}.")


def memory_of_loss(vocabulary: int, M: int) -> tuple[float, float]:
    """MiB for the log-probs of M tokens and their gradients: ours, and by full logits."""
    hidden = torch.randn(M, 512, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, 512)).requires_grad_()
    hidden.grad = torch.zeros_like(hidden)
    weight.grad = torch.zeros_like(weight)
    targets = random_completions(1, M)[0]
    forbidden = torch.tensor([], dtype=torch.long)

    def ours():
        model.TokenLogProbs.apply(hidden, weight, targets, 1.0, forbidden).mean().backward()

    def full():
        (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).mean().backward()

    return peak_memory(ours), peak_memory(full)


def peak_memory(function) -> float:
    """MiB that the process grows at most while the function runs a second time (Linux; large blocks are returned)."""
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = process_memory("VmRSS")
    function()
    return process_memory("VmHWM") - before


def process_memory(name: str) -> float:
    """A figure of /proc/self/status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


# ---- Growth ----------------------------------------------------------------------------------------------------------


def bench_growth(sizes, rounds: int, lengths=(64, 128, 256, 512, 1024), counts=(2, 4, 8, 16, 32)):
    """Time of the small network against each size, all else fixed; the exponent is the slope in log-log."""
    print("\n### (e) Growth, small network\n\nFixed unless varied: 4 prompts × 8 rollouts × 64 tokens, 900 image "
          "tokens;\nupdate: one group of 9 × 64 tokens. Fit: seconds = a + b·x, off by at most that share of the "
          "longest time.\n\n| varied | values | seconds | exponent | fit |\n|---|---|---|---:|---|", flush=True)
    ours = random_network(make_config("qwen2_vl", **SIZES["small"]))
    prompts = {(side // 28) ** 2: make_prompts(4, side) for side in (224, 448, 840, 1400)}  # by image tokens

    def sampling(count=4, N=8, T=64, tokens=900):
        return lambda: our_sampling(ours, (prompts[tokens] * 4)[:count], N, T)

    def tower(tokens):
        return lambda: vision_tower(ours, prompts[tokens])

    def update(N=9, T=64, tokens=900):
        return lambda: our_loss(ours, prompts[tokens][0], random_completions(N, T))

    show_growth("sampling, group size", rounds, counts, lambda N: sampling(N=N))
    show_growth("sampling, completion length", rounds, lengths, lambda T: sampling(T=T))
    show_growth("sampling, prompts", rounds, [count // 2 for count in counts], lambda count: sampling(count))
    show_growth("sampling, image tokens", rounds, list(prompts), lambda tokens: sampling(tokens=tokens))
    show_growth("of which the vision tower", rounds, list(prompts), tower)
    show_growth("update, group size N", rounds, counts, lambda N: update(N=N))
    show_growth("update, completion length T", rounds, lengths, lambda T: update(T=T))
    show_growth("update, image tokens", rounds, list(prompts), lambda tokens: update(tokens=tokens))


def show_growth(what: str, rounds: int, values, work):
    """A row: seconds of work(value)() for each value, their exponent, and a straight line through them."""
    work(values[0])()
    times = [statistics.median(seconds(work(value)) for _ in range(rounds + 1)) for value in values]
    x = torch.tensor(values, dtype=torch.double)
    y = torch.tensor(times, dtype=torch.double)
    _, exponent = fit_line(x.log(), y.log())
    a, b = fit_line(x, y)
    off = (y - a - b * x).abs().max() / y.max()
    print(f"| {what} | {', '.join(map(str, values))} | {', '.join(f'{t:.3g}' for t in times)} | {exponent:.2f} | "
          f"{a:.2g} + {b:.2g}·x, {off:.0%} |", flush=True)


def fit_line(x, y) -> list[float]:
    """a and b of the least-squares line y = a + b·x."""
    return torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], dim=1), y[:, None]).solution[:, 0].tolist()


# ---- Families --------------------------------------------------------------------------------------------------------


def vision_tower(network, prompts, backward: bool = False):
    """The vision tower alone, on the images of some prompts: as in sampling, or with the gradients of an update."""
    batch = model.PromptBatch.from_prompts(prompts, network.config)
    with torch.inference_mode(not backward):
        features = network.vlm.model.visual(batch.pixels, grid_thw=batch.grid_thw).pooler_output
    if backward:
        features.sum().backward()


def family_configs() -> dict:
    """{name: (config, pixels of an image's side)}: the small language model behind four vision blocks of each family.

    In Qwen2.5-VL three of the four see only windows of 8 x 8 patches; without windows all four see the whole image.
    """
    text = SIZES["small"]["text"]
    width = {"depth": 4, "num_heads": 2}
    vision = {**width, "hidden_size": 64, "intermediate_size": 256, "out_hidden_size": text["hidden_size"]}
    windows = {**vision, "window_size": 112, "fullatt_block_indexes": [3]}
    whole = {**windows, "fullatt_block_indexes": [0, 1, 2, 3]}
    deepstack = {**vision, "patch_size": 16, "deepstack_visual_indexes": [0, 1, 2]}
    return {
        "Qwen2-VL": (make_config("qwen2_vl", text, {**width, "embed_dim": 64, "hidden_size": 128}), 840),
        "Qwen2.5-VL": (make_config("qwen2_5_vl", text, windows), 840),
        "Qwen2.5-VL without windows": (make_config("qwen2_5_vl", text, whole), 840),
        "Qwen3-VL": (make_config("qwen3_vl", text, deepstack), 832)}


def bench_families(sizes, rounds: int, N: int = 8, T: int = 64):
    """Our sampling and update of each family, and how much of them the vision tower takes."""
    print(f"\n### (f) Families, ours only\n\nSampling 4 prompts × {N} rollouts × {T} tokens; update of a group of "
          f"{N + 1} × {T}. Four vision blocks of width 64.\nIn Qwen2.5-VL three of them have windows, and attention is "
          "called once for each window.\n\n| network, image | image tokens | sampling, s | of which tower | update, s "
          "| of which tower |\n|---|---:|---:|---:|---:|---:|", flush=True)
    for name, (config, side) in family_configs().items():
        network = random_network(config)
        prompts = make_prompts(4, side, config.vision_config.patch_size)
        completions = random_completions(N + 1, T)
        work = {"sampling": lambda: our_sampling(network, prompts, N, T),
                "its tower": lambda: vision_tower(network, prompts),
                "update": lambda: our_loss(network, prompts[0], completions),
                "the update's tower": lambda: vision_tower(network, prompts[:1], backward=True)}
        for function in work.values():
            function()
        runs = [{what: seconds(function) for what, function in work.items()} for _ in range(rounds)]
        sampling = statistics.median(run["sampling"] for run in runs)
        update = statistics.median(run["update"] for run in runs)
        tower = statistics.median(run["its tower"] / run["sampling"] for run in runs)
        update_tower = statistics.median(run["the update's tower"] / run["update"] for run in runs)
        tokens = int((prompts[0].ids == IMAGE).sum())
        print(f"| {name}, {side}×{side} | {tokens} | {sampling:.3g} | {tower:.0%} | {update:.3g} | "
              f"{update_tower:.0%} |", flush=True)


# ---- A frozen vision tower -------------------------------------------------------------------------------------------

# At 840 x 840 and a group of 9 x 64, half of the forward pass's work is the tower's.
HALF_TOWER = {"text": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
                       "num_key_value_heads": 2, "vocab_size": 1024},
              "vision": {"depth": 2, "embed_dim": 256, "num_heads": 4, "hidden_size": 512}}


class Work(NamedTuple):
    """Floating-point operations of a part of an update in which activations are computed twice."""

    forward: float
    recomputed: float = 0.0
    backward: float = 0.0


def bench_frozen(sizes, rounds: int, side: int = 840, N: int = 9, T: int = 64):
    """What --freeze_vision_tower saves of an update: measured with one network, and computed for two published ones."""
    network = random_network(make_config("qwen2_vl", **HALF_TOWER))
    compute_activations_twice(network)
    [prompt] = make_prompts(1, side)
    completions = random_completions(N, T)
    check_frozen(network, prompt, completions)

    def update(frozen: bool) -> dict:
        network.zero_grad()
        network.vlm.model.visual.requires_grad_(not frozen)
        return {"": seconds(lambda: our_loss(network, prompt, completions))}

    [times] = race(rounds, lambda: update(frozen=True), {"full": lambda: update(frozen=False)})
    work = {}
    for frozen in (False, True):
        network.vlm.model.visual.requires_grad_(not frozen)
        work[frozen] = update_work(network, len(prompt.ids), side // 14, N, T)
    share = work[False]["tower"].forward / sum(part.forward for part in work[False].values())
    expected, kept = (sum(map(sum, work[frozen].values())) for frozen in (False, True))
    ratios = [full / frozen for full, frozen in zip(times[""]["full"], times[""]["ours"])]
    print(f"\n### (g) A frozen vision tower: loss and backward of a group of {N} × {T}, {side}×{side}\n\n"
          "| the tower's share of the forward work | full, s | tower frozen, s | ratio (spread) | ratio of the work |\n"
          f"|---:|---:|---:|---:|---:|\n| {share:.0%} | {statistics.median(times['']['full']):.3g} | "
          f"{statistics.median(times['']['ours']):.3g} | {spread(ratios)}× | {expected / kept:.2f}× |", flush=True)
    print_work(side, N, T)


def compute_activations_twice(network):
    """--checkpoint_activations, as train.py switches it on."""
    network.vlm.activation_checkpointing_enable({"use_reentrant": False})
    network.vlm.disable_input_require_grads()
    network.train()


def check_frozen(network, prompt, completions):
    """A frozen tower gets no gradient, and the language model the same as without."""
    gradients = {}
    for frozen in (False, True):
        network.zero_grad()
        network.vlm.model.visual.requires_grad_(not frozen)
        our_loss(network, prompt, completions)
        gradients[frozen] = [parameter.grad for parameter in network.vlm.model.language_model.parameters()]
    assert all(parameter.grad is None for parameter in network.vlm.model.visual.parameters())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients[False], gradients[True]))


def print_work(side: int, N: int, T: int, words: int = 30):
    """The computed table: TFLOP of a group's update, for all weights, a frozen tower and LoRA adapters."""
    tokens = (side // 28) ** 2
    print(f"\nComputed, not measured: TFLOP of the update of a group of {N} × {T}, {tokens} image tokens and {words} "
          "more.\nForward + recomputed + backward; a multiplication and an addition are two.\n\n| network | trained | "
          "vision tower | language model | together | of full |\n|---|---|---:|---:|---:|---:|")
    for size in ("Qwen2-VL-2B", "Qwen2.5-VL-7B"):
        full = 0
        for trained in ("all weights", "all but the tower", "LoRA, rank 16"):
            network = empty_network(config_of(size))
            if trained == "LoRA, rank 16":
                model.add_adapters(network, "", 16, size)
            network.vlm.model.visual.requires_grad_(trained == "all weights")
            work = update_work(network, tokens + words, side // 14, N, T)
            total = sum(map(sum, work.values()))
            full = full or total
            cells = [" + ".join(f"{flops / 1e12:.1f}" for flops in work[part]) for part in ("tower", "language model")]
            print(f"| {size} | {trained} | {' | '.join(cells)} | {total / 1e12:.1f} | {total / full:.0%} |", flush=True)


def update_work(network, P: int, grid: int, N: int, T: int) -> dict[str, Work]:
    """A group's update: P prompt tokens with an image of grid x grid patches, N completions of T tokens.

    What is trained is read off requires_grad. Norms, biases and rotations are left out.
    """
    text = network.config.text_config
    tower = network.vlm.model.visual
    patches = grid**2
    # Under a causal mask half of the scores count.
    seen = text.num_hidden_layers * (P * P / 2 + N * (T - 1) * (P + T / 2))
    layers = blocks_work(network.vlm.model.language_model.layers, P + N * (T - 1), text.hidden_size * seen)
    head = N * T * weight_count(network.vlm.lm_head)
    head_trained = N * T * weight_count(network.vlm.lm_head, trained=True)
    # Its logits are computed twice whatever the settings are.
    head = Work(2 * head, 2 * head, 2 * (head + head_trained))

    width = tower.blocks[0].attn.proj.in_features
    blocks = blocks_work(tower.blocks, patches, width * seen_patches(network.config.vision_config, grid))
    embed = patches * weight_count(tower.patch_embed)
    merger = patches // 4 * weight_count(tower.merger)
    ends = Work(2 * (embed + merger))
    if weight_count(tower, trained=True):
        # Pixels need no gradient.
        ends = Work(2 * (embed + merger), 0, 2 * (embed + 2 * merger))
    return {"tower": add_work(blocks, ends), "language model": add_work(layers, head)}


def blocks_work(blocks, rows: int, seen: float) -> Work:
    """Blocks that `rows` tokens run through; seen: their width times the tokens that all of them attend to."""
    products = rows * weight_count(blocks)
    trained = rows * weight_count(blocks, trained=True)
    # Scores and weighted values are a product each.
    forward = 2 * (products + 2 * seen)
    if trained == 0:
        return Work(forward)
    # Nothing needs the output of a block's last product again, so recomputation ends before it.
    last = rows * sum(weight_count([m for m in block.modules() if isinstance(m, torch.nn.Linear)][-1])
                      for block in blocks)
    # Inputs have gradients, trained weights too; and both factors of the two products in attention.
    return Work(forward, forward - 2 * last, 2 * (products + trained + 4 * seen))


def add_work(*parts: Work) -> Work:
    """The sum, kind by kind."""
    return Work(*map(sum, zip(*parts)))


def weight_count(module, trained: bool = False) -> int:
    """Weights of a module that its inputs are multiplied with, all or the trained ones."""
    return sum(parameter.numel() for parameter in module.parameters()
               if parameter.dim() > 1 and (parameter.requires_grad or not trained))


def seen_patches(vision, grid: int) -> int:
    """How many patches all patches attend to, in all blocks; in Qwen2.5-VL most blocks see windows."""
    if not hasattr(vision, "fullatt_block_indexes"):
        return vision.depth * grid**4
    wide = vision.window_size // vision.patch_size
    # The last window of a row or column is what is left.
    windows = (grid // wide * wide**2 + (grid % wide) ** 2) ** 2
    whole = len(vision.fullatt_block_indexes)
    return whole * grid**4 + (vision.depth - whole) * windows


# ---- On a GPU --------------------------------------------------------------------------------------------------------

GPU_SHAPES = {  # of the checkpoints Qwen2-VL-2B and -7B
    "2B": {"text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                    "num_key_value_heads": 2, "vocab_size": 151_936},
           "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}, "tied": True},
    "7B": {"text": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064},
           "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}, "tied": False}}


def bench_cuda(device: str = "cuda"):
    """A random Qwen2-VL in bfloat16: decoding, update and memory against what the GPU can do."""
    print(f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}\n\n| what | measured |\n|---|---|")
    bandwidth, flops = device_limits(device)
    print(f"| measured limits | {bandwidth / 1e12:.2f} TB/s copying, {flops / 1e12:.0f} TFLOP/s multiplying matrices |")
    for size, shapes in GPU_SHAPES.items():
        network = random_network(make_config("qwen2_vl", **shapes), torch.bfloat16, device)
        network.forbidden_tokens = [IMAGE]  # a sampled one would need an image when it is trained on
        prompts = make_prompts(8, 840)
        if size == "2B":
            gpu_decoding(network, prompts, bandwidth)
        gpu_update(network, prompts[0], flops, size)
        del network
        torch.cuda.empty_cache()


def device_limits(device, side: int = 8192, size: int = 2**31) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and floating-point operations a second of a large product."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    block = torch.empty(size, device=device, dtype=torch.uint8)
    copying = min(seconds(block.clone) for _ in range(5))
    multiplying = min(seconds(lambda: [a @ a for _ in range(10)]) for _ in range(5))
    return 2 * size / copying, 2 * side**3 * 10 / multiplying


def gpu_decoding(network, prompts, bandwidth: float, N: int = 8, T: int = 128):
    """Time of a token of all rows, with the captured graph and without, against reading every weight and key once."""
    captured = model.generate(network, prompts, N, T)
    eager = model.generate(network, prompts, N, T, cuda_graph=False)
    same = all(torch.equal(a.ids, b.ids) for a, b in zip(sum(captured, []), sum(eager, [])))
    step = {graph: seconds_a_token(network, prompts, N, T, graph) for graph in (True, False)}
    replay, floor = replay_and_floor(network, prompts, N, T, bandwidth)
    rows = len(prompts) * N
    print(f"| 2B, decoding {rows} rows, graph | {step[True] * 1e3:.2f} ms a token with sampling and capturing, "
          f"{replay * 1e3:.2f} ms a replay; floor {floor * 1e3:.2f} ms = {floor / step[True]:.0%} of the one, "
          f"{floor / replay:.0%} of the other |")
    print(f"| 2B, decoding {rows} rows, eager | {step[False] * 1e3:.2f} ms a token; tokens identical: {same} |")

    ids, mask = model.pad_completions([[row.ids for row in group] for group in captured])
    batch = model.PromptBatch.from_prompts(prompts, network.config, network.vlm.device)
    with torch.no_grad():
        trained = network(batch, ids.to(network.vlm.device), mask.to(network.vlm.device)).cpu()
    sampled = torch.stack([row.logprobs for row in sum(captured, [])]).view(trained.shape)
    print(f"| 2B, log-probs of sampler and trainer | differ by at most {(trained - sampled).abs().max():.1e} |",
          flush=True)


def seconds_a_token(network, prompts, N: int, T: int, cuda_graph: bool) -> float:
    """Decoding alone: T tokens less the first, which the prompts' pass gives."""
    times = []
    for _ in range(5):
        whole = seconds(lambda: model.generate(network, prompts, N, T, cuda_graph=cuda_graph))
        first = seconds(lambda: model.generate(network, prompts, N, 1, cuda_graph=cuda_graph))
        times.append((whole - first) / (T - 1))
    return statistics.median(times)


def replay_and_floor(network, prompts, N: int, T: int, bandwidth: float) -> tuple[float, float]:
    """Seconds of a graph's replay, and of reading what a token of every row needs at least."""
    decoder = model.Decoder(network, prompts, N, T, True)
    with torch.inference_mode():
        hidden = decoder.prefill()
        decoder.step(torch.full((len(hidden),), 10, device=hidden.device))
        replays = [seconds(lambda: [decoder.graph.replay() for _ in range(50)]) / 50 for _ in range(5)]
    # Embedding rows are looked up, so of the two tables only the output head's is read.
    weights = parameter_count(network.vlm.model.language_model.layers) + network.vlm.lm_head.weight.numel()
    prompt_cache = sum(x.numel() for pair in decoder.prompts.values() for x in pair)
    own_cache = sum(x.numel() for pair in decoder.rows.values() for x in pair) / 2  # it fills from nothing on
    return statistics.median(replays), 2 * (weights + prompt_cache + own_cache) / bandwidth


def parameter_count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gpu_update(network, prompt, flops: float, size: str, N: int = 9, T: int = 64):
    """One group's loss and backward at 840×840: share of the matrix units' speed, and peak memory."""
    completions = random_completions(N, T).to(network.vlm.device)
    our_loss(network, prompt, completions)
    torch.cuda.reset_peak_memory_stats()
    elapsed = statistics.median(seconds(lambda: our_loss(network, prompt, completions)) for _ in range(10))
    peak = torch.cuda.max_memory_allocated() / 2**30
    held = 2 * 2 * parameter_count(network) / 2**30  # weights and gradients, two bytes each
    work = update_work(network, len(prompt.ids), int(prompt.grid_thw[0, 1]), N, T)
    # As much again for the inputs' gradients and for the weights'. Nothing is recomputed here.
    speed = 3 * sum(part.forward for part in work.values()) / elapsed
    print(f"| {size}, update of a group of {N} × {T} at 840×840 | {elapsed * 1e3:.0f} ms, {speed / 1e12:.0f} TFLOP/s = "
          f"{speed / flops:.0%} of the measured limit; peak {peak:.1f} GiB, of which weights and gradients "
          f"{held:.1f} |", flush=True)


SECTIONS = {"sampling": bench_sampling, "update": bench_update, "step": bench_step, "memory": bench_memory,
            "growth": bench_growth, "families": bench_families, "frozen": bench_frozen}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=tuple(SIZES), help="one network size (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="the part for a GPU instead, at the shapes of 2B and 7B")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {unknown.pop()}: there are {', '.join(SECTIONS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.cuda:
        if torch.cuda.is_available():
            bench_cuda()
        else:
            print("no CUDA device here: not measured")
        return
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, float32, {options.rounds} rounds")
    sizes = [options.size] if options.size else list(SIZES)
    for name in options.sections:
        SECTIONS[name](sizes, options.rounds)


if __name__ == "__main__":
    main()
