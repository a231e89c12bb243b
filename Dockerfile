# fewbit on NVIDIA GPUs. Build: docker build -t fewbit . What follows the image's name is a fewbit command line.
# -devel: humming-kernels compiles with CUDA's headers, of the version that torch is built for.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

# Triton and our own kernels for CPUs compile when they are first run. Ubuntu keeps one version of each package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fewbit

ENV VIRTUAL_ENV=/opt/fewbit
ENV PATH="$VIRTUAL_ENV/bin:$PATH"
# A layer of its own: it is the largest, and changes least.
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir "torch==2.13.0"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fewbit fewbit
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[gpu]"

# A number, so that an orchestrator can see that it is not root. Compiled kernels are kept in its home.
USER 10001:10001
WORKDIR /home/fewbit

# serve reads FEWBIT_PORT; it listens on loopback, where nothing outside reaches it, until --host says otherwise.
ENV FEWBIT_PORT=8000
EXPOSE 8000
# A large model takes minutes to load, and kernels one more to compile.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', os.environ['FEWBIT_PORT'], 4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]

ENTRYPOINT ["fewbit"]
CMD ["--help"]
