"""Who started this process, as its environment says: torchrun, SLURM, or a process like it. Read as
Lightning Fabric reads it, but before torch is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The processes that something else has started, one for each device."""

    by: str
    """Whose they are, for messages."""
    total: int
    """On all nodes."""
    devices: int | None
    """On this node; None where the environment does not say."""


def started(environment: Mapping[str, str] = os.environ) -> Started | None:
    """What started this process and others beside it; None if nothing did."""
    if {"LOCAL_RANK", "WORLD_SIZE"} <= environment.keys():  # torchrun, or a process of Fabric's own
        by = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher"
        return Started(by, *_counts(environment, "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return Started("SLURM", *_counts(environment, "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"))
    return None


def _counts(environment: Mapping[str, str], total: str, local: str) -> tuple[int, int | None]:
    return int(environment[total]), int(environment[local]) if local in environment else None


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its node, which speaks for the others."""
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")) == "0"
