"""The backends, and the one place that chooses among them.

Every operator has a reference kernel for all devices (`reference`); a faster backend registers its
own kernels for its device over it. Importing registers names only: nothing is compiled or tuned.
"""

from bitkernels.backends import cpu as cpu
from bitkernels.backends import gpu as gpu
from bitkernels.backends import reference as reference
