"""``python -m nsa``."""

from nsa.cli import app

app(prog_name="python -m nsa")
