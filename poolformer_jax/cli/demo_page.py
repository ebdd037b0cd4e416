"""A web page that shows the labels of a picture, and the Grad-CAM overlay of one of them.

Needs the extra `demo` (gradio). The page loads nothing from other machines.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from poolformer_jax.errors import MissingDependencyError
from poolformer_jax.images import ImageError
from poolformer_jax.inference import VISIBLE_SIDE, GradCam, ImageClassifier

_MAX_UPLOAD = "50mb"
_HEIGHT = 360  # of both pictures, in pixels
# Small pictures are enlarged, too.
_CSS = "#picture img, #overlay img { width: 100%; height: 100%; object-fit: contain; }"
_MOST_PROBABLE = -1
# A gradio.Blocks; gradio is not needed for type checking.
Page = Any


def build_page(
    classifier: ImageClassifier, cam: GradCam, title: str, top_k: int = 5, samples: Sequence[Path] = ()
) -> Page:
    """The page; `.launch()` serves it.

    `cam` gives the overlay, for the most probable label or for one that the user chooses. Raises ModuleNotFoundError if
    gradio is not installed, naming the extra.
    """
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError(
            f"The demo page needs gradio ({error}). Install it with: pip install -e '.[demo]'"
        ) from error

    def look(path: str | None, label: int) -> tuple[dict[str, float] | None, UInt8[np.ndarray, "h w 3"] | None]:
        if path is None:
            return None, None
        try:
            predictions = classifier(path, top_k)
        except ImageError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        # Two classes of ImageNet have the same name; the first one is the more probable.
        probabilities: dict[str, float] = {}
        for name, probability in predictions:
            probabilities.setdefault(name, probability)
        return probabilities, cam(path, None if label == _MOST_PROBABLE else label).overlay(VISIBLE_SIDE)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}\nDrop a picture, or paste one. It does not leave the machine that runs this page.")
        with gradio.Row():
            picture = gradio.Image(
                type="filepath", label="Picture", sources=["upload", "clipboard"], elem_id="picture", height=_HEIGHT
            )
            # The file as uploaded. Gradio would convert it to 8-bit RGB, and fail on a damaged one with a traceback.
            picture.preprocess = lambda upload: upload and upload.path
            overlay = gradio.Image(
                label="Grad-CAM",
                elem_id="overlay",
                interactive=False,
                buttons=["download", "fullscreen"],
                height=_HEIGHT,
            )
        label = gradio.Dropdown(
            [("the most probable label", _MOST_PROBABLE), *class_choices(classifier.id2label)],
            value=_MOST_PROBABLE,
            label="Grad-CAM shows the evidence for",
            elem_id="label",
        )
        labels = gradio.Label(num_top_classes=top_k, label="Labels", elem_id="labels")
        if samples:
            _offer(gradio, [str(path) for path in samples], picture)
        gradio.on([picture.change, label.change], look, [picture, label], [labels, overlay])
    return page


def _offer(gradio: Any, paths: list[str], picture: Any) -> None:
    """Adds pictures, a click on which puts them into the component `picture`."""
    # Not gradio.Examples, which makes a new picture component, whose `preprocess` is gradio's.
    rows = [[path] for path in paths]
    shown = gradio.Dataset(components=["image"], samples=rows, type="index", label="Pictures to try", elem_id="samples")
    shown.click(lambda index: paths[index], shown, picture)


def class_choices(names: Mapping[int, str]) -> list[tuple[str, int]]:
    """Names and indices of classes. A name of two classes has the index behind it."""
    count = Counter(names.values())
    return [(name if count[name] == 1 else f"{name} ({index})", index) for index, name in sorted(names.items())]


def serve(page: Page, host: str, port: int | None = None) -> None:
    """Prints the page's address and serves it until Ctrl-C."""
    import gradio

    # Fonts of this machine; gradio's themes download theirs.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        max_file_size=_MAX_UPLOAD,
        server_name=host,
        server_port=port,
        share=False,
        footer_links=[],
        theme=theme,
        css=_CSS,
    )
