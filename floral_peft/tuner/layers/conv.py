"""Convolutions: an adaptor is a convolution to r channels followed by one to the layer's output channels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F
from typing_extensions import override

from floral_peft.tuner.compute import Factors, conv_delta, per_example
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.fused import fits
from floral_peft.tuner.fused_conv import FusedConv, Stage, conv_by_example
from floral_peft.tuner.layers.factored import FactoredLayer, Geometry
from floral_peft.tuner.rank import kernel_split


CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _of_base(name: str) -> property:
    return property(lambda layer: getattr(layer.get_base_layer(), name))


class ConvLayer(FactoredLayer):
    """What convolutions and transposed ones share: how the kernel's axes are dealt out between the two factors.

    Along each axis one of k₁, k₂ is the kernel's size and the other is 1 (`FloralConfig.conv_split`); stride, padding
    and dilation go with the kernel.
    """

    # What models read off a convolution, to pad its input (MobileNet's `tf_padding`), is the base's.
    stride, padding, dilation, kernel_size, groups = map(
        _of_base, ("stride", "padding", "dilation", "kernel_size", "groups")
    )

    @override
    def sizes(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.in_channels, base.out_channels

    @override
    def geometry(self, config: FloralConfig) -> Geometry:
        base = self.get_base_layer()
        channels_in, channels_out = self.channels()
        first = kernel_split(config.conv_split, channels_in, channels_out, base.kernel_size)
        k1 = tuple(size if mine else 1 for size, mine in zip(base.kernel_size, first, strict=True))
        k2 = tuple(1 if mine else size for size, mine in zip(base.kernel_size, first, strict=True))
        return Geometry((channels_in, *k1), channels_out, k2, bias=0 if base.bias is None else base.out_channels)

    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """Channels of the weight, in and out."""

    @override
    def weight_numel(self) -> int:
        return prod(self.channels()) * prod(self.get_base_layer().kernel_size)

    @override
    def costs(self, x: Tensor, adapter_name: str) -> tuple[float, float]:
        """Per position of the image, as measured, where `fused` does not fit.

        Merging pays: the small convolutions move as many activations as the base's. But merged, a frozen base needs
        the gradient of its weight; that is worth it from about C·r = 32 on (3×3, 64 to 128 channels), where the
        arithmetic of the adaptors is a quarter of the layer's.
        """
        if not is_grad_enabled() or self.get_base_layer().weight.requires_grad:
            return 1.0, 0.0
        a, b = self.floral_A[adapter_name], self.floral_B[adapter_name]
        return 4.0 * (a.numel() + b.numel()), float(self.weight_numel())

    @override
    def add(self, x: Tensor, result: Tensor, factors: Factors, mixture: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, factors.a.dtype)
        goes_first = [size == 1 for size in factors.b.shape[3:]]
        hidden = self.first_stage(x, result, factors.first(), goes_first)
        rows = per_example(mixture, len(x), self.name) if len(mixture) > 1 else mixture
        hidden = factors.scaled_hidden(hidden, rows, -1 - len(goes_first))
        bias = factors.mixed_bias(rows)
        single = bias[0] if bias is not None and len(bias) == 1 else None
        result = result + self.second_stage(
            hidden, result, factors.second(), single, [not mine for mine in goes_first]
        )
        if bias is None or single is not None:
            return result
        return result + bias.view(*bias.shape, *[1] * len(goes_first))

    @abstractmethod
    def first_stage(self, x: Tensor, result: Tensor, first: Tensor, axes: Sequence[bool]) -> Tensor:
        """The convolution to R channels (per group), along the kernel's `axes`. `result`: the base layer's output."""

    @abstractmethod
    def second_stage(
        self, hidden: Tensor, result: Tensor, second: Tensor, bias: Tensor | None, axes: Sequence[bool]
    ) -> Tensor:
        """The convolution from there to the output channels, along the other axes."""

    def along_axes(self, values: Sequence[int], axes: Sequence[bool], otherwise: int) -> list[int]:
        """One of the layer's settings along `axes`, and what means nothing along the others."""
        return [value if mine else otherwise for value, mine in zip(values, axes, strict=True)]


class Conv(ConvLayer):
    """Conv1d, Conv2d or Conv3d with C adaptors: A is (C, r, in / groups, *k₁), B is (out, C, r, *k₂).

    All groups of a grouped convolution share A, so that an adaptor is a low-rank change of the weight
    (out, in / groups, *kernel) whatever the number of groups.
    """

    exact_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @override
    def channels(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.in_channels // base.groups, base.out_channels

    @override
    def fused(self, x: Tensor, adapter_name: str, mixture: Tensor) -> Tensor | None:
        base = self.get_base_layer()
        if base.groups > 1 or base.padding_mode != "zeros" or isinstance(base.padding, str):
            return None
        inputs = self.fused_inputs(adapter_name, mixture, x)
        if (
            inputs is None
            or self.compute[adapter_name] == "stacked"
            or x.dim() != inputs[0].dim()
            or not fits(x, inputs[0], inputs[2])
        ):
            return None
        if len(mixture) > 1:
            if is_grad_enabled() or len(mixture) != len(x) or not _pays_by_example(x, *inputs[2:4]):
                return None
            return conv_by_example(x, *inputs, Stage(*map(list, (base.stride, base.padding, base.dilation))))
        goes_first = [size == 1 for size in self.floral_B[adapter_name].shape[3:]]
        stages = tuple(
            Stage(
                self.along_axes(base.stride, axes, 1),
                self.along_axes(base.padding, axes, 0),
                self.along_axes(base.dilation, axes, 1),
            )
            for axes in ([True] * len(goes_first), goes_first, [not mine for mine in goes_first])
        )
        return FusedConv.apply(x, *inputs, stages)

    @override
    def first_stage(self, x: Tensor, result: Tensor, first: Tensor, axes: Sequence[bool]) -> Tensor:
        groups = self.get_base_layer().groups
        return self._stage(x, first.repeat(groups, *[1] * (first.dim() - 1)) if groups > 1 else first, None, axes)

    @override
    def second_stage(
        self, hidden: Tensor, result: Tensor, second: Tensor, bias: Tensor | None, axes: Sequence[bool]
    ) -> Tensor:
        return self._stage(hidden, second, bias, axes)

    def _stage(self, x: Tensor, weight: Tensor, bias: Tensor | None, axes: Sequence[bool]) -> Tensor:
        """One of the two convolutions: the layer's own along `axes`, a kernel of size 1 along the others."""
        base = self.get_base_layer()
        stride, dilation = self.along_axes(base.stride, axes, 1), self.along_axes(base.dilation, axes, 1)
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            # (left, right) of the last axis first, as F.pad wants it
            both = base._reversed_padding_repeated_twice
            pads = [both[2 * i + side] if mine else 0 for i, mine in enumerate(reversed(axes)) for side in (0, 1)]
            x, padding = F.pad(x, pads, mode=base.padding_mode), 0
        elif not isinstance(padding, str):  # "same" and "valid" hold for kernels of size 1 as they stand
            padding = self.along_axes(padding, axes, 0)
        return CONVOLUTIONS[len(axes)](x, weight, bias, stride, padding, dilation, base.groups)

    @override
    def delta_weight(self, factors: Factors, mixture: Tensor) -> Tensor:
        return conv_delta(factors, mixture)

    @override
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.get_base_layer()._conv_forward(x, parameters["weight"], parameters.get("bias"))


def _pays_by_example(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a kernel for each example costs clearly less than the adaptors' own two convolutions of its image.

    As measured: making kernels, memory to be written, takes some four times as long as their multiplications say.
    """
    terms, positions = a.shape[0] * a.shape[1], prod(x.shape[2:])
    kernel = prod(a.shape[2:]) * b.shape[0] * prod(b.shape[3:])
    return 4 * terms * kernel < positions * (a.numel() + b.numel())


class ConvTranspose(ConvLayer):
    """ConvTranspose1d, 2d or 3d with C adaptors: A is (C, r, in, *k₁), B is (out / groups, C, r, *k₂).

    The weight is (in, out / groups, *kernel): here it is B that all groups share.
    """

    exact_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @override
    def channels(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.in_channels, base.out_channels // base.groups

    @override
    def first_stage(self, x: Tensor, result: Tensor, first: Tensor, axes: Sequence[bool]) -> Tensor:
        return self._stage(x, first.transpose(0, 1), None, axes, result)

    @override
    def second_stage(
        self, hidden: Tensor, result: Tensor, second: Tensor, bias: Tensor | None, axes: Sequence[bool]
    ) -> Tensor:
        weight = second.transpose(0, 1).repeat(self.get_base_layer().groups, *[1] * (second.dim() - 1))
        return self._stage(hidden, weight, bias, axes, result)

    def _stage(self, x: Tensor, weight: Tensor, bias: Tensor | None, axes: Sequence[bool], result: Tensor) -> Tensor:
        """One of the two convolutions, to the base result's sizes along `axes`, whatever set them."""
        base = self.get_base_layer()
        stride, dilation = self.along_axes(base.stride, axes, 1), self.along_axes(base.dilation, axes, 1)
        padding = self.along_axes(base.padding, axes, 0)
        sizes, lengths = result.shape[-len(axes) :], x.shape[-len(axes) :]
        given = zip(sizes, lengths, stride, padding, dilation, weight.shape[2:], axes, strict=True)
        extra = [
            size - ((length - 1) * step - 2 * pad + spread * (kernel - 1) + 1) if mine else 0
            for size, length, step, pad, spread, kernel, mine in given
        ]
        return TRANSPOSED[len(axes)](x, weight, bias, stride, padding, extra, base.groups, dilation)

    @override
    def delta_weight(self, factors: Factors, mixture: Tensor) -> Tensor:
        return conv_delta(factors, mixture).transpose(0, 1)

    @override
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        base = self.get_base_layer()
        return TRANSPOSED[len(base.kernel_size)](
            x,
            parameters["weight"],
            parameters.get("bias"),
            base.stride,
            base.padding,
            base.output_padding,
            base.groups,
            base.dilation,
        )
