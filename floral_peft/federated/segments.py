"""Segments: files of many small records, each checked by its digest and found without reading the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from floral_peft.federated.files import Draft, digest
from floral_peft.federated.seeding import ClientId


SUFFIX = ".segment"
_LENGTH = 8  # bytes that tell the index's length


class StoreError(RuntimeError):
    """Private state on disk is damaged or missing, or cannot be written."""


class Place(NamedTuple):
    """Where a record is in its segment.

    Args:
        start: Its first byte.
        length: Its number of bytes.
        digest: The SHA-256 of these.
    """

    start: int
    length: int
    digest: str


@dataclass(frozen=True, eq=False)
class Segment:
    """A file of records, which never changes.

    The records stand one after the other; an index in JSON follows, and its length in eight bytes. The file's name
    ends in the index's digest, and the index holds the records': no part of it can change unnoticed.

    Args:
        path: The file, `<round>-<digest of the index>.segment`.
        places: Client id → where its record is.
    """

    path: Path
    places: Mapping[ClientId, Place]

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Read a segment's index.

        Raises:
            StoreError: The file is missing or damaged.
        """
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(max(0, size - _LENGTH))
                length = int.from_bytes(file.read(_LENGTH), "little")
                start = size - _LENGTH - length
                file.seek(max(0, start))
                index = file.read(length) if start >= 0 else b""
        except OSError as error:
            raise StoreError(
                f"{path}, which holds clients' private state, cannot be read: {error.strerror}."
            ) from error
        damaged = StoreError(
            f"{path}, which holds clients' private state, is damaged; resume from an older checkpoint."
        )
        if digest(index) != path.stem.split("-")[-1]:
            raise damaged
        try:
            places = {client_id: Place(*place) for client_id, *place in json.loads(index)}
            fits = all(
                type(place.start) is type(place.length) is int
                and 0 <= place.start <= place.start + place.length <= start
                for place in places.values()
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged from error
        if not fits:
            raise damaged
        return cls(path, places)

    def read(self, client_id: ClientId) -> bytes:
        """A client's record.

        Raises:
            StoreError: The file is missing or the record is damaged.
        """
        place = self.places[client_id]
        try:
            with open(self.path, "rb") as file:
                file.seek(place.start)
                content = file.read(place.length)
        except OSError as error:
            raise StoreError(f"client {client_id!r}: {self.path} cannot be read: {error.strerror}.") from error
        if digest(content) != place.digest:
            raise StoreError(
                f"client {client_id!r}: the private state in {self.path} is damaged; resume from an older checkpoint."
            )
        return content


class SegmentDraft:
    """A segment that is being written.

    Args:
        folder: Where it will be.
        round: The round that it is of.
    """

    def __init__(self, folder: Path, round: int) -> None:
        self.round = round
        self._folder = folder
        self._draft = Draft(folder / f"{round}{SUFFIX}")
        self.places: dict[ClientId, Place] = {}

    def add(self, client_id: ClientId, record: bytes) -> None:
        """Append a client's record. A second one of the same client replaces the first."""
        self.places[client_id] = Place(self._draft.size, len(record), digest(record))
        self._draft.write(record)

    def publish(self) -> Segment:
        """Complete the file."""
        index = json.dumps([[client_id, *place] for client_id, place in self.places.items()]).encode()
        self._draft.write(index + len(index).to_bytes(_LENGTH, "little"))
        path = self._folder / f"{self.round}-{digest(index)}{SUFFIX}"
        self._draft.publish(path, durable=False)
        return Segment(path, self.places)

    def discard(self) -> None:
        """Delete the file, unless it is complete."""
        self._draft.discard()
