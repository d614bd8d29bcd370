"""Sampling: each sequence as if alone, from a state that does not grow."""

from collections.abc import Callable

import pytest
import torch
from mambazoo.zoo import generate as writing
from mambazoo.zoo.generate import Sampling, Writer, generate, leaves, prefill, sample
from mambazoo.zoo.language import LanguageModel

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [5, 5, 5, 5]]


@pytest.fixture(params=["mamba", "mamba + attention", "lstm"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    config = {"d_model": 32, "n_layers": 2, "pattern": request.param, "attention": {"window": 24}}
    model = LanguageModel(config, vocab_size=20)
    # spread the logits, so that ties are no matter of rounding
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    return model.eval()


def continue_(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling, **options: object
) -> list[list[int | None]]:
    steps = list(generate(model, prompts, 30, sampling, **options))  # type: ignore[arg-type]
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(seed=3), Sampling(top_k=5, repetition_penalty=1.3)]
)
def test_a_batch_gives_each_prompt_what_it_gives_alone(model: LanguageModel, sampling: Sampling) -> None:
    together = continue_(model, PROMPTS, sampling)
    assert together == [continue_(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert len(together[0]) == 30


@torch.no_grad()
def test_greedy_text_is_the_forwards(model: LanguageModel) -> None:
    [text] = continue_(model, [PROMPTS[0]], Sampling(temperature=0))
    tokens = PROMPTS[0].copy()
    for token in text:
        assert model(torch.tensor([tokens]))[0][0, -1].argmax() == token
        tokens.append(token)  # type: ignore[arg-type]


def test_a_sequence_ends_where_it_draws_the_stop(model: LanguageModel) -> None:
    free = continue_(model, PROMPTS, Sampling(seed=1))
    stop = free[0][4]
    ended = continue_(model, PROMPTS, Sampling(seed=1), stop=stop)
    for with_, without in zip(ended, free, strict=True):
        end = without.index(stop) if stop in without else len(without)
        assert with_[:end] == without[: min(end, len(with_))]
        assert all(token is None for token in with_[end:])


def test_seeds_decide(model: LanguageModel) -> None:
    [a], [b] = (continue_(model, [[3]], Sampling(seed=seed)) for seed in (0, 1))
    assert a != b
    assert continue_(model, [[3], [3]], Sampling(), seeds=[0, 1]) == [a, b]


@torch.no_grad()
def test_the_state_is_as_large_after_any_prompt(model: LanguageModel) -> None:
    sizes = []
    for length in (1, 500):
        _, state = prefill(model, [[2] * length])
        sizes.append([tensor.shape for layer in state for tensor in layer])
    assert sizes[0] == sizes[1]


class Replacing(LanguageModel):
    """Steps that give new tensors back and leave the old ones alone."""

    def step(self, tokens: torch.Tensor, state: list[object]) -> tuple[torch.Tensor, list[object]]:
        return super().step(tokens, [type(layer)(*(x.clone() for x in layer)) for layer in state])


class Counting(Replacing):
    """Steps that keep a number beside the tensors."""

    def step(self, tokens: torch.Tensor, state: list[object]) -> tuple[torch.Tensor, list[object]]:
        logits, after = super().step(tokens, state[:-1])
        return logits, [*after, state[-1] + 1]


@pytest.mark.parametrize("kind", [LanguageModel, Replacing, Counting])
@torch.inference_mode()
def test_steps_that_can_be_repeated_in_place_are(
    model: LanguageModel, kind: type[LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    [text] = continue_(model, [[3, 4]], Sampling(seed=2))
    captured: list[Callable[[], object]] = []
    monkeypatch.setattr(writing, "repeatable", lambda call, device: captured.append(call) or call)
    other = kind(model.backbone.config.to_dict(), vocab_size=20).eval()
    other.load_state_dict(model.state_dict())
    writer = Writer(other, [[3, 4]], Sampling(), seeds=[2])
    if kind is Counting:
        writer.state.append(0)
    places = [x.data_ptr() for x in leaves(writer.state) if isinstance(x, torch.Tensor)]
    for i, token in enumerate(text):
        if i:
            writer.advance()
        assert writer.tokens.tolist() == [token]
    assert [x.data_ptr() for x in leaves(writer.state) if isinstance(x, torch.Tensor)] == places
    # one that counts never takes the same turn twice
    assert len(captured) == (kind is not Counting)


@pytest.mark.parametrize("length", [1, 4, 6, 11])
def test_steps_that_take_turns_are_captured_one_by_one(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(
        {"d_model": 16, "n_layers": 1, "pool": [2, 3], "pattern": "s4d"}, vocab_size=20
    ).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    captured: list[Callable[[], object]] = []
    monkeypatch.setattr(writing, "repeatable", lambda call, device: captured.append(call) or call)
    prompts = [torch.randint(20, (length,)).tolist() for _ in range(2)]
    texts = continue_(model, prompts, Sampling(temperature=0))
    assert len(captured) == 6
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + text]))
        assert logits[0, length - 1 : -1].argmax(-1).tolist() == text
    with pytest.raises(ValueError, match="one length modulo 6"):
        continue_(model, [[1], [1, 2]], Sampling())


@torch.no_grad()
def test_a_state_is_written_on_from(model: LanguageModel) -> None:
    [text] = continue_(model, [PROMPTS[0]], Sampling(seed=1))
    _, state = model(torch.tensor([PROMPTS[0][:5]]), state=model.init_state(1))
    assert continue_(model, [PROMPTS[0][5:]], Sampling(seed=1), state=state) == [text]


def test_random_numbers_do_not_depend_on_how_many_are_drawn_at_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for block in (1, 7, 1024):
        monkeypatch.setattr(Writer, "BLOCK", block)
        texts.append(continue_(model, [[3], [4, 5]], Sampling(), seeds=[0, 1]))
    assert texts[0] == texts[1] == texts[2]


@torch.inference_mode()
def test_reading_behind_changes_nothing(model: LanguageModel) -> None:
    texts = []
    for ahead in (0, 1, 3):
        writer = Writer(model, [[3], [4, 5]], Sampling(), seeds=[0, 1])
        writer.ahead = ahead
        texts.append(list(writing._read_behind(writer, 30)))
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 30


def test_as_much_is_written_as_asked_for(model: LanguageModel) -> None:
    assert list(generate(model, [[3]], 0)) == []
    assert len(list(generate(model, [[3]], 1))) == 1


def draw_many(logits: list[float], sampling: Sampling, seen: list[bool] | None = None) -> set[int]:
    count = 2000
    rows = torch.tensor([logits]).expand(count, -1)
    marks = torch.tensor([seen or [False] * len(logits)]).expand(count, -1)
    return set(
        sample(rows, torch.linspace(0, 1 - 1e-9, count, dtype=torch.float64), sampling, marks).tolist()
    )


def test_each_rule_keeps_what_it_says() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2])).tolist()
    assert draw_many(logits, Sampling()) == {0, 1, 2, 3}
    assert draw_many(logits, Sampling(temperature=0)) == {1}
    assert draw_many(logits, Sampling(top_k=2)) == {1, 2}
    assert draw_many(logits, Sampling(top_p=0.65)) == {1, 2}
    assert draw_many(logits, Sampling(top_p=0.75)) == {1, 2, 3}
    assert draw_many(logits, Sampling(min_p=0.7)) == {1, 2}
    assert draw_many([1.0, 1.1], Sampling(temperature=0, repetition_penalty=1.5), [False, True]) == {0}


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    draws = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    rows = torch.log(p)[None].expand(1000, -1)
    counts = torch.bincount(
        sample(rows, draws, Sampling(), torch.zeros(1000, 4, dtype=torch.bool)), minlength=4
    )
    torch.testing.assert_close(counts / 1000, p, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_impossible_rules_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]


def test_tokens_outside_the_vocabulary_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="from 0 to 19"):
        next(generate(model, [[25]], 1))


@pytest.mark.parametrize(("prompts", "seeds"), [([], None), ([[1], [1]], [7]), ([[1], [1]], [1, 2, 3])])
def test_prompts_and_seeds_have_to_match(prompts: list[list[int]], seeds: list[int] | None) -> None:
    model = LanguageModel({"d_model": 16, "n_layers": 1}, vocab_size=20)
    with pytest.raises(ValueError, match=r"prompts|seeds"):
        list(generate(model, prompts, 3, seeds=seeds))
