"""ChatGLM-6B-INT8 on current transformers.

Importing this package registers its classes, so that `AutoModel.from_pretrained(FOLDER)` and the other Auto classes use
them for every ChatGLM folder, with and without `trust_remote_code`, whatever code lies in the folder.
"""

import functools

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto import auto_factory, configuration_auto, tokenization_auto

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer

__version__ = "0.1.0"
__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]

AutoConfig.register("chatglm", ChatGLMConfig)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)


def _registered(find_class, reference: str, *arguments, **options) -> type:
    """The class that a folder's `auto_map` names: of this package if it has it, else from the folder's code."""
    name = reference.rsplit(".", 1)[-1]
    return globals()[name] if name in __all__ else find_class(reference, *arguments, **options)


# AutoTokenizer runs the code of a trusted folder whatever is registered, and in transformers 5.0 all Auto classes do.
for _module in (configuration_auto, auto_factory, tokenization_auto):
    _module.get_class_from_dynamic_module = functools.partial(_registered, _module.get_class_from_dynamic_module)
