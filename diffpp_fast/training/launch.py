"""The place of this process among a run's, by what its launcher has put into the environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from diffpp_fast.errors import ConfigurationError

#: Variables that torchrun, the deepspeed launcher and most schedulers' wrappers set.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Other launchers' names for rank, number of processes (the first that is set counts) and rank on the machine.
FOREIGN = (
    ("Slurm's srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_LOCAL_RANK"),
    ("an MPI launcher", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID"),
    ("Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), "FLUX_TASK_LOCAL_ID"),
    ("a PMIx launcher", "PMIX_RANK", (), "PMIX_LOCAL_RANK"),
)
#: Names of a job that stay when a scheduler or torchrun starts it again.
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")
#: Variables that `pretend_launch` has set.
_added: set[str] = set()
ALONE = "to train in this process alone, set RANK=0 WORLD_SIZE=1"


class ProcessPlace(NamedTuple):
    """A process among those of its launch.

    Attributes:
        rank: from 0.
        size: how many there are.
        local_rank: on this machine, from 0.
        launcher: the name of one that does not set torch's variables; None for one that does, and without any.
    """

    rank: int
    size: int
    local_rank: int
    launcher: str | None = None


def find_place(environment: Mapping[str, str]) -> ProcessPlace:
    """Return this process's place: by torch's variables where they are set, else by those of Slurm, MPI or Flux.

    Raises ConfigurationError for variables that are empty, no numbers, or there without those that belong to them.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        foreign = _foreign_place(environment)
        if foreign is None and environment.get("LOCAL_RANK", "0") not in ("", "0"):
            raise ConfigurationError(
                f"LOCAL_RANK is {environment['LOCAL_RANK']}, but RANK and WORLD_SIZE are not set: start the processes "
                "with torchrun or the deepspeed launcher, or unset it"
            )
        return foreign or ProcessPlace(0, 1, 0)
    half = {"RANK", "WORLD_SIZE"} - environment.keys()
    if half and environment.get("WORLD_SIZE") != "1":
        (missing,) = half
        raise ConfigurationError(
            f"{'RANK' if missing == 'WORLD_SIZE' else 'WORLD_SIZE'} is set, but not {missing}: start the processes "
            "with torchrun or the deepspeed launcher, or unset it"
        )
    rank, size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    local_rank = _number(environment, "LOCAL_RANK", 0)
    if not 0 <= rank < size or local_rank < 0:
        raise ConfigurationError(
            f"RANK is {rank} and WORLD_SIZE {size}, which no launcher sets (ranks count from 0): start the processes "
            "with torchrun or the deepspeed launcher, or unset these variables"
        )
    return ProcessPlace(rank, size, local_rank)


def launch_variables(place: ProcessPlace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return torch's five variables for one of several processes.

    Where Slurm has started them, the address is the step's first machine, and the port follows from the job's number.

    Raises ConfigurationError where the address is not known, and for one that can't be.
    """
    known = {name: environment[name].strip() for name in LAUNCH_VARIABLES if environment.get(name, "").strip()}
    if place.launcher is not None:
        known |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank)}
        known = {**_slurm_address(environment), **known}
    missing = [name for name in LAUNCH_VARIABLES if name not in known]
    if missing and place.launcher is not None:
        raise ConfigurationError(
            f"{place.launcher} has started this as process {place.rank} of {place.size}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: set MASTER_ADDR to the machine of process 0 and "
            f"MASTER_PORT to a free port there, the same for all processes, or start them with torchrun; {ALONE}"
        )
    if missing:
        empty = [name for name in missing if name in environment]
        said = f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty" if empty else ""
        given = f"{' and '.join(known)} are set, but not {' and '.join(missing)}"
        raise ConfigurationError(
            f"{said or given}: start the processes with torchrun or the deepspeed launcher, or unset these variables"
        )
    _check_address(known["MASTER_ADDR"], known["MASTER_PORT"])
    return known


def is_launched() -> bool:
    """Return whether a launcher has started this process, which passes signals on."""
    return "LOCAL_RANK" in os.environ and "LOCAL_RANK" not in _added


def pretend_launch(place: ProcessPlace) -> None:
    """Set what DeepSpeed looks up in the environment all the time, where no launcher has; see `end_pretence`."""
    place_variables = {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.local_rank}
    for name, value in place_variables.items():
        if name not in os.environ:
            os.environ[name] = str(value)
            _added.add(name)


def end_pretence() -> None:
    """Remove what `pretend_launch` has set."""
    while _added:
        os.environ.pop(_added.pop(), None)


def job_of(environment: Mapping[str, str]) -> str | None:
    """Return a name that the job keeps when it is started again, where its scheduler or torchrun has given it one."""
    named = (f"{name}={environment[name]}" for name in JOBS if environment.get(name) not in (None, "", "none"))
    return next(named, None)


def _foreign_place(environment: Mapping[str, str]) -> ProcessPlace | None:
    for launcher, rank_name, size_names, local_name in FOREIGN:
        if rank_name not in environment:
            continue
        size_name = next((name for name in size_names if name in environment), None)
        rank = _number(environment, rank_name, 0)
        if size_name is None and rank:
            raise ConfigurationError(
                f"{rank_name} is {rank}, so that {launcher} has started several processes, but how many is not known "
                f"({' or '.join(size_names) or 'it does not say'}): start them with torchrun; {ALONE}"
            )
        size = 1 if size_name is None else _number(environment, size_name, 1)
        if size == 1:
            continue
        if launcher == FOREIGN[0][0] and not {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():
            raise ConfigurationError(
                f"Slurm's job has {size} tasks ({size_name}), but srun has not started this process (SLURM_STEP_ID is "
                f"not set): put srun or `srun torchrun` in front of the command; {ALONE}"
            )
        local_name = local_name if local_name in environment else "LOCAL_RANK"
        if local_name not in environment:
            raise ConfigurationError(
                f"{launcher} has started this as process {rank} of {size} and does not say which one it is on its "
                f"machine: set LOCAL_RANK, or start the processes with torchrun; {ALONE}"
            )
        # Where a task sees only GPUs of its own, the first one is its.
        local = 0 if environment.get("SLURM_GPUS_PER_TASK") == "1" else _number(environment, local_name, 0)
        return ProcessPlace(rank, size, local, launcher)
    return None


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.strip():
        raise ConfigurationError(f"{name} is set, but empty: give it a number, or unset it")
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{name} must be a number, got {text!r}") from None


def _slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    """The address that all of a step's tasks find by themselves; nothing outside of Slurm."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job = environment.get("SLURM_JOB_ID", "")
    if "SLURM_PROCID" not in environment or not nodes or not job.isdecimal():
        return {}
    step = environment.get("SLURM_STEP_ID", "0")
    # The first name of a list like gpu[004-006,010]-ib,cpu1.
    first = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    assert first is not None
    port = 15000 + (7 * int(job) + (int(step) if step.isdecimal() else 0)) % 15000
    return {"MASTER_ADDR": "".join(filter(None, first.groups())), "MASTER_PORT": str(port)}


def _check_address(address: str, port: str) -> None:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"MASTER_PORT must be a port, 1 to 65535, got {port!r}")
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"MASTER_ADDR is {address!r}, which no name server knows ({error}): give it the name or the number of the "
            "machine of rank 0"
        ) from None
