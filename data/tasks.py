"""The papers' fourteen benchmark sets: how a row becomes a prompt, and when a response is right.

A row of the LLM-Adapters files (github.com/AGI-Edgerunners/LLM-Adapters, arXiv 2304.01933), which
PERFT trains and evaluates on, is {"instruction", "input", "output", "answer"}: the choices stand
inside the instruction, and the answer is a word (`ending3`, `true`, `B`) or a number. The same
templates render training rows and test rows.

    papers   the authors' prompt byte for byte, with the 16 spaces of indentation and the trailing
             spaces that its source code put there. The evaluation text differs from the training
             text in its blanks: that is theirs.
    plain    the instruction, an empty line, the output
    chat     messages of {"role", "content"} as "<|user|>", newline, content, newline,
             "<|assistant|>", newline, answer, end token: the form that OLMoE's instruction-tuned
             models were trained on

When is a response right? RULES, by name; both are the papers':

    word     the first of the task's answer words, anywhere, case-sensitive
    number   commas removed, the last number; right if it is within 0.001
    letter   AQuA: the first capital A to E, anywhere, so "Answer: B" counts as A, the A of "Answer"

and one of ours for AQuA, which eval.py reports beside the papers' and under its own name:

    stated   the last letter behind "answer is" or "answer:", else the last one in parentheses, else
             the last alone

    python data/tasks.py boolq         the prompts of a task on a made-up row
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

# Templates ----------------------------------------------------------------------------------------

INDENT = " " * 16
INTRO = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
WITH_INPUT = ", paired with an input that provides further context"
SEED = "the correct answer is"  # how a commonsense response begins; in evaluation it is given
RESPONSE = "### Response:"


def papers(row, evaluation):
    """The authors' prompt up to where the output begins."""
    given = row.get("input")
    intro = INTRO.format(WITH_INPUT if given else "")
    if not given:
        intro += " "
    if not evaluation:
        intro += " "
    blank = "" if evaluation else INDENT
    lines = [intro, "", f"{INDENT}### Instruction:", INDENT + row["instruction"], blank]
    if given:
        lines += [f"{INDENT}### Input:", INDENT + given, blank]
    lines += [INDENT + RESPONSE, INDENT]
    return "\n".join(lines)


def plain(row, evaluation):
    prompt = f"{row['instruction']}\n\n"
    if row.get("input"):
        prompt += f"{row['input']}\n\n"
    return prompt


TEMPLATES = {"papers": papers, "plain": plain}


def chat_turns(messages: list[dict]) -> list:
    """Messages {"role": "system", "user" or "assistant", "content"} -> (prompt, answer) of each
    that is the assistant's.

    What follows the last answer is left out. The caller puts an end token behind each answer.
    """
    turns = []
    prompt = ""
    for message in messages:
        if message["role"] == "assistant":
            turns.append((f"{prompt}<|assistant|>\n", message["content"]))
            prompt = "\n"
        else:
            prompt += f"<|{message['role']}|>\n{message['content']}\n"
    return turns


# Rules: response -> what it answers, "" where nothing is found ------------------------------------


def first_word(words, response):
    found = re.search("|".join(words), response)
    return found[0] if found else ""


def last_number(words, response):
    return last(r"-?\d+\.?\d*", response.replace(",", ""))


def last(pattern, text):
    found = re.findall(pattern, text)
    return found[-1] if found else ""


STATED = [  # "(?i:...)" is for the words alone: the letter is a capital
    r"(?i:answer\s*(?:is)?\s*:?)\s*\(?([A-E])\b",
    r"\(([A-E])\)",
    r"\b(A(?! [a-z])|[B-E])\b",  # a lone A before a small word is an article
]


def stated_letter(words, response):
    letters = [last(pattern, response) for pattern in STATED]
    return next(filter(None, letters), "")


RULES = {"word": first_word, "number": last_number, "letter": first_word, "stated": stated_letter}


@dataclass(frozen=True)
class Task:
    """One test set. A row: {"instruction", "input", "output", "answer"}."""

    name: str
    rows: int  # in its test file
    words: Sequence[str] = ()  # what it can answer; none: a number
    rule: str = "number"
    other_rule: str | None = None  # reported beside the papers' rule
    remark: str = ""  # behind its name, in a table of results
    cloze_form: str = "Question: {}\nAnswer:"

    @property
    def group(self) -> str:
        return "commonsense" if self.rule == "word" else "math"

    @property
    def max_new_tokens(self) -> int:
        """The papers' limits."""
        return 4 if self.group == "commonsense" else 256

    def render_train(self, row: dict, template: str = "papers") -> str:
        return TEMPLATES[template](row, evaluation=False) + row["output"]

    def render_eval(self, row: dict, template: str = "papers") -> str:
        """What the model continues. A commonsense answer has its first words given, without a space
        behind them."""
        prompt = TEMPLATES[template](row, evaluation=True)
        return prompt + SEED if self.group == "commonsense" else prompt

    def answer(self, response: str, rule: str | None = None) -> str:
        """What a response answers ("" for nothing); text behind its last "### Response:" counts."""
        find = RULES[rule or self.rule]
        return find(self.words, response.rsplit(RESPONSE)[-1])

    def correct(self, response: str, row: dict, rule: str | None = None) -> bool:
        found = self.answer(response, rule)
        if self.words or not found:
            return found == row["answer"]
        gold = str(row["answer"]).replace(",", "")
        return abs(float(found) - float(gold)) <= 0.001

    # Scoring by likelihood: which choice does the model find most likely?

    def choices(self, row: dict) -> list[str]:
        """The answer words that this row offers: those of its "Answer format: answer1/answer2/...".

        ValueError if none: arithmetic rows and AQuA, whose letter stands behind a rationale, have
        no choices to score.
        """
        _, _, last = row["instruction"].rpartition("Answer format:")
        offered = last.strip().split("/")
        if self.group != "commonsense" or not set(offered) <= set(self.words):
            raise ValueError(
                f"{self.name} has no choices to score by likelihood; use --method generate"
            )
        return offered

    def cloze(self, row: dict) -> list:
        """(context, text) of every choice: the question alone, continued by the choice's own text
        instead of its word.

        The forms of lm-evaluation-harness (v0.4), as far as these rows allow: its BoolQ shows a
        passage, which they do not have. Winogrande is its partial scoring: the choice fills the
        blank, the rest of the sentence is scored.
        """
        words = self.choices(row)
        body, _, _ = row["instruction"].rpartition("Answer format:")
        label = self.words[0].rstrip("1").capitalize()  # "Solution1: ... Solution2: ..."
        asked, *texts = [part.strip() for part in re.split(rf"(?<!\w){label}\d:", body)]
        _, _, question = asked.partition(": ")
        context = self.cloze_form.format(question.strip())
        if self.name == "boolq":
            return [(context, "yes"), (context, "no")]
        if len(texts) != len(words):
            raise ValueError(f"{self.name}: {len(texts)} choices where {len(words)} are offered")
        if self.name == "winogrande":
            before, _, after = context.partition("_")
            return [(before + text, after.strip()) for text in texts]
        return [(context, text) for text in texts]


# The table ----------------------------------------------------------------------------------------


ANSWERS = "answer1 answer2 answer3 answer4 answer5".split()
COMMONSENSE = [
    Task("boolq", 3270, "true false".split(), "word"),
    Task("piqa", 1838, "solution1 solution2".split(), "word"),
    # 3 are offered; the authors look for 5.
    Task("social_i_qa", 1954, ANSWERS, "word", cloze_form="Q: {}\nA:"),
    Task("hellaswag", 10042, "ending1 ending2 ending3 ending4".split(), "word", cloze_form="{}"),
    Task("winogrande", 1267, "option1 option2".split(), "word", cloze_form="{}"),
    Task("ARC-Easy", 2376, ANSWERS, "word"),
    Task("ARC-Challenge", 1172, ANSWERS, "word"),
    Task("openbookqa", 500, ANSWERS, "word", cloze_form="{}"),
]
MATH = [
    Task("MultiArith", 600),
    Task("gsm8k", 1319),
    Task("AddSub", 395),
    Task("AQuA", 254, "A B C D E".split(), "letter", "stated", " (first capital A-E)"),
    Task("SingleEq", 508),
    Task("SVAMP", 1000),
]
TASKS = {task.name: task for task in COMMONSENSE + MATH}
GROUPS = {
    "commonsense": [task.name for task in COMMONSENSE],
    "math": [task.name for task in MATH],
}
# What is trained on, for the tests of the group that a name begins with -> its file's name.
TRAINING_SETS = {
    "commonsense": "commonsense_170k",
    "math": "math_50k",
    "math_10k": "math_10k",
    "math_14k": "math_14k",
}


@run.command
def main():
    parser = run.Parser(description="A made-up row as it is trained, and as it is evaluated.")
    parser.add_argument("task", nargs="?", default="boolq", choices=TASKS, help="a test set")
    task = TASKS[parser.parse_args().task]
    row = {"instruction": "THE INSTRUCTION", "output": "THE OUTPUT"}
    for text in (task.render_train(row), task.render_eval(row)):
        print(text.replace(" ", "·"), end="\n---\n")


if __name__ == "__main__":
    main()
