"""A key-value cache allocated once per micro-batch, where transformers' own copies everything for every token."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, capacity, head_dim), filled in the first `length` columns."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, key_width = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, key_width)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store the new columns; the filled part is returned as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def take(self, rows: Tensor, part: "PreallocatedLayer", *, of: int, length: int) -> None:
        """Put in what another layer holds of these rows, at the right of the first `length` columns; zeros before.

        Args:
            rows: (b,) of `of` rows in all.
        """
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = part.dtype, part.device, True
            self.keys, self.values = (
                states.new_zeros(of, states.shape[1], self.capacity, states.shape[3])
                for states in (part.keys, part.values)
            )
        self.length = length
        self.keys[rows, :, length - part.length : length] = part.keys[:, :, : part.length]
        self.values[rows, :, length - part.length : length] = part.values[:, :, : part.length]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A cache for up to `capacity` tokens a row. Layers that are not plain full attention keep their own kind."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_preallocated(cache: DynamicCache) -> bool:
    """Whether all of its layers are."""
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)
