"""data/decode.py by itself, on a model that is a table of logits: what it must do where numbers run
out, and that enough beams find what trying all texts finds. Against transformers: test_model.py."""

import ast
import inspect
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from data import decode

V = 5


class Table:
    """A model whose next token depends on the last one alone: logits (V, V), row by row."""

    def __init__(self, seed, eos_ids=()):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(V, V, generator=generator) * 3
        self.norm = SimpleNamespace(weight=torch.ones(1))
        sizes = {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 1}
        self.config = SimpleNamespace(eos_ids=list(eos_ids), **sizes)

    def check_input(self, ids, length):
        assert 0 <= ids.min() and ids.max() < V

    def __call__(self, ids, mask, cache, last_only):
        cache.used += ids.shape[1]
        assert last_only and mask.shape == (len(ids), cache.used)
        return SimpleNamespace(logits=self.logits[ids[:, -1:]])


PROMPTS = [[1, 2, 3], [4], [0, 0]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-45, 1e-50, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_coldest_draw_is_greedy(temperature, top_p):
    """Down to the smallest number that Python has: float32 knows none below 1e-45, and logits
    divided by so little are infinite."""
    model = Table(0)
    greedy = decode.sample(model, PROMPTS, 6)
    assert decode.sample(model, PROMPTS, 6, temperature, top_p, seed=1) == greedy


@pytest.mark.parametrize("top_p", [1e-6, 1e-45, 5e-324])
def test_the_smallest_head_is_the_likeliest_token(top_p):
    model = Table(1)
    greedy = decode.sample(model, PROMPTS, 6)
    assert decode.sample(model, PROMPTS, 6, 1.0, top_p, seed=1) == greedy


@pytest.mark.parametrize("seed", range(5))
def test_enough_beams_find_the_likeliest_of_all_texts(seed):
    """With V^2 beams nothing is lost in 3 steps: the best of all V^3 texts, tried one by one."""
    model = Table(seed)
    log_probs = model.logits.log_softmax(-1)

    def score(prompt, text):
        steps = zip([prompt[-1], *text], text)
        return sum(log_probs[before, token].item() for before, token in steps)

    texts = [list(text) for text in product(range(V), repeat=3)]
    best = [max(texts, key=lambda text, p=prompt: score(p, text)) for prompt in PROMPTS]
    assert decode.beam_search(model, PROMPTS, 3, num_beams=V * V) == best


def test_more_beams_than_tokens_are_no_error():
    model = Table(2, eos_ids=[3])
    assert decode.beam_search(model, PROMPTS, 4, num_beams=3 * V)


def test_the_file_imports_nothing_of_ours():
    tree = ast.parse(inspect.getsource(decode))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    assert {name.split(".")[0] for name in names} == {"itertools", "torch", "typing"}
