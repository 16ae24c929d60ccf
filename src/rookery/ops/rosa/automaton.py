"""ROSA by a suffix automaton that grows with the text: the operator's name, and its form for one long string."""

from collections.abc import Hashable


class SuffixAutomaton:
    """Every substring of the keys so far (Blumer et al. 1985), with the place where it last ended.

    `push` reads one query, key and value. A key costs O(1) amortised, plus a walk up the suffix links that renews the
    last ends: as long as the string in the worst case, logarithmic on random ones.
    """

    def __init__(self) -> None:
        self.next: list[dict[Hashable, int]] = [{}]
        self.link, self.length, self.end = [-1], [0], [-1]
        self.last = 0
        """The state of all keys so far."""
        self.values: list = []
        self.pending: list[Hashable] = []
        """The newest key: queries see only those before it."""
        self.at, self.matched = 0, 0
        """State and length of the longest suffix of the queries."""

    def push(self, q: Hashable, k: Hashable, v: Hashable) -> Hashable:
        """ROSA's answer for the newest position, −1 if nothing matches."""
        if self.pending:
            self._extend(self.pending.pop(), len(self.values) - 1)
        self.values.append(v)
        self.pending.append(k)
        # the state of the match may have been split
        while self.at and self.matched <= self.length[self.link[self.at]]:
            self.at = self.link[self.at]
        while self.at and q not in self.next[self.at]:
            self.at = self.link[self.at]
            self.matched = self.length[self.at]
        if q not in self.next[self.at]:
            return -1
        self.at, self.matched = self.next[self.at][q], self.matched + 1
        while self.at and self.matched <= self.length[self.link[self.at]]:
            self.at = self.link[self.at]
        return self.values[self.end[self.at] + 1]

    def _extend(self, symbol: Hashable, place: int) -> None:
        new = self._state({}, self.length[self.last] + 1, 0)
        state, self.last = self.last, new
        while state >= 0 and symbol not in self.next[state]:
            self.next[state][symbol] = new
            state = self.link[state]
        if state >= 0:
            target = self.next[state][symbol]
            if self.length[target] != self.length[state] + 1:
                target = self._split(state, symbol, target)
            self.link[new] = target
        state = new
        while state > 0:
            self.end[state] = place
            state = self.link[state]

    def _split(self, state: int, symbol: Hashable, target: int) -> int:
        """A copy of `target` for its shorter strings."""
        copy = self._state(dict(self.next[target]), self.length[state] + 1, self.link[target])
        self.end[copy] = self.end[target]
        self.link[target] = copy
        while state >= 0 and self.next[state].get(symbol) == target:
            self.next[state][symbol] = copy
            state = self.link[state]
        return copy

    def _state(self, following: dict[Hashable, int], length: int, link: int) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.end.append(-1)
        return len(self.next) - 1
