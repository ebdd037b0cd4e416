"""The environment of every test: CPU, eight virtual devices, and one compilation cache for all processes."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import programs

# Set before jax is imported, and inherited by the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs.ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most tests run what they compile once. Those that compute much take `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# jaxtyping and beartype check the library's shape annotations. In modules that have none, the checks would cost the
# tests of weights half of their time.
install_import_hook(
    [
        ".".join(path.relative_to(programs.ROOT).with_suffix("").parts)
        for path in sorted(programs.ROOT.glob("poolformer_jax/**/*.py"))
        if "from jaxtyping import" in path.read_text()
    ],
    "beartype.beartype",
)

# With Python's thresholds, garbage collection takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)

# Ignored where a shell started pytest in the background, and then by the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Assertions in these files show their values, as in the tests themselves.
pytest.register_assert_rewrite("exports", "refusals", "small_data")


def pytest_configure(config: pytest.Config) -> None:
    """All but the live tests use XLA's older code generator for CPUs, which compiles three times as fast."""
    # XLA aborts on a flag that it does not know.
    if config.option.markexpr != "live" and version("jaxlib").startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


@pytest.fixture(scope="module")
def optimised():
    """Compiles programs with XLA's usual optimizations, which takes longer and runs faster."""
    import jax

    quickly = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as programs_that_tests_start:
        programs_that_tests_start.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        yield
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture
def shared_programs(monkeypatch):
    """Lets runs in this process that train the same network share the compiled programs."""
    import training

    training.share_programs(monkeypatch)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """The folder of a run of 20 steps on eight devices, to compare with or to copy."""
    import training
    from train.command_line import main

    run_dir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        training.share_programs(patch)
        assert main([*programs.TINY, "--run-dir", str(run_dir), "--distributed.mode", "off"]) == 0
    return run_dir
