"""Text in, text out: a loaded model with its tokenizer and chat template."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from quantdock import Source, UnsupportedError

# What a tokenizer is made of; the first group is enough to have one, the second only adds to it.
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|tokenizer\.model(\.v\d+)?|tekken\.json|vocab\.(json|txt|bpe)|encoder\.json"
    r"|spiece\.model|sentencepiece(\.bpe)?\.model|[\w-]+\.tiktoken"
)
_BESIDE = re.compile(
    r"config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|chat_template\.(jinja|json)"
)
_GGUF = ".gguf"


def open_chat(model: Any, source: Source) -> TransformersChatter | None:
    """The model as something to talk to; ``None`` when it generates no text or the source has no tokenizer.

    Raises:
        UnsupportedError: the tokenizer's files can't be used.
    """
    tokenizer = open_tokenizer(source) if model.can_generate() else None
    return None if tokenizer is None else TransformersChatter(model, tokenizer)


def open_tokenizer(source: Source) -> Any:
    """The source's own tokenizer; ``None`` when it has none.

    Raises:
        UnsupportedError: its files can't be used.
    """
    arguments = _tokenizer_arguments(source)
    if arguments is None:
        return None
    from transformers import AutoTokenizer

    try:
        # Never code from the source, and nothing but the files that the source was asked for.
        return AutoTokenizer.from_pretrained(
            str(source.root), trust_remote_code=False, local_files_only=True, **arguments
        )
    except Exception as error:  # the tokenizers library raises nothing more precise for a broken file
        raise UnsupportedError(
            f"{source.name}: its tokenizer can't be loaded: {type(error).__name__}: {error}"
        ) from error


def _tokenizer_arguments(source: Source) -> dict[str, str] | None:
    """What tells transformers where the tokenizer is, its files fetched; ``None`` when there is none."""
    named = source.single_file
    if named is not None and named.suffix == _GGUF:
        return {"gguf_file": _first_part(named.name)}
    listing = source.listing()
    if any(_TOKENIZER.fullmatch(name) for name in listing):
        source.fetch([name for name in listing if _TOKENIZER.fullmatch(name) or _BESIDE.fullmatch(name)])
        return {}
    # A folder or repository that is its GGUF file. Beside a config.json, such a file is another model's.
    if "config.json" not in listing and (files := [name for name in listing if name.endswith(_GGUF)]):
        return {"gguf_file": _first_part(min(files))}
    return None


def _first_part(name: str) -> str:
    """Of a model that is split into several files, the first one has the tokenizer."""
    return re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-00001-of-\1", name)


class TransformersChatter:
    """What ``Architecture.chatter`` gives for a transformers model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def stream(
        self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int, temperature: float
    ) -> Generator[str, None, None]:
        """The text of each token of the answer, as it comes."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise UnsupportedError(
                "the tokenizer has no chat template, so this model isn't made for conversations; it can complete a "
                "text: quantdock load SOURCE --prompt TEXT"
            )
        try:
            inputs = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except TemplateError as error:
            raise UnsupportedError(f"the model's chat template refuses these messages: {error}") from error
        return self._pieces(inputs, self._limits(max_new_tokens, temperature))

    def complete(self, prompt: str, *, max_new_tokens: int) -> str:
        """The continuation that is likeliest token by token."""
        inputs = self._tokenizer(prompt, return_tensors="pt")
        return "".join(self._pieces(inputs, self._limits(max_new_tokens, 0.0)))

    def _limits(self, max_new_tokens: int, temperature: float) -> Any:
        """The model's own generation config with the length and the temperature changed."""
        config = copy.deepcopy(self._model.generation_config)
        config.max_length, config.max_new_tokens = None, max_new_tokens
        config.do_sample, config.num_beams = temperature > 0, 1
        if config.do_sample:
            config.temperature = temperature
        else:
            config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
        # A GGUF file names the token that ends an answer in its tokenizer only.
        ends = {*_as_list(config.eos_token_id), *_as_list(self._tokenizer.eos_token_id)}
        config.eos_token_id = sorted(ends) or None
        if config.pad_token_id is None and ends:
            config.pad_token_id = min(ends)
        return config

    def _pieces(self, inputs: Mapping[str, torch.Tensor], config: Any) -> Generator[str, None, None]:
        """Generate in a thread of its own, which stops at the next token when nobody listens any more."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = threading.Event()

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), stopped.is_set(), dtype=torch.bool, device=ids.device)

        device = self._model.device
        # A part of the model that is offloaded is on meta; the hooks that bring it back take inputs from anywhere.
        home = "cpu" if device.type == "meta" else device
        tensors = {name: inputs[name].to(home) for name in ("input_ids", "attention_mask") if name in inputs}
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate") as pool:
            done = pool.submit(
                self._model.generate,
                **tensors,
                generation_config=config,
                streamer=streamer,
                stopping_criteria=[stop],
            )
            # After an error, the streamer would wait for a word that never comes.
            done.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
            try:
                yield from _one_a_token(streamer)
            finally:
                stopped.set()
            done.result()


def _one_a_token(pieces: Iterator[str]) -> Generator[str, None, None]:
    """What a streamer gives: a piece for each token, then what it held back, which belongs to the last token."""
    held: list[str] = []
    for piece in pieces:
        held.append(piece)
        if len(held) > 2:
            yield held.pop(0)
    if held:
        yield "".join(held)


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
