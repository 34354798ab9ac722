# Front door. `make check` and `make demo` install what they need (Debian 12 or later, as root) and
# need nothing else but a Rust toolchain.

DESTDIR ?=
CARGO ?= cargo
# Set on the command line only, as an environment may have variables of these names for other programs. BUILD: the directory
# of the binaries, for packagers who build elsewhere. PREFIX: /usr, the only one that works, see install-check.
ifneq ($(origin BUILD),command line)
BUILD = target/release
endif
ifneq ($(origin PREFIX),command line)
PREFIX = /usr
endif

UNITS = node-image-pivot.target node-image-pivotd.service node-image-pull.service \
        node-image-overlay.service node-image-finish.service
COMMAND = $(BUILD)/node-image-pivot
# In double quotes wherever it is used: a directory's name may have spaces.
usr = $(DESTDIR)$(PREFIX)
unitdir = $(usr)/lib/systemd/system
dracutdir = $(usr)/lib/dracut/modules.d/98node-image-pivot

.PHONY: all build deps deps-build cargo install check check-quick check-bed check-containers demo bench bench-boot fuzz docs clean

all: build

cargo:
	@command -v $(CARGO) >/dev/null || { \
	  echo "$(CARGO) not found: install a Rust toolchain (1.89 or later, with rustfmt and clippy), see rust-lang.org," \
	       "or set CARGO=" >&2; exit 1; }

# What packages are built and checked with.
PACKAGE_DEPS = dpkg-dev debhelper fakeroot lintian rpm rpmlint debugedit elfutils checkpolicy semodule-utils \
               python3-venv
# What the agent is built and tested with; the test bed brings its own list.
DEBIAN_BUILD_DEPS = build-essential binutils pkg-config libostree-dev ostree skopeo systemd dbus shellcheck dracut-core cpio \
                    python3 erofs-utils openssl git zsh fish $(PACKAGE_DEPS)

deps-build: cargo
	@command -v dpkg-query >/dev/null || { \
	  echo "make deps knows Debian only; install the equivalents of: $(DEBIAN_BUILD_DEPS)" >&2; exit 1; }
	@missing=; for package in $(DEBIAN_BUILD_DEPS); do \
	  dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; fi

deps: deps-build
	@bash tests/bed/deps.sh

build: cargo
	$(CARGO) build --release -p node-image-pivot -p node-image-pivot-generator

# Builds first, unless BUILD names a directory of finished binaries. tests/units.rs compares the
# installed files with a list.
ifeq ($(origin BUILD),file)
install: build
endif
install: install-check
	install -D -m 0755 "$(COMMAND)" "$(usr)/bin/node-image-pivot"
	install -D -m 0755 "$(BUILD)/node-image-pivot-generator" \
	  "$(usr)/lib/systemd/system-generators/node-image-pivot-generator"
	install -d "$(unitdir)" "$(dracutdir)"
	install -m 0644 $(addprefix units/,$(UNITS)) "$(unitdir)"
	ln -sfn node-image-pivot.target "$(unitdir)/node-image-overlay.target"
	install -D -m 0644 packaging/dbus/org.nodeimage.Pivot1.conf "$(usr)/share/dbus-1/system.d/org.nodeimage.Pivot1.conf"
	install -D -m 0644 packaging/catalog/node-image-pivot.catalog "$(usr)/lib/systemd/catalog/node-image-pivot.catalog"
	install -d "$(usr)/share/selinux/packages"
	install -m 0644 packaging/selinux/*.cil "$(usr)/share/selinux/packages"
	install -m 0755 dracut/98node-image-pivot/module-setup.sh "$(dracutdir)"
	$(call generate,man 1,man/man1/node-image-pivot.1)
	$(call generate,man 5,man/man5/node-image-pivot.conf.5)
	$(call generate,man 8,man/man8/node-image-pivotd.8)
	$(call generate,completions bash,bash-completion/completions/node-image-pivot)
	$(call generate,completions zsh,zsh/site-functions/_node-image-pivot)
	$(call generate,completions fish,fish/vendor_completions.d/node-image-pivot.fish)

# Installs the output of the command with the arguments $(1) as share/$(2), readable by all users under any umask.
define generate
install -D -m 0644 /dev/null "$(usr)/share/$(2)"
"$(COMMAND)" $(1) >"$(usr)/share/$(2)"
endef

# The policy module in the form that `semodule -X 200 -i` installs without a compiler. Packages have it, a plain install does not.
# Version 19 of the format: an older libsepol than the builder's reads it, and each builder writes the same.
.PHONY: install-selinux-module
install-selinux-module: module = $(usr)/share/selinux/packages/targeted/node-image-pivot
install-selinux-module:
	install -d "$(dir $(module))"
	checkmodule -M -m -c 19 -o "$(module).mod" packaging/selinux/node-image-pivot.te
	semodule_package -o "$(module).pp" -m "$(module).mod" -f packaging/selinux/node-image-pivot.fc
	rm "$(module).mod"

# Units, D-Bus and SELinux policy and dracut look below /usr only, and the agent keeps its own files there over the switch.
.PHONY: install-check
install-check:
	@[ "$(PREFIX)" = /usr ] || { \
	  echo "cannot install below $(PREFIX): systemd, D-Bus and dracut find these files only below /usr;" \
	       "use DESTDIR= to install into another root" >&2; exit 1; }

# Tests that boot virtual machines, which keep one core busy each; those that take longest first. All others of the
# test bed boot containers, of which only one may run at a time. Those in APART need a suite of Debian that moves.
MACHINES = disk dropin vm selinux
APART = sealed newest
CONTAINERS = $(filter-out $(MACHINES) $(APART),$(basename $(notdir $(wildcard tests/harness/tests/*))))
BED_TEST = $(CARGO) test --release --no-fail-fast -p testbed
# All other tests. Also for one of them: with the same packages cargo compiles the dependencies once, as their features are
# the same.
QUICK_TEST = $(CARGO) test --release --no-fail-fast --workspace --exclude testbed
# The only one of these that needs images of the test bed.
NEEDS_IMAGES = the_test_beds_images_are_imported_alike

# The quick tests first; what the test bed needs besides the agent is built meanwhile. Then two of the others at a time.
# QUICK_TEST puts an agent with failpoints into target/release. The second step packages and boots the agent from there, so
# nothing in it may run QUICK_TEST.
check: deps
	$(MAKE) deps-browser
	$(MAKE) -j2 --output-sync=target check-quick check-images
	$(MAKE) -j2 -k --output-sync=target check-containers check-packages $(addprefix check-,$(MACHINES))

check-quick:
	$(CARGO) fmt --all --check
	shellcheck packaging/*.sh packaging/rpm/build.sh dracut/98node-image-pivot/*.sh initramfs/carry.sh dracut/test.sh \
	  fuzz/run.sh tests/docs.sh tests/floor.sh tests/cross.sh tests/bed/incumbent.sh tests/bed/audit.sh tests/bed/disk.sh \
	  tests/bed/medium.sh tests/bed/dracut.sh tests/bed/ignition.sh tests/bed/sealed.sh tests/bed/sealed-disk.sh \
	  tests/bed/sealed-tree.sh
	sh tests/docs.sh --rust
	$(MAKE) check-licences
	$(MAKE) check-workflow
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(QUICK_TEST) -- --skip $(NEEDS_IMAGES)
	$(MAKE) check-browser
	sh tests/floor.sh "$(COMMAND)" "$(BUILD)/node-image-pivot-generator"
	sh dracut/test.sh "$(BUILD)"
	$(BED_TEST) --no-run
	$(BED_TEST) --lib --bins

check-bed:
	bash tests/bed/build.sh ahead

.PHONY: check-images
check-images: check-bed
	$(QUICK_TEST) --test pull $(NEEDS_IMAGES)

check-containers:
	$(BED_TEST) $(addprefix --test ,$(CONTAINERS)) -- --test-threads=1

.PHONY: $(addprefix check-,$(MACHINES))
$(addprefix check-,$(MACHINES)): check-%:
	$(BED_TEST) --test $* -- --test-threads=1

# Systems with a composefs root: installed with fs-verity, and live. Debian's next release provides their ostree.
.PHONY: check-sealed
check-sealed: deps
	$(BED_TEST) --test sealed -- --test-threads=1 --nocapture

# Cuts the power at POWER_CUTS moments of the deployments to disks, and boots each disk afterwards: about two minutes for
# each cut and kind of deployment.
.PHONY: check-power-cuts
POWER_CUTS = 20
check-power-cuts: deps
	PIVOT_POWER_CUTS=$(POWER_CUTS) $(BED_TEST) --test disk --test vm -- --test-threads=1 --nocapture \
	  an_installed_system the_next_release

# Pivots to and from the newest systemd, of a suite that changes each day: a change there may make this fail.
.PHONY: check-newest
check-newest: deps
	$(BED_TEST) --test newest -- --test-threads=1 --nocapture

# Draws pictures of `report --svg` in a browser. PIVOT_PICTURES=DIRECTORY keeps the pictures.
.PHONY: check-browser deps-browser
BROWSER = chromium-headless-shell fonts-dejavu-core
deps-browser:
	@dpkg-query -W -f '$${db:Status-Status}\n' $(BROWSER) 2>/dev/null | grep -cx installed | grep -qx $(words $(BROWSER)) || { \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(BROWSER); }

check-browser: deps-build deps-browser
	$(QUICK_TEST) --lib a_browser_draws -- --ignored | tee -a /dev/stderr | grep ' 1 passed' >/dev/null

# Runs one suite and shows its output: NAME=vm, of the test bed or of any other package. Where several packages have a suite
# of this name, all of them. TEST=PART: only tests with that in their names.
.PHONY: check-one
check-one: deps
	@bed='$(wildcard $(addprefix tests/harness/tests/$(NAME),.rs /main.rs))'; \
	others='$(wildcard $(foreach dir,. tests/bench generators crates/*,\
	  $(addprefix $(dir)/tests/$(NAME),.rs /main.rs)))'; \
	[ -n '$(NAME)' ] && [ -n "$$bed$$others" ] || { \
	  echo 'cannot run the suite "$(NAME)": set NAME= to a suite of tests/harness/tests (such as vm), of tests (such as' \
	       'pull) or of a crate' >&2; exit 1; }; \
	if [ -n "$$bed" ]; then $(BED_TEST) --test $(NAME) -- --test-threads=1 --nocapture $(TEST) || exit; fi; \
	if [ -n "$$others" ]; then $(QUICK_TEST) --test $(NAME) -- --nocapture $(TEST); fi

include packaging/packages.mk

demo: deps
	$(CARGO) run --release -p testbed --bin demo

# docs/benchmarks.md says what it measures. BENCH_ROUNDS=N; BENCH_QUICK=1: one round on small images;
# BENCH_CASES=PART: only cases with that in their names; BENCH_BEFORE=COMMIT: also its importer; BENCH_PROFILE=1: once more
# under perf.
bench: deps $(if $(BENCH_PROFILE),deps-perf)
	$(CARGO) run --release -p benchmark -- compare $(if $(BENCH_ROUNDS),--rounds '$(BENCH_ROUNDS)') \
	  $(if $(BENCH_CASES),--cases '$(BENCH_CASES)') $(if $(BENCH_BEFORE),--before '$(BENCH_BEFORE)') \
	  $(if $(BENCH_PROFILE),--profile)
	$(CARGO) test --release -p node-image-pivot-generator --test golden start_up_time -- --nocapture

.PHONY: deps-perf
deps-perf:
	@command -v perf >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends linux-perf

# The whole flow, from the start of the pull to multi-user.target. BENCH_MACHINE=container or vm: only that;
# BENCH_IMAGE=NAME: another node image than node-b.
bench-boot: deps
	BENCH_MACHINE='$(BENCH_MACHINE)' BENCH_IMAGE='$(BENCH_IMAGE)' $(CARGO) run --release -p testbed --bin bench-boot

# The parsers of what comes from elsewhere, for FUZZ_SECONDS (60) each. `make check` replays the seeds.
fuzz: deps-build
	sh fuzz/run.sh

# Builds docs/ as a web book. Not part of `make check`: the pages are plain Markdown.
docs:
	@command -v mdbook >/dev/null || { echo "mdbook not found: cargo install --locked mdbook" >&2; exit 1; }
	mdbook build

clean:
	$(CARGO) clean
