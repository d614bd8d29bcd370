"""The verb `replay`: rebuild the batches of a step of a run exactly, and look at them with the weights of a checkpoint.

The order of the data is a function of the position alone, and the newest checkpoint says how many samples a step takes;
so the batches of any step, of every rank and every accumulation, can be read again.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

NAME, SUMMARY = "replay", "rebuild the batch of a step of a run and measure it"

# letters of a sequence that are shown
_PREVIEW = 48


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, or runs/<recipe> for its newest run")
    parser.add_argument("--step", type=int, required=True, help="the step, 1 is the first")
    parser.add_argument(
        "--checkpoint",
        help="the .ckpt file whose weights measure; by default the last one before the step, if any",
    )


def run(arguments: Namespace) -> int:
    import torch

    from ..zoo.finetune import FineTuning
    from ..zoo.saving import newest_checkpoint, read_checkpoint
    from .find import latest_run
    from .train import reopen

    if arguments.step < 1:
        raise ValueError(f"--step: must be 1 or more, not {arguments.step}")
    folder = latest_run(Path(arguments.run)) / "checkpoints"
    newest = read_checkpoint(newest_checkpoint(folder)[0])
    path = Path(arguments.checkpoint) if arguments.checkpoint else _before(folder, arguments.step)
    if path.parent.resolve() != folder.resolve():
        raise ValueError(f"--checkpoint: {path} is none of this run's, which are in {folder}")
    # one process reads what all ranks did
    one = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto")
    alone = ["data.num_workers=0", *(f"trainer.{option}" for option in one)]
    launch, path = reopen(str(path), alone)
    model, data, trainer = launch.model, launch.datamodule, launch.trainer
    checkpoint = read_checkpoint(path)
    if finetuning := launch.callback(FineTuning):
        finetuning.prepare(model)
    model.load_state_dict(checkpoint["state_dict"])
    # beside averages, the weights that they are of
    model.load_state_dict(checkpoint.get("trained", {}), strict=False)
    device = trainer.strategy.root_device
    model.to(device)

    each = _samples_a_step(newest, data)
    accumulated: int = trainer.accumulate_grad_batches
    world, rest = divmod(each, data.batch_size * accumulated)
    if rest or not world:
        raise ValueError(
            f"{folder.parent}: a step took {each} samples, which no number of ranks makes of batches of "
            f"{data.batch_size}; was data.batch_size changed on the way?"
        )
    first = (arguments.step - 1) * each
    print(
        f"step {arguments.step}, samples {first} to {first + each - 1}, with the weights after step "
        f"{checkpoint['global_step']} ({path})"
    )
    total = torch.zeros((), device=device)
    for i in range(accumulated):
        for rank in range(world):
            position = first + i * world * data.batch_size
            items, batch = data.rebuild(position, world, rank)
            batch = {key: value.to(device) for key, value in batch.items()}
            with trainer.precision_plugin.forward_context():
                loss = model.training_loss(batch) / (accumulated * world)
            loss.backward()
            total += loss.detach()
            print(f"batch {i + 1} of {accumulated}, rank {rank}: {_shapes(batch)}")
            for line in _lines(model, data, items, batch, trainer):
                print(line)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    print(f"loss {total.item():.6f}  gradient norm {norm.item():.6f}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            print(f"  the gradient of {name} is not finite")
    return 0


def _before(folder: Path, step: int) -> Path:
    """The newest checkpoint that was written before a step; where there is none, the oldest there is."""
    from ..zoo.saving import BEST, LAST, PREVIOUS, read_checkpoint

    found = {}
    for name in (LAST, PREVIOUS, BEST):
        try:
            found[folder / name] = read_checkpoint(folder / name)["global_step"]
        except (ValueError, OSError):
            continue
    earlier = {path: at for path, at in found.items() if at < step}
    return max(earlier, key=earlier.__getitem__) if earlier else min(found, key=found.__getitem__)


def _samples_a_step(checkpoint: dict[str, Any], data: Any) -> int:
    position, steps = checkpoint[type(data).__qualname__]["position"], checkpoint["global_step"]
    each, rest = divmod(position, steps)
    if rest:
        raise ValueError(
            f"{position} samples were read in {steps} steps, not the same number in each: the run was resumed with "
            "another data.batch_size or on another number of ranks, and its batches are not known"
        )
    return each


def _lines(model: Any, data: Any, items: list[Any], batch: dict[str, Any], trainer: Any) -> Iterator[str]:
    """A line a sequence: its sample where there is one for each, what it loses by itself, how it begins."""
    import torch

    place, words = data.train_dataloader().dataset.place, _vocabulary(data)
    sequences = list(_sequences(batch))
    samples = [_sample(item, place) for item in items]
    if len(sequences) != len(samples):
        yield "  samples " + ", ".join(samples)
    for i, sequence in enumerate(sequences):
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            loss = model.training_loss(sequence).item()
        name = samples[i] if len(sequences) == len(samples) else f"sequence {i}"
        start = sequence["inputs"][0, :_PREVIEW].tolist()
        label = f"  label {sequence['labels'].item()}" if "labels" in sequence else ""
        text = repr(words.decode(start)) if words else str(start)[:_PREVIEW]
        yield f"  {name:24} loss {loss:10.6f}{label}  {text}"


def _sequences(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sequences of a batch as batches of one."""
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        rows = {key: value for key, value in batch.items() if value.ndim > 1}
        for start, end in pairwise(bounds):
            yield {key: value[:, start:end] for key, value in rows.items()}
        return
    rows = {key: value for key, value in batch.items() if value.ndim}
    for i in range(len(batch["inputs"])):
        yield {key: value[i : i + 1] for key, value in rows.items()}


def _sample(item: Any, place: Any) -> str:
    index, pass_ = place(item)
    return f"sample {index} of pass {pass_}"


def _vocabulary(data: Any) -> Any:
    from ..datamodules.vocab import vocabulary_from_dict

    try:
        return vocabulary_from_dict(data.vocabulary or {})
    except ValueError:
        # what is no text is shown as the numbers that it is
        return None


def _shapes(batch: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {' x '.join(map(str, value.shape))}" for key, value in batch.items() if value.ndim
    )
