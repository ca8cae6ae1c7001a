"""``appliancectl models``, ``load`` and ``unload``."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import click

from appliancectl.completion import complete_model
from appliancectl.output import print_json, print_pairs, print_table, size, spinner
from appliancectl.target import Target, common_options

_ANSWER_SECONDS = 10.0


def print_models(models: Sequence[dict[str, Any]]) -> None:
    """Models as a table, with the reason below for each that has one."""
    print_table(
        ("model", ">version", "state", "backend", "device", "precision", ">memory", ">queued", ">running"),
        [
            (
                model["name"],
                model["version"] or "-",
                model["state"],
                model["backend"] or "-",
                model["device"] or "-",
                model["precision"] or "-",
                size(model["resident_bytes"]) if model["resident_bytes"] else "-",
                str(model["queued"]),
                str(model["running"]),
            )
            for model in models
        ],
        "the repository has no models",
    )
    for model in models:
        if model["reason"]:
            click.echo(f"{model['name']}: {model['reason']}")
        if model["fallback"]:
            click.echo(f"{model['name']} runs on {model['device']} as a fallback: {model['fallback']}")


def print_model(model: dict[str, Any]) -> None:
    """Everything about one model."""
    batch = f"up to {model['max_batch_size']} rows" if model["max_batch_size"] else "none"
    if model["streams"] > 1:
        batch = f"{batch}, {model['streams']} at a time"
    pairs = [
        ("model", model["name"]),
        ("version", model["version"] or "-"),
        ("state", model["state"]),
        ("reason", model["reason"]),
        ("task", model["task"]),
        ("backend", model["backend"]),
        ("variant", f"{model['variant']} ({model['chosen_by']})" if model["variant"] else ""),
        ("device", model["device"]),
        ("fallback", model["fallback"]),
        ("precision", model["precision"]),
        ("executed by", model["provider"]),
        ("runtime", model["runtime"]),
        ("batches", batch),
        ("worker", f"pid {model['pid']}, {size(model['resident_bytes'])}" if model["pid"] else ""),
        ("restarts", str(model["restarts"])),
        ("loaded in", f"{model['load_ms']:.0f} ms" if model["load_ms"] else ""),
        ("requests", f"{model['queued']} waiting, {model['running']} running"),
        ("cache", _cache_words(model["cache"]) if model.get("cache") else ""),
    ]
    print_pairs([(name, value) for name, value in pairs if value])


def _cache_words(cache: dict[str, Any]) -> str:
    answers = "1 answer" if cache["answers"] == 1 else f"{cache['answers']} answers"
    return f"{answers}, {size(cache['nbytes'])}, {cache['hit_rate']:.0%} of requests spared a run"


def _path(name: str) -> str:
    return quote(name, safe="")


@click.command()
@click.argument("name", required=False, shell_complete=complete_model)
@common_options
def models(target: Target, name: str | None) -> None:
    """List the models of the repository, or show everything about one."""
    admin = target.admin(_ANSWER_SECONDS)
    if name is not None:
        answer = admin.get(f"/admin/models/{_path(name)}")
        print_json(answer) if target.wants_json else print_model(answer)
        return
    answer = admin.get("/admin/models")
    print_json(answer) if target.wants_json else print_models(answer["models"])


@click.command()
@click.argument("name", shell_complete=complete_model)
@common_options
def load(target: Target, name: str) -> None:
    """Load a model, or load it anew, and wait until it is ready."""
    with spinner(f"loading {name}", wants_json=target.wants_json):
        answer = target.admin().post(f"/v2/repository/models/{_path(name)}/load", {})
    if target.wants_json:
        print_json(answer)
        return
    where = f"{answer['backend']} on {answer['device']} in {answer['precision']}"
    click.echo(
        f"{name} version {answer['version']} is {answer['state']}: {where}, loaded in {answer['load_ms']:.0f} ms"
    )


@click.command()
@click.argument("name", shell_complete=complete_model)
@common_options
def unload(target: Target, name: str) -> None:
    """Unload a model once its requests are answered; its memory goes back."""
    with spinner(f"unloading {name}", wants_json=target.wants_json):
        answer = target.admin().post(f"/v2/repository/models/{_path(name)}/unload", {})
    print_json(answer) if target.wants_json else click.echo(f"{name} is {answer['state']}")
