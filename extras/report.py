"""One page about a run of train.py or eval.py, or about several side by side.

    python extras/report.py runs/digits-visurf                          # writes report.html there
    python extras/report.py runs/digits-visurf runs/digits-rlvr --output compare.html

The page is one file without scripts that loads nothing. What it shows was written by a model or
taken from a data set, so all of it goes through `text` on its way into the page.
Needs matplotlib for the curves.
"""

import argparse
import base64
import html
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation

# quantity in metrics.jsonl -> what a reader should know about it
CURVES = {
    "reward": "Mean over the rollouts of a step; rises.",
    "reward/thinking": "Reasoning stands before the answer, in its tags.",
    "reward/format": "The answer can be read.",
    "reward/accuracy": "The answer agrees with the label: what it is all about.",
    "reward/non_repeat": "Nothing is said twice; near its maximum.",
    "label_active": "Share of prompts where the label still teaches; falls as rollouts catch up.",
    "length": "Mean tokens of a rollout; a jump means that the style has changed.",
    "truncated": "Share of rollouts that hit the length limit; near 0, or the limit is too low.",
    "loss": "Near 0 with rollouts, as advantages have mean 0: watch the reward. Falls for sft.",
    "grad_norm": "Before clipping; single spikes are normal, a steady rise is not.",
    "rollout_seconds": "Sampling and scoring of a step; follows the length.",
    "update_seconds": "Falls as groups without signal are left out.",
    "skipped": "Updates in a row that were skipped: no usable row, or no finite gradient. At 10, "
               "the run ends.",
    "skipped_rows": "Rows of a step that could not be used; only with --skip_bad_rows.",
}
# metric in evaluations.jsonl -> the same
METRICS = {
    "accuracy": "Share of right answers. For boxes: any of them, or the one around all, has "
                "IoU > 0.5 with the box around the label's.",
    "one_to_one": "Accuracy object by object: one too many costs as much as one too few.",
    "gIoU": "Intersection over union of the masks, as a mean over the questions.",
    "cIoU": "All intersections over all unions: large objects weigh more than in gIoU.",
    "N-Acc": "Of the questions about what is not there, the share answered with [].",
    "point_in_box": "Share of answers with a point in a labelled box; or else a box's centre.",
    "anomaly_acc": "Share of answers that are right about whether there is a defect.",
    "ROC-AUC": "Mean of the shares right with and without a defect; guessing gives 0.5.",
    "count_acc": "Share of counts that are exact.",
    "MAE": "Mean distance between the count and the label's; falls.",
}
ANSWERS = 12            # shown of each run
TILE = 360              # pixels of a picture's longer side
LABEL, PREDICTION = "#008a52", "#e65c00"
STYLE = """
body { margin: 0 auto; max-width: 1200px; padding: 16px; font: 16px/1.45 system-ui, sans-serif;
       color: #1a1a1a; overflow-wrap: anywhere }
h2 { margin: 2rem 0 .6rem } h3 { font-size: 1rem; margin: 1rem 0 .4rem }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)) }
figure, article { margin: 0; padding: 10px; border: 1px solid #d9dce0; border-radius: 6px }
img { width: 100% } figcaption, .said { font-size: .85rem; color: #5c6370 }
.said { white-space: pre-wrap; max-height: 12em; overflow-y: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: 4px 12px; text-align: left; vertical-align: top; border: 1px solid #d9dce0 }
.label { color: #006b40 } .prediction { color: #b84a00 } .problem { color: #b00020 }
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of train.py or eval.py")
    parser.add_argument("--output", help="(default: report.html in the run, of several in runs/)")
    evaluation.run_program("report.py", report, parser.parse_args(argv))


def report(settings):
    """Print the table of the runs and write their page."""
    directories = [Path(run) for run in dict.fromkeys(settings.runs)]
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    runs = [read_run(directory, name) for directory, name in zip(directories, names)]
    default = directories[0] if len(runs) == 1 else Path("runs")
    output = Path(settings.output or default / "report.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write_text(output, page(runs))
    rows = result_rows(runs)
    width = max(len(cell) for _, *cells in rows for cell in cells) + 2
    for name, *values in rows:
        print(plain(f"{name:12}" + "".join(f"{value:>{width}}" for value in values)))
    for run in runs:
        for problem in run.problems:
            print(plain(problem))
    print(f"\nreport  {output}")


def page(runs: list["Run"]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = {
        "Results": result_table(runs), "Evaluations": evaluation_curves(runs),
        "Curves": curves(runs),
        "Answers": "".join(map(answer_cards, runs)), "Groups": "".join(map(group_tables, runs)),
        "Settings": setting_table(runs)}
    body = "\n".join(f"<section><h2>{name}</h2>{content}</section>"
                     for name, content in sections.items() if content)
    problems = "".join(f'<p class="problem">{text(problem)}</p>'
                       for run in runs for problem in run.problems)
    # the policy lets nothing in but what the page itself holds, whatever a model wrote into it
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head>
<body><h1>{text(title)}</h1>{problems}
{body}
</body></html>
"""


# ---- Reading runs: of one that still goes on or was killed, too ----------------------------------


@dataclass
class Run:
    """A directory of train.py or eval.py. A part that is missing is empty."""

    name: str
    settings: dict
    steps: list[dict]               # train.py's records of metrics.jsonl, one for each step
    evaluations: list[dict]         # of evaluations.jsonl, one for each evaluation
    groups: list[dict]              # and of completions.jsonl: the first and the last
    metrics: dict                   # eval.py's
    answers: list[dict]             # and its results of eval.evaluate
    problems: list[str]             # a line on each file that could not be read


def read_run(directory: Path, name: str) -> Run:
    problems = []
    if not any((directory / file).exists() for file in ("config.json", "answers.json")):
        raise data.UserError(f"{directory}: neither train.py nor eval.py has written here")
    config = read_json(directory / "config.json", problems)
    evaluated = read_json(directory / "answers.json", problems)
    steps = read_steps(directory / "metrics.jsonl", problems)
    evaluations = read_steps(directory / "evaluations.jsonl", problems)
    groups = read_lines(directory / "completions.jsonl", problems)
    return Run(name, config or evaluated.get("settings", {}), steps, evaluations,
               groups[:1] + groups[1:][-1:], evaluated.get("metrics", {}),
               evaluated.get("answers", []), problems)


def read_json(path: Path, problems: list[str]) -> dict:
    """The JSON object in a file; {} for an absent one, or a damaged one, which `problems` name."""
    content = parse([path.read_bytes()] if path.exists() else [b"{}"], path, problems)
    return content[0] if content else {}


def read_lines(path: Path, problems: list[str]) -> list[dict]:
    """The JSON objects of a log."""
    return parse(path.read_bytes().splitlines() if path.exists() else [], path, problems)


def read_steps(path: Path, problems: list[str]) -> list[dict]:
    """The records of a log that say which step they are of."""
    return [record for record in read_lines(path, problems) if isinstance(record.get("step"), int)]


def parse(texts: list[bytes], path: Path, problems: list[str]) -> list[dict]:
    """The texts that are JSON objects; the last line of a run that was killed may be cut."""
    records = []
    for content in texts:
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
    if len(records) < len(texts):
        problems.append(f"{path}: {len(texts) - len(records)} of {len(texts)} records are damaged")
    return records


def number(value) -> float:
    """A number as a float; NaN for what is none, or is too large to be drawn."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else math.nan


# ---- Tables --------------------------------------------------------------------------------------


def results(runs: list[Run]) -> dict[str, dict]:
    """The columns of the table: each run's metrics, or its steps and seconds."""
    columns = {}
    for run in runs:
        columns[run.name] = dict(run.metrics)
        if run.steps:
            seconds = [number(record.get(f"{part}_seconds"))
                       for record in run.steps for part in ("rollout", "update")]
            columns[run.name] |= {"steps": run.steps[-1]["step"],
                                  "seconds": float(np.nansum(seconds))}
    return columns


def result_rows(runs: list[Run]) -> list[list[str]]:
    """The table's cells, row by row; the first one holds the titles."""
    columns = results(runs)
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    rows = [["", *columns]]
    for name in names:
        rows.append([name, *(shown(metrics.get(name)) for metrics in columns.values())])
    return rows


def result_table(runs: list[Run]) -> str:
    head, *rows = [map(text, row) for row in result_rows(runs)]
    return table(head, rows) if rows else ""


def shown(value) -> str:
    """A metric with four digits, a large one in full; "-" for what is no number."""
    value = number(value)
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def group_tables(run: Run) -> str:
    """The first and the last group on record: every member with the components of its reward."""
    tables = []
    for group in run.groups:
        texts, rewards = group.get("texts", []), group.get("rewards", [])
        names = list(rewards[0]) if rewards else []
        rollouts = len(texts) - (run.settings.get("method") != "rlvr")
        rows = []
        for i, (said, components) in enumerate(zip(texts, rewards)):
            member = f"rollout {i + 1}" if i < rollouts else "label"
            values = [f"{number(components.get(name)):.2f}" for name in names]
            rows.append([member, *values, f'<span class="said" dir="auto">{text(said)}</span>'])
        heading = f"{run.name}, step {group.get('step')}: {group.get('question')}"
        tables.append(f"<h3>{text(heading)}</h3>{table(['', *map(text, names), 'text'], rows)}")
    return "".join(tables)


def setting_table(runs: list[Run]) -> str:
    """All settings; those in which the runs differ come first."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {name: [text(run.settings.get(name, ""), 400) for run in runs] for name in names}
    order = sorted(rows, key=lambda name: len(set(rows[name])) == 1)
    return table(["", *(text(run.name) for run in runs)],
                 [[text(name), *rows[name]] for name in order]) if rows else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already, in a box that scrolls where the page is narrow."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for name, *cells in rows:
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{name}</th>{row}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def text(value, limit: int = 2000) -> str:
    """Anything as text of an element or attribute: `plain` and escaped."""
    return html.escape(plain(value, limit))


def plain(value, limit: int = 2000) -> str:
    """Anything cut at `limit` characters, without control characters and lone surrogates."""
    value = str(value)
    if len(value) > limit:
        value = value[:limit] + " …"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in value)


# ---- Curves --------------------------------------------------------------------------------------


def evaluation_curves(runs: list[Run]) -> str:
    """A small chart for each of the tasks' metrics that the runs were evaluated by on their way."""
    tasks = [data.TASKS[run.settings["task"]] for run in runs
             if run.evaluations and run.settings.get("task") in data.TASKS]
    # a metric that no sample has is None in every record
    names = [name for name in dict.fromkeys(name for task in tasks for name in task.metrics)
             if any(np.isfinite(line_of(run.evaluations, name)[1]).any() for run in runs)]
    if not names:
        return ""
    figures = "".join(figure(runs, name, METRICS.get(name, ""), evaluated=True) for name in names)
    return f'{evaluation_notes(runs)}<div class="grid">{figures}</div>'


def evaluation_notes(runs: list[Run]) -> str:
    """How many questions the points of each run stand for, and how much chance is in them."""
    notes = ""
    for run in runs:
        samples = number(run.evaluations[-1].get("samples")) if run.evaluations else 0
        if samples > 0:
            # of a share of one half, where it is largest
            error = 50 / samples ** 0.5
            notes += (f"<p>{text(run.name)}: greedy answers to {samples:.0f} questions, at step 0 "
                      "before any training. A share of all of them has a standard error of up to "
                      f"{error:.1f} points; of some of them, as for N-Acc, of more.</p>")
    return notes


def curves(runs: list[Run]) -> str:
    """A small chart for every quantity that was logged, with a line for each run."""
    logged = dict.fromkeys(name for run in runs for record in run.steps
                           for name, value in record.items() if not math.isnan(number(value)))
    names = [name for name in CURVES if name in logged]
    names += [name for name in logged if name not in CURVES and name != "step"]
    figures, flat = "", []
    for name in names:
        if any(np.nan_to_num(line_of(run.steps, name)[1]).any() for run in runs):
            figures += figure(runs, name, CURVES.get(name, ""))
        else:
            flat.append(name)
    zeros = f"<p>0 in every step: {text(', '.join(flat))}</p>" if flat else ""
    return f'<div class="grid">{figures}</div>{zeros}' if names else ""


def figure(runs: list[Run], name: str, meaning: str, evaluated: bool = False) -> str:
    """A chart with its title above it and what it means below."""
    try:
        import matplotlib
    except ImportError:
        raise data.UserError("the curves need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    return (f'<figure><h3>{text(name)}</h3><img src="{chart(runs, name, evaluated)}" '
            f'alt="{text(name)} by step"><figcaption>{text(meaning)}</figcaption></figure>')


def chart(runs: list[Run], name: str, evaluated: bool = False) -> str:
    """A quantity by step: single steps faint; bold, the mean of the tenth of all steps around.

    Of a metric that was evaluated, there is a point at each evaluation, and a line between them.
    """
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(4, 2.4), layout="constrained")
    lines = {run.name: line_of(run.evaluations if evaluated else run.steps, name) for run in runs}
    # a run of eval.py has no steps
    lines = {run: line for run, line in lines.items() if len(line[0]) > 0}
    for run_name, (steps, values) in lines.items():
        # a $ would start a formula
        style = {"linewidth": 2, "label": run_name.replace("$", r"\$")}
        if evaluated:
            axes.plot(steps, values, marker="o", **style)
            continue
        [line] = axes.plot(steps, values, linewidth=1, alpha=0.35)
        # one value alone is a dot
        axes.plot(steps, smooth(values), color=line.get_color(),
                  marker="o" if len(values) == 1 else "", **style)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=150)
    pyplot.close(picture)
    return data_uri(file.getvalue(), "png")


def line_of(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a quantity, where it was logged; NaN for what is no number."""
    records = [record for record in records if name in record]
    return (np.array([record["step"] for record in records]),
            np.array([number(record[name]) for record in records]))


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of the tenth of all values around it; NaN is left out."""
    reach = len(values) // 20
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        if not np.isnan(window).all():
            means[i] = np.nanmean(window)
    return means


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---- Answers over their pictures -----------------------------------------------------------------


def answer_cards(run: Run) -> str:
    """Some answers of a run, at equal distances from the worst to the best."""
    task = data.TASKS.get(run.settings.get("task"))
    if not run.answers or task is None:
        return ""
    scores = [evaluation.measure(result, task.kind) for result in run.answers]
    main = [name for name in (*task.metrics, "reward") if name in scores[0]]
    order = sorted(range(len(scores)),
                   key=lambda i: [scores[i].get(name, 0.0) for name in (main[0], "gIoU", "reward")])
    places = np.linspace(0, len(order) - 1, min(ANSWERS, len(order))).astype(int)
    samples = evaluated_samples(run, task)
    cards = []
    for i in (order[place] for place in places):
        result = run.answers[i]
        cards.append(answer_card(result, scores[i], task, samples.get(result["where"])))
    return (f'<h3>{text(run.name)}: {len(cards)} of {len(order)} answers, from the worst to the '
            'best; <span class="label">label</span> thick, <span class="prediction">prediction'
            f'</span> thin</h3><div class="grid">{"".join(cards)}</div>')


def evaluated_samples(run: Run, task: data.Task) -> dict[str, data.Sample]:
    """The data set that the answers are about, by file and row; {} where it is gone."""
    settings = run.settings
    try:
        samples = data.load_samples(settings.get("data"), task, settings.get("split", "test"),
                                    skip_bad_rows=True)
    except (data.UserError, OSError) as error:
        run.problems.append(f"no pictures of {run.name}'s answers: {error}")
        return {}
    return {sample.where: sample for sample in samples}


def answer_card(result: dict, scores: dict, task: data.Task, sample: data.Sample | None) -> str:
    """One answer: picture, question, scores, label and prediction, and all that was said."""
    picture = ""
    if sample is not None:
        file = io.BytesIO()
        # full resolution of colours too, or thin lines turn grey
        draw(result, data.open_image(sample.image)).save(file, "JPEG", quality=90, subsampling=0)
        picture = f'<img src="{data_uri(file.getvalue(), "jpeg")}" alt="label and prediction">'
    values = [f"{name} {shown(float(scores[name]))}"
              for name in (*task.metrics, "reward") if name in scores]
    answers = ""
    for name in ("label", "prediction"):
        words = text(in_words(result[name]), 400)
        answers += f'<p class="{name}" dir="auto">{name}: {words}</p>'
    return (f'<article>{picture}<h3 dir="auto">{text(result["question"], 400)}</h3>'
            f'<p>{text(", ".join(values))}</p>{answers}'
            f'<p class="said" dir="auto">{text(result["completion"])}</p></article>')


def in_words(answer) -> str:
    """A label or a prediction as text: its objects one after another, or the words that it is."""
    if answer is None:
        return "no answer that can be read"
    if not isinstance(answer, list):
        return str(answer)
    objects = []
    for found in answer:
        parts = [f"{name[:-3]} {[round(value) for value in found[name]]}"
                 for name in ("bbox_2d", "point_2d") if name in found]
        objects.append(" ".join(parts))
    return "; ".join(objects) or "[], nothing is there"


def draw(result: dict, image: Image.Image) -> Image.Image:
    """The image in the original's proportions, with boxes and points of label and prediction."""
    scale = TILE / max(result["size"])
    size = [max(1, round(side * scale)) for side in result["size"]]
    # a tiny image is shown pixel by pixel, as the model sees it
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
    picture = image.convert("RGB").resize(size, method)
    pen = ImageDraw.Draw(picture)
    for name, colour, width in (("label", LABEL, 5), ("prediction", PREDICTION, 3)):
        answer = result[name]
        for found in answer if isinstance(answer, list) else []:
            x1, y1, x2, y2 = np.multiply(found.get("bbox_2d", [0] * 4), scale)
            if x1 < x2 and y1 < y2:
                pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)
            if "point_2d" in found:
                x, y = np.multiply(found["point_2d"], scale)
                pen.circle((x, y), width + 2, colour, "white")
    return picture


if __name__ == "__main__":
    main()
