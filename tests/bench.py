"""How long things take: forward + backward, in interleaved rounds of one process, the median of each. Not a test.

    python tests/bench.py                      every group
    python tests/bench.py esft --json out.json one group; the same numbers as JSON

Group eval: answering test sets, prompts a second, against transformers' generate with the same model and prompts.

Group esft: what training the chosen experts costs, against the same model (or layer) frozen, whose backward passes the
gradient of its input on and nothing else. What ESFT may cost, issue 4's bound:

    allowed = 1.15 * frozen + frozen * g / 2 * share
    share   = rows of the chosen experts / all rows, a row is a (token, slot) pair; mean of the layers
    g       = the experts' part of the FLOPs of all matrix products (a layer by itself: 1, its router is not counted)

since the products cost the frozen model 2 units, forward and input gradient, and the weight gradient of all experts
would be the experts' part of 1 unit more. Counted are products with weights; the attention of so few tokens is not. The
time does not contain the optimizer's step. Memory is that of the tensors after one step of AdamW; `full` is what
training every parameter of the model (or layer) would take, with float32 masters where the base is bfloat16.

A group is a function (rounds) -> (title, columns, rows); add it to GROUPS.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data import skills  # noqa: E402
from data.dataset import encode_prompt, pad_batch  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from esft import ChosenExperts, apply_esft, collect, expert_scores, select_experts  # noqa: E402
from eval import TINY, answer_by_likelihood, encode_rows, load_base  # noqa: E402
from moe import MoE, expert_load  # noqa: E402


def medians(runs: dict, rounds: int) -> dict[str, float]:
    """Seconds of each run, a function without arguments: all run once in a round, in turns first; round 0 warms up."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in list(runs) if i % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


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
    D, experts = c.hidden_size, c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    head = (labels[:, 1:] != -100).sum().item() / ids.numel() * c.vocab_size * D  # only labelled positions reach it
    attention = 2 * D * D * (1 + c.num_key_value_heads / c.num_attention_heads)
    others = c.num_hidden_layers * (attention + c.num_experts * D) + head
    g = c.num_hidden_layers * experts / (c.num_hidden_layers * experts + others)
    case = f"tiny_olmoe, {ids.numel()} tokens, {sum(map(len, chosen))} of {c.num_hidden_layers * c.num_experts} experts"
    return esft_row(case, frozen, esft, lambda model: model(ids, labels=labels).loss, share, g, rounds)


def olmoe_layer_rows(rounds: int) -> list[dict]:
    """One MoE layer of OLMoE's size, bfloat16, random weights; the 5 experts with the most of the tokens train."""
    config = SimpleNamespace(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
                             norm_topk_prob=False)  # fmt: skip
    with torch.device("meta"):
        frozen = MoE(config).bfloat16()
    frozen = frozen.to_empty(device="cpu").requires_grad_(False)
    for p in frozen.parameters():
        torch.nn.init.normal_(p, std=0.02)
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


def bench_esft(rounds: int):
    rows = [tiny_model_row(4 * rounds), *olmoe_layer_rows(rounds)]
    columns = {"case": "{case}", "frozen ms": "{frozen_ms:.1f}", "ESFT ms": "{esft_ms:.1f}", "ratio": "{ratio:.3f}",
               "allowed": "{allowed:.3f}", "rows": "{row_share:.1%}"}  # fmt: skip
    for name in ("gradients", "masters", "optimizer"):
        columns[f"{name} MB (full)"] = f"{{memory_mb[{name}]:.1f}} ({{memory_full_mb[{name}]:.1f}})"
    return "ESFT against the frozen base, forward + backward", columns, rows


def bench_eval(rounds: int):
    """Prompts a second on the embedded model: the papers' prompt around the world's rows, 4 beams and 4 new tokens,
    as a batch of 32 (prompts of like length in both), against transformers' generate; and scoring 4 choices."""
    import transformers

    model, tokenizer = load_base(TINY)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    rows = skills.mixture(32, 0)
    words = "\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3/answer4"
    rows = [{"instruction": row.prompt + words, "input": "", "output": "", "answer": "answer1"} for row in rows]
    task, args = TASKS["ARC-Easy"], SimpleNamespace(template="papers", num_beams=4, max_new_tokens=4, choices="words")
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
    runs["likelihood"] = partial(answer_by_likelihood, model, tokenizer, task, rows, args)
    speed = {name: len(rows) / seconds for name, seconds in medians(runs, rounds).items()}
    cases = {"generate, 4 beams": (4, 4), "generate, greedy": (1, 1), "likelihood, 4 choices": (None, 4)}
    table = []
    for case, (mine, peer) in cases.items():
        fast, slow = speed[(mine, "ours") if mine else "likelihood"], speed[peer, "theirs"]
        against = f"generate, {'4 beams' if peer == 4 else 'greedy'}"
        table.append({"case": case, "ours": fast, "peer": against, "theirs": slow, "ratio": fast / slow})
    columns = {"case": "{case}", "prompts/s": "{ours:.1f}", "transformers": "{peer}", "prompts/s ": "{theirs:.1f}",
               "ratio": "{ratio:.2f}"}  # fmt: skip
    return f"Evaluation: {len(rows)} prompts of {min(map(len, prompts))} to {longest} tokens at once", columns, table


GROUPS = {"esft": bench_esft, "eval": bench_eval}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"which (all): {', '.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=11, help="of large cases; small ones take more (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (%(default)s)")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there too")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    content = {"torch": torch.__version__, "threads": args.threads, "rounds": args.rounds}
    print(" ".join(f"{key} {value}" for key, value in content.items()))
    for name in args.groups or GROUPS:
        title, columns, content[name] = GROUPS[name](args.rounds)
        cells = [list(columns), *([form.format(**row) for form in columns.values()] for row in content[name])]
        widths = [max(map(len, column)) for column in zip(*cells)]
        print(f"\n{title}")
        for first, *rest in cells:
            print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:]))]))
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
