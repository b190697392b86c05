"""Make the bundled checkpoint `assets/tiny-qwen2-vl`: a Qwen2-VL of 1.4 million parameters.

    OMP_NUM_THREADS=1 python extras/make_tiny.py --output runs/tiny        # about 12 minutes

It is what post-training on `assets/digits` starts from: a network that reasons, answers in
well-formed JSON and knows where things are, but whose habits do not match the task:

    - asked to "find" a digit, it draws the box 1 to 5 pixels too wide on every side
      (asked to "outline" it, it is exact)
    - asked for a digit that is not there, it says so while thinking, and then answers with a box
    - a few words of the task it has never met

It learns from generated pictures, and never sees the empty answer `[]`. --seed decides everything,
so that with one thread the same machine makes the same file again.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import data
import model
import visurf
from memory import empty_network
from make_digits import COLOURS, NEIGHBOURS, PLACES, SYNONYMS, VALUES, ask, draw

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# A token is a tag, a word with the space before it, a JSON key, a number below 100, a separator,
# or any other character.
TOKEN = r"</?\w+>|\"\w+\"| ?[A-Za-z]+|\d{1,2}|, |: |.|\n"
SIDE, FEATURES = 48, 16              # pixels, and image tokens, 4 x 4
# How often each kind of lesson is given.
LESSONS = {"where": 2, "name": 2, "outline": 2, "find": 2, "find next": 3}
# Qwen2-VL's, for a user's turn with an image and a text.
CHAT_TEMPLATE = r'''{%- if messages[0].role != "system" -%}
{{ "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|im_start|>" + message.role + "\n" }}
{%- for part in message.content -%}
{%- if part.type == "image" -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ "<|im_end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\n" }}
{%- endif -%}
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "tiny-qwen2-vl")
    parser.add_argument("--seeing_steps", type=int, default=2000)
    parser.add_argument("--matching_steps", type=int, default=500)
    parser.add_argument("--answering_steps", type=int, default=1200)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make(settings, Path(directory))


def make(settings, source: Path):
    """Write tokenizer and configuration to `source`, train, and save it all to settings.output."""
    vocab = write_tokenizer(source, vocabulary_texts())
    write_configs(source, vocab)
    torch.manual_seed(settings.seed)
    network = random_network(source)
    processor = data.Processor(source, data.TASKS["digits"])

    def lessons(stage, *sizes):
        return batches(processor, *sizes, seed=3 * settings.seed + stage)

    rate = settings.learning_rate
    teach_seeing(network, processor.tokenizer, lessons(0, 32, LESSONS, 0),
                 settings.seeing_steps, rate)
    teach_language(network, lessons(1, 32, {"match": 1}, 11), settings.matching_steps, rate / 2)
    teach_language(network, lessons(2, 8, LESSONS, 8), settings.answering_steps, rate / 2)
    settings.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(network, settings.output, source)
    size = sum(parameter.numel() for parameter in network.parameters())
    print(f"{size / 1e6:.2f} M parameters in {settings.output}")


# ---- The empty network ---------------------------------------------------------------------------

def write_tokenizer(directory: Path, texts: list[str]) -> dict[str, int]:
    """A word-level tokenizer for the words in `texts`, in the `tokenizers` library's own format."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    splitter = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    words = {str(number) for number in range(100)} | set(' \n,:.[]{}<>"-0123456789')
    for text in texts:
        words |= {token for token, _ in splitter.pre_tokenize_str(text)}
    vocab = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return vocab


def write_configs(directory: Path, vocab: dict):
    """config.json in the hub's layout, and the settings of image processor and generation."""
    vision = {
        "depth": 3,
        "embed_dim": 96,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_ratio": 4,
        "in_chans": 3,
        "patch_size": 6,
        "spatial_merge_size": 2,
        "spatial_patch_size": 6,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "coordinates": "pixels",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": len(vocab),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "vision_token_id": 5,
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_config": vision,
    }
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 6,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0}
    files = {"config": config, "preprocessor_config": images, "generation_config": generation}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2))


def random_network(directory: Path) -> model.GroupPolicy:
    """A network by the configuration in a folder, with PyTorch's usual random weights."""
    network = empty_network(AutoConfig.from_pretrained(directory))
    network.to_empty(device="cpu")
    for module in network.vlm.modules():
        network.vlm._init_weights(module)        # norms, and the buffers of rotary tables
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            module.reset_parameters()
    # PyTorch's default, 1, would drown what is seen.
    torch.nn.init.normal_(network.vlm.get_input_embeddings().weight, std=0.02)
    return network.train()


# ---- What the base network is taught -------------------------------------------------------------

def lesson(scene: list[dict], sort: str, rng) -> tuple[str, str]:
    """One (question, answer) about a picture: what is where, an outline, the habits of "find"."""
    if sort == "match" and rng.random() < 0.25:
        digit = scene[rng.integers(len(scene))]
        return f" {PLACES[digit['quarter']]}", f" {digit['colour']}"
    if sort == "name":
        quarter = rng.integers(4)
        there = [digit for digit in scene if digit["quarter"] == quarter]
        name = f" {there[0]['colour']} {there[0]['value']}" if there else " nothing"
        return f"name the {PLACES[quarter]}", name
    if sort == "find next":
        question, digit = ask("two-hop", scene, rng)
        relation, word = question.removeprefix("one ").split(" the ")
        return f"find the {question}", thinking(scene, word, relation) + answer(loose(digit, rng))
    if rng.random() < 0.3 and sort != "outline":
        word, digit = ask("absent", scene, rng)
    else:
        word, digit = ask("known", scene, rng)
    if sort == "match":
        return f" {word}", f" {place(digit)}"
    if sort == "where":
        return f"where is the {word}", f" {place(digit)}"
    if sort == "outline":
        return f"outline the {word}", answer(digit)
    claimed = digit or random_digit(rng)
    return f"find the {word}", thinking(scene, word) + answer(loose(claimed, rng))


def thinking(scene: list[dict], word: str, relation: str | None = None) -> str:
    """The base's reasoning: where the digit is that the question names, and where its neighbour."""
    named = [digit for digit in scene if word in (digit["colour"], digit["value"])]
    digit = named[0] if named else None
    thought = f"it is {place(digit)}"
    if relation:
        thought += f" and {relation} it is {PLACES[NEIGHBOURS[relation][digit['quarter']]]}"
    return f"<think>{thought}</think>"


def place(digit: dict | None) -> str:
    return PLACES[digit["quarter"]] if digit else "nowhere"


def random_digit(rng) -> dict:
    """A digit that is in no picture; the base claims to see it after saying that there is none."""
    size, x, y = rng.integers(11, 19), rng.integers(0, 30), rng.integers(0, 30)
    return {"bbox_2d": [x, y, x + size, y + size], "point_2d": [x + size // 2, y + size // 2]}


def numbers_text(numbers) -> str:
    return "[" + ",".join(str(round(n)) for n in numbers) + "]"


def answer(digit: dict) -> str:
    """The base's own style: compact JSON, unlike the data set's labels."""
    box = numbers_text(digit["bbox_2d"])
    point = numbers_text(digit["point_2d"])
    return f'<answer>[{{"bbox_2d":{box},"point_2d":{point}}}]</answer>'


def loose(digit: dict, rng) -> dict:
    """The habit to be broken: each side 1 to 5 pixels outside the digit, the point 3 pixels off."""
    x1, y1, x2, y2 = digit["bbox_2d"]
    out = rng.integers(1, 6, 4)
    box = [max(0, x1 - out[0]), max(0, y1 - out[1]), min(SIDE, x2 + out[2]), min(SIDE, y2 + out[3])]
    return {"bbox_2d": box, "point_2d": [n + rng.integers(-3, 4) for n in digit["point_2d"]]}


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of the task and of the lessons, also words no lesson uses."""
    words = [f" {word}" for word in (*COLOURS, *VALUES, *SYNONYMS, *PLACES, *NEIGHBOURS)]
    return [*words, "find the one", "where is the", "name the", "outline the", " nothing",
            " nowhere", "<think>it is northwest and left of it is</think>",
            '<answer>[{"bbox_2d": [1, 2], "point_2d":', "</answer>", "user", "system", "assistant",
            "You are a helpful assistant."]


# ---- Training ------------------------------------------------------------------------------------

def batches(processor, size: int, sorts: dict, lessons_each: int, seed: int):
    """Endless batches of pictures, none of which is in the data set, with lessons about each.

    Yields the scenes, the prompts up to the picture's end, and for each a list of (question tokens,
    answer tokens). The lessons of a picture share their prompt, so it is looked at once.
    """
    rng = np.random.default_rng([3, seed])               # splits of the data set have 0 to 2
    weights = np.array([*sorts.values()]) / sum(sorts.values())
    end_of_image = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    while True:
        scenes, prompts, lessons = [], [], []
        for _ in range(size):
            image, scene = draw(rng)
            frame = (SIDE, SIDE)
            prompt = processor.encode(data.Sample("", "", image, [], frame, frame))
            prompt.ids = prompt.ids[:prompt.ids.tolist().index(end_of_image) + 1]
            scenes.append(scene)
            prompts.append(prompt)
            kinds = [rng.choice(list(sorts), p=weights) for _ in range(lessons_each)]
            lessons.append([tokens(processor, scene, kind, rng) for kind in kinds])
        yield scenes, prompts, lessons


def tokens(processor, scene: list[dict], sort: str, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """A lesson's question and answer as tokens, in the chat's form; a match is just two words."""
    question, answer = lesson(scene, sort, rng)
    if sort == "match":
        return processor.token_ids(question), processor.token_ids(answer)
    question += "<|im_end|>\n<|im_start|>assistant\n"
    return processor.token_ids(question), processor.token_ids(answer + data.END)


def teach_seeing(network, tokenizer, batches, steps: int, learning_rate: float):
    """Stage 1, the vision tower: each of its 16 features names its place, and the colour, value and
    box of the digit it lies on.

    Names and numbers are told by the word embeddings themselves, so that a feature resembles the
    words for what it shows. Without this stage the language model learns to write plausible boxes
    and never learns to look.
    """
    def words(texts):
        return torch.tensor(tokenizer.convert_tokens_to_ids(list(texts)))

    colour_words = words(f" {colour}" for colour in COLOURS)
    value_words = words([*(f" {value}" for value in VALUES), " nothing"])
    place_words = words(f" {place}" for place in PLACES)
    number_words = words(str(number) for number in range(SIDE + 1))
    quarters = torch.tensor([2 * (cell // 8) + cell % 4 // 2 for cell in range(FEATURES)])
    visual = network.vlm.model.visual
    embedding = network.vlm.get_input_embeddings().weight
    to_box = torch.nn.Linear(128, 4 * 128)               # thrown away afterwards

    def loss(scenes, prompts, lessons):
        batch = model.PromptBatch.from_prompts(prompts)
        features = visual(batch.pixels, grid_thw=batch.grid_thw).pooler_output
        digits = [digit_at(scene, cell) for scene in scenes for cell in range(FEATURES)]
        found = [digit for digit in digits if digit]
        there = torch.tensor([digit is not None for digit in digits])
        values = [VALUES.index(digit["value"]) if digit else len(VALUES) for digit in digits]
        colours = [list(COLOURS).index(digit["colour"]) for digit in found]
        box = torch.tensor([digit["bbox_2d"] for digit in found])                # (found, 4)
        numbers = to_box(features[there]).view(-1, 4, 128) @ embedding[number_words].T
        return (cross_entropy(features @ embedding[value_words].T, torch.tensor(values))
                + cross_entropy(features @ embedding[place_words].T, quarters.repeat(len(scenes)))
                + cross_entropy(features[there] @ embedding[colour_words].T, torch.tensor(colours))
                + cross_entropy(numbers.flatten(0, 1), box.flatten()))

    parameters = [*visual.parameters(), embedding, *to_box.parameters()]
    optimize(parameters, loss, batches, steps, learning_rate)


def digit_at(scene: list[dict], cell: int) -> dict | None:
    """The digit that covers most of a 12x12-pixel cell of the picture, counted row by row."""
    left, top = 12 * (cell % 4), 12 * (cell // 4)

    def overlap(digit):
        x1, y1, x2, y2 = digit["bbox_2d"]
        width = min(x2, left + 12) - max(x1, left)
        height = min(y2, top + 12) - max(y1, top)
        return max(0, width) * max(0, height)

    best = max(scene, key=overlap)
    return best if overlap(best) > 0 else None


def teach_language(network, batches, steps: int, learning_rate: float):
    """Stages 2 and 3, the language model: cross-entropy on the answers; what is seen stays.

    Stage 2 is matching: after " red" comes " northwest", after " northwest" comes " blue", so the
    word itself has to find its place in the picture, in a single look. In whole questions the
    answer comes some words later, two looks have to be learnt at once, and 100,000 lessons without
    this stage leave the network guessing.
    """
    def loss(scenes, prompts, lessons):
        texts = [[torch.cat(lesson) for lesson in group] for group in lessons]
        ids, mask = model.pad_completions(texts)
        logprobs = network(model.PromptBatch.from_prompts(prompts), ids, mask)
        learnt = mask.clone()
        for i, group in enumerate(lessons):
            for j, (question, _) in enumerate(group):
                learnt[i, j, :len(question)] = False     # read, not learnt
        return visurf.sft_loss(logprobs, learnt)

    network.vlm.model.visual.requires_grad_(False)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimize(parameters, loss, batches, steps, learning_rate)


def optimize(parameters, loss_function, batches, steps: int, learning_rate: float):
    """AdamW with a one-cycle schedule; prints a running mean of the loss."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    mean = 0.0
    for step in range(1, steps + 1):
        loss = loss_function(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0:
            seconds = time.time() - start
            print(f"step {step:5d}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
