"""What `generate.py --device cuda` measures: generation in the 6B shape on a GPU, with random weights made there.

Decode speed is that of the tokens after the first: the time of 129 new tokens less that of 1, each the best of 7, which
take turns. `sampled` is `generate` as `chat` calls it. `public` expands every weight to FP16 at every call, without
graphs, as the published code does; FP16 is the same network with FP16 weights in eager PyTorch. INT8 by torch.compile
is 64 bare greedy steps over a static cache, with nothing of `generate` around them. The first token is timed with an
empty cache of kernels, imports and loading left out.
"""

import os
import tempfile
import time
from collections.abc import Callable

import torch
from random_model import random_model
from torch import nn
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from chatglm_int8 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    generation_chatglm,
    kernels_cuda,
    modeling_chatglm,
)
from chatglm_int8.cuda_graphs import StepCache
from chatglm_int8.quantization import QuantizedLinear

NO_END = {"eos_token_id": 130527}  # random weights never say it


def replace_linears(model: nn.Module, make: Callable[[QuantizedLinear], nn.Module]) -> None:
    """Put what `make` makes of it in the place of each quantised layer, one by one."""
    for name, layer in [named for named in model.named_modules() if isinstance(named[1], QuantizedLinear)]:
        model.set_submodule(name, make(layer))


def widen(model: nn.Module) -> None:
    """Put FP16 weights of the same values in the place of the quantised ones."""

    def wide(layer: QuantizedLinear) -> nn.Linear:
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.dequantize(), requires_grad=False), layer.bias
        return linear

    replace_linears(model, wide)


def prompts(config: ChatGLMConfig, length: int, batch: int = 1) -> torch.Tensor:
    ids = torch.randint(1000, 100000, (batch, length), device="cuda")
    ids[:, -2], ids[:, -1] = config.gmask_token_id, config.bos_token_id
    return ids


def elapsed(call: Callable) -> float:
    """The seconds of one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds(call: Callable, repeats: int = 3) -> float:
    call()
    return min(elapsed(call) for _ in range(repeats))


def decode_speed(model, ids: torch.Tensor, new: int = 128, repeats: int = 7, **kwargs) -> float:
    """Tokens per second after the first."""

    def timed(count: int) -> float:
        return elapsed(lambda: model.generate(ids, max_new_tokens=count, **NO_END, **kwargs))

    # In turns: a busy host would have one of them wait longer than the other. The first turn warms up.
    turns = [(timed(1), timed(new + 1)) for _ in range(repeats + 1)]
    one, more = map(min, zip(*turns[1:], strict=True))
    return len(ids) * new / (more - one)


def prefill(model, ids: torch.Tensor, recorded: bool) -> float:
    """Milliseconds."""

    @torch.no_grad()
    def call():
        padding = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
        cache = StepCache(model, padding) if recorded else DynamicCache(config=model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)

    return seconds(call, 6) * 1e3


class CompiledLinear(nn.Module):
    """INT8 weights as torch.compile likes them, cast within the product (the recipe of gpt-fast)."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.weight, self.scale, self.bias, _ = layer.weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale + self.bias


class BlockCache:
    """Keys and values of one block, [1, H, T, D] each. A step writes one column."""

    def __init__(self, *shape: int, **options):
        # Not two views of one tensor: torch.compile takes them for places of the same memory.
        self.keys, self.values = torch.randn(shape, **options), torch.randn(shape, **options)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, slots: dict):
        place = slots["cache_position"]
        return self.keys.index_copy_(2, place, key), self.values.index_copy_(2, place, value)


class CompiledSteps:
    """Greedy decoding of one sequence in INT8 by torch.compile: what is compiled for one block runs for all.

    Attributes:
        token, place: int64 [1, 1] and [1], what the next step takes, and its place among the T keys.
        caches: one of each block, random until it is filled.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, ids: torch.Tensor, room: int = 128, **options):
        """For at most `room` steps after ids [1, S]; changes the model. The options are those of torch.compile."""
        config, like = model.config, {"dtype": model.dtype, "device": ids.device}
        replace_linears(model, CompiledLinear)
        for block in model.transformer.layers:
            block.attention.layer_idx = 0  # a number that differs would be compiled again
        self.model, self.token, self.place = model, ids[:, -1:].clone(), torch.full_like(ids[0, :1], ids.shape[1])
        ids = nn.functional.pad(ids, (0, room))
        heads, head_dim = config.num_attention_heads, config.head_dim
        self.tables = modeling_chatglm.rotary_embedding(model.get_position_ids(ids), head_dim, model.dtype)
        hidden = model.get_masks(ids)
        self.masks = torch.zeros(hidden.shape, **like).masked_fill(hidden, torch.finfo(model.dtype).min)
        self.caches = [BlockCache(1, heads, ids.shape[1], head_dim, **like) for _ in model.transformer.layers]
        self.run_block = torch.compile(modeling_chatglm.GLMBlock.forward, fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Scores [1, 1, V] of what follows `token`, which becomes the best of them; the host is asked nothing."""
        given = {
            "attention_mask": self.masks.index_select(2, self.place),
            "position_embeddings": tuple(table.index_select(1, self.place) for table in self.tables),
            "cache_position": self.place,
        }
        body = self.model.transformer
        hidden_states = body.word_embeddings(self.token).to(body.dtype)
        for block, cache in zip(body.layers, self.caches, strict=True):
            hidden_states, _ = self.run_block(block, hidden_states, past_key_values=cache, **given)
        scores = self.model.lm_head(body.final_layernorm(hidden_states))
        self.token.copy_(scores.argmax(-1))
        self.place += 1
        return scores


def compiled_speed(model: ChatGLMForConditionalGeneration, ids: torch.Tensor, new: int = 64) -> float:
    """Tokens per second of `CompiledSteps` after the ids, a step being one CUDA graph. Changes the model."""
    inductor.coordinate_descent_tuning = True
    steps = CompiledSteps(model, ids, mode="max-autotune-no-cudagraphs")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with sdpa_kernel(SDPBackend.MATH):  # as gpt-fast decodes: inductor fuses it
        steps.step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                steps.step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            steps.step()

    def call():
        steps.place.fill_(ids.shape[1])
        for _ in range(new):
            graph.replay()

    return new / seconds(call)


def without_kernels(model) -> None:
    for key in kernels_cuda._availability:
        kernels_cuda._availability[key] = False


def on_cuda(layers: int, compiled: bool) -> dict:
    """Print and return the numbers; `compiled`: that of torch.compile's INT8, too."""
    model = random_model(layers, "cuda")
    sampled = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}
    ids = prompts(model.config, 512)
    result: dict[str, float] = {}

    def note(name: str, value: float, unit: str, over: float | None = None) -> None:
        result[name] = value
        print(f"{name}: {value:.2f} {unit}" + ("" if over is None else f", {value / over:.2f} ×"), flush=True)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {layers} layers")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["XDG_CACHE_HOME"] = empty
        first = elapsed(lambda: model.generate(prompts(model.config, 20), max_new_tokens=1, **sampled))
        note("first token of all, no kernels compiled", first, "s")
        greedy = decode_speed(model, ids, do_sample=False)
        note("greedy, 512 tokens of context", greedy, "tokens/s")
        processors = [generation_chatglm.FiniteScores()]
        note(
            "sampled, over greedy", decode_speed(model, ids, logits_processor=processors, **sampled), "tokens/s", greedy
        )
        for batch, length in ((16, 512), (128, 128)):
            speed = decode_speed(model, prompts(model.config, length, batch), 128, 3, do_sample=False)
            note(f"batch {batch}, {length} tokens of context, over greedy", speed, "tokens/s", greedy)
        ours = {length: prefill(model, prompts(model.config, length), True) for length in (512, 2048)}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model.generate(prompts(model.config, 1024), max_length=2048, **sampled, **NO_END)
        note("reserved until 2048 tokens", torch.cuda.max_memory_reserved() / 2**30, "GiB")

    if compiled:
        start = time.perf_counter()
        rival = compiled_speed(random_model(layers, "cuda"), ids)
        note("INT8 by torch.compile", rival, "tokens/s")
        note("greedy, over that", greedy, "tokens/s", rival)
        note("compiling and timing that", time.perf_counter() - start, "s")
    without_kernels(model)
    note("public method", decode_speed(model, ids, 16, 1, do_sample=False), "tokens/s")
    note("public method, prefill 512", prefill(model, ids, False), "ms")
    widen(model)
    note("FP16, eager", decode_speed(model, ids, 16, 1, do_sample=False), "tokens/s")
    for length, time_ in ours.items():
        rival = prefill(model, prompts(model.config, length), False)
        note(f"FP16, eager, prefill {length}", rival, "ms")
        note(f"prefill {length}, over FP16, eager", time_, "ms", rival)
    return result
