"""The clients' private state on disk: the simulation's stand-in for each client's own storage."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import save as save_arrays
from safetensors.torch import load, save
from torch import Tensor

from floral_peft.federated.files import is_temporary, remove, sync
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.segments import SUFFIX, Segment, SegmentDraft, StoreError


logger = logging.getLogger(__name__)

#: What numpy has, too: its way to safetensors is the faster one.
_COMMON = frozenset({torch.float32, torch.float64, torch.int64})


class PrivateStore:
    """Client id → private tensors, as of the last committed round.

    A round's clients are stored in one file, a segment, which gets its name when the round is committed: a round
    counts as a whole or not at all. Ids are JSON in it and never become paths, so any id is safe. A checkpoint tells
    the segments that it needs, so no file can be lost or exchanged unnoticed.

    A commit costs O(cohort). A segment that holds nobody's newest state is deleted. Where more than half of what is
    stored has been replaced, the commit moves what is left of the emptiest segments into its own; so the files hold at
    most twice the newest states, and for each checkpoint at most twice those of its time. In memory there is the place
    of each client that has trained.

    Files are complete at any instant; `snapshot` makes them survive a loss of power too.

    Args:
        folder: Where the segments are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segments: dict[Segment, int] = {}  # in the order of their commits → how many newest states it holds
        self._newest: dict[ClientId, Segment] = {}
        self._draft: SegmentDraft | None = None  # of the round that is not committed yet
        self._pinned: dict[int, frozenset[str]] = {}  # a checkpoint's round → the names of the segments that it needs
        self._dropped: set[str] = set()  # files that are deleted once no checkpoint needs them
        self._unsynced: set[Path] = set()

    def get(self, client_id: ClientId) -> dict[str, Tensor] | None:
        """A client's state.

        Returns:
            Tensors on the CPU, or None for a client that has not trained.

        Raises:
            StoreError: The file is damaged or missing.
        """
        segment = self._newest.get(client_id)
        if segment is None:
            return None
        try:
            return load(segment.read(client_id))
        except SafetensorError as error:
            raise StoreError(
                f"client {client_id!r}: its state in {segment.path} is no safetensors: {error}."
            ) from error

    def clients(self) -> Iterable[ClientId]:
        """The clients that have trained."""
        return self._newest.keys()

    def put(self, client_id: ClientId, round: int, state: Mapping[str, Tensor]) -> None:
        """Store a client's state after a round that is not committed yet. Without private tensors there is no file.

        Args:
            client_id: The client.
            round: The round that it trained in.
            state: Its private tensors.

        Raises:
            StoreError: The disk is full, or does not let us write.
        """
        if not state:
            return
        with self._writing():
            if self._draft is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._draft = SegmentDraft(self._folder, round)
            self._draft.add(client_id, _record(state))

    def commit(self) -> None:
        """The round is done: what was put counts, and files that nothing needs any more are deleted.

        Raises:
            StoreError: The disk is full, or a file is damaged.
        """
        if self._draft is not None:
            with self._writing():
                for segment in self._wasteful(self._draft):
                    for client_id in segment.places:
                        if self._newest[client_id] is segment and client_id not in self._draft.places:
                            self._draft.add(client_id, segment.read(client_id))
                segment = self._draft.publish()
            self._draft = None
            self._unsynced.add(segment.path)
            self._take(segment)
        self._delete_unneeded()

    def rollback(self) -> None:
        """The round failed: what was put is forgotten."""
        if self._draft is not None:
            self._draft.discard()
            self._draft = None

    def snapshot(self, round: int) -> list[str]:
        """Keep the committed state for a checkpoint, and wait until it is on the disk.

        Args:
            round: The checkpoint's round. Its files stay until `keep` is not told this round.

        Returns:
            What [`restore`][PrivateStore.restore] needs to come back to it: the names of the files.

        Raises:
            StoreError: The disk is full.
        """
        with self._writing():
            for path in self._unsynced:
                sync(path)
            if self._unsynced:
                sync(self._folder)
                sync(self._folder.parent)
        self._unsynced.clear()
        names = [segment.path.name for segment in self._segments]
        self._pinned[round] = frozenset(names)
        return names

    def keep(self, checkpoints: Collection[int]) -> None:
        """Delete the files that only other checkpoints needed, which are gone.

        Args:
            checkpoints: The rounds of those that are left.
        """
        self._pinned = {round: names for round, names in self._pinned.items() if round in checkpoints}
        self._delete_unneeded()

    def restore(self, names: Sequence[str] = (), pinned: Mapping[int, Iterable[str]] | None = None) -> None:
        """Go back to the state of a checkpoint; without names, to that before the first round.

        Nothing is deleted before `sweep`.

        Args:
            names: What `snapshot` returned.
            pinned: The same of every checkpoint that is to be kept, by round.

        Raises:
            StoreError: A file is damaged or missing.
        """
        self.rollback()
        segments = [Segment.open(self._folder / Path(name).name) for name in names]
        self._segments, self._newest = {}, {}
        for segment in segments:
            self._take(segment)
        self._pinned = {round: frozenset(needed) for round, needed in (pinned or {}).items()}
        self._dropped.clear()
        self._unsynced.clear()

    def sweep(self) -> None:
        """Delete the store's files that neither the state nor a checkpoint needs, such as a killed run leaves."""
        self._dropped = {path.name for path in self._files()}
        self._delete_unneeded()

    def holds_any(self) -> bool:
        """Whether the folder holds the state of any client, of this run or another."""
        return any(path.suffix == SUFFIX for path in self._files())

    def _take(self, segment: Segment) -> None:
        """A segment is the newest: its clients' older states do not count any more."""
        self._segments[segment] = len(segment.places)
        for client_id in segment.places:
            older = self._newest.get(client_id)
            if older is not None:
                self._segments[older] -= 1
                if self._segments[older] == 0:
                    del self._segments[older]
                    self._dropped.add(older.path.name)
            self._newest[client_id] = segment

    def _wasteful(self, draft: SegmentDraft) -> list[Segment]:
        """The segments to be emptied into a draft, so that at most half of all records are out of date."""
        live = dict(self._segments)
        for client_id in draft.places:
            if client_id in self._newest:
                live[self._newest[client_id]] -= 1
        newest = len(draft.places) + sum(live.values())
        records = len(draft.places) + sum(len(segment.places) for segment, left in live.items() if left)
        found = []
        for segment in sorted(live, key=lambda segment: live[segment] / len(segment.places)):
            if records <= 2 * newest:
                break
            if live[segment]:
                found.append(segment)
                records -= len(segment.places) - live[segment]
        return found

    def _delete_unneeded(self) -> None:
        needed = {segment.path.name for segment in self._segments}.union(*self._pinned.values())
        for name in sorted(self._dropped - needed):
            try:
                remove(self._folder / name)
            except OSError as error:  # nothing is lost by it: it is tried again
                logger.warning("%s, which is not needed any more, cannot be deleted: %s", self._folder / name, error)
                continue
            self._dropped.discard(name)
            self._unsynced.discard(self._folder / name)

    def _files(self) -> Iterator[Path]:
        if self._folder.is_dir():
            yield from (path for path in self._folder.iterdir() if path.suffix == SUFFIX or is_temporary(path))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"clients' private state cannot be written in {self._folder}: {error.strerror}. The state before this "
                "round is untouched: make room and resume from the newest checkpoint."
            ) from error


def _record(state: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors."""
    held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if all(value.dtype in _COMMON for value in held.values()):
        return save_arrays({name: value.numpy() for name, value in held.items()})
    return save(held)
