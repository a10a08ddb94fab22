"""Text to token ids and back: byte pair encoding, read from a checkpoint's tokenizer.json and run
by tiktoken.

A byte pair encoding (BPE) is a list of merges, in the order in which they were learned: first "h e"
-> "he", later "t he" -> "the", later still " the". To encode, text is cut into words; a word starts
as single symbols; and as long as some neighbours can be joined, the pair whose merge is the oldest
is joined, the leftmost such pair first.

How ranks work. tiktoken keeps no list of merges. It is given one table {piece: rank} and joins the
neighbours whose JOINED bytes have the lowest rank. For a tokenizer that was learned merge by merge
this is the same thing: a piece has one recipe, because its own bytes, encoded with the older merges
only, always end in the same two parts. So the rank of a piece is its place in a table that begins
with the single bytes and goes on in the order of the merges; a second table takes ranks to ids.

Two layouts are read, and everything else is refused:

    byte-level       OLMoE, Qwen3, GPT-NeoX and train_bpe below: symbols are the 256 bytes; text is
                     cut by a regular expression that leaves a space at the front of its word
                     ("a cat" -> "a", " cat"): GPT-2's or Qwen's.
    sentencepiece    Mixtral: symbols are characters; one outside the vocabulary falls back to its
                     UTF-8 bytes; nothing cuts the text; a space is written U+2581, and one is put
                     before the text.

What differs from the `tokenizers` library, which wrote the files: the ids are equal, in about a
fifth of the time, but added tokens (<s>, <|endoftext|>, Qwen3's <think>) are never found in a
user's text, where they are so many letters: who wants one asks for its id (`special`). No BOS or
EOS is added (`bos_id` and `eos_id` are the caller's to place); no offsets, padding or truncation.
NFC, which puts accents in order, is Python's; the library's is of 2016 and does not know the few
dozen rarest marks.

    python data/tokenizer.py                       the tokenizer of data/tiny_olmoe, and a sentence
    python data/tokenizer.py FOLDER "some text"    ids, pieces, and the text they decode to
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import NamedTuple

import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

# The byte alphabet --------------------------------------------------------------------------------

# JSON holds characters, not bytes. GPT-2's way out: a byte whose Latin-1 character is visible is
# written as itself, and the other 68 (space, controls, ...) as U+0100, U+0101, ... in turn. So a
# space is "Ġ" and a newline "Ċ".
HIDDEN = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
LETTER = {byte: chr(byte) for byte in range(256)}
LETTER |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
BYTE = {ord(letter): byte for byte, letter in LETTER.items()}  # as str.translate takes it


def unspell(piece):
    """Read a piece of the byte alphabet: "Ġthe" -> b" the"."""
    return piece.translate(BYTE).encode("latin-1")


# What a file holds --------------------------------------------------------------------------------

MOST_IDS = 1 << 24  # there may be gaps, but no id out of all proportion


class Parts(NamedTuple):
    """Of a tokenizer.json that may be damaged, or a stranger's: what has been looked through."""

    vocab: dict  # piece, as the file spells it -> id; each id is one token's
    merged: list  # what the merges make, oldest first; all in `vocab`
    added: dict  # content of an added token (which may be in `vocab` too) -> id
    special: set  # ids of those added tokens that are no text


def read_parts(spec):
    """ValueError for a contradiction, and whatever Python raises where something is missing, or not
    of the type it must be.
    """
    vocab, tokens = spec["model"]["vocab"], spec["added_tokens"]
    added = {token["content"]: token["id"] for token in tokens}
    owner = {}
    for name, i in [*vocab.items(), *added.items()]:
        if type(i) is not int or not 0 <= i < MOST_IDS or owner.setdefault(i, name) != name:
            raise ValueError(f"{run.shown(name)} has the id {run.shown(i)}, no id or another's")
    merged = []
    for merge in spec["model"]["merges"]:  # "a b" or, since 2024, ["a", "b"]
        pair = merge.split(" ") if isinstance(merge, str) else merge
        piece = "".join(pair)
        if len(pair) != 2 or piece not in vocab:
            raise ValueError(f"the merge {run.shown(merge)} makes no piece of the vocabulary")
        merged.append(piece)
    special = {token["id"] for token in tokens if token["special"]}
    return Parts(vocab, merged, added, special)


# What all layouts share ---------------------------------------------------------------------------

# The names of tokens with a role, the likelier first; an id in config.json has the last word.
ROLES = {"bos": ["<s>"], "eos": ["<|endoftext|>", "</s>"], "pad": ["<|padding|>"]}


class Tokenizer:
    """A tiktoken encoding, the table from ids back to bytes, and the ids of the special tokens.

    `pieces[i]` is what the id i stands for, in bytes (the file may leave gaps); `vocab_size` is the
    largest id + 1, and may be less than the model's embedding has rows. `bos_id`, `eos_id` and
    `pad_id` are None where unknown. `chat_ids`: those of <|im_start|> and <|im_end|>, between which
    Qwen's family puts each message; None where a file has no such tokens.

    A layout adds `bytes_of(piece)`, what a piece of the vocabulary stands for, and
    `normalise(text)`, what is done to a text before it is cut into words.
    """

    def __init__(self, parts, config, pattern, table):
        """config: the model's config.json. pattern: cuts words.
        table: piece (bytes) -> id, in the order of ranks.
        """
        self.added = parts.added
        self.special_ids = parts.special
        plain = parts.vocab.items() - parts.added.items()
        self.pieces = {i: self.bytes_of(piece) for piece, i in plain}
        self.pieces |= {i: content.encode() for content, i in parts.added.items()}
        self.vocab_size = max(self.pieces) + 1
        self.bos_id, self.eos_id, self.pad_id = [self.role(name, config) for name in ROLES]
        if self.pad_id is None:
            self.pad_id = self.eos_id  # Mixtral has none; padding is masked out: any token will do
        chat_ids = self.special("<|im_start|>"), self.special("<|im_end|>")
        self.chat_ids = None if None in chat_ids else chat_ids

        self.id_of_rank = list(table.values())
        ranks = {piece: rank for rank, piece in enumerate(table)}
        self.bpe = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def role(self, name, config):
        """The id that config.json gives, else the first of the ROLES that was added, else None."""
        given = config.get(f"{name}_token_id")
        if isinstance(given, list):  # several ends of text: the first is the one to append
            given = given[0] if given else None
        if given is None:
            return next((self.added[text] for text in ROLES[name] if text in self.added), None)
        if type(given) is not int or given not in self.pieces:
            raise ValueError(
                f"config.json has {name}_token_id {run.shown(given)}, which the vocabulary lacks"
            )
        return given

    def special(self, text: str) -> int | None:
        """The id of the added token that is written so; None if the file has no such token."""
        return self.added.get(text)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without BOS or EOS. The empty text has none."""
        try:
            ranks = self.bpe.encode_ordinary(self.normalise(text))  # it looks for no added tokens
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
                raise
            raise ValueError(
                f"a text of {len(text):,} characters is too much for tiktoken; has it a run of "
                f"blanks without end? {run.shown(text)}"
            ) from None
        return [self.id_of_rank[rank] for rank in ranks]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; bytes that are not UTF-8 (a character cut in half) become U+FFFD.

        Special tokens are left out unless `skip_special` is False. An id that stands for nothing is
        a ValueError.
        """
        told = []
        for i in map(index, ids):  # index() takes NumPy's and PyTorch's integers too
            if i not in self.pieces:
                raise ValueError(
                    f"token id {i} is not in the vocabulary, whose size is {self.vocab_size}"
                )
            if not (skip_special and i in self.special_ids):
                told.append(self.pieces[i])
        return b"".join(told).decode("utf-8", errors="replace")


# Byte-level: OLMoE, Qwen3, GPT-NeoX, ours ---------------------------------------------------------

NO_TEXT = {0xC0, 0xC1, *range(0xF5, 256)}  # bytes that UTF-8 never uses

# How text is cut into words. GPT-2's: English contractions, letters, digits, everything else; all
# but contractions may begin with one space. White space before a word stops one short: a last space
# goes with the word, a last newline stands alone.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2 = rf"{WORDS}|(?:\s(?!\S))+|\s"
# Qwen's: a word may begin with any one sign, a digit is a word, newlines end one.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevel(Tokenizer):
    """BPE over bytes, in words that a regular expression cuts. Decodes to the text's NFC."""

    def __init__(self, parts, config, pattern, nfc):
        vocab, added = parts.vocab, parts.added
        letters = [LETTER[byte] for byte in range(256) if byte not in NO_TEXT]
        table = {unspell(piece): vocab[piece] for piece in letters + parts.merged}

        # OLMoE has an added token for each run of 2 to 24 spaces. The library cuts these out, the
        # longest first, before its regular expression is tried. Here they are the first branch of
        # the expression (as special tokens tiktoken would try them in no fixed order), and white
        # space must not reach into a run. They shadow the pieces of two and more spaces that the
        # merges make too: OLMoE's ids 245, 252, ...
        runs = sorted(text for text in added if len(text) > 1 and not text.strip(" "))
        if runs:
            longest = len(runs) + 1
            if pattern != GPT2 or runs != [" " * length for length in range(2, longest + 1)]:
                raise ValueError(
                    "added runs of spaces must have each length from 2 up, and words be GPT-2's"
                )
            table |= {run_of_spaces.encode(): added[run_of_spaces] for run_of_spaces in runs}
            pattern = rf" {{2,{longest}}}|{WORDS}|(?:(?! {{2}})\s(?!\S))+|\s"
        super().__init__(parts, config, pattern, table)
        self.bos_id = None  # this layout puts none before a text, whatever config.json names so
        self.nfc = nfc

    def bytes_of(self, piece):
        return unspell(piece)

    def normalise(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc and not text.isascii() else text


# sentencepiece: Mixtral ---------------------------------------------------------------------------

MARK = "\u2581"  # how sentencepiece writes a space
BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class SentencePiece(Tokenizer):
    """BPE over characters with byte fallback. Decodes to the text, but U+2581 becomes a space.

    tiktoken starts from bytes, so characters are built first: each one of several bytes, and each
    beginning of one, ranks before all merges. A beginning that stays alone (its character is not in
    the vocabulary) has no id; it gets a negative one, which `encode` replaces by the ids of its
    bytes.
    """

    def __init__(self, parts, config):
        vocab = parts.vocab
        byte_ids = [vocab[name] for name in BYTE_NAMES]
        table = dict(zip(BYTE_NAMES.values(), byte_ids))
        beginnings = {}
        for character in vocab:
            if len(character) == 1:
                data = self.bytes_of(character)
                table[data] = vocab[character]  # "a" is a piece: then <0x61> is never used
                for end in range(2, len(data)):
                    beginnings[data[:end]] = [byte_ids[byte] for byte in data[:end]]
        self.lone = list(beginnings.values())  # a negative id is a place in it, from the end
        for i, data in enumerate(beginnings, -len(beginnings)):
            table[data] = i

        # Runs of spaces all have the same, the lowest, score, and of equals the leftmost pair is
        # joined first. So a run grows from its left end, which is what ranking the longest first
        # does.
        words = [piece for piece in parts.merged if piece.strip(MARK)]
        runs = parts.merged[len(words) :]
        odd = [piece for piece in words if MARK in piece.lstrip(MARK)]
        if odd or "".join(runs).strip(MARK):
            raise ValueError(
                "supported are spaces in front of a piece, and runs of spaces as the last merges"
            )
        for piece in words + sorted(runs, key=len, reverse=True):
            table[self.bytes_of(piece)] = vocab[piece]
        # Nothing is ever joined across the end of a word, so cutting there changes nothing and
        # keeps the parts short.
        super().__init__(parts, config, " *[^ ]+| +", table)

    def bytes_of(self, piece):
        return BYTE_NAMES.get(piece) or piece.replace(MARK, " ").encode()

    def normalise(self, text):
        return " " + text.replace(MARK, " ") if text else ""

    def encode(self, text):
        ids = super().encode(text)
        if min(ids, default=0) >= 0:
            return ids
        whole = []
        for i in ids:
            whole += [i] if i >= 0 else self.lone[i]
        return whole

    def decode(self, ids, skip_special=True):
        """As above, without the one space that `encode` put in front.

        A continuation decoded by itself loses its first space too: decode prompt and continuation
        together.
        """
        return super().decode(ids, skip_special).removeprefix(" ")


# Loading ------------------------------------------------------------------------------------------

# What else a BPE may do than join symbols by its merges: all of it is refused.
EXTRAS = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
NFC = {"type": "NFC"}
GPT2_CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
QWEN_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
        GPT2_CUT | {"use_regex": False, "trim_offsets": False},
    ],
}
SPACES_MARKED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
    ],
}
SUPPORTED = (
    "supported are byte-level BPE as OLMoE's (normalizer NFC or none, pre_tokenizer ByteLevel with "
    "use_regex, without add_prefix_space) or as Qwen3's (its Split before), and sentencepiece BPE "
    "as Mixtral's (byte_fallback, normalizer Prepend and Replace, no pre_tokenizer)"
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: its tokenizer.json, and the special ids of its
    config.json if there is one.

    A missing file is a FileNotFoundError; a damaged one, or a kind of tokenizer not supported, is a
    ValueError.
    """
    path, config_path = Path(folder) / "tokenizer.json", Path(folder) / "config.json"
    spec = run.read_json(path, model=dict, added_tokens=list)
    config = run.read_json(config_path) if config_path.exists() else {}
    model, normalizer, cut = (spec.get(key) for key in ("model", "normalizer", "pre_tokenizer"))
    try:
        make = layout_of(model, normalizer, cut)
        return make(read_parts(spec), config)
    except ValueError as error:
        cause = error
    except KeyError as error:
        cause = f"{run.shown(error.args[0])} is missing"
    except (AttributeError, TypeError):
        cause = "vocab, merges or added_tokens is not of the form that it must be"
    raise ValueError(f"{path}: {cause}; copy or download it again")


def layout_of(model, normalizer, cut):
    """What makes a tokenizer of that kind."""
    if model.get("type") == "BPE" and not any(model.get(key) for key in EXTRAS):
        if cut is None and normalizer == SPACES_MARKED and model.get("byte_fallback") is True:
            return SentencePiece
        gpt2 = isinstance(cut, dict) and GPT2_CUT.items() <= ({"use_regex": True} | cut).items()
        if normalizer in (None, NFC) and (gpt2 or cut == QWEN_CUT):
            return partial(ByteLevel, pattern=GPT2 if gpt2 else QWEN, nfc=normalizer == NFC)
    raise ValueError(
        f"found model {run.shown(model)}, normalizer {run.shown(normalizer)}, "
        f"pre_tokenizer {run.shown(cut)}; {SUPPORTED}"
    )


# Learning a small one -----------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>", "<|padding|>"]


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
    """Learn a byte-level BPE from some texts -> the content of a tokenizer.json in OLMoE's layout.

    Ids: two special tokens, the 256 bytes, then one for each merge, `vocab_size` in all (fewer if
    nothing occurs twice any more). No merge holds a digit: a number is one token for each digit, so
    that arithmetic can be learned digit by digit.
    """
    names = SPECIAL_TOKENS + [LETTER[byte] for byte in range(256)]
    if vocab_size < len(names):
        raise ValueError(f"vocab_size {vocab_size} has no room for 2 special tokens and 256 bytes")
    merges = learn_merges(count_words(texts), vocab_size - len(names))
    names += [left + right for left, right in merges]

    added = [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def count_words(texts):
    r"""How often each word occurs, cut as WORDS cuts but without the digits.

    `re` knows no \p{L}: letters are what is neither \W nor a digit nor "_".
    """
    cut = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s")
    counts = Counter()
    for text in texts:
        counts.update(cut.findall(unicodedata.normalize("NFC", text)))
    return counts


def learn_merges(counts, most):
    """Words and how often each occurs -> at most `most` pairs of pieces to join, oldest first.

    Each round joins the most frequent pair of neighbours; of equally frequent ones, that of the
    lowest symbols (the 256 bytes, then one for each merge). The symbol n is written chr(n).
    """
    pieces = [LETTER[byte] for byte in range(256)]  # how each symbol is spelled
    words = [(word.encode().decode("latin-1"), times) for word, times in counts.items()]
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for word, times in words:
            for left, right in pairwise(word):
                pairs[left + right] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[best] < 2:  # a Counter has 0 of None
            break
        new = chr(len(pieces))
        words = [(word.replace(best, new), times) for word, times in words]
        left, right = [pieces[ord(symbol)] for symbol in best]
        merges.append((left, right))
        pieces.append(left + right)
    return merges


@run.command
def main():
    parser = run.Parser(description="Show how a tokenizer cuts a text.")
    ours = Path(__file__).parent / "tiny_olmoe"
    parser.add_argument("folder", nargs="?", default=ours, help="(data/tiny_olmoe)")
    parser.add_argument("text", nargs="?", default="Each token picks its own 2 experts.")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.folder)
    ids = tokenizer.encode(args.text)
    print("ids    ", ids)
    print("pieces ", [tokenizer.pieces[i] for i in ids])
    print("text   ", tokenizer.decode(ids))


if __name__ == "__main__":
    main()
