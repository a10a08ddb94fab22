"""A Hugging Face folder: config.json, safetensors, and which tensor is which part of a model.

    config.json                        the sizes; read are the spellings of 2024 and transformers 5
    model.safetensors                  the weights in one file, or
    model.safetensors.index.json       in shards: {"weight_map": {tensor name: file name}}

A safetensors file is

    8 bytes     length of the header, little-endian
    header      JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    data        the tensors' raw bytes, little-endian, row-major; the offsets count from here

Nothing in it is executed, and a tensor is found without reading the others: the file is mapped into
memory, and a tensor is a view of the map. The header may lie, so every number in it is checked
before it is used.

A `Place` is where a tensor goes, and where it is taken from when a folder is written: a parameter,
or one matrix of a stack of experts, or half of that. `places` is the one table of names and places.
The places of a parameter that is cut over several processes (data/shard.py) take only the rows that
this process holds; a parameter is gathered once when it is written, and the first process writes.

A config key that would change the network in a way that model.py does not know (rope scaling,
attention biases, a sliding window) is refused, not ignored. Keys that change nothing here are kept.

Every fault is a ValueError or a FileNotFoundError of one line: where, what, what to do.
"""

import dataclasses
import json
import mmap
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from tqdm import tqdm

from data import run
from data import shard as processes

FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}
SHOW_PROGRESS_FROM = 500_000_000  # bytes: below this a load takes a moment


# config.json -------------------------------------------------------------------------------------

ARCHITECTURES = {"olmoe": "OlmoeForCausalLM", "mixtral": "MixtralForCausalLM"}


def is_count(value) -> bool:
    return type(value) is int and 0 < value < 2**31  # type(): Python counts true as an int


def is_number(value) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def is_token_ids(value) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(type(i) is int and 0 <= i < 2**31 for i in ids)


# type of a key -> what its value must be, in words and as a test
RULES = {
    int: ("a positive integer", is_count),
    float: ("a number >= 0", is_number),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a text", lambda value: isinstance(value, str)),
}
TOKEN_IDS = ("a token id or a list of them", is_token_ids)


def read_config(folder: str | Path, kind: type):
    """Read folder/config.json into `kind`, a dataclass whose fields are the keys (model.Config)."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give a folder with config.json and model.safetensors"
        )
    path = Path(folder) / "config.json"
    raw = run.read_json(path)
    try:
        return make_config(raw, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_config(raw: dict, kind: type):
    """The content of a config.json -> `kind`. ValueError for what the network cannot be."""
    keys = one_spelling(raw)
    refuse_other_networks(keys)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "extra"}
    known = {}
    for name, f in fields.items():
        value = keys.pop(name, None)
        if value is None and f.default is not dataclasses.MISSING:
            continue  # null and missing are the default
        python_type = (get_args(f.type) or (f.type,))[0]  # int of `int | None`
        wanted, fits = TOKEN_IDS if name.endswith("_token_id") else RULES[python_type]
        if not fits(value):
            raise ValueError(f"{name} is {run.shown(value)}; it must be {wanted}")
        known[name] = value
    return kind(**known, extra=keys)


def one_spelling(raw: dict) -> dict:
    """The keys as hub files of 2024 have them, with what a family takes for granted filled in."""
    keys = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")}
    family = keys.get("model_type")
    if family not in list(ARCHITECTURES):
        raise ValueError(
            f"model_type {run.shown(family)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    rope = keys.pop("rope_parameters", None) or {}
    scaling = keys.pop("rope_scaling", None) or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError("rope_parameters or rope_scaling is no object")
    rope_type = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type")
    if rope_type not in (None, "default"):
        raise ValueError(f"rope type {run.shown(rope_type)} is not supported; only 'default' is")
    if keys.get("rope_theta") is None:
        usual = 1e6 if family == "mixtral" else 1e4
        keys["rope_theta"] = rope.get("rope_theta", usual)
    if "num_local_experts" in keys:
        experts = keys.pop("num_local_experts")
        keys.setdefault("num_experts", experts)
    if family == "mixtral":
        keys["norm_topk_prob"] = True  # not a key of its config: always so
    return keys


def refuse_other_networks(keys: dict):
    if keys.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {run.shown(keys['hidden_act'])} is not supported")
    if keys.get("attention_bias"):
        raise ValueError("attention_bias is not supported")
    if keys.get("sliding_window") is not None:
        raise ValueError("sliding_window attention is not supported; only null is")


def config_keys(config) -> dict:
    """The content of a config.json in the hub's spelling, which transformers of any age reads."""
    keys = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    extra = keys.pop("extra")
    if config.model_type == "mixtral":
        keys["num_local_experts"] = keys.pop("num_experts")
        del keys["norm_topk_prob"]
    else:
        del keys["head_dim"]  # OLMoE has no such key: always hidden_size / heads
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "hidden_act": "silu",
        **extra,
        **keys,
    }


# Places ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A parameter of a model, or one matrix of a stack (E, ., .), or half of that matrix."""

    parameter: torch.Tensor
    expert: int | None = None  # which matrix of the stack
    half: int | None = None  # of gate_up_proj: 0 the gate rows, 1 the up rows

    @property
    def shape(self) -> list[int]:
        shape = list(self.parameter.shape)
        if self.expert is not None:
            shape = shape[1:]
        if self.half is not None:
            shape[0] //= 2
        return shape

    def of(self, stack: torch.Tensor, first: int = 0) -> torch.Tensor:
        """This place's part of its parameter, of which `stack` holds the rows from `first` on."""
        if self.expert is None:
            return stack
        matrix = stack[self.expert - first]
        return matrix if self.half is None else matrix.chunk(2)[self.half]

    def fill(self, source: torch.Tensor):
        """Copy a tensor of a file here; if the parameter is cut, what this process holds of it."""
        held, first = processes.held(self.parameter.detach())
        if self.expert is None:
            held.copy_(source[first : first + len(held)] if held.dim() else source)
        elif first <= self.expert < first + len(held):
            self.of(held, first).copy_(source)


class Stack(NamedTuple):
    """The places of a layer's experts, where a file holds them as one tensor (E, ., .)."""

    places: list[Place]

    @property
    def shape(self) -> list[int]:
        return [len(self.places), *self.places[0].shape]

    def fill(self, source: torch.Tensor):
        for place, matrix in zip(self.places, source):
            place.fill(matrix)


# What a layer has beside its MoE; queries and keys have norms in some families only.
ATTENTION_HALF = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
)


def places(model, fused=False) -> dict[str, Place | Stack]:
    """Tensor name in a Hugging Face folder -> its place in the model (a model.MoETransformer).

    fused: the experts of a layer as two stacked tensors, as transformers 5 holds them in memory and
    may save them; else one tensor for each matrix of each expert, as published checkpoints have it.
    Adapters have no names in such a folder and are passed over.
    """
    mixtral = model.config.model_type == "mixtral" and not fused
    table = {
        "model.embed_tokens.weight": Place(model.embed_tokens.weight),
        "model.norm.weight": Place(model.norm.weight),
    }
    if not model.config.tie_word_embeddings:
        table["lm_head.weight"] = Place(model.lm_head.weight)
    for i, block in enumerate(model.layers):
        layer = f"model.layers.{i}"
        parameters = dict(block.named_parameters())
        for name in ATTENTION_HALF:
            if name in parameters:
                table[f"{layer}.{name}"] = Place(parameters[name])
        moe = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
        table[f"{moe}.gate.weight"] = Place(block.moe.router.weight)
        gate_up, down = expert_places(block.moe.experts, model.config.num_experts)
        if fused:
            table[f"{moe}.experts.gate_up_proj"] = Stack(gate_up)
            table[f"{moe}.experts.down_proj"] = Stack(down)
            continue
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for e, place in enumerate(gate_up):
            table[f"{moe}.experts.{e}.{names[0]}.weight"] = place._replace(half=0)
            table[f"{moe}.experts.{e}.{names[1]}.weight"] = place._replace(half=1)
        for e, place in enumerate(down):
            table[f"{moe}.experts.{e}.{names[2]}.weight"] = place
    return table


def expert_places(experts, count: int) -> tuple[list[Place], list[Place]]:
    """The places of each expert's gate_up and down matrix. Experts that are kept in another order
    (esft.py) know themselves where each is."""
    if hasattr(experts, "places"):
        return experts.places()
    gate_up = [Place(experts.gate_up_proj, e) for e in range(count)]
    down = [Place(experts.down_proj, e) for e in range(count)]
    return gate_up, down


# One safetensors file ----------------------------------------------------------------------------


class SafetensorsFile(Mapping):
    """A safetensors file as a mapping name -> tensor (a view of the mapped file: do not write)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file; is the folder complete?")
        if not self.path.is_file():
            raise ValueError(f"{path}: is not a regular file; copy or download it again")
        size = self.path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                self.fail_short(length, size)
            header = file.read(length)
            # "copy": torch wants memory that it may write
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.start = 8 + length
        self.entries = self.parse(header)
        self.check(size - self.start)

    def fail(self, message: str):
        raise ValueError(f"{self.path}: {message}")

    def fail_short(self, length: int, size: int):
        with open(self.path, "rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                self.fail("is a Git LFS pointer, not the weights; fetch them with: git lfs pull")
        self.fail(f"the header should have {length} bytes, the file has {size}; it is cut off")

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
            self.fail(f"{run.shown(twice[0])} stands in the header twice; the file is corrupt")
        if not isinstance(entries, dict):
            self.fail("the header is not a JSON object; the file is corrupt")
        entries.pop("__metadata__", None)
        return entries

    def check(self, size: int):
        """Entries lie in the `size` bytes of data, fit their shapes, and do not overlap."""
        spans = []
        for name, entry in self.entries.items():
            begin, end = self.check_entry(run.shown(name), entry, size)
            spans.append((begin, end, name))
        spans.sort()
        for (_, end, name), (begin, _, other) in zip(spans, spans[1:]):
            if begin < end:
                self.fail(
                    f"tensors {run.shown(name)} and {run.shown(other)} overlap; it is corrupt"
                )

    def check_entry(self, name, entry, size) -> tuple[int, int]:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            self.fail(f"tensor {name} has no dtype, shape or data_offsets; the file is corrupt")
        if str(dtype) not in FILE_DTYPES:
            self.fail(f"tensor {name} has dtype {run.shown(dtype)}; not {', '.join(FILE_DTYPES)}")
        if not is_sizes(shape) or not is_sizes([begin, end]):
            what = run.shown([shape, begin, end])
            self.fail(f"tensor {name} has shape and offsets {what}; expected whole numbers >= 0")
        if not begin <= end <= size:
            self.fail(f"tensor {name} lies at bytes {begin} to {end} of {size}; it is cut off")
        if end - begin != prod(shape) * FILE_DTYPES[dtype].itemsize:
            what = f"{end - begin} bytes, which is not {dtype} {run.shown(shape)}"
            self.fail(f"tensor {name} has {what}; the file is corrupt")
        return begin, end

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        dtype, shape = FILE_DTYPES[entry["dtype"]], entry["shape"]
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        offset = self.start + entry["data_offsets"][0]
        flat = torch.frombuffer(self.map, dtype=dtype, count=prod(shape), offset=offset)
        return flat.view(shape)

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


# Reading -----------------------------------------------------------------------------------------


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, or FileNotFoundError."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FileNotFoundError(
            f"{folder}: neither model.safetensors nor {index.name}; is the download complete?"
        )
    weight_map = run.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: no weight_map of tensor names to file names; download it again")
    for name in weight_map.values():
        if Path(name).name != name:
            raise ValueError(f"{index}: {run.shown(name)} is not the name of a file in this folder")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}"
        )
    return shards


class Tensors:
    """The tensors of some safetensors files, to be copied into their places, each exactly once."""

    def __init__(self, source: str | Path, files: list[Path]):
        self.source = source
        self.files = [SafetensorsFile(path) for path in files]
        self.names = [name for file in self.files for name in file]

    def check(self, table: dict[str, Place | Stack]):
        """ValueError if a tensor has no place, a place no tensor, a tensor stands in two files, or
        shapes differ; it names them."""
        missing = sorted(table.keys() - set(self.names))
        if missing:
            raise ValueError(
                f"{self.source}: {len(missing)} tensors are missing: {some(missing)}; is it "
                "complete, and does its configuration belong to it?"
            )
        extra = sorted(set(self.names) - table.keys())
        if extra:
            raise ValueError(
                f"{self.source}: {len(extra)} tensors that the model does not have: {some(extra)}; "
                "does its configuration belong to it?"
            )
        if len(set(self.names)) < len(self.names):
            twice = max(self.names, key=self.names.count)
            raise ValueError(f"{self.source}: tensor {twice!r} stands in more than one file")
        for file in self.files:
            for name, entry in file.entries.items():
                if table[name].shape != entry["shape"]:
                    raise ValueError(
                        f"{file.path}: tensor {name!r} has shape {run.shown(entry['shape'])}, "
                        f"the model has {table[name].shape}"
                    )

    def fill(self, table: dict[str, Place | Stack]):
        """Copy each tensor into its place, converting dtype and device, after all were checked."""
        self.check(table)
        total = sum(entry_bytes(entry) for file in self.files for entry in file.entries.values())
        show = total > SHOW_PROGRESS_FROM and processes.RANK == 0
        if show and not sys.stderr.isatty():
            print(
                f"loading {total / 1e9:.1f} GB from {self.source} ...", file=sys.stderr, flush=True
            )
        off = None if show else True  # None: shown on a terminal
        with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=off) as bar:
            for file in self.files:
                for name, entry in file.entries.items():
                    table[name].fill(file[name])
                    file.forget()
                    bar.update(entry_bytes(entry))


def entry_bytes(entry: dict) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


class Checkpoint(Tensors):
    """The weights of a model folder."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, checkpoint_files(folder))
        self.fused = any(name.endswith(".experts.gate_up_proj") for name in self.names)

    def check_sizes(self, config):
        """ValueError if config.json claims more layers or experts than the files' headers hold: a
        model of that many would take for ever to build, and its names all of the memory."""
        held = len(self.names)
        wanted = config.num_hidden_layers * (2 if self.fused else config.num_experts)
        if wanted > held:
            raise ValueError(
                f"{self.source}: {held} tensors are not {config.num_hidden_layers} layers of "
                f"{config.num_experts} experts; does config.json belong to it?"
            )


def read_tensors(path: str | Path, table: dict[str, Place]):
    """Copy the tensors of one file into their places; errors as in Tensors.check."""
    Tensors(path, [Path(path)]).fill(table)


def some(names: list[str], most: int = 3) -> str:
    """The first names of a list, for a message."""
    text = ", ".join(run.shown(name).strip('"') for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


# Writing -----------------------------------------------------------------------------------------


def write_tensors(path: str | Path, table: dict[str, Place], dtype: torch.dtype | None = None):
    """Write what is at the places (converted to `dtype` one at a time, if given), atomically."""
    header = {"__metadata__": {"format": "pt"}}  # transformers looks for this entry
    offset = 0
    for name, place in table.items():
        kind = dtype or place.parameter.dtype
        end = offset + prod(place.shape) * kind.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kind],
            "shape": place.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # keeps the data aligned in the map

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for part in gathered(table):
            part = part.to("cpu", dtype or part.dtype).contiguous()
            file.write(part.view(-1).view(torch.uint8).numpy().data if part.numel() else b"")

    if processes.RANK == 0:
        run.write_atomically(path, write)
    else:
        for _ in gathered(table):
            pass  # what is gathered takes all processes


def gathered(table: dict[str, Place]):
    """What is at each place, in turn; a stack that is cut over processes is gathered once."""
    last = whole = None
    for place in table.values():
        if place.parameter is not last:
            last = place.parameter
            whole = processes.whole(last.detach())
        yield place.of(whole)


def write_model(folder: str | Path, model, dtype: torch.dtype):
    """Write config.json and model.safetensors with the hub's per-expert names."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / "model.safetensors", places(model), dtype)
    if processes.RANK == 0:
        keys = config_keys(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        run.write_json(Path(folder) / "config.json", keys, indent=2)
