"""Weights of the second paper's networks: both PyTorch layouts, what no array shows, heads, and preprocessing."""

import json
import warnings

import jax
import numpy as np
import pytest

import archives
from golden import published
from network import family_weights
from poolformer_jax import (
    FlaxPoolFormerForImageClassification,
    MetaFormerConfig,
    PoolFormerImageProcessor,
    WeightsMismatch,
    from_torch_state_dict,
    load_pretrained,
    save_pretrained,
    to_torch_state_dict,
)
from poolformer_jax.images import imagenet_labels
from poolformer_jax.network import CONSTANTS, VARIANTS, MetaFormerForImageClassification
from poolformer_jax.weights import (
    class_names,
    default_image_processor,
    leaves,
    open_model,
    write_model,
    write_safetensors,
)
from poolformer_jax.weights.transfer import match_state_dict, plan_import
from saved_models import same

KINDS = ("poolformerv2", "identityformer", "randformer", "convformer", "caformer")
EACH = [(home, kind) for home in ("sail", "timm") for kind in KINDS]
ALIKE = ("poolformerv2", "identityformer")  # their arrays have the same names and shapes
HEAD_EPSILON = {"sail": 1e-5, "timm": 1e-6}


def state_dict(home, kind):
    """Of a network of one block per stage, widths 8 to 64, ten labels."""
    return published.state_dict(f"family/{home}", f"{kind}_tiny")


def config_of(home, kind, **changes):
    published_size = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
    if kind == "randformer":
        changes = {"image_size": 64, **changes}
    if kind in ("convformer", "caformer"):
        changes = {"head_norm_epsilon": HEAD_EPSILON[home], **changes}
    return MetaFormerConfig.from_variant(variant_of(kind), **{**published_size, **changes})


def variant_of(kind):
    return next(name for name in VARIANTS if name.startswith(kind))


def zeros(variant, layout):
    """The arrays of a published network without their memory."""
    config = MetaFormerConfig.from_variant(variant)
    return {leaf.name: np.broadcast_to(np.float32(0), leaf.stored_shape) for leaf in leaves(config, layout)}


def quietly(path, **options):
    """A model that is opened without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_model(path, **options)


@pytest.mark.parametrize(("home", "kind"), EACH)
def test_both_layouts_are_read_and_come_back_bit_for_bit(home, kind):
    original, expected = state_dict(home, kind), config_of(home, kind)
    config, variables = from_torch_state_dict(original, expected if kind in ALIKE else None)
    assert config == expected
    # test_family_parity.py compares what these compute with PyTorch.
    assert same(variables, family_weights.variables(home, config, np.float32))
    assert (CONSTANTS in variables) == (kind == "randformer")
    back = to_torch_state_dict(config, variables, home)
    assert list(back) == list(original)
    for name, array in original.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    other = "timm" if home == "sail" else "sail"
    there = to_torch_state_dict(config, variables, other)
    assert {name: array.shape for name, array in there.items()} == published.shapes(f"family/{other}", f"{kind}_tiny")
    _, again = from_torch_state_dict(there, config)
    assert same(again, variables)


@pytest.mark.parametrize("listing", sorted((published.FOLDER / "family").glob("*_s1[28].json")), ids=lambda p: p.stem)
def test_layout_and_network_are_inferred_from_names_and_shapes(listing):
    home, variant = listing.stem.split("_", 1)
    shapes = published.shapes(f"family/{home}", variant)
    named = {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}
    plan = plan_import(match_state_dict(named))
    # Both have the same arrays; the tests below ask which it is.
    assert (plan.layout, plan.variant) == (home, variant.replace("identityformer", "poolformerv2"))


@pytest.mark.parametrize("place", ["file", "folder", "arch", "timm's config.json"])
@pytest.mark.parametrize(("home", "kind"), [("timm", "poolformerv2"), ("sail", "identityformer")])
def test_a_published_name_says_whether_the_network_pools(tmp_path, home, kind, place):
    name = f"{kind}_s12"
    path = {"file": tmp_path / f"{name}.pth", "folder": tmp_path / name / "best.pth"}.get(place, tmp_path / "a.pth")
    path.parent.mkdir(exist_ok=True)
    archives.checkpoint(path, {"arch": name if place == "arch" else None, "state_dict": state_dict(home, kind)})
    if place == "timm's config.json":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 10}))
    assert quietly(path).config == config_of(home, kind)
    assert quietly(path, config=config_of(home, kind)).config == config_of(home, kind)


@pytest.mark.parametrize("home", ["timm", "sail"])
def test_without_a_name_the_network_is_asked_for(tmp_path, home):
    path = archives.checkpoint(tmp_path / "best.pth", {"state_dict": state_dict(home, "poolformerv2")})
    with pytest.raises(ValueError, match=r"PoolFormerV2 and IdentityFormer .*best\.pth says which .*config=Meta"):
        open_model(path)
    with pytest.raises(ValueError, match=r"variant='poolformerv2_s12' or variant='identityformer_s12' \(--var"):
        from_torch_state_dict(zeros("identityformer_s12", home))


def test_a_name_does_not_contradict_arrays_that_show_the_mixers(tmp_path):
    path = archives.checkpoint(tmp_path / "student-of-poolformerv2_s12.pth", state_dict("timm", "caformer"))
    assert quietly(path).config == config_of("timm", "caformer")


def test_the_epsilon_of_an_mlp_head_is_the_layouts_or_of_timms_config_or_asked_for(tmp_path):
    original = state_dict("sail", "caformer")
    path = archives.checkpoint(tmp_path / "caformer_s18.pth", original)
    assert quietly(path).config.head_norm_epsilon == 1e-5
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "caformer_s18"}))
    assert quietly(path).config.head_norm_epsilon == 1e-6
    ours = to_torch_state_dict(*from_torch_state_dict(original), "jax")
    with pytest.raises(ValueError, match=r"no array shows the epsilon .* 1e-5 in the authors' code, 1e-6 in timm"):
        from_torch_state_dict(ours)
    assert from_torch_state_dict(ours, config_of("sail", "caformer"))[0].head_norm_epsilon == 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["timm_model.", "module."])
def test_a_folder_of_transformers_timm_wrapper_is_read(tmp_path, kind, prefix):
    original = state_dict("timm", kind)
    names = [(prefix + name, array.shape) for name, array in original.items()]
    write_safetensors(tmp_path / "model.safetensors", names, original.values(), {"format": "pt"})
    config = {
        "architecture": variant_of(kind),
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "label_names": [f"label {index}" for index in range(10)],
        "problem_type": "multi_label_classification",
        "pretrained_cfg": {"classifier": "head.fc", "num_classes": 10},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = quietly(tmp_path).config
    assert found.id2label == {index: f"label {index}" for index in range(10)}
    names = {"id2label": found.id2label, "problem_type": "multi_label_classification"}
    assert found == config_of("timm", kind, **names)


@pytest.mark.parametrize(("home", "norm"), [("timm", "head.norm."), ("sail", "norm.")])
def test_a_network_without_classes_keeps_its_final_norm(home, norm):
    head = "head.fc." if home == "timm" else "head."
    original = {name: array for name, array in state_dict(home, "caformer").items() if not name.startswith(head)}
    config, variables = from_torch_state_dict(original)
    assert config.num_labels == 0 and config.head == "mlp"
    np.testing.assert_array_equal(variables["params"]["norm"]["bias"], original[f"{norm}bias"])


@pytest.mark.parametrize("home", ["sail", "timm"])
def test_a_new_head_keeps_the_hidden_layer_of_an_mlp_head(tmp_path, home):
    path = archives.checkpoint(tmp_path / "caformer_s18.pth", state_dict(home, "caformer"))
    _, before = load_pretrained(path)
    model, after = load_pretrained(path, num_labels=3, reset_head=True)
    assert model.config == config_of(home, "caformer", num_labels=3)
    last = after["params"]["head"].pop("fc2")
    assert last["kernel"].shape == (256, 3) and 0.01 < float(last["kernel"].std()) < 0.03
    del before["params"]["head"]["fc2"]
    assert same(after, before)


def test_a_linear_head_in_place_of_the_mlp_head_is_read():
    original = {name: array for name, array in state_dict("timm", "caformer").items() if not name.startswith("head.fc")}
    linear = {"head.fc.weight": np.ones((4, 64), np.float32), "head.fc.bias": np.zeros(4, np.float32)}
    config, _ = from_torch_state_dict({**original, **linear})
    assert (config.head, config.num_labels, config.head_order) == ("linear", 4, "pool_norm")


@pytest.mark.parametrize("home", ["sail", "timm"])
def test_a_head_of_another_kind_is_named_and_can_be_left_out(tmp_path, home):
    final = "head.norm." if home == "timm" else "norm."
    original = {
        name: array
        for name, array in state_dict(home, "caformer").items()
        if not name.startswith("head.") or name.startswith(final)
    }
    decoder = {"head.decoder.embed_fc.weight": np.zeros((3, 64), np.float32)}
    wrapped = {f"module.{name}": array for name, array in {**original, **decoder}.items()}
    path = archives.checkpoint(tmp_path / "ml_caformer.pth", wrapped)
    pattern = "module.head.decoder.*" if home == "timm" else "module.head.*"
    with pytest.raises(ValueError, match="head with ML-Decoder") as raised:
        open_model(path)
    assert "head.decoder.embed_fc.weight [3, 64]" in str(raised.value)
    assert f"ignore=['{pattern}'] (--ignore '{pattern}')" in str(raised.value)
    model, variables = load_pretrained(path, ignore=[pattern], num_labels=5, reset_head=True)
    assert model.config == config_of(home, "caformer", num_labels=5)
    np.testing.assert_array_equal(variables["params"]["norm"]["bias"], original[f"{final}bias"])


def test_a_checkpoint_for_imagenet_21k_has_its_classes_without_names():
    listing = published.shapes("family/timm", "caformer_s18")
    listing |= {"head.fc.fc2.weight": (21841, 2048), "head.fc.fc2.bias": (21841,)}
    arrays = {name: np.broadcast_to(np.float16(0), shape) for name, shape in listing.items()}
    plan = plan_import(match_state_dict(arrays))
    assert (plan.variant, plan.config.num_labels) == ("caformer_s18", 21841)
    assert class_names(plan.config)[21840] == "class 21840"


def test_the_interface_of_transformers_refuses_matrices_that_are_not_trained(tmp_path):
    path = archives.checkpoint(tmp_path / "randformer_s12.pth", state_dict("sail", "randformer"))
    with pytest.raises(ValueError, match=r"holds trained parameters only.*\(RandFormer\)\. .*load_pretrained returns"):
        FlaxPoolFormerForImageClassification.from_pretrained(path)


def processor_of(side):
    return PoolFormerImageProcessor(
        crop_pct=1.0, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("caformer_s18.pth", 224),
        ("caformer_s18_384.pth", 384),
        ("caformer_s18_384_in21ft1k.pth", 384),
        ("caformer_s18.sail_in22k_ft_in1k_384", 384),
        ("caformer_s18.sail_in22k", 224),
    ],
)
def test_the_preprocessing_is_that_of_the_published_checkpoint(name, side):
    for labels in (1000, 21841):
        config = MetaFormerConfig.from_variant("caformer_s18", num_labels=labels)
        assert default_image_processor(config, ["best.pth", name]) == processor_of(side)


def test_a_published_files_name_gives_its_preprocessing_and_its_classes(tmp_path):
    arrays = {key: np.zeros(array.shape, np.float16) for key, array in zeros("caformer_s18", "sail").items()}
    opened = quietly(archives.checkpoint(tmp_path / "caformer_s18_384_in21ft1k.pth", arrays))
    assert opened.image_processor == processor_of(384)
    assert opened.labels == imagenet_labels()


@pytest.mark.parametrize("layout", ["sail", "jax"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_network_is_loaded_bit_for_bit(tmp_path, kind, layout):
    config = config_of("sail", kind)
    _, variables = from_torch_state_dict(state_dict("sail", kind), config)
    save_pretrained(tmp_path / "model", MetaFormerForImageClassification(config), variables, layout)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("metaformer", ["MetaFormerForImageClassification"])
    model, again = load_pretrained(tmp_path / "model")
    assert model.config == config and same(again, jax.tree.map(np.asarray, variables))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- metaformer" in card and ("sail-sg/metaformer" in card) == (layout == "sail")


@pytest.mark.parametrize(("variant", "classifier"), [("poolformerv2_s12", "head.fc"), ("caformer_s18", "head.fc.fc2")])
def test_a_folder_for_timm_has_timms_config_and_is_read_again(tmp_path, variant, classifier):
    changes = {"head_norm_epsilon": 1e-6} if variant == "caformer_s18" else {}
    config = MetaFormerConfig.from_variant(variant, num_labels=3, **changes)
    arrays = (np.zeros(leaf.stored_shape, np.float32) for leaf in leaves(config, "timm"))
    write_model(tmp_path / "model", config, "timm", arrays)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["architecture"], written["num_classes"]) == (variant, 3)
    cfg = written["pretrained_cfg"]
    assert (cfg["classifier"], cfg["crop_pct"], cfg["input_size"], cfg["first_conv"]) == (
        classifier,
        1.0,
        [3, 224, 224],
        "stem.conv",
    )
    opened = quietly(tmp_path / "model")
    assert opened.config == config and opened.plan.layout == "timm"


def test_another_epsilon_in_the_library_of_the_layout_is_a_warning(tmp_path):
    config = config_of("timm", "caformer")
    _, variables = from_torch_state_dict(state_dict("timm", "caformer"))
    with pytest.warns(UserWarning, match="head_norm_epsilon=1e-06, and the model of sail computes 1e-05"):
        save_pretrained(tmp_path / "model", MetaFormerForImageClassification(config), variables, "sail")
    assert load_pretrained(tmp_path / "model")[0].config.head_norm_epsilon == 1e-5


@pytest.mark.parametrize(
    ("layout", "variant", "changes", "message"),
    [
        ("hf", "caformer_s18", {}, "'hf' has no name for stem/norm/scale, .* has: 'sail', 'timm', 'jax'"),
        (
            "timm",
            "identityformer_s12",
            {},
            r"timm\.create_model has no network .*'identity'.* poolformerv2_s12, .*'sail'",
        ),
        (
            "timm",
            "caformer_s18",
            {"depths": (1, 1, 1, 1)},
            r"timm\.create_model has no network of depths \(1, 1, 1, 1\)",
        ),
        (
            "sail",
            "caformer_s18",
            {"norm_epsilon": 1e-5},
            "sail cannot compute a network with norm_epsilon=1e-05.*1e-06",
        ),
    ],
)
def test_a_network_is_not_saved_for_a_library_that_lacks_it(tmp_path, layout, variant, changes, message):
    config = MetaFormerConfig.from_variant(variant, **changes)
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "model", config, layout, ())
    assert not list(tmp_path.iterdir())


# A random matrix that is lost leaves no trace of the mixer. The largest networks take seconds.
DAMAGED = [
    pytest.param(home, kind, marks=() if (home, kind) == ("timm", "poolformerv2") else pytest.mark.slow)
    for home, kind in EACH
    if kind != "randformer"
]


@pytest.mark.parametrize(("home", "kind"), DAMAGED)
def test_the_network_is_inferred_in_spite_of_one_damaged_array(home, kind):
    whole = state_dict(home, kind)
    for name, array in whole.items():
        with pytest.raises(WeightsMismatch) as raised:
            plan_import(match_state_dict({other: whole[other] for other in whole if other != name}))
        assert raised.value.missing == {name: array.shape} and not raised.value.unexpected
        with pytest.raises(WeightsMismatch) as raised:
            plan_import(match_state_dict(whole | {name: np.zeros((11, 13, 1), np.float32)}))
        assert raised.value.misshaped == {name: ((11, 13, 1), array.shape)}
