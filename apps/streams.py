"""The standard streams: any text, closed ones, and error messages."""

import io
import os
import sys


def prepare_streams() -> None:
    """Let any text through: UTF-8 where the locale's encoding has no Chinese, "?" for what can't be written.

    Closed streams become the null device, so that no file that is opened later takes their descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            try:
                "中".encode(stream.encoding)
                encoding = stream.encoding
            except UnicodeEncodeError:
                encoding = "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def output_was_closed() -> bool:
    """Whether `prepare_streams` found no standard output."""
    return getattr(sys.stdout, "name", None) == os.devnull


def flush_output() -> None:
    """Write what is left; without a reader, or on a full disk, drop it, or Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(program: str, error: BaseException | str) -> None:
    """Say in one line on stderr what is wrong."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
