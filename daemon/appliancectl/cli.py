"""``appliancectl``: the command group, and how every command ends."""

import os
import sys
from typing import Any

import click

from appliance_client.errors import ApplianceError
from appliancectl import failure
from appliancectl.bench.command import bench
from appliancectl.completion import completion
from appliancectl.doctor import doctor
from appliancectl.hardware import backends, hardware
from appliancectl.infer import infer
from appliancectl.instances import instances
from appliancectl.jobs import jobs
from appliancectl.models import load, models, unload
from appliancectl.status import status, version
from appliancectl.tuning import explain, pin, quantize, tune, unpin


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Look after the inference appliance, and try its models.

    Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the daemon is out of reach.
    """


for _command in (
    status, hardware, backends, models, load, unload, infer, bench,
    explain, tune, quantize, pin, unpin, instances, jobs, doctor, version, completion,
):  # fmt: skip
    cli.add_command(_command)


def main(args: list[str] | None = None) -> Any:
    """Entry point; ends the process with the exit code of the outcome."""
    given = sys.argv[1:] if args is None else args
    wants_json = "--json" in given
    try:
        cli.main(args=given, prog_name="appliancectl", standalone_mode=False)
    except click.exceptions.Exit as done:
        failure.end(done.exit_code)
    except click.UsageError as error:
        if wants_json:
            failure.report(error.format_message(), "usage", wants_json=True)
        else:
            error.show()
        failure.end(failure.USAGE)
    except click.ClickException as error:
        failure.report(error.format_message(), "invalid-request", wants_json=wants_json)
        failure.end(error.exit_code)
    except ApplianceError as error:
        failure.report(str(error), error.kind, wants_json=wants_json)
        failure.end(failure.exit_code(error))
    except (click.Abort, KeyboardInterrupt):
        failure.end(failure.INTERRUPTED)
    except BrokenPipeError:
        # the reader has what it wanted; Python must not try to flush on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        failure.end(0)
    failure.end(0)
