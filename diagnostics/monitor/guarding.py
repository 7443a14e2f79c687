"""What a Monitor owes the loop that it watches: nothing of ours ends it, unless the user asked for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diagnostics.hooks import Watcher
from diagnostics.monitor.ledger import LedgerView
from diagnostics.monitor.replicas import Replicas
from diagnostics.records import ContractError, DiagnosisError, DiagnosticsWarning, StepRecord


class Guarded(LedgerView):
    """The part of a Monitor that says what is new, and keeps its own failures away from the loop."""

    _watcher: Watcher
    _replicas: Replicas
    _closed = False
    _inside = False
    _told_failure = False

    def _refuse_if_closed(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"{method} needs an open Monitor; this one is closed: make a new one.")

    def _say(self, record: StepRecord) -> None:
        if self._watcher.failure is not None and not self._told_failure:
            self._told_failure = True
            self._ledger.warn(_switched_off("A hook", self._watcher.failure))
        with self._replicas.raising_together(record):
            self._ledger.announce(record, listening=self._watcher.listening)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Steps inside are ours: the step hooks need not look."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """What goes wrong in here ends the watching and not the user's step, unless the user asked for it."""
        try:
            yield
        except (ContractError, DiagnosisError, DiagnosticsWarning):
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is ours
            self._watcher.failed(error)
            self._replicas.close("failed")
            self._told_failure = True
            self._ledger.warn(_switched_off("Watching", error))


def _switched_off(what: str, error: Exception) -> str:
    return f"{what} failed and was switched off ({type(error).__name__}: {error}); training goes on."
