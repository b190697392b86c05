"""report.html: it shows what the run's files say, loads nothing, and no text of a model gets out of its box."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import eval as evaluation
import model
import train
from support import chart, page, report

EVIL = ("</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\"'&amp; 😀 \u202eשלום "
        "@import url(http://evil.example) </p></td></svg><!-- \x00\x1b\ud800")
SHOWN = EVIL.translate({0: "�", 0x1b: "�", 0xd800: "�"})              # what a page can hold of it
SINGLE = {"meta", "img"}                                            # elements without an end


class Page(HTMLParser):
    """A page taken apart; raises where elements do not close in the order they were opened."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.texts, self.isolated = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), attributes
        if tag not in SINGLE:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):                  # of SVG: <path … />
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.texts.append(data)
            self.isolated += [data] * (self.open[-1][1].get("dir") == "auto")     # text from the right stays inside

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def answer(prediction, label, size=(40, 30), question="find it", completion="<answer>…</answer>"):
    return {"id": "a", "where": "row 1", "question": question, "completion": completion, "prediction": prediction,
            "label": label, "size": list(size), "length": 10, "truncated": False, "thinking": True,
            "reward": {"total": 4.0}}


BOX = [{"bbox_2d": [10, 5, 30, 25], "point_2d": [20, 15]}]
FOUND = [{"bbox_2d": [12, 5, 34, 25], "point_2d": [23, 15]}]


def make_run(directory: Path, steps=8, after=None, **config) -> Path:
    """A run's directory as train.py leaves it, with curves that are easy to recognise."""
    directory.mkdir(parents=True)
    config = {"task": "digits", "method": "visurf", "model": "", "max_steps": steps, "seed": 0, **config}
    (directory / "config.json").write_text(json.dumps(config))
    metrics = [{"step": step, "reward": 4 + step / 10, "reward/accuracy": math.sin(step), "label_active": 1 / step,
                "length": 30 + step % 3, "tokens": 100 * step, "loss": (-1) ** step * 0.01, "style": "<answer>",
                "clipped": 0.0} for step in range(1, steps + 1)]
    seconds = {"rollout_seconds": 2.0, "update_seconds": 0.5, "tokens": 1}
    timing = [{"step": step, **seconds} for step in range(1, steps + 1)]
    groups = [{"step": step, "question": f"question {step}", "texts": [f"says {step}", "the label"],
               "rewards": [{"format": 1.5, "accuracy": step}, {"format": 2.0, "accuracy": 3.0}]} for step in (1, 2, 3)]
    for name, records in (("metrics", metrics), ("timing", timing), ("completions", groups)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = after or [answer(FOUND, BOX), answer([], BOX), answer(None, []), answer([], [])]
    for when, found in (("before", results[:2]), ("after", results)):
        (directory / f"{when}.json").write_text(json.dumps({"metrics": evaluation.metrics(
            [result for result in found if isinstance(result["label"], list)]), "answers": found}))
    samples = [SimpleNamespace(image=Image.new("RGB", result["size"], "#808080"), where="") for result in results]
    report.gallery(results, samples, directory / "gallery.png")
    return directory


def change(path: Path, **fields):
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rendered(*directories) -> str:
    return page.render([page.read_run(directory) for directory in directories])


# ---- What is loaded, and what a hostile model can do -----------------------------------------------------------------

def test_the_page_is_well_formed_and_loads_nothing(tmp_path):
    source = rendered(make_run(tmp_path / "a"), make_run(tmp_path / "b", method="rlvr"))
    parsed = Page(source)
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in parsed.tags)
    for tag, attributes in parsed.tags:
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("#"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    style = re.search("<style>(.*)</style>", source, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style and "<" not in style
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in parsed.tags
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(pictures) == 8 and all(attributes["alt"] for attributes in pictures)
    assert source.count("<details open>") == 1                      # the answers of the first run
    drawings = [attributes for tag, attributes in parsed.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawings) == sum(tag == "desc" for tag, _ in parsed.tags) == 8
    assert all(attributes["role"] == "img" for attributes in drawings)


def test_hostile_text_stays_text(tmp_path):
    """In every place that a model, a data set or a user fills; the same elements come out as for harmless text."""
    def source(words):
        name = words.replace("/", "").replace("\0", "").replace("\ud800", "")
        directory = make_run(tmp_path / f"x{name}", model=words,
                             after=[answer(FOUND, BOX, question=words, completion=words), answer(words, words)])
        change(directory / "after.json", metrics={"accuracy": 1.0, words: 0.5})
        with (directory / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": 9, f"reward/{words}": 1.0, words: 2.0}) + "\n")
        group = {"step": words, "question": words, "texts": [words] * 2, "rewards": [{words: 1.0}] * 2}
        (directory / "completions.jsonl").write_text(json.dumps(group) + "\n")
        return rendered(directory)

    hostile, harmless = Page(source(EVIL)), Page(source("x"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(found) for _, found in harmless.tags]
    # the model in two places; question and completion; verdict, label and prediction; a metric; two charts, each with
    # its title twice; a group's step, question, component and two texts
    assert "".join(hostile.texts).count(SHOWN) == 2 + 2 + 3 + 1 + 4 + 5
    assert sum(SHOWN in words for words in hostile.isolated) == 2 + 3 + 1 + 2      # where a model or a data set speaks


def test_long_text_is_cut_and_the_page_is_written_whole(tmp_path):
    directory = make_run(tmp_path / "a", after=[answer(FOUND, BOX, completion="w" * 100_000 + "\ud800")])
    path = page.write([page.read_run(directory)], tmp_path / "new" / "folder")
    assert path.name == "report.html" and [path] == list(path.parent.iterdir())
    assert "w" * 2000 + " …" in path.read_text("utf-8") and "w" * 2001 not in path.read_text("utf-8")


# ---- What is missing or broken ---------------------------------------------------------------------------------------

def test_a_run_that_was_killed_while_writing(tmp_path):
    directory = make_run(tmp_path / "a")
    for name in ("metrics", "timing", "completions"):
        with (directory / f"{name}.jsonl").open("a") as log:
            log.write('{"step": 9, "question": "ha')
    for name in ("after.json", "gallery.png"):
        (directory / name).write_bytes((directory / name).read_bytes()[:150])
    run = page.read_run(directory)
    assert [record["step"] for record in run.steps] == list(range(1, 9))
    assert [group["step"] for group in run.groups] == [1, 3]
    assert run.answers == [] and run.pictures == {} and list(run.tested) == ["before"]
    told = "\n".join(run.problems)
    assert "metrics.jsonl: 1 of 9 lines" in told and "timing.jsonl: 1 of 9" in told
    assert "after.json is not complete" in told and "gallery.png cannot be read" in told
    assert all(problem in "".join(Page(rendered(directory)).texts) for problem in run.problems)


@pytest.mark.parametrize("absent", ["timing.jsonl", "metrics.jsonl", "completions.jsonl", "before.json", "after.json",
                                    "gallery.png", "config.json", "*"])
def test_files_may_be_absent(tmp_path, absent):
    directory = make_run(tmp_path / "a")
    for path in list(directory.glob(absent)):
        path.unlink()
    (directory / "metrics.jsonl").touch()
    run = page.read_run(directory)
    assert not run.problems and Page(page.render([run])).tags
    assert page.results([run])["a"].get("accuracy") == (0.5 if absent not in ("after.json", "*") else None)


@pytest.mark.parametrize("damage", [None, math.nan, math.inf, -math.inf, "text", [1], True, 10 ** 400, 1e300])
def test_values_that_are_no_numbers_leave_a_gap(tmp_path, damage):
    directory = make_run(tmp_path / "a")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "length": damage})
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    steps, values = page.line_of(page.read_run(directory), "length").T
    present = [1, 2, 3, 5, 6, 7, 8]
    assert [step for step, value in zip(steps, values) if not math.isnan(value)] == present
    assert (len(steps) == 7) == (damage is None)                    # not measured, or measured and not a number
    [line] = paths(rendered(directory), "length")
    assert re.findall("[ML]", line) == list("MLLLLLL" if damage is None else "MLLMLLL")


def test_one_step_and_one_value_are_drawn(tmp_path):
    [line] = paths(rendered(make_run(tmp_path / "a", steps=1)), "length")
    assert line.endswith("h0")                                      # a dot


# ---- Curves ----------------------------------------------------------------------------------------------------------

def figure(source: str, title: str) -> str:
    [found] = [part for part in re.findall("<figure>.*?</figure>", source, re.DOTALL) if f"<h4>{title}" in part]
    return found


def paths(source: str, title: str) -> list[str]:
    return re.findall(r'<path class="(?:raw )?c\d[^"]*" d="(M(?!1 4H)[^"]*)"', figure(source, title))


def points(source: str, title: str) -> list[np.ndarray]:
    """The lines of a chart in steps and values, by the words at its axes: as a reader would read them."""
    drawing = figure(source, title)
    across = [(float(x), float(words.replace(",", "")))
              for x, words in re.findall(r'<text class="x" x="([\d.]+)"[^>]*>([\d,]+)<', drawing)]
    number = lambda words: float(words.strip("%").replace(",", "")) / (100 if "%" in words else 1)
    marks = re.findall(r'd="M46 ([\d.]+)H348"/><text class="y"[^>]*>([^<]+)<', drawing)
    upwards = [(float(y), number(words)) for y, words in marks]
    read = lambda axis, places: np.polyval(np.polyfit(*zip(*axis), 1), places)
    lines = [np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float).T for path in paths(source, title)]
    return [np.stack([read(across, x), read(upwards, y)], axis=1) for x, y in lines]


@pytest.mark.parametrize("name, title", [("reward", "reward, all"), ("reward/accuracy", "accuracy"), ("loss", "loss"),
                                         ("label_active", "label active"), ("length", "length")])
def test_curves_are_the_data(tmp_path, name, title):
    """Read off with the numbers that stand at the axes, as exactly as a tenth of a unit is; two runs in one chart."""
    long, short = make_run(tmp_path / "a", steps=60), make_run(tmp_path / "b", steps=12)
    source = rendered(long, short)
    lines = [page.line_of(page.read_run(directory), name) for directory in (long, short)]
    faint, bold, other = points(source, title)
    size = np.ptp(lines[0][:, 1])
    for shown, line in ((faint, lines[0]), (bold, chart.smooth(lines[0])), (other, lines[1])):
        assert np.abs(shown - line)[:, 0].max() < 0.03 and np.abs(shown - line)[:, 1].max() < 0.005 * size
    drawn = np.concatenate([np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float)
                            for path in paths(source, title)])
    low, high = [chart.LEFT, chart.TOP], [chart.WIDTH - chart.RIGHT, chart.HEIGHT - chart.BOTTOM]
    assert (low <= drawn).all() and (drawn <= high).all()           # inside the axes
    ends = [chart.smooth(lines[0])[-1, 1], lines[1][-1, 1]]
    said = re.findall(r"</svg>(\w) <b>([^<]+)</b>", figure(source, title))
    assert said == [(run, chart.show(end, "%" if name == "label_active" else "")) for run, end in zip("ab", ends)]
    told = re.search("<desc>(.*)</desc>", figure(source, title))[1]
    assert re.fullmatch(f"a: from .* to {said[0][1]} at step 60; b: from .* to {said[1][1]} at step 12", told)


def test_speed_is_read_from_the_timing_log(tmp_path):
    """tokens / rollout_seconds, for runs that sample; older runs have the seconds among their metrics."""
    directory = make_run(tmp_path / "a")
    assert page.line_of(page.read_run(directory), "speed")[:, 1].tolist() == [0.5] * 8
    assert page.results([page.read_run(directory)])["a"]["seconds"] == 8 * 2.5
    (directory / "timing.jsonl").unlink()
    assert len(page.line_of(page.read_run(directory), "speed")) == 0
    (directory / "metrics.jsonl").write_text('{"step": 1, "tokens": 60, "reward": 1, "rollout_seconds": 3}\n'
                                             '{"step": 2, "tokens": 60, "loss": 1, "rollout_seconds": 3}\n')
    assert page.line_of(page.read_run(directory), "speed").tolist() == [[1, 20]]


def test_held_out_metrics_are_curves_where_they_were_measured_in_between(tmp_path):
    directory = make_run(tmp_path / "a")
    assert "<h3>Held out</h3>" not in rendered(directory)           # two points are no curve
    for step, accuracy in ((3, 0.25), (6, 0.75)):
        (directory / f"eval-{step}.json").write_text(json.dumps({"metrics": {"accuracy": accuracy, "MAE": 12.0}}))
    (directory / "eval-8.json").write_text('{"metr')                # the one that a killed run was writing
    for when, accuracy in (("before", 0.125), ("after", 1.0)):
        change(directory / f"{when}.json", metrics={"accuracy": accuracy, "samples": 4})
    run = page.read_run(directory)
    assert page.line_of(run, "held out/accuracy").tolist() == [[0, 0.125], [3, 0.25], [6, 0.75]]
    assert "eval-8.json is not complete" in run.problems[0]
    source = rendered(directory)
    assert "<b>75.0%</b>" in figure(source, "accuracy</h4>") and "<b>12</b>" in figure(source, "MAE")
    assert "<h4>samples" not in source
    (directory / "eval-8.json").unlink()
    assert page.line_of(page.read_run(directory), "held out/accuracy")[-1].tolist() == [8, 1]


def test_a_quantity_of_zeros_is_only_named_and_an_unknown_one_is_drawn(tmp_path):
    directory = make_run(tmp_path / "a")
    with (directory / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "warmth": 3.5}\n')
    source = rendered(directory)
    assert "0 in every step: clipped." in source and "<h4>clipped" not in source
    assert "<h4>warmth" in source and "<h4>tokens" not in source and "gradient norm" not in source


def test_a_long_run_makes_a_small_page_and_keeps_its_spike(tmp_path):
    directory = make_run(tmp_path / "a", steps=10_000)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines[6666] = json.dumps({**json.loads(lines[6666]), "length": 500})
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    source = rendered(directory)
    assert len(source) < 200_000
    faint, bold = points(source, "length")
    assert faint[:, 1].max() == pytest.approx(500, abs=3) and bold[:, 1].max() < 40
    assert faint[np.argmax(faint[:, 1]), 0] == pytest.approx(6667, abs=5)
    assert len(faint) <= 2 * chart.BINS and (np.diff(faint[:, 0]) >= 0).all()


def test_smoothing_is_a_mean_of_neighbours():
    values = np.random.default_rng(0).normal(size=100)
    values[[0, 40, 41, 99]] = np.nan
    expected = [np.nan if math.isnan(values[i]) else np.nanmean(values[max(0, i - 5):i + 6]) for i in range(100)]
    assert chart.smooth(np.stack([np.arange(100), values], 1))[:, 1] == pytest.approx(expected, nan_ok=True)
    short = np.stack([np.arange(19), values[1:20]], 1)
    assert (chart.smooth(short) == short).all()


@pytest.mark.parametrize("low, high", [(0, 1), (0, 6.4), (4.5, 6.1), (-0.03, 0.02), (0, 1e-9), (-5e8, 3e9), (7, 7),
                                       (0, 0), (-2, -2), (0.97, 1), (123456, 123457)])
def test_axes_hold_the_data_at_round_numbers(low, high):
    marks = chart.ticks(*chart.limits(np.array([low, high], float)), 4)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-9 * step and marks[-1] >= high - 1e-9 * step and 3 <= len(marks) <= 8
    assert round(step / 10.0 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    for mark in marks:
        words = chart.format_tick(mark, step, "")
        assert float(words.replace(",", "")) == pytest.approx(mark, abs=step / 100) and words.strip("0.,") != "-"


@pytest.mark.parametrize("values, shown", [
    ([0.2, 1], (0, 1)), ([5, 6.4], (4.8, 6.4)), ([0.97, 1], (0.75, 1)), ([-1, 3], (-1, 3)), ([-3, -2], (-3, 0)),
    ([2, np.nan, 2.1], (1.575, 2.1)), ([0, 0], (-0.25, 0))])
def test_an_axis_starts_at_zero_unless_the_values_are_far_from_it(values, shown):
    """And a constant, or a little noise, does not fill the drawing."""
    assert chart.limits(np.array(values, float)) == pytest.approx(shown)


def test_runs_keep_their_colours_and_the_seventh_is_dashed(tmp_path):
    directories = [make_run(tmp_path / f"run{i}", steps=3) for i in range(7)]
    for directory in directories[:6]:
        (directory / "metrics.jsonl").unlink()
    classes = re.findall(r'<path class="([^"]*)" d="M4', figure(rendered(*directories), "length"))
    assert classes[-1] == "c0 dashed" and set(classes) == {"grid", "c0 dashed"}


def test_colours_can_be_told_from_the_page(tmp_path):
    """Contrast by WCAG 2.1: 3 for lines, 4.5 for words, on the boxes' ground, in light and in dark."""
    def luminance(colour):
        colour = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
        channels = [int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    style = (ROOT / "support/page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w]+): #(\w+);", block))
        for name, wanted in [*((f"c{i}", 3) for i in range(chart.COLOURS)), ("ink", 4.5), ("grey", 4.5),
                             ("label", 4.5), ("prediction", 4.5)]:
            low, high = sorted([luminance(colours[name]), luminance(colours["box"])])
            assert (high + 0.05) / (low + 0.05) >= wanted, name


# ---- Tables ----------------------------------------------------------------------------------------------------------

def cells(source: str, section: str) -> list[list[str]]:
    body = re.search(f'<section id="{section}">.*?</section>', source, re.DOTALL)[0]
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]


def test_the_table_is_the_metrics(tmp_path, monkeypatch, capsys):
    """On the console and on the page; a base that two runs share stands there once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "load_pretrained", lambda *_: pytest.fail("weights were loaded"))
    a, b, c = (make_run(tmp_path / name) for name in ("a", "b", "c"))
    change(b / "after.json", metrics={"accuracy": 0.123, "gIoU": None, "cIoU": math.nan, "MAE": 2.5, "samples": 1234})
    change(c / "before.json", metrics={"accuracy": 0.75})
    evaluation.main(["--compare", "a", "b", "c"])
    printed = capsys.readouterr().out
    assert printed.endswith(f"\nreport       {Path('runs/report.html')}\n")
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:] if line}
    assert printed.splitlines()[0].split() == ["held", "out", "before", "a", "b", "before", "c", "c"]
    assert table["accuracy"] == ["50.0%", "50.0%", "12.3%", "75.0%", "50.0%"]
    assert table["gIoU"][1:3] == [f"{json.loads((a / 'after.json').read_text())['metrics']['gIoU']:.1%}", "-"]
    assert table["cIoU"][2] == "-" and table["cIoU"][1] != "-"
    assert table["MAE"] == ["-", "-", "2.50", "-", "-"] and table["samples"] == ["2", "4", "1,234", "-", "4"]
    assert table["steps"] == ["-", "8", "8", "-", "8"] and table["seconds"] == ["-", "20", "20", "-", "20"]
    rows = cells((tmp_path / "runs/report.html").read_text("utf-8"), "Results")
    assert rows[0] == ["held out", "before", "a", "b", "before c", "c", ""]
    assert {row[0]: row[1:-1] for row in rows[1:]} == {name: table[name] for name in table if name != "report"}
    lines = printed.splitlines()
    assert len({len(line) for line in lines[:len(rows)]}) == 1      # columns are aligned


def test_the_page_of_one_run_stands_beside_it_and_an_evaluation_is_a_run_too(tmp_path, capsys):
    directory = tmp_path / "evaluation"
    directory.mkdir()
    results = [answer(FOUND, BOX), answer([], [])]
    (directory / "answers.json").write_text(json.dumps(
        {"settings": {"task": "gui", "limit": 2}, "metrics": evaluation.metrics(results), "answers": results}))
    evaluation.main(["--compare", str(directory)])
    source = (directory / "report.html").read_text("utf-8")
    assert ["accuracy", "100.0%", page.METRICS["accuracy"]] in cells(source, "Results")
    assert ["task", "gui"] in cells(source, "Settings") and "evaluation on gui" in source
    evaluation.main(["--compare", str(directory), "--output_dir", str(tmp_path / "there")])
    assert (tmp_path / "there/report.html").read_text("utf-8") == source
    assert capsys.readouterr().out.endswith(f"report       {tmp_path / 'there' / 'report.html'}\n")


def test_settings_that_differ_come_first_and_names_stay_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent, method in (("x", "visurf"), ("y", "rlvr")):
        make_run(Path(parent) / "run", method=method, learning_rate=1e-4)
    page.compare_runs(["x/run", "y/run", "x/run"], "out")           # named twice: shown once
    rows = cells(Path("out/report.html").read_text("utf-8"), "Settings")
    assert rows[:3] == [["", "x/run", "y/run"], ["method", "visurf", "rlvr"], ["", "x/run", "y/run"]]
    assert ["learning_rate", "0.0001", "0.0001"] in rows[3:]


@pytest.mark.parametrize("flags", [["no/such/run"], ["a", "empty"], ["a", "--output_dir", "a/config.json"], []])
def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--compare", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch("eval.py: .+\n", error) and (flags or ["--compare"])[-1] in error
    assert not Path("runs").exists()


# ---- Answers and groups ----------------------------------------------------------------------------------------------

def test_answers_stand_beside_their_pictures(tmp_path):
    """The picture of an answer is its own, without the grey that fills the gallery's square, boxes where they are."""
    results = [answer([], BOX, question="missed"), answer(BOX, BOX, question="found"),
               answer([], [], (20, 60), "nothing there"), answer(BOX * 2, BOX, question="said twice")]
    source = rendered(make_run(tmp_path / "a", after=results))
    cards = re.findall("<article>.*?</article>", source, re.DOTALL)
    assert [re.search("<h4[^>]*>(.*?)</h4>", card)[1] for card in cards] == [
        "missed", "said twice", "found", "nothing there"]
    assert [re.search('<p class="(right|wrong)"[^>]*>(.*?)</p>', card).groups() for card in cards] == [
        ("wrong", "wrong, IoU 0.00"), ("wrong", "partly right, IoU 1.00"), ("right", "right, IoU 1.00"),
        ("right", "right, nothing to find")]
    pictures = [Image.open(BytesIO(base64.b64decode(re.search('base64,([^"]*)"', card)[1]))) for card in cards]
    assert [picture.size for picture in pictures] == [(300, 225)] * 3 + [(100, 300)]
    edge = (75, 40)                                                 # of the box, where no prediction covers it
    assert pictures[0].convert("RGB").getpixel((77, 100)) == (0, 153, 92)
    assert pictures[3].convert("RGB").getpixel(edge) == (128, 128, 128)
    assert "box [10, 5, 30, 25], point [20, 15]" in cards[0] and "[] (nothing to find)" in cards[0]


def test_pictures_are_small_files(tmp_path):
    """A drawing stays exact, as PNG; a photo would be many times as large in it."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    assert page.data_uri(Image.new("RGB", (300, 300), "red")).startswith("data:image/png;base64,")
    assert page.data_uri(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")


def test_answers_without_boxes_are_words(tmp_path):
    results = [answer(12, 13), answer("(A)", "(A)", question="which?"), answer(None, "\\frac12")]
    directory = make_run(tmp_path / "a", after=results)
    cards = re.findall("<article>.*?</article>", rendered(directory), re.DOTALL)
    words = [re.findall("<d[td][^>]*>(.*?)</d[td]>", card) for card in cards]
    assert ["label", "13", "prediction", "12"] in words and words[-1] == ["label", "(A)", "prediction", "(A)"]
    assert ["label", "\\frac12", "prediction", "no answer"] in words
    assert [re.search('<p class="(right|wrong)"[^>]*>(.*?)</p>', card).groups() for card in cards] == [
        ("wrong", "wrong: 12, not 13"), ("wrong", "no answer"), ("right", "right: (A)")]
    assert all("<img" in card for card in cards)
    change(directory / "after.json", answers=[result | {"verdict": "right: by its task"} for result in results])
    assert rendered(directory).count('<p class="right" dir="auto">right: by its task</p>') == 3


def test_answers_without_a_gallery_are_shown_without_pictures(tmp_path):
    results = [answer(BOX, BOX, question=f"number {i}") for i in range(30)]
    directory = make_run(tmp_path / "a", after=[*results, answer(None, BOX, question="the worst")])
    (directory / "gallery.png").unlink()
    source = rendered(directory)
    cards = re.findall("<article>.*?</article>", source, re.DOTALL)
    assert len(cards) == 12 and "the worst" in cards[0] and "<img" not in source
    Image.new("RGB", (700, 700)).save(directory / "gallery.png")    # drawn by an earlier version: it does not say what
    assert rendered(directory) == source


def test_groups_show_every_member_with_its_components(tmp_path):
    rows = cells(rendered(make_run(tmp_path / "a")), "Groups")
    assert rows == [["", "format", "accuracy", "reward", "text"], ["rollout 1", "1.50", "1.00", "2.50", "says 1"],
                    ["label", "2.00", "3.00", "5.00", "the label"],
                    ["", "format", "accuracy", "reward", "text"], ["rollout 1", "1.50", "3.00", "4.50", "says 3"],
                    ["label", "2.00", "3.00", "5.00", "the label"]]
    rows = cells(rendered(make_run(tmp_path / "b", method="rlvr")), "Groups")
    assert [row[0] for row in rows[1:3]] == ["rollout 1", "rollout 2"]


# ---- A real run ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["visurf", "sft"])
def test_training_ends_with_a_page(tmp_path, capsys, method):
    directory = tmp_path / "run"
    train.main(["--max_steps", "3", "--batch_size", "2", "--num_generations", "3", "--max_completion_length", "48",
                "--eval_samples", "4", "--log_rollouts", "1", "--method", method, "--output_dir", str(directory)])
    printed = capsys.readouterr().out
    assert f"report       {directory / 'report.html'}\n" in printed and "held out        before     after" in printed
    source = (directory / "report.html").read_text("utf-8")
    Page(source)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    [line] = points(source, "loss")
    assert line[:, 1] == pytest.approx([record["loss"] for record in records], rel=0.02, abs=0.01)
    assert "3 of 3 steps" in source and source.count("<article>") == 4 and "all settings" in source
    assert ("<h4>accuracy" in source) == ("<h4>label reward" in source) == (method == "visurf")
    assert [row[0] for row in cells(source, "Groups")].count("label") == 2
    page.write([page.read_run(directory)], directory)               # it can be made again at any time
    assert (directory / "report.html").read_text("utf-8") == source
