"""A decoder-only transformer with Mixture-of-Experts blocks: OLMoE, Mixtral and Qwen3-MoE, exactly.

    x = embed(token)
    x = x + attention(norm(x));  x = x + moe(norm(x))          num_hidden_layers times
    logits = lm_head(norm(x))

The three are one network with switches, which the checkpoint's own config.json sets (the first one
by its model_type):

                                              OLMoE               Mixtral    Qwen3-MoE
    norm of queries and keys                  over all heads      none       over each head
    q, k, v clipped (`clip_qkv`)              in some             no         no
    query heads per key/value head            1                   4          8
        (from `num_key_value_heads`)
    a head's channels (`head_dim`)            hidden_size/heads   the same   more
    a token's expert weights sum to 1         no                  yes        yes
        (`norm_topk_prob`)

Shapes: B batch, T time, N = B*T tokens, D hidden_size, F intermediate_size, E num_experts,
K experts per token, V vocab_size; S keys seen by the attention (T, or what the cache holds),
H heads, C channels of a head.

Padding may be on either side: rotary attention sees only distances, so shifting a whole row changes
nothing.

This file is the network. Reading and writing a Hugging Face folder is data/hub.py, generating text
is data/decode.py, several GPUs are data/shard.py; the model's last methods call these.

Left out: sliding-window attention, rope scaling, attention biases, layers without experts (such a
checkpoint is refused, not approximated).

    python model.py FOLDER        what is in a model folder: configuration, parameters, active ones
"""

from data import run  # first: from here on Ctrl-C is one line

# isort: split
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import decode, hub
from data import shard as processes  # of which one may be all: then it does nothing
from data.hub import EMBEDDED
from moe import MoE, Routing


@dataclass
class Config:
    """The keys of a checkpoint's config.json. ValueError for sizes that do not fit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert; Qwen3-MoE's files call it moe_intermediate_size
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int  # Mixtral's files call it num_local_experts
    num_experts_per_tok: int
    model_type: str = "olmoe"
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    norm_topk_prob: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    clip_qkv: float | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.01
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    extra: dict = field(default_factory=dict)  # keys this model does not read, kept for saving

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        check_config(self)  # at the end of this file

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Config":
        """Read folder/config.json. FileNotFoundError or ValueError of one line if it cannot be."""
        return hub.read_config(folder, cls)

    def to_dict(self) -> dict:
        """The content of a config.json in the hub's spelling, which any transformers reads."""
        return hub.config_keys(self)

    @property
    def eos_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


# The network -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 whatever the dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Rotary(NamedTuple):
    """Channel pair (i, i + C/2) of a query or key turns by position * theta^(-2i/C)."""

    cos: torch.Tensor  # (T, C)
    sin: torch.Tensor  # (T, C)

    @classmethod
    def at(cls, positions, config: Config, dtype):
        """positions (T,) -> the turns of these positions."""
        channel = torch.arange(0, config.head_dim, 2, device=positions.device).float()
        frequency = config.rope_theta ** (-channel / config.head_dim)  # (C/2,)
        angle = positions.float()[:, None] * frequency  # (T, C/2)
        angle = torch.cat((angle, angle), dim=-1)
        return cls(angle.cos().to(dtype), angle.sin().to(dtype))

    def turn(self, x):
        """x (B, H, T, C) -> the same, turned."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Attention(nn.Module):
    """Causal self-attention; H query heads share num_key_value_heads keys and values."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.clip_qkv = c.clip_qkv
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        # no key of config.json says which norms there are; Mixtral has none
        self.norm_all_heads = c.model_type == "olmoe"
        self.norm_each_head = c.model_type == "qwen3_moe"
        if self.norm_all_heads:
            self.q_norm = RMSNorm(q_size, c.rms_norm_eps)
            self.k_norm = RMSNorm(kv_size, c.rms_norm_eps)
        if self.norm_each_head:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rotary, visible=None, cache=None, layer=0):
        """x (B, T, D) -> (B, T, D).

        visible: bool (B or 1, 1, T, S), None for plain causal attention.
        cache: a decode.KVCache, where this layer's keys and values go, and are taken from.
        """
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, heads * C)
        if self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))

        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))  # (B, T, heads, C)
        if self.norm_each_head:
            q, k = self.q_norm(q), self.k_norm(k)

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C)
        q, k = rotary.turn(q), rotary.turn(k)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, heads, S, C)
        y = F.scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config)

    def forward(self, x, rotary, visible=None, cache=None, layer=0):
        """x (B, T, D) -> the same, and the Routing of its tokens."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible, cache, layer)
        y, routing = self.moe(self.post_attention_layernorm(x))
        return x + y, routing


def visible_keys(positions, end, attention_mask):
    """Which keys may each query see? Those up to its own position, but no padding.

    positions (T,) of the queries; keys stand at 0..end-1; attention_mask (B, end) or None
    -> bool (B or 1, 1, T, S). For three tokens, without padding and behind one token of padding:

               key 0 1 2        mask  0 1 1
        query 0    1 0 0              1 0 0     a token sees itself even in padding: a softmax over
        query 1    1 1 0              0 1 0     nothing would be NaN
        query 2    1 1 1              0 1 1
    """
    query = positions[:, None]  # (T, 1)
    key = torch.arange(end, device=positions.device)  # (S,)
    causal = key <= query  # (T, S)
    if attention_mask is None:
        return causal[None, None]
    is_text = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    return causal & (is_text | (key == query))


# The loss ----------------------------------------------------------------------------------------


def find_targets(labels, device):
    """What is predicted where: labels (B, T), -100 where there is none -> which of the N =
    B*T tokens predict one, and what they predict, (n,) each, on `device`.

        labels      [7, -100, 8, 9]
        predicting  [1, 2]              position t predicts the label at t + 1: nothing predicts
        predicted   [8, 9]              the first, and the last predicts nothing

    No other position is worth its logits. How many there are decides shapes, so a search on the GPU
    would make the CPU wait for it. Labels that stay on the CPU are searched there, and the result
    is sent without waiting.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # [-100, 8, 9, -100]
    predicting = (following != -100).nonzero()[:, 0]
    targets = predicting, following[predicting]
    if device.type == "cuda" and labels.is_cpu:
        return [t.pin_memory().to(device, non_blocking=True) for t in targets]
    return targets


def chunk_loss(x, weight, predicted):
    """x (n, D), weight (V, D), predicted (n,) -> the sum of -log softmax(x weight^T)[predicted],
    float32 (float64 of a model that is)."""
    logits = F.linear(x, weight.to(x.dtype))
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), predicted, reduction="sum")


CHUNK = 1024  # rows: with OLMoE's 50,304 logits each, 0.2 GB in passing


def summed_cross_entropy(x, weight, predicted):
    """chunk_loss of all rows, in memory for CHUNK.

    n rows of V logits would dwarf all other activations (196 KiB a token for OLMoE). So no more
    than CHUNK rows have theirs at a time: they are dropped once their loss is known, and the
    backward pass makes them again, which takes 2 to 4 % of a whole OLMoE-sized step.
    """
    if len(x) <= CHUNK:
        return chunk_loss(x, weight, predicted)
    if weight.requires_grad:  # then its gradient is summed over the chunks in float32
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = 0
    for rows, ids in zip(x.split(CHUNK), predicted.split(CHUNK)):
        total = total + checkpoint(
            chunk_loss, rows, weight, ids, use_reentrant=False, preserve_rng_state=False
        )
    return total


# The model ---------------------------------------------------------------------------------------


class Output(NamedTuple):
    logits: torch.Tensor | None  # (B, T, V); None with labels: then they are never all there
    routings: list[Routing]  # one a layer
    loss: torch.Tensor | None = None  # float32: the labels' cross-entropies, summed and divided


class MoETransformer(nn.Module):
    """Embedding, blocks, norm, and the head that gives logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # True: keep only the inputs of the blocks, and run each again in the backward pass: less
        # memory, a third more time, the same numbers bit for bit
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # from_pretrained, and who only counts parameters, builds on the meta device, without
        # memory: there is nothing to draw, and torch would take long to find out
        if not self.norm.weight.is_meta:
            self.init_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self):
        """Random weights, as a model starts its pre-training."""
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache=None,
        last_only=False,
        loss_divisor: float | None = None,
    ) -> Output:
        """input_ids (B, T) int64 -> Output.

        attention_mask (B, S): 1 for tokens, 0 for padding on either side (S = T plus what the
            cache holds).
        labels (B, T): input_ids where the model is to be trained, -100 elsewhere; the shift by one
            happens here.
        cache: a decode.KVCache of the tokens before these.
        last_only: logits of the last position alone, (B, 1, V), which is what generation needs.
        loss_divisor: what the sum over the labels is divided by; None: their number. A part of a
            step's rows (a micro-batch, or one GPU's rows) takes the number of labels of all: then
            the losses of the parts add up.
        ValueError if an id is outside the vocabulary or the sequence longer than the positions.
        """
        start = 0 if cache is None else cache.used
        end = start + input_ids.shape[1]
        self.check_input(input_ids, end)
        targets = None if labels is None else find_targets(labels, input_ids.device)

        x = self.embed_tokens(input_ids)  # (B, T, D)
        positions = torch.arange(start, end, device=x.device)
        rotary = Rotary.at(positions, self.config, x.dtype)
        visible = None
        if cache is not None or attention_mask is not None:
            visible = visible_keys(positions, end, attention_mask)
        routings = []
        for i, block in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, routing = block(x, rotary, visible, cache, i)
            routings.append(routing)
        if cache is not None:
            cache.used = end  # every layer has put its keys and values there: now they count
        x = self.norm(x)

        if targets is None:
            return Output(self.lm_head(x[:, -1:] if last_only else x), routings)
        predicting, predicted = targets
        rows = x.flatten(0, 1).index_select(0, predicting)  # (n, D)
        loss = summed_cross_entropy(rows, self.lm_head.weight, predicted)
        return Output(None, routings, loss / (len(rows) if loss_divisor is None else loss_divisor))

    def check_input(self, input_ids, length):
        positions, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if length > positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the model's {positions} positions; "
                "shorten it"
            )
        if not input_ids.is_cpu or input_ids.numel() == 0:
            return  # on a GPU the look would stall it
        for extreme in input_ids.aminmax():
            if not 0 <= extreme < vocab:
                raise ValueError(
                    f"token id {extreme} is outside the model's vocabulary 0..{vocab - 1}; "
                    "wrong tokenizer?"
                )

    # A model folder, and text: data/hub.py and data/decode.py ------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        edit: Callable | None = None,
    ) -> "MoETransformer":
        """Load a Hugging Face folder -> MoETransformer in eval mode.

        The one way into a model. Memory holds it once, and of several processes each holds its
        share, by this order:
            build   on the meta device: shapes, without memory
            edit    edit(model) attaches what trains (apply_perft, apply_esft): new parameters,
                    which are drawn at once, in memory, on the CPU
            cut     each of several processes keeps its share of every parameter (data/shard.py)
            memory  for the parameters that have none yet; the new ones move to the device
            fill    each tensor of the files goes to its hub.Place: a parameter, a matrix of a
                    stack, or half of one

        FileNotFoundError or ValueError, in one line, for a folder that cannot be used.
        """
        config = Config.from_folder(folder)
        weights = hub.Tensors(folder)
        weights.check_sizes(config)  # a config.json may lie: a model of too many layers takes long
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype)
        weights.check(hub.places(model, weights.fused))  # names and shapes, before memory is taken
        if edit is not None:
            edit(model)
        processes.cut(model, str(device))
        model.allocate(device)
        weights.fill(hub.places(model, weights.fused))  # again: edit may have moved some
        return model.eval()

    def allocate(self, device):
        """Memory for what is on the meta device; the rest moves to `device`."""

        def materialise(t):
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        self._apply(materialise)
        self.tie_weights()  # that gave each of two tied weights its own memory

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors, in `dtype` (None: as it is in memory).

        ValueError if a parameter was attached to the model: it has no name in such a folder.
        """
        placed = {place.parameter for place in hub.places(self).values()}
        if placed != set(self.parameters()):
            raise ValueError(
                "the model carries adapters or chosen experts: use perft.save_adapter or "
                "esft.export"
            )
        hub.write_model(folder, self, dtype or self.norm.weight.dtype)

    def generate(
        self,
        prompts,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continue each prompt -> the new ids of each, which end before the first eos_token_id.

        prompts: a list of id lists of any lengths, or an int64 tensor (B, T).
        temperature: 0 is greedy. top_p < 1: draw from the fewest tokens that hold this mass.
        num_beams > 1: beam search, by transformers' rules (decode.beam_search).
        """
        if torch.is_tensor(prompts):
            prompts = prompts.tolist()
        if not prompts or not all(prompts):
            raise ValueError("generate needs at least one prompt, and at least one token in each")
        if temperature > 0 and num_beams > 1:
            raise ValueError(
                f"temperature is {temperature}; {num_beams} beams draw nothing, drop one"
            )
        if num_beams < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"num_beams {num_beams} must be at least 1, top_p {top_p} above 0 and at most 1, "
                f"temperature {temperature} at least 0"
            )
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        was_training = self.training
        self.eval()  # no dropout while it speaks
        try:
            if num_beams > 1:
                return decode.beam_search(self, prompts, max_new_tokens, num_beams)
            return decode.sample(self, prompts, max_new_tokens, temperature, top_p, seed)
        finally:
            self.train(was_training)


def parameter_count(config: Config) -> int:
    """How many parameters a model has, whatever was attached to one."""
    with torch.device("meta"):
        return sum(p.numel() for p in MoETransformer(config).parameters())


def active_parameters(config: Config) -> int:
    """Parameters that one token meets: K of the E experts of each layer, and all the rest."""
    c = config
    idle = c.num_experts - c.num_experts_per_tok
    expert = 3 * c.hidden_size * c.intermediate_size
    return parameter_count(c) - c.num_hidden_layers * idle * expert


def check_config(config):
    """ValueError for a Config whose sizes do not fit."""
    c = config
    if c.num_attention_heads % c.num_key_value_heads != 0:
        raise ValueError(
            f"{c.num_attention_heads} attention heads do not share "
            f"{c.num_key_value_heads} key/value heads evenly"
        )
    widest = max(
        c.vocab_size, c.num_attention_heads * c.head_dim, c.num_experts * c.intermediate_size
    )
    if c.hidden_size * widest >= 2**59:  # more bytes than an int64 counts
        raise ValueError(f"{c.hidden_size} x {widest} weights are too many")
    if c.head_dim == 0 or c.head_dim % 2 != 0:
        raise ValueError(
            f"head_dim {c.head_dim} is odd or 0; rotary positions turn pairs of channels"
        )
    if c.num_experts_per_tok > c.num_experts:
        raise ValueError(
            f"num_experts_per_tok {c.num_experts_per_tok} is more than num_experts {c.num_experts}"
        )
    if c.rope_theta <= 0:
        raise ValueError(f"rope_theta {c.rope_theta} is not positive")


@run.command
def main(argv=None):
    parser = run.Parser(description="What is in a model folder.")
    parser.add_argument("folder", nargs="?", default=EMBEDDED, help="(data/tiny_olmoe)")
    config = Config.from_folder(parser.parse_args(argv).folder)
    print(json.dumps(config.to_dict(), indent=2))
    total, active = parameter_count(config), active_parameters(config)
    print(f"{total:,} parameters, {active:,} active for a token")


if __name__ == "__main__":
    main()
