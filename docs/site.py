"""The documentation as a static site: `make docs` (mkdocs, pinned in requirements-docs.txt).

Pages are those of the repository, in its own tree, so that their links hold; the reference is written from
the names that the package exports.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs/*.md",
         "sinkprune/assets/*/README.md")  # fmt: skip
PICTURES = ("docs/**/*.png", "benchmarks/results/**/*.png", "sinkprune/assets/**/*.png")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
TEMPLATE = """site_name: sinkprune
docs_dir: {source}
site_dir: {site}
use_directory_urls: false
theme: readthedocs
markdown_extensions: [tables, fenced_code, toc]
plugins:
  - search
  - mkdocstrings:
      handlers:
        python:
          paths: [{root}]
          options: {{heading_level: 2, show_root_heading: true, show_source: false, separate_signature: true,
                    show_root_full_path: false, members: true, filters: ["!^_"], docstring_style: google}}
nav:
  - README.md
  - reference.md
{nav}
"""


def files() -> list[Path]:
    """What goes into the site, relative to the repository."""
    found = {path.relative_to(ROOT) for pattern in (*PAGES, *PICTURES) for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.parts[:2] != ("docs", "site"))


def reference() -> str:
    """The page of every public name, for mkdocstrings."""
    import sinkprune as sp

    homes = sp._HOMES
    blocks = [f"::: sinkprune.{homes[name]}.{name}" for name in sorted(homes, key=str.lower)]
    return "\n\n".join(["# Reference", "Every name of `import sinkprune as sp`.", *blocks, OPS]) + "\n"


OPS = "::: sinkprune.ops\n    options:\n      members_order: source"


def links(page: Path) -> list[str]:
    """The relative links of a page, without those in code blocks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    return [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]


def write(folder: Path) -> Path:
    """The sources of the site under ``folder``; the path of mkdocs' configuration."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    for path in files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    (source / "reference.md").write_text(reference(), "utf-8")
    nav = [f"  - {path}" for path in files() if path.suffix == ".md" and str(path) != "README.md"]
    settings = folder / "mkdocs.yml"
    settings.write_text(
        TEMPLATE.format(source=source, site=folder / "html", root=ROOT, nav="\n".join(nav)), "utf-8"
    )
    return settings


if __name__ == "__main__":
    print(write(Path(sys.argv[1]).resolve()))
