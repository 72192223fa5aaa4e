"""What `linear.py --device cuda` measures: the linears and the LM head on a GPU, beside two other ways.

A layer's four linears are multiplied one after the other, in a CUDA graph of more layers than the L2 cache holds, as a
recorded step has them; the median of 15 replays. `public` expands the weight to FP16 at every call and leaves the
product to cuBLAS, as the published code does; `fp16` is cuBLAS on FP16 weights. The limit is a sum over 8.6 GB.
"""

import statistics
from collections.abc import Callable

import torch

from chatglm_int8 import cuda_runtime, kernels_cuda
from chatglm_int8.quantization import dequantize_weight

SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


def milliseconds(call: Callable, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def replayed(calls: list[Callable]) -> float:
    """Milliseconds of one of the calls, which are recorded one after the other."""
    calls[0]()
    torch.cuda.synchronize()
    arrivals = cuda_runtime.new_arrivals(torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), cuda_runtime.own_arrivals(arrivals):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(milliseconds(graph.replay, 15)) / len(calls)


def on_cuda(layers: int, bits: int = 8) -> dict:
    """Print and return the numbers, weights of `bits` (8 or 4)."""
    device = torch.device("cuda")
    if not kernels_cuda.available(device, torch.float16):
        raise SystemExit("The CUDA kernels can't be used here.")
    numbers = torch.ones(1 << 30, dtype=torch.int64, device=device)
    limit = 8 * numbers.numel() / min(milliseconds(numbers.sum, 6)) / 1e6
    del numbers
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, INT{bits}, reading memory: {limit:.0f} GB/s")
    result: dict = {"read_gb_s": limit, "bits": bits}

    def weights(n: int, k: int) -> torch.Tensor:
        return torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8, device=device)

    quantized = [[weights(n, k) for n, k in SHAPES] for _ in range(layers)]
    wide = [[torch.randn(n, k, device=device, dtype=torch.float16) for n, k in SHAPES] for _ in range(layers)]
    scales = [torch.full((n,), 1e-3, device=device).half() for n, _ in SHAPES]
    biases = [torch.zeros(n, device=device).half() for n, _ in SHAPES]
    stored = sum(n * k for n, k in SHAPES)

    def layer(product: Callable, of: list, x: dict) -> None:
        for (_, k), weight, scale, bias in zip(SHAPES, of, scales, biases, strict=True):
            product(x[k], weight, scale, bias)

    ways = {
        "kernel": (lambda x, w, s, b: kernels_cuda.product(x, w, s, b, bits), quantized, bits),
        "public": (lambda x, w, s, b: torch.addmm(b, x, dequantize_weight(w, s, bits, x.dtype).T), quantized[:2], bits),
        "fp16": (lambda x, w, s, b: torch.addmm(b, x, w.T), wide, 16),
    }
    print(f"{'a layer':10}" + "".join(f"{name:>12} µs, of limit" for name in ways))
    for rows in ROWS:
        x = {k: torch.randn(rows, k, device=device).half() for k in (4096, 16384)}
        line = f"{rows:4} rows "
        for name, (product, of, width) in ways.items():
            time = replayed([lambda weights=weights: layer(product, weights, x) for weights in of])  # noqa: B023
            speed = stored * width / 8 / time / 1e6
            line += f"{time * 1e3:14.1f}   {speed / limit:7.3f}"
            result[f"{name}_{rows}"] = {"us": time * 1e3, "of_limit": speed / limit}
        print(line, flush=True)
    del quantized, wide
    heads = [torch.randn(130528, 4096, device=device, dtype=torch.float16) for _ in range(6)]
    x = torch.randn(1, 4096, device=device).half()
    ways = {"kernel": lambda head: kernels_cuda.product(x, head, None, bits=16), "cuBLAS": lambda head: x @ head.T}
    for name, product in ways.items():
        time = replayed([lambda head=head: product(head) for head in heads])  # noqa: B023
        of_limit = 130528 * 4096 * 2 / time / 1e6 / limit
        print(f"FP16 head, 1 row, {name}: {time * 1e3:.1f} µs, {of_limit:.3f} of the limit")
        result[f"head_{name}"] = {"us": time * 1e3, "of_limit": of_limit}
    return result
