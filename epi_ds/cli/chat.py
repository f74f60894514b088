"""``epi-ds chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from epi_ds.recipe.models import ModelSection
    from epi_ds.train.chat import Chat
    from epi_ds.train.sampling import Sampling

_NEW, _QUIT = "/new", "/quit"


def chat(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run that has ended, a Hugging Face folder, or a hub id.")
    ],
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Ask this model the same; show both.")] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="The same with the model that the run began from.")
    ] = False,
    once: Annotated[str | None, typer.Option(metavar="QUESTION", help="Answer this and exit.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What a system turn says first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; otherwise the likeliest is taken.")] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="With --sample; above 0, 1 as the model believes.", show_default="1")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --sample: among the likeliest with so much probability; above 0."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --sample; the same seed, the same answers.")] = None,
) -> None:
    """Talk to a model: /new begins a new conversation, /quit or the end of the input ends.

    Answers are greedy, and shown as they are generated. Input that is piped is read line by line, a question each. A
    model without a chat template continues what it is given. One process on one device: the accelerator, or the CPU
    where there is none.
    """
    from epi_ds.train.sampling import sampling_of

    sampling = sampling_of(is_asked=sample, temperature=temperature, top_p=top_p, seed=seed)
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    chats = _begun(_models(model, against, of_run=against_base), system, max_new_tokens, sampling)
    if once is None:
        _converse(chats)
    else:
        _answer(chats, once)


def _models(model: str, against: str | None, *, of_run: bool) -> dict[str, ModelSection]:
    """Return the models to talk to, by what they are called."""
    from epi_ds.errors import UserError
    from epi_ds.recipe.models import ModelSection
    from epi_ds.train.exported import base_of, model_of

    if against is not None and of_run:
        raise UserError(f"--against {against} and --against-base name two models to compare with; give one of them")
    found = {model: ModelSection(path=model_of(model))}
    if of_run:
        base = base_of(model)
        found[base.path] = base
    elif against is not None:
        if against == model:
            raise UserError(f"--against {against} is the model itself; name another, or leave it out")
        found[against] = ModelSection(path=model_of(against))
    return found


def _begun(
    models: dict[str, ModelSection], system: str | None, max_new_tokens: int, sampling: Sampling | None
) -> dict[str, Chat]:
    """Load the models, and begin a conversation with each."""
    from epi_ds.errors import UserError
    from epi_ds.train.chat import Chat, load

    chats = {}
    for number, (name, section) in enumerate(models.items()):
        with Console(stderr=True).status(f"loading {name}"):
            loaded = load(section, what="--against" if number else "RUN_OR_FOLDER")
        if not loaded.has_template:
            if system is not None and number == 0:
                raise UserError(f"--system begins a conversation in a chat template, and {name} has none; leave it out")
            left_out = "" if system is None else ", and is not told what --system says"
            _say(f"{name} has no chat template: it continues the text that you write{left_out}")
        chats[name] = Chat(loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
    return chats


def _converse(chats: dict[str, Chat]) -> None:
    """Answer line after line. At a terminal an answer may be interrupted, and what cannot be answered ends nothing."""
    from epi_ds.errors import UserError

    is_terminal = sys.stdin.isatty()
    for line in _typed() if is_terminal else _piped():
        said = line.strip()
        if said == _QUIT:
            return
        if said == _NEW:
            for chat in chats.values():
                chat.begin_anew()
        elif said:
            try:
                _answer(chats, said)
            except UserError as error:
                if not is_terminal:
                    raise
                _say(f"error: {error}")
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                _say("\ninterrupted: who had not ended forgets this question")


def _typed() -> Iterator[str]:
    # Lines can be edited then, and earlier ones called up.
    with suppress(ImportError):
        import readline  # noqa: F401
    _say(f"{_NEW} begins a new conversation, {_QUIT} ends")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return


def _piped() -> Iterator[str]:
    from epi_ds.errors import UserError

    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error}); convert it") from error


def _answer(chats: dict[str, Chat], said: str) -> None:
    from epi_ds.train.printable import printable

    def show(text: str) -> None:
        typer.echo(printable(text), nl=False)
        sys.stdout.flush()

    for name, chat in chats.items():
        if len(chats) > 1:
            typer.secho(f"{name}:", bold=True)
        answer = chat.ask(said, show)
        typer.echo()
        if answer.is_cut:
            _say("(cut here: it had not ended; --max-new-tokens)")


def _say(text: str) -> None:
    """Say something beside the answers, which alone are on the standard output."""
    typer.echo(text, err=True)
