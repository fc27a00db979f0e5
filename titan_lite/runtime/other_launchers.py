"""Variables of Slurm, MPI or a cluster that show how often a program was started. No torch."""

import os
from collections.abc import Collection

# Variables that MPI sets; PMI_RANK may be set without PMI_SIZE.
MPI = {
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
}


def unexpected_start(times: int = 1, world_sizes: Collection[int] = (1,)) -> str | None:
    """Returns the variable that shows an unexpected number of processes; None if there is none.

    times: expected number for Slurm and MPI. world_sizes: possible values of WORLD_SIZE.
    """
    get, expected = os.environ.get, str(times)
    if (world_size := get("WORLD_SIZE")) and world_size not in map(str, world_sizes):
        return "WORLD_SIZE"
    # A batch script is one process, whatever its job's number of tasks.
    is_batch_script = get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in os.environ
    if "SLURM_PROCID" in os.environ and get("SLURM_NTASKS") != expected and not is_batch_script:
        return "SLURM_PROCID" if get("SLURM_NTASKS") is None else "SLURM_NTASKS"
    for rank, size in MPI.items():
        if get(size, expected if rank not in os.environ else None) != expected:
            return size if get(size) else rank
    return None
