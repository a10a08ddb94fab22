"""Model folders: what we write, transformers and the safetensors library read, and the other way
round; a file that is broken in any way ends in one line that names the place and the cause, never
in a crash or a half-loaded model."""

import json
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from data import hub, run
from data.hub import FILE_DTYPES, Place, SafetensorsFile, checkpoint_files
from model import Config, MoETransformer

ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
OLMOE = {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2}
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 24,  # of layers without experts, of which there are none
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CASES = {
    "olmoe": OLMOE,
    "olmoe_every_option": OLMOE
    | {
        "norm_topk_prob": True,
        "clip_qkv": 0.4,
        "rope_theta": 500.0,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
    },
    "olmoe_tied": OLMOE | {"tie_word_embeddings": True},
    "mixtral": MIXTRAL,
    "mixtral_wide_heads_tied": MIXTRAL
    | {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 2000.0},
    "qwen3": QWEN3 | {"norm_topk_prob": True, "eos_token_id": [3, 5]},
    "qwen3_every_option": QWEN3
    | {
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_theta": 2000.0,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
    },
}
DTYPE_CASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS = torch.tensor([[5, 9, 2, 60, 33, 7, 7, 1], [4, 4, 8, 15, 16, 23, 42, 0]])
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPE_CASES.values(), ids=DTYPE_CASES)


def make_model(seed=0, **changes):
    """A tiny model with random weights, norms included."""
    torch.manual_seed(seed)
    model = MoETransformer(hub.make_config(TINY | (changes or OLMOE), Config))
    for name, p in model.named_parameters():
        p.data.normal_(1 if "norm" in name else 0, 0.3)
    return model.eval()


def tensors_of(model, fused=False):
    """Name in a Hugging Face folder -> the tensor, taken from its place."""
    table = hub.places(model, fused)
    return {name: taken(place) for name, place in table.items()}


def taken(place):
    if isinstance(place, hub.Stack):
        return torch.stack([taken(part) for part in place.places])
    return place.of(place.parameter.detach())


def write_tensors(path, tensors, dtype=None):
    """A file of tensors that belong to no model."""
    hub.write_tensors(path, {name: Place(t) for name, t in tensors.items()}, dtype)


def make_reference(dtype=torch.float32, **changes):
    """The same in transformers. Only parameters are converted: rotary frequencies stay in float32,
    as on loading."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**TINY | changes)
    ).eval()
    for name, p in model.named_parameters():
        p.data = p.data.normal_(1 if "norm" in name else 0, 0.3).to(dtype)
    return model


def load_with_transformers(folder, **options):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(
        report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), report
    return model.eval()


@torch.no_grad()
def logits_gap(ours, theirs):
    ours, theirs = ours.float()(IDS).logits, theirs.float()(IDS).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same_weights(ours, reference):
    weights = dict(reference.named_parameters())
    tensors = tensors_of(ours, fused=True)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in tensors)


# Folders go both ways ----------------------------------------------------------------------------


@every_case
@every_dtype
def test_a_folder_saved_by_us_is_the_same_model_in_transformers(case, dtype, tmp_path):
    """In float32, bfloat16 and float16: its from_pretrained finds every tensor, and gives the same
    logits."""
    model = make_model(**CASES[case]).to(dtype)
    model.save_pretrained(tmp_path)
    theirs = load_with_transformers(tmp_path)
    assert theirs.dtype == dtype
    assert_same_weights(model, theirs)
    assert logits_gap(model, theirs) < 1e-5


@every_case
@every_dtype
@pytest.mark.parametrize("layout", ["per_expert", "fused", "shards", "fused_shards"])
def test_a_folder_saved_by_transformers_is_the_same_model_here(case, dtype, layout, tmp_path):
    """Per-expert names and fused ones, one file or many shards, three dtypes: every weight and the
    logits are equal."""
    reference = make_reference(dtype, **CASES[case])
    options = {"max_shard_size": "4KB"} if "shards" in layout else {}
    reference.save_pretrained(tmp_path, save_original_format="fused" not in layout, **options)
    assert (
        len(checkpoint_files(tmp_path)) > 2
        if "shards" in layout
        else len(checkpoint_files(tmp_path)) == 1
    )
    names = hub.Tensors(tmp_path).tensors
    assert any(name.endswith("experts.gate_up_proj") for name in names) == ("fused" in layout)
    model = MoETransformer.from_pretrained(tmp_path, dtype=dtype)
    assert not model.training and model.norm.weight.dtype == dtype
    assert_same_weights(model, reference)
    assert logits_gap(model, reference) < 1e-5


@every_case
def test_a_model_goes_through_both_libraries_and_comes_back_unchanged(case, tmp_path):
    """transformers saves bfloat16, we load it as float32 and save, transformers loads that:
    float32, same weights."""
    reference = make_reference(torch.bfloat16, **CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model = MoETransformer.from_pretrained(tmp_path / "theirs")
    model.norm.weight.data.add_(1e-4)  # so little that bfloat16 would swallow it
    model.save_pretrained(tmp_path / "ours")
    back = load_with_transformers(tmp_path / "ours")
    assert back.dtype == torch.float32, "config.json has to name the dtype of the file beside it"
    assert_same_weights(model, back)
    for key in (
        *TINY,
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "num_key_value_heads",
        *CASES[case].keys() - {"rope_theta"},
    ):
        assert getattr(back.config, key) == getattr(reference.config, key), key


@every_case
@every_dtype
def test_saving_and_loading_changes_nothing(case, dtype, tmp_path):
    """Weights and config bit for bit; `dtype` converts on the way out, loading converts on the way
    in."""
    model = make_model(**CASES[case])
    model.save_pretrained(tmp_path, dtype=dtype)
    stored = {t.dtype for t in SafetensorsFile(tmp_path / "model.safetensors").values()}
    again = MoETransformer.from_pretrained(tmp_path)
    assert stored == {dtype}
    assert again.config.to_dict() | {"torch_dtype": None} == model.config.to_dict() | {
        "torch_dtype": None
    }
    for ours, loaded in zip(model.parameters(), again.parameters()):
        assert torch.equal(ours.to(dtype).float(), loaded)
    assert (again.lm_head.weight is again.embed_tokens.weight) == model.config.tie_word_embeddings


HUB_2024 = {
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 3,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rope_scaling": None,
        "rope_theta": 700.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 61,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 61,
    },
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 3,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 61,
    },
}


@pytest.mark.parametrize("kind", HUB_2024)
@pytest.mark.parametrize("spelling", ["2024", "transformers 5"])
def test_both_spellings_of_a_config_are_the_same_model(kind, spelling, tmp_path):
    """The hub's files of 2024, key for key, and the same with rope_parameters and dtype:
    transformers' logits."""
    raw = dict(HUB_2024[kind])
    if spelling == "transformers 5":
        raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
        raw["dtype"] = raw.pop("torch_dtype")
        raw.pop("rope_scaling", None)
    make_model(3, **{k: v for k, v in raw.items() if "dtype" not in k}).save_pretrained(
        tmp_path, torch.bfloat16
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = MoETransformer.from_pretrained(tmp_path)
    assert model.config.rope_theta == (700.0 if kind == "olmoe" else 1e6)
    assert model.config.norm_topk_prob == (kind != "olmoe") and model.config.rms_norm_eps == 1e-5
    again = hub.make_config(model.config.to_dict(), Config).to_dict()
    assert again == model.config.to_dict()
    elsewhere = ("dtype", "torch_dtype", "rope_parameters", "rope_scaling")
    assert all(again[key] == value for key, value in raw.items() if key not in elsewhere)
    assert logits_gap(model, load_with_transformers(tmp_path, dtype=torch.float32)) < 1e-5


def test_what_a_config_does_not_say_is_what_transformers_assumes():
    """The smallest config.json of each kind: the same defaults as in the library's config
    classes."""
    transformers = pytest.importorskip("transformers")
    sizes = {key: TINY[key] for key in list(TINY)[:5]}
    sizes |= {"hidden_size": 64, "num_attention_heads": 16}
    for kind in (OLMOE, MIXTRAL, QWEN3):
        ours, theirs = (
            hub.make_config(sizes | kind, Config),
            transformers.AutoConfig.for_model(**sizes | kind),
        )
        same = ("rms_norm_eps", "tie_word_embeddings", "initializer_range", "norm_topk_prob")
        same += ("router_aux_loss_coef", "num_key_value_heads", "max_position_embeddings")
        for key in same:
            if key == "norm_topk_prob" and kind is MIXTRAL:
                continue  # not a key of its config: always so
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", [OLMOE, MIXTRAL, QWEN3])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "default"}])
def test_of_two_rotary_bases_the_one_in_rope_parameters_counts_as_in_transformers(kind, rope):
    """Also where rope_parameters does not say its type."""
    transformers = pytest.importorskip("transformers")
    raw = TINY | kind | {"rope_theta": 5.0, "rope_parameters": rope | {"rope_theta": 7.0}}
    theirs = transformers.AutoConfig.for_model(**raw).rope_parameters["rope_theta"]
    assert hub.make_config(raw, Config).rope_theta == theirs == 7.0


# Files go both ways ------------------------------------------------------------------------------


def some_tensors():
    """Every dtype; a scalar, an empty tensor, a transposed one, a slice, and names that are not
    ASCII."""
    torch.manual_seed(0)
    tensors = {
        f"of type {name}": (torch.randn(3, 5) * 50).to(dtype) for name, dtype in FILE_DTYPES.items()
    }
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "größe / 重み": torch.arange(3.0),
    }
    tensors |= {
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(6, 6)[1:5, ::2],
        "odd": torch.ones(3).half(),
    }
    return tensors


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    library = pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write_tensors(path, tensors)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys() and all(
        same(theirs[name], tensors[name]) for name in tensors
    )
    with library.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "without it transformers refuses the file"


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path, tensors = (
        tmp_path / "a.safetensors",
        {name: t.contiguous() for name, t in some_tensors().items()},
    )
    save_file(tensors, path, metadata={"anything": "at all"})
    file = SafetensorsFile(path)
    assert set(file) == tensors.keys() and len(file) == len(tensors)
    assert all(same(file[name], tensors[name]) for name in tensors)
    copies = {name: torch.empty_like(t) for name, t in tensors.items()}
    hub.Tensors(path).fill({name: Place(t) for name, t in copies.items()})
    assert all(same(copies[name], tensors[name]) for name in tensors)


def test_writing_converts_one_dtype_to_another(tmp_path):
    tensors = {"a": torch.randn(4, 4), "b": torch.randn(3).double()}
    write_tensors(tmp_path / "f", tensors, torch.bfloat16)
    file = SafetensorsFile(tmp_path / "f")
    assert all(same(file[name], t.bfloat16()) for name, t in tensors.items())


def test_data_that_starts_at_an_odd_byte_is_read(tmp_path):
    """The format does not promise alignment: a header of odd length shifts every tensor."""
    t = torch.randn(5)
    head = {"t": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    write_raw(
        tmp_path / "f",
        json.dumps(head).encode() + b" " * (1 - len(json.dumps(head)) % 2),
        t.numpy().tobytes(),
    )
    assert same(SafetensorsFile(tmp_path / "f")["t"], t)


# Memory ------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from model import Config, MoETransformer

def size(key):
    # VmRSS: now; VmHWM: at most, of this process alone (ru_maxrss would begin at the parent's)
    lines = open("/proc/self/status")
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

with torch.device("meta"):  # first what torch imports on demand
    MoETransformer(Config(8, 8, 8, 1, 1, 1, 1))
folder, start = sys.argv[1], size("VmRSS:")
model = MoETransformer.from_pretrained(folder)
loaded = size("VmHWM:") - start
model.save_pretrained(folder + "/again", torch.bfloat16)
print(loaded, size("VmHWM:") - start, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="measures memory as Linux reports it"
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_loading_and_saving_hold_the_model_once(stored, tmp_path):
    """A model of 300 MB, in a fresh process: its memory never grows by more than 1.15 times that,
    saving included."""
    sizes = {"num_experts": 48, "hidden_size": 512, "intermediate_size": 512}
    config = hub.make_config(TINY | OLMOE | sizes, Config)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in tensors_of(MoETransformer(config)).items()}
    numbers = torch.randn(max(shape.numel() for shape in shapes.values())).to(stored)
    tensors = {name: numbers[: shape.numel()].view(shape) for name, shape in shapes.items()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    run.write_json(tmp_path / "config.json", config.to_dict())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loading, with_saving, size = map(int, done.stdout.split())
    shares = loading / size, with_saving / size
    assert size > 300e6 and 0.9 < shares[0] <= shares[1] < 1.15, shares


# Faulty folders ----------------------------------------------------------------------------------


def fault(action, *words, kind=ValueError):
    """The one-line message of the fault; it must be of the kind and hold the words."""
    with pytest.raises(kind) as error:
        action()
    message = str(error.value)
    assert type(error.value) in (ValueError, FileNotFoundError), repr(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


def load(folder, dtype=torch.float32):
    return MoETransformer.from_pretrained(folder, dtype)


def change_config(folder, **changes):
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def test_a_missing_folder_or_file_is_named(folder):
    """FileNotFoundError with the path and what belongs there."""
    fault(
        lambda: load(folder / "nowhere"),
        folder / "nowhere",
        "no such folder",
        kind=FileNotFoundError,
    )
    fault(
        lambda: load(folder / "config.json"),
        "config.json",
        "no such folder",
        kind=FileNotFoundError,
    )
    (folder / "model.safetensors").rename(folder / "other")
    fault(
        lambda: load(folder),
        folder / "model.safetensors",
        "no such file",
        "complete",
        kind=FileNotFoundError,
    )
    (folder / "config.json").unlink()
    fault(lambda: load(folder), folder / "config.json", "no such file", kind=FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b'{"model_type": "olmoe",\n\n"a": }', ["not valid JSON", "line 3"]),
        (b"[1, 2]", ["list", "expected an object"]),
        (b"null", ["expected an object"]),
        (b'{"a": "\xff"}', ["byte 7 is not UTF-8"]),
        (b"[" * 100_000, ["not valid JSON", "nested too deeply"]),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ["not valid JSON"]),
    ],
    ids=[
        "empty",
        "cut off",
        "syntax",
        "list",
        "null",
        "not UTF-8",
        "nested deeply",
        "number of 5000 digits",
    ],
)
def test_a_corrupt_config_is_named(folder, content, words):
    """ValueError with the path and what is wrong with the JSON."""
    (folder / "config.json").write_bytes(content)
    fault(lambda: load(folder), folder / "config.json", *words)


@pytest.mark.parametrize("model_type", ["llama", None, 5, ["olmoe"], {}, ...])
def test_an_unsupported_model_type_is_refused_with_the_list_of_supported_ones(folder, model_type):
    change_config(folder, model_type=model_type)
    fault(
        lambda: load(folder),
        folder / "config.json",
        "model_type",
        "not supported",
        "olmoe, mixtral, qwen3_moe",
    )


@pytest.mark.parametrize("key", [*list(TINY)[:5], "num_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("value", [..., None, "16", 16.0, 0, -4, True, [16], {}, 10**4000])
def test_a_size_that_is_missing_or_no_positive_integer_is_refused(folder, key, value):
    """Also true, which Python counts as the integer 1, and more than 63 bits hold."""
    change_config(folder, **{key: value})
    fault(lambda: load(folder), folder / "config.json", key, "positive integer")


WRONG = {
    "num_key_value_heads": [3, -2, "2", 2.0, [2]],
    "head_dim": [3, -4, "4", 4.0, [4]],
    "norm_topk_prob": ["no", [0]],
    "rms_norm_eps": ["x", [], {}, math.inf, math.nan],
    "rope_theta": ["x", [], 0, -5.0, math.inf, math.nan],
    "clip_qkv": ["a", [], -1.0, math.nan],
    "max_position_embeddings": ["x", 0, -1, 2.5, 2**63],
    "tie_word_embeddings": ["no", [0]],
    "initializer_range": ["x", []],
    "router_aux_loss_coef": ["x", []],
    "eos_token_id": ["x", [1, "x"], 1.5, {}, -1, [3, 2**63]],
    "bos_token_id": ["x", 1.5, {}],
    "pad_token_id": ["x", 1.5, {}],
    "hidden_act": ["gelu", 3, []],
    "attention_bias": [True, "yes"],
    "sliding_window": [4096, "x"],
    "mlp_only_layers": [[0], "x", 5],
    "decoder_sparse_step": [2, 0, "1", []],
    "rope_scaling": ["yes", {"type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, [1], 5],
    "rope_parameters": [
        "yes",
        {"rope_type": "llama3", "rope_theta": 1e4},
        [1],
        {"rope_theta": "x"},
        5,
    ],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str
)
def test_an_option_of_the_wrong_kind_is_refused_and_named(folder, key, value):
    """ValueError with the file and the key, before any weight is read: never a TypeError from
    inside the model."""
    changes = {key: value}
    if key == "rope_parameters":
        changes["rope_theta"] = ...  # else it would not be asked
    change_config(folder, **changes)
    words = {"rope_scaling": "rope", "rope_parameters": "rope", "num_key_value_heads": "key"}
    fault(lambda: load(folder), folder / "config.json", words.get(key, key))


@pytest.mark.parametrize("key", WRONG)
def test_null_is_the_default_or_refused(folder, key):
    """Hub files write null for options that are off; where an option needs a value, the error names
    it."""
    change_config(folder, **{key: None})
    try:
        assert load(folder)(IDS).logits.isfinite().all()
    except ValueError as error:
        message = str(error)
        assert str(folder / "config.json") in message and key in message, error
        assert "\n" not in message, error


def test_sizes_that_do_not_fit_together_are_refused(folder):
    """More choices than experts; heads whose size would be odd, or nothing at all."""
    change_config(folder, num_experts_per_tok=7)
    fault(lambda: load(folder), folder / "config.json", "num_experts_per_tok 7", "num_experts 6")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}
    change_config(folder, num_experts_per_tok=2, **heads)
    fault(lambda: load(folder), folder / "config.json", "head")
    change_config(folder, num_attention_heads=32, num_key_value_heads=32)  # 16 / 32
    fault(lambda: load(folder), folder / "config.json", "head")


MOST = 2**31 - 1
BEYOND = [
    {"vocab_size": MOST, "hidden_size": MOST},
    {"hidden_size": MOST, "intermediate_size": MOST},
    {"num_experts": MOST, "intermediate_size": MOST, "hidden_size": MOST},
    {"num_attention_heads": MOST, "num_key_value_heads": MOST, "hidden_size": MOST},
]


@pytest.mark.parametrize("sizes", BEYOND, ids=str)
def test_sizes_whose_product_no_integer_holds_are_refused(sizes, folder):
    """Each alone is a positive integer; a tensor of that shape cannot even be named."""
    change_config(folder, head_dim=2, **sizes)
    fault(lambda: load(folder), folder, str(MOST))


CLAIMS = """
import sys, time, torch
from model import Config, MoETransformer

with torch.device("meta"):  # first what torch imports on demand
    MoETransformer(Config(8, 8, 8, 1, 1, 1, 1))

def peak():
    lines = open("/proc/self/status")
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

before, start = peak(), time.perf_counter()
try:
    MoETransformer.from_pretrained(sys.argv[1])
except ValueError as error:
    print(time.perf_counter() - start, peak() - before, error)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="measures memory as Linux reports it"
)
@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("num_hidden_layers", 4_000_000),
        ("num_experts", 2_000_000_000),
        ("vocab_size", 2**31 - 1),
        ("intermediate_size", 2**31 - 1),
        ("head_dim", 2**31 - 2),
    ],
)
def test_sizes_that_the_files_do_not_hold_are_refused_at_once(folder, key, count):
    """A model of that many parts would take for ever to build, or all of the memory: one line,
    within a second, and less than 50 MB."""
    change_config(folder, **{key: count})
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", CLAIMS, folder]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    seconds, memory, message = done.stdout.split(maxsplit=2)
    assert str(folder) in message and (str(count) in message or "has shape" in message)
    assert float(seconds) < 1 and int(memory) < 50e6


EITHER = (ValueError, FileNotFoundError)


def test_what_is_no_regular_file_is_refused_and_not_opened(folder):
    """A folder of that name, or a pipe, of which a read would never end."""
    for name in ("config.json", "model.safetensors"):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        fault(lambda: load(folder), name, "not a regular file", kind=EITHER)
        path.rmdir()
        if hasattr(os, "mkfifo"):
            os.mkfifo(path)
            fault(lambda: load(folder), name, "not a regular file", kind=EITHER)
            path.unlink()
        path.write_bytes(content)
    assert load(folder)


def test_a_pointer_in_place_of_the_weights_says_how_to_fetch_them(folder):
    """What git clones without Git LFS."""
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69\n"
    )
    (folder / "model.safetensors").write_bytes(pointer)
    fault(lambda: load(folder), folder / "model.safetensors", "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("given", ["allenai/OLMoE-1B-7B-0924", "nowhere", "/no/such/folder"])
def test_a_model_that_is_not_here_yet_says_how_it_comes(given, tmp_path, monkeypatch):
    """Its name on the hub, or a folder that does not exist: the command that downloads it."""
    monkeypatch.chdir(tmp_path)
    name = given if given.startswith("allenai") else "owner/model"
    words = (f"{given}: no such folder", f"python data/prepare.py {name}")
    fault(lambda: load(given), *words, kind=FileNotFoundError)


QWEN3_REFUSED = {
    "layers without experts": {"mlp_only_layers": [1]},
    "every second layer": {"decoder_sparse_step": 2},
    "biases": {"attention_bias": True},
    "a window": {"use_sliding_window": True, "sliding_window": 32},
    "clipping, which transformers would not do": {"clip_qkv": 0.4},
    "half of the channels turned, the same": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("case", QWEN3_REFUSED)
def test_a_qwen3_with_parts_that_are_not_here_is_refused_by_name(case, tmp_path):
    """transformers would build most; a sliding_window that is not used is no hindrance."""
    make_model(**QWEN3).save_pretrained(tmp_path)
    change_config(tmp_path, sliding_window=32, use_sliding_window=False)
    assert load(tmp_path)
    change_config(tmp_path, **QWEN3_REFUSED[case])
    key = list(QWEN3_REFUSED[case])[-1]
    fault(lambda: load(tmp_path), tmp_path / "config.json", key, "not supported")


# Faulty checkpoints ------------------------------------------------------------------------------


NOT_FINITE = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_a_number_that_is_not_finite_is_found_on_loading_and_its_tensor_named(
    folder, dtype, value, fused
):
    """One of many, wherever it stands, in a file of each dtype, also where loading converts it."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    tensors = tensors_of(load(folder), fused)
    for name in ("lm_head.weight", "model.norm.weight", list(tensors)[-1]):
        bad = {key: t.to(dtype, copy=True) for key, t in tensors.items()}
        bad[name].view(-1)[len(bad[name].view(-1)) * 2 // 3] = value
        save_file({key: t.contiguous() for key, t in bad.items()}, path)
        fault(lambda: load(folder), path, name, "not finite")
    write_tensors(path, tensors, dtype)
    assert load(folder)


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_number_that_is_not_finite_is_not_written_and_the_old_file_stays(tmp_path, dtype, value):
    """The tensor is named; also where only the file's dtype is too small for the number."""
    path, fine = (
        tmp_path / "f",
        {"a": torch.ones(3, 4), "b": torch.zeros(2), "empty": torch.zeros(0)},
    )
    write_tensors(path, fine)
    before = path.read_bytes()
    for bad in (torch.tensor([[0, 1, value]], dtype=dtype), torch.tensor(value, dtype=dtype)):
        tensors = fine | {"bad one": bad}
        fault(partial(write_tensors, path, tensors), path, "bad one", "not finite")
    tensors = fine | {"large": torch.tensor([1e39, 0], dtype=torch.float64)}
    fault(lambda: write_tensors(path, tensors, torch.float32), path, "large", "not finite")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("top", "kind"), [(1e39, torch.float32), (3.4e38, torch.bfloat16)])
@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_a_number_that_only_the_files_dtype_holds_is_refused(folder, fused, top, kind):
    path = folder / "model.safetensors"
    tensors = tensors_of(load(folder), fused)
    *_, name = tensors
    tensors = {key: t.to(torch.float64, copy=True) for key, t in tensors.items()}
    tensors[name].view(-1)[0] = -top
    write_tensors(path, tensors)
    fault(lambda: load(folder, kind), path, name, "not finite")


def test_the_largest_numbers_of_each_dtype_are_finite(tmp_path):
    """What overflows a sum does not count, and whole numbers always are."""
    for name, dtype in FILE_DTYPES.items():
        top = torch.finfo(dtype).max if dtype.is_floating_point else 1
        t = torch.tensor([top, top, 0], dtype=dtype)
        write_tensors(tmp_path / name, {"t": t})
        place = Place(torch.zeros(3, dtype=dtype))
        hub.Tensors(tmp_path / name).fill({"t": place})
        assert torch.equal(place.parameter, t)


def make_shards(folder):
    """Split the folder's file in two, with an index; return the content of the index."""
    whole = SafetensorsFile(folder / "model.safetensors")
    names, index = list(whole), {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        write_tensors(folder / file, {name: whole[name] for name in part})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_the_whole(folder):
    """The same weights from two shards as from one file."""
    whole = load(folder)
    make_shards(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), load(folder).parameters()))


def test_a_missing_shard_is_named(folder):
    make_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    words = (folder / "model-00002-of-00002.safetensors", "no such file", "complete")
    fault(lambda: load(folder), *words, kind=FileNotFoundError)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\n../b",
        "\0",
        "\ud800",
        "a" * 999,
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(folder, name):
    """A file name is a name of a file in this folder, not a path and not a folder."""
    index = make_shards(folder)
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = fault(lambda: load(folder), folder, kind=(ValueError, FileNotFoundError))
    assert "not the name of a file in this folder" in message or "not a regular file" in message


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": None}, [], "x"]
)
def test_an_index_without_a_map_is_refused(folder, content):
    make_shards(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    fault(lambda: load(folder), "model.safetensors.index.json")


def test_an_index_of_nothing_is_refused(folder):
    """An empty weight_map is no model."""
    make_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    fault(lambda: load(folder), folder / "model.safetensors.index.json", "no weight_map")


def edit_tensors(path, edit):
    tensors = {name: t.clone() for name, t in SafetensorsFile(path).items()}
    edit(tensors)
    write_tensors(path, tensors)


ONE = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder / "model.safetensors", lambda t: t.pop(ONE))
    fault(lambda: load(folder), folder, "1 tensors are missing", ONE, "configuration")
    change_config(folder, num_hidden_layers=3)
    fault(lambda: load(folder), "28 tensors are missing", "...")


def test_a_tensor_that_the_model_does_not_have_is_named(folder):
    """Nothing of a checkpoint is dropped in silence."""
    path, bias = folder / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(path, lambda t: t.update({bias: t[ONE]}))
    fault(lambda: load(folder), folder, "does not have", bias)
    edit_tensors(path, lambda t: t.update({"a name\nof two lines": t.pop(bias)}))
    fault(lambda: load(folder), folder, "does not have")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    """Also if the number of elements is the same, and if it is a matrix of one row that would be
    broadcast."""
    path = folder / "model.safetensors"
    edit_tensors(path, lambda t: t.update({ONE: t[ONE].t()}))
    fault(lambda: load(folder), path, ONE, "[16, 8]", "[8, 16]")
    edit_tensors(path, lambda t: t.update({ONE: t[ONE].t()[:1]}))
    fault(lambda: load(folder), path, ONE, "[1, 16]", "[8, 16]")


def test_a_tensor_in_two_shards_is_named(folder):
    index = make_shards(folder)
    first = folder / "model-00001-of-00002.safetensors"
    edit_tensors(first, lambda t: t.update({ONE: torch.zeros(8, 16)}))
    assert index["weight_map"][ONE] != first.name
    fault(lambda: load(folder), folder, ONE, "more than one file")


def test_nothing_is_copied_before_everything_was_checked(folder):
    """The last tensor has a wrong shape, or is missing: the places of all others are as they
    were."""
    path = folder / "model.safetensors"
    last = list(SafetensorsFile(path))[-1]
    for edit in (lambda t: t.update({last: t[last][:1]}), lambda t: t.pop(last)):
        edit_tensors(path, edit)
        model = make_model(9)
        before = [p.clone() for p in model.parameters()]
        fault(lambda: hub.Tensors(folder).fill(hub.places(model)), last)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# Faulty safetensors files ------------------------------------------------------------------------


def write_raw(path, header: bytes, data: bytes = b"", length=None):
    path.write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little") + header + data
    )


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_all(path):
    """Everything that a reader does: open, and copy every tensor."""
    return {name: tensor.clone() for name, tensor in SafetensorsFile(path).items()}


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    """Every length from 0 to one byte less than the whole, all of them, as a download may leave
    it."""
    write_tensors(tmp_path / "f", {"a": torch.ones(4), "b": torch.ones(2, 3).half()})
    whole = (tmp_path / "f").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:length])
        fault(lambda: read_all(tmp_path / "f"), tmp_path / "f")
    (tmp_path / "f").write_bytes(whole)
    assert read_all(tmp_path / "f").keys() == {"a", "b"}


@pytest.mark.parametrize("length", [3, 9, 100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path, length):
    write_raw(tmp_path / "f", b"{}", length=length)
    fault(lambda: read_all(tmp_path / "f"), tmp_path / "f", str(length), "cut off")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b"PK\x03\x04 a zip file, as torch.save writes it", ["not valid JSON"]),
        (b'{"\xff": 1}', ["expected are dtype"]),
        (b"[]", ["not a JSON object"]),
        (b"5", ["not a JSON object"]),
        (b"null", ["not a JSON object"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b'{"a":' * 100_000, ["not valid JSON"]),
        (b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', []),
        (b'{"a": 5}', ['"a"', "expected are dtype"]),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', ['"a"', "expected are dtype"]),
    ],
)
def test_a_header_that_is_no_header_is_refused(tmp_path, header, words):
    """A ValueError with the path; also for 100,000 brackets, which would exhaust the stack, and
    5,000 digits."""
    write_raw(tmp_path / "f", header, bytes(8))
    fault(lambda: read_all(tmp_path / "f"), tmp_path / "f", *words)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, ['"b" begins at byte 4,', "ends at 8: they"]),
        ({"a": entry(), "b": entry(offsets=(0, 8))}, ['"b" begins at byte 0,', "ends at 8: they"]),
        ({"a": entry(offsets=(8, 16)), "b": entry(offsets=(8, 16))}, ['"a" begins at byte 8,']),
        ({"a": entry(shape=(4,), offsets=(0, 16)), "b": entry("F16", (1,), (3, 5))}, ["overlap"]),
        ({"a": entry("F16", (2,), (0, 4)), "b": entry(offsets=(8, 16))}, ['"b"', "leave a gap"]),
        ({"a": entry()}, ["take 8 bytes", "has 16", "cut off"]),
        ({"a": entry(), "b": entry(shape=(4,), offsets=(8, 24))}, ["take 24 bytes", "has 16"]),
        ({}, ["take 0 bytes", "has 16"]),
        ({"a": entry(offsets=(8, 0))}, ['"a"', "[8, 0]", "as many bytes"]),
        ({"a": entry(offsets=(2**63, 2**63 + 8))}, ['"a"']),
        ({"a": entry(offsets=(-8, 0))}, ['"a"', "whole numbers"]),
        ({"a": entry(offsets=(0, 8.0))}, ['"a"', "whole numbers"]),
        ({"a": entry(offsets=(0,))}, ['"a"']),
        ({"a": entry(offsets=(0, 8, 8))}, ['"a"']),
        ({"a": entry(offsets="08")}, ['"a"']),
        ({"a": entry(offsets=None)}, ['"a"']),
        ({"a": entry(shape=(3,))}, ['"a"', "as many bytes", '"F32", "shape": [3]']),
        ({"a": entry(shape=())}, ['"a"', "as many bytes", '"F32", "shape": []']),
        ({"a": entry("F64")}, ['"a"', "as many bytes", '"F64", "shape": [2]']),
        ({"a": entry(shape=(2, 0))}, ['"a"', "as many bytes", '"F32", "shape": [2, 0]']),
        ({"a": entry("F8_E4M3")}, ['"a"', "F8_E4M3", "BF16"]),
        ({"a": entry("f32")}, ['"a"', "f32", "F32"]),
        ({"a": entry(None)}, ['"a"', "dtype"]),
        ({"a": entry(["F32"])}, ['"a"', "dtype"]),
        ({"a": entry(shape=(-2,))}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=(-1, -2))}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=(2.0,))}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=(True, 2))}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=("2",))}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=2)}, ['"a"', "whole numbers"]),
        ({"a": entry(shape={"2": 2})}, ['"a"', "whole numbers"]),
        ({"a": entry(shape=(2**64,))}, ['"a"']),
        ({"a": entry(shape=(2**62, 4, 2))}, ['"a"']),
        ({"a": entry(shape=(2**63, 0), offsets=(0, 0))}, ['"a"']),
        ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, ['"a"']),
        ({"a": entry(shape=(10**4000, 10**4000))}, ['"a"']),
        ({"a": entry(shape=(2**62,) * 300)}, ['"a"']),
        ({"a": [1, 2]}, ['"a"']),
        ({"a\nb": entry("?")}, ["a\\nb"]),
    ],
)
def test_an_entry_that_does_not_fit_the_data_is_refused(tmp_path, entries, words):
    """16 bytes of data; the message names the file and the tensor. Products that would overflow 64
    bits included."""
    write_raw(tmp_path / "f", json.dumps(entries).encode(), bytes(16))
    fault(lambda: read_all(tmp_path / "f"), tmp_path / "f", *words)


LAID_OUT = {
    "one behind another": ([(0, 8), (8, 16)], True),
    "in another order": ([(8, 16), (0, 8)], True),
    "a gap between": ([(0, 4), (8, 16)], False),
    "a gap before": ([(4, 8), (8, 16)], False),
    "bytes behind": ([(0, 8), (8, 12)], False),
    "overlapping": ([(0, 8), (4, 16)], False),
    "cut off": ([(0, 8), (8, 20)], False),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_tensors_that_do_not_fill_the_data_are_refused_here_and_by_the_library(tmp_path, layout):
    """The format wants no gap, no overlap and no bytes behind."""
    safetensors = pytest.importorskip("safetensors")
    spans, fine = LAID_OUT[layout]
    shapes = [[(end - begin) // 4] for begin, end in spans]
    entries = {name: entry(shape=n, offsets=at) for name, n, at in zip("ab", shapes, spans)}
    write_raw(tmp_path / "f", json.dumps(entries).encode(), bytes(range(16)))
    if fine:
        ours, theirs = (
            read_all(tmp_path / "f"),
            safetensors.deserialize((tmp_path / "f").read_bytes()),
        )
        theirs = {name: bytes(told["data"]) for name, told in theirs}
        assert {name: t.numpy().tobytes() for name, t in ours.items()} == theirs
    else:
        fault(lambda: read_all(tmp_path / "f"), tmp_path / "f")
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize((tmp_path / "f").read_bytes())


def test_of_two_tensors_of_one_name_none_is_lost_in_silence(tmp_path):
    """JSON would keep the second; the bytes of the first belong to nobody then."""
    one, two = (json.dumps(entry(offsets=offsets)) for offsets in ((0, 8), (8, 16)))
    for first, second in ((one, two), (two, one)):
        write_raw(tmp_path / "f", f'{{"a": {first}, "a": {second}}}'.encode(), bytes(16))
        fault(lambda: read_all(tmp_path / "f"), tmp_path / "f", "8")


def test_no_damage_to_a_header_ends_in_anything_but_a_value_error(tmp_path):
    """500 times up to five random bytes of the header or its length are changed: refused, or read
    and harmless."""
    generator, path = random.Random(0), tmp_path / "f"
    write_tensors(
        path, {"a": torch.ones(4), "bc": torch.ones(2, 3).half(), "d": torch.zeros(0, 3).double()}
    )
    whole, refused = path.read_bytes(), 0
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        broken = bytearray(whole)
        for _ in range(generator.choice([1, 1, 2, 5])):
            broken[generator.randrange(end)] = generator.choice(
                [generator.randrange(256), *b'0123456789"{}[],:-.eE']
            )
        path.write_bytes(broken)
        try:
            tensors = read_all(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            assert all(t.nbytes <= len(whole) for t in tensors.values())
    assert 250 < refused < 500


def test_no_damage_to_a_model_folder_ends_in_anything_but_a_value_error(folder):
    """200 times a byte of the header or of config.json is changed: refused with a file's name, or
    loaded whole."""
    generator = random.Random(1)
    path = folder / "model.safetensors"
    for target, end in (
        (path, 8 + int.from_bytes(path.read_bytes()[:8], "little")),
        (folder / "config.json", None),
    ):
        whole = target.read_bytes()
        for _ in range(100):
            broken = bytearray(whole)
            broken[generator.randrange(end or len(whole))] = generator.choice(
                b'0123456789"{}[],:-.eE truefalsn\xff'
            )
            target.write_bytes(broken)
            try:
                load(folder)
            except (ValueError, FileNotFoundError) as error:
                assert str(folder) in str(error) and "\n" not in str(error), error
        target.write_bytes(whole)


# Writing -----------------------------------------------------------------------------------------


class Broken(Exception):
    """What happens in the middle of writing."""


class BrokenPlace(Place):
    """A tensor that cannot be had when it is written."""

    def of(self, stack, first=0):
        raise Broken


@pytest.mark.parametrize("old", [None, b"the old file"], ids=["a new file", "over an old file"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, old):
    """Half of a file under the right name would be loaded one day; under another name it would fill
    the disk."""
    path = tmp_path / "model.safetensors"
    if old:
        path.write_bytes(old)
    with pytest.raises(Broken):
        hub.write_tensors(path, {"a": Place(torch.ones(3)), "b": BrokenPlace(torch.ones(3))})
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if old else [])
    assert not old or path.read_bytes() == old


def test_a_failure_while_renaming_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """The rename is the last step."""

    def fail(*args):
        raise Broken

    write_tensors(tmp_path / "f", {"a": torch.zeros(3)})
    monkeypatch.setattr(run.os, "replace", fail)
    with pytest.raises(Broken):
        write_tensors(tmp_path / "f", {"a": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert read_all(tmp_path / "f")["a"].tolist() == [0, 0, 0]


def test_a_file_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    """When the rename comes, the old file still stands, and the new one is whole and on the
    disk."""
    path, seen, synced = tmp_path / "f", [], []
    write_tensors(path, {"a": torch.zeros(3)})
    replace, fsync = os.replace, os.fsync

    def look(source, target):
        seen.append((read_all(source)["a"].tolist(), read_all(target)["a"].tolist(), len(synced)))
        replace(source, target)

    monkeypatch.setattr(run.os, "replace", look)
    monkeypatch.setattr(run.os, "fsync", lambda number: synced.append(fsync(number)))
    write_tensors(path, {"a": torch.ones(3)})
    assert seen == [([1, 1, 1], [0, 0, 0], 1)]
    assert read_all(path)["a"].tolist() == [1, 1, 1] and len(list(tmp_path.iterdir())) == 1


def test_a_model_may_be_saved_over_the_file_it_was_loaded_from(folder):
    """The map of the old file stays valid until it is let go; afterwards the folder holds the new
    weights."""
    old = SafetensorsFile(folder / "model.safetensors")
    kept = old["lm_head.weight"].clone()
    model = load(folder)
    model.lm_head.weight.data.add_(1)
    model.save_pretrained(folder)
    assert torch.equal(old["lm_head.weight"], kept)
    assert torch.equal(load(folder).lm_head.weight, model.lm_head.weight)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_mapped_file_cannot_be_changed_through_a_tensor(folder):
    """A tensor is a private view of the file: writing to it stays in memory."""
    path = folder / "model.safetensors"
    before = path.read_bytes()
    SafetensorsFile(path)["lm_head.weight"].fill_(7)
    assert path.read_bytes() == before


def test_the_root_of_a_hub_cache_names_the_folder_in_it(tmp_path):
    """models--owner--name/snapshots/HASH is the model folder, as huggingface_hub lays it out."""
    root = tmp_path / "models--allenai--OLMoE"
    snapshot = root / "snapshots" / "0123456789abcdef"
    make_model().save_pretrained(snapshot)
    fault(lambda: load(root), root, "hub cache", snapshot, kind=FileNotFoundError)
    assert load(snapshot)
