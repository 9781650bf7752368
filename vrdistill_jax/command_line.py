"""What all verbs share: finding config files, the compilation cache, and exit codes.

Exit codes: 0 done, 1 a check failed, 2 bad input (one clear message).
"""

import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging


def run_verb(
    main: Callable[[], int | None],
    *,
    large_memory: bool = False,
    uses_jax: bool = True,
    positional: str | None = None,
) -> None:
    """Parses the flags, runs `main` and exits with its code; bad input becomes one line and exit code 2.

    Set VRDISTILL_TRACEBACK=1 to see where an error came from.

    Args:
      main: reads its flags and returns an exit code (None for 0).
      large_memory: whether the verb moves gigabytes, as training does; see `use_huge_pages`.
      uses_jax: False leaves JAX unimported, for the verbs that prepare data.
      positional: name of the flag that one argument without a name sets.
    """
    if large_memory:
        use_huge_pages()
    logging.set_verbosity(logging.WARNING)
    debug = os.environ.get("VRDISTILL_TRACEBACK") == "1"

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if positional and len(rest) == 2:
                flags.FLAGS[positional].parse(rest.pop())
            if len(rest) > 1:
                raise ValueError(f"unexpected argument {rest[1]!r}; options are written --name=value")
        except (flags.Error, ValueError, OSError, AttributeError, KeyError) as error:
            if debug:
                raise
            _fail(error)
        return rest

    def guarded(_: list[str]) -> None:
        if uses_jax:
            keep_compilations()
        try:
            sys.exit(main() or 0)
        except (ValueError, OSError) as error:
            if debug:
                raise
            _fail(error)

    app.run(guarded, argv=find_config(sys.argv), flags_parser=parse)


def _fail(error: BaseException) -> None:
    message = str(error).strip() or type(error).__name__
    # ml_collections puts the traceback of a config file's own error into its message.
    if "Traceback (most recent call last)" in message:
        lines = message.splitlines()
        message = f"{lines[0]} {lines[-1]}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def find_config(argv: list[str]) -> list[str]:
    """Replaces --config=FILE by the copy inside the installed package where FILE is not there as given."""
    packaged = pathlib.Path(__file__).parent
    out = list(argv)
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config") or not equals:
            continue
        path, colon, argument = value.partition(":")
        if not os.path.exists(path) and (packaged / path).exists():
            out[i] = f"{name}={packaged / path}{colon}{argument}"
    return out


def use_huge_pages() -> None:
    """Restarts this process once with glibc told to use huge pages and to keep freed memory (Linux only).

    XLA's CPU back end allocates its scratch memory anew for each step; page by page, the kernel then spends more time on
    it than the computation takes. With these settings a training step is about 1.7 times faster.
    """
    settings = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }
    if sys.platform != "linux" or any(name in os.environ for name in settings):
        return
    os.execve(sys.executable, sys.orig_argv, os.environ | settings)


def cache_folder() -> pathlib.Path:
    """Where datasets and compiled programs are kept between runs (VRDISTILL_CACHE overrides)."""
    return pathlib.Path(os.environ.get("VRDISTILL_CACHE", "~/.cache/vrdistill_jax")).expanduser()


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache, unless the user has set one."""
    import jax

    if not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
