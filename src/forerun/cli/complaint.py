"""From an exception to the one sentence that a user reads, if the exception is about the input or the machine."""

from __future__ import annotations

import errno

import typer

from forerun.errors import ForerunError

USAGE_ERROR = typer.BadParameter.__bases__  # typer does not export its parent, the error of every wrong command line
NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
MENDS = {
    **dict.fromkeys(NO_ROOM, "make room, or write to another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or name another place"),
    **dict.fromkeys((errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "name another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other programs, or raise the limit with ulimit -n"),
    errno.ENOENT: "check the path",
}
ANY_MEND = "see to that, and the same command can be given again"
MEND_MEMORY = "choose a smaller model, a smaller --dtype, fewer rows or shorter texts"


def sentence_of(error: Exception) -> str | None:
    """What went wrong and how to mend it, on one line; None for a mistake of our own, which deserves its traceback."""
    if isinstance(error, USAGE_ERROR):
        return _one_line(f"{_message(error)} (--help lists what there is)")
    if isinstance(error, ForerunError):
        return _one_line(str(error))
    if isinstance(error, OSError):
        return _one_line(_of_the_system(error))
    if _is_out_of_memory(error):
        return f"there is not enough memory: {MEND_MEMORY}"
    return None


def _message(error: Exception) -> str:
    message: str = error.format_message() if hasattr(error, "format_message") else str(error)
    return message.rstrip(".")


def _of_the_system(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{what}: {MENDS.get(error.errno or 0, ANY_MEND)}"


def _is_out_of_memory(error: Exception) -> bool:
    """Python says MemoryError, CUDA OutOfMemoryError, and torch on the CPU a RuntimeError that names its allocator."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and named)


def _one_line(text: str) -> str:
    first, *rest = [" ".join(line.split()) for line in text.splitlines() if line.strip()] or [""]
    return first + (f" ({'; '.join(rest)})" if rest else "")
