# Packages. The binaries come from a profile with debug information, which goes to packages of its own. BUILD=DIRECTORY on
# the command line of make packages finished binaries instead.

PACKAGES = target/packages
PACKAGE_BUILD = $(if $(filter file,$(origin BUILD)),target/packaged,$(BUILD))

.PHONY: packages build-package check-packages
packages: deps-build $(if $(filter file,$(origin BUILD)),build-package)
	sh packaging/build.sh "$(PACKAGE_BUILD)" "$(PACKAGES)"

# No path of the machine that builds is in the binaries.
build-package: export RUSTFLAGS = --remap-path-prefix=$(CURDIR)=/usr/src/node-image-pivot \
  --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/usr/src/cargo
build-package: cargo
	$(CARGO) build --profile packaged --locked -p node-image-pivot -p node-image-pivot-generator

# Packages the binaries that the other checks use, and installs, upgrades and removes the packages in a container.
check-packages: build
	sh packaging/build.sh "$(BUILD)" target/packages-check
	bash packaging/test.sh target/packages-check
