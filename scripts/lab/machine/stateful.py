"""What a checkpoint keeps of an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor


class Stateful:
    """An object whose attributes named in STATE and LOCAL are saved and restored.

    STATE: what all processes of a run have alike. LOCAL: what each has for itself. A part that has
    a `state_dict` of its own is nested; a tensor is restored in place; anything else must be plain
    (numbers, texts, lists and dicts of them), because checkpoints are loaded without running code.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    LOCAL: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        return self._values(self.STATE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restore(self.STATE, state)

    def local_state(self) -> dict[str, Any]:
        return self._values(self.LOCAL)

    def load_local_state(self, state: dict[str, Any]) -> None:
        self._restore(self.LOCAL, state)

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The own state of process `rank` where another number of processes goes on.

        states: the own states of all processes before. Rank 0 goes on with what all had together.
        """
        return dict(states[0])

    def _values(self, names: Sequence[str]) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in names}
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in values.items()
        }

    def _restore(self, names: Sequence[str], state: dict[str, Any]) -> None:
        for name in names:
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            elif isinstance(value, Tensor):
                value.copy_(state[name])
            else:
                setattr(self, name, state[name])
