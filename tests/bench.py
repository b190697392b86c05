"""How fast ViSurf's sampler and update are, beside the same work put together from transformers' pieces.

    python tests/bench.py                                # everything; about 40 minutes on two cores
    python tests/bench.py sampling update --size small   # some sections, one network size
    python tests/bench.py --cuda                         # the part for a GPU: shapes of Qwen2-VL-2B and 7B, bfloat16

Both sides run one random checkpoint on the same inputs, alternately, in this process, after checking that they compute
the same thing. transformers runs with every setting that could help it, each is timed, and the fastest one counts; rows
"by hand" let it share the prompt's cache or the vision tower's features, which its user would have to write. A ratio is
taken inside each round, so that a machine whose speed drifts does not move it; shown are medians (lowest to highest of
the rounds). Nothing here is a test: no duration is asserted anywhere.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import model
import visurf

IMAGE, VISION_START, VISION_END = 3, 4, 5
SIZES = {  # about 1 M parameters, and about 100 M with the vocabulary of Qwen2-VL
    "small": {"text": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=1024),
              "vision": dict(depth=2, embed_dim=64, num_heads=2, hidden_size=128), "mrope_section": [4, 6, 6]},
    "large": {"text": dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
                           num_key_value_heads=2, vocab_size=151_936),
              "vision": dict(depth=6, embed_dim=256, num_heads=4, hidden_size=512), "mrope_section": [8, 12, 12]}}
SIDES = {840: 60, 224: 16}  # pixels -> patches of 14: 900 and 64 image tokens


# ---- The two sides ---------------------------------------------------------------------------------------------------

def make_networks(size: str, **text):
    """(transformers' network, ours) with the same random weights."""
    shape = SIZES[size]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": shape["mrope_section"], "rope_theta": 1e6}
    config = transformers.Qwen2VLConfig(
        text_config={**shape["text"], **text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=shape["vision"], tie_word_embeddings=True, image_token_id=IMAGE, video_token_id=6,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    torch.manual_seed(0)
    theirs = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = model.load_pretrained(directory)
    ours.stop_tokens, ours.forbidden_tokens = [], []
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return theirs, ours


def make_prompts(count: int, patches: int, text: int = 27) -> list:
    """Prompts with one square image of `patches` x `patches` patches and `text` words, as our network takes them."""
    prompts = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(10, 1000, (text,), generator=generator).tolist()
        ids = [words[0], VISION_START] + [IMAGE] * (patches // 2) ** 2 + [VISION_END] + words
        prompts.append(SimpleNamespace(ids=torch.tensor(ids), grid_thw=torch.tensor([[1, patches, patches]]),
                                       pixels=torch.randn(patches**2, 3 * 2 * 14 * 14, generator=generator)))
    return prompts


def their_inputs(prompts, completions=None) -> dict:
    """transformers' inputs for prompts of one length, each followed by its row of completions (rows, T) if given."""
    ids = torch.stack([prompt.ids for prompt in prompts])
    if completions is not None:
        ids = torch.cat([ids, completions], dim=1)
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.cat([prompt.pixels for prompt in prompts]),
            "image_grid_thw": torch.cat([prompt.grid_thw for prompt in prompts])}


def their_sampling(network, inputs, N: int, T: int, kind: str, stop=None, sample: bool = True) -> torch.Tensor:
    """generate's tokens (rows, up to T), for `their_inputs`. kind: one of CACHES; the last of them runs the prompt once
    and repeats its cache for its N rows, which generate leaves to its caller."""
    settings = dict(do_sample=sample, max_new_tokens=T, eos_token_id=stop)
    settings |= dict(temperature=1.0, top_p=1.0, top_k=0) if sample else {}
    P = inputs["input_ids"].shape[1]
    with torch.no_grad():
        if BY_HAND not in kind:
            static = {"cache_implementation": "static"} if "static" in kind else {}
            mask = torch.ones_like(inputs["input_ids"])
            return network.generate(**inputs, attention_mask=mask, num_return_sequences=N, **static, **settings)[:, P:]
        cache = transformers.DynamicCache(config=network.config.get_text_config())
        part = {name: inputs[name][:, :-1] for name in ("input_ids", "mm_token_type_ids")}
        network.model.rope_deltas = None
        network(**{**inputs, **part}, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(N)
        network.model.rope_deltas = network.model.rope_deltas.repeat_interleave(N, dim=0)
        ids = inputs["input_ids"].repeat_interleave(N, dim=0)
        return network.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)[:, P:]


def our_sampling(network, prompts, N: int, T: int, greedy: bool = False) -> list:
    return model.generate(network, prompts, N, T, temperature=0.0 if greedy else 1.0)


def their_loss(network, prompt, completions, vision: str, rows: int):
    """Mean log-prob of one group's completions (N, T) and its gradients, `rows` members at a time, logits at the
    completion only. vision: "each" member runs the tower, as in a plain forward, or "once" for the group."""
    N, T = completions.shape
    total = 0.0
    features = None
    if vision == "once":
        features = network.model.get_image_features(prompt.pixels, prompt.grid_thw, return_dict=True).pooler_output[0]
        leaf = features.detach().requires_grad_()
    for part in completions.split(rows):
        inputs = their_inputs([prompt] * len(part), part[:, :-1])
        if features is not None:
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=[leaf] * len(part))}
            del inputs["pixel_values"]
        network.model.rope_deltas = None
        logits = network(**inputs, logits_to_keep=T, use_cache=False).logits
        logprobs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum")
        loss = logprobs / (N * T)
        loss.backward()
        total += loss.item()
    if features is not None:
        features.backward(leaf.grad)
    return total


def our_loss(network, prompt, completions):
    """The same of our network, in one pass for the group."""
    batch = model.PromptBatch.from_prompts([prompt], network.config)
    mask = torch.ones(1, *completions.shape, dtype=torch.bool)
    loss = network(batch, completions[None], mask, expected=mask / mask.sum()).mean()
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

    Returns {what: {name: seconds of each round}} twice: ours with what transformers offers, and ours with what its
    users could add (names with BY_HAND). One round comes first and is not counted; who is 1.2 times slower in it than
    the fastest of its kind, in everything, does not run again.
    """
    ours()
    first = {name: function() for name, function in rivals.items()}

    def fast_ones(names):
        best = {what: min(first[name][what] for name in names) for what in first[names[0]]}
        return [name for name in names if any(first[name][what] < 1.2 * best[what] for what in best)]

    kinds = [[name for name in rivals if (BY_HAND in name) == by_hand] for by_hand in (False, True)]
    kinds = [fast_ones(names) for names in kinds if names]
    contestants = {"ours": ours} | {name: rivals[name] for names in kinds for name in names}
    runs = [{name: function() for name, function in contestants.items()} for _ in range(rounds)]
    return [{what: {name: [run[name][what] for run in runs] for name in ["ours", *names]} for what in runs[0]["ours"]}
            for names in kinds]


def spread(values, form="{:.2f}") -> str:
    """Median (lowest–highest)."""
    return f"{form} ({form}–{form})".format(statistics.median(values), min(values), max(values))


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


def header(title: str):
    print(f"\n| {title} | ours, s | transformers, s (fastest setting) | ratio (spread) |", flush=True)
    print("|---|---:|---:|---:|", flush=True)


# ---- Sections --------------------------------------------------------------------------------------------------------

BY_HAND = "by hand"
CACHES = "dynamic cache", "static cache", f"prompt cached {BY_HAND}"


def bench_sampling(sizes, rounds: int):
    """4 prompts x 8 rollouts, 128 new tokens; decoding alone is the time of 128 tokens less that of 1."""
    header("(a) sampling, 4 prompts × 8 rollouts × 128 tokens")
    N, T = 8, 128
    for size in sizes:
        theirs, ours = make_networks(size)
        for pixels, patches in SIDES.items():
            prompts = make_prompts(4, patches)
            inputs = their_inputs(prompts)
            check_sampling(theirs, ours, prompts)

            def both(sample):
                whole = seconds(lambda: sample(T))
                return {", whole": whole, ", decoding alone": whole - seconds(lambda: sample(1))}

            rivals = {kind: lambda kind=kind: both(lambda t: their_sampling(theirs, inputs, N, t, kind))
                      for kind in CACHES}
            own = lambda: both(lambda t: our_sampling(ours, prompts, N, t))
            show(race(rounds, own, rivals), f"{size}, {pixels}×{pixels} image")
        if size == "small":
            stop = list(range(10, ours.config.text_config.vocab_size, 40))
            prompts, ours.stop_tokens = make_prompts(4, SIDES[840]), stop
            inputs = their_inputs(prompts)
            rivals = {kind: lambda kind=kind: {"": seconds(lambda: their_sampling(theirs, inputs, N, T, kind, stop))}
                      for kind in CACHES}
            own = lambda: {"": seconds(lambda: our_sampling(ours, prompts, N, T))}
            show(race(rounds, own, rivals), f"{size}, 840×840 image, 1 token in 40 ends")


def check_sampling(theirs, ours, prompts, T: int = 16):
    """Greedy tokens are identical, and sampled log-probs those of transformers' forward."""
    greedy = our_sampling(ours, prompts, 1, T, greedy=True)
    for kind in CACHES:
        tokens = their_sampling(theirs, their_inputs(prompts), 1, T, kind, sample=False)
        same = torch.equal(tokens, torch.stack([completion.ids for [completion] in greedy]))
        assert same, f"greedy tokens differ from transformers' with {kind} cache"
    for prompt, [row] in zip(prompts, our_sampling(ours, prompts, 1, T)):
        theirs.model.rope_deltas = None
        with torch.no_grad():
            logits = theirs(**their_inputs([prompt], row.ids[None, :-1]), logits_to_keep=T, use_cache=False).logits[0]
        expected = logits.log_softmax(-1).gather(1, row.ids[:, None])[:, 0]
        assert (row.logprobs - expected).abs().max() < 1e-4


def bench_update(sizes, rounds: int):
    """Loss and backward of one group of 9 members; the other side repeats the prompt for each of them."""
    header("(b) loss and backward of a group of 9")
    for size in sizes:
        theirs, ours = make_networks(size)
        for pixels, T in ((840, 64), (840, 256), (224, 64)):
            [prompt] = make_prompts(1, SIDES[pixels])
            completions = random_completions(9, T)
            check_update(theirs, ours, prompt, completions)
            rivals = {}
            for rows in (1, 3, 9) if size == "small" else (1, 9):  # three took no less time at the large size
                rivals[f"{rows} rows at a time"] = lambda rows=rows: {
                    "": seconds(lambda: their_loss(theirs, prompt, completions, "each", rows))}
                rivals[f"{rows} rows, vision once {BY_HAND}"] = lambda rows=rows: {
                    "": seconds(lambda: their_loss(theirs, prompt, completions, "once", rows))}
            own = lambda: {"": seconds(lambda: our_loss(ours, prompt, completions))}
            show(race(rounds, own, rivals), f"{size}, {pixels}×{pixels} image, {T} tokens")


def random_completions(N: int, T: int) -> torch.Tensor:
    return torch.randint(10, 1000, (N, T), generator=torch.Generator().manual_seed(0))


def check_update(theirs, ours, prompt, completions):
    """Losses agree to 1e-5 and gradient norms to 1e-4, whichever way the other side runs."""
    ours.zero_grad()
    norm = lambda network: torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
    loss = our_loss(ours, prompt, completions)
    for vision in ("each", "once"):
        theirs.zero_grad()
        expected = their_loss(theirs, prompt, completions, vision, 3)
        assert abs(loss - expected) < 1e-5 * abs(expected), (loss, expected)
        assert abs(norm(ours) - norm(theirs)) < 1e-4 * norm(theirs), (norm(ours), norm(theirs))


def bench_step(sizes, rounds: int):
    """A whole step of the small network: rollouts, random rewards, a label injected, ViSurf's loss, backward, AdamW."""
    header("(c) a whole step, 4 prompts × 8 rollouts × 64 tokens and their labels, 840×840")
    G, T = 8, 64
    for size in sizes[:1]:
        theirs, ours = make_networks(size)
        prompts = make_prompts(4, SIDES[840])
        inputs, labels = their_inputs(prompts), random_completions(len(prompts), T)
        rewards = torch.rand(len(prompts), G, generator=torch.Generator().manual_seed(0))
        advantages = visurf.visurf_advantages(rewards, {"accuracy": torch.ones(len(prompts))})  # (4, 9)
        total = advantages.numel() * T
        optimizers = {side: torch.optim.AdamW(side.parameters(), 1e-6) for side in (theirs, ours)}

        def our_step():
            groups = [[row.ids for row in group] for group in our_sampling(ours, prompts, G, T)]
            for prompt, ids, label, A in zip(prompts, groups, labels, advantages):
                ids, mask = model.pad_completions([[*ids, label]])
                batch = model.PromptBatch.from_prompts([prompt], ours.config)
                logprobs = ours(batch, ids, mask, 1.0, -A[None, :, None].expand(mask.shape) / total)
                visurf.policy_loss(logprobs, logprobs.detach(), A[None], mask, total=total)[0].backward()
            optimizers[ours].step()
            optimizers[ours].zero_grad()

        def their_step(kind, rows):
            sampled = their_sampling(theirs, inputs, G, T, kind).clamp(min=10)  # an image token would need an image
            sampled = sampled.view(len(prompts), G, T)
            for prompt, ids, label, A in zip(prompts, sampled, labels, advantages):
                members = torch.cat([ids, label[None]])
                for part, a in zip(members.split(rows), A.split(rows)):
                    theirs.model.rope_deltas = None
                    batch = their_inputs([prompt] * len(part), part[:, :-1])
                    logits = theirs(**batch, logits_to_keep=T, use_cache=False).logits
                    logprobs = logits.log_softmax(-1).gather(2, part[..., None])[..., 0]
                    mask = torch.ones_like(part, dtype=torch.bool)
                    visurf.policy_loss(logprobs, logprobs.detach(), a, mask, total=total)[0].backward()
            optimizers[theirs].step()
            optimizers[theirs].zero_grad()

        rivals = {f"{kind}, {rows} rows at a time": lambda kind=kind, rows=rows: {
            "": seconds(lambda: their_step(kind, rows))} for kind in CACHES[:2] for rows in (1, 3, 9)}
        show(race(rounds, lambda: {"": seconds(our_step)}, rivals), size)


def bench_memory(sizes, rounds: int):
    """Peak memory above weights and gradients, of the loss alone and of a whole group's pass, by vocabulary."""
    N, T = 9, 256
    print(f"\n(d) Peak memory above weights and gradients, MiB. Loss alone: log-probs of {N}×{T} tokens from hidden\n"
          "states of width 512, and backward. Pass: prompt 930, the large network; without head: a sum of states.")
    print("\n| vocabulary | loss, ours | loss, full logits | ratio | pass, ours | without head | head adds | T = 64 | "
          "N·T fit |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    [prompt] = make_prompts(1, SIDES[840])
    for vocabulary in (1024, 151_936):
        hidden = torch.randn(N * T, 512, requires_grad=True)
        weight = (0.02 * torch.randn(vocabulary, 512)).requires_grad_()
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
        targets = random_completions(1, N * T)[0]
        expected = torch.full(targets.shape, 1 / len(targets))
        full = lambda: (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).mean().backward()
        chunked = lambda: model.token_log_probs(hidden, weight, targets, expected=expected).mean().backward()
        loss, loss_full = peak_memory(chunked), peak_memory(full)

        _, ours = make_networks("large", vocab_size=vocabulary)
        for parameter in ours.parameters():
            parameter.grad = torch.zeros_like(parameter)
        passes = {t: peak_memory(lambda: our_loss(ours, prompt, random_completions(N, t))) for t in (64, 128, 256)}
        slope = (passes[256] - passes[64]) / (192 * N)
        bend = abs(passes[128] - (passes[64] + slope * 64 * N)) / passes[128]
        batch = model.PromptBatch.from_prompts([prompt], ours.config)
        keep, model.token_log_probs = model.token_log_probs, lambda hidden, *_, **__: hidden.float().sum(dim=1)
        mask = torch.ones(1, N, T, dtype=torch.bool)
        bare = peak_memory(lambda: ours(batch, random_completions(N, T)[None], mask).mean().backward())
        model.token_log_probs = keep
        print(f"| {vocabulary:,} | {loss:.0f} | {loss_full:.0f} | 1/{loss_full / loss:.1f} | {passes[256]:.0f} | "
              f"{bare:.0f} | {passes[256] / bare - 1:.0%} | {passes[64]:.0f} | {slope * 1024:.0f} KiB a token, off by "
              f"{bend:.1%} |", flush=True)
    for members in (3, N):  # if memory grew with N·P, the second would be three times the first
        short, long = (peak_memory(lambda: our_loss(ours, make_prompts(1, side)[0], random_completions(members, 64)))
                       for side in (SIDES[224], SIDES[840]))
        print(f"A prompt of 930 instead of 94 tokens takes {long - short:.0f} MiB more in a group of {members}.")


def peak_memory(function) -> float:
    """MiB that the process grows at most while the function runs a second time (Linux; large blocks are returned)."""
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    read = lambda name: int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def fit_line(x, y) -> list[float]:
    """a and b of the least-squares line y = a + b·x."""
    return torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], dim=1), y[:, None]).solution[:, 0].tolist()


def bench_growth(sizes, rounds: int):
    """Time of the small network against each size, all else fixed; the exponent is the slope in log-log."""
    _, ours = make_networks("small")
    print("\n(e) Growth, small network. Fixed unless varied: 4 prompts × 8 rollouts × 64 tokens, 900 image tokens;\n"
          "update: one group of 9 × 64 tokens. Fit: seconds = a + b·x, off by at most that share of the longest time.")
    print("\n| varied | values | seconds | exponent | fit |\n|---|---|---|---:|---|", flush=True)
    median = lambda function: statistics.median(seconds(function) for _ in range(rounds + 1))

    def line(what, values, measure):
        measure(values[0])
        times = [measure(value) for value in values]
        x, y = torch.tensor(values, dtype=torch.double), torch.tensor(times, dtype=torch.double)
        _, exponent = fit_line(x.log(), y.log())
        a, b = fit_line(x, y)
        off = (y - a - b * x).abs().max() / y.max()
        print(f"| {what} | {', '.join(map(str, values))} | {', '.join(f'{t:.3g}' for t in times)} | {exponent:.2f} | "
              f"{a:.2g} + {b:.2g}·x, {off:.0%} |", flush=True)

    prompts = {patches: make_prompts(4, patches) for patches in (16, 32, 60, 100)}
    sides = {(side // 2) ** 2: side for side in prompts}
    sample = lambda count=4, N=8, T=64, side=60: median(lambda: our_sampling(ours, (prompts[side] * 4)[:count], N, T))
    line("sampling, group size", [2, 4, 8, 16, 32], lambda N: sample(N=N))
    line("sampling, completion length", [64, 128, 256, 512, 1024], lambda T: sample(T=T))
    line("sampling, prompts", [1, 2, 4, 8, 16], lambda count: sample(count))
    line("sampling, image tokens", list(sides), lambda tokens: sample(side=sides[tokens]))

    def tower(side):
        batch = model.PromptBatch.from_prompts(prompts[side], ours.config)
        with torch.inference_mode():
            return median(lambda: ours.visual(batch.pixels, batch.grid_thw))

    line("of which the vision tower", list(sides), lambda tokens: tower(sides[tokens]))
    update = lambda N=9, T=64, side=60: median(lambda: our_loss(ours, prompts[side][0], random_completions(N, T)))
    line("update, group size N", [2, 4, 8, 16, 32], lambda N: update(N=N))
    line("update, completion length T", [64, 128, 256, 512, 1024], lambda T: update(T=T))
    line("update, image tokens", list(sides), lambda tokens: update(side=sides[tokens]))


# ---- On a GPU --------------------------------------------------------------------------------------------------------

GPU_SHAPES = {  # of the checkpoints Qwen2-VL-2B and -7B
    "2B": (dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, vocab_size=151_936), True),
    "7B": (dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152_064), False)}


def bench_cuda():
    """A randomly initialised Qwen2-VL in bfloat16: decoding, update and memory against what the GPU can do."""
    print(f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}\n\n| what | measured |\n|---|---|")
    bandwidth, flops = device_limits()
    print(f"| measured limits | {bandwidth / 1e12:.2f} TB/s copying, {flops / 1e12:.0f} TFLOP/s multiplying matrices |")
    for size in GPU_SHAPES:
        network = random_network(size)
        prompts = make_prompts(8, SIDES[840])
        if size == "2B":
            gpu_decoding(network, prompts, bandwidth)
        gpu_update(network, prompts, flops, size)
        del network
        torch.cuda.empty_cache()


def device_limits() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and floating-point operations a second of a large product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    block = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    fastest = lambda function: min(seconds(function) for _ in range(5))
    return 2 * block.numel() / fastest(block.clone), 2 * 8192**3 * 10 / fastest(lambda: [a @ a for _ in range(10)])


def random_network(size: str) -> model.QwenVL:
    text, tied = GPU_SHAPES[size]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}, tie_word_embeddings=tied,
        vision_config=dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=text["hidden_size"]),
        image_token_id=IMAGE, video_token_id=6, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    with torch.device("meta"):
        network = model.QwenVL(config).bfloat16()
    network.to_empty(device="cuda")
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        is_norm = "norm" in name or "ln_q" in name
        parameter.data.fill_(1.0) if is_norm and name.endswith("weight") else parameter.data.normal_(0, 0.02)
    return network


def gpu_decoding(network, prompts, bandwidth: float, N: int = 8, T: int = 128):
    """64 rows: time of a token with and without the captured graph, against reading every weight and key once."""
    sample = lambda t, graph: model.generate(network, prompts, N, t, cuda_graph=graph)
    captured, eager = sample(T, True), sample(T, False)
    same = all(torch.equal(a.ids, b.ids) for x, y in zip(captured, eager) for a, b in zip(x, y))
    step = {}
    for graph in (True, False):
        times = [seconds(lambda: sample(T, graph)) - seconds(lambda: sample(1, graph)) for _ in range(5)]
        step[graph] = statistics.median(times) / (T - 1)
    decoder = model.Decoder(network, prompts, N, T)
    with torch.inference_mode():
        hidden = decoder.prefill()
        token = torch.zeros(len(hidden), dtype=torch.long, device="cuda")
        decoder.step(token)
        replay = statistics.median(seconds(lambda: [decoder.graph.replay() for _ in range(50)]) / 50 for _ in range(5))
    weights = sum(p.numel() * 2 for name, p in network.named_parameters() if not name.startswith("visual"))
    kept = sum(x.numel() * 2 for pair in decoder.cache.prompts for x in pair)
    own = sum(x[..., : T // 2, :].numel() * 2 for pair in decoder.cache.rows for x in pair)
    floor = (weights + kept + own) / bandwidth
    print(f"| 2B, decoding 64 rows, graph | {step[True] * 1e3:.2f} ms a token with sampling and capturing, "
          f"{replay * 1e3:.2f} ms a replay; floor {floor * 1e3:.2f} ms = {floor / step[True]:.0%} of the one, "
          f"{floor / replay:.0%} of the other |")
    print(f"| 2B, decoding 64 rows, eager | {step[False] * 1e3:.2f} ms a token; tokens identical: {same} |")
    ids, mask = model.pad_completions([[row.ids for row in group] for group in captured])
    with torch.no_grad():
        batch = model.PromptBatch.from_prompts(prompts, network.config, "cuda")
        trained = network(batch, ids.cuda(), mask.cuda()).cpu()
    sampled = torch.stack([torch.stack([row.logprobs for row in group]) for group in captured])
    print(f"| 2B, log-probs of sampler and trainer | differ by at most {(trained - sampled).abs().max():.1e} |")


def gpu_update(network, prompts, flops: float, size: str, N: int = 9, T: int = 64):
    """One group's loss and backward at 840×840: share of the matrix units' speed, and peak memory."""
    batch = model.PromptBatch.from_prompts(prompts[:1], network.config, "cuda")
    completions = random_completions(N, T)[None].cuda()
    mask = torch.ones_like(completions, dtype=torch.bool)

    def step():
        network(batch, completions, mask, expected=mask / mask.sum()).mean().backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    elapsed = statistics.median(seconds(step) for _ in range(10))
    text, vision = network.config.text_config, network.config.vision_config
    P, patches = batch.ids.shape[1], len(batch.pixels[0])
    count = lambda module: sum(p.numel() for p in module.parameters())
    dense = (count(network.model.layers) * (P + N * (T - 1)) + network.head_weight.numel() * N * T
             + count(network.visual.blocks) * patches + count(network.visual.merger) * patches // 4)
    attention = (text.num_hidden_layers * text.hidden_size * (P * P / 2 + N * T * (P + T / 2))
                 + vision.depth * vision.embed_dim * patches**2) * 2
    used = 6 * (dense + attention) / elapsed
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"| {size}, update of a group of {N} × {T} at 840×840 | {elapsed * 1e3:.0f} ms, {used / 1e12:.0f} TFLOP/s = "
          f"{used / flops:.0%} of the measured limit; peak {memory:.1f} GiB with weights and gradients |", flush=True)


SECTIONS = {"sampling": bench_sampling, "update": bench_update, "step": bench_step, "memory": bench_memory,
            "growth": bench_growth}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=tuple(SIZES), help="one network size (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="the part for a GPU instead, at the shapes of 2B and 7B")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {unknown.pop()}: there are {', '.join(SECTIONS)}")
    if options.cuda:
        bench_cuda() if torch.cuda.is_available() else print("no CUDA device here: not measured")
        return
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, float32, {options.rounds} rounds")
    for name in options.sections:
        SECTIONS[name]([options.size] if options.size else list(SIZES), options.rounds)


if __name__ == "__main__":
    main()
