"""titan-lite plan: predictions of runs and searches for layouts."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_lite import cli
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import ConfigError, load_config
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import FOLDER, Cluster, find_cluster
from titan_lite.planner.hardware import DEVICES, Device
from titan_lite.planner.job import Job
from titan_lite.planner.kernels import Rates
from titan_lite.planner.memory import FITS, least, memory, peak
from titan_lite.planner.predict import fitting_settings, model_flops, predict
from titan_lite.planner.read import is_legal, read_job
from titan_lite.planner.search import candidates, divisors, legal_of
from titan_lite.planner.step_time import PARTS, StepModel

ROOT = Path(__file__).parent.parent.parent
PRESET = str(ROOT / "train_configs/llama3_8b.toml")
NO_FILE = "--data.tokenizer_path="
SMALL = ("--model.num_layers=6", "--training.seq_len=512", "--training.global_batch_size=24")


def job(*overrides: str, world_size: int = 8) -> Job:
    plan = make_plan(PRESET, [NO_FILE, *overrides], world_size, with_files=False)
    return read_job(plan)


def job_of(family: str, *overrides: str) -> Job:
    plan = make_plan(None, [f"--model.name={family}", *overrides], 8, with_files=False)
    return read_job(plan)


def seconds(job: Job, cluster: Cluster) -> float:
    return StepModel(cluster, job).predict(job).seconds


H100 = find_cluster("h100")


def test_a_run_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", PRESET, NO_FILE, "--world-size=8", "--training.local_batch_size=2"]
    assert cli.main([*args, "--tokens=1T"]) == 0
    out = capsys.readouterr().out
    assert "45.3 GiB of 80.0 GiB: fits, 43% left" in out
    assert "Where the time goes" in out
    assert "Limited by the rate of matrix products" in out
    assert "--compile.enable=true" in out.partition("Would help most")[2]
    assert cli.main([*args, "--json", "--price=2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"]["seconds"] == pytest.approx(sum(facts["step"]["parts"].values()))
    low, high = facts["step"]["seconds_80"]
    assert low < facts["step"]["seconds"] < high < facts["step"]["seconds_90"][1]
    run = facts["run"]
    assert run["tokens"] == 1000 * 16 * 8192
    assert run["cost"] == pytest.approx(2 * run["gpu_hours"])
    assert run["gpu_hours"] == pytest.approx(8 * 24 * run["days"])
    # Hosts and the data centre take their share.
    assert run["mwh_with_hosts"] > 1.25 * run["mwh_devices"]


def test_a_run_that_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--activation_checkpoint.mode=none", "--training.local_batch_size=4"]
    assert cli.main(["plan", PRESET, NO_FILE, "--world-size=8", *args]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT, by" in out
    assert "--training.local_batch_size=1" in out.partition("Would fit")[2]


def test_settings_that_would_fit_are_computed() -> None:
    overrides = ["--activation_checkpoint.mode=none", "--training.local_batch_size=4"]
    plan = make_plan(PRESET, [NO_FILE, *overrides], 8, with_files=False)
    actual = fitting_settings(plan, H100.device)
    assert len(actual) == 3
    assert any(text.startswith("--training.local_batch_size=1: ") for text in actual)
    for text in actual:
        size = re.fullmatch(r"--.*: ([\d.]+) of 80 GiB, predicted", text)
        assert size
        assert float(size[1]) <= FITS * 80


@pytest.mark.parametrize("device", [d for d in DEVICES if d.memory_gb], ids=lambda d: d.name)
def test_settings_that_would_fit_do_not_depend_on_a_peak(device: Device) -> None:
    sizes = ["--model.num_layers=2", "--training.local_batch_size=4"]
    plan = make_plan(PRESET, [NO_FILE, *sizes], 8, with_files=False)
    assert fitting_settings(plan, device)


def test_a_run_out_of_memory_that_was_to_fit_is_given_smaller_settings() -> None:
    plan = make_plan(PRESET, [NO_FILE, "--training.local_batch_size=2"], 8, with_files=False)
    actual = fitting_settings(plan, H100.device)
    assert actual
    now = peak(read_job(plan)).bytes / 2**30
    for text in actual:
        assert float(text.rpartition(": ")[2].split()[0]) < now


def test_no_form_of_the_command_imports_torch(tmp_path: Path) -> None:
    rows = str(ROOT / "assets/published_rows.toml")
    program = f"""
import sys
from titan_lite import cli
cli.main(["plan", {PRESET!r}, "{NO_FILE}", "--world-size=8"])
cli.main(["plan", "search", "--world-size=2", "--cluster=a100"])
assert "numpy" not in sys.modules
cli.main(["plan", "validate", {rows!r}])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster=h1000"], '--cluster (command line): no cluster "h1000"; did you mean "h100"'),
        (["--cluster="], '--cluster (command line): no cluster ""'),
        (["--world-size=3", "--parallel.tp=2"], "multiple of pp (1)"),
        (["--parallel.tp=3", "--world-size=3"], "parallel.tp"),
        (["other.toml"], "expected one configuration, got"),
        (["--parallel.tp", "2"], "'2' is not an override: write --parallel.tp=2"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", PRESET, NO_FILE, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'device = "H100 SXM 80GB"',
            "",
            "device: missing; expected a name in assets/devices.txt",
        ),
        ('device = "H100 SXM 80GB"', 'device = "H101"', 'device: no device "H101"'),
        (
            "price_per_gpu_hour = 2.99",
            "",
            "price_per_gpu_hour: missing; expected a number of at least 0 (0 if the machines are "
            "free)\n",
        ),
        ("pue = 1.25", "", "pue: missing; expected a number of at least 1\n"),
        ("node_nic_gbs = 400", 'node_nic_gbs = "fast"', "node_nic_gbs: expected a number"),
        ("host_watts", "host_wats", 'host_wats: unknown key; did you mean "host_watts"'),
        ("pue = 1.25", "pue = 1.25\nmeasured = {matmull = 1}", "measured.matmull: not a constant"),
        ("pue = 1.25", "pue =", None),
        ('device = "H100 SXM 80GB"', "", "device: missing; expected a name in"),
        ('device = "H100 SXM 80GB"', "device = [1]", 'device: no device "[1]" in assets'),
        ("price_per_gpu_hour = 2.99", "price_per_gpu_hour = -1", "price_per_gpu_hour: expected a"),
        ("price_per_gpu_hour = 2.99", "price_per_gpu_hour = nan", "price_per_gpu_hour: expected a"),
        (
            "node_nic_gbs = 400",
            "node_nic_gbs = 0",
            "node_nic_gbs: expected a number greater than 0",
        ),
        ("gpus_per_node = 8", "gpus_per_node = 1.5", "gpus_per_node: expected an integer greater"),
        ("gpus_per_node = 8", "gpus_per_node = true", "gpus_per_node: expected an integer greater"),
        ("pue = 1.25", 'pue = 1.25\npower_limit_w = "x"', "power_limit_w: expected a number"),
        ("pue = 1.25", 'pue = 1.25\ncalibrated = "x"', "calibrated: expected true or false"),
        ("pue = 1.25", "pue = 1.25\nmeasured = [1]", "measured: expected a table, got [1]"),
        (
            "pue = 1.25",
            "pue = 1.25\nmeasured = {hbm = 0}",
            "measured.hbm: expected a number from 1e-9 to 1e9, got 0",
        ),
        (
            "pue = 1.25",
            "pue = 1.25\nmeasured = {inner = -1}",
            "measured.inner: expected 0, or a number from",
        ),
        ("pue = 1.25", "pue = 1.25\nmeasured = {step = 1e308}", "measured.step: expected a number"),
        ("pue = 1.25", "pue = 1.25\nmeasured = {hbm = 1e-99}", "measured.hbm: expected a number"),
        ("pue = 1.25", "pue = 1.25\nmeasured = {hbm = nan}", "measured.hbm: expected a number"),
        ("pue = 1.25", "pue = 1.25\nmeasured = {hbm = true}", "measured.hbm: expected a number"),
        ("pue = 1.25", "pue = 1.25\nmeasured = {attention = 1}", "measured.attention: not a const"),
    ],
)
def test_a_wrong_cluster_file_is_one_message(
    old: str, new: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    text = (FOLDER / "h100.toml").read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert cli.main(["plan", PRESET, NO_FILE, f"--cluster={file}"]) == 2
    of_file = f": {message}" if message else " is not valid TOML: "
    assert f"--cluster (command line): {file}{of_file}" in capsys.readouterr().err


OWN = 'name = "mine"\nbf16_tflops = 100.0\nmemory_gb = 80\nhbm_gbs = 1000'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "", "device.name: missing; expected a string"),
        ("100.0", '"fast"', "device.bf16_tflops: expected a number greater than 0, got"),
        ("100.0", "-1", "device.bf16_tflops: expected a number greater than 0, got -1"),
        ("100.0", "nan", "device.bf16_tflops: expected a number greater than 0, got nan"),
        ("bf16_tflops = 100.0", "", "device: has no peak: set bf16_tflops or fp32_tflops"),
        ("hbm_gbs", "hbm_gb", 'device.hbm_gb: unknown key; did you mean "hbm_gbs"'),
        ("80", "80\nmultiprocessors = 0", "device.multiprocessors: expected an integer greater"),
        ("", "", None),
    ],
)
def test_a_device_of_a_users_own_is_checked(
    old: str, new: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    text = (FOLDER / "h100.toml").read_text().replace('device = "H100 SXM 80GB"\n', "")
    file.write_text(f"{text}\n[device]\n{OWN.replace(old, new) if old else OWN}\n")
    code = cli.main(["plan", PRESET, NO_FILE, f"--cluster={file}"])
    assert code == (2 if message else 0)
    err = capsys.readouterr().err
    assert f"{file}: {message}" in err if message else not err


@pytest.mark.parametrize(
    ("form", "option", "words"),
    [
        ([PRESET], "--price=-1", "--price: expected a number of at least 0, got '-1'"),
        ([PRESET], "--price=nan", "--price: expected a number of at least 0, got 'nan'"),
        ([PRESET], "--price=1e400", "--price: expected a number of at least 0, got '1e400'"),
        ([PRESET], "--world-size=0", "--world-size: expected a positive integer, got '0'"),
        (["search"], "--world-size=-8", "--world-size: expected a positive integer, got '-8'"),
        (["search"], "--count=0", "--count: expected a positive integer, got '0'"),
        (["calibrate"], "--seconds=-1", "--seconds: expected a number of at least 0, got '-1'"),
        (["calibrate"], "--price=nan", "--price: expected a number of at least 0, got 'nan'"),
        *(
            ([PRESET], f"--tokens={text}", "--tokens: expected a number greater than 0, such as")
            for text in ("0", "-1", "nan", "inf", "1e400", "1e300T", "1..2", ".", "", "2TB", "T")
        ),
    ],
)
def test_a_number_that_cannot_be_is_a_usage_error(
    form: list[str], option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["plan", *form, option])
    assert exit.value.code == 2
    assert f"error: argument {words}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2T", "2t", "2000B", "2e12", "2E+12", "2_000G", "2000000M"])
def test_tokens_have_a_unit_or_an_exponent(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", PRESET, NO_FILE, f"--tokens={text}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["tokens"] == 2e12


@pytest.mark.parametrize(
    ("form", "option", "message"),
    [
        (
            ["search", "--world-size=1"],
            "--write={}/none/best.toml",
            "none/best.toml cannot be writ",
        ),
        (["search", "--world-size=1"], "--write={}", " cannot be written: "),
        (["scaling", "--gpus=1"], "--plot={}/none/days.png", "none/days.png cannot be written: "),
        (["scaling", "--gpus=1"], "--plot={}/days.xyz", "--plot (command line): "),
        (
            ["scaling", "--gpus=7", "--parallel.tp=2"],
            "--plot={}/days.png",
            "none of the layouts can",
        ),
    ],
)
def test_a_file_that_cannot_be_written_is_one_message(
    form: list[str],
    option: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preset = str(ROOT / "train_configs/debug.toml")
    arguments = ["plan", form[0], preset, *form[1:], option.format(tmp_path)]
    assert cli.main(arguments) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["none.toml", "--model.nonsense=1"])
def test_a_wrong_configuration_is_no_row_of_a_scaling(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "scaling", PRESET, NO_FILE, argument]) == 2
    assert "1 problem in the configuration" in capsys.readouterr().err


def test_a_search_in_which_nothing_fits_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = [str(ROOT / "train_configs/gpt_1t_fsdp.toml"), NO_FILE, "--world-size=4"]
    target = tmp_path / "best.toml"
    assert cli.main(["plan", "search", *huge, "--json", f"--write={target}"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["fit"], facts["best"]) == (0, [])
    assert not target.exists()


@pytest.mark.parametrize("preset", ["debug", "debug_bert", "debug_moe"])
def test_seven_devices_are_a_world_like_any_other(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(ROOT / f"train_configs/{preset}.toml"), "--world-size=7", "--json"]
    assert cli.main(["plan", *command]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert best[0]["settings"]["parallel.dp_shard"] in (1, 7)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_predicts_a_step(path: Path) -> None:
    cluster = find_cluster(path.stem)
    assert cluster.source
    assert 0 < seconds(job(), cluster) < 1000
    # Devices without a float32 peak use that of another format.
    assert seconds(job("--training.param_dtype=float32"), cluster) >= seconds(job(), cluster)


def flat(groups: Iterable[Any]) -> Iterator[tuple[dict[str, Any], Any, ParallelDims]]:
    """The candidates of a search, one by one."""
    return ((*one, dims) for dims, rows in groups for row in rows for one in row)


@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
@pytest.mark.parametrize("more", [(), ("--compile.enable=true", "--float8.recipe=tensorwise")])
def test_a_few_layouts_of_a_mesh_tell_which_are_legal(preset: str, more: tuple[str, ...]) -> None:
    path = ROOT / f"train_configs/{preset}.toml"
    sizes = ("--training.seq_len=8", "--training.global_batch_size=24")
    base = make_plan(path, [NO_FILE, *sizes, *more, "--parallel.ep=1"], 1, with_files=False)
    groups = list(candidates(base.config, 12, 24, H100, experts=4))
    some = all_legal = 0
    for dims, rows in groups:
        legal = [one for row in rows for one in row if is_legal(one[1], dims, base.args)]
        assert legal_of(rows, dims, base.args) == legal
        some += 0 < len(legal) < sum(map(len, rows))
        all_legal += len(legal)
    assert min(some, all_legal) > 10


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train_configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_a_search_starts_from_every_preset(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("titan_lite.planner.search.MICRO_BATCHES", (1,))
    code = cli.main(["plan", "search", str(path), NO_FILE, "--world-size=2", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (0 if facts["best"] else 1)
    assert facts["tried"] > 10


@pytest.mark.parametrize(
    ("preset", "world"), [("llama3_8b", 8), ("qwen3_30b_a3b", 8), ("llama2_70b_tp4_pp8", 32)]
)
@pytest.mark.parametrize(
    "more", [(), ("--optimizer.name=Muon",), ("--optimizer.state_dtype=int8",)]
)
def test_some_rank_needs_at_least_the_least(preset: str, world: int, more: tuple[str, ...]) -> None:
    path = ROOT / f"train_configs/{preset}.toml"
    plan = make_plan(path, [NO_FILE, *more], world, with_files=False)
    now = read_job(plan)
    stored = [place.parts["parameters"] + place.parts["optimizer"] for place in memory(now)]
    assert 0 < least(now) <= max(stored)


def test_layouts_are_legal_exactly_where_the_configuration_is() -> None:
    """A sample of the layouts, each written as overrides and checked as a run's settings are."""
    base = make_plan(None, [*SMALL, "--training.local_batch_size=1"], 1, with_files=False)
    groups = list(candidates(base.config, 12, 24, find_cluster("a100")))
    agreed = []
    sample = random.Random(0).sample(list(flat(groups)), 400)
    allowed = [str(values) for d, rows in groups for values, _ in legal_of(rows, d, base.args)]
    for values, config, dims in sample:
        overrides = [
            f"--{key}={value}".replace("=False", "=false") for key, value in values.items()
        ]
        try:
            make_plan(None, [*SMALL, *overrides], 12, with_files=False)
            legal = config.parallel.num_stages <= base.args.num_layers
        except ConfigError:
            legal = False
        assert is_legal(config, dims, base.args) == legal == (str(values) in allowed), values
        agreed.append(legal)
    assert 0.05 < sum(agreed) / len(agreed) < 0.95


def test_a_search_has_every_degree_of_expert_parallel_that_is_legal() -> None:
    small = ("--model.name=qwen3_moe", "--model.num_experts=12", *SMALL)
    base = make_plan(None, [*small, "--training.local_batch_size=1"], 1, with_files=False)
    actual, legal = set(), set()
    for _, config, dims in flat(candidates(base.config, 8, 24, H100, experts=12)):
        if dims.tp == 1 and is_legal(config, dims, base.args):
            actual.add((dims.pp, dims.dp_replicate, dims.dp_shard, dims.cp, dims.ep))
    for pp, replicas, shard, cp, ep in itertools.product((1, 2, 4, 8), repeat=5):
        degrees = {"pp": pp, "dp_replicate": replicas, "dp_shard": shard, "cp": cp, "ep": ep}
        if pp * replicas * shard * cp == 8 and pp <= base.args.num_layers:
            overrides = [f"--parallel.{axis}={degree}" for axis, degree in degrees.items()]
            try:
                make_plan(None, [*small, "--training.global_batch_size=24", *overrides], 8)
            except ConfigError:
                continue
            legal.add(tuple(degrees.values()))
    assert actual == legal
    assert {degrees[-1] for degrees in actual} == {1, 2, 4}


def test_a_search_covers_every_product_of_degrees() -> None:
    base = make_plan(None, SMALL, 1, with_files=False)
    plans = [dims for dims, _ in candidates(base.config, 12, 24, H100)]
    actual = {(d.pp, d.dp_replicate, d.dp_shard, d.cp, d.tp) for d in plans}
    expected = {
        (pp, replicas, shard, cp, tp)
        for pp in divisors(12)
        for replicas in divisors(12)
        for shard in divisors(12)
        for cp in divisors(12)
        for tp in divisors(12)
        if pp * replicas * shard * cp * tp == 12 and tp <= H100.gpus_per_node
    }
    assert actual == expected


def test_the_best_layout_is_written_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best.toml"
    args = ["--world-size=8", "--training.global_batch_size=16", f"--write={target}"]
    assert cli.main(["plan", "search", PRESET, NO_FILE, "--json", *args]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    plan = make_plan(target, [NO_FILE], 8, with_files=False)
    assert plan.global_batch_size == 1 or plan.config.training.seq_len == 8192
    predicted = predict(read_job(plan), H100, 1)
    expected = load_config(target, [NO_FILE]).config
    for key, value in best[0]["settings"].items():
        section, _, name = key.partition(".")
        assert getattr(getattr(expected, section), name) == value
    assert predicted.fits
    kinds = [tuple(b["settings"][f"parallel.{axis}"] for axis in ("tp", "pp", "cp")) for b in best]
    assert len(set(kinds)) > 1


LAYOUTS = st.sampled_from(
    [
        (),
        ("--parallel.tp=4",),
        ("--parallel.tp=8", "--parallel.dp_shard=4"),
        ("--parallel.cp=4",),
        ("--parallel.pp=4", "--training.global_batch_size=64"),
        ("--parallel.dp_replicate=4",),
        ("--activation_checkpoint.mode=full", "--training.local_batch_size=2"),
        ("--model.name=qwen3_moe", "--model.flavor=30b-a3b"),
        ("--model.name=qwen3_moe", "--model.flavor=30b-a3b", "--parallel.ep=8"),
        ("--model.name=qwen3_moe", "--model.flavor=30b-a3b", "--parallel.ep=32"),
    ]
)
EP_JOBS = st.builds(
    lambda ep, batch, mode: job(
        "--model.name=qwen3_moe",
        "--model.flavor=30b-a3b",
        "--training.seq_len=4096",
        f"--activation_checkpoint.mode={mode}",
        f"--training.local_batch_size={batch}",
        f"--parallel.ep={ep}",
        world_size=64,
    ),
    st.sampled_from([2, 4, 8, 16, 32, 64]),
    st.integers(1, 4),
    st.sampled_from(["none", "selective_op", "full"]),
)


@settings(deadline=None, max_examples=25)
@given(LAYOUTS, st.sampled_from(["node_nic_gbs", "link", "hbm"]), st.floats(1.01, 8))
def test_more_bandwidth_never_slows_a_step(
    overrides: tuple[str, ...], what: str, factor: float
) -> None:
    now = job(*overrides, world_size=32)
    if what == "node_nic_gbs":
        faster = dataclasses.replace(H100, node_nic_gbs=H100.node_nic_gbs * factor)
    else:
        field = {"link": "link_gbs", "hbm": "hbm_gbs"}[what]
        device = dataclasses.replace(H100.device, **{field: getattr(H100.device, field) * factor})
        faster = dataclasses.replace(H100, device=device)
    assert seconds(now, faster) <= seconds(now, H100) * (1 + 1e-12)


@settings(deadline=None, max_examples=25)
@given(LAYOUTS, st.sampled_from(["default", "always", "never"]), st.integers(1, 4))
def test_memory_never_grows_with_more_shards(
    overrides: tuple[str, ...], reshard: str, batch: int
) -> None:
    local = dataclasses.replace(
        job(*overrides, world_size=32), micro_batch=batch, keeps_gathered=reshard == "never"
    )
    sizes = [peak(dataclasses.replace(local, dp_shard=n)).bytes for n in (2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.sampled_from([512, 2048, 8192]), st.integers(1, 4))
def test_a_step_of_one_device_is_the_sum_of_its_parts(batch: int, seq_len: int, steps: int) -> None:
    now = job(
        "--activation_checkpoint.mode=none",
        f"--training.seq_len={seq_len}",
        f"--training.local_batch_size={batch}",
        f"--training.global_batch_size={batch * steps}",
        world_size=1,
    )
    parts = StepModel(H100, now).predict(now).parts
    rates, layers = Rates(H100, now), now.args.num_layers
    assert parts["attention"] == pytest.approx(steps * layers * sum(rates.attention(now)))
    assert parts["elementwise"] == pytest.approx(steps * layers * sum(rates.elementwise(now)))
    alone = {"matmul", "attention", "elementwise", "head", "optimizer"}
    assert {name for name in PARTS if parts[name]} == alone


@settings(deadline=None, max_examples=25)
@given(EP_JOBS)
def test_expert_parallel_gathers_fewer_experts_and_shards_as_many(now: Job) -> None:
    alone = dataclasses.replace(now, ep=1)
    assert peak(now).bytes < peak(alone).bytes
    for part in ("parameters", "optimizer"):
        assert peak(now).parts[part] == peak(alone).parts[part]
    fsdp, whole = (StepModel(H100, one).predict(one).parts["fsdp"] for one in (now, alone))
    assert fsdp <= whole


@settings(deadline=None, max_examples=25)
@given(EP_JOBS)
def test_rows_of_experts_are_exchanged_twice_in_forward_and_in_backward(now: Job) -> None:
    block = StepModel(H100, now).block(now)
    assert block.ep[0] == block.ep[1] > 0
    size = 2 * now.local_tokens * 8 * now.args.dim
    rates = Rates(H100, now)
    inner = min(now.ep, 8)
    near, far = size * (inner - 1) / now.ep, size * (now.ep - inner) / now.ep
    seconds = max(near / rates.inner, far / (rates.outer / 8))
    assert block.ep[0] == pytest.approx(2 * (seconds + rates.hops(now.ep, inner)))
    again = block.again[5] if now.recompute != "none" else 0.0
    assert again == (block.ep[0] if now.recompute != "none" else 0.0)
    blocks = now.micro_steps * now.args.num_layers
    parts = StepModel(H100, now).predict(now).parts
    assert parts["ep"] == pytest.approx(blocks * (sum(block.ep) + again))
    alone = dataclasses.replace(now, ep=1)
    assert StepModel(H100, alone).predict(alone).parts["ep"] == 0


def test_experts_take_the_time_of_those_of_a_token_and_the_memory_of_all() -> None:
    """Against a dense model whose feed-forward is as wide as a token's experts together."""
    layout = ("--training.seq_len=4096", "--training.local_batch_size=2")
    widths = ("--model.dim=2048", "--model.num_layers=4", "--model.head_dim=128")

    def moe(num_experts: int) -> Job:
        experts = ("--model.ffn_dim=768", f"--model.num_experts={num_experts}")
        return job_of("qwen3_moe", "--model.flavor=30b-a3b", *experts, *widths, *layout)

    few, many = moe(16), moe(128)
    dense = job_of("qwen3", "--model.flavor=8b", "--model.ffn_dim=6144", *widths, *layout)
    dense = dataclasses.replace(
        dense, args=dataclasses.replace(dense.args, num_heads=32, num_kv_heads=4)
    )
    parts = [StepModel(H100, now).predict(now).parts for now in (few, many, dense)]
    # With many experts, each has few rows, which fill the tiles of a matmul less.
    assert parts[0]["matmul"] < parts[1]["matmul"] < 1.3 * parts[0]["matmul"]
    assert parts[0]["matmul"] == pytest.approx(parts[2]["matmul"], rel=0.15)
    assert parts[1]["optimizer"] > 3 * parts[0]["optimizer"]
    assert peak(many).parts["parameters"] > 3 * peak(few).parts["parameters"]
    assert model_flops(few.args, 0) == pytest.approx(model_flops(dense.args, 0), rel=0.05)


def test_a_mixture_of_experts_is_predicted_with_a_wide_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = ["plan", str(ROOT / "train_configs/debug_moe.toml"), "--cluster=h100"]
    assert cli.main(plan) == 0
    shown = capsys.readouterr().out
    assert "the planner was not validated on a Mixture of Experts" in shown
    assert "expert parallel" not in shown
    assert cli.main([*plan, "--parallel.ep=2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"expert parallel +#+ +[\d.]+ %", shown)
    assert "predicted as" not in shown


def test_predicted_flops_are_those_of_the_meter() -> None:
    """At s = 8192, Llama 3 8B takes 57.91 GFLOP a token by torchtitan's formula."""
    assert model_flops(job().args, 8192) / 1e9 == pytest.approx(57.91, abs=0.005)
    fastest = dataclasses.replace(
        H100, measured={"kernel_us": 0.0, "inner": 0.0, "attention/flash/H100": 1e9}
    )
    now = job("--training.seq_len=4096", "--activation_checkpoint.mode=none", world_size=1)
    parts = StepModel(fastest, now).predict(now).parts
    # Matrix products at their full rate, except for whole waves of tiles.
    rate = fastest.peak("bfloat16") * fastest.constants()["matmul"]
    counted = model_flops(now.args, 0) * now.tokens / rate
    loss = now.loss_bytes * now.tokens * now.args.vocab_size / Rates(fastest, now).hbm
    assert counted <= parts["matmul"] + parts["head"] - loss < 1.25 * counted
