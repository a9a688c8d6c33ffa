"""Many clients' local training as one batched computation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from floral_peft.federated.aggregation import ClientUpdate, UpdateError
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.cohort import Load, attempt
from floral_peft.federated.draws import ClientGenerators
from floral_peft.federated.groups import tensors_of
from floral_peft.federated.lanes import Lane, Pack, chosen_rows, next_group, pack, stacked_batch
from floral_peft.federated.local_steps import Pull, local_batches, norms_frozen, optimizer_groups, training_phases
from floral_peft.federated.norms import resting_norms
from floral_peft.federated.rounds import Outcome
from floral_peft.federated.seeding import ClientId, derive_seed
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.stacked_gradients import FactorChange, change_stacked, clip_stacked, clip_weights_stacked
from floral_peft.federated.stacked_model import Stack, StackedModel
from floral_peft.federated.stacked_optimizer import StackedOptimizer, unserved
from floral_peft.federated.used_adaptors import AdaptorAxes, UsedSlices, grouped_by_use
from floral_peft.federated.used_members import Members
from floral_peft.federated.workplace import Workplace
from floral_peft.tuner import base_weights, clip_steps, factor_pairs, precondition_gradients


logger = logging.getLogger(__name__)

#: Most clients of a chunk, on a GPU and on a CPU: more are hardly faster, and a chunk is one process's.
CHUNK_CLIENTS = 256
CPU_CHUNK_CLIENTS = 128
#: Bytes of a chunk's tensors: parameters, gradients, the optimiser's memories.
CHUNK_BYTES = 2**30
#: Bytes of a chunk's examples that are held in memory for the chunk's whole visit.
RESIDENT_BYTES = 2**30


#: A client that trains in a chunk, and its private tensors.
Entered = tuple[Lane, PrivateState]


class Group(NamedTuple):
    """Clients that train as one batched computation.

    Args:
        entered: The clients.
        used: The slices of adaptors that each of them uses; None: all.
        member: The member of an ensemble that they use alone; None: there is none, or they use several.
    """

    entered: Sequence[Entered]
    used: UsedSlices | None = None
    member: int | None = None


class SideBySide:
    """Trains the clients of a chunk as one batched computation, through torch.func over stacked parameters.

    The results are those of `LocalTraining` up to rounding: the same batches in the same order, the same steps, and on
    a CPU the same dropout. Clients step together whose next batches have the same shapes, so no example is padded and
    batch norm sees what it would see. Each client's optimiser, running statistics, clipping and preconditioning are
    its own. What a client gets depends on its chunk by rounding only.

    A client that cannot take part, or a step that fails, costs nobody else: those clients are trained alone.

    Args:
        place: The model and what belongs to it.

    Attributes:
        failure: What made clients train alone the last time, other than their own examples; None if nothing did.

    Raises:
        ValueError: The settings ask for something that cannot be done for many clients at once.
    """

    def __init__(self, place: Workplace) -> None:
        self._alone = LocalTraining(place)
        self._model = model = place.model
        self._visitor = place.visitor
        self._forward = place.forward
        self._groups = groups = place.groups
        self._place = place
        self._accelerator = accelerator = place.accelerator
        self.failure: str | None = None
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._resting = list(resting_norms(model).values())
        self._axes = AdaptorAxes(place)
        self._members = Members(place)
        if place.args.fp16:
            raise ValueError("fp16=True scales the loss, client by client: use bf16=True")
        reason = unserved(place.args.build_optimizer([{"params": [torch.zeros(1)]}]))
        if reason is not None:
            raise ValueError(reason)
        saved = model.state_dict(keep_vars=True).keys()
        buffers = [name for name, _ in model.named_buffers() if name in saved or name in groups.private]
        self._names = list(dict.fromkeys([*groups.public, *groups.private, *buffers]))
        self._routers = [
            name for name in groups.private if name in groups.roles and groups.roles[name].kind == "router"
        ]
        held = tensors_of(model)
        size = sum(held[name].numel() * held[name].element_size() for name in self._names)
        # Beside the tensors: gradients, what the server had, and up to two memories of the optimiser.
        most = CPU_CHUNK_CLIENTS if accelerator.device.type == "cpu" else CHUNK_CLIENTS
        self._chunk_clients = max(1, min(most, CHUNK_BYTES // max(1, 5 * size)))

    def chunks(self, client_ids: Sequence[ClientId]) -> list[list[ClientId]]:
        """Groups of about the same size. They depend on the clients' number and order, not on the processes."""
        count = -(-len(client_ids) // self._chunk_clients)
        bounds = [len(client_ids) * index // count for index in range(count + 1)] if count else []
        return [list(client_ids[start:end]) for start, end in pairwise(bounds)]

    def __call__(self, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> Iterator[Outcome]:
        """Train clients of one chunk for one round: see `CohortTraining`."""
        try:
            found = self._train_chunk(client_ids, load, state)
        except Exception as error:  # as for want of memory
            self._note(error, len(client_ids))
            found = {}
        for position, client_id in enumerate(client_ids):
            # Not kept here once it is handed out.
            yield found.pop(position) if position in found else attempt(self._alone, client_id, load, state)

    def _train_chunk(self, client_ids: Sequence[ClientId], load: Load, state: ServerState) -> dict[int, Outcome]:
        """What the clients of a chunk made, by position; those are missing that must be trained alone."""
        entered: list[Entered] = []
        held = tensors_of(self._model)
        for position, client_id in enumerate(client_ids):
            try:
                entered.append(self._enter(position, client_id, load, held, state.round + 1))
            except Exception as error:  # told when it is trained alone
                logger.debug("round %d: client %r cannot take part: %s", state.round + 1, client_id, error)
        if not entered:
            return {}
        # Clients of similar length stand side by side: those that step together are then seldom copied.
        entered.sort(key=lambda one: -one[0].num_examples)
        self._visitor.load({}, state)  # loading may have used the model
        trainable = [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        found: dict[int, Outcome] = {}
        for group in self._by_use(entered, trainable):
            try:
                with self._members.alone(group.member):
                    found |= self._train_group(group, client_ids, trainable, held, state)
            except Exception as error:  # what the other groups made stands
                self._note(error, len(group.entered))
        return found

    def _train_group(
        self,
        group: Group,
        client_ids: Sequence[ClientId],
        trainable: Sequence[str],
        held: Mapping[str, Tensor],
        state: ServerState,
    ) -> dict[int, Outcome]:
        """The same of one group of them."""
        lanes, privates = [lane for lane, _ in group.entered], [private for _, private in group.entered]
        used, others = group.used, self._members.others(group.member)
        trainable = [name for name in trainable if name not in others]
        for row, lane in enumerate(lanes):
            lane.row = row
        stacked = self._stack(privates, {name: held[name] for name in self._names if name not in others}, used)
        self._model.train()
        for norm in self._resting:
            norm.eval()
        packed = pack(lanes, self._accelerator.device)
        for phase in training_phases(trainable, self._groups, self._place.args.alternating):
            losses = self._run_phase(phase, lanes, packed, stacked, state)
        ids = [client_ids[lane.position] for lane in lanes]
        return self._results(ids, lanes, privates, used, stacked, losses, state)

    def _enter(
        self, position: int, client_id: ClientId, load: Load, held: Mapping[str, Tensor], round: int
    ) -> tuple[Lane, PrivateState]:
        dataset, private = load(client_id)
        if len(dataset) == 0:
            raise UpdateError(f"client {client_id!r} has no training examples")
        device = self._accelerator.device
        generators = ClientGenerators(derive_seed(self._place.args.seed, "train", round, client_id), device)
        order = torch.Generator().manual_seed(derive_seed(self._place.args.seed, "shuffle", round, client_id))
        resident = RESIDENT_BYTES // self._chunk_clients
        examples = self._place.examples(dataset, resident)
        constants = self._forward.constants(examples) if self._place.args.label_prior else {}
        lane = Lane(position, examples, generators, order, constants)
        return lane, {name: _fitting(private[name], held[name]) for name in self._groups.private}

    def _by_use(self, entered: Sequence[Entered], trainable: Sequence[str]) -> Iterator[Group]:
        """Groups of clients by what they use of the adaptors, or of an ensemble's members.

        On a GPU, where the number of operations counts, they are one group.
        """
        axes, on_cpu = self._axes.among(trainable), self._accelerator.device.type == "cpu"
        several = on_cpu and self._members.among(trainable)
        if not axes and not several:
            yield Group(entered)
            return
        routers = {name: torch.stack([private[name] for _, private in entered]) for name in self._routers}
        mixtures = StackedModel(self._model, self._forward, self._accelerator, routers).mixtures()
        if several:
            for rows, member in self._members.grouped(mixtures, trainable):
                yield Group([entered[row] for row in rows], member=member)
            return
        for rows in grouped_by_use(mixtures) if on_cpu else [list(range(len(entered)))]:
            yield Group([entered[row] for row in rows], UsedSlices.of(axes, mixtures[rows]))

    def _stack(
        self, privates: Sequence[PrivateState], held: Mapping[str, Tensor], used: UsedSlices | None
    ) -> StackedModel:
        """What the model holds, for every client, but with each client's private tensors, and what it uses.

        Args:
            privates: Each client's private tensors.
            held: What the model holds of all that clients need.
            used: The slices that they use.
        """
        count, own = len(privates), privates[0].keys()
        tensors: Stack = {}
        for name in held:
            sliced = used is not None and name in used.axes
            if name in own:
                rows = [private[name] for private in privates]
                tensors[name] = torch.stack(
                    [used.for_client(name, row, k) for k, row in enumerate(rows)] if used and sliced else rows
                )
            elif used and sliced:
                tensors[name] = used.for_each(name, held[name])
            else:
                tensors[name] = held[name].expand(count, *held[name].shape).clone()
        return StackedModel(self._model, self._forward, self._accelerator, tensors)

    def _run_phase(
        self, phase: list[str], lanes: Sequence[Lane], packed: Pack | None, stacked: StackedModel, state: ServerState
    ) -> Tensor:
        """Train these parameters for the local epochs or steps. Returns each row's mean loss of an example."""
        args = self._place.args
        trained = {name: stacked.tensors[name] for name in phase}
        optimizer = StackedOptimizer(args.build_optimizer(optimizer_groups(trained, self._groups, args)), len(lanes))
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._model.named_parameters()}
        longest, longest_adaptor = args.step_norms
        changes: list[FactorChange] = []
        if args.precondition:
            epsilon = args.precondition_epsilon
            changes.append(partial(precondition_gradients, epsilon=epsilon, max_norm=longest_adaptor or None))
        elif longest_adaptor:
            changes.append(partial(clip_steps, max_norm=longest_adaptor))
        factors = [(names[a], names[b]) for a, b in factor_pairs(self._model)] if changes else []
        weights = [names[weight] for weight in base_weights(self._model)] if longest else []
        pull = Pull(trained, self._groups.anchors, state.tensors, args.proximal_weight)
        totals = torch.zeros(len(lanes), device=self._accelerator.device)
        for lane in lanes:
            lane.begin(local_batches(lane.num_examples, args, lane.order), args.per_device_train_batch_size)
        while group := next_group(lanes):
            chosen, count = chosen_rows(group), group[0].batch_size
            try:
                with norms_frozen(self._norms, count == 1):
                    gradients, losses = stacked.gradients(
                        phase, chosen, stacked_batch(group, packed), [lane.generators.device for lane in group]
                    )
                pull([gradients[name] for name in pull.names], [trained[name][chosen] for name in pull.names])
                if any(a in gradients or b in gradients for a, b in factors):
                    part = {name: stacked.tensors[name][chosen] for pair in factors for name in pair}
                    change_stacked(changes, factors, part, gradients)
                if longest:
                    clip_weights_stacked(weights, gradients, longest)
                if args.max_grad_norm is not None:
                    clip_stacked(gradients.values(), args.max_grad_norm)
                optimizer.step(chosen, {trained[name]: gradients[name] for name in phase})
            except Exception as error:  # each is trained alone, and the one whose fault it is fails there
                self._note(error, len(group))
                for lane in group:
                    lane.leave()
                continue
            totals[chosen] += losses * count
            for lane in group:
                lane.advance()
        return totals.cpu().double() / torch.tensor([max(1, lane.examples_seen) for lane in lanes])

    def _results(
        self,
        client_ids: list[ClientId],
        lanes: Sequence[Lane],
        privates: Sequence[PrivateState],
        used: UsedSlices | None,
        stacked: StackedModel,
        losses: Tensor,
        state: ServerState,
    ) -> dict[int, Outcome]:
        usages = self._usages(lanes, stacked, used)
        deltas: dict[str, Sequence[Tensor]] = {}
        for name, old in state.tensors.items():
            if name in stacked.tensors:
                deltas[name] = _moved(name, stacked.tensors[name], old, used).unbind()
            else:  # what they do not use
                deltas[name] = [torch.zeros_like(old)] * len(lanes)
        private = {
            # A router of which only a part was there has not trained.
            name: [own[name] for own in privates] if used and name in used.axes else stacked.tensors[name]
            for name in self._groups.private
        }
        return {
            lane.position: (
                ClientUpdate(
                    client_id=client_id,
                    round=state.round + 1,
                    num_examples=lane.num_examples,
                    usage=None if usages is None else usages[lane.row],
                    deltas={name: delta[lane.row] for name, delta in deltas.items()},
                    train_loss=float(losses[lane.row]),
                ),
                {name: value[lane.row].clone() for name, value in private.items()},
            )
            for client_id, lane in zip(client_ids, lanes, strict=True)
            if not lane.failed
        }

    def _note(self, error: Exception, count: int) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        logger.info("%d clients could not be trained side by side, and are trained alone: %s", count, self.failure)

    def _usages(self, lanes: Sequence[Lane], stacked: StackedModel, used: UsedSlices | None) -> Tensor | None:
        """π̂ᵏ_c Nᵏ of every client, (clients, L, C)."""
        if not self._groups.clustered:
            return None
        mixtures = (stacked.mixtures() if used is None else used.mixtures).cpu().double()
        counts = torch.tensor([lane.num_examples for lane in lanes])
        return mixtures.reshape(len(lanes), -1, mixtures.shape[-1]) * counts.view(-1, 1, 1)


def _fitting(private: Tensor, held: Tensor) -> Tensor:
    if private.shape != held.shape:
        raise ValueError(f"the client's own tensor has shape {tuple(private.shape)}, the model's {tuple(held.shape)}")
    return private.to(held)


def _moved(name: str, new: Tensor, old: Tensor, used: UsedSlices | None) -> Tensor:
    """By how much each client has moved a tensor of the server's, (clients, ...)."""
    if used is None or name not in used.axes:
        return _difference(new, old)
    return used.scattered(name, _difference(new, used.for_each(name, old)), old)


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """New − old in the server's precision, where old is what the model could hold of it."""
    return new.to(old.dtype) - old.to(new.dtype)
