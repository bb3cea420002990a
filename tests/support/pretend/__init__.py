"""A pretend GPU for rehearsals: CUDA tensors hold CPU memory, Triton kernels run in its interpreter.

`install` makes this process see one device like an H100, on a machine that has none. What goes wrong on a
real one is refused here too: tensors of two devices in one operation, a CPU tensor handed to a kernel,
operations that have no CUDA form, a wait for the device while a graph is captured (or under
``torch.cuda.set_sync_debug_mode("error")``), a graph that reads memory freed since, more memory than the
device has. Graphs are replayed for real, on the addresses of their capture. Times mean nothing: events read
the wall clock of a CPU.

    tests/support/pretend/python SCRIPT ARGUMENTS      runs a script there at toy size (see `rehearsal.py`)
"""

from pretend.device import install
from pretend.memory import memory

__all__ = ["install", "memory"]
