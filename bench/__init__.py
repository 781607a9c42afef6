"""Benches of layerfused: `python -m bench step …` measures, `… tune` sweeps, `… report FILE.json` prints."""
