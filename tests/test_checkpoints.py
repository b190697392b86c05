"""Checkpoints of others go in and come out unharmed, or are named in one line for what they are."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import data
import model
import visurf

TINY = ROOT / "assets" / "tiny-qwen2-vl"
DIGITS = data.TASKS["digits"]
FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json",
         "chat_template.jinja")
# What a foreign writer, or a slip, puts where another value was.
STRANGE = (None, "x", "2", -1, 0, 3.5, 10**9, True, [], [1, "a"], {}, {"a": 1}, "\x1b]0;pwned\x07")


def copy(tmp_path: Path, name: str = "base") -> Path:
    return Path(shutil.copytree(TINY, tmp_path / name))


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def open_all(path: Path):
    """What train.py reads of a checkpoint before its first step: the processor and a network that speaks."""
    model.check_checkpoint(path)
    processor = data.Processor(path, DIGITS)
    network = model.load_pretrained(path)
    model.generate(network, [processor.blank], 1, 1)
    return processor, network


def mutate(path: Path, rng: random.Random):
    """Change one value, of any depth, in one of the files; or cut, garble or delete the file."""
    file = path / rng.choice(FILES)
    text = file.read_text()
    way = rng.random()
    if way < 0.1:
        file.unlink()
    elif way < 0.25 or file.suffix != ".json":
        place = rng.randrange(len(text))
        file.write_text(text[:place] + rng.choice(["", text[place + 3:], "{", "\0", "{{"]))
    else:
        content = json.loads(text)
        owner = content
        key = rng.choice(sorted(owner))
        while isinstance(owner[key], dict) and owner[key] and rng.random() < 0.8:
            owner = owner[key]
            key = rng.choice(sorted(owner))
        if rng.random() < 0.2:
            del owner[key]
        else:
            owner[key] = rng.choice(STRANGE)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("seed", range(40))
def test_a_mutated_checkpoint_works_or_is_named_in_one_line(tmp_path, seed):
    """Anything but these two errors would be a traceback."""
    base = copy(tmp_path)
    mutate(base, random.Random(seed))
    try:
        open_all(base)
    except (data.UserError, model.CheckpointError) as error:
        assert str(base) in str(error)


@pytest.mark.parametrize("edit, message", [
    (lambda base: (base / "model_world_size_8_rank_0.pt").write_bytes(b"x"), "verl"),
    (lambda base: change(base / "config.json", quantization_config={"quant_method": "awq"}), "AWQ"),
    (lambda base: change(base / "config.json", model_type="qwen3_5"), "qwen3_5"),
    (lambda base: change(base / "config.json", model_type="qwen3_vl_moe"), "qwen3_vl_moe"),
    (lambda base: change(base / "config.json", video_token_id=5000), "5000"),
    (lambda base: change(base / "generation_config.json", eos_token_id="2"), "'2'"),
    (lambda base: change(base / "generation_config.json", eos_token_id=999999), "999999"),
    (lambda base: (base / "chat_template.jinja").write_text("{% if"), "not a complete"),
    (lambda base: (base / "chat_template.jinja").unlink(), "chat.template"),
])
def test_what_is_no_checkpoint_of_ours_is_named(tmp_path, edit, message):
    base = copy(tmp_path)
    edit(base)
    with pytest.raises((data.UserError, model.CheckpointError), match=message):
        open_all(base)


@pytest.mark.parametrize("eos", [{}, {"eos_token_id": None}, {"eos_token_id": []}, {"eos_token_id": 0}])
def test_im_end_always_ends_a_completion(tmp_path, eos):
    """A merged checkpoint may name <|endoftext|> alone, and then no rollout would ever stop."""
    base = copy(tmp_path)
    (base / "generation_config.json").write_text(json.dumps(eos))
    processor, network = open_all(base)
    [end] = processor.token_ids(data.END).tolist()
    assert end in network.stop_tokens


def test_a_thought_that_the_template_would_open_is_the_models_to_write(tmp_path):
    """Else a label would be learnt behind an open <think>, and no rollout could earn its thinking."""
    base = copy(tmp_path)
    template = base / "chat_template.jinja"
    plain = data.Processor(base, DIGITS).blank.ids
    template.write_text(template.read_text() + "{%- if add_generation_prompt -%}<think>\n{% endif %}")
    assert data.Processor(base, DIGITS).blank.ids.equal(plain)


def test_saved_files_are_the_bases_own(tmp_path):
    """transformers 4 cannot read what transformers 5 makes of it."""
    base = copy(tmp_path)
    change(base / "config.json", torch_dtype="float32", a_word_of_the_writer=[1, {"kept": True}])
    (base / "processor_config.json").write_text('{"kept": 1}')
    (base / "evil.py").write_text("raise SystemExit")
    files = model.read_files(base)
    network = model.load_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(network, tmp_path / "saved", files)
    saved = {path.name: path for path in (tmp_path / "saved").iterdir()}
    assert set(saved) == {path.name for path in TINY.iterdir()} | {"processor_config.json"}
    for name in set(saved) - {"model.safetensors"}:
        assert saved[name].read_bytes() == files[name]
    processor, again = open_all(tmp_path / "saved")
    text = visurf.align_label([{"bbox_2d": [1, 2, 3, 4]}], "compact")
    assert processor.decode(processor.token_ids(text), finished=False) == text
