"""Raises, when imported, one clear error where transformers is too old for this code."""

import transformers

NEEDED = 5  # major version

if int(transformers.__version__.split(".")[0]) < NEEDED:
    raise ImportError(
        f"This code needs transformers {NEEDED} or newer, but version {transformers.__version__} is installed: "
        f"pip install -U 'transformers>={NEEDED}'."
    )
