"""``appliancectl instances``."""

from typing import Any, Final
from urllib.parse import quote

import click

from appliancectl.completion import complete_model
from appliancectl.output import milliseconds, print_json, print_table, spinner
from appliancectl.target import Target, common_options

_ANSWER_SECONDS: Final = 60.0

_WHY: Final = {
    "rule": "by the written rule",
    "measured": "by measurement",
    "pinned": "since an administrator pinned it",
}


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@click.option("--streams", type=click.IntRange(1, 64), metavar="N", help="Batches that run at the same time.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores that each of them may use.")
@click.option("--auto", is_flag=True, help="Leave it to the measurements again, as `unpin` does.")
@common_options
def instances(target: Target, name: str, streams: int | None, threads: int | None, auto: bool) -> None:
    """Show, or change, how many batches of a model run at the same time, and on how many cores each.

    Of --streams and --threads the one left out becomes such that all cores are used. The model answers requests all
    the while.
    """
    if auto and (streams is not None or threads is not None):
        raise click.UsageError("--auto goes with neither --streams nor --threads")
    path = f"/admin/models/{quote(name, safe='')}/instances"
    body: dict[str, Any] = {"auto": True} if auto else {}
    body |= {key: value for key, value in (("streams", streams), ("threads", threads)) if value is not None}
    if body:
        with spinner(f"changing {name}", wants_json=target.wants_json):
            answer = target.admin().post(path, body)
    else:
        answer = target.admin(_ANSWER_SECONDS).get(path)
    if target.wants_json:
        print_json(answer)
        return
    _print(answer)


def _print(answer: dict[str, Any]) -> None:
    if not answer["variant"]:
        click.echo(f"{answer['model']} version {answer['version']} is {answer['state']}")
        return
    click.echo(f"{answer['model']} on {answer['device']} runs {_words(answer)}, {_WHY[answer['chosen_by']]}")
    if answer["streams"] * answer["threads"] > answer["cores"] > 0:
        click.echo(f"that is more than the {answer['cores']} cores there are: batches get in each other's way")
    said = [f"{key} = {value}" for key, value in answer["manifest"].items() if value is not None]
    if said:
        click.echo(f"its manifest says {', '.join(said)}")
    if answer["weight"] != 1:
        click.echo(f"its weight beside other models of {answer['device']} is {answer['weight']:g}")
    click.echo()
    rows = []
    for one in answer["splits"]:
        noise = "~" if one["disturbed"] else ""
        measured = one["latency_us"] is not None
        rows.append(
            (
                "*" if one["variant"] == answer["variant"] else "",
                str(one["streams"]),
                str(one["threads"] or "-"),
                noise + milliseconds(one["latency_us"]) if measured else "-",
                f"{noise}{one['rows_per_second']:.0f}/s" if measured else "-",
                one["variant"],
            )
        )
    print_table((" ", ">streams", ">threads", ">one row", ">rows", "candidate"), rows, "nothing can run it")


def _words(answer: dict[str, Any]) -> str:
    streams, threads = answer["streams"], answer["threads"]
    batches = "one batch at a time" if streams == 1 else f"{streams} batches at a time"
    if not threads:
        return batches
    return f"{batches}, {'each ' if streams > 1 else ''}on {threads} {'core' if threads == 1 else 'cores'}"
