"""What travels between processes: generated messages and fixed binary frames."""
