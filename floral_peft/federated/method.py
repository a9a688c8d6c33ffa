"""A federated method: a statement about groups of parameters, found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import ClassVar

from torch import nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.forward import Forward, LossFunction
from floral_peft.federated.groups import Group
from floral_peft.federated.routing import Gradient, RouterUpdate
from floral_peft.federated.turn import Arrival, Turn, relearn
from floral_peft.tuner import FloralConfig, Role


class Method(ABC):
    """Base class of the federated methods. A subclass names itself and says of each parameter who may see it.

    ```python
    @register_method
    class LocalHead(Method):
        name = "local_head"

        def group(self, name, role):
            return "private" if name.startswith("head.") else "shared"
    ```

    That is a whole method. What else methods differ in has a default that costs nothing: the model that is trained
    (`prepare`, `check`), the loss and the outputs (`forward`), what of it predicts (`deployed`), a pull towards the
    server's tensors (`anchor`), what a client does before its local steps (`arrival`) and before it is evaluated
    (`evaluated`).
    """

    name: ClassVar[str]

    @abstractmethod
    def group(self, name: str, role: Role) -> Group:
        """The group of one trainable parameter (or router).

        Args:
            name: The parameter's name in `model.named_parameters()`; or a running statistic's in
                `model.named_buffers()`, with the base's role or an adaptor's.
            role: What it is in the model.

        Returns:
            "shared", "private", or [`Clustered`] for what is averaged adaptor by adaptor.
        """

    def prepare(self, model: nn.Module, adaptors: FloralConfig) -> nn.Module:
        """Make of a base model the one that the method trains: by default, the base model itself.

        Args:
            model: The base model. It may be changed in place.
            adaptors: The adaptors to put into it, for a method that has some.
        """
        return model

    def check(self, roles: Mapping[str, Role]) -> None:  # noqa: B027 (most methods take any model)
        """Refuse a model that the method cannot train.

        Args:
            roles: The role of each of the model's parameters.

        Raises:
            ValueError: The model lacks what the method needs; the message says what to do.
        """

    def forward(self, model: nn.Module, loss_fn: LossFunction | None) -> Forward:
        """What calls the model on a batch: its loss is what local steps minimise, its outputs are evaluated.

        Args:
            model: The model.
            loss_fn: The loss that the user gave, if any.
        """
        return Forward(model, loss_fn)

    def deployed(self, model: nn.Module) -> nn.Module:
        """The part of the model with which a client predicts: by default, all of it.

        Args:
            model: The model that the method trains.
        """
        return model

    def anchor(self, name: str) -> str | None:
        """The public tensor towards which local steps pull a parameter: λ/2 ‖w − anchor‖² is added to its loss.

        λ is `proximal_weight`, and the anchor what the server sent. The losses that are told are without it.

        Args:
            name: The parameter.

        Returns:
            The tensor's name; None: the parameter is not pulled.
        """
        return None

    def router_update(self, args: FederatedArguments, sampled: float) -> RouterUpdate:
        """How clients find their routers, unless the method does so on `arrival`: by default, in local steps.

        Args:
            args: The run's settings.
            sampled: The share of the clients that take part in a round.
        """
        return Gradient(args, sampled)

    def arrival(self, args: FederatedArguments) -> Arrival | None:
        """What a client does with its examples before its local steps, and before it is evaluated.

        It finds the client's private tensors; where there is an arrival, local steps leave the router alone, and so
        does [`router_update`][Method.router_update].

        Args:
            args: The run's settings.

        Returns:
            A function of the client's [`Turn`]; None: nothing, the client goes on with what it kept.
        """
        return relearn if args.stateless else None

    def evaluated(self, turn: Turn) -> AbstractContextManager[None]:
        """Within, the model, which holds a client's tensors, is what is evaluated on its test examples.

        Args:
            turn: The client's turn.
        """
        return nullcontext()


_METHODS: dict[str, type[Method]] = {}


def register_method(kind: type[Method]) -> type[Method]:
    """Class decorator: make a method available to [`FederatedTrainer`] under its `name`.

    Raises:
        ValueError: Another class has the name.
        TypeError: It has none.
    """
    _check_named(kind)
    if _METHODS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f'a method called "{kind.name}" is registered already: {_METHODS[kind.name].__qualname__}.')
    return kind


def get_method(method: str | Method) -> Method:
    """The method of that name; a `Method` is returned as it is.

    Raises:
        ValueError: No method has the name.
        TypeError: `method` is neither a name nor a `Method` that has one.
    """
    if isinstance(method, Method):
        _check_named(method)
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Method instance, got {method!r}.")
    if method not in _METHODS:
        near = get_close_matches(method, _METHODS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'method="{method}" must be one of {", ".join(method_names())}.{hint}')
    return _METHODS[method]()


def _check_named(method: type[Method] | Method) -> None:
    if not isinstance(getattr(method, "name", None), str):
        kind = type(method) if isinstance(method, Method) else method
        raise TypeError(f'{kind.__qualname__} has no name: give the class one, name = "...".')


def method_names() -> list[str]:
    """The names of all registered methods, sorted."""
    return sorted(_METHODS)
