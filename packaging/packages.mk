# Packages. The binaries come from a profile with debug information, which goes to packages of its own. BUILD=DIRECTORY on
# the command line of make packages finished binaries instead.

PACKAGES = target/packages
PACKAGE_BUILD = $(if $(filter file,$(origin BUILD)),target/packaged,$(BUILD))

.PHONY: packages build-package check-packages
packages: deps-build $(if $(filter file,$(origin BUILD)),build-package)
	sh packaging/build.sh "$(PACKAGE_BUILD)" "$(PACKAGES)"

# No path of the machine that builds is in the binaries.
cargo_home = $(or $(CARGO_HOME),$(HOME)/.cargo)
build-package: export RUSTFLAGS = --remap-path-prefix=$(CURDIR)=/usr/src/node-image-pivot \
  --remap-path-prefix=$(cargo_home)=/usr/src/cargo
build-package: export CFLAGS += -ffile-prefix-map=$(CURDIR)=/usr/src/node-image-pivot \
  -ffile-prefix-map=$(cargo_home)=/usr/src/cargo
build-package: cargo
	$(CARGO) build --profile packaged --locked -p node-image-pivot -p node-image-pivot-generator

# The sources with all crates, which build without a network.
.PHONY: source
source: cargo
	bash packaging/source.sh target/source

# Two builds of that archive, without a network and under different conditions, must be equal byte for byte.
.PHONY: packages-check
packages-check: deps-build source
	bash packaging/reproduce.sh target/source/node-image-pivot-*.tar.xz target/reproduce

# Documents that the packages contain, in the source tree: the bill of materials, and the licences of the crates of others.
.PHONY: package-documents
package-documents:
	python3 packaging/sbom.py >sbom.cdx.json
	python3 packaging/sbom.py --licences >third-party-licences.txt

# Licences, sources and unwanted crates, by deny.toml. The database of advisories is not in a registry: check-advisories
# fetches it with git, so it is not part of `make check`.
# cargo-deny reads the crates of all platforms, of which a build fetches only its own.
.PHONY: check-licences check-advisories
check-licences: cargo
	@$(CARGO) fetch --locked
	$(call tool,cargo-deny) --offline --locked check --hide-inclusion-graph bans licenses sources

check-advisories: cargo
	@$(CARGO) fetch --locked
	$(call tool,cargo-deny) --locked check --hide-inclusion-graph advisories

# Looks for missing keys in the workflow, and for ways to attack it. Does not execute it, and accepts unknown keys.
.PHONY: check-workflow
check-workflow:
	$(call tool,zizmor) --offline --no-progress --quiet --strict-collection .github/workflows

# A program of tools.txt. They are kept where `make clean` does not remove them, in a directory for each tools.txt.
define tool
@tools=$(or $(PIVOT_TESTBED_CACHE),/var/cache/node-image-pivot-testbed)/tools/$$(sha256sum packaging/tools.txt | cut -c1-16); \
[ -x "$$tools/bin/$(1)" ] || { python3 -m venv "$$tools" && \
  "$$tools/bin/pip" install --quiet --require-hashes --requirement packaging/tools.txt; } && \
CARGO='$(CARGO)' "$$tools/bin/$(1)"
endef

# Packages the binaries that the other checks use, and installs, upgrades and removes the packages in a container. Nothing
# that runs beside it in `make check` builds the agent with other features.
check-packages: build
	sh packaging/build.sh "$(BUILD)" target/packages-check
	bash packaging/test.sh target/packages-check

# Builds the Containerfile on an image with Debian 12.
.PHONY: check-containerfile
check-containerfile: deps packages
	@command -v buildah >/dev/null || { \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends buildah crun; }
	bash packaging/test-image.sh "$(PACKAGES)"

# Other architectures. tests/cross.sh fetches Debian's compiler and the libraries of each.
ARCHITECTURES = aarch64 ppc64le s390x
.PHONY: cross check-cross $(addprefix cross-,$(ARCHITECTURES)) $(addprefix check-cross-,$(ARCHITECTURES))
cross: $(addprefix cross-,$(ARCHITECTURES))
$(addprefix cross-,$(ARCHITECTURES)): cross-%: cargo
	bash tests/cross.sh $* $(CARGO) build --release --locked -p node-image-pivot -p node-image-pivot-generator

# Tests of the crates that read and write binary formats (tar, ostree objects, SELinux policies, ELF, D-Bus messages), one of
# which imports a whole image, with the processor emulated, on ppc64le with pages of 64 KiB. QEMU cannot run the skipped tests:
# before 9.0 it lacks the system call openat2,
CROSS_SKIP = entries_with_the_ unusual_lines_are_left_to_libselinux
# and it does not report that a program is missing.
CROSS_SKIP += output_and_each_kind_of_failure_are_reported
check-cross: check-cross-ppc64le check-cross-s390x
$(addprefix check-cross-,$(ARCHITECTURES)): check-cross-%: cargo
	bash tests/cross.sh $* $(CARGO) test --locked -p support -p selinux-labels -p node-store -- $(addprefix --skip ,$(CROSS_SKIP))
