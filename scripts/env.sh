# Sourced by the other scripts: a virtual environment in .venv with everything that is tested, pinned.
# Safe to run again: it installs only when pyproject.toml or the pins have changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false
wanted=$(cat pyproject.toml scripts/constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
  echo "== setting up .venv with pinned dependencies (a few minutes the first time)" >&2
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install -q --upgrade "pip>=25.1"
  # torch first: with this very version there, nothing below replaces it with another build
  .venv/bin/python -m pip install -q "$(grep '^torch==' scripts/constraints.txt)"
  .venv/bin/python -m pip install -q -c scripts/constraints.txt --group dev -e ".[bnb,gptq,compressed-tensors]"
  echo "$wanted" > .venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"
