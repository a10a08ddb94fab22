"""Files without pickles: safetensors and JSON, read as if a stranger had written them, written so that nothing is lost.

A safetensors file is

    8 bytes     length of the header, little-endian
    header      JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    data        the tensors' raw bytes, little-endian, row-major; the offsets count from here

Nothing in it is executed, and a tensor is found without reading the others: the file is mapped into memory, and a
tensor is a view of the map. The header may lie, so every number in it is checked before it is used. Every fault is a
ValueError or a FileNotFoundError of one line: where, what, what to do.

Writing goes to a temporary name beside the target, which is then renamed: a reader sees the old file or the new one.
Of several processes (data/shard.py) each reads only the shares that it holds, and the first one writes.
"""

import io
import json
import mmap
import os
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from data.shard import RANK, copy_into, whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHOW_PROGRESS_FROM = 500_000_000  # bytes: below this a load takes a moment


def read_json(path: str | Path) -> dict:
    """The JSON object in a file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is this the right folder, and is it complete?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


class SafetensorsFile(Mapping):
    """A safetensors file as a mapping name -> tensor (a view of the mapped file: copy it, do not write to it)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; is the model folder complete?")
        size = self.path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                self.fail(f"the header should be {length} bytes long, the file has {size}; it is cut off or corrupt")
            header = file.read(length)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # "copy": torch wants writable memory
        self.start = 8 + length
        self.entries = self.check(self.parse(header), size - self.start)

    def fail(self, message):
        raise ValueError(f"{self.path}: {message}")

    def parse(self, header: bytes) -> dict:
        twice = []

        def no_duplicates(pairs):
            names = [name for name, _ in pairs]
            if len(set(names)) < len(names):
                twice.append(max(names, key=names.count))
            return dict(pairs)

        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError):  # also a number of more digits than Python takes
            self.fail("the header is not JSON; this is no safetensors file, or it is corrupt")
        if twice:
            self.fail(f"{twice[0]!r} stands in the header twice; the file is corrupt")
        if not isinstance(entries, dict):
            self.fail("the header is not a JSON object; the file is corrupt")
        entries.pop("__metadata__", None)
        return entries

    def check(self, entries: dict, size: int) -> dict:
        """Each entry lies inside the `size` bytes of data, is as long as its dtype and shape say, and overlaps none."""
        spans = []
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
                self.fail(f"tensor {name!r} has no dtype, shape or data_offsets; the file is corrupt")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(dtype, str) or dtype not in DTYPES:
                self.fail(f"tensor {name!r} has dtype {dtype!r}; this reader knows {', '.join(DTYPES)}")
            if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
                self.fail(f"tensor {name!r} has shape {shape!r}, offsets {offsets!r}; expected whole numbers >= 0")
            begin, end = offsets
            if not begin <= end <= size:
                self.fail(f"tensor {name!r} lies at bytes {begin} to {end} of {size}; the file is cut off or corrupt")
            needed = prod(shape) * DTYPES[dtype].itemsize
            if end - begin != needed:
                needed = needed if needed < 2**63 else "more than any file has"
                self.fail(f"tensor {name!r} takes {end - begin} bytes, {dtype} {shape} needs {needed}; it is corrupt")
            spans.append((begin, end, name))
        spans.sort()
        for (_, end, name), (begin, _, other) in zip(spans, spans[1:], strict=False):
            if begin < end:
                self.fail(f"tensors {name!r} and {other!r} overlap; the file is corrupt")
        return entries

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        dtype, shape, begin = DTYPES[entry["dtype"]], entry["shape"], self.start + entry["data_offsets"][0]
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=prod(shape), offset=begin).view(shape)

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    def forget(self):
        """Tell the system that the pages read so far are not needed in memory any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def is_sizes(value) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


# Checkpoints: one file, or shards with an index ----------------------------------------------------------------------


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, or FileNotFoundError."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor {index.name}; is the download complete?")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: no weight_map of tensor names to file names; download it again")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: {outside[0]!r} is not the name of a file in this folder")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}")
    return shards


def tensor_names(folder: str | Path) -> list[str]:
    return [name for path in checkpoint_files(folder) for name in SafetensorsFile(path)]


def load_checkpoint(folder: str | Path, places: dict[str, torch.Tensor]):
    """Copy each tensor of a model folder into its place, converting dtype and device; every one exactly once.

    ValueError, before the first copy, where a tensor has no place, a place has no tensor, a tensor stands in two files,
    or shapes differ; it names them.
    """
    files = [SafetensorsFile(path) for path in checkpoint_files(folder)]
    names = [name for file in files for name in file]
    copy_all(folder, files, names, places)


def copy_all(source, files, names, places):
    check_all(source, files, names, places)
    total = sum(place.nbytes for place in places.values())
    large = total > SHOW_PROGRESS_FROM and RANK == 0
    if large and not sys.stderr.isatty():
        print(f"loading {total / 1e9:.1f} GB from {source} ...", file=sys.stderr, flush=True)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=None if large else True) as bar:
        for file in files:
            for name in file:
                copy_into(places[name], file[name])
                bar.update(places[name].nbytes)
                file.forget()


def check_all(source, files, names, places):
    missing, extra = sorted(places.keys() - set(names)), sorted(set(names) - places.keys())
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing: {some(missing)}; is it complete, and "
                         "does config.json belong to it?")  # fmt: skip
    if extra:
        raise ValueError(f"{source}: {len(extra)} tensors that the model does not have: {some(extra)}; does "
                         "config.json belong to it?")
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: tensor {max(names, key=names.count)!r} stands in more than one file")
    for file in files:
        for name in file:
            if list(places[name].shape) != file.entries[name]["shape"]:
                raise ValueError(f"{file.path}: tensor {name!r} has shape {file.entries[name]['shape']}, the model has "
                                 f"{list(places[name].shape)}")  # fmt: skip


def some(names: list[str], most: int = 3) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_safetensors(path: str | Path, places: dict[str, torch.Tensor], check_only=False):
    """Copy the tensors of one file into their places, every one exactly once; errors as in `load_checkpoint`.
    check_only: find the errors and copy nothing (then the places may be on the meta device)."""
    file = SafetensorsFile(path)
    (check_all if check_only else copy_all)(path, [file], list(file), places)


# Writing -------------------------------------------------------------------------------------------------------------


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None):
    """Write tensors (converted to `dtype` one at a time, if given) to a safetensors file, atomically."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers looks for this entry
    for name, t in tensors.items():
        kind = dtype or t.dtype
        end = offset + t.numel() * kind.itemsize
        header[name] = {"dtype": DTYPE_NAMES[kind], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # keeps the data aligned in the map

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            t = whole(t).detach()
            if RANK == 0:
                t = t.to("cpu", dtype or t.dtype).contiguous()
                file.write(t.view(-1).view(torch.uint8).numpy().data if t.numel() else b"")

    write_atomically(path, write)


def write_text(path: str | Path, text: str):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_atomically(path: str | Path, write):
    if RANK > 0:  # `write` may gather what it writes, which takes all processes
        return write(io.BytesIO())
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # two runs may write the same file, each for itself
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        hint = "is the disk full, or the folder read-only?"
        raise OSError(f"{path}: could not be written ({error.strerror or error}); {hint}") from None
    finally:
        temporary.unlink(missing_ok=True)  # gone by now unless something failed
