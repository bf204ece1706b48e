"""Where instances go: groups, GPUs named or not, and room."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config.model import InstanceGroup, InstanceKind
from service.engine.devices import Device, Devices
from service.errors import ConfigError
from service.repository.placement import Need, place

MIB = 1 << 20
CPU = Device("cpu", "cpu", 0, 2, 1)
GPUS = tuple(Device(f"cuda:{i}", "gpu", i, 2) for i in range(3))
ALL = Devices(CPU, GPUS, GPUS, "3 NVIDIA GPUs")
NONE = Devices(CPU, (), (CPU,), "no GPU: there is no NVIDIA driver")


def placed(
    *groups: InstanceGroup, devices: Devices = ALL, need: Need | None = None, free: Mapping[str, int] | None = None
) -> tuple[list[tuple[str, int]], list[str]]:
    room = {} if free is None else free
    found, notes = place(groups, devices, need or Need(), lambda device: room.get(device.name))
    return [(p.device.name, p.count) for p in found], notes


def test_groups_on_gpus() -> None:
    """Instances per GPU, listed or all; groups on one device add up."""
    assert placed(InstanceGroup("g"))[0] == [("cuda:0", 2), ("cuda:1", 2), ("cuda:2", 2)]
    assert placed(InstanceGroup("g", InstanceKind.GPU, 1, (2, 0)))[0] == [("cuda:2", 1), ("cuda:0", 1)]
    both = placed(InstanceGroup("g", InstanceKind.GPU, 4, (1,)), InstanceGroup("c", InstanceKind.CPU, 1))
    assert both[0] == [("cuda:1", 4), ("cpu", 1)]
    twice = placed(InstanceGroup("g", InstanceKind.GPU, 1, (1,)), InstanceGroup("h", InstanceKind.GPU, 2, (1,)))
    assert twice[0] == [("cuda:1", 3)]


def test_without_a_gpu() -> None:
    """Who leaves it open gets the CPU, who asks for a GPU is refused."""
    assert placed(InstanceGroup("g"), devices=NONE)[0] == [("cpu", 2)]
    with pytest.raises(ConfigError, match=r"instance_group\[0\]\.kind: asks for a GPU, but there is none"):
        placed(InstanceGroup("g", InstanceKind.GPU, 1), devices=NONE)


def test_a_gpu_that_is_not_there() -> None:
    """With those that are."""
    with pytest.raises(ConfigError, match="there is no GPU 7; there are cuda:0, cuda:1, cuda:2"):
        placed(InstanceGroup("g", InstanceKind.GPU, 1, (7,)))


def test_a_gpu_without_room_is_left_out() -> None:
    """And named, with the numbers."""
    free = {"cuda:0": 100 * MIB, "cuda:1": 900 * MIB}
    found, notes = placed(InstanceGroup("g"), need=Need(weights=200 * MIB), free=free)
    # Nothing is known of the third.
    assert found == [("cuda:1", 2), ("cuda:2", 2)]
    assert notes == ["not placed there: cuda:0 has 100 MiB free, 2 instances need 400 MiB"]


def test_room_nowhere() -> None:
    """The model is refused, with every device's numbers."""
    free = {gpu.name: 300 * MIB for gpu in GPUS}
    with pytest.raises(ConfigError, match=r"cuda:0 has 300 MiB free, 1 instance needs 400 MiB; cuda:1 has") as error:
        placed(InstanceGroup("g", InstanceKind.AUTO, 1), need=Need(weights=400 * MIB), free=free)
    assert error.value.path == "instance_group[0]"


def test_named_gpus_are_not_second_guessed() -> None:
    """A budget that is not free now may be free later; weights that do not fit are refused."""
    free = {"cuda:1": 300 * MIB}
    group = InstanceGroup("g", InstanceKind.GPU, 1, (1, 2))
    need = Need(weights=200 * MIB, budget=500 * MIB)
    assert placed(group, need=need, free=free) == ([("cuda:1", 1), ("cuda:2", 1)], [])
    assert placed(InstanceGroup("g", InstanceKind.GPU, 1), need=need, free=free)[0] == [("cuda:0", 1), ("cuda:2", 1)]
    with pytest.raises(ConfigError, match=r"instance_group\[0\]\.gpus: no room"):
        placed(group, need=Need(weights=301 * MIB), free=free)


def test_groups_share_the_room() -> None:
    """What the first takes is not there for the second."""
    free = {gpu.name: 500 * MIB for gpu in GPUS}
    need = Need(weights=200 * MIB)
    groups = (InstanceGroup("g", InstanceKind.GPU, 2, (0,)), InstanceGroup("h", InstanceKind.GPU, 1))
    found, notes = placed(*groups, need=need, free=free)
    assert found == [("cuda:0", 2), ("cuda:1", 1), ("cuda:2", 1)]
    assert notes == ["not placed there: cuda:0 has 500 MiB free, 3 instances need 600 MiB"]


SIZES = st.integers(0, 1000)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    SIZES,
    st.none() | SIZES,
    st.lists(SIZES, min_size=3, max_size=3),
)
def test_what_is_placed_fits(counts: list[int], weights: int, budget: int | None, free: list[int]) -> None:
    """Never more on a device than its free memory holds; refused only if one group fits nowhere."""
    need = Need(weights, budget)
    room = {gpu.name: bytes_ for gpu, bytes_ in zip(GPUS, free, strict=True)}
    groups = [InstanceGroup(f"g{i}", InstanceKind.GPU, count) for i, count in enumerate(counts)]
    try:
        found, _ = placed(*groups, need=need, free=room)
    except ConfigError:
        assert need.reserved * sum(counts) > min(free)
        return
    assert found
    for name, count in found:
        assert need.reserved * count <= room[name]
