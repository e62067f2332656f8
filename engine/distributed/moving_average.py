"""An exponential moving average of a trained engine's weights, which moves at every ZeRO stage.

Kept in fp32 and in shards: every rank averages its part of each weight. An average in bf16 would stand still, since
what one step adds is below its rounding; one written into gathered ZeRO-3 weights would be thrown away with them.

DeepSpeed 0.19's private name is used here: `ds_tensor`, a rank's flat shard of a ZeRO-3 parameter, padded at the last
rank. `tests/distributed/test_moving_average.py` holds it.
"""

import math
from collections.abc import Iterator

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from engine.distributed import comm
from engine.distributed.initialize import whole_shape
from engine.distributed.pieces import Piece, Read


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, after each optimizer step.

    Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; as an exponential average in RLHF: Ouyang et al. 2022,
    https://arxiv.org/abs/2203.02155, appendix C.
    """

    def __init__(self, engine: DeepSpeedEngine, *, decay: float):
        """
        Args:
            decay: in [0, 1); 0 is a copy of the weights.
        """
        self.decay = decay
        self.parameters = {name: p for name, p in engine.module.model.named_parameters() if p.requires_grad}
        self.shards = {name: _shard(p).float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, parameter in self.parameters.items():
            self.shards[name].lerp_(_shard(parameter).float(), 1 - self.decay)

    def my_pieces(self) -> Iterator[Piece]:
        """This rank's part, for a checkpoint."""
        for name, parameter in self.parameters.items():
            size, (start, length) = math.prod(whole_shape(parameter)), _stretch(parameter)
            if length:
                yield Piece(name=name, what="average", start=start, size=size, tensor=self.shards[name][:length])

    def give_back(self, read: Read) -> None:
        """Set this rank's part to what was kept."""
        for name, parameter in self.parameters.items():
            start, length = _stretch(parameter)
            if length:
                self.shards[name][:length] = read(name, "average", start, length)

    def whole(self, name: str) -> Tensor:
        """The average of one weight, on every rank, in the weight's shape and fp32. A collective."""
        shape = whole_shape(self.parameters[name])
        flat = comm.concatenated(self.shards[name].to(comm.device()))
        return flat[: math.prod(shape)].view(shape)


def _shard(parameter: nn.Parameter) -> Tensor:
    """(ceil(elements / ranks),) this rank's part of a weight; shorter where they end."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    start, length = _stretch(parameter)
    return parameter.detach().flatten()[start : start + length]


def _stretch(parameter: nn.Parameter) -> tuple[int, int]:
    """(start, length) of this rank's part in the flattened weight."""
    size = math.prod(whole_shape(parameter))
    each = parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else -(-size // comm.world_size())
    start = min(comm.rank() * each, size)
    return start, min(each, size - start)
