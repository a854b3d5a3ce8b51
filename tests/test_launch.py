"""Whoever starts a run's processes, each knows its place, or says what is missing before anything is done."""

from __future__ import annotations

import socket
from pathlib import Path

import processes
import pytest

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.launch import ProcessPlace, find_place, job_of, launch_variables

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[004-006,010]-ib,cpu1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ProcessPlace(0, 1, 0)),
        ({"WORLD_SIZE": "1"}, ProcessPlace(0, 1, 0)),
        (TORCHRUN, ProcessPlace(1, 2, 1)),
        # torchrun within srun: srun's tasks are machines.
        (SLURM | TORCHRUN, ProcessPlace(1, 2, 1)),
        (SLURM, ProcessPlace(5, 8, 1, "Slurm's srun")),
        (SLURM | {"SLURM_GPUS_PER_TASK": "1"}, ProcessPlace(5, 8, 0, "Slurm's srun")),
        # A step of one task in a job of eight, a batch script that asked for no number of tasks, a shell of salloc.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ProcessPlace(0, 1, 0)),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, ProcessPlace(0, 1, 0)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, ProcessPlace(0, 1, 0)),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, ProcessPlace(0, 1, 0)),
        (OPEN_MPI, ProcessPlace(1, 2, 1, "Open MPI")),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, ProcessPlace(3, 4, 1, "an MPI launcher")),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ProcessPlace(0, 1, 0)),
    ],
)
def test_a_process_knows_its_place(environment: dict[str, str], place: ProcessPlace) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE: start the processes with torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but RANK and WORLD_SIZE are not set"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is set, but empty"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is set, but empty"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a number, got 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2, which no launcher sets"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE 0"),
        # A batch script of eight tasks that calls Python without srun; two tasks that do not know of how many.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "put srun or `srun torchrun` in front.*RANK=0 WORLD_SIZE=1"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is 1, so that Slurm's srun has started several"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is 1, so that a PMIx launcher has started several"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "does not say which one it is on its machine: set LOCAL_RANK"),
    ],
)
def test_what_can_not_be_understood_is_refused_with_the_remedy(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        find_place(environment)


def test_slurm_s_processes_find_the_same_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    found = [launch_variables(find_place(task), task) for task in (SLURM, SLURM | {"SLURM_PROCID": "6"})]
    assert found[0] == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu004-ib",
        "MASTER_PORT": str(15000 + (7 * 4711 + 2) % 15000),
    }
    assert found[1] == found[0] | {"RANK": "6"}
    chosen = SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert launch_variables(find_place(chosen), chosen)["MASTER_ADDR"] == "head"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (OPEN_MPI, "Open MPI has started this as process 1 of 2, but MASTER_ADDR and MASTER_PORT are not set: set"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is empty"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT must be a port, 1 to 65535, got 'http'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT must be a port"),
        (TORCHRUN | {"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR is 'nowhere.invalid', which no name server knows"),
    ],
)
def test_an_address_that_can_not_be_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        launch_variables(find_place(environment), environment)


def test_a_job_keeps_its_name() -> None:
    assert job_of(SLURM) == "SLURM_JOB_ID=4711"
    assert job_of({"TORCHELASTIC_RUN_ID": "none"}) is job_of({}) is None


JOIN = """
import logging, sys
from datetime import timedelta
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training import distributed

logging.basicConfig()
distributed.JOIN_TIMEOUT, distributed.JOIN_SECONDS = timedelta(seconds=2), 0.5
try:
    distributed.World.join("cpu")
except ConfigurationError as error:
    sys.exit(f"error: {error}")
"""


def test_processes_that_do_not_find_each_other_say_so(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = {"MASTER_PORT": str(other.getsockname()[1]), "WORLD_SIZE": "2"}
        (code, output), *_ = processes.finish(processes.start([str(script)], 1, taken))
    assert code == 1 and "is in use on this machine, maybe by another run: choose another" in output, output
    (code, output), *_ = processes.finish(processes.start([str(script)], 1, {"WORLD_SIZE": "2"}))
    assert code == 1 and "the processes don't find each other" in output, output
    assert "rank 0 waits for the others: MASTER_ADDR and MASTER_PORT (127.0.0.1:" in output
    assert "Traceback" not in output
