"""From logits to text: a cache of keys and values; greedy decoding, sampling and beam search.

    greedy     the likeliest next token, again and again
    sampling   a token drawn from softmax(logits / temperature), or from the head of it (top_p)
    beams      the W likeliest texts, all continued at every step

Prompts of different lengths are padded on the left, so that their next tokens share a column. Two
prompts of 4 and 2 tokens ("." is padding, which the mask hides):

    the  dog  will  see
     .    .   once  upon

This file knows no model. What it is handed has a `config`, `check_input` and `norm.weight` (whose
dtype and device are the cache's), and is called as `MoETransformer` is; `MoETransformer.generate`
is the way in.

Shapes: B prompts, W beams of each, V vocabulary, T time, S keys in the cache, C channels of a head.
"""

from itertools import takewhile
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


class KVCache:
    """Keys and values of all layers for tokens already seen: a new token costs one row, not T."""

    def __init__(self, config, batch, length, like):
        """Room for `length` tokens of `batch` texts, in the dtype and on the device of `like`."""
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2, batch, heads, length, config.head_dim)
        self.stored = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.used = 0  # tokens that all layers have seen; the model moves it once a forward

    def append(self, layer, k, v):
        """Store k, v (B, heads, T, C) behind what is there; return all S of the layer."""
        end = self.used + k.shape[2]
        seen = self.stored[layer, ..., :end, :]  # (2, B, H, S, C)
        seen[..., self.used :, :] = torch.stack((k, v))
        return seen.unbind()

    def select(self, rows):
        """Keep these batch rows, in this order (a beam search follows some and drops others)."""
        self.stored = self.stored.index_select(2, rows)


class Decoder:
    """A batch of prompts, padded on the left, and what the model has computed for them so far."""

    def __init__(self, model, prompts, max_new_tokens):
        """ValueError for ids that the model does not have, and for more tokens than positions."""
        ids = padded(prompts)
        mask = padded([[1] * (len(prompt) + max_new_tokens) for prompt in prompts])
        model.check_input(ids, mask.shape[1])

        like = model.norm.weight
        self.model = model
        self.ids = ids.to(like.device)  # (B, T): what the model reads next
        self.mask = mask.to(like.device)  # (B, S), already as long as it will be
        self.cache = KVCache(model.config, *mask.shape, like)

    def next_logits(self):
        """Run `ids` (the prompts, later one token a row) -> logits of the next (B, V), float32."""
        mask = self.mask[:, : self.cache.used + self.ids.shape[1]]
        out = self.model(self.ids, mask, cache=self.cache, last_only=True)
        return out.logits[:, -1].float()

    def select(self, rows):
        """Go on with these rows, in this order; a row may be taken several times."""
        self.mask = self.mask.index_select(0, rows)
        self.cache.select(rows)


def padded(rows):
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")


def before_eos(ids, eos_ids):
    return list(takewhile(lambda token: token not in eos_ids, ids))


# One text a prompt --------------------------------------------------------------------------------

COLDEST = 1e-30  # below, logits / temperature may be infinite; long before, one token has all mass


@torch.no_grad()
def sample(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None):
    """A continuation of each prompt: the likeliest tokens (temperature 0), or tokens drawn."""
    decoder = Decoder(model, prompts, max_new_tokens)
    generator = None  # torch's own
    if seed is not None:
        generator = torch.Generator(decoder.ids.device).manual_seed(seed)
    eos = decoder.ids.new_tensor(model.config.eos_ids)
    new = decoder.ids[:, :0]
    for _ in range(max_new_tokens):
        logits = decoder.next_logits()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = draw(logits / max(temperature, COLDEST), top_p, generator)
        decoder.ids = token
        new = torch.cat((new, token), dim=1)
        if torch.isin(new, eos).any(dim=1).all():
            break
    return [before_eos(row, model.config.eos_ids) for row in new.tolist()]


def draw(logits, top_p, generator):
    """Logits (B, V) -> a token a row (B, 1), from the fewest whose probabilities reach top_p."""
    probs, ids = logits.softmax(-1).sort(descending=True)
    mass_before = probs.cumsum(-1) - probs
    tail = mass_before >= top_p
    tail[:, 0] = False  # however small top_p is, the likeliest may come
    place = torch.multinomial(probs.masked_fill(tail, 0), 1, generator=generator)
    return ids.gather(-1, place)


# W texts a prompt ---------------------------------------------------------------------------------


class Beam(NamedTuple):
    """One continuation of a prompt."""

    ids: list[int]
    score: float  # the sum of its tokens' log-probabilities
    mean: float  # the same, divided by their number
    row: int  # where in the decoder's batch its last token was predicted


def grow(running, logits, length, keep):
    """Continue each beam by every token -> of each prompt the `keep` best, best first.

    running: for each of B prompts its beams, equally many. logits: of their next tokens (B*W, V).
    length: of what comes out.
    """
    B, W, V = len(running), len(running[0]), logits.shape[-1]
    before = logits.new_tensor([beam.score for beam in sum(running, [])])  # (B*W,)
    scores = before[:, None] + logits.log_softmax(-1)
    # of a prompt's W * V candidates, beam w continued by a token stands at w * V + token
    best, places = scores.view(B, W * V).topk(min(keep, W * V))
    scores, means, places = best.tolist(), (best / length).tolist(), places.tolist()
    grown = []
    for b, beams in enumerate(running):
        candidates = []
        for score, mean, place in zip(scores[b], means[b], places[b]):
            w, token = divmod(place, V)
            candidates.append(Beam([*beams[w].ids, token], score, mean, row=b * W + w))
        grown.append(candidates)
    return grown


@torch.no_grad()
def beam_search(model, prompts, max_new_tokens, num_beams):
    """The best of W continuations a prompt, by the mean log-probability of its tokens.

    transformers' rules, token for token (early_stopping=False, length_penalty=1): a step keeps the
    best 2W candidates; those among the best W that end are finished; the best W that do not end go
    on; a prompt is done when its best running beam is worse than its worst finished one.
    """
    decoder = Decoder(model, prompts, max_new_tokens)
    eos_ids = model.config.eos_ids
    W = num_beams
    keep = max(2, 1 + len(eos_ids)) * W  # so W go on even if every beam's best tokens are ends
    running = [[Beam([], 0.0, 0.0, 0)] for _ in prompts]  # one each, empty, which will branch
    finished = [[] for _ in prompts]  # at most W of each, best first
    hopeful = [True] * len(prompts)  # may a running beam still win?

    def has_ended(beam):
        return beam.ids[-1] in eos_ids

    for length in range(1, max_new_tokens + 1):
        grown = grow(running, decoder.next_logits(), length, keep)
        for b, candidates in enumerate(grown):
            running[b] = [beam for beam in candidates if not has_ended(beam)][:W]
            if not hopeful[b]:
                continue  # its rows are run on, as part of the batch

            ended = candidates[:W]
            if length < max_new_tokens:
                ended = filter(has_ended, ended)
            finished[b] = sorted([*finished[b], *ended], key=lambda beam: -beam.mean)[:W]
            if len(finished[b]) == W:
                hopeful[b] = running[b][0].mean > finished[b][-1].mean
        if not any(hopeful):
            break

        beams = sum(running, [])
        decoder.select(decoder.ids.new_tensor([beam.row for beam in beams]))
        decoder.ids = decoder.ids.new_tensor([beam.ids[-1:] for beam in beams])
    return [before_eos(beams[0].ids, eos_ids) for beams in finished]
