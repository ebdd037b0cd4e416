"""The GPUs of a process under Slurm and Open MPI."""

import json
import os
import subprocess
import sys

import programs

# What `srun` and `mpirun` put into the environment of a job of one process, and which GPUs jax may then use.
SLURM = {
    "SLURM_JOB_ID": str(os.getpid()),  # from which jax chooses the port
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": f"{4096 * os.getpid()}.0;tcp://127.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
CASES = {
    "one task on every node": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0"}, "all"),
    "eight on every node": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "0"}, "0"),
    "one on the fourth node": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, "all"),
    "two on the third": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, "0"),
    "Slurm does not tell": (SLURM, "0"),
    "one, and its GPUs by number": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0", "JAX_LOCAL_DEVICE_IDS": "2,3"},
        "2,3",
    ),
    "Open MPI, one": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
    "Open MPI, four": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "0"),
}
PROGRAM = """
import json, os, sys
import jax
from train.config import DistributedConfig
from train.compute.distributed import initialize

usual, seen = dict(os.environ), {}
for name, (environment, _) in json.loads(sys.argv[1]).items():
    os.environ.clear()
    os.environ.update(usual | environment)
    jax.config.update("jax_cuda_visible_devices", "all")
    initialize(DistributedConfig())
    assert jax.distributed.is_initialized()
    seen[name] = jax.config.values["jax_cuda_visible_devices"]
    jax.distributed.shutdown()
print(json.dumps(seen))
"""


def test_the_only_process_on_a_host_uses_all_its_gpus():
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, timeout=programs.DEADLINE)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {name: wanted for name, (_, wanted) in CASES.items()}
