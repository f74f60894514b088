"""The model as lm-evaluation-harness asks it: log-likelihoods and answers, every batch by one of the ranks.

Every rank is asked for everything, cuts all requests into the same batches and scores those that fall to it; results
are gathered. lm-evaluation-harness deals out rows of a task before they are batched, so that a row's padding, and with
it its last bits, depends on the number of ranks. Tokenising follows its `HFLM`, which the tests compare with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jinja2
import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from epi_ds.errors import UserError
from epi_ds.evaluation.harness.rows import Continuation, batches_of, padded, rows_of
from epi_ds.evaluation.held import HeldModel
from epi_ds.evaluation.scores import Scored
from epi_ds.evaluation.turns import turns_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAME = "lm_eval"
"""What progress and scores call it."""

# Of an answer, where its task does not say; that of lm-evaluation-harness.
_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A held model behind the interface of lm-evaluation-harness. Collective where there are ranks."""

    def __init__(self, held: HeldModel, *, max_length: int | None) -> None:
        """``max_length`` is the most tokens that the model is shown; None for what it was made for."""
        super().__init__()
        self.tokenizer = held.tokenizer
        self._held = held
        self._max_length = max_length or resolve_max_length(held.model.config, held.tokenizer)
        self._started = time.perf_counter()

    # --- tokens, as HFLM makes them ---

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows on."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What a cache of requests would be called by, which is not used."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's tokens, with those that the tokenizer begins with, once."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return turns as a text. Raises UserError for turns that the template refuses."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise UserError(
                f"evaluation.lm_eval.apply_chat_template: the chat template refuses a question ({error}); set it to "
                "false"
            ) from error
        return text

    # --- what is asked ---

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the most likely one token by token."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of whole texts, each token scored once; long ones in windows."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            owners += [owner] * len(own)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        cut = rows_of([(context, tokens) for _, context, tokens in requests], max_length=self._max_length)
        self._tell_of_cut(cut.num_cut, len(requests))
        rows = list(cut.rows.items())
        _check_alike(rows)
        return self._dealt([len(row) for row, _ in rows], lambda own: self._read_off([rows[i] for i in own]))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each request, up to what it is to stop at."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers: dict[int, str] = {}
        for indices in alike.values():
            wanted = normalize_gen_kwargs(requests[indices[0]].args[1], _MAX_NEW_TOKENS)
            answers |= zip(indices, self._answers([requests[i].args[0] for i in indices], wanted), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _answers(self, prompts: Sequence[str], wanted: dict[str, Any]) -> list[str]:
        """Return the answers to prompts that are to be generated alike."""
        room = self._max_length - wanted["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"evaluation.lm_eval: a task asks for answers of {wanted['max_gen_toks']} tokens, which leaves no room "
                f"for its questions in the {self._max_length} that the model is shown; set max_gen_toks in the task's "
                "generation_kwargs lower, or leave it out"
            )
        whole = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        self._tell_of_cut(sum(len(row) > room for row in whole), len(whole))
        rows = [row[-room:] for row in whole]
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), rows[index]))
        _check_alike([rows[index] for index in order])

        def generated(own: range) -> list[tuple[int, str]]:
            batch = [order[i] for i in own]
            # For tasks that sample: the same draws for a batch, whichever rank it falls to.
            torch.manual_seed(own.start)
            return list(zip(batch, self._generated([rows[i] for i in batch], wanted), strict=True))

        return self._dealt([len(rows[index]) for index in order], generated)

    # --- batches ---

    def _dealt(self, lengths: Sequence[int], score: Callable[[range], list[tuple[int, T]]]) -> list[T]:
        """Score all rows, every batch on one of the ranks; return what was found by request. Collective."""
        held = self._held
        batches = batches_of(lengths, batch_size=held.batch_size, batch_tokens=held.batch_tokens)
        own: list[tuple[int, T]] = []
        for turn in turns_of(len(batches), gathered=held.gathered):
            done = batches[turn.first].start
            held.show(Scored(NAME, done, len(lengths), time.perf_counter() - self._started))
            found = score(batches[turn.batch])
            if turn.counts:
                own += found
        every = [own]
        if dist.is_initialized():
            every = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, own)
        by_request = dict(pair for part in every for pair in part)
        return [by_request[request] for request in sorted(by_request)]

    def _read_off(
        self, batch: Sequence[tuple[tuple[int, ...], list[Continuation]]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        held = self._held
        inputs = padded([row for row, _ in batch], left=False, pad=0, device=held.device)
        logits = held.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        found = []
        for index, (row, continuations) in enumerate(batch):
            for request, tokens in continuations:
                # Row by row and scored tokens only: a whole batch of logits in fp32 can be larger than the model.
                log_probs = logits[index, len(row) - len(tokens) : len(row)].float().log_softmax(dim=-1)
                wanted = torch.tensor(tokens, device=log_probs.device)
                value = log_probs.gather(1, wanted[:, None]).double().sum()
                found.append((request, (float(value), bool((log_probs.argmax(dim=-1) == wanted).all()))))
        return found

    def _generated(self, rows: Sequence[Sequence[int]], wanted: dict[str, Any]) -> list[str]:
        held, tokenizer = self._held, self.tokenizer
        settings = {**wanted}
        eos = tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(list(settings.pop("until")), eos=eos)
        longest = settings.pop("max_gen_toks")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        pad = self.eot_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        inputs = padded(rows, left=True, pad=pad, device=held.device)
        width = inputs.input_ids.shape[1]
        generated = held.model.generate(
            **inputs._asdict(),
            max_new_tokens=longest,
            stopping_criteria=stop_sequences_criteria(tokenizer, until, width, len(rows)),
            pad_token_id=pad,
            synced_gpus=not held.gathered,
            **settings,
        )
        answers = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(answer, until, None) for answer in answers]

    def _tell_of_cut(self, num_cut: int, num_requests: int) -> None:
        if num_cut and (not dist.is_initialized() or dist.get_rank() == 0):
            logger.warning(
                "lm_eval: %d of %d requests are longer than the %d tokens that the model is shown, and lose their "
                "beginning",
                num_cut,
                num_requests,
                self._max_length,
            )


def _check_alike(rows: Sequence[Any]) -> None:
    """Raise UserError where ranks were asked different things, whose results would be put together. Collective."""
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise UserError(
            "evaluation.lm_eval: a task asks each rank something else, because what it draws at random or reads is not "
            "the same everywhere; put its files where every node reads the same ones, or leave it out"
        )
