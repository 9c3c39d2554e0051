"""The demo end to end, in its smallest preset, and its parts."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nsa import NSAConfig
from nsa.cli import app
from nsa.demo import check_decode, share_of_tokens_read
from nsa.demo.plots import CHOSEN, FORCED, FUTURE, UNREAD, block_picture
from nsa.models import LanguageModel, LMConfig
from nsa.train.metrics import read_metrics
from nsa.train.presets import PRESETS

CFG = NSAConfig(
    head_dim=8, num_heads=2, num_kv_heads=1, block_length=8, block_stride=4, selection_block_size=8, num_selected_blocks=4,
    window_size=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / "text" / f"{i}.txt").write_text(f"line {i} of a text that repeats itself\n" * 30)
    command = ["demo", "--preset", "micro", "--device", "cpu", "--data", folder / "text", "--out", folder / "out"]
    results = [CliRunner().invoke(app, [str(a) for a in command]) for _ in range(2)]  # the second replaces the first
    return folder / "out", results


def test_the_demo_prints_the_three_models_and_the_check(demo):
    _, results = demo
    for result in results:
        assert result.exit_code == 0, result.output
        for word in ("nsa", "full", "window", "bits/byte", "reads", "100%", "cached against uncached at 16 positions"):
            assert word in result.output


def test_the_demo_leaves_pictures_numbers_metrics_and_checkpoints(demo):
    out, _ = demo
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    runs = {f"{kind}/{name}" for kind in ("nsa", "full", "window") for name in ("metrics.jsonl", "checkpoint.safetensors")}
    assert found == {"loss.png", "blocks.png", "results.json"} | runs
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "blocks.png"))
    results = json.loads((out / "results.json").read_text())
    for twin in results["twins"]:
        lines = read_metrics(out / twin["attention"] / "metrics.jsonl")
        assert len(lines) == PRESETS["micro"].train.steps
        assert twin["validation_bits_per_byte"] == lines[-1]["validation_bits_per_byte"]
    assert [check["temperature"] for check in results["decode"]] == [0.0, 0.8]
    for check in results["decode"]:
        assert check["mismatches"] == 0
        assert check["max_difference"] < 1e-3


def rows_read_by_hand(cfg, context):
    """Loops over every query: compressed blocks that ended, tokens of the selected blocks, tokens of the window."""
    read = 0
    for t in range(context):
        read += sum(1 for i in range(context) if i * cfg.block_stride + cfg.block_length - 1 <= t)
        candidates = t // cfg.selection_block_size + 1
        chosen = [candidates - 1, *range(min(candidates - 1, cfg.num_selected_blocks - 1))]  # its own, and any others
        read += sum(1 for u in range(t + 1) if u // cfg.selection_block_size in chosen)
        read += sum(1 for u in range(t + 1) if u > t - cfg.window_size)
    return read / (context * (context + 1) / 2)


@pytest.mark.parametrize("context", [1, 7, 8, 33, 100])
def test_the_share_of_tokens_read_is_counted_right(context):
    assert share_of_tokens_read(LMConfig(CFG, "nsa"), context) == pytest.approx(rows_read_by_hand(CFG, context))
    assert share_of_tokens_read(LMConfig(CFG, "full"), context) == 1
    window = sum(min(t + 1, 10) for t in range(context)) / (context * (context + 1) / 2)
    assert share_of_tokens_read(LMConfig(CFG, "window"), context) == pytest.approx(window)


def test_presets_are_sparse_at_their_context():
    for name in ("tiny", "small"):
        model, train = PRESETS[name].model, PRESETS[name].train
        assert train.context >= 1024
        assert share_of_tokens_read(model, train.context) < 0.6
    tiny = PRESETS["tiny"].model.nsa
    assert tiny.window_size <= 128
    assert tiny.num_selected_blocks * tiny.selection_block_size <= 256


def test_a_picture_shows_what_was_read_forced_and_unread():
    chosen = torch.full((48, 4), -1)
    chosen[47] = torch.tensor([0, 3, 4, 5])
    picture = block_picture(chosen, CFG)
    assert picture[47].tolist() == [FORCED, UNREAD, UNREAD, CHOSEN, FORCED, FORCED]
    assert picture[20].tolist() == [UNREAD, UNREAD, UNREAD, FUTURE, FUTURE, FUTURE]


def test_the_decode_check_sees_a_wrong_cache(monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(CFG, hidden_size=32, num_layers=2)).eval()
    prompt = torch.randint(256, (40,))
    for temperature in (0.0, 0.8):
        right = check_decode(model, prompt, 12, temperature)
        assert (right.mismatches, right.near_ties, len(right.continuation)) == (0, 0, 12)
        assert right.max_difference < 1e-4
    caches = model.make_caches

    def forgetful(*sizes):
        made = caches(*sizes)
        for cache in made:
            cache._append_blocks = lambda *_: None  # blocks that complete later stay 0
        return made

    monkeypatch.setattr(model, "make_caches", forgetful)
    wrong = check_decode(model, prompt, 48, 0.8)
    assert wrong.max_difference > 1e-3
    assert wrong.mismatches > 0
