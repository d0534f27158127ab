"""Costs: seconds and bytes of ops and messages, measured or modelled."""
