#!/usr/bin/env bash
# Fetch a SAM 2.1 checkpoint (tiny, small, base_plus or large; default tiny).
#   scripts/download_sam2.sh large --output checkpoints
# The same as `triton-sam download sam2`; the variant may be named without --variant.
set -euo pipefail
if [[ ${1:-} == [!-]* ]]; then
    set -- --variant "$@"
fi
exec "${PYTHON:-python3}" -m triton_sam.cli download sam2 "$@"
