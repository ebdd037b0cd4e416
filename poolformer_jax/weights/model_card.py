"""The README.md of a model folder: a model card, as the Hugging Face Hub shows it."""

from collections.abc import Mapping

from poolformer_jax.messages import MAX_MESSAGE, printable
from poolformer_jax.network import PoolFormerConfig, published_variant

MODEL_CARD = "README.md"
# A README.md without this line was written or edited by the user, and is kept.
GENERATED = "<!-- Rewritten whenever the model is saved. Delete this line to keep your changes. -->"

# The library that loads each layout, as the Hub calls it, and the code. {folder} is the folder's name.
_LOADING = {
    "jax": (
        "poolformer_jax",
        "from poolformer_jax import ImageClassifier, load_pretrained\n\n"
        'model, variables = load_pretrained("{folder}")\n'
        'classifier = ImageClassifier.from_pretrained("{folder}")',
    ),
    "jax, without preprocessing": (
        "poolformer_jax",
        'from poolformer_jax import load_pretrained\n\nmodel, variables = load_pretrained("{folder}")',
    ),
    "hf": (
        "transformers",
        "from transformers import AutoModelForImageClassification\n\n"
        'model = AutoModelForImageClassification.from_pretrained("{folder}")',
    ),
    "timm": ("timm", 'import timm\n\nmodel = timm.create_model("local-dir:{folder}", pretrained=True)'),
    "sail": (
        "pytorch",
        "import torch\n\n# model: {network} of {repository}\n"
        'model.load_state_dict(torch.load("{folder}/model.pth.tar"))',
    ),
}
_UNPUBLISHED = "A MetaFormer (PoolFormer family)"
# The same for a backbone without norm and head, which two layouts have.
_LOADING_BACKBONE = {
    "jax": (
        "poolformer_jax",
        'from poolformer_jax import FlaxPoolFormerModel\n\nmodel = FlaxPoolFormerModel.from_pretrained("{folder}")',
    ),
    "hf": ("transformers", 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{folder}")'),
}


def model_card(
    folder: str,
    config: PoolFormerConfig,
    layout: str,
    metrics: Mapping[str, int | float] | None = None,
    *,
    classifier: bool = True,
    preprocessed: bool = True,
) -> str:
    """The text of the model card.

    The name of the folder is the title, and stands in the code that loads the model.
    """
    folder = printable(folder, MAX_MESSAGE)
    loading = _LOADING if classifier else _LOADING | _LOADING_BACKBONE
    unprocessed = classifier and not preprocessed and layout == "jax"
    library, code = loading["jax, without preprocessing" if unprocessed else layout]
    variant = published_variant(config)
    network = f"{'MetaFormer' if config.downsample_norm else 'PoolFormer'} {variant}" if variant else _UNPUBLISHED
    model, repository = ("a PoolFormer", "sail-sg/poolformer")
    if config.downsample_norm:
        model, repository = ("a MetaFormer", "sail-sg/metaformer, metaformer_baselines.py")
    has_labels = classifier and config.num_labels > 0
    classes = f"{config.num_labels} classes" if has_labels else "pooled features" if classifier else "feature maps"
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'image-classification' if has_labels else 'image-feature-extraction'}",
        "tags:",
        f"- {'metaformer' if config.downsample_norm else 'poolformer'}",
        *(["- jax"] if layout == "jax" else []),
        "---",
        "",
        GENERATED,
        "",
        f"# {folder}",
        "",
        f"{network}, {classes}. Blocks per stage: {', '.join(map(str, config.depths))}; channels per stage: "
        f"{', '.join(map(str, config.hidden_sizes))}.",
        "",
        f"The weights have the `{layout}` layout of poolformer-jax.",
        "",
        "```python",
        f'# "{folder}" stands for the path of this folder, or the name of its repository on the Hub: "OWNER/{folder}".',
        code.format(folder=folder, network=model, repository=repository),
        "```",
        "",
    ]
    if metrics:
        lines += [
            "| metric | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in metrics.items()),
            "",
        ]
    return "\n".join(lines)
