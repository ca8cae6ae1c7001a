"""Generated messages and frames of the native protocol, the client's own copy: it imports nothing of the daemon."""
