"""Figures about speed, each a ratio against a limit of the same machine in the same run. See docs/performance.md."""
