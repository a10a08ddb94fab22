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
change nothing here are kept. A tensor that holds NaN or an infinity is refused too, and named, on
the way in and on the way out.

The folder of an adapter, or of chosen experts, has two files more, for perft.py and esft.py:

    NAME.json           what was attached, and for which base: the keys of its config.json that
                        shape its logits
    NAME.safetensors    what trains

A LoRA's are those of PEFT. The last part of this file is about such folders, and about writing what
they hold into a model folder of its own.

Every fault is a ValueError or a FileNotFoundError of one line: where, what, what to do.
"""

import dataclasses
import functools
import json
import mmap
import re
import shutil
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # what a base may be loaded in
EMBEDDED = Path(__file__).resolve().parent / "tiny_olmoe"  # the model that is always there


# config.json -------------------------------------------------------------------------------------


class ModelType(NamedTuple):
    """How a model_type's config.json differs from the fields of model.Config."""

    architecture: str
    assumed: dict  # key -> what is meant if the file does not say
    spelled: dict = {}  # field -> its key in files on the hub


MODEL_TYPES = {
    "olmoe": ModelType("OlmoeForCausalLM", {"rope_theta": 1e4}),
    "mixtral": ModelType(
        "MixtralForCausalLM",
        {
            "rope_theta": 1e6,
            "router_aux_loss_coef": 1e-3,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        {"num_experts": "num_local_experts"},
    ),
    # Qwen3's "intermediate_size" is of layers without experts: there are none, but it is kept
    "qwen3_moe": ModelType(
        "Qwen3MoeForCausalLM",
        {
            "rope_theta": 1e4,
            "router_aux_loss_coef": 1e-3,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
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
    "clip_qkv": None,  # but for OLMoE
    "partial_rotary_factor": 1.0,
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


def make_config(raw, kind):
    """The content of a config.json -> `kind`. ValueError for what the network cannot be."""
    keys = one_spelling(raw)
    spelled = MODEL_TYPES[keys["model_type"]].spelled
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
    """The keys as hub files of 2024 have them, and those that a model_type takes for granted."""
    keys = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")}
    model_type = keys.get("model_type")
    if model_type not in list(MODEL_TYPES):
        raise ValueError(
            f"model_type {run.shown(model_type)} is not supported; supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    for key, neutral in NEUTRAL.items():
        # Qwen3's files tell the window's size even where there is none: use_sliding_window counts
        fine = (model_type, key) in (("qwen3_moe", "sliding_window"), ("olmoe", "clip_qkv"))
        if keys.get(key) not in (None, neutral) and not fine:
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
    if model_type == "mixtral":
        keys["norm_topk_prob"] = True  # not a key of its config: always so
    elif "num_local_experts" in keys:  # transformers 5 may call it so
        keys["num_experts"] = keys.pop("num_local_experts")
    for key, value in MODEL_TYPES[model_type].assumed.items():
        means_all = key == "num_key_value_heads" and key in keys  # null: as many as query heads
        if keys.get(key) is None and not means_all:
            keys[key] = value
    return keys


def config_keys(config):
    """The content of a config.json in the hub's spelling, which transformers of any age reads."""
    keys = dict(vars(config))
    extra = keys.pop("extra")
    kind = MODEL_TYPES[config.model_type]
    keys = {kind.spelled.get(name, name): value for name, value in keys.items()}
    return {"architectures": [kind.architecture], "hidden_act": "silu"} | extra | keys


# Places ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A parameter of a model, or one matrix of a stack (E, ., .), or half of that matrix."""

    parameter: torch.Tensor
    expert: int | None = None  # which matrix of the stack
    half: int | None = None  # of gate_up_proj: 0 the gate rows, 1 the up rows

    @property
    def shape(self):
        return list(self.of(torch.empty(self.parameter.shape, device="meta")).shape)

    def of(self, stack, first=0):
        """This place's part of its parameter, of which `stack` holds the rows from `first` on."""
        if self.expert is None:
            return stack
        matrix = stack[self.expert - first]
        return matrix if self.half is None else matrix.chunk(2)[self.half]

    def fill(self, source):
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
    def parameter(self):
        return self.places[0].parameter

    @property
    def shape(self):
        return [len(self.places), *self.places[0].shape]

    def fill(self, source):
        for place, matrix in zip(self.places, source):
            place.fill(matrix)


# The names of a layer's MoE and of each expert's three matrices.
MOE_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")


def places(model, fused=False):
    """Tensor name in a Hugging Face folder -> its place in the model (a model.MoETransformer).

    fused: the experts of a layer as two stacked tensors, as transformers 5 holds them in memory and
    may save them; else one tensor for each matrix of each expert, as published checkpoints have it.
    Adapters have no names in such a folder and are passed over.
    """
    mixtral = model.config.model_type == "mixtral" and not fused
    moe, gate, up, down = MIXTRAL_NAMES if mixtral else MOE_NAMES
    table = {}
    for name, p in model.named_parameters():  # of two tied weights it gives the first
        if name.endswith(".weight") and ".moe." not in name:  # a LoRA has A and B
            table[name if name == "lm_head.weight" else f"model.{name}"] = Place(p)
    for i, block in enumerate(model.layers):
        layer = f"model.layers.{i}.{moe}"
        table[f"{layer}.gate.weight"] = Place(block.moe.router.weight)
        gate_ups, downs = expert_places(block.moe.experts)
        experts = f"{layer}.experts"
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


def expert_places(experts):
    """The places of each expert's gate_up and down matrix. Experts that are kept in another order
    (esft.py) know themselves where each is."""
    if hasattr(experts, "places"):
        return experts.places()
    stacks = experts.gate_up_proj, experts.down_proj
    return [[Place(stack, e) for e in range(len(stack))] for stack in stacks]


# One safetensors file ----------------------------------------------------------------------------


class SafetensorsFile(dict):
    """A safetensors file as {name: tensor}, each a view of the mapped file: do not write."""

    def __init__(self, path):
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

    def __init__(self, source):
        self.source = source
        self.tensors = {}  # name -> (its file, itself)
        for path in checkpoint_files(source) if Path(source).is_dir() else [source]:
            file = SafetensorsFile(path)
            for name, tensor in file.items():
                if name in self.tensors:
                    file.fail(
                        f"tensor {run.shown(name)} stands in more than one file; download the "
                        "folder again"
                    )
                self.tensors[name] = file, tensor
        self.fused = any(name.endswith(".experts.gate_up_proj") for name in self.tensors)

    def widest_dtype(self):
        """The widest of its tensors' dtypes: none of its numbers is rounded there."""
        dtypes = [tensor.dtype for _, tensor in self.tensors.values()]
        return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    def check_sizes(self, config):
        """ValueError if config.json claims more layers or experts than the files' headers hold: a
        model of that many would take for ever to build."""
        held = len(self.tensors)
        wanted = config.num_hidden_layers * (2 if self.fused else config.num_experts)
        if wanted > held:
            raise ValueError(
                f"{self.source}: {held} tensors are not {config.num_hidden_layers} layers of "
                f"{config.num_experts} experts; does config.json belong to it?"
            )

    def check(self, table):
        """ValueError if a tensor has no place, a place no tensor, or shapes differ; it names
        them."""
        missing, unknown = table.keys() - self.tensors, self.tensors.keys() - table
        if missing or unknown:
            names = sorted(missing or unknown)
            what = "tensors are missing" if missing else "tensors that the model does not have"
            raise ValueError(
                f"{self.source}: {len(names)} {what}: {run.shown(names)}; "
                "is it complete, and does its configuration belong to it?"
            )
        for name, (file, tensor) in self.tensors.items():
            if table[name].shape != list(tensor.shape):
                file.fail(
                    f"tensor {run.shown(name)} has shape {list(tensor.shape)}, the model has "
                    f"{table[name].shape}; does its configuration belong to it?"
                )

    def fill(self, table):
        """Copy each tensor into its place, converting dtype and device, after names and shapes were
        checked. ValueError for one with NaN or an infinity: those before it were copied."""
        self.check(table)
        bar = tqdm(
            self.tensors.items(),
            desc="loading",
            unit=" tensors",
            delay=2,  # seconds: most loads take a moment
            mininterval=2,
            disable=processes.RANK > 0,
        )
        for name, (file, tensor) in bar:
            if not is_finite(tensor, table[name].parameter.dtype):
                file.fail(
                    f"tensor {run.shown(name)} holds numbers that are not finite; "
                    "copy or download it again"
                )
            table[name].fill(tensor)
            file.forget()


def is_finite(tensor, dtype):
    """Is each of its numbers finite, also in this dtype, for which one may be too large?"""
    # NaN counts as the least and as the largest: this takes no memory, and less time than a copy
    ends = tensor.aminmax() if tensor.numel() else ()
    return all(end.to(dtype).isfinite() for end in ends)


# Writing -----------------------------------------------------------------------------------------


def write_tensors(path: str | Path, table: dict, dtype: torch.dtype | None = None):
    """Write what is at the places (converted to `dtype` one at a time, if given), atomically.

    ValueError for one with NaN or an infinity: then the file is as it was.
    """
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

    parts = gathered(path, table, dtype)

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for part in parts:
            part = part.to("cpu", dtype or part.dtype).contiguous()
            file.write(part.view(-1).view(torch.uint8).numpy())

    if processes.RANK == 0:
        run.write_atomically(path, write)
    else:
        for _ in parts:
            pass  # gathering takes all processes: this one takes part, and drops what it gets


def gathered(path, table, dtype):
    """What is at each place, in turn; a stack that is cut over processes is gathered once. All of
    the processes see every number, so if one is not finite they all find out."""
    last = whole = None
    for name, place in table.items():
        if place.parameter is not last:
            last = place.parameter
            whole = processes.whole(last.detach())
        part = place.of(whole)
        if not is_finite(part, dtype or part.dtype):
            raise ValueError(
                f"{path}: not written, {name} is not finite; training diverged, lower --lr"
            )
        yield part


def write_model(folder, model, dtype):
    """Write config.json and model.safetensors with the hub's per-expert names."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / "model.safetensors", places(model), dtype)
    if processes.RANK == 0:
        keys = config_keys(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        run.write_json(Path(folder) / "config.json", keys, indent=2)


# What was trained --------------------------------------------------------------------------------


def fingerprint(base):
    """What an adapter must find again: the keys of the base's config.json that shape its logits
    (not its weights)."""
    keys = dataclasses.asdict(base)
    for name in (
        "extra",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "router_aux_loss_coef",
    ):
        keys.pop(name, None)
    return keys


def check_fingerprint(path, base):
    """ValueError naming both sides if what was saved beside this file had another base."""
    theirs = run.read_json(path, base=dict).get("base")
    if theirs is None:
        raise ValueError(f"{path}: does not say for which base it was made; not written by save")
    # a key that is not known here may have shaped its logits
    changed = run.changes(theirs, dict.fromkeys(theirs) | fingerprint(base))
    if changed:
        raise ValueError(f"{path}: was made for another base: {changed}")


def write_trained(path, text, weights, table, dtype):
    """Write the text of a JSON file, and first, beside it, the tensors of what trains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path.with_name(weights), table, dtype)
    if processes.RANK == 0:
        run.write_text(path, text + "\n")


def attach_trained(model, path, weights, edit, places_of):
    """edit(model), as the JSON file says, and fill what then trains, places_of(model), from the
    file of weights. Every fault is found on a model without memory, before this one is touched."""
    with torch.device("meta"):
        plain = type(model)(model.config)
        try:
            trial = edit(plain)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    weights = Tensors(path.with_name(weights))
    weights.fill(places_of(trial))  # checks names, shapes and numbers, and copies nothing
    edit(model)
    weights.fill(places_of(model))
    return model.eval()


# LoRA as PEFT keeps it ---------------------------------------------------------------------------

# What PEFT calls the weights that each variant changes.
PEFT_TARGETS = {
    "lora_qv": {"target_modules": ["q_proj", "v_proj"]},
    "lora_experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    },
}
# Of its adapter_config.json: what is read here, with what is meant where it is absent; and what
# changes no logits. Every other key may be there if it says nothing.
PEFT_DEFAULTS = {
    "r": 8,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": [],
    "target_parameters": [],
}
IDLE = """peft_type task_type auto_mapping base_model_name_or_path revision inference_mode
    peft_version megatron_core qalora_group_size""".split()


def peft_keys(config):
    """A perft.PerftConfig of LoRA -> what PEFT wants to find in adapter_config.json."""
    keys = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        # PEFT knows none on experts; `dropout` says what was used here
        "lora_dropout": config.dropout if config.variant == "lora_qv" else 0.0,
        "bias": "none",
    }
    return PEFT_TARGETS[config.variant] | keys


def read_adapter_config(path, base):
    """An adapter_config.json, ours or PEFT's -> its content, with the names of perft.PerftConfig's
    fields."""
    kinds = {name: type(value) for name, value in PEFT_DEFAULTS.items()}
    content = run.read_json(path, train_router=bool, shared_outer=bool, **kinds)
    content = {name: value for name, value in content.items() if value is not None}
    if "variant" not in content:
        return options_of_peft(path, content)
    check_fingerprint(path, base)
    alpha = content.get("alpha")
    if content.get("lora_alpha", alpha) != alpha:  # another rank would not fit the tensors
        raise ValueError(f"{path}: alpha and lora_alpha, PEFT's name for it, differ")
    return content


def options_of_peft(path, content):
    """PEFT's adapter_config.json -> the options of perft.apply_perft that are the same LoRA."""
    content = PEFT_DEFAULTS | content
    targets = content["target_modules"] + content["target_parameters"]
    changed = " ".join(sorted(str(name).split(".")[-1] for name in targets))
    variant = {"q_proj v_proj": "lora_qv", "down_proj gate_up_proj": "lora_experts"}.get(changed)
    kind = content.get("peft_type")
    if kind != "LORA" or variant is None:
        raise ValueError(
            f"{path}: peft_type {run.shown(kind)} on {run.shown(changed)}: of PEFT's adapters, "
            "LoRA of q_proj and v_proj, or of both stacks of the experts, loads"
        )
    for name in content.keys() - PEFT_DEFAULTS.keys() - set(IDLE):
        # a LoRA that starts in another way changes the base too
        fine = [True, "gaussian"] if name == "init_lora_weights" else [False, "none", [], {}]
        if content[name] not in fine:
            said = run.shown(content[name])
            raise ValueError(f"{path}: {name} is {said}, which has no counterpart here")
    alpha = content["lora_alpha"]
    if content["use_rslora"]:
        alpha *= abs(content["r"]) ** 0.5  # its scale is alpha / sqrt(r)
    return {
        "variant": variant,
        "rank": content["r"],
        "alpha": alpha,
        "dropout": content["lora_dropout"],
    }


class LoraPlace(NamedTuple):
    """The place of the A or B of a layer's experts in PEFT's layout: A (E, r, in) as (E*r, in), and
    B (E, out, r) as (out, r*E). What all share is written for each, zeros where one has none."""

    parameter: torch.Tensor
    lora: torch.nn.Module  # the perft.LowRank that it is of
    is_B: bool

    shape = Place.shape

    def of(self, stack):
        stack = self.lora.full_stack(stack)
        return stack.movedim(0, -1).flatten(1) if self.is_B else stack.flatten(0, 1)

    def fill(self, source):
        E = self.lora.num_experts
        if self.is_B:
            stack = source.unflatten(1, (-1, E)).movedim(-1, 0)
        else:
            stack = source.unflatten(0, (E, -1))
        if self.lora.experts is not None:
            stack = stack[self.lora.experts]
        self.parameter.data.copy_(stack[: len(self.parameter)])  # of a shared one, the first


def peft_places(model):
    """Tensor name in PEFT's adapter_model.safetensors -> the place of LoRA's A or B that it is."""
    table = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        owner, letter = name[:-2], name[-1]
        place = Place(p)
        if owner.endswith("_lora"):
            place = LoraPlace(p, model.get_submodule(owner), letter == "B")
            # PEFT wraps the experts twice, once for each stack
            owner = owner.replace("moe.experts.gate_up_lora", "mlp.experts.base_layer")
            owner = owner.replace("moe.experts.down_lora", "mlp.experts")
        table[f"base_model.model.model.{owner}.lora_{letter}.weight"] = place
    return table


# A run becomes a model folder --------------------------------------------------------------------

# How the names of those files begin that a model needs beside its weights.
BESIDE_A_MODEL = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "generation_config",
    "chat_template",
)


def read_run(folder):
    """The settings of the run of train.py that made a folder; {} where there are none (it was saved
    by hand). ValueError for values that no run writes."""
    file = folder / "config.json"
    if not file.exists():
        return {}
    names = {path.name for path in folder.rglob("*.safetensors")}
    if names == {"state.safetensors"}:
        raise ValueError(f"{folder}: the run is not finished; go on with train.py --resume")
    settings = run.read_json(file, base=str, dtype=str, task=str, template=str, eval_rows=int)
    if settings.get("variant") == "scratch":
        raise ValueError(f"{folder} holds a whole model, no adapter: use --base {folder}/model")
    base, dtype = settings.get("base") or "", settings.get("dtype")
    # of a base with so long a name, the system's own message would be nothing but that name
    if dtype not in (None, *DTYPES) or len(base) > 900:
        raise ValueError(
            f"{file}: dtype is {run.shown(dtype)}, base is {run.shown(base)}; expected "
            f"{' or '.join(DTYPES)}, and a folder"
        )
    return settings


def lesson_or_write(argv, lesson, command, about, attach):
    """The command line of perft.py and of esft.py: the lesson; or a run in its base, as a Hugging
    Face folder.

    attach(base, its dtype in the run, the run's folder) -> the model to be written. The dtype is
    None where the run does not say.
    """
    parser = run.Parser(description="Without arguments: the lesson of the file's first page.")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser(command, help=about, description=about).add_argument
    add("RUN_FOLDER", type=Path, help="of train.py, or what was saved by hand")
    add("NEW_FOLDER", type=Path)
    add("BASE", nargs="?", help="(the run's, else the embedded model)")
    args = parser.parse_args(argv)
    if args.command is None:
        return lesson()
    folder, new = args.RUN_FOLDER, args.NEW_FOLDER
    check_new(new)
    settings = read_run(folder)
    base = args.BASE or settings.get("base") or EMBEDDED
    model = attach(base, DTYPES.get(settings.get("dtype")), folder)
    write_folder(new, model, base)
    dtype = str(model.norm.weight.dtype).removeprefix("torch.")
    print(f"wrote {new}: {base} with what {folder} trained, in {dtype}")


def check_new(folder):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; choose a new one")


def write_folder(folder, model, base=None):
    """Write a model as a Hugging Face folder, new or empty, with the tokenizer files of the folder
    `base`; or nothing, if it fails."""
    folder = Path(folder)
    check_new(folder)
    files = list(Path(base).iterdir()) if base else []  # before anything is written
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_model(folder, model, model.norm.weight.dtype)
        for file in files:
            if file.name.startswith(BESIDE_A_MODEL):
                shutil.copy(file, folder)
    except BaseException:  # Ctrl-C, too
        # half a folder would be in the way of the same command
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
        if is_new:
            folder.rmdir()
        raise
