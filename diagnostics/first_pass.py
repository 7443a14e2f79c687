"""One forward and backward pass before training: what will the gradient do in this net?

Nothing is changed afterwards: the pass runs on the model itself, and what it moves is put back.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from diagnostics import diagnosis, meanfield
from diagnostics.diagnosis import State
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.hooks import Watcher
from diagnostics.hooks.passes import BackwardPass
from diagnostics.meanfield import Stack
from diagnostics.monitor.assembly import Table
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.observation import Observation
from diagnostics.monitor.options import models_of
from diagnostics.monitor.unit import Unit
from diagnostics.records import (
    SOLE_OPTIMIZER,
    WARNING,
    DepthFit,
    Diagnosis,
    DiagnosisError,
    Layers,
    RunInfo,
    StepRecord,
    Verdict,
)
from diagnostics.sinks.console import console_width, depth_table, diagnosis_lines, paragraph
from diagnostics.statistics.reading import Reader

_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights have one row per unit."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What one forward and backward pass showed.

    Attributes:
        record: The pass as a step that was not taken: layers, fit, loss, norms.
        dead_units: By layer, the share of its units whose gradient was exactly zero for every example of the pass;
            None for other layers than Linear and convolutions, and for later calls of the same layer.
        chi: Mean-field χ₁, the factor on the squared gradient per layer; None where there is no fit either.
        chi_source: ``"theory"``: from the variances of weights and biases, for a plain stack of Linear or convolution
            layers of one width with one activation. ``"measured"``: ``10 ** (2 * backward_slope)``, else.
        trainable_depth: Layers up to which this initialisation trains, about: ``6 / |ln χ₁|`` (Schoenholz et al. 2017,
            with SGD; optimizers that divide by the gradient's size reach further). Infinity at χ₁ = 1 and where a
            measured slope is within its uncertainty; None without χ₁.
        diagnoses: What a Monitor would say after such a step, none of it confirmed but non-finite numbers.
        verdict: The same as one word and one sentence.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
        >>> for layer in model:
        ...     _ = nn.init.orthogonal_(layer.weight, gain=0.5)
        >>> found = preflight(model, lambda: model(torch.ones(8, 64)).sum())
        >>> round(found.backward_slope, 3), round(found.chi, 3), round(found.trainable_depth, 1)
        (-0.301, 0.25, 4.3)
        >>> found.verdict.condition
        'vanishing'
    """

    record: StepRecord
    dead_units: tuple[float | None, ...]
    chi: float | None
    chi_source: str | None
    trainable_depth: float | None
    diagnoses: tuple[Diagnosis, ...]
    verdict: Verdict

    @property
    def layers(self) -> Layers:
        """The layers in order of depth."""
        return self.record.layers

    @property
    def fit(self) -> DepthFit | None:
        """The line through the output gradients over depth; None with fewer than two layers."""
        return self.record.fit

    @property
    def backward_slope(self) -> float | None:
        """Decades by which the gradient changes per layer on the way back."""
        return None if self.record.fit is None else self.record.fit.slope

    def __str__(self) -> str:
        width = console_width()
        lines = depth_table(self.record, width, title="before training:")
        dead = [(share, one.layer.name) for share, one in zip(self.dead_units, self.layers, strict=True) if share]
        for share, name in sorted(dead, reverse=True)[:3]:
            lines += paragraph(f"{share:.0%} of the units of {name} have no gradient on this batch", width)
        if self.chi is not None and self.trainable_depth is not None:
            reach = f"about {self.trainable_depth:.0f} layers" if self.trainable_depth < 1e6 else "any depth"
            lines += paragraph(f"χ₁ {self.chi:.3g} per layer ({self.chi_source}): trains up to {reach}", width)
        for one in self.diagnoses:
            lines += diagnosis_lines(one, width)
        return "\n".join([*lines, *paragraph(f"verdict: {self.verdict}", width)])


def preflight(
    model: nn.Module | Mapping[str, nn.Module],
    loss: Callable[[], Tensor],
    *,
    thresholds: Thresholds | None = None,
    run: RunInfo | None = None,
) -> Preflight:
    """Runs one forward and backward pass and says what the gradient does over depth; changes nothing.

    Weights, buffers, gradients (also those of parameters outside the model), ``requires_grad``, train or eval mode,
    hooks, grad mode and the random numbers of torch, Python and NumPy are afterwards what they were, bit for bit. What
    the pass does beyond the model is not undone: a data iterator moves on, and hooks of others run. Where a Monitor is
    open already, call it inside ``with monitor.paused():``.

    Args:
        model: One module, or a mapping of names to modules, in the mode it shall be looked at.
        loss: Runs the forward pass on a typical batch and returns the loss, a tensor of one element. It leaves the
            backward pass to preflight.
        thresholds: When a number becomes a diagnosis.
        run: Where the model comes from; with a configuration of this project's trainers remedies name its overrides.

    Returns:
        What was seen; it prints well.

    Raises:
        TypeError: If the loss is no function, or returns no tensor.
        ValueError: If it returns more than one element, or one that no trainable parameter of the model went into.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> found = preflight(model, lambda: model(torch.ones(4, 8)).square().mean())
        >>> len(found.layers), found.verdict.condition, model[0].weight.grad is None
        (3, 'healthy', True)
    """
    models = models_of(model)
    _refuse(models, loss)
    catalogue = Catalogue(models)
    parameters = catalogue.tensors()
    with torch.inference_mode(False), _unchanged(models), _gradients_aside(parameters):
        watcher = Watcher(models, catalogue.owners, parameters)
        try:
            value = loss()
            _refuse_loss(value, watcher)
            with _gradients_aside(_leaves(value.grad_fn)):
                value.backward()  # type: ignore[no-untyped-call]
                return _describe(catalogue, watcher, value, thresholds or Thresholds(), run)
        finally:
            watcher.remove()


def assert_healthy(
    model: nn.Module | Mapping[str, nn.Module],
    loss: Callable[[], Tensor],
    *,
    thresholds: Thresholds | None = None,
    run: RunInfo | None = None,
) -> Preflight:
    """For tests: :func:`preflight`, and an error where its verdict is not ``healthy``.

    Args:
        model: As for :func:`preflight`.
        loss: Likewise.
        thresholds: Likewise.
        run: Likewise.

    Returns:
        What was seen.

    Raises:
        DiagnosisError: With the diagnosis and what to try.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
        >>> for layer in model:
        ...     _ = nn.init.orthogonal_(layer.weight)
        >>> assert_healthy(model, lambda: model(torch.ones(8, 64)).sum()).verdict.condition
        'healthy'
    """
    found = preflight(model, loss, thresholds=thresholds, run=run)
    if found.verdict.condition == "healthy":
        return found
    serious = [one for one in found.diagnoses if one.severity >= WARNING]
    texts = [f"{one.condition}: {one.message}" for one in serious] or [str(found.verdict)]
    remedies = dict.fromkeys(str(remedy) for one in serious for remedy in one.remedies)
    advice = f" Try: {'; '.join(remedies)}." if remedies else ""
    raise DiagnosisError(f"The model is not healthy before training. {' '.join(texts)}{advice}")


class _Whole(Unit):
    """The parameters of a model as those of an optimizer that never steps."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(SOLE_OPTIMIZER, ())
        self._whole = list(parameters)

    def _parameters(self) -> Iterator[Tensor]:
        yield from self._whole


def _describe(
    catalogue: Catalogue, watcher: Watcher, loss: Tensor, thresholds: Thresholds, run: RunInfo | None
) -> Preflight:
    """What the pass left behind, read by one copy and put into words."""
    passes = [event for event in watcher.drain() if isinstance(event, BackwardPass)]
    if watcher.failure is not None:
        raise watcher.failure
    if not passes:
        raise ValueError(
            "loss must depend on a trainable parameter of the model; got one that reaches none: call the model that "
            "preflight was given."
        )
    reader = Reader()
    number = reader.ask(loss)
    observation = Observation(catalogue, reader, _Whole(catalogue.tensors()), passes, recorded=True)
    table = catalogue.layers(watcher)
    dead = {place: reader.ask(share) for place, share in _dead_units(catalogue, table)}
    observation.settle()
    clipping = observation.clipping.clip(write=False)
    layers = observation.layers(table)
    record = StepRecord(
        step=0,
        clip=replace(clipping, shares=observation.shares(table)),
        loss=number.values[0],
        layers=layers,
        fit=diagnosis.fit_depth(layers),
        recorded=True,
    )
    state, _ = diagnosis.advance(State(), record, thresholds)
    return Preflight(
        record,
        tuple(dead[place].values[0] if place in dead else None for place in range(len(layers))),
        *_chi(meanfield.plain_stack(loss.grad_fn), record.fit, reader),
        diagnosis.diagnose([record], thresholds, run),
        diagnosis.verdict(state, (), thresholds),
    )


def _chi(stack: Stack | None, fit: DepthFit | None, reader: Reader) -> tuple[float | None, str | None, float | None]:
    """χ₁, where it comes from, and how many layers it lets train: by theory where that holds, else as measured."""
    chi = None if stack is None else stack.chi(reader.ask(stack.variances()).values)
    if chi is not None:
        return chi, "theory", meanfield.trainable_depth(chi)
    if fit is None:
        return None, None, None
    chi = 10 ** (2 * fit.slope)
    return chi, "measured", meanfield.trainable_depth(1.0 if abs(fit.slope) <= fit.uncertainty else chi)


def _dead_units(catalogue: Catalogue, table: Table) -> Iterator[tuple[int, Tensor]]:
    """The share of units of a layer whose weights' and bias's gradients are exactly zero, by place in the table."""
    for place, (layer, (owner, _)) in enumerate(zip(table.layers, table.calls, strict=True)):
        module = catalogue.owners[owner].module()
        if layer.parameters and isinstance(module, _UNITS) and module.weight.is_leaf:
            held = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
            rows = [tensor.grad.reshape(len(tensor), -1) for tensor in held if tensor.grad is not None]
            if rows:
                yield place, 1 - torch.cat(rows, 1).any(1).double().mean()


# nothing is changed


@contextmanager
def _unchanged(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts back what a forward pass and its backward pass change, the gradients apart."""
    modules = list(dict.fromkeys(module for model in models.values() for module in model.modules()))
    modes = [module.training for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]  # noqa: SLF001 -- one that is None has no public name
    held = {id(one): one for _, named in buffers for one in named.values() if one is not None}
    values = {key: one.clone() for key, one in held.items()}
    trainable = [(one, one.requires_grad) for model in models.values() for one in model.parameters()]
    with _random_numbers():
        try:
            yield
        finally:
            for module, mode, (_, named) in zip(modules, modes, buffers, strict=True):
                module.training = mode
                module._buffers.update(named)  # noqa: SLF001
            with torch.no_grad():
                for key, one in held.items():
                    if not torch.equal(one, values[key]):
                        one.copy_(values[key])
            for parameter, flag in trainable:
                parameter.requires_grad = flag


@contextmanager
def _random_numbers() -> Iterator[None]:
    """Puts the generators of torch, Python and, where it is in use, NumPy back to where they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    numpy: Any = sys.modules.get("numpy")
    drawn, drawn_numpy = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(drawn)
            if numpy:
                numpy.random.set_state(drawn_numpy)


@contextmanager
def _gradients_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Has some tensors begin without gradients, and gives theirs back: the same objects, with nothing added."""
    aside = [(tensor, tensor.grad) for tensor in tensors]
    try:
        for tensor, _ in aside:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in aside:
            tensor.grad = gradient


def _leaves(node: Any) -> list[Tensor]:
    """Every leaf that a backward pass from a node accumulates into, those outside the model included."""
    seen, waiting, leaves = {node}, [node], []
    while waiting:
        one = waiting.pop()
        if one is not None:
            leaf = getattr(one, "variable", None)
            leaves += [leaf] if isinstance(leaf, Tensor) else []
            new = {parent for parent, _ in one.next_functions} - seen
            seen |= new
            waiting += new
    return leaves


# mistakes


def _refuse(models: Mapping[str, nn.Module], loss: Any) -> None:
    if not callable(loss):
        raise TypeError(
            f"loss must be a function that runs the forward pass and returns the loss; got a {type(loss).__name__}."
        )
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    if any(is_lazy(parameter) for parameter in parameters):
        raise ValueError("model must have parameters of known shape; got a lazy one: pass it one batch before.")
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("model must have a trainable parameter; got none.")


def _refuse_loss(value: Any, watcher: Watcher) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor of one element; got {value!r}.")
    if value.numel() != 1:
        raise ValueError(f"loss must return a tensor of one element; got one of shape {tuple(value.shape)}.")
    if any(isinstance(event, BackwardPass) for event in watcher.timeline):
        raise ValueError("loss must leave the backward pass to preflight; got one that has run it.")
    if not value.requires_grad:
        raise ValueError("loss must return a tensor that requires grad; got one without: look for detach or no_grad.")
