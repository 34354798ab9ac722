//! Finds the node image that a release payload names, without a container runtime.
//!
//! The layers are read from the newest one down to the first that has or hides the file. That layer is read to its end,
//! because its content is used only after its digest was compared.

use tar::EntryType;
use tokio::sync::mpsc;

use super::decompress::{Pieces, decoder};
use super::incoming::Incoming;
use super::layout::layers;
use super::references::node_image;
use super::source::Source;
use super::tarstream::{Chunks, TarError, TarStream};
use super::{Failure, ImageChoice, Kind, Layer, PullSpec, ResolvedImage, TagHints};

const DIRECTORY: &[u8] = b"release-manifests";
const FILE: &[u8] = b"image-references";
/// Limit of the file's size in bytes. Real files have about 200 KiB.
const LARGEST: u64 = 8 << 20;
/// Limit of the pieces of 128 KiB between the registry and the reader.
const QUEUED: usize = 8;

const ADVICE: &str = "give the pull spec of a release payload whose references have the node image, or the node \
                      image itself";

/// Chooses the node image of a release payload by `hints`. Returns its pull spec, which has a digest, and the choice.
///
/// The payload may be named by tag or by digest. The signature policy applies to it as to any image. It needs no ostree
/// labels. Fetches its manifest, its config and as few layers as possible.
///
/// # Errors
/// Failures of the registry. [`Kind::BadFormat`] if the image is not a release payload, has none of the tags (the message
/// lists similar ones), or names the image without a digest.
pub async fn resolve_release(
    source: &Source,
    payload: &PullSpec,
    hints: &TagHints,
) -> Result<(PullSpec, ImageChoice), Failure> {
    let image = source.resolve(payload).await?;
    let (manifest, config) = source.any_manifest(&image).await?;
    let name = &image.pinned;
    for layer in layers(name, &manifest, &config)?.iter().rev() {
        match read_layer(source, &image, layer).await? {
            Found::Nothing => {}
            Found::Hidden => break,
            Found::File(json) => {
                return node_image(&json, hints).map_err(|error| {
                    bad(format!("the release payload {name}: release-manifests/image-references {error}"))
                });
            }
            Found::NoFile(fault) => {
                return Err(bad(format!("the release payload {name}: release-manifests/image-references {fault}")));
            }
        }
    }
    Err(bad(format!("{name} is not a release payload: it has no file release-manifests/image-references")))
}

fn bad(message: String) -> Failure {
    Failure { advice: ADVICE, ..Failure::new(Kind::BadFormat, message) }
}

/// Result of the search for the file in one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    /// The layer has no such entry; the layers below decide.
    Nothing,
    /// The layer hides the file of the layers below.
    Hidden,
    /// The content of the file.
    File(Vec<u8>),
    /// The entry is not usable as the file; the fault.
    NoFile(String),
}

async fn read_layer(source: &Source, image: &ResolvedImage, layer: &Layer) -> Result<Found, Failure> {
    let name = format!("{} layer {} ({})", image.pinned, layer.index, layer.digest());
    let mut proxy = source.reader().await?;
    let mut stream = proxy.layer(image, layer).await?;
    let (pieces, incoming) = mpsc::channel::<Vec<u8>>(QUEUED);
    let compression = layer.compression;
    let reader = tokio::task::spawn_blocking(move || {
        let mut archive = Pieces::of(decoder(compression, Incoming::new(incoming))?);
        let found = search(&mut || archive.next())?;
        // Padding after the end marker of the archive counts for the digest.
        while !archive.next()?.is_empty() {}
        Ok::<_, TarError>((found, format!("sha256:{}", hex::encode(archive.digest()))))
    });
    let mut pieces = Some(pieces);
    while let Some(piece) = stream.next().await? {
        // After an error of the reader, the rest is still fetched: a wrong digest explains more than that error.
        if let Some(channel) = &pieces
            && channel.send(piece).await.is_err()
        {
            pieces = None;
        }
    }
    drop(pieces);
    drop(stream);
    proxy.give_back();
    let read = reader.await.map_err(|error| Failure::new(Kind::Local, format!("{name}: a thread failed: {error}")))?;
    let (found, diff_id) = read.map_err(|error| bad(format!("{name}: {error}")))?;
    if diff_id != layer.diff_id {
        return Err(bad(format!("{name}: the archive has the diff id {diff_id}: expected {}", layer.diff_id)));
    }
    Ok(found)
}

/// Searches one layer's archive for the file.
fn search(archive: impl Chunks) -> Result<Found, TarError> {
    let mut tar = TarStream::new(archive);
    let (mut found, mut hidden) = (Found::Nothing, false);
    while let Some(entry) = tar.next_entry()? {
        let parts: Vec<&[u8]> =
            entry.path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
        match parts.as_slice() {
            [b".wh..wh..opq" | b".wh.release-manifests"] => hidden = true,
            [dir] if *dir == DIRECTORY && entry.kind != EntryType::Directory => hidden = true,
            [dir, b".wh..wh..opq" | b".wh.image-references"] if *dir == DIRECTORY => hidden = true,
            [dir, file] if *dir == DIRECTORY && *file == FILE => {
                found = match entry.kind {
                    EntryType::Regular | EntryType::Continuous if entry.size <= LARGEST => {
                        let mut json = Vec::new();
                        tar.read_content(&mut json)?;
                        Found::File(json)
                    }
                    EntryType::Regular | EntryType::Continuous => {
                        Found::NoFile(format!("has {} bytes: expected at most {LARGEST}", entry.size))
                    }
                    kind => Found::NoFile(format!("has the type {kind:?}: expected a file")),
                };
            }
            _ => {}
        }
    }
    Ok(match found {
        Found::Nothing if hidden => Found::Hidden,
        found => found,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io;

    use super::*;

    struct Whole(Option<Vec<u8>>);

    impl Chunks for Whole {
        fn next(&mut self) -> io::Result<Vec<u8>> {
            Ok(self.0.take().unwrap_or_default())
        }
    }

    fn found(entries: &[(&str, EntryType, &str)]) -> Found {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        search(Whole(Some(tar.into_inner().unwrap()))).unwrap()
    }

    #[test]
    fn a_layer_has_or_hides_the_file_or_leaves_it() {
        use EntryType::{Directory, Regular};
        let file = "release-manifests/image-references";
        let json = || Found::File(b"{}".to_vec());
        for (entries, expected) in [
            (&[][..], Found::Nothing),
            (&[("usr/bin/x", Regular, "x"), ("release-manifests", Directory, "")], Found::Nothing),
            (&[("release-manifests/other", Regular, "x")], Found::Nothing),
            (&[("release-manifests", Directory, ""), (file, Regular, "{}")], json()),
            (&[("./release-manifests//image-references", Regular, "{}")], json()),
            (&[(file, Regular, "old"), (file, Regular, "{}")], json()),
            (&[("release-manifests/.wh..wh..opq", Regular, ""), (file, Regular, "{}")], json()),
            (&[("release-manifests/.wh..wh..opq", Regular, "")], Found::Hidden),
            (&[("release-manifests/.wh.image-references", Regular, "")], Found::Hidden),
            (&[(".wh.release-manifests", Regular, "")], Found::Hidden),
            (&[("release-manifests", Regular, "")], Found::Hidden),
            (&[(file, Directory, "")], Found::NoFile("has the type Directory: expected a file".into())),
        ] {
            assert_eq!(found(entries), expected, "{entries:?}");
        }
        let large = "x".repeat(LARGEST as usize + 1);
        assert!(matches!(found(&[(file, Regular, &large)]), Found::NoFile(fault) if fault.contains("at most")));
    }
}
