"""``nsa bench`` with its options, or ``nsa bench decode`` and ``nsa bench prefill`` with others."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from nsa.bench.command import bench
from nsa.bench.decode_command import decode
from nsa.bench.prefill_command import prefill
from nsa.cli.errors import clean_errors


class StepsUnlessNamed(TyperGroup):
    """Without the name of a command its arguments are those of ``steps``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(
            ctx, args if args[:1] in ([name] for name in (*self.commands, "--help")) else ["steps", *args]
        )


bench_app = typer.Typer(
    cls=StepsUnlessNamed,
    help="Time this library against full attention, after checking what is timed. Without a command: steps.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app.command("steps")(clean_errors(bench))
bench_app.command("decode")(clean_errors(decode))
bench_app.command("prefill")(clean_errors(prefill))
