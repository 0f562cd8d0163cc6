#!/bin/sh
# Starts vLLM with the base model{% if rank %} and the adapter{% endif %}, and in front of it the program `{{ name }}`
# on port {{ settings.port }}. Both end together. Needs `vllm` and `flowrun` on the PATH.
set -eu
cd "$(dirname "$0")"
# vLLM would want it as a key, and the program in front asks without one, on loopback.
unset VLLM_API_KEY
vllm serve '{{ base }}' --served-model-name '{{ base_id }}' \
  --host 127.0.0.1 --port {{ model_port }}{% if rank %} \
  --enable-lora --max-lora-rank {{ rank }} --lora-modules '{{ model_id }}=adapter'{% endif %} &
model=$!
front=
trap 'kill $front "$model" 2>/dev/null || :; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
until curl -fs -o /dev/null 'http://127.0.0.1:{{ model_port }}/health'; do
  kill -0 "$model" || exit 1
  sleep 1
done
flowrun serve gateway --port {{ settings.port }} &
front=$!
while kill -0 "$model" 2>/dev/null && kill -0 "$front" 2>/dev/null; do
  sleep 1
done
exit 1
