"""Descriptions of GPUs that are not present, for the GPU compiler, from published numbers."""

import importlib.util
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from benchmarks.gpu import PEAKS
from poolformer_jax.errors import MissingDependencyError

# Library versions that the compiler assumes: the oldest cuDNN that jax 0.10.2 supports, the last CUDA 12.
CUDNN, CUDA = (9, 8), (12, 9)
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclass(frozen=True)
class Target:
    """One GPU, from NVIDIA's data sheets and the tables of the CUDA programming guide."""

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # float32 operations per multiprocessor and cycle
    shared_memory: int  # KiB per multiprocessor
    cache: int  # MiB of the second-level cache
    memory: int  # GiB of memory
    clock: float  # highest clock in GHz
    threads: int = 2048  # resident threads per multiprocessor

    def text(self, name: str) -> str:
        """The compiler's input, a GpuTargetConfigProto in text form."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{name}"
            dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
            runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.lanes}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {PEAKS[name].bandwidth:.0f}
              device_memory_size: {self.memory * 2**30}
              l2_cache_size: {self.cache * 2**20}
              shared_memory_per_core: {self.shared_memory * 2**10}
              # CUDA reserves one KiB per block; a block must request more than 48 KiB explicitly.
              shared_memory_per_block_optin: {(self.shared_memory - 1) * 2**10}
              shared_memory_per_block: {48 * 2**10}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {self.threads}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: {2**31 - 1}
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """


# The names are those that nvidia-smi prints, as in PEAKS.
TARGETS = {
    "NVIDIA H200": Target((9, 0), 132, 128, shared_memory=228, cache=50, memory=141, clock=1.98),
    "NVIDIA H100 80GB HBM3": Target((9, 0), 132, 128, shared_memory=228, cache=50, memory=80, clock=1.98),
    "NVIDIA A100-SXM4-80GB": Target((8, 0), 108, 64, shared_memory=164, cache=40, memory=80, clock=1.41),
    "NVIDIA L4": Target((8, 9), 58, 128, shared_memory=100, cache=48, memory=24, clock=2.04, threads=1536),
}


def has_compiler() -> bool:
    """True if a CUDA plugin of jax is installed; the compiler is part of it."""
    return any(importlib.util.find_spec(plugin) for plugin in PLUGINS)


def device(name: str) -> jax.Device:
    """A device of this name to compile for. It cannot run programs.

    Raises MissingDependencyError if the compiler is not installed.
    """
    if not has_compiler():
        raise MissingDependencyError(
            "The GPU compiler is not installed; it needs no GPU. Install it: pip install -e '.[train,cuda12]'"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[name].text(name), topology="1x1x1")
    (only,) = topology.devices
    return only
