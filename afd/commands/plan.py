"""`afd plan`: what a run needs, before it runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from afd.commands.options import add_config, non_negative_float, positive_int
from afd.config import DiscriminatorSection
from afd.config_file import load_config


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    from afd.planning.hardware import GPUS, GPUS_PER_NODE, INTERCONNECTS

    plan = commands.add_parser("plan", help="memory, seconds and cost of a run, and what to change if it does not fit")
    add_config(plan)
    plan.add_argument("--ds_config", type=Path, help="DeepSpeed JSON of the student's engine; by default "
                      "zero3_h100.json, and zero3.json where the discriminator's is the built-in world's")  # fmt: skip
    plan.add_argument("--gpu", choices=sorted(GPUS), default="h100-80g")
    plan.add_argument("--gpus", type=positive_int, default=8)
    plan.add_argument("--gpus_per_node", type=positive_int, default=GPUS_PER_NODE)
    plan.add_argument("--interconnect", choices=sorted(INTERCONNECTS), default="ib-400")
    plan.add_argument("--price", type=non_negative_float, help="$ per GPU and hour")
    plan.add_argument("--json", action="store_true", help="everything, as JSON")
    plan.add_argument("--write_docs", type=Path, metavar="FILE", help="rewrite the tables of docs/planning.md and stop")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from afd.planning.hardware import GPUS, INTERCONNECTS
    from afd.planning.plan import Machine, as_json, make_plan, planned_shape, refuse_what_does_not_fit, remedies
    from afd.planning.report import describe_plan, describe_remedies
    from afd.train.ds_config import load_critic_config, load_ds_config

    if arguments.write_docs is not None:
        from afd.planning.tables import rewrite

        rewrite(arguments.write_docs)
        print(f"wrote {arguments.write_docs}")
        return
    config = load_config(arguments.config, arguments.overrides)
    is_small = config.discriminator.ds_config == DiscriminatorSection().ds_config
    student = arguments.ds_config or Path("configs/zero3.json" if is_small else "configs/zero3_h100.json")
    ds_configs = tuple(load_ds_config(path) for path in (student, config.discriminator.ds_config))
    ds_configs += load_critic_config(config)
    gpu = GPUS[arguments.gpu]
    if arguments.price is not None:
        gpu = replace(gpu, price=arguments.price)
    machine = Machine(gpu, INTERCONNECTS[arguments.interconnect], arguments.gpus, arguments.gpus_per_node)
    shape = planned_shape(config)
    plan = make_plan(config, shape, ds_configs, machine)
    if arguments.json:
        found = [] if plan.fits else remedies(config, shape, ds_configs, machine)
        print(json.dumps(as_json(plan, gpu.price) | {"remedies": [each.change for each in found]}, indent=2))
    else:
        print(describe_plan(plan, price=gpu.price))
        if not plan.fits:
            print(describe_remedies(remedies(config, shape, ds_configs, machine)))
    refuse_what_does_not_fit(plan)
