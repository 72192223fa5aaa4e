"""Compiled kernels on disk, so that a machine compiles them once, and the C compilers and OpenMP runtime it has."""

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

WINDOWS, MACOS = os.name == "nt", sys.platform == "darwin"
COMPILERS = (("cc",), ("gcc",), ("clang",), (sys.executable, "-m", "ziglang", "cc"))
_TIMEOUT = 120  # seconds for a compiler; it takes about five
# A program of the system, and the command that installs a C compiler with it.
_INSTALLERS = {
    "apt-get": "sudo apt-get install gcc libc6-dev",
    "dnf": "sudo dnf install gcc",
    "zypper": "sudo zypper install gcc",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add gcc musl-dev",
}


class CompileError(RuntimeError):
    """The C compiler failed; the message holds its command and its words."""


class CompilerHangsError(CompileError):
    """The C compiler was given up."""


# --- Compilers ---


def _words(command: str) -> list[str]:
    """A command's words. It may be the path of a program with spaces; on Windows backslashes stand for themselves."""
    if shutil.which(command):
        return [command]
    lexer = shlex.shlex(command, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if WINDOWS:
        lexer.escape = ""
    return list(lexer)


def compilers() -> list[list[str]]:
    """Commands of the C compilers here, in the order to try them: `$CC`, cc, gcc, clang, the `ziglang` wheel's.

    Raises:
        CompileError: there is none.
    """
    named = os.environ.get("CC", "").strip()
    failure = ""
    try:
        commands = [_words(named)] if named else []
    except ValueError as error:
        commands, failure = [], f"CC={named!r} is not a command: {error}"
    commands += [list(command) for command in COMPILERS]
    found = [c for c in commands if shutil.which(c[0]) and (c[-2:] != ["ziglang", "cc"] or _has_ziglang(c))]
    if named and not failure and (not found or found[0] != commands[0]):
        failure = f"CC={named!r} is not a command of this machine"
    if not found:
        raise CompileError(failure or "there is no C compiler (cc, gcc, clang, or zig by `pip install ziglang`)")
    if failure:
        logger.warning_once(f"{failure}; {' '.join(found[0])} is used.")
    return found


def _has_ziglang(command: list[str]) -> bool:
    return command[0] != sys.executable or importlib.util.find_spec("ziglang") is not None


def run_compiler(command: list[str], text: str = "") -> str:
    """Run a compiler, which may read a source text; what it printed.

    Raises:
        CompileError: it failed. CompilerHangsError: it took longer than `_TIMEOUT`.
    """
    try:
        # Whatever the locale's encoding is.
        settings = {"encoding": "utf-8", "errors": "replace", "timeout": _TIMEOUT}
        done = subprocess.run(command, input=text, capture_output=True, **settings)
    except subprocess.TimeoutExpired as error:
        raise CompilerHangsError(f"{shlex.join(command)}: {error}") from None
    except OSError as error:
        raise CompileError(f"{shlex.join(command)}: {error}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def assembles(command: list[str]) -> bool:
    """Whether this compiler's assembler takes these flags."""
    with tempfile.TemporaryDirectory(prefix="chatglm_int8-") as folder:
        try:
            run_compiler([*command, "-x", "c", "-c", "-", "-o", str(Path(folder, "object"))], "int number;\n")
        except CompileError:
            return False
    return True


def openmp_runtime() -> Path | None:
    """The file of the OpenMP runtime in this process: LLVM's or Intel's, else GCC's, PyTorch's own first; or None."""
    home = str(Path(torch.__file__).parent)
    try:
        files = re.findall(r"(/\S.*)$", Path("/proc/self/maps").read_text(errors="replace"), re.MULTILINE)
    except OSError:  # Windows and macOS, where PyTorch's wheels bring one
        files = sorted(map(str, Path(home, "lib").glob("lib*omp*.d*l*")))
    for pattern in (r"libi?omp5?(md)?(-[0-9a-f]+)?\.(so|dylib|dll)", r"libgomp(-[0-9a-f]+)?\.(so|dylib|dll)"):
        for file in sorted(files, key=lambda file: not file.startswith(home)):
            if re.match(pattern, Path(file).name):
                return Path(file)
    return None


def install_hint() -> str:
    """The command that installs a C compiler on this system."""
    if WINDOWS:
        return "`pip install ziglang`, or `winget install BrechtSanders.WinLibs.POSIX.UCRT`, or MSYS2's gcc"
    if MACOS:
        return "`xcode-select --install`"
    found = [f"`{command}`" for program, command in _INSTALLERS.items() if shutil.which(program)]
    return f"{(found or ['install gcc'])[0]}, or `pip install ziglang`"


# --- Files ---


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
    logger.warning_once(f"Kernels can't be kept on disk ({reason}), so they are compiled again in every process.")
    return _temporary_folder()


def _temporary_folder() -> Path:
    """A new folder that lives as long as this process."""
    # Windows removes no library that is loaded.
    temporary = tempfile.TemporaryDirectory(prefix="chatglm_int8-", ignore_cleanup_errors=True)
    _kept_for_life.append(temporary)
    return Path(temporary.name)


_kept_for_life: list[tempfile.TemporaryDirectory] = []


def temporary_copy(path: Path) -> Path:
    """A copy of a kept file in a temporary folder, to load where the cache's file system is mounted noexec."""
    return Path(shutil.copy(path, _temporary_folder()))


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
        try:
            os.replace(unfinished, path)
        except PermissionError:  # on Windows, of a library that another process has made and loaded
            if not (path.exists() and _is_whole(path)):
                raise
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path
