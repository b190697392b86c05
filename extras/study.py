"""The study: when does it pay to inject the label, and against what?

    python extras/study.py              # everything, from nothing: about four hours on two idle cores
    python extras/study.py --report     # tables and figure from the committed records
    python extras/study.py --again      # seed 0 of each method once more, compared with its record
    python extras/study.py --smoke      # all of it with tiny numbers, to see that it works

A finished run is a line in runs/study/records.jsonl. What is recorded is never run again, and a run that was
killed starts anew: to continue, give the same command again. A fresh clone continues from the committed
records, assets/study.jsonl; base networks that are missing are made again from their seeds. Two runs at a time, of
one thread each. To publish: cp runs/study/records.jsonl assets/study.jsonl, then --report, which needs matplotlib.

Fixed before the main runs, in commit 3e8bacd:

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
import study_measure as measuring
import study_report as report
import train
import visurf

# ---- Settings ---------------------------------------------------------------------------------------------------

RUNS, COMMITTED = Path("runs/study"), ROOT / "assets/study.jsonl"
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
         "LESSON_STEPS": dict.fromkeys(LESSON_STEPS, 2)}


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


BASE_JOBS = [Job("bases", "base", base, 0) for base in report.BASES]

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
                best[method] = max(grid, key=lambda rate: report.mean_of([records[job.key] for job in jobs[rate]]))
        at_an_end = [method for method in best if best[method] in (grids[method][0], grids[method][-1])]
        if missing or not at_an_end or len(grids["sft"]) == MOST_RATES:
            return grids, best, missing
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
            jobs["main"] += [Job("main", arm, base, seed, stages_of(arm, rates)) for base in report.BASES]
        jobs["compute"] += [Job("compute", "sft-long", base, seed, long) for base in report.BASES]
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
            notes["empty_sampled"] = measuring.sampled_empty(checkpoint, VALIDATION_SIZE)
            notes["sha256"] = digest(checkpoint)
        for number, (_, steps, _, option) in enumerate(job.stages, 1):
            directory = train_stage(job, number, checkpoint)
            checkpoint = directory / f"checkpoint-{steps}"
            found = model.read_json(directory / "notes.json")
            # Seconds of all stages; the trace of the last.
            notes = {"cpu_seconds": notes["cpu_seconds"] + found["cpu_seconds"], "trace": found["trace"]}
        if job.part == "search":
            samples = data.load_samples(None, data.TASKS["digits"], "validation", VALIDATION_SIZE)
            numbers = measuring.measure(checkpoint, samples)
        else:
            with alone("test"):
                samples = measuring.test_samples(RUNS / "test.jsonl", TEST_SIZE)
            numbers = measuring.measure(checkpoint, samples, LESSON_SIZE)
        if job.stages and job.stages[-1][0] != "sft":    # an sft checkpoint may begin a run of two stages
            shutil.rmtree(directory)
    return {"job": json.loads(job.key), "cpu": torch.backends.cpu.get_cpu_capability(), **notes, "numbers": numbers}


@contextlib.contextmanager
def alone(name: str):
    """One process at a time does this: two runs may need the same base or first stage."""
    with open(RUNS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train_stage(job: Job, number: int, start: Path) -> Path:
    """Train one stage of a run, unless it is there, and return its directory."""
    words = [job.base, job.seed] + [word for stage in job.stages[:number] for word in stage if word != ""]
    directory = RUNS / "-".join(map(str, words)).replace(" ", "_").replace("/", "_")
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
        evaluation.write_text(directory / "notes.json", json.dumps({"cpu_seconds": round(seconds, 1), "trace": trace}))
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


# ---- The bases ----------------------------------------------------------------------------------------------------

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
                teach_empty_answers(start, unfinished, seed=100 + report.BASES.index(name))
            else:
                settings = {**LESSON_STEPS, "learning_rate": 2e-3, "seed": 1, "output": unfinished / "made"}
                make_tiny.make(SimpleNamespace(**settings), unfinished)
                unfinished = unfinished / "made"
            shutil.copytree(unfinished, directory)
    return directory


def digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def check_bases(records: dict):
    """Stop if this machine makes another base from the same seed than the one that the records began with."""
    for job in BASE_JOBS:
        if job.key in records and digest(prepare_base(job.base)) != records[job.key]["sha256"]:
            sys.exit(f"base {job.base} is not that of the records: this processor rounds differently. Give "
                     f"{RUNS / 'base-B'} and the others from there, or begin anew with an empty {RUNS}/records.jsonl")


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
    def turn(job):
        # B takes long to make, so it is first, and what needs it comes after what does not.
        return job != BASE_JOBS[report.BASES.index("B")], job.base[0]

    check_bases(records)
    while missing := [job for job in BASE_JOBS + search(records)[2] if job.key not in records]:
        run_jobs(sorted(missing, key=turn), records)
    run_jobs(sum(jobs_after_search(records).values(), []), records)


def run_again(records: dict):
    """Seed 0 of each method, from nothing; says whether the numbers are the recorded ones, bit for bit."""
    for job in jobs_after_search(records)["main"][::len(report.BASES)][:len(RATES)]:
        found, recorded = run_job(job), records[job.key]
        verdict = "the same" if found["numbers"] == recorded["numbers"] else "DIFFERENT"
        if found["cpu"] != recorded["cpu"]:
            verdict += f" (recorded with {recorded['cpu']}, this is {found['cpu']}: it rounds differently)"
        print(f"{job.arm}, base {job.base}, seed {job.seed}: {verdict}", flush=True)


def show(records: dict, figure: Path) -> dict[str, str]:
    """Print all tables, draw the figure, and return the tables by name."""
    grids, best, _ = search(records)
    planned = jobs_after_search(records)
    # Runs at rates that the search has dropped are no part of the result.
    runs = {(job.arm, job.base, job.seed): records[job.key]
            for jobs in planned.values() for job in jobs if job.key in records}
    searched = [record for record in records.values() if record["job"]["part"] == "search"
                and record["job"]["stages"][0][2] in (record["job"]["stages"][-1][2], best.get("sft"))]
    bases = {job.base: records[job.key] for job in BASE_JOBS if job.key in records}
    each = len(SEARCH_BASES) * len(SEARCH_SEEDS)
    progress = {"search": (len(searched), each * sum(map(len, grids.values())))}
    for part, jobs in planned.items():
        progress[part] = (sum(job.key in records for job in jobs), len(jobs))
    tables = report.tables(progress, grids, best, searched, bases, runs)
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}")
    if runs:
        report.draw(runs, figure)
    return tables


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="run nothing: from the committed records, write the "
                        "tables into the documents and draw the figure")
    parser.add_argument("--again", action="store_true", help="run seed 0 of each method again and compare")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: a few minutes")
    config = parser.parse_args(argv)
    if config.report:
        tables = show(read_records(COMMITTED), COMMITTED.with_suffix(".png"))
        for document in (ROOT / "docs/results.md", ROOT / "README.md"):
            report.write_tables(document, tables)
        return
    if config.smoke:
        globals().update(SMOKE)
    torch.set_num_threads(1)                             # a process with several threads must not be forked
    if config.again:
        globals()["RUNS"] = Path(tempfile.mkdtemp())
        return run_again(read_records(COMMITTED))
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / "records.jsonl"
    if COMMITTED.exists() and not path.exists() and not config.smoke:
        shutil.copy(COMMITTED, path)
    records = read_records(path)
    run_everything(records)
    show(records, RUNS / "study.png")


if __name__ == "__main__":
    main()
