"""Loading decoder-only language models: from a directory, the Hugging Face cache or hub, or the packaged demo."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import (
    HFValidationError,
    are_progress_bars_disabled,
    enable_progress_bars,
    validate_repo_id,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils import cached_file, logging

from perp.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def load(
    name: str, dtype: torch.dtype | str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """The model `name` in eval mode and its tokenizer.

    `name` is a directory, a hub id (offline works once cached) or "demo"; `dtype` None keeps the checkpoint's own.
    UserError, one sentence, for whatever does not give a complete, finite, decoder-only model with its tokenizer.
    """
    check_model(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    model = load_weights(name, AutoModelForCausalLM, dtype, trust_remote_code).to(device)
    check_finite(model, name)
    _check_causal(model, name)
    return model, tokenizer


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model `name`."""
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(source(name), trust_remote_code=trust_remote_code)
        except Exception as error:  # each tokenizer fails in its own way; the remedy is one
            raise UserError(f"{name} has no usable tokenizer; put the model's tokenizer files beside it.") from error


def load_weights(name: str, kind: Any, dtype: torch.dtype | str | None, trust_remote_code: bool = False) -> Any:
    """The model `name` as a `kind` of model, an auto class or its own, complete and in eval mode."""
    with quiet():
        try:
            model, report = kind.from_pretrained(
                source(name),
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{name} cannot be loaded from safetensors ({_brief(error)}).") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}; use a complete checkpoint.")
    return model.eval()


def check_model(name: str, trust_remote_code: bool = False, weights: bool = True) -> None:
    """Refuse, by files and configuration alone, a model that cannot work: UserError, one sentence.

    Without `weights` only the configuration is looked at.
    """
    place = source(name)
    path = Path(place)
    if path.is_dir():
        _check_directory(path, weights)
    elif path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and the weights.")
    else:
        try:
            validate_repo_id(place)
        except HFValidationError as error:
            raise UserError(f"there is no directory {name}; give a model directory or a hub id.") from error
    _check_settings(name, _settings(name, place), trust_remote_code)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # each configuration class validates in its own way
        raise UserError(f"the config.json of {name} is not usable ({_brief(error)}).") from error
    _check_architecture(name, config)


def check_finite(model: nn.Module, name: str) -> None:
    """UserError naming the first parameter of `model` that holds NaN or an infinity; those without data pass."""
    for tensor, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        low, high = parameter.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise UserError(
                f"{tensor} of {name} holds NaN or infinite values as {parameter.dtype}; "
                "use an undamaged checkpoint or a wider dtype."
            )


def save_weights(model: Any, directory: Path, **options: Any) -> None:
    """The model's configuration and weights into `directory`, as its own `save_pretrained` writes them."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            # Older checkpoints give sampling parameters without saying that they sample, which no longer saves.
            generation.do_sample = True
    with quiet():
        model.save_pretrained(directory, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines below errors and no warnings from transformers, inside this block only."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:  # a download can take minutes, and switching off transformers' bars switched off the hub's
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def source(name: str) -> str:
    """What transformers is to load: a path or a hub id."""
    if name == "demo":
        from perp import demo

        return str(demo.model_dir())
    path = Path(name).expanduser()
    return str(path) if path.exists() else name


def directory(name: str) -> Path:
    """Where the files of the model `name` are, which has been loaded."""
    return Path(cached_file(source(name), "config.json")).parent


def _check_directory(path: Path, weights: bool) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give a Hugging Face model directory.")
    if not weights:
        return
    if (path / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path / INDEX} is not a valid index of shards; copy it again.") from error
    elif (path / WEIGHTS).is_file():
        shards = [WEIGHTS]
    elif pickled := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED):
        raise UserError(
            f"{path} holds only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors."
        )
    else:
        raise UserError(f"{path} has no weights; it must hold {WEIGHTS}, or shards and {INDEX}.")
    for shard in shards:
        if not (path / shard).is_file():
            raise UserError(f"{path} lacks {shard}, which {INDEX} names; copy all shards.")
        try:
            with safe_open(path / shard, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / shard} is truncated or damaged ({_brief(error)}); copy it again.") from error


def _settings(name: str, source: str) -> dict[str, Any]:
    """The content of config.json."""
    try:
        with quiet():
            return PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise UserError(f"the config.json of {name} is not valid JSON; copy it again.") from error
        raise UserError(
            f"{name} is neither a directory here nor a model that the Hugging Face cache or hub could give "
            f"({_brief(error)})."
        ) from error


def _check_settings(name: str, settings: dict[str, Any], trust_remote_code: bool) -> None:
    kind = settings.get("model_type")
    if not kind:
        raise UserError(f"the config.json of {name} has no model_type; give a Hugging Face model directory.")
    if kind not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in settings):
        if "auto_map" in settings:
            raise UserError(f"{name} runs code of its own; pass trust_remote_code if you trust that code.")
        raise UserError(f"{name} is of model type {kind!r}, unknown to this transformers; update transformers.")
    if settings.get("quantization_config"):
        raise UserError(f"{name} holds quantised weights; give the model before quantisation.")


def _check_architecture(name: str, config: Any) -> None:
    wanted = "give a decoder-only language model."
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; {wanted}")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} ({config.model_type}) is not a language model that generates text; {wanted}")
    saved_as = config.architectures or []
    served_by = None if remote else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    generating = [kind for kind in saved_as if kind == served_by or "CausalLM" in kind or "LMHead" in kind]
    if saved_as and not generating:
        raise UserError(f"{name} was saved as {saved_as[0]}, without the head that generates text; {wanted}")


def causal_probe(vocabulary: int) -> torch.Tensor:
    """Two sequences that differ in their last token, int64 [2, T]."""
    ids = torch.arange(8) % vocabulary
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % vocabulary
    return torch.stack([ids, changed])


@torch.no_grad()
def _check_causal(model: Any, name: str) -> None:
    probe = causal_probe(model.config.get_text_config().vocab_size).to(model.device)
    before, after = (model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in probe)
    check_logits(before, after, model.dtype, name)


def check_logits(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """In a decoder a later token does not move the logits of earlier positions, whatever the family is called.

    `before`, `after`: fp32 logits of all but the last token of `causal_probe`. UserError where that is not so.
    """
    if not before.isfinite().all():
        raise UserError(f"{name} gives NaN or infinite logits as {dtype}; use a wider dtype.")
    # Nothing but rounding may move them, and that only where experts see batches of another size.
    if (before - after).abs().max() > 8 * torch.finfo(dtype).eps * before.abs().max():
        raise UserError(f"{name} lets later tokens change earlier predictions; give a decoder-only language model.")


def _brief(error: BaseException) -> str:
    """The first sentence of an error, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
