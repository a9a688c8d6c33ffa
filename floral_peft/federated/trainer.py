"""FederatedTrainer: arranges the rounds, the evaluations, the checkpoints and the callbacks of one run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, default_data_collator
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from floral_peft.federated.adaptors import Adaptors
from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.arrivals import Arrivals
from floral_peft.federated.batches import Collator
from floral_peft.federated.best import exported, note_evaluation, restore
from floral_peft.federated.callbacks import RoundFlowCallback, RoundProgressCallback
from floral_peft.federated.checks import check_callbacks, check_types
from floral_peft.federated.clients import Clients
from floral_peft.federated.cohort import CohortTraining
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.evaluation import ComputeMetrics, Metrics, evaluate_client, evaluate_clients, summarize
from floral_peft.federated.forward import LossFunction
from floral_peft.federated.groups import ParameterGroups, tensors_of
from floral_peft.federated.identity import Identity, differing, identity
from floral_peft.federated.lock import locked
from floral_peft.federated.method import Method, get_method
from floral_peft.federated.personal import Personalizing
from floral_peft.federated.precision import TrainerAccelerator, checkpoint_gradients
from floral_peft.federated.probe import probe
from floral_peft.federated.processes import Message, ProcessError
from floral_peft.federated.publishing import Publishing
from floral_peft.federated.records import Record, Records, round_logs, round_record, train_metrics
from floral_peft.federated.rounds import Outcome, RoundReport, run_round
from floral_peft.federated.routers import Routers
from floral_peft.federated.routing import RouterUpdate
from floral_peft.federated.routing.health import REMEDIES, stuck_at_uniform
from floral_peft.federated.run_folder import RunFolder
from floral_peft.federated.seeding import ClientId, derive_seed, generators_kept
from floral_peft.federated.server import ServerSettings, ServerState
from floral_peft.federated.stopwatch import Stopwatch
from floral_peft.federated.store import PrivateStore
from floral_peft.federated.turn import EvidenceError, Turn
from floral_peft.federated.visitor import Visitor, modes_kept
from floral_peft.federated.workplace import Workplace


logger = logging.getLogger(__name__)

_NO_TEST = 'no client has examples in a split "test"; from_column and from_partition take test_size.'


class FederatedTrainer(Publishing, Personalizing):
    """Trains one model over many clients, in rounds.

    Started by torchrun or accelerate launch, every process makes the same trainer and the same calls; they share the
    clients of each round and of each evaluation, and only the first of them touches `output_dir`.

    ```python
    trainer = FederatedTrainer(model, FederatedArguments(output_dir="out", rounds=100), clients, method="floral")
    trainer.train()
    trainer.evaluate()["eval_accuracy_worst_decile"]
    with model.client("hamlet"):
        model.generate(...)
    ```

    Args:
        model: A PEFT model with FLORAL adaptors; for methods without routers any `nn.Module`. It is trained in place.
        args: The run's settings.
        dataset: The clients.
        method: A registered method's name, or a [`Method`].
        data_collator: Makes a batch from a list of examples. transformers' `default_data_collator` by default.
        compute_metrics: `EvalPrediction` → metrics, called for each client. The accuracy by default, for classifiers.
        callbacks: transformers' callbacks. They are called as its `Trainer` does; a round is a step.
        loss_fn: `loss_fn(outputs, labels)`, for models that do not return their loss. Cross entropy by default, for
            classifiers.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The method does not fit the model, or the settings do not fit the dataset.
        ProcessError: Another process has failed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FederatedArguments,
        dataset: FederatedDataset,
        method: str | Method = "floral",
        data_collator: Collator | None = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        functions = {"data_collator": data_collator, "compute_metrics": compute_metrics, "loss_fn": loss_fn}
        check_types(model, args, dataset, **functions)
        check_callbacks(callbacks, args)
        self.args = args
        self.dataset = dataset
        self.method = get_method(method)
        self._cohort_size = args.cohort_size(len(dataset))
        if args.min_clients > self._cohort_size:
            raise ValueError(
                f"min_clients={args.min_clients} is more than the {self._cohort_size} clients of a round."
            )
        self.output_dir = Path(args.output_dir)
        self.accelerator = TrainerAccelerator(args)
        self.processes = self.accelerator.processes
        self.model: Any = model.to(self.accelerator.device)
        if args.gradient_checkpointing:
            checkpoint_gradients(model)
        self.processes.copy_from_main(tensors_of(model).values())
        self._collator: Collator = data_collator or default_data_collator
        self._compute_metrics = compute_metrics
        self._groups = ParameterGroups.of(model, self.method)
        self._forward = self.method.forward(model, loss_fn)
        self._update = self.method.router_update(args, self._cohort_size / len(dataset))
        own = self.method.arrival(args)
        if own is not None or args.optimal_routing:
            self._update = RouterUpdate(args)
        # Clients look at their examples together where the model is the same for all of them but for their routers.
        routers = {name for name, role in self._groups.roles.items() if role.kind == "router"}
        alike = own is None and routers.issuperset(self._groups.private) and self._forward.splits
        self._arrivals = Arrivals(own or self._update.arrival(), self._update.examined if alike else None)
        settled = self._update.settle(args, {}, 0)
        self._forward.discount_labels(bool(settled.label_prior))
        given = self._arrivals.arrival is not None
        self._routers = Routers.of(
            model, dataset.clusters, args.optimal_routing, args.stateless, given, self._update.settings
        )
        self._visitor = Visitor(model, self._groups)
        start = derive_seed(args.seed, "adaptors")
        self._adaptors = Adaptors(
            model, self._routers, self._visitor, self._groups, self._update, self.processes, len(dataset), start
        )
        if self._routers is not None:
            self._routers.remember()
        self._place = Workplace(
            model, self._visitor, self._forward, self._groups, settled, self.accelerator, self._collator
        )
        self._store = PrivateStore(self.output_dir / "private")
        self._clients = Clients(
            dataset,
            self._place,
            self._routers,
            self._adaptors,
            self._arrivals,
            self._store,
            self.processes,
            self._cohort_size,
        )
        self._records = Records(self.output_dir / "records.jsonl", written=self.processes.is_main)
        self._folder = RunFolder(self.output_dir, self._store, self._records, args.save_total_limit)
        self._round = 0
        self._visiting = self._warned = False
        self.client_metrics: dict[ClientId, Metrics] = {}
        self.state = TrainerState(
            max_steps=args.rounds,
            log_history=self._records.items,
            is_world_process_zero=self.processes.is_main,
            is_local_process_zero=self.accelerator.is_local_main_process,
        )
        self.control = TrainerControl()
        shown: list[Any] = [] if args.disable_tqdm else [RoundProgressCallback]
        every = [RoundFlowCallback, *shown, *(callbacks or [])]
        self.callback_handler: Any = CallbackHandler(every, model, None, None, None)
        self._event("on_init_end")
        self._made_of = identity(args, self.method.name, dataset, model)

    @property
    def _identity(self) -> Identity:
        now = identity(self.args, self.method.name, self.dataset, self.model)
        # Of the adaptors, what they were when the run began.
        return now | {name: value for name, value in self._made_of.items() if name.startswith("FloralConfig.")}

    @property
    def records(self) -> list[Record]:
        """One dictionary per round and per evaluation, in order, as in `records.jsonl`. Aggregates only."""
        return self._records.items

    @property
    def _settings(self) -> ServerSettings:
        """What a round needs to know; routers have the shape that the model's have now."""
        return ServerSettings(
            groups=self._groups,
            routers=self._routers.shape if self._routers and self._groups.clustered else None,
            build_optimizer=self.args.build_server_optimizer,
            min_clients=self.args.min_clients,
            max_update_norm=self.args.max_update_norm,
            clusters=self.dataset.clusters,
            product=self.args.adaptor_aggregation == "product",
            router_update=self._update,
        )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train for `args.rounds` rounds. Afterwards the model holds the trained tensors and all routers by name.

        Where clients find their routers on arrival, as by default, all of them find theirs once more at the end, for
        the adaptors that there are then: what a client found at its last visit may be many rounds old.

        If a round fails or is interrupted, the model and the clients' state are those after the round before, and the
        routers in the model those of each client's last visit.

        Args:
            resume_from_checkpoint: A checkpoint's folder in `output_dir`, or True for the newest;
                `args.resume_from_checkpoint` by default. Without it, training starts at round 0 from what the model
                holds.

        Returns:
            `TrainOutput(global_step, training_loss, metrics)`, where a step is a round.

        Raises:
            CheckpointError: There is no such checkpoint, it does not load, or one cannot be written.
            NotADirectoryError: `output_dir` is a file, or inside one.
            OutputDirInUseError: Another trainer is training in `output_dir`.
            StoreError: The clients' private state is damaged, or cannot be written.
            TooFewClientsError: In some round fewer than `min_clients` updates arrived.
            ValueError: `output_dir` holds an earlier run, or the examples do not fit the model.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with ExitStack() as stack:
            self.processes.on_main(partial(stack.enter_context, locked(self.output_dir)))
            return self._train(wanted)

    def _train(self, wanted: str | Path | bool | None) -> TrainOutput:
        server = self._first_state(wanted)
        if self.args.eval_steps is not None and not any(self.dataset.num_examples(k, "test") for k in self.dataset):
            raise ValueError(f"eval_steps={self.args.eval_steps}: {_NO_TEST}")
        with self._visit():
            probe(self.model, self._forward, self.dataset, self._collator, self.accelerator.device)
        self._round, self.state.max_steps = server.round, self.args.rounds
        self.processes.on_main(partial(self._folder.go_back, server.round, self.state.best_global_step))
        self._records.items[:] = self.processes.broadcast((self._records.items, {}))[0]
        if self.args.report_to:
            simple = {k: v for k, v in self.args.to_dict().items() if isinstance(v, (bool, int, float, str))}
            self.accelerator.init_trackers("floral_peft", simple)
        began = time.perf_counter()
        try:
            with self._visit():
                reports = self._train_rounds(server)
                found = self._routers_found()
        except BaseException:
            if self.processes.count == 1:  # others may be gone
                self._install_routers()
            raise
        finally:
            seconds = time.perf_counter() - began
            self.accelerator.finish_trackers()
        self._install_routers(found)
        return TrainOutput(self.state.global_step, *train_metrics(reports, seconds))

    def evaluate(self) -> Metrics:
        """Evaluate every client that has a split "test", each with its own mixture.

        A client that raises is left out, and the record says so.

        Returns:
            `eval_loss`, `eval_accuracy` and the like, means over examples; for each of them `..._client_mean` over
            clients and `..._worst_decile` over the worst tenth of the clients. One client's own metrics are in
            `client_metrics`.

        Raises:
            ValueError: No client has examples for evaluation, or all of them fail.
        """
        began = time.perf_counter()
        with self._visit():
            turns = self._clients.everybody("test", self._round)
            self.client_metrics, failed = evaluate_clients(turns, self._evaluate_client, self.processes, self.dataset)
        if not self.client_metrics:
            raise ValueError(f"no client can be evaluated; {next(iter(failed.values()))}" if failed else _NO_TEST)
        summary = summarize(self.client_metrics)
        counted = {
            "clients_evaluated": len(self.client_metrics),
            "clients_failed": {str(client_id): failure.kind for client_id, failure in failed.items()},
            "seconds": {"evaluate": time.perf_counter() - began},
        }
        self._records.add({"event": "evaluate", "round": self._round, **summary, **counted})
        self._log(summary)
        self._event("on_evaluate", summary)
        return summary

    def mixtures(self) -> tuple[list[ClientId], Tensor]:
        """All clients' mixtures.

        Where clients find theirs on arrival, one whose examples cannot be looked at has the one that it had before.

        Returns:
            The clients' ids, and their weights of the adaptors, shape (K, C); rows sum to 1.

        Raises:
            ValueError: The model has no routers.
        """
        if self._routers is None:
            raise ValueError("the model has no FLORAL adaptors, so there are no mixtures.")
        with self._visit():
            found = self._clients.trained_routers(self._routers.name, self._round)
            mixtures = self._routers.mixtures(self.dataset.ids, found)
        return list(self.dataset), mixtures

    def _evaluate_client(self, turn: Turn) -> Metrics | None:
        """None for a client without examples for evaluation."""
        if not self.dataset.num_examples(turn.client_id, "test"):
            return None
        with self._evaluated_as(turn.client_id, turn):
            return evaluate_client(
                self.model,
                self._forward,
                self.dataset[turn.client_id]["test"],
                self._collator,
                self.args.per_device_eval_batch_size,
                self.accelerator,
                self._compute_metrics,
            )

    @contextmanager
    def _evaluated_as(self, client_id: ClientId, turn: Turn | None = None) -> Iterator[None]:
        """Within, the model is what is evaluated for a client, whose turn it may be already."""
        turn = turn or self._clients.turn(client_id, self._clients.private(client_id), self._round)
        try:
            turn.private = self._arrivals(turn).private
        except EvidenceError as error:
            logger.warning("%s; it is evaluated with the router that it had", error)
        self._visitor.load(turn.private)
        with self.method.evaluated(turn):
            yield

    def _train_rounds(self, server: ServerState) -> list[RoundReport]:
        reports: list[RoundReport] = []
        clock = Stopwatch()
        training = self._training(server)

        def train(cohort: Sequence[ClientId], state: ServerState) -> Iterator[tuple[ClientId, Outcome]]:
            return self._clients.train(training, cohort, state, clock)

        self._event("on_train_begin")
        while self._round < self.args.rounds and not self.control.should_training_stop:
            self._event("on_step_begin")
            cohort = self._clients.cohort(server.round + 1)
            clock.reset()
            try:
                new, report = run_round(
                    server, cohort, train, self._clients.keep, self._settings, self.processes, clock
                )
                self.processes.on_main(self._store.commit)
                clock.lap("store")
                server = new
            except BaseException:
                self._store.rollback()
                raise
            finally:
                self._rest(server)
            clock.lap("server step")
            report = self._looked_at(report, server)
            server, changes = self._adaptors.after_round(server)
            if changes:
                report = replace(report, **changes)
                training = self._training(server)
            reports.append(report)
            self._end_round(server, report)
        if server.wide:  # a callback has stopped the training; its checkpoint can still go on with the search
            server, _ = self._adaptors.end_search(server)
            self.client_metrics = {}
            self._rest(server)
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            self._take_best(self.state.best_global_step)
        self._event("on_train_end")
        return reports

    def _end_round(self, server: ServerState, report: RoundReport) -> None:
        self._records.add(round_record(report))
        self._event("on_step_end")
        if self.control.should_log:
            self._log(round_logs(report))
        # A callback may make any round the last.
        if self.control.should_evaluate or (self.control.should_training_stop and self.args.eval_steps):
            found = self.evaluate()
            best = not server.wide and note_evaluation(self.args, self.state, found)
            self.control.should_save |= best and self.args.load_best_model_at_end
        if self.control.should_save or (self.control.should_training_stop and self.args.save_steps):
            self._save(server)

    def _looked_at(self, report: RoundReport, server: ServerState) -> RoundReport:
        """A round's report with what can be said of the adaptors; warns, once, of routers that get nowhere."""
        participations = server.round * self._cohort_size / len(self.dataset)
        if not self._warned and stuck_at_uniform(report.router_entropy, len(server.adaptors), participations):
            self._warned = True
            remedy = REMEDIES.get(self._update.name, REMEDIES["gradient"])
            logger.warning("round %d: the clients' mixtures are still uniform; %s.", report.round, remedy)
        found = self._update.regrets(server.routing) if report.usage is not None else None
        return report if found is None else replace(report, regrets=found.round(decimals=4).tolist())

    def _training(self, server: ServerState) -> CohortTraining:
        """How the next rounds' clients are trained; some of them may be, as a trial, to choose."""
        self._rest(server)
        training = self._clients.training(server, self.output_dir / "cohort.json")
        self._rest(server)
        return training

    def _rest(self, server: ServerState) -> None:
        """Between rounds the model holds the server's tensors and no client's; settings are the next round's."""
        self._visitor.load(self._adaptors.untrained, server)
        self._place.args = self._update.settle(self.args, server.routing, server.round)
        self._round = self.state.global_step = server.round
        self.state.epoch = float(server.round)

    @contextmanager
    def _visit(self) -> Iterator[None]:
        """Within, the model visits clients and holds one router; afterwards, whatever happened, it is back.

        Back are the routers that it held, the private tensors that it came with, its modes, and the global generators.
        """
        with ExitStack() as stack:
            if not self._visiting:
                self._visiting = True
                stack.callback(setattr, self, "_visiting", False)
                stack.enter_context(generators_kept(self.accelerator.device))
                stack.enter_context(modes_kept(self.model))
                if self._routers is not None:
                    if self._round == 0:
                        self._routers.remember()
                    stack.enter_context(self._routers.visited())
            # As they are then: adaptors may be fewer.
            stack.callback(lambda: self._visitor.load(self._adaptors.untrained))
            yield

    def _first_state(self, wanted: str | Path | bool | None) -> ServerState:
        """The server's state with which training begins: a checkpoint's, or what the model holds."""
        mine = self._identity
        if not wanted:
            self._adaptors.begin()
        else:
            self._adaptors.fit(*self.processes.on_main(lambda: (self._folder.adaptors(wanted, mine), {}))[0])
        memory = self._update.start(self._routers.shape[-1]) if self._routers is not None else {}
        held = ServerState.of(self.model, self._groups, memory, self._adaptors.alive, self._adaptors.wide)

        def read() -> Message:
            first = self._folder.first(wanted, held, mine, self.args.overwrite_output_dir, self.args.rounds)
            value, tensors = first.server.to_message()
            return (first.trainer, value), tensors

        mains = self.processes.broadcast((mine, {}))[0]
        if (name := differing(mains, mine)) is not None:
            raise ProcessError(
                f"process {self.processes.rank} runs something else than process 0: {name} is {mine[name]!r} here and "
                f"{mains[name]!r} there. Start all processes with the same settings and data."
            )
        (trainer, value), tensors = self.processes.on_main(read)
        restore(trainer, self.state, self.callback_handler.callbacks)
        return held.of_message((value, tensors))

    def _routers_found(self) -> dict[ClientId, Tensor]:
        """The routers of all clients for the adaptors that there are now; of clients that keep nothing, none."""
        if self._routers is None or self.args.stateless:
            return {}
        return self._clients.trained_routers(self._routers.name, self._round)

    def _install_routers(self, found: Mapping[ClientId, Tensor] | None = None) -> None:
        """Put the clients' routers into the model's table, in every process: those found, or else those kept."""
        if self._routers is not None and not self.args.stateless:
            chosen = self._clients.kept_routers(self._routers.name) if found is None else found
            self._routers.install(self.dataset.ids, chosen)

    def _save(self, server: ServerState) -> None:
        if self.state.best_global_step == server.round:
            self.state.best_model_checkpoint = str(self.output_dir / f"checkpoint-{server.round}")

        def write() -> None:
            remembered = exported(self.state, self.callback_handler.callbacks)
            self._folder.save(server, remembered, self._identity, self.state.best_global_step)

        self.processes.on_main(write)
        self._event("on_save")

    def _take_best(self, round: int) -> None:
        """Go back to the best checkpoint: the server's tensors and the clients' private state of its round."""
        folder = self.output_dir / f"checkpoint-{round}"
        self._adaptors.fit(*self.processes.on_main(lambda: (self._folder.adaptors(folder, self._identity), {}))[0])
        held = ServerState.of(self.model, self._groups)

        def read() -> Message:
            return self._folder.take(round, held, self._identity).to_message()

        best = held.of_message(self.processes.on_main(read))
        self._visitor.load(self._adaptors.untrained, best)
        self._round = best.round
        self.client_metrics = {}  # they are of the last round

    def _log(self, logs: Mapping[str, Any]) -> None:
        if self.args.report_to:
            self.accelerator.log(dict(logs), step=self._round)
        self._event("on_log", dict(logs))

    def _event(self, name: str, *given: Any) -> None:
        """Tell the callbacks of every process; where they want different things, main's count."""
        self.control = getattr(self.callback_handler, name)(self.args, self.state, self.control, *given)
        vars(self.control).update(self.processes.broadcast((vars(self.control), {}))[0])
