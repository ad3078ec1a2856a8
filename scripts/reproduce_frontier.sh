#!/usr/bin/env bash
# The frontier on tinyworld (scripts/README.md): learning a skill against forgetting the facts of the world.
#
#   scripts/reproduce_frontier.sh [FOLDER]      within an hour on two cores; goes on where it stopped
#
# Full and half fine-tuning and LoRA at five learning rates with three seeds each; of every fully tuned model, its Half-Reset and
# its average with the base; full fine-tuning with L2-SP at two learning rates. The table, the sentences and the figure stand in
# FOLDER at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-runs/frontier}
python=${PYTHON:-.venv/bin/python}
known=tinyworld/facts,tinyworld/facts-reworded
export OMP_NUM_THREADS=1 # the model is tiny: two runs side by side are faster than one with two threads
mkdir -p "$folder/reset" "$folder/averaged"

hft() { "$python" -m hftcli "$@"; }

grid() { # name, learning rates, and what else the recipe says
    local name=$1 rates=$2
    shift 2
    hft compare --recipe tinyworld-continual --set continual.tasks=tinyworld/skill --set "eval.tasks=[$known]" \
        --set train.max_steps=150 --set eval.num_points=10 --vary "train.learning_rate=$rates" --seeds 3 --output "$folder/$name" "$@" \
        >"$folder/$name.txt"
}

make_reset() { # run, output; the seed of the run draws the half
    hft reset --base tinyworld --tuned "$1" --set "freeze.seed=${1##*-}" --output "$2"
}

make_averaged() {
    hft merge --base tinyworld --tuned "$1" --interpolate 0.5 --output "$2"
}

remake() { # every fully tuned model by a control, scored as the runs are
    local kind=$1 run model
    for run in "$folder"/full/*-[123]/; do
        run=${run%/}
        model=$folder/$kind/$(basename "$run")
        [ -e "$model/merge.json" ] || "make_$kind" "$run" "$model" >/dev/null
        [ -e "$model/evaluation.json" ] || hft eval --model "$model" --tasks "tinyworld/skill,$known" --max-length 128 \
            --output "$model/evaluation.json" >/dev/null
    done
}

rates=2e-4,3e-4,5e-4,7e-4,1e-3
{
    grid full "$rates" --set freeze.trainable_fraction=1.0
    remake reset
    remake averaged
    grid l2sp 5e-4,1e-3 --set freeze.trainable_fraction=1.0 --set 'method.l2sp={strength: 0.01}'
    grid lora 1.5e-3 --set freeze.trainable_fraction=1.0 --set 'method.lora={}'
} &
first=$!
{
    grid half "$rates" --set freeze.trainable_fraction=0.5
    grid lora 2e-3,3e-3,5e-3,1e-2 --set freeze.trainable_fraction=1.0 --set 'method.lora={}'
} &
second=$!
wait $first
wait $second

hft compare "$folder"/{full,half,lora,reset,averaged,l2sp}/*-[123]/ --figure "$folder/frontier.svg" | tee "$folder/frontier.txt"
