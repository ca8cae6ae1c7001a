"""What an error message may not say."""

import re

#: Paths, descriptors, addresses, environment, tracebacks: nothing a client should learn (Triton CVE-2025-23320).
_SECRETS = re.compile(
    r"/(?:tmp|root|home|work|proc|dev|usr|etc/(?!passwd)|run|var|opt)\b|/[\w.-]+\.sock\b|\.onnx\b|\.py\b|Traceback|0x[0-9a-f]{4,}"
    r"|\bfd\b|\bfile descriptor \d|\bpid\b|127\.0\.0\.1|\bobject at\b|Errno|[A-Z]\w+Error\b",
)


def check_message(message: str) -> None:
    """A message for a client: says what it cannot do and why, briefly, and gives nothing away."""
    assert message.startswith("cannot "), message
    assert ":" in message, message
    assert message.isprintable(), message
    assert len(message) < 1000, message
    assert not _SECRETS.search(message), message
