"""GPU kernels. Nothing here is imported before a call needs it."""
