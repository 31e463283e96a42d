# forerun on the CPU, with its native kernels and the pinned dependencies.
#
#     docker build -t forerun .
#     docker run --rm -v "$PWD/models:/work/models:ro" forerun generate models/target "def main():" --drafter lookup
#
# On x86-64 the usual index gives torch with CUDA, which is large and not used here. For a small image name an index
# of CPU builds: --build-arg TORCH_INDEX=ADDRESS

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools
COPY setup.py pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY src src
# Without a platform in its name the wheel has no kernels, and the image is not what it says.
RUN pip wheel . --no-deps --no-build-isolation -w /wheels && ls /wheels/*-none-linux_*.whl

FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 forerun
COPY constraints.txt /tmp/constraints.txt
# torch by itself and first: it changes least often, and is nearly all of the image.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c /tmp/constraints.txt torch
COPY --from=build /wheels /tmp/wheels
RUN pip install -c /tmp/constraints.txt /tmp/wheels/*.whl
USER 1000
WORKDIR /work
ENTRYPOINT ["forerun"]
CMD ["--help"]
