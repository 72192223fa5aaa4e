"""A model and its tokenizer, for the device and dtype of the command line."""

import os
import sys

import torch
from transformers import AutoModel
from transformers.utils import logging

from .. import ChatGLMTokenizer


def load(folder: str, device: str | None, dtype: str) -> tuple:
    """The model, in eval mode, and the tokenizer of a folder. Raises OSError or ValueError with what is wrong."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}: give a ChatGLM checkpoint folder with --model.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {device} can't be used here: {str(error).splitlines()[0]}") from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype, device_map=device)
    return model.eval(), tokenizer
