"""Marks the translated pages with the hash of the English page each translates: run it after translating anew.

python docs/hooks/mark_translation.py
"""

import hashlib
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent
PAGES = (DOCS / "zh" / "index.md",)


def marked(page: Path) -> str:
    """The text of a translated page, with the present hash of the page that its front matter names."""
    text = page.read_text("utf-8")
    original = re.search(r"^translates: (.+)$", text, re.MULTILINE)
    if original is None:
        raise ValueError(f"{page} names no page that it translates. Expected 'translates: PAGE' in its front matter.")
    digest = hashlib.sha256((DOCS / original[1]).read_bytes()).hexdigest()
    return re.sub(r"^sha256: .*$", f"sha256: {digest}", text, count=1, flags=re.MULTILINE)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(marked(page), "utf-8")
