"""The network and the sampler against transformers: same numbers, same gradients, same tokens."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE, random_prompt
from safetensors.torch import load_file, save_file

import model

FAMILIES = ["qwen2_vl", "qwen2_5_vl"]
# Two images in one prompt, sizes that are no multiple of a window (4 merged patches), a single image, and no image. The
# second and the last are of similar length: they share a batch when sampling, with padding.
PROMPTS = [random_prompt([(8, 8), (12, 20)], 7, seed=1), random_prompt([(10, 14)], 3, seed=2),
           random_prompt([], 5, seed=3), random_prompt([(8, 12)], 8, seed=4)]


def reference_inputs(batch: model.PromptBatch) -> dict:
    """The batch as transformers wants it."""
    attended = (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]).long()
    inputs = {"input_ids": batch.ids, "attention_mask": attended, "mm_token_type_ids": (batch.ids == IMAGE).int()}
    if len(batch.grid_thw):
        inputs |= {"pixel_values": torch.cat(batch.pixels), "image_grid_thw": batch.grid_thw}
    return inputs


def one(prompt, network) -> model.PromptBatch:
    return model.PromptBatch.from_prompts([prompt], network.config)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def gradients(network) -> dict:
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def flat_copy(source, target, **changes):
    """A checkpoint directory with a changed config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(reference, family, tied):
    theirs, directory = reference(family, tied)
    ours = model.load_pretrained(directory)
    batch = model.PromptBatch.from_prompts(PROMPTS, ours.config)
    real = (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None])[..., None]
    logits, expected = ours.logits(batch), theirs(**reference_inputs(batch)).logits
    assert ((logits - expected) * real).abs().max() < 1e-5

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)) * real
    theirs.zero_grad()
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    short = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    their_gradients = {short(name): p.grad for name, p in theirs.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, (ours_, start, stop) in model.checkpoint_rows(ours).items():
        gradient = gradients[ours_][start:stop]
        assert relative_difference(gradient, their_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_notice(reference, family):
    """One-dimensional positions, a wrong mrope_section and (2.5) wrong windows are far outside the tolerance."""
    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    batch = one(PROMPTS[0], ours)
    expected = theirs(**reference_inputs(batch)).logits
    difference = lambda: (ours.logits(batch) - expected).abs().max()
    right = batch.positions
    batch.positions = torch.arange(batch.ids.shape[1]).expand(3, 1, -1)
    assert difference() > 1e-3
    batch.positions = right
    rope = ours.config.text_config.rope_parameters
    rope["mrope_section"] = [4, 2, 2]
    assert difference() > 1e-3
    rope["mrope_section"] = [2, 3, 3]
    assert difference() < 1e-5
    if family == "qwen2_5_vl":
        ours.config.vision_config.window_size = 24
        assert difference() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_transformers(reference, family):
    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    completions = model.generate(ours, PROMPTS, max_new_tokens=64, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, completions):
        expected = theirs.generate(**reference_inputs(one(prompt, ours)), do_sample=False, max_new_tokens=64,
                                   suppress_tokens=list(ours.forbidden_tokens), pad_token_id=0)
        assert completion.ids.tolist() == expected[0, len(prompt.ids):].tolist()


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.7, 1.0, 0), (0.7, 0.8, 0), (1.0, 1.0, 20),
                                                       (0.7, 0.6, 20)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_equal_teacher_forced_ones(reference, family, temperature, top_p, top_k):
    """Log-probs returned by the sampler against transformers' forward on the finished text, with its own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    theirs, directory = reference(family)
    ours = model.load_pretrained(directory)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for prompt, group in zip(PROMPTS, model.generate(ours, PROMPTS, 3, 24, temperature, top_p, top_k)):
        for completion in group:
            whole = SimpleNamespace(ids=torch.cat([prompt.ids, completion.ids]), pixels=prompt.pixels,
                                    grid_thw=prompt.grid_thw)
            with torch.no_grad():
                logits = theirs(**reference_inputs(one(whole, ours))).logits[0, len(prompt.ids) - 1 : -1]
            logits[:, ours.forbidden_tokens] = -torch.inf
            for warper in warpers:
                logits = warper(None, logits)
            expected = logits.log_softmax(-1).gather(1, completion.ids[:, None])[:, 0]
            assert torch.allclose(completion.logprobs, expected, atol=1e-5, rtol=0)


def test_the_sampler_draws_from_the_distribution():
    """Frequencies of 20,000 draws agree with the softmax, and the inverse is exact at its edges."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, 0.5]])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = model.sample_tokens(logits.expand(20_000, -1), draws)
    frequency = torch.bincount(tokens, minlength=5) / 20_000
    assert (frequency - logits[0].softmax(0)).abs().max() < 0.015 and frequency[2] == 0
    edge = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert model.sample_tokens(logits.expand(2, -1), edge)[0].tolist() == [0, 4]
    assert torch.allclose(logprobs, logits[0].log_softmax(0)[tokens])


def test_a_large_vocabulary_is_drawn_from_like_a_small_one():
    """The draw by blocks finds the token that one cumulative sum over all words finds, never one of probability 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5000, generator=generator)
    logits[:, torch.randint(5000, (2000,), generator=generator)] = -torch.inf
    probabilities = logits.softmax(-1)
    uniform = torch.rand(200, 1, generator=generator, dtype=torch.float64)
    uniform[:4, 0] = torch.tensor([0.0, 1 - 2**-53, 1 - 1e-10, 1e-300], dtype=torch.float64)
    tokens = model.draw(probabilities, uniform)
    cumulative = probabilities.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=4999)
    assert (tokens[4:] == expected[4:]).float().mean() > 0.98  # a float32 sum of a block may round to its neighbour
    assert ((tokens - expected).abs()[4:] <= 3).all()
    assert (probabilities.gather(1, tokens) > 0).all()
    steps = torch.tensor([[0.0, 0.5, 1.0, 1.0]], dtype=torch.float64)
    for fraction, index in ((-1e-9, 1), (0.0, 1), (0.5, 2), (1.0, 2), (1.1, 2)):  # rounding may leave [0, 1)
        assert model.invert(steps, torch.tensor([[fraction]], dtype=torch.float64)) == index
    assert tokens[0] == (probabilities[0] > 0).nonzero()[0] and tokens[1] == (probabilities[1] > 0).nonzero()[-1]


def test_top_p_keeps_the_smallest_sufficient_set():
    """Also where the nucleus is larger than the first 1,024 candidates, which are tried before a full sort."""
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda top_p: model.likeliest(probabilities, top_p, 0)[0].isfinite().sum().item()
    assert [kept(p) for p in (0.1, 0.5, 0.6, 0.8001, 0.99)] == [1, 1, 2, 3, 4]
    flat = torch.zeros(1, 5000)
    assert model.likeliest(flat, 0.9, 0)[0].isfinite().sum().item() == pytest.approx(4500, abs=2)
    assert model.likeliest(flat, 0.9, 100)[0].isfinite().sum().item() == pytest.approx(90, abs=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_depend_on_their_seed_and_nothing_else(reference, family):
    """Alone or among others, while rows finish and leave the batch: the same tokens. Another seed: others."""
    _, directory = reference(family)
    network = model.load_pretrained(directory)
    network.stop_tokens = list(range(2, 30))  # rows end early and at different times
    together = model.generate(network, PROMPTS, 6, 40, seeds=[7, 8, 9, 10])
    lengths = [len(c.ids) for group in together for c in group]
    assert min(lengths) < 5 and max(lengths) > 10, lengths
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(network, [prompt], 6, 40, seeds=[7 + i])[0]
        for a, b in zip(alone, together[i]):
            assert a.ids.tolist() == b.ids.tolist() and a.finished == b.finished
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="seeds"):
        model.generate(network, PROMPTS[:1], 1, 1, seeds=[2**32])
    other = model.generate(network, PROMPTS[:1], 6, 40, seeds=[100])[0]
    assert [c.ids.tolist() for c in other] != [c.ids.tolist() for c in together[0]]
    for completion in (c for group in together for c in group):
        ids = completion.ids.tolist()
        assert completion.finished == (ids[-1] < 30 and ids[-1] >= 2)
        assert not any(2 <= token < 30 for token in ids[:-1]), "went on after an end token"
        assert completion.finished or len(ids) == 40


class FakeGraph:
    """Stands in for a CUDA graph: replaying runs the step again, if everything it reads is where it was."""

    def __init__(self, decoder):
        self.decoder, self.where = decoder, self.addresses(decoder)

    @staticmethod
    def addresses(decoder):
        cache = decoder.cache
        tensors = [decoder.tokens, decoder.position, decoder.rotary.cos, cache.mask, cache.slot]
        tensors += [x for pair in cache.rows + cache.prompts for x in pair]
        return [(x.data_ptr(), x.shape) for x in tensors] + [cache.used]

    def replay(self):
        assert self.addresses(self.decoder) == self.where, "a captured graph would read stale memory"
        self.decoder.hidden = self.decoder.run()


def test_a_captured_step_gives_the_same_tokens(reference, monkeypatch):
    """What a CUDA graph needs, without a GPU: fixed tensors, masked slots, and a new capture whenever they change."""
    _, directory = reference("qwen2_vl")
    network = model.load_pretrained(directory)
    network.stop_tokens = [2, 3]
    eager = model.generate(network, PROMPTS, 6, 150)
    graphs = []

    def capture(decoder):
        graphs.append(FakeGraph(decoder))
        return graphs[-1]

    monkeypatch.setattr(model.Decoder, "capture", capture)
    monkeypatch.setattr(model, "CAPTURED_ON", ("cpu",))
    captured = model.generate(network, PROMPTS, 6, 150)
    for a, b in zip(sum(eager, []), sum(captured, [])):
        assert a.ids.tolist() == b.ids.tolist() and torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert {graph.where[-1] for graph in graphs} == {64, 128, 150} and len(graphs) > 6  # grown, and after rows left
    count = len(graphs)
    model.generate(network, PROMPTS[:1], 2, 10, cuda_graph=False)
    assert len(graphs) == count


def test_finished_rows_and_padding_are_not_worked_on(reference, monkeypatch):
    """Counted in tokens that enter the first layer: living rows while decoding, real tokens while training."""
    _, directory = reference("qwen2_vl")
    network = model.load_pretrained(directory)
    network.stop_tokens = list(range(2, 30))
    seen, images = [], []
    network.model.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    network.visual.register_forward_hook(lambda module, inputs, out: images.append(len(inputs[1])))
    [group] = model.generate(network, PROMPTS[:1], 32, 60)
    lengths = torch.tensor([len(completion.ids) for completion in group])
    living = [(lengths > t).sum().item() for t in range(1, lengths.max())]  # who needs another token after t
    assert seen[0] == len(PROMPTS[0].ids) and len(seen) == 1 + len(living)
    assert all(rows >= n for rows, n in zip(seen[1:], living)) and sum(seen[1:]) < 1.25 * sum(living)

    seen.clear()
    ids, mask = model.pad_completions([[completion.ids for completion in group]])
    network(one(PROMPTS[0], network), ids, mask)
    assert seen == [len(PROMPTS[0].ids) + sum(lengths) - 32]
    assert images == [2, 2], "the vision tower runs once for all rows, and sees each image once"


def test_prompts_of_similar_length_share_a_batch():
    lengths = [930, 94, 100, 600, 188, 189]
    assert model.similar_lengths(lengths) == [[1, 2, 4], [5], [3, 0]]
    assert model.similar_lengths([]) == [] and model.similar_lengths([5]) == [[0]]


def test_forbidden_tokens_are_never_sampled(reference):
    _, directory = reference("qwen2_vl")
    network = model.load_pretrained(directory)
    assert network.forbidden_tokens == [190, 191, 192, 193]
    network.forbidden_tokens = list(range(20, 200))
    network.stop_tokens = []
    ids = torch.cat([c.ids for c in model.generate(network, PROMPTS[:1], 8, 30)[0]])
    assert len(ids) == 240 and ids.max() < 20


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_on_one_prompt_equals_the_prompt_repeated(reference, family, temperature):
    """The training forward (prompt once, members attend to it) against plain logits of each prompt + completion."""
    _, directory = reference(family)
    network = model.load_pretrained(directory)
    network.stop_tokens = list(range(2, 20))
    groups = [[c.ids for c in group] for group in model.generate(network, PROMPTS, 4, 20, temperature)]
    ids, mask = model.pad_completions(groups)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    logprobs = network(model.PromptBatch.from_prompts(PROMPTS, network.config), ids, mask, temperature)
    (logprobs * weights).sum().backward()
    shared = gradients(network)

    network.zero_grad()
    repeated = torch.zeros_like(weights)
    for b, prompt in enumerate(PROMPTS):
        for n, completion in enumerate(groups[b]):
            whole = SimpleNamespace(ids=torch.cat([prompt.ids, completion]), pixels=prompt.pixels,
                                    grid_thw=prompt.grid_thw)
            logits = network.logits(one(whole, network))[0, len(prompt.ids) - 1 : -1] / temperature
            logits[:, network.forbidden_tokens] = -torch.inf
            values = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
            repeated[b, n, : len(completion)] = values
    (repeated * weights).sum().backward()
    assert torch.allclose(logprobs, repeated, atol=1e-5)
    for name, expected in gradients(network).items():
        assert relative_difference(shared[name], expected) < 1e-5, name


def test_a_hole_in_the_mask_is_an_error(reference):
    """Masked tokens are padding: they are not seen. Who only wants not to learn them would train a blind network."""
    network = model.load_pretrained(reference("qwen2_vl")[1])
    ids, mask = model.pad_completions([[torch.arange(10, 20), torch.arange(30, 35)]])
    mask[0, 0, :3] = False
    with pytest.raises(ValueError, match="tokens after padding"):
        network(one(PROMPTS[0], network), ids, mask)


def test_recomputed_activations_change_nothing(reference):
    """The gradients are the same, and every block of both towers runs twice."""
    _, directory = reference("qwen2_vl")
    network = model.load_pretrained(directory)
    ids, mask = model.pad_completions([[torch.arange(10, 20), torch.arange(30, 35)]])
    kept, runs = [], []
    for block in (blocks := [*network.visual.blocks, *network.model.layers]):
        block.register_forward_pre_hook(lambda *_: runs.append(network.checkpoint_activations))
    for network.checkpoint_activations in (False, True):
        network.zero_grad()
        network(one(PROMPTS[0], network), ids, mask).sum().backward()
        kept.append(gradients(network))
    assert runs == [False] * len(blocks) + [True] * 2 * len(blocks)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_token_log_probs_and_their_gradients(chunk):
    """Against autograd through the full logits, for every chunk size, with forbidden tokens and a temperature."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, dtype=torch.double), torch.randn(11, 5, dtype=torch.double)
    targets, g = torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.randn(7)
    results = []
    for ours in (True, False):
        h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
        if ours:
            values = model.token_log_probs(h, w, targets, 0.7, (8, 10), chunk)
        else:
            logits = (h @ w.T / 0.7).index_fill(1, torch.tensor([8, 10]), -torch.inf)
            values = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (values * g).sum().backward()
        results.append((values, h.grad, w.grad))
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_a_gradient_known_beforehand_saves_a_pass_and_a_wrong_one_does_no_harm(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, g = torch.randn(7, 5), torch.randn(11, 5), torch.randn(7)
    calls, run = [], model.log_probs_by_chunk
    monkeypatch.setattr(model, "log_probs_by_chunk", lambda *args, **more: calls.append(1) or run(*args, **more))

    def gradients_with(expected):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        calls.clear()
        values = model.token_log_probs(h, w, torch.arange(7), 0.7, (8,), 3, expected)
        (values * g).sum().backward()
        return len(calls), values, h.grad, w.grad

    passes, *right = gradients_with(None)
    assert passes == 2
    for expected, passes_expected in ((g, 1), (g * (1 + 1e-3), 2), (torch.zeros(7), 2)):
        passes, *results = gradients_with(expected)
        assert passes == passes_expected
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results, right))


def test_positions_that_do_not_fit_the_images_are_refused():
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=IMAGE)
    prompt = random_prompt([(8, 8)], 3)
    with pytest.raises(ValueError, match="do not match"):
        model.mrope_positions(prompt.ids, torch.tensor([[1, 8, 12]]), config)
    with pytest.raises(ValueError, match="2 images"):
        model.mrope_positions(prompt.ids, torch.tensor([[1, 8, 8], [1, 8, 8]]), config)


# ---- Checkpoints on disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_loads_in_transformers(reference, tmp_path, family, tied):
    theirs, directory = reference(family, tied)
    ours = model.load_pretrained(directory)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(ours, tmp_path, directory, torch.float32, max_shard_size=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    saved = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in saved) == (not tied), "a tied head is stored once"
    again = type(theirs).from_pretrained(tmp_path).eval()
    batch = one(PROMPTS[0], ours)
    with torch.no_grad():
        assert (again(**reference_inputs(batch)).logits - ours.logits(batch)).abs().max() < 1e-4
        assert torch.equal(model.load_pretrained(tmp_path).logits(batch), ours.logits(batch))


def test_hub_layout_is_read(reference, tmp_path):
    """A flat config.json with rope_scaling, and the state-dict names of transformers 5 in several files."""
    theirs, directory = reference("qwen2_vl")
    nested = json.loads((directory / "config.json").read_text())
    rope = nested["text_config"].pop("rope_parameters")
    flat = {**nested.pop("text_config"), **nested, "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    flat["vision_config"]["in_chans"] = flat["vision_config"].pop("in_channels")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    tensors = {k: v.clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    names, index = sorted(tensors), {}
    for i in range(3):
        save_file({name: tensors[name] for name in names[i::3]}, tmp_path / f"part-{i}.safetensors")
        index |= {name: f"part-{i}.safetensors" for name in names[i::3]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    ours = model.load_pretrained(tmp_path)
    assert ours.stop_tokens == [2, 3]
    batch = one(PROMPTS[0], ours)
    assert (ours.logits(batch) - theirs(**reference_inputs(batch)).logits).abs().max() < 1e-5


def test_rows_past_the_tokenizer_are_forbidden(reference, tmp_path):
    _, directory = reference("qwen2_vl")
    flat_copy(directory, tmp_path / "c")
    (tmp_path / "c" / "vocab.json").write_text(json.dumps({str(i): i for i in range(150)}))
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"195": {}}}))
    assert model.load_pretrained(tmp_path / "c").forbidden_tokens == [190, 191, 192, 193, 196, 197, 198, 199]


@pytest.mark.parametrize("damage, message", [
    ("absent", "not a checkpoint directory"),
    ("no config", "no config.json"),
    ("not JSON", "not a valid JSON"),
    ("other model", "model_type 'llama'"),
    ("no weights", "no model.safetensors"),
    ("missing tensor", "lacks model.norm.weight"),
    ("unknown tensor", "unknown tensor model.surprise"),
    ("misshaped tensor", "model.norm.weight has shape (63,)"),
    ("misshaped part", "self_attn.k_proj.weight has shape"),
    ("cut off", "damaged or not a safetensors file"),
])
def test_an_unusable_checkpoint_is_named_in_one_line(reference, tmp_path, damage, message):
    _, directory = reference("qwen2_vl")
    broken = flat_copy(directory, tmp_path / "c", **({"model_type": "llama"} if damage == "other model" else {}))
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    edits = {
        "no config": lambda: (broken / "config.json").unlink(),
        "not JSON": lambda: (broken / "config.json").write_text("{"),
        "no weights": lambda: weights.unlink(),
        "missing tensor": lambda: save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights),
        "unknown tensor": lambda: save_file(tensors | {"model.surprise": torch.zeros(1)}, weights),
        "misshaped tensor": lambda: save_file(tensors | {"model.norm.weight": torch.zeros(63)}, weights),
        "misshaped part": lambda: save_file(
            tensors | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 63)}, weights),
        "cut off": lambda: weights.write_bytes(weights.read_bytes()[:5000]),
    }
    edits.get(damage, lambda: None)()
    with pytest.raises(model.CheckpointError) as error:
        model.load_pretrained(tmp_path / "nowhere" if damage == "absent" else broken)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_only_known_files_are_copied(reference, tmp_path):
    """Code in a checkpoint directory stays behind; an index cannot point outside its directory."""
    _, directory = reference("qwen2_vl")
    source = flat_copy(directory, tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    model.save_pretrained(model.load_pretrained(directory), tmp_path / "copy", source)
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    shutil.move(source / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(model.CheckpointError, match="no elsewhere"):
        model.load_pretrained(source)
