"""Faults on purpose, in a loop: ``python -m tests.faults --rounds 20``."""
