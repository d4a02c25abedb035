"""`afd pretrain`, `afd convert`, `afd export`: student weights, made, brought in and given away."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from afd.commands.options import add_config
from afd.config_file import load_config

DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    pretrain = commands.add_parser("pretrain", help="make a base student of the built-in world and its text encoder")
    add_config(pretrain)
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write")
    pretrain.set_defaults(run=_pretrain, config=Path("configs/chunk_wise.yaml"))

    convert = commands.add_parser("convert", help="student weights of any format -> one safetensors file")
    convert.add_argument("source", type=Path, help="a .pt, a diffusers folder, a commit, a safetensors file, ...")
    convert.add_argument("--out", type=Path, required=True, help="student.safetensors to write")
    _add_common(convert)
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="a commit -> a diffusers folder, or the original .pt names")
    export.add_argument("--checkpoint", type=Path, required=True, help="a commit, a run's folder, or any weights")
    export.add_argument("--format", choices=("diffusers", "original"), default="diffusers")
    export.add_argument("--out", type=Path, required=True, help="folder, or for the original names .pt or .safetensors")
    export.add_argument("--weights", choices=("average", "raw"), default="average", help="the EMA, or the raw weights")
    export.add_argument("--lora", choices=("merged", "separate"), default="merged", help="separate: in peft's format")
    export.add_argument("--components", type=Path, help="diffusers pipeline whose VAE and text encoder come along")
    export.add_argument("--config", type=Path, help="configuration with the sampler, for weights that are not a commit")
    _add_common(export)
    export.set_defaults(run=_export)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the written weights; keep: bit by bit")
    parser.add_argument(
        "--student", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="what the file does not tell"
    )


def _pretrain(arguments: argparse.Namespace) -> None:
    from afd.train.pretrain import make_base_student

    make_base_student(load_config(arguments.config, arguments.overrides), arguments.out)
    print(arguments.out)


def _convert(arguments: argparse.Namespace) -> None:
    from afd.train.export import DTYPES as dtypes
    from afd.train.export import convert_student

    given = _student_fields(arguments.student)
    shape = convert_student(arguments.source, arguments.out, student=given, dtype=dtypes[arguments.dtype])
    print(f"{arguments.out}: {shape.num_layers} layers of width {shape.dim}, chunks of {shape.chunk_frames} frames")


def _export(arguments: argparse.Namespace) -> None:
    from afd.train.export import DTYPES as dtypes
    from afd.train.export import ExportChoice, export_for_diffusers, export_for_peers

    choice = ExportChoice(arguments.weights, arguments.lora, dtypes[arguments.dtype], arguments.components)
    given = _student_fields(arguments.student)
    if arguments.format == "original":
        export_for_peers(arguments.checkpoint, arguments.out, choice=choice, student=given)
    else:
        config = None if arguments.config is None else load_config(arguments.config)
        if config is not None:
            given = config.student.given_shape | given
        export_for_diffusers(arguments.checkpoint, arguments.out, choice=choice, student=given, config=config)
    print(arguments.out)


def _student_fields(pairs: list[str]) -> dict[str, Any]:
    """`field=value` of the student section.

    Raises:
        ConfigError: not such pairs, or the section refuses them.
    """
    section = load_config(None, [f"student.{pair}" for pair in pairs]).student
    return {name: getattr(section, name) for name in section.model_fields_set}
