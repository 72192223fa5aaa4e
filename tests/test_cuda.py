"""The same numbers and the same answers on an NVIDIA GPU."""

import pytest
import torch
from transformers import AutoModel

import chatglm_int8  # noqa: F401  registers the Auto classes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CASES = ["base_single", "base_padded", "base_long", "int8_single", "int8_padded", "int4_single", "prefix_proj_single"]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.cpu().float() - expected).abs().max() / expected.abs().max()).item()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.cpu().float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_goldens(case, attention, cases, golden_model):
    ids = cases[f"{case}.input_ids"].cuda()
    hidden = cases.get(f"{case}.attention_mask")
    mask = None if hidden is None else (~hidden[:, 0, -1]).long().cuda()
    real = torch.ones_like(ids).bool().cpu() if hidden is None else ~hidden[:, 0, -1]
    model = golden_model(case.rsplit("_", 1)[0], attention=attention).cuda()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert error(logits[real], cases[f"{case}.logits"][real]) < 1e-4
        for dtype in (torch.float16, torch.bfloat16):
            on_cpu = golden_model(case.rsplit("_", 1)[0], dtype, attention)
            expected = on_cpu(ids.cpu(), attention_mask=None if mask is None else mask.cpu()).logits
            got = on_cpu.cuda()(ids, attention_mask=mask).logits
            # Both round often, in other orders: neither may be much further from fp32 than the other.
            golden = cases[f"{case}.logits"][real]
            assert distance(got[real], golden) < 2 * distance(expected[real], golden)
    model = golden_model(case.rsplit("_", 1)[0], attention=attention).cuda()
    greedy = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert torch.equal(greedy.cpu(), cases[f"{case}.greedy"])
    beams = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=3, max_new_tokens=12)
    assert torch.equal(beams.cpu(), cases[f"{case}.beam3"])
    *_, streamed = model.stream_generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert torch.equal(streamed.cpu(), cases[f"{case}.greedy"][:, : streamed.shape[1]])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_on_the_gpu_is_the_same(bits, golden_model):
    on_cpu = golden_model("base").quantize(bits).state_dict()
    on_gpu = golden_model("base").cuda().quantize(bits)
    for name, tensor in on_gpu.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), on_cpu[name]), name


def test_moving_about(cases, golden_model):
    ids = cases["int8_single.input_ids"]
    model = golden_model("int8").half().cuda().float().cpu().cuda()
    assert model.transformer.layers[0].mlp.dense_h_to_4h.weight.dtype == torch.int8
    with torch.no_grad():
        logits = model(ids.cuda()).logits
    assert error(logits, cases["int8_single.logits"]) < 1e-4


def test_device_map_auto(tmp_path, cases, golden_model):
    golden_model("int8").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, device_map="auto")
    assert model.device.type == "cuda"
    with torch.no_grad():
        assert error(model(cases["int8_single.input_ids"].cuda()).logits, cases["int8_single.logits"]) < 1e-4


@pytest.mark.slow
def test_static_cache_compiles(cases, golden_model):
    ids = cases["base_single.input_ids"].cuda()
    model = golden_model("base", attention="sdpa").cuda()
    got = model.generate(ids, do_sample=False, max_new_tokens=24, cache_implementation="static")
    assert torch.equal(got.cpu(), cases["base_single.greedy"])
