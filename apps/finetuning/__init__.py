"""The parts of `chatglm finetune`."""
