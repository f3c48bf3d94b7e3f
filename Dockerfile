# The one image of the pool: gateway, replica (with Claude Code), broker and model stub.
# Debian 13. Where no registry is in reach, BASE_IMAGE is one that was made from Debian packages.
ARG BASE_IMAGE=debian:trixie-slim

FROM ${BASE_IMAGE} AS base
# CAs of the network that this is built in, if it has any (docker/extra-ca/*.crt).
COPY docker/extra-ca/ /usr/local/share/ca-certificates/
# Versions come from the Debian release that the base image fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates python3 \
    && update-ca-certificates \
    && apt-get clean && rm -rf /var/lib/apt/lists/*

FROM base AS dependencies
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt /build/
# Compiled here, as the root file system is read-only later: no import must compile each time.
RUN python3 -m venv /opt/claude-jobs \
    && /opt/claude-jobs/bin/pip install --no-cache-dir --no-compile \
        --requirement /build/requirements.txt \
    && /opt/claude-jobs/bin/pip uninstall --yes pip \
    && /opt/claude-jobs/bin/python -m compileall -q /opt/claude-jobs/lib

FROM base
# nats-server is the broker, tini the first process of each container; the rest is what an agent
# needs to work.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        curl git jq less nats-server openssh-client procps ripgrep tini \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10000 supervisor \
    && groupadd --gid 10002 workspace \
    && useradd --uid 10000 --gid supervisor --groups workspace --no-create-home supervisor \
    && useradd --uid 10001 --gid workspace --create-home --shell /bin/bash agent \
    && install --directory --owner=supervisor --group=workspace --mode=0700 /data \
    # A file system in memory is laid over it, which takes this mode and belongs to root.
    && install --directory --mode=1777 /run/broker \
    && install --directory --owner=supervisor --group=workspace --mode=2775 /workspace
COPY --from=dependencies /opt/claude-jobs /opt/claude-jobs
COPY docker/entrypoint /usr/local/bin/entrypoint
# Last, as it changes most: a new version of the application adds less than a megabyte.
COPY app/claude_jobs /opt/app/claude_jobs
RUN python3 -m compileall -q /opt/app

ENV PATH=/opt/claude-jobs/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin \
    PYTHONPATH=/opt/app PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NODE_ENV=production PORT=3000 WORKSPACE_DIR=/workspace \
    AGENT_UID=10001 AGENT_GID=10002 AGENT_HOME=/home/agent
# Not the workspace, where agents write: Python would look there for modules.
WORKDIR /
EXPOSE 3000
# The replica starts as root only to step down at once; swarm.yml names a user for the others.
# hadolint ignore=DL3002
USER 0:0
ENTRYPOINT ["entrypoint"]
CMD ["gateway"]
