"""How fast ViSurf's sampler and update are, beside the same work put together from transformers' pieces.

    python tests/bench.py                                # everything; about half an hour on two cores
    python tests/bench.py sampling update --size small   # some sections, one network size
    python tests/bench.py --cuda                         # the part for a GPU: a Qwen2-VL-2B shape in bfloat16

Both sides run one random checkpoint on the same inputs, alternately, in this process, after checking that they compute
the same thing. transformers runs with every setting that could help it, each is timed, and the fastest one counts. A
ratio is taken inside each round, so that a machine whose speed drifts does not move it; shown are medians (lowest to
highest of the rounds). Nothing here is a test: no duration is asserted anywhere.
"""

import argparse
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
    """generate's tokens (rows, up to T), for `their_inputs`. kind: "dynamic" or "static" cache, or "prefix": the prompt is run once and
    its cache repeated for its N rows, which generate leaves to its caller."""
    settings = dict(do_sample=sample, max_new_tokens=T, eos_token_id=stop)
    settings |= dict(temperature=1.0, top_p=1.0, top_k=0) if sample else {}
    P = inputs["input_ids"].shape[1]
    with torch.no_grad():
        if kind != "prefix":
            static = {"cache_implementation": "static"} if kind == "static" else {}
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

def interleave(rounds: int, **functions) -> dict:
    """Seconds of each function, (rounds,) each: all of them in turn, round after round, after one uncounted round."""
    seconds = {name: [] for name in functions}
    for round in range(rounds + 1):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            function()
            if round:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values, form="{:.2f}") -> str:
    """Median (lowest–highest)."""
    return f"{form} ({form}–{form})".format(statistics.median(values), min(values), max(values))


def show(what: str, ours: list, theirs: dict):
    """One row of the table: our seconds, those of the other side's fastest setting, and the ratio."""
    best = min(theirs, key=lambda name: statistics.median(theirs[name]))
    print('   ', {k: round(statistics.median(v), 3) for k, v in theirs.items()})
    ratios = [b / a for a, b in zip(ours, theirs[best])]
    print(f"| {what} | {statistics.median(ours):.3g} | {statistics.median(theirs[best]):.3g} ({best}) | "
          f"**{spread(ratios)}×** |", flush=True)


def header(title: str):
    print(f"\n| {title} | ours, s | transformers, s (fastest setting) | ratio (spread) |\n|---|---:|---:|---:|", flush=True)


# ---- Sections --------------------------------------------------------------------------------------------------------

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
            runs = {"ours": lambda: our_sampling(ours, prompts, N, T), "ours 1": lambda: our_sampling(ours, prompts, N, 1)}
            for kind in ("dynamic", "static", "prefix"):
                runs[kind] = lambda kind=kind: their_sampling(theirs, inputs, N, T, kind)
                runs[f"{kind} 1"] = lambda kind=kind: their_sampling(theirs, inputs, N, 1, kind)
            seconds = interleave(rounds, **runs)
            kinds = [name for name in runs if not name.endswith(" 1") and name != "ours"]
            less = lambda name: [whole - first for whole, first in zip(seconds[name], seconds[f"{name} 1"])]
            what = f"{size}, {pixels}×{pixels} image"
            show(f"{what}, whole", seconds["ours"], {kind: seconds[kind] for kind in kinds})
            show(f"{what}, decoding alone", less("ours"), {kind: less(kind) for kind in kinds})
        if size == "small":
            stop = list(range(10, ours.config.text_config.vocab_size, 40))
            prompts, ours.stop_tokens = make_prompts(4, SIDES[840]), stop
            inputs = their_inputs(prompts)
            runs = {kind: lambda kind=kind: their_sampling(theirs, inputs, N, T, kind, stop)
                    for kind in ("dynamic", "static", "prefix")}
            seconds = interleave(rounds, ours=lambda: our_sampling(ours, prompts, N, T), **runs)
            show(f"{size}, 840×840 image, 1 token in 40 ends", seconds.pop("ours"), seconds)


def check_sampling(theirs, ours, prompts, T: int = 16):
    """Greedy tokens are identical, and sampled log-probs those of transformers' forward."""
    greedy = our_sampling(ours, prompts, 1, T, greedy=True)
    for kind in ("dynamic", "static", "prefix"):
        tokens = their_sampling(theirs, their_inputs(prompts), 1, T, kind, sample=False)
        same = torch.equal(tokens, torch.stack([completion.ids for [completion] in greedy]))
        assert same, f"greedy tokens differ from transformers' with {kind} cache"
    for prompt, [row] in zip(prompts, our_sampling(ours, prompts, 1, T)):
        inputs = their_inputs([prompt], row.ids[None, :-1])
        theirs.model.rope_deltas = None
        with torch.no_grad():
            logits = theirs(**inputs, logits_to_keep=T, use_cache=False).logits[0]
        expected = logits.log_softmax(-1).gather(1, row.ids[:, None])[:, 0]
        assert (row.logprobs - expected).abs().max() < 1e-4


def bench_update(sizes, rounds: int):
    """Loss and backward of one group of 9 members; the other side repeats the prompt for each of them."""
    header("(b) loss and backward of a group of 9")
    for size in sizes:
        theirs, ours = make_networks(size)
        for pixels, T in ((840, 64), (840, 256), (224, 64)):
            [prompt] = make_prompts(1, SIDES[pixels])
            completions = torch.randint(10, 1000, (9, T), generator=torch.Generator().manual_seed(0))
            check_update(theirs, ours, prompt, completions)
            seconds = interleave(rounds, ours=lambda: our_loss(ours, prompt, completions), **{
                f"{rows} rows": lambda rows=rows: their_loss(theirs, prompt, completions, "each", rows)
                for rows in (1, 3, 9)}, **{
                f"vision once, {rows} rows": lambda rows=rows: their_loss(theirs, prompt, completions, "once", rows)
                for rows in (1, 9)})
            own = seconds.pop("ours")
            what = f"{size}, {pixels}×{pixels} image, {T} tokens"
            show(what, own, {name: values for name, values in seconds.items() if "once" not in name})
            show(f"{what}, vision once", own, {name: values for name, values in seconds.items() if "once" in name})


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


SECTIONS = {"sampling": bench_sampling, "update": bench_update}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=tuple(SIZES), help="one network size (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, float32, {options.rounds} rounds")
    for name in options.sections:
        SECTIONS[name]([options.size] if options.size else list(SIZES), options.rounds)


if __name__ == "__main__":
    main()
