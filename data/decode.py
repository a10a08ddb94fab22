"""From logits to text: batched prompts of any lengths, a cache of keys and values; greedy, sampling, beam search.

Prompts are padded on the left, so that their next tokens share a column; `MoETransformer.generate` is the way in.
Shapes: B prompts, W beams of each, V vocabulary, T time, S keys in the cache.
"""

import torch
import torch.nn.functional as F

from model import KVCache, MoETransformer


class Decoder:
    """Prompts of different lengths, padded on the left so that their next tokens share a column, and their KV cache."""

    def __init__(self, model: MoETransformer, prompts: list[list[int]], max_new_tokens: int):
        self.model, longest, device = model, max(map(len, prompts)), model.norm.weight.device
        model.check_input(torch.tensor([i for p in prompts for i in p]), longest + max_new_tokens)
        self.ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + max_new_tokens) for p in prompts])
        self.mask = self.mask.to(device)  # (B, S), already as long as it will be
        self.cache = KVCache(model.config, len(prompts), self.mask.shape[1], model.norm.weight)

    def next_logits(self) -> torch.Tensor:
        """Feed `ids` (the prompts, later one new token a row) -> logits of the next token (B, V), float32."""
        mask = self.mask[:, : self.cache.used + self.ids.shape[1]]
        return self.model(self.ids, mask, cache=self.cache, last_only=True).logits[:, -1].float()

    def select(self, rows):
        self.mask = self.mask.index_select(0, rows)
        self.cache.select(rows)


@torch.no_grad()
def sample(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None) -> list[list[int]]:
    """One continuation a prompt, the likeliest token each time (temperature 0) or drawn."""
    decoder = Decoder(model, prompts, max_new_tokens)
    eos = torch.tensor(model.config.eos_ids, dtype=torch.int64, device=decoder.ids.device)
    generator = None if seed is None else torch.Generator(decoder.ids.device).manual_seed(seed)
    done, new = torch.zeros(len(prompts), dtype=torch.bool, device=eos.device), []
    for _ in range(max_new_tokens):
        logits = decoder.next_logits()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
            probs[probs.cumsum(-1) - probs >= top_p] = 0  # mass before this token already reaches top_p
            token = ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]
        new.append(token)
        decoder.ids = token[:, None]
        done |= torch.isin(token, eos)
        if done.all():
            break
    return [before_eos(list(row), model.config.eos_ids) for row in zip(*(t.tolist() for t in new), strict=True)]


def before_eos(ids: list[int], eos_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return ids[:end]


@torch.no_grad()
def beam_search(model, prompts, max_new_tokens, num_beams, length_penalty=1.0) -> list[list[int]]:
    """The best of `num_beams` continuations a prompt, by sum of log-probabilities / length^length_penalty.

    transformers' rules, token for token (early_stopping=False): a step keeps the best 2W candidates; those among the
    best W that end are finished; the best W that do not end go on; a prompt is done when its best running beam, at its
    present length, scores below its worst finished one.
    """
    B, W, V = len(prompts), num_beams, model.config.vocab_size
    decoder = Decoder(model, prompts, max_new_tokens)
    device, eos = decoder.ids.device, torch.tensor(model.config.eos_ids, dtype=torch.int64, device=decoder.ids.device)
    keep = max(2, 1 + len(eos)) * W  # so many that W remain even if every end token shows up behind every beam
    first_row = torch.arange(B, device=device)[:, None] * W  # (B, 1)
    running = torch.zeros(B, W, 0, dtype=torch.int64, device=device)
    scores = torch.full((B, W), -1e9, device=device)
    scores[:, 0] = 0  # all beams start equal: let only one of them branch at the first step
    best = torch.zeros(B, W, max_new_tokens, dtype=torch.int64, device=device)  # finished, padded with eos
    best_scores = torch.full((B, W), -1e9, device=device)
    hopeful = torch.ones(B, 1, dtype=torch.bool, device=device)
    for length in range(1, max_new_tokens + 1):
        logits = decoder.next_logits()
        if length == 1:  # the prompt was run once; from here on W rows a prompt
            decoder.select(torch.arange(B, device=device).repeat_interleave(W))
            logits = logits.repeat_interleave(W, dim=0)
        total = (logits.log_softmax(-1).view(B, W, V) + scores[:, :, None]).view(B, W * V)
        total, candidate = total.topk(keep)  # (B, keep)
        beam, token = candidate // V, candidate % V
        grown = torch.cat((running.gather(1, beam[..., None].expand(-1, -1, length - 1)), token[..., None]), dim=-1)
        ended = torch.isin(token, eos) | (length == max_new_tokens)

        scores, chosen = (total - 1e9 * ended).topk(W)
        running = grown.gather(1, chosen[..., None].expand(-1, -1, length))
        decoder.ids = running[:, :, -1].reshape(B * W, 1)
        decoder.select((first_row + beam.gather(1, chosen)).flatten())

        finished = ended & hopeful
        finished[:, W:] = False
        new_scores = total / length**length_penalty - 1e9 * ~finished
        padded = F.pad(grown, (0, max_new_tokens - length), value=model.config.eos_ids[0] if len(eos) else 0)
        best_scores, chosen = torch.cat((best_scores, new_scores), dim=1).topk(W)
        best = torch.cat((best, padded), dim=1).gather(1, chosen[..., None].expand(-1, -1, max_new_tokens))
        hopeful = hopeful & (scores[:, :1] / length**length_penalty > best_scores[:, -1:])
        if ended.all() or not hopeful.any():
            break
    return [before_eos(row, model.config.eos_ids) for row in best[:, 0].tolist()]
