"""Score the answers of an evaluation on real masks: SAM 2 turns boxes and points into masks.

    python extras/sam2.py runs/eval-grounding/answers.json --masks facebook/sam2-hiera-large \\
        --data my.jsonl

This is how the ViSurf authors compute gIoU and cIoU. The rows that have objects must have a column
"mask" too: rows of 0 and 1, or an image that is black where no object is, at any size.
Writes the same answers with an "overlap" each to answers.sam2.json, and prints the metrics.
A mask is (height, width) booleans, True on the object, in pixels of the original image.
"""

import argparse
import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation

# ImageNet's, with which SAM 2 was trained
MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("answers", type=Path, help="answers.json of eval.py, or its directory")
    parser.add_argument("--masks", required=True, help="SAM 2 checkpoint: directory or hub id")
    parser.add_argument("--data", help="(default: the data that were evaluated)")
    evaluation.run_program("sam2.py", score, parser.parse_args(argv))


def score(settings):
    """Measure every answer's mask and write them."""
    path = settings.answers / "answers.json" if settings.answers.is_dir() else settings.answers
    try:
        content = json.loads(path.read_text("utf-8"))
        task = data.TASKS[content["settings"]["task"]]
        source, split = settings.data or content["settings"]["data"], content["settings"]["split"]
        results = content["answers"]
    except (ValueError, KeyError, TypeError):
        raise data.UserError(f"{path}: not the answers.json of an evaluation") from None
    # file and row of each sample; the file may have moved since
    rows = {sample.where.rpartition(", row ")[2]: sample
            for sample in data.load_samples(source, task, split, skip_bad_rows=True)}
    samples = [rows.get(result["where"].rpartition(", row ")[2]) for result in results]
    for result, sample in zip(results, samples):
        data.require(sample is not None and sample.question == result["question"],
                     f"{source} does not hold {result['where']}")
        data.require(not result["label"] or mask_cell(sample),
                     f"{result['where']}: no mask to compare with")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sam = load_sam(data.fetch(settings.masks), device)
    for result, sample in zip(results, tqdm(samples, "masks", leave=False, disable=None)):
        result["overlap"] = overlap(sam, result, sample)
    content["metrics"] = metrics(results, task)
    output = path.with_name("answers.sam2.json")
    evaluation.write_text(output, json.dumps(content, indent=1))
    print(evaluation.format_table(content["metrics"]), output, sep="\n\n")


def metrics(results: list[dict], task: data.Task) -> dict:
    """The metrics of eval.py, with gIoU and cIoU from the areas of masks."""
    areas = np.array([result["overlap"] for result in results])                # (n, 2)
    # Where nothing is labelled, only [] is right, as in eval.py.
    shares = [intersection / max(union, 1) if result["label"] else result["prediction"] == []
              for result, (intersection, union) in zip(results, areas)]
    values = evaluation.metrics(results, task) | {"gIoU": float(np.mean(shares))}
    intersection, union = areas.sum(axis=0).tolist()
    return values | {"cIoU": intersection / union if union else None}


def mask_cell(sample: data.Sample):
    """What the sample's row has in its column "mask"; bytes or a path for an image."""
    # The row is the one in which data.py finds the image.
    rows, number, _ = sample.image.args
    cell = data.read_row(rows, number).get("mask")
    if isinstance(cell, dict):           # Hugging Face's struct
        cell = cell.get("bytes") or cell.get("path")
    return cell


def read_mask(sample: data.Sample) -> np.ndarray:
    """The labelled mask at the size in which it is stored; UserError if it cannot be read."""
    cell = mask_cell(sample)
    try:
        if isinstance(cell, list):
            values = np.array(cell, dtype=float)
            data.require(values.ndim == 2, "not rows of numbers")
        else:
            if isinstance(cell, bytes):
                source = BytesIO(cell)
            elif cell.startswith("data:image/"):
                source = BytesIO(base64.b64decode(cell.partition(",")[2]))
            else:
                source = sample.image.args[2] / cell
            # Not data.open_image, which puts transparent images on white: here that is an object.
            image = ImageOps.exif_transpose(Image.open(source)).convert("RGBA")
            values = np.asarray(image, dtype=float)
            values = (values[..., :3] * values[..., 3:]).max(axis=2)
        # JPEG's black is not quite black.
        return values > values.max() / 2
    except (ValueError, TypeError, OSError) as error:
        raise data.UserError(f"{sample.where}: unreadable mask ({error})") from None


def load_sam(path, device="cpu"):
    """transformers' Sam2Model from a local folder; UserError if it is none."""
    from transformers import AutoConfig, Sam2Model

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        data.require(config.model_type in ("sam2", "sam2_video"), "its config.json says otherwise")
        sam, report = Sam2Model.from_pretrained(path, local_files_only=True,
                                                output_loading_info=True)
    except Exception as error:           # a damaged file makes its readers raise nearly anything
        raise data.UserError(f"{path}: not a SAM 2 checkpoint ({error}); give one with --masks, "
                             "such as facebook/sam2-hiera-large") from None
    # transformers fills in random numbers
    missing = report["missing_keys"]
    data.require(not missing, f"{path}: {len(missing)} tensors are missing")
    return sam.to(device).eval()


def overlap(sam, result: dict, sample: data.Sample) -> list[float]:
    """Areas of intersection and union of the predicted and the labelled mask, in pixels."""
    size = [round(side) for side in result["size"]]
    truth = np.zeros((size[1], size[0]), bool)
    if result["label"]:
        truth = Image.fromarray(read_mask(sample)).resize(size, Image.Resampling.NEAREST)
    predicted = predict_mask(sam, data.open_image(sample.image), result["prediction"] or [], size)
    return [float((predicted & truth).sum()), float((predicted | truth).sum())]


@torch.no_grad()
def predict_mask(sam, image: Image.Image, objects: list[dict], size) -> np.ndarray:
    """The mask of all objects that have a box: SAM 2's for each box and its point, or its centre.

    objects: in pixels of `size`, the (width, height) of the original, as the mask is.
    """
    width, height = size
    mask = np.zeros((height, width), bool)
    objects = [found for found in objects if "bbox_2d" in found]
    if not objects:
        return mask
    # SAM 2 squashes every image to a square
    side = sam.config.prompt_encoder_config.image_size
    scale = np.array([side / width, side / height])
    boxes = np.array([found["bbox_2d"] for found in objects], np.float32).reshape(-1, 2, 2) * scale
    points = boxes.mean(axis=1)                                                # (n, 2)
    for i, found in enumerate(objects):
        if "point_2d" in found:
            points[i] = found["point_2d"] * scale
    square = image.resize((side, side), Image.Resampling.BILINEAR)
    pixels = (np.asarray(square, np.float32) / 255 - MEAN) / STD               # (h, w, 3)
    inputs = {
        "pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)[None],
        "input_boxes": torch.tensor(boxes).float().view(1, -1, 4),
        "input_points": torch.tensor(points).float().view(1, -1, 1, 2),
        "input_labels": torch.ones(1, len(points), 1, dtype=torch.int32)}
    inputs = {name: tensor.to(sam.device) for name, tensor in inputs.items()}
    logits = sam(**inputs, multimask_output=False).pred_masks                  # (1, n, 1, h, w)
    # one object at a time: the original may be large, and objects many
    for one in logits[0]:
        whole = interpolate(one[None].float(), (height, width), mode="bilinear")
        mask |= (whole[0, 0] > 0).cpu().numpy()
    return mask


if __name__ == "__main__":
    main()
