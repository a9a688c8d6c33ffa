"""Norms with running statistics: which of them keep the ones they came with."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from floral_peft.tuner import parameter_roles, private_buffers


def resting_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The frozen norms of a model by name: they normalise by their running statistics while the rest trains.

    A norm is frozen if its own scale and shift do not train or, where it has none, if nothing of the base does. Its
    statistics belong to the pretrained weights around it, and a client's small batches would only blur them. Those
    adapted with `adapt_norms="reparametrized"` track their client's statistics in any case.
    """
    private = private_buffers(model)
    parameters = dict(model.named_parameters())
    trains = any(role.kind == "base" and parameters[n].requires_grad for n, role in parameter_roles(model).items())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase) or module.running_mean is None or f"{name}.running_mean" in private:
            continue
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if not (any(own) if own else trains):
            found[name] = module
    return found
