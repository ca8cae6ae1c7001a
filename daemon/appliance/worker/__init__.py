"""Runs in worker processes only: loads one session through a backend and answers batches."""
