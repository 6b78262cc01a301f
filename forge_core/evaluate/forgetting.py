"""What a run gained and lost against its base, in words."""

from collections.abc import Mapping
from typing import Any

_NOISE = 1.0  # percent of the base's loss; a mix is to keep the loss of general sets within it
_CLEAR = 5.0


def loss_change(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> float:
    """Change of a set's loss in percent of the base's; positive is worse."""
    return 100.0 * (tuned["nll"] / base["nll"] - 1.0)


def forgetting_summary(base: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence per set that both measured, general sets last, then a verdict on general ability.

    Args:
        base: results by set name of the base model, as `measure_sets` gives them.
        tuned: of the tuned model.
    """
    sentences: dict[str, list[str]] = {"domain": [], "general": []}
    worst: tuple[float, str] | None = None
    for name in base:
        if name not in tuned:
            continue
        before, after = base[name], tuned[name]
        if before["kind"] == "loss":
            change = loss_change(before, after)
            sentence = f"{name}: loss {before['nll']:.3f} -> {after['nll']:.3f} ({change:+.1f} %)"
            if before["role"] == "general":
                sentence += f", {_verdict(change)}"
                worst = max(worst or (change, name), (change, name))
        else:
            points = 100 * (after["accuracy"] - before["accuracy"])
            share = f"{100 * before['accuracy']:.1f} % -> {100 * after['accuracy']:.1f} %"
            sentence = f"{name}: accuracy {share} ({points:+.1f} points)"
        sentences[before["role"]].append(sentence)
    lines = sentences["domain"] + sentences["general"]
    if worst is not None:
        lines.append(_advice(*worst))
    return lines


def _verdict(change: float) -> str:
    if change < -_NOISE:
        return "improved"
    if change <= _NOISE:
        return "kept"
    return "a little forgotten" if change <= _CLEAR else "forgotten"


def _advice(change: float, name: str) -> str:
    if change <= _NOISE:
        return f"General ability is kept: no general set's loss rose by more than {_NOISE:g} %."
    return (
        f"General ability was lost: the loss on {name} rose by {change:.1f} %. Lower data.customer_percent "
        "(add general data like this set), the learning rate, lora.alpha, or the number of steps."
    )
