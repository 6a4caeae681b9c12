"""Tensors that are spread over ranks, as one of them sees them."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, with gradient; a tensor that is not spread is whole here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
