#!/usr/bin/env python3
"""Prints the software bill of materials of the two programs as CycloneDX 1.5, or with `--licences` the texts of licences.

The crates are those that are linked into the programs, and procedural macros. The bill depends only on Cargo.lock, the
platform and SOURCE_DATE_EPOCH.
"""
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tomllib
import uuid

PROGRAMS = ["node-image-pivot", "node-image-pivot-generator"]


def output(variable, program, *arguments):
    """Returns the output of a program, which a variable of the environment may name."""
    command = [os.environ.get(variable, program), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def metadata():
    host = next(line for line in output("RUSTC", "rustc", "-vV").splitlines() if line.startswith("host: "))
    target = os.environ.get("CARGO_BUILD_TARGET", host.removeprefix("host: "))
    return json.loads(output("CARGO", "cargo", "metadata", "--locked", "--format-version=1", f"--filter-platform={target}"))


def linked(resolve, roots):
    """Returns the ids of the crates that the roots link, with those that each of them uses itself."""
    nodes = {node["id"]: node for node in resolve["nodes"]}
    found, pending = {}, list(roots)
    while pending:
        crate = pending.pop()
        if crate not in found:
            found[crate] = sorted(
                dep["pkg"] for dep in nodes[crate]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])
            )
            pending += found[crate]
    return found


def reference(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package, checksums):
    entry = {
        "type": "application" if package["name"] in PROGRAMS else "library",
        "bom-ref": reference(package),
        "name": package["name"],
        "version": package["version"],
        # The slash is an older form of OR.
        "licenses": [{"expression": package["license"].replace("/", " OR ")}],
        "purl": reference(package),
    }
    checksum = checksums.get((package["name"], package["version"]))
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return entry


def licences(listed):
    """Returns the texts in the crates of others, each once, below the names of the crates that have it."""
    texts = {}
    for package in listed:
        if package["source"]:
            directory = pathlib.Path(package["manifest_path"]).parent
            # Sources of C libraries are one directory deeper.
            for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
                named = path.name.upper().startswith(("LICEN", "COPYING", "COPYRIGHT", "UNLICENSE", "NOTICE"))
                if named and path.suffix != ".rs" and path.is_file():
                    texts.setdefault(path.read_text(errors="replace").strip(), []).append(package)
    for text, users in texts.items():
        names = ", ".join(dict.fromkeys(f"{user['name']} {user['version']} ({user['license']})" for user in users))
        yield f"{'=' * 80}\n{names}\n\n{text}\n"


def bill(packages, roots, crates, listed):
    with open("Cargo.lock", "rb") as file:
        checksums = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.load(file)["package"]}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "name": PROGRAMS[0], "version": packages[roots[0]]["version"]},
        },
        "components": [component(package, checksums) for package in listed],
        "dependencies": sorted(
            ({"ref": reference(packages[id]), "dependsOn": [reference(packages[d]) for d in deps]} for id, deps in crates.items()),
            key=lambda entry: entry["ref"],
        ),
    }
    if "SOURCE_DATE_EPOCH" in os.environ:
        time = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
        document["metadata"]["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ")
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document)).urn
    return json.dumps(document, indent=2)


def main():
    found = metadata()
    packages = {package["id"]: package for package in found["packages"]}
    roots = [id for id in found["workspace_members"] if packages[id]["name"] in PROGRAMS]
    crates = linked(found["resolve"], roots)
    listed = sorted((packages[id] for id in crates), key=reference)
    print("\n".join(licences(listed)) if "--licences" in sys.argv else bill(packages, roots, crates, listed))


main()
