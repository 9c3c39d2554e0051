"""The language model: shapes, causality, caches, and what its twins share."""

import sys
from dataclasses import asdict, replace

import pytest
import torch

from nsa import NSAConfig
from nsa.models import LanguageModel, LMConfig, generate

KINDS = ["nsa", "full", "window"]
NSA = NSAConfig(
    head_dim=8, num_heads=4, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8, num_selected_blocks=4,
    window_size=8,
)  # fmt: skip
CFG = LMConfig(NSA, hidden_size=24, num_layers=2)


def model_of(kind, seed=0, **changes):
    torch.manual_seed(seed)
    return LanguageModel(replace(CFG, attention=kind, **changes)).double().eval()


def tokens_of(batch, length, seed=1):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_one_row_a_token_and_start_near_a_guess(kind):
    model, tokens = model_of(kind), tokens_of(2, 50)
    logits = model(tokens)
    assert logits.shape == (2, 50, 256)
    bits = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) / torch.tensor(2.0).log()
    assert 7.5 < bits < 9.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 7, 23, 38])
def test_a_token_changes_no_logits_before_it(kind, position):
    model, tokens = model_of(kind), tokens_of(1, 40)
    other = tokens.clone()
    other[0, position] = (other[0, position] + 1) % 256
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize(("kind", "reaches"), [("nsa", True), ("full", True), ("window", False)])
def test_only_the_window_forgets(kind, reaches):
    model, tokens = model_of(kind, num_layers=1), tokens_of(1, 64)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 256
    change = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert (change[7] > 0).item()  # the last query whose window of 8 holds token 0
    assert bool((change[8:] > 0).any()) is reaches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[1] * 45, [30] + [1] * 15, [3, 20, 1, 21]])
def test_cached_logits_are_the_uncached(kind, chunks):
    model, tokens = model_of(kind), tokens_of(2, 45)
    caches = model.make_caches(2, 45)
    with torch.no_grad():
        cached = torch.cat([model(part, caches) for part in tokens.split(chunks, 1)], 1)
        torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_full_cache_takes_nothing_more(kind):
    model = model_of(kind)
    caches = model.make_caches(1, 4)
    model(tokens_of(1, 4), caches)
    with pytest.raises(ValueError, match="up to 4 tokens"):
        model(tokens_of(1, 1), caches)


def test_twins_differ_in_gates_compressors_and_branch_projections_only():
    sizes = {kind: {name: p.numel() for name, p in model_of(kind).named_parameters()} for kind in KINDS}
    assert sizes["full"] == sizes["window"]
    extra = {name for name in sizes["nsa"] if name not in sizes["full"]}
    assert extra
    assert all("gate_proj" in name or "compress_" in name for name in extra)
    assert set(sizes["full"]) <= set(sizes["nsa"])
    for name, size in sizes["full"].items():
        own = 3 if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        assert sizes["nsa"][name] == own * size, name
    assert model_of("full").num_parameters() == sum(sizes["full"].values())


def test_an_untied_output_has_weights_of_its_own():
    tied, untied = model_of("full"), model_of("full", tie_embeddings=False)
    assert untied.num_parameters() - tied.num_parameters() == 256 * 24
    assert not torch.equal(untied.output.weight, untied.embedding.weight)


def test_the_seed_decides_the_weights():
    first, again, other = model_of("nsa", 3), model_of("nsa", 3), model_of("nsa", 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = model_of(kind)
    model(tokens_of(2, 40)).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_rounds_the_products_only(kind):
    model, tokens = model_of(kind).float(), tokens_of(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    logits.float().sum().backward()
    exact = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_selected_blocks_are_those_of_every_layer():
    blocks = model_of("nsa").selected_blocks(tokens_of(2, 40))
    assert [b.shape for b in blocks] == [(2, 40, 2, 4)] * 2
    own = (torch.arange(40) // 8)[None, :, None, None]
    assert all(((b == own).sum(-1) == 1).all() for b in blocks)
    with pytest.raises(ValueError, match="attention must be 'nsa'"):
        model_of("full").selected_blocks(tokens_of(1, 8))


def test_a_configuration_survives_json():
    cfg = replace(CFG, attention="window", compressor="mean", tie_embeddings=False)
    assert LMConfig.from_dict(asdict(cfg)) == cfg
    with pytest.raises(ValueError, match=r"unknown fields.*colour"):
        LMConfig.from_dict(asdict(cfg) | {"colour": "red"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention": "sparse"}, ValueError, "attention must be one of nsa, full, window, got 'sparse'"),
        ({"compressor": "max"}, ValueError, "compressor must be one of"),
        ({"num_layers": 0}, ValueError, "num_layers must be positive, got 0"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size must be a whole number, got 2.5"),
        ({"rope_theta": float("inf")}, ValueError, "rope_theta must be positive and finite"),
        ({"nsa": replace(NSA, head_dim=7)}, ValueError, "head_dim must be even for RoPE, got 7"),
        ({"nsa": "small"}, TypeError, "nsa must be an nsa.NSAConfig, got str"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_error(changes, error, message):
    with pytest.raises(error, match=message):
        replace(CFG, **changes)


@pytest.mark.parametrize(
    ("tokens", "error"), [(torch.zeros(2, 4), TypeError), ([[1]], TypeError), (torch.zeros(4, dtype=torch.long), ValueError)]
)
def test_tokens_must_be_a_matrix_of_whole_numbers(tokens, error):
    with pytest.raises(error, match="tokens must be"):
        model_of("full")(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_takes_the_likeliest_token_each_time(kind):
    model, text = model_of(kind), tokens_of(2, 11)
    for token, logits in generate(model, text, 12):
        expected = model(text)[:, -1]
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(token, expected.argmax(-1))
        text = torch.cat([text, token[:, None]], 1)


@pytest.mark.parametrize("lengths", [[11, 4, 7], [1, 11, 11], [5, 5, 5]], ids=str)
def test_prompts_of_different_lengths_are_continued_as_if_alone(lengths, monkeypatch):
    monkeypatch.setattr(sys.modules["nsa.models.generate"], "CHUNK", 4)  # some prompts end in each of the chunks
    model, text = model_of("nsa"), tokens_of(3, 11)
    together = list(generate(model, text, 12, lengths=lengths))
    for b, length in enumerate(lengths):
        for (token, logits), (wanted, wanted_logits) in zip(together, generate(model, text[b : b + 1, :length], 12)):
            torch.testing.assert_close(logits[b], wanted_logits[0], rtol=0, atol=1e-5)
            assert token[b] == wanted[0]


def test_lengths_are_checked():
    for kind, lengths, message in [
        ("nsa", [4], "lengths must be 2 numbers from 1 to 8"),
        ("nsa", [4, 9], "lengths must be 2 numbers from 1 to 8"),
        ("nsa", [0, 8], "lengths must be 2 numbers from 1 to 8"),
        ("full", [4, 8], "lengths must be equal for attention='full'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(generate(model_of(kind), tokens_of(2, 8), 3, lengths=lengths))


def test_draws_follow_the_seed_and_the_temperature():
    model, prompt = model_of("full"), tokens_of(1, 8)

    def sample(seed, temperature):
        draws = torch.Generator().manual_seed(seed)
        return [t.item() for t, _ in generate(model, prompt, 20, temperature=temperature, generator=draws)]

    assert sample(0, 1.0) == sample(0, 1.0)
    assert sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-4) == sample(1, 0.0)


@pytest.mark.parametrize(
    ("count", "temperature", "prompt", "name"),
    [(-1, 0.0, 4, "max_new_tokens"), (1, -0.5, 4, "temperature"), (1, float("nan"), 4, "temperature"), (1, 0.0, 0, "prompt")],
)
def test_generation_names_bad_arguments(count, temperature, prompt, name):
    with pytest.raises(ValueError, match=name):
        next(generate(model_of("full"), tokens_of(1, prompt), count, temperature=temperature))
