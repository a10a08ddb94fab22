"""A checkpoint's config.json: what of it the model reads, what it must be, and how it is written again.

A key that would change the network in a way that model.py does not know (rope scaling, attention biases, a sliding
window) is refused, not ignored. Keys that change nothing here are kept, and saved as they were.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from data.checkpoint import read_json

SUPPORTED = {"olmoe": "OlmoeForCausalLM", "mixtral": "MixtralForCausalLM"}

# Type of a config key -> what its value must be, in words and as a test (`type(v) is`: Python counts true as an int).
RULES = {
    int: ("a positive integer", lambda v: type(v) is int and v > 0),
    float: ("a number >= 0", lambda v: type(v) in (int, float) and v >= 0),
    bool: ("true or false", lambda v: type(v) is bool),
    str: ("a text", lambda v: isinstance(v, str)),
}
TOKEN_IDS = ("a token id or a list of them", lambda v: all(type(i) is int for i in (v if isinstance(v, list) else [v])))


@dataclass
class Config:
    """The keys of a checkpoint's config.json. Both spellings are read: of 2024's hub files and of transformers 5."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
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

    @property
    def eos_ids(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Config":
        """Read folder/config.json. FileNotFoundError or ValueError, in one line, for what cannot be used."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give a folder with config.json and model.safetensors")
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, raw: dict, path: str | Path = "config.json") -> "Config":
        """The content of a config.json -> Config; `path` is named in errors."""

        def need(condition, message):
            if not condition:
                raise ValueError(f"{path}: {message}")

        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        raw = {k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype") and not (v is None and k in fields)}
        kind = raw.get("model_type")
        need(kind in list(SUPPORTED), f"model_type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
        rope = raw.pop("rope_parameters", None) or {}
        scaling = raw.pop("rope_scaling", None) or {}
        need(isinstance(rope, dict) and isinstance(scaling, dict), "rope_parameters or rope_scaling is no object")
        rope_type = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
        need(rope_type == "default", f"rope type {rope_type!r} is not supported; only 'default' is")
        raw.setdefault("rope_theta", rope.get("rope_theta", 1e6 if kind == "mixtral" else 1e4))
        if "num_local_experts" in raw:
            raw.setdefault("num_experts", raw.pop("num_local_experts"))
        if kind == "mixtral":
            raw["norm_topk_prob"] = True  # not a key of its config: always so
        need(raw.get("hidden_act", "silu") == "silu", f"hidden_act {raw.get('hidden_act')!r} is not supported")
        need(not raw.get("attention_bias"), "attention_bias is not supported")
        need(raw.get("sliding_window") is None, "sliding_window attention is not supported; only null is")

        for name, f in fields.items():
            if name in raw or f.default is dataclasses.MISSING:
                wanted, fits = TOKEN_IDS if name.endswith("_token_id") else RULES[(*get_args(f.type), f.type)[0]]
                need(fits(raw.get(name)), f"{name} is {raw.get(name)!r}; it must be {wanted}")
        known = {k: v for k, v in raw.items() if k in fields}
        config = cls(**known, extra={k: v for k, v in raw.items() if k not in fields})
        need(config.rope_theta > 0, f"rope_theta {config.rope_theta} is not positive")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        need(heads % kv_heads == 0, f"{heads} attention heads do not share {kv_heads} key/value heads evenly")
        need(config.head_dim > 0 and config.head_dim % 2 == 0,
             f"head_dim {config.head_dim} is odd or 0; rotary positions turn pairs of channels")  # fmt: skip
        k, e = config.num_experts_per_tok, config.num_experts
        need(k <= e, f"num_experts_per_tok {k} is more than num_experts {e}")
        return config

    def to_dict(self) -> dict:
        """The content of a config.json in the hub's spelling, which transformers of any age reads."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if self.model_type == "mixtral":
            keys["num_local_experts"] = keys.pop("num_experts")
            del keys["norm_topk_prob"]
        else:
            del keys["head_dim"]  # OLMoE has no such key: always hidden_size / heads
        return {"architectures": [SUPPORTED[self.model_type]], "hidden_act": "silu", **self.extra, **keys}
