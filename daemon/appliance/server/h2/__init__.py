"""HTTP/2 for a server (RFC 9113), as far as gRPC needs it."""
