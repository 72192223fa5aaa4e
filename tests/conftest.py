"""Where tests find their data, and the small models of the goldens."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
SHARED = Path(os.environ.get("CHATGLM_SHARED", ROOT.parent / "shared"))

torch.set_num_threads(1)  # the models are tiny: more threads would wait for each other


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout, which is the embedded checkpoint too."""
    return ROOT


@pytest.fixture(scope="session")
def published() -> Path:
    """The small checkpoint in the release's form, with the genuine vocabulary."""
    folder = SHARED / "published"
    if not (folder / "ice_text.model").is_file():
        pytest.skip(f"needs the genuine ice_text.model, which is not distributed: {folder} (set CHATGLM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def cases() -> dict[str, torch.Tensor]:
    """What the public implementation computed: tensors named CASE.WHAT."""
    return load_file(DATA / "cases.safetensors")


@pytest.fixture
def golden_model():
    """A function that makes one of the goldens' small models: base, pos1d, prefix, prefix_proj, int8, int4."""

    def make(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager"):
        fields = json.loads((DATA / f"{name}.config.json").read_text())
        fields.pop("model_type")
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**fields)).to(dtype)
        state = load_file(DATA / f"{name}.safetensors")
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not missing
        assert all(key.endswith("rotary_emb.inv_freq") for key in unexpected)
        model.set_attn_implementation(attention)
        return model.eval()

    return make


@pytest.fixture
def learn():
    """A function that trains what of a model requires gradients on one batch, and gives the loss of each step."""

    def train(model, ids: torch.Tensor, labels: torch.Tensor, lr: float, steps: int, **given) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        losses = []
        for _ in range(steps):
            loss = model(input_ids=ids, labels=labels, **given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return train
