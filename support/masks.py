"""Masks: from a file's cell to pixels, to a box and a point; predicted ones from SAM 2, prompted with boxes and points.

A mask is a (height, width) array of booleans, True on the object, in pixels of the original image.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from support.sources import DataError, Stored, find_image, require

def read_mask(cell, folder: Path) -> np.ndarray:
    """The mask in a cell: rows of 0 and 1 (or True), or an image that is black where nothing is."""
    cell = cell.read() if isinstance(cell, Stored) else cell
    try:
        if isinstance(cell, list) and cell and isinstance(cell[0], list):
            mask = np.array(cell, dtype=float) > 0
        else:
            image = find_image(cell, folder)
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as picture:
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
