# Everything that sampling, training and meshing need, on a CPU or, with NVIDIA's container toolkit, on GPUs.
#
#   docker build -t shapediff .
#   docker run --rm -v "$PWD":/work shapediff python -m shapediff.sample --class chair --preview
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work shapediff deepspeed /opt/shapediff/launch/train.py data.path=voxels
#
# As another user than 1000, so that files are yours: --user "$(id -u):$(id -g)".
# TORCH: another torch than constraints.txt names, "torch==2.11.0". PIP_EXTRA_INDEX_URL: an index to look in as well, such as
# PyTorch's for one version of CUDA, or that of its builds for CPUs alone, with which the image is gigabytes smaller.
FROM python:3.11-slim-bookworm

# The libraries that tools/setup.sh looks for; g++ since DeepSpeed compiles a small operator when it first runs on a CPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libegl1 libgl1 libgomp1 libusb-1.0-0 libx11-6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/shapediff

# What is installed depends on these files alone: a change of the code does not install everything anew.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools/setup.sh tools/
COPY shapediff/__init__.py shapediff/
ARG TORCH=""
ARG PIP_EXTRA_INDEX_URL=""
RUN PIP_NO_CACHE_DIR=1 tools/setup.sh /opt/venv base

COPY . .

# Nothing runs as root. Caches go to a home that any user may write to; LOGNAME gives a name to users that have none here.
RUN useradd --uid 1000 --create-home shapediff && chmod 1777 /home/shapediff && install --directory --owner shapediff /work
ENV PATH=/opt/venv/bin:$PATH HOME=/home/shapediff LOGNAME=shapediff PYTHONUNBUFFERED=1
USER shapediff
WORKDIR /work
CMD ["python", "-m", "shapediff.sample", "--help"]
