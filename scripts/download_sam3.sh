#!/usr/bin/env bash
# Fetch a SAM 3 checkpoint; it is gated: accept its licence and set HF_TOKEN first.
#   scripts/download_sam3.sh --output checkpoints
# The same as `triton-sam download sam3`; the variant may be named without --variant.
set -euo pipefail
if [[ ${1:-} == [!-]* ]]; then
    set -- --variant "$@"
fi
exec "${PYTHON:-python3}" -m triton_sam.cli download sam3 "$@"
