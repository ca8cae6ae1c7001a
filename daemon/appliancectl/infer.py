"""``appliancectl infer``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliancectl.completion import complete_model
from appliancectl.failure import InputError
from appliancectl.output import print_json, print_pairs, print_table, spinner
from appliancectl.target import Target, common_options

if TYPE_CHECKING:
    from appliance_client import Answer

#: Elements of a tensor shown to a person.
_SHOWN = 8
#: Digits of the largest number of 64 bits.
_MAX_DIGITS = 20


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--input",
    "-i",
    "given",
    multiple=True,
    required=True,
    metavar="[NAME=]VALUE",
    help="A file, - or the value itself.",
)
@click.option(
    "--output-file", type=click.Path(path_type=Path, dir_okay=False), help="Write the outputs as .npy or .npz."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, help="Seconds to wait.", show_default=True
)
@click.option("--priority", default="0", metavar="LEVEL", help="A number from 1, or interactive, default, background.")
@click.option("--sequence", default="0", metavar="ID", help="The sequence to go on with, for a model that keeps state.")
@click.option("--start", is_flag=True, help="Begin the sequence.")
@click.option("--end", is_flag=True, help="End the sequence.")
@common_options
def infer(
    target: Target,
    model: str,
    given: tuple[str, ...],
    output_file: Path | None,
    timeout: float,
    priority: str,
    sequence: str,
    start: bool,
    end: bool,
) -> None:
    """Ask a model: give it text, a picture, a .npy file or JSON, and see its answer.

    A VALUE that is a file's name stands for what the file holds. Repeat --input for several rows, or with NAME= for
    several inputs.
    """
    with spinner(f"asking {model}", wants_json=target.wants_json), target.client() as client:
        metadata = client.model_metadata(model, timeout=timeout)
        task = target.admin(timeout).get(f"/admin/models/{metadata.name}")["task"]
        from appliancectl.inputs import gather_inputs

        inputs = gather_inputs(metadata, given, is_image=task == "image-classification")
        answer = client.infer(
            model,
            inputs,
            timeout=timeout,
            priority=_number_or_word(priority),
            sequence_id=_number_or_word(sequence),
            sequence_start=start,
            sequence_end=end,
        )
    datatypes = {spec.name: spec.datatype for spec in metadata.outputs}
    if output_file is not None:
        _write(answer, output_file)
    if target.wants_json:
        print_json(_as_json(answer, datatypes))
    else:
        _show(answer, datatypes)


def _number_or_word(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() and len(text) <= _MAX_DIGITS else text


def _values(answer: "Answer", name: str) -> Any:
    array = answer[name]
    return answer.text(name) if array.dtype.kind == "O" else array.tolist()


def _as_json(answer: "Answer", datatypes: dict[str, str]) -> dict[str, Any]:
    return {
        "model": answer.model,
        "version": answer.version,
        "outputs": [
            {
                "name": name,
                "datatype": datatypes.get(name, ""),
                "shape": list(answer[name].shape),
                "data": _values(answer, name),
            }
            for name in answer
        ],
        "timings": answer.timings._asdict(),
    }


def _show(answer: "Answer", datatypes: dict[str, str]) -> None:
    """Labels with their scores where the model gives them, other outputs in short, and where the time went."""
    shown: set[str] = set()
    if {"label", "score"} <= set(answer) and answer["label"].shape == answer["score"].shape:
        shown = {"label", "score"}
        labels = answer["label"].reshape(-1)
        scores = answer["score"].reshape(-1)
        per_row = labels.size // max(1, len(answer["label"]))
        print_table(
            (">row", "label", ">score"),
            [
                (str(index // per_row), label.decode("utf-8", "replace"), f"{score:.4f}")
                for index, (label, score) in enumerate(zip(labels, scores, strict=True))
            ],
            "no rows",
        )
    pairs = [(name, _in_short(answer, name, datatypes.get(name, ""))) for name in answer if name not in shown]
    if pairs:
        print_pairs(pairs)
    times = answer.timings._asdict()
    rows = times.pop("batch_rows")
    stages = ", ".join(f"{stage.removesuffix('_us')} {time}" for stage, time in times.items() if time)
    click.echo(f"µs: {stages}; batch of {rows}", err=True)


def _in_short(answer: "Answer", name: str, datatype: str) -> str:
    array = answer[name]
    first = array.reshape(-1)[:_SHOWN].tolist()
    values = [value.decode("utf-8", "replace") if isinstance(value, bytes) else f"{value:.6g}" for value in first]
    more = f" ... {array.size} elements" if array.size > _SHOWN else ""
    return f"{datatype} {list(array.shape)}: {' '.join(values)}{more}"


def _write(answer: "Answer", path: Path) -> None:
    import numpy as np

    # text as fixed-width unicode: object arrays would need pickle
    arrays = {
        name: np.array(answer.text(name), dtype=str) if answer[name].dtype.kind == "O" else answer[name]
        for name in answer
    }
    try:
        if path.suffix == ".npz":
            np.savez(path, allow_pickle=False, **arrays)
        elif len(arrays) == 1:
            np.save(path, next(iter(arrays.values())), allow_pickle=False)
        else:
            raise InputError(
                f"cannot write {len(arrays)} outputs to {path.name!r}: name it .npz, or ask a model with one output"
            )
    except OSError as error:
        raise InputError(f"cannot write {path.name!r}: {(error.strerror or 'no access').lower()}") from error
