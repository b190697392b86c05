"""extras/: the report shows what files say and no text of a model gets out of its box; SAM 2 masks; converted data;
the benchmark's count of operations."""

import base64
import doctest
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import bench
import data
import eval as evaluation
import model
import report

EVIL = ("</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\"'&amp; $x^{$ 😀 שלום "
        "@import url(http://evil.example) </p></td></svg><!-- \x00\x1b\ud800")
SHOWN = EVIL.translate({0: "�", 0x1b: "�", 0xd800: "�"})            # what a page can hold of it
SINGLE = {"meta", "img"}                                            # elements without an end
BOX = [{"bbox_2d": [10, 5, 30, 25], "point_2d": [20, 15]}]
FOUND = [{"bbox_2d": [12, 5, 34, 25], "point_2d": [23, 15]}]


CHART = report.chart


@pytest.fixture(autouse=True)
def quick_charts(monkeypatch):
    """Matplotlib takes a quarter of a second for a chart: most tests make do with a dot."""
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(report, "chart", lambda *_: report.data_uri(dot.getvalue(), "png"))


class Page(HTMLParser):
    """A page taken apart; raises where elements do not close in the order they were opened."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), attributes
        if tag not in SINGLE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(re.match("data:image/(png|jpeg);base64,", source) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def answer(prediction, label, number=1, question="find it", completion="<answer>…</answer>", accuracy=0.0):
    reward = {"format": 2.0, "accuracy": accuracy} | ({} if isinstance(label, str) else {"non_repeat": 1.0})
    return {"id": str(number), "where": f"{{}}, row {number}", "question": question, "completion": completion,
            "prediction": prediction, "label": label, "size": [40, 30], "length": 10, "truncated": False,
            "thinking": True, "reward": reward}


ANSWERS = [answer(FOUND, BOX, 1, accuracy=1.0), answer([], BOX, 2), answer(None, [], 3),
           answer([], [], 4, accuracy=3.0)]


def make_run(directory: Path, steps=8, answers=ANSWERS, task="grounding", **config) -> Path:
    """A directory with all that train.py and eval.py write, and the data set of the answers."""
    directory.mkdir(parents=True)
    rows = []
    for result in answers:
        Image.new("RGB", (40, 30), "#808080").save(directory / f"{result['id']}.png")
        rows.append({"text": "find it", "image": f"{result['id']}.png", "bbox": [[10, 5, 30, 25]]})
    source = directory / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    config = {"run_id": "x", "task": task, "method": "visurf", "data": str(source), "max_steps": steps, **config}
    (directory / "config.json").write_text(json.dumps(config))
    metrics = [{"step": step, "reward": 4 + step / 10, "reward/accuracy": math.sin(step), "label_active": 1 / step,
                "length": 30 + step % 3, "loss": (-1) ** step * 0.01, "rollout_seconds": 2.0, "update_seconds": 0.5,
                "style": "compact"}
               for step in range(1, steps + 1)]
    groups = [{"step": step, "question": f"question {step}", "texts": [f"says {step}", "the label"],
               "rewards": [{"format": 1.5, "accuracy": step}, {"format": 2.0, "accuracy": 3.0}]} for step in (1, 2, 3)]
    for name, records in (("metrics", metrics), ("completions", groups)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = [result | {"where": result["where"].format(source)} for result in answers]
    content = {"settings": config, "metrics": evaluation.metrics(answers, data.TASKS[task]), "answers": answers}
    (directory / "answers.json").write_text(json.dumps(content))
    return directory


def evaluate_on_the_way(directory: Path, steps=(0, 4, 8), **changed):
    """evaluations.jsonl as train.py writes it, with one more right answer each time; `changed`: in all records."""
    lines = []
    for right, step in enumerate(steps):
        improved = [answer(BOX, BOX)] * right + ANSWERS[right:]
        values = {"step": step} | evaluation.metrics(improved, data.TASKS["grounding"]) | changed
        lines.append(json.dumps(values) + "\n")
    (directory / "evaluations.jsonl").write_text("".join(lines))


def change(path: Path, **fields):
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rendered(*directories) -> str:
    return report.page([report.read_run(directory, directory.name) for directory in directories])


def cells(source: str, section: str) -> list[list[str]]:
    """The rows of the tables in a section, as text."""
    body = re.search(f"<section><h2>{section}</h2>.*?</section>", source, re.DOTALL)[0]
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]


# ---- What is loaded, and what a hostile model can do ----------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(tmp_path):
    source = rendered(make_run(tmp_path / "a"), make_run(tmp_path / "b", method="rlvr"))
    parsed = Page(source)
    assert {"script", "link", "iframe", "object", "base", "form", "a"}.isdisjoint(tag for tag, _ in parsed.tags)
    for tag, attributes in parsed.tags:
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert not any(name.startswith("on") or name in ("style", "href") for name in attributes), tag
    style = re.search("<style>(.*)</style>", source, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style and "<" not in style
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in parsed.tags
    assert len(parsed.pictures()) == 7 + 2 * 4                      # curves, answers


def test_quantities_that_never_were_anything_but_0_are_only_named(tmp_path):
    directory = make_run(tmp_path / "a")
    with (directory / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 9, "skipped_rows": 0, "skipped": 0}) + "\n")
    parsed = Page(rendered(directory))
    assert len(parsed.pictures()) == 7 + 4 and "0 in every step: skipped, skipped_rows" in "".join(parsed.texts)


def test_hostile_text_stays_text(tmp_path, monkeypatch):
    """In every place that a model, a data set or a user fills; the same elements come out as for harmless text."""
    monkeypatch.setattr(report, "chart", CHART)

    def source(words):
        name = words.replace("/", "").replace("\0", "").replace("\ud800", "")
        directory = make_run(tmp_path / f"x{name}", task="math", model=words, answers=[
            answer(FOUND, BOX, question=words, completion=words), answer(words, words, accuracy=3.0)])
        change(directory / "answers.json", metrics={"accuracy": 1.0, words: 0.5})
        with (directory / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": 9, f"reward/{words}": 1.0, words: 2.0}) + "\n")
        group = {"step": words, "question": words, "texts": [words] * 2, "rewards": [{words: 1.0}] * 2}
        (directory / "completions.jsonl").write_text(json.dumps(group) + "\n")
        return rendered(directory)

    hostile, harmless = Page(source(EVIL)), Page(source("x"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(found) for _, found in harmless.tags]
    # the model; question and completion; label and prediction; a metric; two charts' titles; a group's step, question,
    # component and two texts
    assert "".join(hostile.texts).count(SHOWN) == 1 + 2 + 2 + 1 + 2 + 5


def test_long_text_is_cut(tmp_path):
    source = rendered(make_run(tmp_path / "a", answers=[answer(FOUND, BOX, completion="w" * 100_000)]))
    assert "w" * 2000 + " …" in source and "w" * 2001 not in source


# ---- What is missing or broken --------------------------------------------------------------------------------------


def test_a_run_that_was_killed_while_writing(tmp_path):
    directory = make_run(tmp_path / "a")
    for name in ("metrics", "completions"):
        with (directory / f"{name}.jsonl").open("a") as log:
            log.write('{"step": 9, "question": "ha')
    (directory / "answers.json").write_bytes((directory / "answers.json").read_bytes()[:150])
    run = report.read_run(directory, "a")
    assert [record["step"] for record in run.steps] == list(range(1, 9))
    assert [group["step"] for group in run.groups] == [1, 3]
    assert run.answers == [] and run.metrics == {}
    assert [Path(problem.split(":")[0].split()[0]).name for problem in run.problems] == [
        "answers.json", "metrics.jsonl", "completions.jsonl"]
    shown = "".join(Page(rendered(directory)).texts)
    assert all(problem in shown for problem in run.problems)


@pytest.mark.parametrize("absent", ["metrics.jsonl", "completions.jsonl", "answers.json", "*.jsonl"])
def test_files_may_be_absent(tmp_path, absent):
    directory = make_run(tmp_path / "a")
    for path in list(directory.glob(absent)):
        path.unlink()
    run = report.read_run(directory, "a")
    assert not run.problems and Page(report.page([run])).tags
    assert run.metrics.get("accuracy") == (None if absent == "answers.json" else 0.5)


def test_answers_whose_data_are_gone_are_shown_without_pictures(tmp_path):
    directory = make_run(tmp_path / "a")
    (directory / "rows.jsonl").unlink()
    parsed = Page(rendered(directory))
    assert len(parsed.pictures()) == 7 and sum(tag == "article" for tag, _ in parsed.tags) == 4
    assert "no pictures of a's answers" in "".join(parsed.texts)


@pytest.mark.parametrize("damage", [None, math.nan, math.inf, "text", [1], True, 10 ** 400, 1e300])
def test_values_that_are_no_numbers_leave_a_gap(tmp_path, damage):
    directory = make_run(tmp_path / "a")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "length": damage})
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    run = report.read_run(directory, "a")
    steps, values = report.line_of(run.steps, "length")
    assert [step for step, value in zip(steps, values) if not math.isnan(value)] == [1, 2, 3, 5, 6, 7, 8]
    assert Page(report.page([run]))


def test_smoothing_is_a_mean_of_neighbours():
    values = np.random.default_rng(0).normal(size=100)
    values[[0, 40, 41, 99]] = np.nan
    expected = [np.nan if np.isnan(values[max(0, i - 5):i + 6]).all() else np.nanmean(values[max(0, i - 5):i + 6])
                for i in range(100)]
    assert report.smooth(values) == pytest.approx(expected, nan_ok=True)
    assert (report.smooth(values[1:20]) == values[1:20]).all()


# ---- Tables and curves ----------------------------------------------------------------------------------------------


def main(capsys, *arguments) -> str:
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_table_is_the_metrics_of_all_runs(tmp_path, monkeypatch, capsys):
    """On the console and on the page; no weights are loaded for it."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "load_pretrained", lambda *_: pytest.fail("weights were loaded"))
    a, b = make_run(Path("a")), make_run(Path("b"))
    change(b / "answers.json", metrics={"accuracy": 0.123, "gIoU": None, "MAE": 2.5, "samples": 1234})
    printed = main(capsys, "a", "b")
    assert printed.endswith("\nreport  runs/report.html\n")
    head, *rows = cells(Path("runs/report.html").read_text(), "Results")
    assert head == ["", "a", "b"]
    rows = {name: values for name, *values in rows}
    assert rows["accuracy"] == ["0.5", "0.123"]
    assert rows["gIoU"][1] == "-" and rows["MAE"] == ["-", "2.5"] and rows["samples"] == ["4", "1,234"]
    assert rows["steps"] == ["8", "8"] and rows["seconds"] == ["20", "20"]
    for line in printed.splitlines()[1:len(rows)]:
        assert rows[line.split()[0]] == line.split()[1:]


def test_every_run_is_a_line_of_every_curve(tmp_path, monkeypatch):
    """As matplotlib was told to draw it: the values themselves, and their means."""
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append(args) or plot(self, *args, **kw))
    runs = [report.read_run(make_run(tmp_path / name, steps=steps), name) for name, steps in (("$a", 60), ("b", 12))]
    CHART(runs, "length")
    assert [len(steps) for steps, _ in drawn] == [60, 60, 12, 12]
    raw, smooth = drawn[0][1], drawn[1][1]
    assert list(raw) == [30 + step % 3 for step in range(1, 61)] and np.ptp(smooth[5:-5]) < 0.5


def figures(source: str, section: str) -> dict[str, str]:
    """{title: caption} of the charts in a section; {} if it is not there."""
    body = re.search(f"<section><h2>{section}</h2>.*?</section>", source, re.DOTALL)
    found = re.findall("<figure><h3>(.*?)</h3><img [^>]*><figcaption>(.*?)</figcaption>", body[0]) if body else []
    return {html.unescape(title): html.unescape(caption) for title, caption in found}


def test_evaluations_on_the_way_stand_before_the_rewards(tmp_path):
    """The task's metrics and no others, each with what a reader should know about it; None is no metric."""
    directory = make_run(tmp_path / "a")
    source = rendered(directory)
    assert "<h2>Evaluations</h2>" not in source and len(figures(source, "Curves")) == 7
    evaluate_on_the_way(directory, cIoU=None)
    source = rendered(directory)
    assert figures(source, "Evaluations") == {name: report.METRICS[name]
                                              for name in ("accuracy", "one_to_one", "gIoU", "N-Acc")}
    assert len(figures(source, "Curves")) == 7 and len(Page(source).pictures()) == 4 + 7 + 4
    assert source.index("<h2>Evaluations</h2>") < source.index("<h2>Curves</h2>")
    assert "a: greedy answers to 4 questions" in source and "of up to 25.0 points" in source


def test_every_metric_of_a_task_is_explained():
    assert {name for task in data.TASKS.values() for name in task.metrics} == set(report.METRICS)


def test_an_evaluation_is_a_point_at_its_step(tmp_path, monkeypatch):
    """As matplotlib was told to draw it, on the page itself: runs without evaluations have no line."""
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.setdefault(kw["label"], []).append((args, kw))
                        or plot(self, *args, **kw))
    monkeypatch.setattr(report, "chart", CHART)
    directories = [make_run(tmp_path / name) for name in ("a", "b", "c")]
    for directory, steps in zip(directories, ((0, 4, 8), (0, 3))):
        evaluate_on_the_way(directory, steps=steps)
    for directory in directories:
        (directory / "metrics.jsonl").unlink()                       # evaluations alone
    parsed = Page(rendered(*directories))
    assert len(parsed.pictures()) == 5 + 3 * 4 and set(drawn) == {"a", "b"}
    [((steps, values), style), *others] = drawn["a"]
    assert list(steps) == [0, 4, 8] and list(values) == [0.5, 0.5, 0.75] and style["marker"] == "o"
    assert len(others) == 4 and list(drawn["b"][0][0][0]) == [0, 3]


def test_an_evaluation_without_a_value_leaves_a_gap(tmp_path):
    directory = make_run(tmp_path / "a")
    evaluate_on_the_way(directory)
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "accuracy": None, "gIoU": EVIL})
    (directory / "evaluations.jsonl").write_text("\n".join([*lines, '{"step": 12, "accu']))
    run = report.read_run(directory, "a")
    for name in ("accuracy", "gIoU"):
        steps, values = report.line_of(run.evaluations, name)
        assert list(steps) == [0, 4, 8] and list(np.isnan(values)) == [False, True, False]
    [problem] = run.problems
    assert "evaluations.jsonl: 1 of 4 records are damaged" in problem and Page(report.page([run]))


def test_settings_that_differ_come_first_and_names_stay_apart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for parent, method in (("x", "visurf"), ("y", "rlvr")):
        make_run(Path(parent) / "run", method=method, learning_rate=1e-4)
    main(capsys, "x/run", "y/run", "x/run", "--output", "out/page.html")              # named twice: shown once
    rows = cells(Path("out/page.html").read_text(), "Settings")
    assert rows[0] == ["", "x/run", "y/run"] and {rows[1][0], rows[2][0]} == {"method", "data"}
    assert ["method", "visurf", "rlvr"] in rows and ["learning_rate", "0.0001", "0.0001"] in rows[3:]


def test_an_evaluation_is_a_run_too_and_its_page_stands_beside_it(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    directory = tmp_path / "evaluation"
    directory.mkdir()
    (run / "answers.json").rename(directory / "answers.json")
    assert main(capsys, directory).endswith(f"report  {directory / 'report.html'}\n")
    source = (directory / "report.html").read_text()
    assert ["accuracy", "0.5"] in cells(source, "Results") and ["task", "grounding"] in cells(source, "Settings")
    assert len(Page(source).pictures()) == 4


@pytest.mark.parametrize("arguments, complaint", [
    (["no/such/run"], "no/such/run"), (["a", "empty"], "empty"),
    (["a", "--output", "a/config.json/x"], "a/config.json")])
def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch("report.py: .+\n", error) and complaint in error


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        report.main([str(make_run(tmp_path / "a"))])
    assert capsys.readouterr().err == "report.py: the curves need matplotlib: pip install matplotlib\n"


# ---- Answers and groups ---------------------------------------------------------------------------------------------


def colour(picture, x, y, expected, tolerance=40):
    """Whether a pixel of a JPEG has about this colour."""
    return np.abs(np.subtract(picture.getpixel((x, y)), expected)).max() < tolerance


def test_answers_stand_beside_their_pictures(tmp_path):
    """Each picture is its answer's, with boxes and points where they are; 40 x 30 pixels are shown 9 times as large."""
    source = rendered(make_run(tmp_path / "a"))
    cards = re.findall("<article>.*?</article>", source, re.DOTALL)
    assert ["accuracy 0," in card for card in cards] == [True, True, False, False]        # from the worst to the best
    [missed] = [card for card in cards if "prediction: [], nothing" in card and "label: bbox" in card]
    [found] = [card for card in cards if "prediction: bbox [12, 5, 34, 25] point [23, 15]" in card]
    green, orange, grey = (0, 138, 82), (230, 92, 0), (128, 128, 128)
    [picture] = Page(missed).pictures()
    assert picture.size == (360, 270)
    assert colour(picture, 92, 150, green) and colour(picture, 200, 223, green) and colour(picture, 45, 45, grey)
    assert colour(picture, 180, 135, green), "its point"
    [picture] = Page(found).pictures()
    assert colour(picture, 305, 100, orange) and colour(picture, 92, 100, green) and colour(picture, 330, 260, grey)
    assert colour(picture, 180, 135, green) and colour(picture, 207, 135, orange), "their points"


def test_shown_are_the_worst_and_the_best_and_some_between(tmp_path):
    answers = [answer(BOX if n != 33 else [], BOX, n, accuracy=3.0 * (n != 33), question=f"number {n}")
               for n in range(50)]
    source = rendered(make_run(tmp_path / "a", answers=answers))
    shown = [int(number) for number in re.findall(r"<h3 dir=\"auto\">number (\d+)</h3>", source)]
    assert shown[0] == 33 and len(set(shown)) == report.ANSWERS and "12 of 50 answers" in source


def test_words_are_shown_as_words(tmp_path):
    answers = [answer("12", "24", 1), answer(None, "24", 2), answer("24", "24", 3, accuracy=1.0)]
    directory = make_run(tmp_path / "a", task="math", answers=answers)
    cards = re.findall("<article>.*?</article>", rendered(directory), re.DOTALL)
    assert ["accuracy 1," in card for card in cards] == [False, False, True]
    assert "prediction: 24" in cards[2] and "label: 24" in cards[2] and "no answer that can be read" in "".join(cards)


def test_groups_are_shown_in_full(tmp_path):
    rows = cells(rendered(make_run(tmp_path / "a")), "Groups")
    assert rows[:3] == [["", "format", "accuracy", "text"], ["rollout 1", "1.50", "1.00", "says 1"],
                        ["label", "2.00", "3.00", "the label"]]
    assert rows[4][:3] == ["rollout 1", "1.50", "3.00"]              # the last group
    rows = cells(rendered(make_run(tmp_path / "b", method="rlvr")), "Groups")
    assert [row[0] for row in rows[:3]] == ["", "rollout 1", "rollout 2"]


def test_it_runs_as_a_program(tmp_path):
    directory = make_run(tmp_path / "a")
    for path in directory.glob("*.jsonl"):                           # no curves: that is quick
        path.unlink()
    done = subprocess.run([sys.executable, ROOT / "extras" / "report.py", directory], capture_output=True, text=True)
    assert done.returncode == 0 and (directory / "report.html").exists(), done.stderr


# ---- The benchmark's count of operations ----------------------------------------------------------------------------


def attention_work(query, key, value, dropout=0.0, causal=False, **_) -> float:
    """Of PyTorch's attention on a CPU, which its own counter does not know: half counts under a causal mask."""
    *rows, size = query
    return 4 * math.prod(rows) * key[-2] * size / (2 if causal else 1)


def counted_work(network, prompt, completions) -> float:
    """Operations of an update, as PyTorch counts them while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: attention_work,
               aten._scaled_dot_product_flash_attention_for_cpu_backward:
                   lambda gradient, q, k, v, out, lse, *more, **_: 2 * attention_work(q, k, v, *more),
               aten.addmm_: lambda total, a, b, **_: 2 * math.prod(a) * b[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        bench.our_loss(network, prompt, completions)
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", ["all weights", "all but the tower", "LoRA"])
@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL"])
def test_the_computed_work_of_an_update_is_what_pytorch_counts(family, trained):
    """Windows, recomputation, gradients of weights and inputs: all that decides the table in docs/speed.md."""
    config, _ = bench.family_configs()[family]
    network = bench.random_network(config)
    if trained == "LoRA":
        pytest.importorskip("peft")
        model.add_adapters(network, "", 8, "base")
    network.vlm.model.visual.requires_grad_(trained == "all weights")
    bench.compute_activations_twice(network)
    [prompt] = bench.make_prompts(1, 280)                            # 20 patches: windows of 8, 8 and 4
    work = bench.update_work(network, len(prompt.ids), 20, 5, 16)
    counted = counted_work(network, prompt, bench.random_completions(5, 16))
    assert sum(map(sum, work.values())) == pytest.approx(counted, rel=0.01)
    assert (work["tower"].backward > 0) == (trained == "all weights")


# ---- SAM 2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """A SAM 2 of 0.1 million random parameters, saved by transformers."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], blocks_per_stage=[1, 2, 2, 1], global_attention_blocks=[2],
        window_size_per_stage=[4, 4, 4, 4], window_positional_embedding_background_size=[4, 4])
    vision = Sam2VisionConfig(backbone_config=backbone.to_dict(), backbone_channel_list=[64, 32, 16, 8],
                              backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)
    config = Sam2Config(
        vision_config=vision.to_dict(),
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16})
    network = Sam2Model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("sam2")
    network.save_pretrained(folder)
    return folder


def test_masks_are_what_transformers_says_at_each_box_and_point(sam_folder):
    """Prompted one object at a time, pixels normalised by hand: the union of their masks, in original pixels."""
    import sam2

    sam = sam2.load_sam(sam_folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    objects = [{"bbox_2d": [20, 10, 100, 70], "point_2d": [30, 40]}, {"bbox_2d": [110, 20, 190, 90]},
               {"point_2d": [3, 3]}]
    expected = np.zeros((96, 192), bool)
    pixels = np.stack([(np.asarray(image)[:, :, c] / 255 - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                       for c in range(3)])
    for (x1, y1, x2, y2), (x, y) in (([20, 10, 100, 70], [30, 40]), ([110, 20, 190, 90], [150, 55])):
        with torch.no_grad():
            out = sam(pixel_values=torch.tensor(pixels[None]).float(),
                      input_boxes=torch.tensor([[[x1 / 3, y1 / 1.5, x2 / 3, y2 / 1.5]]]),
                      input_points=torch.tensor([[[[x / 3, y / 1.5]]]]), input_labels=torch.ones(1, 1, 1).int(),
                      multimask_output=False).pred_masks[0, 0]
        large = torch.nn.functional.interpolate(out[None], (96, 192), mode="bilinear")[0, 0]
        expected |= large.numpy() > 0
    found = sam2.predict_mask(sam, image, objects, (192, 96))
    assert 0.02 < expected.mean() < 0.98 and (found == expected).mean() > 0.999
    assert (sam2.predict_mask(sam, image, objects[1:], (192, 96)) != expected).mean() > 0.05, "prompts do matter"
    assert not sam2.predict_mask(sam, image, objects[2:], (192, 96)).any()


def test_half_a_sam_is_refused(sam_folder, tmp_path):
    """transformers itself fills what is missing with random numbers."""
    import sam2
    from safetensors.torch import load_file, save_file

    shutil.copytree(sam_folder, tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    save_file(dict(list(tensors.items())[5:]), tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(data.UserError, match="5 tensors are missing"):
        sam2.load_sam(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(data.UserError, match="not a SAM 2 checkpoint"):
        sam2.load_sam(tmp_path / "half")


@pytest.fixture
def masks(tmp_path):
    """An evaluation of three samples: a masked ellipse found by its box, one missed, and nothing that was found."""
    mask = np.zeros((60, 45), bool)                                  # half the original's size: its own frame
    mask[10:50, 5:40] = True
    Image.new("RGB", (90, 60), "grey").save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    base = {"image": "a.png", "img_width": 90, "img_height": 120}
    box = [10, 20, 80, 100]
    rows = [base | {"text": "one", "bbox": box, "mask": "mask.png"},
            base | {"text": "two", "bbox": box, "mask": mask.astype(int).tolist()},
            base | {"text": "three", "bbox": []}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = data.load_samples(tmp_path / "rows.jsonl", data.TASKS["medical"], "test")
    predictions = [data.move_objects(samples[0].label, samples[0].frame, (90, 120)), [], []]
    answers = []
    for sample, prediction in zip(samples, predictions):
        label = data.move_objects(sample.label, sample.frame, sample.size)
        answers.append(answer(prediction, label, question=sample.question) | {
            "id": sample.id, "where": sample.where, "size": [90, 120]})
    settings = {"task": "medical", "data": str(tmp_path / "rows.jsonl"), "split": "test"}
    (tmp_path / "answers.json").write_text(json.dumps({"settings": settings, "answers": answers}))
    return tmp_path


def test_masks_may_be_rows_of_numbers_or_images_in_files_lines_and_tables(tmp_path):
    """An image's object is white, or 1, or in colour; a table's mask is read though data.py has no use for it."""
    import sam2

    mask = np.zeros((60, 45), bool)
    mask[10:50, 5:40] = True
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    cells, encoded = [mask.astype(int).tolist(), mask.tolist()], io.BytesIO()
    for name, image in (("white", mask), ("one", mask.astype(np.uint8)),
                        ("colour", mask[:, :, None] * np.uint8([0, 99, 200]))):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        cells.append(f"{name}.png")
    Image.fromarray(mask).save(encoded, "PNG")
    cells.append("data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode())
    row = {"image": "a.png", "text": "cat", "bbox": [5, 5, 40, 40]}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"mask": cell}) for cell in cells))
    samples = data.load_samples(tmp_path / "rows.jsonl", data.TASKS["medical"])
    datasets = pytest.importorskip("datasets")
    images = {"image": {"bytes": encoded.getvalue(), "path": None}, "mask": {"bytes": encoded.getvalue(), "path": None}}
    table = datasets.Dataset.from_list([row | images]).cast_column("mask", datasets.Image())
    table.save_to_disk(str(tmp_path / "disk"))
    samples += data.load_samples(tmp_path / "disk", data.TASKS["medical"])
    for sample in samples:
        assert np.array_equal(sam2.read_mask(sample), mask), sample.where
    for cell in ([[0, 1], [1]], "no.png", [1, 2]):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"mask": cell}))
        [sample] = data.load_samples(tmp_path / "rows.jsonl", data.TASKS["medical"])
        with pytest.raises(data.UserError, match="rows.jsonl, row 1: unreadable mask"):
            sam2.read_mask(sample)


def test_iou_of_masks_is_counted_in_pixels(masks, monkeypatch, capsys):
    """With a SAM 2 that finds exactly the lower half of what is asked for."""
    import sam2

    def lower_half(sam, image, objects, size):
        found = np.zeros((120, 90), bool)
        found[60:] = bool(objects)
        return found

    monkeypatch.setattr(sam2, "load_sam", lambda *_: None)
    monkeypatch.setattr(sam2, "predict_mask", lower_half)
    sam2.main([str(masks), "--masks", str(masks)])
    saved = json.loads((masks / "answers.sam2.json").read_text())
    intersection, union, whole = 40 * 70, 90 * 60 + 40 * 70, 80 * 70
    assert [result["overlap"] for result in saved["answers"]] == [[intersection, union], [0, whole], [0, 0]]
    assert saved["metrics"]["gIoU"] == pytest.approx((intersection / union + 0 + 1) / 3)
    assert saved["metrics"]["cIoU"] == pytest.approx(intersection / (union + whole))
    assert evaluation.format_table(saved["metrics"]) in capsys.readouterr().out


def test_masks_on_the_command_line(masks, sam_folder, capsys):
    import sam2

    sam2.main([str(masks / "answers.json"), "--masks", str(sam_folder)])
    found = json.loads((masks / "answers.sam2.json").read_text())["answers"]
    assert found[1]["overlap"] == [0, 80 * 70] and found[0]["overlap"][1] > 0
    (masks / "other.jsonl").write_text((masks / "rows.jsonl").read_text().splitlines()[0])
    (masks / "empty.json").write_text("[]")
    for arguments, complaint in ((["--masks", masks], "not a SAM 2 checkpoint"),
                                 (["--masks", masks / "no"], "no such file or folder"),
                                 (["--masks", sam_folder, "--data", masks / "other.jsonl"], "does not hold")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sam2.main([str(masks), *map(str, arguments)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and complaint in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        sam2.main([str(masks / "empty.json"), "--masks", str(sam_folder)])
    assert "not the answers.json" in capsys.readouterr().err


# ---- Other people's data --------------------------------------------------------------------------------------------


def turns(question, answer, *before):
    """The turns of LLaVA and VLM-R1."""
    return [*before, {"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def converted(*arguments):
    """The samples that convert.py makes of rows.json, whose images are in coco/."""
    import convert

    convert.main(["rows.json", "--images", "coco", "--output", "ours/rows.jsonl", *arguments])
    return data.load_samples("ours/rows.jsonl", data.TASKS["counting"])


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A folder to work in, with coco/cats.png of 400 x 300 and ours/."""
    monkeypatch.chdir(tmp_path)
    Path("coco").mkdir()
    Path("ours").mkdir()
    Image.new("RGB", (400, 300)).save("coco/cats.png")


def test_doctests_of_the_converter():
    import convert

    assert doctest.testmod(convert) == (0, 3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("lines", [False, True])
def test_vlm_r1s_rows_become_ours(coco, capsys, encoding, lines):
    """Boxes, no box, a number, as a list and as lines; images are found from where the new file is."""
    rows = []
    for given in ("<answer>[12, 40, 210, 290]</answer>", "[[1, 2, 30, 40], [5, 6.5, 70, 80]]", "2", "[]"):
        rows.append({"id": len(rows), "image": "cats.png", "conversations": turns("<image>Wh\u2028at?", given)})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if lines else json.dumps(rows, indent=1)
    Path("rows.json").write_bytes(text.encode(encoding))
    samples = converted()
    assert [sample.question for sample in samples] == ["wh\u2028at"] * 4
    assert [sample.id for sample in samples] == list("0123")
    boxes = [[found["bbox_2d"] for found in sample.label] for sample in samples if isinstance(sample.label, list)]
    assert boxes == [[[12, 40, 210, 290]], [[1, 2, 30, 40], [5, 6.5, 70, 80]], []]
    assert samples[2].label == "2" and data.open_image(samples[0].image).size == (400, 300)
    assert "4 rows, 0 bad rows left out" in capsys.readouterr().out


def swift(content, answer=None, **columns):
    answers = [{"role": "assistant", "content": answer}] if answer else []
    return {"images": ["cats.png"], "messages": [{"role": "user", "content": content}, *answers], **columns}


SYSTEM = {"from": "system", "value": "You are helpful."}
BOX = [{"bbox_2d": [20, 30, 90, 120], "point_2d": [55, 75]}]
OBJECTS = {"ref": ["cat"], "bbox": [[20, 30, 90, 120]]}


@pytest.mark.parametrize("row, question, label", [
    ({"image": "cats.png", "conversations": turns("<image>\nFind", '{"bbox_2d": [20, 30, 90, 120]}', SYSTEM)},
     "find", BOX),
    ({"image": ["cats.png"], "conversations": turns("Find", "```json\n" + json.dumps(BOX) + "\n```")}, "find", BOX),
    (swift("<image>How many?", solution="3"), "how many", "3"),
    (swift("<image>How many?", "4"), "how many", "4"),
    ({"images": ["cats.png"], "query": "<image>How many?", "response": "5"}, "how many", "5"),
    (swift("<image>Find the <ref-object>", "It is at <bbox>", objects=OBJECTS), "find the cat", BOX),
    (swift("Find", "<bbox>", objects={"bbox": [[0.05, 0.1, 0.225, 0.4]], "bbox_type": "norm1"}), "find",
     [{"bbox_2d": [0.05, 0.1, 0.225, 0.4], "point_2d": [0.1375, 0.25]}]),
    ({"images": ["cats.png"], "problem": "Cat", "solution": [[20, 30, 90, 120]]}, "cat", BOX)])
def test_rows_of_others_become_ours(coco, row, question, label):
    """LLaVA's without an id and with a system turn, ms-swift's in its three ways, and those that are ours but a list."""
    Path("rows.json").write_text(json.dumps([row]))
    [sample] = converted()
    assert (sample.question, sample.label, sample.size) == (question, label, (400, 300))


def test_converted_boxes_may_run_to_a_frame(coco):
    Path("rows.json").write_text(json.dumps([{"image": "cats.png", "conversations": turns("Find", "[0, 0, 900, 990]")}]))
    assert converted("--frame", "1000", "1000")[0].frame == (1000, 1000)


@pytest.mark.parametrize("row, complaint", [
    ({"image": "cats.png", "conversations": turns("a", "b") + turns("c", "d")}, "more than a question and its answer"),
    ({"image": "cats.png", "conversations": [{"from": "tool", "value": "x"}]}, "more than a question"),
    ({"conversations": turns("a", "b")}, "no image"), ({"image": "cats.png"}, "no question"),
    ({"image": ["a.png", "b.png"], "conversations": turns("a", "b")}, "too many values"),
    (swift("How many?"), "no answer"), ([1], "'list' object"), ({"image": 7, "text": "a"}, "'int' object")])
def test_a_row_that_cannot_be_converted_is_one_line_or_counted(coco, capsys, row, complaint):
    good = {"image": "cats.png", "conversations": turns("a", "5")}
    Path("rows.json").write_text(json.dumps([good, row]))
    with pytest.raises(SystemExit) as stop:
        converted()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("convert.py: rows.json: row 2: ") and error.count("\n") == 1
    assert complaint in error and "--skip_bad_rows" in error and not list(Path("ours").iterdir())
    assert [sample.label for sample in converted("--skip_bad_rows")] == ["5"]
    assert "1 rows, 1 bad rows left out" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["a,b\n", "[{", ""])
def test_what_the_converter_cannot_read_is_one_line(coco, capsys, content):
    Path("rows.json").write_text(content)
    import convert

    with pytest.raises(SystemExit) as stop:
        convert.main(["rows.json" if content else "nowhere.json", "--output", "ours/rows.jsonl"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("convert.py: ") and error.count("\n") == 1
    assert not list(Path("ours").iterdir())
