"""A model of random weights, made in memory."""

import torch

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration


@torch.no_grad()
def random_model(layers: int, device: str = "cpu", **fields) -> ChatGLMForConditionalGeneration:
    """A half model with INT8 blocks, in the 6B shape unless fields of the configuration say otherwise."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=layers, **fields)).half()
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.data.view(torch.int64).random_()  # eight at a time
        elif name.endswith("weight_scale"):
            parameter.fill_(0.02 * 3**0.5 / 127)
        elif name.endswith("layernorm.weight"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0, 0.02)
    return model
