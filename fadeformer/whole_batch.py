"""A part of a batch goes through a network as if the whole batch did.

A batch may be shared by several processes, or go through the network in several parts. So that the result hangs on the
batch alone, `WholeBatch` makes dropout and drop path draw for the whole batch and take the part's rows, and batch
normalisation take its statistics from all processes. (Those of parts that follow one another cannot be known
before; there batch normalisation sees a part.) torch has `SyncBatchNorm`, but on GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fadeformer.interception import Interception


def share(count: int, part: int, parts: int) -> NDArray[np.int64]:
    """Places in a batch that are a part's, in ascending order.

    Images that would be mixed, the first with the last and so on, are in the same part.

    Args:
        count: images of the batch.
        part: 0 to parts - 1.
        parts: of the batch.
    """
    first = np.arange(part, (count + 1) // 2, parts)
    return np.unique(np.concatenate([first, count - 1 - first]))


DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


class WholeBatch(Interception):
    """While it is active, what a network does with a part is what it would do with the whole batch.

    Args:
        rows: places of the part in the batch.
        count: images of the batch.
        distributed: whether other processes run the other parts at the same time.
    """

    def __init__(self, rows: NDArray[np.int64], count: int, distributed: bool) -> None:
        super().__init__()
        self.rows = torch.from_numpy(rows)
        self.count = count
        self.distributed = distributed

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the place of torch's functions that draw or that look at the whole batch."""
        if func in DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is torch.Tensor.bernoulli_ and len(args[0]) == len(self.rows):
            whole = args[0].new_empty((self.count, *args[0].shape[1:])).bernoulli_(*args[1:], **kwargs)
            return args[0].copy_(whole[self.rows.to(whole.device)])
        if func is functional.batch_norm and self.distributed:
            return batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, dropout: Callable[..., Tensor], x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0 or len(x) != len(self.rows):
            return dropout(x, p, training, inplace)
        kept = dropout(x.new_ones((self.count, *x.shape[1:])), p, True, False)
        return x * kept[self.rows.to(x.device)]


class _Sum(torch.autograd.Function):
    """The sum over all processes, for the gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation over the images of all processes; arguments are those of torch's.

    Args:
        x: (images, channels, ...).
        running_mean: (channels,), updated in training.
        running_var: (channels,), likewise.
        weight: (channels,).
        bias: (channels,).
        training: whether statistics are those of the batch.
        momentum: weight of the new statistics.
        eps: added to the variance.
    """
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    over = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    wide = x.float()
    summed: Tensor = _Sum.apply(torch.cat([wide.sum(over), wide.new_tensor([wide.numel() / wide.shape[1]])]))
    count = summed[-1].detach()
    mean = summed[:-1] / count
    centred = wide - mean.view(shape)
    var: Tensor = _Sum.apply(centred.square().sum(over)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    normal = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        normal = normal * weight.view(shape)
    if bias is not None:
        normal = normal + bias.view(shape)
    return normal.to(x.dtype)
