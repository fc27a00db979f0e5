"""The projections of Yin et al., and titan-lite plan scaling."""

import json
from pathlib import Path

import pytest

from titan_lite import cli
from titan_lite.planner.cluster import find_cluster
from titan_lite.tools import plan_scaling as scaling
from titan_lite.tools.published import predict_row, read_rows

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "train_configs/gpt_175b_fsdp.toml")
SUMMIT, FRONTIER = (27_648, 112e12), (37_632, 384e12)
# FLOPs of a step of one device that has 4 samples of the 1T model.
STEP = 6 * 1e12 * 4 * 2048


def test_flops_of_compute_optimal_training() -> None:
    assert scaling.optimal_flops(175e9) == pytest.approx(3.675e24)  # published: 3.7e24
    assert scaling.optimal_flops(1e12) == pytest.approx(1.2e26)


@pytest.mark.parametrize(
    ("parameters", "machine", "published", "computed"),
    [
        (175e9, SUMMIT, 14, 13.7),
        (1e12, SUMMIT, 449, 448.5),
        (175e9, FRONTIER, 3, 2.94),
        (1e12, FRONTIER, 96, 96.1),
    ],
)
def test_ideal_days(
    parameters: float, machine: tuple[int, float], published: float, computed: float
) -> None:
    days = scaling.ideal_days(scaling.optimal_flops(parameters), *machine)
    assert days == pytest.approx(computed, rel=0.003)
    assert round(days) == pytest.approx(published, abs=1)


def test_flops_of_a_step_of_one_device() -> None:
    assert pytest.approx(4.915e16, rel=1e-3) == STEP  # published: 4.9e16


@pytest.mark.parametrize(
    ("tflops", "computed", "published"), [(1, 0.244, 0.24), (384, 93.8, 94), (384 * 0.4, 37.5, 37)]
)
def test_bandwidth_for_perfect_scaling(tflops: float, computed: float, published: float) -> None:
    """In GB/s, 4 bytes a parameter: FSDP moves the model three times a step."""
    actual = 3 * 4 * 1e12 / (STEP / (tflops * 1e12)) / 1e9
    assert actual == pytest.approx(computed, rel=0.002)
    assert actual == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("tflops", "devices", "computed", "published"),
    [(8.2, 1536, 12.6, 12.6), (47.5, 1024, 48.6, 48.6)],
)
def test_speed_of_all_devices(
    tflops: float, devices: int, computed: float, published: float
) -> None:
    assert tflops * devices / 1e3 == pytest.approx(computed, abs=0.05)
    assert computed == published


def test_speed_from_power() -> None:
    """408 W x 0.235 TFLOP/s per W of a module, half of it a device's."""
    watts, tflops_per_watt = 408, 0.235
    assert watts * tflops_per_watt / 2 == pytest.approx(47.9, abs=0.05)


@pytest.mark.parametrize(("bytes_per_parameter", "nodes"), [(2, 2.0), (4, 4.0)])
def test_nodes_that_hold_the_16b_on_summit(bytes_per_parameter: int, nodes: float) -> None:
    """Weights, gradients and optimizer state are six models; a node has 96 GB."""
    assert 6 * bytes_per_parameter * 16e9 / 96e9 == pytest.approx(nodes)


@pytest.mark.parametrize(("efficiency", "mwh"), [(0.165, 6187), (0.235, 4344)])
def test_energy_of_the_175b(efficiency: float, mwh: float) -> None:
    """At an efficiency in TFLOP/s per W; of the devices alone."""
    energy = scaling.optimal_flops(175e9) / (efficiency * 1e12) / 3.6e9
    assert energy == pytest.approx(mwh, rel=1e-3)


def test_speeds_on_more_devices_follow_from_that_of_128() -> None:
    """One constant, fitted to 128 devices: published 48.5, 48.5 and 47.5 TFLOP/s."""
    rows = [
        row
        for row in read_rows(str(ROOT / "assets/published_rows.toml"))
        if row["system"] == "yin" and row["use"] == "time"
    ]
    values = dict(find_cluster("crusher").values)
    for _ in range(5):
        first = predict_row(rows[0], values).value
        assert first is not None
        values["matmul/MI250X"] *= rows[0]["value"] / first
    actual = [predict_row(row, values).value for row in rows]
    assert actual[0] == pytest.approx(48.8, rel=1e-3)
    assert actual[1:] == pytest.approx([48.5, 48.5, 47.5], rel=0.03)


def test_models_and_devices_are_projected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.png"
    args = ["plan", "scaling", CONFIG, "--cluster=crusher", "--gpus=512,1024", "--json"]
    assert cli.main([*args, f"--plot={picture}"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in rows] == [512, 1024]
    for row in rows:
        assert row["days"] > row["ideal_days"] * 1.5
        assert row["flops"] == pytest.approx(120 * row["parameters"] ** 2)
    assert rows[0]["ideal_days"] == pytest.approx(2 * rows[1]["ideal_days"])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_layout_that_does_not_divide_is_listed_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["plan", "scaling", CONFIG, "--cluster=h100", "--gpus=9", "--parallel.tp=2"]
    assert cli.main(args) == 0
    assert "the world size (9) must be" in capsys.readouterr().out


def test_the_first_configurations_cluster_is_the_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = []
    for options in (["--job.cluster=a100"], ["--cluster=a100"], []):
        assert cli.main(["plan", "scaling", CONFIG, "--gpus=512", "--json", *options]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("option", [["--world-size", "8"], ["--world-size=8"]])
def test_a_world_size_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "scaling", CONFIG, *option]) == 2
    assert "--world-size has no effect: set --gpus" in capsys.readouterr().err
