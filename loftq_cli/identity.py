"""What makes a run that run: equal identities, equal bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


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
        derived = {"alpha"} if all(c.get("alpha") == c.get("rank") for c in (self.config, other.config)) else set()
        for name in sorted({*self.config, *other.config} - {"calibration"} - derived):  # text is known by its tokens
            shown = "the text of --calibration" if name == "calibration_tokens" else "--" + name.replace("_", "-")
            pairs[shown] = (self.config.get(name), other.config.get(name))
        return [f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
