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
attention biases, a sliding window, layers without experts) is refused, not ignored. Keys that
change nothing here are kept. A tensor that holds NaN or an infinity is refused too, and named.

Every fault is a ValueError or a FileNotFoundError of one line: where, what, what to do.
"""

import dataclasses
import json
import mmap
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
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


# config.json -------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How a model_type's config.json differs from the fields of model.Config."""

    architecture: str
    assumed: dict  # key -> what is meant if the file does not say
    experts: str = "num_experts"  # the key of that field in files on the hub
    width: str = "intermediate_size"  # the key of an expert's


FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", {"rope_theta": 1e4}),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"rope_theta": 1e6, "router_aux_loss_coef": 1e-3},
        experts="num_local_experts",
    ),
    # Qwen3's "intermediate_size" is of layers without experts: there are none, but it is kept
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"rope_theta": 1e4, "router_aux_loss_coef": 1e-3, "rms_norm_eps": 1e-6},
        width="moe_intermediate_size",
    ),
}
# key -> the one value (beside null) that leaves the network as model.py has it
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
WANTED = {
    int: "a positive integer",
    float: "a number >= 0",
    bool: "true or false",
    str: "a text",
}


def fits(value, kind) -> bool:
    if kind is int:
        return run.is_kind(value, int) and 0 < value < 2**31
    return run.is_kind(value, kind) and (kind is not float or value >= 0)


def is_whole(numbers, most=2**63) -> bool:
    """A list of integers from 0 up? type(): Python counts true as one."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < most for n in numbers)


def read_config(folder: str | Path, kind: type):
    """Read folder/config.json into `kind`, a dataclass whose fields are the keys (model.Config)."""
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        is_repo = str(folder).count("/") == 1
        raise FileNotFoundError(
            f"{folder}: no such folder; give one with config.json and model.safetensors, or bring "
            f"a model: python data/prepare.py {folder if is_repo else 'owner/model'}"
        )
    cached = sorted(folder.glob("snapshots/*/config.json"))
    if cached and not path.exists():
        raise FileNotFoundError(f"{folder}: the root of a hub cache; give {cached[-1].parent}")
    raw = run.read_json(path)
    try:
        return make_config(raw, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_config(raw: dict, kind: type):
    """The content of a config.json -> `kind`. ValueError for what the network cannot be."""
    keys = one_spelling(raw)
    width = FAMILIES[keys["model_type"]].width
    known = {}
    for f in dataclasses.fields(kind):
        if f.name == "extra":
            continue
        key = width if f.name == "intermediate_size" else f.name
        value = keys.pop(key, None)
        if value is None and f.default is not dataclasses.MISSING:
            continue  # null and missing are the default
        python_type = (get_args(f.type) or (f.type,))[0]  # int of `int | None`
        wanted, fine = WANTED[python_type], fits(value, python_type)
        if key.endswith("_token_id"):
            wanted = "a token id or a list of them"
            fine = is_whole(value if isinstance(value, list) else [value], most=2**31)
        if not fine:
            raise ValueError(f"{key} is {run.shown(value)}; it must be {wanted}")
        known[f.name] = value
    return kind(**known, extra=keys)


def one_spelling(raw: dict) -> dict:
    """The keys as hub files of 2024 have them, with what a family takes for granted filled in."""
    keys = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")}
    family = keys.get("model_type")
    if family not in list(FAMILIES):
        raise ValueError(
            f"model_type {run.shown(family)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    for key, neutral in NEUTRAL.items():
        if keys.get(key) not in (None, neutral):
            raise ValueError(f"{key} {run.shown(keys[key])} is not supported; only {neutral} is")
    windowed = family != "qwen3_moe" or keys.get("use_sliding_window")
    if windowed and keys.get("sliding_window") is not None:
        raise ValueError("sliding_window attention is not supported; only null is")
    for key in ("rope_parameters", "rope_scaling"):
        rope = keys.pop(key, None) or {}
        rope_type = isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type"))
        if rope_type not in (None, "default"):
            raise ValueError(f"{key} {run.shown(rope)} is not supported; only rope_type default is")
        if keys.get("rope_theta") is None:
            keys["rope_theta"] = rope.get("rope_theta")
    if "num_local_experts" in keys:  # Mixtral's, and whatever transformers 5 wrote
        keys["num_experts"] = keys.pop("num_local_experts")
    if family == "mixtral":
        keys["norm_topk_prob"] = True  # not a key of its config: always so
    for key, value in FAMILIES[family].assumed.items():
        if keys.get(key) is None:
            keys[key] = value
    return keys


def config_keys(config) -> dict:
    """The content of a config.json in the hub's spelling, which transformers of any age reads."""
    keys = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    extra = keys.pop("extra")
    family = FAMILIES[config.model_type]
    keys[family.experts] = keys.pop("num_experts")
    keys[family.width] = keys.pop("intermediate_size")
    return {"architectures": [family.architecture], "hidden_act": "silu"} | extra | keys


# Places ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A parameter of a model, or one matrix of a stack (E, ., .), or half of that matrix."""

    parameter: torch.Tensor
    expert: int | None = None  # which matrix of the stack
    half: int | None = None  # of gate_up_proj: 0 the gate rows, 1 the up rows

    @property
    def shape(self) -> list[int]:
        return list(self.of(torch.empty(self.parameter.shape, device="meta")).shape)

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


Table = dict[str, Place | Stack]  # tensor name in a file -> its place

# The names of a layer's MoE and of each expert's three matrices.
MOE_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")
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


def places(model, fused=False) -> Table:
    """Tensor name in a Hugging Face folder -> its place in the model (a model.MoETransformer).

    fused: the experts of a layer as two stacked tensors, as transformers 5 holds them in memory and
    may save them; else one tensor for each matrix of each expert, as published checkpoints have it.
    Adapters have no names in such a folder and are passed over.
    """
    mixtral = model.config.model_type == "mixtral" and not fused
    moe, gate, up, down = MIXTRAL_NAMES if mixtral else MOE_NAMES
    table = {
        "model.embed_tokens.weight": Place(model.embed_tokens.weight),
        "model.norm.weight": Place(model.norm.weight),
    }
    if not model.config.tie_word_embeddings:
        table["lm_head.weight"] = Place(model.lm_head.weight)
    for i, block in enumerate(model.layers):
        layer = f"model.layers.{i}"
        for name, p in block.named_parameters():
            if name in ATTENTION_HALF:
                table[f"{layer}.{name}"] = Place(p)
        table[f"{layer}.{moe}.gate.weight"] = Place(block.moe.router.weight)
        gate_ups, downs = expert_places(block.moe.experts, model.config.num_experts)
        experts = f"{layer}.{moe}.experts"
        if fused:
            table[f"{experts}.gate_up_proj"] = Stack(gate_ups)
            table[f"{experts}.down_proj"] = Stack(downs)
            continue
        for e, place in enumerate(gate_ups):
            table[f"{experts}.{e}.{gate}.weight"] = place._replace(half=0)
            table[f"{experts}.{e}.{up}.weight"] = place._replace(half=1)
        for e, place in enumerate(downs):
            table[f"{experts}.{e}.{down}.weight"] = place
    return table


def expert_places(experts, count):
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
            self.fail("is not a regular file; copy or download it again")
        size = self.path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            if first == b"version ":
                self.fail("is a Git LFS pointer, not the weights; fetch them with: git lfs pull")
            length = int.from_bytes(first, "little")
            self.start = 8 + length
            if self.start > size:
                self.fail(f"the header should have {length} bytes, the file has {size}; cut off?")
            header = file.read(length)
            # "copy": torch wants memory that it may write
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.entries = self.parse(header)
        self.check(size - self.start)

    def fail(self, message: str):
        raise ValueError(f"{self.path}: {message}")

    def parse(self, header):
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            self.fail(f"the header is not JSON ({error}); the file is corrupt, or of another kind")
        if not isinstance(entries, dict):
            self.fail("the header is not a JSON object; the file is corrupt, or of another kind")
        entries.pop("__metadata__", None)
        return entries

    def check(self, size):
        """Entries lie in the `size` bytes of data, fit their shapes, and do not overlap."""
        spans = [self.span(run.shown(name), entry, size) for name, entry in self.entries.items()]
        for (_, end, one), (begin, _, other) in pairwise(sorted(spans)):
            if begin < end:
                self.fail(f"tensors {one} and {other} overlap; the file is corrupt")

    def span(self, name, entry, size):
        """Where a tensor begins and ends, and its name."""
        what = f"tensor {name} is {run.shown(entry)}"
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            self.fail(f"{what}, which has no dtype, shape or data_offsets; the file is corrupt")
        if str(dtype) not in FILE_DTYPES:
            self.fail(f"{what}; its dtype is none of {', '.join(FILE_DTYPES)}")
        if not is_whole(shape) or not is_whole([begin, end]):
            self.fail(f"{what}; expected whole numbers >= 0; the file is corrupt")
        if not begin <= end <= size:
            self.fail(f"tensor {name} lies at bytes {begin} to {end} of {size}; it is cut off")
        if end - begin != prod(shape) * FILE_DTYPES[dtype].itemsize:
            self.fail(f"{what}, of another size than its {end - begin} bytes; the file is corrupt")
        return begin, end, name

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


def without_duplicates(pairs):
    """For json's object_pairs_hook: of two entries of one name it would keep the second."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands there twice")
    return content


# Reading -----------------------------------------------------------------------------------------


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files that a model folder must have."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        return [single]
    weight_map = run.read_json(index, weight_map=dict).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index}: no weight_map of tensor names to file names; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name):
            raise ValueError(f"{index}: {run.shown(name)} is not the name of a file in this folder")
    return [folder / name for name in sorted(set(weight_map.values()))]


class Tensors:
    """The tensors of a safetensors file (or of some, which a message calls `source`), to be copied
    into their places, each exactly once."""

    def __init__(self, source: str | Path, files: list[Path] | None = None):
        self.source = source
        self.files = [SafetensorsFile(path) for path in files or [source]]
        self.names = [name for file in self.files for name in file]

    def check(self, table: Table):
        """ValueError if a tensor has no place, a place no tensor, a tensor stands in two files, or
        shapes differ; it names them."""
        held = Counter(self.names)
        twice = [name for name in held if held[name] > 1]
        for names, what in (
            (table.keys() - held, "tensors are missing"),
            (held.keys() - table, "tensors that the model does not have"),
            (twice, "tensors stand in more than one file"),
        ):
            if names:
                raise ValueError(
                    f"{self.source}: {len(names)} {what}: {run.shown(sorted(names))}; "
                    "is it complete, and does its configuration belong to it?"
                )
        for file in self.files:
            for name, entry in file.entries.items():
                if table[name].shape != entry["shape"]:
                    file.fail(
                        f"tensor {run.shown(name)} has shape {run.shown(entry['shape'])}, the "
                        f"model has {table[name].shape}; does its configuration belong to it?"
                    )

    def fill(self, table: Table):
        """Copy each tensor into its place, converting dtype and device, after names and shapes were
        checked. ValueError for one with NaN or an infinity: those before it were copied."""
        self.check(table)
        total = sum(len(file.map) for file in self.files)
        bar = tqdm(
            desc="loading",
            total=total,
            unit="B",
            unit_scale=True,
            delay=2,  # seconds: most loads take a moment
            mininterval=2,
            disable=processes.RANK > 0,
        )
        with bar:
            for file in self.files:
                for name, tensor in file.items():
                    if not is_finite(tensor):
                        file.fail(
                            f"tensor {run.shown(name)} holds numbers that are not finite; "
                            "copy or download it again"
                        )
                    table[name].fill(tensor)
                    file.forget()
                    bar.update(tensor.nbytes)


def is_finite(tensor) -> bool:
    """Looks at the least and the largest number (NaN counts as either): that takes no memory, and
    less time than a copy."""
    return tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax())


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


# Writing -----------------------------------------------------------------------------------------


def write_tensors(path: str | Path, table: Table, dtype: torch.dtype | None = None):
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

    parts = gathered(table)

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for part in parts:
            part = part.to("cpu", dtype or part.dtype).contiguous()
            file.write(part.view(-1).view(torch.uint8).numpy())

    if processes.RANK == 0:
        run.write_atomically(path, write)
    for _ in parts:
        pass  # the other processes write nothing, but gathering takes all


def gathered(table):
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
