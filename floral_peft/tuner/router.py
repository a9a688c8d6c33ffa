"""The router: one table of logits per adapter name, and which of its rows the next forward pass uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.nearest import did_you_mean
from floral_peft.tuner.recompute import Recomputation, Seen


Client = int | str | Tensor | Sequence[int | str]


@dataclass(eq=False)
class Selection:
    """What one forward pass asks of the router: a client, or one client per example, and its noise.

    Attributes:
        client: rows of the router's table, 1-D. One row for the whole batch, or one per example. (A tensor, not an
            int: under torch.compile an int would mean one graph per client.)
        noise: adapter name → noise added to the selected logits, (n, L, C). One draw serves all layers of a pass.
    """

    client: Tensor
    noise: dict[str, Tensor] = field(default_factory=dict)


class Router(nn.Module):
    """Client logits θ, from which layers take their mixture π = softmax(θ) (FLoRAL, section 3).

    Attributes:
        logits: adapter name → table of shape (K, L, C): K clients (one row if the adapter has a single router), L = 1,
            or one per target layer with `router_per_layer`, C adaptors.
        chosen: whether somebody has chosen among several clients; else the first is used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.ParameterDict()
        self.settings: dict[str, RouterSettings] = {}
        self.active_adapters: list[str] = []
        self.narrowest = ""
        self.register_buffer("client", torch.zeros(1, dtype=torch.long), persistent=False)
        self.selection = Selection(self.client)
        self.recomputation = Recomputation[Selection]()
        self._several = self.chosen = False
        self._pass: dict[Any, Tensor] | None = None  # what a forward pass has computed so far
        self._outer: list[tuple[dict[Any, Tensor] | None, Selection, Seen]] = []  # passes around the one at hand

    # The table

    def add_adapter(
        self, adapter_name: str, settings: RouterSettings, layers: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """A fresh table for an adapter: all logits 0, the uniform mixture. `layers` is the number of target layers."""
        rows = settings.num_clients or 1
        shape = (rows, layers if settings.per_layer else 1, settings.num_adaptors)
        self.settings[adapter_name] = settings
        self.logits[adapter_name] = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.select(self.client.to(device))

    def set_active(self, adapter_names: Sequence[str]) -> None:
        """The adapters that take part in a forward pass. A client that their tables lack is not selected any more."""
        self.active_adapters = [name for name in adapter_names if name in self.logits]
        # a client must be in all tables but those of one row, which serve everybody
        tables = [name for name in self.active_adapters if len(self.logits[name]) > 1] or self.active_adapters
        self.narrowest = min(tables, key=lambda name: len(self.logits[name]), default="")
        self._several = any(len(table) > 1 for table in self.logits.values())
        if self.narrowest and int(self.client.max()) >= len(self.logits[self.narrowest]):
            self.select(self.client.new_zeros(1))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter's table."""
        del self.logits[adapter_name]
        del self.settings[adapter_name]

    def set_table(self, adapter_name: str, logits: Tensor, names: Sequence[str | int] | None) -> None:
        """Replace an adapter's table by one of any number of rows, and select row 0.

        Args:
            adapter_name: the adapter.
            logits: shape (K, L, C), with the L and C that the adapter has.
            names: names of the K rows, or None.
        """
        old = self.logits[adapter_name]
        if logits.dim() != 3 or logits.shape[1:] != old.shape[1:] or len(logits) == 0:
            raise ValueError(
                f"Routers for adapter {adapter_name!r} must have the shape (clients, {old.shape[1]}, {old.shape[2]}), "
                f"got {tuple(logits.shape)}."
            )
        if names is not None and len(names) != len(logits):
            raise ValueError(f"{len(names)} client names for {len(logits)} routers of adapter {adapter_name!r}.")
        table = logits.detach().to(device=old.device, dtype=old.dtype, copy=True)
        self.logits[adapter_name] = nn.Parameter(table, requires_grad=old.requires_grad)
        self.settings[adapter_name].name_rows(names)
        self.set_active(self.active_adapters)
        self.select(self.client.new_zeros(1))
        self.chosen = False

    def keep_adaptors(self, adapter_name: str, kept: Tensor) -> None:
        """Forget the logits of all but some adaptors: each mixture is that of those left, again with sum 1.

        Args:
            adapter_name: the adapter.
            kept: the adaptors' numbers, int64.
        """
        old, settings = self.logits[adapter_name], self.settings[adapter_name]
        values = old.detach().index_select(-1, kept.to(old.device))
        self.logits[adapter_name] = nn.Parameter(values, requires_grad=False)
        self.set_requires_grad([adapter_name], old.requires_grad)
        settings.num_adaptors = len(kept)
        if settings.top_k is not None:
            settings.top_k = min(settings.top_k, len(kept))
        self.select(self.client)

    def upcast(self, adapter_name: str) -> None:
        """Keep an adapter's table in float32 from now on, as PEFT does with adapter weights in half precision."""
        table = self.logits[adapter_name]
        if table.dtype in (torch.float16, torch.bfloat16):
            self.logits[adapter_name] = nn.Parameter(table.detach().float(), requires_grad=table.requires_grad)

    def set_requires_grad(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """With one adaptor a softmax cannot move: such a router stays frozen."""
        for name in adapter_names:
            if name in self.logits:
                self.logits[name].requires_grad_(requires_grad and self.logits[name].shape[-1] > 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        self.selection = Selection(self.client)  # the buffer may have moved to another device
        return self

    # The selection

    def rows(self, client: Client) -> Tensor:
        """Rows of the table for a client or one client per example, checked against the active adapters' tables.

        Args:
            client: a client's name or row, or a sequence of them; a tensor holds rows.

        Returns:
            1-D integer tensor.

        Raises:
            ValueError: unknown name, or a row outside the table.
            TypeError: neither a name nor a row.
        """
        if not self.active_adapters:
            raise ValueError("No FLORAL adapter is active: there is no client to choose. Call `set_adapter` first.")
        table = self.narrowest
        count = len(self.logits[table])
        if isinstance(client, Tensor):
            if client.dtype.is_floating_point or client.dtype == torch.bool or client.dim() > 1:
                raise TypeError(
                    "client_ids must be a 1-D integer tensor of rows of the router's table, "
                    f"got shape {tuple(client.shape)} of {client.dtype}."
                )
            rows = client.reshape(-1).to(device=self.client.device, dtype=torch.long)
        else:
            clients = client if isinstance(client, Sequence) and not isinstance(client, str) else [client]
            numbers = [self._row(item, table) for item in clients]
            rows = torch.tensor(numbers, dtype=torch.long, device=self.client.device)
        if rows.numel() == 0:
            raise ValueError("No client given: expected a client, or one client per example.")
        if not torch.compiler.is_compiling() and rows.device.type != "meta":
            outside = rows[(rows < 0) | (rows >= count)]
            if outside.numel():
                raise ValueError(
                    f"Client {int(outside[0])} is out of range: the router of adapter {table!r} has {count} "
                    f"row{'s' if count > 1 else ''} (num_clients={self.settings[table].num_clients})."
                )
        return rows

    def _row(self, client: Any, table: str) -> int:
        row = self.settings[table].row_of(client, table)
        for name in self.active_adapters:
            if name == table or len(self.logits[name]) == 1:
                continue
            if (other := self.settings[name].row_of(client, name)) != row:
                raise ValueError(
                    f"Client {client!r} is row {row} of adapter {table!r} but row {other} of adapter {name!r}. Give "
                    "both adapters their clients in one order, or make one of them active at a time."
                )
        return row

    def select(self, rows: Tensor) -> None:
        """Use these rows (see `rows`) from now on."""
        self.client = rows
        self.selection = Selection(self.client)
        self._pass = None  # of a pass that was interrupted, say
        self._outer.clear()

    def begin_forward(self, rows: Tensor | None) -> None:
        """A forward pass of the model starts: with its own rows, if any, and fresh noise while training."""
        self._outer.append((self._pass, self.selection, self.recomputation.seen))
        self._pass = {}
        self.recomputation.begin()
        client = self.client if rows is None else rows
        noise = {}
        for name in self.active_adapters if self.training else ():
            if self.settings[name].noise > 0:
                table = self.logits[name]
                shape = (len(client) if len(table) > 1 else 1, *table.shape[1:])
                noise[name] = torch.rand(shape, device=table.device, dtype=table.dtype) * self.settings[name].noise
        if rows is not None or noise or self.selection.client is not self.client or self.selection.noise:
            self.selection = Selection(client, noise)

    def end_forward(self, output: Any) -> None:
        """A forward pass ends: remember its selection for a later recomputation, and return to what was before."""
        if not torch.compiler.is_compiling() and (self._several or self.selection.noise):
            self.recomputation.remember(output, self.selection)  # else every pass has the same state
        if self._outer:
            self._pass, self.selection, self.recomputation.seen = self._outer.pop()
        else:  # the client was chosen anew within the pass
            self._pass, self.selection = None, Selection(self.client)

    # The mixture

    def mixture(self, adapter_name: str, slot: int | None, selection: Selection | None = None) -> Tensor:
        """π of the selected rows, as a function of the logits.

        Args:
            adapter_name: the adapter.
            slot: which of the L routers; None: all of them.
            selection: default: that of the pass this call belongs to, be it a forward or a recomputation.

        Returns:
            shape (n, C), or (n, L, C) without a slot; n is 1, or the number of examples. Rows sum to 1.
        """
        if selection is not None or self._pass is None or torch.compiler.is_compiling():
            if selection is None:
                compiling = torch.compiler.is_compiling()
                selection = self.selection if compiling else self.recomputation.current(self.selection)
            return _of_slot(self._softmax(adapter_name, selection), slot)
        # all layers of a pass share one softmax, unless they may have to run again one by one
        self.recomputation.note()
        if self.recomputation.checkpointed:
            return _of_slot(self._softmax(adapter_name, self.selection), slot)
        known = self._pass.get((adapter_name, slot))
        if known is None:
            whole = self._pass.get((adapter_name, None))
            if whole is None:
                whole = self._pass[adapter_name, None] = self._softmax(adapter_name, self.selection)
            known = self._pass[adapter_name, slot] = _of_slot(whole, slot)
        return known

    def weights(self, mixture: Tensor, scale: float, like: Tensor) -> Tensor:
        """As `like` is: s·π from what `mixture` gave, (C,) for one client, else (n, C): computed once a pass, too."""
        if self._pass is None or self.recomputation.checkpointed or torch.compiler.is_compiling():
            return _scaled(mixture, scale, like)
        key = (id(mixture), scale, like.dtype, like.device)  # while the pass lasts, so does the mixture
        known = self._pass.get(key)
        if known is None:
            known = self._pass[key] = _scaled(mixture, scale, like)
        return known

    def _softmax(self, adapter_name: str, selection: Selection) -> Tensor:
        """(n, L, C) of all layers' routers, in float32 at least."""
        settings = self.settings[adapter_name]
        logits = self.logits[adapter_name]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if len(logits) > 1:
            logits = logits.index_select(0, selection.client)
        table = logits
        noise = selection.noise.get(adapter_name)
        if noise is not None:
            logits = logits + noise
        if settings.top_k is not None and settings.top_k < logits.shape[-1]:
            kept = logits.topk(settings.top_k, dim=-1).indices
            logits = logits + torch.full_like(logits, -torch.inf).scatter(-1, kept, 0.0)
        if settings.temperature != 1:
            logits = logits / settings.temperature
        pi = torch.softmax(logits, dim=-1)
        if not settings.straight_through:
            return pi
        centered = table - table.mean(dim=-1, keepdim=True)  # a common shift of all logits changes nothing
        return pi.detach() + (centered - centered.detach())

    @torch.no_grad()
    def read(self, adapter_name: str, rows: Tensor) -> Tensor:
        """π of these rows without noise, (n, L, C)."""
        pi = self.mixture(adapter_name, None, Selection(rows))
        return pi.expand(len(rows), -1, -1)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this by name after a load with `low_cpu_mem_usage`, which left new parameters on meta."""
        if adapter_name not in self.logits:
            return
        table = self.logits[adapter_name]
        device = device or self.client.device
        empty = table.device.type == "meta"  # the checkpoint holds no router
        values = torch.zeros(table.shape, device=device, dtype=table.dtype) if empty else table.detach().to(device)
        self.logits[adapter_name] = nn.Parameter(values, requires_grad=table.requires_grad)


def _of_slot(pi: Tensor, slot: int | None) -> Tensor:
    """One layer's (n, C) of (n, L, C); all of it without a slot."""
    if slot is None:
        return pi
    return pi.view(-1, pi.shape[-1]) if pi.shape[1] == 1 else pi[:, slot]


def _scaled(mixture: Tensor, scale: float, like: Tensor) -> Tensor:
    weights = (mixture.view(-1) if len(mixture) == 1 else mixture).to(like)
    return weights if scale == 1 else weights * scale


@dataclass
class RouterSettings:
    """The router's part of a FloralConfig.

    Attributes:
        straight_through: The logits' gradient is ∂L/∂π, less its mean, as if the softmax were linear.
        row_by_name: Client's name → its row; None where rows have no names.
    """

    num_adaptors: int
    num_clients: int | None
    temperature: float
    noise: float
    top_k: int | None
    per_layer: bool
    straight_through: bool = False
    row_by_name: dict[str | int, int] | None = None

    @classmethod
    def of(cls, config: Any) -> RouterSettings:
        """The part of a FloralConfig."""
        settings = cls(
            num_adaptors=config.num_adaptors,
            num_clients=config.num_clients,
            temperature=config.router_temperature,
            noise=config.router_noise,
            top_k=config.router_top_k,
            per_layer=config.router_per_layer,
        )
        settings.name_rows(config.client_names)
        return settings

    @property
    def shape_of_pi(self) -> tuple[float, int | None]:
        """What π depends on beside the logits."""
        return self.temperature, self.top_k

    def name_rows(self, names: Sequence[str | int] | None) -> None:
        """Call the table's rows by these names, in order; None: by their numbers."""
        self.row_by_name = None if names is None else {name: row for row, name in enumerate(names)}

    def row_of(self, client: Any, adapter_name: str) -> int:
        """Row of a client given by name, or by number where the rows have no names."""
        if isinstance(client, bool) or not isinstance(client, (str, Integral)):
            raise TypeError(f"A client is a name (str) or a row (int), got {client!r}.")
        if self.row_by_name is None:
            if isinstance(client, str):
                raise ValueError(
                    f"Client {client!r} is unknown: the rows of adapter {adapter_name!r} have no names. "
                    "Use a row number, or give FloralConfig(client_names=...)."
                )
            return int(client)
        name = client if isinstance(client, str) else int(client)
        if name not in self.row_by_name:
            known = list(map(repr, self.row_by_name))
            more = f" and {len(known) - 5} more" if len(known) > 5 else ""
            raise ValueError(
                f"Client {client!r} is unknown to adapter {adapter_name!r}, which knows {', '.join(known[:5])}{more}"
                f"{did_you_mean(name, self.row_by_name)}"
            )
        return self.row_by_name[name]
