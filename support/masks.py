"""Masks: from a file's cell to pixels, to a box and a point; predicted ones by SAM 2, prompted with boxes and points.

A mask is a (height, width) array of booleans, True on the object, in pixels of the original image.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from tqdm import tqdm

from support.sources import DataError, Stored, find_image, image_size, open_image, require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet's, with which SAM 2 was trained

def keep_mask(cell, folder: Path):
    """What to keep of a mask's cell until `read_mask`: rows of numbers would fill the memory; paths from `folder`."""
    if cell is None or isinstance(cell, Stored):
        return None if cell is None or cell.is_null() else cell
    return read_mask(cell) if isinstance(cell, list) else find_image(cell, folder)

def read_mask(source) -> np.ndarray:
    """The mask in rows of 0 and 1 (or True) or in an image, black where nothing is (path, bytes, stored cell)."""
    if isinstance(source, Stored):
        source = keep_mask(source.read(), source.file.parent)
    try:
        if isinstance(source, (list, np.ndarray)):
            mask = np.array(source, dtype=float) > 0
        else:
            image_size(source)           # refuses what would fill the memory
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
                mask = np.asarray(picture.convert("L")) > 127
    except Exception as error:           # ragged rows, words for numbers, anything that Pillow raises
        raise DataError(f"unreadable mask ({error})") from None
    require(mask.ndim == 2 and mask.size, f"the mask has the shape {mask.shape}: it is rows of 0 and 1")
    return mask

def mask_objects(mask: np.ndarray) -> list[dict]:
    """The box around a mask, and the point of the mask that is nearest to its centre; [] for an empty mask.

    >>> mask_objects(np.array([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]) > 0)
    [{'bbox_2d': [1, 1, 4, 3], 'point_2d': [2.5, 1.5]}]
    """
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return []
    inside = ((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2).argmin()
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]                   # corners lie between pixels
    return [{"bbox_2d": [int(side) for side in box], "point_2d": [float(xs[inside] + 0.5), float(ys[inside] + 0.5)]}]

# ---- SAM 2 -----------------------------------------------------------------------------------------------------------

def load_sam(path, device="cpu"):
    """transformers' Sam2Model from a local folder; DataError if it is none."""
    from transformers import AutoConfig, Sam2Model       # takes seconds to import
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        require(config.model_type in ("sam2", "sam2_video"), f"its model_type is {config.model_type!r}, not sam2")
        sam, report = Sam2Model.from_pretrained(path, local_files_only=True, output_loading_info=True)
        require(not report["missing_keys"], f"{len(report['missing_keys'])} tensors are missing")    # else random
        return sam.to(device).eval()
    except Exception as error:           # a damaged file makes its readers raise nearly anything
        raise DataError(f"{path}: not a SAM 2 checkpoint ({str(error)[:150]}); give one with --masks MODEL, such as "
                        "facebook/sam2-hiera-large") from None

@torch.no_grad()
def predict_mask(sam, image: Image.Image, objects: list[dict], size) -> np.ndarray:
    """The mask of objects that have a box: what SAM 2 sees at each one's box and point, all together.

    image: RGB; objects: in pixels of size, the (width, height) of the original, in whose pixels the mask is.
    """
    width, height = map(round, size)
    mask, side = np.zeros((height, width), bool), sam.config.prompt_encoder_config.image_size
    objects = [found for found in objects if "bbox_2d" in found]
    if not objects:
        return mask
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
    scale = np.array([side / width, side / height])      # SAM 2 squashes every image to one square
    boxes = [np.reshape(found["bbox_2d"], (2, 2)) * scale for found in objects]
    points = [np.multiply(found["point_2d"], scale) if "point_2d" in found else box.mean(axis=0)
              for found, box in zip(objects, boxes)]
    boxes, points = torch.tensor(np.array(boxes)).float(), torch.tensor(np.array(points)).float()
    prompt = {"input_boxes": boxes.view(1, -1, 4), "input_points": points.view(1, -1, 1, 2),
              "input_labels": torch.ones(1, len(points), 1, dtype=torch.int32)}
    prompt = {name: tensor.to(sam.device) for name, tensor in prompt.items()}
    logits = sam(pixel_values=pixels.to(sam.device), multimask_output=False, **prompt).pred_masks   # (1, n, 1, h, w)
    for one in logits[0]:                                # one at a time: an original may be large, and objects many
        whole = interpolate(one[None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
        mask |= (whole > 0).cpu().numpy()
    return mask

def check_masks(samples):
    """DataError unless every sample that shows something has a mask to compare with."""
    for sample in samples:
        require(sample.mask is not None or not sample.objects, f"{sample.where}: no 'mask' to compare with (--masks)")

def add_overlaps(results: list[dict], samples, sam):
    """Add "overlap" to each result: areas of intersection and union of predicted and labelled mask, in pixels."""
    for result, sample in zip(results, tqdm(samples, "masks", leave=False, disable=None)):
        truth = read_mask(sample.mask) if result["label"] else np.zeros((1, 1), bool)
        size = [round(side) for side in result["size"]]
        truth = np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
        objects = result["prediction"] if isinstance(result["prediction"], list) else []
        found = predict_mask(sam, open_image(sample.image, sample.where), objects, size)
        result["overlap"] = [float((found & truth).sum()), float((found | truth).sum())]
        result["verdict"] = f"{result['verdict']}, mask {result['overlap'][0] / max(result['overlap'][1], 1):.2f}"
