"""Datasheet peaks of training accelerators, found by the name that the driver reports."""

from dataclasses import dataclass
from typing import Literal

NumberFormat = Literal["bfloat16", "float16", "float8", "tfloat32", "float32"]
"""Input format of a matmul."""

NVIDIA = "NVIDIA datasheet"
AMD = "AMD datasheet"
TITAN = "torchtitan get_peak_flops"
UNVERIFIED = "unverified, from memory"
NVIDIA_TITAN = f"{NVIDIA}; {TITAN}"
FP8_TF32_UNVERIFIED = f"{TITAN}; fp8 and tf32 {UNVERIFIED}"
KLOCKWOOD_TITAN = f"glennklockwood.com; {TITAN}"
AMD_HALVED = f"{AMD}, half of a module; {TITAN}"
AMD_ROUNDED = f"{AMD}; torchtitan rounds to 1,300"
AS_A100_SXM = f"as A100 SXM; {UNVERIFIED}"
AS_H100_SXM = f"as H100 SXM; {UNVERIFIED}"
H100_CUSTOM = "no datasheet: between 835 and 989 TFLOP/s"
INTEL = "Intel, Hot Chips 2024"
INTEL_CONFLICT = "sources conflict: torchtitan 298.2 or 340.8 TFLOP/s, Intel 839"
NVIDIA_HALVED = f"{NVIDIA}, sparse values halved"
NVIDIA_LEVANTER = f"{NVIDIA}; levanter flop_utils"
NVIDIA_QUARTERED = f"{NVIDIA}, sparse value with float16 accumulation / 4; {UNVERIFIED}"
GOOGLE_TITAN = f"Google Cloud documentation; {TITAN}"


@dataclass(frozen=True)
class Device:
    """One device as torch sees it: half a module for MI250X, a core for TPU v7.

    names: what the driver reports, without a leading "NVIDIA" or "AMD", in any case.
    *_tflops: dense matmul peaks (no sparsity), accumulated in float32 as PyTorch does, in TFLOP/s;
    None where the device has no such format or no value was found. memory_gb, hbm_gbs: device
    memory in GB (10^9 bytes) and GB/s. link_gbs: GB/s of the links to other devices, both
    directions together. tdp_w: W at the default power limit.
    source: where the peaks come from; it says so where they could not be verified.
    """

    name: str
    names: tuple[str, ...]
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp8_tflops: float | None
    tf32_tflops: float | None
    fp32_tflops: float | None
    memory_gb: float | None
    hbm_gbs: float | None
    link_gbs: float | None
    tdp_w: float | None
    source: str

    def tflops(self, number_format: NumberFormat) -> float | None:
        """Dense peak of matmuls in this format, in TFLOP/s, or None where none is known."""
        return {
            "bfloat16": self.bf16_tflops,
            "float16": self.fp16_tflops,
            "float8": self.fp8_tflops,
            "tfloat32": self.tf32_tflops,
            "float32": self.fp32_tflops,
        }[number_format]


def find_device(device_name: str) -> Device | None:
    """The device of this name, as torch.cuda.get_device_name reports it, or None.

    The whole name must match: a slice ("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), a laptop part or a
    sibling that is not in the table is unknown, and never gets a neighbour's value.
    """
    return _BY_NAME.get(_normalize(device_name))


def find_by_short_name(name: str) -> Device | None:
    """The first device whose name in the table begins with these words, in any case."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    names = ((device, device.name.lower().split()) for device in DEVICES)
    return next((d for d, name in names if words and name[: len(words)] == words), None)


def _normalize(name: str) -> str:
    words = name.lower().split()
    return " ".join(words[1:] if words[:1] in (["nvidia"], ["amd"]) else words)


# fmt: off
DEVICES: tuple[Device, ...] = (
    #      TFLOP/s                               memory
    #      bf16    fp16    fp8     tf32   fp32  GB    GB/s  link   W     source
    # Volta has no bfloat16.
    Device("V100 SXM2 16GB", ("Tesla V100-SXM2-16GB",),
           None,   125,    None,   None,  15.7, 16,   900,  300,   300,  NVIDIA),
    Device("V100 SXM2 32GB", ("Tesla V100-SXM2-32GB",),
           None,   125,    None,   None,  15.7, 32,   900,  300,   300,  NVIDIA),
    Device("V100 PCIe 16GB", ("Tesla V100-PCIE-16GB",),
           None,   112,    None,   None,  14,   16,   900,  32,    250,  NVIDIA),
    Device("V100 PCIe 32GB", ("Tesla V100-PCIE-32GB",),
           None,   112,    None,   None,  14,   32,   900,  32,    250,  NVIDIA),
    Device("A100 SXM 40GB", ("A100-SXM4-40GB", "A100-SXM-40GB"),
           312,    312,    None,   156,   None, 40,   1555, 600,   400,  NVIDIA_TITAN),
    Device("A100 SXM 80GB", ("A100-SXM4-80GB", "A100-SXM-80GB"),
           312,    312,    None,   156,   None, 80,   2039, 600,   400,  NVIDIA_TITAN),
    Device("A100 PCIe 40GB", ("A100-PCIE-40GB",),
           312,    312,    None,   156,   None, 40,   1555, 600,   250,  NVIDIA_TITAN),
    Device("A100 PCIe 80GB", ("A100 80GB PCIe",),
           312,    312,    None,   156,   None, 80,   1935, 600,   300,  NVIDIA_TITAN),
    # Custom part: 354 TFLOP/s if its 124 multiprocessors run at 1,395 MHz, 312 is nominal.
    Device("A100 SXM 64GB (Leonardo)", ("A100-SXM-64GB",),
           312,    312,    None,   156,   None, 64,   1640, 600,   440,  AS_A100_SXM),
    Device("A800 SXM 80GB", ("A800-SXM4-80GB",),
           312,    312,    None,   156,   None, 80,   2039, 400,   400,  UNVERIFIED),
    Device("H100 SXM 80GB", ("H100 80GB HBM3",),
           989.4,  989.4,  1978.9, 494.7, None, 80,   3350, 900,   700,  NVIDIA_TITAN),
    # Custom, power-limited part; torchtitan divides by 989. The bare name tells no form factor.
    Device("H100 SXM 96GB HBM2e", ("H100",),
           None,   None,   None,   None,  None, 96,   2400, 900,   500,  H100_CUSTOM),
    Device("H100 PCIe", ("H100 PCIe",),
           756,    756,    1513,   378,   None, 80,   2000, 600,   350,  NVIDIA_TITAN),
    Device("H100 NVL", ("H100 NVL",),
           835,    835,    1671,   417,   None, 94,   3900, 600,   400,  FP8_TF32_UNVERIFIED),
    Device("H20", ("H20",),
           148,    148,    296,    74,    None, 96,   4000, 900,   400,  FP8_TF32_UNVERIFIED),
    Device("H200 SXM", ("H200",),
           989,    989,    1979,   494.7, None, 141,  4800, 900,   700,  NVIDIA_TITAN),
    Device("H200 NVL", ("H200 NVL",),
           835,    835,    1671,   None,  None, 141,  4800, None,  600,  UNVERIFIED),
    # The 480 GB are the host's memory; the module's 450 to 1,000 W include the processor.
    Device("GH200 96GB", ("GH200 480GB",),
           989,    989,    1979,   494.7, None, 96,   4000, 900,   None, AS_H100_SXM),
    Device("GH200 144GB", ("GH200 144G HBM3e",),
           989,    989,    1979,   494.7, None, 144,  4900, 900,   None, AS_H100_SXM),
    Device("B200", ("B200",),
           2250,   2250,   4500,   1125,  None, 180,  8000, 1800,  1000, KLOCKWOOD_TITAN),
    Device("GB200", ("GB200",),
           2500,   2500,   5000,   1250,  None, 186,  8000, 1800,  1200, KLOCKWOOD_TITAN),
    # Sources differ on memory (270 to 288 GB) and power (1,100 to 1,400 W).
    Device("B300", ("B300", "B300 SXM6", "B300 SXM6 AC"),
           2250,   2250,   4500,   1125,  None, 270,  8000, 1800,  1100, KLOCKWOOD_TITAN),
    Device("GB300", ("GB300",),
           2500,   2500,   5000,   1250,  None, 279,  8000, 1800,  1400, TITAN),
    # Its datasheet's 362.05 and 733 do not agree: arithmetic gives 366.4.
    Device("L40S", ("L40S",),
           362,    362,    733,    183,   None, 48,   864,  64,    350,  NVIDIA_TITAN),
    Device("L4", ("L4",),
           121,    121,    242,    60,    None, 24,   300,  64,    72,   NVIDIA_HALVED),
    Device("A10", ("A10",),
           125,    125,    None,   62.5,  None, 24,   600,  64,    150,  NVIDIA_LEVANTER),
    Device("A10G", ("A10G",),
           70,     70,     None,   None,  None, 24,   600,  64,    None, UNVERIFIED),
    Device("RTX A6000", ("RTX A6000",),
           154.85, 154.85, None,   77,    None, 48,   768,  112.5, 300,  TITAN),
    # GeForce cores accumulate in float32 at half the float16-accumulation rate of their adverts.
    Device("GeForce RTX 3090", ("GeForce RTX 3090",),
           71,     71,     None,   35.6,  None, 24,   936,  112.5, 350,  UNVERIFIED),
    Device("GeForce RTX 4090", ("GeForce RTX 4090",),
           165.2,  165.2,  330.3,  82.6,  None, 24,   1008, 64,    450,  NVIDIA),
    Device("GeForce RTX 5090", ("GeForce RTX 5090",),
           209.5,  209.5,  419,    104.8, None, 32,   1792, 128,   575,  NVIDIA_QUARTERED),
    # torch sees each of the module's two dies as a device.
    Device("MI250X GCD", ("Instinct MI250X",),
           191.5,  191.5,  None,   None,  None, 64,   1638, 200,   None, AMD_HALVED),
    # VF: a whole device, passed to a virtual machine.
    Device("MI300X", ("Instinct MI300X", "Instinct MI300X OAM", "Instinct MI300X VF"),
           1307.4, 1307.4, 2614.9, 653.7, None, 192,  5300, 896,   750,  AMD_ROUNDED),
    Device("MI325X", ("Instinct MI325X", "Instinct MI325X OAM"),
           1307.4, 1307.4, 2614.9, 653.7, None, 256,  6000, 896,   1000, AMD_ROUNDED),
    Device("MI355X", ("Instinct MI355X", "Instinct MI355X OAM"),
           2500,   2500,   5000,   None,  None, 288,  8000, 1075,  1400, TITAN),
    # torchtitan's from the compute units of a tile at 1.3 GHz; memory is the module's.
    Device("Data Center GPU Max 1550", ("Intel(R) Data Center GPU Max 1550",),
           None,   None,   None,   None,  None, 128,  3277, None,  600,  INTEL_CONFLICT),
    # One Intel page prints 835 for float8.
    Device("Gaudi 2", ("GAUDI2",),
           432,    None,   865,    None,  None, 96,   2460, 600,   600,  INTEL),
    Device("Gaudi 3", ("GAUDI3",),
           1835,   None,   1835,   None,  None, 128,  3670, 1200,  900,  INTEL),
    # torch sees parts of a chip, which has 32 GB at 820 GB/s (trn1), 96 GB at 2,900 GB/s (trn2).
    Device("Trainium 1 core", ("trn1", "trn1n"),
           90,     None,   None,   None,  None, None, None, None,  None, TITAN),
    Device("Trainium 2 core", ("trn2", "trn2n", "trn2u"),
           158,    None,   None,   None,  None, None, None, None,  None, TITAN),
    Device("TPU v4", ("TPU v4",),
           275,    None,   None,   None,  None, 32,   1228, None,  None, GOOGLE_TITAN),
    Device("TPU v5e", ("TPU v5e", "TPU v5 lite"),
           197,    None,   None,   None,  None, 16,   819,  400,   None, GOOGLE_TITAN),
    Device("TPU v5p", ("TPU v5p", "TPU v5"),
           459,    None,   None,   None,  None, 95,   2765, 1200,  None, GOOGLE_TITAN),
    Device("TPU v6e", ("TPU v6e", "TPU v6 lite"),
           918,    None,   None,   None,  None, 32,   1640, None,  None, GOOGLE_TITAN),
    Device("TPU v7 core", ("TPU v7", "TPU7x"),
           1153.5, None,   None,   None,  None, None, None, None,  None, GOOGLE_TITAN),
)
# fmt: on

_BY_NAME = {_normalize(name): device for device in DEVICES for name in device.names}
