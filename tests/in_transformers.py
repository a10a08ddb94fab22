"""PERFT beside the experts of a transformers model (OLMoE, Mixtral or Qwen3-MoE, transformers 5):

    theirs = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924")
    adapters = attach(theirs, variant="perft_e", rank=16)      # then train `theirs` as ever
    perft.save_adapter(adapters, "out/mine")                   # what train.py would have written
    attach(theirs_again, "out/mine")                           # or a run folder of train.py

What attach returns is this project's model of the same sizes: its blocks are inside of `theirs`,
share its weights, and the rest of it takes no memory. `theirs` keeps its attention, caches, losses
and generation, and output_router_logits=True; its save_pretrained writes names that nobody reads.
Not for lora_qv, frozen_experts and full, which train more than the blocks; nor for ESFT, of which
`python esft.py export` makes a folder that transformers loads.
"""

import torch

import perft
from data import hub
from model import Config, MoETransformer
from moe import Routing


class Block(torch.nn.Module):
    """In the place of a layer's `mlp`, which returns y alone."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        y, _ = self.moe(x)
        return y


def as_routing(gate, inputs, outputs):
    """A hook: what their gate returns, by the names of ours. Those who watch it see no other."""
    logits, weights, ids = outputs
    return Routing(logits, weights.to(logits.dtype), ids)


def attach(theirs, folder=None, **options) -> MoETransformer:
    """The adapter saved in `folder`, or a new one: options of perft.apply_perft."""
    with torch.device("meta"):
        ours = MoETransformer(hub.make_config(theirs.config.to_dict(), Config)).to(theirs.dtype)
    theirs.requires_grad_(False)
    for layer, block in zip(theirs.model.layers, ours.layers):
        block.moe.router = layer.mlp.gate
        block.moe.experts.gate_up_proj = layer.mlp.experts.gate_up_proj
        block.moe.experts.down_proj = layer.mlp.experts.down_proj
    perft.load_adapter(ours, folder) if folder else perft.apply_perft(ours, **options)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    if not all(".moe." in name for name in trained):
        raise ValueError(f"{ours.adapter_config.variant} trains more than the blocks of experts")
    if theirs.dtype != torch.float32 and any(".moe.router." in name for name in trained):
        raise ValueError("routers train, so are float32 now; load the model again in float32")
    for layer, block in zip(theirs.model.layers, ours.layers):
        layer.mlp.gate.register_forward_hook(as_routing)
        layer.mlp = Block(block.moe)
    theirs.to(theirs.device).train(theirs.training)  # the new parts too
    return ours
