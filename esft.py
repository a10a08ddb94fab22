"""ESFT: train only the experts that a task uses, in full rank, and freeze everything else (arXiv 2407.01906).

The base model reads a sample of the task before training (131,072 tokens in the paper, some 8,200 for the released
lists), and each expert e of each layer gets a score:

    token_e      = (tokens whose top K contains e) / (K * tokens)                  sums to 1 over e
    gate_e       = (sum of s_e over the tokens whose top K contains e) / tokens    sums to the mean mass of a top K
    gate_share_e = gate_e / (sum of gate over all e)                               sums to 1 over e

s = softmax(x W_r^T) over all E experts, in float32 (moe.py), never renormalised over the top K, whatever the model does
with it afterwards. Tokens are pooled over the sample, prompt and answer alike; padding never counts.

    chosen = the smallest prefix, in descending order of score, whose sum reaches p                    (per layer)

Scores are rounded to 4 decimals before they are sorted, and equal ones keep the lower id first: this gives the lists
that the authors released, ids and order. The paper's p is 0.2 for token and 0.1 for gate. How much mass a top K holds
differs between models, so p means less or more with gate; gate_share at 0.25 is about the paper's amount on any model.

The forward pass stays as it is: a token may go to any expert. Gradients, float32 masters and optimizer state exist for
the gate, up and down matrices of the chosen experts only; the gradient of the input passes through all of them. How,
with stacked experts: a layer's stack is kept in another order, the chosen first (the "bank"), so that one grouped
product serves all experts and its weight gradient can stop after the leading n. Weight decay cannot reach the others.

Shapes: N tokens, D hidden_size, F intermediate_size, E num_experts, K experts per token, R = N*K rows, L layers,
n chosen experts of a layer.

Traps of the authors' training code, avoided here: bfloat16 weights at a learning rate of 1e-5, of which 85 to 90 %
never move (hence the masters); packing that keeps only the tails of samples, lets attention cross between them and
appends a row of padding whose loss is NaN; 500 steps of batch 32, which are 142 epochs of the smallest set; a script,
for some months, that normalised over the layers instead of the experts. Added to the paper: gate_share. Left out:
shared experts, which neither OLMoE nor Mixtral has.

    python esft.py        the lesson: which experts the skills of the embedded world use, and how little they share
    python esft.py export RUN_FOLDER NEW_FOLDER [BASE]      what train.py saved, in its base, as a Hugging Face folder
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import SafetensorsFile, read_json, read_safetensors, write_safetensors, write_text
from data.report import heat_map, what_trains
from data.shard import matrices
from model import Config, MoETransformer, hub_tensors
from moe import Experts, Routing, experts_grouped, experts_loop
from perft import fingerprint, need

CONFIG, WEIGHTS, PICTURES = "expert_cfg.json", "expert_weights.safetensors", ("scores.json", "scores.svg")


class Usage(NamedTuple):
    """How often and how strongly a sample used each expert. Shards of a sample add up, part by part."""

    counts: torch.Tensor  # (L, E) int64: tokens whose top K contains the expert
    gate_sums: torch.Tensor  # (L, E) float64: the sum of its softmax weights over them
    n_tokens: int


@torch.no_grad()
def collect(model: MoETransformer, batches: Iterable, skip_first=False, answers_only=False) -> Usage:
    """Count over batches of (input_ids, mask) or (input_ids, labels, mask), each (B, T); mask is 0 on padding.
    skip_first: without the first token of each row. answers_only: only the tokens that have a label."""
    L, E, device = model.config.num_hidden_layers, model.config.num_experts, model.norm.weight.device
    counts = torch.zeros(L, E, dtype=torch.int64, device=device)
    gate_sums, n_tokens, training = torch.zeros_like(counts, dtype=torch.float64), 0, model.training
    model.eval()
    for input_ids, *labels, mask in batches:
        counted = mask.bool()
        if skip_first:
            counted = counted & (counted.cumsum(1) > 1)
        if answers_only:
            need(labels, "answers_only needs batches of (input_ids, labels, mask)")
            counted = counted & (labels[0] != -100)
        output = model(input_ids, None if mask.all() else mask, last_only=True)
        for i, routing in enumerate(output.routings):
            ids = routing.selected_experts[counted.flatten()]  # (counted tokens, K)
            s = F.softmax(routing.router_logits[counted.flatten()], dim=-1, dtype=torch.float32)
            counts[i] += torch.bincount(ids.flatten(), minlength=E)
            gate_sums[i].scatter_add_(0, ids.flatten(), s.gather(1, ids).flatten().double())
        n_tokens += int(counted.sum())
    model.train(training)
    return Usage(counts.cpu(), gate_sums.cpu(), n_tokens)


def expert_scores(counts, gate_sums, n_tokens: int, top_k: int, kind="token") -> torch.Tensor:
    """Usage -> the scores of the opening page, (L, E) float64, not rounded."""
    need(kind in ("token", "gate", "gate_share"), f"kind is {kind!r}; choose from token, gate, gate_share")
    need(n_tokens > 0, "no token was counted: the sample is empty, or all of it was left out")
    if kind == "token":
        return torch.as_tensor(counts, dtype=torch.float64) / (top_k * n_tokens)
    gate = torch.as_tensor(gate_sums, dtype=torch.float64) / n_tokens
    return gate if kind == "gate" else gate / gate.sum(-1, keepdim=True)


# Selection -----------------------------------------------------------------------------------------------------------


def select_experts(scores: torch.Tensor, p: float, bind: int = 1) -> list[list[int]]:
    """The chosen experts of each layer, best first. bind: choose whole groups of so many, see `bind_groups`."""
    need(0 < p <= 1, f"p is {p}; it must be more than 0 and at most 1")
    chosen = [smallest_prefix(layer, p) for layer in rounded(bind_groups(scores, bind))]
    return [[group * bind + i for group in groups for i in range(bind)] for groups in chosen]


def rounded(scores) -> list[list[float]]:
    return [[round(score, 4) for score in layer] for layer in torch.as_tensor(scores).tolist()]


def smallest_prefix(scores: list[float], p: float) -> list[int]:
    taken, total = [], 0.0
    for e in sorted(range(len(scores)), key=lambda e: -scores[e]):  # stable: of equal scores the lower id comes first
        if total >= p:
            break
        taken.append(e)
        total = round(total + scores[e], 4)  # a sum of decimals, exactly: eight times 0.1 reaches 0.8
    return taken


def bind_groups(scores: torch.Tensor, G: int) -> torch.Tensor:
    """The control for the grain: expert e belongs to group e // G, a group's score is the sum of its members'.
    (L, E) -> (L, E/G). The order of ids means nothing, so the members of a group are alike by chance only."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    L, E = scores.shape
    need(G >= 1 and E % G == 0, f"{E} experts cannot be bound into groups of {G}")
    return scores.view(L, E // G, G).sum(-1)


def random_experts(chosen: list[list[int]], num_experts: int, seed: int) -> list[list[int]]:
    """The control for relevance: as many experts of each layer, drawn from all of them."""
    rng = random.Random(seed)
    return [rng.sample(range(num_experts), len(ids)) for ids in chosen]


def warnings_for(scores: torch.Tensor, p: float) -> list[str]:
    """What a user should know before training with this choice."""
    sums = [round(sum(layer), 4) for layer in rounded(scores)]
    short = ", ".join(f"layer {i} ({total})" for i, total in enumerate(sums) if total < p)
    return [f"all experts of a layer are chosen where its scores sum to less than p {p}: {short}"] if short else []


# Training the chosen -------------------------------------------------------------------------------------------------


class ChosenExperts(nn.Module):
    """A layer's experts, of which the chosen train. Until they do, the same function as moe.Experts, bit for bit."""

    groups = Experts.groups

    def __init__(self, experts: Experts, chosen: list[int]):
        super().__init__()
        gate_up, down, n = experts.gate_up_proj.data, experts.down_proj.data, len(chosen)
        order = torch.tensor(chosen + [e for e in range(len(down)) if e not in chosen], device="cpu")
        place = order.argsort() if down.is_meta else order.argsort().to(down.device)  # not meta: no file will tell it
        self.register_buffer("position", place, persistent=False)  # (E,) expert id -> its place in the bank
        order = order.to(down.device)
        self.gate_up_bank = nn.Parameter(gate_up[order], requires_grad=False)  # (E, 2F, D)
        self.down_bank = nn.Parameter(down[order], requires_grad=False)  # (E, D, F)
        precise = torch.promote_types(down.dtype, torch.float32)
        self.gate_up_proj = nn.Parameter(self.gate_up_bank.data[:n].to(precise, copy=True))  # (n, 2F, D)
        self.down_proj = nn.Parameter(self.down_bank.data[:n].to(precise, copy=True))  # (n, D, F)
        self.path = experts.path

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x (N, D), Routing -> y (N, D). The bank takes over the masters' values each time it is used, so no load, copy
        or move can leave it behind."""
        if not self.groups(x):
            by_id = (torch.cat((new.to(bank.dtype), bank[len(new) :]))[self.position] for bank, new in self.pairs())
            return experts_loop(x, routing, *by_id)
        placed = routing._replace(selected_experts=self.position[routing.selected_experts])
        masters = self.gate_up_proj, self.down_proj
        return experts_grouped(x, placed, self.gate_up_bank, self.down_bank, masters)

    def pairs(self):
        return (self.gate_up_bank, self.gate_up_proj), (self.down_bank, self.down_proj)

    def by_expert(self) -> list[list[torch.Tensor]]:
        """gate_up_proj and down_proj as lists of E matrices, each where it lies: nothing is copied."""
        stacks = [(matrices(bank.data), matrices(new.data)) for bank, new in self.pairs()]
        return [[new[i] if i < len(new) else bank[i] for i in self.position.tolist()] for bank, new in stacks]

    def _apply(self, fn, recurse=True):
        """Behind .to(), .cuda(), .bfloat16(): the bank obeys, the masters move but keep their precision."""
        before = [(p, p.data) for _, p in self.pairs()]
        super()._apply(fn, recurse)
        for p, master in before:
            p.data = p.data if p.dtype == master.dtype else master.to(p.device)
        return self


class EsftConfig(NamedTuple):
    """What trains: the content of expert_cfg.json."""

    experts: list[list[int]]  # of each layer, best first
    train_router: bool = False  # the routers too
    train_non_experts: bool = False  # everything but the other experts
    variant: str = "esft"

    def check(self, base: Config, source: str | Path = "the choice"):
        """ValueError, in one line, for experts that the model does not have."""
        L, E = base.num_hidden_layers, base.num_experts
        need(len(self.experts) == L, f"{source} names experts for {len(self.experts)} layers, the model has {L}")
        for i, ids in enumerate(self.experts):
            known = all(type(e) is int and 0 <= e < E for e in ids)
            need(ids and known, f"{source}: layer {i} chooses {ids}; choose from the model's experts, 0..{E - 1}")
            need(len(set(ids)) == len(ids), f"{source}: layer {i} chooses an expert twice: {ids}")


def apply_esft(model: MoETransformer, chosen: list[list[int]], train_router=False, train_non_experts=False):
    """Freeze `model`, let the chosen experts of each layer train, in place, and return it. ValueError if it cannot be.
    The two options are the paper's section 6.3: a little more on the task, less kept of everything else."""
    config, dtype = EsftConfig([list(ids) for ids in chosen], train_router, train_non_experts), model.norm.weight.dtype
    need(not hasattr(model, "adapter_config"), "the model already carries adapters; load the base again")
    fits = not train_non_experts or dtype == torch.float32
    need(fits, f"train_non_experts trains weights of the base, and {dtype} loses small steps; load it in float32")
    config.check(model.config)
    for block, ids in zip(model.layers, config.experts):
        block.moe.experts = ChosenExperts(block.moe.experts, ids)
    for name, p in model.named_parameters():
        router = train_router and ".router." in name
        p.data = p.data.float() if router else p.data  # a float32 master, as the experts have
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # the masters train
            p.requires_grad_(router or (train_non_experts and ".experts." not in name))
    model.adapter_config = config
    return model


def need_esft(model) -> EsftConfig:
    config = getattr(model, "adapter_config", None)
    need(isinstance(config, EsftConfig), "no experts of this model were chosen; call apply_esft or load first")
    return config


def report(model: MoETransformer, usage: Usage | None = None) -> str:
    """What trains: the chosen experts (with `usage`, how much of the sample they carry), parameters, memory."""
    config, rows = need_esft(model), what_trains(model)
    lines = ["layer experts" + "  choices  gate mass (of the layer's)" * bool(usage) + "  chosen, best first"]
    for i, ids in enumerate(config.experts):
        carried = ""
        if usage:
            choices, mass = (100 * usage.counts[i] / usage.counts[i].sum()), usage.gate_sums[i] / usage.n_tokens
            carried = f"{choices[ids].sum():7.1f} %  {mass[ids].sum():9.4f} ({mass.sum():.4f})         "
        lines.append(f"{i:5} {len(ids):7}{carried}  {' '.join(map(str, ids))}")
    lines += [f"{row.module:40} {row.count:4} tensors {row.parameters:14,} parameters" for row in rows]
    with torch.device("meta"):  # the base by itself: with masters beside it, its chosen experts would count twice
        total = sum(p.numel() for p in MoETransformer(model.config).parameters())
    trained, experts = sum(row.parameters for row in rows), len(config.experts) * model.config.num_experts
    lines.append(f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %), "
                 f"{sum(map(len, config.experts))} of {experts} experts")  # fmt: skip
    mine, full = (f"{4 * n / 1e6:,.1f} MB of gradients, {8 * n / 1e6:,.1f} of AdamW" for n in (trained, total))
    return "\n".join([*lines, f"memory: {mine}, {4 * trained / 1e6:,.1f} of masters; full fine-tuning: {full}"])


# Files ---------------------------------------------------------------------------------------------------------------


def save_choice(model: MoETransformer, folder: str | Path):
    """Write expert_cfg.json: the layout of the released files, and two keys which they do not have."""
    config = need_esft(model)
    content = {"experts": {str(i): ids for i, ids in enumerate(config.experts)}, "shared_experts": False,
               "non_expert_modules": config.train_non_experts, "router": config.train_router,
               "base": fingerprint(model.config)}  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / CONFIG, json.dumps(content) + "\n")


def read_choice(path: str | Path, base: Config) -> EsftConfig:
    """An expert_cfg.json, released or ours -> what it lets train; ValueError if this base cannot do that."""
    content = read_json(path)
    experts, layers = content.get("experts"), [str(i) for i in range(base.num_hidden_layers)]
    lists = isinstance(experts, dict) and all(isinstance(ids, list) for ids in experts.values())
    need(lists, f'{path}: no "experts" with a list of ids for each layer')
    need(experts.keys() == set(layers), f"{path}: layers {', '.join(experts)}; the model has 0..{len(layers) - 1}")
    need(not content.get("shared_experts"), f"{path}: shared_experts is true, {base.model_type} models have none")
    also = content.get("router") is True, content.get("non_expert_modules") is True
    config = EsftConfig([experts[i] for i in layers], *also)
    config.check(base, path)
    return config


def current_tensors(model: MoETransformer, fused=False) -> dict[str, torch.Tensor]:
    """model.hub_tensors of a model with chosen experts: name in a Hugging Face folder -> the tensor, as it is now.
    ValueError for fused names: the experts of a layer do not lie together any more."""
    need(not fused, "this folder holds stacked experts; several processes need one tensor for each: save it again")

    def parameters():
        yield from ((name, p) for name, p in model.named_parameters() if ".experts." not in name)
        for i, block in enumerate(model.layers):
            for name, experts in zip(("gate_up_proj", "down_proj"), block.moe.experts.by_expert()):
                yield f"layers.{i}.moe.experts.{name}", SimpleNamespace(data=experts)  # a list, matrix by matrix

    return hub_tensors(SimpleNamespace(config=model.config, named_parameters=parameters))


def trained_of(tensors: dict[str, torch.Tensor], config: EsftConfig) -> dict[str, torch.Tensor]:
    """Of a Hugging Face folder's tensors, those that train."""

    def trains(name):
        if expert := re.search(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.", name):
            return int(expert[2]) in config.experts[int(expert[1])]
        return config.train_non_experts or (config.train_router and name.endswith(".gate.weight"))

    return {name: t for name, t in tensors.items() if trains(name)}


def save(model: MoETransformer, folder: str | Path):
    """Write expert_cfg.json and expert_weights.safetensors: what trains, as whole tensors (not differences) in the
    base's dtype under the checkpoint's names. Laid over the base's tensors, they make the fine-tuned checkpoint."""
    save_choice(model, folder)
    tensors = trained_of(current_tensors(model), model.adapter_config)
    write_safetensors(Path(folder) / WEIGHTS, tensors, model.norm.weight.dtype)


def load(model: MoETransformer, folder: str | Path) -> MoETransformer:
    """Attach what `save` wrote to its base, in place, and return the model in eval mode. ValueError, naming both sides,
    the model untouched, for another base or for tensors that are not those of the choice."""
    path, weights, here = Path(folder) / CONFIG, Path(folder) / WEIGHTS, fingerprint(model.config)
    need(not hasattr(model, "adapter_config"), "the model already carries adapters; load the base again")
    then = read_json(path).get("base")
    need(isinstance(then, dict), f"{path} does not say for which base its experts were trained; not written by save")
    wrong = [f"{k} {then.get(k)!r} against {v!r}" for k, v in here.items() if then.get(k) != v]
    need(not wrong, f"{path}: the experts were trained for another base; theirs against this: {', '.join(wrong)}")
    config = read_choice(path, model.config)
    chosen = {name: list(t.shape) for name, t in trained_of(hub_tensors(model), config).items()}
    found = {name: entry["shape"] for name, entry in SafetensorsFile(weights).entries.items()}
    for name in sorted(chosen.keys() | found.keys()):
        a, b = chosen.get(name, "does not train"), found.get(name, "is missing")
        need(a == b, f"{path} and {weights} disagree: {name} {a} in the first, {b} in the second")
    apply_esft(model, config.experts, config.train_router, config.train_non_experts)
    read_safetensors(weights, trained_of(current_tensors(model), config))
    return model.eval()


def export(model: MoETransformer, folder: str | Path, base: str | Path | None = None):
    """Write the fine-tuned model as a Hugging Face folder, new or empty, with the tokenizer files of the folder `base`.
    The model is not changed, and nothing of it is copied in memory."""
    need_esft(model)
    folder, dtype = Path(folder), model.norm.weight.dtype
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    need(not used, f"{folder} already exists and is not an empty folder; export writes a new one")
    beside = ("tokenizer", "special_tokens_map", "added_tokens", "generation_config", "chat_template")
    files = [file for file in Path(base).iterdir() if file.name.startswith(beside)] if base else []
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    write_safetensors(folder / "model.safetensors", current_tensors(model), dtype)
    config = model.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def export_run(run: str | Path, folder: str | Path, base: str | Path | None = None) -> str:
    """The command line's export -> what was done, in a line. base: the run's, or the embedded one, if not given."""
    from eval import DTYPES, TINY

    file = Path(run) / "config.json"  # absent where save was called by hand
    settings = read_json(file) if file.exists() else {}
    base, dtype = base or settings.get("base") or TINY, settings.get("dtype", "float32")
    need(dtype in DTYPES, f"{file}: dtype is {dtype!r}; this project knows {', '.join(DTYPES)}")
    model = load(MoETransformer.from_pretrained(base, DTYPES[dtype]), run)
    export(model, folder, base)
    E, chosen = model.config.num_experts, model.adapter_config.experts
    size = (Path(folder) / "model.safetensors").stat().st_size
    return f"wrote {folder}: {base} with {sum(map(len, chosen))} of {E * len(chosen)} experts replaced, {size:,} bytes"


def save_scores(model: MoETransformer, folder: str | Path, usage: Usage, scores: torch.Tensor, **how):
    """Write scores.json and scores.svg; `how` the choice was made: kind, p and so on."""
    chosen, mass = need_esft(model).experts, usage.gate_sums.sum(-1) / usage.n_tokens
    content = how | usage._asdict() | {"gate_mass": mass, "scores": scores, "chosen": chosen}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / "scores.json", json.dumps(content, default=torch.Tensor.tolist) + "\n")
    write_text(Path(folder) / "scores.svg", heat_map(scores, chosen, ", ".join(f"{k} {v}" for k, v in how.items())))


# The lesson ----------------------------------------------------------------------------------------------------------


def main():
    from data import skills
    from eval import TINY, encode_rows, load_base, pad_batch

    model, tokenizer = load_base(TINY)
    K, usages, choices = model.config.num_experts_per_tok, {}, {}
    print(f"The most used of {model.config.num_experts} experts that get half of a family's choices, {K} a token;")
    print("those before the bar get a fifth: ESFT-token (p 0.2) trains these")
    for name in skills.FAMILIES:
        examples = encode_rows(skills.sample(name, "train", 100), tokenizer)
        usages[name] = collect(model, [pad_batch(examples, tokenizer.pad_id, "cpu")])
        scores = expert_scores(*usages[name], K)
        choices[name], half = select_experts(scores, 0.2), select_experts(scores, 0.5)
        layers = [" ".join(map(str, [*ids, "|", *more[len(ids) :]])) for ids, more in zip(choices[name], half)]
        print(f"  {name:10}", *(f"{layer:34}" for layer in layers))

    print("\nOverlap: experts chosen for both, % of those chosen for either, mean of the layers")
    print(" " * 12 + " ".join(f"{name[:6]:>6}" for name in choices))
    for a in choices:
        shared = [[len({*x} & {*y}) / len({*x} | {*y}) for x, y in zip(choices[a], choices[b])] for b in choices]
        print(f"  {a:10}" + " ".join(f"{100 * sum(layers) / len(layers):6.0f}" for layers in shared))
    print("\nESFT for kinship\n" + report(apply_esft(model, choices["kinship"]), usages["kinship"]))


def command(argv: list[str]):
    if argv and (argv[0] != "export" or len(argv) not in (3, 4)):
        print("usage: python esft.py [export RUN_FOLDER NEW_FOLDER [BASE]]", file=sys.stderr)
        sys.exit(2)
    try:
        print(export_run(*argv[1:])) if argv else main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command(sys.argv[1:])
