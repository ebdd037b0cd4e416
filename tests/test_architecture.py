"""The house rules: which way imports run, what the core may need, and that the wheel is the library alone."""

import ast
import builtins
import inspect
import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import poolformer_jax
from paths import ROOT

PROGRAMS = ("train", "convert", "benchmarks")
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
# What `pip install poolformer-jax` brings, as import names. Flax's own needs come with Flax.
CORE = {"poolformer_jax", "PIL", *(line.split(">=")[0] for line in DEPENDENCIES)} - {"pillow"}


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no source"
    return files


def imports(file, *, at_module_level=False):
    """The modules that a file imports; at_module_level leaves out what functions import when they are called."""
    nodes = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: house style is absolute imports"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))


def test_the_library_imports_no_program():
    for file in sources("poolformer_jax"):
        assert not {name.split(".")[0] for name in imports(file)} & set(PROGRAMS), file


@pytest.mark.parametrize("program", ["train", "convert"])
def test_programs_do_not_import_each_other(program):
    # `benchmarks` is the exception: it measures the others, and would otherwise measure a copy.
    for file in sources(program):
        assert not {name.split(".")[0] for name in imports(file)} & (set(PROGRAMS) - {program}), file


def test_the_core_needs_its_dependencies_and_nothing_else():
    standard_library = set(sys.stdlib_module_names)
    for file in sources("poolformer_jax"):
        needed = {name.split(".")[0] for name in imports(file, at_module_level=True)}
        assert needed <= CORE | standard_library, f"{file} needs {needed - CORE - standard_library}"


def test_there_is_no_drawer_for_everything():
    assert not [file for package in ("poolformer_jax", *PROGRAMS) for file in sources(package) if "utils" in file.name]


def test_every_public_name_is_there_and_has_a_docstring():
    assert set(poolformer_jax.__all__) <= set(dir(poolformer_jax))
    for name in poolformer_jax.__all__:
        assert getattr(poolformer_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'PoolFormer'"):
        _ = poolformer_jax.PoolFormer


def raised(thing):
    """The errors that docstrings of a public name, and of its methods, say to be raised."""
    members = vars(thing).values() if isinstance(thing, type) else ()
    for text in filter(None, map(inspect.getdoc, (thing, *members))):
        _, _, told = text.partition("\nRaises:\n")
        yield from re.findall(r"^ {4}(\w+):", told.partition("\n\n")[0], re.MULTILINE)


def test_what_public_names_raise_is_public_too():
    public = set(poolformer_jax.__all__)
    for name in public:
        assert {error for error in raised(getattr(poolformer_jax, name)) if not hasattr(builtins, error)} <= public
    assert "WeightsFileError" in public  # a ValueError, as which load_pretrained tells of it


def test_what_the_inference_guide_teaches_is_public():
    assert {"GradCam", "HeightShardedModel", "export_model"} <= set(poolformer_jax.__all__)


def test_the_image_processor_comes_without_jax():
    code = "import sys; from poolformer_jax import PoolFormerImageProcessor; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_model_without_kernels_comes_without_pallas():
    code = "import sys; from poolformer_jax import ImageClassifier; print('jax.experimental.pallas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


FORWARD = """
import json, sys
import jax, numpy, poolformer_jax
config = poolformer_jax.PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 8, 8), num_labels=3)
model = poolformer_jax.PoolFormerForImageClassification(config)
variables = jax.jit(model.init)(jax.random.key(0), numpy.zeros((1, 32, 32, 3)))
logits = model.apply(variables, numpy.ones((2, 32, 32, 3), "float32")).logits
print(json.dumps({"file": poolformer_jax.__file__, "shape": logits.shape, "path": sys.path}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"poolformer_jax", f"poolformer_jax-{poolformer_jax.__version__}.dist-info"}
    in_tree = {str(file.relative_to(ROOT)) for file in (ROOT / "poolformer_jax").rglob("*") if file.suffix != ".pyc"}
    tracked = {name for name in in_tree if (ROOT / name).is_file()}
    assert tracked <= set(names)


def test_the_wheel_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """A new environment outside the checkout gets the wheel; jax and the other core needs are lent by this one.

    Without the network nothing can be installed from an index: `.ci/run` does that, with every dependency.
    """
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    lent = [folder for folder in sys.path if folder.endswith("site-packages")]
    # A plain line in a .pth file lends the folder without running its own .pth files, such as the editable checkout's.
    (site / "lent.pth").write_text("\n".join(lent))
    run = subprocess.run([python, "-I", "-c", FORWARD], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert Path(result["file"]).is_relative_to(tmp_path)
    assert str(ROOT) not in result["path"]
    assert result["shape"] == [2, 3]
