"""What every kind of answer earns, that nothing hostile breaks or fools the rewards, and that the matching is best.

`python -m pytest tests/test_rewards.py -s -k hostile` also prints the slowest completions.
"""

import contextlib
import doctest
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import ROOT

import rewards
from rewards import has_thinking, iou, match, non_repeat, read_answer, same_answer, score

RANGES = {"thinking": (0, 1), "format": (0, 2), "accuracy": (0, 3), "non_repeat": (0, 1)}
MAX_REWARD = sum(high for _, high in RANGES.values())
DOG = {"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}
CAT = {"bbox_2d": [500, 400, 700, 800], "point_2d": [600, 600]}
FAR = {"bbox_2d": [0, 0, 20, 20], "point_2d": [10, 10]}          # agrees with neither


def answer(objects) -> str:
    return f"<answer>{objects if isinstance(objects, str) else json.dumps(objects)}</answer>"


def completion(objects, thinking="I see it.") -> str:
    return f"<think>{thinking}</think>\n{answer(objects)}"


def accuracy(objects, label, **options) -> float:
    return score(completion(objects), label, **options)["accuracy"]


def thing(box, point=None) -> dict:
    return {"bbox_2d": list(box), "point_2d": list(point or ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))}


def total(*arguments, **options) -> float:
    return sum(score(*arguments, **options).values())


def test_docstring_examples():
    results = doctest.testmod(rewards)
    assert results.attempted >= 2 and results.failed == 0


def test_the_file_alone_scores_a_completion(tmp_path):
    shutil.copy(ROOT / "rewards.py", tmp_path)
    code = "import rewards; print(rewards.score('<think>a</think><answer>[]</answer>', []))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "{'thinking': 1.0, 'format': 2.0, 'accuracy': 3.0, 'non_repeat': 1.0}\n" and not run.stderr


# ---- Totals worked out by hand: (thinking, format, accuracy, non_repeat) --------------------------------------------
TOTALS = {
    "perfect": (completion([DOG]), [DOG], (1, 2, 3, 1)),
    "perfect, two in another order": (completion([CAT, DOG]), [DOG, CAT], (1, 2, 3, 1)),
    "no thinking": (answer([DOG]), [DOG], (0, 2, 3, 1)),
    "correct []": (completion([]), [], (1, 2, 3, 1)),
    "hallucination": (completion([DOG]), [], (1, 2, 0, 1)),
    "wrong []": (completion([]), [DOG], (1, 0, 0, 1)),
    "wrong box": (completion([FAR]), [DOG], (1, 2, 0, 1)),
    "no answer where nothing is": ("<think>I see nothing.</think>", [], (0, 0, 0, 1)),
    "broken JSON where nothing is": (completion("[}"), [], (1, 0, 0, 1)),
    "empty completion": ("", [DOG], (0, 0, 0, 1)),
    "answer only in the thinking": (f"<think>{answer([DOG])}</think>", [DOG], (0, 0, 0, 1)),
    "infinite box": (completion('[{"bbox_2d": [-1e999, -1e999, 1e999, 1e999], "point_2d": [200, 200]}]'), [DOG],
                     (1, 1, 0, 1)),
    "Infinity": (completion('[{"bbox_2d": [-Infinity, 0, Infinity, 9], "point_2d": [200, 200]}]'), [DOG], (1, 0, 0, 1)),
    "NaN": (completion('[{"bbox_2d": [NaN, 0, 9, 9], "point_2d": [200, 200]}]'), [DOG], (1, 0, 0, 1)),
    "box only": (completion([{"bbox_2d": DOG["bbox_2d"]}]), [DOG], (1, 1, 2, 1)),
    "point only": (completion([{"point_2d": [200, 200]}]), [DOG], (1, 1, 0, 1)),
    "one good, one without fields": (completion([DOG, {}]), [DOG], (1, 1, 1.5, 1)),
    "true is not a number": (completion([DOG | {"bbox_2d": [True, 100, 300, 300]}]), [DOG], (1, 1, 0, 1)),
    "the same box twice": (completion([DOG, DOG]), [DOG], (1, 2, 1.5, 1)),
    "the same box twice for two": (completion([DOG, DOG]), [DOG, CAT], (1, 2, 1.5, 1)),
    "one of two": (completion([DOG]), [DOG, CAT], (1, 2, 1.5, 1)),
    "two and one too many": (completion([FAR, DOG, CAT]), [DOG, CAT], (1, 2, 2, 1)),
    "repetition": (completion([DOG], "A dog. A dog. A dog."), [DOG], (1, 2, 3, 0)),
    "answer beyond the bound": (completion([DOG], "x" * 30_000), [DOG], (0, 0, 0, 1)),
}


@pytest.mark.parametrize("case", TOTALS)
def test_totals(case):
    text, label, expected = TOTALS[case]
    result = score(text, label)
    assert list(result.items()) == list(zip(RANGES, expected))


def test_right_is_never_below_wrong():
    """The known fault of others: a correct [] scored below a hallucination."""
    assert MAX_REWARD == 7
    assert total(completion([]), []) == MAX_REWARD > total(completion([DOG]), [])
    assert total(completion([FAR]), [DOG]) > total(completion([]), [DOG])


def test_a_label_of_other_columns_is_an_error():
    with pytest.raises(KeyError, match="bbox_2d"):
        score(completion([DOG]), [DOG, {"box": [1, 2, 3, 4]}])


def test_inputs_are_left_alone():
    label = json.loads(json.dumps([DOG, CAT]))
    score(completion([DOG]), label, frame=(420, 210))
    assert label == [DOG, CAT]


# ---- Reading the answer ---------------------------------------------------------------------------------------------
A, B = '[{"point_2d": [1, 2]}]', '[{"point_2d": [3, 4]}]'
READ_A, READ_B = [{"point_2d": [1.0, 2.0]}], [{"point_2d": [3.0, 4.0]}]
ANSWERS = {
    "plain": (answer(A), READ_A),
    "white space and text around": (f"So: <answer>\n {A}\t\n</answer> done", READ_A),
    "the last counts": (answer(A) + answer(B), READ_B),
    "the last counts, even if broken": (answer(A) + answer("[}"), None),
    "the last counts, even if not closed": (answer(A) + "<answer>" + B, None),
    "nested: the inner is the last": (f"<answer>{A}<answer>{B}</answer></answer>", READ_B),
    "text inside": (f"<answer>Here: {A}</answer>", None),
    "not opened": (f"{A}</answer>", None),
    "closed before opened": (f"</answer>{A}<answer>", None),
    "no tags": (A, None),
    "upper-case tags": (answer(A).upper(), None),
    "inside the thinking": (f"<think>{answer(A)}</think>", None),
    "inside the thinking and after": (f"<think>{answer(A)}</think>{answer(B)}", READ_B),
    "before and inside the thinking": (f"{answer(A)}<think>{answer(B)}</think>", READ_A),
    "thinking not closed": (f"<think>hm {answer(A)}", None),
    "thinking not closed, later": (f"{answer(A)}<think>{answer(B)}", READ_A),
    "second thinking": (f"<think>a</think>{answer(A)}<think>{answer(B)}</think>", READ_A),
    "nested thinking ends at the first end": (f"<think>a<think>b</think>{answer(A)}</think>", READ_A),
    "thinking closed but never opened": (f"hm</think>{answer(A)}", READ_A),
    "thinking within the answer": (f"<answer>[<think>hm</think>{A[1:]}</answer>", None),
    "answer opened before the thinking": (f"<answer><think>hm</think>{A}</answer>", None),
    "tags glued by removing thinking": (f"<ans<think></think>wer>{A}</answer>", None),
    "empty list": (answer("[]"), []),
    "empty": (answer(""), None),
    "one object, no list": (answer(A[1:-1]), None),
    "list of numbers": (answer("[1, 2, 3, 4]"), None),
    "list with null": (answer("[null]"), None),
    "number, string, null": (answer("1") + answer('"a"') + answer("null"), None),
    "single quotes": (answer(A.replace('"', "'")), None),
    "trailing comma": (answer(A[:-1] + ",]"), None),
    "markdown fence": (answer(f"```json\n{A}\n```"), None),
    "object without fields": (answer("[{}]"), [{}]),
    "other fields": (answer('[{"label": "dog", "point_2d": [1, 2]}]'), READ_A),
    "numbers as strings": (answer('[{"bbox_2d": ["1", "2", "3", "4"], "point_2d": [1, 2]}]'), READ_A),
    "three numbers": (answer('[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]'), READ_A),
    "five numbers": (answer('[{"bbox_2d": [1, 2, 3, 4, 5], "point_2d": [1, 2]}]'), READ_A),
    "box is a number": (answer('[{"bbox_2d": 1, "point_2d": [1, 2]}]'), READ_A),
    "box is an object": (answer('[{"bbox_2d": {"a": 1, "b": 2, "c": 3, "d": 4}, "point_2d": [1, 2]}]'), READ_A),
    "nested box": (answer('[{"bbox_2d": [[1, 2, 3, 4]], "point_2d": [1, 2]}]'), READ_A),
    "bool": (answer('[{"bbox_2d": [true, false, 3, 4], "point_2d": [1, 2]}]'), READ_A),
    "one bad object of two": (answer('[{"bbox_2d": "?"}, {"point_2d": [1, 2]}]'), [{}, *READ_A]),
    "inside out is numbers": (answer('[{"bbox_2d": [3, 4, 1, 2]}]'), [{"bbox_2d": [3.0, 4.0, 1.0, 2.0]}]),
    "floats, negative": (answer('[{"point_2d": [-1.5, 2e1]}]'), [{"point_2d": [-1.5, 20.0]}]),
    "NaN": (answer('[{"point_2d": [NaN, 2]}]'), None),
    "NaN elsewhere": (answer('[{"score": NaN, "point_2d": [1, 2]}]'), None),
    "Infinity": (answer('[{"point_2d": [Infinity, 2]}]'), None),
    "-Infinity": (answer('[{"point_2d": [1, -Infinity]}]'), None),
    "1e999": (answer('[{"point_2d": [1e999, 2]}]'), [{}]),
    "100000": (answer('[{"point_2d": [100000, -100000]}]'), [{"point_2d": [1e5, -1e5]}]),
    "100001": (answer('[{"point_2d": [100001, 2]}]'), [{}]),
    "400 digits": (answer('[{"point_2d": [%s, 2]}]' % ("9" * 400)), [{}]),
    "5,000 digits": (answer('[{"point_2d": [%s, 2]}]' % ("9" * 5000)), [{}]),
    "5,000 zeros behind the point": (answer('[{"point_2d": [1.%s, 2]}]' % ("0" * 5000)), READ_A),
    "120 objects": (answer("[" + ",".join(["{}"] * 120) + "]"), [{}] * 120),
    "121 objects": (answer("[" + ",".join(["{}"] * 121) + "]"), None),
    "depth 100": (answer('[{"a": %s, "point_2d": [1, 2]}]' % ("[" * 98 + "]" * 98)), READ_A),
    "depth 9,000": (answer("[" * 9000 + "]" * 9000), None),
    "longest answer": (answer(A + " " * (22_000 - len(A))), READ_A),
    "lone surrogate": (answer('[{"label": "\ud800", "point_2d": [1, 2]}]'), READ_A),
    "control character": (answer('[{"label": "\x01", "point_2d": [1, 2]}]'), None),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_read_answer(case):
    text, expected = ANSWERS[case]
    assert read_answer(text, "grounding") == expected


def test_120_objects_fit_in_every_layout():
    """The bound on the answer's length must not cut what the bound on its objects allows."""
    objects = [{"bbox_2d": [1000] * 4, "point_2d": [1000] * 2}] * 120
    for indent in (None, 2, 4):
        assert len(read_answer(answer(json.dumps(objects, indent=indent)), "gui")) == 120


@pytest.mark.parametrize("text, expected", [
    ("<think>a</think><answer></answer>", True),
    (" \n<think>a\nb</think> \n\t <answer>\n[]</answer>\n ", True),
    ("<think>狗</think><answer>[]</answer>", True),
    ("<think></think><answer>[]</answer>", False),
    ("<think> \n</think><answer>[]</answer>", False),
    ("<think>... _ !</think><answer>[]</answer>", False),
    ("<think>a</think>so<answer>[]</answer>", False),
    ("so<think>a</think><answer>[]</answer>", False),
    ("<think>a</think><answer>[]</answer>so", False),
    ("<answer>[]</answer><think>a</think>", False),
    ("<think>a</think><answer>[]", False),
    ("<think>a<answer>[]</answer>", False),
    ("a</think><answer>[]</answer>", False),
    ("<think>a</think>[]</answer>", False),
    ("<think>a<answer>[]</answer></think>", False),
    ("<think>a</think><answer>[]</answer><answer>[]</answer>", False),
    ("<think>a</think><think>b</think><answer>[]</answer>", False),
    ("<think>a<think>b</think><answer>[]</answer>", False),
    ("<think>a</think><answer>[]</answer></answer>", False),
    ("", False),
])
def test_has_thinking(text, expected):
    assert has_thinking(text) is expected


@pytest.mark.parametrize("prose, expected", [
    ("", 1), ("One. Two. Three.", 1), ("......!!??\n\n\n", 1),
    ("A dog. A dog.", 1),                            # said again once: forgiven
    ("A dog. A dog. A dog.", 0),
    ("A dog! A cat? A dog. A cat.", 0),              # two sentences said again
    ("A dog.A dog.A dog.", 0), ("a dog\nA DOG\n a  Dog", 0), ("狗。狗。狗。", 0), ("a dog a dog a dog", 1),
    ("Scores 0.5, 0.5, 0.5, 0.5, 0.5 here.", 1),     # points inside numbers end no sentence
])
def test_non_repeat(prose, expected):
    assert non_repeat(prose) == non_repeat(completion([DOG], prose)) == expected


def test_non_repeat_leaves_the_answer_out():
    pretty = json.dumps([DOG] * 5, indent=1)
    assert non_repeat(completion(pretty)) == 1                         # equal lines, but no prose
    assert non_repeat(f"<answer>{pretty}") == 1                        # cut off by the length limit
    assert non_repeat(f"A dog. A dog.{completion(pretty, 'A dog.')}") == 0


# ---- Thresholds and frames ------------------------------------------------------------------------------------------
BOX = [100, 100, 300, 300]


@pytest.mark.parametrize("predicted, expected", [
    (thing([100, 100, 300, 300]), 3),
    (thing([100, 100, 300, 200], [200, 150]), 0),                      # IoU exactly 0.5, L1 25, point 50 away
    (thing([100, 100, 300, 202], [200, 201]), 2),                      # IoU 0.51, L1 24.5, point 1 away
    (thing([110, 110, 310, 310], [200, 200]), 2),                      # L1 exactly 10
    (thing([109, 110, 310, 310], [200, 200]), 3),
    (thing(BOX, [230, 200]), 2),                                       # point exactly 30 away
    (thing(BOX, [229, 200]), 3),
    (thing(BOX, [221, 221]), 3), (thing(BOX, [222, 222]), 2),          # 29.7 and 31.1 away, straight line
    (thing([210, 100, 410, 300], [209, 200]), 0),                      # near the label's point, outside its own box
    (thing([210, 100, 410, 300], [210, 200]), 1),                      # on the edge of its own box
    (thing([300, 300, 100, 100], [200, 200]), 0),                      # inside out
    (thing([300, 100, 100, 300], [200, 200]), 0),
    (thing([200, 100, 200, 300], [200, 200]), 0),                      # no area
])
def test_thresholds(predicted, expected):
    assert accuracy([predicted], [thing(BOX)]) == expected


def test_inside_out_copy_of_a_thin_label_earns_no_l1():
    thin = thing([100, 100, 102, 300])
    assert accuracy([thing([102, 100, 100, 300])], [thin]) == 0
    assert accuracy([thin], [thin]) == 3


@pytest.mark.parametrize("width, height", [(840, 840), (420, 840), (1000, 1000), (1680, 420), (56, 28)])
def test_frames_scale_x_and_y_separately(width, height):
    """The same picture, in another frame, earns the same; offsets straddle both pixel thresholds in x and in y."""
    def move(numbers):
        return [number * (width, height)[i % 2] / 840 for i, number in enumerate(numbers)]
    expected = {(9, 9, 21): 3, (11, 11, 21): 2, (19, 0, 21): 3, (0, 19, 21): 3, (0, 21, 21): 2, (21, 0, 21): 2,
                (0, 0, 22): 2}
    for (dx, dy, off), worth in expected.items():
        box, point = [100 + dx, 100 + dy, 300 + dx, 300 + dy], [200 + off, 200 + off]
        assert accuracy([thing(move(box), move(point))], [thing(move(BOX))], frame=(width, height)) == worth


def test_thresholds_can_be_set():
    near = thing([105, 100, 305, 300], [204, 200])
    assert accuracy([near], [thing(BOX)]) == 3
    assert accuracy([near], [thing(BOX)], iou_above=0.97) == 2
    assert accuracy([near], [thing(BOX)], l1_below=2.5) == 2
    assert accuracy([near], [thing(BOX)], distance_below=4) == 2


# ---- Matching and IoU against brute force ---------------------------------------------------------------------------
def best_sum(gain) -> int:
    n, m = gain.shape
    if n > m:
        return best_sum(gain.T)
    return max(sum(gain[i, j] for i, j in enumerate(columns)) for columns in itertools.permutations(range(m), n))


def check_match(gain):
    pairs = match(gain)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert all(gain[pair] > 0 for pair in pairs) and pairs == sorted(pairs)
    return sum(gain[pair] for pair in pairs)


def test_match_is_best():
    rng = np.random.default_rng(0)
    for _ in range(600):
        shape, top = rng.integers(1, 7, size=2), rng.choice([1, 3, 3, 9])
        gain = rng.integers(0, top + 1, size=shape) * (rng.random(shape) < rng.random())
        assert check_match(gain) == best_sum(gain), gain


def test_match_agrees_with_scipy():
    """Sums of scipy's matching, where scipy is installed: sizes that brute force cannot do."""
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)
    for n, m in rng.integers(1, 60, size=(200, 2)):
        gain = rng.integers(0, 4, size=(n, m)) * (rng.random((n, m)) < rng.random())
        assert check_match(gain) == gain[scipy.linear_sum_assignment(gain, maximize=True)].sum()


def test_match_large_and_odd():
    rng = np.random.default_rng(1)
    for n, m in [(120, 120), (120, 7), (7, 120)]:                      # a hidden perfect matching among smaller gains
        gain, rows = rng.integers(0, 3, size=(n, m)), rng.permutation(n)[:min(n, m)]
        gain[rows, rng.permutation(m)[:min(n, m)]] = 3
        assert check_match(gain) == 3 * min(n, m)
    for shape in [(0, 4), (4, 0), (0, 0), (3, 2)]:
        assert match(np.zeros(shape)) == []
    assert match(np.eye(2) > 0) == [(0, 0), (1, 1)]


def test_iou_counts_pixels():
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 12, size=(2, 40, 4))               # inside-out and empty boxes among them

    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    expected = [[len(pixels(a) & pixels(b)) / max(1, len(pixels(a) | pixels(b))) for b in second] for a in first]
    np.testing.assert_allclose(iou(first, second), expected, atol=1e-12)
    np.testing.assert_allclose(iou(first * 1000, second * 1000), expected, atol=1e-12)
    assert iou(first, first).max() == 1 and iou(np.zeros((0, 4)), first).shape == (0, 40)
    assert iou([BOX], [BOX, [0, 0, 1, 1]]).tolist() == [[1, 0]]


# ---- Counting ----------------------------------------------------------------------------------------
POINTS = [{"point_2d": [100, 100]}, {"point_2d": [400, 400]}]


@pytest.mark.parametrize("said, label, expected", [
    (json.dumps([DOG, CAT]), [DOG, CAT], (2, 3)), (json.dumps([DOG, CAT]), "2", (2, 3)), ("2", "2", (2, 3)),
    ("2", [DOG, CAT], (2, 1)), ("3", [DOG, CAT], (2, 0)), (json.dumps([DOG]), "2", (2, 0)), ("3", "2", (2, 0)),
    (" 02 ", "2", (2, 3)), ("two", "2", (0, 0)), ("2.0", "2", (0, 0)), ("-2", "2", (0, 0)), ("99999", "2", (0, 0)),
    ("[]", "0", (2, 3)), ("[]", "2", (0, 0)), ("0", [], (2, 1)), ("[]", [], (2, 3)), ("0", "0", (2, 3)), ("٢", "2", (0,
    0)),
    (json.dumps(POINTS), "2", (1, 3)), (json.dumps([DOG, FAR]), [DOG, CAT], (2, 1.5)),
])
def test_counting(said, label, expected):
    """(format, accuracy): a number or a list is an answer; a number alone earns little where objects can be shown."""
    found = score(completion(said), label, kind="count")
    assert (found["format"], found["accuracy"]) == expected
    assert found["thinking"] == found["non_repeat"] == 1 and list(found) == list(RANGES)


# ---- Mathematics -----------------------------------------------------------------------------------------------------
needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


@needs_math_verify
def test_math_rewards_are_three_ones():
    good = "<think>half</think>\n<answer> \\frac{1}{2} </answer>"
    assert score(good, "0.5", kind="math") == {"thinking": 1, "format": 1, "accuracy": 1}
    long = "the longest side of the triangle, " * 10
    assert score(f"<answer>{long}</answer>", long, kind="math")["accuracy"] == 1
    for text, expected in ((good.replace("1}", "3}"), (1, 1, 0)), ("<answer>\\boxed{0.5}</answer>", (0, 1, 1)),
                           ("<think>a</think><answer>0.5</answer>", (1, 1, 1)), ("0.5", (0, 0, 0)),
                           ("<think><answer>0.5</answer></think>", (0, 0, 0)), ("<answer>0.5", (0, 0, 0)),
                           ("<think>a</think><answer>0.5</answer><answer>7</answer>", (0, 1, 0)),
                           ("<think>a</think><answer>\\boxed{0.5} \\boxed{7}</answer>", (1, 1, 0)),
                           ("<think>a</think><answer>\\boxed{}</answer>", (1, 1, 0)),
                           ("<think>a</think><answer> </answer>", (1, 0, 0))):
        assert tuple(score(text, "0.5", kind="math").values()) == expected, text
    assert read_answer("<answer>\nso \\text{a {b}} c </answer>", "math") == r"so \text{a {b}} c"


SAME = [
    ("1/2", "0.5"), ("10%", "0.1"), ("10%", "10"), ("(A)", "A"), ("1,234", "1234"), (r"\frac{1}{2}", "1/2"),
    (r"\frac12", ".5"), (r"\dfrac{3}{4}", "0.75"), (r"1\frac{1}{2}", "1.5"),
    (r"2\sqrt{3}", r"2\sqrt3"), (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("2^{10}", "1024"), (r"1.5\times10^{3}", "1500"),
    ("5 cm", "5"), ("5cm", "5 cm"), (r"5\text{ cm}", "5 cm"), ("5 hours", "5 hour"), ("24 coins", "24"),
    ("x=5", "5"), ("x = 5", "x=5.0"), ("12,000,000", "12000000"),
    ("(1, 2)", "(1,2)"), ("(1/2, 3)", "(0.5, 3)"), ("1, 2, 3", "1,2,3"), ("Yes.", "yes"), ("  Blue ", "blue"),
    (r"90^\circ", "90"), ("50 percent", "1/2"), ("3:4", "3 : 4"), (r"\boxed{24}", "24"),
    (r" \boxed{\frac{1}{2}}.", "0.5"),
    ("2x", "2 x"), ("x^2+1", "x^{2} + 1"), ("2.50", "2.5"), ("-0", "0"), (r"\left(1,2\right)", "(1,2)"), ("1{,}000",
    "1000"),
    ("145°", "145"), ("145°", r"145^\circ"), ("30厘米", "30"), ("4π", r"4\pi"), ("-3", "−3"), ("(3,-2)", "(3,−2)"),
    ("√2", r"\sqrt{2}"), ("2√3", r"\sqrt{12}"), ("√12", r"\sqrt{12}"), ("5√１３", r"5\sqrt{13}"),
    ("√(12)", r"2\sqrt{3}"), ("√2.25", "1.5"), ("√{12}", r"2\sqrt{3}"), ("√3/2", r"\frac{\sqrt{3}}{2}"), ("√x", r"\sqrt{x}"),
    ("３０", "30"), ("（１，２）", "(1,2)"), (r"\$24", "24"), ("$24", "24"),
    (r"\sqrt [ 3 ] { 2 }", r"\sqrt[3]{2}"), (r"m\angle A = 50", "50"), ("∠ABC = 30°", "30"), ("5!", "120"),
    ("x≥2", r"x\ge 2"), (r"\cos x", r"\cos(x)"), ("10 cm²", "10"),
    ("2^{100}", "1267650600228229401496703205376"), ("答案。", "答案。"),
    ("(3+4)*2", "14"), ("$7$", "7"), (r"\text{(B)}", "B"), ("B.", "B"), ("b", "B"),
    ("x(x+1)", "x^2+x"), (r"\frac{2}{\sqrt{2}}", r"\sqrt2"), ("{1, 2}", "{2, 1}")]
DIFFERENT = [
    ("1/2", "2"), ("1/2", "0.05"), ("0.333", "1/3"), ("10%", "1"), ("10%", "100"), ("(A)", "B"), ("Blue", "B"), ("AB",
    "A"),
    ("12 million", "12"), ("x=5", "y=5"), ("x=5", "6"), ("(1,2)", "(2,1)"), ("1 1/2", "1"),
    ("(1,2)", "[1,2]"), ("1,2", "1"), ("yes", "no"), ("3.14", r"\pi"), ("2x", "2"), ("-5", "5"), ("9^9^9^9", "1"),
    (r"\sqrt{-1}", "1"), ("1/0", "0"), ("3:4", "4:3"), ("12345678901", "12345678902"), ("", "0"), ("0", ""), ("x^2",
    "x2"),
    (".5", "5"), (r"2\boxed{4}", "24"),
    ("1.5", "15"), ("1,5", "15"), ("12", "1 2"), ("1 2", "3"), ("nan", "0"), ("inf", "1e999"), ("1e400", "2e400"),
    ("((1)", "1"),
    ("145°", "146"), ("30厘米", "31"), ("4π", "4"), ("−3", "3"), ("√2", "2"), ("√12", "2"), ("√10", "0"), ("√25", "√2·5"), ("３０", "31"),
    (r"\sqrt[3]{2}", r"\sqrt{2}"),
    ("10²", "102"), ("abc", "cba"), ("1  2", "3"), ("1 1/2", "5.5"),
    ("5 or 6", "5"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("A", "24"), ("dog", "god"), ("ABC", "BAC"), ("north east",
    "east north"), ("2 apples", "3 apples"), ("(B) 24", "25"), ("B 24", "24")]


@needs_math_verify
@pytest.mark.parametrize("same, pairs", [(True, SAME), (False, DIFFERENT)])
def test_pairs_of_short_answers(same, pairs):
    assert [pair for pair in pairs if same_answer(*pair) != same or same_answer(*pair[::-1]) != same] == []


def test_a_label_equals_itself_without_any_help(monkeypatch):
    """Issue 14: `B. 24`, `A. 12` and `{1,2}` did not. Math-verify is not asked."""
    monkeypatch.setattr(rewards, "equal_formulas", None)
    for label in ("B. 24", "A. 12", "{1,2}", "24", "a dog", r"\frac{1}{2}", r"9^{9^{9^9}}", "100!", r"\begin{x}", "½",
                  "?", "x" * 5000,
                  r"\text{(B)}", "A.", "12 cm", "(1, 2]", "$", "1,234 %", "\ud800"):
        for text in (label, f" {label} ", f"\\boxed{{{label}}}"):
            assert same_answer(text, label) and same_answer(label, text), text
            assert same_answer(text, label, choices=["12", "24", label, "36"])


@needs_math_verify
def test_a_choice_is_its_letter_or_its_text():
    choices = ["12", "24", r"\frac{1}{2}", "a dog"]
    for text in ("B", "(B)", "B.", "B)", "b", "24", "24.0", r"\boxed{B}", r"\boxed{24}"):
        assert same_answer(text, "B", choices) and same_answer(text, "24", choices), text
        assert not same_answer(text, "A", choices) and not same_answer(text, "a dog", choices), text
    assert same_answer("0.5", "C", choices) and same_answer("D", "A dog", choices) and same_answer("c", r"\dfrac12",
    choices)
    for text in ("B. 36", "E", "", "(C) 24", "BB", "B 2", "A or B", "1", "2"):
        assert not same_answer(text, "24", choices), text
    assert same_answer("B", "B", ["B", "A"]) and not same_answer("A", "B", ["B", "A"])
    completion = "<think>two dozen</think><answer>B</answer>"
    assert score(completion, "24", "math", choices=choices)["accuracy"] == 1
    assert score(completion, "24", "math", choices=choices[::-1])["accuracy"] == 0


@needs_math_verify
@pytest.mark.parametrize("choices, label, right, wrong", [
    (["trout", "heron", "otter"], "otter", ["C", "(c)", "C.", "2", "Otter."], ["A", "0", "1", "trout", "3", "D"]),
    (["trout", "heron", "otter"], "2", ["C", "otter"], ["A", "B", "trout"]),          # a label that is an index itself
    (["Down.", "Up."], "B", ["Up", "up.", "1", "b"], ["Down.", "A", "0"]),            # choices that are sentences
    (["3", "4", "5"], "4", ["4", "B", "4.0"], ["1", "C", "5", "0"]),                  # a text, not the index of 5 or 3
    (["3", "4", "5"], "A", ["3", "a"], ["0", "4"]),
    (["2 cm", "3 cm", "4 cm"], "A", ["2", "2 cm", "A"], ["0", "C", "4"]),           # numbers with units are no indices
    (["B", "A", "C"], "A", ["A", "1"], ["B", "C", "0"]),                                        # points: their names, not letters
    ([f"no {word}" for word in "abcdefghijklmnopqrstuvwxyz"], "no z", ["Z", "25", "no z"], ["A", "24", "26"]),
    (["１０", "√2"], "B", [r"\sqrt{2}", "√2"], ["10", "A"]),
])
def test_a_choice_is_its_text_its_letter_or_its_index(choices, label, right, wrong):
    """In this order: choices may be numbers, or letters in another order."""
    assert [text for text in right if not same_answer(text, label, choices)] == []
    assert [text for text in wrong if same_answer(text, label, choices)] == []


def test_what_is_no_formula_never_reaches_math_verify(monkeypatch):
    """It multiplies the letters of words and adds 1 and 2 of `1 2`; half a second for each page of text would be long."""
    monkeypatch.setattr(rewards, "equal_formulas", None)
    for text in ("god", "north east", "1 1/2", "1  2", "1\n2", "1+" * 101, "x\n" * 300):
        assert not same_answer(text, "3") and not same_answer("3", text)


@needs_math_verify
def test_a_pair_that_takes_too_long_is_not_equal():
    """And the answers after it are right. Half a second of CPU is what one may take."""
    for text in ("9^{9^{9^9}}", "99999999!", "(x+y+z+w)^{99}"):
        before = os.times()
        assert score(f"<answer>{text}</answer>", "7y+1", "math")["accuracy"] == 0
        after = os.times()
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1
        assert same_answer("x(x+1)", "x^2+x") and not same_answer("x(x+1)", "x^2") and same_answer("17", "17.0")


FAKE = """
import itertools, os, signal
def parse(text, **options): return text.strip("$")
def verify(gold, answer, **options):
    if gold == "loop 1": sum(itertools.repeat(0))      # for ever, in C: Python handles no signals
    if gold == "raise 1": raise MemoryError
    if gold == "leave 1": raise SystemExit(0)
    if gold == "interrupt 1": os.kill(os.getpid(), signal.SIGINT)
    if gold == "crash 1": os.kill(os.getpid(), signal.SIGKILL)
    return gold == answer
"""


@pytest.fixture
def fake_judge(tmp_path, monkeypatch):
    """A math_verify of our own, which does what no real pair does for sure."""
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    rewards.equal_formulas.cache_clear()
    yield
    sys.modules.pop("math_verify", None)
    rewards.equal_formulas.cache_clear()


def test_a_pair_that_breaks_its_judge_is_not_equal(fake_judge):
    """Whatever happens to the process that judges; the next pair gets a judge of its own."""
    judged = rewards.equal_formulas.__wrapped__
    assert judged("1", "1") and not judged("1", "2")
    for fatal in ("loop 1", "raise 1", "leave 1", "interrupt 1", "crash 1"):
        start = time.monotonic()
        assert same_answer("1", fatal) is False, fatal
        assert fatal != "loop 1" or 0.4 < time.monotonic() - start < 10
        assert same_answer(fatal, fatal), "equal texts need no judge"
    assert same_answer("1", "2") is False
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)       # no process of ours waits to be reaped


def test_without_math_verify_there_is_an_error(tmp_path, monkeypatch):
    """Not a reward of 0 for everything."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rewards.equal_formulas.cache_clear()
    for _ in range(2):
        with pytest.raises(ImportError, match="math_verify"):
            same_answer("2x", "x+x")
        with pytest.raises(ImportError, match="math_verify"):
            score("<answer>2x</answer>", "x+x", "math")


def test_judging_leaves_buffered_output_alone(tmp_path):
    """A fork has a copy of what was written but not flushed: it must not come out twice."""
    (tmp_path / "math_verify.py").write_text(FAKE)
    code = f"""import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
import rewards
atexit.register(print, "the end")
print("once", end=" ")
print("error", file=sys.stderr, end=" ")
for pair in (("2x", "x+x"), ("2", "raise 1"), ("2", "leave 1"), ("2", "crash 1")):
    print(rewards.same_answer(*pair), end=" ")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "once False False False False the end\n" and run.stderr == "error "


@needs_math_verify
def test_threads_may_score_at_once():
    """Each pair has a process of its own, so answers are never swapped."""
    pairs = [(f"{n}x", f"x+{n - 1}x", True) for n in range(2, 10)]
    pairs += [(f"{n}x", f"x+{n}x", False) for n in range(2, 10)]
    found = {}

    def judge(number):
        for first, second, _ in pairs:
            found[number, first, second] = same_answer(first, second)

    threads = [threading.Thread(target=judge, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {(number, *pair): same for number in range(4) for *pair, same in pairs}


@needs_math_verify
def test_math_verify_leaves_signals_alone():
    """Our handlers survive it, and so do our timers."""
    def ours(number, frame):
        pass

    numbers = (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.signal(number, ours) for number in numbers]
    try:
        assert same_answer("x(x+1)", "x^2+x") and not same_answer("9^{9^{9^9}}", "1")
        assert [signal.getsignal(number) for number in numbers] == [ours] * len(numbers)
        assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def random_expression(rng: random.Random) -> str:
    parts = [*r"0123456789+-*/^(){}[].,%$ =\:!_|<>&#~'", r"\frac", r"\sqrt{", r"\sqrt[", r"\boxed{", r"\text{", r"\pi",
             "9^", "^{99}", "^{x}", "_{2}", "cm", "x", "A",
             "١", "²", "√", "\ud800", "\0", "\n", "1" * 50, "((((", "a/", "-" * 40, r"\left(", r"\right)", r"\sin ",
             r"\log_", r"\infty", "<=", "e"]
    return "".join(rng.choices(parts, k=rng.randint(0, 40)))


@needs_math_verify
def test_hostile_mathematics():
    """Random texts never raise and equal themselves; many of them are put to math-verify."""
    rng, asked = random.Random(0), 0
    for number in range(10_000):
        a = random_expression(rng)
        assert same_answer(a, f" {a} ")
        if number % 160 == 0:
            assert same_answer(a, "12") in (True, False) and same_answer("2x", a) in (True, False)
            asked += not rewards.NO_FORMULA.search(rewards.meaning(a, ()))
    assert asked > 50
    for unit in ("(", "9^", "\\frac{", "{", "1,", "a ", "1 ", "m", "ab/", "-", "2pi", "sqrt", "\\text{", "x=", "1 1/",
                 "a b", "\\boxed{", "\\boxed{1}", "\\", "$", "^"):
        for text in ("1 " + unit * (180 // len(unit)), unit * (20_000 // len(unit))):
            assert same_answer(text, "12") is False and same_answer("12", text) is False
            score(f"<answer>{text}</answer>", "12", kind="math")
            score(f"<answer>\\boxed{{{text}}}</answer>", "12", kind="math")
            score(f"<answer>{text}</answer>", "12", kind="count")
    assert same_answer("x(x+1)", "x^2+x") and not same_answer("x(x+1)", "x^2")


# ---- Hostile completions --------------------------------------------------------------------------------------------
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "[", "]", "{", "}", ",", ":", " ", "\n", ".",
          '"', '"bbox_2d"', '"point_2d"', "[100, 100, 300, 300]", "[200, 200]", json.dumps(DOG), json.dumps([DOG, CAT]),
          "[]", "NaN", "-Infinity", "1e999", "-0", "1e5", "9" * 400, "9" * 5000, "true", "null", "I see a dog.", "狗。",
          "\0", "\x1b", "\u2028", "\ud800", "\\ud800", "\\", "İ", "<", ">", "[" * 500, '{"a":' * 300]
MANY = [thing([i, i, 100 + i, 100 + i]) for i in range(120)]


def repeats(item: str) -> int:
    return 22_000 // (len(item) + 1) - 2


HEAVY = {
    "100,000 boxes": lambda: completion([DOG] * 100_000),
    "120 boxes, 120 labels": lambda: completion(MANY),
    "120 equal boxes": lambda: completion([MANY[60]] * 120),
    "120 boxes reversed, with prose": lambda: completion(MANY[::-1], "".join(f"a{i}. " for i in range(2500))),
    **{f"longest list of {item}": lambda item=item: completion("[" + (item + ",") * repeats(item) + "1]")
       for item in ("1", "-1e1", "[]", "{}", '""', '{"":0}')},
    "18,000 digits": lambda: completion('[{"bbox_2d": [%s, 0, 1, 1]}]' % ("9" * 18_000)),
    "deep lists": lambda: completion("[" * 10_990 + "]" * 10_990),
    "deep objects": lambda: completion('{"a":' * 3_900),
    "megabytes of deep lists": lambda: completion("[" * 2_000_000),
    "megabytes of text": lambda: "I see a dog. " * 400_000,
    "megabytes of digits": lambda: completion("[" + "9" * 5_000_000 + "]"),
    "megabytes of white space": lambda: "<think>a</think>" + " " * 5_000_000 + "<answer>[]</answer>",
    **{f"only {unit!r}": lambda unit=unit: unit * (30_000 // len(unit))
       for unit in ("<think>", "<answer>", "<think></think>", "<answer></answer>", ".", "1.", " ", "\n", "狗。", "İ",
                    "<", "a b ", "\0", "</think><answer>[]</answer><think>")},
    "only short sentences": lambda: " ".join(f"{i:x}." for i in range(5_000)),
    "white space between the parts": lambda: "<think>a</think>" + " " * 29_900 + "<answer>[]</answer>",
    "white space and no answer": lambda: " " * 9_000 + "<think>a</think>" + " " * 20_000 + "</answer><answer>",
}


def random_completion(rng: random.Random) -> str:
    """Pieces of grammar in any order, or a good completion with some characters or pieces changed."""
    if rng.random() < 0.4:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 25)))
    objects = [thing([rng.randint(-50, 900) for _ in range(4)]) for _ in range(rng.randint(0, 6))]
    text = completion(rng.choice([objects, [DOG], [CAT, DOG], json.dumps(objects, indent=2)]))
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(text) + 1)
        new = rng.choice(["", rng.choice(PIECES), chr(rng.randrange(0x3000)), text[:start][-30:]])
        text = text[:start] + new + text[start + rng.randint(0, 12):]
    return text


def check_score(text: str, label: list, frame) -> tuple[float, float]:
    """Score it, check every component, and return the reward and the milliseconds of CPU time that scoring took."""
    start = time.thread_time()
    result = score(text, label, frame=frame)
    spent = time.thread_time() - start
    assert list(result) == list(RANGES), text[:500]
    for name, (low, high) in RANGES.items():
        assert type(result[name]) is float and math.isfinite(result[name]) and low <= result[name] <= high, text[:500]
    return sum(result.values()), 1000 * spent


@pytest.mark.filterwarnings("error")                  # a numpy warning would mean NaN or infinity got into the sums
def test_hostile_completions():
    """20,000 random, broken and hostile completions: no exception, every component finite and within its range."""
    rng, slowest, full = random.Random(0), {"random": 0.0}, 0
    for _ in range(20_000):
        label = rng.choice([[], [DOG], [DOG, CAT], [DOG, DOG, FAR]])
        reward, spent = check_score(random_completion(rng), label, rng.choice([(840, 840), (1000, 500)]))
        slowest["random"] = max(slowest["random"], spent)
        full += reward == MAX_REWARD
    for kind, make in HEAVY.items():
        text = make()
        slowest[kind] = max(min(check_score(text, label, (840, 840))[1] for _ in range(3)) for label in ([], [DOG],
        MANY))
    assert full > 300, "the fuzz should reach good answers too"
    ranking = sorted(slowest, key=slowest.get, reverse=True)
    print("\nslowest completions:", *(f"{slowest[kind]:.2f} ms {kind}" for kind in ranking[:6]), sep="\n  ")
