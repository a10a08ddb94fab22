"""Text to token ids and back: byte pair encoding, read from a checkpoint's tokenizer.json and run by tiktoken.

A byte pair encoding (BPE) is a list of merges, in the order in which they were learned: first "h e" -> "he", later
"t he" -> "the", later still " the". To encode, text is cut into words; a word starts as single symbols; and as long as
some neighbours can be joined, the pair whose merge is the oldest is joined, the leftmost such pair first.

How ranks work. tiktoken keeps no list of merges. It is given one table {piece: rank} and joins the neighbours whose
JOINED bytes have the lowest rank. For a tokenizer that was learned merge by merge this is the same thing: a piece has
one recipe, because its own bytes, encoded with the older merges only, always end in the same two parts. So the rank
of a piece is the position of its merge; and where ids were handed out in merge order, the id serves as the rank.

Two layouts are read, and everything else is refused:

    byte-level       OLMoE, GPT-NeoX and train_bpe below: symbols are the 256 bytes; text is cut by a regular expression
                     that leaves a space at the front of its word ("a cat" -> "a", " cat"); the id is the rank.
    sentencepiece    Mixtral: symbols are characters; one outside the vocabulary falls back to its UTF-8 bytes; nothing
                     cuts the text; a space is written U+2581, and one is put before the text. Ids are not in merge
                     order, so the ranks are our own and a table takes them to ids.

What differs from the `tokenizers` library, which wrote the files: the ids are equal, in about a fifth of the time, but
special tokens (<s>, <|endoftext|>, OLMoE's |||IP_ADDRESS|||) are never found in a user's text, where they are so many
letters; no BOS or EOS is added (`bos_id` and `eos_id` are the caller's to place); no offsets, padding or truncation.
NFC, which puts accents in order, is Python's; the library's is of 2016 and does not know the few dozen rarest marks.
A limit: an unbroken run of half a million newlines is too much for tiktoken's regular expressions, which panic.

    python data/tokenizer.py                       the tokenizer of data/tiny_olmoe, and a sentence
    python data/tokenizer.py FOLDER "some text"    ids, pieces, and the text they decode to
"""

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from operator import index
from pathlib import Path

import tiktoken

# ------------------------------------------------------------------------------------------------- the byte alphabet

# JSON holds characters, not bytes. GPT-2's way out: a byte whose Latin-1 character is visible is written as itself, and
# the other 68 (space, controls, ...) as U+0100, U+0101, ... in turn. So a space is "Ġ" and a newline "Ċ".
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTER = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
BYTE = {ord(letter): byte for byte, letter in LETTER.items()}  # the way back, in the form that str.translate takes


def spell(data: bytes) -> str:
    """Write bytes in the byte alphabet: b" the" -> "Ġthe"."""
    return "".join(LETTER[byte] for byte in data)


def unspell(piece: str) -> bytes:
    """Read a piece of the byte alphabet: "Ġthe" -> b" the"."""
    return piece.translate(BYTE).encode("latin-1")


# --------------------------------------------------------------------------------------- what both tokenizers share

# The names special tokens go by, the likelier first; a config.json that gives the id has the last word.
SPECIAL_NAMES = {"bos": ("<s>",), "eos": ("<|endoftext|>", "</s>"), "pad": ("<|padding|>",)}


def special_id(role: str, config: dict, added: dict[str, int]) -> int | None:
    """The id of "bos", "eos" or "pad" from config.json, else by its name among the added tokens, else None."""
    given = config.get(f"{role}_token_id")
    if isinstance(given, list):  # several ends of text: the first is the one to append
        given = given[0] if given else None
    return given if given is not None else next((added[name] for name in SPECIAL_NAMES[role] if name in added), None)


def is_plain_bpe(spec: dict) -> bool:
    """Whether the model is a BPE that joins symbols by its merges and does nothing else."""
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return False
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return False
    return isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)


def merged_pieces(model: dict) -> list[str]:
    """What the merges make, oldest first, each piece once. A merge is written "a b" or, since 2024, ["a", "b"]."""
    made = dict.fromkeys("".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
    unknown = next((piece for piece in made if piece not in model["vocab"]), None)
    if unknown is not None:
        raise ValueError(f"a merge makes {unknown!r}, which the vocabulary lacks")
    return list(made)


class Tokenizer:
    """A tiktoken encoding, the table from ids back to bytes, and the ids of the special tokens.

    `pieces[i]` is what the id i stands for, in bytes (None where the file leaves a gap); `vocab_size` is the largest
    id + 1, and may be less than the model's embedding has rows. `bos_id`, `eos_id`, `pad_id` are None where unknown.
    """

    def __init__(self, spec: dict, config: dict, pattern: str, ranked: list, pieces: dict[int, bytes]):
        """`ranked`: pairs (bytes, id), single bytes first, then merge order; `pieces`: id -> bytes but added tokens."""
        tokens = spec.get("added_tokens") or []
        pieces = pieces | {token["id"]: token["content"].encode() for token in tokens}
        self.vocab_size = max(pieces) + 1
        self.pieces = [pieces.get(i) for i in range(self.vocab_size)]

        added = {token["content"]: token["id"] for token in tokens}
        self.special_ids = {token["id"] for token in tokens if token["special"]}
        self.bos_id, self.eos_id, self.pad_id = (special_id(role, config, added) for role in ("bos", "eos", "pad"))
        if self.pad_id is None:
            self.pad_id = self.eos_id  # Mixtral has none; padding is masked out, so any token will do
        for role, i in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            if i is not None and not 0 <= i < self.vocab_size:
                raise ValueError(f"config.json has {role}_token_id {i}, but the vocabulary's size is {self.vocab_size}")

        in_id_order = all(a < b for a, b in pairwise(i for piece, i in ranked if len(piece) > 1))
        self.id_of_rank = None if in_id_order else [i for _, i in ranked]
        ranks = {piece: i if in_id_order else rank for rank, (piece, i) in enumerate(ranked)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def normalise(self, text: str) -> str:
        """What is done to a text before it is cut into words."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without BOS or EOS. The empty text has none."""
        ranks = self.bpe.encode_ordinary(self.normalise(text))  # "ordinary": no special token is looked for
        return ranks if self.id_of_rank is None else list(map(self.id_of_rank.__getitem__, ranks))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; bytes that are not UTF-8 (a character cut in half) become U+FFFD.

        Special tokens are left out unless `skip_special` is False. An id that stands for nothing is a ValueError.
        """
        shown = []
        for i in map(index, ids):  # index() takes NumPy's and PyTorch's integers too
            if not 0 <= i < self.vocab_size or self.pieces[i] is None:
                raise ValueError(f"token id {i} is not in the vocabulary, whose size is {self.vocab_size}")
            if not (skip_special and i in self.special_ids):
                shown.append(self.pieces[i])
        return b"".join(shown).decode("utf-8", errors="replace")


# ----------------------------------------------------------------------------------- byte-level: OLMoE, GPT-NeoX, ours


class ByteLevel(Tokenizer):
    """BPE over bytes, inside the words that GPT-2's regular expression cuts. Decodes to the NFC form of the text."""

    # English contractions, letters, digits, everything else; all but the contractions may begin with one space.
    WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"

    @staticmethod
    def reads(spec: dict) -> bool:
        cut = spec.get("pre_tokenizer") or {}
        is_gpt2_cut = cut.get("add_prefix_space") is False and cut.get("use_regex", True)
        return cut.get("type") == "ByteLevel" and is_gpt2_cut and spec.get("normalizer") in (None, {"type": "NFC"})

    def __init__(self, spec: dict, config: dict):
        vocab = spec["model"]["vocab"]
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        letters = [letter for letter in LETTER.values() if letter in vocab]
        if missing := {*range(256)} - {0xC0, 0xC1, *range(0xF5, 256)} - {BYTE[ord(letter)] for letter in letters}:
            raise ValueError(f"the vocabulary lacks bytes that text may hold: {sorted(missing)}")
        ranked = [(unspell(piece), vocab[piece]) for piece in letters + merged_pieces(spec["model"])]

        # OLMoE has an added token for each run of 2 to 24 spaces. The library cuts these out, the longest first, before
        # its regular expression is tried. Here they are the first branch of the expression (as special tokens tiktoken
        # would try them in no fixed order), and white space must not reach into a run. They come last in `ranked`, so
        # they shadow the pieces of two and more spaces that the merges make too: OLMoE's ids 245, 252, ...
        runs = {len(content): i for content, i in added.items() if content.strip(" ") == "" and len(content) > 1}
        if sorted(runs) != list(range(2, len(runs) + 2)):
            raise ValueError(f"the added tokens are runs of {sorted(runs)} spaces; supported: each length from 2 up")
        ranked += sorted(((b" " * length, i) for length, i in runs.items()), key=lambda run: run[1])
        run, blank = (f" {{2,{max(runs)}}}|", r"(?! {2})\s") if runs else ("", r"\s")
        # White space before a word stops one short: a last space goes with the word, a last newline stands alone.
        pattern = rf"{run}{self.WORDS}|(?:{blank}(?!\S))+|\s"

        pieces = {i: unspell(piece) for piece, i in vocab.items() if piece not in added}
        super().__init__(spec, config, pattern, ranked, pieces)
        self.nfc = spec.get("normalizer") is not None

    def normalise(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc and not text.isascii() else text


# ---------------------------------------------------------------------------------------------- sentencepiece: Mixtral

MARK = "\u2581"  # how sentencepiece writes a space


class SentencePiece(Tokenizer):
    """BPE over characters with byte fallback. Decodes to the text, except that U+2581 comes back as a space.

    tiktoken starts from bytes, so the characters are built first: each one of several bytes, and each beginning of
    one, ranks before all merges. A beginning that stays alone (its character is not in the vocabulary) has no id; it
    gets a negative one, which `encode` replaces by the ids of its bytes.
    """

    PREPEND = {"type": "Prepend", "prepend": MARK}
    REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    NORMALIZER = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}

    @staticmethod
    def reads(spec: dict) -> bool:
        normalizer, cut = spec.get("normalizer"), spec.get("pre_tokenizer")
        return bool(spec["model"].get("byte_fallback")) and normalizer == SentencePiece.NORMALIZER and cut is None

    def __init__(self, spec: dict, config: dict):
        vocab = spec["model"]["vocab"]
        added = {token["content"] for token in spec.get("added_tokens") or []}
        byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in byte_ids:
            raise ValueError(f"byte_fallback, but the vocabulary lacks <0x{byte_ids.index(None):02X}>")
        merged = merged_pieces(spec["model"])
        runs = [piece for piece in merged if not piece.strip(MARK)]
        words = merged[: len(merged) - len(runs)]
        if odd := next((piece for piece in words if not piece.strip(MARK) or MARK in piece.lstrip(MARK)), None):
            raise ValueError(f"the piece {odd!r}: supported are spaces in front, and runs of spaces as the last merges")

        ranked = [(bytes([byte]), i) for byte, i in enumerate(byte_ids)]
        self.beginnings = {}
        for character in (piece for piece in vocab if len(piece) == 1):
            data = character.replace(MARK, " ").encode()
            if len(data) == 1:
                ranked[data[0]] = (data, vocab[character])  # "a" is a piece: then <0x61> is never used
                continue
            for end in range(2, len(data)):
                self.beginnings.setdefault(data[:end], -1 - len(self.beginnings))
            ranked.append((data, vocab[character]))
        ranked += self.beginnings.items()

        # Runs of spaces all have the same, the lowest, score, and of equals the leftmost pair is joined first. So a run
        # grows from its left end, which is what ranking the longest first does.
        for piece in words + sorted(runs, key=len, reverse=True):
            ranked.append((piece.replace(MARK, " ").encode(), vocab[piece]))

        pieces = {i: piece.replace(MARK, " ").encode() for piece, i in vocab.items() if piece not in added}
        pieces |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
        # Nothing is ever joined across the end of a word, so cutting there changes nothing and keeps the parts short.
        super().__init__(spec, config, " *[^ ]+| +", ranked, pieces)
        self.beginnings = {i: [byte_ids[byte] for byte in data] for data, i in self.beginnings.items()}

    def normalise(self, text: str) -> str:
        return " " + text.replace(MARK, " ") if text else ""

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        if text.isascii() or min(ids) >= 0:
            return ids
        return [part for i in ids for part in (self.beginnings[i] if i < 0 else (i,))]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """As above, without the one space that `encode` put in front.

        A continuation decoded by itself loses its first space too: decode prompt and continuation together.
        """
        return super().decode(ids, skip_special).removeprefix(" ")


# ------------------------------------------------------------------------------------------------------ reading files


def read_json(path: Path) -> dict:
    """The object in a JSON file; anything else is a ValueError of one line that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): fetch it again")
    return content


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: its tokenizer.json, and the special ids of its config.json if there is one.

    A missing file is a FileNotFoundError; a damaged one, or a kind of tokenizer not supported, is a ValueError.
    """
    path, config_path = Path(folder) / "tokenizer.json", Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it comes with the checkpoint, copy it into this folder")
    spec = read_json(path)
    config = read_json(config_path) if config_path.is_file() else {}

    kind = next((kind for kind in (ByteLevel, SentencePiece) if is_plain_bpe(spec) and kind.reads(spec)), None)
    if kind is None:
        model = spec["model"] if isinstance(spec.get("model"), dict) else {}
        parts = {"model": {key: value for key, value in model.items() if key not in ("vocab", "merges")}}
        parts |= {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
        found = ", ".join(f"{key} {json.dumps(part)[:200]}" for key, part in parts.items())
        raise ValueError(
            f"{path}: found {found}; supported are byte-level BPE as OLMoE's (normalizer NFC or none, pre_tokenizer "
            "ByteLevel with use_regex, without add_prefix_space) and sentencepiece BPE as Mixtral's (byte_fallback, "
            "normalizer Prepend and Replace, no pre_tokenizer)"
        )
    try:
        tokenizer = kind(spec, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokenizer.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()  # whose ids are these? for caches of them
    return tokenizer


# ------------------------------------------------------------------------------------------------- learning a small one


def join(symbols: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair of neighbours by one new symbol wherever it occurs, from the left."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = new
        else:
            joined.append(symbol)
    return joined


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens=("<|endoftext|>", "<|padding|>")) -> dict:
    r"""Learn a byte-level BPE from some texts; returns the content of a tokenizer.json in OLMoE's layout.

    Ids: the special tokens, the 256 bytes, then one for each merge, `vocab_size` in all (fewer if nothing occurs twice
    any more). Each round joins the most frequent pair of neighbours; of equally frequent ones, that of the lowest ids.
    No merge holds a digit: a number is one token for each digit, so that arithmetic can be learned digit by digit.
    """
    if vocab_size < len(special_tokens) + 256:
        raise ValueError(f"vocab_size {vocab_size} has no room for {len(special_tokens)} special tokens and 256 bytes")
    # The cut of WORDS without its digits. `re` knows no \p{L}: letters are what is neither \W nor a digit nor "_".
    cut = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s")
    counts = Counter(word for text in texts for word in cut.findall(unicodedata.normalize("NFC", text)))
    words = {word: list(word.encode()) for word in counts}
    tokens = [bytes([byte]) for byte in range(256)]
    pairs, holders = Counter(), defaultdict(set)  # how often a pair occurs, and the words that (may) hold it

    def tally(word: str, times: int) -> None:
        for pair in pairwise(words[word]):
            pairs[pair] += times
            holders[pair].add(word)

    for word in words:
        tally(word, counts[word])
    merges = []
    while len(special_tokens) + len(tokens) < vocab_size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        if pairs[best] < 2:
            break
        merges.append(f"{spell(tokens[best[0]])} {spell(tokens[best[1]])}")
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word in list(holders[best]):  # only these words change: take out their pairs, join, count anew
            tally(word, -counts[word])
            words[word] = join(words[word], best, len(tokens) - 1)
            tally(word, counts[word])

    names = [*special_tokens, *map(spell, tokens)]
    vocab = {name: i for i, name in enumerate(names)}
    assert len(vocab) == len(names), f"a special token is a piece of text as well: {special_tokens}"
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content, **plain} for i, content in enumerate(special_tokens)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def main():
    parser = argparse.ArgumentParser(description="Show how a tokenizer cuts a text.")
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent / "tiny_olmoe", help="has a tokenizer.json")
    parser.add_argument("text", nargs="?", default="Sixteen experts, and each token picks its own 2.", help="any text")
    args = parser.parse_args()
    try:
        tokenizer = load_tokenizer(args.folder)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    ids = tokenizer.encode(args.text)
    print(f"ids      {ids}")
    print("pieces  ", [tokenizer.pieces[i].decode("utf-8", errors="backslashreplace") for i in ids])
    print(f"text     {tokenizer.decode(ids)}")
    print(f"{len(args.text)} characters, {len(ids)} tokens; vocabulary {tokenizer.vocab_size}", end=", ")
    print(f"bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}")


if __name__ == "__main__":
    main()
