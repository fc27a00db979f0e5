"""The peak table against names as drivers report them."""

import subprocess
import sys

import pytest

from titan_lite.planner.hardware import DEVICES, find_device

# Name as torch reports it, entry, dense peaks in TFLOP/s: bf16, fp16, fp8.
KNOWN = [
    ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB", None, 125, None),
    ("Tesla V100-SXM2-32GB", "V100 SXM2 32GB", None, 125, None),
    ("Tesla V100-PCIE-16GB", "V100 PCIe 16GB", None, 112, None),
    ("Tesla V100-PCIE-32GB", "V100 PCIe 32GB", None, 112, None),
    ("A100-SXM4-40GB", "A100 SXM 40GB", 312, 312, None),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB", 312, 312, None),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB", 312, 312, None),
    ("NVIDIA A100-SXM-80GB", "A100 SXM 80GB", 312, 312, None),
    ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB", 312, 312, None),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB", 312, 312, None),
    ("NVIDIA A100-SXM-64GB", "A100 SXM 64GB (Leonardo)", 312, 312, None),
    ("NVIDIA A800-SXM4-80GB", "A800 SXM 80GB", 312, 312, None),
    ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB", 989.4, 989.4, 1978.9),
    ("NVIDIA H100", "H100 SXM 96GB HBM2e", None, None, None),
    ("NVIDIA H100 PCIe", "H100 PCIe", 756, 756, 1513),
    ("NVIDIA H100 NVL", "H100 NVL", 835, 835, 1671),
    ("NVIDIA H20", "H20", 148, 148, 296),
    ("NVIDIA H200", "H200 SXM", 989, 989, 1979),
    ("NVIDIA H200 NVL", "H200 NVL", 835, 835, 1671),
    ("NVIDIA GH200 480GB", "GH200 96GB", 989, 989, 1979),
    ("NVIDIA GH200 144G HBM3e", "GH200 144GB", 989, 989, 1979),
    ("NVIDIA B200", "B200", 2250, 2250, 4500),
    ("NVIDIA GB200", "GB200", 2500, 2500, 5000),
    ("NVIDIA B300 SXM6 AC", "B300", 2250, 2250, 4500),
    ("NVIDIA GB300", "GB300", 2500, 2500, 5000),
    ("NVIDIA L40S", "L40S", 362, 362, 733),
    ("NVIDIA L4", "L4", 121, 121, 242),
    ("NVIDIA A10", "A10", 125, 125, None),
    ("NVIDIA A10G", "A10G", 70, 70, None),
    ("NVIDIA RTX A6000", "RTX A6000", 154.85, 154.85, None),
    ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090", 71, 71, None),
    ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090", 165.2, 165.2, 330.3),
    ("NVIDIA GeForce RTX 5090", "GeForce RTX 5090", 209.5, 209.5, 419),
    ("AMD Instinct MI250X", "MI250X GCD", 191.5, 191.5, None),
    ("AMD Instinct MI300X", "MI300X", 1307.4, 1307.4, 2614.9),
    ("AMD Instinct MI300X VF", "MI300X", 1307.4, 1307.4, 2614.9),
    ("AMD Instinct MI325X", "MI325X", 1307.4, 1307.4, 2614.9),
    ("AMD Instinct MI355X", "MI355X", 2500, 2500, 5000),
    ("Intel(R) Data Center GPU Max 1550", "Data Center GPU Max 1550", None, None, None),
    ("GAUDI2", "Gaudi 2", 432, None, 865),
    ("GAUDI3", "Gaudi 3", 1835, None, 1835),
    ("trn1", "Trainium 1 core", 90, None, None),
    ("trn2", "Trainium 2 core", 158, None, None),
    ("TPU v4", "TPU v4", 275, None, None),
    ("TPU v5 lite", "TPU v5e", 197, None, None),
    ("TPU v5p", "TPU v5p", 459, None, None),
    ("TPU v6 lite", "TPU v6e", 918, None, None),
    ("TPU7x", "TPU v7 core", 1153.5, None, None),
]

UNKNOWN = [
    "",
    "NVIDIA",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA H800",
    "NVIDIA H20-3e",
    "NVIDIA A100X",
    "NVIDIA A1000",
    "NVIDIA RTX A1000",
    "NVIDIA A40",
    "NVIDIA L40",
    "NVIDIA L20",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GB10",
    "Tesla V100S-PCIE-32GB",
    "Tesla V100-SXM3-32GB",
    "Tesla V100-FHHL-16GB",
    "Tesla T4",
    "AMD Instinct MI250X/MI250",
    "AMD Instinct MI300A",
    "AMD Instinct MI308X",
    "AMD Instinct MI350X",
    "Intel(R) Data Center GPU Max 1100",
    "GAUDI",
    "TPU v3",
    "Apple M3 Max",
]


@pytest.mark.parametrize(("driver_name", "entry", "bf16", "fp16", "fp8"), KNOWN)
def test_a_driver_name_finds_its_entry_and_dense_peaks(driver_name, entry, bf16, fp16, fp8):
    device = find_device(driver_name)
    assert device is not None
    assert device.name == entry
    assert device.tflops("bfloat16") == bf16
    assert device.tflops("float16") == fp16
    assert device.tflops("float8") == fp8


def test_every_entry_is_tested_by_name():
    assert {entry for _, entry, *_ in KNOWN} == {device.name for device in DEVICES}


@pytest.mark.parametrize("driver_name", UNKNOWN)
def test_a_device_outside_the_table_never_gets_a_neighbours_value(driver_name):
    assert find_device(driver_name) is None


def test_case_and_spacing_of_the_name_do_not_matter():
    assert find_device("nvidia l40s") is find_device("NVIDIA  L40S ") is find_device("NVIDIA L40S")


def test_no_two_entries_claim_one_name():
    names = [name.lower() for device in DEVICES for name in device.names]
    assert len(set(names)) == len(names)
    assert all(find_device(name).name == d.name for d in DEVICES for name in d.names)


def test_the_table_is_dense_and_in_consistent_units():
    for device in DEVICES:
        assert device.source, device.name
        if device.bf16_tflops and device.fp16_tflops:
            assert device.bf16_tflops == device.fp16_tflops, device.name
        if device.bf16_tflops and device.fp8_tflops and device.name != "Gaudi 3":
            # L40S's datasheet prints 733 for 2 x 362.05, Gaudi 2's 865 for 2 x 432.
            assert device.fp8_tflops == pytest.approx(2 * device.bf16_tflops, rel=0.015), (
                device.name
            )
        if device.tf32_tflops:
            assert device.tf32_tflops == pytest.approx(device.fp16_tflops / 2, rel=0.02), (
                device.name
            )
        for value in (device.memory_gb, device.hbm_gbs, device.link_gbs, device.tdp_w):
            assert value is None or 10 < value < 10_000, device.name


def test_volta_has_tensor_cores_for_float16_only():
    v100 = find_device("Tesla V100-SXM2-32GB")
    assert (v100.tflops("bfloat16"), v100.tflops("float16"), v100.tflops("float32")) == (
        None,
        125,
        15.7,
    )
    assert v100.tflops("tfloat32") is None


def test_unverified_values_say_so():
    for name in ("NVIDIA A800-SXM4-80GB", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA A10G"):
        assert "unverified" in find_device(name).source


def test_the_planner_never_imports_torch():
    code = (
        "import sys, titan_lite.planner.hardware, titan_lite.planner.counts;"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
