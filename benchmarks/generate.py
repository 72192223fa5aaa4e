"""Speed and memory of the whole model in the shape of ChatGLM-6B-INT8.

    python benchmarks/generate.py [--device cpu] [--threads 2] [--model FOLDER] [--dtype float16] [--json FILE]
    python benchmarks/generate.py --device cuda [--layers 28] [--compiled] [--json FILE]    (see generate_cuda.py)

Decodes with `model.generate` as users call it, greedily and sampling as `chat` does, after 128 tokens, and reads a
prompt of 512 tokens, beside a plain C loop that reads memory and torch's bf16 linears at the same shapes, in the same
run. Without `--model` the weights are random and made in memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from linear import SHAPES, medians, reader
from random_model import random_model
from transformers import AutoModel, LogitsProcessor

from chatglm_int8 import ChatGLMForConditionalGeneration


class Clock(LogitsProcessor):
    """Notes the time of every step, and keeps the answer from ending."""

    def __init__(self, end: int):
        self.end = end
        self.times = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.end] = -torch.inf
        self.times.append(time.perf_counter())
        return scores


def peak_memory() -> float | None:
    """Of this process, in GiB; None on Windows, which has no `resource`."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def on_cpu(model: ChatGLMForConditionalGeneration, tokens: int, rounds: int) -> dict:
    """Everything on the CPU; a dictionary of ratios and rates."""
    threads, config = torch.get_num_threads(), model.config
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    read, read_bytes = reader(threads)

    def timed(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def prompt(length: int) -> torch.Tensor:
        ids = torch.randint(10, config.vocab_size // 2, (1, length))
        ids[0, -2:] = torch.tensor([config.gmask_token_id, config.bos_token_id])
        return ids

    def decode(**settings) -> float:
        clock = Clock(config.eos_token_id)
        model.generate(prompt(128), max_new_tokens=tokens, logits_processor=[clock], **settings)
        return statistics.median(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))

    found = {"read": [], "greedy": [], "sampling": []}
    for _ in range(rounds):
        found["read"].append(timed(read))
        found["greedy"].append(decode(do_sample=False))
        found["read"].append(timed(read))
        found["sampling"].append(decode(do_sample=True, top_p=0.7, temperature=0.95))
    bandwidth = read_bytes / statistics.median(found["read"])
    result = {"threads": threads, "read GB/s": bandwidth / 1e9, "weights GB": weight_bytes / 1e9}
    print(f"{threads} threads, reading memory: {bandwidth / 1e9:.1f} GB/s; weights: {weight_bytes / 1e9:.2f} GB")
    for name in ("greedy", "sampling"):
        rate = 1 / statistics.median(found[name])
        result[name] = {"tokens/s": rate, "of read": rate * weight_bytes / bandwidth}
        print(f"decode, {name:9} {rate:6.2f} tokens/s, weights read at {rate * weight_bytes / bandwidth:.2f} of that")

    bf16 = [torch.zeros(shape, dtype=torch.bfloat16).normal_() for shape in SHAPES]
    x = {columns: torch.randn(512, columns).bfloat16() for _, columns in SHAPES}
    contestants = {
        "rival": lambda: [torch.nn.functional.linear(x[w.shape[1]], w) for w in bf16],
        "ours": lambda: model(prompt(512), logits_to_keep=1),
    }
    with torch.no_grad():
        seconds = medians(contestants, max(3, rounds // 2))
    ours, rival = seconds["ours"], seconds["rival"] * config.num_layers
    result["prefill 512"] = {"tokens/s": 512 / ours, "over torch bf16 linears": rival / ours}
    print(f"prefill of 512: {512 / ours:.1f} tokens/s, {rival / ours:.2f} times as fast as torch's bf16 linears alone")
    result["peak GiB"] = peak_memory()
    if result["peak GiB"] is not None:
        print(f"peak memory, with 1 GiB for reading and 0.4 GiB for the rival: {result['peak GiB']:.2f} GiB")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--model", metavar="FOLDER", help="default: random weights")
    parser.add_argument("--layers", type=int, default=28, help="of the random model (default: 28)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a round (default: 32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="on a GPU: torch.compile's INT8, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.device == "cuda":
        from generate_cuda import on_cuda

        result = on_cuda(arguments.layers, arguments.compiled)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        return
    start = time.perf_counter()
    model = AutoModel.from_pretrained(arguments.model) if arguments.model else random_model(arguments.layers)
    print(f"{'loaded' if arguments.model else 'made'} in {time.perf_counter() - start:.1f} s, {arguments.dtype}")
    result = on_cpu(model.to(getattr(torch, arguments.dtype)).eval(), arguments.tokens, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
