"""``appliancectl tune``, ``explain``, ``pin``, ``unpin`` and ``quantize``."""

from typing import Any, Final
from urllib.parse import quote

import click

from appliancectl.completion import complete_model, complete_variant
from appliancectl.jobs import follow
from appliancectl.output import milliseconds, print_json, print_pairs, print_table, size, spinner
from appliancectl.target import Target, common_options

_ANSWER_SECONDS: Final = 60.0


def _path(name: str, what: str) -> str:
    return f"/admin/models/{quote(name, safe='')}/{what}"


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@click.option("--budget", type=click.FloatRange(min=1), metavar="SECONDS", help="Measuring time it may take.")
@click.option("--fresh", is_flag=True, help="Measure again what is known.")
@click.option("--detach", is_flag=True, help="Do not wait; `appliancectl jobs` shows how it goes.")
@common_options
def tune(target: Target, name: str, budget: float | None, fresh: bool, detach: bool) -> None:
    """Measure every way to run a model, check accuracy, and let the best one serve.

    What is known is not measured again. Measuring stops at once while requests are served.
    """
    admin = target.admin(_ANSWER_SECONDS)
    body = {"fresh": fresh, **({"budget_seconds": budget} if budget is not None else {})}
    job = admin.post(_path(name, "tune"), body)
    if detach:
        print_json(job) if target.wants_json else click.echo(f"job {job['id']} is {job['state']}")
        return
    ended = follow(admin, job, wants_json=target.wants_json)
    answer = admin.get(_path(name, "explain"))
    if target.wants_json:
        print_json({"job": ended, "explanation": answer})
        return
    result = ended["result"]
    done = f"measured {len(result['measured'])}, {result['reused']} known before, in {ended['seconds']:.1f} s"
    click.echo(done if result["complete"] else f"{done}; the budget ended before all were measured: tune again")
    print_explanation(answer)


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@click.option("--points", is_flag=True, help="Show latency by batch size too.")
@common_options
def explain(target: Target, name: str, points: bool) -> None:
    """Show every way to run a model with its numbers, and why one of them serves."""
    answer = target.admin(_ANSWER_SECONDS).get(_path(name, "explain"))
    if target.wants_json:
        print_json(answer)
        return
    print_explanation(answer, with_points=points)


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@click.argument("variant", shell_complete=complete_variant)
@common_options
def pin(target: Target, name: str, variant: str) -> None:
    """Have one variant serve, whatever the measurements say. `explain` lists the variants."""
    with spinner(f"loading {variant}", wants_json=target.wants_json):
        answer = target.admin().post(_path(name, "pin"), {"variant": variant})
    _print_serving(target, answer, f"{name} is pinned to {variant}")


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@common_options
def unpin(target: Target, name: str) -> None:
    """Leave the choice to the measurements again."""
    with spinner(f"choosing for {name}", wants_json=target.wants_json):
        answer = target.admin().post(_path(name, "unpin"), {})
    _print_serving(target, answer, f"{name} is not pinned")


def _print_serving(target: Target, answer: dict[str, Any], done: str) -> None:
    if target.wants_json:
        print_json(answer)
        return
    click.echo(done)
    click.echo(_headline(answer))


@click.command()
@click.argument("name", metavar="MODEL", shell_complete=complete_model)
@click.option(
    "--method",
    type=click.Choice(["int8", "int8-qdq", "fp16", "bf16", "int8-weights", "int4-weights"]),
    default="int8",
    show_default=True,
    help="int8: NNCF, for OpenVINO. int8-qdq: ONNX with Q/DQ nodes, for every backend that reads ONNX.",
)
@click.option(
    "--calibration",
    metavar="SOURCE",
    default="",
    help="'manifest', 'recorded', or a file or directory of inputs. [default: the manifest's, else what was recorded]",
)
@click.option("--rows", type=click.IntRange(1, 1_000_000), help="Calibration inputs to use at most. [default: 300]")
@click.option("--remove", metavar="VARIANT", help="Delete a variant made earlier, instead of making one.")
@click.option("--detach", is_flag=True, help="Do not wait; `appliancectl jobs` shows how it goes.")
@common_options
def quantize(
    target: Target, name: str, method: str, calibration: str, rows: int | None, remove: str | None, detach: bool
) -> None:
    """Make a variant of lower precision beside the original, measure it and check its accuracy."""
    admin = target.admin(_ANSWER_SECONDS)
    if remove is not None:
        answer = admin.post(_path(name, "variants/remove"), {"variant": remove})
        print_json(answer) if target.wants_json else click.echo(f"{remove} is removed")
        return
    body = {"method": method, "calibration": _absolute(calibration), **({"rows": rows} if rows is not None else {})}
    job = admin.post(_path(name, "quantize"), body)
    if detach:
        print_json(job) if target.wants_json else click.echo(f"job {job['id']} is {job['state']}")
        return
    made = follow(admin, job, wants_json=target.wants_json)
    result = made["result"]
    if not target.wants_json:
        click.echo(
            f"made {result['variant']}: {size(result['bytes'])}, the original has {size(result['bytes_before'])}"
            + (f"; {result['rows']} calibration inputs" if result["rows"] else "")
        )
    tuned = follow(admin, admin.get(f"/admin/jobs/{result['tune_job']}"), wants_json=target.wants_json)
    answer = admin.get(_path(name, "explain"))
    if target.wants_json:
        print_json({"job": made, "tuning": tuned, "explanation": answer})
        return
    print_explanation(answer)


def _absolute(calibration: str) -> str:
    if calibration in ("", "manifest", "recorded"):
        return calibration
    from pathlib import Path

    return str(Path(calibration).absolute())


def _headline(answer: dict[str, Any]) -> str:
    serving = answer["serving"]
    if not serving["variant"]:
        return f"{answer['model']} version {answer['version']} is {serving['state']}"
    why = {
        "rule": "by the written rule: nothing better is measured",
        "measured": f"by measurement, for {answer['objective']}",
        "pinned": "since an administrator pinned it",
    }[serving["chosen_by"]]
    return f"{answer['model']} version {answer['version']} runs as {serving['variant']}, {why}"


def _split(candidate: dict[str, Any]) -> str:
    """Batches at the same time, times the cores of each where the device has such."""
    return f"{candidate['streams']}x{candidate['threads']}" if candidate["threads"] else str(candidate["streams"])


def _accuracy(candidate: dict[str, Any]) -> str:
    proof = candidate["evidence"]
    if not proof or "value" not in proof:
        return "-"
    return f"{proof['metric']} {proof['value']:.4f}"


def print_explanation(answer: dict[str, Any], *, with_points: bool = False) -> None:
    """What serves and why, the candidates in a table, the reasons below, and what is out of the question."""
    click.echo(_headline(answer))
    serving = answer["serving"]
    on = f"{serving['device']} by {serving['provider']} ({serving['runtime']})"
    pairs = [
        ("executed on", on if serving["provider"] else ""),
        ("fallback", serving["fallback"]),
        ("objective", f"{answer['objective']}: {answer['judged_by']}"),
        ("accuracy", _bound(answer)),
    ]
    print_pairs([(name, value) for name, value in pairs if value])
    click.echo()
    if serving["costs"]:
        _print_costs(answer)
        click.echo()
    rows = []
    for one in answer["candidates"]:
        found = one["measurement"]
        numbers = ("-", "-", "-", "-")
        if found:
            noise = "~" if found["disturbed"] else ""
            numbers = (
                noise + milliseconds(found["latency_us"]),
                f"{noise}{found['rows_per_second']:.0f}/s at {found['best_rows']}",
                f"{found['load_ms']:.0f} ms",
                size(found["peak_bytes"]),
            )
        mark = "*" if one["name"] == serving["variant"] else ""
        rows.append((mark, one["name"], one["verdict"], _split(one), *numbers, _accuracy(one)))
    columns = (" ", "candidate", "verdict", ">streams", ">one row", ">rows", ">load", ">memory", "accuracy")
    print_table(columns, rows, "nothing can run it")
    reasons = [(one["name"], one["reason"]) for one in answer["candidates"] if one["verdict"] != "unmeasured"]
    if reasons:
        click.echo()
        print_pairs(reasons)
    if any(one["measurement"] and one["measurement"]["disturbed"] for one in answer["candidates"]):
        click.echo("\n~ other programs kept the cores busy meanwhile; idle time measures again")
    if with_points:
        click.echo()
        _print_points(answer)
    if answer["barred"]:
        click.echo("\nout of the question:")
        print_pairs([(one["name"], one["reason"]) for one in answer["barred"]])
    unknown = sum(one["verdict"] in ("unmeasured", "unchecked") for one in answer["candidates"])
    if unknown:
        click.echo(f"\n{unknown} not measured or checked: `appliancectl tune {answer['model']}`, or wait for idle time")


def _print_costs(answer: dict[str, Any]) -> None:
    """What batches of what serves are expected to cost, by the units of a row, below what was measured."""
    serving = answer["serving"]
    measured = [one["measurement"] for one in answer["candidates"] if one["name"] == serving["variant"]]
    rows = []
    for found in filter(None, measured):
        slope, intercept = found["slope_us"], found["intercept_us"]
        rows.append(("measured", str(found["tokens"] or "-"), milliseconds(slope), milliseconds(intercept), *["-"] * 5))
    for cost in serving["costs"]:
        rows.append(
            (
                "expected",
                str(cost["units"]) if cost["units"] > 1 else "-",
                milliseconds(cost["slope_us"]),
                milliseconds(cost["intercept_us"]),
                f"{cost['setup_share']:.0%}",
                f"{cost['spread']:.0%}",
                str(cost["efficient_rows"]),
                str(cost["samples"]),
                f"{cost['scale']:.2f}" if cost["scale"] is not None else "-",
            )
        )
    columns = ("batches", ">units", ">each row", ">and", ">its share", ">spread", ">efficient rows", ">seen", ">pace")
    print_table(columns, rows, "")


def _bound(answer: dict[str, Any]) -> str:
    on = "the evaluation sample" if answer["has_sample"] else "made-up inputs"
    text = f"{answer['metric']} at most {answer['bound']:.2%} worse than {answer['reference']}, on {on}"
    return text if answer["has_sample"] else f"{text}; without a sample nothing below 16 bits is offered"


def _print_points(answer: dict[str, Any]) -> None:
    points = [
        (one["name"], point)
        for one in answer["candidates"]
        if one["measurement"]
        for point in one["measurement"]["points"]
    ]
    is_counted = any(point["energy_mj"] is not None for _, point in points)
    rows = []
    for name, point in points:
        noise = "~" if point["disturbed"] else ""
        energy = "-" if point["energy_mj"] is None else f"{point['energy_mj']:.3g} mJ"
        rows.append(
            (
                name,
                str(point["rows"]),
                noise + milliseconds(point["median_us"]),
                milliseconds(point["spread_us"]),
                str(point["samples"]),
                *((energy,) if is_counted else ()),
            )
        )
    columns = ("candidate", ">rows", ">median", ">spread", ">runs", *((">energy",) if is_counted else ()))
    print_table(columns, rows, "nothing is measured")
