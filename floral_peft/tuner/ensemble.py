"""C full models in place of C adaptors: their outputs are mixed by a router per client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.tuner.clients import Clients
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.router import Router, RouterSettings


class Ensemble(Clients, nn.Module):
    """Models of one kind under one router: the output is Σ_c π_c f_c(x), where π is the client's mixture.

    It is called as one of its members is, and takes `client_ids` too. Clients are chosen as in a [`FloralModel`]. A
    member that the client at hand does not use, π_c = 0, is not run.

    Args:
        members: The C models. They return a tensor, or a mapping that holds `logits`.
        config: Says how the router mixes; the rest of it is not used. The members' number stands for its own.
    """

    def __init__(self, members: Sequence[nn.Module], config: FloralConfig | None = None) -> None:
        super().__init__()
        config = replace(config or FloralConfig(), num_adaptors=len(members), router_per_layer=False)
        self.members = nn.ModuleList(members)
        self.floral_router = Router()
        self.peft_config = {"default": config}
        self.active_adapters = ["default"]
        first = next(members[0].parameters())
        self.floral_router.add_adapter("default", RouterSettings.of(config), 1, first.device, torch.float32)
        self.floral_router.set_active(self.active_adapters)
        self.floral_router.set_requires_grad(self.active_adapters, True)
        self._alone: int | None = None
        self.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.register_forward_hook(self._after_forward, always_call=True)

    @property
    def active_peft_config(self) -> Any:
        """The config of the router."""
        return self.peft_config["default"]

    def get_base_model(self) -> nn.Module:
        """The member whose `forward` names the inputs."""
        return self.members[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """The mixture of the members' outputs: a tensor, or `{"logits": ...}` where they return mappings."""
        mixture = self.router.mixture("default", 0)  # (1 or examples, C)
        used = _used(mixture) if self._alone is None else [self._alone]
        outputs = {adaptor: self.members[adaptor](*args, **kwargs) for adaptor in used}
        if all(isinstance(output, Mapping) for output in outputs.values()):
            return {"logits": mixed({c: output["logits"] for c, output in outputs.items()}, mixture)}
        return mixed(outputs, mixture)

    @contextmanager
    def alone(self, member: int) -> Iterator[None]:
        """Within, no other member is run: none of them may have a weight, which torch.func hides.

        Args:
            member: Its number.
        """
        self._alone = member
        try:
            yield
        finally:
            self._alone = None


def mixed(outputs: Mapping[int, Tensor], mixture: Tensor) -> Tensor:
    """Σ_c π_c y_c.

    Args:
        outputs: c → y_c, (examples, ...).
        mixture: π, (1, C), or (examples, C).
    """
    terms = [mixture[:, c].to(y.dtype).view(-1, *[1] * (y.dim() - 1)) * y for c, y in outputs.items()]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]


def _used(mixture: Tensor) -> Sequence[int]:
    """The adaptors that have a weight, or need a gradient of theirs."""
    everyone = range(mixture.shape[-1])
    # Within torch.func and torch.compile the weights are not known yet.
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(mixture)
    if mixture.requires_grad or traced:
        return everyone
    used = (mixture != 0).any(dim=0).tolist()
    return [adaptor for adaptor in everyone if used[adaptor]]


def reinitialized(model: nn.Module) -> nn.Module:
    """A copy of a model that starts anew: every module's `reset_parameters` is called.

    Raises:
        ValueError: A module has parameters of its own but no such method.
    """
    fresh = deepcopy(model)
    for name, module in fresh.named_modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is not None:
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters but no reset_parameters(), so it "
                "cannot start anew: give it one, or make an Ensemble of models of your own."
            )
    return fresh
