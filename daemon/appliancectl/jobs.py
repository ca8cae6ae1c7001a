"""Waiting for long work with a progress bar, and ``appliancectl jobs``."""

import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from appliancectl.output import console, print_json, print_table
from appliancectl.target import Target, common_options

if TYPE_CHECKING:
    from appliance_client import AdminClient

_ANSWER_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.2
_ENDS: Final = ("done", "failed", "cancelled")


class JobFailed(click.ClickException):
    """A job did not come to a good end."""

    exit_code = 1


def follow(admin: "AdminClient", job: dict[str, Any], *, wants_json: bool) -> dict[str, Any]:
    """Show a job's progress until it is over; Ctrl-C cancels it.

    Returns:
        The job as it ended.

    Raises:
        JobFailed: It failed or was cancelled.
    """
    try:
        job = _watch(admin, job) if not wants_json and sys.stderr.isatty() else _wait(admin, job, quiet=wants_json)
    except KeyboardInterrupt:
        job = admin.post(f"/admin/jobs/{job['id']}/cancel", {})
        click.echo("cancelled; what was measured is kept", err=True)
        raise
    if job["state"] == "failed":
        raise JobFailed(job["error"])
    if job["state"] == "cancelled":
        raise JobFailed(f"job {job['id']} was cancelled")
    return job


def _look(admin: "AdminClient", job: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = admin.get(f"/admin/jobs/{job['id']}")
    return answer


def _wait(admin: "AdminClient", job: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Where nobody looks at a bar: a line on standard error for each step."""
    said = ""
    while job["state"] not in _ENDS:
        step = "waiting for requests to end" if job["state"] == "paused" else job["step"].partition(" (")[0]
        if step and step != said and not quiet:
            click.echo(step, err=True)
            said = step
        time.sleep(_LOOK_SECONDS)
        job = _look(admin, job)
    return job


def _watch(admin: "AdminClient", job: dict[str, Any]) -> dict[str, Any]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(is_error=True), transient=True) as progress:
        task = progress.add_task(job["kind"], total=None, count="")
        while job["state"] not in _ENDS:
            step = job["step"] or "waiting for another job"
            if job["state"] == "paused":
                step = f"{job['step']}: waiting for requests to end"
            total = job["total"] or None
            count = f"{job['done']}/{total}" if total else ""
            progress.update(task, description=step, completed=job["done"], total=total, count=count)
            time.sleep(_LOOK_SECONDS)
            job = _look(admin, job)
    return job


@click.command()
@click.option("--cancel", metavar="ID", help="End a job; what it measured is kept.")
@common_options
def jobs(target: Target, cancel: str | None) -> None:
    """Show measuring and quantising jobs, under way and lately ended."""
    admin = target.admin(_ANSWER_SECONDS)
    if cancel is not None:
        job = admin.post(f"/admin/jobs/{cancel}/cancel", {})
        print_json(job) if target.wants_json else click.echo(f"job {cancel} is {job['state']}")
        return
    answer = admin.get("/admin/jobs")
    if target.wants_json:
        print_json(answer)
        return
    print_table(
        (">job", "kind", "model", "state", "by", ">seconds", "step"),
        [
            (
                job["id"],
                job["kind"],
                job["model"],
                job["state"],
                "idle time" if job["by_itself"] else "request",
                f"{job['seconds']:.1f}",
                job["error"] or job["step"] or "-",
            )
            for job in answer["jobs"]
        ],
        "no jobs",
    )
