"""The links and paths in the guides exist."""

import re

import pytest

from paths import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = "programs"  # docs/hooks/program_flags.py writes these pages when the site is built
PATH = re.compile(r"\b(?:poolformer_jax|train|convert|benchmarks|tests|docs)/[\w./-]*\w")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_exist(guide):
    text = guide.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        linked = guide.parent / target if target else guide
        if linked.parent.name == GENERATED:
            continue
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    for code in re.findall(r"`([^`\n]+)`", text):
        for path in PATH.findall(code):
            assert (ROOT / path).exists() or "validation" in path, path
