"""What is packed comes back: type, value and every bit, through JSON and safetensors."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkit.engine.packing import pack, unpack
from dpkit.errors import CheckpointError


def through_a_file(value: Any, like: Any = None) -> Any:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(value, "state", tensors), allow_nan=False)
    return unpack(json.loads(text), "state", safetensors.torch.load(safetensors.torch.save(tensors)), like)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        bits = [t.reshape(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, float):
        if math.isnan(one):
            return math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)
plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-5, 5)
values = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, st.integers(0, 9), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_what_is_packed_comes_back_in_every_bit(value: Any):
    assert same(through_a_file(value), value)


class Pair(NamedTuple):
    left: Tensor
    right: tuple[float, ...]


@dataclass(frozen=True)
class Box:
    pairs: dict[str, Pair]
    count: int


def test_named_tuples_and_dataclasses_come_back_as_what_they_are():
    value = Box({"a": Pair(torch.arange(3.0), (1.0, math.inf))}, 4)
    like = Box({"a": Pair(torch.zeros(3), ())}, 0)
    found = through_a_file(value, like)
    assert type(found) is Box and type(found.pairs["a"]) is Pair
    assert torch.equal(found.pairs["a"].left, torch.arange(3.0))
    assert (found.pairs["a"].right, found.count) == ((1.0, math.inf), 4)
    for wrong in (None, Pair(torch.zeros(3), ()), Box({}, 0), Box({"a": Pair(torch.zeros(4), ())}, 0)):
        with pytest.raises(CheckpointError):
            through_a_file(value, wrong)


def test_an_ordered_dictionary_becomes_a_dictionary():
    assert through_a_file(OrderedDict(a=1)) == {"a": 1}


def test_tied_tensors_views_and_places_that_read_alike_are_stored_apart():
    whole = torch.arange(6.0).reshape(2, 3)
    value = {"a": {"b": whole}, "a/b": whole.t(), "a~": whole[1]}
    found = through_a_file(value)
    assert torch.equal(found["a"]["b"], whole)
    assert torch.equal(found["a/b"], whole.t())
    assert torch.equal(found["a~"], whole[1])


def test_a_packed_tensor_does_not_follow_the_one_it_was_made_from():
    value, tensors = torch.zeros(2), {}
    pack(value, "state", tensors)
    value += 1
    assert torch.equal(tensors["state"], torch.zeros(2))


@pytest.mark.parametrize(
    "value", [object(), {1.5: 0}, {(1, 2): 0}, {True: 0}, {1, 2}, torch.Size([1]), torch.eye(2).to_sparse(), print]
)
def test_what_cannot_be_stored_is_refused_by_its_place(value: Any):
    with pytest.raises(CheckpointError, match="state/x"):
        pack({"x": value}, "state", {})


@pytest.mark.parametrize(
    "packed",
    [
        {},
        {"tensor": "none"},
        {"tensor": 3},
        {"float": "1.0"},
        {"float": 1},
        {"tuple": {}},
        {"dict": {"a": 1}},
        {"dict": [["a"]]},
        {"dict": [["a", 1], ["a", 2]]},
        {"dict": [[["a"], 1]]},
        {"dict": [[None, 1]]},
        {"dict": [[True, 1]]},
        {"counter": 3},
        {"fields": [["a", 1]]},
        {"fields": [["__class__", 1]]},
        {"call": "os.system"},
        [[{"list": []}]],
    ],
)
def test_what_pack_never_wrote_is_refused(packed: Any):
    with pytest.raises(CheckpointError):
        unpack(packed, "state", {})
