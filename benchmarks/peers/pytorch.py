"""PyTorch: the PoolFormer of transformers and the networks of timm, eager and with torch.compile."""

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.workload import Workload, read_labels, read_pixels
from poolformer_jax.resources import available_cores


def inference(
    folder: str,
    compiled: bool = False,
    channels_last: bool = False,
    library: str = "transformers",
    device: str = "cpu",
    autocast: bool = False,
) -> Workload:
    """Logits of a batch."""
    model, pixels = _prepare(folder, channels_last, library, device)
    forward = torch.compile(model.eval()) if compiled else model.eval()

    @torch.inference_mode()
    def call() -> torch.Tensor:
        with _autocast(device, autocast):
            logits = _logits(forward(pixels))
        _wait(device)
        return logits

    return Workload(call, call().float().cpu().numpy(), _versions(library), torch.get_num_threads())


def training(
    folder: str,
    adamw: Mapping[str, float],
    steps: int,
    compiled: bool = False,
    channels_last: bool = False,
    library: str = "transformers",
    device: str = "cpu",
    autocast: bool = False,
    steps_per_call: int = 1,
) -> Workload:
    """Steps: forward, backward, and AdamW's update. The result is the losses of the first ones."""
    model, pixels = _prepare(folder, channels_last, library, device)
    labels = torch.from_numpy(read_labels(folder)).to(device)
    optimizer = _optimizer(model, **adamw)
    forward = torch.compile(model.train()) if compiled else model.train()

    def step_once() -> torch.Tensor:
        with _autocast(device, autocast):
            logits = _logits(forward(pixels))
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def call() -> None:
        for _ in range(steps_per_call):
            step_once()
        _wait(device)

    losses = np.asarray([float(step_once()) for _ in range(steps)])
    return Workload(call, losses, _versions(library), torch.get_num_threads())


def export_onnx(folder: str, library: str) -> None:
    """Writes the library's network to model.onnx in the folder, for the batch size of the pixels."""
    model, pixels = _prepare(folder, channels_last=False, library=library, device="cpu")
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(_Logits(model.eval()), (pixels,), str(Path(folder) / "model.onnx"), dynamo=True, **names)


class _Logits(torch.nn.Module):
    """A network that returns only its logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return _logits(self.model(pixel_values))


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def _prepare(folder: str, channels_last: bool, library: str, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.set_num_threads(available_cores())
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = _LIBRARIES[library](Path(folder)).to(device=device, memory_format=layout)
    pixels = torch.from_numpy(read_pixels(folder)).permute(0, 3, 1, 2)
    return model, pixels.to(device).contiguous(memory_format=layout)


def _transformers(folder: Path) -> torch.nn.Module:
    _hide_broken_torchvision()
    import transformers

    return transformers.PoolFormerForImageClassification.from_pretrained(folder)


def _hide_broken_torchvision() -> None:
    """transformers works without torchvision, but not with one whose operators do not fit the installed torch."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except Exception:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # importing it raises ImportError


def _timm(folder: Path) -> torch.nn.Module:
    """timm's network with the same weights. Of the first paper's, it averages before the last norm: other logits."""
    import timm

    source = folder / "timm" if (folder / "timm").exists() else folder
    name = json.loads((source / "config.json").read_text())["architecture"]
    return timm.create_model(name, checkpoint_path=source / "model.safetensors")


_LIBRARIES: dict[str, Callable[[Path], torch.nn.Module]] = {"transformers": _transformers, "timm": _timm}


def _optimizer(
    model: torch.nn.Module, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with our weight decay: on parameters of two or more dimensions. The fused update is PyTorch's fastest."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, learning_rate, (beta1, beta2), epsilon, fused=True)


def _autocast(device: str, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if enabled else contextlib.nullcontext()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _versions(library: str) -> dict[str, str]:
    return {"torch": torch.__version__, library: importlib.metadata.version(library)}
