#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::fs;

use serde_json::json;

use super::super::record::tests::staged;
use super::*;

/// Checks that `content` survives its file, and that each kind of damage is recognised.
pub(crate) fn survives_every_damage<T: StateFile + Debug>(content: &T) {
    let temp = tempfile::tempdir().unwrap();
    let dir = StateDir::below(temp.path());
    let path = temp.path().join(T::NAME);
    let (shown, image) = (format!("{content:?}"), staged().pulled.image);
    let checksum = dir.save(content, Some(&image)).unwrap();
    let load = || dir.load_of::<T>(Some(&image), Some(&checksum)).map(|loaded| format!("{loaded:?}"));
    assert_eq!(load().unwrap(), shown);
    let whole: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let without = |fields: &[&str]| {
        let mut value = whole.clone();
        fields.iter().for_each(|field| drop(value.as_object_mut().unwrap().remove(*field)));
        value
    };
    let signed = |mut value: Value| {
        value[CHECKSUM] = Checksum::of(&value).0.into();
        value.to_string().into_bytes()
    };
    let with = |field: &str, other: Value| {
        let mut value = without(&[CHECKSUM]);
        value[field] = other;
        signed(value)
    };
    let foreign =
        |damage: &Damage| matches!(damage, Damage::Foreign(_)) && damage.to_string().contains("another agent wrote it");
    // As a person changes it.
    fs::write(&path, without(&[CHECKSUM, "boot_id"]).to_string()).unwrap();
    assert_eq!(format!("{:?}", dir.load::<T>().unwrap()), shown);

    let malformed = |damage: &Damage| matches!(damage, Damage::Malformed(_));
    let mut changed = whole.clone();
    changed["added"] = true.into();
    let changed = changed.to_string().into_bytes();
    type Case<'a> = (&'a str, Vec<u8>, &'a dyn Fn(&Damage) -> bool);
    let cases: [Case<'_>; 13] = [
        ("cut", fs::read(&path).unwrap()[..20].to_vec(), &malformed),
        ("not text", b"{\xff\x00".to_vec(), &malformed),
        ("not an object", b"{}[]".to_vec(), &malformed),
        ("an empty object", b"{}".to_vec(), &malformed),
        ("a list", b"[]".to_vec(), &malformed),
        ("another shape", signed(json!({ "schema": SCHEMA })), &malformed),
        ("deep", "{\"a\":".repeat(9000).into_bytes(), &malformed),
        ("changed", changed, &|damage| *damage == Damage::Checksum),
        ("another version", with("schema", json!(7)), &foreign),
        ("a version as text", with("schema", json!("2")), &foreign),
        ("another boot", with("boot_id", json!("x")), &|damage| *damage == Damage::OtherBoot),
        ("another image", with("image", json!("x")), &|damage| *damage == Damage::OtherImage("x".into())),
        ("another plan", signed(without(&[CHECKSUM, "boot_id"])), &|damage| *damage == Damage::OtherPlan),
    ];
    let recognised = |name: &str, expected: &dyn Fn(&Damage) -> bool| {
        let unusable = load().unwrap_err();
        assert!(expected(&unusable.damage), "{name}: {unusable}");
        let text = unusable.to_string();
        assert!(text.starts_with("cannot use ") && text.contains(T::NAME) && text.ends_with(T::REMEDY), "{text}");
    };
    for (name, text, expected) in cases {
        fs::write(&path, text).unwrap();
        recognised(name, expected);
    }
    fs::remove_file(&path).unwrap();
    recognised("missing", &|damage| *damage == Damage::Missing);
    assert!(if_present(load()).unwrap().is_none());
    fs::create_dir(&path).unwrap();
    recognised("a directory", &|damage| matches!(damage, Damage::Unreadable(_)));
    assert!(dir.save(content, None).is_err());
}

#[test]
fn a_file_of_an_unknown_image_belongs_to_each() {
    let temp = tempfile::tempdir().unwrap();
    let dir = StateDir::below(temp.path());
    dir.save(&etc_merge::Plan::default(), None).unwrap();
    for image in [None, Some(&staged().pulled.image)] {
        assert!(dir.load_of::<etc_merge::Plan>(image, None).is_ok(), "{image:?}");
    }
    survives_every_damage(&etc_merge::Plan::default());
}
