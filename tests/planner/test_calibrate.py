"""titan-lite plan calibrate: the fit on known machines, and a measurement by real processes."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.distributed import Workers
from titan_lite import cli
from titan_lite.planner.cluster import Cluster, find_cluster
from titan_lite.planner.kernels import Rates
from titan_lite.runtime.distributed import Process
from titan_lite.tools import calibrate, calibrate_fit, calibrate_measure
from titan_lite.tools.calibrate import to_toml
from titan_lite.tools.calibrate_fit import explain, fit
from titan_lite.tools.calibrate_measure import Machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Two nodes of two devices.
MACHINE = Machine(Process(0, 0, 4, torch.device("cpu")), per_node=2, budget=0.0)
CONSTANTS = {
    "kernel_us": 7.0,
    "hbm": 0.6,
    "matmul": 0.55,
    "inner": 64.0,
    "attention/flash": 0.2,
    "attention_forward": 1.0,
    "attention_forward_tokens": 120.0,
    "attention_backward": 0.7,
    "attention_backward_tokens": 450.0,
    "tp": 1.5,
    "loss": 0.5,
    "optimizer": 0.8,
    "link": 0.4,
    "hop_us": 60.0,
    "nic": 0.3,
    "node_hop_us": 200.0,
}


def cluster(device: str) -> Cluster:
    """Two devices a node, with the name of a shipped cluster's, as slow as a CPU."""
    known = find_cluster(device)
    slow = dataclasses.replace(
        known.device, bf16_tflops=0.1, fp32_tflops=0.05, hbm_gbs=4.0, source=calibrate_fit.MEASURED
    )
    return dataclasses.replace(known, device=slow, gpus_per_node=2, node_nic_gbs=2.0)


@pytest.mark.parametrize("device", ["h100", "b200"])
def test_the_fit_finds_the_constants_that_made_the_times(device: str, tmp_path: Path) -> None:
    """An architecture with its own constants, and one without."""
    true = calibrate_fit._with(cluster(device), CONSTANTS)
    seconds = explain(true, MACHINE)
    seconds |= {"alone": 1.0, "overlapped": 1.0 + 0.25 * seconds[f"{MACHINE.rings()[-9]}"]}
    actual = fit(cluster(device), MACHINE, seconds)
    assert explain(actual, MACHINE) == pytest.approx(explain(true, MACHINE), rel=2e-3)
    assert actual.measured.keys() == true.measured.keys() | {"interference"}
    for name, value in true.measured.items():
        assert actual.measured[name] == pytest.approx(value, rel=0.01), name
    file = tmp_path / "this-machine.toml"
    file.write_text(to_toml(actual, "a test", 2.5))
    read = find_cluster(str(file))
    assert read.calibrated
    assert read.price_per_gpu_hour == 2.5
    assert explain(read, MACHINE) == explain(actual, MACHINE)


def test_kernels_are_slower_in_a_block_than_alone() -> None:
    """Only kernels of blocks get slower; the optimizer and collectives do not."""
    true = calibrate_fit._with(cluster("h100"), CONSTANTS)
    alone = explain(true, MACHINE)
    slow = {name: 1.25 * value if "blocks" in name else value for name, value in alone.items()}
    actual = explain(fit(cluster("h100"), MACHINE, slow), MACHINE)
    # The matmul of the head is slower, the rest of the loss is not.
    assert alone["loss"] < actual.pop("loss") < 1.25 * alone.pop("loss")
    for name, value in alone.items():
        is_kernel = name.startswith(("linear", "other", "attention", "elementwise", "blocks"))
        assert actual[name] == pytest.approx(value * (1.25 if is_kernel else 1.0), rel=0.01), name


def test_what_was_not_measured_keeps_its_constant() -> None:
    """One device has no collectives."""
    alone = Machine(Process(0, 0, 1, torch.device("cpu")), per_node=1, budget=0.0)
    actual = fit(cluster("h100"), alone, explain(cluster("h100"), alone))
    assert not {"link", "hop_us", "nic", "node_hop_us", "interference"} & actual.measured.keys()
    assert "# Not measured: node_nic_gbs" in to_toml(actual, "a test", 0.0)


def test_short_sequences_slow_causal_attention_only() -> None:
    """A mask skips whole tiles: one tile takes as long as without the mask, many half as long."""
    constants = CONSTANTS | dict.fromkeys(
        ("attention_forward_tokens", "attention_backward_tokens"), 512.0
    )
    rates = Rates(calibrate_fit._with(cluster("h100"), constants), MACHINE.job())

    def seconds(span: int, causal: bool) -> float:
        job = dataclasses.replace(MACHINE.job(), micro_batch=1, seq_len=span, span=span)
        with mock.patch.object(type(job.args), "causal", causal):
            return sum(rates.attention(job))

    assert seconds(512, True) == pytest.approx(seconds(512, False))
    assert seconds(2**20, True) == pytest.approx(seconds(2**20, False) / 2, rel=1e-3)


def test_a_cpu_is_measured_in_float32() -> None:
    """Its runs are; half of the peak in bfloat16 leaves the prediction alone."""
    measured = calibrate_fit._with(cluster("h100"), CONSTANTS)
    half = dataclasses.replace(
        measured, device=dataclasses.replace(measured.device, bf16_tflops=0.05)
    )
    seconds = explain(measured, MACHINE)
    changed = {name for name, value in explain(half, MACHINE).items() if value != seconds[name]}
    assert changed == {name for name in seconds if name.startswith("other linear")}


def measure(file: Path) -> tuple[str, dict[str, float], dict[str, float]]:
    """Measures tiny kernels; then runs the command, as a launcher's processes do."""
    process = Process.from_environment()
    tiny = calibrate_measure.Sizes(
        128, ((64, 64, 64), (128, 64, 128)), (64, 128), (16, 64), 128, (64, 4096)
    )
    with (
        mock.patch.dict(calibrate_measure.SIZES, cpu=tiny),
        mock.patch.object(calibrate_measure, "ROUNDS", 1),
    ):
        actual, seconds, explained = calibrate.calibrate(process, per_node=2, budget=0.0)
        with (
            mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"),
            mock.patch.object(calibrate, "stop_process_group"),
        ):
            arguments = ["-o", str(file), "--seconds=0", "--price=2"]
            assert cli.main(["plan", "calibrate", *arguments]) == 0
    return to_toml(actual, "a test", 0.0), seconds, explained


@pytest.mark.distributed
def test_real_processes_measure_this_machine(
    workers: Mapping[int, Workers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them come to the same file, from which plan predicts a run."""
    file = tmp_path / "this-machine.toml"
    (text, seconds, explained), (other, *_) = workers[2].run(measure, file)
    assert text == other
    assert seconds.keys() == explained.keys() | {"alone", "overlapped"}
    assert all(0 < second < math.inf for second in [*seconds.values(), *explained.values()])
    assert sum("ranks 2, stride 1" in name for name in seconds) == 6
    assert {"blocks 64", "blocks 64, tp 2"} < seconds.keys()
    cluster = find_cluster(str(file))
    assert (cluster.gpus_per_node, cluster.price_per_gpu_hour, cluster.calibrated) == (2, 2, True)
    assert cluster.measured.keys() == set(tomllib.loads(text)["measured"])
    assert cli.main(["plan", "--cluster", str(file), "--world-size=2"]) == 0
    assert "this-machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "arguments", "message"),
    [
        (
            0,
            ["-o", "cluster.json"],
            "--output must be a .toml file in a folder that exists, got 'clu",
        ),
        (0, ["-o", "nowhere/c.toml"], "--output must be a .toml file in a folder that exists"),
        (0, ["--processes=0"], "--processes must be at least 1, got 0"),
        (8, ["--processes=0"], "must be from 1 to 8, the GPUs of this machine, got 0"),
        (8, ["--processes=9"], "must be from 1 to 8, the GPUs of this machine, got 9"),
    ],
)
def test_bad_input_is_one_message(
    gpus: int, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(calibrate, "count_gpus", return_value=gpus):
        assert cli.main(["plan", "calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, new = tmp_path / "folder.toml", tmp_path / "new.toml"
    folder.mkdir()
    with mock.patch.object(calibrate.torch.multiprocessing, "spawn") as spawn:
        assert cli.main(["plan", "calibrate", "-o", str(folder)]) == 2
        assert f"--output {folder} cannot be written: Is a directory" in capsys.readouterr().err
        spawn.assert_not_called()
        assert cli.main(["plan", "calibrate", "-o", str(new)]) == 0
        spawn.assert_called_once()
    assert not new.exists()
