"""rewards.py: what every kind of answer earns, that nothing hostile breaks or fools it, and that the matching is best.

Run with `python -m pytest tests/test_rewards.py -q`; add `-s` to see the slowest completion of the fuzz test.
"""

import doctest
import itertools
import json
import math
import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import rewards
from rewards import MAX_REWARD, RANGES, THINKING, Thresholds, has_thinking, iou, match, non_repeat, parse_answer, score
from support.answers import plain, quantity, same_answer

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


def test_doctests():
    failed, tried = doctest.testmod(rewards)
    assert failed == 0 and tried >= 3


# ---- Totals worked out by hand: (thinking, format, accuracy, non_repeat) --------------------------------------------
TOTALS = {
    "perfect": (completion([DOG]), [DOG], (1, 2, 3, 1)),
    "perfect, two in another order": (completion([CAT, DOG]), [DOG, CAT], (1, 2, 3, 1)),
    "label without a point uses the centre": (completion([DOG]), [{"bbox_2d": DOG["bbox_2d"]}], (1, 2, 3, 1)),
    "label with an empty point uses the centre": (completion([DOG]), [DOG | {"point_2d": None}], (1, 2, 3, 1)),
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
                     (1, 0, 0, 1)),
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
    "longer than the bound": (completion([DOG], "x" * rewards.MAX_TEXT), [DOG], (0, 0, 0, 0)),
}


@pytest.mark.parametrize("case", TOTALS)
def test_totals(case):
    text, label, expected = TOTALS[case]
    result = score(text, label)
    assert result == dict(zip(RANGES, expected)) | {"total": sum(expected)}
    assert list(result) == [*RANGES, "total"]


def test_right_is_never_below_wrong():
    """The known fault of others: a correct [] scored below a hallucination."""
    assert MAX_REWARD == 7
    assert score(completion([]), [])["total"] == MAX_REWARD > score(completion([DOG]), [])["total"]
    assert score(completion([FAR]), [DOG])["total"] > score(completion([]), [DOG])["total"]


def test_tasks_think_and_errors():
    assert score(completion([DOG]), [DOG], task="digits") == score(completion([DOG]), [DOG], task="grounding")
    without = score(completion([DOG]), [DOG], think=False)
    assert without == {"format": 2.0, "accuracy": 3.0, "non_repeat": 1.0, "total": 6.0}
    assert set(RANGES) - set(without) == set(THINKING)
    with pytest.raises(ValueError, match="'poetry'.*grounding, gui, anomaly, medical, digits, counting, math"):
        score("", [], task="poetry")
    with pytest.raises(ValueError, match=r"\(840, 0\)"):
        score("", [], frame=(840, 0))
    with pytest.raises(KeyError):                     # a broken label is our fault, not the policy's: never swallowed
        score(completion([DOG]), [{"box": [1, 2, 3, 4]}])


def test_inputs_are_left_alone():
    label = [json.loads(json.dumps(DOG))]
    score(completion([DOG]), label, frame=(420, 210))
    assert label == [DOG]


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
    "1e999": (answer('[{"point_2d": [1e999, 2]}]'), None),
    "100000": (answer('[{"point_2d": [100000, -100000]}]'), [{"point_2d": [1e5, -1e5]}]),
    "100001": (answer('[{"point_2d": [100001, 2]}]'), None),
    "400 digits": (answer('[{"point_2d": [%s, 2]}]' % ("9" * 400)), None),
    "5,000 digits": (answer('[{"point_2d": [%s, 2]}]' % ("9" * 5000)), None),
    "5,000 zeros behind the point": (answer('[{"point_2d": [1.%s, 2]}]' % ("0" * 5000)), READ_A),
    "120 objects": (answer("[" + ",".join(["{}"] * 120) + "]"), [{}] * 120),
    "121 objects": (answer("[" + ",".join(["{}"] * 121) + "]"), None),
    "depth 8": (answer('[{"a": %s, "point_2d": [1, 2]}]' % ("[" * 6 + "]" * 6)), READ_A),
    "depth 9": (answer('[{"a": %s, "point_2d": [1, 2]}]' % ("[" * 7 + "]" * 7)), None),
    "depth 9,000": (answer("[" * 9000 + "]" * 9000), None),
    "longest answer": (answer(A + " " * (rewards.MAX_ANSWER - len(A))), READ_A),
    "too long an answer": (answer(A + " " * (rewards.MAX_ANSWER - len(A) + 1)), None),
    "lone surrogate": (answer('[{"label": "\ud800", "point_2d": [1, 2]}]'), READ_A),
    "control character": (answer('[{"label": "\x01", "point_2d": [1, 2]}]'), None),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_parse_answer(case):
    text, expected = ANSWERS[case]
    assert parse_answer(text) == expected


def test_120_objects_fit_in_every_layout():
    """The bound on the answer's length must not cut what the bound on its objects allows."""
    objects = [{"bbox_2d": [1000] * 4, "point_2d": [1000] * 2}] * 120
    for indent in (None, 2, 4):
        assert len(parse_answer(answer(json.dumps(objects, indent=indent)))) == 120


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
    assert non_repeat(f"A dog.{completion(pretty, 'A dog.')} A dog.") == 0


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
    assert accuracy([near], [thing(BOX)], thresholds=Thresholds(iou=0.97)) == 2
    assert accuracy([near], [thing(BOX)], thresholds=Thresholds(box_l1=2.5)) == 2
    assert accuracy([near], [thing(BOX)], thresholds=Thresholds(point=4)) == 2


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


def test_match_large_and_odd():
    rng = np.random.default_rng(1)
    for n, m in [(120, 120), (120, 7), (7, 120)]:                      # a hidden perfect matching among smaller gains
        gain, rows = rng.integers(0, 3, size=(n, m)), rng.permutation(n)[:min(n, m)]
        gain[rows, rng.permutation(m)[:min(n, m)]] = 3
        assert check_match(gain) == 3 * min(n, m)
    for shape in [(0, 4), (4, 0), (0, 0), (3, 2)]:
        assert match(np.zeros(shape)) == []
    assert match(np.eye(2) > 0) == [(0, 0), (1, 1)]
    for bad in (0.5, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="whole"), np.errstate(invalid="ignore"):
            match(np.array([[1, bad]]))


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


# ---- Counting and mathematics ----------------------------------------------------------------------------------------
POINTS = [{"point_2d": [100, 100]}, {"point_2d": [400, 400]}]


@pytest.mark.parametrize("said, label, expected", [
    (json.dumps([DOG, CAT]), [DOG, CAT], (2, 3)), (json.dumps([DOG, CAT]), "2", (2, 3)), ("2", "2", (2, 3)),
    ("2", [DOG, CAT], (2, 1)), ("3", [DOG, CAT], (2, 0)), (json.dumps([DOG]), "2", (2, 0)), ("3", "2", (2, 0)),
    (" 02 ", "2", (2, 3)), ("two", "2", (0, 0)), ("2.0", "2", (0, 0)), ("-2", "2", (0, 0)), ("99999", "2", (0, 0)),
    ("[]", "0", (2, 3)), ("[]", "2", (0, 0)), ("0", [], (2, 1)), ("[]", [], (2, 3)), ("0", "0", (2, 3)), ("٢", "2", (0, 0)),
    (json.dumps(POINTS), POINTS, (2, 3)), (json.dumps(POINTS), "2", (1, 3)), (json.dumps([DOG, FAR]), [DOG, CAT], (2, 1.5)),
    (json.dumps(POINTS[:1]), POINTS, (2, 1.5)), (json.dumps([{"point_2d": [129, 100]}, {"point_2d": [131, 100]}]), POINTS,
                                                (2, 1.5)),
])
def test_counting(said, label, expected):
    """(format, accuracy): a number or a list is an answer; a number alone earns little where objects can be shown."""
    found = score(completion(said), label, task="counting")
    assert (found["format"], found["accuracy"]) == expected
    assert found["thinking"] == found["non_repeat"] == 1 and list(found) == [*RANGES, "total"]


def test_math_rewards_are_three_ones():
    good = "<think>half</think><answer>so \\boxed{\\frac{1}{2}}</answer>"
    assert score(good, r"\boxed{0.5}", task="math") == {"thinking": 1, "format": 1, "accuracy": 1, "total": 3}
    assert score(good, "0.5", task="math", think=False) == {"format": 1, "accuracy": 1, "total": 2}
    long = "the longest side of the triangle, " * 5
    assert score(f"<answer>\\boxed{{{long}}}</answer>", f"\\boxed{{{long}}}", task="math")["accuracy"] == 1
    for text, expected in ((good.replace("1}", "3}"), (1, 1, 0)), ("<answer>\\boxed{0.5}</answer>", (0, 1, 1)),
                           ("<think>a</think><answer>0.5</answer>", (1, 0, 0)), ("\\boxed{0.5}", (0, 0, 0)),
                           ("<think>\\boxed{0.5}</think>", (0, 0, 0)),
                           ("<think>a</think><answer>\\boxed{0.5} \\boxed{7}</answer>", (1, 1, 0)),
                           ("<think>a</think><answer>\\boxed{0.5</answer>", (1, 0, 0)),
                           ("<think>a</think><answer>\\boxed{}</answer>", (1, 0, 0))):
        assert tuple(score(text, "0.5", task="math").values())[:3] == expected, text
    assert rewards.boxed(r"\boxed{1} and \boxed{\text{a {b}} c} d") == r"\text{a {b}} c"


SAME = [
    ("1/2", "0.5"), ("10%", "0.1"), ("10%", "10"), ("(A)", "A"), ("1,234", "1234"), (r"\frac{1}{2}", "1/2"),
    (r"\frac12", ".5"), (r"\dfrac{3}{4}", "0.75"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", "3/2"), ("-1 1/2", "-1.5"),
    (r"2\sqrt{3}", r"2\sqrt3"), (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"), (r"\sqrt[3]{8}", "2"), ("√2", r"\sqrt{2}"),
    (r"\frac{\pi}{4}", "π/4"), ("2^{10}", "1024"), ("10^3", "1e3"), (r"1.5\times10^{3}", "1500"), ("2²", "4"),
    ("5 cm", "5"), ("5cm", "5 cm"), (r"5\text{ cm}", "5 cm"), ("5 hours", "5 hour"), ("24 coins", "24"),
    ("12 cm^2", "12 cm²"), ("3 km/h", "3"), ("12 million", "12,000,000"), ("x=5", "5"), ("x = 5", "x=5.0"),
    ("(1, 2)", "(1,2)"), ("(1/2, 3)", "(0.5, 3)"), ("1, 2, 3", "1,2,3"), ("Yes.", "yes"), ("  Blue ", "blue"),
    (r"90^\circ", "90"), ("90°", "90 degrees"), (r"\$5", "5 dollars"), ("50 percent", "1/2"), ("3:4", "3 : 4"),
    ("2x", "2 x"), ("x^2+1", "x^{2} + 1"), ("2.50", "2.5"), ("-0", "0"), (r"\left(1,2\right)", "(1,2)"), ("1{,}000", "1000"),
    ("(3+4)*2", "14"), ("$7$", "7"), ("−3", "-3"), (r"\text{(B)}", "B"), ("(B) 24", "B"), ("B.", "B"), ("b", "B")]
PREFIXED = [("(B) 24", "24"), ("B. 1/2", "0.5"), ("C: blue", "Blue")]
DIFFERENT = [
    ("1/2", "2"), ("1/2", "0.05"), ("0.333", "1/3"), ("10%", "1"), ("10%", "100"), ("(A)", "B"), ("Blue", "B"), ("AB", "A"),
    ("5 cm", "5 m"), ("5 hours", "5 minutes"), ("12 million", "12"), ("x=5", "y=5"), ("x=5", "6"), ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"), ("1,2", "1"), ("yes", "no"), ("3.14", r"\pi"), ("2x", "2"), ("-5", "5"), ("9^9^9^9", "1"),
    (r"\sqrt{-1}", "1"), ("1/0", "0"), ("3:4", "4:3"), ("12345678901", "12345678902"), ("", "0"), ("0", ""), ("x^2", "x2"),
    ("1.5", "15"), ("1,5", "15"), ("12", "1 2"), ("nan", "0"), ("inf", "1e999"), ("1e400", "2e400"), ("((1)", "1"),
    ("5 or 6", "5"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("A", "24"), ("1:2", "0.5"), ("2 apples", "3 apples"), ("(B) 24", "25"), ("B 24", "24")]


@pytest.mark.parametrize("same, pairs", [(True, SAME), (True, PREFIXED), (False, DIFFERENT)])
def test_pairs_of_short_answers(same, pairs):
    assert len(SAME) + len(DIFFERENT) >= 60
    wrong = [pair for pair in pairs if same_answer(*pair) != same]
    # turned round, too, but for choices: a label has no letter before its words
    wrong += [(b, a) for a, b in pairs if b not in "Bb" and pairs is not PREFIXED and same_answer(b, a) != same]
    assert not wrong


def test_short_answers_are_compared_in_milliseconds_whatever_they_hold():
    rng, pieces = random.Random(0), [*r"0123456789+-*/^(){}[].,%$ =\:", r"\frac", r"\sqrt{", r"\boxed{", r"\text{", "pi", "9^",
                                     "cm", "million", "x", "A", "١", "²", "\ud800", "\0", "1" * 50, "((((", "a/", "-" * 40]
    slowest = 0
    for number in range(20_000):
        a, b = ("".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(2))
        start = time.perf_counter()
        assert same_answer(a, b) in (True, False)
        assert same_answer(a, a) or not a.strip() or quantity(plain(a)) is None or len(a) > 120
        slowest = max(slowest, time.perf_counter() - start)
    for unit in ("(", "9^", "\\frac{", "{", "1,", "a ", "1 ", "m", "ab/", "-", "2pi", "sqrt", "\\text{", "x=", "1 1/", "a b"):
        for text in (unit * (120 // len(unit)), "1 " + unit * (118 // len(unit)), unit * (119 // len(unit)) + "!"):
            score(f"<answer>\\boxed{{{text}}}</answer>", "12", task="math")
            times = []
            for _ in range(3):
                start = time.perf_counter()
                same_answer(text, "12"), same_answer("12", text), same_answer(text, text)
                times.append(time.perf_counter() - start)
            slowest = max(slowest, min(times))
    for text in ("\\boxed{" * 3000, "\\boxed{1}" * 2000, "{" * 20_000, "\\boxed{" + "9" * 20_000 + "}"):
        start = time.perf_counter()
        score(f"<answer>{text}</answer>", r"\boxed{12}", task="math")
        score(f"<answer>{text}</answer>", "12", task="counting")
        slowest = max(slowest, (time.perf_counter() - start) / 2)
    print(f"\nslowest: {1000 * slowest:.1f} ms")


def test_math_verify_is_asked_about_algebra_alone(monkeypatch):
    """If it is installed; numbers and choices are never sent to it, and its word counts."""
    import support.answers

    asked = []
    fake = SimpleNamespace(parse=lambda text: text, verify=lambda *texts: asked.append(texts) or True)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    monkeypatch.setattr(support.answers, "find_spec", lambda name: fake)
    assert same_answer("x(x+1)", "x^2+x") and asked == [("$x^2+x$", "$x(x+1)$")]
    assert not same_answer("7", "8") and not same_answer("A", "B") and len(asked) == 1
    monkeypatch.setattr(support.answers, "find_spec", lambda name: None)
    assert not same_answer("x(x+1)", "x^2+x")


# ---- Fuzz -----------------------------------------------------------------------------------------------------------
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "[", "]", "{", "}", ",", ":", " ", "\n", ".",
          '"', '"bbox_2d"', '"point_2d"', "[100, 100, 300, 300]", "[200, 200]", json.dumps(DOG), json.dumps([DOG, CAT]),
          "[]", "NaN", "-Infinity", "1e999", "-0", "1e5", "9" * 400, "9" * 5000, "true", "null", "I see a dog.", "狗。",
          "\0", "\x1b", "\u2028", "\ud800", "\\ud800", "\\", "İ", "<", ">", "[" * 500, '{"a":' * 300]
MANY = [thing([i, i, 100 + i, 100 + i]) for i in range(120)]


def repeats(item: str) -> int:
    return rewards.MAX_ANSWER // (len(item) + 1) - 2


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
    **{f"only {unit!r}": lambda unit=unit: unit * (rewards.MAX_TEXT // len(unit))
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


def check_score(text: str, label: list, frame) -> float:
    """Score it, check every component, and return the milliseconds that scoring took."""
    start = time.perf_counter()
    result = score(text, label, frame=frame)
    spent = time.perf_counter() - start
    assert list(result) == [*RANGES, "total"], text[:500]
    for name, (low, high) in RANGES.items():
        assert type(result[name]) is float and math.isfinite(result[name]) and low <= result[name] <= high, text[:500]
    assert result["total"] == pytest.approx(sum(result[name] for name in RANGES))
    return 1000 * spent


@pytest.mark.filterwarnings("error")                  # a numpy warning would mean NaN or infinity got into the sums
def test_fuzz():
    """20,000 random, broken and hostile completions: no exception, every component finite and within its range."""
    rng, slowest, full = random.Random(0), {}, 0
    for number in range(20_000):
        label, frame = rng.choice([[], [DOG], [DOG, CAT], [DOG, DOG, FAR]]), rng.choice([(840, 840), (1000, 500)])
        text = random_completion(rng)
        slowest["random"] = max(slowest.get("random", 0), check_score(text, label, frame))
        full += score(text, label, frame=frame)["total"] == MAX_REWARD
    for kind, make in HEAVY.items():
        text = make()
        slowest[kind] = min(max(check_score(text, label, (840, 840)) for label in ([], [DOG], MANY)) for _ in range(3))
    assert full > 300, "the fuzz should reach good answers too"
    ranking = sorted(slowest, key=slowest.get, reverse=True)
    print("\nslowest completions:", *(f"{slowest[kind]:.2f} ms {kind}" for kind in ranking[:6]), sep="\n  ")
