# `longreach serve` in a container, on the CPU:
#
#     docker build -t longreach .
#     docker run --rm -p 127.0.0.1:8000:8000 longreach
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" longreach --model /models/MODEL --context 16k
#     docker run --rm -p 127.0.0.1:8000:8000 -v longreach:/documents longreach --documents /documents
#
# What follows the image's name are options of `longreach serve`. Inside, the server listens at all addresses; who reaches it is decided by -p. Where others do,
# pass -e LONGREACH_API_KEY=...

FROM python:3.11-slim

# PyTorch's own index has the build without CUDA, which is a tenth of the size; everything else is from PyPI. Both in the versions that the tests run with.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /build
# first what changes seldom
COPY constraints.txt .
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[serve,interop]'

RUN useradd --create-home --uid 1000 longreach && mkdir /documents && chown longreach /documents
USER longreach
WORKDIR /home/longreach
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]

# The process gets SIGTERM itself, and lets answers end; `docker stop` should wait as long: docker stop -t 40
ENTRYPOINT ["longreach", "serve", "--host", "0.0.0.0"]
