"""``nsa bench``: every step and the whole against full attention, after checking the very tensors that are timed."""
