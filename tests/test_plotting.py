import sys

import pytest

from rookery.errors import MissingDependency
from rookery.plotting import new_figure, require_matplotlib


@pytest.mark.parametrize("draw", [lambda: require_matplotlib("series"), lambda: new_figure(4, 3, extra="series")])
def test_a_missing_matplotlib_names_the_extra(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r'pip install "rookery\[series\]"'):
        draw()


def test_a_figure_has_its_size_and_needs_no_display():
    figure = new_figure(4, 3)
    assert figure.get_size_inches().tolist() == [4, 3]
    assert "pyplot" not in type(figure.canvas).__module__
