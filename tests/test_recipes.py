"""A run asks for what the ESFT paper asks for, and says which part of a device's peak it uses.

References: the paper's section 4.3 and its authors' configs/base.yaml, written down here; torch's
own counter of operations.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_train import arguments, failure, make_base, one_thread  # noqa: F401 (a fixture)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import esft
import perft
import train
from data import dataset
from data.hub import make_config
from model import Config, MoETransformer

# The ESFT paper ----------------------------------------------------------------------------------

PAPER = {  # batch, length, steps and thresholds: section 4.3; the other three: configs/base.yaml
    "batch_size": 32,
    "max_length": 4096,
    "steps": 500,
    "eval_every": 100,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "clip": 1.0,
    "train_on_inputs": False,
}
OF_METHOD = {
    "esft_token": {"lr": 1e-5, "p": 0.2},
    "esft_gate": {"lr": 1e-5, "p": 0.1},
    "full": {"lr": 3e-5},
    "lora_experts": {"lr": 1e-4, "rank": 8, "alpha": 16.0},
    "lora_qv": {"lr": 1e-4, "rank": 8, "alpha": 16.0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def in_force(base, variant, *flags):
    args = arguments(base, "--data", "rows.json", *flags, variant=variant)
    return vars(args)


@pytest.mark.parametrize("variant", OF_METHOD)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_the_recipe_is_what_the_paper_says_whatever_the_base(variant, family, tmp_path):
    folder = make_base(tmp_path / family, model_type=family)
    settings = in_force(folder, variant, "--recipe", "esft_paper")
    expected = PAPER | OF_METHOD[variant]
    assert {name: settings[name] for name in expected} == expected
    rate = train.learning_rate(0, 500, SimpleNamespace(lr=1.0, warmup=settings["warmup"]))
    assert rate == 1.0, "no warm-up"


def test_each_value_of_the_recipe_gives_way_to_its_flag(base):
    values = {name: value for name, value in PAPER.items() if name != "train_on_inputs"}
    for name, value in (values | {"lr": 1e-5, "p": 0.2, "warmup": 1}).items():
        other = value / 2 if isinstance(value, float) else value + 1
        settings = in_force(base, "esft_token", "--recipe", "esft_paper", f"--{name}", other)
        assert settings[name] == other
    settings = in_force(base, "esft_token", "--recipe", "esft_paper", "--epochs", 3)
    assert (settings["epochs"], settings["steps"]) == (3, None)


def test_each_recipe_is_refused_where_its_paper_says_nothing(base, capsys):
    for variant in ("perft_s", "router", "frozen_experts"):
        flags = ["--variant", variant, "--base", base, "--data", "x", "--recipe", "esft_paper"]
        assert failure(*flags)[0] == 2
        said = f"--recipe esft_paper does not apply to --variant {variant}; it applies to esft_"
        assert said in capsys.readouterr().err


WARNED = {"perft_e": "perft_paper", "esft_gate": "esft_paper", "full": "perft_paper or esft_paper"}


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_the_warning_on_a_real_base_names_the_recipes_that_the_variant_takes(base, variant):
    """Every recipe that it names is taken, and every other refused."""
    notes = "\n".join(train.advice(arguments(base, variant=variant)))
    if variant == "scratch":
        assert "--recipe" not in notes
        return
    (named,) = re.findall(r"with --recipe (.*) has the papers' settings", notes)
    assert named == WARNED.get(variant, named)
    for recipe in train.RECIPES:
        flags = ["--data", "x", "--recipe", recipe]
        if recipe in named.split(" or "):
            arguments(base, *flags, variant=variant)
        else:
            assert failure("--variant", variant, "--base", base, *flags)[0] == 2


def test_the_recipe_is_on_the_screen_and_in_the_folder(base, tmp_path, capsys):
    rows = [{"instruction": f"say {n}", "output": "a b"} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--variant", "esft_gate", "--base", base, "--data", tmp_path / "rows.json"]
    flags += ["--recipe", "esft_paper", "--steps", 2, "--held_out", 1, "--out", tmp_path / "run"]
    flags += ["--template", "plain"]
    train.main([str(word) for word in flags])
    shown = dict(re.findall(r"(\w+)=(\S+)", capsys.readouterr().out))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = PAPER | OF_METHOD["esft_gate"] | {"steps": 2, "max_length": 64}  # TINY's positions
    del expected["train_on_inputs"]  # false, which the line leaves out
    assert {name: shown[name] for name in expected} == {k: str(v) for k, v in expected.items()}
    assert {name: saved[name] for name in expected} == expected


# The share of the peak ---------------------------------------------------------------------------

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
B, T = 4, 32


def grouped_flops(a, b, ends, **output):
    """moe's grouped product: of the rows that have a group, all others are not touched."""
    rows = int(ends[-1])
    inner, outer = (a.shape[0], b.shape[1]) if b.dim() == 2 else b.shape[1:]
    return 2 * rows * inner * outer


grouped_flops._get_raw = True  # torch hands over the tensors, not their shapes


def counted(model, labels):
    """A batch, the operations of its step's products by torch, and the choices. Attention is
    written out: here every token is multiplied with all T keys, also with those that are masked."""
    ids = torch.randint(SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, : T - labels] = -100
    kernel = {torch.ops.moe.grouped_mm: grouped_flops}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=kernel) as counter,
    ):
        output = model.train()(ids, labels=targets)
        output.loss.backward()
    counts = torch.stack([train.expert_counts(routing) for routing in output.routings])
    batch = dataset.Batch(ids, targets, torch.ones(B, T, dtype=torch.bool))
    return batch, counter.get_total_flops(), counts


# Of the lowest layer, where the embeddings are frozen: the weights (and keys) of which nobody asks
# the gradient of what they multiply, since nothing trains below.
R, WIDTH = 8, 64  # rank; of the queries
QKV = WIDTH * 64 + 2 * 32 * 64
BELOW = 4 * T * WIDTH + QKV + WIDTH * 64 + 8 * 64  # all of attention, and the router
GATE_UP, DOWN = 3 * 2 * 48 * 64, 3 * 48 * 64
LOWEST = {
    "full": 0,
    "perft_s": BELOW + GATE_UP + DOWN + R * 64,  # the last: of A
    "lora_experts": BELOW + GATE_UP + 3 * R * 64,
    "lora_qv": T * WIDTH + QKV + 2 * R * 64,  # the keys are of a frozen weight
    "esft": BELOW + GATE_UP,
}


@pytest.mark.parametrize("labels", [T, 9])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("variant", LOWEST)
def test_the_operations_of_a_step_are_those_that_torch_counts(variant, family, labels):
    """All of them, within 1 in 10,000, but for those that the lowest layer is spared and those with
    masked keys, which are known."""
    torch.manual_seed(0)
    model = MoETransformer(Config(**SIZES, model_type=family))
    if variant == "esft":
        model = esft.apply_esft(model, [[5, 1], [0], [7, 3, 2]])
    else:
        options = {} if variant == "full" else {"rank": R, "dropout": 0.0}
        model = perft.apply_perft(model, variant, **options)
    batch, flops, counts = counted(model, labels)
    masked = 6 * 2 * B * T * (T - 1) / 2 * 3 * WIDTH  # 6 products, pairs of tokens, layers
    ours = train.flops_of_step(model, batch, counts) + masked
    assert ours - 2 * LOWEST[variant] * B * T == pytest.approx(flops, rel=1e-4)


def test_the_share_of_the_peak_is_operations_by_seconds_and_the_devices_peak(monkeypatch):
    """An H100 by its name; the batch's labels, padding and keys by hand; nothing on a CPU, nor on
    a device that nobody knows."""
    model = MoETransformer(Config(**SIZES))
    ids = torch.zeros(2, 10, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    labels[0, 7:] = 5
    labels[1, 0] = 5  # the first token is never predicted
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    batch, counts = dataset.Batch(ids, labels, mask), torch.ones(3, 8)
    keys = sum([*range(1, 11), *range(1, 7)])
    met = 3 * (QKV + WIDTH * 64 + 8 * 64 + 3 * 3 * 48 * 64)  # in 3 layers, by one of 16 tokens
    flops = 6 * (16 * met + 3 * 96 * 64) + 12 * keys * 3 * WIDTH
    devices = {
        "cuda": "NVIDIA H100 80GB HBM3",
        "cuda:1": "NVIDIA H100 PCIe",
        "cuda:2": "NVIDIA A100-SXM4-80GB",
        "cuda:3": "Some Device",
    }
    monkeypatch.setattr(torch.cuda, "get_device_name", devices.get)
    for device, peak in zip(devices, (989e12, 756e12, 312e12)):
        share = train.share_of_peak(model, batch, counts, device, 0.25)
        assert share == pytest.approx(4 * flops / peak)
    assert train.share_of_peak(model, batch, counts, "cuda:3", 0.25) is None
    assert train.share_of_peak(model, batch, counts, "cpu", 0.25) is None


@pytest.mark.parametrize(("speed", "share"), [(67_000, 0.335), (97_000, 0.485)])
def test_the_share_of_olmoe_is_the_one_that_published_numbers_are_compared_with(speed, share):
    """Frozen, with PERFT-R, in rows of 1,024: 67,000 tokens a second are a third of an H100, and
    97,000 are 48 %."""
    with torch.device("meta"):
        model = MoETransformer(make_config(perft.OLMOE_1B_7B, Config))
        perft.apply_perft(model, "perft_r")
    ids = torch.zeros(1, 1024, dtype=torch.int64)
    flops = train.flops_of_step(model, dataset.Batch(ids, ids, ids == 0), torch.ones(16, 64))
    assert speed * flops / 1024 / 989e12 == pytest.approx(share, abs=0.005)


def test_the_share_stands_in_the_line_of_a_step_where_it_is_known(
    base, tmp_path, monkeypatch, capsys
):
    """One line with, one without, as if the device were known at the second step only."""
    known = iter([None, 0.2834])
    monkeypatch.setattr(train, "share_of_peak", lambda *words: next(known))
    flags = ["--variant", "perft_s", "--base", base, "--out", tmp_path / "run", "--steps", 2]
    flags += ["--log_every", 1, "--eval_rows", 1, "--batch_size", 2, "--train_rows", 4]
    train.main([str(word) for word in flags])
    lines = re.findall(r"^ +\d .* GB +\S+(.*)$", capsys.readouterr().out, re.M)
    assert ["28.3 % of the peak" in line for line in lines] == [False, True]
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("peak_share", "") for line in logged if '"step"' in line]
    assert shares == [None, 0.2834]
