"""Where pictures come from: matplotlib, if it is installed, without a display."""

from typing import TYPE_CHECKING

from rookery.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib(extra: str = "train") -> None:
    """MissingDependency where plots cannot be drawn; it names the `extra` of this package that brings matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependency(f'plots need matplotlib: pip install "rookery[{extra}]"') from None


def new_figure(width: float, height: float, extra: str = "train") -> "Figure":
    """An empty figure of so many inches; MissingDependency as `require_matplotlib` raises it."""
    require_matplotlib(extra)
    # not pyplot: it keeps figures in a global list and may look for a display
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
