"""The verb `generate`: continue prompts with a trained model; letters go to the screen, sound to files."""

import dataclasses
from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import recordings

NAME, SUMMARY = "generate", "continue a prompt with a trained model"
# the flags that mean something only to what writes letters, or sound; and only where lots decide
_OF_LETTERS, _OF_SOUND = ("max_new_tokens",), ("seconds", "label")
_OF_LOTS = ("top_k", "top_p", "min_p")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a model folder, a .ckpt file, a run, a name that `mambazoo ls` lists, or owner/name of the Hub",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="text, a file of it, or - for standard input; or a file of sound; repeatable",
    )
    parser.add_argument(
        "--output",
        help="a file to write to, of a model of DNA in FASTA (.fasta); of sound a folder, recordings if not given",
    )
    parser.add_argument("--max-new-tokens", type=int, help="of text and DNA, how long; 256 if not given")
    parser.add_argument(
        "--temperature", type=float, help="0 takes the most likely token; 0.8 if not given, 1 for sound"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw from the tokens that reach this probability")
    parser.add_argument("--min-p", type=float, help="leave out what is less likely than this times the best")
    parser.add_argument(
        "--repetition-penalty", type=float, help="divide the logit of what has occurred by this"
    )
    parser.add_argument("--number", type=int, default=1, help="how many continuations of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    recordings.add_arguments(parser)


def run(arguments: Namespace) -> int:
    from ..checkpoints.io import load
    from ..datamodules.vocab import vocabulary_from_dict
    from ..zoo.audio import WaveformModel
    from ..zoo.generate import Sampling, generate
    from ..zoo.tokens import TokenModel
    from .device import to_write
    from .dna import check_objective, check_output
    from .media import MEDIA, Text

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)}
    sampling = Sampling(
        **{"temperature": 0.8} | {name: value for name, value in given.items() if value is not None}
    )
    if not sampling.temperature:
        _refuse(arguments, _OF_LOTS, "--temperature 0, which takes the most likely token")
    length = 256 if arguments.max_new_tokens is None else arguments.max_new_tokens
    if length < 1 or arguments.number < 1:
        raise ValueError("--max-new-tokens and --number must be 1 or more")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed: must be 0 or more and below 2^63, not {arguments.seed}")
    model, vocabulary = load(arguments.checkpoint)
    if not isinstance(model, TokenModel):
        raise ValueError(f"{arguments.checkpoint} is a {type(model).__name__}, which writes nothing")
    if vocabulary is None:
        raise ValueError(f"{arguments.checkpoint} has no vocabulary: was it trained on data that names one?")
    if isinstance(model, WaveformModel):
        _refuse(arguments, _OF_LETTERS, f"{arguments.checkpoint}, which writes sound", _OF_SOUND)
        model = to_write(model, arguments.device)
        return recordings.write_recordings(model, vocabulary, arguments, sampling)
    _refuse(arguments, _OF_SOUND, f"{arguments.checkpoint}, which writes letters", _OF_LETTERS)
    check_objective(arguments.checkpoint, model, vocabulary)
    words = vocabulary_from_dict(vocabulary)
    if words.size > model.head.vocab_size:
        raise ValueError(
            f"{arguments.checkpoint}: the tokenizer has {words.size} tokens and the model {model.head.vocab_size}; "
            "they do not belong together"
        )
    kind = MEDIA.get(vocabulary["kind"], Text)
    medium = kind(words, None if arguments.output is None else check_output(arguments.output, *kind.endings))
    repeated = [
        prompt for given in arguments.prompt or [""] for prompt in [medium.read(given)] * arguments.number
    ]
    tokens = [medium.encode(prompt) for prompt in repeated]
    seeds = [arguments.seed + i % arguments.number for i in range(len(repeated))]
    model, name = to_write(model, arguments.device), _name(arguments.checkpoint)
    medium.begin(repeated, [f"{name}_seed{seed}_{i}" for i, seed in enumerate(seeds, 1)])
    for drawn in generate(model, tokens, length, sampling, stop=words.eos, seeds=seeds):
        for i, token in enumerate(drawn):
            if token is not None:
                medium.push(i, token)
    medium.finish()
    return 0


def _refuse(arguments: Namespace, names: tuple[str, ...], what: str, taken: tuple[str, ...] = ()) -> None:
    """Raise ValueError for flags that mean nothing to `what`, and name those that it has in their place."""
    for name in names:
        if getattr(arguments, name) is not None:
            flag, *own = (f"--{each.replace('_', '-')}" for each in (name, *taken))
            hint = f"it takes {' and '.join(own)}" if own else "leave it out"
            raise ValueError(f"{flag}: means nothing to {what}; {hint}")


def _name(checkpoint: str) -> str:
    """What a model is called in what it writes: where it is, below runs/ if it is there."""
    parts = Path(checkpoint).expanduser().resolve().with_suffix("").parts[1:]
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-2:]
    own = [part for part in below if part not in ("checkpoints", "model")]
    return "_".join("-".join(own).split()) or "model"
