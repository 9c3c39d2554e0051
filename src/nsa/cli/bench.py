"""``nsa bench``: everything, or ``nsa bench steps``, ``decode``, ``prefill`` and ``selections`` with options of their own."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from nsa.bench.command import bench
from nsa.bench.decode_command import decode
from nsa.bench.prefill_command import prefill
from nsa.bench.tables_command import tables
from nsa.cli.errors import clean_errors
from nsa.cli.selections import selections


class TablesUnlessNamed(TyperGroup):
    """Without the name of a command: ``steps`` where an argument is none of ``tables``, such as a length, else ``tables``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args[:1] in ([name] for name in (*self.commands, "--help")):
            return super().parse_args(ctx, args)
        known = {option for parameter in self.commands["tables"].params for option in parameter.opts}
        given = {arg.split("=")[0] for arg in args if arg.startswith("-")}
        return super().parse_args(ctx, ["tables" if given <= known else "steps", *args])


bench_app = typer.Typer(
    cls=TablesUnlessNamed,
    help="Time this library against full attention, after checking what is timed. Without a command: tables, which is "
    "everything; with a length, a shape or another option that only steps has: steps.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app.command("tables")(clean_errors(tables))
bench_app.command("steps")(clean_errors(bench))
bench_app.command("decode")(clean_errors(decode))
bench_app.command("prefill")(clean_errors(prefill))
bench_app.command("selections")(clean_errors(selections))
