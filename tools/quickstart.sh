#!/usr/bin/env bash
# Procedural meshes -> voxels -> a trained UNet3D -> chairs that did not exist before: tools/quickstart.sh RUN OUT PER_CLASS
set -euo pipefail
run=$1 out=$2 per_class=$3
data=data/quickstart

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. $per_class meshes of each of four classes -> $data/meshes"
python data_tools/make_shapes.py "$data/meshes" --classes chair table sofa mug --per-class "$per_class" --sheet "$out/training-data.png"

step "2. 32^3 voxels -> $data/voxels (training reads them pooled to 16^3)"
python data_tools/prepare.py "$data/meshes" "$data/voxels" --resolution 32

step "3. training -> $run (Ctrl-C stops it; the same command goes on)"
deepspeed --num_gpus 1 launch/train.py experiment=quickstart data.path="$data/voxels" run_dir="$run"

step "4. 8 chairs, then 9 shapes of other classes -> $out"
python -m shapediff.sample --checkpoint "$run" --class chair --guidance 3 --num 8 --out "$out/chairs" --preview
python -m shapediff.sample --checkpoint "$run" --class table sofa mug --guidance 3 --num 3 --out "$out/others" --preview

step "done: look at $out/chairs/preview.png and $out/others/preview.png; the meshes lie beside them as .obj"
