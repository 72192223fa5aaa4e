"""The model to be trained."""

import torch
from transformers import TrainingArguments, set_seed

from ... import ChatGLMConfig, ChatGLMForConditionalGeneration
from .settings import Settings


def build_model(settings: Settings, training: TrainingArguments) -> torch.nn.Module:
    """The model with what is to be trained in it, and nothing else that requires gradients.

    Raises:
        OSError, ValueError: a folder that can't be loaded, or can't be trained like this.
    """
    config = ChatGLMConfig.from_pretrained(settings.model)
    if settings.max_length > config.max_sequence_length:
        raise ValueError(f"--max-length is {settings.max_length}, but the model reads {config.max_sequence_length}.")
    dtype = settings.dtype
    if settings.method == "full":
        if config.quantization_bit:
            raise ValueError(
                f"{settings.model} holds INT{config.quantization_bit} weights, which --method full can't train: give "
                "the FP16 model, or one made by `chatglm merge dequantize`; or train beside them with lora or ptuning."
            )
        if config.pre_seq_len is not None:
            raise ValueError(
                f"{settings.model} holds a P-Tuning v2 prefix, beside which --method full would train nothing: give a "
                "model without it."
            )
        if dtype == "float16":
            raise ValueError("--method full can't train float16 weights: use --fp16 alone, or --dtype bfloat16.")
        dtype = "float32" if dtype == "auto" else dtype
    elif dtype == "auto":
        dtype = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
    if settings.method == "ptuning":
        if settings.pre_seq_len < 1:
            raise ValueError(f"--pre-seq-len is {settings.pre_seq_len}, expected a positive number.")
        config.pre_seq_len, config.prefix_projection = settings.pre_seq_len, settings.prefix_projection
    set_seed(training.seed)
    model = ChatGLMForConditionalGeneration.from_pretrained(
        settings.model, config=config, dtype=dtype, device_map=settings.device_map
    )
    if settings.method == "ptuning":
        model.transformer.prefix_encoder.float()
    if settings.method == "lora":
        try:
            import peft
        except ImportError:
            raise ValueError('--method lora needs PEFT: pip install "chatglm-int8[train]"') from None
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_targets,
        )
        model = peft.get_peft_model(model, lora)
    checkpointing = training.gradient_checkpointing or getattr(training, "activation_checkpointing", False)
    if settings.method != "full" and checkpointing:
        model.enable_input_require_grads()
    return model
