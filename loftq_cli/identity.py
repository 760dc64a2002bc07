"""What makes a run that run: equal identities, equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

WINDOWS = ("samples", "seqlen", "seed")  # what cuts the same text into other tokens


@dataclass(frozen=True)
class Identity:
    """What must be equal for two runs to give the same bytes."""

    version: str
    source: str  # fingerprint of the source checkpoint
    config: dict[str, Any]  # the decided configuration, `device` as its kind

    @property
    def key(self) -> str:
        """A hash of it all, to name a cache by; text is known by its tokens."""
        config = {name: value for name, value in self.config.items() if name != "calibration"}
        return hashlib.sha256(json.dumps([self.version, self.source, config], sort_keys=True).encode()).hexdigest()

    def differences(self, other: Identity) -> list[str]:
        """One sentence for each field of `other` (the new run) that differs from this one (what is on disk)."""
        pairs: dict[str, tuple[Any, Any]] = {
            "loftq version": (self.version, other.version),
            "source checkpoint": (self.source, other.source),
        }
        configs = self.config, other.config
        derived = {"alpha"} if all(config.get("alpha") == config.get("rank") for config in configs) else set()
        if any(self.config.get(name) != other.config.get(name) for name in WINDOWS):
            derived |= {"calibration_tokens"}
        for name in sorted({*self.config, *other.config} - {"calibration"} - derived):  # text is known by its tokens
            shown = "the text of --calibration" if name == "calibration_tokens" else "--" + name.replace("_", "-")
            pairs[shown] = (self.config.get(name), other.config.get(name))
        return [f"{name} was {_brief(old)}, now {_brief(new)}" for name, (old, new) in pairs.items() if old != new]


def _brief(value: Any) -> str:
    """A hash by its first digits."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
