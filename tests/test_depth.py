"""Depth is the order of the forward pass, and every parameter stands at exactly one depth."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from diagnostics.depth import Call, CallOrder, find_owners, layer_table
from diagnostics.records import Layer

PROPERTY = settings(deadline=None, max_examples=200)


def table(model: nn.Module, calls: Sequence[str] = ()) -> list[Layer]:
    """The layers of a model whose modules were called by these names."""
    owners, _ = find_owners({"": model})
    index = {owner.name: place for place, owner in enumerate(owners)}
    ranks: dict[str, int] = {}
    trace: list[Call] = []
    for name in calls:
        trace.append((index[name], ranks.get(name, 0)))
        ranks[name] = ranks.get(name, 0) + 1
    return [layer for layer, _ in layer_table(owners, trace)]


def names(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def held(layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.parameters for layer in layers}


class Scale(nn.Module):
    """Owns a parameter, and children that own some."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) * self.factor


class TestFindOwners:
    """Owners are the modules that hold parameters themselves."""

    def test_a_chain_in_the_order_of_registration(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))
        owners, parameters = find_owners({"": model})
        assert [(one.name, one.kind, one.trunk) for one in owners] == [
            ("0", "Linear", True),
            ("2", "BatchNorm1d", False),
            ("3", "Linear", True),
        ]
        assert [one.parameters for one in owners][2] == ("3.weight",)
        assert {name: id(one) for name, one in parameters.items()} == {
            name: id(one) for name, one in model.named_parameters()
        }

    @pytest.mark.parametrize(
        "model",
        [
            nn.LSTM(2, 3, num_layers=2, bidirectional=True),
            nn.MultiheadAttention(4, 2),
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
            nn.TransformerDecoderLayer(4, 2, 8),
            weight_norm(nn.Linear(2, 2)),
            spectral_norm(nn.Conv2d(2, 2, 3)),
            nn.Sequential(Scale(), nn.ParameterList([torch.zeros(1)]), nn.ParameterDict({"a": torch.zeros(1)})),
        ],
    )
    def test_every_parameter_is_found_once_under_its_own_name(self, model: nn.Module) -> None:
        owners, parameters = find_owners({"": model})
        assert {name: id(one) for name, one in parameters.items()} == {
            name: id(one) for name, one in model.named_parameters()
        }
        assert sorted(name for owner in owners for name in owner.parameters) == sorted(parameters)

    def test_a_parameter_can_be_reached_by_its_name(self) -> None:
        model = nn.Sequential(weight_norm(nn.Linear(2, 2)), Scale())
        for name, parameter in find_owners({"": model})[1].items():
            assert model.get_parameter(name) is parameter

    def test_the_model_itself_may_own_parameters_and_is_named_by_its_class(self) -> None:
        owners, parameters = find_owners({"": Scale()})
        assert [(one.name, one.path, one.parameters) for one in owners] == [
            ("Scale", "", ("factor",)),
            ("inner", "inner", ("inner.weight", "inner.bias")),
        ]
        assert list(parameters) == ["factor", "inner.weight", "inner.bias"]

    def test_tied_weights_belong_to_the_first_owner(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        model[1].weight = model[0].weight
        owners, parameters = find_owners({"": model})
        assert [one.parameters for one in owners] == [("0.weight",), ("1.bias",)]
        assert list(parameters) == ["0.weight", "1.bias"]

    def test_a_layer_whose_only_weight_is_tied_is_still_a_layer(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        layers = table(model, ["0", "1"])
        assert [(layer.depth, layer.name, layer.parameters) for layer in layers] == [
            (0, "0", ("0.weight",)),
            (1, "1", ()),
        ]

    def test_a_module_under_two_names_is_one_owner(self) -> None:
        linear = nn.Linear(2, 2)
        owners, parameters = find_owners({"": nn.ModuleDict({"first": linear, "second": linear})})
        assert [one.name for one in owners] == ["first"]
        assert list(parameters) == ["first.weight", "first.bias"]

    @pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, orthogonal])
    def test_parametrizations_belong_to_their_module(self, parametrize: object) -> None:
        model = nn.Sequential(parametrize(nn.Linear(3, 3)), nn.Linear(3, 3))
        owners, parameters = find_owners({"": model})
        assert [one.name for one in owners] == ["0", "1"]
        assert {"0.bias", *(name for name in parameters if ".parametrizations.weight." in name)} == set(
            owners[0].parameters
        )

    def test_names_of_several_models_do_not_meet(self) -> None:
        generator, critic = nn.Sequential(nn.Linear(1, 1)), Scale()
        owners, parameters = find_owners({"generator": generator, "critic": critic})
        assert [(one.name, one.root) for one in owners] == [("generator.0", 0), ("critic", 1), ("critic.inner", 1)]
        assert "critic.factor" in parameters
        owners, _ = find_owners({"": Scale(), "critic": critic})
        assert [owners[0].above(other) for other in owners[1:]] == [True, False, False]

    def test_a_part_shared_by_two_models_belongs_to_the_first(self) -> None:
        body = nn.Linear(2, 2)
        owners, parameters = find_owners({"actor": nn.Sequential(body), "critic": nn.Sequential(body, nn.Linear(2, 1))})
        assert list(parameters) == ["actor.0.weight", "actor.0.bias", "critic.1.weight", "critic.1.bias"]
        assert {one.name: one.parameters for one in owners}["critic.0"] == ()

    def test_owners_do_not_keep_a_model_alive(self) -> None:
        owners, parameters = find_owners({"": nn.Linear(1, 1)})
        del parameters
        gc.collect()
        assert owners[0].module() is None

    @pytest.mark.parametrize(
        ("kind", "trunk"),
        [("LayerNorm", 0), ("BatchNorm3d", 0), ("LlamaRMSNorm", 0), ("norm", 0), ("Linear", 1), ("NormalHead", 1)],
    )
    def test_normalisation_is_told_by_the_end_of_the_class_name(self, kind: str, trunk: int) -> None:
        model = type(kind, (nn.Linear,), {})(1, 1)
        assert find_owners({"": model})[0][0].trunk == bool(trunk)


class TestLayerTable:
    """Layers in the order of their calls."""

    def test_depth_follows_the_calls_and_not_the_registration(self) -> None:
        layers = table(nn.ModuleDict({"head": nn.Linear(2, 1), "body": nn.Linear(2, 2)}), ["body", "head"])
        assert [(layer.depth, layer.name) for layer in layers] == [(0, "body"), (1, "head")]

    def test_without_a_call_the_registration_stands_in(self) -> None:
        assert names(table(nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)))) == ["0", "2"]

    def test_a_cell_called_several_times_is_several_layers_with_its_parameters_at_the_first(self) -> None:
        layers = table(nn.ModuleDict({"cell": nn.RNNCell(1, 1), "head": nn.Linear(1, 1)}), ["cell"] * 3 + ["head"])
        assert names(layers) == ["cell@0", "cell@1", "cell@2", "head"]
        assert [len(layer.parameters) for layer in layers] == [4, 0, 0, 2]

    def test_a_parent_is_called_after_its_child(self) -> None:
        assert held(table(Scale(), ["inner", "Scale"])) == {
            "inner": ("inner.weight", "inner.bias"),
            "Scale": ("factor",),
        }

    def test_a_projection_that_is_never_called_belongs_to_its_attention(self) -> None:
        layers = table(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), ["0", "1"])
        assert names(layers) == ["0", "1"]
        assert layers[1].parameters == ("1.in_proj_weight", "1.in_proj_bias", "1.out_proj.weight", "1.out_proj.bias")

    def test_the_nearest_of_several_called_ancestors_inherits(self) -> None:
        model = Scale()
        model.inner = Scale()
        layers = held(table(model, ["inner", "Scale"]))
        assert layers["inner"] == ("inner.factor", "inner.inner.weight", "inner.inner.bias")

    def test_a_name_that_begins_alike_is_no_ancestor(self) -> None:
        model = nn.ModuleDict({"block": Scale(), "block2": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
        assert "block2.weight" not in held(table(model, ["head", "block"]))["head"]
        owners, _ = find_owners({"": model})
        by_name = {owner.name: owner for owner in owners}
        assert by_name["block"].above(by_name["block.inner"])
        assert not by_name["block"].above(by_name["block2"])

    def test_without_a_called_ancestor_the_neighbour_in_the_same_model_inherits(self) -> None:
        models = {
            "generator": nn.Sequential(nn.Linear(1, 1)),
            "critic": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)),
        }
        owners, _ = find_owners(models)
        layers = {layer.name: layer.parameters for layer, _ in layer_table(owners, [(0, 0), (2, 0)])}
        assert layers["generator.0"] == ("generator.0.weight", "generator.0.bias")
        assert len(layers["critic.1"]) == 6

    @PROPERTY
    @given(st.integers(1, 8), st.data())
    def test_every_parameter_stands_at_exactly_one_depth(self, size: int, data: st.DataObject) -> None:
        model = nn.Sequential(*(random.Random(i).choice([Scale, lambda: nn.Linear(2, 2)])() for i in range(size)))
        owners, parameters = find_owners({"": model})
        called = data.draw(st.lists(st.sampled_from(range(len(owners))), min_size=1, unique=True))
        layers = [layer for layer, _ in layer_table(owners, [(index, 0) for index in called])]
        assert sorted(name for layer in layers for name in layer.parameters) == sorted(parameters)
        assert [layer.depth for layer in layers] == list(range(len(layers)))


class TestCallOrder:
    """One order that keeps the order of every pass."""

    @PROPERTY
    @given(st.permutations(range(7)), st.data())
    def test_passes_that_agree_with_one_order_are_all_kept(self, order: list[int], data: st.DataObject) -> None:
        subset = st.sets(st.sampled_from(range(7)), min_size=1)
        known = CallOrder()
        traces = [
            [(order[place], 0) for place in sorted(data.draw(subset))] for _ in range(data.draw(st.integers(1, 6)))
        ]
        for trace in traces:
            known.extend(trace)
        for trace in traces:
            places = [known.calls.index(call) for call in trace]
            assert places == sorted(places)

    @PROPERTY
    @given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), unique=True, max_size=8), max_size=8))
    def test_every_call_stands_once_whatever_the_passes_say(self, traces: list[list[Call]]) -> None:
        known = CallOrder()
        for trace in traces:
            version, before = known.version, list(known.calls)
            changed = known.extend(trace)
            assert changed == (known.calls != before) == (known.version > version)
        assert sorted(known.calls) == sorted({call for trace in traces for call in trace})

    @PROPERTY
    @given(st.permutations(range(6)), st.permutations(range(6)))
    def test_of_passes_that_contradict_each_other_the_first_counts(self, first: list[int], later: list[int]) -> None:
        known = CallOrder()
        known.extend([(index, 0) for index in first])
        assert not known.extend([(index, 0) for index in later])
        assert [index for index, _ in known.calls] == first

    def test_the_same_pass_again_changes_nothing(self) -> None:
        known = CallOrder()
        assert known.extend([(1, 0), (0, 0)])
        assert not known.extend([(1, 0), (0, 0)])
        assert not known.extend([])

    def test_branches_that_no_pass_orders_stand_as_registered(self) -> None:
        known = CallOrder()
        for branch in (2, 0, 1):
            known.extend([(branch, 0), (3, 0)])
        assert known.calls == [(0, 0), (1, 0), (2, 0), (3, 0)]

    def test_a_longer_sequence_grows_in_its_place(self) -> None:
        known = CallOrder()
        for length in (2, 1, 4, 3):
            known.extend([*((0, rank) for rank in range(length)), (1, 0)])
        assert known.calls == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]

    def test_layers_dropped_at_random_come_into_their_order(self) -> None:
        """Stochastic depth: no single pass shows all layers."""
        draw, known = random.Random(3), CallOrder()
        for _ in range(30):
            known.extend([(index, 0) for index in range(24) if draw.random() < 0.6])
        assert known.calls == [(index, 0) for index in range(24)]

    def test_a_very_deep_pass_needs_no_recursion(self) -> None:
        known = CallOrder()
        known.extend([(index, 0) for index in reversed(range(20_000))])
        known.extend([(19_999, 0), (0, 0)])
        assert all(one > other for one, other in pairwise(known.calls))

    def test_it_can_be_copied(self) -> None:
        known = CallOrder()
        known.extend([(0, 0)])
        other = copy.deepcopy(known)
        other.extend([(1, 0)])
        assert known.calls == [(0, 0)]
