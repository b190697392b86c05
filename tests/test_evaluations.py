"""Evaluations in the loop: what they find, where they are logged, and that no signal, error or kill costs one."""

import json
import os
import signal

import pytest
from conftest import read_log
from processes import Ranks
from test_train import checkpoints, expect_exit, records, run

import eval as evaluation
import train

EVERY_TWO = "--eval_steps", 2, "--eval_limit", 6, "--save_steps", 3
LOGS = "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), "--max_steps", 4, *EVERY_TWO)


def same_logs(a, b):
    for name in LOGS:
        assert read_log(a / name) == read_log(b / name), name


def test_an_evaluation_is_eval_pys(tmp_path, undisturbed, capsys):
    """Before the first step, with the same questions and the same numbers; then after every second step."""
    found = records(undisturbed, "evaluations")
    assert [record["step"] for record in found] == [0, 2, 4]
    evaluation.main(["--limit", "6", "--max_completion_length", "40", "--output_dir", str(tmp_path / "answers")])
    expected = json.loads((tmp_path / "answers" / "answers.json").read_text())["metrics"]
    del expected["bad rows"]
    assert found[0] == {"step": 0} | expected
    capsys.readouterr()
    run(tmp_path, "--max_steps", 1, "--eval_steps", 1, "--eval_limit", 6)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after step ")]
    assert len(lines) == 2 and lines[0].startswith("after step 0: accuracy 0.")


def test_a_run_without_evaluations_is_the_same(tmp_path, undisturbed):
    plain = run(tmp_path, "--max_steps", 4)
    assert not (plain / "evaluations.jsonl").exists()
    for name in LOGS[:2]:
        assert read_log(plain / name) == read_log(undisturbed / name)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_repeats_and_loses_no_evaluation(tmp_path, undisturbed, stop):
    """Before and after a step with an evaluation, with and without a save in between, and at the end."""
    run(tmp_path, "--max_steps", stop, *EVERY_TWO)
    same_logs(run(tmp_path, "--max_steps", 4, *EVERY_TWO, "--resume"), undisturbed)


@pytest.mark.parametrize("nth, step", [(2, 2), (3, 4)])
def test_a_signal_during_an_evaluation(tmp_path, undisturbed, monkeypatch, nth, step):
    """It is given up, the step is saved, and --resume begins with the evaluation."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluation.evaluate(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max_steps", 4, *EVERY_TWO)
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{step}"]
    assert [record["step"] for record in records(tmp_path / "run", "evaluations")] == list(range(0, step, 2))
    monkeypatch.setattr(train, "evaluate", evaluation.evaluate)
    same_logs(run(tmp_path, "--max_steps", 4, *EVERY_TWO, "--resume"), undisturbed)


def test_an_error_during_an_evaluation_costs_no_step(tmp_path, undisturbed, monkeypatch, capsys):
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return evaluation.evaluate(*args)

    monkeypatch.setattr(train, "evaluate", failing)
    assert "the disk is gone" in expect_exit(tmp_path, capsys, "--max_steps", 4, *EVERY_TWO)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    same_logs(run(tmp_path, "--max_steps", 4, *EVERY_TWO, "--resume"), undisturbed)


def test_killed_during_an_evaluation_the_run_is_the_same(tmp_path):
    """By SIGKILL, on two ranks; each speaks once for the evaluation before step 1, once a step, once a save, and so on."""
    flags = "--max_steps", 4, "--eval_steps", 2, "--eval_limit", 6, "--save_steps", 1
    expected = tmp_path / "expected"
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", expected, *flags)
    assert ranks.wait() == [0, 0], ranks.text()
    killed = tmp_path / "killed"
    ranks = Ranks(2, tmp_path / "out", "ranks:main_killed", "model.generate", 5, "--output_dir", killed, *flags)
    assert -signal.SIGKILL in ranks.wait()
    assert checkpoints(killed) == ["checkpoint-1"] and len(records(killed)) == 2
    ranks = Ranks(2, tmp_path / "out", "ranks:main", "--output_dir", killed, *flags, "--resume")
    assert ranks.wait() == [0, 0], ranks.text()
    same_logs(killed, expected)


def test_bad_evaluation_data_end_the_run_before_its_first_step(tmp_path, capsys):
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"problem": "the 7", "solution": []}')
    line = expect_exit(tmp_path, capsys, *EVERY_TWO, "--eval_data", rows)
    assert f"{rows}, row 1" in line and "no 'image'" in line
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_what_the_logs_have(tmp_path):
    """Read back with its own reader; what a resumed run does again is there once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--eval_steps", 1, "--eval_limit", 4, "--tensorboard"
    # The second run begins with an evaluation of step 2, which the first one trained.
    run(tmp_path, "--max_steps", 2, "--tensorboard")
    directory = run(tmp_path, "--max_steps", 3, *flags, "--resume")
    events = reader.EventAccumulator(str(directory), purge_orphaned_data=True)
    events.Reload()
    for name in ("metrics", "evaluations"):
        log = records(directory, name)
        for key, value in log[0].items():
            if isinstance(value, float):
                found = {event.step: event.value for event in events.Scalars(f"{name}/{key}")}
                assert found == pytest.approx({record["step"]: record[key] for record in log})
    assert {"metrics/reward", "metrics/loss", "evaluations/accuracy"} <= set(events.Tags()["scalars"])
    assert not any(tag.startswith("completions") for tag in events.Tags()["scalars"])


def test_tensorboard_is_asked_for_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "pip install tensorboard" in expect_exit(tmp_path, capsys, "--tensorboard")
