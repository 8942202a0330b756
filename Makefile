# make demo    pre-train, reconstruct and probe on built-in photographs: under 5 minutes after the install
# make test    everything that must hold: under 25 minutes on 2 cores, install included
# make lab     JupyterLab on the tour
# make readme  README.md from nbs/index.ipynb
# make install the environment in .venv (about 2.5 minutes, 6 GB); the others do it when it is missing
# Needs make and Python 3.10 or newer. Another interpreter: make install PYTHON=/path/to/python3.12

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
export PIP_ROOT_USER_ACTION := ignore

.PHONY: demo test lab readme install moved
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(VENV)/bin/mae-repro demo

test: $(STAMP)
	@$(VENV)/bin/python tests/run.py

lab: $(STAMP)
	@$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/00_tour.ipynb

readme: $(STAMP)
	@$(VENV)/bin/python tests/readme.py

install: $(STAMP)
	@:

# An environment knows its own place: one that was moved or copied is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): moved
endif

# The stamp is written last, so that an interrupted install is taken up again.
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@test "$$(cat $@ 2>/dev/null || echo '$(CURDIR)')" = '$(CURDIR)' || rm -rf $(VENV); rm -f $@
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  found=; for python in $(PYTHON) $(if $(PYTHON),,python3.12 python3.11 python3.13 python3.10 python3 python); do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && found=$$python && break; done; \
	  test -n "$$found" || { echo "make: no Python 3.10 or newer with venv$(if $(PYTHON), at $(PYTHON)). Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  echo "making $(VENV) with $$($$found --version); the install takes about 2.5 minutes and 6 GB"; \
	  $$found -m venv --clear $(VENV); }
	@echo "installing mae_repro and what it needs into $(VENV)"
	@# constraints.txt is tried on 3.10 to 3.13; a newer Python gets what the ranges in settings.ini allow.
	@pins=$$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info < (3, 14) else "")') && \
	  $(PIP) install $$pins setuptools wheel packaging && \
	  $(PIP) install --no-build-isolation $$pins -e '.[dev]' || { \
	  echo "make: the install did not finish; what pip said is above. Run the same command again to go on" >&2; exit 1; }
	@printf '%s' '$(CURDIR)' > $@
