//! From a blob's bytes to the archive's, with the diff id taken on the way.

use std::io::{self, BufReader, Read};

use sha2::{Digest, Sha256};

use super::Compression;

/// The size of the pieces handed on. Large enough that handing over costs nothing, small enough that
/// a handful of them in flight per layer is a few megabytes.
const PIECE: usize = 256 * 1024;

/// zstd frames may ask for a window of up to 2 GiB; this many bits (32 MiB) is what we hold for them. With
/// four layers at once that is most of the 150 MiB that a pull may take.
const ZSTD_WINDOW_BITS: u32 = 25;

/// Reads `input` to its end, hands the decompressed bytes on in pieces and returns their SHA-256.
/// Once `sink` answers false nothing is handed on any more, but the digest is still taken of all.
pub(crate) fn decompress(
    compression: Compression,
    input: impl Read,
    sink: &mut dyn FnMut(Vec<u8>) -> bool,
) -> io::Result<[u8; 32]> {
    pump(decoder(compression, input)?, sink)
}

/// A reader of what `input` holds.
pub(crate) fn decoder<'a>(compression: Compression, input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        // A gzip blob may be several gzip files in a row (pigz, zstd:chunked's ancestor estargz).
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(PIECE, input))),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(input)?;
            decoder.window_log_max(ZSTD_WINDOW_BITS)?;
            Box::new(WindowTold(decoder))
        }
    })
}

/// Says what to do about a window that is too large; the library says only that memory is short.
struct WindowTold<R>(R);

impl<R: Read> Read for WindowTold<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out).map_err(|error| match error.to_string().contains("too much memory") {
            true => io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "it was compressed with a zstd window of more than {} MiB, which is all that is held for one: \
                     compress it without --long, or with --long={ZSTD_WINDOW_BITS}",
                    (1_u32 << ZSTD_WINDOW_BITS) >> 20
                ),
            ),
            false => error,
        })
    }
}

fn pump(mut reader: impl Read, sink: &mut dyn FnMut(Vec<u8>) -> bool) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut open = true;
    loop {
        let mut piece = vec![0; PIECE];
        let mut filled = 0;
        while filled < piece.len() {
            match reader.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if filled == 0 {
            return Ok(hasher.finalize().into());
        }
        piece.truncate(filled);
        hasher.update(&piece);
        open = open && sink(piece);
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
        let mut out = Vec::new();
        let digest = decompress(compression, blob, &mut |piece| {
            out.extend(piece);
            true
        })?;
        Ok((out, digest))
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
    fn zstd_windows_and_frames_to_be_skipped() {
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
        let told = run(Compression::Zstd, &window(26)).unwrap_err().to_string();
        assert!(told.contains("32 MiB") && told.contains("--long=25"), "{told}");
        // zstd:chunked: a frame for each part, frames to be skipped with its list and footer.
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
    fn what_is_behind_a_blob_is_refused() {
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
    fn the_digest_is_of_everything_even_when_nobody_listens() {
        let data = vec![7; 3 * PIECE];
        let mut pieces = 0;
        let digest = decompress(Compression::None, data.as_slice(), &mut |_| {
            pieces += 1;
            false
        });
        assert_eq!((pieces, digest.unwrap()), (1, Sha256::digest(&data).into()));
    }
}
