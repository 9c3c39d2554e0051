"""``loss.png`` and ``blocks.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.demo.compare import Twin
from nsa.train.atomic import replacing

STYLE = {  # attention: label, colour
    "nsa": ("native sparse attention", "#d1495b"),
    "full": ("full attention", "#22577a"),
    "window": ("window alone", "#e0a030"),
}
FUTURE, UNREAD, FORCED, CHOSEN = 0, 1, 2, 3
SHADES = ("#ffffff", "#e9edf1", "#9db4c8", "#d1495b")
SMOOTHED_OVER = 15  # steps


def draw_losses(path: Path, twins: Sequence[Twin], title: str) -> None:
    """Every model's training loss, smoothed over the steps before, and beside it the validation loss on a finer scale."""
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=150)
    training, validation = figure.subplots(1, 2)
    for twin in twins:
        label, colour = STYLE[twin.attention]
        losses = [line["train_bits_per_byte"] for line in twin.lines]
        training.plot([line["tokens"] for line in twin.lines], losses, color=colour, alpha=0.15, linewidth=0.8)
        training.plot([line["tokens"] for line in twin.lines], _smoothed(losses), color=colour, linewidth=1.5)
        measured = [line for line in twin.lines if "validation_bits_per_byte" in line]
        validation.plot(
            [line["tokens"] for line in measured], [line["validation_bits_per_byte"] for line in measured],
            "o-", color=colour, markersize=4, linewidth=1.5, label=f"{label}: {twin.validation:.3f}, reads {twin.read:.0%}",
        )  # fmt: skip
    for axes, name in ((training, f"training loss, mean of {SMOOTHED_OVER} steps"), (validation, "validation loss")):
        axes.set(xlabel="bytes trained on", title=name)
        axes.xaxis.set_major_formatter(_short_number)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    training.set_ylabel("bits per byte")
    validation.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _short_number(value: float, _: object = None) -> str:
    return "0" if value == 0 else f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def draw_blocks(path: Path, blocks: Sequence[Tensor], cfg: NSAConfig, title: str) -> None:
    """An image a layer and key/value head: which blocks (x) the query at each position (y) read.

    Args:
        blocks: for each layer int32 ``[T, HK, n]``, padded with -1.
    """
    heads = blocks[0].shape[1]
    figure = Figure(figsize=(1.2 + 3.4 * len(blocks), 0.9 + 4.2 * heads), layout="constrained", dpi=150)
    grid = figure.subplots(heads, len(blocks), squeeze=False, sharex=True, sharey=True)
    for layer, chosen in enumerate(blocks):
        for head in range(heads):
            axes: Axes = grid[head][layer]
            picture = block_picture(chosen[:, head], cfg).numpy()
            axes.imshow(
                picture, cmap=ListedColormap(SHADES), vmin=0, vmax=3, aspect="auto", interpolation="nearest",
                extent=(-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5),
            )  # fmt: skip
            axes.set_title(f"layer {layer + 1}" + (f", key/value head {head + 1}" if heads > 1 else ""), fontsize=10)
            axes.set_xlabel(f"block of {cfg.selection_block_size} tokens" if head == heads - 1 else "")
            axes.set_ylabel("query position" if layer == 0 else "")
    figure.suptitle(title, fontsize=11)
    names = {CHOSEN: "selected by importance", FORCED: "always selected: first and local blocks", UNREAD: "not selected"}
    figure.legend(
        handles=[Patch(facecolor=SHADES[i], label=name) for i, name in names.items()],
        loc="outside lower center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    _save(figure, path)


def block_picture(chosen: Tensor, cfg: NSAConfig) -> Tensor:
    """uint8 ``[T, blocks]`` of ``FUTURE``, ``UNREAD``, ``FORCED``, ``CHOSEN`` for ``chosen [T, n]``."""
    tokens = chosen.shape[0]
    block, own = torch.arange(cfg.num_selection_blocks(tokens)), (torch.arange(tokens) // cfg.selection_block_size)[:, None]
    read = (chosen.cpu()[..., None] == block).any(1)  # [T, blocks]
    forced = (block < cfg.num_initial_blocks) | (block > own - cfg.num_local_blocks)
    picture = torch.full(read.shape, UNREAD, dtype=torch.uint8)
    picture[read] = CHOSEN
    picture[read & forced] = FORCED
    picture[block.expand_as(read) > own] = FUTURE
    return picture


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those before it, up to ``SMOOTHED_OVER`` of them."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - SMOOTHED_OVER) : i + 1] for i in range(len(values)))]


def _save(figure: Any, path: Path) -> None:
    FigureCanvasAgg(figure)  # no display, whatever matplotlib's own default is
    with replacing(path) as temporary:
        figure.savefig(temporary)
