"""Text from a saved model, as it comes, and what it cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TextStreamer

from perp import machine, models
from perp.errors import UserError
from perp.packed_model import load_weights, packed_file


@dataclass(frozen=True)
class Cost:
    """What a generation took: seconds to the first token and for all later ones, bytes resident beyond the imports
    and the tokenizer (memory of the process's own, and files mapped), bytes of the weights, a tied one counted once."""

    prompt: int
    tokens: int
    first: float
    later: float
    own: int
    mapped: int
    weights: int

    @property
    def rate(self) -> float:
        """Tokens per second after the first; NaN where there are none."""
        return (self.tokens - 1) / self.later if self.tokens > 1 else math.nan

    def __str__(self) -> str:
        rate = f"{self.rate:.1f} tokens/s" if self.tokens > 1 else f"{self.tokens} token"
        return (
            f"{rate} after {1e3 * self.first:.0f} ms for the prompt of {self.prompt}; "
            f"resident above imports and tokenizer {(self.own + self.mapped) / 1e9:.3f} GB "
            f"(RssAnon {self.own / 1e9:.3f}, RssFile {self.mapped / 1e9:.3f}); "
            f"weights {self.weights / 1e9:.3f} GB"
        )


def generate(
    directory: str,
    prompt: str,
    tokens: int = 64,
    dense: bool = False,
    dtype: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Cost:
    """Print `prompt` and up to `tokens` tokens that continue it, each word as soon as it is whole.

    From the packed file, or with `dense` from the plain model. Greedy at temperature 0, else sampled with `seed`.
    """
    if tokens < 1:
        raise UserError(f"tokens is {tokens}; it must be at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number.")
    machine.check_dtype(dtype)
    if not dense:
        packed_file(directory)
    models.check_model(directory)  # which imports the model's code
    tokenizer = models.load_tokenizer(directory)
    before = machine.resident_parts()
    model = models.load_weights(directory, AutoModelForCausalLM, dtype) if dense else load_weights(directory, dtype)
    asked = _tokenize(model, tokenizer, prompt, tokens)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = _Timed(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    with models.quiet():
        model.generate(**asked, max_new_tokens=tokens, streamer=streamer, **how)
    own, mapped = (now - then for now, then in zip(machine.resident_parts(), before, strict=True))
    began, first, *later = streamer.times
    return Cost(
        prompt=asked["input_ids"].shape[1],
        tokens=1 + len(later),
        first=first - began,
        later=later[-1] - first if later else 0.0,
        own=own,
        mapped=mapped,
        weights=sum(parameter.nbytes for parameter in model.parameters()),
    )


def _tokenize(model: Any, tokenizer: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
    given = tokenizer(prompt, return_tensors="pt")
    ids = given["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least a word to continue.")
    known = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= known:
        raise UserError(
            f"the tokenizer gives token {int(ids.max())} where the model has {known} embeddings; "
            "put the model's own tokenizer beside it."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and ids.shape[1] + tokens > longest:
        raise UserError(
            f"this model takes at most {longest} tokens at once, and the prompt has {ids.shape[1]}; "
            "shorten it or ask for fewer --tokens."
        )
    return {"input_ids": ids, "attention_mask": given.get("attention_mask", torch.ones_like(ids))}


class _Timed(TextStreamer):
    """Prints the text and notes when the prompt and each token came."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)
