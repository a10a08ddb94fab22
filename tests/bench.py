"""How long things take, ours and the peers' side by side: rounds of one process, in which all that
is compared runs in turn, and medians of them. Not a test.

    python tests/bench.py                        every group: minutes each, adapters ten or more
    python tests/bench.py block --json out.json  one group; the same numbers as JSON
    python tests/bench.py block --csv out.csv    and as rows of a table
    python tests/bench.py step --device cuda --size olmoe
                                                 all of OLMoE-1B-7B with random weights, on a GPU
    python tests/bench.py full --size olmoe --threads 2 --work DIR
                                                 the same from a file of 13.8 GB, on a CPU

block     one MoE layer, forward + backward, against transformers' with the same weights. `kept` is
          what forward keeps for backward: storages of saved tensors, each counted once, without
          parameters and buffers.
step      a training step (forward, backward, clip, AdamW) against transformers and transformers +
          peft: same weights and batch, adapters that begin at 0, so the first losses agree.
          LoRA on experts also in one OLMoE-sized layer, 2,048 tokens.
          --size olmoe: cases run one after the other, a card holds one; `of floor`: against all
          matrix products at the speed of one large product, measured then.
scaling   growth with tokens, experts, rank and layers, not compiled.
adapters  what adapters add to forward + backward of the frozen base, in percent.
full      a model folder of random weights is written to --work, loaded, and makes a few steps:
          perft_r against transformers + peft (LoRA on q and v), in turn, each in a process of its
          own, twice (CPU only). --size olmoe: 14 GB of disk and 25 of memory, six minutes.
eval      prompts a second, against transformers' generate (CPU only).
esft      what ESFT costs (CPU only).

Every case has its own model (but adapters of the large layer read one base). One that cannot run,
not installed, no memory or not compilable, has a row that says why.

In group esft the reference is the same model (or layer) frozen, whose backward passes the gradient
of its input on and nothing else. What ESFT may cost:

    allowed = 1.15 * frozen + frozen * g / 2 * share
    share   = rows of the chosen experts / all rows, a row is a (token, slot) pair; mean of layers
    g       = the experts' part of the FLOPs of all matrix products (a layer by itself: 1, its
              router is not counted)

since the products cost the frozen model 2 units, forward and input gradient, and the weight
gradient of all experts would be the experts' part of 1 unit more. Counted are products with
weights; the attention of so few tokens is not. The time does not contain the optimizer's step.
Memory is that of the tensors after one step of AdamW; `full` is what training every parameter of
the model (or layer) would take, with float32 masters where the base is bfloat16.

A group is a function (args) -> Table; add it to GROUPS.
"""

import argparse
import copy
import csv
import gc
import json
import multiprocessing
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import esft  # noqa: E402
import eval  # noqa: E402
import perft  # noqa: E402
from data import hub, run, skills  # noqa: E402
from data.dataset import encode_prompt, encode_rows, pad_batch  # noqa: E402
from data.hub import make_config  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from model import EMBEDDED, Config, MoETransformer  # noqa: E402
from moe import expert_load  # noqa: E402
from perft import OLMOE_1B_7B, PERFT, PerftConfig  # noqa: E402
from train import make_optimizer  # noqa: E402

OLMOE = make_config(OLMOE_1B_7B, Config)
RANK = 16
OURS = (*PERFT, "lora_qv", "lora_experts", "esft", "full")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEERS = {  # peft's targets, and the variant of ours to compare with
    "peft_qv": ({"target_modules": ["q_proj", "v_proj"]}, "perft_s"),
    "peft_experts": ({"target_modules": [], "target_parameters": EXPERTS}, "lora_experts"),
    "transformers_full": (None, "full"),
}
# What is compiled if nobody says: on a CPU, where it takes longest, a few. peft_experts compiles
# anew in every step.
COMPILED = {
    "cpu": {"perft_s", "perft_e", "peft_qv", "lora_experts"},
    "cuda": {*OURS, *PEERS} - {"peft_experts"},
}


# Measuring ---------------------------------------------------------------------------------------


def medians(runs: dict, rounds: int) -> dict[str, float]:
    """Seconds of each run, a function without arguments. All run once a round, in turns first;
    round 0 warms up."""
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
    """Something to time: after(forward()). `after` returns what should be equal, or nearly, in ours
    and the peers."""

    module: torch.nn.Module
    tokens: int  # that a run takes
    forward: Callable[[], torch.Tensor]
    after: Callable[[torch.Tensor], torch.Tensor]

    def run(self) -> torch.Tensor:
        return self.after(self.forward())

    def kept_bytes(self) -> int:
        """What `forward` keeps for the backward pass, parameters and buffers aside."""
        own = (*self.module.parameters(), *self.module.buffers())
        addresses = {t.untyped_storage().data_ptr() for t in own}
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.forward()  # while it lives, no address is used twice
        del out
        return sum(size for address, size in sizes.items() if address not in addresses)


def measure(builders: dict[tuple, Callable], rounds: int) -> dict[tuple, dict]:
    """(who, mode) -> function that builds a Case, to (who, mode) -> a row: its time, or why there
    is none."""
    rows, cases, cuda = {}, {}, torch.cuda.is_initialized()
    gc.collect()
    torch._dynamo.reset()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def attempt(name, what):
        """Whatever a peer or a compiler raises, then or in a later round, becomes its row."""
        if "failed" in rows[name]:
            return None
        try:
            return what()
        except Exception as error:
            cause = " ".join(str(error).split())
            rows[name]["failed"] = f"{type(error).__name__}: {cause[:150]}"

    for name, build in builders.items():
        row = rows[name] = {"case": ", ".join(map(str, name))}
        print(f"  {row['case']}", file=sys.stderr, flush=True)
        case = attempt(name, build)
        if case is None:
            continue
        cases[name] = case
        row["result"] = attempt(name, case.run)
        kept = attempt(name, case.kept_bytes)
        row["kept_kib_per_token"] = None if kept is None else kept / case.tokens / 1024
        for chosen in experts_of(case.module) - {*name}:
            row["case"] += f" ({chosen})"
    runs = {}
    for name, case in cases.items():
        if "failed" not in rows[name]:
            runs[name] = partial(attempt, name, case.run)
    for name, seconds in medians(runs, rounds).items():
        row = rows[name]
        if "failed" not in row:
            row |= {"ms": 1e3 * seconds, "tokens_per_second": cases[name].tokens / seconds}
        if cuda and len(builders) == 1:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def experts_of(module: torch.nn.Module) -> set[str]:
    """Which way to run the experts transformers chose; of ours none."""
    configs = [m.config for m in module.modules() if hasattr(m, "config")]
    return {getattr(config, "_experts_implementation", "") for config in configs} - {""}


def ratio(row: dict, *others: dict) -> float | None:
    times = [other["ms"] for other in others if "ms" in other]
    return row["ms"] / min(times) if "ms" in row and times else None


class Table(NamedTuple):
    """What a group measured."""

    title: str
    columns: dict[str, str]  # heading -> format of a cell, with the names of a row's values
    rows: list[dict]


# What is built -----------------------------------------------------------------------------------


class Base(NamedTuple):
    """The embedded model (config None), or random weights in this shape."""

    device: str
    config: Config | None = None
    dtype: torch.dtype = torch.float32

    def ours(self) -> MoETransformer:
        if self.config is None:
            return MoETransformer.from_pretrained(EMBEDDED, device=self.device).train()
        with torch.device("meta"):
            model = MoETransformer(self.config)
        model = model.to(self.dtype).to_empty(device=self.device).train()
        tensors = {}
        for name, place in hub.places(model, fused=True).items():
            if isinstance(place, hub.Stack):  # all of its places lie in one parameter
                place = place.places[0]
            tensors[name] = place.parameter.data
        fill(tensors)
        return model

    def theirs(self, mode: str):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        auto, options = transformers.AutoModelForCausalLM, {"dtype": self.dtype}
        if mode == "eager":
            options["experts_implementation"] = "eager"
        if self.config is None:
            return auto.from_pretrained(EMBEDDED, **options).to(self.device).train()
        config = transformers.AutoConfig.for_model(**self.config.to_dict())
        with torch.device(self.device):
            model = auto.from_config(config, **options).train()
        fill({name: p.data for name, p in model.named_parameters()})
        return model


def fill(tensors: dict[str, torch.Tensor]):
    """Random weights, the same in ours and in transformers' model, since the names are the same."""
    for i, name in enumerate(sorted(tensors)):
        torch.manual_seed(i)
        t = tensors[name]
        if "norm" in name:
            t.fill_(1)
        else:
            t.normal_(std=t.shape[-1] ** -0.5)


def compile_if(mode: str, modules):
    for module in modules if mode == "compiled" else ():
        module.compile(dynamic=True)


LAYER = {"T": 2048, "D": 256, "F": 128, "E": 32, "K": 4}  # of group scaling


def layer_base(device: str, D: int, F: int, E: int, K: int) -> Base:
    """One layer of these sizes in bfloat16, in a model of next to nothing else."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    config = replace(OLMOE, **sizes, num_hidden_layers=1, vocab_size=8, head_dim=None)
    return Base(device, config, torch.bfloat16)


def block_case(args, way, trains=False, adapter=None, over=None, **sizes) -> Case:
    """One MoE layer. way: ("ours", loop, grouped or compiled), ("transformers", default, ...).

    adapter: a PerftConfig. over: put it over these frozen weights, which are only read.
    """
    who, mode = way
    sizes = LAYER | sizes
    T = sizes.pop("T")
    base = layer_base(args.device, **sizes)
    if over:
        module = copy.copy(over)  # a module of its own, which may be compiled; the same parameters
    elif who == "transformers":
        module = base.theirs(mode).model.layers[0].mlp
    else:
        module = base.ours().layers[0].moe
    module.requires_grad_(trains)
    if mode == "loop":
        module.experts.path = mode
    torch.manual_seed(0)
    if adapter:
        module = perft.PerftMoE(module, adapter, base.config, 0).train()
    x, grad = (torch.randn(1, T, sizes["D"], dtype=base.dtype, device=args.device) for _ in "xg")
    compile_if(mode, [module])

    def forward():
        for t in (x.requires_grad_(), *module.parameters()):
            t.grad = None
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def after(y):
        y.backward(grad)
        return torch.cat((y.detach(), x.grad))

    return Case(module, T, forward, after)


def step_batch(base: Base, tokens=0, T=0):
    """64 rows of kinship_new, or random ids that are all labels -> (B, T) ids and labels."""
    if base.config is None or base.dtype == torch.float32:
        tokenizer = eval.load_config(EMBEDDED)[1]
        rows = encode_rows(skills.sample("kinship_new", "train", 64), tokenizer)
        return pad_batch(rows, tokenizer.pad_id, base.device)[:2]
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (max(tokens // T, 1), T)).to(base.device)
    return ids, ids


def prepare(model: MoETransformer, variant: str, ids: torch.Tensor):
    """Let the variant train, in place."""
    if variant in ("full", "frozen"):
        # full in bfloat16 too, which apply_perft refuses: here only time counts
        return model.requires_grad_(variant == "full")
    if variant == "esft":  # the experts with a fifth of the batch's choices
        usage = esft.collect(model, [(ids, torch.ones_like(ids))])
        scores = esft.expert_scores(*usage, model.config.num_experts_per_tok)
        return esft.apply_esft(model, esft.select_experts(scores, 0.2))
    return perft.apply_perft(model, variant, rank=RANK, init="lora", dropout=0.0)


def step_case(base: Base, batch, way, whole=True) -> Case:
    """way: (variant or peer, mode). whole False: no optimizer, and the gradient goes down to the
    embeddings."""
    who, mode = way
    torch.manual_seed(0)
    if who in PEERS:
        model = with_peft(base.theirs(mode), PEERS[who][0])
        layers = [m for m in model.modules() if type(m).__name__ == "OlmoeDecoderLayer"]
        compile_if(mode, layers)
        return step_of(model, batch, whole, use_cache=False)
    model = prepare(base.ours(), who, batch[0])
    compile_if(mode, model.layers)
    return step_of(model, batch, whole)


def step_of(model, batch, whole=True, **options) -> Case:
    ids, labels = batch
    trained = [p for p in model.parameters() if p.requires_grad]
    if whole:
        settings = SimpleNamespace(lr=1e-5, weight_decay=0.0, beta2=0.999)
        optimizer = make_optimizer(model, settings)
    else:
        model.embed_tokens.register_forward_hook(start_gradient)

    def after(loss):
        loss.backward()
        if whole:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.detach()

    def forward():
        return model(input_ids=ids, labels=labels, **options).loss

    return Case(model, ids.numel(), forward, after)


def with_peft(model, targets: dict | None):
    if targets is None:
        return model
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **targets))


def start_gradient(module, inputs, x):
    """A hook of the embeddings: the gradient goes down to what they give."""
    return x.detach().requires_grad_()


# Groups block, step, scaling, adapters -----------------------------------------------------------


def bench_block(args) -> Table:
    sizes = {"T": args.tokens or 4096, "D": 512, "F": 256, "E": 64, "K": 8}
    if args.size == "olmoe":
        sizes |= {"D": 2048, "F": 1024}
    ours = [("ours", mode) for mode in ("loop", "grouped", "compiled")]
    ways = ours + [("transformers", mode) for mode in ("default", "eager", "compiled")]
    table = []
    for trains in (False, True):
        builders = {way: partial(block_case, args, way, trains, **sizes) for way in ways}
        rows = measure(builders, max(args.rounds // 2, 3))
        right = rows[ours[0]].get("result")
        for row in rows.values():
            row["case"] = f"{'trainable' if trains else 'frozen'}: {row['case']}"
            row["ratio"] = ratio(row, *(rows[way] for way in ours))
            if row.get("result") is not None and right is not None:
                off = (row["result"].float() - right.float()).norm() / right.float().norm()
                row["error"] = off.item()
                # bfloat16 has 3 digits, and a tie of two experts may fall either way
                if off > 0.02:
                    row["failed"] = "output and gradient of the input are not the loop's"
        table += rows.values()
    columns = {
        "case": "{case}",
        "ms": "{ms:.1f}",
        "to our best": "{ratio:.2f}",
        "kept KiB/token": "{kept_kib_per_token:.1f}",
        "against loop": "{error:.1%}",
    }
    shape = ", ".join(f"{key} {value}" for key, value in sizes.items())
    return Table(f"MoE layer, forward + backward: {shape}, bfloat16", columns, table)


def weights_met(c: Config, head: float = 1) -> tuple[float, float]:
    """Weights that multiply a token: of the experts, of the rest. head: the share of tokens that
    have labels."""
    experts = c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    heads = c.num_attention_heads + c.num_key_value_heads
    attention = 2 * c.hidden_size * c.head_dim * heads
    others = c.num_hidden_layers * (attention + c.num_experts * c.hidden_size)
    others += head * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * experts, others


def flops_per_token(c: Config, T: int, full: bool) -> float:
    """Of a step's products, adapters' not counted: forward, gradient of the input, with full also
    of weights."""
    # causal: T/2 keys, 2 products
    pairs = c.num_hidden_layers * 2 * T * c.num_attention_heads * c.head_dim
    # flash attention: 1 forward, 2.5 backward
    return 2 * sum(weights_met(c)) * (3 if full else 2) + 3.5 * pairs


def bench_step(args) -> Table:
    large = args.size == "olmoe"
    base = Base(args.device)
    if large:
        base = Base(args.device, OLMOE, torch.bfloat16)
    ways = [(who, mode) for who in OURS for mode in ("eager", "compiled")]
    ways += [(who, mode) for who in PEERS for mode in ("default", "eager", "compiled")]
    ways = [(who, mode) for who, mode in ways if who in args.cases]
    ways = [(who, mode) for who, mode in ways if mode != "compiled" or who in args.compiled]
    speed, table = None, []
    if large and args.device == "cuda":
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        speed = 2 * len(a) ** 3 / medians({"product": lambda: a @ a}, 20)["product"]
    for T in (512, 2048) if large else (0,):
        batch = step_batch(base, args.tokens or 16384, T)
        builders = {way: partial(step_case, base, batch, way) for way in ways}
        parts = [builders]
        if large:
            parts = [{way: build} for way, build in builders.items()]
        rows = {}
        for part in parts:
            rows |= measure(part, args.rounds)
        for (who, _), row in rows.items():
            row["against"] = PEERS[who][1] if who in PEERS else "perft_s"
            rivals = [rows[way] for way in ways if way[0] == row["against"]]
            row["ratio"] = ratio(row, *rivals)
            if row.get("result") is not None:
                row["loss"] = row["result"].item()
            if large:
                row["case"] += f", rows of {T}"
            if "ms" in row and speed:
                floor = speed / flops_per_token(base.config, T, "full" in who)
                row["floor_tokens_per_second"] = floor
                row["floor_share"] = row["tokens_per_second"] / floor
        table += rows.values()
    if not large:
        table += layer_rows(args)
    columns = {
        "case": "{case}",
        "loss": "{loss:.4f}",
        "ms": "{ms:.1f}",
        "tokens/s": "{tokens_per_second:,.0f}",
        "kept KiB/token": "{kept_kib_per_token:.1f}",
        "peak GB": "{peak_gb:.1f}",
        "of floor": "{floor_share:.0%}",
        "ratio": "{ratio:.2f}",
        "to our best": "{against}",
    }
    what = "embedded model, float32, 64 rows of kinship_new with padding"
    if large:
        what = "OLMoE-1B-7B, bfloat16, random weights (the same in all) and tokens"
    if speed:
        what += f"; one product {speed / 1e12:.0f} TFLOP/s"
    return Table(f"{what}; {batch[0].numel():,} tokens, r {RANK}", columns, table)


def layer_rows(args) -> list[dict]:
    """Steps of one OLMoE-sized layer in bfloat16, LoRA on its experts: in the embedded model they
    are so narrow that it shows little of what they cost."""
    base = layer_base(args.device, D=2048, F=1024, E=64, K=8)
    batch = step_batch(base, 2048, 512)
    ways = {"lora_experts": "eager", "peft_experts": "default"}
    builders = {}
    for way in ways.items():
        if way[0] in args.cases:
            builders[way] = partial(step_case, base, batch, way)
    rows = measure(builders, max(args.rounds // 3, 1))
    for row in rows.values():
        row["case"] = f"OLMoE layer: {row['case']}"
        row["ratio"] = ratio(row, *rows.values())
    return list(rows.values())


class Sweep(NamedTuple):
    sizes: tuple[int, ...]  # what grows
    peers: list[str]  # who is compared, to the first of them
    build: Callable[[str, int], Case]


def bench_scaling(args) -> Table:
    tiny, batch = Config.from_folder(EMBEDDED), step_batch(Base(args.device))
    ways = {"ours": ("ours", "grouped"), "transformers": ("transformers", "default")}

    def layer(size):
        return lambda who, n: block_case(args, ways[who], **{size: n})

    def adapter(who, r):
        config = None if who == "frozen" else PerftConfig(who, rank=r, dropout=0.0)
        return block_case(args, ways["ours"], adapter=config)

    def model(who, n):
        base = Base(args.device, replace(tiny, num_hidden_layers=n))
        return step_case(base, batch, (who, "default"))

    sweeps = {
        "tokens": Sweep((512, 2048, 8192), [*ways], layer("T")),
        "experts": Sweep((8, 32, 128), [*ways], layer("E")),
        "rank": Sweep((4, 16, 64), ["frozen", "perft_s", "perft_e"], adapter),
        "layers": Sweep((1, 2, 4, 8), ["perft_s", "peft_qv"], model),
    }
    table = []
    for name, sweep in sweeps.items():
        builders = {}
        for n in sweep.sizes:
            for who in sweep.peers:
                builders[name, n, who] = partial(sweep.build, who, n)
        rows = measure(builders, args.rounds)
        for (_, n, who), row in rows.items():
            row["ratio"] = ratio(row, rows[name, n, sweep.peers[0]])
            row["growth"] = ratio(row, rows[name, sweep.sizes[0], who])
        table += rows.values()
    columns = {
        "case": "{case}",
        "ms": "{ms:.1f}",
        "to the first": "{ratio:.2f}",
        "growth": "{growth:.2f}",
    }
    sizes = ", ".join(f"{key} {value}" for key, value in LAYER.items())
    return Table(
        f"Growth: a frozen layer ({sizes}, bfloat16); steps of tiny models", columns, table
    )


def bench_adapters(args) -> Table:
    bounds = {"perft_s": 5, "perft_d": 5, "perft_r": 5, "perft_e": 12}  # % of the frozen base
    sizes = {"T": 2048, "D": 2048, "F": 1024, "E": 64, "K": 8}
    batch = step_batch(Base(args.device))
    # one base for all: where copies of 0.8 GB lie changes the time by 10 %
    over = block_case(args, ("ours", "eager"), **sizes).module

    def layer(who, mode):
        adapter = None if who == "frozen" else PerftConfig(who, rank=RANK, dropout=0.0)
        return block_case(args, ("ours", mode), adapter=adapter, over=over, **sizes)

    def model(who, mode):
        return step_case(Base(args.device), batch, (who, mode), whole=False)

    ways = [(who, "eager") for who in bounds]
    ways += [(who, "compiled") for who in bounds if who in args.compiled]
    table = []
    parts = (("OLMoE layer, bfloat16", layer, 1, 1), ("embedded model", model, 3, 3))
    for part, build, more_rounds, builds in parts:
        for who, mode in ways:
            # in pairs: with more in a round, a machine drifts between two by as much as they
            # differ; and built anew, since where a small model's tensors happen to lie makes a few
            # percent
            pair = {way: partial(build, *way) for way in (("frozen", mode), (who, mode))}
            runs = []
            for _ in range(builds):
                frozen, row = measure(pair, more_rounds * args.rounds).values()
                runs.append((ratio(row, frozen), frozen, row))
            runs.sort(key=lambda run: run[0] or 0)
            times, frozen, row = runs[builds // 2]
            row["case"] = f"{part}: {row['case']}"
            row["added_percent"] = times and 100 * (times - 1)
            row["bound_percent"] = bounds[who]
            row["frozen_ms"] = frozen.get("ms")
            if "failed" in frozen:
                row["failed"] = frozen["failed"]
            table.append(row)
    columns = {
        "case": "{case}",
        "ms": "{ms:.1f}",
        "frozen ms": "{frozen_ms:.1f}",
        "added": "{added_percent:+.1f} %",
        "bound": "{bound_percent:d} %",
    }
    title = f"Adapters (r {RANK}; d: 4, r: 2 of 4) over the frozen base, forward + backward"
    return Table(f"{title}: 2,048 tokens, 64 rows of kinship_new", columns, table)


# Groups esft and eval ----------------------------------------------------------------------------


def memory_of_training(module) -> dict[str, float]:
    """MB that exist because something trains, after one step. Masters: trained parameters that the
    forward copies."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    optimizer.step()
    moments = []
    for state in optimizer.state.values():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    kinds = {"gradients": [p.grad for p in trained], "masters": trained, "optimizer": moments}
    return {name: sum(t.nbytes for t in tensors) / 1e6 for name, tensors in kinds.items()}


def esft_row(case: str, frozen, chosen, forward, share: float, g: float, rounds: int) -> dict:
    """Time one case. forward(module) -> the scalar to run backward from."""
    base = next(frozen.parameters()).dtype
    numbers = sum(p.numel() for p in frozen.parameters()) / 1e6

    def step(module):
        for p in module.parameters():
            p.grad = None
        forward(module).backward()

    runs = {"frozen": partial(step, frozen), "esft": partial(step, chosen)}
    seconds = medians(runs, rounds)
    times, allowed = seconds["esft"] / seconds["frozen"], 1.15 + g / 2 * share
    masters = 0 if base == torch.float32 else 4 * numbers
    full = {"gradients": 4 * numbers, "masters": masters, "optimizer": 8 * numbers}
    return {
        "case": case,
        "frozen_ms": 1e3 * seconds["frozen"],
        "esft_ms": 1e3 * seconds["esft"],
        "ratio": times,
        "allowed": allowed,
        "within": times <= allowed,
        "row_share": share,
        "experts_part": g,
        "memory_mb": memory_of_training(chosen),
        "memory_full_mb": full,
    }


def tiny_model_row(rounds: int) -> dict:
    """The embedded model on 64 rows of kinship_new, experts chosen by ESFT-token on 500 rows."""
    frozen, tokenizer = MoETransformer.from_pretrained(EMBEDDED), load_tokenizer(EMBEDDED)
    c = frozen.config
    examples = encode_rows(skills.sample("kinship_new", "train", 500), tokenizer)
    usage = esft.collect(frozen, [pad_batch(examples, tokenizer.pad_id, "cpu")])
    scores = esft.expert_scores(*usage, c.num_experts_per_tok)
    ids_of_layers = esft.select_experts(scores, 0.2)
    ids, labels, _ = pad_batch(examples[:64], tokenizer.pad_id, "cpu")
    chosen = esft.apply_esft(copy.deepcopy(frozen), ids_of_layers)
    frozen.requires_grad_(False)
    for model in (frozen, chosen):
        model.embed_tokens.register_forward_hook(start_gradient)

    with torch.no_grad():  # padding costs time as tokens do, so it is counted here
        loads = [expert_load(routing) for routing in frozen(ids).routings]
    shares = [load[some].sum().item() for load, some in zip(loads, ids_of_layers)]
    experts, others = weights_met(c, (labels[:, 1:] != -100).sum().item() / ids.numel())
    count = f"{sum(map(len, ids_of_layers))} of {c.num_hidden_layers * c.num_experts}"
    return esft_row(
        f"tiny_olmoe, {ids.numel()} tokens, {count} experts",
        frozen,
        chosen,
        lambda model: model(ids, labels=labels).loss,
        share=sum(shares) / len(shares),
        g=experts / (experts + others),
        rounds=rounds,
    )


def olmoe_layer_rows(rounds: int) -> list[dict]:
    """One MoE layer of OLMoE's size, bfloat16, random weights; the 5 experts with the most of the
    tokens train."""
    config = replace(OLMOE, num_hidden_layers=1, vocab_size=8)
    frozen = Base("cpu", config, torch.bfloat16).ours().layers[0].moe.requires_grad_(False)
    chosen, rows = copy.deepcopy(frozen), []
    # as a model does: what is read is what trains
    chosen.register_forward_pre_hook(lambda module, inputs: module.experts.fill_bank())
    for N in (512, 2048):
        x, grad = (torch.randn(1, N, 2048, dtype=torch.bfloat16) for _ in "xg")
        load = expert_load(frozen(x)[1])
        most = load.topk(5).indices
        chosen.experts = esft.ChosenExperts(frozen.experts, most.tolist())
        x.requires_grad_()

        def forward(module, x=x, grad=grad):
            return (module(x)[0] * grad).sum()

        case, share = f"OLMoE layer, bf16, {N} tokens, 5 of 64 experts", load[most].sum().item()
        rows.append(esft_row(case, frozen, chosen, forward, share, g=1, rounds=rounds))
    return rows


def bench_esft(args) -> Table:
    rows = [tiny_model_row(4 * args.rounds), *olmoe_layer_rows(args.rounds)]
    columns = {
        "case": "{case}",
        "frozen ms": "{frozen_ms:.1f}",
        "ESFT ms": "{esft_ms:.1f}",
        "ratio": "{ratio:.3f}",
        "allowed": "{allowed:.3f}",
        "rows": "{row_share:.1%}",
    }
    for name in ("gradients", "masters", "optimizer"):
        cell = f"{{memory_mb[{name}]:.1f}} ({{memory_full_mb[{name}]:.1f}})"
        columns[f"{name} MB (full)"] = cell
    return Table("ESFT against the frozen base, forward + backward", columns, rows)


def bench_eval(args) -> Table:
    """Prompts a second on the embedded model: the papers' prompt around the world's rows, 4 beams
    and 4 new tokens, as a batch of 32 (prompts of like length in both), against transformers'
    generate; and scoring 4 choices."""
    import transformers

    model, tokenizer = MoETransformer.from_pretrained(EMBEDDED), load_tokenizer(EMBEDDED)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    words = "\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3/answer4"
    rows = []
    for row in skills.mixture(32, 0):
        about = {"instruction": row.prompt + words, "input": "", "output": ""}
        rows.append(about | {"answer": "answer1"})
    task = TASKS["ARC-Easy"]
    protocol = SimpleNamespace(template="papers", choices="words")
    prompts = [encode_prompt(task.render_eval(row), tokenizer) for row in rows]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :] = torch.tensor(prompt)
        mask[i, -len(prompt) :] = 1
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}

    def reference(beams):
        new = theirs.generate(input_ids=ids, num_beams=beams, **options)[:, longest:].tolist()
        return [tokenizer.decode(i for i in row if i != tokenizer.pad_id) for row in new]

    def ours(beams):
        return [tokenizer.decode(new) for new in model.generate(prompts, 4, num_beams=beams)]

    for beams in (1, 4):
        same = ours(beams) == reference(beams)
        assert same, "the same answers, or the times compare nothing"
    runs = {}
    for beams in (4, 1):
        runs[beams, "ours"] = partial(ours, beams)
        runs[beams, "theirs"] = partial(reference, beams)
    runs["likelihood"] = partial(eval.likelihood, model, tokenizer, protocol, task, rows)
    speed = {name: len(rows) / seconds for name, seconds in medians(runs, args.rounds).items()}
    beams, greedy = "generate, 4 beams", "generate, greedy"
    cases = {  # ours, what of transformers it is compared with
        beams: (speed[4, "ours"], beams, speed[4, "theirs"]),
        greedy: (speed[1, "ours"], greedy, speed[1, "theirs"]),
        "likelihood, 4 choices": (speed["likelihood"], beams, speed[4, "theirs"]),
    }
    table = []
    for case, (fast, peer, slow) in cases.items():
        row = {"case": case, "ours": fast, "peer": peer, "theirs": slow, "ratio": fast / slow}
        table.append(row)
    columns = {
        "case": "{case}",
        "prompts/s": "{ours:.1f}",
        "transformers": "{peer}",
        "prompts/s ": "{theirs:.1f}",
        "ratio": "{ratio:.2f}",
    }
    lengths = f"{min(map(len, prompts))} to {longest} tokens"
    return Table(f"Evaluation: {len(rows)} prompts of {lengths} at once", columns, table)


# Group full --------------------------------------------------------------------------------------


def write_weights(config: Config, folder: Path):
    """A model folder as the released ones are, of random weights in bfloat16."""
    folder.mkdir(parents=True)
    Base("cpu", config, torch.bfloat16).ours().save_pretrained(folder)


def load_and_step(who: str, folder: Path, threads: int) -> dict:
    """In a process of its own: seconds to load, tokens a second, the most memory it held."""
    torch.set_num_threads(threads)
    if who != "perft_r":
        import peft  # noqa: F401 (not counted: it takes seconds)
        import transformers
    batch = [torch.randint(8, 1000, (2, 256), generator=torch.Generator().manual_seed(0))] * 2
    begun = time.perf_counter()
    if who == "perft_r":
        edit = partial(prepare, variant=who, ids=None)
        model = MoETransformer.from_pretrained(folder, torch.bfloat16, edit=edit)
        case = step_of(model.train(), batch)
    else:
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.bfloat16)
        case = step_of(with_peft(model, PEERS[who][0]).train(), batch, use_cache=False)
    row = {"case": who, "load_s": time.perf_counter() - begun}
    row["loaded_gb"] = run.peak_memory() / 1e9
    row["first_loss"] = case.run().item()
    begun = time.perf_counter()
    for _ in range(2):
        case.run()
    row["tokens_per_second"] = 2 * case.tokens / (time.perf_counter() - begun)
    return row | {"peak_gb": run.peak_memory() / 1e9}


def go_first():
    """Where memory runs out, Linux ends this process before any other."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def alone(function, *arguments):
    """Its result, of a process that begins and ends with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, go_first) as pool:
        return pool.submit(function, *arguments).result()


def bench_full(args) -> Table:
    config = OLMOE
    if args.size == "tiny":
        config = replace(OLMOE, num_hidden_layers=2, num_experts=16)
    folder = Path(args.work) / "random_olmoe"
    shutil.rmtree(folder, ignore_errors=True)
    rows = []
    try:
        alone(write_weights, config, folder)
        size = (folder / "model.safetensors").stat().st_size / 1e9
        for i in range(2):
            for who in ("perft_r", "peft_qv"):
                try:
                    row = alone(load_and_step, who, folder, args.threads)
                except (BrokenProcessPool, ImportError, RuntimeError) as error:
                    row = {"case": who, "failed": f"{type(error).__name__}: {error}"}
                row["case"] += f", round {i + 1}"
                rows.append(row)
                print(f"  {row}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    columns = {
        "case": "{case}",
        "load s": "{load_s:.1f}",
        "tokens/s": "{tokens_per_second:.1f}",
        "peak GB": "{peak_gb:.1f}",
        "loaded": "{loaded_gb:.1f}",
        "loss": "{first_loss:.4f}",
    }
    title = f"A folder of {size:.1f} GB, bfloat16, loaded and stepped; 2 x 256 tokens"
    return Table(f"{title}, r {RANK}, AdamW", columns, rows)


GROUPS = {
    "block": bench_block,
    "step": bench_step,
    "scaling": bench_scaling,
    "adapters": bench_adapters,
    "esft": bench_esft,
    "full": bench_full,
    "eval": bench_eval,
}


# The command -------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description="How long things take, ours and the peers'.")
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP", help=f"which (all): {', '.join(GROUPS)}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    about = "of block, step and full (%(default)s)"
    add("--size", choices=("tiny", "olmoe"), default="tiny", help=about)
    about = "of block (4096), and of step with --size olmoe (16384)"
    add("--tokens", type=int, metavar="N", help=about)
    cases = (*OURS, *PEERS)
    about = f"of step (all): {', '.join(cases)}"
    add("--cases", nargs="+", choices=cases, default=cases, metavar="NAME", help=about)
    about = "of step and adapters, compile these too (cpu: a few; cuda: all but peft_experts)"
    add("--compiled", nargs="+", choices=cases, metavar="NAME", help=about)
    about = "of step; small cases take more, large ones fewer (%(default)s)"
    add("--rounds", type=int, default=11, help=about)
    add("--threads", type=int, default=1, help="CPU threads of torch (%(default)s)")
    add("--work", default="out/bench", metavar="DIR", help="of full, for weights (%(default)s)")
    add("--json", metavar="PATH", help="write the numbers there too")
    about = "append them there, a number a row, with machine, versions and command"
    add("--csv", metavar="PATH", help=about)
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    on_cpu = {"esft", "full", "eval"} if args.device == "cuda" else set()
    if on_cpu & set(args.groups):
        parser.error("groups esft, full and eval run on the CPU only")
    args.groups = args.groups or [name for name in GROUPS if name not in on_cpu]
    args.compiled = args.compiled or COMPILED[args.device]
    return args


def show(table: Table):
    def cell(form, row):
        try:
            return form.format(**row)
        except (KeyError, TypeError):  # this row has no such number
            return ""

    lines = [list(table.columns)]
    for row in table.rows:
        lines.append([cell(form, row) for form in table.columns.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{table.title}")
    for (first, *rest), row in zip(lines, [{}, *table.rows]):
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(rest, widths[1:])]
        why = f"  failed: {row['failed']}" if "failed" in row else ""
        print("  ".join(cells) + why, flush=True)


def numbers(row: dict, prefix=""):
    """(metric, value) of what is a number in a row, and why there is none."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield prefix + key, f"{value:.6g}"
        elif isinstance(value, int) or key == "failed":
            yield prefix + key, value


def about(args) -> dict[str, str]:
    """What the numbers depend on: machine, versions, command."""
    device = processor()
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "device": device,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": installed.get("transformers", "not installed"),
        "peft": installed.get("peft", "not installed"),
        "command": shlex.join(["python", "tests/bench.py", *sys.argv[1:]]),
    }


def processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(": ")[-1]
    return platform.machine()


def write_csv(path: str, group: str, rows: list[dict], setting: dict):
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(["group", "case", "metric", "value", *setting])
        for row in rows:
            for metric, value in numbers(row):
                writer.writerow([group, row["case"], metric, value, *setting.values()])


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    # Variants share the code of Block.forward, so it has many graphs; beyond the limit, fail, do
    # not run it eagerly.
    torch._dynamo.config.recompile_limit = 24
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    setting, content = about(args), {}
    print("\n".join(f"{key:12} {value}" for key, value in setting.items()))
    for name in args.groups:
        torch.manual_seed(0)
        print(name, file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            table = GROUPS[name](args)
        except ImportError as error:  # group eval without transformers
            row = {"case": name, "failed": str(error)}
            table = Table("not run", {"case": "{case}"}, [row])
        seconds = time.perf_counter() - start
        show(table._replace(title=f"{name}: {table.title} ({seconds:.0f} s)"))
        rows = []
        for row in table.rows:
            rows.append({key: value for key, value in row.items() if not torch.is_tensor(value)})
        content[name] = rows
        if args.json:  # after each group: a run that is stopped leaves what it has
            text = json.dumps(setting | {"rounds": args.rounds} | content, indent=2)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.csv:
            write_csv(args.csv, name, rows, setting)


if __name__ == "__main__":
    main()
