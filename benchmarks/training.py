"""Times fine-tuning in the shape of ChatGLM-6B: LoRA over INT8 weights beside LoRA over the same weights in FP16.

    python benchmarks/training.py
    torchrun --nproc-per-node 2 benchmarks/training.py
    python benchmarks/training.py --device cpu --layers 1 --hidden 256 --batch 2 --length 64

Random weights made in memory; LoRA r = 8 on query_key_value by PEFT, its weights fp32; autocast in fp16 with a gradient
scaler, as transformers' Trainer does with `fp16=True`; AdamW; gradient checkpointing. A quarter of each sequence is
prompt. Peaks of memory are those of a few steps of each alone. Then both are on the GPU and take turns of three steps,
so that what slows a shared machine for a while slows both; a step's time is the median of 30. With torchrun: tokens
per second of all GPUs with DDP over those of the first GPU alone, INT8, each the median of 10 steps after 3.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

import peft
import torch
import torch.distributed as dist
from generate_cuda import widen
from random_model import random_model
from torch import nn

STEPS, WARM_UP = 10, 3
TURNS, STEPS_A_TURN = 10, 3
GIB = 2**30
KINDS = {  # a piece of a kernel's name to what it does, first match
    "many_rows": "quantised products",
    "gradient": "quantised products",
    "expand_": "expanding weights",
    "flash": "attention",
    "fmha": "attention",
    "attention": "attention",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "nvjet": "matrix products",
    "xmma": "matrix products",
    "softmax": "loss",
    "nll_loss": "loss",
    "layer_norm": "LayerNorm",
    "norm_forward": "LayerNorm",
    "norm_backward": "LayerNorm",
    "nccl": "between GPUs",
    "Memcpy": "copies",
}


def batch(arguments, config) -> dict[str, torch.Tensor]:
    start = arguments.length // 4
    ids = torch.randint(1000, min(100000, config.vocab_size - 100), (arguments.batch, arguments.length))
    ids[:, start - 2], ids[:, start - 1] = config.gmask_token_id, config.bos_token_id
    labels = ids.clone()
    labels[:, :start] = -100
    return {"input_ids": ids.to(arguments.device), "labels": labels.to(arguments.device)}


def with_lora(model: nn.Module, arguments) -> peft.PeftModel:
    torch.manual_seed(0)
    model.train()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=["query_key_value"])
    return peft.get_peft_model(model, lora)


def stepper(model: nn.Module, inputs: dict, arguments) -> Callable[[], torch.Tensor]:
    """A function that makes one step of training and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    device = arguments.device
    scaler = torch.amp.GradScaler(device, enabled=arguments.autocast and arguments.dtype == torch.float16)

    def step() -> torch.Tensor:
        with torch.autocast(device, arguments.dtype, enabled=arguments.autocast):
            loss = model(**inputs, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def timed(step: Callable, device: str, count: int) -> list[float]:
    """The seconds of each of so many steps."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(count):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return times


def seconds(step: Callable, device: str) -> float:
    """The median time of a step."""
    return statistics.median(timed(step, device, WARM_UP + STEPS)[WARM_UP:])


def in_turns(steps: list[Callable], device: str) -> list[float]:
    """The median time of each of the steps, which take turns."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(TURNS + 1):
        for step, mine in zip(steps, times, strict=True):
            found = timed(step, device, STEPS_A_TURN)
            mine += found if turn else []  # the first turn warms up
    return [statistics.median(mine) for mine in times]


def profile(step: Callable) -> None:
    """Print what the GPU did in a step, in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in record.key_averages():
        kind = next((kind for piece, kind in KINDS.items() if piece in event.key), "elementwise and the rest")
        spent[kind] = spent.get(kind, 0) + event.self_device_time_total / 1e3
    for kind, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"    {milliseconds:8.2f} ms {kind}")


def prepare(model: nn.Module, arguments) -> tuple[peft.PeftModel, Callable]:
    """The model with LoRA, and a function that makes a step."""
    model.to(arguments.dtype)
    torch.manual_seed(1)
    inputs = batch(arguments, model.config)
    tuned = with_lora(model, arguments)
    return tuned, stepper(tuned, inputs, arguments)


def memory(name: str, model: nn.Module, arguments) -> tuple[float, float]:
    """GiB allocated and reserved at most in a few steps; on a CPU, 0 GiB."""
    on_gpu = arguments.device == "cuda"
    tuned, step = prepare(model, arguments)
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated() / GIB
    losses = [step().item() for _ in range(WARM_UP)]
    line, peaks = f"{name}: losses {', '.join(f'{loss:.4f}' for loss in losses)}", (0.0, 0.0)
    if on_gpu:
        peaks = (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB)
        line += f", {peaks[0]:.2f} GiB allocated ({resident:.2f} before), {peaks[1]:.2f} reserved"
    print(line, flush=True)
    if arguments.profile and on_gpu:
        profile(step)
    tuned.unload()
    return peaks


def on_one(arguments, fields: dict) -> None:
    torch.manual_seed(2)
    fp16 = random_model(arguments.layers, arguments.device, **fields)
    int8_peaks = memory("INT8", fp16, arguments)
    widen(fp16)
    fp16_peaks = memory("FP16", fp16, arguments)
    torch.manual_seed(2)
    int8 = random_model(arguments.layers, arguments.device, **fields)
    steps = [prepare(model, arguments)[1] for model in (int8, fp16)]
    times = in_turns(steps, arguments.device)
    tokens = arguments.batch * arguments.length
    for name, time_ in zip(("INT8", "FP16"), times, strict=True):
        print(f"{name}: {time_ * 1e3:.1f} ms a step, {tokens / time_:.0f} tokens/s")
    print(f"step, INT8 over FP16: {times[0] / times[1]:.3f}")
    if arguments.device == "cuda":
        allocated, reserved = (a / b for a, b in zip(int8_peaks, fp16_peaks, strict=True))
        print(f"peak memory, INT8 over FP16: allocated {allocated:.3f}, reserved {reserved:.3f}")


def on_several(arguments, fields: dict) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = arguments.device == "cuda"
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = random_model(arguments.layers, arguments.device, **fields).to(arguments.dtype)
    tuned = with_lora(model, arguments)
    torch.manual_seed(rank)
    inputs = batch(arguments, tuned.config)
    tokens = inputs["input_ids"].numel()
    alone = torch.zeros((), dtype=torch.float64, device=arguments.device)
    if rank == 0:
        alone += seconds(stepper(tuned, inputs, arguments), arguments.device)
    dist.broadcast(alone, 0)
    for parameter in tuned.parameters():
        parameter.grad = None
    together = nn.parallel.DistributedDataParallel(tuned, device_ids=[local] if on_gpu else None)
    slowest = torch.zeros((), dtype=torch.float64, device=arguments.device)
    slowest += seconds(stepper(together, inputs, arguments), arguments.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        one, all_ = tokens / alone.item(), world * tokens / slowest.item()
        print(f"INT8, one: {one:.0f} tokens/s; {world} with DDP: {all_:.0f} tokens/s, {all_ / one:.2f} ×")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times LoRA fine-tuning over INT8 and FP16 weights.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096, help="width; the inner one is four times as large")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--no-autocast", dest="autocast", action="store_false", help="everything but LoRA in fp16")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--profile", action="store_true", help="print what the GPU spends a step on")
    arguments = parser.parse_args()
    arguments.dtype = torch.float16 if arguments.device == "cuda" else torch.bfloat16  # a CPU is slow in half
    fields = {"hidden_size": arguments.hidden, "inner_hidden_size": 4 * arguments.hidden}
    if arguments.device == "cpu":  # a small vocabulary, too: this is for trying the script
        ids = {"bos_token_id": 2004, "eos_token_id": 2005, "mask_token_id": 2000, "gmask_token_id": 2001}
        fields.update(vocab_size=2048, **ids)
    if int(os.environ.get("RANK", 0)) == 0:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
        print(
            f"{name}, torch {torch.__version__}, {arguments.layers} layers, batch {arguments.batch} × "
            f"{arguments.length}, autocast {arguments.autocast}, checkpointing {arguments.checkpointing}, "
            f"CHATGLM_CUDA_KERNEL={os.environ.get('CHATGLM_CUDA_KERNEL', '')}",
            flush=True,
        )
    if "WORLD_SIZE" in os.environ:
        on_several(arguments, fields)
    else:
        on_one(arguments, fields)


if __name__ == "__main__":
    main()
