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
user's text, where they are so many letters: who wants one takes its id from `added`. No BOS or
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
from itertools import chain, pairwise
from operator import index
from pathlib import Path

import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

# The byte alphabet --------------------------------------------------------------------------------

# JSON holds characters, not bytes. GPT-2's way out: a byte whose Latin-1 character is visible is
# written as itself, and the other 68 (space, controls, ...) as U+0100, U+0101, ... in turn. So a
# space is "Ġ" and a newline "Ċ".
HIDDEN = [*range(33), *range(127, 161), 173]  # 173: a hyphen that is not shown
LETTER = [chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)]
BYTE = {ord(letter): byte for byte, letter in enumerate(LETTER)}  # as str.translate takes it

# What all layouts share ---------------------------------------------------------------------------

MOST_IDS = 1 << 24  # there may be gaps, but no id out of all proportion


class Tokenizer:
    """A tiktoken encoding, the table from ids back to bytes, and the ids of the special tokens.

    `pieces[i]` is what the id i stands for, in bytes (the file may leave gaps); `vocab_size` is the
    largest id + 1, and may be less than the model's embedding has rows. `bos_id`, `eos_id` and
    `pad_id` are None where unknown. `added[text]` is the id of the added token that is written so,
    and `chat_ids` are those of <|im_start|> and <|im_end|>, between which Qwen's family puts each
    message: None where a file has no such tokens.

    A layout says by `steps` of which files it is (normalizer, pre_tokenizer, and what of OPTIONS is
    on), and adds `bytes_of(piece)`, what a piece of the vocabulary stands for, `normalise(text)`,
    what is done to a text before it is cut into words, and `ranks(vocab, merged)`: what cuts words,
    and {piece in bytes: ids} in the order of ranks.
    """

    def __init__(self, spec, config):
        """The content of a tokenizer.json, which may be damaged, and of the model's config.json.

        ValueError for a contradiction, and whatever Python raises where something is missing, or
        not of the type it must be.
        """
        vocab, tokens = spec["model"]["vocab"], spec["added_tokens"]
        self.added = {token["content"]: token["id"] for token in tokens}
        names = {}
        for name, i in [*vocab.items(), *self.added.items()]:
            if type(i) is not int or not 0 <= i < MOST_IDS or names.setdefault(i, name) != name:
                raise ValueError(f"{run.shown(name)} has the id {run.shown(i)}, no id or another's")
        self.special_ids = {token["id"] for token in tokens if token["special"]}
        self.pieces = {
            i: name.encode() if name in self.added else self.bytes_of(name)
            for i, name in names.items()
        }
        self.vocab_size = max(self.pieces) + 1
        self.bos_id = self.role("bos_token_id", config, "<s>")
        self.eos_id = self.role("eos_token_id", config, "<|endoftext|>", "</s>")
        self.pad_id = self.role("pad_token_id", config, "<|padding|>")
        if self.pad_id is None:
            self.pad_id = self.eos_id  # Mixtral has none; padding is masked out: any token will do
        chat = [self.added.get(name) for name in ("<|im_start|>", "<|im_end|>")]
        self.chat_ids = None if None in chat else tuple(chat)

        pattern, table = self.ranks(vocab, joined(spec["model"]["merges"], vocab))
        self.ids_of_rank = list(table.values())
        ranks = {piece: rank for rank, piece in enumerate(table)}
        self.bpe = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def role(self, key, config, *likely):
        """The id that config.json gives, else that of the first likely name, else None."""
        given = config.get(key)
        if isinstance(given, list):  # several ends of text: the first is the one to append
            given = given[0] if given else None
        if given is None:
            return next((self.added[name] for name in likely if name in self.added), None)
        if type(given) is not int or given not in self.pieces:
            raise ValueError(
                f"config.json has {key} {run.shown(given)}, which the vocabulary lacks"
            )
        return given

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
        return list(chain.from_iterable(self.ids_of_rank[rank] for rank in ranks))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; bytes that are not UTF-8 (a character cut in half) become U+FFFD.

        Special tokens are left out unless `skip_special` is False. An id that stands for nothing is
        a ValueError.
        """
        skipped = self.special_ids if skip_special else ()
        try:  # index() takes NumPy's and PyTorch's integers too
            told = [self.pieces[i] for i in map(index, ids) if i not in skipped]
        except KeyError as error:
            raise ValueError(
                f"token id {error} is not in the vocabulary, whose size is {self.vocab_size}"
            ) from None
        return b"".join(told).decode("utf-8", errors="replace")


def joined(merges, vocab):
    """What the merges make, oldest first."""
    pieces = []
    for merge in merges:  # "a b" or, since 2024, ["a", "b"]
        pair = merge.split(" ") if isinstance(merge, str) else merge
        piece = "".join(pair)
        if len(pair) != 2 or piece not in vocab:
            raise ValueError(f"the merge {run.shown(merge)} makes no piece of the vocabulary")
        pieces.append(piece)
    return pieces


# Byte-level: OLMoE, Qwen3, GPT-NeoX, ours ---------------------------------------------------------

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
# How the files write this.
NFC = {"type": "NFC"}
GPT2_CUT = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
QWEN_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
        GPT2_CUT | {"trim_offsets": False, "use_regex": False},
    ],
}


class ByteLevel(Tokenizer):
    """BPE over bytes, in words that a regular expression cuts. Decodes to the text's NFC."""

    steps = (NFC, GPT2_CUT, [])
    pattern = GPT2

    def ranks(self, vocab, merged):
        self.bos_id = None  # this layout puts none before a text, whatever config.json names so
        letters = LETTER[:0xC0] + LETTER[0xC2:0xF5]  # the bytes that UTF-8 uses
        table = {self.bytes_of(piece): [vocab[piece]] for piece in letters + merged}

        # OLMoE has an added token for each run of 2 to 24 spaces. The library cuts these out, the
        # longest first, before its regular expression is tried. Here they are a branch of the
        # expression (as special tokens tiktoken would try them in no fixed order): a word takes at
        # most one space, and white space must not reach into a run. They shadow the pieces of two
        # and more spaces that the merges make too: OLMoE's ids 245, 252, ...
        runs = sorted(text for text in self.added if re.fullmatch(" +", text))
        if not runs:
            return self.pattern, table
        if self.pattern != GPT2 or " " in runs:
            raise ValueError("added spaces must be two or more, where words are GPT-2's")
        table |= {spaces.encode(): [self.added[spaces]] for spaces in runs}
        longest_first = "|".join(reversed(runs))
        return rf"{WORDS}|{longest_first}|(?:(?!{runs[0]})\s(?!\S))+|\s", table

    def bytes_of(self, piece):
        """Read a piece of the byte alphabet: "Ġthe" -> b" the"."""
        return piece.translate(BYTE).encode("latin-1")

    def normalise(self, text):
        return unicodedata.normalize("NFC", text)


class Qwen(ByteLevel):
    steps = (NFC, QWEN_CUT, [])
    pattern = QWEN


# sentencepiece: Mixtral ---------------------------------------------------------------------------

MARK = "\u2581"  # how sentencepiece writes a space
BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
SPACES_MARKED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
    ],
}


class SentencePiece(Tokenizer):
    """BPE over characters with byte fallback. Decodes to the text, but U+2581 becomes a space.

    tiktoken starts from bytes, so characters are built first: each one of several bytes, and each
    beginning of one, ranks before all merges. A beginning that stays alone (its character is not in
    the vocabulary) has no id: it stands for the ids of its bytes.
    """

    steps = (SPACES_MARKED, None, ["byte_fallback"])

    def ranks(self, vocab, merged):
        table = {data: [vocab[name]] for name, data in BYTE_NAMES.items()}
        byte_ids = [vocab[name] for name in BYTE_NAMES]
        for character in vocab:
            if len(character) == 1:
                data = self.bytes_of(character)
                for end in range(2, len(data)):
                    table[data[:end]] = [byte_ids[byte] for byte in data[:end]]
                table[data] = [vocab[character]]  # "a" is a piece: then <0x61> is never used

        # Runs of spaces all have the same, the lowest, score, and of equals the leftmost pair is
        # joined first. So a run grows from its left end, which is what ranking the longest first
        # does.
        words = [piece for piece in merged if piece.strip(MARK)]
        runs = merged[len(words) :]
        odd = [piece for piece in words if MARK in piece.lstrip(MARK)]
        if odd or "".join(runs).strip(MARK):
            raise ValueError(
                "supported are spaces in front of a piece, and runs of spaces as the last merges"
            )
        for piece in words + sorted(runs, key=len, reverse=True):
            table[self.bytes_of(piece)] = [vocab[piece]]
        # Nothing is ever joined across the end of a word, so cutting there changes nothing and
        # keeps the parts short.
        return " *[^ ]+| +", table

    def bytes_of(self, piece):
        return BYTE_NAMES.get(piece) or piece.replace(MARK, " ").encode()

    def normalise(self, text):
        return " " + text.replace(MARK, " ") if text else ""

    def decode(self, ids, skip_special=True):
        """As above, without the one space that `encode` put in front.

        A continuation decoded by itself loses its first space too: decode prompt and continuation
        together.
        """
        return super().decode(ids, skip_special).removeprefix(" ")


# Loading ------------------------------------------------------------------------------------------

# What else a BPE may do than join symbols by its merges.
OPTIONS = ["byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"]
SUPPORTED = (
    "supported are byte-level BPE as OLMoE's (normalizer NFC, pre_tokenizer ByteLevel with "
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
    try:
        return layout_of(spec)(spec, config)
    except ValueError as error:
        cause = error
    except (AttributeError, KeyError, TypeError) as error:
        cause = f"vocab, merges or added_tokens is not as it must be ({error!r})"
    raise ValueError(f"{path}: {cause}; copy or download it again")


def layout_of(spec):
    model, normalizer, cut = (spec.get(key) for key in ("model", "normalizer", "pre_tokenizer"))
    options = [key for key in OPTIONS if model.get(key)]
    for layout in (ByteLevel, Qwen, SentencePiece):
        if model.get("type") == "BPE" and layout.steps == (normalizer, cut, options):
            return layout
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
    names = SPECIAL_TOKENS + LETTER
    merges = learn_merges(count_words(texts), vocab_size - len(names))
    names += [merge.replace(" ", "") for merge in merges]

    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": content, **as_it_is, "special": True}
            for i, content in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": NFC,
        "pre_tokenizer": GPT2_CUT,
        "post_processor": GPT2_CUT,
        "decoder": GPT2_CUT,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
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
    """Words and how often each occurs -> at most `most` merges, such as "t he", oldest first.

    Each round joins the most frequent pair of neighbours; of equally frequent ones, that of the
    lowest symbols (the 256 bytes, then one for each merge). The symbol n is written chr(n).
    """
    pieces = list(LETTER)  # how each symbol is spelled
    words = [(word.encode().decode("latin-1"), times) for word, times in counts.items()]
    merges = []
    for _ in range(most):
        pairs = Counter()
        for word, times in words:
            for left, right in pairwise(word):
                pairs[left + right] += times
        best = max(sorted(pairs), key=pairs.get, default=None)  # of equals the first
        if pairs[best] < 2:  # a Counter has 0 of None
            break
        new = chr(len(pieces))
        words = [(word.replace(best, new), times) for word, times in words]
        left, right = [pieces[ord(symbol)] for symbol in best]
        merges.append(f"{left} {right}")
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
