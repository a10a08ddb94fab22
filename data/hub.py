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
before it is used. The tensors lie one behind another and fill the data: the format wants that, and
it leaves a tensor nowhere else to be. Read are the four dtypes that a model's weights have.

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
}
DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


# config.json -------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How a model_type's config.json differs from the fields of model.Config."""

    architecture: str
    assumed: dict  # key -> what is meant if the file does not say
    spelled: dict = {}  # field -> its key in files on the hub


FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", {"rope_theta": 1e4}),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"rope_theta": 1e6, "router_aux_loss_coef": 1e-3},
        {"num_experts": "num_local_experts"},
    ),
    # Qwen3's "intermediate_size" is of layers without experts: there are none, but it is kept
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"rope_theta": 1e4, "router_aux_loss_coef": 1e-3, "rms_norm_eps": 1e-6},
        {"intermediate_size": "moe_intermediate_size"},
    ),
}
# key -> the one value (beside null) that leaves the network as model.py has it
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}
WANTED = {  # kind -> what it is called, and the least value
    int: ("a positive integer", 1),
    float: ("a number >= 0", 0),
    bool: ("true or false", False),
    str: ("a text", ""),
}


def is_whole(numbers):
    """A list of integers from 0 up?"""
    return isinstance(numbers, list) and all(run.is_kind(n, int) and n >= 0 for n in numbers)


def read_config(folder: str | Path, kind: type):
    """Read folder/config.json into `kind`, a dataclass whose fields are the keys (model.Config)."""
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        name = folder if str(folder).count("/") == 1 else "owner/model"
        raise FileNotFoundError(
            f"{folder}: no such folder; give one with config.json and model.safetensors, or bring "
            f"a model: python data/prepare.py {name}"
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
    spelled = FAMILIES[keys["model_type"]].spelled
    known = {}
    for f in dataclasses.fields(kind)[:-1]:  # the last, extra, is for the keys left over
        key = spelled.get(f.name, f.name)
        value = keys.pop(key, None)
        if value is None and f.default is not dataclasses.MISSING:
            continue  # null and missing are the default
        python_type = (get_args(f.type) or (f.type,))[0]  # int of `int | None`
        wanted, least = WANTED[python_type]
        fine = run.is_kind(value, python_type) and value >= least
        if key.endswith("_token_id"):
            wanted = "a token id or a list of them"
            fine = is_whole(value if isinstance(value, list) else [value])
        if not fine:
            raise ValueError(f"{key} is {run.shown(value)}; it must be {wanted}")
        known[f.name] = value
    return kind(**known, extra=keys)


def one_spelling(raw):
    """The keys as hub files of 2024 have them, with what a family takes for granted filled in."""
    keys = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")}
    family = keys.get("model_type")
    if family not in list(FAMILIES):
        raise ValueError(
            f"model_type {run.shown(family)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    for key, neutral in NEUTRAL.items():
        # Qwen3's files tell the window's size even where there is none: use_sliding_window counts
        unused = key == "sliding_window" and family == "qwen3_moe"
        if keys.get(key) not in (None, neutral) and not unused:
            raise ValueError(
                f"{key} {run.shown(keys[key])} is not supported; only {run.shown(neutral)} is"
            )
    match keys.pop("rope_parameters", None):  # transformers 5 has rope_theta in there
        case {"rope_theta": theta, **more} if more in ({}, {"rope_type": "default"}):
            keys["rope_theta"] = theta
        case None:
            pass
        case other:
            raise ValueError(
                f"rope_parameters {run.shown(other)} is not supported; only a rope_theta with "
                "rope_type default is"
            )
    if family == "mixtral":
        keys["norm_topk_prob"] = True  # not a key of its config: always so
    elif "num_local_experts" in keys:  # transformers 5 may call it so
        keys["num_experts"] = keys.pop("num_local_experts")
    for key, value in FAMILIES[family].assumed.items():
        if keys.get(key) is None:
            keys[key] = value
    return keys


def config_keys(config) -> dict:
    """The content of a config.json in the hub's spelling, which transformers of any age reads."""
    keys = dict(vars(config))
    extra = keys.pop("extra")
    family = FAMILIES[config.model_type]
    keys = {family.spelled.get(name, name): value for name, value in keys.items()}
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
    def parameter(self) -> torch.Tensor:
        return self.places[0].parameter

    @property
    def shape(self) -> list[int]:
        return [len(self.places), *self.places[0].shape]

    def fill(self, source: torch.Tensor):
        for place, matrix in zip(self.places, source):
            place.fill(matrix)


# The names of a layer's MoE and of each expert's three matrices.
MOE_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")


def places(model, fused=False) -> dict:
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
            if name.endswith(".weight") and not name.startswith("moe."):  # a LoRA has A and B
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


class SafetensorsFile(dict):
    """A safetensors file as {name: tensor}, each a view of the mapped file: do not write."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():  # a folder, or a pipe, of which a read may never end
            raise FileNotFoundError(
                f"{path}: no such file, or not a regular file; is the folder complete?"
            )
        size = self.path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            if first == b"version ":
                self.fail("is a Git LFS pointer, not the weights; fetch them with: git lfs pull")
            length = int.from_bytes(first, "little")
            if 8 + length > size:
                self.fail(f"the header should have {length} bytes, the file has {size}; cut off?")
            header = file.read(length).decode("utf-8", errors="replace")
            # "copy": torch wants memory that it may write
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        entries = run.parse_json(header, f"{path}: the header")
        if not isinstance(entries, dict):
            self.fail("the header is not a JSON object; the file is corrupt, or of another kind")
        entries.pop("__metadata__", None)

        start, last = 8 + length, 0
        stored = sorted(self.read_entry(*entry) for entry in entries.items())
        for begin, end, name, *_ in stored:
            if begin != last:  # they lie one behind another
                self.fail(
                    f"tensor {run.shown(name)} begins at byte {begin}, the one before it ends at "
                    f"{last}: they overlap, or leave a gap; the file is corrupt"
                )
            last = end
        if start + last != size:
            self.fail(
                f"the tensors take {last} bytes, the file has {size - start} for them; was it cut "
                "off? copy or download it again"
            )
        for begin, _, name, dtype, shape in stored:
            numbers = torch.empty(0, dtype=dtype)
            if prod(shape) > 0:
                numbers = torch.frombuffer(
                    self.map, dtype=dtype, count=prod(shape), offset=start + begin
                )
            self[name] = numbers.view(shape)

    def fail(self, message):
        raise ValueError(f"{self.path}: {message}")

    def read_entry(self, name, entry):
        """An entry of the header -> where its tensor begins and ends, its name, dtype and shape."""
        try:
            dtype, shape = FILE_DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            fits = (
                is_whole(shape)
                and is_whole([begin, end])
                and end - begin == prod(shape) * dtype.itemsize
                and prod(n or 1 for n in shape) < 2**59  # beside a 0, too, torch counts the others
            )
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            self.fail(
                f"tensor {run.shown(name)} is {run.shown(entry)}; expected are dtype "
                f"({', '.join(FILE_DTYPES)}), shape, and data_offsets of as many bytes, in whole "
                "numbers; the file is corrupt, or of another kind"
            )
        return begin, end, name, dtype, shape

    def forget(self):
        """Tell the system that the pages read so far are not needed in memory any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


# Reading -----------------------------------------------------------------------------------------


def checkpoint_files(folder):
    """The safetensors files that a model folder must have."""
    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    if single.exists() or not index.exists():
        return [single]
    weight_map = run.read_json(index, weight_map=dict).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index}: no weight_map of tensor names to file names; download it again")
    for name in weight_map.values():
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", str(name)):
            raise ValueError(f"{index}: {run.shown(name)} is not the name of a file in this folder")
    return [Path(folder, name) for name in sorted(set(weight_map.values()))]


class Tensors:
    """The tensors of a safetensors file or of a model folder, to be copied into their places, each
    exactly once."""

    def __init__(self, source: str | Path):
        self.source = source
        self.tensors = []  # (its file, its name, itself)
        for path in checkpoint_files(source) if Path(source).is_dir() else [source]:
            file = SafetensorsFile(path)
            self.tensors += [(file, name, tensor) for name, tensor in file.items()]
        self.names = [name for _, name, _ in self.tensors]
        self.fused = any(name.endswith(".experts.gate_up_proj") for name in self.names)

    def check_sizes(self, config):
        """ValueError if config.json claims more layers or experts than the files' headers hold: a
        model of that many would take for ever to build."""
        held = len(self.names)
        wanted = config.num_hidden_layers * (2 if self.fused else config.num_experts)
        if wanted > held:
            raise ValueError(
                f"{self.source}: {held} tensors are not {config.num_hidden_layers} layers of "
                f"{config.num_experts} experts; does config.json belong to it?"
            )

    def check(self, table: dict):
        """ValueError if a tensor has no place, a place no tensor, a tensor stands in two files, or
        shapes differ; it names them."""
        held = Counter(self.names)
        for names, what in (
            (table.keys() - held, "tensors are missing"),
            (held.keys() - table, "tensors that the model does not have"),
            (held - Counter([*held]), "tensors stand in more than one file"),
        ):
            if names:
                raise ValueError(
                    f"{self.source}: {len(names)} {what}: {run.shown(sorted(names))}; "
                    "is it complete, and does its configuration belong to it?"
                )
        for file, name, tensor in self.tensors:
            if table[name].shape != list(tensor.shape):
                file.fail(
                    f"tensor {run.shown(name)} has shape {list(tensor.shape)}, the model has "
                    f"{table[name].shape}; does its configuration belong to it?"
                )

    def fill(self, table: dict):
        """Copy each tensor into its place, converting dtype and device, after names and shapes were
        checked. ValueError for one with NaN or an infinity: those before it were copied."""
        self.check(table)
        bar = tqdm(
            self.tensors,
            desc="loading",
            unit=" tensors",
            delay=2,  # seconds: most loads take a moment
            mininterval=2,
            disable=processes.RANK > 0,
        )
        for file, name, tensor in bar:
            # NaN counts as the least and as the largest: this takes no memory, and less time than
            # a copy. A number may also be too large for where it goes.
            dtype = table[name].parameter.dtype
            ends = tensor.aminmax() if tensor.numel() else ()
            if not all(end.to(dtype).isfinite() for end in ends):
                file.fail(
                    f"tensor {run.shown(name)} holds numbers that are not finite; "
                    "copy or download it again"
                )
            table[name].fill(tensor)
            file.forget()


# Writing -----------------------------------------------------------------------------------------


def write_tensors(path: str | Path, table: dict, dtype: torch.dtype | None = None):
    """Write what is at the places (converted to `dtype` one at a time, if given), atomically."""
    header = {"__metadata__": {"format": "pt"}}  # transformers looks for this entry
    end = 0
    for name, place in table.items():
        kind = dtype or place.parameter.dtype
        begin, end = end, end + prod(place.shape) * kind.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kind],
            "shape": place.shape,
            "data_offsets": [begin, end],
        }
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
