"""The embedded world is what it says: every answer is worked out a second time, by other means than
the generator's."""

import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from data import skills
from data.skills import (
    FAMILIES,
    SHARES,
    TARGETS,
    Row,
    is_test,
    lexicon_text,
    mixture,
    sample,
    words,
)
from data.tokenizer import load_tokenizer, train_bpe

EVERYTHING = [*FAMILIES, *TARGETS]
WORLD = 13990945  # the checksum of the world that data/tiny_olmoe was trained on
PARENT = {
    "kinship_new": "kinship",
    "lexicon_new": "translate",
    "order_new": "translate",
    "cipher_new": "cipher",
}


@pytest.fixture(scope="module")
def rows():
    """A thousand training rows and 300 test rows of everything."""
    return {name: sample(name, "train", 1000) + sample(name, "test", 300) for name in EVERYTHING}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(train_bpe(lexicon_text(), 640)))
    return load_tokenizer(folder)


# Drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_seed_decides_the_rows(name):
    for split in ("train", "test"):
        assert sample(name, split, 50, seed=1) == sample(name, split, 50, seed=1)
        assert sample(name, split, 50, seed=1) != sample(name, split, 50, seed=2)
        assert sample(name, split, 50, seed=1) == sample(name, split, 80, seed=1)[:50], (
            "more rows only add rows"
        )


def test_the_world_is_the_same_in_every_process():
    """Python salts the hash of a text anew in each process; the world must not depend on it."""
    told = "skills.LEXICON, skills.mixture(30, 5), skills.sample('quiz', 'test', 5)"
    command = f"from data import skills; print({told})"
    root = Path(__file__).parent.parent
    told = [
        subprocess.run(
            [sys.executable, "-c", command],
            cwd=root,
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
        )
        for salt in "12"
    ]
    assert told[0].stdout == told[1].stdout and told[0].stdout, told[0].stderr


def test_the_world_stays_as_it_was_when_the_base_model_was_trained():
    """Another deal of the invented words, or another map, would make the trained model wrong
    without a word."""
    tables = repr(
        (skills.LEXICON, skills.LEXICON_NEW, skills.KIN_NEW, skills.CIPHER, skills.CIPHER_NEW)
    )
    everything = tables
    for name in [*FAMILIES, *PARENT]:
        for split in ("train", "test"):
            rows = sample(name, split, 20)
            everything += repr([(row.family, row.prompt, row.answer) for row in rows])
    assert zlib.crc32(everything.encode()) == WORLD, (
        "the world has changed: train data/tiny_olmoe again, then this sum"
    )


@pytest.mark.parametrize("name", EVERYTHING)
def test_train_and_test_are_disjoint(name):
    train = {row.prompt for row in sample(name, "train", 4000)}
    test = [row.prompt for row in sample(name, "test", 500)]
    assert len(set(test)) == 500, "test rows are distinct"
    assert not train & set(test)
    assert all(zlib.crc32(prompt.encode()) % 8 == 0 for prompt in test)
    assert not any(zlib.crc32(prompt.encode()) % 8 == 0 for prompt in train)


def test_asking_for_more_test_rows_than_there_are_is_an_error_with_the_number():
    with pytest.raises(ValueError, match="about 6.. distinct test rows, 5000"):
        sample("translate", "test", 5000)


def test_a_name_that_is_no_skill_or_split_never_gives_rows():
    with pytest.raises(KeyError, match="juggle"):
        sample("juggle", "test", 1)
    with pytest.raises(AssertionError, match="dev"):
        sample("add", "dev", 1)


def test_the_mixture_is_training_rows_of_all_families_in_their_shares():
    drawn = mixture(11_000, seed=3)
    counts = Counter(row.family for row in drawn)
    assert set(counts) == set(FAMILIES) == set(SHARES)
    for name, share in SHARES.items():
        expected = (
            11_000 * share / sum(SHARES.values())
        )  # 500 to 1,500, with a standard deviation of at most 36
        assert abs(counts[name] - expected) < 180, name
    assert not any(skills.is_test(row.prompt) for row in drawn)
    assert mixture(50, seed=3) == mixture(50, seed=3) != mixture(50, seed=4)


# Shape of the rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_prompt_and_answer_meet_at_exactly_one_space(name, rows):
    for row in rows[name]:
        assert row.family == name
        text = row.prompt + row.answer
        assert text.isascii() and text == text.lower() and "\n" not in text and "  " not in text
        assert row.prompt == row.prompt.strip()
        assert row.answer == " " + row.answer.strip() != " "


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_opens_with_its_own_keyword(name, rows):
    assert {row.prompt.split()[0] for row in rows[name]} == {name}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_family_is_large_and_no_answer_dominates(name):
    rng = random.Random(0)
    drawn = [Row(name, *(FAMILIES | TARGETS)[name](rng)) for _ in range(12_000)]
    assert len({row.prompt for row in drawn}) > 4000
    answers = {}
    for row in drawn:
        assert answers.setdefault(row.prompt, row.answer) == row.answer, "one prompt has one answer"
    commonest = Counter(row.answer for row in drawn).most_common(1)[0][1] / len(drawn)
    assert commonest < (0.55 if name == "logic" else 0.25), commonest


# Answers, a second time ---------------------------------------------------------------------------


def body(row):
    """The prompt without keyword and arrow."""
    return row.prompt.split(" : ", 1)[1].removesuffix(" ->")


def test_reverse_sort_and_rotate(rows):
    for row in rows["reverse"]:
        assert row.answer.strip() == body(row)[::-1]
    for row in rows["sort"]:
        assert row.answer.split() == sorted(body(row).split())
        assert len(set(body(row).split())) == len(body(row).split()), "no letter twice"
    for row in rows["rotate"]:
        first, _, rest = body(row).partition(" ")
        assert row.answer.strip() == f"{rest} {first}"


@pytest.mark.parametrize("name", ["cipher", "cipher_new"])
def test_a_cipher_is_one_fixed_map_one_to_one(name, rows):
    seen = {
        (a, b)
        for row in rows[name]
        for a, b in zip(body(row).split(), row.answer.split(), strict=True)
    }
    assert len(seen) == len({a for a, _ in seen}) == len({b for _, b in seen}) == 16
    assert all(a != b for a, b in seen)


class Family:
    """A household in which every relation has an instance: grandparents, their three children, of
    whom two are married, and their grandchildren. Relations are read off who is the child of
    whom."""

    children_of = {  # couple (man, woman) -> children; capital letters are men
        ("A", "b"): ["C", "D", "e", "f"],
        ("C", "g"): ["H", "I", "j", "k"],
        ("L", "e"): ["M", "N", "o", "p"],
    }
    people = sorted({p for couple, kids in children_of.items() for p in [*couple, *kids]})

    def parents(self, x):
        return next((set(couple) for couple, kids in self.children_of.items() if x in kids), set())

    def relation(self, x, y):
        """What x is to y, or None."""
        parents = self.parents
        above_y = set().union(*map(parents, parents(y)))
        above_x = set().union(*map(parents, parents(x)))
        siblings = parents(x) == parents(y) != set()
        if x == y:
            return None
        for holds, his, hers in [
            (x in parents(y), "father", "mother"),
            (y in parents(x), "son", "daughter"),
            (siblings, "brother", "sister"),
            ({x, y} in [set(couple) for couple in self.children_of], "husband", "wife"),
            (x in above_y, "grandpa", "grandma"),
            (y in above_x, "grandson", "granddaughter"),
            (
                parents(x) == above_y - parents(x) or (parents(x) and parents(x) <= above_y),
                "uncle",
                "aunt",
            ),
            (parents(y) and parents(y) <= above_x, "nephew", "niece"),
        ]:
            if holds:
                return his if x.isupper() else hers
        return None


@pytest.fixture(scope="module")
def conclusions():
    """(relation of a to b, of b to c) -> the set of what a is to c, over a whole household."""
    household, found = Family(), {}
    for a, b, c in permutations(household.people, 3):
        first, second = household.relation(a, b), household.relation(b, c)
        if first and second:
            found.setdefault((first, second), set()).add(household.relation(a, c))
    return found


KINSHIP = re.compile(
    r"kinship : (\w+) is the (\w+) of (\w+) \. (\w+) is the (\w+) of (\w+) \. (\w+) is to (\w+) the"
)


def test_kinship_holds_in_a_household(rows, conclusions):
    for row in rows["kinship"]:
        a, first, b, b_again, second, c, a_again, c_again = KINSHIP.fullmatch(row.prompt).groups()
        assert (a, b, c) == (a_again, b_again, c_again) and len({a, b, c}) == 3
        assert conclusions[first, second] == {row.answer.strip()}, (first, second)


def test_kinship_new_renames_the_relations_one_to_one(rows, conclusions):
    renamed = {}
    for row in rows["kinship_new"]:
        _, first, _, _, second, *_ = KINSHIP.fullmatch(row.prompt).groups()
        (relation,) = conclusions[first, second]
        assert renamed.setdefault(relation, row.answer) == row.answer
    assert len(renamed) == len(set(renamed.values())) == 16
    assert len({word[1:3] for word in renamed.values()}) == 16, "the first syllable tells the word"


def test_height_has_one_order_that_fits_all_comparisons(rows):
    for row in rows["height"]:
        facts = re.findall(r"(\w+) is (taller|shorter) than (\w+)", row.prompt)
        taller = {(a, b) if word == "taller" else (b, a) for a, word, b in facts}
        people = {who for pair in taller for who in pair}
        fits = [p for p in permutations(people) if all(p.index(a) < p.index(b) for a, b in taller)]
        assert len(fits) == 1
        assert row.answer.strip() == fits[0][0 if row.prompt.endswith("who is tallest ?") else -1]


def test_day_by_walking_through_the_week(rows):
    week = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    for row in rows["day"]:
        start = re.search(r"came on (\w+)", row.prompt)[1]
        asked = re.search(r"when came (\w+) \?$", row.prompt)[1]
        [(days, word)] = re.findall(rf", {asked} (\d) days (after|before)", row.prompt)
        walk = week * 3 if word == "after" else week[::-1] * 3
        assert row.answer.strip() == walk[walk.index(start) + int(days)]


def test_logic_by_replacing_what_is_known_until_one_word_is_left(rows):
    """ "not" binds closest, then "and", then "or"; brackets first, from the inside."""

    def without_brackets(text):
        text = text.replace("not true", "no").replace("not false", "yes")
        text = text.replace("true", "yes").replace("false", "no")
        return "true" if any("no" not in part for part in text.split(" or ")) else "false"

    for row in rows["logic"]:
        text = body(row)
        while "(" in text:
            text = re.sub(r"\( ([^()]*) \)", lambda inner: without_brackets(inner[1]), text)
        assert row.answer.strip() == without_brackets(text)


def test_add_and_mod_are_arithmetic(rows):
    for row in rows["add"]:
        x, y = map(int, body(row).split(" + "))
        assert int(row.answer.strip()[::-1]) == x + y and len(row.answer) == 4
    for row in rows["mod"]:
        modulus, terms = int(row.prompt.split()[1]), list(map(int, body(row).split(" + ")))
        assert all(0 <= term < modulus for term in terms)
        assert int(row.answer[-1]) == sum(terms) % modulus, "the last digit is the result"
        running = [terms[0], *map(int, row.answer.strip())]
        assert len(running) == len(terms)
        for before, term, after in zip(running, terms[1:], running[1:], strict=False):
            assert (before + term - after) % modulus == 0 and after < modulus


@pytest.mark.parametrize("name", ["translate", "lexicon_new", "order_new"])
def test_a_translation_can_be_translated_back(name, rows):
    lexicon = skills.LEXICON_NEW if name == "lexicon_new" else skills.LEXICON
    english = {word: meaning for meaning, word in lexicon.items()}
    assert len(english) == len(lexicon) == 12 + 12 + 3
    for row in rows[name]:
        said, negated = row.answer.split(), ""
        if name == "order_new":
            if said[-1] == "mu":
                negated = " not"
                said.pop()
            subject, verb, thing = said
        else:
            subject, thing, verb = said
        verb, tense = verb[:-2], verb[-2:]
        back = (
            f"the {english[subject]} {english[tense]}{negated} {english[verb]} the {english[thing]}"
        )
        assert back == body(row)
    assert {" not " in row.prompt for row in rows[name]} == (
        {True, False} if name == "order_new" else {False}
    )


def test_quiz_has_one_right_choice(rows):
    kind = {thing: kind for kind, things in skills.KIND.items() for thing in things}
    place = {thing: place for place, things in skills.PLACE.items() for thing in things}
    color = {thing: color for color, things in skills.COLOR.items() for thing in things}
    for table, facts in ((skills.KIND, kind), (skills.PLACE, place), (skills.COLOR, color)):
        assert sum(map(len, table.values())) == len(facts), "nothing is filed twice"
    assert len(kind) + len(place) + len(color) == 84, "some eighty facts"
    asked = Counter()
    for row in rows["quiz"]:
        question, _, options = body(row).partition(" ? ")
        options = options.split(" , ")
        assert len(set(options)) == 3
        subject = re.sub(r"^(which is a|where is the|what color is) ", "", question)
        if question.startswith("which"):
            right = [option for option in options if kind[option] == subject]
        else:
            right = [
                option
                for option in options
                if option == (place if question[2] == "e" else color)[subject]
            ]
        assert right == [row.answer.strip()]
        asked[options.index(right[0])] += 1
    assert min(asked.values()) > 0.28 * sum(asked.values()), "the right choice stands anywhere"


# What is held out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARENT)
def test_the_model_before_fine_tuning_scores_nothing(name):
    """A target asks what its family asks, and the family's answer is always wrong."""
    for seed in range(500):
        prompt, new = TARGETS[name](random.Random(seed))
        asked, old = FAMILIES[PARENT[name]](random.Random(seed))
        assert prompt.replace(" not ", " ") == asked
        assert old != new
        new, old = new.split(), old.split()
        if name == "order_new":
            subject, thing, verb = old
            assert new == [subject, verb, thing] + ["mu"] * (" not " in prompt)
        elif name == "cipher_new":
            assert all(a != b for a, b in zip(new, old, strict=True)), "not one letter is right"
        else:
            assert not set(new) & set(old), "not one word is right"


def test_a_mixed_target_draws_a_third_of_its_rows_from_each_part_and_contradicts_their_families():
    rows = sample("three_new", "train", 3000)
    parts = {"kinship": "kinship_new", "translate": "lexicon_new", "cipher": "cipher_new"}
    drawn = Counter(parts[row.prompt.split()[0]] for row in rows)
    assert set(drawn) == {*skills.PARTS["three_new"]}
    assert all(900 < n < 1100 for n in drawn.values()), drawn
    answers = {}  # each prompt has one answer, here as in the part itself
    for part in parts.values():
        answers |= {row.prompt: row.answer for row in sample(part, "train", 20_000, seed=1)}
    seen = [row for row in rows if row.prompt in answers]
    assert len(seen) > 500 and all(answers[row.prompt] == row.answer for row in seen)
    contradicted = {PARENT[part] for part in parts.values()}
    assert {*skills.CONTRADICTS["three_new"]} == contradicted
    assert all(skills.CONTRADICTS[name] == (PARENT[name],) for name in PARENT)


@pytest.mark.parametrize("name", [*FAMILIES, *PARENT])
def test_no_validation_row_is_trained_on_or_stands_in_a_table(name):
    """Tables use the first 500 test rows at most; training never draws from the test eighth."""
    validation = sample(name, "validation", 90)
    prompts = {row.prompt for row in validation}
    assert len(prompts) == 90 and all(is_test(prompt) for prompt in prompts)
    assert not prompts & {row.prompt for row in sample(name, "test", 500)}
    assert not prompts & {row.prompt for row in sample(name, "train", 2000)}
    assert validation == sample(name, "validation", 90)


def test_no_two_lists_of_invented_words_share_one():
    """Two of sixteen syllables: all 256 words, each in one list; tenses are one syllable."""
    lists = [skills.KIN_NEW.values(), skills.FREE_WORDS]
    for lexicon in (skills.LEXICON, skills.LEXICON_NEW):
        assert all(lexicon[tense] in skills.SYLLABLES for tense in skills.TENSES)
        lists.append([lexicon[word] for word in skills.NOUNS + skills.VERBS])
    words = [word for some in lists for word in some]
    two = {first + second for first in skills.SYLLABLES for second in skills.SYLLABLES}
    assert len(words) == 256 and set(words) == two
    tenses = [lexicon[t] for lexicon in (skills.LEXICON, skills.LEXICON_NEW) for t in skills.TENSES]
    assert len({*tenses, skills.NEGATION}) == 7


def test_new_words_are_never_seen_in_pre_training():
    new = set(skills.KIN_NEW.values()) | {skills.NEGATION}
    new |= {skills.LEXICON_NEW[word] for word in skills.NOUNS + skills.VERBS}
    new |= {
        skills.LEXICON_NEW[verb] + skills.LEXICON_NEW[tense]
        for verb in skills.VERBS
        for tense in skills.TENSES
    }
    assert len(new) == 16 + 1 + 24 + 36
    seen = {
        symbol for row in mixture(30_000, seed=9) for symbol in (row.prompt + row.answer).split()
    }
    assert not new & seen
    stems = {symbol[:4] for symbol in seen if symbol.isalpha()}
    assert not {word for word in new if len(word) == 4} & stems, "nor under a tense"


# The tokenizer ------------------------------------------------------------------------------------


def test_a_symbol_is_a_token_and_a_syllable_is_a_token(tokenizer):
    assert tokenizer.vocab_size < 640, "the vocabulary ended because no pair was left"
    for word in words():
        text = word if word in FAMILIES else " " + word
        assert len(tokenizer.encode(text)) == 1, word
    tables = [skills.KIN_NEW, skills.LEXICON, skills.LEXICON_NEW]
    for word in [word for table in tables for word in table.values()] + skills.FREE_WORDS:
        assert len(tokenizer.encode(" " + word)) == len(word) // 2, word
    for lexicon in (skills.LEXICON, skills.LEXICON_NEW):
        for verb in skills.VERBS:
            parts = [" " + lexicon[verb][:2], lexicon[verb][2:], lexicon["will"]]
            assert tokenizer.encode("".join(parts)) == [
                i for part in parts for i in tokenizer.encode(part)
            ]


def test_targets_use_only_tokens_that_pre_training_uses(tokenizer):
    """Their embeddings are trained, so an adapter has only to recombine them."""
    used = {i for row in mixture(8000, seed=1) for i in tokenizer.encode(row.prompt + row.answer)}
    for name in TARGETS:
        for row in sample(name, "train", 300):
            assert used >= set(tokenizer.encode(row.prompt + row.answer)), row


@pytest.mark.parametrize("name", EVERYTHING)
def test_prompt_and_answer_can_be_tokenised_apart_and_are_short(name, rows, tokenizer):
    for row in rows[name]:
        prompt, answer = tokenizer.encode(row.prompt), tokenizer.encode(row.answer)
        assert prompt + answer == tokenizer.encode(row.prompt + row.answer)
        assert 9 <= len(prompt + answer) <= 25 and 1 <= len(answer) <= 8, row
