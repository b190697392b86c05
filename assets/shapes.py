"""The pictures of the built-in task `shapes`: a few coloured shapes on a noisy ground, drawn from a seed.

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
    """The index-th picture of a split, always the same: 48x48 pixels, 2 to 4 shapes, no two of one colour and kind.

    The question names one of them or, in 30 % of the pictures, one that is absent but mostly shares colour or kind.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    tone = rng.choice([45, 205]) + rng.integers(-25, 26)
    coarse = rng.integers(tone - 18, tone + 19, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
    picture = np.asarray(smooth) + rng.normal(0, 3, (48, 48, 3))
    first, absent = rng.integers(24), rng.random() < 0.3
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    weights = np.array([3 if set(pair) & set(pairs[first]) else 1 for pair in pairs]) * (np.arange(24) != first)
    drawn = [*([] if absent else [first]), *rng.choice(24, 4, replace=False, p=weights / weights.sum())]
    drawn = drawn[:rng.integers(2, 5)]
    scene, taken = [], np.zeros((48, 48), bool)
    for size in rng.integers(10, 21, 300):               # try places until all shapes have one; a fourth may find none
        x, y = rng.integers(0, 49 - size, 2).tolist()
        if taken[max(y - 1, 0):y + size + 1, max(x - 1, 0):x + size + 1].any():
            continue
        taken[y:y + size, x:x + size] = True
        colour, kind = pairs[drawn[len(scene)]]
        rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
        ys, xs = np.nonzero(KINDS[kind](columns, rows, size / 2))
        xs, ys = x + xs, y + ys
        picture[ys, xs] = COLOURS[colour] + rng.integers(-10, 11, 3) + rng.normal(0, 4, (len(xs), 3))
        scene.append({"colour": colour, "kind": kind, "point_2d": [round(xs.mean()), round(ys.mean())],
                      "bbox_2d": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]})
        if len(scene) == len(drawn):
            break
    asked = scene[rng.integers(len(scene))]
    objects = [] if absent else [{"bbox_2d": asked["bbox_2d"], "point_2d": asked["point_2d"]}]
    colour, kind = pairs[first] if absent else (asked["colour"], asked["kind"])
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return Sample(f"{split}-{index}", f"find the {colour} {kind}", image, objects, scene=scene,
                  where=f"built-in {split} picture {index}")
