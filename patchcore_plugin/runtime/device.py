"""The device on which OpenVINO computes a network: its name, OpenVINO's properties for it, and what makes it another one.

Only the backbone is computed there. The pre-processing is checked against the manifest, takes images of any size, and must
give the same pixels everywhere, so it stays on the CPU; so do the memory bank and all that follows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from patchcore_plugin.cpu import compile_options
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import openvino as ov

    from patchcore_plugin.bundle import Precision
    from patchcore_plugin.cpu import Mode

CPU = "CPU"
EXAMPLES = "CPU, GPU, GPU.1, NPU, AUTO, AUTO:GPU,CPU or HETERO:GPU,CPU"

_NAME = r"[A-Z]+(?:\.\w+)?"
_PATTERN = re.compile(rf"AUTO(?::-?{_NAME}(?:,-?{_NAME})*)?|HETERO:{_NAME}(?:,{_NAME})*|(?!MULTI|HETERO){_NAME}")
_ARITHMETIC = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""OpenVINO's name of the capability to compute in a precision, by its name in a hint."""


def check_device(device: str) -> None:
    """Check the name of a device, and that this machine has what it names. The CPU is taken to be there.

    Args:
        device: A device of OpenVINO (``"CPU"``, ``"GPU"``, ``"GPU.1"``, ``"NPU"``); ``"AUTO"``, with or without a list
            of devices, for the one that OpenVINO chooses at load; or ``"HETERO:"`` and a list, for a network whose layers
            are each computed by the first of the devices that can.

    Raises:
        UsageError: If the name is none of these, or names a device that OpenVINO does not find; the message lists those
            that it finds.
    """
    if device == CPU:
        return
    import openvino as ov

    found = ov.Core().available_devices
    if not _PATTERN.fullmatch(device):
        kind, reason = device.partition(":")[0], f"write {EXAMPLES}"
        if kind == "MULTI":
            reason = "MULTI spreads images over several devices, and the self-test sees one of them; write AUTO or HETERO"
        elif kind == "HETERO":
            reason = "HETERO takes a list of devices, such as HETERO:GPU,CPU"
        msg = f"There is no device {device!r}: {reason}. OpenVINO finds {', '.join(found)} here."
        raise UsageError(msg)
    wanted = [name for name in names(device) if not name.startswith("-")]  # AUTO:-NPU is anything but an NPU
    absent = [name for name in wanted if name not in found and f"{name}.0" not in found]  # the first of several is .0
    if absent:
        msg = (
            f"OpenVINO finds no device {' and no device '.join(absent)} here, which {device!r} names; it finds "
            f"{', '.join(found)}. A device needs its driver."
        )
        raise UsageError(msg)
    left = [name for name in found if not {f"-{name}", f"-{name.partition('.')[0]}"} & set(names(device))]
    if not wanted and device != "AUTO" and not left:
        msg = f"The device {device!r} leaves nothing to choose from: OpenVINO finds {', '.join(found)} here."
        raise UsageError(msg)


def names(device: str) -> list[str]:
    """Names of the devices that a name lists; a device itself is its own."""
    kind, _, listed = device.partition(":")
    if listed:
        return listed.split(",")
    return [] if kind == "AUTO" else [device]


def choose(core: ov.Core, device: str, read: Callable[[], ov.Model]) -> str:
    """Let OpenVINO's AUTO choose the device for a network, once.

    AUTO itself would start on the CPU until a slower device is ready, and move to another device after an error. The
    scores of an image would then depend on the time, and come from a device that the self-test has not seen.

    Args:
        core: OpenVINO.
        device: Name that :func:`check_device` accepts.
        read: Reads the network.

    Returns:
        The device; what is not AUTO as it is.

    Raises:
        RuntimeError: If no device of AUTO's can compile the network.
    """
    if device.partition(":")[0] != "AUTO":
        return device
    compiled = core.compile_model(read(), device, {"ENABLE_STARTUP_FALLBACK": False})
    return compiled.get_property("EXECUTION_DEVICES")[0]


def device_options(core: ov.Core, device: str, precision: Precision, mode: Mode, threads: int) -> dict[str, object]:
    """Give OpenVINO's properties to compile a network with.

    Args:
        core: OpenVINO.
        device: Device that :func:`choose` returned.
        precision: Arithmetic. Without a hint, OpenVINO computes in fewer bits where the device can, and scores would depend
            on the machine. A device that lacks an arithmetic is told the nearest that it has.
        mode: How work is spread.
        threads: Number of threads of the CPU.
    """
    if device == CPU:
        return {**compile_options(mode, threads), "INFERENCE_PRECISION_HINT": precision}
    if device.startswith("HETERO:"):
        return {"DEVICE_PROPERTIES": {name: device_options(core, name, precision, mode, threads) for name in names(device)}}
    wanted: dict[str, object] = {"PERFORMANCE_HINT": mode.upper()}
    if mode == "throughput":
        wanted["PERFORMANCE_HINT_NUM_REQUESTS"] = threads
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    hints = [hint for hint in dict.fromkeys((precision, "f16", "f32")) if _ARITHMETIC[hint] in capabilities]
    if hints:
        wanted["INFERENCE_PRECISION_HINT"] = hints[0]
    supported = core.get_property(device, "SUPPORTED_PROPERTIES")
    return {name: value for name, value in wanted.items() if name in supported}


def computed_in(network: ov.CompiledModel, device: str, precision: str) -> str:
    """What a device computes a network in: a CPU without bfloat16 computes in ``"f32"`` instead.

    Args:
        network: The compiled network.
        device: Device that it was compiled for.
        precision: Arithmetic that the device was told; the answer where the device does not say more.
    """
    name, taken = "INFERENCE_PRECISION_HINT", None
    if device.startswith("HETERO:"):
        taken = network.get_property("DEVICE_PROPERTIES")[names(device)[0]].get(name)
    elif name in network.get_property("SUPPORTED_PROPERTIES"):
        taken = network.get_property(name)
    return precision if taken is None else taken.get_type_name()


def device_facts(core: ov.Core, device: str) -> list[object]:
    """What tells a device from others, for which a compiled network is of no use.

    Args:
        core: OpenVINO.
        device: Device that :func:`choose` returned.
    """
    facts = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
    return [device, *(core.get_property(name, fact) for name in names(device) for fact in facts)]
