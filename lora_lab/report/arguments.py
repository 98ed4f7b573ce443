"""Parsers for command-line arguments."""

import argparse
import re
from collections.abc import Mapping


def share(text: str) -> float:
    """Parse a share: 1% or 0.01."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text)
    found = -1.0 if number is None else float(number[1]) / (100 if number[2] else 1)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share below 1. Give, for example, 1% or 0.01")
    return found


def settings(text: str) -> Mapping[str, str]:
    """Parse settings: optimizer=adamw,precision=fp16."""
    parts = [part.partition("=") for part in re.split(r"[\s,]+", text) if part]
    if not parts or not all(key and sign for key, sign, _ in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE,KEY=VALUE")
    return {key: value for key, _, value in parts}


def names(text: str) -> list[str]:
    """Read names with commas between them: point,n,outcome."""
    found = [name for part in text.split(",") if (name := part.strip())]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give names with commas between them, as point,n")
    return found
