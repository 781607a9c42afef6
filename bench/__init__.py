"""Benches of layerfused: `python -m bench step …` measures, `python -m bench report FILE.json` prints."""
