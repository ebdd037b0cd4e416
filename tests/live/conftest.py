"""The other libraries, where they are installed."""

import importlib.util

import pytest

from live import peers


@pytest.fixture(scope="session")
def timm():
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return peers.timm()
