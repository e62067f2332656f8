"""Imported before everything else by the scripts of launch/: hardly any garbage is looked for until `imported` is
called.

Python looks through all objects again whenever they have grown by a quarter. torch, DeepSpeed and transformers make
half a million that stay as long as the process, and they would be looked through a dozen times while they are imported,
and again when the process ends: 2.6 of 6.3 seconds.
"""

import gc

_USUAL = gc.get_threshold()
gc.set_threshold(1_000_000, *_USUAL[1:])  # more than are imported


def imported() -> None:
    """Look for garbage as usual from now on, but never again among the objects that there are (`gc.freeze`)."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
