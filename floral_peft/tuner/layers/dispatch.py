"""Which class adapts which layer."""

from __future__ import annotations

from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from transformers.pytorch_utils import Conv1D

from floral_peft.tuner.layers.base import FloralLayer
from floral_peft.tuner.layers.batch_norm import BatchNorm, ReparametrizedBatchNorm
from floral_peft.tuner.layers.conv import Conv, ConvTranspose
from floral_peft.tuner.layers.embedding import Embedding
from floral_peft.tuner.layers.linear import Linear
from floral_peft.tuner.layers.norm import Norm, is_norm


SUPPORTED = (
    "Linear (quantised too), transformers' Conv1D, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding, "
    "BatchNorm, InstanceNorm, LayerNorm, GroupNorm and RMSNorm"
)


def layer_class(
    base: nn.Module, backend: QuantizationBackend | None, *, reparametrize: bool = False, trains: bool = False
) -> type[FloralLayer]:
    """The class that adapts `base`.

    Args:
        base: the layer.
        backend: its quantisation, as PEFT resolves it.
        reparametrize: whether batch norms are reparametrised.
        trains: whether the base trains: batch norms' adaptors then have statistics of their own.

    Raises:
        TypeError: there is none; the message says why.
    """
    if isinstance(base, LazyModuleMixin):
        raise TypeError("its sizes are not known before a first forward pass: run one")
    if isinstance(base, (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.MultiheadAttention)):
        raise TypeError(
            "nn.MultiheadAttention reads its projections' weights directly, so adapting them has no effect"
        )
    if backend is not None:
        if backend.layer_type != "linear":
            raise TypeError(f"of quantised layers FLORAL adapts linear ones, this is a {backend.layer_type} one")
        return Linear
    if isinstance(base, (nn.Linear, Conv1D)):
        return Linear
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Conv
    if isinstance(base, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return ConvTranspose
    if isinstance(base, nn.Embedding):
        return Embedding
    if is_norm(base):
        if reparametrize and ReparametrizedBatchNorm.fits(base):
            return ReparametrizedBatchNorm
        return BatchNorm if trains and BatchNorm.fits(base) else Norm
    raise TypeError(f"FLORAL adapts {SUPPORTED}")
