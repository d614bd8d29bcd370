"""Draw the pictures of mamba.md: python docs/plots.py, about a minute on two cores; the same picture every time."""

from pathlib import Path
from typing import Any

import torch
from mambazoo.kernels.reference import selective_scan
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import S4DConfig
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.mamba import Mamba
from mambazoo.zoo.s4d import S4D
from matplotlib.figure import Figure
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
# a row of selective copying: noise with DATA tokens among it, then a marker for each token to be said again
NOISE, KINDS, DATA, CONTEXT = 0, 4, 3, 20
MARKER = KINDS + 1
STEPS, BATCH = 400, 64


def main() -> None:
    save(draw_kernels(), "s4d-kernel")
    save(draw_delta(), "delta-memory")
    save(draw_gates(), "selective-copying-gates")


def save(figure: Figure, name: str) -> None:
    # without the version that made it, so that equal pictures are equal files
    figure.savefig(FOLDER / f"{name}.png", dpi=90, metadata={"Software": None})


def new_figure(across: int = 1, height: float = 2.8, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(1, across, **options)


@torch.no_grad()
def draw_kernels() -> Figure:
    """The convolution's kernel of three channels, by their step, for complex and for real A."""
    figure, panels = new_figure(2)
    for axes, (a_init, title) in zip(
        panels, (("s4d-lin", "complex A: -1/2 + πn i"), ("s4d-real", "real A: -(n + 1)")), strict=True
    ):
        torch.manual_seed(1)
        layer = S4D(3, S4DConfig(block="s4", a_init=a_init, d_state=16))
        layer.dt_bias.copy_(torch.log(torch.expm1(torch.tensor([0.003, 0.01, 0.03]))))
        for kernel, step in zip(layer.kernel(512), (0.003, 0.01, 0.03), strict=True):
            axes.plot((kernel / kernel.abs().max()).numpy(), label=f"Δ = {step}", linewidth=1)
        axes.set(title=title, xlabel="steps ago")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("kernel, its largest value 1")
    panels[1].legend()
    return figure


def draw_delta() -> Figure:
    """One state with A = -1 that reads three inputs: with small steps, with large ones, with a chosen one."""
    l = 60
    u = torch.zeros(1, l, 1)
    u[0, [5, 25, 45], 0] = torch.tensor([1.0, -1.0, 0.6])
    chosen = torch.full((l,), 0.002)
    chosen[25] = 4.0
    cases = {
        "Δ = 0.02 always": torch.full((l,), 0.02),
        "Δ = 0.5 always": torch.full((l,), 0.5),
        "Δ = 4 at step 25": chosen,
    }
    figure, panels = new_figure(3, sharey=True)
    one = torch.ones(1, 1)
    for axes, (title, delta) in zip(panels, cases.items(), strict=True):
        h, _ = selective_scan(u, delta[None, :, None], -one, one, one, discretization="zoh")
        axes.stem(range(l), u[0, :, 0].numpy(), linefmt="C7-", markerfmt=" ", basefmt=" ", label="input")
        axes.plot((h[0, :, 0] / h.abs().max()).numpy(), label="state")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    return figure


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of selective copying and their targets, (count, CONTEXT + DATA)."""
    data = torch.randint(1, KINDS + 1, (count, DATA), generator=generator)
    places = torch.rand(count, CONTEXT, generator=generator).argsort(1)[:, :DATA].sort(1).values
    inputs = torch.full((count, CONTEXT + DATA), NOISE)
    inputs.scatter_(1, places, data)
    inputs[:, CONTEXT:] = MARKER
    targets = torch.full_like(inputs, -100)
    targets[:, CONTEXT:] = data
    return inputs, targets


def train() -> LanguageModel:
    """A model of two narrow layers that has learnt to copy."""
    torch.manual_seed(0)
    model = LanguageModel({"d_model": 32, "n_layers": 2}, vocab_size=MARKER + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        inputs, targets = rows(BATCH, generator)
        loss = model.training_loss({"inputs": inputs, "targets": targets})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    return model


def steps_of(model: LanguageModel, inputs: Tensor) -> list[Tensor]:
    """delta (l, d_inner) of every layer on a row (l,)."""
    found: list[Tensor] = []
    assert isinstance(model.backbone, Backbone)
    for block in model.backbone.blocks:
        assert isinstance(block.mixer, Mamba)
        select, bias = block.mixer.select, block.mixer.delta_bias

        def watch(u: Tensor, select: Any = select, bias: Tensor = bias) -> Any:
            chosen = select(u)
            found.append(torch.nn.functional.softplus(chosen[0] + bias)[0])
            return chosen

        block.mixer.select = watch  # type: ignore[method-assign]
    with torch.no_grad():
        model(inputs[None])
    return found


def draw_gates() -> Figure:
    """How much wider or narrower than on noise each channel's step is at every token of a row."""
    model = train()
    inputs, targets = rows(500, torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = model(inputs)[0][:, CONTEXT:].argmax(-1)
    accuracy = (said == targets[:, CONTEXT:]).float().mean().item()
    row = inputs[0]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for number, (axes, delta) in enumerate(zip(panels, steps_of(model, row), strict=True)):
        ratio = (delta / delta[row == NOISE].median(0).values).log2()
        order = ratio[(row != NOISE) & (row != MARKER)].mean(0).argsort(descending=True)
        image = axes.imshow(
            ratio.T[order].numpy(), aspect="auto", cmap="RdBu_r", vmin=-6, vmax=6, interpolation="nearest"
        )
        figure.colorbar(image, ax=axes, label="log2 of Δ / Δ on noise")
        axes.set(ylabel=f"layer {number + 1}, channel")
    names = {NOISE: "·", MARKER: "?"} | {kind: "abcdefgh"[kind - 1] for kind in range(1, KINDS + 1)}
    panels[1].set_xticks(range(len(row)), [names[token] for token in row.tolist()])
    panels[0].set_title(
        f"steps on a row of selective copying; {accuracy:.1%} of the tokens of 500 rows are right"
    )
    panels[1].set_xlabel("· is noise, letters are data, ? asks for the next of them")
    return figure


if __name__ == "__main__":
    main()
