"""The kernels of a decode step compiled ahead of time, for the C library: the same functions, tuned by the same tables.

An export needs Triton, and no GPU and no torch: the kernels' files name torch's types, in launchers that an export never calls.
"""

from nsa.aot.torch_names import stand_in

stand_in()
