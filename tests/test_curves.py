"""The README's picture is of the runs it names."""

import json

import pytest
from conftest import ROOT
from PIL import Image

from extras import curves


def write_run(directory, **values):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    records = [{"step": step, **{name: number * step for name, number in values.items()}} for step in range(1, 41)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(directory)


def test_the_picture_has_a_line_for_each_run_in_each_panel(tmp_path):
    """Whatever is drawn comes from the logs: each panel its quantity, each line its run."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    runs = []
    for scale in (1, 2):
        values = {name: scale * 10**place for place, name in enumerate(curves.PANELS)}
        runs.append(write_run(tmp_path / f"run-{scale}", **values))
    curves.main([*runs, "--output", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").width > 1000
    for place, panel in enumerate(pyplot.gcf().axes):
        last = [line.get_ydata()[20] for line in panel.lines]
        assert last == pytest.approx([21 * 10**place, 42 * 10**place]), panel.get_title()
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["run-1", "run-2"]


def test_a_run_without_labels_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "rlvr", **dict.fromkeys(list(curves.PANELS)[:3], 1))
    with pytest.raises(SystemExit):
        curves.main([run, "--output", str(tmp_path / "curves.png")])
    assert "rlvr: no label_active" in capsys.readouterr().err


def test_the_readmes_picture_is_small():
    assert (ROOT / "assets/curves.png").stat().st_size <= 100_000
