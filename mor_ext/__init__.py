"""mor_ext: ops for token-level adaptive depth in transformers, as ``torch.ops.mor``."""

from mor_ext import _library

_library.load()

from mor_ext import ops  # noqa: E402  (ops register on a loaded library)
from mor_ext._library import LibraryLoadError, build_info, set_debug  # noqa: E402

__version__ = "0.1.0"
__all__ = ["LibraryLoadError", "__version__", "build_info", "ops", "set_debug"]
