"""Data: samples from files or built in, images, prompts, labels. Tasks are in support/tasks.py.

The way of one sample: Sample (image, question, label) → Processor.encode → Example (ids, pixels, grid_thw, label).

A label is a list of objects {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}; [] says that there is nothing to find.
A task that asks for a number or for words has text instead. A box is x2 - x1 wide: its corners lie between pixels.
Every set of coordinates has a *frame*, the (width, height) its numbers run to: pixels of the original image, pixels of
the image sent to the model, 0 to 1000. `move_objects` goes from frame to frame.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards import read_answer, split_completion
from support.labels import first_of, read_frame, read_label
from support.masks import keep_mask
from support.sources import (SPLITS, DataError, Stored, fetch, find_image, from_json, image_size, open_image, read_rows,
                             require)
from support.tasks import GROUNDING, DIGITS, TASKS, Frame, Task          # some of these for who imports this file

CONVENTION = {"qwen2_vl": "relative", "qwen2_5_vl": "pixels"}     # the coordinates a network was trained to write
MAX_GAP = 32                      # a rollout with longer white space is degenerate: it must not shape the label

# ---- Samples ---------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    """A question about an image, and its label."""

    id: str
    question: str
    image: Image.Image | bytes | Path | Stored               # see `open_image`
    objects: list[dict] | str            # the label: objects in `frame`, or what stands between the answer tags
    frame: Frame | None = None           # None: pixels of the image, after EXIF rotation
    size: Frame | None = None            # of the original, in whose pixels predictions are reported; None: as the image
    solution: str | None = None          # the label's text, where the data set has one
    where: str = ""                      # "file, row 3"
    scene: list[dict] | None = None      # built-in pictures: what stands where, see assets/digits.py
    mask: object = None                  # where the data set has one: see support/masks.py

class Dataset(list):
    """Samples, and the numbers of bad rows skipped and of label objects clipped to their image."""

    skipped = clipped = 0

def load_samples(source, task: Task, split="train", limit: int | None = None, skip_bad_rows=False) -> Dataset:
    """Read and check the samples of a source, or the first `limit`; DataError at a bad row unless those are skipped.

    source: "builtin", a .jsonl, .json, .parquet or .arrow file, a folder of .parquet or .jsonl files or one that
        `save_to_disk` wrote, a hub id, or None for the task's own. Images of Parquet and Arrow files stay on disk.
    Columns: image, problem, solution (training: pixels of the stored image; img_width, img_height of the original) or
        image, text, bbox (test: original pixels; one box, several, or []); Task.columns has the other labels. `frame`
        says what coordinates run to, such as [1000, 1000]. Image paths start where the file is.
    """
    require(limit is None or limit > 0, f"limit is {limit}: use at least one sample")
    source, data = str(source or (task.data if split == "train" else task.eval_data)), Dataset()
    require(source, f"task {task.name} has no {split} data of its own: give some with --data PATH")
    if source == "builtin":
        from assets.digits import SIZE, digits_sample
        return Dataset(digits_sample(split, i) for i in range(SIZE[split])[:limit])
    for file, number, row in read_rows(source, split):
        if len(data) == limit:
            break
        where = f"{file}, row {number}"
        try:
            sample, clipped = _read_row(row, task, file.parent, where)
            data.append(sample)
            data.clipped += clipped
        except DataError as error:
            require(skip_bad_rows, f"{where}: {error}; fix it, or leave such rows out: --skip_bad_rows")
            data.skipped += 1
    require(data, f"{source}: no usable rows ({data.skipped} skipped); give other data with --data PATH")
    return data

def _read_row(row: dict | bytes, task: Task, folder: Path, where: str) -> tuple[Sample, int]:
    """One row, checked, as a sample, and how many of its objects were clipped."""
    row = from_json(row)
    require(isinstance(row, dict), "not a JSON object")
    (_, cell), (asked, question) = first_of(row, "image", "images"), first_of(row, "problem", "text")
    require(isinstance(question, str), f"the question ({asked!r}) is not text")
    question = question.replace("<image>", "").strip()               # EasyR1 marks with it where the image goes
    require(question, f"the question ({asked!r}) is empty")
    if row.get("choices"):
        question += "\nChoices: " + ", ".join(map(str, row["choices"]))
    # <|image_pad|> would become one more image slot
    require(not re.search(r"<\|.*?\|>", question), f"the question contains a control token: {question[:80]!r}")
    image = cell if isinstance(cell, Stored) else find_image(cell, folder)
    stored, size = image_size(image), read_frame([row.get("img_width"), row.get("img_height")])
    frame = read_frame(row.get("frame")) or (None if asked == "problem" else size)
    label = read_label(row, task, folder, frame, stored)
    name = str(row.get("id") or row.get("image_id") or where)
    return Sample(name, question, image, label.objects, label.frame, size, label.text, where,
                  mask=keep_mask(row.get("mask"), folder)), label.clipped

# ---- Images and geometry ---------------------------------------------------------------------------------------------

def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> Frame:
    """Multiples of factor, the area within the limits, aspect ratio nearly kept; as transformers' smart_resize."""
    sides = (width, height)
    require(max(sides) <= 200 * min(sides), f"one side of {width} x {height} is over 200 times the other")
    near = tuple(round(side / factor) * factor for side in sides)
    if math.prod(near) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in sides)
    if math.prod(near) < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(side * grow / factor) * factor for side in sides)
    return near

def target_size(size: Frame, factor: int, min_pixels: int, max_pixels: int, fixed: Frame | None = None) -> Frame:
    """The (width, height) an image is sent in: `fixed` rounded to multiples of factor, or smart_resize of its size."""
    if fixed is None:
        return smart_resize(*size, factor, min_pixels, max_pixels)
    return tuple(max(factor, round(side / factor) * factor) for side in fixed)

def model_frame(size: Frame, coordinates: str) -> Frame:
    """The frame a network speaks: "pixels" of the image it sees (Qwen2.5-VL) or "relative", 0 to 1000 (Qwen2-VL)."""
    return {"pixels": tuple(size), "relative": (1000, 1000)}[coordinates]

def move_objects(objects: list[dict] | str, src_frame: Frame, dst_frame: Frame, round_to_int: bool = False):
    """New objects with the same boxes and points in another frame; a box that rounds to nothing stays 1 wide or high.
    An answer in words stays as it is.

    >>> move_objects([{"bbox_2d": [84, 42, 420, 840]}], (840, 840), (1000, 500), round_to_int=True)
    [{'bbox_2d': [100, 25, 500, 500]}]
    """
    def move(numbers):
        corners = np.reshape(numbers, (-1, 2)) * dst_frame / src_frame       # of a box, or the one point
        if round_to_int:
            corners = corners.round().astype(int)
            if len(corners) == 2:
                corners[0] = np.minimum(corners[0], np.subtract(dst_frame, 1))
                corners[1] = np.maximum(corners[1], corners[0] + 1)
        return corners.ravel().tolist()

    if isinstance(objects, str):
        return objects
    return [{name: move(found[name]) for name in ("bbox_2d", "point_2d") if name in found} for found in objects]

def patchify(image: Image.Image, patch_size, merge_size, temporal_patch_size, mean, std) -> tuple[np.ndarray, tuple]:
    """Cut an RGB image into the rows of numbers the vision tower reads, bit-equal to Qwen2VLImageProcessorPil.

    Returns pixels (h·w, 3·temporal·patch·patch) float32 and grid_thw = (1, h, w), in patches. Those of a block of
    merge_size x merge_size, which become one token, are consecutive; the image is a whole number of blocks.
    """
    p, m = patch_size, merge_size
    h, w = image.height // p, image.width // p
    x = (np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)     # (H, W, 3)
    x = x.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[:, :, :, :, :, None], temporal_patch_size, axis=5)       # (h/m, w/m, m, m, 3, temporal, p, p)
    return x.reshape(h * w, -1), (1, h, w)

# ---- Label text, aligned with the rollouts' style (reward control 1) -------------------------------------------------

# white space, then a token: a tag, a string, a bracket, comma or colon, or a number, as which \boxed{…} counts
TOKEN = re.compile(r'(\s*)(</?answer>|\\boxed\{.*\}|"(?:[^"\\]|\\.)*"|[][{},:]|[^][{},:"<\s]+|\S)')

def _walk(answer: str):
    """Yield (context, white space, token) for each token of `<answer>[…]</answer>`.

    A context is what stands on either side of the white space, any string or number being the same as any other, and
    the brackets that are open there: ", number [{[".
    """
    previous, brackets = "", ""
    for space, token in TOKEN.findall(answer):
        kind = token if token[0] in "[]{},:<" else "string" if token[0] == '"' else "number"
        yield f"{previous} {kind} {brackets}", space, token
        brackets = brackets + token if token in "[{" else brackets[:-1] if token in "]}" else brackets
        previous = kind

def _favourites(votes: Counter) -> dict[str, str]:
    """What most votes, (context, white space), say of every context; the first seen wins a tie."""
    return dict(pair for pair, _ in reversed(votes.most_common()))

def read_style(answer: str) -> dict[str, str]:
    """The most frequent white space of every context in `<answer>[…]</answer>`."""
    style = _favourites(Counter((context, space) for context, space, _ in _walk(answer)))
    # one object does not show what parts two: the line break before the first, or else what parts its box and point
    if ", { [" not in style and ", string [{" in style:
        style[", { ["] = style["[ { ["] if "\n" in style["[ { ["] else style[", string [{"]
    return style

DEFAULT_STYLE = read_style('<answer>[{"bbox_2d": [1, 2], "point_2d": [1, 2]}]</answer>')      # json.dumps

def label_text(objects: list[dict] | str, style: dict[str, str] = DEFAULT_STYLE) -> str:
    """A label as `<answer>…</answer>` in a style; contexts that it lacks get no white space.

    >>> label_text([{"point_2d": [3, 4]}], read_style('<answer> [{"point_2d":[1,2]}]</answer>'))
    '<answer> [{"point_2d":[3,4]}]</answer>'
    """
    walk = _walk(f"<answer>{objects if isinstance(objects, str) else json.dumps(objects)}</answer>")
    return "".join(style.get(context, "") + token for context, _, token in walk)

class LabelStyle:
    """The style the policy prefers: in every context the white space most of its well-formed rollouts use there."""

    def __init__(self, task: Task):
        self.task, self.default, self.votes = task, read_style(task.example), Counter()

    def observe(self, completion: str):
        """Count one rollout's style; a rollout without a well-formed answer has none."""
        if read_answer(completion, self.task.name) is not None:
            style = read_style(f"<answer>{split_completion(completion)[1]}</answer>")
            if max(map(len, style.values())) <= MAX_GAP:
                self.votes.update(style.items())

    def render(self, objects: list[dict] | str) -> str:
        """The label's text in that style, and in the task's where no rollout has shown one."""
        return label_text(objects, self.default | _favourites(self.votes))

    def example(self) -> str:
        """What labels look like now, for the log."""
        in_words = "bbox" not in self.task.columns
        return self.render(self.task.text_answer.format(1) if in_words
                           else [{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}])

    def state_dict(self) -> dict:
        return {json.dumps(vote): count for vote, count in self.votes.items()}

    def load_state_dict(self, state: dict):
        self.votes = Counter({tuple(json.loads(vote)): count for vote, count in state.items()})

# ---- From a sample to what the network reads -------------------------------------------------------------------------

@dataclass
class Example:
    """A sample as one checkpoint sees it. P: prompt tokens, image tokens included."""

    sample: Sample
    ids: torch.Tensor             # (P,) int64
    pixels: torch.Tensor          # (h·w, 3·temporal·patch·patch) float32
    grid_thw: torch.Tensor        # (1, 3) int64
    objects: list[dict] | str     # the label in the model's frame, whole numbers
    frame: Frame                  # the model's: its prompt, answers and label run to this
    truth: list[dict] | str       # the label in pixels of the original image, not rounded
    size: Frame                   # of the original image

    def to_original(self, objects: list[dict] | str) -> list[dict] | str:
        """Objects of the model's frame in pixels of the original image."""
        return move_objects(objects, self.frame, self.size)

    def written_label(self) -> str:
        """The label in the data set's own style, for runs without alignment: its very text where no number changed."""
        text = self.sample.solution
        return label_text(self.objects, read_style(f"<answer>{text}</answer>") if text else DEFAULT_STYLE)

def chat(text: str, image_tokens: int) -> str:
    """One user turn, an image and a text, in the ChatML that Qwen2-VL and Qwen2.5-VL were trained on."""
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * image_tokens + f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")

class Processor:
    """What a checkpoint's folder says about its inputs: tokenizer, patches, image limits, coordinates."""

    def __init__(self, tokenizer, config: dict, images: dict):
        self.tokenizer = tokenizer
        self.coordinates = config.get("coordinates") or CONVENTION[config["model_type"]]
        self.merge_size, self.factor = images["merge_size"], images["merge_size"] * images["patch_size"]
        self.patches = {"mean": images["image_mean"], "std": images["image_std"],
                        **{name: images[name] for name in ("patch_size", "merge_size", "temporal_patch_size")}}
        size = images.get("size", {})    # where transformers 5 saves the limits
        self.min_pixels = images.get("min_pixels") or size["shortest_edge"]
        self.max_pixels = images.get("max_pixels") or size["longest_edge"]
        self.image_token_id, *self.end_token_ids = (
            tokenizer.get_vocab()[name] for name in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>"))

    @classmethod
    def from_pretrained(cls, path) -> "Processor":
        """Read config.json, preprocessor_config.json and the tokenizer in a checkpoint's folder, or raise DataError."""
        from transformers import AutoTokenizer           # takes seconds to import
        try:
            config, images = (json.loads((Path(path) / name).read_text("utf-8"))
                              for name in ("config.json", "preprocessor_config.json"))
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return cls(tokenizer, config, images)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: not a complete Qwen2-VL or Qwen2.5-VL checkpoint folder "
                            f"({type(error).__name__}: {str(error)[:150]}); give one with --model PATH") from None

    def encode(self, sample: Sample, task: Task, think=True, max_prompt_length=None, image_size: Frame | None = None,
               min_pixels=None, max_pixels=None) -> Example:
        """Image, prompt and label of a sample as the network takes them.

        The image is sent in image_size or else the task's; min_pixels or max_pixels ask for smart_resize instead.
        Raises DataError for an unreadable image, and for a prompt that is too long: it is never truncated.
        """
        image = open_image(sample.image, sample.where)
        fixed = image_size or (None if min_pixels or max_pixels else task.image_size)
        sent = target_size(image.size, self.factor, min_pixels or self.min_pixels, max_pixels or self.max_pixels, fixed)
        pixels, grid = patchify(image.resize(sent, Image.Resampling.BICUBIC), **self.patches)
        frame, size = model_frame(sent, self.coordinates), sample.size or image.size
        label_frame = sample.frame or image.size
        image_tokens = math.prod(grid) // self.merge_size ** 2
        ids = self.token_ids(chat(task.prompt(sample.question, frame, think), image_tokens))
        assert (ids == self.image_token_id).sum() == image_tokens, f"{sample.where}: image tokens outside the image"
        require(max_prompt_length is None or len(ids) <= max_prompt_length,
                 f"{sample.where}: the prompt has {len(ids)} tokens, {image_tokens} of them the image's, more than "
                 f"--max_prompt_length {max_prompt_length}; raise it, or make images smaller with --max_pixels")
        return Example(sample, ids, torch.from_numpy(pixels), torch.tensor([grid]),
                       objects=move_objects(sample.objects, label_frame, frame, round_to_int=True), frame=frame,
                       truth=move_objects(sample.objects, label_frame, size), size=size)

    def token_ids(self, text: str) -> torch.Tensor:
        """(T,) int64. Always of a whole text: pieces tokenised apart lose the merges across their seams."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

    def label_ids(self, text: str) -> torch.Tensor:
        """A label as a completion: (T,) int64, the end token included."""
        return self.token_ids(text + "<|im_end|>")

    def decode(self, ids) -> str:
        """The text of a completion, up to its end token."""
        ids = torch.as_tensor(ids).tolist()
        end = min((ids.index(token) for token in self.end_token_ids if token in ids), default=len(ids))
        return self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
