"""Pictures of commands: whether one can be written, asked before the work, and written where nothing stands."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from dpkit.errors import ConfigError, InvalidArgument, Refused

_FORMATS = (".png", ".svg")


def refuse_plot(path: Path) -> None:
    """Raises if no picture can be written to ``path``: before the numbers, which may take a while."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidArgument(f"--plot {path}: the picture is a .png or an .svg; give a name that ends so.")
    if path.is_symlink() or path.exists():
        raise _in_the_way(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--plot {path}: {path.parent} is no folder that can be written to; give another name.")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused(
            "--plot draws with matplotlib, which is not installed: pip install 'dpkit[report]'. Without --plot the "
            "numbers come as text or --json."
        )


def form_of(path: Path) -> str:
    """ "png" or "svg"."""
    return path.suffix[1:].lower()


def write_picture(path: Path, picture: bytes) -> None:
    """Writes a file that does not exist yet."""
    try:
        with path.open("xb") as file:
            file.write(picture)
    except FileExistsError:
        raise _in_the_way(path) from None


def _in_the_way(path: Path) -> ConfigError:
    return ConfigError(f"--plot {path} exists already and is not overwritten; give another name.")
