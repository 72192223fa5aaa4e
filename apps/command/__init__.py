"""Where the script `chatglm` begins.

`import chatglm_int8` registers its classes, for which it imports torch and transformers: seconds. This package has
another name, so that it can leave that for later.
"""

import importlib.util
import sys


def main() -> int:
    """Run the command line. The package's own __init__ is not run before a program needs it: see apps/imports.py."""
    spec = importlib.util.find_spec("chatglm_int8")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    from chatglm_int8.apps import cli

    return cli.main()
