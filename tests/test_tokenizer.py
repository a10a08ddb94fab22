"""data/tokenizer.py against the `tokenizers` and `sentencepiece` libraries: the same ids for every
text, and back.

The real files of OLMoE, Mixtral and Qwen3 are looked for in ../shared/tokenizers; where they are
absent, what needs them is skipped, and small tokenizers learned on the spot stand for them.

The references would find "<s>" or "|||IP_ADDRESS|||" in a text and make it a special token. Here a
user's text is only text, so the references are read from files without their added tokens (except
the runs of spaces, which are text).
"""

import json
import random
import re
import subprocess
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from data.tokenizer import LETTER, QWEN_CUT, ByteLevel, load_tokenizer, train_bpe

tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).parents[1]
REAL = Path(__file__).parents[2] / "shared" / "tokenizers"

# Texts --------------------------------------------------------------------------------------------

LESSON = """The router scores 64 experts for each token, and eight of them are run. \
It's the tokens that choose; they'll
choose 8, we've said, and don't ask why: "because" isn't an answer. Ann is 12, Bob is 7; \
12 + 7 = 19, and 1,000,000.5.

def route(x, k=8):
    scores = softmax(x @ W.T)   # (N, E)
\tfor i in range(len(scores)):
        if scores[i] > 0.125:\r\n            yield  i,   scores[i]
"""

TEXTS = [
    "",
    " ",
    "a",
    " a",
    "a ",
    "Hello world",
    LESSON,
    LESSON.replace("\n", "\r\n"),
    LESSON.upper(),
    LESSON * 20,
    "I'm you're he'd she'll we've it's don't 'tis 's 'S 'LL ' s ''s x'd' 'll'll 're're",
    "0 1 12 123 1234567890 3.14159 -1e-10 0x7fff 1,234,567.89 ½ ² ³ Ⅷ ٣٤٥ १२३ 12abc34 a1b2c3",
    "你好，世界。機械学習 こんにちは 안녕하세요 中文English混合123",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم สวัสดี",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 ❤️ 1️⃣ 👨🏿‍🚀👩🏻‍🔬 🫠",
    "e\u0301 n\u0303 o\u0302\u0323 o\u0323\u0302 \u0301x Å \u212b ﬁ ｆｕｌｌ 각 \u1100\u1161\u11a8",
    "q\u0307\u0323 \u0344 \u0958 \u2126 \ufb1d \u1e9b\u0323 z\u0335\u0327\u0301\u0308",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0001f9ff \U0010ffff \ue000 \ufdd0 \ufffd \ufeff x\u200by\u2028z\u2029",
    "a\u00a0b\u2003c\u3000d\u0085e\u001cf \u00a0 \u3000\u3000 g",
    "\x00\x01\x02 \x7f\x80\x9f",
    "\t\t\n\n \t \n\r\n \r \n\t x",
    "▁",
    "▁▁",
    "a▁b",
    " ▁ a ▁",
    "<0x41>",
    "<0xE2><0x82><0xAC>",
    "snake_case __init__ CamelCase kebab-case a->b !=== <|im_start|> {{}} [[ ]] $x^2$ \\n \\\\ https://a.b/c?d=e&f=%20",
    "a" * 40,
    "=" * 200 + "-" * 99,
]
SPECIAL_TEXTS = [
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|padding|>",
    " <|padding|> ",
    "<s>",
    "</s>",
    "<s> hi</s>",
    "<unk>",
    "x<unk>y",
    "|||IP_ADDRESS|||",
    "mail |||EMAIL_ADDRESS||| or |||PHONE_NUMBER|||.",
    "<|endoftext|><|endoftext|>",
]
CODE_POINTS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def young_mark(character: str) -> bool:
    """A combining mark that Unicode 3.2 did not have. The library's NFC, of Unicode 9, misses the
    last fifty of these and leaves such a mark where it stands beside another; Python's puts the two
    in order."""
    return bool(unicodedata.combining(character)) and not unicodedata.ucd_3_2_0.combining(character)


def runs_of_spaces():
    for n in range(301):
        run = " " * n
        yield from (run, f"{run}x", f"x{run}", f"x{run}y", f"\n{run}1\n", "\t" * (n % 7) + run)


def random_texts(seed: int, count: int):
    """Words, blanks, symbols and single characters of many scripts thrown together, and random
    bytes read as text."""
    rng = random.Random(seed)
    words = [word for text in TEXTS for word in text.split()] + SPECIAL_TEXTS
    blanks = [*"  \n\t\xa0\u3000\v\f\x85", "  ", "   ", "     ", "\r\n", "\n\n"]
    symbols = [*"0123456789'\".,;:!?-_/\\(){}<>|=+*&^%$#@~`▁", "'s", "'ll", "'T", "..."]
    marks = [
        chr(point)
        for point in (
            *range(0x300, 0x36F),
            0x93C,
            0x94D,
            0x5B0,
            0x64B,
            0x3099,
            0x200D,
            0xFE0F,
            0x20E3,
        )
    ]
    scripts = [
        range(0x20, 0x7F),
        range(0xA0, 0x250),
        range(0x370, 0x530),
        range(0x5D0, 0x700),
        range(0x900, 0xE00),
    ]
    scripts += [
        range(0x3040, 0x3100),
        range(0x4E00, 0xA000),
        range(0xAC00, 0xD7A4),
        range(0x1F300, 0x1FAFF),
    ]
    scripts = [
        [character for character in map(chr, script) if not young_mark(character)]
        for script in scripts
    ]

    def bit():
        kind = rng.randrange(10)
        if kind < 3:
            return rng.choice(words)
        if kind < 6:
            return rng.choice(blanks) * rng.choice((1, 1, 1, 2, 7))
        if kind < 8:
            return rng.choice((symbols, marks))[rng.randrange(40)]
        return "".join(rng.choices(rng.choice(scripts), k=rng.randrange(1, 6)))

    for i in range(count):
        if i % 8 == 0:
            yield rng.randbytes(rng.randrange(1, 40)).decode("latin-1")
        elif i % 8 == 1:
            yield rng.randbytes(rng.randrange(1, 40)).decode("utf-8", errors="replace")
        elif i % 8 == 2:
            yield "".join(rng.choice(blanks + ["x", "1", "."]) for _ in range(rng.randrange(1, 20)))
        else:
            yield "".join(bit() for _ in range(rng.randrange(1, 25)))


# References ---------------------------------------------------------------------------------------


def with_library(folder: Path):
    """(our tokenizer, the library's text -> ids) of the same file"""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if not token["content"].strip(" ")
    ]
    reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return load_tokenizer(folder), lambda text: reference.encode(text).ids


def write(folder: Path, spec: dict, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def real(name: str) -> Path:
    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip(f"needs the real tokenizer.json of {name} in {REAL / name}")
    return REAL / name


@pytest.fixture(scope="module")
def rows():
    """All code points, 97 to a text; in NFC to begin with, because of the young marks."""
    texts = ("".join(CODE_POINTS[i : i + 97]) for i in range(0, len(CODE_POINTS), 97))
    return [unicodedata.normalize("NFC", text) for text in texts]


@pytest.fixture(scope="module")
def learned():
    return train_bpe([(ROOT / "data" / "tokenizer.py").read_text(encoding="utf-8"), *TEXTS], 512)


@pytest.fixture(scope="module")
def made():
    """A small file in Mixtral's layout: the beginnings of a lesson's words as pieces, some
    characters, all bytes."""
    beginnings = dict.fromkeys(
        f"▁{word[:n]}" for word in LESSON.split() for n in range(1, len(word) + 1)
    )
    pieces = [*beginnings, "▁▁", "▁▁▁▁", "▁▁▁"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    names += ["▁", *sorted({*"".join(LESSON.split()), *"é中🫠"})]
    vocab = {name: i for i, name in enumerate(names)}
    cuts = ([piece[:n], piece[n:]] for piece in pieces for n in range(1, len(piece)))
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": content, **flags} for i, content in enumerate(names[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


REAL_ONES = ["olmoe", "mixtral", "qwen3", "mixtral by sentencepiece"]


@pytest.fixture(scope="module", params=["learned", "learned, cut as Qwen's", "made", *REAL_ONES])
def pair(request, learned, made, tmp_path_factory):
    """(our tokenizer, the reference's text -> ids)"""
    if request.param == "mixtral by sentencepiece":
        sentencepiece = pytest.importorskip("sentencepiece")
        folder = real("mixtral")
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return load_tokenizer(folder), reference.encode
    as_qwen = learned | {"pre_tokenizer": QWEN_CUT}
    small = {"learned": learned, "learned, cut as Qwen's": as_qwen, "made": made}.get(request.param)
    return with_library(
        write(tmp_path_factory.mktemp("small"), small) if small else real(request.param)
    )


def text_kept(tokenizer, text: str) -> str:
    """What decoding can give back: the NFC form of a text (byte-level), or the text with U+2581 as
    a space."""
    if isinstance(tokenizer, ByteLevel):
        return unicodedata.normalize("NFC", text)
    return text.replace("▁", " ")


def share(pair) -> int:
    """Small tokenizers run the same lines of code as the real ones: every eighth text will do."""
    return 1 if pair[0].vocab_size > 30_000 else 8


def assert_same(pair, texts):
    ours, reference = pair
    for text in texts:
        ids, expected = ours.encode(text), reference(text)
        assert ids == expected, f"{text!r}: {ids} instead of {expected}"


# The ids of a real text ---------------------------------------------------------------------------


def test_ids_of_prose_code_scripts_and_emoji_are_the_references(pair):
    assert_same(pair, TEXTS)


def test_ids_of_every_run_of_0_to_300_spaces_are_the_references(pair):
    assert_same(pair, runs_of_spaces())


def test_ids_of_characters_of_every_script_by_themselves_are_the_references(pair):
    assigned = [
        character
        for character in CODE_POINTS
        if unicodedata.category(character) not in ("Cn", "Co")
    ]
    ideographs = bisect_left(assigned, "\u3400")  # of these, nine tenths of all, an eighth will do
    assert_same(pair, assigned[:ideographs] + assigned[ideographs::8])


def test_ids_of_all_code_points_in_a_row_are_the_references_and_decode_to_them(pair, rows):
    ours, reference = pair
    for row in rows[:: share(pair)]:
        ids = ours.encode(row)
        assert ids == reference(row), f"{row!r}"
        assert ours.decode(ids) == text_kept(ours, row)


def test_ids_of_every_mark_after_every_kind_of_letter_are_the_references(pair):
    marks = [c for c in CODE_POINTS if unicodedata.combining(c) and not young_mark(c)]
    assert_same(
        pair,
        (f"{letter}{mark}\u0323\u0301 {mark}{letter}" for mark in marks for letter in "aeoAßд각Å"),
    )


def test_ids_of_thousands_of_random_texts_are_the_references(pair):
    assert_same(pair, random_texts(seed=1, count=4000))


def test_special_tokens_in_a_users_text_are_plain_text(pair):
    assert_same(pair, SPECIAL_TEXTS)
    assert not any(set(pair[0].encode(text)) & pair[0].special_ids for text in SPECIAL_TEXTS)


def test_a_long_word_and_a_long_blank_take_no_special_path(pair):
    assert_same(
        pair,
        ["a" * 20_000, "中" * 20_000, " " * 20_000, "\n" * 20_000 + "x", "ab" * 10_000 + " " * 999],
    )


@pytest.mark.parametrize("blank", ["\n", " "], ids=["newlines", "spaces"])
def test_a_text_that_tiktoken_cannot_cut_is_one_line(blank, learned, tmp_path):
    """A million blanks make Rust panic, which is no Exception in Python; one line says so, and what
    the tokenizer does next is right."""
    cut = QWEN_CUT if blank == " " else learned["pre_tokenizer"]
    ours, reference = with_library(write(tmp_path, learned | {"pre_tokenizer": cut}))
    with pytest.raises(ValueError, match="a text of 1,000,001 characters is too much") as error:
        ours.encode("x" + blank * 1_000_000)
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert_same((ours, reference), TEXTS)


# And back -----------------------------------------------------------------------------------------


def test_decoding_gives_the_text_back(pair):
    ours, _ = pair
    for text in [*TEXTS, *SPECIAL_TEXTS, *runs_of_spaces(), *random_texts(seed=2, count=2000)]:
        assert ours.decode(ours.encode(text)) == text_kept(ours, text)


@pytest.mark.parametrize("name", ["olmoe", "qwen3"])
def test_decoding_any_ids_of_a_byte_level_tokenizer_gives_the_librarys_text(name):
    folder = real(name)
    ours, rng = load_tokenizer(folder), random.Random(3)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for _ in range(3000):  # half-finished characters, shadowed ids and special tokens included
        ids = [
            rng.randrange(rng.choice((300, ours.vocab_size))) for _ in range(rng.randrange(12))
        ] + [1, ours.eos_id, 245]
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )


def test_decoding_any_ids_of_mixtral_gives_sentencepieces_text():
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = real("mixtral")
    ours, rng = load_tokenizer(folder), random.Random(4)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for _ in range(3000):
        ids = [rng.randrange(259, ours.vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.decode([1, *ids, 2]) == ours.decode(ids)
    assert ours.decode([1, 22557, 2], skip_special=False) == "<s> Hello</s>"


def test_half_a_character_decodes_to_a_replacement_character(pair):
    ours, _ = pair
    ids = ours.encode("\U000e0041")  # a tag character: four bytes in every one of the vocabularies
    assert ours.decode(ids) == "\U000e0041" and ours.decode(ids[:-1]).strip() == "\ufffd"


def test_an_id_outside_the_vocabulary_is_named(pair):
    ours, _ = pair
    for i in (-1, ours.vocab_size, 10**9):
        with pytest.raises(
            ValueError, match=rf"{i} is not in the vocabulary, whose size is {ours.vocab_size}"
        ):
            ours.decode([5, i])


def spell(data: bytes) -> str:
    return "".join(LETTER[byte] for byte in data)


def test_the_byte_alphabet_spells_every_byte_its_own_way(learned, tmp_path):
    everything = bytes(range(256))
    ours = load_tokenizer(write(tmp_path, learned))
    assert ours.bytes_of(spell(everything)) == everything and len(set(spell(everything))) == 256
    assert sorted(spell(everything)) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


# Special ids, other layouts -----------------------------------------------------------------------


def test_special_ids_of_the_real_files_are_those_of_their_checkpoints():
    olmoe, mixtral = load_tokenizer(real("olmoe")), load_tokenizer(real("mixtral"))
    assert (olmoe.bos_id, olmoe.eos_id, olmoe.pad_id, olmoe.vocab_size) == (None, 50279, 1, 50280)
    assert (mixtral.bos_id, mixtral.eos_id, mixtral.pad_id, mixtral.vocab_size) == (1, 2, 2, 32000)


def test_the_cut_of_qwen3_is_that_of_its_file():
    spec = json.loads((real("qwen3") / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["pre_tokenizer"] == QWEN_CUT


def test_an_added_token_is_had_by_asking_for_it_and_no_text_becomes_one(tmp_path):
    """Qwen3's <|im_start|> and <think> are letters in a text; `added` gives the ids that the
    library finds, and these decode to their names."""
    folder = real("qwen3")
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = {"bos_token_id": 151643, "eos_token_id": [151645, 151643]}
    ours = load_tokenizer(write(tmp_path, json.loads(reference.to_str()), config))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 151645, 151645)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"]
    ids = [ours.added[name] for name in names]
    assert (
        ids
        == [reference.token_to_id(name) for name in names]
        == reference.encode("".join(names)).ids
    )
    assert not set(ours.encode("".join(names))) & set(range(151643, ours.vocab_size))
    assert ours.decode(ids, skip_special=False) == "".join(names)
    assert ours.chat_ids == (151644, 151645)


def test_a_tokenizer_without_the_tokens_of_a_chat_says_so(learned, tmp_path):
    """One of the two is not enough."""
    start, end = (
        {**learned["added_tokens"][0], "id": 600 + i, "content": f"<|im_{name}|>"}
        for i, name in enumerate(("start", "end"))
    )
    for tokens, chat_ids in (([], None), ([start], None), ([start, end], (600, 601))):
        spec = learned | {"added_tokens": [*learned["added_tokens"], *tokens]}
        ours = load_tokenizer(write(tmp_path, spec))
        assert ours.chat_ids == chat_ids


def test_ids_in_config_json_go_before_the_known_names(learned, tmp_path):
    plain = load_tokenizer(write(tmp_path, learned))
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (None, 0, 1)
    given = load_tokenizer(
        write(tmp_path, learned, {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": None})
    )
    assert (given.eos_id, given.pad_id) == (8, 1)
    assert given.bos_id is None, "a byte-level tokenizer puts none before a text"
    with pytest.raises(ValueError, match="eos_token_id 512, which the vocabulary lacks"):
        load_tokenizer(write(tmp_path, learned, {"eos_token_id": 512}))


def test_ids_may_be_in_any_order_and_may_leave_gaps(learned, tmp_path):
    shuffled = list(range(2, 600))
    random.Random(5).shuffle(shuffled)
    vocab = {piece: i if i < 2 else shuffled[i] for piece, i in learned["model"]["vocab"].items()}
    spec = learned | {"model": learned["model"] | {"vocab": vocab}}
    ours, reference = with_library(write(tmp_path, spec))
    assert_same((ours, reference), [*TEXTS, *random_texts(seed=6, count=500)])
    gap = next(i for i in range(ours.vocab_size) if i not in vocab.values())
    with pytest.raises(ValueError, match=f"token id {gap} is not in the vocabulary"):
        ours.decode([gap])


def test_runs_of_spaces_are_taken_from_the_file(learned, tmp_path):
    runs = [
        {**learned["added_tokens"][0], "id": 510 + n, "content": " " * n, "special": False}
        for n in range(2, 6)
    ]
    spec = learned | {"added_tokens": [*learned["added_tokens"], *runs]}
    ours, reference = with_library(write(tmp_path, spec))
    assert_same((ours, reference), [*TEXTS, *runs_of_spaces(), *random_texts(seed=7, count=500)])
    assert ours.encode("x      y")[1] == 515


@pytest.mark.parametrize("lengths", [(4,), (3, 7), (2, 3, 5, 12)])
def test_runs_of_spaces_may_have_any_lengths(lengths, learned, tmp_path):
    added = learned["added_tokens"]
    runs = [
        {**added[0], "id": 512 + i, "content": " " * n, "special": False}
        for i, n in enumerate(lengths)
    ]
    spec = learned | {"added_tokens": [*added, *runs]}
    pair = with_library(write(tmp_path, spec))
    assert_same(pair, [*TEXTS, *runs_of_spaces(), *random_texts(seed=9, count=1000)])
    one = {**runs[0], "content": " "}
    for change in ({"pre_tokenizer": QWEN_CUT}, {"added_tokens": [*added, one]}):
        message = refused(write(tmp_path, spec | change))
        assert "added spaces must be two or more, where words are GPT-2's" in message


def test_an_added_token_of_no_letters_is_in_no_text(learned, tmp_path):
    empty = {**learned["added_tokens"][0], "id": 600, "content": ""}
    spec = learned | {"added_tokens": [*learned["added_tokens"], empty]}
    assert_same(with_library(write(tmp_path, spec)), TEXTS)


def test_the_embedded_model_has_the_librarys_ids():
    folder = ROOT / "data" / "tiny_olmoe"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {folder}")
    assert_same(with_library(folder), [*TEXTS, *runs_of_spaces(), *random_texts(seed=8, count=500)])


# Errors -------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    """The error, which is a ValueError of one short line that names the file."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'tokenizer.json'}: ")
    assert "\n" not in message and message.isprintable() and len(message) < 800
    return message.removeprefix(f"{folder / 'tokenizer.json'}: ")


def test_a_missing_or_damaged_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file; .+") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    nested = b'{"model": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    contents = (b"", b'{"model": ', b"\xff\xfe", nested, b'{"model": 1' + b"0" * 5000 + b"}")
    for content in contents:
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert refused(tmp_path).endswith("; copy or download it again")
    for content in (b"[1, 2]", b'"text"'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert refused(tmp_path).endswith("expected an object")


def test_other_kinds_of_tokenizer_are_refused_and_named(learned, tmp_path):
    byte_level, model = learned["pre_tokenizer"], learned["model"]
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    others = {
        "Unigram": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}},
        "WordPiece": {"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0}}},
        "dropout": {"model": {"dropout": 0.1} | model},
        "##": {"model": {"continuing_subword_prefix": "##"} | model},
        "Split": {"pre_tokenizer": split},
        "Metaspace": {
            "pre_tokenizer": {"type": "Metaspace"},
            "model": model | {"byte_fallback": True},
        },
        "Sequence": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}},
        '"add_prefix_space": true': {"pre_tokenizer": byte_level | {"add_prefix_space": True}},
        '"use_regex": false': {"pre_tokenizer": byte_level | {"use_regex": False}},
        "NFKC": {"normalizer": {"type": "NFKC"}},
        "pre_tokenizer null": {"pre_tokenizer": None},
        "normalizer null": {"normalizer": None},
    }
    for found, change in others.items():
        message = refused(write(tmp_path, learned | change))
        assert re.match("found .*; supported are byte-level .* and sentencepiece", message)
        assert found in message


def test_a_vocabulary_with_holes_is_refused(learned, made, tmp_path):
    model = learned["model"]
    without = {piece: i for piece, i in model["vocab"].items() if piece != "e"}
    holes = learned | {"model": model | {"vocab": without}}
    assert "KeyError('e')" in refused(write(tmp_path, holes))
    merges = learned | {"model": model | {"merges": [*model["merges"], "qz q"]}}
    message = refused(write(tmp_path, merges))
    assert 'the merge "qz q" makes no piece of the vocabulary' in message
    model = made["model"]
    without = {piece: i for piece, i in model["vocab"].items() if piece != "<0x7F>"}
    holes = made | {"model": model | {"vocab": without}}
    assert "KeyError('<0x7F>')" in refused(write(tmp_path, holes))


def test_spaces_inside_a_piece_or_merged_early_are_refused(made, tmp_path):
    old = made["model"]["merges"]
    for merges in ([*old, ["a▁", "b"]], [["▁▁", "▁"], *old, ["▁t", "he"]]):
        vocab = dict(made["model"]["vocab"])
        for merge in merges:
            vocab.setdefault("".join(merge), len(vocab))
        model = made["model"] | {"vocab": vocab, "merges": merges}
        message = refused(write(tmp_path, made | {"model": model}))
        supported = (
            "supported are spaces in front of a piece, and runs of spaces as the last merges"
        )
        assert supported in message


def with_vocab(spec, **pieces):
    return spec | {"model": spec["model"] | {"vocab": spec["model"]["vocab"] | pieces}}


def with_merge(spec, merge):
    merges = list(spec["model"]["merges"])
    merges[3] = merge
    return spec | {"model": spec["model"] | {"merges": merges}}


def with_token(spec, **fields):
    token = {**spec["added_tokens"][0], **fields}
    token = {key: value for key, value in token.items() if value is not Ellipsis}
    return spec | {"added_tokens": [token, *spec["added_tokens"][1:]]}


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


# What was done to a file -> the file, and what the error says of it. `spec` is of either layout.
FORM = "vocab, merges or added_tokens is not as it must be"
DAMAGES = {
    "a merge is null": (lambda spec: with_merge(spec, None), FORM),
    "a merge is a number": (lambda spec: with_merge(spec, 5), FORM),
    "a merge of one piece": (lambda spec: with_merge(spec, "he"), 'the merge "he" makes no piece'),
    "a merge of three": (lambda spec: with_merge(spec, "a b c"), '"a b c" makes no piece'),
    "a merge of numbers": (lambda spec: with_merge(spec, [1, 2]), FORM),
    "a merge of lists": (lambda spec: with_merge(spec, [["a"], "b"]), FORM),
    "a merge is an object": (lambda spec: with_merge(spec, {"a": 1}), "makes no piece"),
    "a nested merge": (lambda spec: with_merge(spec, nested(500)), FORM),
    "no merges": (lambda spec: spec | {"model": spec["model"] | {"merges": None}}, FORM),
    "merges are a text": (
        lambda spec: spec | {"model": spec["model"] | {"merges": "a b"}},
        'the merge "a" makes no piece',
    ),
    "vocab is a list": (lambda spec: spec | {"model": spec["model"] | {"vocab": [["a", 1]]}}, FORM),
    "an empty vocab": (lambda spec: spec | {"model": spec["model"] | {"vocab": {}}}, "vocabulary"),
    "an added token is null": (lambda spec: spec | {"added_tokens": [None]}, FORM),
    "added_tokens is a number": (
        lambda spec: spec | {"added_tokens": 7},
        "added_tokens is 7, expected a list",
    ),
    "added_tokens is an object": (
        lambda spec: spec | {"added_tokens": {"id": 0}},
        "expected a list",
    ),
    "no special": (lambda spec: with_token(spec, special=...), "KeyError('special')"),
    "no content": (lambda spec: with_token(spec, content=...), "KeyError('content')"),
    "content is a list": (lambda spec: with_token(spec, content=["<s>"]), FORM),
    "half a character": (lambda spec: with_token(spec, content="\ud800", id=700), "surrogates"),
    "no id": (lambda spec: with_token(spec, id=...), "KeyError('id')"),
    "an added id is a list": (lambda spec: with_token(spec, id=[1]), "has the id [1]"),
    "a huge added id": (lambda spec: with_token(spec, id=2**33), "has the id 8589934592"),
    "another's id": (
        lambda spec: with_token(spec, content="<new>", id=9),
        "has the id 9, no id or another's",
    ),
    "two letters of one id": (
        lambda spec: with_vocab(spec, a=9, b=9),
        "has the id 9, no id or another's",
    ),
    "a huge id": (lambda spec: with_vocab(spec, a=2**33), '"a" has the id 8589934592'),
    "an id of 400 digits": (lambda spec: with_vocab(spec, a=10**400), '"a" has the id 1000'),
    "a negative id": (lambda spec: with_vocab(spec, a=-1), '"a" has the id -1'),
    "an id is true": (lambda spec: with_vocab(spec, a=True), '"a" has the id true'),
    "an id is 5.0": (lambda spec: with_vocab(spec, a=5.0), '"a" has the id 5.0'),
    "an id is a text": (lambda spec: with_vocab(spec, a="5"), '"a" has the id "5"'),
    "an id is null": (lambda spec: with_vocab(spec, a=None), '"a" has the id null'),
    "an id is infinite": (lambda spec: with_vocab(spec, a=float("inf")), '"a" has the id Infinity'),
    "an id is a list": (lambda spec: with_vocab(spec, a=[[]]), '"a" has the id [[]]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["learned", "made"])
def test_a_hostile_file_is_an_error_of_one_line(damage, layout, request, tmp_path):
    """Whatever stands in the file: a line with its name, the cause and a remedy, and at once."""
    change, said = DAMAGES[damage]
    message = refused(write(tmp_path, change(request.getfixturevalue(layout))))
    assert said in message
    assert message.endswith(("; copy or download it again", ", expected a list"))


@pytest.mark.parametrize("key", ["model", "pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("value", [5, "BPE", [1], {"type": ["BPE"]}, {"type": {}}, True])
def test_a_part_of_another_type_is_no_layout_we_know(key, value, learned, made, tmp_path):
    for spec in (learned, made):
        message = refused(write(tmp_path, spec | {key: value}))
        assert "supported are" in message or "expected an object" in message


@pytest.mark.parametrize("given", ["2", 2.0, True, [[1]], {"a": 1}, -1, 512, 2**70])
def test_a_special_id_in_config_json_that_is_none_is_refused(given, learned, tmp_path):
    folder = write(tmp_path, learned, {"pad_token_id": given})
    assert "config.json has pad_token_id" in refused(folder)


# Training -----------------------------------------------------------------------------------------


def merges_of(texts, rounds):
    return train_bpe(texts, 258 + rounds)["model"]["merges"]


def test_the_order_of_the_texts_does_not_matter():
    assert merges_of(TEXTS, 200) == merges_of(reversed(TEXTS), 200)


def test_a_lesson_small_enough_to_do_by_hand():
    # Words: "ab", " ab" twice, " abc". a+b occurs 4 times, then " "+ab 3 times, then nothing twice.
    assert merges_of(["ab ab ab abc"], 10) == ["a b", "Ġ ab"]


def test_of_equally_frequent_pairs_the_one_with_the_lowest_ids_is_joined():
    assert merges_of(["xy,ab,xy,ab"], 10) == ["a b", "x y"]


def test_training_picks_what_a_full_count_of_all_pairs_picks_in_every_round():
    words = [f" {word}".encode() for word in LESSON.split() if word.isalpha()]
    split, expected = [[bytes([b]) for b in word] for word in words], []
    order = {bytes([b]): b for b in range(256)}
    for _ in range(60):
        counts = Counter(p for word in split for p in pairwise(word))
        best = max(counts, key=lambda p: (counts[p], -order[p[0]], -order[p[1]]))
        if counts[best] < 2:
            break
        expected.append(f"{spell(best[0])} {spell(best[1])}")
        order[b"".join(best)] = len(order)
        for word in split:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [b"".join(best)]
    assert len(expected) > 15 and merges_of([b"".join(words).decode()], 60) == expected


def test_numbers_are_one_token_a_digit(learned, tmp_path):
    assert not any(
        c.isdigit()
        for merge in merges_of(["12 12 12 a1 a1 x12 1212 3.5 3.5"] * 9, 50)
        for c in merge
    )
    ours = load_tokenizer(write(tmp_path, learned))
    assert [ours.decode([i]) for i in ours.encode("2048+16")] == list("2048+16")


def test_training_fills_the_vocabulary_and_numbers_special_tokens_first(learned):
    vocab = learned["model"]["vocab"]
    assert list(vocab.values()) == list(range(512)) and list(vocab)[:2] == [
        "<|endoftext|>",
        "<|padding|>",
    ]


def test_transformers_loads_the_learned_file_unchanged(learned, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write(
        tmp_path,
        learned,
        {"model_type": "olmoe", "vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1},
    )
    reference, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert reference(text)["input_ids"] == ids
        assert reference.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)


# Command line -------------------------------------------------------------------------------------


def run(*args):
    command = [sys.executable, ROOT / "data" / "tokenizer.py", *args]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={"PYTHONUTF8": "1"}
    )


def test_the_command_prints_ids_pieces_and_the_text(learned, tmp_path):
    ours = load_tokenizer(write(tmp_path, learned))
    shown = run(tmp_path, "a café, 42").stdout
    assert str(ours.encode("a café, 42")) in shown and "a café, 42" in shown


def test_the_command_fails_without_a_traceback(tmp_path):
    result = run(tmp_path / "nowhere", "text")
    assert (
        result.returncode == 1
        and result.stderr.startswith("error: ")
        and "Traceback" not in result.stderr
    )
