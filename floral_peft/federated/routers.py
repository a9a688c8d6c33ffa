"""The clients' routers in a model: one at a time while the model visits clients, all of them by name otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.federated.seeding import ClientId
from floral_peft.tuner import PureModels, parameter_roles
from floral_peft.tuner.router import RouterSettings


#: Logit of the adaptors that a one-hot router does not use, at temperature 1: its softmax is 0 exactly.
_NEVER = -1e4


class _Rows:
    """The rows of a router table that belong to clients.

    Args:
        names: The clients; a range where rows have no names.
        table: Their logits, (clients, L, C).
    """

    def __init__(self, names: Sequence[ClientId], table: Tensor) -> None:
        self.names = names
        self.table = table
        self._row = None if isinstance(names, range) else {name: row for row, name in enumerate(names)}

    def row(self, client_id: ClientId) -> int | None:
        """A client's row, or None for a client without any."""
        if self._row is not None:
            return self._row.get(client_id)
        return client_id if isinstance(client_id, int) and 0 <= client_id < len(self.names) else None


class Routers:
    """The router table of a model with FLORAL adaptors.

    Args:
        model: The model.
        name: The name of the table among the model's parameters.
        fixed: Client id → the cluster at which its router is held one-hot (optimal routing); None: they are learned.
        given: Routers are found on the client's arrival; local steps leave them alone.
        settings: How mixtures are computed while the model visits clients, from how its config says.

    Raises:
        ValueError: A cluster has no adaptor.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        fixed: Mapping[ClientId, int] | None = None,
        given: bool = False,
        settings: Callable[[RouterSettings], RouterSettings] = lambda settings: settings,
    ) -> None:
        self._model = model
        self._settings = settings
        self.name = name
        self.shape = self._table().shape[1:]
        self._trains = self._table().requires_grad
        self._fixed = fixed
        self._steps = self._trains and fixed is None and not given  # whether local steps train them
        self._outside: Tensor | None = None  # the table that the model held before it was visited
        self.restart()
        for client_id, cluster in (fixed or {}).items():
            if cluster >= self.shape[-1]:
                raise ValueError(
                    f"optimal_routing=True: client {client_id!r} is of cluster {cluster}, but the model has only "
                    f"{self.shape[-1]} adaptors (0..{self.shape[-1] - 1}): give FloralConfig a larger num_adaptors."
                )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        clusters: Mapping[ClientId, int] | None,
        optimal_routing: bool = False,
        stateless: bool = False,
        given: bool = False,
        settings: Callable[[RouterSettings], RouterSettings] = lambda settings: settings,
    ) -> Routers | None:
        """The routers of a model; None for a model without any.

        Args:
            model: The model.
            clusters: The clients' true clusters, where they are known.
            optimal_routing: Whether to fix each router one-hot at its client's true cluster.
            stateless: Whether clients keep no router.
            given: Whether something else than local steps finds the routers.
            settings: How mixtures are computed while the model visits clients, from how its config says.

        Raises:
            ValueError: The model has several active adapters, or one of the two is asked for where it cannot be.
        """
        names = [name for name, role in parameter_roles(model).items() if role.kind == "router"]
        if len(names) > 1:
            raise ValueError(f"the model has {len(names)} active FLORAL adapters; choose one with model.set_adapter.")
        if not names:
            for name, asked in (("optimal_routing", optimal_routing), ("stateless", stateless)):
                if asked:
                    raise ValueError(f"{name}=True needs a model with FLORAL adaptors: this one has no router.")
            return None
        if optimal_routing and clusters is None:
            raise ValueError("optimal_routing=True needs the true clusters: FederatedDataset(..., clusters={...}).")
        return cls(model, names[0], clusters if optimal_routing else None, given, settings)

    def restart(self, count: int | None = None) -> None:
        """The model's table is over the first of some adaptors.

        Args:
            count: How many adaptors there may be at once from now on; by default those.
        """
        self.shape = self._table().shape[1:]
        self._shown = list(range(self.shape[-1]))
        self._count = self.shape[-1] if count is None else count
        self._start = _Rows(range(0), torch.zeros(0, *self.shape))

    def show(self, adaptors: Sequence[int]) -> None:
        """The model's table is now over other adaptors, by the numbers that they had at the last `restart`."""
        if self._outside is not None:
            columns = [self._shown.index(number) if number in self._shown else -1 for number in adaptors]
            padded = nn.functional.pad(self._outside, (0, 1))  # adaptors that come back were lost: logit 0
            self._outside = padded[..., columns]
        self._shown = list(adaptors)
        self.shape = torch.Size([self.shape[0], len(self._shown)])

    def remember(self) -> None:
        """Take the routers that the model holds as those with which their clients start, unless they are fixed.

        A row belongs to the client of its name or, where rows have no names, of its number.
        """
        if self._fixed is None:
            held = self._own_rows()
            table = torch.zeros(*held.table.shape[:2], self._count)
            table[..., self._shown] = held.table
            self._start = _Rows(held.names, table)

    def initial(self, client_id: ClientId) -> Tensor:
        """The logits of a client that has not trained, (1, L, C): fixed, given with the model, or zero (uniform)."""
        if self._fixed is not None:
            return self._one_hot([self._fixed[client_id]])
        row = self._start.row(client_id)
        return torch.zeros(1, *self.shape) if row is None else self._start.table[row : row + 1, :, self._shown]

    @contextmanager
    def visited(self) -> Iterator[None]:
        """Within, the model holds a single router, that of the client at hand; afterwards, those that it held."""
        config, router = self._model.active_peft_config, self._model.router
        self._outside, selected = self._table().detach().clone(), router.client
        count, names = config.num_clients, config.client_names
        adapter = self.name.rpartition(".")[2]
        settings = router.settings[adapter]
        visiting = self._settings(settings)
        # Noise changes no fixed router's mixture, but whoever draws after it draws something else.
        router.settings[adapter] = visiting if self._fixed is None else replace(visiting, noise=0.0)
        self._hold_one()
        try:
            yield
        finally:
            shown = router.settings[adapter]
            router.settings[adapter] = replace(shown, noise=settings.noise, straight_through=settings.straight_through)
            self._model.set_routers(self._outside, names)
            self._outside = None
            config.num_clients = count
            router.select(selected)
            self._table().requires_grad_(self._trains)

    def install(self, ids: Sequence[ClientId], trained: Mapping[ClientId, Tensor]) -> None:
        """Give clients their routers in the model's table, beside those of other clients that it holds.

        Its cost is a row of L·C numbers for each client, and for those that have trained the work of a copy. Where
        clients are 0, 1, ... and the model's rows have no names either, they get none.

        Args:
            ids: All clients. Those that have not trained get the router with which they start.
            trained: The logits of each client that has trained, (1, L, C).
        """
        held = self._own_rows()
        if isinstance(held.names, range) and isinstance(ids, range):
            self._model.set_routers(self._routers_of(range(max(len(held.names), len(ids))), held, trained))
        else:
            names = [*held.names, *(client_id for client_id in ids if held.row(client_id) is None)]
            numbered = isinstance(held.names, range) and len(names) == len(held.names)
            self._model.set_routers(self._routers_of(names, held, trained), None if numbered else names)
        self._table().requires_grad_(self._trains)

    def mixtures(self, ids: Sequence[ClientId], trained: Mapping[ClientId, Tensor]) -> Tensor:
        """All clients' mixtures at once, (clients, C): means over layers where each has its own router.

        The model must be [`visited`][Routers.visited].

        Args:
            ids: The clients.
            trained: As in `install`.
        """
        start = _Rows(self._start.names, self._start.table[..., self._shown])
        self._model.set_routers(self._routers_of(ids, start, trained))
        try:
            mixtures: Tensor = self._model.mixture(torch.arange(len(ids)))
        finally:
            self._hold_one()
        return mixtures.reshape(len(ids), -1, mixtures.shape[-1]).mean(dim=1).cpu()

    def _routers_of(self, names: Sequence[ClientId], held: _Rows, trained: Mapping[ClientId, Tensor]) -> Tensor:
        """The logits (clients, L, C) of some clients: trained, else fixed, else held, else zero."""
        table = torch.zeros(len(names), *self.shape)
        rows = [(row, held.row(name)) for row, name in enumerate(names)] if len(held.names) else []
        known = [(row, other) for row, other in rows if other is not None]
        if known:
            chosen, source = torch.tensor(known).T
            table[chosen] = held.table[source]
        fixed = self._fixed or {}
        chosen = torch.tensor([row for row, name in enumerate(names) if name in fixed], dtype=torch.int64)
        if len(chosen):
            table[chosen] = self._one_hot([fixed[name] for name in names if name in fixed])
        chosen = torch.tensor([row for row, name in enumerate(names) if name in trained], dtype=torch.int64)
        if len(chosen):
            table[chosen] = torch.cat([trained[name] for name in names if name in trained]).to(table)
        return table

    def _own_rows(self) -> _Rows:
        """The rows of the model's table that belong to a client. A single router is nobody's."""
        config, table = self._model.active_peft_config, self._table().detach()
        if config.num_clients is None and config.client_names is None:
            return _Rows(range(0), torch.zeros(0, *self.shape))
        names = range(len(table)) if config.client_names is None else list(config.client_names)
        return _Rows(names, table.to("cpu", torch.float32, copy=True))

    def _hold_one(self) -> None:
        """Make the model's table a single router."""
        self._model.set_routers(torch.zeros(1, *self.shape))
        self._table().requires_grad_(self._steps)

    def pure(self) -> Tensor:
        """For each adaptor the router that uses it alone, (C, 1, L, C)."""
        return self._one_hot(range(self.shape[-1])).unsqueeze(1)

    @cached_property
    def pure_models(self) -> PureModels:
        """The model under each of its adaptors alone."""
        return PureModels(self._model)

    @property
    def base_trains(self) -> bool:
        """Whether the base model trains beside the adaptors."""
        return bool(self._model.active_peft_config.train_base)

    @property
    def top_k(self) -> int | None:
        """How many adaptors a mixture has at most; None: all."""
        found: int | None = self._model.active_peft_config.router_top_k
        return found

    def mixture_of(self, logits: Tensor) -> Tensor:
        """π of a router (1, 1, C), shape (C,)."""
        return torch.softmax(logits[0, 0] / self._model.active_peft_config.router_temperature, dim=-1)

    def of_mixture(self, mixture: Tensor) -> Tensor:
        """The router (1, L, C) whose π is a mixture (C,)."""
        logits = mixture.log().clamp(min=_NEVER) * self._model.active_peft_config.router_temperature
        return logits.to("cpu", torch.float32).expand(1, *self.shape).clone()

    def less(self, logits: Tensor, losses: Tensor) -> Tensor:
        """The logits of π̂_c ∝ π_c exp(−loss_c).

        Args:
            logits: Those of π, (1, L, C).
            losses: Shape (C,).
        """
        return logits - self._model.active_peft_config.router_temperature * losses.to(logits)

    def without_traces(self, logits: Tensor, least: float) -> Tensor:
        """The logits of a mixture without the adaptors that it holds in traces only: their weights become 0.

        Args:
            logits: Those of π, (1, L, C).
            least: The least weight that stays, in units of the largest one in its row; above 0.
        """
        temperature = self._model.active_peft_config.router_temperature
        most = logits.amax(dim=-1, keepdim=True)
        return torch.where(logits < most + temperature * math.log(least), most + _NEVER * temperature, logits)

    def _table(self) -> nn.Parameter:
        return dict(self._model.named_parameters())[self.name]

    def _one_hot(self, clusters: Sequence[int]) -> Tensor:
        """Fixed routers, (clients, L, C): their softmax is 1 at the client's cluster."""
        temperature = self._model.active_peft_config.router_temperature
        logits = torch.full((len(clusters), *self.shape), _NEVER * temperature)
        return logits.scatter(-1, torch.tensor(clusters).view(-1, 1, 1).expand(-1, self.shape[0], 1), 0.0)
