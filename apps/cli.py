"""The command `chatglm`."""

import argparse
import importlib
import os
import re
import sys

from .arguments import HelpFormatter
from .streams import complain, flush_output, prepare_streams

PROGRAMS = {  # names of subcommands, and their modules
    "chat": "chat",
    "web": "web",
    "serve": "server",
    "ray": "ray",
    "finetune": "finetune",
    "merge": "merge",
    "quantize": "quantize",
    "doctor": "doctor",
}


def parse(command_line: list[str]) -> tuple[object, argparse.Namespace]:
    """The module of the program that a command line names, and its arguments.

    Options may be spelt with underscores, as those of transformers. A module with `TAKES_OTHER_OPTIONS` gets what its
    parser does not know as `arguments.other_options`.
    """
    end = command_line.index("--") if "--" in command_line else len(command_line)
    options = [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), text) for text in command_line[:end]]
    parser = argparse.ArgumentParser(prog="chatglm", description="ChatGLM-6B-INT8 on current transformers.")
    subcommands = parser.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    modules = {}
    for name, module in PROGRAMS.items():
        modules[name] = importlib.import_module(f".{module}", __package__)
        summary = modules[name].__doc__.splitlines()[0]
        subparser = subcommands.add_parser(
            name,
            help=summary,
            description=modules[name].__doc__,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        modules[name].add_arguments(subparser)
    parsed, others = parser.parse_known_args([*options, *command_line[end:]])
    module = modules[parsed.program]
    if hasattr(module, "TAKES_OTHER_OPTIONS"):
        parsed.other_options = others
    elif others:
        subcommands.choices[parsed.program].error(f"unrecognized arguments: {' '.join(others)}")
    return module, parsed


def main(command_line: list[str] | None = None) -> int:
    """Run a command line, by default that of the process.

    Returns:
        0; 1 where the program failed; 130 where Ctrl-C ended it. Wrong arguments end the process with 2.
    """
    prepare_streams()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in log files; read when tqdm is imported
    try:
        return _run(sys.argv[1:] if command_line is None else command_line)
    finally:
        flush_output()


def _run(command_line: list[str]) -> int:
    program = " ".join(["chatglm", *command_line[:1]])
    try:
        module, parsed = parse(command_line)
        return module.run(parsed) or 0
    except BrokenPipeError:  # the reader of the output has gone
        return 1
    except KeyboardInterrupt:
        complain(program, "interrupted")
        return 130
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        complain(program, error)
        return 1


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message says it all."""
    torch = sys.modules.get("torch")
    return (OSError, ValueError, torch.OutOfMemoryError) if torch else (OSError, ValueError)
