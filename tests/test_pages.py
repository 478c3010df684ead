"""Pages: short lines, links that lead somewhere, and names of files, classes and tables that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from swarm.cli import main
from swarm.store.sql.schema import metadata

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@page
def test_no_line_is_longer_than_120_characters(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not {number: len(line) for number, line in enumerate(lines, 1) if len(line) > 120}


@page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@page
def test_every_path_that_is_named_exists(page: Path) -> None:
    paths = re.findall(r"(?<![\w./-])(?:src/swarm|tests|tools|docs)/[\w./-]*\w", page.read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()]


@page
def test_every_command_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^\$ |^|`)swarm ([a-z]+(?: [a-z]+\b(?!=))?)", text, re.MULTILINE))
    assert not {words for words in named if not _is_command(words)}


def _is_command(words: str) -> bool:
    first, _, second = words.partition(" ")
    groups = {str(app.info.name): app for one in main.app.registered_groups if (app := one.typer_instance)}
    return (not second or second in _commands(groups[first])) if first in groups else first in _commands(main.app)


def _commands(app: typer.Typer) -> set[str]:
    return {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if page != DOCS / "README.md"]
    assert not [page for page in pages if f"]({page})" not in index]


def test_the_glossary_names_classes_and_tables_that_exist() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`\s+in\s+`(src/swarm/[\w/]+\.py)`", text)
    assert len(named) >= 40
    assert not [name for name, file in named if not re.search(rf"^(class|def) {name}\b", _source(file), re.MULTILINE)]
    tables = {
        name for line in re.findall(r"[Tt]ables? ((?:`\w+`(?: and )?)+)", text) for name in re.findall(r"\w+", line)
    }
    assert tables - {"and"} == set(metadata.tables) - {"clock"}


def _source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")
