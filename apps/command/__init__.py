"""Where the script `chatglm` begins.

`import chatglm_int8` registers its classes, for which it imports torch and transformers: seconds. This package has
another name, so that the command's parts can be imported without it until a program needs the model.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    package = importlib.util.find_spec("chatglm_int8")
    folder = Path(package.origin).parent / "apps"
    spec = importlib.util.spec_from_file_location("chatglm_int8.apps", folder / "__init__.py")
    apps = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = apps  # whose modules are then imported without their grandparent
    spec.loader.exec_module(apps)
    cli = importlib.import_module("chatglm_int8.apps.cli")
    return cli.main()
