"""Keys and values of answers that are decoded together.

Letters: B rows of the batch, H heads, T columns in use, D head width, V vocabulary.
"""

import math

import numpy as np
import torch

from ...cuda_graphs import StepGraph, can_record

FIRST_COLUMNS = 128  # of a cache that grows
GPU_COLUMNS = 32  # on a GPU, T and padded prompts are a multiple: some of its kernels are built for each new shape


class RowCache:
    """Keys and values of up to B answers, each in a row filled from column 0 to a length of its own.

    Keys carry their positions, so it does not matter in which column one stands: rows of all lengths are decoded
    together, a row enters by being copied in and leaves by the last one taking its place, and nothing else moves.
    `step` reads one token of each row. `ChatGLMModel.forward` takes this as its cache, with the mask of `mask`.
    """

    is_compileable = False

    def __init__(self, model, rows: int, columns: int):
        config = model.config
        self.prefix = config.pre_seq_len or 0
        self.lengths: list[int] = []
        self._limit = columns + self.prefix
        self._dtype = model.dtype
        devices = [block.attention.dense.weight.device for block in model.transformer.layers]
        head_dim = config.hidden_size // config.num_attention_heads
        on_cpu = all(device.type == "cpu" for device in devices)
        # Taken at once, a GPU's memory can't run out later. On a CPU it grows, as few answers are long.
        self.columns = min(self._limit, FIRST_COLUMNS) if on_cpu else self._limit
        self.unit = 1 if on_cpu else GPU_COLUMNS
        shape = (2, rows, config.num_attention_heads, self.columns, head_dim)
        self._stores = [_zeros(shape, self._dtype, device) for device in devices]
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._graphs: dict[int, StepGraph] | None = {} if can_record(model) else None  # by the number of rows

    def append(self, prefilled, index: int, length: int) -> None:
        """Copy in the last `length` columns, which are not padding, of sequence `index` of a `DynamicCache`."""
        row, end = len(self.lengths), self.prefix + length
        self._reserve(end)
        for store, layer in zip(self._stores, prefilled.layers, strict=True):
            for kind, states in enumerate((layer.keys[index], layer.values[index])):
                padding = states.shape[1] - end
                start = self.prefix if padding else 0
                if start:
                    store[kind, row, :, :start] = states[:, :start]
                store[kind, row, :, start:end] = states[:, padding + start :]
        self.lengths.append(end)

    def remove(self, row: int) -> None:
        """Take a row out; the last one takes its place. What they leave is zeroed, since NaN would outlast a mask."""
        last = len(self.lengths) - 1
        old, new = self.lengths[row], self.lengths[last]
        for store in self._stores:
            if row != last:  # columns behind a row's own are zero
                store[:, row, :, : max(old, new)] = store[:, last, :, : max(old, new)]
            store[:, last, :, :new] = 0
        self.lengths[row] = new
        self.lengths.pop()

    def clear(self) -> None:
        while self.lengths:
            self.remove(len(self.lengths) - 1)

    @torch.no_grad()
    def step(self, model, ids: list[int], positions: list[list[int]]) -> torch.Tensor:
        """Scores [B, V] behind the rows' next tokens, given their ids, B, and positions, B lists of one or two.

        On a GPU a step is recorded for each number of rows and replayed; its scores last until the next.
        """
        if self._graphs is None:
            device = model.get_input_embeddings().weight.device
            self.make_room()
            places = torch.tensor(positions, device=device)
            places = places[..., None] if model.config.position_encoding_2d else places
            mask = self.mask(device)
            return model(torch.tensor(ids, device=device)[:, None], places, mask, self, use_cache=True).logits[:, -1]
        rows = len(self.lengths)
        graph = self._graphs.get(rows)
        if graph is None:
            graph = self._graphs[rows] = StepGraph(model, rows)
            graph.buffers = [(store[0, :rows], store[1, :rows]) for store in self._stores]
        given = torch.tensor([ids, self.lengths, *zip(*positions, strict=True)]).to(graph.ids.device)
        graph.ids.copy_(given[0])
        graph.slots.copy_(given[1])
        graph.positions.copy_(given[2:].T)
        self.lengths = [length + 1 for length in self.lengths]
        return graph.replay(model)[:, -1]

    def make_room(self) -> None:
        """One more column for every row: the next `update` fills it."""
        self._reserve(max(self.lengths) + 1)
        self._places = {}
        for store in self._stores:
            if store.device not in self._places:
                rows = torch.arange(len(self.lengths), device=store.device)
                self._places[store.device] = rows, torch.tensor(self.lengths, device=store.device)
        self.lengths = [length + 1 for length in self.lengths]

    def _reserve(self, columns: int) -> None:
        if columns <= self.columns:
            return
        self.columns = min(self._limit, max(columns, 2 * self.columns))
        for index, old in enumerate(self._stores):
            store = _zeros((*old.shape[:3], self.columns, old.shape[4]), old.dtype, old.device)
            rows = len(self.lengths)
            store[:, :rows, :, : old.shape[3]] = old[:, :rows]
            self._stores[index] = store

    def _used(self) -> int:
        """T."""
        return min(self.columns, rounded_up(max(self.lengths), self.unit))

    def mask(self, device: torch.device) -> torch.Tensor:
        """What is added to the scores, [B, 1, 1, T]: 0 for a row's own columns, else the dtype's lowest number."""
        lengths = torch.tensor(self.lengths, device=device)
        hidden = torch.arange(self._used(), device=device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None, None]

    # What the model calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, cache_kwargs: dict | None = None):
        """Put in keys and values [B, H, 1, D] of a step; returns all of them, [B, H, T, D]."""
        store = self._stores[layer_idx]
        rows, columns = self._places[store.device]
        store[0][rows, :, columns] = key[:, :, 0]
        store[1][rows, :, columns] = value[:, :, 0]
        kept = store[:, : len(rows), :, : self._used()]
        return kept[0], kept[1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, which a mask can hide; what happens to be in memory may be NaN, which it can't."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's take memory when they are written to, and rows that are not used never are.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
