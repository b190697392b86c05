"""The group, the sampler and the files against transformers: same numbers, same gradients, same tokens."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import FAMILIES, IMAGE, ROOT, random_prompt
from safetensors.torch import load_file, save_file

import model

TINY = ROOT / "assets" / "tiny-qwen2-vl"
# Two images in one prompt, sizes that are no multiple of a window (4 merged patches), a single image, and no image.
PROMPTS = [random_prompt([(8, 8), (12, 20)], 7, seed=1), random_prompt([(10, 14)], 3, seed=2),
           random_prompt([], 5, seed=3), random_prompt([(8, 12)], 8, seed=4)]


def plain_inputs(ids, prompt) -> dict:
    """One row of tokens (T,), its images those of the prompt, as transformers wants it."""
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None],
              "mm_token_type_ids": (ids == IMAGE).int()[None]}
    if len(prompt.grid_thw):
        inputs |= {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grid_thw}
    return inputs


def plain_log_probs(network, prompt, completion, temperature=1.0, forbidden=()):
    """Log-probs (T,) of one completion from a plain forward of transformers on prompt and completion."""
    network.model.rope_deltas = None
    logits = network(**plain_inputs(torch.cat([prompt.ids, completion]), prompt), use_cache=False).logits
    logits = logits[0, len(prompt.ids) - 1 : -1] / temperature
    logits = logits.index_fill(1, torch.tensor(forbidden, dtype=torch.long), -torch.inf)
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def batch_of(prompts, network) -> model.PromptBatch:
    return model.PromptBatch.from_prompts(prompts, network.config)


def flat_copy(source, target, **changes):
    """A checkpoint directory with a changed config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


# ---- The group ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family, tied", [*((family, True) for family in FAMILIES), ("qwen3_vl", False)])
def test_a_group_equals_plain_forwards_of_transformers(reference, family, tied, temperature):
    """Log-probs within 1e-5 and every parameter's gradient within 1e-5, for groups on four prompts at once."""
    theirs, directory = reference(family, tied)
    ours = model.load_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    groups = [[torch.randint(10, 180, (length,), generator=generator) for length in lengths]
              for lengths in ([3, 9, 1], [20, 5, 5], [1, 1, 2], [7, 12, 4])]
    ids, mask = model.pad_completions(groups)
    weights = torch.randn(mask.shape, generator=generator) * mask
    logprobs = ours(batch_of(PROMPTS, ours), ids, mask, temperature)
    (logprobs * weights).sum().backward()

    theirs.zero_grad()
    for b, prompt in enumerate(PROMPTS):
        for n, completion in enumerate(groups[b]):
            expected = plain_log_probs(theirs, prompt, completion, temperature, ours.forbidden_tokens)
            found = logprobs[b, n, : len(completion)]
            assert torch.allclose(found, expected, atol=1e-5)
            (expected * weights[b, n, : len(completion)]).sum().backward()
    assert (logprobs[~mask] == 0).all()
    gradients = {name: parameter.grad for name, parameter in ours.vlm.named_parameters()}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    for name, parameter in theirs.named_parameters():
        difference = (gradients[name] - parameter.grad).norm()
        # Key biases have no gradient but rounding: softmax does not see what is added to all keys.
        assert difference <= 1e-5 * max(parameter.grad.norm(), 0.01 * norm), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_notice(reference, family, monkeypatch):
    """Positions that ignore the image, or a member that sees its neighbour, are far outside the tolerance."""
    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    completions = [torch.arange(10, 20), torch.arange(30, 40)]
    ids, mask = model.pad_completions([completions])

    def difference():
        with torch.no_grad():
            found = ours(batch_of(PROMPTS[:1], ours), ids, mask)[0, 1]
            return (found - plain_log_probs(theirs, PROMPTS[0], completions[1], 1.0, ours.forbidden_tokens)).abs().max()

    assert difference() < 1e-5
    positions = model.GroupPolicy.positions
    monkeypatch.setattr(model.GroupPolicy, "positions",
                        lambda self, batch: (torch.arange(batch.ids.numel()).expand(3, -1), batch.lengths))
    assert difference() > 1e-3
    monkeypatch.setattr(model.GroupPolicy, "positions", positions)
    make_bias = model.GroupAttention.make_bias

    def blind_to_images(self, *args):
        return make_bias(self, *args).index_fill(-1, torch.arange(30), -torch.inf)

    monkeypatch.setattr(model.GroupAttention, "make_bias", blind_to_images)
    assert difference() > 1e-4


def test_images_that_do_not_fit_their_tokens_are_refused(reference):
    network = model.load_pretrained(reference("qwen2_vl")[1])
    prompt = random_prompt([(8, 8)], 3)
    prompt.grid_thw = torch.tensor([[1, 8, 12]])
    ids, mask = model.pad_completions([[torch.arange(10, 20)]])
    with pytest.raises((ValueError, RuntimeError)):
        network(batch_of([prompt], network), ids, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_nothing(reference, family):
    """The gradients are the same, and the attention of every text layer runs twice."""
    network = model.load_pretrained(reference(family)[1]).train()
    ids, mask = model.pad_completions([[torch.arange(10, 20), torch.arange(30, 35)]])
    kept, calls = [], []
    group_call = model.GroupAttention.__call__

    def counted(self, layer, *args):
        calls.append(layer)
        return group_call(self, layer, *args)

    for recompute in (False, True):
        if recompute:
            network.vlm.activation_checkpointing_enable()
        network.zero_grad()
        attention = model.GroupAttention.__call__
        model.GroupAttention.__call__ = counted
        try:
            network(batch_of(PROMPTS[:1], network), ids, mask).sum().backward()
        finally:
            model.GroupAttention.__call__ = attention
        kept.append([parameter.grad.clone() for parameter in network.parameters()])
    assert sorted(calls) == sorted([0, 1] * 3)
    assert all(torch.equal(a, b) for a, b in zip(*kept))


# ---- Log-probs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_token_log_probs_and_their_gradients(monkeypatch, chunk):
    """Against autograd through the full logits, for every chunk size, with forbidden tokens and a temperature."""
    torch.manual_seed(0)
    hidden, weight, g = torch.randn(7, 5), torch.randn(11, 5), torch.randn(7)
    targets, forbidden = torch.arange(7), torch.tensor([8, 10])
    monkeypatch.setattr(model, "CHUNK", chunk)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = model.TokenLogProbs.apply(h, w, targets, 0.7, forbidden)
    (values * g).sum().backward()

    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (h2 @ w2.T / 0.7).index_fill(1, forbidden, -torch.inf)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * g).sum().backward()
    for ours, theirs in ((values, expected), (h.grad, h2.grad), (w.grad, w2.grad)):
        assert torch.allclose(ours, theirs, atol=1e-6)


# ---- Sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_transformers(reference, family):
    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    completions = model.generate(ours, PROMPTS, max_new_tokens=64, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, completions):
        theirs.model.rope_deltas = None
        expected = theirs.generate(**plain_inputs(prompt.ids, prompt), do_sample=False, max_new_tokens=64,
                                   suppress_tokens=ours.forbidden_tokens, pad_token_id=0)
        assert completion.ids.tolist() == expected[0, len(prompt.ids):].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_equal_teacher_forced_ones(reference, family, temperature):
    """Log-probs returned by the sampler against transformers' forward on the finished text."""
    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    for prompt, group in zip(PROMPTS, model.generate(ours, PROMPTS, 3, 24, temperature)):
        for completion in group:
            with torch.no_grad():
                expected = plain_log_probs(theirs, prompt, completion.ids, temperature, ours.forbidden_tokens)
            assert torch.allclose(completion.logprobs, expected, atol=1e-5, rtol=0)


def test_the_sampler_draws_from_the_distribution():
    """Frequencies of 20,000 draws agree with the softmax, and a word of probability 0 is never drawn."""
    probabilities = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = model.draw(probabilities.expand(20_000, -1), uniform)
    frequency = torch.bincount(tokens[:, 0], minlength=6) / 20_000
    assert (frequency - probabilities[0]).abs().max() < 0.015
    edge = torch.tensor([[0.0], [1.0 - 2**-53], [1.0]], dtype=torch.float64)
    assert model.draw(probabilities.expand(3, -1), edge)[:, 0].tolist() == [1, 4, 4]


def test_a_large_vocabulary_is_drawn_from_exactly():
    """The word is the one that a float64 sum finds, but for draws within rounding of a boundary."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 20_000, generator=generator)
    logits[:, torch.randint(20_000, (8_000,), generator=generator)] = -torch.inf
    probabilities = logits.softmax(-1)
    uniform = torch.rand(200, 1, generator=generator, dtype=torch.float64)
    tokens = model.draw(probabilities, uniform)
    cumulative = probabilities.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    assert (tokens == expected).float().mean() > 0.95
    # Where it is another word, the draw is within rounding of the boundary between the two.
    chosen = probabilities.gather(1, tokens).double()
    upper = cumulative.gather(1, tokens)
    target = uniform * cumulative[:, -1:]
    assert (upper - chosen - 1e-6 <= target).all() and (target <= upper + 1e-6).all()
    assert (chosen > 0).all()


def test_weights_that_are_not_finite_are_an_error(reference):
    """An index past the vocabulary was the fault once."""
    network = model.load_pretrained(reference("qwen2_vl")[1])
    with torch.no_grad():
        network.vlm.lm_head.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(model.CheckpointError, match="log-probs are not finite"):
            model.generate(network, PROMPTS[:1], 1, 5, temperature)


def test_no_prompts_no_rollouts(reference):
    assert model.generate(model.load_pretrained(reference("qwen2_vl")[1]), []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_depend_on_their_seed_and_nothing_else(reference, family):
    """Alone or among others, which finish at other times: the same tokens. Another seed: others."""
    network = model.load_pretrained(reference(family)[1])
    network.stop_tokens = list(range(2, 30))  # rows end early and at different times
    together = model.generate(network, PROMPTS, 6, 40, seeds=[7, 8, 9, 10])
    lengths = [len(c.ids) for group in together for c in group]
    assert min(lengths) < 5 and max(lengths) > 10, lengths
    for i, prompt in enumerate(PROMPTS):
        if len(prompt.grid_thw) == 0:
            continue
        alone = model.generate(network, [prompt], 6, 40, seeds=[7 + i])[0]
        for a, b in zip(alone, together[i]):
            assert a.ids.tolist() == b.ids.tolist() and a.finished == b.finished
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    other = model.generate(network, PROMPTS[:1], 6, 40, seeds=[100])[0]
    assert [c.ids.tolist() for c in other] != [c.ids.tolist() for c in together[0]]
    for completion in (c for group in together for c in group):
        ids = completion.ids.tolist()
        assert completion.finished == (2 <= ids[-1] < 30)
        assert not any(2 <= token < 30 for token in ids[:-1]), "went on after an end token"
        assert completion.finished or len(ids) == 40


class FakeGraph:
    """Stands in for a CUDA graph: replaying runs the step again, if everything it reads is where it was."""

    def __init__(self, decoder):
        self.decoder, self.where = decoder, self.addresses(decoder)

    @staticmethod
    def addresses(decoder):
        tensors = [decoder.tokens, decoder.position, decoder.mask, decoder.slot]
        tensors += [x for pair in [*decoder.rows.values(), *decoder.prompts.values()] for x in pair]
        return [(x.data_ptr(), x.shape) for x in tensors] + [decoder.window]

    def replay(self):
        assert self.addresses(self.decoder) == self.where, "a captured graph would read stale memory"
        self.decoder.hidden = self.decoder.decode()


def test_a_captured_step_gives_the_same_tokens(reference, monkeypatch):
    """What a CUDA graph needs, without a GPU: fixed tensors, and masked slots."""
    network = model.load_pretrained(reference("qwen2_vl")[1])
    network.stop_tokens = [2, 3]
    eager = model.generate(network, PROMPTS, 6, 150)
    decoders, graphs = [], []

    class Captured(model.Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = True
            decoders.append(self)

    def make_graph():
        graphs.append(FakeGraph(decoders[-1]))
        return graphs[-1]

    monkeypatch.setattr(model, "Decoder", Captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    captured = model.generate(network, PROMPTS, 6, 150)
    for a, b in zip(sum(eager, []), sum(captured, [])):
        assert a.ids.tolist() == b.ids.tolist() and torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert [graph.where[-1] for graph in graphs] == [150], "one capture, that reads all slots"


def test_decoding_ends_with_the_last_row_and_padding_is_not_worked_on(reference):
    """Counted in tokens that enter the first layer: a prompt's once, then all rows, and real tokens while training."""
    network = model.load_pretrained(reference("qwen2_vl")[1])
    network.stop_tokens = list(range(2, 30))
    seen, images = [], []
    layer = network.vlm.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[1]))
    network.vlm.model.visual.register_forward_hook(lambda module, inputs, out: images.append(len(inputs[0])))
    [group] = model.generate(network, PROMPTS[:1], 32, 60)
    lengths = torch.tensor([len(completion.ids) for completion in group])
    assert lengths.max() < 60 and all(completion.finished for completion in group)
    assert seen == [len(PROMPTS[0].ids)] + [32] * (lengths.max() - 1)

    seen.clear()
    ids, mask = model.pad_completions([[completion.ids for completion in group]])
    network(batch_of(PROMPTS[:1], network), ids, mask)
    assert seen == [len(PROMPTS[0].ids) + sum(lengths) - 32]
    patches = len(PROMPTS[0].pixels)
    assert images == [patches, patches], "the vision tower runs once for all rows, and sees each image once"


def test_forbidden_tokens_are_never_sampled(reference):
    network = model.load_pretrained(reference("qwen2_vl")[1])
    assert network.forbidden_tokens == [190, 191, 192, 193]
    network.forbidden_tokens = list(range(20, 200))
    network.stop_tokens = []
    ids = torch.cat([c.ids for c in model.generate(network, PROMPTS[:1], 8, 30)[0]])
    assert len(ids) == 240 and ids.max() < 20


# ---- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_loads_in_transformers(reference, tmp_path, family, tied):
    """Equal logits, a tied head stored once, and the names that the hub's files have."""
    theirs, directory = reference(family, tied)
    ours = model.load_pretrained(directory)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(ours, tmp_path, directory, torch.float32)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == set(load_file(directory / "model.safetensors"))
    assert ("lm_head.weight" in saved) == (not tied)
    again = type(theirs).from_pretrained(tmp_path).eval()
    ids, mask = model.pad_completions([[torch.arange(10, 20)]])
    with torch.no_grad():
        found = plain_log_probs(again, PROMPTS[0], ids[0, 0], 1.0, ours.forbidden_tokens)
        logprobs = ours(batch_of(PROMPTS[:1], ours), ids, mask)
        assert torch.allclose(logprobs[0, 0], found, atol=1e-5)
        loaded = model.load_pretrained(tmp_path)
        assert torch.equal(loaded(batch_of(PROMPTS[:1], ours), ids, mask), logprobs)
    model.save_pretrained(ours, tmp_path / "half", directory)
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    # config.json is the base's.
    for dtype, expected in (("auto", torch.float32), (torch.bfloat16, torch.bfloat16)):
        loaded = model.load_pretrained(tmp_path / "half", dtype)
        assert {x.dtype for x in loaded.parameters()} == {expected}
    assert "visurf" not in (tmp_path / "config.json").read_text(), "our attention's name is no part of a checkpoint"


def test_hub_layout_is_read(reference, tmp_path):
    """A flat config.json with rope_scaling, and module names in several files, as some writers leave them."""
    theirs, directory = reference("qwen2_vl")
    nested = json.loads((directory / "config.json").read_text())
    rope = nested["text_config"].pop("rope_parameters")
    flat = {**nested.pop("text_config"), **nested, "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    flat["vision_config"]["in_chans"] = flat["vision_config"].pop("in_channels")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    # A tied output head may be stored a second time.
    tensors = {k: v.clone() for k, v in theirs.state_dict().items()}
    assert "lm_head.weight" in tensors
    names = sorted(tensors)
    for i in range(3):
        save_file({name: tensors[name] for name in names[i::3]}, tmp_path / f"part-{i}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    ours = model.load_pretrained(tmp_path)
    assert ours.stop_tokens == [2, 3]
    ids, mask = model.pad_completions([[torch.arange(10, 20)]])
    expected = plain_log_probs(theirs, PROMPTS[0], ids[0, 0], 1.0, ours.forbidden_tokens)
    assert torch.allclose(ours(batch_of(PROMPTS[:1], ours), ids, mask)[0, 0], expected, atol=1e-5)


def test_rows_past_the_tokenizer_are_forbidden(tmp_path):
    """The bundled tokenizer has 174 words: an embedding with more rows must not be sampled past them."""
    network = model.load_pretrained(TINY)
    assert sorted(network.forbidden_tokens) == [3, 4, 5, 6, 7]
    more = flat_copy(TINY, tmp_path / "more", text_config=network.config.text_config.to_dict() | {"vocab_size": 180})
    tensors = load_file(TINY / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:6]])
    save_file(tensors, more / "model.safetensors")
    forbidden = model.load_pretrained(more).forbidden_tokens
    assert sorted(forbidden) == [3, 4, 5, 6, 7, 174, 175, 176, 177, 178, 179]


@pytest.mark.parametrize("damage, message", [
    ("absent", "nowhere"),
    ("no config", "config.json"),
    ("not JSON", "config.json: missing or damaged"),
    ("a list", "config.json"),
    ("other model", "model_type 'llama'"),
    ("tokenizer", "c: "),
    ("no weights", "no file named model.safetensors"),
    ("pickle", "no file named model.safetensors"),
    ("missing tensor", "missing_keys in its safetensors files: model.language_model.norm.weight"),
    ("unknown tensor", "unexpected_keys in its safetensors files: model.language_model.surprise"),
    ("misshaped tensor", "ignore_mismatched_sizes"),
    ("cut off", "c: "),
])
def test_an_unusable_checkpoint_is_named_in_one_line(reference, tmp_path, damage, message):
    _, directory = reference("qwen2_vl")
    broken = flat_copy(directory, tmp_path / "c", **({"model_type": "llama"} if damage == "other model" else {}))
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    edits = {
        "no config": lambda: (broken / "config.json").unlink(),
        "not JSON": lambda: (broken / "config.json").write_text("{"),
        "a list": lambda: (broken / "config.json").write_text("[]"),
        "tokenizer": lambda: (broken / "tokenizer_config.json").write_text("{"),
        "no weights": lambda: weights.unlink(),
        "pickle": lambda: (torch.save(tensors, broken / "pytorch_model.bin"), weights.unlink()),
        "missing tensor": lambda: save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights),
        "unknown tensor": lambda: save_file(tensors | {"model.surprise": torch.zeros(1)}, weights),
        "misshaped tensor": lambda: save_file(tensors | {"model.norm.weight": torch.zeros(63)}, weights),
        "cut off": lambda: weights.write_bytes(weights.read_bytes()[:5000]),
    }
    edits.get(damage, lambda: None)()
    path = tmp_path / "nowhere" if damage == "absent" else broken
    with pytest.raises(model.CheckpointError) as error:
        model.load_pretrained(path)
    text = str(error.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text


def test_only_known_files_are_copied(reference, tmp_path):
    """Code in a checkpoint directory stays behind."""
    _, directory = reference("qwen2_vl")
    source = flat_copy(directory, tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer.json").mkdir()
    model.save_pretrained(model.load_pretrained(directory), tmp_path / "copy", source)
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
