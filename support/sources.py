"""Where rows come from: JSON lines, Parquet shards, `save_to_disk` folders, the Hugging Face hub.

`read_rows` yields (file, row number, row), and a row is a dictionary. Images and masks of Parquet and Arrow files stay
on disk: the row holds a `Stored`, which reads its cell when asked. So a training set may be larger than memory.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.tasks import Frame

SPLITS = ("train", "validation", "test")
LARGE = ("image", "images", "mask")      # columns that are read cell by cell, and only when needed
JSON = (".json", ".jsonl")
MAX_IMAGE_PIXELS = 89_478_485     # Pillow's limit too: a file of a few kB can claim more than memory holds

class DataError(ValueError):
    """A user's mistake, told in one line: where, what, and what to do about it."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))

def require(condition, complaint: str):
    """Raise DataError with a complaint unless the condition holds."""
    if not condition:
        raise DataError(complaint)

def from_json(value):
    """What JSON text says; anything else as it is. DataError for bad JSON."""
    try:
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    except (ValueError, RecursionError) as error:        # bad JSON or UTF-8, a 5,000-digit number, 5,000 brackets
        raise DataError(f"not JSON ({error}): {value[:80]!r}") from None

# ---- From a name to files --------------------------------------------------------------------------------------------

def fetch(name, kind: str) -> Path:
    """A local path as it is, or the folder of a hub "model", "dataset" or SAM for "masks", downloaded on first use."""
    flags = {"model": "the checkpoint with --model", "dataset": "the data with --data", "masks": "SAM 2 with --masks"}
    path, flag = Path(name), flags[kind] + " PATH"
    if path.exists():
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) and path.suffix not in (*JSON, ".parquet", ".arrow")
    require(is_hub_id, f"{name}: no such file or folder; give {flag}")
    if kind == "dataset":
        _require_pyarrow(name)           # before a download of gigabytes, not after it
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), repo_type="dataset" if kind == "dataset" else "model",
                                      ignore_patterns=["*.bin", "*.pt", "*.pth", "*.py"]))
    except Exception as error:           # no network, no such repository, disk full: the remedy is the same
        raise DataError(f"{name}: no such folder, and the Hugging Face hub did not give it "
                        f"({type(error).__name__}: {str(error)[:150]}); give {flag}") from None

def _require_pyarrow(name):
    require(find_spec("pyarrow"), f"{name}: reading Parquet and Arrow files needs pyarrow: pip install pyarrow")

def find_data_files(path: Path, split: str) -> list[Path]:
    """The files of a split: the path itself, those that `save_to_disk` listed, or a folder's Parquet and JSON lines.

    A name without any split (shard-0.parquet, not train-00000-of-00001.parquet) is read for every split.
    """
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():           # save_to_disk of several splits
        splits = _read_json(path / "dataset_dict.json", dict).get("splits", [])
        require(split in splits, f"{path}: has no split {split!r}, but {', '.join(map(repr, splits)) or 'none'}")
        path = path / split
    if (path / "state.json").is_file():                  # save_to_disk; .name: a list must not point elsewhere
        listed = _read_json(path / "state.json", dict).get("_data_files", [])
        return [path / Path(entry["filename"]).name for entry in listed]
    of_split = {name: re.compile(rf"(?<![a-z]){name}(?![a-z])") for name in SPLITS}
    files = [file for file in sorted(path.rglob("*")) if file.suffix in (".parquet", ".jsonl")]
    return [file for file in files if of_split[split].search(name := str(file.relative_to(path)))
            or not any(pattern.search(name) for pattern in of_split.values())]

# ---- From files to rows ----------------------------------------------------------------------------------------------

def read_rows(source: str, split: str):
    """Yield (file, row number from 1, row) of a path or hub id; a row is a dict, or the bytes of a line of JSON."""
    path = fetch(source, "dataset")
    files = find_data_files(path, split)
    require(files, f"{source}: no Parquet, Arrow or JSON lines file of the {split} split; give one with --data PATH")
    for file in files:
        for number, row in enumerate(_json_rows(file) if file.suffix in JSON else _table_rows(file), 1):
            if row != b"":
                yield file, number, row

def _json_rows(file: Path) -> list:
    """The lines of a file, b"" for an empty one; or the items of a list that is the whole file."""
    text = file.read_bytes()
    if file.suffix == ".json" and text.lstrip().startswith(b"["):
        return _read_json(file, list)
    return [line.strip() for line in text.splitlines()]

def _read_json(file: Path, kind: type):
    """What a JSON file holds, a list or a dict; DataError if it is damaged or holds something else."""
    try:
        content = from_json(file.read_bytes())
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    require(isinstance(content, kind), f"{file}: not a JSON {kind.__name__}")
    return content

def _table_rows(file: Path):
    """The rows of a Parquet or Arrow file, with a Stored in place of every image and mask."""
    _require_pyarrow(file)
    import pyarrow
    try:
        names, heights, read = _open(file)
        for group, height in enumerate(heights):
            columns = [[Stored(file, group, i, name) for i in range(height)] if name in LARGE
                       else read(group, name).to_pylist() for name in names]
            yield from (dict(zip(names, row)) for row in zip(*columns))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: not readable as Parquet or Arrow ({error}); data are .jsonl, .json, .parquet or a "
                        "save_to_disk folder") from None

@lru_cache(maxsize=64)
def _open(file: Path):
    """(column names, number of rows of each group, read(group, name) -> that column) of a Parquet or Arrow file."""
    import pyarrow.parquet
    if file.suffix == ".arrow":          # its batches are views of the file: the system pages them in and out
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) as stream:
            names, batches = stream.schema.names, list(stream)
        return names, [batch.num_rows for batch in batches], lambda group, name: batches[group].column(name)
    with pyarrow.parquet.ParquetFile(file) as shard:
        names, metadata = shard.schema_arrow.names, shard.metadata
    heights = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(group, name):               # opened anew: an open file holds on to the group that was read last
        with pyarrow.parquet.ParquetFile(file, metadata=metadata) as shard:
            return shard.read_row_group(group, [name]).column(name)

    return names, heights, read

@lru_cache(maxsize=4)
def _large_column(file: Path, group: int, name: str):
    """The column that holds a cell; the last few are kept, for neighbours are often read together."""
    return _open(file)[2](group, name)

@dataclass(frozen=True)
class Stored:
    """A cell of a Parquet or Arrow file, which stays there until `read`."""

    file: Path
    group: int                           # row group of a Parquet file, record batch of an Arrow stream
    row: int                             # in the group
    column: str

    def read(self):
        """The cell's value."""
        return _large_column(self.file, self.group, self.column)[self.row].as_py()

    def is_null(self) -> bool:
        """Whether nothing is there."""
        return not _large_column(self.file, self.group, self.column)[self.row].is_valid

# ---- From a cell to an image -----------------------------------------------------------------------------------------

def open_image(source, where: str = "image") -> Image.Image:
    """Decode an image (a path, bytes, a stored cell or a Pillow image) to RGB, upright by its EXIF tag, on white where
    it is transparent; of an animation the first picture. DataError names `where`."""
    try:
        image_size(source)               # refuses what would fill the memory
        with _open_header(source) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):            # 16 bits: convert would cut off what is brighter than 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            require(image.mode not in ("I", "F"), "pixels of 32 bits, whose range nobody knows: save it with 8 or 16")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:           # damaged files make Pillow raise nearly anything
        raise DataError(f"{where}: {error}; replace or remove the image") from None

def image_size(source) -> Frame:
    """(width, height) of an image once upright, from its header alone. DataError for what no model could take."""
    try:
        with _open_header(source) as image:
            turned = "exif" in image.info and image.getexif().get(0x0112) in (5, 6, 7, 8)     # 90 or 270 degrees
            width, height = image.size[::-1] if turned else image.size
    except Exception as error:
        raise DataError(f"unreadable image ({error})") from None
    require(width * height <= MAX_IMAGE_PIXELS and max(width, height) <= 200 * min(width, height),
            f"the image of {width} x {height} pixels is too large or too long")
    return width, height

def _open_header(source) -> Image.Image:
    source = find_image(source.read(), source.file.parent) if isinstance(source, Stored) else source
    source = BytesIO(source) if isinstance(source, bytes) else source
    return source if isinstance(source, Image.Image) else Image.open(source)

def find_image(cell, folder: Path):
    """The bytes or the path in an image cell: text is a path from `folder`, a struct has either, a list one image."""
    if isinstance(cell, list):
        require(len(cell) == 1, f"{len(cell)} images in a row: a sample has one")
        cell = cell[0]
    if isinstance(cell, dict):           # Hugging Face's image struct: bytes, or else a path
        cell = cell.get("bytes") or cell.get("path")
    require(isinstance(cell, (bytes, str)), "the image is empty")
    return folder / cell if isinstance(cell, str) else cell
