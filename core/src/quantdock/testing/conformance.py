"""The class that a plugin's tests inherit."""

from __future__ import annotations

from typing import Any

from quantdock.testing.deciding import Deciding
from quantdock.testing.declaring import Declaring
from quantdock.testing.executing import Executing
from quantdock.testing.quantizing import Quantizing
from quantdock.testing.saving import Saving


class QuantizerConformance(Declaring, Deciding, Quantizing, Executing, Saving):
    """Everything that quantdock promises of any backend, tested on this one.

    Set the attributes of ``Suite`` in a subclass. A test that the backend can't pass is replaced by one of the same
    name, marked ``@pytest.mark.xfail(reason=...)``, that calls ``super()``; any other replacement is an error.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in dir(QuantizerConformance):
            own = getattr(cls, name)
            if name.startswith("test_") and own is not getattr(QuantizerConformance, name) and not _is_xfail(own):
                raise TypeError(
                    f"{cls.__name__}.{name} replaces a test of the suite. Mark it @pytest.mark.xfail(reason=...), and "
                    "call super() in it, or remove it"
                )


def _is_xfail(test: object) -> bool:
    marks = getattr(test, "pytestmark", [])
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
