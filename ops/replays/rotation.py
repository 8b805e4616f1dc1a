"""Rotation: users take turns, each as often as its weight says."""

from collections.abc import Mapping


class Rotation:
    """Users in turn, each as often as its weight says: smooth weighted round robin."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        every = dict(weights) if any(weights.values()) else dict.fromkeys(weights, 1)
        self._weights = {name: weight for name, weight in every.items() if weight > 0}
        self._total = sum(self._weights.values())
        self._claims = dict.fromkeys(self._weights, 0)

    def next(self) -> str:
        """Whose turn it is; `ValueError` if there is nobody."""
        for name, weight in self._weights.items():
            self._claims[name] += weight
        chosen = max(self._claims, key=self._claims.__getitem__)
        self._claims[chosen] -= self._total
        return chosen
