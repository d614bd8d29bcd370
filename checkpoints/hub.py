"""Other people's layouts of a Mamba: one table of fields and one of weights, each walked in both directions.

state-spaces is what the authors released (config.json of mamba_ssm, pytorch_model.bin or safetensors), transformers its
MambaForCausalLM. Both are causal language models whose every layer is the paper's mixer.
"""

import json
import re
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..zoo.config import BackboneConfig
from ..zoo.frontends import padded

LAYOUTS = ("state-spaces", "transformers")
TASK = f"{__name__.partition('.')[0]}.zoo.language.LanguageModel"

# what a field of the backbone, its section before a dot, is called in state-spaces and in transformers
FIELDS: dict[str, tuple[str | None, str | None]] = {
    "d_model": ("d_model", "hidden_size"),
    "n_layers": ("n_layer", "num_hidden_layers"),
    "d_mlp": ("d_intermediate", None),
    "norm_eps": (None, "layer_norm_epsilon"),
    "mamba.d_state": ("ssm_cfg.d_state", "state_size"),
    "mamba.d_conv": ("ssm_cfg.d_conv", "conv_kernel"),
    "mamba.expand": ("ssm_cfg.expand", "expand"),
    "mamba.dt_rank": ("ssm_cfg.dt_rank", "time_step_rank"),
    "mamba.dt_init": ("ssm_cfg.dt_init", "time_step_init_scheme"),
    "mamba.dt_scale": ("ssm_cfg.dt_scale", "time_step_scale"),
    "mamba.dt_min": ("ssm_cfg.dt_min", "time_step_min"),
    "mamba.dt_max": ("ssm_cfg.dt_max", "time_step_max"),
    "mamba.dt_floor": ("ssm_cfg.dt_init_floor", "time_step_floor"),
    "mamba.conv_bias": ("ssm_cfg.conv_bias", "use_conv_bias"),
    "mamba.bias": ("ssm_cfg.bias", "use_bias"),
}
# what a trained model no longer depends on
_OF_TRAINING = ("checkpoint_activations", "dropout", "mamba.a_init")

# what a weight is called there; {} is a layer's number
_LAYER = (
    "norm.weight",
    *("mixer.A_log", "mixer.D", "mixer.x_proj.weight"),
    *(
        f"mixer.{name}.{part}"
        for name in ("in_proj", "conv1d", "dt_proj", "out_proj")
        for part in ("weight", "bias")
    ),
    *("norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
)
KEYS: dict[str, tuple[str, str]] = {
    "embedding.weight": ("backbone.embedding.weight", "backbone.embeddings.weight"),
    **{name: (name, name) for name in (f"backbone.layers.{{}}.{part}" for part in _LAYER)},
    "backbone.norm_f.weight": ("backbone.norm_f.weight", "backbone.norm_f.weight"),
    "head.weight": ("lm_head.weight", "lm_head.weight"),
}
# either layout's name will do: files of the one are found with the config of the other
_OURS = {there: ours for ours, names in KEYS.items() for there in names}


def layout_of(config: dict[str, Any]) -> str | None:
    """Whose config.json this is; None where it is neither's."""
    if config.get("model_type") == "mamba" or "MambaForCausalLM" in (config.get("architectures") or ()):
        return "transformers"
    return "state-spaces" if {"d_model", "n_layer", "vocab_size"} <= config.keys() else None


def arguments_from(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a LanguageModel that another layout's config.json describes.

    Raises:
        ValueError: when it describes what a LanguageModel cannot be.
    """
    layout = layout_of(config)
    if layout is None:
        kind = config.get("model_type") or ", ".join(config.get("architectures") or ()) or "unknown"
        raise ValueError(
            f"{where} is of a kind that is not read, {kind}: it must be this package's, or a Mamba (not Mamba-2) of "
            f"{' or '.join(LAYOUTS)}"
        )
    problems = _foreign_problems(config, layout)
    backbone: dict[str, Any] = {"mamba": {}}
    for ours, names in FIELDS.items():
        value = _get(config, names[LAYOUTS.index(layout)])
        if value is not None:
            section, _, field = ours.rpartition(".")
            (backbone[section] if section else backbone)[field] = None if value == "auto" else value
    if isinstance(backbone.get("d_mlp"), int):
        # mamba_ssm rounds it up
        backbone["d_mlp"] = -(-backbone["d_mlp"] // 128) * 128
    try:
        backbone = BackboneConfig.from_dict(backbone).to_dict()
    except ValueError as error:
        problems += str(error).splitlines()
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        problems.append(f"vocab_size: must be a whole number above 0, not {vocab_size!r}")
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    tied = config.get("tie_word_embeddings" if layout == "transformers" else "tie_embeddings", True)
    return {"backbone": backbone, "vocab_size": vocab_size, "tie_embeddings": bool(tied)}


def weights_from(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Another layout's weights under our names, with as many rows of tokens as we have; the others are not copied."""
    renamed = {}
    for name, value in weights.items():
        template, number = _template(name)
        ours = _OURS.get(template, template).format(number)
        renamed[ours] = _fit_rows(value, vocab_size, padded(vocab_size)) if _is_of_tokens(ours) else value
    return renamed


def config_to(arguments: dict[str, Any], layout: str, *, dtype: str, eos: int | None) -> dict[str, Any]:
    """The config.json that describes a language model of these arguments in another layout.

    Raises:
        ValueError: with a line for each of its fields that the layout cannot say.
    """
    backbone = BackboneConfig.from_dict(arguments["backbone"])
    # of layers of Mamba; those of other mixers are refused for their pattern
    backbone = replace(backbone, d_mlp=backbone.mlp_width("mamba"))
    values, usual = _flat(backbone.to_dict()), _flat(BackboneConfig(d_mlp=0).to_dict())
    config: dict[str, Any] = {}
    problems = []
    for field, value in values.items():
        name = FIELDS.get(field, (None, None))[LAYOUTS.index(layout)]
        if name is not None:
            section, _, key = name.rpartition(".")
            target = config.setdefault(section, {}) if section else config
            target[key] = "auto" if value is None else value
        elif value != usual[field] and field not in _OF_TRAINING:
            problems.append(f"backbone.{field} is {value!r}")
    if backbone.mamba.a_init == "s4d-lin":
        problems.append("A is complex (backbone.mamba.a_init is 's4d-lin')")
    if layout == "state-spaces" and values["d_mlp"] % 128:
        problems.append(f"backbone.d_mlp is {values['d_mlp']}, no multiple of 128")
    if problems:
        raise ValueError(f"a Mamba of {layout} cannot say this of the model: {'; '.join(problems)}")
    tied = arguments.get("tie_embeddings", True)
    config["vocab_size"] = arguments["vocab_size"]
    if layout == "state-spaces":
        fixed = {
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 8,
        }
        return {**config, **fixed, "tie_embeddings": tied}
    return {
        **config,
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "dtype": dtype,
        "hidden_act": "silu",
        "intermediate_size": backbone.mamba.expand * backbone.d_model,
        "residual_in_fp32": True,
        "tie_word_embeddings": tied,
        **{f"{name}_token_id": eos for name in ("bos", "eos", "pad")},
    }


def weights_to(weights: dict[str, Tensor], arguments: dict[str, Any], layout: str) -> dict[str, Tensor]:
    """Our weights under another layout's names, with its number of rows of tokens."""
    vocab_size, tied = arguments["vocab_size"], arguments.get("tie_embeddings", True)
    rows = vocab_size if layout == "transformers" else padded(vocab_size)
    renamed = {}
    for name, value in weights.items():
        template, number = _template(name)
        if template in KEYS and not (tied and layout == "transformers" and name == "head.weight"):
            there = KEYS[template][LAYOUTS.index(layout)].format(number)
            renamed[there] = _fit_rows(value, vocab_size, rows) if _is_of_tokens(name) else value
    return renamed


def tokenizer_config(tokenizer: str, eos: int | None) -> dict[str, Any]:
    """What transformers' AutoTokenizer wants beside a tokenizer.json."""
    added = {token["id"]: token["content"] for token in json.loads(tokenizer).get("added_tokens", ())}
    named = {f"{name}_token": added[eos] for name in ("bos", "eos", "pad")} if eos in added else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def _foreign_problems(config: dict[str, Any], layout: str) -> list[str]:
    """What keeps another layout's model from being a LanguageModel, beside wrong values."""
    problems = []
    if layout == "transformers":
        if config.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act: must be silu, not {config['hidden_act']!r}")
        return problems
    if not isinstance(config.get("ssm_cfg") or {}, dict):
        return [f"ssm_cfg: must be a section of keys, not {config['ssm_cfg']!r}"]
    layer = (config.get("ssm_cfg") or {}).get("layer", "Mamba1")
    if layer != "Mamba1":
        problems.append(f"ssm_cfg.layer: must be Mamba1, not {layer!r}")
    if config.get("attn_layer_idx"):
        problems.append("attn_layer_idx: layers of attention are not read")
    if config.get("rms_norm", True) is not True:
        problems.append("rms_norm: must be true; LayerNorm is not read")
    return problems


def _is_of_tokens(name: str) -> bool:
    return name in ("embedding.weight", "head.weight")


def _fit_rows(weight: Tensor, vocab_size: int, rows: int) -> Tensor:
    """A matrix with the rows of a vocabulary and zeros below them up to `rows`; the same one where it has as many."""
    if len(weight) == rows or len(weight) < vocab_size:
        return weight
    return F.pad(weight[:vocab_size], (0, 0, 0, rows - vocab_size))


def _template(name: str) -> tuple[str, str]:
    """A name with {} for the layer's number, and that number."""
    match = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
    return (name, "") if match is None else (f"{name[: match.start()]}{{}}{name[match.end() :]}", match[0])


def _get(config: dict[str, Any], name: str | None) -> Any:
    """The value at a dotted name, None where there is none."""
    value: Any = config if name else None
    for key in (name or "").split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Fields by their dotted names."""
    mamba = {f"mamba.{name}": value for name, value in values["mamba"].items()}
    return {**{name: value for name, value in values.items() if name != "mamba"}, **mamba}
