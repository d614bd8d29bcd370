"""Writing on a GPU: the captured graph against the same steps one by one."""

import pytest
import torch
from mambazoo.zoo import generate as writing
from mambazoo.zoo.generate import Sampling, Writer, generate
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.optim import cast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.2),
    Sampling(seed=1),
    Sampling(top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
]


def build(dtype: torch.dtype, vocab_size: int = 5003, **backbone: object) -> LanguageModel:
    model = LanguageModel({"d_model": 64, "n_layers": 3, **backbone}, vocab_size=vocab_size)
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    return cast(model, dtype).cuda().eval()  # type: ignore[return-value]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "repeatable", lambda call, device: call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 130])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_graph_writes_what_single_steps_write(
    sampling: Sampling, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype)
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(batch)]
    options = {"stop": 17, "seeds": list(range(batch))}
    graph = list(generate(model, prompts, 40, sampling, **options))
    one_by_one(monkeypatch)
    assert list(generate(model, prompts, 40, sampling, **options)) == graph


@pytest.mark.parametrize(
    "values",
    [
        {"mamba": {"a_init": "s4d-lin"}},
        {"mamba": {"selective": []}},
        {"d_mlp": 64},
        {"pattern": "s4d"},
        {"pattern": "mamba*2 + attention", "attention": {"window": 16}},
        {"pattern": "lstm"},
        {"pool": [2, 3], "n_layers": 1, "stages": [{"pattern": "s4d", "s4d": {"block": "s4"}}]},
    ],
    ids=str,
)
def test_other_mixers_are_captured_too(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(torch.float32, vocab_size=50, **values)
    graph = list(generate(model, [[1, 2], [3, 4]], 20, Sampling()))
    one_by_one(monkeypatch)
    assert list(generate(model, [[1, 2], [3, 4]], 20, Sampling())) == graph


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@torch.inference_mode()
def test_a_step_never_waits_for_the_gpu(sampling: Sampling) -> None:
    writer = Writer(build(torch.bfloat16), [[1, 2], [3]], sampling, seeds=[0, 1])
    writer.advance()
    writer.advance()
    assert writer._steps is not None
    assert writer._steps[()][0] != writer._move_on
    torch.cuda.set_sync_debug_mode("error")
    try:
        writer._move_on()
        writer.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_two_writers_keep_apart() -> None:
    model = build(torch.float32)
    alone = list(writing._read_behind(Writer(model, [[5]], Sampling(), seeds=[0]), 20))
    first, second = (writing._read_behind(Writer(model, [[5]], Sampling(), seeds=[0]), 20) for _ in range(2))
    assert list(zip(first, second, strict=True)) == list(zip(alone, alone, strict=True))
