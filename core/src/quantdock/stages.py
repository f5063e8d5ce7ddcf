"""The plugin manager of one load."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from quantdock import hookspecs
from quantdock.defaults import CoreDefaults
from quantdock.discovery import Catalog, logger
from quantdock.errors import PluginError
from quantdock.registry import Selection


class _Manager(pluggy.PluginManager):
    """Pluggy looks at every attribute of a plugin for hooks; half of them are Python's own, which can't be any."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)


def stage_manager(catalog: Catalog, extra: Sequence[object]) -> pluggy.PluginManager:
    """Hookspecs, core's defaults, the stage plugins that the policy allows, and the user's own plugin objects.

    A stage plugin that can't be imported breaks only loads that need it: it is left out, logged and reported.
    """
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(CoreDefaults(), name="quantdock")
    for offer in catalog.stages():
        try:
            found = offer.load()
        except PluginError as error:
            catalog.broken[offer.dist] = str(error)
            logger.warning("%s", error)
            continue
        _register(manager, found() if isinstance(found, type) else found, f"{offer.name} ({offer.origin})")
    for index, plugin in enumerate(extra):
        _register(manager, plugin() if isinstance(plugin, type) else plugin, f"plugins[{index}]")
    return manager


def add_quantizers(manager: pluggy.PluginManager, selection: Selection) -> None:
    """Register the quantizers of this load."""
    for chosen in selection:
        _register(manager, chosen.quantizer, f"{chosen.label} ({chosen.offer.origin}) #{id(chosen)}")


def watched(manager: pluggy.PluginManager, selection: Selection) -> bool:
    """Whether somebody beside the quantizers takes part in ``quantize_param``, and so wants to see it called."""
    quantizers = [chosen.quantizer for chosen in selection]
    return any(
        all(implementation.plugin is not quantizer for quantizer in quantizers)
        for implementation in manager.hook.quantize_param.get_hookimpls()
    )


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register, and find misspelt hooks and wrong arguments now rather than never.

    Raises:
        PluginError: an implementation matches no hook; names the plugin.
    """
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {name}: {error}. See docs/hooks.md for the hooks and their arguments.") from error
