"""When alignment ends. Once it has ended it never comes back."""

from __future__ import annotations

NEVER = -1


class FixedTermination:
    """HASTE's default rule: alignment holds while step < τ.

    early_stop_point: τ, or -1 for never.
    stopped_at: the step at which alignment ended; None while it has not. Saved in the checkpoint.
    """

    def __init__(self, early_stop_point: int) -> None:
        self.early_stop_point = early_stop_point
        self.stopped_at: int | None = None

    def due(self, step: int) -> bool:
        """Whether alignment must end before the step with this number, counted from 0."""
        return self.stopped_at is None and self.early_stop_point != NEVER and step >= self.early_stop_point

    def state_dict(self) -> dict[str, int | None]:
        return {"stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self.stopped_at = state["stopped_at"]
