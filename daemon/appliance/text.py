"""Texts to token ids at the edge, in threads of the front-end: batching needs the lengths before a batch is formed."""

import contextlib
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.errors import BackendError, InvalidManifest, InvalidRequest

if TYPE_CHECKING:
    from appliance.manifest import TextSection

#: Characters of one text at most; a tokenizer's time grows with them while max_tokens cuts its output only.
_MAX_CHARACTERS: Final = 1 << 20


class Tokens(NamedTuple):
    """Token ids of some texts, all padded to one length.

    Attributes:
        length: Tokens a row has, padding included.
        ids: INT64 [texts, length], row-major.
        mask: INT64 [texts, length], 1 for a token and 0 for padding.
        took_ns: Time it took.
    """

    length: int
    ids: bytes
    mask: bytes
    took_ns: int


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turn a panic of the tokenizers library, a BaseException of pyo3 that nothing exports, into an error."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)):
            raise
        raise RuntimeError(str(error)) from error


class TextEncoder:
    """A model's tokenizer. `encode` may run in any thread."""

    def __init__(self, section: "TextSection", tokenizer_json: bytes, model: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = (
            "false"  # requests are the parallelism; rayon's threads would add to ours
        )
        from tokenizers import Tokenizer  # costs 4 MB, which a machine without text models need not pay

        self._section = section
        try:
            with _panics_as_errors():
                self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
                self._tokenizer.no_padding()
                self._tokenizer.enable_truncation(section.max_tokens)
                self.encode([b"", b"a" * section.max_tokens, b"a " * (section.buckets[-1] + 1)])
        except Exception as error:  # the library raises bare Exception for anything it cannot read
            raise InvalidManifest(f"cannot use the tokenizer of {model!r}: {error}") from error

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        """Tokenise UTF-8 texts and pad them to the smallest bucket that holds the longest.

        Raises:
            InvalidRequest: A text is not UTF-8 or too long.
            BackendError: The tokenizer failed.
        """
        began = time.monotonic_ns()
        decoded = []
        for row, text in enumerate(texts):
            try:
                decoded.append(str(text, "utf-8"))
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"cannot tokenise row {row}: byte {error.start} is not UTF-8") from error
            if len(decoded[-1]) > _MAX_CHARACTERS:
                raise InvalidRequest(
                    f"cannot tokenise row {row}: it has {len(decoded[-1])} characters and may have {_MAX_CHARACTERS}"
                )
        try:
            with _panics_as_errors():
                encoded: list[list[int]] = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(decoded)]
        except Exception as error:
            raise BackendError(f"cannot tokenise: the tokenizer failed: {str(error)[:200]}") from error
        longest = max(len(tokens) for tokens in encoded)
        length = next((bucket for bucket in self._section.buckets if bucket >= longest), 0)
        if length == 0:  # truncation gives up where max_tokens does not even hold the special tokens
            raise BackendError(f"cannot tokenise: {longest} tokens came where max_tokens is {self._section.max_tokens}")
        ids = array("q")
        mask = array("q")
        for tokens in encoded:
            padding = length - len(tokens)
            ids.extend(tokens)
            ids.extend([self._section.pad_id] * padding)
            mask.extend([1] * len(tokens))
            mask.extend([0] * padding)
        return Tokens(length, ids.tobytes(), mask.tobytes(), time.monotonic_ns() - began)
