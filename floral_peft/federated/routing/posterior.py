"""Routers that are a posterior over the adaptors, found anew from the losses of the pure models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from floral_peft.federated.routing import schedule
from floral_peft.federated.routing.balance import balance
from floral_peft.federated.routing.update import RouterUpdate, register_router_update
from floral_peft.federated.turn import Arrival, Arrived, Turn
from floral_peft.tuner.router import RouterSettings


@register_router_update
class Posterior(RouterUpdate):
    """θ ← γ θ − n f: the posterior over adaptors given a client's n examples, with a fading memory γ of earlier ones.

    f_c is the mean loss of a training example of the pure model in which every layer uses adaptor c alone. Where that
    loss is a negative log-likelihood, exp(−n f_c) is the likelihood of the client's examples under adaptor c. Clients
    find it on arrival; then base and adaptors train under fixed mixtures. Early in a run, adaptors that have many
    users are handicapped, so that clients spread over all of them: see [`balance`]. The handicap counts while a client
    trains; it is neither kept nor used in evaluation.

    The server learns, beside the aggregate, three sums over the cohort: the usage Σ_k π_k, the losses Σ_k π_kᵀ f_k,
    and how many clients' best adaptor has changed. It remembers the first two with a fading memory, as U and N, and
    tells clients U.
    """

    name = "posterior"
    needs_difference = True
    discounts_labels = True

    def settings(self, settings: RouterSettings) -> RouterSettings:
        """No noise: nothing is explored by chance."""
        return replace(settings, noise=0.0)

    def arrival(self) -> Arrival:
        """Find the posterior."""
        return self._arrive

    def sums(self, num_adaptors: int) -> Mapping[str, torch.Size]:
        """Usage (C,); losses (C, C), of the users of a under b; how many changed their best adaptor (1,)."""
        return {
            "usage": torch.Size([num_adaptors]),
            "losses": torch.Size([num_adaptors, num_adaptors]),
            "switches": torch.Size([1]),
        }

    def start(self, num_adaptors: int) -> dict[str, Tensor]:
        """U and N: zero."""
        return {name: torch.zeros(self.sums(num_adaptors)[name], dtype=torch.float64) for name in ("usage", "losses")}

    def absorb(self, memory: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """U ← δ U + Σ_k π_k and N ← δ N + Σ_k π_kᵀ f_k."""
        decay = schedule.server_decay(self.sampled)
        return {name: decay * value + sums[name] for name, value in memory.items()}

    def _arrive(self, turn: Turn) -> Arrived:
        if not turn.num_examples:
            return Arrived(turn.private)
        routers = turn.routers
        before = turn.private[routers.name]  # (1, L, C)
        losses = turn.pure_losses()
        kept = routers.less(schedule.CLIENT_MEMORY * before, turn.num_examples * losses)
        kept = kept - kept.amax(dim=-1, keepdim=True)
        found = turn.with_logits(kept)
        if turn.memory is None:
            return Arrived(found)
        done = turn.round / schedule.balanced_rounds(self.sampled)
        handicap = balance(turn.memory["usage"], schedule.BALANCE * max(0.0, 1.0 - done))
        working = routers.less(kept, handicap)
        mixture = routers.mixture_of(working).double()
        sums = {
            "usage": mixture,
            "losses": torch.outer(mixture, losses.double()),
            "switches": torch.tensor([float(_switched(before, kept))], dtype=torch.float64),
        }
        return Arrived(turn.with_logits(working), kept={routers.name: kept}, sums=sums)


def _switched(before: Tensor, after: Tensor) -> bool:
    """Whether a client's best adaptor is another one than before; not for a client that had none."""
    had_one = bool((before != before[..., :1]).any())
    return had_one and bool((before.mean(dim=1).argmax() != after.mean(dim=1).argmax()).item())
