"""Speed of the quantised linears at the shapes of ChatGLM-6B, beside other ways to multiply by INT8 weights.

    python benchmarks/linear.py [--device cpu] [--threads 2] [--layers 4] [--rounds 7] [--json FILE]
    python benchmarks/linear.py --device cuda [--bits 8] [--layers 12] [--json FILE]    (see linear_cuda.py)

All contestants take turns in every round, so that a noisy machine is noisy for all of them; the median counts. One row
is judged by the bytes of weights a second over what a plain C loop reads from memory, many rows against torch's bf16
linears (whose weights are bf16 already: twice the memory), an error by float64. A layer's four linears are multiplied
one after the other, over enough layers not to stay in the cache.

With `THP_MEM_ALLOC_ENABLE=1` torch's tensors have pages of 2 MiB, as the loop has them that reads memory, and as Linux
may give them to the weights of a file.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from chatglm_int8 import kernels_cpu
from chatglm_int8.kernel_cache import cache_folder, compilers, run_compiler

SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]  # N, K of a block's four linears
READER = Path(__file__).with_name("read_memory.c")


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns; the first round does not count."""
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def reader(threads: int, size: int = 1 << 30) -> tuple[Callable[[], int], int]:
    """A function that reads `size` bytes of memory, and the size."""
    flags = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
    path = cache_folder() / "reader.so"
    run_compiler([*compilers()[0], *flags, str(READER), "-o", str(path)])
    library = ctypes.CDLL(str(path))
    library.prepare.argtypes = (ctypes.c_int64, ctypes.c_int)
    if library.prepare(size, threads):
        raise MemoryError(f"No {size} bytes to read.")
    return lambda: library.read_all(threads), size


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, one in a hundred of them 30 times as large: as hidden states are."""
    x = torch.randn(rows, columns)
    return torch.where(torch.rand(rows, columns) < 0.01, 30 * x, x).to(dtype)


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    """Relative Frobenius distance of y from x · (scale · weight)ᵀ in float64."""
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    return ((y.double() - exact).norm() / exact.norm()).item()


class Weights:
    """Random weights of the linears of some blocks, in several formats: (weight [N, K], scale [N]) each."""

    def __init__(self, layers: int):
        self.int8 = [
            [
                (torch.randint(-128, 128, shape, dtype=torch.int8), (torch.rand(shape[0]) * 0.01).half())
                for shape in SHAPES
            ]
            for _ in range(layers)
        ]
        self.int4 = [[(w[:, ::2].contiguous(), s) for w, s in layer] for layer in self.int8]
        self.bf16 = [[(w.bfloat16(), s) for w, s in layer] for layer in self.int8]
        self.bf16_scales = [[(w, s.bfloat16()) for w, s in layer] for layer in self.int8]
        self.numel = sum(w.numel() for layer in self.int8 for w, _ in layer)


def over(layers: list, rows: int, dtype: torch.dtype, multiply: Callable) -> Callable[[], None]:
    """A function that multiplies activations [rows, K] by the weights of all layers."""
    x = {columns: activations(rows, columns, dtype) for _, columns in SHAPES}

    def run() -> None:
        for layer in layers:
            for (_, columns), (weight, scale) in zip(SHAPES, layer, strict=True):
                multiply(x[columns], weight, scale)

    return run


def by_torch(x: torch.Tensor, weight: torch.Tensor, _) -> torch.Tensor:
    return linear(x, weight)


def expand(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x @ (weight.float() * scale.float()[:, None]).T


def by_kernel(library, bits: int) -> Callable:
    return lambda x, weight, scale: library.linear(x, weight, scale, None, bits)


def one_row(library, weights: Weights, rounds: int) -> dict:
    """Rates of one row, and of few, over the rate at which memory is read."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    threads, layers = torch.get_num_threads(), len(weights.int8)
    int8, int4 = by_kernel(library, 8), by_kernel(library, 4)
    read, read_bytes = reader(threads)
    contestants = {
        "read": read,
        "INT8, half": over(weights.int8, 1, half, int8),
        "INT8, fp32": over(weights.int8, 1, single, int8),
        "INT4, half": over(weights.int4, 1, half, int4),
        "torch _weight_int8pack_mm, bf16": over(weights.bf16_scales, 1, brain, torch._weight_int8pack_mm),
        "torch bf16": over(weights.bf16, 1, brain, by_torch),
        **{f"INT8, half, {rows} rows": over(weights.int8, rows, half, int8) for rows in (2, 8, 32)},
    }
    seconds = medians(contestants, rounds)
    bandwidth = read_bytes / seconds.pop("read")
    result = {"instructions": library.instructions, "threads": threads, "read GB/s": bandwidth / 1e9}
    print(f"{library.instructions}, {threads} threads, reading memory: {bandwidth / 1e9:.1f} GB/s\n")
    print(f"{'linears, one row':36} {'ms a layer':>10} {'GB/s':>6} {'of read':>8}")
    for name, taken in seconds.items():
        size = weights.numel * (2 if name == "torch bf16" else 0.5 if "INT4" in name else 1)
        result[name] = {"seconds": taken / layers, "of read": size / taken / bandwidth}
        print(f"{name:36} {1e3 * taken / layers:10.2f} {size / taken / 1e9:6.1f} {size / taken / bandwidth:8.2f}")
    result["8 rows over 1"] = seconds["INT8, half, 8 rows"] / seconds["INT8, half"]
    print(f"8 rows take {result['8 rows over 1']:.2f} times as long as one\n")
    return result


def many_rows(library, weights: Weights, rounds: int) -> dict:
    """Times of 512 rows, over those of torch's bf16 linears."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    int8 = by_kernel(library, 8)
    contestants = {
        "torch bf16": over(weights.bf16[:1], 512, brain, by_torch),
        "INT8, half": over(weights.int8[:1], 512, half, int8),
        "INT8, fp32": over(weights.int8[:1], 512, single, int8),
        "expand to fp32, then sgemm": over(weights.int8[:1], 512, single, expand),
    }
    if len(weights.int8) == 1:  # takes minutes where it has no fast path
        int8pack = over(weights.bf16_scales[:1], 512, brain, torch._weight_int8pack_mm)
        contestants["torch _weight_int8pack_mm, bf16"] = int8pack
    seconds = medians(contestants, max(1, rounds // 2))
    result = {}
    print(f"{'linears, 512 rows':36} {'ms a layer':>10} {'28 layers, tok/s':>17} {'over bf16':>10}")
    for name, taken in seconds.items():
        ratio = seconds["torch bf16"] / taken
        result[f"512 rows: {name}"] = {"seconds": taken, "over torch bf16": ratio}
        print(f"{name:36} {1e3 * taken:10.1f} {512 / taken / 28:17.1f} {ratio:10.2f}")
    return result


def errors(library, weight: torch.Tensor, scale: torch.Tensor) -> dict:
    """Errors against float64: in half over the error of rounding the activations to half, in fp32 as they are."""
    half, single, result = torch.float16, torch.float32, {}
    print("\nerror against float64, over that of rounding the activations to half")
    for rows in (1, 8, 64):
        x = activations(rows, weight.shape[1], single)
        rounded = error(linear(x.half().double(), weight.double() * scale.double()[:, None]), x, weight, scale)
        found = {
            dtype: error(library.linear(x.to(dtype), weight, scale, None, 8), x, weight, scale)
            for dtype in (half, single)
        }
        result[f"error, {rows} rows"] = {"half over rounding": found[half] / rounded, "fp32": found[single]}
        print(f"{rows:4} rows: half {found[half] / rounded:.2f}, fp32 {found[single]:.1e} (absolute)")
    return result


def on_cpu(layers: int, rounds: int) -> dict:
    """Everything on the CPU; a dictionary of ratios and rates."""
    library = kernels_cpu.library()
    if library is None:
        sys.exit("No CPU kernels here: nothing to measure.")
    torch.manual_seed(0)
    weights = Weights(layers)
    speeds = one_row(library, weights, rounds) | many_rows(library, weights, rounds)
    return speeds | errors(library, *weights.int8[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--layers", type=int, help="copies of the four weights, 0.2 GB each (default: 4; on a GPU 12)")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of the weights on a GPU (default: 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        from linear_cuda import on_cuda

        result = on_cuda(arguments.layers or 12, arguments.bits)
    else:
        result = on_cpu(arguments.layers or 4, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
