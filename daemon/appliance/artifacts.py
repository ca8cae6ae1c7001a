"""Files of a model directory: found without leaving it, and compared with their digests."""

import hashlib
from pathlib import Path

from appliance.errors import ArtifactCorrupt, InvalidManifest


def resolve_inside(directory: Path, relative: str) -> Path:
    """Absolute path of a file below `directory`, links resolved.

    Raises:
        InvalidManifest: It is missing, or leads outside the directory.
    """
    root = directory.resolve()
    try:
        path = (root / relative).resolve()
    except RuntimeError as error:
        raise InvalidManifest(f"cannot use {relative!r} of {directory.name!r}: its links form a circle") from error
    if not path.is_relative_to(root):
        raise InvalidManifest(f"cannot use {relative!r} of {directory.name!r}: it leads outside the model's directory")
    if not path.exists():
        raise InvalidManifest(f"cannot use {relative!r} of {directory.name!r}: no such file")
    return path


def verify_digest(path: Path, sha256: str | None, shown: str) -> None:
    """Compare a file with its digest; does nothing where there is none.

    Raises:
        ArtifactCorrupt: It differs, or the file cannot be read.
    """
    if sha256 is None:
        return
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactCorrupt(f"cannot read {shown!r}: {error.strerror}") from error
    if actual != sha256:
        raise ArtifactCorrupt(
            f"cannot use {shown!r}: its sha256 is {actual[:12]}... and the manifest says {sha256[:12]}..."
        )


def fingerprint(artifact: Path) -> str:
    """Names the state of an artifact and of the files beside it, which may hold its weights: 32 hex digits.

    Made of names, sizes, inodes and modification times; the contents are not read.

    Raises:
        OSError: The directory cannot be read.
    """
    digest = hashlib.blake2b(str(artifact).encode(), digest_size=16)
    for path in sorted(artifact.parent.iterdir()):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size} {status.st_ino} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def companions(artifact: Path) -> list[Path]:
    """The artifact and the files beside it that hold its weights.

    OpenVINO IR keeps them in the ``.bin`` of the same name, ONNX by convention in the artifact's name with ``.data`` or
    ``_data`` at its end; of a directory every file counts.

    Raises:
        OSError: A directory cannot be read.
    """
    if artifact.is_dir():
        return sorted(path for path in artifact.rglob("*") if path.is_file())
    beside = [artifact.with_suffix(".bin")] if artifact.suffix == ".xml" else []
    beside += [artifact.with_name(artifact.name + end) for end in (".data", "_data")]
    return [artifact, *(path for path in beside if path.is_file())]


def contents_digest(artifact: Path) -> str:
    """Hex sha256 of an artifact: of the file where it is one, else of the digests of its files by name.

    Raises:
        OSError: A file cannot be read.
    """
    paths = companions(artifact)
    if paths == [artifact]:
        with artifact.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
