//! Dirtree objects: the names in a directory, each with the checksums of its objects. A dirtree is a GVariant
//! `(a(say)a(sayay))`: files with their checksums, then directories with the checksums of their dirtree and dirmeta.
//!
//! Format source: libostree's `OSTREE_TREE_GVARIANT_FORMAT`. Nothing in a dirtree is aligned.
//!
//! Parsed without glib: a pull reads thousands of dirtrees several times, and glib needs several allocations and two
//! locks for each name and checksum.

use super::ObjectId;
use super::framing::{array, elements, members, tuple};

/// A parsed dirtree. Borrows the names from the object's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dirtree<'a> {
    /// Name and content object of each file.
    pub files: Vec<(&'a str, ObjectId)>,
    /// Name, dirtree and dirmeta of each directory.
    pub dirs: Vec<(&'a str, ObjectId, ObjectId)>,
}

impl<'a> Dirtree<'a> {
    /// Parses an object's bytes.
    ///
    /// # Errors
    /// The bytes are not in normal form, a checksum has the wrong length, or a name is not valid as a file name. Later
    /// phases join the names to paths.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let not_normal = "not a dirtree in normal form";
        let [files, dirs] = members(bytes).ok_or(not_normal)?;
        let mut parsed = Self::default();
        for element in elements(files).ok_or(not_normal)? {
            let [name, id] = element.and_then(members).ok_or(not_normal)?;
            parsed.files.push((file_name(name)?, checksum(id)?));
        }
        for element in elements(dirs).ok_or(not_normal)? {
            let [name, tree, meta] = element.and_then(members).ok_or(not_normal)?;
            parsed.dirs.push((file_name(name)?, checksum(tree)?, checksum(meta)?));
        }
        Ok(parsed)
    }

    /// Serialises the object. The caller sorts the names.
    pub fn to_bytes(&self) -> Vec<u8> {
        let files = self.files.iter().map(|(name, id)| tuple(&[&nul(name), &id.0]));
        let dirs = self.dirs.iter().map(|(name, tree, meta)| tuple(&[&nul(name), &tree.0, &meta.0]));
        tuple(&[&array(files), &array(dirs)])
    }
}

fn nul(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// Parses a string with its final NUL as a file name.
fn file_name(bytes: &[u8]) -> Result<&str, &'static str> {
    let (0, name) = bytes.split_last().ok_or("not a dirtree in normal form")? else {
        return Err("not a dirtree in normal form");
    };
    let name = std::str::from_utf8(name).map_err(|_| "a name that is not UTF-8")?;
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err("an entry whose name is not valid as a file name");
    }
    Ok(name)
}

fn checksum(bytes: &[u8]) -> Result<ObjectId, &'static str> {
    ObjectId::from_bytes(bytes).ok_or("a checksum of the wrong length")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use ostree::glib::Variant;
    use ostree::glib::variant::ToVariant;
    use proptest::prelude::*;

    type Files = Vec<(String, Vec<u8>)>;
    type Dirs = Vec<(String, Vec<u8>, Vec<u8>)>;

    /// Parses with glib, and applies the same conditions as [`Dirtree::parse`]. glib reads zero bytes as an empty
    /// directory; no program writes one in that form.
    fn parse_with_glib(bytes: &[u8]) -> Option<(Files, Dirs)> {
        if bytes.is_empty() {
            return None;
        }
        let variant = Variant::from_data::<ostree::TreeVariantType, _>(bytes);
        let (files, dirs): (Files, Dirs) = variant.is_normal_form().then(|| variant.get()).flatten()?;
        let proper = |name: &String| !matches!(name.as_str(), "" | "." | "..") && !name.contains('/');
        let good = |name: &String, id: &Vec<u8>| proper(name) && id.len() == 32;
        let good = files.iter().all(|(name, id)| good(name, id))
            && dirs.iter().all(|(name, tree, meta)| good(name, tree) && meta.len() == 32);
        good.then_some((files, dirs))
    }

    fn owned(tree: &Dirtree<'_>) -> (Files, Dirs) {
        let file = |(name, id): &(&str, ObjectId)| (name.to_string(), id.0.to_vec());
        let dir =
            |(name, tree, meta): &(&str, ObjectId, ObjectId)| (name.to_string(), tree.0.to_vec(), meta.0.to_vec());
        (tree.files.iter().map(file).collect(), tree.dirs.iter().map(dir).collect())
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![9 => "[a-zé.]{1,9}", 1 => "x{200,300}", 1 => prop::sample::select(vec!["", ".", "..", "a/b"]).prop_map(String::from)]
    }

    fn id() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![30 => prop::collection::vec(any::<u8>(), 32), 1 => prop::collection::vec(any::<u8>(), 0..40)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

        /// Uses objects from glib with all widths of offsets, some of them damaged.
        #[test]
        fn parsing_and_writing_agree_with_glib(
            files in prop::collection::vec((name(), id()), 0..12),
            dirs in prop::collection::vec((name(), id(), id()), 0..12),
            times in prop_oneof![Just(1_usize), Just(1), Just(40)],
            spoil in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cut in prop_oneof![4 => Just(0_usize), 1 => 1..40_usize],
        ) {
            let times = if files.len() < 3 { 1 } else { times };
            let files: Files = std::iter::repeat_n(files, times).flatten().collect();
            let mut bytes = (files, dirs).to_variant().data().to_vec();
            if let Ok(parsed) = Dirtree::parse(&bytes) {
                prop_assert_eq!(&parsed.to_bytes(), &bytes, "the bytes that glib writes");
            }
            for (at, with) in spoil {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = with;
                }
            }
            bytes.truncate(bytes.len().saturating_sub(cut));
            let ours = Dirtree::parse(&bytes);
            prop_assert_eq!(ours.as_ref().ok().map(owned), parse_with_glib(&bytes), "{:?}", ours.err());
        }

        #[test]
        fn parsing_arbitrary_bytes_agrees_with_glib(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0..20_u8], 0..80)) {
            prop_assert_eq!(Dirtree::parse(&bytes).ok().as_ref().map(owned), parse_with_glib(&bytes));
        }
    }

    #[test]
    fn an_empty_directory_has_bytes() {
        let empty = (Files::new(), Dirs::new()).to_variant().data().to_vec();
        assert_eq!(Dirtree::parse(&empty), Ok(Dirtree::default()));
        assert_eq!(Dirtree::default().to_bytes(), empty);
        assert_eq!(Dirtree::parse(&[]), Err("not a dirtree in normal form"));
    }
}
