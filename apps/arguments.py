"""Arguments that several programs take, and how their help shows defaults."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent.parent  # the package's folder, which is a model folder too
DTYPES = ("auto", "float32", "float16", "bfloat16")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds to the help of each option its default, unless it is None, False or in the text already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default
        if shown is None or shown is False or shown is argparse.SUPPRESS or "default" in action.help:
            return action.help
        if isinstance(shown, list | tuple):
            shown = " ".join(map(str, shown))
        return f"{action.help} (default: {str(shown).replace('%', '%%')})"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loading.load` is given: --model, --device and --dtype."""
    parser.add_argument("--model", default=str(EMBEDDED), metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of floating-point weights and activations")


def port(text: str) -> int:
    """A port number, of an argument's text."""
    value = int(text)
    if not 0 <= value < 65536:
        raise ValueError
    return value


def positive(kind: type) -> Callable[[str], float]:
    """A parser of positive numbers, int or float, for `type=` of an argument."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse shows it
    return parse


def size(text: str) -> int:
    """The bytes of "500MB", "1GB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), flags=re.IGNORECASE)
    value = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 1GB or 500MB, got {text!r}")
    return value
