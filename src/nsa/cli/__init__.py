"""The command line: ``nsa`` or ``python -m nsa``. One file a command; each only reads options and prints."""

import typer

from nsa.cli.bench import bench_app
from nsa.cli.demo import demo
from nsa.cli.errors import clean_errors
from nsa.cli.generate import generate
from nsa.cli.info import info
from nsa.cli.train import train

app = typer.Typer(
    help="Native Sparse Attention: train, try, inspect and measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (demo, train, generate, info):
    app.command()(clean_errors(command))
app.add_typer(bench_app, name="bench")

__all__ = ["app"]
