"""The documentation site: every public name and page is there, every example is true, no translation is stale."""

import doctest
import json
import re
import runpy
import shutil
import tomllib

import pytest

import poolformer_jax
from paths import ROOT
from poolformer_jax import PoolFormerConfig, cli, save_pretrained
from small_networks import IMAGES, MODEL, PROCESSOR, VARIABLES, random_variables

DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
CONFIGURATION = (ROOT / "mkdocs.yml").read_text("utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the examples name. A folder takes precedence over a name on the Hub, so nothing is downloaded."""
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=4)
    save_pretrained(tmp_path / "model", *random_variables(config), image_processor=PROCESSOR)
    save_pretrained(tmp_path / "sail/poolformer_s12", MODEL, VARIABLES, image_processor=PROCESSOR)
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(IMAGES / name, tmp_path)
    shutil.copy(IMAGES / "chelsea.jpg", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", poolformer_jax.__all__)
def test_every_public_name_has_a_reference_entry_and_an_example(name):
    text = "\n".join(page.read_text("utf-8") for page in REFERENCE)
    examples = "\n".join(block for page in REFERENCE for block in blocks(page, "pycon"))
    assert re.search(rf"^(::: poolformer_jax\.|## ){name}$", text, re.MULTILINE), (
        f"add '::: poolformer_jax.{name}' to a page of docs/reference"
    )
    assert re.search(rf"\b{name}\b", examples), f"add a '>>>' example of {name} to a page of docs/reference"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in ("models", "inference"))) for page in REFERENCE],
    ids=[page.stem for page in REFERENCE],
)
def test_the_examples_of_the_reference_are_true(page):
    source = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["index.md", "migration.md", pytest.param("zh/index.md", marks=pytest.mark.slow)])
def test_the_programs_on_the_page_run(name, capsys):
    for block in blocks(DOCS / name, "python"):
        exec(block, {})
        assert re.search("^label [0-6]", capsys.readouterr().out)


def test_every_page_is_in_the_navigation():
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    missing = [name for page in pages if (name := page.relative_to(DOCS).as_posix()) not in CONFIGURATION]
    assert not missing, f"add {missing} to nav in mkdocs.yml"


def test_the_package_index_shows_no_link_that_needs_the_repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    text = (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in text
    for substitution in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert set(re.findall(r"\]\((\w+:)?", text)) == {"https:"}


def test_no_translation_is_older_than_its_original():
    script = runpy.run_path(str(DOCS / "hooks" / "mark_translation.py"))
    for page in script["PAGES"]:
        assert page.read_text("utf-8") == script["marked"](page), (
            f"its English page has changed: translate the change in {page}, then run "
            "python docs/hooks/mark_translation.py"
        )


def test_the_tables_of_the_published_networks_are_those_of_the_program(capsys):
    cli.main(["list"])
    counted = dict(re.findall(r"^([sm]\d\d) +(.+)  [\d-]+$", capsys.readouterr().out, re.MULTILINE))
    for page in (DOCS / "index.md", DOCS / "zh" / "index.md"):
        rows = re.findall(
            r"^\| ([sm]\d\d) \| (.+) \| (.+) \| (.+) \| (.+) \| (.+) \|.*\|$", page.read_text("utf-8"), re.M
        )
        assert [variant for variant, *_ in rows] == list(counted)
        for variant, depths, channels, *figures in rows:
            config = PoolFormerConfig.from_variant(variant)
            assert depths == ", ".join(map(str, config.depths))
            assert channels == ", ".join(map(str, config.hidden_sizes))
            parameters, macs, top_1, *_ = re.split(" {2,}", counted[variant])
            assert figures == [parameters, macs, f"{top_1} %"]


def test_notebooks_are_stored_without_results():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, f"clear the outputs of {path}"


def test_every_program_has_a_page_of_flags():
    hook = runpy.run_path(str(DOCS / "hooks" / "program_flags.py"))
    pages = {program.name: hook["page"](program) for program in hook["programs"]()}
    assert re.findall(r"programs/(\w+)\.md", CONFIGURATION) == list(pages)
    for name, flags in {
        "poolformer_jax": ["--top-k", "--weights", "--port"],
        "train": ["--optimizer.learning-rate", "--model.source", "--data.source", "--on-bad-image"],
        "convert": ["--to", "--verify", "--revision"],
        "benchmarks": ["--json", "--rounds"],
    }.items():
        assert not [flag for flag in flags if f"{flag} " not in pages[name]]
        assert "╭" not in pages[name]
