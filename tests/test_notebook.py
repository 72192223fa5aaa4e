"""The notebook runs from top to bottom with the small model, and answers that are broken off leave the model usable."""

import os
from pathlib import Path

import pytest
import torch

import chatglm_int8
from chatglm_int8 import ChatGLMForConditionalGeneration, ChatGLMTokenizer


def test_the_notebook_runs(root, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the extra `test`")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel, of the extra `test`")
    pytest.importorskip("peft", reason="needs peft, of the extra `train`")
    nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(chatglm_int8.__file__).parent.parent)]))
    notebook = nbformat.read(root / "examples" / "chat.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    first, last = outputs[-1]["text"].removeprefix("loss ").split(" → ")
    assert float(last) < float(first)
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_an_interrupted_answer_leaves_the_model_usable(root):
    tokenizer = ChatGLMTokenizer.from_pretrained(root)
    model = ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32).eval()
    expected = model.chat(tokenizer, "你好", do_sample=False)
    history = []
    with pytest.raises(KeyboardInterrupt):
        for _ in model.stream_chat(tokenizer, "你好", history, do_sample=False):
            raise KeyboardInterrupt
    assert history == []
    assert model.chat(tokenizer, "你好", do_sample=False) == expected
