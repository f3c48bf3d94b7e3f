# The project's commands; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help environment lint test test-quick test-e2e test-cluster test-operations dev format requirements

BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
# Tools that talk to nobody: what they need is in .venv.
export ANSIBLE_HOME := $(CURDIR)/.ansible
SHELL_SCRIPTS := deploy-swarm.sh tools/venv.sh tools/test-environment tools/cluster-environment \
	tools/machines/customize $(wildcard tools/machines/tree/etc/systemd/system-generators/*) docker/entrypoint .ci/run \
	examples/curl.sh app/tests/fake_claude app/tests/soaking_claude bench/stub_claude

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

environment: ## Install what the tests need (.venv, nats-server, rsync)
	@tools/test-environment

lint: environment ## Check style, types and playbooks; changes nothing
	ruff check .
	ruff format --check .
	cd app && mypy claude_jobs tests
	MYPYPATH=app mypy --config-file app/pyproject.toml --exclude tests/cluster tests bench
	MYPYPATH=app mypy --config-file app/pyproject.toml tests/cluster
	mypy --config-file app/pyproject.toml tools/machines
	mypy --config-file app/pyproject.toml roles/*/library/*.py roles/*/filter_plugins/*.py
	yamllint --strict .
	ansible-lint --offline
	shellcheck --external-sources $(SHELL_SCRIPTS)
	@if command -v hadolint >/dev/null; then echo hadolint Dockerfile; hadolint Dockerfile; fi

# The files keep their order: those that end every process below them (an agent's tests) come before there is a pool.
test-quick: lint ## Everything that needs no Docker: lint, units, real processes (15 minutes)
	cd app && python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=app python -m pytest -p no:asyncio tests/test_documents_agree.py tests/test_role_plugins.py \
		tests/test_cluster_preflight.py tests/test_node_verbs.py tests/test_pool_report.py

test-e2e: environment ## A deployment on this machine, under its own name and port
	python -m pytest tests/e2e

test: test-quick test-e2e ## Everything (25 minutes on two cores)

test-cluster: environment ## Virtual machines: one manager and two workers, then three managers (45 minutes)
	tools/cluster-environment
	molecule test
	molecule test --scenario-name ha

test-operations: environment ## The operator's verbs under jobs on the same machines (90 minutes)
	tools/cluster-environment
	for step in destroy create prepare converge side-effect idempotence check verify destroy; do \
		CLUSTER_TESTS=long molecule $$step || exit; \
	done
	for step in destroy create prepare converge verify destroy; do \
		CLUSTER_TESTS=long molecule $$step --scenario-name ha || exit; \
	done

dev: environment ## Run a pool without Docker: http://127.0.0.1:3000
	PYTHONPATH=app python -m claude_jobs.development $(ARGS)

format: environment ## Put the code into the project's form
	ruff check --fix .
	ruff format .

requirements: environment ## Lock the application's dependencies anew
	python -m pip install --quiet uv==0.13.9
	uv pip compile --universal --python-version 3.11 --no-header --no-emit-index-url \
		--no-emit-find-links --upgrade app/pyproject.toml --output-file requirements.txt
