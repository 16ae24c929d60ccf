import pytest

from rookery.engine.text import StopStrings


def shown(stops, pieces):
    scan, out = StopStrings(stops), []
    for piece in pieces:
        text, stopped = scan.push(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, scan.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["\n\n"], ["a", "\n", "\n", "b"], (["a", "", ""], True)),
        (["\n\n"], ["a\n", "b\n", "\nc"], (["a", "\nb", ""], True)),
        (["\n\n"], ["a\n"], (["a", "\n"], False)),
        (["END"], ["E", "N", "E", "N", "D"], (["", "", "EN", "", ""], True)),
        (["aab"], ["a", "a", "a", "b"], (["", "", "a", ""], True)),
        (["User:", "\n\n"], ["hi Us", "er", " x"], (["hi ", "", "User x", ""], False)),
        (["b", "ab"], ["xab"], (["x"], True)),
        ("stop", ["don't st", "op it"], (["don't ", ""], True)),
        ([], ["a", "b"], (["a", "b", ""], False)),
    ],
)
def test_text_is_shown_up_to_the_first_stop_string(stops, pieces, expected):
    assert shown(stops, pieces) == expected


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""])
