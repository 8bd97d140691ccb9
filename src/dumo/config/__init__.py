"""The configuration of a run: its specs, parsing, overrides and validation.

Builds no net and uses no device.
"""
