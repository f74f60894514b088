"""How a model's tokens are drawn, where the likeliest one is not simply taken."""

from __future__ import annotations

from dataclasses import dataclass

from epi_ds.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """At temperature 1 and top_p 1 tokens are drawn as the model itself believes."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold so much of the probability."""
    seed: int = 0
    """Where the random numbers begin; below 2^32."""


def sampling_of(*, is_asked: bool, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
    """Return what the options of a command say; None for greedy answers.

    Raises UserError for options that would be ignored, and for a temperature or a share of 0, by which nothing can be
    drawn.
    """
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    if not is_asked:
        if given:
            name, value = next(iter(given.items()))
            option = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{option} says how tokens are drawn, and the likeliest are taken; add --sample")
        return None
    for name in ("temperature", "top_p"):
        if given.get(name) == 0:
            raise UserError(
                f"--{name.replace('_', '-')} 0 leaves nothing to draw; leave out --sample to take the likeliest token"
            )
    defaults = Sampling()
    return Sampling(
        defaults.temperature if temperature is None else temperature,
        defaults.top_p if top_p is None else top_p,
        defaults.seed if seed is None else seed,
    )
