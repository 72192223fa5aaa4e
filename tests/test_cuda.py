"""The same numbers and the same answers on an NVIDIA GPU."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModel, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from chatglm_int8 import cuda_graphs, generation_chatglm, ops
from chatglm_int8.apps.server.answers import Sampling
from chatglm_int8.apps.server.scheduler import Scheduler
from chatglm_int8.cuda_graphs import StepCache, StepGraph
from chatglm_int8.quantization import QuantizedLinear

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


# --- Recorded steps ---


def unrecorded_step(self, input_ids):
    """`StepCache.step` without a graph: the same kernels, launched one by one."""
    graph, length = self._graph, self.layers[0].length
    self._make_ready(self._model())
    graph.slots.fill_(length)
    graph.ids.copy_(input_ids[:, 0])
    logits = self._model().run_step(graph)
    for layer in self.layers:
        layer.fill(length + 1)
    self._slot = -1
    self._placed += 1
    return logits


def generations(model, monkeypatch, ids, new_tokens, **kwargs):
    """Greedy ids by recorded steps, by the same kernels without a graph, and by the ordinary path."""
    kwargs = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": model.config.vocab_size - 1, **kwargs}
    recorded = model.generate(ids, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(StepCache, "step", unrecorded_step)
        unrecorded = model.generate(ids, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(generation_chatglm, "can_record", lambda model: False)
        ordinary = model.generate(ids, **kwargs)
    return recorded, unrecorded, ordinary


@pytest.fixture
def steps(monkeypatch):
    """Counts replays, to be sure that there are any."""
    counted = []
    step = StepCache.step
    monkeypatch.setattr(StepCache, "step", lambda self, ids: counted.append(ids) or step(self, ids))
    return counted


@pytest.mark.parametrize("name", ["base", "pos1d", "int8", "int4", "prefix", "prefix_proj"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_steps(name, dtype, cases, golden_model, monkeypatch, steps):
    monkeypatch.setattr(cuda_graphs, "_GROWTH", 32)  # so that the cache grows several times
    model = golden_model(name, dtype, "sdpa").cuda()
    ids = cases[f"{name}_single.input_ids"].cuda()
    recorded, unrecorded, ordinary = generations(model, monkeypatch, ids, 200)
    assert len(steps) >= 199
    assert torch.equal(recorded, unrecorded)
    assert torch.equal(recorded, model.generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=511))
    # Rounding may tell the two apart, but only where the ordinary path has scores that are about as good.
    with torch.no_grad():
        scores = model(recorded).logits[0, ids.shape[1] - 1 : -1].float()
    lost = scores.max(dim=1).values - scores.gather(1, recorded[0, ids.shape[1] :, None])[:, 0]
    assert (lost <= (0.02 if dtype == torch.float16 else 0.2) * scores.std()).all()
    assert torch.equal(recorded[:, : ids.shape[1] + 1], ordinary[:, : ids.shape[1] + 1])


def test_recorded_steps_of_a_padded_batch(golden_model, monkeypatch, steps, cases):
    model = golden_model("int8", torch.float16, "sdpa").cuda()
    torch.manual_seed(0)
    ids = torch.randint(10, 400, (4, 24), device="cuda")
    ids[:, -2], ids[:, -1] = model.config.gmask_token_id, model.config.bos_token_id
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 11, 20)):
        ids[row, :padding], mask[row, :padding] = model.config.pad_token_id, 0
    recorded, unrecorded, _ = generations(model, monkeypatch, ids, 60, attention_mask=mask)
    assert torch.equal(recorded, unrecorded)
    for row in range(4):
        # One row has another kernel, whose rounding may tell the two apart, but only where they are about as good.
        together = torch.cat((ids[row, mask[row].bool()], recorded[row, 24:36]))
        alone = model.generate(together[None, :-12], do_sample=False, max_new_tokens=12, eos_token_id=511)[0]
        for place in (alone != together).nonzero()[:1, 0]:
            with torch.no_grad():
                scores = model(together[None, :place]).logits[0, -1].float()
            assert (scores[alone[place]] - scores[together[place]]).abs() <= 0.02 * scores.std()
    assert steps


def test_recorded_steps_follow_the_weights(cases, golden_model, monkeypatch, steps):
    """Moved, quantised and adapted models are recorded anew."""
    model = golden_model("base", torch.float16, "sdpa").cuda()
    ids = cases["base_single.input_ids"].cuda()
    for change in (
        lambda: None,
        lambda: model.cpu().cuda(),
        lambda: model.quantize(8),
        lambda: model.bfloat16(),
        lambda: model.half(),
        lambda: model.transformer.final_layernorm.weight.data.neg_(),
    ):
        change()
        recorded, unrecorded, _ = generations(model, monkeypatch, ids, 40)
        assert torch.equal(recorded, unrecorded)
    assert steps


def test_recorded_steps_with_lora(cases, golden_model, monkeypatch, steps):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query_key_value", "dense_h_to_4h"], init_lora_weights=False)
    model = golden_model("int8", torch.float16, "sdpa").cuda()
    ids = cases["int8_single.input_ids"].cuda()
    before = model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=511)
    adapted = peft.get_peft_model(model, config).half().eval()
    recorded, unrecorded, _ = generations(model, monkeypatch, ids, 40)
    assert torch.equal(recorded, unrecorded)
    assert not torch.equal(recorded, before)
    with adapted.disable_adapter():  # its modules stay in place, so that rounding may tell them apart further on
        recorded, unrecorded, _ = generations(model, monkeypatch, ids, 40)
        assert torch.equal(recorded, unrecorded)
        assert torch.equal(recorded[:, : ids.shape[1] + 8], before[:, : ids.shape[1] + 8])
    assert steps


def test_recorded_steps_in_threads(cases, golden_model):
    model, other = golden_model("int8", torch.float16).cuda(), golden_model("int4", torch.float16).cuda()
    ids = cases["int8_single.input_ids"].cuda()
    jobs = [(m, ids[:, k:]) for k in range(3) for m in (model, other, model)]

    def run(job):
        with torch.cuda.stream(torch.cuda.Stream()):
            return job[0].generate(job[1], do_sample=False, max_new_tokens=50, eos_token_id=511).cpu()

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for got, alone in zip(pool.map(run, jobs), expected, strict=True):
            assert torch.equal(got, alone)


@pytest.mark.parametrize("name", ["int8", "pos1d", "prefix"])
def test_recorded_steps_of_a_server(name, golden_model, monkeypatch):
    """Rows of several lengths come, are decoded together, and go; each gets what `generate` gives it alone."""
    batches, replay = [], StepGraph.replay
    monkeypatch.setattr(StepGraph, "replay", lambda self, model: batches.append(len(self.ids)) or replay(self, model))
    model = golden_model(name, torch.float16, "sdpa").cuda()
    end = [model.config.gmask_token_id, model.config.bos_token_id]
    torch.manual_seed(0)
    jobs = [
        ([*torch.randint(10, 400, (length,)).tolist(), *end], Sampling(limit, temperature=0))
        for length, limit in ((3, 12), (30, 5), (1, 9), (17, 12), (9, 7))
    ]
    scheduler = Scheduler(model, range(model.config.vocab_size), max_batch=3)

    async def answer(prompt, sampling):
        return [token.id async for token in scheduler.submit(prompt, [sampling])[0]]

    async def answers():
        return await asyncio.gather(*(answer(*job) for job in jobs))

    try:
        got = asyncio.run(answers())
    finally:
        scheduler.close()
    assert max(batches) == 3
    for ids, (prompt, sampling) in zip(got, jobs, strict=True):
        given = torch.tensor([prompt], device="cuda")
        alone = model.generate(given, do_sample=False, max_new_tokens=sampling.max_new_tokens)[0, len(prompt) :]
        assert ids == [token for token in alone.tolist() if token != model.config.eos_token_id]


def test_what_users_add_to_generate(cases, golden_model, steps):
    """Processors, criteria and streamers see each token in its turn; what steps can't do, the ordinary path does."""
    model = golden_model("int8", torch.float16).cuda()
    ids = cases["int8_single.input_ids"].cuda()
    length = ids.shape[1]
    plain = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=511)
    seen, put = [], []

    class Forbids(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores.index_fill(1, plain[0, length : length + 1], -torch.inf)

    class Stops(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= length + 7
            return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    class Streams(BaseStreamer):
        def put(self, value):
            put.append(value.clone())

        def end(self):
            put.append(None)

    got = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=20,
        logits_processor=[Forbids()],
        stopping_criteria=[Stops()],
        streamer=Streams(),
    )
    assert got.shape[1] == length + 7
    assert seen == list(range(length, length + 7))
    assert plain[0, length] not in got[0, length:]
    assert put[-1] is None
    assert torch.equal(torch.cat([value.flatten() for value in put[:-1]]), got[0].cpu())
    assert len(steps) > 0
    scores = model.generate(
        ids, do_sample=False, max_new_tokens=20, eos_token_id=511, output_scores=True, return_dict_in_generate=True
    )
    assert torch.equal(scores.sequences, plain)
    assert [int(score.argmax()) for score in scores.scores] == plain[0, length:].tolist()
    ended = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=int(plain[0, length + 4]))
    assert torch.equal(ended, plain[:, : ended.shape[1]])
    assert ended[0, -1] == plain[0, length + 4]
    count = len(steps)
    model.generate(ids, num_beams=2, do_sample=False, max_new_tokens=5)
    model.generate(ids, do_sample=False, max_new_tokens=5, output_attentions=True, return_dict_in_generate=True)
    assert len(steps) == count


def test_training_through_the_kernels(golden_model, cases):
    ids = cases["int8_single.input_ids"].cuda()
    model = golden_model("int8", torch.float16).cuda()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    positions = model.get_position_ids(ids)
    model(inputs_embeds=embeds, position_ids=positions).logits.float().square().mean().backward()
    exact = golden_model("int8").cuda()
    wide = embeds.detach().float().requires_grad_()
    exact(inputs_embeds=wide, position_ids=positions).logits.square().mean().backward()
    assert distance(embeds.grad, wide.grad.cpu()) < 2e-2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["kernels", "plain"])
def test_no_expanded_weight_is_kept_for_the_gradient(dtype, bits):
    layer = QuantizedLinear(1024, 4096, bits=bits, dtype=dtype).cuda()
    x = torch.randn(256, 1024, device="cuda", dtype=dtype, requires_grad=True)
    layer(x).sum().backward()  # libraries allocate their workspaces
    x.grad = None
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 4096
    y.sum().backward()
    del y
    assert torch.cuda.memory_allocated() - before <= x.grad.nbytes + 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_in_training(dtype, golden_model, cases):
    ids, labels = (cases[f"base_labels.{name}"] for name in ("input_ids", "labels"))
    exact = golden_model("int8")(ids, labels=labels).loss
    for stored in (torch.float32, torch.float16):
        model = golden_model("int8", stored).cuda().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        with torch.autocast("cuda", dtype):
            loss = model(ids.cuda(), labels=labels.cuda(), use_cache=False).loss
        (1024 * loss).backward()
        assert loss.dtype == torch.float32
        assert abs(loss.cpu() - exact) < 8 * torch.finfo(dtype).eps * exact
        assert model.get_input_embeddings().weight.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_norms_in_training_give_what_the_product_takes(reentrant, golden_model, cases, monkeypatch):
    peft = pytest.importorskip("peft")
    ids, labels = (cases[f"base_labels.{name}"].cuda() for name in ("input_ids", "labels"))
    count = []
    norm = ops.cuda_training_norm
    monkeypatch.setattr(ops, "cuda_training_norm", lambda *given: count.append(0) or norm(*given))

    def gradients(stored: torch.dtype, autocast: bool, change=None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = golden_model("int8", stored).cuda().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        lora = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        adapted.enable_input_require_grads()
        if change is not None:
            for block in model.transformer.layers:
                block.mlp.register_forward_pre_hook(change)
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            loss = adapted(input_ids=ids, labels=labels, use_cache=False).loss
        (1024 * loss).backward()
        return [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]

    def far(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return max(distance(a, b.cpu()) for a, b in zip(some, others, strict=True))

    exact = gradients(torch.float32, False)
    assert not count
    for stored in (torch.float16, torch.float32):
        assert far(gradients(stored, True), exact) < 2e-2
        assert count

    def double(module, given):  # what somebody changes on the way is not what was rounded
        given[0].detach().mul_(2)

    assert far(gradients(torch.float16, True, double), gradients(torch.float32, False, double)) < 2e-2
