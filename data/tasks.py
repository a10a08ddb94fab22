"""The papers' fourteen benchmark sets: how a row becomes a prompt, and when a response is right.

A row of the LLM-Adapters files (github.com/AGI-Edgerunners/LLM-Adapters, arXiv 2304.01933), which PERFT trains and
evaluates on, is {"instruction", "input", "output", "answer"}: the choices stand inside the instruction, and the answer
is a word (`ending3`, `true`, `B`) or a number. The same templates render training rows and test rows.

    papers   the authors' prompt byte for byte, with the 16 spaces of indentation and the trailing spaces that its
             source code put there. The evaluation text differs from the training text in its blanks: that is theirs.
    plain    the instruction, an empty line, the output
    chat     messages of {"role", "content"} as "<|user|>", newline, content, newline, "<|assistant|>", newline, answer,
             end token: the form that OLMoE's instruction-tuned models were trained on

When is a response right? RULES, by name; both are the papers':

    word     the first of the task's answer words, anywhere, case-sensitive
    number   commas removed, the last number; right if it is within 0.001
    letter   AQuA: the first capital A to E, anywhere, so "Answer: B" counts as A, the A of "Answer"

and one of ours for AQuA, which eval.py reports beside the papers' and under its own name:

    stated   the last letter behind "answer is" or "answer:", else the last one in parentheses, else the last alone

    python data/tasks.py boolq         the prompts of a task on a made-up row
"""

import re
import sys
from dataclasses import dataclass

INDENT = " " * 16
INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
WITH_INPUT = ", paired with an input that provides further context"
SEED = "the correct answer is"  # a commonsense response begins so in training; in evaluation it is given
RESPONSE = "### Response:"


def papers(row: dict, evaluation: bool) -> str:
    """The authors' prompt up to where the output begins."""
    blank = "" if evaluation else INDENT
    has_input = bool(row.get("input"))
    trailing = (0 if has_input else 1) + (0 if evaluation else 1)
    lines = [INTRO.format(WITH_INPUT if has_input else "") + " " * trailing, ""]
    lines += [f"{INDENT}### Instruction:", INDENT + row["instruction"], blank]
    lines += [f"{INDENT}### Input:", INDENT + row["input"], blank] if has_input else []
    return "\n".join([*lines, INDENT + RESPONSE, INDENT])


def plain(row: dict, evaluation: bool) -> str:
    return "\n\n".join([row["instruction"], *([row["input"]] if row.get("input") else []), ""])


TEMPLATES = {"papers": papers, "plain": plain}


def chat_turns(messages: list[dict]) -> list[tuple[str, str]]:
    """[{"role": "system", "user" or "assistant", "content"}] -> [(prompt, answer)], a pair for each assistant message.

    What follows the last answer is left out. The caller puts an end token behind each answer.
    """
    turns, prompt = [], ""
    for message in messages:
        if message["role"] == "assistant":
            turns.append((f"{prompt}<|assistant|>\n", message["content"]))
            prompt = "\n"
        else:
            prompt += f"<|{message['role']}|>\n{message['content']}\n"
    return turns


# Rules: response -> what it answers, "" where nothing is found --------------------------------------------------------


def first_word(words: tuple[str, ...], response: str) -> str:
    found = re.search("|".join(words), response)
    return found[0] if found else ""


def last_number(words, response: str) -> str:
    found = re.findall(r"-?\d+\.?\d*", response.replace(",", ""))
    return found[-1] if found else ""


def stated_letter(words, response: str) -> str:
    """"(?i:...)" is for the words alone: the letter is a capital. A lone A before a small word is an article."""
    for pattern in (r"(?i:answer\s*(?:is)?\s*:?)\s*\(?([A-E])\b", r"\(([A-E])\)", r"\b(A(?! [a-z])|[B-E])\b"):
        if found := re.findall(pattern, response):
            return found[-1]
    return ""


RULES = {"word": first_word, "number": last_number, "letter": first_word, "stated": stated_letter}


@dataclass(frozen=True)
class Task:
    """One test set. A row: {"instruction", "input", "output", "answer"}."""

    name: str
    rows: int  # in its test file
    words: tuple[str, ...]  # what it can answer; none: a number
    rule: str
    group: str = "commonsense"
    other_rule: str | None = None  # reported beside the papers' rule

    @property
    def max_new_tokens(self) -> int:
        """The papers' limits."""
        return 4 if self.group == "commonsense" else 256

    def render_prompt(self, row: dict, template: str = "papers") -> str:
        """Training text up to the output."""
        return TEMPLATES[template](row, evaluation=False)

    def render_train(self, row: dict, template: str = "papers") -> str:
        return self.render_prompt(row, template) + row["output"]

    def render_eval(self, row: dict, template: str = "papers") -> str:
        """What the model continues. A commonsense answer has its first words given, without a space behind them."""
        return TEMPLATES[template](row, evaluation=True) + (SEED if self.group == "commonsense" else "")

    def answer(self, response: str, rule: str | None = None) -> str:
        """What a response answers ("" for nothing). Only text behind the last "### Response:" counts."""
        return RULES[rule or self.rule](self.words, response.rsplit(RESPONSE)[-1])

    def correct(self, response: str, row: dict, rule: str | None = None) -> bool:
        found = self.answer(response, rule)
        if self.words or not found:
            return found == row["answer"]
        return abs(float(found) - float(str(row["answer"]).replace(",", ""))) <= 0.001

    # Scoring by likelihood: which choice does the model find most likely? ----------------------------------------

    def choices(self, row: dict) -> list[str]:
        """The answer words that this row offers: those of its "Answer format: answer1/answer2/...". ValueError if none.

        Arithmetic rows and AQuA, whose letter stands behind a rationale, have no choices to score.
        """
        offered = row["instruction"].rpartition("Answer format:")[2].strip().split("/")
        if self.group != "commonsense" or not set(offered) <= set(self.words):
            raise ValueError(f"{self.name} has no choices to score by likelihood in {row['instruction'][-60:]!r}")
        return offered

    def cloze(self, row: dict) -> list[tuple[str, str]]:
        """(context, text) of every choice: the question alone, continued by the choice's own text instead of its word.

        The forms of lm-evaluation-harness (v0.4), as far as these rows allow: its BoolQ shows a passage, which they do
        not have. Winogrande is its partial scoring: the choice fills the blank, the rest of the sentence is scored.
        """
        words, kind = self.choices(row), self.words[0].rstrip("1").capitalize()
        body = row["instruction"].rpartition("Answer format:")[0]
        question, *texts = (part.strip() for part in re.split(rf"(?<!\w){kind}\d:", body))
        question = question.partition("question: " if self.name == "boolq" else ": ")[2].strip()
        if self.name == "boolq":
            return [(f"Question: {question}\nAnswer:", text) for text in ("yes", "no")]
        if len(texts) != len(words):
            raise ValueError(f"{self.name}: {len(texts)} choices where {len(words)} are offered: {body[-60:]!r}")
        if self.name == "winogrande":
            before, _, after = question.partition("_")
            return [(before + text, after.strip()) for text in texts]
        forms = {"hellaswag": "{}", "openbookqa": "{}", "social_i_qa": "Q: {}\nA:"}
        context = forms.get(self.name, "Question: {}\nAnswer:").format(question)
        return [(context, text) for text in texts]


def numbered(word: str, n: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, n + 1))


TASKS = {
    t.name: t
    for t in (
        Task("boolq", 3270, ("true", "false"), "word"),
        Task("piqa", 1838, numbered("solution", 2), "word"),
        Task("social_i_qa", 1954, numbered("answer", 5), "word"),  # 3 are offered; the authors look for 5
        Task("hellaswag", 10042, numbered("ending", 4), "word"),
        Task("winogrande", 1267, numbered("option", 2), "word"),
        Task("ARC-Easy", 2376, numbered("answer", 5), "word"),
        Task("ARC-Challenge", 1172, numbered("answer", 5), "word"),
        Task("openbookqa", 500, numbered("answer", 5), "word"),
        Task("MultiArith", 600, (), "number", "math"),
        Task("gsm8k", 1319, (), "number", "math"),
        Task("AddSub", 395, (), "number", "math"),
        Task("AQuA", 254, tuple("ABCDE"), "letter", "math", other_rule="stated"),
        Task("SingleEq", 508, (), "number", "math"),
        Task("SVAMP", 1000, (), "number", "math"),
    )
}
GROUPS = {group: [t.name for t in TASKS.values() if t.group == group] for group in ("commonsense", "math")}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "boolq"
    if name not in TASKS:
        sys.exit(f"error: no task {name!r}; choose from {', '.join(TASKS)}")
    this = TASKS[name]
    row = {"instruction": "THE INSTRUCTION", "input": "", "output": f"{SEED} {(this.words or ('42',))[0]}"}
    for title, text in (("training", this.render_train(row)), ("evaluation", this.render_eval(row))):
        print(f"--- {title}: spaces as dots")
        print(text.replace(" ", "·"))
    print(f"--- at most {this.max_new_tokens} new tokens; rule {this.rule}: {this.words or 'a number'}")


if __name__ == "__main__":
    main()
