"""Hardware: memory, FLOP/s and bytes/s; and the cards of the makers' datasheets.

Knows numbers and their source; no models. Datasheet figures are peaks: what a real run gets of them is an assumption, stated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from longreach.planning.theory import GB, GIB

TB, TFLOPS = 10**12, 10**12
DISK = 2.0 * GB  # bytes/s, assumed where nobody says it


@dataclass(frozen=True)
class Curve:
    """A speed that depends on a size: measured points, straight lines between them in the logarithm of the size, constant outside."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, size: float) -> float:
        below = [p for p in self.points if p[0] <= size]
        above = [p for p in self.points if p[0] > size]
        if not below or not above:
            return below[-1][1] if below else above[0][1]
        (x0, y0), (x1, y1) = below[-1], above[0]
        return y0 + (y1 - y0) * math.log(size / x0) / math.log(x1 / x0)


@dataclass(frozen=True)
class Speeds:
    """What a forward gets, by what it does. Rates are those that are reached, not peaks."""

    gemm: Curve  # FLOP/s of a matrix product with many rows, by elements of the matrix
    gemv: Curve  # bytes/s of a matrix read for one row, by elements of the matrix
    attention: Curve  # FLOP/s of attention with many queries, by width of a head
    keys: float  # bytes/s of keys and values read for one query
    elementwise: float  # bytes/s of norms, activations, rotations, merges
    link: float  # bytes/s between host and device
    forward_seconds: float  # of a forward, whatever it computes
    layer_seconds: float  # of a layer
    call_seconds: float  # of every attention call beyond the first of a layer
    square: float = 1.0  # what a pair in the causal square of a forward costs, in pairs of a rectangle: a kernel that cuts coarsely computes both halves


@dataclass(frozen=True)
class Hardware:
    """One device. Efficiencies are the assumed shares of the peaks; `measured` replaces them where the machine was calibrated."""

    name: str
    memory: int  # bytes
    flops: dict[str, float] = field(hash=False)  # peak FLOP/s by dtype, dense
    bandwidth: float  # peak bytes/s of the memory
    link: float  # bytes/s to the host, one direction
    reserved: int  # bytes that the driver, the runtime and the libraries take
    source: str
    host_memory: int | None = None
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.7
    link_efficiency: float = 0.8
    disk: float = DISK  # bytes/s of files
    device: str = "cuda"
    measured: dict[str, Speeds] | None = field(default=None, hash=False)  # by dtype

    def peak(self, dtype: str) -> float:
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no FLOP/s for {dtype}; pass --dtype {' or '.join(self.flops)}, or add it to the file's [flops]")
        return self.flops[dtype]

    def speeds(self, dtype: str) -> Speeds:
        """Measured on this machine, or the peaks times the efficiencies with the overheads of eager PyTorch on a GPU."""
        if self.measured is not None:
            if dtype not in self.measured:
                raise ValueError(f"this machine was measured in {' and '.join(self.measured)} only; pass --dtype, or run longreach plan --calibrate again")
            return self.measured[dtype]
        compute, memory = self.peak(dtype) * self.compute_efficiency, self.bandwidth * self.memory_efficiency
        return Speeds(flat(compute), flat(memory), flat(compute), memory, memory, self.link * self.link_efficiency, 1.5e-3, 9e-4, 3e-4)


def flat(speed: float) -> Curve:
    return Curve(((1.0, speed),))


def card(name: str, memory: int, half: float, single: float, bandwidth: float, link: float, source: str) -> Hardware:
    flops = {"bfloat16": half, "float16": half, "float32": single}
    return Hardware(name, memory, flops, bandwidth, link, reserved=GIB, source=source)


# PCIe 4.0 and 5.0 with 16 lanes: 32 and 64 GB/s in each direction. FLOP/s are dense: half of what a sheet gives "with sparsity". float32 is that
# of the vector units, which PyTorch uses unless TF32 is switched on. Memory is what the sheet calls GB.
CARDS = {
    c.name: c
    for c in (
        card("H200", 141 * GB, 989.5 * TFLOPS, 67 * TFLOPS, 4.8 * TB, 64 * GB, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
        card("H100-80", 80 * GB, 989.5 * TFLOPS, 67 * TFLOPS, 3.35 * TB, 64 * GB, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
        card("A100-80", 80 * GB, 312 * TFLOPS, 19.5 * TFLOPS, 2.039 * TB, 32 * GB, "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)"),
        card("A100-40", 40 * GB, 312 * TFLOPS, 19.5 * TFLOPS, 1.555 * TB, 32 * GB, "NVIDIA A100 Tensor Core GPU datasheet (40 GB)"),
        card("L40S", 48 * GB, 362 * TFLOPS, 91.6 * TFLOPS, 864 * GB, 32 * GB, "NVIDIA L40S datasheet"),
        card("L4", 24 * GB, 121 * TFLOPS, 30.3 * TFLOPS, 300 * GB, 32 * GB, "NVIDIA L4 datasheet"),
        card("RTX4090", 24 * GB, 165.2 * TFLOPS, 82.6 * TFLOPS, 1008 * GB, 32 * GB, "NVIDIA Ada GPU architecture whitepaper (FP16, FP32 accumulate)"),
        card("RTX3090", 24 * GB, 71 * TFLOPS, 35.6 * TFLOPS, 936 * GB, 32 * GB, "NVIDIA Ampere GA102 GPU architecture whitepaper (FP16, FP32 accumulate)"),
    )
}
