"""`python -m chatglm_int8.apps`: the command `chatglm`."""

import sys

from .cli import main

sys.exit(main())
