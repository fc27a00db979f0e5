"""The command `titan-lite`: each subcommand parses its own arguments and imports what it needs."""

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_lite import __version__
from titan_lite.config.arguments import (
    HelpFormatter,
    UsageError,
    command_parser,
    examples,
    parse_arguments,
    positive,
)
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import ConfigError, LoadedConfig, load_config
from titan_lite.config.problems import (
    Collector,
    SettingError,
    collecting,
    did_you_mean,
    nearest,
)
from titan_lite.config.registry import load
from titan_lite.config.render import json_schema, to_markdown, to_toml
from titan_lite.config.rules import file_rules
from titan_lite.models import registry
from titan_lite.models.plan import Plan, make_plan
from titan_lite.planner import hardware
from titan_lite.planner.counts import in_words, num_params
from titan_lite.runtime.log import set_up_streams
from titan_lite.runtime.writing import WriteError

OVERRIDES = """
Every key of the TOML file can be overridden by --section.key=value. Values are written as in TOML,
but a plain word needs no quotes. The last one counts:
  --training.steps=20 --model.flavor=llama3_8b --job.description="first try"
"""
NO_CONFIG = "Without CONFIG all keys have their defaults: the debug model on the bundled corpus."


COMMANDS = {
    "train": "train a model (in one process; torchrun or run_train.sh start many)",
    "config": "check a configuration and print it with the origin of each value",
    "checkpoint": "list the checkpoints of a run, or verify them",
    "tokenize": "convert the documents of a run to a dataset of token ids",
    "convert": "convert Hugging Face safetensors to checkpoints, and back",
    "dryrun": "run one step of any rank on fake tensors: memory, FLOPs, collectives",
    "plan": "predict memory, time, cost and energy of a run on any cluster",
    "compare": "compare the curves of two runs that logged the same steps",
    "golden": "compare runs with stored curves, for CI",
    "report": "write an HTML page about one or several runs",
}
# Imported only when the command runs.
FUNCTIONS = {
    "train": "titan_lite.cli:_train",
    "config": "titan_lite.cli:_config",
    "checkpoint": "titan_lite.checkpoint.command:main",
    "tokenize": "titan_lite.cli:_tokenize",
    "convert": "titan_lite.tools.convert:main",
    "dryrun": "titan_lite.cli:_dryrun",
    "plan": "titan_lite.tools.plan:main",
    "compare": "titan_lite.regression.commands:compare_command",
    "golden": "titan_lite.regression.commands:golden_command",
    "report": "titan_lite.regression.commands:report_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 2 for a usage or configuration error."""
    set_up_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="titan-lite",
        description="FSDP2-native pre-training of transformer language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        + "\n\n'titan-lite COMMAND --help' explains a command.\n"
        + examples("titan-lite config run.toml", "titan-lite plan run.toml"),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"titan-lite {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="see below")
    if not argv:
        print(parser.format_help(), end="", file=sys.stderr)
        return 2
    command = parser.parse_args(argv[:1]).command
    try:
        code: int = load(FUNCTIONS[command])(argv[1:])
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"titan-lite: {error}", file=sys.stderr)
        return 2
    except WriteError as error:
        print(f"titan-lite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (| head) has ended. The interpreter flushes at exit, which needs an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    return code


def _train(argv: list[str]) -> int:
    command_parser(
        "train",
        "Trains in one process; ./run_train.sh starts one process per GPU.",
        "titan-lite train my.toml --data.dataset_path=books/a.jsonl",
        "titan-lite train run.toml --checkpoint.enable=true --checkpoint.last_save_hf=true",
        notes=OVERRIDES,
        usage="%(prog)s CONFIG [--section.key=value ...]",
    ).parse_known_args(argv)
    from titan_lite import train

    return train.main(argv)


def _config(argv: list[str]) -> int:
    parser = _parser(
        "config",
        "[--world-size N] [--preflight] [--quiet] | --schema | --docs",
        "Checks a configuration, and prints it with the origin of each value.",
        "titan-lite config run.toml",
        "titan-lite config my.toml --preflight --quiet --data.dataset_path=books/a.jsonl",
    )
    parser.add_argument("--quiet", action="store_true", help="print only problems")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema for editors")
    parser.add_argument("--docs", action="store_true", help="print docs/configuration.md")
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="also check the data, tokenizer, checkpoint and device on this machine",
    )
    options, path, overrides = parse_arguments(parser, argv)
    logging.basicConfig(
        format="titan-lite: warning: %(message)s",
        level=logging.ERROR if options.quiet else logging.WARNING,
    )
    # Imports the file's plugins, whose keys the schema and the page have as well.
    loaded = load_config(path, overrides)
    if options.schema:
        flavors = {name: list(family.flavors) for name, family in registry.families().items()}
        print(json.dumps(json_schema(flavors), indent=2))
        return 0
    if options.docs:
        print(to_markdown())
        return 0
    if not options.quiet:
        print(_rendered(loaded), flush=True)
    world_size = _world_size(options.world_size)
    plan = make_plan(path, overrides, world_size, with_files=options.preflight)
    if options.preflight:
        with plan.reporting():
            _preflight(plan)
    else:
        _warn_of_missing_files(plan)
    return 0


def _warn_of_missing_files(plan: Plan) -> None:
    """Warns about files that a run on this machine requires."""
    from titan_lite.checkpoint.state import find_start
    from titan_lite.planner.cluster import find_cluster

    missing = Collector()
    missing.errors += file_rules(plan.config)
    if cluster := plan.config.job.cluster:
        with missing.checking("job.cluster"):
            find_cluster(cluster)
    # Finding the start would report a missing folder of weights again.
    if not any(error.keys == ("checkpoint.initial_load_path",) for error in missing.errors):
        with missing.checking("checkpoint.load_step"):
            section, last_step = plan.config.checkpoint, plan.config.training.steps
            find_start(section, plan.checkpoint_folder, last_step=last_step)
    for error in missing.errors:
        key = error.keys[0]
        origin = plan.origin(key)
        logging.warning("a run would stop at the start: %s (%s): %s", key, origin, error.message)


def _preflight(plan: Plan) -> None:
    """Runs all checks that a run on this machine makes before its first step."""
    from titan_lite.training.preflight import check_contents, check_locks, preflight

    config, results = plan.config, None
    with collecting() as problems:
        with problems.checking():
            results = preflight(plan)
            check_contents(plan, results)
        with problems.checking():
            check_locks(plan)
        if (
            config.attention.kernel != "auto"
            or config.compile.enable
            or config.float8.recipe != "none"
            or config.parallel.async_tp
            or config.parallel.fsdp_symm_mem
            or config.parallel.pp > 1
            or config.job.plugins
            or config.checkpoint.initial_load_hf
            or config.checkpoint.exclude_from_loading
            or config.profiling.enable_memory_snapshot
            or shutil.which("nvidia-smi")
        ):
            # These need torch, which takes seconds to import.
            from titan_lite.training.meta_model import check_model_and_device

            with problems.checking():
                check_model_and_device(plan, results.start if results else None)


def _rendered(loaded: LoadedConfig) -> str:
    """The configuration as TOML, with the numbers of its flavor if that is known."""
    try:
        family, args = registry.resolve(loaded.config.model)
    except SettingError:
        return to_toml(loaded)
    resolved = dataclasses.asdict(args) | {"head_dim": args.head_size}
    # A model built by a plugin may have parameters that the args do not describe.
    is_ours = family.build.startswith("titan_lite.")
    return to_toml(loaded, resolved, in_words(num_params(args), args) if is_ours else None)


def _tokenize(argv: list[str]) -> int:
    parser = _parser(
        "tokenize",
        "--output DIR [--processes N] [--shard-size N] | --verify DIR",
        "Tokenizes the documents of [data] (dataset, dataset_path, subset, split, text_field), and "
        "writes a dataset of token ids for data.dataset_path of other runs. If interrupted, rerun "
        "the same command to resume.",
        "titan-lite tokenize my_run.toml --output corpus.tokens",
        "titan-lite tokenize --verify books.tokens",
        world=False,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--processes",
        type=positive,
        default=os.cpu_count(),
        metavar="N",
        help="number of tokenizing processes (default: one per core)",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=2**29,
        metavar="N",
        help="approximate number of characters in each file (default: 536870912)",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="compare a folder's files with their checksums"
    )
    options, path, overrides = parse_arguments(parser, argv)
    from titan_lite.tools import tokenize_data

    if options.verify:
        return tokenize_data.verify(options.verify)
    if options.output is None:
        parser.error("pass either --output or --verify")
    logging.basicConfig(format="titan-lite: warning: %(message)s", level=logging.WARNING)
    return tokenize_data.write(
        load_config(path, overrides),
        options.output,
        processes=options.processes,
        shard_size=options.shard_size,
    )


def _dryrun(argv: list[str]) -> int:
    parser = _parser(
        "dryrun",
        "[--world-size N] [--rank R|all-stages] [--device NAME] [--json]",
        "Runs one training step as one rank of many, on fake tensors, and prints the applied "
        "features, memory, FLOPs and collectives of the step. Needs no GPU, no data and no "
        "tokenizer.",
        "titan-lite dryrun run.toml",
        "titan-lite dryrun train_configs/llama3_405b_pp.toml --device h100",
    )
    parser.add_argument(
        "--rank",
        metavar="R",
        help='rank to run; "all-stages": one rank of each pipeline stage (default: of the first '
        "stage and of the last)",
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="NAME",
        help="device to compare with: the start of a name in assets/devices.txt (default: h100)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, path, overrides = parse_arguments(parser, argv)
    logging.basicConfig(format="titan-lite: warning: %(message)s", level=logging.WARNING)
    device = hardware.find_by_short_name(options.device)
    if device is None:
        names = [known.name for known in hardware.DEVICES]
        hint = did_you_mean(nearest(options.device, names, limit=3))
        raise UsageError(
            f"--device: no such device: {options.device!r}"
            f"{hint or '; the devices are ' + ', '.join(names)}"
        )
    # Turns off features that need files or packages which a dry run does not.
    elsewhere = ('--checkpoint.initial_load_hf=""', "--metrics.enable_wandb=false")
    world_size = _world_size(options.world_size)
    plan = make_plan(path, [*overrides, *elsewhere], world_size, with_files=False)
    ranks = _ranks(options.rank, plan.dims)
    # Printed first, because importing torch takes seconds, and the step of a large model minutes.
    which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    print(f"Dry run of {which} of {plan.dims.world_size}", file=sys.stderr, flush=True)
    from titan_lite.dryrun.summary import summarize_dry_run

    print(summarize_dry_run(plan, ranks, device, as_json=options.json))
    return 0


def _ranks(option: str | None, dims: ParallelDims) -> list[int]:
    """The ranks to run: that of --rank, or the first rank of some or all pipeline stages."""
    stages = [dims.rank(dict.fromkeys(dims.AXES, 0) | {"pp": place}) for place in range(dims.pp)]
    if option is None:
        return list(dict.fromkeys((stages[0], stages[-1])))
    if option == "all-stages":
        return stages
    if option.isdecimal() and int(option) < dims.world_size:
        return [int(option)]
    raise UsageError(
        f'--rank: expected "all-stages", or a rank below the world size ({dims.world_size}, see '
        f"--world-size); got {option!r}"
    )


def _parser(
    command: str, options: str, description: str, *example: str, world: bool = True
) -> argparse.ArgumentParser:
    """Builds the parser of a subcommand with one CONFIG and, if `world`, --world-size."""
    usage = f"%(prog)s [CONFIG] [--section.key=value ...] {options}"
    notes = f"\n{NO_CONFIG}\n{OVERRIDES}"
    parser = command_parser(command, description, *example, notes=notes, usage=usage)
    if world:
        parser.add_argument(
            "--world-size",
            type=int,
            metavar="N",
            help="number of processes (default: $WORLD_SIZE, else the fewest the degrees allow)",
        )
    return parser


def _world_size(option: int | None) -> int | None:
    """--world-size, else the launcher's WORLD_SIZE; None: the smallest that the degrees allow."""
    if option is not None:
        return option
    if (text := os.environ.get("WORLD_SIZE")) is not None:
        if not text.isdecimal():
            raise UsageError(f"the variable WORLD_SIZE must be an integer, got {text!r}")
        return int(text)
    return None


if __name__ == "__main__":
    sys.exit(main())
