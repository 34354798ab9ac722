//! The quick mode, so that the benchmark cannot rot: all cases on small images, real registry, both sides.
//!
//! Runs as root, as the benchmark does.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::process::Command;

use serde_json::Value;

const CASES: [&str; 10] = [
    "same-base",
    "older-base",
    "nothing-in-common",
    "growth-1",
    "growth-10",
    "growth-50",
    "growth-100",
    "plain-same-base",
    "plain-older-base",
    "recompressed",
];
const MEASURES: [&str; 9] =
    ["wall", "cpu", "fetched", "blobs", "rss", "skopeo_rss", "tmpfs_peak", "tmpfs_resident", "tmpfs_kept"];

#[test]
fn quick_mode_measures_everything() {
    let out = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_benchmark"))
        .args(["compare", "--out"])
        .arg(out.path())
        .env("BENCH_QUICK", "1")
        .output()
        .unwrap();
    let (table, log) = (String::from_utf8(run.stdout).unwrap(), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{log}");

    let text = fs::read(out.path().join("bench.json")).unwrap();
    let record: Value = serde_json::from_slice(&text).unwrap();
    let cases = record["cases"].as_array().unwrap();
    let names: Vec<&str> = cases.iter().map(|case| case["runs"]["case"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, CASES);
    for case in cases {
        let name = case["runs"]["case"]["name"].as_str().unwrap();
        for side in ["ours", "incumbent", "limit"] {
            let samples = case["runs"][side].as_array().unwrap();
            assert_eq!(samples.len(), 1, "{name} {side}");
            for field in ["wall", "cpu", "bytes", "tmpfs_peak", "tmpfs_end"] {
                let value = samples[0][field].as_f64().unwrap();
                assert!(value > 0.0, "{name} {side}: {field} is {value}\n{log}");
            }
        }
        for (row, measure) in case["rows"].as_array().unwrap().iter().zip(MEASURES) {
            assert_eq!(row["measure"], measure);
            let measured = row["ours"].as_f64().unwrap() > 0.0 && row["incumbent"].as_f64().unwrap() > 0.0;
            // A small image may be pulled between two looks at skopeo.
            assert!(measured || row["measure"] == "skopeo_rss", "{name}: {row}");
            assert_eq!(row["goal"].is_null(), row["met"].is_null(), "{name}: {row}");
        }
        assert_eq!(case["rows"].as_array().unwrap().len(), MEASURES.len());
        let tree = &case["runs"]["ours"][0]["tree"];
        assert!(tree.as_str().unwrap().len() > 128 && tree == &case["runs"]["incumbent"][0]["tree"], "{name}: {tree}");
        // Whatever the machine does meanwhile: the booted repo is not copied, and unchanged layers are not fetched.
        let (ours, theirs) = (&case["runs"]["ours"][0], &case["runs"]["incumbent"][0]);
        assert!(ours["tmpfs_peak"].as_u64() < theirs["tmpfs_peak"].as_u64(), "{name}");
    }
    let fetched = |at: usize| cases[at]["runs"]["ours"][0]["bytes"].as_u64().unwrap();
    assert!(fetched(0) * 10 < fetched(2) && fetched(3) < fetched(4) && fetched(4) < fetched(5), "{table}");
    assert!(record["etc"]["apply"].as_f64().unwrap() > 0.0);

    let deployments = record["deployments"].as_array().unwrap();
    assert_eq!(deployments.len(), 1);
    for deployment in deployments {
        let bytes = |side: &str| deployment["runs"][side][0]["bytes"].as_u64().unwrap();
        assert!(bytes("ours") > 0 && bytes("ours") * 10 < bytes("incumbent"), "{deployment}");
        let rows: Vec<&Value> = deployment["rows"].as_array().unwrap().iter().map(|row| &row["measure"]).collect();
        assert_eq!(rows, ["wall", "fetched"], "{deployment}");
    }
    assert_eq!(table.matches("\n### ").count(), 9, "six cases, growth, deployments, /etc: {table}");
    assert_eq!(table.matches("| peak RSS of the importer, MiB |").count(), CASES.len(), "{table}");
    assert_eq!(table.trim_end(), fs::read_to_string(out.path().join("bench.md")).unwrap().trim_end());
    let svg = fs::read_to_string(out.path().join("bench.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
    assert_eq!(svg.matches("<polyline").count(), 8);
}
