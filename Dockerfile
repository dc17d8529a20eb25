# alphaspin for a node with CUDA GPUs:
#
#     docker build -t alphaspin .
#     docker run --rm --gpus all --ipc host -v "$PWD:/work" alphaspin train --model FOLDER --data FILE
#
# The devel image has the compiler that builds csrc/ and that Triton wants for its launchers. torch
# brings its own CUDA libraries: the driver of the host has to be new enough for them.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ARG TORCH="torch>=2.8"

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/alphaspin/bin:$PATH

# The distribution pins its packages, and TORCH is the pin that matters: --build-arg TORCH=torch==…
# hadolint ignore=DL3008,DL3013
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/alphaspin \
    && pip install "setuptools>=77" wheel ninja numpy "$TORCH"

COPY . /src
RUN pip install --no-build-isolation "/src[cuda,quantization]" \
    && rm -rf /src \
    && alphaspin --version

# Caches of models and kernels, and run folders, are in what is mounted here.
ENV HF_HOME=/work/.cache/huggingface \
    TRITON_CACHE_DIR=/work/.cache/triton
WORKDIR /work
ENTRYPOINT ["alphaspin"]
CMD ["doctor"]
