"""The study: does one stage with injected labels beat supervision, reinforcement, and the two in sequence?

    python extras/study.py                     # everything; what is done is not done again
    python extras/study.py --parts steps       # one part of it: search, steps, compute, controls
    python extras/study.py --report            # tables and figure again; of the published results, if there are no own

Four methods on the built-in task, from two base checkpoints that differ by their seed:

    sft        cross-entropy on the labels             rlvr      GRPO: rollouts alone
    sft-rlvr   half the steps of one, then the other   visurf    rollouts with the label injected

Parts: `search` tries each method's learning rates on the validation split; `steps` gives each method as many optimizer
steps, `compute` as many seconds, `controls` takes one reward control at a time from visurf. A run is a process of one
thread. Its directory, runs/study/PART/ARM-BASE-SEED, holds train.py's files and result.json; all results together go to
runs/study/study.json, from which the tables and study.png are made. Those of docs/results.md are in assets/. The
picture needs matplotlib.

Decided before the runs of `steps`, `compute` and `controls`: the main number is the mean accuracy of the four sorts of
question on the test split ("mean of the four"), the second one is retention. ViSurf minus a rival, paired by base and
seed, `holds` the paper's claim if the mean difference is positive and a sign-flip test has p < 0.05, `fails` it if
negative with p < 0.05, and leaves it `open` otherwise.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import eval as evaluate
import make_tiny
import model
import rewards
import train
from make_digits import QUESTIONS, SPLITS, draw

# ---- Settings, fixed before the runs they are for --------------------------------------------------------------------

RUNS, PUBLISHED = Path("runs/study"), ROOT / "assets/study.json"
BASES = {"A": ROOT / "assets/tiny-qwen2-vl", "B": RUNS / "base-B"}
BASE_SEED = {"B": 1}  # of extras/make_tiny.py; A is bundled, with seed 0
SEEDS, COMPUTE_SEEDS, SEARCH_SEEDS = range(5), range(4), (100,)
STEPS, BATCH, EVAL_STEPS, EVAL_SAMPLES = 240, 8, 60, 200
MEASURED_SAMPLES, RETENTION_SAMPLES = 400, 100  # the whole split; of each lesson
RATES = (5e-5, 1e-4, 2e-4, 4e-4)  # tried for every method on base A; of two stages, for the second
CHOSEN = {"sft": 2e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5, "visurf": 2e-4}  # the best of the search
# Steps that cost as many seconds as visurf's, by the runs of the search: 0.104 s a step of sft, 0.305 of rlvr, 0.44 of
# visurf; of two stages, each has half of the time
COMPUTE = {"sft": (1000,), "rlvr": (345,), "sft-rlvr": (505, 172)}
CONTROLS = {"visurf-unaligned": "--no-align_label", "visurf-thinking": "--no-drop_thinking_reward",
            "visurf-unsmoothed": "--no-smooth_label_reward"}


@dataclass(frozen=True)
class Job:
    """A run: from a base checkpoint, one or more stages of train.py, each from where the last one ended."""

    part: str
    arm: str
    base: str
    seed: int
    stages: tuple[tuple, ...]  # (method, steps, learning rate, further flags …)

    @property
    def directory(self) -> Path:
        return RUNS / self.part / f"{self.arm}-{self.base}-{self.seed}"


def stages(arm: str, rates: dict, steps=None) -> tuple[tuple, ...]:
    """What an arm consists of at `rates`; steps: of each of its stages (default: STEPS, shared alike)."""
    if arm == "sft-rlvr":
        first, second = steps or (STEPS // 2, STEPS // 2)
        return ("sft", first, rates["sft"]), ("rlvr", second, rates["sft-rlvr"])
    method, *flags = ("visurf", CONTROLS[arm]) if arm in CONTROLS else (arm,)
    return ((method, *(steps or (STEPS,)), rates[method], *flags),)


def jobs_of(part: str) -> list[Job]:
    """All runs of a part."""
    if part == "search":
        return [Job(part, f"{arm}-{rate:g}", "A", seed, stages(arm, {**CHOSEN, arm: rate}))
                for seed in SEARCH_SEEDS for arm in CHOSEN for rate in RATES]
    if part == "controls":
        return [Job(part, arm, "A", seed, stages(arm, CHOSEN)) for seed in SEEDS for arm in CONTROLS]
    steps, seeds = (COMPUTE, COMPUTE_SEEDS) if part == "compute" else (dict.fromkeys(CHOSEN), SEEDS)
    return [Job(part, arm, base, seed, stages(arm, CHOSEN, steps[arm]))
            for seed in seeds for base in BASES for arm in steps]


# ---- Running ---------------------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job]):
    """Run what has no result yet, a process for each core, forked from this one, which has imported everything."""
    waiting = [job for job in jobs if not (job.directory / "result.json").exists()]
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap_unordered(run_job, waiting, chunksize=1), "runs", len(waiting)):
            pass
        # Not only terminated: a worker of train.py's takes SIGTERM for a wish to save, and stays.
        pool.close()
        pool.join()


def run_job(job: Job):
    """All stages of a run, then its measurement; what it prints goes to its directory. A killed run goes on."""
    job.directory.mkdir(parents=True, exist_ok=True)
    checkpoint, curves = BASES[job.base], job.part in ("steps", "controls")
    with open(job.directory / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for number, (method, steps, rate, *flags) in enumerate(job.stages, 1):
            output = job.directory / f"stage-{number}"
            command = {"method": method, "model": checkpoint, "max_steps": steps, "learning_rate": rate,
                       "batch_size": BATCH, "seed": job.seed, "save_steps": EVAL_STEPS,
                       "keep": steps if curves else 1, "output_dir": output}
            command = [str(word) for name, value in command.items() for word in (f"--{name}", value)]
            try:
                with count_cpu_seconds(job.directory / "cpu.jsonl", number):
                    train.main([*command, *flags, "--resume"])
            except SystemExit as error:  # a pool would wait for this process for ever
                raise RuntimeError(f"{output}: train.py ended with exit code {error.code}; see log.txt") from None
            checkpoint = output / f"checkpoint-{steps}"
        result = measure(checkpoint, "validation" if job.part == "search" else "test")
        result |= read_logs(job) | {"curve": measure_curve(job) if curves else []}
    result |= {"part": job.part, "arm": job.arm, "base": job.base, "seed": job.seed, "stages": job.stages}
    evaluate.write_text(job.directory / "result.json", json.dumps(result))
    for number in range(1, len(job.stages) + 1):
        for passed in train.own_checkpoints(job.directory / f"stage-{number}")[:-1]:
            shutil.rmtree(passed)


@contextlib.contextmanager
def count_cpu_seconds(path: Path, stage: int):
    """Write down the CPU seconds of every training step: as two runs share two cores, their wall time varies."""
    train_step = train.train_step

    def timed_step(run):
        start = time.process_time()
        outcome = train_step(run)
        record = {"stage": stage, "step": run.step, "cpu_seconds": time.process_time() - start}
        with path.open("a") as log:
            print(json.dumps(record), file=log)
        return outcome

    train.train_step = timed_step
    try:
        yield
    finally:
        train.train_step = train_step


def measure(checkpoint, split: str) -> dict:
    """Final numbers of a checkpoint: accuracy on each sort of question, retention, and how it answers."""
    network, processor, results = answer(checkpoint, split, MEASURED_SAMPLES)
    kept = {sort: retention(network, processor, sort, split) for sort in RETENTION}
    metrics = evaluate.metrics(results, data.TASKS["digits"])
    return {**by_sort(results), **{name: metrics[name] for name in ("gIoU", "well_formed", "thinking", "length")},
            **kept, "retention": np.mean(list(kept.values()))}


def answer(checkpoint, split: str, count: int):
    """A checkpoint's network and processor, and its results on the first samples of a split."""
    task = data.TASKS["digits"]
    network, processor = model.load_pretrained(checkpoint), data.Processor(checkpoint, task)
    samples = data.load_samples(None, task, split, count)
    results, _ = evaluate.evaluate(network, processor, samples, max_new_tokens=64, batch_size=100)
    return network, processor, results


def by_sort(results: list[dict]) -> dict:
    """Share of boxes with IoU > 0.5, one to one (N-Acc where nothing is there), and the mean of all, "overall"."""
    hits = {sort: [] for sort in QUESTIONS}
    for result in results:
        scores = evaluate.measure(result)
        hits[result["id"].split(" ", 1)[1]].append(scores["one_to_one"] if result["label"] else scores["N-Acc"])
    means = {sort: float(np.mean(values)) for sort, values in hits.items()}
    return means | {"overall": float(np.mean(list(means.values())))}


RETENTION = ("where", "name", "outline")  # lessons of the base that no training set holds


def retention(network, processor, sort: str, split: str, count: int | None = None) -> float:
    """Share of a lesson's questions that are still answered as the base was taught: the very words, or for outlines
    a box with IoU > 0.5. The pictures are new; the handwriting is what the base has learnt to read, as what it could
    never do it cannot forget."""
    rng, samples, truths = np.random.default_rng([99, SPLITS.index(split)]), [], []
    for i in range(count or RETENTION_SAMPLES):
        image, scene = draw(rng)
        question, truth = make_tiny.lesson(scene, sort, rng)
        samples.append(data.Sample(f"{sort}-{i}", question, image, [], (48, 48), (48, 48)))
        truths.append(truth)
    examples = [processor.encode(sample) for sample in samples]
    completions = model.generate(network, examples, 1, 64, temperature=0)
    texts = [processor.decode(completion.ids, completion.finished) for [completion] in completions]
    if sort != "outline":
        return float(np.mean([text == truth for text, truth in zip(texts, truths)]))
    boxes = lambda text: [found.get("bbox_2d", [0] * 4) for found in rewards.read_answer(text, "digits") or []]
    overlaps = [rewards.iou(boxes(text), boxes(truth)) for text, truth in zip(texts, truths)]
    return float(np.mean([overlap.shape == (1, 1) and overlap[0, 0] > 0.5 for overlap in overlaps]))


def read_logs(job: Job) -> dict:
    """Seconds of training, and what the logs of the last stage say of the label and the rollouts."""
    read = lambda number, name: [json.loads(line) for line in
                                 (job.directory / f"stage-{number}" / f"{name}.jsonl").read_text().splitlines()]
    trained = [record for number in range(1, len(job.stages) + 1) for record in read(number, "metrics")]
    metrics, groups = read(len(job.stages), "metrics"), read(len(job.stages), "completions")
    # a step that was done again after an interruption counts once
    records = [json.loads(line) for line in (job.directory / "cpu.jsonl").read_text().splitlines()]
    cpu = {(record["stage"], record["step"]): record["cpu_seconds"] for record in records}
    logged = {"seconds": sum(record["rollout_seconds"] + record["update_seconds"] for record in trained),
              "cpu_seconds": sum(cpu.values())}
    for name in ("label_active", "label_advantage", "reward/thinking"):
        if name in metrics[0]:
            values = [record[name] for record in metrics]
            logged |= {name: float(np.mean(values)), f"{name} at the end": float(np.mean(values[-20:]))}
    return logged | {"label": groups[-1]["texts"][-1]} if "label_active" in metrics[0] else logged


def measure_curve(job: Job) -> list[dict]:
    """Held-out accuracy by sort, and thinking, every EVAL_STEPS, counted through all stages."""
    checkpoints, done, curve = {0: BASES[job.base]}, 0, []
    for number, (_, steps, *_) in enumerate(job.stages, 1):
        for step in (*range(EVAL_STEPS, steps, EVAL_STEPS), steps):  # an interrupted run has one more
            checkpoints[done + step] = job.directory / f"stage-{number}" / f"checkpoint-{step}"
        done += steps
    for step, checkpoint in checkpoints.items():
        *_, results = answer(checkpoint, "test", EVAL_SAMPLES)
        curve.append({"step": step, **by_sort(results), "thinking": np.mean([found["thinking"] for found in results])})
    return curve


# ---- What came of it -------------------------------------------------------------------------------------------------


def collect(bases: dict):
    """Write all results that there are, in the order of the parts, into one file."""
    paths = [job.directory / "result.json" for part in PARTS for job in jobs_of(part)]
    runs = [shorten(json.loads(path.read_text())) for path in paths if path.exists()]
    lines = ",\n".join(map(json.dumps, runs))
    (RUNS / "study.json").write_text(f'{{"bases": {json.dumps(shorten(bases))},\n"runs": [\n{lines}\n]}}\n')


def shorten(value):
    """Numbers to six digits."""
    if isinstance(value, dict):
        return {name: shorten(part) for name, part in value.items()}
    return [shorten(part) for part in value] if isinstance(value, list) else (
        float(f"{value:.6g}") if isinstance(value, float) else value)


def spread(values, scale: float = 100, digits: int = 1) -> str:
    """Mean ± sample standard deviation over runs; in percent, if not told otherwise."""
    values = scale * np.array(values)
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else mean


def sign_flip_test(differences) -> float:
    """Two-sided p of paired differences having mean 0: the share of all 2^n choices of their signs whose mean is as far
    from 0 as theirs or farther (Fisher's randomisation test).

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.25
    """
    differences = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    means = abs(signs @ differences)
    return float(np.mean(means >= abs(differences.sum()) - 1e-12))


def ruling(differences) -> str:
    """What paired differences, ViSurf minus a rival, say of the paper's claim."""
    if sign_flip_test(differences) >= 0.05:
        return "open"
    return "holds" if np.mean(differences) > 0 else "fails"


COLUMNS = {**{sort: sort for sort in QUESTIONS}, "overall": "mean of the four", "thinking": "thinking",
           "well_formed": "well-formed", "retention": "retention"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def method_table(results: list[dict], bases: dict) -> str:
    """A row for each arm, mean ± sd over its runs, in percent, and one for each base; seconds of training."""
    rows = [[f"base {name}", *(spread([numbers[column]]) for column in COLUMNS), "–", "–"]
            for name, numbers in bases.items()]
    for arm, runs in grouped(results).items():
        rows.append([arm, *(spread([run[name] for run in runs]) for name in COLUMNS),
                     *(spread([run[name] for run in runs], 1, 0) for name in ("seconds", "cpu_seconds"))])
    return markdown(["", *COLUMNS.values(), "seconds", "CPU seconds"], rows)


def grouped(results: list[dict]) -> dict[str, list[dict]]:
    """Results by arm, each in the order of bases and seeds."""
    arms = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return {arm: sorted(runs, key=lambda run: (run["base"], run["seed"])) for arm, runs in arms.items()}


def comparisons(results: list[dict], against: list[dict]) -> str:
    """ViSurf minus every other arm, run by run (same base, same seed), in points, with the p of the sign-flip test."""
    pair = lambda run: (run["base"], run["seed"])
    ours, rows = {pair(run): run for run in against}, []
    for arm, runs in grouped(results).items():
        cells = []
        for name in ("overall", *QUESTIONS, "thinking", "retention"):
            differences = [ours[pair(run)][name] - run[name] for run in runs if pair(run) in ours]
            cells.append(f"{100 * np.mean(differences):+.1f} (p = {sign_flip_test(differences):.3f})")
            if name in ("overall", "retention"):
                cells[-1] += f" **{ruling(differences)}**"
        rows.append([f"visurf − {arm}", *cells])
    return markdown(["", "mean of the four", *QUESTIONS, "thinking", "retention"], rows)


def log_table(results: list[dict]) -> str:
    """What the logs say of the label and the rollouts: means over all steps, and over the last 20."""
    rows = []
    for arm, runs in grouped(results).items():
        column = lambda name, *form: spread([run[name] for run in runs], *form)
        rows.append([arm, column("label_active"), column("label_active at the end"), column("label_advantage", 1, 2),
                     column("reward/thinking"), column("reward/thinking at the end"), f"`{runs[0]['label']}`"])
    return markdown(["", "label active", "at the end", "label advantage", "rollouts that think", "at the end",
                     "the last label"], rows)


def draw_curves(results: list[dict], path: Path):
    """Learning curves, mean and standard deviation over runs, a panel for each sort of question."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("overall", *QUESTIONS, "thinking")
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True, sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, names):
        for arm, runs in grouped(results).items():
            steps = [point["step"] for point in runs[0]["curve"]]
            values = 100 * np.array([[point[name] for point in run["curve"]] for run in runs])  # (runs, steps)
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(runs) - 1))
            [line] = panel.plot(steps, mean, label=arm, linewidth=2)
            panel.fill_between(steps, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15)
        panel.set_title({"overall": "mean of the four", "thinking": "answers with reasoning"}.get(name, name))
        panel.set_ylim(-3, 103)
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    figure.supxlabel("optimizer steps")
    figure.supylabel("held-out questions, %")
    figure.savefig(path, dpi=100)
    print(f"\n{path}")


def choose_rates(results: list[dict]) -> str:
    """The search: the mean of the four sorts on the validation split at each learning rate."""
    rows = []
    for arm in CHOSEN:
        found = [[run["overall"] for run in results if run["arm"] == f"{arm}-{rate:g}"] for rate in RATES]
        rows.append([arm, *(spread(values) if values else "–" for values in found)])
    return markdown(["validation split", *(f"{rate:g}" for rate in RATES)], rows)


def report(results: list[dict], bases: dict) -> dict[str, str]:
    """All tables, as Markdown, by title."""
    part = {name: [result for result in results if result["part"] == name] for name in PARTS}
    visurf = [run for run in part["steps"] if run["arm"] == "visurf"]
    rivals, tables = [run for run in part["steps"] if run not in visurf], {}
    if part["search"]:
        tables["Search"] = choose_rates(part["search"])
    if visurf and rivals:
        tables["Equal steps"] = method_table(part["steps"], bases)
        tables["Equal steps, paired"] = comparisons(rivals, visurf)
    if part["compute"]:
        same = [run for run in visurf if run["seed"] in COMPUTE_SEEDS]
        tables["Equal compute"] = method_table(part["compute"] + same, {})
        tables["Equal compute, paired"] = comparisons(part["compute"], same)
    if part["controls"]:
        runs = [run for run in visurf if run["base"] == "A"] + part["controls"]
        tables["Controls"], tables["Controls, logs"] = method_table(runs, {}), log_table(runs)
    return tables


PARTS = ("search", "steps", "controls", "compute")


def prepare_bases() -> dict:
    """Make base checkpoints that are not there, and measure all of them once."""
    for name, seed in BASE_SEED.items():
        if not (BASES[name] / "model.safetensors").exists():
            command = [sys.executable, str(ROOT / "extras/make_tiny.py"), "--seed", str(seed)]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the published one: more would add in another order
            subprocess.run([*command, "--output", str(BASES[name])], check=True, env=one_thread)
    path = RUNS / "bases.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: measure(base, "test") for name, base in BASES.items()}))
    return json.loads(path.read_text())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: all)")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    config = parser.parse_args(argv)
    if not config.report:
        torch.set_num_threads(1)  # here already: a process with several threads must not be forked
        bases, start = prepare_bases(), time.time()
        for part in config.parts:
            run_jobs(jobs_of(part))
            print(f"{part}: {time.time() - start:.0f} s since the start")
        collect(bases)
    source = RUNS / "study.json" if (RUNS / "study.json").exists() else PUBLISHED
    results = json.loads(source.read_text())
    print(f"from {source}")
    for title, table in report(results["runs"], results["bases"]).items():
        print(f"\n{title}\n\n{table}")
    RUNS.mkdir(parents=True, exist_ok=True)
    draw_curves([run for run in results["runs"] if run["part"] == "steps"], RUNS / "study.png")


if __name__ == "__main__":
    main()
