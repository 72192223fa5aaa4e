"""ChatGLM-6B-INT8 on current transformers.

Importing this package registers its classes, so that `AutoModel.from_pretrained(FOLDER)` and the other Auto classes use
them for every ChatGLM folder, without `trust_remote_code` and whatever code lies in the folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer

__version__ = "0.1.0"
__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]

AutoConfig.register("chatglm", ChatGLMConfig)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
