"""Linear layers: nn.Linear, quantised or not, and transformers' Conv1D."""

from __future__ import annotations

from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from floral_peft.tuner.compute import Factors, linear_delta, per_example
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.fused import MergedLinear, StackedLinear, fits, stacked_linear
from floral_peft.tuner.layers.factored import FactoredLayer, Geometry
from floral_peft.tuner.router import Router


class Linear(FactoredLayer):
    """A Linear layer with C adaptors: A is (C, r, in), B is (out, C, r)."""

    exact_types = (nn.Linear, Conv1D)

    def __init__(self, base_layer: nn.Module, router: Router, name: str) -> None:
        super().__init__(base_layer, router, name)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # its weight is (in, out)

    @override
    def geometry(self, config: FloralConfig) -> Geometry:
        bias = getattr(self.get_base_layer(), "bias", None)
        return Geometry((self.in_features,), self.out_features, bias=0 if bias is None else self.out_features)

    @override
    def weight_numel(self) -> int:
        return self.in_features * self.out_features

    @override
    def fused(self, x: Tensor, adapter_name: str, mixture: Tensor) -> Tensor | None:
        inputs = self.fused_inputs(adapter_name, mixture, x)
        if inputs is None or x.dim() < 2 or not fits(x, inputs[0], inputs[2]):
            return None
        if inputs[5].requires_grad and not (inputs[0].requires_grad or inputs[2].requires_grad):
            return None  # the router trains alone: separate operations need not keep x
        examples, compute = len(mixture), self.compute[adapter_name]
        if examples > 1 and (x.shape[0] % examples or x.numel() == 0):
            return None
        if compute == "auto" and examples == 1:
            stacked, merged = _costs(x, self.out_features, inputs[2], trained=inputs[0].requires_grad)
            compute = "merged" if merged < stacked else "stacked"
        if self.fan_in_fan_out:
            inputs = (inputs[0].T, *inputs[1:])
        if compute == "merged" and examples == 1:
            return MergedLinear.apply(x, *inputs)
        return StackedLinear.apply(x, *inputs) if is_grad_enabled() else stacked_linear(x, *inputs)[0]

    @override
    def add(self, x: Tensor, result: Tensor, factors: Factors, mixture: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, factors.a.dtype)
        hidden = F.linear(x, factors.first())
        bias = factors.mixed_bias(mixture)
        if len(mixture) > 1:
            hidden = factors.scaled_hidden(hidden, per_example(mixture, len(x), self.name), -1)
            result = result + F.linear(hidden, factors.second())
            return result if bias is None else result + _per_row(bias, result, self.name)
        if x.numel() > self.in_features * self.out_features:  # whichever has fewer numbers to scale
            second = factors.scaled_second(mixture)
        else:
            hidden, second = factors.scaled_hidden(hidden, mixture, -1), factors.second()
        return result + F.linear(hidden, second, None if bias is None else bias.view(-1))

    @override
    def delta_weight(self, factors: Factors, mixture: Tensor) -> Tensor:
        delta = linear_delta(factors, mixture)
        return delta.T if self.fan_in_fan_out else delta

    @override
    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        weight = parameters["weight"]
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, parameters.get("bias"))

    @override
    def costs(self, x: Tensor, adapter_name: str) -> tuple[float, float]:
        trained = self.get_base_layer().weight.requires_grad
        return _costs(x, self.out_features, self.floral_A[adapter_name], trained=trained)

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.floral_bias  # PEFT converts weights only


def _costs(x: Tensor, m: int, a: Tensor, *, trained: bool) -> tuple[float, float]:
    """Of a forward pass, and with gradients also of the backward one, for which a weight is merged again.

    A frozen base has no product for its own weight's gradient; merged, it needs one: the factors' come from it.
    """
    c, r, n = a.shape
    rows, terms = x.numel() // n, c * r
    stacked, merged = rows * terms * (m + n), terms * m * n
    if is_grad_enabled():
        stacked, merged = 3 * stacked, 4 * merged + (0 if trained else rows * m * n)
    return stacked, merged


def _per_row(bias: Tensor, result: Tensor, layer: str) -> Tensor:
    bias = per_example(bias, len(result), layer)
    return bias.view(len(bias), *[1] * (result.dim() - 2), -1)
