"""The pages of the site: every public name is in the reference, and every link leads to something."""

import importlib.util
import re
from pathlib import Path

import pytest

import sinkprune as sp

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs/site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

PAGES = [path for path in site.files() if path.suffix == ".md"]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_of_a_page_leads_to_a_file_or_folder(page):
    lost = [link for link in site.links(page) if not (ROOT / page.parent / link).exists()]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_picture_and_page_that_a_page_shows_is_in_the_site(page):
    inside = {(ROOT / path).resolve() for path in site.files()}
    shown = [
        (ROOT / page.parent / link).resolve() for link in site.links(page) if link.endswith((".md", ".png"))
    ]
    assert not [path for path in shown if path not in inside]


def test_the_reference_has_every_public_name_with_its_docstring():
    named = re.findall(r"^::: (\S+)", site.reference(), re.MULTILINE)
    assert {name.rpartition(".")[2] for name in named} == set(sp.__all__) - {"__version__"}
    for name in named:
        assert (getattr(sp, name.rpartition(".")[2]).__doc__ or "").strip(), name


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("[b](b.md) [c](c.md#part) [out](https://x.y)\n```\n[d](d.md)\n```\n")
    assert site.links(Path("a.md")) == ["b.md", "c.md"]


def test_the_sources_are_written_as_they_lie_in_the_repository(tmp_path):
    settings = site.write(tmp_path)
    for path in site.files():
        assert (tmp_path / "source" / path).read_bytes() == (ROOT / path).read_bytes()
    assert "reference.md" in settings.read_text("utf-8")
