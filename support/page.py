"""report.html: one page about a run, or about several side by side.

    python eval.py --compare runs/digits-visurf runs/digits-rlvr

`read_run` -> Run -> `render`: results, curves, answers over their pictures, groups in full, settings. The page is one
file without script that loads nothing. What it shows was written by a model or taken from a data set: none of it can be
trusted, so everything that is not a number goes through `text` on its way into the page.
"""

import base64
import json
import math
from collections import deque
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError
from support import report
from support.chart import Curve, chart, key, text

CURVES = {
    "Reward": [Curve("reward", "reward, all components", "points", "Mean over the rollouts of a step; rises.")],
    "Label": [
        Curve("label_active", "label active", "%", "Prompts where the label still teaches; falls to 0 as the policy "
              "catches up."),
        Curve("label_advantage", "label advantage", "standard deviations", "How much better the label is than its "
              "group; falls to 0 with its activity."),
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
        Curve("speed", "sampling", "tokens/s", "Steady after the first step; long answers that few share are slower."),
        Curve("rollout_seconds", "time for rollouts", "s", "Sampling and scoring of a step; follows the length."),
        Curve("update_seconds", "time for the update", "s", "Falls as groups without signal are left out.")]}
COMPONENTS = {"thinking": "Reasoning stands before the answer, in its tags.", "format": "The answer can be read.",
              "accuracy": "The answer agrees with the label: what it is all about.",
              "non_repeat": "Nothing is said twice; near its maximum."}
METRICS = {"accuracy": "right answers; of boxes, those with IoU > 0.5", "gIoU": "mean IoU of the answers",
           "cIoU": "all intersections / all unions", "N-Acc": "absent objects answered with []",
           "well_formed": "answers that can be read", "thinking": "reasoning before the answer",
           "truncated": "cut off at the length limit", "length": "tokens, mean", "reward": "points, mean",
           "point_in_box": "points that lie in a labelled box", "anomaly_acc": "defects and their absence told apart",
           "ROC-AUC": "the same at every threshold; 50% is chance", "count_acc": "exact counts",
           "MAE": "mean error of the count", "RMSE": "the same, large errors weigh more",
           "samples": "questions asked", "steps": "of training", "seconds": "of training"}

# ---- What a run left behind ------------------------------------------------------------------------------------------

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

def read_run(directory, name: str | None = None) -> Run:
    """Read a directory of train.py or eval.py, of a run that goes on or was killed too; DataError if it is neither."""
    directory, problems = Path(directory), []
    if not any((directory / file).exists() for file in ("config.json", "metrics.jsonl", "answers.json")):
        raise DataError(f"{directory}: no run and no evaluation is there; give folders that train.py or eval.py wrote")
    names = ("config", "before", "after", "answers")
    config, before, after, answers = (_read_json(directory / f"{file}.json", problems) for file in names)
    after, gallery, pictures = after or answers, directory / "gallery.png", {}
    try:
        pictures = report.tiles(gallery) if gallery.exists() else {}
    except (OSError, SyntaxError, ValueError):           # what Pillow raises for half a PNG
        problems.append(f"{gallery} cannot be read")
    found = {"before": before, "after": after}
    tested = {when: found[when]["metrics"] for when in found if "metrics" in found[when]}
    steps = _read_steps(directory, problems)
    _add_evaluations(steps, directory, tested, problems)
    return Run(name or directory.resolve().name, config or answers.get("settings", {}), steps, tested,
               after.get("answers", []), pictures, _read_groups(directory / "completions.jsonl"), problems)

def _read_steps(directory: Path, problems: list[str]) -> list[dict]:
    """The records of all steps in order; of a step that was done twice, the later one."""
    steps = {}
    for path in (directory / "metrics.jsonl", directory / "timing.jsonl"):
        lines = path.read_bytes().splitlines() if path.exists() else []
        records = _parse(lines)
        if len(records) < len(lines):
            problems.append(f"{path}: {len(lines) - len(records)} of {len(lines)} lines are not complete")
        for record in records:
            if type(record.get("step")) is int:
                steps.setdefault(record["step"], {}).update(record)
    for record in steps.values():
        tokens, seconds = number(record.get("tokens")), number(record.get("rollout_seconds"))
        record["speed"] = tokens / seconds if "reward" in record and seconds > 0 else None      # sft does not sample
    return [steps[step] for step in sorted(steps)]

def _add_evaluations(steps: list[dict], directory: Path, tested: dict, problems: list[str]):
    """Add what --eval_steps measured to the records of the steps, and before and after with it, as "held out/…"."""
    found = {int(path.stem[5:]): _read_json(path, problems).get("metrics", {}) for path in directory.glob("eval-*.json")
             if path.stem[5:].isdecimal()}
    if found and steps:
        found = {0: tested.get("before", {}), steps[-1]["step"]: tested.get("after", {})} | found
        steps.insert(0, {"step": 0})
        for record in steps:
            measured = found.get(record["step"], {}).items()
            record.update((f"held out/{name}", value) for name, value in measured if name != "samples")

def _read_groups(path: Path) -> list[dict]:
    """The first and the last complete record of a file that may be larger than memory."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        groups = _parse([*islice(file, 1), *deque(file, 2)])
    return groups[:1] + groups[1:][-1:]

def _parse(lines: list[bytes]) -> list[dict]:
    """The lines that hold a JSON object; the last one of a run that was killed may be cut."""
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            pass                                         # counted by who asked
    return [record for record in records if isinstance(record, dict)]

def _read_json(path: Path, problems: list[str]) -> dict:
    """A file's JSON object, {} where it is absent or half-written."""
    found = _parse([path.read_bytes()]) if path.exists() else [{}]
    if not found:
        problems.append(f"{path} is not complete")
    return found[0] if found else {}

def number(value) -> float:
    """A number as a float; NaN for what is none, or is too large to be drawn."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else math.nan

def results(runs: list[Run]) -> dict[str, dict]:
    """The columns of the table: a run's metrics under its name, and those of what it started from, once for each."""
    columns = {}
    for run in runs:
        before = run.tested.get("before")
        if before and before not in columns.values():
            columns["before" if "before" not in columns else f"before {run.name}"] = before
        seconds = [number(record.get(f"{what}_seconds")) for record in run.steps for what in ("rollout", "update")]
        training = {"steps": run.steps[-1]["step"], "seconds": float(np.nansum(seconds))} if run.steps else {}
        columns[run.name] = run.tested.get("after", {}) | training
    return columns

# ---- The page --------------------------------------------------------------------------------------------------------

def compare_runs(directories: list[str], output_dir: str | None = None):
    """Print some runs side by side and write their page: that of one run into its directory, of several into runs/."""
    directories = list(dict.fromkeys(directories))
    names = [Path(directory).resolve().name for directory in directories]
    runs = [read_run(directory, name if names.count(name) == 1 else str(directory))
            for directory, name in zip(directories, names)]
    path = write(runs, output_dir or (directories[0] if len(runs) == 1 else "runs"))
    print(report.side_by_side(results(runs), "held out"), *sum((run.problems for run in runs), []), sep="\n")
    print(f"\nreport       {path}")

def write(runs: list[Run], directory) -> Path:
    """Write report.html into a directory, which is made if absent; beside and renamed: nobody finds half a page."""
    path = Path(directory) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(render(runs), "utf-8")
    return path.with_suffix(".partial").replace(path)

def render(runs: list[Run]) -> str:
    """The whole page."""
    title = text(runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side")
    parts = {"Results": result_table(runs), "Curves": curve_charts(runs),
             "Answers": "".join(answer_cards(run, unfolded=run is runs[0]) for run in runs),
             "Groups": "".join(map(group_tables, runs)), "Settings": setting_tables(runs)}
    parts = {name: part for name, part in parts.items() if part}
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in parts)
    sections = "\n".join(f'<section id="{name}"><h2>{name}</h2>{part}</section>' for name, part in parts.items())
    head = "".join(map(headline, runs, range(len(runs))))
    head += "".join(f'<p class="problem">{text(problem)}</p>' for run in runs for problem in run.problems)
    # the policy lets nothing in but what the page itself holds, whatever a model managed to write into it
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title} – ViSurf</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{Path(__file__).with_suffix(".css").read_text("utf-8")}</style></head>
<body><header><h1>{title}</h1>{head}<nav>{links}</nav></header>
<main>
{sections}
</main></body></html>
"""

def headline(run: Run, place: int) -> str:
    """A run in a line: what was done, and how far it came."""
    config = run.config
    words = [f"{config.get('method', 'evaluation')} on {config.get('task', '?')}"]
    if "max_steps" in config:
        done = run.steps[-1]["step"] if run.steps else 0
        words += [f"{done} of {config['max_steps']} steps", f"seed {config.get('seed')}"]
    words += [config["model"]] if config.get("model") else []
    return f'<p class="run">{key(place)}<b>{text(run.name)}</b> {text(", ".join(words), 200)}</p>'

def table(head: list[str], rows: list[list[str]], kind="") -> str:
    """A table of HTML cells, in a box that scrolls where it is wider than the page."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
                     for row in rows)
    return (f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")

def result_table(runs: list[Run]) -> str:
    """The table of the console, with a word on every metric."""
    columns = results(runs)
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)              # a set in order
    rows = [[text(name), *(report.format_value(name, metrics.get(name)) for metrics in columns.values()),
             f"<small>{METRICS.get(name, '')}</small>"] for name in names]
    return table(["held out", *map(text, columns), ""], rows, "numbers") if rows else ""

def curve_charts(runs: list[Run]) -> str:
    """A small chart for each quantity, all runs in it; a quantity that never was anything but 0 is only named."""
    logged = dict.fromkeys(name for run in runs for record in run.steps for name, value in record.items()
                           if not math.isnan(number(value)) and name not in ("step", "tokens"))
    with_prefix = lambda prefix: [(name, name.removeprefix(prefix)) for name in logged if name.startswith(prefix)]
    held_out = [Curve(name, title, "%" * report.format_value(title, 0.0).endswith("%"), METRICS.get(title, ""))
                for name, title in with_prefix("held out/")]
    components = [Curve(name, title, "points", COMPONENTS.get(title, "")) for name, title in with_prefix("reward/")]
    known = {"Held out": held_out, **CURVES, "Reward": CURVES["Reward"] + components}
    described = {curve.name for curves in known.values() for curve in curves}
    known["More"] = [Curve(name, name, "", "") for name in logged if name not in described]
    parts, flat = [], []
    for section, curves in known.items():
        charts = []
        for curve in curves:
            lines = {run.name: line_of(run, curve.name) for run in runs}
            if any(np.nan_to_num(line[:, 1]).any() for line in lines.values()):
                charts.append(chart(curve, lines))
            elif curve.name in logged:
                flat.append(text(curve.title))
        parts += [f'<h3>{section}</h3><div class="charts">{"".join(charts)}</div>'] if charts else []
    note = ("Bold: mean of the tenth of all steps around a step, with its last value beside the name; faint: single "
            "steps.")
    return ((f"<p>{note}</p>" if parts else "") + "".join(parts)
            + (f'<p class="flat">0 in every step: {", ".join(flat)}.</p>' if flat else ""))

def line_of(run: Run, name: str) -> np.ndarray:
    """(n, 2) steps and values; NaN where a value was no finite number; no row where it was not measured."""
    rows = [(record["step"], number(record[name])) for record in run.steps if record.get(name) is not None]
    return np.array(rows, float).reshape(-1, 2)

# ---- Answers, groups, settings ---------------------------------------------------------------------------------------

def answer_cards(run: Run, unfolded: bool) -> str:
    """The answers of the gallery, or some without pictures, from the worst to the best."""
    chosen = [i for i in run.pictures if i < len(run.answers)] or report.choose(run.answers)
    cards = "\n".join(answer_card(run.answers[i], run.pictures.get(i)) for i in chosen)
    summary = (f"{text(run.name)}: {len(chosen)} of {len(run.answers)} answers, from the worst to the best; "
               '<span class="label">label</span> thick, <span class="prediction">prediction</span> thin')
    return (f"<details{' open' * unfolded}><summary>{summary}</summary>"
            f'<div class="cards">{cards}</div></details>' if chosen else "")

def answer_card(result: dict, picture: Image.Image | None) -> str:
    """One answer: picture, question, verdict, label and prediction in words, and all that was said."""
    worth, _, verdict = report.judge(result)
    image = ""
    if picture:                          # a square, of which the image covers a part
        sides = [max(1, round(side * report.TILE / max(result["size"]))) for side in result["size"]]
        image = f'<img src="{data_uri(picture.crop((0, 0, *sides)))}" alt="boxes and points named below">'
    words = "".join(f'<dt class="{name}">{name}</dt><dd dir="auto">{text(answer_words(result[name]), 400)}</dd>'
                    for name in ("label", "prediction"))
    return (f'<article>{image}<h4 dir="auto">{text(result["question"], 400)}</h4>'
            f'<p class="{"right" if worth == 1 else "wrong"}" dir="auto">{text(verdict)}</p><dl>{words}</dl>'
            f'<p class="said" dir="auto" tabindex="0">{text(result["completion"])}</p></article>')

def answer_words(answer) -> str:
    """A label or a prediction in words: its objects one after another, or the number or word that it is."""
    if answer is None or answer == []:
        return "no answer" if answer is None else "[] (nothing to find)"
    if not isinstance(answer, list):
        return str(answer)
    numbers = lambda values: ", ".join(f"{value:.0f}" for value in values)
    return "; ".join(", ".join(f"{word} [{numbers(found[name])}]" for name, word in
                               (("bbox_2d", "box"), ("point_2d", "point")) if name in found) for found in answer)

def data_uri(picture: Image.Image) -> str:
    """A picture inside the page: a drawing is smaller as PNG, a photo as JPEG."""
    found = []
    for kind in ("png", "jpeg"):
        picture.save(file := BytesIO(), kind, quality=85)
        found.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(found, key=len)

def group_tables(run: Run) -> str:
    """The first and the last group on record: every member with the components of its reward."""
    tables = []
    for group in run.groups:
        texts, scores = group.get("texts", []), group.get("rewards", [])
        names = list(scores[0]) if scores else []
        rollouts = len(texts) - (run.config.get("method") != "rlvr")
        rows = [[f"rollout {i + 1}" if i < rollouts else "label",
                 *(f"{number(score.get(name)):.2f}" for name in names),
                 f"<b>{sum(number(score.get(name)) for name in names):.2f}</b>",
                 f'<span class="said" dir="auto">{text(said)}</span>']
                for i, (said, score) in enumerate(zip(texts, scores))]
        tables.append(f'<h4 dir="auto">step {text(group.get("step"))}: {text(group.get("question"))}</h4>'
                      + table(["", *map(text, names), "reward", "text"], rows, "group"))
    return f"<details><summary>{text(run.name)}: groups in full</summary>{''.join(tables)}</details>" if tables else ""

def setting_tables(runs: list[Run]) -> str:
    """Settings in which the runs differ, then all of them."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = {name: [run.config.get(name, "") for run in runs] for name in names}
    draw = lambda names: table(["", *(text(run.name) for run in runs)],
                               [[text(name), *(text(value, 400) for value in rows[name])] for name in names])
    different = [name for name, values in rows.items() if any(value != values[0] for value in values)]
    return ((f"<p>The runs differ in:</p>{draw(different)}" if different else "")
            + f"<details><summary>all settings</summary>{draw(names)}</details>" if rows else "")
