"""``python -m nsa.bench``."""

import typer

from nsa.bench.command import bench
from nsa.cli.errors import clean_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(clean_errors(bench))

if __name__ == "__main__":
    app(prog_name="python -m nsa.bench")
