"""The Mixture-of-Experts layer: a router picks K of E small feed-forward networks for every token.

    s = softmax(x W_r^T)                               over all E experts, in float32
    w_e = s_e  (OLMoE)   or   s_e / sum of the K largest s  (Mixtral, Qwen3: norm_topk_prob)
    y = sum over e in TopK(s) of  w_e * FFN_e(x)       one term a chosen expert            (eq. 1)
    FFN_e(x) = W_down_e ( silu(W_gate_e x) * W_up_e x )    the expert: a SwiGLU network

The router is one matrix, W_r. The softmax comes before the top-k in all three; OLMoE's K weights
therefore sum to less than 1.

The experts of a layer are two stacked parameters, and this file has two ways to run them:

    experts_loop     one turn of the loop is one term of eq. 1. The text book, and the reference of
                     the tests.
    experts_grouped  what runs: sort the N*K choices by expert, make each product for all experts in
                     one call on the sorted rows, sort back. The same numbers, and no shape depends
                     on the routing: a GPU need not be waited for to learn how many tokens an expert
                     has, and torch.compile makes one graph of it.

A layer returns (y, Routing). Routing is all that the balance loss and the tables of how experts are
used are computed from; nothing is left on a module for somebody else to find.

Shapes: B batch, T time, N = B*T tokens, D hidden_size, F intermediate_size (F_ in code, where F is
torch's), E num_experts, K experts per token, R = N*K rows, one for each expert of each token.

Names: a "gate" in this file is the half W_gate of an expert, whose silu multiplies the other half.
What Hugging Face's files call `gate` is `router` here, and the "gate scores" of ESFT's paper are
the router's weights.

Against the papers: jitter noise, capacity limits and token dropping are left out; none of the three
models uses them. Against transformers: the routing weight multiplies before the down projection (on
F columns instead of D; the product is linear, so the value is the same), and the balance loss is
taken per layer (see `load_balancing_loss`).

    python moe.py        the lesson: tokens per expert; loop and grouped path, equal and timed
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Routing(NamedTuple):
    """What a router decided for N tokens; a layer returns it beside its output."""

    router_logits: torch.Tensor  # (N, E) before the softmax, in the activations' dtype
    routing_weights: torch.Tensor  # (N, K) the weight of each chosen expert
    selected_experts: torch.Tensor  # (N, K) int64, the chosen experts, heaviest first


class Router(nn.Module):
    """W_r of eq. 1 and the choice of K experts.

    norm_topk_prob: make the K kept weights sum to 1 (Mixtral, Qwen3).
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: torch.Tensor) -> Routing:
        """x (N, D) -> Routing."""
        # The product is in the activations' dtype, as in transformers: in bfloat16 two logits may
        # be rounded to one. (A router that trains is float32, hence .to.)
        router_logits = F.linear(x, self.weight.to(x.dtype))  # (N, E)
        # The softmax is in float32: it makes no further ties.
        probs = F.softmax(router_logits, dim=-1, dtype=torch.float32)  # (N, E)
        routing_weights, selected_experts = probs.topk(self.top_k, dim=-1)  # (N, K)
        if self.norm_topk_prob:
            routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
        return Routing(router_logits, routing_weights.to(x.dtype), selected_experts)


def experts_loop(x, routing: Routing, gate_up_proj, down_proj):
    """Eq. 1 as it is written, one expert after the other: x (N, D) -> y (N, D).

    gate_up_proj (E, 2F, D), the gate rows first; down_proj (E, D, F).
    """
    y = torch.zeros_like(x)
    for e in range(len(down_proj)):
        token, slot = torch.where(routing.selected_experts == e)  # who chose e, in which of K slots
        gate, up = F.linear(x[token], gate_up_proj[e]).chunk(2, dim=-1)  # (n_e, F) each
        hidden = F.silu(gate) * up * routing.routing_weights[token, slot, None]
        y.index_add_(0, token, F.linear(hidden, down_proj[e]))
    return y


# The grouped path --------------------------------------------------------------------------------
#
# What `experts_grouped` below does, in four lines:
#
#     rows = x[token]                                 each token K times, sorted by expert
#     gate, up = rows W_gate_up^T                     each row with the matrix of its expert
#     rows = (silu(gate) * up * weight) W_down^T      as above
#     y[n] = the sum of the K rows of token n
#
# A token has K slots, one for each expert that it chose. The R = N*K choices, pairs (token, slot),
# are counted token by token, then sorted by expert. With N = 2, K = 2, E = 3 and selected_experts
# [[2, 0], [0, 1]] (token 0 chose the experts 2 and 0, token 1 chose 0 and 1):
#
#     pair              0        1        2        3
#     its token         0        0        1        1
#     its slot          0        1        0        1
#     its expert        2        0        0        1
#
#     sorted row        0        1    |   2    |   3         one group of rows for each expert
#     its expert        0        0    |   1    |   2
#     its pair          1        2    |   3    |   0         Order.pair
#     its token         0        1    |   1    |   0         Order.token
#
#     Order.ends      [2, 3, 4]             where each group ends
#     Order.inverse   [[3, 0], [1, 2]]      the way back: token 0 has the rows 3 and 0, token 1 has
#                                           the rows 1 and 2
#
# So Dispatch makes the rows [x0, x1, x1, x0], and Combine makes y0 = rows[3] + rows[0] and
# y1 = rows[1] + rows[2].


class Order(NamedTuple):
    """The permutation between pairs, which are in token order, and rows, in expert order."""

    pair: torch.Tensor  # (R,) int64: the pair of each row, token * K + slot
    token: torch.Tensor  # (R,) int64: its token
    inverse: torch.Tensor  # (N, K) int64: the row of pair (n, k)
    ends: torch.Tensor  # (E,) int32: where each expert's rows end; the last is R


def sort_by_expert(selected_experts, num_experts):
    """(N, K) expert ids -> Order. The sort is stable: rows of one expert stay in token order."""
    N, K = selected_experts.shape
    expert_of_row, pair = selected_experts.flatten().sort(stable=True)  # (R,)
    row = torch.arange(N * K, device=pair.device)
    inverse = torch.empty_like(pair).scatter_(0, pair, row)
    experts = torch.arange(num_experts, device=pair.device)
    ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
    return Order(pair, pair // K, inverse.view(N, K), ends)


def weight_of_rows(routing, order):
    """The routing weight of each sorted row: (R, 1)."""
    return routing.routing_weights.flatten().index_select(0, order.pair)[:, None]


def sum_of_rows(rows, inverse):
    """rows (R, D), inverse (N, K) -> (N, D): for each token the sum of its K rows.

    `embedding_bag` gathers and adds in one pass, with a float32 sum for 16-bit rows.
    """
    return F.embedding_bag(inverse, rows.contiguous(), mode="sum")


# Dispatch copies a token to its K rows, so its gradient adds what comes back from the K rows: that
# is Combine. Combine adds K rows, so its gradient copies: that is Dispatch. Both are written down,
# because autograd would make the gradient of `x[token]` a scatter with atomic additions: slower,
# and on a GPU different from run to run.


class Dispatch(torch.autograd.Function):
    """x (N, D) -> rows (R, D) with rows[i] = x[token[i]]."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order.inverse)
        return x.index_select(0, order.token)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return sum_of_rows(grad, inverse), None


class Combine(torch.autograd.Function):
    """rows (R, D) -> y (N, D) with y[n] = sum over k of rows[inverse[n, k]]."""

    @staticmethod
    def forward(ctx, rows, order):
        ctx.save_for_backward(order.token)
        return sum_of_rows(rows, order.inverse)

    @staticmethod
    def backward(ctx, grad):
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None


# `F.grouped_mm` multiplies each group of rows by its own matrix, for all experts in one call: one
# kernel on a recent GPU. torch.compile can trace it in bfloat16 only, so it is hidden in an
# operation of our own. That has no gradient: GroupedProduct below gives it one.


def packed(rows):
    """F.grouped_mm wants strides of exactly (width, 1). A gradient may have others (that of a sum
    has 0); and a single row counts as contiguous whatever its stride, which the view resets."""
    return rows.contiguous().view(-1).view(rows.shape)


@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """A product for each group, which is of one of two kinds:

    a (R, in), b (E, in, out) -> (R, out): the rows of group e times b[e].
    a (p, R), b (R, q) -> (E, p, q): the columns of group e times the rows of group e.

    The second is the gradient of the first one's b. `ends` may leave out the last groups there:
    their matrices are not made.
    """
    of_weight = b.dim() == 2
    a = packed(a.t()).t() if of_weight else packed(a)
    widths = a.shape[0 if of_weight else 1], b.shape[-1]
    aligned = all(width * a.element_size() % 16 == 0 for width in widths)  # rows of 16 bytes each
    if aligned and a.dtype != torch.float64 and a.numel() > 0:
        return F.grouped_mm(a, b, offs=ends)
    if of_weight:
        return columns_in_turn(a, b, ends.tolist())
    return rows_in_turn(a, b, ends.tolist())


# The two kinds once more, for what F.grouped_mm does not take: rows that are not of whole 16 bytes,
# float64, no rows. They are slow.


def rows_in_turn(a, b, ends):
    products = [rows.double() @ matrix.double() for rows, matrix in zip(a.tensor_split(ends), b)]
    return torch.cat(products).to(a.dtype)


def columns_in_turn(a, b, ends):
    groups = zip(a.tensor_split(ends, dim=1), b.tensor_split(ends)[:-1])  # not what is left over
    products = [columns.double() @ rows.double() for columns, rows in groups]
    return torch.stack(products).to(a.dtype)


@grouped_mm.register_fake
def _(a, b, ends):
    groups = ends.shape if b.dim() == 2 else ()
    return a.new_empty(*groups, a.shape[0], b.shape[-1])


class GroupedProduct(torch.autograd.Function):
    """rows (R, in), weight (E, out, in), ends (E,) -> (R, out): rows of group e times weight[e]^T.

    The rows are kept for the backward pass only where the weight trains: a frozen one needs itself
    alone to pass the gradient on. Over the two products of a frozen layer of OLMoE, in bfloat16,
    that saves 48 KiB a token.
    """

    @staticmethod
    def forward(ctx, rows, weight, ends):
        weight_trains = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if weight_trains else None, weight, ends)
        return grouped_mm(rows, weight.mT, ends)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, ends = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_mm(grad, weight, ends)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_mm(grad.t(), rows, ends)  # (E, out, in)
        return grad_rows, grad_weight, None


def experts_grouped(x, routing: Routing, gate_up_proj, down_proj):
    """Eq. 1 by sorting: x (N, D) -> y (N, D)."""
    order = sort_by_expert(routing.selected_experts, len(down_proj))
    rows = Dispatch.apply(x, order)  # (R, D)
    gate, up = GroupedProduct.apply(rows, gate_up_proj, order.ends).chunk(2, dim=-1)  # (R, F) each
    hidden = F.silu(gate) * up * weight_of_rows(routing, order)
    rows = GroupedProduct.apply(hidden, down_proj, order.ends)  # (R, D)
    return Combine.apply(rows, order)


class Experts(nn.Module):
    """E experts as two stacked parameters. Tests and benchmarks may set path to "loop"."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        # (E, 2F, D), the gate rows first, and (E, D, F)
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.path = "grouped"

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x (N, D), Routing -> y (N, D)."""
        compute = experts_loop if self.path == "loop" else experts_grouped
        return compute(x, routing, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router and experts: the feed-forward half of a transformer block."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.router = Router(c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob)
        self.experts = Experts(c.num_experts, c.hidden_size, c.intermediate_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """x (B, T, D) -> y (B, T, D), and the Routing of the N = B*T tokens."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D): a token's neighbours do not matter here
        routing = self.router(flat)
        return self.experts(flat, routing).view_as(x), routing


# How evenly the experts are used -----------------------------------------------------------------


def expert_counts(routing, mask=None):
    """How many of the N*K choices fell on each expert: (E,) int64."""
    ids = routing.selected_experts  # (N, K)
    counted = torch.ones_like(ids)
    if mask is not None:
        counted = counted * mask.reshape(-1, 1).to(ids.dtype)
    counts = ids.new_zeros(routing.router_logits.shape[-1])
    return counts.scatter_add_(0, ids.flatten(), counted.flatten())


def expert_load(routing, mask=None):
    """The share of the choices that fell on each expert: (E,) float32, sums to 1; no gradient."""
    return shares(expert_counts(routing, mask))


def shares(counts):
    """Counts (..., E) -> what part of their sum each is."""
    return counts.float() / counts.sum(-1, keepdim=True)


def load_balancing_loss(
    routing: Routing,
    mask: torch.Tensor | None = None,
    load: torch.Tensor | None = None,
    tokens: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """How unevenly a layer uses its experts: 1 when balanced, E/K when K experts take every token.

        E * sum over e of  f_e P_e      f_e the share of the N*K choices that fell on e,
                                        P_e the mean router probability of e

    mask (N,) or (B, T): 1 counts, 0 (padding) does not.
    load (E,), tokens: f, and the number of tokens to divide by, where routing is of a part only.
        The loss is linear in P: parts with the same f add up. (train.py: f of a micro-batch over
        all GPUs, the tokens of the whole step.)
    Switch Transformer (arXiv 2101.03961), eq. 4-6, for top-K.

    transformers' `load_balancing_loss_func` differs twice. Its f_e is a share of the N tokens, so
    on one layer it is K times this number (minimum K). And it pools the tokens of all layers first,
    so that layers which each collapsed onto other experts look balanced together; here every layer
    answers for itself, and the caller averages.
    """
    if load is None:
        load = expert_load(routing, mask)
    if tokens is None:
        tokens = len(routing.router_logits) if mask is None else mask.sum()
    probs = F.softmax(routing.router_logits, dim=-1, dtype=torch.float32)  # (N, E)
    if mask is not None:
        probs = probs * mask.reshape(-1, 1)
    return len(load) * (load * probs.sum(0) / tokens).sum()


# The lesson --------------------------------------------------------------------------------------


def main():
    import timeit

    torch.manual_seed(0)
    N, D, F_, E, K = 1024, 256, 128, 64, 8  # OLMoE's experts and top-k, an eighth of its widths
    x = torch.randn(N, D, requires_grad=True)
    router, experts = Router(D, E, K, norm_topk_prob=False), Experts(E, D, F_)
    for p in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    with torch.no_grad():
        routing = router(x)

    print(f"{N} tokens, {E} experts, {K} a token: choices that fell on each (even: {N * K // E})")
    print(" ", *expert_counts(routing).tolist())
    balance = load_balancing_loss(routing)
    print(f"balance loss {balance:.3f}   (1 = even, {E // K} = {K} experts take every token)")

    outputs = []
    for path in ("loop", "grouped"):
        experts.path = path
        outputs.append(experts(x, routing))
        times = timeit.repeat(lambda: experts(x, routing).sum().backward(), number=1, repeat=5)
        print(f"experts_{path:8} {1e3 * min(times):6.1f} ms forward + backward (best of 5)")
    loop, grouped = outputs
    print(f"largest difference of their outputs: {(loop - grouped).abs().max():.1e}")


if __name__ == "__main__":
    main()
