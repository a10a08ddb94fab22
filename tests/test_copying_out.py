"""Who copies moe.py and perft.py, or these and esft.py, into a project of their own needs nothing
else of this repository: no data/, no model.py, no tqdm. Their model brings the names below.

Each test copies the files into an empty folder and runs a script there, in an interpreter of its
own that does not see the repository.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What the files ask of a model: .config, .norm.weight, .layers[i].moe, .layers[i].self_attn.q_proj
# and v_proj; esft.collect asks for Output.routings, and hands over a mask and last_only.
MODEL = '''
import sys
from dataclasses import dataclass
from typing import NamedTuple

sys.modules["tqdm"] = None  # whoever imports it fails; torch does without
import torch
import torch.nn as nn
import torch.nn.functional as F

from moe import MoE

V = 11


@dataclass
class Config:
    num_hidden_layers: int = 2
    hidden_size: int = 16
    intermediate_size: int = 8
    num_experts: int = 6
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False


class Attention(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config.hidden_size)
        self.moe = MoE(config)

    def forward(self, x):
        x = x + self.self_attn(x)
        y, routing = self.moe(x)
        return x + y, routing


class Output(NamedTuple):
    logits: torch.Tensor
    routings: list


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(V, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, V, bias=False)

    def forward(self, ids, mask=None, last_only=False):
        x, routings = self.embed(ids), []
        for block in self.layers:
            x, routing = block(x)
            routings.append(routing)
        return Output(self.head(self.norm(x)), routings)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = Model(Config())
    for name, p in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, std=0.3)
    return model.to(dtype)


IDS = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    logits = model(IDS).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


def train(model, steps):
    """Losses of steps of AdamW over all parameters, as a careless loop does it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_imports(*files):
    """Of this repository, the files that were copied and nothing else."""
    import moe

    folder = moe.__file__.rsplit("/", 1)[0]
    ours = {"moe", "model", "perft", "esft", "train", "eval", "data"}
    assert ours & set(sys.modules) == set(files), ours & set(sys.modules)
    assert not any(name.startswith("data.") for name in sys.modules)
    assert sys.modules["tqdm"] is None
    for name in files:
        assert sys.modules[name].__file__.startswith(folder)
'''

PERFT = """
from perft import LORA, PERFT, apply_perft, merge, warnings_for, what_trains

for variant in (*PERFT, *LORA):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        plain = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            before = model(IDS).logits
        apply_perft(model, variant, rank=4, init="lora", dropout=0.0)
        assert torch.equal(model(IDS).logits, before), "with B = 0 it is the base"
        assert warnings_for(model.adapter_config, model.config) == []
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = train(model, 30)
        assert losses[-1] < losses[0] - 0.1, (variant, losses)
        trained = set()
        for name, p in model.named_parameters():
            assert p.requires_grad != (name in plain), name
            assert p.requires_grad or torch.equal(p, plain[name]), f"{name} was to stay"
            assert not p.requires_grad or not torch.equal(p, start[name]), f"{name} stood still"
            trained |= {name} if p.requires_grad else set()
        rows = what_trains(model)
        assert sum(row.count for row in rows) == len(trained)
        print(variant, dtype, f"{losses[0]:.3f} -> {losses[-1]:.3f}")
        if variant in LORA:
            with torch.no_grad():
                logits = model.float()(IDS).logits
                merged = merge(model)(IDS).logits
            assert (logits - merged).abs().max() < 1e-4
            assert [name for name, _ in model.named_parameters()] == list(plain)
check_imports("moe", "perft")
"""

ESFT = """
from esft import apply_esft, collect, expert_scores, select_experts, warnings_for
from perft import what_trains

for dtype in (torch.float32, torch.bfloat16):
    model = make_model(dtype)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    usage = collect(model, [(IDS, torch.ones_like(IDS))])
    assert usage.n_tokens == IDS.numel() and int(usage.counts.sum()) == 2 * 2 * IDS.numel()
    scores = expert_scores(*usage, model.config.num_experts_per_tok)
    chosen = select_experts(scores, 0.4)
    assert warnings_for(scores, 0.4) == []
    assert all(0 < len(ids) < 6 for ids in chosen), chosen
    with torch.no_grad():
        before = model(IDS).logits
    apply_esft(model, chosen)
    assert torch.equal(model(IDS).logits, before)
    losses = train(model, 30)
    assert losses[-1] < losses[0] - 0.1, losses
    for name, p in model.named_parameters():
        if ".experts." not in name:
            assert torch.equal(p, plain[name]) and not p.requires_grad, name
    model(IDS)  # the bank takes over what the last step made
    for i, (block, ids) in enumerate(zip(model.layers, chosen)):
        experts = block.moe.experts
        for name, (bank, masters) in zip(("gate_up_proj", "down_proj"), experts.stacks()):
            old, new = plain[f"layers.{i}.moe.experts.{name}"], bank[experts.position]
            assert masters.dtype == torch.float32 and masters.requires_grad
            for e in range(6):
                assert torch.equal(old[e], new[e]) == (e not in ids), (i, name, e)
    assert sum(row.parameters for row in what_trains(model)) == 3 * 16 * 8 * sum(map(len, chosen))
    print(chosen, dtype, f"{losses[0]:.3f} -> {losses[-1]:.3f}")
check_imports("moe", "perft", "esft")
"""


@pytest.mark.parametrize(
    ("files", "script"),
    [(["moe.py", "perft.py"], PERFT), (["moe.py", "perft.py", "esft.py"], ESFT)],
    ids=["moe and perft", "moe, perft and esft"],
)
def test_copied_out_alone_the_files_attach_and_train(tmp_path, files, script):
    """The loss falls; what is attached or chosen moves, and nothing else by a bit."""
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "script.py").write_text(MODEL + script)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    argv = [sys.executable, "-s", "script.py"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_moe_py_alone_teaches_its_lesson(tmp_path):
    """python moe.py needs torch and nothing else."""
    shutil.copy(ROOT / "moe.py", tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    argv = [sys.executable, "-s", "moe.py"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "largest difference" in done.stdout, done.stderr
