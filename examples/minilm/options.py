"""Types of command-line options."""

import argparse


def positive(text: str) -> int:
    """A whole number of at least one, for `argparse`."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number
