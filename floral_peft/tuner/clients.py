"""What a model with a router offers its users: whose mixture it computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.tuner.fitting import evidence, model_loss, posterior
from floral_peft.tuner.pure import PureModels
from floral_peft.tuner.router import Client, Router


logger = logging.getLogger(__name__)


class Clients:
    """Mixin of a model whose forward pass mixes by the router `floral_router`: choosing clients, and their routers.

    The model's forward pass must begin with `_before_forward` and end with `_after_forward`.

    **Attributes**:
        - **peft_config** (`dict`): adapter name → [`FloralConfig`].
        - **active_adapters** (`list[str]`): the adapters in use.
        - **floral_router** ([`Router`]): logits of all adapters and clients, and the current client.
    """

    peft_config: dict[str, Any]
    active_adapters: Any
    floral_router: Router

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = None
        if "client_ids" in kwargs:
            kwargs = dict(kwargs)
            client = kwargs.pop("client_ids")
            if client is not None:
                self._check_not_merged("choose clients by `client_ids`")
                rows = self.router.rows(client)
        if rows is None and module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._note_unchosen("a training pass uses")
        self.router.begin_forward(rows)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.router.end_forward(output)

    # Clients

    def set_client(self, client: Client) -> None:
        """Choose whose mixture the model computes from now on.

        Args:
            client: a client's name, or its row in the router's table; or a sequence or tensor (rows) of them, one per
                example of the batches to come.

        Raises:
            ValueError: an unknown client, or the current client's mixture is merged into the weights.
        """
        rows = self.router.rows(client)
        self._check_not_merged("choose another client")
        self.router.select(rows)
        self.router.chosen = True

    @contextmanager
    def client(self, client: Client) -> Iterator[None]:
        """`set_client` for the length of a `with` block."""
        before, chosen = self.router.client, self.router.chosen
        self.set_client(client)
        try:
            yield
        finally:
            self.router.select(before)
            self.router.chosen = chosen

    def mixture(self, client: Client | None = None) -> Tensor:
        """A client's weights of the C adaptors (the first active adapter's), without noise.

        Args:
            client: default: the current one.

        Returns:
            float32, detached, summing to 1: shape (C,); (n, C) for a sequence of clients; with `router_per_layer` a
            dimension of L layers before the last.
        """
        rows = self.router.client if client is None else self.router.rows(client)
        one = client is None or isinstance(client, (str, Integral))
        many = len(rows) > 1 or not (one or (isinstance(client, Tensor) and client.dim() == 0))
        pi = self.router.read(self.active_adapters[0], rows)
        if not self.peft_config[self.active_adapters[0]].router_per_layer:
            pi = pi[:, 0]
        return pi if many else pi[0]

    @property
    def router(self) -> Router:
        """All adapters' routers, and the current client."""
        return self.floral_router

    @property
    def num_adaptors(self) -> int:
        """C of the first active adapter."""
        return int(self.peft_config[self.active_adapters[0]].num_adaptors)

    def router_state_dict(self, client: int | str | None = None) -> dict[str, Tensor]:
        """A client's logits, a copy: `{"logits": (L, C)}`, L = 1 without `router_per_layer`."""
        row = self._one_row(client)
        return {"logits": self.router.logits[self.active_adapters[0]].detach()[row].to(torch.float32, copy=True)}

    def load_router_state_dict(self, state: dict[str, Tensor], client: int | str | None = None) -> None:
        """Write logits as `router_state_dict` gave them into a client's row (default: the current client's)."""
        row = self._one_row(client)
        table = self.router.logits[self.active_adapters[0]]
        logits = state.get("logits") if isinstance(state, dict) and len(state) == 1 else None
        if not isinstance(logits, Tensor) or logits.shape != table.shape[1:] or not bool(logits.isfinite().all()):
            found = f"one of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else repr(state)
            raise ValueError(
                f"A router's state is {{'logits': a finite tensor of shape {tuple(table.shape[1:])}}}, got {found}."
            )
        self._check_not_merged("change its router")
        with torch.no_grad():
            table[row] = logits.to(table)

    def set_routers(self, logits: Tensor, client_names: Sequence[str | int] | None = None) -> None:
        """Replace the active adapter's whole router table, and return to its first client.

        Args:
            logits: (K, L, C), the new table: K clients. The adapter's config follows (`num_clients`).
            client_names: names of the K clients, so that `model.client("hamlet")` works.
        """
        self._check_not_merged("replace its routers")
        name = self.active_adapters[0]
        self.router.set_table(name, logits, client_names)
        config = self.peft_config[name]
        config.num_clients = None if len(logits) == 1 and client_names is None else len(logits)
        config.client_names = None if client_names is None else list(client_names)

    def fit_router(
        self,
        batches: Iterable[Any],
        client: int | str | None = None,
        *,
        loss: Callable[[Any], Tensor] | None = None,
        prior: Tensor | Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Find a client's router from a handful of its examples. Nothing else in the model changes.

            π_c ∝ prior_c · exp(−Σ_i f_c(x_i) / temperature)

        f_c is the loss under adaptor c alone: C forward passes without gradients, or less (`PureModels`).

        Language models and other self-supervised ones need no labels beyond the inputs. A classifier's examples may
        lack labels too: then f_c is how unsure its predictions are (`prediction_doubt`). That tells apart clients
        whose *inputs* differ (rotated digits: the right one of 4 adaptors from 10 examples, from one example every
        other time); it cannot tell apart those that call the same inputs by other names.

        Args:
            batches: a `DataLoader`, or any batches: mappings that the model takes by keyword, or what `loss` takes.
            client: whose router it is: one that the model knows, or a new name; default: the current client.
            loss: batch → the loss, a mean over the batch or one number per example; it runs the model. By default the
                loss that the model returns.
            prior: (C,), what is known before: say, how much all clients use each adaptor. Uniform by default.
            temperature: above 1 where losses overstate how much they say, because examples depend on each other.

        Returns:
            The client's mixture, (C,); with `router_per_layer` (L, C), equal rows.

        Raises:
            ValueError: there are no batches, a loss is not finite, or another argument is out of its range.
            TypeError: an argument, or what `loss` returns, is something else.
        """
        self._check_not_merged("fit a router")
        if client is None:
            self._one_row(None)
        elif isinstance(client, bool) or not isinstance(client, (str, Integral)):
            raise TypeError(f"A client is a name (str) or a number (int), got {client!r}.")
        if isinstance(batches, Mapping):
            columns = ", ".join(map(str, batches))
            raise TypeError(f"`batches` is a single batch, with {columns}: give a list of batches, [batch].")
        model: Any = self

        def own(batch: Any) -> Tensor:
            found = model_loss(model, batch) if loss is None else loss(batch)
            if not isinstance(found, Tensor):
                raise TypeError(f"`loss` takes a batch and returns a tensor, got {type(found).__name__}.")
            return found

        held = list(batches)
        if not held:
            raise ValueError("There are no batches to fit a router to: give at least one example.")
        losses = PureModels(model).losses(own, held)
        sums = [evidence(each.double(), batch) for each, batch in zip(losses, held, strict=True)]
        given = None if prior is None else torch.as_tensor(prior)
        logs = posterior(torch.stack(sums).sum(dim=0), given, temperature)
        settings = self.router.settings[self.active_adapters[0]]
        table = self.router.logits[self.active_adapters[0]]
        row = self._write_router((logs * settings.temperature).expand(table.shape[1:]), client)
        return self.mixture(torch.tensor([row]))[0]

    def _write_router(self, logits: Tensor, client: int | str | None) -> int:
        """Write a client's logits (L, C) into its row, or into a new one for a new client. Returns the row."""
        name = self.active_adapters[0]
        table, settings = self.router.logits[name].detach(), self.router.settings[name]
        config, names = self.peft_config[name], settings.row_by_name
        if client is None or (
            client in names if names is not None else isinstance(client, int) and 0 <= client < len(table)
        ):
            self.load_router_state_dict({"logits": logits}, client)
            return self._one_row(client)
        before, chosen = self.router.client, self.router.chosen
        nobodys = config.num_clients is None and names is None  # a single router that belongs to no client
        rows = [*([] if nobodys else table), logits.to(table)]
        known: list[Any] = [] if nobodys else list(range(len(table))) if names is None else list(names)
        numbered = names is None and client == len(known)
        self.set_routers(torch.stack(rows), None if numbered else [*known, client])
        if not nobodys:
            self.router.select(before)
            self.router.chosen = chosen
        return len(rows) - 1

    def _one_row(self, client: int | str | None) -> int:
        rows = self.router.client if client is None else self.router.rows(client)
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} clients are selected; name the one whose router is meant: client=...")
        return int(rows)

    def _note_unchosen(self, what: str) -> None:
        """Say, once, that of several clients nobody has chosen one, so that it is the first."""
        tables = [self.router.logits[name] for name in self.router.active_adapters]
        if self.router.chosen or self._disabled or all(len(table) == 1 for table in tables):
            return
        self.router.chosen = True
        logger.warning(
            "no client has been chosen: %s the first router of the table. Call model.set_client(...), or give each "
            "batch its client_ids (with transformers' Trainer, remove_unused_columns=False keeps them).",
            what,
        )

    @property
    def _disabled(self) -> bool:
        """Whether the model is the base alone at the moment."""
        return False

    def _check_not_merged(self, intent: str) -> None:
        """Raise where no other client can be chosen, because one's mixture is merged into the weights."""
