"""A model class of EleutherAI's lm-evaluation-harness, called `forerun`.

    python -m forerun.integrations.lm_eval run --model forerun \\
        --model_args pretrained=models/target,drafter=lookup --tasks hellaswag --batch_size 16

This is the harness's own command line; `python -m lm_eval` does not know models of other packages.
From Python, import this module and ask for the model by name, or hand `ForerunLM(...)` over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import forerun
from forerun.engine.likelihood import Likelihood, Text, likelihoods
from forerun.errors import ForerunError, RequestError
from forerun.sampling import SamplingParams
from forerun.sources.source import Source

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ImportError as error:
    raise ForerunError(
        f"evaluating needs lm-evaluation-harness ({error}): install it with pip install 'forerun[eval]'"
    ) from None

FILTERS = ("top_k", "top_p", "min_p")
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("forerun")
class ForerunLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and texts of a model as forerun runs it.

    Args:
        pretrained: a folder in Hugging Face format, or a hub id.
        drafter: as for `forerun.load`. It makes the generative tasks faster, and changes no result.
        batch_size: rows side by side, also as text; "auto" is 16.
        max_length: the longest text, if less than the model's context. In tokens, like all lengths.
        max_gen_toks: how much is generated where a task does not say.
        add_bos_token: whether texts begin with the beginning-of-text token; None: as the tokenizer does.
        dtype, device, kernels, weights, acceptance: as for `forerun.load`.

    Raises what `forerun.load` raises, and RequestError for a task that asks for what cannot be done.
    """

    def __init__(
        self,
        pretrained: str,
        drafter: str = "none",
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        device: str = "auto",
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        rows = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = min(rows, max_batch_size or rows)
        self.engine = forerun.load(pretrained, drafter, device=device, max_rows=self.batch_size, **options)
        found = Source.of(pretrained).tokenizer
        if found is None:
            raise RequestError(f"{pretrained} has no tokenizer, and tasks are texts: give a model that has one")
        self.tokenizer: Any = found
        context = self.engine.target.max_length
        self.max_length = min(max_length or context, context)
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self._device = self.engine.target.device

    # ---- texts and tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """A text that begins with the beginning of text in letters gets no second one."""
        if add_special_tokens is None:
            has_begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if has_begun else self.add_bos_token
        wish = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **wish))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # ---- what the harness asks for

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        texts = [self._within(*request[1:]) for request in requests]
        with tqdm(total=len(texts), disable=disable_tqdm, desc="log-likelihoods") as bar:

            def note(index: int, found: Likelihood) -> None:
                pair = requests[index][0]
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, (found.total, found.is_greedy))
                bar.update(1)

            found = likelihoods(self.engine.target.network, texts, self.batch_size, note)
        return [(one.total, one.is_greedy) for one in found]

    def _within(self, context: list[int], continuation: list[int]) -> Text:
        """The last token is not read, so there is room for one more than the context holds."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise RequestError(
                f"a continuation has {len(continuation)} tokens and the context holds {self.max_length}: leave this"
                " task out or take a model with a longer context"
            )
        return Text(context[-room:], continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        flat: list[Pair] = [(None, *window) for some in windows for window in some]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Every token once, with as much before it as there is room for."""
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        end = self.tokenizer.decode([self.eot_token_id])
        prompts, wishes = [], []
        for request in requests:
            text, asked = request.args
            wish = self._wish(asked, end)
            room = self.max_length - (wish.max_new_tokens or 0)
            if room < 1:
                raise RequestError(
                    f"a task wants {wish.max_new_tokens} new tokens and the context holds {self.max_length}: set"
                    " max_gen_toks"
                )
            prompts.append(self.tok_encode(text)[-room:])
            wishes.append(wish)
        texts = [""] * len(requests)
        with (
            tqdm(total=len(requests), disable=disable_tqdm, desc="texts") as bar,
            self.engine.stream(prompts, wishes) as session,
        ):
            for piece in session:
                if piece.output:
                    request, index = requests[piece.prompt_index], piece.prompt_index
                    said = self.tokenizer.decode(piece.output.token_ids, skip_special_tokens=True)
                    texts[index] = postprocess_generated_text(said, list(wishes[index].stop), None)
                    self.cache_hook.add_partial("generate_until", request.args, texts[index])
                    bar.update(1)
        return texts

    def _wish(self, asked: Mapping[str, Any], end: str) -> SamplingParams:
        """The harness's words in ours; what we do not know is refused, with the nearest word that we do."""
        wish = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        stop = handle_stop_sequences(wish.pop("until"), eos=end)
        is_greedy = not wish.pop("do_sample")
        kept = {name: value for name, value in wish.items() if not (is_greedy and name in FILTERS)}
        kept["max_new_tokens"] = kept.pop("max_gen_toks")
        return SamplingParams.of(kept | {"stop": [one for one in stop if one]})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
