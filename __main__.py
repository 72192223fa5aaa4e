"""`python -m chatglm_int8`: the command `chatglm`."""

import sys

from .apps.cli import main

sys.exit(main())
