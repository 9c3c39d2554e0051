"""Errors planted into a step of the reference, and what a check says of them."""

from __future__ import annotations

import nsa.reference


def wrong(findings):
    return {(f.step, f.direction, f.tensor) for f in findings if f.wrong}


def plant(monkeypatch, name, change):
    """Replace a step of the reference by ``change`` of it, alone and in the whole."""
    spoiled = change(getattr(nsa.reference, name))
    monkeypatch.setattr(nsa.reference, name, spoiled)
    monkeypatch.setattr(nsa.reference.whole, name, spoiled)
