"""Talk to a model: what was said so far, and an answer that is shown while it is generated (``epi-ds chat``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoTokenizer, TextStreamer
from transformers.utils.logging import disable_progress_bar

from epi_ds.data.conversation import Conversation, Message, conversation_of
from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.errors import UserError
from epi_ds.own_rows.authors import seed_of
from epi_ds.recipe.models import ModelSection
from epi_ds.train.model import (
    check_vocabulary,
    device_of_one_process,
    load_model,
    stop_at_the_end_of_a_turn,
    told,
)
from epi_ds.train.sampling import Sampling


class Answer(NamedTuple):
    """What a model said."""

    text: str
    is_cut: bool
    """Whether it had not ended when it had as many tokens as it may."""


class LoadedModel(NamedTuple):
    """A whole model on one device, which several conversations may use."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def has_template(self) -> bool:
        """Whether it can be asked in turns. A model without a chat template can go on with a text."""
        return self.tokenizer.chat_template is not None


def load(section: ModelSection, *, what: str) -> LoadedModel:
    """Load a model with its own tokenizer, ready to generate, which stops where its template ends a turn.

    what  names the path in messages

    Raises what `load_model` and `check_vocabulary` raise.
    """
    disable_progress_bar()
    with told(section.path, what=what):
        tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
    model = load_model(section, what=what).to(device_of_one_process()).eval()
    check_vocabulary(model, tokenizer, path=section.path)
    loaded = LoadedModel(section.path, model, tokenizer)
    if loaded.has_template:
        stop_at_the_end_of_a_turn(model, tokenizer)
    # Where tokens are not drawn these would be warned of, and where they are the user says what they are.
    for setting in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, setting, None)
    return loaded


class _History(Protocol):
    """What was said so far, as the model is shown it."""

    def prompt(self, said: str) -> list[int]:
        """Return the tokens that lead to the answer to what is said now."""

    def add(self, said: str, answer: str) -> None:
        """Note what was said and answered."""


class _Turns:
    """A conversation in a chat template."""

    def __init__(self, loaded: LoadedModel, system: str | None) -> None:
        self._renderer = Renderer(loaded.tokenizer, learnt=Learnt.LAST_TURN)
        self._turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        if system is not None:
            row = self._with("a")
            if system.strip() not in self._renderer.text(row.messages, row, prompt=True):
                raise UserError(f"the chat template of {loaded.name} does not write what --system says; leave it out")

    def _with(self, said: str) -> Conversation:
        return conversation_of([*self._turns, {"role": "user", "content": said}])

    def prompt(self, said: str) -> list[int]:
        """See `_History.prompt`. Raises UserError for turns that the template refuses."""
        row = self._with(said)
        return self._renderer.ids(row.messages, row, prompt=True)

    def add(self, said: str, answer: str) -> None:
        """See `_History.add`."""
        self._turns += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


class _Text:
    """A text that a model without a chat template goes on with, a line below what it wrote last."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        self._text = ""

    def prompt(self, said: str) -> list[int]:
        """See `_History.prompt`."""
        return list(self._tokenizer(self._text + said)["input_ids"])

    def add(self, said: str, answer: str) -> None:
        """See `_History.add`."""
        self._text += f"{said}{answer}\n"


class Chat:
    """A conversation with one model."""

    def __init__(
        self, loaded: LoadedModel, *, max_new_tokens: int, system: str | None = None, sampling: Sampling | None = None
    ) -> None:
        """``system`` begins the conversation, where the model has a chat template; ``sampling`` None is greedy.

        Raises UserError where the template has no place for it.
        """
        self._loaded, self._system, self._sampling = loaded, system, sampling
        self._max_new_tokens = max_new_tokens
        # Over all conversations: asked again in a new one, a model that samples may say something else.
        self._num_answers = 0
        self._history = self._begun()

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._history = self._begun()

    def _begun(self) -> _History:
        return _Turns(self._loaded, self._system) if self._loaded.has_template else _Text(self._loaded)

    def ask(self, said: str, show: Callable[[str], None]) -> Answer:
        """Return the answer, of which ``show`` is given part after part as it is generated.

        An answer that is interrupted by an exception is forgotten with its question. Raises UserError for a
        conversation that is longer than the model's context, and for text that its template or tokenizer refuses.
        """
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        try:
            prompt = self._history.prompt(said)
        except UserError as error:
            raise UserError(f"{self._loaded.name}: {error}") from error
        most = self._room_behind(prompt)
        stops = self._stops()
        ids = torch.tensor([prompt], device=model.device)
        # Every answer has random numbers of its own, whatever another model said.
        devices = [] if model.device.type == "cpu" else [model.device]
        with torch.inference_mode(), torch.random.fork_rng(devices, device_type=model.device.type):
            if self._sampling is not None:
                torch.manual_seed(seed_of(self._sampling.seed, self._num_answers))
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                eos_token_id=sorted(stops) or None,
                pad_token_id=min(stops, default=0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                streamer=_Shown(tokenizer, show),
                **self._drawn(),
            )
        tokens = generated[0, len(prompt) :].tolist()
        answer = Answer(tokenizer.decode(tokens, skip_special_tokens=True), is_cut=tokens[-1] not in stops)
        self._history.add(said, answer.text)
        self._num_answers += 1
        return answer

    def _room_behind(self, prompt: list[int]) -> int:
        if not prompt:
            raise UserError(f"the tokenizer of {self._loaded.name} makes no token of it; say something")
        longest = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is None:
            return self._max_new_tokens
        if len(prompt) >= longest:
            raise UserError(
                f"the conversation has {len(prompt)} tokens by now, and {self._loaded.name} takes {longest}; begin a "
                "new one (/new)"
            )
        return min(self._max_new_tokens, int(longest) - len(prompt))

    def _stops(self) -> set[int]:
        own = self._loaded.model.generation_config.eos_token_id
        found = {*(own if isinstance(own, list) else [own]), self._loaded.tokenizer.eos_token_id}
        return {stop for stop in found if stop is not None}

    def _drawn(self) -> dict[str, Any]:
        if self._sampling is None:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": 0,
        }


class _Shown(TextStreamer):
    """Hands on the text of an answer as soon as a word of it is whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of text."""
        self._show(text)
