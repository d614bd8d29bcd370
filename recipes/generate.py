"""The verb `generate`: continue prompts with a trained model, shown as they are written."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

NAME, SUMMARY = "generate", "continue a prompt with a trained model"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a model folder, a .ckpt file, a run, a name that `mambazoo ls` lists, or owner/name of the Hub",
    )
    parser.add_argument(
        "--prompt", action="append", help="text, a file of text, or - for standard input; repeatable"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
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


def run(arguments: Namespace) -> int:
    import torch

    from ..checkpoints.io import load
    from ..datamodules.vocab import vocabulary_from_dict
    from ..zoo.generate import Sampling, generate
    from ..zoo.tokens import TokenModel

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if arguments.max_new_tokens < 1 or arguments.number < 1:
        raise ValueError("--max-new-tokens and --number must be 1 or more")
    texts = [_read(prompt) for prompt in arguments.prompt or [""]]
    model, vocabulary = load(arguments.checkpoint)
    if not isinstance(model, TokenModel):
        raise ValueError(f"{arguments.checkpoint} is a {type(model).__name__}, which writes no text")
    if vocabulary is None:
        raise ValueError(f"{arguments.checkpoint} has no vocabulary: was it trained on data that names one?")
    words = vocabulary_from_dict(vocabulary)
    if words.size > model.head.vocab_size:
        raise ValueError(
            f"{arguments.checkpoint}: the tokenizer has {words.size} tokens and the model {model.head.vocab_size}; "
            "they do not belong together"
        )
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    repeated = [text for text in texts for _ in range(arguments.number)]
    prompts = [[words.eos, *words.encode(text).tolist()] for text in repeated]
    seeds = [arguments.seed + i for _ in texts for i in range(arguments.number)]
    streams = [words.stream() for _ in prompts]
    outputs = ["" for _ in prompts]
    alone = len(prompts) == 1
    if alone:
        _write(repeated[0].decode("utf-8", errors="replace"))
    for tokens in generate(model, prompts, arguments.max_new_tokens, sampling, stop=words.eos, seeds=seeds):
        for i, token in enumerate(tokens):
            if token is not None:
                piece = streams[i].push(token)
                outputs[i] += piece
                if alone:
                    _write(piece)
    for i, (stream, text) in enumerate(zip(streams, repeated, strict=True)):
        rest = stream.flush()
        if alone:
            _write(rest + "\n")
        else:
            head = "" if i == 0 else "\n"
            _write(
                f"{head}--- {i + 1} of {len(prompts)}\n{text.decode('utf-8', errors='replace')}{outputs[i]}{rest}\n"
            )
    return 0


def _read(prompt: str) -> bytes:
    """The bytes of a prompt: standard input for -, the content of a file of that name, else the text itself."""
    if prompt == "-":
        return sys.stdin.buffer.read()
    try:
        path = Path(prompt)
        if path.is_file():
            return path.read_bytes()
    except OSError:
        # too long, or otherwise impossible, for a file name
        pass
    return prompt.encode("utf-8", errors="surrogateescape")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
