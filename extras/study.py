"""The study: when does it pay to inject the label, and against what?

    python extras/study.py              # everything, from nothing: about four hours on two idle cores
    python extras/study.py --report     # tables and figure from the committed records
    python extras/study.py --again      # seed 0 of each method once more, compared with its record
    python extras/study.py --smoke      # all of it with tiny numbers, to see that it works

A finished run is a line in runs/study/records.jsonl. What is recorded is never run again, and a run that was
killed starts anew: to continue, give the same command again. A fresh clone continues from the committed
records, assets/study.jsonl; base networks that are missing are made again from their seeds. Two runs at a time, of
one thread each. The figure needs matplotlib.

Fixed before the main runs, in the commit that this docstring came with:

  Bases       A (bundled) and B (the same recipe, seed 1) never sample []. A+ and B+ are A and B after 200 more steps
              of their lessons, in which a fifth of the "find" answers that say "it is nowhere" end with [].
  Methods     sft, rlvr, visurf: 240 steps each. sft-rlvr: 240 of sft, then 240 of rlvr. Labels are aligned alike.
              sft-long: sft for as many CPU seconds as visurf took in the search.
  Search      On the validation split, bases A and B+, two seeds that are not used again: as many runs for each method.
              The rate with the best mean of four is taken. While any method's best is at an end of its grid, every
              grid gets one more rate, on the side of its best. Of sft-rlvr, the rate of the second stage is searched.
  Main        4 bases x 5 seeds. Test: 1,600 questions that are drawn for the study alone.
  Primary     mean of four: the accuracy (IoU > 0.5, or a right []), averaged over the four sorts of question.
  Secondary   mean of the three sorts that are present; retention; thinking, by sort; false []: the share of [] where
              something is there; truncated answers.
  Tests       ViSurf minus a rival, paired by base and seed; two-sided sign-flip test over all pairs. Primary: each of
              four rivals, over all bases, over those that never sample [], and over those that do; Holm over these 12.
              Secondary: Holm over all of their tests together.
  A win       is p < 0.05 after Holm, "ahead" or "behind"; anything else is "open". As a base is the unit that a
              reader would generalise over, each ruling also says in how many bases ViSurf's mean is ahead.
  Controls    each switched off alone, on A and A+, 3 seeds; and sft on labels as the data set wrote them. Six pairs
              cannot reach p < 0.05 after Holm, so these are differences without a ruling.
  Beyond      Three changes of ViSurf that are not in the paper, on A and B+, 5 seeds; Holm over their 9 tests.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import data
import eval as evaluation
import make_tiny
import model
import rewards
import train
import visurf
from make_digits import QUESTIONS, draw, make_row

# ---- Settings ---------------------------------------------------------------------------------------------------

RUNS, COMMITTED, FIGURE = Path("runs/study"), ROOT / "assets/study.jsonl", ROOT / "assets/study.png"
BASES = ("A", "A+", "B", "B+")
KINDS = {"never samples `[]`": ("A", "B"), "samples `[]` now and then": ("A+", "B+")}
SEARCH_BASES, CONTROL_BASES, BEYOND_BASES = ("A", "B+"), ("A", "A+"), ("A", "B+")
SEEDS, SEARCH_SEEDS, CONTROL_SEEDS = range(5), (100, 101), range(3)
STEPS, MOST_RATES, TEST_SIZE, VALIDATION_SIZE, LESSON_SIZE = 240, 6, 1600, 400, 200
# sft first: the two stages need its rate.
RATES = {
    "sft": (5e-5, 1e-4, 2e-4, 4e-4),
    "visurf": (5e-5, 1e-4, 2e-4, 4e-4),
    "rlvr": (2.5e-5, 5e-5, 1e-4, 2e-4),
    "sft-rlvr": (2.5e-5, 5e-5, 1e-4, 2e-4),
}
RIVALS = ("sft", "sft-long", "rlvr", "sft-rlvr")
CONTROLS = {
    "label unaligned": "--no-align_label",
    "thinking credited": "--no-drop_thinking_reward",
    "label unsmoothed": "--no-smooth_label_reward",
}
# How a base is taught: full size, then its continuation.
LESSON_STEPS = {"seeing_steps": 2000, "matching_steps": 500, "answering_steps": 1200}
MORE_STEPS, MORE_RATE, EMPTY_SHARE = 200, 2e-4, 0.2
SMOKE = {"RUNS": Path("runs/study-smoke"), "SEEDS": range(1), "SEARCH_SEEDS": (100,), "CONTROL_SEEDS": range(1),
         "STEPS": 2, "MOST_RATES": 4, "TEST_SIZE": 8, "VALIDATION_SIZE": 8, "LESSON_SIZE": 2, "MORE_STEPS": 2,
         "LESSON_STEPS": dict.fromkeys(LESSON_STEPS, 2), "COMMITTED": Path("runs/none"),
         "FIGURE": Path("runs/study-smoke/study.png")}


@dataclass(frozen=True)
class Job:
    """A run: from a base, one or two stages of train.py, each (method, steps, learning rate, option or "").

    The option is one of CONTROLS, switched off, or one of VARIANTS. A job without stages measures the base itself.
    """

    part: str
    arm: str
    base: str
    seed: int
    stages: tuple = ()

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


# ---- Which runs there are ---------------------------------------------------------------------------------------

def stages_of(arm: str, rates: dict, option: str = "") -> tuple:
    """What an arm trains, by the rate of each method."""
    if arm == "sft-rlvr":
        return ("sft", STEPS, rates["sft"], ""), ("rlvr", STEPS, rates["sft-rlvr"], "")
    return ((arm, STEPS, rates[arm], option),)


def search(records: dict) -> tuple[dict, dict, list[Job]]:
    """The grid of each method, its best rate as far as it is known, and the runs that the search needs next."""
    grids = dict(RATES)
    while True:
        best, missing = {}, []
        for method, grid in grids.items():
            if method == "sft-rlvr" and "sft" not in best:
                continue                                  # its first stage is not known yet
            jobs = {rate: search_jobs(method, {**best, method: rate}) for rate in grid}
            todo = [job for rate in grid for job in jobs[rate] if job.key not in records]
            missing += todo
            if not todo:
                best[method] = max(grid, key=lambda rate: mean_of([records[job.key] for job in jobs[rate]]))
        at_an_end = [method for method in best if best[method] in (grids[method][0], grids[method][-1])]
        if missing or not at_an_end or len(grids["sft"]) == MOST_RATES:
            return grids, best, sorted(missing, key=lambda job: SEARCH_BASES.index(job.base))
        # As many runs for each method: all grids grow.
        for method, grid in grids.items():
            lower = grid.index(best[method]) < len(grid) / 2
            grids[method] = (grid[0] / 2, *grid) if lower else (*grid, grid[-1] * 2)


def search_jobs(method: str, rates: dict) -> list[Job]:
    stages = stages_of(method, rates)
    return [Job("search", method, base, seed, stages) for base in SEARCH_BASES for seed in SEARCH_SEEDS]


def jobs_after_search(records: dict) -> dict[str, list[Job]]:
    """All runs that follow the search, by part; none before the search is complete."""
    _, rates, missing = search(records)
    if missing or len(rates) < len(RATES):
        return {}
    jobs = {"main": [], "compute": [], "controls": [], "beyond": []}
    long = (("sft", equal_compute_steps(records, rates), rates["sft"], ""),)
    # Seeds outermost: whenever this ends, what is there is balanced.
    for seed in SEEDS:
        for arm in RATES:
            jobs["main"] += [Job("main", arm, base, seed, stages_of(arm, rates)) for base in BASES]
        jobs["compute"] += [Job("compute", "sft-long", base, seed, long) for base in BASES]
        for name in VARIANTS:
            jobs["beyond"] += [Job("beyond", f"visurf, {name}", base, seed, stages_of("visurf", rates, name))
                               for base in BEYOND_BASES]
    arms = [("visurf", name) for name in CONTROLS] + [("sft", "label unaligned")]
    for seed in CONTROL_SEEDS:
        for method, name in arms:
            jobs["controls"] += [Job("controls", f"{method}, {name}", base, seed, stages_of(method, rates, name))
                                 for base in CONTROL_BASES]
    return jobs


def equal_compute_steps(records: dict, rates: dict) -> int:
    """Steps of sft that take as many CPU seconds as visurf's, by the runs of the search at the chosen rates."""
    seconds = {method: np.mean([records[job.key]["cpu_seconds"] for job in search_jobs(method, rates)])
               for method in ("sft", "visurf")}
    return round(STEPS * seconds["visurf"] / seconds["sft"] / 10) * 10


# ---- Running ----------------------------------------------------------------------------------------------------

def run_jobs(jobs: list[Job], records: dict):
    """Run what has no record, two at a time, each in a process forked from this one; append its record."""
    waiting = [job for job in jobs if job.key not in records]
    with multiprocessing.get_context("fork").Pool(2, os.nice, (19 - os.nice(0),), maxtasksperchild=1) as pool:
        for record in tqdm(pool.imap_unordered(run_job, waiting, chunksize=1), "runs", len(waiting)):
            records[json.dumps(record["job"])] = record
            with open(RUNS / "records.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        # Not only terminated: a worker of train.py's takes SIGTERM for a wish to save, and stays.
        pool.close()
        pool.join()


def run_job(job: Job) -> dict:
    """Train all stages of a run and measure where it ends."""
    name = hashlib.sha256(job.key.encode()).hexdigest()[:8]
    with open(RUNS / f"log-{name}.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        print(job.key)
        checkpoint = prepare_base(job.base)
        notes = {"cpu_seconds": 0.0, "trace": {}}
        if not job.stages:
            notes["empty_sampled"] = sampled_empty(checkpoint)
            notes["sha256"] = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        for number, (_, steps, _, option) in enumerate(job.stages, 1):
            directory = train_stage(job, number, checkpoint)
            checkpoint = directory / f"checkpoint-{steps}"
            found = model.read_json(directory / "notes.json")
            # Seconds of all stages; the trace of the last.
            notes = {"cpu_seconds": notes["cpu_seconds"] + found["cpu_seconds"], "trace": found["trace"]}
        numbers = measure(checkpoint, search=job.part == "search")
        if job.stages and job.stages[-1][0] != "sft":    # an sft checkpoint may begin a run of two stages
            shutil.rmtree(directory)
    return {"job": asdict(job), "cpu": torch.backends.cpu.get_cpu_capability(), **notes, "numbers": numbers}


@contextlib.contextmanager
def alone(name: str):
    """One process at a time does this: two runs may need the same base or first stage."""
    with open(RUNS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train_stage(job: Job, number: int, start: Path) -> Path:
    """Train one stage of a run, unless it is there, and return its directory."""
    words = [job.base, job.seed] + [word for stage in job.stages[:number] for word in stage if word != ""]
    directory = RUNS / "-".join(map(str, words)).replace(" ", "_")
    with alone(directory.name):
        if (directory / "notes.json").exists():
            return directory
        shutil.rmtree(directory, ignore_errors=True)     # of a run that was killed
        method, steps, rate, option = job.stages[number - 1]
        settings = {"method": method, "max_steps": steps, "learning_rate": rate, "model": start, "seed": job.seed,
                    "save_steps": steps, "output_dir": directory}
        flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        if option in CONTROLS:
            flags.append(CONTROLS[option])
        notes = []
        try:
            with VARIANTS.get(option, contextlib.nullcontext)(), take_notes(notes):
                train.main(flags)
        except SystemExit as error:                      # a pool would wait for this process for ever
            raise RuntimeError(f"{directory}: train.py ended with exit code {error.code}") from None
        shutil.rmtree(directory / f"checkpoint-{steps}" / train.STATE)       # nobody resumes from here
        trace = {} if method == "sft" else trace_of(notes)
        seconds = sum(note["cpu_seconds"] for note in notes)
        evaluation.write_text(directory / "notes.json", json.dumps({"cpu_seconds": seconds, "trace": trace}))
    return directory


@contextlib.contextmanager
def take_notes(notes: list[dict]):
    """Add a note for each training step: CPU seconds, and what the rollouts of its groups are like."""
    groups = []
    train_step, compute_advantages = train.train_step, train.compute_advantages

    def noted_advantages(settings, group):
        advantages = compute_advantages(settings, group)
        groups.append((group, advantages))
        return advantages

    def noted_step(run):
        start = time.process_time()
        values, records = train_step(run)
        note = {"cpu_seconds": time.process_time() - start, "clipped": [values["grad_norm"] > 1]}
        for group, advantages in groups:
            kind = "present" if group.example.label else "absent"
            for text in group.texts[:run.settings.num_generations]:
                note.setdefault(f"thinking {kind}", []).append(rewards.has_thinking(text))
                note.setdefault(f"[] {kind}", []).append(rewards.read_answer(text) == [])
            if run.settings.method == "visurf":
                note.setdefault(f"active {kind}", []).append(advantages[-1].item() != 0)
                note.setdefault(f"advantage {kind}", []).append(advantages[-1].item())
        groups.clear()
        notes.append(note)
        return values, records

    with mock.patch.multiple(train, train_step=noted_step, compute_advantages=noted_advantages):
        yield


def trace_of(notes: list[dict]) -> dict[str, list]:
    """What the notes say, as means over ten steps each: rollouts that think and that answer [], and labels with an
    advantage, separately for questions whose label is [] ("absent") and others; updates whose gradient was clipped."""
    trace = {}
    for name in sorted({name for note in notes for name in note} - {"cpu_seconds"}):
        trace[name] = []
        for first in range(0, len(notes), 10):
            values = [value for note in notes[first:first + 10] for value in note.get(name, [])]
            trace[name].append(round(float(np.mean(values)), 3) if values else None)
    return trace


# ---- Beyond the paper: ViSurf with one thing changed ------------------------------------------------------------

def own_reasoning():
    """The label is written behind the reasoning of the group's best rollout that has any."""
    append_label = train.append_label

    def append_with_reasoning(run, group):
        def reward(text):
            return sum(run.processor.score(text, group.example).values())

        append_label(run, group)
        thoughtful = [text for text in group.texts[:-1] if rewards.has_thinking(text)]
        if thoughtful:
            thought, end, _ = max(thoughtful, key=reward).partition("</think>")
            group.texts[-1] = thought + end + group.texts[-1]
            group.ids[-1] = run.processor.token_ids(group.texts[-1] + data.END)

    return mock.patch.object(train, "append_label", append_with_reasoning)


def luffy():
    """A label's token counts with p / (p + 0.1) instead of a ratio (LUFFY, arXiv 2504.14945): its gradient is large
    where the policy finds the token unlikely."""
    policy_loss = visurf.policy_loss

    def shaped_loss(logprobs, old_logprobs, advantages, mask, total):
        ours = policy_loss(logprobs[:, :-1], old_logprobs[:, :-1], advantages[:, :-1], mask[:, :-1], total=total)
        p = logprobs[:, -1].exp()                                                # (b, T)
        objective = p / (p + 0.1) * advantages[:, -1:]
        return ours - visurf.masked_mean(objective, mask[:, -1], total)

    return mock.patch.object(visurf, "policy_loss", shaped_loss)


def only_failures():
    """The label joins only where no rollout earns any accuracy, as in S-GRPO; elsewhere its advantage is 0."""
    compute_advantages = train.compute_advantages

    def advantages(settings, group):
        rollouts = group.rewards[:settings.num_generations]
        if not any(parts["accuracy"] > 0 for parts in rollouts):
            return compute_advantages(settings, group)
        totals = torch.tensor([sum(parts.values()) for parts in rollouts], dtype=torch.float64)
        return torch.cat([visurf.group_advantages(totals), torch.zeros(1, dtype=torch.float64)])

    return mock.patch.object(train, "compute_advantages", advantages)


VARIANTS = {"own reasoning": own_reasoning, "p/(p+0.1)": luffy, "only where all fail": only_failures}


# ---- Bases and measuring ----------------------------------------------------------------------------------------

def prepare_base(name: str) -> Path:
    """The directory of a base network, which is made if it is not there."""
    if name == "A":
        return Path(data.TASKS["digits"].model)
    directory = RUNS / f"base-{name}"
    if name.endswith("+"):
        start = prepare_base(name[0])
    with alone(directory.name):
        if (directory / "model.safetensors").exists():
            return directory
        with tempfile.TemporaryDirectory(dir=RUNS) as unfinished:
            unfinished = Path(unfinished)
            if name.endswith("+"):
                teach_empty_answers(start, unfinished, seed=100 + BASES.index(name))
            else:
                settings = {**LESSON_STEPS, "learning_rate": 2e-3, "seed": 1, "output": unfinished / "made"}
                make_tiny.make(SimpleNamespace(**settings), unfinished)
                unfinished = unfinished / "made"
            shutil.copytree(unfinished, directory)
    return directory


def teach_empty_answers(start: Path, output: Path, seed: int):
    """Go on teaching a base its lessons, some of which answer [] where nothing is to be found."""
    plain_lesson = make_tiny.lesson

    def lesson(scene, sort, rng):
        question, answer = plain_lesson(scene, sort, rng)
        thought, nowhere, _ = answer.partition("it is nowhere</think>")
        if nowhere and rng.random() < EMPTY_SHARE:
            answer = thought + nowhere + "<answer>[]</answer>"
        return question, answer

    network = model.load_pretrained(start).train()
    with mock.patch.object(make_tiny, "lesson", lesson):
        lessons = make_tiny.batches(data.Processor(start, data.TASKS["digits"]), 8, make_tiny.LESSONS, 8, seed)
        make_tiny.teach_language(network, lessons, MORE_STEPS, MORE_RATE)
    model.save_pretrained(network, output, model.read_files(start))


def sampled_empty(checkpoint: Path) -> float:
    """How often a base samples [] where nothing is there: the share of 8 rollouts for each such validation question."""
    processor = data.Processor(checkpoint, data.TASKS["digits"])
    samples = data.load_samples(None, processor.task, "validation", VALIDATION_SIZE)
    examples = [processor.encode(sample) for sample in samples if not sample.label]
    groups = model.generate(model.load_pretrained(checkpoint), examples, 8, 64, seeds=list(range(len(examples))))
    texts = [processor.decode(completion.ids, completion.finished) for group in groups for completion in group]
    return float(np.mean([rewards.read_answer(text) == [] for text in texts]))


def test_samples() -> list[data.Sample]:
    """Questions that no split has: the test split goes on behind its 400 published ones."""
    path = RUNS / "test.jsonl"
    with alone(path.name):
        if not path.exists():
            rows = [json.dumps(make_row("test", 400 + index)) for index in range(TEST_SIZE)]
            evaluation.write_text(path, "\n".join(rows) + "\n")
    return data.load_samples(path, data.TASKS["digits"], "test")


def measure(checkpoint: Path, search: bool = False) -> dict[str, float]:
    """The outcomes of a checkpoint: on the validation split for the search, or else on the test and in retention."""
    task = data.TASKS["digits"]
    network, processor = model.load_pretrained(checkpoint), data.Processor(checkpoint, task)
    samples = data.load_samples(None, task, "validation", VALIDATION_SIZE) if search else test_samples()
    results, _ = evaluation.evaluate(network, processor, samples, max_new_tokens=64, batch_size=100)
    numbers = outcomes(results)
    if not search:
        kept = {sort: retention(network, processor, sort) for sort in ("where", "name", "outline")}
        numbers |= kept | {"retention": np.mean(list(kept.values()))}
    return {name: round(float(value), 5) for name, value in numbers.items()}


def outcomes(results: list[dict]) -> dict[str, float]:
    """Accuracy and thinking by sort of question, and what else is counted."""
    numbers = {}
    for sort in QUESTIONS:
        answers = [result for result in results if result["id"].endswith(f" {sort}")]
        numbers[sort] = np.mean([evaluation.measure(result)["one_to_one"] for result in answers])
        numbers[f"thinking, {sort}"] = np.mean([result["thinking"] for result in answers])
    numbers["mean of four"] = np.mean([numbers[sort] for sort in QUESTIONS])
    numbers["mean of three"] = np.mean([numbers[sort] for sort in QUESTIONS if sort != "absent"])
    numbers["false []"] = np.mean([result["prediction"] == [] for result in results if result["label"]])
    for name in ("thinking", "truncated"):
        numbers[name] = np.mean([result[name] for result in results])
    return numbers


def retention(network, processor, sort: str) -> float:
    """Share of a lesson's questions that are still answered as the base was taught: the very words, or for outlines
    a box with IoU > 0.5. No training set holds these lessons. The pictures are new; the handwriting is what the base
    has learnt to read, as what it could never do it cannot forget."""
    rng = np.random.default_rng([99, 2])                 # no data set's
    examples, truths = [], []
    for _ in range(LESSON_SIZE):
        image, scene = draw(rng)
        question, truth = make_tiny.lesson(scene, sort, rng)
        examples.append(processor.encode(data.Sample("", question, image, [], (48, 48), (48, 48))))
        truths.append(truth)
    kept = []
    for truth, [completion] in zip(truths, model.generate(network, examples, 1, 64, temperature=0)):
        text = processor.decode(completion.ids, completion.finished)
        kept.append(text == truth)
        if sort == "outline":
            overlaps = rewards.iou(boxes_in(text), boxes_in(truth))
            kept[-1] = overlaps.shape == (1, 1) and overlaps[0, 0] > 0.5
    return np.mean(kept)


def boxes_in(text: str) -> list:
    return [found.get("bbox_2d", [0] * 4) for found in rewards.read_answer(text) or []]


# ---- What came of it --------------------------------------------------------------------------------------------

def mean_of(records: list[dict], outcome: str = "mean of four") -> float:
    return float(np.mean([record["numbers"][outcome] for record in records]))


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
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


@dataclass
class Comparison:
    """ViSurf, or a variant of it, minus a rival: paired differences of one outcome, in points, by base."""

    label: str
    outcome: str
    by_base: dict[str, list[float]]
    p: float = 1.0                                       # after Holm

    @property
    def differences(self) -> list[float]:
        return [difference for found in self.by_base.values() for difference in found]

    @property
    def ruling(self) -> str:
        if self.p >= 0.05:
            return "open"
        return "**ahead**" if np.mean(self.differences) > 0 else "**behind**"

    def cells(self) -> list[str]:
        means = [np.mean(found) for found in self.by_base.values() if found]
        return [f"{np.mean(self.differences):+.1f}", p_text(self.p), self.ruling,
                f"{sum(mean > 0 for mean in means)} of {len(means)}", str(len(self.differences))]


def compare(label: str, ours: str, rival: str, outcome: str, bases, runs: dict) -> Comparison | None:
    """Pair two arms by base and seed; None if there is no pair yet. runs: records by (arm, base, seed)."""
    by_base = {base: [100 * (runs[ours, base, seed]["numbers"][outcome] - runs[rival, base, seed]["numbers"][outcome])
                      for seed in SEEDS if (ours, base, seed) in runs and (rival, base, seed) in runs]
               for base in bases}
    return Comparison(label, outcome, by_base) if any(by_base.values()) else None


def judged(comparisons: list) -> list[Comparison]:
    """Those of a family that have pairs, with p after Holm over them."""
    family = [comparison for comparison in comparisons if comparison]
    adjusted = holm([sign_flip_test(comparison.differences) for comparison in family])
    for comparison, p in zip(family, adjusted):
        comparison.p = p
    return family


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(records: list[dict], outcome: str) -> str:
    """Mean ± sample standard deviation over runs, in percent."""
    values = [100 * record["numbers"][outcome] for record in records]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def percent(records: list[dict], outcomes) -> list[str]:
    return [f"{100 * mean_of(records, outcome):.1f}" for outcome in outcomes]


OUTCOMES = ("mean of three", *QUESTIONS, "thinking", "retention", "false []", "truncated")
SECONDARY = ("mean of three", "retention", "thinking", "false []", "truncated")


def report(records: dict) -> dict[str, str]:
    """All tables, as Markdown, by name."""
    planned = jobs_after_search(records)
    runs = {}
    for job in sum(planned.values(), []):
        if job.key in records:
            runs[job.arm, job.base, job.seed] = records[job.key]
    tables = {"progress": progress_table(planned, records), "search": search_table(records),
              "bases": bases_table(records)}
    if runs:
        tables |= {"methods": methods_table(runs), "by base": base_table(runs), "rulings": rulings_table(runs),
                   "secondary": secondary_table(runs), "thinking": thinking_table(runs),
                   "early": early_table(runs), "controls": controls_table(runs), "beyond": beyond_table(runs)}
    return tables


def select(runs: dict, arm: str, bases=BASES) -> list[dict]:
    return [runs[key] for key in runs if key[0] == arm and key[1] in bases]


def progress_table(planned: dict, records: dict) -> str:
    """Runs that are finished, of those that the rules ask for. What follows the search is not known before it ends."""
    found = [record for record in records.values() if record["job"]["part"] == "search"]
    rows = [["search", str(len(found)), str(len(found) + len(search(records)[2]))]]
    for part, jobs in planned.items():
        rows.append([part, str(sum(job.key in records for job in jobs)), str(len(jobs))])
    return table(["part", "runs finished", "of"], rows)


def search_table(records: dict) -> str:
    """Mean of four on the validation split by learning rate, over bases and seeds; the best one is bold."""
    grids, best, _ = search(records)
    columns = sorted(set(sum(grids.values(), ())))
    rows = []
    for method, grid in grids.items():
        cells = []
        for rate in columns:
            jobs = search_jobs(method, {**best, method: rate}) if rate in grid and "sft" in {**best, method: 0} else []
            found = [records[job.key] for job in jobs if job.key in records]
            cell = percent(found, ["mean of four"])[0] if found else "–"
            cells.append(f"**{cell}**" if rate == best.get(method) else cell)
        rows.append([method, *cells])
    return table(["validation split", *(f"{rate:g}" for rate in columns)], rows)


def bases_table(records: dict) -> str:
    rows = []
    for base in BASES:
        key = Job("bases", "base", base, 0).key
        if key in records:
            record = records[key]
            rows.append([base, *percent([record], ("mean of four", *OUTCOMES[1:7])),
                         f"{100 * record['empty_sampled']:.1f}"])
    return table(["base", "mean of four", *OUTCOMES[1:7], "`[]` among samples for *absent*"], rows)


def methods_table(runs: dict) -> str:
    """Each method on the bases of each kind: mean ± standard deviation over runs; means of all other outcomes."""
    rows = []
    for kind, bases in KINDS.items():
        for arm in ("visurf", *RIVALS):
            if found := select(runs, arm, bases):
                seconds = np.mean([record["cpu_seconds"] for record in found])
                rows.append([f"{arm}, base {kind}", spread(found, "mean of four"), *percent(found, OUTCOMES),
                             f"{seconds:.0f}", str(len(found))])
    return table(["", "mean of four", *OUTCOMES, "CPU s", "runs"], rows)


def base_table(runs: dict) -> str:
    rows = [[arm, *(spread(found, "mean of four") if (found := select(runs, arm, [base])) else "–" for base in BASES)]
            for arm in ("visurf", *RIVALS)]
    return table(["mean of four", *(f"base {base}" for base in BASES)], rows)


def rulings(runs: dict) -> list[Comparison]:
    """The 12 primary tests."""
    groups = {"all bases": BASES} | {f"base {kind}": bases for kind, bases in KINDS.items()}
    return judged([compare(f"{rival}, {name}", "visurf", rival, "mean of four", bases, runs)
                   for rival in RIVALS for name, bases in groups.items()])


def rulings_table(runs: dict) -> str:
    rows = []
    for comparison in rulings(runs):
        means = [f"{np.mean(found):+.1f}" if found else "–" for found in
                 (comparison.by_base.get(base, []) for base in BASES)]
        rows.append([comparison.label, *comparison.cells()[:4], *means, comparison.cells()[4]])
    return table(["visurf minus", "mean of four", "p (Holm)", "ruling", "ahead in", *BASES, "pairs"], rows)


def secondary_table(runs: dict) -> str:
    family = judged([compare(rival, "visurf", rival, outcome, BASES, runs)
                     for rival in RIVALS for outcome in SECONDARY])
    rows = []
    for rival in RIVALS:
        found = [comparison for comparison in family if comparison.label == rival]
        if found:
            rows.append([rival, *(f"{np.mean(c.differences):+.1f} (p {p_text(c.p)}; > 0 in {c.cells()[3]})"
                                  for c in found)])
    return table(["visurf minus", *SECONDARY], rows)


def thinking_table(runs: dict) -> str:
    columns = [f"thinking, {sort}" for sort in QUESTIONS]
    rows = [[f"{arm}, base {kind}", *percent(found, columns)] for kind, bases in KINDS.items()
            for arm in ("visurf", *RIVALS) if (found := select(runs, arm, bases))]
    return table(["answers that reason first, %", *QUESTIONS], rows)


def early_table(runs: dict) -> str:
    """How the rollouts of ViSurf change: means over runs, in percent, by stretches of steps."""
    stretches = {"1–10": slice(0, 1), "11–20": slice(1, 2), "21–60": slice(2, 6), "last 40": slice(-4, None)}
    rows = []
    for kind, bases in KINDS.items():
        for name in ("active", "thinking", "[]"):
            for sort in ("absent", "present"):
                traces = [record["trace"][f"{name} {sort}"] for record in select(runs, "visurf", bases)]
                cells = []
                for stretch in stretches.values():
                    values = [value for trace in traces for value in trace[stretch] if value is not None]
                    cells.append(f"{100 * np.mean(values):.0f}" if values else "–")
                meaning = {"active": "labels with an advantage", "thinking": "rollouts that reason first",
                           "[]": "rollouts that answer `[]`"}[name]
                rows.append([f"{meaning}, {sort}; base {kind}", *cells])
    return table(["visurf, steps", *stretches], rows)


def controls_table(runs: dict) -> str:
    """Each control off, next to the same bases and seeds with all of them on; differences are paired."""
    arms = list(dict.fromkeys(arm for arm, _, _ in runs if "," in arm and arm.split(", ")[1] in CONTROLS))
    rows = []
    for arm in arms:
        method = arm.split(",")[0]
        found = [compare(arm, arm, method, outcome, CONTROL_BASES, runs) for outcome in ("mean of four", *OUTCOMES)]
        if found[0]:
            rows.append([arm, *(f"{np.mean(comparison.differences):+.1f}" for comparison in found),
                         str(len(found[0].differences))])
    return table(["minus the same with all controls", "mean of four", *OUTCOMES, "pairs"], rows)


def beyond_table(runs: dict) -> str:
    outcomes = ("mean of four", "thinking", "retention")
    family = judged([compare(name, f"visurf, {name}", "visurf", outcome, BEYOND_BASES, runs)
                     for name in VARIANTS for outcome in outcomes])
    rows = []
    for name in VARIANTS:
        found = [comparison for comparison in family if comparison.label == name]
        if found:
            ours = select(runs, f"visurf, {name}")
            rows.append([name, *(f"{spread(ours, c.outcome)} ({np.mean(c.differences):+.1f}, p {p_text(c.p)})"
                                 for c in found), *percent(ours, QUESTIONS), str(len(ours))])
    plain = select(runs, "visurf", BEYOND_BASES)
    if plain:
        rows.insert(0, ["visurf, as it is", *(spread(plain, outcome) for outcome in outcomes),
                        *percent(plain, QUESTIONS), str(len(plain))])
    return table(["", *outcomes, *QUESTIONS, "runs"], rows)


def draw_figure(records: dict):
    """Left: ViSurf minus each rival, a dot a pair. Middle and right: what happens to ViSurf's rollouts and labels."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {(job.arm, job.base, job.seed): records[job.key]
            for job in sum(jobs_after_search(records).values(), []) if job.key in records}
    if not runs:
        return
    figure, (left, *others) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    colours = dict(zip(BASES, ("tab:blue", "tab:cyan", "tab:red", "tab:orange")))
    for x, rival in enumerate(RIVALS):
        comparison = compare(rival, "visurf", rival, "mean of four", BASES, runs)
        for shift, base in zip((-0.24, -0.08, 0.08, 0.24), BASES):
            values = comparison.by_base[base] if comparison else []
            left.plot([x + shift] * len(values), values, "o", color=colours[base], alpha=0.7,
                      label=f"base {base}" if x == 0 else None)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(range(len(RIVALS)), RIVALS)
    left.set_title("ViSurf minus a rival, mean of four, points")
    left.legend(fontsize=8)
    for panel, name, title in zip(others, ("active", "thinking"),
                                  ("labels with an advantage, %", "rollouts that reason first, %")):
        for kind, bases in KINDS.items():
            for sort, style in (("absent", "-"), ("present", "--")):
                traces = [record["trace"][f"{name} {sort}"] for record in select(runs, "visurf", bases)]
                if traces:
                    values = 100 * np.nanmean(np.array(traces, float), axis=0)
                    panel.plot(10 * np.arange(1, len(values) + 1) - 5, values, style, color=colours[bases[0]],
                               label=f"{sort}; base {kind.replace('`', '')}")
        panel.set_ylim(-3, 103)
        panel.set_title(f"ViSurf: {title}")
        panel.set_xlabel("optimizer step")
    others[0].legend(fontsize=8)
    for panel in (left, *others):
        panel.grid(alpha=0.3)
    figure.savefig(FIGURE, dpi=100)
    print(FIGURE)


def write_tables(path: Path, tables: dict[str, str]):
    """Put each table between its marks in a document: <!-- name --> and <!-- end -->."""
    text = path.read_text()
    for name, content in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = before + mark + content + "\n" + rest[rest.index("<!-- end -->"):]
    evaluation.write_text(path, text)


# ---- The command line -------------------------------------------------------------------------------------------

def read_records(path: Path) -> dict[str, dict]:
    """Records by the key of their job; a line that was cut off by a kill is no record."""
    records = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            records[json.dumps(record["job"])] = record
    return records


def run_everything(records: dict):
    """Bases and search first, then all that follows from the rates found."""
    bases = [Job("bases", "base", base, 0) for base in ("B+", "A+", "A", "B")]        # B takes longest
    while (missing := search(records)[2]) or any(job.key not in records for job in bases):
        run_jobs(bases + missing, records)
    run_jobs(sum(jobs_after_search(records).values(), []), records)


def run_again(records: dict):
    """Seed 0 of each method, from nothing; says whether the numbers are the recorded ones, bit for bit."""
    for job in jobs_after_search(records)["main"][::len(BASES)][:len(RATES)]:
        same = run_job(job)["numbers"] == records[job.key]["numbers"]
        print(f"{job.arm}, base {job.base}, seed {job.seed}: {'the same' if same else 'DIFFERENT'}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figure from the records")
    parser.add_argument("--again", action="store_true", help="run seed 0 of each method again and compare")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: a minute or two")
    config = parser.parse_args(argv)
    if config.smoke:
        globals().update(SMOKE)
    if config.again:
        globals()["RUNS"] = Path("runs/study-again")
    records = read_records(COMMITTED) | read_records(RUNS / "records.jsonl")
    if not config.report:
        torch.set_num_threads(1)                         # a process with several threads must not be forked
        RUNS.mkdir(parents=True, exist_ok=True)
        run_again(records) if config.again else run_everything(records)
    if not config.again:
        tables = report(records)
        for name, content in tables.items():
            print(f"\n{name}\n\n{content}")
        draw_figure(records)
        if not config.smoke:
            for document in (ROOT / "docs/results.md", ROOT / "README.md"):
                write_tables(document, tables)


if __name__ == "__main__":
    main()
