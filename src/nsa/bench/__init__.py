"""``nsa bench``: steps, the whole and a model against full attention, after checking the very tensors that are timed."""
