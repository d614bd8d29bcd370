"""The verb `generate`: continue prompts with a trained model; letters go to the screen, sound to files."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import recordings

NAME, SUMMARY = "generate", "continue a prompt with a trained model"


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
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, help="0 takes the most likely token; 0.8 if not given, 1 for sound"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the tokens that reach this probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="leave out what is less likely than this times the best"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
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

    sampling = Sampling(
        temperature=0.8 if arguments.temperature is None else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if arguments.max_new_tokens < 1 or arguments.number < 1:
        raise ValueError("--max-new-tokens and --number must be 1 or more")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed: must be 0 or more and below 2^63, not {arguments.seed}")
    model, vocabulary = load(arguments.checkpoint)
    if not isinstance(model, TokenModel):
        raise ValueError(f"{arguments.checkpoint} is a {type(model).__name__}, which writes nothing")
    if vocabulary is None:
        raise ValueError(f"{arguments.checkpoint} has no vocabulary: was it trained on data that names one?")
    if isinstance(model, WaveformModel):
        model = to_write(model, arguments.device)
        return recordings.write_recordings(model, vocabulary, arguments, sampling)
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
    for drawn in generate(model, tokens, arguments.max_new_tokens, sampling, stop=words.eos, seeds=seeds):
        for i, token in enumerate(drawn):
            if token is not None:
                medium.push(i, token)
    medium.finish()
    return 0


def _name(checkpoint: str) -> str:
    """What a model is called in what it writes: where it is, below runs/ if it is there."""
    parts = Path(checkpoint).expanduser().resolve().with_suffix("").parts[1:]
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-2:]
    own = [part for part in below if part not in ("checkpoints", "model")]
    return "_".join("-".join(own).split()) or "model"
