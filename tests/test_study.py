"""The study: its runs are resumable and what it says of them is right."""

import itertools
import json

import numpy as np
import pytest
import study
from conftest import ROOT


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of a few steps in tmp_path."""
    settings = {"RUNS": tmp_path / "study", "STEPS": 4, "EVAL_STEPS": 1, "EVAL_SAMPLES": 4, "MEASURED_SAMPLES": 8,
                "RETENTION_SAMPLES": 4, "BASES": {"A": study.BASES["A"]}, "BASE_SEED": {}, "SEEDS": (0,)}
    for name, value in settings.items():
        monkeypatch.setattr(study, name, value)
    return tmp_path


def test_a_run_of_two_stages_is_measured_and_not_run_again(small, monkeypatch):
    """Two stages, one curve, one bill; interrupted before it is measured, it is not trained again."""
    [job] = [job for job in study.jobs_of("steps") if job.arm == "sft-rlvr"]
    assert [stage[:2] for stage in job.stages] == [("sft", 2), ("rlvr", 2)]
    with monkeypatch.context() as patch:
        patch.setattr(study, "measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.run_job(job)
    logs = {path: path.read_text() for path in job.directory.glob("stage-*/*.jsonl")}
    study.run_job(job)
    assert len(logs) == 4 and logs == {path: path.read_text() for path in logs}, "trained once"
    result = json.loads((job.directory / "result.json").read_text())
    assert [point["step"] for point in result["curve"]] == [0, 1, 2, 3, 4]
    assert [path.name for path in job.directory.glob("stage-*/checkpoint-*")] == ["checkpoint-2"] * 2, "others are gone"
    assert result["overall"] == pytest.approx(np.mean([result[sort] for sort in study.QUESTIONS]))
    steps = [json.loads(line) for path in job.directory.glob("stage-*/metrics.jsonl") for line in open(path)]
    assert len(steps) == 4
    assert result["seconds"] == pytest.approx(sum(s["rollout_seconds"] + s["update_seconds"] for s in steps))
    assert 0 < result["cpu_seconds"] < 2 * result["seconds"]
    second = json.loads((job.directory / "stage-2/config.json").read_text())
    assert second["model"].endswith("stage-1/checkpoint-2") and second["method"] == "rlvr"
    study.run_jobs([job])  # nothing is left to do: no process is started for it
    assert json.loads((job.directory / "result.json").read_text()) == result


def test_every_arm_gets_the_same_search_and_the_same_steps():
    search = study.jobs_of("search")
    assert {arm: sum(job.arm.startswith(f"{arm}-{rate:g}") for job in search for rate in study.RATES)
            for arm in study.CHOSEN} == dict.fromkeys(study.CHOSEN, len(study.RATES) * len(study.SEARCH_SEEDS))
    assert not set(study.SEARCH_SEEDS) & set(study.SEEDS)
    steps = study.jobs_of("steps")
    assert len(steps) == 4 * len(study.SEEDS) * 2
    assert {sum(stage[1] for stage in job.stages) for job in steps} == {study.STEPS}
    flags = [job.stages[0][3:] for job in study.jobs_of("controls")]
    assert set(flags) == {("--no-align_label",), ("--no-drop_thinking_reward",), ("--no-smooth_label_reward",)}


def test_sign_flips_are_an_exact_test():
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4])
    means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([abs(mean) >= abs(differences.mean()) - 1e-12 for mean in means])
    assert study.sign_flip_test(differences) == expected
    assert study.sign_flip_test([1.0] * 10) == 2 / 2 ** 10
    assert study.sign_flip_test([0.0] * 4) == 1


def test_the_ruling():
    assert [study.ruling([sign * x for x in range(1, 7)]) for sign in (1, -1)] == ["holds", "fails"]
    assert study.ruling([0.1] * 5) == "open", "five pairs can never reach p < 0.05"


def result(arm, seed, base="A", **values):
    numbers = dict.fromkeys((*study.QUESTIONS, "overall", "thinking", "well_formed", "retention"), 0.5)
    return {"part": "steps", "arm": arm, "base": base, "seed": seed, "seconds": 10.0, "cpu_seconds": 11.0, **numbers,
            **values}


def test_tables_say_means_spreads_and_paired_differences():
    runs = [result("sft", seed, overall=0.5 + 0.1 * seed) for seed in range(3)]
    ours = [result("visurf", seed, overall=0.7 + 0.1 * seed) for seed in (2, 0, 1)]
    row = study.method_table(runs, {"A": result("", 0)}).splitlines()[-1]
    assert row.startswith("| sft | 50.0 ± 0.0 |") and "| 60.0 ± 10.0 |" in row
    assert row.endswith("| 10 ± 0 | 11 ± 0 |")
    assert "| visurf − sft | +20.0 (p = 0.250) **open** | +0.0 (p = 1.000) |" in study.comparisons(runs, ours)


def test_retention_counts_what_is_still_answered_as_taught(monkeypatch):
    """A network that answers as the lessons do keeps everything; one that says something else keeps nothing."""
    processor = study.data.Processor(study.BASES["A"], study.data.TASKS["digits"])
    lessons = []
    lesson = study.make_tiny.lesson
    monkeypatch.setattr(study.make_tiny, "lesson", lambda *args: lessons.append(lesson(*args)) or lessons[-1])

    def answers(write):
        completion = lambda text: [study.model.Completion(processor.token_ids(text + study.data.END), None, True)]
        return lambda network, examples, *_, **__: [completion(write(truth)) for _, truth in lessons[-len(examples):]]

    for sort in study.RETENTION:
        for write, kept in ((lambda truth: truth, 1.0), (lambda truth: "<answer>[]</answer>", 0.0)):
            monkeypatch.setattr(study.model, "generate", answers(write))
            assert study.retention(None, processor, sort, "test", 12) == kept


def test_the_docs_hold_the_studys_tables():
    """Tables in docs/results.md are those of the committed results."""
    saved = json.loads(study.PUBLISHED.read_text())
    docs = (ROOT / "docs" / "results.md").read_text()
    for title, table in study.report(saved["runs"], saved["bases"]).items():
        assert table in docs, title
