"""PERFT inside a transformers model is PERFT inside this project's: the same logits, the same
files; and everything else that transformers does with its model goes on."""

import ast
import copy
import inspect

import in_transformers
import pytest
import torch

import perft
from model import MoETransformer

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "olmoe": {"num_experts": 6},
    "mixtral": {"num_local_experts": 6, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
}
VARIANTS = {
    "perft_s": {},
    "perft_d": {},
    "perft_r": {"train_router": True},
    "perft_e": {"kind": "parallel"},
    "lora_experts": {},
}
IDS = torch.tensor([[5, 9, 3, 60, 33, 7, 7, 8], [4, 4, 8, 15, 16, 23, 42, 11]])
every_family = pytest.mark.parametrize("family", FAMILIES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def theirs(family):
    config = transformers.AutoConfig.for_model(model_type=family, **SIZES | FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, p in model.named_parameters():
        p.data.normal_(1 if "norm" in name else 0, 0.2)
    return model


def train(model, steps=3):
    """A few large steps on what trains, so that it is far from where it began."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    for _ in range(steps):
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained


@every_family
@every_variant
def test_an_adapter_trained_in_transformers_gives_the_same_logits_here(
    theirs, family, variant, tmp_path
):
    theirs.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(theirs.state_dict())
    adapters = in_transformers.attach(theirs, variant=variant, rank=4, **VARIANTS[variant])
    plain = MoETransformer.from_pretrained(tmp_path / "base")
    base_logits = plain(IDS).logits
    train(theirs)
    perft.save_adapter(adapters, tmp_path / "adapter")
    ours = perft.load_adapter(plain, tmp_path / "adapter")
    with torch.no_grad():
        expected, found = ours(IDS), theirs(input_ids=IDS, output_router_logits=True)
    assert (expected.logits - base_logits).abs().max() > 0.1  # it learnt something
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    for theirs_of_layer, routing in zip(found.router_logits, expected.routings, strict=True):
        torch.testing.assert_close(theirs_of_layer, routing.router_logits, rtol=0, atol=1e-5)
    after = theirs.state_dict()
    for name, weight in before.items():  # the base's own: only a router that trains moved
        name = name.replace(".mlp.gate.", ".mlp.moe.router.")
        name = name.replace(".mlp.experts.", ".mlp.moe.experts.")
        moved = variant == "perft_r" and ".router." in name
        assert torch.equal(after[name], weight) != moved, name


@every_family
@every_variant
def test_an_adapter_trained_here_gives_the_same_logits_in_transformers(
    theirs, family, variant, tmp_path
):
    theirs.save_pretrained(tmp_path / "base")
    ours = MoETransformer.from_pretrained(tmp_path / "base")
    perft.apply_perft(ours, variant, rank=4, **VARIANTS[variant])
    for p in ours.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    perft.save_adapter(ours, tmp_path / "adapter")
    in_transformers.attach(theirs, tmp_path / "adapter")
    with torch.no_grad():
        found, expected = theirs(input_ids=IDS).logits, ours.eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # and with transformers' cache
    prompt = IDS[:1, :4]
    mine = ours.generate(prompt, 6)[0]
    continued = theirs.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    end = SIZES["eos_token_id"]  # ours stop before it
    assert continued[: len(mine) + 1] == (mine if len(mine) == 6 else [*mine, end])


@every_family
@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "perft_e"])
def test_adapters_that_add_nothing_leave_logits_routers_and_balance_loss_as_they_were(
    theirs, family, variant
):
    """B is 0. The balance loss is transformers' own, made of the router logits that come out."""
    with torch.no_grad():
        before = theirs(input_ids=IDS, labels=IDS, output_router_logits=True)
        in_transformers.attach(theirs, variant=variant, init="lora")
        after = theirs(input_ids=IDS, labels=IDS, output_router_logits=True)
    for name in ("logits", "aux_loss", "loss"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    for then, now in zip(before.router_logits, after.router_logits, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)


@every_family
def test_only_the_adapters_train_and_all_of_them_do(theirs, family):
    adapters = in_transformers.attach(theirs, variant="perft_r", rank=4)
    names = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert len(names) == 3 * 2 and all(".adapters." in name for name in names)
    theirs.train()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in theirs.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (name in names), name
    assert sum(row.parameters for row in perft.what_trains(adapters)) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("family", ["olmoe"])
@pytest.mark.parametrize("variant", ["lora_qv", "frozen_experts", "full"])
def test_what_would_train_outside_of_the_blocks_is_refused(theirs, variant):
    with pytest.raises(ValueError, match=f"{variant} trains more than the blocks of experts"):
        in_transformers.attach(theirs, variant=variant)
    in_transformers.attach(theirs, variant="perft_s")  # no block of it was replaced


@pytest.mark.parametrize("family", ["olmoe"])
@pytest.mark.parametrize(
    "options", [{"variant": "router"}, {"variant": "perft_s", "train_router": True}]
)
def test_a_router_that_trains_wants_a_float32_model(theirs, options):
    with pytest.raises(ValueError, match="routers train.*load the model again in float32"):
        in_transformers.attach(theirs.bfloat16(), **options)


def test_it_takes_less_than_thirty_lines():
    """Those of code, imports apart; a reader counts so."""
    lines = set()
    for part in ast.parse(inspect.getsource(in_transformers)).body:
        if isinstance(part, ast.ClassDef | ast.FunctionDef):
            for node in ast.walk(part):
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                if isinstance(node, ast.stmt) and not docstring:
                    lines.add(node.lineno)
    assert len(lines) < 30
