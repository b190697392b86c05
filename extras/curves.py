"""The learning curves of several runs of train.py in one small picture: the README's first one.

    python extras/curves.py runs/seed-* --output assets/curves.png

A line is a run; each point is the mean of the tenth of all steps around it. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras import report

# What is drawn, and what a reader should call it. `report.CURVES` says more of each.
PANELS = {
    "reward": "reward (of 7)",
    "reward/accuracy": "of it, accuracy (of 3)",
    "reward/thinking": "of it, thinking (of 1)",
    "label_active": "labels with an advantage",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of train.py")
    parser.add_argument("--output", required=True, help="the PNG file to write")
    settings = parser.parse_args(argv)
    report.evaluation.run_program("curves.py", draw, settings)


def draw(settings):
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        raise data.UserError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [report.read_run(Path(directory), directory) for directory in settings.runs]
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 2.6), layout="constrained")
    for panel, name in zip(panels, PANELS):
        for run in runs:
            steps, values = report.line_of(run.steps, name)
            if len(steps) == 0:
                raise data.UserError(f"{run.name}: no {name}; give runs of --method visurf")
            panel.plot(steps, report.smooth(values), label=Path(run.name).name, linewidth=1.2)
        panel.set_title(PANELS[name], fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.savefig(settings.output, dpi=100)


if __name__ == "__main__":
    main()
