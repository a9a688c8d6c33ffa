"""A run's folder, which only the main process touches: what belongs together is read, kept and dropped together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from floral_peft.federated.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_rounds,
    discard_checkpoints,
    find_checkpoint,
    load_checkpoint,
    private_files,
    prune_checkpoints,
    save_checkpoint,
    saved_adaptors,
)
from floral_peft.federated.identity import Identity
from floral_peft.federated.records import Records
from floral_peft.federated.server import ServerState
from floral_peft.federated.store import PrivateStore


class RunFolder:
    """The checkpoints, the clients' private state and the records of a run, at one round.

    Args:
        path: The folder.
        store: The private state in it.
        records: The records in it.
        limit: Keep only this many newest checkpoints; None: all.
    """

    def __init__(self, path: Path, store: PrivateStore, records: Records, limit: int | None) -> None:
        self._path = path
        self._store = store
        self._records = records
        self._limit = limit

    def first(
        self, wanted: str | Path | bool | None, held: ServerState, run: Identity, overwrite: bool, rounds: int
    ) -> Checkpoint:
        """What a training begins with.

        Args:
            wanted: The checkpoint to resume from, as `find_checkpoint` takes it; None or False: none.
            held: The state that the model holds, for a run that begins anew.
            run: What defines the run.
            overwrite: Whether an earlier run in the folder may be given up.
            rounds: How many rounds the training is to have.

        Raises:
            CheckpointError: There is no such checkpoint, it does not load, or it is of a later round than the last.
            ValueError: The folder holds another run.
        """
        if wanted:
            found = load_checkpoint(find_checkpoint(self._path, wanted), held, run)
            done = found.server.round
            if done > rounds:
                raise CheckpointError(
                    f"{self._path / f'checkpoint-{done}'} has {done} rounds behind it, and rounds={rounds} are asked "
                    "for: ask for more, or resume from an earlier checkpoint by its name."
                )
            return found
        if not overwrite:
            self._check_unused()
        return Checkpoint(held)

    def adaptors(self, wanted: str | Path | bool, run: Identity) -> tuple[list[int], bool]:
        """The adaptors that the checkpoint to resume from holds: see `saved_adaptors`."""
        return saved_adaptors(find_checkpoint(self._path, wanted), run)

    def go_back(self, round: int, best: int | None) -> None:
        """Forget what an earlier run has written after a round.

        Args:
            round: The round; 0 forgets everything.
            best: The round of the best checkpoint.
        """
        kept = private_files(self._path, [k for k in checkpoint_rounds(self._path) if k <= round])
        self._store.restore(kept[round] if round else (), kept)
        discard_checkpoints(self._path, after=round)
        self._prune(best)  # a crash may have come before it
        self._store.sweep()
        self._records.start(round)

    def save(self, server: ServerState, remembered: Mapping[str, Any], run: Identity, best: int | None) -> None:
        """Save a checkpoint, then delete those above the limit and the private state that only they needed.

        Args:
            server: The server's state; the clients' is the store's.
            remembered: What else a resumed run must know.
            run: What defines the run.
            best: The round of the best checkpoint, which stays.
        """
        checkpoint = Checkpoint(server, private=self._store.snapshot(server.round), trainer=remembered)
        save_checkpoint(self._path, checkpoint, run)
        self._prune(best)

    def take(self, round: int, reference: ServerState, run: Identity) -> ServerState:
        """The server's state of a checkpoint's round; the store holds the clients' of that round from then on.

        Args:
            round: The checkpoint's round.
            reference: As of `load_checkpoint`.
            run: What defines the run.
        """
        checkpoint = load_checkpoint(self._path / f"checkpoint-{round}", reference, run)
        self._store.restore(checkpoint.private, private_files(self._path, checkpoint_rounds(self._path)))
        self._store.sweep()
        return checkpoint.server

    def _prune(self, best: int | None) -> None:
        prune_checkpoints(self._path, self._limit, spare=[] if best is None else [best])
        self._store.keep(checkpoint_rounds(self._path))

    def _check_unused(self) -> None:
        where = f"output_dir={str(self._path)!r} holds"
        remedy = "choose another output_dir, or give that run up: overwrite_output_dir=True (--overwrite_output_dir)."
        if checkpoint_rounds(self._path):
            remedy = f"go on with it by train(resume_from_checkpoint=True) (--resume_from_checkpoint true), {remedy}"
            raise ValueError(f"{where} the checkpoints of an earlier run: {remedy}")
        if not self._records.started and (self._records.on_disk() or self._store.holds_any()):
            raise ValueError(f"{where} the records or the clients' state of an earlier run: {remedy}")
