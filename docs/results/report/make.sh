#!/usr/bin/env bash
# Three losses of the demo's task, two seeds each, and the page that compares them: docs/results/report/report.png. In an empty folder, with
# megatron-opd and Debian's chromium on the PATH; two CPU cores.
set -euo pipefail
small=(sft.steps=500 sft.parallel.tp=1 train.parallel.tp=1 train.parallel.pp=1 rollout.num_prompts=800 score.top_k=8 train.steps=120
  train.save_every=120 train.log_every=20 eval.addition.num_prompts=400)
base=runs/base
python - "$base" <<'PYTHON'
import sys
from pathlib import Path

from megatron_opd.demo.run import DEMOS

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
DEMOS["arithmetic"].prepare(folder)
PYTHON
megatron-opd run demo run_dir="$base" "${small[@]}" --until score
for loss in opd reverse_kl forward_kl; do
  for seed in 0 1; do
    recipe=(demo "${small[@]}" run_dir="runs/$loss-s$seed" models.teacher="$base/teacher" models.student="$base/student"
      rollout.model="$base/sft-hf" rollout.store="$base/rollouts.opd.zarr" score.store="$base/rollouts.opd.zarr"
      train.store="$base/rollouts.opd.zarr" train.init="$base/sft-hf" eval.addition.prompts="$base/prompts/eval.jsonl" train.seed="$seed")
    if [ "$loss" = opd ]; then recipe+=("train.loss={name='opd',advantage_clip=0.5}"); else recipe+=("train.loss={name='$loss'}"); fi
    megatron-opd train "${recipe[@]}" train.eval_every=30 train.evals='["addition"]' train.eval_prompts=100
    megatron-opd convert trained "${recipe[@]}"
    megatron-opd eval demo addition --of sft opd "${recipe[@]:1}"
  done
done
megatron-opd report runs/*-s[01] --group train.loss.name --baseline opd --output report
chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1800 --screenshot=report.png "file://$PWD/report/report.html"
