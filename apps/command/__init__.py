"""Where the script `chatglm` begins.

`import chatglm_int8` registers its classes, for which it imports torch and transformers: seconds. This package has
another name, so that it can leave that for later.
"""

import signal
import sys


def main() -> int:
    """Run the command line. The package's own __init__ is not run before a program needs it: see apps/imports.py."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports without a traceback
    import importlib.util

    spec = importlib.util.find_spec("chatglm_int8")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    from chatglm_int8.apps import cli

    signal.signal(signal.SIGINT, handler)
    return cli.main()
