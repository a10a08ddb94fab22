"""The lab can be solved, by the repository's own functions; it tells known wrong answers apart; and
it grades:

    pytest tests/test_lab.py -k grade --junitxml=grades.xml     what is written in lab.py
    LAB=their/lab.py pytest tests/test_lab.py -k grade ...      what is written in that file
    LAB=solution python tests/lab.py                            8/8, by the functions below

An exercise that is not begun is skipped.
"""

import inspect
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lab
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import esft
import moe
import perft
from data import run

LAB = Path(lab.__file__)
RELEASED = Path(__file__).parents[2] / "shared" / "esft"
NUMBERS = range(1, len(lab.EXERCISES) + 1)

# The solutions: the repository's own functions, called by the names of the lab --------------------


def route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    routing = routing_of(x, weight, top_k)
    return routing.routing_weights, routing.selected_experts


def routing_of(x, weight, top_k) -> moe.Routing:
    router = moe.Router(x.shape[1], len(weight), top_k, norm_topk_prob=False)
    return functional_call(router, {"weight": weight}, x)


def dispatch(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    num_experts: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    order = moe.sort_by_expert(ids, num_experts)
    groups = moe.Dispatch.apply(x, order).tensor_split(order.ends[:-1].long())
    rows = torch.cat([expert(e, group) for e, group in enumerate(groups) if len(group)])
    weighted = rows * moe.weight_of_rows(moe.Routing(None, weights, ids), order)
    return moe.Combine.apply(weighted, order)


def perft_s_and_d(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return add_adapters(x, A, B, scale, None)


def add_adapters(x, A, B, scale, gate) -> Tensor:
    M, r, D = A.shape
    config = perft.PerftConfig("perft_d", r, scale * r, M, dropout=0.0)
    adapters = perft.Adapters(config, SimpleNamespace(hidden_size=D, num_experts=1), 0)
    return functional_call(adapters, {"A": A, "B": B}, (x, gate))


def perft_r(
    x: Tensor, A: Tensor, B: Tensor, scale: float, router_weight: Tensor, top_k: int
) -> Tensor:
    return perft_e(x, A, B, scale, *route(x, router_weight, top_k))


def which_gradient_is_zero() -> str:
    return "router_weight"


def perft_e(x: Tensor, A: Tensor, B: Tensor, scale: float, weights: Tensor, ids: Tensor) -> Tensor:
    return add_adapters(x, A, B, scale, weights.new_zeros(len(x), len(A)).scatter(1, ids, weights))


def choose_experts(counts: Tensor, n_tokens: int, top_k: int, p: float) -> list[list[int]]:
    return esft.select_experts(esft.expert_scores(counts, counts, n_tokens, top_k), p)


def balance_loss(router_logits: list[Tensor], ids: list[Tensor]) -> Tensor:
    routings = [moe.Routing(logits, None, chosen) for logits, chosen in zip(router_logits, ids)]
    return torch.stack([moe.load_balancing_loss(routing) for routing in routings]).mean()


def predict() -> float:
    return 20


def random_control(chosen: list[list[int]], num_experts: int, seed: int) -> list[list[int]]:
    return esft.random_experts(chosen, num_experts, seed)


SOLUTIONS = {
    function.__name__: function
    for function in (
        route,
        dispatch,
        perft_s_and_d,
        perft_r,
        which_gradient_is_zero,
        perft_e,
        choose_experts,
        balance_loss,
        predict,
        random_control,
    )
}


def in_shell(*flags, lab=LAB, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAB": ""} | environment
    command = [sys.executable, lab, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def on_paper(number, **answers):
    """What the lab says to these answers, and to the solutions where none is given."""
    result = lab.examine(number, SOLUTIONS | answers)
    assert result.exercise == number and not result.done and "\n" not in result.message
    return result.message


# Grading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_grade(number):
    """What is written in lab.py (LAB=FILE: in that one; LAB=solution: above)."""
    result = lab.examine(number, lab.answers_given())
    if result.message.endswith("not written yet"):
        pytest.skip(f"exercise {number} is not begun: {result.message}")
    assert result.done, result.message


# The lab itself ----------------------------------------------------------------------------------


def test_the_repository_solves_the_lab():
    """Eight of eight, exit code 0, on paper and in the model."""
    solved = in_shell("--json", LAB="solution")
    content = json.loads(solved.stdout)
    assert solved.returncode == 0, solved.stdout
    assert content["done"] == content["of"] == 8
    assert [one["exercise"] for one in content["exercises"]] == list(NUMBERS)
    assert all(one["done"] and "%" in one["message"] for one in content["exercises"])


def test_an_untouched_lab_says_what_is_not_written_and_where():
    """0/8, exit code 1, no traceback, and the line of each raise."""
    lines = LAB.read_text(encoding="utf-8").splitlines()
    raises = [i + 1 for i, line in enumerate(lines) if line.strip() == "raise NotImplementedError"]
    if len(raises) < len(SOLUTIONS):
        pytest.skip("this lab.py is begun")
    result = in_shell()
    *states, last = result.stdout.splitlines()
    assert (result.returncode, last, result.stderr) == (1, "0/8", "")
    assert len(states) == 8
    for number, line in zip(NUMBERS, states):
        first = lab.EXERCISES[number - 1].functions[0]
        place = inspect.getsourcelines(getattr(lab, first))
        (raised,) = [i for i in raises if place[1] <= i < place[1] + len(place[0])]
        assert line.startswith(f"{number} ") and "not yet" in line
        assert line.endswith(f"{first}, line {raised}: not written yet")


def test_the_solutions_have_the_signatures_of_the_stubs():
    stubs = [name for exercise in lab.EXERCISES for name in exercise.functions]
    assert list(SOLUTIONS) == stubs
    for name, solution in SOLUTIONS.items():
        stub = getattr(lab, name)
        assert inspect.signature(stub) == inspect.signature(solution)
        missing = [
            p
            for p in (*inspect.signature(stub).parameters, "return")
            if p not in inspect.get_annotations(stub)
        ]
        assert not missing and stub.__doc__


def test_every_hint_names_a_place_that_exists():
    hints = [getattr(lab, name).__doc__.partition("hint: ")[2] for name in SOLUTIONS]
    places = [hint.split(", ") for hint in hints if hint]
    assert len(places) == 9  # all but the guess
    for file, names in places:
        source = (LAB.parent.parent / file).read_text(encoding="utf-8")
        for name in names.replace(" and ", ".").split("."):
            if " " not in name.strip():
                assert f" {name.strip()}(" in source


def test_the_variation_on_the_page_for_lecturers_runs(monkeypatch, capsys):
    """With a few steps: one line a rate and variant."""
    page = LAB.with_name("README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.setattr(lab, "STEPS", 6)
    monkeypatch.setattr(lab, "ROWS", 2)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(block.replace("2e-3, 3e-3, 5e-3, 1e-2, ", ""), {})
    assert len(re.findall(r"perft_[se]: learns \d+%, keeps \d+%", capsys.readouterr().out)) == 4


def test_the_excerpt_is_what_deepseek_released():
    log = run.read_json(lab.DEEPSEEK)
    for task, excerpt in log["tasks"].items():
        path = RELEASED / f"{task}.json"
        if not path.is_file():
            pytest.skip(f"{path} is absent: the whole logs are not part of this project")
        whole = run.read_json(path)
        assert (excerpt["n_tokens"], log["top_k"]) == (whole["n_tokens"], whole["top_k"])
        for layer, counts, released in zip(
            excerpt["layers"], excerpt["counts"], excerpt["released"], strict=True
        ):
            assert counts == whole["counts"][layer - 1]  # its layer 0 is dense
            assert released == whole["released_token_p020"][str(layer)]


def test_only_one_exercise_and_json(monkeypatch, capsys):
    """What a student prints does not stand in the JSON."""

    def chatty(*arguments):
        print("I am here")
        return perft_e(*arguments)

    monkeypatch.setattr(lab, "perft_e", chatty)
    quick = lab.EXERCISES[4]._replace(in_model=lambda perft_e: "it learns")
    monkeypatch.setattr(lab, "EXERCISES", [*lab.EXERCISES[:4], quick])
    with pytest.raises(SystemExit) as stop:
        lab.main(["--only", "5", "--json"])
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert stop.value.code == 0 and "I am here" in printed.err
    assert (content["done"], content["of"]) == (1, 1)
    assert content["exercises"][0]["name"] == "PERFT-E"


def test_a_file_that_was_handed_in_meets_the_checks_of_this_one(tmp_path, monkeypatch):
    """Its functions count, and its own checks do not; a file that does not load is a line."""
    handed_in = tmp_path / "alice.py"
    handed_in.write_text("def predict():\n    return 20\n\n\ndef paper_control(*any):\n    pass\n")
    monkeypatch.setenv("LAB", str(handed_in))
    message = lab.examine(8, lab.answers_given()).message
    assert message.startswith("random_control, line ") and message.endswith("not written yet")
    handed_in.write_text("def predict(:\n")
    with pytest.raises(SystemExit) as stop:
        lab.main(["--only", "8"])
    assert stop.value.code.startswith(f"error: LAB={handed_in}: SyntaxError: ")
    monkeypatch.setenv("LAB", str(tmp_path / "bob.py"))
    with pytest.raises(SystemExit, match="bob.py: FileNotFoundError: "):
        lab.main(["--only", "8"])


def test_several_can_be_asked_for(monkeypatch, capsys):
    """In the order that was given."""
    none = {"perft_s_and_d": answer(None), "perft_e": answer(None)}
    monkeypatch.setattr(lab, "answers_given", lambda: none)
    with pytest.raises(SystemExit):
        lab.main(["--only", "5", "3"])
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("5 PERFT-E") and second.startswith("3 PERFT-S and D")
    assert last == "0/2"


def test_before_the_model_is_tuned_a_line_says_so(monkeypatch, capsys):
    """On stderr, and the result is printed over it."""
    quick = lab.EXERCISES[4]._replace(in_model=lambda perft_e: "it learns")
    monkeypatch.setattr(lab, "EXERCISES", [*lab.EXERCISES[:4], quick])
    assert lab.examine(5, SOLUTIONS).done
    assert capsys.readouterr().err == "5 PERFT-E        in the model ...\r"


def test_a_wrong_flag_is_a_usage_error():
    result = in_shell("--only", "9")
    assert result.returncode == 2 and "invalid choice" in result.stderr


# Wrong answers -----------------------------------------------------------------------------------


def experts_of(x, weight, top_k, dim=-1, dtype=torch.float32):
    return F.softmax(x @ weight.T, dim=dim, dtype=dtype).topk(top_k)


def renormalised(x, weight, top_k):
    weights, ids = experts_of(x, weight, top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def softmax_behind_top_k(x, weight, top_k):
    logits, ids = (x @ weight.T).topk(top_k)
    return logits.softmax(-1), ids


def sigmoids(x, weight, top_k):
    return torch.sigmoid(x @ weight.T).topk(top_k)


def ascending(x, weight, top_k):
    s = F.softmax(x @ weight.T, dim=-1)
    weights, ids = s.sort(dim=-1)
    return weights[:, -top_k:], ids[:, -top_k:]


def calls_every_expert(x, weights, ids, num_experts, expert):
    expert(3, x[:0])
    return dispatch(x, weights, ids, num_experts, expert)


def in_sorted_order(sort_weights):
    """The results of the sorted pairs are taken for those of the pairs as they stand in ids."""

    def dispatch(x, weights, ids, num_experts, expert):
        order = ids.flatten().argsort(stable=True)
        groups = x[order // ids.shape[1]].split(ids.flatten().bincount().tolist())
        rows = torch.cat([expert(e, group) for e, group in enumerate(groups)])
        w = weights.flatten()[order] if sort_weights else weights.flatten()
        return (rows * w[:, None]).view(*ids.shape, -1).sum(1)

    return dispatch


def order_for_token(x, weights, ids, num_experts, expert):
    order = ids.flatten().argsort(stable=True)
    return x[order]


def one_weight_too_flat(x, weights, ids, num_experts, expert):
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        y.index_add_(0, token, expert(e, x[token]) * weights[token, slot])
    return y


def dispatch_by(token_of_pair, weighted=True, add=True, sort_weights=True):
    """A dispatch with a mistake."""

    def dispatch(x, weights, ids, num_experts, expert):
        N, K = ids.shape
        pairs = ids.flatten().argsort(stable=True)
        token = token_of_pair(pairs, N, K)
        groups = x[token].split(ids.flatten().bincount(minlength=num_experts).tolist())
        rows = torch.cat([expert(e, group) for e, group in enumerate(groups) if len(group)])
        if weighted:
            rows = rows * weights.flatten()[pairs if sort_weights else slice(None), None]
        y = torch.zeros_like(x)
        if add:
            return y.index_add(0, token, rows)
        y[token] = rows
        return y

    return dispatch


def first_weight(x, weights, *others):
    return dispatch(x, weights[:, :1].expand_as(weights), *others)


def into_x(x, weights, ids, num_experts, expert):
    y = x
    y += dispatch(x, weights, ids, num_experts, expert)
    return y


def right_token(pairs, N, K):
    return pairs // K


def one_token_at_a_time(x, weights, ids, num_experts, expert):
    y = torch.zeros_like(x)
    for n, slots in enumerate(ids.tolist()):
        for k, e in enumerate(slots):
            y[n] += weights[n, k] * expert(e, x[n : n + 1])[0]
    return y


def deltas(x, A, B, scale):
    """(N, M, D)"""
    return torch.einsum("nd,mrd,mor->nmo", x, A, B) * scale


def in_series(x, A, B, scale):
    h = x
    for A_j, B_j in zip(A, B):
        h = h + h @ A_j.T @ B_j.T * scale
    return h - x


def summed_by_themselves(x, A, B, scale):
    return x @ A.sum(0).T @ B.sum(0).T * scale


def slot_for_id(x, A, B, scale, weights, ids):
    return (deltas(x, A, B, scale)[:, : ids.shape[1]] * weights[..., None]).sum(1)


def first_slot_alone(x, A, B, scale, weights, ids):
    return perft_e(x, A, B, scale, weights[:, :1], ids[:, :1])


def first_weight_of_adapters(x, A, B, scale, weights, ids):
    return perft_e(x, A, B, scale, weights[:, :1].expand_as(weights), ids)


def sorted_ids(x, A, B, scale, weights, ids):
    return perft_e(x, A, B, scale, weights, ids.sort(dim=-1)[0])


def routed_by(choose):
    def perft_r(x, A, B, scale, router_weight, top_k):
        return perft_e(x, A, B, scale, *choose(x, router_weight, top_k))

    return perft_r


def all_of_them(x, A, B, scale, router_weight, top_k):
    G = F.softmax(x @ router_weight.T, dim=-1)
    return (deltas(x, A, B, scale) * G[..., None]).sum(1)


def gate_by_slot(x, weight, top_k):
    G = F.softmax(x @ weight.T, dim=-1)
    return G[:, :top_k], G.topk(top_k)[1]


def first_ids(x, weight, top_k):
    weights, ids = experts_of(x, weight, top_k)
    return weights, ids[:1].expand_as(ids)


def gates_of_first_ids(x, weight, top_k):
    _, ids = first_ids(x, weight, top_k)
    return F.softmax(x @ weight.T, dim=-1).gather(1, ids), ids


def in_bfloat16(x, weight, top_k):
    return experts_of(x, weight, top_k, dtype=x.dtype)


def sum_in_float32(x, A, B, scale, router_weight, top_k):
    G, ids = experts_of(x, router_weight, top_k)
    return perft_e(x.float(), A.float(), B.float(), scale, G, ids)


def gate_left_in_float32(x, A, B, scale, router_weight, top_k):
    G, ids = experts_of(x, router_weight, top_k)
    chosen = deltas(x, A, B, scale)[torch.arange(len(x))[:, None], ids]  # (N, K, D)
    return (G[:, None] @ chosen)[:, 0]


def equal_shares(x, weight, top_k):
    weights, ids = experts_of(x, weight, top_k)
    return torch.full_like(weights, 1 / top_k), ids


def detached(x, weight, top_k):
    weights, ids = experts_of(x, weight, top_k)
    return weights.detach(), ids


def wrong_axis(counts, n_tokens, top_k, p):
    return esft.select_experts(counts / counts.sum(0), p)


def not_rounded(counts, n_tokens, top_k, p):
    return [esft.smallest_prefix((layer / (top_k * n_tokens)).tolist(), p) for layer in counts]


def chosen_by(take):
    """ESFT with a mistake: take(scores in descending order, ids, p, top_k) -> the chosen."""

    def choose_experts(counts, n_tokens, top_k, p):
        scores = (counts.double() / (top_k * n_tokens)).round(decimals=4)
        best = scores.sort(descending=True, stable=True)
        return [take(s, ids, p, top_k).tolist() for s, ids in zip(*best)]

    return choose_experts


def past_the_sum(scores, ids, p, top_k):
    return ids[: (scores.cumsum(0) <= p).sum() + 1]


def not_stable(counts, n_tokens, top_k, p):
    scores = (counts.double() / (top_k * n_tokens)).round(decimals=4)
    ids = scores.argsort(descending=True)
    right = choose_experts(counts, n_tokens, top_k, p)
    return [row[: len(chosen)].tolist() for row, chosen in zip(ids, right)]


def not_stable_topk(counts, n_tokens, top_k, p):
    scores = counts / (top_k * n_tokens)
    ids = scores.topk(scores.shape[1])[1]
    right = choose_experts(counts, n_tokens, top_k, p)
    return [row[: len(chosen)].tolist() for row, chosen in zip(ids, right)]


def one_flat_list(*arguments):
    return sum(choose_experts(*arguments), [])


def balance_of(f, P):
    """The balance loss with a mistake in f(softmax, ids) or P(logits, ids)."""

    def balance_loss(router_logits, ids):
        losses = []
        for logits, chosen in zip(router_logits, ids):
            E = logits.shape[-1]
            losses.append(E * (f(logits, chosen) * P(logits, chosen)).sum())
        return torch.stack(losses).mean()

    return balance_loss


def share(logits, ids):
    return ids.flatten().bincount(minlength=logits.shape[-1]) / ids.numel()


def share_of_first_choices(logits, ids):
    return share(logits, ids[:, :1])


def share_of_largest(logits, ids):
    return share(logits, logits.argmax(-1))


def share_without_minlength(logits, ids):
    return ids.flatten().bincount() / ids.numel()


def mean_probability(logits, ids):
    return logits.softmax(-1).mean(0)


def probability_of_chosen(logits, ids):
    s = logits.softmax(-1)
    return torch.zeros_like(s).scatter(1, ids, s.gather(1, ids)).mean(0)


def mean_over_those_who_chose(logits, ids):
    s = logits.softmax(-1)
    summed = torch.zeros_like(s).scatter(1, ids, s.gather(1, ids)).sum(0)
    return summed / ids.flatten().bincount(minlength=s.shape[-1]).clamp(min=1)


def over_tokens(logits, ids):
    return logits.softmax(0).mean(0)


def raw_logits(logits, ids):
    return logits.mean(0)


def softmax_of_mean(logits, ids):
    return logits.mean(0).softmax(-1)


def mean_log_softmax(logits, ids):
    return logits.log_softmax(-1).mean(0)


def times_top_k(router_logits, ids):
    return balance_loss(router_logits, ids) * ids[0].shape[1] / router_logits[0].shape[1]


def pooled(router_logits, ids):
    return balance_loss([torch.cat(router_logits)], [torch.cat(ids)])


def drawn_twice(chosen, num_experts, seed):
    rng = random.Random(seed)
    return [[rng.randrange(num_experts) for _ in layer] for layer in chosen]


def only_cold(chosen, num_experts, seed):
    rng = random.Random(seed)
    cold = [[e for e in range(num_experts) if e not in layer] for layer in chosen]
    return [rng.sample(ids, len(layer)) for ids, layer in zip(cold, chosen)]


def never_the_same(chosen, num_experts, seed):
    return [random.sample(range(num_experts), len(layer)) for layer in chosen]


def seeded_in_each_layer(chosen, num_experts, seed):
    drawn = []
    for layer in chosen:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randperm(num_experts, generator=generator)[: len(layer)].tolist())
    return drawn


def tensors(chosen, num_experts, seed):
    return [list(torch.tensor(layer)) for layer in random_control(chosen, num_experts, seed)]


def answer(value):
    return lambda *arguments: value


WRONG = [
    (1, "route", renormalised, "you renormalised"),
    (1, "route", softmax_behind_top_k, "you renormalised"),
    (1, "route", lambda x, w, k: experts_of(x, w, k, dim=0), "over the tokens (dim 0)"),
    (1, "route", lambda x, w, k: (x @ w.T).topk(k), "the softmax is missing"),
    (1, "route", sigmoids, "These are sigmoids"),
    (1, "route", ascending, "The largest comes first"),
    (1, "route", lambda x, w, k: experts_of(x, w, k), "another dtype: expected bfloat16"),
    (1, "route", in_bfloat16, "softmax in float32, whatever the dtype"),
    (1, "route", lambda x, w, k: experts_of(x, w, k)[::-1], "return the weights first"),
    (2, "dispatch", dispatch_by(right_token, weighted=False), "The weights are missing"),
    (2, "dispatch", dispatch_by(right_token, add=False), "you kept its last"),
    (2, "dispatch", first_weight, "Each slot has its own weight"),
    (2, "dispatch", into_x, "You wrote into x"),
    (2, "dispatch", dispatch_by(right_token, sort_weights=False), "sort these along"),
    (2, "dispatch", dispatch_by(lambda pairs, N, K: pairs % N), "pair i of the flattened ids"),
    (2, "dispatch", one_token_at_a_time, "expected 1 call with all its rows, came 2 calls"),
    (2, "dispatch", calls_every_expert, "expert 3 has no rows and was called"),
    (2, "dispatch", in_sorted_order(sort_weights=True), "belongs to pair order[i]"),
    (2, "dispatch", in_sorted_order(sort_weights=False), "belongs to pair order[i]"),
    (2, "dispatch", order_for_token, "order holds pairs, token = order // K"),
    (2, "dispatch", one_weight_too_flat, "one weight a row, w[:, None]"),
    (3, "perft_s_and_d", deltas, "The sum over j is missing"),
    (3, "perft_s_and_d", lambda *a: deltas(*a).transpose(0, 1), "The sum over j is missing"),
    (3, "perft_s_and_d", answer(None), "did you forget `return`?"),
    (3, "perft_s_and_d", lambda x, A, B, s: perft_s_and_d(x, A, B, 1.0), "The scale is missing"),
    (3, "perft_s_and_d", lambda *a: perft_s_and_d(*a) / len(a[1]), "You took the mean"),
    (3, "perft_s_and_d", lambda x, *a: x + perft_s_and_d(x, *a), "You added x"),
    (3, "perft_s_and_d", in_series, "reads the same x, not what the one before returned"),
    (3, "perft_s_and_d", summed_by_themselves, "B_j belongs to A_j alone"),
    (4, "perft_r", routed_by(renormalised), "you renormalised"),
    (4, "perft_r", all_of_them, "All M adapters answer"),
    (4, "perft_r", routed_by(detached), "router_weight gets no gradient"),
    (4, "perft_r", lambda *a: perft_r(*a) / a[-1], "You took the mean of the K"),
    (4, "perft_r", routed_by(gate_by_slot), "not G[:, k]"),
    (4, "perft_r", routed_by(equal_shares), "counts 1 / K with you"),
    (4, "perft_r", routed_by(first_ids), "not those of the first, ids[0, k]"),
    (4, "perft_r", routed_by(gates_of_first_ids), "not those of the first, ids[0, k]"),
    (4, "perft_r", routed_by(in_bfloat16), "softmax in float32, whatever the dtype"),
    (4, "perft_r", sum_in_float32, "another dtype: expected bfloat16 as x has, came float32"),
    (4, "perft_r", gate_left_in_float32, "Only the softmax is in float32"),
    (4, "perft_r", routed_by(lambda *a: experts_of(*a, dim=0)), "over the tokens (dim 0)"),
    (4, "which_gradient_is_zero", answer("B"), "B has a gradient, of norm"),
    (4, "which_gradient_is_zero", answer("W"), 'expected "A", "B" or "router_weight", came "W"'),
    (5, "perft_e", slot_for_id, "is number ids[:, k], not number k"),
    (
        5,
        "perft_e",
        lambda x, A, B, s, w, ids: perft_e(x, A, B, s, torch.ones_like(w), ids),
        "The router's weights are missing",
    ),
    (5, "perft_e", lambda *a: perft_e(*a) / 2, "You took the mean of the K"),
    (5, "perft_e", first_slot_alone, "the first slot alone"),
    (5, "perft_e", first_weight_of_adapters, "you took weights[:, 0] for all"),
    (5, "perft_e", sorted_ids, "You sorted the ids"),
    (6, "choose_experts", chosen_by(past_the_sum), "stop at >="),
    (6, "choose_experts", chosen_by(lambda s, ids, p, K: ids[:K]), "You took top_k"),
    (6, "choose_experts", chosen_by(lambda s, ids, p, K: ids[s >= p]), "not each score"),
    (6, "choose_experts", not_stable, "sort with stable=True"),
    (6, "choose_experts", not_stable_topk, "sort with stable=True"),
    (6, "choose_experts", one_flat_list, "a list of ids for each layer, came"),
    (6, "choose_experts", wrong_axis, "You normalised over the layers"),
    (6, "choose_experts", not_rounded, "round before you sort"),
    (
        6,
        "choose_experts",
        lambda *a: [sorted(layer) for layer in choose_experts(*a)],
        "the best comes first",
    ),
    (6, "choose_experts", lambda *a: [layer[:-1] for layer in choose_experts(*a)], "belongs to"),
    (7, "balance_loss", pooled, "You pooled the layers: collapsed on other experts"),
    (7, "balance_loss", lambda *a: 2 * balance_loss(*a), "you divided by N"),
    (7, "balance_loss", lambda *a: balance_loss(*a).detach(), "no gradient reaches the logits"),
    (7, "balance_loss", balance_of(share_of_first_choices, mean_probability), "first choice"),
    (7, "balance_loss", balance_of(share_of_largest, mean_probability), "first choice"),
    (7, "balance_loss", balance_of(share_without_minlength, mean_probability), "minlength"),
    (7, "balance_loss", balance_of(share, probability_of_chosen), "over all N tokens"),
    (7, "balance_loss", balance_of(share, mean_over_those_who_chose), "over all N tokens"),
    (7, "balance_loss", balance_of(share, share), "You multiplied f by itself"),
    (7, "balance_loss", balance_of(mean_probability, mean_probability), "You multiplied P by"),
    (7, "balance_loss", balance_of(share, over_tokens), "over the tokens (dim 0)"),
    (7, "balance_loss", balance_of(share, raw_logits), "These are raw logits"),
    (7, "balance_loss", balance_of(share, mean_log_softmax), "or a log_softmax"),
    (7, "balance_loss", balance_of(share, softmax_of_mean), "the softmax of the mean logits"),
    (7, "balance_loss", times_top_k, "you took K"),
    (7, "balance_loss", lambda *a: balance_loss(*a) / 4, "a mean over e instead of a sum"),
    (8, "random_control", seeded_in_each_layer, "seed once, not in each layer"),
    (8, "random_control", tensors, "ints, not tensors"),
    (8, "predict", answer(0.4), "In %: did you mean 40?"),
    (8, "random_control", drawn_twice, "expected 2, 1 and 3 different experts"),
    (8, "random_control", only_cold, "also those that were chosen"),
    (8, "random_control", never_the_same, "drawn again with seed 0"),
    (8, "predict", answer(150), "expected a number from 0 to 100, came 150"),
]


@pytest.mark.parametrize(("number", "name", "wrong", "misconception"), WRONG)
def test_a_known_wrong_answer_gets_its_misconception(number, name, wrong, misconception):
    message = on_paper(number, **{name: wrong})
    assert misconception in message and "in the model" not in message


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", [None, 3.5, [], torch.zeros(1), "", ([1], [2])])
def test_a_strange_answer_is_a_line_not_a_traceback(number, value):
    name = lab.EXERCISES[number - 1].functions[-1]
    if name == "which_gradient_is_zero" and value == "":
        value = {}
    assert on_paper(number, **{name: answer(value)})


def test_a_loop_over_the_tokens_is_told_and_not_waited_for(monkeypatch):
    """What counts is the function's own time: none is left here from the first call on."""
    monkeypatch.setattr(lab, "PATIENCE", (0, 0))
    message = on_paper(5)
    assert message.startswith("perft_e takes ") and message.endswith("over K, not over N")


def test_an_exception_is_told_with_its_function_and_line(tmp_path):
    """As a student sees it, in a copy of the lab with mistakes in place of three stubs."""
    lines = LAB.read_text(encoding="utf-8").split("\n")
    mistakes = {
        "perft_e": ("x @ A", "RuntimeError: "),
        "choose_experts": ("undefined", "NameError: name 'undefined' is not defined"),
        "balance_loss": ("sys.exit()", "SystemExit: "),
    }
    expected = []
    for name, (mistake, message) in mistakes.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        end = next(i for i in range(start, len(lines)) if lines[i].endswith('  """'))
        lines[end + 1] = f"    {mistake}"
        expected.append(f"{name}, line {end + 2}: {message}")
    copy = tmp_path / "tests" / "lab.py"
    copy.parent.mkdir()
    copy.write_text("\n".join(lines), encoding="utf-8")
    result = in_shell("--json", lab=copy, PYTHONPATH=str(LAB.parent.parent))
    assert (result.returncode, result.stderr) == (1, "")
    printed = [one["message"] for one in json.loads(result.stdout)["exercises"]]
    for message, start in zip(printed[4:7], expected):
        assert message.startswith(start)


def test_what_is_right_on_paper_only_is_said_so():
    """A dispatch for two experts a token; a PERFT-E that breaks on more than three tokens."""

    def two_slots(x, weights, ids, num_experts, expert):
        return dispatch(x, weights[:, :2], ids[:, :2], num_experts, expert)

    assert "but in the model: the logits differ" in on_paper(2, dispatch=two_slots)

    def three_tokens(x, *others):
        if len(x) > 3:
            raise ValueError("too many tokens")
        return perft_e(x, *others)

    message = on_paper(5, perft_e=three_tokens)
    assert message.startswith("right on paper, but in the model: three_tokens, line ")
    assert message.endswith("ValueError: too many tokens")
