#!/usr/bin/env bash
# Set up a virtual environment: tools/setup.sh VENV base|test
# Environment: PYTHON (default python3), TORCH (default: the line in constraints.txt).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 what=$2
python=${PYTHON:-python3}

say() { printf '\033[1m%s\033[0m\n' "setup: $*"; }
die() { printf '\033[31m%s\033[0m\n' "setup: $*" >&2; exit 1; }

# Debian packages, by what shows that each is there.
missing=()
need_library() { ldconfig -p 2>/dev/null | grep -q "$1" || missing+=("$2"); }
if command -v ldconfig >/dev/null || [ -x /sbin/ldconfig ]; then
  PATH=$PATH:/sbin
  need_library libusb-1.0.so.0 libusb-1.0-0   # open3d
  need_library libGL.so.1 libgl1
  need_library libgomp.so.1 libgomp1
  need_library libEGL.so.1 libegl1
  need_library libX11.so.6 libx11-6
fi
command -v g++ >/dev/null || missing+=(g++)  # deepspeed compiles a small operator on first use
command -v "$python" >/dev/null || missing+=(python3)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
  sudo=""
  [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
  if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
    say "installing Debian packages: ${missing[*]}"
    $sudo apt-get update -qq || die "apt-get update failed"
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "${missing[@]}" >/dev/null || die "apt-get install ${missing[*]} failed"
  else
    die "please install these system packages, then try again: sudo apt-get install ${missing[*]}"
  fi
fi

# The tests of pages drive a browser; without one they are skipped, but fail where CI is set.
if [ "$what" = test ] && ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
  sudo=""
  [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
  $sudo apt-get install -y -qq chromium >/dev/null 2>&1 || say "no Chromium found, and none could be installed"
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or newer is needed, found $("$python" -V)"
[ -x "$venv/bin/python" ] || { say "creating $venv"; "$python" -m venv "$venv"; }

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [ -n "${TORCH:-}" ]; then grep -v '^torch==' constraints.txt >"$constraints"; else cp constraints.txt "$constraints"; fi
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"; }

if [ "$what" = base ]; then
  say "torch first: everything else builds against it"
  install --upgrade pip setuptools wheel ninja packaging numpy
  # A torch that is there and fits (one for your CUDA, say) is left alone.
  install "${TORCH:-torch}"
  say "shapediff and what it trains and meshes with (a few minutes)"
  install --no-build-isolation --editable ".[train,mesh]"
else
  install --no-build-isolation --editable ".[train,mesh,dev]"
  "$venv/bin/python" -c 'import torch_scatter' 2>/dev/null || {
    say "compiling torch-scatter, once (5 minutes)"
    install --no-build-isolation torch-scatter
  }
fi
touch "$venv/.stamp-$what"
say "$what environment ready in $venv"
