"""torch's global default dtype and device, set by another part of a program, change no result of a loaded model."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, GlmConfig, GlmForCausalLM

DEFAULTS = [torch.float16, torch.bfloat16, torch.float64, torch.device("meta")]
MODELS = ["base", "int8", "int4", "prefix", "pos1d", "half int8", "half embedding"]
IDS = [[7, 8, 9, 501, 504, 10, 11]]  # [gMASK] and <sop> are 501 and 504
PROMPT = 5  # of the ids


@contextlib.contextmanager
def defaults(hostile: torch.dtype | torch.device) -> Iterator[None]:
    if isinstance(hostile, torch.device):
        torch.set_default_device(hostile)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(hostile)
    try:
        yield
    finally:
        if isinstance(hostile, torch.device):
            torch.set_default_device(None)
        else:
            torch.set_default_dtype(before)


def tensors(found) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        found = found.values()
    return [tensor for each in found or () for tensor in tensors(each)]


def check(action: Callable, hostile: list[torch.dtype | torch.device] = DEFAULTS) -> None:
    """The action's tensors have the same dtypes, places and numbers under each default."""
    expected = tensors(action())
    assert expected
    for default in hostile:
        with defaults(default):
            got = tensors(action())
        assert len(got) == len(expected), default
        for one, other in zip(got, expected, strict=True):
            assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape), default
            assert torch.equal(one, other), default


@pytest.fixture
def make_model(golden_model):
    """A function that makes one of MODELS."""

    def make(name: str):
        if name == "half int8":
            return golden_model("int8", torch.float16)
        if name == "half embedding":
            return golden_model("base", torch.float16).quantize(8).float()
        return golden_model(name)

    return make


def forward(model, ids, tmp_path):
    with torch.no_grad():
        return model(ids, output_attentions=True, output_hidden_states=True)


def train(model, ids, tmp_path):
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    loss = model(ids, labels=torch.cat((torch.full_like(ids[:, :PROMPT], -100), ids[:, PROMPT:]), dim=1)).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def train_input(model, ids, tmp_path):
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    given = {"position_ids": model.get_position_ids(ids), "attention_mask": model.get_masks(ids)}
    labels = torch.cat((torch.full_like(ids[:, :PROMPT], -100), ids[:, PROMPT:]), dim=1)
    model(inputs_embeds=embeddings, labels=labels, **given).loss.backward()
    return embeddings.grad


def generate(model, ids, tmp_path, **settings):
    torch.manual_seed(0)
    prompt = ids[:, :PROMPT]
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def greedy(model, ids, tmp_path):
    return [generate(model, ids, tmp_path), model.generate(ids[:, :PROMPT], max_new_tokens=3, do_sample=False)]


def sample(model, ids, tmp_path):
    return generate(model, ids, tmp_path, do_sample=True, top_p=0.8, top_k=20, temperature=0.9)


def penalties(model, ids, tmp_path):
    return generate(model, ids, tmp_path, repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=4)


def beams(model, ids, tmp_path):
    return generate(model, ids, tmp_path, num_beams=3)


def static(model, ids, tmp_path):
    return generate(model, ids, tmp_path, cache_implementation="static")


def stream(model, ids, tmp_path):
    return list(model.stream_generate(ids[:, :PROMPT], max_new_tokens=6, do_sample=False))


def masks_and_positions(model, ids, tmp_path):
    return model.get_masks(ids), model.get_position_ids(ids), model.get_position_ids(ids, [3], use_gmasks=[False])


def save(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors", device="cpu")


def quantize(model, ids, tmp_path):
    return list(copy.deepcopy(model).quantize(8).parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("action", [forward, train, train_input, greedy], ids=lambda action: action.__name__)
def test_results_of_all_kinds_of_models(name, action, make_model, tmp_path):
    model, ids = make_model(name), torch.tensor(IDS)
    check(lambda: action(model, ids, tmp_path))


@pytest.mark.parametrize(
    "action", [sample, penalties, stream, masks_and_positions, save, quantize], ids=lambda action: action.__name__
)
def test_results_of_other_actions(action, make_model, tmp_path):
    model, ids = make_model("base" if action is quantize else "int8"), torch.tensor(IDS)
    check(lambda: action(model, ids, tmp_path))


@pytest.mark.parametrize("action", [beams, static], ids=lambda action: action.__name__)
def test_transformers_own_loops(action, make_model, tmp_path):
    """They allocate on the default device, so that no model, the library's own included, runs in them under meta."""
    model, ids = make_model("int8"), torch.tensor(IDS)
    check(lambda: action(model, ids, tmp_path), DEFAULTS[:-1])
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    glm = GlmForCausalLM(GlmConfig(**shape, **heads)).eval()
    with defaults(DEFAULTS[-1]):
        assert generate(glm, ids, tmp_path).device.type == "cpu"
        for each in (model, glm):
            with pytest.raises(NotImplementedError, match="meta"):
                action(each, ids, tmp_path)


@pytest.fixture(scope="module")
def small(root):
    """The small model and its tokenizer."""
    return AutoModel.from_pretrained(root).eval(), AutoTokenizer.from_pretrained(root)


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}], ids=["sampling", "greedy"])
def test_answers(small, settings):
    model, tokenizer = small

    def answers() -> list:
        torch.manual_seed(0)
        stream = model.stream_chat(tokenizer, "你好", [("你好", "你好！")], max_new_tokens=4, **settings)
        return [list(stream), model.chat(tokenizer, "你好", max_new_tokens=4, **settings)]

    expected = answers()
    for default in DEFAULTS:
        with defaults(default):
            assert answers() == expected, default


def test_batches_of_text(small):
    check(lambda: dict(small[1](["你好", "a longer text"], padding=True, return_tensors="pt")), DEFAULTS[:-1])


def test_loading(root):
    """Under meta transformers refuses."""
    check(lambda: AutoModel.from_pretrained(root).state_dict(), DEFAULTS[:-1])
    with defaults(DEFAULTS[-1]), pytest.raises(RuntimeError, match="meta"):
        AutoModel.from_pretrained(root)


@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
def test_a_prefix_that_is_loaded(name, golden_model, tmp_path):
    golden_model(name).save_pretrained(tmp_path)
    model = golden_model("base")
    check(lambda: model.load_prefix(tmp_path).transformer.prefix_encoder.state_dict())
