"""The docs are complete: what can be configured, refused or called stands in them, with the value the code has."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from appliance import errors
from appliance import main as daemon
from appliance.config import BackendSection, Config, parse_config
from appliance.manifest import ControlsSection, Manifest, QueuePolicySection, StateEntry
from appliance.server.status import GRPC_STATUS, HTTP_STATUS
from appliance.types import ModelState
from appliancectl.cli import cli

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "recipes/README.md"])

#: Sections of config.toml; `backends` is a table of them.
CONFIG_SECTIONS = {
    **{name: field.annotation for name, field in Config.model_fields.items() if name != "backends"},
    "backends.NAME": BackendSection,
}

#: Sections of model.toml by the words of their heading in docs/models.md.
MANIFEST_SECTIONS = {
    "Top level": Manifest,
    "[[artifacts]]": Manifest.model_fields["artifacts"],
    "[[inputs]]": Manifest.model_fields["inputs"],
    **{
        f"[{name}]": Manifest.model_fields[name]
        for name in (
            "text",
            "image",
            "classification",
            "quality",
            "batch",
            "sequence",
            "cache",
            "placement",
            "instances",
            "samples",
        )
    },
    "[batch.priority_queue_policy.N]": QueuePolicySection,
}


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """The part of a page below the heading that holds `heading`."""
    parts = [part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if heading in part.partition("\n")[0]]
    assert len(parts) == 1, f"{len(parts)} headings hold {heading!r}"
    return parts[0]


def rows(text: str) -> dict[str, list[str]]:
    """Table rows by each of the names in code style in their first cell."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            first, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            for name in re.findall(r"`([^`]+)`", first):
                found[name] = rest
    return found


def model_of(field: object) -> type[BaseModel]:
    """The section class in an annotation such as ``list[X]`` or ``X | None``."""
    if isinstance(field, type) and issubclass(field, BaseModel):
        return field
    annotation = field.annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel))


def key_names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("name", CONFIG_SECTIONS)
def test_every_configuration_key_is_documented_with_its_default(name):
    described = rows(section(page("docs/configuration.md"), f"[{name}]"))
    model = CONFIG_SECTIONS[name]
    assert set(described) == key_names(model)
    for key, value in model().model_dump(mode="json").items():
        (shown,) = re.findall(r"`([^`]+)`", described[key][0])
        assert tomllib.loads(f"x = {shown}")["x"] == value, key


def test_config_toml_holds_every_key_and_equals_the_defaults():
    text = page("config.toml")
    defaults = Config().model_dump(mode="json", exclude={"backends"})
    assert tomllib.loads(text) == defaults
    assert parse_config(text) == Config()


@pytest.mark.parametrize("heading", MANIFEST_SECTIONS)
def test_every_manifest_key_is_documented(heading):
    model = model_of(MANIFEST_SECTIONS[heading])
    keys = key_names(model)
    if model is Manifest:
        keys -= {word.strip("[]") for word in MANIFEST_SECTIONS} | {"outputs"}
    if heading == "[samples]":
        keys = keys - {"reference"} | {
            f"reference.{key}" for key in key_names(model_of(model.model_fields["reference"]))
        }
    if heading == "[sequence]":
        keys -= {"state", "controls"}
        keys |= {f"state.{key}" for key in StateEntry.model_fields}
        keys |= {f"controls.{key}" for key in ControlsSection.model_fields}
    described = set(rows(section(page("docs/models.md"), heading)))
    assert keys <= described, f"not described: {keys - described}"


def test_every_section_of_the_manifest_has_a_heading():
    sections = {name for name, field in Manifest.model_fields.items() if "Section" in str(field.annotation)}
    assert sections <= {heading.strip("[]") for heading in MANIFEST_SECTIONS}


def test_the_example_manifests_are_some():
    examples = re.findall(r"```toml\n(.*?)```", page("docs/models.md"), re.DOTALL)
    names = [Manifest.model_validate(tomllib.loads(example)).name for example in examples]
    assert names == ["digits", "running-sum"]


def test_every_error_kind_is_documented_with_its_statuses_and_whether_to_retry():
    described = rows(section(page("docs/concepts.md"), "Errors"))
    assert set(described) == set(errors.KINDS)
    for kind, error in errors.KINDS.items():
        _, grpc_name, http, retry = described[kind]
        assert grpc_name == GRPC_STATUS[kind].name
        assert http == str(HTTP_STATUS[kind])
        assert retry.startswith("yes" if error.is_retryable else "no"), kind


def test_every_model_state_is_documented():
    described = rows(section(page("docs/concepts.md"), "States of a model"))
    assert set(described) == set(ModelState)


def test_every_command_has_a_heading_in_the_cli_docs():
    headings = re.findall(r"^### `appliancectl (\S+?)[ `]", page("docs/cli.md"), re.MULTILINE)
    text = page("docs/cli.md")
    for name, command in cli.commands.items():
        assert name in headings
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        missing = {option for option in options if option not in text}
        assert not missing, f"{name}: {missing}"


def test_every_option_of_applianced_is_documented(capsys):
    with pytest.raises(SystemExit):
        daemon.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    text = section(page("docs/configuration.md"), "Command line")
    assert {option for option in options if f"`{option}" not in text} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)?(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        other = (path.parent / target) if target else path
        headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_in_the_docs_is_python(path):
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(code)


def test_make_targets_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^    |`)(?:PYTHON=\S+ )?make ([a-z]+)", text, re.MULTILINE))
        assert named <= targets, path.name


def test_the_readme_states_the_accuracy_of_the_manifests():
    described = rows(section(page("README.md"), "Sample models"))
    manifests = [tomllib.loads(path.read_text(encoding="utf-8")) for path in REPOSITORY.glob("models/*/model.toml")]
    assert set(described) == {manifest["name"] for manifest in manifests}
    for manifest in manifests:
        reference = manifest["samples"]["reference"]
        assert described[manifest["name"]][-1].rstrip(" |") == f"{reference['accuracy']:.4f} of {reference['count']}"
