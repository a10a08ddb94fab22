"""argparse with help that reads like a page, mistakes in one line, and the number types of this project's flags."""

import argparse
import os
from functools import partial


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=110), **options)

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
        self.exit(2, f"{self.prog}: error: {message}; see --help\n" if first else None)


def number(kind, lowest, above=False):
    """For argparse's type=: an int or float that is at least (or above) `lowest`, and finite."""

    def parse(text):
        value = kind(text)
        if not (value > lowest if above else value >= lowest) or value == float("inf"):
            bound = f"more than {lowest}" if above else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bound}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid whole number value: ..."
    return parse


count, positive, from_zero = number(int, 1), number(float, 0, above=True), number(float, 0)


def device(name: str) -> str:
    import torch

    try:
        if name == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:  # each process looks at its own, see data/shard.py
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not available here; try cpu") from None
    return name
