"""The lab: eight exercises on fine-tuning Mixture-of-Experts models, each plugged into a live one.

    python tests/lab.py              checks all eight, in about 40 s of CPU time
    python tests/lab.py --only 1     checks one (--only 3 5: these two)

Write 3 to 15 lines in place of each `raise NotImplementedError`, in order or not, and run that
command as often as you like. It checks every function twice: on numbers small enough for paper,
then inside a trained model of 2.8 million parameters (data/tiny_olmoe), which is fine-tuned with
your function in it. What is not right yet gets a line: what was expected, what came, and what that
tells. tests/README.md has the first five minutes, and a plan for a class.

A hint names the place where this repository does the same. Look there afterwards.

Shapes: N tokens, D hidden size, E experts, K experts of each token (`top_k`), L layers;
M adapters of rank r. In the model D is 128, E is 32, K is 4 and L is 4.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, tests/ is on it

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

# 1 -----------------------------------------------------------------------------------------------


def route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router: which experts does each token get, and how much does each of them count?

        s = softmax(x weight^T)     over all E experts, the softmax in float32 whatever x has
        kept: the K largest s of each token, as they are (OLMoE does not make them sum to 1)

    x (N, D), weight (E, D)
    -> weights (N, K) in the dtype of x, largest first; ids (N, K) of their experts

    Example: x weight^T = [[log 1, log 2, log 3, log 4]] has s = [[0.1, 0.2, 0.3, 0.4]], so with
    top_k 2 the weights are [[0.4, 0.3]] and the ids [[3, 2]].

    hint: moe.py, Router.forward
    """
    raise NotImplementedError


# 2 -----------------------------------------------------------------------------------------------


def dispatch(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    num_experts: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Dispatch: each expert computes all of its tokens in one call.

        y[n] = sum over k of  weights[n, k] * expert(ids[n, k], x[n])

    A pair is a token and one of its K slots: there are N * K. Call expert(e, rows) once for each e
    that has rows (it takes (n, D) and returns (n, D)), and never for one that has none; add each
    result, times its weight, to its token, and leave x as it is. Any way to find the rows of e will
    do: the usual one, which the example shows, is to sort the pairs by expert.

    x (N, D), weights (N, K), ids (N, K) -> y (N, D)

    Example: ids [[2, 0], [0, 1]] flattened are [2, 0, 0, 1]. Sorted by expert, the pairs are 1, 2,
    3, 0, which are of the tokens 0, 1, 1, 0. So expert 0 gets x[[0, 1]], expert 1 gets x[[1]],
    expert 2 gets x[[0]].

    hint: moe.py, sort_by_expert and experts_grouped
    """
    raise NotImplementedError


# 3 -----------------------------------------------------------------------------------------------


def perft_s_and_d(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """PERFT-S and PERFT-D: M adapters beside the experts, asked by every token. S is M = 1.

        Delta_j(x) = (x A_j^T) B_j^T * scale
        to return: the sum over j of Delta_j(x), each with weight 1

    x (N, D), A (M, r, D), B (M, D, r) -> (N, D), to be added to what the frozen block computes

    Every adapter reads the same x.

    A_j is (r, D), so x A_j^T is x @ A[j].T, and for one token x[n] @ A[j].T. A loop over M is fine.
    No Python loop over the N tokens: the model has hundreds to thousands.

    Example: M = 2, r = 1, scale 3, x = [[1, 2]]. A_0 = [[1, 1]], B_0 = [[1], [0]]: x A_0^T = [[3]]
    and Delta_0(x) = [[9, 0]]. A_1 = [[1, 0]], B_1 = [[2], [1]]: x A_1^T = [[1]] and Delta_1(x) =
    [[6, 3]]. To return: [[15, 3]].

    hint: perft.py, Adapters.forward
    """
    raise NotImplementedError


# 4 -----------------------------------------------------------------------------------------------


def perft_r(
    x: Tensor, A: Tensor, B: Tensor, scale: float, router_weight: Tensor, top_k: int
) -> Tensor:
    """PERFT-R: the adapters have a router of their own, and a token gets K of the M.

        G = softmax(x router_weight^T)     over all M, the softmax in float32 whatever x has
        to return: the sum over the K largest G_j of  G_j * Delta_j(x)     not renormalised

    x (N, D), A (M, r, D), B (M, D, r), router_weight (M, D), all of one dtype
    -> (N, D) in that dtype

    Delta_j and the shapes as in exercise 3; a loop over K or M is fine, none over N.

    Example: x = [[1, 0]], router_weight [[log 1, 0], [log 3, 0], [log 6, 0]], so G = [[0.1, 0.3,
    0.6]]; top_k 2: 0.6 Delta_2(x) + 0.3 Delta_1(x). With Delta_2(x) = [[30, 0]] and Delta_1(x) =
    [[0, 3]] that is [[18, 0.9]].

    hint: perft.py, PerftMoE.weights_of_adapters
    """
    raise NotImplementedError


def which_gradient_is_zero() -> str:
    """Second part of exercise 4: the code that was released for OLMoE returns, in place of perft_r,

        the sum over k of  base_weights[n, k] * Delta_j(x[n]),  j the adapter of the k-th largest G

    base_weights (N, K) are how much the token's pretrained experts count, largest first. One of the
    adapters' parameters never gets a gradient from the loss, so it stays random for ever. Which?
    -> "A", "B" or "router_weight"

    hint: perft.py, the first of the three facts on its first page
    """
    raise NotImplementedError


# 5 -----------------------------------------------------------------------------------------------


def perft_e(x: Tensor, A: Tensor, B: Tensor, scale: float, weights: Tensor, ids: Tensor) -> Tensor:
    """PERFT-E: an adapter beside each of the E experts, under the pretrained router's weights.

        to return: the sum over k of  weights[n, k] * Delta_ids[n, k](x[n])

    x (N, D), A (E, r, D), B (E, D, r); weights, ids (N, K), what the pretrained router decided
    -> (N, D)

    Delta_j and the shapes as in exercise 3. A loop over K or E is fine. No Python loop over the N
    tokens: the model has hundreds to thousands.

    Example: weights [[0.5, 0.25]], ids [[2, 0]]: 0.5 Delta_2(x) + 0.25 Delta_0(x).

    hint: perft.py, Adapters.beside_experts
    """
    raise NotImplementedError


# 6 -----------------------------------------------------------------------------------------------


def choose_experts(counts: Tensor, n_tokens: int, top_k: int, p: float) -> list[list[int]]:
    """ESFT: score the experts by how often a task uses them; choose the few that carry its bulk.

        score[l, e] = counts[l, e] / (K * n_tokens)     rounded to 4 decimals
        chosen in layer l: in descending order of score, the fewest whose sum reaches p

    The sum is of the rounded scores. Of equal scores the lower id comes first.

    counts (L, E) int64: for how many of n_tokens tokens expert e is among the K
    -> for each layer the ids of the chosen, best first

    Example: counts [[10, 40, 20, 30]], 50 tokens, top_k 2: scores 0.1, 0.4, 0.2, 0.3. For p 0.6
    that is [[1, 3]], whose sum is 0.7.

    hint: esft.py, expert_scores and smallest_prefix
    """
    raise NotImplementedError


# 7 -----------------------------------------------------------------------------------------------


def balance_loss(router_logits: list[Tensor], ids: list[Tensor]) -> Tensor:
    """The balance loss: how unevenly does each layer use its experts? 1 is even.

        f_e = the share of a layer's N * K choices that fell on e; all K of a token count
        P_e = the mean over its N tokens of softmax(router_logits)_e
        to return: the mean over the layers of   E * (sum over e of f_e P_e)

    An expert that nobody chose has f_e = 0 (bincount needs minlength).

    Why layer by layer, and not all tokens of all layers at once? Try it, and read what the check
    says.

    router_logits: L times (N, E); ids: L times (N, K) -> a scalar, with a gradient for the logits

    Example, one layer of E = 4, K = 1: every token goes to expert 0 with probability 0.7. Then f_0
    is 1, P_0 is 0.7, and the loss 4 * 0.7 = 2.8.

    hint: moe.py, load_balancing_loss
    """
    raise NotImplementedError


# 8 -----------------------------------------------------------------------------------------------


def predict() -> float:
    """Before you run exercise 8: fine-tuned for 40 steps, the experts that the task uses most learn
    it to nearly 100 %. Which accuracy, in %, will as many experts reach that chance chose? Your
    guess: no number is wrong, but write it first."""
    raise NotImplementedError


def random_control(chosen: list[list[int]], num_experts: int, seed: int) -> list[list[int]]:
    """The control of exercise 8: in each layer as many experts as `chosen` has there, drawn by
    chance from all num_experts, no one twice; ids as Python ints (.tolist()). A seed always gives
    the same ones. One generator for all layers: seed it once, before the loop.

    Example: chosen [[3, 1], [0]] of 8 experts might give [[5, 1], [6]].

    hint: esft.py, random_experts
    """
    raise NotImplementedError


# The end of what you write -----------------------------------------------------------------------
# Below stands what checks it, which nobody needs to read.

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import textwrap  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from functools import cache, partial  # noqa: E402
from importlib.machinery import SourceFileLoader  # noqa: E402
from importlib.util import module_from_spec, spec_from_loader  # noqa: E402
from typing import NamedTuple  # noqa: E402

import esft  # noqa: E402
import eval  # noqa: E402
import moe  # noqa: E402
import perft  # noqa: E402
from data import dataset, run, skills  # noqa: E402

DEEPSEEK = Path(__file__).with_name("deepseek_routing.json")
STEPS, ROWS = 40, 32  # of a fine-tuning; rows a step
SEED = 0  # of its rows and of the adapters' first weights
PATIENCE = 2, 0.05  # seconds: who computes longer, both in all and for a mean call, is stopped


class NotYet(Exception):
    """What is not right yet, for the one who wrote it."""


def compare(what: str, came, expected, *mistakes: tuple):
    """NotYet unless `came` is `expected`. mistakes: (a wrong answer, what it tells)."""
    if not torch.is_tensor(came):
        raise NotYet(f"{what}: expected a tensor, came {run.shown(came)}, a {type(came).__name__}")
    expected = torch.tensor(expected)
    if close(came, expected):
        return
    text = f"{what}: expected {numbers(expected)}, came {numbers(came)}"
    if came.shape != expected.shape:
        shapes = f"expected {tuple(expected.shape)}, came {tuple(came.shape)}"
        text = f"{what} has another shape: {shapes}"
    for wrong, misconception in mistakes:
        if close(came, torch.tensor(wrong)):
            text += f". {misconception}"
            break
    raise NotYet(text)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-3)


def numbers(t: Tensor) -> str:
    if t.is_floating_point():
        t = t.detach().double().round(decimals=4)
    return run.shown(t.tolist())


# With the router weight eye(2) the token 0 is a little nearer to 1, the token 1 to 0.
NEAR = torch.tensor([[0, 2**-9], [2**-9, 0]]).bfloat16()
SAME = (
    "In bfloat16 two that are close have the same probability, and the wrong one may win: softmax "
    "in float32, whatever the dtype of x"
)
BACK = "Only the softmax is in float32: bring what is kept back to the dtype of x"


def need_bfloat16(what: str, came: Tensor):
    if came.dtype != torch.bfloat16:
        text = f"{what} another dtype: expected bfloat16 as x has, came {came.dtype}"
        raise NotYet(text.replace("torch.", "") + f". {BACK}")


def at_least(bound: float, what: str, accuracy: float):
    if accuracy < bound:
        raise NotYet(f"{what}: expected at least {bound:.0%}, came {accuracy:.0%}")


# The live model ----------------------------------------------------------------------------------


def load_model():
    """The embedded model and its tokenizer, new for each exercise."""
    torch.manual_seed(SEED)
    config, tokenizer = eval.load_config(None)
    model = eval.load_model(None, config)
    return model.requires_grad_(False), tokenizer


def plug(part, function):
    """Let function(part, ...) run in place of part.forward(...), part being of the model."""
    part.forward = partial(function, part)


def batch_of(tokenizer, task: str, n: int, split="train") -> dataset.Batch:
    rows = skills.sample(task, split, n, SEED)
    return dataset.pad_batch(dataset.encode_rows(rows, tokenizer), tokenizer.pad_id, "cpu")


def fine_tune(model, tokenizer, task: str, lr: float, extra_loss: Callable | None = None) -> float:
    """Train what has requires_grad -> the accuracy on the task's test rows, which was 0."""
    rows = skills.sample(task, "train", STEPS * ROWS, SEED)
    examples = dataset.encode_rows(rows, tokenizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay)
    model.train()
    for step in range(STEPS):
        part = examples[step * ROWS : (step + 1) * ROWS]
        input_ids, labels, _ = dataset.pad_batch(part, tokenizer.pad_id, "cpu")
        output = model(input_ids, labels=labels)
        loss = output.loss
        if extra_loss is not None:
            loss = loss + extra_loss(output.routings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return accuracy(model.eval(), tokenizer, task)


def warm_up_and_decay(step: int) -> float:
    """The part of the learning rate at a step: up in 5 steps, then down to 0."""
    return min((step + 1) / 5, (STEPS - step) / (STEPS - 5))


def accuracy(model, tokenizer, *tasks: str) -> float:
    """The mean share of right answers to 100 test rows of each task."""
    shares = eval.accuracies(model, tokenizer, tasks, 100)
    return sum(shares.values()) / len(shares)


def kept(model, tokenizer, task: str) -> float:
    """The mean accuracy on what the model knew before, 20 rows of each family."""
    return eval.kept(eval.accuracies(model, tokenizer, list(skills.FAMILIES), 20), task)


def add_to_blocks(model, delta: Callable):
    """Let each block of perft.apply_perft add delta(x, adapters, routing) to its output."""

    def forward(block, x):
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = block.router(flat)
        y = block.experts(flat, routing) + delta(flat, block.adapters, routing)
        return y.view_as(x), routing

    for block in model.layers:
        plug(block.moe, forward)


# 1 the router


def paper_route(route):
    shares = torch.tensor([[1.0, 2, 3, 4], [6, 1, 2, 1]]) / 10
    x = torch.cat((shares.log(), torch.ones(2, 1)), dim=1)  # (2, 5)
    weight = torch.eye(4, 5)
    weights, ids = two(route(x, weight, 2))
    compare(
        "weights",
        weights,
        [[0.4, 0.3], [0.6, 0.2]],
        (
            [[4 / 7, 3 / 7], [0.75, 0.25]],
            "Your weights sum to 1: you renormalised (a softmax behind the top-k does that, too). "
            "OLMoE does not",
        ),
        (
            [[0.8, 2 / 3], [6 / 7, 0.4]],
            "Your softmax runs over the tokens (dim 0), not over the experts (dim -1)",
        ),
        ([[-0.9163, -1.204], [-0.5108, -1.6094]], "These are logits: the softmax is missing"),
        ([[0.2857, 0.2308], [0.375, 0.1667]], "These are sigmoids: the router takes a softmax"),
        ([[0.1, 0.2], [0.1, 0.1]], "These are the smallest"),
        ([[0.3, 0.4], [0.2, 0.6]], "The largest comes first: sort in descending order"),
    )
    compare("ids", ids, [[3, 2], [0, 2]])
    weights, ids = two(route(NEAR, torch.eye(2).bfloat16(), 1))
    need_bfloat16("weights have", weights)
    compare("ids of x in bfloat16", ids, [[1], [0]], ([[0], [0]], SAME), ([[1], [1]], SAME))


def two(came) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(came, tuple | list) and len(came) == 2
    if not is_pair or not all(torch.is_tensor(part) for part in came):
        raise NotYet(f"expected two tensors (weights, ids), came a {type(came).__name__}")
    weights, ids = came
    if weights.dtype == torch.int64:
        raise NotYet("the first tensor is int64: return the weights first, then the ids")
    return weights, ids


def model_route(route):
    model, tokenizer = load_model()

    def forward(router, x):
        weights, ids = route(x, router.weight, router.top_k)
        return moe.Routing(F.linear(x, router.weight), weights, ids)

    for block in model.layers:
        plug(block.moe.router, forward)
    known = accuracy(model, tokenizer, "kinship", "cipher", "translate")
    at_least(0.99, "what the model could do, with your router", known)
    perft.apply_perft(model, "perft_s", dropout=0.0)
    learnt = fine_tune(model, tokenizer, "kinship_new", 1e-2)
    at_least(0.9, "kinship_new, fine-tuned", learnt)
    return (
        f"routed by you the model still knows its skills ({known:.0%}), and learns kinship_new: "
        f"{learnt:.0%}"
    )


# 2 dispatch


def paper_dispatch(dispatch):
    x = torch.eye(3)  # so that row n of y has all of its sum in column n
    ids = torch.tensor([[2, 0], [0, 1], [1, 2]])
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.1], [0.2, 0.4]])
    calls = {0: [], 1: [], 2: [], 3: []}

    def expert(e, rows):
        calls[int(e)].append(rows)
        return rows * 10 ** int(e)

    y = dispatch(x, weights, ids, 4, expert)
    if not torch.equal(x, torch.eye(3)):
        raise NotYet("You wrote into x (y = x is no copy): begin with y = torch.zeros_like(x)")
    if calls[3]:
        raise NotYet("expert 3 has no rows and was called: call only those that have rows")
    for e, tokens in enumerate([[1, 0], [2, 1], [2, 0]]):
        if len(calls[e]) != 1:
            raise NotYet(
                f"expert {e}: expected 1 call with all its rows, came {len(calls[e])} calls"
            )
        rows = torch.stack(sorted(calls[e][0], key=Tensor.tolist))
        compare(
            f"the rows of expert {e} (pair i of the flattened ids is of token i // K)",
            rows,
            x[tokens].tolist(),
        )
    not_brought_back = "Row i belongs to pair order[i], not to pair i"
    compare(
        "y",
        y,
        diagonal(50.25, 1.5, 42),
        (diagonal(101, 11, 110), "The weights are missing"),
        (
            diagonal(50, 1, 40),
            "A token has K rows, and you kept its last: y[token] = ... and y[token] += ... write "
            "once, index_add adds",
        ),
        (
            diagonal(20.5, 5.25, 41),
            "The rows are sorted and their weights are not: sort these along",
        ),
        (
            diagonal(50.5, 5.5, 22),
            "Each slot has its own weight, weights[n, k]; you took weights[n, 0] for all",
        ),
        ([[0.25, 0.5, 0], [0, 1, 2], [50, 0, 40]], not_brought_back),
        ([[0.5, 0.25, 0], [0, 5, 1], [20, 0, 40]], not_brought_back),
    )


def diagonal(*values: float) -> list[list[float]]:
    return torch.diag(torch.tensor(values)).tolist()


def model_dispatch(dispatch):
    model, tokenizer = load_model()
    batch = batch_of(tokenizer, "kinship", 16)
    for block in model.layers:
        block.moe.experts.path = "loop"
    with torch.no_grad():
        expected = model(batch.input_ids).logits

    def forward(experts, x, routing):
        def expert(e, rows):
            gate, up = F.linear(rows, experts.gate_up_proj[e]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, experts.down_proj[e])

        E = len(experts.down_proj)
        return dispatch(x, routing.routing_weights, routing.selected_experts, E, expert)

    for block in model.layers:
        plug(block.moe.experts, forward)
    with torch.no_grad():
        gap = (model(batch.input_ids).logits - expected).abs().max().item()
    if not gap < 1e-3:
        raise NotYet(f"the logits differ from those of the loop over experts by {gap:.3f}")
    perft.apply_perft(model, "perft_s", dropout=0.0)
    learnt = fine_tune(model, tokenizer, "kinship_new", 1e-2)
    at_least(0.9, "kinship_new, fine-tuned", learnt)
    return f"the logits of the loop, up to {gap:.0e}, and it learns kinship_new: {learnt:.0%}"


# 3 PERFT-S and PERFT-D


def paper_s_and_d(perft_s_and_d):
    x = torch.tensor([[1.0, 2], [3, -1]])
    A = torch.tensor([[[1.0, 1]], [[1, 0]]])
    B = torch.tensor([[[1.0], [0]], [[2], [1]]])  # A_1 B_0 is not 0: a series is not the sum
    compare(
        "M = 2",
        perft_s_and_d(x, A, B, 3.0),
        [[15.0, 3], [24, 9]],
        ([[5.0, 1], [8, 3]], "The scale is missing"),
        (
            [[7.5, 1.5], [12, 4.5]],
            "You took the mean of the adapters; PERFT-D adds them, each with weight 1",
        ),
        (
            [[16.0, 5], [27, 8]],
            "You added x: the residual is the model's, an adapter returns its Delta alone",
        ),
        (
            [[69.0, 30], [60, 27]],
            "Each adapter reads the same x, not what the one before returned",
        ),
        (
            [[36.0, 12], [45, 15]],
            "You summed A and B over j by themselves: B_j belongs to A_j alone, so sum the Delta_j",
        ),
        ([[9.0, 0], [6, 0]], "That is the first adapter alone"),
        ([[[9.0, 0], [6, 3]], [[6, 0], [18, 9]]], "The sum over j is missing"),
        ([[[9.0, 0], [6, 0]], [[6, 3], [18, 9]]], "The sum over j is missing"),
    )
    compare("M = 1, which is PERFT-S", perft_s_and_d(x, A[:1], B[:1], 3.0), [[9.0, 0], [6, 0]])


def model_s_and_d(perft_s_and_d):
    texts = []
    for name, rank, M, lr in (("S", 16, 1, 1e-2), ("D", 4, 4, 5e-3)):
        model, tokenizer = load_model()
        variant = f"perft_{name.lower()}"
        perft.apply_perft(model, variant, rank=rank, num_adapters=M, dropout=0.0)
        add_to_blocks(model, lambda x, a, routing: perft_s_and_d(x, a.A, a.B, a.scale))
        learnt = fine_tune(model, tokenizer, "kinship_new", lr)
        at_least(0.9, f"kinship_new, PERFT-{name}", learnt)
        keeps = kept(model, tokenizer, "kinship_new")
        texts.append(f"{name} (M {M}, r {rank}) learns {learnt:.0%} and keeps {keeps:.0%}")
    return ", ".join(texts)


# 4 PERFT-R


def example_r():
    """x, A, B, scale, router_weight, top_k. G is [[.1, .3, .6], [.5, .4, .1], [.1, .3, .6]]."""
    router_weight = torch.tensor([[0.1, 0.5], [0.3, 0.4], [0.6, 0.1]]).log().requires_grad_()
    A = torch.ones(3, 1, 2, requires_grad=True)
    B = torch.tensor([[[1.0], [0]], [[0], [1]], [[10], [0]]], requires_grad=True)
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    return x, A, B, 3.0, router_weight, 2


def paper_r(perft_r, which_gradient_is_zero):
    given = example_r()
    y = perft_r(*given)
    first_ids = "Each token has its own ids: ids[:, k], not those of the first, ids[0, k]"
    compare(
        "the sum",
        y,
        [[18, 0.9], [1.5, 1.2], [18, 0.9]],
        (
            [[20, 1], [5 / 3, 4 / 3], [20, 1]],
            "The weights sum to 1: you renormalised. PERFT-R does as its base does, and OLMoE "
            "does not",
        ),
        ([[30.0, 3], [3, 3], [30, 3]], "The weights are missing"),
        (
            [[15, 1.5], [1.5, 1.5], [15, 1.5]],
            "Each of the K counts 1 / K with you: it is G_j that weighs them",
        ),
        ([[9, 0.45], [0.75, 0.6], [9, 0.45]], "You took the mean of the K: it is a sum"),
        (
            [[18.3, 0.9], [4.5, 1.2], [18.3, 0.9]],
            "All M adapters answer: only the K largest should",
        ),
        ([[6, 0.3], [0.5, 0.4], [6, 0.3]], "The scale is missing"),
        (
            [[1.8, 0.9], [1.5, 1.2], [1.8, 0.9]],
            "The adapter of slot k is number ids[:, k], not number k",
        ),
        (
            [[3, 0.9], [1.5, 1.2], [3, 0.9]],
            "The gate of slot k is G[n, ids[n, k]] (topk returns it), not G[:, k]",
        ),
        ([[18, 0.9], [15, 1.2], [18, 0.9]], first_ids),
        ([[18, 0.9], [3, 1.2], [18, 0.9]], first_ids),
        (
            [[180 / 13, 0.9], [15 / 7, 1.2], [180 / 13, 0.9]],
            "Your softmax runs over the tokens (dim 0), not over the adapters (dim -1)",
        ),
        (
            [[19, 0.9], [1.5, 2.2], [19, 0.9]],
            "You added x: the residual is the model's, return what the adapters add",
        ),
    )
    router_weight = given[4]
    if y.requires_grad:
        y.sum().backward()
    if not has_gradient(router_weight):
        raise NotYet(
            "router_weight gets no gradient from y, so the adapters' router would never learn. Its "
            "own probabilities must weigh the adapters (not detached, not rounded)"
        )
    paper_r_in_bfloat16(perft_r)
    answer = which_gradient_is_zero()
    given = example_r()
    released_perft_r(*given, base_weights=torch.rand(3, 2)).sum().backward()
    parameters = {"A": given[1], "B": given[2], "router_weight": given[4]}
    if answer not in parameters:
        came = f"came {run.shown(answer)}"
        raise NotYet(f'which_gradient_is_zero: expected "A", "B" or "router_weight", {came}')
    if has_gradient(parameters[answer]):
        norm = parameters[answer].grad.norm()
        raise NotYet(
            f"which_gradient_is_zero: {answer} has a gradient, of norm {norm:.1f}. Which of the "
            "three stands in y as a factor, and which only says where to look?"
        )


def paper_r_in_bfloat16(perft_r):
    A = torch.full((2, 1, 2), 2.0**9).bfloat16()  # x A_j^T is 1 for both tokens
    B = torch.eye(2).view(2, 2, 1).bfloat16()  # Delta_0 is [1, 0], Delta_1 is [0, 1]
    y = perft_r(NEAR, A, B, 1.0, torch.eye(2).bfloat16(), 1)
    need_bfloat16("the sum has", y)
    compare(
        "the sum for x in bfloat16",
        y,
        [[0, 0.5], [0.5, 0]],
        ([[0.5, 0], [0.5, 0]], SAME),
        ([[0, 0.5], [0, 0.5]], SAME),
    )


def released_perft_r(x, A, B, scale, router_weight, top_k, base_weights):
    """What which_gradient_is_zero asks about."""
    G = F.softmax(x @ router_weight.T, dim=-1)
    _, ids = G.topk(top_k)
    y = torch.zeros_like(x)
    for k in range(top_k):
        hidden = torch.einsum("nd,nrd->nr", x, A[ids[:, k]])
        delta = torch.einsum("nr,ndr->nd", hidden, B[ids[:, k]]) * scale
        y = y + base_weights[:, k, None] * delta
    return y


def has_gradient(p: Tensor) -> bool:
    return p.grad is not None and bool(p.grad.any())


def model_r(perft_r, which_gradient_is_zero):
    model, tokenizer = load_model()
    perft.apply_perft(model, "perft_r", dropout=0.0)
    routers = [block.moe.adapters.router for block in model.layers]
    before = [router.weight.detach().clone() for router in routers]

    def delta(x, a, routing):
        return perft_r(x, a.A, a.B, a.scale, a.router.weight, a.router.top_k)

    add_to_blocks(model, delta)
    learnt = fine_tune(model, tokenizer, "kinship_new", 1e-2)
    moved = [(router.weight - old).norm() / old.norm() for router, old in zip(routers, before)]
    if not min(moved) > 0:
        raise NotYet("the adapters' router did not move from its random start")
    at_least(0.85, "kinship_new", learnt)
    keeps = kept(model, tokenizer, "kinship_new")
    far = sum(moved).item() / len(moved)
    return (
        f"learns {learnt:.0%} and keeps {keeps:.0%}; its router moved by {far:.0%} (its change, "
        "relative to its first weights)"
    )


# 5 PERFT-E


def paper_e(perft_e):
    x, A, B, scale, *_ = example_r()
    weights = torch.tensor([[0.5, 0.25], [0.4, 0.1], [0.5, 0.25]])
    ids = torch.tensor([[2, 0], [1, 2], [2, 0]])
    compare(
        "the sum",
        perft_e(x, A, B, scale, weights, ids),
        [[15.75, 0], [3, 1.2], [15.75, 0]],
        ([[33.0, 0], [30, 3], [33, 0]], "The router's weights are missing"),
        (
            [[21.0, 0], [6, 2.4], [21, 0]],
            "You renormalised: the router's weights count as they are",
        ),
        (
            [[1.5, 0.75], [1.2, 0.3], [1.5, 0.75]],
            "The adapter of slot k is number ids[:, k], not number k",
        ),
        (
            [[33.0, 3], [33, 3], [33, 3]],
            "All adapters answer: only those of the chosen experts should",
        ),
        ([[5.25, 0], [1, 0.4], [5.25, 0]], "The scale is missing"),
        ([[7.875, 0], [1.5, 0.6], [7.875, 0]], "You took the mean of the K: it is a sum"),
        ([[15.0, 0], [0, 1.2], [15, 0]], "That is the first slot alone: sum over all K"),
        (
            [[16.5, 0], [12, 1.2], [16.5, 0]],
            "The weight of slot k is weights[:, k]; you took weights[:, 0] for all",
        ),
        (
            [[9.0, 0], [3, 1.2], [9, 0]],
            "You sorted the ids: weights[n, k] belongs to ids[n, k] as it stands",
        ),
    )


def model_e(perft_e):
    model, tokenizer = load_model()
    perft.apply_perft(model, "perft_e", rank=4, dropout=0.0)

    def delta(x, a, routing):
        return perft_e(x, a.A, a.B, a.scale, routing.routing_weights, routing.selected_experts)

    add_to_blocks(model, delta)
    learnt = fine_tune(model, tokenizer, "kinship_new", 1e-2)
    at_least(0.85, "kinship_new", learnt)
    return f"learns {learnt:.0%} and keeps {kept(model, tokenizer, 'kinship_new'):.0%}"


# 6 ESFT


def paper_choose(choose_experts):
    counts = torch.tensor([[10, 40, 20, 30], [25, 25, 10, 40]])
    compare_lists(
        "chosen",
        choose_experts(counts, 50, 2, 0.68),
        [[1, 3], [3, 0, 1]],
        ([[1], [3, 0]], "The expert with which the sum reaches p belongs to them, too"),
        ([[1, 3, 2], [3, 0, 1, 2]], "One too many: stop when the sum reaches p"),
        ([[1, 3], [3, 0]], "You took top_k: p decides how many"),
        ([[], []], "p bounds the sum of the scores, not each score"),
        ([[1, 3], [0, 1, 3]], "These are sorted by id; the best comes first"),
        ([[1, 3], [3, 1, 0]], "Of equal scores the lower id comes first: sort with stable=True"),
        ([[0, 2, 3, 1], [2, 0, 1, 3]], "The least used come first: sort in descending order"),
        ([[1], [3]], "A token makes K choices: divide by K * n_tokens"),
        (
            [[2, 1], [0]],
            "You normalised over the layers instead of the experts. So did a script that was "
            "released with the paper, for some months",
        ),
    )
    compare_lists(
        "chosen for p 0.5 of the scores 0.5, 0.25, 0.25, 0",
        choose_experts(torch.tensor([[50, 25, 25, 0]]), 50, 2, 0.5),
        [[0]],
        ([[0, 1]], "The sum had already reached p: stop at >="),
    )
    # torch keeps the order of equal scores by chance in a list of four, not in one of 64
    compare_lists(
        "chosen of 64 experts, those of even id used three times as often (of equal scores the "
        "lower id comes first: sort with stable=True)",
        choose_experts(torch.tensor([[3, 1] * 32]), 64, 2, 0.2),
        [list(range(0, 18, 2))],
    )
    equal = "Two experts of this layer have nearly the same count, hence the same score with 4 "
    equal += "decimals: round before you sort"
    not_rounded = ([[25, 61, 57, 36, 45]], equal), ([[0, 5, 13, 46, 30, 11]], equal)
    log = run.read_json(DEEPSEEK, top_k=int, p=float, tasks=dict)
    for task, released in log["tasks"].items():
        counts = torch.tensor(released["counts"])
        came = choose_experts(counts, released["n_tokens"], log["top_k"], log["p"])
        for layer, mine, theirs in zip(released["layers"], came, released["released"]):
            what = f"chosen for DeepSeek's {task} task in layer {layer}"
            compare_lists(what, [mine], [theirs], *not_rounded)


def compare_lists(what: str, came, expected: list, *mistakes: tuple):
    """compare, for lists of ids."""
    try:
        came = [[int(e) for e in layer] for layer in came]
    except (TypeError, ValueError):
        text = f"{what}: expected {expected}, a list of ids for each layer"
        raise NotYet(f"{text}, came {run.shown(str(came))}") from None
    if came == expected:
        return
    text = f"{what}: expected {expected}, came {run.shown(came)}"
    for wrong, misconception in mistakes:
        if came == wrong:
            text += f". {misconception}"
    raise NotYet(text)


def tune_chosen(chosen: list[list[int]]) -> tuple[float, float]:
    """ESFT on cipher_new -> accuracy on it, accuracy kept elsewhere."""
    model, tokenizer = load_model()
    esft.apply_esft(model, chosen)
    learnt = fine_tune(model, tokenizer, "cipher_new", 1e-2)
    return learnt, kept(model, tokenizer, "cipher_new")


class MostUsed(NamedTuple):
    """The experts that cipher_new uses most, before training, and what comes of them."""

    usage: esft.Usage
    chosen: list[list[int]]
    learnt: float
    kept: float


@cache
def most_used() -> MostUsed:
    """For exercises 6 and 8, computed once."""
    model, tokenizer = load_model()
    usage = esft.collect(model, [batch_of(tokenizer, "cipher_new", 200)])
    scores = esft.expert_scores(*usage, model.config.num_experts_per_tok)
    chosen = esft.select_experts(scores, 0.2)
    return MostUsed(usage, chosen, *tune_chosen(chosen))


def model_choose(choose_experts):
    hot = most_used()
    came = choose_experts(hot.usage.counts, hot.usage.n_tokens, 4, 0.2)
    compare_lists("chosen for cipher_new", came, hot.chosen)
    at_least(0.85, "cipher_new", hot.learnt)
    count = sum(map(len, hot.chosen))
    return (
        f"DeepSeek's own lists come out; {count} of the model's 128 experts learn "
        f"{hot.learnt:.0%}, and it keeps {hot.kept:.0%}"
    )


# 7 the balance loss


def paper_balance(balance_loss):
    shares = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]])  # P [.35, .2, .35, .1]
    ids = torch.tensor([[0, 1], [2, 0]])  # f [.5, .25, .25, 0]
    all_tokens = "P_e is the mean over all N tokens, also those that did not choose e"
    compare(
        "one layer, f = [0.5, 0.25, 0.25, 0], P = [0.35, 0.2, 0.35, 0.1]",
        balance_loss([shares.log().requires_grad_()], [ids]),
        1.25,
        (1.4, "You counted only each token's first choice: all N * K count"),
        (1.15, all_tokens),
        (1.6, all_tokens),
        (2.5, "f_e is a share of the N * K choices; you divided by N, as transformers does"),
        (0.3125, "The factor E is missing, or you took a mean over e instead of a sum"),
        (1.5, "You multiplied f by itself: P comes from the logits"),
        (1.18, "You multiplied P by itself: f comes from the ids"),
        (2.0, "Your softmax runs over the tokens (dim 0), not over the experts (dim -1)"),
        (-5.4626, "These are raw logits, or a log_softmax: P_e is the mean of their softmax"),
        (1.2591, "You took the softmax of the mean logits: P_e is the mean of the softmax"),
        (0.625, "The factor is E, the number of experts; you took K"),
    )
    shares = torch.full((4, 2, 8), 0.05)  # (L, N, E): layer l has collapsed on experts 2l, 2l + 1
    ids = torch.arange(8).view(4, 1, 2).expand(4, 2, 2)
    for layer in range(4):
        shares[layer, :, 2 * layer : 2 * layer + 2] = 0.35
    logits = [layer.requires_grad_() for layer in shares.log()]
    came = balance_loss(logits, list(ids))
    compare(
        "four layers, each collapsed on two other experts",
        came,
        2.8,
        (
            1.0,
            "You pooled the layers: collapsed on other experts each, together they look perfectly "
            "balanced. transformers' loss has this blind spot; let each layer answer for itself",
        ),
        (11.2, "You added the layers up: return their mean"),
    )
    if came.requires_grad:
        came.backward()
    if not all(has_gradient(layer) for layer in logits):
        raise NotYet(
            "the value is right, but no gradient reaches the logits, so nothing would learn from "
            "it: keep P a tensor (no .item(), .detach() or no_grad)"
        )


def model_balance(balance_loss):
    def of_routings(routings):
        logits = [routing.router_logits for routing in routings]
        return balance_loss(logits, [routing.selected_experts for routing in routings])

    model, tokenizer = load_model()
    perft.apply_perft(model, "perft_s", train_router=True, dropout=0.0)
    batch = batch_of(tokenizer, "kinship_new", 100, "test")
    learnt = fine_tune(model, tokenizer, "kinship_new", 1e-2, lambda rs: 0.5 * of_routings(rs))
    with torch.no_grad():
        routings = model(batch.input_ids).routings
    after = sum(moe.load_balancing_loss(routing) for routing in routings).item() / len(routings)
    if after > 1.3:
        raise NotYet(f"trained with 0.5 x your loss: expected at most 1.3, came {after:.2f}")
    at_least(0.9, "kinship_new", learnt)
    return f"trained with it the layers are even ({after:.2f}); it learns kinship_new: {learnt:.0%}"


# 8 hot against random experts


def paper_control(predict, random_control):
    guess = predict()
    if type(guess) not in (int, float) or not 0 <= guess <= 100:
        raise NotYet(f"predict: expected a number from 0 to 100, came {run.shown(guess)}")
    if 0 < guess < 1:
        raise NotYet(f"predict: {guess:g} is below 1. In %: did you mean {100 * guess:g}?")
    chosen = [[3, 1], [0], [2, 5, 7]]
    seen = [set(), set(), set()]
    for seed in range(200):
        drawn = random_control(chosen, 8, seed)
        compare_lists(f"drawn again with seed {seed}", random_control(chosen, 8, seed), drawn)
        if not all(isinstance(e, int) for layer in drawn for e in layer):
            raise NotYet(f"expected ints, not tensors, came {run.shown(str(drawn))}")
        sizes = [len(set(layer)) for layer in drawn]
        if [len(layer) for layer in drawn] != [2, 1, 3] or sizes != [2, 1, 3]:
            raise NotYet(f"expected 2, 1 and 3 different experts as in {chosen}, came {drawn}")
        for ids, layer in zip(seen, drawn):
            ids.update(layer)
    for layer, ids in enumerate(seen):
        if ids != set(range(8)):
            raise NotYet(
                f"in 200 draws layer {layer} had only the experts {sorted(ids)}: expected each of "
                "0..7 at some time, also those that were chosen"
            )
    alike = [random_control([[0, 1]] * 3, 8, seed) for seed in range(20)]
    if all(layer == drawn[0] for drawn in alike for layer in drawn):
        raise NotYet("Every layer drew the same experts: seed once, not in each layer")


def model_control(predict, random_control):
    hot = most_used()
    learnt, keeps = tune_chosen(random_control(hot.chosen, 32, SEED))
    at_least(0.85, "cipher_new, the most used experts", hot.learnt)
    return (
        f"the most used experts learn {hot.learnt:.0%} (and keep {hot.kept:.0%}), as many random "
        f"ones {learnt:.0%} (keep {keeps:.0%}); you predicted {predict():.0f}%"
    )


# The command -------------------------------------------------------------------------------------


class Exercise(NamedTuple):
    name: str
    functions: tuple[str, ...]  # to write
    on_paper: Callable
    in_model: Callable  # -> what to say when it is done
    hints: dict[str, str] = {}  # words of an exception -> what it mostly means here


EXERCISES = [
    Exercise("router", ("route",), paper_route, model_route),
    Exercise(
        "dispatch",
        ("dispatch",),
        paper_dispatch,
        model_dispatch,
        {
            "IndexError": "If you sorted the pairs: order holds pairs, token = order // K",
            "must match": "If it is the weights: one weight a row, w[:, None]",
        },
    ),
    Exercise("PERFT-S and D", ("perft_s_and_d",), paper_s_and_d, model_s_and_d),
    Exercise(
        "PERFT-R",
        ("perft_r", "which_gradient_is_zero"),
        paper_r,
        model_r,
        {"dtype": BACK, "scalar type": BACK},
    ),
    Exercise("PERFT-E", ("perft_e",), paper_e, model_e),
    Exercise("ESFT", ("choose_experts",), paper_choose, model_choose),
    Exercise(
        "balance loss",
        ("balance_loss",),
        paper_balance,
        model_balance,
        {"size": "An expert that nobody chose has f_e = 0: bincount needs minlength"},
    ),
    Exercise("hot or random", ("predict", "random_control"), paper_control, model_control),
]


class Result(NamedTuple):
    exercise: int
    name: str
    done: bool
    message: str


def examine(number: int, answers: dict[str, Callable]) -> Result:
    """Check one exercise. answers: what stands in place of this file's functions."""
    exercise = EXERCISES[number - 1]
    functions = [answers.get(name, globals().get(name)) for name in exercise.functions]
    watched = [Watched(*named) for named in zip(exercise.functions, functions)]
    done, on_paper = False, False
    try:
        exercise.on_paper(*watched)
        on_paper = True
        # the result is printed over this line
        print(
            head_of(number, exercise.name),
            "in the model ...",
            end="\r",
            file=sys.stderr,
            flush=True,
        )
        message = exercise.in_model(*watched)
        done = True
    except NotYet as reason:
        message = str(reason)
    except (Exception, SystemExit) as error:  # whatever a function of a student raises
        message = describe(error, functions, exercise.hints)
    if on_paper and not done:
        message = f"right on paper, but in the model: {message}"
    return Result(number, exercise.name, done, message)


class Watched:
    """A function of a student: it has to return something, and not to take for ever."""

    def __init__(self, name: str, function: Callable):
        self.name = name
        self.function = function
        self.seconds = 0.0
        self.calls = 0

    def __call__(self, *arguments):
        start = time.thread_time()  # of this thread alone, however busy the machine is
        came = self.function(*arguments)
        self.seconds += time.thread_time() - start
        self.calls += 1
        if came is None:
            raise NotYet(f"{self.name}: None came; did you forget `return`?")
        in_all, a_call = PATIENCE
        if self.seconds > max(in_all, a_call * self.calls):
            raise NotYet(
                f"{self.name} takes {self.seconds / self.calls:.2f} s a call, many times as long "
                "as others: loop over K, not over N"
            )
        return came


def describe(error: BaseException, functions: list[Callable], hints: dict[str, str]) -> str:
    """An exception in a line: in which function, on which line, what, and what it may mean."""
    place = "what was returned could not be used"
    codes = [getattr(function, "__code__", None) for function in functions]
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code in codes:
            place = f"{frame.f_code.co_name}, line {line}"
    if type(error) is NotImplementedError:
        return f"{place}: not written yet"
    text = f"{place}: {type(error).__name__}: {run.one_line(error)[:300]}"
    for words, hint in hints.items():
        if words in text:
            return f"{text}. {hint}"
    return text


def head_of(number: int, name: str) -> str:
    return f"{number} {name:14}"


def line_of(result: Result) -> str:
    """Wrapped, so that all of a message is seen in a terminal."""
    state = "done" if result.done else "not yet"
    head = f"{head_of(result.exercise, result.name)} {state:9}"
    return textwrap.fill(
        head + result.message, 100, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def answers_given() -> dict[str, Callable]:
    """What stands in place of this file's functions: nothing; with LAB=solution the repository's
    own, which test_lab.py calls by these names; with LAB=FILE those of another lab.py, so that who
    grades need not trust the checks of a file that was handed in."""
    source = os.environ.get("LAB")
    if not source:
        return {}
    if source == "solution":
        from test_lab import SOLUTIONS

        return SOLUTIONS
    spec = spec_from_loader("answers", SourceFileLoader("answers", source))
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"LAB={source}: {type(error).__name__}: {error}") from None
    return vars(module)


@run.command
def main(argv=None):
    parser = run.Parser(description="Check the exercises that are written in this file.")
    numbers = range(1, len(EXERCISES) + 1)
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        choices=numbers,
        default=numbers,
        metavar="N",
        help="one exercise, or several",
    )
    parser.add_argument("--json", action="store_true", help="for a program that grades")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # quicker for a model of this size
    answers = answers_given()
    results = []
    for number in args.only:
        # what a student prints should not stand in the JSON
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            results.append(examine(number, answers))
        if not args.json:
            print(line_of(results[-1]), flush=True)
    done = sum(result.done for result in results)
    if args.json:
        exercises = [result._asdict() for result in results]
        print(json.dumps({"done": done, "of": len(results), "exercises": exercises}, indent=1))
    else:
        print(f"{done}/{len(results)}")
    sys.exit(0 if done == len(results) else 1)


if __name__ == "__main__":
    main()
