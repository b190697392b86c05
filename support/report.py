"""What a run shows: a line a step, a group in full, a table at the end, and a picture of answers.

Only for the eye: nothing of the method depends on it. Metrics, groups and results are those of train.py and eval.py.
"""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import data
import rewards
import visurf
from support.measures import compare

# ---- The log and the console -----------------------------------------------------------------------------------------

def describe(config, records: list[dict], style: data.LabelStyle) -> dict:
    """What happened in a step, from the records of its groups (train.Group.record): shares from 0 to 1, rewards as
    means over rollouts, lengths in tokens."""
    metrics, mean = {}, lambda values: sum(values) / len(values)
    if config.method != "sft":
        rollouts = [components for record in records for components in record["rewards"][: config.num_generations]]
        lengths = [length for record in records for length in record["lengths"][: config.num_generations]]
        metrics = {"reward": mean([sum(components.values()) for components in rollouts])}
        metrics |= {f"reward/{name}": mean([components[name] for components in rollouts]) for name in rollouts[0]}
        metrics |= {"no_signal": mean([not any(record["advantages"]) for record in records]), "length": mean(lengths),
                    "truncated": sum(record["truncated"] for record in records) / len(lengths), "tokens": sum(lengths),
                    "style": style.example()}
    if config.method == "visurf":
        reward = lambda label: visurf.label_reward(label, rewards.THINKING, config.drop_thinking_reward).item()
        label_advantages = [record["advantages"][-1] for record in records]
        metrics |= {"label_reward": mean([reward(record["rewards"][-1]) for record in records]),  # before smoothing
                    "label_active": mean([abs(advantage) > 1e-6 for advantage in label_advantages]),
                    "label_advantage": mean(label_advantages)}
    return metrics

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

def show_group(record: dict, method: str) -> str:
    """The first and the last member of a group in full, as a reader would want to see them."""
    lines, texts = [f"    {record['question']}"], record["texts"]
    for i in sorted({0, len(texts) - 1}):
        which = "rollout" if i < len(texts) - (method != "rlvr") else "label"
        reward = ", ".join(f"{name} {value:.2f}" for name, value in record["rewards"][i].items())
        lines.append(f"    {which:7s} {texts[i]!r} ({reward})")
    return "\n".join(lines)

def end_of_run(directory: Path, checkpoint: Path):
    """The end of a run: held-out metrics before and after, its page, and where everything is."""
    from support import page  # not above: it imports this file

    if (directory / "after.json").exists():
        print("\n" + side_by_side({when: json.loads((directory / f"{when}.json").read_text())["metrics"]
                                  for when in ("before", "after")}, "held out"))
    page.write([page.read_run(directory)], directory)
    print(f"\ncheckpoint   {checkpoint}")
    for name in ("metrics.jsonl", "completions.jsonl", "before.json", "after.json", "gallery.png", "report.html"):
        if (directory / name).exists():
            print(f"{name.split('.')[0]:12s} {directory / name}")

def end_of_evaluation(directory: Path, settings: dict, metrics: dict, results: list[dict], samples):
    """Write answers.json and gallery.png, and print the metrics and where they are."""
    answers, picture = directory / "answers.json", directory / "gallery.png"
    partial = directory / "answers.json.partial"
    partial.write_text(json.dumps({"settings": settings, "metrics": metrics, "answers": results}, indent=1))
    partial.replace(answers)
    gallery(results, samples, picture)
    print(format_table(metrics), "", answers, picture, sep="\n")
    print(f"{samples.skipped} bad rows skipped, {samples.clipped} label boxes clipped to their image")

def format_table(metrics: dict) -> str:
    """Aligned lines of name and value."""
    return "\n".join(f"{name:12s} {format_value(name, value):>8}" for name, value in metrics.items())

def side_by_side(columns: dict[str, dict], corner="") -> str:
    """A table with a row for each metric that a column has, under the names of the columns and `corner`."""
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)      # a set in order
    first = max([12, *map(len, names)])
    rows = [f"{corner:{first}s}" + "".join(f"  {title:>8}" for title in columns)]
    for name in names:
        values = (format_value(name, metrics.get(name)).rjust(max(8, len(title))) for title, metrics in columns.items())
        rows.append(f"{name:{first}s}" + "".join(f"  {value}" for value in values))
    return "\n".join(rows)

def format_value(name: str, value) -> str:
    """A metric in words: most are shares, in percent; `-` where there was nothing to measure."""
    if not isinstance(value, (int, float)) or not abs(value) < 1e30:         # None, or NaN, which is below nothing
        return "-"
    return format(value, FORMS.get(name, ".1%"))

FORMS = {"samples": ",.0f", "length": ".1f", "reward": ".2f", "MAE": ".2f", "RMSE": ".2f", "steps": ",.0f",
         "seconds": ",.0f"}

# ---- The gallery of an evaluation -----------------------------------------------------------------------------------

TILE, TEXT, GAP = 300, 170, 24                   # pixels: side of a picture, height of the text below it, margin
LABEL, PREDICTION, BLACK, GREY = "#00995c", "#e65c00", "#1a1a1a", "#6b6b6b"

def gallery(results: list[dict], samples, path, columns=4, count=12):
    """Write a PNG of up to `count` answers over their images, and say in its "answers" field which ones they are."""
    chosen, note = choose(results, count), PngInfo()
    note.add_text("answers", json.dumps(chosen))
    height = 2 * GAP + -(-len(chosen) // columns) * (TILE + TEXT + GAP)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), height), "white")
    title = f"{len(chosen)} of {len(results)} answers, from the worst to the best"
    for x, text, colour in ((0, "label", LABEL), (74, "prediction", PREDICTION), (198, title, GREY)):
        ImageDraw.Draw(sheet).text((GAP + x, GAP), text, colour, ImageFont.load_default(18), anchor="lm")
    for place, i in enumerate(chosen):
        tile = draw_tile(results[i], data.open_image(samples[i].image, samples[i].where))
        sheet.paste(tile, corner_of(place, columns))
    sheet.save(f"{path}.partial", "PNG", pnginfo=note)     # written beside and renamed: nobody finds half a picture
    Path(f"{path}.partial").replace(path)

def choose(results: list[dict], count=12) -> list[int]:
    """Which answers to show: up to `count` at equal distances from the worst to the best."""
    order = sorted(range(len(results)), key=lambda i: judge(results[i])[:2])
    return [order[int(k)] for k in np.linspace(0, len(order) - 1, min(count, len(order)))]

def corner_of(place: int, columns: int) -> tuple[int, int]:
    """Where a tile lies in the gallery: x, y of its upper left corner."""
    return GAP + place % columns * (TILE + GAP), 2 * GAP + place // columns * (TILE + TEXT + GAP)

def tiles(path) -> dict[int, Image.Image]:
    """The pictures of a gallery, without the text below them, by number of the answer; {} for one that does not say."""
    with Image.open(path) as sheet:
        chosen, columns = json.loads(sheet.text.get("answers", "[]")), sheet.width // (TILE + GAP)
        corners = [corner_of(place, columns) for place in range(len(chosen))]
        return {i: sheet.crop((x, y, x + TILE, y + TILE)) for i, (x, y) in zip(chosen, corners)}

def judge(result: dict) -> tuple[float, float, str]:
    """How right an answer is: 0, a half or 1, the IoU of its boxes (0 without any), the verdict of its task."""
    predicted, label = result["prediction"], result["label"]
    hits, iou, words = float(predicted == label), 0.0, f": {predicted}" + f", not {label}" * (predicted != label)
    if isinstance(label, list) and isinstance(predicted or [], list):
        hits, iou, *_ = compare(result)
        words = f", IoU {iou:.2f}" if label else ", nothing to find"
    verdict = {1: "right", 0: "wrong"}.get(hits, "partly right") + words
    verdict = result.get("verdict", "no answer" if predicted is None else verdict)
    return {"right": 1.0, "partly": 0.5}.get(re.match(r"\w*", verdict)[0], 0.0), iou, verdict

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
    worth, _, verdict = judge(result)
    colour, y = LABEL if worth == 1 else PREDICTION, TILE + 8
    question, answer = result["question"], result["completion"].replace("><", "> <")     # lines may break between tags
    for text, points, fill, lines in ((question, 17, BLACK, 2), (verdict, 15, colour, 1), (answer, 13, GREY, 5)):
        wrapped = textwrap.wrap(text, int(TILE / points * 1.95), max_lines=lines, placeholder=" …")
        draw.multiline_text((0, y), "\n".join(wrapped), fill, ImageFont.load_default(points), spacing=4)
        y += len(wrapped) * (points + 4) + 6
    return tile
