"""The Mixture-of-Experts layer: a router picks K of E small feed-forward networks for every token.

    s = softmax(x W_r^T)                               over all E experts, in float32
    y = sum over e in TopK(s) of  s_e * E_e(x)         one term a chosen expert            (eq. 1)
    E_e(x) = W_down_e ( silu(W_gate_e x) * W_up_e x )  the expert: a SwiGLU network

The router is one matrix. Mixtral divides the K kept weights by their sum; OLMoE keeps them as they are, so they sum to
less than 1 (`norm_topk_prob` says which). The softmax comes before the top-k in both.

The experts of a layer are two stacked parameters, and this file has two ways to run them:

  experts_loop     one turn of the loop is one term of eq. 1. The text book, and the reference of the tests.
  experts_grouped  sort the N*K (token, slot) pairs by expert, make each product for all experts in one call on the
                   sorted rows, sort back. The same numbers, no Python loop, no shape that depends on the routing.

A layer returns (y, Routing). The balance loss, the expert-load tables and ESFT's scores are all computed from Routing;
nothing is left on a module for somebody else to find.

Shapes: B batch, T time, N = B*T tokens, D hidden_size, F intermediate_size, E num_experts, K experts per token,
R = N*K rows, one for each (token, slot) pair.

Against the papers: jitter noise, capacity limits and token dropping are left out; neither OLMoE nor Mixtral uses them.
Against transformers: the routing weight multiplies before the down projection (on F columns instead of D; the product
is linear, so the value is the same), and the balance loss is taken per layer (see `load_balancing_loss`).

    python moe.py        the lesson: tokens per expert; the loop against the grouped path, equal and timed
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
    adapter: "Routing | None" = None  # where adapters beside the experts have a router of their own: what it decided


class Router(nn.Module):
    """W_r of eq. 1 and the choice of K experts. `norm_topk_prob`: make the K kept weights sum to 1 (Mixtral)."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: torch.Tensor) -> Routing:
        """x (N, D) -> Routing."""
        router_logits = F.linear(x, self.weight.to(x.dtype))  # (N, E)
        probs = F.softmax(router_logits, dim=-1, dtype=torch.float32)  # float32: small differences decide the choice
        routing_weights, selected_experts = probs.topk(self.top_k, dim=-1)  # (N, K)
        if self.norm_topk_prob:
            routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
        return Routing(router_logits, routing_weights.to(x.dtype), selected_experts)


def experts_loop(x, routing, gate_up_proj, down_proj):
    """Eq. 1 as it is written: x (N, D) -> y (N, D), one expert after the other."""
    y = torch.zeros_like(x)
    for e in range(gate_up_proj.shape[0]):
        token, slot = torch.where(routing.selected_experts == e)  # who chose e, and in which of their K slots
        gate, up = F.linear(x[token], gate_up_proj[e]).chunk(2, dim=-1)  # (n_e, F) each
        hidden = F.silu(gate) * up * routing.routing_weights[token, slot, None]
        y = y.index_add(0, token, F.linear(hidden, down_proj[e]))
    return y


# The grouped path
#
# Sorting the R = N*K pairs by expert makes every expert's rows neighbours. `F.grouped_mm` then multiplies the rows of
# group e, which end before row ends[e], by matrix e, for all e in one call (one kernel on a recent GPU).


class Order(NamedTuple):
    """The permutation between token order and expert order."""

    token: torch.Tensor  # (R,) int64: row i of the sorted rows belongs to token[i]
    slot: torch.Tensor  # (R,) int64: and is that token's slot[i]-th choice
    inverse: torch.Tensor  # (N, K) int64: the sorted row of pair (n, k)
    ends: torch.Tensor  # (E,) int32: where each expert's rows end; the last is R, so no row is left uncomputed


def sort_by_expert(selected_experts: torch.Tensor, num_experts: int) -> Order:
    """(N, K) expert ids -> Order. The sort is stable, so rows of one expert stay in token order."""
    N, K = selected_experts.shape
    expert_of_row, pair = selected_experts.flatten().sort(stable=True)  # (R,)
    inverse = torch.empty_like(pair).scatter_(0, pair, torch.arange(N * K, device=pair.device))
    experts = torch.arange(num_experts, device=pair.device)
    ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
    return Order(pair // K, pair % K, inverse.view(N, K), ends)


# Dispatch copies a token to its K rows, Combine adds the K rows of a token. Each is the other's transpose, hence its
# gradient. Left to autograd, the gradient of `x[token]` would be a scatter with atomic additions: slower, and on a GPU
# different from run to run. `embedding_bag` is gather-and-add in one pass, with a float32 sum for 16-bit rows.


class Dispatch(torch.autograd.Function):
    """x (N, D) -> rows (R, D) with rows[i] = x[token[i]]."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order.inverse)
        return x.index_select(0, order.token)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return F.embedding_bag(inverse, grad.contiguous(), mode="sum"), None


class Combine(torch.autograd.Function):
    """rows (R, D) -> y (N, D) with y[n] = sum over k of rows[inverse[n, k]]. beside (R, D): more such rows, added to
    the sum of the others, so that zeros change no digit of it. Both have the same gradient, gathered once."""

    @staticmethod
    def forward(ctx, rows, beside, order):
        ctx.save_for_backward(order.token)
        y = F.embedding_bag(order.inverse, rows, mode="sum")
        # not y.add_: torch 2.11's compiler then loses both gradients without a word
        return y if beside is None else y + F.embedding_bag(order.inverse, beside, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        (token,) = ctx.saved_tensors
        grad = grad.index_select(0, token)
        return grad, grad if ctx.needs_input_grad[1] else None, None


# torch.compile sees the product as one opaque operation of known shape: of F.grouped_mm itself it knows bfloat16 only.
# The operation also takes no rows at all, which F.grouped_mm does not.


@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, masters: torch.Tensor | None) -> torch.Tensor:
    """a (R, in), b (E, in, out) -> (R, out): the rows of group e times b[e].
    a (in, R), b (R, out) -> (E, in, out): the columns of group e times the rows of group e.

    masters (n, in, out): take these values for b[:n]. The place of b[:n] is room to cast them into, written before each
    use and read by nobody else: so to its callers, and to torch.compile, the operation changes none of its inputs.
    """
    if masters is not None:
        b.data[: len(masters)].copy_(masters)  # .data: autograd need not know, two passes may wait for their backward
    if not a.numel():
        return a.new_zeros(product_shape(a, b, ends))
    return F.grouped_mm(a, b, offs=ends)


def product_shape(a, b, ends):
    return (a.shape[0], b.shape[2]) if b.dim() == 3 else (ends.shape[0], a.shape[0], b.shape[1])


@grouped_mm.register_fake
def _(a, b, ends, masters):
    return a.new_empty(product_shape(a, b, ends))


def packed(grad: torch.Tensor) -> torch.Tensor:
    """With strides (out, 1), which grouped_mm asks for: contiguous() leaves others where there is one row."""
    return grad.contiguous().view(-1).view(grad.shape)


class GroupedProduct(torch.autograd.Function):
    """rows (R, in), weight (E, out, in), ends (E,) -> (R, out): rows of group e times weight[e]^T.

    Written by hand for what it does not do: it keeps the rows only if a weight trains (a frozen expert needs its weight
    alone to pass the gradient on), and it never hands `grouped_mm` a gradient with stride 0, which it rejects.
    masters (n, out, in), where only the first n matrices train: their float32 values, which the weight takes over right
    before it is used, also in backward, since a sharded weight may have been gathered anew in between; the weight
    gradient stops after the rows of group n - 1 (esft.py).
    """

    @staticmethod
    def forward(ctx, rows, weight, ends, masters=None):
        trains = ctx.needs_input_grad[1] or masters is not None
        ctx.save_for_backward(rows if trains else None, weight, ends, masters)
        return grouped_mm(rows, weight.mT, ends, None if masters is None else masters.mT)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, ends, masters = ctx.saved_tensors
        grad, grad_rows, grad_weight, grad_masters = packed(grad), None, None, None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_mm(grad, weight, ends, masters)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_mm(grad.t(), rows, ends, None)  # (E, out, in)
        if masters is not None:
            grad_masters = grouped_mm(grad.t(), rows, ends[: len(masters)], None).to(masters.dtype)
        return grad_rows, grad_weight, None, grad_masters


class DispatchedProduct(torch.autograd.Function):
    """GroupedProduct of Dispatch's rows, with a weight that trains: keeps x (N, D), not the rows, which are K times as
    many. rows: their values, where somebody has gathered them. perft_e's way into the bottleneck (perft.py)."""

    @staticmethod
    def forward(ctx, x, rows, weight, order):
        ctx.save_for_backward(x, weight, order.token, order.inverse, order.ends)
        return grouped_mm(x.index_select(0, order.token) if rows is None else rows, weight.mT, order.ends, None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, token, inverse, ends = ctx.saved_tensors
        grad, grad_x = packed(grad), None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(inverse, grouped_mm(grad, weight, ends, None), mode="sum")
        return grad_x, None, grouped_mm(grad.t(), x.index_select(0, token), ends, None), None


def experts_grouped(x, routing, gate_up_proj, down_proj, masters=(None, None), beside=None):
    """Eq. 1 by sorting: x (N, D) -> y (N, D). The widths must suit `can_group`.

    beside(rows, order, weight (R, 1)) -> rows (R, D) to add, already under their weight: for what stands beside each
    expert and is asked when it is (perft_e).
    """
    order = sort_by_expert(routing.selected_experts, gate_up_proj.shape[0])
    rows = Dispatch.apply(x, order)  # (R, D)
    gate, up = GroupedProduct.apply(rows, gate_up_proj, order.ends, masters[0]).chunk(2, dim=-1)  # (R, F) each
    weight = routing.routing_weights[order.token, order.slot, None]  # (R, 1)
    more = None if beside is None else beside(rows, order, weight)
    rows = GroupedProduct.apply(F.silu(gate) * up * weight, down_proj, order.ends, masters[1])  # (R, D)
    return Combine.apply(rows, more, order)


def can_group(x: torch.Tensor, *widths: int) -> bool:
    """grouped_mm takes no float64, and rows that start at multiples of 16 bytes."""
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class Experts(nn.Module):
    """E experts as two stacked parameters. `path`: "grouped" (where the shapes allow it) or "loop"."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))  # gate first
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.path = "grouped"

    def groups(self, x: torch.Tensor) -> bool:
        """Is it the grouped path that these x (N, D) take?"""
        return self.path == "grouped" and can_group(x, x.shape[-1], self.down_proj.shape[-1])

    def forward(self, x: torch.Tensor, routing: Routing, beside=None) -> torch.Tensor:
        """x (N, D), Routing -> y (N, D). beside: see experts_grouped."""
        weights = self.gate_up_proj, self.down_proj
        if self.groups(x):
            return experts_grouped(x, routing, *weights, beside=beside)
        assert beside is None, f"path {self.path}, x {x.dtype} {tuple(x.shape)}: no rows to add to; ask groups(x) first"
        return experts_loop(x, routing, *weights)


class MoE(nn.Module):
    """Router and experts: the feed-forward half of a transformer block."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.router = Router(c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob)
        self.experts = Experts(c.num_experts, c.hidden_size, c.intermediate_size)

    def forward(self, x: torch.Tensor, *beside) -> tuple[torch.Tensor, Routing]:
        """x (B, T, D) -> y (B, T, D), Routing of the N = B*T tokens. beside: nothing, or what experts_grouped takes."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D): a token's neighbours do not matter here
        routing = self.router(flat)
        return self.experts(flat, routing, *beside).view_as(x), routing


def load_balancing_loss(routing: Routing, mask: torch.Tensor | None = None, load=None, tokens=None) -> torch.Tensor:
    """How unevenly a layer uses its experts: 1 when balanced, E/K when K experts take every token.

        E * sum over e of  f_e P_e      f_e share of the N*K choices that fell on e, P_e mean router probability of e

    mask (N,) or (B, T): 1 counts, 0 (padding) does not. Switch Transformer (arXiv 2101.03961), eq. 4-6, for top-K.
    load (E,), tokens: where these tokens are a part of more, f of all and their number; the parts' losses then add up.

    transformers' `load_balancing_loss_func` differs twice. Its f_e is a share of the N tokens, so on one layer it is K
    times this number (minimum K). And it pools the tokens of all layers first, so that layers which each collapsed onto
    other experts look balanced together; here every layer answers for itself, and the caller averages.
    """
    E = routing.router_logits.shape[-1]
    probs = F.softmax(routing.router_logits, dim=-1, dtype=torch.float32)  # (N, E)
    counted = torch.ones_like(probs[:, 0]) if mask is None else mask.flatten().to(probs.dtype)  # (N,)
    load = expert_load(routing, mask) if load is None else load
    return E * (load * (probs * counted[:, None]).sum(0) / (counted.sum() if tokens is None else tokens)).sum()


def expert_load(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The share of the choices that fell on each expert: (E,) float32, sums to 1; no gradient."""
    counts = expert_counts(routing, mask)
    return counts.float() / counts.sum()


def expert_counts(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How many of the N*K choices fell on each expert: (E,) int64."""
    E, K = routing.router_logits.shape[-1], routing.selected_experts.shape[-1]
    ids = routing.selected_experts.flatten()
    counted = torch.ones_like(ids) if mask is None else mask.flatten().to(ids.dtype).repeat_interleave(K)
    return torch.zeros(E, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, counted)


def main():
    import time

    torch.manual_seed(0)
    N, D, F_, E, K = 4096, 256, 128, 16, 2
    x = torch.randn(N, D)
    router, experts = Router(D, E, K, norm_topk_prob=False), Experts(E, D, F_)
    for p in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    with torch.no_grad():
        routing = router(x)

    print(f"{N} tokens, {E} experts, {K} per token: choices that fell on each expert (even would be {N * K // E})")
    print("  " + " ".join(f"{n:.0f}" for n in expert_load(routing) * N * K))
    kept = routing.routing_weights.sum(-1).mean()
    print(f"the {K} kept weights of a token sum to {kept:.2f} on average; norm_topk_prob would make it 1")
    print(f"balance loss {load_balancing_loss(routing):.3f}   (1 = even, {E / K:.0f} = {K} experts take all)")

    weights = (experts.gate_up_proj, experts.down_proj)
    outputs, seconds = {}, {}
    for _ in range(5):
        for run in (experts_loop, experts_grouped):
            start = time.perf_counter()
            outputs[run] = run(x, routing, *weights)
            outputs[run].sum().backward()
            seconds.setdefault(run, []).append(time.perf_counter() - start)
    gap = (outputs[experts_loop] - outputs[experts_grouped]).abs().max()
    print(f"loop against grouped: largest difference {gap:.1e}, largest output {outputs[experts_loop].abs().max():.2f}")
    for run, times in seconds.items():
        print(f"  {run.__name__:16} {sorted(times)[2] * 1e3:6.1f} ms forward + backward (median of 5)")


if __name__ == "__main__":
    main()
