"""The documentation's code runs: the quick start here, every page by ``make docs``."""

import re
from pathlib import Path

import pytest

from tests import api_page, docs_run


def test_the_quick_start_runs_as_it_stands():
    docs_run.run_page(docs_run.ROOT / "docs" / "quickstart.md")


def test_blocks_are_found_with_their_files_and_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n\n`a.py`:\n\n```python\nx = 1\n```\n\nText.\n\n```\nshardplan plan a.py:f \\\n  --json  # why\nls\n```\n"
    )
    first, second = docs_run.blocks(page)
    assert (first.file, first.text, first.language) == ("a.py", "x = 1\n", "python")
    assert second.file == "" and docs_run.commands(second.text) == [["shardplan", "plan", "a.py:f", "--json"]]


def test_a_block_that_fails_names_its_place(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# T\n\n```python\nraise ValueError('no')\n```\n")
    monkeypatch.setattr(docs_run, "ROOT", tmp_path)
    with pytest.raises(ValueError) as caught:
        docs_run.run_page(page)
    assert caught.value.__notes__ == ["in the block at line 3 of page.md"]


@pytest.mark.parametrize("page", [docs_run.ROOT / "README.md", *docs_run.PAGES], ids=lambda page: page.name)
def test_every_python_block_is_python(page: Path):
    for block in docs_run.blocks(page):
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


def test_the_api_reference_is_what_the_docstrings_say():
    """After a change of a public docstring or signature: python -m tests.api_page"""
    assert api_page.PAGE.read_text() == api_page.page()


def test_every_public_name_has_a_docstring():
    import shardplan

    assert [name for name in shardplan.__all__ if not getattr(shardplan, name).__doc__] == []


def test_links_between_pages_lead_somewhere():
    for page in [docs_run.ROOT / "README.md", *(docs_run.ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
