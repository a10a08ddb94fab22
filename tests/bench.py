"""How long things take, ours and the peers side by side: interleaved rounds of one process, medians. Not a test.

    python tests/bench.py                                   every group: minutes each, the adapters ten or more
    python tests/bench.py block --json out.json             one group; the same numbers as JSON (--csv: as table rows)
    python tests/bench.py step --device cuda --size olmoe   all of OLMoE-1B-7B with random weights, on a GPU

block     one MoE layer, forward + backward, against transformers' with the same weights. `kept` is what forward keeps
          for backward: storages of saved tensors, each counted once, without parameters and buffers.
step      a training step (forward, backward, clip, AdamW) against transformers and transformers + peft: same weights
          and batch, adapters that begin at 0, so the first losses agree. --size olmoe: cases run in turn, a card
          holds one; `of floor`: against all matrix products at the speed of one large product, measured then.
scaling   growth with tokens, experts, rank and layers, not compiled.
adapters  what adapters add to forward + backward of the frozen base, in percent.
eval      prompts a second, against transformers' generate (CPU only).   esft   what ESFT costs (CPU only)

Every case has its own model (but adapters of the large layer read one base). One that cannot run, not installed, no
memory or not compilable, has a row that says why.

In group esft the reference is the same model (or layer) frozen, whose backward passes the gradient of its input on
and nothing else. What ESFT may cost, issue 4's bound:

    allowed = 1.15 * frozen + frozen * g / 2 * share
    share   = rows of the chosen experts / all rows, a row is a (token, slot) pair; mean of the layers
    g       = the experts' part of the FLOPs of all matrix products (a layer by itself: 1, its router is not counted)

since the products cost the frozen model 2 units, forward and input gradient, and the weight gradient of all experts
would be the experts' part of 1 unit more. Counted are products with weights; the attention of so few tokens is not.
The time does not contain the optimizer's step. Memory is that of the tensors after one step of AdamW; `full` is what
training every parameter of the model (or layer) would take, with float32 masters where the base is bfloat16.

A group is a function (args) -> (title, columns, rows); add it to GROUPS.
"""

import argparse
import copy
import csv
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data import skills  # noqa: E402
from data.benchmarks import answer_by_likelihood  # noqa: E402
from data.dataset import encode_prompt, pad_batch  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from esft import ChosenExperts, apply_esft, collect, expert_scores, select_experts  # noqa: E402
from eval import TINY, encode_rows, load_base  # noqa: E402
from model import Config, MoETransformer, hub_tensors  # noqa: E402
from moe import expert_load  # noqa: E402
from perft import OLMOE_1B_7B, PERFT, PerftConfig, apply_perft, attach  # noqa: E402
from train import make_optimizer  # noqa: E402

RANK = 16
OURS = (*PERFT, "lora_qv", "esft", "full")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEERS = {  # peft's targets, and the variant of ours to compare with
    "peft_qv": ({"target_modules": ["q_proj", "v_proj"]}, "perft_s"),
    "peft_experts": ({"target_modules": [], "target_parameters": EXPERTS}, "perft_e"),
    "transformers_full": (None, "full"),
}
# What is compiled if nobody says: on a CPU, where it takes longest, a few; peft_experts compiles anew in every step.
COMPILED = {"cpu": {"perft_s", "perft_e", "peft_qv"}, "cuda": {*OURS, *PEERS} - {"peft_experts"}}


def medians(runs: dict, rounds: int) -> dict[str, float]:
    """Seconds of each run, a function without arguments: all run once a round, in turns first; round 0 warms up."""
    seconds = {name: [] for name in runs}
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for i in range(rounds + 1):
        for name in list(runs) if i % 2 else reversed(runs):
            wait()
            start = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


class Case(NamedTuple):
    """Something to time, after(forward()). `after` returns what should be equal, or nearly, in ours and the peers."""

    module: torch.nn.Module
    forward: Callable[[], torch.Tensor]
    after: Callable[[torch.Tensor], torch.Tensor]

    def run(self) -> torch.Tensor:
        return self.after(self.forward())

    def kept_bytes(self) -> int:
        own = {t.untyped_storage().data_ptr() for t in (*self.module.parameters(), *self.module.buffers())}
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.forward()  # while it lives, no address is used twice
        del out
        return sum(size for address, size in sizes.items() if address not in own)


def measure(builders: dict[tuple, Callable], rounds: int, tokens: int) -> dict[tuple, dict]:
    """(who, mode) -> function that builds a Case, to (who, mode) -> a row: its time, or why there is none."""
    rows, cases, cuda = {}, {}, torch.cuda.is_initialized()
    gc.collect()
    torch._dynamo.reset()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def attempt(name, what):
        """Whatever a peer or a compiler raises, then or in a later round, becomes its row."""
        try:
            return None if "failed" in rows[name] else what()
        except Exception as error:
            rows[name]["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"

    for name, build in builders.items():
        rows[name] = {"case": ", ".join(map(str, name))}
        print(f"  {rows[name]['case']}", file=sys.stderr, flush=True)
        if case := attempt(name, build):
            cases[name], rows[name]["result"] = case, attempt(name, case.run)
            kept = attempt(name, case.kept_bytes)
            rows[name]["kept_kib_per_token"] = None if kept is None else kept / tokens / 1024
            experts = {getattr(m.config, "_experts_implementation", "") for m in case.module.modules()
                       if hasattr(m, "config")} - {"", *name}  # fmt: skip  # which one transformers chose
            rows[name]["case"] += "".join(f" ({chosen})" for chosen in experts)
    runs = {name: partial(attempt, name, case.run) for name, case in cases.items() if "failed" not in rows[name]}
    for name, seconds in medians(runs, rounds).items():
        if "failed" not in rows[name]:
            rows[name] |= {"ms": 1e3 * seconds, "tokens_per_second": tokens / seconds}
        if cuda and len(builders) == 1:
            rows[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def ratio(row: dict, *others: dict) -> float | None:
    times = [other["ms"] for other in others if "ms" in other]
    return row["ms"] / min(times) if "ms" in row and times else None


# What is built ------------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """The embedded model (config None), or random weights in this shape."""

    device: str
    config: Config | None = None
    dtype: torch.dtype = torch.float32

    def ours(self) -> MoETransformer:
        if self.config is None:
            return load_base(TINY, device=self.device)[0].train()
        with torch.device("meta"):
            model = MoETransformer(self.config)
        model = model.to(self.dtype).to_empty(device=self.device).train()
        fill(hub_tensors(model, fused=True))
        return model

    def theirs(self, mode: str):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        options = {"dtype": self.dtype} | ({"experts_implementation": "eager"} if mode == "eager" else {})
        auto = transformers.AutoModelForCausalLM
        if self.config is None:
            return auto.from_pretrained(TINY, **options).to(self.device).train()
        with torch.device(self.device):
            model = auto.from_config(transformers.AutoConfig.for_model(**self.config.to_dict()), **options).train()
        fill({name: p.data for name, p in model.named_parameters()})
        return model


def fill(tensors: dict[str, torch.Tensor]):
    """Random weights, the same in ours and in transformers' model, since the names are the same."""
    for i, name in enumerate(sorted(tensors)):
        torch.manual_seed(i)
        t = tensors[name]
        t.fill_(1) if "norm" in name else t.normal_(std=t.shape[-1] ** -0.5)


def compile_if(mode: str, modules):
    for module in modules if mode == "compiled" else ():
        module.compile(dynamic=True)


def block_case(args, way, trains=False, adapter=None, over=None, T=2048, D=256, F=128, E=32, K=4) -> Case:
    """One MoE layer in bfloat16. way: ("ours", loop, grouped or compiled), ("transformers", default, ...).
    adapter: a PerftConfig. over: put it over these frozen weights, which are only read."""
    (who, mode), sizes = way, {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    config = replace(OLMOE_1B_7B, **sizes, num_hidden_layers=1, vocab_size=8, head_dim=None)
    base = Base(args.device, config, torch.bfloat16)
    if over:
        module = copy.copy(over)  # a module of its own, which may be compiled, around the same parameters
    else:
        module = base.theirs(mode).model.layers[0].mlp if who == "transformers" else base.ours().layers[0].moe
    module.requires_grad_(trains)
    if mode == "loop":
        module.experts.path = mode
    torch.manual_seed(0)
    if adapter:
        module = attach(module, adapter, config, None).train()
    x, grad = (torch.randn(1, T, D, dtype=base.dtype, device=args.device) for _ in range(2))
    compile_if(mode, [module])

    def forward():
        for t in (x.requires_grad_(), *module.parameters()):
            t.grad = None
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def after(y):
        y.backward(grad)
        return torch.cat((y.detach(), x.grad))

    return Case(module, forward, after)


def step_batch(base: Base, tokens=0, T=0):
    """64 rows of kinship_new, or random ids that are all labels -> (B, T) ids and labels."""
    if base.config is None or base.dtype == torch.float32:
        tokenizer = load_base(TINY)[1]
        rows = encode_rows(skills.sample("kinship_new", "train", 64), tokenizer)
        return pad_batch(rows, tokenizer.pad_id, base.device)[:2]
    torch.manual_seed(0)
    return (torch.randint(base.config.vocab_size, (max(tokens // T, 1), T)).to(base.device),) * 2


def prepare(model: MoETransformer, variant: str, ids: torch.Tensor):
    """Let the variant train, in place."""
    if variant in ("full", "frozen"):  # full in bfloat16 too, which apply_perft refuses: here only time counts
        return model.requires_grad_(variant == "full")
    if variant == "esft":  # the experts with a fifth of the batch's choices
        scores = expert_scores(*collect(model, [(ids, torch.ones_like(ids))]), model.config.num_experts_per_tok)
        return apply_esft(model, select_experts(scores, 0.2))
    return apply_perft(model, variant, rank=RANK, init="lora", dropout=0.0)


def step_case(base: Base, batch, way, whole=True) -> Case:
    """way: (variant or peer, mode). whole False: no optimizer, and the gradient goes down to the embeddings."""
    (who, mode), (ids, labels), options = way, batch, {}
    torch.manual_seed(0)
    if who in PEERS:
        model, options, targets = base.theirs(mode), {"use_cache": False}, PEERS[who][0]
        if targets:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **targets))
        compile_if(mode, [m for m in model.modules() if type(m).__name__ == "OlmoeDecoderLayer"])
    else:
        model = prepare(base.ours(), who, ids)
        compile_if(mode, model.layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    if whole:
        optimizer = make_optimizer(model, SimpleNamespace(lr=1e-5, weight_decay=0.0, beta2=0.999))
    else:
        model.embed_tokens.register_forward_hook(lambda module, args, x: x.detach().requires_grad_())

    def after(loss):
        loss.backward()
        if whole:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.detach()

    return Case(model, lambda: model(input_ids=ids, labels=labels, **options).loss, after)


# Groups block, step, scaling, adapters ------------------------------------------------------------------------------


def bench_block(args):
    sizes = {"T": args.tokens or 4096, "D": 512, "F": 256, "E": 64, "K": 8}
    sizes |= {"D": 2048, "F": 1024} if args.size == "olmoe" else {}
    ours, table = [("ours", mode) for mode in ("loop", "grouped", "compiled")], []
    ways = ours + [("transformers", mode) for mode in ("default", "eager", "compiled")]
    for trains in (False, True):
        builders = {way: partial(block_case, args, way, trains, **sizes) for way in ways}
        rows = measure(builders, max(args.rounds // 2, 3), sizes["T"])
        right = rows[ours[0]].get("result")
        for row in rows.values():
            row |= {"case": f"{'trainable' if trains else 'frozen'}: {row['case']}",
                    "ratio": ratio(row, *(rows[way] for way in ours))}  # fmt: skip
            if row.get("result") is not None and right is not None:
                row["error"] = ((row["result"].float() - right.float()).norm() / right.float().norm()).item()
                if row["error"] > 0.02:  # bfloat16 has 3 digits, and a tie of two experts may fall either way
                    row["failed"] = "output and gradient of the input are not the loop's"
        table += rows.values()
    columns = {"case": "{case}", "ms": "{ms:.1f}", "to our best": "{ratio:.2f}",
               "kept KiB/token": "{kept_kib_per_token:.1f}", "against loop": "{error:.1%}"}  # fmt: skip
    shape = ", ".join(f"{key} {value}" for key, value in sizes.items())
    return f"MoE layer, forward + backward: {shape}, bfloat16", columns, table


def weights_met(c: Config, head: float = 1) -> tuple[float, float]:
    """Weights that multiply a token: of the experts, of the rest. head: the share of tokens that have labels."""
    experts = c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    others = c.num_hidden_layers * (attention + c.num_experts * c.hidden_size) + head * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * experts, others


def flops_per_token(c: Config, T: int, full: bool) -> float:
    """Of a step's products, adapters' not counted: forward, gradient of the input, with full also of weights."""
    pairs = c.num_hidden_layers * 2 * T * c.num_attention_heads * c.head_dim  # causal: T/2 keys, 2 products
    return 2 * sum(weights_met(c)) * (3 if full else 2) + 3.5 * pairs  # flash attention: 1 forward, 2.5 backward


def bench_step(args):
    large, speed, table = args.size == "olmoe", None, []
    base = Base(args.device, OLMOE_1B_7B, torch.bfloat16) if large else Base(args.device)
    ways = [(who, mode) for who in OURS for mode in ("eager", "compiled")]
    ways += [(who, mode) for who in PEERS for mode in ("default", "eager", "compiled")]
    ways = [(who, mode) for who, mode in ways if who in args.cases and (mode != "compiled" or who in args.compiled)]
    if large and args.device == "cuda":
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        speed = 2 * len(a) ** 3 / medians({"product": lambda: a @ a}, 20)["product"]
    for T in (512, 2048) if large else (0,):
        batch = step_batch(base, args.tokens or 16384, T)
        builders, tokens = {way: partial(step_case, base, batch, way) for way in ways}, batch[0].numel()
        parts = [{way: build} for way, build in builders.items()] if large else [builders]
        rows = {way: row for part in parts for way, row in measure(part, args.rounds, tokens).items()}
        for (who, _), row in rows.items():
            against = PEERS[who][1] if who in PEERS else "perft_s"
            row |= {"case": row["case"] + f", rows of {T}" * large, "against": against,
                    "ratio": ratio(row, *(rows[way] for way in ways if way[0] == against)),
                    "loss": row["result"].item() if row.get("result") is not None else None}  # fmt: skip
            if "ms" in row and speed:
                row["floor_tokens_per_second"] = speed / flops_per_token(base.config, T, "full" in who)
                row["floor_share"] = row["tokens_per_second"] / row["floor_tokens_per_second"]
        table += rows.values()
    columns = {"case": "{case}", "loss": "{loss:.4f}", "ms": "{ms:.1f}", "tokens/s": "{tokens_per_second:,.0f}",
               "kept KiB/token": "{kept_kib_per_token:.1f}", "peak GB": "{peak_gb:.1f}",
               "of floor": "{floor_share:.0%}", "ratio": "{ratio:.2f}", "to our best": "{against}"}  # fmt: skip
    what = "embedded model, float32, 64 rows of kinship_new with padding"
    what = "OLMoE-1B-7B, bfloat16, random weights (the same in all) and tokens" if large else what
    what += f"; one product {speed / 1e12:.0f} TFLOP/s" if speed else ""
    return f"{what}; {tokens:,} tokens, r {RANK}", columns, table


def bench_scaling(args):
    tiny, batch, table = Config.from_folder(TINY), step_batch(Base(args.device)), []
    layer, frozen = partial(block_case, args), ("ours", "grouped")
    pair = {"ours": frozen, "transformers": ("transformers", "default")}

    def adapter(who, r):
        return layer(frozen, adapter=None if who == "frozen" else PerftConfig(who, rank=r, dropout=0.0))

    def model(who, n):
        return step_case(Base(args.device, replace(tiny, num_hidden_layers=n)), batch, (who, "default"))

    sweeps = {  # what grows: sizes, who is compared (to the first of them), (who, size) -> Case
        "tokens": ((512, 2048, 8192), pair, lambda who, n: layer(pair[who], T=n)),
        "experts": ((8, 32, 128), pair, lambda who, n: layer(pair[who], E=n)),
        "rank": ((4, 16, 64), ("frozen", "perft_s", "perft_e"), adapter),
        "layers": ((1, 2, 4, 8), ("perft_s", "peft_qv"), model),
    }
    for name, (sizes, peers, build) in sweeps.items():
        builders = {(name, n, who): partial(build, who, n) for n in sizes for who in peers}
        rows = measure(builders, args.rounds, 1)
        for (_, n, who), row in rows.items():
            row["ratio"] = ratio(row, rows[name, n, [*peers][0]])
            row["growth"] = ratio(row, rows[name, sizes[0], who])
        table += rows.values()
    columns = {"case": "{case}", "ms": "{ms:.1f}", "to the first": "{ratio:.2f}", "growth": "{growth:.2f}"}
    return "Growth: a frozen layer (T 2048, D 256, F 128, E 32, K 4, bfloat16); steps of tiny models", columns, table


def bench_adapters(args):
    bounds, table = {"perft_s": 5, "perft_d": 5, "perft_r": 5, "perft_e": 12}, []  # % of the frozen base
    sizes, batch = {"T": 2048, "D": 2048, "F": 1024, "E": 64, "K": 8}, step_batch(Base(args.device))
    over = block_case(args, ("ours", "eager"), **sizes).module  # where copies of 0.8 GB lie changes the time by 10 %

    def layer(who, mode):
        adapter = None if who == "frozen" else PerftConfig(who, rank=RANK, dropout=0.0)
        return block_case(args, ("ours", mode), adapter=adapter, over=over, **sizes)

    def model(who, mode):
        return step_case(Base(args.device), batch, (who, mode), whole=False)

    ways = [(who, mode) for mode in ("eager", "compiled") for who in bounds]
    ways = [(who, mode) for who, mode in ways if mode == "eager" or who in args.compiled]
    parts = ("OLMoE layer, bfloat16", layer, args.rounds, 1), ("embedded model", model, 3 * args.rounds, 3)
    for case, build, rounds, builds in parts:
        for who, mode in ways:
            # in pairs: with more in a round, a machine drifts between two by as much as they differ; and built anew,
            # since where a small model's tensors happen to lie makes a few percent
            pair = {way: partial(build, *way) for way in (("frozen", mode), (who, mode))}
            runs = [measure(pair, rounds, 1).values() for _ in range(builds)]
            runs = sorted(((ratio(row, frozen), frozen, row) for frozen, row in runs), key=lambda run: run[0] or 0)
            times, frozen, row = runs[builds // 2]
            table.append(row | {"case": f"{case}: {row['case']}", "added_percent": times and 100 * (times - 1),
                                "bound_percent": bounds[who], "frozen_ms": frozen.get("ms")}
                             | ({"failed": frozen["failed"]} if "failed" in frozen else {}))  # fmt: skip
    columns = {"case": "{case}", "ms": "{ms:.1f}", "frozen ms": "{frozen_ms:.1f}",
               "added": "{added_percent:+.1f} %", "bound": "{bound_percent:d} %"}  # fmt: skip
    title = f"Adapters (r {RANK}; d: 4, r: 2 of 4) over the frozen base, forward + backward"
    return f"{title}: 2,048 tokens, 64 rows of kinship_new", columns, table


# Groups esft and eval -----------------------------------------------------------------------------------------------


def memory_of_training(module) -> dict[str, float]:
    """MB that exist because something trains, after one step. Masters: trained parameters that the forward copies."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    sizes = {"gradients": [p.grad for p in trained], "masters": trained, "optimizer": moments}
    return {name: sum(t.numel() * t.element_size() for t in tensors) / 1e6 for name, tensors in sizes.items()}


def esft_row(case: str, frozen, esft, forward, share: float, g: float, rounds: int) -> dict:
    """Time one case. forward(module) -> the scalar to run backward from."""
    base = next(frozen.parameters()).dtype
    numbers = sum(p.numel() for p in frozen.parameters()) / 1e6

    def step(module):
        for p in module.parameters():
            p.grad = None
        forward(module).backward()

    seconds = medians({"frozen": lambda: step(frozen), "esft": lambda: step(esft)}, rounds)
    ratio, allowed = seconds["esft"] / seconds["frozen"], 1.15 + g / 2 * share
    full = {"gradients": 4 * numbers, "masters": 4 * numbers * (base != torch.float32), "optimizer": 8 * numbers}
    return {"case": case, "frozen_ms": 1e3 * seconds["frozen"], "esft_ms": 1e3 * seconds["esft"], "ratio": ratio,
            "allowed": allowed, "within": ratio <= allowed, "row_share": share, "experts_part": g,
            "memory_mb": memory_of_training(esft), "memory_full_mb": full}  # fmt: skip


def tiny_model_row(rounds: int) -> dict:
    """The embedded model on 64 rows of kinship_new, experts chosen by ESFT-token on 500 rows."""
    frozen, tokenizer = load_base(TINY)
    c, examples = frozen.config, encode_rows(skills.sample("kinship_new", "train", 500), tokenizer)
    usage = collect(frozen, [pad_batch(examples, tokenizer.pad_id, "cpu")])
    chosen = select_experts(expert_scores(*usage, c.num_experts_per_tok), 0.2)
    ids, labels, _ = pad_batch(examples[:64], tokenizer.pad_id, "cpu")
    esft = apply_esft(copy.deepcopy(frozen), chosen)
    frozen.requires_grad_(False)
    for model in (frozen, esft):  # the gradient goes down to the embeddings in both
        model.embed_tokens.register_forward_hook(lambda module, args, x: x.detach().requires_grad_())

    with torch.no_grad():  # padding costs time as tokens do, so it is counted here
        loads = [expert_load(routing) for routing in frozen(ids).routings]
    share = sum(load[some].sum().item() for load, some in zip(loads, chosen)) / len(loads)
    experts, others = weights_met(c, (labels[:, 1:] != -100).sum().item() / ids.numel())
    g = experts / (experts + others)
    count = f"{sum(map(len, chosen))} of {c.num_hidden_layers * c.num_experts}"
    case = f"tiny_olmoe, {ids.numel()} tokens, {count} experts"
    return esft_row(case, frozen, esft, lambda model: model(ids, labels=labels).loss, share, g, rounds)


def olmoe_layer_rows(rounds: int) -> list[dict]:
    """One MoE layer of OLMoE's size, bfloat16, random weights; the 5 experts with the most of the tokens train."""
    config = replace(OLMOE_1B_7B, num_hidden_layers=1, vocab_size=8)
    frozen = Base("cpu", config, torch.bfloat16).ours().layers[0].moe.requires_grad_(False)
    esft, rows = copy.deepcopy(frozen), []
    for N in (512, 2048):
        x, grad = (torch.randn(1, N, 2048, dtype=torch.bfloat16) for _ in range(2))
        load = expert_load(frozen(x)[1])
        chosen = load.topk(5).indices
        esft.experts = ChosenExperts(frozen.experts, chosen.tolist())
        x.requires_grad_()
        case, share = f"OLMoE layer, bf16, {N} tokens, 5 of 64 experts", load[chosen].sum().item()
        rows.append(esft_row(case, frozen, esft, lambda m, x=x, grad=grad: (m(x)[0] * grad).sum(), share, 1, rounds))
    return rows


def bench_esft(args):
    rows = [tiny_model_row(4 * args.rounds), *olmoe_layer_rows(args.rounds)]
    columns = {"case": "{case}", "frozen ms": "{frozen_ms:.1f}", "ESFT ms": "{esft_ms:.1f}", "ratio": "{ratio:.3f}",
               "allowed": "{allowed:.3f}", "rows": "{row_share:.1%}"}  # fmt: skip
    for name in ("gradients", "masters", "optimizer"):
        columns[f"{name} MB (full)"] = f"{{memory_mb[{name}]:.1f}} ({{memory_full_mb[{name}]:.1f}})"
    return "ESFT against the frozen base, forward + backward", columns, rows


def bench_eval(args):
    """Prompts a second on the embedded model: the papers' prompt around the world's rows, 4 beams and 4 new tokens,
    as a batch of 32 (prompts of like length in both), against transformers' generate; and scoring 4 choices."""
    import transformers

    model, tokenizer = load_base(TINY)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    rows = skills.mixture(32, 0)
    words = "\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3/answer4"
    rows = [{"instruction": row.prompt + words, "input": "", "output": "", "answer": "answer1"} for row in rows]
    task = TASKS["ARC-Easy"]
    protocol = SimpleNamespace(template="papers", num_beams=4, max_new_tokens=4, choices="words")
    prompts = [encode_prompt(task.render_eval(row), tokenizer) for row in rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def reference(beams):
        new = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=beams, do_sample=False)
        return [tokenizer.decode(i for i in row if i != tokenizer.pad_id) for row in new[:, longest:].tolist()]

    def ours(beams):
        return [tokenizer.decode(new) for new in model.generate(prompts, 4, num_beams=beams)]

    assert ours(4) == reference(4) and ours(1) == reference(1), "the same answers, or the times compare nothing"
    peers = {"ours": ours, "theirs": reference}
    runs = {(beams, who): partial(run, beams) for beams in (4, 1) for who, run in peers.items()}
    runs["likelihood"] = partial(answer_by_likelihood, model, tokenizer, task, rows, protocol)
    speed = {name: len(rows) / seconds for name, seconds in medians(runs, args.rounds).items()}
    cases = {"generate, 4 beams": (4, 4), "generate, greedy": (1, 1), "likelihood, 4 choices": (None, 4)}
    table = []
    for case, (mine, peer) in cases.items():
        fast, slow = speed[(mine, "ours") if mine else "likelihood"], speed[peer, "theirs"]
        against = f"generate, {'4 beams' if peer == 4 else 'greedy'}"
        table.append({"case": case, "ours": fast, "peer": against, "theirs": slow, "ratio": fast / slow})
    columns = {"case": "{case}", "prompts/s": "{ours:.1f}", "transformers": "{peer}", "prompts/s ": "{theirs:.1f}",
               "ratio": "{ratio:.2f}"}  # fmt: skip
    return f"Evaluation: {len(rows)} prompts of {min(map(len, prompts))} to {longest} tokens at once", columns, table


GROUPS = {"block": bench_block, "step": bench_step, "scaling": bench_scaling, "adapters": bench_adapters,
          "esft": bench_esft, "eval": bench_eval}  # fmt: skip


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP", help=f"which (all): {', '.join(GROUPS)}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    add("--size", choices=("tiny", "olmoe"), default="tiny", help="of block and step (%(default)s)")
    add("--tokens", type=int, metavar="N", help="of block (4096), and of step with --size olmoe (16384)")
    cases = (*OURS, *PEERS)
    add("--cases", nargs="+", choices=cases, default=cases, metavar="NAME", help=f"of step (all): {', '.join(cases)}")
    add("--compiled", nargs="+", choices=cases, metavar="NAME",
        help="of step and adapters, compile these too (cpu: a few; cuda: all but peft_experts)")  # fmt: skip
    add("--rounds", type=int, default=11, help="of step; small cases take more, large ones fewer (%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of torch (%(default)s)")
    add("--json", metavar="PATH", help="write the numbers there too")
    add("--csv", metavar="PATH", help="append them there, a number a row, with machine, versions and command")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    on_cpu = {"esft", "eval"} if args.device == "cuda" else set()
    if on_cpu & set(args.groups):
        parser.error("groups esft and eval run on the CPU only")
    args.groups = args.groups or [name for name in GROUPS if name not in on_cpu]
    args.compiled = args.compiled or COMPILED[args.device]
    return args


def show(title: str, columns: dict[str, str], rows: list[dict]):
    def cell(form, row):
        try:
            return form.format(**row)
        except (KeyError, TypeError):  # this row has no such number
            return ""

    cells = [list(columns), *([cell(form, row) for form in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for (first, *rest), row in zip(cells, [{}, *rows]):
        line = "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:]))])
        print(line + (f"  failed: {row['failed']}" if "failed" in row else ""), flush=True)


def numbers(row: dict, prefix=""):
    """(metric, value) of what is a number in a row, and why there is none."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) or key == "failed":
            yield prefix + key, f"{value:.6g}" if isinstance(value, float) else value


def about(args) -> dict[str, str]:
    """What the numbers depend on: machine, versions, command."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    cpus = [line.split(": ")[-1] for line in cpuinfo.splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if args.device == "cuda" else (cpus or [platform.machine()])[0]
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {name: installed.get(name, "not installed") for name in ("transformers", "peft")}
    command = shlex.join(["python", "tests/bench.py", *sys.argv[1:]])
    return {"device": device, "threads": args.threads, "torch": torch.__version__, **versions, "command": command}


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    # Variants share the code of Block.forward, so it has many graphs; beyond the limit, fail, do not run it eagerly.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 24, True
    setting, content = about(args), {}
    print("\n".join(f"{key:12} {value}" for key, value in setting.items()))
    for name in args.groups:
        torch.manual_seed(0)
        print(name, file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            title, columns, rows = GROUPS[name](args)
        except ImportError as error:  # group eval without transformers
            title, columns, rows = "not run", {"case": "{case}"}, [{"case": name, "failed": str(error)}]
        content[name] = [{k: v for k, v in row.items() if not torch.is_tensor(v)} for row in rows]
        show(f"{name}: {title} ({time.perf_counter() - start:.0f} s)", columns, rows)
        if args.json:  # after each group: a run that is stopped leaves what it has
            text = json.dumps(setting | {"rounds": args.rounds} | content, indent=2)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.csv:
            with open(args.csv, "a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if not file.tell():
                    writer.writerow(["group", "case", "metric", "value", *setting])
                found = ((row["case"], *pair) for row in rows for pair in numbers(row))
                writer.writerows([name, *triple, *setting.values()] for triple in found)


if __name__ == "__main__":
    main()
