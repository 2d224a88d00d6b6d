"""Named devices that a run can be planned for without having one: memory and dense matrix rates from data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.hardware import Hardware
from llamafactory.extras.suggest import did_you_mean

GIB = 2**30
_ANY_CPU = re.compile(r"cpu-(\d+)g")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """One row of the table.

    Attributes:
        product: name of the product.
        device: torch's device type.
        memory_gib: memory of one device.
        float32: dense FLOP/s in float32 (without TF32).
        half: dense FLOP/s in bfloat16, or float16 where there is no bfloat16.
        has_bf16: computes bfloat16 natively.
    """

    product: str
    device: str
    memory_gib: float
    float32: float
    half: float
    has_bf16: bool = True


DEVICES: dict[str, DeviceFacts] = {
    "a10g-24g": DeviceFacts(product="NVIDIA A10G", device="cuda", memory_gib=22.5, float32=31.2e12, half=70e12),
    "a100-40g": DeviceFacts(product="NVIDIA A100 40GB", device="cuda", memory_gib=39.4, float32=19.5e12, half=312e12),
    "a100-80g": DeviceFacts(product="NVIDIA A100 80GB", device="cuda", memory_gib=79.2, float32=19.5e12, half=312e12),
    "b200-180g": DeviceFacts(product="NVIDIA B200", device="cuda", memory_gib=178.0, float32=75e12, half=2250e12),
    "h100-80g": DeviceFacts(product="NVIDIA H100 SXM", device="cuda", memory_gib=79.1, float32=67e12, half=989e12),
    "h200-141g": DeviceFacts(product="NVIDIA H200", device="cuda", memory_gib=139.7, float32=67e12, half=989e12),
    "l4-24g": DeviceFacts(product="NVIDIA L4", device="cuda", memory_gib=22.0, float32=30.3e12, half=121e12),
    "l40s-48g": DeviceFacts(product="NVIDIA L40S", device="cuda", memory_gib=44.4, float32=91.6e12, half=362e12),
    "m3-max-64g": DeviceFacts(product="Apple M3 Max", device="mps", memory_gib=48.0, float32=14e12, half=14e12),
    "m4-16g": DeviceFacts(product="Apple M4", device="mps", memory_gib=11.8, float32=4.3e12, half=4.3e12),
    "mi300x-192g": DeviceFacts(product="AMD MI300X", device="cuda", memory_gib=191.5, float32=163e12, half=1307e12),
    "rtx3090-24g": DeviceFacts(
        product="GeForce RTX 3090", device="cuda", memory_gib=23.6, float32=35.6e12, half=71e12
    ),
    "rtx4090-24g": DeviceFacts(
        product="GeForce RTX 4090", device="cuda", memory_gib=23.5, float32=82.6e12, half=165e12
    ),
    "rtx5090-32g": DeviceFacts(
        product="GeForce RTX 5090", device="cuda", memory_gib=31.4, float32=105e12, half=210e12
    ),
    "t4-16g": DeviceFacts(
        product="NVIDIA T4", device="cuda", memory_gib=14.6, float32=8.1e12, half=65e12, has_bf16=False
    ),
    "v100-32g": DeviceFacts(
        product="NVIDIA V100 32GB", device="cuda", memory_gib=31.7, float32=15.7e12, half=125e12, has_bf16=False
    ),
}
"""Name -> facts. Memory is what the driver leaves; rates are dense, from data sheets, and real runs reach a part."""

ALIASES = {"h200": "h200-141g", "l4": "l4-24g", "t4": "t4-16g", "mi300x": "mi300x-192g", "h100": "h100-80g",
           "rtx4090": "rtx4090-24g", "rtx3090": "rtx3090-24g", "a100": "a100-80g", "l40s": "l40s-48g",
           "v100": "v100-32g", "b200": "b200-180g", "a10g": "a10g-24g", "m-series": "m3-max-64g"}  # fmt: skip


def find_device(name: str) -> DeviceFacts | None:
    """The facts of a named device; None for `cpu-64g` and the like, of which only the memory is known.

    Raises:
        ConfigError: no such device.
    """
    wanted = name.lower()
    if _ANY_CPU.fullmatch(wanted):
        return None
    facts = DEVICES.get(ALIASES.get(wanted, wanted))
    if facts is None:
        names = [*DEVICES, *ALIASES, "cpu"]
        raise ConfigError(
            Problem(
                key="--device",
                given=name,
                message="unknown device",
                allowed=f"cpu or auto (this machine), cpu-64g (any number), or one of {', '.join(DEVICES)}",
                fix=did_you_mean(wanted, names),
            )
        )
    return facts


def hardware_of(name: str, *, num_devices: int = 1) -> Hardware:
    """The hardware that a named device stands for.

    Raises:
        ConfigError: no such device.
    """
    facts = find_device(name)
    if facts is None:
        memory = int(name.lower().removeprefix("cpu-").removesuffix("g")) * GIB
        return Hardware(
            device="cpu", name=f"a CPU with {memory // GIB} GiB", num_devices=1, memory_bytes=memory, cpu_threads=1,
            ram_bytes=memory, ram_available_bytes=memory, has_bf16=False,
        )  # fmt: skip
    memory = int(facts.memory_gib * GIB)
    return Hardware(
        device=facts.device, name=facts.product, num_devices=num_devices, memory_bytes=memory, cpu_threads=1,
        ram_bytes=0, ram_available_bytes=0, has_bf16=facts.has_bf16,
    )  # fmt: skip
