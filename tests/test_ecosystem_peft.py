"""All of PEFT's methods over INT8 and INT4 weights: right, or refused; none is silently wrong."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from chatglm_int8.quantization import QuantizedLinear

peft = pytest.importorskip("peft", reason="needs peft, of the extra `train`")

from peft import PeftType  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

WIDTH = 16
LINEARS = ["query_key_value", "dense"]
REFUSED = (RuntimeError, TypeError, ValueError, AttributeError, KeyError)

# What a method needs to be told beside the names of the linears.
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": ["dense"]},
    "LILY": {"r": 4},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["words"], "token_indices": [1, 3]},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
VARIANTS = [
    ("HRA", {"apply_GS": True}),
    ("IA3", {"feedforward_modules": []}),
    ("LOKR", {"decompose_both": True}),
    ("LORA", {"bias": "all"}),
    ("LORA", {"bias": "lora_only"}),
    ("LORA", {"lora_bias": True}),
    ("LORA", {"use_rslora": True}),
    ("LORA", {"use_dora": True}),
    ("LORA", {"init_lora_weights": "pissa"}),
    ("LORA", {"init_lora_weights": "olora"}),
    ("LORA", {"init_lora_weights": "orthogonal"}),
    ("LORA", {"modules_to_save": ["norm"]}),
    ("LORA", {"target_modules": ["dense"], "modules_to_save": ["query_key_value"]}),
    ("LORA", {"target_modules": ["dense"], "target_parameters": ["query_key_value.weight"]}),
    ("LORA", {"target_modules": ["dense", "words"]}),
    ("LORA", {"trainable_token_indices": {"words": [1, 3]}}),
    ("LORA", {"use_qalora": True, "qalora_group_size": 8}),
    ("MISS", {"init_weights": "bat"}),
    ("MISS", {"init_weights": "mini", "mini_r": 2}),
    ("OFT", {"use_cayley_neumann": True}),
    ("ROAD", {"variant": "road_2"}),
    ("ROAD", {"variant": "road_4"}),
]
CASES = [(kind.value, {}) for kind in PeftType] + VARIANTS
IDS = [" ".join([kind, *(f"{key}={value}" for key, value in extra.items())]) for kind, extra in CASES]

# These must run, forward and backward; of others, a refusal is enough.
RIGHT = {"ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS"}
RIGHT |= {"OFT", "PVERA", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"}
# Of these, variants that read the weight; LoHa and LoKr take the packed shape of INT4 for the weight's.
READING = ("use_dora", "bat", "pissa", "olora", "orthogonal", "query_key_value")


class Net(nn.Module):
    def __init__(self, bits: int):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, WIDTH)
        self.query_key_value = QuantizedLinear.from_linear(nn.Linear(WIDTH, 2 * WIDTH), bits)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.dense = QuantizedLinear.from_linear(nn.Linear(2 * WIDTH, WIDTH), bits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense(self.norm(self.query_key_value(self.words(ids))).tanh())


def dequantized(net: Net, dtype: torch.dtype) -> Net:
    net = copy.deepcopy(net)
    for name in LINEARS:
        layer = net.get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data, linear.bias.data = layer.dequantize(torch.float64), layer.bias.data
        net.set_submodule(name, linear)
    return net.to(dtype)


def configuration(kind: str, extra: dict):
    """The method's configuration; None where it has other needs than linears to adapt."""
    maker = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = {field.name for field in dataclasses.fields(maker)}
    given = {"target_modules": LINEARS} if "target_modules" in fields else {}
    try:
        return maker(**{**given, **SETTINGS.get(kind, {}), **extra})
    except ImportError as missing:  # AdaMSS asks for scikit-learn
        pytest.skip(f"PEFT needs another package: {missing}")


def wrap(net: Net, config) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(net, copy.deepcopy(config)).eval()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    found = tensors(source)
    for name, tensor in tensors(target).items():
        if found[name].shape == tensor.shape and found[name].dtype != torch.int8:
            tensor.copy_(found[name])


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    """Output and gradients, in float64."""
    model.zero_grad()
    output = model(torch.tensor([[1, 2, 3, 4, 5]]))
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach().double(), **gradients}


def error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, over the largest gradient, or output."""
    size = max(float(tensor.abs().max()) for name, tensor in expected.items() if name != "output" or len(expected) == 1)
    size = max(size, float(expected["output"].abs().max()))
    nothing = torch.zeros(1, dtype=torch.float64)
    return max(float((got.get(name, nothing) - expected[name]).abs().max()) for name in expected) / size


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("kind", "extra"), CASES, ids=IDS)
@pytest.mark.filterwarnings("ignore")
def test_right_or_refused(kind, extra, bits):
    try:
        config = configuration(kind, extra)
        model = wrap(Net(bits), config)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        got = run(model)
    except REFUSED:
        refused = any(word in str(extra) for word in READING) or (bits == 4 and kind in ("LOHA", "LOKR"))
        if kind in RIGHT and not refused:
            raise
        return
    references = [wrap(dequantized(Net(bits), dtype), config) for dtype in (torch.float64, torch.float32)]
    for reference in references:
        copy_adapter(model, reference)
    expected, in_float32 = map(run, references)
    # Some methods round more by themselves, whatever they adapt.
    allowed = max(1e-5, 2 * error(in_float32, expected))
    assert error(got, expected) <= allowed
    check_merging(model, references[0], expected["output"], allowed)


@torch.no_grad()
def check_merging(model: nn.Module, reference: nn.Module, expected: torch.Tensor, allowed: float) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    size = expected.abs().max()
    for name in ("merge_adapter", "merge_and_unload", "unload"):
        for settings in ({},) if name == "unload" else ({}, {"safe_merge": True}):
            merged = copy.deepcopy(model)
            try:
                result = getattr(merged, name)(**settings) or merged
            except REFUSED:
                result = merged  # nothing has changed
            wanted = expected if name != "unload" else getattr(copy.deepcopy(reference), name)()(ids)
            assert (result(ids).double() - wanted).abs().max() <= allowed * size, (name, settings)
            for layer in (module for module in result.modules() if isinstance(module, QuantizedLinear)):
                assert layer.weight.dtype == torch.int8


def test_the_refusal_names_what_to_do():
    model = wrap(Net(8), configuration("LORA", {}))
    weight = model.dense.base_layer.weight.clone()
    for settings in ({}, {"safe_merge": True}):
        with pytest.raises(RuntimeError, match=r"integers without their scales.*dequantise.*chatglm merge lora"):
            model.merge_and_unload(**settings)
    assert torch.equal(model.dense.base_layer.weight, weight)
    with pytest.raises(RuntimeError, match="integers without their scales"):
        wrap(Net(8), configuration("LORA", {"use_dora": True}))
    with pytest.raises(RuntimeError, match="UniLoRA"):
        wrap(Net(8), configuration("UNILORA", {}))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_biases_train(golden_model, bias, checkpointing, learn):
    base = golden_model("int8")
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(target_modules=["query_key_value"], bias=bias, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum("query_key_value.base_layer.bias" in name for name in before) == 3
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    learn(model, ids, ids.where(ids.cumsum(1) > ids[:, :4].sum(), -100), 1e-2, 2)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("layer", ["lm_head", "word_embeddings"])
def test_a_trained_copy_of_a_half_layer_reloads(golden_model, layer, learn, tmp_path):
    """Half beside float32 activations, and float32 once it is trained."""

    def base():
        return golden_model("base", torch.float16).quantize(8).float()

    config = peft.LoraConfig(target_modules=["dense"], modules_to_save=[layer], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config).train()
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    learn(model, ids, ids.where(ids.cumsum(1) > ids[:, :4].sum(), -100), 1e-3, 2)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
