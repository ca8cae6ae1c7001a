"""``appliancectl bench``."""

import math
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from appliancectl.bench.arrivals import ARRIVALS, instants
from appliancectl.bench.closed_loop import run_closed_loop
from appliancectl.bench.load import Load, request_inputs
from appliancectl.bench.progress import progress
from appliancectl.bench.scenario import (
    SCENARIOS,
    Scenario,
    check_installed,
    print_scenario,
    run_scenario,
)
from appliancectl.bench.table import print_closed_loops, print_open_loops
from appliancectl.completion import complete_model
from appliancectl.output import print_json
from appliancectl.target import Target, common_options

_MAX_CONCURRENCY: Final = 1024
_MAX_RATE: Final = 100_000.0

#: Connections: the clock of the open loop bounds the descriptors there may be.
_MAX_CLIENTS: Final = 256

#: Digits of the largest priority there may be, and the words for the levels of a model that has no others.
_MAX_DIGITS: Final = 9
_LEVELS: Final = ("interactive", "default", "background")

_NO_SCENARIO: Final = ("concurrency", "rate", "arrivals", "burst", "timeout")
_OF_SCENARIOS: Final = ("target_qps", "target_latency", "keep_logs")


def _counts(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    parts = value.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= _MAX_CONCURRENCY for part in parts):
        raise click.BadParameter(f"{value!r} must be numbers from 1 to {_MAX_CONCURRENCY}, separated by commas")
    return [int(part) for part in parts]


def _rates(_context: click.Context, _option: click.Parameter, value: str | None) -> list[float]:
    rates = []
    for part in () if value is None else value.split(","):
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(math.nan)
    if not all(0 < rate <= _MAX_RATE for rate in rates):
        raise click.BadParameter(f"{value!r} must be numbers above 0 up to {_MAX_RATE:g}, separated by commas")
    return rates


def _level(_context: click.Context, _option: click.Parameter, value: str) -> int | str:
    if value in _LEVELS:
        return value
    if not value.isdecimal() or len(value) > _MAX_DIGITS:
        raise click.BadParameter(f"{value!r} must be a number from 1 or one of {', '.join(_LEVELS)}")
    return int(value)


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--input", "-i", "given", multiple=True, metavar="[NAME=]VALUE", help="As for infer. [default: made up]")
@click.option(
    "--duration", type=click.FloatRange(0.1, 3600), default=5.0, help="Seconds for each step.", show_default=True
)
@click.option(
    "--concurrency",
    callback=_counts,
    default="1,4,16",
    help="Closed loop: requests in flight, one step each.",
    show_default=True,
)
@click.option("--rate", callback=_rates, metavar="R[,R...]", help="Open loop: requests a second, one step each.")
@click.option(
    "--arrivals", type=click.Choice(ARRIVALS), default="poisson", help="When they are due.", show_default=True
)
@click.option(
    "--burst",
    type=click.IntRange(1, 10_000),
    default=16,
    help="Requests of a burst; bursts are Poisson.",
    show_default=True,
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of everything drawn.", show_default=True)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="MS", help="Deadline of each request.")
@click.option(
    "--priority",
    callback=_level,
    default="0",
    metavar="LEVEL",
    help="Of each request: interactive, default, background, or a number from 1. [default: the model's]",
)
@click.option(
    "--clients",
    type=click.IntRange(1, _MAX_CLIENTS),
    default=1,
    help="Connections to share the load.",
    show_default=True,
)
@click.option("--scenario", type=click.Choice(SCENARIOS), help="Let MLPerf's LoadGen send, by one of its scenarios.")
@click.option(
    "--target-qps",
    type=click.FloatRange(0, _MAX_RATE, min_open=True),
    help="server: queries a second. offline: samples a second to expect. [default there: measured first]",
)
@click.option(
    "--target-latency",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    default=100.0,
    help="server: bound on the 99th percentile.",
    show_default=True,
)
@click.option("--keep-logs", type=click.Path(path_type=Path, file_okay=False), help="Keep LoadGen's logs there.")
@common_options
def bench(
    target: Target,
    model: str,
    given: tuple[str, ...],
    duration: float,
    concurrency: list[int],
    rate: list[float],
    arrivals: str,
    burst: int,
    seed: int,
    timeout: float | None,
    priority: int | str,
    clients: int,
    scenario: str | None,
    target_qps: float | None,
    target_latency: float,
    keep_logs: Path | None,
) -> None:
    """Measure a model: throughput, latency and stage times under load.

    Without --rate it is a closed loop: each request in flight is followed by the next as soon as it is answered. With
    --rate it is an open loop: requests are sent when they are due, whatever became of those before, and latency counts
    from the moment they were due. With --scenario MLPerf's load generator sends.

    All of it is done by this one machine, whose own work is part of what is measured.
    """
    _check_combination(click.get_current_context(), has_rate=bool(rate), arrivals=arrivals, scenario=scenario)
    if scenario is not None:
        check_installed()
        order = Scenario(scenario, model, given, duration, clients, priority, seed, target_qps, target_latency)
        with progress(order.expected_s, quiet=target.wants_json) as advance:
            result = run_scenario(target, order, keep_logs, advance)
        print_json(result) if target.wants_json else print_scenario(result)
        return
    inputs = request_inputs(target, model, given)
    timeout_s = None if timeout is None else timeout / 1e3
    load = Load(target, model, inputs, duration, clients, timeout_s, priority)
    rows: list[dict[str, Any]] = []
    with progress(len(rate or concurrency) * duration, quiet=target.wants_json) as advance:
        if rate:
            from appliancectl.bench.open_loop import run_open_loop  # brings asyncio

            for each in rate:
                due_s = instants(arrivals, each, burst=burst, seed=seed)
                rows.append(run_open_loop(load, due_s, advance).open_row(each, duration))
        else:
            rows += [{"concurrency": count} | run_closed_loop(load, count, advance).row() for count in concurrency]
    if target.wants_json:
        print_json({"model": model, "duration_s": duration, "steps": rows})
    elif rate:
        print_open_loops(rows)
    else:
        print_closed_loops(rows)


def _check_combination(context: click.Context, *, has_rate: bool, arrivals: str, scenario: str | None) -> None:
    """Refuse options that say nothing, or the opposite, of what the others ask for."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    def refuse(name: str, reason: str) -> None:
        if given(name):
            raise click.UsageError(f"cannot use --{name.replace('_', '-')} here: {reason}", context)

    if scenario is not None:
        for name in _NO_SCENARIO:
            refuse(name, f"LoadGen decides how scenario {scenario} sends")
        if scenario == "single-stream":
            refuse("clients", "scenario single-stream has one request in flight")
        if scenario != "server":
            refuse("target_latency", "only scenario server has a bound on latency")
            if scenario != "offline":
                refuse("target_qps", f"scenario {scenario} sends as fast as it is answered")
        elif not given("target_qps"):
            raise click.UsageError("cannot run scenario server without --target-qps: it sends at that rate", context)
        return
    for name in _OF_SCENARIOS:
        refuse(name, "it belongs to --scenario")
    if has_rate:
        refuse("concurrency", "with --rate requests are sent when they are due, however many are in flight")
    else:
        for name in ("arrivals", "burst", "seed"):
            refuse(name, "it belongs to --rate")
    if arrivals != "burst":
        refuse("burst", "it belongs to --arrivals burst")
