"""A decoder-only transformer with Mixture-of-Experts blocks that loads OLMoE and Mixtral checkpoints exactly.

    x = embed(token)
    x = x + attention(norm(x));  x = x + moe(norm(x))          num_hidden_layers times
    logits = lm_head(norm(x))

OLMoE and Mixtral are one network with four switches, read from the checkpoint's own config.json: OLMoE normalises
queries and keys (over the whole hidden size, before the heads are split) and may clip q, k, v (`clip_qkv`); Mixtral
shares each key/value head among several query heads (`num_key_value_heads`) and makes a token's expert weights sum to 1
(`norm_topk_prob`).

Shapes: B batch, T time, N = B*T tokens, D hidden_size, F intermediate_size, E num_experts, K experts per token,
V vocab_size; S keys seen by the attention (T, or what the cache holds), H heads, C channels of a head.

Padding may be on either side: rotary attention sees only distances, so shifting a whole row changes nothing.

A model folder is a Hugging Face folder: config.json and model.safetensors (or shards and an index). `hub_tensors` is
the one table of which part of which parameter each tensor of such a folder is; loading and saving both go through it
(the file format itself is in data/checkpoint.py, the reading of config.json in data/config.py).

Left out: sliding-window attention, rope scaling, attention biases (such a checkpoint is refused, not approximated).

    python model.py FOLDER        what is in a model folder: configuration, parameters, active parameters
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.checkpoint import load_checkpoint, tensor_names, write_safetensors, write_text
from data.config import Config
from data.shard import matrices, shard
from moe import Experts, MoE, Routing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 whatever the dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Rotary(NamedTuple):
    """Rotary positions: channel pair (i, i + C/2) of a query or key turns by position * theta^(-2i/C)."""

    cos: torch.Tensor  # (T, C)
    sin: torch.Tensor  # (T, C)

    @classmethod
    def at(cls, positions: torch.Tensor, config: Config, dtype: torch.dtype) -> "Rotary":
        channel = torch.arange(0, config.head_dim, 2, device=positions.device).float()
        angle = positions.float()[:, None] * config.rope_theta ** (-channel / config.head_dim)  # (T, C/2)
        angle = torch.cat((angle, angle), dim=-1)
        return cls(angle.cos().to(dtype), angle.sin().to(dtype))

    def turn(self, x):
        """x (B, H, T, C) -> the same, turned."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class KVCache:
    """Keys and values of all layers for tokens already seen, so that a new token costs one row and not T."""

    def __init__(self, config: Config, batch: int, length: int, like: torch.Tensor):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.used = 0

    def append(self, layer: int, k, v):
        """Store k, v (B, heads, T, C) behind what is there; return all S of the layer. `used` moves once a forward."""
        end = self.used + k.shape[2]
        self.keys[layer, :, :, self.used : end], self.values[layer, :, :, self.used : end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: torch.Tensor):
        """Keep these batch rows, in this order (a beam search follows some beams and drops others)."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; H query heads share num_key_value_heads keys and values."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.head_dim, self.clip_qkv = c.head_dim, c.clip_qkv
        self.shared = c.num_attention_heads != c.num_key_value_heads  # not in forward, for torch.compile
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        normed = c.model_type == "olmoe"
        self.q_norm = RMSNorm(q_size, c.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(kv_size, c.rms_norm_eps) if normed else nn.Identity()

    def forward(self, x, rotary: Rotary, visible=None, cache: KVCache | None = None, layer: int = 0):
        """x (B, T, D) -> (B, T, D). visible: bool (B or 1, 1, T, S), None for plain causal attention."""
        B, T, _ = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C)
        q, k = rotary.turn(q), rotary.turn(k)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=self.shared)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config)

    def forward(self, x, rotary, visible=None, cache=None, layer=0) -> tuple[torch.Tensor, Routing]:
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible, cache, layer)
        y, routing = self.moe(self.post_attention_layernorm(x))
        return x + y, routing


class CrossEntropy(torch.autograd.Function):
    """x (n, D), weight (V, D), labels (n,) -> sum over the n rows of -log softmax(x weight^T)[label], float32.

    n rows of V logits would dwarf all other activations (196 KiB a token for OLMoE). So the gradient is made in the
    forward, CHUNK rows at a time, and the logits are dropped: what is kept is one gradient of x's own size.
    """

    CHUNK = 1024  # rows: V = 50304 then takes 0.3 GB in passing, and the products are large enough to be fast

    @staticmethod
    def forward(ctx, x, weight, labels):
        x_trains, weight_trains, _ = ctx.needs_input_grad
        precise = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=x.device)
        grad_x = torch.empty_like(x) if x_trains else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if weight_trains else None
        for start in range(0, len(x), CrossEntropy.CHUNK):
            part = slice(start, start + CrossEntropy.CHUNK)
            logits, label = F.linear(x[part], weight), labels[part, None]  # (chunk, V), (chunk, 1)
            log_probs = logits.log_softmax(-1, dtype=precise)
            right = log_probs.gather(1, label)
            loss -= right.sum()
            if x_trains or weight_trains:  # d loss / d logits = softmax - 1 at the label, written over the logits
                torch.exp(log_probs, out=logits).scatter_(1, label, right.expm1().to(logits.dtype))
            if x_trains:
                grad_x[part] = logits @ weight
            if weight_trains:
                grad_weight += logits.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        grad_x = None if grad_x is None else (grad_x * grad).to(grad_x.dtype)
        return grad_x, None if grad_weight is None else (grad_weight * grad).to(ctx.dtype), None


class Head(nn.Linear):
    """x (..., D) -> logits (..., V). With labels (n,) for x (n, D): the sum of their cross-entropies, no logits."""

    def forward(self, x, labels=None):
        if labels is None:
            return super().forward(x)
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()  # no gradient nobody will ask for
        return CrossEntropy.apply(x, weight, labels)


def labelled(labels: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """labels (B, T), -100 where there is none -> (n,) positions in the N = B*T tokens that predict one, (n,) the ids.

    How many there are decides shapes: on a GPU that question waits, once a call, for the work queued before it.
    Labels that stay on the CPU are searched there, and the result is sent without waiting.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # position t predicts token t + 1
    position = (following != -100).nonzero()[:, 0]
    found = position, following[position]
    sent = device.type == "cuda" and labels.device.type == "cpu"
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in found) if sent else found


class Output(NamedTuple):
    logits: torch.Tensor | None  # (B, T, V); None where labels were given: then they are never held all together
    routings: list[Routing]  # one a layer
    loss: torch.Tensor | None = None  # cross-entropy, float32: summed over the labels, over loss_divisor


class MoETransformer(nn.Module):
    """checkpoint_activations: keep only the inputs of the blocks, and run each again in the backward pass: less
    memory, a third more time, the same numbers bit for bit (dropout included)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    def init_weights(self):
        """Random weights, as a model starts its pre-training (from_pretrained builds on "meta", where this is free)."""
        for name, p in self.named_parameters():
            if not p.is_meta:  # there is nothing to fill, and torch would import 800 modules to do it
                nn.init.ones_(p) if "norm" in name else nn.init.normal_(p, std=self.config.initializer_range)

    def forward(self, input_ids, attention_mask=None, labels=None, cache: KVCache | None = None, last_only=False,
                loss_divisor=None):  # fmt: skip
        """input_ids (B, T) int64 -> Output.

        attention_mask (B, S): 1 for tokens, 0 for padding on either side (S = T plus what the cache holds).
        labels (B, T): input_ids where the model is to be trained, -100 elsewhere; the shift by one happens here.
        loss_divisor: what the sum over the labels is divided by; None: their number. A part of a step's rows (a
        micro-batch, or one GPU's rows) takes the number of labels of all: then the losses of the parts add up.
        last_only: logits of the last position alone, (B, 1, V), which is what generation needs.
        ValueError if an id is outside the vocabulary or the sequence is longer than max_position_embeddings.
        """
        start, T = (cache.used if cache else 0), input_ids.shape[1]
        self.check_input(input_ids, start + T)
        targets = None if labels is None else labelled(labels, input_ids.device)
        x = self.embed_tokens(input_ids)  # (B, T, D)
        positions = torch.arange(start, start + T, device=x.device)
        rotary = Rotary.at(positions, self.config, x.dtype)
        visible = (
            visible_keys(start, start + T, attention_mask, x.device) if cache or attention_mask is not None else None
        )
        routings, again = [], self.checkpoint_activations and torch.is_grad_enabled()
        for i, block in enumerate(self.layers):
            part = partial(checkpoint, block, use_reentrant=False) if again else block
            x, routing = part(x, rotary, visible, cache, i)
            routings.append(routing)
        if cache:
            cache.used += T
        x = self.norm(x)
        if labels is None:
            return Output(self.lm_head(x[:, -1:] if last_only else x), routings)
        position, ids = targets
        loss = self.lm_head(x.flatten(0, 1).index_select(0, position), ids)
        return Output(None, routings, loss / (len(ids) if loss_divisor is None else loss_divisor))

    def check_input(self, input_ids, length):
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's {limit} positions; shorten it")
        if not input_ids.is_cpu or not input_ids.numel():
            return  # on a GPU the look would stall it; the scripts check on the CPU
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the model's vocabulary 0..{vocab - 1}; wrong tokenizer?")

    # Files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", attach=None, tensors=None):
        """Load a Hugging Face folder -> MoETransformer in eval mode. Each tensor goes from the mapped file to its
        place: memory holds the model once; of several processes, each holds its share (data/shard.py).

        attach(model): edits the model before it has memory (apply_perft, apply_esft); it is in its dtype by then.
        tensors(model, fused): where the folder's tensors go, if attach moved them (hub_tensors).
        FileNotFoundError or ValueError, in one line, for a folder that cannot be used.
        """
        config = Config.from_folder(folder)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        model = model.to(dtype)
        if attach:
            attach(model)
        shard(model, str(device))
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight  # that gave each its own memory
        fused = any(name.endswith(".experts.gate_up_proj") for name in tensor_names(folder))
        load_checkpoint(folder, (tensors or hub_tensors)(model, fused))
        return model.eval()

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors with the hub's per-expert names (dtype None: as in memory).

        ValueError if something was attached to the model: its parts have no name in such a folder.
        """
        plain = {MoE: "moe", Experts: "moe.experts", nn.Linear: "self_attn.q_proj"}
        if any(type(block.get_submodule(name)) is not kind for block in self.layers for kind, name in plain.items()):
            raise ValueError("the model carries adapters or chosen experts: use perft.save_adapter or esft.export")
        config = self.config.to_dict() | {"torch_dtype": str(dtype or self.norm.weight.dtype).removeprefix("torch.")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_safetensors(Path(folder) / "model.safetensors", hub_tensors(self), dtype)
        write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")

    def generate(self, prompts, max_new_tokens: int, temperature=0.0, top_p=1.0, num_beams=1, seed=None):
        """Continue each prompt: see `sample` and `beam_search`, which this picks from. -> list of lists of new ids.

        prompts: a list of id lists of any lengths, or an int64 tensor (B, T). The new ids end before the first
        eos_token_id. temperature 0 is greedy; top_p < 1 draws from the fewest tokens whose probability reaches it.
        """
        prompts = prompts.tolist() if torch.is_tensor(prompts) else [list(p) for p in prompts]
        if not prompts or not all(prompts):
            raise ValueError("generate needs at least one prompt, and at least one token in each")
        if num_beams < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"num_beams {num_beams} must be at least 1, temperature {temperature} at least 0, "
                             f"top_p {top_p} above 0 and at most 1")
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        if num_beams > 1 and temperature > 0:
            raise ValueError(f"num_beams {num_beams}, temperature {temperature}: beam search does not draw; choose one")
        from data.decode import beam_search, sample  # here, since that file reads this one

        training = self.training
        self.eval()  # no dropout while it speaks
        if num_beams > 1:
            new = beam_search(self, prompts, max_new_tokens, num_beams)
        else:
            new = sample(self, prompts, max_new_tokens, temperature, top_p, seed)
        self.train(training)
        return new


def visible_keys(start: int, end: int, attention_mask, device) -> torch.Tensor:
    """Which of keys 0..end may queries start..end see? Those not after them, no padding. bool (B or 1, 1, T, S)."""
    keys, queries = torch.arange(end, device=device), torch.arange(start, end, device=device)
    causal = keys[None, :] <= queries[:, None]  # (T, S)
    if attention_mask is None:
        return causal[None, None]
    itself = keys[None, :] == queries[:, None]  # padding sees itself: the softmax over nothing would be NaN
    return causal & (attention_mask.bool()[:, None, None, :] | itself)


def hub_tensors(model: MoETransformer, fused: bool = False) -> dict[str, torch.Tensor]:
    """Tensor name in a Hugging Face checkpoint -> the part of our parameter it is (a view: copy into it, or save it).

    fused: the experts of a layer as two stacked tensors, as transformers 5 holds them in memory and may save them;
    otherwise one tensor for each matrix of each expert, as published checkpoints have it (Mixtral calls gate, up, down
    w1, w3, w2).
    """
    c, tensors = model.config, {}
    mixtral = c.model_type == "mixtral" and not fused
    moe = "block_sparse_moe" if mixtral else "mlp"
    gate_name, up_name, down_name = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, p in model.named_parameters():  # a tied lm_head is not named twice
        if ".adapters." in name or name.endswith((".A", ".B")):
            continue  # stands beside the checkpoint's own parameters, which then are a `base`
        name = name.replace(".base.", ".")
        name = name if name.startswith("lm_head") else f"model.{name}"
        name = name.replace("moe.router", f"{moe}.gate").replace("moe.experts", f"{moe}.experts")
        if fused or ".experts." not in name:
            tensors[name] = p.data
            continue
        experts, which = name.rsplit(".", 1)
        for e, matrix in enumerate(matrices(p.data)):
            if which == "gate_up_proj":
                gate, up = matrix.chunk(2)  # gate rows first
                tensors[f"{experts}.{e}.{gate_name}.weight"], tensors[f"{experts}.{e}.{up_name}.weight"] = gate, up
            else:
                tensors[f"{experts}.{e}.{down_name}.weight"] = matrix
    return tensors


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data" / "tiny_olmoe"
    try:
        config = Config.from_folder(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    with torch.device("meta"):
        model = MoETransformer(config)
    print(json.dumps(config.to_dict(), indent=2))
    total = sum(p.numel() for p in model.parameters())
    print(f"{len(hub_tensors(model))} tensors, {total:,} parameters, {active_parameters(model):,} active for a token")


def active_parameters(model: MoETransformer) -> int:
    """Base parameters that one token meets: K of the E experts of each layer, and all the rest."""
    c = model.config
    active = dataclasses.replace(c, num_experts=c.num_experts_per_tok)
    with torch.device("meta"):  # the same model with K experts and a router of E rows
        slim = sum(p.numel() for p in MoETransformer(active).parameters())
    return slim + c.num_hidden_layers * c.hidden_size * (c.num_experts - c.num_experts_per_tok)


if __name__ == "__main__":
    main()
