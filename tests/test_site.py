"""The documentation as a site: it builds, without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip('the site needs mkdocs, its theme and mkdocstrings: pip install --editable ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    # Strict: a link or an anchor that leads nowhere, or a page that is in no menu, is an error.
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_menu_once(site: Path) -> None:
    menu = re.findall(r"^\s+- .+?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in menu) == [page for page in pages.PAGES if page.startswith("docs/")]
    for page in menu:
        assert (site / ("index.html" if page == "index.md" else page.removesuffix(".md") + "/index.html")).is_file()


def test_a_page_asks_nobody_else_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not loaded, f"{page.relative_to(site)} loads {loaded[0]}"


def test_formulas_reach_the_page_as_formulas(site: Path) -> None:
    text = (site / "method/index.html").read_text()
    assert len(re.findall(r'class="arithmatex"', text)) > 50
    assert "<p>```math" not in text


def test_lines_of_code_fit_a_screen_of_1280_pixels() -> None:
    """So they do up to 124 characters, measured in a browser with docs/stylesheets/extra.css."""
    for block in pages.blocks():
        if block.page.startswith("docs/") and block.language != "math":
            assert max(map(len, block.code.splitlines())) <= 124, block.place
