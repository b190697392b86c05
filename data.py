"""Data: from a row of a file to what the network reads.

    row -> load_samples -> Sample (image, question, label) -> Processor.encode -> Example

A label is a list of objects {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, [] if nothing is
there, or else a text. Corners are edges of pixels, so a box is x2 - x1 wide. Coordinates run to a
frame, a (width, height): that of the original image, of the resized one, or (1000, 1000)."""

import base64
import json
import os
import re
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
from PIL import Image, ImageOps

import rewards

ASSETS = Path(__file__).resolve().parent / "assets"
END = "<|im_end|>"                # of a completion
SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
CONVERTER = "extras/convert.py takes the rows of LLaVA, VLM-R1 and ms-swift"
# Answers are in "pixels" of the image that the model sees, or run from 0 to 1000 ("relative").
COORDINATES = {"qwen2_vl": "relative", "qwen2_5_vl": "pixels", "qwen3_vl": "relative"}

class UserError(ValueError):
    """A user's mistake: where it is, what is wrong, and the remedy."""

def require(condition, message):
    """Raise UserError, with this message, unless the condition holds."""
    if not condition:
        raise UserError(message)

# ---- Tasks ---------------------------------------------------------------------------------------
BOXES = ("For each give its bounding box [x1, y1, x2, y2] and one point [x, y] on it, in whole "
         "numbers: x runs from 0 at the left edge to {width} at the right, y from 0 at the top "
         "to {height} at the bottom. If there is nothing to find, the list is []. ")
FIND = 'Find everything in the image that matches "{question}". ' + BOXES
FORMAT = ("First reason about what you see, between <think> and </think>. Then write the answer, "
          "between <answer> and </answer>. For example: <think>your reasoning</think>")
OBJECTS = FORMAT + '<answer>[{{"bbox_2d": [120, 85, 480, 571], "point_2d": [310, 352]}}]</answer>'

@dataclass(frozen=True)
class Task:
    """Wording, label columns, metrics and defaults of a task; docs/data.md shows how to add one."""
    name: str
    prompt: str = FIND + OBJECTS
    kind: str = "objects"         # of answers: "objects", "count" or "math", see rewards.py
    reward: object = rewards.score        # or a function that is called like it
    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    data: str = ""                # default data for training; "" if there is none
    eval_data: str = ""
    columns: tuple = ("solution", "bbox")     # the label is in the first that a row has
    metrics: tuple = ("accuracy", "one_to_one", "gIoU", "cIoU", "N-Acc")     # the main one first
    image_size: int = 840         # images become squares of this side,
    keep_shape: bool = False      # or keep their shape, with as many pixels at most
    recipe: dict = field(default_factory=dict)        # its own defaults for flags

TASKS = {task.name: task for task in (
    Task("grounding", data="Ricky06662/ViSurf_multi_non_object_7300_size840",
         eval_data="Ricky06662/grefcoco_val_all"),
    Task("gui", 'Find the one element of this screen to click for this: "{question}". '
         + BOXES + OBJECTS, metrics=("point_in_box", "accuracy", "gIoU")),
    Task("anomaly", 'Find every defect of the object in the image: "{question}". '
         + BOXES + OBJECTS, metrics=("anomaly_acc", "ROC-AUC", "accuracy", "gIoU", "cIoU")),
    Task("medical"),
    Task("counting", FIND + "Where there is too much to list, write just their number. " + OBJECTS,
         "count", data="Ricky06662/VisionReasoner_multi_object_7k_840",
         eval_data="Ricky06662/counting_pixmo_test",
         columns=("solution", "bbox", "answer", "count"), metrics=("count_acc", "MAE")),
    # Images keep their shape: a squashed drawing has other angles.
    Task("math", "{question}\nLook at the image, and find the answer. " + FORMAT
         + r"<answer>\frac{{3}}{{4}}</answer>", "math", data="hiyouga/geometry3k",
         eval_data="hiyouga/geometry3k", keep_shape=True, columns=("answer", "solution"),
         metrics=("accuracy",), recipe={"max_completion_length": 1024}),
    # Bundled: its small network knows some hundred words. Thresholds: 2 and 4 pixels of 48.
    Task("digits", "{question}", model=str(ASSETS / "tiny-qwen2-vl"),
         data=str(ASSETS / "digits"), eval_data=str(ASSETS / "digits"), image_size=48,
         reward=partial(rewards.score, l1_below=2 * 840 / 48, distance_below=4 * 840 / 48),
         recipe={"learning_rate": 2e-4, "max_steps": 240, "batch_size": 8, "micro_batch_size": 8,
                 "max_completion_length": 64, "checkpoint_activations": False}),
)}

# ---- From rows to samples ------------------------------------------------------------------------
@dataclass
class Sample:
    """A question about an image, and its label."""
    id: str
    question: str
    image: object                 # a path, a Pillow image, or a function that finds it
    label: list[dict] | str       # objects, or the text between the answer tags
    frame: tuple                  # the label's coordinates run to this
    size: tuple                   # of the original image, in whose pixels predictions are reported
    where: str = "a sample"       # file and row
    choices: list = field(default_factory=list)      # the texts of A, B, ...

def load_samples(source, task, split="train", limit=0, skip_bad_rows=False):
    """All samples of a file, folder or hub id, or the first `limit`, checked; else UserError."""
    require(task.kind != "math" or find_spec("math_verify"), "math needs: pip install math-verify")
    source = source or (task.data if split == "train" else task.eval_data)
    require(source, f"task {task.name} has no {split} data of its own: give --data PATH")
    path = fetch(source, "dataset")
    for name in SPLIT_WORDS[split]:
        if (path / f"{name}.jsonl").is_file():
            path = path / f"{name}.jsonl"
    rows = open_rows(path, split)
    samples = []
    bad_rows = 0
    for number in range(len(rows)):
        if limit and len(samples) == limit:
            break
        where = f"{path}, row {number + 1}"
        try:
            samples.append(read_sample(rows, number, path, task, where))
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:  # ours, Python's
            require(skip_bad_rows, f"{where}: {error}; see --skip_bad_rows")
            bad_rows += 1
    require(samples, f"{path}: no good row, {bad_rows} bad ones; give other data")
    if bad_rows and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {bad_rows} bad rows skipped")
    return samples

def open_rows(path, split):
    """Lines of JSON without blank ones; or a table, which `datasets` maps into memory."""
    if path.suffix == ".jsonl":
        return list(filter(bytes.strip, path.read_bytes().splitlines()))
    try:
        from datasets import load_dataset, load_from_disk
        for folder in (path, *map(path.joinpath, SPLIT_WORDS[split])):
            if (folder / "state.json").is_file():
                return load_from_disk(str(folder)).with_format("arrow")
        files = [str(path)] if path.is_file() and path.suffix == ".parquet" else []
        for file in sorted(path.rglob("*.parquet")):
            words = set(re.split("[^a-z]+", str(file.relative_to(path)).lower()))
            named = [name for name in SPLIT_WORDS if words.intersection(SPLIT_WORDS[name])]
            if named == [split]:
                files.append(str(file))
        require(files, "no Parquet file in it whose path names this split alone")
        # To datasets, all given files are "train". Arrow's format leaves images encoded till used.
        return load_dataset("parquet", data_files=files, split="train").with_format("arrow")
    except Exception as error:           # damaged files make it raise nearly anything
        raise UserError(f"{path}: no readable {split} data ({error!r:.300}); give JSON lines "
                        f"(.jsonl) or Parquet (pip install datasets); {CONVERTER}") from None

def first_of(row, names):
    """The value of the first of these columns that the row has; a null counts as absent."""
    return next((row[name] for name in names if row.get(name) is not None), None)

def read_row(rows, number):
    """One row of a table, or of a file's lines."""
    if not isinstance(rows, list):
        return rows[number].to_pylist()[0]
    is_object = re.match(rb"[\xef\xbb\xbf\s]*{", rows[number])     # a UTF-8 BOM may come first
    require(is_object, f"not a JSON object in UTF-8; {CONVERTER}")
    return json.loads(rows[number])

def read_sample(rows, number, path, task, where):
    """One row, checked; an exception says what is wrong with it."""
    row = read_row(rows, number)
    # EasyR1 writes <image> where the image goes.
    question = str(first_of(row, ("problem", "text")) or "").replace("<image>", "", 1).strip()
    require(not re.search("<image>|<video>", question), "a sample is about one image")
    if task.kind != "math":
        question = question.lower().strip('.?!" ')          # as the authors do
    require(question, f"no 'problem' or 'text', or an empty one; {CONVERTER}")
    choices = row.get("choices") or []
    if isinstance(choices, str):
        choices = json.loads(choices)
    require(isinstance(choices, list) and len(choices) <= 26, "choices: a list of at most 26")
    if choices:
        question += "\nChoices: " + ", ".join(map("{}. {}".format, ascii_uppercase, choices))
    image = partial(find_image, rows, number, path if path.is_dir() else path.parent)
    upright = open_image(image, only_size=True)
    img_width = row.get("img_width") or upright[0]
    img_height = row.get("img_height") or upright[1]
    size = (int(img_width), int(img_height))
    # The authors give training labels ("problem") in pixels of the row's image, as `upright` says,
    # and test labels ("text") in pixels of the original, as `size` says.
    default_frame = upright if row.get("problem") is not None else size
    frame = tuple(row.get("frame") or default_frame)
    for width, height in (frame, size):         # not too large: eval.py paints such masks
        require(width > 0 and height > 0 and width * height < 2e8,
                "a frame or size is two positive numbers, up to 200 megapixels")
        on_its_side = (height, width) == upright and width != height
        require(not on_its_side, f"{width} x {height}, on its side: give it as EXIF turns it")
    label = read_label(row, task, frame, choices)
    # <|image_pad|> would be one more image, and half a surrogate pair has no tokens.
    require(not re.search(r"<\|[a-z_]{2,}\|>|[\ud800-\udfff]", f"{question} {label}"),
            "a control token or half a character in the question or the answer")
    name = first_of(row | {"row": where}, ("id", "image_id", "row"))
    return Sample(str(name), question, image, label, frame, size, where, list(map(str, choices)))

def read_label(row, task, frame, choices):
    """A row's label, read like an answer: what no completion could say is an error."""
    value = first_of(row, task.columns)
    if value is None and task.kind == "objects" and row.get("mask") is not None:
        mask = np.asarray(row["mask"], bool)
        require(mask.shape[::-1] == frame, f"a mask is {frame[1]} rows of {frame[0]} numbers")
        value = list(Image.fromarray(mask).getbbox() or ())
    require(value is not None, f"no {' or '.join(map(repr, task.columns))}")
    if task.kind == "math" and choices and not isinstance(value, str) and value not in choices:
        require(value in range(len(choices)), f"{value} is no choice, nor its index from 0")
        value = str(choices[int(value)])                    # as ScienceQA answers
    if isinstance(value, list) and not any(isinstance(found, dict) for found in value):
        value = [{"bbox_2d": box} for box in np.reshape(value, (-1, 4)).tolist()]  # one or more
    # Some columns hold the objects, others their JSON text; read_answer takes text.
    text = value if isinstance(value, str) else json.dumps(value)
    if task.kind == "count":
        text = text.removesuffix(".0")                      # tables with gaps hold 24.0
    label = rewards.read_answer(f"<answer>{text}</answer>", task.kind)
    require(label is not None, f"no label that {task.name} can read: {text:.80}")
    if isinstance(label, list):
        for found in label:
            check_object(found, frame)
    return label

def check_object(found, frame):
    """Check a labelled object, cut it to its frame, and give it a point if it has none."""
    require("bbox_2d" in found, f"bbox_2d is four numbers: {found}")
    corners = np.reshape(found["bbox_2d"], (2, 2))
    cut = corners.clip(0, frame)         # labels overshoot by a pixel now and then
    point = np.asarray(found.get("point_2d", cut.mean(axis=0)))
    valid = (cut[0] < cut[1]) & (corners[0] <= point) & (point <= corners[1])
    valid &= abs(corners - cut).max(axis=0) <= 0.02 * np.array(frame)
    normalised = corners.max() <= 1 < max(frame)
    require(valid.all() and not normalised, f"no box with its point in {frame[0]} x {frame[1]}; "
            f'another frame, 0 to 1000 (add "frame"), [x, y, width, height], before EXIF? {found}')
    found["bbox_2d"] = cut.ravel().tolist()
    found["point_2d"] = point.clip(0, frame).tolist()

# ---- Images and geometry -------------------------------------------------------------------------
def find_image(rows, number, folder):
    """The file that a row names, or the encoded image that it holds."""
    cell = first_of(read_row(rows, number), ("image", "images"))
    if isinstance(cell, list) and cell:
        require(len(cell) == 1, f"{len(cell)} images: a sample has one")
        cell = cell[0]
    if isinstance(cell, dict):           # Hugging Face's struct: bytes, or else a path
        cell = cell.get("bytes") or cell.get("path")
    require(cell, "no 'image' or 'images'")
    if isinstance(cell, bytes):
        return BytesIO(cell)
    if cell.startswith("data:image/"):
        return BytesIO(base64.b64decode(cell.partition(",")[2]))
    # No URL, and no named pipe: opening one would block.
    require(os.path.isfile(folder / cell), f"no such image file: {str(folder / cell):.200}")
    return folder / cell

def open_image(source, only_size=False):
    """An image in RGB, on white, upright as its EXIF tag says; or only its size by its header."""
    try:
        image = source() if callable(source) else source
        if not isinstance(image, Image.Image):
            image = Image.open(image)    # refuses more than 179 megapixels
        require(not image.mode.startswith(("I", "F")), "over 8 bits a colour: convert it")
        # A tag after a PNG's pixels does not count: to see it, Pillow would decode them all.
        has_exif = image.format != "PNG" or "exif" in image.info
        if only_size:
            is_turned = has_exif and image.getexif().get(0x0112, 1) > 4      # by 90 or 270 degrees
            return image.size[::-1] if is_turned else image.size
        if has_exif:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:           # damaged files make Pillow raise nearly anything
        raise UserError(f"unreadable image ({error})") from None

def move_objects(objects, src_frame, dst_frame, round_to_int=False):
    """New objects with the same boxes and points in another frame; a text, or None, stays."""
    def move(numbers):
        corners = np.reshape(numbers, (-1, 2)) * dst_frame / src_frame      # a point is (1, 2)
        if round_to_int:
            corners = corners.round().astype(int)
            if len(corners) == 2:
                # A box that rounds to nothing stays 1 wide or high, inside its frame.
                corners[0] = np.minimum(corners[0], np.subtract(dst_frame, 1))
                corners[1] = np.maximum(corners[1], corners[0] + 1)
        return corners.ravel().tolist()
    if not isinstance(objects, list):
        return objects
    return [{name: move(numbers) for name, numbers in found.items()} for found in objects]

# ---- From a sample to what the network reads -----------------------------------------------------
@dataclass
class Example:
    """A sample as one checkpoint sees it. P: prompt tokens, image tokens included."""
    sample: Sample
    ids: torch.Tensor             # (P,) int64
    pixels: torch.Tensor          # (patches, 3 * temporal * patch * patch) float32
    grid_thw: torch.Tensor        # (1, 3) int64: 1, rows and columns of patches
    label: list[dict] | str       # in `frame`, whole numbers
    frame: tuple                  # the model's: its prompt, answers and label run to this

class Processor:
    """Turns samples into a checkpoint's inputs, and completions into text and rewards."""
    def __init__(self, path, task, image_size=None):
        self.task = task
        self.image_size = image_size or task.image_size
        try:
            from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self.coordinates = getattr(config, "coordinates", COORDINATES[config.model_type])
            vision = config.vision_config          # patches are as the network takes them
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(
                path, max_pixels=self.image_size ** 2, merge_size=vision.spatial_merge_size,
                patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            # If its files are missing, transformers makes an empty tokenizer.
            image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            require(image_id == config.image_token_id, "its tokenizer is another model's")
            # An empty picture shows now whether template, tokenizer and images fit together.
            picture = Image.new("RGB", (56, 56))
            self.blank = self.encode(Sample("", "nothing", picture, "", picture.size, picture.size))
        except Exception as error:       # foreign files make their readers raise nearly anything
            raise UserError(f"{path}: not a complete Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint "
                            f"({error!r:.300}); give one with --model") from None

    def encode(self, sample):
        """Image, prompt and label as the network takes them; a prompt is never truncated."""
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        try:
            image = open_image(sample.image)
            if not self.task.keep_shape:
                # A side of whole tokens, each of merge x merge patches.
                side = max(round(self.image_size / (patch * merge)), 1) * patch * merge
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            batch = self.image_processor(image, do_resize=self.task.keep_shape, return_tensors="pt")
        except ValueError as error:
            raise UserError(f"{sample.where}: {error}") from None
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        frame = (columns * patch, rows * patch) if self.coordinates == "pixels" else (1000, 1000)

        text = self.task.prompt.format(question=sample.question, width=frame[0], height=frame[1])
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # Templates of thinking models write <think> themselves; here the model earns it.
        prompt = re.sub(r"<think>\s*$", "", chat)
        require(prompt.count("<|image_pad|>") == 1, "its chat template does not show one image")
        # The template writes one <|image_pad|>; the network takes one for each image token.
        slots = "<|image_pad|>" * (rows * columns // merge**2)
        ids = self.token_ids(prompt.replace("<|image_pad|>", slots))
        label = move_objects(sample.label, sample.frame, frame, round_to_int=True)
        return Example(sample, ids, batch["pixel_values"], batch["image_grid_thw"], label, frame)

    def token_ids(self, text):
        """(T,) int64, always of a whole text: tokens merge across the seams of its parts."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

    def decode(self, ids, finished=True):
        """The text of a completion, without the end token of one that is finished."""
        return self.tokenizer.decode(ids[:-1] if finished else ids,
                                     clean_up_tokenization_spaces=False)

    def score(self, completion, example):
        """The reward components of a completion: see rewards.py."""
        return self.task.reward(completion, example.label, kind=self.task.kind,
                                frame=example.frame, choices=example.sample.choices)

def fetch(name, kind="model"):
    """The folder of a "model" or a "dataset": a local path as it is, or a repository on the hub."""
    if Path(name).exists():
        return Path(name)
    # Only what has the shape of a hub id is asked for there: most mistyped paths fail at once.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.parquet)", str(name))
    require(is_hub_id, f"{name}: no such file or folder, nor owner/name as on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
        unused = ["*.bin", "*.pt*", "*.py"]
        return Path(snapshot_download(str(name), repo_type=kind, ignore_patterns=unused))
    except Exception as error:           # no such name, no network, a full disk
        raise UserError(f"{name}: no such folder, nor does the Hugging Face hub give it "
                        f"({error!r:.300}); give a name that exists, or try again") from None
