"""What several test files need: the repository and extras/ on the path, and small random checkpoints that
transformers wrote."""

import os
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded by a test
# Several small processes on a few cores: one thread each is far faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
IMAGE = 190
VISION = {
    "image_token_id": IMAGE,
    "video_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rope_parameters": ROPE,
}


def reference_network(family: str, tied: bool = True):
    """A small random network of transformers; its biases and norms are random too."""
    import transformers

    torch.manual_seed(0)
    settings = {"text_config": TEXT, "tie_word_embeddings": tied, **VISION}
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4}
        config = transformers.Qwen2VLConfig(vision_config=vision, **settings)
    elif family == "qwen2_5_vl":
        # A window is 4 merged patches wide; block 1 sees the whole image.
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                  "patch_size": 4, "window_size": 32, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(vision_config=vision, **settings)
    else:
        # Blocks 0 and 1 also feed the first layers of the language model (DeepStack).
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                  "patch_size": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        text = {**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
        config = transformers.Qwen3VLConfig(vision_config=vision, **{**settings, "text_config": text})
    network = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def random_prompt(grids, text: int, seed: int = 0) -> SimpleNamespace:
    """A prompt with images of `grids` (h, w) in patches and `text` random words, as the network takes it."""
    generator = torch.Generator().manual_seed(seed)
    ids = [5, 6]
    for h, w in grids:
        ids += [192] + [IMAGE] * (h * w // 4) + [193, 9]
    ids += torch.randint(10, 180, (text,), generator=generator).tolist()
    patches = sum(h * w for h, w in grids)
    return SimpleNamespace(
        ids=torch.tensor(ids),
        pixels=torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
        grid_thw=torch.tensor([(1, h, w) for h, w in grids], dtype=torch.long).view(-1, 3))


def read_log(path: Path) -> str:
    """A run's log without the seconds in it, in which no two runs agree."""
    return re.sub(r'"(rollout|update)_seconds": [^,}]+, ', "", path.read_text())


def hear_signals():
    """Handle signals as a program does that a terminal started: nohup and a script's background have some ignored,
    and every child inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """reference(family, tied) -> (transformers' network, the directory it was saved in); made once a session."""
    made = {}

    def get(family: str, tied: bool = True):
        if (family, tied) not in made:
            directory = tmp_path_factory.mktemp(family)
            network = reference_network(family, tied)
            network.save_pretrained(directory)
            made[family, tied] = network, directory
        return made[family, tied]

    return get


@pytest.fixture(autouse=True)
def nothing_left():
    """Programs leave their process group and their signal handlers to the end of the process, and pytest lives on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()




@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that is asked for an optional package skips, if that package is not installed."""
    try:
        return (yield)
    except Exception as error:
        asked = re.search(r"pip install ([\w-]+)|No module named '(\w+)", str(error))
        if asked and find_spec((asked[1] or asked[2]).replace("-", "_")) is None:
            pytest.skip(str(error))
        raise
