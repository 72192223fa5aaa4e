"""What the servers beside this file take from `chatglm_int8.apps`, until they are there too."""

from chatglm_int8.apps.answer_text import settled
from chatglm_int8.apps.arguments import EMBEDDED as ROOT
from chatglm_int8.apps.arguments import add_model_arguments, port, positive
from chatglm_int8.apps.loading import load

__all__ = ["ROOT", "add_model_arguments", "load", "port", "positive", "settled"]
