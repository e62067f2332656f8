from functools import partial

import pytest
from large_layers import switch


@pytest.fixture
def faster(monkeypatch):
    """`faster(bool)`: as on a processor of which this is so. True to begin with."""
    switch(monkeypatch, True)
    return partial(switch, monkeypatch)
