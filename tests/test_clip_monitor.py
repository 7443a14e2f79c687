"""A Monitor clips as its rule says in every kind of loop, and a resumed run as the one that never stopped."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import get_total_norm

from diagnostics import (
    ClipByGroup,
    ClipByNorm,
    ClipByQuantile,
    ClipByValue,
    ClipByZScore,
    MemorySink,
    Monitor,
    RunLogSink,
    clip_gradients,
    read_run,
)

RULES = {
    "norm": ClipByNorm(0.5),
    "norm of the largest": ClipByNorm(0.1, math.inf),
    "value": ClipByValue(0.05),
    "quantile": ClipByQuantile(0.5, window=10, warmup=4),
    "quantile of the 1-norm": ClipByQuantile(0.5, window=10, warmup=4, norm_type=1.0),
    "zscore": ClipByZScore(z=0.5, alpha=0.9, warmup=4),
    "group": ClipByGroup(ClipByZScore(z=0.5, warmup=4), by="name", rules={"^0": ClipByNorm(0.3), "^2": None}),
}
ADAPTIVE = {"quantile": RULES["quantile"], "zscore": RULES["zscore"], "group": RULES["group"]}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        size = 10.0 if step % 7 == 6 else 1.0
        inputs = torch.randn(8, 6, generator=generator) * size
        yield inputs, torch.randint(0, 3, (8,), generator=generator)


def train(model, optimizer, act, steps, first=0):
    for inputs, targets in batches(steps, first):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        act()


def quiet(model, optimizers, **options):
    return Monitor(model, optimizers, **{"sinks": [], "on_diagnosis": "record", **options})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def without_monitor(record):
    """A record as the function gives it: shares by parameter, nothing about the run."""
    return (record.rule, record.threshold, record.max_norm, record.total_norm, record.clip_coef, record.applied)


@pytest.mark.parametrize("name", RULES)
def test_a_watched_loop_clips_as_one_that_calls_the_function(name):
    plain, watched = net(), net()
    first, second = (torch.optim.Adam(model.parameters(), lr=0.01) for model in (plain, watched))
    rule, expected = RULES[name].start(), []

    def act():
        expected.append(clip_gradients(plain.named_parameters() if name == "group" else plain.parameters(), rule))
        first.step()

    train(plain, first, act, 40)
    with quiet(watched, second, clip=RULES[name]) as monitor:
        train(watched, second, monitor.clip_and_step, 40)
    assert equal(plain, watched)
    assert [without_monitor(one.clip) for one in monitor.records] == [without_monitor(one) for one in expected]
    assert sum(one.applied for one in expected) > 4
    fractions = [sum(one.applied for one in expected[: n + 1]) / (n + 1) for n in range(40)]
    assert [one.clip.clip_fraction for one in monitor.records] == pytest.approx(fractions)
    assert monitor.violations == ()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_one_copy_from_the_device_and_by_value_a_second_when_it_clips(name, monkeypatch):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    copies = {"count": 0}
    for method in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, method)

        def counted(self, *args, original=original, **kwargs):
            copies["count"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, counted)
    with quiet(model, optimizer, clip=RULES[name]) as monitor:
        for inputs, targets in batches(20):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            copies["count"] = 0
            record = monitor.clip_and_step()
            assert copies["count"] == (2 if name == "value" and record.clip.applied else 1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_changes_nothing_that_the_rule_does_later(name, bad):
    def run(hit):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with quiet(model, optimizer, clip=RULES[name]) as monitor:
            train(model, optimizer, monitor.clip_and_step, 12)
            if hit:
                optimizer.zero_grad()
                model(torch.ones(1, 6)).sum().backward()
                model[0].weight.grad[0, 0] = bad
                assert monitor.clip_and_step().skipped
            train(model, optimizer, monitor.clip_and_step, 12, first=12)
        return model, [without_monitor(one.clip) for one in monitor.records if not one.skipped]

    sound, hit = run(hit=False), run(hit=True)
    assert equal(sound[0], hit[0])
    assert sound[1] == hit[1]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_two_monitors_that_share_a_rule_do_not_share_its_history(name):
    def run(rule):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with quiet(model, optimizer, clip=rule) as monitor:
            train(model, optimizer, monitor.clip_and_step, 12)
        return [without_monitor(one.clip) for one in monitor.records]

    assert run(ADAPTIVE[name]) == run(ADAPTIVE[name])


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_was_stopped_and_resumed_clips_exactly_as_one_that_never_stopped(name):
    def start():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, quiet(model, optimizer, clip=RULES[name])

    whole, optimizer, monitor = start()
    train(whole, optimizer, monitor.clip_and_step, 40)
    monitor.close()
    for stop in (2, 17):
        model, optimizer, before = start()
        train(model, optimizer, before.clip_and_step, stop)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), before.state_dict()], file)
        before.close()
        file.seek(0)
        weights, state, saved = torch.load(file, weights_only=True)
        model, optimizer, after = start()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        after.load_state_dict(saved)
        train(model, optimizer, after.clip_and_step, 40 - stop, first=stop)
        after.close()
        assert equal(whole, model)
        assert [one.step for one in after.records] == list(range(stop, 40))
        assert [one.clip for one in after.records] == [one.clip for one in monitor.records[stop:]]
        assert [one.recorded for one in after.records] == [one.recorded for one in monitor.records[stop:]]


def test_a_resumed_run_s_summary_counts_the_whole_run():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with quiet(model, optimizer, clip=ClipByNorm(1e-3)) as before:
        train(model, optimizer, before.clip_and_step, 6)
    sink = MemorySink()
    with quiet(model, optimizer, clip=ClipByNorm(1e6), sinks=[sink]) as after:
        after.load_state_dict(before.state_dict())
        train(model, optimizer, after.clip_and_step, 2)
    assert (sink.end.steps, sink.end.summary["clip_fraction"]) == (8, 0.75)


class TestClosures:
    def loop(self, rule, *, model, steps, **options):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=3)
        norms, after = [], []
        data = list(batches(steps))
        with quiet(model, optimizer, clip=rule, **options) as monitor:
            for inputs, targets in data:
                evaluations = []

                def closure(inputs=inputs, targets=targets, evaluations=evaluations):
                    if evaluations:
                        after.append(get_total_norm([p.grad for p in model.parameters()]).item())
                    optimizer.zero_grad()
                    loss = functional.cross_entropy(model(inputs), targets)
                    loss.backward()
                    evaluations.append(get_total_norm([p.grad for p in model.parameters()]).item())
                    return loss

                monitor.clip_and_step(closure=closure)
                norms.append(evaluations)
        assert monitor.violations == ()
        return monitor, norms, after

    def test_every_evaluation_is_clipped(self):
        _, norms, after = self.loop(ClipByNorm(0.05), model=net(), steps=4)
        assert max(map(max, norms)) > 0.06
        assert all(norm <= 0.05 * (1 + 1e-6) for norm in after)

    def test_the_history_gets_one_norm_per_step_that_of_the_first_evaluation(self):
        rule = ClipByQuantile(0.5, window=20, warmup=3)
        monitor, norms, after = self.loop(rule, model=net(), steps=10)
        assert max(map(len, norms)) > 2
        firsts = [evaluations[0] for evaluations in norms]
        assert [one.clip.total_norm for one in monitor.records] == pytest.approx(firsts)
        for step, record in enumerate(monitor.records):
            expected = torch.tensor(firsts[:step], dtype=torch.float64).quantile(0.5) if step >= 3 else math.inf
            assert record.clip.threshold == pytest.approx(float(expected))
        limits = [
            one.clip.threshold for one, evaluations in zip(monitor.records, norms, strict=True) for _ in evaluations[1:]
        ]
        assert all(norm <= limit * (1 + 1e-6) for norm, limit in zip(after, limits, strict=True))


class TestSeveralOptimizers:
    def pair(self):
        models = {"generator": net(1), "discriminator": net(2)}
        return models, [torch.optim.SGD(model.parameters(), lr=0.05) for model in models.values()]

    def losses(self, models, size):
        for scale, model in zip((1.0, size), models.values(), strict=True):
            (model(torch.ones(2, 6)).square().mean() * scale).backward()

    def test_each_has_its_own_history_when_stepped_by_itself(self):
        models, optimizers = self.pair()
        with quiet(models, optimizers, clip=ClipByQuantile(1.0, warmup=2)) as monitor:
            for _ in range(4):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.losses(models, 100.0)
                for optimizer in optimizers:
                    monitor.clip_and_step(optimizer)
        for name in models:
            mine = [one.clip for one in monitor.records if one.optimizer == name]
            largest = [max((other.total_norm for other in mine[:step]), default=0) for step in range(4)]
            assert [one.threshold for one in mine] == pytest.approx([math.inf, math.inf, *largest[2:]])

    @pytest.mark.parametrize("by", ["name", "object"])
    @pytest.mark.parametrize("together", [False, True])
    def test_a_mapping_gives_each_its_own_rule(self, by, together):
        models, optimizers = self.pair()
        rules = [ClipByNorm(0.01), ClipByValue(0.002)]
        keys = optimizers if by == "object" else list(models)
        expected = copy.deepcopy(models)
        self.losses(expected, 100.0)
        torch_clip(expected["generator"].parameters(), 0.01)
        torch.nn.utils.clip_grad_value_(expected["discriminator"].parameters(), 0.002)
        with quiet(models, optimizers, clip=dict(zip(keys, rules, strict=True))) as monitor:
            self.losses(models, 100.0)
            if together:
                (record,) = [monitor.clip_and_step()]
                parts = record.clip.parts
                assert [part.group for part in parts] == list(models)
            else:
                parts = [monitor.clip_and_step(optimizer).clip for optimizer in optimizers]
        assert [part.rule for part in parts] == ["norm", "value"]
        for name, model in models.items():
            for one, other in zip(model.parameters(), expected[name].parameters(), strict=True):
                assert torch.equal(one.grad, other.grad)

    def test_who_is_not_in_the_mapping_is_only_measured(self):
        models, optimizers = self.pair()
        with quiet(models, optimizers, clip={"generator": ClipByNorm(1e-3)}) as monitor:
            self.losses(models, 1.0)
            found = [monitor.clip_and_step(optimizer).clip for optimizer in optimizers]
        assert [(one.rule, one.applied) for one in found] == [("norm", True), ("none", False)]

    def test_one_optimizer_may_be_mapped_too_and_a_step_without_gradients_has_no_parts(self):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for rule, parts in ((ClipByNorm(1e-3), 0), (ClipByGroup(ClipByNorm(1e-3)), 1)):
            with quiet(model, optimizer, clip={optimizer: rule}, on_violation="record") as monitor:
                optimizer.zero_grad()
                empty = monitor.clip_and_step()
                train(model, optimizer, monitor.clip_and_step, 1)
            assert (empty.clip.applied, empty.clip.total_norm, empty.clip.parts) == (False, 0.0, ())
            assert monitor.records[-1].clip.applied
            assert len(monitor.records[-1].clip.parts) == parts

    def test_optimizers_are_groups_too(self):
        models, optimizers = self.pair()
        with quiet(models, optimizers, clip=ClipByGroup(ClipByNorm(0.01), by="optimizer")) as monitor:
            self.losses(models, 1.0)
            record = monitor.clip_and_step()
        assert [part.group for part in record.clip.parts] == ["generator", "discriminator"]
        for model in models.values():
            norm = get_total_norm([p.grad for p in model.parameters()]).item()
            assert norm == pytest.approx(0.01, rel=1e-3)

    def test_parameter_groups_of_several_optimizers_have_their_names(self):
        models, optimizers = self.pair()
        with quiet(models, optimizers, clip=ClipByGroup(ClipByNorm(0.01))) as monitor:
            self.losses(models, 1.0)
            together = monitor.clip_and_step()
        assert [part.group for part in together.clip.parts] == ["generator/0", "discriminator/0"]


class TestChangingLoops:
    def test_a_parameter_group_that_is_added_later_is_clipped_with_the_rest_and_has_a_part(self):
        model = net()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05)
        rule = ClipByGroup(ClipByQuantile(1.0, warmup=1))
        with quiet(model, optimizer, clip=rule, on_violation="record") as monitor:
            train(model, optimizer, monitor.clip_and_step, 3)
            optimizer.add_param_group({"params": [*model[2].parameters(), *model[4].parameters()]})
            train(model, optimizer, monitor.clip_and_step, 3)
        assert [[part.group for part in one.clip.parts] for one in monitor.records] == [["0"]] * 3 + [["0", "1"]] * 3
        thresholds = [one.clip.parts[1].threshold for one in monitor.records[3:]]
        assert math.isinf(thresholds[0])
        assert not math.isinf(thresholds[1])

    def test_parameters_that_are_unfrozen_later_count_from_then_on(self):
        model = net()
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with quiet(model, optimizer, clip=ClipByNorm(0.2)) as monitor:
            for step, (inputs, targets) in enumerate(batches(6)):
                model[0].requires_grad_(step >= 3)
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), targets).backward()
                expected = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
                record = monitor.clip_and_step()
                assert record.clip.total_norm == expected
                held = [layer.weight is not None for layer in record.layers]
                assert held == [step >= 3, True, True]
                assert math.fsum(record.clip.shares) == pytest.approx(1)
        assert monitor.violations == ()

    @pytest.mark.parametrize("clear", [True, False])
    def test_optimizers_that_step_inside_the_backward_pass_have_each_their_norms(self, clear):
        model = net()
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
        norms = {id(optimizer): [] for optimizer in optimizers.values()}

        def step(parameter):
            optimizer = optimizers[parameter]
            norms[id(optimizer)].append(parameter.grad.norm().item())
            optimizer.step()
            if clear:
                parameter.grad = None
            else:
                parameter.grad.zero_()

        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        with quiet(model, list(optimizers.values())) as monitor:
            for inputs, targets in batches(3):
                functional.cross_entropy(model(inputs), targets).backward()
        for handle in handles:
            handle.remove()
        assert monitor.violations == ()
        assert len(monitor.records) == 3 * len(optimizers)
        for place, optimizer in enumerate(optimizers.values()):
            mine = [one for one in monitor.records if one.optimizer == f"sgd_{place}"]
            assert [one.clip.total_norm for one in mine] == pytest.approx(norms[id(optimizer)])

    def test_clipping_inside_the_backward_pass_gives_each_its_own_history(self):
        model = net()
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
        monitor = quiet(model, list(optimizers.values()), clip=ClipByQuantile(1.0, warmup=1))

        def step(parameter):
            monitor.clip_and_step(optimizers[parameter])
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        for inputs, targets in batches(4):
            functional.cross_entropy(model(inputs), targets).backward()
        monitor.close()
        for handle in handles:
            handle.remove()
        names = {one.optimizer for one in monitor.records}
        assert len(names) == len(optimizers)
        for name in names:
            mine = [one.clip for one in monitor.records if one.optimizer == name]
            assert [one.threshold for one in mine[1:]] == pytest.approx(
                [max(other.total_norm for other in mine[:step]) for step in (1, 2, 3)]
            )


class TestOwnLoops:
    @pytest.mark.parametrize("name", sorted(set(RULES) - {"norm", "norm of the largest"}))
    def test_a_loop_that_clips_by_such_a_rule_itself_breaks_no_rule(self, name):
        """What its own history makes of a norm cannot be seen from outside, so nothing is held against it."""
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rule = RULES[name].start()
        with quiet(model, optimizer, clip=RULES[name]) as monitor:

            def act():
                clip_gradients(model.named_parameters() if name == "group" else model.parameters(), rule)
                optimizer.step()

            train(model, optimizer, act, 30)
        assert monitor.violations == ()
        assert len(monitor.records) == 30

    def test_the_history_holds_the_norm_from_before_the_loop_s_own_clip(self):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        with quiet(model, optimizer, clip=ClipByQuantile(1.0, warmup=1)) as monitor:

            def act():
                found.append(monitor.clip_grad_norm_(model.parameters(), 1e-3).item())
                optimizer.step()

            train(model, optimizer, act, 5)
        thresholds = [max(found[:step], default=math.inf) for step in range(5)]
        state = monitor.state_dict()["units"]["optimizer"]["clipping"]["norms"]
        assert state == pytest.approx(found)
        assert all(limit > 1e-2 for limit in thresholds)
        assert monitor.violations == ()


def test_a_norm_too_small_for_fp32_is_true_beside_gradients_that_are_known_to_be_zero():
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with quiet(model, optimizer, on_violation="record") as monitor:
        for _ in range(3):
            for parameter, size in zip(model, (0.0, 1e-25), strict=True):
                parameter.grad = torch.tensor([size, 0.0])
            assert monitor.clip_and_step().clip.total_norm == pytest.approx(1e-25, rel=1e-6, abs=0)


def test_quantiles_of_the_norm_are_those_of_the_newest_thousand():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sizes = torch.rand(1100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1).float()
    with quiet(model, optimizer, every=0, on_violation="record") as monitor:
        for step, size in enumerate(sizes):
            model.weight.grad = size.reshape(1, 1)
            record = monitor.clip_and_step()
            if step in {0, 10, 999, 1099}:
                newest = sizes[max(0, step - 999) : step + 1].double()
                expected = [newest.quantile(q).item() for q in (0.5, 0.9, 0.99)]
                assert record.clip.norm_quantiles == pytest.approx(expected, rel=1e-12)


def test_a_run_log_gives_back_parts_thresholds_and_quantiles(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = MemorySink()
    with quiet(model, optimizer, clip=RULES["group"], sinks=[RunLogSink(tmp_path), memory]) as monitor:
        train(model, optimizer, monitor.clip_and_step, 8)
    read = read_run(tmp_path).records
    assert [one.clip for one in read] == [one.clip for one in memory.records]
    assert [part.group for part in read[-1].clip.parts] == ["^0", "^2", "others"]
    assert len(read[-1].clip.norm_quantiles) == 3
