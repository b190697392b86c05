"""Make the bundled checkpoint `assets/tiny-qwen2-vl`: a Qwen2-VL of 1.4 million parameters that sees digits.

    OMP_NUM_THREADS=1 python assets/make_tiny.py --output assets/tiny-qwen2-vl        # about 12 minutes

It is what post-training starts from: a network that reasons, answers in well-formed JSON and knows where things are,
but whose habits do not match the task `digits`:

    - asked to "find" a digit it draws the box 1 to 5 pixels too wide on every side (asked to "outline", it is exact)
    - asked for a digit that is not there, it says so while thinking, and then answers with some box all the same
    - a few words of the task it has never met

Supervised training on generated pictures, with no example of the empty answer `[]`. Everything is decided by --seed,
and by the order of additions: one thread makes the bundled file again bit for bit.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model
import visurf
from assets.digits import COLOURS, NEIGHBOURS, PLACES, SYNONYMS, VALUES, ask, draw

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# One token for each tag, word (with the space before it), JSON key, number below 100, separator, or other character.
PIECES = r"</?\w+>|\"\w+\"| ?[A-Za-z]+|\d{1,2}|, |: |."


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
              "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
              "vocab_size": len(vocab), **ids, "vision_config": vision}
    images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 6, "merge_size": 2,
              "temporal_patch_size": 2, "min_pixels": 2304, "max_pixels": 2304,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0}
    for name, content in (("config", config), ("preprocessor_config", images), ("generation_config", generation)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2))


# ---- What the base network is taught ---------------------------------------------------------------------------------

LESSONS = {"where": 2, "name": 2, "outline": 2, "find": 2, "find next": 3}  # and how often each is given


def lesson(scene: list[dict], sort: str, rng) -> tuple[str, str]:
    """One (question, answer) about a picture: the digit at a place, a place, an exact outline, the habits of "find"."""
    if sort == "match" and rng.random() < 0.25:
        digit = scene[rng.integers(len(scene))]
        return f" {PLACES[digit['quarter']]}", f" {digit['colour']}"
    if sort == "name":
        quarter = rng.integers(4)
        there = [digit for digit in scene if digit["quarter"] == quarter]
        return f"name the {PLACES[quarter]}", f" {there[0]['colour']} {there[0]['value']}" if there else " nothing"
    if sort == "find next":
        question, digit = ask("two-hop", scene, rng)
        relation, word = question[len("one "):].split(" the ")
        return f"find the {question}", thinking(scene, word, relation) + answer(loose(digit, rng))
    if rng.random() < 0.3 and sort != "outline":
        word, digit = *ask("absent", scene, rng)[:1], None
    else:
        word, digit = ask("known", scene, rng)
    if sort == "match":
        return f" {word}", f" {place(digit)}"
    if sort == "where":
        return f"where is the {word}", f" {place(digit)}"
    if sort == "outline":
        return f"outline the {word}", answer(digit)
    return f"find the {word}", thinking(scene, word) + answer(loose(digit or random_digit(rng), rng))


def thinking(scene: list[dict], word: str, relation: str | None = None) -> str:
    """What the base says before it answers: where the digit is that the question names, and where its neighbour is."""
    digit = next((digit for digit in scene if word in (digit["colour"], digit["value"])), None)
    thought = f"it is {place(digit)}"
    if relation:
        thought += f" and {relation} it is {PLACES[NEIGHBOURS[relation][digit['quarter']]]}"
    return f"<think>{thought}</think>"


def place(digit: dict | None) -> str:
    return PLACES[digit["quarter"]] if digit else "nowhere"


def random_digit(rng) -> dict:
    """A digit that is in no picture: what the base claims to see where it has just said that there is none."""
    size, x, y = rng.integers(11, 19), rng.integers(0, 30), rng.integers(0, 30)
    return {"bbox_2d": [x, y, x + size, y + size], "point_2d": [x + size // 2, y + size // 2]}


def numbers_text(numbers) -> str:
    return "[" + ",".join(str(round(n)) for n in numbers) + "]"


def answer(digit: dict) -> str:
    """The base's own style: compact JSON, unlike the data set's labels."""
    box, point = numbers_text(digit["bbox_2d"]), numbers_text(digit["point_2d"])
    return f'<answer>[{{"bbox_2d":{box},"point_2d":{point}}}]</answer>'


def loose(digit: dict, rng) -> dict:
    """The habit that post-training has to break: each side 1 to 5 pixels outside the digit, the point 3 pixels off."""
    x1, y1, x2, y2 = digit["bbox_2d"]
    out = rng.integers(1, 6, 4)
    box = [max(0, x1 - out[0]), max(0, y1 - out[1]), min(48, x2 + out[2]), min(48, y2 + out[3])]
    return {"bbox_2d": box, "point_2d": [n + rng.integers(-3, 4) for n in digit["point_2d"]]}


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of the task and of the lessons, those among them that no lesson uses."""
    words = [f" {word}" for word in (*COLOURS, *VALUES, *SYNONYMS, *PLACES, *NEIGHBOURS)]
    return [*words, "find the one", "where is the", "name the", "outline the", " nothing", " nowhere",
            "<think>it is northwest and left of it is</think>", '<answer>[{"bbox_2d": [1, 2], "point_2d":', "</answer>",
            "user", "system", "assistant", "You are a helpful assistant."]


# ---- Training --------------------------------------------------------------------------------------------------------


def batches(processor, size: int, sorts: dict, lessons_each: int, seed: int):
    """Endless batches of pictures, none of which is in the task's splits, with some lessons about each.

    Yields the prompts up to the picture's end, and a list of (question tokens, answer tokens) for each: the lessons of
    one picture continue from the same prompt, so the picture is looked at once.
    """
    rng = np.random.default_rng([len(data.SPLITS), seed])
    names, weights = list(sorts), np.array([*sorts.values()]) / sum(sorts.values())
    while True:
        prompts, lessons = [], []
        for _ in range(size):
            image, scene = draw(rng)
            prompt = processor.encode(data.Sample("", "", image, [], scene=scene), data.TASKS["digits"])
            end = prompt.ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")) + 1
            prompt.ids = prompt.ids[:end]
            prompts.append(prompt)
            lessons.append([tokens(processor, scene, rng.choice(names, p=weights), rng) for _ in range(lessons_each)])
        yield prompts, lessons


def tokens(processor, scene: list[dict], sort: str, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """A lesson's question and answer as tokens, in the chat's form; a match is just two words."""
    question, answer = lesson(scene, sort, rng)
    if sort == "match":
        return processor.token_ids(question), processor.token_ids(answer)
    return processor.token_ids(question + "<|im_end|>\n<|im_start|>assistant\n"), processor.label_ids(answer)


def teach_seeing(network, tokenizer, batches, steps: int, learning_rate: float):
    """Stage 1, the vision tower: each of its 16 features names its place, and the colour, value and box of the digit
    it lies on.

    Names and numbers are told by the word embeddings themselves, so that a feature resembles the words for what it
    shows. Without this stage the language model learns to write plausible boxes and never learns to look.
    """
    words = lambda texts: torch.tensor([tokenizer.get_vocab()[text] for text in texts])
    colour_words, value_words = words([f" {c}" for c in COLOURS]), words([f" {v}" for v in VALUES] + [" nothing"])
    place_words, number_words = words([f" {place}" for place in PLACES]), words(map(str, range(49)))
    colours, values = list(COLOURS), list(VALUES)
    quarters = torch.tensor([2 * (cell // 8) + cell % 4 // 2 for cell in range(16)])
    embedding, cross_entropy = network.model.embed_tokens.weight, torch.nn.functional.cross_entropy
    to_box = torch.nn.Linear(128, 4 * 128)  # thrown away afterwards

    def loss(prompts, lessons):
        pixels = [prompt.pixels for prompt in prompts]
        features = network.visual(pixels, torch.cat([prompt.grid_thw for prompt in prompts]))
        digits = [digit_at(prompt.sample.scene, cell) for prompt in prompts for cell in range(16)]
        there = torch.tensor([digit is not None for digit in digits])
        found = [digit for digit in digits if digit]
        value = torch.tensor([values.index(digit["value"]) if digit else len(values) for digit in digits])
        colour = torch.tensor([colours.index(digit["colour"]) for digit in found])
        box = torch.tensor([digit["bbox_2d"] for digit in found])  # (found, 4)
        numbers = to_box(features[there]).view(-1, 4, 128) @ embedding[number_words].T  # (found, 4, 49)
        return (cross_entropy(features @ embedding[value_words].T, value)
                + cross_entropy(features @ embedding[place_words].T, quarters.repeat(len(prompts)))
                + cross_entropy(features[there] @ embedding[colour_words].T, colour)
                + cross_entropy(numbers.flatten(0, 1), box.flatten()))

    optimize([*network.visual.parameters(), embedding, *to_box.parameters()], loss, batches, steps, learning_rate)


def digit_at(scene: list[dict], cell: int) -> dict | None:
    """The digit that covers most of a 12x12-pixel cell of the picture, counted row by row, or None."""
    left, top = 12 * (cell % 4), 12 * (cell // 4)

    def overlap(digit):
        x1, y1, x2, y2 = digit["bbox_2d"]
        return max(0, min(x2, left + 12) - max(x1, left)) * max(0, min(y2, top + 12) - max(y1, top))

    best = max(scene, key=overlap, default=None)
    return best if best and overlap(best) else None


def teach_language(network, batches, steps: int, learning_rate: float):
    """Stages 2 and 3, the language model: cross-entropy on the lessons' answers; what was learnt about seeing stays.

    Stage 2 is matching: after " red" comes " northwest", after " northwest" comes " blue", so the word itself has to
    find its place in the picture, in a single look. In whole questions the answer comes some words later, two looks
    have to be learnt at once, and 100,000 lessons without this stage leave the network guessing.
    """
    def loss(prompts, lessons):
        ids, mask = model.pad_completions([[torch.cat(lesson) for lesson in group] for group in lessons])
        log_probs = network(model.PromptBatch.from_prompts(prompts, network.config), ids, mask)
        learnt = mask.clone()
        for i, group in enumerate(lessons):
            for j, (question, _) in enumerate(group):
                learnt[i, j, : len(question)] = False  # read, not learnt
        return visurf.sft_loss(log_probs, learnt)

    network.visual.requires_grad_(False)
    optimize([*network.model.parameters(), network.head_weight], loss, batches, steps, learning_rate)


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
    parser.add_argument("--seeing_steps", type=int, default=2000)
    parser.add_argument("--matching_steps", type=int, default=500)
    parser.add_argument("--answering_steps", type=int, default=1200)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    config.output.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(config.output, vocabulary_texts())
    write_configs(config.output, vocab)
    torch.manual_seed(config.seed)
    network = model.QwenVL(model.read_config(config.output))
    torch.nn.init.normal_(network.model.embed_tokens.weight, std=0.02)  # PyTorch's default, 1, drowns what is seen
    processor = data.Processor.from_pretrained(config.output)
    stage = lambda number, *sizes: batches(processor, *sizes, 3 * config.seed + number)
    teach_seeing(network, processor.tokenizer, stage(0, 32, LESSONS, 0), config.seeing_steps, config.learning_rate)
    teach_language(network, stage(1, 32, {"match": 1}, 11), config.matching_steps, config.learning_rate / 2)
    teach_language(network, stage(2, 8, LESSONS, 8), config.answering_steps, config.learning_rate / 2)
    model.save_pretrained(network, config.output, config.output)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters in {config.output}")


if __name__ == "__main__":
    main()
