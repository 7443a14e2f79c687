"""The Monitor: clip-and-step, read from top to bottom."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics import statistics
from diagnostics.clipping import rule_of, tensors_of
from diagnostics.clipping.writing import Clipping
from diagnostics.contract import Contract
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.distributed import find_group, speaks
from diagnostics.hooks import Watcher
from diagnostics.monitor import amp, fused
from diagnostics.monitor.asynchronous import Asynchronous, refuse_what_waits
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.facts import Facts
from diagnostics.monitor.ledger import Ledger, ending
from diagnostics.monitor.observation import Seen, as_spent, see
from diagnostics.monitor.options import Clip, Options, models_of, one_number, optimizers_of
from diagnostics.monitor.replicas import Replicas
from diagnostics.monitor.resuming import Resumable
from diagnostics.monitor.schedule import Schedule, Units
from diagnostics.monitor.unit import Unit
from diagnostics.records import ClipRecord, NonFiniteGradientError, RunInfo, StepRecord
from diagnostics.runlog import Run
from diagnostics.sinks import Sink
from diagnostics.sinks.fanout import Fanout
from diagnostics.statistics.reading import Reader


class Monitor(Asynchronous, Resumable):
    """Watches a training loop: gradients by depth, clipping, the loop's own rules.

    Args:
        model: One module, or a mapping of names to modules.
        optimizers: One optimizer or a sequence.
        clip: How :meth:`clip_and_step` clips; None measures only. Several optimizers that are stepped one by one share
            the rule and not its history; a mapping from optimizers, or the names in their records, gives each its own
            rule. In a loop that calls ``optimizer.step()`` itself it says what the loop means to do, and is held
            against what it does if it is a :class:`ClipByNorm`: other rules depend on more than a step shows.
        accumulate: Backward passes that one step is meant to spend.
        scaler: The loop's ``torch.amp.GradScaler``, if it has one.
        nonfinite: What :meth:`clip_and_step` does when gradients are not finite: ``"skip"`` the update, ``"raise"``, or
            ``"step"`` all the same. A closure's step cannot be cancelled and goes on.
        on_violation: What a broken rule of the loop does: ``"warn"``, ``"raise"`` or ``"record"``.
        on_diagnosis: What a confirmed diagnosis at warning or above does, likewise.
        every: Output gradients and update ratios are taken at each of so many steps, at the first 50, and densely after
            an alarm; 0 never, 1 always.
        layers: Regular expression; only layers whose name it matches somewhere are recorded.
        sinks: Where records go; ``"auto"`` is the console, and W&B where a run is active, on rank 0 only.
        thresholds: When a number becomes a diagnosis.
        run: What is known about the run; written to the sinks first.
        process_group: Whose ranks hold replicas that should be equal, which recorded steps compare: None finds it (and
            every rank needs a Monitor), False never communicates. What would raise on one rank then raises on all of
            them, at the next recorded step.
        asynchronous: Whether never to wait for the device. The coefficient stays there, all gradients are multiplied
            by it (by 1 where nothing is to be clipped), and numbers are read a step later. Clips by
            :class:`ClipByNorm` or not at all, raises nothing, and ``nonfinite="skip"`` needs fused optimizers. A norm
            that fp32 cannot hold counts as not finite, and of gradients that are not finite no elements are counted.
        fold: Whether a fused optimizer multiplies the gradients by the clip coefficient as it reads them, which spares
            a pass over all of them. The result may differ from torch's in the last bit.

    Raises:
        ValueError: If an option has a value that it cannot have.
        TypeError: If the model, an optimizer or a sink is something else.

    Example:
        >>> from diagnostics import ClipByNorm
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, optimizer, clip=ClipByNorm(max_norm=1.0), sinks=[]) as monitor:
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     record = monitor.clip_and_step()
        >>> record.step, record.layers[0].layer.name
        (0, 'Linear')
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        clip: Clip = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        nonfinite: str = "skip",
        on_violation: str = "warn",
        on_diagnosis: str = "warn",
        every: int = 10,
        layers: str | None = None,
        sinks: Sequence[Sink] | str = "auto",
        thresholds: Thresholds | None = None,
        run: RunInfo | None = None,
        process_group: Any = None,
        asynchronous: bool = False,
        fold: bool = False,
    ) -> None:
        policies = (nonfinite, on_violation, on_diagnosis)
        self._options = Options(
            clip, accumulate, *policies, every, layers, scaler, thresholds, run, process_group, asynchronous, fold
        )
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        models, stepping = models_of(model), optimizers_of(optimizers)
        fanout = Fanout(sinks if sinks != "auto" or speaks() else [])
        self._catalogue = Catalogue(models, layers)
        self._units = Units(stepping, self._catalogue, clip)
        if asynchronous:
            refuse_what_waits(self._options, self._units)
        self._catalogue.adopt(self._units.together.parameters())
        self._reader = Reader()
        self._schedule = Schedule(every)
        self._own_clip: ClipRecord | None = None
        self._own_step: Seen | None = None
        self._fold: Tensor | None = None
        self._pending = deque()
        self._zeros: AbstractSet[int] = frozenset()
        self._in_range = []
        self._ledger = Ledger(
            run or RunInfo(name=type(next(iter(models.values()))).__name__),
            Contract(self._catalogue.names, accumulate),
            fanout,
            self._options,
            thresholds or Thresholds(),
        )
        group = find_group(process_group, models.values()) if every else None
        self._replicas = Replicas(group, self._catalogue, self._reader, self._schedule, self._ledger.warn)
        self._watcher = Watcher(models, self._catalogue.owners, self._catalogue.tensors(), outputs=every > 0)
        self._watcher.recording = self._schedule.due(0)
        self._scaler_watch = None if self._scaler is None else amp.ScalerWatch(self._scaler, stepping)
        if self._scaler_watch is not None:
            self._watcher.overdue = self._scaler_watch.look
        self._facts = Facts(models, self._catalogue, self._watcher, self._reader, self._units.all)
        for optimizer in stepping:
            self._watcher.watch_steps(optimizer, self._own_step_begins, self._own_step_ends)

    # the step

    def clip_and_step(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        closure: Callable[[], Any] | None = None,
        loss: Tensor | float | None = None,
        metrics: Mapping[str, Tensor | float] | None = None,
    ) -> StepRecord:
        """Unscales, measures, decides, clips if ``clip_coef < 1``, steps, and says what happened.

        It never clears gradients: that is the loop's own act, and is checked.

        Args:
            optimizer: Which one; None steps all in order under one norm and updates the scaler. With several calls the
                caller updates the scaler after the last.
            closure: As ``optimizer.step(closure)`` takes it; gradients are clipped at every evaluation, and the record
                is about the first.
            loss: For the record; a tensor of one element comes with the step's one copy to the host.
            metrics: Further numbers for the record, likewise.

        Returns:
            The record of the step. With ``asynchronous=True`` the newest that is finished, which is an earlier step's;
            None as long as there is none.

        Raises:
            NonFiniteGradientError: If gradients are not finite and ``nonfinite="raise"``; no weight has changed.
            ContractError: If a rule of the loop is broken and ``on_violation="raise"``; the step has been taken.
            DiagnosisError: If a diagnosis was confirmed and ``on_diagnosis="raise"``; the step has been taken.
            RuntimeError: If the Monitor is closed.
            ValueError: If a closure is given where none can be: with a GradScaler, or ``asynchronous=True``.
        """
        self._refuse_if_closed("clip_and_step")
        unit = self._units.of(optimizer)
        given = {"loss": loss, **{f"metrics[{name!r}]": value for name, value in (metrics or {}).items()}}
        numbers = [self._reader.ask(one_number(name, value)) for name, value in given.items()]
        if self._options.asynchronous:
            return self._step_without_waiting(unit, closure, numbers, list(metrics or ()), update=optimizer is None)
        if closure is None:
            if self._scaler is not None:
                amp.unscale(self._scaler, unit.optimizers)
            seen = self._measure_and_clip(unit)
            skipped = self._step(unit, seen)
        else:
            seen, skipped = self._step_with_closure(unit, closure), False
        if optimizer is None and self._scaler is not None:
            self._scaler.update()
        record = self._conclude(
            unit, seen, skipped=skipped, closure=closure is not None, numbers=numbers, metrics=list(metrics or ())
        )
        if skipped and self._options.nonfinite == "raise" and self._scaler is None:
            raise NonFiniteGradientError(
                f"Step {record.step} was not taken, since its gradients are not finite (total norm "
                f"{record.clip.total_norm}); look at the first non-finite layer, or pass nonfinite='skip'."
            )
        self._say(record)
        return record

    def _measure_and_clip(self, unit: Unit, *, recorded: bool | None = None) -> Seen:
        observation = self._observe(unit, recorded=recorded)
        if self._options.fold and self._scaler is None and recorded is None:
            self._fold = fused.to_divide_by(observation, unit.optimizers)
        return Seen(observation, observation.clipping.clip())

    def _step(self, unit: Unit, seen: Seen) -> bool:
        """Steps unless gradients are not finite and the policy says no; returns whether the step was skipped."""
        finite = math.isfinite(seen.clip.total_norm)
        if not finite and (self._scaler is not None or self._options.nonfinite != "step"):
            return True
        divisor, self._fold = self._fold, None
        self._step_all(unit, divisor)
        return False

    def _step_with_closure(self, unit: Unit, closure: Callable[[], Any]) -> Seen:
        if self._scaler is not None:
            raise ValueError("closure must be None with a GradScaler, which torch does not support; got a closure.")
        first: list[Seen] = []

        def clipped() -> Any:
            with torch.enable_grad():
                loss = closure()
            seen = self._measure_and_clip(unit, recorded=False if first else None)
            if not first:
                first.append(seen)
            return loss

        with self._stepping():
            for optimizer in unit.optimizers:
                optimizer.step(clipped)
        return first[0] if first else self._measure_and_clip(unit)

    # a loop that calls optimizer.step() itself

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float | str = 2.0
    ) -> Tensor:
        """Clips in a loop that calls ``optimizer.step()`` itself, and takes note of it.

        Args:
            parameters: As for ``torch.nn.utils.clip_grad_norm_``.
            max_norm: Largest norm that passes unchanged; positive.
            norm_type: The p of the norm; positive, possibly ``inf``.

        Returns:
            The total norm before clipping, 0-dim, as :func:`diagnostics.clip_grad_norm_` returns it.
        """
        self._refuse_if_closed("clip_grad_norm_")
        if self._options.asynchronous:
            raise RuntimeError(
                "clip_grad_norm_ needs a Monitor that waits for the norm; got one with asynchronous=True: use "
                "clip_and_step, or torch's own function."
            )
        given = tensors_of(parameters)
        owners, gradients = statistics.gradients_of(given)
        self._watcher.adopt(self._catalogue.adopt(owners))
        clipping = Clipping(gradients, rule_of(max_norm, norm_type).start(), Reader())
        clipping.settle()
        with self._watcher.writing(map(self._catalogue.index, owners)):
            self._own_clip = clipping.clip()
        self._watcher.timeline.append(self._facts.clip(given, owners, clipping.by_gradient, self._own_clip))
        return clipping.tensor()

    def _own_step_begins(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        if self._scaler_watch is not None:
            self._scaler_watch.stepped(optimizer)
        if not (self._inside or self._closed or closure):  # a closure makes its gradients inside the step
            with self._harmless():
                unit = self._units.of(optimizer)
                if self._options.asynchronous:
                    self._begin_without_waiting(unit)
                else:
                    self._own_step = self._see_own_step(unit)

    def _own_step_ends(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        if self._inside or self._closed:
            return
        with self._harmless():
            unit = self._units.of(optimizer)
            if self._options.asynchronous:
                self._end_without_waiting(unit)
                return
            seen, self._own_step = self._own_step, None
            if seen is None and closure:
                seen = self._see_own_step(unit, late=True)
            if seen is not None:
                skipped = seen.observation.skipped
                self._say(self._conclude(unit, as_spent(seen), skipped=skipped, closure=closure))

    def _see_own_step(self, unit: Unit, *, late: bool = False) -> Seen:
        observation = self._observe(unit)
        own, self._own_clip = self._own_clip, None
        return see(observation, own, late=late)

    # what is known

    def plot(self) -> Any:
        """The run's figures so far as one :class:`~diagnostics.reports.drawing.Figure`; needs the extra ``figures``."""
        return Run(self.run, self.records, self.violations, None, Path()).plot()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is noted: neither passes nor steps."""
        self._watcher.timeline += self._watcher.overdue()
        with self._watcher.paused():
            yield
        if self._scaler_watch is not None:
            self._scaler_watch.forget()

    def close(self, status: str = "finished", error: str | None = None) -> None:
        """Takes every hook away, writes the end of the run to the sinks and closes them. Again is harmless.

        Args:
            status: ``"finished"``, ``"stopped"``, ``"failed"`` or ``"interrupted"``.
            error: The exception, or the reason, in one line.

        Raises:
            ContractError: If only now it is known which rule was broken, and ``on_violation="raise"``.
        """
        if self._closed:
            return
        self._finish_pending(wait=status in ("finished", "stopped"))
        self._closed = True
        events = self._watcher.drain()
        lost = self._collect_lost(events) if status == "finished" else []
        facts, last = self._facts.closing(events, status)
        for fact in facts:
            self._ledger.note(fact)
        self._enter_lost(lost)
        self._watcher.remove()
        self._ledger.close(status, error, last)
        self._replicas.close(status)

    def __enter__(self) -> Monitor:  # noqa: PYI034 -- typing.Self came with Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(*ending(error))
