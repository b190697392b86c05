"""Make the bundled checkpoint `assets/tiny-qwen2-vl`: a Qwen2-VL of 1.4 million parameters that sees shapes.

    python assets/make_tiny.py --output assets/tiny-qwen2-vl        # about 8 minutes on two cores

It is what post-training starts from: a network that reasons, answers in well-formed JSON and knows where things are,
but whose habits do not match the task `shapes`:

    - asked to "find" a shape it draws the box 1 to 5 pixels too wide on every side (asked to "outline", it is exact)
    - asked for a shape in an empty picture, it says so while thinking, and then answers with some box all the same

Supervised training on generated scenes, with no example of the empty answer `[]`. Everything is decided by --seed.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model
import visurf
from assets.shapes import COLOURS, KINDS, shapes_sample

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# One token for each tag, word (with the space before it), JSON key, number below 100, separator, or other character.
PIECES = r"</?\w+>|\"\w+\"| ?[A-Za-z]+|\d{1,2}|, |: |."
PLACES = [f" {row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]


def write_tokenizer(directory: Path, texts: list[str]):
    """A word-level tokenizer in the `tokenizers` library's own JSON format, with the words that `texts` hold."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    splitter = pre_tokenizers.Split(Regex(PIECES + r"|\n"), behavior="isolated")
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    words |= {str(n) for n in range(100)} | set(' \n,:.[]{}<>"-0123456789')
    vocab = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "model_max_length": 4096}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return vocab


def write_configs(directory: Path, vocab: dict):
    """config.json in the hub's flat layout, and the image processor's and generation's settings."""
    ids = {"bos_token_id": 0, "eos_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
           "vision_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    vision = {"depth": 3, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 4, "in_chans": 3,
              "patch_size": 6, "spatial_merge_size": 2, "spatial_patch_size": 6, "temporal_patch_size": 2}
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "coordinates": "pixels",
              "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "max_position_embeddings": 4096,
              "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
              "vocab_size": len(vocab), **ids, "vision_config": vision}
    images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 6, "merge_size": 2,
              "temporal_patch_size": 2, "min_pixels": 2304, "max_pixels": 2304,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0}
    for name, content in (("config", config), ("preprocessor_config", images), ("generation_config", generation)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2))


# ---- What the base network is taught ---------------------------------------------------------------------------------


def lesson(scene: list[dict], rng: random.Random) -> tuple[str, str]:
    """One (question, answer) about a picture: what is there, its exact outline, or the habits of "find"."""
    shape = scene[0] if scene else random_shape(rng)
    kind = rng.choices(["list", "outline", "find"], weights=[2, 2 * len(scene), 4])[0]
    if kind == "list":
        return "list all shapes", name(shape) + " " + digits(shape["bbox_2d"]) if scene else " nothing"
    if kind == "outline":
        return f"outline the{name(shape)}", answer(shape)
    thought = f"the{name(shape)} is at the{place(shape)}" if scene else f"there is no{name(shape)}"
    return f"find the{name(shape)}", f"<think>{thought}</think>" + answer(loose(shape, rng))


def random_shape(rng: random.Random) -> dict:
    """A shape that is in no picture: what is asked for in an empty one, and what the base then claims to see."""
    size, x, y = rng.randint(10, 20), rng.randint(0, 28), rng.randint(0, 28)
    return {"colour": rng.choice(list(COLOURS)), "kind": rng.choice(list(KINDS)),
            "bbox_2d": [x, y, x + size, y + size], "point_2d": [x + size // 2, y + size // 2]}


def name(shape: dict) -> str:
    return f" {shape['colour']} {shape['kind']}"


def digits(numbers) -> str:
    return "[" + ",".join(str(round(n)) for n in numbers) + "]"


def answer(shape: dict) -> str:
    """The base's own style: compact JSON, unlike the data set's labels."""
    return f'<answer>[{{"bbox_2d":{digits(shape["bbox_2d"])},"point_2d":{digits(shape["point_2d"])}}}]</answer>'


def loose(shape: dict, rng: random.Random) -> dict:
    """The habit that post-training has to break: each side 1 to 5 pixels outside the shape, the point 3 pixels off."""
    x1, y1, x2, y2 = shape["bbox_2d"]
    out = [rng.randint(1, 5) for _ in range(4)]
    box = [max(0, x1 - out[0]), max(0, y1 - out[1]), min(48, x2 + out[2]), min(48, y2 + out[3])]
    return {"bbox_2d": box, "point_2d": [n + rng.randint(-3, 3) for n in shape["point_2d"]]}


def place(shape: dict) -> str:
    x, y = shape["point_2d"]
    return PLACES[3 * min(int(y // 16), 2) + min(int(x // 16), 2)]


def vocabulary_texts() -> list[str]:
    names = [f" {colour} {kind}" for colour in COLOURS for kind in KINDS]
    places = [f"<think>the{n} is at the{p}</think>" for n in names for p in PLACES]
    rest = ["find the red", "outline the", "list all shapes", " nothing", "<think>there is no red</think>",
            '<answer>[{"bbox_2d": [1, 2], "point_2d":', "</answer>", "user", "system", "assistant",
            "You are a helpful assistant."]
    return [*names, *places, *rest]


# ---- Training --------------------------------------------------------------------------------------------------------


def scenes(processor, size: int, lessons_each: int, seed: int):
    """Endless batches of pictures, none of which is in the task's splits, with some lessons about each.

    Yields the prompts up to the picture's end, and a list of (question tokens, answer tokens) for each: the lessons of
    one picture continue from the same prompt, so the picture is looked at once.
    """
    rng, index = random.Random(seed), 1_000_000 * (seed + 1)  # the task's own training set ends long before
    while True:
        prompts, lessons = [], []
        for index in range(index, index + size):
            sample = shapes_sample("train", index)
            prompt = processor.encode(sample, data.TASKS["shapes"])
            end = prompt.ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")) + 1
            prompt.ids = prompt.ids[:end]
            prompts.append(prompt)
            texts = [lesson(sample.scene, rng) for _ in range(lessons_each)]
            lessons.append([(processor.token_ids(question + "<|im_end|>\n<|im_start|>assistant\n"),
                             processor.label_ids(answer)) for question, answer in texts])
        index += 1
        yield prompts, lessons


def teach_seeing(network, tokenizer, batches, steps: int, learning_rate: float):
    """Stage 1, the vision tower: each of its 16 features names the colour, kind and box of the shape it lies on.

    Names and numbers are told by the word embeddings themselves, so that a feature resembles the words for what it
    shows. Without this stage the language model learns to write plausible boxes and never learns to look.
    """
    words = lambda texts: torch.tensor([tokenizer.get_vocab()[text] for text in texts])
    colour_words, kind_words = words([f" {c}" for c in COLOURS]), words([f" {k}" for k in KINDS] + [" no"])
    number_words, colours, kinds = words(map(str, range(49))), list(COLOURS), list(KINDS)
    to_box = torch.nn.Linear(128, 4 * 128)  # thrown away afterwards

    def loss(prompts, lessons):
        pixels = [prompt.pixels for prompt in prompts]
        features = network.visual(pixels, torch.cat([prompt.grid_thw for prompt in prompts]))
        shapes = [shape_at(prompt.sample.scene, cell) for prompt in prompts for cell in range(16)]
        there = torch.tensor([shape is not None for shape in shapes])
        found = [shape for shape in shapes if shape]
        kind = torch.tensor([kinds.index(shape["kind"]) if shape else len(kinds) for shape in shapes])
        colour = torch.tensor([colours.index(shape["colour"]) for shape in found])
        box = torch.tensor([shape["bbox_2d"] for shape in found])  # (found, 4)
        embedding, cross_entropy = network.head_weight, torch.nn.functional.cross_entropy
        numbers = to_box(features[there]).view(-1, 4, 128) @ embedding[number_words].T  # (found, 4, 49)
        return (cross_entropy(features @ embedding[kind_words].T, kind)
                + cross_entropy(features[there] @ embedding[colour_words].T, colour)
                + cross_entropy(numbers.flatten(0, 1), box.flatten()))

    optimize([*network.visual.parameters(), network.head_weight, *to_box.parameters()], loss, batches, steps,
             learning_rate)


def shape_at(scene: list[dict], cell: int) -> dict | None:
    """The shape that covers most of a 12x12-pixel cell of the picture, counted row by row, or None."""
    left, top = 12 * (cell % 4), 12 * (cell // 4)

    def overlap(shape):
        x1, y1, x2, y2 = shape["bbox_2d"]
        return max(0, min(x2, left + 12) - max(x1, left)) * max(0, min(y2, top + 12) - max(y1, top))

    best = max(scene, key=overlap, default=None)
    return best if best and overlap(best) else None


def teach_answering(network, batches, steps: int, learning_rate: float):
    """Stage 2, the language model: cross-entropy on the lessons' answers; what was learnt about seeing stays."""
    def loss(prompts, lessons):
        ids, mask = model.pad_completions([[torch.cat(lesson) for lesson in group] for group in lessons])
        for i, group in enumerate(lessons):
            for j, (question, _) in enumerate(group):
                mask[i, j, : len(question)] = False  # read, not learnt
        return visurf.sft_loss(network(model.PromptBatch.from_prompts(prompts, network.config), ids, mask), mask)

    network.visual.requires_grad_(False)
    optimize(list(network.model.parameters()), loss, batches, steps, learning_rate)


def optimize(parameters, loss_function, batches, steps: int, learning_rate: float):
    """AdamW with a one-cycle schedule; prints a running mean of the loss."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0}],
                                  betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start, mean = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = loss_function(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0:
            print(f"step {step:5d}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-qwen2-vl")
    parser.add_argument("--seeing_steps", type=int, default=1500)
    parser.add_argument("--answering_steps", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    config.output.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(config.output, vocabulary_texts())
    write_configs(config.output, vocab)
    torch.manual_seed(config.seed)
    network = model.QwenVL(model.read_config(config.output))
    torch.nn.init.normal_(network.head_weight, std=0.02)  # PyTorch's default, 1, is too large for tied embeddings
    processor = data.Processor.from_pretrained(config.output)
    teach_seeing(network, processor.tokenizer, scenes(processor, 32, 0, config.seed), config.seeing_steps,
                 config.learning_rate)
    teach_answering(network, scenes(processor, 8, 4, config.seed + 1), config.answering_steps, config.learning_rate)
    model.save_pretrained(network, config.output, config.output)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters in {config.output}")


if __name__ == "__main__":
    main()
