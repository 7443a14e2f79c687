"""Two ranks: replicas that should be equal are compared, nobody waits for anybody in vain, and one rank speaks.

Each test runs a function in two processes that share a gloo process group; a rank that is late hangs.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from itertools import count

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import diagnostics.distributed
from diagnostics import ContractError, Monitor, clip_grad_norm_
from diagnostics.contract import Contract, Step
from diagnostics.contract.acts import Compared
from diagnostics.explain import AROUND, LOOP, page
from diagnostics.sinks.console import ConsoleSink

LONGEST = 20
EVERYTHING = ("0.weight", "0.bias", "2.weight", "2.bias")


def serve(rank, tasks, results):
    """A rank: runs what it is given, each in a process group of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    while (task := tasks.get()) is not None:
        work, where, arguments = task
        try:
            distributed.init_process_group(
                "gloo", init_method=f"file://{where}", rank=rank, world_size=2, timeout=timedelta(seconds=10)
            )
            distributed.all_reduce(torch.zeros(1))  # or one that sends nothing is gone before the other has found it
            torch.manual_seed(0)
            results.put((True, work(rank, **arguments)))
        except BaseException:  # noqa: BLE001 -- the test shows it
            results.put((False, traceback.format_exc()))
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


class Pair:
    """Two processes that wait for work; new ones after a failure, which leaves them in any state."""

    def __init__(self):
        self.started = []

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results = [context.Queue(), context.Queue()], [context.Queue(), context.Queue()]
        for rank in (0, 1):
            one = context.Process(target=serve, args=(rank, self.tasks[rank], self.results[rank]), daemon=True)
            one.start()
            self.started.append(one)

    def run(self, work, where, arguments):
        if not self.started:
            self.start()
        for own in self.tasks:
            own.put((work, where, arguments))
        return [self.result(rank) for rank in (0, 1)]

    def result(self, rank):
        try:
            good, value = self.results[rank].get(timeout=LONGEST)
        except queue.Empty:
            good, value = False, "hangs"
        if not good:
            self.stop()
            pytest.fail(f"rank {rank}: {value}")
        return value

    def stop(self):
        for one in self.started:
            one.kill()
            one.join()
        self.started = []


@pytest.fixture(scope="module")
def pair():
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture
def on_two_ranks(pair, tmp_path):
    """Runs a function on both ranks; returns what each of them returned."""
    meetings = (str(tmp_path / f"rendezvous_{number}") for number in count())
    return lambda work, **arguments: pair.run(work, next(meetings), arguments)


def net(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(rank, step):
    """Every rank has data of its own."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1000 * rank + step))


def average(model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def watching(model, optimizer, **options):
    return Monitor(model, optimizer, **{"sinks": [], "on_diagnosis": "record", "on_violation": "record", **options})


def told(monitor):
    assert monitor._watcher.failure is None
    return [(one.rule, one.step, one.parameters, one.count) for one in monitor.violations]


def loop(rank, model, monitor, optimizer, *, steps, own=False, averaged=lambda step: True, loss=None):
    for step in range(steps):
        optimizer.zero_grad()
        (loss or (lambda one, data: one(data).square().mean()))(model, batch(rank, step)).backward()
        if averaged(step):
            average(model)
        optimizer.step() if own else monitor.clip_and_step()


# replicas


def plain(rank, *, own, until=99, steps=5, seeds=(0, 0), orthogonal=False, **options):
    model = net(seed=seeds[rank])
    if orthogonal:
        nn.init.orthogonal_(model[2].weight)
        for place in (0, 2):
            nn.init.zeros_(model[place].bias)
        nn.init.ones_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watching(model, optimizer, **options) as monitor:
        loop(rank, model, monitor, optimizer, steps=steps, own=own, averaged=lambda step: step < until)
    return told(monitor), [one.message for one in monitor.violations], len(monitor.records)


@pytest.mark.parametrize("own", [True, False], ids=["own step", "clip_and_step"])
def test_replicas_whose_gradients_are_averaged_by_hand_are_silent(on_two_ranks, own):
    assert on_two_ranks(plain, own=own) == [([], [], 5)] * 2


@pytest.mark.parametrize("own", [True, False], ids=["own step", "clip_and_step"])
@pytest.mark.parametrize("until", [0, 2])
def test_forgotten_averaging_is_found_at_its_step_on_both_ranks(on_two_ranks, own, until):
    first, second = on_two_ranks(plain, own=own, until=until)
    assert first == second
    violations, (message,), _ = first
    assert violations == [("rank_divergence", until, EVERYTHING, 5 - until)]
    assert message.startswith(
        f"Step {until}: the gradients of 4 parameters ({', '.join(EVERYTHING)}) differ between the 2 ranks, by up to "
    )


def test_forgotten_averaging_between_two_recorded_steps_is_found_in_the_weights(on_two_ranks):
    first, second = on_two_ranks(plain, own=False, until=53, steps=62)
    assert first == second
    ((rule, step, parameters, _),), (message,), _ = first
    assert (rule, step, parameters) == ("rank_divergence", 60, EVERYTHING)
    assert "differ between the 2 ranks before the step" in message


def test_different_first_weights_are_found_though_gradients_are_averaged(on_two_ranks):
    first, second = on_two_ranks(plain, own=False, seeds=(0, 1))
    assert first == second
    violations, (message,), _ = first
    assert violations == [("rank_divergence", 0, EVERYTHING, 5)]
    assert message.startswith("Step 0: the weights of 4 parameters")
    assert message.endswith("no two train the same model.")


def test_orthogonal_weights_of_equal_norm_are_told_apart(on_two_ranks):
    (first, _, _), (second, _, _) = on_two_ranks(plain, own=False, seeds=(0, 1), orthogonal=True)
    assert first == second == [("rank_divergence", 0, ("2.weight",), 5)]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)


def branching(rank, *, both):
    torch.manual_seed(0)
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, data):
        hidden = model.stem(data)
        used = [model.left, model.right] if both else [model.left, *([model.right] * rank)]
        return sum(layer(hidden).square().mean() for layer in used)

    with watching(model, optimizer) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            loss(model, batch(rank, step)).backward()
            for parameter in (*model.stem.parameters(), *model.left.parameters()):
                distributed.all_reduce(parameter.grad)
            if both:
                for parameter in model.right.parameters():
                    distributed.all_reduce(parameter.grad)
            optimizer.step()
    return [one for one in told(monitor) if one[0] == "rank_divergence"], [one.message for one in monitor.violations]


def test_a_branch_that_one_rank_does_not_use_is_found(on_two_ranks):
    for found, messages in on_two_ranks(branching, both=False):
        assert found == [("rank_divergence", 0, ("right.weight", "right.bias"), 4)]
        assert (
            "Step 0: the gradients of 2 parameters (right.weight, right.bias) are there on some of the 2 ranks only: "
            "each rank would go its own way from here."
        ) in messages
    assert [found for found, _ in on_two_ranks(branching, both=True)] == [[], []]


def half(rank, *, averaged):
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        loop(rank, model, monitor, optimizer, steps=3, averaged=lambda _: averaged, loss=half_loss)
    return [rule for rule, *_ in told(monitor)]


def half_loss(model, data):
    return model(data.bfloat16()).square().mean()


@pytest.mark.parametrize("averaged", [True, False])
def test_half_types_are_compared_within_their_own_rounding(on_two_ranks, averaged):
    assert on_two_ranks(half, averaged=averaged) == [[] if averaged else ["rank_divergence"]] * 2


# DistributedDataParallel


def wrapped(rank, *, no_sync_always=False):
    model = DistributedDataParallel(net(seed=rank))  # its weights are rank 0's
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with watching(model, optimizer, accumulate=2) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                with model.no_sync() if micro == 0 or no_sync_always else nullcontext():
                    (model(batch(rank, 2 * step + micro)).square().mean() / 2).backward()
            optimizer.step()
    return told(monitor)


def test_ddp_with_no_sync_accumulation_is_silent_and_a_step_without_any_sync_is_not(on_two_ranks):
    assert on_two_ranks(wrapped) == [[], []]
    assert on_two_ranks(wrapped, no_sync_always=True) == [[("rank_divergence", 0, EVERYTHING, 4)]] * 2


def page_example(rank, *, section):
    space = {}
    exec(AROUND, space)
    torch.manual_seed(rank)
    space["batches"] = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(3)]
    space["Monitor"] = watching
    starts_the_group, *example = page("rank_divergence").sections[section].splitlines()
    assert starts_the_group.startswith("torch.distributed.init_process_group(")
    exec("\n".join(["import torch", *example, LOOP]), space)
    return [one.rule for one in space["monitor"].violations]


def test_the_examples_of_the_page_are_what_they_say(on_two_ranks):
    assert on_two_ranks(page_example, section="Bad") == [["rank_divergence"]] * 2
    assert on_two_ranks(page_example, section="Good") == [[], []]


# who communicates, and when


def counting(rank, *, steps, **options):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls, real = [], distributed.all_reduce

    def counted(*arguments, **keywords):
        calls.append(monitor._units.together.step)
        return real(*arguments, **keywords)

    with watching(model, optimizer, **options) as monitor:
        copies = []
        for step in range(steps):
            optimizer.zero_grad()
            model(batch(0, step)).square().mean().backward()
            before = monitor._reader.copies
            distributed.all_reduce = counted
            try:
                monitor.clip_and_step()
            finally:
                distributed.all_reduce = real
            copies.append(monitor._reader.copies - before)
    return calls, copies, [record.step for record in monitor.records if record.recorded]


def test_a_recorded_step_reduces_once_and_no_step_waits_for_the_device_again(on_two_ranks):
    for calls, copies, recorded in on_two_ranks(counting, steps=75):
        assert calls == recorded == [*range(50), 50, 60, 70]
        assert copies == [1] * 75


@pytest.mark.parametrize("silent", [{"process_group": False}, {"every": 0}])
def test_nothing_is_sent_where_nobody_asked_for_it(on_two_ranks, silent):
    assert [calls for calls, *_ in on_two_ranks(counting, steps=3, **silent)] == [[], []]


def test_one_rank_alone_costs_nothing(tmp_path, monkeypatch):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        monkeypatch.setattr(diagnostics.distributed, "Ranks", None)
        calls, copies, recorded = counting(0, steps=3)
    finally:
        distributed.destroy_process_group()
    assert (calls, copies, recorded) == ([], [1] * 3, [0, 1, 2])


def only_on(rank, *, ranks, other=False):
    diagnostics.distributed.PATIENCE = timedelta(seconds=1)
    try:
        model = nn.Linear(6, 2 + rank) if other else net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with watching(model, optimizer) if rank in ranks else nullcontext():
                for step in range(3):
                    optimizer.zero_grad()
                    model(batch(rank, step)).square().mean().backward()
                    optimizer.step()
        return [str(one.message) for one in said]
    finally:
        diagnostics.distributed.PATIENCE = timedelta(seconds=60)


NOT_COMPARED = (
    "Replicas are not compared, since not all of the 2 ranks have a Monitor on the same parameters: make one on every "
    "rank, or pass process_group=False."
)


def test_a_monitor_on_one_rank_alone_does_not_wait_for_ever(on_two_ranks):
    assert on_two_ranks(only_on, ranks=[0]) == [[NOT_COMPARED], []]


def test_ranks_with_different_models_are_not_compared(on_two_ranks):
    assert on_two_ranks(only_on, ranks=[0, 1], other=True) == [[NOT_COMPARED]] * 2


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match="sharded"):
        watching(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_shards_are_refused_and_never_taken_for_whole_gradients(on_two_ranks):
    assert on_two_ranks(sharded) == [None, None]


# alarms, skips and errors of one rank


def alarmed(rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for step in range(90):
            if not (rank == 1 and step == 55):
                optimizer.zero_grad()  # one rank forgets it once
            model(batch(0, step)).square().mean().backward()
            average(model)
            optimizer.step()
    rules = [(one.rule, one.step) for one in monitor.violations]
    return rules, [record.step for record in monitor.records if record.recorded]


def test_an_alarm_of_one_rank_makes_all_record_densely_from_the_next_recorded_step(on_two_ranks):
    (calm, first), (alarmed_rules, second) = on_two_ranks(alarmed)
    assert ("missing_zero_grad", 55) in alarmed_rules
    assert ("missing_zero_grad", 55) not in calm
    assert first == second
    assert set(range(60, 81)) <= set(first)


def skipping(rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            (model(batch(0, step)).square().mean() * (float("inf") if rank == 0 and step == 2 else 1)).backward()
            monitor.clip_and_step()
    return told(monitor), [record.skipped for record in monitor.records], [one.message for one in monitor.violations]


def test_a_rank_that_skips_alone_leaves_nobody_waiting(on_two_ranks):
    (first, skipped, (message,)), (second, taken, _) = on_two_ranks(skipping)
    assert (skipped, taken) == ([False, False, True, False], [False] * 4)
    assert first == second == [("rank_divergence", 2, EVERYTHING, 2)]
    assert "not finite on one of them" in message


def leaving_out(rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            model(batch(0, step)).square().mean().backward()
            if not (rank == 1 and step == 2):
                optimizer.step()
            if rank == 1 and step == 5:  # as many steps on both ranks
                optimizer.step()
    return [one.message for one in monitor.violations if one.rule == "rank_divergence"]


def test_a_step_that_one_rank_leaves_out_is_seen_in_the_weights(on_two_ranks):
    first, second = on_two_ranks(leaving_out)
    assert first == second
    assert len(first) == 1


def raising(rank, *, cause):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ContractError) as caught:
        with watching(model, optimizer, on_violation="raise") as monitor:
            for step in range(9):
                if not (cause == "one rank" and rank == 1 and step == 2):
                    optimizer.zero_grad()
                model(batch(0 if cause == "one rank" else rank, step)).square().mean().backward()
                if cause == "one rank" or step < 2:
                    average(model)
                monitor.clip_and_step()
    return step, str(caught.value).split(":")[0]


def test_what_all_ranks_know_raises_on_all_of_them_at_that_step(on_two_ranks):
    first, second = on_two_ranks(raising, cause="all ranks")
    assert first == second
    assert first[0] == 2


def test_what_one_rank_knows_raises_on_all_of_them_at_the_next_recorded_step(on_two_ranks):
    others, own = on_two_ranks(raising, cause="one rank")
    assert others == (3, "Another rank stopped the training")
    assert own == (3, "missing_zero_grad")


def adversaries(rank, *, averaged):
    models = {"generator": net(seed=1), "discriminator": net(seed=2)}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models.values()]
    with watching(models, optimizers) as monitor:
        for step in range(60):
            for model, optimizer in zip(models.values(), optimizers, strict=True):
                optimizer.zero_grad()
                model(batch(rank, step)).square().mean().backward()
                if averaged or model is models["generator"]:
                    average(model)
                monitor.clip_and_step(optimizer)
    return [(one.step, one.parameters) for one in monitor.violations]


def test_each_of_several_optimizers_is_compared(on_two_ranks):
    names = tuple(f"discriminator.{name}" for name in EVERYTHING)
    assert on_two_ranks(adversaries, averaged=True) == [[], []]
    assert on_two_ranks(adversaries, averaged=False) == [[(0, names)]] * 2


def searching(rank, *, averaged):
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3 + rank)  # not as many evaluations on each rank

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0 if averaged else rank, 0)).square().mean()
        loss.backward()
        return loss

    with watching(model, optimizer) as monitor:
        monitor.clip_and_step(closure=closure)
        optimizer.step(closure)
    return [(one.rule, one.step) for one in monitor.violations]


def test_a_closure_is_compared_at_its_first_evaluation_however_often_it_is_called(on_two_ranks):
    assert on_two_ranks(searching, averaged=False) == [[("rank_divergence", 0)]] * 2
    assert on_two_ranks(searching, averaged=True) == [[("rank_divergence", 1)]] * 2  # one searched further


def speaking(rank):
    given = [ConsoleSink()]
    with watching(net(), torch.optim.SGD(net().parameters()), sinks="auto") as one:
        with watching(net(), torch.optim.SGD(net().parameters()), sinks=given) as two:
            return [len(monitor._ledger._sinks._sinks) for monitor in (one, two)]


def test_the_console_speaks_on_rank_0_and_sinks_that_were_given_everywhere(on_two_ranks):
    assert on_two_ranks(speaking) == [[1, 1], [0, 1]]


# the rule


def judged(*found):
    contract = Contract(["a.weight", "a.bias", "b.weight"])
    for step, one in enumerate(found):
        contract.step(Step("optimizer", step, {}, compared=one))
    violations = [one for one in contract.violations if one.rule == "rank_divergence"]
    return [(one.step, one.parameters, one.count) for one in violations], violations[0].message


EQUAL = Compared(2)


def test_what_follows_from_a_divergence_is_counted_until_all_are_equal_again():
    first, then = Compared(2, gradients={2: 0.5}), Compared(2, gradients={0: 0.1, 2: 0.2}, weights={2: 0.01})
    assert judged(EQUAL, first, then, None, then)[0] == [(1, ("b.weight",), 3)]
    assert judged(first, EQUAL, Compared(2, gradients={0: 0.1}))[0] == [(0, ("b.weight",), 1), (2, ("a.weight",), 1)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Compared(8, gradients={0: 0.37, 2: 0.05}),
            "the gradients of 2 parameters (a.weight, b.weight) differ between the 8 ranks, by up to 37 % (a.weight)",
        ),
        (Compared(2, gradients={1: 1.0}), "the gradients of a.bias are there on some of the 2 ranks only"),
        (Compared(2, gradients={1: math.inf}), "differ between the 2 ranks, not finite on one of them (a.bias)"),
        (
            Compared(2, gradients={0: 0.5}, weights={2: 0.012}),
            "the weights of b.weight differ between the 2 ranks before the step, by up to 1.2 % (b.weight)",
        ),
        (Compared(2, steps=(3, 5)), "the 2 ranks are not at the same step of the same optimizer (steps 3 to 5 met)"),
    ],
)
def test_the_message_says_what_differs_where_and_by_how_much(found, message):
    assert judged(found)[1].startswith("Step 0: the ")
    assert message in judged(found)[1]


def steps_of_its_own(rank, *, steps, every):
    """Independent runs under one launcher: no rank waits for another one that has closed its Monitor."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, sinks=[], every=every, on_violation="record", on_diagnosis="record") as monitor:
        for _ in range(steps[rank]):
            optimizer.zero_grad()
            model(torch.ones(5, 6)).sum().backward()
            monitor.clip_and_step()
    return len(monitor.records), [violation.rule for violation in monitor.violations]


@pytest.mark.parametrize("steps", [(3, 7), (7, 3), (0, 4), (4, 0), (5, 5), (6, 5)])
@pytest.mark.parametrize("every", [1, 10])
def test_no_rank_waits_for_one_that_has_left(on_two_ranks, steps, every):
    found = on_two_ranks(steps_of_its_own, steps=steps, every=every)
    assert [taken for taken, _ in found] == list(steps)
    assert all("rank_divergence" not in rules for _, rules in found)


def fails_inside(rank, *, step):
    """Watching fails on one rank alone, which goes on unwatched."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, sinks=[], on_violation="record", on_diagnosis="record") as monitor:
        for number in range(6):
            optimizer.zero_grad()
            model(torch.ones(5, 6)).sum().backward()
            if rank == 1 and number == step:
                monitor._facts.step = None  # whatever it is that breaks
            with pytest.warns(UserWarning, match="switched off") if rank == 1 and number == step else nullcontext():
                optimizer.step()
    return len(monitor.records)


def test_no_rank_waits_for_one_whose_watching_has_failed(on_two_ranks):
    assert on_two_ranks(fails_inside, step=2) == [6, 2]


def clips_shards(rank, *, size, max_norm, norm_type):
    """Every rank holds a part of each gradient; the norm is that of the whole, as torch's own clip has it."""
    shape = init_device_mesh("cpu", (2,))
    models = [net(), net()]
    for model in models:
        fully_shard(model, mesh=shape)
        (size * model(batch(0, 0))).sum().backward()
    theirs, ours = models
    wanted = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type).full_tensor().item()
    found = clip_grad_norm_(ours.parameters(), max_norm, norm_type)
    pairs = [(a.grad.to_local(), b.grad.to_local()) for a, b in zip(*(one.parameters() for one in models), strict=True)]
    return wanted, found.item(), all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_sharded_gradients_are_clipped_by_the_norm_of_the_whole(on_two_ranks, max_norm, norm_type):
    for wanted, found, equal in on_two_ranks(clips_shards, size=1.0, max_norm=max_norm, norm_type=norm_type):
        assert found == pytest.approx(wanted, rel=1e-6)
        assert equal


def clips_large_shards(rank):
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    (1e30 * model(batch(0, 0))).sum().backward()
    found = clip_grad_norm_(model.parameters(), 1.0)
    return found.item(), nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor().item()


def test_sharded_gradients_whose_norm_fp32_cannot_hold_are_clipped_too(on_two_ranks):
    for found, after in on_two_ranks(clips_large_shards):
        assert 1e29 < found < 1e33
        assert after == pytest.approx(1.0, rel=1e-5)
