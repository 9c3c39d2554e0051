"""``nsa bench selections``: a checkpoint in, and how alike its model's selections are out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nsa.bench.command import WIDTH
from nsa.bench.data import OVERLAP, UNION_OF_4, selection_figures
from nsa.cli.device import pick_device
from nsa.train import load_checkpoint, read_corpus


def selections(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder, or its checkpoint file, of `nsa train`.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text, files or folders. Default: what the run was trained on.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of validation text. Default: the context the model was trained on.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Show how much the selections of neighbouring queries have in common in a trained model, layer by layer.

    These are the two figures by which the benchmark's trained-like data counts or doesn't. The first queries, which can hardly
    choose, are left out.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    saved = load_checkpoint(checkpoint)
    model, cfg = saved.build_model(pick_device(device)).eval(), saved.model.nsa
    text = read_corpus(data or saved.data).validation
    count = saved.train.context if tokens is None else tokens
    if not 8 <= count <= len(text):
        raise ValueError(f"tokens must be 8 to {len(text)}, those of the validation text, got {count}")
    # As in the benchmark, whose queries count from 2048 on, if the text is long enough for that.
    start = min(2 * cfg.num_selected_blocks * cfg.selection_block_size, count // 2)
    blocks = model.selected_blocks(text[None, :count].long().to(next(model.parameters()).device))
    table = Table(
        title=f"{saved.step:,} steps, {count:,} tokens of validation text, {cfg.num_selected_blocks} blocks of "
        f"{cfg.selection_block_size} tokens a query, queries from {start:,} on",
        title_justify="left",
    )
    for name in ("layer", "share of blocks that the query before selected too", "blocks that 4 neighbours select together"):
        table.add_column(name, justify="right")
    for layer, indices in enumerate(blocks):
        overlap, union = selection_figures(indices, start)
        table.add_row(str(layer), f"{overlap:.2f}", f"{union:.1f}")
    console.print(table)
    console.print(
        f"trained-like data stands for {OVERLAP[0]} to {OVERLAP[1]} and, with 16 blocks a query, {UNION_OF_4[0]:.0f} to "
        f"{UNION_OF_4[1]:.0f}",
        highlight=False,
    )
