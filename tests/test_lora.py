"""LoRA and a frozen vision tower, against finite differences, against peft's own reading, and against whole runs."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from conftest import FAMILIES, ROOT
from pretended_gpu import pretended_gpu
from processes import Ranks
from safetensors.torch import load_file, save_file
from test_model import PROMPTS, plain_log_probs
from test_train import checkpoints, expect_exit, make_run, records, run

import eval as evaluation
import model
import train

pytest.importorskip("peft")
TINY = ROOT / "assets" / "tiny-qwen2-vl"
LORA = "--lora_rank", 4
generator = torch.Generator().manual_seed(1)
GROUPS = [[torch.randint(10, 180, (length,), generator=generator) for length in (5, 3)] for _ in PROMPTS]


def with_adapters(path: Path, rank: int = 4) -> model.GroupPolicy:
    """A network with adapters that do something: new ones add nothing, as one of their matrices is 0."""
    torch.manual_seed(0)
    network = model.load_pretrained(path)
    model.add_adapters(network, path, rank, str(path))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return network


def adapters(network) -> dict:
    return {name: weight for name, weight in network.named_parameters() if "lora_" in name}


def log_probs(network) -> torch.Tensor:
    """Of all tokens of GROUPS after PROMPTS, as train.py computes them."""
    ids, mask = model.pad_completions(GROUPS)
    batch = model.PromptBatch.from_prompts(PROMPTS, network.config)
    return network(batch, ids, mask)[mask]


# ---- Adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_are_finite_differences(reference, family):
    """Along a random direction of all adapters; nothing else gets a gradient."""
    network = with_adapters(reference(family)[1])
    trained = adapters(network)
    assert {name for name, weight in network.named_parameters() if weight.requires_grad} == set(trained)
    assert all("language_model" in name for name in trained)
    # q, k, v, o, gate, up and down of two layers, two matrices each.
    assert len(trained) == 28
    log_probs(network).sum().backward()
    assert all(weight.grad is None for name, weight in network.named_parameters() if name not in trained)
    direction = {name: torch.randn_like(weight) for name, weight in trained.items()}
    expected = sum((weight.grad * direction[name]).sum() for name, weight in trained.items()).item()
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            for name, weight in trained.items():
                weight += step * direction[name]
            values.append(log_probs(network).double().sum().item())
            for name, weight in trained.items():
                weight -= step * direction[name]
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_was_written(reference, tmp_path, family):
    """PeftModel on the base gives the same log-probs; merged by peft, they differ by rounding; and our own reading."""
    import peft
    import transformers

    _, path = reference(family)
    network = with_adapters(path)
    model.save_pretrained(network, tmp_path / "adapters", path)
    files = {file.name for file in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "config.json" not in files
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(path))
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32} and len(tensors) == 28
    assert all(name.startswith("base_model.model.") for name in tensors)

    # Theirs, from a plain forward of transformers on prompt and completion.
    ours = log_probs(network)
    base = transformers.AutoModelForImageTextToText.from_pretrained(path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    for read in (lambda: theirs.base_model.model, theirs.merge_and_unload):
        with torch.no_grad():
            vlm = read()
            expected = [plain_log_probs(vlm, prompt, ids, forbidden=network.forbidden_tokens)
                        for prompt, group in zip(PROMPTS, GROUPS) for ids in group]
        assert (ours - torch.cat(expected)).abs().max() < 1e-5

    again = model.load_pretrained(path)
    assert (log_probs(again) - ours).abs().max() > 1e-3, "the adapters do nothing"
    model.add_adapters(again, tmp_path / "adapters")
    assert torch.equal(log_probs(again), ours)


def test_sampling_follows_the_adapters(reference):
    network = with_adapters(reference("qwen2_vl")[1])
    network.stop_tokens = [2, 3]
    [group] = model.generate(network, PROMPTS[:1], 4, 20)
    ids, mask = model.pad_completions([[completion.ids for completion in group]])
    found = network(model.PromptBatch.from_prompts(PROMPTS[:1], network.config), ids, mask)[mask]
    assert torch.allclose(found, torch.cat([completion.logprobs for completion in group]), atol=1e-5)


@pytest.mark.parametrize("method", ["visurf", "rlvr", "sft"])
def test_a_run_trains_adapters_alone_and_resumes(tmp_path, method):
    """The base stays as it is, to the bit; a resumed run equals an undisturbed one; eval.py answers with adapters."""
    flags = *LORA, "--method", method, "--learning_rate", "1e-2"
    whole = run(tmp_path, "--max_steps", 4, *flags, name="whole")
    run(tmp_path, "--max_steps", 2, *flags, name="parts")
    parts = run(tmp_path, "--max_steps", 4, *flags, "--resume", name="parts")
    files = [load_file(path / "checkpoint-4" / "adapter_model.safetensors") for path in (whole, parts)]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert any(tensor.any() for name, tensor in files[0].items() if "lora_B" in name), "nothing was learnt"
    state = {}
    for file in (parts / "checkpoint-4" / "training_state").glob("*.safetensors"):
        state |= load_file(file)
    # Of each adapter: itself, two moments and a count of steps.
    assert len(state) == 4 * len(files[0]) and all("lora_" in name for name in state)
    evaluation.main(["--model", str(parts / "checkpoint-4"), "--limit", "4", "--output_dir", str(tmp_path / "answers")])
    assert len(json.loads((tmp_path / "answers" / "answers.json").read_text())["answers"]) == 4


def test_the_base_is_the_same_after_training():
    run_ = make_run(*LORA, "--learning_rate", "1e-2")
    before = {name: weight.full_tensor().clone() for name, weight in run_.network.named_parameters()}
    train.train_step(run_)
    for name, weight in run_.network.named_parameters():
        if "lora_B" in name:
            assert not torch.equal(weight.full_tensor(), before[name]), name
        elif "lora_" not in name:
            assert torch.equal(weight.full_tensor(), before[name]), name


def test_two_processes_compute_what_one_does(tmp_path):
    flags = "--max_steps", 2, "--learning_rate", "1e-3", *LORA
    for world in (1, 2):
        processes = Ranks(world, tmp_path / f"out{world}", "ranks:main", "--output_dir", tmp_path / str(world), *flags)
        assert processes.wait() == [0] * world, processes.text()
    one, two = (load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors") for name in "12")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # AdamW's first steps depend on little but signs, and where a gradient is nearly 0, so does the sign on rounding.
        assert (tensor - two[name]).norm() < 2e-3 * tensor.norm().clamp(min=1e-3), name


def test_a_gpu_keeps_the_base_in_bfloat16(tmp_path, monkeypatch):
    """On a pretended GPU: adapters and their moments in float32, all else in half of that; the second step resumes."""
    flags = ["--output_dir", str(tmp_path), "--batch_size", "2", "--num_generations", "3", "--max_steps", "2",
             "--max_completion_length", "70", "--save_steps", "1", "--keep", "2", "--lora_rank", "4"]
    save = train.save

    def check_and_save(run_):
        dtypes = {name: weight.dtype for name, weight in run_.network.named_parameters()}
        assert {dtypes[name] for name in dtypes if "lora_" in name} == {torch.float32}
        assert {dtypes[name] for name in dtypes if "lora_" not in name} == {torch.bfloat16}
        assert ranks.dtypes_of(run_) == {torch.float32}
        save(run_)

    monkeypatch.setattr(train, "save", check_and_save)
    with pretended_gpu():
        train.main(flags)
        (tmp_path / "checkpoint-2").rename(tmp_path / "uninterrupted")
        train.main([*flags, "--resume"])
    expected = load_file(tmp_path / "uninterrupted" / "adapter_model.safetensors")
    found = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_default_learning_rate_suits_adapters(capsys):
    for flags, rate in (([], 2e-4), (["--lora_rank", "4"], 2e-3), (["--task", "grounding"], 1e-6),
                        (["--task", "grounding", "--lora_rank", "4"], 1e-5)):
        assert evaluation.parse(train.Settings, flags, "train.py").learning_rate == pytest.approx(rate)
    with pytest.raises(SystemExit):
        train.main(["--lora_rank", "4", "--help"])
    assert "(0.002)" in capsys.readouterr().out


# ---- Mistakes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder of adapters that train.py wrote."""
    return run(tmp_path_factory.mktemp("adapted"), *LORA, "--max_steps", 1) / "checkpoint-1"


def test_training_goes_on_from_a_folder_of_adapters(tmp_path, adapted):
    directory = run(tmp_path, "--model", adapted, "--max_steps", 1, "--learning_rate", "1e-9", *LORA)
    before = load_file(adapted / "adapter_model.safetensors")
    after = load_file(directory / "checkpoint-1" / "adapter_model.safetensors")
    # The base is kept in bfloat16, and so are adapters while they are read.
    assert all(torch.allclose(before[name], after[name], rtol=2**-8, atol=1e-6) for name in before)
    assert any(before[name].any() for name in before if "lora_B" in name)
    config = json.loads((directory / "checkpoint-1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(TINY)


def test_mistakes_with_adapters_are_one_line(tmp_path, capsys, monkeypatch, adapted):
    def broken(name, **changes):
        folder = Path(shutil.copytree(adapted, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    assert "give --lora_rank" in expect_exit(tmp_path, capsys, "--model", adapted, name="a")
    gone = broken("gone", base_model_name_or_path="no/such-base.")
    assert "no/such-base." in expect_exit(tmp_path, capsys, "--model", gone, *LORA, name="b")
    nameless = broken("nameless", base_model_name_or_path=None)
    assert "None: no such" in expect_exit(tmp_path, capsys, "--model", nameless, *LORA, name="c")
    pickled = broken("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "no adapter_model.safetensors" in expect_exit(tmp_path, capsys, "--model", pickled, *LORA, name="d")
    wider = broken("wider", r=8)
    assert str(wider) in expect_exit(tmp_path, capsys, "--model", wider, *LORA, name="e")
    fewer = broken("fewer")
    tensors = load_file(fewer / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), fewer / "adapter_model.safetensors")
    assert str(fewer) in expect_exit(tmp_path, capsys, "--model", fewer, *LORA, name="f")
    run(tmp_path, *LORA, "--max_steps", 1, name="g")
    line = expect_exit(tmp_path, capsys, "--lora_rank", 8, "--resume", name="g")
    assert "another lora_rank: 4, not 8" in line
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "pip install peft" in expect_exit(tmp_path, capsys, *LORA, name="h")


# ---- A frozen vision tower -------------------------------------------------------------------------------------


def test_a_frozen_tower_is_not_trained():
    """It stays as it is, to the bit, has no gradient and no state, and all others learn as before."""
    seen = [make_run("--learning_rate", "1e-2", *more) for more in ((), ("--freeze_vision_tower",))]
    kept = []
    for run_ in seen:
        gradients = {}

        def note(optimizer, *_, of=run_, into=gradients):
            for name, weight in of.network.named_parameters():
                into[name] = None if weight.grad is None else weight.grad.full_tensor().clone()

        run_.optimizer.register_step_pre_hook(note)
        before = {name: weight.full_tensor().clone() for name, weight in run_.network.named_parameters()}
        train.train_step(run_)
        kept.append((before, gradients))
    (before, full), (_, frozen) = kept
    tower = {name for name in full if ".visual." in name}
    assert 0 < len(tower) < len(full)
    # Both were clipped, to a norm of 1 of what is trained: so compare directions.
    rest = sorted(set(full) - tower)
    a, b = (torch.cat([gradients[name].flatten() for name in rest]) for gradients in (full, frozen))
    assert torch.allclose(a / a.norm(), b / b.norm(), atol=1e-6)
    for name, weight in seen[1].network.named_parameters():
        assert torch.equal(weight.full_tensor(), before[name]) == (name in tower), name
    assert all(frozen[name] is None for name in tower) and all(full[name] is not None for name in tower)
    kept = [name for name in train.tensors(seen[1]) if name.startswith("exp_avg/")]
    assert sorted(kept) == [f"exp_avg/{name}" for name in rest]


@pytest.mark.parametrize("flags", [["--freeze_vision_tower"], LORA])
def test_a_frozen_tower_has_no_backward_pass_and_is_not_run_again(flags):
    """With --checkpoint_activations, transformers lets embeddings and patches ask for a gradient."""
    run_ = make_run("--checkpoint_activations", *flags)
    seen = []
    for block in run_.network.vlm.model.visual.blocks:
        block.attn.register_forward_hook(lambda *inputs_and_output: seen.append(inputs_and_output[-1].requires_grad))
    groups, _ = train.encode_share(run_, range(2))
    for group in groups:
        train.append_label(run_, group)
        group.advantages = torch.ones(1)
    train.loss_of(run_, groups, 1.0).backward()
    assert seen == [False] * len(run_.network.vlm.model.visual.blocks)
    assert any(weight.grad is not None for weight in run_.network.parameters())


def test_a_run_with_a_frozen_tower_resumes(tmp_path):
    flags = "--freeze_vision_tower", "--learning_rate", "1e-2"
    whole = run(tmp_path, "--max_steps", 3, *flags, name="whole")
    run(tmp_path, "--max_steps", 1, *flags, name="parts")
    parts = run(tmp_path, "--max_steps", 3, *flags, "--resume", name="parts")
    a, b = (load_file(path / "checkpoint-3" / "model.safetensors") for path in (whole, parts))
    base = load_file(TINY / "model.safetensors")
    assert a.keys() == b.keys() == base.keys()
    for name in a:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], base[name].bfloat16()) == (".visual." in name or name.startswith("visual."))
    assert checkpoints(parts) == ["checkpoint-3"] and [m["step"] for m in records(parts)] == [1, 2, 3]
