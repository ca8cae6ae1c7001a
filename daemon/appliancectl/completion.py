"""``appliancectl completion``, and the names that completion offers."""

from contextlib import suppress
from urllib.parse import quote

import click

from appliance_client.errors import ApplianceError
from appliancectl.target import Target

SHELLS = ("bash", "zsh", "fish")

_COMPLETE_SECONDS = 0.5


def complete_model(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of models that begin with `incomplete`; none where the daemon does not answer at once."""
    target = Target(context.params.get("socket_dir"), wants_json=True)
    with suppress(ApplianceError):
        answer = target.admin(_COMPLETE_SECONDS).get("/admin/models")
        return [model["name"] for model in answer["models"] if model["name"].startswith(incomplete)]
    return []


def complete_variant(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of the candidates of the model named before."""
    target = Target(context.params.get("socket_dir"), wants_json=True)
    with suppress(ApplianceError):
        answer = target.admin(_COMPLETE_SECONDS).get(f"/admin/models/{quote(context.params['name'], safe='')}/explain")
        return [one["name"] for one in answer["candidates"] if one["name"].startswith(incomplete)]
    return []


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell, to be read by its start-up file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"cannot complete for {shell}")
    root = context.find_root().command
    click.echo(kind(root, {}, "appliancectl", "_APPLIANCECTL_COMPLETE").source())
