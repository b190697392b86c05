"""The tasks: what each asks for, where its data are, and what is measured. A task is a record.

To add one, write a record below and say in rewards.REWARDS how its answers are read and scored.
"""

from dataclasses import dataclass, field
from pathlib import Path

Frame = tuple[int, int]                  # (width, height)

OBJECTS = ("For each give its bounding box [x1, y1, x2, y2] and one point [x, y] on it, in whole numbers: x runs from "
           "0 at the left edge to {width} at the right, y from 0 at the top to {height} at the bottom. ")

@dataclass(frozen=True)
class Task:
    """A task's defaults, the wording of its prompt, its label columns, and its metrics."""

    name: str
    instruction: str                     # may use {question}, and {width} and {height} of the model's frame
    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    data: str = ""                       # of training and of evaluation; empty: there is no default
    eval_data: str = ""
    # one of these follows the instruction; both may use {example}
    think_format: str = ("First reason about what you see, between <think> and </think>. Then write the answer, "
                         "between <answer> and </answer>. For example: <think>your reasoning</think>{example}")
    answer_format: str = "Write only the answer, between <answer> and </answer>. For example: {example}"
    example: str = '<answer>[{"bbox_2d": [120, 85, 480, 571], "point_2d": [310, 352]}]</answer>'
    columns: tuple = ("solution", "bbox", "mask")        # where a row's label is: the first of these that it has
    needs_box: bool = True               # whether a labelled object needs a box, or a point will do
    text_answer: str = ""                # how an answer in numbers or words is written; empty: answers are objects
    metrics: tuple = ("accuracy", "gIoU", "cIoU", "N-Acc")           # names in eval.METRICS, the most telling first
    image_size: Frame | None = (840, 840)      # all images squashed to one size; None: smart_resize keeps the shape
    thresholds: dict | None = None       # fields of rewards.Thresholds; None: the paper's
    recipe: dict = field(default_factory=dict)      # where settings differ from train.py's defaults

    def prompt(self, question: str, frame: Frame, think: bool = True) -> str:
        """What the user says about an image. frame: the model's, so that the wording names the right coordinates."""
        text = self.instruction + (self.think_format if think else self.answer_format)
        return text.format(question=question.strip(), width=frame[0], height=frame[1], example=self.example)

GROUNDING = Task(
    name="grounding",
    data="Ricky06662/ViSurf_multi_non_object_7300_size840",
    eval_data="Ricky06662/grefcoco_val_all",
    instruction='Find everything in the image that matches "{question}". ' + OBJECTS
                + "If nothing matches, the list is []. ")

GUI = Task(
    name="gui",
    instruction='The image shows a screen. Where would you click to do this: "{question}"? Find that one element. '
                + OBJECTS,
    needs_box=False,
    metrics=("point_in_box", "accuracy", "gIoU"))

ANOMALY = Task(
    name="anomaly",
    instruction='Inspect the object in the image for defects: "{question}". List every defect. ' + OBJECTS
                + "If there is none, the list is []. ",
    metrics=("anomaly_acc", "ROC-AUC", "accuracy", "gIoU", "cIoU"))

MEDICAL = Task(
    name="medical",
    instruction='The image was taken for a medical examination. Find "{question}". ' + OBJECTS
                + "If it is not there, the list is []. ",
    metrics=("accuracy", "gIoU", "cIoU"))

COUNTING = Task(
    name="counting",
    data="Ricky06662/VisionReasoner_multi_object_7k_840",
    eval_data="Ricky06662/counting_pixmo_test",
    instruction='Count everything in the image that matches "{question}" by listing it. ' + OBJECTS
                + "If nothing matches, the list is []. Where listing is out of the question, write just the number. ",
    columns=("solution", "bbox", "answer", "count"),
    needs_box=False,
    text_answer="{}",
    metrics=("count_acc", "MAE", "RMSE"))

MATH = Task(
    name="math",
    data="hiyouga/geometry3k",
    eval_data="hiyouga/geometry3k",
    instruction="{question}\nLook at the image, and put the final answer into \\boxed{{}}. ",
    example=r"<answer>\boxed{24}</answer>",
    columns=("answer", "solution"),
    text_answer=r"\boxed{{{}}}",
    metrics=("accuracy",),
    image_size=None,                     # letters in a drawing do not like to be squashed
    recipe={"max_pixels": 1_003_520, "max_completion_length": 1024})

DIGITS = Task(
    name="digits",                       # built in: needs no files and no network
    model=str(Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2-vl"),
    data="builtin",
    eval_data="builtin",
    image_size=(48, 48),
    instruction="{question}",            # its network knows some hundred words
    think_format="",
    answer_format="",
    thresholds={"iou": 0.5, "box_l1": 2 * 840 / 48, "point": 4 * 840 / 48},     # 2 and 4 pixels of 48
    recipe={"learning_rate": 2e-4, "max_steps": 240, "batch_size": 8, "micro_batch_size": 8,
            "max_completion_length": 64, "checkpoint_activations": False})

TASKS = {task.name: task for task in (GROUNDING, GUI, ANOMALY, MEDICAL, COUNTING, MATH, DIGITS)}
