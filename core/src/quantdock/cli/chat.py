"""``quantdock chat``: talk to a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantdock.cli import output
from quantdock.cli.arguments import LoadArguments
from quantdock.cli.command import JsonOption, SourceArgument
from quantdock.errors import UnsupportedError

if TYPE_CHECKING:
    from quantdock.architecture import Chatter


def run(
    source: SourceArgument,
    arguments: LoadArguments,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time; more varies the answers.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Load a model and talk to it. Ctrl-C stops an answer, Ctrl-D leaves.

    With --json and --prompt: prompt, answer, tokens and seconds.
    """
    if as_json and prompt is None:
        raise typer.BadParameter("needs --prompt", param_hint="--json")
    chatter = _open(source, arguments)
    messages = [{"role": "system", "content": system}] if system is not None else []
    talk = _Talk(chatter, messages, {"max_new_tokens": max_new_tokens, "temperature": temperature})
    if prompt is None:
        _converse(talk, remarks=not arguments.quiet)
        return
    started = time.perf_counter()
    answer = talk.ask(prompt, show=_ignore if as_json else _write)
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        output.print_json({"prompt": prompt, "answer": answer, "tokens": talk.tokens, "seconds": seconds})
    else:
        _write("\n")


def _open(source: str, arguments: LoadArguments) -> Chatter:
    options = arguments.options()
    from quantdock.calls import plan

    made = plan(source, **options)
    made.execute()
    chatter = made.skeleton.architecture.chatter(made.source)
    if chatter is None:
        raise UnsupportedError(
            f"{made.source.name}: the architecture offers no chat: the model generates no text, the source has no "
            f"tokenizer, or {made.skeleton.built_by} doesn't know how. Try `quantdock load` to load it only."
        )
    return chatter


class _Talk:
    """A conversation, as far as it has come."""

    def __init__(self, chatter: Chatter, messages: list[dict[str, str]], limits: dict[str, Any]) -> None:
        self._chatter = chatter
        self._messages = messages
        self._limits = limits
        self.tokens = 0
        """Of the last answer."""

    def ask(self, question: str, *, show: Callable[[str], None]) -> str:
        """The answer, shown as it comes; what Ctrl-C cuts off is a part of the conversation all the same."""
        self._messages.append({"role": "user", "content": question})
        self.tokens = 0
        answer: list[str] = []
        try:
            with closing(self._chatter.stream(self._messages, **self._limits)) as pieces:
                for piece in pieces:
                    self.tokens += 1
                    answer.append(piece)
                    show(piece)
        finally:
            self._messages.append({"role": "assistant", "content": "".join(answer)})
        return "".join(answer)


def _converse(talk: _Talk, *, remarks: bool) -> None:
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                _write("\n")
            return
        except KeyboardInterrupt:
            _write("\n")
            continue
        if question:
            _answer(talk, question, remarks=remarks and interactive)


def _answer(talk: _Talk, question: str, *, remarks: bool) -> None:
    started = time.perf_counter()
    try:
        talk.ask(question, show=_write)
    except KeyboardInterrupt:
        _write(" ...")
    _write("\n")
    if remarks:
        seconds = time.perf_counter() - started
        remark = f"{talk.tokens} tokens, {talk.tokens / seconds:.1f} a second"
        output.console(stderr=True).print(remark, style="dim")


def _write(text: str) -> None:
    sys.stdout.write(output.visible(text))
    sys.stdout.flush()


def _ignore(text: str) -> None:
    """Show nothing."""
