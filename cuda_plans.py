"""Launch plans of the CUDA linears: which kernel, and its grid, from sizes and the device alone.

Letters: M rows of an activation, K in_features, N out_features.
"""

import functools
import itertools
from dataclasses import dataclass

from .cuda_runtime import ARRIVALS, Module, properties

# Up to so many rows, the kernels for all devices beat expanding the weight for cuBLAS.
MAX_ROWS = 128
MAX_SMALL_M = 32  # rows of hopper/linear_small_m; more are hopper/linear_large_m's

HEAD_DIMS = (16, 32, 64, 128)
MAX_PARTS = 8  # of the keys of a head

M16_TILES = (8, 16)  # linear_m16: TILE_M
M16_MAX_K = 4096
_M16_RING = 64 * 1024  # bytes
_M16_PARTIALS = 2 * 16 * 20 * 4  # bytes of a row of x: two buffers of its 16 warps, PITCH floats
_M1_STATIC = 4096  # bytes of static shared memory, at most
_M8_RESERVED = 12 * 1024  # bytes: static shared memory, and what the device reserves for each block
# linear_tiles, by (bits, TILE_M): HEIGHT, STAGES, BLOCKS_PER_SM.
TILE_SHAPES = {
    (8, 8): (1, 4, 4),
    (8, 16): (2, 3, 3),
    (8, 32): (2, 4, 2),
    (8, 64): (2, 3, 2),
    (4, 8): (1, 4, 4),
    (4, 16): (1, 3, 4),
    (4, 32): (2, 2, 3),
    (4, 64): (2, 2, 2),
}
_TILES_STATIC = 64

TILE_N = 128  # columns of y of a block on Hopper
LARGE_M_STAGES = {64: 8, 128: 8, 192: 6, 256: 5}  # hopper/linear_large_m: STAGES by TILE_M
LARGE_M_SPLITS = (1, 2)
SMALL_M_TILES = (8, 16, 32)  # hopper/linear_small_m: TILE_M
SMALL_M_SPLITS = (1, 2, 3)  # clusters of four leave many multiprocessors idle
MAX_STAGES = 10  # hopper/linear_small_m: a launch says how many it uses
_ALIGNMENT = 1024  # bytes of dynamic shared memory that a block on Hopper may lose to alignment


def _modules() -> dict[str, Module]:
    """All modules. Each linear is a module of its own: a model needs few of them."""
    modules = {"prompt": Module("prompt", "prompt"), "training": Module("training", "training_norm")}

    def add(name: str, file: str, family: list[Module] | None = None, **constants: int) -> None:
        modules[name] = Module(name, file, constants, [] if family is None else family)
        if family is not None:
            family.append(modules[name])

    for head_dim in HEAD_DIMS:
        add(f"step_{head_dim}", "decode_attention", HEAD_DIM=head_dim, MAX_PARTS=MAX_PARTS)
    for bits in (8, 4, 16):
        add(f"linear_m1_{bits}", "linear_m1", BITS=bits)
    for bits in (8, 4):
        add(f"linear_m8_{bits}", "linear_m8", BITS=bits)
    for bits, tile in itertools.product((8, 4), M16_TILES):
        add(f"linear_m16_{bits}_{tile}", "linear_m16", BITS=bits, TILE_M=tile)
    for (bits, tile), shape in TILE_SHAPES.items():
        constants = dict(zip(("HEIGHT", "STAGES", "BLOCKS_PER_SM"), shape, strict=True))
        add(f"linear_tiles_{bits}_{tile}", "linear_tiles", BITS=bits, TILE_M=tile, **constants)
    # A model that needs one of these will need those with other splits of K.
    for bits, tile in itertools.product((8, 4), SMALL_M_TILES):
        family, constants = [], {"BITS": bits, "TILE_M": tile, "MAX_STAGES": MAX_STAGES}
        for split in SMALL_M_SPLITS:
            add(f"linear_small_m_{bits}_{tile}_{split}", "hopper/linear_small_m", family, SPLIT_K=split, **constants)
    for name, bits, transposed in (("linear_large_m_8", 8, 0), ("linear_large_m_4", 4, 0), ("input_gradient", 8, 1)):
        for tile, stages in LARGE_M_STAGES.items():
            family, constants = [], {"BITS": bits, "TRANSPOSED": transposed, "TILE_M": tile, "STAGES": stages}
            for split in LARGE_M_SPLITS:
                add(f"{name}_{tile}_{split}", "hopper/linear_large_m", family, SPLIT_K=split, **constants)
    return modules


MODULES = _modules()


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch of a linear.

    Args:
        block: threads.
        shared: bytes of dynamic shared memory.
        norm_shared: the same with a LayerNorm of x before the product; None if the kernel can't do that.
        partials: float32 partial sums of split-K, in global memory.
    """

    module: Module
    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    norm_shared: int | None = None
    partials: int = 0


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """The launch of a linear on Hopper.

    Args:
        tile_m: rows of x of a block, and of a box of its tensor map.
        stages: of the pipeline; small-M.
        weight_box: rows and bytes of the weight in a step.
    """

    module: Module
    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    tile_m: int
    stages: int
    weight_box: tuple[int, int]


def ring_stages(architecture: int) -> int:
    """STAGES of linear_m1, and of linear_m8 with INT8."""
    return 4 if architecture >= 80 else 2


@functools.lru_cache(maxsize=4096)
def linear_plan(m: int, n: int, k: int, bits: int, device: int) -> Plan | None:
    """How M rows are multiplied on any device. None: expand the weight for cuBLAS."""
    architecture, processors, shared_of_all, shared_of_one = properties(device)
    if k * bits % 128 or k % 8 or m > (MAX_ROWS if architecture >= 75 else 8):
        return None
    height = 2 if bits == 4 and m > 1 else 1  # linear_m8: HEIGHT
    ring = ring_stages(architecture)
    in_flight = ring * 4096 // (bits * height)  # weights of a row
    padded = -(-k // in_flight) * in_flight
    if m == 1:
        shared = ring * 8192 + padded * 2
        resident = max(1, min(2, shared_of_all // (shared + _M1_STATIC)))
        grid = (min(-(-n // 16), processors * resident), 1, 1)
        norm_shared = shared + 4 * k  # weight and bias
        norm_shared = norm_shared if norm_shared + _M1_STATIC <= shared_of_one else None
        plan = Plan(MODULES[f"linear_m1_{bits}"], "linear_m1", grid, 256, shared, norm_shared)
        return plan if shared + _M1_STATIC <= shared_of_one else None
    tile = next(tile for tile in (8, 16, 32, 64) if m <= tile or tile == 64)
    shared = _M16_RING + tile * _M16_PARTIALS
    if tile in M16_TILES and k <= M16_MAX_K and bits < 16 and architecture >= 80 and shared <= shared_of_one:
        grid = (min(-(-n // 16), processors), 1, 1)
        return Plan(MODULES[f"linear_m16_{bits}_{tile}"], "linear_m16", grid, 512, shared, shared)
    shared = m * (padded + 8) * 2
    if m <= 8 and bits < 16 and shared <= shared_of_all // 2 - _M8_RESERVED:
        grid = (min(-(-n // (16 * height)), processors * 2), 1, 1)
        return Plan(MODULES[f"linear_m8_{bits}"], "linear_m8", grid, 256, shared)
    return None if bits == 16 else _tiles_plan(m, n, k, bits, tile, device)


def _tiles_plan(m: int, n: int, k: int, bits: int, widest: int, device: int) -> Plan | None:
    """The launch of linear_tiles, with TILE_M up to `widest`."""
    _, processors, _, shared_of_one = properties(device)
    # Where the widest tiles don't fit into shared memory, several narrower ones read the weights as often.
    for tile in (each for each in (64, 32, 16, 8) if each <= widest):
        height, stages, resident = TILE_SHAPES[bits, tile]
        stage = height * 8192 + tile * (1024 // bits + 8) * 2  # bytes of weights and x
        shared = max(stages * stage, height * tile * 256)  # or of the sums
        if shared + _TILES_STATIC <= shared_of_one:
            break
    rows, columns = -(-n // (64 * height)), -(-m // tile)
    if shared + _TILES_STATIC > shared_of_one or columns > 4:
        return None
    steps = -(-k * bits // 1024)
    parts = max(1, min(processors * resident // (rows * columns), steps // 4))
    if rows * columns > ARRIVALS:
        parts = 1
    partials = rows * columns * parts * height * tile * 64 if parts > 1 else 0
    module = MODULES[f"linear_tiles_{bits}_{tile}"]
    return Plan(module, "linear_tiles", (rows, parts, columns), 128, shared, None, partials)


# --- Hopper ---

# Of a tile, in µs on an H200: a step of 64 columns, by its rows of x; what comes beside its steps; what comes beside
# them when two blocks share the columns.
_STEP_TIME = {64: 0.33, 128: 0.45, 192: 0.57, 256: 0.68}
_TILE_TIME, _EXCHANGE_TIME = 4, 2


def large_m_bytes(tile_m: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block, with so many bytes of weights in a step."""
    stage = tile_m * 128 + weight_bytes + 128  # the last are scales, where a step needs them
    return _ALIGNMENT + LARGE_M_STAGES[tile_m] * stage + 8 * 1536  # STAGING of each warp


def small_m_bytes(tile_m: int, split: int, stages: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block: the stages, and sums of the blocks of a cluster."""
    sums = split * -(-8 // split) * tile_m * 64 if split > 1 else 0
    return _ALIGNMENT + stages * (tile_m * 256 + weight_bytes) + sums


@functools.lru_cache(maxsize=4096)
def large_m_shape(m: int, n: int, k: int, processors: int) -> tuple[int, int]:
    """TILE_M and SPLIT_K with which a linear of many rows takes the least time."""

    def time(shape: tuple[int, int]) -> float:
        tile, split = shape
        rounds = -(-(-(-n // TILE_N) * -(-m // tile)) // (processors // split))
        return rounds * (-(-k // (64 * split)) * _STEP_TIME[tile] + _TILE_TIME + (split > 1) * _EXCHANGE_TIME)

    return min(((tile, split) for tile in LARGE_M_STAGES for split in LARGE_M_SPLITS if split * 64 <= k), key=time)


def small_m_shape(m: int, n: int, k: int, bits: int, device: int) -> tuple[int, int, int, int]:
    """Of a linear of few rows: TILE_M, SPLIT_K, stages, bytes of shared memory.

    If a multiprocessor can have a block of its own, a block takes over half of its shared memory, as two that shared
    one would come to their end last; and leaves a third of it to blocks of the kernels before and after.
    """
    _, processors, shared_of_all, _ = properties(device)
    tile = next(tile for tile in SMALL_M_TILES if m <= tile)
    blocks = -(-n // TILE_N)
    split = max((split for split in SMALL_M_SPLITS if split * 128 <= k and blocks * split <= processors), default=1)
    is_alone = blocks * split <= processors
    room = shared_of_all * 2 // 3 if is_alone else shared_of_all // 2 - 3072
    stages = min((room - small_m_bytes(tile, split, 0, 0)) // (tile * 256 + 2048 * bits), MAX_STAGES)
    needed = small_m_bytes(tile, split, stages, 2048 * bits)
    return tile, split, stages, max(needed, shared_of_all // 2) if is_alone else needed


def hopper_plan(kernel: str, m: int, n: int, k: int, bits: int, device: int) -> HopperPlan:
    """The launch of linear_small_m, linear_large_m or input_gradient (which is linear_large_m, TRANSPOSED)."""
    tiles = -(-n // TILE_N)
    if kernel == "linear_small_m":
        tile, split, stages, shared = small_m_shape(m, n, k, bits, device)
        module = MODULES[f"linear_small_m_{bits}_{tile}_{split}"]
        return HopperPlan(module, kernel, (tiles * split, 1, 1), 320, shared, tile, stages, (128, 16 * bits))
    processors = properties(device)[1]
    tile, split = large_m_shape(m, n, k, processors)
    tiles *= -(-m // tile)
    blocks = min(tiles, processors) if split == 1 else tiles * split  # persistent, unless K is split
    name = kernel if kernel == "input_gradient" else f"{kernel}_{bits}"
    box = (64, 128) if kernel == "input_gradient" else (128, 8 * bits)
    shared = large_m_bytes(tile, box[0] * box[1])
    return HopperPlan(MODULES[f"{name}_{tile}_{split}"], "linear_large_m", (blocks, 1, 1), 384, shared, tile, 0, box)


@functools.cache
def parts_of_keys(heads: int, device: int) -> int:
    """Into how many parts attention had best split the keys of each of B · H heads.

    Two blocks at a time fit a multiprocessor, and each takes as long to begin and to end as for 75 keys.
    """
    _, processors, *_ = properties(device)
    return min(range(1, MAX_PARTS + 1), key=lambda parts: -(-heads * parts // (2 * processors)) * (512 / parts + 75))
