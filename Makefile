# Two environments: .venv for development (torch and all), .venv-demo for `make demo` (no torch).
PYTHON ?= python3
# glibc gives large arrays back when they are freed, and the kernel zeroes them again for the next
# one: a third of the time that PyTorch spends on an image. This keeps them.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
PIP_INSTALL = pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo setup check format test test-slow configure clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv-demo/ready  ## segment a real photo on a real Triton server, without torch or Docker
	.venv-demo/bin/triton-sam demo

setup: .venv/ready  ## the development environment

check: .venv/ready  ## format, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready  ## rewrite in the project's format
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test: .venv/ready  ## all tests but the slow ones
	$(KEEP_MEMORY) .venv/bin/python -m pytest -m "not slow"

test-slow: .venv/ready  ## full-size checks: a model of each family served, every SAM 2.1 export
	$(KEEP_MEMORY) .venv/bin/python -m pytest -m slow

configure: .venv/ready  ## write model_repository/*/config.pbtxt from the table
	.venv/bin/triton-sam configure

clean:  ## remove both environments
	rm -rf .venv .venv-demo

.venv-demo/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv-demo (about 60 MB) ..."
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/$(PIP_INSTALL) --editable '.[grpc]'
	touch $@

# sam2 is a source package that compiles against the torch it finds: torch comes first, and no
# build isolation, which would download a second one.
.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (torch and all, 1 to 4 GB) ..."
	$(PYTHON) -m venv .venv
	.venv/bin/$(PIP_INSTALL) setuptools wheel torch torchvision
	SAM2_BUILD_CUDA=0 .venv/bin/$(PIP_INSTALL) --no-build-isolation sam2
	.venv/bin/$(PIP_INSTALL) --editable '.[dev]'
	touch $@
