#!/usr/bin/env bash
# Fetch a SAM 1 checkpoint (vit_h, vit_l or vit_b; default vit_h).
#   scripts/download_sam1.sh vit_b --output checkpoints
# The same as `triton-sam download sam1`; the variant may be named without --variant.
set -euo pipefail
if [[ ${1:-} == [!-]* ]]; then
    set -- --variant "$@"
fi
exec "${PYTHON:-python3}" -m triton_sam.cli download sam1 "$@"
