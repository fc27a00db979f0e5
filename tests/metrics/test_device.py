"""Peaks and memory, with accelerators played by a stand-in."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titan_lite.config.schema import Metrics
from titan_lite.metrics import device as device_module
from titan_lite.metrics.device import (
    GIB,
    DeviceMemory,
    best_seconds,
    device_name,
    find_peak,
    measured_peak_tflops,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that cuda:0 is a device of the given name."""

    def pretend(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    return pretend


def test_the_table_supplies_the_peak_by_device_name_and_dtype(gpu):
    gpu("NVIDIA H100 80GB HBM3")
    peak = find_peak(Metrics(), CUDA, "bfloat16")
    assert peak.tflops == 989.4
    assert peak.source.startswith("H100 SXM 80GB, dense bfloat16, NVIDIA datasheet")


def test_the_configured_peak_wins(gpu):
    gpu("NVIDIA H100 80GB HBM3")
    peak = find_peak(Metrics(peak_tflops=835.0), CUDA, "bfloat16")
    assert (peak.tflops, peak.source) == (835.0, "metrics.peak_tflops")


def test_an_unknown_device_has_no_peak_and_names_the_key(gpu):
    gpu("NVIDIA GeForce RTX 9090")
    peak = find_peak(Metrics(), CUDA, "bfloat16")
    assert peak.tflops is None
    assert peak.source == (
        "no peak is known for device 'NVIDIA GeForce RTX 9090'; set metrics.peak_tflops"
    )


def test_a_device_without_the_dtype_has_no_peak_and_says_why(gpu):
    gpu("Tesla V100-SXM2-16GB")
    peak = find_peak(Metrics(), CUDA, "bfloat16")
    assert peak.tflops is None
    assert peak.source == (
        "no bfloat16 peak is known for V100 SXM2 16GB (NVIDIA datasheet); set metrics.peak_tflops"
    )


def test_float32_divides_by_tf32_only_where_torch_may_use_it(gpu):
    gpu("NVIDIA A100-SXM4-80GB")
    assert find_peak(Metrics(), CUDA, "float32").tflops is None
    torch.set_float32_matmul_precision("high")
    try:
        assert find_peak(Metrics(), CUDA, "float32").tflops == 156
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cpus_peak_is_a_measured_matmul(dtype):
    peak = find_peak(Metrics(), CPU, dtype)
    assert 1e-4 < peak.tflops < 100
    assert peak.source == (f"{dtype} matmul measured at start, threads: {torch.get_num_threads()}")


def test_measuring_the_peak_leaves_random_numbers_and_threads_alone(monkeypatch):
    monkeypatch.setattr(device_module, "_MATMUL_SECONDS", 0.001)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measured_peak_tflops(CPU, torch.float32)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3, "of a thread that starts later"
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state())


def test_the_peak_is_the_sum_of_what_each_thread_reaches_alone(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(device_module, "best_seconds", lambda work, budget: 1e-3)
    assert measured_peak_tflops(CPU, torch.float32) == pytest.approx(3 * 2 * 512**3 / 1e9)
    assert used == [1, 1, 1, 3]


def test_the_peak_is_that_of_the_fastest_product_of_a_linear_layer(monkeypatch):
    """bfloat16 without AVX-512: the plain product takes 20 times as long as a transposed one."""
    seconds = iter((8e-3, 1e-3, 4e-3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(device_module, "best_seconds", lambda work, budget: next(seconds))
    assert measured_peak_tflops(CPU, torch.bfloat16) == pytest.approx(2 * 512**3 / 1e9)


@pytest.mark.parametrize(
    ("durations", "budget", "best", "repetitions"),
    [
        ([5, 3, 4, 2, 1], 13, 2, 4),
        ([5, 3, 4, 2, 1], 12, 3, 3),
        ([50, 3], 10, 50, 1),
        ([7, 1, 1, 1, 9], 9, 1, 3),
    ],
)
def test_the_best_time_is_that_of_the_repetitions_within_the_budget(
    durations, budget, best, repetitions
):
    now, done = [100.0], []

    def work():
        now[0] += durations[len(done)]
        done.append(None)

    assert best_seconds(work, budget, lambda: now[0]) == best
    assert len(done) == repetitions


def test_the_cpu_has_a_name():
    assert device_name(CPU)


def test_cpu_memory_is_the_peak_resident_set_in_gib():
    memory = DeviceMemory(CPU)
    before = memory.snapshot()
    assert list(before) == ["memory_gib"]
    held = torch.ones(int(before["memory_gib"] * GIB) + GIB // 4, dtype=torch.uint8)
    after = memory.snapshot()["memory_gib"]
    del held
    assert after >= before["memory_gib"] + 0.25
    memory.reset_peak()
    assert memory.snapshot()["memory_gib"] >= after


def test_accelerator_memory_is_the_allocators_peaks_in_gib(monkeypatch):
    stats = {
        "active_bytes.all.peak": 3 * GIB,
        "reserved_bytes.all.peak": 4 * GIB,
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    resets = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    memory = DeviceMemory(CUDA)
    assert memory.snapshot() == {
        "memory_gib": 3,
        "memory_reserved_gib": 4,
        "alloc_retries": 2,
        "ooms": 1,
    }
    memory.reset_peak()
    assert resets == [CUDA]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_has_a_name_and_memory():
    held = torch.ones(GIB // 4, dtype=torch.float32, device=CUDA)
    memory = DeviceMemory(CUDA)
    snapshot = memory.snapshot()
    assert 1 <= snapshot["memory_gib"] <= snapshot["memory_reserved_gib"]
    del held
    torch.cuda.empty_cache()
    memory.reset_peak()
    assert memory.snapshot()["memory_gib"] < 1
    assert device_module.device_name(CUDA) == torch.cuda.get_device_name(CUDA)
