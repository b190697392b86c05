"""report.html: one page about a run, or about several side by side.

    python eval.py --compare runs/shapes-visurf runs/shapes-rlvr

`read_run` -> Run -> `render`: results, curves, answers over their pictures, groups in full, settings. The page is one
file without script that loads nothing. What it shows was written by a model or taken from a data set: none of it can be
trusted, so everything that is not a number goes through `text` on its way into the page.
"""

import base64
import html
import json
import math
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import DataError
from support import report

# ---- What there is to show -------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a directory of train.py or eval.py holds. A part that is missing is empty: the run may still go on."""

    name: str
    config: dict
    steps: list[dict]                    # a record a step: metrics.jsonl, timing.jsonl, and "speed" in tokens/s
    tested: dict[str, dict]              # "before" and "after" training, or "after" alone -> held-out metrics
    answers: list[dict]                  # results of eval.evaluate
    pictures: dict[int, Image.Image]     # number of an answer -> its image with label and prediction drawn
    groups: list[dict]                   # the first and the last group of completions.jsonl
    problems: list[str]                  # what could not be read

class Curve(NamedTuple):
    """A number of metrics.jsonl, and what a reader should know about it."""

    name: str
    title: str
    unit: str                            # "%" is a share from 0 to 1
    normal: str

CURVES = {
    "Reward": [Curve("reward", "reward, all components", "points", "Mean over the rollouts of a step; rises.")],
    "Label": [
        Curve("label_active", "label active", "%", "Prompts where the label still teaches; falls to 0 as the policy "
              "catches up."),
        Curve("label_advantage", "label advantage", "standard deviations", "How much better the label is than its "
              "group; falls to 0 with the share above."),
        Curve("label_reward", "label reward", "points", "What the label earns before smoothing; steady."),
        Curve("no_signal", "no signal", "%", "Prompts whose group all earns the same, which teaches nothing; rises in "
              "the end. High from the start: too easy, or too hard.")],
    "Rollouts": [
        Curve("length", "length", "tokens", "Mean of a rollout; drifts slowly. A jump means that the style changed."),
        Curve("truncated", "cut off", "%", "Rollouts that hit the length limit; near 0, or the limit is too low.")],
    "Update": [
        Curve("loss", "loss", "", "Near 0 with rollouts, as advantages have mean 0: watch the reward. Falls for sft."),
        Curve("grad_norm", "gradient norm", "", "Before clipping; single spikes are normal, a steady rise is not."),
        Curve("clipped", "clipped", "%", "Tokens whose importance ratio was clipped; 0 with one update a batch."),
        Curve("kl", "distance to the sampling policy", "nats a token", "0 with one update a batch, else small."),
        Curve("not_finite", "updates given up", "", "Counted since the start: the gradient was not finite; 0.")],
    "Speed": [
        Curve("speed", "sampling", "tokens/s", "Steady after the first step; rises when answers finish together."),
        Curve("rollout_seconds", "time for rollouts", "s", "Sampling and scoring of a step; follows the length."),
        Curve("update_seconds", "time for the update", "s", "Falls as groups without signal are left out.")]}
COMPONENTS = {"thinking": "Reasoning stands before the answer, in its tags.", "format": "The answer can be read.",
              "accuracy": "The answer agrees with the label: what it is all about.",
              "non_repeat": "Nothing is said twice; near its maximum."}
METRICS = {"accuracy": "right answers; boxes: IoU > 0.5", "gIoU": "mean IoU of the answers",
           "cIoU": "all intersections / all unions", "N-Acc": "absent objects answered with []",
           "well_formed": "answers that can be read", "thinking": "reasoning before the answer",
           "truncated": "cut off at the length limit", "length": "tokens, mean", "reward": "points, mean",
           "samples": "questions asked", "steps": "of training", "seconds": "of training"}

def read_run(directory, name: str | None = None) -> Run:
    """Read a directory of train.py or eval.py, of a run that goes on or was killed too; DataError if it is neither."""
    directory, problems = Path(directory), []
    if not any((directory / file).exists() for file in ("config.json", "metrics.jsonl", "answers.json")):
        raise DataError(f"{directory}: no run and no evaluation is there; give folders that train.py or eval.py wrote")
    load = lambda file: _read_json(directory / file, problems)
    records = {}
    for file in ("metrics.jsonl", "timing.jsonl"):
        for record in _read_lines(directory / file, problems):
            records.setdefault(record.get("step"), {}).update(record)
    steps = [records[step] for step in sorted(step for step in records if type(step) is int and 0 <= step < 1e9)]
    for record in steps:
        tokens, seconds = number(record.get("tokens")), number(record.get("rollout_seconds"))
        record["speed"] = tokens / seconds if "reward" in record and seconds > 0 else None      # sft does not sample
    evaluations = {"before": load("before.json"), "after": load("after.json") or load("answers.json")}
    tested = {when: found["metrics"] for when, found in evaluations.items() if "metrics" in found}
    groups = _read_lines(directory / "completions.jsonl", problems)
    gallery = directory / "gallery.png"
    return Run(name or directory.resolve().name, load("config.json") or load("answers.json").get("settings", {}), steps,
               tested, evaluations["after"].get("answers", []), report.tiles(gallery) if gallery.exists() else {},
               groups[:1] + groups[1:][-1:], problems)

def _read_json(path: Path, problems: list[str]) -> dict:
    """A file's JSON object, {} where it is absent or half-written."""
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError):
        problems.append(f"{path} is not complete")
        return {}

def _read_lines(path: Path, problems: list[str]) -> list[dict]:
    """The records of a .jsonl file; a line that is none, such as the half last one of a killed run, is counted."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            found.append(None)
    records = [record for record in found if isinstance(record, dict)]
    if len(records) < len(found):
        problems.append(f"{path}: {len(found) - len(records)} of {len(found)} lines are not complete")
    return records

def number(value) -> float:
    """A number as a float; NaN for what is none, or is too large to be drawn."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else math.nan

def compare_runs(directories: list[str], output_dir: str | None = None) -> str:
    """Write the page of some runs and return what the console shows: their table, and where the page is.

    The page of one run goes into its directory, that of several into runs/, or either into output_dir.
    """
    names = [Path(directory).resolve().name for directory in directories]
    runs = [read_run(directory, name if names.count(name) == 1 else str(directory))
            for directory, name in zip(directories, names)]
    path = write(runs, output_dir or (directories[0] if len(runs) == 1 else "runs"))
    return "\n".join([report.side_by_side(results(runs), "held out"), "", *sum((run.problems for run in runs), []),
                      f"report       {path}"])

def results(runs: list[Run]) -> dict[str, dict]:
    """The columns of the table: a run's metrics under its name, and those of what it started from, once for each."""
    columns = {}
    for run in runs:
        before = run.tested.get("before")
        if before and before not in columns.values():
            columns["before" if "before" not in columns else f"{run.name} before"] = before
        seconds = [number(record.get(f"{what}_seconds")) for record in run.steps for what in ("rollout", "update")]
        training = {"steps": run.steps[-1]["step"], "seconds": float(np.nansum(seconds))} if run.steps else {}
        columns[run.name] = run.tested.get("after", {}) | training
    return columns

# ---- The page --------------------------------------------------------------------------------------------------------

def write(runs: list[Run], directory) -> Path:
    """Write report.html into a directory, which is made if absent; beside and renamed: nobody finds half a page."""
    path = Path(directory) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(render(runs), "utf-8")
    return path.with_suffix(".partial").replace(path)

def render(runs: list[Run]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = {"Results": result_table(runs), "Curves": curve_section(runs), "Answers": "".join(map(answer_cards, runs)),
             "Groups": "".join(map(group_tables, runs)), "Settings": setting_tables(runs)}
    parts = {name: part for name, part in parts.items() if part}
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in parts)
    sections = "".join(f'<section id="{name}"><h2>{name}</h2>{part}</section>\n' for name, part in parts.items())
    problems = "".join(f'<p class="problem">{text(problem)}</p>' for run in runs for problem in run.problems)
    # the policy lets nothing in but what the page itself holds, whatever a model managed to write into it
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)} – ViSurf</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{STYLE}</style></head>
<body><header><h1>{text(title)}</h1>{"".join(map(headline, runs, range(len(runs))))}{problems}<nav>{links}</nav></header>
<main>
{sections}</main></body></html>
"""

def text(value, limit=2000) -> str:
    """Anything as text of an element or an attribute: cut at `limit` characters, no control characters, escaped."""
    value = str(value)
    value = value if len(value) <= limit else value[:limit] + " …"
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", value))

def key(place: int) -> str:
    """A short piece of a run's line; the words beside it say whose."""
    return f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="{colour(place)}" d="M1 4H21"/></svg>'

def colour(place: int) -> str:
    """The classes of a run's line: six colours, then the same dashed."""
    return f"c{place % len(LIGHT)}" + " dashed" * (place // len(LIGHT) % 2)

def headline(run: Run, place: int) -> str:
    """A run in a line: what was done, and how far it came."""
    config, words = run.config, []
    if run.steps:
        done, planned = run.steps[-1]["step"], config.get("max_steps", "?")
        words = [f"{config.get('method', '?')} on {config.get('task', '?')}", f"{done} of {planned} steps",
                 f"seed {config.get('seed', '?')}"]
    elif config:
        words = [f"{'trained' if 'method' in config else 'evaluated'} on {config.get('task', '?')}"]
    words += [f"model {config['model']}"] if config.get("model") else []
    return f'<p class="run">{key(place)}<b>{text(run.name)}</b> {text(", ".join(words))}</p>'

def table(head: list[str], rows: list[list[str]], kind="") -> str:
    """A table in a box of its own that scrolls where it is wider than the page; cells are HTML."""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n'
                   for row in rows)
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")

def result_table(runs: list[Run]) -> str:
    columns = results(runs)
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    rows = [[f"{text(name)} <small>{METRICS.get(name, '')}</small>"]
            + [report.format_value(name, metrics.get(name)) for metrics in columns.values()] for name in names]
    return table(["held out", *map(text, columns)], rows, "numbers") if rows else ""

# ---- Curves ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 12, 8, 24        # of a chart, and its margins
BINS = 160                                                               # a longer line is drawn from so many pieces

def curve_section(runs: list[Run]) -> str:
    """A small chart for each quantity, all runs in it; a quantity that never was anything but 0 is only named."""
    logged = {name for run in runs for record in run.steps for name, value in record.items() if number(value) == 0
              or not math.isnan(number(value))} - {"step", "tokens"}
    components = sorted(name for name in logged if name.startswith("reward/"))
    known = CURVES | {"Reward": CURVES["Reward"] + [
        Curve(name, name[7:], "points", COMPONENTS.get(name[7:], "A component of the reward.")) for name in components]}
    others = logged - {curve.name for curves in known.values() for curve in curves}
    known["More"] = [Curve(name, name, "", "") for name in sorted(others)]
    parts, flat = [], []
    for section, curves in known.items():
        charts = []
        for curve in curves:
            lines = [series(run, curve.name) for run in runs]
            if any(np.nan_to_num(line[:, 1]).any() for line in lines):
                charts.append(chart(curve, runs, lines))
            elif curve.name in logged:
                flat.append(text(curve.title))
        parts += [f'<h3>{section}</h3><div class="charts">{"".join(charts)}</div>'] if charts else []
    longest = max((len(run.steps) for run in runs), default=0)
    note = "Horizontal: steps. " + ("Bold: mean of the tenth of all steps around a step; faint: single steps. "
                                    if longest >= 20 else "")
    note += f"0 in every step: {', '.join(flat)}." if flat else ""
    return f"<p>{note}</p>" + "".join(parts) if parts else ""

def series(run: Run, name: str) -> np.ndarray:
    """(n, 2) steps and values; NaN where a value was no finite number; no row where it was not measured."""
    rows = [(record["step"], number(record[name])) for record in run.steps if record.get(name) is not None]
    return np.array(rows, float).reshape(-1, 2)

def smooth(line: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of the tenth of all values around it, fewer at the ends; NaN counts nowhere."""
    width = len(line) // 20 * 2 + 1
    there = ~np.isnan(line[:, 1])
    total, count = (np.convolve(part, np.ones(width), "same") for part in (np.where(there, line[:, 1], 0), there))
    return np.stack([line[:, 0], np.divide(total, count, out=np.full(len(line), np.nan), where=count > 0.5)], axis=1)

def thin(line: np.ndarray) -> np.ndarray:
    """The lowest and the highest point of each of BINS pieces, in their order: a spike stays. A short line as it is."""
    if len(line) <= 2 * BINS:
        return line
    kept = []
    for piece in np.array_split(line, BINS):
        values = piece[:, 1]
        kept += [piece[:1]] if np.isnan(values).all() else [piece[sorted({np.nanargmin(values), np.nanargmax(values)})]]
    return np.concatenate(kept)

def ticks(low: float, high: float, count: int) -> np.ndarray:
    """About `count` steps of 1, 2 or 5 times a power of ten, from at or below low to at or above high.

    >>> ticks(0, 6.4, 4).tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step

def limits(lines: list[np.ndarray]) -> tuple[float, float]:
    """What the vertical axis shows: from 0, unless all values are far from it; noise is not blown up to fill it."""
    values = np.concatenate([line[:, 1] for line in lines])
    low, high = np.nanmin(values), np.nanmax(values)
    size = max(abs(low), abs(high)) or 1.0
    if high < 0 or 0 <= low < high / 2:
        low, high = min(low, 0.0), max(high, 0.0)
    return min(low, high - size / 4), high

def format_tick(value: float, step: float, unit: str) -> str:
    """A number beside an axis, with as many decimals as the distance of its neighbours needs."""
    if unit == "%":
        value, step = 100 * value, 100 * step
    if abs(value) >= 1e6 or step < 1e-4:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0:,.{decimals}f}" + "%" * (unit == "%")            # + 0: no minus before a zero

def show(value: float, unit: str) -> str:
    """A single value in the words beside a chart."""
    return f"{value:.1%}" if unit == "%" else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

def chart(curve: Curve, runs: list[Run], lines: list[np.ndarray]) -> str:
    """One quantity: its axes, a faint and a bold line for each run, the last value of each, and what is normal."""
    measured = [line for line in lines if not np.isnan(line[:, 1]).all()]
    first, last = min(line[0, 0] for line in measured), max(line[-1, 0] for line in measured)
    marks = ticks(*limits(measured), 4)
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(last - first, 1)
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - marks[0]) / (marks[-1] - marks[0])
    shapes = [f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/><text class="y" x="{LEFT - 6}" '
              f'y="{y(mark) + 4:.1f}">{format_tick(mark, marks[1] - marks[0], curve.unit)}</text>' for mark in marks]
    steps = [mark for mark in ticks(first, max(last, first + 1), 4) if first <= mark <= last and mark % 1 == 0]
    shapes += [f'<text class="x" x="{x(mark):.1f}" y="{HEIGHT - 6}">{mark:,.0f}</text>' for mark in steps]
    ends, told = [], []
    for place, (run, line) in enumerate(zip(runs, lines)):
        if np.isnan(line[:, 1]).all():
            continue
        even = smooth(line)
        if len(line) >= 20:
            shapes.append(f'<path class="raw {colour(place)}" d="{path_of(thin(line), x, y)}"/>')
        shapes.append(f'<path class="{colour(place)}" d="{path_of(thin(even), x, y)}"/>')
        start, end = even[~np.isnan(even[:, 1])][[0, -1], 1]
        ends.append(f'<span>{key(place)}{text(run.name)} <b>{show(end, curve.unit)}</b></span>')
        told.append(f"{run.name}: from {show(start, curve.unit)} to {show(end, curve.unit)} in step {line[-1, 0]:.0f}")
    unit = f" <small>{curve.unit}</small>" if curve.unit not in ("", "%") else ""
    return (f'<figure><h4>{text(curve.title)}{unit}</h4><p class="ends">{"".join(ends)}</p>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{text(curve.title)} by step</title>'
            f'<desc>{text("; ".join(told))}</desc>{"".join(shapes)}</svg><figcaption>{curve.normal}</figcaption></figure>')

def path_of(line: np.ndarray, x, y) -> str:
    """A line's "d": NaN leaves a gap, and a point alone between two gaps is a dot."""
    words, pen = [], False
    for i, (step, value) in enumerate(line):
        if math.isnan(value):
            pen = False
            continue
        words.append(f"{'L' if pen else 'M'}{x(step):.1f} {y(value):.1f}")
        if not pen and (i + 1 == len(line) or math.isnan(line[i + 1, 1])):
            words.append("h0")
        pen = True
    return "".join(words)

# ---- Answers, groups, settings ---------------------------------------------------------------------------------------

def answer_cards(run: Run) -> str:
    """Some answers, from the worst to the best, as pictures with boxes and words; the gallery's where there is one."""
    chosen = [i for i in run.pictures if i < len(run.answers)] or report.choose(run.answers)
    if not chosen:
        return ""
    cards = []
    for i in chosen:
        result = run.answers[i]
        hits, _, verdict = report.judge(result)
        picture = run.pictures.get(i)
        image = f'<img src="{data_uri(shown(picture, result))}" alt="{text(result["question"])}">' if picture else ""
        cards.append(f'<article>{image}<h4 dir="auto">{text(result["question"], 400)}</h4>'
                     f'<p class="{"right" if hits == 1 else "wrong"}">{text(verdict)}</p><dl>'
                     f'<dt class="label">label</dt><dd dir="auto">{text(answer_words(result["label"]), 400)}</dd>'
                     f'<dt class="prediction">prediction</dt>'
                     f'<dd dir="auto">{text(answer_words(result["prediction"]), 400)}</dd></dl>'
                     f'<p class="said" dir="auto" tabindex="0">{text(result["completion"])}</p></article>\n')
    return (f"<details open><summary>{text(run.name)}: {len(chosen)} of {len(run.answers)} answers, from the worst to "
            'the best; <span class="label">label</span> thick, <span class="prediction">prediction</span> thin'
            f'</summary><div class="cards">{"".join(cards)}</div></details>')

def answer_words(answer) -> str:
    """A label or a prediction in words: its objects one after another, or the number or word that it is."""
    if answer is None or answer == []:
        return "no answer" if answer is None else "[] (nothing to find)"
    if not isinstance(answer, list):
        return str(answer)
    parts = {"bbox_2d": "box", "point_2d": "point"}
    return "; ".join(" ".join(f"{word} {', '.join(f'{value:.0f}' for value in found[name])}"
                              for name, word in parts.items() if name in found) or "nothing" for found in answer)

def shown(picture: Image.Image, result: dict) -> Image.Image:
    """The part of a gallery's square that the image covers."""
    width, height = result["size"]
    return picture.crop((0, 0, max(1, round(width * report.TILE / max(width, height))),
                         max(1, round(height * report.TILE / max(width, height)))))

def data_uri(picture: Image.Image) -> str:
    """A picture inside the page: a drawing is smaller as PNG, a photo as JPEG."""
    files = {}
    for kind in ("png", "jpeg"):
        picture.convert("RGB").save(file := BytesIO(), kind, quality=85)
        files[kind] = base64.b64encode(file.getvalue()).decode()
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{files[kind]}"

def group_tables(run: Run) -> str:
    """The first and the last group on record: every member with the components of its reward."""
    tables = []
    for group in run.groups:
        texts, scores = group.get("texts", []), group.get("rewards", [])
        names = list(scores[0]) if scores else []
        labels = 0 if run.config.get("method") == "rlvr" else 1
        rows = [["label" if i >= len(texts) - labels else f"rollout {i + 1}",
                 *(f"{number(score.get(name)):.2f}" for name in names),
                 f"<b>{sum(number(score.get(name)) for name in names):.2f}</b>",
                 f'<span class="said" dir="auto">{text(said)}</span>']
                for i, (said, score) in enumerate(zip(texts, scores))]
        tables.append(f"<h4 dir='auto'>step {text(group.get('step'))}: {text(group.get('question'))}</h4>"
                      + table(["", *map(text, names), "reward", "text"], rows, "group"))
    return f"<details><summary>{text(run.name)}: a group in full</summary>{''.join(tables)}</details>" if tables else ""

def setting_tables(runs: list[Run]) -> str:
    """Settings in which the runs differ, then all of them."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = {name: [run.config.get(name, "") for run in runs] for name in names}
    draw = lambda names: table(["", *(text(run.name) for run in runs)],
                               [[text(name), *map(text, rows[name])] for name in names])
    different = [name for name, values in rows.items() if any(value != values[0] for value in values)]
    return ((f"<p>The runs differ in:</p>{draw(different)}" if different else "")
            + f"<details><summary>all settings</summary>{draw(names)}</details>" if rows else "")

# ---- How it looks ----------------------------------------------------------------------------------------------------

# colours that stay apart for every kind of colour vision (after Okabe and Ito), darker on white, lighter on black
LIGHT = ("#0072b2", "#d55e00", "#00805c", "#aa4499", "#8a6a00", "#444444")
DARK = ("#56b4e9", "#ff8c42", "#2cc79a", "#e58fd0", "#e6c229", "#cccccc")

STYLE = """
:root { --page: #fff; --box: #f6f7f8; --line: #d9dce0; --ink: #1a1a1a; --grey: #5c6370; --link: #0059a8;
        --label: #007a4a; --prediction: #b84a00; """ + " ".join(f"--c{i}: {c};" for i, c in enumerate(LIGHT)) + """ }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --box: #1b1e23; --line: #3a3f47; --ink: #ececec;
        --grey: #a3aab5; --link: #7fbfff; --label: #3ddc97; --prediction: #ff9f5a; """ + " ".join(
            f"--c{i}: {c};" for i, c in enumerate(DARK)) + """ } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--page); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 0 .5rem } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem } h4 { font-size: .95rem; margin: 0 }
p { margin: .3rem 0 } small, figcaption, .run, .ends { color: var(--grey); font-size: .85rem; font-weight: normal }
.run b, .ends b { color: var(--ink) } .problem { color: var(--prediction) } a { color: var(--link) } nav { margin: .8rem 0 }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: 5px 12px; text-align: left; vertical-align: top; border-top: 1px solid var(--line) }
thead th { border-top: 0; white-space: nowrap } tbody th { font-weight: 600 } tbody th small { display: block }
td { max-width: 26rem; overflow-wrap: anywhere }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap }
.group td:last-child { min-width: 18rem }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)) }
figure, article { margin: 0; padding: 10px 12px; background: var(--box); border: 1px solid var(--line);
                  border-radius: 6px; min-width: 0 }
figure svg { display: block; width: 100%; height: auto; overflow: visible }
.ends { display: flex; flex-wrap: wrap; gap: 0 .9rem; min-height: 1.3em }
.key { width: 22px; height: 8px; margin-right: 5px }
path { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round }
.raw { stroke-width: 1; opacity: .38 } .dashed { stroke-dasharray: 5 4 } .grid { stroke: var(--line); stroke-width: 1 }
svg text { font: 12px system-ui, sans-serif; fill: var(--grey) } .x { text-anchor: middle } .y { text-anchor: end }
article img { display: block; width: 100%; margin-bottom: 8px; image-rendering: auto }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .3rem 0; font-size: .85rem } dd { margin: 0 }
.right { color: var(--label); font-weight: 600 } .wrong { color: var(--prediction); font-weight: 600 }
.label { color: var(--label) } .prediction { color: var(--prediction) }
.said { white-space: pre-wrap; font-size: .85rem; color: var(--grey) } p.said { max-height: 9.5em; overflow-y: auto }
summary { cursor: pointer; margin: .6rem 0 } details h4 { margin: .8rem 0 .3rem }
""" + " ".join(f".c{i} {{ stroke: var(--c{i}) }}" for i in range(len(LIGHT)))
