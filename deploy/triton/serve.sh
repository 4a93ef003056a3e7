#!/bin/sh
# Serves the GPU models of all releases: links them into one repository, now and as more are exported, then becomes
# Triton. Models are loaded by the sidecar when it activates a release.
#   KAR_RELEASES  folder with the releases (default /kar/releases)
#   KAR_MODELS    repository folder that Triton reads (default /kar/models)
set -eu
releases=${KAR_RELEASES:-/kar/releases}
models=${KAR_MODELS:-/kar/models}

link_models() {
    for model in "$releases"/*/triton/gpu/*/; do
        if [ -d "$model" ]; then ln -sfn "${model%/}" "$models/$(basename "$model")"; fi
    done
}

mkdir -p "$models"
link_models
server=$$
while sleep 5 && kill -0 "$server" 2>/dev/null; do link_models; done >/dev/null &
exec tritonserver --model-repository="$models" --model-control-mode=explicit --exit-timeout-secs=30 "$@"
