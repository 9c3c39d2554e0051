"""``nsa demo``: train three models, compare them, look at what was selected, and decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.cli.device import pick_device
from nsa.cli.progress import TrainProgress, describe_corpus
from nsa.train import Corpus, Run, read_corpus
from nsa.train.atomic import replacing
from nsa.train.presets import PRESETS, Preset, preset

if TYPE_CHECKING:
    from nsa.demo import DecodeCheck, Twin

SHOWN_PROMPT = SHOWN_CONTINUATION = 200  # bytes
TEMPERATURES = (0.0, 0.8)  # greedy text soon repeats itself: drawn text tests the cache harder


def demo(
    out: Annotated[Path, typer.Option(help="Where metrics, checkpoints and pictures go.")] = Path("runs/demo"),
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A file or folder of text; may be repeated. Default: Python's own source."),
    ] = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help=f"{', '.join(PRESETS)}. Default: tiny, on a GPU small.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Train a small NSA model and two twins, with full attention and with the window alone, and compare them.

    Draws loss.png and blocks.png, then checks the cached decoder against the uncached forward.
    """
    from nsa.demo import train_twins  # here, because it takes matplotlib, which no other command needs

    console, place = Console(soft_wrap=True), pick_device(device)
    name, chosen = preset(preset_name, place)
    paths = tuple(str(p.resolve()) for p in data) if data else None
    corpus = read_corpus(paths)
    describe_corpus(console, corpus)
    console.print(f"preset {name} on {place}: {_describe(chosen)}\n", highlight=False)
    twins = list(train_twins(chosen, corpus, out, place, _watcher(console), paths))
    console.print(_table(twins, chosen.train.context))
    console.print(
        "reads: rows of keys that all queries read, over those that full attention reads. For NSA: compressed blocks,\n"
        "selected tokens and the window; each has keys of its own, so a token in two of them counts twice.\n",
        highlight=False,
    )
    checks = _decode(twins[0], corpus, chosen, console)
    _draw(twins, corpus, chosen, out)
    _write_results(out / "results.json", name, twins, checks)
    console.print(f"\npictures: {out / 'loss.png'}, {out / 'blocks.png'}; the numbers: {out / 'results.json'}", highlight=False)
    mismatches = sum(check.mismatches for check in checks)
    if mismatches:
        raise ValueError(f"the cached decoder differs from the uncached forward at {mismatches} positions")


def _describe(chosen: Preset) -> str:
    model, train, cfg = chosen.model, chosen.train, chosen.model.nsa
    return (
        f"{model.num_layers} layers, width {model.hidden_size}, "
        f"{train.steps} steps of {train.batch_size} x {train.context} bytes\n"
        f"NSA: blocks of {cfg.block_length} every {cfg.block_stride} tokens, {cfg.num_selected_blocks} selected of "
        f"{cfg.selection_block_size} tokens, window {cfg.window_size}"
    )


def _watcher(console: Console) -> Callable[[Run], AbstractContextManager[Callable[[dict[str, Any]], None]]]:
    @contextmanager
    def watch(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
        with TrainProgress(console, run, run.model.cfg.attention) as progress:
            yield progress.on_step

    return watch


def _table(twins: list[Twin], context: int) -> Table:
    full = next(twin.validation for twin in twins if twin.attention == "full")
    table = Table(title=f"after the same batches, context {context}")
    for heading in ("attention", "parameters", "validation bits/byte", "vs full", "reads", "seconds"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for twin in twins:
        table.add_row(
            twin.attention, f"{twin.model.num_parameters():,}", f"{twin.validation:.3f}", f"{twin.validation / full - 1:+.1%}",
            f"{twin.read:.0%}", f"{twin.seconds:.0f}",
        )  # fmt: skip
    return table


def _decode(twin: Twin, corpus: Corpus, chosen: Preset, console: Console) -> list[DecodeCheck]:
    """The first three quarters of a context from the validation text, continued twice by the last quarter."""
    from nsa.demo import check_decode

    device = next(twin.model.parameters()).device
    length = chosen.train.context * 3 // 4
    prompt = corpus.validation[:length].long().to(device)
    console.print(Text("a prompt from the validation text, continued with the cached decoder:", style="bold"))
    console.print(Text("..." + bytes(prompt[-SHOWN_PROMPT:].tolist()).decode(errors="replace")))
    checks = []
    for temperature in TEMPERATURES:
        check = check_decode(twin.model, prompt, chosen.train.context - length, temperature)
        how = "greedily" if temperature == 0 else f"drawn at temperature {temperature}"
        console.print(Text(f"\n{how}:", style="bold"))
        console.print(Text(check.continuation[:SHOWN_CONTINUATION].decode(errors="replace"), style="green"))
        console.print(_verdict(check), highlight=False)
        checks.append(check)
    return checks


def _verdict(check: DecodeCheck) -> str:
    differing = check.mismatches + check.near_ties
    likeliest = (
        f"another byte is likeliest at {differing}, {check.near_ties} of them near ties"
        if differing
        else "the same byte is likeliest at each"
    )
    return (
        f"cached against uncached at {len(check.continuation)} positions: {likeliest}; "
        f"logits differ by at most {check.max_difference:.1e}; {check.tokens_per_second:.0f} tokens/s"
    )


def _draw(twins: list[Twin], corpus: Corpus, chosen: Preset, out: Path) -> None:
    from nsa.demo import draw_blocks, draw_losses

    model, context, cfg = twins[0].model, chosen.train.context, chosen.model.nsa
    draw_losses(
        out / "loss.png",
        twins,
        f"{chosen.model.num_layers} layers, width {chosen.model.hidden_size}, context {context}, the same batches",
    )
    text = corpus.validation[:context].long().to(next(model.parameters()).device)
    blocks = [layer[0] for layer in model.selected_blocks(text[None])]
    title = f"the {cfg.num_selected_blocks} blocks that each query selected in {context} bytes of validation text"
    draw_blocks(out / "blocks.png", blocks, cfg, title)


def _write_results(path: Path, name: str, twins: list[Twin], checks: list[DecodeCheck]) -> None:
    rows = [
        {
            "attention": twin.attention, "parameters": twin.model.num_parameters(), "validation_bits_per_byte": twin.validation,
            "reads": round(twin.read, 4), "seconds": round(twin.seconds, 1),
        }
        for twin in twins
    ]  # fmt: skip
    decode = [asdict(check) | {"continuation": check.continuation.decode(errors="replace")} for check in checks]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"preset": name, "twins": rows, "decode": decode}, indent=2) + "\n", encoding="utf-8")
