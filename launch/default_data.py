from __future__ import annotations
def make_if_missing(data): pass
