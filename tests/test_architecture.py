"""Which subpackage may import which, what needs jax, and what the wheel contains."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import poolformer_jax
from paths import ROOT

# The subpackages of the library, lowest layer first. They import only from lower layers.
LAYERS = [
    {"messages", "errors", "fields", "files", "process", "resources", "hub", "compilation", "version"},
    {"network", "images"},
    {"weights"},
    {"inference"},
    {"export"},
    {"cli"},
]
# Packages inside a subpackage that other subpackages may import.
NESTED = {"poolformer_jax.network.fused"}
BASE = LAYERS[0]  # single files, which may import each other
# A program imports the library, and the programs named here.
PROGRAMS = {"train": (), "convert": (), "benchmarks": ("train", "convert")}
# Inside a subpackage: a folder or file, and the files of the subpackage that it does not import.
INSIDE = {
    "poolformer_jax/network/fused": ("poolformer_jax.network.config", "poolformer_jax.network.model"),
}
# Importing these does not import jax: data workers and tools for files start fast and stay small.
WITHOUT_JAX = (
    *(f"poolformer_jax.{name}" for name in sorted(BASE - {"compilation"})),
    "poolformer_jax.images",
    "poolformer_jax.images.processor",
    "poolformer_jax.images.reading",
    "poolformer_jax.network.config",
    "poolformer_jax.network.parameters",
    "poolformer_jax.network.variants",
    "train.data",
    "train.data.prepare",
)
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
# The import names of what `pip install poolformer-jax` installs. Flax brings its own dependencies.
CORE = {"poolformer_jax", "PIL", *(line.split(">=")[0].replace("-", "_") for line in DEPENDENCIES)} - {"pillow"}


def sources(package):
    files = sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / package]
    assert files, f"{package} has no source"
    return files


@cache
def imports(file, at_module_level=False):
    """The absolute names of the modules that a file imports; optionally without those that functions import."""
    found, nodes = set(), [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: expected absolute imports"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if is_module(submodule) else node.module)
        elif not (at_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def subpackage_of(module):
    return module.split(".")[1]


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=lambda layer: "+".join(sorted(LAYERS[layer])))
def test_a_layer_imports_only_lower_layers(layer):
    allowed = set().union(*LAYERS[:layer]) | (BASE if layer == 0 else set())
    for subpackage in LAYERS[layer]:
        place = f"poolformer_jax/{subpackage}" if subpackage not in BASE else f"poolformer_jax/{subpackage}.py"
        for file in sources(place):
            for module in imports(file):
                if module.startswith("poolformer_jax"):
                    assert module != "poolformer_jax", f"{file} imports the package itself"
                    assert subpackage_of(module) in allowed | {subpackage}, f"{file} imports {module}"


def test_every_subpackage_is_in_a_layer():
    files = (file.relative_to(ROOT / "poolformer_jax") for file in sources("poolformer_jax"))
    found = {Path(file.parts[0]).stem for file in files if not file.parts[0].startswith("__")}
    assert found == set().union(*LAYERS)


@pytest.mark.parametrize("package", ["poolformer_jax", *PROGRAMS])
def test_subpackages_are_imported_and_not_the_files_inside_them(package):
    """The `__init__` of a subpackage names what others may use."""
    for file in sources(package):
        for module in imports(file):
            if module.startswith("poolformer_jax.") and not same_subpackage(file, module):
                assert module.count(".") == 1 or module in NESTED, f"{file} imports {module}, not its subpackage"


def same_subpackage(file, module):
    own = name_of(file).split(".")
    return own[0] == "poolformer_jax" and (len(own) == 1 or own[1] == subpackage_of(module))


@pytest.mark.parametrize("package", ["poolformer_jax", *PROGRAMS])
def test_there_are_no_circular_imports(package):
    graph = {name_of(file): imports(file) & names_in(package) for file in sources(package)}
    # An `__init__` imports lazily; its imports for type checkers do not run.
    graph = {name: modules for name, modules in graph.items() if not is_init(name)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


def names_in(package):
    return {name_of(file) for file in sources(package)}


def is_init(name):
    return ROOT.joinpath(*name.split("."), "__init__.py").is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_the_library_and_not_each_other(program):
    others = set(PROGRAMS) - {program, *PROGRAMS[program]}
    for file in sources(program):
        assert not {name.split(".")[0] for name in imports(file)} & others, file


def test_the_library_imports_no_program():
    for file in sources("poolformer_jax"):
        assert not {name.split(".")[0] for name in imports(file)} & set(PROGRAMS), file


@pytest.mark.parametrize("place", INSIDE)
def test_lower_modules_of_a_subpackage_do_not_import_upper_ones(place):
    for file in sources(place):
        assert not imports(file) & set(INSIDE[place]), file


@pytest.mark.parametrize("subpackage", ["network", "images", "inference", "export"])
def test_only_weights_imports_pytorch(subpackage):
    for file in sources(f"poolformer_jax/{subpackage}"):
        if file.name == "batch_feature.py":  # return_tensors="pt", on request
            continue
        assert "torch" not in {name.split(".")[0] for name in imports(file)}, file


def test_the_core_needs_its_dependencies_and_nothing_else():
    standard_library = set(sys.stdlib_module_names)
    for file in sources("poolformer_jax"):
        needed = {name.split(".")[0] for name in imports(file, at_module_level=True)}
        assert needed <= CORE | standard_library, f"{file} needs {needed - CORE - standard_library}"


def test_there_is_no_utils_module():
    assert not [file for package in ("poolformer_jax", *PROGRAMS) for file in sources(package) if "utils" in file.name]


def test_every_public_name_is_there_and_has_a_docstring():
    assert set(poolformer_jax.__all__) <= set(dir(poolformer_jax))
    for name in poolformer_jax.__all__:
        assert getattr(poolformer_jax, name).__doc__, name
    with pytest.raises(AttributeError, match=r"PoolFormer$"):
        _ = poolformer_jax.PoolFormer


def raised(thing):
    """The errors that docstrings of a public name, and of its methods, say to be raised."""
    members = vars(thing).values() if isinstance(thing, type) else ()
    for text in filter(None, map(inspect.getdoc, (thing, *members))):
        _, _, listed = text.partition("\nRaises:\n")
        yield from re.findall(r"^ {4}(\w+):", listed.partition("\n\n")[0], re.MULTILINE)


def test_what_public_names_raise_is_public_too():
    public = set(poolformer_jax.__all__)
    for name in public:
        assert {error for error in raised(getattr(poolformer_jax, name)) if not hasattr(builtins, error)} <= public
    assert "WeightsFileError" in public  # load_pretrained documents it as a ValueError


def test_what_the_inference_guide_teaches_is_public():
    assert {"GradCam", "HeightShardedModel", "export_model"} <= set(poolformer_jax.__all__)


def test_what_needs_no_jax_does_not_import_it():
    code = (
        f"import importlib, sys\nfor name in {WITHOUT_JAX}: importlib.import_module(name)\nprint('jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_model_without_kernels_does_not_import_pallas():
    code = "import sys; from poolformer_jax import ImageClassifier; print('jax.experimental.pallas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"poolformer_jax", f"poolformer_jax-{poolformer_jax.__version__}.dist-info"}
    in_tree = {str(file.relative_to(ROOT)) for file in (ROOT / "poolformer_jax").rglob("*") if file.suffix != ".pyc"}
    tracked = {name for name in in_tree if (ROOT / name).is_file()}
    assert tracked <= set(names)
