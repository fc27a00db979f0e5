"""titan-lite plan: predicts memory, time, cost and energy of runs, without torch."""

import argparse
import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from titan_lite.config.arguments import UsageError, command_parser, parse_arguments, positive
from titan_lite.config.load import ConfigError, Problem, load_config
from titan_lite.config.schema import Model
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import Cluster, find_cluster
from titan_lite.planner.predict import advice, predict
from titan_lite.planner.read import read_job
from titan_lite.planner.search import search
from titan_lite.runtime.writing import writing
from titan_lite.tools import plan_recalibrate, plan_report, plan_scaling

FORMS = """
other forms, each with its own --help:
  plan search [CONFIG] [--world-size N] [--count K] [--write FILE]
  plan scaling CONFIG... [--gpus N,N,...] [--plot FILE]
  plan calibrate [-o FILE]
  plan recalibrate RUN [--cluster NAME]
  plan validate ROWS.toml [--constants fitted|literature|leave-one-system-out] [--fit]
"""
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
# Keys that a search replaces, set to a layout that is legal for any configuration.
ONE_DEVICE = (
    "--parallel.tp=1",
    "--parallel.cp=1",
    "--parallel.ep=1",
    "--parallel.pp=1",
    "--parallel.dp_replicate=1",
    "--parallel.dp_shard=1",
    "--parallel.reshard_after_forward=default",
    "--parallel.async_tp=false",
    "--training.local_batch_size=1",
)
# Turns off features that need files or packages which a prediction does not.
NO_FILES = ('--checkpoint.initial_load_hf=""', "--metrics.enable_wandb=false")


def main(argv: list[str]) -> int:
    """Runs one form of the command."""
    commands = {"validate": _validate, "search": _search, "scaling": _scaling}
    commands |= {"calibrate": _calibrate, "recalibrate": _recalibrate}
    if argv[:1] and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return _plan(argv)


def _plan(argv: Sequence[str]) -> int:
    parser = _parser(
        "plan",
        "[CONFIG] [--section.key=value ...] [--world-size N] [--tokens T]",
        "Predicts a run: whether it fits, how long a step takes and why, and what the whole run "
        "costs in days, money and energy. Without CONFIG, it predicts the debug model.",
        "titan-lite plan train_configs/llama3_8b.toml --cluster h100 --world-size 8 --tokens 1T",
        "titan-lite plan run.toml",
        notes=FORMS,
    )
    _world_size_option(parser, "the smallest that the degrees allow")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        metavar="T",
        help="tokens of the whole run, such as 2T or 300B (default: those of training.steps)",
    )
    options, path, overrides = _parse(parser, argv)
    plan = make_plan(path, [*overrides, *NO_FILES], options.world_size, with_files=False)
    cluster = _cluster(options, plan.config.job.cluster, plan.origins["job.cluster"])
    job = read_job(plan)
    tokens = options.tokens or plan.config.training.steps * job.tokens
    prediction = predict(job, cluster, tokens)
    better = advice(plan, cluster)
    if options.json:
        print(json.dumps(plan_report.facts(prediction, better), indent=2))
    else:
        print(f"{_model(plan.config.model)} on", plan_report.text(prediction, better))
    return 0


def _search(argv: Sequence[str]) -> int:
    parser = _parser(
        "plan search",
        "[CONFIG] [--section.key=value ...] [--world-size N] [--count K] [--write FILE]",
        "Predicts layouts of CONFIG (default: the debug model), with tensor parallel in a node, "
        "and shows the best that fit, one for each mesh and number of pipeline stages. Degrees, "
        "micro-batch, recomputation, resharding, gradient synchronisation, schedule (1F1B or "
        "Interleaved1F1B) and stages vary; other keys keep their values.",
        "titan-lite plan search train_configs/llama3_8b.toml --cluster h100 --world-size 8",
        "titan-lite plan search run.toml --world-size 2",
    )
    _world_size_option(parser, "8")
    parser.add_argument(
        "--count", type=positive, default=5, metavar="K", help="layouts to show (default: 5)"
    )
    parser.add_argument("--write", metavar="FILE", help="write the best layout as a TOML file")
    options, path, overrides = _parse(parser, argv)
    loaded = load_config(path, overrides)
    config = loaded.config
    world_size = options.world_size or 8
    training = config.training
    samples = training.global_batch_size
    if samples == -1:
        others = config.parallel.tp * config.parallel.cp * config.parallel.pp
        samples = training.local_batch_size * max(1, world_size // others)
    fixed = (*overrides, *NO_FILES, *ONE_DEVICE, f"--training.global_batch_size={samples}")
    plan = make_plan(path, fixed, 1, with_files=False)
    cluster = _cluster(options, config.job.cluster, loaded.origins["job.cluster"])
    start = time.perf_counter()
    result = search(plan, config.parallel, world_size, samples, cluster)
    best = result.best(options.count)
    if options.json:
        print(json.dumps(plan_report.search_facts(result, best), indent=2))
    else:
        machines = f"{world_size} x {cluster.device.name}"
        print(f"{_model(plan.config.model)} on {machines}, {samples} samples a step")
        print(plan_report.search_text(result, best, time.perf_counter() - start))
    if options.write and best:
        if path is None:
            message = "requires CONFIG, which the written file extends"
            raise ConfigError([Problem("--write", "command line", message)])
        target = Path(options.write)
        text = plan_report.layout_toml(best[0], path, options.write)
        with writing(target):
            target.write_text(text, encoding="utf-8")
    return 0 if best else 1


def _scaling(argv: Sequence[str]) -> int:
    parser = _parser(
        "plan scaling",
        "CONFIG... [--section.key=value ...] [--gpus N,N,...] [--plot FILE]",
        "Projects compute-optimal training, 20 tokens per parameter: FLOPs, days at the devices' "
        "peak and as predicted, energy and cost, for several CONFIGs and numbers of devices.",
        "titan-lite plan scaling train_configs/gpt_175b_fsdp.toml "
        "train_configs/gpt_1t_fsdp.toml --cluster crusher --gpus 1024,4096,16384",
        "titan-lite plan scaling train_configs/llama2_7b.toml --gpus 8,32",
    )
    parser.add_argument(
        "--gpus",
        type=_numbers,
        default=[8, 32, 128, 512, 2048],
        metavar="N,N,...",
        help="numbers of devices (default: 8,32,128,512,2048)",
    )
    parser.add_argument("--plot", metavar="FILE", help="picture of days over devices")
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(format="titan-lite: warning: %(message)s", level=logging.ERROR)
    configs = [argument for argument in rest if not argument.startswith("-")]
    overrides = [*(argument for argument in rest if argument.startswith("-")), *NO_FILES]
    if any(argument.partition("=")[0] == "--world-size" for argument in rest):
        raise UsageError("--world-size has no effect: set --gpus to the numbers of devices")
    if not configs:
        raise UsageError("expected at least one configuration")
    first = load_config(configs[0], overrides)
    cluster = _cluster(options, first.config.job.cluster, first.origins["job.cluster"])
    rows = plan_scaling.scaling(configs, cluster, options.gpus, overrides)
    print(json.dumps(rows, indent=2) if options.json else plan_scaling.text(rows, cluster))
    if options.plot:
        try:
            with writing(Path(options.plot)):
                plan_scaling.plot(rows, cluster, options.plot)
        except ValueError as error:
            raise ConfigError([Problem("--plot", "command line", str(error))]) from error
    return 0


def _calibrate(argv: Sequence[str]) -> int:
    parser = command_parser(
        "plan calibrate",
        "Measures this machine's devices for about two minutes, and writes a cluster "
        "file for --cluster. Nothing else must run. For several nodes, run on each of them: "
        "torchrun --no-python titan-lite plan calibrate.",
        "titan-lite plan calibrate -o my_cluster.toml",
        "titan-lite plan calibrate --seconds 30 --price 2.5",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="this-machine.toml",
        metavar="FILE",
        help="file to write (default: this-machine.toml)",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="default: one per GPU, 2 without GPUs"
    )
    parser.add_argument(
        "--seconds", type=_not_negative, default=120.0, metavar="S", help="duration (default: 120)"
    )
    parser.add_argument(
        "--price", type=_not_negative, default=0.0, metavar="P", help="per GPU-hour (default: 0)"
    )
    options = parser.parse_args(argv)
    # Imports torch, which the other forms do not need.
    from titan_lite.tools import calibrate

    calibrate.main(options.output, options.processes, options.seconds, options.price)
    return 0


def _recalibrate(argv: Sequence[str]) -> int:
    parser = command_parser(
        "plan recalibrate",
        "Compares a finished run's records with its prediction on a cluster, and "
        "prints the factor that corrects the prediction, as a line for the cluster's file. It "
        "applies to runs with the same software stack.",
        "titan-lite plan recalibrate outputs/base",
        "titan-lite plan recalibrate outputs/base --cluster a100",
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    _cluster_option(parser, "job.cluster of the run, else h100")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    run = plan_recalibrate.read_run(options.run)
    cluster = _cluster(options, run.cluster, f"{options.run}/run.json")
    result = plan_recalibrate.recalibrate(run, cluster)
    print(json.dumps(result, indent=2) if options.json else plan_recalibrate.text(result))
    return 0


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers as in 8,32,128, got {text!r}")
    return [int(number) for number in text.split(",")]


def _validate(argv: Sequence[str]) -> int:
    parser = command_parser(
        "plan validate",
        "Predicts the runs of a file like assets/published_rows.toml, and prints the "
        "errors by system.",
        "titan-lite plan validate assets/published_rows.toml",
        "titan-lite plan validate assets/published_rows.toml --constants literature",
    )
    parser.add_argument("rows", metavar="ROWS.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--constants",
        choices=("fitted", "literature", "leave-one-system-out"),
        default="fitted",
        help="fitted (default): to assets/published_rows.toml; literature: not fitted; "
        "leave-one-system-out: for each system of ROWS.toml, fitted to its other systems",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="fit the constants to ROWS.toml first; requires --constants fitted",
    )
    options = parser.parse_args(argv)
    if options.fit and options.constants != "fitted":
        parser.error(f"--fit requires --constants fitted, got {options.constants}")
    # Imports numpy, which the other forms do not need.
    from titan_lite.tools import validate_plan

    print(
        validate_plan.report(
            options.rows, constants=options.constants, refit=options.fit, as_json=options.json
        )
    )
    return 0


def _parser(
    command: str, usage: str, description: str, *commands: str, notes: str = ""
) -> argparse.ArgumentParser:
    """Returns the parser of a form that predicts configurations.

    usage: without the options that all of these forms have.
    """
    usage = f"%(prog)s {usage} [--cluster NAME|FILE] [--price P] [--json]"
    parser = command_parser(command, description, *commands, notes=notes, usage=usage)
    _cluster_option(parser, "job.cluster of the (first) CONFIG, else h100")
    parser.add_argument(
        "--price",
        type=_not_negative,
        metavar="P",
        help="price of a GPU-hour (default: the cluster's)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _cluster_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--cluster", help=f"name in assets/clusters/, or a TOML file (default: {default})"
    )


def _world_size_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help=f"number of devices (default: {default})",
    )


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, str | None, list[str]]:
    """Returns the options, CONFIG and the overrides, which may be in any order."""
    logging.basicConfig(format="titan-lite: warning: %(message)s", level=logging.ERROR)
    return parse_arguments(parser, argv)


def _cluster(options: argparse.Namespace, of_job: str, origin: str) -> Cluster:
    """Returns the cluster of --cluster, else of job.cluster (set in `origin`), else h100."""
    name, key, source = options.cluster, "--cluster", "command line"
    if name is None and of_job:
        name, key, source = of_job, "job.cluster", origin
    try:
        cluster = find_cluster("h100" if name is None else name)
    except (ValueError, OSError) as error:
        raise ConfigError([Problem(key, source, str(error))]) from error
    price = getattr(options, "price", None)
    return cluster if price is None else dataclasses.replace(cluster, price_per_gpu_hour=price)


def _model(section: Model) -> str:
    return f"{section.name} {section.flavor}"


def _number(text: str, least: str, *, zero: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number > 0 or (zero and number == 0)) or number == math.inf:
        raise argparse.ArgumentTypeError(f"expected {least}, got {text!r}")
    return number


def _not_negative(text: str) -> float:
    return _number(text, "a number of at least 0", zero=True)


def _tokens(text: str) -> float:
    form, scale = "a number greater than 0, such as 300B or 2T", UNITS.get(text[-1:].lower())
    value = _number(text[:-1] if scale else text, form)
    return _number(repr(value * (scale or 1)), form)
