"""What a checkpoint keeps of an object."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class Stateful:
    """An object whose attributes named in STATE are saved and restored.

    A part that has a `state_dict` of its own is nested; a tensor is restored in place; anything else must be plain
    (numbers, texts, lists and dicts of them), because checkpoints are loaded without running code.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.STATE}
        return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            elif isinstance(value, Tensor):
                value.copy_(state[name])
            else:
                setattr(self, name, state[name])
