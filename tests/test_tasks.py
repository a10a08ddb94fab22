"""data/tasks.py asks as the papers ask, byte for byte, and finds in a response what their rules
find.

The prompts are written out here a second time, without a template. The rows are those of the real
files where these stand beside the repository (../shared/data), and made up elsewhere.
"""

import json
import re
from pathlib import Path

import pytest

from data.dataset import encode
from data.tasks import GROUPS, TASKS, TEMPLATES, chat_turns
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real rows are not here: ../shared/data"
)
S = " " * 16
COMMONSENSE = [
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
]
MATH = ["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP"]


def rows_of(file):
    return json.loads((SHARED / file).read_text(encoding="utf-8"))


# Prompts ------------------------------------------------------------------------------------------


def test_there_are_the_papers_fourteen_sets_in_two_groups():
    assert GROUPS == {"commonsense": COMMONSENSE, "math": MATH}
    assert list(TASKS) == COMMONSENSE + MATH


@pytest.mark.parametrize("name", COMMONSENSE + MATH)
def test_the_papers_training_text_is_theirs_byte_for_byte(name):
    row = {"instruction": "What is it?\nSay:  a  b ", "input": "", "output": "the answer\nis 7"}
    without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}What is it?\n"
        "Say:  a  b \n"
        f"{S}\n"
        f"{S}### Response:\n"
        f"{S}"
    )
    assert TASKS[name].render_train(row) == without + "the answer\nis 7"
    del row["input"]
    trained = TASKS[name].render_train(row)
    assert trained == without + "the answer\nis 7", "a missing input is an empty one"
    with_input = (
        "Below is an instruction that describes a task, "
        "paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}What is it?\n"
        "Say:  a  b \n"
        f"{S}\n"
        f"{S}### Input:\n"
        f"{S}x\n"
        "y\n"
        f"{S}\n"
        f"{S}### Response:\n"
        f"{S}the answer\n"
        "is 7"
    )
    assert TASKS[name].render_train(row | {"input": "x\ny"}) == with_input


@pytest.mark.parametrize("name", COMMONSENSE + MATH)
def test_the_papers_evaluation_text_is_theirs_byte_for_byte(name):
    """One space behind the first line, none with an input; empty lines are empty; the seed has no
    space behind it."""
    row = {"instruction": "What is it?", "input": "", "output": "not shown", "answer": "not shown"}
    last = S + "the correct answer is" if name in COMMONSENSE else S
    without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request. \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}What is it?\n"
        "\n"
        f"{S}### Response:\n"
        f"{last}"
    )
    assert TASKS[name].render_eval(row) == without
    with_input = (
        "Below is an instruction that describes a task, "
        "paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}What is it?\n"
        "\n"
        f"{S}### Input:\n"
        f"{S}x y\n"
        "\n"
        f"{S}### Response:\n"
        f"{last}"
    )
    assert TASKS[name].render_eval(row | {"input": "x y"}) == with_input


def test_a_row_that_holds_braces_or_the_words_of_the_template_is_copied_as_it_is():
    row = {"instruction": "{} {0} %s ### Response: {input}", "output": "{answer}"}
    text = TASKS["gsm8k"].render_train(row)
    assert text.count(row["instruction"]) == 1 and text.endswith(S + "{answer}")


def test_the_plain_template_is_instruction_input_and_output_with_empty_lines_between():
    row = {"instruction": "Add.", "input": "", "output": "4"}
    assert set(TEMPLATES) == {"papers", "plain"}
    assert TASKS["SVAMP"].render_train(row, "plain") == "Add.\n\n4"
    assert TASKS["SVAMP"].render_train(row | {"input": "2 2"}, "plain") == "Add.\n\n2 2\n\n4"
    assert TASKS["SVAMP"].render_eval(row, "plain") == "Add.\n\n"
    assert TASKS["piqa"].render_eval(row, "plain") == "Add.\n\nthe correct answer is"


def test_new_tokens_are_limited_as_in_the_papers():
    assert [TASKS[name].max_new_tokens for name in (*COMMONSENSE, *MATH)] == [4] * 8 + [256] * 6


# Chat ---------------------------------------------------------------------------------------------

CHATS = {
    "one turn": ([("user", "hi"), ("assistant", "hello")], "<|user|>\nhi\n<|assistant|>\nhelloEND"),
    "two turns": (
        [("user", "hi"), ("assistant", "hello"), ("user", "2+2?"), ("assistant", "4")],
        "<|user|>\nhi\n<|assistant|>\nhelloEND\n<|user|>\n2+2?\n<|assistant|>\n4END",
    ),
    "system": (
        [("system", "be brief"), ("user", "hi"), ("assistant", "yo")],
        "<|system|>\nbe brief\n<|user|>\nhi\n<|assistant|>\nyoEND",
    ),
    "what follows the last answer is dropped": (
        [("user", "hi"), ("assistant", "yo"), ("user", "and?")],
        "<|user|>\nhi\n<|assistant|>\nyoEND",
    ),
    "two questions, then two answers": (
        [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")],
        "<|user|>\na\n<|user|>\nb\n<|assistant|>\ncEND\n<|assistant|>\ndEND",
    ),
    "line ends and spaces are kept": (
        [("user", " a\n\n"), ("assistant", "\nb  ")],
        "<|user|>\n a\n\n\n<|assistant|>\n\nb  END",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_turns_put_together_are_the_chat_as_written_out(name):
    """The end token behind each answer is written END. An answer is what the assistant says."""
    messages, text = CHATS[name]
    turns = chat_turns([{"role": role, "content": content} for role, content in messages])
    assert "".join(f"{prompt}{answer}END" for prompt, answer in turns) == text
    assert [answer for _, answer in turns] == [
        content for role, content in messages if role == "assistant"
    ]


def test_token_ids_of_a_chat_decode_to_the_chat():
    tokenizer = load_tokenizer(ROOT / "data" / "tiny_olmoe")
    messages, text = CHATS["two turns"]
    example = encode(chat_turns([{"role": r, "content": c} for r, c in messages]), tokenizer)
    end = tokenizer.pieces[tokenizer.eos_id].decode()
    assert tokenizer.decode(example.ids, skip_special=False) == text.replace("END", end)


# Rules --------------------------------------------------------------------------------------------

WORD = [  # (task, response, what it answers)
    ("boolq", " true", "true"),
    ("boolq", " false, not true", "false"),
    ("boolq", "True", ""),
    ("boolq", " TRUE or FALSE", ""),
    ("boolq", "untrue", "true"),
    ("boolq", "", ""),
    ("boolq", "false\n### Response:\ntrue", "true"),
    ("boolq", "true### Response:", ""),
    ("boolq", "true ### Response: maybe ### Response: false", "false"),
    ("piqa", " solution2.", "solution2"),
    ("piqa", "solution3", ""),
    ("piqa", "Solution1", ""),
    ("piqa", "solution 1", ""),
    ("piqa", "solution12", "solution1"),
    ("social_i_qa", " answer3", "answer3"),
    ("social_i_qa", " answer5", "answer5"),
    ("ARC-Easy", "answer6 answer2", "answer2"),
    ("ARC-Challenge", "answer4answer1", "answer4"),
    ("openbookqa", "answer0", ""),
    ("hellaswag", "Ending1", ""),
    ("hellaswag", "ending5, ending4", "ending4"),
    ("winogrande", "the option2 is option1", "option2"),
    ("winogrande", "option3", ""),
]
NUMBER = [
    ("The answer is 72", "72"),
    ("The answer is 72.", "72."),
    ("16 - 3 = 13, so 13", "13"),
    ("$1,234.50", "1234.50"),
    ("1,000,000 people", "1000000"),
    ("-5", "-5"),
    ("it is 3-2", "-2"),
    ("x = - 2", "2"),
    ("12.5%", "12.5"),
    ("50 % of 4", "4"),
    (".5", "5"),
    ("1.2.3", "3"),
    ("no number", ""),
    ("", ""),
    ("7 ### Response: none", ""),
    ("7 ### Response: 8 and 9", "9"),
    ("2/3", "3"),
    ("1e3", "3"),
    ("<<48/2=24>>24 clips", "24"),
]
LETTER = [  # (response, the papers' rule, the letter that is stated)
    ("B", "B", "B"),
    (" B.", "B", "B"),
    ("Answer: B", "A", "B"),
    ("answer: B", "B", "B"),
    ("The answer is (D).", "D", "D"),
    ("The answer is (D)", "D", "D"),
    ("The answer is D) 12", "D", "D"),
    ("A man has C", "A", "C"),
    ("(E)", "E", "E"),
    ("answer is: c", "", ""),
    ("the answer is c, so C", "C", "C"),
    ("(A) or (B)? The answer is (A).", "A", "A"),
    ("The answer is A. No: the answer is C", "A", "C"),
    ("Both (A) and (C) fit, (C) better", "B", "C"),
    ("ABC", "A", ""),
    ("Each costs 5", "E", ""),
    ("F", "", ""),
    ("", "", ""),
    ("The answer is **E**", "E", "E"),
    ("B ### Response: The answer is C", "C", "C"),
    ("The answer is B because 3 + 4 = 7", "B", "B"),
    ("The correct answer is C as shown above", "C", "C"),
    ("The answer is A since the others are too large", "A", "A"),
    ("B is right", "B", "B"),
]


@pytest.mark.parametrize(("name", "response", "answer"), WORD)
def test_the_first_answer_word_counts_as_it_is_spelt(name, response, answer):
    assert TASKS[name].answer(response) == answer
    assert TASKS[name].correct(response, {"answer": answer or "true"}) == bool(answer)


@pytest.mark.parametrize(("response", "answer"), NUMBER)
@pytest.mark.parametrize("name", ["gsm8k", "MultiArith"])
def test_the_last_number_counts_without_commas(name, response, answer):
    assert TASKS[name].answer(response) == answer
    if answer:
        assert TASKS[name].correct(response, {"answer": str(float(answer))})
        assert TASKS[name].correct(response, {"answer": f"{float(answer):,}"}), (
            "a gold answer may have commas too"
        )
        assert not TASKS[name].correct(response, {"answer": str(float(answer) + 1)})
    else:
        assert not TASKS[name].correct(response, {"answer": "0"}), "nothing found is not 0"


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("72.0009", "72", True),
        ("72.0011", "72", False),
        ("71.9991", "72.0", True),
        ("71.9989", "72.0", False),
        ("0.001", "0", True),
        ("-0.001", "0", True),
        ("0.00101", "0", False),
        ("-72", "72", False),
        ("72", 72, True),
        ("23.5", "23.50", True),
        ("1,234", "1234", True),
    ],
)
def test_a_number_is_right_within_a_thousandth(response, gold, right):
    assert TASKS["SVAMP"].correct(response, {"answer": gold}) == right


@pytest.mark.parametrize(("response", "papers", "stated"), LETTER)
def test_the_letter_of_aqua_by_the_papers_rule_and_as_it_is_stated(response, papers, stated):
    """The papers take any capital A to E, the A of "Answer" included; ours takes the letter that is
    stated."""
    aqua = TASKS["AQuA"]
    assert (aqua.rule, aqua.other_rule) == ("letter", "stated")
    assert aqua.answer(response) == papers
    assert aqua.answer(response, "stated") == stated
    assert aqua.correct(response, {"answer": stated or "A"}, "stated") == bool(stated)


@shared
@pytest.mark.parametrize("name", COMMONSENSE)
def test_the_output_of_every_real_row_is_right_by_its_own_rule(name):
    """The rows' own answers; without the words given in evaluation, as a model continues them."""
    for row in rows_of(f"test/{name}.json"):
        assert TASKS[name].correct(row["output"], row)
        seed, word = row["output"].rsplit(" ", 1)
        assert seed == "the correct answer is" and TASKS[name].correct(f" {word}", row)


@shared
def test_the_rationales_of_real_aqua_rows_state_the_letter_that_stands_at_their_end():
    """Every stored rationale ends in "The answer is (X)." (some are wrong; then the letter is not
    the gold one)."""
    rows = rows_of("test/AQuA.json")
    ends = [re.search(r"answer is \(([A-E])\)", row["output"]) for row in rows]
    assert sum(map(bool, ends)) > 150
    for row, end in zip(rows, ends):
        assert not end or TASKS["AQuA"].answer(row["output"], "stated") == end[1]


# Choices ------------------------------------------------------------------------------------------


def every_real_row():
    """(task name, row) of the test sets and of the training sample."""
    yield from ((name, row) for name in COMMONSENSE for row in rows_of(f"test/{name}.json"))
    yield from ((row["task"], row) for row in rows_of("commonsense_sample.json"))


@shared
def test_every_real_row_offers_its_gold_answer_and_as_many_texts_as_words():
    """Against the instruction itself: each text stands in it behind its own word, and the next word
    follows."""
    seen = set()
    for name, row in every_real_row():
        words, pairs = TASKS[name].choices(row), TASKS[name].cloze(row)
        assert row["answer"] in words and len(set(words)) == len(words) == len(pairs), row
        assert set(words) <= set(TASKS[name].words)
        seen.add((name, len(words)))
        if name in ("boolq", "winogrande"):
            continue
        at, body = 0, row["instruction"].split("Answer format:")[0]
        for word, (_, text) in zip(words, pairs):
            at = body.index(f"{word.capitalize()}:", at) + len(word) + 1
            assert text and body[at:].lstrip().startswith(text) and text == text.strip(), row
        assert body.strip().endswith(pairs[-1][1]), "the last text goes to the end"
        assert len({context for context, _ in pairs}) == 1
        question = {"social_i_qa": r"Q: (.*)\nA:", "hellaswag": "(.*)", "openbookqa": "(.*)"}
        asked = re.fullmatch(question.get(name, r"Question: (.*)\nAnswer:"), pairs[0][0], re.S)[1]
        assert asked and asked in body and "Please choose" not in asked
    assert {name for name, _ in seen} == set(COMMONSENSE) and len(seen) > 8, (
        "ARC has rows of 3, 4 and 5 answers"
    )


@shared
def test_boolq_is_answered_by_yes_and_no_in_the_order_of_true_and_false():
    for name, row in every_real_row():
        if name == "boolq":
            question = row["instruction"].split("question: ", 1)[1]
            question = question.split("Answer format:")[0].strip()
            assert TASKS[name].choices(row) == ["true", "false"]
            assert TASKS[name].cloze(row) == [
                (f"Question: {question}\nAnswer:", text) for text in ("yes", "no")
            ]


@shared
def test_winogrande_scores_the_rest_of_the_sentence_behind_each_filled_in_option():
    """Partial scoring: context, space and rest are the sentence with the option in the blank."""
    n = 0
    for name, row in every_real_row():
        if name != "winogrande":
            continue
        sentence = row["instruction"].split("given sentence: ", 1)[1].split("Option1:")[0].strip()
        form = r"Option1: (.*?)\s*Option2: (.*?)\s*Answer format"
        options = re.search(form, row["instruction"], re.S).groups()
        pairs = TASKS[name].cloze(row)
        for option, (context, rest) in zip(options, pairs, strict=True):
            filled = sentence.replace("_", option, 1)
            assert "".join(f"{context} {rest}".split()) == "".join(filled.split())
            assert context.endswith(option)
        assert pairs[0][1] == pairs[1][1] != "", "the same words are scored behind both"
        n += 1
    assert n > 1000


def made_up(name, instruction):
    return TASKS[name], {"instruction": instruction, "output": "", "answer": ""}


def test_cloze_forms_are_those_of_lm_evaluation_harness():
    """Made-up rows; the expected pairs are written after the harness's task files."""
    task, row = made_up(
        "piqa",
        "Please choose the correct solution to the question: Open it: how?\n\n"
        "Solution1: push\n\nSolution2: pull\n\nAnswer format: solution1/solution2",
    )
    assert task.cloze(row) == [
        ("Question: Open it: how?\nAnswer:", text) for text in ("push", "pull")
    ]
    task, row = made_up(
        "social_i_qa",
        "Please choose the correct answer to the question: Why?\n\n"
        "Answer1: a b Answer2: c Answer3: d\n\nAnswer format: answer1/answer2/answer3",
    )
    assert task.cloze(row) == [("Q: Why?\nA:", text) for text in ("a b", "c", "d")]
    task, row = made_up(
        "winogrande",
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann met Eva, so _ smiled.\n\n"
        "Option1: Ann Option2: Eva Answer format: option1/option2",
    )
    assert task.cloze(row) == [(f"Ann met Eva, so {name}", "smiled.") for name in ("Ann", "Eva")]


def test_rows_without_choices_are_refused_and_the_error_names_the_task():
    for name in MATH:
        task, row = made_up(name, "How many? Answer Choices: (A) 1 (B) 2")
        with pytest.raises(ValueError, match=f"{name} has no choices"):
            task.choices(row)
    for text in ("Is it?", "Is it?\n\nAnswer format: yes/no", "Is it?\n\nAnswer format: "):
        task, row = made_up("boolq", text)
        with pytest.raises(ValueError, match="boolq has no choices"):
            task.choices(row)
    task, row = made_up(
        "piqa", "the question: why?\n\nSolution1: a\n\nAnswer format: solution1/solution2"
    )
    with pytest.raises(ValueError, match="piqa: 1 choices where 2 are offered"):
        task.cloze(row)


@shared
def test_row_counts_are_those_of_the_published_files():
    files = rows_of("manifest.json")["files"]
    published = {path.split("/")[1]: file["rows"] for path, file in files.items() if "rows" in file}
    assert published == {name: task.rows for name, task in TASKS.items()}
