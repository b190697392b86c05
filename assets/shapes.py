"""The pictures of the built-in task `shapes`: one coloured shape or none on a noisy ground, drawn from a seed.

Demo material, like the bundled checkpoint beside this file: nothing of the method depends on it.
"""

import numpy as np
from PIL import Image

from data import SPLITS, Sample

COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 225), "yellow": (235, 210, 40),
           "purple": (150, 55, 190), "cyan": (50, 200, 215)}
KINDS = {                                # which pixels belong to a shape of radius r; (x, y) from its centre
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r,
    "circle": lambda x, y, r: x ** 2 + y ** 2 <= r ** 2,
    "triangle": lambda x, y, r: 2 * abs(x) <= y + r,
    "cross": lambda x, y, r: np.minimum(abs(x), abs(y)) <= r / 3}

def shapes_sample(split: str, index: int) -> Sample:
    """The index-th picture of a split, always the same: 48x48 pixels with one shape or, in 30 %, with none.

    The question names the shape, or some shape where there is none: its label is then [].
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    tone = rng.choice([45, 205]) + rng.integers(-25, 26)
    coarse = rng.integers(tone - 18, tone + 19, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
    picture = np.asarray(smooth) + rng.normal(0, 3, (48, 48, 3))
    colour, kind, size = str(rng.choice(list(COLOURS))), str(rng.choice(list(KINDS))), rng.integers(10, 21)
    scene = []
    if rng.random() < 0.7:
        rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
        ys, xs = np.nonzero(KINDS[kind](columns, rows, size / 2))
        xs, ys = xs + rng.integers(0, 49 - size), ys + rng.integers(0, 49 - size)
        picture[ys, xs] = COLOURS[colour] + rng.integers(-10, 11, 3) + rng.normal(0, 4, (len(xs), 3))
        scene.append({"colour": colour, "kind": kind, "point_2d": [round(xs.mean()), round(ys.mean())],
                      "bbox_2d": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]})
    objects = [{"bbox_2d": shape["bbox_2d"], "point_2d": shape["point_2d"]} for shape in scene]
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return Sample(f"{split}-{index}", f"find the {colour} {kind}", image, objects, scene=scene,
                  where=f"built-in {split} picture {index}")
