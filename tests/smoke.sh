#!/usr/bin/env bash
# A wheel or an sdist as its user meets it: installed into an empty environment, used from an empty folder.
#   tests/smoke.sh dist/rap_lightning-0.1.0-py3-none-any.whl
set -euo pipefail
package="$(realpath "$1")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$package" "torch>=2.6,<2.14"
mkdir "$folder/empty" && cd "$folder/empty"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 PATH="$folder/venv/bin:$PATH"

pip check
rap-lightning --version
rap-lightning --help > help.txt
rap-lightning schema --output schema.json
rap-lightning configs --output configs
python -m rap_lightning.world runs/world
rap-lightning inspect --source runs/world --tokenizer runs/world/base
rap-lightning fit --config configs/quickstart.yaml -c configs/loss/simpo.yaml --trainer.max_steps 4
rap-lightning export --checkpoint runs/version_0/checkpoints/last.ckpt --output exported
rap-lightning generate --prompts runs/world --split test --model exported --output samples.jsonl --limit 4 --max_new_tokens 48
rap-lightning evaluate --model exported --source runs/world --judge Function \
    --judge.function rap_lightning.world.rule.score --base runs/world/base --output evaluated --limit 4 --max_new_tokens 48
echo "$(basename "$package"): installed and used, $(python -c 'import sys; print(*sys.version_info[:3], sep=".")')"
