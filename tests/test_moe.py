"""One MoE layer: both ways to run the experts equal the dense sum of eq. 1, forward and backward;
routing; balance."""

import pytest
import torch
import torch.nn.functional as F

import moe
from moe import (
    Combine,
    Dispatch,
    Experts,
    GroupedProduct,
    MoE,
    Router,
    Routing,
    expert_load,
    load_balancing_loss,
)

N, D, E, K, WIDTH = 23, 16, 6, 2, 8  # WIDTH: intermediate_size
every_seed = pytest.mark.parametrize("seed", range(4))


def make_layer(seed, N=N, D=D, E=E, K=K, width=WIDTH, norm_topk_prob=False, dtype=torch.float32):
    """x (N, D), a Router and Experts with random weights."""
    torch.manual_seed(seed)
    router, experts = Router(D, E, K, norm_topk_prob), Experts(E, D, width)
    for p in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return torch.randn(N, D, dtype=dtype), router.to(dtype), experts.to(dtype)


def dense_sum(x, routing, gate_up_proj, down_proj):
    """Every expert for every token, in double precision; the weight of an expert that was not
    chosen is 0."""
    x, gate_up_proj, down_proj = x.double(), gate_up_proj.double(), down_proj.double()
    gate, up = torch.einsum("nd,efd->nef", x, gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("nef,edf->ned", gate * torch.sigmoid(gate) * up, down_proj)
    weights = torch.zeros(outputs.shape[:2], dtype=torch.float64)
    weights = weights.scatter(1, routing.selected_experts, routing.routing_weights.double())
    return torch.einsum("ne,ned->nd", weights, outputs)


def output_and_gradients(run, x, routing, experts):
    """y and the gradients of x, the routing weights and both stacked weights, for one random
    gradient of y."""
    leaves = [
        t.detach().clone().requires_grad_()
        for t in (x, routing.routing_weights, *experts.parameters())
    ]
    y = run(leaves[0], routing._replace(routing_weights=leaves[1]), *leaves[2:])
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return [y.detach(), *torch.autograd.grad(y, leaves, direction.to(y.dtype))]


def gap(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


# The experts -------------------------------------------------------------------------------------


@every_seed
@pytest.mark.parametrize("run", [moe.experts_loop, moe.experts_grouped])
@pytest.mark.parametrize(("E", "K"), [(6, 2), (6, 6), (5, 1), (1, 1), (64, 8)])
def test_both_paths_equal_the_dense_sum_forward_and_backward(seed, run, E, K):
    """Outputs and the gradients of x, routing weights, gate_up_proj and down_proj, against double
    precision."""
    x, router, experts = make_layer(seed, E=E, K=K)
    routing = router(x)
    for ours, exact in zip(
        output_and_gradients(run, x, routing, experts),
        output_and_gradients(dense_sum, x, routing, experts),
    ):
        assert ours.shape == exact.shape and gap(ours, exact) < 2e-6


@every_seed
def test_the_loop_in_double_precision_is_the_dense_sum(seed):
    """Not close: equal to 1e-13. The text book has no error of its own."""
    x, router, experts = make_layer(seed, dtype=torch.float64)
    routing = router(x)
    for ours, exact in zip(
        output_and_gradients(moe.experts_loop, x, routing, experts),
        output_and_gradients(dense_sum, x, routing, experts),
    ):
        assert gap(ours, exact) < 1e-13


@every_seed
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_a_layer_gives_the_same_gradients_on_both_paths(seed, norm_topk_prob):
    """Through the router as well, as a block uses it: x (B, T, D) -> y (B, T, D)."""
    _, router, experts = make_layer(seed, norm_topk_prob=norm_topk_prob)

    class Sizes:
        hidden_size, intermediate_size, num_experts, num_experts_per_tok = D, WIDTH, E, K

    Sizes.norm_topk_prob = norm_topk_prob
    layer, results = MoE(Sizes), {}
    layer.router, layer.experts = router, experts
    x = torch.randn(3, 5, D, requires_grad=True)
    for path in ("loop", "grouped"):
        experts.path = path
        y, routing = layer(x)
        assert y.shape == x.shape and routing.selected_experts.shape == (15, K)
        results[path] = [y, *torch.autograd.grad((y**2).sum(), [x, *layer.parameters()])]
    assert len(results["loop"]) == 5
    assert all(gap(a, b) < 1e-5 for a, b in zip(results["grouped"], results["loop"]))


@pytest.mark.parametrize("run", [moe.experts_loop, moe.experts_grouped])
@pytest.mark.parametrize("chosen", [[0, 2], [5, 4], [3, 0]])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(run, chosen):
    """All tokens go to two experts, also the first or the last: zeros elsewhere, and nothing is
    NaN."""
    x, router, experts = make_layer(0)
    routing = router(x)._replace(selected_experts=torch.tensor([chosen]).repeat(N, 1))
    results = output_and_gradients(run, x, routing, experts)
    assert all(r.isfinite().all() for r in results)
    for gradient in results[3:]:
        used = gradient.flatten(1).abs().amax(1) > 0
        assert used.nonzero().flatten().tolist() == sorted(chosen)
    for ours, exact in zip(results, output_and_gradients(dense_sum, x, routing, experts)):
        assert gap(ours, exact) < 2e-6


def test_one_token_is_enough():
    """N = K = 1, where several strides of a matrix mean the same."""
    x, router, experts = make_layer(0, N=1, K=1)
    routing = router(x)
    exact = output_and_gradients(dense_sum, x, routing, experts)
    for ours, by_hand in zip(output_and_gradients(moe.experts_grouped, x, routing, experts), exact):
        assert gap(ours, by_hand) < 2e-6


@pytest.mark.parametrize(
    ("D", "width", "dtype", "limit"),
    [
        (18, 8, torch.float32, 2e-6),
        (16, 6, torch.float32, 2e-6),
        (16, 8, torch.float64, 1e-14),
        (18, 6, torch.float64, 1e-14),
    ],
)
def test_what_torch_cannot_group_is_the_dense_sum_too(D, width, dtype, limit):
    """Rows of 72 or 24 bytes, and float64, which F.grouped_mm refuses: output and all gradients."""
    x, router, experts = make_layer(0, D=D, width=width, dtype=dtype)
    ends = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError)):
        for rows, weight in ((x, experts.gate_up_proj), (x[:, :width], experts.down_proj)):
            F.grouped_mm(rows[:2].contiguous(), weight[:2].mT, offs=ends)
    routing = router(x)
    ours = output_and_gradients(moe.experts_grouped, x, routing, experts)
    for mine, exact in zip(ours, output_and_gradients(dense_sum, x, routing, experts)):
        assert gap(mine, exact) < limit


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_no_tokens_are_no_output_and_no_error(path):
    """x (0, D) -> y (0, D), with gradients of zeros."""
    x, router, experts = make_layer(0, N=0)
    experts.path = path
    x.requires_grad_()
    y = experts(x, router(x))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D)
    assert all(p.grad is None or not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("run", [moe.experts_loop, moe.experts_grouped])
def test_the_gradient_of_a_sum_is_taken(run):
    """y.sum().backward() hands back one number with stride 0; grouped_mm rejects such a gradient,
    we must not."""
    x, router, experts = make_layer(0)
    routing = router(x)
    leaves = [x.requires_grad_(), *experts.parameters()]
    ours = torch.autograd.grad(run(x, routing, *leaves[1:]).sum(), leaves)
    exact = torch.autograd.grad(dense_sum(x, routing, *leaves[1:]).sum(), leaves)
    assert all(gap(a, b) < 2e-6 for a, b in zip(ours, exact))


@pytest.mark.parametrize("rows_of", [[3, 0, 4], [0, 0, 1], [1, 0, 0]])
@pytest.mark.parametrize("gradient", ["plain", "sum", "column_sum", "transposed"])
def test_a_grouped_product_takes_gradients_of_any_stride(rows_of, gradient):
    """Each group against its own matrix product, for gradients as sums, column sums and transposes
    make them."""
    torch.manual_seed(0)
    ends = torch.tensor(rows_of).cumsum(0).to(torch.int32)
    rows = torch.randn(sum(rows_of), 8, requires_grad=True)
    weight = torch.randn(3, 4, 8, requires_grad=True)
    group = torch.arange(3).repeat_interleave(torch.tensor(rows_of))
    reduce = {
        "plain": lambda y: (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(),
        "sum": lambda y: y.sum(),
        "column_sum": lambda y: (y.sum(0) * torch.arange(4)).sum(),
        "transposed": lambda y: (y.t().contiguous() ** 2).sum(),
    }[gradient]
    product, by_hand = (
        GroupedProduct.apply(rows, weight, ends),
        torch.einsum("ri,roi->ro", rows, weight[group]),
    )
    assert gap(product, by_hand) < 2e-6
    ours = torch.autograd.grad(reduce(product), (rows, weight))
    exact = torch.autograd.grad(reduce(by_hand), (rows, weight))
    assert all(gap(a, b) < 2e-6 for a, b in zip(ours, exact))


@pytest.mark.parametrize("K", [1, 3])
def test_dispatch_and_combine_are_each_others_gradient(K):
    """torch.autograd.gradcheck in double precision, and the transpose: <Dispatch x, rows> = <x,
    Combine rows>."""
    torch.manual_seed(K)
    selected = torch.rand(7, 4).topk(K).indices
    order = moe.sort_by_expert(selected, 4)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(7 * K, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Dispatch.apply(x, order), (x,))
    assert torch.autograd.gradcheck(lambda rows: Combine.apply(rows, order), (rows,))
    there = (Dispatch.apply(x, order) * rows).sum()
    back = (x * Combine.apply(rows, order)).sum()
    assert there.item() == pytest.approx(back.item(), rel=1e-12)


def test_sorting_by_expert_is_what_it_says():
    """By hand: three tokens, two choices each, four experts of which 1 is chosen by nobody."""
    order = moe.sort_by_expert(torch.tensor([[3, 0], [0, 2], [3, 2]]), 4)
    assert order.token.tolist() == [
        0,
        1,
        1,
        2,
        0,
        2,
    ]  # expert 0: tokens 0, 1; expert 2: tokens 1, 2; expert 3: 0, 2
    assert (order.pair % 2).tolist() == [1, 0, 1, 1, 0, 0]
    assert order.ends.tolist() == [2, 2, 4, 6]
    assert order.inverse.tolist() == [[4, 0], [1, 2], [5, 3]]


def test_the_example_of_the_sort_is_what_the_code_does():
    """moe.py draws N = 2, K = 2, E = 3."""
    order = moe.sort_by_expert(torch.tensor([[2, 0], [0, 1]]), 3)
    assert order.pair.tolist() == [1, 2, 3, 0] and order.token.tolist() == [0, 1, 1, 0]
    assert order.ends.tolist() == [2, 3, 4] and order.inverse.tolist() == [[3, 0], [1, 2]]
    x, rows = torch.tensor([[10.0], [20.0]]), torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    assert Dispatch.apply(x, order).flatten().tolist() == [10, 20, 20, 10]
    assert Combine.apply(rows, order).flatten().tolist() == [8 + 1, 2 + 4]


@pytest.mark.parametrize("width", [8, 6])  # rows of 32 bytes, and of 24, which take the slow way
def test_a_grouped_product_takes_factors_of_any_stride(width):
    """As they come from sums and from slices, also as the gradient of a weight, where the last
    groups may be left out: each group against its own product."""
    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    weight = torch.randn(3, width, 8)
    bounds = [(0, 2), (2, 5), (5, 6)]
    for rows in (torch.ones(1, 1).expand(6, width), torch.randn(6, 2 * width)[:, ::2]):
        product = moe.grouped_mm(rows, weight, ends)
        by_hand = [rows[start:end] @ matrix for (start, end), matrix in zip(bounds, weight)]
        assert gap(product, torch.cat(by_hand)) < 2e-6
        right = torch.randn(6, 8)
        gradient = moe.grouped_mm(rows.t(), right, ends[:2])
        by_hand = [rows[start:end].t() @ right[start:end] for start, end in bounds[:2]]
        assert gap(gradient, torch.stack(by_hand)) < 2e-6


def test_parts_of_a_step_add_up_to_its_balance_loss():
    """Two micro-batches with padding, each with the load and the number of tokens of both."""
    x, router, _ = make_layer(0)
    mask = torch.rand(N) < 0.7
    whole = router(x)
    load, parts = expert_load(whole, mask), []
    for part in (slice(0, 9), slice(9, N)):
        loss = load_balancing_loss(router(x[part]), mask[part], load, mask.sum())
        parts.append(loss)
    assert sum(parts).item() == pytest.approx(load_balancing_loss(whole, mask).item(), rel=1e-6)


def test_frozen_experts_keep_no_rows_for_the_backward_pass():
    """Only a weight that trains needs its input again; a frozen one passes the gradient on
    without."""
    rows = torch.randn(6, 8, requires_grad=True)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    frozen, trained = torch.randn(2, 4, 8), torch.randn(2, 4, 8, requires_grad=True)

    def kept(weight):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.shape) or t, lambda t: t
        ):
            GroupedProduct.apply(rows, weight, ends)
        return saved

    assert rows.shape in kept(trained) and rows.shape not in kept(frozen)
    (ours,) = torch.autograd.grad(GroupedProduct.apply(rows, frozen, ends).sum(), rows)
    exact = frozen.sum(1).repeat_interleave(torch.tensor([2, 4]), 0)
    assert gap(ours, exact) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_no_more_than_rounding(dtype):
    """Both paths against the dense sum of the same 16-bit numbers: within a few units in the last
    place."""
    x, router, experts = make_layer(0, dtype=dtype)
    routing = router(x)
    exact = dense_sum(x, routing, *experts.parameters())
    for run in (moe.experts_loop, moe.experts_grouped):
        y = run(x, routing, *experts.parameters())
        assert y.dtype == dtype and gap(y, exact) < 6 * torch.finfo(dtype).eps


# The router --------------------------------------------------------------------------------------


@every_seed
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_a_router_keeps_the_k_largest_of_the_softmax(seed, norm_topk_prob):
    """Against exp and sort by hand in double precision; heaviest first; renormalised weights sum to
    1."""
    x, router, _ = make_layer(seed, norm_topk_prob=norm_topk_prob)
    routing = router(x)
    scores = (x.double() @ router.weight.double().t()).exp()
    probs, ids = (scores / scores.sum(1, keepdim=True)).sort(dim=1, descending=True)
    kept = probs[:, :K] / probs[:, :K].sum(1, keepdim=True) if norm_topk_prob else probs[:, :K]
    assert torch.equal(routing.selected_experts, ids[:, :K])
    assert gap(routing.routing_weights, kept) < 1e-6
    assert gap(routing.router_logits, scores.log()) < 1e-6


def test_the_softmax_is_taken_in_float32_whatever_the_activations_are():
    """In bfloat16 two logits of 64 experts may round to equal probabilities; ours are the float32
    ones, cast once."""
    x, router, _ = make_layer(0, E=64, K=8, dtype=torch.bfloat16)
    routing = router(x)
    exact = routing.router_logits.float().softmax(-1).topk(8)
    assert torch.equal(routing.selected_experts, exact.indices)
    assert routing.routing_weights.dtype == torch.bfloat16
    assert torch.equal(routing.routing_weights, exact.values.to(torch.bfloat16))


# The balance loss --------------------------------------------------------------------------------


def transformers_balance(routings, top_k, mask=None):
    """The library's own number for a model with these layers."""
    module = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    E = routings[0].router_logits.shape[-1]
    return module.load_balancing_loss_func(tuple(r.router_logits for r in routings), E, top_k, mask)


def collapsed(first, E=8, K=2, N=12):
    """A layer in which experts first, first + 1, ... take every token, each with weight 1/K."""
    router_logits = torch.full((N, E), -50.0)
    router_logits[:, first : first + K] = 50.0
    return Routing(
        router_logits, torch.full((N, K), 1 / K), torch.arange(first, first + K).repeat(N, 1)
    )


@every_seed
@pytest.mark.parametrize(("E", "K"), [(6, 2), (5, 1), (16, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_on_one_layer_transformers_balance_loss_is_k_times_ours(seed, E, K, masked):
    """Its share counts tokens, ours counts choices; the gradient of the router is K times ours as
    well."""
    x, router, _ = make_layer(seed, N=24, E=E, K=K)
    mask = (torch.rand(4, 6) < 0.6).long() if masked else None
    routing = router(x)
    ours, theirs = load_balancing_loss(routing, mask), transformers_balance([routing], K, mask)
    assert theirs.item() == pytest.approx(K * ours.item(), rel=1e-5)
    (g_ours,) = torch.autograd.grad(ours, router.weight, retain_graph=True)
    (g_theirs,) = torch.autograd.grad(theirs, router.weight)
    assert gap(K * g_ours, g_theirs) < 1e-5 and g_theirs.any()


@every_seed
def test_the_balance_loss_is_its_formula(seed):
    """E * sum of f_e P_e, counted by Python over single tokens."""
    x, router, _ = make_layer(seed)
    routing = router(x)
    mask = torch.rand(N) < 0.7
    tokens = mask.nonzero().flatten().tolist()
    probs, by_hand = routing.router_logits.double().softmax(-1), 0
    for e in range(E):
        f = sum(e in routing.selected_experts[n].tolist() for n in tokens) / (len(tokens) * K)
        by_hand += E * f * sum(probs[n, e].item() for n in tokens) / len(tokens)
    assert load_balancing_loss(routing, mask).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(("E", "K"), [(8, 2), (8, 1), (64, 8), (4, 4)])
def test_balance_is_1_and_collapse_is_e_over_k(E, K):
    """Even choices and even probabilities: 1. K experts that take everything: E/K."""
    selected = torch.stack([(torch.arange(K) + n) % E for n in range(3 * E)])
    even = Routing(torch.zeros(3 * E, E), torch.full((3 * E, K), 1 / E), selected)
    assert load_balancing_loss(even).item() == pytest.approx(1, rel=1e-6)
    assert load_balancing_loss(collapsed(0, E, K)).item() == pytest.approx(E / K, rel=1e-6)
    assert torch.equal(expert_load(even), torch.full((E,), 1 / E))


def test_layers_that_collapsed_on_different_experts_look_balanced_to_transformers_only():
    """Four layers, each on its own 2 of 8 experts: pooled they are even (K = 2, its minimum); per
    layer, E/K = 4."""
    layers = [collapsed(first) for first in (0, 2, 4, 6)]
    assert transformers_balance(layers, 2).item() == pytest.approx(2, rel=1e-5)
    assert [load_balancing_loss(layer).item() for layer in layers] == pytest.approx(
        [4, 4, 4, 4], rel=1e-5
    )


@every_seed
def test_padding_counts_neither_in_the_balance_loss_nor_in_the_load(seed):
    """With a mask (B, T) of 0 and 1, or of bools, the numbers are those of the tokens that are left
    alone."""
    x, router, _ = make_layer(seed, N=20)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4], [1]])  # (B, T)
    routing, alone = router(x), router(x[mask.flatten()])
    for m in (mask, mask.long(), mask.float().flatten()):
        assert load_balancing_loss(routing, m).item() == pytest.approx(
            load_balancing_loss(alone).item(), rel=1e-5
        )
        assert gap(expert_load(routing, m), expert_load(alone)) < 1e-6
    counts = alone.selected_experts.flatten().bincount(minlength=E)
    assert gap(expert_load(routing, mask), counts / counts.sum()) < 1e-6


def test_the_balance_loss_pulls_towards_balance():
    """Twenty steps of plain gradient descent on it alone bring a lopsided router nearer to 1."""
    x, router, _ = make_layer(0, N=256)
    x[:, 0], router.weight.data[0, 0] = 1.0, 3.0  # everybody likes expert 0
    losses = []
    for _ in range(20):
        loss = load_balancing_loss(router(x))
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, router.weight)
        router.weight.data -= 0.5 * gradient
    assert losses[0] > 1.5 and losses[-1] < 1.2


def test_python_moe_py_prints_the_lesson(capsys):
    """python moe.py: tokens per expert, and the two paths equal and timed."""
    moe.main()
    text = capsys.readouterr().out
    counts = [int(n) for n in text.splitlines()[1].split()]
    assert len(counts) == 64 and sum(counts) == 8192
    assert "experts_loop" in text and "experts_grouped" in text
    assert text.splitlines()[-1].startswith("largest difference of their outputs: ")
    assert float(text.split()[-1]) < 1e-5


def test_silu_is_what_the_formula_calls_it():
    """silu(a) = a * sigmoid(a), which dense_sum above spells out."""
    a = torch.linspace(-9, 9, 101, dtype=torch.float64)
    assert gap(F.silu(a), a / (1 + (-a).exp())) < 1e-14
