"""Times the quantised linears of ChatGLM-6B and its LM head on a GPU, against the memory's speed and two rivals.

    python benchmarks/linear_cuda.py [--rows 1 2 4 8 16 32 64 128 512] [--bits 8]

Prints µs and GB/s of weights (as they are stored) of a layer, over CUDA graphs that go through more weights than the
L2 cache holds; the median of 15 replays. `public` expands the weight to FP16 at every call and leaves the product to
cuBLAS, as the published code does; `fp16` is cuBLAS on FP16 weights. The limit is a sum over 8.6 GB.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from chatglm_int8 import kernels_cuda
from chatglm_int8.quantization import dequantize_weight

SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]  # N, K


def replayed(calls: list[Callable], replays: int = 15) -> float:
    """Milliseconds of one of the calls, which are recorded one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    tickets = kernels_cuda.new_tickets(torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernels_cuda.own_tickets(tickets):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def memory_speed() -> float:
    """GB/s of reading 8.6 GB."""
    numbers = torch.ones(8 << 27, dtype=torch.int64, device="cuda")
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        numbers.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return numbers.numel() * 8 / min(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Times quantised linears on a GPU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    arguments = parser.parse_args()
    device, bits = torch.device("cuda"), arguments.bits
    if not kernels_cuda.available(device, torch.float16):
        parser.exit(2, "The kernels can't be used here.\n")
    limit = memory_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: reads {limit:.0f} GB/s")
    totals: dict[tuple[str, int], list[float]] = {}
    for n, k in SHAPES:
        size = n * k * bits / 8
        weights = torch.randint(-128, 128, (int(1.2e9 / size), n, k * bits // 8), dtype=torch.int8, device=device)
        scale, bias = torch.full((n,), 1e-3, device=device).half(), torch.zeros(n, device=device).half()
        wide = torch.randn(max(2, int(1.2e9 / (2 * n * k))), n, k, device=device, dtype=torch.float16)
        for rows in arguments.rows:
            x = torch.randn(rows, k, device=device).half()

            def kernel(weight, x=x, scale=scale, bias=bias):
                return kernels_cuda.linear(x, weight, scale, bias, bits)

            def public(weight, x=x, scale=scale, bias=bias):
                return torch.addmm(bias, x, dequantize_weight(weight, scale, bits, torch.float16).T)

            def fp16(weight, x=x, bias=bias):
                return torch.addmm(bias, x, weight.T)

            line = f"{n:6} × {k:5}  {rows:3} rows"
            for name, call, of in (("kernel", kernel, weights), ("public", public, weights[:4]), ("fp16", fp16, wide)):
                time = replayed([lambda weight=weight, call=call: call(weight) for weight in of])
                stored = size if name != "fp16" else 2 * n * k
                total = totals.setdefault((name, rows), [0.0, 0.0])
                total[0] += stored
                total[1] += time
                line += f"   {name} {time * 1e3:7.1f} µs {stored / time / 1e6:5.0f} GB/s"
            print(line, flush=True)
        del weights, wide
    for (name, rows), (stored, time) in totals.items():
        print(
            f"four shapes, {rows:3} rows, {name}: {time * 1e3:7.1f} µs, {stored / time / 1e6 / limit:.3f} of the limit"
        )
    heads = [torch.randn(130528, 4096, device=device, dtype=torch.float16) for _ in range(6)]
    x = torch.randn(1, 4096, device=device).half()
    for name, call in (
        ("kernel", lambda head: kernels_cuda.product(x, head, None, bits=16)),
        ("cuBLAS", lambda head: x @ head.T),
    ):
        time = replayed([lambda head=head, call=call: call(head) for head in heads])
        print(f"FP16 head, 1 row, {name}: {time * 1e3:.1f} µs, {130528 * 8192 / time / 1e6 / limit:.3f} of the limit")


if __name__ == "__main__":
    main()
