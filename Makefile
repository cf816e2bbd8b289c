# SPDX-License-Identifier: GPL-2.0-only
# Everything a fresh Debian machine needs for `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files that run side by side. (One worker waits while another computes, and many tests wait for a mount.)
JOBS := 2
# What tests/programs runs over the emulated files.
PROGRAMS := numactl sysstat procps util-linux prometheus-node-exporter strace attr rsync busybox xxd gawk htop nmon smem \
	libhugetlbfs-bin atop hwloc-nox
INSTALLED := $(VENV)/.installed
# What the service runs.
DPUD ?= $(abspath $(BIN)/dpud)
DESTDIR ?=
PREFIX ?= /usr/local

# Workers import the same tests, and hundreds of daemons the same code: it is compiled to bytecode once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test lint docs bench clean system warm install-system uninstall-system deb

install: system $(INSTALLED) warm

demo: install
	$(BIN)/dpud demo

test: install
	@scripts/debian-packages gcc libc6-dev lz4 zstd trace-cmd mandoc man-db zsh systemd prometheus $(PROGRAMS)
	$(BIN)/pytest -m '' --numprocesses $(JOBS) --dist loadscope --hypothesis-profile ci

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m dpud.docs

bench: install
	scripts/debian-packages lxcfs gcc libc6-dev zstd iproute2
	$(BIN)/dpud bench

install-system:
	@scripts/install-system "$(DPUD)" "$(DESTDIR)" "$(PREFIX)"

uninstall-system:
	@scripts/install-system --remove "$(DESTDIR)" "$(PREFIX)"

deb: $(INSTALLED)
	@scripts/debian-packages dpkg zstd
	@scripts/make-deb $(BIN)/python dist

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

system:
	@scripts/debian-packages fuse

$(INSTALLED): pyproject.toml
	@scripts/make-venv $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

warm: $(INSTALLED)
	@$(BIN)/dpud warm
	@$(BIN)/python -m compileall -q kernelsim fs dpud
