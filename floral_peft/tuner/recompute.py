"""Gradient checkpointing runs layers again during backward: with what state did they run the first time?

Two forward passes for different clients, then one backward: when a checkpointed block is run again, the router long
points elsewhere, and the gradients would be silently wrong. So the state of a pass is noted on the nodes of its
autograd graph, and a layer that finds itself inside a node's backward asks that node.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor


State = TypeVar("State")
_KEY = "floral_peft.state"


class Seen(NamedTuple):
    """What is known of a pass.

    Attributes:
        graded: whether it began with gradients. If not, nothing of it is run again.
        checkpointed: whether some layer of it ran inside a checkpoint.
    """

    graded: bool = True
    checkpointed: bool = False


class Recomputation(Generic[State]):
    """Remembers, for every living autograd graph, the state that its forward pass ran with.

    Attributes:
        seen: what is known of the pass at hand.
    """

    def __init__(self) -> None:
        self._living: weakref.WeakSet[Any] = weakref.WeakSet()
        self.seen = Seen()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recomputation[State]:
        return Recomputation()  # graphs are not copied, so neither is what is known about them

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recomputation, ()

    def remember(self, output: Any, state: State) -> None:
        """Call after a forward pass. Costs a walk over the graph, and only where something was checkpointed."""
        roots: list[Any] = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
        if not roots:
            return
        self._living.add(state)
        for root in roots:
            root.metadata[_KEY] = state  # keeps the state in `_living` exactly as long as the graph
        if self.checkpointed:
            _mark(roots, state)

    @property
    def checkpointed(self) -> bool:
        """Whether some layer of the pass at hand may run again."""
        return self.seen.checkpointed

    def begin(self) -> None:
        """A pass begins."""
        self.seen = Seen(graded=torch.is_grad_enabled())

    def note(self) -> None:
        """A layer runs, as part of a pass: see whether it may run again."""
        if self.seen.graded and not self.seen.checkpointed and _inside_checkpoint():
            self.seen = Seen(checkpointed=True)

    def current(self, default: State) -> State:
        """The state for a layer that runs outside a pass: that of the first run if it runs again, else `default`."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return default
        state = node.metadata.get(_KEY)
        if state is not None:
            return state
        living = list(self._living)
        if len(living) > 1:
            raise RuntimeError(
                "A layer is recomputed in backward (gradient checkpointing) and several forward passes for different "
                "clients are alive, and which one this belongs to cannot be told. Run backward once per forward pass, "
                "or do not nest checkpoints."
            )
        return living[0] if living else default


def _inside_checkpoint() -> bool:
    """Reentrant checkpoints run without grad, the others under hooks on saved tensors."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value))  # a dataclass, or whatever else holds them


def _mark(roots: list[Any], state: object) -> None:
    stack, seen = list(roots), set(roots)
    while stack:
        node = stack.pop()
        node.metadata[_KEY] = state
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
