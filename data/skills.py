"""The embedded world: twelve small skills a 2.8 M parameter MoE can learn on one CPU core, and four
it has never seen.

Fine-tuning is only worth reading about if there is a pre-trained model to fine-tune. This file
generates the text of a world small enough to be learnt from scratch in about an hour, and varied
enough that the router has something to route: every family has its own keyword, words and rule, so
experts can specialise. A row is a prompt and an answer, here with a bar between them:

    reverse : c a t s ->| s t a c                              letters backwards
    sort : d b x a ->| a b d x                                 letters in order
    cipher : c a p ->| h k e                                   one fixed letter map
    rotate : zelo haku vivi ->| haku vivi zelo                 the first word goes last
    kinship : lea is the sister of gus . gus is the father of tom . lea is to tom the| aunt
    height : ann is taller than bob . cid is shorter than bob . who is tallest ?| ann
    day : ann came on tue , bob 3 days after , cid 2 days before . when came bob ?| fri
    logic : not ( true and false ) or false ->| true           and, or, not, brackets
    add : 47 + 85 ->| 231                                      132 with its ones digit first
    mod 7 : 3 + 5 + 6 ->| 10                                   the running sum: 1, then 0
    translate : the dog will see the cow ->| mihu vori zokeva  subject, object, verb with its tense
    quiz : which is a fruit ? axe , fig , cow ->| fig          a table of some eighty facts

What a symbol is. Words, letters and punctuation stand between single spaces and each is one token,
digits are one token each (`lexicon_text` is what the tokenizer learns that from). Only the invented
language is finer: its words are two syllables and two tokens, ` ka` + `vo`, and a verb carries its
tense as a third. A prompt never ends in a space and an answer begins with exactly one; the
tokenizer cuts text before spaces, so tokenising a prompt and its answer apart gives the tokens of
the whole. A row has 9 to 25 tokens, its answer 1 to 8.

What is posed so that a small model can do it. Sums are answered ones digit first, because then each
carry is known when it is needed; modular sums show every intermediate value, because then each is
one look-up; multiple choice is answered with the word, because the number of an option is one more
thing to compute.

The split. A row is a test row if and only if crc32(prompt) % 8 == 0. No list is kept: the rule
decides for every prompt of every family, whatever the seed. Training never draws that eighth, so
test accuracy measures what generalises. The smallest families, translate and logic, have 4,752 and
9,216 prompts; the others 10,000 or more.

What is held out. Four targets each change one table of a family and are never shown in
pre-training:

    kinship_new   (the default) the relations stay, their names become invented words: new words for
                  known concepts
    lexicon_new   the grammar of translate stays, every noun, verb and tense ending is another: a
                  new vocabulary
    order_new     the words of translate stay, the verb comes before the object, and a negation
                  last: a new grammar
    cipher_new    the letter map is another one, at every letter: a new string map

    three_new     each row is of kinship_new, lexicon_new or cipher_new: enough to learn for methods
                  to differ in what they learn, and in what they forget for it

Their prompts are the family's prompts (order_new also says "not"). So the pre-trained model
understands the question, answers it in its old words, and scores 0; and a model that has learnt a
target must have overwritten the family it varies. Forgetting is therefore measured on the families
that no target contradicts. New words are made of the syllables, hence of the tokens, that
pre-training used, in pairs that no pre-training row contains.

Whoever chooses a learning rate, or when to stop, by the rows that a table reports has measured the
choice as well. So there is a third split, for choices: validation rows are test rows behind the
first 500 of each skill, which are the most that a table uses.

    python data/skills.py FOLDER   write its tokenizer into a model folder
    python data/skills.py          three rows of everything
"""

import json
import random
import re
import sys
import zlib
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402
from data.tokenizer import train_bpe  # noqa: E402


class Row(NamedTuple):
    family: str
    prompt: str
    answer: str  # begins with one space


# The tables: every fact of this world -------------------------------------------------------------


def _table(text):
    """Lines of "key: some words" -> {key: [words]}."""
    lines = [line.split(": ") for line in text.strip().splitlines()]
    return {key.strip(): words.split() for key, words in lines}


LETTERS = "abcdefghijklmnopqrstuvwxyz"
MEN = "bob cid dan gus hal ivo ned tom".split()
WOMEN = "ann eva ida lea mia pam una zoe".split()
NAMES = MEN + WOMEN
DAYS = "mon tue wed thu fri sat sun".split()

# Relations are his word, her word. A is STEP[i] of B, B is STEP[j] of C, then A is to C the
# COMPOSED[i j]. Siblings share both parents and parents are married: that makes every composition
# one word. ("parent child" is the other parent of the same child.)
STEP = _table("""
    parent: father mother
    sibling: brother sister
    child: son daughter
""")
COMPOSED = _table("""
    parent parent: grandpa grandma
    parent sibling: father mother
    parent child: husband wife
    sibling parent: uncle aunt
    sibling sibling: brother sister
    sibling child: son daughter
    child parent: brother sister
    child sibling: nephew niece
    child child: grandson granddaughter
""")

NOUNS = "dog cat cow pig hen fox king cook monk boy girl nurse".split()
VERBS = "see hear help find call push pull like fear miss feed hit".split()
TENSES = "did does will".split()

KIND = _table("""
    beast: dog cat cow pig hen fox
    fruit: fig plum pear lime date
    tool: saw axe hoe rake pen
    metal: tin iron gold zinc lead
    drink: tea milk ale wine cola
    tree: oak elm ash yew fir
    garment: hat cap sock boot coat
    color: red blue gray pink tan white green
""")
PLACE = _table("""
    farm: dog cat cow pig hen
    wood: fox oak elm ash yew fir
    shed: saw axe hoe rake
    mine: tin iron gold zinc lead
    shop: hat cap sock boot coat
""")
COLOR = _table("""
    red: wine fox
    blue: plum
    gray: iron zinc lead
    pink: pig fig
    tan: tea oak ale
    white: milk hen
    green: lime pear fir
""")
QUIZ = [(KIND, "which is a {} ?"), (PLACE, "where is the {} ?"), (COLOR, "what color is {} ?")]
THINGS = sum(KIND.values(), [])

# The invented language. Two of sixteen syllables are a word, which makes 256; these were shuffled
# once and dealt out, so that no list has a word of another. A tense is one syllable, put on the end
# of the verb.
SYLLABLES = "ka ke ku va vo vi zu ze zo mi mu lo le ha hu ri".split()
ENGLISH = NOUNS + VERBS + TENSES
_translate = """
    mihu voha vori kami kaka haka zuva vile miva hazu leri huze
    zoke huvi zovo muka loka zori muke miha vomi vovi kuku vazu
    zu le va
"""
_lexicon_new = """
    vihu kulo huzo zoze kazu kezu kele rika lova keva levi lomi
    zule kavo lole vika voze kuha lovi lelo lemu mimi kumi valo
    ri lo ha
"""
LEXICON = dict(zip(ENGLISH, _translate.split()))  # of translate and order_new
LEXICON_NEW = dict(zip(ENGLISH, _lexicon_new.split()))
NEGATION = "mu"  # of order_new: a word of one syllable, which no other list has

RELATIONS = """
    aunt brother daughter father granddaughter grandma grandpa grandson
    husband mother nephew niece sister son uncle wife
""".split()
_kinship_new = """
    kamu keku kuzu vari voka vike zuzo zele
    zovi mivo mulo loha lemi haze huhu riva
"""
KIN_NEW = dict(zip(RELATIONS, _kinship_new.split()))  # each begins with another syllable

# The words of rotate: they mean nothing.
FREE_WORDS = """
    vivi haku zelo kava voku leka zomi hari zuri vake lomu hake vaze muha levo vize zova
    zevi hamu zeku hami muva zuvo hazo zolo vova loku zuke kuvi kezo halo vami kule zeha
    kavi zeke zoha keka kumu zuka viku haha zoku muri vivo leha vizu hahu riku leva lozo
    loze humu rivi vozo muzo zemi vaku keha keri riha volo muku mile muvi lozu vaha mimu
    kale kuva kemi zuku humi vava vahu milo mize muze kelo vohu kake vilo kevi zezu viri
    huzu kazo lohu mizo hale lezo lori kuvo vimi leku vozu zehu muhu kuri zuvi zuze vole
    zeva vovo vaka lezu zemu vomu zeri zomu hule hava viha mule kari vimu kaze zole muvo
    zoka huku vale kuze miri leze mumi muzu zeka zozu hulo kuka vizo zevo kuke lehu loke
    mivi zozo mizu lele miku rihu zeze mumu kemu vamu zuha zulo huka voke rile huva lolo
    keke vazo zumi rizo huvo kehu viva zezo rimu leke rivo kaha rike kalo zuzu kuzo kaku
    rimi havi kevo havo lovo zuhu rize zumu rizu vavi vavo keze kahu riri zohu huha mike
    rilo huri kuhu huke mika
""".split()

# Sixteen letters: few enough for a rank-16 adapter to learn another map.
CIPHER_LETTERS = "abcdefghijklmnop"
CIPHER = dict(zip(CIPHER_LETTERS, "kfhacnojdmlgpibe"))
CIPHER_NEW = dict(zip(CIPHER_LETTERS, "gdoblimepcahfknj"))


# The families: rng -> (prompt, answer) ------------------------------------------------------------


def reverse(rng):
    word = rng.choices(LETTERS, k=rng.randint(3, 6))
    return f"reverse : {' '.join(word)} ->", " ".join(word[::-1])


def sort(rng):
    word = rng.sample(LETTERS, rng.randint(3, 6))
    return f"sort : {' '.join(word)} ->", " ".join(sorted(word))


def cipher(rng, key=CIPHER):
    word = rng.choices(CIPHER_LETTERS, k=rng.randint(3, 5))
    return f"cipher : {' '.join(word)} ->", " ".join(key[letter] for letter in word)


def rotate(rng):
    words = rng.sample(FREE_WORDS, rng.randint(2, 3))
    return f"rotate : {' '.join(words)} ->", " ".join(words[1:] + words[:1])


def kinship(rng, words=None):
    """Two statements, one conclusion; `words` renames the relation in the answer only."""
    a, b, c = rng.sample(NAMES, 3)
    steps = rng.choice(list(COMPOSED))
    first, second = steps.split()
    a_to_b = STEP[first][a in WOMEN]  # 0 is his word, 1 is hers
    b_to_c = STEP[second][b in WOMEN]
    a_to_c = COMPOSED[steps][a in WOMEN]
    facts = f"{a} is the {a_to_b} of {b} . {b} is the {b_to_c} of {c} ."
    return f"kinship : {facts} {a} is to {c} the", words[a_to_c] if words else a_to_c


def height(rng):
    """Three or four people, each compared with the next in a hidden order; shuffled."""
    people = rng.sample(NAMES, rng.randint(3, 4))  # tallest first
    facts = []
    for tall, short in pairwise(people):
        same_fact = [f"{tall} is taller than {short} .", f"{short} is shorter than {tall} ."]
        facts.append(rng.choice(same_fact))
    rng.shuffle(facts)
    asked, who = rng.choice([("tallest", people[0]), ("shortest", people[-1])])
    return f"height : {' '.join(facts)} who is {asked} ?", who


def day(rng):
    """Two people arrive so many days before or after a third; one of the two is asked for."""
    start = rng.randrange(7)
    anchor, *others = rng.sample(NAMES, 3)
    sentence = f"{anchor} came on {DAYS[start]}"
    arrival = {}
    for who in others:
        days = rng.randint(2, 6)
        word, sign = rng.choice([("after", 1), ("before", -1)])
        sentence += f" , {who} {days} days {word}"
        arrival[who] = DAYS[(start + sign * days) % 7]
    who = rng.choice(others)
    return f"day : {sentence} . when came {who} ?", arrival[who]


def _joined(rng, left, right):
    return f"{left} {rng.choice(['and', 'or'])} {right}"


def _clause(rng, brackets):
    """A random proposition: true, not false, ( not true or false ), not ( ... )."""
    if brackets:
        clause = f"( {_joined(rng, _clause(rng, False), _clause(rng, False))} )"
    else:
        clause = rng.choice(["true", "false"])
    return f"not {clause}" if rng.random() < 0.4 else clause


def logic(rng):
    """Two clauses, one or both in brackets; redrawn until it fits: half of the answers are true."""
    wanted = rng.random() < 0.5
    while True:
        left, right = rng.choice([(True, True), (True, False), (False, True)])
        text = _joined(rng, _clause(rng, left), _clause(rng, right))
        if eval(text, {"true": True, "false": False}) is wanted:  # a proposition is Python, too
            return f"logic : {text} ->", str(wanted).lower()


def add(rng):
    """Two digits each, three of the sum, ones first: at every digit the carry is already known."""
    x, y = rng.randrange(100), rng.randrange(100)
    total = f"{x + y:03d}"
    return f"add : {x:02d} + {y:02d} ->", total[::-1]


def mod(rng):
    """The answer shows the sum after every further term: n terms, n - 1 digits."""
    modulus = rng.choice([5, 7])
    terms = [rng.randrange(modulus) for _ in range(rng.randint(3, 5))]
    sums = [str(total % modulus) for total in accumulate(terms)]
    return f"mod {modulus} : {' + '.join(map(str, terms))} ->", "".join(sums[1:])


def translate(rng, lexicon=LEXICON, order="{subject} {object} {verb}", negation=None):
    """Subject, tense, verb, object into a language whose verb comes last, the tense on its end."""
    subject, thing = rng.sample(NOUNS, 2)
    verb, tense = rng.choice(VERBS), rng.choice(TENSES)
    answer = order.format(
        subject=lexicon[subject],
        object=lexicon[thing],
        verb=lexicon[verb] + lexicon[tense],
    )
    if negation and rng.random() < 0.5:
        tense = f"{tense} not"
        answer = f"{answer} {negation}"
    return f"translate : the {subject} {tense} {verb} the {thing} ->", answer


def quiz(rng):
    """Three choices, one of them right; wrong ones are answers to other questions of its sort."""
    table, question = rng.choices(QUIZ, weights=[3, 1, 1])[0]
    value = rng.choice(list(table))
    thing = rng.choice(table[value])
    if table is KIND:
        asked, right, answers = value, thing, THINGS
    else:
        asked, right, answers = thing, value, table
    wrong = [answer for answer in answers if answer not in (value, *table[value])]
    choices = [right, *rng.sample(wrong, 2)]
    rng.shuffle(choices)
    return f"quiz : {question.format(asked)} {' , '.join(choices)} ->", right


MAKERS = reverse, sort, cipher, rotate, kinship, height, day, logic, add, mod, translate, quiz
FAMILIES = {maker.__name__: maker for maker in MAKERS}
TARGETS = {
    "kinship_new": partial(kinship, words=KIN_NEW),
    "lexicon_new": partial(translate, lexicon=LEXICON_NEW),
    "order_new": partial(translate, order="{subject} {verb} {object}", negation=NEGATION),
    "cipher_new": partial(cipher, key=CIPHER_NEW),
}
DEFAULT_TARGET = "kinship_new"
PARTS = {"three_new": ("kinship_new", "lexicon_new", "cipher_new")}
TARGETS["three_new"] = lambda rng: TARGETS[rng.choice(PARTS["three_new"])](rng)
# The families whose prompts a target answers in another way.
CONTRADICTS = {
    "kinship_new": ("kinship",),
    "lexicon_new": ("translate",),
    "order_new": ("translate",),
    "cipher_new": ("cipher",),
    "three_new": ("kinship", "translate", "cipher"),
}

# Share of each family among pre-training rows (out of the sum): the harder ones are seen more.
SHARES = dict.fromkeys(FAMILIES, 1)
SHARES |= {"height": 3, "day": 3, "logic": 2, "add": 3, "mod": 3, "quiz": 2}


# Drawing rows -------------------------------------------------------------------------------------


def is_test(prompt):
    """The split: one prompt in eight, for ever and for every seed."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def _draw(name, rng, test):
    maker = FAMILIES.get(name) or TARGETS[name]
    while True:
        prompt, answer = maker(rng)
        if is_test(prompt) == test:
            return Row(name, prompt, " " + answer)


TABLE_ROWS = 500


def sample(name, split, n, seed=0):
    """n rows of one family or target: training rows may repeat, as they would in a corpus; test and
    validation rows are distinct."""
    if split == "validation":
        return sample(name, "test", TABLE_ROWS + n, seed)[TABLE_ROWS:]
    assert split in ("train", "test"), split
    # Seeding by text is the same on every machine and version.
    rng = random.Random(f"{name} {split} {seed}")
    if split == "train":
        return [_draw(name, rng, test=False) for _ in range(n)]
    rows = {}  # by prompt, in the order drawn
    stale = 0
    while len(rows) < n:
        row = _draw(name, rng, test=True)
        stale = stale + 1 if row.prompt in rows else 0
        if stale > 1000:  # a thousand draws in a row and nothing new: the test split is exhausted
            raise ValueError(f"{name} has about {len(rows)} distinct test rows, {n} were asked for")
        rows[row.prompt] = row
    return list(rows.values())


def mixture(n, seed):
    """n pre-training rows of all families, drawn by SHARES."""
    rng = random.Random(f"mixture {seed}")
    names = rng.choices(list(SHARES), weights=SHARES.values(), k=n)
    return [_draw(name, rng, test=False) for name in names]


# For the tokenizer --------------------------------------------------------------------------------


def words():
    """Every symbol of the pre-training world but numbers and invented words, in alphabetical
    order."""
    text = " ".join(row.prompt + row.answer for row in mixture(5000, 0))
    others = rf"\d+|({'|'.join(SYLLABLES)})+"
    return sorted(symbol for symbol in set(text.split()) if not re.fullmatch(others, symbol))


def lexicon_text():
    """The texts a BPE is learnt from: it ends with one token a symbol and one a syllable, and
    nothing longer.

    A token holds the space before it, so symbols are listed after a space; the keywords, which
    begin a row, without. Syllables come first in frequency, to win against chance pairs of English
    letters, and come singly, ` ka` to begin a word and `ka` to go on: a word that was one token in
    pre-training would be of no use in the new words of a target. With the 256 bytes and two special
    tokens that is a little less than 640, where no pair is left to merge.
    """
    syllables = [*SYLLABLES, *(" " + syllable for syllable in SYLLABLES)]
    others = [word for word in words() if word not in FAMILIES]
    return syllables * 100 + [*FAMILIES, " " + " ".join(others)] * 2


def write_tokenizer(folder):
    """Learn the world's tokenizer and write it as transformers expects it: tokenizer.json,
    tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "bos_token": None,
        "unk_token": None,
    }
    tokenizer = json.dumps(train_bpe(lexicon_text(), 640), indent=1, ensure_ascii=False)
    run.write_text(Path(folder, "tokenizer.json"), tokenizer + "\n")
    run.write_json(Path(folder, "tokenizer_config.json"), config, indent=1)


# The command --------------------------------------------------------------------------------------


@run.command
def main():
    parser = run.Parser(description="The embedded world: three rows of everything.")
    parser.add_argument("folder", nargs="?", help="write its tokenizer into this model folder")
    folder = parser.parse_args().folder
    if folder:
        return write_tokenizer(folder)
    for name in FAMILIES | TARGETS:
        for row in sample(name, "test", 3):
            print(f"{name:12} {row.prompt}|{row.answer}")


if __name__ == "__main__":
    main()
