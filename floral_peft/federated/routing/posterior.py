"""Routers that are a posterior over the adaptors, found anew from the losses of the pure models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.routing import schedule, sharing
from floral_peft.federated.routing.balance import balance
from floral_peft.federated.routing.prune import LEAST_REGRET, Drop, cut, dead, lost_with, prune, regrets
from floral_peft.federated.routing.update import RouterUpdate, register_router_update
from floral_peft.federated.seeding import derive_seed
from floral_peft.federated.turn import Arrival, Arrived, Turn
from floral_peft.tuner.router import RouterSettings


#: In what the server remembers: after which round the search ended.
_SEARCHED = "searched"


@dataclass(frozen=True)
class _Visit:
    """What a client does at a visit.

    Args:
        held_out: The rows of the examples that it does not train on for now.
        others: Those of the others.
        examined: The rows at which it looks, in parts; the last one is of the others.
        chooses: Whether the router with which it comes prefers any adaptor.
        looks: Whether it looks at all.
    """

    held_out: Tensor
    others: Tensor
    examined: list[Tensor]
    chooses: bool
    looks: bool


@dataclass(frozen=True)
class _Round:
    """What the server's memory says to all clients of a round.

    Args:
        memory: The server's memory.
        number: The rounds done.
        optimism: See [`_optimism`].
        handicaps: See [`balance`], (C,).
    """

    memory: Mapping[str, Tensor]
    number: int
    optimism: float
    handicaps: Tensor


@register_router_update
class Posterior(RouterUpdate):
    """θ ← γ θ − n f: the posterior over adaptors given a client's n examples, with a fading memory γ of earlier ones.

    f_c is the mean loss of a training example of the pure model in which every layer uses adaptor c alone. Where that
    loss is a negative log-likelihood, exp(−n f_c) is the likelihood of the client's examples under adaptor c. Clients
    find it on arrival; then base and adaptors train under fixed mixtures. Early in a run, adaptors that have many
    users are handicapped, so that clients spread over all of them: see [`balance`]. The handicap counts while a client
    trains; it is neither kept nor used in evaluation.

    Squared errors become likelihoods first: see [`as_log_likelihoods`].

    Adaptors may start equal, and a pretrained model undisturbed: at its first visit a client favours an adaptor that
    is dealt out to it, and so adaptors come to differ. None is left out: those that nobody trained would stay equal,
    and together draw everybody.

    Clients look for theirs among more adaptors than may stay, and of a larger rank: see [`Adaptors`].

    Until the search ends, a client keeps some of its examples back: see [`hold_out`]. On the others the adaptor that
    it has trained looks better than it is. How much better, on average over the clients, is added to that adaptor's
    loss: few clients would otherwise stay for ever with what each has trained alone, and be taken for settled.

    By SGD, where looking is dear, a client that comes often looks in every second round only, and keeps its router if
    it comes in another.

    A frozen base learns nothing that clients have in common. So while they search, they also compare their own model
    with that of the adaptors' mean; if the latter is better on what they keep back, all adaptors become one.

    The server learns, beside the aggregate, sums over the cohort. Five are over the clients that look: the usage
    Σ_k π_k, the losses Σ_k π_kᵀ f̃_k on the examples kept back (at first, by SGD, on the others), the squares of their
    differences Σ_k π_ka (f̃_kb − f̃_ka)², by how much all losses are higher there than on the others, and how many
    clients' best adaptor has changed for one that is no duplicate of it. Another is how many have come, be it to look
    or not; the rest is that comparison's. It remembers them with a fading memory, the first three as U, N and S. By
    these it removes adaptors: see [`prune`].
    """

    name = "posterior"

    def __init__(self, args: FederatedArguments, sampled: float = 1.0) -> None:
        super().__init__(args, sampled)
        self._visits: WeakKeyDictionary[Turn, _Visit] = WeakKeyDictionary()
        self._round: _Round | None = None

    def settle(self, args: FederatedArguments, memory: Mapping[str, Tensor], round: int) -> FederatedArguments:
        """While clients search, labels are discounted and no gradient is long; by SGD, adaptors learn fast.

        That is what tells clusters apart. But the discounted loss is not the one that is asked for, and with clipped
        gradients and fast adaptors the model ends where it does worse on new examples. So once the search has ended
        the loss is the plain one, and over what is left of the run the adaptors' rate falls to the base's. Gradients
        may be longer, and ever longer; were they free at once, runs at rates that FedAvg bears well would diverge.

        Bounded steps may be damped as little as in the paper: factors that start at zero leave it in few steps, and
        so adaptors come to differ before they are looked at for the first time. In mixed precision the damping stays
        relative: in a layer smaller than the rank a Gram matrix is singular, and 1/ε would blow up half a gradient's
        digits of rounding.
        """
        searching = _SEARCHED not in memory
        found = replace(args, label_prior=searching if args.label_prior is None else args.label_prior)
        if args.optimizer.lower() != "sgd":  # others choose the length of their steps themselves
            return found
        given = args.adaptor_learning_rate
        fast = rate = schedule.adaptor_rate(args.learning_rate) if given is None else given
        left = 1.0 if searching else (args.rounds - round) / max(1, args.rounds - int(memory[_SEARCHED]))
        if given is None and fast:
            rate = args.learning_rate * (fast / args.learning_rate) ** left
        found = replace(found, adaptor_learning_rate=rate)
        if args.precondition_epsilon is None and args.mixed_precision == "no":
            found = replace(found, precondition_epsilon=schedule.DAMPING)
        if args.max_step_norm is None and args.max_adaptor_step_norm is None:
            longest = schedule.STEP_NORM if searching else schedule.FOUND_STEP_NORM
            step = schedule.STEP_LENGTH / fast if fast else longest
            bases = min(longest, step)
            if not searching:
                bases *= schedule.FOUND_BASE * schedule.ADAPTOR_RATE ** (1 - left)
            adaptors = min(longest, step / max(1.0, args.learning_rate)) * (fast / rate if rate else 1.0)
            found = replace(found, max_step_norm=bases, max_adaptor_step_norm=adaptors)
        return found

    def settings(self, settings: RouterSettings) -> RouterSettings:
        """No noise: nothing is explored by chance."""
        return replace(settings, noise=0.0)

    def arrival(self) -> Arrival:
        """Find the posterior."""
        return self._arrive

    def examined(self, turn: Turn) -> list[Tensor]:
        """Those it does not train on for now, if there are any, and some of the others; none if it does not look."""
        visit = self._visit(turn)
        return visit.examined if visit.looks else []

    def sums(self, num_adaptors: int) -> Mapping[str, torch.Size]:
        """Usage (C,); losses (C, C), of the users of a under b, and squared differences; three numbers (1,)."""
        each, pairs, one = torch.Size([num_adaptors]), torch.Size([num_adaptors, num_adaptors]), torch.Size([1])
        own = {"usage": each, "losses": pairs, "squares": pairs, "optimism": one, "switches": one, "visits": one}
        return own | sharing.SUMS

    def start(self, num_adaptors: int) -> dict[str, Tensor]:
        """Sums that are zero."""
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.sums(num_adaptors).items()}

    def absorb(self, memory: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """U ← δ U + Σ_k π_k, N ← δ N + Σ_k π_kᵀ f_k, and so all sums."""
        decay = schedule.server_decay(self._pace)
        return {**memory, **{name: decay * memory[name] + value for name, value in sums.items()}}

    def prune(self, memory: Mapping[str, Tensor], round: int) -> list[Drop]:
        """Dead and dispensable adaptors, by U, N and S, from time to time.

        While clients search, and many still change their adaptor, adaptors have not parted yet: only the dead go, and
        these not before the search might have been over. None goes soon after it, as adaptors that have just been
        compressed are alike.
        """
        if not self.args.prune_adaptors or not schedule.pruning_due(round, self._pace):
            return []
        if _SEARCHED in memory:
            ready = round - int(memory[_SEARCHED]) >= schedule.recovered_rounds(self._pace, self.args.rounds)
        else:
            least, half = schedule.searched_rounds(self._pace, self.args.rounds)
            ready = _settled(memory) or round >= half
            if not ready and round >= least:
                return dead(memory["usage"]) if float(memory["usage"].sum()) else []
        return prune(memory["usage"], memory["losses"], self._errors(memory)) if ready else []

    def pools(self, memory: Mapping[str, Tensor], round: int) -> list[Drop]:
        """All become one where sharing is better; while clients search, and not before they have begun to."""
        usage = memory["usage"]
        if _SEARCHED in memory or len(usage) < 2 or round < schedule.pooled_from(self._pace, self.args.rounds):
            return []
        if not self.args.prune_adaptors or not sharing.is_better(memory, self._users(memory, memory["compared"])):
            return []
        return [Drop(number, "pooled", float(share)) for number, share in enumerate(usage / usage.sum()) if number]

    def search_adaptors(self, num_adaptors: int, num_clients: int) -> int:
        """`search_adaptors`; by default four times as many as may stay, unless that is many for so few clients."""
        if self.args.search_adaptors is not None:
            return max(num_adaptors, self.args.search_adaptors)
        enough = min(num_clients, max(schedule.ENOUGH_ADAPTORS, num_clients // 2))
        return max(num_adaptors, min(schedule.SEARCH_ADAPTORS * num_adaptors, enough))

    def search_rank(self) -> int:
        """`search_r`; by default enough for clusters that differ in much."""
        return schedule.SEARCH_RANK if self.args.search_r is None else self.args.search_r

    def searched(self, memory: Mapping[str, Tensor], round: int, most: int) -> bool:
        """Once clients have found their adaptors, stay with them and need no more than may stay; half-way at last.

        Clients may go round among duplicates for ever. In the second half of that time it is enough if those that may
        stay serve all users as well as all do.
        """
        if _SEARCHED in memory:
            return False
        least, half = schedule.searched_rounds(self._pace, self.args.rounds)
        few = len(memory["usage"]) <= most or not self.args.prune_adaptors
        if round >= half or (round >= least and _settled(memory) and few):
            return True
        return round >= (least + half) / 2 and self._suffice(memory, most)

    def cut(self, memory: Mapping[str, Tensor], most: int) -> list[Drop]:
        """Those without which the users of all lose least."""
        return cut(memory["usage"], memory["losses"], most)

    def settled(self, memory: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        """Since when it has ended."""
        return {**memory, _SEARCHED: torch.tensor([round], dtype=torch.float64)}

    def regrets(self, memory: Mapping[str, Tensor]) -> Tensor:
        """By U and N, without regard to errors."""
        return regrets(memory["usage"], memory["losses"])

    def keep(self, memory: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
        """U, N and S of those that stay."""
        chosen = torch.tensor(kept)
        pairs = {name: memory[name][chosen][:, chosen] for name in ("losses", "squares")}
        return {**memory, "usage": memory["usage"][chosen], **pairs}

    def _suffice(self, memory: Mapping[str, Tensor], most: int) -> bool:
        """Whether there are more than so many, clients have the best for them, and with so many would lose little."""
        usage, losses = memory["usage"], memory["losses"]
        everyone = range(len(usage))
        gone = {drop.adaptor for drop in cut(usage, losses, most)}
        if not gone or not bool(regrets(usage, losses).any()):  # or adaptors do not matter
            return False
        own = lost_with(usage, losses, everyone)
        fewer = lost_with(usage, losses, [adaptor for adaptor in everyone if adaptor not in gone])
        return own > -LEAST_REGRET and fewer - own < LEAST_REGRET

    def _errors(self, memory: Mapping[str, Tensor]) -> Tensor:
        """How far the mean differences between adaptors, over the users of each, may be off: (C, C).

        √(mean square / users): standard errors, but for a mean that is taken for 0. So one user proves nothing.
        """
        users = self._users(memory, memory["usage"])
        means = memory["squares"] / memory["usage"].clamp(min=1e-9).unsqueeze(1)
        return schedule.CAUTION * (means / users.unsqueeze(1)).sqrt()

    def _users(self, memory: Mapping[str, Tensor], looks: Tensor) -> Tensor:
        """How many clients a sum over those who look is of."""
        fading = 1 - schedule.server_decay(self._pace)
        seldom = memory["visits"] / memory["usage"].sum().clamp(min=1e-9)  # visits for one at which a client looks
        return (looks * fading * seldom / self.sampled).clamp(min=1e-9)

    def _alike(self, one: int, other: int, memory: Mapping[str, Tensor]) -> bool:
        """Whether two adaptors are one, or duplicates, of which pruning would let one go."""
        if one == other:
            return True
        found = regrets(memory["usage"], memory["losses"], self._errors(memory))
        return min(float(found[one, other]), float(found[other, one])) < LEAST_REGRET

    @property
    def _by_sgd(self) -> bool:
        return self.args.optimizer.lower() == "sgd"

    @property
    def _pace(self) -> float:
        return schedule.pace(self.sampled, self.args.rounds)

    def _arrive(self, turn: Turn) -> Arrived:
        if not turn.num_examples:
            return Arrived(turn.private)
        routers, done = turn.routers, turn.round * self._pace  # in participations
        visit = self._visit(turn)
        held_out, others, chosen = visit.held_out, visit.others, visit.chooses
        trains_on = turn.examples.select(others) if len(held_out) else turn.examples
        before = turn.private[routers.name]  # (1, L, C)
        if not visit.looks:
            nothing = {**self.start(before.shape[-1]), "visits": torch.ones(1, dtype=torch.float64)}
            return Arrived(turn.with_logits(self._working(before, turn)), {routers.name: before}, nothing, trains_on)
        *unseen, losses = turn.pure_losses_of(visit.examined)
        seen = as_log_likelihoods(turn.finite(losses), turn)
        unseen = [one for one in unseen if all(map(math.isfinite, one.tolist()))]  # none of them may have a label
        losses = seen
        if chosen and len(held_out):
            losses = seen + self._of_round(turn).optimism * routers.mixture_of(before)
        if turn.training and not chosen and done < schedule.BALANCED:
            before = self._given(before, turn.lot % before.shape[-1], turn)
        most = self._counts(turn)
        count = len(others) if most is None else min(len(others), most)
        kept = routers.less(schedule.CLIENT_MEMORY * before, count * losses)
        kept = kept - kept.amax(dim=-1, keepdim=True)
        if not turn.training:
            return Arrived(turn.with_logits(kept))
        working = self._working(kept, turn)
        moved = chosen and not self._alike(_best(before), _best(kept), turn.memory)
        mixture = routers.mixture_of(working).double()
        told = (as_log_likelihoods(unseen[0], turn) if unseen else seen).double()
        sums = {
            "usage": mixture,
            "losses": torch.outer(mixture, told),
            "squares": (told - told.unsqueeze(1)).square_().mul_(mixture.unsqueeze(1)),
            "optimism": mixture.dot(told - seen.double()).view(1),
            "switches": torch.tensor([float(moved)], dtype=torch.float64),
            "visits": torch.ones(1, dtype=torch.float64),
            **self._compared(held_out, working, turn),
        }
        return Arrived(turn.with_logits(working), {routers.name: kept}, sums, trains_on)

    def _compared(self, held_out: Tensor, working: Tensor, turn: Turn) -> dict[str, Tensor]:
        """What a client says of its own model and of the mean's, if it is time to compare them."""
        first = schedule.pooled_from(self._pace, self.args.rounds) - 2 * schedule.SERVER_MEMORY / self._pace
        usage = turn.memory["usage"]
        if turn.routers.base_trains or turn.routers.top_k is not None:  # the router mixes no mean of all
            return sharing.nothing()
        if not len(held_out) or turn.round < first or not float(usage.sum()):
            return sharing.nothing()
        mean = turn.routers.of_mixture((usage / usage.sum()).float())
        return sharing.compared(
            *(turn.losses_at(sharing.TEMPERATURES, held_out, logits) for logits in (working, mean))
        )

    def _working(self, kept: Tensor, turn: Turn) -> Tensor:
        """The router under which a client trains, of the one that it keeps."""
        working = turn.routers.less(kept, self._of_round(turn).handicaps)
        if self._by_sgd:  # by others' steps traces train those adaptors that nobody else does
            working = turn.routers.without_traces(working, schedule.LEAST_SHARE)
        return working

    def _of_round(self, turn: Turn) -> _Round:
        """What the server's memory says to all clients of a round."""
        if self._round is None or self._round.memory is not turn.memory or self._round.number != turn.round:
            left = max(0.0, 1.0 - turn.round * self._pace / schedule.BALANCED)
            handicaps = balance(turn.memory["usage"], schedule.BALANCE * left)
            self._round = _Round(turn.memory, turn.round, _optimism(turn.memory), handicaps)
        return self._round

    def _visit(self, turn: Turn) -> _Visit:
        """What a client does at a visit; worked out once, as it is asked for when clients look together, too."""
        found = self._visits.get(turn)
        if found is None:
            held_out, others = self._split(turn)
            examined = self._examined(held_out, others, turn)
            chooses = _chooses(turn.private[turn.routers.name])
            looks = not chooses or self._looks(examined, turn)
            found = self._visits[turn] = _Visit(held_out, others, examined, chooses, looks)
        return found

    def _looks(self, examined: Sequence[Tensor], turn: Turn) -> bool:
        """Whether a client that prefers an adaptor looks for the best at this visit, or keeps what it has found."""
        seldom = self.sampled * self.args.rounds < schedule.WHOLE
        if seldom or not turn.training or not self._by_sgd:
            return True
        adaptors = turn.private[turn.routers.name].shape[-1]
        if sum(map(len, examined)) * adaptors <= self._trained(turn.num_examples):
            return True
        return (turn.round + derive_seed(self.args.seed, "looks", turn.client_id)) % schedule.LOOKED_EVERY == 0

    def _split(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """The rows of the examples that it does not train on for now, and of the others."""
        several = turn.private[turn.routers.name].shape[-1] > 1
        if turn.training and several and _SEARCHED not in turn.memory:
            return hold_out(turn.num_examples, derive_seed(self.args.seed, "held out", turn.client_id))
        return torch.arange(0), torch.arange(turn.num_examples)

    def _examined(self, held_out: Tensor, others: Tensor, turn: Turn) -> list[Tensor]:
        early = self._by_sgd and turn.round < schedule.held_out_from(self._pace, self.args.rounds)
        if early and len(held_out) + len(others) > schedule.EVIDENCE_EARLY:
            held_out = held_out[:0]
        return [rows for rows in (held_out, self._some(others, turn)) if len(rows)]

    def _some(self, rows: Tensor, turn: Turn) -> Tensor:
        """So many examples as losses are looked at on, other ones each round."""
        most = schedule.EVIDENCE_EXAMPLES
        if turn.training:
            least = schedule.EVIDENCE_LEAST if self._counts(turn) is None else schedule.EVIDENCE_EARLY
            adaptors = turn.private[turn.routers.name].shape[-1]
            most = schedule.evidence_examples(self._trained(len(rows)), adaptors, least)
        if len(rows) <= most:
            return rows
        return rows[_drawn(len(rows), most, derive_seed(self.args.seed, "evidence", turn.round, turn.client_id))]

    def _counts(self, turn: Turn) -> int | None:
        """As how many examples at most a client's losses count; None: as all of them."""
        return schedule.EARLY_EXAMPLES if turn.training and turn.round * self._pace < schedule.BALANCED else None

    def _trained(self, held: int) -> int:
        """On how many examples a client trains in a round that holds so many, each as often as it comes."""
        steps = self.args.local_steps
        return steps * self.args.per_device_train_batch_size if steps else self.args.local_epochs * held

    def _given(self, like: Tensor, adaptor: int, turn: Turn) -> Tensor:
        """A router that is all but one-hot."""
        logits = torch.zeros(like.shape[-1])
        logits[adaptor] = schedule.ASSIGNED
        return turn.routers.less(torch.zeros_like(like), -logits)


def as_log_likelihoods(losses: Tensor, turn: Turn) -> Tensor:
    """An example's negative log-likelihood under each adaptor, up to a constant, from its mean loss f.

    f itself where labels are classes or tokens; of a sequence the loss is the mean over its tokens, which are no
    independent examples. Where labels are o real numbers f is taken for a squared error and its noise for unknown:
    o/2 · log f, which does not depend on the labels' unit.

    Args:
        losses: f, (C,).
        turn: The client's turn.
    """
    return losses if turn.real_labels is None else turn.real_labels / 2 * losses.clamp(min=1e-12).log()


def hold_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of a client's examples it does not train on for a while, and the others.

    On examples that an adaptor has memorised it beats its duplicates; on others it does not, so that they can be told.
    The client does not choose by them either, or its choice would look better to the server than it is.

    Args:
        count: How many training examples it has.
        seed: Of the draw, the same in all rounds.

    Returns:
        The rows of both, ascending, not to be written to; none are held out where there are too few.
    """
    held_out = _held_out(count, seed)
    others = torch.ones(count, dtype=torch.bool)
    others[held_out] = False
    return held_out, others.nonzero().squeeze(1)


@lru_cache(maxsize=4096)  # of a few rows each
def _held_out(count: int, seed: int) -> Tensor:
    held = 0 if count < 3 else max(1, min(count // schedule.HELD_OUT_SHARE, schedule.HELD_OUT_EXAMPLES))
    return _drawn(count, held, seed)


def _drawn(count: int, drawn: int, seed: int) -> Tensor:
    """Some of so many rows, ascending."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:drawn].sort().values


def _settled(memory: Mapping[str, Tensor]) -> bool:
    """Whether few clients still change their adaptor at a visit."""
    return float(memory["switches"]) <= schedule.UNSETTLED * float(memory["usage"].sum())


def _optimism(memory: Mapping[str, Tensor]) -> float:
    """By how much the loss of the adaptor that a client has is higher on examples that it has not trained on."""
    return max(0.0, float(memory["optimism"] / memory["usage"].sum().clamp(min=1e-9)))


def _chooses(logits: Tensor) -> bool:
    """Whether a router prefers any adaptor."""
    return any(logit != row[0] for row in logits.reshape(-1, logits.shape[-1]).tolist() for logit in row)


def _best(logits: Tensor) -> int:
    return int(logits.mean(dim=1).argmax())
