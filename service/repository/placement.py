"""Where a model's instances go: the devices of its instance groups, as far as they have room.

Promise: values in, values out. A group that names its `gpus` goes there; one that does not goes on every GPU (Triton's
meaning) that has room, and the notes say which have not. A model that fits nowhere is refused before a session is made,
with the need and the free memory in numbers. Where a device's memory is not known nothing is checked: the session then
fails, or does not.

On a GPU each instance is a session with weights of its own, so it needs at least the bytes of the model's files; a
budget (`gpu_mem_limit`) is what it may grow to, and is kept free for it. Load needs no placing: the instances of all
devices serve one queue, and whichever is free takes the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.config.model import InstanceGroup, InstanceKind
from service.engine.devices import Device, Devices, names
from service.errors import ConfigError

_MEBIBYTE = 1 << 20

# Free memory of a device, bytes; None where it is not known.
FreeBytes = Callable[[Device], int | None]


@dataclass(frozen=True, slots=True)
class Need:
    """Device memory of one instance: `weights` at least, `budget` at most where the configuration states one."""

    weights: int = 0
    budget: int | None = None

    @property
    def reserved(self) -> int:
        # A budget below the weights does not make them smaller.
        return self.weights if self.budget is None else max(self.weights, self.budget)


@dataclass(slots=True)
class Placed:
    """A device and how many instances of the model it gets."""

    device: Device
    count: int


def place(
    groups: Sequence[InstanceGroup], devices: Devices, need: Need, free: FreeBytes
) -> tuple[list[Placed], list[str]]:
    """The devices of the instance groups, the instances on each, and notes. Raises `ConfigError`."""
    counts: dict[Device, int] = {}
    notes: list[str] = []
    for index, group in enumerate(groups):
        path = f"instance_group[{index}]"
        chosen = _devices_of(group, devices, path)
        roomy, reasons = _with_room(chosen, group, need, free, counts)
        if not roomy:
            raise ConfigError(path, f"no room for the model: {'; '.join(reasons)}; use a smaller count or other gpus")
        if reasons and group.gpus:
            raise ConfigError(f"{path}.gpus", f"no room for the model: {'; '.join(reasons)}")
        notes += [f"not placed there: {reason}" for reason in reasons]
        for device in roomy:
            counts[device] = counts.get(device, 0) + (group.count or device.slots)
    return [Placed(device, count) for device, count in counts.items()], notes


def _with_room(
    chosen: Sequence[Device], group: InstanceGroup, need: Need, free: FreeBytes, counts: dict[Device, int]
) -> tuple[list[Device], list[str]]:
    """Those of `chosen` that have room besides what is placed there already, and why the others have not."""
    roomy: list[Device] = []
    reasons: list[str] = []
    # Who names a device knows it: only what cannot fit is refused there.
    each = need.weights if group.gpus else need.reserved
    for device in chosen:
        count = counts.get(device, 0) + (group.count or device.slots)
        known = free(device) if device.kind == "gpu" else None
        if known is None or each * count <= known:
            roomy.append(device)
        else:
            reasons.append(
                f"{device.name} has {known / _MEBIBYTE:.0f} MiB free, {count} instance{'s' if count > 1 else ''} need"
                f"{'' if count > 1 else 's'} {each * count / _MEBIBYTE:.0f} MiB"
            )
    return roomy, reasons


def _devices_of(group: InstanceGroup, devices: Devices, path: str) -> Sequence[Device]:
    if group.kind is InstanceKind.CPU:
        return (devices.cpu,)
    if group.kind is InstanceKind.AUTO and not group.gpus:
        return devices.taken
    if not devices.gpus:
        raise ConfigError(f"{path}.kind", f"asks for a GPU, but there is none ({devices.why})")
    if not group.gpus:
        return devices.gpus
    known = {gpu.index: gpu for gpu in devices.gpus}
    missing = [gpu for gpu in group.gpus if gpu not in known]
    if missing:
        raise ConfigError(f"{path}.gpus", f"there is no GPU {missing[0]}; there are {names(devices.gpus)}")
    return [known[gpu] for gpu in group.gpus]
