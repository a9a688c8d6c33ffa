"""The processes of one run: who takes which client, and how they tell each other. Nothing that is sent is pickled."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor


#: What processes send: a value that JSON can hold, and tensors by name.
Message = tuple[Any, Mapping[str, Tensor]]


class ProcessError(RuntimeError):
    """Another process of the run has failed, or has not answered in time."""


class Processes:
    """The processes of a run, which all make the same calls in the same order. By default this one alone.

    Main is process 0: it alone reads and writes files, and what it knows it tells the others.

    Args:
        rank: This process.
        count: How many there are.
        timeout: Seconds to wait for the others.
    """

    def __init__(self, rank: int = 0, count: int = 1, timeout: int = 1800) -> None:
        self.rank = rank
        self.count = count
        self._timeout = timeout
        # Messages go through the CPU, whatever the accelerators use among themselves.
        self._group = _cpu_group(timeout) if count > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reads and writes files."""
        return self.rank == 0

    def broadcast(self, message: Message = (None, {})) -> Message:
        """Main's message, for all. The other processes' own are ignored."""
        if self.count == 1:
            return message
        content = _pack(message) if self.is_main else b""
        with self._answering():
            size = self._sizes(content)[0]
            buffer = _as_tensor(content) if self.is_main else torch.empty(size, dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self._group)
        return _unpack(buffer)

    def scatter(self, messages: Sequence[Message] | None) -> Message:
        """Main gives each process, in the order of their ranks, its message."""
        if self.count == 1:
            return _given(messages)[0]
        contents = [_pack(message) for message in _given(messages)] if self.is_main else []
        with self._answering():
            sizes = torch.tensor([len(content) for content in contents] or [0] * self.count)
            dist.broadcast(sizes, 0, group=self._group)
            if self.is_main:
                for rank, content in enumerate(contents[1:], 1):
                    dist.send(_as_tensor(content), rank, group=self._group)
                return _given(messages)[0]
            buffer = torch.empty(int(sizes[self.rank]), dtype=torch.uint8)
            dist.recv(buffer, 0, group=self._group)
        return _unpack(buffer)

    def gather(self, message: Message) -> Iterator[Message]:
        """On main, every process's message in the order of their ranks, one at a time; nothing elsewhere."""
        if self.count == 1:
            yield message
            return
        content = b"" if self.is_main else _pack(message)
        with self._answering():
            sizes = self._sizes(content)
            if not self.is_main:
                dist.send(_as_tensor(content), 0, group=self._group)
                return
        yield message
        for rank in range(1, self.count):
            buffer = torch.empty(sizes[rank], dtype=torch.uint8)
            with self._answering():
                dist.recv(buffer, rank, group=self._group)
            yield _unpack(buffer)

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, which JSON can hold, in the order of their ranks, on all of them."""
        found = [each for each, _ in self.gather((value, {}))]
        everything: list[Any] = self.broadcast((found, {}))[0]
        return everything

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count == 1:
            return
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
        for device, held in by_device.items():
            flat = torch.cat([tensor.reshape(-1) for tensor in held])
            with self._answering():
                dist.all_reduce(flat, group=self._group_of(device))
            for tensor, summed in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
                tensor.copy_(summed.view(tensor.shape))

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by main's."""
        for tensor in tensors:
            if self.count > 1 and tensor.numel():
                raw = tensor.contiguous().view(-1).view(torch.uint8)
                with self._answering():
                    dist.broadcast(raw, 0, group=self._group_of(tensor.device))
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))

    def on_main(self, function: Callable[[], Message | None]) -> Message:
        """Call a function on main and give its message to all. Where it raises, all processes raise.

        Raises:
            ProcessError: It raised on main, and this is another process.
        """
        if self.count == 1:
            return function() or (None, {})
        if not self.is_main:
            (value, error), tensors = self.broadcast()
            if error is not None:
                raise ProcessError(f"process {self.rank} ends because process 0 failed: {error}")
            return value, tensors
        try:
            value, tensors = function() or (None, {})
        except Exception as error:
            self.broadcast(((None, f"{type(error).__name__}: {error}"), {}))
            raise
        self.broadcast(((value, None), tensors))
        return value, tensors

    def _sizes(self, content: bytes) -> list[int]:
        """The length of every process's content."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
        return [int(size) for size in sizes]

    def _group_of(self, device: torch.device) -> dist.ProcessGroup | None:
        return self._group if device.type == "cpu" else None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count} lost another one: it has ended, or it has not answered within "
                f"ddp_timeout={self._timeout} seconds ({error})"
            ) from error


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """Deal jobs out to processes: the longest first, each to whoever has least to do.

    Args:
        costs: What each job is expected to cost.
        count: Number of processes.

    Returns:
        For each process the positions of its jobs, ascending.
    """
    hands: list[list[int]] = [[] for _ in range(count)]
    least = [(0.0, rank) for rank in range(count)]
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        load, rank = least[0]
        hands[rank].append(position)
        heapq.heapreplace(least, (load + costs[position], rank))
    return [sorted(hand) for hand in hands]


def pack_states(states: Iterable[tuple[Any, Mapping[str, Tensor]]]) -> Message:
    """One message of several values, each with its tensors."""
    values: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for value, state in states:
        values.append([value, list(state)])
        tensors |= {f"{len(values)}.{index}": tensor for index, tensor in enumerate(state.values())}
    return values, tensors


def unpack_states(message: Message) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """What `pack_states` packed."""
    values, tensors = message
    for position, (value, names) in enumerate(values, 1):
        yield value, {name: tensors[f"{position}.{index}"] for index, name in enumerate(names)}


@lru_cache
def _cpu_group(timeout: int) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    if not isinstance(group, dist.ProcessGroup):
        raise ProcessError("torch.distributed gave no process group for the CPU.")
    return group


def _pack(message: Message) -> bytes:
    value, tensors = message
    text = json.dumps(value).encode()
    # Copies, as safetensors takes no tensors that share memory: clients may start with the same ones.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return len(text).to_bytes(8, "little") + text + save(plain)


def _unpack(buffer: Tensor) -> Message:
    content = buffer.numpy().tobytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), load(content[end:])


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _given(messages: Sequence[Message] | None) -> Sequence[Message]:
    if messages is None:
        raise ValueError("main must give every process a message.")
    return messages
