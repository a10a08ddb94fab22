"""The transformer is OLMoE, Mixtral and Qwen3-MoE: logits, gradients and generated tokens equal
those of the transformers library.

Every comparison is on tiny models with random weights, norms included, so that two swapped parts
cannot look equal.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from data import hub
from data.decode import KVCache
from model import Config, MoETransformer, active_parameters, main
from moe import load_balancing_loss
from perft import MIXTRAL_8X7B, OLMOE_1B_7B

transformers = pytest.importorskip("transformers", reason="the reference of this file")

TINY = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OLMOE = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3}
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 40,  # of layers without experts, of which there are none
    "num_key_value_heads": 2,
    "head_dim": 16,
    "norm_topk_prob": True,
}
CASES = {
    "olmoe": OLMOE,
    "olmoe_renormalised_and_clipped": OLMOE | {"norm_topk_prob": True, "clip_qkv": 0.4},
    "olmoe_grouped_queries_top_1": OLMOE
    | {"num_key_value_heads": 2, "num_experts_per_tok": 1, "rope_theta": 500.0},
    "mixtral": MIXTRAL,
    "mixtral_one_key_head_all_experts": MIXTRAL
    | {"num_key_value_heads": 1, "num_experts_per_tok": 4},
    "mixtral_wide_heads_tied": MIXTRAL
    | {"head_dim": 16, "num_attention_heads": 6, "tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3_one_key_head_not_renormalised": QWEN3
    | {"num_key_value_heads": 1, "head_dim": 10, "norm_topk_prob": False, "rope_theta": 1e6},
    "qwen3_key_heads_as_query_heads_all_experts": QWEN3
    | {"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 8},
}
LENGTHS = (12, 5, 9)  # of the texts of a padded batch
every_case = pytest.mark.parametrize("case", CASES)
every_seed = pytest.mark.parametrize("seed", range(3))


def make_reference(seed, **changes):
    """A transformers model with random weights, in float32, run by its plainest code."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**TINY | changes)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **plain).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.normal_(1, 0.3)
        else:
            p.data.normal_(0, 1 if "embed" in name else p.shape[-1] ** -0.5)
    return model


def make_ours(reference):
    """Our model with the reference's weights: the same names, each tensor copied once."""
    model = MoETransformer(hub.make_config(reference.config.to_dict(), Config)).eval()
    places, weights = hub.places(model, fused=True), dict(reference.named_parameters())
    assert places.keys() == weights.keys()
    for name, place in places.items():
        place.fill(weights[name].data)
    return model


def make_pair(seed, case):
    reference = make_reference(seed, **CASES[case])
    return make_ours(reference), reference


def make_batch(seed, padding):
    """ids (3, 12) and mask (3, 12), or None; the pad id stands nowhere in the texts."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(1, TINY["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)
    if padding == "no_mask":
        return ids, None
    column, length = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    mask = (column >= max(LENGTHS) - length if padding == "left" else column < length).long()
    return ids * mask, mask


def gap(ours, theirs):
    """The largest difference, relative to the largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def set_path(model, path):
    for block in model.layers:
        block.moe.experts.path = path


def gradients(model):
    """Our gradients under the names of the checkpoint: what is at the places of a model that holds
    them instead of weights."""
    for p in model.parameters():
        p.data = p.grad
    return {name: taken(place) for name, place in hub.places(model, fused=True).items()}


def taken(place):
    if isinstance(place, hub.Stack):
        return torch.stack([taken(part) for part in place.places])
    return place.of(place.parameter.detach())


def assert_equal_gradients(model, reference):
    ours, theirs = gradients(model), {name: p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    gaps = {name: gap(ours[name], theirs[name]) for name in theirs}
    assert max(gaps.values()) < 1e-4, gaps
    assert all(g.abs().max() > 0 for g in theirs.values()), (
        "a gradient of zeros would compare nothing"
    )


# Forward and backward ----------------------------------------------------------------------------


@every_case
@every_seed
@pytest.mark.parametrize("padding", ["no_mask", "left", "right"])
def test_logits_and_router_logits_equal_transformers(case, seed, padding):
    """Within 1e-5 of the largest, at every position that is no padding, on both paths of the
    experts."""
    model, reference = make_pair(seed, case)
    ids, mask = make_batch(seed, padding)
    theirs = reference(ids, attention_mask=mask, output_router_logits=True)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for path in ("loop", "grouped"):
        set_path(model, path)
        ours = model(ids, mask)
        assert gap(ours.logits[real], theirs.logits[real]) < 1e-5
        assert len(ours.routings) == len(theirs.router_logits) == TINY["num_hidden_layers"]
        for routing, router_logits in zip(ours.routings, theirs.router_logits, strict=True):
            assert gap(routing.router_logits[real.flatten()], router_logits[real.flatten()]) < 1e-5


@every_case
@pytest.mark.parametrize("path", ["loop", "grouped"])
@pytest.mark.parametrize(
    ("seed", "padding"), [(0, "no_mask"), (1, "left"), (2, "right"), (3, "left")]
)
def test_the_gradient_of_every_parameter_equals_transformers(case, path, seed, padding):
    """The loss is that of transformers, where some tokens are labelled and others are not;
    gradients within 1e-4."""
    model, reference = make_pair(seed, case)
    set_path(model, path)
    ids, mask = make_batch(seed, padding)
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    if (
        mask is not None
    ):  # a text's first token has padding before it, or nothing: there is no position to predict it
        hidden = hidden | (mask == 0) | (F.pad(mask, (1, -1)) == 0)
    labels = ids.masked_fill(hidden, -100)

    theirs = reference(ids, attention_mask=mask, labels=labels).loss
    ours = model(ids, mask, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    assert_equal_gradients(model, reference)


@pytest.mark.parametrize("case", ["olmoe", "olmoe_renormalised_and_clipped", "mixtral", "qwen3"])
@pytest.mark.parametrize("padding", ["no_mask", "left", "right"])
def test_the_balance_loss_trains_one_layer_as_transformers_does(case, padding):
    """On one layer transformers adds coefficient * K * our balance loss: the same loss and the same
    gradients."""
    reference = make_reference(
        5, **CASES[case] | {"num_hidden_layers": 1, "router_aux_loss_coef": 0.3}
    )
    model = make_ours(reference)
    ids, mask = make_batch(5, padding)
    labels = (
        ids if mask is None else ids.masked_fill((mask == 0) | (F.pad(mask, (1, -1)) == 0), -100)
    )
    theirs = reference(ids, attention_mask=mask, labels=labels, output_router_logits=True).loss
    out = model(ids, mask, labels=labels)
    c = model.config
    ours = out.loss + c.router_aux_loss_coef * c.num_experts_per_tok * load_balancing_loss(
        out.routings[0], mask
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.item() > out.loss.item() + 0.1, "the balance loss is a part that shows"
    theirs.backward()
    ours.backward()
    assert_equal_gradients(model, reference)


def test_clipping_is_at_work_in_the_clipped_case():
    """The comparison above would say nothing about clip_qkv if no query, key or value reached the
    limit."""
    model, _ = make_pair(0, "olmoe_renormalised_and_clipped")
    ids, _ = make_batch(0, "no_mask")
    clipped = model(ids).logits
    for block in model.layers:
        block.self_attn.clip_qkv = None
    assert gap(clipped, model(ids).logits) > 1e-2


@pytest.mark.parametrize("case", ["olmoe", "mixtral", "qwen3"])
def test_what_stands_in_the_padding_changes_nothing(case):
    """A text alone, padded left, padded right, and with other tokens in the padding: the same
    logits, and no NaN."""
    model, _ = make_pair(1, case)
    text = torch.randint(1, 83, (1, 7))
    alone = model(text).logits
    for fill in (0, 82):
        padding, seen, unseen = (
            torch.full((1, 4), fill),
            torch.ones(1, 7).long(),
            torch.zeros(1, 4).long(),
        )
        left = model(torch.cat((padding, text), 1), torch.cat((unseen, seen), 1)).logits
        right = model(torch.cat((text, padding), 1), torch.cat((seen, unseen), 1)).logits
        assert gap(left[:, 4:], alone) < 1e-5 and gap(right[:, :7], alone) < 1e-5
        assert left.isfinite().all() and right.isfinite().all()


def test_the_examples_of_the_mask_and_of_the_labels_are_what_the_code_does():
    """model.py draws which keys three tokens see, and says what is predicted where."""
    sees, positions = model_file.visible_keys, torch.arange(3)
    assert sees(positions, 3, None)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    padded = torch.tensor([[0, 1, 1]])
    assert sees(positions, 3, padded)[0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert sees(positions[2:], 3, padded)[0, 0].tolist() == [[0, 1, 1]]  # the others are cached
    labels = torch.tensor([[7, -100, 8, 9]])
    targets = model_file.find_targets(labels, torch.device("cpu"))
    assert [t.tolist() for t in targets] == [[1, 2], [8, 9]]


def test_the_loss_is_the_mean_over_the_labelled_tokens():
    """By hand: position t predicts token t + 1, -100 does not count, and the first token is
    predicted by nobody."""
    model, _ = make_pair(2, "olmoe")
    ids, _ = make_batch(2, "no_mask")
    labels = torch.full_like(ids, -100)
    labels[0, [0, 3]], labels[2, 11] = ids[0, [0, 3]], ids[2, 11]
    log_probs = model(ids).logits.log_softmax(-1)
    by_hand = -(log_probs[0, 2, ids[0, 3]] + log_probs[2, 10, ids[2, 11]]) / 2
    assert model(ids, labels=labels).loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


ALL_EXPERTS = ["mixtral_one_key_head_all_experts", "qwen3_key_heads_as_query_heads_all_experts"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ALL_EXPERTS)
def test_sixteen_bit_logits_are_those_of_transformers_but_for_rounding(dtype, case):
    """All experts take part, so that no choice can flip: our 16-bit logits are as near to float32
    as theirs are."""
    model, reference = make_pair(0, case)
    ids, _ = make_batch(0, "no_mask")
    exact = model(ids).logits
    for p in reference.parameters():
        p.data = p.data.to(dtype)  # not its rotary frequencies: they stay in float32, as on loading
    ours, theirs = model.to(dtype)(ids).logits.float(), reference(ids).logits.float()
    assert gap(ours, exact) < 1.5 * gap(theirs, exact)


# Sizes -------------------------------------------------------------------------------------------

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("config", "tensors", "total", "idle_experts"),
    [
        (OLMOE_1B_7B, 3219, 6_919_161_856, 56),
        (MIXTRAL_8X7B, 995, 46_702_792_704, 6),
        (QWEN3_30B_A3B, 18_867, 30_532_122_624, 120),
    ],
    ids=["OLMoE-1B-7B", "Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_the_published_models_have_as_many_tensors_and_parameters_as_their_files(
    config, tensors, total, idle_experts
):
    """Counts of the files on the hub; active: the same less the experts that a token does not
    meet."""
    with torch.device("meta"):
        model = MoETransformer(hub.make_config(config, Config))
    shapes = [place.shape for place in hub.places(model).values()]
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == sum(p.numel() for p in model.parameters()) == total
    expert = 3 * config["hidden_size"] * model.config.intermediate_size
    idle = config["num_hidden_layers"] * idle_experts * expert
    assert active_parameters(model.config) == total - idle


def test_python_model_py_prints_what_is_in_a_folder(tmp_path, monkeypatch, capsys):
    """python model.py FOLDER: the configuration and the counts."""
    model, _ = make_pair(0, "mixtral")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["model.py", str(tmp_path)])
    main()
    text = capsys.readouterr().out
    total = sum(p.numel() for p in model.parameters())
    assert json.loads(text[: text.rindex("}") + 1])["num_local_experts"] == 4
    active = active_parameters(model.config)
    assert f"{total:,} parameters, {active:,} active" in text


# Generation --------------------------------------------------------------------------------------


def make_prompts(seed, lengths=(3, 8, 1, 5)):
    generator = torch.Generator().manual_seed(200 + seed)
    return [
        torch.randint(1, TINY["vocab_size"], (n,), generator=generator).tolist() for n in lengths
    ]


def generate_with_transformers(reference, prompts, max_new_tokens, num_beams, eos_ids):
    """The new ids of each prompt before its first eos, from a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {
        "do_sample": False,
        "num_beams": num_beams,
        "pad_token_id": 0,
        "eos_token_id": eos_ids or None,
    }
    new = reference.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)[
        :, longest:
    ].tolist()
    return [
        row[: min(row.index(e) if e in row else len(row) for e in (*eos_ids, None))] for row in new
    ]


@every_case
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize(("seed", "num_eos"), [(0, 0), (1, 1), (2, 2), (3, 1)])
def test_generated_tokens_equal_transformers(case, num_beams, seed, num_eos):
    """Token for token, greedily and with 4 beams, for prompts of several lengths of which some meet
    an early eos."""
    model, reference = make_pair(seed, case)
    prompts, length = make_prompts(seed), 10
    free = generate_with_transformers(reference, prompts, length, num_beams, [])
    eos_ids = [free[0][4], free[1][2]][
        :num_eos
    ]  # ids that are likely here, so that they do come up
    theirs = generate_with_transformers(reference, prompts, length, num_beams, eos_ids)
    model.config.eos_token_id = eos_ids if num_eos == 2 else eos_ids[0] if eos_ids else None
    ours = model.generate(prompts, length, num_beams=num_beams)
    assert ours == theirs
    assert num_eos or all(len(row) == length for row in ours)
    assert num_beams > 1 or not num_eos or len(ours[0]) <= 4, "the eos does come up"


@pytest.mark.parametrize("case", ["olmoe", "mixtral", "qwen3"])
@pytest.mark.parametrize("seed", [1, 2, 4])
@pytest.mark.parametrize("num_beams", [2, 4, 8])
def test_prompts_that_end_at_different_times_equal_transformers(case, seed, num_beams):
    """As eos the three tokens that come up at most places: beams finish, compete with running ones,
    and are kept."""
    model, reference = make_pair(seed, case)
    prompts = make_prompts(seed, lengths=(3, 8, 1, 5, 2, 6))
    free = model.generate(prompts, 12, num_beams=num_beams)
    places = {
        token: {row.index(token) for row in free if token in row}
        for token in range(TINY["vocab_size"])
    }
    model.config.eos_token_id = sorted(places, key=lambda token: len(places[token]))[-3:]
    ours = model.generate(prompts, 12, num_beams=num_beams)
    assert ours == generate_with_transformers(
        reference, prompts, 12, num_beams, model.config.eos_ids
    )
    assert len({len(row) for row in ours}) > 1, "they do end at different times"


@every_case
@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_generates_what_its_prompts_generate_alone(case, num_beams):
    """Neighbours and padding change nothing; a tensor of prompts is taken like a list."""
    model, _ = make_pair(3, case)
    prompts = make_prompts(3)
    model.config.eos_token_id = model.generate(prompts[:1], 6)[0][-1]
    together = model.generate(prompts, 8, num_beams=num_beams)
    assert together == [model.generate([p], 8, num_beams=num_beams)[0] for p in prompts]
    assert together[1:2] == model.generate(torch.tensor(prompts[1:2]), 8, num_beams=num_beams)


@every_case
@torch.no_grad()
def test_the_cache_changes_no_logits(case):
    """Fed in pieces of 5, 1, 1, 3, 2 tokens beside padding, the model gives the logits of one run
    over all."""
    model, _ = make_pair(4, case)
    ids, mask = make_batch(4, "left")
    whole, cache, pieces = (
        model(ids, mask).logits,
        KVCache(model.config, 3, 12, model.norm.weight),
        [],
    )
    for piece in ids.split([5, 1, 1, 3, 2], dim=1):
        seen = mask[:, : cache.used + piece.shape[1]]
        pieces.append(model(piece, seen, cache=cache).logits)
    assert gap(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()]) < 1e-5
    assert gap(model(ids, mask, last_only=True).logits, whole[:, -1:]) < 1e-6


@every_case
@torch.no_grad()
def test_greedy_generation_equals_running_the_whole_text_again_for_every_token(case):
    model, _ = make_pair(5, case)
    (prompt,) = make_prompts(5, lengths=(6,))
    text = list(prompt)
    for _ in range(10):
        text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
    assert model.generate([prompt], 10) == [text[6:]]


def frequencies(model, prompt, draws, **options):
    """How often each token was drawn first, (V,), and the model's own logits there."""
    drawn = torch.tensor(model.generate([prompt] * draws, 1, **options))[:, 0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    return drawn.bincount(minlength=TINY["vocab_size"]) / draws, logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    """6,000 draws: each token's share within 5 standard deviations of softmax(logits /
    temperature)."""
    model, _ = make_pair(0, "olmoe")
    share, logits = frequencies(model, [5, 6, 7], 6000, temperature=temperature, seed=1)
    probs = (logits / temperature).softmax(-1)
    assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / 6000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_top_p_draws_from_the_head_alone_and_in_its_proportions(top_p):
    """The tokens that may come are those that transformers' TopPLogitsWarper keeps, in the same
    proportions."""
    from transformers.generation.logits_process import TopPLogitsWarper

    model, _ = make_pair(0, "olmoe")
    share, logits = frequencies(model, [5, 6, 7], 6000, temperature=1.5, top_p=top_p, seed=2)
    kept = TopPLogitsWarper(top_p)(None, logits[None] / 1.5)[0].softmax(-1)
    assert share[kept == 0].sum() == 0 and 1 <= (kept > 0).sum() < TINY["vocab_size"]
    assert ((share - kept).abs() <= 5 * (kept * (1 - kept) / 6000).sqrt() + 1e-4).all()


def test_a_seed_decides_what_is_drawn():
    """The same seed draws the same, another seed something else, and torch's own generator is left
    alone."""
    model, _ = make_pair(0, "mixtral")
    state = torch.get_rng_state()
    draws = [
        model.generate(make_prompts(0), 12, temperature=1.0, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_almost_cold_draw_is_greedy():
    """At temperature 1e-6, and at the smallest top_p, only the likeliest token is left."""
    model, _ = make_pair(1, "mixtral")
    greedy = model.generate(make_prompts(1), 8)
    assert model.generate(make_prompts(1), 8, temperature=1e-6, seed=0) == greedy
    assert model.generate(make_prompts(1), 8, temperature=1.0, top_p=1e-6, seed=0) == greedy


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was_also_after_an_error(num_beams, training):
    """Dropout of a model that was training goes on after it spoke, and after it could not."""
    model, _ = make_pair(1, "olmoe")
    model.train(training)
    model.generate(make_prompts(1), 2, num_beams=num_beams)
    assert model.training == model.layers[0].training == training
    for prompts, length in (([[83]], 2), ([[1]], 64)):
        with pytest.raises(ValueError):
            model.generate(prompts, length, num_beams=num_beams)
        assert model.training == model.layers[0].training == training


@pytest.mark.parametrize("num_beams", [1, 4])
def test_no_new_tokens_are_an_empty_list_for_each_prompt(num_beams):
    model, _ = make_pair(1, "olmoe")
    assert model.generate(make_prompts(1), 0, num_beams=num_beams) == [[], [], [], []]


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "new", "options", "words"),
    [
        ([[1] * 65], 1, {}, ["66", "64 positions"]),
        ([[1, 2, 3]], 62, {}, ["65", "64 positions"]),
        ([[1, 2, 3]], 62, {"num_beams": 4}, ["65", "64 positions"]),
        ([[1, 83]], 2, {}, ["83", "vocabulary", "0..82"]),
        ([[4], [-1, 2]], 2, {"num_beams": 4}, ["-1", "vocabulary", "0..82"]),
        ([[1], []], 2, {}, ["at least one token"]),
        ([], 2, {}, ["at least one prompt"]),
        ([[1]], 2, {"num_beams": 4, "temperature": 1.0}, ["beam", "temperature"]),
        ([[1]], 2, {"temperature": 1.0, "top_p": 0.0}, ["top_p"]),
        ([[1]], 2, {"temperature": -1.0}, ["temperature"]),
        ([[1]], 2, {"num_beams": 0}, ["num_beams"]),
    ],
)
def test_generate_refuses_what_it_cannot_do_in_one_line(prompts, new, options, words):
    """A ValueError of one line that names the value and the limit."""
    model, _ = make_pair(0, "olmoe")
    with pytest.raises(ValueError) as error:
        model.generate(prompts, new, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_model_refuses_ids_and_lengths_that_it_does_not_have():
    """A ValueError, not an index error; 64 positions and the ids 0..82 themselves are fine."""
    model, _ = make_pair(0, "olmoe")
    assert model(torch.full((1, 64), 82)).logits.shape == (1, 64, 83)
    with pytest.raises(ValueError, match="65 tokens is longer than the model's 64 positions"):
        model(torch.ones(1, 65).long())
    for bad in (83, -1):
        with pytest.raises(
            ValueError, match=f"token id {bad} is outside the model's vocabulary 0..82"
        ):
            model(torch.tensor([[1, bad, 2]]))
    cache = KVCache(model.config, 1, 64, model.norm.weight)
    model(torch.ones(1, 60).long(), cache=cache)
    with pytest.raises(ValueError, match="65 tokens"):
        model(torch.ones(1, 5).long(), cache=cache)


@pytest.mark.parametrize("chunk", [1024, 10])
def test_labels_choose_the_rows_of_the_head(monkeypatch, chunk):
    """With labels the logits of the other positions are never made, and no more at a time than a
    chunk holds: the output has a loss and no logits."""
    model, _ = make_pair(0, "olmoe")
    ids, mask = make_batch(0, "right")
    rows, chunk_loss = [], model_file.chunk_loss

    def counted(x, *rest):
        rows.append(len(x))
        return chunk_loss(x, *rest)

    def forbidden(module, args, out):
        rows.append("all")

    monkeypatch.setattr(model_file, "CHUNK", chunk)
    monkeypatch.setattr(model_file, "chunk_loss", counted)
    hook = model.lm_head.register_forward_hook(forbidden)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, mask, labels=labels)
    hook.remove()
    assert out.logits is None and sum(rows) == sum(LENGTHS) - len(LENGTHS)
    assert max(rows) == min(chunk, sum(rows))
    full = model(ids, mask).logits[:, :-1].flatten(0, 1)
    assert out.loss.item() == pytest.approx(
        F.cross_entropy(full, labels[:, 1:].flatten()).item(), rel=1e-5
    )
