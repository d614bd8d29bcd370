"""The control that keeps all it has seen: against attention written out, within its window, at any place, both ways."""

from itertools import pairwise

import pytest
import torch
from mambazoo.checkpoints.io import from_pretrained, save_pretrained
from mambazoo.zoo.attention import Attention, BidirectionalAttention
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.config import AttentionConfig, BackboneConfig
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.lstm import LSTM
from mambazoo.zoo.optim import cast, decays

KINDS = pytest.mark.parametrize("kind", [Attention, BidirectionalAttention])


def written_out(mixer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attention as the formula has it, turning complex numbers."""
    b, l, _ = x.shape
    q, k, v = mixer.in_proj(x).view(b, l, 3, mixer.heads, mixer.d_head).unbind(2)
    half = mixer.d_head // 2
    turns = torch.polar(
        torch.ones(l, half, dtype=torch.float64),
        torch.outer(torch.arange(l).double(), 10000.0 ** (-torch.arange(half).double() / half)),
    )[:, None]
    q, k = (torch.complex(a[..., :half], a[..., half:]) * turns for a in (q, k))
    scores = torch.einsum("bthd,bshd->bhts", q, k.conj()).real / mixer.d_head**0.5
    back = torch.arange(l)[:, None] - torch.arange(l)
    distance = back.abs() if isinstance(mixer, BidirectionalAttention) else back
    scores = scores.masked_fill((distance < 0) | (distance >= mixer.window), float("-inf"))
    return mixer.out_proj(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))


@KINDS
@pytest.mark.parametrize("window", [1, 7, 30, 31, 64])
@pytest.mark.parametrize("d_head", [4, 12])
def test_it_is_attention_gradients_too(kind: type[Attention], window: int, d_head: int) -> None:
    mixer = kind(12, AttentionConfig(d_head=d_head, window=window)).double()
    x = torch.randn(2, 31, 12, dtype=torch.float64, requires_grad=True)
    found, expected, weight = mixer(x)[0], written_out(mixer, x), torch.randn(2, 31, 12).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = [x, *mixer.parameters()]
    pairs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [3, 20])
@torch.no_grad()
def test_a_long_part_is_read_some_tokens_at_a_time(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "PART", 4)
    config, x = AttentionConfig(d_head=8, window=window), torch.randn(2, 31, 16).double()
    mixer, both = Attention(16, config).double(), BidirectionalAttention(16, config).double()
    y, _ = mixer(x, state=mixer.init_state(2))
    torch.testing.assert_close(y, written_out(mixer, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(both(x)[0], written_out(both, x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_only_distances_count_even_far_away() -> None:
    mixer = Attention(16, AttentionConfig(d_head=8, window=8)).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    near, _ = mixer(x)
    state = mixer.init_state(1)
    far, _ = mixer(x, state=state._replace(seen=state.seen + 2**26))
    # of what came before the first of these there is nothing left
    torch.testing.assert_close(far[:, 8:], near[:, 8:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("mixer", [Attention(16, AttentionConfig(d_head=8)), LSTM(16, BackboneConfig().lstm)])
def test_gradients_reach_through_the_state(mixer: Attention | LSTM) -> None:
    mixer, x = mixer.double(), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(mixer(x)[0][:, -1].sum(), x)[0]
    _, state = mixer(x[:, :5], state=mixer.init_state(2))
    y, _ = mixer(x[:, 5:], state=state)
    torch.testing.assert_close(torch.autograd.grad(y[:, -1].sum(), x)[0], whole)


@torch.no_grad()
def test_weights_of_16_bits_step_as_they_read() -> None:
    for pattern in ("attention", "lstm"):
        config = BackboneConfig.from_dict({"d_model": 32, "n_layers": 2, "pattern": pattern})
        model, x = cast(Backbone(config), torch.bfloat16).eval(), torch.randn(1, 20, 32).bfloat16()
        state = model.init_state(1)
        rows = torch.stack([model.step(x[:, t], state)[0] for t in range(20)], 1)
        torch.testing.assert_close(rows, model(x)[0], rtol=0.05, atol=0.05)


@KINDS
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("window", [4, 6, 64])
def test_packed_sequences_equal_each_alone_gradients_too(
    kind: type[Attention], window: int, rows: int
) -> None:
    mixer = kind(16, AttentionConfig(d_head=8, window=window)).double()
    x, weight = torch.randn(rows, 32, 16).double().requires_grad_(), torch.randn(rows, 32, 16).double()
    # of five, six and seven tokens are of one rectangle, where the window holds them
    bounds = [0, 0, 5, 6, 6, 19, 19, 25, 32]
    packed, _ = mixer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    alone = torch.cat([mixer(x[:, a:b])[0] for a, b in pairwise(bounds) if a < b], 1)
    torch.testing.assert_close(packed, alone)
    inputs = [x, *mixer.parameters()]
    pairs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (packed, alone))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bidirectional", ["tied", "untied"])
def test_both_sides_are_seen_in_one_pass(bidirectional: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"d_model": 16, "n_layers": 1, "pattern": "attention", "attention": {"d_head": 8}}
    model = Backbone(BackboneConfig.from_dict({**values, "bidirectional": bidirectional})).double()
    causal = Backbone(BackboneConfig.from_dict(values))
    assert model.state_dict().keys() == causal.state_dict().keys()
    passes, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *rows, **options: passes.append(options) or attend(*rows, **options),
    )
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y, state = model(x)
    assert state is None
    assert passes == [{"attn_mask": None}]
    for t in range(9):
        (seen,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert (seen[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("pattern", ["attention", "mamba + attention"])
@torch.no_grad()
def test_padding_moves_no_class(pattern: str, window: int) -> None:
    attention = {"d_head": 8, "window": window}
    backbone = {"d_model": 16, "n_layers": 2, "pattern": pattern, "attention": attention}
    model = SequenceClassifier({**backbone, "bidirectional": "tied"}, vocab_size=9, num_classes=3).eval()
    tokens, lengths = torch.randint(9, (3, 13)), torch.tensor([13, 5, 1])
    logits = model(tokens, lengths)
    for row, length, found in zip(tokens, lengths.tolist(), logits, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], found, rtol=1e-5, atol=1e-5)
    tokens[1, 5:] = 0
    torch.testing.assert_close(model(tokens, lengths), logits, rtol=1e-5, atol=1e-5)


def test_there_is_no_state_where_both_sides_are_seen() -> None:
    mixer, x = BidirectionalAttention(16, AttentionConfig(d_head=8)), torch.randn(1, 5, 16)
    state = Attention(16, AttentionConfig(d_head=8)).init_state(1)
    for call in (
        lambda: mixer.init_state(1),
        lambda: mixer.step(x[:, 0], state),
        lambda: mixer(x, state=state),
    ):
        with pytest.raises(ValueError, match="give it whole sequences"):
            call()


def test_autocast_keeps_close_where_both_sides_are_seen() -> None:
    values = {"d_model": 32, "n_layers": 3, "pattern": "attention", "bidirectional": "tied"}
    model, x = Backbone(BackboneConfig.from_dict(values)), torch.randn(1, 40, 32)
    bounds = torch.tensor([0, 11, 40], dtype=torch.int32)
    expected, _ = model(x, cu_seqlens=bounds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(x, cu_seqlens=bounds)
    assert (y.float() - expected).abs().max() < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    config, x = AttentionConfig(d_head=8, window=7), torch.randn(1, 11, 16)
    for model in (Attention(16, config), BidirectionalAttention(16, config)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for bounds in (None, torch.tensor([0, 4, 4, 11], dtype=torch.int32)):
            torch.testing.assert_close(compiled(x, cu_seqlens=bounds)[0], model(x, cu_seqlens=bounds)[0])
    model = Attention(16, config)
    step, state = torch.compile(model.step, fullgraph=True, backend="aot_eager"), model.init_state(1)
    for t in range(11):
        torch.testing.assert_close(step(x[:, t], state)[0], model(x)[0][:, t])


def test_what_adds_to_the_stream_starts_smaller_the_more_there_is() -> None:
    model = Backbone(
        BackboneConfig.from_dict({"d_model": 64, "n_layers": 8, "pattern": "lstm*3 + attention"})
    )
    # eight mixers and the MLPs of two of them
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            bound = weight.shape[1] ** -0.5 / 10**0.5
            assert 0.9 * bound < weight.abs().max() <= bound


def test_controls_start_and_decay_as_the_rest_of_the_backbone() -> None:
    config = BackboneConfig.from_dict(
        {"d_model": 64, "n_layers": 4, "d_mlp": 96, "pattern": "attention + lstm"}
    )
    model = Backbone(config)
    bound = 64**-0.5 / 8**0.5
    for block in model.blocks:
        assert 0.9 * bound < block.mixer.out_proj.weight.abs().max() <= bound
    assert {name.removeprefix("layers.1.") for name, p in model.named_parameters() if not decays(name, p)} >= {
        "norm.weight", "norm2.weight", "mixer.lstm.bias_ih_l0", "mixer.lstm.bias_hh_l0",
    }  # fmt: skip
    assert all(decays(name, p) for name, p in model.named_parameters() if p.ndim == 2)


@torch.no_grad()
def test_a_hybrid_comes_back_from_a_file(tmp_path: object) -> None:
    values = {"d_model": 16, "n_layers": 3, "pattern": "mamba + attention + lstm", "attention": {"d_head": 4}}
    model = LanguageModel(values, vocab_size=20).eval()
    save_pretrained(model, None, tmp_path / "model")  # type: ignore[operator]
    again, tokens = from_pretrained(tmp_path / "model"), torch.randint(20, (1, 9))  # type: ignore[operator]
    assert torch.equal(again(tokens)[0], model(tokens)[0])


def test_the_transformer_of_the_papers_size() -> None:
    config = BackboneConfig.from_dict({"size": "transformer-125m"})
    with torch.device("meta"):
        model = Backbone(config)
    # 12 layers of 4 d^2 for attention and 8 d^2 for its MLP
    assert sum(p.numel() for p in model.parameters()) == 12 * 12 * 768**2 + 25 * 768
    assert model.layers[0].mixer.heads == 12


@pytest.mark.parametrize("d_model", [64, 128, 256, 512, 768, 1024, 2048, 2560])
def test_a_layer_has_as_many_parameters_as_two_of_mamba(d_model: int) -> None:
    def parameters(**values: object) -> int:
        with torch.device("meta"):
            model = Backbone(BackboneConfig.from_dict({"d_model": d_model, **values}))
        return sum(p.numel() for p in model.parameters())

    transformer = parameters(n_layers=1, pattern="attention")
    assert transformer == pytest.approx(parameters(n_layers=2, pattern="mamba"), rel=0.1)


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"attention.d_head: must be even and divide the width of 96, not 64"
    ):
        Backbone(BackboneConfig(d_model=96, n_layers=1, pattern="attention"))
    with pytest.raises(ValueError, match=r"attention.d_head: must be even"):
        AttentionConfig(d_head=5)
    with pytest.raises(
        ValueError, match=r"attention.d_head: must be even and divide the width of 17, not 17"
    ):
        Backbone(BackboneConfig(d_model=17, n_layers=1, pattern="attention"))
