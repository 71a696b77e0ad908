#!/usr/bin/env bash
# The figures that nobody has measured yet: Mistral Small 3.1 24B fine-tuned on goemotions-15 on a cloud's spot GPU, against the tutorial's
# recipe and two hosted models, and the rows to paste. From the project's folder, with SkyPilot on the PATH and a bucket's credentials:
#
#   MAX_USD=20 LLM_MAX_USD=2 LLMS='gpt-4o-mini@https://api.openai.com/v1 mistral-small-latest@https://api.mistral.ai/v1' \
#       KEYS='OPENAI_API_KEY MISTRAL_API_KEY' benchmarks/first_24b.sh s3://team POSTS
#
# POSTS is a folder or hub data set that `emotion-train prepare` takes. Every step is a command that it prints; typed again it goes on where it
# stopped, and pays for nothing twice. More words are values of the run (train.epochs=1). What can be set beside that:
#
#   CONFIG, TUTORIAL   run configs (default: the shipped recipe and the tutorial's)
#   PREPARE            options of `emotion-train prepare`
#   SKY                options of `sky jobs launch`, such as '--infra aws --secret HF_TOKEN'
#   LOCAL=1            this machine trains, not SkyPilot; ACCELERATE=cpu: with that layout
#   PRICES             '0 0' for an endpoint of your own: dollars of a million tokens in and out
#   ROWS               posts that each hosted model is asked (default 500)
#   OUT                where adapters, pages and the benchmark go (default: first-24b)
set -euo pipefail

bucket=${1:?the bucket, such as s3://team}
posts=${2:?the posts, as emotion-train prepare takes them}
shift 2
name=first-24b out=${OUT:-first-24b}
config=${CONFIG:-emotion_train/configs/mistral_small_3_1.yaml}
tutorial=${TUTORIAL:-emotion_train/configs/mistral_small_3_1_tutorial.yaml}

show() { printf '\n$ %s\n' "$(printf '%q ' "$@")"; "$@"; }

if [ "${LOCAL:-}" ]; then
  how=(--local ${ACCELERATE:+--accelerate-config "$ACCELERATE"})
else
  how=(--yes ${MAX_USD:+--max-usd "$MAX_USD"} ${SKY:+--sky "$SKY"})
fi
up() {
  local run=$1 config=$2; shift 2
  show emotion-launch up "$posts" --bucket "$bucket" --name "$name" --prepare "${PREPARE:-}" "${how[@]}" \
    --folder "$out/$run" --config "$config" run.id="$run" "$@"
}
up recipe "$config" "$@"
up tutorial "$tutorial" --no-export "$@"

runs=$bucket/$name/runs
show emotion-launch compare "$runs/recipe" "$runs/tutorial" --page "$out/comparison.html"

asked=()
for llm in ${LLMS:-}; do asked+=(--llm "$llm"); done
for key in ${KEYS:-}; do asked+=(--key-env "$key"); done
if [ "${PRICES:-}" ]; then
  read -r dollars_in dollars_out <<< "$PRICES"
  asked+=(--price-in "$dollars_in" --price-out "$dollars_out")
fi
if [ "${LLMS:-}" ]; then
  show emotion-train benchmark --run "$runs/recipe" --data "$bucket/$name/posts" --split validation --rows "${ROWS:-500}" \
    ${LLM_MAX_USD:+--max-usd "$LLM_MAX_USD"} "${asked[@]}" --yes --out "$out/benchmark"
fi

show python "$(dirname "$0")/first_24b_rows.py" "$out"
