"""Small line charts as SVG: one quantity, a line for each run, and in words what is normal.

A line is an (n, 2) array of steps and values; NaN stands where a value was no finite number.
"""

import html
import math
import re
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 12, 8, 24        # of a chart, and its margins
COLOURS = 6              # in page.css
SMOOTHED = 20            # a line of fewer values is shown as it is
BINS = 160               # a line of more than twice as many values is drawn from so many pieces

class Curve(NamedTuple):
    """A quantity of metrics.jsonl, and what a reader should know about it."""

    name: str
    title: str
    unit: str            # "%" is a share from 0 to 1
    normal: str

def text(value, limit=2000) -> str:
    """Anything as text of an element or an attribute: cut at `limit` characters, no control characters, escaped."""
    value = str(value)
    value = value if len(value) <= limit else value[:limit] + " …"
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", value))

def key(place: int) -> str:
    """A short piece of a run's line; the words beside it say whose."""
    return f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="{colour(place)}" d="M1 4H21"/></svg>'

def colour(place: int) -> str:
    """The classes of a run's line: a colour, and dashed when they begin again."""
    return f"c{place % COLOURS}" + " dashed" * (place // COLOURS % 2)

def chart(curve: Curve, lines: dict[str, np.ndarray]) -> str:
    """A figure: axes, a faint and a bold line for each run, the bold one's last value beside its name, what is normal.

    lines: name of the run -> its line, in the order of the colours; without any number, a run is left out.
    """
    measured = {name: line for name, line in lines.items() if not np.isnan(line[:, 1]).all()}
    first = min(line[0, 0] for line in measured.values())
    last = max(line[-1, 0] for line in measured.values())
    marks = ticks(*limits(np.concatenate([line[:, 1] for line in measured.values()])), 4)
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(last - first, 1)
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - marks[0]) / (marks[-1] - marks[0])
    shapes, ends, told = axes(first, last, marks, curve.unit, x, y), [], []
    for place, (name, line) in enumerate(lines.items()):
        if name in measured:
            even = smooth(line)
            raw = f'<path class="raw {colour(place)}" d="{path(thin(line), x, y)}"/>' if len(line) >= SMOOTHED else ""
            shapes += [raw, f'<path class="{colour(place)}" d="{path(thin(even), x, y)}"/>']
            start, end = (show(value, curve.unit) for value in even[~np.isnan(even[:, 1])][[0, -1], 1])
            ends.append(f"<span>{key(place)}{text(name)} <b>{end}</b></span>")
            told.append(f"{name}: from {start} to {end} at step {line[-1, 0]:.0f}")
    unit = f" <small>{curve.unit}</small>" if curve.unit not in ("", "%") else ""
    return (f'<figure><h4>{text(curve.title)}{unit}</h4><p class="ends">{"".join(ends)}</p>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{text(curve.title)} by step</title>'
            f'<desc>{text("; ".join(told))}</desc>{"".join(shapes)}</svg>'
            f"<figcaption>{curve.normal}</figcaption></figure>")

def axes(first: float, last: float, marks: np.ndarray, unit: str, x, y) -> list[str]:
    """Grid lines and their values at `marks`, and whole steps along the bottom."""
    shapes = [f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/><text class="y" x="{LEFT - 6}" '
              f'y="{y(mark) + 4:.1f}">{format_tick(mark, marks[1] - marks[0], unit)}</text>' for mark in marks]
    steps = [mark for mark in ticks(first, max(last, first + 1), 5) if first <= mark <= last and mark % 1 == 0]
    shapes.append(f'<text class="y" x="{LEFT - 12}" y="{HEIGHT - 6}">step</text>')
    return shapes + [f'<text class="x" x="{x(mark):.1f}" y="{HEIGHT - 6}">{mark:,.0f}</text>' for mark in steps]

def limits(values: np.ndarray) -> tuple[float, float]:
    """What the vertical axis shows: from 0, unless all values are far from it; noise is not blown up to fill it."""
    low, high = np.nanmin(values), np.nanmax(values)
    size = max(abs(low), abs(high)) or 1.0
    if not low >= high / 2 > 0:
        low, high = min(low, 0.0), max(high, 0.0)
    return min(low, high - size / 4), high

def ticks(low: float, high: float, count: int) -> np.ndarray:
    """About `count` steps of 1, 2 or 5 times a power of ten, from at or below low to at or above high.

    >>> ticks(0, 6.4, 4).tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step

def format_tick(value: float, step: float, unit: str) -> str:
    """A number beside an axis, with as many decimals as the distance of its neighbours needs."""
    if unit == "%":
        return format_tick(100 * value, 100 * step, "") + "%"
    if abs(value) >= 1e6 or step < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"

def show(value: float, unit: str) -> str:
    """A single value in the words beside a chart."""
    return f"{value:.1%}" if unit == "%" else f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"

def smooth(line: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of the tenth of all values around it, fewer at the ends; NaN counts nowhere."""
    window = np.ones(len(line) // SMOOTHED * 2 + 1)
    there = ~np.isnan(line[:, 1])
    total, count = (np.convolve(part, window, "same") for part in (np.where(there, line[:, 1], 0), there))
    return np.stack([line[:, 0], np.where(there, total / count.clip(1), np.nan)], axis=1)

def thin(line: np.ndarray) -> np.ndarray:
    """The lowest and the highest point of each of BINS pieces, in their order: a spike stays. A short line as it is."""
    if len(line) <= 2 * BINS:
        return line
    kept = []
    for piece in np.array_split(line, BINS):
        values = piece[:, 1]
        kept.append(piece[[0] if np.isnan(values).all() else sorted({np.nanargmin(values), np.nanargmax(values)})])
    return np.concatenate(kept)

def path(line: np.ndarray, x, y) -> str:
    """A line as the "d" of an SVG path: NaN leaves a gap, and a point alone between two gaps is a dot."""
    words, drawn = [], False                     # drawn: the point before was
    for i, (step, value) in enumerate(line):
        there = not math.isnan(value)
        if there:
            alone = not drawn and (i + 1 == len(line) or math.isnan(line[i + 1, 1]))
            words.append(f"{'L' if drawn else 'M'}{x(step):.1f} {y(value):.1f}" + "h0" * alone)
        drawn = there
    return "".join(words)
