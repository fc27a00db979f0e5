"""`titan-lite convert`: converts between Hugging Face's files and checkpoints, in one process.

torch is imported only where it is used, so that wrong folders are reported at once.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from titan_lite.checkpoint.hf_files import CONFIG_FILE, DTYPES, HFFolder
from titan_lite.checkpoint.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    CheckpointManifest,
    read_manifest,
)
from titan_lite.checkpoint.same_model import model_differences, model_facts
from titan_lite.checkpoint.state import newest_below
from titan_lite.config.arguments import HelpFormatter, examples
from titan_lite.config.plugins import import_plugins
from titan_lite.config.problems import SettingError, how_to_fetch, literal
from titan_lite.config.schema import Data, Model
from titan_lite.config.stored import stored_model
from titan_lite.data.special_tokens import FILE_NAMES as COMPANIONS
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import FILE_NAMES, files_in, load_tokenizer
from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import NO_HF_CONFIG, args_from_hf, unsupported_in_hf
from titan_lite.models.registry import families, family_of, resolve
from titan_lite.runtime.stored_files import damaged_files

# Files of a model's folder that belong to its tokenizer, of any kind.
TOKENIZER_FILES = (
    *FILE_NAMES,
    *COMPANIONS,
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def main(argv: Sequence[str]) -> int:
    """Converts in one direction; returns 2 if the source cannot be converted."""
    options = _parser().parse_args(argv)
    source, target = Path(options.source), Path(options.target)
    try:
        _check_source(options, argv)
        if target.exists():
            raise ValueError(f"{target} exists already; name a folder that does not")
        import_plugins(options.plugin)
        for key, given in (
            ("SRC", options.source),
            ("--tokenizer", vars(options).get("tokenizer")),
        ):
            if given and not Path(given).exists():
                if key == "SRC" and options.direction == "dcp-to-hf":
                    raise ValueError(
                        f"{given} does not exist; name a checkpoint of a run, such as "
                        "outputs/checkpoint/step-1000"
                    )
                raise ValueError(f"{given} does not exist{how_to_fetch(given, key)}")
        if options.direction == "hf-to-dcp":
            hf_to_dcp(source, target)
        else:
            dcp_to_hf(source, target, options)
    except (ValueError, OSError) as error:
        print(f"titan-lite convert: {error}", file=sys.stderr)
        return 2
    return 0


def _check_source(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Raises ValueError, with the right command, for swapped or wrong kinds of folders."""
    source, target, direction = Path(options.source), Path(options.target), options.direction
    is_hf, newest = (source / CONFIG_FILE).is_file(), newest_below(source)
    is_checkpoint = (source / MANIFEST_FILE).is_file()
    meant = list(argv)
    if not source.exists() and target.exists():
        problem = f"{source} does not exist, and {target} does: the source comes first"
        a, b = argv.index(options.source), argv.index(options.target)
        meant[a], meant[b] = meant[b], meant[a]
    elif direction == "dcp-to-hf" and newest:
        problem = f"{source} is not a checkpoint, but holds some; the newest"
        meant[argv.index(options.source)] = str(newest)
    elif direction == "dcp-to-hf" and is_hf and not is_checkpoint:
        problem = f"{source} is a model of Hugging Face already; the other direction"
        meant = ["hf-to-dcp", str(source), str(target)]
    elif direction == "hf-to-dcp" and not is_hf and (is_checkpoint or newest):
        problem = f"{source} is a checkpoint or holds some; the other direction"
        meant = ["dcp-to-hf", str(newest or source), str(target)]
    else:
        return
    raise ValueError(f"{problem}: {shlex.join(['titan-lite', 'convert', *meant])}")


def hf_to_dcp(source: Path, target: Path) -> None:
    """Writes a checkpoint of the weights in `source`, and prints a [model] for them."""
    folder = HFFolder.open(source)
    family = family_of(folder.config, families())
    assert family.hf_config is not None
    args = args_from_hf(folder.config, family.hf_config)
    model = model_section(family, args)

    from titan_lite.checkpoint import hf
    from titan_lite.checkpoint.hf_layout import HFModel

    layout = HFModel.of(family, args)
    layout.check(folder)
    dtypes = sorted({folder.tensors[name].dtype for name in layout.tensors})
    files = {folder.tensors[name].file for name in layout.tensors}
    print(
        f"{source}: {family.hf_config.architecture}, {layout.num_parameters:,} parameters in "
        f"{' and '.join(dtypes)}, {len(files)} file{'s' * (len(files) > 1)}"
    )
    files_of_tokenizer = _read_files(source)
    hf.hf_to_dcp(
        folder,
        layout,
        target,
        config={"model": model},
        model=model_facts(family.name, args),
        tokenizer=_fingerprint(source),
        tokenizer_files=files_of_tokenizer,
    )
    tables = {"model": model}
    if {*files_of_tokenizer} & {*FILE_NAMES}:
        tables["data"] = {"tokenizer_path": str(target / TOKENIZER_FOLDER)}
    else:
        print(
            f"{source} has neither {' nor '.join(FILE_NAMES)}: set data.tokenizer_path to the "
            "model's tokenizer; save_pretrained of transformers' AutoTokenizer writes it"
        )
    tables["checkpoint"] = {"enable": True, "initial_load_path": str(target)}
    recipe = "\n\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {literal(value)}" for key, value in table.items())])
        for name, table in tables.items()
    )
    print(f"Written to {target}. Configuration for a run with these weights:\n\n{recipe}")


def dcp_to_hf(source: Path, target: Path, options: argparse.Namespace) -> None:
    """Writes the weights of a checkpoint, or their average, to a folder for transformers.

    Raises ValueError for a tokenizer with other ids than in training, without --allow-mismatch.
    """
    manifest = read_manifest(source)
    try:
        section = stored_model(manifest.config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} does not name a known model: {error}") from error
    try:
        family, args = resolve(section)
    except SettingError as error:
        plugins = manifest.config.get("job", {}).get("plugins")
        hint = f"; its run had job.plugins = {literal(plugins)}: name them with --plugin"
        raise ValueError(f"{error}{hint if plugins else ''}") from error
    if differing := model_differences(manifest, section, args):
        words = [f"{name} is {now}, not {saved}" for name, (saved, now) in differing.items()]
        raise ValueError(
            f"{source}: the flavor {literal(section.flavor)} has changed since the checkpoint was "
            f"saved: {', '.join(words)}"
        )
    if family.hf_config is None:
        raise ValueError(NO_HF_CONFIG.format(family.name))
    if unsupported := unsupported_in_hf(args, family.hf_config):
        raise ValueError(unsupported)

    # Reading a tensor does not show that its bytes are those that were written.
    if damaged := damaged_files(source, manifest.files, manifest.files, threads=None):
        raise ValueError("; ".join(damaged))

    from titan_lite.checkpoint.hf import DCPToHF
    from titan_lite.data.export_check import README, export_report
    from titan_lite.data.hf_documents import hf_documents

    export = DCPToHF(
        source,
        family,
        args,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        average=options.average,
    )
    tokenizer_path: str | None = options.tokenizer
    tokenizer, files = _tokenizer_of(source, manifest, tokenizer_path)
    hf_files = hf_documents(args, family.hf_config, tokenizer, dtype=export.dtype)
    if files:
        # The files of a converted model are copied unchanged.
        hf_files = {"config.json": hf_files["config.json"], **files}
    elif tokenizer is not None:
        is_other = tokenizer_path is not None and tokenizer.fingerprint != manifest.tokenizer
        report = export_report(
            hf_files,
            tokenizer,
            _data_of(manifest),
            of_pairs=not args.causal,
            origin=tokenizer_path or "the bundled tokenizer" if is_other else "training",
        )
        if difference := _difference(source, manifest, tokenizer, tokenizer_path):
            sentence = f"{difference}. {report.sentence}"
            report = dataclasses.replace(report, is_same=False, sentence=sentence)
        if not (report.is_same or options.allow_mismatch):
            raise ValueError(
                f"{report.sentence}. To export it with a {README} that describes the difference, "
                "pass --allow-mismatch"
            )
        hf_files[README] = report.readme()
        print(report.sentence, file=sys.stdout if report.is_same else sys.stderr)
    export.write(target, hf_files)
    num_files = len(export.files.filename_to_tensors)
    print(
        f"Written to {target}: {family.hf_config.architecture}, {export.hf.num_parameters:,} "
        f"parameters in {export.dtype}, {num_files} file{'s' * (num_files > 1)}"
    )
    if len(hf_files) == 1:
        print("No tokenizer files were exported; pass --tokenizer to include one")


def model_section(family: Family, args: DecoderArgs) -> dict[str, Any]:
    """Returns a [model] that resolves to `args`: the nearest flavor, with overrides.

    Raises ValueError if [model] cannot override all differences from any flavor.
    """
    assert family.hf_config is not None
    stored = [*family.hf_config.keys, "rope_scaling"]
    fields = [field.name for field in dataclasses.fields(args) if field.name in stored]
    differing: dict[str, dict[str, Any]] = {}
    for flavor, known in family.flavors.items():
        values = {name: getattr(args, name) for name in fields}
        if known.head_dim is not None:
            values["head_dim"] = args.head_size
        differing[flavor] = {name: v for name, v in values.items() if v != getattr(known, name)}
    missing = {
        flavor: [f"{name} = {v}" for name, v in values.items() if name not in Model.model_fields]
        for flavor, values in differing.items()
    }
    nearest = min(differing, key=lambda flavor: (len(missing[flavor]), len(differing[flavor])))
    if missing[nearest]:
        raise ValueError(
            f"config.json has {', '.join(missing[nearest])}, which no flavor of model family "
            f"{family.name} has and no key of [model] can set: register a family, as "
            "docs/adding_a_family.md shows, and name its module with --plugin"
        )
    return {"name": family.name, "flavor": nearest, **differing[nearest]}


def _data_of(manifest: CheckpointManifest) -> Data | None:
    """Returns the [data] of a checkpoint's run; None if this version does not know its keys."""
    try:
        return Data(**manifest.config["data"])
    except (KeyError, ValueError):
        return None


def _tokenizer_of(
    source: Path, manifest: CheckpointManifest, given: str | None
) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """Returns the tokenizer of a checkpoint, if there is one, and its files if they are stored.

    given: path of another tokenizer, which replaces it.
    """
    kept = source / TOKENIZER_FOLDER
    if given is None and kept.is_dir():
        return (load_tokenizer(kept) if manifest.tokenizer else None), _read_files(kept)
    path = manifest.config.get("data", {}).get("tokenizer_path") if given is None else given
    if path is None:
        return None, {}
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(f"{error}: name the run's tokenizer with --tokenizer") from error
    if given is None and (difference := _difference(source, manifest, tokenizer, path)):
        raise ValueError(f"{difference}: pass the tokenizer of the training with --tokenizer")
    return tokenizer, {}


def _difference(
    source: Path, manifest: CheckpointManifest, tokenizer: Tokenizer, path: str | None
) -> str:
    """Describes the difference of a tokenizer from that of training; "" if there is none."""
    if manifest.tokenizer in ("", tokenizer.fingerprint):
        return ""
    return (
        f"{path or 'the bundled tokenizer'} gives other ids than the tokenizer of {source} "
        f"(fingerprint {tokenizer.fingerprint}, not {manifest.tokenizer})"
    )


def _read_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the tokenizer's files in a folder, by name."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {name: (folder / name).read_bytes() for name in names}


def _fingerprint(folder: Path) -> str:
    """Returns the fingerprint of a folder's tokenizer; "" if it has none that can be read."""
    if not files_in(folder):
        return ""
    try:
        return load_tokenizer(folder).fingerprint
    except ValueError as error:
        print(f"titan-lite convert: warning: {error}", file=sys.stderr)
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-lite convert",
        description="Converts weights between Hugging Face's safetensors and checkpoints, in one "
        "process. A model may be larger than its memory.",
        epilog=examples(
            "titan-lite convert hf-to-dcp Llama-3.1-8B llama_dcp",
            "titan-lite convert dcp-to-hf outputs/checkpoint/step-1000 exported_model",
        ),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_dcp = directions.add_parser(
        "hf-to-dcp",
        help="a Hugging Face model becomes a checkpoint",
        description="Writes a checkpoint of the weights of a Hugging Face model, and prints the "
        "tables of a run that starts from them.",
        epilog=examples(
            "titan-lite convert hf-to-dcp Llama-3.1-8B llama_dcp",
            "titan-lite convert hf-to-dcp outputs/checkpoint/hf exported_dcp",
        ),
        formatter_class=HelpFormatter,
    )
    to_hf = directions.add_parser(
        "dcp-to-hf",
        help="a checkpoint becomes a Hugging Face model",
        description="Writes a checkpoint as a folder that transformers reads: safetensors, "
        "config.json and tokenizer.",
        epilog=examples(
            "titan-lite convert dcp-to-hf outputs/checkpoint/step-1000 exported_model",
            "titan-lite convert dcp-to-hf outputs/checkpoint/step-1000 my_model --dtype bfloat16 "
            "--max-shard-size 2GB",
        ),
        formatter_class=HelpFormatter,
    )
    for direction, what in ((to_dcp, "folder with config.json"), (to_hf, "a checkpoint's folder")):
        direction.add_argument("source", metavar="SRC", help=what)
        direction.add_argument("target", metavar="DST", help="folder to write; must not exist")
        direction.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="MODULE",
            help="module that registers the model family, as in job.plugins; may be repeated",
        )
    to_hf.add_argument(
        "--dtype", choices=list(DTYPES.values()), help="type of the weights (default: as saved)"
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest size of a file, such as 200MB (default: 5GB)",
    )
    to_hf.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer's file, or its folder (default: that of the checkpoint's run)",
    )
    to_hf.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="write the tokenizer even if it gives other ids than in training",
    )
    to_hf.add_argument(
        "--average",
        action="store_true",
        help="write the average of the weights ([ema]) instead of the weights",
    )
    return parser


def _bytes(text: str) -> int:
    """Parses a size such as "5GB"."""
    with contextlib.suppress(ValidationError):
        if size := TypeAdapter(ByteSize).validate_python(text):
            return size
    raise argparse.ArgumentTypeError(f'expected a size as "5GB" or "200MB", got {text!r}')
