"""Where compiled kernels are kept on disk, so that a machine compiles them once."""

import contextlib
import functools
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)


def cache_folder() -> Path:
    """The folder of compiled kernels: this user's alone, so that no other user can put code there.

    `$XDG_CACHE_HOME/chatglm_int8` or `~/.cache/chatglm_int8`; where that can't be written, or is open to others, a
    temporary folder that lives as long as this process.
    """
    return _usable_folder(os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _usable_folder(cache_home: str | None) -> Path:
    try:
        folder = Path(cache_home or Path.home() / ".cache") / "chatglm_int8"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        ours = os.name == "nt" or (state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if ours:
            with tempfile.TemporaryFile(dir=folder):
                return folder
        reason = "it belongs to or can be written by others"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    temporary = tempfile.TemporaryDirectory(prefix="chatglm_int8-")
    _kept_for_life.append(temporary)
    logger.warning_once(f"Kernels can't be kept on disk ({reason}), so they are compiled again in every process.")
    return Path(temporary.name)


_kept_for_life: list[tempfile.TemporaryDirectory] = []


def _is_whole(path: Path) -> bool:
    """Whether compiled code has all its bytes: half a file would kill the process that loads it. (The section headers
    of ELF files come last.)"""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
        return True  # of another format; the loader refuses what is nothing
    (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return offset + size * count <= path.stat().st_size


def keep(name: str, write: Callable[[Path], None]) -> Path:
    """The path of the file `name` in the folder. If it isn't there, `write` makes it, at a path that it is given.

    It gets its name when it is whole and on the disk, also beside other processes that make it at the same time.
    """
    path = cache_folder() / name
    if path.exists() and _is_whole(path):
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been removed since
    for left in path.parent.glob("*.tmp"):  # by processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    handle, unfinished = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(Path(unfinished))
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path
