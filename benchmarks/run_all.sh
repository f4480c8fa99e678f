#!/usr/bin/env bash
# Everything, on a quiet machine: rows go to results/, tables to the terminal. Arguments go to every run.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
bench=(python -m snn_sparse_plugin bench)

"${bench[@]}" "$@" --json results/network.json
"${bench[@]}" "$@" --steps 100 --providers sparse,snntorch,compile --no-peak --json results/compile.json
"${bench[@]}" "$@" --sweep density --no-peak --json results/density.json
"${bench[@]}" "$@" --sweep size --no-peak --json results/size.json
"${bench[@]}" "$@" --network conv --json results/conv.json
"${bench[@]}" "$@" --network conv --sweep density --no-peak --json results/conv_density.json
"${bench[@]}" "$@" --protocol s3gd --json results/s3gd.json

# "$@" is for snn-sparse bench alone
python expect.py
python fusion.py --json results/fusion.json
python ttfs.py --json results/ttfs.json
python eprop.py --json results/eprop.json
python eprop.py --models --rounds 3 --json results/eprop_models.json
python peers.py --json results/peers.json
