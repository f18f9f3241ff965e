"""What a device can do at best, and what it costs: the table that plans are made from.

Every number has its source beside it. How much of a peak is reached is another matter: see `efficiency.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal

from deepseek_jax.config import ConfigError, require
from deepseek_jax.planning.efficiency import BLACKWELL, HOPPER, Efficiency
from deepseek_jax.planning.efficiency import CPU as CPU_EFFICIENCY

Dtype = Literal["float32", "bfloat16", "float8"]
"""What products are made of; sums are float32."""

HOW_TO_ADD = "another is a `Device(...)` in deepseek_jax/planning/devices.py, added to DEVICES"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device and its links. Rates are per second and per device, links count one direction."""

    name: str
    memory: float
    """Bytes, of which a program can use `usable_memory`."""
    flops: Mapping[Dtype, float] = dataclasses.field(hash=False)
    """Dense products at the peak, float32 among them, which on a GPU is TF32. Where another dtype is missing the next
    wider one is used."""
    memory_bandwidth: float
    """Bytes."""
    node_bandwidth: float
    """Bytes that a device sends to others of its node (its NVLink domain), as the link's specification has it, less the
    protocol."""
    network_bandwidth: float
    """Bytes that a device sends to other nodes."""
    host_bandwidth: float
    """Bytes that a device copies to its host's memory, as specified."""
    devices_per_node: int
    price: float | None
    """US dollars for an hour; None: nobody rents it out."""
    efficiency: Efficiency
    """What of the peaks is reached."""
    source: str
    """Where the numbers are from."""
    overlaps: bool = True
    """Whether exchanges can run beside compute."""
    reserved: float = 2e9
    """Bytes that the driver, the runtime and the communication library keep for themselves."""

    def peak(self, dtype: Dtype) -> float:
        """Products per second in a dtype, or in the next wider one that the device has."""
        order: tuple[Dtype, ...] = ("float8", "bfloat16", "float32")
        return next(self.flops[one] for one in order[order.index(dtype) :] if one in self.flops)

    def product_rate(self, dtype: Dtype, inputs: int) -> float:
        """FLOP per second that a product over a contraction of `inputs` reaches."""
        return self.efficiency.product_rate(self.peak(dtype), self.peak("float8"), inputs)

    @property
    def usable_memory(self) -> float:
        """Bytes that are left to a program."""
        return self.memory - self.reserved


_HOPPER: dict[Dtype, float] = {"float32": 494.7e12, "bfloat16": 989.4e12, "float8": 1978.9e12}
_PCIE_5 = 63e9
"""PCIe 5.0 with 16 lanes, one direction."""
_NETWORK = 50e9
"""One NIC of 400 Gb/s for each device: DeepSeek-V3's cluster (tech report, section 3.1), and taken for all others."""

H800 = Device(
    name="h800",
    memory=80e9,
    flops=_HOPPER,
    memory_bandwidth=3.35e12,
    node_bandwidth=160e9,
    network_bandwidth=_NETWORK,
    host_bandwidth=_PCIE_5,
    devices_per_node=8,
    price=2.0,
    efficiency=HOPPER,
    source="DeepSeek-V3 tech report: NVLink 160 GB/s, InfiniBand 50 GB/s, $2 an hour; the rest is the H100's",
)
H100 = dataclasses.replace(
    H800,
    name="h100",
    node_bandwidth=360e9,
    price=3.0,
    source="NVIDIA's data sheet (SXM, dense): 989.4 and 1978.9 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 450 GB/s, of which "
    "160/200 as on an H800; price: the middle of $2.50 to $3.50 of specialised clouds, May 2026",
)
H200 = dataclasses.replace(
    H100,
    name="h200",
    memory=141e9,
    memory_bandwidth=4.8e12,
    price=4.54,
    source="NVIDIA's data sheet: an H100 with 141 GB at 4.8 TB/s; price: on demand at one cloud, 17 March 2026",
)
B200 = Device(
    name="b200",
    memory=180e9,
    flops={"float32": 1100e12, "bfloat16": 2250e12, "float8": 4500e12},
    memory_bandwidth=7.7e12,
    node_bandwidth=720e9,
    network_bandwidth=_NETWORK,
    host_bandwidth=_PCIE_5,
    devices_per_node=8,
    price=6.03,
    efficiency=BLACKWELL,
    source="NVIDIA's data sheet of HGX B200 (dense): 2.25 and 4.5 PFLOP/s, 180 GB, 7.7 TB/s, NVLink 900 GB/s, of which "
    "160/200 as on an H800; price: on demand at one cloud, 17 March 2026",
)
GB200 = dataclasses.replace(
    B200,
    name="gb200",
    memory=186e9,
    flops={"float32": 1250e12, "bfloat16": 2500e12, "float8": 5000e12},
    memory_bandwidth=8e12,
    host_bandwidth=225e9,
    devices_per_node=72,
    price=4.54,
    source="NVIDIA's data sheet of GB200 NVL72 (dense): 2.5 and 5 PFLOP/s, 186 GB, 8 TB/s, 72 devices on one NVLink, "
    "900 GB/s in both directions between a Grace and its two GPUs; price: half of a superchip's, on demand at one "
    "cloud, 17 March 2026",
)
CPU = Device(
    name="cpu",
    memory=12e9,
    flops={"float32": 197e9},
    memory_bandwidth=38e9,
    node_bandwidth=5e9,
    network_bandwidth=1e9,
    host_bandwidth=19e9,
    devices_per_node=2,
    price=None,
    efficiency=CPU_EFFICIENCY,
    overlaps=False,
    source="one core of an Intel Xeon (family 6, model 167): the best of float32 products of 1024 to 2048 rows, and "
    "adding 1 to 1 MB, measured on 27 November 2026 with jax 0.10.2 beside other load; links are guesses, and a copy "
    "to the host is one within memory",
    reserved=1e9,
)

DEVICES: dict[str, Device] = {one.name: one for one in (H800, H100, H200, B200, GB200, CPU)}
"""By the name that `tools.plan --gpu` takes."""


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
      ConfigError: there is none; the message has the list, and says how to add one.
    """
    found = DEVICES.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"there is no GPU {name!r}; {hint}there are {', '.join(DEVICES)}; {HOW_TO_ADD}")


def with_price(device: Device, price: float | None) -> Device:
    """The device at another price per hour; None: its own."""
    if price is None:
        return device
    require(price >= 0, f"--price is dollars per GPU and hour, not {price}")
    return dataclasses.replace(device, price=price)
