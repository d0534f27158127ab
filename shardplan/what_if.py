"""``shardplan plan --what-if devices=8,16,32``: the same job with one setting changed, each variant searched anew.

Variants of devices, memory and links share the trace; another batch is traced again. A variant without a plan is an
answer too, and says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardplan.errors import ShardplanError, UsageError
from shardplan.planner.report.what_if import WhatIf

if TYPE_CHECKING:
    from shardplan.cli_work import Job, Planner
    from shardplan.planner.plan import Plan

SETTINGS = ("devices", "batch", "memory", "links")
_COUNTED = re.compile(r"^(\d+)x(.+)$")
_PRESET = re.compile(r"^(.+):(\d+)$")


@dataclass(frozen=True, slots=True)
class Variant:
    """setting: one of `SETTINGS`. value: as the user wrote it."""

    setting: str
    value: str


def parse(texts: Sequence[str]) -> list[Variant]:
    """``devices=8,16`` -> one variant a value. Raises UsageError."""
    found = []
    for text in texts:
        setting, equals, values = text.partition("=")
        if not equals or setting not in SETTINGS or not all(value.strip() for value in values.split(",")):
            raise UsageError(
                f"cannot read --what-if {text!r}",
                hints=[f"write SETTING=VALUE,VALUE with a setting of {', '.join(SETTINGS)}, such as devices=8,16,32"],
            )
        found += [Variant(setting, value.strip()) for value in values.split(",")]
    for variant in found:
        if variant.setting == "batch" and (not variant.value.isdecimal() or int(variant.value) < 1):
            raise UsageError(f"--what-if batch={variant.value}: a batch is a number of at least 1")
        if variant.setting == "links":
            link_factor(variant.value)
    return found


def devices_text(now: str, value: str) -> str:
    """The devices of a variant: a number alone keeps the kind ("8xh100" and 16 are "16xh100", "dgx-h100:2" and 4 are
    "dgx-h100:4"); anything else is taken as it is."""
    if not value.isdecimal():
        return value
    if counted := _COUNTED.match(now):
        return f"{value}x{counted[2]}"
    if now.startswith("cpu:"):
        return f"cpu:{value}"
    if preset := _PRESET.match(now):
        return f"{preset[1]}:{value}"
    if now.isdecimal() or now == "auto":
        return value
    raise UsageError(f"--what-if devices={value}: {now} has no count", hints=["write the devices out: devices=16xh100"])


def link_factor(value: str) -> float:
    """How many times faster links are: "2x", "0.5". Raises UsageError."""
    try:
        factor = float(value.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not factor > 0:
        raise UsageError(f"--what-if links={value}: a factor above 0", hints=["links=0.5,2,4: half, twice, four times"])
    return factor


def explore(job: Job, variants: Sequence[Variant]) -> tuple[WhatIf, ...]:
    """Plans every variant, one after another; a variant without a plan is an entry that says why."""
    from shardplan.cli_work import Planner

    planner = Planner(job)
    found = []
    for variant in variants:
        try:
            plan = _planned(planner, variant)
        except UsageError:
            raise
        except ShardplanError as error:
            found.append(WhatIf.without(variant.setting, variant.value, error))
        else:
            found.append(WhatIf.of(variant.setting, variant.value, plan))
    return tuple(found)


def _planned(planner: Planner, variant: Variant) -> Plan:
    from shardplan import cli_work

    job, value = planner.job, variant.value
    if variant.setting == "batch":
        return cli_work.Planner(replace(job, batch=int(value))).plan()
    if variant.setting == "devices":
        return planner.plan(replace(job, devices=devices_text(job.devices, value)))
    if variant.setting == "memory":
        return planner.plan(replace(job, memory=value))
    return planner.plan(faster_links=link_factor(value))
