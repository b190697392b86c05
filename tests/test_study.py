"""The study: it runs what its rules say, resumes, and its tables follow from its records."""

import itertools
import contextlib
import json
from collections import Counter

import numpy as np
import pytest
import study
import study_measure
import study_report as report
import torch
import train
import visurf
from conftest import ROOT

SMALL = {"STEPS": 2, "TEST_SIZE": 8, "VALIDATION_SIZE": 8, "LESSON_SIZE": 2, "MORE_STEPS": 2}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of a few steps in tmp_path."""
    for name, value in {**SMALL, "RUNS": tmp_path}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda method: InProcess())
    return tmp_path


class InProcess(contextlib.nullcontext):
    """Stands in for a pool of forked workers: a process in which torch's threads have worked cannot be forked."""

    def Pool(self, *_, **__):
        return self

    def __enter__(self):
        return self

    def imap_unordered(self, function, jobs, chunksize):
        return map(function, jobs)

    def close(self):
        pass

    def join(self):
        pass


def fake_record(job, score: float, **numbers) -> dict:
    names = (*report.OUTCOMES, *(f"thinking, {sort}" for sort in report.SORTS))
    trace = {f"{name} {sort}": [0.5] * 24 for name in report.TRACES for sort in ("absent", "present")}
    return {"job": json.loads(job.key), "cpu_seconds": 120.0 if job.arm == "visurf" else 30.0, "trace": trace,
            "numbers": dict.fromkeys(names, score) | numbers}


def searched(peaks: dict) -> dict:
    """Records of a whole search, in which each method is best at a rate of `peaks`."""
    records = {}
    while missing := study.search(records)[2]:
        for job in missing:
            distance = abs(np.log2(job.stages[-1][2] / peaks[job.arm]))
            records[job.key] = fake_record(job, 1 / (1 + distance))
    return records


def test_the_search_gives_each_method_as_many_runs():
    peaks = {"sft": 1e-4, "visurf": 2e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5}
    records = searched(peaks)
    grids, best, missing = study.search(records)
    assert best == peaks and grids == study.RATES and not missing
    assert set(Counter(record["job"]["arm"] for record in records.values()).values()) == {16}
    seeds = {record["job"]["seed"] for record in records.values()}
    assert not seeds & set(study.SEEDS)


def test_a_grid_grows_until_no_best_is_at_its_end():
    """One method's best at an end gives all methods one more rate; there is an end to it."""
    peaks = {"sft": 2.5e-5, "visurf": 2e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5}
    grids, best, missing = study.search(searched(peaks))
    assert best == peaks and not missing
    assert {len(grid) for grid in grids.values()} == {6}
    assert grids["sft"][0] == 1.25e-5
    grids, best, _ = study.search(searched({**peaks, "sft": 1e-9}))
    assert {len(grid) for grid in grids.values()} == {study.MOST_RATES} and best["sft"] == grids["sft"][0]


def test_the_plan_is_that_of_the_rules():
    rates = {"sft": 1e-4, "visurf": 2e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5}
    plan = study.jobs_after_search(searched(rates))
    assert {part: len(jobs) for part, jobs in plan.items()} == {
        "main": 4 * 4 * 5, "compute": 4 * 5, "controls": 4 * 2 * 3, "beyond": 3 * 2 * 5}
    jobs = sum(plan.values(), [])
    assert len({job.key for job in jobs}) == len(jobs) == len({(job.arm, job.base, job.seed) for job in jobs})
    assert {tuple(stage[:3] for stage in job.stages) for job in plan["main"]} == {
        (("sft", 240, 1e-4),), (("visurf", 240, 2e-4),), (("rlvr", 240, 1e-4),),
        (("sft", 240, 1e-4), ("rlvr", 240, 5e-5))}
    assert {job.stages[0][:3] for job in plan["compute"]} == {("sft", 960, 1e-4)}, "four times the seconds"
    assert {job.stages[0][3] for job in plan["controls"] + plan["beyond"]} == {*study.CONTROLS, *study.VARIANTS}
    assert study.jobs_after_search({}) == {}, "no rates before the search"


def test_a_run_is_recorded_once_and_two_stages_share_the_first(small):
    """A killed run starts anew; a finished first stage, or a finished run, is not trained again."""
    rates = {"sft": 1e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5}
    sft = study.Job("main", "sft", "A", 0, study.stages_of("sft", rates))
    both = study.Job("main", "sft-rlvr", "A", 0, study.stages_of("sft-rlvr", rates))
    killed = small / "A-0-sft-2-0.0001"
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    records = {}
    study.run_jobs([sft], records)
    first = (killed / "notes.json").stat().st_mtime_ns
    study.run_jobs([sft, both], records)
    assert (killed / "notes.json").stat().st_mtime_ns == first
    assert records == study.read_records(small / "records.jsonl") and set(records) == {sft.key, both.key}
    assert records[both.key]["cpu_seconds"] > records[sft.key]["cpu_seconds"]
    assert set(records[both.key]["trace"]) == {"[] absent", "[] present", "clipped", "thinking absent",
                                               "thinking present"}
    numbers = records[both.key]["numbers"]
    assert numbers["mean of four"] == pytest.approx(np.mean([numbers[sort] for sort in report.SORTS]), abs=1e-4)
    study.run_jobs([sft, both], records)
    assert len((small / "records.jsonl").read_text().splitlines()) == 2


def test_a_base_can_learn_to_sample_empty_answers(small):
    """The continuation teaches [] behind "it is nowhere" alone, and a base is made once."""
    directory = study.prepare_base("A+")
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert study.prepare_base("A+") == directory and (directory / "model.safetensors").stat().st_mtime_ns == made
    assert study_measure.sampled_empty(directory, 8) <= 1
    assert not list(small.glob("tmp*"))
    job = study.Job("bases", "base", "A+", 0)
    study.check_bases({job.key: {"sha256": study.digest(directory)}})
    with pytest.raises(SystemExit, match="base A\\+ is not that of the records"):
        study.check_bases({job.key: {"sha256": "another"}})


def train_two_steps(tmp_path, name: str, *patches) -> list[dict]:
    directory = tmp_path / name.replace("/", "")
    for patch in patches:
        patch.__enter__()
    try:
        train.main(["--max_steps", "2", "--output_dir", str(directory)])
    finally:
        for patch in reversed(patches):
            patch.__exit__(None, None, None)
    return [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]


def test_notes_change_nothing_and_variants_change_the_label(tmp_path):
    notes = []
    plain = train_two_steps(tmp_path, "plain")
    noted = train_two_steps(tmp_path, "noted", study.take_notes(notes))
    assert plain == noted and len(notes) == 2
    trace = study.trace_of(notes)
    active = [group["advantages"][-1] != 0 for group in plain if group["texts"][-1] == "<answer>[]</answer>"]
    assert notes[0]["active absent"] == active and trace["thinking absent"] == [1.0]

    groups = train_two_steps(tmp_path, "thought", study.VARIANTS["own reasoning"]())
    for group in groups:
        thought, _, label = group["texts"][-1].partition("</think>")
        assert any(text.startswith(f"{thought}</think>") for text in group["texts"][:-1])
        assert label in {other["texts"][-1] for other in plain}
    groups = train_two_steps(tmp_path, "failures", study.VARIANTS["only where all fail"]())
    for group, before in zip(groups, plain):
        failed = not any(parts["accuracy"] for parts in group["rewards"][:-1])
        assert group["advantages"][-1] == (before["advantages"][-1] if failed else 0)


def test_luffy_shapes_the_label_alone():
    """Its gradient is the plain one, times 0.1 p / (p + 0.1)^2 on the label's tokens."""
    logprobs = (-3 * torch.rand(2, 4, 5)).requires_grad_()
    advantages, mask = torch.randn(2, 4), torch.rand(2, 4, 5) > 0.3
    gradients = []
    for patch in (None, study.VARIANTS["p/(p+0.1)"]()):
        if patch:
            patch.__enter__()
        loss = visurf.policy_loss(logprobs, logprobs.detach(), advantages, mask, total=17.0)
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    patch.__exit__(None, None, None)
    p = logprobs[:, -1].exp().detach()
    expected = gradients[0].clone()
    expected[:, -1] *= 0.1 * p / (p + 0.1) ** 2
    torch.testing.assert_close(gradients[1], expected)


def test_retention_counts_what_is_still_answered_as_taught(monkeypatch):
    """A network that answers as the lessons do keeps everything; one that says something else keeps nothing."""
    processor = study.data.Processor(ROOT / "assets/tiny-qwen2-vl", study.data.TASKS["digits"])
    lessons = []
    lesson = study.make_tiny.lesson
    monkeypatch.setattr(study.make_tiny, "lesson", lambda *args: lessons.append(lesson(*args)) or lessons[-1])

    def answers(write):
        def completion(text):
            return [study.model.Completion(processor.token_ids(text + study.data.END), None, True)]

        return lambda network, examples, *_, **__: [completion(write(truth)) for _, truth in lessons[-len(examples):]]

    for sort in study_measure.RETENTION:
        for write, kept in ((lambda truth: truth, 1.0), (lambda truth: "<answer>[]</answer>", 0.0)):
            monkeypatch.setattr(study.model, "generate", answers(write))
            assert study_measure.retention(None, processor, sort, 12) == kept


def test_sign_flips_are_an_exact_test():
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4])
    means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([abs(mean) >= abs(differences.mean()) - 1e-12 for mean in means])
    assert report.sign_flip_test(differences) == expected
    assert report.sign_flip_test([1.0] * 10) == 2 / 2 ** 10
    assert report.sign_flip_test([0.0] * 4) == 1


def test_holm_is_the_step_down_procedure():
    """At any level, the adjusted p-values reject what Holm's procedure rejects, step by step."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = list(rng.random(6) ** 4)
        adjusted = report.holm(p_values)
        for level in np.linspace(0.003, 0.999, 200):
            rejected = set()
            for rank, i in enumerate(np.argsort(p_values)):
                if p_values[i] > level / (6 - rank):
                    break
                rejected.add(i)
            assert rejected == {i for i in range(6) if adjusted[i] <= level}


def test_rulings_and_tables_of_records_made_up():
    rates = {"sft": 1e-4, "visurf": 2e-4, "rlvr": 1e-4, "sft-rlvr": 5e-5}
    records = searched(rates)
    for job in sum(study.jobs_after_search(records).values(), []):
        scores = {"visurf": 0.7, "rlvr": 0.8 if job.base.endswith("+") else 0.4}
        records[job.key] = fake_record(job, scores.get(job.arm, 0.69 + 0.01 * (job.seed % 3)))
    runs = {(job.arm, job.base, job.seed): records[job.key]
            for jobs in study.jobs_after_search(records).values() for job in jobs}
    found = {comparison.label: comparison for comparison in report.rulings(runs)}
    assert len(found) == 12
    assert found["rlvr, base never samples `[]`"].ruling == "**ahead**"
    assert found["rlvr, base samples `[]` now and then"].ruling == "**behind**"
    assert found["rlvr, all bases"].ahead_in == "2 of 4"
    assert found["sft, all bases"].ruling == "open", "0, 1 and 2 hundredths below and above"
    assert found["rlvr, base never samples `[]`"].mean == "+30.0"
    assert report.p_text(found["rlvr, base never samples `[]`"].p) == "0.023", "12 tests, 2 of 2^10 signs"


def test_tables_go_between_their_marks(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    report.write_tables(document, {"one": "| x |", "two": "| y |", "three": "| z |"})
    assert document.read_text() == "a\n<!-- one -->\n| x |\n<!-- end -->\nb\n<!-- two -->\n| y |\n<!-- end -->\n"


def test_the_documents_hold_the_tables_of_the_committed_records(tmp_path):
    """Tables in docs/results.md and in the README are those of the records, and one is computed by other means."""
    records = study.read_records(study.COMMITTED)
    tables = study.show(records, tmp_path / "study.png")
    texts = [(ROOT / name).read_text() for name in ("docs/results.md", "README.md")]
    for name, table in tables.items():
        assert any(f"<!-- {name} -->\n{table}\n<!-- end -->" in text for text in texts), name

    means = {}
    chosen = {(job.arm, job.base, job.seed): job.key for job in study.jobs_after_search(records).get("main", [])}
    for (arm, base, seed), key in chosen.items():
        if key in records:
            sorts = records[key]["numbers"]
            means[arm, base, seed] = 25 * sum(sorts[sort] for sort in ("known", "two-hop", "new word", "absent"))
    for row in tables.get("rulings", "").splitlines()[2:]:
        label, difference, *_, pairs = row.strip("| ").split(" | ")
        rival, kind = label.split(", ")
        bases = [base for base in ("A", "A+", "B", "B+")
                 if kind == "all bases" or base.endswith("+") == ("now and then" in kind)]
        found = [means["visurf", base, seed] - means[rival, base, seed] for base in bases for seed in range(5)
                 if ("visurf", base, seed) in means and (rival, base, seed) in means]
        if rival != "sft-long":
            assert len(found) == int(pairs) and np.mean(found) == pytest.approx(float(difference), abs=0.06)
