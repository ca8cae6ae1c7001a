"""requirements.lock: complete, hashed, and bound to no package index."""

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LOCK = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")


def entries() -> dict[str, str]:
    """Each package's lines, by name."""
    return {block.partition("==")[0]: block for block in re.split(r"\n(?=[a-z0-9])", LOCK) if "==" in block}


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_pinned_with_hashes():
    assert len(entries()) > 40
    for name, block in entries().items():
        assert re.search(r"^\S+==\S+", block), name
        assert "--hash=sha256:" in block, name


def test_no_index_and_no_address_is_named():
    assert not re.search(r"https?:|--index|--extra-index|--find-links|file:", LOCK)


def test_what_the_project_asks_for_is_locked():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {normalised(requirement) for requirement in project["dependencies"]}
    asked |= {normalised(each) for extra in project["optional-dependencies"].values() for each in extra}
    asked.discard(project["name"])  # an extra that takes in another
    assert asked <= set(entries())
