"""What a run shows: a line a step, a group in full, a table at the end, and a picture of answers.

Only for the eye: nothing of the method depends on it. Metrics, groups and results are those of train.py and eval.py.
"""

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
from eval import compare

# ---- The console -----------------------------------------------------------------------------------------------------

def step_line(m: dict, step: int, max_steps: int) -> str:
    """A step's metrics in one line of words."""
    words = [f"step {step:4d}/{max_steps}"]
    if "reward" in m:
        parts = " ".join(f"{name[7:]} {value:.2f}" for name, value in m.items() if name.startswith("reward/"))
        words += [f"reward {m['reward']:.2f} ({parts})"]
    if "label_active" in m:
        words += [f"label active {m['label_active']:.0%}, advantage {m['label_advantage']:+.2f}"]
    words += [f"loss {m['loss']:+.3f}, gradient {m['grad_norm']:.2f}"]
    if "reward" in m:
        words += [f"no signal {m['no_signal']:.0%}, clipped {m['clipped']:.1%}",
                  f"length {m['length']:.0f}, cut off {m['truncated']:.0%}",
                  f"{m['tokens'] / m['rollout_seconds']:,.0f} tokens/s"]
    words += [f"{m['rollout_seconds']:.1f} s rollout + {m['update_seconds']:.1f} s update"]
    return " | ".join(words + [f"{m['not_finite']} updates were not finite"] * (m["not_finite"] > 0))

def show_group(group, method: str) -> str:
    """The first and the last member of a group in full, as a reader would want to see them."""
    lines = [f"    {group.example.sample.question}"]
    for i in sorted({0, len(group.texts) - 1}):
        which = "rollout" if i < len(group.texts) - (method != "rlvr") else "label"
        reward = ", ".join(f"{name} {value:.2f}" for name, value in group.components[i].items())
        lines.append(f"    {which:7s} {group.texts[i]!r} ({reward})")
    return "\n".join(lines)

def end_of_run(directory: Path, checkpoint: Path):
    """The end of a run: held-out metrics before and after, and where everything is."""
    if (directory / "after.json").exists():
        tables = [format_table(json.loads((directory / f"{when}.json").read_text())["metrics"]).splitlines()
                  for when in ("before", "after")]
        print("\nheld out         before     after")
        for old, new in zip(*tables):
            print(old, new[12:])
    print(f"\ncheckpoint   {checkpoint}")
    for name in ("metrics.jsonl", "completions.jsonl", "before.json", "after.json", "gallery.png"):
        if (directory / name).exists():
            print(f"{name.split('.')[0]:12s} {directory / name}")

def format_table(metrics: dict) -> str:
    """Aligned lines of name and value: shares in percent, `-` where there was nothing to measure."""
    forms = {"samples": "d", "length": ".1f", "reward": ".2f", "MAE": ".2f", "RMSE": ".2f"}
    return "\n".join(f"{name:12s} " + ("-" if value is None else format(value, forms.get(name, ".1%"))).rjust(8)
                     for name, value in metrics.items())

# ---- The gallery of an evaluation -----------------------------------------------------------------------------------

TILE, TEXT, GAP = 300, 170, 24                   # pixels: side of a picture, height of the text below it, margin
LABEL, PREDICTION, BLACK, GREY = "#00995c", "#e65c00", "#1a1a1a", "#6b6b6b"

def gallery(results: list[dict], samples, path, columns=4, count=12):
    """Write a PNG of up to `count` answers over their images, at equal distances from the worst to the best."""
    order = sorted(range(len(results)), key=lambda i: compare(results[i])[:2])
    chosen = [order[int(k)] for k in np.linspace(0, len(order) - 1, min(count, len(order)))]
    height = 2 * GAP + -(-len(chosen) // columns) * (TILE + TEXT + GAP)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), height), "white")
    note = f"{len(chosen)} of {len(results)} answers, from the worst to the best"
    for x, text, colour in ((0, "label", LABEL), (74, "prediction", PREDICTION), (198, note, GREY)):
        ImageDraw.Draw(sheet).text((GAP + x, GAP), text, colour, ImageFont.load_default(18), anchor="lm")
    for place, i in enumerate(chosen):
        tile = draw_tile(results[i], data.open_image(samples[i].image, samples[i].where))
        sheet.paste(tile, (GAP + place % columns * (TILE + GAP), 2 * GAP + place // columns * (TILE + TEXT + GAP)))
    sheet.save(f"{path}.partial", "PNG")         # written beside and renamed: nobody finds half a picture
    Path(f"{path}.partial").replace(path)

def drawable(answer) -> list[dict]:
    """The objects of an answer; none where it is a number or a word."""
    return answer if isinstance(answer, list) else []

def draw_tile(result: dict, image: Image.Image) -> Image.Image:
    """One answer: the image in the original's proportions with boxes and points; question, verdict and completion."""
    tile, scale = Image.new("RGB", (TILE, TILE + TEXT), "white"), TILE / max(result["size"])
    draw, size = ImageDraw.Draw(tile), [max(1, round(side * scale)) for side in result["size"]]
    draw.rectangle((0, 0, TILE, TILE - 1), "#f2f2f2")
    # a tiny image is shown pixel by pixel, as the model gets it, not smoothed into shapes that nobody saw
    tile.paste(image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC))
    for answer, colour, width in ((result["label"], LABEL, 5), (result["prediction"], PREDICTION, 2)):
        for found in data.move_objects(drawable(answer), result["size"], size):
            x1, y1, x2, y2 = box = found.get("bbox_2d", [0] * 4)
            if x1 < x2 and y1 < y2:
                draw.rectangle(box, outline=colour, width=width)
            draw.circle(found.get("point_2d", (-99, -99)), width + 2, colour, "white")
    verdict = result["verdict"]
    colour, y = LABEL if verdict.startswith("right") else PREDICTION, TILE + 8
    question, answer = result["question"], result["completion"].replace("><", "> <")     # lines may break between tags
    for text, points, fill, lines in ((question, 17, BLACK, 2), (verdict, 15, colour, 1), (answer, 13, GREY, 5)):
        wrapped = textwrap.wrap(text, int(TILE / points * 1.95), max_lines=lines, placeholder=" …")
        draw.multiline_text((0, y), "\n".join(wrapped), fill, ImageFont.load_default(points), spacing=4)
        y += len(wrapped) * (points + 4) + 6
    return tile
