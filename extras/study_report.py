"""What the study's records say: tests, tables and the figure. `python extras/study.py --report` shows them.

A record is one finished run; its numbers are shares from 0 to 1. `runs` holds those of the main part and of what
follows, by (arm, base, seed). All differences are paired by base and seed, and given in points (percent).
"""

from dataclasses import dataclass

import numpy as np

BASES = ("A", "A+", "B", "B+")
KINDS = {"never samples `[]`": ("A", "B"), "samples `[]` now and then": ("A+", "B+")}
METHODS = ("visurf", "sft", "sft-long", "rlvr", "sft-rlvr")
RIVALS = METHODS[1:]
SORTS = ("known", "two-hop", "new word", "absent")
OUTCOMES = ("mean of four", "mean of three", *SORTS, "thinking", "retention", "false []", "truncated")
SECONDARY = ("mean of three", "retention", "thinking", "false []", "truncated")
BEYOND = ("mean of four", "thinking", "retention")
# What the notes of each step are called, and how a table calls them.
TRACES = {
    "active": "labels with an advantage, %",
    "advantage": "a label's mean advantage",
    "thinking": "rollouts that reason first, %",
    "[]": "rollouts that answer `[]`, %",
}

# ---- Tests ------------------------------------------------------------------------------------------------------

def sign_flip_test(differences) -> float:
    """Two-sided p of paired differences having mean 0: the share of all 2^n choices of their signs whose sum is as far
    from 0 as theirs or farther (Fisher's randomisation test).

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.25
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(abs(sums) >= abs(sum(differences)) - 1e-9))


def holm(p_values: list[float]) -> list[float]:
    """The p-values after Holm's correction: the smallest of n counts n-fold, the next n - 1 fold, and so on.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


@dataclass
class Comparison:
    """One arm minus another in one outcome: paired differences in points, by base; p is after Holm."""

    label: str
    outcome: str
    by_base: dict[str, list[float]]
    p: float = 1.0

    @property
    def differences(self) -> list[float]:
        return [difference for found in self.by_base.values() for difference in found]

    @property
    def mean(self) -> str:
        return f"{np.mean(self.differences):+.1f}"

    @property
    def ruling(self) -> str:
        if self.p >= 0.05:
            return "open"
        return "**ahead**" if np.mean(self.differences) > 0 else "**behind**"

    @property
    def ahead_in(self) -> str:
        means = [np.mean(found) for found in self.by_base.values() if found]
        return f"{sum(mean > 0 for mean in means)} of {len(means)}"


def compare(label: str, ours: str, rival: str, outcome: str, runs: dict, bases=BASES) -> Comparison:
    """Pair two arms by base and seed, where both have run."""
    by_base = {base: [] for base in bases}
    for arm, base, seed in runs:
        if arm == ours and base in by_base and (rival, base, seed) in runs:
            pair = [runs[name, base, seed]["numbers"][outcome] for name in (ours, rival)]
            by_base[base].append(100 * (pair[0] - pair[1]))
    return Comparison(label, outcome, by_base)


def judge(comparisons: list[Comparison]) -> list[Comparison]:
    """Those of a family of tests that have pairs, with p after Holm over them."""
    family = [comparison for comparison in comparisons if comparison.differences]
    adjusted = holm([sign_flip_test(comparison.differences) for comparison in family])
    for comparison, p in zip(family, adjusted):
        comparison.p = p
    return family


def rulings(runs: dict) -> list[Comparison]:
    """The 12 primary tests: each rival over all bases and over each kind of base."""
    groups = {"all bases": BASES} | {f"base {kind}": bases for kind, bases in KINDS.items()}
    return judge([compare(f"{rival}, {name}", "visurf", rival, "mean of four", runs, bases)
                  for rival in RIVALS for name, bases in groups.items()])


# ---- Tables -----------------------------------------------------------------------------------------------------

def tables(progress: dict, grids: dict, best: dict, searched: list, bases: dict, runs: dict) -> dict[str, str]:
    """All tables, as Markdown, by name."""
    found = {
        "progress": table(["part", "runs finished", "of"],
                          [[part, str(done), str(all_of_it)] for part, (done, all_of_it) in progress.items()]),
        "search": search_table(grids, best, searched),
        "bases": bases_table(bases),
    }
    if runs:
        found |= {
            "summary": methods_table(runs, ("mean of four", "mean of three", "absent", "thinking", "retention"), bases),
            "methods": methods_table(runs, OUTCOMES),
            "rulings": rulings_table(runs),
            "secondary": secondary_table(runs),
            "thinking": methods_table(runs, [f"thinking, {sort}" for sort in SORTS]),
            "early": early_table(runs),
            "controls": controls_table(runs),
            "beyond": beyond_table(runs),
        }
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_of(records: list[dict], outcome: str = "mean of four") -> float:
    return float(np.mean([record["numbers"][outcome] for record in records]))


def percent(records: list[dict], outcomes) -> list[str]:
    return [f"{100 * mean_of(records, outcome):.1f}" for outcome in outcomes]


def spread(records: list[dict], outcome: str) -> str:
    """Mean ± sample standard deviation over runs, in percent."""
    values = [100 * record["numbers"][outcome] for record in records]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def select(runs: dict, arm: str, bases=BASES) -> list[dict]:
    return [record for key, record in runs.items() if key[0] == arm and key[1] in bases]


def search_table(grids: dict, best: dict, searched: list[dict]) -> str:
    """Mean of four on the validation split by learning rate, over bases and seeds; the best one is bold."""
    columns = sorted({rate for grid in grids.values() for rate in grid})
    rows = []
    for method in grids:
        cells = []
        for rate in columns:
            found = [record for record in searched if record["job"]["arm"] == method
                     and record["job"]["stages"][-1][2] == rate]
            cell = percent(found, ["mean of four"])[0] if found else "–"
            if found and method not in best:
                cell += f" ({len(found)})"               # so many runs as yet
            cells.append(f"**{cell}**" if rate == best.get(method) else cell)
        rows.append([method, *cells])
    return table(["validation split", *(f"{rate:g}" for rate in columns)], rows)


def bases_table(bases: dict) -> str:
    """The base networks before any of it; last, how often they sample [] where it is right."""
    rows = []
    for base in BASES:
        if base in bases:
            sampled = f"{100 * bases[base]['empty_sampled']:.1f}"
            rows.append([base, *percent([bases[base]], OUTCOMES[:-2]), sampled])
    return table(["base", *OUTCOMES[:-2], "`[]` sampled"], rows)


def methods_table(runs: dict, outcomes, untrained=()) -> str:
    """Each method on the bases of each kind: mean ± standard deviation over runs of the first outcome, means of the
    others. If records of untrained bases are given, their means come first."""
    rows = []
    for kind, bases in KINDS.items():
        before = [untrained[base] for base in bases if base in untrained]
        if before:
            rows.append([f"untrained, base {kind}", *percent(before, outcomes), "–", "–"])
        for method in METHODS:
            found = select(runs, method, bases)
            if found:
                seconds = np.mean([record["cpu_seconds"] for record in found])
                rows.append([f"{method}, base {kind}", spread(found, outcomes[0]), *percent(found, outcomes[1:]),
                             f"{seconds:.0f}", str(len(found))])
    return table(["", *outcomes, "CPU s", "runs"], rows)


def rulings_table(runs: dict) -> str:
    rows = []
    for comparison in rulings(runs):
        means = [comparison.by_base.get(base) for base in BASES]
        rows.append([comparison.label, comparison.mean, p_text(comparison.p), comparison.ruling, comparison.ahead_in,
                     *(f"{np.mean(found):+.1f}" if found else "–" for found in means),
                     str(len(comparison.differences))])
    return table(["visurf minus", "mean of four", "p (Holm)", "ruling", "ahead in", *BASES, "pairs"], rows)


def secondary_table(runs: dict) -> str:
    """Differences with p after Holm over the whole table, and the number of bases in which ViSurf has more."""
    family = judge([compare(rival, "visurf", rival, outcome, runs) for rival in RIVALS for outcome in SECONDARY])
    rows = []
    for rival in RIVALS:
        cells = [f"{comparison.mean} (p {p_text(comparison.p)}; {comparison.ahead_in})"
                 for comparison in family if comparison.label == rival]
        if cells:
            rows.append([rival, *cells])
    return table(["visurf minus", *SECONDARY], rows)


def early_table(runs: dict) -> str:
    """How ViSurf's rollouts and labels change: means over runs by stretches of steps, ten of which share a value."""
    stretches = {"1–10": slice(0, 1), "11–20": slice(1, 2), "21–60": slice(2, 6), "last 40": slice(-4, None)}
    rows = []
    for kind, bases in KINDS.items():
        for name, meaning in TRACES.items():
            for sort in ("absent", "present"):
                traces = [record["trace"][f"{name} {sort}"] for record in select(runs, "visurf", bases)]
                if traces:
                    rows.append([f"{meaning}: {sort}, base {kind}"])
                    for stretch in stretches.values():
                        mean = np.nanmean(np.array([trace[stretch] for trace in traces], float))
                        rows[-1].append(f"{mean:.2f}" if name == "advantage" else f"{100 * mean:.0f}")
    return table(["visurf, steps", *stretches], rows)


def controls_table(runs: dict) -> str:
    """An arm with one control off minus the same bases and seeds with all of them on."""
    rows = []
    for arm in dict.fromkeys(arm for arm, _, _ in runs if "label" in arm or "credited" in arm):
        plain = arm.split(",")[0]
        found = [compare(arm, arm, plain, outcome, runs) for outcome in OUTCOMES]
        if found[0].differences:
            rows.append([arm, *(comparison.mean for comparison in found), str(len(found[0].differences))])
    return table(["minus the same with all controls", *OUTCOMES, "pairs"], rows)


def beyond_table(runs: dict) -> str:
    """Changed ViSurf beside ViSurf as it is: mean ± standard deviation over runs, paired difference, p after Holm."""
    arms = list(dict.fromkeys(arm for arm, _, _ in runs if arm.startswith("visurf, ")
                              and "label" not in arm and "credited" not in arm))
    family = judge([compare(arm, arm, "visurf", outcome, runs) for arm in arms for outcome in BEYOND])
    bases = {base for arm, base, _ in runs if arm in arms}
    plain = select(runs, "visurf", bases)
    rows = []
    if plain:
        rows.append(["visurf", *(spread(plain, outcome) for outcome in BEYOND), *percent(plain, SORTS),
                     str(len(plain))])
    for arm in arms:
        ours = select(runs, arm)
        cells = [f"{spread(ours, comparison.outcome)} ({comparison.mean}, p {p_text(comparison.p)})"
                 for comparison in family if comparison.label == arm]
        if cells:
            rows.append([arm, *cells, *percent(ours, SORTS), str(len(ours))])
    return table(["", *BEYOND, *SORTS, "runs"], rows)


def write_tables(path, found: dict[str, str]):
    """Put each table between its marks in a document: <!-- name --> and <!-- end -->."""
    text = path.read_text()
    for name, content in found.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = before + mark + content + "\n" + rest[rest.index("<!-- end -->"):]
    path.write_text(text)


# ---- The figure -------------------------------------------------------------------------------------------------

def draw(runs: dict, path):
    """Left: ViSurf minus each rival, a dot for each pair. Then what happens to ViSurf's labels and rollouts."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *others) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    colours = dict(zip(BASES, ("tab:blue", "tab:cyan", "tab:red", "tab:orange")))
    for x, rival in enumerate(RIVALS):
        by_base = compare(rival, "visurf", rival, "mean of four", runs).by_base
        for shift, base in zip((-0.24, -0.08, 0.08, 0.24), BASES):
            left.plot([x + shift] * len(by_base[base]), by_base[base], "o", color=colours[base], alpha=0.7,
                      label=None if x else f"base {base}")
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(range(len(RIVALS)), [f"− {rival}" for rival in RIVALS])
    left.set_title("ViSurf minus a rival, mean of four, points")
    for panel, name in zip(others, ("active", "thinking")):
        for kind, colour in zip(KINDS, ("tab:blue", "tab:orange")):
            for sort, line in (("absent", "-"), ("present", "--")):
                traces = [record["trace"][f"{name} {sort}"] for record in select(runs, "visurf", KINDS[kind])]
                if traces:
                    values = 100 * np.nanmean(np.array(traces, float), axis=0)
                    panel.plot(10 * np.arange(len(values)) + 5, values, line, color=colour,
                               label=f"{sort}; base {kind.replace('`', '')}")
        panel.set_ylim(-3, 103)
        panel.set_title(f"ViSurf: {TRACES[name]}")
        panel.set_xlabel("optimizer step")
    left.legend(fontsize=8)
    others[0].legend(fontsize=8)
    for panel in (left, *others):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(path)
