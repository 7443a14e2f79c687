"""What a Monitor has to know of an earlier one, so that a run that is resumed goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diagnostics.hooks import Watcher
from diagnostics.monitor.ledger import LedgerView
from diagnostics.monitor.schedule import Schedule, Units

VERSION = 1


class Resumable(LedgerView):
    """The part of a Monitor that is saved and loaded."""

    _units: Units
    _schedule: Schedule
    _watcher: Watcher

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain containers of numbers and text, for ``torch.save`` beside the optimizer's.

        Step counters, shares of clipped steps, the norms of the newest thousand steps, and what clip rules remember:
        with it a resumed run clips exactly as the uninterrupted one. Records, violations and diagnoses are not in it.

        Example:
            >>> import torch
            >>> from diagnostics import Monitor
            >>> model = torch.nn.Linear(1, 1)
            >>> monitor = Monitor(model, torch.optim.SGD(model.parameters()), sinks=[])
            >>> monitor.state_dict()["units"]["optimizer"]["step"]
            0
            >>> monitor.close()
        """
        return {
            "version": VERSION,
            "units": {unit.name: unit.state_dict() for unit in self._units.all},
            "ledger": self._ledger.state_dict(),
            "dense_until": self._schedule.dense_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the Monitor was whose ``state_dict()`` this is.

        Args:
            state: What it returned; the models, optimizers and clip rules must be the same.

        Raises:
            ValueError: If they are not, or if it was written by a later version.
        """
        if state.get("version") != VERSION:
            raise ValueError(f"state must be what Monitor.state_dict() returned; got version {state.get('version')!r}.")
        ours = {unit.name: unit.clipping.kind for unit in self._units.all}
        theirs = {name: saved["rule"] for name, saved in state["units"].items()}
        if ours != theirs:
            raise ValueError(
                f"state must be of a Monitor with the same optimizers and clip rules, {ours}; got {theirs}."
            )
        for unit in self._units.all:
            unit.load_state_dict(state["units"][unit.name])
        self._ledger.load_state_dict(state["ledger"])
        self._schedule.dense_until = int(state["dense_until"])
        self._watcher.recording = self._due()

    def _due(self) -> bool:
        """Whether the step to come is recorded."""
        return any(self._schedule.due(unit.step) for unit in self._units.active)
