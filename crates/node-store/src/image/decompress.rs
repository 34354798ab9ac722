//! Decompresses blobs and computes their diff ids.

use std::io::{self, BufReader, Read};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use zstd::stream::read::Decoder;
use zstd::zstd_safe::{DCtx, ResetDirective};

use super::Compression;
use support::lock;

/// Bytes in one decompressed piece: large enough that passing it on is cheap, small enough that several pieces per layer
/// need only a few megabytes.
const PIECE: usize = 256 * 1024;

/// Largest supported zstd window, as a power of two (32 MiB). zstd allows 2 GiB. With four layers at once, this is most
/// of the 170 MiB of memory that a pull may use.
const ZSTD_WINDOW_BITS: u32 = 25;

/// Largest zstd decoder that is kept for the next layer, in bytes: with the usual window of 8 MiB.
const MAX_IDLE: usize = 12 << 20;

/// Decoders of zstd without a layer. The next layer uses their memory again: the windows of hundreds of layers, 8 MiB
/// each, would leave gaps in the heap. Readers that outlive a cancelled import own them, too, so that none stays after the
/// last reader.
#[derive(Clone, Default)]
pub(crate) struct Decoders(Arc<Mutex<Vec<DCtx<'static>>>>);

impl Decoders {
    /// Frees the memory of decoders without a layer.
    pub(crate) fn free(&self) {
        lock(&self.0).clear();
    }
}

/// Reads `input` to its end, passes the decompressed bytes to `sink` in pieces, and returns their SHA-256. After `sink`
/// returns false it is not called again, but the digest still covers all bytes.
pub(crate) fn decompress(
    compression: Compression,
    input: impl Read,
    decoders: &Decoders,
    sink: &mut dyn FnMut(Vec<u8>) -> bool,
) -> io::Result<[u8; 32]> {
    if compression != Compression::Zstd {
        return pump(decoder(compression, input)?, sink);
    }
    let mut context = lock(&decoders.0).pop().unwrap_or_default();
    context.reset(ResetDirective::SessionAndParameters).map_err(|_| io::Error::other("cannot reset a zstd decoder"))?;
    let reader = Decoder::with_context(BufReader::with_capacity(PIECE, input), &mut context);
    let digest = pump(with_limit(reader)?, sink);
    if context.sizeof() <= MAX_IDLE {
        lock(&decoders.0).push(context);
    }
    digest
}

/// Returns a reader of the decompressed bytes of `input`.
pub(crate) fn decoder<'a>(compression: Compression, input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        // A gzip blob may be several gzip files in a row (pigz, estargz).
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(PIECE, input))),
        Compression::Zstd => Box::new(with_limit(Decoder::new(input)?)?),
    })
}

/// Limits the window of a zstd decoder.
fn with_limit<R: io::BufRead>(mut decoder: Decoder<'_, R>) -> io::Result<WithWindowAdvice<Decoder<'_, R>>> {
    decoder.window_log_max(ZSTD_WINDOW_BITS)?;
    Ok(WithWindowAdvice(decoder))
}

/// Replaces the zstd library's error about a window that is too large, which mentions only memory.
struct WithWindowAdvice<R>(R);

impl<R: Read> Read for WithWindowAdvice<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out).map_err(|error| match error.to_string().contains("too much memory") {
            true => io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the layer has a zstd window of more than {} MiB, the supported maximum; compress it without \
                     --long, or with --long={ZSTD_WINDOW_BITS}",
                    (1_u32 << ZSTD_WINDOW_BITS) >> 20
                ),
            ),
            false => error,
        })
    }
}

fn pump(reader: impl Read, sink: &mut dyn FnMut(Vec<u8>) -> bool) -> io::Result<[u8; 32]> {
    let (mut pieces, mut open) = (Pieces::of(reader), true);
    loop {
        let piece = pieces.next()?;
        if piece.is_empty() {
            return Ok(pieces.digest());
        }
        open = open && sink(piece);
    }
}

/// The bytes of a reader in pieces, and their SHA-256.
pub(crate) struct Pieces<R> {
    reader: R,
    hasher: Sha256,
}

impl<R: Read> Pieces<R> {
    pub(crate) fn of(reader: R) -> Self {
        Self { reader, hasher: Sha256::new() }
    }

    /// Returns the next piece. It is empty at the end.
    pub(crate) fn next(&mut self) -> io::Result<Vec<u8>> {
        let mut piece = Vec::with_capacity(PIECE);
        self.reader.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
        self.hasher.update(&piece);
        Ok(piece)
    }

    /// Returns the digest of the pieces so far.
    pub(crate) fn digest(self) -> [u8; 32] {
        self.hasher.finalize().into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn run(compression: Compression, blob: &[u8]) -> io::Result<(Vec<u8>, [u8; 32])> {
        run_with(&Decoders::default(), compression, blob)
    }

    fn run_with(decoders: &Decoders, compression: Compression, blob: &[u8]) -> io::Result<(Vec<u8>, [u8; 32])> {
        let mut out = Vec::new();
        let digest = decompress(compression, blob, decoders, &mut |piece| {
            out.extend(piece);
            true
        })?;
        Ok((out, digest))
    }

    #[test]
    fn a_zstd_decoder_is_used_again_after_a_damaged_blob() {
        let data = b"content".repeat(100_000);
        let blob = zstd::encode_all(data.as_slice(), 1).unwrap();
        let decoders = Decoders::default();
        for _ in 0..3 {
            run_with(&decoders, Compression::Zstd, &blob[..blob.len() / 2]).unwrap_err();
            assert!(run_with(&decoders, Compression::Zstd, &blob).unwrap().0 == data);
        }
        assert_eq!(lock(&decoders.0).len(), 1);
        assert!(lock(&decoders.0).iter().all(|context| context.sizeof() <= MAX_IDLE));
        decoders.free();
        assert!(lock(&decoders.0).is_empty());
    }

    #[test]
    fn all_compressions_give_the_same_archive_and_diff_id() {
        let data: Vec<u8> = (0..600_000_u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        let expected: [u8; 32] = Sha256::digest(&data).into();
        let members = [gzip(&data[..1000]), gzip(&data[1000..])].concat();
        for (compression, blob) in [
            (Compression::None, data.clone()),
            (Compression::Gzip, gzip(&data)),
            (Compression::Gzip, members),
            (Compression::Zstd, zstd::encode_all(data.as_slice(), 1).unwrap()),
        ] {
            let (out, digest) = run(compression, &blob).unwrap();
            assert!(out == data && digest == expected, "{compression:?}");
        }
    }

    #[test]
    fn zstd_windows_are_limited_and_skippable_frames_are_skipped() {
        let data: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
        let window = |bits| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(bits).unwrap();
            encoder.write_all(&data).unwrap();
            encoder.finish().unwrap()
        };
        for bits in [10, 23, 24, 25] {
            assert!(run(Compression::Zstd, &window(bits)).unwrap().0 == data, "{bits}");
        }
        let error = run(Compression::Zstd, &window(26)).unwrap_err().to_string();
        assert!(error.contains("32 MiB") && error.contains("--long=25"), "{error}");
        // zstd:chunked: a frame for each part, then skippable frames with the list of parts and the footer.
        let skipped = |content: &[u8]| {
            [&0x184d_2a50_u32.to_le_bytes()[..], &(content.len() as u32).to_le_bytes(), content].concat()
        };
        let mut chunked: Vec<u8> = data.chunks(70_000).flat_map(|part| zstd::encode_all(part, 1).unwrap()).collect();
        chunked.extend(skipped(&zstd::encode_all(&b"{\"version\":1}"[..], 1).unwrap()));
        chunked.extend(skipped(b"offset length of the list, GNUlInUx"));
        assert!(run(Compression::Zstd, &chunked).unwrap().0 == data);
        assert!(run(Compression::Zstd, &chunked[..chunked.len() - 1]).is_err());
    }

    #[test]
    fn bytes_after_the_end_of_a_blob_are_refused() {
        let data = vec![b'x'; 100_000];
        for (compression, blob) in
            [(Compression::Gzip, gzip(&data)), (Compression::Zstd, zstd::encode_all(data.as_slice(), 1).unwrap())]
        {
            assert!(run(compression, &[&blob[..], b"more to come"].concat()).is_err(), "{compression:?}");
        }
    }

    #[test]
    fn truncated_and_corrupt_blobs_are_errors() {
        let data = vec![b'x'; 100_000];
        for (compression, blob) in
            [(Compression::Gzip, gzip(&data)), (Compression::Zstd, zstd::encode_all(data.as_slice(), 1).unwrap())]
        {
            assert!(run(compression, &blob[..blob.len() - 1]).is_err(), "{compression:?}");
            assert!(run(compression, b"no such thing").is_err(), "{compression:?}");
        }
        let mut corrupt = gzip(&data);
        let last = corrupt.len() - 6;
        corrupt[last] ^= 1;
        assert!(run(Compression::Gzip, &corrupt).is_err());
    }

    #[test]
    fn the_digest_covers_all_bytes_after_the_sink_has_stopped() {
        let data = vec![7; 3 * PIECE];
        let mut pieces = 0;
        let digest = decompress(Compression::None, data.as_slice(), &Decoders::default(), &mut |_| {
            pieces += 1;
            false
        });
        assert_eq!((pieces, digest.unwrap()), (1, Sha256::digest(&data).into()));
    }
}
