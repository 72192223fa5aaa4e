"""Imports that take long or may lack a package."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def imports(extra: str | None = None) -> Iterator[None]:
    """For the imports at the beginning of a program's `run`: of other packages and of this one's modules.

    Ctrl-C ends the process at once. As an exception it would be lost or printed in the midst of a library's import.

    Args:
        extra: of this distribution, which brings the packages.

    Raises:
        ValueError: a package is missing; says what to install.
    """
    ends = threading.current_thread() is threading.main_thread()
    ends = ends and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ends:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _run_init()
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("chatglm_int8"):
            raise
        distribution = f"chatglm-int8[{extra}]" if extra else "chatglm-int8"
        raise ValueError(f'The package {error.name} is missing: pip install "{distribution}"') from None
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_init() -> None:
    """Run the package's own __init__, if the script `chatglm` has left it for later."""
    package = sys.modules["chatglm_int8"]
    if not hasattr(package, "__version__"):
        package.__spec__.loader.exec_module(package)
